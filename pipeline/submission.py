"""The submission: compared with the sample before training, and read back before it gets its name."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.errors import DataError, warn
from pipeline.files import atomic_write
from pipeline.tables import Table, read_csv, without_blank_end


def check_sample_submission(path: Path, table: Table, classes: list[str]) -> None:
    """Raise DataError for the first difference between a test table and sample_submission.csv at this path, if any."""
    if table.path.startswith("torchvision:") or not path.exists():
        return
    sample, columns = without_blank_end(read_csv(path, table.submission_columns)), table.submission_columns
    if tuple(sample.columns) != columns:
        raise DataError(f"{path}: its columns are {', '.join(sample.columns)}; the submission's would be "
                        f"{', '.join(columns)}: is {table.path} of the same competition?")
    ids, wanted = table.rows.example_id.to_numpy(), sample[columns[0]].to_numpy()
    for place in np.flatnonzero(ids[: len(wanted)] != wanted[: len(ids)])[:1]:
        raise DataError(f"{path}, row {place + 2}: {columns[0]} is {wanted[place]!r}, in {table.path} it is "
                        f"{ids[place]!r}; the submission must have the sample's ids in its order")
    if len(ids) != len(wanted):
        raise DataError(f"{path}: has {len(wanted):,} rows, {table.path} has {len(ids):,}; the submission must have as "
                        "many as the sample")
    number = r"-?[0-9]+"
    odd = [label for label in classes if not re.fullmatch(number, label)]
    if odd and sample[columns[1]].str.fullmatch(number).all():
        raise DataError(f"{path}: its labels are whole numbers, and {odd[0]!r} is a label of the training table: "
                        f"is {table.path} of the same competition?")


def fill_bad_rows(table: Table, probabilities: np.ndarray, classes: list[str]) -> None:
    """Give rows without a usable image the class frequencies of the other rows' predictions, with a warning."""
    if not len(table.bad_rows):
        return
    counts = np.bincount(probabilities[table.usable_rows].argmax(axis=1), minlength=len(classes))
    probabilities[table.bad_rows] = counts / counts.sum()
    warn(f"{len(table.bad_rows)} of {len(table):,} rows of {table.path} have no usable image: they get the label "
         f"{classes[counts.argmax()]!r}, the most frequent prediction")


def write_submission(path: Path, table: Table, probabilities: np.ndarray, classes: list[str]) -> None:
    """Write the ids in their order, each with its most likely label, or raise DataError if that cannot be right."""
    if probabilities.shape != (len(table), len(classes)) or not np.isfinite(probabilities).all():
        raise DataError(f"{path}: not written: {probabilities.shape} probabilities, or some that are not finite, for "
                        f"{len(table)} rows and {len(classes)} classes")
    predicted = np.array(classes, dtype=object)[probabilities.argmax(axis=1)]
    ids, labels = table.submission_columns
    submission = pd.DataFrame({ids: table.rows.example_id.to_numpy(), labels: predicted}).astype("str")
    with atomic_write(path) as temporary:
        submission.to_csv(temporary, index=False)
        if not pd.read_csv(temporary, dtype=str, na_filter=False).equals(submission):
            raise DataError(f"{path}: does not read back as written; an id or a label cannot be kept in a CSV")
