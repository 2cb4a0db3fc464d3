"""Cross-validation: how rows are dealt to folds, what K networks write, and that no order, job or stop changes it."""

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
from script import Config, DataError, Table
from tools import report, sweep

TINY = ["--model", "tiny", "--image-size", "16", "--batch-size", "32", "--num-epochs", "3", "--no-pictures",
        "--neighbours", "5", "--checkpoint-minutes", "0"]
FOLDS = [*TINY, "--folds", "3"]


def counts_by_part(targets, parts):
    return pd.crosstab(parts, targets).to_numpy()


@pytest.mark.parametrize("parts", [2, 5, 10])
def test_single_rows_are_dealt_evenly_by_class_and_in_all(parts):
    targets = np.random.default_rng(parts).permutation(np.repeat(np.arange(6), [100, 51, 33, 7, 3, 1]))
    dealt = script.deal_parts(targets, np.arange(len(targets)), parts, seed=42)
    counts = counts_by_part(targets, dealt)
    assert counts.shape == (parts, 6) and counts.sum() == len(targets)
    assert np.ptp(counts, axis=0).max() <= 1 and np.ptp(counts.sum(axis=1)) <= 1
    assert np.array_equal(dealt, script.deal_parts(targets, np.arange(len(targets)), parts, seed=42))
    assert not np.array_equal(dealt, script.deal_parts(targets, np.arange(len(targets)), parts, seed=1))


def test_groups_stay_whole_and_classes_even_where_groups_allow():
    rng = np.random.default_rng(0)
    targets, groups = rng.integers(0, 4, 2000), np.concatenate([rng.integers(0, 60, 1000), np.arange(60, 1060)])
    dealt = script.deal_parts(targets, groups, 5, seed=0)
    assert pd.Series(dealt).groupby(groups).nunique().max() == 1
    counts = counts_by_part(targets, dealt)
    assert np.ptp(counts, axis=0).max() <= 1  # 1,000 single rows level what the groups left uneven
    assert np.ptp(counts_by_part(targets[:1000], dealt[:1000]).sum(axis=1)) < 40  # groups of 10 to 25, by themselves


def test_equal_images_and_groups_connect_rows():
    writers, pixels = np.array(list("ppqrrs"), dtype=object), np.array([0, 1, 2, 2, 3, 4])
    assert script.join_groups(pixels, pixels).tolist() == pixels.tolist()
    groups = script.join_groups(writers, pixels)  # one image connects q with r
    assert [np.flatnonzero(groups == group).tolist() for group in pd.unique(groups)] == [[0, 1], [2, 3, 4], [5]]
    chain = np.arange(60)  # each writer drew one image that the next one drew too
    assert len(set(script.join_groups(chain[::-1] // 2, (chain + 1) // 2).tolist())) == 1


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_the_connected_components(seed):
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(seed)
    values, pixels = rng.integers(0, 30, 80), rng.integers(0, 60, 80)
    edges = coo_array((np.ones(80), (pixels, 60 + values)), shape=(90, 90))
    expected = connected_components(edges, directed=False)[1][pixels]
    assert np.array_equal(pd.factorize(script.join_groups(values, pixels))[0], pd.factorize(expected)[0])


def test_without_folds_the_part_of_the_wanted_size_validates_and_split_seed_chooses_it():
    """A writer with half of all rows fills a part alone, and the largest writers are not always held out."""
    table = Table("train.csv", pd.DataFrame({"label": ["a"] * 400, "writer": ["w0"] * 200 + [f"v{row % 20}" for row in
                                                                                             range(200)]}))
    images, targets = np.zeros((400, 1, 2, 2), dtype=np.uint8), np.zeros(400, dtype=np.int64)
    images[:, 0].reshape(400, 4)[:, :2] = np.stack([np.arange(400) % 256, np.arange(400) // 256], axis=1)
    chosen = set()
    for seed in range(5):
        config = Config(group_column="writer", train_val_split=0.9, split_seed=seed)
        train, val, _ = script.split_table(config, table, targets, images)
        assert len(val) in (20, 30) and not (val < 200).any() and len(train) + len(val) == 400
        chosen.add(tuple(table.rows.writer[val].unique()))
    assert len(chosen) > 1


def test_rows_without_a_usable_image_are_in_no_part_and_connect_nothing():
    images = np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)
    images[[3, 4]] = 0
    table = Table("train.csv", pd.DataFrame({"label": ["a"] * 9}), faults={3: "empty", 4: "empty"})
    parts = script.divide_rows(Config(folds=3), table, np.zeros(9, dtype=np.int64), images)
    assert np.flatnonzero(parts == -1).tolist() == [3, 4] and np.bincount(parts[parts >= 0]).tolist() == [3, 2, 2]
    train, val = script.part_rows(parts, 1)
    assert sorted([*train, *val]) == [0, 1, 2, 5, 6, 7, 8]
    with pytest.raises(DataError, match=r"train.csv: 7 groups of rows .* too few for 8 parts; lower --folds"):
        script.divide_rows(Config(folds=8), table, np.zeros(9, dtype=np.int64), images)
    table.rows["writer"] = list("pppqqqrrr")  # one each of p's and q's is blank: they have nothing in common
    table.faults.clear()
    table.faults.update({2: "empty", 3: "empty"})
    images[[2, 3]] = 0
    parts = script.divide_rows(Config(folds=3, group_column="writer"), table, np.zeros(9, dtype=np.int64), images)
    assert [len(set(parts[rows])) for rows in ([0, 1], [4, 5], [6, 7, 8])] == [1, 1, 1] and len(set(parts)) == 4


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
        best = script.read_content(path)
        best["metrics"].pop("seconds")
        for name in ("output_dir", "cache_dir", "max_minutes"):
            best["config"].pop(name)
        parts[str(path.relative_to(folder))] = script.digest(best)
        parts[path.parent.name] = pd.read_csv(path.with_name("history.csv")).drop(columns="seconds").to_csv()
    for path in folder.glob("**/run.json"):
        parts[str(path.relative_to(folder))] = json.loads(path.read_text())["data_sha256"]
    return parts


class Folded:
    """A finished cross-validation, and commands on the same competition in other folders."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, make_written_competition(folder / "competition")
        self.output = folder / "reference"

    def __call__(self, output: Path, *flags: str) -> int:
        command = Command(self.data, output, self.folder / "cache")
        return script.main(command.arguments(*flags))


@pytest.fixture(scope="module")
def folded(tmp_path_factory) -> Folded:
    own = Folded(tmp_path_factory.mktemp("folds"))
    assert own(own.output, *FOLDS, "--group-column", "writer") == 0
    return own


@pytest.fixture
def copied(folded, tmp_path) -> Path:
    """A copy of the finished folders, without what they gave together."""
    for fold in range(3):
        shutil.copytree(folded.output / f"fold{fold}", tmp_path / "out" / f"fold{fold}")
    return tmp_path / "out"


GROUPED = [*FOLDS, "--group-column", "writer"]


def test_every_row_is_judged_once_and_the_figure_is_the_printed_one(folded, copied, capsys):
    assert folded(copied, *GROUPED) == 0
    out = capsys.readouterr().out
    kept = np.load(copied / "oof_probabilities.npz")
    assert kept["rows"].tolist() == list(range(100)) and kept["probabilities"].shape == (100, 5)
    labels = pd.read_csv(folded.data / "train.csv", dtype=str).label
    assert kept["classes"][kept["targets"]].tolist() == labels.tolist()
    hits = kept["probabilities"].argmax(axis=1) == kept["targets"]
    each = [hits[kept["folds"] == fold].mean() for fold in range(3)]
    assert (f"cross-validated accuracy {hits.mean():.2%} +- {100 * np.std(each, ddof=1):.2f} (3 folds: "
            f"{' '.join(f'{100 * share:.2f}' for share in each)}), top 3 ") in out
    assert "(of the rows that chose each fold's epoch)" in out and out.count("is finished: validation accuracy") == 3
    metrics = json.loads((copied / "run.json").read_text())["metrics"]
    assert metrics["fold_accuracies"] == each and metrics["val_accuracy"] == hits.mean()
    for fold in range(3):
        own = np.load(copied / f"fold{fold}" / "val_probabilities.npz")
        assert np.array_equal(own["rows"], np.flatnonzero(kept["folds"] == fold))
        assert np.array_equal(own["probabilities"], kept["probabilities"][own["rows"]])
    assert pd.read_csv(copied / "class_accuracy.csv").images.sum() == 100


def test_writers_and_equal_images_never_straddle_a_fold(folded):
    folds = np.load(folded.output / "oof_probabilities.npz")["folds"]
    writers = pd.read_csv(folded.data / "train.csv").writer
    assert pd.Series(folds).groupby(writers).nunique().max() == 1
    for row, other in ((7, 93), (20, 50), (20, 81)):
        assert folds[row] == folds[other]


def test_the_submission_is_that_of_the_mean_of_the_folds_networks(folded):
    config = Config(data_dir=str(folded.data), cache_dir=str(folded.folder / "cache"), device="cpu")
    members = [script.load_checkpoint(folded.output / f"fold{fold}" / "best_model.pth") for fold in range(3)]
    assert [member.config.fold for member in members] == [0, 1, 2]
    runtime, table = script.start_runtime(config), script.read_test_table(config)
    images = script.load_all_images([table], config, members[0].statistics)[0]
    dataset = script.MathSymbolDataset(images, None, runtime)
    answers = [script.predict(member.model, dataset, np.arange(30), member.config, runtime) for member in members]
    expected = [members[0].classes[number] for number in np.mean(answers, axis=0).argmax(axis=1)]
    assert pd.read_csv(folded.output / "submission.csv", dtype=str).label.tolist() == expected


def test_folds_in_jobs_of_their_own_give_the_same_in_any_order(folded, tmp_path, capsys):
    for fold, missing in (("2", "0, 1"), ("0", "1"), ("1", "")):
        assert folded(tmp_path, *GROUPED, "--fold", fold) == 0
        out = capsys.readouterr().out
        assert ("cross-validated accuracy" in out) == (not missing) == (tmp_path / "submission.csv").exists()
        assert f"not finished yet: fold {missing} of 3; the same command with --fold" in out or not missing
    assert outcome(tmp_path) == outcome(folded.output)


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(folded, tmp_path, capsys, monkeypatch, epochs):
    done, close = [], script.close_epoch

    def stop_after(*arguments):
        close(*arguments)
        done.append(1)
        if len(done) == epochs:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script, "close_epoch", stop_after)
    assert folded(tmp_path, *GROUPED) == 128 + signal.SIGTERM
    assert "the same command goes on from there" in capsys.readouterr().err and not (tmp_path / "run.json").exists()
    assert folded(tmp_path, *GROUPED) == 0
    out = capsys.readouterr().out
    assert "goes on from last.pth" in out and out.count("is finished") == (epochs - 1) // 3
    assert len(done) == 9 and outcome(tmp_path) == outcome(folded.output)


@pytest.mark.slow
def test_a_finished_fold_of_other_settings_is_refused_or_trained_anew(folded, copied, capsys):
    before = outcome_of_fold(copied / "fold1")
    assert folded(copied, *GROUPED, "--learning-rate", "0.02") == 1
    assert (f"error: {copied / 'fold0'}: holds a finished fold with --learning-rate 0.01 (not 0.02); give its settings "
            "to keep it, train it anew with --no-resume, or name another --output-dir") in capsys.readouterr().err
    assert folded(copied, *GROUPED, "--fold", "0", "--learning-rate", "0.02", "--no-resume") == 0
    printed = capsys.readouterr()
    assert "not finished yet: fold 1, 2 of 3" in printed.out and f"warning: {copied / 'fold1'}: holds" in printed.err
    assert outcome_of_fold(copied / "fold1") == before
    assert folded(copied, *GROUPED, "--learning-rate", "0.02", "--no-resume") == 0
    assert {json.loads(path.read_text())["config"]["learning_rate"] for path in copied.glob("**/run.json")} == {0.02}


def test_folds_stay_finished_where_the_command_that_is_to_train_them_anew_is_wrong(folded, copied, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for flags in (["--teachers", "none.pth"], ["--weights", "none.pth"], ["--max-minutes", "0.01"]):
        assert folded(copied, *GROUPED, "--no-resume", *flags) in (1, 2)
        assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before, flags
    assert "or for other folds, validation" in capsys.readouterr().err


def test_files_of_another_network_do_not_stay_beside_the_folds(folded, copied):
    """But for networks, and the state of an unfinished one."""
    stale = {"history.csv", "curves.png", "samples.png", "class_distribution.png", "confusions.png",
             "val_probabilities.npz", "test_probabilities.npz"}
    for name in stale | {"best_model.pth", "last.pth"}:
        (copied / name).write_bytes(b"of another network")
    assert folded(copied, *GROUPED) == 0
    assert not stale & {path.name for path in copied.iterdir()}
    assert (copied / "best_model.pth").read_bytes() == (copied / "last.pth").read_bytes() == b"of another network"
    assert (copied / "oof_probabilities.npz").exists()
    assert outcome(copied) == outcome(folded.output)


def outcome_of_fold(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_a_finished_fold_of_other_images_is_refused(folded, copied, tmp_path, capsys):
    data = tmp_path / "changed"
    shutil.copytree(folded.data, data)
    table = pd.read_csv(data / "train.csv")
    shutil.copy(data / "Dataset_Image" / table.image_path[2], data / "Dataset_Image" / table.image_path[3])
    assert folded(copied, *GROUPED, "--data-dir", str(data)) == 1
    assert "fold0: holds a finished fold with other training rows or images" in capsys.readouterr().err


def exchange(folder: Path, name: str) -> None:
    """Copy a file of fold 1 over that of fold 0."""
    shutil.copy(folder / "fold1" / name, folder / "fold0" / name)


@pytest.mark.parametrize(("fault", "message"), [
    (lambda folder: exchange(folder, "best_model.pth"), "best_model.pth: is the network of fold 1, not of fold 0"),
    (lambda folder: exchange(folder, "run.json"), "fold0: holds a finished fold with --fold 1 (not 0)"),
    (lambda folder: exchange(folder, "val_probabilities.npz"), "a finished fold with probabilities of other rows"),
    (lambda folder: (folder / "fold0" / "run.json").write_text("{"), "fold0: what a finished fold left"),
    (lambda folder: (folder / "fold0" / "val_probabilities.npz").write_bytes(b""), "left there cannot be read"),
    (lambda folder: (folder / "fold0" / "best_model.pth").write_bytes(b"PK"), "not a whole checkpoint of script.py"),
])
def test_folders_that_were_mixed_up_or_spoilt_are_refused(folded, copied, capsys, fault, message):
    fault(copied)
    assert folded(copied, *GROUPED) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (copied / "submission.csv").exists()


def test_a_folds_checkpoint_knows_its_validation_rows(folded):
    config = Config(data_dir=str(folded.data), cache_dir=str(folded.folder / "cache"), device="cpu")
    runtime = script.start_runtime(config)
    members = [script.load_checkpoint(folded.output / f"fold{fold}" / "best_model.pth") for fold in range(3)]
    for fold, member in enumerate(members):
        question, targets = script.validation_question([member], config, runtime)
        datasets = [question.dataset(member.statistics)]
        kept = np.load(folded.output / f"fold{fold}" / "val_probabilities.npz")
        assert np.array_equal(kept["targets"], targets)
        assert np.allclose(kept["probabilities"], script.ensemble_predict([member], datasets, runtime), atol=1e-6)
    with pytest.raises(DataError, match=r"split in different ways \(--split-seed 42 --folds 3 --fold 0 --group-column "
                                        r"writer; --split-seed 42 --folds 3 --fold 1 .*score them one by one"):
        script.validation_question(members[:2], config, runtime)


@pytest.mark.slow
def test_teachers_are_those_of_the_same_fold(folded, tmp_path, capsys):
    one = str(folded.output / "fold1" / "best_model.pth")
    assert folded(tmp_path, *GROUPED, "--teachers", one) == 1
    assert (f"error: {one}: a teacher must have left the same rows to validation; take its --split-seed 42 --folds 3 "
            "--fold 1 --group-column writer") in capsys.readouterr().err
    assert folded(tmp_path, *TINY, "--teachers", one) == 1
    assert "take its --split-seed 42 --folds 3 --fold 1" in capsys.readouterr().err
    each = str(folded.output / "fold{fold}" / "best_model.pth")
    assert folded(tmp_path, *GROUPED, "--teachers", each) == 0
    assert "cross-validated accuracy" in capsys.readouterr().out
    assert folded(tmp_path, *GROUPED, "--teachers", each) == 0
    assert capsys.readouterr().out.count("is finished") == 3
    shutil.rmtree(tmp_path / "fold2")  # the last one alone joins them too
    assert folded(tmp_path, *GROUPED, "--teachers", each, "--fold", "2") == 0
    assert "cross-validated accuracy" in capsys.readouterr().out
    others = tmp_path / "others"
    for fold in range(3):
        (others / f"fold{fold}").mkdir(parents=True)
        trained = script.load_checkpoint(folded.output / f"fold{fold}" / "best_model.pth")
        for weight in trained.model.parameters():
            weight.data *= 0.9
        script.save_checkpoint(others / f"fold{fold}" / "best_model.pth", trained)
    # What their names do not tell, nor the settings: files changed in their places.
    record = json.loads((tmp_path / "fold0" / "run.json").read_text())
    record["config"]["teachers"] = changed = str(others / "fold{fold}" / "best_model.pth")
    (tmp_path / "fold0" / "run.json").write_text(json.dumps(record))
    assert folded(tmp_path, *GROUPED, "--teachers", changed, "--fold", "0") == 1
    assert "holds a finished fold with other teachers" in capsys.readouterr().err


def test_groups_stay_whole_without_folds_too(folded, tmp_path):
    assert folded(tmp_path, *TINY, "--group-column", "writer", "--train-val-split", "0.8") == 0
    held = np.load(tmp_path / "val_probabilities.npz")["rows"]
    writers = pd.read_csv(folded.data / "train.csv").writer
    assert 16 <= len(held) <= 24 and not set(writers[held]) & set(writers.drop(held))
    assert (7 in held) == (93 in held) and (20 in held) == (50 in held) == (81 in held)


def test_max_minutes_are_shared_by_the_folds_that_are_left(monkeypatch, tmp_path):
    given = []

    def run_one(config, data, task, started, taken):
        given.append(600 - taken)
        return [100.0, 40.0][len(given) - 1]

    monkeypatch.setattr(script, "run_one", run_one)
    monkeypatch.setattr(script, "find_finished", lambda config, *_: {
        "seconds": 200.0, "metrics": {"val_accuracy": 0.5}} if config.fold == 1 else None)
    monkeypatch.setattr(script, "join_folds", lambda *_: None)
    data = script.TrainingData(None, None, [], None, None, None, np.arange(6) % 3)
    task = script.Task(script.Runtime(script.torch.device("cpu"), "float32", 1), None, None, {}, None)
    config = Config(folds=3, max_minutes=10.0, output_dir=str(tmp_path))
    script.run_folds(config, data, task, script.time.monotonic())
    assert given == pytest.approx([200, 300], abs=1)  # of 400; 100 of them were used


def test_pixel_tables_have_folds_and_groups(tmp_path, capsys):
    command = Command(make_pixel_competition(tmp_path / "digits"), tmp_path / "out", tmp_path / "cache")
    table = pd.read_csv(command.data / "train.csv")
    writers = pd.Series(np.arange(60) // 3, name="writer")
    pd.concat([table, writers], axis=1).to_csv(command.data / "train.csv", index=False)
    assert script.main(command.arguments(*TINY, "--folds", "2", "--group-column", "writer")) == 0
    folds = np.load(command.output / "oof_probabilities.npz")["folds"]
    assert len(folds) == 60 and pd.Series(folds).groupby(writers).nunique().max() == 1
    assert script.main(command.arguments(*TINY, "--folds", "2", "--group-column", "author")) == 1
    error = capsys.readouterr().err
    assert "train.csv: no column 'author' in its header (label, " in error and error.count("\n") == 1


def test_a_class_smaller_than_the_folds_is_told(main_in_process, competition):
    table = pd.read_csv(competition / "train.csv", dtype=str)
    table.loc[[3, 8], "label"] = "9"
    table.to_csv(competition / "train.csv", index=False)
    status, out, error = main_in_process(*FOLDS, "--num-epochs", "1")
    assert (status, error) == (0, "")
    assert "; 1 classes have fewer rows than the 3 parts of the split, so some parts lack them: 9" in out


@pytest.mark.parametrize(("change", "flags", "message"), [
    (None, ["--group-column", "author"], "train.csv: no column 'author' in its header (image_path, label, writer); "),
    ("blank", [], "train.csv, row 5: writer is empty; fill it in or remove the row"),
    ("one", [], "train.csv: 1 groups of rows that must stay together are too few for 3 parts; lower --folds"),
    (None, ["--train-csv", "torchvision:MNIST"], "torchvision:MNIST has no column 'writer'"),
])
def test_bad_group_columns_are_one_line(folded, tmp_path, capsys, change, flags, message):
    shutil.copytree(folded.data, tmp_path / "data")
    table = pd.read_csv(tmp_path / "data" / "train.csv", dtype=str)
    if change == "blank":
        table.loc[3, "writer"] = ""
    elif change == "one":
        table["writer"] = "w"
    table.to_csv(tmp_path / "data" / "train.csv", index=False)
    assert folded(tmp_path / "out", *GROUPED, "--data-dir", str(tmp_path / "data"), *flags) in (1, 2)
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


def test_side_rooms_ask_for_one_fold(folded, tmp_path, capsys):
    assert report.main([str(folded.output)]) == 1
    assert "what 3 folds gave together; name the folder of one, such as" in capsys.readouterr().err
    assert report.main([str(folded.output / "fold1"), "--cache-dir", str(folded.folder / "cache")]) == 0
    assert sweep.main(["--sweep-dir", str(tmp_path), "--data-dir", str(folded.data), "--folds", "3"]) == 2
    assert "name it with --fold" in capsys.readouterr().err


@pytest.mark.slow
def test_kills_lose_nothing(folded, tmp_path, monkeypatch):
    """SIGKILL before a random one of the next operations on the files, again and again, until the run gets through."""
    monkeypatch.setenv("PYTHONPATH", str(Path(victim.__file__).parent))
    context, draws = multiprocessing.get_context("forkserver"), np.random.default_rng(0)
    context.set_forkserver_preload(["victim"])
    arguments = Command(folded.data, tmp_path / "out", folded.folder / "cache").arguments(*GROUPED)
    files = ("last", "best_model", "run.json", "submission", "probabilities", "class_acc")
    kills = 0
    while True:
        process = context.Process(target=victim.live, args=(arguments, str(tmp_path / "log")),
                                  kwargs={"call": int(draws.integers(1, 40)), "files": files})
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills += 1
    assert kills >= 15, "few kills met the run"
    assert outcome(tmp_path / "out") == outcome(folded.output), (tmp_path / "log").read_text()
