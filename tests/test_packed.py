"""Tables of packed files: numpy's arrays, IDX, parquet, torchvision's data."""

import gzip
import io
import struct
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline import tables
from pipeline.errors import DataError, UsageError
from pipeline.packed import is_packed, packed_table
from pipeline.sources import Table, TableSource

SIDE = 6
IMAGES = np.random.default_rng(0).integers(0, 256, (7, SIDE, SIDE), dtype=np.uint8)
NUMBERS = np.array([0, 1, 2, 0, 1, 2, 9])
TEXTS = ["0", "1", "2", "0", "1", "2", "9"]


def read(folder, name: str, column: str = "label", **options) -> Table:
    part = "train" if column == "label" else "test"
    return packed_table(TableSource(name, str(folder), **{"part": part, **options}), column)


def write_idx(path, array: np.ndarray, compressed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    content = struct.pack(">HBB", 0, 8, array.ndim) + shape + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compressed else content)


def message(folder, name: str, column: str = "label", **options) -> str:
    """Return the one line with which a table is refused."""
    with pytest.raises(DataError) as error:
        read(folder, name, column, **options)
    assert "\n" not in str(error.value) and name.split("-0")[0] in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.npz", "A.NPY", "torchvision:MNIST", "train-00000-of-00001.parquet",
                                  "train-images-idx3-ubyte", "t10k-images.idx3-ubyte", "x-images-idx3-ubyte.gz"])
def test_packed_files_are_known_by_their_names(tmp_path, name):
    assert is_packed(TableSource(name, str(tmp_path)))


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz", "idx3", "images.gz", "npz", "parquet.csv"])
def test_other_files_are_not_packed(tmp_path, name):
    assert not is_packed(TableSource(name, str(tmp_path)))


def test_a_folder_is_not_packed_whatever_its_name(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    assert not is_packed(TableSource("train-images-idx3-ubyte", str(tmp_path)))


def test_kuzushiji_files_have_their_labels_beside(tmp_path, capsys):
    np.savez(tmp_path / "k49-train-imgs.npz", IMAGES)
    np.savez(tmp_path / "k49-train-labels.npz", NUMBERS.astype(np.uint8))
    np.savez(tmp_path / "k49-test-labels.npz", NUMBERS[::-1])
    table = read(tmp_path, "k49-train-imgs.npz")
    assert table.rows.label.tolist() == TEXTS and np.array_equal(table.pixels, IMAGES)
    assert table.pixels.dtype == np.uint8 and table.rows.index.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert table.where(6).endswith("k49-train-imgs.npz, row 7")
    assert "its labels are those of k49-train-labels.npz" in capsys.readouterr().out


def test_a_test_table_numbers_its_images_and_needs_no_labels(tmp_path):
    np.savez(tmp_path / "k49-test-imgs.npz", IMAGES)
    table = read(tmp_path, "k49-test-imgs.npz", "example_id")
    assert table.rows.example_id.tolist() == list("1234567") and table.numbered
    assert table.submission_columns == ("ImageId", "Label")


def test_a_file_of_both_parts_gives_the_part_that_is_asked_for(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_test=IMAGES[:2], x_train=IMAGES[2:], y_train=NUMBERS[2:], y_test=NUMBERS[:2])
    train, test = read(tmp_path, "mnist.npz"), read(tmp_path, "mnist.npz", "example_id")
    extra, judged = read(tmp_path, "mnist.npz", part="extra"), read(tmp_path, "mnist.npz", part="test")
    assert np.array_equal(train.pixels, IMAGES[2:]) and train.rows.label.tolist() == TEXTS[2:]
    assert np.array_equal(test.pixels, IMAGES[:2]) and test.rows.example_id.tolist() == ["1", "2"]
    assert np.array_equal(extra.pixels, IMAGES[2:]) and judged.rows.label.tolist() == TEXTS[:2]


def test_a_file_without_test_images_is_no_test_table(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=IMAGES, y_train=NUMBERS)
    text = message(tmp_path, "mnist.npz", "example_id")
    assert "test images" in text and "--image-column" in text
    assert len(read(tmp_path, "mnist.npz", "example_id", image_column="x_train")) == 7


def test_medical_files_say_that_their_validation_images_are_not_used(tmp_path, capsys):
    parts = {"train": slice(0, 3), "val": slice(3, 5), "test": slice(5, 7)}
    np.savez(tmp_path / "bloodmnist.npz", **{f"{part}_images": IMAGES[rows] for part, rows in parts.items()},
             **{f"{part}_labels": NUMBERS[rows, None] for part, rows in parts.items()})
    table = read(tmp_path, "bloodmnist.npz")
    assert np.array_equal(table.pixels, IMAGES[:3]) and table.rows.label.tolist() == TEXTS[:3]
    assert "not used (val_images, val_labels)" in capsys.readouterr().out
    assert np.array_equal(read(tmp_path, "bloodmnist.npz", "example_id").pixels, IMAGES[5:])


@pytest.mark.parametrize(("image", "label"), [
    ("images", "labels"), ("X", "y"), ("image", "label"), ("data", "target"), ("arr_0", "arr_1"), ("imgs", "classes"),
    ("trainX", "trainY"), ("digits", "digit_labels")])
def test_images_and_labels_are_found_by_the_names_of_arrays(tmp_path, image, label):
    np.savez(tmp_path / "a.npz", **{label: NUMBERS, image: IMAGES})
    table = read(tmp_path, "a.npz")
    assert np.array_equal(table.pixels, IMAGES) and table.rows.label.tolist() == TEXTS


def test_the_names_of_labels_are_not_taken_for_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, label_names=np.array(list("abc")), labels=NUMBERS)
    assert read(tmp_path, "a.npz").rows.label.tolist() == TEXTS


def test_several_arrays_of_labels_are_a_question_that_the_flag_answers(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, fine_labels=NUMBERS, coarse_labels=NUMBERS // 2)
    text = message(tmp_path, "a.npz")
    assert "fine_labels or coarse_labels may hold the labels" in text and "--label-column" in text
    assert read(tmp_path, "a.npz", label_column="coarse_labels").rows.label.iloc[-1] == "4"
    assert "no array 'none'; name one of images, fine_labels, coarse_labels" in message(
        tmp_path, "a.npz", label_column="none")


@pytest.mark.parametrize(("images", "labels"), [
    ("X.npy", "Y.npy"), ("X_train.npy", "y_train.npy"), ("train_images.npy", "train_labels.npy"),
    ("data.npy", "target.npy"), ("a.npy", "a_labels.npy"), ("trainX.npy", "trainY.npy"), ("Xtrain.npy", "ytrain.npy"),
    ("k-imgs.npz", "k-labels.npy")])
def test_labels_are_found_in_the_file_beside(tmp_path, images, labels):
    (np.savez if images.endswith("z") else np.save)(tmp_path / images, IMAGES)
    np.save(tmp_path / labels, NUMBERS)
    assert read(tmp_path, images).rows.label.tolist() == TEXTS


def test_missing_labels_are_named_and_the_named_file_is_taken(tmp_path):
    for name, beside in (("X.npy", "labels.npy"), ("k-imgs.npz", "k-labels.npz"), ("set.npy", "set-labels.npy")):
        (np.savez if name.endswith("z") else np.save)(tmp_path / name, IMAGES)
        assert f"put them there as {beside}" in message(tmp_path, name)
        (np.savez if name.endswith("z") else np.save)(tmp_path / beside, NUMBERS)
        assert read(tmp_path, name).rows.label.tolist() == TEXTS
        (tmp_path / beside).unlink()


@pytest.mark.parametrize(("labels", "texts"), [
    (NUMBERS.astype(float), TEXTS), (NUMBERS[:, None], TEXTS), (np.eye(10)[NUMBERS], TEXTS),
    (np.eye(10, dtype=bool)[NUMBERS], TEXTS), (np.array(TEXTS), TEXTS), (np.array(TEXTS).astype("S"), TEXTS),
    (NUMBERS + 0.5, [f"{text}.5" for text in TEXTS])], ids=str)
def test_labels_become_text(tmp_path, labels, texts):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=labels)
    assert read(tmp_path, "a.npz").rows.label.tolist() == texts


@pytest.mark.parametrize(("labels", "fault"), [
    (NUMBERS[:5], "7 images and 5 labels"), (np.ones((7, 3)), "its labels are an array 7x3"),
    (np.eye(10)[NUMBERS] / 2, "its labels are an array 7x10"),
    (np.where(NUMBERS == 9, np.nan, NUMBERS), "row 7: label is empty"),
    (np.array([*"abcdef", ""]), "row 7: label is empty")], ids=str)
def test_unusable_labels_are_refused(tmp_path, labels, fault):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=labels)
    assert fault in message(tmp_path, "a.npz")


@pytest.mark.parametrize("shape", [(7, SIDE * SIDE), (7, SIDE, SIDE, 1), (7, 1, SIDE, SIDE), (7, SIDE * SIDE, 1)])
def test_images_of_any_arrangement_are_read(tmp_path, shape):
    np.save(tmp_path / "X.npy", IMAGES.reshape(shape))
    assert np.array_equal(read(tmp_path, "X.npy", "example_id").pixels, IMAGES)


def test_colours_are_mixed_as_pillow_mixes_them(tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colours])
    arrangements = {"last.npy": colours, "first.npy": colours.transpose(0, 3, 1, 2), "int.npy": colours.astype(int)}
    for name, array in arrangements.items():
        np.save(tmp_path / name, array)
        assert np.array_equal(read(tmp_path, name, "example_id").pixels, grey), name
    np.save(tmp_path / "real.npy", colours / 255)
    assert np.allclose(read(tmp_path, "real.npy", "example_id").pixels * 255, grey, atol=0.51)


def test_transposition_and_shape_are_applied(tmp_path):
    wide = np.arange(2 * 3 * 8, dtype=np.uint8).reshape(2, 24)
    np.save(tmp_path / "X.npy", wide)
    assert "24 pixels are not a square image" in message(tmp_path, "X.npy", "example_id")
    upright = read(tmp_path, "X.npy", "example_id", pixel_shape="3x8")
    lying = read(tmp_path, "X.npy", "example_id", pixel_shape="3x8", transpose=True)
    assert np.array_equal(upright.pixels, wide.reshape(2, 3, 8))
    assert np.array_equal(lying.pixels, wide.reshape(2, 3, 8).swapaxes(1, 2))


def test_colours_in_flat_rows_are_named_as_colours(tmp_path):
    np.save(tmp_path / "X.npy", np.zeros((2, 3 * 16), np.uint8))
    assert "3 colours of 4 x 4" in message(tmp_path, "X.npy", "example_id")


@pytest.mark.parametrize(("levels", "kept"), [
    (IMAGES, np.uint8), (IMAGES.astype(np.uint16) * 16, np.uint16), (IMAGES.astype(np.int64), np.uint8),
    (IMAGES.astype(int) * 256, np.uint16), (IMAGES / 255, np.float32), (IMAGES.astype(float), np.uint8)], ids=str)
def test_grey_levels_keep_their_values(tmp_path, levels, kept):
    np.save(tmp_path / "X.npy", levels)
    pixels = read(tmp_path, "X.npy", "example_id").pixels
    assert pixels.dtype == kept and np.allclose(pixels, levels)


def test_masks_are_levels_of_0_and_1(tmp_path):
    np.save(tmp_path / "X.npy", IMAGES > 99)
    pixels = read(tmp_path, "X.npy", "example_id").pixels
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, IMAGES > 99)


@pytest.mark.parametrize(("images", "fault"), [
    (np.full((2, 4, 4), np.nan), "NaN or infinite"), (np.full((2, 4, 4), np.inf), "NaN or infinite"),
    (np.full((2, 4, 4), "a"), "not numbers"), (np.zeros((0, 4, 4)), "no image"), (np.zeros(5), "an array 5;"),
    (np.zeros((2, 4, 4, 4)), "2x4x4x4"), (np.zeros((2, 4, 4), complex), "not numbers")], ids=str)
def test_arrays_that_are_no_images_are_refused(tmp_path, images, fault):
    np.save(tmp_path / "X.npy", images)
    assert fault in message(tmp_path, "X.npy", "example_id")


@pytest.mark.parametrize("images", [IMAGES.astype(int) - 128, IMAGES / 127.5 - 1])
def test_negative_levels_are_refused_with_a_remedy_that_works(tmp_path, images):
    np.save(tmp_path / "X.npy", images)
    remedy = message(tmp_path, "X.npy", "example_id").split("write ")[1].removesuffix(" for images")
    np.save(tmp_path / "X.npy", eval(remedy, {"images": images}))
    expected = (IMAGES - IMAGES.min()) / np.ptp(IMAGES)
    assert np.allclose(read(tmp_path, "X.npy", "example_id").pixels, expected, atol=1e-6)


def test_python_objects_are_not_loaded_and_the_remedy_works(tmp_path):
    objects = np.empty(7, object)
    objects[:] = list(IMAGES)
    np.savez(tmp_path / "a.npz", images=objects, labels=np.array(TEXTS, object))
    assert "numpy.stack(IMAGES) and LABELS.astype(str)" in message(tmp_path, "a.npz", image_column="images")
    np.savez(tmp_path / "a.npz", images=np.stack(objects), labels=np.array(TEXTS, object).astype(str))
    assert read(tmp_path, "a.npz").rows.label.tolist() == TEXTS


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a-images-idx3-ubyte", "b-images-idx3-ubyte.gz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_files_are_refused_in_one_line(tmp_path, name, damage):
    path = tmp_path / name
    if "idx3" in name:
        write_idx(path, IMAGES, name.endswith("gz"))
    else:
        (np.savez if name.endswith("z") else np.save)(path, IMAGES)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"version https://git-lfs\n"}[damage])
    assert "not a readable" in message(tmp_path, name, "example_id")


def test_an_npz_with_a_wrong_checksum_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(IMAGES.tobytes()) + 5] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    assert "not a readable .npz file (Bad CRC-32" in message(tmp_path, "a.npz", "example_id")


@pytest.mark.parametrize(("images", "labels"), [
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
    ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
    ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte.gz")])
def test_idx_files_have_their_labels_beside(tmp_path, images, labels):
    write_idx(tmp_path / images, IMAGES, images.endswith(".gz"))
    write_idx(tmp_path / labels, NUMBERS, labels.endswith(".gz"))
    table = read(tmp_path, images)
    assert np.array_equal(table.pixels, IMAGES) and table.rows.label.tolist() == TEXTS
    assert read(tmp_path, images, "example_id").rows.example_id.tolist() == list("1234567")


def test_idx_files_may_be_unpacked_and_keep_their_name(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", IMAGES)
    assert np.array_equal(read(tmp_path, "train-images-idx3-ubyte.gz", "example_id").pixels, IMAGES)


def test_missing_labels_of_idx_files_are_named(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", IMAGES, True)
    assert "put them there as train-labels-idx1-ubyte.gz" in message(tmp_path, "train-images-idx3-ubyte.gz")


def test_idx_numbers_of_several_bytes_are_read_in_their_order(tmp_path):
    deep = (IMAGES.astype(int) * 100).astype(">i2")
    shape = struct.pack(">HBB3I", 0, 11, 3, *deep.shape)
    (tmp_path / "a-images-idx3-ubyte").write_bytes(shape + deep.tobytes())
    assert np.array_equal(read(tmp_path, "a-images-idx3-ubyte", "example_id").pixels, deep)


def test_a_group_column_is_refused_where_there_are_no_columns(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=NUMBERS)
    with pytest.raises(UsageError, match="leave out --group-column"):
        read(tmp_path, "a.npz", group_column="writer")


# ---- Parquet: needs pyarrow ------------------------------------------------------------------------------------------

def encode(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


FILES = [encode(image) for image in IMAGES]


def write_parquet(path, **columns) -> None:
    pytest.importorskip("pyarrow")
    pd.DataFrame(columns).to_parquet(path)


def structs(files=FILES) -> list[dict]:
    return [{"bytes": content, "path": f"{place}.png"} for place, content in enumerate(files)]


def test_parquet_without_pyarrow_is_one_line_that_says_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    assert message(tmp_path, "a.parquet").endswith("pip install pyarrow")


@pytest.mark.parametrize("images", [structs(), FILES], ids=["struct", "binary"])
def test_parquet_holds_image_files(tmp_path, images):
    write_parquet(tmp_path / "a.parquet", image=images, label=NUMBERS)
    table = read(tmp_path, "a.parquet")
    assert table.encoded == FILES and table.pixels is None and table.rows.label.tolist() == TEXTS
    test = read(tmp_path, "a.parquet", "example_id")
    assert test.rows.example_id.tolist() == list("1234567") and test.numbered
    assert test.submission_columns == ("ImageId", "Label") and test.rows.index[0] == 1


def test_parquet_ids_labels_and_groups_are_those_of_its_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", id=NUMBERS * 10 + np.arange(7), pixel_values=structs(),
                  species=list("abcabca"), writer=[1, 1, 2, 2, 3, 3, 3])
    table = read(tmp_path, "a.parquet", group_column="writer", label_column="species")
    assert table.rows.label.tolist() == list("abcabca") and table.rows.writer.tolist() == list("1122333")
    test = read(tmp_path, "a.parquet", "example_id", label_column="species")
    assert test.rows.example_id.tolist() == ["0", "11", "22", "3", "14", "25", "96"]
    assert test.submission_columns == ("id", "species") and not test.numbered


def test_several_parquet_labels_are_a_question_that_the_flag_answers(tmp_path):
    write_parquet(tmp_path / "a.parquet", img=structs(), fine_label=NUMBERS, coarse_label=NUMBERS // 2)
    text = message(tmp_path, "a.parquet")
    assert "fine_label, coarse_label" in text and "--label-column" in text
    assert read(tmp_path, "a.parquet", label_column="fine_label").rows.label.tolist() == TEXTS


def test_several_parquet_images_are_a_question_that_the_flag_answers(tmp_path):
    write_parquet(tmp_path / "a.parquet", front=structs(), back=structs(FILES[::-1]), label=NUMBERS)
    assert "--image-column" in message(tmp_path, "a.parquet")
    assert "front, back" in message(tmp_path, "a.parquet", image_column="label")
    assert read(tmp_path, "a.parquet", image_column="back").encoded == FILES[::-1]


def test_all_shards_of_a_parquet_table_are_read_in_their_order(tmp_path, capsys):
    for number, rows in enumerate((slice(0, 3), slice(3, 4), slice(4, 7))):
        path = tmp_path / f"train-0000{number}-of-00003.parquet"
        write_parquet(path, image=structs(FILES[rows]), label=NUMBERS[rows])
    write_parquet(tmp_path / "test-00000-of-00003.parquet", image=structs(), label=NUMBERS)
    table = read(tmp_path, "train-00001-of-00003.parquet")
    assert table.encoded == FILES and table.rows.label.tolist() == TEXTS
    assert "3 files in all" in capsys.readouterr().out and table.where(6).endswith("train-*-of-00003.parquet, row 7")
    (tmp_path / "train-00002-of-00003.parquet").unlink()
    missing = message(tmp_path, "train-00000-of-00003.parquet")
    assert "train-00002-of-00003*.parquet of the same table is missing" in missing


def test_shards_with_digests_are_read(tmp_path):
    for number, digest in enumerate(("6587b3", "c0ffee")):
        write_parquet(tmp_path / f"train-0000{number}-of-00002-{digest}.parquet", image=structs(), label=NUMBERS)
    assert len(read(tmp_path, "train-00000-of-00002-6587b3.parquet")) == 14


def test_missing_bytes_are_faults_of_their_rows_and_paths_alone_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=structs([*FILES[:6], None]), label=NUMBERS)
    assert list(read(tmp_path, "a.parquet").faults) == [6]
    write_parquet(tmp_path / "b.parquet", image=structs([*[b""] * 7]), label=NUMBERS)
    assert "holds paths of images and not the images" in message(tmp_path, "b.parquet")


@pytest.mark.parametrize(("columns", "fault"), [
    ({"image": ["a.png"] * 7, "label": NUMBERS}, "none of its columns holds image files (of image, label)"),
    ({"image": structs(), "label": [*TEXTS[:6], None]}, "row 7: label is empty"),
    ({"image": [], "label": []}, "none of its columns")], ids=["paths", "no label", "no rows"])
def test_unusable_parquet_tables_are_refused(tmp_path, columns, fault):
    write_parquet(tmp_path / "a.parquet", **columns)
    assert fault in message(tmp_path, "a.parquet")


def test_damaged_parquet_files_are_refused_in_one_line(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=structs(), label=NUMBERS)
    for content in (b"", b"text", (tmp_path / "a.parquet").read_bytes()[:-9]):
        (tmp_path / "b.parquet").write_bytes(content)
        assert "not a readable parquet file" in message(tmp_path, "b.parquet")


def test_packed_tables_are_opened_as_any_table(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=IMAGES, y_train=NUMBERS, x_test=IMAGES)
    assert len(tables.read_train_table(TableSource("a.npz", str(tmp_path)))) == 7
    assert len(tables.read_test_table(TableSource("a.npz", str(tmp_path), part="test"))) == 7


# ---- torchvision -----------------------------------------------------------------------------------------------------

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
    extra = tables.read_train_table(TableSource(name, cache_dir=str(tmp_path), part="extra"))
    assert extra.rows.label.tolist() == train.rows.label.tolist()
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
