"""Folders as tables: a folder per class, labels in file names, images to predict."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline import tables
from pipeline.errors import DataError, UsageError
from pipeline.folders import folder_table
from pipeline.image_paths import IMAGE_SUFFIXES
from pipeline.sources import Table, TableSource


def add(folder, *names: str, side: int = 4) -> None:
    """Write small images below a folder, each with levels of its own."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side), number, np.uint8)).save(folder / name)


def read(folder, column: str = "label", name: str = "train", **options) -> Table:
    part = "train" if column == "label" else "test"
    return folder_table(TableSource(name, str(folder), **{"part": part, **options}), column)


def test_labels_are_the_folders_below(tmp_path):
    add(tmp_path / "train", "Greek/alpha/2.png", "Greek/alpha/1.png", "Latin/a/1.png", "Greek/beta/1.png")
    table = read(tmp_path)
    assert table.rows.label.tolist() == ["Greek/alpha", "Greek/alpha", "Greek/beta", "Latin/a"]
    assert table.rows.image_path.tolist() == table.rows.index.tolist() == [
        "Greek/alpha/1.png", "Greek/alpha/2.png", "Greek/beta/1.png", "Latin/a/1.png"]
    assert all((table.image_root / name).is_file() for name in table.rows.image_path)
    assert table.where(3) == f"{tmp_path / 'train'}/Latin/a/1.png" and not table.faults


def test_labels_are_the_first_group_of_a_pattern(tmp_path):
    add(tmp_path / "train", "plus-1.png", "0-12.png", "a/x-3.png")
    table = read(tmp_path, label_pattern=r"([^/]+)-[0-9]+[.]png")
    assert dict(table.rows.label) == {"0-12.png": "0", "a/x-3.png": "x", "plus-1.png": "plus"}


@pytest.mark.parametrize("pattern", ["([a-z]+)-[0-9]", "(?:(plus)|0)-"], ids=["no match", "a group that takes no part"])
def test_a_path_without_the_pattern_is_named(tmp_path, pattern):
    add(tmp_path / "train", "plus-1.png", "0-12.png")
    with pytest.raises(DataError, match=r"train/0-12.png: --label-pattern .* finds no label"):
        read(tmp_path, label_pattern=pattern)


def test_an_image_in_no_folder_is_refused_and_both_remedies_work(tmp_path):
    add(tmp_path / "train", "a/1.png", "b/1.png", "c-2.png")
    with pytest.raises(DataError, match=r"train/c-2.png: is in no folder of a class.*--label-pattern"):
        read(tmp_path)
    assert read(tmp_path, label_pattern="(.)[-/].[.]png").rows.label.tolist() == ["a", "b", "c"]
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "c-2.png").rename(tmp_path / "train" / "c" / "2.png")
    assert read(tmp_path).rows.label.tolist() == ["a", "b", "c"]


def test_ids_are_names_of_files(tmp_path):
    add(tmp_path / "test", "b.png", "a.jpg")
    table = read(tmp_path, "example_id", "test")
    assert table.rows.example_id.tolist() == ["a.jpg", "b.png"] == table.rows.image_path.tolist()
    assert table.submission_columns == ("example_id", "label")
    named = read(tmp_path, "example_id", "test", id_column="file", label_column="species")
    assert named.submission_columns == ("file", "species")


def test_ids_are_paths_where_names_repeat(tmp_path):
    add(tmp_path / "test", "x/1.png", "y/1.png", "y/2.png")
    assert read(tmp_path, "example_id", "test").rows.example_id.tolist() == ["x/1.png", "y/1.png", "y/2.png"]


def test_other_files_are_ignored_and_counted(tmp_path, capsys):
    add(tmp_path / "train", "a/1.png", "b/1.PNG", "a/._1.png", "__MACOSX/a/1.png", ".hidden/1.png")
    for name in ("Thumbs.db", "a/readme.txt"):
        (tmp_path / "train" / name).write_text("")
    assert read(tmp_path).rows.label.tolist() == ["a", "b"]
    assert "train: 5 hidden files and files that are no images are ignored" in capsys.readouterr().out


def test_nothing_is_said_where_nothing_is_ignored(tmp_path, capsys):
    add(tmp_path / "train", "a/1.png", "b/1.png")
    read(tmp_path)
    assert not capsys.readouterr().out


def test_images_of_all_kinds_are_found_by_their_extension(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"x{suffix.upper()}").write_bytes(b"")
    assert len(read(tmp_path)) == len(IMAGE_SUFFIXES) > 15


@pytest.mark.parametrize("names", [(), ("a/notes.txt",)])
def test_a_folder_without_images_is_refused(tmp_path, names):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name in names:
        (tmp_path / "train" / name).write_text("")
    with pytest.raises(DataError, match=r"train: no image is in this folder or below it; .*--train-csv"):
        read(tmp_path)


def test_a_group_column_is_refused(tmp_path):
    add(tmp_path / "train", "a/1.png")
    with pytest.raises(UsageError, match="leave out --group-column"):
        read(tmp_path, group_column="writer")


def test_a_link_to_a_file_elsewhere_is_a_fault_and_one_inside_the_data_is_not(tmp_path):
    data = tmp_path / "data"
    add(tmp_path / "elsewhere", "1.png")
    add(data, "others/2.png")
    add(data / "train", "a/0.png")
    os.symlink(tmp_path / "elsewhere" / "1.png", data / "train" / "a" / "1.png")
    os.symlink(data / "others" / "2.png", data / "train" / "a" / "2.png")
    table = read(data)
    assert table.faults == {1: f"a symbolic link leads out of {data / 'train'}"}


def test_links_to_folders_are_not_followed(tmp_path, capsys):
    add(tmp_path / "train", "a/1.png")
    os.symlink(tmp_path / "train", tmp_path / "train" / "a" / "again")
    os.symlink(tmp_path / "train" / "a", tmp_path / "train" / "b.png")
    assert read(tmp_path).rows.index.tolist() == ["a/1.png"]
    said = capsys.readouterr()
    assert "links to folders are not followed, a/again and 1 more; to use their images, copy them (cp -rL)" in said.err
    assert "ignored" not in said.out


@pytest.mark.parametrize("name", [b"a/\xff.png", b"a/b\rc.png"])
def test_a_name_that_no_table_could_hold_is_refused(tmp_path, name):
    add(tmp_path / "train", "a/1.png")
    shutil.copy(tmp_path / "train" / "a" / "1.png", os.path.join(os.fsencode(tmp_path), b"train", name))
    with pytest.raises(DataError, match="a name with a line break or bytes that are not UTF-8; rename it"):
        read(tmp_path)


def test_folders_are_opened_as_any_table(tmp_path):
    add(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png", "test/2.png")
    (tmp_path / "sample_submission.csv").write_text("file,species\n2,a\n1,a\n")
    assert tables.read_train_table(TableSource("train", str(tmp_path))).rows.label.tolist() == ["a", "b"]
    test = tables.read_test_table(TableSource("test", str(tmp_path), part="test"))
    assert test.rows.example_id.tolist() == ["1", "2"] and test.sample.columns.tolist() == ["file", "species"]
