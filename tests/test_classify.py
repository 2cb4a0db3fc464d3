"""tools/classify.py: pictures of any size and background, and those that cannot be read."""

import re
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, Command, draw_shape, make_competition
from PIL import Image, ImageOps

import script
from pipeline.images import ImageStatistics
from tools import classify
from tools.common import read_picture


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    data = make_competition(folder / "competition", 200)
    pd.DataFrame({"label": CLASSES, "latex": ["|", "-", "+", "\\circ", "/"]}).to_csv(data / "classes.csv", index=False)
    command = Command(data, folder / "out", folder / "cache")
    assert script.main(command.arguments("--num-epochs", "4", "--batch-size", "16", "--image-size", "24",
                                         "--no-pictures")) == 0
    return command


def run_classify(trained, capsys, *words):
    capsys.readouterr()
    status = classify.main([*map(str, words), "--checkpoint", str(trained.output / "best_model.pth")])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("change", [
    lambda image: image, lambda image: ImageOps.invert(image), lambda image: image.resize((200, 200)),
    lambda image: image.convert("RGBA"), lambda image: ImageOps.expand(image, (3, 0), 255)])
def test_any_size_and_background_is_classified(trained, tmp_path, capsys, change):
    rng, correct = np.random.default_rng(9), 0
    paths = [tmp_path / f"{kind}-{copy}.png" for kind in range(5) for copy in range(4)]
    for path in paths:
        change(draw_shape(int(path.name[0]), rng)).save(path)
    status, out, error = run_classify(trained, capsys, *paths, "--top", "2")
    assert status == 0 and error == "", error
    answers = re.findall(r"^(\S+\.png)\n +([0-9.]+)%  (\d+)  (\S+)\n +[0-9.]+%  \d+  \S+$", out, re.MULTILINE)
    assert [answer[0] for answer in answers] == list(map(str, paths))
    for path, (_, share, label, latex) in zip(paths, answers):
        correct += label == CLASSES[int(path.name[0])]
        assert 0 < float(share) <= 100 and latex == dict(zip(CLASSES, "|-+")).get(label, latex)
    assert correct >= 16


def test_a_drawing_with_wide_margins_is_cut_out(tmp_path):
    page = Image.new("L", (400, 300), 255)
    page.paste(0, (100, 50, 140, 90))
    page.save(tmp_path / "a.png")
    cut = read_picture(tmp_path / "a.png", ImageStatistics(255, 20), crop=True)
    assert cut.min() == 255  # the square fills the picture
    assert 0 < (read_picture(tmp_path / "a.png", ImageStatistics(255, 20), crop=False) > 127).sum() < 20
    Image.new("L", (40, 40), 255).save(tmp_path / "blank.png")
    assert read_picture(tmp_path / "blank.png", ImageStatistics(255, 20), crop=True).max() == 0


def test_unreadable_pictures_are_reported_and_the_others_classified(trained, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("<html>")
    draw_shape(1, np.random.default_rng(0)).save(tmp_path / "good.png")
    paths = [tmp_path / name for name in ("bad.png", "good.png", "none.png")]
    status, out, error = run_classify(trained, capsys, *paths)
    assert status == 1 and "good.png" in out
    assert error.splitlines() == [f"error: {tmp_path}/bad.png: not an image that Pillow can read",
                                  f"error: {tmp_path}/none.png: no such file or directory"]
    assert classify.main([str(tmp_path / "good.png"), "--checkpoint", str(tmp_path / "no.pth")]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


def test_a_drawing_on_a_long_strip_is_cut_out_without_a_square_of_its_length(tmp_path):
    grey = np.full((40, 60_000), 255, dtype=np.uint8)
    grey[10:30, 30_000:30_020] = 0
    Image.fromarray(grey).save(tmp_path / "strip.png")
    tracemalloc.start()
    ink = read_picture(tmp_path / "strip.png", ImageStatistics(255, 16), crop=True)
    assert tracemalloc.get_traced_memory()[1] < 100e6 and (ink == 255).all()
    tracemalloc.stop()
