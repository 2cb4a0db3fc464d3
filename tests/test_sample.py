"""The sample competition: complete, drawn again with the same bytes, and learned with the default settings."""

import os
import subprocess
import sys

import pandas as pd
import pytest
from conftest import REPOSITORY, Command
from PIL import Image

TABLES = ("train.csv", "test.csv", "classes.csv")


def test_committed_sample_is_complete():
    train, test, classes = (pd.read_csv(REPOSITORY / name, dtype=str) for name in TABLES)
    assert train.label.nunique() == len(classes) >= 40 and set(train.label) == set(classes.label)
    assert train.label.value_counts().eq(40).all() and len(test) == 10 * len(classes)
    names = [*train.image_path, *test.image_path]
    paths = [REPOSITORY / "Dataset_Image" / name for name in names]
    assert len(set(names)) == len(names) and all(path.exists() for path in paths)
    assert sum(path.stat().st_size for path in paths) < 2e6
    with Image.open(paths[0]) as image:
        assert image.size == (32, 32) and image.convert("L").getpixel((0, 0)) == 255


def test_file_names_and_row_order_do_not_reveal_labels():
    train = pd.read_csv(REPOSITORY / "train.csv")
    numbers = train.image_path.str.extract(r"(\d+)")[0].astype(int)
    assert abs(numbers.corr(train.label)) < 0.1 and abs(pd.Series(train.index).corr(train.label)) < 0.1


@pytest.mark.slow
def test_tool_draws_the_same_bytes_again(tmp_path):
    def make_sample(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "tools.make_sample", "--output-dir", str(tmp_path / name)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    for name in ("one", "two"):
        assert make_sample(name).returncode == 0
    for folder, _, names in os.walk(tmp_path / "one"):
        for name in names:
            first = os.path.join(folder, name)
            with open(first, "rb") as one, open(first.replace("/one", "/two", 1), "rb") as two:
                assert one.read() == two.read(), name
    for name in TABLES:
        assert (tmp_path / "one" / name).read_text() == (REPOSITORY / name).read_text()
    (tmp_path / "two" / "Dataset_Image" / "0003.png").unlink()
    (tmp_path / "two" / "train.csv").write_text("somebody's own")
    done = make_sample("two")
    assert done.returncode == 2 and "two/train.csv: is there already, with other content" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "two" / "Dataset_Image" / "0003.png").exists()


@pytest.mark.slow
def test_default_settings_learn_the_sample(tmp_path):
    command = Command(REPOSITORY, tmp_path / "out", tmp_path / "cache")
    done = command("--max-minutes", "2", timeout=900)
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(command.output / "history.csv").val_accuracy.iloc[-1] >= 0.9
    assert len(command.submission()) == 440
