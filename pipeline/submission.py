"""The submission: its form, by the sample if there is one, is known before training; it is read back once written."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.errors import DataError, warn
from pipeline.files import atomic_write
from pipeline.sources import Table


@dataclass(frozen=True, eq=False)
class SubmissionForm:
    """The columns and rows of a submission."""

    columns: list[str]  # the ids' first; then the labels' alone, or one for each class
    ids: np.ndarray     # [N] in the submission's order
    places: np.ndarray  # [N] the ids' positions in the test table

    def fill(self, probabilities: np.ndarray, classes: list[str]) -> pd.DataFrame:
        """Return the submission, all of text: the most likely class of each row, or all probabilities [rows, classes]
        to six digits."""
        ids, others = {self.columns[0]: self.ids}, self.columns[1:]
        ordered = probabilities[self.places]
        if len(others) == 1:
            labels = np.array(classes, dtype=object)[ordered.argmax(axis=1)]
            return pd.DataFrame({**ids, others[0]: labels}).astype("str")
        cells = {name: np.char.mod("%.6f", ordered[:, classes.index(name)]) for name in others}
        return pd.DataFrame({**ids, **cells}).astype("str")


def submission_form(table: Table, classes: list[str]) -> SubmissionForm:
    """Return the form of a test table's submission: that of its sample, whose columns beside the id are one for the
    labels or some of the classes; or the table's. Raises DataError for a sample that is not of this table."""
    ids = table.rows.example_id.to_numpy()
    if table.sample is None:
        return SubmissionForm(list(table.submission_columns), ids, np.arange(len(ids)))
    path, sample, columns = table.sample_path, table.sample, [str(name).strip() for name in table.sample.columns]
    unknown = [name for name in columns[1:] if name not in classes]
    if len(columns) < 2 or (len(columns) > 2 and unknown):
        raise DataError(f"{path}: its columns are {', '.join(columns[:20])}; a submission has one of ids and one of "
                        f"labels, or one for each class{f': {unknown[0]!r} is none' if unknown else ''}; correct or "
                        "remove it")
    wanted = sample.iloc[:, 0].to_numpy()
    places = pd.Index(ids).get_indexer(wanted)
    for row in np.flatnonzero(places < 0)[:1]:
        raise DataError(f"{path}, row {row + 2}: {columns[0]} is {wanted[row]!r}, which {table.path} does not have: is "
                        "it of the same competition? (--id-column names the column of the ids)")
    if len(set(wanted)) < len(wanted) or len(wanted) != len(ids):
        raise DataError(f"{path}: has {len(set(wanted)):,} different ids in {len(wanted):,} rows, {table.path} has "
                        f"{len(ids):,}; the submission must have the sample's")
    odd = [label for label in classes if not re.fullmatch(r"-?[0-9]+", label)]
    if len(columns) == 2 and odd and sample.iloc[:, 1].str.fullmatch(r"-?[0-9]+").all():
        fault = f"{path}: its labels are whole numbers, and {odd[0]!r} is a label of the training table"
        if len(odd) < len(classes):
            raise DataError(f"{fault}: is {table.path} of the same competition?")
        warn(f"{fault}; the submission has the training table's labels, write numbers there if it must have such")
    return SubmissionForm(columns, wanted, places)


def fill_bad_rows(table: Table, probabilities: np.ndarray, classes: list[str]) -> None:
    """Give rows without a usable image the class frequencies of the other rows' predictions, with a warning."""
    if not len(table.bad_rows):
        return
    counts = np.bincount(probabilities[table.usable_rows].argmax(axis=1), minlength=len(classes))
    probabilities[table.bad_rows] = counts / counts.sum()
    warn(f"{len(table.bad_rows)} of {len(table):,} rows of {table.path} have no usable image: they get the label "
         f"{classes[counts.argmax()]!r}, the most frequent prediction")


def write_submission(path: Path, table: Table, probabilities: np.ndarray, classes: list[str]) -> None:
    """Write the ids, each with its most likely label, or raise DataError if that cannot be right."""
    if probabilities.shape != (len(table), len(classes)) or not np.isfinite(probabilities).all():
        raise DataError(f"{path}: not written: {probabilities.shape} probabilities, or some that are not finite, for "
                        f"{len(table)} rows and {len(classes)} classes")
    submission = submission_form(table, classes).fill(probabilities, classes)
    with atomic_write(path) as temporary:
        submission.to_csv(temporary, index=False)
        if not pd.read_csv(temporary, dtype=str, na_filter=False).equals(submission):
            raise DataError(f"{path}: does not read back as written; an id or a label cannot be kept in a CSV")
