"""Measure the data path on a competition folder: reading the tables, decoding, the image cache, augmentation.

    python -m benchmarks.data_path --data-dir COMPETITION [--rounds 3]

Each round decodes into an empty cache folder (after the first, the files are in the system's own cache), and then opens
the cache, which checks every file's size and times. Augmentation makes batches of --batch-size from 32 to 48 pixels,
with the default settings, and with perspective, brightness, contrast and erasing too.
"""

import shutil
import tempfile
import time

import torch

import script
from pipeline.images import LoadSettings, estimate_image_statistics, load_images
from pipeline.tables import read_test_table, read_train_table
from tools.common import make_parser

EVERYTHING = script.Config(image_size=48, perspective=0.1, brightness=0.2, contrast=0.2, erasing=0.2)


def seconds_of(function, *arguments) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def decode_and_open(config: script.Config) -> tuple[float, float, float, int]:
    """Return the seconds to read both tables, to decode into an empty cache, to open it, and the number of images."""
    started = time.perf_counter()
    tables = [read_train_table(config.train_source), read_test_table(config.test_source)]
    read = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as cache:
        statistics, settings = estimate_image_statistics(tables[0], 48), LoadSettings(cache)
        return (read, seconds_of(load_images, tables, statistics, settings),
                seconds_of(load_images, tables, statistics, settings), sum(map(len, tables)))


def augment_rate(config: script.Config, batch_size: int, seconds: float = 5.0) -> float:
    """Return the images per second of `augment`."""
    images = (torch.rand(batch_size, 1, 32, 32) < 0.15).to(torch.uint8) * 255
    script.augment(images, config, 0)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        script.augment(images, config, done)
        done += batch_size
    return done / (time.perf_counter() - started)


def main() -> None:
    """Print a line per round."""
    parser = make_parser("benchmarks.data_path", __doc__, "data_dir", "train_csv", "test_csv", "root_dir")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    given = parser.parse_args()
    config = script.Config(data_dir=given.data_dir, train_csv=given.train_csv, test_csv=given.test_csv,
                           root_dir=given.root_dir)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"{shutil.disk_usage(tempfile.gettempdir()).free / 1e9:.0f} GB free for the cache")
    for number in range(1, given.rounds + 1):
        read, decode, reopen, count = decode_and_open(config)
        rate = augment_rate(EVERYTHING, given.batch_size)
        default = augment_rate(script.Config(image_size=48), given.batch_size)
        print(f"round {number}: read both tables in {read:.2f} s; decoded and stored {count:,} images in "
              f"{decode:.1f} s ({count / decode:,.0f}/s); cache opened in {reopen:.2f} s; augmented "
              f"{rate:,.0f}/s with everything, {default:,.0f}/s by default", flush=True)


if __name__ == "__main__":
    main()
