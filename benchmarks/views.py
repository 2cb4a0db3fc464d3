"""What averaging several views of each image does to a trained network's validation figures.

    python -m benchmarks.views CHECKPOINT --data-dir COMPETITION [--cache-dir DIR]

The first view is the image as it is; the others are warped as in training. Prints loss and accuracies on the
checkpoint's own validation rows after each view, as `predict --views N` and `evaluate --views N` would average them.
"""

import dataclasses
import itertools
import sys

import numpy as np

import script
from benchmarks import arguments

MOST = 9


def main() -> None:
    trained, dataset, targets, runtime = arguments.with_validation_rows(__doc__)
    if not trained.config.augment:
        raise script.UsageError("the checkpoint was trained with --no-augment, and knows one view of an image")
    views = script.ask_views(runtime.place(trained.model), dataset, np.arange(len(targets)),
                             dataclasses.replace(trained.config, views=MOST), runtime)
    for count, total in enumerate(itertools.accumulate(views), start=1):
        arguments.show(f"views {count}", script.score((total / count).numpy(), targets))


if __name__ == "__main__":
    sys.exit(script.exit_status(lambda _: main(), "the table is not whole"))
