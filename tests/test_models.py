"""Room 5: the networks as the README describes them."""

import pytest
import torch

import script
from script import MODELS, Config, MathSymbolCNN, ResNetMathSymbol


def parameters(model) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_sizes_at_369_classes():
    resnet, cnn = ResNetMathSymbol(369), MathSymbolCNN(369)
    assert parameters(resnet) == 21_466_161
    assert parameters(cnn) == 2_844_929
    assert [len(getattr(resnet, f"layer{number}")) for number in (1, 2, 3, 4)] == [3, 4, 6, 3]
    convolutions = [layer for layer in cnn.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [32, 64, 128, 128, 256]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [8, 28, 33, 48])
def test_any_input_size_and_number_of_classes(name, size):
    model = MODELS[name](7).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_weight(name):
    model = MODELS[name](5)
    model(torch.rand(4, 1, 16, 16)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_weights_come_from_the_seed_alone():
    config = Config(model="cnn", dropout=0.1)
    first = script.build_model(config, 5).state_dict()
    state = torch.get_rng_state()
    again = script.build_model(config, 5).state_dict()
    other = script.build_model(Config(model="cnn", dropout=0.1, seed=1), 5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.1.weight"], other["head.1.weight"])


def test_the_summary_names_layers_shapes_and_parameters():
    text = script.summarize_model(MathSymbolCNN(369), 32)
    assert "2.84 million parameters" in text and "256 x 4 x 4" in text and "2,098,688" in text
    lines = text.splitlines()[2:]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == 2_844_929
