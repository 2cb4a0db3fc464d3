"""Rates of the data path on a real competition folder: reading the tables, decoding, the image cache, augmentation.

    python -m benchmarks.data_path --data-dir COMPETITION [--rounds 3]

Decoding starts with an empty cache folder each round (the files themselves are warm in the system's cache after the
first); the cache is then opened with every file's size and times checked. Augmentation makes batches of --batch-size
from 32 to 48 pixels, by default and with perspective, brightness, contrast and erasing switched on too.
"""

import argparse
import dataclasses
import shutil
import tempfile
import time

import torch

import script

EVERYTHING = script.Config(image_size=48, perspective=0.1, brightness=0.2, contrast=0.2, erasing=0.2)


def clock(function, *arguments):
    """Seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def decode_and_open(config: script.Config) -> tuple[float, float, float, int]:
    """Seconds to read both tables, to decode their images into an empty cache and to open it again; how many images."""
    started = time.perf_counter()
    tables = [script.read_train_table(config), script.read_test_table(config)]
    read = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as cache:
        config = dataclasses.replace(config, cache_dir=cache)
        statistics = script.look_at_images(tables[0], dataclasses.replace(config, image_size=48))
        return (read, clock(script.load_all_images, tables, config, statistics),
                clock(script.load_all_images, tables, config, statistics), sum(map(len, tables)))


def augment_rate(config: script.Config, batch_size: int, seconds: float = 5.0) -> float:
    """Images a second through `augment`."""
    images = (torch.rand(batch_size, 1, 32, 32) < 0.15).to(torch.uint8) * 255
    draws = script.Draws(0, torch.device("cpu"))
    script.augment(images, config, draws)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        script.augment(images, config, draws)
        done += batch_size
    return done / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"{shutil.disk_usage(tempfile.gettempdir()).free / 1e9:.0f} GB free for the cache")
    for number in range(1, given.rounds + 1):
        read, decode, reopen, count = decode_and_open(script.Config(data_dir=given.data_dir))
        rate = augment_rate(EVERYTHING, given.batch_size)
        default = augment_rate(dataclasses.replace(script.Config(), image_size=48), given.batch_size)
        print(f"round {number}: read both tables in {read:.2f} s; decoded and stored {count:,} images in "
              f"{decode:.1f} s ({count / decode:,.0f}/s); opened from the cache in {reopen:.2f} s; augmented "
              f"{rate:,.0f}/s with everything, {default:,.0f}/s by default", flush=True)


if __name__ == "__main__":
    main()
