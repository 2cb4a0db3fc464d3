"""Measure whether `--precision auto` takes the precision in which this machine trains faster, in one run.

    python -m benchmarks.precision [--data-dir COMPETITION] [--models cnn resnet] [--rounds 3] [--seconds 8]

Each round trains a network by its recipe in every precision that the device has, in alternation. Prints the images per
second of all rounds, what auto takes and why, how long that choice took, and the ratio of its rate to the fastest one.
"""

import contextlib
import dataclasses
import io
import statistics
import sys
import time

import script
from benchmarks.throughput import Ours, rate
from pipeline.device import start_runtime
from pipeline.precision import works
from pipeline.signals import exit_status
from tools.common import make_parser


def main() -> None:
    """Measure each network, and print the ratios."""
    parser = make_parser("benchmarks.precision", __doc__, "data_dir", "cache_dir")
    parser.add_argument("--models", nargs="+", default=["cnn"], choices=list(script.MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="of each precision in each round")
    given = parser.parse_args()
    start_runtime("auto", "float32")  # what a first use of the device takes is not the choice's
    started = time.perf_counter()
    runtime = start_runtime()
    seconds = time.perf_counter() - started
    print(f"device {runtime.describe()}; chosen in {seconds:.2f} s")
    precisions = [name for name in ("float32", "bf16", "fp16") if works(runtime.device, name)]
    for model in given.models:
        config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir, model=model)
        with contextlib.redirect_stdout(io.StringIO()):
            config, data = script.prepare_data(config, runtime)
        sides = {}
        for name in precisions:
            data.dataset.runtime = dataclasses.replace(runtime, precision=name)
            sides[name] = Ours(config, data)
        rates = {name: [] for name in precisions}
        for _ in range(given.rounds):
            for name, side in sides.items():
                rates[name].append(rate(side, given.seconds, runtime))
        for name in precisions:
            print(f"{model}, {name}: {', '.join(f'{each:,.0f}' for each in rates[name])} images/s")
        medians = {name: statistics.median(values) for name, values in rates.items()}
        print(f"{model}: auto takes {runtime.precision}, {medians[runtime.precision] / max(medians.values()):.2f} of "
              "the fastest")


if __name__ == "__main__":
    sys.exit(exit_status(lambda _: main(), "the table is not complete"))
