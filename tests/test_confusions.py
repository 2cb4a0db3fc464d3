"""tools/confusions.py: the rule, and the command on a trained network."""

import numpy as np
import pandas as pd
import pytest
from conftest import QUICK
from PIL import Image

from tools import confusions


def counts_of(*rows: list[int]) -> np.ndarray:
    return np.array(rows)


def test_counts_and_shares_by_hand():
    counts = confusions.confusion_counts(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 2]), 4)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    shares = confusions.pair_shares(counts)
    assert shares[0, 1] == shares[1, 0] == pytest.approx((4 / 5 + 3 / 4) / 2)  # two correct rows are added
    assert shares[0, 2] == 1 and shares[0, 3] == 1  # a class without rows is told apart


def test_a_network_that_always_predicts_the_larger_class_tells_nothing_apart():
    counts = counts_of([300, 0, 0], [30, 0, 0], [0, 0, 50])
    assert confusions.find_groups(counts, 0.75).tolist() == [0, 0, 2]


def test_links_make_groups_and_a_handful_of_rows_proves_nothing():
    counts = np.diag([40] * 6)
    counts[1, 4] = counts[4, 1] = counts[4, 5] = counts[5, 4] = 40  # 1-4-5, by two links
    counts[0, 0], counts[0, 3] = 1, 1                               # one of two rows
    groups = confusions.find_groups(counts, 0.75)
    assert groups.tolist() == [0, 1, 2, 3, 1, 1]
    (members, inside), = confusions.list_groups(counts, groups)
    assert members.tolist() == [1, 4, 5] and inside == 160
    assert confusions.find_groups(counts, 0.5).tolist() == list(range(6))


def test_groups_are_scored_on_rows_that_did_not_make_them():
    """Of random predictions: groups found on the scored rows flatter, those of the other half do not."""
    rng = np.random.default_rng(0)
    targets, predicted = rng.integers(0, 100, 1000), rng.integers(0, 100, 1000)
    groups = confusions.find_groups(confusions.confusion_counts(targets, predicted, 100), 0.75)
    same = (groups[targets] == groups[predicted]).mean()
    assert confusions.cross_fitted_accuracy(targets, predicted, 100, 0.75) < same - 0.02
    twins = rng.integers(0, 2, 2000)
    assert confusions.cross_fitted_accuracy(twins, rng.integers(0, 2, 2000), 2, 0.75) == 1


def test_the_command_writes_table_and_picture(competition, command, main_in_process, tmp_path, capsys):
    train = pd.read_csv(competition / "train.csv")
    ring, slash = train.label == 101, train.label == 1400
    train.loc[ring | slash, "label"] = np.where(np.arange((ring | slash).sum()) // 2 % 2, 101, 1400)  # at random
    train.to_csv(competition / "train.csv", index=False)
    assert main_in_process(*QUICK, "--num-epochs", "8", "--train-val-split", "0.5")[0] == 0
    paths = ["--data-dir", str(competition), "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path)]
    assert confusions.main([str(command.output / "best_model.pth"), *paths]) == 0
    printed = capsys.readouterr().out
    assert "each group as one class" in printed and "| 101 1400 |" in printed
    pairs = pd.read_csv(tmp_path / "confused_pairs.csv", dtype={"label_a": str, "label_b": str})
    assert pairs.label_a.iloc[0] == "101" and pairs.label_b.iloc[0] == "1400" and pairs.told_apart.iloc[0] < 0.75
    assert (np.asarray(Image.open(tmp_path / "confused_groups.png").convert("L")) < 128).any()


def test_a_confused_class_may_have_no_validation_row(tmp_path):
    counts, targets = np.array([[0, 10, 0], [0, 0, 0], [0, 0, 9]]), np.array([0] * 10 + [2] * 9)
    groups = confusions.find_groups(counts, 0.75)
    confusions.plot_groups(tmp_path / "a.png", confusions.list_groups(counts, groups), counts, list("abc"),
                           np.zeros((19, 8, 8), dtype=np.uint8), targets)
    assert groups.tolist() == [0, 0, 2] and (tmp_path / "a.png").exists()


@pytest.mark.parametrize("threshold", ["0", "1.5", "nan"])
def test_a_threshold_outside_0_to_1_is_refused(capsys, threshold):
    with pytest.raises(SystemExit, match="2"):
        confusions.main(["a.pth", "--threshold", threshold])
    assert f"--threshold must be above 0 and at most 1, not {threshold}" in capsys.readouterr().err


def test_checkpoints_that_cannot_be_scored_are_refused(competition, command, main_in_process, tmp_path, capsys):
    paths = ["--data-dir", str(competition), "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path)]
    assert confusions.main([str(tmp_path / "none.pth"), *paths]) == 1
    assert "no such checkpoint" in capsys.readouterr().err
    assert main_in_process(*QUICK, "--num-epochs", "1", "--train-val-split", "1")[0] == 0
    whole = str(command.output / "best_model.pth")
    assert confusions.main([whole, *paths]) == 1
    assert "none is left to validate on" in capsys.readouterr().err
    other = tmp_path / "other"
    assert main_in_process(*QUICK, "--num-epochs", "1", "--split-seed", "7", "--output-dir", str(other))[0] == 0
    capsys.readouterr()
    assert confusions.main([whole, str(other / "best_model.pth"), *paths]) == 1
    assert "--split-seed" in capsys.readouterr().err
    train = pd.read_csv(competition / "train.csv").replace({"label": {3: 4}})
    train.to_csv(competition / "train.csv", index=False)
    assert confusions.main([str(other / "best_model.pth"), *paths]) == 1
    assert "not the rows that" in capsys.readouterr().err
