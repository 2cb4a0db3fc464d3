"""Bad input through the command line: one line that says what is wrong, and nothing of the user's is touched."""

import os
import shutil
import sys

import pandas as pd
import pytest
import torch
from conftest import QUICK

import script


def edit(name, change):
    """A fault: the table's text, changed."""
    def fault(data):
        path = data / name
        path.write_text(change(path.read_text()))
    return fault


def image(data, row, table="train.csv"):
    return data / "Dataset_Image" / pd.read_csv(data / table).image_path.iloc[row]


def half(path):
    path.write_bytes(path.read_bytes()[:60])


def cell(column, row, value, name="train.csv"):
    def fault(data):
        table = pd.read_csv(data / name, dtype=str)
        table.loc[row, column] = value
        table.to_csv(data / name, index=False)
    return fault


FAULTS = {
    "no train.csv": (lambda data: (data / "train.csv").unlink(), "train.csv: no such file"),
    "no test.csv": (lambda data: (data / "test.csv").unlink(), "test.csv: no such file"),
    "train.csv a folder": (lambda data: [(data / "train.csv").unlink(), (data / "train.csv").mkdir()], "train.csv: "),
    "no image folder": (lambda data: shutil.rmtree(data / "Dataset_Image"), "Dataset_Image: no such folder"),
    "an empty train.csv": (edit("train.csv", lambda text: ""), "train.csv: the file is empty"),
    "no rows": (edit("test.csv", lambda text: text.splitlines()[0]), "test.csv: the table has a header and no rows"),
    "no label column": (edit("train.csv", lambda text: text.replace("label", "class", 1)), "no column 'label'"),
    "no id column": (edit("test.csv", lambda text: text.replace("example_id", "id", 1)), "no column 'example_id'"),
    "no path column": (edit("test.csv", lambda text: text.replace("image_path", "file", 1)), "no column 'image_path'"),
    "an empty label": (cell("label", 3, ""), "train.csv, row 5: label is empty"),
    "an empty path": (cell("image_path", 4, "", "test.csv"), "test.csv, row 6: image_path is empty"),
    "an empty id": (cell("example_id", 4, "", "test.csv"), "test.csv, row 6: example_id is empty"),
    "a repeated id": (edit("test.csv", lambda text: text + text.splitlines()[1] + "\n"),
                      "test.csv, row 32: example_id "),
    "one class": (edit("train.csv", lambda text: "image_path,label\n" + "\n".join(
        line.split(",")[0] + ",3" for line in text.splitlines()[1:])), "every row has the label '3'"),
    "a missing image": (lambda data: image(data, 6).unlink(), "train.csv, row 8: "),
    "an empty image": (lambda data: image(data, 6).write_bytes(b""), "the file is empty"),
    "half an image": (lambda data: half(image(data, 6)), "train.csv, row 8: "),
    "not an image": (lambda data: image(data, 0, "test.csv").write_text("<html>"), "test.csv, row 2: "),
    "an image that is a folder": (lambda data: [image(data, 6).unlink(), image(data, 6).mkdir()], "is a directory"),
    "another separator": (edit("train.csv", lambda text: text.replace(",", ";")), "is it separated by commas?"),
    "a NUL in a path": (cell("image_path", 2, "data/\0.png"), "train.csv"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_data_is_named_and_old_files_stay(main_in_process, command, name):
    fault, message = FAULTS[name]
    command.output.mkdir()
    for kept in ("submission.csv", "best_model.pth", "history.csv"):
        (command.output / kept).write_text("old")
    fault(command.data)
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and error.startswith("error: ") and message in error, error
    assert len(error.splitlines()) == (2 if "image cannot be used" in error else 1)
    assert {(command.output / kept).read_text() for kept in os.listdir(command.output)} == {"old"}


def test_bad_images_of_both_tables_are_listed_before_training(main_in_process, command):
    image(command.data, 6).unlink()
    image(command.data, 3, "test.csv").write_bytes(b"")
    status, out, error = main_in_process(*QUICK)
    assert status == 1 and "2 images cannot be used" in error and "epoch" not in out
    assert "train.csv, row 8" in error and "test.csv, row 5" in error


@pytest.mark.parametrize(("content", "message"), [(None, "no such checkpoint"), (b"", "not a whole checkpoint"),
                                                  (b"PK\x03\x04 rubbish", "not a whole checkpoint")])
def test_an_unreadable_checkpoint_is_named(main_in_process, command, tmp_path, content, message):
    path = tmp_path / "model.pth"
    if content is not None:
        path.write_bytes(content)
    status, _, error = main_in_process("predict", str(path))
    assert status == 1 and f"model.pth: {message}" in error and len(error.splitlines()) == 1
    assert not (command.output / "submission.csv").exists()


def test_an_output_folder_that_cannot_be_is_refused_first(main_in_process, command):
    command.output.write_text("a file")
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and "cannot be written to" in error and "--output-dir" in error


def test_a_folder_in_the_place_of_an_output_is_refused_first(main_in_process, command):
    (command.output / "best_model.pth").mkdir(parents=True)
    status, out, error = main_in_process(*QUICK)
    assert status == 1 and "a folder stands where" in error and "epoch" not in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--device", "cuda:77"], "--device cuda:77 does not work here"),
    (["--max-minutes", "0.01"], "--max-minutes 0.01 leaves no time to train"),
    (["--precision", "fp16"], "--precision fp16 trains on a GPU only"),
    (["--model", "torchvision:alexnet", "--max-minutes", "5"], "cannot take images of 16 pixels"),
    (["--model", "torchvision:vit_b_16", "--image-size", "28"], "cannot take images of 28 pixels"),
    (["--tensorboard", "--model", "mlp"], "pip install tensorboard"),
])
def test_settings_that_cannot_be_used_here_are_usage_errors(main_in_process, arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not installed
    status, _, error = main_in_process(*QUICK, *arguments)
    assert status == 2 and message in error and len(error.splitlines()) == 1


def test_plateau_without_validation_rows_is_refused(main_in_process, command):
    table = pd.read_csv(command.data / "train.csv", dtype=str).head(10)  # two of each class
    table.to_csv(command.data / "train.csv", index=False)
    for flags in (["--schedule", "plateau"], ["--early-stopping", "2"]):
        status, _, error = main_in_process(*QUICK, *flags)
        assert status == 2 and "--schedule plateau and --early-stopping need validation rows" in error


def test_running_out_of_memory_is_one_line(main_in_process, monkeypatch):
    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(script, "train", exhaust)
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and "--batch-size" in error.splitlines()[-1] and "Traceback" not in error


def test_the_real_command_has_no_traceback(command):
    (command.data / "train.csv").unlink()
    done = command()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    done = command("--num-epochz", "3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean --num-epochs?" in done.stderr
