"""benchmarks/: they read the lines of the real command, and each runs to its end on a small competition."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import QUICK, REPOSITORY

import script
from benchmarks import digits, recipes, time_to_accuracy
from pipeline.errors import UsageError
from pipeline.metrics import describe_epoch


def test_an_epochs_line_is_read():
    row = {"epoch": 3, "train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 0.61, "val_accuracy": 0.8512,
           "val_top3_accuracy": 0.97, "val_class_accuracy": 0.74, "learning_rate": 1e-3, "seconds": 12.5}
    found = time_to_accuracy.EPOCH.match(describe_epoch(row, 20, 1234.5))
    assert found and (found[1], found[2]) == ("85.12", "12.5")
    assert not time_to_accuracy.EPOCH.match("epoch 1/2  train 1.0 50.00%  3.0 s  12 images/s")


def test_the_watch_adds_up_the_epochs():
    line = "epoch {}/3  train 1.0000 50.00%  val 0.5 {}%  2.5 s  12 images/s"
    text = "\n".join(["device cpu", line.format(1, "79.90"), line.format(2, "81.00")])
    epochs, whole, status = time_to_accuracy.watch([sys.executable, "-c", f"print({text!r}); raise SystemExit(3)"])
    assert status == 3 and [epoch[1:] for epoch in epochs] == [(2.5, 79.9), (5.0, 81.0)]
    assert 0 < epochs[0][0] <= epochs[1][0] <= whole


def test_recipes_are_compared_seed_by_seed():
    figures = {"val_top3_accuracy": 0.97, "val_class_accuracy": 0.7, "val_loss": 0.6, "train_accuracy": 0.9,
               "seconds": 9}
    results = pd.DataFrame([{"candidate": candidate, "seed": seed, "val_accuracy": accuracy, **figures}
                            for candidate, seed, accuracy in [("", 0, 0.80), ("--mixup", 0, 0.81),
                                                              ("", 1, 0.84), ("--mixup", 1, 0.85)]])
    lines = recipes.describe(results).splitlines()
    assert lines[2].startswith("| (defaults) | 2 | 82.00 ± 2.83 | 0.00 ± 0.00 |")
    assert lines[3].startswith("| `--mixup` | 2 | 83.00 ± 2.83 | 1.00 ± 0.00 |")  # paired by seed


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A competition, a cache, and two checkpoints of different seeds."""
    from conftest import make_competition

    folder = tmp_path_factory.mktemp("benchmarks")
    data, checkpoints = make_competition(folder / "competition", train_rows=400), []
    for seed in ("0", "1"):
        checkpoints.append(str(folder / seed / "best_model.pth"))
        assert script.main(["--data-dir", str(data), "--cache-dir", str(folder / "cache"), "--output-dir",
                            str(folder / seed), "--seed", seed, "--device", "cpu", *QUICK]) == 0
    return data, folder / "cache", checkpoints


def benchmark(name: str, *arguments: str) -> str:
    """Run a benchmark and return what it prints."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=REPOSITORY, text=True,
                          capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_ensemble_prints_each_network_and_the_mean(trained):
    data, cache, checkpoints = trained
    printed = benchmark("ensemble", *checkpoints, "--data-dir", str(data), "--cache-dir", str(cache))
    figures = [float(cell) for cell in re.findall(r"^\| [^|]* \| \d* \| ([0-9.]+) \|", printed, re.MULTILINE)]
    assert len(figures) == 4 and figures[2] == pytest.approx(np.mean(figures[:2]), abs=0.011)
    assert f"{figures[3] - figures[2]:+.1f}" in printed
    alone = benchmark("ensemble", *checkpoints, "--data-dir", str(data), "--cache-dir", str(cache), "--alone")
    losses = [[line.split("|")[-2] for line in text.splitlines() if line.startswith("| ")] for text in (printed, alone)]
    assert len(losses[0]) == len(losses[1]) == 5 and losses[0][1:] != losses[1][1:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "expected"), [
    ("recipes", ["--rows", "200", "--num-epochs", "1", "--seeds", "0", "1", "--", "--batch-size 32", "--no-augment"],
     r"\| `--batch-size 32` \| 2 \| [0-9.]+ ± [0-9.]+ \|"),
    ("time_to_accuracy", [*QUICK, "--model", "cnn"], r"whole command: \d+ s, last epoch [0-9.]+ %"),
    ("throughput", ["--models", "cnn", "--rounds", "1", "--seconds", "1"], r"median: ours .* ratio [0-9.]+; \d+% of"),
    ("precision", ["--rounds", "1", "--seconds", "1"], r"cnn: auto takes \w+, [01]\.\d\d of the fastest"),
    ("peers", ["--peers", "ours", "--minutes", "2"], r"\| ours \| \d+ \| [0-9.]+ \| [0-9,]+ \| [0-9.]+ \| 0 \|"),
    ("shift", ["--rows", "30"], r"\| mean of 31 \| \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ \|"),
    ("growth", ["--sizes", "300", "900", "--steps", "5"], r"\| 900 \| [0-9.]+ \| \d+ \|"),
    ("data_path", [], "."),
    ("digits", ["--held-out", "50", "--seeds", "0", "1", *QUICK],
     r"probabilities averaged \| [0-9.]+"),
])
def test_a_benchmark_runs_to_its_end(trained, name, arguments, expected):
    data, cache, checkpoints = trained
    arguments = [checkpoints[0], *arguments] if name == "shift" else arguments
    cached = [] if name in ("time_to_accuracy", "data_path") else ["--cache-dir", str(cache)]
    assert re.search(expected, benchmark(name, "--data-dir", str(data), *cached, *arguments))


@pytest.mark.slow
def test_digits_in_an_output_folder_are_trained_once(trained, tmp_path):
    data, *_ = trained
    command = ["digits", "--data-dir", str(data), "--held-out", "50", "--output-dir", str(tmp_path)]
    first = benchmark(*command, *QUICK)
    written = (tmp_path / "seed0" / "best_model.pth").stat().st_mtime_ns
    assert benchmark(*command, *QUICK) == first
    assert (tmp_path / "seed0" / "best_model.pth").stat().st_mtime_ns == written
    for other in (["--no-augment"], ["--held-out-seed", "1"]):  # it would be scored on rows that it was trained on
        with pytest.raises(AssertionError, match=r"holds a network of other flags|train.csv: holds other rows"):
            benchmark(*command, *QUICK, *other)


def test_the_gpu_run_ends_in_a_table_whatever_fails(tmp_path):
    """With a stub for Python that prints what the benchmarks print, and fails in two of them."""
    stub = tmp_path / "python"
    stub.write_text("""#!/bin/sh
case "$2" in
benchmarks.time_to_accuracy) echo "[  1.0 s] epoch"; echo "80 %: 7 s from the start"; echo "whole command: 55 s" ;;
benchmarks.ensemble) echo "no such checkpoint" >&2; exit 1 ;;
benchmarks.ranks) echo "[  1.0 s] epoch   1/2"; echo "[  2.0 s] epoch   2/2"; exit 124 ;;
benchmarks.throughput) echo "  median: ours 9 images/s, ratio 20.5" ;;
-c) echo "torch 0" ;;
esac
""")
    stub.chmod(0o755)
    done = subprocess.run([REPOSITORY / "benchmarks" / "gpu.sh", ".", "./python"], capture_output=True, text=True,
                          timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("| what | figure |"):]
    for row in ("| resnet, seed 2 | whole command: 55 s |", "| resnet, three averaged | ended with status 1 |",
                "| resnet, speed | median: ours 9 images/s, ratio 20.5 |",
                "| resnet, one rank of torchrun beside none | [  2.0 s] epoch   2/2 |",
                "| cnn, seed 0 | 80 %: 7 s from the start |"):
        assert row in table
    assert "no such checkpoint" in done.stdout


def test_a_candidate_that_needs_validation_is_refused_before_any_training(trained, monkeypatch):
    folders = ["--data-dir", str(trained[0]), "--cache-dir", str(trained[1])]
    monkeypatch.setattr(sys, "argv", ["recipes", *folders, "--", "", "--schedule plateau"])
    monkeypatch.setattr(recipes, "train_once", lambda *_: pytest.fail("trains"))
    with pytest.raises(UsageError, match="--schedule plateau and --early-stopping need"):
        recipes.main()


def test_held_out_rows_are_written_once_and_overwrite_no_others(tmp_path):
    table = pd.DataFrame({"label": list("01") * 30, "pixel0": 1})
    table.to_csv(tmp_path / "train.csv", index=False)
    folder = tmp_path / "folder"
    folder.mkdir()
    paths = digits.hold_out(tmp_path, folder, 10, 0)
    times = [path.stat().st_mtime_ns for path in paths]
    assert digits.hold_out(tmp_path, folder, 10, 0) == paths and times == [path.stat().st_mtime_ns for path in paths]
    with pytest.raises(SystemExit, match=r"train.csv: holds other rows; name another --output-dir"):
        digits.hold_out(tmp_path, folder, 10, 1)
    with pytest.raises(SystemExit, match="holds other rows"):
        digits.hold_out(tmp_path, tmp_path, 10, 0)  # the data's own folder
    assert len(pd.read_csv(tmp_path / "train.csv")) == 60
    with pytest.raises(SystemExit, match="of 60 rows 60 cannot be held out"):
        digits.hold_out(tmp_path, folder, 60, 0)
