"""Score trained networks on their validation rows, one by one and averaged.

    python -m benchmarks.ensemble a.pth b.pth c.pth [--data-dir COMPETITION] [--cache-dir DIR] [--alone]

The networks must share their validation rows, so that none was trained on the rows that it is scored on. The mean is
the one that `script.py predict a.pth b.pth c.pth` submits; with `--alone` it is without the nearest-neighbour votes.
"""

import sys
from pathlib import Path

import numpy as np

from pipeline.metrics import score
from pipeline.signals import exit_status
from tools.common import OF_CHECKPOINT, make_parser, open_validation, predict_each


def main() -> None:
    """Print a row for each network and for their mean."""
    parser = make_parser("benchmarks.ensemble", __doc__, "cache_dir", **OF_CHECKPOINT)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints of script.py")
    parser.add_argument("--alone", action="store_true", help="leave the nearest-neighbour votes out")
    given = parser.parse_args()
    networks, datasets = open_validation(given.checkpoints, given)
    targets = datasets[0].targets
    if given.alone:
        networks = [network.without_knn for network in networks]
    kinds = "accuracy", "top3_accuracy", "class_accuracy", "loss"
    print(f"{len(targets):,} validation rows\n| network | seed | accuracy | top 3 | per class | loss |"
          "\n|---|--:|--:|--:|--:|--:|")

    def show(name: str, seed: object, figures: list[float]) -> None:
        print(f"| {name} | {seed} | " + " | ".join(f"{100 * value:.2f}" for value in figures[:3])
              + f" | {figures[3]:.4f} |", flush=True)

    singles, total = [], 0
    each = zip(given.checkpoints, networks, predict_each(networks, datasets))
    for path, network, probabilities in each:
        figures, total = score(probabilities, targets), total + probabilities
        singles.append([figures[f"val_{kind}"] for kind in kinds])
        show(path, network.config.seed, singles[-1])
    together = score(total / len(networks), targets)
    show("mean of the figures", "", np.mean(singles, axis=0))
    show("mean of the probabilities", "", [together[f"val_{kind}"] for kind in kinds])
    gain = together["val_accuracy"] - np.mean(singles, axis=0)[0]
    print(f"averaging {len(networks)} networks gains {100 * gain:+.2f} points over their mean")


if __name__ == "__main__":
    sys.exit(exit_status(lambda _: main(), "the table is not complete"))
