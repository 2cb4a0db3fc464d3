"""Public data sets and competitions as they come: each is opened, and some are trained on by the real command."""

import dataclasses
import io
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Command
from formats import FORMATS, Pen, Truth, arabic_letters, kaggle_input, write
from PIL import Image

import script
from pipeline import tables
from pipeline.errors import DataError
from pipeline.sources import Table, TableSource
from pipeline.submission import submission_form

NEEDS = {"cifar100-parquet": "pyarrow"}
TRAINED = ["optdigits", "usps", "medmnist", "emnist-idx", "gtsrb", "leaf-masks", "state-farm", "chest-xray"]
FAST = ["--model", "cnn", "--num-epochs", "8", "--batch-size", "32", "--knn-neighbors", "0", "--no-pictures",
        "--num-workers", "0"]


def write_format(folder: Path, name: str) -> tuple[Truth, script.Config]:
    """Write a data set; return what is in it, and the settings of its command."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    truth = write(folder / name, name, train=60, test=20)
    return truth, script.parse_command_line(["--data-dir", str(folder / name), *shlex.split(FORMATS[name].flags)])[2]


def picture(table: Table, place: int) -> np.ndarray:
    """Return an image of a table, of levels from 0 to 1."""
    if table.pixels is not None:
        return table.pixels[place] / table.pixels[place].max()
    image = Image.open(io.BytesIO(table.encoded[place]) if table.encoded else
                       Path(table.image_root, table.rows.image_path.iloc[place]))
    levels = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    return levels / levels.max()


def assert_shows(table: Table, place: int, expected: np.ndarray) -> None:
    """Check that an image is the expected one, but for what JPEG loses."""
    found = picture(table, place)
    assert found.shape == expected.shape and np.abs(found - expected / expected.max()).mean() < 0.05, table.where(place)


@pytest.mark.parametrize("name", FORMATS)
def test_training_rows_have_their_labels_and_images(tmp_path, name):
    truth, config = write_format(tmp_path, name)
    table = tables.read_train_table(config.train_source)
    assert len(table) == len(truth.train) == 60 and not table.faults
    for place, row in enumerate(table.rows.index):
        label, image = truth.train[re.sub("^data/", "", row) if isinstance(row, str) else place]
        assert table.rows.label.iloc[place] == label, table.where(place)
        assert_shows(table, place, image)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.header])
def test_test_rows_have_their_ids_and_images(tmp_path, name):
    truth, config = write_format(tmp_path, name)
    table = tables.read_test_table(config.test_source)
    form = submission_form(table, sorted({label for label, _ in truth.test.values()}))
    assert ",".join(form.columns) == FORMATS[name].header
    assert form.ids.tolist() == list(truth.test) and not table.faults
    for place, key in enumerate(table.rows.example_id):
        assert_shows(table, place, truth.test[key][1])


def test_paths_of_another_machine_are_refused_with_a_remedy_that_works(tmp_path, capsys):
    """The remedy says what to remove from the paths."""
    data = tmp_path / "data"
    data.mkdir()
    truth = kaggle_input(data, Pen(1, 40, 0))
    command = Command(data, tmp_path / "out", tmp_path / "cache").arguments(
        "--root-dir", ".", "--test-csv", "none", *FAST, "--model", "tiny", "--num-epochs", "1")
    assert script.main(command) == 1
    advice = re.search(r"train\.csv: .*; remove (\S+) from the start of its paths", capsys.readouterr().err)
    (data / "train.csv").write_text((data / "train.csv").read_text().replace(advice[1], ""))
    assert script.main(command) == 0
    assert f"{len(truth.train)} labelled images" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="paste is a command of POSIX")
def test_labels_in_a_table_of_their_own_are_joined_by_the_remedys_command(tmp_path):
    truth = arabic_letters(tmp_path, Pen(1, 40, 10))
    source = TableSource("csvTrainImages 13440x1024.csv", str(tmp_path), transpose=True)
    with pytest.raises(DataError, match="no labels") as error:
        tables.read_train_table(source)
    command = re.search("paste .*", str(error.value))[0].replace("LABELS.csv", "'csvTrainLabel 13440x1.csv'")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    table = tables.read_train_table(dataclasses.replace(source, name=command.rpartition("> ")[2]))
    assert len(table) == len(truth.train)
    for place, (label, image) in enumerate(truth.train):
        assert table.rows.label.iloc[place] == label
        assert_shows(table, place, image)
    test = dataclasses.replace(source, name="csvTestImages 3360x1024.csv", part="test")
    assert tables.read_test_table(test).rows.example_id.tolist() == list(truth.test)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_formats_are_learnt_by_the_command(tmp_path, name):
    """The submission has the form, the ids in their order, and mostly the right labels."""
    truth = write(tmp_path / name, name)
    command = Command(tmp_path / name, tmp_path / "out", tmp_path / "cache")
    done = command(*shlex.split(FORMATS[name].flags), *FAST)
    assert done.returncode == 0, done.stderr
    submission = command.submission()
    assert ",".join(submission.columns) == FORMATS[name].header
    assert submission.iloc[:, 0].tolist() == list(truth.test)
    cells = submission.iloc[:, 1:]
    predicted = cells.iloc[:, 0] if cells.shape[1] == 1 else cells.astype(float).idxmax(axis=1)
    answers = pd.Series([label for label, _ in truth.test.values()])
    assert (predicted == answers).mean() > 0.8
