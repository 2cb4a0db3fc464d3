"""What softening the unchanged images does to a trained network's validation figures.

    python -m benchmarks.soften CHECKPOINT --data-dir COMPETITION [--cache-dir DIR]

A warp resamples and so softens edges; images that are not warped keep them hard, and the network has hardly seen such.
Prints loss and accuracies on the checkpoint's own validation rows for several shares of `soften`, all in one process.
"""

import dataclasses
import sys

import script
from benchmarks import arguments

SHARES = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)


def main() -> None:
    trained, dataset, targets, runtime = arguments.with_validation_rows(__doc__)
    for share in SHARES:
        softer = dataclasses.replace(trained, config=dataclasses.replace(trained.config, soften=share))
        probabilities = script.ensemble_predict([softer], [dataset], runtime)
        arguments.show(f"soften {share:<6}", script.score(probabilities, targets))


if __name__ == "__main__":
    sys.exit(script.exit_status(lambda _: main(), "the table is not whole"))
