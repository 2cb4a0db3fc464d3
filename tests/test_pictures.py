"""Room 10: what is drawn, from a few classes to many. A picture is judged by the colours that it must hold."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import script
from script import Config, ImageStatistics, Judged, MathSymbolDataset

CPU = script.start_runtime(Config(device="cpu", precision="float32"))
BLUE, RED, GREEN = (0x44, 0x77, 0xaa), (0xcc, 0x33, 0x11), (0x22, 0x88, 0x33)


def judged(classes: int, rows: int = 200, accuracy: float = 0.8) -> Judged:
    """Rows of which a share is right, and what is wrong is taken for the next class."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, rows)
    predicted = np.where(rng.random(rows) < accuracy, targets, (targets + 1) % classes)
    images = rng.integers(0, 256, (rows, 1, 8, 8), dtype=np.uint8)
    probabilities = np.full((rows, classes), 0.4 / classes)
    probabilities[np.arange(rows), predicted] += 0.6
    return Judged(MathSymbolDataset(images, None, CPU), np.arange(rows), targets, probabilities)


def share(path: Path, colour: tuple[int, int, int]) -> float:
    """Which part of a picture has a colour."""
    return float((np.asarray(Image.open(path).convert("RGB")) == colour).all(axis=2).mean())


def test_pictures_show_symbols_where_they_can_be_drawn():
    texts = script.symbol_texts(["31", "82", "5", "$x"], {"31": "A", "82": r"\alpha", "5": r"\mathds{1}"})
    assert texts == ["$A$", r"$\alpha$", "5", r"\$x"]


@pytest.mark.parametrize("classes", [2, 44, 369])
def test_the_class_distribution_is_drawn(tmp_path, classes):
    path, labels = tmp_path / "class_distribution.png", [str(number) for number in range(classes)]
    targets = np.repeat(np.arange(classes), np.arange(classes) % 40 + 1)
    script.plot_class_distribution(path, labels, targets, {"1": r"\pi"})
    assert Image.open(path).height > 400 and share(path, BLUE) > 0.02  # bars


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_a_small_confusion_matrix_is_shown_whole(tmp_path, classes):
    script.plot_confusions(tmp_path / "a.png", judged(classes), [str(number) for number in range(classes)])
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 40 * classes
    script.plot_confusions(tmp_path / "b.png", judged(classes, accuracy=1), [str(number) for number in range(classes)])
    mixed, right = (share(tmp_path / name, (0x08, 0x30, 0x6b)) for name in ("a.png", "b.png"))
    assert mixed < right / 2 and right > 0.1 / classes  # the darkest blue is that of classes that are all right


def test_of_many_classes_the_most_confused_pairs_are_drawn(tmp_path):
    names = [f"$x_{{{number}}}$" for number in range(369)]
    script.plot_confusions(tmp_path / "a.png", judged(369), names)
    assert share(tmp_path / "a.png", RED) > 1e-3 and share(tmp_path / "a.png", BLUE) > 1e-4
    script.plot_confusions(tmp_path / "b.png", judged(369, accuracy=1), names)
    assert share(tmp_path / "b.png", RED) == 0


@pytest.mark.parametrize("classes", [2, 10, 369])
def test_the_accuracy_by_class_is_drawn(tmp_path, classes):
    labels = [str(number) for number in range(classes)]
    table = script.class_table(judged(classes), labels)
    script.plot_class_accuracy(tmp_path / "a.png", table, labels)
    assert share(tmp_path / "a.png", BLUE) > 0.01 and share(tmp_path / "a.png", (0xee, 0x66, 0x77)) > 0.01


def test_the_class_table_by_hand():
    probabilities = np.eye(4)[[0, 1, 1, 2, 1]]
    what = Judged(None, np.arange(5), np.array([0, 0, 0, 2, 2]), probabilities)
    table = script.class_table(what, list("abcd"))
    assert table.images.tolist() == [3, 0, 2, 0] and table.accuracy.iloc[[0, 2]].tolist() == [1 / 3, 1 / 2]
    assert table.accuracy.isna().tolist() == [False, True, False, True]
    assert table.taken_for.tolist() == ["b", "", "b", ""]


def test_frames_are_green_where_the_network_is_right_and_red_where_not(tmp_path):
    names = list("abcdefghij")
    for accuracy, absent, present in ((1, RED, GREEN), (0, GREEN, RED)):
        script.plot_predictions(tmp_path / "a.png", judged(10, accuracy=accuracy), names)
        assert share(tmp_path / "a.png", absent) == 0 and share(tmp_path / "a.png", present) > 1e-3


@pytest.mark.parametrize("validated", [True, False])
def test_curves_are_drawn_with_and_without_validation(tmp_path, validated):
    epochs = np.arange(1, 6)
    history = pd.DataFrame({"epoch": epochs, "train_loss": 1 / epochs, "train_accuracy": 1 - 0.5 / epochs,
                            "val_loss": 1.1 / epochs, "val_accuracy": 1 - 0.6 / epochs, "learning_rate": 1e-3 / epochs})
    if not validated:
        history[["val_loss", "val_accuracy"]] = np.nan
    script.plot_curves(tmp_path / "a.png", history, kept=4)
    assert share(tmp_path / "a.png", BLUE) > 1e-3
    assert (share(tmp_path / "a.png", (0xee, 0x66, 0x77)) > 1e-3) == validated


@pytest.mark.parametrize("classes", [2, 10, 369])
def test_samples_show_every_class_or_sixty(tmp_path, classes, monkeypatch):
    shown = []
    monkeypatch.setattr(script, "plot_images", lambda path, title, images, texts: shown.extend(texts))
    targets = np.arange(800) % classes
    images = MathSymbolDataset(np.zeros((800, 1, 8, 8), dtype=np.uint8), targets, CPU)
    labels = [str(number) for number in range(classes)]
    data = script.TrainingData(images, targets, labels, ImageStatistics(255, 8), np.arange(800), np.arange(0))
    script.plot_samples(tmp_path / "a.png", data, {})
    if classes == 2:  # a rare class is not filled up with the next one's images
        rare = dataclasses.replace(data, train_rows=np.r_[0:8:2, 1:800:2])
        script.plot_samples(tmp_path / "a.png", rare, {})
        assert shown[60:].count("0") == 4 and shown[60:].count("1") == 30
        del shown[60:]
    assert len(shown) == 60 and len(set(shown)) == min(classes, 60) and shown[0] == "0" and shown[-1] == labels[-1]
