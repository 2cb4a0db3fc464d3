"""Training and prediction on a GPU: nothing in a step waits for it, and its results are those of the CPU.

Skipped on machines without CUDA.
"""

import contextlib
import dataclasses
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK

import script
from pipeline.device import Runtime
from pipeline.errors import UsageError
from pipeline.files import sha256_of
from pipeline.images import ImageStatistics
from pipeline.knn import KNNClassifier, empty_knn_index
from pipeline.models import freeze_body
from pipeline.signals import StopSignals
from pipeline.tables import Table
from script import Config, MathSymbolDataset, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROWS, CLASSES = 256, 10
SMALL = Config(model="cnn", image_size=16, batch_size=64, num_epochs=2, learning_rate=0.02, dropout=0.0,
               optimizer="sgd", precision="float32", augment=False)
ALL_CHANGES = ("--rotation 10 --scale 0.1 --shear 0.1 --stretch 0.1 --shift 0.1 --crop 0.5 --perspective 0.2 "
               "--elastic 0.1 --brightness 0.1 --contrast 0.1 --erasing 0.5")
CASES = {  # flags, whether rows have weights, whether the images fit in the GPU's memory
    "default": ("", False, True),
    "all changes": (ALL_CHANGES, False, True),
    "mixup": ("--mixup --model cnn", True, True),
    "fp16": ("--precision fp16 --no-augment --accumulation-steps 2", False, True),
    "sgd": ("--optimizer sgd --model digit-cnn --ema-decay 0 --max-grad-norm 0", False, True),
    "torchvision": ("--model torchvision:resnet18 --optimizer adam --freeze-epochs 1", False, True),
    "images on the host": ("--model cnn", False, False),
    "weighted images on the host": ("--model cnn", True, False),
}


class FullRuntime(Runtime):
    """A device without memory for the images."""

    def has_room_for(self, num_bytes: int) -> bool:
        return False


@pytest.fixture(autouse=True)
def full_precision():
    """Compute float32 without TF32, as the CPU does, whatever earlier tests have set."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def no_waiting():
    """Raise RuntimeError inside a with block where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_dataset(config: Config, runtime: Runtime, rows: int = ROWS) -> MathSymbolDataset:
    """Return images with a bar at the place that their class says, with noise."""
    targets = np.arange(rows) % CLASSES
    images = np.random.default_rng(0).integers(0, 60, (rows, 20, 20), dtype=np.uint8)
    images[np.arange(rows), targets * 2] = 255
    labels = pd.DataFrame({"label": targets.astype(str)}, index=pd.RangeIndex(2, rows + 2))
    return MathSymbolDataset(Table("train.csv", labels, pixels=images), config, None, ImageStatistics(0, 20), runtime)


def make_trainer(config: Config, runtime: Runtime) -> Trainer:
    trainer = Trainer(config, runtime.to_device(script.build_model(config, CLASSES)), runtime, config.batch_size)
    trainer.model.train()
    return trainer


def take_step(trainer: Trainer, dataset: MathSymbolDataset, rows: np.ndarray, seed: int | None, share: float = 1.0,
              update: bool = True) -> torch.Tensor:
    """Take a step as an epoch does: gather, augment, mix, forward, backward, update."""
    inputs, classes, weights = dataset.batch(rows, seed)
    targets = F.one_hot(classes, CLASSES).float()
    if weights is not None:
        targets = targets * weights[:, None]
    if trainer.config.mixup:
        inputs, targets = script.mixup_data(inputs, targets, trainer.config.mixup_alpha, seed)
    return trainer.training_step(inputs, targets, 0.1, share, update)


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_everything_on_the_gpu_and_waits_for_nothing(case):
    flags, weighted, fits = CASES[case]
    config = script.parse_command_line(flags.split())[2]
    precision = "bf16" if config.precision == "auto" else config.precision
    runtime = (Runtime if fits else FullRuntime)(GPU, precision, 1, 64)
    config = script.resolve_config(dataclasses.replace(config, batch_size=64), runtime, ROWS)
    dataset, rows = make_dataset(config, runtime), np.arange(64)
    if weighted:
        dataset.append(make_dataset(config, runtime, 32), 0.5)
        rows = np.arange(ROWS - 32, ROWS + 32)
    assert (dataset.images.device.type == "cuda") == fits
    trainer = make_trainer(config, runtime)
    if config.freeze_epochs:
        freeze_body(trainer.model, True)

    def take_steps(seed: int) -> torch.Tensor:
        for update in (False, True):
            figures = take_step(trainer, dataset, rows, seed, 0.5, update)
        return figures

    take_steps(1)  # allocations and the choice of kernels may wait
    with no_waiting():
        figures = take_steps(2)
    assert figures.device.type == "cuda" and figures.isfinite().all() and figures[2] > 0
    assert trainer.updates == 2 and trainer.skipped.counts.device.type == "cuda"


def test_the_nearest_neighbour_vote_waits_for_nothing():
    runtime = Runtime(GPU, "bf16", 1, 64)
    dataset, model = make_dataset(SMALL, runtime), script.build_model(SMALL, CLASSES)
    vote = runtime.to_device(KNNClassifier(model, 30, 0.2, empty_knn_index(model, ROWS))).eval()

    def answer() -> torch.Tensor:
        with torch.inference_mode(), runtime.autocast():
            return vote(dataset.batch(np.arange(64))[0])

    answer()
    with no_waiting():
        answers = answer()
    assert answers.device.type == "cuda" and answers.shape == (64, CLASSES)


def test_waiting_is_noticed():
    """Without this the tests above would prove nothing."""
    ones = torch.ones(3, device=GPU)
    for wait in (lambda: ones[0].item(), lambda: ones.cpu(), lambda: ones[ones > 0], lambda: torch.ones(3).to(GPU)):
        with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
            wait()


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_poisoned_batch_changes_nothing(precision, optimizer):
    config, runtime = dataclasses.replace(SMALL, precision=precision, optimizer=optimizer), Runtime(GPU, precision)
    dataset, trainer = make_dataset(config, runtime), make_trainer(config, runtime)
    for _ in range(3):
        take_step(trainer, dataset, np.arange(64), None)

    def learned_state() -> str:
        return sha256_of({name: value for name, value in trainer.model.state_dict().items()
                          if "num_batches" not in name})

    before, skipped = learned_state(), float(trainer.skipped.counts[0])
    inputs, classes, _ = dataset.batch(np.arange(64))
    figures = trainer.training_step(inputs * math.nan, F.one_hot(classes, CLASSES).float(), 0.1)
    assert figures.tolist() == [0, 0, 0] and learned_state() == before
    assert trainer.skipped.counts[0] == skipped + 1
    for _ in range(5):  # of which fp16 may skip some, while it looks for its scale
        take_step(trainer, dataset, np.arange(64), None)
    assert learned_state() != before and all(value.isfinite().all() for value in trainer.result.state_dict().values())


@pytest.mark.parametrize("settings", [{}, {"model": "tiny", "optimizer": "adamw", "learning_rate": 1e-3},
                                      {"model": "digit-cnn"}])
def test_float32_results_are_those_of_the_cpu(settings):
    config, results = dataclasses.replace(SMALL, **settings), []
    for device in (CPU, GPU):
        runtime = Runtime(device)
        dataset = make_dataset(config, runtime)
        trainer = make_trainer(config, runtime)
        figures = [take_step(trainer, dataset, np.arange(64) + 64 * step, None).cpu() for step in range(3)]
        probabilities = script.predict(trainer.result, dataset)
        results.append((torch.stack(figures), dataset.batch(np.arange(9))[0].cpu(), torch.from_numpy(probabilities)))
    (losses, inputs, probabilities), (gpu_losses, gpu_inputs, gpu_probabilities) = results
    assert torch.allclose(inputs, gpu_inputs, atol=1e-5)
    assert torch.allclose(losses[:, 0], gpu_losses[:, 0], rtol=1e-3)
    assert torch.allclose(probabilities, gpu_probabilities, atol=5e-3)


def test_a_state_of_the_gpu_is_restored_bit_for_bit():
    config, runtime = dataclasses.replace(SMALL, optimizer="adamw"), Runtime(GPU)
    dataset, (trainer, restored) = make_dataset(config, runtime), (make_trainer(config, runtime) for _ in range(2))
    take_step(trainer, dataset, np.arange(64), 1)
    restored.load_state_dict(trainer.state_dict())
    assert sha256_of(restored.state_dict()) == sha256_of(trainer.state_dict())
    assert restored.skipped.counts.device.type == "cuda"
    take_step(restored, dataset, np.arange(64), 2)


def test_a_run_on_the_gpu_trains_and_predicts(command):
    done = command(*QUICK, "--device", "cuda", "--model", "cnn", "--save-probabilities")
    assert done.returncode == 0, done.stderr
    assert "device cuda" in done.stdout and len(command.submission()) == 30
    trained = command.submission()
    again = command("predict", "--device", "cuda")
    assert again.returncode == 0, again.stderr
    assert command.submission().equals(trained)
    answers = []
    for device in ("cuda", "cpu"):
        done = command("predict", "--device", device, "--precision", "float32", "--save-probabilities")
        assert done.returncode == 0, done.stderr
        with np.load(command.output / "test_probabilities.npz") as saved:
            answers.append(saved["probabilities"])
    assert np.allclose(*answers, atol=0.02)  # float32 matrix products of a run use TF32


@two_gpus
def test_two_gpus_of_one_process_share_a_batch():
    config = dataclasses.replace(SMALL, batch_size=256)
    losses = []
    for gpus in (1, 2):
        runtime = Runtime(GPU, gpus=gpus)
        trainer = make_trainer(config, runtime)
        assert isinstance(trainer.network, torch.nn.DataParallel) == (gpus == 2)
        dataset = make_dataset(config, runtime)
        losses.append([take_step(trainer, dataset, np.arange(256), None)[0].item() for _ in range(3)])
        assert not any(name.startswith("module.") for name in trainer.result.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # each GPU has its own batch statistics
    assert losses[1][2] < losses[1][0]


@two_gpus
def test_compiling_for_two_gpus_of_one_process_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--compile does not work with .* GPUs in one process"):
        script.run(Config(compile=True, device="cuda", output_dir=str(tmp_path)), time.monotonic(), StopSignals())
