"""From the image paths in a table to files: which folder they start from, which file is meant, what is refused."""

import contextlib
import itertools
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.errors import DataError
from pipeline.sources import Table, TableSource

FOLDERS = 1000  # that are looked into for a remedy
DEFAULT_ROOT = TableSource.image_folder
IMAGE_SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".dib", ".gif", ".tif", ".tiff",
                  ".webp", ".avif", ".pgm", ".ppm", ".pbm", ".pnm", ".pcx", ".tga", ".ico", ".ras", ".sgi"}


def image_root(source: TableSource, paths: pd.Series) -> Path:
    """Return the folder that a table's paths start from: the named one or, if there is no Dataset_Image, that of the
    table or of the data, whichever holds the first images. Print one line if it is not the named one."""
    root = source.image_root
    if root.is_dir():
        return root
    for folder in (source.path.parent, Path(source.folder)) if source.image_folder == DEFAULT_ROOT else ():
        directory = Directory(folder, source.folder)
        if any(not directory.find(path)[1] for path in paths.iloc[:5]):
            print(f"{source.path}: its image paths start from {folder}, as there is no {root}")
            return folder
    return root


def check_root(table: Table) -> None:
    """Raise DataError if a table's images have no folder, with the one of the data that holds the first image."""
    if table.pixels is None and table.encoded is None and not table.image_root.is_dir():
        found = find_folder(table.folder, table.rows.image_path.iloc[0])
        raise DataError(f"{table.image_root}: no such folder; name that of the images with {table.root_flag}"
                        + (f", here {table.root_flag} {found}" if found else ""))


def path_remedy(table: Table) -> str:
    """Return what helps against the most usual fault of a table's paths, "" if its images themselves are faulty."""
    remedies = {"symbolic link": copy_links, "absolute": cut_paths, "by ..": widen_folder,
                "backslash": turn_backslashes, "nearly its name": name_one, "no such file": find_images}
    places = {kind: [place for place, fault in sorted(table.faults.items()) if kind in fault] for kind in remedies}
    kind = max(places, key=lambda kind: len(places[kind]))
    if "image_path" not in table.rows or not places[kind]:
        return ""
    return remedies[kind](table, table.rows.image_path.iloc[places[kind][0]])


def copy_links(table: Table, path: str) -> str:
    """Return how to have the files themselves in place of symbolic links."""
    copy = f"{os.path.normpath(table.image_root)}-copy"
    named = "as the table" if isinstance(table.rows.index[0], str) else (
        f"with {table.root_flag} {os.path.relpath(copy, table.folder)}")
    command = f"cp -rL {shlex.quote(str(table.image_root))} {shlex.quote(copy)}"
    return f"copy the folder with what the links lead to ({command}), and name the copy {named}"


def cut_paths(table: Table, path: str) -> str:
    """Return what to do about absolute paths: what to cut off, or which folder to name."""
    if os.path.isfile(path):
        folders = {os.path.dirname(path) for path in table.rows.image_path[table.rows.image_path.map(os.path.isfile)]}
        return f"name the folder of its images with {table.root_flag} {os.path.commonpath(folders)}"
    parts = [part.span() for part in re.finditer(r"[^/\\]+", path)]
    for start, _ in parts[1:]:
        if not Directory(table.image_root, table.folder).find(path[start:].replace("\\", "/"))[1]:
            return f"remove {path[:start]} from the start of its paths"
    found = find_folder(table.folder, path[parts[-1][0]:])
    return (f"leave the folders out of its paths, and give {table.root_flag} {found}" if found else
            f"write its paths as they are below {table.image_root}")


def widen_folder(table: Table, path: str) -> str:
    """Return which folder of the data holds images that are beside the named one."""
    target = os.path.abspath(os.path.join(table.image_root, path))
    if not os.path.isfile(target):
        return f"move its images into {table.image_root}, and write their paths without .."
    top = os.path.commonpath([os.path.abspath(table.folder), os.path.dirname(target)])
    return (f"give --data-dir {top}, and name tables and images from there: {os.path.relpath(table.path, top)}, "
            f"{table.root_flag} {os.path.relpath(table.image_root, top)}")


def turn_backslashes(table: Table, path: str) -> str:
    """Return a command that writes / for backslashes in the cells that end as an image's name does."""
    suffix = os.path.splitext(path)[1]
    command = rf"sed -E -i.bak -e :a -e 's#\\([^,]*\{suffix})#/\1#' -e ta {shlex.quote(table.path)}"
    return "write / for \\ in its paths" + f" ({command})" * (suffix in IMAGE_SUFFIXES)


def name_one(table: Table, path: str) -> str:
    """Return what to do about paths that could mean several files."""
    return "write the name of the right file into each path, with its extension"


def find_images(table: Table, path: str) -> str:
    """Return where a table's missing images are, "" if they are nowhere and only some are missing."""
    found, whole = find_folder(table.folder, path), len(table.faults) == len(table)
    if found and not os.path.samefile(Path(table.folder, found), table.image_root):
        return f"its images are in {found}: give {table.root_flag} {found} instead" if whole else (
            f"copy them from {Path(table.folder, found)} into {table.image_root}")
    unknown = f"if its paths do not start from {table.image_root}, name their folder with {table.root_flag}"
    return unknown if whole else ""


def find_folder(folder: Path, path: str) -> str:
    """Return the only folder below this one from which a path leads to a file, relative to it; "" if there is none."""
    below = itertools.islice((name for name, _, _ in os.walk(folder)), FOLDERS)
    found = [name for name in below if not Directory(Path(name), folder).find(path)[1]]
    return os.path.relpath(found[0], folder) if len(found) == 1 else ""


class Directory:
    """The files below a folder and beside it, listed once per folder; none may lead out of the boundaries."""

    def __init__(self, root: Path, boundary: Path):
        self.given, self.outer, self.root = root, boundary, os.path.realpath(root)
        self.boundaries = {self.root, os.path.realpath(boundary)}
        self.lists, self.keys, self.entered = {}, {}, {}

    def names(self, folder: str) -> dict[str, bool]:
        """Return the names in a folder, each with whether it is a symbolic link; empty if it cannot be read."""
        if folder not in self.lists:
            self.lists[folder] = {}
            with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
                self.lists[folder] = {entry.name: entry.is_symlink() for entry in entries}
        return self.lists[folder]

    def near(self, folder: str, name: str) -> list[str]:
        """Return the names in a folder that differ from this one only in case, spaces, Unicode form or extension."""
        if folder not in self.keys:
            whole, stems = self.keys[folder] = {}, {}
            for other in self.names(folder):
                whole.setdefault(plain(other), []).append(other)
                stem, suffix = os.path.splitext(plain(other))
                stems.setdefault(stem if suffix in IMAGE_SUFFIXES else None, []).append(other)
        (whole, stems), key = self.keys[folder], plain(name)
        stem, suffix = os.path.splitext(key)
        return whole.get(key) or stems.get(key) or (stems.get(stem, []) if suffix in IMAGE_SUFFIXES else [])

    def enter(self, name: str) -> tuple[str, bool, str]:
        """Return the folder of a path, whether it has this very name, and why none of its files may be opened."""
        if name not in self.entered:
            folder, fault = os.path.realpath(os.path.join(self.root, name)), ""
            if not (exact := os.path.isdir(folder)):
                folder = os.path.realpath(self._nearest_folder(name))
            if not is_below(folder, self.boundaries):
                written = os.path.normpath(os.path.join(self.root, name))
                inside = {*self.boundaries, os.path.abspath(self.outer), os.path.abspath(self.given)}
                fault = (f"a symbolic link leads out of {self.given}" if is_below(written, inside) else
                         f"its path is absolute and leads out of {self.outer}" if os.path.isabs(name) else
                         f"its path leaves {self.outer} by ..")
            self.entered[name] = folder, exact, fault
        return self.entered[name]

    def _nearest_folder(self, name: str) -> str:
        folder = "/" if os.path.isabs(name) else self.root
        for part in filter(None, name.split("/")):
            near = [part] if part in (".", "..", *self.names(folder)) else self.near(folder, part)
            folder = os.path.normpath(os.path.join(folder, near[0] if len(near) == 1 else part))
        return folder

    def find(self, path: str) -> tuple[str, str]:
        """Return the path of the file that a path means, and why it may not be opened."""
        parent, name = os.path.split(path)
        folder, exact, fault = self.enter(parent)
        near = [name] if name in self.names(folder) else self.near(folder, name)
        if fault or len(near) != 1:
            return path, fault or "no such file" + (f"; {len(near)} have nearly its name: {', '.join(sorted(near)[:3])}"
                                                    if near else "")
        found = os.path.join(folder, near[0])
        if self.names(folder)[near[0]] and not is_below(os.path.realpath(found), self.boundaries):
            fault = f"a symbolic link leads out of {self.given}"
        return path if exact and near[0] == name else os.path.relpath(found, self.root).replace(os.sep, "/"), fault


def plain(name: str) -> str:
    """Return a file's name without case, surrounding spaces and differences of Unicode form."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Return whether a normal absolute path is one of these folders or below it."""
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


def resolve_paths(paths: pd.Series, root: Path, boundary: Path, table: Path) -> tuple[list[str], dict[int, str]]:
    """Return each image's path from the root, and why others may not be opened, by position.

    Images must be below the root or the boundary, links included. Where a path names no file but one file differs from
    it only in extension, case, Unicode form or spaces around it, that file is taken; one line counts such rows.
    """
    directory, resolved, faults = Directory(root, boundary), [], {}
    for pattern, fault in (("\0", "its path holds a NUL"), ("^[A-Za-z]:", "its path is absolute"),
                           (r"\\" if os.sep == "/" else "\0", "its path holds a backslash; write /")):
        for place in np.flatnonzero(paths.str.contains(pattern)).tolist():
            faults.setdefault(place, fault)
    for place, path in enumerate(paths):
        found, fault = (path, "") if place in faults else directory.find(path)
        resolved.append(found)
        if fault:
            faults[place] = fault
    mended = [place for place, path in enumerate(paths) if resolved[place] != path]
    if mended:
        first = mended[0]
        print(f"{table}: {len(mended):,} image paths differ from their files in extension, case, Unicode form or "
              f"spaces (the first: row {paths.index[first]}, {paths.iloc[first]!r} is {resolved[first]!r})")
    return resolved, faults
