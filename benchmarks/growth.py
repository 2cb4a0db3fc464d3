"""Measure how set-up, a step and memory grow with the table: 10,000 to 1,000,000 images, a few steps each.

    python -m benchmarks.growth --data-dir COMPETITION [--sizes 10000 40000 160000 1000000] [--steps 30]

Each size runs in a process of its own. A table of that many rows, those of the competition repeated, is prepared as
in a run: labels, split, images in one array, and training steps of the light network. Repeated rows repeat their images
in the array, so that it is as large as that of other images. Decoding takes the same time for each file and is measured
by benchmarks.data_path. Prints the seconds of set-up, the milliseconds per step (median), and the resident memory after
the steps, with and without the array.
"""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import time

import numpy as np

import script
from pipeline import optim, splits, tables
from pipeline.cli import pick
from pipeline.device import start_runtime
from pipeline.images import LoadSettings, estimate_image_statistics, load_images
from pipeline.signals import exit_status
from tools.common import make_parser, train_step


def resident_gb() -> float:
    """Return the resident memory of this process in GB (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure(config: script.Config, size: int, steps: int) -> str:
    """Train a few steps on a table of so many rows. Return the figures as a row of a Markdown table."""
    runtime = start_runtime()
    with contextlib.redirect_stdout(io.StringIO()):
        table = tables.read_train_table(config.train_source)
        statistics = estimate_image_statistics(table, 32)
        images, = load_images([table], statistics, pick(LoadSettings, config))
    repeated = np.arange(size) % len(table)
    table = dataclasses.replace(table, rows=table.rows.iloc[repeated])
    images = np.ascontiguousarray(images[repeated])
    started = time.perf_counter()
    config = script.resolve_config(config, runtime, round(size * config.train_val_split))
    dataset = script.MathSymbolDataset(table, config, None, statistics, runtime, images)
    split = splits.split_rows(config.split, dataset.targets, table.usable_rows, splits.image_digests(images), None,
                                  table.path)
    model = runtime.to_device(script.build_model(config, len(dataset.classes)))
    trainer = script.Trainer(config, model, runtime, config.batch_size)
    batches = optim.epoch_batches(split.train_rows, dataset.targets, config.batch_size, config.seed, 1)
    ready, seconds = time.perf_counter() - started, []
    trainer.model.train()
    for step in range(steps):
        begun = time.perf_counter()
        train_step(trainer, dataset, batches[step % len(batches)], step)
        seconds.append(time.perf_counter() - begun)
    resident, array = resident_gb(), images.nbytes / 1e9
    return (f"| {size:,} | {ready:.2f} | {1000 * np.median(seconds[3:]):.0f} | {resident:.2f} | "
            f"{resident - array:.2f} |")


def main() -> None:
    """Measure each size and print a table."""
    parser = make_parser("benchmarks.growth", __doc__, "data_dir", "cache_dir")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 40_000, 160_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir, model="cnn")
    if len(given.sizes) == 1:
        print(measure(config, given.sizes[0], given.steps), flush=True)
        return
    print("| rows | set-up, s | per step, ms | resident, GB | without the images, GB |")
    print("|--:|--:|--:|--:|--:|", flush=True)
    for size in given.sizes:  # each in its own process: memory that one freed would hide what the next takes
        subprocess.run([sys.executable, "-m", "benchmarks.growth", "--data-dir", given.data_dir, "--cache-dir",
                        given.cache_dir, "--sizes", str(size), "--steps", str(given.steps)], check=True)


if __name__ == "__main__":
    sys.exit(exit_status(lambda _: main(), "the table is not complete"))
