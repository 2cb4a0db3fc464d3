"""script.Config, its recipes and presets, and what a resolved config holds."""

import dataclasses
from pathlib import Path

import pytest

import script
from pipeline.device import Runtime
from pipeline.presets import PRESETS
from script import RECIPES, Config, parse_command_line, resolve_config


def test_optional_fields_take_auto():
    assert parse_command_line(["--num-epochs", "auto", "--batch-size", "64"])[2] == Config(batch_size=64)


def test_run_is_the_default_command():
    assert parse_command_line([]) == ("run", [], Config())
    command, checkpoints, config = parse_command_line(["predict", "a.pth", "--data-dir", "x", "b.pth"])
    assert (command, checkpoints, config.data_dir) == ("predict", ["a.pth", "b.pth"], "x")


def test_named_test_table_is_a_file():
    """Beside torchvision's data the default means its test part; the same name on the command line means the file."""
    train = ["--train-csv", "torchvision:MNIST"]
    source = parse_command_line(train)[2].test_source
    assert (source.name, source.part) == ("torchvision:MNIST", "test")
    named = parse_command_line([*train, "--test-csv", "test.csv", "--data-dir", "data"])[2].test_source
    assert named.path == Path("data", "test.csv")


def test_sources_have_the_folders_of_the_config():
    config = Config(data_dir="data", extra_csv="more.csv", root_dir="images", group_column="writer", cache_dir="cache")
    assert config.train_source.path == Path("data/train.csv") and config.train_source.group_column == "writer"
    assert config.train_source.image_root == config.extra_source.image_root == Path("data/images")
    assert dataclasses.replace(config, extra_root="others").extra_source.image_root == Path("data/others")
    assert config.test_source.path == Path("data/test.csv") and config.test_source.cache_dir == "cache"


def test_flags_override_a_preset():
    config = parse_command_line(["--preset", "classic", "--num-epochs", "3"])[2]
    assert config == Config(**{**PRESETS["classic"], "num_epochs": 3})
    assert (config.batch_size, config.learning_rate, config.weight_decay) == (32, 3e-4, 2e-5)
    assert (config.image_size, config.mixup, config.mixup_alpha, config.schedule) == (48, True, 0.4, "plateau")


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_a_valid_config_without_open_values(preset):
    config = resolve_config(Config(**PRESETS[preset]), Runtime(), 1000)
    assert [name for name, value in dataclasses.asdict(config).items() if value is None] == ["fold"]
    for name, value in PRESETS[preset].items():
        assert name == "precision" or getattr(config, name) == value


@pytest.mark.parametrize(("argv", "message"), [
    (["--num-epoch", "3"], "unknown argument --num-epoch; did you mean --num-epochs?"),
    (["--num-epochs", "0"], "num_epochs must be at least 1, not 0"),
    (["--num-epochs", "many"], "num_epochs must be of type int, not 'many'"),
    (["--num-epochs", "2.5"], "num_epochs must be of type int, not '2.5'"),
    (["--learning-rate", "nan"], "learning_rate must be from 1e-09 to 100, not nan"),
    (["--schedule", "steep"], "schedule must be one of cosine, cyclic, step, multistep, plateau, constant, not "
                              "'steep'"),
    (["--model", "vgg"], "or torchvision's, not 'vgg'; near it are torchvision:vgg"),
    (["--model", "torchvision:resnet17"], "near it are torchvision:resnet1"),
    (["--model", "resnett"], "not 'resnett'; near it are resnet, torchvision:resnet"),
    (["--milestones", "3,x"], "milestones must be epochs with commas between them, not '3,x'"),
    (["--early-stopping", "3", "--train-val-split", "1"],
     "early_stopping need validation rows: set train_val_split below 1 or "),
    (["--submission-file", "a/b.csv"], "not 'a/b.csv'; the folder is output_dir"),
    (["--model-file", "last.pth"], "not 'last.pth'"),
    (["--submission-file", "History.csv"], "not 'History.csv'"),
    (["--submission-file", "best_model.pth"], "submission_file must be different, not both 'best_model.pth'"),
    (["evaluate", "--submission-file", "a.csv"], "--submission-file has no effect on evaluate: it writes no "),
    (["evaluate", "--save-probabilities"], "--save-probabilities has no effect on evaluate: it writes no submission"),
    (["--preset", "modern"], "invalid choice: 'modern'"),
    (["--train-val-split", "1.5"], "train_val_split must be from 0.01 to 1"),
    (["--train-val-split", "1", "--schedule", "plateau"], "need validation rows: set train_val_split below 1 "
                                                          "or "),
    (["train"], "unknown command train; the commands are run, predict and evaluate"),
    (["run", "a.pth"], "script.py predict a.pth"),
    (["predict", "--learning-rate", "1"], "--learning-rate has no effect on predict: the checkpoint holds it"),
    (["--seed"], "expected one argument"),
    (["--tta", "5"], "--tta has no effect on run: it is for predict and evaluate"),
    (["predict", "--tta", "0"], "tta must be from 1 to 1000, not 0"),
    (["predict", "--extra-csv", "more.csv"], "--extra-csv has no effect on predict"),
    (["--extra-weight", "0"], "extra_weight must be from 1e-06 to 100, not 0"),
    (["--folds", "1"], "folds must be 0 (one network) or at least 2, not 1"),
    (["--folds", "3", "--fold", "3"], "fold must be below folds, which is 3, not 3; it counts from 0"),
    (["--folds", "3", "--train-val-split", "1"], "train_val_split must not be 1"),
    (["--group-column", "label"], "group_column must be a column of its own, not 'label'"),
    (["--group-column", "pixel3"], "group_column must be a column of its own, not 'pixel3'"),
    (["--group-column", "writer", "--train-val-split", "0.3"],
     "group_column needs train_val_split above 1/3, or folds"),
])
def test_wrong_usage_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(("wrong", "remedy"), [
    (["--model", "vgg"], ["--model", "torchvision:vgg11"]),
    (["--early-stopping", "3", "--train-val-split", "1"], ["--early-stopping", "3", "--train-val-split", "0.9"]),
    (["--early-stopping", "3", "--train-val-split", "1"], ["--early-stopping", "0", "--train-val-split", "1"]),
    (["--train-val-split", "1", "--schedule", "plateau"], ["--train-val-split", "1", "--schedule", "cosine"]),
    (["--folds", "3", "--fold", "3"], ["--folds", "3", "--fold", "0"]),
    (["--submission-file", "a/b.csv"], ["--output-dir", "a", "--submission-file", "b.csv"]),
    (["--model-file", "last.pth"], ["--model-file", "first.pth"]),
    (["--group-column", "writer", "--train-val-split", "0.3"], ["--group-column", "writer", "--folds", "5"]),
    (["--group-column", "writer", "--train-val-split", "0.3"],
     ["--group-column", "writer", "--train-val-split", "0.4"]),
])
def test_remedy_of_wrong_usage_works(wrong, remedy, capsys):
    with pytest.raises(SystemExit):
        parse_command_line(wrong)
    assert capsys.readouterr().err and parse_command_line(remedy)[0] == "run"


@pytest.mark.parametrize("settings", [{"batch_size": "32"}, {"mixup": 1}, {"seed": True}, {"train_csv": 3},
                                      {"dropout": 1.0}, {"rotation": float("inf")}])
def test_wrong_value_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_recipe_completes_open_values():
    config = resolve_config(Config(batch_size=50), Runtime(precision="bf16", eval_batch_size=7), 100_000)
    assert config.model == "cnn" and config.batch_size == 50
    assert config.num_epochs == RECIPES["cnn"]["num_epochs"]
    assert [name for name, value in dataclasses.asdict(config).items() if value is None] == ["fold"]
    assert (config.precision, config.eval_batch_size) == ("bf16", 7)


def test_small_tables_get_more_epochs():
    small = resolve_config(Config(batch_size=50, min_steps=100), Runtime(), 500)
    assert small.num_epochs == 10  # of ten steps
    accumulated = resolve_config(Config(batch_size=50, min_steps=100, accumulation_steps=2), Runtime(), 500)
    assert accumulated.num_epochs == 20  # of ten batches, which are five optimizer steps
    assert resolve_config(Config(model="resnet", num_epochs=1), Runtime(), 10).num_epochs == 1


def test_a_time_limit_and_not_the_recipe_ends_a_training_that_names_no_epochs():
    recipe = RECIPES["cnn"]["num_epochs"]
    assert resolve_config(Config(max_minutes=20), Runtime(), 100_000).num_epochs == 4 * recipe
    assert resolve_config(Config(max_minutes=20, num_epochs=3), Runtime(), 100_000).num_epochs == 3
    assert resolve_config(Config(max_minutes=20), Runtime(), 500).num_epochs == 150  # 600 steps of 4 an epoch


def test_only_small_tables_end_once_they_are_learnt():
    assert resolve_config(Config(), Runtime(), 500).min_steps == 600
    assert resolve_config(Config(), Runtime(), 100_000).min_steps == 0
    assert resolve_config(Config(num_epochs=47), Runtime(), 500).min_steps == 0, "so many were asked for"


def test_every_model_has_a_recipe():
    assert set(RECIPES) == {*script.MODELS, "torchvision"}
    assert len({frozenset(recipe) - {"plain_epochs"} for recipe in RECIPES.values()}) == 1
    assert resolve_config(Config(model="torchvision:resnet18"), Runtime(), 10).image_size == 64


def test_settings_of_prediction_and_resumption_are_fields():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields >= script.PREDICT_SETTINGS | script.RESUME_SETTINGS | set(script.LIMITS)
    assert all(fields >= set(preset) for preset in PRESETS.values())


def test_inputs_of_a_run(tmp_path):
    (tmp_path / "sampleSubmission.csv").write_text("id,label\n")
    config = Config(data_dir=str(tmp_path), weights=str(tmp_path / "start.pth"), test_csv="none")
    names = {"train.csv", "classes.csv", "sampleSubmission.csv", "start.pth"}
    assert {path.relative_to(tmp_path).as_posix() for path in config.inputs} == names
    named = dataclasses.replace(config, test_csv="test.csv", extra_csv="more.csv").inputs
    assert {path.name for path in named} == names | {"test.csv", "more.csv"}


def test_a_test_table_is_read_as_it_is_named():
    config = Config(root_dir="train", image_column="id", pixel_shape="16x64", transpose=True)
    assert config.test_source.image_root == config.train_source.image_root == Path("train")
    assert dataclasses.replace(config, test_root="test").test_source.image_root == Path("test")
    assert dataclasses.replace(config, test_csv="none").test_source is None
    for source in (config.train_source, config.test_source, config.extra_source):
        assert (source.image_column, source.pixel_shape, source.transpose) == ("id", "16x64", True)
