"""Room 1: every setting is a field, a flag and a line of help from one definition."""

import dataclasses
import inspect
import typing
from pathlib import Path

import pytest

import script
from script import Config, parse_command_line

FIELDS = dataclasses.fields(Config)
NEEDS = {"fold": {"folds": 5}}  # what a setting is refused without
HINTS = typing.get_type_hints(Config)


def another_value(field):
    """A valid value that is not the field's default."""
    annotation = HINTS[field.name]
    if typing.get_origin(annotation) is typing.Literal:
        return next(choice for choice in typing.get_args(annotation) if choice != field.default)
    if annotation is bool:
        return not field.default
    if annotation is str:
        return {"model": "resnet", "device": "cpu", "milestones": "3, 7",
                "member_weights": "1, 2"}.get(field.name, "elsewhere")
    low, high = script.LIMITS.get(field.name, (0, 1000))
    kind = (typing.get_args(annotation) or (annotation,))[0]
    value = kind(low + 3 if kind is int else low + min(high - low, 1) * 0.3)
    return value if value != field.default else kind(value + 1)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_flag_round_trips(field):
    value, flag = another_value(field), "--" + field.name.replace("_", "-")
    argv = [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else [flag, str(value)]
    argv += [part for name, other in NEEDS.get(field.name, {}).items() for part in (f"--{name}", str(other))]
    command = ["predict"] if field.name in script.PREDICT_ONLY else []
    _, _, config = parse_command_line([*command, *argv])
    assert getattr(config, field.name) == value != field.default
    assert config == dataclasses.replace(Config(), **{field.name: value}, **NEEDS.get(field.name, {}))


def test_every_field_has_help_from_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    lines = inspect.getsource(Config).splitlines()
    for field in FIELDS:
        comment = next(line for line in lines if line.strip().startswith(field.name + ":")).split("  # ")[1]
        assert f"--{field.name.replace('_', '-')}" in text and " ".join(comment.split()) in text


def test_optional_fields_take_auto():
    assert parse_command_line(["--num-epochs", "auto", "--batch-size", "64"])[2] == Config(batch_size=64)


def test_commands_and_checkpoints_may_stand_anywhere():
    assert parse_command_line([])[0] == "run"
    assert parse_command_line(["--seed", "1", "run"])[0] == "run"
    command, checkpoints, config = parse_command_line(["predict", "a.pth", "--data-dir", "x", "b.pth"])
    assert (command, checkpoints, config.data_dir) == ("predict", ["a.pth", "b.pth"], "x")


def test_a_test_table_that_is_named_is_meant():
    """Beside torchvision's data the default means their test part; the same name in words means the file."""
    train = ["--train-csv", "torchvision:MNIST"]
    assert script.test_table_name(parse_command_line(train)[2]) == "torchvision:MNIST"
    named = parse_command_line([*train, "--test-csv", "test.csv"])[2]
    assert Path("data", script.test_table_name(named)) == Path("data", "test.csv")


def test_a_flag_goes_before_its_preset():
    config = parse_command_line(["--preset", "classic", "--num-epochs", "3"])[2]
    assert config == Config(**{**script.PRESETS["classic"], "num_epochs": 3})
    assert (config.batch_size, config.learning_rate, config.weight_decay) == (32, 3e-4, 2e-5)
    assert (config.image_size, config.mixup, config.mixup_alpha, config.schedule) == (48, True, 0.4, "plateau")


@pytest.mark.parametrize(("argv", "message"), [
    (["--num-epoch", "3"], "unknown argument --num-epoch; did you mean --num-epochs?"),
    (["--num-epochs", "0"], "num_epochs must be at least 1, not 0"),
    (["--num-epochs", "many"], "num_epochs must be of type int, not 'many'"),
    (["--num-epochs", "2.5"], "num_epochs must be of type int, not '2.5'"),
    (["--learning-rate", "nan"], "learning_rate must be from 1e-09 to 100, not nan"),
    (["--schedule", "steep"], "schedule must be one of cosine, onecycle, cyclic, step, multistep, plateau, constant, "
                              "not 'steep'"),
    (["--model", "vgg"], "or torchvision's, not 'vgg'; near it are torchvision:vgg"),
    (["--model", "torchvision:resnet17"], "near it are torchvision:resnet1"),
    (["--milestones", "3,x"], "milestones must be epochs with commas between them, not '3,x'"),
    (["--early-stopping", "3", "--train-val-split", "1"], "set train_val_split below 1, or set early_stopping to 0"),
    (["--submission-file", "a/b.csv"], "submission_file must be a file's name without a folder, not 'a/b.csv'"),
    (["--model-file", "last.pth"], "model_file must be a name of its own, not 'last.pth'"),
    (["--submission-file", "History.csv"], "submission_file must be a name of its own, not 'History.csv'"),
    (["--submission-file", "best_model.pth"], "must be a name of its own, not 'best_model.pth'"),
    (["evaluate", "--submission-file", "a.csv"], "--submission-file has no effect on evaluate: it writes no "),
    (["evaluate", "--save-probabilities"], "--save-probabilities has no effect on evaluate: it writes no submission"),
    (["--preset", "modern"], "invalid choice: 'modern'"),
    (["--train-val-split", "1.5"], "train_val_split must be from 0.01 to 1"),
    (["--train-val-split", "1", "--schedule", "plateau"], "plateau needs validation rows: set train_val_split below 1, "
                                                          "or take another schedule"),
    (["train"], "unknown command train; the commands are run, predict and evaluate"),
    (["run", "a.pth"], "script.py predict a.pth"),
    (["predict", "--learning-rate", "1"], "--learning-rate has no effect on predict"),
    (["--seed"], "expected one argument"),
    (["--views", "5"], "--views has no effect on run: it is for predict and evaluate"),
    (["--member-weights", "validation"], "--member-weights has no effect on run"),
    (["predict", "--views", "0"], "views must be from 1 to 1000, not 0"),
    (["predict", "--extra-csv", "more.csv"], "--extra-csv has no effect on predict"),
    *((["predict", "--member-weights", text], "member_weights must be validation, or numbers from 0 up")
      for text in ("1,x", "1;2", "0,0", "1,", "1,nan", "1,inf")),
    (["predict", "--member-weights=-1,2"], "and not all 0, not '-1,2'"),
    (["--extra-weight", "0"], "extra_weight must be from 1e-06 to 100, not 0"),
])
def test_wrong_usage_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error.splitlines()[-1] and "Traceback" not in error


@pytest.mark.parametrize("settings", [{"batch_size": "32"}, {"mixup": 1}, {"seed": True}, {"train_csv": 3},
                                      {"dropout": 1.0}, {"rotation": float("inf")}])
def test_config_refuses_a_wrong_value_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


def test_recipes_complete_what_is_left_open():
    runtime = script.start_runtime(Config(device="cpu"))
    config = script.complete_config(Config(batch_size=50), runtime, 100_000)
    assert config.model == "cnn" and config.batch_size == 50
    assert config.num_epochs == script.RECIPES["cnn"]["num_epochs"]
    assert [name for name, value in dataclasses.asdict(config).items() if value is None] == ["fold"]
    assert config.precision in ("bf16", "float32")
    slow = script.complete_config(Config(batch_size=50, min_steps=100, accumulate=2), runtime, 500)
    assert slow.num_epochs == 20  # ten batches, five steps of the optimizer
    small = script.complete_config(Config(batch_size=50, min_steps=100), runtime, 500)
    assert small.num_epochs == 10  # of ten steps
    assert script.complete_config(Config(model="resnet", num_epochs=1), runtime, 10).num_epochs == 1
