"""pipeline.cli: a dataclass as a command line, on a small dataclass of its own and on script.Config."""

import dataclasses
import inspect
import math
import re
import typing
from dataclasses import dataclass
from typing import Literal

import pytest

import script
from pipeline import cli
from script import Config, parse_command_line

FIELDS = dataclasses.fields(Config)
HINTS = typing.get_type_hints(Config)
NEEDS = {"fold": {"folds": 5}}  # settings without which another one is refused
COMMANDS = {"run": "do it (the default)", "check": "look at it", "draw": "paint it"}


@dataclass(frozen=True)
class Settings:
    """A dataclass with a field of every type that a command line knows."""

    name: str = "a"                    # a name
    count: int = 2                     # whole number, 50% of it
    share: float = 0.5                 # share of something
    fast: bool = False                 # do it fast
    kind: Literal["one", "two"] = "one"  # one of two
    size: int | None = None            # a size in pixels

    def __post_init__(self) -> None:
        cli.check_fields(self, {"share": (0, 1), "count": (1, math.inf)})


def parse(*argv: str) -> tuple[str, list[str], dict]:
    """Parse a command line of Settings, on which draw does not take --count."""
    return cli.parse(list(argv), Settings, {"large": {"size": 100, "count": 9}}, COMMANDS,
                     lambda command, name: "it has no colour" if (command, name) == ("draw", "count") else "")


def test_flags_become_values_of_the_annotated_type():
    assert parse("--name", "b", "--count", "3", "--share", "1", "--fast", "--kind", "two", "--size", "8") == (
        "run", [], {"name": "b", "count": 3, "share": 1.0, "fast": True, "kind": "two", "size": 8})
    assert parse("--size", "auto", "--no-fast")[2] == {"size": None, "fast": False}


def test_only_given_settings_are_returned():
    assert parse() == ("run", [], {})


def test_commands_and_files_may_stand_anywhere():
    assert parse("--count", "3", "run")[0] == "run"
    assert parse("check", "a.pth", "--name", "x", "b.pth") == ("check", ["a.pth", "b.pth"], {"name": "x"})


def test_flags_override_a_preset():
    assert parse("--preset", "large", "--count", "3")[2] == {"size": 100, "count": 3}


@pytest.mark.parametrize(("argv", "message"), [
    (["--coutn", "3"], "unknown argument --coutn; did you mean --count?"),
    (["--coutn=3"], "unknown argument --coutn=3; did you mean --count?"),
    (["--zzz"], "unknown argument --zzz; see --help"),
    (["--cou", "3"], "unknown argument --cou; did you mean --count?"),
    (["--count", "many"], "count must be of type int, not 'many'"),
    (["--count", "2.5"], "count must be of type int, not '2.5'"),
    (["--count", "0"], "count must be at least 1, not 0"),
    (["--share", "1.5"], "share must be from 0 to 1, not 1.5"),
    (["--share", "nan"], "share must be from 0 to 1, not nan"),
    (["--size", "-3"], "size must be at least 0, not -3"),
    (["--kind", "three"], "kind must be one of one, two, not 'three'"),
    (["--preset", "small"], "invalid choice: 'small'"),
    (["--count"], "expected one argument"),
    (["paint"], "unknown command paint; the commands are run, check and draw"),
    (["run", "a.pth"], "run takes no checkpoint (a.pth); to use one: script.py predict a.pth"),
    (["draw", "--count", "3"], "--count has no effect on draw: it has no colour"),
])
def test_wrong_usage_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("settings", [{"name": 3}, {"count": "3"}, {"count": True}, {"count": 2.0}, {"fast": 1},
                                      {"share": math.inf}, {"share": "0.5"}, {"size": 1.5}, {"kind": None}])
def test_wrong_type_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must be "):
        Settings(**settings)


def test_whole_number_is_a_valid_share():
    assert Settings(share=1).share == 1


def test_flag_has_dashes():
    assert cli.flag_of("num_epochs") == "--num-epochs"


def test_comments_are_the_help_texts():
    assert cli.describe_fields(Settings)["count"] == ("", "whole number, 50% of it")
    assert list(cli.describe_fields(Config)) == list(HINTS), "every field, and nothing else"
    text = " ".join(cli.make_parser(Settings, {}, COMMANDS).format_help().split())
    assert "whole number, 50% of it (default: 2)" in text and "a size in pixels (default: " in text
    assert "share of something (default: 0.5)" in text
    assert "check: look at it" in text


def test_class_without_source_has_no_comments():
    """As in a notebook cell, whose source Python does not find."""
    pasted = {}
    exec("import dataclasses\n@dataclasses.dataclass\nclass Pasted:\n    size: int = 1  # a size\n", pasted)
    assert cli.describe_fields(pasted["Pasted"]) == {}
    assert "--size" in cli.make_parser(pasted["Pasted"], {}, COMMANDS).format_help()


def test_pick_takes_the_fields_of_the_same_name():
    @dataclass(frozen=True)
    class Part:
        size: int | None
        name: str

    assert cli.pick(Part, Settings(size=4, name="c", count=7)) == Part(4, "c")


def another_value(field: dataclasses.Field):
    """Return a valid value of Config's field that is not its default."""
    annotation = HINTS[field.name]
    if typing.get_origin(annotation) is Literal:
        return next(choice for choice in typing.get_args(annotation) if choice != field.default)
    if annotation is bool:
        return not field.default
    if annotation is str:
        return {"model": "resnet", "device": "cpu", "milestones": "3, 7", "label_pattern": "(.)-", "pixel_shape": "8x9",
                }.get(field.name, "elsewhere")
    low, high = script.LIMITS.get(field.name, (0, 1000))
    kind = (typing.get_args(annotation) or (annotation,))[0]
    value = kind(low + 3 if kind is int else low + min(high - low, 1) * 0.3)
    return value if value != field.default else kind(value + 1)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_flag_of_config_round_trips(field):
    value, flag = another_value(field), cli.flag_of(field.name)
    argv = [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else [flag, str(value)]
    argv += [part for name, other in NEEDS.get(field.name, {}).items() for part in (f"--{name}", str(other))]
    command = ["predict"] if script.why_unused("run", field.name) else []
    _, _, config = parse_command_line([*command, *argv])
    assert getattr(config, field.name) == value != field.default
    assert config == dataclasses.replace(Config(), **{field.name: value}, **NEEDS.get(field.name, {}))


def test_every_field_of_config_has_its_comment_as_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    lines = inspect.getsource(Config).splitlines()
    for field in FIELDS:
        comment = next(line for line in lines if line.strip().startswith(field.name + ":")).split("  # ")[1]
        assert cli.flag_of(field.name) in text and " ".join(comment.split()) in text


@pytest.mark.parametrize(("argv", "setting"), [
    (["--neighbours", "0"], {"knn_neighbors": 0}), (["--neighbours=7"], {"knn_neighbors": 7}),
    (["--neighbour-share", "0.5"], {"knn_weight": 0.5}), (["--accumulate", "4"], {"accumulation_steps": 4}),
    (["--average-decay", "0.9"], {"ema_decay": 0.9}), (["--soften", "0"], {"edge_softening": 0.0}),
    (["--no-refit"], {"recenter_warp": False}), (["--preset", "digits-cnn", "--refit"], {"recenter_warp": True}),
    (["predict", "--views", "3", "a.pth"], {"tta": 3}),
])
def test_flags_that_were_renamed_are_accepted_with_a_note(argv, setting, capsys):
    config = parse_command_line(argv)[2]
    assert {name: getattr(config, name) for name in setting} == setting
    old, new = next(word for word in argv if word[:2] == "--" and word != "--preset").split("=")[0], next(iter(setting))
    flag = ("--no-" if old.startswith("--no-") else "--") + new.replace("_", "-")
    assert capsys.readouterr().err == f"warning: {old} is called {flag} now\n"


def test_several_renamed_flags_are_one_note(capsys):
    config = parse_command_line(["--neighbours", "5", "--no-refit", "--neighbours", "6", "--knn-weight", "0.1"])[2]
    assert (config.knn_neighbors, config.recenter_warp, config.knn_weight) == (6, False, 0.1)
    assert capsys.readouterr().err == ("warning: --neighbours is called --knn-neighbors now; --no-refit is called "
                                       "--no-recenter-warp now\n")


def test_renamed_flags_of_sys_argv_are_accepted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--average-decay", "0.5"])
    assert parse_command_line(None)[2].ema_decay == 0.5


@pytest.mark.parametrize("argv", [["--teachers", "a.pth"], ["--cutmix"], ["--member-weights", "1,1"],
                                  ["--thickness", "1"], ["--no-neighbours"], ["--views-more", "1"], ["--refi"]])
def test_flags_that_left_stay_unknown(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: unknown argument {argv[0]}") and error.count("\n") == 1


def test_an_earlier_name_is_a_name_of_another_dataclass():
    """A dataclass without today's field, or with a field of the earlier name, keeps its own flags."""
    @dataclass(frozen=True)
    class Other:
        views: int = 1
        tta: int = 1

    assert cli.parse(["--views", "3"], Other, {}, COMMANDS, lambda *_: "")[2] == {"views": 3}
    with pytest.raises(SystemExit):
        parse("--neighbours", "3")


def test_the_help_is_grouped_and_at_most_100_columns_wide(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    groups = [line.rstrip(":") for line in lines if re.fullmatch("[a-z ]+:", line)]
    assert groups == ["positional arguments", "options", "most used", "files", "model", "training", "augmentation",
                      "prediction", "machine"]
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert flags[1:11] == [cli.flag_of(name) for name in script.MOST_USED] and len(flags) == len(set(flags))


def test_renamed_flags_are_not_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    text = capsys.readouterr().out
    assert not [old for old in cli.RENAMED if f"--{old} " in text or f"--no-{old}" in text]


def test_renamed_flags_name_fields_of_config():
    names = {field.name for field in FIELDS}
    for old, new in cli.RENAMED.items():
        assert new.replace("-", "_") in names and old.replace("-", "_") not in names
