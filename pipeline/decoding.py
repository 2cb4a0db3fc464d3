"""Single images: grey levels, background, ink, size; and the processes that many of them are decoded by."""

import io
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from pipeline.distributed import exit_with_parent
from pipeline.errors import DataError, first_line
from pipeline.signals import block_signals

LARGEST_IMAGE = 50_000_000  # pixels; a larger file may be made to exhaust the memory
CHUNK = 1000                # images that a process is given at a time
DEEP, EIGHT_BITS, COLOURS = range(3)  # depths: the white of colours with opacity or from a palette is always 255


def read_grey(source: str | bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Return an image's grey levels [H, W], upright, of its first frame, as they are stored: uint8, or another type of
    deeper images; and its opacity [H, W], uint8, or None. The source is a path, or a file's content."""
    if isinstance(source, str):
        with open(source, "rb") as file:  # at once, since Pillow reads a file in many small pieces
            source = file.read()
    if not source:
        raise ValueError("the file is empty")
    with warnings.catch_warnings(action="ignore"):
        image = Image.open(io.BytesIO(source))
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(f"{image.width} x {image.height} pixels are too many; scale it down")
        image.load()
        if "exif" in image.info:
            with suppress(Exception):  # damaged EXIF data rotates nothing
                image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits or more per pixel, which convert("L") would clip
        return np.nan_to_num(np.asarray(image), posinf=0, neginf=0), None
    if image.mode == "P" or "A" in image.getbands() or "transparency" in image.info:
        grey, alpha = image.convert("RGBA").convert("LA").split()
        return np.asarray(grey), np.asarray(alpha)
    return np.asarray(image.convert("L")), None


def white_level(highest: float, fractions: bool) -> float:
    """Return the grey level that is white for a table whose highest level this is, of whole numbers or fractions."""
    if fractions and highest < 2:  # resampling may overshoot 1 or 255
        return 1.0
    if highest <= 0 or 16 < highest < (512 if fractions else 256):
        return 255.0
    return 16.0 if highest == 16 else 2.0 ** math.ceil(math.log2(highest + 1)) - 1


def depth_of(raw: np.ndarray, alpha: np.ndarray | None) -> int:
    """Return DEEP, EIGHT_BITS or COLOURS, of an image as `read_grey` returns it."""
    return COLOURS if alpha is not None else EIGHT_BITS if raw.dtype == np.uint8 else DEEP


def file_level(depth: int, highest: float, levels: float) -> float:
    """Return the level that is white in a file of a table whose white is `levels`: its own one only if the file is
    deeper than the table."""
    if depth == COLOURS:
        return 255.0
    if depth == EIGHT_BITS:
        return min(levels, 255.0)
    return levels if highest < 2 * levels else white_level(highest, True)


def to_grey(raw: np.ndarray, levels: float) -> np.ndarray:
    """Return grey levels 0 to 255, uint8, of levels 0 to `levels`; larger ones are white."""
    if raw.dtype == np.uint8 and levels == 255:
        return raw
    return np.rint(np.clip(raw * np.float32(255 / levels), 0, 255)).astype(np.uint8)


def edges(images: np.ndarray) -> np.ndarray:
    """Return the pixels at the borders of images [..., H, W] as [..., N]."""
    return np.concatenate([images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1]], axis=-1)


def border_of(grey: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Return the levels [N] of an image's border that tell its background: of the opaque pixels if they are most of it,
    else the opposite of what is drawn."""
    if alpha is None:
        return edges(grey)
    opaque = alpha >= min(128, alpha.max())
    shown = edges(opaque)
    return edges(grey)[shown] if shown.mean() > 0.5 else np.array([0 if grey[opaque].mean() > 127 else 255])


def background_of(grey: np.ndarray, alpha: np.ndarray | None) -> int:
    """Return the background, 0 or 255, of an image with grey levels 0 to 255."""
    return 255 if np.median(border_of(grey, alpha)) > 127 else 0


def to_ink(grey: np.ndarray, alpha: np.ndarray | None, background: int) -> np.ndarray:
    """Return the ink [H, W], uint8: the distance from the background, 0 where the image is transparent."""
    ink = grey if background == 0 else 255 - grey
    return ink if alpha is None else (ink.astype(np.uint16) * alpha // 255).astype(np.uint8)


def fit_to_square(ink: np.ndarray, size: int) -> np.ndarray:
    """Return ink [size, size], uint8: scaled without distortion and centred on background."""
    height, width = ink.shape
    if height == width == size:
        return ink
    sides = [max(1, round(side * size / max(height, width))) for side in (width, height)]
    scaled = Image.fromarray(ink).resize(sides, Image.Resampling.BILINEAR)
    if height == width:
        return np.asarray(scaled)
    page = Image.new("L", (size, size), 0)
    page.paste(scaled, ((size - sides[0]) // 2, (size - sides[1]) // 2))
    return np.asarray(page)


def describe_fault(error: Exception) -> str:
    """Return in a few words why an image cannot be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return (getattr(error, "strerror", None) or first_line(error)).lower()


def map_images(function: Callable, sources: list, workers: int) -> Iterator:
    """Yield a function's results for images, computed by several processes, as many as there are cores if -1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(sources) // CHUNK, cores if workers < 0 else workers, 61)  # 61: the most on Windows
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)  # spawned ones import torch
    pool = ProcessPoolExecutor(max(workers, 1), mp_context=context, initializer=_start_worker)
    try:
        with block_signals():  # a pool forks when it is given work
            results = pool.map(function, sources, chunksize=CHUNK) if workers else map(function, sources)
        yield from tqdm(results, "decoding", len(sources), unit="img", disable=len(sources) < CHUNK or None)
    except BrokenProcessPool:
        raise DataError("a process that decodes images was killed, maybe out of memory; try --num-workers 0") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave a terminal's signals to the parent of this decoding process, and end with the parent."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for name, handler in (("SIGINT", signal.SIG_IGN), ("SIGTERM", signal.SIG_DFL), ("SIGUSR1", signal.SIG_IGN)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)
    exit_with_parent()
