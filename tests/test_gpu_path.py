"""The steps of a training on a GPU, of which CI has none: no tensor is on the wrong device, and nothing waits."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="its cases are forked")
def test_a_step_on_a_gpu_has_everything_there_and_waits_for_nothing():
    done = subprocess.run([sys.executable, REPOSITORY / "tests" / "without_gpu.py"], capture_output=True, text=True,
                          timeout=280)
    lines = done.stdout.splitlines()
    assert len(lines) == 16 and all(line.endswith(": sound") for line in lines), done.stdout + done.stderr
