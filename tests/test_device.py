"""pipeline.device: device, precision and what they depend on."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn

from pipeline import device
from pipeline.device import Runtime, start_runtime
from pipeline.errors import DataError, UsageError


@pytest.mark.parametrize("name", ["cuda:77", "toaster"])
def test_device_that_does_not_compute_is_refused(name):
    with pytest.raises(UsageError, match=f"--device {name} does not work here: .*; try --device auto"):
        start_runtime(name)
    assert start_runtime("auto").device.type in ("cpu", "cuda", "mps")  # the remedy


def test_evaluation_batch_size_is_the_requested_one():
    assert start_runtime("cpu").eval_batch_size == 128
    assert start_runtime("cpu", eval_batch_size=7).eval_batch_size == 7


def test_listed_gpu_that_does_not_compute_falls_back_to_the_cpu(monkeypatch, capsys):
    """A stand-in reports an accelerator of which torch here has no kernels."""
    if torch.cuda.is_available():
        pytest.skip("the GPU of this machine computes")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert device.choose_device("auto") == torch.device("cpu")
    assert "warning: cuda is present but does not compute (" in capsys.readouterr().err


@pytest.mark.parametrize(("bf16", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"),
                                                       (False, False, "float32")])
def test_cpu_precision_follows_what_the_cpu_reports(monkeypatch, bf16, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert start_runtime("cpu").precision == expected
    assert start_runtime("cpu", "float32").precision == "float32"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_gpu_precision_follows_what_the_gpu_reports(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert device.best_precision(torch.device("cuda")) == expected


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="fp16 needs a GPU; on a CPU use bf16 or float32"):
        start_runtime("cpu", "fp16")


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_model_computes_in_the_requested_precision(precision, dtype):
    model = device.AutocastModel(nn.Linear(3, 2), Runtime(precision=precision))
    assert model(torch.ones(1, 3)).dtype == dtype


def test_model_is_moved_in_channels_last_format():
    model = Runtime().to_device(nn.Conv2d(3, 4, 3))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_array_keeps_its_values_on_the_device():
    array = np.arange(6).reshape(2, 3)
    assert device.to_device(array, torch.device("cpu")).tolist() == array.tolist()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS: out of memory")])
def test_out_of_memory_becomes_the_remedy(error):
    with pytest.raises(DataError, match=r"^out of memory with 512 images; try 256$"), \
            device.memory_remedy("with 512 images; try 256"):
        raise error


def test_other_errors_keep_their_type():
    with pytest.raises(RuntimeError, match="shapes differ"), device.memory_remedy("try less"):
        raise RuntimeError("shapes differ")


def test_versions_name_packages_and_sources():
    versions = device.versions()
    assert versions["torch"] == torch.__version__ and versions["numpy"] == np.__version__
    assert len(versions["source_sha256"]) == 16 and set(versions) >= {"python", "pandas", "PIL"}


def test_versions_change_with_any_module(tmp_path):
    """The digest is that of script.py and pipeline/: here of a copy of which one module is changed."""
    def digest() -> str:
        code = "from pipeline import device; print(device.versions()['source_sha256'])"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.stdout

    (tmp_path / "pipeline").mkdir()
    for path in [REPOSITORY / "script.py", *(REPOSITORY / "pipeline").glob("*.py")]:
        (tmp_path / path.relative_to(REPOSITORY)).write_bytes(path.read_bytes())
    before = digest()
    with open(tmp_path / "pipeline" / "presets.py", "a") as file:
        file.write("# changed\n")
    assert len(before.strip()) == 16 and digest() not in ("", before)
