"""Several processes that train one network.

Without random draws (augmentation, dropout, mixup) and with batch norm absent or frozen, the losses of N ranks are
those of one process. With draws, each rank has its own.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import member
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, make_competition

import script
from pipeline import files, optim
from pipeline.device import start_runtime
from pipeline.distributed import Ranks, is_launched, join_ranks

COMMON = ["--image-size", "16", "--batch-size", "14", "--no-pictures", "--knn-neighbors", "0", "--device", "cpu",
          "--precision", "float32", "--checkpoint-minutes", "0"]
MLP = ["--model", "mlp", "--num-epochs", "8", "--accumulation-steps", "2"]
EXACT = [*MLP, "--no-augment", "--dropout", "0"]
RANDOM = [*MLP, "--dropout", "0.3", "--mixup"]


class Team:
    """Runs of one competition by several ranks, forked from a process that has imported script.py."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, make_competition(folder / "competition", train_rows=111)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["member"])
        with pytest.MonkeyPatch.context() as patches:
            patches.setenv("PYTHONPATH", str(Path(member.__file__).parent))
            forkserver.ensure_running()

    def arguments(self, name: str, *flags: str) -> list[str]:
        return [*COMMON, "--data-dir", str(self.data), "--output-dir", str(self.folder / name), "--cache-dir",
                str(self.folder / "cache"), *flags]

    def start(self, name: str, count: int, arguments: list[str], others: tuple[str, ...] = (), **options) -> list[int]:
        """Return the exit statuses of `count` ranks, or of one process without torchrun (0).

        `others` are more flags of all ranks but the first.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(max(count, 1)):
            own = [*arguments, *(others if rank else ())]
            processes.append(self.context.Process(target=member.live, kwargs=options, args=(
                rank, count, port, own, str(self.folder / f"{name}.{rank}.log"))))
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            if process.exitcode is None:
                process.kill()
        return [process.exitcode for process in processes]

    def run(self, name: str, count: int, *flags: str, **options) -> list[int]:
        """Return the exit statuses of a training."""
        return self.start(name, count, self.arguments(name, *flags), **options)

    def log(self, name: str, rank: int = 0) -> str:
        return (self.folder / f"{name}.{rank}.log").read_text()

    def train(self, name: str, count: int, *flags: str, **options) -> tuple[np.ndarray, np.ndarray, Path]:
        """Return each step's loss, correct answers and images [steps, 3], the validation probabilities, the folder."""
        record = str(self.folder / name)
        assert self.run(name, count, *flags, record=record, **options) == [0] * max(count, 1), self.log(name)
        folder = self.folder / name
        return np.load(f"{record}.0.npz")["sums"], np.load(folder / "val_probabilities.npz")["probabilities"], folder


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Team:
    return Team(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(team) -> tuple[np.ndarray, np.ndarray, Path]:
    return team.train("alone", 0, *EXACT)


def assert_alike(own: tuple, expected: tuple) -> None:
    (sums, probabilities, folder), (other_sums, other_probabilities, other) = own, expected
    assert len(sums) >= 50 and len(sums) == len(other_sums)
    assert np.array_equal(sums[:, 2], other_sums[:, 2])
    assert np.abs(sums[:, 0] / other_sums[:, 0] - 1).max() < 1e-5
    assert np.abs(probabilities - other_probabilities).max() < 1e-3
    assert (folder / "submission.csv").read_bytes() == (other / "submission.csv").read_bytes()
    history, other_history = (pd.read_csv(path / "history.csv") for path in (folder, other))
    assert np.allclose(history.drop(columns="seconds"), other_history.drop(columns="seconds"), rtol=1e-3, atol=2e-3)
    states = [files.load_verified(path / "best_model.pth")["model"] for path in (folder, other)]
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_losses_of_ranks_are_those_of_one_process(team, alone, count):
    """99 or 100 rows in steps of 14 or 15, two of which are one optimizer step: shards have different sizes."""
    assert_alike(team.train(f"exact{count}", count, *EXACT), alone)
    assert all(not team.log(f"exact{count}", rank) for rank in range(1, count)), "rank 0 speaks for all"
    assert "decoded" in team.log("alone") and "arning" not in team.log(f"exact{count}")


@pytest.mark.slow
def test_the_losses_are_the_same_if_batch_norm_is_frozen(team):
    """By SGD, since Adam's first steps are as long for a gradient of rounding errors as for any other."""
    flags = ["--model", "digit-cnn", "--num-epochs", "8", "--normalize", "standard", "--optimizer", "sgd",
             "--learning-rate", "0.02", "--no-augment", "--dropout", "0"]
    expected = team.train("one", 0, *flags, frozen=True)
    assert_alike(team.train("two", 2, *flags, frozen=True), expected)


@pytest.mark.slow
def test_ranks_train_the_last_layer_alone(team):
    flags = ["--model", "digit-cnn", "--num-epochs", "7", "--freeze-epochs", "6", "--ema-decay", "0", "--optimizer",
             "sgd", "--no-augment", "--dropout", "0"]
    expected = team.train("frozen1", 0, *flags)[0]
    sums = team.train("frozen2", 2, *flags)[0]
    assert np.abs(sums[:42, 0] / expected[:42, 0] - 1).max() < 1e-5
    assert np.isfinite(sums).all()


@pytest.mark.slow
def test_the_batch_norm_of_two_ranks_is_their_mean(team):
    """On a CPU each rank's batch norm sees its own images; the statistics that are kept are the mean over all ranks."""
    sums, _, folder = team.train("norm", 2, "--model", "digit-cnn", "--num-epochs", "3")
    state = files.load_verified(folder / "best_model.pth")["model"]
    assert sums[-1, 0] < sums[0, 0] and all(value.isfinite().all() for value in state.values())


@pytest.mark.slow
def test_each_rank_draws_from_seed_epoch_step_and_rank(team):
    team.train("draws", 2, "--model", "mlp", "--num-epochs", "1", "--dropout", "0", "--erasing", "0.5", "--seed", "3")
    config = script.load_checkpoint(team.folder / "draws" / "best_model.pth").config
    data = script.prepare_data(config, start_runtime("cpu", "float32"))[1]
    batches = optim.epoch_batches(data.split.train_rows, data.dataset.targets, config.batch_size, config.seed, epoch=1)
    for rank in range(2):
        recorded = np.load(team.folder / f"draws.{rank}.npz")
        for step in range(3):
            rows = Ranks(rank, 2).shard(batches[step])
            expected = data.dataset.batch(rows, optim.step_seed(config.seed, 1, step, rank))[0]
            assert np.allclose(recorded[f"inputs{step}"], expected, atol=1e-6)
            other = data.dataset.batch(rows, optim.step_seed(config.seed, 1, step, 1 - rank))[0]
            assert not np.allclose(recorded[f"inputs{step}"], other, atol=1e-2)


def trainer_digest(folder: Path) -> str:
    return files.sha256_of(files.load_verified(folder / "last.pth")["trainer"])


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_has_the_same_bits(team):
    """With augmentation, dropout, mixup and accumulation. The sum of two ranks' gradients has no order."""
    assert team.run("whole", 2, *RANDOM, keep=True) == [0, 0]
    for rank, step in ((1, 10), (0, 31)):
        assert team.run("parts", 2, *RANDOM, keep=True, stop=(rank, step, signal.SIGTERM)) == [143, 143]
    assert team.log("parts").count("stopped by SIGTERM: saved in") == 2
    assert team.run("parts", 2, *RANDOM, keep=True) == [0, 0]
    assert team.log("parts").count("resumes from last.pth: epoch ") == 2
    assert trainer_digest(team.folder / "parts") == trainer_digest(team.folder / "whole")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_the_next_one_resumes(team):
    flags = [*RANDOM, "--num-epochs", "3"]
    first, second = team.run("dead", 2, *flags, stop=(1, 12, signal.SIGKILL))
    assert (first, second) == (1, -signal.SIGKILL)
    assert "error: another rank has ended" in team.log("dead") and "Traceback" not in team.log("dead")
    assert team.run("dead", 3, *flags) == [0, 0, 0]
    assert "resumes from last.pth" in team.log("dead")
    assert "the run began with another number of ranks" in team.log("dead")


def test_bad_input_is_reported_once(team):
    assert team.run("bad", 2, *EXACT, "--train-csv", "none.csv") == [1, 1]
    assert "none.csv: no such file" in team.log("bad")
    assert "none.csv" not in team.log("bad", 1) and "Traceback" not in team.log("bad", 1)


def test_ranks_that_read_other_files_are_refused(team):
    pd.read_csv(team.data / "train.csv")[:-9].to_csv(team.data / "fewer.csv", index=False)
    assert team.run("other", 2, *EXACT, others=("--train-csv", "fewer.csv")) == [1, 1]
    assert "all ranks must read the same files" in team.log("other", 1)


@pytest.mark.slow
def test_too_small_batches_are_refused(team):
    assert team.run("small", 3, *EXACT, "--batch-size", "5") == [2, 2, 2]
    assert "steps of 4 images are less than two for each of 3 ranks; raise --batch-size" in team.log("small")
    assert team.run("larger", 3, *EXACT, "--batch-size", "8", "--num-epochs", "1") == [0, 0, 0], "the remedy works"


@pytest.mark.slow
def test_prediction_by_ranks(team, alone):
    checkpoint = str(alone[2] / "best_model.pth")
    for count in (0, 3):
        assert team.start(f"p{count}", count, [
            "predict", checkpoint, "--data-dir", str(team.data), "--cache-dir", str(team.folder / "cache"),
            "--output-dir", str(team.folder / f"p{count}"), "--device", "cpu"]) == [0] * max(count, 1)
    written = [(team.folder / name / "submission.csv").read_bytes() for name in ("p0", "p3")]
    assert written[0] == written[1] == (alone[2] / "submission.csv").read_bytes()


@pytest.mark.slow
def test_evaluation_by_ranks(team, alone):
    checkpoint, tables = str(alone[2] / "best_model.pth"), []
    for count in (0, 2):
        folder = team.folder / f"e{count}"
        assert team.start(f"e{count}", count, [
            "evaluate", checkpoint, "--test-csv", "train.csv", "--data-dir", str(team.data), "--cache-dir",
            str(team.folder / "cache"), "--output-dir", str(folder), "--device", "cpu", "--no-pictures",
        ]) == [0] * max(count, 1)
        tables.append((folder / "evaluation_class_accuracy.csv").read_bytes())
    assert tables[0] == tables[1] and not team.log("e2", 1)


@pytest.mark.slow
def test_folds_by_ranks(team):
    flags = [*EXACT, "--folds", "3", "--num-epochs", "2"]
    for name, count in (("folds0", 0), ("folds2", 2)):
        assert team.run(name, count, *flags) == [0] * max(count, 1), team.log(name)
        assert "cross-validated accuracy " in team.log(name)
    one, two = (np.load(team.folder / name / "oof_probabilities.npz") for name in ("folds0", "folds2"))
    assert np.array_equal(one["rows"], two["rows"])
    assert np.allclose(one["probabilities"], two["probabilities"], atol=1e-3)
    submissions = [(team.folder / name / "submission.csv").read_bytes() for name in ("folds0", "folds2")]
    assert submissions[0] == submissions[1]


@pytest.mark.parametrize("total, count", [(14, 3), (2, 3), (7, 7), (100, 8)])
def test_shards_are_contiguous_and_complete(total, count):
    rows = np.random.default_rng(0).permutation(total)
    shards = [Ranks(rank, count, joined=True).shard(rows) for rank in range(count)]
    assert np.concatenate(shards).tolist() == rows.tolist()
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_rank_ends_although_a_thread_still_holds_tensors():
    """Python's own end aborts then: "terminate called without an active exception"."""
    code = ("import atexit, threading, time, torch\nfrom pipeline.signals import end_process\n"
            "def add():\n    while True:\n        torch.ones(100) + 1\n"
            "threading.Thread(target=add, daemon=True).start(); atexit.register(print, 'left'); time.sleep(0.2)\n"
            "print('ended')\n")
    done = subprocess.run([sys.executable, "-c", f"{code}end_process(3)"], cwd=REPOSITORY, capture_output=True,
                          text=True, env={**os.environ, "TORCHELASTIC_RUN_ID": "1"})
    assert (done.returncode, done.stdout) == (3, "ended\nleft\n")


def test_one_rank_needs_no_communication():
    ranks = Ranks()
    assert not is_launched() and join_ranks(torch.device("cpu")) == ranks
    assert ranks.shard(np.arange(5)).tolist() == [0, 1, 2, 3, 4] and ranks.all_reduce_max(1.5, 0) == [1.5, 0]
    assert ranks.all_reduce_sum(torch.ones(2)).tolist() == [1, 1] and ranks.broadcast_from_rank0(lambda: "a") == "a"
    with ranks.rank0_first():
        pass


def torchrun(folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launcher,
            str(REPOSITORY / "script.py"), *COMMON, *flags, "--data-dir", str(folder / "competition"), "--cache-dir",
            str(folder / "cache"), "--output-dir", str(folder / "out")]


@pytest.mark.slow
def test_torchrun_restarts_a_run_when_a_rank_dies(tmp_path):
    make_competition(tmp_path / "competition")
    command = torchrun(tmp_path, "--model", "tiny", "--num-epochs", "60", launcher=("--max-restarts", "1"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch   3/"):
            for child in children(process.pid)[-1:]:
                os.kill(child, signal.SIGKILL)
    assert process.wait() == 0, "".join(lines)
    text = "".join(lines)
    assert "resumes from last.pth: epoch " in text and "kept epoch" in text and "Traceback" not in text
    assert len(pd.read_csv(tmp_path / "out" / "history.csv")) == 60


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
def test_torchrun_is_stopped_and_the_next_run_resumes(tmp_path):
    make_competition(tmp_path / "competition")
    command = torchrun(tmp_path, "--model", "tiny", "--num-epochs", "60")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch   3/"):
            process.send_signal(signal.SIGINT)
    assert process.wait() != 0 and "stopped by SIGINT: saved in" in "".join(lines)
    again = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0 and "resumes from last.pth: epoch " in again.stdout, again.stderr


@pytest.mark.slow
def test_ranks_end_when_their_torchrun_is_killed(tmp_path):
    make_competition(tmp_path / "competition")
    process = subprocess.Popen(torchrun(tmp_path, "--model", "tiny", "--num-epochs", "9999"), stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("epoch   1/"):
            break
    ranks = children(process.pid)
    process.kill()
    process.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{rank}").exists() for rank in ranks):
            return
        time.sleep(0.1)
    pytest.fail("ranks train on without torchrun")
