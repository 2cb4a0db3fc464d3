"""Tables that hold the pixels themselves, one column each, with or without a header, whatever the columns' names."""

import csv
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.csv_tables import (
    announce_columns,
    check_cells,
    check_columns,
    find_column,
    find_id_column,
    is_usual,
    read_csv,
)
from pipeline.errors import DataError, first_line, warn
from pipeline.sources import Table, TableSource, arrange_pixels, parse_shape

PIXEL = r"pixel[0-9]+"  # usual name of a pixel column
FEWEST = 16             # columns of numbers from which a table without such names is one of pixels
HEAD = 100              # rows that are looked at to find the columns
NUMBER = r"\s*\+?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*"  # from 0 up
GREY_LEVEL = r"\s*0*([01]?\d?\d|2[0-4]\d|25[0-5])(\.0*)?\s*"  # a whole number from 0 to 255


@dataclass(frozen=True, eq=False)
class PixelColumns:
    """The columns of a table of pixels: all names, made unique, and those of the pixels in the image's order."""

    names: pd.Index
    pixels: list[str]
    label: str = ""         # the first or last of a row of numbers, if no name tells
    has_header: bool = True

    @property
    def others(self) -> pd.Index:
        """The names of the other columns."""
        return self.names.difference(self.pixels, sort=False)


def find_pixels(source: TableSource, column: str) -> PixelColumns | None:
    """Return the columns of a table of pixels, or None of a table of image paths. Raises DataError as `read_csv`."""
    try:
        head = read_csv(source.path, ("image_path", column), nrows=HEAD)
    except DataError:  # a bad row, which is named once the columns are known
        head = read_csv(source.path, ("image_path", column), nrows=0)
    names, has_header = head.columns.str.strip(), True
    if is_data(names):
        head = read_csv(source.path, ("image_path", column), nrows=HEAD, header=None)
        names, has_header = pd.Index(map(str, range(head.shape[1]))), False
    pixels = [] if source.image_column or "image_path" in names else select_pixels(source, names, head)
    if not pixels:
        return None
    label = ""
    if not is_image(len(pixels), source) and is_image(len(pixels) - 1, source) and not find_column(
            "label", source, names.difference(pixels, sort=False), optional=True):
        label = find_label(source, pixels[0], pixels[-1], has_header)
        pixels.remove(label)
    unique = names.where(~names.duplicated(), [f"{name}, column {place}" for place, name in enumerate(names, 1)])
    return PixelColumns(unique, pixels, label, has_header)


def is_data(names: pd.Index) -> bool:
    """Return whether a table's first row is one of pixels: numbers that do not count columns."""
    numbers = [name for name in names if re.fullmatch(r"-?\d+(\.\d+)*([eE][-+]?\d+)?(\.\d+)?", name)]
    counted = numbers and numbers[0].isdigit() and [str(int(numbers[0]) + place) for place in range(len(numbers))]
    return len(numbers) >= max(FEWEST, len(names) - 2) and numbers != counted


def is_image(count: int, source: TableSource) -> bool:
    """Return whether so many pixels are an image: a square, or of the named shape."""
    shape = parse_shape(source.pixel_shape)
    return count == math.prod(shape) if shape else math.isqrt(count) ** 2 == count


def select_pixels(source: TableSource, names: pd.Index, head: pd.DataFrame) -> list[str]:
    """Return the names of the pixel columns in the image's order; none if the table has too few columns of numbers.

    They are the largest family of names that differ in their numbers alone, or all columns of numbers beside label and
    id. Raises DataError if pixel0, pixel1, ... have a gap.
    """
    if len(named := names[names.str.fullmatch(PIXEL)]):
        return in_order(source, list(named))
    numeric = numeric_columns(source, names, head)
    families = pd.Series(numeric, dtype=str).groupby([re.sub(r"\d+", "#", name) for name in numeric], sort=False)
    family = max((members.tolist() for _, members in families), key=len, default=[])
    if len(family) >= FEWEST and is_image(len(family), source):
        return in_order(source, family)
    if len(numeric) < FEWEST or any(is_usual(name, "image") for name in names):
        return []  # a sample submission with a column for each class, or measures of images
    return in_order(source, numeric)


def numeric_columns(source: TableSource, names: pd.Index, head: pd.DataFrame) -> list[str]:
    """Return the columns that hold numbers in most of a table's first rows, beside those of labels, ids and groups."""
    cells = pd.to_numeric(pd.Series(head.to_numpy().ravel()), errors="coerce").notna().to_numpy().reshape(head.shape)
    numeric = names[cells.mean(axis=0) > 0.5] if len(head) else names[:0]
    other = {*source.columns.values(), source.group_column}
    if source.part == "test" and is_image(len(numeric), source):
        other.discard(source.label_column)  # it may be in the training table alone
    return [name for name in numeric if name not in other and not name.startswith("Unnamed: ")
            and not (is_usual(name, "label") or is_usual(name, "id"))]


def in_order(source: TableSource, pixels: list[str]) -> list[str]:
    """Return pixel columns in the image's order: as they are counted, pixel2 before pixel10, or else as they stand."""
    counts = [int(numbers[0]) if len(numbers := re.findall(r"\d+", name)) == 1 else -1 for name in pixels]
    first, documented = min(counts), re.fullmatch(PIXEL, pixels[0])
    if sorted(counts) == list(range(first, first + len(pixels))) and not (documented and first > 1):
        return [name for _, name in sorted(zip(counts, pixels))]
    if documented:
        raise DataError(f"{source.path}: {describe_columns(sorted(pixels, key=lambda name: int(name[5:])))} are not a "
                        "square image, whose columns are pixel0, pixel1, ..., each once; is one missing?")
    return pixels


def describe_columns(pixels: list[str]) -> str:
    """Return the number of pixel columns and the first and last name for a message."""
    return f"{len(pixels)} pixel columns, {pixels[0]} to {pixels[-1]},"


def find_label(source: TableSource, first: str, last: str, has_header: bool) -> str:
    """Return which of two columns of numbers holds the labels: the other is a corner, which hardly varies.

    Raises DataError if both vary alike.
    """
    table = read_csv(source.path, ("label",), **({} if has_header else {"header": None}))
    table.columns = table.columns.astype(str).str.strip()
    whole = [table[name].str.fullmatch(r"\s*\d+(\.0*)?\s*").all() for name in (first, last)]
    usual = [table[name].value_counts(normalize=True).max() for name in (first, last)]  # share of the usual value
    if all(whole) and usual != [1, 1] and abs(usual[0] - usual[1]) < 0.2:
        raise DataError(f"{source.path}: {first} or {last} may hold the labels; name the right one with --label-column")
    return last if whole[1] and (usual[1] < usual[0] or not whole[0]) else first


def find_pixel_key(source: TableSource, columns: PixelColumns, column: str) -> str:
    """Return the column of the labels, or that of the ids, "" if the rows are only numbered.

    Raises DataError if there are no labels.
    """
    path, others = source.path, columns.others
    if column == "label":
        key = columns.label or find_column("label", source, others, optional=True)
        if not key and not columns.has_header:
            raise DataError(f"{path}: has pixels alone, and no labels; if another file holds these, join both: "
                            f"paste -d, LABELS.csv {shlex.quote(path.name)} > labelled.csv")
        check_columns(path, pd.Index([*others, *columns.pixels]), (key or "label",), "--label-column")
        return key
    key = find_id_column(source, others)
    unknown = [name for name in others if not is_usual(name, "label") and not name.startswith("Unnamed: ")
               and name not in (columns.label, *source.columns.values())]
    if unknown and not key:
        warn(f"{path}: the submission numbers the rows from 1; if another column holds their ids "
             f"({', '.join(unknown[:5])}), name it with --id-column")
    return key


def pixel_table(source: TableSource, columns: PixelColumns, column: str) -> Table:
    """Read a table of pixels with its labels or ids. Raises DataError that names the first bad row."""
    path, pixels, key = source.path, columns.pixels, find_pixel_key(source, columns, column)
    texts = list(dict.fromkeys(filter(None, (key, source.group_column))))
    check_columns(path, pd.Index([*columns.others, *pixels]), tuple(texts), "--group-column")
    usual = columns.has_header and re.fullmatch(PIXEL, pixels[0])
    counted = " (it has no header, they are counted from 0)" * (not columns.has_header)
    announce_columns(source, column, key, pixels="" if usual else f"{pixels[0]} to {pixels[-1]}{counted}")
    table, levels = read_levels(path, columns, texts)
    cells = table[texts] if key else pd.DataFrame({column: range(1, len(table) + 1)}).astype(str)
    rows = check_cells(path, cells, first_row=1 + columns.has_header)
    names = (key, "label") if key not in ("", "ImageId") else ("ImageId", "Label")
    if column == "label":
        names = "example_id", key if columns.has_header else "label"
    return Table(str(path), rows.rename(columns={key: column}), submission_columns=names, numbered=not key,
                 pixels=arrange_pixels(levels, source, describe_columns(pixels)))


def read_levels(path: Path, columns: PixelColumns, texts: list[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a table's other columns and its grey levels [N, pixels]: whole numbers from 0 to 255 or, if most rows
    hold such, larger ones or fractions. Raises DataError that names the first other cell."""
    def read(kind: type, **options) -> pd.DataFrame:
        kinds = {**dict.fromkeys(columns.names, str), **dict.fromkeys(columns.pixels, kind)}
        return read_csv(path, tuple(texts), dtype=kinds, header=0 if columns.has_header else None, names=columns.names,
                        na_filter=True, keep_default_na=False, skip_blank_lines=True, **options)

    try:  # pandas refuses other numbers than those of a uint8
        table = read(np.uint8)
        return table[texts], table[columns.pixels].to_numpy()
    except DataError:
        try:
            table = read(np.float32, na_values=dict.fromkeys(columns.pixels, ""))
        except DataError:
            raise DataError(pixel_fault(path, columns, GREY_LEVEL)) from None
    levels = table[columns.pixels].to_numpy()
    deep, fractional = (levels > 255).any(axis=1), (levels % 1 > 0).any(axis=1)
    pattern = NUMBER if max(deep.mean(), fractional.mean()) >= 0.5 else GREY_LEVEL
    if not (np.isfinite(levels) & (levels >= 0)).all() or (pattern == GREY_LEVEL and (deep | fractional).any()):
        raise DataError(pixel_fault(path, columns, pattern))
    whole = np.uint16 if levels.max() < 65536 else np.uint32
    return table[texts], levels if fractional.any() else levels.astype(whole)


def pixel_fault(path: Path, columns: PixelColumns, pattern: str) -> str:
    """Return what is wrong with the first bad row of a pixel table; without the row if the file is compressed."""
    expected, row = "a whole number from 0 to 255", 0
    if pattern != GREY_LEVEL:
        expected = "a number from 0 up; where levels go from -1 to 1, write (level + 1) / 2"
    if path.suffix in (".gz", ".bz2", ".zip", ".xz", ".zst"):
        return f"{path}: not every pixel is {expected}; unpack the file to see which row"
    pixels = set(columns.pixels)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            for row, cells in enumerate(csv.reader(file), start=1):
                if cells and len(cells) != (wide := len(columns.names)):
                    return f"{path}, row {row}: {len(cells)} cells under a header of {wide}; write the row again"
                for name, cell in zip(columns.names, cells) if row > columns.has_header else ():
                    if name in pixels and not re.fullmatch(pattern, cell):
                        return f"{path}, row {row}: {name} is {cell!r}; a pixel is {expected}"
        except csv.Error as error:  # a cell longer than csv allows
            return f"{path}, row {row + 1}: {first_line(error)}; is a quote not closed there?"
    return f"{path}: not every pixel is {expected}"
