"""A process that runs the command line and is killed, or stumbles, where a test says: imported by test_faults.py."""

import os
import resource
import signal
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401  (the first optimizer imports it, which takes longer than the runs here)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import script


def kill_at(call: int, half: bool, files: tuple[str, ...]) -> None:
    """Let the process kill itself before the so-manyth operation on these files, or in the middle of their bytes."""
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
    Path.write_bytes, os.replace, script.flush = trap(write), trap(os.replace), trap(script.flush)
    script.read_content = trap(script.read_content)


def write_to(log: str) -> None:
    """Let stdout and stderr go to a file, and Ctrl-C be what it is in a program that was started by hand."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def finish(arguments: list[str], keep: bool) -> None:
    """Run the command line and end this process with its status; where asked for, last.pth stays."""
    if keep:
        script.RunKeeper.discard = lambda self: None
    try:
        status = script.main(arguments)
    except SystemExit as stop:
        status = stop.code
    if sys.stdout:  # a rank but the first has none
        sys.stdout.flush()
    os._exit(status)


def live(arguments: list[str], log: str, call: int = 0, half: bool = False, keep: bool = False, most_bytes: int = 0,
         files: tuple[str, ...] = ("last", "best_model")) -> None:
    """What the process does: the command line, with stdout and stderr in a file; at the end it may keep last.pth."""
    write_to(log)
    if call:
        kill_at(call, half, files)
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    script.LEAST_SECONDS = 0  # to be saved after every epoch, however short
    finish(arguments, keep)
