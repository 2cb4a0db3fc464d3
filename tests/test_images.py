"""Decoding: modes, background, sizes, the cache, bad images."""

import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps

from pipeline import images
from pipeline.device import Runtime
from pipeline.errors import DataError
from pipeline.images import ImageStatistics, LoadSettings, background_of, fit_to_square, read_grey, to_ink
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
    grey, alpha = read_grey(str(path))
    assert background_of(grey, alpha) == 255
    ink = to_ink(grey, alpha, 255).astype(int)
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
    """Each drawing in four sizes, the smallest white on black, in a table of four times the images that are sampled."""
    for side in (16, 20, 24, 32):
        grey = np.asarray(Image.fromarray(drawing()).resize((side, side)))
        Image.fromarray(255 - grey if side == 16 else grey).save(tmp_path / f"{side}.png")
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
    monkeypatch.setattr(images, "DECODE_CHUNK", 30)
    alone = np.array(load(competition, tmp_path / "a", num_workers=0))
    assert np.array_equal(load(competition, tmp_path / "b", num_workers=2), alone)


def kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_decoding_process_that_is_killed_is_one_line(competition, tmp_path, monkeypatch):
    """As the system does where memory is short."""
    monkeypatch.setattr(images, "DECODE_CHUNK", 30)
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
    assert "decoded 14 images of " in capsys.readouterr().out  # the good ones are in the cache


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
    moved = Table(table.path, table.rows.assign(image_path="Dataset_Image/" + table.rows.image_path), table.image_root)
    with pytest.raises(DataError, match=r"none of its images can be used; .* give --root-dir \. "):
        images.load_images([moved], BLACK_ON_WHITE, LoadSettings(str(tmp_path / "cache")))
    right = Table(table.path, moved.rows, competition)
    assert len(images.load_images([right], BLACK_ON_WHITE, LoadSettings(str(tmp_path / "cache")))[0]) == 100
    bare = Table(table.path, table.rows.assign(image_path=table.rows.image_path.str.removesuffix(".png")),
                 table.image_root)
    with pytest.raises(DataError, match=r"write the extension into its paths, as in v2-\d+\.png"):
        images.load_images([bare], BLACK_ON_WHITE, LoadSettings(str(tmp_path / "cache")))


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
