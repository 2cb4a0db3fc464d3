"""Images are decoded once into one uint8 array of ink: 0 is background, 255 full ink. The array is cached on disk."""

import functools
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from pipeline.distributed import exit_with_parent
from pipeline.errors import DataError, first_line, warn
from pipeline.files import atomic_write, cache_folder
from pipeline.signals import block_signals
from pipeline.tables import Table

LARGEST_IMAGE = 50_000_000  # pixels; a larger file may be made to exhaust the memory
CACHE_FORMAT = 3            # raised when decoding changes, so that older caches are not used
DECODE_CHUNK = 1000         # images that a process decodes at a time


@dataclass(frozen=True)
class ImageStatistics:
    """Background and size, measured on the training images and applied to every image that the network sees."""

    background: int  # grey level of the background: 255 for black on white, 0 for white on black
    size: int        # side of the stored images in pixels


@dataclass(frozen=True)
class LoadSettings:
    """Settings of decoding and of the image cache."""

    cache_dir: str = ""    # folder of the cache; empty: the user's cache folder
    num_workers: int = -1  # decoding processes; -1: one per core, 0: this process
    on_bad_image: str = "error"  # or "skip"


def read_grey(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return grey levels [H, W], uint8, of an image's first frame, upright, and its opacity [H, W] or None."""
    with open(path, "rb") as file:  # at once, since Pillow reads a file in many small pieces
        data = file.read()
    if not data:
        raise ValueError("the file is empty")
    with warnings.catch_warnings(action="ignore"):
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(f"{image.width} x {image.height} pixels are too many; scale it down")
        image.load()
        if "exif" in image.info:
            with suppress(Exception):  # damaged EXIF data rotates nothing
                image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits or more per pixel, which convert("L") would clip
        deep = np.nan_to_num(np.asarray(image, dtype=np.float32))
        highest = max(float(deep.max()), 65535.0)
        if deep.max() < 512:  # resampling may overshoot 1 or 255
            highest = 1.0 if image.mode == "F" and deep.max() < 2 else 255.0
        return (deep / (highest / 255)).clip(0, 255).astype(np.uint8), None
    if "A" in image.getbands() or "transparency" in image.info:
        grey, alpha = image.convert("RGBA").convert("LA").split()
        return np.asarray(grey), np.asarray(alpha)
    return np.asarray(image.convert("L")), None


def background_of(grey: np.ndarray, alpha: np.ndarray | None) -> int:
    """Return the background, 0 or 255: the border's if most of it is opaque, else the opposite of what is drawn."""
    border = np.ones(grey.shape, dtype=bool)
    border[1:-1, 1:-1] = False
    opaque = np.full(grey.shape, True) if alpha is None or not alpha.any() else alpha >= min(128, alpha.max())
    if opaque[border].mean() <= 0.5:
        return 0 if grey[opaque].mean() > 127 else 255
    return 255 if np.median(grey[border & opaque]) > 127 else 0


def to_ink(grey: np.ndarray, alpha: np.ndarray | None, background: int) -> np.ndarray:
    """Return the ink [H, W], uint8: the distance from the background, 0 where the image is transparent."""
    ink = grey if background == 0 else 255 - grey
    return ink if alpha is None else (ink.astype(np.uint16) * alpha // 255).astype(np.uint8)


def fit_to_square(ink: np.ndarray, size: int) -> np.ndarray:
    """Return ink [size, size], uint8: scaled without distortion and centred on background."""
    height, width = ink.shape
    if height == width == size:
        return ink
    scaled = [max(1, round(side * size / max(height, width))) for side in (width, height)]
    page = Image.new("L", (size, size), 0)
    page.paste(Image.fromarray(ink).resize(scaled, Image.Resampling.BILINEAR),
               ((size - scaled[0]) // 2, (size - scaled[1]) // 2))
    return np.asarray(page)


def describe_fault(error: Exception) -> str:
    """Return in a few words why an image cannot be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return (getattr(error, "strerror", None) or first_line(error)).lower()


def estimate_image_statistics(table: Table, image_size: int | None) -> ImageStatistics:
    """Measure the background, and the size to store: the images' own, at most `image_size`, on a sample of a table."""
    background, size = _measure_sample(table)
    size = size or image_size or 32
    return ImageStatistics(background, min(size, image_size or size))


def _measure_sample(table: Table) -> tuple[int, int]:
    """Return the usual background and the longest side of up to 256 random images; 255 and 0 if none is readable."""
    backgrounds, sides = [], [0]
    for place in np.setdiff1d(np.random.default_rng(0).permutation(len(table))[:256], table.bad_rows).tolist():
        with suppress(Exception):  # reported with its row when all images are decoded
            grey, alpha = (table.pixels[place], None) if table.pixels is not None else read_grey(
                os.path.join(table.image_root, table.rows.image_path.iloc[place]))
            backgrounds.append(background_of(grey, alpha))
            sides.append(max(grey.shape))
    return 255 if np.mean(backgrounds or 255) > 127 else 0, max(sides)


def load_images(tables: list[Table], statistics: ImageStatistics, settings: LoadSettings) -> list[np.ndarray]:
    """Return the ink of every table's images, uint8 [N, 1, size, size] each.

    Raises DataError that lists the first ten bad images; with `on_bad_image="skip"` they are warned of and left blank.
    """
    colours = "black on white" if statistics.background else "white on black"
    for table in tables:
        if table.pixels is None and not table.image_root.is_dir():
            raise DataError(f"{table.image_root}: no such folder; name the images' folder with --root-dir")
        background, size = _measure_sample(table)
        if size and background != statistics.background:
            warn(f"{table.path}: the training images are {colours} and these are the opposite; invert them")
    loaded = [_load_table(table, statistics, settings) for table in tables]
    faults = [f"{table.path}, row {table.rows.index[place]}: {table.rows.image_path.iloc[place]!r}: "
              f"{table.faults[place]}" for table in tables for place in table.bad_rows]
    if not faults:
        return loaded
    count = f"{len(faults)} image{'s' * (len(faults) > 1)} cannot be used"
    listed = "\n  ".join(faults[:10]) + f"\n  and {len(faults) - 10} more" * (len(faults) > 10)
    for table in tables:
        if len(table.bad_rows) == len(table):
            raise DataError(f"{table.path}: none of its images can be used; {_path_remedy(table)}:\n  {listed}")
    if settings.on_bad_image == "error":
        raise DataError(f"{count}; replace each file or remove its row, or leave them out with --on-bad-image skip:\n  "
                        f"{listed}")
    warn(f"{count} and left out:\n  {listed}")
    return loaded


def _path_remedy(table: Table) -> str:
    """Return what may help if none of a table's images can be used."""
    name, root = table.rows.image_path.iloc[0], table.image_root
    if all("symbolic link" in fault for fault in table.faults.values()):
        return f"copy the images into {root} (cp -rL), or give the folder that the link leads to as --root-dir"
    if (root.parent / name).is_file():
        return "its paths start from --data-dir: give --root-dir . (--extra-root . for extra rows)"
    found = [path.name for path in (root / name).parent.glob(glob.escape(Path(name).name) + ".*")]
    if len(found) == 1:
        return f"write the extension into its paths, as in {found[0]}"
    return f"if its paths do not start from {root}, name their folder with --root-dir (--extra-root for extra rows)"


def _load_table(table: Table, statistics: ImageStatistics, settings: LoadSettings) -> np.ndarray:
    """Return a table's images, decoding those that the cache does not hold or whose files have changed since."""
    if table.pixels is not None:
        inks = (to_ink(grey, None, statistics.background) for grey in table.pixels)
        return np.stack([fit_to_square(ink, statistics.size) for ink in inks])[:, None]
    paths = [os.path.join(table.image_root, name) for name in table.rows.image_path]
    key = json.dumps([CACHE_FORMAT, str(table.image_root.resolve()), astuple(statistics), list(table.rows.image_path)])
    cache = cache_folder(settings.cache_dir) / f"images-{hashlib.sha256(key.encode()).hexdigest()[:24]}.bin"
    identities = _file_identities(paths)
    images, known = _read_cache(cache, (len(paths), statistics.size, statistics.size))
    changed = (known != identities) | (known == -1)
    changed[table.bad_rows] = False
    stale = np.flatnonzero(changed.any(axis=1))
    if not len(stale):
        return images[:, None]
    started = time.perf_counter()
    fresh, faults = decode_images([paths[place] for place in stale], statistics, settings.num_workers)
    seconds = time.perf_counter() - started
    print(f"decoded {len(stale):,} images of {table.path} in {seconds:.1f} s ({len(stale) / seconds:,.0f}/s)")
    images = np.array(images)  # Windows cannot replace a file that is still mapped
    images[stale] = fresh
    table.faults.update({int(stale[place]): fault for place, fault in faults.items()})
    identities[table.bad_rows] = -1  # to be tried again by the next run
    return _write_cache(cache, images, identities)[:, None]


def decode_images(paths: list[str], statistics: ImageStatistics, workers: int) -> tuple[np.ndarray, dict[int, str]]:
    """Decode images on several processes. Return ink [N, size, size] and the faults by position."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(paths) // DECODE_CHUNK, cores if workers < 0 else workers, 61)  # 61: the most on Windows
    images, faults = np.zeros((len(paths), statistics.size, statistics.size), dtype=np.uint8), {}
    decode = functools.partial(decode_image, statistics)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)  # spawned ones import torch
    pool = ProcessPoolExecutor(max(workers, 1), mp_context=context, initializer=_start_worker)
    try:
        with block_signals():  # a pool forks when it is given work
            results = pool.map(decode, paths, chunksize=DECODE_CHUNK) if workers else map(decode, paths)
        for place, result in enumerate(tqdm(results, "decoding", len(paths), unit="img", disable=None)):
            if isinstance(result, str):
                faults[place] = result
            else:
                images[place] = np.frombuffer(result, np.uint8).reshape(images.shape[1:])
    except BrokenProcessPool:
        raise DataError("a process that decodes images was killed, maybe out of memory; try --num-workers 0") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return images, faults


def decode_image(statistics: ImageStatistics, path: str) -> bytes | str:
    """Return the ink [size, size] of an image as bytes, or in a few words why it cannot be used."""
    try:
        return fit_to_square(to_ink(*read_grey(path), statistics.background), statistics.size).tobytes()
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        return describe_fault(error)


def _start_worker() -> None:
    """Leave a terminal's signals to the parent of this decoding process, and end with the parent."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for name, handler in (("SIGINT", signal.SIG_IGN), ("SIGTERM", signal.SIG_DFL), ("SIGUSR1", signal.SIG_IGN)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)
    exit_with_parent()


def _file_identities(paths: list[str]) -> np.ndarray:
    """Return size, mtime and ctime of each file, int64 [N, 3]; -1 if there is no such file."""
    identities = np.full((len(paths), 3), -1, dtype=np.int64)
    for place, path in enumerate(paths):
        with suppress(OSError, ValueError):
            status = os.stat(path)
            identities[place] = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return identities


def _read_cache(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the images as a read-only memory map and the identities; zeros and -1 if there is no complete file."""
    with suppress(OSError):
        if path.stat().st_size == math.prod(shape) + shape[0] * 24:
            identities = np.fromfile(path, np.int64, offset=math.prod(shape)).reshape(-1, 3)
            return np.memmap(path, np.uint8, "r", shape=shape), identities
    return np.zeros(shape, dtype=np.uint8), np.full((shape[0], 3), -1)


def _write_cache(path: Path, images: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """Store the images and return them as a memory map; as they are if the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.write(images.data)
            file.write(identities.data)
        return np.memmap(path, np.uint8, "r", shape=images.shape)
    except OSError as error:
        warn(f"{path.parent}: the decoded images cannot be cached ({first_line(error)}); the next run decodes again")
        return images
