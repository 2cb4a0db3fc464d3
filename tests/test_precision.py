"""pipeline.precision and what takes its choice: a run, its resumed rest, its folds and predict."""

import json

import pytest
import torch
from conftest import QUICK

import script
from pipeline import precision
from pipeline.device import start_runtime
from pipeline.errors import DataError
from pipeline.resume import CheckpointManager, stored_precision

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes this machine another one."""
    def become(bf16: bool = False, amx: bool = False, gain: float = 2.0) -> None:
        precision.fastest_precision.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(precision, "bf16_gain", lambda: gain)

    yield become
    precision.fastest_precision.cache_clear()


@pytest.mark.parametrize(("bf16", "amx", "gain", "expected"), [
    (True, False, 2.0, "bf16"),      # AMD with AVX512-BF16
    (True, False, 0.72, "float32"),  # Intel with AVX512-BF16, without AMX
    (True, True, 2.4, "bf16"),       # Intel with AMX
    (False, True, 1.5, "bf16"),
    (True, False, 1.02, "float32"),
    (False, False, 9.0, "float32"),  # AVX2 or older
])
def test_a_cpu_trains_in_the_precision_that_is_faster_on_it(machine, bf16, amx, gain, expected):
    machine(bf16, amx, gain)
    runtime = start_runtime("cpu")
    assert runtime.precision == expected
    assert f"{expected} (auto: " in runtime.describe()
    assert (f"bf16 is {gain:.2f} times as fast as float32 here" in runtime.describe()) == (bf16 or amx)
    assert start_runtime("cpu", "float32").precision == "float32"


def test_the_choice_is_made_once_in_a_process(machine, monkeypatch):
    machine(bf16=True)
    assert start_runtime("cpu").precision == "bf16"
    monkeypatch.setattr(precision, "bf16_gain", lambda: pytest.fail("timed again"))
    assert start_runtime("cpu").precision == "bf16"


@pytest.mark.parametrize(("bf16", "capability", "expected"), [
    (True, (8, 0), "bf16"), (False, (7, 5), "fp16"), (False, (7, 0), "fp16"), (False, (6, 1), "float32")])
def test_a_gpu_trains_in_the_precision_that_its_matrix_units_have(monkeypatch, bf16, capability, expected):
    precision.fastest_precision.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision.fastest_precision(torch.device("cuda"))[0] == expected
    precision.fastest_precision.cache_clear()


def test_the_timing_computes_gradients_in_both_precisions():
    if not precision.works(CPU, "bf16"):
        pytest.skip("without instructions for bf16 it takes minutes, and is never made")
    assert 0.05 < precision.bf16_gain() < 20


def test_a_stored_precision_is_taken_where_the_device_has_it(machine):
    machine(bf16=True, gain=2.0)
    assert start_runtime("cpu", stored="float32").precision == "float32"
    assert "float32 (auto: as stored)" in start_runtime("cpu", stored="float32").describe()
    assert start_runtime("cpu", "bf16", stored="float32").precision == "bf16"  # the command line is stronger
    assert start_runtime("cpu", stored="fp16").precision == "bf16"  # trained on a GPU
    machine(bf16=False)
    assert start_runtime("cpu", stored="bf16").precision == "float32"


def stored(folder) -> str:
    return json.loads((folder / "run.json").read_text())["config"]["precision"]


def without_precision(flags: list[str]) -> list[str]:
    place = flags.index("--precision")
    return flags[:place] + flags[place + 2:]


def test_a_resumed_run_keeps_its_precision(machine, main_in_process, command, monkeypatch):
    """The timing gives the opposite when it is resumed."""
    machine(bf16=True, gain=0.5)
    flags = [*without_precision(QUICK), "--checkpoint-minutes", "0"]
    finish_epoch = script.finish_epoch

    def end(trainer, data, state, *rest) -> None:
        if state.epoch == 2:
            raise DataError("cut off")
        finish_epoch(trainer, data, state, *rest)

    monkeypatch.setattr(script, "finish_epoch", end)
    assert main_in_process(*flags, "--num-epochs", "3")[0] == 1
    monkeypatch.setattr(script, "finish_epoch", finish_epoch)
    machine(bf16=True, gain=2.0)
    status, printed, _ = main_in_process(*flags, "--num-epochs", "3")
    assert status == 0 and "resumes from last.pth" in printed
    assert "float32 (auto: as stored)" in printed and stored(command.output) == "float32"


@pytest.mark.slow
def test_a_new_run_does_not_take_the_precision_of_a_finished_one(machine, main_in_process, command):
    machine(bf16=True, gain=0.5)
    assert main_in_process(*without_precision(QUICK))[0] == 0 and stored(command.output) == "float32"
    machine(bf16=True, gain=2.0)
    assert main_in_process(*without_precision(QUICK))[0] == 0 and stored(command.output) == "bf16"


def test_folds_and_predict_keep_the_precision_of_the_first(machine, main_in_process, command):
    machine(bf16=True, gain=0.5)
    flags = [*without_precision(QUICK), "--folds", "2"]
    assert main_in_process(*flags, "--fold", "0")[0] == 0
    machine(bf16=True, gain=2.0)
    assert main_in_process(*flags, "--fold", "1")[0] == 0
    assert [stored(command.output / name) for name in ("fold0", "fold1")] == ["float32", "float32"]
    _, printed, _ = main_in_process("predict", str(command.output / "fold0" / "best_model.pth"))
    assert "float32 (auto: as stored)" in printed


def test_nothing_is_stored_in_an_empty_or_damaged_folder(tmp_path):
    (tmp_path / "last.pth").write_bytes(b"PK")
    assert stored_precision(tmp_path, [tmp_path / "fold0"]) == ""
    fingerprint = {"settings": {"precision": "bf16"}, "classes": [], "data": "", "device": "cpu"}
    CheckpointManager(tmp_path, fingerprint, resume=False).save({"state": {"best": None}})
    assert stored_precision(tmp_path, []) == "bf16"
