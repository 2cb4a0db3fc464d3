"""Compare this program with an earlier commit of it, in alternation: the sample run, --help and the import.

    python -m benchmarks.against 0183c98 [--rounds 3] [any flag of script.py that both know]

The commit's files are taken from the repository's history into a temporary folder. Each round runs both programs on
the sample competition with the same flags, an empty image cache and a folder of its own, and prints the seconds of the
whole command, the images per second of its fastest epoch, the seconds of `--help` and those of importing script.py. The
last line has the medians of the rounds' ratios, of this program to the commit.
"""

import argparse
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
RATE = re.compile(r"^epoch .* ([0-9,]+) images/s", re.MULTILINE)


def check_out(commit: str, folder: Path) -> Path:
    """Write a commit's files into a folder, and return it."""
    archive = subprocess.run(["git", "archive", commit], cwd=REPOSITORY, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def seconds_of(*arguments: str, cwd: Path) -> tuple[float, str]:
    """Run Python with these arguments. Return the seconds it takes and what it prints."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed in {cwd}: {done.stderr.strip()}")
    return time.perf_counter() - started, done.stdout


def measure(program: Path, flags: list[str]) -> np.ndarray:
    """Return seconds of the sample run, images per second, seconds of --help and of the import."""
    with tempfile.TemporaryDirectory() as folder:
        whole, text = seconds_of("script.py", "--data-dir", str(REPOSITORY), "--output-dir", f"{folder}/out",
                                 "--cache-dir", f"{folder}/cache", *flags, cwd=program)
    rates = [float(rate.replace(",", "")) for rate in RATE.findall(text)]
    help_seconds, _ = seconds_of("script.py", "--help", cwd=program)
    import_seconds, _ = seconds_of("-c", "import script", cwd=program)
    return np.array([whole, max(rates), help_seconds, import_seconds])


def main() -> None:
    """Measure both programs in alternation and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=3)
    given, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        programs = {given.commit: check_out(given.commit, Path(folder)), "this": REPOSITORY}
        ratios = []
        for number in range(1, given.rounds + 1):
            figures = {name: measure(program, flags) for name, program in programs.items()}
            ratios.append(figures["this"] / figures[given.commit])
            for name, (whole, rate, help_seconds, import_seconds) in figures.items():
                print(f"round {number}, {name}: run {whole:.1f} s, {rate:,.0f} images/s, --help {help_seconds:.2f} s, "
                      f"import {import_seconds:.2f} s", flush=True)
    run, rate, help_ratio, import_ratio = np.median(ratios, axis=0)
    print(f"median ratio: run {run:.2f}, images/s {rate:.2f}, --help {help_ratio:.2f}, import {import_ratio:.2f}")


if __name__ == "__main__":
    main()
