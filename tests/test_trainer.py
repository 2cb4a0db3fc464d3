"""script.py: mixup, the loss, and Trainer, the training step."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import script
from pipeline.device import AutocastModel, Runtime
from pipeline.errors import DataError
from pipeline.files import sha256_of
from pipeline.models import freeze_body
from script import Config, Trainer

SMALL = Config(model="tiny", image_size=8, plain_epochs=0.0, batch_size=8, num_epochs=3,
               learning_rate=3e-3, dropout=0.1, precision="float32", ema_decay=0.9)
CLASSES = 4
CPU = Runtime()


def make_batch(rows: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images with a bar at the place that their class says, and one-hot targets."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.arange(rows) % CLASSES
    images = torch.rand(rows, 1, 8, 8, generator=random) / 4
    images[torch.arange(rows), 0, classes * 2] = 1.0
    return images, F.one_hot(classes, CLASSES).float()


def make_trainer(config: Config = SMALL, runtime: Runtime = CPU, **options) -> Trainer:
    model = runtime.to_device(script.build_model(config, CLASSES))
    return Trainer(config, model, runtime, **{"smallest_batch": config.batch_size, **options})


def poison(images: torch.Tensor) -> torch.Tensor:
    return images * math.nan


def learned_state(trainer: Trainer) -> dict:
    """Return weights, batch-norm statistics and the optimizer's moments, without counts and rates."""
    state = trainer.state_dict()
    return {"optimizer": state["optimizer"]["state"],
            "model": {name: value for name, value in state["model"].items() if "num_batches" not in name}}


def distances_to_average(trainer: Trainer) -> torch.Tensor:
    return torch.cat([(average - weight).abs().flatten() for average, weight in
                      zip(trainer.average.averages, trainer.average.sources)])


# ---- Mixup and the loss ---------------------------------------------------------------------------------------------

def test_mixup_blends_images_and_targets_alike():
    images, targets = torch.eye(6).view(6, 1, 6, 1), torch.eye(6)
    mixed_images, mixed_targets = script.mixup_data(images, targets, alpha=0.4, seed=3)
    assert torch.allclose(mixed_images.view(6, 6), mixed_targets)
    assert torch.allclose(mixed_targets.sum(dim=1), torch.ones(6))
    assert torch.equal(mixed_images, script.mixup_data(images, targets, alpha=0.4, seed=3)[0])
    larger = [script.mixup_data(images, targets, 0.4, seed)[1].amax(dim=1).min() for seed in range(300)]
    assert 0.81 < np.mean(larger) < 0.87  # the mean of max(l, 1 - l) for l of Beta(0.4, 0.4) is 0.839


def test_loss_is_torchs_cross_entropy_with_label_smoothing():
    logits, classes = torch.randn(6, 5), torch.arange(6) % 5
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, classes, label_smoothing=smoothing)
        assert script.soft_cross_entropy(logits, F.one_hot(classes, 5).float(), smoothing).item() == pytest.approx(
            expected.item(), rel=1e-5)


def test_a_row_of_half_the_weight_has_half_the_loss():
    logits, targets = torch.randn(2, 5), torch.eye(5)[:2]
    weights = torch.tensor([1.0, 0.5])
    each = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    assert script.soft_cross_entropy(logits, targets * weights[:, None], 0.1).item() == pytest.approx(
        (each * weights).mean().item(), rel=1e-5)


# ---- A step ---------------------------------------------------------------------------------------------------------

def test_a_step_returns_loss_correct_answers_and_weight():
    trainer = make_trainer(dataclasses.replace(SMALL, learning_rate=1e-9, dropout=0.0, label_smoothing=0.0))
    images, targets = make_batch()
    logits = trainer.model(images)
    loss, correct, weight = trainer.training_step(images, targets, progress=0.5).tolist()
    assert loss == pytest.approx(8 * F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert correct == (logits.argmax(dim=1) == targets.argmax(dim=1)).sum() and weight == 8
    _, correct, weight = trainer.training_step(images, targets * 0.5, progress=0.5).tolist()
    assert weight == 4 and correct in np.arange(9) / 2


def test_mixed_targets_count_fractionally():
    trainer = make_trainer(dataclasses.replace(SMALL, learning_rate=1e-9, dropout=0.0))
    images, _ = make_batch()
    targets = torch.full((8, CLASSES), 0.25)
    assert trainer.training_step(images, targets, progress=0.5)[1:].tolist() == [2, 8]


def test_training_steps_learn():
    trainer, (images, targets) = make_trainer(dataclasses.replace(SMALL, learning_rate=2e-2)), make_batch()
    losses = [trainer.training_step(images, targets, progress=0.3)[0].item() for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0] and trainer.updates == trainer.step == 40
    assert (trainer.model.eval()(images).argmax(dim=1) == targets.argmax(dim=1)).all()


def test_accumulated_batches_are_one_large_batch():
    """Without batch norm and dropout, batches of one to three rows give the update of one batch of eight."""
    config, (images, targets) = dataclasses.replace(SMALL, model="mlp", optimizer="sgd", dropout=0.0), make_batch()
    one, four = make_trainer(config), make_trainer(config)
    one.training_step(images, targets, progress=0.5)
    parts = np.split(np.arange(8), [1, 3, 5])  # the last of three rows, the first of one
    shares = script.optim.accumulation_shares([len(rows) for rows in parts], 4)
    for rows, (share, update) in zip(parts, shares):
        four.training_step(images[rows], targets[rows], 0.5, share, update)
    assert (one.updates, four.updates, four.step) == (1, 1, 4)
    for weight, other in zip(one.model.parameters(), four.model.parameters()):
        assert torch.allclose(weight, other, atol=1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_batch_norm_statistics_of_the_first_steps_are_means_of_the_images(accumulated):
    trainer, seen = make_trainer(dataclasses.replace(SMALL, ema_decay=0.0)), []
    convolution, norm = trainer.model.conv1[0]
    convolution.register_forward_hook(lambda *arguments: seen.append(arguments[-1].detach().mean(dim=(0, 2, 3))))
    for step in range(6):
        trainer.training_step(*make_batch(seed=step), 0.5, 1 / accumulated, update=(step + 1) % accumulated == 0)
    weights = torch.tensor([[1.0], [0.9, 1.0]][accumulated - 1]).repeat(6 // accumulated)  # later batches count more
    assert torch.allclose(norm.running_mean, weights @ torch.stack(seen) / weights.sum(), atol=1e-5)
    assert (norm.running_var > 0).all()


def test_batch_norm_statistics_of_given_weights_are_kept():
    new, given = (make_trainer(dataclasses.replace(SMALL, weights=name)) for name in ("", "a.pth"))
    for trainer in (new, given):
        trainer.training_step(*make_batch(), progress=0.5)
    first, second = (trainer.model.conv1[0][1].running_var for trainer in (new, given))
    assert torch.allclose(second, 0.9 + 0.1 * first, atol=1e-5)


def test_gradients_are_clipped():
    trainer, norms = make_trainer(dataclasses.replace(SMALL, max_grad_norm=1.0)), []
    trainer.optimizer.register_step_pre_hook(lambda *_: norms.append(
        torch.stack([weight.grad.norm() for weight in trainer.model.parameters()]).norm().item()))
    sum((weight * 100).sum() for weight in trainer.model.parameters()).backward()
    trainer.batches = 1
    trainer.optimizer_step(progress=0.5)
    assert norms == [pytest.approx(1.0, abs=1e-3)]


def test_learning_rate_follows_the_schedule():
    trainer = make_trainer(dataclasses.replace(SMALL, schedule="constant", warmup=0.5))
    rates = []
    for progress in (0.25, 0.5, 1.0):
        trainer.training_step(*make_batch(), progress)
        rates.append(trainer.learning_rate)
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3])


def test_plateau_halves_the_rate_after_three_epochs_without_improvement():
    trainer = make_trainer(dataclasses.replace(SMALL, schedule="plateau"))
    rates = []
    for hits in (11_500, 11_501, 11_502, 11_503, 11_503, 11_503, 11_503, 11_504):  # one image more is improvement
        trainer.plateau.step(hits / 13_447)
        trainer.training_step(*make_batch(), progress=0.9)
        rates.append(trainer.learning_rate)
    assert rates == pytest.approx([3e-3] * 6 + [1.5e-3] * 2)


def test_frozen_layers_keep_weights_and_statistics():
    trainer = make_trainer(dataclasses.replace(SMALL, freeze_epochs=1, ema_decay=0.0))
    fresh = script.build_model(SMALL, CLASSES).state_dict()

    def changed() -> set[str]:
        return {name.split(".")[0] for name, value in trainer.model.state_dict().items()
                if not torch.equal(value, fresh[name])}

    trainer.model.train()
    freeze_body(trainer.model, True)
    trainer.training_step(*make_batch(), progress=0.5)
    assert changed() == {"head"}
    trainer.model.train()
    freeze_body(trainer.model, False)
    trainer.training_step(*make_batch(), progress=0.5)
    assert changed() == {"conv1", "conv2", "conv3", "conv4", "conv5", "head"}


def test_no_host_synchronisation_in_a_step(monkeypatch):
    """A step reads nothing back from the device: no item(), tolist(), cpu() or truth value of a tensor."""
    trainer, batch = make_trainer(), make_batch()
    trainer.training_step(*batch, progress=0.1)  # the optimizer reads its fresh state once

    def forbidden(*_):
        raise AssertionError("a step waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    trainer.training_step(*batch, progress=0.2)


# ---- Steps without finite numbers -----------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"optimizer": "adam"}, {"ema_decay": 0.0},
                                      {"model": "cnn"}])
@pytest.mark.parametrize("earlier", [0, 2])
def test_a_poisoned_batch_changes_nothing(settings, earlier):
    """Neither weights nor batch-norm statistics nor the optimizer's moments, in the first step either."""
    trainer, (images, targets) = make_trainer(dataclasses.replace(SMALL, **settings)), make_batch()
    for _ in range(earlier):
        trainer.training_step(images, targets, progress=0.1)
    before = learned_state(trainer)
    assert trainer.training_step(poison(images), targets, progress=0.1).tolist() == [0, 0, 0]
    after = learned_state(trainer)
    for part in before if earlier else ["model"]:  # before its first step an optimizer has no moments
        assert sha256_of(before[part]) == sha256_of(after[part]), part
    assert trainer.skipped.counts.tolist() == [1, 1, 1]
    trainer.training_step(images, targets, progress=0.1)
    assert trainer.skipped.counts.tolist() == [1, 0, 1]
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert sha256_of(learned_state(trainer)["model"]) != sha256_of(after["model"]), "the next step is taken"


def test_a_poisoned_batch_does_not_reach_the_average():
    trainer, (images, targets) = make_trainer(), make_batch()
    for _ in range(3):
        trainer.training_step(images, targets, progress=0.1)
    before = distances_to_average(trainer)
    trainer.training_step(poison(images), targets, progress=0.1)
    assert (distances_to_average(trainer) <= before + 1e-6).all(), "it never leaves the weights"
    assert all(value.isfinite().all() for value in trainer.result.state_dict().values())


def test_one_poisoned_batch_skips_the_whole_accumulated_step():
    trainer, (images, targets) = make_trainer(dataclasses.replace(SMALL, accumulation_steps=2)), make_batch()
    before = learned_state(trainer)
    trainer.training_step(poison(images), targets, 0.1, 0.5, update=False)
    trainer.training_step(images, targets, 0.1, 0.5)
    assert sha256_of(learned_state(trainer)["model"]) == sha256_of(before["model"])
    assert trainer.skipped.counts.tolist() == [1, 1, 1]
    for update in (False, True):
        trainer.training_step(images, targets, 0.1, 0.5, update)
    assert trainer.skipped.counts.tolist() == [1, 0, 1]
    assert sha256_of(learned_state(trainer)["model"]) != sha256_of(before["model"])


def test_statistics_that_no_loss_shows_are_not_kept():
    """In training a batch norm does not read its running statistics, so that a NaN in them leaves the loss finite."""
    trainer = make_trainer()
    trainer.training_step(*make_batch(), progress=0.1)
    before = learned_state(trainer)
    trainer.statistics.vector[0] = math.nan
    assert trainer.training_step(*make_batch(), progress=0.1)[0] > 0
    assert sha256_of(learned_state(trainer)["model"]) == sha256_of(before["model"])
    assert all(value.isfinite().all() for value in trainer.result.state_dict().values())
    assert trainer.skipped.counts[0] == 1


def test_after_a_poisoned_first_batch_statistics_are_those_of_the_images():
    trainers = [make_trainer(), make_trainer()]
    trainers[1].training_step(poison(make_batch()[0]), make_batch()[1], progress=0.5)
    for trainer in trainers:
        for step in range(3):
            trainer.training_step(*make_batch(seed=step), progress=0.5)
    first, second = (trainer.model.conv1[0][1].running_var for trainer in trainers)
    assert torch.allclose(first, second, rtol=0.3) and second.max() < 0.5, "they start from 1"


def test_ten_skipped_steps_in_a_row_have_diverged():
    trainer, (images, targets) = make_trainer(), make_batch()
    for _ in range(9):
        trainer.training_step(poison(images), targets, progress=0.1)
    trainer.skipped.check(None)
    trainer.training_step(poison(images), targets, progress=0.1)
    with pytest.raises(DataError, match="training diverged"):
        trainer.skipped.check(None)


# ---- Saving and restoring -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0},
                                      {"optimizer": "adam", "ema_decay": 0.0}, {"model": "cnn"}])
def test_a_restored_trainer_takes_the_same_steps(settings):
    config = dataclasses.replace(SMALL, dropout=0.0, **settings)

    def take(trainer: Trainer, first: int) -> str:
        for step in range(first, first + 3):
            images, targets = make_batch(seed=step)
            trainer.training_step(poison(images) if step == 1 else images, targets, progress=step / 10)
        return sha256_of(trainer.state_dict())

    trainer, restored = make_trainer(config), make_trainer(config)
    take(trainer, 0)
    saved = trainer.state_dict()
    digest = sha256_of(saved)
    expected = take(trainer, 3)
    assert sha256_of(saved) == digest != expected, "a state dict is a copy"
    restored.load_state_dict(saved)
    assert sha256_of(restored.state_dict()) == digest and take(restored, 3) == expected
    assert sha256_of(saved) == digest, "the restored trainer does not share tensors with it"


# ---- Devices and precisions -----------------------------------------------------------------------------------------

def test_compile_wraps_what_is_trained_and_leaves_names_plain(monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: wrapped.append(network) or network)
    trainer = make_trainer(dataclasses.replace(SMALL, compile=True))
    assert len(wrapped) == 1 and isinstance(wrapped[0], AutocastModel)
    assert all(name.startswith(("conv", "head")) for name in trainer.result.state_dict())


def test_several_gpus_keep_plain_names():
    config = dataclasses.replace(SMALL, batch_size=128)
    trainer = make_trainer(config, Runtime(gpus=2))
    assert isinstance(trainer.network, torch.nn.DataParallel)
    assert not any(name.startswith("module.") for name in trainer.result.state_dict())


@pytest.mark.parametrize("smallest_batch", [57, 127])
def test_one_of_several_gpus_trains_on_batches_too_small_for_their_batch_norm(capsys, smallest_batch):
    """A table with fewer rows than batch_size has smaller batches than that."""
    config = dataclasses.replace(SMALL, batch_size=128)
    trainer = make_trainer(config, Runtime(gpus=2), smallest_batch=smallest_batch)
    assert not isinstance(trainer.network, torch.nn.DataParallel)
    assert ("only one of 2 GPUs is used: a step has too few images for more; set --batch-size 128 or more"
            in capsys.readouterr().err)


def test_threads_of_several_gpus_compute_in_the_precision_of_the_run():
    """DataParallel's threads do not inherit the caller's autocast: the network enters it itself."""
    trainer = make_trainer(runtime=Runtime(precision="bf16"))
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        logits = pool.submit(trainer.network.eval(), torch.zeros(2, 1, 8, 8)).result()
    assert logits.dtype == torch.bfloat16


def test_bf16_trains_float32_weights():
    trainer, batch = make_trainer(runtime=Runtime(precision="bf16")), make_batch()
    trainer.model.train()
    figures = trainer.training_step(*batch, progress=0.5)
    reference = make_trainer().training_step(*batch, progress=0.5)
    assert figures.dtype == torch.float32 and figures[0].item() == pytest.approx(reference[0].item(), rel=0.1)
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())
