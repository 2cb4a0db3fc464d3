"""The accuracy that is expected on test rows, from confidences alone."""

import numpy as np
import pytest

from pipeline import shift
from pipeline.metrics import Predictions


def draw(count: int, sureness: float, seed: int, smoothing: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities [count, 10] of a calibrated network, and targets; a surer one is more often right."""
    rng = np.random.default_rng(seed)
    logits = sureness * rng.normal(size=(count, 10))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = (probabilities.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1).clip(max=9)
    return probabilities * (1 - smoothing) + smoothing / 10, targets


def predictions(count: int, sureness: float, seed: int = 0, smoothing: float = 0.0) -> Predictions:
    probabilities, targets = draw(count, sureness, seed, smoothing)
    return Predictions(np.arange(count), targets, probabilities)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("count", [60, 500, 4000])
def test_rows_of_the_same_kind_are_not_called_shifted(capsys, count, smoothing):
    alarms, missed = 0, 0
    for seed in range(20):
        validation = predictions(2000, 8, seed, smoothing)
        probabilities, targets = draw(count, 8, 100 + seed, smoothing)
        figures = shift.expected_accuracy(validation, probabilities)
        accuracy = (probabilities.argmax(axis=1) == targets).mean()
        missed += abs(figures["expected_test_accuracy"] - accuracy) > figures["expected_test_accuracy_error"]
        shift.report_expected({**figures, "val_accuracy": validation.correct.mean()})
        alarms += "warning" in capsys.readouterr().err
    assert alarms <= 3 and missed <= 4


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_harder_rows_are_expected_to_be_right_less_often(capsys, smoothing):
    validation = predictions(4000, 12, 1, smoothing)
    for sureness in (6, 3):
        probabilities, targets = draw(4000, sureness, 2, smoothing)
        figures = shift.expected_accuracy(validation, probabilities)
        accuracy = (probabilities.argmax(axis=1) == targets).mean()
        assert accuracy < validation.correct.mean() - 0.05
        assert abs(figures["expected_test_accuracy"] - accuracy) < figures["expected_test_accuracy_error"]
        shift.report_expected({**figures, "val_accuracy": validation.correct.mean()})
        warning = capsys.readouterr().err
        assert "less sure of the test rows" in warning and "python -m tools.check" in warning


def test_smoothed_probabilities_are_made_as_sure_as_they_are_right():
    plain, smoothed = predictions(4000, 8, 3), predictions(4000, 8, 3, 0.3)
    assert shift.fit_temperature(smoothed.probabilities, smoothed.targets) < 0.8
    assert shift.fit_temperature(plain.probabilities, plain.targets) == pytest.approx(1, abs=0.1)


def test_small_and_faultless_sets_have_an_error():
    probabilities = np.eye(4)[[0, 1, 2, 3] * 5] * 0.9 + 0.025
    validation = Predictions(np.arange(20), np.arange(20) % 4, probabilities)
    figures = shift.expected_accuracy(validation, probabilities[:3])
    assert figures["expected_test_accuracy"] == pytest.approx(1) and figures["expected_test_accuracy_error"] > 0.05
    assert np.isfinite(shift.expected_accuracy(validation, np.eye(4)[:1])["expected_test_accuracy_error"])


def test_nothing_is_expected_without_rows():
    validation = predictions(50, 8)
    assert shift.expected_accuracy(validation, np.zeros((0, 10))) == {}
    assert shift.expected_accuracy(predictions(0, 8), validation.probabilities) == {}
    assert shift.mean_over_folds([{"metrics": {"val_accuracy": 0.9}}]) == {}


def test_the_line_has_the_figure_and_its_error(capsys):
    figures = {"expected_test_accuracy": 0.879, "expected_test_accuracy_error": 0.021, "val_accuracy": 0.89}
    shift.report_expected(figures)
    said = capsys.readouterr()
    assert said.out.startswith("expected accuracy on the test rows 87.90% +- 2.10, by the network's confidence")
    assert not said.err
    shift.report_expected({"val_accuracy": 0.9})
    assert capsys.readouterr() == ("", "")


def test_folds_expect_the_mean_of_what_each_expects():
    records = [{"metrics": dict(zip(shift.FIGURES, (value, 0.02)))} for value in (0.8, 0.9)]
    assert shift.mean_over_folds(records)["expected_test_accuracy"] == pytest.approx(0.85)
    assert shift.mean_over_folds([*records, {"metrics": {}}]) == {}
