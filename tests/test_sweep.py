"""tools/sweep.py: every combination once, resumed where it was stopped, with those that diverge."""

import re

import pandas as pd
import pytest
from conftest import make_competition
from PIL import Image

import script
from tools import sweep

COMMON = ["--model", "mlp", "--image-size", "8", "--num-epochs", "2", "--optimizer", "sgd", "--precision", "float32"]


@pytest.fixture
def arguments(tmp_path):
    competition = make_competition(tmp_path / "competition")
    return ["--data-dir", str(competition), "--cache-dir", str(tmp_path / "cache"),
            "--output-dir", str(tmp_path / "out"), *COMMON]


def test_every_combination_is_trained_ranked_and_drawn(arguments, tmp_path, capsys):
    assert sweep.main([*arguments, "--learning-rate", "0.01,0.1", "--batch-size=16,32,50"]) == 0
    rows = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert rows[["learning_rate", "batch_size"]].to_numpy().tolist() == [
        [0.01, 16], [0.01, 32], [0.01, 50], [0.1, 16], [0.1, 32], [0.1, 50]]
    assert rows.val_accuracy.between(0, 1).all() and (rows.epochs == 2).all() and rows.fault.isna().all()
    assert len(pd.read_csv(tmp_path / "out" / "history.csv")) == 12
    out = capsys.readouterr().out
    best = rows.sort_values(["val_accuracy", "val_loss"], ascending=[False, True]).iloc[0]
    first = re.search(r"\|--:.*\n(\|.*\|)", out)[1]
    assert first.startswith(f"| {best.learning_rate:g} | {best.batch_size:g} | {best.val_accuracy:.2%} |")
    for name in ("curves.png", "heat_map.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 300


def test_a_stopped_sweep_is_resumed(arguments, tmp_path, monkeypatch, capsys):
    grid, trained, fit = ["--learning-rate", "0.01,0.1,0.2"], [], script.fit

    def stop_at_the_second(config, *others):
        trained.append(config.learning_rate)
        if trained == [0.01, 0.1]:
            raise KeyboardInterrupt
        return fit(config, *others)

    monkeypatch.setattr(script, "fit", stop_at_the_second)
    assert sweep.main([*arguments, *grid]) == 130
    assert "continues with the next combination" in capsys.readouterr().err
    assert pd.read_csv(tmp_path / "out" / "sweep.csv").learning_rate.tolist() == [0.01]
    assert sweep.main([*arguments, *grid]) == 0 and trained == [0.01, 0.1, 0.1, 0.2]
    assert pd.read_csv(tmp_path / "out" / "sweep.csv").learning_rate.tolist() == [0.01, 0.1, 0.2]
    assert sweep.main([*arguments, *grid, "--momentum", "0.5"]) == 2
    assert "holds a sweep of other settings or data" in capsys.readouterr().err


def test_files_of_another_program_are_not_overwritten(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "curves.png").write_bytes(b"a run's")
    assert sweep.main([*arguments, "--learning-rate", "0.01,0.1"]) == 2
    assert "holds another curves.png; name another --output-dir" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves.png"]


def test_an_empty_string_is_a_value_that_is_found_again(arguments, tmp_path, monkeypatch):
    assert sweep.main([*arguments, "--weights", ",none.pth"]) == 0
    monkeypatch.setattr(script, "fit", lambda *_: pytest.fail("trained again"))
    assert sweep.main([*arguments, "--weights", ",none.pth"]) == 0
    assert len(pd.read_csv(tmp_path / "out" / "sweep.csv")) == 2


def test_a_training_that_diverges_is_a_row(arguments, tmp_path):
    flags = ["--batch-size", "4", "--weight-decay", "1", "--learning-rate", "100,0.001"]  # weights grow by 99 a step
    assert sweep.main([*arguments, *flags]) == 0
    rows = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert "training diverged" in rows.fault[0] and rows.epochs.tolist() == [0, 2]
    assert rows.val_accuracy.notna().tolist() == [False, True]


def test_recipes_follow_the_swept_model(arguments, tmp_path):
    flags = [flag for flag in arguments if flag not in ("--model", "mlp", "--optimizer", "sgd")]
    assert sweep.main([*flags, "--model", "mlp,tiny"]) == 0
    assert pd.read_csv(tmp_path / "out" / "sweep.csv").model.tolist() == ["mlp", "tiny"]


@pytest.mark.parametrize("flags, message", [
    (["--split-seed", "1,2"], "--split-seed cannot be swept over"),
    (["--preset", "classic,digits-mlp"], "--preset cannot be swept over"),
    (["--knn-neighbors", "0,30"], "--knn-neighbors has no effect on a sweep"),
    (["--extra-weight", "0.5,1"], "--extra-weight cannot be swept over"),
    (["--eval-batch-size", "16,32"], "--eval-batch-size cannot be swept over"),
    (["--on-bad-image", "skip,error"], "--on-bad-image cannot be swept over"),
    (["--dropout", "auto,0.5"], "--dropout: auto cannot be swept over"),
    (["--no-pictures"], "--no-pictures has no effect on a sweep"),
    (["--learning-rate", "0.1", "--batch-size", "32"], "nothing is swept over"),
    (["--learning-rate", "0.1", "--train-val-split", "1"], "a sweep ranks by validation rows"),
])
def test_flags_that_cannot_be_swept_over_are_refused(arguments, flags, message, capsys):
    assert sweep.main([*arguments, *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_default_grid_combines_rates_with_batch_sizes():
    fixed, grid = sweep.parse_grid(["--preset", "digits-mlp", "--milestones", "3,4"])
    assert fixed == ["--preset", "digits-mlp", "--milestones", "3,4"] and grid == sweep.DEFAULT_GRID
    assert len(grid["learning_rate"]) * len(grid["batch_size"]) == 25
    assert sweep.parse_grid(["--batch-size", "64"]) == (["--batch-size", "64"],
                                                        {"learning_rate": sweep.DEFAULT_GRID["learning_rate"]})


@pytest.mark.slow
def test_a_network_that_cannot_take_its_size_is_a_row(arguments, tmp_path):
    flags = ["--num-epochs", "1", "--image-size", "16,32", "--learning-rate", "0.01"]
    arguments = [flag for flag in arguments if flag not in ("8", "--image-size")]
    arguments[arguments.index("mlp")] = "torchvision:vgg11"
    assert sweep.main([*arguments, *flags]) == 0
    rows = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert "cannot take images of 16 pixels" in rows.fault[0] and rows.epochs.tolist() == [0, 1]


def test_epochs_of_a_combination_cut_off_between_two_files_count_once(arguments, tmp_path):
    assert sweep.main([*arguments, "--learning-rate", "0.01,0.02"]) == 0
    path = tmp_path / "out" / "sweep.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert sweep.main([*arguments, "--learning-rate", "0.01,0.02"]) == 0
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert history[["learning_rate", "epoch"]].to_numpy().tolist() == [[0.01, 1], [0.01, 2], [0.02, 1], [0.02, 2]]


def test_a_comma_in_a_folder_name_is_not_a_grid():
    fixed, grid = sweep.parse_grid(["--data-dir", "a,b", "--learning-rate", "0.1,0.2"])
    assert fixed == ["--data-dir", "a,b"] and grid == {"learning_rate": [0.1, 0.2]}


def test_a_table_without_validation_rows_is_refused(tmp_path, capsys):
    data = make_competition(tmp_path / "few", 10)
    assert sweep.main(["--data-dir", str(data), "--cache-dir", str(tmp_path), "--output-dir", str(tmp_path / "out"),
                       *COMMON, "--learning-rate", "0.1,0.2"]) == 1
    assert "train.csv: every class has fewer than 4 rows" in capsys.readouterr().err
