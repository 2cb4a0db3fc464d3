"""A competition's tables: CSV files of image paths or of pixels, torchvision's data, labels and ids."""

import struct

import numpy as np
import pandas as pd
import pytest

from pipeline import tables
from pipeline.errors import DataError
from pipeline.images import ImageStatistics, LoadSettings, load_images
from pipeline.tables import Table, TableSource, read_table

SIDE = 4
NAMES = [f"pixel{number}" for number in range(SIDE * SIDE)]


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


# ---- Pixel tables ----------------------------------------------------------------------------------------------------

def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE * SIDE))


def write_pixels(folder, count=6, name="train.csv", labels=True, columns=NAMES):
    table = pd.DataFrame(pixels(count), columns=NAMES)[columns]
    if labels:
        table.insert(0, "label", [str(number % 3) for number in range(count)])
    table.to_csv(folder / name, index=False)
    return folder / name


def test_pixel_tables_are_read_with_their_labels_and_counted_from_one(tmp_path):
    write_pixels(tmp_path)
    write_pixels(tmp_path, name="test.csv", labels=False, columns=NAMES[::-1])
    train, test = read_train(tmp_path), read_test(tmp_path)
    assert train.rows.label.tolist() == list("012012") and train.rows.index.tolist() == [2, 3, 4, 5, 6, 7]
    assert train.pixels.dtype == np.uint8 and np.array_equal(train.pixels.reshape(6, -1), pixels(6))
    assert np.array_equal(test.pixels, train.pixels)
    assert test.rows.example_id.tolist() == ["1", "2", "3", "4", "5", "6"]
    assert test.submission_columns == ("ImageId", "Label")


def test_pixel_tables_keep_ids_that_they_have(tmp_path):
    path = write_pixels(tmp_path, name="test.csv", labels=False)
    pd.read_csv(path).assign(example_id=[f"a{number}" for number in range(6)]).to_csv(path, index=False)
    table = read_test(tmp_path)
    assert table.rows.example_id.tolist() == ["a0", "a1", "a2", "a3", "a4", "a5"]
    assert table.submission_columns == ("example_id", "label")


@pytest.mark.parametrize("name, columns", [("id", ("id", "label")), ("image_id", ("image_id", "label")),
                                           ("ID", ("ID", "label")), ("ImageId", ("ImageId", "Label"))])
def test_ids_may_have_the_usual_names(tmp_path, capsys, name, columns):
    path = write_pixels(tmp_path, name="test.csv", labels=False)
    digits = pd.read_csv(path)
    digits.insert(0, name, [f"00{number}" for number in range(6)])
    digits.to_csv(path, index=False)
    table = read_test(tmp_path)
    assert table.rows.example_id.tolist() == [f"00{number}" for number in range(6)]
    assert table.submission_columns == columns and not capsys.readouterr().err
    digits.assign(**{name: "7"}).to_csv(path, index=False)
    with pytest.raises(DataError, match=rf"row 3: {name} '7' is already in row 2"):
        read_test(tmp_path)


def test_two_columns_that_may_hold_the_ids_are_refused(tmp_path):
    path = write_pixels(tmp_path, name="test.csv", labels=False)
    digits = pd.read_csv(path).assign(user_id=7, image_id=range(6))
    digits.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"user_id or image_id may hold the ids; rename the right one to example_id"):
        read_test(tmp_path)
    digits.rename(columns={"image_id": "example_id"}).to_csv(path, index=False)
    assert read_test(tmp_path).rows.example_id.tolist() == list("012345")


def test_other_columns_of_a_test_table_are_warned_of(tmp_path, capsys):
    path = write_pixels(tmp_path, name="test.csv", labels=True)
    pd.read_csv(path).assign(file="a.png").to_csv(path)
    table = read_test(tmp_path)
    assert table.rows.example_id.tolist() == list("123456")
    error = capsys.readouterr().err
    assert "test.csv: the submission numbers the rows from 1" in error and "(file), rename it to id" in error


def test_pixels_may_count_from_one(tmp_path):
    path = write_pixels(tmp_path)
    digits = pd.read_csv(path)
    digits.columns = ["label", *(f"pixel{number}" for number in range(1, 17))]
    digits.to_csv(path, index=False)
    table = read_train(tmp_path)
    assert np.array_equal(table.pixels.reshape(6, -1), pixels(6))


def test_an_open_quote_is_named_in_a_large_table_too(tmp_path):
    path = write_pixels(tmp_path, count=4000)
    lines = path.read_text().splitlines()
    lines[5] = '"' + lines[5]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"train.csv, row 6: .* is a quote not closed there\?"):
        read_train(tmp_path)


def test_the_bad_row_among_whole_numbers_with_decimal_points_is_named(tmp_path):
    path = write_pixels(tmp_path)
    floats = pd.read_csv(path).astype(dict.fromkeys(NAMES, float))
    floats.to_csv(path, index=False)
    assert np.array_equal(read_train(tmp_path).pixels.reshape(6, -1), pixels(6))
    floats.loc[3, "pixel9"] = np.nan
    floats.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"row 5: pixel9 is ''"):
        read_train(tmp_path)


def test_pixels_become_ink_on_zero(tmp_path):
    write_pixels(tmp_path)
    table = read_train(tmp_path)
    black, white = (load_images([table], ImageStatistics(background, SIDE), LoadSettings())[0]
                    for background in (0, 255))
    assert black.shape == (6, 1, SIDE, SIDE) and np.array_equal(black[:, 0], table.pixels)
    assert np.array_equal(white, 255 - black)
    small = load_images([table], ImageStatistics(0, 2), LoadSettings())[0]
    assert small.shape == (6, 1, 2, 2)


def test_columns_that_are_ignored_may_have_one_name(tmp_path):
    path = write_pixels(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0] + ",x, x", *(line + ",1,2" for line in lines[1:])]))
    table = read_train(tmp_path)
    assert np.array_equal(table.pixels.reshape(6, -1), pixels(6))


@pytest.mark.parametrize("row, cells, message", [
    (4, "1," + ",".join(["0"] * 15), r"row 4: 16 cells under a header of 17"),
    (4, "1," + ",".join(["0"] * 17), r"row 4: 18 cells under a header of 17"),
    (2, "1," + ",".join(["0"] * 17), r"row 2: 18 cells under a header of 17"),
    (5, "1," + ",".join(["0"] * 15 + ["x"]), r"row 5: pixel15 is 'x'; a pixel is a whole number from 0 to 255"),
    (3, "1," + ",".join(["256"] + ["0"] * 15), r"row 3: pixel0 is '256'"),
    (3, "1," + ",".join(["0", "-1"] + ["0"] * 14), r"row 3: pixel1 is '-1'"),
    (3, "1," + ",".join(["0", "65541"] + ["0"] * 14), r"row 3: pixel1 is '65541'"),
    (3, "1," + ",".join(["0", "99999999999999999999"] + ["0"] * 14), r"row 3: pixel1 is '9+'"),
    (3, "1," + ",".join(["0", "1.5"] + ["0"] * 14), r"row 3: pixel1 is '1.5'"),
    (3, "1," + ",".join(["0", ""] + ["0"] * 14), r"row 3: pixel1 is ''"),
    (3, "," + ",".join(["0"] * 16), r"row 3: label is empty"),
])
def test_a_wrong_pixel_row_is_named(tmp_path, row, cells, message):
    path = write_pixels(tmp_path)
    lines = path.read_text().splitlines()
    lines[row - 1] = cells
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        read_train(tmp_path)


@pytest.mark.parametrize("columns, message", [
    (NAMES[:15], r"15 pixel columns, pixel0 to pixel14, are not a square image; one of 3 x 3 has pixel0 to pixel8"),
    (NAMES[1:], r"pixel1 to pixel15, are not a square image"),
    (NAMES[2:11], r"9 pixel columns, pixel2 to pixel10, are not a square"),
])
def test_pixel_columns_that_are_no_square_are_refused(tmp_path, columns, message):
    write_pixels(tmp_path, columns=columns)
    with pytest.raises(DataError, match=message):
        read_train(tmp_path)


def test_a_pixel_table_needs_rows_and_a_training_table_labels(tmp_path):
    path = write_pixels(tmp_path, labels=False)
    with pytest.raises(DataError, match=r"no column 'label' in its header \(pixel0, "):
        read_train(tmp_path)
    path.write_text(",".join(["label", *NAMES]) + "\n")
    with pytest.raises(DataError, match="has a header and no rows"):
        read_train(tmp_path)


def write_idx(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name, prefixes", [
    ("torchvision:MNIST", ("train-", "t10k-")),
    ("torchvision:EMNIST:letters", ("emnist-letters-train-", "emnist-letters-test-")),
])
def test_torchvision_data_in_the_cache_folder_is_used(tmp_path, name, prefixes):
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28))
    raw = tmp_path / name.split(":")[1] / "raw"
    splits = ["letters"] if "EMNIST" in name.split(":")[1] else []
    for prefix in prefixes:
        write_idx(raw / f"{prefix}images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}labels-idx1-ubyte", np.arange(7) + len(splits))
    if splits:  # torchvision looks for the files of every split
        for split in ("byclass", "bymerge", "balanced", "digits", "mnist"):
            for part in ("train", "test"):
                write_idx(raw / f"emnist-{split}-{part}-images-idx3-ubyte", images)
                write_idx(raw / f"emnist-{split}-{part}-labels-idx1-ubyte", np.arange(7))
    train = tables.read_train_table(TableSource(name, cache_dir=str(tmp_path)))
    test = tables.read_test_table(TableSource(name, cache_dir=str(tmp_path), part="test"))
    assert train.rows.label.tolist() == (list("abcdefg") if splits else list("0123456"))
    assert np.array_equal(train.pixels, images.swapaxes(1, 2) if splits else images)
    assert test.rows.example_id.tolist() == list("1234567") and test.submission_columns == ("ImageId", "Label")


def test_torchvision_data_that_cannot_be_downloaded_is_one_line(tmp_path, monkeypatch):
    from torchvision import datasets

    def refuse(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://..., got:\nno route")

    monkeypatch.setattr(datasets.MNIST, "download", refuse)
    with pytest.raises(DataError, match=r"torchvision:KMNIST: neither in .*KMNIST nor downloadable \(Error down"):
        tables.read_train_table(TableSource("torchvision:KMNIST", cache_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["torchvision:CIFAR10", "torchvision:EMNIST", "torchvision:EMNIST:symbols",
                                  "torchvision:MNIST:letters"])
def test_torchvision_names_that_are_not_known_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"is unknown; there are torchvision:MNIST, .*EMNIST:"):
        tables.read_train_table(TableSource(name, cache_dir=str(tmp_path)))
