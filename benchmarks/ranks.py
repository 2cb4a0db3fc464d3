"""Compare the training speed of the ranks that torchrun starts with `python script.py` alone, on the same cores.

    python -m benchmarks.ranks --data-dir COMPETITION --nproc-per-node 2 [any flag of script.py]

Both train the light network on the same part of the training rows (`--rows`) and on all of this machine's cores, one
after the other, `--rounds` times. Prints the images per second of each epoch but the first, as the real command prints
them, and the median ratio of the rounds.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from sklearn.model_selection import train_test_split

from tools.common import SCRIPT, make_parser

RATE = re.compile(r"^epoch .* ([0-9,]+) images/s", re.MULTILINE)


def write_part(data: Path, folder: Path, rows: int) -> None:
    """Write the tables of a smaller competition, of so many labelled rows, with the same images."""
    table = pd.read_csv(data / "train.csv", dtype=str, na_filter=False)
    part = train_test_split(table, train_size=rows, random_state=0, stratify=table.label)[0]
    part.to_csv(folder / "train.csv", index=False)
    pd.read_csv(data / "test.csv", dtype=str, na_filter=False).head(100).to_csv(folder / "test.csv", index=False)


def rates(launcher: list[str], flags: list[str], threads: int) -> list[float]:
    """Return the images per second of each epoch but the first. Exits if the command fails."""
    done = subprocess.run([*launcher, str(SCRIPT), *flags], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        sys.exit(done.returncode)
    return [float(rate.replace(",", "")) for rate in RATE.findall(done.stdout)][1:]


def main() -> None:
    """Measure and print a row per round."""
    parser = make_parser("benchmarks.ranks", __doc__, "data_dir", "root_dir")
    parser.add_argument("--nproc-per-node", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    given, flags = parser.parse_known_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = given.nproc_per_node
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        write_part(Path(given.data_dir), Path(name), given.rows)
        common = ["--data-dir", name, "--root-dir", str(Path(given.data_dir, given.root_dir).resolve()), "--cache-dir",
                  name, "--model", "cnn", "--num-epochs", "3", "--knn-neighbors", "0", "--no-pictures", "--no-resume",
                  "--output-dir", str(Path(name, "out")), *flags]
        print(f"| round | alone, {cores} threads, images/s | {ranks} ranks, {max(cores // ranks, 1)} threads each | "
              "ratio |\n|--:|--:|--:|--:|")
        for number in range(1, given.rounds + 1):
            alone = rates([sys.executable], common, cores)
            together = rates(torchrun, common, max(cores // ranks, 1))
            ratios.append(statistics.mean(together) / statistics.mean(alone))
            print(f"| {number} | {', '.join(f'{rate:.0f}' for rate in alone)} | "
                  f"{', '.join(f'{rate:.0f}' for rate in together)} | {ratios[-1]:.2f} |", flush=True)
    print(f"median ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
