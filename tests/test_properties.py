"""Tables, paths and images that nobody thought of: whatever they hold, they are read as written or refused in words."""

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

import script
from script import Config, DataError

# Text as a CSV file can hold it: no lone surrogates, and no carriage return, which readers take for an end of line.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=12)
CELL = TEXT.filter(lambda text: text.strip() != "")
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@given(labels=st.lists(CELL, min_size=2, max_size=8).filter(lambda labels: len(set(labels)) > 1),
       more=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=5), max_size=8),
       mark=st.booleans(), ending=st.sampled_from(["\n", "\r\n"]))
@example(labels=["NA", "007"], more=["null"], mark=True, ending="\r\n")
@QUICK
def test_labels_are_read_as_they_were_written(folder, labels, more, mark, ending):
    """Whatever else stands in the row; with a byte-order mark, other line endings and quoted line breaks."""
    path = folder / "train.csv"
    with open(path, "w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=ending, quoting=csv.QUOTE_ALL)
        writer.writerow(["note", "label", "image_path"])
        for row, label in enumerate(labels):
            writer.writerow([more[row] if row < len(more) else "", label, f"a/{row}.png"])
    table = script.read_train_table(Config(data_dir=str(folder)))
    assert table.rows.label.tolist() == labels
    assert table.rows.image_path.tolist() == [f"a/{row}.png" for row in range(len(labels))]
    assert table.rows.index.tolist() == list(range(2, len(labels) + 2))
    assert set(script.sort_classes(table.rows.label)) == set(labels)


@given(content=st.binary(max_size=400) | st.binary(max_size=80).map(lambda tail: b"image_path,label\na.png,3\n" + tail))
@QUICK
def test_any_bytes_are_a_table_or_are_refused_in_words(folder, content):
    path = folder / "train.csv"
    path.write_bytes(content)
    try:
        table = script.read_train_table(Config(data_dir=str(folder)))
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
    faults = script.path_faults(pd.Series(names), root)
    for place, name in enumerate(names):
        if place not in faults:
            real = os.path.realpath(os.path.join(root, name))
            assert Path(real).is_relative_to(os.path.realpath(root)), name


@given(content=st.binary(max_size=300), cut=st.integers(0, 2000), flips=st.lists(st.integers(0, 10**6), max_size=5),
       kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "none"]))
@pytest.mark.filterwarnings("error")
@QUICK
def test_any_bytes_are_an_image_or_are_refused_in_words(folder, content, cut, flips, kind):
    if kind != "none":
        buffer = io.BytesIO()
        Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(buffer, format=kind)
        content = bytearray(buffer.getvalue()[: cut or None])
        for place in flips if content else ():
            content[place // 8 % len(content)] ^= 1 << place % 8
    path = folder / "image"
    path.write_bytes(content)
    statistics = script.ImageStatistics(255, 16)
    result = script.decode_image(statistics, str(path))
    assert (isinstance(result, bytes) and len(result) == 256) or (isinstance(result, str) and "\n" not in result)


@given(height=st.integers(1, 40), width=st.integers(1, 40), paper=st.sampled_from([0, 255]), seed=st.integers(0, 99))
@QUICK
def test_ink_keeps_what_is_drawn(height, width, paper, seed):
    grey = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    same = script.to_ink(grey, None, script.ImageStatistics(paper, max(height, width)))
    assert same.shape == (max(height, width),) * 2
    ink = grey.astype(int) if paper == 0 else 255 - grey.astype(int)
    assert abs(int(same.sum()) - ink.sum()) <= (0 if height == width else same.size)


@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=8), share=st.floats(0.5, 0.99), seed=st.integers(0, 5))
@QUICK
def test_a_split_holds_every_row_once_and_every_class_in_training(counts, share, seed):
    targets = np.repeat(np.arange(len(counts)), counts)
    train, val = script.split_rows(targets, Config(train_val_split=share, split_seed=seed))
    assert sorted([*train, *val]) == list(range(len(targets)))
    assert set(targets[train]) == set(range(len(counts)))
    assert set(targets[val]) == {label for label, count in enumerate(counts) if count >= 4}
