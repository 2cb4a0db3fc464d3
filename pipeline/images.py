"""Images are decoded once into one uint8 array of ink: 0 is background, 255 full ink. The array is cached on disk."""

import functools
import hashlib
import json
import math
import os
import time
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.decoding import (
    CHUNK,
    COLOURS,
    DEEP,
    EIGHT_BITS,
    background_of,
    border_of,
    depth_of,
    describe_fault,
    edges,
    file_level,
    fit_to_square,
    map_images,
    read_grey,
    to_grey,
    to_ink,
    white_level,
)
from pipeline.errors import DataError, first_line, warn
from pipeline.files import atomic_write, cache_folder
from pipeline.image_paths import check_root, path_remedy
from pipeline.sources import Table

CACHE_FORMAT = 4     # raised when decoding changes, so that older caches are not used
SAMPLE = 256         # images that tell what a table's are like
LEAST_MIXED = 0.02   # share of images of the other background from which each image's own border decides


@dataclass(frozen=True)
class ImageStatistics:
    """Background, size and range, measured on the training images and applied to every image that the network sees."""

    background: int | None  # 255 for black on white, 0 for white on black, None if each image's own border decides
    size: int               # side of the stored images in pixels
    levels: float = 255     # grey level that is white: 1, 16, 255, 4095, ...

    @property
    def described(self) -> str:
        """The background and the range in words."""
        names = {255: "black on white", 0: "white on black", None: "both backgrounds"}
        return names[self.background] + (f", grey levels 0 to {self.levels:g}" if self.levels != 255 else "")


@dataclass(frozen=True)
class LoadSettings:
    """Settings of decoding and of the image cache."""

    cache_dir: str = ""    # folder of the cache; empty: the user's cache folder
    num_workers: int = -1  # decoding processes; -1: one per core, 0: this process
    on_bad_image: str = "error"  # or "skip"


# Measures of an image: highest level, quartiles of the border, longer side, depth, fractions among the levels.
MEASURES = np.dtype([("highest", float), ("border", float, 3), ("side", int), ("depth", int), ("fractions", bool)])


@dataclass(frozen=True, eq=False)
class Survey:
    """Measures of some images of a table, and what they say of the table."""

    images: np.ndarray  # [N] of MEASURES

    @property
    def levels(self) -> float:
        """The grey level that is white. Transparent images have 8 bits, however dark their ink is."""
        plain = self.images[self.images["depth"] != COLOURS]
        level = white_level(plain["highest"].max(initial=0), bool(plain["fractions"].any()))
        return level if len(plain) == len(self.images) else max(level, 255.0)

    @property
    def size(self) -> int:
        """The longest side, 0 without images."""
        return int(self.images["side"].max(initial=0))

    def whites(self, levels: float) -> np.ndarray:
        """Return the grey level that is white in each image [N], if `levels` is the table's."""
        each = self.images[["depth", "highest"]].tolist()
        return np.array([file_level(depth, highest, levels) for depth, highest in each], dtype=float)

    def backgrounds(self, levels: float) -> tuple[np.ndarray, np.ndarray]:
        """Return each image's background, 0 or 255 [N], and whether three quarters of its border are near it [N]."""
        low, median, high = self.images["border"].T / self.whites(levels)
        return np.where(median > 0.5, 255, 0), (low >= 0.75) | (high <= 0.25)

    def background(self, levels: float) -> int | None:
        """Return the usual background, or None if a share of the images has the other one."""
        backgrounds, flat = self.backgrounds(levels)
        counts = np.bincount(backgrounds[flat] // 255, minlength=2)
        if counts.sum() >= 0.8 * len(flat) and counts.min() >= max(3, LEAST_MIXED * counts.sum()):
            return None
        return 0 if len(flat) and backgrounds.mean() <= 127 else 255


def quartiles(borders: np.ndarray) -> np.ndarray:
    """Return the quartiles of borders [..., N] as [..., 3]."""
    return np.sort(borders)[..., np.rint(np.array([0.25, 0.5, 0.75]) * (borders.shape[-1] - 1)).astype(int)]


def measure_image(source: str | bytes) -> tuple | str:
    """Return the MEASURES of an image, or in a few words why it cannot be used."""
    try:
        raw, alpha = read_grey(source)
        return raw.max(), quartiles(border_of(raw, alpha)), max(raw.shape), depth_of(raw, alpha), raw.dtype.kind == "f"
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        return describe_fault(error)


def measure_pixels(pixels: np.ndarray) -> np.ndarray:
    """Return the MEASURES [N] of images [N, H, W] of a table of pixels."""
    found = np.empty(len(pixels), MEASURES)
    found["highest"], found["border"] = pixels.max(axis=(1, 2), initial=0), quartiles(edges(pixels))
    found["side"], found["depth"], found["fractions"] = max(pixels.shape[1:]), DEEP, pixels.dtype.kind == "f"
    return found


def survey(table: Table, rows: np.ndarray, workers: int = 0) -> Survey:
    """Return the measures of some rows' images. Those that cannot be read are reported when all are decoded."""
    rows = np.setdiff1d(rows, table.bad_rows)
    if table.pixels is not None:
        return Survey(measure_pixels(table.pixels if len(rows) == len(table) else table.pixels[rows]))
    results = map_images(measure_image, sources_of(table, rows), workers)
    return Survey(np.array([found for found in results if not isinstance(found, str)], MEASURES))


def survey_sample(table: Table) -> Survey:
    """Return the measures of up to 256 random images of a table."""
    return survey(table, np.random.default_rng(0).permutation(len(table))[:SAMPLE])


def sources_of(table: Table, rows: np.ndarray) -> list[str] | list[bytes]:
    """Return the paths of some rows' images, or the contents of their files if the table holds them."""
    if table.encoded is not None:
        return [table.encoded[row] for row in rows]
    return [os.path.join(table.image_root, name) for name in table.rows.image_path.iloc[rows]]


def estimate_image_statistics(table: Table, image_size: int | None, workers: int = -1) -> ImageStatistics:
    """Measure background, range, and the size to store: the images' own, at most `image_size`.

    A sample of the images is enough if they have 8 bits, all of them in use, and one background; otherwise all are
    looked at, and images of both backgrounds are counted in one line.
    """
    found = survey_sample(table)
    deep = found.images["depth"] == DEEP
    usual = table.pixels.dtype == np.uint8 if table.pixels is not None else not deep.any()
    if not usual or found.levels != 255 or found.background(255) is None:
        found = survey(table, np.arange(len(table)), workers)
    levels, size = found.levels, found.size or image_size or 32
    background = found.background(levels)
    if background is None:
        print(describe_mixture(table, found, levels))
    return ImageStatistics(background, min(size, image_size or size), levels)


def describe_mixture(table: Table, found: Survey, levels: float) -> str:
    """Return one line with the number of a table's images that have the rarer background."""
    light = int((found.backgrounds(levels)[0] == 255).sum())
    rare, common = sorted([(light, "black on white"), (len(found.images) - light, "white on black")])
    return (f"{table.path}: {rare[0]:,} of {len(found.images):,} images are {rare[1]}, the others {common[1]}; each "
            "image's own border decides")


def compare_with_training(table: Table, statistics: ImageStatistics, workers: int) -> ImageStatistics:
    """Return the statistics to load a table's images with: their own borders decide if they have both backgrounds.

    Warns of images that are the opposite of the training images, or of another range.
    """
    found = survey_sample(table)
    if warn_of_range(table, found, statistics.levels):
        return statistics
    if statistics.background is None or not len(found.images):
        return statistics
    if found.background(statistics.levels) is None:  # or so it seems
        found = survey(table, np.arange(len(table)), workers)
    background = found.background(statistics.levels)
    if background is None:
        print(describe_mixture(table, found, statistics.levels))
        return replace(statistics, background=None)
    if background == statistics.background:
        return statistics
    warn(f"{table.path}: the training images are {statistics.described} and these are the opposite; invert them")
    return statistics


def warn_of_range(table: Table, found: Survey, levels: float) -> bool:
    """Warn of a table whose images are much darker than the training images or have levels above their white."""
    highest, depths = found.images["highest"], found.images["depth"]
    whites = np.where(depths == EIGHT_BITS, min(levels, 255.0), levels)
    if table.pixels is None:
        whites = np.where(depths == DEEP, found.whites(levels), whites)
    shares = np.where(depths == COLOURS, 0, highest / whites)
    share = shares.max(initial=0)
    if share == 0 or 1 / 8 < share <= (2 if found.images["fractions"].any() else 1):
        return False
    top, white = highest[shares.argmax()], whites[shares.argmax()]
    factor = white / (found.levels if found.levels != white else top)
    remedy = f"multiply them by {factor:g}" if factor > 1 else f"divide them by {1 / factor:g}"
    warn(f"{table.path}: its grey levels go up to {top:g}, those of the training images to {levels:g}; {remedy}")
    return True


def load_images(tables: list[Table], statistics: ImageStatistics, settings: LoadSettings) -> list[np.ndarray]:
    """Return the ink of every table's images, uint8 [N, 1, size, size] each.

    Raises DataError that lists the first ten bad images; with `on_bad_image="skip"` they are warned of and left blank.
    """
    for table in tables:
        check_root(table)
    owns = [compare_with_training(table, statistics, settings.num_workers) for table in tables]
    loaded = [_load_table(table, own, settings) for table, own in zip(tables, owns)]
    faults = [describe_row(table, place) for table in tables for place in table.bad_rows]
    if not faults:
        return loaded
    count = f"{len(faults)} image{'s' * (len(faults) > 1)} cannot be used"
    listed = "\n  ".join(faults[:10]) + f"\n  and {len(faults) - 10} more" * (len(faults) > 10)
    remedies = dict.fromkeys(filter(None, map(path_remedy, tables)))
    for table in tables:
        if len(table.bad_rows) == len(table):
            raise DataError(f"{table.path}: none of its images can be used; {path_remedy(table) or 'replace them'}:\n  "
                            f"{listed}")
    if settings.on_bad_image == "error":
        remedy = "; ".join(remedies) or "replace each file or remove its row"
        raise DataError(f"{count}; {remedy}, or leave them out with --on-bad-image skip:\n  {listed}")
    warn(f"{count} and left out:\n  {listed}")
    return loaded


def describe_row(table: Table, place: int) -> str:
    """Return a bad row, its image's path and why it cannot be used."""
    path = f"{table.rows.image_path.iloc[place]!r}: " if "image_path" in table.rows else ""
    return f"{table.where(place)}: {path}{table.faults[place]}"


def _load_table(table: Table, statistics: ImageStatistics, settings: LoadSettings) -> np.ndarray:
    """Return a table's images, decoding those that the cache does not hold or whose files have changed since."""
    if table.pixels is not None:
        return _load_pixels(table.pixels, statistics)[:, None]
    if table.encoded is not None:
        return decode_rows(table, np.arange(len(table)), statistics, settings)[:, None]
    paths = sources_of(table, np.arange(len(table)))
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
    fresh = decode_rows(table, stale, statistics, settings)
    seconds = time.perf_counter() - started
    print(f"decoded {len(stale):,} images of {table.path} in {seconds:.1f} s ({len(stale) / seconds:,.0f}/s)")
    images = np.array(images)  # Windows cannot replace a file that is still mapped
    images[stale] = fresh
    identities[table.bad_rows] = -1  # to be tried again by the next run
    return _write_cache(cache, images, identities)[:, None]


def _load_pixels(pixels: np.ndarray, statistics: ImageStatistics) -> np.ndarray:
    """Return the ink [N, size, size], uint8, of grey levels [N, H, W]."""
    parts = []
    for first in range(0, len(pixels), CHUNK):
        grey = to_grey(pixels[first : first + CHUNK], statistics.levels)
        light = statistics.background or 0
        if statistics.background is None:
            light = np.where(np.median(edges(grey), axis=1) > 127, 255, 0).astype(np.uint8)[:, None, None]
        inks = grey ^ np.uint8(light)  # 255 - grey where the background is 255
        fits = grey.shape[1:] == (statistics.size, statistics.size)
        parts.append(inks if fits else np.stack([fit_to_square(ink, statistics.size) for ink in inks]))
    return np.concatenate(parts)


def decode_rows(table: Table, rows: np.ndarray, statistics: ImageStatistics, settings: LoadSettings) -> np.ndarray:
    """Return the ink [N, size, size] of some rows' images; add the faults to the table, and warn of images whose
    depth is a guess."""
    images, faults, deeper = decode_images(sources_of(table, rows), statistics, settings.num_workers)
    table.faults.update({int(rows[place]): fault for place, fault in faults.items()})
    if deeper:
        more = f" and {len(deeper) - 1:,} more images" if len(deeper) > 1 else ""
        warn(f"{table.where(rows[deeper[0]])}{more}: grey levels beyond {statistics.levels:g}, the training images' "
             "white; each is scaled by its own depth: save them with as many bits as the others to be sure")
    return images


def decode_images(sources: list[str] | list[bytes], statistics: ImageStatistics,
                  workers: int) -> tuple[np.ndarray, dict[int, str], list[int]]:
    """Decode images, files or contents of files, on several processes. Return ink [N, size, size], the faults by
    position, and the positions of images whose depth is a guess."""
    size = statistics.size
    images, faults, deeper = np.zeros((len(sources), size, size), dtype=np.uint8), {}, []
    for place, result in enumerate(map_images(functools.partial(decode_image, statistics), sources, workers)):
        if isinstance(result, str):
            faults[place] = result
        else:
            images[place] = np.frombuffer(result, np.uint8, size * size).reshape(size, size)
            if len(result) > size * size:
                deeper.append(place)
    return images, faults, deeper


def decode_image(statistics: ImageStatistics, source: str | bytes) -> bytes | str:
    """Return the ink [size, size] of an image as bytes, with one more byte if its depth is a guess, other than the
    table's and below 16 bits; or in a few words why it cannot be used."""
    try:
        raw, alpha = read_grey(source)
        depth = depth_of(raw, alpha)
        level = file_level(depth, float(raw.max()) if depth == DEEP else 0, statistics.levels)
        grey = to_grey(raw, level)
        background = background_of(grey, alpha) if statistics.background is None else statistics.background
        ink = fit_to_square(to_ink(grey, alpha, background), statistics.size)
        return ink.tobytes() + b"+" * (depth == DEEP and statistics.levels < level < 65535)
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        return describe_fault(error)


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
