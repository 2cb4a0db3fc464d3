"""The commands run, predict and evaluate, end to end, on a small competition whose labels have gaps."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, QUICK, REPOSITORY, Command, make_competition, make_pixel_competition

import script
from pipeline.metrics import score

OUTPUTS = {"best_model.pth", "submission.csv", "history.csv", "run.json", "class_accuracy.csv", "val_probabilities.npz"}
PICTURES = {"class_distribution.png", "samples.png", "curves.png", "confusions.png", "class_accuracy.png",
            "predictions.png"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the command and the output of one real run that learns its competition."""
    folder = tmp_path_factory.mktemp("finished")
    command = Command(make_competition(folder / "competition"), folder / "out", folder / "cache")
    done = command("--num-epochs", "8", "--batch-size", "16", "--image-size", "16")
    assert done.returncode == 0, done.stderr
    return command, done


def test_run_writes_everything_and_learns(finished):
    command, done = finished
    assert set(os.listdir(command.output)) == OUTPUTS | PICTURES
    assert (OUTPUTS | PICTURES) - {"best_model.pth", "submission.csv"} <= script.RESERVED_FILES
    test = pd.read_csv(command.data / "test.csv", dtype=str)
    submission = command.submission()
    assert submission.columns.tolist() == ["example_id", "label"]
    assert submission.example_id.tolist() == test.example_id.tolist()
    truth = [CLASSES[(100 + row) % 5] for row in range(30)]  # as make_competition draws them
    assert np.mean(submission.label == truth) >= 0.8
    history = pd.read_csv(command.output / "history.csv")
    assert len(history) == 8 and history.val_accuracy.between(0, 1).all()
    assert "Traceback" not in done.stderr and done.stderr == ""


def test_log_describes_data_model_and_result(finished):
    _, done = finished
    for text in ("device cpu", "100 labelled images of 5 classes, 20 to 20 per class (imbalance 1.0 to 1)",
                 "model cnn (auto: the choice for cpu)", "MathSymbolCNN, 2.63 million parameters", "black on white",
                 "90 rows to train on, 10 to validate on, 30 to predict", "epoch   8/8", "per class", "total time"):
        assert text in done.stdout, text


def test_run_record_holds_settings_versions_and_device(finished):
    command, _ = finished
    record = json.loads((command.output / "run.json").read_text())
    checkpoint = torch.load(command.output / "best_model.pth", weights_only=True)
    assert record["config"] == checkpoint["config"]
    assert record["config"]["model"] == "cnn"
    assert record["config"]["batch_size"] == 16 and record["config"]["num_epochs"] == 8
    assert record["versions"]["torch"] == torch.__version__ and record["device"].startswith("cpu")
    own = {name: value for name, value in record["metrics"].items() if not name.startswith("expected_")}
    assert checkpoint["classes"] == CLASSES and own == checkpoint["metrics"]


def test_predict_gives_the_same_submission(finished, tmp_path, capsys):
    command, _ = finished
    again = Command(command.data, tmp_path / "out", command.cache)
    done = again("predict", str(command.output / "best_model.pth"))
    assert done.returncode == 0, done.stderr
    assert again.submission().equals(command.submission())
    assert "decoded" not in done.stdout  # the first run left the images in the cache
    assert script.main(again.arguments("predict", *[str(command.output / "best_model.pth")] * 2)) == 0
    assert "the mean of 2 networks" in capsys.readouterr().out and again.submission().equals(command.submission())


def test_evaluate_repeats_the_metrics_of_the_validation_rows(finished, tmp_path):
    command, _ = finished
    kept = np.load(command.output / "val_probabilities.npz")
    train = pd.read_csv(command.data / "train.csv", dtype=str)
    train.iloc[kept["rows"]].to_csv(tmp_path / "labelled.csv", index=False)
    again = Command(command.data, tmp_path / "out", command.cache)
    done = again("evaluate", str(command.output / "best_model.pth"), "--test-csv", str(tmp_path / "labelled.csv"))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((command.output / "run.json").read_text())["metrics"]
    assert (f"loss {metrics['val_loss']:.4f}, accuracy {metrics['val_accuracy']:.2%}, top 3 "
            f"{metrics['val_top3_accuracy']:.2%}, per class {metrics['val_class_accuracy']:.2%}") in done.stdout
    assert len(kept["rows"]) == 10 and kept["classes"].tolist() == CLASSES
    figures = score(kept["probabilities"], kept["targets"])
    assert figures["val_loss"] == pytest.approx(metrics["val_loss"])
    written = {f"evaluation_{name}" for name in ("class_accuracy.csv", "class_accuracy.png", "confusions.png",
                                                 "predictions.png")}
    assert set(os.listdir(again.output)) == written
    table = pd.read_csv(again.output / "evaluation_class_accuracy.csv", dtype={"label": str})
    assert table.label.tolist() == CLASSES and table.images.sum() == 10
    assert (table.accuracy * table.images).sum() / 10 == pytest.approx(metrics["val_accuracy"])


def test_evaluate_refuses_unknown_label(finished, tmp_path, capsys):
    command, _ = finished
    train = pd.read_csv(command.data / "train.csv", dtype=str)
    train.loc[3, "label"] = "88"
    train.to_csv(tmp_path / "labelled.csv", index=False)
    again = Command(command.data, tmp_path / "out", command.cache).arguments(
        "evaluate", str(command.output / "best_model.pth"), "--test-csv", str(tmp_path / "labelled.csv"))
    assert script.main(again) == 1
    error = capsys.readouterr().err
    assert "labelled.csv, row 5: label '88' is none of the 5 classes" in error and "remove the row" in error
    train.drop(index=3).to_csv(tmp_path / "labelled.csv", index=False)
    assert script.main(again) == 0 and "99 rows of " in capsys.readouterr().out


def test_files_of_an_earlier_run_are_removed(command, main_in_process):
    assert main_in_process(*QUICK, "--save-probabilities", "--pictures")[0] == 0
    assert set(os.listdir(command.output)) >= {"test_probabilities.npz", "val_probabilities.npz", "curves.png"}
    assert main_in_process(*QUICK, "--train-val-split", "1")[0] == 0
    assert set(os.listdir(command.output)) == {"best_model.pth", "submission.csv", "history.csv", "run.json"}


@pytest.mark.slow
def test_notebook_cell_runs_without_the_arguments_of_its_kernel(command):
    """The text of script.py is pasted into a cell, with edited settings; pipeline/ is on the path."""
    text = (REPOSITORY / "script.py").read_text()
    for name, value in (("data_dir", str(command.data)), ("output_dir", str(command.output)), ("min_steps", 1),
                        ("cache_dir", str(command.cache)), ("model", "tiny"), ("num_epochs", 1), ("device", "cpu")):
        text, count = re.subn(rf"(?m)^(    {name}: [^=]+ = )\S+", rf"\g<1>{value!r}", text, count=1)
        assert count == 1
    cell = f"import sys\nsys.argv = ['kernel.py', '-f', 'kernel.json']\n{text}\nprint('the next cell')\n"
    kernel = [sys.executable, "-c", "import sys; exec(compile(sys.stdin.read(), '<cell>', 'exec'))"]
    done = subprocess.run(kernel, input=cell, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0 and done.stdout.endswith("the next cell\n"), done.stderr
    assert len(command.submission()) == 30


@pytest.mark.slow
def test_pixel_tables_and_other_file_names(tmp_path):
    command = Command(make_pixel_competition(tmp_path / "digits"), tmp_path / "out", tmp_path / "cache")
    done = command(*QUICK, "--num-epochs", "15", "--model-file", "Digits.pt", "--submission-file", "solution.csv")
    assert done.returncode == 0, done.stderr
    assert "white on black, stored at 12 pixels" in done.stdout
    named = {"Digits.pt", "solution.csv"}
    assert set(os.listdir(command.output)) == OUTPUTS - {"best_model.pth", "submission.csv"} | named
    solution = pd.read_csv(command.output / "solution.csv", dtype=str)
    assert solution.columns.tolist() == ["ImageId", "Label"]
    assert solution.ImageId.tolist() == [str(number) for number in range(1, 21)]
    assert np.mean(solution.Label == [str(row % 5) for row in range(20)]) > 0.6
    again = command("predict", "--model-file", "Digits.pt", "--submission-file", "again.csv")
    assert again.returncode == 0, again.stderr
    assert (command.output / "again.csv").read_text() == (command.output / "solution.csv").read_text()


@pytest.mark.parametrize("preset", ["digits-mlp", "digits-cnn", "digits-tiny", "digits-fast", "digits-best",
                                    "digits-resnet18"])
def test_digit_preset_runs(tmp_path, preset, main_in_process):
    data = make_pixel_competition(tmp_path / "digits")
    status, out, error = main_in_process("--data-dir", str(data), "--preset", preset, "--num-epochs", "1",
                                         "--no-pictures", "--batch-size", "16")
    assert status == 0, error
    assert "epoch   1/1" in out


@pytest.mark.slow
def test_transfer_preset_runs_from_a_file_of_weights(tmp_path, main_in_process):
    """Random weights of torchvision's network replace the pretrained ones, which need a download."""
    import torchvision

    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    data = make_pixel_competition(tmp_path / "digits")
    status, out, error = main_in_process("--data-dir", str(data), "--preset", "digits-transfer", "--num-epochs", "2",
                                         "--no-pictures", "--weights", str(tmp_path / "resnet50.pth"))
    assert status == 0, error
    assert "torchvision:resnet50, 23.51 million parameters" in out and "epoch   2/2" in out


def test_permuting_the_test_table_permutes_the_submission(finished, tmp_path):
    command, _ = finished
    test = pd.read_csv(command.data / "test.csv", dtype=str).sample(frac=1, random_state=1)
    test.to_csv(tmp_path / "test.csv", index=False)
    again = Command(command.data, tmp_path / "out", command.cache)
    network = str(command.output / "best_model.pth")
    assert script.main(again.arguments("predict", network, "--test-csv", str(tmp_path / "test.csv"))) == 0
    straight = command.submission().set_index("example_id").label
    assert again.submission().example_id.tolist() == test.example_id.tolist()
    assert again.submission().set_index("example_id").label.to_dict() == straight.to_dict()


@pytest.mark.slow
def test_two_runs_with_one_seed_give_the_same_files(command, tmp_path):
    texts = []
    for seed in ("1", "1", "2"):
        assert command(*QUICK, "--model", "cnn", "--seed", seed).returncode == 0
        history = pd.read_csv(command.output / "history.csv").drop(columns="seconds")
        texts.append((command.output / "submission.csv").read_text() + history.to_csv())
    assert texts[0] == texts[1] != texts[2]


def test_labels_are_submitted_as_they_were_read(tmp_path):
    classes = ["007", "NA", "\\frac{a}{b}, c", "7", "β"]
    command = Command(make_competition(tmp_path / "competition", classes=classes), tmp_path / "out", tmp_path / "cache")
    assert script.main(command.arguments(*QUICK, "--num-epochs", "6")) == 0
    assert set(command.submission().label) <= set(classes) and command.submission().label.nunique() >= 3


@pytest.mark.slow
def test_read_only_data_folder_is_accepted(command):
    """Permissions do not bind every user, so the contents of the folders are compared too."""
    folders = [folder for folder, _, _ in os.walk(command.data)]
    before = {folder: sorted(os.listdir(folder)) for folder in folders}
    for folder in folders:
        os.chmod(folder, 0o555)
    done = command(*QUICK)
    for folder in folders:
        os.chmod(folder, 0o755)
    assert done.returncode == 0, done.stderr
    assert {folder: sorted(os.listdir(folder)) for folder in folders} == before


@pytest.mark.slow
def test_working_folder_is_the_default(command):
    done = subprocess.run([sys.executable, str(REPOSITORY / "script.py"), *QUICK, "--cache-dir", str(command.cache)],
                          cwd=command.data, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(command.data)) >= OUTPUTS


def test_training_on_all_rows_keeps_the_last_epoch(main_in_process, command):
    status, out, _ = main_in_process(*QUICK, "--train-val-split", "1")
    assert status == 0 and "100 rows to train on, 0 to validate on" in out
    assert script.load_checkpoint(command.output / "best_model.pth").metrics["epoch"] == 2
    assert pd.read_csv(command.output / "history.csv").val_loss.isna().all()


def test_checkpoint_without_knn_has_no_index(main_in_process, command):
    status, _, error = main_in_process(*QUICK, "--knn-neighbors", "0")
    assert status == 0, error
    assert torch.load(command.output / "best_model.pth", weights_only=True)["knn"] == {}
    kept = script.load_checkpoint(command.output / "best_model.pth").metrics
    history = pd.read_csv(command.output / "history.csv")
    assert kept["val_accuracy"] == pytest.approx(history.val_accuracy[kept["epoch"] - 1])


def test_classic_preset_runs(main_in_process, command):
    status, _, error = main_in_process("--preset", "classic", "--num-epochs", "1", "--image-size", "16")
    assert status == 0, error
    config = script.load_checkpoint(command.output / "best_model.pth").config
    assert (config.batch_size, config.learning_rate, config.schedule, config.mixup) == (32, 3e-4, "plateau", True)


@pytest.mark.slow
def test_time_limit_ends_in_a_submission(command):
    done = command("--max-minutes", "0.5", "--num-epochs", "100000", "--batch-size", "16", "--image-size", "16",
                   "--no-pictures")
    assert done.returncode == 0, done.stderr
    assert len(command.submission()) == 30 and len(pd.read_csv(command.output / "history.csv")) < 100_000


def test_interruption_is_one_line_and_status_130(main_in_process, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", interrupt)
    status, _, error = main_in_process(*QUICK)
    assert status == 130 and error.startswith("stopped by SIGINT: the same command resumes")


def test_a_run_says_what_to_expect_of_the_test_rows(main_in_process, command):
    status, out, error = main_in_process(*QUICK, "--num-epochs", "6", "--model", "cnn")
    metrics = json.loads((command.output / "run.json").read_text())["metrics"]
    assert status == 0 and "expected_test_accuracy" in metrics and metrics["expected_test_accuracy_error"] > 0, error
    expected = f"expected accuracy on the test rows {metrics['expected_test_accuracy']:.2%} +- "
    *_, expected_line, alone, kept, wrote, total = out.splitlines()
    assert (kept[:10], wrote[:6], total[:10]) == ("kept epoch", "wrote ", "total time"), "these stand last"
    assert expected in expected_line and "network alone" in alone and f"{metrics['val_accuracy']:.2%}, top 3" in kept
    assert max(map(len, (expected_line, alone, kept))) <= 80
    status, out, _ = main_in_process(*QUICK, "--folds", "2", "--no-resume")
    assert status == 0 and "expected accuracy on the test rows" in out.splitlines()[-4]
    status, out, _ = main_in_process(*QUICK, "--train-val-split", "1", "--no-resume")
    assert status == 0 and "expected accuracy" not in out


def test_predict_turns_pixels_as_the_training_did(tmp_path, capsys):
    command = Command(make_pixel_competition(tmp_path / "digits"), tmp_path / "out", tmp_path / "cache")
    assert script.main(command.arguments(*QUICK, "--model", "cnn", "--transpose", "--num-epochs", "8")) == 0
    answers = command.submission()
    network = str(command.output / "best_model.pth")
    assert script.main(command.arguments("predict", network)) == 0
    assert command.submission().equals(answers)
    for name in ("train.csv", "test.csv"):  # upright pixels give other answers
        table = pd.read_csv(command.data / name)
        pixels = [column for column in table if column != "label"]
        table[pixels] = table[pixels].to_numpy().reshape(-1, 12, 12).swapaxes(1, 2).reshape(len(table), -1)
        table.to_csv(command.data / name, index=False)
    assert script.main(command.arguments("predict", network)) == 0
    assert not command.submission().equals(answers)
    other = Command(command.data, tmp_path / "other", command.cache)
    assert script.main(other.arguments(*QUICK)) == 0
    assert script.main(command.arguments("predict", network, str(other.output / "best_model.pth"))) == 2
    assert "trained with different --transpose or --pixel-shape; use one at a time" in capsys.readouterr().err


def test_an_image_of_a_folder_is_named_by_its_path(tmp_path, capsys):
    data = make_competition(tmp_path / "data")
    for part, labels in (("train", "ab"), ("held", "ac")):
        for number, label in enumerate(labels * 12):
            (data / part / label).mkdir(parents=True, exist_ok=True)
            os.link(sorted((data / "Dataset_Image" / "data").iterdir())[number], data / part / label / f"{number}.png")
    command = Command(data, tmp_path / "out", tmp_path / "cache")
    flags = ["--train-csv", "train", "--test-csv", "none", *QUICK]
    assert script.main(command.arguments(*flags)) == 0
    assert script.main(command.arguments("evaluate", str(command.output / "best_model.pth"), "--test-csv", "held")) == 1
    assert f"{data}/held/c/1.png: label 'c' is none of the 2 classes" in capsys.readouterr().err
    assert script.main(command.arguments(*flags, "--extra-csv", "held", "--no-resume")) == 1
    assert f"{data}/held/c/1.png (and 11 more rows): the training table has no label 'c'" in capsys.readouterr().err
