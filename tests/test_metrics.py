"""pipeline/metrics.py: figures of predictions, and sums over the steps of an epoch."""

import warnings

import numpy as np
import pytest
import torch

from pipeline.distributed import Ranks
from pipeline.metrics import (
    HISTORY_COLUMNS,
    MetricAccumulator,
    Predictions,
    class_accuracy_table,
    describe_epoch,
    describe_score,
    is_better,
    means,
    score,
)


def test_score_of_four_rows():
    probabilities = np.array([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.1, 0.9, 0.0], [0.7, 0.3, 0.0]])
    figures = score(probabilities, np.array([0, 0, 1, 1]))
    assert figures["val_loss"] == pytest.approx(-np.log([0.8, 0.6, 0.9, 0.3]).mean())
    assert figures["val_accuracy"] == 0.75 and figures["val_class_accuracy"] == 0.75
    assert figures["val_top3_accuracy"] == 1
    assert all(type(value) is float for value in figures.values())
    uneven = score(probabilities, np.array([0, 0, 0, 1]))
    assert uneven["val_accuracy"] == 0.5 and uneven["val_class_accuracy"] == pytest.approx(1 / 3)


def test_top_3_counts_the_three_most_likely_classes():
    probabilities = np.array([[0.4, 0.3, 0.2, 0.1]] * 4)
    assert score(probabilities, np.array([0, 1, 2, 3]))["val_top3_accuracy"] == 0.75
    assert score(probabilities, np.array([3, 3, 3, 3]))["val_top3_accuracy"] == 0


def test_equal_probabilities_do_not_raise_top_3():
    """Of probabilities that are equal, three classes at most count as the most likely."""
    certain = np.zeros((5, 5), dtype=np.float32)
    certain[:, 0] = 1
    assert score(certain, np.arange(5))["val_top3_accuracy"] == pytest.approx(3 / 5)


def test_a_certain_mistake_has_a_finite_loss():
    figures = score(np.array([[1.0, 0.0], [1.0, 0.0]], dtype=np.float32), np.array([0, 1]))
    assert np.isfinite(figures["val_loss"]) and figures["val_loss"] > 5


def test_float32_sums_that_are_not_exactly_one_are_not_warned_of():
    probabilities = np.random.default_rng(0).random((200, 300), dtype=np.float32)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    with warnings.catch_warnings(action="error"):
        figures = score(probabilities, np.arange(200))
    assert figures["val_loss"] == pytest.approx(-np.log(probabilities[np.arange(200), np.arange(200)]).mean(), rel=1e-5)


def test_class_accuracy_table_names_the_most_common_mistake():
    predicted = np.array([0, 1, 1, 1, 0, 3])
    targets = np.array([0, 0, 0, 1, 1, 3])
    predictions = Predictions(np.arange(6), targets, np.eye(4)[predicted])
    assert predictions.correct.tolist() == [True, False, False, True, False, True]
    table = class_accuracy_table(predictions, ["a", "b", "c", "d"])
    assert table.label.tolist() == ["a", "b", "c", "d"] and table.images.tolist() == [3, 2, 0, 1]
    assert table.accuracy.tolist() == pytest.approx([1 / 3, 1 / 2, np.nan, 1], nan_ok=True)
    assert table.taken_for.tolist() == ["b", "a", "", ""]


def test_is_better_breaks_ties_of_accuracy_by_loss():
    def row(accuracy: float, loss: float) -> dict:
        return {"epoch": 1, "val_accuracy": accuracy, "val_loss": loss}

    assert is_better(row(0.1, 9.0), None, "accuracy")
    assert is_better(row(0.6, 2.0), row(0.5, 1.0), "accuracy") and not is_better(row(0.6, 2.0), row(0.5, 1.0), "loss")
    assert is_better(row(0.5, 0.9), row(0.5, 1.0), "accuracy")
    assert not is_better(row(0.5, 1.0), row(0.5, 1.0), "accuracy")
    assert is_better({"epoch": 2}, {"epoch": 1}, "accuracy"), "without validation rows the last epoch is kept"


def test_epoch_line_holds_losses_accuracies_and_pace():
    row = {"epoch": 3, "train_loss": 1.25, "train_accuracy": 0.5, "val_loss": 0.75, "val_accuracy": 0.625,
           "val_top3_accuracy": 0.875, "val_class_accuracy": 0.375, "learning_rate": 3e-3, "seconds": 4.5}
    assert list(row) == HISTORY_COLUMNS
    assert " ".join(describe_epoch(row, 20, 1234.5).split()) == (
        "epoch 3/20 train 1.2500 50.00% val 0.7500 62.50% 4.5 s 1,234 images/s")
    assert "val" not in describe_epoch({name: row[name] for name in row if not name.startswith("val")}, 20, 1.0)
    assert describe_score(row) == "loss 0.7500, accuracy 62.50%, top 3 87.50%, per class 37.50%"


def test_accumulator_continues_from_earlier_sums():
    totals = MetricAccumulator([10.0, 2.0, 8.0], Ranks(), torch.device("cpu"))
    totals.add(torch.tensor([2.0, 4.0, 4.0]))
    assert totals.sums() == [12, 6, 12] and means(totals.own.tolist()) == (1.0, 0.5)
    totals.add(torch.tensor([12.0, 0.0, 12.0]))
    assert totals.sums() == [24, 6, 24] and means(totals.sums()) == (1.0, 0.25)


def test_earlier_sums_are_those_of_rank_0():
    first, second = (MetricAccumulator([10.0, 5.0, 10.0], Ranks(rank, 2), torch.device("cpu")) for rank in (0, 1))
    assert first.own.tolist() == [10, 5, 10] and second.own.tolist() == [0, 0, 0]


def test_means_of_no_images_are_not_numbers():
    assert np.isnan(means([0.0, 0.0, 0.0])).all()
