"""Label the test rows that saved probabilities are sure of, to be trained on.

    python script.py predict a.pth b.pth --data-dir COMPETITION --save-probabilities
    python -m tools.pseudolabels test_probabilities.npz --data-dir COMPETITION [--least 0.95] [--output extra.csv]
    python script.py --data-dir COMPETITION --extra-csv "$PWD/extra.csv" --extra-weight 0.5

Joins the test table with the probabilities by id, and writes each row whose likeliest class has at least that
probability: image_path and label, or label and pixels where the table holds pixels. What a network is surely wrong
about is learnt with the rest (Lee, "Pseudo-Label", 2013): compare the validation accuracy with and without.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import script


def label_rows(table: script.Table, labels: np.ndarray, rows: np.ndarray) -> pd.DataFrame:
    """These rows of a test table with their labels [rows], as a training table of the same kind."""
    if table.pixels is None:
        return pd.DataFrame({"image_path": table.rows.image_path.iloc[rows], "label": labels})
    pixels = table.pixels[rows].reshape(len(rows), -1)
    labelled = pd.DataFrame(pixels, columns=[f"pixel{number}" for number in range(pixels.shape[1])])
    labelled.insert(0, "label", labels)
    return labelled


def describe(classes: list[str], answers: np.ndarray, rows: int, least: float) -> str:
    """How many rows are sure, and how unevenly the classes are met by their `answers` [n]."""
    counts = np.bincount(answers, minlength=len(classes))
    fewest, without = counts.argmin(), (counts == 0).sum()
    text = f"{len(answers):,} of {rows:,} rows have a class of at least {least:g}; "
    if without:
        return text + f"{without:,} of {len(classes)} classes have none, such as {classes[fewest]!r}"
    return text + f"the fewest of a class are {counts[fewest]:,}, of {classes[fewest]!r}"


def write_labels(given: argparse.Namespace) -> None:
    """Write the table of the sure rows."""
    config = script.Config(data_dir=given.data_dir, train_csv=given.train_csv, test_csv=given.test_csv,
                           cache_dir=given.cache_dir, root_dir=given.root_dir)
    script.check_not_read(given.output.parent, [given.output.name],
                          [*script.input_files(config), given.probabilities])
    saved, table = script.read_probabilities(given.probabilities), script.read_test_table(config)
    probabilities = saved["probabilities"][script.match_ids(given.probabilities, saved["ids"], table)]
    rows = np.setdiff1d(np.flatnonzero(probabilities.max(axis=1) >= given.least), table.bad)
    if not len(rows):
        raise script.DataError(f"{given.probabilities}: no row has a class of at least {given.least:g}, the highest is "
                               f"{probabilities.max():.3f}; name a lower --least")
    answers = probabilities[rows].argmax(axis=1)
    with script.whole_file(given.output) as temporary:
        label_rows(table, saved["classes"][answers], rows).to_csv(temporary, index=False)
    print(f"{describe(saved['classes'].tolist(), answers, len(table), given.least)}\n"
          f"wrote {given.output}; train on it with --extra-csv {given.output.resolve()}")


def share(text: str) -> float:
    """A probability above 0, for argparse."""
    value = script.from_text(float, text)
    if not isinstance(value, float) or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pseudolabels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probabilities", type=Path, help="test_probabilities.npz of script.py --save-probabilities")
    for name in ("data_dir", "train_csv", "test_csv", "root_dir", "cache_dir"):
        parser.add_argument("--" + name.replace("_", "-"), default=getattr(script.Config, name),
                            help="as for script.py")
    parser.add_argument("--least", type=share, default=0.95, help="probability of the likeliest class (0.95)")
    parser.add_argument("--output", type=Path, default=Path("extra.csv"), help="table to write (extra.csv)")
    given = parser.parse_args(argv)
    return script.exit_status(lambda _: write_labels(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
