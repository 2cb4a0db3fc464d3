"""A competition's tables, whatever they are: rows with labels or ids, and where their images are. Labels as classes."""

import dataclasses
import os
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from pipeline import folders, packed
from pipeline.csv_tables import (
    announce_columns,
    check_cells,
    find_column,
    find_key,
    read_csv,
    read_table,
    without_blank_end,
)
from pipeline.errors import DataError, warn
from pipeline.image_paths import image_root, resolve_paths
from pipeline.pixel_tables import find_pixels, pixel_table
from pipeline.sources import Table, TableSource


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
        place = table.rows.index.get_loc(unknown.index[0])
        more = f" (and {len(unknown) - 1} more rows)" * (len(unknown) > 1)
        raise DataError(f"{table.where(place)}{more}: the training table has no label {unknown.iloc[0]!r}; remove the "
                        "row, or allow new classes with --extra-classes")
    return table


def read_test_table(source: TableSource) -> Table:
    """Read a table to predict, with the ids of the sample submission beside it, if there is one.

    Raises DataError for an id that is not unique.
    """
    table = open_table(source, "example_id")
    if source.sample:
        rows = without_blank_end(read_csv(source.sample, table.submission_columns))
        table = dataclasses.replace(table, sample=rows, sample_path=source.sample)
        table = table if source.id_column else take_sample_ids(table)
    ids = table.rows.example_id
    for place in np.flatnonzero(ids.duplicated())[:1]:
        first = ids.index[np.flatnonzero(ids == ids.iloc[place])[0]]
        raise DataError(f"{table.where(place)}: {table.submission_columns[0]} {ids.iloc[place]!r} is already in row "
                        f"{first}; make each id unique, or remove the row")
    return table


def take_sample_ids(table: Table) -> Table:
    """Return a test table with those ids that its sample submission has: its own, its images' paths or their names with
    or without extension; or the sample's in its order, if the table only numbers its rows."""
    wanted, rows = table.sample.iloc[:, 0], table.rows
    candidates = [rows.example_id]
    if "image_path" in rows:
        names = rows.image_path.str.rpartition("/")[2]
        candidates += [rows.get("written_path", rows.image_path), names, names.str.replace(r"\.[^.]*$", "", regex=True)]
    if table.numbered and len(wanted) == len(rows):
        candidates.append(wanted.set_axis(rows.index))
    for ids in candidates:
        if len(ids) == len(wanted) and set(ids) == set(wanted):
            return dataclasses.replace(table, rows=rows.assign(example_id=ids))
    return table


def open_table(source: TableSource, column: Literal["label", "example_id"]) -> Table:
    """Read a table with its labels or its ids. Raises DataError naming the file, the row and the remedy."""
    check_exists(source)
    if packed.is_packed(source):
        table = packed.packed_table(source, column)
    elif source.path.is_dir():
        table = folders.folder_table(source, column)
    elif pixels := find_pixels(source, column):
        table = pixel_table(source, pixels, column)
    else:
        table = image_table(source, column)
    return with_clean_labels(table) if column == "label" else table


def check_exists(source: TableSource) -> None:
    """Raise DataError for a table that is not there, with what its folder holds instead."""
    if source.path.exists() or source.name.startswith("torchvision:"):
        return
    flag, folder = f"--{source.part}-csv", source.path.parent
    others = sorted(path.name for path in folder.glob("*") if not path.name.startswith(".")) if folder.is_dir() else []
    remedy = f"name another with {flag} ({folder} holds {', '.join(others[:10])}{', ...' * (len(others) > 10)})" if (
        others) else "name its folder with --data-dir"
    without = ", or train without one: --test-csv none" if source.part == "test" else ""
    raise DataError(f"{source.path}: no such file; {remedy}{without}")


def image_table(source: TableSource, column: str) -> Table:
    """Read a CSV of image paths with its labels or ids. Rows without an id column are numbered from 1."""
    path, table = source.path, read_csv(source.path, ("image_path", column))
    table.columns = table.columns.str.strip()
    image = find_column("image", source, table.columns)
    key = find_key(source, column, table.columns, taken=(image,))
    announce_columns(source, column, key, images=image)
    texts = list(dict.fromkeys(filter(None, (image, key, source.group_column))))
    cells = check_cells(path, without_blank_end(table[texts]))
    rows = pd.DataFrame({column: cells[key] if key else pd.Series(range(1, len(cells) + 1), cells.index).astype(str),
                         "image_path": cells[image]})
    if source.group_column:
        rows[source.group_column] = cells[source.group_column]
    root = image_root(source, rows.image_path)
    paths, faults = resolve_paths(rows.image_path, root, Path(source.folder), path) if root.is_dir() else (
        rows.image_path.tolist(), {})  # saved probabilities of the rows need no images
    names = ("example_id", key) if column == "label" else (key or "example_id", source.label_column or "label")
    if paths != rows.image_path.tolist():
        rows = rows.assign(written_path=rows.image_path, image_path=paths)
    return Table(str(path), rows, root, submission_columns=names, faults=faults, numbered=not key,
                 root_flag=source.root_flag, folder=Path(source.folder))


def warn_of_shared_files(train: Table, test: Table) -> None:
    """Warn if images of a test table are the very files of the training table: its own may be in another folder."""
    known, own = ({os.path.join(table.image_root, path) for path in table.rows.get("image_path", ())}
                  for table in (train, test))
    if shared := len(known & own):
        warn(f"{test.path}: {shared:,} of its {len(own):,} images are files of {train.path} too; if its images "
             "have a folder of their own, name it with --test-root")


def with_clean_labels(table: Table) -> Table:
    """Return a table whose labels have no spaces around them, with a line that counts these, and warn of labels that
    differ only in case or Unicode form."""
    labels = table.rows.label.str.strip()
    if changed := int((labels != table.rows.label).sum()):
        print(f"{table.path}: spaces around {changed:,} labels are left out")
    distinct = pd.Series(labels.unique())
    alike = distinct.groupby(distinct.map(lambda label: unicodedata.normalize("NFC", label).casefold()))
    for _, names in alike:
        if len(names) > 1:
            warn(f"{table.path}: the labels {' and '.join(map(repr, names))} differ only in case or Unicode form; they "
                 "are separate classes: write them alike if they are one")
    return dataclasses.replace(table, rows=table.rows.assign(label=labels))


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
    for place in np.flatnonzero(numbers < 0)[:1]:
        raise DataError(f"{table.where(place)}: label {table.rows.label.iloc[place]!r} is none of the {len(classes)} "
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
