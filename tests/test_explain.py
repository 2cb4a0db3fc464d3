"""tools/explain.py: the heat map is where the class is drawn."""

import os

import numpy as np
import pytest
import torch
from conftest import draw_shape
from PIL import Image
from torch import nn

import script
from pipeline.images import ImageStatistics
from script import Config
from tools import explain


class TwoCorners(nn.Module):
    """A network whose output 0 is the ink of the upper left quarter, and output 1 that of the lower right."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.conv.weight.data.fill_(1.0)
        mask = torch.zeros(2, 16, 16)
        mask[0, :8, :8] = mask[1, 8:, 8:] = 1.0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return (self.conv(x) * self.mask).sum(dim=(2, 3))


def test_the_map_is_brightest_where_the_ink_is():
    inputs = torch.zeros(1, 1, 16, 16)
    inputs[0, 0, 2:5, 2:5] = inputs[0, 0, 11:14, 11:14] = 1.0
    drawn = explain.grad_cam(TwoCorners(), inputs, torch.tensor([0]))
    assert drawn.shape == (1, 16, 16) and drawn.max() == pytest.approx(1.0)
    assert drawn[0][inputs[0, 0] == 0].max() == 0  # background speaks for nothing


def save_untrained(path, config):
    """Write a checkpoint of initial weights."""
    model, statistics = script.build_model(config, 5), ImageStatistics(255, config.image_size)
    script.save_checkpoint(path, script.TrainedModel(model, config, list("abcde"), statistics, {"epoch": 1}, ""))


@pytest.mark.parametrize("model", ["cnn", "resnet", "tiny", "torchvision:resnet18"])
def test_every_convolutional_network_can_be_explained(tmp_path, model):
    config = Config(model=model, image_size=32, dropout=0.0)
    save_untrained(tmp_path / "model.pth", config)
    paths = [tmp_path / f"{kind}.png" for kind in range(2)]
    for kind, path in enumerate(paths):
        draw_shape(kind, np.random.default_rng(0)).save(path)
    common = ["--checkpoint", str(tmp_path / "model.pth"), "--output-dir", str(tmp_path)]
    assert explain.main([*map(str, paths), *common]) == 0
    with Image.open(tmp_path / "explained.png") as picture:
        assert picture.width > 900 and picture.height > 500
    assert explain.main([str(paths[0]), *common]) == 0


def test_an_error_is_one_line(tmp_path, capsys):
    config = Config(model="mlp", image_size=32, dropout=0.0)
    save_untrained(tmp_path / "model.pth", config)
    draw_shape(0, np.random.default_rng(0)).save(tmp_path / "a.png")
    common = ["--checkpoint", str(tmp_path / "model.pth"), "--output-dir", str(tmp_path)]
    assert explain.main([str(tmp_path / "a.png"), *common]) == 2
    assert explain.main([str(tmp_path / "none.png"), *common]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "no convolution" in errors[0] and "none.png: no such file" in errors[1] and len(errors) == 2


@pytest.mark.parametrize("name", ["a$_$b.png", "x$^2$.png", os.fsdecode(b"caf\xe9.png")])
def test_any_file_name_can_be_a_title(tmp_path, name):
    config = Config(model="tiny", image_size=16, dropout=0.0)
    save_untrained(tmp_path / "model.pth", config)
    with open(tmp_path / name, "wb") as file:
        draw_shape(0, np.random.default_rng(0)).save(file, "png")
    assert explain.main([str(tmp_path / name), "--checkpoint", str(tmp_path / "model.pth"), "--output-dir",
                         str(tmp_path)]) == 0
