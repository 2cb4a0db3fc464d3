"""Every picture, from arrays. matplotlib is imported when the first one is drawn."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.files import atomic_write
from pipeline.metrics import Predictions, class_accuracy_table

LARGEST_MATRIX = 30  # classes up to which the whole confusion matrix is drawn
BLUE, RED, GREEN, WRONG, GREY = "#4477aa", "#ee6677", "#228833", "#cc3311", "#cccccc"


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1):
    """Return a figure of this size in inches and its axes, without a window or pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(path: Path, figure) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def class_names(classes: list[str], latex: dict[str, str]) -> list[str]:
    """Return the name of each class in a picture: its LaTeX if matplotlib can draw it, else its label."""
    return [f"${latex[label]}$" if label in latex and _can_draw(latex[label]) else label.replace("$", r"\$")
            for label in classes]


@functools.cache
def _can_draw(latex: str) -> bool:
    from matplotlib.mathtext import MathTextParser

    try:
        return bool(MathTextParser("path").parse(f"${latex}$"))
    except ValueError:  # commands that mathtext does not know
        return False


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Return up to `most` of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _label_bars(axes, names: list[str], places: np.ndarray | None = None) -> None:
    """Write names below bars, long ones vertically."""
    axes.set_xticks(range(len(names)) if places is None else places, names, fontsize=9)
    for tick, name in zip(axes.get_xticklabels(), names):
        tick.set_rotation(90 if len(name) > 2 and not name.startswith("$") else 0)


def plot_images(path: Path, title: str, images: np.ndarray, texts: list[str], colours: list[str] | None = None,
                columns: int = 10) -> None:
    """Draw a grid of images [N, S, S], ink on white, each with a text below it and a frame of its colour."""
    rows = math.ceil(len(images) / columns)
    figure, axes = new_figure(1.2 * columns, 1.5 * rows + 0.5)
    for number, (image, text, colour) in enumerate(zip(images, texts, colours or [GREY] * len(texts))):
        left, top = 1.2 * (number % columns), 1.5 * (number // columns)
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, extent=(left, left + 1, top + 1, top))
        axes.plot([left, left + 1, left + 1, left, left], [top, top, top + 1, top + 1, top], color=colour, linewidth=2)
        axes.text(left + 0.5, top + 1.07, text, ha="center", va="top", fontsize=9)
    axes.set(xlim=(-0.1, 1.2 * columns - 0.1), ylim=(1.5 * rows, -0.1), title=title, aspect="equal")
    axes.axis("off")
    save_figure(path, figure)


def plot_samples(path: Path, rows: np.ndarray, targets: np.ndarray, names: list[str],
                 ink: Callable[[np.ndarray], np.ndarray], count: int = 60) -> None:
    """Draw about `count` of the rows, equally many of each class. `targets` are of all rows; `ink` returns images."""
    present = np.unique(targets[rows])
    shown = present[evenly_spaced(len(present), count)]
    chosen = np.concatenate([rows[targets[rows] == number][:count // len(shown)] for number in shown])
    plot_images(path, f"Training images of {len(shown)} of {len(names)} classes", ink(chosen),
                [names[number] for number in targets[chosen]])


def plot_predictions(path: Path, predictions: Predictions, names: list[str], count: int = 60) -> None:
    """Draw random images with their prediction and its probability: green frames are correct, red ones wrong."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(predictions.targets))[:count])
    correct, predicted = predictions.correct[chosen], predictions.predicted[chosen]
    texts = [f"{names[guess]} {predictions.probabilities[row].max():.0%}"
             + ("" if right else f", not {names[predictions.targets[row]]}")
             for row, guess, right in zip(chosen, predicted, correct)]
    plot_images(path, f"Predictions of {len(chosen)} random images: {correct.sum()} are correct",
                predictions.ink(chosen), texts, [GREEN if right else WRONG for right in correct])


def plot_class_distribution(path: Path, targets: np.ndarray, names: list[str]) -> None:
    """Draw the number of labelled images of each class, sorted; of many classes sixty are named."""
    counts = np.bincount(targets, minlength=len(names))
    order, shown = np.argsort(-counts, kind="stable"), evenly_spaced(len(counts), 60)
    figure, axes = new_figure(14, 5)
    axes.bar(range(len(order)), counts[order], width=0.8 if len(order) <= 60 else 1, color=BLUE)
    axes.set(ylabel="labelled images", xlim=(-0.7, len(order) - 0.3),
             xlabel="" if len(order) <= 60 else f"{len(order)} classes by size, {len(shown)} of them named",
             title=f"{counts.sum():,} labelled images of {len(counts)} classes: {counts.min():,} to {counts.max():,} "
                   f"per class, median {np.median(counts):,.0f}")
    _label_bars(axes, [names[number] for number in order[shown]], shown)
    if counts.max() > 20 * counts.min():
        axes.set(yscale="log", ylim=(1, None))
    save_figure(path, figure)


def plot_curves(path: Path, history: pd.DataFrame, kept: int) -> None:
    """Draw loss, accuracy and learning rate by epoch, with the kept epoch marked."""
    figure, panels = new_figure(15, 4.5, 3)
    for axes, kind, factor, unit in zip(panels, ("loss", "accuracy"), (1, 100), ("", "%")):
        axes.plot(history.epoch, factor * history[f"train_{kind}"], "o-", color=BLUE, label="training")
        if history[f"val_{kind}"].notna().any():
            axes.plot(history.epoch, factor * history[f"val_{kind}"], "o-", color=RED, label="validation")
        axes.axvline(kept, color="#bbbbbb", linestyle=":", label=f"kept: epoch {kept}")
        axes.set(title=kind, xlabel="epoch", ylabel=unit)
        axes.legend()
    panels[2].plot(history.epoch, history.learning_rate, "o-", color=GREEN)
    panels[2].set(title="learning rate at the end of the epoch", xlabel="epoch", yscale="log")
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # a single epoch has one tick
    save_figure(path, figure)


def plot_confusions(path: Path, predictions: Predictions, names: list[str]) -> None:
    """Draw the confusion matrix; of many classes the most confused pairs."""
    if len(names) > LARGEST_MATRIX:
        plot_confused_pairs(path, predictions, names)
        return
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    counts = confusion_matrix(predictions.targets, predictions.predicted, labels=range(len(names)))
    figure, axes = new_figure(3 + 0.4 * len(names), 2.4 + 0.4 * len(names))
    display = ConfusionMatrixDisplay(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), display_labels=names)
    display.plot(ax=axes, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 1}, text_kw={"fontsize": 7})
    for text, count in zip(display.text_.flat, counts.flat):
        text.set_text(f"{count:,}" if count else "")
    axes.set(title=f"{predictions.correct.mean():.2%} of {len(predictions.targets):,} images are correct",
             xlabel="predicted", ylabel="true")
    save_figure(path, figure)


def plot_confused_pairs(path: Path, predictions: Predictions, names: list[str], pairs: int = 24) -> None:
    """Draw the most confused pairs of classes: a mistaken image (red), and one of the class that it was taken for."""
    targets, predicted = predictions.targets, predictions.predicted
    common = pd.DataFrame({"true": targets, "predicted": predicted})[~predictions.correct].value_counts().head(pairs)
    totals, places, texts, colours = np.bincount(targets, minlength=len(names)), [], [], []
    for (true, guess), count in common.items():
        places.append(np.flatnonzero((targets == true) & (predicted == guess))[0])
        like = np.flatnonzero(targets == guess)
        places.append(like[0] if len(like) else places[-1])
        texts += [f"{names[true]}: {count} of {totals[true]}", f"like {names[guess]}" if len(like) else names[guess]]
        colours += [WRONG, BLUE if len(like) else GREY]
    plot_images(path, f"Confusions among {len(targets):,} images: a mistaken image (red), one of the predicted class "
                "(blue)" if texts else f"No confusion among {len(targets):,} images",
                predictions.ink(np.array(places, dtype=int)), texts, colours, columns=8)


def plot_class_accuracy(path: Path, table: pd.DataFrame, names: list[str]) -> None:
    """Draw the accuracy of each class; of many classes its distribution and the forty with most mistakes."""
    table = table.assign(name=names, mistakes=table.images * (1 - table.accuracy))[table.images > 0]
    mistaken = table[table.mistakes > 0]
    worst = (table if len(table) <= 40 or mistaken.empty else mistaken).nlargest(40, "mistakes").sort_values("accuracy")
    figure, (left, right) = new_figure(15, 5, 2)
    left.hist(100 * table.accuracy, bins=np.linspace(0, 100, 41), color=BLUE)
    left.set(title=f"{len(table)} classes, mean {table.accuracy.mean():.2%}", xlabel="accuracy of a class in %",
             ylabel="classes")
    right.bar(range(len(worst)), 100 * worst.accuracy, color=RED)
    _label_bars(right, worst.name.tolist())
    title = f"{len(worst)} of {len(table)} classes, none with a mistake"
    if not mistaken.empty:
        title = f"classes with {worst.mistakes.sum() / table.mistakes.sum():.0%} of the mistakes: {len(worst)}"
    right.set(title="each class" if len(worst) == len(table) else title, xlim=(-0.6, max(len(worst), 8) - 0.4),
              ylabel="accuracy in %", ylim=(100 * worst.accuracy.min() - 1 if worst.accuracy.min() > 0.9 else 0, 100))
    save_figure(path, figure)


def write_class_accuracy(folder: Path, prefix: str, predictions: Predictions, classes: list[str],
                         latex: dict[str, str], pictures: bool) -> None:
    """Write PREFIXclass_accuracy.csv; with pictures, draw it, the confusions and some predictions."""
    table = class_accuracy_table(predictions, classes)
    with atomic_write(folder / f"{prefix}class_accuracy.csv") as temporary:
        table.to_csv(temporary, index=False)
    if pictures:
        names = class_names(classes, latex)
        plot_class_accuracy(folder / f"{prefix}class_accuracy.png", table, names)
        plot_confusions(folder / f"{prefix}confusions.png", predictions, names)
        plot_predictions(folder / f"{prefix}predictions.png", predictions, names)
