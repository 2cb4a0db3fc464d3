"""Label the test rows that a network is sure of, to train on them.

    python script.py predict a.pth b.pth --data-dir COMPETITION --save-probabilities
    python -m tools.pseudolabels test_probabilities.npz --data-dir COMPETITION [--least 0.95] [--output-dir .]
    python script.py --data-dir COMPETITION --extra-csv "$PWD/extra.csv" --extra-weight 0.5

Joins the test table with the probabilities by id, and writes extra.csv: each row whose most likely class has at least
the probability `--least`, as image_path and label, or as label and pixels if the table holds pixels. Confident mistakes
are learnt with the rest (Lee, "Pseudo-Label", 2013): compare the validation accuracy with and without.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline import ensemble, files
from pipeline.cli import from_text
from pipeline.errors import DataError, UsageError
from pipeline.signals import exit_status
from pipeline.tables import Table, read_test_table
from tools.common import OF_TABLES, make_parser, table_config

OUTPUT = "extra.csv"


def label_rows(table: Table, labels: np.ndarray, rows: np.ndarray, transposed: bool = False) -> pd.DataFrame:
    """Return rows of a test table with their labels [rows], as a training table: of paths, or of pixels that lie on
    their side as those of the test table if it is `transposed`. Raises DataError for a table that holds image files."""
    if table.encoded is not None:
        raise DataError(f"{table.path}: holds the images themselves; write them to a folder, and label that")
    if table.pixels is None:
        return pd.DataFrame({"image_path": table.rows.image_path.iloc[rows], "label": labels})
    pixels = table.pixels[rows].swapaxes(1, 2) if transposed else table.pixels[rows]
    pixels = pixels.reshape(len(rows), -1)
    labelled = pd.DataFrame(pixels, columns=[f"pixel{number}" for number in range(pixels.shape[1])])
    labelled.insert(0, "label", labels)
    return labelled


def describe(classes: list[str], answers: np.ndarray, rows: int, least: float) -> str:
    """Return how many of the rows are labelled, and how unevenly over the classes, by their class numbers [n]."""
    counts = np.bincount(answers, minlength=len(classes))
    fewest, without = counts.argmin(), (counts == 0).sum()
    text = f"{len(answers):,} of {rows:,} rows have a class of at least {least:g}; "
    if without:
        return text + f"{without:,} of {len(classes)} classes have none, such as {classes[fewest]!r}"
    return text + f"the fewest of a class are {counts[fewest]:,}, of {classes[fewest]!r}"


def write_labels(given: argparse.Namespace) -> None:
    """Write the table of the rows that the probabilities are sure of."""
    config = table_config(given)
    if not config.test_source:
        raise UsageError("--test-csv none: there is no table to label; name one")
    files.check_not_overwritten(given.output_dir, [OUTPUT], [*config.inputs, given.probabilities])
    path = files.make_output_folder(given.output_dir, [OUTPUT]) / OUTPUT
    saved, table = ensemble.read_probabilities(given.probabilities), read_test_table(config.test_source)
    probabilities = saved["probabilities"][ensemble.match_ids(given.probabilities, saved["ids"], table)]
    rows = np.setdiff1d(np.flatnonzero(probabilities.max(axis=1) >= given.least), table.bad_rows)
    if not len(rows):
        raise DataError(f"{given.probabilities}: no row has a class of at least {given.least:g}, the highest is "
                        f"{probabilities.max():.3f}; name a lower --least")
    answers = probabilities[rows].argmax(axis=1)
    with files.atomic_write(path) as temporary:
        label_rows(table, saved["classes"][answers], rows, given.transpose).to_csv(temporary, index=False)
    root = f" --extra-root {given.test_root}" if given.test_root else ""
    print(f"{describe(saved['classes'].tolist(), answers, len(table), given.least)}\n"
          f"wrote {path}; train on it with --extra-csv {path.resolve()}{root}")


def share(text: str) -> float:
    """Return a probability above 0, for argparse."""
    value = from_text(float, text)
    if not isinstance(value, float) or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.pseudolabels", __doc__, *OF_TABLES, "output_dir")
    parser.add_argument("probabilities", type=Path, help="test_probabilities.npz of script.py --save-probabilities")
    parser.add_argument("--least", type=share, default=0.95, help="least probability of the most likely class (0.95)")
    given = parser.parse_args(argv)
    return exit_status(lambda _: write_labels(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
