"""Rooms 9 and 11: several files averaged one at a time, their weights, saved probabilities, views."""

import dataclasses
import io
import pickle
import shutil
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, QUICK, Command, make_competition

import script
from script import Config, DataError, ImageStatistics, MathSymbolDataset

CPU = script.start_runtime(Config(device="cpu", precision="float32"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A competition with two networks of different kinds, sizes and images, and what each says of the test table."""
    folder = tmp_path_factory.mktemp("ensemble")
    data, files = make_competition(folder / "competition"), []
    for model, size in (("tiny", "16"), ("mlp", "12")):
        own = Command(data, folder / model, folder / "cache")
        assert script.main(own.arguments(*QUICK, "--precision", "float32", "--model", model, "--image-size", size,
                                         "--save-probabilities")) == 0
        files.append(own.output / "best_model.pth")
    return Command(data, folder / "out", folder / "cache"), files


@pytest.fixture
def call(trained, tmp_path, capsys):
    """The command line with an output folder of its own: gives status, stdout and stderr."""
    command = Command(trained[0].data, tmp_path / "out", trained[0].cache)

    def ask(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = script.main(command.arguments(*map(str, words)))
        return status, *capsys.readouterr()

    ask.command = command
    return ask


def saved(folder: Path) -> dict[str, np.ndarray]:
    return script.read_probabilities(folder / "test_probabilities.npz")


def probabilities(call, *words: object) -> np.ndarray:
    status, _, error = call("predict", *words, "--save-probabilities")
    assert status == 0, error
    return saved(call.command.output)["probabilities"]


def write_again(source: Path, target: Path, **changes) -> Path:
    with np.load(source) as file:
        np.savez(target, **{**file, **changes})
    return target


def test_networks_are_asked_one_at_a_time(trained, call, monkeypatch):
    _, files = trained
    models, datasets, loaded = weakref.WeakSet(), weakref.WeakSet(), []
    real_load, real_prepare = script.load_checkpoint, script.prepare_rows

    def load(path):
        loaded.append(path)
        assert not len(models)
        models.add((found := real_load(path)).model)
        return found

    def prepare(*arguments):
        assert not len(datasets)
        datasets.add(dataset := real_prepare(*arguments))
        return dataset

    monkeypatch.setattr(script, "load_checkpoint", load)
    monkeypatch.setattr(script, "prepare_rows", prepare)
    assert call("predict", *files, files[0])[0] == 0
    assert loaded == [*files, files[0]] * 2  # each is read once to be checked, and once to be asked


def test_the_files_mean_is_that_of_the_networks(trained, call):
    command, files = trained
    members = [script.load_checkpoint(path) for path in files]
    config = Config(data_dir=str(command.data), cache_dir=str(command.cache))
    table = script.read_test_table(config)
    question = script.Question(table, np.arange(30), config, CPU)
    datasets = [question.dataset(member.statistics) for member in members]
    assert len(datasets[0].images[0, 0]) == 16 and len(datasets[1].images[0, 0]) == 12
    expected = script.ensemble_predict(members, datasets, CPU)
    assert np.allclose(probabilities(call, *files), expected, atol=1e-6)
    assert saved(call.command.output)["weight"] == 2


@pytest.mark.parametrize("name, content, message", [("none.pth", None, "no such checkpoint"),
                                                    ("bad.pth", b"PK", "not a whole checkpoint"),
                                                    ("bad.npz", b"PK", "no whole file of saved test probabilities")])
def test_a_bad_last_file_is_told_before_any_is_asked(trained, call, tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(script, "infer", None)
    if content:
        (tmp_path / name).write_bytes(content)
    status, _, error = call("predict", *trained[1], tmp_path / name)
    assert status == 1 and f"{name}: {message}" in error and error.count("\n") == 1


def test_other_classes_are_told_with_the_file(trained, call, tmp_path):
    content = script.read_content(trained[1][1])
    script.write_content(tmp_path / "other.pth", {**content, "classes": ["3", "17", "40", "101", "7"]})
    status, _, error = call("predict", trained[1][0], tmp_path / "other.pth")
    assert status == 1 and "other.pth: knows other classes than " in error and "(1400, 7)" in error


def test_classes_are_matched_by_their_names(trained, call, tmp_path):
    """The same network with its classes called in another order answers the other classes."""
    content = script.read_content(trained[1][1])
    script.write_content(tmp_path / "turned.pth", {**content, "classes": CLASSES[::-1]})
    alone = probabilities(call, trained[1][1])
    both = probabilities(call, trained[1][1], tmp_path / "turned.pth")
    assert np.allclose(both, (alone + alone[:, ::-1]) / 2, atol=1e-6) and not np.allclose(both, alone, atol=1e-3)


def test_validation_rows_are_read_where_the_command_says(trained, call, tmp_path):
    """The table may have another name by now; an image that went bad since may be skipped."""
    data = tmp_path / "moved"
    shutil.copytree(trained[0].data, data)
    (data / "train.csv").rename(data / "labelled.csv")
    (data / "Dataset_Image").rename(data / "Images")
    command = ["predict", *trained[1], "--member-weights", "validation", "--data-dir", data, "--root-dir", "Images"]
    assert "train.csv: no such file" in call(*command)[2]
    status, printed, error = call(*command, "--train-csv", "labelled.csv")
    assert status == 0 and "validation rows with equal weights" in printed, error
    (data / "Images" / pd.read_csv(data / "labelled.csv").image_path[0]).write_bytes(b"")
    assert call(*command, "--train-csv", "labelled.csv")[0] == 1
    assert call(*command, "--train-csv", "labelled.csv", "--on-bad-image", "skip")[0] == 0


def test_weights_by_hand(trained, call):
    first, second = (probabilities(call, path) for path in trained[1])
    assert np.allclose(probabilities(call, *trained[1], "--member-weights", "3,1"), 0.75 * first + 0.25 * second,
                       atol=1e-6)
    assert np.allclose(probabilities(call, *trained[1], "--member-weights", "0, 2"), second, atol=1e-6)
    assert saved(call.command.output)["weight"] == 1  # the other one has no part in it
    status, _, error = call("predict", *trained[1], "--member-weights", "1,1,1")
    assert status == 2 and "1,1,1: 3 numbers for 2 files; name one for each" in error and error.count("\n") == 1


def test_fitted_weights_have_the_least_cross_entropy():
    rng = np.random.default_rng(0)
    likelihoods = np.stack([rng.beta(5, 2, 400), rng.beta(4, 2, 400), rng.beta(1, 5, 400)], axis=1)
    shares = script.fit_weights(likelihoods)
    grid = np.array([(a, b, 100 - a - b) for a in range(101) for b in range(101 - a)]) / 100
    losses = -np.log(likelihoods @ grid.T).mean(axis=0)
    assert shares.min() >= 0 and shares.sum() == pytest.approx(1)
    assert -np.log(likelihoods @ shares).mean() <= losses.min() + 1e-6
    assert np.abs(shares - grid[losses.argmin()]).max() < 0.02 and shares[2] < 0.1
    assert np.isfinite(script.fit_weights(np.zeros((3, 2)))).all()


def test_fitted_weights_tell_members_that_are_much_alike_apart():
    rng = np.random.default_rng(1)
    base = rng.beta(8, 2, (4000, 1))
    likelihoods = np.clip(base + rng.normal(0, 0.004, (4000, 3)) - [0.002, 0, 0.001], 0.01, 0.99)
    shares = script.fit_weights(likelihoods)
    gains = (likelihoods / (likelihoods @ shares)[:, None]).mean(axis=0)  # what a little more of each is worth
    assert gains.max() < 1 + 2e-6
    assert shares[0] == 0 and shares.sum() == pytest.approx(1)  # and is not asked at all


def test_weights_are_found_on_the_validation_rows(trained, call):
    command, files = trained
    config = Config(data_dir=str(command.data), cache_dir=str(command.cache))
    members = script.look_at_members(files)
    question, targets = script.validation_question(members, config, CPU)
    each = np.stack(list(script.ask_members(members, question)))
    shares = script.fit_weights(each[:, np.arange(10), targets].T)
    for words in (["predict"], ["evaluate", "--test-csv", "train.csv", "--no-pictures"]):
        status, out, error = call(*words, *files, "--member-weights", "validation")
        assert status == 0, error
        assert f"weights: {files[0]} {shares[0]:.3f}, {files[1]} {shares[1]:.3f}" in out
        assert "these rows chose the weights" in out
        for name, weights in (("with equal", [0.5, 0.5]), ("with these", shares)):
            figures = script.score(np.tensordot(weights, each, 1), targets)
            assert (f"10 validation rows {name} weights: loss {figures['val_loss']:.4f}, accuracy "
                    f"{figures['val_accuracy']:.2%}") in out
    npz = files[0].with_name("test_probabilities.npz")
    status, _, error = call("predict", files[0], npz, "--member-weights", "validation")
    assert status == 2 and "test_probabilities.npz: --member-weights validation asks networks" in error


def test_weights_are_not_found_for_networks_of_different_splits(trained, call, tmp_path):
    content = script.read_content(trained[1][1])
    content["config"]["split_seed"] = 7
    script.write_content(tmp_path / "other.pth", content)
    status, _, error = call("predict", trained[1][0], tmp_path / "other.pth", "--member-weights", "validation")
    assert status == 1 and "split in different ways (--split-seed 42" in error


def test_saved_probabilities_stand_for_their_network(trained, call, tmp_path):
    """Rows and classes may stand in any order; they are matched by id and by name."""
    first, second = trained[1]
    kept = saved(second.parent)
    assert kept["ids"].tolist() == pd.read_csv(call.command.data / "test.csv", dtype=str).example_id.tolist()
    assert kept["classes"].tolist() == CLASSES and kept["weight"] == 1
    rows, columns = np.random.default_rng(0).permutation(30), np.array([3, 0, 4, 1, 2])
    turned = write_again(second.with_name("test_probabilities.npz"), tmp_path / "turned.npz", ids=kept["ids"][rows],
                         classes=kept["classes"][columns], probabilities=kept["probabilities"][rows][:, columns])
    both = probabilities(call, first, second)
    assert np.allclose(probabilities(call, first, turned), both, atol=1e-6)
    assert np.allclose(probabilities(call, turned, first)[:, np.argsort(columns)], both, atol=1e-6)


def test_saved_probabilities_count_with_their_networks(trained, call, tmp_path):
    first, second = trained[1]
    pair = write_again(second.with_name("test_probabilities.npz"), tmp_path / "pair.npz", weight=3)
    mean = probabilities(call, first, pair)
    assert saved(call.command.output)["weight"] == 4
    alone = [saved(path.parent)["probabilities"] for path in trained[1]]
    assert np.allclose(mean, (alone[0] + 3 * alone[1]) / 4, atol=1e-6)


def test_saved_probabilities_alone_read_no_image(trained, call, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_images", None)
    first, second = (path.with_name("test_probabilities.npz") for path in trained[1])
    status, out, error = call("predict", first, second)
    assert status == 0 and "the mean of 2 networks" in out, error
    mean = sum(saved(path.parent)["probabilities"] for path in trained[1])
    assert call.command.submission().label.tolist() == [CLASSES[place] for place in mean.argmax(axis=1)]
    status, _, error = call("predict", first, second, "--views", "3")
    assert status == 2 and "--views 3: saved probabilities are of the views" in error and error.count("\n") == 1
    status, _, error = call("evaluate", first, "--test-csv", "train.csv")
    assert status == 2 and "can be averaged by predict alone" in error and error.count("\n") == 1


def spoil(**changes):
    """A fault: some arrays of the file are others, which functions of the arrays give."""
    def fault(path):
        with np.load(path) as file:
            arrays = dict(file)
        arrays.update({name: change(arrays[name]) for name, change in changes.items()})
        np.savez(path, **arrays)
    return fault


def flip_a_bit(path: Path) -> None:
    """The last bit of a probability that stays one."""
    content, values = path.read_bytes(), script.read_probabilities(path)["probabilities"].tobytes()
    spoilt = bytearray(content)
    spoilt[content.index(values) + 40] ^= 1
    path.write_bytes(spoilt)


def single_array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.zeros(3))
    return content.getvalue()


FAULTS = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "no whole file of saved test probabilities"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:700]), "no whole file"),
    "a flipped bit": (lambda path: flip_a_bit(path), "no whole file"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"ids": 1})), "no whole file"),
    "pickles in it": (spoil(ids=lambda ids: ids.astype(object)), "no whole file"),
    "a single array": (lambda path: path.write_bytes(single_array()), "no whole file"),
    "other arrays": (lambda path: np.savez(path, rows=[1]), "no whole file"),
    "no number": (spoil(probabilities=lambda values: values * np.nan), "its rows are no probabilities"),
    "logits": (spoil(probabilities=lambda values: values * 9), "its rows are no probabilities"),
    "a row less": (spoil(probabilities=lambda values: values[1:]), "its probabilities are float32 (29, 5)"),
    "no weight": (spoil(weight=lambda _: 0), "its weight is no number of networks"),
    "half a network": (spoil(weight=lambda _: 0.5), "its weight is no number of networks"),
    "numbers for ids": (spoil(ids=lambda ids: np.arange(30)), "its ids or classes are no texts"),
    "a repeated id": (spoil(ids=lambda ids: ids[[0, *range(29)]]), "its ids or classes are no texts, or stand there t"),
    "another id": (spoil(ids=lambda ids: np.where(ids == ids[3], "none", ids)), "has no row of the id '"),
    "a missing row": (spoil(ids=lambda ids: ids[1:], probabilities=lambda values: values[1:]), "test.csv, row 2; it m"),
    "a further row": (spoil(ids=lambda ids: np.append(ids, "more"), probabilities=lambda values: np.concatenate(
        [values, values[:1]])), "has a row of the id 'more', which "),
    "another class": (spoil(classes=lambda classes: np.where(classes == "17", "18", classes)),
                      "knows other classes than "),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FAULTS)
def test_saved_probabilities_that_cannot_be_used_are_named(trained, call, tmp_path, monkeypatch, name):
    monkeypatch.setattr(script, "infer", None)  # before anything is asked
    fault, message = FAULTS[name]
    shutil.copy(trained[1][1].with_name("test_probabilities.npz"), tmp_path / "saved.npz")
    fault(tmp_path / "saved.npz")
    status, _, error = call("predict", trained[1][0], tmp_path / "saved.npz")
    assert status == 1 and "saved.npz: " in error and message in error and error.count("\n") == 1, error
    assert not (call.command.output / "submission.csv").exists()


def test_a_run_without_the_flag_saves_no_probabilities(trained, call):
    assert call("predict", trained[1][0])[0] == 0
    assert not (call.command.output / "test_probabilities.npz").exists()


def test_rows_without_an_image_are_no_sure_answers(capsys):
    table = script.Table("test.csv", pd.DataFrame({"example_id": list("abcd")}), faults={1: "gone"})
    answers = np.array([[0.2, 0.8], [1, 0], [0.1, 0.9], [0.7, 0.3]], dtype=np.float32)
    script.answer_for_bad_images(table, answers, ["x", "y"])
    assert np.allclose(answers[1], [1 / 3, 2 / 3]) and "the label 'y'" in capsys.readouterr().err


def some_images(rows: int) -> MathSymbolDataset:
    images = np.random.default_rng(0).integers(0, 256, (rows, 1, 8, 8), dtype=np.uint8)
    return MathSymbolDataset(images, None, CPU)


def test_views_are_averaged_whatever_the_batches_are(monkeypatch):
    config = Config(model="tiny", image_size=8, dropout=0.0, views=3)
    model, data, rows = script.build_model(config, 5), some_images(23), np.arange(23)
    monkeypatch.setattr(script, "VIEW_ROWS", 10)
    whole = script.predict(model, data, rows, config, CPU)
    small = script.predict(model, data, rows, config, dataclasses.replace(CPU, eval_batch_size=4))
    assert np.allclose(whole, small, atol=1e-6) and np.allclose(whole.sum(axis=1), 1, atol=1e-5)
    plain = dataclasses.replace(config, views=1)
    parts = [script.predict(model, data, rows, plain, CPU)]
    for view in (1, 2):
        drawn = script.draw_view(data, rows, config, view, CPU)
        parts.append(script.predict(model, drawn, rows, dataclasses.replace(plain, augment=False), CPU))
    assert np.allclose(whole, sum(parts) / 3, atol=1e-6)
    assert len({part.tobytes() for part in parts}) == 3


def test_a_view_is_what_training_draws():
    config, data = Config(model="tiny", image_size=12), some_images(6)
    rows = np.array([4, 1, 3])
    drawn = script.draw_view(data, rows, config, 2, CPU)
    draws = script.Draws(script.seed_of(config, 2, 0), CPU.device)
    ink = script.augment(data.batch(rows)[0], config, draws)
    assert drawn.images.shape == (3, 1, 12, 12) and (drawn.images / 255 - ink).abs().max() < 0.003


@pytest.mark.slow
def test_views_through_the_command_and_with_a_memory(trained, call):
    files = trained[1]
    assert isinstance(script.load_checkpoint(files[0]).model, script.NeighbourVote)
    lines = []
    for views in ("1", "1", "4", "4"):
        status, out, error = call("evaluate", files[0], "--test-csv", "train.csv", "--no-pictures", "--views", views)
        assert status == 0, error
        lines.append(next(line for line in out.splitlines() if "loss" in line))
    assert lines[0] == lines[1] != lines[2] == lines[3]
    assert np.abs(probabilities(call, files[0], "--views", "2") - probabilities(call, files[0])).max() > 1e-4


def test_images_of_one_kind_are_prepared_once(monkeypatch):
    prepared = []
    monkeypatch.setattr(script, "prepare_rows", lambda *arguments: prepared.append(arguments[3]) or object())
    question = script.Question(None, np.arange(3), Config(), CPU)
    small, large = ImageStatistics(255, 8), ImageStatistics(255, 16)
    for statistics in (small, small, large, large, small):
        question.dataset(statistics)
    assert prepared == [small, large, small]


def test_a_table_in_another_order_is_not_the_one_trained_on(trained, call, monkeypatch):
    """By it other rows were held out, and the network would be judged on rows that it has learnt."""
    command, files = trained
    table = pd.read_csv(command.data / "train.csv", dtype=str)
    table.sort_values("label").to_csv(command.data / "sorted.csv", index=False)
    pd.concat([table, table.iloc[:1]]).to_csv(command.data / "longer.csv", index=False)
    for name in ("sorted.csv", "longer.csv"):
        status, _, error = call("predict", *files, "--member-weights", "validation", "--train-csv", name)
        assert status == 1 and f"{name}: not the rows that {files[0]} was trained on, or not in their order" in error
        assert error.count("\n") == 1
        status, _, error = call(*QUICK, "--model", "tiny", "--teachers", files[0], "--train-csv", name)
        assert status == 1 and f"{name}: not the rows that {files[0]} was trained on, or not in their order" in error
    every = ["--train-val-split", "1"]  # then no row is held out, and a teacher may be of any table
    status, _, error = call(*QUICK, *every, "--model", "tiny")
    assert status == 0, error
    teacher = call.command.output / "best_model.pth"
    call.command.output = call.command.output.with_name("pupil")
    assert call(*QUICK, *every, "--model", "tiny", "--teachers", teacher, "--train-csv", "sorted.csv")[0] == 0


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(trained, call, tmp_path):
    content = script.read_content(trained[1][0])
    del content["labels"]
    script.write_content(tmp_path / "old.pth", content)
    status, _, error = call("predict", tmp_path / "old.pth", trained[1][1], "--member-weights", "validation")
    assert status == 0 and "old.pth: an earlier version's, which does not tell" in error


def test_a_network_without_augmentation_knows_one_view(trained, call, tmp_path):
    content = script.read_content(trained[1][0])
    content["config"]["augment"] = False
    script.write_content(tmp_path / "plain.pth", content)
    status, _, error = call("predict", tmp_path / "plain.pth", "--views", "2")
    assert status == 2 and "plain.pth was trained with --no-augment" in error
    assert call("predict", tmp_path / "plain.pth")[0] == 0


def test_a_teacher_is_no_file_of_probabilities(trained, tmp_path, capsys):
    command, files = trained
    pupil = Command(command.data, tmp_path / "out", command.cache)
    npz = str(files[0].with_name("test_probabilities.npz"))
    with pytest.raises(DataError):
        script.look_at_member(Path(npz))
    assert script.main(pupil.arguments(*QUICK, "--teachers", npz)) == 2
    assert "name a checkpoint" in capsys.readouterr().err
