"""Atomic and verified writes, folder locks, and protection of the user's files."""

import contextlib
import errno
import glob
import hashlib
import io
import os
import pickle
import platform
import re
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from pipeline.errors import DataError, UsageError


@contextlib.contextmanager
def atomic_write(path: Path):
    """Yield a temporary path. The file gets its own name only when it is complete and on the disk."""
    prefix = f".{re.sub('[^A-Za-z0-9]', '', platform.node())}-"
    for leftover in path.parent.glob(f"{prefix}*.{glob.escape(path.name)}"):  # of processes of this machine
        process = leftover.name[len(prefix):].split(".")[0]
        try:
            if process.isdigit() and os.name == "posix":
                os.kill(int(process), 0)
        except ProcessLookupError:  # it was killed
            leftover.unlink(missing_ok=True)
        except OSError:  # it is another user's
            pass
    temporary = path.with_name(f"{prefix}{os.getpid()}.{path.name}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # the name is part of the folder, which is flushed separately
            fsync(path.parent)
    except OSError as error:
        if error.errno is None:  # pandas reports a missing folder without a number
            raise OSError(errno.EIO, str(error), str(path)) from None
        if error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives cannot flush a folder
            raise
    finally:
        os.close(number)


def sha256_of(content: object) -> str:
    """Return the SHA-256 of tensors and plain values in dictionaries, lists and tuples."""
    total = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            if value.numel():  # an empty tensor has no bytes
                total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, (dict, list, tuple)):
            total.update(f"{'dict' if isinstance(value, dict) else 'list'} {len(value)}".encode())
            for part in value.items() if isinstance(value, dict) else value:
                add(part)
        else:
            total.update(repr(value).encode())

    add(content)
    return total.hexdigest()


def save_verified(path: Path, content: dict) -> None:
    """Save a dictionary of tensors and plain values with its SHA-256; read it back before it gets its name."""
    buffer = io.BytesIO()  # torch reports a full disk as an error of its own
    torch.save({**content, "sha256": sha256_of(content)}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        fsync(temporary)
        load_verified(temporary)


def load_tensors(path: str | Path) -> dict:
    """Load a dictionary of tensors and plain values, as data and never as code. Raises ValueError for other content."""
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own message advises to load the file as code
        raise ValueError("it is not a file of tensors and plain values written by torch") from None
    if not isinstance(content, dict):
        raise ValueError("it does not hold a dictionary")
    return content


def load_verified(path: str | Path) -> dict:
    """Load what `save_verified` saved. Raises ValueError if the content does not match its SHA-256."""
    content = load_tensors(path)
    if content.pop("sha256", None) != sha256_of(content):
        raise ValueError("its content is not what was written: the SHA-256 differs, or is missing")
    return content


def check_not_overwritten(folder: Path, written: Iterable[str], inputs: Iterable[Path]) -> None:
    """Raise UsageError if a file that will be written into a folder is one of the inputs."""
    inputs = list(filter(Path.exists, inputs))
    for path in filter(Path.exists, (folder / name for name in written)):
        for other in filter(path.samefile, inputs):
            raise UsageError(f"{other}: is an input and would be overwritten; name another --output-dir, or rename it")


def make_output_folder(folder: Path, file_names: Iterable[str] = ()) -> Path:
    """Create and return a folder. Raises DataError if it, or one of the files in it, cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}); name another --output-dir") from None
    for name in file_names:
        if (folder / name).is_dir():
            raise DataError(f"{folder / name}: a folder has the name of a file that will be written; rename the folder")
    return folder


@contextlib.contextmanager
def lock_folder(folder: Path):
    """Hold a lock on a folder, or raise DataError if another process of this machine does. No lock on Windows."""
    if os.name != "posix":
        yield
        return
    import fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another run is writing there; wait, or name another --output-dir") from None
        except OSError:  # some network drives have no locks
            pass
        yield
    finally:
        os.close(number)


def cache_folder(cache_dir: str) -> Path:
    """Return the folder of decoded and downloaded images: `cache_dir`, or by default one in the user's cache folder."""
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache_dir or os.path.join(shared, "symbol-classifier"))
