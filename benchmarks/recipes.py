"""Compare recipes on validation rows of the training table, seed by seed, in one run.

    python -m benchmarks.recipes --data-dir COMPETITION --rows 20000 --num-epochs 8 --seeds 0 1 2 \\
        -- "" "--rotation 12" "--mixup"

Each candidate is a string of script.py's flags; "" is the default. Every seed trains all candidates, one after another,
on the same stratified part of the training rows (`--rows`; default: all), and scores the weights of the last epoch on
all validation rows: no row chooses the epoch. `--minutes` or `--num-epochs` limit every training. Prints a line for
each training, then a table: means over the seeds, with the standard deviation of several, and the difference from the
first candidate, seed by seed.
"""

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
from pipeline.clock import TimeLimit
from pipeline.device import start_runtime
from pipeline.errors import UsageError
from pipeline.signals import exit_status
from pipeline.splits import Split
from tools.common import make_parser


def prepare(flags: list[str]) -> tuple[script.Config, script.CompetitionData]:
    """Return the resolved config of some flags, and its data, without output."""
    config = script.parse_command_line(flags)[2]
    if config.schedule == "plateau" or config.early_stopping:
        raise UsageError(f"{shlex.join(flags)}: its epochs are not validated, which --schedule plateau and "
                         "--early-stopping need; leave them out")
    if config.train_val_split == 1:
        raise UsageError(f"{shlex.join(flags)}: no row is left to compare on; set --train-val-split below 1")
    runtime = start_runtime(config.device, config.precision, config.eval_batch_size)
    with contextlib.redirect_stdout(io.StringIO()):
        return script.prepare_data(config, runtime)


def train_once(flags: list[str], rows: int, seconds: float) -> dict[str, float]:
    """Train once. Return the metrics of the last epoch, its training accuracy and the seconds."""
    config, data = prepare(flags)
    train_rows = data.split.train_rows
    if rows and rows < len(train_rows):
        part, _ = train_test_split(train_rows, train_size=rows, random_state=0,
                                   stratify=data.dataset.targets[train_rows])
        train_rows = np.sort(part)
    # Validated once, at the end.
    without_validation = dataclasses.replace(data, split=Split(train_rows, data.split.val_rows[:0]))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        history, _ = script.fit(dataclasses.replace(config, output_dir=folder), without_validation, TimeLimit(seconds))
        seconds = time.monotonic() - started
        trained = script.load_checkpoint(Path(folder, config.model_file))
    rows, model = data.split.val_rows, data.dataset.runtime.to_device(trained.model)
    figures = script.score(script.predict(model, data.dataset, rows), data.dataset.targets[rows])
    return {**history.iloc[-1], **figures, "seconds": seconds}


def describe(results: pd.DataFrame) -> str:
    """Return a Markdown table of all candidates, accuracies in percent."""
    def spread(values: pd.Series, digits: int, factor: float = 100) -> str:
        text = f"{factor * values.mean():.{digits}f}"
        return text + (f" ± {factor * values.std():.{digits}f}" if len(values) > 1 else "")

    first = results[results.candidate == results.candidate.iloc[0]].set_index("seed").val_accuracy
    lines = ["| flags | seeds | accuracy | to the first | top 3 | per class | loss | training accuracy | seconds |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for candidate, group in results.groupby("candidate", sort=False):
        difference = group.set_index("seed").val_accuracy - first
        cells = [f"`{candidate}`" if candidate else "(defaults)", str(len(group)), spread(group.val_accuracy, 2),
                 spread(difference, 2), spread(group.val_top3_accuracy, 2), spread(group.val_class_accuracy, 2),
                 spread(group.val_loss, 4, 1), spread(group.train_accuracy, 1), f"{group.seconds.mean():.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train all candidates and print the table."""
    parser = make_parser("benchmarks.recipes", __doc__, "data_dir", "cache_dir")
    parser.add_argument("candidates", nargs="+", help='flags of script.py in one string each, "" for its defaults')
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--rows", type=int, default=0, help="train on this many rows (0: all)")
    parser.add_argument("--num-epochs", type=int, default=0,
                        help="for every candidate that does not name its own (0: auto)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    common = ["--data-dir", given.data_dir, "--model", given.model]
    common += ["--cache-dir", given.cache_dir] if given.cache_dir else []
    common += ["--num-epochs", str(given.num_epochs)] if given.num_epochs else []
    results = []
    for candidate in given.candidates:  # so that mistakes in the last one are reported before the first is trained
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
    sys.exit(exit_status(lambda _: main(), "the table is not complete"))
