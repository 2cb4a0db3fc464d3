"""Averages of several networks' probabilities, which may be saved by one machine and averaged on another."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.device import Runtime, start_runtime
from pipeline.errors import DataError, UsageError, first_line
from pipeline.files import atomic_write
from pipeline.sources import Table, TableSource


@dataclass(frozen=True)
class EnsembleMember:
    """A file of an ensemble, a checkpoint or saved probabilities: all but its network or its probabilities."""

    path: Path
    classes: list[str]
    networks: int = 1           # how many networks its probabilities are the mean of
    config: object = None       # settings of a checkpoint's network; None for saved probabilities
    statistics: object = None   # how a checkpoint's network wants its images


def runtime_for(members: list[EnsembleMember], device: str, precision: str = "auto",
                eval_batch_size: int | None = None) -> Runtime:
    """Start a runtime in the precision that the first network was trained in, or the fastest that the device has."""
    trained_in = next((member.config.precision for member in members if member.config), "")
    return start_runtime(device, precision, eval_batch_size, trained_in)


def check_same_classes(members: list[EnsembleMember]) -> None:
    """Raise DataError if the members do not all know the same classes."""
    for member in members:
        if differing := set(members[0].classes) ^ set(member.classes):
            raise DataError(f"{member.path}: knows other classes than {members[0].path} "
                            f"({', '.join(sorted(differing)[:5])}); average networks trained on the same ones")


def source_for(members: list[EnsembleMember], source: TableSource | None) -> TableSource:
    """Return the source of a table that is read as the members' training tables were: the same way up, and by the same
    columns where the command line names none.

    Raises UsageError if these were not read alike, or if there is no table.
    """
    if not source:
        raise UsageError("--test-csv none: there is no table to predict; name one")
    trained = [member.config.train_source for member in members if member.config]
    if len({(other.transpose, other.pixel_shape) for other in trained}) > 1:
        raise UsageError("the checkpoints were trained with different --transpose or --pixel-shape; use one at a time")
    names = ("image_column", "label_column", "label_pattern")
    return source if not trained else dataclasses.replace(
        source, transpose=trained[0].transpose, pixel_shape=trained[0].pixel_shape,
        **{name: getattr(source, name) or getattr(trained[0], name) for name in names})


def average(members: list[EnsembleMember], predict: Callable[[EnsembleMember], np.ndarray]) -> np.ndarray:
    """Return the networks' mean probabilities [N, classes], float32, with the classes in the first member's order."""
    total = sum(member.networks * predict(member)[:, pd.Index(member.classes).get_indexer(members[0].classes)]
                for member in members)
    return total / sum(member.networks for member in members)


def save_probabilities(path: Path, table: Table, probabilities: np.ndarray, classes: list[str], networks: int) -> None:
    """Save a test table's probabilities, the mean of so many networks, as ids, classes, probabilities and weight."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, ids=table.rows.example_id.to_numpy(dtype=str), classes=np.array(classes),
                 probabilities=probabilities.astype(np.float32, order="C"), weight=networks)


def read_probabilities(path: Path) -> dict[str, np.ndarray]:
    """Return what `save_probabilities` saved. Raises DataError for a file that is damaged or of another kind."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:  # np.load may leave it open
            saved = {name: file[name] for name in ("ids", "classes", "probabilities", "weight")}
        values, weight = saved["probabilities"], saved["weight"]
        if values.shape != (len(saved["ids"]), len(saved["classes"])) or values.dtype != np.float32:
            raise ValueError(f"its probabilities are {values.dtype} {values.shape}")
        if not (np.isfinite(values).all() and (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-2)):
            raise ValueError("its rows are not probabilities")
        if weight.shape or weight.dtype.kind not in "iu" or weight < 1:
            raise ValueError("its weight is not a number of networks")
        if any(names.dtype.kind != "U" or len(np.unique(names)) < len(names)
               for names in (saved["ids"], saved["classes"])):
            raise ValueError("its ids or classes are not unique text")
        return saved
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; write one with --save-probabilities") from None
    except Exception as error:  # zipfile, zlib and numpy each raise their own types
        raise DataError(f"{path}: not a complete file of saved test probabilities ({type(error).__name__}: "
                        f"{first_line(error)}); write it again with --save-probabilities") from None


def open_saved(path: Path) -> EnsembleMember:
    """Return a file of saved probabilities as a member."""
    saved = read_probabilities(path)
    return EnsembleMember(path, saved["classes"].tolist(), int(saved["weight"]))


def saved_for(member: EnsembleMember, table: Table) -> np.ndarray:
    """Return the saved probabilities of a member, in the order of a test table's rows.

    Raises DataError if they are not of the rows of this table.
    """
    saved = read_probabilities(member.path)
    return saved["probabilities"][match_ids(member.path, saved["ids"], table)]


def check_saved(members: list[EnsembleMember], table: Table) -> None:
    """Raise DataError for saved probabilities that are not of a test table's rows, before networks take their time."""
    for member in members:
        if not member.config:
            saved_for(member, table)


def match_ids(path: Path, ids: np.ndarray, table: Table) -> np.ndarray:
    """Return the place of each row of a test table among a file's ids [N]. Raises DataError if the ids differ."""
    wanted = table.rows.example_id
    places = pd.Index(ids).get_indexer(wanted)
    remedy = "it must be of the same test table"
    for row in wanted.index[places < 0][:1]:
        raise DataError(f"{path}: has no row of the id {wanted[row]!r}, {table.path}, row {row}; {remedy}")
    if len(ids) > len(wanted):
        other = str(np.setdiff1d(ids, wanted.to_numpy(dtype=str))[0])
        raise DataError(f"{path}: has a row of the id {other!r}, which {table.path} does not have; {remedy}")
    return places
