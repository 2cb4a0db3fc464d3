"""Compare recipes on validation rows of the real training table, seed by seed, in one run.

    python -m benchmarks.recipes --data-dir COMPETITION --rows 20000 --num-epochs 8 --seeds 0 1 2 \\
        -- "" "--rotation 12" "--mixup"

Each candidate is a text of script.py's flags; "" is the default. Every seed trains all candidates, one after another,
on the same stratified part of the training rows (`--rows`; all where it is left out), and is scored by the weights of
its last epoch on all validation rows: no row chooses the epoch. With `--minutes` every training lasts so long, with
`--num-epochs` it sees so many images. Prints a line for each training, then a table: means over the seeds, with the
standard deviation where there are several, and the difference from the first candidate, seed by seed.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import shlex
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

import script


def prepare(flags: list[str]) -> tuple[script.Config, script.TrainingData, script.Runtime]:
    """The complete config of some flags, and its data; quietly."""
    config = script.parse_command_line(flags)[2]
    if config.schedule == "plateau" or config.early_stopping:
        raise script.UsageError(f"{shlex.join(flags)}: its epochs are not validated, which --schedule plateau and "
                                "--early-stopping need")
    if config.train_val_split == 1:
        raise script.UsageError(f"{shlex.join(flags)}: no row is left to be compared on")
    runtime = script.start_runtime(config)
    with contextlib.redirect_stdout(io.StringIO()):
        config, data, *_ = script.prepare_data(config, runtime)
    return config, data, runtime


def train_once(flags: list[str], rows: int, seconds: float) -> dict[str, float]:
    """Validation figures of the last epoch of one training, with its seconds and its last training accuracy."""
    config, data, runtime = prepare(flags)
    if rows and rows < len(data.train_rows):
        part, _ = train_test_split(data.train_rows, train_size=rows, random_state=0,
                                   stratify=data.targets[data.train_rows])
        data = dataclasses.replace(data, train_rows=np.sort(part))
    blind = dataclasses.replace(data, val_rows=data.val_rows[:0])  # validated once, at the end
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        history = script.fit(dataclasses.replace(config, output_dir=folder), blind, runtime, seconds)
        seconds = time.monotonic() - started
        trained = script.load_checkpoint(Path(folder, config.model_file))
    figures = script.validate(runtime.place(trained.model), data, config, runtime)
    return {**history.iloc[-1], **figures, "seconds": seconds}


def describe(results: pd.DataFrame) -> str:
    """The table of all candidates as Markdown, accuracies in percent."""
    def spread(values: pd.Series, digits: int, factor: float = 100) -> str:
        text = f"{factor * values.mean():.{digits}f}"
        return text + (f" ± {factor * values.std():.{digits}f}" if len(values) > 1 else "")

    first = results[results.candidate == results.candidate.iloc[0]].set_index("seed").val_accuracy
    lines = ["| flags | seeds | accuracy | to the first | top 3 | per class | loss | training rows | seconds |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for candidate, group in results.groupby("candidate", sort=False):
        difference = group.set_index("seed").val_accuracy - first
        cells = [f"`{candidate}`" if candidate else "(defaults)", str(len(group)), spread(group.val_accuracy, 2),
                 spread(difference, 2), spread(group.val_top3_accuracy, 2), spread(group.val_class_accuracy, 2),
                 spread(group.val_loss, 4, 1), spread(group.train_accuracy, 1), f"{group.seconds.mean():.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", help='flags of script.py in one text each, "" for its defaults')
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--cache-dir", default="")
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--rows", type=int, default=0, help="train on so many rows only")
    parser.add_argument("--num-epochs", type=int, default=0, help="of every candidate that does not name its own")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    common = ["--data-dir", given.data_dir, "--model", given.model]
    common += ["--cache-dir", given.cache_dir] if given.cache_dir else []
    common += ["--num-epochs", str(given.num_epochs)] if given.num_epochs else []
    results = []
    for candidate in given.candidates:  # what is wrong with the last one is said before the first is trained
        prepare([*common, *shlex.split(candidate)])
    for seed in given.seeds:
        for candidate in given.candidates:
            flags = [*common, "--seed", str(seed), *shlex.split(candidate)]
            results.append({"candidate": candidate, "seed": seed, **train_once(flags, given.rows, 60 * given.minutes)})
            row = types.SimpleNamespace(**results[-1])
            print(f"seed {seed}  accuracy {row.val_accuracy:.2%}  top 3 {row.val_top3_accuracy:.2%}  per class "
                  f"{row.val_class_accuracy:.2%}  loss {row.val_loss:.4f}  epochs {row.epoch:.0f}  {row.seconds:.0f} s"
                  f"  {candidate or '(defaults)'}", flush=True)
    print(describe(pd.DataFrame(results)))


if __name__ == "__main__":
    sys.exit(script.exit_status(lambda _: main(), "the table is not whole"))
