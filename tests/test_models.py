"""Networks: sizes, inputs of any size, torchvision's networks for grey images, initial weights."""

import argparse
import dataclasses
import functools
import re

import pandas as pd
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


def test_dropout_rises_over_the_first_epochs():
    model = script.MathSymbolCNN(10, 0.3)
    for epoch in (1, 3, 6, 9, 2):  # a resumed training may begin anywhere
        models.set_dropout(model, epoch)
        assert model.head[0].p == pytest.approx(min(0.05 * epoch, 0.3))
        assert model.conv2[-1].p == pytest.approx(min(0.05 * epoch, 0.3) / 6)


def test_sizes_at_369_classes():
    resnet, cnn = ResNetMathSymbol(369), MathSymbolCNN(369)
    assert parameters(resnet) == 21_466_161
    assert parameters(cnn) == 2_814_769
    assert [len(getattr(resnet, f"layer{number}")) for number in (1, 2, 3, 4)] == [3, 4, 6, 3]
    convolutions = [layer for layer in cnn.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [16, 48, 128, 128, 256]


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
    assert "2.81 million parameters" in text and "256 x 4 x 4" in text and "2,098,688" in text
    lines = text.splitlines()[2:]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == 2_814_769


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
    for config, message in ((own, "0 of 39 tensors fit, conv1.0.0.weight is missing"),
                            (other, "0 of 100 tensors fit, conv1.weight is missing")):
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


@functools.cache
def resnet18(classes: int = 1000) -> dict:
    """Return the state dict of torchvision's ResNet-18 with other weights than a new one's."""
    import torchvision

    torch.manual_seed(classes)
    return torchvision.models.resnet18(num_classes=classes).state_dict()


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def other_training() -> dict:
    """Return what a training script saves beside the weights: numbers, texts and the optimizer's tensors."""
    return {"epoch": 3, "arch": "resnet18", "best_acc1": torch.tensor(71.5), "loops": {"fit_loop": {"state_dict": {}}},
            "optimizer": {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(64, 3, 7, 7)}},
                          "param_groups": [{"lr": 0.1, "params": [0]}]}}


WRAPPED = {
    "bare": lambda state: state,
    "old, without num_batches_tracked": lambda state: {
        name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    "DataParallel": lambda state: {"state_dict": prefixed("module.", state)},
    "DataParallel without a key": lambda state: prefixed("module.", state),
    "PyTorch's ImageNet example": lambda state: {**other_training(), "state_dict": prefixed("module.", state)},
    "Lightning": lambda state: {**other_training(), "state_dict": {
        **prefixed("model.", state), "loss.weight": torch.ones(3), "accuracy.tp": torch.zeros(1)}},
    "Lightning with a backbone": lambda state: {"state_dict": prefixed("net.backbone.", state)},
    "torch.compile and DDP": lambda state: {"model_state_dict": prefixed("module._orig_mod.", state)},
    "DDP and torch.compile": lambda state: {"network": prefixed("_orig_mod.module.", state)},
    "compiled layers": lambda state: {"net": {
        name.replace("layer1.", "layer1._orig_mod."): value for name, value in state.items()}},
    "timm": lambda state: {**other_training(), "args": argparse.Namespace(model="resnet18"), "state_dict": state},
    "detection references": lambda state: {**other_training(), "model": state, "lr_scheduler": {"gamma": 0.1}},
    "swa_utils.AveragedModel": lambda state: {"n_averaged": torch.tensor(4), **prefixed("module.", state)},
    "average beside the weights": lambda state: {
        "state_dict": {name: value + 1 for name, value in state.items()}, "state_dict_ema": state},
    "average before the weights": lambda state: {
        "model_ema": state, "model": {name: value + 1 for name, value in state.items()}},
    "two keys": lambda state: {"checkpoint": {"student": prefixed("module.encoder.", state)}},
    "without a head": lambda state: {name: value for name, value in state.items() if not name.startswith("fc.")},
    "with a head of several layers": lambda state: {
        name.replace("fc.", "fc.1."): value for name, value in state.items()} | {"fc.0.weight": torch.ones(8, 512)},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("classes", [1000, 7])
def test_wrapped_weights_are_loaded(tmp_path, wrap, classes):
    torch.save(wrap(resnet18(classes)), tmp_path / "a.pth")
    config = Config(model="torchvision:resnet18", image_size=32, dropout=0.0, weights=str(tmp_path / "a.pth"))
    model = script.build_model(config, 7)
    own_head = model.head[1].weight.clone()
    load_weights(model, config, list("abcdefg"))
    state = model.body.state_dict()
    for name, value in resnet18(classes).items():
        if not name.startswith("fc.") and "num_batches" not in name:
            expected = value.sum(dim=1, keepdim=True) if name == "conv1.weight" else value
            assert torch.equal(state[name], expected), name
    assert torch.equal(model.head[1].weight, own_head)


def test_a_line_says_which_of_a_files_weights_were_taken(tmp_path, capsys):
    config = Config(model="torchvision:resnet18", image_size=32, dropout=0.0, weights=str(tmp_path / "a.pth"))
    model = script.build_model(config, 7)
    for wrap, said in (("timm", "those below state_dict\n"), ("bare", ""),
                       ("two keys", "those below checkpoint.student, without the prefix module.encoder.\n"),
                       ("DataParallel without a key", "without the prefix module.\n")):
        torch.save(WRAPPED[wrap](resnet18()), tmp_path / "a.pth")
        load_weights(model, config, list("abcdefg"))
        assert capsys.readouterr().out == (said and f"initial weights: {said}")


def test_older_names_of_torchvisions_densenets_are_understood(tmp_path):
    """Files at download.pytorch.org name norm.1 and conv.2 what the network calls norm1 and conv2."""
    import torchvision

    state = torchvision.models.densenet121().state_dict()
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value for name, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    torch.save(older, tmp_path / "a.pth")
    config = Config(model="torchvision:densenet121", image_size=32, dropout=0.0, weights=str(tmp_path / "a.pth"))
    model = script.build_model(config, 7)
    load_weights(model, config, list("abcdefg"))
    assert torch.equal(model.body.features.denseblock4.denselayer16.conv2.weight,
                       state["features.denseblock4.denselayer16.conv2.weight"])


def test_a_wrapped_state_dict_of_an_own_network_is_loaded(tmp_path):
    """Its classes are unknown, so that its last layer is not taken."""
    config = Config(model="tiny", image_size=12, dropout=0.0, weights=str(tmp_path / "a.pth"))
    given, model = (script.build_model(dataclasses.replace(config, seed=seed), 3) for seed in (1, 2))
    torch.save({"classes": 3, "state_dict": prefixed("module.", given.state_dict())}, tmp_path / "a.pth")
    load_weights(model, config, list("abc"))
    assert torch.equal(model.conv3[0][0].weight, given.conv3[0][0].weight)
    assert not torch.equal(model.head[1].weight, given.head[1].weight)


def without(state: dict, *names: str) -> dict:
    return {name: value for name, value in state.items() if name not in names}


MISFITS = {
    "a layer is missing": (lambda state: {"state_dict": prefixed("module.", without(state, "layer2.0.conv1.weight"))},
                           "99 of 100 tensors fit, layer2.0.conv1.weight is missing"),
    "another shape": (lambda state: {**state, "bn1.bias": torch.zeros(32)},
                      "99 of 100 tensors fit, bn1.bias has the shape (32,), not (64,)"),
    "a larger network": (lambda state: {"model": {**state, "layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}},
                         "100 of 100 tensors fit, layer1.2.conv1.weight is not in this network"),
    "a part of another network": (lambda state: {**prefixed("encoder.", state), **prefixed("decoder.", state),
                                                 "encoder.neck.weight": torch.zeros(2)},
                                  "100 of 100 tensors fit, neck.weight is not in this network"),
    "other names": (lambda state: {"state_dict": {f"backbone.{number}.weight": value
                                                  for number, value in enumerate(state.values())}},
                    "0 of 100 tensors fit, conv1.weight is missing"),
    "no tensors": (lambda _: {"state_dict": {}, "epoch": 3}, "0 of 100 tensors fit, conv1.weight is missing"),
}


@pytest.mark.parametrize(("wrap", "message"), MISFITS.values(), ids=MISFITS)
def test_weights_that_do_not_fit_are_one_short_line(tmp_path, monkeypatch, wrap, message):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(resnet18()), "resnet.pth")
    config = Config(model="torchvision:resnet18", image_size=32, dropout=0.0, weights="resnet.pth")
    model = script.build_model(config, 7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"cannot be used .it is of another network.*--weights FILE") as error:
        load_weights(model, config, list("abcdefg"))
    assert message in str(error.value) and len(str(error.value)) <= 300 and "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_remedies_of_weights_that_do_not_fit_help(tmp_path):
    import torchvision

    torch.save({"state_dict": prefixed("module.", torchvision.models.resnet34().state_dict())}, tmp_path / "a.pth")
    torch.save(resnet18(), tmp_path / "b.pth")
    config = Config(model="torchvision:resnet18", image_size=32, dropout=0.0, weights=str(tmp_path / "a.pth"))
    with pytest.raises(DataError, match=r"name weights of resnet18 .*, set --model to the file's network"):
        load_weights(script.build_model(config, 3), config, list("abc"))
    for remedy in ({"model": "torchvision:resnet34"}, {"weights": str(tmp_path / "b.pth")}):
        other = dataclasses.replace(config, **remedy)
        load_weights(script.build_model(other, 3), other, list("abc"))


def test_the_command_starts_from_wrapped_weights(main_in_process, command, tmp_path):
    torch.save(WRAPPED["PyTorch's ImageNet example"](resnet18()), tmp_path / "a.pth")
    status, out, error = main_in_process("--model", "torchvision:resnet18", "--image-size", "32", "--num-epochs", "1",
                                         "--freeze-epochs", "1", "--knn-neighbors", "0", "--no-pictures", "--weights",
                                         str(tmp_path / "a.pth"), "--num-workers", "0", "--ema-decay", "0")
    assert status == 0 and "initial weights: those below state_dict, without the prefix module." in out, error
    trained = torch.load(command.output / "best_model.pth", weights_only=True)["model"]
    assert torch.equal(trained["body.layer4.1.conv2.weight"], resnet18()["layer4.1.conv2.weight"])
    assert len(pd.read_csv(command.output / "submission.csv")) == 30
