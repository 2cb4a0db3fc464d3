"""tools/common.py: the validation rows of checkpoints are those of their runs, or the checkpoints are refused."""

import argparse

import numpy as np
import pandas as pd
import pytest
from conftest import QUICK, Command, make_competition

import script
from pipeline.errors import DataError
from tools.common import OF_CHECKPOINT, make_parser, open_validation, predict_each

SHORT = [*QUICK, "--num-epochs", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Command:
    """A competition with a copy of an image, a bad image and groups, and a run that skips the bad image."""
    folder = tmp_path_factory.mktemp("common")
    command = Command(make_competition(folder / "competition"), folder / "out", folder / "cache")
    table = pd.read_csv(command.data / "train.csv", dtype=str)
    table["writer"] = [f"w{row // 4}" for row in range(len(table))]
    table.loc[7, "image_path"] = table.image_path[2]
    (command.data / "Dataset_Image" / table.image_path[20]).write_bytes(b"")
    table.to_csv(command.data / "train.csv", index=False)
    assert script.main(command.arguments(*SHORT, "--on-bad-image", "skip")) == 0
    return command


def flags_of(command: Command, *words: str) -> argparse.Namespace:
    """Parse the flags of a tool."""
    parser = make_parser("tools.x", "", "cache_dir", **OF_CHECKPOINT)
    return parser.parse_args(["--cache-dir", str(command.cache), *words])


@pytest.mark.parametrize("flags", [[], ["--folds", "3", "--fold", "1"], ["--group-column", "writer"]])
def test_validation_rows_are_those_of_the_run(trained, tmp_path, flags):
    output = ["--output-dir", str(tmp_path)]
    assert script.main(trained.arguments(*SHORT, "--on-bad-image", "skip", *output, *flags)) == 0
    folder = tmp_path / "fold1" if "--fold" in flags else tmp_path
    saved = np.load(folder / "val_probabilities.npz")
    networks, datasets = open_validation([folder / "best_model.pth"] * 2, flags_of(trained))
    labels = pd.read_csv(trained.data / "train.csv", dtype=str).label
    assert datasets[0].table.rows.label.tolist() == labels.iloc[saved["rows"]].tolist()
    assert datasets[1].targets.tolist() == saved["targets"].tolist()
    for probabilities in predict_each(networks, datasets):
        assert np.allclose(probabilities, saved["probabilities"], atol=1e-5)


def test_a_table_that_was_moved_is_named(trained, tmp_path):
    (tmp_path / "moved.csv").write_bytes((trained.data / "train.csv").read_bytes())
    words = ["--train-csv", str(tmp_path / "moved.csv"), "--root-dir", str(trained.data / "Dataset_Image")]
    _, (dataset,) = open_validation([trained.output / "best_model.pth"], flags_of(trained, *words))
    assert dataset.table.path == str(tmp_path / "moved.csv") and len(dataset)


def test_rows_in_another_order_are_refused(trained, tmp_path):
    pd.read_csv(trained.data / "train.csv", dtype=str)[::-1].to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(DataError, match=r"train\.csv: not the rows that .*best_model\.pth was trained on"):
        open_validation([trained.output / "best_model.pth"], flags_of(trained, "--data-dir", str(tmp_path)))


@pytest.mark.parametrize("flags, message", [
    (["--split-seed", "7"], "split in different ways .*--split-seed 7"),
    (["--extra-csv", "more.csv", "--extra-classes"], "knows other classes than .*more"),
    (["--train-val-split", "1"], "split in different ways"),
])
def test_checkpoints_without_common_rows_are_refused(trained, tmp_path, flags, message):
    pd.read_csv(trained.data / "train.csv", dtype=str).head(2).assign(label="more").to_csv(
        trained.data / "more.csv", index=False)
    assert script.main(trained.arguments(*SHORT, "--on-bad-image", "skip", "--output-dir", str(tmp_path), *flags)) == 0
    with pytest.raises(DataError, match=message):
        open_validation([trained.output / "best_model.pth", tmp_path / "best_model.pth"], flags_of(trained))
