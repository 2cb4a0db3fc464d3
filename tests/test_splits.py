"""Validation rows and folds: those of scikit-learn, with all copies of an image on one side."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, Command, make_competition
from PIL import Image
from sklearn.model_selection import StratifiedKFold, train_test_split

import script
from pipeline import splits
from pipeline.errors import DataError
from pipeline.splits import SplitSettings, split_rows

TINY = ["--model", "tiny", "--image-size", "16", "--batch-size", "32", "--num-epochs", "1", "--no-pictures",
        "--knn-neighbors", "0"]


def settings(**changes) -> SplitSettings:
    return SplitSettings(**{"train_val_split": 0.9, "split_seed": 42, "folds": 0, "fold": None, "group_column": "",
                            **changes})


def distinct_images(count: int) -> np.ndarray:
    """Images [count, 1, 2, 2] that all differ."""
    return np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 1, 2, 2)


def make_distinct(folder: Path) -> pd.DataFrame:
    """Give every training image of a competition two grey levels that no other one has, and return the table."""
    table = pd.read_csv(folder / "train.csv", dtype=str)
    for row, name in enumerate(table.image_path):
        path = folder / "Dataset_Image" / name
        grey = np.array(Image.open(path))
        grey[0, :2] = divmod(row, 256)
        Image.fromarray(grey).save(path)
    return table


def split(targets, images=None, groups=None, usable=None, **changes) -> splits.Split:
    rows = np.arange(len(targets))
    digests = splits.image_digests(distinct_images(len(targets)) if images is None else images)
    return split_rows(settings(**changes), np.asarray(targets), rows if usable is None else np.asarray(usable), digests,
                      groups, "train.csv")


def counts_by_part(targets, parts):
    return pd.crosstab(parts, targets).to_numpy()


# ---- The holdout split ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("counts", "share", "seed"), [
    ([20, 20, 20, 20, 20], 0.9, 42), ([100, 50, 31, 10], 0.9, 42), ([100, 50, 31, 10], 0.8, 0),
    ([400, 7, 4, 4], 0.5, 3), ([37] * 29, 0.9, 42)])
def test_validation_rows_are_those_of_train_test_split(counts, share, seed):
    targets = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    found = split(targets, train_val_split=share, split_seed=seed)
    train_rows, val_rows = train_test_split(np.arange(len(targets)), test_size=1 - share, stratify=targets,
                                            random_state=seed)
    assert found.train_rows.tolist() == sorted(train_rows) and found.val_rows.tolist() == sorted(val_rows)
    assert found.parts is None


def test_a_run_validates_on_the_rows_of_train_test_split(tmp_path):
    """With the labels as pandas reads them, and no flag that concerns the split."""
    command = Command(make_competition(tmp_path / "data", 203, 5), tmp_path / "out", tmp_path / "cache")
    make_distinct(command.data)
    assert script.main(command.arguments(*TINY)) == 0
    labels = pd.read_csv(command.data / "train.csv").label
    expected = train_test_split(np.arange(len(labels)), test_size=0.1, stratify=labels, random_state=42)[1]
    saved = np.load(command.output / "val_probabilities.npz")
    assert saved["rows"].tolist() == sorted(expected) and len(expected) == 21
    assert saved["classes"][saved["targets"]].tolist() == labels[saved["rows"]].astype(str).tolist()


def test_classes_with_fewer_than_four_rows_are_only_trained_on():
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(6), [100, 50, 10, 4, 3, 1]))
    found = split(targets, train_val_split=0.8)
    assert sorted([*found.train_rows, *found.val_rows]) == list(range(len(targets)))
    assert np.bincount(targets[found.val_rows], minlength=6)[3:].tolist() == [1, 0, 0]
    large = np.flatnonzero(targets < 4)
    expected = train_test_split(large, test_size=0.2, stratify=targets[large], random_state=42)[1]
    assert found.val_rows.tolist() == sorted(expected)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.999])
def test_every_class_is_trained_on_whatever_the_share(share):
    targets = np.repeat(np.arange(3), [4, 5, 200])
    found = split(targets, train_val_split=share)
    assert set(targets[found.train_rows]) == {0, 1, 2} and len(found.val_rows) >= 3
    assert sorted([*found.train_rows, *found.val_rows]) == list(range(209))


def test_small_classes_alone_leave_nothing_to_validate_on():
    found = split(np.repeat(np.arange(5), 3))
    assert len(found.train_rows) == 15 and len(found.val_rows) == 0


def test_a_split_of_one_trains_on_all_rows():
    found = split(np.arange(60) % 2, train_val_split=1.0)
    assert found.train_rows.tolist() == list(range(60)) and len(found.val_rows) == 0


@pytest.mark.parametrize("changes", [{}, {"folds": 3}, {"group_column": "writer"}])
def test_split_seed_alone_decides(changes):
    targets, writers = np.random.default_rng(2).integers(0, 4, 300), np.arange(300) // 5
    groups = writers if changes.get("group_column") else None
    first, again, other = (split(targets, groups=groups, split_seed=seed, **changes) for seed in (42, 42, 1))
    assert np.array_equal(first.val_rows, again.val_rows) and not np.array_equal(first.val_rows, other.val_rows)
    config, changed = script.Config(**changes), script.Config(
        seed=9, learning_rate=1.0, batch_size=7, model="mlp", mixup=True, **changes)
    assert config.split == changed.split == settings(**changes)
    assert script.Config(split_seed=1, **changes).split != config.split


def test_rows_without_a_usable_image_are_on_no_side():
    targets = np.repeat([0, 1], [6, 14])
    usable = np.setdiff1d(np.arange(20), [0, 1, 2, 9])
    images = distinct_images(20)
    images[[0, 1, 2, 9]] = 0  # as an unusable image is stored; that makes no copies of them
    found = split(targets, images, usable=usable, train_val_split=0.5)
    assert sorted([*found.train_rows, *found.val_rows]) == usable.tolist()
    assert not np.isin(found.val_rows, np.arange(6)).any()  # three usable rows are left of the first class


# ---- Copies of an image ---------------------------------------------------------------------------------------------

def copied_images(rows: int, distinct: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [rows, 1, 2, 2] of which only so many are distinct, and the number of each row's image."""
    numbers = np.random.default_rng(seed).integers(0, distinct, rows)
    return distinct_images(distinct)[numbers], numbers


@pytest.mark.parametrize("labels", ["of the image", "random"])
@pytest.mark.parametrize("kind", [{}, {"train_val_split": 0.5}, {"folds": 4}, {"group_column": "writer"},
                                  {"group_column": "writer", "folds": 3}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_copies_never_stand_on_both_sides(kind, labels, seed):
    images, numbers = copied_images(400, 150, seed)
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 5, 150)[numbers] if labels == "of the image" else rng.integers(0, 5, 400)
    groups = numbers // 3 if kind.get("group_column") else None
    for fold in range(kind.get("folds", 1)):
        found = split(targets, images, groups, **kind, fold=fold if "folds" in kind else None)
        assert len(found.val_rows) >= 10 and len(found.train_rows) >= 100
        assert sorted([*found.train_rows, *found.val_rows]) == list(range(400))
        assert not set(numbers[found.train_rows]) & set(numbers[found.val_rows])
        if groups is not None:
            assert not set(groups[found.train_rows]) & set(groups[found.val_rows])


@pytest.mark.parametrize("seed", range(10))
def test_every_class_that_validates_is_trained_on(seed):
    """Where all rows of a class are copies of one image, it follows the first of them to one side."""
    rng = np.random.default_rng(seed)
    images, numbers = copied_images(120, 25, seed)
    targets = rng.integers(0, 12, 25)[numbers]
    found = split(targets, images, train_val_split=0.5)
    assert len(found.val_rows) and set(targets[found.val_rows]) <= set(targets[found.train_rows])
    assert not set(numbers[found.train_rows]) & set(numbers[found.val_rows])


def test_a_class_of_one_image_is_only_trained_on():
    targets, images = np.repeat(np.arange(3), 40), distinct_images(120)
    images[80:] = images[80]
    for seed in range(8):
        assert targets[split(targets, images, split_seed=seed).val_rows].max() < 2


def write_copies(folder: Path, same: bool) -> Path:
    """A competition of 40 images of noise with random labels, each in 5 files; not `same`: with one grey level changed.
    """
    make_competition(folder, train_rows=5, test_rows=5)
    rng, rows = np.random.default_rng(3), []
    for number in range(40):
        image, label = rng.integers(0, 256, (16, 16), dtype=np.uint8), CLASSES[rng.integers(0, 5)]
        for copy in range(5):
            name = f"{rng.integers(10**9):09d}.png"
            changed = image.copy()
            changed[8, 8] = image[8, 8] if same else 40 * copy
            Image.fromarray(changed).save(folder / "Dataset_Image" / name)
            rows.append({"image_path": name, "label": label, "number": number})
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_csv(folder / "train.csv", index=False)
    return folder


@pytest.mark.parametrize("flags", [["--train-val-split", "0.5"], ["--folds", "2"]], ids=["holdout", "folds"])
@pytest.mark.parametrize("same", [True, False], ids=["copies", "nearly copies"])
def test_renamed_copies_with_random_labels_do_not_raise_the_accuracy(tmp_path, capsys, flags, same):
    """A network that recalls its training images knows every copy; images that differ by a pixel show that it does."""
    command = Command(write_copies(tmp_path / "data", same), tmp_path / "out", tmp_path / "cache")
    status = script.main(command.arguments("--model", "mlp", "--image-size", "16", "--num-epochs", "1", "--no-augment",
                                           "--batch-size", "32", "--knn-neighbors", "1", "--knn-weight", "0.99",
                                           "--no-pictures", *flags))
    assert status == 0, capsys.readouterr().err
    saved = np.load(command.output / ("oof_probabilities.npz" if "--folds" in flags else "val_probabilities.npz"))
    correct = saved["probabilities"].argmax(axis=1) == saved["targets"]
    assert len(correct) > 50
    assert correct.mean() < 0.5 if same else correct.mean() > 0.9


# ---- Folds and groups -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("folds", "seed"), [(2, 42), (5, 42), (10, 7)])
def test_folds_are_those_of_stratified_k_fold(folds, seed):
    targets = np.random.default_rng(folds).permutation(np.repeat(np.arange(6), [100, 51, 33, 7, 3, 1]))
    found = split(targets, folds=folds, split_seed=seed)
    with pytest.warns(UserWarning, match="least populated class"):
        expected = [rows for _, rows in StratifiedKFold(folds, shuffle=True, random_state=seed).split(targets, targets)]
    for fold, rows in enumerate(expected):
        own = split(targets, folds=folds, split_seed=seed, fold=fold)
        assert own.val_rows.tolist() == rows.tolist() and np.array_equal(own.parts, found.parts)
        assert own.train_rows.tolist() == np.setdiff1d(np.arange(len(targets)), rows).tolist()
    counts = counts_by_part(targets, found.parts)
    assert counts.shape == (folds, 6) and np.ptp(counts, axis=0).max() <= 1 and np.ptp(counts.sum(axis=1)) <= 6


def test_groups_stay_whole_and_classes_nearly_even():
    rng = np.random.default_rng(0)
    targets, groups = rng.integers(0, 4, 2000), np.concatenate([rng.integers(0, 60, 1000), np.arange(60, 1060)])
    found = split(targets, groups=groups, folds=5, group_column="writer")
    assert pd.Series(found.parts).groupby(groups).nunique().max() == 1
    counts = counts_by_part(targets, found.parts)
    assert counts.shape == (5, 4) and np.ptp(counts, axis=0).max() <= 12


def test_equal_images_and_groups_connect_rows():
    writers, copies = np.array(list("ppqrrs"), dtype=object), np.array([0, 1, 2, 2, 3, 4])
    groups = splits.join_groups(writers, copies)  # one image connects q with r
    assert [np.flatnonzero(groups == group).tolist() for group in pd.unique(groups)] == [[0, 1], [2, 3, 4], [5]]
    assert len(set(splits.join_groups(copies, copies).tolist())) == 5
    chain = np.arange(60)  # each writer drew one image that the next one drew too
    assert len(set(splits.join_groups(chain[::-1] // 2, (chain + 1) // 2).tolist())) == 1


def test_without_folds_the_part_of_the_wanted_size_validates_and_split_seed_chooses_it():
    """A writer with half of all rows fills a part alone, and the largest writers are not always held out."""
    writers = np.array(["w0"] * 200 + [f"v{row % 20}" for row in range(200)])
    chosen = set()
    for seed in range(5):
        found = split(np.zeros(400, dtype=np.int64), groups=writers, group_column="writer", split_seed=seed)
        assert len(found.val_rows) in (20, 30) and found.val_rows.min() >= 200
        assert len(found.train_rows) + len(found.val_rows) == 400
        chosen.add(tuple(pd.unique(writers[found.val_rows])))
    assert len(chosen) > 1


def test_rows_without_a_usable_image_are_in_no_part_and_connect_nothing():
    images, targets = distinct_images(9), np.zeros(9, dtype=np.int64)
    images[[3, 4]] = 0
    found = split(targets, images, usable=[0, 1, 2, 5, 6, 7, 8], folds=3, fold=1)
    assert np.flatnonzero(found.parts == -1).tolist() == [3, 4]
    assert sorted(np.bincount(found.parts[found.parts >= 0])) == [2, 2, 3]
    assert sorted([*found.train_rows, *found.val_rows]) == [0, 1, 2, 5, 6, 7, 8]
    images, writers = distinct_images(9), np.array(list("pppqqqrrr"))
    images[[2, 3]] = 0  # one each of p's and q's is unusable: they have nothing in common
    parts = split(targets, images, writers, [0, 1, 4, 5, 6, 7, 8], folds=3, group_column="writer").parts
    assert [len(set(parts[rows])) for rows in ([0, 1], [4, 5], [6, 7, 8])] == [1, 1, 1] and len(set(parts)) == 4


@pytest.mark.parametrize(("rows", "writers", "changes", "remedy"), [
    (9, None, {"folds": 10}, {"folds": 9}), (9, [0, 0, 0, 1, 1, 1, 2, 2, 2], {"folds": 4}, {"folds": 3}),
    (9, [0, 0, 0, 1, 1, 1, 2, 2, 2], {"train_val_split": 0.9}, {"train_val_split": 0.67})])
def test_too_few_rows_for_the_parts_are_one_line_whose_remedy_works(rows, writers, changes, remedy):
    groups, column = (None, {}) if writers is None else (np.array(writers), {"group_column": "writer"})
    targets = np.zeros(rows, dtype=np.int64)
    with pytest.raises(DataError, match=r"^train.csv: \d+ groups of rows that must stay together, at most 9 rows of "
                       rf"a class: too few for \d+ parts; lower --{next(iter(remedy)).replace('_', '-')}$"):
        split(targets, groups=groups, **changes, **column)
    found = split(targets, groups=groups, **remedy, **column)
    assert len(found.val_rows) and len(found.train_rows) + len(found.val_rows) == rows


@pytest.mark.parametrize(("flags", "remedy"), [
    (["--folds", "5"], ["--folds", "3"]), (["--train-val-split", "0.9"], ["--train-val-split", "0.66"])])
def test_the_command_line_names_a_remedy_that_works(main_in_process, competition, flags, remedy):
    table = make_distinct(competition)
    writers = [f"w{row // 5 % 3}" for row in range(len(table))]
    table.assign(writer=writers).to_csv(competition / "train.csv", index=False)
    status, _, error = main_in_process(*TINY, "--group-column", "writer", *flags)
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert error.endswith(f"lower {flags[0]}\n")
    status, _, error = main_in_process(*TINY, "--group-column", "writer", *remedy)
    assert status == 0, error


def test_copies_that_leave_too_few_parts_are_one_line(main_in_process, competition):
    table = pd.read_csv(competition / "train.csv", dtype=str)
    folder = competition / "Dataset_Image"
    for path in table.image_path[1:]:
        shutil.copy(folder / table.image_path[0], folder / path)
    status, _, error = main_in_process(*TINY, "--folds", "3")
    assert status == 1 and "train.csv: 1 groups of rows that must stay together, at most 20 rows of a class" in error
    assert error.count("\n") == 1


def test_settings_are_described_as_flags_without_those_of_no_effect():
    assert settings().describe() == "--split-seed 42 --train-val-split 0.9"
    assert settings(folds=3, fold=0, group_column="writer").describe() == (
        "--split-seed 42 --folds 3 --fold 0 --group-column writer")
    assert settings(folds=3).parts == 3 and settings().parts == 0 and settings(group_column="writer").parts == 10
    assert settings(group_column="writer", train_val_split=0.8).parts == 5


def test_equal_images_are_counted(capsys):
    images = np.arange(20, dtype=np.uint8).reshape(5, 2, 2)
    images[3] = images[1]
    digests, others = splits.image_digests(images), splits.image_digests(images[[1, 1, 4]])
    splits.report_copies(digests, others)
    assert capsys.readouterr().out == (
        "1 labelled images have the pixels of an earlier one and stay on its side of the split\n"
        "3 images to predict have the pixels of a labelled one\n")
    splits.report_copies(digests[:3], [])
    assert capsys.readouterr().out == ""
