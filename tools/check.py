"""Say what is wrong with a competition's data before hours are spent on it.

    python -m tools.check --data-dir COMPETITION --output-dir .

Looks at both tables and every image, and prints what it finds: images that cannot be used; rows that name one image
twice; images with the same pixels, in one table or in both, and those of them whose labels differ; images with hardly
anything on them; classes too small to be validated; and what gives the label away without the picture. For the last,
each column beside the label, the number in the file's name, its folder and the row's place are each asked alone: the
label of the most similar other rows (3 nearest, in five folds) is its answer. Where that is right much more often than
always naming the commonest class, a network must not see it, and rows may have to be grouped before they are split.
(A file's size is not asked: it follows from the picture.) Needs the package scikit-learn.

Writes same_images.csv, a line for each image that another equals. The exit status is 1 where images cannot be used.
"""

import argparse
import dataclasses
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

import script

LEAST_INK = 4       # pixels darker than half: fewer are hardly a drawing
LEAST_CONTRAST = 32  # grey levels between the lightest and the darkest pixel
GIVEN_AWAY = 0.1    # share of the rows that a column must answer beyond the commonest class, to be named


def same_images(tables: list[tuple[str, script.Table, np.ndarray]]) -> pd.DataFrame:
    """A row for each usable image whose pixels another one has too: group, table, row, image and label."""
    parts = []
    for part, table, images in tables:
        usable = np.setdiff1d(np.arange(len(table)), table.bad)
        parts.append(pd.DataFrame({
            "pixels": script.fingerprints(images[usable]), "table": part, "row": table.rows.index[usable],
            "image": table.rows.image_path.iloc[usable] if "image_path" in table.rows else "",
            "label": table.rows.label.iloc[usable] if "label" in table.rows else ""}))
    found = pd.concat(parts, ignore_index=True)
    found = found[found.pixels.duplicated(keep=False)]
    found.insert(0, "group", found.pixels.factorize()[0] + 1)
    return found.drop(columns="pixels").sort_values(["group", "table", "row"], ascending=[True, False, True])


def describe_same(found: pd.DataFrame) -> list[str]:
    """What the equal images mean, a line each."""
    groups = found.groupby("group")
    train = found[found.table == "train"].groupby("group")
    both = groups.table.nunique() > 1
    torn = train.label.nunique()
    torn = torn[torn > 1]
    lines = [f"{len(groups):,} groups of images with the same pixels, {len(found):,} images in all; "
             f"{(train.size() > 1).sum():,} groups have several in the training table, {both.sum():,} are in both"]
    if both.any():
        lines.append("warning: an image of the test table stands with its label in the training table: its answer is "
                     "known, and says nothing of how well a network does on others")
    if len(torn):
        first = found[(found.group == torn.index[0]) & (found.table == "train")]
        rows = found[found.group.isin(torn.index) & (found.table == "train")]
        fewer = len(rows) - rows.groupby("group").label.agg(lambda labels: labels.value_counts().iloc[0]).sum()
        lines.append(f"warning: {len(torn):,} groups have different labels in the training table ({len(rows):,} rows, "
                     f"{fewer:,} of them not with their group's commonest label), such as rows "
                     f"{', '.join(map(str, first.row[:3]))} with {', '.join(map(repr, first.label.unique()[:3]))}: no "
                     "network can get them all right")
    return lines


def describe_blank(part: str, table: script.Table, images: np.ndarray) -> list[str]:
    """A line if some usable images show hardly anything."""
    ink, contrast = (images > 127).sum(axis=(1, 2, 3)), np.ptp(images.reshape(len(images), -1), axis=1)
    side = images.shape[-1]
    blank = (ink < LEAST_INK) | (ink > side * side - LEAST_INK) | (contrast < LEAST_CONTRAST)
    blank[table.bad] = False
    if not blank.any():
        return []
    rows = ", ".join(map(str, table.rows.index[blank][:5]))
    return [f"warning: {blank.sum():,} images of the {part} table show hardly anything (rows {rows}"
            f"{', ...' if blank.sum() > 5 else ''})"]


def clues(table: script.Table) -> pd.DataFrame:
    """What could give the label away without the picture, as numbers: a column each, a row for each of the table's."""
    found = {"the row's place in the table": np.arange(len(table), dtype=float)}
    if table.path.startswith("torchvision:"):
        return pd.DataFrame(found)
    names = table.rows.image_path if "image_path" in table.rows else None
    if names is not None:
        stems = names.str.rpartition("/")[2].str.replace(r"\.\w+$", "", regex=True)
        numbers = stems.str.extract(r"(\d{1,15})\D*$", expand=False)  # the last one: many names start with a version's
        if numbers.notna().any():
            found["the number in the file's name"] = pd.to_numeric(numbers).fillna(-1).to_numpy(dtype=float)
        found["the file's folder"] = names.str.rpartition("/")[0].factorize()[0]
    whole = script.read_csv(Path(table.path), ("label",), skip_blank_lines=table.pixels is not None,
                            usecols=lambda name: not re.fullmatch(script.PIXEL, name.strip()))
    whole.columns = whole.columns.str.strip()
    whole = whole.loc[:, ~whole.columns.duplicated()]
    for name in whole.columns.drop(["label", "image_path"], errors="ignore"):
        column = whole[name].iloc[: len(table)]
        numbers = pd.to_numeric(column, errors="coerce").astype(float)
        found[f"the column {name}"] = numbers if np.isfinite(numbers).all() else column.factorize()[0]
    return pd.DataFrame(found).reset_index(drop=True)


def describe_clues(found: pd.DataFrame, labels: pd.Series) -> list[str]:
    """A line for each clue that answers more rows than the commonest class does."""
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    targets, lines = labels.factorize()[0], []
    chance = np.bincount(targets).max() / len(targets)
    folds = KFold(min(5, len(targets)), shuffle=True, random_state=0)
    nearest = KNeighborsClassifier(min(3, len(targets) - -(-len(targets) // folds.n_splits)))  # of those to learn from
    for name, values in found.items():
        if values.nunique() < 2:
            continue
        numbers = values.to_numpy(dtype=float)
        with warnings.catch_warnings(action="ignore"):  # scikit-learn takes many classes for a mistake
            answers = cross_val_predict(nearest, numbers[:, None], targets, cv=folds)
        share = max((answers == targets).mean(), share_of_equals(numbers, targets, folds))
        if share > chance + GIVEN_AWAY:
            lines.append(f"warning: {name} gives the label away: alone it is right for {share:.1%} of the training "
                         f"rows (always the commonest class: {chance:.1%}); it must be no input, and a new table may "
                         "not have it")
    return lines or [f"nothing beside the pictures was found to give the label away (asked: {', '.join(found)})"]


def share_of_equals(values: np.ndarray, targets: np.ndarray, folds) -> float:
    """How often the commonest label of the other folds' rows of equal value is right: of a few values, what they tell.

    The nearest three of hundreds of equal ones are any three.
    """
    right, values = 0, pd.factorize(values)[0]
    for known, asked in folds.split(values):
        counts = pd.DataFrame({"value": values[known], "target": targets[known]}).value_counts().reset_index()
        commonest = counts.drop_duplicates("value").set_index("value").target
        right += (commonest.reindex(values[asked]).to_numpy() == targets[asked]).sum()
    return right / len(targets)


def check(given: argparse.Namespace) -> int:
    """Print all findings; gives how many images cannot be used."""
    if not importlib.util.find_spec("sklearn"):
        raise script.UsageError("the check needs a package that is not installed: pip install scikit-learn")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(given, name) for name in ("data_dir", "train_csv", "test_csv", "root_dir", "cache_dir")}
    try:
        config = script.Config(**settings, on_bad_image="skip", image_size=given.image_size)
    except ValueError as error:
        raise script.UsageError(str(error)) from None
    script.check_not_read(given.output_dir, ["same_images.csv"], script.input_files(config))
    tables = [("train", script.read_train_table(config)), ("test", script.read_test_table(config))]
    train = tables[0][1]
    classes = script.sort_classes(train.rows.label)
    targets = script.class_numbers(train.rows.label, classes)
    script.check_sample_submission(config, tables[1][1], classes)
    statistics = script.look_at_images(train, config)
    images = script.load_all_images([table for _, table in tables], config, statistics)
    print(script.describe_classes(classes, targets) + script.describe_repeats(train))
    bad = sum(len(table.bad) for _, table in tables)
    print(f"{sum(map(len, images)):,} images, {bad:,} of them cannot be used" + (" (listed above)" if bad else ""))
    found = same_images([(part, table, own) for (part, table), own in zip(tables, images)])
    with script.whole_file(given.output_dir / "same_images.csv") as temporary:
        found.to_csv(temporary, index=False)
    lines = describe_same(found) if len(found) else ["no two images have the same pixels"]
    for (part, table), own in zip(tables, images):
        lines += describe_blank(part, table, own)
    print("\n".join(lines), flush=True)
    print("\n".join(describe_clues(clues(train), train.rows.label)))
    print(f"wrote same_images.csv in {given.output_dir.resolve()}")
    return bad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(script.Config):
        if field.name in ("data_dir", "train_csv", "test_csv", "root_dir", "cache_dir"):
            parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, help="as for script.py")
    parser.add_argument("--image-size", type=int, default=48, help="images of more pixels are compared at this side")
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="folder of same_images.csv")
    given, bad = parser.parse_args(argv), []
    status = script.exit_status(lambda _: bad.append(check(given)), "nothing was written")
    return status or int(bad[0] > 0)


if __name__ == "__main__":
    sys.exit(main())
