"""Validation figures of trained networks, one by one and averaged.

    python -m benchmarks.ensemble a.pth b.pth c.pth --data-dir COMPETITION [--cache-dir DIR] [--alone]

The networks share `split_seed`, so that none was trained on the rows that it is scored on. The mean is the one that
`script.py predict a.pth b.pth c.pth` submits; with `--alone` the networks' neighbours do not vote.
"""

import sys

import numpy as np

import script
from benchmarks import arguments


def main() -> None:
    given = arguments.of_checkpoints(__doc__, several=True)
    members = script.look_at_members(given.checkpoints)
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir)
    runtime = script.runtime_of(members, config)
    question, targets = script.validation_question(members, config, runtime)
    kinds = "accuracy", "top3_accuracy", "class_accuracy", "loss"
    print(f"{len(targets):,} validation rows\n| network | seed | accuracy | top 3 | per class | loss |"
          "\n|---|--:|--:|--:|--:|--:|")

    def show(name: str, seed: object, figures: list[float]) -> None:
        print(f"| {name} | {seed} | " + " | ".join(f"{100 * value:.2f}" for value in figures[:3])
              + f" | {figures[3]:.4f} |", flush=True)

    singles, total = [], 0
    for member, probabilities in zip(members, script.ask_members(members, question, given.alone)):
        figures, total = script.score(probabilities, targets), total + probabilities
        singles.append([figures[f"val_{kind}"] for kind in kinds])
        show(member.path, member.config.seed, singles[-1])
    together = script.score(total / len(members), targets)
    show("mean of the figures", "", np.mean(singles, axis=0))
    show("mean of the probabilities", "", [together[f"val_{kind}"] for kind in kinds])
    gain = together["val_accuracy"] - np.mean(singles, axis=0)[0]
    print(f"averaging {len(members)} networks gains {100 * gain:+.2f} points over their mean")


if __name__ == "__main__":
    sys.exit(script.exit_status(lambda _: main(), "the table is not whole"))
