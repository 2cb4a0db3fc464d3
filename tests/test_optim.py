"""pipeline/optim.py: steps, schedules, optimizers, batch-norm statistics and averaged weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.distributed import Ranks
from pipeline.errors import DataError
from pipeline.models import Normalize, TinyCNN
from pipeline.optim import (
    MAX_SKIPPED_IN_A_ROW,
    BatchNormStatistics,
    Schedule,
    SkippedSteps,
    WeightAverage,
    accumulation_shares,
    epoch_batches,
    flatten_batch_norm_buffers,
    make_optimizer,
    step_if_finite,
    step_seed,
    steps_per_epoch,
)

ONE, ZERO = torch.ones(()), torch.zeros(())  # a finite step and another one


def make_schedule(schedule: str = "cosine", **settings) -> Schedule:
    return Schedule(**{"schedule": schedule, "num_epochs": 6, "warmup": 0.0, "step_epochs": 5, "milestones": "10,15",
                       "gamma": 0.1, **settings})


# ---- Steps ----------------------------------------------------------------------------------------------------------

def test_step_seeds_differ_in_every_argument():
    places = [(seed, epoch, step, rank) for seed in range(3) for epoch in range(3) for step in range(3)
              for rank in range(3)]
    seeds = [step_seed(*place) for place in places]
    assert len(set(seeds)) == 81 and seeds == [step_seed(*place) for place in places]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("rows", "batch_size"), [(40, 8), (41, 8), (3, 2), (7, 100), (2, 2), (1000, 128)])
def test_an_epoch_holds_every_row_once_and_no_batch_of_one(rows, batch_size):
    batches = epoch_batches(np.arange(rows), np.arange(rows) % 3, batch_size, seed=0, epoch=1)
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert len(batches) == steps_per_epoch(rows, batch_size)
    assert min(map(len, batches)) >= 2 and max(map(len, batches)) <= max(batch_size, 3)
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_order_depends_on_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(np.arange(100), np.zeros(100, int), 8, seed, epoch)).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4


def test_classes_are_spread_evenly_over_the_steps():
    targets = np.random.default_rng(0).choice(5, 1000, p=[0.5, 0.3, 0.15, 0.04, 0.01])
    rows = np.flatnonzero(np.arange(1000) % 10 > 0)  # some rows of the table validate
    batches = epoch_batches(rows, targets, 50, seed=0, epoch=1)
    assert sorted(np.concatenate(batches)) == rows.tolist()
    counts = np.array([np.bincount(targets[batch], minlength=5) for batch in batches])
    share = np.bincount(targets[rows]) / len(batches)
    assert (np.abs(counts - share) < 2).all()
    assert len({tuple(batch % 10) for batch in batches}) == len(batches)  # in random order inside a step


@pytest.mark.parametrize(("steps", "accumulation_steps", "updates"), [
    (7, 3, [2, 4, 6]), (6, 3, [2, 5]), (2, 5, [1]), (3, 1, [0, 1, 2]), (9, 8, [4, 8])])
def test_accumulation_shares_of_an_update_sum_to_one(steps, accumulation_steps, updates):
    shares = accumulation_shares([5] * (steps - 1) + [4], accumulation_steps)
    assert len(shares) == steps and [step for step, (_, update) in enumerate(shares) if update] == updates
    first = 0
    for last in updates:
        assert sum(share for share, _ in shares[first : last + 1]) == pytest.approx(1)
        first = last + 1


# ---- The schedule ----------------------------------------------------------------------------------------------------

def test_cosine_warms_up_and_falls_to_nothing():
    schedule = make_schedule(warmup=0.2)
    factors = [schedule.factor(progress) for progress in np.linspace(0, 1, 101)]
    assert factors[0] <= 1e-3 and factors[20] == 1.0 and factors[100] <= 1e-3
    assert np.all(np.diff(factors[:21]) > 0) and np.all(np.diff(factors[20:]) < 0)


def test_a_warmup_may_last_for_the_whole_training():
    assert all(math.isfinite(make_schedule(warmup=1.0).factor(progress)) for progress in (0, 0.5, 1))


@pytest.mark.parametrize(("settings", "expected"), [
    ({"schedule": "step", "step_epochs": 2}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ({"schedule": "multistep", "milestones": "1, 4", "gamma": 0.5}, [1, 0.5, 0.5, 0.5, 0.25, 0.25]),
    ({"schedule": "cyclic", "step_epochs": 2, "gamma": 0.2}, [0.2, 0.6, 1, 0.6, 0.2, 0.6]),
    ({"schedule": "constant", "warmup": 0.5}, [1e-3, 1 / 3, 2 / 3, 1, 1, 1]),
    ({"schedule": "plateau"}, [1, 1, 1, 1, 1, 1])])
def test_factors_at_the_beginning_of_each_epoch(settings, expected):
    schedule = make_schedule(**settings)
    assert [schedule.factor(epoch / 6) for epoch in range(6)] == pytest.approx(expected, abs=1e-6)


# ---- Optimizers and skipped steps -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_only_weight_matrices_and_kernels_are_decayed(name):
    groups = make_optimizer(name, TinyCNN(4), 0.1, 0.01, momentum=0.9).param_groups
    assert {group["weight_decay"]: {weight.ndim for weight in group["params"]} for group in groups} == {
        0.01: {2, 4}, 0.0: {1}}


@pytest.mark.parametrize(("name", "momentum"), [("adamw", 0.9), ("adam", 0.9), ("sgd", 0.9), ("sgd", 0.0)])
def test_a_step_without_finite_numbers_changes_nothing(name, momentum):
    """The first step too, before which an optimizer has no state."""
    def train(*steps: torch.Tensor) -> torch.Tensor:
        layer = nn.Linear(3, 2)
        nn.init.constant_(layer.weight, 0.5)
        optimizer = make_optimizer(name, layer, 0.1, 0.01, momentum)
        for number, finite in enumerate(steps):
            layer.weight.grad = torch.full_like(layer.weight, 0.1 * number + 0.1 if finite else math.nan)
            layer.bias.grad = torch.zeros_like(layer.bias)
            step_if_finite(optimizer, finite)
        return layer.weight.detach()

    assert torch.equal(train(ZERO), torch.full((2, 3), 0.5))
    assert not torch.equal(train(ONE), torch.full((2, 3), 0.5))
    skipped = train(ZERO, ONE, ZERO)
    assert skipped.isfinite().all() and not torch.equal(skipped, torch.full((2, 3), 0.5))


def test_an_optimizer_without_fused_kernels_skips_steps_too():
    """Devices such as MPS have none."""
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=False)
    for finite in (ZERO, ONE):
        layer.weight.grad = torch.full_like(layer.weight, 1.0)
        step_if_finite(optimizer, finite)
    assert torch.allclose(layer.weight, before - 0.1)


def test_ten_skipped_steps_in_a_row_are_a_divergence():
    skipped = SkippedSteps(torch.device("cpu"))
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        skipped.update(ZERO)
        skipped.check(None)
    skipped.update(ZERO)
    assert skipped.counts[0] == MAX_SKIPPED_IN_A_ROW == 10
    remedy = ("training diverged: 10 steps in a row had no finite loss or gradients; start over with --no-resume and a "
              "lower --learning-rate")
    with pytest.raises(DataError, match=f"^{remedy}$"):
        skipped.check(None)
    skipped.update(ZERO)
    with pytest.raises(DataError, match=f"^{remedy}; the checkpoint of epoch 7 is kept$"):
        skipped.check({"epoch": 7})


def test_ten_in_a_row_are_seen_after_they_are_over():
    skipped = SkippedSteps(torch.device("cpu"))
    for finite in [ZERO] * 10 + [ONE] * 5:
        skipped.update(finite)
    with pytest.raises(DataError, match="training diverged"):
        skipped.check(None)
    skipped.check(None)  # since the last call there was none


def test_skipped_steps_with_others_between_them_are_no_divergence():
    skipped = SkippedSteps(torch.device("cpu"))
    for finite in ([ZERO] * 9 + [ONE]) * 5:
        skipped.update(finite)
    assert skipped.counts.tolist() == [45, 0, 9]
    skipped.check(None)


# ---- Batch-norm statistics ------------------------------------------------------------------------------------------

def normalized_network(momentum: float = 0.1) -> nn.Sequential:
    return nn.Sequential(Normalize(1, 1), nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(),
                         nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=momentum))


def test_batch_norm_buffers_are_views_of_one_vector():
    model = normalized_network()
    names = list(model.state_dict())
    vector = flatten_batch_norm_buffers(model)
    assert len(vector) == 2 * (4 + 5) and list(model.state_dict()) == names
    vector.fill_(7.0)
    for layer in (model[2], model[5]):
        assert (layer.running_mean == 7).all() and (layer.running_var == 7).all()
    assert (model[0].scale == 1).all(), "measured normalisation is no batch norm"
    model.train()(torch.randn(8, 3))
    assert not (vector == 7).any(), "a forward pass writes into the vector"


def test_a_network_without_batch_norm_has_an_empty_vector():
    statistics = BatchNormStatistics(nn.Linear(2, 2))
    statistics.debias_batch_norm(1, 0, ZERO)
    statistics.keep_if(ONE)
    assert statistics.vector.numel() == 0


def take_steps(momentum: float, batches: int, finite_steps: list[bool],
               debias: bool = True) -> tuple[nn.BatchNorm1d, list[torch.Tensor]]:
    """Return a batch norm after optimizer steps of so many batches each, and the images' means of finite steps."""
    layer, means = nn.BatchNorm1d(4, momentum=momentum), []
    statistics, skipped = BatchNormStatistics(layer, debias), SkippedSteps(torch.device("cpu"))
    for step, finite in enumerate(finite_steps):
        for batch in range(batches):
            images = torch.randn(16, 4, generator=torch.Generator().manual_seed(10 * step + batch)) * 3 + 5
            layer(images if finite else images * math.nan)
            if finite:
                means.append(images.mean(dim=0))
        statistics.debias_batch_norm(batches, step, skipped.counts[0])
        statistics.keep_if(torch.tensor(float(finite)))
        skipped.update(torch.tensor(float(finite)))
    return layer, means


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_the_first_steps_are_averaged_cumulatively(momentum):
    layer, means = take_steps(momentum, 1, [True] * 6)
    assert torch.allclose(layer.running_mean, torch.stack(means).mean(dim=0), atol=1e-4)
    assert (layer.running_var > 4).all(), "the initial ones have no weight"


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_the_first_steps_of_accumulated_batches_are_averaged_cumulatively(momentum):
    layer, means = take_steps(momentum, 2, [True] * 3)
    kept = 1 - momentum  # of two batches the later one counts more, as in batch norm itself
    weights = torch.tensor([kept, 1.0]).div(kept + 1).repeat(3) / 3
    assert torch.allclose(layer.running_mean, weights @ torch.stack(means), atol=1e-4)


def test_later_steps_are_batch_norms_own_moving_average():
    layer, means = take_steps(0.1, 1, [True] * 40)
    average = torch.stack(means[:10]).mean(dim=0)  # after ten steps of weight 0.1
    for mean in means[10:]:
        average = 0.9 * average + 0.1 * mean
    assert torch.allclose(layer.running_mean, average, atol=1e-4)


def test_given_statistics_are_not_debiased():
    layer, means = take_steps(0.1, 1, [True], debias=False)
    assert torch.allclose(layer.running_mean, 0.1 * means[0], atol=1e-5)


def test_statistics_of_a_skipped_step_are_undone():
    expected, _ = take_steps(0.1, 1, [True])
    layer, _ = take_steps(0.1, 1, [True, False])
    assert torch.equal(layer.running_mean, expected.running_mean)
    assert torch.equal(layer.running_var, expected.running_var)


def test_after_a_skipped_first_step_the_initial_values_have_no_weight():
    layer, means = take_steps(0.1, 1, [False, True, True])
    assert torch.allclose(layer.running_mean, torch.stack(means).mean(dim=0), atol=1e-4)
    assert (layer.running_var > 4).all()


def test_one_rank_keeps_its_own_statistics():
    layer = nn.BatchNorm1d(4)
    statistics = BatchNormStatistics(layer)
    layer(torch.randn(8, 4))
    before = statistics.vector.clone()
    assert statistics.average_over_ranks(Ranks(), ZERO) is ZERO and torch.equal(statistics.vector, before)


def test_values_restored_before_the_first_step_are_kept():
    layer = nn.BatchNorm1d(4)
    statistics = BatchNormStatistics(layer)
    layer.load_state_dict({"weight": torch.ones(4), "bias": torch.zeros(4), "running_mean": torch.full((4,), 3.0),
                           "running_var": torch.full((4,), 2.0), "num_batches_tracked": torch.tensor(5)})
    statistics.keep_if(torch.ones(()))
    layer(torch.full((8, 4), math.nan))
    statistics.keep_if(ZERO)
    assert (layer.running_mean == 3).all() and (layer.running_var == 2).all()


# ---- Averaged weights -----------------------------------------------------------------------------------------------

def test_averaged_weights_follow_a_decay_that_warms_up():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    average = WeightAverage(model, decay=0.5)
    expected = model[0].weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model[0].weight += 1
            model[1].running_mean += 1
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    assert torch.allclose(average.model[0].weight, expected)
    assert 10.5 < average.model[1].running_mean.item() < 12 and not average.model[0].weight.requires_grad
