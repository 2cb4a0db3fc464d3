"""Measure the seconds from the start of `python script.py` until validation accuracy reaches a mark.

    python -m benchmarks.time_to_accuracy --data-dir COMPETITION --model cnn [any flag of script.py]

Runs the real command in a process of its own, with an empty cache folder, and reads its lines as they appear, so that
everything counts: importing, decoding, training and each epoch's validation. A mark is reached when the line of the
first epoch that reaches it is printed. Prints the command's lines, each with its second, then the seconds to 80 and
85 % (or to other `--marks`), the part of them spent in epochs, and the time of the whole command. Checkpoint and
submission are written to `--output-dir`, and without it deleted.
"""

import re
import subprocess
import sys
import tempfile
import time

from tools.common import SCRIPT, make_parser

EPOCH = re.compile(r"^epoch .* val [0-9.]+ +([0-9.]+)%  ([0-9.]+) s  ")


def watch(command: list[str]) -> tuple[list[tuple[float, float, float]], float, int]:
    """Run a command. Return (second, seconds in epochs, accuracy in %) of each epoch, the whole time and the status."""
    started, epochs, trained = time.perf_counter(), [], 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        second = time.perf_counter() - started
        print(f"[{second:7.1f} s] {line}", end="", flush=True)
        found = EPOCH.match(line)
        if found:
            trained += float(found[2])
            epochs.append((second, trained, float(found[1])))
    return epochs, time.perf_counter() - started, process.wait()


def main() -> None:
    """Run script.py, and print the seconds to each mark."""
    parser = make_parser("benchmarks.time_to_accuracy", __doc__, "data_dir", output_dir=None)
    parser.add_argument("--marks", type=float, nargs="+", default=[80.0, 85.0], help="accuracies in percent")
    given, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        epochs, whole, status = watch([
            sys.executable, "-u", str(SCRIPT), "--data-dir", given.data_dir, "--cache-dir", f"{folder}/cache",
            "--output-dir", str(given.output_dir or f"{folder}/out"), *flags])
    for mark in given.marks:
        reached = next((epoch for epoch in epochs if epoch[2] >= mark), None)
        print(f"{mark:g} %: " + (f"{reached[0]:.0f} s from the start, {reached[1]:.0f} s of them in epochs"
                                   if reached else "not reached"))
    print(f"whole command: {whole:.0f} s, last epoch {epochs[-1][2] if epochs else float('nan'):.2f} %")
    sys.exit(status)


if __name__ == "__main__":
    main()
