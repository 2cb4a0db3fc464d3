"""Random tables, paths and images: whatever they hold, they are read as written or refused with a message."""

import contextlib
import csv
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import DataError
from pipeline.image_paths import resolve_paths
from pipeline.images import ImageStatistics, decode_image, fit_to_square, to_ink
from pipeline.splits import SMALLEST_CLASS_TO_SPLIT, SplitSettings, assign_folds, holdout, image_digests, split_rows
from pipeline.tables import TableSource, read_train_table, sort_classes

# Text as a CSV file can hold it: no lone surrogates, and no carriage return, which readers take for an end of line.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=12)
CELL = TEXT.filter(lambda text: text.strip() != "")
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@given(labels=st.lists(CELL, min_size=2, max_size=8).filter(lambda labels: len(set(map(str.strip, labels))) > 1),
       more=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=5), max_size=8),
       mark=st.booleans(), ending=st.sampled_from(["\n", "\r\n"]))
@example(labels=["NA", "007"], more=["null"], mark=True, ending="\r\n")
@QUICK
def test_labels_are_read_as_they_were_written(folder, labels, more, mark, ending):
    """But for spaces around them, whatever the row holds beside; with a byte-order mark, other line endings and quoted
    line breaks."""
    path = folder / "train.csv"
    with open(path, "w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=ending, quoting=csv.QUOTE_ALL)
        writer.writerow(["note", "label", "image_path"])
        for row, label in enumerate(labels):
            writer.writerow([more[row] if row < len(more) else "", label, f"a/{row}.png"])
    table = read_train_table(TableSource("train.csv", str(folder)))
    labels = list(map(str.strip, labels))
    assert table.rows.label.tolist() == labels
    assert table.rows.image_path.tolist() == [f"a/{row}.png" for row in range(len(labels))]
    assert table.rows.index.tolist() == list(range(2, len(labels) + 2))
    assert set(sort_classes(table.rows.label)) == set(labels)


@given(content=st.binary(max_size=400) | st.binary(max_size=80).map(lambda tail: b"image_path,label\na.png,3\n" + tail))
@QUICK
def test_any_bytes_are_a_table_or_are_refused_with_a_message(folder, content):
    path = folder / "train.csv"
    path.write_bytes(content)
    try:
        table = read_train_table(TableSource("train.csv", str(folder)))
        assert len(table) >= 2 and not (table.rows == "").any().any()
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)


PARTS = st.lists(st.sampled_from(["..", ".", "data", "inside", "outside", "C:", "", "etc", "a.png", "\\", "a\\..\\b"]),
                 min_size=1, max_size=5).map("/".join)


@given(names=st.lists(PARTS | TEXT, min_size=1, max_size=6))
@QUICK
def test_no_path_leads_out_of_the_root(folder, names):
    root = folder / "root"
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, target in (("outside", folder), ("inside", root / "data")):
        with contextlib.suppress(FileExistsError):
            (root / name).symlink_to(target)
    resolved, faults = resolve_paths(pd.Series(names), root, root, folder / "train.csv")
    for place, name in enumerate(resolved):
        if place not in faults:
            real = os.path.realpath(os.path.join(root, name))
            assert Path(real).is_relative_to(os.path.realpath(root)), name


@given(content=st.binary(max_size=300), cut=st.integers(0, 2000), flips=st.lists(st.integers(0, 10**6), max_size=5),
       kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "none"]))
@pytest.mark.filterwarnings("error")
@QUICK
def test_any_bytes_are_an_image_or_are_refused_with_a_message(folder, content, cut, flips, kind):
    if kind != "none":
        buffer = io.BytesIO()
        Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(buffer, format=kind)
        content = bytearray(buffer.getvalue()[: cut or None])
        for place in flips if content else ():
            content[place // 8 % len(content)] ^= 1 << place % 8
    path = folder / "image"
    path.write_bytes(content)
    result = decode_image(ImageStatistics(255, 16), str(path))
    assert (isinstance(result, bytes) and len(result) == 256) or (isinstance(result, str) and "\n" not in result)


@given(height=st.integers(1, 40), width=st.integers(1, 40), background=st.sampled_from([0, 255]),
       seed=st.integers(0, 99))
@QUICK
def test_ink_keeps_what_is_drawn(height, width, background, seed):
    grey = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    same = fit_to_square(to_ink(grey, None, background), max(height, width))
    assert same.shape == (max(height, width),) * 2
    ink = grey.astype(int) if background == 0 else 255 - grey.astype(int)
    assert abs(int(same.sum()) - ink.sum()) <= (0 if height == width else same.size)


@st.composite
def labelled_images(draw) -> tuple[np.ndarray, np.ndarray]:
    """Return class numbers [N] of every class, in any order, and images [N, 1, 1], of which some are copies."""
    counts = draw(st.lists(st.integers(1, 30), min_size=2, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    targets = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.arange(len(targets), dtype=np.uint8)
    copied = rng.random(len(targets)) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    images[copied] = rng.choice(images, copied.sum())
    return targets, images[:, None, None]


@given(data=labelled_images(), share=st.floats(0.5, 0.99), seed=st.integers(0, 5))
@QUICK
def test_a_split_holds_every_row_once_and_every_class_in_training(data, share, seed):
    targets, images = data
    split = split_rows(SplitSettings(share, seed, 0, None, ""), targets, np.arange(len(targets)),
                       image_digests(images), None, "t")
    assert sorted([*split.train_rows, *split.val_rows]) == list(range(len(targets)))
    assert set(targets[split.train_rows]) == set(targets)
    assert not set(images[split.train_rows].flat) & set(images[split.val_rows].flat), "copies stay on one side"
    if len(np.unique(images)) == len(targets):
        large = np.flatnonzero(np.bincount(targets) >= SMALLEST_CLASS_TO_SPLIT)
        assert set(targets[split.val_rows]) <= set(large)


@given(data=labelled_images(), seed=st.integers(0, 5))
@QUICK
def test_a_holdout_without_a_share_is_empty(data, seed):
    targets, images = data
    assert not holdout(targets, 0.0, seed, images.ravel()).any()


@given(data=labelled_images(), folds=st.integers(2, 5), seed=st.integers(0, 5), grouped=st.booleans())
@QUICK
def test_folds_keep_copies_and_groups_together(data, folds, seed, grouped):
    targets, images = data
    copies = images.ravel()
    groups = copies // 3 if grouped else None
    try:
        assigned = assign_folds(targets, folds, seed, copies, groups)
    except ValueError:  # too few rows of every class, or too few groups
        assert np.bincount(targets).max() < folds or len(np.unique(groups)) < folds
        return
    assert assigned.shape == targets.shape and set(assigned) <= set(range(folds))
    for numbers in (copies, *[groups] * grouped):
        assert all(len(set(assigned[numbers == number])) == 1 for number in np.unique(numbers))
