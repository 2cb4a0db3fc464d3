"""Room 4, first half: decoding, polarity, mixed sizes, the cache, resident and streamed batches."""

import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps

import script
from script import Config, DataError, ImageStatistics, MathSymbolDataset

WHITE_PAPER = ImageStatistics(paper=255, size=32)


def drawing() -> np.ndarray:
    """Black on white, 32x32, with a grey: an L that no rotation or mirror keeps."""
    grey = np.full((32, 32), 255, dtype=np.uint8)
    grey[6:26, 8:11] = 0
    grey[23:26, 8:24] = 90
    return grey


def overshooting(values: np.ndarray) -> np.ndarray:
    """As resampling leaves them: float32, a little beyond white at one place."""
    values = values.astype(np.float32)
    values[0, 0] *= 1.1
    return values


def forms() -> dict[str, Image.Image]:
    """The same drawing in Pillow's modes."""
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
    grey, alpha = script.read_grey(str(path))
    assert script.paper_of(grey, alpha) == 255
    ink = script.to_ink(grey, alpha, WHITE_PAPER).astype(int)
    expected = 255 - drawing().astype(int)
    if form == "1":
        expected = np.where(expected > 127, 255, 0)
    assert np.abs(ink - expected).max() <= 2


def test_a_few_transparent_pixels_do_not_turn_the_page():
    """Rounded corners, a hole: the paper is what is opaque at the border."""
    for paper in (0, 255):
        grey, alpha = np.full((32, 32), paper, dtype=np.uint8), np.full((32, 32), 255, dtype=np.uint8)
        grey[6:26, 8:11] = 255 - paper
        alpha[0, 0] = alpha[31, 31] = alpha[16, 20] = 0
        grey[alpha == 0] = 255 - paper  # nobody sees it
        assert script.paper_of(grey, alpha) == paper
        assert script.paper_of(grey, np.zeros_like(alpha)) == paper


@pytest.mark.parametrize("opacity", [60, 127, 128])
def test_faint_strokes_on_a_transparent_page_are_ink(opacity):
    alpha = np.where(drawing() < 255, opacity, 0).astype(np.uint8)
    black = np.zeros_like(alpha)
    assert script.paper_of(black, alpha) == 255
    assert script.bare_ink(black, alpha, 255).max() == opacity


def test_jpeg_gif_and_exif_are_read_upright(tmp_path):
    grey = Image.fromarray(drawing())
    grey.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (32, 32), 255)])
    assert np.array_equal(script.read_grey(str(tmp_path / "a.gif"))[0], drawing())
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned.convert("RGB").save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert np.abs(script.read_grey(str(tmp_path / "a.jpg"))[0].astype(int) - drawing()).mean() < 5


def test_what_is_no_exif_turns_nothing(tmp_path):
    Image.fromarray(drawing()).save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert np.array_equal(script.read_grey(str(tmp_path / "a.png"))[0], drawing())


def look_at(folder, names):
    table = script.Table("train.csv", pd.DataFrame({"image_path": names}))
    return script.look_at_images(table, Config(root_dir=str(folder), image_size=48))


@pytest.mark.parametrize("paper", [255, 0])
def test_polarity_is_found_from_the_images(tmp_path, paper):
    for number in range(5):
        grey = drawing() if paper == 255 else 255 - drawing()
        Image.fromarray(grey).save(tmp_path / f"{number}.png")
    statistics = look_at(tmp_path, [f"{number}.png" for number in range(5)])
    assert statistics == ImageStatistics(paper, 32)
    ink = script.to_ink(*script.read_grey(str(tmp_path / "0.png")), statistics)
    assert np.array_equal(ink, 255 - drawing())


def test_every_so_manyth_image_may_be_of_another_kind(tmp_path):
    """Each drawing in four sizes, the smallest white on black, in a table of four times the images looked at."""
    for side in (16, 20, 24, 32):
        grey = np.asarray(Image.fromarray(drawing()).resize((side, side)))
        Image.fromarray(255 - grey if side == 16 else grey).save(tmp_path / f"{side}.png")
    assert look_at(tmp_path, ["16.png", "20.png", "24.png", "32.png"] * 256) == ImageStatistics(255, 32)


@pytest.mark.parametrize("shape", [(64, 64), (20, 60), (60, 20), (5, 5), (1, 1), (1, 900), (900, 1)])
def test_other_sizes_are_fitted_on_paper_without_distortion(shape):
    height, width = shape
    ink = script.to_ink(np.zeros(shape, dtype=np.uint8), None, WHITE_PAPER)  # all ink
    rows, columns = (ink > 127).any(axis=1).sum(), (ink > 127).any(axis=0).sum()
    assert ink.shape == (32, 32) and max(rows, columns) == 32
    assert rows == max(1, round(32 * height / max(shape))) and columns == max(1, round(32 * width / max(shape)))
    assert ink[0, 0] == (255 if height == width else 0) or min(rows, columns) > 30


def test_large_images_are_stored_at_the_networks_size(tmp_path):
    Image.fromarray(drawing()).resize((200, 150)).save(tmp_path / "a.png")
    assert look_at(tmp_path, ["a.png"]) == ImageStatistics(255, 48)


def load(competition, tmp_path, **settings):
    config = Config(data_dir=str(competition), cache_dir=str(tmp_path / "cache"), **settings)
    return script.load_all_images([script.read_train_table(config)], config, WHITE_PAPER)[0]


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(script, "decode_images", lambda *_: pytest.fail("decoded again"))


def test_a_second_run_does_not_decode(competition, tmp_path, monkeypatch):
    first = load(competition, tmp_path)
    assert first.shape == (100, 1, 32, 32) and first.dtype == np.uint8 and isinstance(first, np.memmap)
    forbid_decoding(monkeypatch)
    assert np.array_equal(load(competition, tmp_path), first)


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_noticed_and_only_that_one_decoded(competition, tmp_path, monkeypatch, keep_times):
    first = np.array(load(competition, tmp_path))
    names = script.read_train_table(Config(data_dir=str(competition))).rows.image_path
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
    decoded, real = [], script.decode_images
    monkeypatch.setattr(script, "decode_images", lambda paths, *rest: decoded.extend(paths) or real(paths, *rest))
    second = load(competition, tmp_path)
    assert decoded == [str(path)]
    assert np.array_equal(second[7, 0], 255 - image) and np.array_equal(np.delete(second, 7, 0), np.delete(first, 7, 0))


def test_an_added_row_and_a_removed_file_are_noticed(competition, tmp_path):
    load(competition, tmp_path)
    Image.fromarray(drawing()).save(competition / "Dataset_Image" / "new.png")
    with open(competition / "train.csv", "a") as file:
        file.write("new.png,3\n")
    images = load(competition, tmp_path)
    assert len(images) == 101 and np.array_equal(images[100, 0], 255 - drawing())
    (competition / "Dataset_Image" / "new.png").unlink()
    with pytest.raises(DataError, match=r"row 102: 'new.png': no such file"):
        load(competition, tmp_path)


def test_a_damaged_cache_is_decoded_anew(competition, tmp_path):
    first = np.array(load(competition, tmp_path))
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:-100])
    assert np.array_equal(load(competition, tmp_path), first)


def test_a_cache_that_cannot_be_written_is_done_without(competition, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load(competition, tmp_path).shape == (100, 1, 32, 32)
    assert "cannot be kept" in capsys.readouterr().err


def test_processes_decode_the_same_as_this_one(competition, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DECODE_CHUNK", 30)
    alone = np.array(load(competition, tmp_path / "a", num_workers=0))
    assert np.array_equal(load(competition, tmp_path / "b", num_workers=2), alone)


def kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_decoding_process_that_is_killed_is_one_line(competition, tmp_path, monkeypatch):
    """As the system does where memory is short."""
    monkeypatch.setattr(script, "DECODE_CHUNK", 30)
    monkeypatch.setattr(script, "decode_image", kill_itself)
    with pytest.raises(DataError, match=r"a process that decodes images was killed, .* try --num-workers 0$"):
        load(competition, tmp_path, num_workers=2)


def test_the_first_ten_bad_images_are_listed_by_row(competition, tmp_path, monkeypatch):
    table = script.read_train_table(Config(data_dir=str(competition))).rows
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
    decoded, real = [], script.decode_images
    monkeypatch.setattr(script, "decode_images", lambda paths, *rest: decoded.extend(paths) or real(paths, *rest))
    with pytest.raises(DataError, match="14 images"):
        load(competition, tmp_path)
    assert len(decoded) == 14  # the good ones are kept


def test_batches_are_the_rows_asked_for_resident_or_streamed(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    runtime = script.start_runtime(Config(device="cpu"))
    dataset = MathSymbolDataset(images, np.arange(20), runtime)
    steps = [np.array([3, 1]), np.array([19]), np.array([0, 7, 7])]
    assert len(dataset) == 20 and dataset[4][1] == 4 and dataset[4][0].max() <= 1
    monkeypatch.setattr(script.Runtime, "has_room_for", lambda *_: False)  # as if too large for the device
    streamed = MathSymbolDataset(images, np.arange(20), runtime)
    for source in (dataset, streamed):
        for rows, (batch, targets) in zip(steps, map(source.batch, steps), strict=True):
            assert np.array_equal(batch.numpy(), images[rows]) and targets.tolist() == rows.tolist()


def test_images_on_a_gpu_stay_there(monkeypatch):
    """What is resident is not pinned: a tensor on cuda:0 is not said to be on cuda, and pinning it fails."""
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pytest.fail("pinned"))
    runtime, rows = script.Runtime(torch.device("cuda"), "bf16", 1), np.array([2, 0])
    monkeypatch.setattr(script.Runtime, "has_room_for", lambda *_: True)
    resident = MathSymbolDataset(np.zeros((4, 1, 8, 8), dtype=np.uint8), np.arange(4), runtime)
    assert resident.batch(rows)[1].tolist() == [2, 0]
    monkeypatch.setattr(script.Runtime, "has_room_for", lambda *_: False)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    MathSymbolDataset(np.zeros((4, 1, 8, 8), dtype=np.uint8), np.arange(4), runtime).batch(rows)
    assert len(pinned) == 2


def test_symbols_come_from_classes_csv(competition):
    assert script.read_symbols(Config(data_dir=str(competition))) == {}
    pd.DataFrame({"label": ["3", "017"], "latex": ["+", "\\pi"]}).to_csv(competition / "classes.csv", index=False)
    assert script.read_symbols(Config(data_dir=str(competition))) == {"3": "+", "017": "\\pi"}
