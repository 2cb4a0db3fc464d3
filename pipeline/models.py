"""Building blocks, networks from [B, 1, S, S] to logits [B, classes] whose last child is `head`, and their weights."""

import argparse
import copy
import difflib
import itertools
import math
import re
import statistics
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import DataError, UsageError, first_line, warn
from pipeline.files import load_tensors, load_verified
from pipeline.splits import SplitSettings


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch norm, which makes a bias superfluous."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = conv_bn(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; its input is added before the last ReLU."""
        return F.relu(self.second(F.relu(self.first(x), inplace=True)) + self.shortcut(x), inplace=True)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in 0..1 computed from the means of all channels (arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(inplace=True),
                                  nn.Linear(squeezed, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated channels [B, C, H, W]."""
        pixels = x.permute(0, 2, 3, 1)  # a mean over (2, 3) would give gradients in another memory format
        return (pixels * self.gate(pixels.mean(dim=(1, 2)))[:, None, None]).permute(0, 3, 1, 2)


class AveragePool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling that returns an input of the target size as it is, without cost."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features [B, C, size, size]."""
        return x if x.shape[-2:] == (self.output_size, self.output_size) else super().forward(x)


def global_pool() -> nn.Sequential:
    """Return global average pooling: [B, C, H, W] to [B, C]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def set_dropout(model: nn.Module, epoch: int, rise: int = 6) -> None:
    """Set each dropout layer's rate for an epoch, counted from 1. It rises over epochs: short trainings need none."""
    for layer in model.modules():
        if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            layer.full = getattr(layer, "full", layer.p)
            layer.p = layer.full * min(1, epoch / rise)


class Normalize(nn.Module):
    """Subtracts an offset and divides by a scale, for all pixels together or for each; measured before training."""

    def __init__(self, *size: int):
        super().__init__()
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised images."""
        return (x - self.offset) / self.scale

    def measure(self, batches: Iterable[Tensor], normalize: str) -> None:
        """Measure "standard" (mean and deviation of all pixels) or "min-max" (each pixel's range) on images."""
        count, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
        for ink in (batch.cpu() for batch in batches):  # MPS has no float64
            count, total = count + ink.numel(), total + ink.double().sum()
            squares = squares + ink.double().square().sum()
            low, high = ink.amin(dim=0, keepdim=True).clamp(max=low), ink.amax(dim=0, keepdim=True).clamp(min=high)
        if normalize == "standard":
            low = total / count
            high = low + (squares / count - low**2).clamp(min=0).sqrt()
        self.offset.copy_(low)  # a pixel that never changes keeps scale 1
        self.scale.copy_((high - low).where(high > low, 1.0))


class DigitCNN(nn.Sequential):
    """Three convolution blocks with pooling and dropout, global average pooling and a hidden layer of 512."""

    def __init__(self, num_classes: int, dropout: float = 0.25):
        super().__init__()
        for number, (inputs, width) in enumerate(itertools.pairwise((1, 32, 64, 128)), start=1):
            self.add_module(f"block{number}", nn.Sequential(
                conv_bn(inputs, width), nn.ReLU(inplace=True), conv_bn(width, width),
                nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(inplace=True), nn.Dropout2d(dropout)))
        self.pool = global_pool()
        self.hidden = nn.Sequential(nn.Linear(128, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))


class DigitMLP(nn.Sequential):
    """Two hidden layers, of 256 and 128, on the pixels."""

    def __init__(self, num_classes: int, dropout: float = 0.0, inputs: int = 784):
        super().__init__()
        self.flatten = nn.Flatten()
        self.hidden1 = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(inplace=True))
        self.hidden2 = nn.Sequential(nn.Linear(256, 128), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(128, num_classes))


class TinyCNN(nn.Sequential):
    """A digit network of fewer than 8,000 parameters: narrow 3x3 convolutions and global average pooling."""

    def __init__(self, num_classes: int, dropout: float = 0.0):
        super().__init__()
        for number, (inputs, width) in enumerate(itertools.pairwise((1, 8, 16, 16, 16, 12)), start=1):
            pool = [nn.MaxPool2d(2, ceil_mode=True)] if number in (2, 4) else []
            self.add_module(f"conv{number}", nn.Sequential(conv_bn(inputs, width), *pool, nn.ReLU(inplace=True)))
        self.pool = global_pool()
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(12, num_classes))


def check_model_name(name: str, own: list[str]) -> None:
    """Raise ValueError, with the nearest known ones, for a name that is not among `own` or torchvision's."""
    if name in own:
        return
    import torchvision

    known = [*own, *(f"torchvision:{model}" for model in torchvision.models.list_models(module=torchvision.models))]
    if name not in known:
        spellings = dict.fromkeys([name, f"torchvision:{name.removeprefix('torchvision:')}"])
        near = [match for spelling in spellings for match in difflib.get_close_matches(spelling, known, 3)]
        raise ValueError(f"model must be one of {', '.join(own)} or torchvision's, not {name!r}"
                         + (f"; near it are {', '.join(near)}" if near else ""))


def torchvision_network(name: str, num_classes: int, image_size: int, dropout: float,
                        weights: dict | None = None) -> nn.Module:
    """Return torchvision's network for one channel and with a new `head`, started from `weights`, a file's content."""
    import torchvision

    options = {"image_size": image_size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": weights is None}
    try:
        network = torchvision.models.get_model(name, **options)
    except (AssertionError, ValueError) as error:  # a size that is not a multiple of a transformer's patch
        raise UsageError(_size_fault(f"torchvision:{name}", image_size, error)) from None
    stem = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    linear = {place: layer for place, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    last = next((place for place, layer in reversed(linear.items()) if layer.out_features == 1000), None)
    if last is None:
        raise UsageError(f"--model torchvision:{name} has no last linear layer to replace; choose another model")
    if weights is not None:
        network.load_state_dict(match_weights(weights, network, ("aux", "Aux", f"{last}.")), strict=False)
    stem.in_channels, stem.weight = 1, nn.Parameter(stem.weight.detach().sum(dim=1, keepdim=True))  # of three colours
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(linear[last].in_features, num_classes))
    network.set_submodule(last, nn.Identity())
    return nn.Sequential(OrderedDict(body=network, head=head))


def load_initial_weights(model: nn.Module, weights: str, name: str, classes: list[str], image_size: int,
                         split: SplitSettings) -> None:
    """Start a network from a checkpoint, from torchvision's download ("torchvision") or from another program's file.

    Its last layer keeps its own weights, except for a checkpoint with the same classes. Warns if the checkpoint was
    trained on rows that validate by `split`. Raises DataError with every remedy.
    """
    remedy, original = "name a checkpoint of this model with --weights FILE", name.removeprefix("torchvision:")
    if original != name:
        remedy = (f"name weights of {original} with --weights FILE (as at download.pytorch.org/models), set --model to "
                  "the file's network, or let --weights torchvision download them")
    elif weights == "torchvision":
        raise UsageError(f"--weights torchvision: torchvision has none for --model {name}; {remedy}")
    try:
        model.load_state_dict(_initial_state(model, weights, name, classes, image_size, split), strict=False)
    except Exception as error:  # urllib, pickle and torch each raise their own types
        kind, fault = f"{type(error).__name__}: " * (type(error) is not ValueError), " ".join(str(error).split()[:40])
        raise DataError(f"--weights {weights}: cannot be used ({kind}{fault}); {remedy}") from None


def _initial_state(model: nn.Module, weights: str, name: str, classes: list[str], image_size: int,
                   split: SplitSettings) -> dict:
    """Return the state dict to start from, without the layers that the new network has of its own."""
    original, own_layers = name.removeprefix("torchvision:"), ("normalize.", "head.")
    if weights == "torchvision":
        import torchvision

        state = torchvision.models.get_model_weights(original).DEFAULT.get_state_dict(progress=False, check_hash=True)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm saves its arguments beside the weights
            state = load_tensors(weights)
    if {"classes", "config", "model"} <= state.keys():  # a checkpoint of ours
        state = load_verified(weights)
        if state["classes"] == classes:
            own_layers = ("normalize.",)
            other = SplitSettings(**{field: state["config"][field] for field in vars(split)})
            if other.effective() != split.effective() and split.train_val_split < 1:
                warn(f"--weights {weights}: was trained with {other.describe()}; if on these images, it has seen rows "
                     "that validate now, and their accuracy is too high")
        state = state["model"]
    elif original != name:
        network = torchvision_network(original, len(classes), image_size, 0.0, state)
        return {key: value for key, value in network.state_dict().items() if key.startswith("body.")}
    return match_weights(state, model, own_layers)


def match_weights(content: dict, network: nn.Module, left_out: tuple[str, ...]) -> dict:
    """Return a network's weights from a file's content, by the network's names, but for those that begin as `left_out`.

    They may lie in dictionaries (`state_dict` of Lightning), under names with a prefix (`module.` of DataParallel).
    Raises ValueError with the first tensor that does not fit.
    """
    shapes = {name: value.shape for name, value in network.state_dict().items() if not name.startswith(left_out)}
    needed, found = [name for name in shapes if not name.endswith("num_batches_tracked")], []  # old files have no count
    for place, tensors in _tensors_in(content):
        tails = ((name, name.split(".", cut)[cut]) for name in tensors for cut in range(name.count(".") + 1))
        prefix = statistics.mode([name.removesuffix(tail) for name, tail in tails if tail in shapes] or [""])
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        state = {name: value for name, value in state.items() if not name.startswith(left_out)}
        fitting = [name for name in needed if name in state and state[name].shape == shapes[name]]
        found.append((len(fitting), "ema" in place, place, prefix, state))  # averaged weights before others
    count, _, place, prefix, state = max(found, key=lambda item: item[:2])
    misfits = [name for name in needed if name not in state or state[name].shape != shapes[name]]
    if misfits := misfits + [name for name in state if name not in shapes]:
        name = misfits[0]
        fault = "is missing" if name not in state else "is not in this network" if name not in shapes else (
            f"has the shape {tuple(state[name].shape)}, not {tuple(shapes[name])}")
        raise ValueError(f"it is of another network: {count} of {len(needed)} tensors fit, {name} {fault}")
    if said := [f"those below {place}"] * bool(place) + [f"without the prefix {prefix}"] * bool(prefix):
        print("initial weights:", ", ".join(said))
    return state


def _tensors_in(content: dict, place: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the place and the tensors of a dictionary and of those in it."""
    tensors = {str(name).replace("_orig_mod.", ""): value for name, value in content.items()
               if isinstance(value, Tensor)}  # torch.compile adds _orig_mod, and torchvision's old densenets a point
    yield place, {re.sub(r"(denselayer\d+\.\w+)\.(?=[12]\.)", r"\1", name): value for name, value in tensors.items()}
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _tensors_in(value, f"{place}.{name}".lstrip("."))


def freeze_body(model: nn.Module, frozen: bool) -> None:
    """Train only the last layer of a model, or all. Frozen layers keep their batch statistics too."""
    for layer in list(model.children())[:-1]:
        layer.requires_grad_(not frozen)
        layer.train(not frozen)


def with_normalization(network: nn.Module, normalize: str, image_size: int) -> nn.Module:
    """Return the network, with a Normalize layer of one value ("standard") or one per pixel ("min-max") in front."""
    if normalize == "none":
        return network
    side = image_size if normalize == "min-max" else 1
    return nn.Sequential(OrderedDict([("normalize", Normalize(1, 1, side, side)), *network.named_children()]))


def summarize(model: nn.Module, name: str, image_size: int) -> str:
    """Return a table of layers, output shapes and parameters. Raises UsageError if the images are too small."""
    lines, x = [f"  {'layer':<10}{'output':>16}{'parameters':>14}"], torch.zeros(1, 1, image_size, image_size)
    try:
        with torch.inference_mode():
            for layer_name, layer in copy.deepcopy(model).cpu().eval().named_children():
                x, count = layer(x), sum(weight.numel() for weight in layer.parameters())
                lines.append(f"  {layer_name:<10}{' x '.join(map(str, x.shape[1:])):>16}{count:>14,}")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(_size_fault(name, image_size, error)) from None
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    kind = name if name.startswith("torchvision:") else type(model).__name__
    return "\n".join([f"{kind}, {millions:.2f} million parameters, {image_size} x {image_size} input", *lines])


def _size_fault(name: str, image_size: int, error: Exception) -> str:
    return (f"--model {name} cannot take images of {image_size} pixels ({first_line(error)}); set another "
            "--image-size, such as 224")
