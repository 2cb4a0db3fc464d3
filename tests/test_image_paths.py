"""From the paths in a table to files: the folder they start from, names that are nearly right, links and ways out."""

import os
import unicodedata

import pandas as pd
import pytest
from PIL import Image

from pipeline.image_paths import resolve_paths
from pipeline.tables import TableSource, read_test_table, read_train_table


@pytest.fixture
def data(tmp_path):
    """Return a data folder with Dataset_Image/a/1.png and others."""
    root = tmp_path / "competition" / "Dataset_Image"
    for name in ("a/1.png", "a/2.JPG", "a/été.png", "b/3.png", "b/3.jpg", "4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 255).save(root / name)
    (root / "a" / "1.txt").write_text("no image")
    (root.parent / "beside.png").write_bytes((root / "4.png").read_bytes())
    return root.parent


def resolve(data, *paths):
    names = pd.Series(paths, index=range(2, len(paths) + 2))
    return resolve_paths(names, data / "Dataset_Image", data, data / "train.csv")


def test_paths_that_name_files_are_kept(data, capsys):
    paths = ["a/1.png", "./a/1.png", "b/../4.png", "../beside.png", str(data / "Dataset_Image" / "4.png")]
    assert resolve(data, *paths) == (paths, {}) and capsys.readouterr().out == ""


@pytest.mark.parametrize(("path", "file"), [
    ("a/1", "a/1.png"), ("a/1.jpg", "a/1.png"), ("a/1.PNG", "a/1.png"), ("A/1.png", "a/1.png"), ("a/2", "a/2.JPG"),
    (" a/1.png", "a/1.png"), ("a/1.png ", "a/1.png"), ("a/ 1.png", "a/1.png"),
    (unicodedata.normalize("NFD", "a/été.png"), "a/été.png"), ("a/ÉTÉ", "a/été.png"), ("b/3.PNG", "b/3.png"),
    ("/nowhere/../4.png", "")])
def test_one_file_of_nearly_the_name_is_taken(data, capsys, path, file):
    resolved, faults = resolve(data, path, "4.png")
    assert (resolved == [file, "4.png"] and not faults) if file else 0 in faults
    said = capsys.readouterr().out
    assert (f"train.csv: 1 image paths differ from their files in extension, case, Unicode form or spaces (the first: "
            f"row 2, {path!r} is {file!r})" in said) == bool(file)


def test_two_files_of_nearly_the_name_are_named(data):
    assert resolve(data, "b/3") == (["b/3"], {0: "no such file; 2 have nearly its name: 3.jpg, 3.png"})
    assert resolve(data, "b/3.bmp")[1] == {0: "no such file; 2 have nearly its name: 3.jpg, 3.png"}


def test_files_that_are_no_images_are_not_taken_for_them(data):
    (data / "Dataset_Image" / "a" / "5.txt").write_text("")
    # The last one is a folder: it is found, and cannot be decoded.
    assert resolve(data, "a/5", "a/5.png", "a/6", "c/1.png", "a")[1] == dict.fromkeys(range(4), "no such file")


@pytest.mark.parametrize(("path", "fault"), [
    ("/etc/passwd", "its path is absolute and leads out of "), ("C:/a.png", "its path is absolute"),
    ("../../a.png", "its path leaves "), ("a/../../../a.png", "its path leaves "), ("/", "its path is absolute and"),
    ("a\\1.png", "its path holds a backslash; write /"), ("a/\0.png", "its path holds a NUL")])
def test_paths_out_of_the_data_folder_are_refused(data, path, fault):
    resolved, faults = resolve(data, "a/1.png", path)
    assert list(faults) == [1] and fault in faults[1] and resolved[1] == path


def test_links_out_of_the_data_folder_are_refused(data, tmp_path):
    root = data / "Dataset_Image"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "1.png").write_bytes((root / "4.png").read_bytes())
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "file.png").symlink_to(tmp_path / "outside" / "1.png")
    (root / "inner.png").symlink_to(root / "4.png")
    (root / "inner").symlink_to(root / "a")
    faults = resolve(data, "folder/1.png", "file.png", "inner.png", "inner/1.png", "FILE.png")[1]
    assert faults == dict.fromkeys((0, 1, 4), f"a symbolic link leads out of {root}")


def test_a_linked_root_is_the_users_own_choice(data, tmp_path):
    (data / "Dataset_Image").rename(tmp_path / "images")
    (data / "Dataset_Image").symlink_to(tmp_path / "images")
    assert resolve(data, "a/1.png", "../beside.png")[1] == {1: f"its path leaves {data} by .."}  # beside its target


def write(data, name, text):
    path = data / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_paths_start_from_the_tables_folder_or_the_data_folder_without_dataset_image(data, capsys):
    os.rename(data / "Dataset_Image", data / "files")
    write(data, "folds/1/train.csv", "path,class\n../../files/a/1.png,x\n../../files/4.png,y\n")
    table = read_train_table(TableSource("folds/1/train.csv", str(data)))
    assert not table.faults and table.image_root == data / "folds" / "1"
    assert "its image paths start from" in capsys.readouterr().out
    write(data, "folds/train.csv", "path,class\nfiles/a/1.png,x\nfiles/4.png,y\n")
    assert read_train_table(TableSource("folds/train.csv", str(data))).image_root == data


def test_a_test_root_has_images_of_its_own(data):
    (data / "test").mkdir()
    Image.new("L", (4, 4), 255).save(data / "test" / "4.png")
    write(data, "test.csv", "id\n4\n")
    table = read_test_table(TableSource("test.csv", str(data), "test", "test"))
    assert table.image_root == data / "test" and table.rows.image_path.tolist() == ["4.png"] and not table.faults
    assert table.rows.example_id.tolist() == ["4"]
