"""Measure the accuracy of a digit recipe on labelled rows that are held out from training and from every choice.

    python -m benchmarks.digits --data-dir DIGITS --preset digits-tiny --seeds 0 1 2 [any flag of script.py]

Holds out 10,000 of the labelled rows, stratified and the same ones in every run (others with another
`--held-out-seed`, for a last figure after those have served to choose), and trains on the others with the real command,
once for each seed; it takes its validation rows from them. Then `script.py evaluate` scores the held-out rows by each
network, and by the mean of several. Prints a row for each: accuracy, errors, loss, and the run's own seconds. With
`--output-dir` tables and networks are kept, and a network that is finished there is only scored, so that seeds can be
trained side by side, and other recipes be compared on the same rows.
"""

import contextlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from pipeline.files import atomic_write
from tools.common import SCRIPT, make_parser

HELD_OUT = 10_000
FIGURES = re.compile(r"loss ([0-9.]+), accuracy ([0-9.]+)%")


def hold_out(data: Path, folder: Path, count: int, seed: int) -> tuple[Path, Path]:
    """Write the labelled rows as two tables: those to train on, and `count` held-out ones. Return both paths.

    Tables that are there stay, since another process may train on them; exits if they hold other rows.
    """
    table = pd.read_csv(data / "train.csv", dtype=str, na_filter=False)
    if not table.label.nunique() <= count < len(table):
        sys.exit(f"{data / 'train.csv'}: of {len(table):,} rows {count:,} cannot be held out; name another --held-out")
    parts = train_test_split(table, test_size=count, random_state=seed, stratify=table.label)
    paths = folder / "train.csv", folder / "held_out.csv"
    for path, part in zip(paths, parts):
        text = part.sort_index().to_csv(index=False)
        if path.exists() and path.read_bytes() != text.encode():
            sys.exit(f"{path}: holds other rows; name another --output-dir")
        if not path.exists():
            with atomic_write(path) as temporary:
                temporary.write_bytes(text.encode())
    return paths


def run_script(*words: object) -> str:
    """Run script.py and return what it printed. Exits if it fails."""
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def train_once(words: list[object], output: Path, flags: str) -> None:
    """Train into a folder, unless a network of the same flags is finished there. Exits if it has other flags."""
    mark = output / "flags.txt"
    if mark.exists() and mark.read_text() != flags:
        sys.exit(f"{output}: holds a network of other flags ({mark.read_text()}); name another --output-dir")
    if not mark.exists():
        run_script(*words, "--output-dir", output)
        mark.write_text(flags)


def main() -> None:
    """Train, score and print a table."""
    parser = make_parser("benchmarks.digits", __doc__, "data_dir", "cache_dir", output_dir=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--held-out-seed", type=int, default=0)
    given, flags = parser.parse_known_args()
    with contextlib.nullcontext(given.output_dir) if given.output_dir else tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()  # script.py looks for relative tables in --data-dir
        folder.mkdir(parents=True, exist_ok=True)
        train, held = hold_out(Path(given.data_dir), folder, given.held_out, given.held_out_seed)
        where = ["--data-dir", given.data_dir, "--cache-dir", given.cache_dir, "--no-pictures"]

        def score(title: str, checkpoints: list[Path], seconds: float) -> float:
            text = run_script("evaluate", *checkpoints, *where, "--test-csv", held, "--output-dir", folder / "scored")
            loss, accuracy = map(float, FIGURES.search(text).groups())
            errors = round(given.held_out * (100 - accuracy) / 100)
            print(f"| {title} | {accuracy:.2f} | {errors} | {loss:.4f} | {seconds:.0f} |", flush=True)
            return accuracy

        print("| network | accuracy | errors | loss | seconds |\n|---|--:|--:|--:|--:|", flush=True)
        accuracies, checkpoints = [], []
        for seed in given.seeds:
            output = folder / f"seed{seed}"
            rows = ["--held-out", str(given.held_out), "--held-out-seed", str(given.held_out_seed)]
            train_once([*where, "--train-csv", train, "--seed", seed, *flags], output, shlex.join([*rows, *flags]))
            checkpoints.append(output / "best_model.pth")
            seconds = json.loads((output / "run.json").read_text())["seconds"]
            accuracies.append(score(f"seed {seed}", checkpoints[-1:], seconds))
        if len(checkpoints) > 1:
            print(f"| mean | {np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f} | | | |")
            score("their probabilities averaged", checkpoints, 0)


if __name__ == "__main__":
    main()
