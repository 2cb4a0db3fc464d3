"""Validation rows and folds, by scikit-learn. Rows whose images have equal pixels are never on both sides."""

import hashlib
import math
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.errors import DataError, UsageError

SMALLEST_CLASS_TO_SPLIT = 4  # a class with fewer rows is only trained on


@dataclass(frozen=True)
class SplitSettings:
    """The settings that decide which rows validate."""

    train_val_split: float
    split_seed: int
    folds: int
    fold: int | None
    group_column: str

    @property
    def parts(self) -> int:
        """Number of parts that the rows are divided into, of which one validates; 0 for a plain holdout split."""
        by_share = not self.folds and self.group_column and self.train_val_split < 1
        return round(1 / (1 - self.train_val_split)) if by_share else self.folds

    def check(self) -> None:
        """Raise ValueError for settings that do not go together."""
        for wrong, message in (
            (self.folds == 1, "folds must be 0 (one network) or at least 2, not 1"),
            (self.fold is not None and self.fold >= self.folds,
             f"fold must be below folds, which is {self.folds}, not {self.fold}; it counts from 0"),
            (self.folds and self.train_val_split == 1,
             "with folds every row validates once: train_val_split must not be 1"),
            (self.group_column and self.parts == 1, "group_column needs train_val_split above 1/3, or folds"),
        ):
            if wrong:
                raise ValueError(message)

    def fewest(self) -> tuple[int, str]:
        """Return the least number of rows of a class that is split, and what is said of smaller ones."""
        if self.parts:
            return self.parts, f"too few rows for {self.parts} parts of the split, so that some lack them"
        return SMALLEST_CLASS_TO_SPLIT, "too few rows to split, so that they are only trained on"

    def count_training_rows(self, rows: int) -> int:
        """Return about how many of so many rows are trained on."""
        return rows - rows // self.parts if self.parts else round(rows * self.train_val_split)

    def effective(self) -> dict[str, object]:
        """Return the settings that have an effect."""
        names = ["split_seed", *(["folds", "fold"] if self.folds else ["train_val_split"])]
        return {name: getattr(self, name) for name in names + ["group_column"] * bool(self.group_column)}

    def describe(self) -> str:
        """Return the settings as flags."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.effective().items())


@dataclass(frozen=True, eq=False)
class Split:
    """Positions of the training and validation rows; with parts also the part of every row [N], -1 if unusable."""

    train_rows: np.ndarray
    val_rows: np.ndarray
    parts: np.ndarray | None = None

    def check_validates(self) -> None:
        """Raise UsageError if there is no validation row."""
        if not len(self.val_rows):
            raise UsageError("--schedule plateau and --early-stopping need validation rows, and no class has "
                             f"{SMALLEST_CLASS_TO_SPLIT} rows with usable images; leave them out")


def split_rows(settings: SplitSettings, targets: np.ndarray, usable: np.ndarray, digests: list[bytes],
               groups: np.ndarray | None, table: str) -> Split:
    """Split the `usable` rows by class `targets` [N]; rows of equal image `digests` or `groups` [N] stay together.

    Raises DataError, naming the table, if there are too few rows for the parts.
    """
    copies = pd.factorize(pd.Series(digests))[0][usable]
    if len(usable) < 2:
        raise DataError(f"{table}: fewer than two rows have an image that can be used")
    if not settings.parts:
        validates = holdout(targets[usable], 1 - settings.train_val_split, settings.split_seed, copies)
        return Split(usable[~validates], usable[validates])
    parts = np.full(len(targets), -1)
    joined = None if groups is None else join_groups(groups[usable], copies)
    try:
        parts[usable] = assign_folds(targets[usable], settings.parts, settings.split_seed, copies, joined)
        sizes = np.bincount(parts[usable], minlength=settings.parts)
        if not sizes.min() or sizes.sum() - sizes.max() < 2:
            raise ValueError
    except ValueError:  # scikit-learn's too, if every class has fewer rows than there are parts
        count, largest = len(np.unique(copies if joined is None else joined)), np.bincount(targets[usable]).max()
        to_lower, to_leave = ("--folds", "--folds") if settings.folds else ("--train-val-split", "--group-column")
        remedy = f"lower {to_lower}" if min(count, largest, settings.parts - 1) > 1 else f"leave out {to_leave}"
        raise DataError(f"{table}: {count} groups of rows that must stay together, at most {largest} rows of a class: "
                        f"too few for {settings.parts} parts; {remedy}") from None
    part = (settings.fold or 0) if settings.folds else int(
        np.abs(sizes - (1 - settings.train_val_split) * sizes.sum()).argmin())
    return Split(*rows_of_part(parts, part), parts)


def holdout(targets: np.ndarray, share: float, seed: int, copies: np.ndarray) -> np.ndarray:
    """Return which rows validate [N], bool: those of scikit-learn's `train_test_split` with `stratify=targets`."""
    from sklearn.model_selection import train_test_split

    validates, share = np.zeros(len(targets), dtype=bool), round(share, 10)
    rows = np.flatnonzero(np.bincount(targets)[targets] >= SMALLEST_CLASS_TO_SPLIT)
    if not share or not len(rows):
        return validates
    classes = len(np.unique(targets[rows]))
    count = min(max(math.ceil(share * len(rows)), classes), len(rows) - classes)
    validates[train_test_split(rows, test_size=count, stratify=targets[rows], random_state=seed)[1]] = True
    validates = pd.Series(validates).groupby(copies).transform("first").to_numpy(copy=True)  # copies follow the first
    while (unseen := validates & ~np.isin(targets, targets[~validates])).any():  # classes without a training row
        validates &= ~np.isin(copies, copies[unseen])
    return validates


def assign_folds(targets: np.ndarray, folds: int, seed: int, copies: np.ndarray,
                 groups: np.ndarray | None = None) -> np.ndarray:
    """Return the fold of each row [N], stratified by class; groups, or copies of an image, stay together."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    assigned = np.zeros(len(targets), dtype=np.int64)
    with warnings.catch_warnings(action="ignore"):  # about classes with fewer rows than folds, which are reported
        splits = splitter(folds, shuffle=True, random_state=seed).split(targets, targets, groups)
        for fold, (_, rows) in enumerate(splits):
            assigned[rows] = fold
    return pd.Series(assigned).groupby(copies).transform("first").to_numpy() if groups is None else assigned


def rows_of_part(parts: np.ndarray, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the training and validation rows if this part validates."""
    return np.flatnonzero((parts != part) & (parts >= 0)), np.flatnonzero(parts == part)


def image_digests(images: np.ndarray) -> list[bytes]:
    """Return a digest of each image's pixels."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def report_copies(digests: list[bytes], test_digests: list[bytes]) -> None:
    """Print the numbers of equal images in a table, and in another one, if there are any."""
    own, shared = pd.Series(digests).duplicated().sum(), pd.Series(test_digests, dtype=object).isin(digests).sum()
    found = [f"{own:,} labelled images have the pixels of an earlier one and stay on its side of the split"] * bool(own)
    found += [f"{shared:,} images to predict have the pixels of a labelled one"] * bool(shared)
    if found:
        print("\n".join(found))


def are_copies(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which images [N, ...] have the pixels of one of the others, bool [N]."""
    known = set(image_digests(others))
    return np.array([digest in known for digest in image_digests(images)], dtype=bool)


def join_groups(values: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Return group numbers [N] so that rows of an equal value, or of equal pixels, are in one group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    values, copies = pd.factorize(pd.Series(values))[0], pd.factorize(copies)[0]
    offset = values.max() + 1  # a graph of values and images: each row links its value to its image
    size = offset + copies.max() + 1
    links = coo_array((np.ones(len(values), dtype=bool), (values, offset + copies)), shape=(size, size))
    return connected_components(links, directed=False)[1][values]
