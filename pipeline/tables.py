"""A competition's tables: CSV files of image paths or pixels, torchvision's data; their columns, labels and ids."""

import contextlib
import csv
import difflib
import hashlib
import io
import math
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from pipeline.errors import DataError, UsageError, first_line, warn
from pipeline.files import cache_folder

PIXEL = r"pixel[0-9]+"  # name of a pixel column
GREY_LEVEL = r"\s*0*([01]?\d?\d|2[0-4]\d|25[0-5])(\.0*)?\s*"  # a whole number from 0 to 255


@dataclass(frozen=True)
class TableSource:
    """The name of a table and the folders that it and its images are in."""

    name: str                            # file in `folder`, or torchvision:NAME
    folder: str = "."
    image_folder: str = "Dataset_Image"  # in `folder`; the table's image paths start from it
    group_column: str = ""               # column to keep beside the label
    cache_dir: str = ""                  # for torchvision's downloads; empty: the user's cache folder
    part: Literal["train", "test"] = "train"  # of torchvision's data

    @property
    def path(self) -> Path:
        """The table's file."""
        return Path(self.folder, self.name)

    @property
    def image_root(self) -> Path:
        """The folder that the table's image paths start from."""
        return Path(self.folder, self.image_folder)


@dataclass(frozen=True, eq=False)
class Table:
    """A table's rows, and where its images are."""

    path: str           # name of the table in messages
    rows: pd.DataFrame  # label or example_id, and image_path unless the table holds pixels; index: row in the file
    image_root: Path = Path()
    pixels: np.ndarray | None = None  # grey levels [N, side, side], uint8, if the table holds them
    submission_columns: tuple[str, str] = ("example_id", "label")
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

    def images_named(self, names: set[str]) -> list[Path]:
        """Return the paths of the table's images that have one of these file names."""
        paths = self.rows.get("image_path", pd.Series(dtype=str))
        return [self.image_root / path for path in paths[paths.str.endswith(tuple(names))]]


def read_train_table(source: TableSource) -> Table:
    """Read a labelled table. Raises DataError if it has fewer than two classes."""
    table = open_table(source, "label")
    if table.rows.label.nunique() < 2:
        raise DataError(f"{table.path}: every row has the label {table.rows.label.iloc[0]!r}; a second class is needed")
    return table


def read_extra_table(source: TableSource, labels: pd.Series, new_classes: bool) -> Table:
    """Read a labelled table to train on too. Raises DataError for a label not among `labels`, unless allowed."""
    table = open_table(source, "label")
    unknown = table.rows.label[~table.rows.label.isin(labels)]
    if len(unknown) and not new_classes:
        raise DataError(f"{_name_rows(table.path, unknown.index)}: the training table has no label "
                        f"{unknown.iloc[0]!r}; remove the row, or allow new classes with --extra-classes")
    if table.pixels is None and not source.image_root.is_dir():
        raise DataError(f"{source.image_root}: no such folder; name that of the images with --extra-root")
    return table


def read_test_table(source: TableSource) -> Table:
    """Read a table to predict. Raises DataError for an id that is not unique."""
    table = open_table(source, "example_id")
    ids = table.rows.example_id
    for row in ids.index[ids.duplicated()][:1]:
        raise DataError(f"{table.path}, row {row}: {table.submission_columns[0]} {ids[row]!r} is already in row "
                        f"{ids.eq(ids[row]).idxmax()}; make each id unique, or remove the row")
    return table


def open_table(source: TableSource, column: Literal["label", "example_id"]) -> Table:
    """Read a table with its labels or its ids. Raises DataError naming the file, the row and the remedy."""
    if source.name.startswith("torchvision:"):
        return torchvision_table(source, column)
    header = read_csv(source.path, ("image_path", column), nrows=0).columns.str.strip()
    if "image_path" not in header and header.str.fullmatch(PIXEL).any():
        return pixel_table(source, header, column)
    rows = read_table(source.path, tuple(dict.fromkeys(filter(None, ("image_path", column, source.group_column)))))
    return Table(str(source.path), rows, source.image_root, faults=path_faults(rows.image_path, source.image_root))


def read_csv(path: Path, columns: tuple[str, ...], **options) -> pd.DataFrame:
    """Read a CSV with pandas, every cell as text. Errors become DataError with a remedy."""
    options = {"dtype": str, "na_filter": False, "skip_blank_lines": False, **options}
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            return pd.read_csv(path, index_col=False, encoding="utf-8-sig", **options)
    except FileNotFoundError:
        fault = ": no such file; put it there, or name its folder with --data-dir"
    except pd.errors.ParserWarning:  # cells beyond the header would be lost
        fault = (", row 2: more cells than the header has columns; put quotes around a cell that holds a comma, remove "
                 "commas at the rows' ends, or name the column")
    except pd.errors.EmptyDataError:
        fault = f": the file is empty; it needs the columns {', '.join(columns)}"
    except Exception as error:  # pandas, codecs and decompressors each raise their own types
        from_zero = r"(?<=EOF inside string starting at row )\d+"  # other errors of pandas count rows from 1
        reason = re.sub(from_zero, lambda row: str(int(row[0]) + 1), first_line(error))
        fault = (f": not a readable CSV table ({reason}); save it as UTF-8, with commas between cells and quotes "
                 "around a cell that holds one")
        if isinstance(error, OSError) and error.strerror:
            fault = f": cannot be read ({error.strerror.lower()}); name a readable table"
    raise DataError(f"{path}{fault}")


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read some columns of a CSV as text, without empty cells. The index is the row in the file (the header is 1)."""
    table = read_csv(path, columns)
    table.columns = table.columns.str.strip()
    check_columns(path, table.columns, columns)
    return check_cells(path, without_blank_end(table[list(columns)]))


def without_blank_end(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without the blank lines at the end of its file."""
    table = table.fillna("")  # a row that is too short has NaN
    return table[table.ne("").any(axis=1)[::-1].cummax()[::-1]]


def check_columns(path: Path, found: pd.Index, required: tuple[str, ...]) -> None:
    """Raise DataError if a column is missing or not unique."""
    for name in required:
        if name not in found:
            hint = "rename the column that holds it, or name another table"
            if len(found) == 1:
                hint = "is it a CSV file with commas between its cells?"
            elif near := difflib.get_close_matches(name, found, 1, 0.7):
                hint = f"rename {near[0]!r}"
            names = (", ".join(found[:20].str[:40]) + ", ..." * (len(found) > 20)).replace("\0", "")
            raise DataError(f"{path}: no column {name!r} in its header ({names}); {hint}")
        if list(found).count(name) > 1 or f"{name}.1" in found:
            raise DataError(f"{path}: two columns are named {name!r}; remove one")


def check_cells(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Return a table indexed by the row in its file, or raise DataError for a cell that a submission could not keep."""
    if table.empty:
        raise DataError(f"{path}: the table has a header and no rows; is it the right file?")
    table = table.set_axis(pd.RangeIndex(2, len(table) + 2))
    for name, cells in table.items():
        faults = {"is empty; fill it in or remove the row": cells.str.strip() == "",
                  "holds a carriage return, which a submission would not keep; remove it": cells.str.contains("\r")}
        for fault, faulty in faults.items():
            if faulty.any():
                raise DataError(f"{_name_rows(path, table.index[faulty])}: {name} {fault}")
    return table


def _name_rows(path: Path | str, rows: pd.Index) -> str:
    return f"{path}, row {rows[0]}" + (f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else "")


def path_faults(paths: pd.Series, root: Path) -> dict[int, str]:
    """Return why a path is not opened, by its position: images must be below the root, without links out of it."""
    def leads_out(name: str) -> bool:
        return not Path(os.path.realpath(os.path.join(root, name))).is_relative_to(os.path.realpath(root))

    faults = {}
    for pattern, fault in (("\0", "its path holds a NUL"), (r"^(?:[/\\]|[A-Za-z]:)", "its path is absolute"),
                           (r"(?:^|[/\\])\.\.(?:[/\\]|$)", "its path leaves the folder by .."),
                           (r"\\" if os.sep == "/" else "\0", "its path holds a backslash; write /")):
        for place in np.flatnonzero(paths.str.contains(pattern)):
            faults.setdefault(int(place), fault)
    sound, folders = paths.drop(paths.index[list(faults)]), paths.str.rpartition("/")[0]
    links = [name for name in sound.unique() if os.path.islink(os.path.join(root, name)) and leads_out(name)]
    outside = list(filter(leads_out, folders[sound.index].unique()))
    linked = np.flatnonzero(paths.isin(links) | folders.isin(outside)).tolist()
    return {**dict.fromkeys(linked, f"a symbolic link leads out of {root}"), **faults}


def pixel_table(source: TableSource, header: pd.Index, column: str) -> Table:
    """Read a table whose columns pixel0 (or pixel1), ... hold a square image row by row, in grey levels 0 to 255."""
    path, pixels = source.path, pixel_columns(source.path, header)
    key = id_column(path, header) if column == "example_id" else column
    texts = [name for name in (key, source.group_column) if name]
    check_columns(path, header, tuple(texts))
    header = header.where(~header.duplicated(), [f"{name}, column {place}" for place, name in enumerate(header, 1)])
    try:  # pandas refuses other numbers than those of a uint8
        table = read_csv(path, tuple(texts), header=0, names=header, na_filter=True, keep_default_na=False,
                         dtype={**dict.fromkeys(header, str), **dict.fromkeys(pixels, np.uint8)}, skip_blank_lines=True)
    except DataError:
        raise DataError(pixel_fault(path, header)) from None
    rows = check_cells(path, table[texts] if key else pd.DataFrame({column: range(1, len(table) + 1)}).astype(str))
    side = math.isqrt(len(pixels))
    return Table(str(path), rows.rename(columns={key: column}), pixels=table[pixels].to_numpy().reshape(-1, side, side),
                 submission_columns=(key, "label") if key not in ("", "ImageId") else ("ImageId", "Label"))


def id_column(path: Path, header: pd.Index) -> str:
    """Return the column of a pixel table that holds ids, or "". Raises DataError if several columns could."""
    others = [name for name in header if not re.fullmatch(PIXEL + r"|Unnamed: \d+|(?i:label)", name)]
    ids = [name for name in ("example_id", "ImageId") if name in others][:1]
    ids = ids or [name for name in others if re.fullmatch(r"(?i)(.*[ _])?id", name)]
    if len(ids) > 1:
        raise DataError(f"{path}: {' or '.join(ids)} may hold the ids; rename the right one to example_id")
    if others and not ids:
        warn(f"{path}: the submission numbers the rows from 1; if another column holds their ids "
             f"({', '.join(others[:5])}), rename it to id")
    return ids[0] if ids else ""


def pixel_columns(path: Path, header: pd.Index) -> list[str]:
    """Return the pixel columns in the image's order. Raises DataError if they do not form a square image."""
    names = sorted(header[header.str.fullmatch(PIXEL)], key=lambda name: int(name[5:]))
    side, first = math.isqrt(len(names)), int(names[0] == "pixel1")  # some tables count from 1
    if names != [f"pixel{number}" for number in range(first, first + side * side)]:
        raise DataError(f"{path}: {len(names)} pixel columns, {names[0]} to {names[-1]}, are not a square image; one "
                        f"of {side} x {side} has pixel0 to pixel{side * side - 1}, each once")
    return names


def pixel_fault(path: Path, header: pd.Index) -> str:
    """Return what is wrong with the first bad row of a pixel table; without the row if the file is compressed."""
    expected, row = "a whole number from 0 to 255", 0
    if path.suffix in (".gz", ".bz2", ".zip", ".xz", ".zst"):
        return f"{path}: not every pixel is {expected}; unpack the file to see which row"
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            for row, cells in enumerate(csv.reader(file), start=1):
                if cells and len(cells) != len(header):
                    return f"{path}, row {row}: {len(cells)} cells under a header of {len(header)}; write the row again"
                for name, cell in zip(header, cells) if row > 1 else ():
                    if re.fullmatch(PIXEL, name) and not re.fullmatch(GREY_LEVEL, cell):
                        return f"{path}, row {row}: {name} is {cell!r}; a pixel is {expected}"
        except csv.Error as error:  # a cell longer than csv allows
            return f"{path}, row {row + 1}: {first_line(error)}; is a quote not closed there?"
    return f"{path}: not every pixel is {expected}"


def torchvision_table(source: TableSource, column: str) -> Table:
    """Return a part of torchvision:NAME or torchvision:EMNIST:SPLIT, downloaded into the cache folder if needed."""
    from torchvision import datasets

    if source.group_column:
        raise UsageError(f"{source.name} has no column {source.group_column!r}; leave out --group-column")
    kind, split = (source.name.removeprefix("torchvision:") + ":").split(":")[:2]
    splits = datasets.EMNIST.splits if kind == "EMNIST" else ("",)
    if kind not in ("MNIST", "FashionMNIST", "KMNIST", "EMNIST") or split not in splits:
        raise UsageError(f"{source.name} is unknown; there are torchvision:MNIST, FashionMNIST, KMNIST, and EMNIST "
                         f"with its split: torchvision:EMNIST:{', '.join(datasets.EMNIST.splits)}")
    folder, options = cache_folder(source.cache_dir), {"split": split} if split else {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = getattr(datasets, kind)(folder, train=source.part == "train", download=True, **options)
    except Exception as error:  # urllib, ssl, zipfile and torchvision each raise their own types
        raise DataError(f"{source.name}: neither in {folder / kind} nor downloadable ({first_line(error)}); put its "
                        f"files into {folder / kind / 'raw'}, or name the folder of {kind} with --cache-dir") from None
    pixels = (data.data.mT.contiguous() if kind == "EMNIST" else data.data).numpy()  # EMNIST is transposed
    numbers, names = pd.RangeIndex(1, len(pixels) + 1), [name.split(" - ")[0] for name in data.classes]  # "7 - seven"
    cells = [names[target] for target in data.targets.tolist()] if column == "label" else numbers.astype(str)
    rows = pd.DataFrame({column: cells}, index=numbers)
    return Table(source.name, rows, pixels=pixels, submission_columns=("ImageId", "Label"))


def sort_classes(labels: pd.Series) -> list[str]:
    """Return the distinct labels: whole numbers first, by value, then the others in character order."""
    distinct = pd.Series(labels.unique(), dtype=str)
    whole = distinct.str.fullmatch(r"-?[0-9]{1,18}")
    return sorted(distinct[whole], key=lambda label: (int(label), label)) + sorted(distinct[~whole])


def class_numbers(labels: pd.Series, classes: list[str]) -> np.ndarray:
    """Return each label's position in `classes`, int64 [N]; -1 for other labels."""
    return pd.Index(classes).get_indexer(labels).astype(np.int64)


def known_class_numbers(table: Table, classes: list[str]) -> np.ndarray:
    """Return `class_numbers` of a table. Raises DataError for a label that is not among the classes."""
    numbers = class_numbers(table.rows.label, classes)
    for row in table.rows.index[numbers < 0][:1]:
        raise DataError(f"{table.path}, row {row}: label {table.rows.label[row]!r} is none of the {len(classes)} "
                        "classes that the checkpoint knows; remove the row or name another table")
    return numbers


def describe_classes(table: Table, classes: list[str], least: int, few: str) -> str:
    """Return one line: images, classes, imbalance, repeats, and what `few` says of classes below `least` rows."""
    counts = table.rows.label.value_counts().reindex(classes).dropna().astype(int)  # others are in the extra table
    text = (f"{len(table):,} labelled images of {len(counts)} classes, {counts.min():,} to {counts.max():,} per class "
            f"(imbalance {counts.max() / counts.min():.1f} to 1)")
    if small := counts.index[counts < least].tolist():
        text += f"; {few}: {', '.join(small[:10])}" + (f" and {len(small) - 10} more" if len(small) > 10 else "")
    paths = table.rows.get("image_path", pd.Series(dtype=str))
    if paths.duplicated().any():
        text += f"; {paths.duplicated().sum():,} rows name an image of an earlier row"
        conflicting = paths[table.rows.groupby("image_path").label.transform("nunique") > 1]
        if len(conflicting):
            rows = paths.index[paths == conflicting.iloc[0]][:3].astype(str)
            text += f", {conflicting.nunique():,} images have several labels (the first: rows {', '.join(rows)})"
    return text


def read_latex(path: Path) -> dict[str, str]:
    """Return LaTeX by label from classes.csv; empty if there is no such file."""
    try:
        return dict(read_table(path, ("label", "latex")).to_numpy()) if path.exists() else {}
    except DataError as error:
        warn(f"{error}; pictures show labels")
        return {}
