"""Check a competition's data before training on it.

    python -m tools.check --data-dir COMPETITION --output-dir .

Reads both tables and every image, and prints what it finds: images that cannot be used; rows that name one image
twice; images with equal pixels, in one table or in both, and those of them whose labels differ; blank images; classes
too small to be validated; and clues that give the label away without the picture. The clues are each column beside the
label, the number in the file's name, its folder and the row's place. Each is tried alone: by the label of the 3 nearest
other rows, and by the most common label of the rows with an equal value, in five folds. If a clue is right much more
often than the most common class, the network must not see it, and rows may have to be grouped before they are split.
(The file's size is not tried: it follows from the picture.)

Writes same_images.csv, a line for each image that has a copy. The exit status is 1 if images cannot be used.
"""

import argparse
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

import script
from pipeline import files, tables
from pipeline.cli import pick
from pipeline.errors import UsageError
from pipeline.images import LoadSettings, estimate_image_statistics, load_images
from pipeline.signals import exit_status
from pipeline.splits import SMALLEST_CLASS_TO_SPLIT, image_digests
from pipeline.submission import check_sample_submission
from tools.common import make_parser

LEAST_INK = 4       # pixels darker than half; an image with fewer is blank
LEAST_CONTRAST = 32  # grey levels between the lightest and the darkest pixel; an image with less is blank
GIVEN_AWAY = 0.1    # share of the rows by which a clue must beat the most common class to be reported


def find_same_images(parts: list[tuple[str, tables.Table, np.ndarray]]) -> pd.DataFrame:
    """Return a row for each usable image that has a copy: group, table, row, image and label."""
    rows = []
    for name, table, images in parts:
        usable = table.usable_rows
        rows.append(pd.DataFrame({
            "pixels": image_digests(images[usable]), "table": name, "row": table.rows.index[usable],
            "image": table.rows.image_path.iloc[usable] if "image_path" in table.rows else "",
            "label": table.rows.label.iloc[usable] if "label" in table.rows else ""}))
    found = pd.concat(rows, ignore_index=True)
    found = found[found.pixels.duplicated(keep=False)]
    found.insert(0, "group", found.pixels.factorize()[0] + 1)
    return found.drop(columns="pixels").sort_values(["group", "table", "row"], ascending=[True, False, True])


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


def describe_blank(part: str, table: tables.Table, images: np.ndarray) -> list[str]:
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


def find_clues(table: tables.Table) -> pd.DataFrame:
    """Return what could give the label away without the picture, as numbers: a column each, for each row of a table."""
    found = {"the row's place in the table": np.arange(len(table), dtype=float)}
    if table.path.startswith("torchvision:"):
        return pd.DataFrame(found)
    if "image_path" in table.rows:
        names = table.rows.image_path
        stems = names.str.rpartition("/")[2].str.replace(r"\.\w+$", "", regex=True)
        numbers = stems.str.extract(r"(\d{1,15})\D*$", expand=False)  # the last one: many names begin with a version
        if numbers.notna().any():
            found["the number in the file's name"] = pd.to_numeric(numbers).fillna(-1).to_numpy(dtype=float)
        found["the file's folder"] = names.str.rpartition("/")[0].factorize()[0]
    whole = tables.read_csv(Path(table.path), ("label",), skip_blank_lines=table.pixels is not None,
                            usecols=lambda name: not re.fullmatch(tables.PIXEL, name.strip()))
    whole.columns = whole.columns.str.strip()
    whole = whole.loc[:, ~whole.columns.duplicated()]
    for name in whole.columns.drop(["label", "image_path"], errors="ignore"):
        column = whole[name].iloc[: len(table)]
        numbers = pd.to_numeric(column, errors="coerce").astype(float)
        found[f"the column {name}"] = numbers if np.isfinite(numbers).all() else column.factorize()[0]
    return pd.DataFrame(found).reset_index(drop=True)


def describe_clues(found: pd.DataFrame, labels: pd.Series) -> list[str]:
    """Return a line for each clue that predicts more rows than the most common class does."""
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


def check(given: argparse.Namespace) -> int:
    """Print all findings. Return the number of images that cannot be used."""
    names = ("data_dir", "train_csv", "test_csv", "root_dir", "cache_dir", "image_size")
    try:
        config = script.Config(**{name: getattr(given, name) for name in names}, on_bad_image="skip")
    except ValueError as error:
        raise UsageError(str(error)) from None
    files.check_not_overwritten(given.output_dir, ["same_images.csv"], config.inputs)
    files.make_output_folder(given.output_dir, ["same_images.csv"])
    train, test = tables.read_train_table(config.train_source), tables.read_test_table(config.test_source)
    classes = tables.sort_classes(train.rows.label)
    check_sample_submission(config.test_source.path.with_name("sample_submission.csv"), test, classes)
    statistics = estimate_image_statistics(train, config.image_size)
    images = load_images([train, test], statistics, pick(LoadSettings, config))
    print(tables.describe_classes(train, classes, SMALLEST_CLASS_TO_SPLIT, "too few rows to be validated"))
    parts = list(zip(("train", "test"), (train, test), images))
    bad = sum(len(table.bad_rows) for _, table, _ in parts)
    print(f"{sum(map(len, images)):,} images, {bad:,} of them cannot be used" + (" (listed above)" if bad else ""))
    found = find_same_images(parts)
    with files.atomic_write(given.output_dir / "same_images.csv") as temporary:
        found.to_csv(temporary, index=False)
    lines = describe_same(found) if len(found) else ["no two images have equal pixels"]
    for part in parts:
        lines += describe_blank(*part)
    print("\n".join(lines), flush=True)
    print("\n".join(describe_clues(find_clues(train), train.rows.label)))
    print(f"wrote same_images.csv in {given.output_dir.resolve()}")
    return bad


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.check", __doc__, "data_dir", "train_csv", "test_csv", "root_dir", "cache_dir",
                         "output_dir")
    parser.add_argument("--image-size", type=int, default=48, help="larger images are compared at this size (48)")
    given, bad = parser.parse_args(argv), []
    status = exit_status(lambda _: bad.append(check(given)), "nothing was written")
    return status or int(bad[0] > 0)


if __name__ == "__main__":
    sys.exit(main())
