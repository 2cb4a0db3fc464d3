"""Give the same minutes, cores and training rows to this program and to what a user would pick instead.

    pip install -r benchmarks/requirements-peers.txt
    python -m benchmarks.peers --data-dir COMPETITION [--minutes 10] [--rows N] [--peers ours timm]

The training rows of COMPETITION become a competition of their own, whose test table are the validation rows without
their labels. Every program reads its two tables and writes answers, in a process of its own, one after another: ours
with its default recipe and all rows to train on, the others by the scripts in benchmarks/peer_scripts/, as their
documentation recommends for small grey images: from scratch, at 32 pixels, for as many steps as there is time for, and
in the precision that ours takes on this machine, but for fastai, which computes in float32. Prints seconds, accuracy,
images per second while training, peak memory with all processes, and the lines of code that a user writes. A script
that takes longer than its minutes is shown with its seconds.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from sklearn.model_selection import train_test_split

import script
from pipeline.device import start_runtime
from pipeline.signals import exit_status
from tools.common import SCRIPT, make_parser

SCRIPTS = Path(__file__).resolve().parent / "peer_scripts"
PEERS = ["ours", *sorted(path.stem.removesuffix("_script") for path in SCRIPTS.glob("*_script.py"))]
RATE = re.compile(r"([0-9,]+) images/s")


def write_competition(config: script.Config, folder: Path, rows: int) -> pd.Series:
    """Write the tables of the training and of the validation rows, and return the labels of the latter."""
    with contextlib.redirect_stdout(io.StringIO()):
        data = script.prepare_data(config, start_runtime(config.device, "float32"))[1]
    table, split = data.dataset.table.rows, data.split
    train_rows = split.train_rows
    if rows and rows < len(train_rows):
        train_rows, _ = train_test_split(train_rows, train_size=rows, random_state=0,
                                         stratify=data.dataset.targets[train_rows])
    table.iloc[sorted(train_rows)][["image_path", "label"]].to_csv(folder / "train.csv", index=False)
    held_out = table.iloc[split.val_rows]
    pd.DataFrame({"example_id": range(len(held_out)), "image_path": held_out.image_path.tolist()}).to_csv(
        folder / "test.csv", index=False)
    (folder / "Dataset_Image").symlink_to(Path(config.train_source.image_root).resolve())
    return held_out.label.reset_index(drop=True)


def memory_of(group: int) -> int:
    """Return the resident bytes of all processes of a group, pages that they share counted once for each (Linux)."""
    total = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(place.name)) == group:
                total += int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):  # it has ended
            continue
    return total


def run(command: list[str]) -> tuple[float, float, str]:
    """Run a command. Return its seconds, its peak memory in GB and what it prints."""
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.2)
        seconds = time.monotonic() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    return seconds, peak / 1e9, text


def count_code(path: Path) -> int:
    """Return the lines of a script that are neither empty nor a comment nor a docstring of one line."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return sum(bool(line) and not line.startswith(("#", '"""')) for line in lines)


def main() -> None:
    """Run every peer and print the table."""
    parser = make_parser("benchmarks.peers", __doc__, "data_dir", "cache_dir")
    parser.add_argument("--minutes", type=float, default=10, help="of each program, from start to answers")
    parser.add_argument("--rows", type=int, default=0, help="train on this many rows (0: all)")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    given = parser.parse_args()
    print("| program | seconds | accuracy in % | images/s | peak memory, GB | lines of code |")
    print("|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir, model="cnn", test_csv="none")
        labels, precision = write_competition(config, folder, given.rows), start_runtime(config.device).precision
        for peer in given.peers:
            answers = folder / f"{peer}.csv"
            command = [sys.executable, str(SCRIPTS / f"{peer}_script.py"), name, str(given.minutes), str(answers),
                       precision]
            if peer == "ours":
                command = [sys.executable, str(SCRIPT), "--data-dir", name, "--output-dir", name, "--cache-dir", name,
                           "--max-minutes", str(given.minutes), "--train-val-split", "1", "--submission-file",
                           answers.name]
            seconds, memory, text = run(command)
            found = pd.read_csv(answers, dtype=str).iloc[:, -1]
            rates = [float(rate.replace(",", "")) for rate in RATE.findall(text)]
            lines = 0 if peer == "ours" else count_code(SCRIPTS / f"{peer}_script.py")
            print(f"| {peer} | {seconds:.0f} | {100 * (found == labels).mean():.2f} | {max(rates):,.0f} | "
                  f"{memory:.2f} | {lines} |", flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(lambda _: main(), "the table is not complete"))
