"""A competition's tables: rows, labels as classes, ids."""

import numpy as np
import pandas as pd
import pytest

from pipeline import tables
from pipeline.errors import DataError
from pipeline.tables import Table, TableSource, read_table


def read_train(folder, **options) -> Table:
    return tables.read_train_table(TableSource("train.csv", str(folder), **options))


def read_test(folder) -> Table:
    return tables.read_test_table(TableSource("test.csv", str(folder)))


def write(tmp_path, content, name="train.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_cells_are_kept_as_they_are_written(tmp_path):
    path = write(tmp_path, 'extra,label,image_path\n1,007,a.png\n2,NA,b.png\n3,"\\frac{1}{2}, x",c.png\n4,1.0,d.png\n'
                           '5,\u03b2,e.png\n')
    table = read_table(path, ("image_path", "label"))
    assert table.columns.tolist() == ["image_path", "label"]
    assert table.label.tolist() == ["007", "NA", "\\frac{1}{2}, x", "1.0", "\u03b2"]
    assert table.index.tolist() == [2, 3, 4, 5, 6]  # rows of a spreadsheet


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
    ("image_path;label\na.png;1\n", "commas between its cells"),
    ("image_path,label,label\na.png,1,2\n", "two columns are named 'label'; remove one"),
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
        read_train(tmp_path)


def test_a_repeated_id_is_refused(tmp_path):
    write(tmp_path, "example_id,image_path\nx,a.png\ny,b.png\nx,c.png\n", "test.csv")
    with pytest.raises(DataError, match=r"test.csv, row 4: example_id 'x' is already in row 2"):
        read_test(tmp_path)


def test_labels_come_back_as_they_were():
    written = pd.Series(["40", "7", "007", "NA", "\\pi", "1400", "7", "-3"])
    classes = tables.sort_classes(written)
    assert classes == ["-3", "007", "7", "40", "1400", "NA", "\\pi"]


def test_classes_are_described_in_one_line():
    table = Table("train.csv", pd.DataFrame({"label": np.repeat(list("abc"), [30, 3, 10])}))
    text = tables.describe_classes(table, ["a", "b", "c", "only in the extra table"], 4, "too few rows")
    assert text == "43 labelled images of 3 classes, 3 to 30 per class (imbalance 10.0 to 1); too few rows: b"


def test_repeated_images_and_conflicting_labels_are_counted():
    rows = pd.DataFrame({"image_path": list("aabbcd"), "label": list("xxxyyx")}, index=range(2, 8))
    text = tables.describe_classes(Table("train.csv", rows), ["x", "y"], 1, "")
    assert "; 2 rows name an image of an earlier row, 1 images have several labels (the first: rows 4, 5)" in text
    assert "rows name" not in tables.describe_classes(Table("train.csv", rows.iloc[3:]), ["x", "y"], 1, "")


def test_class_numbers_are_positions_among_the_classes():
    assert tables.class_numbers(pd.Series(["b", "a", "z", "b"]), ["a", "b"]).tolist() == [1, 0, -1, 1]


def test_latex_comes_from_classes_csv(tmp_path):
    assert tables.read_latex(tmp_path / "classes.csv") == {}
    pd.DataFrame({"label": ["3", "017"], "latex": ["+", "\\pi"]}).to_csv(tmp_path / "classes.csv", index=False)
    assert tables.read_latex(tmp_path / "classes.csv") == {"3": "+", "017": "\\pi"}


def test_a_table_in_a_damaged_archive_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train.csv.gz: not a readable CSV table"):
        read_table(write(tmp_path, b"not gzip", "train.csv.gz"), ("image_path", "label"))


def test_a_classes_csv_without_its_columns_is_a_warning(tmp_path, capsys):
    write(tmp_path, "id,name\n1,2\n", "classes.csv")
    assert tables.read_latex(tmp_path / "classes.csv") == {}
    assert "no column 'label'" in capsys.readouterr().err
