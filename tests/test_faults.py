"""Real processes that are killed, stopped or meet a full disk, and resumed: no run is lost, and the result is equal."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import victim
from conftest import REPOSITORY, make_competition

from pipeline import files


def slow(*values: object):
    """Return a case of a parametrised test that only .ci/run runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


# A run of nine steps, each saved. The state of the tiny network has a few hundred kilobytes.
SMALL = ["--model", "tiny", "--image-size", "16", "--batch-size", "32", "--num-epochs", "3", "--no-pictures",
         "--knn-neighbors", "5", "--device", "cpu", "--checkpoint-minutes", "0"]
UNFINISHED = 84  # operation on files of checkpoints before which the unfinished run is killed, in its third epoch


class Runs:
    """Runs on one competition, each in its own folder, in processes forked from one that has imported script.py."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, make_competition(folder / "competition")
        self.context = multiprocessing.get_context("forkserver")
        with pytest.MonkeyPatch.context() as patches:  # the server's environment is that of all processes
            patches.setenv("PYTHONPATH", str(Path(victim.__file__).parent))
            self.context.set_forkserver_preload(["victim"])
            self.reference = self.run("reference", keep=True)

    def arguments(self, name: str, *flags: str) -> list[str]:
        return [*SMALL, "--data-dir", str(self.data), "--output-dir", str(self.folder / name), "--cache-dir",
                str(self.folder / "cache"), *flags]

    def start(self, name: str, *flags: str, **options) -> multiprocessing.Process:
        process = self.context.Process(target=victim.live, kwargs=options, args=(
            self.arguments(name, *flags), str(self.folder / f"{name}.log")))
        process.start()
        return process

    def run(self, name: str, *flags: str, status: int = 0, **options) -> Path:
        process = self.start(name, *flags, **options)
        process.join(120)
        assert process.exitcode == status, self.log(name)
        return self.folder / name

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"))


def result(folder: Path) -> dict:
    """Return everything that a run writes, except for seconds, folders and versions."""
    best = files.load_verified(folder / "best_model.pth")
    best["metrics"].pop("seconds")
    best.pop("versions")
    for name in ("output_dir", "cache_dir", "checkpoint_minutes"):
        best["config"].pop(name)
    history = pd.read_csv(folder / "history.csv").drop(columns="seconds")
    last = files.load_verified(folder / "last.pth")
    return {"best": files.sha256_of(best), "history": history.to_csv(), "trainer": files.sha256_of(last["trainer"]),
            "submission": (folder / "submission.csv").read_text(),
            "probabilities": np.load(folder / "val_probabilities.npz")["probabilities"].tobytes()}


def assert_same(runs: Runs, name: str) -> None:
    left = [path.name for path in (runs.folder / name).iterdir() if path.name.startswith(".")]
    assert not left, "a file of a killed process was left behind"
    own, expected = result(runs.folder / name), result(runs.reference)
    for part in expected:
        assert own[part] == expected[part], f"{part} differs\n{runs.log(name)}"


def kill_and_resume(runs: Runs, name: str, rng: np.random.Generator, kills: int, longest: float) -> int:
    """Kill a run at random moments, resume it each time, compare, and return how many kills met a living process."""
    met = 0
    for _ in range(kills):
        process = runs.start(name, keep=True)
        process.join(rng.uniform(0.1, longest))
        if process.exitcode is not None:  # it was over before
            assert process.exitcode == 0, runs.log(name)
            break
        process.kill()
        process.join()
        met += 1
    runs.run(name, keep=True)
    assert_same(runs, name)
    return met


def test_killed_run_ends_with_the_same_bits(runs):
    rng, longest = np.random.default_rng(0), seconds_of_a_run(runs)
    assert sum(kill_and_resume(runs, f"killed{number}", rng, 3, longest) for number in range(2)) >= 3
    assert "resumes from last.pth: epoch " in runs.log("killed0") + runs.log("killed1")


def seconds_of_a_run(runs: Runs) -> float:
    started = time.monotonic()
    runs.run(f"timed{started}", keep=True)
    return time.monotonic() - started


@pytest.mark.parametrize("call, half", [slow(1, True), slow(9, False), slow(40, True), (67, False), slow(98, True)])
def test_kill_while_writing_a_checkpoint_loses_nothing(runs, call, half):
    name = f"inside{call}"
    runs.run(name, status=-signal.SIGKILL, call=call, half=half, keep=True)
    runs.run(name, keep=True)
    assert_same(runs, name)


@pytest.mark.slow
def test_fifty_kills(runs):
    """Kills at random moments, three to a run, and kills while a checkpoint is written."""
    rng, longest, met, runs_killed = np.random.default_rng(1), seconds_of_a_run(runs), 0, 0
    while met < 50:
        met += kill_and_resume(runs, f"random{runs_killed}", rng, 3, longest)
        runs_killed += 1
    inside = rng.integers(1, 80, 20)
    for number, call in enumerate(inside):
        runs.run(f"writing{number}", status=-signal.SIGKILL, call=int(call), half=bool(number % 2), keep=True)
        runs.run(f"writing{number}", keep=True)
        assert_same(runs, f"writing{number}")
    print(f"{met} kills at random moments of {runs_killed} runs, {len(inside)} inside the writing of a checkpoint: "
          "every run ended with the same bits")


@pytest.mark.slow
def test_killed_real_command_ends_with_the_same_bits(tmp_path):
    """The light network, in bf16 if the CPU has it, with pictures."""
    data = make_competition(tmp_path / "competition", 200)
    common = [sys.executable, str(REPOSITORY / "script.py"), "--data-dir", str(data), "--cache-dir",
              str(tmp_path / "c"), "--image-size", "16", "--batch-size", "32", "--num-epochs", "4", "--model", "cnn",
              "--checkpoint-minutes", "0.005", "--device", "cpu"]
    results = []
    for name, kills in (("whole", 0), ("killed", 3)):
        command = [*common, "--output-dir", str(tmp_path / name)]
        for _ in range(kills):
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout:
                    if line.startswith("epoch"):
                        process.kill()
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0 and ("resumes from" in done.stdout) == (kills > 0), done.stderr
        best = files.load_verified(tmp_path / name / "best_model.pth")
        results.append((files.sha256_of(best["model"]), files.sha256_of(best["knn"]),
                        (tmp_path / name / "submission.csv").read_text()))
    assert results[0] == results[1]


@pytest.mark.parametrize("name, status", [slow("SIGINT", 130), ("SIGTERM", 143), slow("SIGUSR1", 138)])
def test_signal_saves_and_the_run_is_resumed(runs, name, status):
    process = runs.start(name, "--checkpoint-minutes", "60", keep=True)
    wait_for(runs, name, "epoch   1/3")
    os.kill(process.pid, getattr(signal, name))
    process.join(10)
    assert process.exitcode == status, runs.log(name)
    last = runs.log(name).strip().split("\n")[-1]
    assert last.startswith(f"stopped by {name}: saved in ") and last.endswith("the same command resumes from there")
    assert "Traceback" not in runs.log(name)
    runs.run(name, keep=True)
    assert "resumes from last.pth: epoch " in runs.log(name)
    assert_same(runs, name)


def wait_for(runs: Runs, name: str, text: str) -> None:
    """Wait until a run has printed a text."""
    until = time.monotonic() + 60
    while not (runs.folder / f"{name}.log").exists() or text not in runs.log(name):
        assert time.monotonic() < until, runs.log(name)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unfinished(runs) -> Path:
    """Return the folder of a run that was killed in its third epoch."""
    runs.run("unfinished", status=-signal.SIGKILL, call=UNFINISHED)
    state = files.load_verified(runs.folder / "unfinished" / "last.pth")["state"]
    assert (state["epoch"], state["best"]["epoch"]) == (3, 2) and state["step"] > 0
    return runs.folder / "unfinished"


def copy_unfinished(runs: Runs, unfinished: Path, name: str) -> Path:
    """Return a copy of the unfinished run."""
    return Path(shutil.copytree(unfinished, runs.folder / name))


@pytest.mark.parametrize("flags, difference", [
    slow(["--learning-rate", "0.02"], "--learning-rate 0.01 (not 0.02)"),
    slow(["--model", "digit-cnn"], "--model tiny (not "),
    slow(["--seed", "1", "--dropout", "0.1"], "--dropout 0.0 (not 0.1), --seed 0 (not 1)"),
    (["--train-csv", "relabelled.csv"], "other training rows or images"),
    slow(["--train-csv", "fewer.csv"], "5 other classes"),
])
def test_state_of_another_run_is_refused(runs, unfinished, flags, difference):
    name = "other" + "".join(filter(str.isalnum, "".join(flags)))
    folder, table = copy_unfinished(runs, unfinished, name), pd.read_csv(runs.data / "train.csv", dtype=str)
    swapped = table.label.to_numpy().copy()
    swapped[:2] = swapped[1::-1]
    table.assign(label=swapped).to_csv(runs.data / "relabelled.csv", index=False)
    table[table.label != "3"].to_csv(runs.data / "fewer.csv", index=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    runs.run(name, *flags, status=1)
    error = runs.log(name).strip().split("\n")[-1]
    assert error.startswith(f"error: {folder}/last.pth: holds an unfinished run with {difference}"), error
    assert error.endswith("--no-resume to start over") and "Traceback" not in runs.log(name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    runs.run(name, *flags, "--no-resume", "--num-epochs", "1")
    assert "resumes from" not in runs.log(name) and not list(folder.glob("last*"))


@pytest.mark.parametrize("flags", [["--weights", "typo.pth"], slow(["--max-minutes", "0.01"])])
def test_no_resume_removes_nothing_if_the_command_is_wrong(runs, unfinished, flags):
    folder = copy_unfinished(runs, unfinished, "kept" + flags[0])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    runs.run(folder.name, "--no-resume", *flags, status=2 if "minutes" in flags[0] else 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_version_of_torch_is_warned_of(runs, unfinished):
    folder = copy_unfinished(runs, unfinished, "versions")
    found = files.load_verified(folder / "last.pth")
    files.save_verified(folder / "last.pth", {**found, "versions": {**found["versions"], "torch": "2.0"}})
    runs.run("versions")
    assert re.search(r"warning: the run began with another (\w+, )*torch:", runs.log("versions")), runs.log("versions")


def test_finished_run_starts_over(runs):
    for _ in range(2):
        folder = runs.run("twice")
    assert "resumes from" not in runs.log("twice") and not list(folder.glob("last*"))
    assert (folder / "submission.csv").read_text() == (runs.reference / "submission.csv").read_text()


@pytest.mark.parametrize("share", [slow(0.0), slow(0.25), 0.5, slow(0.99), "flipped"])
def test_damaged_state_is_replaced_by_the_one_before(runs, unfinished, share):
    name = f"damaged{share}"
    folder = copy_unfinished(runs, unfinished, name)
    damage(folder / "last.pth", share)
    runs.run(name, keep=True)
    assert f"warning: {folder}/last.pth: cannot be used" in runs.log(name) and "resumes from" in runs.log(name)
    assert_same(runs, name)


def damage(path: Path, share: float | str) -> None:
    """Cut a file, or flip a bit in each byte around its middle, which may be padding of up to 64 bytes."""
    content = bytearray(path.read_bytes())
    if share == "flipped":
        for place in range(len(content) // 2 - 64, len(content) // 2 + 64):
            content[place] ^= 1
    else:
        del content[int(share * len(content)):]
    path.write_bytes(content)


@pytest.mark.slow
def test_two_damaged_states_are_refused(runs, unfinished):
    folder = copy_unfinished(runs, unfinished, "both")
    for path in folder.glob("last*.pth"):
        damage(path, 0.5)
    runs.run("both", status=1)
    error = runs.log("both").strip().split("\n")[-1]
    assert error.startswith(f"error: {folder}/last.pth: cannot be used")
    assert error.endswith("remove what is damaged, or start over with --no-resume")
    runs.run("both", "--no-resume")
    assert "resumes from" not in runs.log("both") and not list(folder.glob("last*"))


def test_missing_best_model_is_reported(runs, unfinished):
    folder = copy_unfinished(runs, unfinished, "gone")
    (folder / "best_model.pth").unlink()
    runs.run("gone", status=1)
    assert "best_model.pth, of epoch 2, is missing; restore it, or start over with --no-resume" in runs.log("gone")
    shutil.copy(unfinished / "best_model.pth", folder)
    runs.run("gone", keep=True)
    assert "resumes from last.pth" in runs.log("gone")
    assert_same(runs, "gone")


def test_time_limit_includes_earlier_processes(runs, unfinished):
    folder = copy_unfinished(runs, unfinished, "late")
    found = files.load_verified(folder / "last.pth")
    files.save_verified(folder / "last.pth", {**found, "elapsed": 3600.0})
    runs.run("late", "--max-minutes", "60")
    history, reference = (pd.read_csv(path / "history.csv") for path in (folder, runs.reference))
    assert history.learning_rate.iloc[-1] > reference.learning_rate.iloc[-1], "the last epoch was trained to its end"
    assert len(pd.read_csv(folder / "submission.csv")) == 30


def test_full_disk_is_named_and_leaves_old_files(runs):
    folder = runs.folder / "full"
    folder.mkdir()
    for name in ("best_model.pth", "submission.csv"):
        (folder / name).write_text("old")
    runs.run("full", status=1, most_bytes=20_000)
    error = runs.log("full").strip().split("\n")[-1]
    assert error == f"error: {folder}/{Path(error.split(': ')[1]).name}: File too large"
    assert "Traceback" not in runs.log("full")
    assert sorted(path.name for path in folder.iterdir()) == ["best_model.pth", "submission.csv"]
    assert {path.read_text() for path in folder.iterdir()} == {"old"}


def test_removed_output_folder_is_named(runs):
    process = runs.start("vanishing", "--num-epochs", "200")
    wait_for(runs, "vanishing", "epoch   1/")
    while (runs.folder / "vanishing").exists():  # the run makes new files while the old ones go
        shutil.rmtree(runs.folder / "vanishing", ignore_errors=True)
    process.join(60)
    error = runs.log("vanishing").strip().split("\n")[-1]
    assert process.exitcode == 1 and error.startswith("error: ") and "vanishing" in error and "Traceback" not in error


@pytest.mark.parametrize("half", [slow(False), True])
def test_kill_while_writing_the_image_cache_is_harmless(runs, half, tmp_path):
    cache = ["--cache-dir", str(tmp_path)]
    runs.run(f"cachekill{half}", *cache, status=-signal.SIGKILL, call=1, half=half, files=("images-",))
    assert len(list(tmp_path.iterdir())) == 1, "the process was not killed while it wrote"
    runs.run(f"cachekill{half}", *cache, keep=True)
    assert_same(runs, f"cachekill{half}")
    assert not list(tmp_path.glob(".*")), "a file of the killed process was left behind"


def test_two_runs_share_the_image_cache(runs, tmp_path):
    processes = [runs.start(f"pair{number}", "--cache-dir", str(tmp_path), keep=True) for number in range(2)]
    for number, process in enumerate(processes):
        process.join(120)
        assert process.exitcode == 0, runs.log(f"pair{number}")
        assert_same(runs, f"pair{number}")
