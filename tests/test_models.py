"""Networks: sizes, inputs of any size, torchvision's networks for grey images, initial weights."""

import dataclasses

import pytest
import torch

import script
from pipeline import models
from pipeline.errors import DataError, UsageError
from pipeline.images import ImageStatistics
from script import MODELS, Config, MathSymbolCNN, ResNetMathSymbol


def parameters(model) -> int:
    return sum(weight.numel() for weight in model.parameters())


def load_weights(model, config: Config, classes: list[str]) -> None:
    models.load_initial_weights(model, config.weights, config.model, classes, config.image_size, config.split)


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
    model = script.build_model(Config(model=name, image_size=size, dropout=0.1), 7).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_weight(name):
    model = script.build_model(Config(model=name, image_size=16, dropout=0.1), 5)
    model(torch.rand(4, 1, 16, 16)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize("side", [3, 4, 5, 6])
def test_average_pooling_is_torchs(side):
    x = torch.rand(2, 3, side, side)
    assert torch.equal(models.AveragePool(4)(x), torch.nn.functional.adaptive_avg_pool2d(x, 4))
    assert (models.AveragePool(4)(x) is x) == (side == 4)


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
    text = models.summarize(MathSymbolCNN(369), "cnn", 32)
    assert "2.84 million parameters" in text and "256 x 4 x 4" in text and "2,098,688" in text
    lines = text.splitlines()[2:]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == 2_844_929


def test_the_tiny_network_is_below_8_000_parameters():
    assert parameters(models.TinyCNN(10)) <= 8_000


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16",
                                  "densenet121", "googlenet", "swin_t", "shufflenet_v2_x0_5"])
def test_torchvisions_networks_are_adapted(name):
    model = script.build_model(Config(model=f"torchvision:{name}", image_size=64, dropout=0.1), 7).eval()
    with torch.inference_mode():
        assert model(torch.rand(2, 1, 64, 64)).shape == (2, 7)
    assert [child for child, _ in model.named_children()] == ["body", "head"]


def test_torchvisions_weights_give_the_features_of_a_grey_picture(tmp_path):
    """Equal colours through the pretrained network and the ink through the adapted one give the same features."""
    import torchvision

    network = torchvision.models.resnet18(num_classes=1000).eval()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    config = Config(model="torchvision:resnet18", image_size=32, dropout=0.0, weights=str(tmp_path / "resnet18.pth"))
    model = script.build_model(config, 7)
    load_weights(model, config, list("abcdefg"))
    ink = torch.rand(2, 1, 32, 32)
    network.fc = torch.nn.Identity()
    with torch.inference_mode():
        assert torch.allclose(model.body.eval()(ink), network(ink.expand(2, 3, 32, 32)), atol=1e-4)


def test_pretrained_weights_that_cannot_be_downloaded_name_both_remedies(monkeypatch):
    import torchvision

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", refuse)
    config = Config(model="torchvision:resnet50", weights="torchvision", dropout=0.0, image_size=32)
    with pytest.raises(DataError, match=r"no route to host.*--weights FILE .*or let --weights torchvision"):
        load_weights(script.build_model(config, 5), config, list("abcde"))


def test_an_image_too_small_for_a_network_is_one_line():
    config = Config(model="torchvision:alexnet", image_size=28, dropout=0.0)
    with pytest.raises(UsageError, match=r"torchvision:alexnet cannot take images of 28 pixels .*--image-size"):
        models.summarize(script.build_model(config, 5), config.model, config.image_size)


def test_a_size_that_is_not_a_multiple_of_a_transformers_patch_is_one_line():
    with pytest.raises(UsageError, match=r"torchvision:vit_b_16 cannot take images of 28 pixels .*--image-size"):
        script.build_model(Config(model="torchvision:vit_b_16", image_size=28, dropout=0.0), 5)


def test_weights_with_auxiliary_branches_are_loaded(tmp_path):
    import torchvision

    network = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "googlenet.pth")
    config = Config(model="torchvision:googlenet", image_size=64, dropout=0.0, weights=str(tmp_path / "googlenet.pth"))
    model = script.build_model(config, 5)
    load_weights(model, config, list("abcde"))
    assert torch.equal(model.body.inception5b.branch1.conv.weight, network.inception5b.branch1.conv.weight)


def test_weights_of_another_kind_say_what_does_not_fit(tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "a.pth")
    own, other = (Config(model=name, image_size=32, dropout=0.0, weights=str(tmp_path / "a.pth"))
                  for name in ("cnn", "torchvision:resnet18"))
    for config, message in ((own, "it is not a checkpoint of script.py"), (other, "Missing key")):
        with pytest.raises(DataError, match=message):
            load_weights(script.build_model(config, 5), config, list("abcde"))


def test_a_network_without_a_last_linear_layer_is_refused():
    with pytest.raises(UsageError, match="squeezenet1_0 has no last linear layer"):
        script.build_model(Config(model="torchvision:squeezenet1_0", image_size=64, dropout=0.0), 5)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_standard_normalisation_has_mean_0_and_deviation_1(name):
    config = Config(model=name, image_size=12, dropout=0.0, normalize="standard")
    model, images = script.build_model(config, 5), torch.rand(40, 1, 12, 12) ** 2
    assert next(model.named_children())[0] == "normalize"
    model.normalize.measure(images.split(7), "standard")
    normal = model.normalize(images)
    assert normal.mean().abs() < 1e-5 and (normal.std(correction=0) - 1).abs() < 1e-5


def test_min_max_normalisation_brings_every_pixel_to_0_to_1():
    layer, images = models.Normalize(1, 1, 6, 6), 0.2 + 0.5 * torch.rand(40, 1, 6, 6)
    images[:, :, 0, 0] = 0.25  # a pixel that never changes keeps its scale
    layer.measure(images.split(9), "min-max")
    normal = layer(images)
    varying = torch.ones(6, 6, dtype=torch.bool)
    varying[0, 0] = False
    assert torch.equal(normal.amin(dim=0)[0], torch.zeros(6, 6)) and (normal[:, 0, 0, 0] == 0).all()
    assert torch.allclose(normal.amax(dim=0)[0][varying], torch.ones(35))


def test_a_checkpoint_is_the_start_and_its_head_only_for_the_same_classes(tmp_path, capsys):
    config = Config(model="tiny", image_size=12, dropout=0.0, seed=5, weights=str(tmp_path / "a.pth"))
    trained = script.TrainedModel(script.build_model(config, 3), config, list("abc"), ImageStatistics(255, 12),
                                  {}, "")
    script.save_checkpoint(tmp_path / "a.pth", trained)
    for classes, same in ((list("abc"), True), (list("abd"), False)):
        model = script.build_model(dataclasses.replace(config, seed=6), 3)
        load_weights(model, config, classes)
        assert torch.equal(model.conv3[0][0].weight, trained.model.conv3[0][0].weight)
        assert torch.equal(model.head[1].weight, trained.model.head[1].weight) == same
    assert capsys.readouterr().err == ""
    load_weights(model, Config(model="tiny", image_size=12, weights=config.weights, split_seed=7), list("abc"))
    assert "it has seen rows that validate now" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"--weights .*a.pth: cannot be used .* of another network.* --weights FILE"):
        wrong = Config(model="cnn", image_size=12, dropout=0.0, weights=config.weights)
        load_weights(script.build_model(wrong, 3), wrong, list("abc"))


@pytest.mark.parametrize(("name", "near"), [("resnet18", "torchvision:resnet18"),
                                            ("torchvision:resnet81", "torchvision:resnet18")])
def test_an_unknown_model_is_named_with_near_ones(name, near):
    with pytest.raises(ValueError, match=f"model must be one of .* not '{name}'; near it are .*{near}"):
        models.check_model_name(name, ["cnn"])
    models.check_model_name("torchvision:resnet18", ["cnn"])
    models.check_model_name("cnn", ["cnn"])
