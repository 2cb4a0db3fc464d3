"""Pictures of few classes and of many. A picture is tested by the colours that it must contain."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline import plots
from pipeline.metrics import Predictions, class_accuracy_table

BLUE, RED, GREEN = (0x44, 0x77, 0xaa), (0xcc, 0x33, 0x11), (0x22, 0x88, 0x33)
LIGHT_RED = (0xee, 0x66, 0x77)


def make_predictions(classes: int, rows: int = 200, accuracy: float = 0.8) -> Predictions:
    """Return predictions of which a share is correct; the others name the next class."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, rows)
    predicted = np.where(rng.random(rows) < accuracy, targets, (targets + 1) % classes)
    images = rng.integers(0, 256, (rows, 8, 8), dtype=np.uint8)
    probabilities = np.full((rows, classes), 0.4 / classes)
    probabilities[np.arange(rows), predicted] += 0.6
    return Predictions(np.arange(rows), targets, probabilities, lambda places: images[places])


def numbers(classes: int) -> list[str]:
    return [str(number) for number in range(classes)]


def share(path: Path, colour: tuple[int, int, int]) -> float:
    """Return the share of a picture's pixels that have a colour."""
    return float((np.asarray(Image.open(path).convert("RGB")) == colour).all(axis=2).mean())


def test_classes_are_named_by_latex_that_can_be_drawn():
    names = plots.class_names(["31", "82", "5", "$x"], {"31": "A", "82": r"\alpha", "5": r"\mathds{1}"})
    assert names == ["$A$", r"$\alpha$", "5", r"\$x"]


@pytest.mark.parametrize("classes", [2, 44, 369])
def test_the_class_distribution_is_drawn(tmp_path, classes):
    path, names = tmp_path / "class_distribution.png", numbers(classes)
    names[1] = r"$\pi$"
    plots.plot_class_distribution(path, np.repeat(np.arange(classes), np.arange(classes) % 40 + 1), names)
    assert Image.open(path).height > 400 and share(path, BLUE) > 0.02  # bars


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_a_small_confusion_matrix_is_drawn_whole(tmp_path, classes):
    plots.plot_confusions(tmp_path / "a.png", make_predictions(classes), numbers(classes))
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 40 * classes
    plots.plot_confusions(tmp_path / "b.png", make_predictions(classes, accuracy=1), numbers(classes))
    mixed, correct = (share(tmp_path / name, (0xf7, 0xfb, 0xff)) for name in ("a.png", "b.png"))
    assert mixed < correct  # the lightest cells are those without images
    assert correct > 0.2 * (1 - 1 / classes)


def test_of_many_classes_the_most_confused_pairs_are_drawn(tmp_path):
    names = [f"$x_{{{number}}}$" for number in range(369)]
    plots.plot_confusions(tmp_path / "a.png", make_predictions(369), names)
    assert share(tmp_path / "a.png", RED) > 1e-3 and share(tmp_path / "a.png", BLUE) > 1e-4
    plots.plot_confusions(tmp_path / "b.png", make_predictions(369, accuracy=1), names)
    assert share(tmp_path / "b.png", RED) == 0


@pytest.mark.parametrize("classes", [2, 10, 369])
def test_the_accuracy_by_class_is_drawn(tmp_path, classes):
    table = class_accuracy_table(make_predictions(classes), numbers(classes))
    plots.plot_class_accuracy(tmp_path / "a.png", table, numbers(classes))
    assert share(tmp_path / "a.png", BLUE) > 0.01 and share(tmp_path / "a.png", LIGHT_RED) > 0.01


def test_classes_without_a_mistake_are_called_so(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda _, figure: figures.append(figure))
    targets = np.arange(100) % 50
    perfect = Predictions(np.arange(100), targets, np.eye(50, dtype=np.float32)[targets])
    plots.plot_class_accuracy(tmp_path / "a.png", class_accuracy_table(perfect, numbers(50)), numbers(50))
    assert figures[0].axes[1].get_title() == "40 of 50 classes, none with a mistake"


@pytest.mark.parametrize("pictures", [True, False])
def test_the_accuracy_by_class_is_written_with_and_without_pictures(tmp_path, pictures):
    predictions = make_predictions(10)
    plots.write_class_accuracy(tmp_path, "evaluation_", predictions, numbers(10), {"3": r"\pi"}, pictures)
    table = pd.read_csv(tmp_path / "evaluation_class_accuracy.csv", dtype={"label": str})
    assert table.label.tolist() == numbers(10) and table.images.tolist() == np.bincount(predictions.targets).tolist()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == ({"evaluation_class_accuracy.png", "evaluation_confusions.png", "evaluation_predictions.png"}
                     if pictures else set())


def test_frames_are_green_for_correct_predictions_and_red_for_wrong_ones(tmp_path):
    names = list("abcdefghij")
    for accuracy, absent, present in ((1, RED, GREEN), (0, GREEN, RED)):
        plots.plot_predictions(tmp_path / "a.png", make_predictions(10, accuracy=accuracy), names)
        assert share(tmp_path / "a.png", absent) == 0 and share(tmp_path / "a.png", present) > 1e-3


@pytest.mark.parametrize("validated", [True, False])
def test_curves_are_drawn_with_and_without_validation(tmp_path, validated):
    epochs = np.arange(1, 6)
    history = pd.DataFrame({"epoch": epochs, "train_loss": 1 / epochs, "train_accuracy": 1 - 0.5 / epochs,
                            "val_loss": 1.1 / epochs, "val_accuracy": 1 - 0.6 / epochs, "learning_rate": 1e-3 / epochs})
    if not validated:
        history[["val_loss", "val_accuracy"]] = np.nan
    plots.plot_curves(tmp_path / "a.png", history, kept=4)
    assert share(tmp_path / "a.png", BLUE) > 1e-3
    assert (share(tmp_path / "a.png", LIGHT_RED) > 1e-3) == validated


def drawn_samples(path: Path, rows: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
    """Draw samples and return their class numbers, in the order in which they are drawn."""
    chosen = []

    def ink(places: np.ndarray) -> np.ndarray:
        chosen.append(places)
        return np.zeros((len(places), 8, 8), dtype=np.uint8)

    plots.plot_samples(path, rows, targets, numbers(classes), ink)
    assert path.exists() and np.isin(chosen[0], rows).all() and len(set(chosen[0].tolist())) == len(chosen[0])
    return targets[chosen[0]]


@pytest.mark.parametrize("classes", [2, 10, 369])
def test_samples_are_of_every_class_or_of_sixty(tmp_path, classes):
    targets = np.arange(800) % classes
    shown = drawn_samples(tmp_path / "a.png", np.arange(800), targets, classes)
    assert len(shown) == 60 and len(set(shown.tolist())) == min(classes, 60)
    assert (np.diff(shown) >= 0).all() and shown[0] == 0 and shown[-1] == classes - 1


def test_samples_of_a_rare_class_are_not_filled_up_with_the_next_one(tmp_path):
    rows = np.r_[0:8:2, 1:800:2]
    shown = drawn_samples(tmp_path / "a.png", rows, np.arange(800) % 2, 2)
    assert np.bincount(shown).tolist() == [4, 30]


def test_evenly_spaced_includes_both_ends():
    assert plots.evenly_spaced(5, 60).tolist() == [0, 1, 2, 3, 4]
    assert plots.evenly_spaced(101, 5).tolist() == [0, 25, 50, 75, 100]
