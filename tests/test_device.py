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


DOWNSAMPLING = """
import torch
from torch import nn
import script
from pipeline import models
from pipeline.device import Runtime

class Own(nn.Sequential):
    def __init__(self, num_classes, dropout):
        super().__init__(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 1, stride=2), models.global_pool())
        self.head = nn.Linear(16, num_classes)

script.MODELS["cnn"] = Own
config = script.Config(model="cnn", image_size=64, batch_size=8, learning_rate=0.1, num_epochs=1, dropout=0.0)
model = Runtime().to_device(script.build_model(config, 3))
trainer = script.Trainer(config, model, Runtime(), 8)
for _ in range(3):
    trainer.training_step(torch.rand(8, 1, 64, 64), torch.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]], 0.5)
print(model[0].weight.is_contiguous())
"""


def test_a_layer_that_crashes_in_channels_last_is_trained_in_the_other_format():
    """oneDNN's issue 6035: with channels last, this ends the process on AVX-512 (segmentation fault, double free)."""
    done = subprocess.run([sys.executable, "-c", DOWNSAMPLING], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize(("layer", "kept"), [
    (nn.Conv2d(15, 4, 1, stride=2), True), (nn.Conv2d(16, 4, 1, stride=2), False), (nn.Conv2d(8, 4, 1), False),
    (nn.Conv2d(8, 4, 3, stride=2), False), (nn.Conv2d(8, 4, 1, stride=(1, 2)), True), (nn.Linear(8, 4), False)])
def test_only_layers_that_crash_change_the_format(layer, kept):
    assert device.crashes_channels_last(nn.Sequential(nn.ReLU(), layer)) == kept


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


def test_versions_change_with_any_module(tmp_path, monkeypatch):
    """The digest is that of script.py and pipeline/: here of a copy of which one module is changed."""
    before = device.versions()["source_sha256"]
    (tmp_path / "pipeline").mkdir()
    for path in [REPOSITORY / "script.py", *(REPOSITORY / "pipeline").glob("*.py")]:
        (tmp_path / path.relative_to(REPOSITORY)).write_bytes(path.read_bytes())
    monkeypatch.setattr(device, "__file__", str(tmp_path / "pipeline" / "device.py"))
    assert device.versions()["source_sha256"] == before
    with open(tmp_path / "pipeline" / "presets.py", "a") as file:
        file.write("# changed\n")
    assert device.versions()["source_sha256"] != before
