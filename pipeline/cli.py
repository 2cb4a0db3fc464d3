"""A frozen dataclass as a command line: types, limits, help texts and near misses."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterable
from typing import Literal

from pipeline.errors import warn

# Flags that were renamed without a change of meaning: the earlier name, without its dashes, and today's.
RENAMED = {"neighbours": "knn-neighbors", "neighbour-share": "knn-weight", "accumulate": "accumulation-steps",
           "average-decay": "ema-decay", "refit": "recenter-warp", "soften": "edge-softening", "views": "tta"}


def flag_of(name: str) -> str:
    """Return the flag of a field, such as --num-epochs of num_epochs."""
    return "--" + name.replace("_", "-")


def check_fields(instance: object, limits: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError for the first field of a wrong type or outside its `limits` (low, high); the default is 0 up."""
    for name, annotation in typing.get_type_hints(type(instance)).items():
        value, choices = getattr(instance, name), typing.get_args(annotation)
        low, high = limits.get(name, (0, math.inf))
        kind = choices[0] if choices else annotation  # int of `int | None`
        if typing.get_origin(annotation) is Literal:
            valid, expected = value in choices, f"one of {', '.join(choices)}"
        elif kind in (bool, str) or isinstance(value, bool) or not isinstance(value, (int, kind)):
            valid, expected = kind in (bool, str) and isinstance(value, kind), f"of type {kind.__name__}"
        else:
            valid = low <= value <= high and value != math.inf
            expected = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        if not valid and not (value is None and type(None) in choices):
            raise ValueError(f"{name} must be {expected}, not {value!r}")


def from_text(annotation: object, text: str) -> object:
    """Convert a flag's text to the annotated type. Text that cannot be converted is returned as it is."""
    kinds = typing.get_args(annotation) or (annotation,)
    if text == "auto" and type(None) in kinds:
        return None
    try:
        return kinds[0](text) if kinds[0] in (int, float) else text
    except ValueError:
        return text


@functools.cache  # Python parses the whole file to find a class
def describe_fields(config_class: type) -> dict[str, tuple[str, str]]:
    """Return each field's heading (the comment line that it stands below) and trailing comment.

    Empty in a notebook cell, whose source Python does not find.
    """
    found, heading = {}, ""
    with contextlib.suppress(OSError, TypeError):
        for title, name, comment in re.findall(r"^    (?:# ([^:\n]+).*|(\w+): .*?(?:  # (.+))?)$",
                                               inspect.getsource(config_class), re.MULTILINE):
            heading = title.lower() or heading
            if name:
                found[name] = heading, comment
    return found


def make_parser(config_class: type, presets: dict[str, dict], commands: dict[str, str],
                most_used: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return a parser for commands, files, --preset and one flag per field, which has its comment as help.

    Flags are grouped as the fields are; the most used ones come first.
    """
    width = min(100, shutil.get_terminal_size().columns) - 2
    parser = argparse.ArgumentParser(
        formatter_class=functools.partial(argparse.HelpFormatter, width=width, max_help_position=26),
        prog="script.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        usage=f"script.py [{' | '.join(commands)}] [CHECKPOINT ...] [--FIELD VALUE ...]",
        description="Train a classifier of small grey images and write a submission.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("words", nargs="*", metavar="COMMAND", default=[],
                        help="; ".join(f"{name}: {text}" for name, text in commands.items()))
    parser.add_argument("--preset", choices=presets, metavar="NAME",
                        help=f"start from a recipe; other flags override it: {', '.join(presets)}")
    described, hints, groups = describe_fields(config_class), typing.get_type_hints(config_class), {}
    for name in dict.fromkeys([*most_used, *hints]):
        (heading, comment), annotation = described.get(name, ("settings", "")), hints[name]
        heading = "most used" if name in most_used else heading
        group = groups[heading] = groups.get(heading) or parser.add_argument_group(heading)
        default = getattr(config_class, name)
        text = f"{comment} (default: {'auto' if default is None else repr(default)})".replace("%", "%%")
        kinds = [getattr(kind, "__name__", kind) for kind in typing.get_args(annotation) or [annotation]]
        form = {"action": argparse.BooleanOptionalAction} if annotation is bool else {
            "type": functools.partial(from_text, annotation), "metavar": "|".join(kinds).replace("NoneType", "auto")}
        group.add_argument(flag_of(name), help=text, **form)
    return parser


def rename_flags(argv: list[str], flags: Iterable[str]) -> list[str]:
    """Return a command line with today's name of each renamed flag; a warning tells the user. `flags` are known."""
    today = {f"--{no}{old}": f"--{no}{new}" for old, new in RENAMED.items() for no in ("", "no-")}
    split = [(argument, *argument.partition("=")) for argument in argv]
    found = {flag: today[flag] for _, flag, *_ in split if today.get(flag) in flags and flag not in flags}
    if found:
        warn("; ".join(f"{flag} is called {new} now" for flag, new in found.items()))
    return [found[flag] + equals + value if flag in found else argument for argument, flag, equals, value in split]


def parse(argv: list[str] | None, config_class: type, presets: dict[str, dict], commands: dict[str, str],
          why_unused: Callable[[str, str], str], most_used: Iterable[str] = ()) -> tuple[str, list[str], dict]:
    """Return the command, the files and the settings (preset and flags) of a command line.

    `why_unused(command, setting)` says why a setting has no effect on a command, or returns "". Exits with status 2
    and one line for a wrong command line.
    """
    parser = make_parser(config_class, presets, commands, most_used)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    given, unknown = parser.parse_known_intermixed_args(rename_flags(sys.argv[1:] if argv is None else argv, flags))
    settings = vars(given)
    command, *files = settings.pop("words") or [next(iter(commands))]
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    if command not in commands:
        *others, last = commands
        parser.error(f"unknown command {command}; the commands are {', '.join(others)} and {last}")
    if command == next(iter(commands)) and files:
        parser.error(f"{command} takes no checkpoint ({files[0]}); to use one: script.py predict {files[0]}")
    for name in sorted(settings):
        if reason := why_unused(command, name):
            parser.error(f"{flag_of(name)} has no effect on {command}: {reason}")
    try:
        settings = {**presets.get(settings.pop("preset", ""), {}), **settings}
        config_class(**settings)
    except ValueError as error:
        parser.error(str(error))
    return command, files, settings


def pick(settings_class: type, config: object):
    """Return a smaller dataclass that is filled with the fields of the same name."""
    return settings_class(**{field.name: getattr(config, field.name) for field in dataclasses.fields(settings_class)})
