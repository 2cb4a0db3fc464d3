"""Cross-validation: what K networks write, and that no order, job or stop changes it."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import victim
from conftest import Command, make_competition, make_pixel_competition

import script
from pipeline import files, folds, tables
from pipeline.cli import pick
from pipeline.device import start_runtime
from pipeline.images import LoadSettings, load_images
from pipeline.metrics import Predictions, score

TINY = ["--model", "tiny", "--image-size", "16", "--batch-size", "32", "--num-epochs", "3", "--no-pictures",
        "--knn-neighbors", "5", "--checkpoint-minutes", "0"]
FOLDS = [*TINY, "--folds", "3"]
GROUPED = [*FOLDS, "--group-column", "writer"]
CPU = start_runtime("cpu")


def make_written_competition(folder: Path) -> Path:
    """The small competition with a writer for each row, and some rows whose images equal other writers' images."""
    make_competition(folder)
    table = pd.read_csv(folder / "train.csv", dtype=str)
    table["writer"] = [f"w{row // 4}" for row in range(len(table))]
    for row, other in ((7, 93), (20, 50), (50, 81)):
        paths = [folder / "Dataset_Image" / table.image_path[place] for place in (row, other)]
        shutil.copy(*paths)
    table.to_csv(folder / "train.csv", index=False)
    return folder


def outcome(folder: Path) -> dict:
    """All that a cross-validation gives, but for the seconds it took and where its files lay."""
    parts = {name: (folder / name).read_text() for name in ("submission.csv", "class_accuracy.csv")}
    for path in [*folder.glob("fold?/val_probabilities.npz"), folder / "oof_probabilities.npz"]:
        parts[str(path.relative_to(folder))] = {name: array.tolist() for name, array in np.load(path).items()}
    for path in folder.glob("fold?/best_model.pth"):
        best = files.load_verified(path)
        best["metrics"].pop("seconds")
        for name in ("output_dir", "cache_dir", "max_minutes", "resume"):
            best["config"].pop(name)
        parts[str(path.relative_to(folder))] = files.sha256_of(best)
        parts[path.parent.name] = pd.read_csv(path.with_name("history.csv")).drop(columns="seconds").to_csv()
    for path in folder.glob("**/run.json"):
        parts[str(path.relative_to(folder))] = json.loads(path.read_text())["data_sha256"]
    return parts


class CrossValidation:
    """A finished cross-validation, and commands on the same competition in other folders."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, make_written_competition(folder / "competition")
        self.output = folder / "reference"

    def __call__(self, output: Path, *flags: str) -> int:
        command = Command(self.data, output, self.folder / "cache")
        return script.main(command.arguments(*flags))

    def member(self, fold: int) -> script.TrainedModel:
        """The network of a fold, with the settings that find its competition from here."""
        trained = script.load_checkpoint(self.output / f"fold{fold}" / "best_model.pth")
        own = dataclasses.replace(trained.config, data_dir=str(self.data), cache_dir=str(self.folder / "cache"))
        return dataclasses.replace(trained, config=own)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> CrossValidation:
    own = CrossValidation(tmp_path_factory.mktemp("folds"))
    assert own(own.output, *GROUPED) == 0
    return own


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished folders, without what they gave together."""
    for fold in range(3):
        shutil.copytree(finished.output / f"fold{fold}", tmp_path / "out" / f"fold{fold}")
    return tmp_path / "out"


def test_every_row_is_predicted_once_and_the_figure_is_the_printed_one(finished, copied, capsys):
    assert finished(copied, *GROUPED) == 0
    out = capsys.readouterr().out
    kept = np.load(copied / "oof_probabilities.npz")
    assert kept["rows"].tolist() == list(range(100)) and kept["probabilities"].shape == (100, 5)
    labels = pd.read_csv(finished.data / "train.csv", dtype=str).label
    assert kept["classes"][kept["targets"]].tolist() == labels.tolist()
    hits = kept["probabilities"].argmax(axis=1) == kept["targets"]
    each = [hits[kept["folds"] == fold].mean() for fold in range(3)]
    assert (f"cross-validated accuracy {hits.mean():.2%} +- {100 * np.std(each, ddof=1):.2f} (3 folds: "
            f"{' '.join(f'{100 * share:.2f}' for share in each)}), top 3 ") in out
    assert "(on the rows that chose each fold's epoch)" in out and out.count("is finished: validation accuracy") == 3
    metrics = json.loads((copied / "run.json").read_text())["metrics"]
    assert metrics["fold_accuracies"] == each and metrics["val_accuracy"] == hits.mean()
    for fold in range(3):
        own = np.load(copied / f"fold{fold}" / "val_probabilities.npz")
        assert np.array_equal(own["rows"], np.flatnonzero(kept["folds"] == fold))
        assert np.array_equal(own["probabilities"], kept["probabilities"][own["rows"]])
    assert pd.read_csv(copied / "class_accuracy.csv").images.sum() == 100


def test_writers_and_equal_images_never_straddle_a_fold(finished):
    fold_of_row = np.load(finished.output / "oof_probabilities.npz")["folds"]
    writers = pd.read_csv(finished.data / "train.csv").writer
    assert pd.Series(fold_of_row).groupby(writers).nunique().max() == 1
    for row, other in ((7, 93), (20, 50), (20, 81)):
        assert fold_of_row[row] == fold_of_row[other]


def test_the_submission_is_that_of_the_mean_of_the_folds_networks(finished):
    members = [finished.member(fold) for fold in range(3)]
    assert [member.config.fold for member in members] == [0, 1, 2]
    config, statistics = members[0].config, members[0].statistics
    table = tables.read_test_table(config.test_source)
    images, = load_images([table], statistics, pick(LoadSettings, config))
    dataset = script.MathSymbolDataset(table, config, members[0].classes, statistics, CPU, images)
    each = [script.predict(member.model, dataset.for_network(member.config)) for member in members]
    expected = [members[0].classes[number] for number in np.mean(each, axis=0).argmax(axis=1)]
    assert pd.read_csv(finished.output / "submission.csv", dtype=str).label.tolist() == expected


def test_folds_in_jobs_of_their_own_give_the_same_in_any_order(finished, tmp_path, capsys):
    for fold, missing in (("2", "0, 1"), ("0", "1"), ("1", "")):
        assert finished(tmp_path, *GROUPED, "--fold", fold) == 0
        out = capsys.readouterr().out
        assert ("cross-validated accuracy" in out) == (not missing) == (tmp_path / "submission.csv").exists()
        assert f"not finished yet: fold {missing} of 3; the same command with --fold" in out or not missing
    assert outcome(tmp_path) == outcome(finished.output)


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_stopped_run_resumes_and_ends_with_the_same_bits(finished, tmp_path, capsys, monkeypatch, epochs):
    done, finish = [], script.finish_epoch

    def stop_after(*arguments):
        finish(*arguments)
        done.append(1)
        if len(done) == epochs:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script, "finish_epoch", stop_after)
    assert finished(tmp_path, *GROUPED) == 128 + signal.SIGTERM
    assert "the same command resumes from there" in capsys.readouterr().err and not (tmp_path / "run.json").exists()
    assert finished(tmp_path, *GROUPED) == 0
    out = capsys.readouterr().out
    assert "resumes from last.pth" in out and out.count("is finished") == (epochs - 1) // 3
    assert len(done) == 9 and outcome(tmp_path) == outcome(finished.output)


@pytest.mark.slow
def test_a_finished_fold_of_other_settings_is_refused_or_trained_again(finished, copied, capsys):
    before = outcome_of_fold(copied / "fold1")
    assert finished(copied, *GROUPED, "--learning-rate", "0.02") == 1
    assert (f"error: {copied / 'fold0'}: holds a finished fold with --learning-rate 0.01 (not 0.02); use its settings "
            "to keep it, train it again with --no-resume, or name another --output-dir") in capsys.readouterr().err
    assert finished(copied, *GROUPED, "--fold", "0", "--learning-rate", "0.02", "--no-resume") == 0
    printed = capsys.readouterr()
    assert "not finished yet: fold 1, 2 of 3" in printed.out and f"warning: {copied / 'fold1'}: holds" in printed.err
    assert outcome_of_fold(copied / "fold1") == before
    assert finished(copied, *GROUPED, "--learning-rate", "0.02", "--no-resume") == 0
    assert {json.loads(path.read_text())["config"]["learning_rate"] for path in copied.glob("**/run.json")} == {0.02}


def test_folds_stay_finished_if_the_command_that_is_to_train_them_again_is_wrong(finished, copied, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for flags in (["--weights", "none.pth"], ["--max-minutes", "0.01"]):
        assert finished(copied, *GROUPED, "--no-resume", *flags) in (1, 2)
        assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before, flags
    assert "or reserved for other folds, validation" in capsys.readouterr().err


def test_files_of_another_network_do_not_stay_beside_the_folds(finished, copied):
    """But for networks, and the state of an unfinished one."""
    stale = {"history.csv", "curves.png", "samples.png", "class_distribution.png", "confusions.png",
             "val_probabilities.npz", "test_probabilities.npz"}
    for name in stale | {"best_model.pth", "last.pth"}:
        (copied / name).write_bytes(b"of another network")
    assert finished(copied, *GROUPED) == 0
    assert not stale & {path.name for path in copied.iterdir()}
    assert (copied / "best_model.pth").read_bytes() == (copied / "last.pth").read_bytes() == b"of another network"
    assert (copied / "oof_probabilities.npz").exists()
    assert outcome(copied) == outcome(finished.output)


def outcome_of_fold(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_a_finished_fold_of_other_images_is_refused(finished, copied, tmp_path, capsys):
    data = tmp_path / "changed"
    shutil.copytree(finished.data, data)
    table = pd.read_csv(data / "train.csv")
    shutil.copy(data / "Dataset_Image" / table.image_path[2], data / "Dataset_Image" / table.image_path[3])
    assert finished(copied, *GROUPED, "--data-dir", str(data)) == 1
    assert "fold0: holds a finished fold with other training rows or images" in capsys.readouterr().err


def exchange(folder: Path, name: str) -> None:
    """Copy a file of fold 1 over that of fold 0."""
    shutil.copy(folder / "fold1" / name, folder / "fold0" / name)


@pytest.mark.parametrize(("fault", "message"), [
    (lambda folder: exchange(folder, "best_model.pth"), "best_model.pth: is the network of fold 1, not of fold 0"),
    (lambda folder: exchange(folder, "run.json"), "fold0: holds a finished fold with --fold 1 (not 0)"),
    (lambda folder: exchange(folder, "val_probabilities.npz"), "a finished fold with probabilities of other rows"),
    (lambda folder: (folder / "fold0" / "run.json").write_text("{"), "fold0: the files of a finished fold cannot be"),
    (lambda folder: (folder / "fold0" / "val_probabilities.npz").write_bytes(b""), "finished fold cannot be read"),
    (lambda folder: (folder / "fold0" / "best_model.pth").write_bytes(b"PK"), "not a complete checkpoint of script.py"),
])
def test_folders_that_were_mixed_up_or_damaged_are_refused(finished, copied, capsys, fault, message):
    fault(copied)
    assert finished(copied, *GROUPED) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (copied / "submission.csv").exists()


def test_the_remedy_for_a_damaged_fold_works(finished, copied, capsys):
    exchange(copied, "best_model.pth")
    assert finished(copied, *GROUPED) == 1
    assert "train it again with --fold 0 --no-resume" in capsys.readouterr().err
    assert finished(copied, *GROUPED, "--fold", "0", "--no-resume") == 0
    assert outcome(copied) == outcome(finished.output)


def test_a_folds_checkpoint_knows_its_validation_rows(finished):
    for fold in range(3):
        member = finished.member(fold)
        data = script.prepare_data(member.config, CPU)[1]
        kept = np.load(finished.output / f"fold{fold}" / "val_probabilities.npz")
        rows = data.split.val_rows
        assert np.array_equal(kept["rows"], rows) and np.array_equal(kept["targets"], data.dataset.targets[rows])
        own = script.predict(member.model, data.dataset.for_network(member.config), rows)
        assert np.allclose(kept["probabilities"], own, atol=1e-6)
        assert score(own, kept["targets"])["val_accuracy"] == member.metrics["val_accuracy"]
        assert member.labels_sha256 == data.dataset.table.labels_sha256


def test_groups_stay_whole_without_folds_too(finished, tmp_path):
    assert finished(tmp_path, *TINY, "--group-column", "writer", "--train-val-split", "0.8") == 0
    held = np.load(tmp_path / "val_probabilities.npz")["rows"]
    writers = pd.read_csv(finished.data / "train.csv").writer
    assert 12 <= len(held) <= 28 and not set(writers[held]) & set(writers.drop(held))
    assert (7 in held) == (93 in held) and (20 in held) == (50 in held) == (81 in held)


def test_seconds_are_shared_by_the_folds_that_are_left(capsys):
    """Of 600 s a finished fold used 200; the first of two others gets half of the rest, and uses half of that."""
    given = []

    def train_one(fold: int, begun: float, reserved: float) -> float:
        given.append((fold, begun == 12.5, 600 - reserved))
        return 100.0

    folds.run([0, 1, 2], {1: {"seconds": 200.0, "metrics": {"val_accuracy": 0.5}}}, train_one, 12.5, 600)
    assert given == [(0, True, pytest.approx(200)), (2, False, pytest.approx(300))]  # the first began with the command
    assert capsys.readouterr().out == "fold 1 is finished: validation accuracy 50.00%\n"


def test_out_of_fold_predictions_are_in_the_tables_order():
    targets = np.array([0, 1, 0, 1, 1])
    records = [{"rows": np.array(rows), "probabilities": np.eye(2)[targets[rows]] if right else np.eye(2)[[0, 0]]}
               for rows, right in (([1, 4], False), ([0, 2, 3], True))]
    found = folds.out_of_fold(records, targets, lambda rows: rows)
    assert found.rows.tolist() == [0, 1, 2, 3, 4] and found.targets.tolist() == targets.tolist()
    assert found.correct.tolist() == [True, False, True, True, False] and found.ink(np.array([3])).tolist() == [3]
    figures = folds.score_folds(found, np.array([1, 0, 1, 1, 0]))
    assert figures["fold_accuracies"] == [0, 1] and figures["val_accuracy"] == 0.6
    assert figures["val_accuracy_deviation"] == pytest.approx(np.sqrt(0.5))


def test_saved_predictions_are_read_back(tmp_path):
    predictions = Predictions(np.array([3, 7]), np.array([1, 0]), np.float32([[0.25, 0.75], [0.5, 0.5]]))
    folds.save_validation(tmp_path / "a.npz", predictions, ["x", "\\pi"], folds=np.array([0, 1]))
    saved = np.load(tmp_path / "a.npz")
    assert {name: saved[name].tolist() for name in saved} == {
        "rows": [3, 7], "targets": [1, 0], "probabilities": [[0.25, 0.75], [0.5, 0.5]], "classes": ["x", "\\pi"],
        "folds": [0, 1]}


def test_pixel_tables_have_folds_and_groups(tmp_path, capsys):
    command = Command(make_pixel_competition(tmp_path / "digits"), tmp_path / "out", tmp_path / "cache")
    table = pd.read_csv(command.data / "train.csv")
    writers = pd.Series(np.arange(60) // 3, name="writer")
    pd.concat([table, writers], axis=1).to_csv(command.data / "train.csv", index=False)
    assert script.main(command.arguments(*TINY, "--folds", "2", "--group-column", "writer")) == 0
    fold_of_row = np.load(command.output / "oof_probabilities.npz")["folds"]
    assert len(fold_of_row) == 60 and pd.Series(fold_of_row).groupby(writers).nunique().max() == 1
    capsys.readouterr()
    assert script.main(command.arguments(*TINY, "--folds", "2", "--group-column", "author")) == 1
    error = capsys.readouterr().err
    assert "train.csv: no column 'author' in its header (label, " in error and error.count("\n") == 1


def test_a_class_smaller_than_the_folds_is_reported(main_in_process, competition):
    table = pd.read_csv(competition / "train.csv", dtype=str)
    table.loc[[3, 8], "label"] = "9"
    table.to_csv(competition / "train.csv", index=False)
    status, out, error = main_in_process(*FOLDS, "--num-epochs", "1")
    assert (status, error) == (0, "")
    assert "; too few rows for 3 parts of the split, so that some lack them: 9" in out


@pytest.mark.parametrize(("change", "flags", "message"), [
    (None, ["--group-column", "author"], "train.csv: no column 'author' in its header (image_path, label, writer); "),
    ("blank", [], "train.csv, row 5: writer is empty; fill it in or remove the row"),
    ("one", [], "train.csv: 1 groups of rows that must stay together"),
    (None, ["--train-csv", "torchvision:MNIST"], "torchvision:MNIST has no column 'writer'"),
])
def test_bad_group_columns_are_one_line(finished, tmp_path, capsys, change, flags, message):
    shutil.copytree(finished.data, tmp_path / "data")
    table = pd.read_csv(tmp_path / "data" / "train.csv", dtype=str)
    if change == "blank":
        table.loc[3, "writer"] = ""
    elif change == "one":
        table["writer"] = "w"
    table.to_csv(tmp_path / "data" / "train.csv", index=False)
    assert finished(tmp_path / "out", *GROUPED, "--data-dir", str(tmp_path / "data"), *flags) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(("argv", "message"), [
    (["--folds", "1"], "folds must be 0 (one network) or at least 2, not 1"),
    (["--fold", "0"], "fold must be below folds, which is 0, not 0"),
    (["--folds", "5", "--fold", "5"], "fold must be below folds, which is 5, not 5; it counts from 0"),
    (["--folds", "5", "--fold", "-1"], "fold must be at least 0, not -1"),
    (["--folds", "5", "--train-val-split", "1"], "train_val_split must not be 1"),
    (["--group-column", "label"], "group_column must be a column of its own, not 'label'"),
    (["--group-column", "pixel3"], "group_column must be a column of its own, not 'pixel3'"),
    (["--group-column", "writer", "--train-val-split", "0.3"], "group_column needs train_val_split above 1/3"),
    (["predict", "--folds", "5"], "--folds has no effect on predict"),
])
def test_wrong_settings_are_refused_by_name(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_command_line(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_kills_lose_nothing(finished, tmp_path, monkeypatch):
    """SIGKILL before a random one of the next operations on the files, again and again, until the run gets through."""
    monkeypatch.setenv("PYTHONPATH", str(Path(victim.__file__).parent))
    context, draws = multiprocessing.get_context("forkserver"), np.random.default_rng(0)
    context.set_forkserver_preload(["victim"])
    arguments = Command(finished.data, tmp_path / "out", finished.folder / "cache").arguments(*GROUPED)
    names = ("last", "best_model", "run.json", "submission", "probabilities", "class_acc")
    kills = 0
    while True:
        process = context.Process(target=victim.live, args=(arguments, str(tmp_path / "log")),
                                  kwargs={"call": int(draws.integers(1, 40)), "files": names})
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills += 1
    assert kills >= 15, "few kills met the run"
    assert outcome(tmp_path / "out") == outcome(finished.output), (tmp_path / "log").read_text()
