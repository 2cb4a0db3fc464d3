"""tools/stress.py: each change does what it says, and the command writes its table and picture."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK, Command, make_competition
from PIL import Image

import script
from tools import stress


def bar() -> torch.Tensor:
    ink = torch.zeros(4, 1, 20, 20)
    ink[..., 8:12] = 1.0
    return ink


def test_strokes_get_thicker_and_thinner_by_so_many_pixels():
    widths = [stress.thicken(bar(), pixels)[0, 0, 10].sum().item() for pixels in (-2, -1, -0.5, 0, 0.5, 1, 1.5, 2)]
    assert widths == pytest.approx([0, 2, 3, 4, 5, 6, 7, 8])


def test_images_are_moved_to_four_sides_and_rotated():
    ink = torch.zeros(4, 1, 21, 21)
    ink[..., 10, 10] = 1.0
    places = [tuple(np.argwhere(image[0].numpy() > 0.9)[0] - 10) for image in stress.move(ink, pixels=3)]
    assert set(places) == {(0, 3), (0, -3), (3, 0), (-3, 0)}
    rotated = stress.move(bar(), degrees=90)
    assert torch.allclose(rotated, bar().transpose(2, 3), atol=1e-4)


def test_erasing_and_noise_change_their_share():
    ones = torch.ones(200, 1, 20, 20)
    assert 1 - stress.erase(ones, 0.25).mean().item() == pytest.approx(0.25, abs=0.03)
    assert 1 - stress.add_noise(ones, 0.1).mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(stress.add_noise(ones, 0.1), stress.add_noise(ones, 0.1))


@pytest.mark.slow
def test_the_whole_tool(tmp_path, capsys):
    command = Command(make_competition(tmp_path / "competition", 200), tmp_path / "out", tmp_path / "cache")
    assert script.main(command.arguments(*QUICK, "--model", "cnn", "--num-epochs", "6", "--train-val-split", "0.6",
                                         "--knn-neighbors", "0")) == 0
    capsys.readouterr()
    assert stress.main([str(command.output / "best_model.pth"), "--data-dir", str(command.data), "--cache-dir",
                        str(command.cache), "--output-dir", str(tmp_path / "s"), "--rows", "60"]) == 0
    table, out = pd.read_csv(tmp_path / "s" / "stress.csv", keep_default_na=False), capsys.readouterr().out
    assert out.count("\n| ") == len(table) + 1 and "60 validation rows, 1 network" in out
    accuracy = table.set_index(["change", "strength"]).accuracy
    assert accuracy["none", 0.0] > 0.8 and accuracy["FGSM", 0.2] < accuracy["none", 0.0] - 0.2
    assert accuracy["rotated", 5.0] >= accuracy["rotated", 30.0] - 0.05
    assert set(table.change) == {"none", "FGSM", *stress.CHANGES}
    small = Command(command.data, tmp_path / "small", command.cache)
    assert script.main(small.arguments(*QUICK, "--image-size", "24", "--train-val-split", "0.6")) == 0
    assert stress.main([*(str(run.output / "best_model.pth") for run in (command, small)), "--data-dir",
                        str(command.data), "--cache-dir", str(command.cache), "--output-dir", str(tmp_path / "two"),
                        "--rows", "20"]) == 0  # networks of other image sizes
    assert len(pd.read_csv(tmp_path / "two" / "stress.csv")) == len(table)
    with Image.open(tmp_path / "s" / "stress.png") as picture:
        assert picture.width > 1200
