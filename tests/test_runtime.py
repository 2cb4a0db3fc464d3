"""Room 2: device, precision, and files that appear only when they are whole."""

import ast
import itertools
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

import script
from script import Config, UsageError, start_runtime


def test_importing_has_no_side_effect(tmp_path):
    code = ("import torch; before = torch.initial_seed(); state = torch.get_rng_state(); import script, sys; "
            "script.Config(); "
            "assert torch.initial_seed() == before and torch.equal(torch.get_rng_state(), state); "
            "assert not torch.cuda.is_initialized() and 'matplotlib.pyplot' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, "--not-a-flag"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


def test_every_import_is_of_a_package_that_requirements_name():
    """What a fresh environment lacks would fail only where it is used: imports inside functions count too."""
    nodes = [node for node in ast.walk(ast.parse((REPOSITORY / "script.py").read_text()))
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.split(".")[0] for node in nodes
             for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])}
    required = set(re.findall(r"^[\w-]+", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE))
    assert names - sys.stdlib_module_names == required - {"pillow"} | {"PIL"}


def test_a_device_that_does_not_compute_is_refused():
    with pytest.raises(UsageError, match="--device cuda:77 does not work here"):
        start_runtime(Config(device="cuda:77"))
    with pytest.raises(UsageError, match="--device toaster"):
        start_runtime(Config(device="toaster"))


def test_prediction_takes_as_many_images_at_once_as_asked():
    assert start_runtime(Config(device="cpu")).eval_batch_size == 128
    assert start_runtime(Config(device="cpu", eval_batch_size=7)).eval_batch_size == 7


def test_a_listed_gpu_that_cannot_compute_falls_back_to_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(script, "device_fault", lambda name: "no kernel image is available" if name == "cuda" else "")
    assert script.choose_device("auto") == torch.device("cpu")
    assert "no kernel image is available" in capsys.readouterr().err


@pytest.mark.parametrize(("bf16", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"),
                                                       (False, False, "float32")])
def test_cpu_precision_follows_what_the_cpu_reports(monkeypatch, bf16, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert start_runtime(Config(device="cpu")).precision == expected
    assert start_runtime(Config(device="cpu", precision="float32")).precision == "float32"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_gpu_precision_follows_what_the_gpu_reports(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert script.best_precision(torch.device("cuda")) == expected


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="fp16 trains on a GPU only"):
        start_runtime(Config(device="cpu", precision="fp16"))


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "kept.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), script.whole_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["kept.csv"]
    with script.whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["kept.csv"]


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with (script.folder_to_itself(tmp_path), pytest.raises(script.DataError, match="another run is writing there"),
          script.folder_to_itself(tmp_path)):
        pass
    with script.folder_to_itself(tmp_path):
        pass


def test_a_signal_waits_while_the_program_forks():
    with script.StopSignals() as stops:
        with pytest.raises(script.Stopped), script.no_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stops.waiting is None
        assert stops.waiting == signal.SIGTERM


def test_step_seeds_differ_by_seed_epoch_and_step():
    places = itertools.product(range(3), repeat=3)
    assert len({script.seed_of(Config(seed=seed), epoch, step) for seed, epoch, step in places}) == 27
    assert script.seed_of(Config(seed=1), 2, 3) == script.seed_of(Config(seed=1), 2, 3)
