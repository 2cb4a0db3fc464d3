"""script.py: fit, train and validate, what a checkpoint holds, and what the time limit leaves for training."""

import dataclasses
import math
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import script
from pipeline.clock import TimeLimit, TrainingClock
from pipeline.device import Runtime
from pipeline.errors import DataError, UsageError
from pipeline.files import load_verified, save_verified, sha256_of
from pipeline.images import ImageStatistics
from pipeline.metrics import HISTORY_COLUMNS
from pipeline.models import DigitCNN
from pipeline.resume import CheckpointManager, TrainingState
from pipeline.signals import Stopped, StopSignals
from pipeline.splits import Split, image_digests, split_rows
from pipeline.tables import Table
from script import CompetitionData, Config, MathSymbolDataset, Trainer

SMALL = Config(model="tiny", image_size=8, plain_epochs=0.0, batch_size=8, num_epochs=3,
               learning_rate=1e-2, dropout=0.0, precision="float32", ema_decay=0.9, train_val_split=0.8, min_steps=0)
CPU = Runtime()


class HookedDataset(MathSymbolDataset):
    """Calls `before_step(number, inputs)` with each training batch, counted from 1, and `before_prediction()`."""

    steps = 0
    before_step: Callable[[int, torch.Tensor], object] = staticmethod(lambda number, inputs: None)
    before_prediction: Callable[[], object] = staticmethod(lambda: None)

    def batch(self, rows, seed=None):
        inputs, classes, weights = super().batch(rows, seed)
        if seed is None:
            self.before_prediction()
        else:
            self.steps += 1
            self.before_step(self.steps, inputs)
        return inputs, classes, weights


def make_data(config: Config = SMALL, rows: int = 40, classes: int = 4, runtime: Runtime = CPU) -> CompetitionData:
    """Return images with a bar at the place that their class says, with noise."""
    targets = np.arange(rows) % classes
    images = np.random.default_rng(0).integers(0, 60, (rows, 8, 8), dtype=np.uint8)
    images[np.arange(rows), targets * 2] = 255
    labels = pd.DataFrame({"label": (10 * targets).astype(str)}, index=pd.RangeIndex(2, rows + 2))
    dataset = HookedDataset(Table("train.csv", labels, pixels=images), config, None, ImageStatistics(0, 8), runtime)
    split = split_rows(config.split, dataset.targets, np.arange(rows), image_digests(images), None, "train.csv")
    return CompetitionData(dataset, dataset, split, {}, np.zeros(0, dtype=np.int64))


def into(folder: Path, config: Config = SMALL, **settings) -> Config:
    return dataclasses.replace(config, output_dir=str(folder), **settings)


def make_manager(config: Config, data: CompetitionData, **options) -> CheckpointManager:
    return CheckpointManager(Path(config.output_dir), script.run_fingerprint(config, data), **options)


def stop_in_step(data: CompetitionData, stops: StopSignals, step: int) -> None:
    """Let SIGTERM arrive in a step, counted from the next one."""
    last = data.dataset.steps + step

    def before_step(number: int, _inputs: torch.Tensor) -> None:
        if number == last:
            stops.pending = signal.SIGTERM

    data.dataset.before_step = before_step


def interrupt(config: Config, data: CompetitionData, step: int) -> str:
    """Stop a training in a step, which leaves last.pth, and return the message."""
    stops = StopSignals()
    stop_in_step(data, stops, step)
    with pytest.raises(Stopped) as stopped:
        script.fit(config, data, manager=make_manager(config, data), stops=stops)
    assert stopped.value.number == signal.SIGTERM
    return str(stopped.value)


def poison_steps(data: CompetitionData, steps: set[int]) -> None:
    """Let the inputs of some steps be no numbers."""
    data.dataset.before_step = lambda number, inputs: inputs.fill_(math.nan) if number in steps else None


def kept(config: Config) -> script.TrainedModel:
    return script.load_checkpoint(Path(config.output_dir, config.model_file))


def all_finite(model: torch.nn.Module) -> bool:
    return all(value.isfinite().all() for value in model.state_dict().values())


# ---- Training -------------------------------------------------------------------------------------------------------

def test_training_learns_and_writes_its_history(tmp_path, capsys):
    config = into(tmp_path, num_epochs=10, augment=False)
    history, _ = script.fit(config, make_data(config))
    assert history.columns.tolist() == HISTORY_COLUMNS and history.epoch.tolist() == list(range(1, 11))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history)
    assert history.val_accuracy.iloc[-1] >= 0.75 and history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    best = kept(config)
    assert best.metrics["val_accuracy"] == history.val_accuracy.max()
    equals = history[history.val_accuracy == history.val_accuracy.max()]
    assert best.metrics["epoch"] == equals.epoch[equals.val_loss.idxmin()]
    assert best.config == config and best.classes == ["0", "10", "20", "30"]
    assert capsys.readouterr().out.count("epoch ") == 10


@pytest.mark.parametrize("schedule", ["cosine", "cyclic", "step", "multistep", "plateau", "constant", "accumulated"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_every_optimizer_and_schedule_learns(tmp_path, optimizer, schedule):
    accumulated = schedule == "accumulated"
    config = into(tmp_path, optimizer=optimizer, schedule="cosine" if accumulated else schedule, ema_decay=0.0,
                  learning_rate=0.1 if optimizer == "sgd" else 2e-2, num_epochs=4, step_epochs=2, gamma=0.5,
                  milestones="2,3", augment=False, accumulation_steps=3 if accumulated else 1)
    history, _ = script.fit(config, make_data(config, 200))
    assert history.train_accuracy.iloc[-1] > 0.9 and history.train_loss.argmin() > 0
    assert np.isfinite(history.val_loss).all()


def test_select_by_loss_keeps_the_epoch_of_the_lowest_loss(tmp_path):
    config = into(tmp_path, num_epochs=6, select_by="loss")
    history, _ = script.fit(config, make_data(config))
    assert kept(config).metrics["val_loss"] == history.val_loss.min()


def test_without_validation_rows_the_last_epoch_is_kept(tmp_path):
    config = into(tmp_path, train_val_split=1.0)
    data = make_data(config)
    assert len(data.split.train_rows) == 40
    history, _ = script.fit(config, data)
    assert history.val_loss.isna().all() and kept(config).metrics["epoch"] == 3


def test_early_stopping_ends_a_training_that_does_not_improve(tmp_path, capsys):
    config = into(tmp_path, learning_rate=1e-9, ema_decay=0.0, num_epochs=50, warmup=0.0, early_stopping=3,
                  model="mlp")
    history, _ = script.fit(config, make_data(config))
    assert "stopped early: 3 epochs without a better validation accuracy" in capsys.readouterr().out
    assert len(history) < 50 and kept(config).metrics["epoch"] == len(history) - 3


def test_plateau_lowers_the_rate_while_accuracy_stands_still(tmp_path):
    config = into(tmp_path, learning_rate=1e-6, ema_decay=0.0, model="mlp", num_epochs=8, schedule="plateau")
    history, _ = script.fit(config, make_data(config))
    assert history.val_accuracy.nunique() == 1, "at this rate nothing is learned"
    assert history.learning_rate.tolist() == pytest.approx([1e-6] * 4 + [5e-7] * 3 + [2.5e-7])


@pytest.mark.parametrize("settings", [{}, {"mixup": True}, {"max_grad_norm": 0.0}, {"ema_decay": 0.0},
                                      {"augment": False}, {"precision": "bf16"}, {"dropout": 0.5},
                                      {"model": "cnn", "dropout": 0.3}, {"model": "resnet", "dropout": 0.1}])
def test_two_trainings_with_one_seed_are_equal_bit_for_bit(tmp_path, settings):
    weights = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        config = into(tmp_path / str(number), num_epochs=1, **settings)
        torch.manual_seed(number)  # the global generator's state must not matter
        script.fit(config, make_data(config, 20, runtime=Runtime(precision=config.precision)))
        weights.append(sha256_of(kept(config).model.state_dict()))
    assert weights[0] == weights[1]


def test_another_seed_is_another_training(tmp_path):
    digests = []
    for seed in (0, 1):
        config = into(tmp_path, num_epochs=1, seed=seed)
        script.fit(config, make_data(config, 20))
        digests.append(sha256_of(kept(config).model.state_dict()))
    assert digests[0] != digests[1]


def test_a_frozen_body_keeps_its_weights(tmp_path):
    config = into(tmp_path, freeze_epochs=1, num_epochs=1, ema_decay=0.0)
    fresh = script.build_model(config, 4).state_dict()
    script.fit(config, make_data(config))
    frozen = kept(config).model.state_dict()
    assert {name.split(".")[0] for name in fresh if not torch.equal(fresh[name], frozen[name])} == {"head"}
    config = into(tmp_path, freeze_epochs=1, num_epochs=2, ema_decay=0.0, train_val_split=1.0)  # keeps the last epoch
    script.fit(config, make_data(config))
    trained = kept(config).model.state_dict()
    assert not any(torch.equal(fresh[name], trained[name]) for name in fresh if name.endswith("weight"))


@pytest.mark.parametrize("normalize", ["standard", "min-max"])
def test_normalization_is_measured_on_the_training_rows_and_kept(tmp_path, normalize):
    config = into(tmp_path, normalize=normalize, augment=False)
    data = make_data(config)
    ink = data.dataset.images[data.split.train_rows].float() / 255
    layer = script.start_model(config, data).normalize
    if normalize == "standard":
        assert layer.offset.item() == pytest.approx(ink.mean().item(), abs=1e-5)
        assert layer.scale.item() == pytest.approx(ink.std(correction=0).item(), abs=1e-5)
    else:
        assert torch.allclose(layer.offset, ink.amin(dim=0, keepdim=True))
        assert layer(ink).amin() == 0 and layer(ink).amax() == 1
    script.fit(config, data)
    saved = kept(config).model.normalize
    assert torch.allclose(saved.offset, layer.offset) and torch.allclose(saved.scale, layer.scale)


def test_rows_of_a_small_weight_are_learned_less(tmp_path):
    """Rows of an extra table contradict the others; their weight decides which are believed."""
    accuracies = []
    for weight in (0.01, 100.0):
        config = into(tmp_path, num_epochs=10, augment=False, label_smoothing=0.0, learning_rate=2e-2)
        data = make_data(config, 80)
        wrong = make_data(config, 80).dataset
        wrong.targets = (wrong.targets + 1) % 4
        wrong.class_tensor = torch.from_numpy(wrong.targets)
        data.dataset.append(wrong, weight)
        rows = np.concatenate([data.split.train_rows, 80 + np.arange(80)])
        history, _ = script.fit(config, dataclasses.replace(data, split=Split(rows, data.split.val_rows)))
        accuracies.append(history.val_accuracy.iloc[-1])
        assert history.train_accuracy.iloc[-1] > 0.9, "training figures are weighted too"
    assert accuracies[0] > 0.9 and accuracies[1] < 0.1


def test_validate_returns_the_figures_of_the_validation_rows():
    data, clock = make_data(), TrainingClock(3, 4)
    trainer = Trainer(SMALL, script.build_model(SMALL, 4), CPU, 8)
    figures, returned = script.validate(trainer, data, clock)
    probabilities = script.predict(trainer.result, data.dataset, data.split.val_rows)
    assert figures == script.score(probabilities, data.dataset.targets[data.split.val_rows])
    assert clock.seconds_per_answer > 0 and np.array_equal(returned, probabilities)
    assert script.validate(trainer, dataclasses.replace(data, split=Split(np.arange(40), np.arange(0))),
                           clock) == ({}, None)


def test_fit_returns_the_validation_probabilities_of_the_best_epoch(tmp_path, monkeypatch):
    """Without the vote they are not computed a second time."""
    config = into(tmp_path)
    data = make_data(config, 200)
    monkeypatch.setattr(script.metrics, "is_better", lambda row, *others: row["epoch"] == 2)
    _, probabilities = script.fit(config, data)
    network = CPU.to_device(kept(config).model)
    assert np.array_equal(probabilities, script.predict(network, data.dataset, data.split.val_rows))
    predictions = script.finish_network(dataclasses.replace(config, knn_neighbors=5), data, True, probabilities)[1]
    assert not np.array_equal(predictions.probabilities, probabilities), "the vote changes them"
    monkeypatch.setattr(script, "predict", None)
    assert script.finish_network(config, data, False, probabilities)[1].probabilities is probabilities


def test_a_resumed_training_without_a_better_epoch_returns_no_probabilities(tmp_path, monkeypatch):
    """Those of the best epoch were an earlier process's: its network is asked again."""
    config = into(tmp_path)
    data = make_data(config)
    monkeypatch.setattr(script.metrics, "is_better", lambda row, *others: row["epoch"] == 2)
    interrupt(config, data, step=10)
    history, probabilities = script.fit(config, data, manager=make_manager(config, data))
    assert len(history) == 3 and probabilities is None
    predictions = script.finish_network(config, data, False, probabilities)[1]
    expected = script.predict(CPU.to_device(kept(config).model), data.dataset, data.split.val_rows)
    assert np.array_equal(predictions.probabilities, expected)


def test_train_returns_the_means_of_its_steps(tmp_path):
    """At a rate of nearly 0 they are those of the network that it began with."""
    config = into(tmp_path, learning_rate=1e-9, ema_decay=0.0, augment=False, label_smoothing=0.0, model="mlp")
    data, model = make_data(config), script.build_model(config, 4)
    trainer, clock = Trainer(config, model, CPU, 8), TrainingClock(3, 4)
    figures = script.train(trainer, data, TrainingState(), clock, CheckpointManager(), StopSignals())
    shown = dataclasses.replace(data, split=Split(np.arange(0), data.split.train_rows))
    expected, _ = script.validate(trainer, shown, clock)
    assert figures["train_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
    assert figures["train_accuracy"] == pytest.approx(expected["val_accuracy"])


# ---- Time -----------------------------------------------------------------------------------------------------------

class StepClock(TrainingClock):
    """A training that is over after so many batches."""

    def __init__(self, batches: int):
        super().__init__(1, batches)
        self.batches = batches

    def progress(self, step: int) -> float:
        return min(1.0, step / self.batches)


def test_the_clock_ends_training_between_optimizer_steps():
    """Not inside a group of accumulated batches, where ranks may see different times."""
    config = dataclasses.replace(SMALL, accumulation_steps=3)
    data = make_data(config, 80)  # 64 training rows: groups of 3, 3 and 2 batches
    trainer, state = Trainer(config, script.build_model(config, 4), CPU, 8), TrainingState()
    script.train(trainer, data, state, StepClock(4), CheckpointManager(), StopSignals())
    assert (trainer.step, trainer.updates, state.step, state.images) == (6, 2, 6, 48)


def test_training_ends_with_its_time_and_runs_through_the_schedule(tmp_path):
    config = into(tmp_path, num_epochs=100_000)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # torch's first optimizer imports its compiler
    history, _ = script.fit(config, make_data(config), TimeLimit(2.0))
    assert len(history) < 100_000
    assert history.learning_rate.iloc[-1] < history.learning_rate.max() / 10


def test_time_that_passes_before_the_first_step_is_part_of_the_training(tmp_path):
    config = into(tmp_path, normalize="standard")  # which is measured before the first step
    data = make_data(config)
    data.dataset.before_prediction = lambda: time.sleep(0.2)
    history, _ = script.fit(config, data, TimeLimit(0.2))
    assert data.dataset.steps == 0 and len(history) == 1


def seconds_left(config: Config, data: CompetitionData, used: float = 0.0, found: dict | None = None) -> float:
    manager = CheckpointManager()
    manager.found = found
    limit = script.measure_limit(config, data, time.monotonic() - used, manager)
    return limit.for_training(limit.seconds_per_answer)


def test_the_time_limit_leaves_what_prediction_and_pictures_do_not_need():
    data, limited = make_data(), dataclasses.replace(SMALL, max_minutes=1.0)
    assert seconds_left(SMALL, data) == math.inf
    with_pictures, without = (seconds_left(dataclasses.replace(limited, pictures=on), data) for on in (True, False))
    assert 40 < with_pictures < without - 2 < 58
    assert seconds_left(limited, data, used=20) < without - 18


def test_the_pace_of_answers_is_the_usual_one_and_not_the_fastest(monkeypatch):
    data, config = make_data(), dataclasses.replace(SMALL, max_minutes=1.0, knn_neighbors=0)
    monkeypatch.setattr(script.timeit, "repeat", lambda *_, **__: [9.0, 1.0, 3.0, 4.0, 2.0])
    expected = 3 / min(len(data.split.train_rows), 4 * data.dataset.runtime.eval_batch_size)
    limit = script.measure_limit(config, data, time.monotonic(), CheckpointManager())
    assert limit.seconds_per_answer == pytest.approx(expected)


def test_a_time_limit_that_leaves_no_time_is_refused_for_a_new_training():
    data, limited = make_data(), dataclasses.replace(SMALL, max_minutes=1.0)
    with pytest.raises(UsageError, match=r"--max-minutes 1 leaves no time to train: 58 s are used, "
                                         r"validation and prediction take \d+ s"):
        seconds_left(limited, data, used=58)
    assert seconds_left(limited, data, used=58, found={"elapsed": 58.0}) < 0, "a found training is finished"


def test_the_nearest_neighbour_vote_is_part_of_what_prediction_takes():
    """A tiny network is faster than the search through the features of many training images."""
    config, data = dataclasses.replace(SMALL, max_minutes=1000.0), make_data(runtime=Runtime(eval_batch_size=4))
    many = dataclasses.replace(data, split=Split(np.zeros(100_000, dtype=np.int64), data.split.val_rows))
    without = dataclasses.replace(config, knn_neighbors=0)
    assert seconds_left(config, many) < seconds_left(without, many) - 1


def test_a_vote_that_takes_too_much_of_the_time_is_left_out(monkeypatch, capsys):
    config, data = dataclasses.replace(SMALL, max_minutes=1000.0, knn_neighbors=5), make_data()
    votes = script.measure_limit(config, data, time.monotonic(), CheckpointManager())
    monkeypatch.setattr(script, "VOTE_SHARE", 1e-9)
    monkeypatch.setattr(script, "empty_knn_index", None)  # the features alone take too long: the vote is not timed
    none = script.measure_limit(config, data, time.monotonic(), CheckpointManager())
    assert votes.votes and not none.votes and none.answers < votes.answers
    assert re.fullmatch(r"no nearest-neighbour vote, which takes at least \d+ s: .*\n", capsys.readouterr().out)
    assert not script.measure_limit(dataclasses.replace(config, knn_neighbors=0), data, time.monotonic(),
                                    CheckpointManager()).votes


def test_validation_rows_are_answered_once_more_for_the_vote_or_after_a_resume():
    data, without = make_data(), dataclasses.replace(SMALL, knn_neighbors=0)
    train, val, test = len(data.split.train_rows), len(data.split.val_rows), len(data.test)

    def answers(config: Config, found: dict | None = None) -> float:
        manager = CheckpointManager()
        manager.found = found
        return script.measure_limit(config, data, time.monotonic(), manager).answers

    for minutes in (0.0, 1.0):
        config = dataclasses.replace(without, max_minutes=minutes)
        assert answers(config) == val + test and answers(config, {"elapsed": 0.0}) == 2 * val + test
    assert answers(dataclasses.replace(SMALL, knn_neighbors=5)) == 2 * val + test + train


def test_without_validation_rows_the_answers_keep_their_time(tmp_path, monkeypatch):
    """There is nothing to measure them by, and an empty validation takes no time."""
    clocks = []
    monkeypatch.setattr(script, "TrainingClock", lambda *given: clocks.append(TrainingClock(*given)) or clocks[-1])
    limit = TimeLimit(1000, answers=10, seconds_per_answer=7.0)
    script.fit(into(tmp_path, train_val_split=1.0), make_data(dataclasses.replace(SMALL, train_val_split=1.0)), limit)
    assert clocks[0].seconds_per_answer == 7
    script.fit(into(tmp_path), make_data(), limit)
    assert 0 < clocks[1].seconds_per_answer < 7


def test_a_settled_training_ends_early_and_says_so(tmp_path, capsys):
    """At a rate of nearly 0 nothing is learnt. Seven epochs of four steps are compared with the seven before them."""
    config = into(tmp_path, num_epochs=100, learning_rate=1e-9, min_steps=600, ema_decay=0.0, augment=False)
    data = make_data(config)
    history, _ = script.fit(config, data)
    printed = capsys.readouterr().out
    assert len(history) == 21 and "the training accuracy has stopped rising: 7 more epochs\nepoch  15/21" in printed
    assert history.learning_rate.iloc[-1] < history.learning_rate.max() / 20
    assert len(script.fit(dataclasses.replace(config, min_steps=0, num_epochs=30), data)[0]) == 30


def test_a_settled_training_that_is_stopped_ends_as_if_it_had_not_been(tmp_path):
    config = into(tmp_path / "a", num_epochs=100, learning_rate=1e-9, min_steps=600, ema_decay=0.0, augment=False)
    data = make_data(config)
    (tmp_path / "a").mkdir()
    interrupt(config, data, step=70)  # of 84
    history, _ = script.fit(config, data, manager=make_manager(config, data))
    assert len(history) == 21 and data.dataset.steps == 84
    (tmp_path / "b").mkdir()
    whole, _ = script.fit(dataclasses.replace(config, output_dir=str(tmp_path / "b")), data)
    assert whole.learning_rate.tolist() == history.learning_rate.tolist()


# ---- Steps without finite numbers -----------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.0}, {"optimizer": "sgd"}, {"accumulation_steps": 2}])
def test_a_poisoned_batch_is_skipped_and_counted_in_the_epoch_line(tmp_path, capsys, settings):
    config = into(tmp_path, **settings)
    data = make_data(config)
    poison_steps(data, {1, 6})
    history, _ = script.fit(config, data)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["  1 steps skipped: not finite" in line for line in lines] == [True, True, False]
    assert history.train_loss.notna().all() and history.val_loss.notna().all() and all_finite(kept(config).model)


def test_skipped_steps_are_not_part_of_the_figures_of_an_epoch(tmp_path):
    """At a rate of nearly 0 the figures of each step are those of its images."""
    losses = []
    for steps in (set(), {1, 2}):
        config = into(tmp_path, num_epochs=1, learning_rate=1e-9)
        data = make_data(config)
        poison_steps(data, steps)
        losses.append(script.fit(config, data)[0].train_loss[0])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("first", [1, 6])
def test_ten_skipped_steps_in_a_row_end_the_run_with_the_remedy(tmp_path, first):
    config = into(tmp_path, num_epochs=5)  # of four steps each
    data = make_data(config)
    poison_steps(data, set(range(first, 1000)))
    message = ("training diverged: 10 steps in a row had no finite loss or gradients; start over with --no-resume and "
               "a lower --learning-rate")
    with pytest.raises(DataError) as diverged:
        script.fit(config, data)
    best = kept(config)
    assert str(diverged.value) == f"{message}; the checkpoint of epoch {best.metrics['epoch']} is kept"
    assert best.metrics["epoch"] < 5 and all_finite(best.model)
    assert np.isfinite(script.predict(best.model, data.dataset)).all()


def test_nine_skipped_steps_in_a_row_do_not_end_the_run(tmp_path):
    config = into(tmp_path, num_epochs=5)
    data = make_data(config)
    poison_steps(data, set(range(6, 15)))
    assert len(script.fit(config, data)[0]) == 5


def test_ten_skipped_steps_are_seen_after_they_are_over(tmp_path):
    config = into(tmp_path, num_epochs=2, batch_size=2)  # 16 steps an epoch
    data = make_data(config)
    poison_steps(data, set(range(3, 13)))
    with pytest.raises(DataError, match=r"training diverged: .* lower --learning-rate$"):
        script.fit(config, data)
    assert not (tmp_path / "best_model.pth").exists()


def test_the_last_epochs_are_not_augmented(tmp_path, monkeypatch):
    config = into(tmp_path, plain_epochs=1.5, num_epochs=3, train_val_split=1.0)
    recorded, batch = [], MathSymbolDataset.batch  # whether the images of each training step are augmented

    def recording(self, rows, seed=None):
        recorded.append(seed is not None)
        return batch(self, rows, seed)

    monkeypatch.setattr(MathSymbolDataset, "batch", recording)
    script.fit(config, make_data(config))
    steps = len(recorded) // 3
    assert len(recorded) == 3 * steps and sum(recorded) == round(1.5 * steps)
    assert recorded == sorted(recorded, reverse=True), "augmented ones come first"


def test_the_remedy_for_a_divergence_works(tmp_path):
    """The rate is what makes it diverge; at a lower one, with --no-resume, the same command trains."""
    config = into(tmp_path, optimizer="sgd", learning_rate=10.0, max_grad_norm=0.0, num_epochs=60, warmup=0.0,
                  schedule="constant", model="mlp", weight_decay=0.1)
    data = make_data(config)
    with pytest.raises(DataError, match="start over with --no-resume and a lower --learning-rate"):
        script.fit(config, data, manager=make_manager(config, data))
    lower = dataclasses.replace(config, learning_rate=0.01, resume=False, num_epochs=2)
    history, _ = script.fit(lower, make_data(lower), manager=make_manager(lower, data, resume=False))
    assert len(history) == 2 and all_finite(kept(lower).model)


def test_outputs_without_a_limit_are_refused():
    """Probabilities of logits of +inf are not numbers; those of -inf are 0."""
    data = make_data()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    model[1].bias.data[1] = math.inf
    with pytest.raises(DataError, match="its training diverged; lower --learning-rate"):
        script.predict(model, data.dataset, np.arange(4))
    model[1].bias.data[1] = -math.inf
    assert (script.predict(model, data.dataset, np.arange(4))[:, 1] == 0).all()


def test_features_too_large_for_the_nearest_neighbour_vote_are_refused(tmp_path):
    config = into(tmp_path, knn_neighbors=5)
    data, model = make_data(config), script.build_model(config, 4)
    model.conv5[0][1].weight.data[:] = 1e30
    script.save_checkpoint(tmp_path / "best_model.pth", script.TrainedModel(
        model, config, data.classes, data.dataset.statistics, {"epoch": 1}, ""))
    with pytest.raises(DataError, match="too large for the nearest-neighbour vote: its training diverged"):
        script.finish_network(config, data, votes=True)


# ---- Memory ---------------------------------------------------------------------------------------------------------

def exhaust(error: RuntimeError) -> Callable:
    def raise_error(*_: object) -> None:
        raise error

    return raise_error


MEMORY_ERRORS = [torch.OutOfMemoryError("CUDA out of memory"),
                 RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")]


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_running_out_of_memory_names_the_batch_size_to_try(tmp_path, error):
    config = into(tmp_path)
    data = make_data(config)
    data.dataset.before_step = exhaust(error)
    with pytest.raises(DataError, match="out of memory with batches of 8 images; try --batch-size 4, with "
                                        "--accumulation-steps 2 for the same optimizer steps"):
        script.fit(config, data)


@pytest.mark.parametrize("error", MEMORY_ERRORS)
def test_running_out_of_memory_in_validation_names_its_own_batch_size(tmp_path, error):
    config = into(tmp_path)
    data = make_data(config, runtime=Runtime(eval_batch_size=64))
    data.dataset.before_prediction = exhaust(error)
    with pytest.raises(DataError, match="out of memory while predicting 64 images at a time; try --eval-batch-size 32"):
        script.fit(config, data)


def test_compiling_for_several_gpus_of_one_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "start_runtime", lambda *_: Runtime(gpus=2))
    with pytest.raises(UsageError, match=r"--compile does not work with 2 GPUs in one process; .*per-node=2 .*"
                                         "--device cuda:0"):
        script.run(into(tmp_path, compile=True), time.monotonic(), StopSignals())


# ---- Stopping and resuming ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {}, {"optimizer": "sgd", "learning_rate": 0.05}, {"optimizer": "adam", "schedule": "step"},
    {"accumulation_steps": 3}, {"schedule": "plateau"}, {"ema_decay": 0.0}, {"mixup": True}, {"max_grad_norm": 0.0},
    {"precision": "bf16"}, {"freeze_epochs": 1}, {"normalize": "min-max"}, {"dropout": 0.5},
    {"early_stopping": 3, "select_by": "loss"}, {"train_val_split": 1.0},
    {"optimizer": "sgd", "momentum": 0.0, "schedule": "cyclic"}])
def test_a_resumed_training_is_equal_bit_for_bit(tmp_path, capsys, settings):
    results = []
    for name, pauses in (("whole", []), ("stopped", [1, 4, 7])):
        (tmp_path / name).mkdir()
        config = into(tmp_path / name, checkpoint_minutes=0.0, num_epochs=4, **settings)  # saves after each epoch
        data = make_data(config, 44, runtime=Runtime(precision=config.precision))
        for step in pauses:
            assert "last.pth; the same command resumes from there" in interrupt(config, data, step)
        data.dataset.before_step = lambda number, inputs: None
        history, _ = script.fit(config, data, manager=make_manager(config, data))
        last = load_verified(tmp_path / name / "last.pth")
        assert last["state"]["epoch"] == len(history) + 1
        results.append((sha256_of(kept(config).model.state_dict()), sha256_of(last["trainer"]),
                        history.drop(columns="seconds").to_csv()))
    assert results[0] == results[1]
    assert capsys.readouterr().out.count("resumes from last.pth: epoch ") == 3


def test_a_stop_in_the_middle_of_an_epoch_keeps_its_steps(tmp_path, capsys):
    config = into(tmp_path)
    data = make_data(config)
    interrupt(config, data, step=6)
    last = load_verified(tmp_path / "last.pth")
    assert set(last) == {"trainer", "state", "fingerprint", "elapsed", "versions"}
    assert (last["state"]["epoch"], last["state"]["step"], last["state"]["images"]) == (2, 2, 16)
    assert data.dataset.steps == 6
    script.fit(config, data, manager=make_manager(config, data))
    assert data.dataset.steps == 12, "no step is taken twice"
    assert "resumes from last.pth: epoch 2, step 2, after 0.0 minutes of training" in capsys.readouterr().out


def test_a_stop_without_a_manager_saves_nothing(tmp_path):
    config, stops = into(tmp_path), StopSignals()
    data = make_data(config)
    stop_in_step(data, stops, 2)
    with pytest.raises(Stopped):
        script.fit(config, data, stops=stops)
    assert data.dataset.steps == 2 and not list(tmp_path.iterdir())


def test_skipped_steps_before_a_stop_are_counted_after_it(tmp_path, capsys):
    config, stops = into(tmp_path), StopSignals()
    data = make_data(config)

    def before_step(number: int, inputs: torch.Tensor) -> None:
        if number == 5:
            inputs.fill_(math.nan)
        stops.pending = signal.SIGTERM if number == 6 else None

    data.dataset.before_step = before_step
    with pytest.raises(Stopped):
        script.fit(config, data, manager=make_manager(config, data), stops=stops)
    script.fit(config, data, manager=make_manager(config, data))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["1 steps skipped" in line for line in lines] == [False, True, False]


def test_a_state_of_another_network_is_refused(tmp_path, monkeypatch):
    """Its settings are the same, but script.py was changed."""
    config = into(tmp_path)
    data = make_data(config)
    interrupt(config, data, step=2)
    monkeypatch.setitem(script.MODELS, "tiny", DigitCNN)
    with pytest.raises(DataError, match=r"last.pth: does not fit the present network or optimizer .*; restore those of "
                                        r"the unfinished run, or start over with --no-resume$"):
        script.fit(config, data, manager=make_manager(config, data))


def test_a_training_with_other_versions_is_resumed_with_a_warning(tmp_path, capsys):
    config = into(tmp_path)
    data = make_data(config)
    interrupt(config, data, step=6)
    content = load_verified(tmp_path / "last.pth")
    content["versions"]["torch"] = "1.0"
    save_verified(tmp_path / "last.pth", content)
    assert len(script.fit(config, data, manager=make_manager(config, data))[0]) == 3
    assert "the run began with another torch" in capsys.readouterr().err


def test_a_new_training_discards_what_an_earlier_one_saved(tmp_path):
    config = into(tmp_path)
    data = make_data(config)
    interrupt(config, data, step=6)
    fresh = into(tmp_path, num_epochs=1, resume=False)
    history, _ = script.fit(fresh, data, manager=make_manager(fresh, data, resume=False))
    assert len(history) == 1 and not (tmp_path / "last.pth").exists(), "the next save would come after ten seconds"


def test_a_signal_while_the_last_epoch_is_saved_is_not_lost(tmp_path):
    config, stops = into(tmp_path, resume=False), StopSignals()
    data = make_data(config)

    class StoppingManager(CheckpointManager):
        def save(self, snapshot: dict, interval: float = 0.0) -> None:
            super().save(snapshot, interval)
            if snapshot["state"]["epoch"] > config.num_epochs:
                stops.pending = signal.SIGTERM

    with pytest.raises(Stopped, match="the same command without --no-resume resumes from there"):
        script.fit(config, data, manager=StoppingManager(tmp_path, resume=False), stops=stops)
    assert load_verified(tmp_path / "last.pth")["state"]["epoch"] == config.num_epochs + 1


# ---- Initial weights ------------------------------------------------------------------------------------------------

def test_a_checkpoint_gives_initial_weights(tmp_path):
    config = into(tmp_path, num_epochs=1)
    script.fit(config, make_data(config))
    trained = kept(config).model.state_dict()
    again = dataclasses.replace(config, weights=str(tmp_path / "best_model.pth"))
    same, changed = (script.start_model(again, make_data(again, classes=classes)).state_dict() for classes in (4, 3))
    assert all(torch.equal(same[name], trained[name]) for name in trained)
    assert all(torch.equal(changed[name], trained[name]) for name in trained if not name.startswith("head."))
    assert changed["head.1.weight"].shape[0] == 3


@pytest.mark.parametrize(("settings", "message"), [
    ({"model": "digit-cnn"}, "it is of another network"), ({"weights": "none.pth"}, "No such file"),
    ({"weights": "torchvision"}, "has none for --model tiny")])
def test_initial_weights_that_do_not_fit_are_refused(tmp_path, settings, message):
    config = into(tmp_path, num_epochs=1)
    script.fit(config, make_data(config))
    again = dataclasses.replace(config, **{"weights": str(tmp_path / "best_model.pth"), **settings})
    with pytest.raises(DataError, match=f"{message}.*name a checkpoint of this model with --weights FILE"):
        script.start_model(again, make_data(again))


@pytest.mark.parametrize(("settings", "warned"), [
    ({}, False), ({"split_seed": 7}, True), ({"train_val_split": 1.0}, False), ({"folds": 3, "fold": 1}, True)])
def test_initial_weights_that_have_seen_validation_rows_are_warned_of(tmp_path, capsys, settings, warned):
    config = into(tmp_path, num_epochs=1)
    script.fit(config, make_data(config))
    again = dataclasses.replace(config, weights=str(tmp_path / "best_model.pth"), **settings)
    script.start_model(again, make_data(config))
    assert ("it has seen rows that validate now" in capsys.readouterr().err) == warned
    script.start_model(again, make_data(config, classes=3))
    assert not capsys.readouterr().err, "other classes are other data"


def test_initial_weights_with_a_flipped_bit_are_refused(tmp_path):
    config, path = into(tmp_path, num_epochs=1, model="mlp"), tmp_path / "best_model.pth"
    script.fit(config, make_data(config))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be used .*not what was written"):
        script.fit(dataclasses.replace(config, weights=str(path)), make_data(config))


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

def write_checkpoint(folder: Path, **content) -> tuple[Path, torch.nn.Module]:
    """Write a complete checkpoint with some of its entries replaced. Return its path and its network."""
    path, model = folder / "model.pth", script.build_model(SMALL, 3)
    script.save_checkpoint(path, script.TrainedModel(model, SMALL, ["1", "2", "NA"], ImageStatistics(0, 8),
                                                     {"epoch": 1}, "0" * 64))
    save_verified(path, {**load_verified(path), **content})
    return path, model


def test_a_checkpoint_holds_all_that_prediction_needs(tmp_path):
    path, model = write_checkpoint(tmp_path)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"model", "knn", "config", "classes", "image_statistics", "metrics", "labels_sha256",
                            "versions", "sha256"}
    assert set(content["config"]) == set(dataclasses.asdict(SMALL))
    assert {"torch", "python", "numpy"} <= content["versions"].keys()
    trained = script.load_checkpoint(path)
    assert trained.config == SMALL and trained.classes == ["1", "2", "NA"] and trained.metrics == {"epoch": 1}
    assert trained.statistics == ImageStatistics(0, 8) and trained.labels_sha256 == "0" * 64
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(trained.model.eval()(images), model.eval()(images))


def test_a_checkpoint_holds_the_index_of_the_nearest_neighbour_vote(tmp_path):
    config = into(tmp_path, num_epochs=1, knn_neighbors=5)
    data = make_data(config)
    script.fit(config, data)
    finished, predictions = script.finish_network(config, data, votes=True)
    trained = kept(config)
    rows = data.split.val_rows
    assert trained.metrics["val_accuracy"] == predictions.correct.mean()
    assert np.allclose(script.predict(trained.model, data.dataset, rows), predictions.probabilities, atol=1e-6)
    alone = script.predict(trained.without_knn.model, data.dataset, rows)
    assert not np.allclose(alone, predictions.probabilities, atol=1e-3)
    assert finished.labels_sha256 == trained.labels_sha256 == data.dataset.table.labels_sha256


class Payload:
    """An object that unpickling would execute."""

    def __reduce__(self):
        return (print, ("payload",))


def test_files_that_are_not_checkpoints_are_refused(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    with pytest.raises(DataError, match=r"bad.pth: no such checkpoint; train one with `python script.py`"):
        script.load_checkpoint(path)
    for content in (b"", b"text", write_checkpoint(tmp_path)[0].read_bytes()[:2000]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad.pth: not a complete checkpoint of script\.py"):
            script.load_checkpoint(path)
    for value in ({"model": Payload()}, script.build_model(SMALL, 3).state_dict()):
        torch.save(value, path)
        with pytest.raises(DataError, match=r"bad.pth: not a complete checkpoint of script\.py"):
            script.load_checkpoint(path)
    assert "payload" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"classes": ["1", "2"]}, {"config": {"model": "resnet", "dropout": 0.1}},
                                     {"config": {"model": "vgg"}}, {"config": []}, {"model": 3},
                                     {"image_statistics": {"paper": 0}}])
def test_checkpoints_whose_parts_do_not_fit_together_are_refused(tmp_path, content):
    with pytest.raises(DataError, match="not a complete checkpoint"):
        script.load_checkpoint(write_checkpoint(tmp_path, **content)[0])
