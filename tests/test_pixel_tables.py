"""Tables of pixels: which columns they are, their order and shape, grey levels that are allowed, labels and ids."""

import numpy as np
import pandas as pd
import pytest

from pipeline import tables
from pipeline.errors import DataError
from pipeline.images import ImageStatistics, LoadSettings, load_images
from pipeline.tables import Table, TableSource

SIDE = 4
NAMES = [f"pixel{number}" for number in range(SIDE * SIDE)]


def read_train(folder, **options) -> Table:
    return tables.read_train_table(TableSource("train.csv", str(folder), **options))


def read_test(folder, **options) -> Table:
    return tables.read_test_table(TableSource("test.csv", str(folder), part="test", **options))


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
    digits = pd.read_csv(path).assign(user_id=7, id=7, image_id=range(6))
    digits.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"id or image_id may hold the ids; name the right one with --id-column"):
        read_test(tmp_path)
    assert read_test(tmp_path, id_column="image_id").rows.example_id.tolist() == list("012345")
    digits.drop(columns="id").to_csv(path, index=False)  # user_id is no image's id
    assert read_test(tmp_path).rows.example_id.tolist() == list("012345")


def test_other_columns_of_a_test_table_are_warned_of(tmp_path, capsys):
    path = write_pixels(tmp_path, name="test.csv", labels=True)
    pd.read_csv(path).assign(file="a.png").to_csv(path)
    table = read_test(tmp_path)
    assert table.rows.example_id.tolist() == list("123456")
    error = capsys.readouterr().err
    assert "test.csv: the submission numbers the rows from 1" in error and "(file), name it with --id-column" in error


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
    (NAMES[:15], r"15 pixel columns, pixel0 to pixel14, are not a square image; if they are rows of another"),
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



def test_names_of_pixels_do_not_matter(tmp_path, capsys):
    images = pixels(6)
    for names in ([f"{row}x{column}" for row in range(1, 5) for column in range(1, 5)], list(map(str, range(16))),
                  [f"pixel_{number:04d}" for number in range(16)], list("abcdefghijklmnop"),
                  [f"V{number}" for number in range(2, 18)]):
        table = pd.DataFrame(images, columns=names).assign(label=list("xyzxyz"))
        table.to_csv(tmp_path / "train.csv", index=False)
        found = read_train(tmp_path)
        assert np.array_equal(found.pixels.reshape(6, -1), images) and found.rows.label.tolist() == list("xyzxyz")
        assert f"columns taken for pixels: {names[0]} to {names[-1]}, labels: label" in capsys.readouterr().out


def test_pixels_that_are_counted_are_read_in_their_order(tmp_path):
    order = sorted(range(16), key=str)  # 0, 1, 10, 11, ...
    table = pd.DataFrame(pixels(6)[:, order], columns=[f"p{number}" for number in order]).assign(kind=list("xyzxyz"))
    table.to_csv(tmp_path / "train.csv", index=False)
    found = read_train(tmp_path)
    assert np.array_equal(found.pixels.reshape(6, -1), pixels(6)) and found.own_label_column == "kind"


@pytest.mark.parametrize("first", [True, False])
def test_a_table_without_a_header_has_its_label_first_or_last(tmp_path, capsys, first):
    images, labels = pixels(60), np.arange(60) % 10
    images[:, [0, -1]] = 0  # corners
    rows = np.column_stack([labels, images] if first else [images, labels])
    for name in ("train.csv", "test.csv"):
        np.savetxt(tmp_path / name, rows, "%d", ",")
    table, test = read_train(tmp_path), read_test(tmp_path)
    assert table.rows.label.tolist() == labels.astype(str).tolist() and table.rows.index[0] == 1
    assert np.array_equal(table.pixels, test.pixels) and np.array_equal(table.pixels.reshape(60, -1), images)
    assert test.rows.example_id.tolist() == [str(number) for number in range(1, 61)]
    assert test.submission_columns == ("ImageId", "Label") and table.own_label_column == ""
    said = capsys.readouterr()
    assert "(it has no header, they are counted from 0), labels: " + "0" * first in said.out and not said.err
    np.savetxt(tmp_path / "test.csv", images, "%d", ",")  # without labels
    assert np.array_equal(read_test(tmp_path, label_column="0").pixels, table.pixels)


def test_two_columns_that_may_hold_the_labels_are_named(tmp_path):
    rows = np.random.default_rng(0).integers(0, 10, (60, 17))
    np.savetxt(tmp_path / "train.csv", rows, "%d", ",")
    with pytest.raises(DataError, match="0 or 16 may hold the labels; name the right one with --label-column"):
        read_train(tmp_path)
    assert read_train(tmp_path, label_column="16").rows.label.tolist() == rows[:, 16].astype(str).tolist()
    assert np.array_equal(read_train(tmp_path, label_column="0").pixels.reshape(60, -1), rows[:, 1:])


def test_a_table_of_numbers_beside_image_paths_holds_no_pixels(tmp_path):
    numbers = pd.DataFrame(pixels(6), columns=[f"margin{number}" for number in range(16)])
    numbers.assign(image_path=[f"{row}.png" for row in range(6)], label=list("xyzxyz")).to_csv(tmp_path / "train.csv")
    assert read_train(tmp_path).pixels is None
    numbers.assign(id=range(6), label=list("xyzxyz")).to_csv(tmp_path / "train.csv")
    assert read_train(tmp_path, image_column="id").pixels is None and read_train(tmp_path).pixels.shape == (6, 4, 4)


def test_the_transposed_image_stands_upright(tmp_path):
    write_pixels(tmp_path)
    write_pixels(tmp_path, name="test.csv", labels=False)
    upright = pixels(6).reshape(6, SIDE, SIDE).swapaxes(1, 2)
    assert np.array_equal(read_train(tmp_path, transpose=True).pixels, upright)
    assert np.array_equal(read_test(tmp_path, transpose=True).pixels, upright)


def test_the_shape_settles_what_is_no_square(tmp_path):
    write_pixels(tmp_path)
    assert read_train(tmp_path, pixel_shape="2x8").pixels.shape == (6, 2, 8)
    assert read_train(tmp_path, pixel_shape="2x8", transpose=True).pixels.shape == (6, 8, 2)
    with pytest.raises(DataError, match="16 pixel columns, pixel0 to pixel15, are not --pixel-shape 3x8, which is 24 "):
        read_train(tmp_path, pixel_shape="3x8")


def test_colours_are_refused_with_the_remedy(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 48))
    table = pd.DataFrame(colours, columns=[f"pixel{number}" for number in range(48)]).assign(label=list("xyzxyz"))
    table.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(DataError, match=r"48 pixel columns, .*look like 3 colours of 4 x 4: write one grey level for"):
        read_train(tmp_path)
    grey = colours.reshape(6, 3, 16).mean(axis=1).astype(int)  # what the message advises
    pd.DataFrame(grey, columns=NAMES).assign(label=list("xyzxyz")).to_csv(tmp_path / "train.csv", index=False)
    assert np.array_equal(read_train(tmp_path).pixels.reshape(6, -1), grey)


@pytest.mark.parametrize(("scale", "kind"), [(1 / 255, np.float32), (16, np.uint16), (1 / 3, np.float32)])
def test_levels_of_other_ranges_are_kept(tmp_path, scale, kind):
    levels = pixels(6) * scale
    pd.DataFrame(levels, columns=NAMES).assign(label=list("xyzxyz")).to_csv(tmp_path / "train.csv", index=False)
    found = read_train(tmp_path).pixels
    assert found.dtype == kind and np.allclose(found.reshape(6, -1), levels, atol=1e-4)
    negative = pd.DataFrame(levels, columns=NAMES).assign(label=list("xyzxyz"), pixel3=-1.5)
    negative.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(DataError, match=r"row 2: pixel3 is '-1.5'; a pixel is a number from 0 up"):
        read_train(tmp_path)


def test_a_test_table_without_ids_takes_those_of_the_sample(tmp_path):
    write_pixels(tmp_path, name="test.csv", labels=False)
    pd.DataFrame({"id": range(6), "digit": 0}).to_csv(tmp_path / "sampleSubmission.csv", index=False)
    assert read_test(tmp_path).rows.example_id.tolist() == list("012345")


def test_levels_from_minus_one_to_one_are_read_once_they_are_moved(tmp_path):
    table = pd.DataFrame(pixels(6) / 127.5 - 1, columns=NAMES).assign(label=list("xyzxyz"))
    table.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(DataError, match=r"where levels go from -1 to 1, write \(level \+ 1\) / 2"):
        read_train(tmp_path)
    table[NAMES] = (table[NAMES] + 1) / 2
    table.to_csv(tmp_path / "train.csv", index=False)
    assert np.allclose(read_train(tmp_path).pixels.reshape(6, -1), pixels(6) / 255, atol=1e-6)
