"""Errors whose message is meant for the user, and warnings."""

import os
import sys


class DataError(Exception):
    """The user's data cannot be used. The message names the file, the row and the remedy."""

    exit_status = 1


class UsageError(DataError):
    """A setting or argument cannot be used here."""

    exit_status = 2


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def launch_rank() -> int:
    """Return the rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def warn(message: str) -> None:
    """Print a warning to stderr. Only rank 0 prints."""
    if launch_rank() == 0:
        print(f"warning: {message}", file=sys.stderr)
