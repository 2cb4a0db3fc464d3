"""Figures of predictions, by scikit-learn; sums over the steps of an epoch."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.distributed import Ranks


@dataclass(frozen=True, eq=False)
class Predictions:
    """Labelled rows with the probabilities that a network gives them."""

    rows: np.ndarray           # [N] positions in the table
    targets: np.ndarray        # [N] class numbers
    probabilities: np.ndarray  # [N, classes]
    ink: Callable[[np.ndarray], np.ndarray] | None = None  # places in N to images [n, S, S], uint8

    @property
    def predicted(self) -> np.ndarray:
        """The most likely class of each row [N]."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """True for each row that is predicted correctly [N]."""
        return self.predicted == self.targets


def score(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return cross-entropy, accuracy, top-3 accuracy and mean accuracy of the classes in `targets`, as fractions."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, top_k_accuracy_score

    classes, predicted = np.arange(probabilities.shape[1]), probabilities.argmax(axis=1)
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    with warnings.catch_warnings(action="ignore"):  # about predicted classes that no row has
        balanced = balanced_accuracy_score(targets, predicted)
    top3 = top_k_accuracy_score(targets, probabilities, k=3, labels=classes) if len(classes) > 3 else 1.0
    return {"val_loss": float(log_loss(targets, exact, labels=classes)),
            "val_accuracy": float(accuracy_score(targets, predicted)),
            "val_top3_accuracy": float(top3), "val_class_accuracy": float(balanced)}


def describe_score(figures: dict[str, float]) -> str:
    """Return the figures of `score` in one line."""
    return (f"loss {figures['val_loss']:.4f}, accuracy {figures['val_accuracy']:.2%}, top 3 "
            f"{figures['val_top3_accuracy']:.2%}, per class {figures['val_class_accuracy']:.2%}")


def class_accuracy_table(predictions: Predictions, classes: list[str]) -> pd.DataFrame:
    """Return for each class its number of images, its accuracy (NaN without images) and its most common mistake."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(predictions.targets, predictions.predicted, labels=range(len(classes)))
    counts, hits = matrix.sum(axis=1), matrix.diagonal().copy()
    np.fill_diagonal(matrix, 0)
    mistakes = [classes[guess] if count else "" for guess, count in zip(matrix.argmax(axis=1), matrix.max(axis=1))]
    with np.errstate(invalid="ignore"):
        return pd.DataFrame({"label": classes, "images": counts, "accuracy": hits / counts, "taken_for": mistakes})


def describe_class_accuracy(predictions: Predictions, classes: list[str]) -> str:
    """Return a line for each class that has images: its label, its accuracy and their number."""
    table = class_accuracy_table(predictions, classes).query("images > 0")
    return "\n".join(f"  {row.label:>6} {row.accuracy:8.2%} of {row.images:,}" for row in table.itertuples())


HISTORY_COLUMNS = ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_top3_accuracy",
                   "val_class_accuracy", "learning_rate", "seconds"]


def describe_epoch(row: dict, epochs: int, images_per_second: float, skipped: float = 0) -> str:
    """Return one line with an epoch's losses and accuracies, and the number of skipped steps, if there were any."""
    text = f"epoch {row['epoch']:>3}/{epochs}  train {row['train_loss']:.4f} {row['train_accuracy']:6.2%}"
    if "val_loss" in row:
        text += f"  val {row['val_loss']:.4f} {row['val_accuracy']:6.2%}"
    text += f"  {row['seconds']:.1f} s  {images_per_second:,.0f} images/s"
    return text + (f"  {skipped:.0f} steps skipped: not finite" if skipped else "")


def is_better(row: dict, best: dict | None, select_by: str) -> bool:
    """Return whether an epoch beats the best so far, by accuracy or by loss; without validation the last one does."""
    if best is None or "val_loss" not in row:
        return True
    if select_by == "loss":
        return row["val_loss"] < best["val_loss"]
    return (row["val_accuracy"], -row["val_loss"]) > (best["val_accuracy"], -best["val_loss"])


class MetricAccumulator:
    """Sums of loss, correct answers and images [3] over the steps of an epoch; this rank's part is on the device."""

    def __init__(self, sums: list[float], ranks: Ranks, device: torch.device):
        self.ranks, self.own = ranks, torch.tensor(sums if ranks.rank == 0 else [0.0] * 3, device=device)

    def add(self, step: Tensor) -> None:
        """Add the sums of a step."""
        self.own += step

    def sums(self) -> list[float]:
        """Return the sums over all ranks. Collective."""
        return self.ranks.all_reduce_sum(self.own.clone()).tolist()


def means(sums: list[float]) -> tuple[float, float]:
    """Return mean loss and accuracy of the sums of loss, correct answers and images."""
    loss, correct, images = sums
    return (loss / images, correct / images) if images else (float("nan"), float("nan"))
