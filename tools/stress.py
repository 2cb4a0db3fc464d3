"""Measure a trained network's accuracy on validation images that are changed more and more.

    python -m tools.stress best_model.pth [more.pth ...] [--data-dir COMPETITION] [--rows 2000] [--output-dir .]

The changes are strokes made thicker and thinner, rotation, translation, erasing and noise; and FGSM, which moves every
pixel against the network by its gradient (arXiv:1412.6572; the gradient is that of the first checkpoint without its
nearest-neighbour vote). Several checkpoints are averaged, as by `script.py predict`. All strengths use the same rows,
and the same draws of noise and places. Writes stress.csv and stress.png, and prints the table.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import script
from pipeline import files, plots
from pipeline.errors import UsageError
from pipeline.metrics import score
from pipeline.signals import exit_status
from pipeline.tables import Table
from tools.common import OF_CHECKPOINT, make_parser, open_validation, predict_each, select_rows

Change = Callable[[Tensor, float], Tensor]  # ink [B, 1, S, S] in 0..1 and a strength to changed ink


def dilate(ink: Tensor) -> Tensor:
    """Return ink with strokes a pixel wider at each side."""
    return F.max_pool2d(ink, 3, 1, 1)


def erode(ink: Tensor) -> Tensor:
    """Return ink with strokes a pixel narrower at each side, also at the edge of the image."""
    return -F.max_pool2d(-F.pad(ink, (1, 1, 1, 1)), 3, 1)


def thicken(ink: Tensor, pixels: float) -> Tensor:
    """Return ink with strokes so many pixels wider at each side (below 0 narrower); parts of a pixel are blends."""
    for left in np.arange(abs(pixels), 0, -1):
        ink = torch.lerp(ink, dilate(ink) if pixels > 0 else erode(ink), float(min(left, 1.0)))
    return ink


def move(ink: Tensor, degrees: float = 0.0, pixels: float = 0.0) -> Tensor:
    """Return ink rotated by so many degrees, and moved by so many pixels: each row to the next of the four sides."""
    count, side = len(ink), ink.shape[-1]
    angle, towards = np.radians(degrees), torch.arange(count) * (np.pi / 2)
    grid = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float32)
    shift = 2 * pixels / side * torch.stack([towards.cos(), towards.sin()], dim=1)[:, :, None]
    affine = torch.cat([grid.expand(count, 2, 2), shift.float()], dim=2)
    return F.grid_sample(ink, F.affine_grid(affine, list(ink.shape), align_corners=False), align_corners=False)


def erase(ink: Tensor, share: float) -> Tensor:
    """Return ink with a random square of this share of the image set to background."""
    side, places = ink.shape[-1], torch.rand(2, len(ink), generator=torch.Generator().manual_seed(0))
    extent, line = side * share**0.5, torch.arange(side) + 0.5
    low = places * (side - extent)
    inside = [(line >= start[:, None]) & (line <= start[:, None] + extent) for start in low]
    return ink.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def add_noise(ink: Tensor, share: float) -> Tensor:
    """Return ink with this share of the pixels inverted."""
    chosen = torch.rand(ink.shape, generator=torch.Generator().manual_seed(0)) < share
    return torch.where(chosen, 1 - ink, ink)


CHANGES: dict[str, tuple[str, Change, list[float]]] = {
    "thicker": ("pixels at each side", thicken, [0.5, 1, 1.5, 2]),
    "thinner": ("pixels at each side", lambda ink, pixels: thicken(ink, -pixels), [0.25, 0.5, 0.75, 1]),
    "rotated": ("degrees", lambda ink, degrees: move(ink, degrees=degrees), [5, 10, 20, 30]),
    "rotated back": ("degrees", lambda ink, degrees: move(ink, degrees=-degrees), [5, 10, 20, 30]),
    "moved": ("pixels", lambda ink, pixels: move(ink, pixels=pixels), [1, 2, 3, 4]),
    "erased": ("share of the image", erase, [0.05, 0.1, 0.2, 0.3]),
    "noise": ("share of the pixels", add_noise, [0.01, 0.02, 0.05, 0.1]),
}
FGSM = ("share of full ink", [0.02, 0.05, 0.1, 0.2])


def to_pixels(ink: Tensor) -> np.ndarray:
    """Return ink 0..1 as uint8."""
    return (ink.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def some_rows(dataset: script.MathSymbolDataset, rows: np.ndarray) -> script.MathSymbolDataset:
    """Return a dataset of some rows only."""
    return make_dataset(dataset, select_rows(dataset.table, rows), dataset.ink(rows)[:, None])


def make_dataset(like: script.MathSymbolDataset, table: Table, images: np.ndarray) -> script.MathSymbolDataset:
    """Return a dataset of other rows or images, uint8 [N, 1, S, S], for the same network."""
    return script.MathSymbolDataset(table, like.config, like.classes, like.statistics, like.runtime, images)


def gradient_signs(trained: script.TrainedModel, ink: Tensor, targets: np.ndarray) -> Tensor:
    """Return the sign of the gradient of the loss by each pixel of ink [B, 1, S, S], without the vote."""
    network, signs = trained.without_knn.model.eval(), []
    for rows in torch.arange(len(ink)).split(256):
        part = ink[rows].clone().requires_grad_()
        logits = network(script.to_input(part * 255.0, trained.config))
        loss = F.cross_entropy(logits, torch.from_numpy(targets)[rows], reduction="sum")
        signs.append(torch.autograd.grad(loss, part)[0].sign())
    return torch.cat(signs)


def stress(networks: list[script.TrainedModel], datasets: list[script.MathSymbolDataset]) -> pd.DataFrame:
    """Return accuracy and loss by change and strength; the first row is that of the unchanged images."""
    inks, targets = [dataset.images.cpu().float() / 255 for dataset in datasets], datasets[0].targets

    def measure(change: Callable[[Tensor], Tensor]) -> dict[str, float]:
        changed = [make_dataset(dataset, dataset.table, to_pixels(change(ink))) for dataset, ink in zip(datasets, inks)]
        figures = score(sum(predict_each(networks, changed)) / len(networks), targets)
        return {"accuracy": figures["val_accuracy"], "loss": figures["val_loss"]}

    rows = [{"change": "none", "unit": "", "strength": 0.0, **measure(lambda ink: ink)}]
    for name, (unit, change, strengths) in CHANGES.items():
        rows += [{"change": name, "unit": unit, "strength": strength,
                  **measure(lambda ink, change=change, strength=strength: change(ink, strength))}
                 for strength in strengths]
    networks[0].model.cpu()  # the device of prediction may be another
    signs = gradient_signs(networks[0], inks[0], targets)
    for strength in FGSM[1]:
        rows.append({"change": "FGSM", "unit": FGSM[0], "strength": strength, **measure(
            lambda ink, strength=strength: ink + strength * F.interpolate(signs, size=ink.shape[2:]))})
    return pd.DataFrame(rows)


def plot_stress(path: Path, table: pd.DataFrame, ink: Tensor) -> None:
    """Draw a panel for each change: accuracy by strength, and one image at the largest."""
    plain, changes = table.accuracy.iloc[0], [name for name in table.change.unique() if name != "none"]
    columns = 4
    figure, axes = plots.new_figure(14, 3.6 * -(-len(changes) // columns), columns, -(-len(changes) // columns))
    for axis, name in zip(axes.flat, changes):
        part = table[table.change == name]
        axis.plot([0, *part.strength], [plain, *part.accuracy], "o-", color=plots.BLUE)
        axis.set(title=name, xlabel=part.unit.iloc[0], ylim=(0, 1.4), yticks=np.arange(0, 1.1, 0.2))
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.grid(alpha=0.3)
        if name in CHANGES:
            shown = to_pixels(CHANGES[name][1](ink[:1], part.strength.iloc[-1]))[0, 0]
            inset = axis.inset_axes((0.69, 0.69, 0.29, 0.29))
            inset.imshow(255 - shown, cmap="gray", vmin=0, vmax=255)
            inset.set(xticks=[], yticks=[])
    for axis in list(axes.flat)[len(changes):]:
        axis.set_axis_off()
    figure.suptitle("Accuracy on changed validation images; inset: one at the largest strength")
    plots.save_figure(path, figure)


def report(given: argparse.Namespace) -> None:
    """Print the table, write it and draw it."""
    if given.rows < 1:
        raise UsageError(f"--rows must be 1 or more, not {given.rows}")
    folder = files.make_output_folder(given.output_dir, ["stress.csv", "stress.png"])
    networks, datasets = open_validation(given.checkpoints, given)
    rows = np.random.default_rng(0).permutation(len(datasets[0]))[: given.rows]
    datasets = [some_rows(dataset, rows) for dataset in datasets]
    table = stress(networks, datasets)
    with files.atomic_write(folder / "stress.csv") as temporary:
        table.to_csv(temporary, index=False)
    plot_stress(folder / "stress.png", table, datasets[0].images.cpu().float() / 255)
    print(f"{len(rows):,} validation rows, {len(networks)} network{'s' if len(networks) > 1 else ''}\n"
          "| change | strength | accuracy | loss |\n|---|--:|--:|--:|")
    for row in table.itertuples():
        strength = f"{row.strength:g} {row.unit}" if row.unit else ""
        print(f"| {row.change} | {strength} | {row.accuracy:.2%} | {row.loss:.3f} |")
    print(f"wrote stress.csv and stress.png in {folder.resolve()}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.stress", __doc__, "cache_dir", "output_dir", **OF_CHECKPOINT)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints of script.py; several are averaged")
    parser.add_argument("--rows", type=int, default=2000, help="largest number of validation rows (2000)")
    given = parser.parse_args(argv)
    return exit_status(lambda _: report(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
