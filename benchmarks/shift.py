"""Measure how well the accuracy on test rows of another kind is expected from confidences alone.

    python -m benchmarks.shift best_model.pth --data-dir COMPETITION [--rows 2000] [--others OTHER/train.csv]

Half of the rows that validated a network stand for validation rows; the other half is changed, and stands for test
rows: thicker and thinner strokes, rotation, translation, erasing, noise (those of tools.stress), half of the rows
rotated, and a third of the classes. `--others` names a labelled table of the same classes of another kind, such as
other digits.
Prints the true accuracy of each, and by how many points each estimate is wrong: the validation figure itself, average
thresholded confidence (ATC, arXiv:2201.04234), the difference of confidence (DoC, arXiv:2107.03315), both of
probabilities at the temperature that suits the validation rows, and that of margins, which is what a run prints; then
the means, the largest, and the share of cases within the printed error.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import script
from pipeline import shift, tables
from pipeline.images import LoadSettings, load_images
from pipeline.metrics import Predictions
from pipeline.signals import exit_status
from tools.common import OF_CHECKPOINT, make_parser, open_validation
from tools.stress import CHANGES, make_dataset, move, some_rows, to_pixels

NAMES = ["validation figure", "ATC", "DoC", "margins"]


def estimate(validation: Predictions, test: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the estimates of the accuracy on rows with these probabilities, in the order of NAMES, and our error."""
    temperature = shift.fit_temperature(validation.probabilities, validation.targets)
    own, other = (shift.temper(rows, temperature).amax(dim=1).numpy() for rows in (validation.probabilities, test))
    accuracy = validation.correct.mean()
    threshold = np.quantile(own, 1 - accuracy)
    figures = shift.expected_accuracy(validation, test)
    return np.array([accuracy, (other >= threshold).mean(), accuracy - own.mean() + other.mean(),
                     figures["expected_test_accuracy"]]), figures["expected_test_accuracy_error"]


def changed_rows(dataset: script.MathSymbolDataset) -> dict[str, script.MathSymbolDataset]:
    """Return the rows as they are, changed in ways of several strengths, and a third of their classes."""
    ink = dataset.images.cpu().float() / 255
    half = torch.cat([ink[: len(ink) // 2], move(ink[len(ink) // 2:], degrees=20)])
    changed = {"as they are": ink, "half of them rotated by 20 degrees": half}
    for name, (unit, change, strengths) in CHANGES.items():
        changed |= {f"{name}: {strength:g} {unit}": change(ink, strength) for strength in strengths}
    made = {name: make_dataset(dataset, dataset.table, to_pixels(own)) for name, own in changed.items()}
    few = np.flatnonzero(dataset.targets % 3 == 0)
    return {**made, "a third of the classes": some_rows(dataset, few)}


def open_others(path: Path, like: script.MathSymbolDataset) -> script.MathSymbolDataset:
    """Return the rows of another labelled table whose classes the network knows."""
    table = tables.open_table(tables.TableSource(path.name, str(path.parent)), "label")
    images, = load_images([table], like.statistics, LoadSettings())
    dataset = make_dataset(like, table, images)
    return some_rows(dataset, np.intersect1d(np.flatnonzero(dataset.targets >= 0), table.usable_rows))


def measure(given: argparse.Namespace) -> None:
    """Print the table."""
    (network,), (dataset,) = open_validation([given.checkpoint], given)
    rows = np.random.default_rng(0).permutation(len(dataset))[: 2 * given.rows]
    validation, test = (some_rows(dataset, np.sort(part)) for part in np.array_split(rows, 2))
    model = dataset.runtime.to_device(network.model)
    known = Predictions(np.arange(len(validation)), validation.targets, script.predict(model, validation))
    cases = changed_rows(test) | ({str(given.others): open_others(given.others, test)} if given.others else {})
    print(f"{len(validation):,} validation rows and {len(test):,} others; errors in points\n"
          f"| rows | accuracy | {' | '.join(NAMES)} | our error |\n|---|--:|" + "--:|" * (len(NAMES) + 1))
    wrong, within = [], []
    for name, own in cases.items():
        probabilities = script.predict(model, own)
        accuracy = (probabilities.argmax(axis=1) == own.targets).mean()
        estimates, error = estimate(known, probabilities)
        wrong.append(100 * (estimates - accuracy))
        within.append(abs(estimates[-1] - accuracy) <= error)
        print(f"| {name} | {accuracy:.2%} | {' | '.join(f'{value:+.1f}' for value in wrong[-1])} | {100 * error:.1f} |",
              flush=True)
    wrong = np.abs(wrong)
    for name, values in (("mean", wrong.mean(axis=0)), ("largest", wrong.max(axis=0))):
        print(f"| {name} of {len(wrong)} | | {' | '.join(f'{value:.1f}' for value in values)} | |")
    print(f"within our error: {np.mean(within):.0%}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("benchmarks.shift", __doc__, "cache_dir", **OF_CHECKPOINT)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of script.py")
    parser.add_argument("--rows", type=int, default=2000, help="largest number of rows of each half (2000)")
    parser.add_argument("--others", type=Path, help="labelled table of the same classes")
    given = parser.parse_args(argv)
    return exit_status(lambda _: measure(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
