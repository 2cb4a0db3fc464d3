"""Decoding: modes, background, sizes, the cache, bad images."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_competition
from PIL import Image, ImageOps

from pipeline import decoding, images
from pipeline.decoding import background_of, fit_to_square, read_grey, to_grey, to_ink, white_level
from pipeline.device import Runtime
from pipeline.errors import DataError
from pipeline.images import ImageStatistics, LoadSettings
from pipeline.outputs import describe_rows
from pipeline.splits import Split
from pipeline.tables import Table, TableSource, read_train_table
from script import Config, MathSymbolDataset

BLACK_ON_WHITE = ImageStatistics(background=255, size=32)


def drawing() -> np.ndarray:
    """Return black on white, 32x32, with a grey: an L that no rotation or mirror keeps."""
    grey = np.full((32, 32), 255, dtype=np.uint8)
    grey[6:26, 8:11] = 0
    grey[23:26, 8:24] = 90
    return grey


def overshooting(values: np.ndarray) -> np.ndarray:
    """Return values as resampling may leave them: float32, a little beyond white at one place."""
    values = values.astype(np.float32)
    values[0, 0] *= 1.1
    return values


def forms() -> dict[str, Image.Image]:
    """Return the same drawing in Pillow's modes."""
    grey = Image.fromarray(drawing())
    transparent = Image.merge("LA", (Image.new("L", (32, 32), 0), ImageOps.invert(grey)))
    return {"L": grey, "RGB": grey.convert("RGB"), "RGBA": grey.convert("RGBA"), "LA on nothing": transparent,
            "RGBA on nothing": transparent.convert("RGBA"), "palette": grey.convert("P"),
            "1": grey.convert("1", dither=0), "16 bits": Image.fromarray(drawing().astype(np.uint16) * 257),
            "32 bits": Image.fromarray(drawing().astype(np.int32)), "CMYK": grey.convert("RGB").convert("CMYK"),
            "8 of 16 bits": Image.fromarray(drawing().astype(np.uint16)),
            "shares": Image.fromarray(drawing().astype(np.float32) / 255),
            "floats": Image.fromarray(drawing().astype(np.float32)),
            "shares that overshoot": Image.fromarray(overshooting(drawing() / 255)),
            "all 32 bits": Image.fromarray(drawing().astype(np.int32) * 8_421_504)}


@pytest.mark.parametrize("form", forms())
def test_every_mode_gives_the_same_ink(tmp_path, form):
    path = tmp_path / ("image.tif" if form in ("CMYK", "floats") or "32" in form or "shares" in form else "image.png")
    forms()[form].save(path)
    statistics = estimate(tmp_path, [path.name])
    assert statistics.background == 255
    ink = np.frombuffer(images.decode_image(statistics, str(path)), np.uint8).reshape(32, 32).astype(int)
    expected = 255 - drawing().astype(int)
    if form == "1":
        expected = np.where(expected > 127, 255, 0)
    assert np.abs(ink - expected).max() <= 2


def test_a_few_transparent_pixels_do_not_change_the_background():
    """Rounded corners, a hole: the background is what is opaque at the border."""
    for background in (0, 255):
        grey, alpha = np.full((32, 32), background, dtype=np.uint8), np.full((32, 32), 255, dtype=np.uint8)
        grey[6:26, 8:11] = 255 - background
        alpha[0, 0] = alpha[31, 31] = alpha[16, 20] = 0
        grey[alpha == 0] = 255 - background  # invisible
        assert background_of(grey, alpha) == background
        assert background_of(grey, np.zeros_like(alpha)) == background


@pytest.mark.parametrize("opacity", [60, 127, 128])
def test_faint_strokes_on_transparency_are_ink(opacity):
    alpha = np.where(drawing() < 255, opacity, 0).astype(np.uint8)
    black = np.zeros_like(alpha)
    assert background_of(black, alpha) == 255
    assert to_ink(black, alpha, 255).max() == opacity


def test_jpeg_gif_and_exif_are_read_upright(tmp_path):
    grey = Image.fromarray(drawing())
    grey.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (32, 32), 255)])
    assert np.array_equal(read_grey(str(tmp_path / "a.gif"))[0], drawing())
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned.convert("RGB").save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert np.abs(read_grey(str(tmp_path / "a.jpg"))[0].astype(int) - drawing()).mean() < 5


def test_damaged_exif_rotates_nothing(tmp_path):
    Image.fromarray(drawing()).save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert np.array_equal(read_grey(str(tmp_path / "a.png"))[0], drawing())


def estimate(folder, names) -> ImageStatistics:
    table = Table("train.csv", pd.DataFrame({"image_path": names}), folder)
    return images.estimate_image_statistics(table, 48)


@pytest.mark.parametrize("background", [255, 0])
def test_the_background_is_found_from_the_images(tmp_path, background):
    for number in range(5):
        grey = drawing() if background == 255 else 255 - drawing()
        Image.fromarray(grey).save(tmp_path / f"{number}.png")
    statistics = estimate(tmp_path, [f"{number}.png" for number in range(5)])
    assert statistics == ImageStatistics(background, 32)
    ink = to_ink(*read_grey(str(tmp_path / "0.png")), statistics.background)
    assert np.array_equal(ink, 255 - drawing())


def test_images_of_several_kinds_may_alternate(tmp_path):
    """Each drawing in four sizes, in a table of four times the images that are sampled."""
    for side in (16, 20, 24, 32):
        grey = np.asarray(Image.fromarray(drawing()).resize((side, side)))
        Image.fromarray(grey).save(tmp_path / f"{side}.png")
    assert estimate(tmp_path, ["16.png", "20.png", "24.png", "32.png"] * 256) == ImageStatistics(255, 32)


@pytest.mark.parametrize("shape", [(64, 64), (20, 60), (60, 20), (5, 5), (1, 1), (1, 900), (900, 1)])
def test_other_sizes_are_fitted_to_a_square_without_distortion(shape):
    height, width = shape
    ink = fit_to_square(to_ink(np.zeros(shape, dtype=np.uint8), None, 255), 32)  # all ink
    rows, columns = (ink > 127).any(axis=1).sum(), (ink > 127).any(axis=0).sum()
    assert ink.shape == (32, 32) and max(rows, columns) == 32
    assert rows == max(1, round(32 * height / max(shape))) and columns == max(1, round(32 * width / max(shape)))
    assert ink[0, 0] == (255 if height == width else 0) or min(rows, columns) > 30


def test_large_images_are_stored_at_the_networks_size(tmp_path):
    Image.fromarray(drawing()).resize((200, 150)).save(tmp_path / "a.png")
    assert estimate(tmp_path, ["a.png"]) == ImageStatistics(255, 48)


def read_train(competition) -> Table:
    return read_train_table(TableSource("train.csv", str(competition)))


def load(competition, tmp_path, **settings) -> np.ndarray:
    settings = LoadSettings(cache_dir=str(tmp_path / "cache"), **settings)
    return images.load_images([read_train(competition)], BLACK_ON_WHITE, settings)[0]


def test_a_second_run_does_not_decode(competition, tmp_path, capsys):
    first = load(competition, tmp_path)
    assert "decoded 100 images of " in capsys.readouterr().out
    assert first.shape == (100, 1, 32, 32) and first.dtype == np.uint8 and isinstance(first, np.memmap)
    assert np.array_equal(load(competition, tmp_path), first) and "decoded" not in capsys.readouterr().out


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_noticed_and_only_that_one_decoded(competition, tmp_path, capsys, keep_times):
    first = np.array(load(competition, tmp_path))
    names = read_train(competition).rows.image_path
    path = competition / "Dataset_Image" / names.iloc[7]
    before = path.stat()
    data = bytearray(path.read_bytes())
    Image.fromarray(255 - drawing()).save(path)
    if keep_times:  # a replacement of the same size that keeps the time of change
        path.write_bytes(data)
        image = np.array(Image.open(path))
        shutil.copy(path, tmp_path / "copy.png")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        image = 255 - drawing()
    capsys.readouterr()
    second = load(competition, tmp_path)
    assert "decoded 1 images of " in capsys.readouterr().out
    assert np.array_equal(second[7, 0], 255 - image) and np.array_equal(np.delete(second, 7, 0), np.delete(first, 7, 0))


def test_an_added_row_and_a_removed_file_are_noticed(competition, tmp_path):
    load(competition, tmp_path)
    Image.fromarray(drawing()).save(competition / "Dataset_Image" / "new.png")
    with open(competition / "train.csv", "a") as file:
        file.write("new.png,3\n")
    loaded = load(competition, tmp_path)
    assert len(loaded) == 101 and np.array_equal(loaded[100, 0], 255 - drawing())
    (competition / "Dataset_Image" / "new.png").unlink()
    with pytest.raises(DataError, match=r"row 102: 'new.png': no such file"):
        load(competition, tmp_path)


def test_a_damaged_cache_is_decoded_again(competition, tmp_path):
    first = np.array(load(competition, tmp_path))
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:-100])
    assert np.array_equal(load(competition, tmp_path), first)


def test_a_cache_that_cannot_be_written_is_a_warning(competition, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load(competition, tmp_path).shape == (100, 1, 32, 32)
    assert "cannot be cached" in capsys.readouterr().err


def test_processes_decode_the_same_as_this_one(competition, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 30)
    alone = np.array(load(competition, tmp_path / "a", num_workers=0))
    assert np.array_equal(load(competition, tmp_path / "b", num_workers=2), alone)


def kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_decoding_process_that_is_killed_is_one_line(competition, tmp_path, monkeypatch):
    """As the system does where memory is short."""
    monkeypatch.setattr(decoding, "CHUNK", 30)
    monkeypatch.setattr(images, "decode_image", kill_itself)
    with pytest.raises(DataError, match=r"a process that decodes images was killed, .* try --num-workers 0$"):
        load(competition, tmp_path, num_workers=2)


def test_the_first_ten_bad_images_are_listed_by_row(competition, tmp_path, capsys):
    table = read_train(competition).rows
    root = competition / "Dataset_Image"
    whole = (root / table.image_path.iloc[0]).read_bytes()
    faults = {3: b"", 4: b"<html>not found</html>", 5: whole[: len(whole) // 2], 6: None}
    for position, content in {**faults, **dict.fromkeys(range(20, 30), b"")}.items():
        path = root / table.image_path.iloc[position]
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load(competition, tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == ("14 images cannot be used; replace each file or remove its row, or leave them out with "
                        "--on-bad-image skip:")
    assert len(lines) == 12 and lines[-1] == "  and 4 more"
    for line, position, cause in zip(lines[1:], faults, ["empty", "not an image", "truncated", "no such file"]):
        assert f"train.csv, row {position + 2}: {table.image_path.iloc[position]!r}: " in line and cause in line
    capsys.readouterr()
    with pytest.raises(DataError, match="14 images"):
        load(competition, tmp_path)
    assert "decoded 13 images of " in capsys.readouterr().out  # the good ones are in the cache, one has no file


def test_bad_images_are_left_blank_on_request(competition, tmp_path, capsys):
    table = read_train(competition)
    (competition / "Dataset_Image" / table.rows.image_path.iloc[4]).write_bytes(b"")
    settings = LoadSettings(str(tmp_path / "cache"), on_bad_image="skip")
    loaded, = images.load_images([table], BLACK_ON_WHITE, settings)
    assert not loaded[4].any() and loaded[5].any() and table.bad_rows.tolist() == [4]
    assert table.usable_rows.tolist() == [row for row in range(100) if row != 4]
    error = capsys.readouterr().err
    assert "warning: 1 image cannot be used and left out:" in error and "train.csv, row 6: " in error


def test_a_table_without_a_usable_image_names_a_remedy_that_works(competition, tmp_path):
    table = read_train(competition)
    table.rows.assign(image_path="Dataset_Image/" + table.rows.image_path).to_csv(competition / "train.csv")
    with pytest.raises(DataError, match=r"none of its images can be used; its images are in \.: give --root-dir \. "):
        load(competition, tmp_path)
    right = read_train_table(TableSource("train.csv", str(competition), "."))
    assert len(images.load_images([right], BLACK_ON_WHITE, LoadSettings(str(tmp_path / "cache")))[0]) == 100


def test_images_on_another_background_are_warned_of(tmp_path, capsys):
    for number in range(3):
        Image.fromarray(255 - drawing()).save(tmp_path / f"{number}.png")
    table = Table("test.csv", pd.DataFrame({"image_path": ["0.png", "1.png", "2.png"]}), tmp_path)
    images.load_images([table], ImageStatistics(0, 32), LoadSettings(str(tmp_path / "cache")))
    assert capsys.readouterr().err == ""
    images.load_images([table], BLACK_ON_WHITE, LoadSettings(str(tmp_path / "cache")))
    error = capsys.readouterr().err
    assert "warning: test.csv: the training images are black on white and these are the opposite" in error


def test_a_decoded_image_is_ink_or_what_is_wrong_with_it(tmp_path):
    Image.fromarray(drawing()).save(tmp_path / "a.png")
    decoded = images.decode_image(BLACK_ON_WHITE, str(tmp_path / "a.png"))
    assert np.array_equal(np.frombuffer(decoded, np.uint8).reshape(32, 32), 255 - drawing())
    assert images.decode_image(BLACK_ON_WHITE, str(tmp_path / "b.png")) == "no such file or directory"


# ---- Depth of grey levels --------------------------------------------------------------------------------------------

def levels_of(white: float, dtype: type = np.uint8) -> np.ndarray:
    """Return the drawing with another white."""
    return (drawing() * (white / 255)).round(0 if np.issubdtype(dtype, np.integer) else 6).astype(dtype)


def file_table(folder, arrays: list, name: str = "train.csv", suffix: str = ".png") -> Table:
    """Return a table of image files."""
    names = [f"{Path(name).stem}-{number}{suffix}" for number in range(len(arrays))]
    for file, array in zip(names, arrays):
        (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(folder / file)
    return Table(name, pd.DataFrame({"image_path": names}, range(2, 2 + len(names))), folder)


def pixel_rows(arrays: list[np.ndarray], name: str = "train.csv") -> Table:
    """Return a table that holds its pixels."""
    return Table(name, pd.DataFrame(index=range(2, 2 + len(arrays))), pixels=np.stack(arrays))


def encoded_rows(folder, arrays: list, name: str = "train.csv") -> Table:
    """Return a table that holds the contents of image files."""
    table = file_table(folder, arrays, name)
    contents = [(folder / path).read_bytes() for path in table.rows.image_path]
    return Table(name, table.rows[[]], encoded=contents)


def errors_of_ink(tables: list[Table], folder) -> list[np.ndarray]:
    """Return how far each image's ink is from the drawing's, for statistics of the first table."""
    statistics = images.estimate_image_statistics(tables[0], None)
    loaded = images.load_images(tables, statistics, LoadSettings(str(folder / "cache")))
    return [np.abs(ink[:, 0].astype(int) - (255 - drawing())).max(axis=(1, 2)) for ink in loaded]


@pytest.mark.parametrize("highest, fractions, white", [
    (0, False, 255), (1, False, 1), (3, False, 3), (7, False, 7), (15, False, 15), (16, False, 16), (17, False, 255),
    (254, False, 255), (255, False, 255), (256, False, 511), (1023, False, 1023), (3000, False, 4095),
    (16383, False, 16383), (65535, False, 65535), (65536, False, 131071), (0.4, True, 1), (1.2, True, 1),
    (16, True, 16), (271.5, True, 255), (4095, True, 4095)])
def test_the_white_of_a_table_follows_from_its_highest_level(highest, fractions, white):
    assert white_level(highest, fractions) == white


def test_usual_levels_pass_through_untouched():
    grey = np.arange(256, dtype=np.uint8)[None]
    assert to_grey(grey, 255) is grey
    for white in (511, 1023, 4095, 65535):  # to white and back
        assert np.array_equal(to_grey((grey * (white / 255)).round().astype(np.uint16), white), grey)
    assert to_grey(np.array([[-1.0, 0, 0.5, 1, 1.1]]), 1).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("white", [1, 16, 511, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("kind", ["files", "pixels", "encoded"])
def test_tables_of_any_depth_have_the_ink_of_8_bits(tmp_path, white, kind):
    """Dark images and light ones alike: the range is the table's, not the image's."""
    array = levels_of(white, np.uint8 if white < 256 else np.uint16)
    dark = array // 2 if white > 16 else array * 0
    table = {"files": file_table, "encoded": encoded_rows}.get(kind, lambda _, rows: pixel_rows(rows))(
        tmp_path, [array] * 8 + [dark])
    statistics = images.estimate_image_statistics(table, None)
    assert statistics == ImageStatistics(255, 32, white)
    ink = images.load_images([table], statistics, LoadSettings(str(tmp_path / "cache")))[0][:, 0].astype(int)
    step = 0 if white > 255 else 255 / white
    assert np.abs(ink[:8] - (255 - drawing())).max() <= 1 + step / 2
    assert np.abs(ink[8] - (255 - drawing() * (0.5 if white > 16 else 0))).max() <= 1


@pytest.mark.parametrize("white, kind", [(1, bool), (1, np.float32), (16, np.float64), (255, np.float32),
                                         (255, np.int64)])
def test_pixels_of_any_type_are_read(tmp_path, white, kind):
    table = pixel_rows([levels_of(white, kind) if kind is not bool else drawing() > 100] * 4)
    assert images.estimate_image_statistics(table, None) == ImageStatistics(255, 32, white)
    error, = errors_of_ink([table], tmp_path)
    assert error.max() <= (90 if kind is bool else 1 + (white == 16) * 8)


def test_a_level_that_the_sample_misses_is_found(tmp_path):
    """Darker images are most of the table, and only a few have its white."""
    arrays = [levels_of(15)] * 1400 + [levels_of(255)] * 2
    for table in (file_table(tmp_path, arrays), pixel_rows([array.astype(np.uint16) for array in arrays])):
        assert images.survey_sample(table).levels == 15
        assert images.estimate_image_statistics(table, None).levels == 255
    deep = [levels_of(255, np.uint16)] * 1400 + [levels_of(4095, np.uint16)]
    assert images.estimate_image_statistics(pixel_rows(deep), None).levels == 4095
    assert images.estimate_image_statistics(file_table(tmp_path, deep, "deep.csv"), None).levels == 4095


def test_transparent_and_palette_images_never_lower_the_white(tmp_path):
    ink = Image.merge("LA", (Image.new("L", (32, 32), 3), Image.fromarray(255 - drawing())))
    assert images.estimate_image_statistics(file_table(tmp_path, [ink] * 3), None) == ImageStatistics(255, 32)
    palette = Image.fromarray(np.minimum(drawing(), 3)).convert("P")
    assert images.estimate_image_statistics(file_table(tmp_path, [palette] * 3), None).levels == 255


def test_files_of_8_bits_among_deeper_ones_keep_their_own_white(tmp_path, capsys):
    arrays = [levels_of(4095, np.uint16), drawing()] * 10
    table = file_table(tmp_path, arrays)
    assert images.estimate_image_statistics(table, None) == ImageStatistics(255, 32, 4095)
    assert errors_of_ink([table], tmp_path)[0].max() <= 1 and capsys.readouterr().err == ""


def test_the_few_deeper_files_of_a_table_are_counted(tmp_path, capsys):
    """They are scaled by their own depth, a guess unless it is all of 16 bits."""
    arrays = [drawing()] * 1000
    arrays[700:703] = [levels_of(4095, np.uint16)] * 3
    arrays[900] = levels_of(65535, np.uint16)
    table = file_table(tmp_path, arrays)
    assert not np.isin(np.random.default_rng(0).permutation(1000)[:images.SAMPLE], [700, 701, 702, 900]).any()
    assert errors_of_ink([table], tmp_path)[0].max() <= 1
    assert "warning: train.csv, row 702 and 2 more images: grey levels beyond 255" in capsys.readouterr().err


def test_infinite_levels_do_not_darken_a_table(tmp_path):
    spoilt = levels_of(1, np.float32)
    spoilt[0, :2] = np.inf, np.nan
    table = file_table(tmp_path, [spoilt, levels_of(1, np.float32)], suffix=".tif")
    assert images.estimate_image_statistics(table, None) == ImageStatistics(255, 32, 1)


@pytest.mark.parametrize("train, test, remedy", [(255, 1, "multiply them by 255"), (1, 255, "divide them by 255"),
                                                 (4095, 255, "multiply them by 16.0588"), (255, 16, "by 15.9375"),
                                                 (255, 1023, "divide them by 4.01176"), (255, 20, "by 12.75")])
def test_test_images_of_another_range_are_warned_of_with_a_remedy_that_works(tmp_path, capsys, train, test, remedy):
    rows = [[levels_of(white, np.uint8 if white < 256 else np.uint16)] * 4 for white in (train, test)]
    errors_of_ink([pixel_rows(rows[0]), pixel_rows(rows[1], "test.csv")], tmp_path)
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and error.strip().endswith(remedy)
    assert f"test.csv: its grey levels go up to {test}, those of the training images to {train}; " in error
    factor = float(remedy.split()[-1])
    mended = [row / factor if "divide" in remedy else row * factor for row in rows[1]]
    errors = errors_of_ink([pixel_rows(rows[0]), pixel_rows(mended, "test.csv")], tmp_path)
    assert capsys.readouterr().err == "" and errors[1].max() <= 1 + 255 / min(test, train) / 2


@pytest.mark.parametrize("train, test", [(16, 15), (255, 254), (255, 40), (4095, 3000)])
def test_test_images_of_nearly_the_same_range_are_not_warned_of(tmp_path, capsys, train, test):
    kind = np.uint8 if train < 256 else np.uint16
    dark = pixel_rows([255 - levels_of(255)] * 3 if train == 255 else [levels_of(train, kind)] * 3)
    other = pixel_rows([(test - levels_of(test, kind)) if train == 255 else levels_of(test, kind)] * 3, "test.csv")
    errors_of_ink([dark, other], tmp_path)
    assert capsys.readouterr().err == ""


def test_dark_masks_to_predict_are_warned_of_beside_8_bit_and_deep_training_files(tmp_path, capsys):
    test = file_table(tmp_path, [levels_of(1)] * 4, "test.csv")
    for white in (255, 4095):
        train = file_table(tmp_path, [levels_of(white, np.uint8 if white == 255 else np.uint16)] * 4)
        errors_of_ink([train, test], tmp_path)
        error = capsys.readouterr().err
        assert error.count("warning") == 1 and "multiply them by 255" in error


def test_the_white_of_a_checkpoint_is_part_of_the_cache(tmp_path, capsys):
    table = file_table(tmp_path, [levels_of(4095, np.uint16)] * 3)
    settings = LoadSettings(str(tmp_path / "cache"))
    for white in (4095, 65535, 4095):
        images.load_images([table], ImageStatistics(255, 32, white), settings)
    assert capsys.readouterr().out.count("decoded 3 images") == 2


# ---- Both backgrounds ------------------------------------------------------------------------------------------------

def backgrounds(rows: int, dark: int) -> list[np.ndarray]:
    """Return drawings, of which the first are white on black."""
    return [255 - drawing() if row < dark else drawing() for row in range(rows)]


@pytest.mark.parametrize("kind", ["files", "pixels", "encoded"])
def test_each_images_own_border_decides_in_a_table_of_both_backgrounds(tmp_path, capsys, kind):
    make = {"files": file_table, "encoded": encoded_rows}.get(kind, lambda _, rows: pixel_rows(rows))
    table = make(tmp_path, backgrounds(300, 12))
    assert images.estimate_image_statistics(table, None) == ImageStatistics(None, 32)
    assert capsys.readouterr().out == ("train.csv: 12 of 300 images are white on black, the others black on white; "
                                       "each image's own border decides\n")
    assert errors_of_ink([table], tmp_path)[0].max() == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("rows, dark", [(100, 2), (100, 0), (1000, 15)])
def test_few_images_of_the_other_background_do_not_make_a_table_mixed(rows, dark):
    assert images.estimate_image_statistics(pixel_rows(backgrounds(rows, dark)), None) == ImageStatistics(255, 32)


def test_symbols_that_touch_the_border_still_have_a_background():
    """As those that were cut out closely: up to a quarter of the border is ink."""
    touching = drawing()
    touching[:, 8:11] = touching[:, 20:23] = 0
    touching[4:14, :] = np.where(np.arange(32) < 28, touching[4:14, :], 0)
    mixed = [255 - touching] * 30 + [touching] * 70
    assert images.estimate_image_statistics(pixel_rows(mixed), None).background is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB"])
def test_photographs_have_one_background(tmp_path, mode):
    """Their borders have no flat colour, opaque or not."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
              for _ in range(200)]
    table = file_table(tmp_path, [photo.convert(mode) for photo in photos])
    assert images.estimate_image_statistics(table, None).background in (0, 255)


def test_deep_images_of_both_backgrounds_are_told_apart(tmp_path):
    deep = [4095 - levels_of(4095, np.uint16)] * 10 + [levels_of(4095, np.uint16)] * 30 + [drawing()] * 10
    table = file_table(tmp_path, deep)
    assert images.estimate_image_statistics(table, None) == ImageStatistics(None, 32, 4095)
    assert errors_of_ink([table], tmp_path)[0].max() <= 1


def test_a_test_table_alone_of_both_backgrounds_is_read_by_its_own_borders(tmp_path, capsys):
    train, test = pixel_rows([drawing()] * 20), pixel_rows(backgrounds(40, 10), "test.csv")
    assert [error.max() for error in errors_of_ink([train, test], tmp_path)] == [0, 0]
    shown = capsys.readouterr()
    assert shown.err == "" and "test.csv: 10 of 40 images are white on black" in shown.out


def test_a_sample_that_looks_mixed_does_not_decide_for_a_table_that_is_not(tmp_path, capsys):
    """The share is just below the limit, and above it among the images of the sample."""
    order, rows = np.random.default_rng(0).permutation(1000), [drawing()] * 1000
    for place in order[:10]:
        rows[place] = 255 - drawing()
    table = pixel_rows(rows)
    assert images.survey_sample(table).background(255) is None
    assert images.estimate_image_statistics(table, None) == ImageStatistics(255, 32)
    assert np.count_nonzero(errors_of_ink([table], tmp_path)[0]) == 10 and capsys.readouterr().out == ""


def test_a_run_says_which_backgrounds_its_images_have():
    split = Split(np.arange(3), np.arange(3, 5))
    for background, words in ((255, "black on white"), (0, "white on black"), (None, "both backgrounds")):
        line = describe_rows(split, 5, 2, np.array([], dtype=int), ImageStatistics(background, 32, 4095))
        assert line.endswith(f"\nimages: {words}, grey levels 0 to 4095, stored at 32 pixels")


def test_a_network_of_both_backgrounds_reads_tables_of_one(tmp_path, capsys):
    train = pixel_rows(backgrounds(40, 10))
    for dark in (0, 30):
        assert errors_of_ink([train, pixel_rows(backgrounds(30, dark), "test.csv")], tmp_path)[1].max() == 0
    assert capsys.readouterr().err == ""


def test_unreadable_images_have_usual_statistics(tmp_path, recwarn):
    """They are reported when all are decoded."""
    (tmp_path / "a.png").write_bytes(b"")
    assert estimate(tmp_path, ["a.png"]) == ImageStatistics(255, 48) and not recwarn.list


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (28, 28)])
def test_pixels_are_fitted_as_files_are(tmp_path, shape):
    arrays = list(np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8))
    for background in (0, 255, None):
        statistics, settings = ImageStatistics(background, 28), LoadSettings(str(tmp_path / "cache"))
        files, pixels = images.load_images([file_table(tmp_path, arrays), pixel_rows(arrays)], statistics, settings)
        assert np.array_equal(files, pixels) and pixels.shape == (3, 1, 28, 28)


def test_damaged_contents_are_listed_by_row(tmp_path):
    table = encoded_rows(tmp_path, [drawing()] * 4)
    table.encoded[2] = table.encoded[2][:60]
    settings = LoadSettings(on_bad_image="skip")
    with pytest.raises(DataError, match=r"1 image cannot be used; .*\n  train\.csv, row 4: (?!')"):
        images.load_images([table], BLACK_ON_WHITE, LoadSettings())
    loaded, = images.load_images([table], BLACK_ON_WHITE, settings)
    assert not loaded[2].any() and np.array_equal(loaded[1, 0], 255 - drawing()) and table.bad_rows.tolist() == [2]


# ---- Paths: the advice follows the fault, and helps ------------------------------------------------------------------

def rewrite(data, change, rows: slice = slice(None), column: str = "image_path") -> None:
    """Change image paths, or other cells, in train.csv."""
    table = pd.read_csv(data / "train.csv", dtype=str)
    table.loc[table.index[rows], column] = table[column][rows].map(change)
    table.to_csv(data / "train.csv", index=False)


def run_command(error: str, program: str) -> None:
    """Run the command that a message holds in parentheses."""
    subprocess.run(re.search(rf"\(({program} .*?)\)[,;:]", error)[1], shell=True, check=True)


def link(data, rows: int) -> None:
    """Move the first images out of the folder, and link them."""
    (data.parent / "moved").mkdir()
    for path in read_train(data).images_named({""})[:rows]:
        shutil.move(path, data.parent / "moved" / path.name)
        path.symlink_to(data.parent / "moved" / path.name)


def move(data, to: str) -> None:
    """Move all images to another folder."""
    shutil.move(data / "Dataset_Image" / "data", data / to / "data")


def first_image(data):
    """Return the path of the first row's image."""
    return data / "Dataset_Image" / pd.read_csv(data / "train.csv").image_path[0]


PATH_FAULTS = {
    "all links": (lambda data: link(data, 100), r"lead to \(cp -rL .*--root-dir Dataset_Image-copy:",
                  lambda data, error: run_command(error, "cp"), {"image_folder": "Dataset_Image-copy"}),
    "some links": (lambda data: link(data, 3), r"^3 images .* lead to \(cp -rL .*--root-dir Dataset_Image-copy, or",
                   lambda data, error: run_command(error, "cp"), {"image_folder": "Dataset_Image-copy"}),
    "absolute": (lambda data: rewrite(data, "/kaggle/input/x/Dataset_Image/".__add__),
                 "remove /kaggle/input/x/Dataset_Image/ from the start of its paths",
                 lambda data, _: rewrite(data, lambda path: path.removeprefix("/kaggle/input/x/Dataset_Image/")), {}),
    "of Windows": (lambda data: rewrite(data, "C:\\x\\".__add__, slice(7)), r"remove C:\\x\\ from the start",
                   lambda data, _: rewrite(data, lambda path: path.removeprefix("C:\\x\\")), {}),
    "absolute, of files": (lambda data: [shutil.move(data / "Dataset_Image", data.parent / "all"),
                                         (data / "Dataset_Image").mkdir(),
                                         rewrite(data, f"{data.parent}/all/".__add__)],
                           r"name the folder of its images with --root-dir .*/all/data:", lambda *_: None,
                           {"image_folder": "{data}/../all/data"}),
    "..": (lambda data: [(data.parent / "all").mkdir(), move(data, "../all"), rewrite(data, "../../all/".__add__)],
           r"give --data-dir .*/all_of_it, and name .* from there: part/train.csv, --root-dir part/Dataset_Image",
           lambda *_: None, {"name": "part/train.csv", "folder": "{data}/..", "image_folder": "part/Dataset_Image"}),
    ".. to nothing": (lambda data: rewrite(data, "../../all/".__add__), "move its images into .* without ..:",
                      lambda data, _: rewrite(data, lambda path: path.removeprefix("../../all/")), {}),
    "backslashes": (lambda data: [rewrite(data, lambda path: path.replace("/", "\\")),
                                  rewrite(data, "\\beta".__add__, column="label")],
                    r"write / for \\ in its paths \(sed", lambda _, error: run_command(error, "sed"), {}),
    "from the data folder": (lambda data: rewrite(data, "Dataset_Image/".__add__), r"are in \.: give --root-dir \. ",
                             lambda *_: None, {"image_folder": "."}),
    "in another folder": (lambda data: [(data / "images").mkdir(), move(data, "images")],
                          "images are in images: give --root-dir images ", lambda *_: None, {"image_folder": "images"}),
    "one in another folder": (lambda data: [(data / "old" / "data").mkdir(parents=True), shutil.move(
        first_image(data), data / "old" / "data")], r"copy them from .*old into .*Dataset_Image, or leave",
        lambda data, _: shutil.copytree(data / "old", data / "Dataset_Image", dirs_exist_ok=True), {}),
    "two of nearly its name": (lambda data: [shutil.copy(first_image(data), first_image(data).with_suffix(".bmp")),
                                             first_image(data).rename(first_image(data).with_suffix(".gif"))],
                               "write the name of the right file into each path, with its extension, or leave",
                               lambda data, _: rewrite(data, lambda path: path.replace("png", "gif"), slice(1)), {}),
    "no files": (lambda data: [move(data, "..")], "if its paths do not start from .*, name their folder with --roo",
                 lambda *_: None, {"image_folder": ".."}),
    "one file is gone": (lambda data: first_image(data).unlink(), "replace each file or remove its row, or leave",
                         lambda data, _: Image.fromarray(drawing()).save(first_image(data)), {}),
}


@pytest.mark.parametrize("fault", PATH_FAULTS)
def test_advice_about_paths_follows_the_fault_and_helps(tmp_path, fault):
    spoil, message, mend, flags = PATH_FAULTS[fault]
    data = make_competition(tmp_path / "all_of_it" / "part")
    spoil(data)
    with pytest.raises(DataError, match=message) as error:
        load(data, tmp_path)
    assert ("replace each file" in str(error.value)) == (fault == "one file is gone")
    mend(data, str(error.value))
    source = {"name": "train.csv", "folder": "{data}", **flags}
    table = read_train_table(TableSource(**{name: text.format(data=data) for name, text in source.items()}))
    loaded, = images.load_images([table], BLACK_ON_WHITE, LoadSettings(str(tmp_path / "cache")))
    assert len(loaded) == 100 and loaded.any(axis=(1, 2, 3)).all()
    assert fault != "backslashes" or table.rows.label.str.startswith("\\beta").all()


# ---- Batches of the dataset -----------------------------------------------------------------------------------------

class FullRuntime(Runtime):
    """A runtime whose device has no room for the images."""

    def has_room_for(self, num_bytes: int) -> bool:
        """Return False."""
        return False


def make_dataset(runtime: Runtime, decoded: np.ndarray) -> MathSymbolDataset:
    rows = pd.DataFrame({"label": [str(row) for row in range(len(decoded))]})
    config = Config(image_size=8, augment=False)
    return MathSymbolDataset(Table("train.csv", rows), config, None, ImageStatistics(0, 8), runtime, decoded)


@pytest.mark.parametrize("kind", [Runtime, FullRuntime], ids=["resident", "streamed"])
def test_batches_are_the_rows_in_their_order(kind):
    decoded = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    dataset = make_dataset(kind(), decoded)
    for rows in (np.array([3, 1]), np.array([19]), np.array([0, 7, 7])):
        inputs, classes, weights = dataset.batch(rows)
        assert np.allclose(inputs * 255, decoded[rows], atol=1e-4) and classes.tolist() == rows.tolist()
        assert weights is None and np.array_equal(dataset.ink(rows), decoded[rows][:, 0])
    assert len(dataset) == 20 and dataset[4][1] == 4 and torch.equal(dataset[4][0], dataset.batch(np.array([4]))[0][0])


def test_images_on_a_gpu_are_not_pinned(monkeypatch):
    """Pinning a tensor of a GPU fails."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    for kind, room in ((Runtime, True), (FullRuntime, False)):
        monkeypatch.setattr(Runtime, "has_room_for", lambda *_: True)
        dataset = make_dataset(kind(torch.device("cuda"), "bf16"), np.zeros((4, 1, 8, 8), dtype=np.uint8))
        assert dataset.pinned == (not room)
