"""Compare the training speed of script.py with a reference loop like those that it grew out of, in one run.

    python -m benchmarks.throughput --data-dir COMPETITION [--models resnet cnn] [--rounds 3] [--seconds 20]

The reference decodes every image with Pillow and augments it with torchvision's transforms, one by one, in the workers
of a DataLoader; it trains in float32, in batches of 32, with mixup, Adam and gradient clipping, and reads the loss and
the number of correct answers after every step. Ours trains by its recipe, in the best precision of the device, with the
augmentation of the `classic` preset, which is the reference's, and with mixup. Both train the same network at the same
size on images of the same competition. The two sides alternate, with products of square matrices in our precision
between them: the machine's peak. Ours is reported as a share of it, by the operations of a training step as torch
counts them.
"""

import argparse
import contextlib
import io
import itertools
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import script
from pipeline.device import Runtime, start_runtime
from pipeline.optim import epoch_batches
from pipeline.presets import PRESETS
from pipeline.signals import exit_status
from pipeline.tables import read_train_table
from tools.common import make_parser, train_step


class ReferenceDataset(Dataset):
    """Decodes and augments images one by one."""

    def __init__(self, paths: list[str], targets: np.ndarray, size: int):
        self.paths, self.targets = paths, targets
        self.transform = transforms.Compose([
            transforms.Resize((size, size)), transforms.RandomRotation(15, fill=255),
            transforms.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=5, fill=255),
            transforms.RandomPerspective(0.1, p=0.5, fill=255), transforms.ColorJitter(0.2, 0.2),
            transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,)), transforms.RandomErasing(0.2)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.paths[row]).convert("L")), int(self.targets[row])


class Reference:
    """The reference's training loop."""

    def __init__(self, config: script.Config, data: script.CompetitionData, paths: list[str]):
        self.device = data.dataset.runtime.device
        self.model = script.build_model(config, len(data.classes)).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-4, weight_decay=2e-5)
        workers = min(4, len(os.sched_getaffinity(0)))
        dataset = ReferenceDataset(paths, data.dataset.targets, config.image_size)
        self.loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=workers,
                                 pin_memory=self.device.type == "cuda", drop_last=True)
        self.batches = itertools.chain.from_iterable(itertools.repeat(self.loader))  # epoch after epoch

    def run(self, steps: int) -> int:
        """Train so many steps. Return the number of images."""
        self.model.train()
        for _ in range(steps):
            images, classes = (part.to(self.device) for part in next(self.batches))
            share, order = float(np.random.beta(0.4, 0.4)), torch.randperm(len(images), device=self.device)
            logits = self.model(share * images + (1 - share) * images[order])
            loss = share * F.cross_entropy(logits, classes) + (1 - share) * F.cross_entropy(logits, classes[order])
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            loss.item(), (logits.argmax(1) == classes).sum().item()
        return 32 * steps


class Ours:
    """The training step of script.py, on its own batches."""

    def __init__(self, config: script.Config, data: script.CompetitionData):
        self.data, self.step = data, 0
        batches = epoch_batches(data.split.train_rows, data.dataset.targets, config.batch_size, config.seed, 1)
        # Batches of another size are tuned and compiled again.
        self.batches = [rows for rows in batches if len(rows) == len(batches[0])]
        model = script.start_model(config, data)
        self.trainer = script.Trainer(config, model, data.dataset.runtime, len(batches[0]))
        self.trainer.model.train()

    def run(self, steps: int) -> int:
        """Train so many steps. Return the number of images."""
        images = 0
        for _ in range(steps):
            rows = self.batches[self.step % len(self.batches)]
            train_step(self.trainer, self.data.dataset, rows, self.step)
            self.step, images = self.step + 1, images + len(rows)
        return images


class Peak:
    """Products of square matrices in our precision."""

    def __init__(self, runtime: Runtime):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(runtime.precision, torch.float32)
        self.size = 2048 if runtime.device.type == "cpu" else 8192
        self.matrices = [torch.randn(self.size, self.size, device=runtime.device).to(dtype) for _ in range(2)]

    def run(self, steps: int) -> int:
        """Multiply so many times. Return the number of products."""
        for _ in range(steps):
            self.matrices[0] @ self.matrices[1]
        return steps


def rate(side: Ours | Reference | Peak, seconds: float, runtime: Runtime) -> float:
    """Return the images (or products) per second, over about so many seconds after a warm-up."""
    def timed(steps: int) -> tuple[int, float]:
        started = time.perf_counter()
        done = side.run(steps)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return done, time.perf_counter() - started

    timed(2)
    _, each = timed(3)
    done, took = timed(max(3, round(3 * seconds / each)))
    return done / took


def operations_per_image(config: script.Config, classes: int) -> float:
    """Return the floating-point operations of one image's forward and backward pass, as torch counts them."""
    model = script.build_model(config, classes)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(2, 1, config.image_size, config.image_size)).sum().backward()
    return counter.get_total_flops() / 2


def compare(model: str, given: argparse.Namespace) -> None:
    """Measure one network on both sides and print the rounds and their medians."""
    classic = {name: PRESETS["classic"][name] for name in (
        "rotation", "scale", "shear", "shift", "perspective", "elastic", "brightness", "contrast", "erasing",
        "image_size", "mixup")}
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir, model=model,
                           batch_size=given.batch_size or None, compile=given.compile, **classic)
    runtime = start_runtime()
    with contextlib.redirect_stdout(io.StringIO()):
        config, data = script.prepare_data(config, runtime)
    names = read_train_table(config.train_source).rows.image_path
    paths = [os.path.join(config.train_source.image_root, name) for name in names]
    ours, reference, peak = Ours(config, data), Reference(config, data, paths), Peak(runtime)
    operations = operations_per_image(config, len(data.classes))
    print(f"{model} at {config.image_size} pixels, {operations / 1e9:.2f} GFLOP per image\n"
          f"  ours: {runtime.describe()}, batch {config.batch_size}{', compiled' if config.compile else ''}\n"
          f"  reference: float32, batch 32, {reference.loader.num_workers} workers", flush=True)
    rounds = []
    for number in range(1, given.rounds + 1):
        products = rate(peak, min(given.seconds, 3), runtime) * 2 * peak.size**3
        figures = [rate(ours, given.seconds, runtime), rate(reference, given.seconds, runtime), products]
        rounds.append([*figures, figures[0] / figures[1], figures[0] * operations / products])
        print(f"  round {number}: ours {figures[0]:,.0f} images/s, reference {figures[1]:,.0f}, ratio "
              f"{rounds[-1][3]:.2f}; peak {products / 1e9:,.0f} GFLOP/s, ours at {rounds[-1][4]:.0%} of it", flush=True)
    median = np.median(rounds, axis=0)
    print(f"  median: ours {median[0]:,.0f} images/s, reference {median[1]:,.0f}, ratio {median[3]:.2f}; "
          f"{median[4]:.0%} of the peak", flush=True)


def main() -> None:
    """Compare each network."""
    parser = make_parser("benchmarks.throughput", __doc__, "data_dir", "cache_dir")
    parser.add_argument("--models", nargs="+", default=["resnet", "cnn"], choices=list(script.MODELS))
    parser.add_argument("--batch-size", type=int, default=0, help="of ours (0: the recipe's)")
    parser.add_argument("--compile", action="store_true", help="ours: torch.compile the network")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of each side in each round")
    given = parser.parse_args()
    for model in given.models:
        compare(model, given)


if __name__ == "__main__":
    sys.exit(exit_status(lambda _: main(), "the table is not complete"))
