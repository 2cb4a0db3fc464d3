"""Check a competition's data before training on it.

    python -m tools.check --data-dir COMPETITION --output-dir .

Reads both tables and every image, and prints what it finds: images that cannot be used; rows that name one image
twice; images with equal pixels, in one table or in both, and those of them whose labels differ; blank images; classes
too small to be validated; whether test images are of another kind than training images; and clues that give the label
away without the picture. The clues are each column beside the label, the number in the file's name, its folder and the
row's place. Each is tried alone: by the label of the 3 nearest other rows, and by the most common label of the rows
with an equal value, in five folds. If a clue is right much more often than the most common class, the network must not
see it, and rows may have to be grouped before they are split. (The file's size is not tried: it follows from the
picture.)

Adversarial validation: gradient-boosted trees learn to tell test from training images, in folds, by coarse pixels and
by measures of the strokes such as ink, width, bounding box and grey levels. The AUC of the rows left out is 0.5 for
images of one kind; above it, the accuracy on validation rows may not be that on the test rows.

Writes same_images.csv, a line for each image that has a copy, and check_shift.png, the test and training images that
the trees are surest of. With `--test-csv none` the training table is checked alone. The exit status is 1 if images
cannot be used.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from pipeline import files, packed, plots, tables
from pipeline.cli import pick
from pipeline.csv_tables import read_csv
from pipeline.images import LoadSettings, estimate_image_statistics, load_images
from pipeline.pixel_tables import find_pixels
from pipeline.signals import exit_status
from pipeline.sources import Table, TableSource
from pipeline.splits import SMALLEST_CLASS_TO_SPLIT, image_digests
from pipeline.submission import submission_form
from tools.common import OF_TABLES, make_parser, table_config

LEAST_INK = 4       # pixels darker than half; an image with fewer is blank
LEAST_CONTRAST = 32  # grey levels between the lightest and the darkest pixel; an image with less is blank
GIVEN_AWAY = 0.1    # share of the rows by which a clue must beat the most common class to be reported
WRITTEN = ["same_images.csv", "check_shift.png"]

# Of the comparison of training and test images.
FEWEST_TO_COMPARE = 20   # images of each table
MOST_TO_COMPARE = 5000   # images of each table; of more, so many random ones
COARSE = 8               # side of the coarse pixels
SHOWN = 30               # images of each table that are drawn
SLIGHT, CLEAR = 0.6, 0.8  # AUC from which the images differ somewhat, and clearly

Part = tuple[str, Table, np.ndarray]  # name of a table, the table, its images [N, 1, S, S]


def find_same_images(parts: list[Part]) -> pd.DataFrame:
    """Return a row for each usable image that has a copy: group, table, row, image and label."""
    rows = []
    for name, table, images in parts:
        usable = table.usable_rows
        rows.append(pd.DataFrame({
            "pixels": image_digests(images[usable]), "table": name, "place": usable, "row": table.rows.index[usable],
            "image": table.rows.image_path.iloc[usable] if "image_path" in table.rows else "",
            "label": table.rows.label.iloc[usable] if "label" in table.rows else ""}))
    found = pd.concat(rows, ignore_index=True)
    found = found[found.pixels.duplicated(keep=False)]
    found.insert(0, "group", found.pixels.factorize()[0] + 1)
    found = found.sort_values(["group", "table", "place"], ascending=[True, False, True])
    return found.drop(columns=["pixels", "place"])


def describe_same(found: pd.DataFrame) -> list[str]:
    """Return a line for each thing that the equal images mean."""
    groups = found.groupby("group")
    train = found[found.table == "train"].groupby("group")
    both = groups.table.nunique() > 1
    conflicting = train.label.nunique()
    conflicting = conflicting[conflicting > 1]
    lines = [f"{len(groups):,} groups of images with equal pixels, {len(found):,} images in all; "
             f"{(train.size() > 1).sum():,} groups have several in the training table, {both.sum():,} are in both"]
    if both.any():
        lines.append("warning: some test images are in the training table with their label: their answer is known, and "
                     "says nothing about how well a network does on others")
    if len(conflicting):
        first = found[(found.group == conflicting.index[0]) & (found.table == "train")]
        rows = found[found.group.isin(conflicting.index) & (found.table == "train")]
        fewer = len(rows) - rows.groupby("group").label.agg(lambda labels: labels.value_counts().iloc[0]).sum()
        lines.append(f"warning: {len(conflicting):,} groups have different labels in the training table ({len(rows):,} "
                     f"rows, {fewer:,} of them without their group's most common label), such as rows "
                     f"{', '.join(map(str, first.row[:3]))} with {', '.join(map(repr, first.label.unique()[:3]))}: no "
                     "network can predict all of them")
    return lines


def describe_blank(part: str, table: Table, images: np.ndarray) -> list[str]:
    """Return a line if some usable images are blank."""
    ink, contrast = (images > 127).sum(axis=(1, 2, 3)), np.ptp(images.reshape(len(images), -1), axis=1)
    side = images.shape[-1]
    blank = (ink < LEAST_INK) | (ink > side * side - LEAST_INK) | (contrast < LEAST_CONTRAST)
    blank[table.bad_rows] = False
    if not blank.any():
        return []
    rows = ", ".join(map(str, table.rows.index[blank][:5]))
    return [f"warning: {blank.sum():,} images of the {part} table are blank, or nearly so (rows {rows}"
            f"{', ...' if blank.sum() > 5 else ''})"]


def find_clues(table: Table, source: TableSource) -> pd.DataFrame:
    """Return what could give the label away without the picture, as numbers: a column each, for each row of a table."""
    found = {}
    if not source.path.is_dir():  # whose files are sorted, by folders that are named after the labels
        found["the row's place in the table"] = np.arange(len(table), dtype=float)
    if "image_path" in table.rows:
        names = table.rows.image_path
        stems = names.str.rpartition("/")[2].str.replace(r"\.\w+$", "", regex=True)
        numbers = stems.str.extract(r"(\d{1,15})\D*$", expand=False)  # the last one: many names begin with a version
        if numbers.notna().any():
            found["the number in the file's name"] = pd.to_numeric(numbers).fillna(-1).to_numpy(dtype=float)
        if not source.path.is_dir():
            found["the file's folder"] = names.str.rpartition("/")[0].factorize()[0]
    for name, column in other_columns(table, source).items():
        numbers = pd.to_numeric(column, errors="coerce").astype(float)
        found[f"the column {name}"] = numbers if np.isfinite(numbers).all() else column.factorize()[0]
    return pd.DataFrame({name: np.asarray(values) for name, values in found.items()})


def other_columns(table: Table, source: TableSource) -> pd.DataFrame:
    """Return the columns of a CSV beside label, image path and pixels, as text, for each row of its table."""
    if packed.is_packed(source) or source.path.is_dir():
        return pd.DataFrame()
    label, columns = table.submission_columns[1], find_pixels(source, "label")
    if columns:
        label = columns.label or label
        whole = read_csv(source.path, (label,), skip_blank_lines=True, header=0 if columns.has_header else None,
                         names=columns.names, usecols=list(columns.others))
    else:
        whole = read_csv(source.path, (label,))
        whole.columns = whole.columns.str.strip()
    whole = whole.loc[:, ~whole.columns.duplicated()].iloc[: len(table)].drop(columns=label, errors="ignore")
    paths = table.rows.get("written_path", table.rows.get("image_path", pd.Series(dtype=str))).to_list()
    return whole.loc[:, [whole[name].to_list() != paths for name in whole]]


def describe_clues(found: pd.DataFrame, labels: pd.Series) -> list[str]:
    """Return a line for each clue that predicts more rows than the most common class does."""
    if found.empty:
        return ["nothing beside the pictures could give the label away"]
    targets, lines = labels.factorize()[0], []
    chance = np.bincount(targets).max() / len(targets)
    folds = KFold(min(5, len(targets)), shuffle=True, random_state=0)
    # At most as many neighbours as the smallest training part has rows.
    nearest = KNeighborsClassifier(min(3, len(targets) - -(-len(targets) // folds.n_splits)))
    for name, values in found.items():
        if values.nunique() < 2:
            continue
        numbers = values.to_numpy(dtype=float)
        with warnings.catch_warnings(action="ignore"):  # scikit-learn takes many classes for a regression
            answers = cross_val_predict(nearest, numbers[:, None], targets, cv=folds)
        share = max((answers == targets).mean(), share_of_equals(numbers, targets, folds))
        if share > chance + GIVEN_AWAY:
            lines.append(f"warning: {name} gives the label away: alone it is right for {share:.1%} of the training "
                         f"rows (the most common class: {chance:.1%}); do not use it as an input: a new table may not "
                         "have it")
    return lines or [f"no clue beside the pictures was found (tried: {', '.join(found)})"]


def share_of_equals(values: np.ndarray, targets: np.ndarray, folds: KFold) -> float:
    """Return the accuracy of the most common label among the other folds' rows of equal value.

    Of hundreds of rows with equal values, the nearest three are arbitrary.
    """
    correct, values = 0, pd.factorize(values)[0]
    for known, asked in folds.split(values):
        counts = pd.DataFrame({"value": values[known], "target": targets[known]}).value_counts().reset_index()
        most_common = counts.drop_duplicates("value").set_index("value").target
        correct += (most_common.reindex(values[asked]).to_numpy() == targets[asked]).sum()
    return correct / len(targets)


def measure_images(images: np.ndarray) -> np.ndarray:
    """Return features [N, F] of images [N, S, S], uint8, by which kinds of images can be told apart.

    They are coarse pixels, ink, length of the edges, width of the strokes, share and contrast of grey levels, centre,
    extent and slant of the ink, and its bounding box.
    """
    ink, dark, side = images.astype(np.float32) / 255, images > 127, images.shape[1]
    cuts = np.linspace(0, side, min(COARSE, side) + 1).astype(int)
    coarse = np.add.reduceat(np.add.reduceat(ink, cuts[:-1], axis=1), cuts[:-1], axis=2)
    coarse /= np.outer(np.diff(cuts), np.diff(cuts))
    total, area, line = ink.sum(axis=(1, 2)) + 1e-6, dark.sum(axis=(1, 2)), np.arange(side, dtype=np.float32)
    edges = sum(np.diff(dark, axis=axis).sum(axis=(1, 2)) for axis in (1, 2))
    strokes = [area, total, edges, 2 * area / np.maximum(edges, 1), ((images > 32) & (images < 223)).mean(axis=(1, 2)),
               ink.max(axis=(1, 2)), ink.std(axis=(1, 2)), *(np.abs(np.diff(ink, axis=axis)).mean(axis=(1, 2))
                                                            for axis in (1, 2))]
    weights = [ink.sum(axis=2) / total[:, None], ink.sum(axis=1) / total[:, None]]  # of rows, of columns
    centre = [part @ line for part in weights]
    extent = [part @ line**2 - middle**2 for part, middle in zip(weights, centre)]
    slant = np.einsum("nyx,y,x->n", ink, line, line, optimize=True) / total - centre[0] * centre[1]
    box = []
    for axis in (1, 2):
        inked = dark.any(axis=axis)
        first, last = inked.argmax(axis=1), side - inked[:, ::-1].argmax(axis=1)
        box += [first, last, last - first]
    return np.column_stack([coarse.reshape(len(ink), -1), *strokes, *centre, *extent, slant, *box])


def tell_apart(train: np.ndarray, test: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the cross-validated AUC of a classifier of training and test images [N, S, S], and the probability of
    being a test image that it gives to each, training images first, when it was trained on others."""
    features = np.concatenate([measure_images(train), measure_images(test)])
    is_test = np.repeat([0, 1], [len(train), len(test)])
    trees = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=15, learning_rate=0.15, min_samples_leaf=10,
                                           class_weight="balanced", early_stopping=False, random_state=0)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    scores = cross_val_predict(trees, features, is_test, cv=folds, method="predict_proba")[:, 1]
    parts = [own for _, own in folds.split(features, is_test)]  # scores of two folds are of two classifiers
    return float(np.mean([roc_auc_score(is_test[own], scores[own]) for own in parts])), scores


def auc_error(train_count: int, test_count: int) -> float:
    """Return the error of the AUC of images that do not differ: two standard errors of Mann and Whitney's statistic, by
    1.35, since the AUCs of small folds vary more (measured on 40 draws of 20 to 400 images)."""
    return 2.7 * float(np.sqrt((train_count + test_count + 1) / (12 * train_count * test_count)))


def describe_shift(auc: float, error: float, counts: tuple[int, int]) -> str:
    """Return one line: the AUC of training against test images with its error, and what it means."""
    text = (f"adversarial validation: a classifier of {counts[0]:,} training and {counts[1]:,} test images has AUC "
            f"{auc:.2f} +- {error:.2f}")
    if auc - error <= 0.5:
        return f"{text}: they cannot be told apart"
    if auc - error <= SLIGHT:
        return f"{text}: they differ slightly"
    extent = "clearly differ" if auc - error > CLEAR else "differ"
    return (f"warning: {text}: they {extent}, so the accuracy on validation rows may not be that on the test rows; "
            "check_shift.png shows the images that it is surest of")


def compare_parts(train: Part, test: Part, folder: Path) -> str:
    """Return a line about the difference of training and test images, and draw those least like the other table."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(table.usable_rows)[:MOST_TO_COMPARE] for _, table, _ in (train, test)]
    counts = len(rows[0]), len(rows[1])
    if min(counts) < FEWEST_TO_COMPARE:
        return (f"{counts[0]:,} training and {counts[1]:,} test images are too few to be compared: {FEWEST_TO_COMPARE} "
                "of each are needed")
    images = [part[2][own, 0] for part, own in zip((train, test), rows)]
    auc, scores = tell_apart(*images)
    surest = [scores[counts[0]:], 1 - scores[: counts[0]]]
    draw_surest(folder / "check_shift.png", auc, (test, train), rows[::-1], images[::-1], surest)
    return describe_shift(auc, auc_error(*counts), counts)


def draw_surest(path: Path, auc: float, parts: tuple[Part, Part], rows: list[np.ndarray], images: list[np.ndarray],
                scores: list[np.ndarray]) -> None:
    """Draw the images of the test table, then those of the training table, whose own table is surest."""
    shown, texts, colours = [], [], []
    for (_, table, _), own, inks, sure, colour in zip(parts, rows, images, scores, (plots.RED, plots.BLUE)):
        best = np.argsort(-sure, kind="stable")[: min(SHOWN, len(sure) // 10 * 10)]
        shown += list(inks[best])
        texts += [f"{str(table.rows.index[own[place]])[-10:]}: {sure[place]:.0%}".replace("$", r"\$") for place in best]
        colours += [colour] * len(best)
    plots.plot_images(path, "Test images (red) and training images (blue) that a classifier is surest of, with row and "
                      f"probability; AUC {auc:.2f}", np.stack(shown), texts, colours)


def check(given: argparse.Namespace) -> int:
    """Print all findings. Return the number of images that cannot be used."""
    config = table_config(given, on_bad_image="skip", image_size=given.image_size)
    files.check_not_overwritten(given.output_dir, WRITTEN, config.inputs)
    for name in WRITTEN:  # those of an earlier check
        (files.make_output_folder(given.output_dir, WRITTEN) / name).unlink(missing_ok=True)
    read = {"train": tables.read_train_table(config.train_source)}
    classes = tables.sort_classes(read["train"].rows.label)
    if config.test_source:
        read["test"] = tables.read_test_table(config.test_source)
        submission_form(read["test"], classes)
    statistics = estimate_image_statistics(read["train"], config.image_size)
    images = load_images(list(read.values()), statistics, pick(LoadSettings, config))
    print(tables.describe_classes(read["train"], classes, SMALLEST_CLASS_TO_SPLIT, "too few rows to be validated"))
    parts = list(zip(read, read.values(), images))
    bad = sum(len(table.bad_rows) for table in read.values())
    print(f"{sum(map(len, images)):,} images, {bad:,} of them cannot be used" + (" (listed above)" if bad else ""))
    found = find_same_images(parts)
    with files.atomic_write(given.output_dir / "same_images.csv") as temporary:
        found.to_csv(temporary, index=False)
    lines = describe_same(found) if len(found) else ["no two images have equal pixels"]
    for part in parts:
        lines += describe_blank(*part)
    print("\n".join(lines), flush=True)
    if config.test_source:
        print(compare_parts(*parts, given.output_dir), flush=True)
    print("\n".join(describe_clues(find_clues(read["train"], config.train_source), read["train"].rows.label)))
    written = [name for name in WRITTEN if (given.output_dir / name).exists()]
    print(f"wrote {' and '.join(written)} in {given.output_dir.resolve()}")
    return bad


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.check", __doc__, *OF_TABLES, "output_dir")
    parser.add_argument("--image-size", type=int, default=48, help="larger images are compared at this size (48)")
    given, bad = parser.parse_args(argv), []
    status = exit_status(lambda _: bad.append(check(given)), "nothing was written")
    return status or int(bad[0] > 0)


if __name__ == "__main__":
    sys.exit(main())
