"""pipeline.signals: stop signals that raise, wait or end the process, and exit statuses."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from pipeline.errors import DataError, UsageError
from pipeline.signals import Stopped, StopSignals, block_signals, exit_status


def send(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_raises_at_once(number):
    with StopSignals(), pytest.raises(Stopped) as stop:
        send(number)
    assert stop.value.number == number


def test_held_signal_raises_when_signals_are_let_through():
    with StopSignals() as stops, stops.hold():
        with stops.hold(False):
            pass
        send(signal.SIGTERM)
        assert stops.pending == signal.SIGTERM
        with pytest.raises(Stopped), stops.hold(False):
            pytest.fail("the signal is let through before the block")


def test_signal_raises_at_once_inside_an_inner_block():
    with StopSignals() as stops, stops.hold(), pytest.raises(Stopped) as stop, stops.hold(False):
        send(signal.SIGUSR1)
    assert stop.value.number == signal.SIGUSR1


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_signal_is_blocked_while_the_program_forks():
    with StopSignals() as stops:
        with pytest.raises(Stopped), block_signals():
            send(signal.SIGTERM)
            assert stops.pending is None
        assert stops.pending == signal.SIGTERM


def test_second_interrupt_ends_the_process_at_once():
    code = ("import os, signal\nfrom pipeline.signals import StopSignals\n"
            "kill = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
            "with StopSignals() as stops, stops.hold():\n    kill()\n    print('held', flush=True)\n    kill()\n"
            "    print('not reached', flush=True)")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "held\n") and done.stderr.startswith("stopped at once")


@pytest.mark.parametrize(("error", "status", "line"), [
    (DataError("a.csv, row 3: label is empty; fill it in"), 1, "error: a.csv, row 3: label is empty; fill it in"),
    (UsageError("--device toaster does not work here"), 2, "error: --device toaster does not work here"),
    (OSError(28, "No space left on device", "out/history.csv"), 1, "error: out/history.csv: No space left on device"),
    (OSError(28, "No space left on device"), 1, "error: output: No space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: out of memory (CUDA out of memory); try half the "
     "--batch-size, or for prediction a smaller --eval-batch-size"),
    (MemoryError(), 1, "error: out of memory (MemoryError); try half the --batch-size, or for prediction a smaller "
     "--eval-batch-size"),
    (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM: nothing is lost"),
    (Stopped(signal.SIGUSR1, "saved in last.pth"), 138, "stopped by SIGUSR1: saved in last.pth"),
    (KeyboardInterrupt(), 130, "stopped by SIGINT: nothing is lost"),
], ids=lambda value: type(value).__name__)
def test_exception_becomes_one_line_and_a_status(capsys, error, status, line):
    def fail(_: StopSignals) -> None:
        raise error

    assert exit_status(fail, "nothing is lost") == status
    assert capsys.readouterr().err == line + "\n"


def test_success_is_status_0():
    assert exit_status(lambda stops: stops.pending, "") == 0


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        exit_status(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")), "")
