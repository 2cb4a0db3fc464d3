"""Say what is drawn on some pictures.

    python -m tools.classify a.png b.jpg [--checkpoint best_model.pth] [--crop]

Prints for each picture the likeliest classes with their probabilities, and their LaTeX where classes.csv beside the
training table tells it. Pictures may have any size and any polarity: paper is what the border shows. `--crop` cuts the
drawing out and scales it to fill the picture, as the symbols of HASYv2 come; leave it out where the training images
have margins, as digits have. A picture that cannot be read is named, and the others are answered; the exit status is
then 1.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

import script


def classify(trained: script.Trained, inks: list[np.ndarray]) -> np.ndarray:
    """Probabilities [pictures, classes] of ink [size, size] each, on the CPU."""
    runtime = script.start_runtime(script.Config(device="cpu", precision="float32"))
    dataset = script.MathSymbolDataset(np.stack(inks)[:, None], None, runtime)
    return script.predict(runtime.place(trained.model), dataset, np.arange(len(inks)), trained.config, runtime)


def answer(given: argparse.Namespace) -> int:
    """Print the answers; gives how many pictures cannot be used."""
    trained = script.load_checkpoint(given.checkpoint)
    config = trained.config
    symbols = script.read_symbols(dataclasses.replace(config, data_dir=given.data_dir or config.data_dir))
    inks, faults = {}, []
    for path in given.pictures:
        try:
            inks[path] = script.read_picture(path, trained.statistics.size, given.crop)
        except script.DataError as error:
            faults.append(error)
    for path, probabilities in zip(inks, classify(trained, list(inks.values())) if inks else ()):
        print(path)
        for number in probabilities.argsort()[::-1][: given.top]:
            label = trained.classes[number]
            print(f"  {probabilities[number]:7.2%}  {label}  {symbols.get(label, '')}".rstrip())
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return len(faults)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.classify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--checkpoint", type=Path, default=Path("best_model.pth"))
    parser.add_argument("--data-dir", default="", help="folder of classes.csv (default: the one it was trained in)")
    parser.add_argument("--crop", action="store_true", help="cut the drawing out first")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show (5)")
    given, faults = parser.parse_args(argv), []
    if given.top < 1:
        parser.error(f"--top must be 1 or more, not {given.top}")
    status = script.exit_status(lambda _: faults.append(answer(given)), "nothing was answered")
    return status or int(faults[0] > 0)


if __name__ == "__main__":
    sys.exit(main())
