"""Classify single pictures with a trained network.

    python -m tools.classify a.png b.jpg [--checkpoint best_model.pth] [--crop]

Prints for each picture the most likely classes with their probabilities, and their LaTeX if classes.csv is beside the
training table. Pictures may have any size, and be black on white or white on black: the background is what the border
shows. `--crop` cuts out the drawing and scales it to fill the picture, as the symbols of HASYv2 come; leave it out if
the training images have margins, as digits have. A picture that cannot be read is reported, and the others are
classified; the exit status is then 1.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import script
from pipeline.device import Runtime, start_runtime
from pipeline.errors import DataError
from pipeline.signals import exit_status
from pipeline.tables import Table
from tools.common import make_parser, read_latex, read_picture


def as_dataset(trained: script.TrainedModel, inks: list[np.ndarray], runtime: Runtime) -> script.MathSymbolDataset:
    """Return pictures, ink [size, size] each, as a dataset."""
    table = Table("the pictures", pd.DataFrame(index=range(len(inks))))
    return script.MathSymbolDataset(table, trained.config, trained.classes, trained.statistics, runtime,
                                    np.stack(inks)[:, None])


def classify(trained: script.TrainedModel, inks: list[np.ndarray]) -> np.ndarray:
    """Return probabilities [pictures, classes] of ink [size, size] each, computed on the CPU."""
    runtime = start_runtime("cpu", "float32")
    return script.predict(runtime.to_device(trained.model), as_dataset(trained, inks, runtime))


def answer(given: argparse.Namespace) -> int:
    """Print the answers. Return the number of pictures that cannot be used."""
    trained = script.load_checkpoint(given.checkpoint)
    latex = read_latex(trained.config, given)
    inks, faults = {}, []
    for path in given.pictures:
        try:
            inks[path] = read_picture(path, trained.statistics, given.crop)
        except DataError as error:
            faults.append(error)
    for path, probabilities in zip(inks, classify(trained, list(inks.values())) if inks else ()):
        print(path)
        for number in probabilities.argsort()[::-1][: given.top]:
            label = trained.classes[number]
            print(f"  {probabilities[number]:7.2%}  {label}  {latex.get(label, '')}".rstrip())
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return len(faults)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.classify", __doc__, "checkpoint", data_dir=None)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--crop", action="store_true", help="cut out the drawing first")
    parser.add_argument("--top", type=int, default=5, help="number of classes to print (5)")
    given, faults = parser.parse_args(argv), []
    if given.top < 1:
        parser.error(f"--top must be 1 or more, not {given.top}")
    status = exit_status(lambda _: faults.append(answer(given)), "nothing was classified")
    return status or int(faults[0] > 0)


if __name__ == "__main__":
    sys.exit(main())
