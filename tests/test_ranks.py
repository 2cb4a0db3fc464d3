"""Ranks: several processes train one network, and what one process alone would have got comes out."""

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
from torch import nn

import script

COMMON = ["--image-size", "16", "--batch-size", "14", "--no-pictures", "--neighbours", "0", "--device", "cpu",
          "--precision", "float32", "--checkpoint-minutes", "0"]
MLP = ["--model", "mlp", "--dropout", "0.3", "--num-epochs", "8", "--mixup", "--accumulate", "2"]


class Team:
    """Runs of one competition by so many ranks, forked from a process that has imported script.py."""

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

    def run(self, name: str, count: int, *flags: str, others: tuple[str, ...] = (), **options) -> list[int]:
        """Exit statuses of so many ranks, or of a process alone (0); `others` are flags of all but the first rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(max(count, 1)):
            arguments = self.arguments(name, *flags, *(others if rank else ()))
            processes.append(self.context.Process(target=member.live, kwargs=options, args=(
                rank, count, port, arguments, str(self.folder / f"{name}.{rank}.log"))))
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            if process.exitcode is None:
                process.kill()
        return [process.exitcode for process in processes]

    def log(self, name: str, rank: int = 0) -> str:
        return (self.folder / f"{name}.{rank}.log").read_text()

    def train(self, name: str, count: int, *flags: str, **options) -> tuple[np.ndarray, np.ndarray, Path]:
        """Each step's loss and hits, the validation probabilities, and the folder."""
        losses = self.folder / f"{name}.npy"
        assert self.run(name, count, *flags, losses=str(losses), **options) == [0] * max(count, 1), self.log(name)
        folder = self.folder / name
        return np.load(losses), np.load(folder / "val_probabilities.npz")["probabilities"], folder


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Team:
    return Team(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(team) -> tuple[np.ndarray, np.ndarray, Path]:
    return team.train("alone", 0, *MLP)


def assert_alike(own: tuple, expected: tuple) -> None:
    (losses, probabilities, folder), (other_losses, other_probabilities, other) = own, expected
    assert len(losses) >= 50 and len(losses) == len(other_losses)
    difference = np.abs(losses[:50, 0] / other_losses[:50, 0] - 1).max()
    print(f"{folder.name}: losses of 50 steps differ by {difference:.1e} at the most")
    assert difference < 1e-5
    assert np.abs(probabilities - other_probabilities).max() < 1e-3
    assert (folder / "submission.csv").read_bytes() == (other / "submission.csv").read_bytes()
    history, other_history = (pd.read_csv(path / "history.csv") for path in (folder, other))
    assert np.allclose(history.drop(columns="seconds"), other_history.drop(columns="seconds"), rtol=1e-3, atol=2e-3)
    states = [script.read_content(path / "best_model.pth")["model"] for path in (folder, other)]
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_losses_of_one(team, alone, count):
    """Augmentation, mixup, dropout, accumulation, 99 rows in steps of 14 or 15: all are the same draws."""
    assert_alike(team.train(f"mlp{count}", count, *MLP), alone)
    assert all(not team.log(f"mlp{count}", rank) for rank in range(1, count)), "rank 0 speaks for all"
    assert "decoded" in team.log("alone") and "Warning" not in team.log(f"mlp{count}")


@pytest.mark.slow
def test_ranks_give_the_losses_of_one_where_batch_norm_is_frozen(team):
    """By SGD, since Adam's first steps are as long for a gradient that is nothing but rounding as for any other."""
    flags = ["--model", "digit-cnn", "--num-epochs", "8", "--cutmix", "--normalize", "standard", "--optimizer", "sgd",
             "--learning-rate", "0.02"]
    expected = team.train("one", 0, *flags, frozen=True)
    assert_alike(team.train("two", 2, *flags, frozen=True), expected)


@pytest.mark.slow
def test_the_head_learns_alone_on_ranks_too(team):
    flags = ["--model", "digit-cnn", "--num-epochs", "7", "--freeze-epochs", "6", "--average-decay", "0",
             "--optimizer", "sgd"]
    expected = team.train("frozen1", 0, *flags)
    losses = team.train("frozen2", 2, *flags)[0]
    assert np.abs(losses[:42, 0] / expected[0][:42, 0] - 1).max() < 1e-5
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_batch_norm_of_two_ranks_is_their_mean(team):
    """On a CPU each rank's batch norm sees its own images; the statistics that are kept are those of all ranks."""
    losses, _, folder = team.train("norm", 2, "--model", "digit-cnn", "--num-epochs", "3")
    state = script.read_content(folder / "best_model.pth")["model"]
    assert losses[-1, 0] < losses[0, 0] and all(value.isfinite().all() for value in state.values())


def learner_of(folder: Path) -> str:
    return script.digest(script.read_content(folder / "last.pth")["learner"])


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(team, alone):
    """With the same bits: of two ranks' gradients the sum has no order."""
    assert team.run("whole", 2, *MLP, keep=True) == [0, 0]
    for rank, step in ((1, 10), (0, 31)):
        assert team.run("parts", 2, *MLP, keep=True, stop=(rank, step, signal.SIGTERM)) == [143, 143]
    assert team.log("parts").count("stopped by SIGTERM: saved in") == 2
    assert team.run("parts", 2, *MLP, keep=True) == [0, 0]
    assert team.log("parts").count("goes on from last.pth: epoch ") == 2
    assert learner_of(team.folder / "parts") == learner_of(team.folder / "whole")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_the_next_goes_on(team):
    flags = [*MLP, "--num-epochs", "3"]
    first, second = team.run("dead", 2, *flags, stop=(1, 12, signal.SIGKILL))
    assert (first, second) == (1, -signal.SIGKILL)
    assert "error: another rank has gone" in team.log("dead") and "Traceback" not in team.log("dead")
    assert team.run("dead", 3, *flags) == [0, 0, 0]
    assert "goes on from last.pth" in team.log("dead")
    assert "the run began with another number of ranks" in team.log("dead")


def test_bad_input_is_said_once(team):
    assert team.run("bad", 2, *MLP, "--train-csv", "none.csv") == [1, 1]
    assert "none.csv: no such file" in team.log("bad")
    assert "none.csv" not in team.log("bad", 1) and "Traceback" not in team.log("bad", 1)


def test_ranks_that_see_other_files_are_refused(team):
    pd.read_csv(team.data / "train.csv")[:-9].to_csv(team.data / "fewer.csv", index=False)
    statuses = team.run("other", 2, *MLP, others=("--train-csv", "fewer.csv"))
    assert statuses[1] == 1 and statuses[0] == 1
    assert "all ranks must read the same files" in team.log("other", 1)


def test_too_small_batches_are_refused(team):
    assert team.run("small", 3, *MLP, "--batch-size", "5") == [2, 2, 2]
    assert "--batch-size 5 is less than two images for each of 3 ranks" in team.log("small")


@pytest.mark.slow
def test_prediction_and_evaluation_by_ranks(team, alone):
    checkpoint = str(alone[2] / "best_model.pth")
    for count in (0, 3):
        arguments = ["predict", checkpoint, "--data-dir", str(team.data), "--cache-dir", str(team.folder / "cache"),
                     "--output-dir", str(team.folder / f"p{count}"), "--device", "cpu"]
        team.arguments = lambda name, *flags, arguments=arguments: arguments
        assert team.run(f"p{count}", count) == [0] * max(count, 1)
    del team.arguments
    written = [(team.folder / name / "submission.csv").read_bytes() for name in ("p0", "p3")]
    assert written[0] == written[1] == (alone[2] / "submission.csv").read_bytes()


@pytest.mark.slow
def test_folds_by_ranks(team):
    flags = [*MLP, "--folds", "3", "--num-epochs", "2"]
    for name, count in (("folds0", 0), ("folds2", 2)):
        assert team.run(name, count, *flags) == [0] * max(count, 1), team.log(name)
        assert "cross-validated accuracy " in team.log(name)
    one, two = (np.load(team.folder / name / "oof_probabilities.npz") for name in ("folds0", "folds2"))
    assert np.array_equal(one["rows"], two["rows"])
    assert np.allclose(one["probabilities"], two["probabilities"], atol=1e-3)
    submissions = [(team.folder / name / "submission.csv").read_bytes() for name in ("folds0", "folds2")]
    assert submissions[0] == submissions[1]


@pytest.mark.parametrize("total, count", [(14, 3), (2, 3), (7, 7), (100, 8)])
def test_parts_are_all_of_a_step(total, count):
    parts = [script.Ranks(rank, count, joined=True).part(total, lead=1) for rank in range(count)]
    assert np.concatenate([part.places[1:] for part in parts]).tolist() == list(range(total))
    sizes = [part.last - part.first for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(part.places[0] == (part.first - 1) % total for part in parts)


@pytest.mark.parametrize("layer, shape, last", [
    (nn.Dropout(0.4), (12, 30), False), (nn.Dropout(0.4), (12, 6, 5, 5), True), (nn.Dropout(0.4), (12, 6, 5, 5), False),
    (nn.Dropout2d(0.4), (12, 6, 5, 5), True)])
def test_ranks_drop_what_one_drops(layer, shape, last):
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    torch.manual_seed(3)
    expected, shared = layer(x), script.SharedDropout(layer)
    for rank in range(3):
        part = shared.part = script.Ranks(rank, 3, joined=True).part(12)
        torch.manual_seed(3)
        assert torch.equal(shared(x[part.first:part.last]), expected[part.first:part.last])
    assert torch.equal(shared.eval()(x), x)


def test_a_dropout_of_nothing_is_left_as_it_is():
    """Of a whole step's ones for each of a transformer's layers no rank has the memory."""
    model = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.1), nn.Dropout2d(0.0))
    assert len(script.share_dropout(model)) == 1
    assert [type(layer) for layer in model] == [nn.Dropout, script.SharedDropout, nn.Dropout2d]


def test_ranks_augment_as_one_does():
    config = script.Config(image_size=16, erasing=0.5, thickness=0.3, contrast=0.5, brightness=0.5, crop=0.5,
                           perspective=0.1, shift=0.1)
    images = torch.randint(0, 256, (11, 1, 16, 16), dtype=torch.uint8)
    expected = script.augment(images, config, script.Draws(7, torch.device("cpu")))
    for rank in range(4):
        part = script.Ranks(rank, 4, joined=True).part(11, lead=1)
        own = script.augment(images[part.places], config, script.Draws(7, torch.device("cpu"), part))
        assert torch.allclose(own, expected[part.places], atol=1e-6)


def torchrun(folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launcher,
            str(REPOSITORY / "script.py"), *COMMON, *flags, "--data-dir", str(folder / "competition"), "--cache-dir",
            str(folder / "cache"), "--output-dir", str(folder / "out")]


@pytest.mark.slow
def test_torchrun_starts_a_run_again_when_a_rank_dies(tmp_path):
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
    assert "goes on from last.pth: epoch " in text and "kept epoch" in text and "Traceback" not in text
    assert len(pd.read_csv(tmp_path / "out" / "history.csv")) == 60


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
def test_torchrun_is_stopped_and_the_next_goes_on(tmp_path):
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
    assert again.returncode == 0 and "goes on from last.pth: epoch " in again.stdout, again.stderr


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_end(tmp_path):
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
