"""The files that a run writes, and the lines that it prints about its rows and its results."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.device import Runtime, peak_memory_gb, versions
from pipeline.ensemble import save_probabilities
from pipeline.files import atomic_write
from pipeline.images import ImageStatistics
from pipeline.resume import LAST_FILES
from pipeline.splits import Split
from pipeline.submission import fill_bad_rows, write_submission
from pipeline.tables import Table

TEST_PROBABILITIES = "test_probabilities.npz"
VALIDATION_FILES = {"val_probabilities.npz", "class_accuracy.csv", "class_accuracy.png", "confusions.png",
                    "predictions.png"}
EVALUATION_FILES = {f"evaluation_{name}" for name in VALIDATION_FILES if not name.endswith(".npz")}
TRAINING_FILES = {"history.csv", "class_distribution.png", "samples.png", "curves.png"}
# All files of a run beside its checkpoint and its submission, which the user names.
RESERVED_FILES = {*LAST_FILES, TEST_PROBABILITIES, *VALIDATION_FILES, *TRAINING_FILES, "oof_probabilities.npz",
                  "run.json"}


def check_file_names(**names: str) -> None:
    """Raise ValueError if two files of a run would have one name, or one of them a folder's."""
    for field, name in names.items():
        if not name or Path(name).name != name or name.lower() in RESERVED_FILES:
            raise ValueError(f"{field} must be a name without a folder that no other file of a run has, not {name!r}; "
                             "the folder is output_dir")
    if len({name.lower() for name in names.values()}) < len(names):
        raise ValueError(f"{' and '.join(names)} must be different, not both {next(iter(names.values()))!r}")


def describe_rows(split: Split, train_rows: int, test_rows: int, extra_rows: np.ndarray,
                  statistics: ImageStatistics) -> str:
    """Return a line about the rows of a run, one about its images, and one about extra rows, if there are any."""
    own = int((split.train_rows < train_rows).sum())
    text = (f"{own:,} rows to train on, {len(split.val_rows):,} to validate on, {test_rows:,} to predict\n"
            f"images: {statistics.described}, stored at {statistics.size} pixels")
    if len(extra_rows):
        used = len(split.train_rows) - own
        text += f"\n{used:,} extra rows to train on; {len(extra_rows) - used:,} left out: copies of validation images"
    return text


def write_answers(submission: Path, table: Table, probabilities: np.ndarray, classes: list[str],
                  networks: int | None) -> None:
    """Write the submission of a test table and, with a number of networks, the probabilities that are their mean."""
    fill_bad_rows(table, probabilities, classes)
    write_submission(submission, table, probabilities, classes)
    if networks:
        save_probabilities(submission.with_name(TEST_PROBABILITIES), table, probabilities, classes, networks)


def write_run_record(folder: Path, settings: dict, runtime: Runtime, metrics: dict, started: float,
                     data_sha256: str) -> None:
    """Write run.json: settings, versions, device, metrics, timing, memory and input digests."""
    record = {"config": settings, "versions": versions(), "device": runtime.describe(), "metrics": metrics,
              "seconds": round(time.monotonic() - started, 1), "peak_memory_gb": peak_memory_gb(),
              "data_sha256": data_sha256}
    with atomic_write(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_leftovers(folder: Path, written: set[str], pictures: bool) -> None:
    """Remove files of an earlier run that this one did not write. Networks and submissions stay."""
    for name in RESERVED_FILES.difference(LAST_FILES, {"run.json"}):
        if name not in written or (name.endswith(".png") and not pictures):
            (folder / name).unlink(missing_ok=True)


def describe_result(metrics: dict, history: pd.DataFrame, voted: bool) -> str:
    """Return the kept epoch with its metrics, after a line with the last one's and the network's without a vote."""
    text = f"kept epoch {metrics['epoch']} of {len(history)}"
    if "val_accuracy" not in metrics:
        return text
    kept = history.val_accuracy[history.epoch == metrics["epoch"]]  # empty after a kill between two writes
    alone = f"network alone {kept.iloc[0]:.2%}, " if voted and len(kept) else ""
    return (f"on the rows that chose the epoch: {alone}last epoch {history.val_accuracy.iloc[-1]:.2%}\n"
            f"{text}: validation accuracy {metrics['val_accuracy']:.2%}, top 3 {metrics['val_top3_accuracy']:.2%}, per "
            f"class {metrics['val_class_accuracy']:.2%}")


def describe_end(files: list[str], pictures: bool, folder: Path, started: float) -> str:
    """Return a line with the files that were written, and one with the time since `started` and the peak memory."""
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return (f"wrote {', '.join(files)}{' and pictures' if pictures else ''} in {folder.resolve()}\n"
            f"total time {minutes} min {seconds} s, peak memory {peak_memory_gb()} GB")
