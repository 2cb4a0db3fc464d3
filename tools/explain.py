"""Show which places of a picture speak for a class: Grad-CAM of a trained network.

    python -m tools.explain a.png b.jpg [--checkpoint best_model.pth] [--crop] [--output-dir .]

Writes explained.png: a row for each picture, with the picture as the network sees it and a heat map for each of its
most likely classes. The map is that of the deepest convolution whose output has at least a quarter of the picture's
side (deeper ones are too coarse for pictures this small), so it is about as fine as a stroke is wide. Each place keeps
its own gradient (arXiv:2011.08891): the mean gradient of arXiv:1610.02391 fits networks that end in a mean over all
places, and MathSymbolCNN does not. The nearest-neighbour vote is left out: it has no places to show.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import script
from pipeline import plots
from pipeline.errors import UsageError
from pipeline.files import make_output_folder
from pipeline.signals import exit_status
from tools.common import make_parser, read_latex, read_picture


def grad_cam(network: nn.Module, inputs: Tensor, classes: Tensor) -> Tensor:
    """Return how much each place of inputs [B, 1, S, S] speaks for one class each [B]: maps [B, S, S] in 0..1."""
    side, outputs = inputs.shape[-1], []
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output))
             for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    try:
        logits = network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    fine = [output for output in outputs if output.shape[-1] >= side // 4]
    if not fine:
        raise UsageError("the network has no convolution whose output is fine enough to be shown; name another "
                         "--checkpoint")
    features = fine[-1]
    (slopes,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
    maps = (features * slopes).sum(dim=1, keepdim=True).relu()
    maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)[:, 0]
    return (maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).detach()


def explain(trained: script.TrainedModel, inks: np.ndarray, top: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the top probabilities and classes, [B, top] each, of ink [B, S, S], and a map [B, S, S] for each."""
    network = trained.without_knn.model.eval()
    inputs = script.to_input(torch.from_numpy(inks)[:, None], trained.config)
    with torch.no_grad():
        probabilities, classes = network(inputs).softmax(dim=1).topk(min(top, len(trained.classes)))
    return probabilities, classes, [grad_cam(network, inputs, column) for column in classes.T]


def plot_explanations(path: Path, inks: np.ndarray, titles: list[list[str]], maps: list[Tensor]) -> None:
    """Draw a row for each picture: its ink, then the maps of its most likely classes over it."""
    columns = 1 + len(maps)
    figure, axes = plots.new_figure(2.4 * columns, 2.7 * len(inks), columns, len(inks))
    axes = axes.reshape(len(inks), columns)
    for row, ink in enumerate(inks):
        for column, axis in enumerate(axes[row]):
            axis.imshow(255 - ink, cmap="gray", vmin=0, vmax=255)
            if column:
                heat = F.interpolate(maps[column - 1][row][None, None], size=ink.shape, mode="bilinear")[0, 0].numpy()
                axis.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
            axis.set_title(titles[row][column], fontsize=9)
            axis.set_axis_off()
    figure.suptitle("What speaks for the most likely classes")
    plots.save_figure(path, figure)


def answer(given: argparse.Namespace) -> None:
    """Draw the explanations of all pictures."""
    trained = script.load_checkpoint(given.checkpoint)
    names = plots.class_names(trained.classes, read_latex(trained.config, given))
    inks = np.stack([read_picture(path, trained.statistics, given.crop) for path in given.pictures])
    probabilities, classes, maps = explain(trained, inks, given.top)
    files = [path.name.encode(errors="replace").decode().replace("$", r"\$") for path in given.pictures]
    titles = [[file, *(f"{names[number]}   {share:.1%}" for number, share in zip(numbers, shares))]
              for file, numbers, shares in zip(files, classes.tolist(), probabilities.tolist())]
    make_output_folder(given.output_dir, ["explained.png"])
    plot_explanations(given.output_dir / "explained.png", inks, titles, maps)
    print(f"wrote {given.output_dir.resolve() / 'explained.png'}: {len(inks)} pictures")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.explain", __doc__, "checkpoint", "output_dir", data_dir=None)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--crop", action="store_true", help="cut out the drawing first")
    parser.add_argument("--top", type=int, default=3, help="number of classes to show (3)")
    given = parser.parse_args(argv)
    if given.top < 1:
        parser.error(f"--top must be 1 or more, not {given.top}")
    return exit_status(lambda _: answer(given), "nothing was drawn")


if __name__ == "__main__":
    sys.exit(main())
