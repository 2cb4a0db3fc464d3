"""Room 3: tables whose images are no files: pixel columns, torchvision's data."""

import struct

import numpy as np
import pandas as pd
import pytest

import script
from script import Config, DataError

SIDE = 4
NAMES = [f"pixel{number}" for number in range(SIDE * SIDE)]


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
    config = Config(data_dir=str(tmp_path), image_size=8)
    train, test = script.read_train_table(config), script.read_test_table(config)
    assert train.rows.label.tolist() == list("012012") and train.rows.index.tolist() == [2, 3, 4, 5, 6, 7]
    assert train.pixels.dtype == np.uint8 and np.array_equal(train.pixels.reshape(6, -1), pixels(6))
    assert np.array_equal(test.pixels, train.pixels)
    assert test.rows.example_id.tolist() == ["1", "2", "3", "4", "5", "6"]
    assert test.submission_columns == ("ImageId", "Label")


def test_pixel_tables_keep_ids_that_they_have(tmp_path):
    path = write_pixels(tmp_path, name="test.csv", labels=False)
    pd.read_csv(path).assign(example_id=[f"a{number}" for number in range(6)]).to_csv(path, index=False)
    table = script.read_test_table(Config(data_dir=str(tmp_path)))
    assert table.rows.example_id.tolist() == ["a0", "a1", "a2", "a3", "a4", "a5"]
    assert table.submission_columns == ("example_id", "label")


@pytest.mark.parametrize("name, answers", [("id", ("id", "label")), ("image_id", ("image_id", "label")),
                                           ("ID", ("ID", "label")), ("ImageId", ("ImageId", "Label"))])
def test_ids_go_by_the_usual_names_too(tmp_path, capsys, name, answers):
    path = write_pixels(tmp_path, name="test.csv", labels=False)
    digits = pd.read_csv(path)
    digits.insert(0, name, [f"00{number}" for number in range(6)])
    digits.to_csv(path, index=False)
    table = script.read_test_table(Config(data_dir=str(tmp_path)))
    assert table.rows.example_id.tolist() == [f"00{number}" for number in range(6)]
    assert table.submission_columns == answers and not capsys.readouterr().err
    digits.assign(**{name: "7"}).to_csv(path, index=False)
    with pytest.raises(DataError, match=rf"row 3: {name} '7' stands already in row 2"):
        script.read_test_table(Config(data_dir=str(tmp_path)))


def test_two_columns_that_may_hold_the_ids_are_refused(tmp_path):
    path = write_pixels(tmp_path, name="test.csv", labels=False)
    digits = pd.read_csv(path).assign(user_id=7, image_id=range(6))
    digits.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"may stand in user_id or in image_id; rename the right one to example_id"):
        script.read_test_table(Config(data_dir=str(tmp_path)))
    digits.rename(columns={"image_id": "example_id"}).to_csv(path, index=False)
    assert script.read_test_table(Config(data_dir=str(tmp_path))).rows.example_id.tolist() == list("012345")


def test_other_columns_of_a_test_table_are_warned_of(tmp_path, capsys):
    path = write_pixels(tmp_path, name="test.csv", labels=True)
    pd.read_csv(path).assign(file="a.png").to_csv(path)
    table = script.read_test_table(Config(data_dir=str(tmp_path)))
    assert table.rows.example_id.tolist() == list("123456")
    error = capsys.readouterr().err
    assert "test.csv: the rows are numbered from 1 in the submission" in error and "(file), rename it to id" in error


def test_pixels_may_count_from_one(tmp_path):
    path = write_pixels(tmp_path)
    digits = pd.read_csv(path)
    digits.columns = ["label", *(f"pixel{number}" for number in range(1, 17))]
    digits.to_csv(path, index=False)
    table = script.read_train_table(Config(data_dir=str(tmp_path)))
    assert np.array_equal(table.pixels.reshape(6, -1), pixels(6))


def test_an_open_quote_is_named_in_a_large_table_too(tmp_path):
    path = write_pixels(tmp_path, count=4000)
    lines = path.read_text().splitlines()
    lines[5] = '"' + lines[5]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"train.csv, row 6: .* is a quote not closed there\?"):
        script.read_train_table(Config(data_dir=str(tmp_path)))


def test_the_wrong_row_among_zeros_behind_points_is_named(tmp_path):
    path = write_pixels(tmp_path)
    floats = pd.read_csv(path).astype(dict.fromkeys(NAMES, float))
    floats.to_csv(path, index=False)
    assert np.array_equal(script.read_train_table(Config(data_dir=str(tmp_path))).pixels.reshape(6, -1), pixels(6))
    floats.loc[3, "pixel9"] = np.nan
    floats.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"row 5: pixel9 is ''"):
        script.read_train_table(Config(data_dir=str(tmp_path)))


def test_pixels_become_ink_on_zero(tmp_path):
    write_pixels(tmp_path)
    table = script.read_train_table(Config(data_dir=str(tmp_path)))
    black, white = (script.load_images(table, Config(), script.ImageStatistics(paper, SIDE)) for paper in (0, 255))
    assert black.shape == (6, 1, SIDE, SIDE) and np.array_equal(black[:, 0], table.pixels)
    assert np.array_equal(white, 255 - black)
    small = script.load_images(table, Config(), script.ImageStatistics(0, 2))
    assert small.shape == (6, 1, 2, 2)


def test_columns_that_are_ignored_may_have_one_name(tmp_path):
    path = write_pixels(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0] + ",x, x", *(line + ",1,2" for line in lines[1:])]))
    table = script.read_train_table(Config(data_dir=str(tmp_path)))
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
        script.read_train_table(Config(data_dir=str(tmp_path)))


@pytest.mark.parametrize("columns, message", [
    (NAMES[:15], r"15 pixel columns, pixel0 to pixel14, are no square image; one of 3 x 3 has pixel0 to pixel8"),
    (NAMES[1:], r"pixel1 to pixel15, are no square image"),
    (NAMES[2:11], r"9 pixel columns, pixel2 to pixel10, are no square"),
])
def test_pixel_columns_that_are_no_square_are_refused(tmp_path, columns, message):
    write_pixels(tmp_path, columns=columns)
    with pytest.raises(DataError, match=message):
        script.read_train_table(Config(data_dir=str(tmp_path)))


def test_a_pixel_table_needs_rows_and_to_train_on_it_labels(tmp_path):
    path = write_pixels(tmp_path, labels=False)
    with pytest.raises(DataError, match=r"no column 'label' in its header \(pixel0, "):
        script.read_train_table(Config(data_dir=str(tmp_path)))
    path.write_text(",".join(["label", *NAMES]) + "\n")
    with pytest.raises(DataError, match="has a header and no rows"):
        script.read_train_table(Config(data_dir=str(tmp_path)))


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
    config = Config(train_csv=name, cache_dir=str(tmp_path))
    train, test = script.read_train_table(config), script.read_test_table(config)
    assert train.rows.label.tolist() == (list("abcdefg") if splits else list("0123456"))
    assert np.array_equal(train.pixels, images.swapaxes(1, 2) if splits else images)
    assert test.rows.example_id.tolist() == list("1234567") and test.submission_columns == ("ImageId", "Label")


def test_torchvision_data_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    from torchvision import datasets

    def refuse(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://..., got:\nno route")

    monkeypatch.setattr(datasets.MNIST, "download", refuse)
    with pytest.raises(DataError, match=r"torchvision:KMNIST: neither in .*KMNIST nor to be downloaded \(Error down"):
        script.read_train_table(Config(train_csv="torchvision:KMNIST", cache_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["torchvision:CIFAR10", "torchvision:EMNIST", "torchvision:EMNIST:symbols",
                                  "torchvision:MNIST:letters"])
def test_torchvision_names_that_are_not_known_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"is not known; there are torchvision:MNIST, .*EMNIST:"):
        script.read_train_table(Config(train_csv=name, cache_dir=str(tmp_path)))
