"""Bad input through the command line: one line names file, row and remedy, and the user's files are unchanged."""

import os
import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK, Command, make_competition, make_pixel_competition
from PIL import Image

import script
from pipeline import files, splits, tables
from pipeline.errors import DataError
from pipeline.images import ImageStatistics, LoadSettings, load_images
from pipeline.tables import TableSource


def edit(name, change):
    """Return a fault that changes a table's text."""
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


def bomb(path):
    """Write a PNG of 20,000 x 20,000 pixels in 50 kilobytes."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(2501) * 20_000, 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
                     + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def link_out(data):
    outside = data.parent / "outside.png"
    shutil.copy(image(data, 6), outside)
    image(data, 6).unlink()
    image(data, 6).symlink_to(outside)


def link_folder_out(data):
    (data / "Dataset_Image" / "data").rename(data.parent / "moved")
    (data / "Dataset_Image" / "data").symlink_to(data.parent / "moved")


def half_jpeg(data):
    name = image(data, 6)
    Image.new("L", (300, 300), 255).save(name, format="JPEG")
    name.write_bytes(name.read_bytes()[:500])


def sample(change):
    """Return a fault that writes the sample_submission.csv of test.csv, changed."""
    def fault(data):
        ids = pd.read_csv(data / "test.csv", dtype=str).example_id
        change(pd.DataFrame({"example_id": ids, "label": "3"})).to_csv(data / "sample_submission.csv", index=False)
    return fault


FAULTS = {
    "no train.csv": (lambda data: (data / "train.csv").unlink(), "train.csv: no such file"),
    "no test.csv": (lambda data: (data / "test.csv").unlink(), "test.csv: no such file"),
    "train.csv an empty folder": (lambda data: [(data / "train.csv").unlink(), (data / "train.csv").mkdir()],
                                  "train.csv: no image"),
    "no image folder": (lambda data: shutil.rmtree(data / "Dataset_Image"), "Dataset_Image: no such folder"),
    "an empty train.csv": (edit("train.csv", lambda text: ""), "train.csv: the file is empty"),
    "binary data": (lambda data: (data / "train.csv").write_bytes(np.random.default_rng(0).bytes(5000)),
                    "train.csv: not a readable CSV table"),
    "an archive": (lambda data: (data / "train.csv").write_bytes(b"PK\x03\x04" + bytes(500)),
                   "train.csv: no column 'image_path'"),
    "UTF-16": (lambda data: (data / "train.csv").write_text((data / "train.csv").read_text(), encoding="utf-16"),
               "save it as UTF-8"),
    "Latin-1": (lambda data: (data / "train.csv").write_bytes(b"image_path,label\ndata/\xe9.png,3\n"),
                "save it as UTF-8"),
    "no rows": (edit("test.csv", lambda text: text.splitlines()[0]), "test.csv: the table has a header and no rows"),
    "no rows to train on": (edit("train.csv", lambda text: text.splitlines()[0]), "train.csv: the table has a header"),
    "no label column": (edit("train.csv", lambda text: "\n".join(
        line.split(",")[0] + ",u,v" for line in text.splitlines())), "no column 'label' in its header (image_path, u, "
                        "v); name the column that holds it with --label-column"),
    "several label columns": (edit("train.csv", lambda text: "\n".join(
        line + "," + line.split(",")[1] for line in text.replace("label", "class", 1).splitlines()).replace(
            ",class,class", ",class,target", 1)), "class or target may hold the labels"),
    "no column of that id": (edit("test.csv", lambda text: text.replace("example_id", "id,image_id", 1).replace(
        "\n", ",1\n").replace("image_id,1", "image_id")), "id or image_id may hold the ids; name the right one with"),
    "no path column": (edit("test.csv", lambda text: text.replace("image_path", "scan", 1)), "no column 'image_path' "
                       "in its header (scan, user_id, example_id); name the column that holds it with --image-column"),
    "two label columns": (edit("train.csv", lambda text: "\n".join(
        line + "," + line.split(",")[1] for line in text.splitlines())), "two columns are named 'label'; remove one"),
    "no header": (edit("train.csv", lambda text: text.split("\n", 1)[1]), "its first row is not a header; write one "
                  "above it, such as image_path,label"),
    "a row that is too long": (edit("train.csv", lambda text: text + "a.png,3,4\n"),
                               "Expected 2 fields in line 102, saw 3"),
    "a row that is too short": (edit("train.csv", lambda text: text + "a.png\n"), "row 102: label is empty"),
    "an open quote": (edit("train.csv", lambda text: text + '"a.png,3\n'), "inside string starting at row 102)"),
    "a carriage return": (edit("test.csv", lambda text: text + text.split("\n")[1].rsplit(",", 1)[0] + ',"a\rb"\n'),
                          "test.csv, row 32: example_id holds a carriage return"),
    "an empty label": (cell("label", 3, ""), "train.csv, row 5: label is empty"),
    "a blank label": (cell("label", 3, "  "), "train.csv, row 5: label is empty"),
    "an empty path": (cell("image_path", 4, "", "test.csv"), "test.csv, row 6: image_path is empty"),
    "an empty id": (cell("example_id", 4, "", "test.csv"), "test.csv, row 6: example_id is empty"),
    "a blank line between": (edit("train.csv", lambda text: text.replace("\n", "\n\n", 2)), "train.csv, row 2"),
    "a repeated id": (edit("test.csv", lambda text: text + text.splitlines()[1] + "\n"),
                      "test.csv, row 32: example_id "),
    "one class": (edit("train.csv", lambda text: "image_path,label\n" + "\n".join(
        line.split(",")[0] + ",3" for line in text.splitlines()[1:])), "every row has the label '3'"),
    "another separator": (edit("train.csv", lambda text: text.replace(",", ";")), "commas between its cells?"),
    "tabs": (edit("test.csv", lambda text: text.replace(",", "\t")), "commas between its cells?"),
    "a missing image": (lambda data: image(data, 6).unlink(), "train.csv, row 8: "),
    "an empty image": (lambda data: image(data, 6).write_bytes(b""), "the file is empty"),
    "half an image": (lambda data: half(image(data, 6)), "train.csv, row 8: "),
    "half a JPEG": (half_jpeg, "train.csv, row 8: "),
    "not an image": (lambda data: image(data, 0, "test.csv").write_text("<html>"), "test.csv, row 2: "),
    "an image that is a folder": (lambda data: [image(data, 6).unlink(), image(data, 6).mkdir()], "is a directory"),
    "a decompression bomb": (lambda data: bomb(image(data, 6)), "400000000 pixels"),
    "a large image": (lambda data: Image.new("1", (8000, 8000)).save(image(data, 6)),
                      "8000 x 8000 pixels are too many"),
    "a broken link": (lambda data: [image(data, 6).unlink(), image(data, 6).symlink_to("nowhere.png")],
                      "no such file"),
    "a NUL in a path": (cell("image_path", 2, "data/\0.png"), "train.csv"),
    "an absolute path": (cell("image_path", 2, "/etc/passwd"), "row 4: '/etc/passwd': its path is absolute and leads "),
    "a drive's path": (cell("image_path", 2, "C:/a.png"), "row 4: 'C:/a.png': its path is absolute"),
    "a path that climbs": (cell("image_path", 2, "data/../../../a.png"), "row 4: 'data/../../../a.png': its path "),
    "backslashes": (cell("image_path", 2, "data\\a.png", "test.csv"), "test.csv, row 4: 'data\\\\a.png': its path "
                    "holds a backslash"),
    "a link that leads out": (link_out, "row 8: 'data/"),
    "a linked folder that leads out": (link_folder_out, "a symbolic link leads out of "),
    "a sample with other columns": (sample(lambda table: table.assign(usage="public")),
                                    "sample_submission.csv: its columns are example_id, label, usage"),
    "a sample with fewer rows": (sample(lambda table: table.head(20)), "has 20 different ids in 20 rows, "),
    "a sample with another id": (sample(lambda table: table.replace({"example_id": {table.example_id[5]: "x"}})),
                                 "sample_submission.csv, row 7: example_id is 'x'"),
    "an empty sample": (lambda data: (data / "sample_submission.csv").write_text(""), "the file is empty"),
    "a sample with numbers for words": (lambda data: [sample(lambda table: table)(data),
                                                      cell("label", 3, "pi")(data)], "its labels are whole numbers"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_data_is_named_and_old_files_are_kept(main_in_process, command, name):
    fault, message = FAULTS[name]
    command.output.mkdir()
    for kept in ("submission.csv", "best_model.pth", "history.csv"):
        (command.output / kept).write_text("old")
    fault(command.data)
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and error.startswith("error: ") and message in error, error
    lines = error.splitlines()
    lists = re.match(r"error: .*(\d+ images? cannot|images can) be used", lines[0])
    assert len(lines) == 1 or (lists and len(lines) <= 12)
    assert "Traceback" not in error
    assert {(command.output / kept).read_text() for kept in os.listdir(command.output)} == {"old"}


def move_images(data):
    (data / "Dataset_Image").rename(data / "images")


def comma_in_path(data):
    image(data, 6).rename(data / "Dataset_Image" / "a,b.png")
    name = pd.read_csv(data / "train.csv").image_path[6]
    edit("train.csv", lambda text: text.replace(name, "a,b.png"))(data)


def without(row, name="train.csv"):
    """Return a change that removes a row of a table."""
    def change(data):
        pd.read_csv(data / name, dtype=str, na_filter=False).drop(index=row).to_csv(data / name, index=False)
    return change


def encoded(encoding):
    """Return a change that saves train.csv in another encoding."""
    def change(data):
        path, before = data / "train.csv", "latin-1" if encoding == "utf-8" else "utf-8"
        path.write_text(path.read_text(before), encoding)
    return change


def with_columns(label, other):
    """Return a fault that names the labels' column otherwise and adds one more."""
    def fault(data):
        table = pd.read_csv(data / "train.csv", dtype=str).rename(columns={"label": label})
        table.assign(**{other: "7"}).to_csv(data / "train.csv", index=False)
    return fault


# By the remedy's words in the message: a fault, and what the user changes in the data or adds to the command.
REMEDIES = {
    "name that of the images with --root-dir, here --root-dir images": (move_images, ["--root-dir", "images"]),
    "name the column that holds it with --label-column": (with_columns("symbol", "writer"),
                                                          ["--label-column", "symbol"]),
    "name the column that holds it with --image-column": (
        lambda data: [edit(name, lambda text: text.replace("image_path", "scan", 1))(data)
                      for name in ("train.csv", "test.csv")], ["--image-column", "scan"]),
    "may hold the labels, of its columns image_path, class, target; name the right one with --label-column": (
        with_columns("class", "target"), ["--label-column", "class"]),
    "name another with --train-csv": (lambda data: (data / "train.csv").rename(data / "labels.csv"),
                                      ["--train-csv", "labels.csv"]),
    "name another with --test-csv": (lambda data: (data / "test.csv").rename(data / "rows.csv"),
                                     ["--test-csv", "rows.csv"]),
    "write one above it, such as image_path,label": (
        edit("train.csv", lambda text: text.split("\n", 1)[1]),
        edit("train.csv", lambda text: f"image_path,label\n{text}")),
    "two columns are named 'label'; remove one": (
        edit("train.csv", lambda text: "\n".join(line + "," + line.split(",")[1] for line in text.splitlines())),
        edit("train.csv", lambda text: "\n".join(line.rpartition(",")[0] for line in text.splitlines()))),
    "quotes around a cell that holds one": (comma_in_path,
                                            edit("train.csv", lambda text: text.replace("a,b.png", '"a,b.png"'))),
    "save it as UTF-8": (lambda data: [cell("label", 4, "\xe9")(data), encoded("latin-1")(data)], encoded("utf-8")),
    "commas between its cells?": (edit("train.csv", lambda text: text.replace(",", ";")),
                                   edit("train.csv", lambda text: text.replace(";", ","))),
    "fill it in": (cell("label", 3, ""), cell("label", 3, "17")),
    "or remove the row": (cell("image_path", 4, "", "test.csv"), without(4, "test.csv")),
    "would not keep; remove it": (
        edit("test.csv", lambda text: text + text.split("\n")[1].rsplit(",", 1)[0] + ',"a\rb"\n'),
        cell("example_id", 30, "ab", "test.csv")),
    "make each id unique": (
        edit("test.csv", lambda text: text + text.splitlines()[1] + "\n"),
        cell("example_id", 30, "another", "test.csv")),
    "replace each file": (lambda data: half(image(data, 6)), lambda data: shutil.copy(image(data, 7), image(data, 6))),
    "or remove its row": (lambda data: half(image(data, 6)), without(6)),
    "--on-bad-image skip": (lambda data: half(image(data, 6)), ["--on-bad-image", "skip"]),
    "scale it down": (lambda data: Image.new("1", (8000, 8000)).save(image(data, 6)),
                      lambda data: Image.open(image(data, 6)).resize((32, 32)).save(image(data, 6))),
    "its path holds a backslash; write /": (
        edit("test.csv", lambda text: text.replace("data/", "data\\")),
        edit("test.csv", lambda text: text.replace("data\\", "data/"))),
    "the submission must have the sample's": (
        sample(lambda table: table.head(20)),
        lambda data: pd.read_csv(data / "test.csv", dtype=str).head(20).to_csv(data / "test.csv", index=False)),
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_remedy_of_message_works(main_in_process, command, remedy):
    fault, change = REMEDIES[remedy]
    fault(command.data)
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and remedy in error, error
    if callable(change):
        change(command.data)
    status, _, error = main_in_process(*QUICK, *([] if callable(change) else change))
    assert status == 0 and len(command.submission()) >= 20, error


def test_bad_images_of_both_tables_are_listed_before_training(main_in_process, command):
    image(command.data, 6).unlink()
    image(command.data, 3, "test.csv").write_bytes(b"")
    status, out, error = main_in_process(*QUICK)
    assert status == 1 and "2 images cannot be used" in error and "epoch" not in out
    assert "train.csv, row 8" in error and "test.csv, row 5" in error


@pytest.mark.parametrize(("content", "message"), [(None, "no such checkpoint"), (b"", "not a complete checkpoint"),
                                                  (b"PK\x03\x04 rubbish", "not a complete checkpoint")])
def test_unreadable_checkpoint_is_named(main_in_process, command, tmp_path, content, message):
    path = tmp_path / "model.pth"
    if content is not None:
        path.write_bytes(content)
    status, _, error = main_in_process("predict", str(path))
    assert status == 1 and f"model.pth: {message}" in error and len(error.splitlines()) == 1
    assert not (command.output / "submission.csv").exists()


def test_file_in_place_of_output_folder_is_refused_before_training(main_in_process, command):
    command.output.write_text("a file")
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and "cannot be written to" in error and "--output-dir" in error


def test_read_only_output_folder_is_refused_before_training(main_in_process, command):
    """In /proc nobody may write, not even root, for whom no mode of a folder is read-only."""
    command.output = Path("/proc/sys/kernel")
    status, out, error = main_in_process(*QUICK)
    assert status == 1 and error.startswith("error: /proc/sys/kernel: cannot be written to") and "epoch" not in out


def test_folder_in_place_of_output_file_is_refused_before_training(main_in_process, command):
    (command.output / "best_model.pth").mkdir(parents=True)
    status, out, error = main_in_process(*QUICK)
    assert status == 1 and "a folder has the name of a file that will be written" in error and "epoch" not in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--device", "cuda:77"], "--device cuda:77 does not work here"),
    (["--max-minutes", "0.01"], "--max-minutes 0.01 leaves no time to train"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU"),
    (["--model", "torchvision:alexnet", "--max-minutes", "5"], "cannot take images of 16 pixels"),
    (["--model", "torchvision:vit_b_16", "--image-size", "28"], "cannot take images of 28 pixels"),
])
def test_unusable_settings_are_usage_errors(main_in_process, arguments, message):
    status, _, error = main_in_process(*QUICK, *arguments)
    assert status == 2 and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "remedy"), [
    (["--device", "cuda:77"], ["--device", "auto"]),
    (["--precision", "fp16"], ["--precision", "bf16"]),
    (["--precision", "fp16"], ["--precision", "float32"]),
])
def test_remedy_of_usage_error_works(main_in_process, arguments, remedy):
    status, _, error = main_in_process(*QUICK, *arguments)
    assert status == 2 and remedy[1] in error, error
    assert main_in_process(*QUICK, *remedy)[0] == 0


@pytest.mark.slow
def test_suggested_image_size_works(main_in_process):
    flags = [*QUICK, "--model", "torchvision:alexnet", "--num-epochs", "1"]
    status, _, error = main_in_process(*flags)
    assert status == 2 and "set another --image-size, such as 224" in error, error
    assert main_in_process(*flags, "--image-size", "224")[0] == 0


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


def test_real_command_prints_no_traceback(command):
    (command.data / "train.csv").unlink()
    done = command()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    done = command("--num-epochz", "3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean --num-epochs?" in done.stderr


PIXEL_FAULTS = {
    "a ragged row": (edit("train.csv", lambda text: text + "3,1,2\n"), "train.csv, row 62: 3 cells under a header of"),
    "a word": (cell("pixel7", 3, "dark"), "train.csv, row 5: pixel7 is 'dark'"),
    "a fraction": (cell("pixel7", 3, "0.5"), "train.csv, row 5: pixel7 is '0.5'"),
    "an empty pixel": (cell("pixel7", 3, ""), "train.csv, row 5: pixel7 is ''"),
    "a pixel above 255": (cell("pixel7", 3, "256"), "train.csv, row 5: pixel7 is '256'"),
    "a pixel below 0": (cell("pixel7", 3, "-1", "test.csv"), "test.csv, row 5: pixel7 is '-1'"),
    "no square": (edit("train.csv", lambda text: "\n".join(line.rsplit(",", 1)[0] for line in text.splitlines())),
                  "143 pixel columns, pixel0 to pixel142, are not a square image"),
    "a missing pixel": (edit("train.csv", lambda text: text.replace("pixel5,", "pixel500,", 1)),
                        "are not a square image"),
    "an empty label": (cell("label", 3, ""), "train.csv, row 5: label is empty"),
    "other ids in the sample": (lambda data: pd.DataFrame({"ImageId": range(19), "Label": 0}).to_csv(
        data / "sample_submission.csv", index=False), "sample_submission.csv, row 2: ImageId is '0'"),
}


@pytest.mark.parametrize("name", PIXEL_FAULTS)
def test_bad_pixel_tables_are_named(tmp_path, capsys, name):
    command = Command(make_pixel_competition(tmp_path / "data"), tmp_path / "out", tmp_path / "cache")
    fault, message = PIXEL_FAULTS[name]
    command.output.mkdir()
    (command.output / "submission.csv").write_text("old")
    fault(command.data)
    assert script.main(command.arguments(*QUICK)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert (command.output / "submission.csv").read_text() == "old"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the command of a competition with a network that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    command = Command(make_competition(folder / "competition"), folder / "out", folder / "cache")
    assert script.main(command.arguments(*QUICK)) == 0
    return command


class Payload:
    """An object whose unpickling runs a command."""

    def __reduce__(self):
        return os.system, ("touch payload-was-run",)


def changed(change):
    """Return a fault that changes the content of a checkpoint, with a correct SHA-256."""
    def fault(path):
        content = files.load_verified(path)
        files.save_verified(path, {**content, **change(content)})
    return fault


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


CHECKPOINT_FAULTS = {
    "a payload": (lambda path: torch.save({"model": Payload()}, path), "not a complete checkpoint"),
    "a bare payload": (lambda path: path.write_bytes(pickle.dumps(Payload())), "not a complete checkpoint"),
    "a flipped bit": (flip, "not a complete checkpoint"),
    "cut in half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "not a complete"),
    "nothing": (lambda path: path.write_bytes(b""), "not a complete checkpoint"),
    "weights alone": (lambda path: torch.save(files.load_verified(path)["model"], path), "not a complete checkpoint"),
    "another architecture": (changed(lambda content: {"config": {**content["config"], "model": "cnn"}}),
                             "not a complete checkpoint"),
    "fewer classes": (changed(lambda content: {"classes": content["classes"][:-1]}), "not a complete checkpoint"),
    "a folder": (lambda path: [path.unlink(), path.mkdir()], "not a complete checkpoint"),
    "another network's setting": (changed(lambda content: {"config": {**content["config"], "image_size": -1}}),
                                  "not a complete checkpoint"),
}


def test_checkpoint_with_the_setting_that_left_is_read(trained, tmp_path):
    shutil.copy(trained.output / "best_model.pth", tmp_path / "model.pth")
    changed(lambda content: {"config": {**content["config"], "initial_size": 0.75}})(tmp_path / "model.pth")
    assert script.load_checkpoint(tmp_path / "model.pth").config == script.load_checkpoint(
        trained.output / "best_model.pth").config


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CHECKPOINT_FAULTS)
def test_bad_checkpoints_are_refused_and_never_executed(trained, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    fault, message = CHECKPOINT_FAULTS[name]
    shutil.copy(trained.output / "best_model.pth", tmp_path / "model.pth")
    (tmp_path / "submission.csv").write_text("old")
    fault(tmp_path / "model.pth")
    other = Command(trained.data, tmp_path, trained.cache)
    assert script.main(other.arguments("predict", str(tmp_path / "model.pth"))) == 1
    error = capsys.readouterr().err
    assert f"model.pth: {message}" in error and error.count("\n") == 1, error
    assert (tmp_path / "submission.csv").read_text() == "old" and not (tmp_path / "payload-was-run").exists()


def test_flipped_bit_is_refused_or_changes_nothing(trained, tmp_path):
    """Only flipped bits in the padding of the archive, which hold nothing, may go unnoticed."""
    content = (trained.output / "best_model.pth").read_bytes()
    expected, refused = files.sha256_of(files.load_verified(trained.output / "best_model.pth")), 0
    for place in np.random.default_rng(0).integers(0, 8 * len(content), 60):
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        (tmp_path / "model.pth").write_bytes(spoilt)
        try:
            script.load_checkpoint(tmp_path / "model.pth")
            assert files.sha256_of(files.load_verified(tmp_path / "model.pth")) == expected
        except DataError:
            refused += 1
    assert refused > 30


IMAGES = {
    "CMYK": lambda path: Image.open(path).convert("CMYK").save(path, format="JPEG"),
    "16 bits": lambda path: Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path),
    "palette": lambda path: Image.open(path).convert("P").save(path),
    "alpha": lambda path: Image.open(path).convert("LA").save(path),
    "animated GIF": lambda path: Image.open(path).save(path, format="GIF", save_all=True, append_images=[
        Image.new("L", (32, 32), 0)]),
    "turned by EXIF": lambda path: Image.open(path).rotate(90).save(path, format="PNG", exif=turned()),
    "one pixel": lambda path: Image.new("L", (1, 1), 255).save(path),
}


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    return exif


@pytest.mark.parametrize("kind", IMAGES)
def test_image_kinds_are_read_as_the_same_grey_levels(competition, tmp_path, kind):
    table = tables.read_train_table(TableSource("train.csv", str(competition)))
    settings, statistics = LoadSettings(cache_dir=str(tmp_path)), ImageStatistics(255, 32)
    before = load_images([table], statistics, settings)[0][6].astype(int)
    IMAGES[kind](image(competition, 6))
    after = load_images([table], statistics, settings)[0][6].astype(int)
    assert not table.faults and (kind == "one pixel" or np.abs(after - before).mean() < 6)


def test_bad_images_are_skipped_on_request(main_in_process, command):
    spoilt = image(command.data, 6), image(command.data, 3, "test.csv"), image(command.data, 9, "test.csv")
    for path in spoilt:
        path.write_bytes(b"")
    for _ in range(2):  # from the files, then from the cache
        status, out, error = main_in_process(*QUICK, "--on-bad-image", "skip")
        assert status == 0 and "warning: 3 images cannot be used and left out" in error, error
        assert "89 rows to train on, 10 to validate on" in out
        assert "2 of 30 rows of " in error and "the most frequent prediction" in error
        answers = command.submission().label
        assert len(answers) == 30 and answers[3] == answers[9] and answers[3] in set(answers.drop([3, 9]).mode())
    status, _, error = main_in_process("predict", str(command.output / "best_model.pth"))
    assert status == 1 and "2 images cannot be used" in error
    status, _, error = main_in_process("predict", str(command.output / "best_model.pth"), "--on-bad-image", "skip")
    assert status == 0 and len(command.submission()) == 30


def test_early_stopping_needs_validation_rows_with_usable_images(main_in_process, command):
    for row in range(15, 100):  # three rows of each class keep their images
        image(command.data, row).write_bytes(b"")
    flags = [*QUICK, "--on-bad-image", "skip"]
    status, _, error = main_in_process(*flags, "--early-stopping", "2")
    assert status == 2 and "--early-stopping need validation rows" in error and "Traceback" not in error
    assert error.strip().endswith("leave them out")
    assert main_in_process(*flags)[0] == 0


@pytest.mark.parametrize("flags", [["--submission-file", "test.csv"], ["--model-file", "train.csv"],
                                   ["--submission-file", "sample_submission.csv"], ["--model-file", "classes.csv"]])
def test_inputs_are_not_overwritten(main_in_process, command, flags):
    sample(lambda table: table)(command.data)
    (command.data / "classes.csv").write_text("label,latex\n3,3\n")
    before = {path.name: path.read_bytes() for path in command.data.glob("*.csv")}
    command.output = command.data
    status, _, error = main_in_process(*QUICK, *flags)
    assert status == 2 and f"{flags[1]}: is an input and would be overwritten" in error, error
    assert {path.name: path.read_bytes() for path in command.data.glob("*.csv")} == before


def test_predict_does_not_overwrite_averaged_files(main_in_process, command):
    assert main_in_process(*QUICK, "--save-probabilities")[0] == 0
    member = command.output / "test_probabilities.npz"
    status, _, error = main_in_process("predict", str(member), "--save-probabilities")
    assert status == 2 and "test_probabilities.npz: is an input and would be overwritten" in error
    assert main_in_process("predict", str(member))[0] == 0
    (command.output / "sub.csv").write_bytes(member.read_bytes())
    status, _, error = main_in_process("predict", str(command.output / "sub.csv"), "--submission-file", "sub.csv")
    assert status == 2 and "would be overwritten" in error


def test_table_in_place_of_checkpoint_is_refused_without_advice_to_unpickle(main_in_process, command):
    for flags in (["predict", str(command.data / "train.csv")], [*QUICK, "--weights", str(command.data / "train.csv")]):
        status, _, error = main_in_process(*flags)
        assert status == 1 and "it is not a file of tensors" in error and "weights_only" not in error, error


def test_initial_weights_of_another_network_are_one_short_line(main_in_process, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {f"module.layer{number}.weight": torch.zeros(3, 3) for number in range(90)}}, "a.pth")
    for model in ("cnn", "torchvision:resnet18"):
        status, _, error = main_in_process(*QUICK, "--model", model, "--weights", "a.pth")
        assert status == 1 and error.count("\n") == 1 and len(error) <= 300, error
        assert "a.pth: cannot be used (it is of another network: 0 of " in error and " is missing); name " in error


@pytest.mark.parametrize("folder, flags", [("out", []), ("out/fold1", ["--folds", "2"])])
def test_initial_weights_are_not_overwritten(main_in_process, command, tmp_path, folder, flags):
    weights = tmp_path / folder / "best_model.pth"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    status, out, error = main_in_process(*QUICK, "--weights", str(weights), *flags)
    assert status == 2 and "best_model.pth: is an input and would be overwritten" in error and "decoded" not in out
    assert weights.read_bytes() == b"weights"


def test_other_background_of_test_images_is_warned_of(main_in_process, command):
    for row in range(30):
        path = image(command.data, row, "test.csv")
        Image.eval(Image.open(path), lambda grey: 255 - grey).save(path)
    warning = "test.csv: the training images are black on white and these are the opposite"
    status, _, error = main_in_process(*QUICK)
    assert status == 0 and warning in error
    assert warning in main_in_process("predict", str(command.output / "best_model.pth"))[2]
    pd.read_csv(command.data / "test.csv").assign(label="3").to_csv(command.data / "known.csv", index=False)
    evaluated = main_in_process("evaluate", str(command.output / "best_model.pth"), "--test-csv", "known.csv")
    assert "known.csv: the training images are black on white" in evaluated[2]


def test_paths_from_another_folder_suggest_root_dir(main_in_process, command):
    for name in ("test.csv", "train.csv"):
        table = pd.read_csv(command.data / name, dtype=str)
        table.assign(image_path="Dataset_Image/" + table.image_path).to_csv(command.data / name, index=False)
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and "train.csv: none of its images can be used" in error and "give --root-dir . " in error
    assert main_in_process(*QUICK, "--root-dir", ".")[0] == 0
    table.assign(image_path="nowhere/" + table.image_path).to_csv(command.data / "train.csv", index=False)
    assert "do not start from" in main_in_process(*QUICK)[2]


def test_paths_without_extensions_are_completed(main_in_process, command):
    table = pd.read_csv(command.data / "train.csv", dtype=str)
    bare = table.image_path.str.removesuffix(".png")
    table.assign(image_path=bare).to_csv(command.data / "train.csv", index=False)
    status, out, _ = main_in_process(*QUICK)
    assert status == 0 and "train.csv: 100 image paths differ from their files in extension, case, Unicode form" in out


def test_training_images_in_place_of_test_images_are_warned_of(main_in_process, command):
    shutil.copytree(command.data / "Dataset_Image", command.data / "held")
    table = pd.read_csv(command.data / "train.csv", dtype=str).head(30)
    test = table.assign(example_id=range(30)).drop(columns="label")
    test.to_csv(command.data / "test.csv", index=False)
    warning = "test.csv: 30 of its 30 images are files of "
    status, _, error = main_in_process(*QUICK)
    assert status == 0 and warning in error and "name it with --test-root" in error
    status, out, error = main_in_process(*QUICK, "--test-root", "held")
    assert status == 0 and warning not in error
    assert "30 images to predict have the pixels of a labelled one" in out


def test_a_run_without_a_test_table_writes_everything_but_a_submission(main_in_process, command):
    (command.data / "test.csv").unlink()
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and "test.csv: no such file" in error and "or train without one: --test-csv none" in error
    status, out, error = main_in_process("--model", "tiny", "--num-epochs", "2", "--test-csv", "none",
                                         "--save-probabilities")
    assert status == 0 and "0 to predict" in out and "submission" not in out, error
    written = {path.name for path in command.output.iterdir()}
    assert {"best_model.pth", "history.csv", "val_probabilities.npz", "run.json", "confusions.png"} <= written
    assert not {"submission.csv", "test_probabilities.npz"} & written
    status, _, error = main_in_process("predict", str(command.output / "best_model.pth"), "--test-csv", "none")
    assert status == 2 and "--test-csv none: there is no table to predict; name one" in error


def test_folds_without_a_test_table(main_in_process, command):
    status, _, error = main_in_process(*QUICK, "--test-csv", "none", "--folds", "2")
    assert status == 0 and (command.output / "oof_probabilities.npz").exists(), error
    assert not list(command.output.rglob("submission.csv"))


@pytest.mark.parametrize("flags", [[], ["--no-pictures"]])
def test_image_of_the_data_is_neither_overwritten_nor_removed(main_in_process, command, flags):
    """The images are in the output folder, and one has the name of a picture that a run draws."""
    root = command.output = command.data / "Dataset_Image" / "data"
    table = pd.read_csv(command.data / "train.csv", dtype=str)
    taken = root / "samples.png"
    (command.data / "Dataset_Image" / table.image_path[3]).rename(taken)
    table.loc[3, "image_path"] = "data/samples.png"
    table.to_csv(command.data / "train.csv", index=False)
    before = taken.read_bytes()
    status, _, error = main_in_process(*QUICK, *flags)
    assert status == 2 and "samples.png: is an input and would be overwritten" in error and error.count("\n") == 1
    assert taken.read_bytes() == before


def test_evaluate_does_not_overwrite_its_table(main_in_process, command):
    assert main_in_process(*QUICK)[0] == 0
    table = command.data / "evaluation_class_accuracy.csv"
    table.write_bytes((command.data / "train.csv").read_bytes())
    network, command.output = command.output / "best_model.pth", command.data
    status, _, error = main_in_process("evaluate", str(network), "--test-csv", table.name, "--no-pictures")
    assert status == 2 and f"{table.name}: is an input and would be overwritten" in error
    assert table.read_bytes() == (command.data / "train.csv").read_bytes()


def test_table_without_usable_images_is_refused(main_in_process, command):
    for row in range(30):
        image(command.data, row, "test.csv").write_bytes(b"")
    status, _, error = main_in_process(*QUICK, "--on-bad-image", "skip")
    assert status == 1 and "test.csv: none of its images can be used" in error and "Traceback" not in error


def test_matching_sample_submission_is_accepted(main_in_process, command):
    sample(lambda table: table)(command.data)
    assert main_in_process(*QUICK)[0] == 0


def test_repeated_rows_are_counted(main_in_process, command):
    table = pd.read_csv(command.data / "train.csv", dtype=str)
    repeated = pd.concat([table, table.iloc[:3], table.iloc[[7]].assign(label="17")])
    repeated.to_csv(command.data / "train.csv", index=False)
    status, out, _ = main_in_process(*QUICK)
    assert status == 0 and "; 4 rows name an image of an earlier row" in out
    assert ", 1 images have several labels (the first: rows 9, 105)" in out


def test_image_without_read_permission_is_named(main_in_process, command, monkeypatch):
    """A stand-in for open refuses permission, since the user of the tests may be allowed everything."""
    forbidden, real = str(image(command.data, 6)), open

    def refuse(path, *rest, **options):
        if str(path) == forbidden:
            raise PermissionError(13, "Permission denied", forbidden)
        return real(path, *rest, **options)

    monkeypatch.setattr("builtins.open", refuse)
    status, _, error = main_in_process(*QUICK, "--num-workers", "0")
    assert status == 1 and "row 8: " in error and "permission denied" in error


def test_unusual_but_valid_tables_are_accepted(main_in_process, command):
    """Labels in the test table, further columns in any order, a byte-order mark, CRLF, quotes, a class of one image."""
    train, test = (pd.read_csv(command.data / name, dtype=str) for name in ("train.csv", "test.csv"))
    train.loc[7, "label"] = "NA"
    train.assign(note="two\nlines, and a comma")[["note", "label", "image_path"]].to_csv(
        command.data / "train.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    test.assign(example_id="id " + test.example_id, label="3")[["label", "example_id", "user_id", "image_path"]].to_csv(
        command.data / "test.csv", index=False)
    status, out, error = main_in_process(*QUICK)
    assert status == 0, error
    assert "too few rows to split, so that they are only trained on: NA" in out
    assert command.submission().example_id.tolist() == ("id " + test.example_id).tolist()


@pytest.mark.slow
def test_million_rows(tmp_path):
    """A table of a million rows is read, checked and split."""
    rows = 1_000_000
    data = make_competition(tmp_path / "competition", 100, 2)
    table = pd.read_csv(data / "train.csv", dtype=str)
    pd.concat([table] * (rows // 100)).to_csv(data / "train.csv", index=False)
    found = tables.read_train_table(TableSource("train.csv", str(data)))
    assert len(found) == rows and not found.faults
    classes = tables.sort_classes(found.rows.label)
    assert "; 999,900 rows name an image of an earlier row" in tables.describe_classes(found, classes, 4, "")
    targets = tables.class_numbers(found.rows.label, classes)
    images = np.random.default_rng(0).integers(0, 256, (rows, 1, 4, 4), dtype=np.uint8)
    split = splits.split_rows(script.Config().split, targets, found.usable_rows, splits.image_digests(images), None,
                              found.path)
    assert len(split.train_rows) + len(split.val_rows) == rows and len(split.val_rows) == rows // 10
