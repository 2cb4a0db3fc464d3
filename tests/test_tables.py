"""Room 3: tables as they come, labels as they are written, the split."""

import numpy as np
import pandas as pd
import pytest

import script
from script import Config, DataError, read_table, split_rows


def write(tmp_path, content, name="train.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_cells_stay_as_they_are_written(tmp_path):
    path = write(tmp_path, 'extra,label,image_path\n1,007,a.png\n2,NA,b.png\n3,"\\frac{1}{2}, x",c.png\n4,1.0,d.png\n'
                           '5,\u03b2,e.png\n')
    table = read_table(path, ("image_path", "label"))
    assert table.columns.tolist() == ["image_path", "label"]
    assert table.label.tolist() == ["007", "NA", "\\frac{1}{2}, x", "1.0", "\u03b2"]
    assert table.index.tolist() == [2, 3, 4, 5, 6]  # as a spreadsheet counts


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfimage_path,label\na.png,1\n", b"image_path,label\r\na.png,1\r\n",
                                     b"image_path,label\na.png,1\n\n\n", b" image_path,label \na.png,1"],
                         ids=["byte-order mark", "CRLF", "blank lines at the end", "blanks in the header"])
def test_harmless_forms_are_read(tmp_path, content):
    table = read_table(write(tmp_path, content), ("image_path", "label"))
    assert table.to_dict("list") == {"image_path": ["a.png"], "label": ["1"]}


@pytest.mark.parametrize(("content", "message"), [
    ("", "the file is empty; it needs the columns image_path, label"),
    ("image_path,label\n", "a header and no rows"),
    ("image_path,label\n\n\n", "a header and no rows"),
    ("path,label\na.png,1\n", "no column 'image_path'"),
    ("image_paths,label\na.png,1\n", "rename 'image_paths'"),
    ("image_path;label\na.png;1\n", "separated by commas"),
    ("image_path,label,label\na.png,1,2\n", "'label' stands there twice"),
    ("image_path,label\na.png,1\nb.png,\n", "train.csv, row 3: label is empty; fill it in or remove the row"),
    ("image_path,label\na.png,1\nb.png\n", "train.csv, row 3: label is empty"),
    ("image_path,label\na.png,1\n ,2\n,3\n", "train.csv, row 3 (and 1 more rows): image_path is empty"),
    ("image_path,label\na.png,1\n\nb.png,2\n", "train.csv, row 3: image_path is empty"),
    ("image_path,label\na.png,1\nb.png,2,3,4\n", "train.csv: not a readable CSV table"),
    (b"\xff\xfe\x00\x01\x02binary", "train.csv: not a readable CSV table"),
    ('image_path,label\n"a.png,1\n', "train.csv: not a readable CSV table"),
    ("image_path,label\na.png,1,2\nb.png,2,3\n", "row 2: more cells than the header has columns; put quotes around"),
    ("image_path,label\na.png,1,\nb.png,2,\n", "remove commas at the rows' ends"),
])
def test_bad_tables_are_refused_by_row(tmp_path, content, message):
    with pytest.raises(DataError) as error:
        read_table(write(tmp_path, content), ("image_path", "label"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_table_with_one_class_is_refused(tmp_path):
    write(tmp_path, "image_path,label\na.png,5\nb.png,5\n")
    with pytest.raises(DataError, match="every row has the label '5'"):
        script.read_train_table(Config(data_dir=str(tmp_path)))


def test_a_repeated_id_is_refused(tmp_path):
    write(tmp_path, "example_id,image_path\nx,a.png\ny,b.png\nx,c.png\n", "test.csv")
    with pytest.raises(DataError, match=r"test.csv, row 4: example_id 'x' stands already in row 2"):
        script.read_test_table(Config(data_dir=str(tmp_path)))


def test_labels_come_back_as_they_were():
    written = pd.Series(["40", "7", "007", "NA", "\\pi", "1400", "7", "-3"])
    classes = script.sort_classes(written)
    assert classes == ["-3", "007", "7", "40", "1400", "NA", "\\pi"]


def test_the_split_is_stratified_and_decided_by_split_seed_alone():
    targets = np.repeat(np.arange(5), [100, 50, 10, 4, 3])
    train, val = split_rows(targets, Config())
    assert sorted([*train, *val]) == list(range(len(targets)))
    assert np.bincount(targets[val], minlength=5).tolist() == [10, 5, 1, 1, 0]
    assert np.array_equal(val, split_rows(targets, Config(seed=9, learning_rate=1.0))[1])
    assert not np.array_equal(val, split_rows(targets, Config(split_seed=1))[1])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.999])
def test_no_class_loses_all_its_rows_or_none(share):
    train, val = split_rows(np.repeat(np.arange(3), [4, 5, 200]), Config(train_val_split=share))
    assert np.bincount(np.repeat(np.arange(3), [4, 5, 200])[train]).min() >= 1
    assert np.bincount(np.repeat(np.arange(3), [4, 5, 200])[val]).min() >= 1


def test_the_last_usable_row_of_a_class_is_trained_on():
    targets = np.repeat([0, 1], [4, 12])
    val = script.split_rows(targets, script.Config())[1]
    faults = {int(row): "no image" for row in range(4) if row not in val}
    table = script.Table("train.csv", pd.DataFrame({"label": targets.astype(str)}), faults=faults)
    train, held, _ = script.split_table(script.Config(), table, targets, None)
    assert val[0] in train and held.tolist() == val[1:].tolist() and len(train) + len(held) == 13


def test_a_split_of_one_trains_on_all_rows():
    train, val = split_rows(np.arange(6) % 2, Config(train_val_split=1))
    assert train.tolist() == list(range(6)) and len(val) == 0


def test_small_classes_and_imbalance_are_named():
    labels = ["a", "b", "c"]
    text = script.describe_classes(labels, np.repeat([0, 1, 2], [30, 3, 10]))
    assert "43 labelled images of 3 classes, 3 to 30 a class (imbalance 10.0 to 1)" in text and text.endswith(": b")


def test_a_table_in_a_damaged_archive_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train.csv.gz: not a readable CSV table"):
        read_table(write(tmp_path, b"not gzip", "train.csv.gz"), ("image_path", "label"))


def test_a_wrong_classes_csv_is_a_warning(tmp_path, capsys):
    write(tmp_path, "id,name\n1,2\n", "classes.csv")
    assert script.read_symbols(Config(data_dir=str(tmp_path))) == {}
    assert "no column 'label'" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["", "\n", "\n\n,\n"])
def test_a_sample_may_end_with_blank_lines(competition, end):
    config = Config(data_dir=str(competition))
    ids = pd.read_csv(competition / "test.csv", dtype=str).example_id
    text = pd.DataFrame({"example_id": ids, "label": "3"}).to_csv(index=False)
    (competition / "sample_submission.csv").write_text(text + end)
    script.check_sample_submission(config, script.read_test_table(config), ["3"])
    (competition / "sample_submission.csv").write_text(text + end + "x,3\n")
    with pytest.raises(DataError, match=r"sample_submission\.csv: has 3\d rows"):
        script.check_sample_submission(config, script.read_test_table(config), ["3"])
