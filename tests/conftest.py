"""Fixtures of all tests: a small drawn competition, and the real command."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

# For tests and the commands that they start, set before torch is imported: networks as small as these are no faster on
# several threads, and much slower beside other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CLASSES = ["3", "17", "40", "101", "1400"]  # gaps, as in the real competition


def draw_shape(kind: int, rng: np.random.Generator) -> Image.Image:
    """Return a vertical or horizontal line, a cross, a ring or a slash, black on white, 32x32, near the middle."""
    image = Image.new("L", (32, 32), 255)
    pen = ImageDraw.Draw(image)
    x, y, reach, width = rng.integers(13, 19), rng.integers(13, 19), rng.integers(8, 12), int(rng.integers(2, 4))
    if kind in (0, 2):
        pen.line((x, y - reach, x, y + reach), fill=0, width=width)
    if kind in (1, 2):
        pen.line((x - reach, y, x + reach, y), fill=0, width=width)
    if kind == 3:
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=0, width=width)
    if kind == 4:
        pen.line((x - reach, y + reach, x + reach, y - reach), fill=0, width=width)
    return image


def make_competition(folder: Path, train_rows: int = 100, test_rows: int = 30, classes: list[str] = CLASSES) -> Path:
    """Write a competition folder with the columns of the real one. Classes alternate by row, file names are random."""
    rng = np.random.default_rng(5)
    (folder / "Dataset_Image" / "data").mkdir(parents=True)
    numbers = rng.permutation(train_rows + test_rows)
    names = [f"data/v2-{number:05d}.png" for number in numbers]
    for row, name in enumerate(names):
        draw_shape(row % len(classes), rng).save(folder / "Dataset_Image" / name)
    labels = [classes[row % len(classes)] for row in range(train_rows)]
    pd.DataFrame({"image_path": names[:train_rows], "label": labels}).to_csv(folder / "train.csv", index=False)
    pd.DataFrame({"image_path": names[train_rows:], "user_id": 7, "example_id": numbers[train_rows:]}
                 ).to_csv(folder / "test.csv", index=False)
    return folder


@pytest.fixture
def competition(tmp_path: Path) -> Path:
    """Return the folder of a small competition."""
    return make_competition(tmp_path / "competition")


def make_pixel_competition(folder: Path, train_rows: int = 60, test_rows: int = 20, side: int = 12) -> Path:
    """Write the same shapes like Kaggle's digits: white on black, one column per pixel, a test table without ids."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True)
    for name, rows in (("train.csv", train_rows), ("test.csv", test_rows)):
        pixels = [255 - np.asarray(draw_shape(row % 5, rng).resize((side, side))).reshape(-1) for row in range(rows)]
        table = pd.DataFrame(np.stack(pixels), columns=[f"pixel{number}" for number in range(side * side)])
        if name == "train.csv":
            table.insert(0, "label", [str(row % 5) for row in range(rows)])
        table.to_csv(folder / name, index=False)
    return folder


# With a precision, so that two commands beside other tests compute alike: "auto" is a timing. With the small network,
# since most tests are about files and messages; a later --model wins.
QUICK = ["--num-epochs", "2", "--batch-size", "16", "--image-size", "16", "--no-pictures", "--precision", "float32",
         "--model", "tiny"]


class Command:
    """`python script.py` on a competition folder, with an output and a cache folder of its own."""

    def __init__(self, data: Path, output: Path, cache: Path):
        self.data, self.output, self.cache = data, output, cache

    def arguments(self, *arguments: str) -> list[str]:
        """Return the arguments with those that name the folders and the CPU."""
        return ["--data-dir", str(self.data), "--output-dir", str(self.output), "--cache-dir", str(self.cache),
                "--device", "cpu", *arguments]

    def __call__(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        timeout = options.pop("timeout", 280)
        command = [sys.executable, str(REPOSITORY / "script.py"), *self.arguments(*arguments)]
        environment = {**os.environ, **options.pop("env", {})}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, **options)

    def submission(self) -> pd.DataFrame:
        """Return the written submission, every cell as text."""
        return pd.read_csv(self.output / "submission.csv", dtype=str, na_filter=False)


@pytest.fixture
def command(competition: Path, tmp_path: Path) -> Command:
    """Return the command on that competition."""
    return Command(competition, tmp_path / "out", tmp_path / "cache")


@pytest.fixture
def main_in_process(command: Command, capsys):
    """Return a function that runs the command line in this process and returns status, stdout and stderr."""
    import script

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            status = script.main(command.arguments(*arguments))
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return call
