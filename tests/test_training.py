"""Rooms 6 to 8: loss, metrics, checkpoints and the training loop."""

import dataclasses
import itertools
import math
import signal
import sys
import time
import types
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import script
from script import Config, DataError, ImageStatistics, Learner, MathSymbolDataset, Pace, TrainingData, UsageError

CPU = script.start_runtime(Config(device="cpu", precision="float32"))
SMALL = Config(model="cnn", image_size=8, batch_size=8, num_epochs=3, learning_rate=3e-3, dropout=0.1,
               precision="float32", average_decay=0.9)


def small_data(rows: int = 40, classes: int = 4, seed: int = 0) -> TrainingData:
    """Bars at the place that their class says, with noise."""
    rng = np.random.default_rng(seed)
    targets = np.arange(rows) % classes
    images = rng.integers(0, 60, (rows, 1, 8, 8), dtype=np.uint8)
    images[np.arange(rows), 0, targets * 2] = 255
    train, val = script.split_rows(targets, Config(train_val_split=0.8))
    labels = [str(10 * number) for number in range(classes)]
    return TrainingData(MathSymbolDataset(images, targets, CPU), targets, labels, ImageStatistics(255, 8), train, val)


def learner_of(config: Config, runtime: script.Runtime = CPU) -> Learner:
    return Learner(config, runtime.place(script.build_model(config, 4)), 4, runtime)


def test_mixup_blends_images_and_targets_alike():
    images, targets = torch.eye(6).view(6, 1, 6, 1), torch.eye(6)
    mixed_images, mixed_targets = script.mixup_data(images, targets, alpha=0.4, seed=3)
    assert torch.allclose(mixed_images.view(6, 6), mixed_targets)
    assert torch.allclose(mixed_targets.sum(dim=1), torch.ones(6))
    assert torch.equal(mixed_images, script.mixup_data(images, targets, alpha=0.4, seed=3)[0])
    larger = [script.mixup_data(images, targets, 0.4, seed)[1].amax(dim=1).min() for seed in range(300)]
    assert 0.81 < np.mean(larger) < 0.87  # max(l, 1 - l) of Beta(0.4, 0.4) is 0.839 in the mean


def test_cutmix_pastes_and_blends_by_area():
    images, targets = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 20, 20), torch.eye(6)
    areas = []
    for seed in range(200):
        mixed_images, mixed_targets = script.cutmix_data(images, targets, alpha=1.0, seed=seed)
        pasted = mixed_images != images
        areas.append(pasted[0].float().mean().item())
        assert torch.equal(mixed_images.where(pasted, -1.0), images.roll(1, 0).where(pasted, -1.0))
        assert mixed_targets[0, 5].item() == pytest.approx(areas[-1], abs=1e-6)
        assert torch.allclose(mixed_targets.sum(dim=1), torch.ones(6))
    assert min(areas) < 0.05 and max(areas) > 0.5 and len(set(areas)) > 50


def test_with_both_mixup_and_cutmix_take_turns():
    images, targets = torch.rand(8, 1, 20, 20), torch.eye(8)
    config = dataclasses.replace(SMALL, mixup=True, cutmix=True)
    for seed, mixed in [(2, script.mixup_data), (3, script.cutmix_data)]:
        expected = mixed(images, targets, config.mixup_alpha, seed)
        assert all(map(torch.equal, script.mix(images, targets, config, seed), expected))
    assert script.mix(images, targets, SMALL, 3)[0] is images


def test_what_teachers_say_is_learnt(tmp_path):
    data = small_data()
    learner = learner_of(dataclasses.replace(SMALL, augment=False, label_smoothing=0.0, teacher_share=1.0, dropout=0.0,
                                             learning_rate=1e-2, warmup=0.0))
    images, classes = data.dataset.batch(data.train_rows)
    taught = F.one_hot((classes + 1) % 4, 4).half()  # the teachers are sure, and contradict the labels
    for _ in range(30):
        learner.learn(script.Batch(images, classes, taught), epoch=1, progress=0.1)
    learner.model.eval()
    assert (learner.model(script.to_input(images, SMALL)).argmax(dim=1) == (classes + 1) % 4).float().mean() > 0.9


def test_score_against_figures_by_hand():
    probabilities = np.array([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.1, 0.9, 0.0], [0.7, 0.3, 0.0]])
    figures = script.score(probabilities, np.array([0, 0, 1, 1]))
    assert figures["val_loss"] == pytest.approx(-np.log([0.8, 0.6, 0.9, 0.3]).mean())
    assert figures["val_accuracy"] == 0.75 and figures["val_class_accuracy"] == 0.75
    assert figures["val_top3_accuracy"] == 1
    uneven = script.score(probabilities, np.array([0, 0, 0, 1]))
    assert uneven["val_accuracy"] == 0.5 and uneven["val_class_accuracy"] == pytest.approx(1 / 3)


def test_of_equal_probabilities_the_first_are_the_likeliest():
    sure = np.zeros((5, 5), dtype=np.float32)
    sure[:, 0] = 1
    assert script.score(sure, np.arange(5))["val_top3_accuracy"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("accumulate", [2, 8])
@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_few_steps_give_batch_statistics_of_the_images(momentum, accumulate):
    """Where an epoch has fewer steps than accumulate says, too; some of torchvision's networks have their momentum."""
    data, config = small_data(), dataclasses.replace(SMALL, average_decay=0.0, accumulate=accumulate)
    model = script.build_model(config, 4)
    for layer in model.modules():
        if hasattr(layer, "momentum"):
            layer.momentum = momentum
    learner = Learner(config, CPU.place(model), 4, CPU)
    norm, inputs = learner.model.conv1[0][1], []
    learner.model.conv1[0][0].register_forward_hook(lambda *seen: inputs.append(seen[-1].detach()))
    for step in range(6):
        learner.learn(data.batch(data.train_rows[8 * step % 32:][:8]), 1, 0.5, 0.5, update=step % 2 == 1)
    means = torch.stack([seen.mean(dim=(0, 2, 3)) for seen in inputs])
    kept = 1 - momentum  # of two batches the later counts more, as ever
    weights = torch.tensor([kept, 1.0]).div(kept + 1).repeat(3) / 3
    assert torch.allclose(norm.running_mean, weights @ means, atol=1e-5)
    assert (norm.running_var > 0).all()


def test_a_scale_that_falls_to_nothing_is_a_fault():
    learner = learner_of(SMALL)
    learner.check_faults()
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1e-5)
    with pytest.raises(script.Setback):
        learner.check_faults()


def test_writing_takes_a_small_share_of_the_time(tmp_path):
    learner, keeper = learner_of(SMALL), script.RunKeeper(SMALL, tmp_path / "last.pth")
    keeper.saved, keeper.took = time.monotonic() - 30, 2.0  # seconds ago, and how long it took
    keeper.save(learner, script.Progress(), Pace(10), least=10)
    assert not keeper.files[0].exists()
    keeper.took = 1.0
    keeper.save(learner, script.Progress(), Pace(10), least=10)
    assert keeper.files[0].exists() and keeper.took != 1.0  # measured anew


def test_statistics_that_a_training_starts_from_are_kept():
    data, (new, old) = small_data(), (learner_of(dataclasses.replace(SMALL, weights=name)) for name in ("", "a.pth"))
    for learner in (new, old):
        learner.learn(data.batch(data.train_rows[:8]), 1, 0.5)
    first, second = (learner.model.conv1[0][1].running_var for learner in (new, old))
    assert torch.allclose(second, 0.9 + 0.1 * first, atol=1e-5)


def test_top_3_counts_what_is_among_the_three_likeliest():
    probabilities = np.array([[0.4, 0.3, 0.2, 0.1]] * 4)
    assert script.score(probabilities, np.array([0, 1, 2, 3]))["val_top3_accuracy"] == 0.75
    assert script.score(probabilities, np.array([3, 3, 3, 3]))["val_top3_accuracy"] == 0


@pytest.mark.parametrize(("rows", "batch"), [(40, 8), (41, 8), (3, 2), (7, 100), (2, 2), (1000, 128)])
def test_an_epoch_holds_every_row_once_and_no_step_of_one(rows, batch):
    config = Config(batch_size=batch)
    steps = script.epoch_steps(np.arange(rows), config, epoch=1)
    assert sorted(np.concatenate(steps)) == list(range(rows))
    assert len(steps) == script.steps_in_epoch(np.arange(rows), config)
    assert min(map(len, steps)) >= 2 and max(map(len, steps)) <= max(batch, 3)
    assert not np.array_equal(np.concatenate(steps), np.concatenate(script.epoch_steps(np.arange(rows), config, 2))) \
        or rows < 4


def test_the_schedule_warms_up_and_falls_to_nothing():
    config = Config(warmup=0.2, num_epochs=5)
    factors = [script.schedule_factor(config, progress) for progress in np.linspace(0, 1, 101)]
    assert factors[0] <= 1e-3 and factors[20] == 1.0 and factors[100] <= 1e-3
    assert np.all(np.diff(factors[:21]) > 0) and np.all(np.diff(factors[20:]) < 0)
    assert script.schedule_factor(Config(schedule="constant", warmup=0.0, num_epochs=5), 0.7) == 1.0
    whole = Config(warmup=1.0, num_epochs=5)
    assert all(math.isfinite(script.schedule_factor(whole, progress)) for progress in (0, 0.5, 1))


@pytest.mark.parametrize("settings, expected", [
    ({"schedule": "step", "step_epochs": 2, "gamma": 0.1}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ({"schedule": "multistep", "milestones": "1, 4", "gamma": 0.5}, [1, 0.5, 0.5, 0.5, 0.25, 0.25]),
    ({"schedule": "cyclic", "step_epochs": 2, "gamma": 0.2}, [0.2, 0.6, 1, 0.6, 0.2, 0.6]),
    ({"schedule": "onecycle", "warmup": 0.5}, [1e-3, 0.25, 0.75, 1, 0.75, 0.25]),
])
def test_schedules_by_hand(settings, expected):
    config = Config(**{"warmup": 0.0, "num_epochs": 6, **settings})
    assert [script.schedule_factor(config, epoch / 6) for epoch in range(6)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", [None, *typing.get_args(script.Schedule)])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_every_optimizer_and_schedule_learns(tmp_path, optimizer, schedule):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), optimizer=optimizer, schedule=schedule or "cosine",
                                 model="tiny", dropout=0.0, average_decay=0.0,
                                 learning_rate=0.1 if optimizer == "sgd" else 2e-2, num_epochs=4, step_epochs=2,
                                 gamma=0.5, milestones="2,3", augment=False, accumulate=1 if schedule else 3)
    history = script.fit(config, small_data(200), CPU)
    assert history.train_accuracy.iloc[-1] > 0.9 and history.train_loss.argmin() > 0
    assert np.isfinite(history.val_loss).all()


def test_accumulated_batches_are_one_large_batch():
    """Without batch norm and dropout, four batches of one to three rows step as one of eight does."""
    config, data = dataclasses.replace(SMALL, model="mlp", dropout=0.0, augment=False), small_data()
    one, four = learner_of(config), learner_of(dataclasses.replace(config, batch_size=2, accumulate=4))
    one.learn(data.batch(np.arange(8)), epoch=1, progress=0.5)
    parts = np.split(np.arange(8), [1, 3, 5])  # the last of three rows, the first of one
    for rows, (share, update) in zip(parts, script.accumulation_shares([len(rows) for rows in parts], 4)):
        four.learn(data.batch(rows), 1, 0.5, share, update)
    assert (one.updates, four.updates, four.step) == (1, 1, 4)
    for weight, other in zip(one.model.parameters(), four.model.parameters()):
        assert torch.allclose(weight, other, atol=1e-6)


@pytest.mark.parametrize("steps, accumulate, updates",
                         [(7, 3, [2, 4, 6]), (6, 3, [2, 5]), (2, 5, [1]), (3, 1, [0, 1, 2]), (9, 8, [4, 8])])
def test_every_groups_shares_add_up_to_one(steps, accumulate, updates):
    shares = script.accumulation_shares([5] * (steps - 1) + [4], accumulate)
    assert len(shares) == steps and [step for step, (_, update) in enumerate(shares) if update] == updates
    assert sum(share for share, _ in shares) == pytest.approx(len(updates))


def test_early_stopping_ends_a_training_that_does_not_improve(tmp_path, capsys):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), learning_rate=1e-9, average_decay=0.0, num_epochs=50,
                                 warmup=0.0, early_stopping=3, select_by="accuracy", model="mlp")
    history = script.fit(config, small_data(), CPU)
    assert "stopped early: 3 epochs without a better validation accuracy" in capsys.readouterr().out
    assert len(history) < 50
    assert script.load_checkpoint(tmp_path / "best_model.pth").metrics["epoch"] == len(history) - 3


def test_scalars_are_written_for_tensorboard_where_it_is_asked_for(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == tmp_path / "tensorboard"

        def add_scalar(self, name, value, epoch):
            written.append((epoch, name, value))

        def flush(self):
            pass

    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), model="mlp", tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    history = script.fit(config, small_data(), CPU)
    assert [value for _, name, value in written if name == "val_accuracy"] == history.val_accuracy.tolist()
    assert {name for _, name, _ in written} == set(script.HISTORY_COLUMNS)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not installed
    with pytest.raises(UsageError, match="pip install tensorboard"):
        script.fit(config, small_data(), CPU)


def test_a_frozen_body_keeps_its_weights_and_statistics(tmp_path):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), freeze_epochs=1, num_epochs=1, average_decay=0.0)
    fresh = script.build_model(config, 4).state_dict()
    script.fit(config, small_data(), CPU)
    kept = script.load_checkpoint(tmp_path / "best_model.pth").model.state_dict()
    changed = {name.split(".")[0] for name in fresh if not torch.equal(fresh[name], kept[name])}
    assert changed == {"head"}
    data = dataclasses.replace(small_data(), val_rows=np.arange(0))  # which keeps the last epoch
    script.fit(dataclasses.replace(config, num_epochs=2), data, CPU)
    kept = script.load_checkpoint(tmp_path / "best_model.pth").model.state_dict()
    assert not any(torch.equal(fresh[name], kept[name]) for name in fresh if name.endswith("weight"))


def test_normalization_is_measured_on_the_training_rows_and_kept(tmp_path):
    data = small_data()
    ink = data.dataset.images[data.train_rows].float() / 255
    for kind in ("standard", "min-max"):
        config = dataclasses.replace(SMALL, output_dir=str(tmp_path), normalize=kind, augment=False)
        layer = script.start_model(config, data, CPU).normalize
        if kind == "standard":
            assert layer.offset.item() == pytest.approx(ink.mean().item(), abs=1e-5)
            assert layer.scale.item() == pytest.approx(ink.std(correction=0).item(), abs=1e-5)
        else:
            assert torch.allclose(layer.offset, ink.amin(dim=0, keepdim=True))
            assert layer(ink).amin() == 0 and layer(ink).amax() == 1
        script.fit(config, data, CPU)
        kept = script.load_checkpoint(tmp_path / "best_model.pth").model
        assert torch.allclose(kept.normalize.offset, layer.offset) and torch.allclose(kept.normalize.scale, layer.scale)


def test_weights_of_a_checkpoint_are_taken_over(tmp_path):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path))
    script.fit(config, small_data(), CPU)
    path, other = tmp_path / "best_model.pth", small_data(classes=3)
    trained = script.load_checkpoint(path).model.state_dict()
    again = dataclasses.replace(config, weights=str(path))
    same, changed = (script.start_model(again, data, CPU).state_dict() for data in (small_data(), other))
    assert all(torch.equal(same[name], trained[name]) for name in trained)
    assert all(torch.equal(changed[name], trained[name]) for name in trained if not name.startswith("head."))
    assert changed["head.1.weight"].shape[0] == 3
    wrong = [({"model": "tiny"}, "it is of another network"), ({"weights": "none.pth"}, "No such file"),
             ({"weights": "torchvision"}, "has none for --model cnn")]
    for settings, message in wrong:
        with pytest.raises(DataError, match=f"{message}.*name a checkpoint of this model with --weights FILE"):
            script.start_model(dataclasses.replace(again, **settings), small_data(), CPU)


@pytest.mark.parametrize("settings, warned", [({}, False), ({"split_seed": 7}, True), ({"train_val_split": 1.0}, False),
                                              ({"folds": 3, "fold": 1}, True)])
def test_weights_that_have_seen_validation_rows_are_warned_of(tmp_path, capsys, settings, warned):
    config, path = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=1), tmp_path / "best_model.pth"
    script.fit(config, small_data(), CPU)
    again = dataclasses.replace(config, weights=str(path), **settings)
    script.start_model(again, small_data(), CPU)
    error = capsys.readouterr().err
    assert ("it has seen rows that validate now" in error) == warned
    script.start_model(again, small_data(classes=3), CPU)
    assert not capsys.readouterr().err, "other classes are other data"


def test_weights_with_a_flipped_bit_are_refused(tmp_path):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=1)
    script.fit(config, small_data(), CPU)
    path = tmp_path / "best_model.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be used .*not what was written"):
        script.fit(dataclasses.replace(config, weights=str(path)), small_data(), CPU)


def test_the_pace_is_by_steps_or_by_the_clock(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    unlimited, limited = Pace(10), Pace(1000, seconds=20)
    clock[0] += 5
    assert unlimited.progress(4) == 0.4 and limited.progress(4) == 0.25
    clock[0] += 50
    assert unlimited.progress(10) == 1 and limited.progress(5) == 1


def stop_after(monkeypatch, stops, steps):
    """Let a stop signal come in the so-manyth step from now."""
    real, left = Learner.learn, [steps]

    def learn(self, *arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            stops.waiting = signal.SIGTERM
        return real(self, *arguments, **options)

    monkeypatch.setattr(Learner, "learn", learn)


def interrupt(config, data, monkeypatch, steps) -> dict:
    """Stop a training in the so-manyth step, which leaves last.pth; gives what tells this run from another."""
    about = script.identify_run(config, data, CPU)
    keeper = script.RunKeeper(config, Path(config.output_dir, "last.pth"), about)
    with monkeypatch.context() as patches:
        stop_after(patches, keeper.stops, steps)
        with pytest.raises(script.Stopped):
            script.fit(config, data, CPU, keeper=keeper)
    return about


@pytest.mark.parametrize("settings", [
    {}, {"optimizer": "sgd", "learning_rate": 0.05}, {"optimizer": "adam", "schedule": "onecycle"}, {"accumulate": 3},
    {"schedule": "plateau", "plateau_patience": 0}, {"average_decay": 0.0}, {"mixup": True}, {"max_grad_norm": 0.0},
    {"precision": "bf16"}, {"freeze_epochs": 1}, {"normalize": "min-max"}, {"early_stopping": 3, "select_by": "loss"},
    {"train_val_split": 1.0}, {"optimizer": "sgd", "momentum": 0.0, "schedule": "cyclic"}])
def test_a_training_goes_on_bit_for_bit(tmp_path, monkeypatch, settings):
    data, config = small_data(44), dataclasses.replace(SMALL, **{"model": "tiny", "num_epochs": 4, **settings})
    if config.train_val_split == 1:
        data = dataclasses.replace(data, train_rows=np.arange(44), val_rows=np.arange(0))
    runtime = dataclasses.replace(CPU, precision=config.precision)
    monkeypatch.setattr(script, "LEAST_SECONDS", 0)
    results = []
    for name, pauses in (("whole", []), ("stopped", [1, 4, 7])):
        own = dataclasses.replace(config, output_dir=str(tmp_path / name))
        (tmp_path / name).mkdir()
        for steps in [*pauses, None]:
            keeper = script.RunKeeper(own, tmp_path / name / "last.pth", script.identify_run(own, data, runtime))
            with monkeypatch.context() as patches:
                if steps is None:
                    history = script.fit(own, data, runtime, keeper=keeper)
                    continue
                stop_after(patches, keeper.stops, steps)
                with pytest.raises(script.Stopped, match="the same command goes on from there"):
                    script.fit(own, data, runtime, keeper=keeper)
        states = [script.read_content(tmp_path / name / file) for file in ("best_model.pth", "last.pth")]
        results.append((script.digest(states[0]["model"]), script.digest(states[1]["learner"]),
                        history.drop(columns="seconds").to_csv()))
    assert results[0] == results[1]


def poisoned(monkeypatch, steps, poison):
    """Let some steps, counted from 1 and over all trainings, be poisoned."""
    real, count = Learner.learn, itertools.count(1)

    def learn(self, images, *rest, **options):
        if next(count) in steps:
            poison(self)
        return real(self, images, *rest, **options)

    monkeypatch.setattr(Learner, "learn", learn)


def spoil_a_weight(learner):
    learner.weights[0].data[0] = math.nan


def inputs_that_overflow(learner):
    """The first layer's next outputs, and so the loss, the gradients and the statistics, are not numbers."""
    first = next(layer for layer in learner.model.modules() if isinstance(layer, torch.nn.Conv2d))

    def spoil(_, __, output):
        handle.remove()
        return output * math.nan

    handle = first.register_forward_hook(spoil)


def all_finite(state: dict) -> bool:
    return all(value.isfinite().all() for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize("settings", [{}, {"average_decay": 0.0}, {"optimizer": "sgd"}, {"accumulate": 2}])
def test_a_step_without_finite_numbers_is_left_out(tmp_path, monkeypatch, capsys, settings):
    poisoned(monkeypatch, {1, 6}, inputs_that_overflow)
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), **settings)
    history = script.fit(config, small_data(), CPU)
    assert "1 steps left out: no finite numbers" in capsys.readouterr().out
    assert history.train_loss.notna().all() and history.val_loss.notna().all()
    assert all_finite(script.load_checkpoint(tmp_path / "best_model.pth").model.state_dict())


def test_what_is_left_out_has_no_part_in_the_epochs_figures(tmp_path, monkeypatch):
    """At a rate of nearly 0, each step's figures are those of its images."""
    histories = []
    for steps in ((), {1, 2}):
        config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=1, learning_rate=1e-9, resume=False)
        with monkeypatch.context() as patches:
            poisoned(patches, steps, inputs_that_overflow)
            histories.append(script.fit(config, small_data(), CPU))
    assert histories[1].train_loss[0] == pytest.approx(histories[0].train_loss[0], rel=0.1)
    assert 0.7 < histories[1].train_loss[0] / histories[1].val_loss[0] < 1.4  # not half of it
    learner = learner_of(SMALL)
    inputs_that_overflow(learner)
    assert learner.learn(small_data().batch(np.arange(8)), 1, 0.5).tolist() == [0, 0, 0]


def test_statistics_after_a_first_step_that_is_left_out_are_of_images():
    data, learners = small_data(), [learner_of(SMALL) for _ in range(2)]
    inputs_that_overflow(learners[1])
    learners[1].learn(data.batch(data.train_rows[:8]), 1, 0.5)
    for learner in learners:
        for step in range(3):
            learner.learn(data.batch(data.train_rows[8 * step:][:8]), 1, 0.5)
    first = [learner.model.conv1[0][1].running_var for learner in learners]
    assert torch.allclose(*first, rtol=0.3) and first[1].max() < 0.5  # it starts from 1


def test_a_step_that_is_left_out_changes_nothing():
    data, learner = small_data(), learner_of(SMALL)
    batch = data.batch(np.arange(8))
    learner.learn(batch, epoch=1, progress=0.1)
    before = learner.state()
    inputs_that_overflow(learner)
    learner.learn(batch, epoch=1, progress=0.1)
    after = learner.state()
    for name in ("model", "average", "optimizer"):
        plain = [{key: value for key, value in state[name].items() if "num_batches" not in key}
                 for state in (before, after)]
        for state in plain if name == "optimizer" else ():
            for group in state["param_groups"]:
                group.pop("lr")
        assert script.digest(plain[0]) == script.digest(plain[1]), name
    assert after["faults"].tolist() == [1, 1, 1]


def test_a_weight_that_is_no_number_never_reaches_the_average(tmp_path, monkeypatch, capsys):
    """A NaN that no loss shows: in a batch-norm statistic, which training does not read, or in a weight."""
    def spoil_statistics(learner):
        learner.statistics[0] = math.nan

    poisoned(monkeypatch, {3}, spoil_statistics)
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path))
    script.fit(config, small_data(), CPU)
    assert all_finite(script.load_checkpoint(tmp_path / "best_model.pth").model.state_dict())
    assert "1 steps left out" in capsys.readouterr().out


def test_training_goes_back_and_learns_more_slowly(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {10}, spoil_a_weight)
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=4)
    history = script.fit(config, small_data(), CPU)
    out = capsys.readouterr().out
    assert "no finite numbers" in out and "back to epoch 3, step 0, with 0.5 of the rate" in out
    assert len(history) == 4 and all_finite(script.load_checkpoint(tmp_path / "best_model.pth").model.state_dict())


def test_ten_steps_in_a_row_are_seen_after_they_are_over(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, set(range(3, 15)), inputs_that_overflow)
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=2, batch_size=2)
    script.fit(config, small_data(), CPU)
    assert "back to epoch 1, step 0, with 0.5 of the rate" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", [0.0, 10.0])
def test_when_a_state_was_saved_does_not_matter_to_a_setback(tmp_path, monkeypatch, capsys, minutes):
    """A state from the middle of an epoch may be doomed already: the epoch's beginning is gone back to."""
    poisoned(monkeypatch, {10}, spoil_a_weight)  # the second step of the third epoch
    config = dataclasses.replace(SMALL, model="tiny", output_dir=str(tmp_path), num_epochs=4,
                                 checkpoint_minutes=minutes)
    data = small_data()
    script.fit(config, data, CPU, keeper=script.RunKeeper(config, tmp_path / "last.pth", script.identify_run(
        config, data, CPU)))
    assert "back to epoch 3, step 0, with 0.5 of the rate" in capsys.readouterr().out


def test_a_state_from_the_middle_of_an_epoch_holds_its_beginning(tmp_path, monkeypatch, capsys):
    """What goes on from there goes back to where the run that was not stopped would have gone back to."""
    config, data = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=3), small_data()
    about = interrupt(config, data, monkeypatch, steps=6)
    assert script.read_content(tmp_path / "last.pth")["progress"]["steps"] == 2
    poisoned(monkeypatch, {1}, spoil_a_weight)
    script.fit(config, data, CPU, keeper=script.RunKeeper(config, tmp_path / "last.pth", about))
    out = capsys.readouterr().out
    assert "goes on from last.pth: epoch 2 of 3, step 2" in out and "back to epoch 2, step 0, with 0.5 of" in out


def test_a_state_of_another_network_is_one_line(tmp_path, monkeypatch):
    """Its settings are the same, but script.py was changed."""
    config, data = dataclasses.replace(SMALL, output_dir=str(tmp_path), model="tiny"), small_data()
    about = interrupt(config, data, monkeypatch, steps=2)
    monkeypatch.setitem(script.MODELS, "tiny", script.DigitCNN)
    with pytest.raises(DataError, match=r"last.pth: does not fit the network .*; give it back .* --no-resume$"):
        script.fit(config, data, CPU, keeper=script.RunKeeper(config, tmp_path / "last.pth", about))


def test_a_network_kept_by_an_unfinished_run_and_spoilt_since_is_told_at_once(tmp_path, monkeypatch):
    config, data = dataclasses.replace(SMALL, output_dir=str(tmp_path), model="tiny"), small_data()
    about = interrupt(config, data, monkeypatch, steps=6)
    whole = (tmp_path / "best_model.pth").read_bytes()
    (tmp_path / "best_model.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"whose best_model.pth, of epoch 1, is spoilt .*; put it back"):
        script.RunKeeper(config, tmp_path / "last.pth", about)


def test_a_signal_during_the_last_epochs_end_is_not_lost(tmp_path, monkeypatch):
    config, data = dataclasses.replace(SMALL, output_dir=str(tmp_path), model="tiny", resume=False), small_data()
    keeper, real = script.RunKeeper(config, tmp_path / "last.pth"), script.close_epoch

    def close(learner, data, progress, *rest):
        real(learner, data, progress, *rest)
        if progress.epoch > config.num_epochs:
            keeper.stops.waiting = signal.SIGTERM

    monkeypatch.setattr(script, "close_epoch", close)
    with pytest.raises(script.Stopped, match="the same command without --no-resume goes on from there"):
        script.fit(config, data, CPU, keeper=keeper)
    assert script.read_content(tmp_path / "last.pth")["progress"]["epoch"] == config.num_epochs + 1


def test_numbers_without_a_limit_are_no_answer():
    """Of logits of +inf, probabilities are no numbers; logarithms of 0 are sound."""
    data, config = small_data(), dataclasses.replace(SMALL, augment=False)
    bias = torch.nn.Parameter(torch.tensor([0.0, math.inf, 0.0, 0.0]))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    model[1].bias = bias
    with pytest.raises(DataError, match="its training diverged"):
        script.predict(model, data.dataset, np.arange(4), config, CPU)
    bias.data[1] = -math.inf
    assert (script.predict(model, data.dataset, np.arange(4), config, CPU)[:, 1] == 0).all()


def test_features_too_large_to_be_remembered_are_one_line():
    data, config = small_data(), dataclasses.replace(SMALL, model="tiny", neighbours=5)
    model = script.build_model(config, 4)
    model.conv5[0][1].weight.data[:] = 1e30
    trained = script.Trained(model, config, data.classes, data.statistics, {})
    with pytest.raises(DataError, match="too large to be remembered: its training diverged"):
        script.remember(trained, data, CPU)


def test_the_vote_is_part_of_what_prediction_takes(monkeypatch):
    """A tiny network answers faster than the memory of many training images does."""
    seconds = {script.NeighbourVote: 1e-3, script.TinyCNN: 1e-6}
    monkeypatch.setattr(script, "seconds_per_image", lambda model, *_: seconds[type(model)])
    config = dataclasses.replace(SMALL, model="tiny", max_minutes=2.0, pictures=False)
    left = [script.seconds_to_train(dataclasses.replace(config, neighbours=count), small_data(), 20_000, CPU,
                                    time.monotonic()) for count in (30, 0)]
    assert left[1] - left[0] == pytest.approx(30, abs=1)


def test_time_that_passes_before_the_first_step_is_part_of_the_training(tmp_path, monkeypatch):
    real, paces = script.start_model, []

    def slowly(*arguments, **options):
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(script, "start_model", slowly)
    monkeypatch.setattr(Pace, "go_on", lambda *_: None)
    begin = script.RunKeeper.begin
    monkeypatch.setattr(script.RunKeeper, "begin", lambda keeper, learner, data, pace: (
        paces.append(pace), begin(keeper, learner, data, pace))[1])
    script.fit(dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=1), small_data(), CPU, seconds=100)
    assert 95 < paces[0].seconds <= 99.5


def test_training_that_always_diverges_ends_with_the_best_model_intact(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, set(range(10, 10_000)), inputs_that_overflow)
    monkeypatch.setattr(script, "FAULT_STEPS", 5)
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=40)
    with pytest.raises(DataError, match=r"training diverges: .* at 0.125 of the rate; .* --learning-rate below 0.003; "
                                        r"best_model.pth holds epoch [12]$"):
        script.fit(config, small_data(), CPU)
    assert capsys.readouterr().out.count("of the rate") == 3
    assert script.load_checkpoint(tmp_path / "best_model.pth").metrics["epoch"] <= 2


def test_running_out_of_memory_names_the_batch_size_to_try(tmp_path, monkeypatch):
    def exhaust(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Learner, "learn", exhaust)
    with pytest.raises(DataError, match="out of memory with batches of 8 images; try --batch-size 4, with --accum"):
        script.fit(dataclasses.replace(SMALL, output_dir=str(tmp_path)), small_data(), CPU)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")])
def test_running_out_of_memory_in_validation_names_its_own_batch_size(tmp_path, monkeypatch, error):
    runtime = dataclasses.replace(CPU, eval_batch_size=64)

    def exhaust(*_, **__):
        raise error

    monkeypatch.setattr(script, "to_input", exhaust)  # augmentation is trained on
    with pytest.raises(DataError, match="out of memory while predicting 64 images at a time; try --eval-batch-size 32"):
        script.fit(dataclasses.replace(SMALL, output_dir=str(tmp_path)), small_data(), runtime)


def test_the_clock_ends_training_between_steps_of_the_optimizer(tmp_path, monkeypatch):
    """Not inside a group of accumulated batches, where the ranks may not agree on the numbers."""
    updates, real = [], Learner.learn

    def learn(self, *arguments):
        updates.append(arguments[-1])
        return real(self, *arguments)

    monkeypatch.setattr(Learner, "learn", learn)
    monkeypatch.setattr(Pace, "progress", lambda pace, step: step / 4)  # over after the first batch of the second group
    data, config = small_data(80), dataclasses.replace(SMALL, output_dir=str(tmp_path), accumulate=3)
    script.fit(config, data, CPU)
    assert updates == [False, False, True, False, False, True]


def test_averaged_weights_follow_a_decay_that_warms_up():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    average = script.AveragedWeights(model, decay=0.5)
    expected = model[0].weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model[0].weight += 1
            model[1].running_mean += 1
        average.update(step, torch.ones(()))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    assert torch.allclose(average.model[0].weight, expected)
    assert 10.5 < average.model[1].running_mean.item() < 12 and not average.model[0].weight.requires_grad


def test_training_learns_and_writes_its_history(tmp_path, capsys):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=10, augment=False)
    history = script.fit(config, small_data(), CPU)
    assert history.columns.tolist() == script.HISTORY_COLUMNS
    written = pd.read_csv(tmp_path / "history.csv")
    pd.testing.assert_frame_equal(written, history)
    assert history.val_accuracy.iloc[-1] >= 0.75 and history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    best = script.load_checkpoint(tmp_path / "best_model.pth")
    assert best.metrics["val_accuracy"] == history.val_accuracy.max()
    equals = history[history.val_accuracy == history.val_accuracy.max()]
    assert best.metrics["epoch"] == equals.epoch[equals.val_loss.idxmin()]
    assert best.config == config and best.classes == ["0", "10", "20", "30"]
    assert capsys.readouterr().out.count("epoch ") == 10


def test_select_by_loss_and_no_validation_rows(tmp_path):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=6, select_by="loss")
    history = script.fit(config, small_data(), CPU)
    assert script.load_checkpoint(tmp_path / "best_model.pth").metrics["val_loss"] == history.val_loss.min()
    everything = dataclasses.replace(small_data(), train_rows=np.arange(40), val_rows=np.array([], dtype=np.int64))
    history = script.fit(config, everything, CPU)
    assert history.val_loss.isna().all()
    assert script.load_checkpoint(tmp_path / "best_model.pth").metrics["epoch"] == 6


def test_compile_wraps_what_is_trained_and_leaves_the_checkpoint_plain(tmp_path, monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: wrapped.append(network) or network)
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=1, compile=True)
    script.fit(config, small_data(), CPU)
    assert len(wrapped) == 1 and isinstance(wrapped[0], script.InPrecision)
    assert all(name.startswith(("conv", "hidden", "head"))
               for name in script.load_checkpoint(tmp_path / "best_model.pth").model.state_dict())


def test_plateau_lowers_the_rate_when_accuracy_stands_still(tmp_path, monkeypatch):
    figures = {"val_loss": 1.0, "val_accuracy": 0.5, "val_top3_accuracy": 0.5, "val_class_accuracy": 0.5}
    monkeypatch.setattr(script, "validate", lambda *_: figures)
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=6, schedule="plateau", plateau_patience=1)
    rates = script.fit(config, small_data(), CPU).learning_rate
    assert rates.tolist() == pytest.approx([3e-3, 3e-3, 3e-3, 1.5e-3, 1.5e-3, 7.5e-4])


def test_plateau_keeps_the_rate_while_accuracy_rises_by_little(tmp_path, monkeypatch):
    """One image more of many, each epoch."""
    figures = {"val_loss": 1.0, "val_top3_accuracy": 0.5, "val_class_accuracy": 0.5}
    hits = itertools.count(11_500)
    monkeypatch.setattr(script, "validate", lambda *_: {**figures, "val_accuracy": next(hits) / 13_447})
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=4, schedule="plateau", plateau_patience=0)
    assert script.fit(config, small_data(), CPU).learning_rate.tolist() == pytest.approx([3e-3] * 4)


@pytest.mark.parametrize("settings", [{}, {"mixup": True}, {"cutmix": True}, {"thickness": 0.5}, {"max_grad_norm": 0.0},
                                      {"average_decay": 0.0}, {"augment": False}, {"precision": "bf16"},
                                      {"model": "resnet"}])
def test_two_fits_with_one_seed_are_equal_bit_for_bit(tmp_path, settings):
    runtime = dataclasses.replace(CPU, precision=settings.get("precision", "float32"))
    weights = []
    for number in range(2):
        config = dataclasses.replace(SMALL, output_dir=str(tmp_path / str(number)), num_epochs=1, **settings)
        (tmp_path / str(number)).mkdir()
        torch.manual_seed(number)  # what the caller did to the global generator must not matter
        script.fit(config, small_data(16), runtime)
        weights.append(script.load_checkpoint(tmp_path / str(number) / "best_model.pth").model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_gradients_are_clipped_and_small_weights_not_decayed():
    learner = learner_of(dataclasses.replace(SMALL, max_grad_norm=1.0))
    norms = []
    learner.optimizer.register_step_pre_hook(lambda *_: norms.append(
        torch.stack([weight.grad.norm() for weight in learner.model.parameters()]).norm().item()))
    sum((weight * 100).sum() for weight in learner.model.parameters()).backward()
    learner.batches = 1
    learner.descend(progress=0.5)
    assert norms == [pytest.approx(1.0, abs=5e-3)]  # float32 adds up two million equal squares
    groups = learner.optimizer.param_groups
    decays = {group["weight_decay"]: {weight.ndim for weight in group["params"]} for group in groups}
    assert decays == {0.01: {2, 4}, 0.0: {1}}


def test_several_gpus_keep_plain_names(monkeypatch):
    two, config = dataclasses.replace(CPU, gpus=2), dataclasses.replace(SMALL, batch_size=128)
    learner = learner_of(config, two)
    assert isinstance(learner.network, torch.nn.DataParallel)
    assert not any(name.startswith("module.") for name in learner.result.state_dict())


def test_one_of_several_gpus_trains_on_steps_too_small_for_their_batch_norm(capsys):
    """A table with fewer rows than batch_size has smaller steps than that."""
    two, config = dataclasses.replace(CPU, gpus=2), dataclasses.replace(SMALL, batch_size=128)
    model = CPU.place(script.build_model(config, 4))
    for least in (57, 127):
        assert not isinstance(Learner(config, model, 4, two, least).network, torch.nn.DataParallel)
        assert "one of 2 GPUs trains: a step has too few images for more; give --batch-size 128" in (
            capsys.readouterr().err)


def test_compiling_for_several_gpus_of_one_process_is_refused(monkeypatch):
    monkeypatch.setattr(script, "choose_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(script, "best_precision", lambda device: "bf16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"--compile does not reach .* 2 GPUs; .*per-node=2 .* --device cuda:0"):
        script.start_runtime(Config(compile=True))


def test_threads_of_several_gpus_compute_in_the_runs_precision():
    """DataParallel's threads start without the caller's autocast dtype: the network enters it itself."""
    learner = learner_of(SMALL, dataclasses.replace(CPU, precision="bf16"))
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        logits = pool.submit(learner.network.eval(), torch.zeros(2, 1, 8, 8)).result()
    assert logits.dtype == torch.bfloat16


def test_no_host_synchronisation_in_a_step(monkeypatch):
    """A step reads nothing back from the device: no item(), tolist(), cpu() or truth value of a tensor."""
    learner, data = learner_of(SMALL), small_data()
    batch = data.batch(np.arange(8))
    learner.learn(batch, epoch=1, progress=0.1)  # the optimizer reads its fresh state once

    def forbidden(*_):
        raise AssertionError("a step waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    learner.learn(batch, epoch=1, progress=0.2)


def test_time_for_training_is_what_the_rest_leaves():
    data = small_data()
    started = time.monotonic()
    assert script.seconds_to_train(SMALL, data, 10, CPU, started) == math.inf
    limited = dataclasses.replace(SMALL, max_minutes=1.0)
    assert 35 < script.seconds_to_train(limited, data, 10, CPU, started) < 41
    bare = dataclasses.replace(limited, pictures=False)
    assert 45 < script.seconds_to_train(bare, data, 10, CPU, started) < 51
    with pytest.raises(UsageError, match="leaves no time to train"):
        script.seconds_to_train(limited, data, 10, CPU, started - 58)


def test_training_ends_with_its_time(tmp_path, monkeypatch):
    ticks = itertools.count()  # a clock that goes on by a hundredth of a second whenever it is read
    monkeypatch.setattr(script, "time", types.SimpleNamespace(monotonic=lambda: next(ticks) / 100))
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_epochs=100_000)
    history = script.fit(config, small_data(), CPU, seconds=1.0)
    assert 5 < len(history) < 25
    assert history.learning_rate.iloc[-1] < 1e-4 < history.learning_rate.max()  # the schedule was run through


def checkpoint(tmp_path, **content):
    """A whole checkpoint, with some of its entries replaced."""
    path = tmp_path / "model.pth"
    config = SMALL
    model = script.build_model(config, 3)
    script.save_checkpoint(path, script.Trained(model, config, ["1", "2", "NA"], ImageStatistics(0, 8), {"epoch": 1}))
    script.write_content(path, {**script.read_content(path), **content})
    return path, model


def test_a_checkpoint_holds_all_that_prediction_needs(tmp_path):
    path, model = checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"model", "config", "classes", "image_statistics", "metrics", "labels", "versions", "memory",
                            "sha256"}
    assert set(content["config"]) == set(dataclasses.asdict(SMALL))
    assert {"torch", "python", "numpy"} <= content["versions"].keys()
    trained = script.load_checkpoint(path)
    assert trained.config == SMALL and trained.classes == ["1", "2", "NA"]
    assert trained.statistics == ImageStatistics(0, 8)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(trained.model.eval()(images), model.eval()(images))


class Payload:
    """What unpickling must never run."""

    def __reduce__(self):
        return (print, ("payload",))


def test_checkpoints_that_are_none_are_refused(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    with pytest.raises(DataError, match=r"bad.pth: no such checkpoint"):
        script.load_checkpoint(path)
    for content in (b"", b"text", checkpoint(tmp_path)[0].read_bytes()[:2000]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad.pth: not a whole checkpoint"):
            script.load_checkpoint(path)
    torch.save({"model": Payload()}, path)
    with pytest.raises(DataError, match=r"bad.pth: not a whole checkpoint"):
        script.load_checkpoint(path)
    torch.save(script.build_model(SMALL, 3).state_dict(), path)
    with pytest.raises(DataError, match=r"not a whole checkpoint of script\.py"):
        script.load_checkpoint(path)
    assert "payload" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"classes": ["1", "2"]}, {"config": {"model": "resnet", "dropout": 0.1}},
                                     {"config": {"model": "vgg"}}, {"config": []}, {"model": 3},
                                     {"image_statistics": {"paper": 0}}])
def test_checkpoints_that_do_not_fit_together_are_refused(tmp_path, content):
    with pytest.raises(DataError, match="not a whole checkpoint"):
        script.load_checkpoint(checkpoint(tmp_path, **content)[0])
