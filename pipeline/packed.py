"""Tables packed into files of their own formats: arrays, parquet, and torchvision's data."""

import contextlib
import io
import re
from pathlib import Path

import pandas as pd

from pipeline.arrays import SUFFIX, array_table, explained, to_text
from pipeline.csv_tables import announce_columns, check_cells, find_column, find_key
from pipeline.errors import DataError, UsageError, first_line
from pipeline.files import cache_folder
from pipeline.sources import Table, TableSource

SHARD = r"(.*-)(\d+)(-of-\d+)(.*)\.parquet"  # NAME-00000-of-00005.parquet, maybe with a digest at the end


def is_packed(source: TableSource) -> bool:
    """Return whether a table is torchvision's data or a file of arrays, IDX or parquet, by its name."""
    packed = source.name.lower().endswith(".parquet") or SUFFIX.search(source.name)
    return source.name.startswith("torchvision:") or bool(packed and not source.path.is_dir())


def packed_table(source: TableSource, column: str) -> Table:
    """Read a packed table with its labels or ids, which number the images from 1 unless a column holds them.

    Raises DataError for a damaged file, and for images or labels that are not there.
    """
    if source.name.lower().endswith(".parquet"):
        return parquet_table(source, column)
    if source.group_column:
        raise UsageError(f"{source.name} has no column {source.group_column!r}; leave out --group-column")
    if source.name.startswith("torchvision:"):
        return torchvision_table(source, column)
    return array_table(source, column)


# ---- Parquet ---------------------------------------------------------------------------------------------------------

def parquet_table(source: TableSource, column: str) -> Table:
    """Read a parquet table of image files, such as those of the Hugging Face hub, with all its shards."""
    try:
        from pyarrow import compute, parquet
        from pyarrow.types import is_nested
    except ImportError:
        raise DataError(f"{source.path}: parquet files are read by pyarrow, which is not installed; pip install "
                        "pyarrow") from None
    path, files = find_shards(source.path)
    with explained(source.path, "parquet"):
        schema = parquet.read_schema(files[0])
    image = find_image_column(source, schema)
    plain = pd.Index([field.name for field in schema if not is_nested(field.type) and field.name != image])
    key = find_key(source, column, plain)
    announce_columns(source, column, key, images="" if image == "image" else image)
    texts, encoded = {name: [] for name in (key, source.group_column) if name}, []
    for file in files:
        with explained(file, "parquet"):
            part = parquet.read_table(file, columns=[image, *texts])
            images = part[image]
            encoded += (compute.struct_field(images, "bytes") if is_nested(images.type) else images).to_pylist()
            for name, cells in texts.items():
                cells += map(to_text, part[name].to_pylist())
    if not any(encoded):
        fault = (f"its column {image} holds paths of images and not the images; name a CSV table of these paths, or "
                 "write the files' bytes into it" if encoded else "it has no rows; is it the right file?")
        raise DataError(f"{path}: {fault}")
    rows = pd.DataFrame({column: texts[key] if key else list(map(str, range(1, len(encoded) + 1))),
                         **({source.group_column: texts[source.group_column]} if source.group_column else {})})
    names = ("example_id", key) if column == "label" else (key, source.label_column or "label")
    faults = {place: "the table holds no bytes of it" for place, content in enumerate(encoded) if not content}
    return Table(str(path), check_cells(path, rows, 1), encoded=[content or b"" for content in encoded], faults=faults,
                 submission_columns=names if key else ("ImageId", "Label"), numbered=not key)


def find_shards(path: Path) -> tuple[Path, list[Path]]:
    """Return the name of a parquet table in messages, and its files in order: all of NAME-00000-of-00005.parquet.

    Raises DataError if one of them is missing or there twice.
    """
    found = re.fullmatch(SHARD, path.name)
    if not found:
        return path, [path]
    numbers = range(int(found[3].removeprefix("-of-")))
    shards = {number: [] for number in numbers}
    for other in sorted(path.parent.iterdir()):
        shard = re.fullmatch(SHARD, other.name)
        if shard and (shard[1], shard[3]) == (found[1], found[3]) and int(shard[2]) in shards:
            shards[int(shard[2])].append(other)
    for number, files in shards.items():
        if len(files) != 1:
            name = f"{found[1]}{number:0{len(found[2])}d}{found[3]}"
            fault = f"{name}*.parquet of the same table is missing; put it there" if not files else (
                f"{files[0].name} and {files[1].name} are the same part of one table; remove one")
            raise DataError(f"{path}: {fault}")
    if len(shards) > 1:
        print(f"{path}: it is read with the other parts of its table, {len(shards)} files in all")
    name = f"{found[1]}*{found[3]}.parquet" if len(shards) > 1 else path.name
    return path.with_name(name), [files[0] for files in shards.values()]


def find_image_column(source: TableSource, schema) -> str:
    """Return the column of a parquet table that holds image files: binary, or a struct with the field bytes.

    Raises DataError if there is none, or several could be meant.
    """
    from pyarrow.types import is_binary, is_large_binary, is_struct

    found = [field.name for field in schema if is_binary(field.type) or is_large_binary(field.type) or (
        is_struct(field.type) and field.type.get_field_index("bytes") >= 0)]
    named = source.image_column if source.image_column in schema.names or source.part == "train" else ""
    if not found or (named and named not in found):
        what = f"{named} is no column of image files" if named else "none of its columns holds image files"
        remedy = f"name one of these with --image-column: {', '.join(found)}" if found else (
            "write the images as files and name a CSV table of their paths")
        raise DataError(f"{source.path}: {what} (of {', '.join(schema.names[:20])}); {remedy}")
    return named or (found[0] if len(found) == 1 else find_column("image", source, pd.Index(found)))


# ---- torchvision -----------------------------------------------------------------------------------------------------

def torchvision_table(source: TableSource, column: str) -> Table:
    """Return a part of torchvision:NAME or torchvision:EMNIST:SPLIT, downloaded into the cache folder if needed."""
    from torchvision import datasets

    kind, split = (source.name.removeprefix("torchvision:") + ":").split(":")[:2]
    splits = datasets.EMNIST.splits if kind == "EMNIST" else ("",)
    if kind not in ("MNIST", "FashionMNIST", "KMNIST", "EMNIST") or split not in splits:
        raise UsageError(f"{source.name} is unknown; there are torchvision:MNIST, FashionMNIST, KMNIST, and EMNIST "
                         f"with its split: torchvision:EMNIST:{', '.join(datasets.EMNIST.splits)}")
    folder, options = cache_folder(source.cache_dir), {"split": split} if split else {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = getattr(datasets, kind)(folder, train=source.part != "test", download=True, **options)
    except Exception as error:  # urllib, ssl, zipfile and torchvision each raise their own types
        raise DataError(f"{source.name}: neither in {folder / kind} nor downloadable ({first_line(error)}); put its "
                        f"files into {folder / kind / 'raw'}, or name the folder of {kind} with --cache-dir") from None
    pixels = (data.data.mT.contiguous() if kind == "EMNIST" else data.data).numpy()  # EMNIST is transposed
    numbers, names = pd.RangeIndex(1, len(pixels) + 1), [name.split(" - ")[0] for name in data.classes]  # "7 - seven"
    cells = [names[target] for target in data.targets.tolist()] if column == "label" else numbers.astype(str)
    rows = pd.DataFrame({column: cells}, index=numbers)
    return Table(source.name, rows, pixels=pixels, submission_columns=("ImageId", "Label"), numbered=column != "label")
