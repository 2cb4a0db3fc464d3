"""Cross-validation: which folds are finished, the training of the others, and what they give together."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, first_line, warn
from pipeline.files import atomic_write
from pipeline.metrics import Predictions, score
from pipeline.resume import LAST_FILES, compare_fingerprints

MACHINE_SETTINGS = {"precision", "eval_batch_size", "compile"}  # may differ: folds may be trained on several machines


def find_finished(folder: Path, model_file: str, fingerprint: dict, val_rows: np.ndarray) -> dict | None:
    """Return run.json and val_probabilities.npz, or None of an unfinished fold. Raises DataError for other settings."""
    files = [folder / name for name in ("run.json", "val_probabilities.npz", model_file)]
    if any((folder / name).exists() for name in LAST_FILES[:2]) or not all(path.exists() for path in files):
        return None
    remedy = "train it again with --no-resume, or name another --output-dir"
    try:
        record, arrays = json.loads(files[0].read_text()), dict(np.load(files[1]))
        names = fingerprint["settings"].keys() - MACHINE_SETTINGS
        found = {**fingerprint, "settings": {name: record["config"].get(name) for name in names},
                 "classes": arrays["classes"].tolist(), "data": record["data_sha256"]}
        same_rows = np.array_equal(arrays["rows"], val_rows)
    except Exception as error:  # json, zipfile and numpy each raise their own types
        raise DataError(f"{folder}: the files of a finished fold cannot be read ({type(error).__name__}: "
                        f"{first_line(error)}); {remedy}") from None
    difference = compare_fingerprints(found, fingerprint) or ("" if same_rows else "probabilities of other rows")
    if difference:
        raise DataError(f"{folder}: holds a finished fold with {difference}; use its settings to keep it, {remedy}")
    return record | arrays


def find_all(wanted: list[int], find: Callable[[int], dict | None], tolerant: bool = False) -> dict[int, dict]:
    """Return the finished folds' records. If tolerant, warn of other settings: another job may train the fold again."""
    found = {}
    for fold in wanted:
        try:
            found[fold] = find(fold)
        except DataError as error:
            if not tolerant:
                raise
            warn(str(error))
    return {fold: record for fold, record in found.items() if record}


def run(wanted: list[int], finished: dict[int, dict], train_one: Callable[[int, float, float], float],
        started: float, seconds: float) -> None:
    """Train the wanted folds that are not finished, each with an equal part of the seconds that are left.

    `train_one(fold, begun, reserved)` returns the seconds since `begun`; `reserved` seconds are for other folds.
    """
    for fold, record in finished.items():
        print(f"fold {fold} is finished: validation accuracy {record['metrics']['val_accuracy']:.2%}")
    used = sum(record["seconds"] for record in finished.values())
    remaining = [fold for fold in wanted if fold not in finished]
    for place, fold in enumerate(remaining):
        begun = time.monotonic() if place else started  # the first pays for what was prepared for all
        used += train_one(fold, begun, seconds - (seconds - used) / (len(remaining) - place))


def check_order(paths: list[Path], folds: list[int | None]) -> None:
    """Raise DataError for the first checkpoint that is not of the fold whose folder it is in."""
    for fold, (path, found) in enumerate(zip(paths, folds)):
        if found != fold:
            raise DataError(f"{path}: is the network of fold {found}, not of fold {fold}; restore it, or train it "
                            f"again with --fold {fold} --no-resume")


def describe_missing(missing: list[int], folds: int) -> str:
    """Return which folds are not finished, and the command that trains them."""
    flags = ", ".join(f"--fold {fold}" for fold in missing)
    return (f"not finished yet: fold {', '.join(map(str, missing))} of {folds}; the same command with {flags} trains "
            f"{'each of them' if len(missing) > 1 else 'it'}, and the last to finish writes the submission of the mean")


def out_of_fold(records: list[dict], targets: np.ndarray, ink: Callable[[np.ndarray], np.ndarray]) -> Predictions:
    """Return the predictions of every row by the network that was not trained on it, in the table's order."""
    rows, probabilities = (np.concatenate([record[name] for record in records]) for name in ("rows", "probabilities"))
    order = np.argsort(rows)
    rows = rows[order]
    return Predictions(rows, targets[rows], probabilities[order], lambda places: ink(rows[places]))


def score_folds(predictions: Predictions, folds: np.ndarray) -> dict:
    """Return the figures of `score` over all rows, each fold's accuracy and their standard deviation (n - 1)."""
    accuracies = [float(predictions.correct[folds == fold].mean()) for fold in range(folds.max() + 1)]
    return {**score(predictions.probabilities, predictions.targets),
            "val_accuracy_deviation": float(np.std(accuracies, ddof=1)), "fold_accuracies": accuracies}


def describe_folds(metrics: dict) -> str:
    """Return one line with the figures of `score_folds`."""
    each = " ".join(f"{100 * accuracy:.2f}" for accuracy in metrics["fold_accuracies"])
    return (f"cross-validated accuracy {metrics['val_accuracy']:.2%} +- {100 * metrics['val_accuracy_deviation']:.2f} "
            f"({len(metrics['fold_accuracies'])} folds: {each}), top 3 {metrics['val_top3_accuracy']:.2%}, per class "
            f"{metrics['val_class_accuracy']:.2%}, loss {metrics['val_loss']:.4f} (on the rows that chose each fold's "
            "epoch)")


def save_validation(path: Path, predictions: Predictions, classes: list[str], **more: np.ndarray) -> None:
    """Save labelled rows' predictions: the arrays rows, targets, probabilities, classes and more of an .npz file."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, rows=predictions.rows, targets=predictions.targets, probabilities=predictions.probabilities,
                 classes=classes, **more)
