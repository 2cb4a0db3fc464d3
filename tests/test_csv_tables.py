"""CSV files as tables of text: what is read, which column holds what, what a cell may hold."""

import zipfile

import pandas as pd
import pytest

from pipeline.csv_tables import find_column, find_id_column, read_csv, read_table
from pipeline.errors import DataError
from pipeline.tables import TableSource, read_test_table, read_train_table


def write(tmp_path, content, name="train.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def find(kind, header, **options):
    return find_column(kind, TableSource("train.csv", **options), pd.Index(header.split(",")))


@pytest.mark.parametrize(("header", "image", "label"), [
    ("image_path,label", "image_path", "label"), ("path,class,image_path,label", "image_path", "label"),
    ("id,label", "id", "label"), ("id,has_cactus", "id", "has_cactus"), ("id,breed", "id", "breed"),
    ("Filename,ClassId", "Filename", "ClassId"), ("Width,Height,ClassId,Path", "Path", "ClassId"),
    ("image id,image,Category", "image", "Category"), ("subject,classname,img", "img", "classname"),
    ("file name,target,user", "file name", "target")])
def test_usual_names_are_found(header, image, label):
    assert (find("image", header), find_column("label", TableSource("train.csv"), pd.Index(header.split(",")),
                                               taken=(image,))) == (image, label)


@pytest.mark.parametrize(("kind", "header", "message"), [
    ("image", "path,file,label", "train.csv: path or file may hold the images, of its columns path, file, label; name "
                                 "the right one with --image-column"),
    ("label", "image,class,target", "class or target may hold the labels, of its columns image, class, target; name"),
    ("image", "a,b,label", r"no column 'image_path' in its header (a, b, label); name the column that holds it with "
                           "--image-column"),
    ("label", "image,a,b", "no column 'label' in its header (image, a, b); name the column that holds it with "
                           "--label-column"),
    ("image", "image_paths,label", "name 'image_paths' with --image-column")])
def test_columns_that_could_not_or_could_all_be_meant_are_listed(kind, header, message):
    with pytest.raises(DataError) as error:
        find(kind, header)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_flag_names_the_column():
    assert find("image", "path,file,label", image_column="file") == "file"
    assert find("label", "image,class,target", label_column="target") == "target"
    with pytest.raises(DataError, match=r"no column 'fil' in its header .*; name 'file' with --image-column"):
        find("image", "path,file,label", image_column="fil")
    # Another table than the training table may have other columns.
    assert find("image", "image_path,label", image_column="file", part="test") == "image_path"


@pytest.mark.parametrize(("header", "expected"), [
    ("example_id,id", "example_id"), ("ImageId,file", "ImageId"), ("image_id,user_id", "image_id"), ("ID", "ID"),
    ("file,user_id", "")])
def test_ids_are_found(tmp_path, header, expected):
    assert find_id_column(TableSource("test.csv", str(tmp_path)), pd.Index(header.split(","))) == expected


def test_the_sample_submission_names_the_column_of_the_ids(tmp_path):
    write(tmp_path, "file,species\na.png,x\n", "Sample_Submission.csv")
    assert find_id_column(TableSource("test.csv", str(tmp_path)), pd.Index(["id", "file"])) == "file"
    source = TableSource("test.csv", str(tmp_path), id_column="id")
    assert find_id_column(source, pd.Index(["id", "file"])) == "id"
    with pytest.raises(DataError, match="id or image_id may hold the ids; name the right one with --id-column"):
        find_id_column(TableSource("test.csv", str(tmp_path / "elsewhere")), pd.Index(["id", "image_id"]))


def test_columns_that_were_taken_are_said(tmp_path, capsys):
    write(tmp_path, "file,kind\na.png,x\nb.png,y\n")
    table = read_train_table(TableSource("train.csv", str(tmp_path)))
    assert table.rows.label.tolist() == ["x", "y"] and table.own_label_column == "kind"
    assert "train.csv: columns taken for images: file, labels: kind" in capsys.readouterr().out
    write(tmp_path, "image_path,label\na.png,x\nb.png,y\n")
    read_train_table(TableSource("train.csv", str(tmp_path)))
    assert "columns taken" not in capsys.readouterr().out


def test_one_column_may_be_image_and_id(tmp_path):
    write(tmp_path, "id,has_cactus\na.jpg,0\nb.jpg,0\n", "sample_submission.csv")
    columns = {"image_column": "id", "label_column": "has_cactus"}
    table = read_test_table(TableSource("sample_submission.csv", str(tmp_path), part="test", **columns))
    assert table.rows.example_id.tolist() == table.rows.image_path.tolist() == ["a.jpg", "b.jpg"]
    assert table.submission_columns == ("id", "has_cactus")


def test_rows_without_ids_are_numbered(tmp_path):
    write(tmp_path, "image_path\na.png\nb.png\n", "test.csv")
    table = read_test_table(TableSource("test.csv", str(tmp_path), part="test"))
    assert table.rows.example_id.tolist() == ["1", "2"] and table.submission_columns == ("example_id", "label")


def test_a_zip_made_on_macos_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.csv.zip", "w") as archive:
        archive.writestr("train.csv", "image_path,label\na.png,1\n")
        archive.writestr("__MACOSX/._train.csv", b"\0\5\x16\7")
        archive.writestr(".DS_Store", b"\0")
    assert read_table(tmp_path / "train.csv.zip", ("image_path", "label")).to_dict("list") == {
        "image_path": ["a.png"], "label": ["1"]}


def test_a_zip_of_two_tables_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("train.csv", "a\n")
        archive.writestr("test.csv", "a\n")
    with pytest.raises(DataError, match=r"all.zip: .*the archive holds 2 tables: unpack it, and name one of them"):
        read_csv(tmp_path / "all.zip", ("a",))


def test_spaces_around_labels_are_left_out_and_counted(tmp_path, capsys):
    write(tmp_path, "image_path,label\na.png,B\nb.png,B \nc.png, A\nd.png,A\n")
    table = read_train_table(TableSource("train.csv", str(tmp_path)))
    assert table.rows.label.tolist() == ["B", "B", "A", "A"]
    assert "train.csv: spaces around 2 labels are left out" in capsys.readouterr().out


@pytest.mark.parametrize(("first", "second"), [("cat", "Cat"), ("caf\u00e9", "cafe\u0301")])
def test_labels_that_differ_in_case_or_unicode_form_are_warned_of(tmp_path, capsys, first, second):
    write(tmp_path, f"image_path,label\na.png,{first}\nb.png,{second}\nc.png,dog\n")
    assert read_train_table(TableSource("train.csv", str(tmp_path))).rows.label.nunique() == 3
    error = capsys.readouterr().err
    assert f"the labels {first!r} and {second!r} differ only in case or Unicode form" in error and "dog" not in error


def test_a_missing_table_is_named_with_what_the_folder_holds(tmp_path):
    write(tmp_path, "id,label\n", "sampleSubmission.csv")
    with pytest.raises(DataError) as error:
        read_test_table(TableSource("test.csv", str(tmp_path), part="test"))
    message = str(error.value)
    assert "test.csv: no such file" in message and "sampleSubmission.csv" in message and "--test-csv none" in message
