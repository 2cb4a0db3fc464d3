"""How set-up, a step and memory grow with the table: 10,000, 40,000, 160,000 and 1,000,000 images, a few steps each.

    python -m benchmarks.growth --data-dir COMPETITION [--sizes 10000 40000 160000 1000000] [--steps 30]

Each size is a process of its own, in which a table of so many rows, those of the competition repeated, goes the way of
a run: labels, split, images from one array, and training steps of the light network. A repeated row repeats its image
in the array, so the array grows as a table of other images would make it grow. Decoding, which grows by the file, is
measured by benchmarks.data_path. Prints seconds to set up, milliseconds a step (median), resident memory after the
steps, and that without the array.
"""

import argparse
import contextlib
import dataclasses
import io
import subprocess
import sys
import time

import numpy as np

import script
from benchmarks.memory import resident_gb


def measure(config: script.Config, size: int, steps: int) -> str:
    """Train a few steps on a table of so many rows; gives the figures as a row of a Markdown table."""
    runtime = script.start_runtime(config)
    with contextlib.redirect_stdout(io.StringIO()):
        table = script.read_train_table(config)
        statistics = script.look_at_images(table, dataclasses.replace(config, image_size=32))
        images = script.load_all_images([table], config, statistics)[0]
    repeated = np.arange(size) % len(table)
    labels = table.rows.label.iloc[repeated]
    images = np.ascontiguousarray(images[repeated])
    started = time.perf_counter()
    classes = script.sort_classes(labels)
    targets = script.class_numbers(labels, classes)
    train_rows, _ = script.split_rows(targets, config)
    config = script.complete_config(config, runtime, len(train_rows))
    dataset = script.MathSymbolDataset(images, targets, runtime)
    model = runtime.place(script.build_model(config, len(classes)))
    learner = script.Learner(config, model, len(classes), runtime)
    batches = script.epoch_steps(train_rows, config, 1)
    ready, seconds = time.perf_counter() - started, []
    learner.model.train()
    for step in range(steps):
        begun = time.perf_counter()
        learner.learn(script.Batch(*dataset.batch(batches[step % len(batches)])), 1, step / steps)
        seconds.append(time.perf_counter() - begun)
    held, array = resident_gb(), images.nbytes / 1e9
    return (f"| {size:,} | {ready:.2f} | {1000 * np.median(seconds[3:]):.0f} | {held:.2f} | {held - array:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--cache-dir", default="")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 40_000, 160_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir, model="cnn")
    if len(given.sizes) == 1:
        print(measure(config, given.sizes[0], given.steps), flush=True)
        return
    print("| rows | set-up, s | a step, ms | resident, GB | without the images, GB |")
    print("|--:|--:|--:|--:|--:|", flush=True)
    for size in given.sizes:  # each in its own process: memory that one gave back would hide what the next takes
        subprocess.run([sys.executable, "-m", "benchmarks.growth", "--data-dir", given.data_dir, "--cache-dir",
                        given.cache_dir, "--sizes", str(size), "--steps", str(given.steps)], check=True)


if __name__ == "__main__":
    sys.exit(script.exit_status(lambda _: main(), "the table is not whole"))
