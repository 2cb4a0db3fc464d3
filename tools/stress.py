"""Measure what a trained network stands: accuracy on validation images that are changed more and more.

    python -m tools.stress best_model.pth [more.pth ...] --data-dir COMPETITION [--rows 2000] [--output-dir .]

The changes are those that hurt handwriting: strokes thicker and thinner, turned, moved, erased, noise; and FGSM, which
moves every pixel against the network by its gradient (arXiv:1412.6572; that of the first checkpoint, asked alone
without its neighbours). Several checkpoints are averaged, as `script.py predict` does. The same rows, and the same draw
of noise and places, for every strength. Writes stress.csv and stress.png, and prints the table.
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

Change = Callable[[Tensor, float], Tensor]  # ink [B, 1, S, S], 0 to 1, and a strength, to ink alike


def thicken(ink: Tensor, pixels: float) -> Tensor:
    """Strokes so many pixels wider at each side, a part of a pixel as a blend; below 0 thinner."""
    for left in np.arange(abs(pixels), 0, -1):
        ink = torch.lerp(ink, script.thicker(ink) if pixels > 0 else script.thinner(ink), float(min(left, 1.0)))
    return ink


def move(ink: Tensor, degrees: float = 0.0, pixels: float = 0.0) -> Tensor:
    """Turned by so many degrees; moved by so many pixels to a side that goes round with the rows; paper comes in."""
    count, side = len(ink), ink.shape[-1]
    angle, towards = np.radians(degrees), torch.arange(count) * (np.pi / 2)
    grid = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float32)
    shift = 2 * pixels / side * torch.stack([towards.cos(), towards.sin()], dim=1)[:, :, None]
    affine = torch.cat([grid.expand(count, 2, 2), shift.float()], dim=2)
    return F.grid_sample(ink, F.affine_grid(affine, list(ink.shape), align_corners=False), align_corners=False)


def erase(ink: Tensor, share: float) -> Tensor:
    """A square of so large a share of the picture is paper, somewhere."""
    side, places = ink.shape[-1], torch.rand(2, len(ink), generator=torch.Generator().manual_seed(0))
    extent, line = side * share**0.5, torch.arange(side) + 0.5
    low = places * (side - extent)
    inside = [(line >= start[:, None]) & (line <= start[:, None] + extent) for start in low]
    return ink.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def add_noise(ink: Tensor, share: float) -> Tensor:
    """So large a share of the pixels turns to its opposite."""
    chosen = torch.rand(ink.shape, generator=torch.Generator().manual_seed(0)) < share
    return torch.where(chosen, 1 - ink, ink)


CHANGES: dict[str, tuple[str, Change, list[float]]] = {
    "thicker": ("pixels at each side", thicken, [0.5, 1, 1.5, 2]),
    "thinner": ("pixels at each side", lambda ink, pixels: thicken(ink, -pixels), [0.25, 0.5, 0.75, 1]),
    "turned": ("degrees", lambda ink, degrees: move(ink, degrees=degrees), [5, 10, 20, 30]),
    "turned back": ("degrees", lambda ink, degrees: move(ink, degrees=-degrees), [5, 10, 20, 30]),
    "moved": ("pixels", lambda ink, pixels: move(ink, pixels=pixels), [1, 2, 3, 4]),
    "erased": ("share of the picture", erase, [0.05, 0.1, 0.2, 0.3]),
    "noise": ("share of the pixels", add_noise, [0.01, 0.02, 0.05, 0.1]),
}
FGSM = ("share of full ink", [0.02, 0.05, 0.1, 0.2])


def to_pixels(ink: Tensor) -> np.ndarray:
    """Ink 0 to 1 as uint8."""
    return (ink.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def gradient_signs(trained: script.Trained, ink: Tensor, targets: np.ndarray) -> Tensor:
    """Which way each pixel of ink [B, 1, S, S] has to go for the network, asked alone, to lose most."""
    network, signs = trained.alone.model.eval(), []
    for rows in torch.arange(len(ink)).split(256):
        part = ink[rows].clone().requires_grad_()
        logits = network(script.to_input(part * 255.0, trained.config))
        loss = F.cross_entropy(logits, torch.from_numpy(targets)[rows], reduction="sum")
        signs.append(torch.autograd.grad(loss, part)[0].sign())
    return torch.cat(signs)


def stress(members: list[script.Trained], datasets: list[script.MathSymbolDataset], targets: np.ndarray,
           runtime: script.Runtime) -> pd.DataFrame:
    """Accuracy and loss by change and strength; the first row is that of the unchanged images."""
    inks = [dataset.images.cpu().float() / 255 for dataset in datasets]

    def judge(change: Callable[[Tensor], Tensor]) -> dict[str, float]:
        changed = [script.MathSymbolDataset(to_pixels(change(ink)), None, runtime) for ink in inks]
        figures = script.score(script.ensemble_predict(members, changed, runtime), targets)
        return {"accuracy": figures["val_accuracy"], "loss": figures["val_loss"]}

    rows = [{"change": "none", "unit": "", "strength": 0.0, **judge(lambda ink: ink)}]
    for name, (unit, change, strengths) in CHANGES.items():
        rows += [{"change": name, "unit": unit, "strength": strength,
                  **judge(lambda ink, change=change, strength=strength: change(ink, strength))}
                 for strength in strengths]
    for member in members:  # the device of prediction may be another
        member.model.cpu()
    signs = gradient_signs(members[0], inks[0], targets)
    for strength in FGSM[1]:
        rows.append({"change": "FGSM", "unit": FGSM[0], "strength": strength, **judge(
            lambda ink, strength=strength: ink + strength * F.interpolate(signs, size=ink.shape[2:]))})
    return pd.DataFrame(rows)


def plot_stress(path: Path, table: pd.DataFrame, ink: Tensor) -> None:
    """A panel for each change: accuracy by strength, and one image at the greatest."""
    plain, changes = table.accuracy.iloc[0], [name for name in table.change.unique() if name != "none"]
    columns = 4
    figure, axes = script.new_figure(14, 3.6 * -(-len(changes) // columns), columns, -(-len(changes) // columns))
    for axis, name in zip(axes.flat, changes):
        part = table[table.change == name]
        axis.plot([0, *part.strength], [plain, *part.accuracy], "o-", color="#4477aa")
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
    figure.suptitle("Accuracy on changed validation images; inset: one at the greatest strength")
    script.save_figure(path, figure)


def report(given: argparse.Namespace) -> None:
    """Print the table, write and draw it."""
    if given.rows < 1:
        raise script.UsageError(f"--rows must be 1 or more, not {given.rows}")
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir, output_dir=given.output_dir)
    folder, members = script.output_folder(config), [script.load_checkpoint(path) for path in given.checkpoints]
    runtime = script.runtime_of(members, config)
    question, targets = script.validation_question(members, config, runtime)
    rows = np.random.default_rng(0).permutation(len(targets))[: given.rows]
    question.rows = question.rows[rows]
    datasets = [question.dataset(member.statistics) for member in members]
    table = stress(members, datasets, targets[rows], runtime)
    with script.whole_file(folder / "stress.csv") as temporary:
        table.to_csv(temporary, index=False)
    plot_stress(folder / "stress.png", table, datasets[0].images.cpu().float() / 255)
    print(f"{len(rows):,} validation rows, {len(members)} network{'s' if len(members) > 1 else ''}\n"
          "| change | strength | accuracy | loss |\n|---|--:|--:|--:|")
    for row in table.itertuples():
        strength = f"{row.strength:g} {row.unit}" if row.unit else ""
        print(f"| {row.change} | {strength} | {row.accuracy:.2%} | {row.loss:.3f} |")
    print(f"wrote stress.csv and stress.png in {folder.resolve()}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.stress", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints of script.py; several are averaged")
    parser.add_argument("--data-dir", default=".", help="folder of the table that they were trained on")
    parser.add_argument("--cache-dir", default="", help="folder of the decoded images, as for script.py")
    parser.add_argument("--output-dir", default=".", help="folder of stress.csv and stress.png")
    parser.add_argument("--rows", type=int, default=2000, help="how many validation rows (2000)")
    given = parser.parse_args(argv)
    return script.exit_status(lambda _: report(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
