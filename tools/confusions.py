"""Which classes a trained network cannot tell apart, and how good it is where that does not count.

    python -m tools.confusions out/best_model.pth --data-dir competition
    python -m tools.confusions a.pth b.pth c.pth --data-dir competition --output-dir out

Predicts the validation rows of the checkpoints' own split (several checkpoints are averaged), prints the groups of
classes that are not told apart, and writes confused_pairs.csv (every one) and confused_groups.png (drawn).

The rule: of a class's rows that are predicted as it or as one other class, take the share that is right, with two hits
added, so that a handful of rows proves nothing. Two classes are not told apart where the mean of their two shares is
below `--threshold` (0.75; guessing gives 0.5); classes linked by such pairs form a group. The mean of two shares, not
the share of all rows of both, since a network that always answers the larger class does not tell them apart.

A group counts as one class in "accuracy with groups". Groups found on the very rows that they are scored on would
flatter it: they are found on one half of the validation rows and scored on the other half, both ways, as well.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import script

PICTURED_GROUPS, PICTURED_CLASSES, EXAMPLES = 16, 6, 3


def confusion_counts(targets: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How many rows of each class (first axis) were predicted as each class: int [classes, classes]."""
    return np.bincount(targets * classes + predicted, minlength=classes**2).reshape(classes, classes)


def pair_shares(counts: np.ndarray) -> np.ndarray:
    """How well each two classes are told apart: the mean of their two shares of hits, [classes, classes].

    Each share is of a class's rows that are predicted as one of the two, with two hits added.
    """
    hits = np.diag(counts)[:, None] + 2
    shares = hits / (hits + counts)
    return (shares + shares.T) / 2


def find_groups(counts: np.ndarray, threshold: float) -> np.ndarray:
    """A group number for every class, int [classes]: the smallest class number in it; alone, the class's own."""
    linked = pair_shares(counts) < threshold
    groups = np.arange(len(counts))
    for _ in range(len(counts)):  # the smallest number walks along the links
        smallest = np.minimum(groups, np.where(linked, groups[None, :], len(counts)).min(axis=1))
        if np.array_equal(smallest, groups):
            break
        groups = smallest
    return groups


def cross_fitted_accuracy(targets: np.ndarray, predicted: np.ndarray, classes: int, threshold: float) -> float:
    """Accuracy with groups that were found on other rows than those they are scored on: two halves, both ways."""
    half = np.random.default_rng(0).permutation(len(targets)) % 2 == 0
    hits = 0
    for found_on in (half, ~half):
        groups = find_groups(confusion_counts(targets[found_on], predicted[found_on], classes), threshold)
        hits += (groups[targets[~found_on]] == groups[predicted[~found_on]]).sum()
    return hits / len(targets)


def confused_pairs(counts: np.ndarray, classes: list[str], symbols: dict[str, str]) -> pd.DataFrame:
    """Every pair of classes that was confused, the commonest first."""
    both = np.triu(counts + counts.T, 1)
    first, second = np.nonzero(both)
    order = np.argsort(-both[first, second], kind="stable")
    first, second = first[order], second[order]
    shares = pair_shares(counts)
    return pd.DataFrame({
        "label_a": [classes[number] for number in first], "label_b": [classes[number] for number in second],
        "latex_a": [symbols.get(classes[number], "") for number in first],
        "latex_b": [symbols.get(classes[number], "") for number in second],
        "a_as_b": counts[first, second], "b_as_a": counts[second, first],
        "told_apart": shares[first, second].round(4)})


def list_groups(counts: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """The groups of two classes or more: their class numbers and the errors inside, most errors first."""
    found = []
    for number in np.unique(groups[groups != np.arange(len(groups))]):
        members = np.flatnonzero(groups == number)
        inside = counts[np.ix_(members, members)]
        found.append((members, int(inside.sum() - np.trace(inside))))
    return sorted(found, key=lambda group: -group[1])


def describe_groups(found: list[tuple[np.ndarray, int]], counts: np.ndarray, names: list[str]) -> str:
    """A Markdown table of the groups."""
    errors = counts.sum() - np.trace(counts)
    lines = ["| group | validation rows | right | errors inside | share of all errors |", "|---|--:|--:|--:|--:|"]
    for members, inside in found:
        rows, hits = counts[members].sum(), np.diag(counts)[members].sum()
        lines.append(f"| {' '.join(names[number] for number in members)} | {rows} | {hits / rows:.1%} | {inside} | "
                     f"{inside / errors:.1%} |")
    return "\n".join(lines)


def plot_groups(path: Path, found: list[tuple[np.ndarray, int]], counts: np.ndarray, names: list[str],
                images: np.ndarray, targets: np.ndarray) -> None:
    """A row for each group, most errors first: each class's symbol, how many of its rows are right, and examples."""
    found = found[:PICTURED_GROUPS]
    columns = min(PICTURED_CLASSES, max(len(members) for members, _ in found))
    figure, axes = script.new_figure(2.4 * columns + 1, 1.2 * len(found) + 0.6, columns, len(found))
    for row, (members, inside) in zip(axes.reshape(-1, columns), found):
        for axis in row:
            axis.set_axis_off()
        for axis, number in zip(row, members):
            rows = np.flatnonzero(targets == number)
            shown = [np.pad(images[each, 0], 2) for each in rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]]
            if shown:  # a class may have no validation row
                axis.imshow(255 - np.hstack(shown), cmap="gray", vmin=0, vmax=255)
            more = len(members) - columns if axis is row[-1] else 0
            axis.set_title(f"{names[number]}   {counts[number, number]} of {len(rows)}"
                           + (f", {more} classes more" if more > 0 else ""), fontsize=9)
        row[0].text(-0.04, 0.5, f"{inside} errors", transform=row[0].transAxes, ha="right", va="center", fontsize=10)
    figure.suptitle("Classes that are not told apart: rows that are right, of all; examples; errors inside the group")
    script.save_figure(path, figure)


def report(given: argparse.Namespace) -> None:
    """Print the groups and figures, write the table and the picture."""
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir, output_dir=given.output_dir)
    folder, members = script.output_folder(config), script.look_at_members(given.checkpoints)
    runtime = script.runtime_of(members, config)
    question, targets = script.validation_question(members, config, runtime)
    probabilities = script.ensemble_of_files(members, question)
    classes, predicted = members[0].classes, probabilities.argmax(axis=1)
    symbols = script.read_symbols(script.settings_of_labelled_table(members[0].config, config))
    counts = confusion_counts(targets, predicted, len(classes))
    groups = find_groups(counts, given.threshold)
    found = list_groups(counts, groups)
    print(describe_groups(found, counts, [symbols.get(label, label).replace("|", "\\|") for label in classes]))
    errors, inside = counts.sum() - np.trace(counts), sum(group[1] for group in found)
    print(f"{len(found)} groups of {sum(len(group[0]) for group in found)} classes hold {inside:,} of the {errors:,} "
          f"errors ({inside / max(errors, 1):.1%}) on {len(targets):,} validation rows")
    print(f"accuracy {(predicted == targets).mean():.2%}; with each group as one class "
          f"{(groups[predicted] == groups[targets]).mean():.2%}; with groups found on the other half of the rows "
          f"{cross_fitted_accuracy(targets, predicted, len(classes), given.threshold):.2%}")
    with script.whole_file(folder / "confused_pairs.csv") as temporary:
        confused_pairs(counts, classes, symbols).to_csv(temporary, index=False)
    if found:
        images = question.dataset(members[0].statistics).images.cpu().numpy()
        names = [(f"{drawn}  " if drawn.startswith("$") else "") + symbols.get(label, label).replace("$", r"\$")
                 for label, drawn in zip(classes, script.symbol_texts(classes, symbols))]
        plot_groups(folder / "confused_groups.png", found, counts, names, images, targets)
    print(f"wrote confused_pairs.csv{' and confused_groups.png' if found else ''} in {folder.resolve()}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.confusions", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints of script.py; several are averaged")
    parser.add_argument("--data-dir", default=".", help="folder of the table that they were trained on")
    parser.add_argument("--cache-dir", default="", help="folder of the decoded images, as for script.py")
    parser.add_argument("--output-dir", default=".", help="folder of confused_pairs.csv and confused_groups.png")
    parser.add_argument("--threshold", type=float, default=0.75, help="share below which two classes are one (0.75)")
    given = parser.parse_args(argv)
    if not 0 < given.threshold <= 1:
        parser.error(f"--threshold must be above 0 and at most 1, not {given.threshold:g}")
    return script.exit_status(lambda _: report(given), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
