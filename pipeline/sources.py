"""A table's source, as the command line names it, and a table's rows with their images."""

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from pipeline.errors import DataError

SAMPLE = re.compile(r"sample_?submission\.csv", re.IGNORECASE)  # name of a sample submission

# Fields of a source that say how its table is read.
HOW_TO_READ = ("cache_dir", "image_column", "label_column", "id_column", "label_pattern", "pixel_shape", "transpose")


@dataclass(frozen=True)
class TableSource:
    """The name of a table, the folders that it and its images are in, and how it is to be read."""

    name: str                            # file or folder in `folder`, or torchvision:NAME
    folder: str = "."
    image_folder: str = "Dataset_Image"  # in `folder`; the table's image paths start from it
    part: Literal["train", "extra", "test"] = "train"  # which of a run's tables, and of data that holds several
    group_column: str = ""               # column to keep beside the label
    cache_dir: str = ""                  # for torchvision's downloads; empty: the user's cache folder
    image_column: str = ""               # columns; empty: found by their usual names
    label_column: str = ""
    id_column: str = ""
    label_pattern: str = ""              # of a folder: its first group in an image's path is the label
    transpose: bool = False              # of pixels: rows are columns
    pixel_shape: str = ""                # of pixels: HxW; empty: square

    @property
    def path(self) -> Path:
        """The table's file or folder."""
        return Path(self.folder, self.name)

    @property
    def image_root(self) -> Path:
        """The folder that the table's image paths start from."""
        return Path(self.folder, self.image_folder)

    @property
    def root_flag(self) -> str:
        """The flag that names the folder of the table's images."""
        return {"train": "--root-dir", "extra": "--extra-root", "test": "--test-root"}[self.part]

    @property
    def sample(self) -> Path | None:
        """The sample submission beside the table, in any case; None if there is none."""
        beside = [] if self.name.startswith("torchvision:") else sorted(self.path.parent.glob("*"))
        return next((path for path in beside if SAMPLE.fullmatch(path.name)), None)

    @property
    def files(self) -> list[Path]:
        """The table's file, and the files beside it that are read with it."""
        return [self.path, self.path.with_name("classes.csv"), *filter(None, [self.sample])]

    @property
    def columns(self) -> dict[str, str]:
        """The named columns by what they hold: image, label, id."""
        return {"image": self.image_column, "label": self.label_column, "id": self.id_column}


@dataclass(frozen=True, eq=False)
class Table:
    """A table's rows, and where its images are."""

    path: str           # name of the table in messages
    rows: pd.DataFrame  # label or example_id, and image_path of files; index: row in the file, or path in the folder
    image_root: Path = Path()
    pixels: np.ndarray | None = None   # grey levels [N, H, W] as the table holds them, if it does
    encoded: list[bytes] | None = None  # contents of image files, if the table holds them
    submission_columns: tuple[str, str] = ("example_id", "label")  # a labelled table's second one names its labels
    root_flag: str = "--root-dir"  # names the image root in messages
    folder: Path = Path()          # of the data, in which the image root is
    numbered: bool = False  # the ids only number the rows
    sample: pd.DataFrame | None = None  # the sample submission beside a test table
    sample_path: Path = Path()
    faults: dict[int, str] = field(default_factory=dict)  # position of a row: why its image cannot be used

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_rows(self) -> np.ndarray:
        """Positions of the rows whose image cannot be used."""
        return np.array(sorted(self.faults), dtype=np.int64)

    @property
    def usable_rows(self) -> np.ndarray:
        """Positions of the rows whose image can be used."""
        return np.setdiff1d(np.arange(len(self)), self.bad_rows)

    @property
    def labels_sha256(self) -> str:
        """SHA-256 of the labels in their order, which tells whether the rows of a split are still the same."""
        return hashlib.sha256("\n".join(self.rows.label).encode()).hexdigest()

    @property
    def own_label_column(self) -> str:
        """The name of a labelled table's column of labels, if it is not label: a submission has it too."""
        return name if (name := self.submission_columns[1]) != "label" else ""

    def where(self, place: int) -> str:
        """Return how messages name a row: FILE, row N; or FOLDER/NAME."""
        row = self.rows.index[place]
        return f"{self.path}/{row}" if isinstance(row, str) else f"{self.path}, row {row}"

    def images_named(self, names: set[str]) -> list[Path]:
        """Return the paths of the table's images that have one of these file names."""
        paths = self.rows.get("image_path", pd.Series(dtype=str))
        return [self.image_root / path for path in paths[paths.str.endswith(tuple(names))]]


def name_rows(path: Path | str, rows: pd.Index) -> str:
    """Return how messages name several rows: by the first of them."""
    return f"{path}, row {rows[0]}" + (f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else "")


def is_label_pattern(text: str) -> bool:
    """Return whether a text is empty or a regular expression with a group."""
    try:
        return not text or re.compile(text).groups > 0
    except re.error:
        return False


def parse_shape(text: str) -> tuple[int, int] | None:
    """Return height and width of a text such as 16x64; None if it is another."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    return (int(found[1]), int(found[2])) if found else None


def arrange_pixels(pixels: np.ndarray, source: TableSource, what: str) -> np.ndarray:
    """Return grey levels [N, H, W] of [N, pixels] or [N, H, W], by the source's shape and transposition.

    Raises DataError, in which `what` names the pixels, if they form no square and no such shape.
    """
    if pixels.ndim == 2:
        pixels = pixels.reshape(len(pixels), *pixel_shape(pixels.shape[1], source, what))
    return np.ascontiguousarray(pixels.swapaxes(1, 2)) if source.transpose else pixels


def pixel_shape(count: int, source: TableSource, what: str) -> tuple[int, int]:
    """Return height and width of images of so many pixels. Raises DataError if they form no image."""
    shape, side = parse_shape(source.pixel_shape), math.isqrt(count)
    if shape and math.prod(shape) != count:
        raise DataError(f"{source.path}: {what} are not --pixel-shape {source.pixel_shape}, which is "
                        f"{math.prod(shape):,} pixels; give height x width of its images")
    if not shape and side**2 != count:
        colour = math.isqrt(count // 3)
        remedy = (f"they look like 3 colours of {colour} x {colour}: write one grey level for each pixel, the mean of "
                  "its three, into the table" if 3 * colour**2 == count else
                  "if they are rows of another shape, name it with --pixel-shape HEIGHTxWIDTH")
        raise DataError(f"{source.path}: {what} are not a square image; {remedy}")
    return shape or (side, side)
