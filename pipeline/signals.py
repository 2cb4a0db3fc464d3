"""SIGINT, SIGTERM and SIGUSR1 end a run in an orderly way; exceptions become exit statuses."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

from pipeline.device import is_out_of_memory
from pipeline.distributed import is_launched, is_lost_rank, leave_ranks
from pipeline.errors import DataError, first_line, launch_rank

# Windows has two of the three.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number


class StopSignals:
    """Context manager under which a stop signal raises Stopped, later if held; a second SIGINT ends the process."""

    def __init__(self):
        self.held, self.pending, self.previous = False, None, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.pending is not None and number == signal.SIGINT:
            os.write(2, b"stopped at once, without saving\n")  # the signal may have interrupted a print
            os._exit(128 + number)
        self.pending = self.pending or number
        if not self.held:
            raise Stopped(self.pending)

    @contextlib.contextmanager
    def hold(self, held: bool = True):
        """Hold signals, or let them through, inside a with block."""
        before, self.held = self.held, held
        try:
            if not held and self.pending is not None:
                raise Stopped(self.pending)
            yield
        finally:
            self.held = before


@contextlib.contextmanager
def block_signals():
    """Block stop signals in a with block that forks, whose hooks drop exceptions, and in the processes forked there."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows does not fork
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_status(action: Callable[[StopSignals], object], stopped: str) -> int:
    """Call `action` and return the exit status of the program.

    0 on success; after one line on stderr 1 for bad data, 2 for bad usage, and 128 plus its number for a signal.
    `stopped` is what the line says of a signal that does not say more itself.
    """
    name = f"rank {launch_rank()}: error" if launch_rank() else "error"
    with contextlib.suppress(AttributeError):  # a notebook's output is not a terminal
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold characters that the terminal lacks
    try:
        with StopSignals() as stops:
            action(stops)
        leave_ranks()
        return 0
    except DataError as error:
        status, fault = error.exit_status, str(error)
    except OSError as error:  # a full disk, a folder that vanished
        status, fault = 1, f"{error.filename or 'output'}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        status, fault = 1, f"another rank has ended ({first_line(error)}); the same command resumes"
        if is_out_of_memory(error):
            fault = (f"out of memory ({first_line(error)}); try half the --batch-size, or for prediction a smaller "
                     "--eval-batch-size")
        elif not is_lost_rank(error):
            raise
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if not launch_rank():
            print(f"stopped by {signal.Signals(number).name}: {str(stop) or stopped}", file=sys.stderr)
        return 128 + number
    print(f"{name}: {fault}", file=sys.stderr)
    return status


def end_process(status: int) -> None:
    """End the process with an exit status; without torchrun, return if it is 0."""
    if is_launched():  # while Python is taken down, a thread of gloo that drops its last tensor would abort the rank
        atexit._run_exitfuncs()
        print(end="", flush=True)
        os._exit(status)
    if status:
        sys.exit(status)
