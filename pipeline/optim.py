"""Steps, schedules, optimizers, batch-norm statistics and averaged weights."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.distributed import Ranks
from pipeline.errors import DataError
from pipeline.models import Normalize

MAX_SKIPPED_IN_A_ROW = 10  # steps without finite numbers after which a training has diverged
PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.5, 2  # schedule plateau: factor of a drop, epochs without improvement before it


def step_seed(seed: int, epoch: int, step: int, rank: int = 0) -> int:
    """Return the seed of one step's random draws."""
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the number of steps of an epoch, each with two rows or more."""
    return max(1, min(math.ceil(rows / batch_size), rows // 2))


def epoch_batches(rows: np.ndarray, targets: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the rows of each step of an epoch, shuffled, in steps that differ by one row at most.

    The rows of each class are spread evenly over the steps. `targets` are the class numbers of all rows.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(rows)
    order = order[targets[order].argsort(kind="stable")]  # by class, shuffled within each
    counts = np.bincount(targets[rows])
    first = random.random(len(counts)) - (counts.cumsum() - counts)
    places = (np.arange(len(rows)) + first.repeat(counts)) / counts.repeat(counts)
    return np.array_split(order[places.argsort(kind="stable")], steps_per_epoch(len(rows), batch_size))


def accumulation_shares(sizes: list[int], accumulation_steps: int) -> list[tuple[float, bool]]:
    """Return for each batch its share of the images of one optimizer step, and whether it completes that step."""
    groups = np.array_split(sizes, math.ceil(len(sizes) / accumulation_steps))
    return [(float(share), place == len(group) - 1)
            for group in groups for place, share in enumerate(group / group.sum())]


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: a warmup, then a cosine, steps, cycles or a constant rate."""

    schedule: str
    num_epochs: int
    warmup: float
    step_epochs: int
    milestones: str
    gamma: float

    def factor(self, progress: float) -> float:
        """Return what the peak learning rate is multiplied by at this progress 0..1."""
        epochs = progress * self.num_epochs + 1e-9
        if self.schedule == "cyclic":  # triangular, without warmup (arXiv:1506.01186)
            return self.gamma + (1 - self.gamma) * (1 - abs(epochs / self.step_epochs % 2 - 1))
        if progress < self.warmup:
            return max(progress / self.warmup, 1e-3)
        if self.schedule == "cosine":
            return max(0.5 + 0.5 * math.cos(math.pi * (progress - self.warmup) / max(1 - self.warmup, 1e-9)), 1e-4)
        if self.schedule == "step":
            return self.gamma ** (epochs // self.step_epochs)
        if self.schedule == "multistep":
            return self.gamma ** sum(epochs >= int(drop) for drop in self.milestones.split(","))
        return 1.0  # constant, or plateau, whose rate is lowered between epochs


def make_optimizer(name: str, model: nn.Module, learning_rate: float, weight_decay: float,
                   momentum: float) -> torch.optim.Optimizer:
    """Return adamw, adam or sgd for a model's parameters. Biases and batch norm are not decayed."""
    weights = list(model.parameters())
    groups = [{"params": [weight for weight in weights if (weight.ndim > 1) == decayed],
               "weight_decay": weight_decay * decayed} for decayed in (True, False)]
    options = {"lr": learning_rate, "fused": weights[0].device.type in ("cuda", "cpu")}
    if name != "sgd":
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](groups, **options)
    optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, **options)
    for weight in weights if momentum else ():  # the fused kernel creates no buffer if its first step is skipped
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Take an optimizer step unless `finite` is 0. Fused kernels read it on the device, so nothing waits for it."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = 1 - finite
    if optimizer.defaults["fused"] or finite:
        optimizer.step()


class SkippedSteps:
    """Counts, on the device, the steps that were skipped because their numbers were not finite."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(3, device=device)  # in all, in a row until now, most in a row since the last check

    def update(self, finite: Tensor) -> None:
        """Count a step; `finite` is 1 or 0."""
        (total, streak, longest), skipped = self.counts, 1 - finite
        streak = (streak + skipped) * skipped
        self.counts = torch.stack([total + skipped, streak, torch.maximum(longest, streak)])

    def check(self, best: dict | None) -> None:
        """Raise DataError if training has diverged; `best` is the epoch that is kept. Waits for the device."""
        longest = float(self.counts[2])
        self.counts[2] = self.counts[1]
        if longest >= MAX_SKIPPED_IN_A_ROW:
            kept = f"; the checkpoint of epoch {best['epoch']} is kept" if best else ""
            raise DataError(f"training diverged: {MAX_SKIPPED_IN_A_ROW} steps in a row had no finite loss or "
                            f"gradients; start over with --no-resume and a lower --learning-rate{kept}")


class BatchNormStatistics:
    """The running statistics of all batch-norm layers as one vector; a step's change can be averaged and undone."""

    def __init__(self, model: nn.Module, debias: bool = True):
        self.vector = flatten_batch_norm_buffers(model)
        self.before, self.debias = self.vector.clone(), debias  # before: after the last optimizer step
        self.momentum = max(getattr(layer, "momentum", None) or 0.0 for layer in model.modules()) or 0.1

    def average_over_ranks(self, ranks: Ranks, finite: Tensor) -> Tensor:
        """Give all ranks the mean of their changes. Return 1 if `finite` is 1 on all ranks, else 0."""
        if not ranks.joined:
            return finite
        mean = ranks.all_reduce_sum(torch.cat([self.vector - self.before, finite[None]])) / ranks.world_size
        self.vector.copy_(self.before + mean[:-1])
        return (mean[-1] == 1).float()

    def debias_batch_norm(self, batches: int, step: int, skipped: Tensor) -> None:
        """Average the first optimizer steps cumulatively, so that the initial zeros and ones do not bias the values."""
        weight = 1 - (1 - self.momentum) ** batches  # of this step, of so many batches, in the moving average
        if self.debias and weight * (step + 1 - MAX_SKIPPED_IN_A_ROW) < 1:
            factor = (1 / (weight * (step + 1 - skipped))).clamp(min=1)  # skipped steps had no effect
            self.vector.copy_(torch.lerp(self.before, self.vector, factor))

    def keep_if(self, finite: Tensor) -> None:
        """Keep this step's change if `finite` is 1, else undo it."""
        self.before.copy_(self.vector.where(finite > 0, self.before))
        self.vector.copy_(self.before)


def flatten_batch_norm_buffers(model: nn.Module) -> Tensor:
    """Make all float buffers of a model views of one vector, and return it. Normalize layers keep their own."""
    places = [(layer, name, buffer) for layer in model.modules() for name, buffer in layer.named_buffers(recurse=False)
              if buffer.is_floating_point() and not isinstance(layer, Normalize)]
    empty = torch.zeros(0, device=next(model.parameters()).device)
    vector = torch.cat([empty, *(buffer.flatten() for *_, buffer in places)])
    for (layer, name, buffer), part in zip(places, vector.split([buffer.numel() for *_, buffer in places])):
        setattr(layer, name, part.view_as(buffer))
    return vector


class WeightAverage:
    """Exponential moving average of weights and statistics. Unlike torch's AveragedModel, it waits for no device."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False).eval(), decay
        pairs = zip(self.model.state_dict().values(), model.state_dict().values())
        self.averages, self.sources = zip(*(pair for pair in pairs if pair[0].is_floating_point()))

    def update(self, step: int) -> None:
        """Move the averages towards the weights after this step, counted from 0. The decay warms up."""
        torch._foreach_lerp_(self.averages, self.sources, 1 - min(self.decay, (1 + step) / (10 + step)))
