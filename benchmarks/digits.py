"""Accuracy of a digit recipe on labelled rows that were held out from training and from every choice.

    python -m benchmarks.digits --data-dir DIGITS --preset digits-tiny --seeds 0 1 2 [any flag of script.py]

Sets 10,000 of the labelled rows aside, stratified and the same ones in every run (others with another
`--held-out-seed`, for a last figure when those have served to choose), and hands the others to the real command, once
for each seed; what it keeps of them for validation is its own affair. Then `script.py evaluate` judges
the held-out rows, each network alone and, of several, their mean. Prints a row for each: accuracy, errors, loss, and
the run's seconds by its own record. In a `--folder` tables and networks stay, and a network that is finished there
is only judged: so that seeds can be trained side by side, and other recipes be compared on the rows that are left.
"""

import argparse
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

import script

HELD_OUT = 10_000
SCRIPT = Path(__file__).resolve().parent.parent / "script.py"
FIGURES = re.compile(r"loss ([0-9.]+), accuracy ([0-9.]+)%")


def hold_out(data: Path, folder: Path, count: int, seed: int) -> tuple[Path, Path]:
    """Write the labelled rows as two tables: to train on, and `count` to judge by.

    What is there already stays, since another process may be training on it, and is refused if it is of another split.
    """
    table = pd.read_csv(data / "train.csv", dtype=str, na_filter=False)
    if not table.label.nunique() <= count < len(table):
        sys.exit(f"{data / 'train.csv'}: of {len(table):,} rows {count:,} cannot be held out; name another --held-out")
    parts = train_test_split(table, test_size=count, random_state=seed, stratify=table.label)
    paths = folder / "train.csv", folder / "held_out.csv"
    for path, part in zip(paths, parts):
        text = part.sort_index().to_csv(index=False)
        if path.exists() and path.read_bytes() != text.encode():
            sys.exit(f"{path}: holds other rows; name another --folder")
        if not path.exists():
            with script.whole_file(path) as temporary:
                temporary.write_bytes(text.encode())
    return paths


def command(*words: object) -> str:
    """Run script.py; gives what it printed, and stops the benchmark where it fails."""
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def train_once(words: list[object], output: Path, flags: str) -> None:
    """Train into a folder, unless a network of the same flags is finished there; stop where it is one of others."""
    mark = output / "flags.txt"
    if mark.exists() and mark.read_text() != flags:
        sys.exit(f"{output}: holds a network of other flags ({mark.read_text()}); name another --folder")
    if not mark.exists():
        command(*words, "--output-dir", output)
        mark.write_text(flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache-dir", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--held-out-seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of tables and networks, which then stay")
    given, flags = parser.parse_known_args()
    with contextlib.nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()  # tables are looked for below --data-dir
        folder.mkdir(parents=True, exist_ok=True)
        train, held = hold_out(given.data_dir, folder, given.held_out, given.held_out_seed)
        where = ["--data-dir", given.data_dir, "--cache-dir", given.cache_dir or folder / "cache", "--no-pictures"]

        def judge(title: str, checkpoints: list[Path], seconds: float) -> float:
            text = command("evaluate", *checkpoints, *where, "--test-csv", held, "--output-dir", folder / "judged")
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
            accuracies.append(judge(f"seed {seed}", checkpoints[-1:], seconds))
        if len(checkpoints) > 1:
            print(f"| mean | {np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f} | | | |")
            judge("their probabilities averaged", checkpoints, 0)


if __name__ == "__main__":
    main()
