"""Bad input through the command line: one line that says what is wrong, and nothing of the user's is touched."""

import os
import pickle
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK, Command, make_competition, make_pixel_competition
from PIL import Image

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


def bomb(path):
    """A PNG of 20,000 x 20,000 pixels in 50 kilobytes."""
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
    """A sample_submission.csv that agrees with test.csv, changed."""
    def fault(data):
        ids = pd.read_csv(data / "test.csv", dtype=str).example_id
        change(pd.DataFrame({"example_id": ids, "label": "3"})).to_csv(data / "sample_submission.csv", index=False)
    return fault


FAULTS = {
    "no train.csv": (lambda data: (data / "train.csv").unlink(), "train.csv: no such file"),
    "no test.csv": (lambda data: (data / "test.csv").unlink(), "test.csv: no such file"),
    "train.csv a folder": (lambda data: [(data / "train.csv").unlink(), (data / "train.csv").mkdir()],
                           "train.csv: cannot be read (is a directory)"),
    "no image folder": (lambda data: shutil.rmtree(data / "Dataset_Image"), "Dataset_Image: no such folder"),
    "an empty train.csv": (edit("train.csv", lambda text: ""), "train.csv: the file is empty"),
    "binary data": (lambda data: (data / "train.csv").write_bytes(np.random.default_rng(0).bytes(5000)), "train.csv: "),
    "an archive": (lambda data: (data / "train.csv").write_bytes(b"PK\x03\x04" + bytes(500)), "train.csv: "),
    "UTF-16": (lambda data: (data / "train.csv").write_text((data / "train.csv").read_text(), encoding="utf-16"),
               "save it as UTF-8"),
    "Latin-1": (lambda data: (data / "train.csv").write_bytes(b"image_path,label\ndata/\xe9.png,3\n"),
                "save it as UTF-8"),
    "no rows": (edit("test.csv", lambda text: text.splitlines()[0]), "test.csv: the table has a header and no rows"),
    "no rows to train on": (edit("train.csv", lambda text: text.splitlines()[0]), "train.csv: the table has a header"),
    "no label column": (edit("train.csv", lambda text: text.replace("label", "class", 1)), "no column 'label' in its "
                        "header (image_path, class); rename the column that holds it, or"),
    "no id column": (edit("test.csv", lambda text: text.replace("example_id", "id", 1)), "no column 'example_id'"),
    "no path column": (edit("test.csv", lambda text: text.replace("image_path", "file", 1)), "no column 'image_path'"),
    "two label columns": (edit("train.csv", lambda text: "\n".join(
        line + "," + line.split(",")[1] for line in text.splitlines())), "the column 'label' stands there twice"),
    "no header": (edit("train.csv", lambda text: text.split("\n", 1)[1]), "no column 'image_path'"),
    "a row that is too long": (edit("train.csv", lambda text: text + "a.png,3,4\n"), "train.csv: "),
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
    "another separator": (edit("train.csv", lambda text: text.replace(",", ";")), "is it separated by commas?"),
    "tabs": (edit("test.csv", lambda text: text.replace(",", "\t")), "is it separated by commas?"),
    "a missing image": (lambda data: image(data, 6).unlink(), "train.csv, row 8: "),
    "an empty image": (lambda data: image(data, 6).write_bytes(b""), "the file is empty"),
    "half an image": (lambda data: half(image(data, 6)), "train.csv, row 8: "),
    "half a JPEG": (half_jpeg, "train.csv, row 8: "),
    "not an image": (lambda data: image(data, 0, "test.csv").write_text("<html>"), "test.csv, row 2: "),
    "an image that is a folder": (lambda data: [image(data, 6).unlink(), image(data, 6).mkdir()], "is a directory"),
    "a decompression bomb": (lambda data: bomb(image(data, 6)), "400000000 pixels"),
    "a large image": (lambda data: Image.new("1", (8000, 8000)).save(image(data, 6)), "8000 x 8000 pixels are too"),
    "a broken link": (lambda data: [image(data, 6).unlink(), image(data, 6).symlink_to("nowhere.png")],
                      "no such file"),
    "a NUL in a path": (cell("image_path", 2, "data/\0.png"), "train.csv"),
    "an absolute path": (cell("image_path", 2, "/etc/passwd"), "row 4: '/etc/passwd': its path is absolute"),
    "a drive's path": (cell("image_path", 2, "C:/a.png"), "row 4: 'C:/a.png': its path is absolute"),
    "a path that climbs": (cell("image_path", 2, "data/../../a.png"), "its path climbs out by .."),
    "backslashes": (cell("image_path", 2, "data\\a.png", "test.csv"), "test.csv, row 4: 'data\\\\a.png': its path "
                    "holds a backslash"),
    "a link that leads out": (link_out, "row 8: 'data/"),
    "a linked folder that leads out": (link_folder_out, "a symbolic link leads out of "),
    "a sample with other columns": (sample(lambda table: table.rename(columns={"label": "class"})),
                                    "sample_submission.csv: its columns are example_id, class"),
    "a sample in another order": (sample(lambda table: table.iloc[::-1]), "sample_submission.csv, row 2: example_id"),
    "a sample with fewer rows": (sample(lambda table: table.head(20)), "has 20 rows, "),
    "a sample with another id": (sample(lambda table: table.replace({"example_id": {table.example_id[5]: "x"}})),
                                 "sample_submission.csv, row 7: example_id is 'x'"),
    "an empty sample": (lambda data: (data / "sample_submission.csv").write_text(""), "the file is empty"),
    "a sample with numbers for words": (lambda data: [sample(lambda table: table)(data),
                                                      cell("label", 3, "pi")(data)], "its labels are whole numbers"),
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
    lines = error.splitlines()
    lists = re.match(r"error: .*(\d+ images? cannot|images can) be used", lines[0])
    assert len(lines) == 1 or (lists and len(lines) <= 12)
    assert "Traceback" not in error
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


def test_an_output_folder_that_is_read_only_is_refused_first(main_in_process, command):
    """In /proc nobody may write, not even root, for whom no mode of a folder is read-only."""
    command.output = Path("/proc/sys/kernel")
    status, out, error = main_in_process(*QUICK)
    assert status == 1 and error.startswith("error: /proc/sys/kernel: cannot be written to") and "epoch" not in out


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


PIXEL_FAULTS = {
    "a ragged row": (edit("train.csv", lambda text: text + "3,1,2\n"), "train.csv, row 62: 3 cells under a header of"),
    "a word": (cell("pixel7", 3, "dark"), "train.csv, row 5: pixel7 is 'dark'"),
    "a fraction": (cell("pixel7", 3, "0.5"), "train.csv, row 5: pixel7 is '0.5'"),
    "an empty pixel": (cell("pixel7", 3, ""), "train.csv, row 5: pixel7 is ''"),
    "a pixel above 255": (cell("pixel7", 3, "256"), "train.csv, row 5: pixel7 is '256'"),
    "a pixel below 0": (cell("pixel7", 3, "-1", "test.csv"), "test.csv, row 5: pixel7 is '-1'"),
    "no square": (edit("train.csv", lambda text: "\n".join(line.rsplit(",", 1)[0] for line in text.splitlines())),
                  "143 pixel columns, pixel0 to pixel142, are no square image"),
    "a missing pixel": (edit("train.csv", lambda text: text.replace("pixel5,", "pixel500,", 1)), "are no square image"),
    "an empty label": (cell("label", 3, ""), "train.csv, row 5: label is empty"),
    "other ids in the sample": (lambda data: pd.DataFrame({"ImageId": range(20), "Label": 0}).to_csv(
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
    """A competition with a network that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    command = Command(make_competition(folder / "competition"), folder / "out", folder / "cache")
    assert script.main(command.arguments(*QUICK, "--model", "tiny")) == 0
    return command


class Payload:
    """What unpickling must never run."""

    def __reduce__(self):
        return os.system, ("touch payload-was-run",)


def changed(change):
    """A fault: the checkpoint's content, changed and written as script.py writes it."""
    def fault(path):
        script.write_content(path, {**script.read_content(path), **change(script.read_content(path))})
    return fault


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


CHECKPOINT_FAULTS = {
    "a payload": (lambda path: torch.save({"model": Payload()}, path), "not a whole checkpoint"),
    "a bare payload": (lambda path: path.write_bytes(pickle.dumps(Payload())), "not a whole checkpoint"),
    "a flipped bit": (flip, "not a whole checkpoint"),
    "cut in half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "not a whole"),
    "nothing": (lambda path: path.write_bytes(b""), "not a whole checkpoint"),
    "weights alone": (lambda path: torch.save(script.read_content(path)["model"], path), "not a whole checkpoint"),
    "another architecture": (changed(lambda content: {"config": {**content["config"], "model": "cnn"}}),
                             "not a whole checkpoint"),
    "fewer classes": (changed(lambda content: {"classes": content["classes"][:-1]}), "not a whole checkpoint"),
    "a folder": (lambda path: [path.unlink(), path.mkdir()], "not a whole checkpoint"),
    "another network's setting": (changed(lambda content: {"config": {**content["config"], "image_size": -1}}),
                                  "not a whole checkpoint"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CHECKPOINT_FAULTS)
def test_bad_checkpoints_are_refused_and_never_run(trained, tmp_path, capsys, monkeypatch, name):
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


def test_every_flipped_bit_is_refused_or_changes_nothing(trained, tmp_path):
    """A bit in the padding of the archive may flip unseen; one that changes a weight, a class or a setting may not."""
    content = (trained.output / "best_model.pth").read_bytes()
    expected, refused = script.digest(script.read_content(trained.output / "best_model.pth")), 0
    for place in np.random.default_rng(0).integers(0, 8 * len(content), 60):
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        (tmp_path / "model.pth").write_bytes(spoilt)
        try:
            trained_again = script.load_checkpoint(tmp_path / "model.pth")
            assert script.digest(script.read_content(tmp_path / "model.pth")) == expected and trained_again
        except script.DataError:
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
def test_images_of_every_kind_are_read_as_the_grey_that_they_show(competition, tmp_path, kind):
    config = script.Config(data_dir=str(competition), cache_dir=str(tmp_path), image_size=32)
    table, statistics = script.read_train_table(config), script.ImageStatistics(255, 32)
    before = script.load_images(table, config, statistics)[6].astype(int)
    IMAGES[kind](image(competition, 6))
    after = script.load_images(table, config, statistics)[6].astype(int)
    assert not table.faults and (kind == "one pixel" or np.abs(after - before).mean() < 6)


def test_bad_images_are_skipped_where_that_is_asked_for(main_in_process, command):
    spoilt = image(command.data, 6), image(command.data, 3, "test.csv"), image(command.data, 9, "test.csv")
    for path in spoilt:
        path.write_bytes(b"")
    for _ in range(2):  # from the files, then from the cache
        status, out, error = main_in_process(*QUICK, "--on-bad-image", "skip")
        assert status == 0 and "warning: 3 images cannot be used and left out" in error, error
        assert "89 rows to train on, 10 to validate on" in out or "90 rows to train on, 9 to validate on" in out
        assert "2 of 30 rows of " in error and "the most frequent answer" in error
        answers = command.submission().label
        assert len(answers) == 30 and answers[3] == answers[9] and answers[3] in set(answers.drop([3, 9]).mode())
    status, _, error = main_in_process("predict", str(command.output / "best_model.pth"))
    assert status == 1 and "2 images cannot be used" in error
    status, _, error = main_in_process("predict", str(command.output / "best_model.pth"), "--on-bad-image", "skip")
    assert status == 0 and len(command.submission()) == 30


def test_early_stopping_needs_validation_rows_with_images(main_in_process, command):
    labels = pd.read_csv(command.data / "train.csv", dtype=str).label
    for row in script.split_rows(labels.astype("category").cat.codes.to_numpy(np.int64), script.Config())[1]:
        image(command.data, row).write_bytes(b"")
    flags = [*QUICK, "--model", "tiny", "--on-bad-image", "skip"]
    status, _, error = main_in_process(*flags, "--early-stopping", "2")
    assert status == 2 and "--early-stopping need validation rows" in error and "Traceback" not in error
    assert main_in_process(*flags)[0] == 0


@pytest.mark.parametrize("flags", [["--submission-file", "test.csv"], ["--model-file", "train.csv"],
                                   ["--submission-file", "sample_submission.csv"], ["--model-file", "classes.csv"]])
def test_nothing_that_is_read_is_overwritten(main_in_process, command, flags):
    sample(lambda table: table)(command.data)
    (command.data / "classes.csv").write_text("label,latex\n3,3\n")
    before = {path.name: path.read_bytes() for path in command.data.glob("*.csv")}
    command.output = command.data
    status, _, error = main_in_process(*QUICK, "--model", "tiny", *flags)
    assert status == 2 and f"{flags[1]}: is read, and would be overwritten" in error, error
    assert {path.name: path.read_bytes() for path in command.data.glob("*.csv")} == before


def test_predict_overwrites_no_file_that_it_averages(main_in_process, command):
    assert main_in_process(*QUICK, "--model", "tiny", "--save-probabilities")[0] == 0
    member = command.output / "test_probabilities.npz"
    status, _, error = main_in_process("predict", str(member), "--save-probabilities")
    assert status == 2 and "test_probabilities.npz: is read, and would be overwritten" in error
    assert main_in_process("predict", str(member))[0] == 0
    (command.output / "sub.csv").write_bytes(member.read_bytes())
    status, _, error = main_in_process("predict", str(command.output / "sub.csv"), "--submission-file", "sub.csv")
    assert status == 2 and "would be overwritten" in error


def test_a_table_in_place_of_a_network_is_named_without_torchs_advice(main_in_process, command):
    for flags in (["predict", str(command.data / "train.csv")], [*QUICK, "--weights", str(command.data / "train.csv")]):
        status, _, error = main_in_process(*flags)
        assert status == 1 and "no file of tensors" in error and "weights_only" not in error, error


@pytest.mark.parametrize("flag", ["--teachers", "--weights"])
@pytest.mark.parametrize("folder, flags", [("out", []), ("out/fold1", ["--folds", "2"])])
def test_a_network_that_is_learnt_from_is_not_overwritten(main_in_process, command, tmp_path, folder, flags, flag):
    teacher = tmp_path / folder / "best_model.pth"
    teacher.parent.mkdir(parents=True)
    teacher.write_bytes(b"a teacher")
    named = str(teacher).replace("fold1", "fold{fold}") if flag == "--teachers" else str(teacher)
    status, out, error = main_in_process(*QUICK, flag, named, *flags)
    assert status == 2 and "best_model.pth: is read, and would be overwritten" in error and "decoded" not in out
    assert teacher.read_bytes() == b"a teacher"


def test_a_test_table_of_other_paper_is_warned_of(main_in_process, command):
    for row in range(30):
        path = image(command.data, row, "test.csv")
        Image.eval(Image.open(path), lambda grey: 255 - grey).save(path)
    warning = "test.csv: its images have another paper than the training table's (black on white)"
    status, _, error = main_in_process(*QUICK, "--model", "tiny")
    assert status == 0 and warning in error
    assert warning in main_in_process("predict", str(command.output / "best_model.pth"))[2]
    pd.read_csv(command.data / "test.csv").assign(label="3").to_csv(command.data / "known.csv", index=False)
    evaluated = main_in_process("evaluate", str(command.output / "best_model.pth"), "--test-csv", "known.csv")
    assert "known.csv: its images have another paper" in evaluated[2]


def test_paths_from_another_folder_are_told_of_root_dir(main_in_process, command):
    for name in ("test.csv", "train.csv"):
        table = pd.read_csv(command.data / name, dtype=str)
        table.assign(image_path="Dataset_Image/" + table.image_path).to_csv(command.data / name, index=False)
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and "train.csv: not one of its images can be used" in error and "give --root-dir . " in error
    assert main_in_process(*QUICK, "--model", "tiny", "--root-dir", ".")[0] == 0
    table.assign(image_path="../" + table.image_path).to_csv(command.data / "train.csv", index=False)
    assert "do not start from" in main_in_process(*QUICK)[2]


def test_paths_without_their_extensions_are_told_of_them(main_in_process, command):
    table = pd.read_csv(command.data / "train.csv", dtype=str)
    bare = table.image_path.str.removesuffix(".png")
    table.assign(image_path=bare).to_csv(command.data / "train.csv", index=False)
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and f"write their extensions into its paths, as in {bare[0].rpartition('/')[2]}.png:" in error


@pytest.mark.parametrize("flags", [[], ["--no-pictures"]])
def test_an_image_of_the_data_is_neither_overwritten_nor_removed(main_in_process, command, flags):
    """The images lie in the output folder, and one has the name of a picture that is drawn there."""
    root = command.output = command.data / "Dataset_Image" / "data"
    table = pd.read_csv(command.data / "train.csv", dtype=str)
    taken = root / "samples.png"
    (command.data / "Dataset_Image" / table.image_path[3]).rename(taken)
    table.loc[3, "image_path"] = "data/samples.png"
    table.to_csv(command.data / "train.csv", index=False)
    before = taken.read_bytes()
    status, _, error = main_in_process(*QUICK, "--model", "tiny", *flags)
    assert status == 2 and "samples.png: is read, and would be overwritten" in error and error.count("\n") == 1
    assert taken.read_bytes() == before


def test_evaluate_does_not_overwrite_its_table(main_in_process, command):
    assert main_in_process(*QUICK, "--model", "tiny")[0] == 0
    table = command.data / "evaluation_class_accuracy.csv"
    table.write_bytes((command.data / "train.csv").read_bytes())
    network, command.output = command.output / "best_model.pth", command.data
    status, _, error = main_in_process("evaluate", str(network), "--test-csv", table.name, "--no-pictures")
    assert status == 2 and f"{table.name}: is read, and would be overwritten" in error
    assert table.read_bytes() == (command.data / "train.csv").read_bytes()


def test_a_full_disk_is_told_with_the_file(main_in_process, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "flush", refuse)
    status, _, error = main_in_process(*QUICK, "--model", "tiny")
    assert status == 1 and re.search(r"error: \S+/out/\S+: No space left on device", error)


def test_a_table_without_one_usable_image_is_refused(main_in_process, command):
    for row in range(30):
        image(command.data, row, "test.csv").write_bytes(b"")
    status, _, error = main_in_process(*QUICK, "--on-bad-image", "skip")
    assert status == 1 and "test.csv: not one of its images can be used" in error and "Traceback" not in error


def test_a_sample_that_agrees_is_fine(main_in_process, command):
    sample(lambda table: table)(command.data)
    assert main_in_process(*QUICK, "--model", "tiny")[0] == 0


def test_repeated_rows_are_counted(main_in_process, command):
    table = pd.read_csv(command.data / "train.csv", dtype=str)
    repeated = pd.concat([table, table.iloc[:3], table.iloc[[7]].assign(label="17")])
    repeated.to_csv(command.data / "train.csv", index=False)
    status, out, _ = main_in_process(*QUICK, "--model", "tiny")
    assert status == 0 and "; 4 rows name an image that stands in the table already" in out
    assert ", 1 images have several labels (the first: rows 9, 105)" in out


def test_an_image_that_may_not_be_read_is_named(main_in_process, command, monkeypatch):
    """Permission is refused by a stand-in: whoever runs the tests may be allowed everything."""
    forbidden, real = str(image(command.data, 6)), open

    def refuse(path, *rest, **options):
        if str(path) == forbidden:
            raise PermissionError(13, "Permission denied", forbidden)
        return real(path, *rest, **options)

    monkeypatch.setattr("builtins.open", refuse)
    status, _, error = main_in_process(*QUICK, "--num-workers", "0")
    assert status == 1 and "row 8: " in error and "permission denied" in error


def test_what_needs_no_remedy(main_in_process, command):
    """Labels in the test table, further columns in any order, a byte-order mark, CRLF, quotes, a class of one image."""
    train, test = (pd.read_csv(command.data / name, dtype=str) for name in ("train.csv", "test.csv"))
    train.loc[7, "label"] = "NA"
    train.assign(note="two\nlines, and a comma")[["note", "label", "image_path"]].to_csv(
        command.data / "train.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    test.assign(example_id="id " + test.example_id, label="3")[["label", "example_id", "user_id", "image_path"]].to_csv(
        command.data / "test.csv", index=False)
    status, out, error = main_in_process(*QUICK, "--model", "tiny")
    assert status == 0, error
    assert "too small to be split, so trained on but not validated: NA" in out
    assert command.submission().example_id.tolist() == ("id " + test.example_id).tolist()


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """One image under a million names in the table: read, split and decoded once for each, within memory."""
    rows = 1_000_000
    data = make_competition(tmp_path / "competition", 100, 2)
    table = pd.read_csv(data / "train.csv", dtype=str)
    pd.concat([table] * (rows // 100)).to_csv(data / "train.csv", index=False)
    config = script.Config(data_dir=str(data), cache_dir=str(tmp_path))
    found = script.read_train_table(config)
    assert len(found) == rows and not found.faults
    assert script.describe_repeats(found).startswith("; 999,900 rows name an image that stands in the table already")
    targets = pd.Categorical(found.rows.label).codes.astype(np.int64)
    train, val = script.split_rows(targets, config)
    assert len(train) + len(val) == rows and len(val) == rows // 10
