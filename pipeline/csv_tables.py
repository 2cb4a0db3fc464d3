"""CSV files as tables of text: how they are read, which column holds what, and what a cell may hold."""

import difflib
import io
import re
import warnings
import zipfile
from pathlib import Path

import pandas as pd

from pipeline.errors import DataError, first_line
from pipeline.sources import TableSource, name_rows

# Usual names of the columns, without case and punctuation; a later group counts only if no earlier one is there.
USUAL_NAMES = {
    "image": ("imagepath|imgpath|path|filepath|image|images|img|imagename|imgname|imagefile|imgfile|filename|file",
              "imageid|imgid|id"),
    "label": ("label|labels|class|classes|classname|classid|labelname|labelid|target|category|categoryid|y",),
    "id": ("id|imageid|imgid|idx",),
}
DEFAULT_NAMES = {"image": "image_path", "label": "label", "id": "example_id"}


def read_csv(path: Path, columns: tuple[str, ...], **options) -> pd.DataFrame:
    """Read a CSV with pandas, every cell as text. Errors become DataError with a remedy."""
    options = {"dtype": str, "na_filter": False, "skip_blank_lines": False, **options}
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            return pd.read_csv(unpack(path), index_col=False, encoding="utf-8-sig", **options)
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


def unpack(path: Path) -> Path | io.BytesIO:
    """Return what pandas can read: the path, or the one table in a .zip, whatever macOS put beside it."""
    if path.suffix != ".zip":
        return path
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not re.search(r"(^|/)(__MACOSX/|\.)|/$", name)]
        named = [name for name in names if name.lower().endswith((".csv", ".tsv"))] or names
        if len(named) != 1:
            raise ValueError(f"the archive holds {len(named)} tables: unpack it, and name one of them")
        return io.BytesIO(archive.read(named[0]))


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


def check_columns(path: Path, found: pd.Index, required: tuple[str, ...], flag: str = "") -> None:
    """Raise DataError if a column is missing or not unique; `flag` is the one that names such a column."""
    for name in required:
        if name not in found:
            hint = f"name the column that holds it with {flag}" if flag else "rename the column that holds it"
            if len(found) == 1:
                hint = "is it a CSV file with commas between its cells?"
            elif found.str.contains(r"\.(?:png|jpe?g|bmp|gif|tiff?|webp)$", case=False).any():
                hint = "its first row is not a header; write one above it, such as image_path,label"
            elif near := difflib.get_close_matches(name, found, 1, 0.7):
                hint = f"name {near[0]!r} with {flag}" if flag else f"rename {near[0]!r}"
            raise DataError(f"{path}: no column {name!r} in its header ({list_names(found)}); {hint}")
        if list(found).count(name) > 1 or f"{name}.1" in found:
            raise DataError(f"{path}: two columns are named {name!r}; remove one")


def list_names(names: pd.Index) -> str:
    """Return the first names of a header for a message."""
    return (", ".join(names[:20].str[:40]) + ", ..." * (len(names) > 20)).replace("\0", "")


def is_usual(name: str, kind: str) -> bool:
    """Return whether a column's name is a usual one for images, labels or ids, whatever its case and punctuation."""
    plain = re.sub(r"[\W_]+", "", name).lower()
    return name == DEFAULT_NAMES[kind] or any(re.fullmatch(names, plain) for names in USUAL_NAMES[kind])


def find_column(kind: str, source: TableSource, header: pd.Index, optional: bool = False,
                taken: tuple[str, ...] = ()) -> str:
    """Return the column of a table that holds image paths or labels, by its flag, its default name or a usual one.

    Only the training table must have a column that the flag names. A single column that is neither taken nor has an
    id's name holds the labels. Returns "" if an optional column is not there. Raises DataError if no column could be
    meant, or several.
    """
    default, flag, named = DEFAULT_NAMES[kind], f"--{kind}-column", source.columns[kind]
    if named in header or (named and source.part == "train"):
        check_columns(source.path, header, (named,), flag)
        return named
    if default in header:
        check_columns(source.path, header, (default,))
        return default
    free = header.difference([*taken, source.group_column], sort=False)
    plain = free.str.replace(r"[\W_]+", "", regex=True).str.lower()
    found = next(filter(len, (free[plain.str.fullmatch(names)] for names in USUAL_NAMES[kind])), header[:0])
    if kind == "label" and not len(found):
        rest = [name for name in free if not is_usual(name, "id") and not name.startswith("Unnamed: ")]
        found = rest if len(rest) == 1 else found
    if len(found) > 1:
        raise DataError(f"{source.path}: {' or '.join(found)} may hold the {kind}s, of its columns "
                        f"{list_names(header)}; name the right one with {flag}")
    if not len(found) and not optional:
        check_columns(source.path, header, (default,), flag)
    return found[0] if len(found) else ""


def find_id_column(source: TableSource, header: pd.Index) -> str:
    """Return the column of a test table that holds the ids, or "": by its flag, as the sample submission's first
    column is named, or by a usual name. Raises DataError if several could be meant."""
    if source.id_column:
        check_columns(source.path, header, (source.id_column,), "--id-column")
        return source.id_column
    wanted = [read_csv(source.sample, ("id", "label"), nrows=0).columns[0]] if source.sample else []
    found = [name for name in [*wanted, DEFAULT_NAMES["id"]] if name in header][:1]
    found = found or [name for name in header if is_usual(name, "id")]
    if len(found) > 1:
        raise DataError(f"{source.path}: {' or '.join(found)} may hold the ids; name the right one with --id-column")
    check_columns(source.path, header, tuple(found))
    return found[0] if found else ""


def find_key(source: TableSource, column: str, header: pd.Index, taken: tuple[str, ...] = ()) -> str:
    """Return the column of a table's labels, or that of its ids, which may be "". Raises DataError as they do, and if
    the group column is not there."""
    if source.group_column:
        check_columns(source.path, header, (source.group_column,), "--group-column")
    return find_column("label", source, header, taken=taken) if column == "label" else find_id_column(source, header)


def announce_columns(source: TableSource, column: str, key: str, **columns: str) -> None:
    """Print which columns were taken for what, unless all are as documented or as the command line says."""
    columns[column.removeprefix("example_") + "s"] = key
    usual = {*DEFAULT_NAMES.values(), *source.columns.values(), "ImageId", ""}
    if not usual.issuperset(columns.values()):
        taken = ", ".join(f"{what}: {name}" for what, name in columns.items() if name)
        print(f"{source.path}: columns taken for {taken}")


def check_cells(path: Path, table: pd.DataFrame, first_row: int = 2) -> pd.DataFrame:
    """Return a table indexed by the row in its file, or raise DataError for a cell that a submission could not keep."""
    if table.empty:
        raise DataError(f"{path}: the table has a header and no rows; is it the right file?")
    table = table.set_axis(pd.RangeIndex(first_row, len(table) + first_row))
    for name, cells in table.items():
        faults = {"is empty; fill it in or remove the row": cells.str.strip() == "",
                  "holds a carriage return, which a submission would not keep; remove it": cells.str.contains("\r")}
        for fault, faulty in faults.items():
            if faulty.any():
                raise DataError(f"{name_rows(path, table.index[faulty])}: {name} {fault}")
    return table
