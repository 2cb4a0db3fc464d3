"""A process that runs the command line and is killed, or meets a full disk, where a test says; used by test_faults."""

import os
import resource
import signal
import sys
from pathlib import Path

# What a run imports with its split and its first optimizer takes longer than the runs here: once, before they fork.
import sklearn.model_selection  # noqa: F401
import torch._dynamo  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline.files
import script
from pipeline.resume import CheckpointManager


def kill_at(call: int, half: bool, files: tuple[str, ...]) -> None:
    """Kill this process before the `call`-th operation on files of these names, or in the middle of a write."""
    done = 0

    def trap(operation):
        def wrapped(first, *rest, **options):
            nonlocal done
            name = Path(first).name if not isinstance(first, int) else ""
            if any(part in name for part in files):
                done += 1
                if done == call:
                    if half and operation is write:
                        with open(first, "wb") as file:
                            file.write(bytes(rest[0])[: len(rest[0]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return operation(first, *rest, **options)
        return wrapped

    write = Path.write_bytes
    Path.write_bytes, os.replace, pipeline.files.fsync = trap(write), trap(os.replace), trap(pipeline.files.fsync)
    pipeline.files.load_verified = trap(pipeline.files.load_verified)


def write_to(log: str) -> None:
    """Send stdout and stderr to a file, and restore the default handler of SIGINT."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def finish(arguments: list[str], keep: bool) -> None:
    """Run the command line and end this process with its status; `keep` leaves last.pth in place."""
    if keep:
        CheckpointManager.discard = lambda self: None
    try:
        status = script.main(arguments)
    except SystemExit as stop:
        status = stop.code
    if sys.stdout:  # None on ranks other than 0
        sys.stdout.flush()
    os._exit(status)


def live(arguments: list[str], log: str, call: int = 0, half: bool = False, keep: bool = False, most_bytes: int = 0,
         files: tuple[str, ...] = ("last", "best_model")) -> None:
    """Run the command line with these faults; `most_bytes` is the largest size of a file that the disk accepts."""
    write_to(log)
    if call:
        kill_at(call, half, files)
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    finish(arguments, keep)
