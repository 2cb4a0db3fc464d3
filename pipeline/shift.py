"""The accuracy to be expected on test rows, which may be of another kind than validation rows, without their labels."""

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.errors import warn
from pipeline.metrics import Predictions

FIGURES = ("expected_test_accuracy", "expected_test_accuracy_error")
# Measured by benchmarks/shift.py: how far the estimate is wrong, as a share of the drop that it says.
SHARE_OF_DROP = 0.5
BLOCK = 10_000  # rows at a time, which bounds the memory
SURE = 1.64  # standard errors on either side that hold nine of ten cases


def fit_temperature(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature by which rows' probabilities [N, classes] fit their targets best (arXiv:1706.04599).

    Networks trained with label smoothing, averaged or with a vote are not as sure as they are right. A prior around
    0.7 keeps small sets, which may have no mistake, from the extremes.
    """
    from scipy.optimize import minimize_scalar

    logits, classes = temper(probabilities, 1).log(), torch.from_numpy(targets).long()

    def loss(log_temperature: float) -> float:
        own = F.cross_entropy(logits / np.exp(log_temperature), classes, reduction="sum")
        return float(own) + (log_temperature - np.log(0.7)) ** 2 / (2 * 0.3**2)

    return float(np.exp(minimize_scalar(loss, bounds=(-2.5, 1.5), method="bounded", options={"xatol": 0.01}).x))


def temper(probabilities: np.ndarray, temperature: float) -> torch.Tensor:
    """Return probabilities [N, classes], float64, at a temperature: below 1 they are surer."""
    return (torch.from_numpy(probabilities).double().clamp(min=1e-7).log() / temperature).softmax(dim=1)


def mean_margin(probabilities: np.ndarray, temperature: float) -> float:
    """Return by how much the most likely class is ahead of the second at a temperature, on average over rows."""
    total = 0.0
    for first in range(0, len(probabilities), BLOCK):
        highest = temper(probabilities[first : first + BLOCK], temperature).topk(2).values
        total += float((highest[:, 0] - highest[:, 1]).sum())
    return total / len(probabilities)


def expected_accuracy(validation: Predictions, test_probabilities: np.ndarray) -> dict[str, float]:
    """Return `expected_test_accuracy` with an error that nine of ten cases lie within, as fractions; {} without rows.

    The validation accuracy less the difference of the mean margins, at the temperature that suits the validation rows:
    the difference of confidence of arXiv:2107.03315, by margins, which suit rows by other writers better.
    """
    count, test_count = len(validation.targets), len(test_probabilities)
    if not count or not test_count or test_probabilities.shape[1] < 2:
        return {}
    temperature = fit_temperature(validation.probabilities, validation.targets)
    margins = [mean_margin(rows, temperature) for rows in (validation.probabilities, test_probabilities)]
    accuracy = float(validation.correct.mean())
    expected = float(np.clip(accuracy - margins[0] + margins[1], 0, 1))
    smoothed = (np.array([accuracy * count, expected * test_count]) + 1) / (np.array([count, test_count]) + 2)
    sampling = (smoothed * (1 - smoothed) / [count, test_count]).sum()
    error = np.sqrt(SURE**2 * sampling + (SHARE_OF_DROP * (accuracy - expected)) ** 2)
    return dict(zip(FIGURES, (expected, float(error))))


def mean_over_folds(records: list[dict]) -> dict[str, float]:
    """Return the mean of what folds' run.json expect on the test rows, and of its error; empty without a test table."""
    metrics = [record["metrics"] for record in records]
    known = all(name in own for own in metrics for name in FIGURES)
    return {name: float(np.mean([own[name] for own in metrics])) for name in FIGURES} if known else {}


def report_expected(metrics: dict[str, float]) -> None:
    """Print the accuracy that is expected on the test rows, if known; warn if the validation rows' is another."""
    if not all(name in metrics for name in FIGURES):
        return
    expected, error = (metrics[name] for name in FIGURES)
    print(f"expected accuracy on the test rows {expected:.2%} +- {100 * error:.2f}, by the network's confidence")
    if abs(drop := metrics["val_accuracy"] - expected) > error:
        warn(f"the network is {'less' if drop > 0 else 'more'} sure of the test rows than of the validation rows; they "
             "may be of another kind: python -m tools.check draws the test images that differ most; --group-column "
             "keeps rows of one writer or source on one side of the split")
