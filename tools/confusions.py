"""Find the classes that a trained network cannot tell apart, and its accuracy if they count as one.

    python -m tools.confusions out/best_model.pth
    python -m tools.confusions a.pth b.pth c.pth --data-dir competition --output-dir out

Predicts the validation rows of the checkpoints (several are averaged), prints the groups of classes that are not told
apart, and writes confused_pairs.csv (all pairs) and confused_groups.png (the groups).

The rule: of a class's rows that are predicted as it or as one other class, take the share that is correct, with two
correct ones added, so that a handful of rows proves nothing. Two classes are not told apart if the mean of their two
shares is below `--threshold` (0.75; guessing gives 0.5); classes linked by such pairs form a group. It is the mean of
two shares, not the share of all rows of both, because a network that always predicts the larger class does not tell
them apart.

A group counts as one class in "accuracy with groups". Scored on the rows that they were found on, groups would flatter
the network; so they are also found on one half of the validation rows and scored on the other half, both ways.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline import files, plots
from pipeline.signals import exit_status
from tools.common import OF_CHECKPOINT, make_parser, open_validation, predict_each, read_latex

PICTURED_GROUPS, PICTURED_CLASSES, EXAMPLES = 16, 6, 3


def confusion_counts(targets: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return how many rows of each class (first axis) are predicted as each class: int [classes, classes]."""
    return np.bincount(targets * classes + predicted, minlength=classes**2).reshape(classes, classes)


def pair_shares(counts: np.ndarray) -> np.ndarray:
    """Return how well each two classes are told apart, [classes, classes]: the mean of two shares of correct rows.

    Each share is of a class's rows that are predicted as one of the two, with two correct ones added.
    """
    hits = np.diag(counts)[:, None] + 2
    shares = hits / (hits + counts)
    return (shares + shares.T) / 2


def find_groups(counts: np.ndarray, threshold: float) -> np.ndarray:
    """Return the group of every class, int [classes]: the smallest class number in it; alone, the class's own."""
    linked = pair_shares(counts) < threshold
    groups = np.arange(len(counts))
    for _ in range(len(counts)):  # the smallest number spreads along the links
        smallest = np.minimum(groups, np.where(linked, groups[None, :], len(counts)).min(axis=1))
        if np.array_equal(smallest, groups):
            break
        groups = smallest
    return groups


def cross_fitted_accuracy(targets: np.ndarray, predicted: np.ndarray, classes: int, threshold: float) -> float:
    """Return the accuracy with groups found on one half of the rows and scored on the other, both ways."""
    half = np.random.default_rng(0).permutation(len(targets)) % 2 == 0
    hits = 0
    for found_on in (half, ~half):
        groups = find_groups(confusion_counts(targets[found_on], predicted[found_on], classes), threshold)
        hits += (groups[targets[~found_on]] == groups[predicted[~found_on]]).sum()
    return hits / len(targets)


def confused_pairs(counts: np.ndarray, classes: list[str], latex: dict[str, str]) -> pd.DataFrame:
    """Return every pair of classes that was confused, the most common first."""
    both = np.triu(counts + counts.T, 1)
    first, second = np.nonzero(both)
    order = np.argsort(-both[first, second], kind="stable")
    first, second = first[order], second[order]
    shares = pair_shares(counts)
    return pd.DataFrame({
        "label_a": [classes[number] for number in first], "label_b": [classes[number] for number in second],
        "latex_a": [latex.get(classes[number], "") for number in first],
        "latex_b": [latex.get(classes[number], "") for number in second],
        "a_as_b": counts[first, second], "b_as_a": counts[second, first],
        "told_apart": shares[first, second].round(4)})


def list_groups(counts: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Return the groups of two classes or more: their class numbers and the errors inside, most errors first."""
    found = []
    for number in np.unique(groups[groups != np.arange(len(groups))]):
        members = np.flatnonzero(groups == number)
        inside = counts[np.ix_(members, members)]
        found.append((members, int(inside.sum() - np.trace(inside))))
    return sorted(found, key=lambda group: -group[1])


def describe_groups(found: list[tuple[np.ndarray, int]], counts: np.ndarray, names: list[str]) -> str:
    """Return a Markdown table of the groups."""
    errors = counts.sum() - np.trace(counts)
    lines = ["| group | validation rows | correct | errors inside | share of all errors |", "|---|--:|--:|--:|--:|"]
    for members, inside in found:
        rows, hits = counts[members].sum(), np.diag(counts)[members].sum()
        lines.append(f"| {' '.join(names[number] for number in members)} | {rows} | {hits / rows:.1%} | {inside} | "
                     f"{inside / errors:.1%} |")
    return "\n".join(lines)


def plot_groups(path: Path, found: list[tuple[np.ndarray, int]], counts: np.ndarray, names: list[str],
                images: np.ndarray, targets: np.ndarray) -> None:
    """Draw a row for each group, most errors first: each class, how many of its rows are correct, and examples.

    `images` [N, S, S] are ink, uint8.
    """
    found = found[:PICTURED_GROUPS]
    columns = min(PICTURED_CLASSES, max(len(members) for members, _ in found))
    figure, axes = plots.new_figure(2.4 * columns + 1, 1.2 * len(found) + 0.6, columns, len(found))
    for row, (members, inside) in zip(axes.reshape(-1, columns), found):
        for axis in row:
            axis.set_axis_off()
        for axis, number in zip(row, members):
            rows = np.flatnonzero(targets == number)
            shown = [np.pad(images[each], 2) for each in rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]]
            if shown:  # a class may have no validation row
                axis.imshow(255 - np.hstack(shown), cmap="gray", vmin=0, vmax=255)
            more = len(members) - columns if axis is row[-1] else 0
            axis.set_title(f"{names[number]}   {counts[number, number]} of {len(rows)}"
                           + (f", {more} more classes" if more > 0 else ""), fontsize=9)
        row[0].text(-0.04, 0.5, f"{inside} errors", transform=row[0].transAxes, ha="right", va="center", fontsize=10)
    figure.suptitle("Classes that are not told apart: correct rows of all; examples; errors inside the group")
    plots.save_figure(path, figure)


def report(given: argparse.Namespace) -> None:
    """Print the groups and figures, write the table and the picture."""
    folder = files.make_output_folder(given.output_dir, ["confused_pairs.csv", "confused_groups.png"])
    networks, datasets = open_validation(given.checkpoints, given)
    targets, classes = datasets[0].targets, networks[0].classes
    predicted = sum(predict_each(networks, datasets)).argmax(axis=1)
    latex = read_latex(networks[0].config, given)
    counts = confusion_counts(targets, predicted, len(classes))
    groups = find_groups(counts, given.threshold)
    found = list_groups(counts, groups)
    print(describe_groups(found, counts, [latex.get(label, label).replace("|", "\\|") for label in classes]))
    errors, inside = counts.sum() - np.trace(counts), sum(group[1] for group in found)
    print(f"{len(found)} groups of {sum(len(group[0]) for group in found)} classes hold {inside:,} of the {errors:,} "
          f"errors ({inside / max(errors, 1):.1%}) on {len(targets):,} validation rows")
    print(f"accuracy {(predicted == targets).mean():.2%}; with each group as one class "
          f"{(groups[predicted] == groups[targets]).mean():.2%}; with groups found on the other half of the rows "
          f"{cross_fitted_accuracy(targets, predicted, len(classes), given.threshold):.2%}")
    in_group = (groups[predicted] == groups[targets]) & (np.bincount(groups)[groups[targets]] > 1)
    commonest = {group: np.flatnonzero(groups == group)[counts.sum(axis=1)[groups == group].argmax()]
                 for group in np.unique(groups)}  # class that has the most rows
    if in_group.any():
        always = np.mean([commonest[groups[target]] == target for target in targets[in_group]])
        print(f"of {in_group.sum():,} rows put into their group {(predicted == targets)[in_group].mean():.2%} get "
              f"their class; the group's commonest class for all of them would be right for {always:.2%}")
    with files.atomic_write(folder / "confused_pairs.csv") as temporary:
        confused_pairs(counts, classes, latex).to_csv(temporary, index=False)
    if found:
        images = datasets[0].ink(np.arange(len(targets)))
        names = [(f"{drawn}  " if drawn.startswith("$") else "") + latex.get(label, label).replace("$", r"\$")
                 for label, drawn in zip(classes, plots.class_names(classes, latex))]
        plot_groups(folder / "confused_groups.png", found, counts, names, images, targets)
    print(f"wrote confused_pairs.csv{' and confused_groups.png' if found else ''} in {folder.resolve()}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.confusions", __doc__, "cache_dir", "output_dir", **OF_CHECKPOINT)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints of script.py; several are averaged")
    parser.add_argument("--threshold", type=float, default=0.75,
                        help="share below which two classes are not told apart (0.75)")
    given = parser.parse_args(argv)
    if not 0 < given.threshold <= 1:
        parser.error(f"--threshold must be above 0 and at most 1, not {given.threshold:g}")
    return exit_status(lambda _: report(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
