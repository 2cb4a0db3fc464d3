"""Arrays of images and labels in numpy's .npz and .npy files and in IDX files, as tables."""

import contextlib
import gzip
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.csv_tables import check_cells
from pipeline.errors import DataError, first_line
from pipeline.sources import Table, TableSource, arrange_pixels

SUFFIX = re.compile(r"\.np[yz]$|[-_.]idx\d(-ubyte)?(\.gz)?$", re.IGNORECASE)  # the end of a file's name
IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
WORD = r"[XxYy](?=train|test|val)|[A-Z]+(?![a-z])|[A-Z]?[a-z]+"  # of a name such as x_train, trainX or k49-train-imgs
WORDS = {"image": ("images", "imgs", "image", "img", "x", "data", "pixels"),
         "label": ("labels", "label", "y", "targets", "target", "lbls", "lbl", "classes", "class")}
PARTS = {"train": {"train", "training"}, "test": {"test", "testing"}, "val": {"val", "valid", "validation", "dev"}}
LUMINANCE = np.array([19595, 38470, 7471])  # Pillow's weights of red, green and blue, in 65,536ths
BLOCK = 4096  # images that are converted at a time, which bounds the memory


def array_table(source: TableSource, column: str) -> Table:
    """Read the images of an .npz, .npy or IDX file, with their labels or numbered from 1.

    Raises DataError for a damaged file, and for images or labels that are not there.
    """
    path, (images, labels) = source.path, read_arrays(source)
    levels = merge_channels(clean_levels(images, path), path)
    cells = label_texts(labels(), path) if column == "label" else map(str, range(1, len(levels) + 1))
    rows = pd.DataFrame({column: list(cells)}, dtype=str)
    if len(rows) != len(levels):
        raise DataError(f"{path}: {len(levels):,} images and {len(rows):,} labels; name the file that belongs to them, "
                        "or copy or download both again")
    names = ("example_id", "label") if column == "label" else ("ImageId", "Label")
    return Table(str(path), check_cells(path, rows, 1), submission_columns=names, numbered=column != "label",
                 pixels=arrange_pixels(levels, source, f"images of {math.prod(levels.shape[1:]):,} pixels"))


# ---- What the files hold ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def explained(path: Path, kind: str) -> Iterator[None]:
    """Raise what a reader of a file raises as a DataError with a remedy."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib, gzip, numpy and pyarrow each raise their own types
        if "allow_pickle" in str(error):
            raise DataError(f"{path}: it holds Python objects, which are not loaded since they can run programs; if "
                            "you trust it, write it again as arrays of numbers and texts: numpy.load(FILE, "
                            "allow_pickle=True), then numpy.stack(IMAGES) and LABELS.astype(str)") from None
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{path}: not a readable {kind} file ({reason}); copy or download it again") from None


def read_arrays(source: TableSource) -> tuple[np.ndarray, Callable[[], np.ndarray]]:
    """Return the images of an .npz, .npy or IDX file, and a function that returns their labels."""
    path = source.path
    if path.suffix.lower() == ".npz":
        with explained(path, ".npz"):
            arrays = Arrays(path)
        image, label = choose_arrays(source, arrays)
        return arrays[image], lambda: arrays[label] if label else labels_beside(source)
    return read_array(path), lambda: labels_beside(source)


class Arrays:
    """The arrays of an .npz file by name, each read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def __getitem__(self, name: str) -> np.ndarray:
        with (explained(self.path, ".npz"), zipfile.ZipFile(self.path) as archive,
              archive.open(f"{name}.npy") as file):
            return np.lib.format.read_array(file, allow_pickle=False)


def choose_arrays(source: TableSource, arrays: Arrays) -> tuple[str, str]:
    """Return the names of the arrays of an .npz that hold images and labels; "" if none holds labels."""
    image, label = (pick_array(source, arrays.names, kind) for kind in ("image", "label"))
    if not image:  # such as arr_0, and arr_1 of labels: images are of the most dimensions
        others = PARTS["val"] | PARTS["train" if source.part == "test" else "test"]
        rest = [name for name in arrays.names if name != label and not words(name) & others]
        ranks = {name: arrays[name].ndim for name in rest}
        top = [name for name in rest if ranks[name] == max(ranks.values()) > 1]
        if len(top) != 1:
            raise DataError(f"{source.path}: none of its arrays ({', '.join(arrays.names[:10])}) has the name of "
                            f"{'test ' * (source.part == 'test')}images; name the one that holds them with "
                            "--image-column")
        image = top[0]
        label = label or ("" if len(rest) != 2 else next(name for name in rest if name != image))
    unused = [name for name in arrays.names if words(name) & PARTS["val"] and name not in (image, label)]
    if unused and source.part == "train":
        print(f"{source.path}: its arrays of validation images are not used ({', '.join(unused)})")
    return image, label


def pick_array(source: TableSource, names: list[str], kind: str) -> str:
    """Return the array that a flag names or whose name says that it holds this part's images or labels, or "".

    Raises DataError if there is no array of the flag's name in a training table, or if several could be meant.
    """
    flag, named, part = f"--{kind}-column", source.columns[kind], "test" if source.part == "test" else "train"
    if named in names:
        return named
    if named and source.part == "train":
        raise DataError(f"{source.path}: no array {named!r}; name one of {', '.join(names)} with {flag}")
    fitting = [name for name in names if words(name) & {*WORDS[kind]} and not words(name) & PARTS["val"]]
    own = [name for name in fitting if words(name) & PARTS[part]] or [
        name for name in fitting if not words(name) & {*PARTS["train"], *PARTS["test"]}]
    own = own or (fitting if part == "train" and len(fitting) == 1 else [])
    known = {*WORDS[kind], *PARTS[part]}
    least = min((len(words(name) - known) for name in own), default=0)  # labels rather than label_names
    own = [name for name in own if len(words(name) - known) == least]
    if len(own) > 1:
        raise DataError(f"{source.path}: {' or '.join(own)} may hold the {kind}s; name the right array with {flag}")
    return own[0] if own else ""


def words(name: str) -> set[str]:
    """Return the words of an array's name, in lower case."""
    return {word.lower() for word in re.findall(WORD, name)}


def labels_beside(source: TableSource) -> np.ndarray:
    """Return the labels of the file beside one of images. Raises DataError that names it if it is not there."""
    wanted, path = label_names(source.path), find_labels(source.path)
    if not path:
        raise DataError(f"{source.path}: neither it nor a file beside it holds labels; put them there as "
                        f"{wanted[0]}{re.sub('idx[0-9]', 'idx1', suffix_of(source.path))}")
    print(f"{source.path}: its labels are those of {path.name}")
    if path.suffix.lower() != ".npz":
        return read_array(path)
    with explained(path, ".npz"):
        arrays = Arrays(path)
    name = arrays.names[0] if len(arrays.names) == 1 else pick_array(source, arrays.names, "label")
    if not name:
        raise DataError(f"{path}: none of its arrays ({', '.join(arrays.names[:10])}) has the name of labels; name the "
                        "one that holds them with --label-column")
    return arrays[name]


def suffix_of(path: Path) -> str:
    """Return the end of a packed file's name, such as .npz or -idx3-ubyte.gz; "" of other files."""
    found = SUFFIX.search(path.name)
    return found[0] if found else ""


def label_names(path: Path) -> list[str]:
    """Return the names, without their ends, that a file of labels may have beside this one: train-labels beside
    train-images, y beside X, and so on."""
    own = path.name.removesuffix(suffix_of(path))
    places = [found.span() for found in re.finditer(WORD, own) if found[0].lower() in WORDS["image"]]
    replaced = [own[:start] + label + own[end:] for start, end in places for label in WORDS["label"]]
    return [*replaced, f"{own}-labels", f"{own}_labels"]


def find_labels(path: Path) -> Path | None:
    """Return the file of labels beside a packed file of images, if there is one: first of the same kind."""
    beside = [path.with_name(name) for name in sorted(os.listdir(path.parent)) if name != path.name]
    beside = [other for other in beside if suffix_of(other)]
    for name in label_names(path):
        found = [other for other in beside if other.name.removesuffix(suffix_of(other)).lower() == name.lower()]
        if found:
            return min(found, key=lambda other: other.suffix != path.suffix)
    return None


def read_array(path: Path) -> np.ndarray:
    """Return the array of an .npy or IDX file."""
    if path.suffix.lower() == ".npy":
        with explained(path, ".npy"), open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    with explained(path, "IDX"):
        return read_idx(path.read_bytes())


def read_idx(content: bytes) -> np.ndarray:
    """Return the array of an IDX file's content, compressed or not. Raises ValueError if it is damaged."""
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    zero, kind, axes = struct.unpack(">HBB", content[:4])
    if zero or kind not in IDX_TYPES:
        raise ValueError("it does not begin as an IDX file does")
    shape = struct.unpack(f">{axes}I", content[4:4 + 4 * axes])
    dtype = np.dtype(IDX_TYPES[kind])
    if len(content) != (needed := 4 + 4 * axes + math.prod(shape) * dtype.itemsize):
        raise ValueError(f"it has {len(content):,} bytes, and its header says {needed:,}")
    array = np.frombuffer(content, dtype, offset=4 + 4 * axes).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


# ---- Grey levels and texts -------------------------------------------------------------------------------------------

def clean_levels(levels: np.ndarray, path: Path) -> np.ndarray:
    """Return grey levels as unsigned integers, or as float32 if they are fractions. Raises DataError for others."""
    kind = levels.dtype.kind
    if kind not in "buif" or not levels.size:
        what = "it holds no image" if kind in "buif" else f"its images are of type {levels.dtype}, not numbers"
        raise DataError(f"{path}: {what}; name the file that holds the images")
    if kind == "b":
        return levels.view(np.uint8)
    low, high = levels.min(), levels.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{path}: some of its grey levels are NaN or infinite; write numpy.nan_to_num(images, "
                        "posinf=0, neginf=0) for images")
    if low < 0:
        raise DataError(f"{path}: its grey levels go from {low:.4g} to {high:.4g}, and must be from 0 up; write "
                        "(images - images.min()) / (images.max() - images.min()) for images")
    if kind == "u":
        return levels
    blocks = np.array_split(levels, math.ceil(len(levels) / BLOCK))
    if high < 2**32 and (kind == "i" or not any((block % 1).any() for block in blocks)):
        return levels.astype(np.min_scalar_type(int(high)))
    return levels.astype(np.float32)


def merge_channels(images: np.ndarray, path: Path) -> np.ndarray:
    """Return grey levels [N, H, W] or [N, pixels] of such images, or of those with an axis of 1 or 3 colours.

    Raises DataError for an array of another shape.
    """
    shape = images.shape
    axis = next((axis for axis in (3, 1) if len(shape) == 4 and shape[axis] in (1, 3)), None)
    if axis is None and len(shape) not in (2, 3):
        raise DataError(f"{path}: its images are an array {'x'.join(map(str, shape))}; write one of images x height x "
                        "width, or with 1 or 3 colours as a fourth axis")
    if axis is None:
        return images.reshape(len(images), -1) if 1 in shape[1:] else images  # [N, pixels, 1] are rows of pixels
    images = np.moveaxis(images, axis, 3)
    return images[..., 0] if images.shape[3] == 1 else mix_colours(images)


def mix_colours(images: np.ndarray) -> np.ndarray:
    """Return grey levels [N, H, W] of colours [N, H, W, 3], as Pillow mixes them."""
    grey = np.empty(images.shape[:3], images.dtype)
    for start in range(0, len(images), BLOCK):
        block = images[start:start + BLOCK]
        grey[start:start + BLOCK] = (block @ (LUMINANCE / 65536).astype(np.float32) if block.dtype.kind == "f" else
                                     (block.astype(np.uint64) @ LUMINANCE.astype(np.uint64) + 0x8000) >> 16)
    return grey


def label_texts(labels: np.ndarray, path: Path) -> list[str]:
    """Return labels [N], [N, 1], or [N, classes] of which one is 1, as text. Raises DataError for others."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.dtype.kind in "buif" and (labels.sum(axis=1) == 1).all() and (
            labels.max(axis=1) == 1).all() and (labels != 0).sum() == len(labels):
        labels = labels.argmax(axis=1)
    if labels.ndim != 1:
        raise DataError(f"{path}: its labels are an array {'x'.join(map(str, labels.shape))}; write one label for each "
                        "image, or a row of zeros with a single 1")
    return list(map(to_text, labels.tolist()))


def to_text(value: object) -> str:
    """Return a label or an id as text: 7.0 as 7; "" if it is missing."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None or value != value else str(int(value) if isinstance(value, bool) else value)
