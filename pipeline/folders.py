"""A folder as a table: of a folder per class, of images named by their labels, or of images to predict."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline.errors import DataError, UsageError, warn
from pipeline.image_paths import IMAGE_SUFFIXES, is_below
from pipeline.sources import Table, TableSource


def walk(folder: str, below: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the path below a folder of each file in it, and whether it is a symbolic link; links to folders, which are
    not entered, end in a slash."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{below}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path, f"{path}/")
            else:
                yield path + "/" * entry.is_dir(), entry.is_symlink()


def is_image(path: str) -> bool:
    """Return whether a path below a folder is that of an image, neither hidden nor left by macOS."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
    return not hidden and os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def folder_table(source: TableSource, column: str) -> Table:
    """Read the images below a folder, in the order of their paths, with labels by folder or pattern, or ids by name.

    Other files are counted in one line. Raises DataError for a folder without images and for an image without a label.
    """
    if source.group_column:
        raise UsageError(f"{source.path}: a folder has no column {source.group_column!r}; leave out --group-column")
    found = sorted(walk(str(source.path)))
    images = [(path, link) for path, link in found if is_image(path)]
    if links := [path for path, _ in found if path.endswith("/")]:
        warn(f"{source.path}: links to folders are not followed, {links[0][:-1]} and {len(links) - 1:,} more; to use "
             "their images, copy them (cp -rL)")
    for path in [path for path, _ in images if re.search("[\r\n\udc80-\udcff]", path)][:1]:
        raise DataError(f"{source.path}: {path!r}: a name with a line break or bytes that are not UTF-8; rename it")
    if not images:
        raise DataError(f"{source.path}: no image is in this folder or below it; name another with --{source.part}-csv")
    if others := len(found) - len(links) - len(images):
        print(f"{source.path}: {others:,} hidden files and files that are no images are ignored")
    paths = pd.Series([path for path, _ in images], [path for path, _ in images])
    cells = labels_of(source, paths) if column == "label" else ids_of(paths)
    boundaries = {os.path.realpath(source.path), os.path.realpath(source.folder)}
    faults = {place: f"a symbolic link leads out of {source.path}" for place, (path, link) in enumerate(images)
              if link and not is_below(os.path.realpath(os.path.join(source.path, path)), boundaries)}
    names = (source.id_column or "example_id", source.label_column or "label")
    return Table(str(source.path), pd.DataFrame({column: cells, "image_path": paths}), Path(source.path), faults=faults,
                 submission_columns=("example_id", "label") if column == "label" else names, root_flag=source.root_flag,
                 folder=Path(source.folder))


def labels_of(source: TableSource, paths: pd.Series) -> pd.Series:
    """Return the label of each image's path below the folder: its folders, or the pattern's first group."""
    if source.label_pattern:
        matches = map(re.compile(source.label_pattern).search, paths)
        labels = pd.Series([(match[1] if match else "") or "" for match in matches], paths.index)
        remedy = f"--label-pattern {source.label_pattern} finds no label in it; correct the pattern, or move the file"
    else:
        labels = paths.str.rpartition("/")[0]
        remedy = "is in no folder of a class; move it into one, or name the label in its path with --label-pattern"
    for path in paths[labels == ""][:1]:
        raise DataError(f"{source.path}/{path}: {remedy}")
    return labels


def ids_of(paths: pd.Series) -> pd.Series:
    """Return the id of each image: its file's name, or its path below the folder where two have one name."""
    names = paths.str.rpartition("/")[2]
    return names if names.is_unique else paths
