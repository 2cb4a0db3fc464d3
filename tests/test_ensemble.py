"""Several files averaged one at a time: checkpoints, saved probabilities, files that cannot be averaged."""

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
from pipeline import ensemble, files
from pipeline.ensemble import EnsembleMember
from pipeline.errors import DataError
from pipeline.knn import KNNClassifier
from pipeline.tables import read_test_table


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A competition with two networks of different kinds, sizes and images, and their test probabilities."""
    folder = tmp_path_factory.mktemp("ensemble")
    data, checkpoints = make_competition(folder / "competition"), []
    for model, size in (("tiny", "16"), ("mlp", "12")):
        own = Command(data, folder / model, folder / "cache")
        assert script.main(own.arguments(*QUICK, "--precision", "float32", "--model", model, "--image-size", size,
                                         "--save-probabilities")) == 0
        checkpoints.append(own.output / "best_model.pth")
    return Command(data, folder / "out", folder / "cache"), checkpoints


@pytest.fixture
def call(trained, tmp_path, capsys):
    """The command line with an output folder of its own: gives status, stdout and stderr."""
    command = Command(trained[0].data, tmp_path / "out", trained[0].cache)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = script.main(command.arguments(*map(str, words)))
        return status, *capsys.readouterr()

    run.command = command
    return run


def saved(folder: Path) -> dict[str, np.ndarray]:
    return ensemble.read_probabilities(folder / "test_probabilities.npz")


def probabilities(call, *words: object) -> np.ndarray:
    status, _, error = call("predict", *words, "--save-probabilities")
    assert status == 0, error
    return saved(call.command.output)["probabilities"]


def write_again(source: Path, target: Path, **changes) -> Path:
    with np.load(source) as file:
        np.savez(target, **{**file, **changes})
    return target


def change_checkpoint(source: Path, target: Path, **changes) -> Path:
    """Write a checkpoint again with other content, or (config) other settings."""
    content = files.load_verified(source)
    content["config"].update(changes.pop("config", {}))
    files.save_verified(target, {**content, **changes})
    return target


def test_one_network_is_in_memory_at_a_time(trained, monkeypatch):
    command, checkpoints = trained
    config = script.Config(data_dir=str(command.data), cache_dir=str(command.cache), device="cpu")
    table = read_test_table(config.test_source)
    members = script.open_members(config, [*map(str, checkpoints), str(checkpoints[0])], table)
    runtime, load_checkpoint = ensemble.runtime_for(members, config.device, config.precision), script.load_checkpoint
    networks, others = weakref.WeakSet(), []

    def load(path):
        others.append(len(networks))
        networks.add((found := load_checkpoint(path)).model)
        return found

    monkeypatch.setattr(script, "load_checkpoint", load)
    script.average_members(members, table, config, runtime)
    assert others == [0, 0, 0]


def test_the_average_counts_networks_and_matches_classes():
    members = [EnsembleMember(Path("a"), ["x", "y"]), EnsembleMember(Path("b"), ["y", "x"], networks=3)]
    each = {"a": np.float32([[1, 0], [0.5, 0.5]]), "b": np.float32([[1, 0], [0.2, 0.8]])}
    mean = ensemble.average(members, lambda member: each[member.path.name])
    assert mean.dtype == np.float32 and np.allclose(mean, [[0.25, 0.75], [(0.5 + 3 * 0.8) / 4, (0.5 + 3 * 0.2) / 4]])
    with pytest.raises(DataError, match=r"^c: knows other classes than a \(y, z\); average networks "):
        ensemble.check_same_classes([*members, EnsembleMember(Path("c"), ["x", "z"])])


def test_the_submission_of_two_files_is_that_of_their_mean(trained, call):
    first, second = (probabilities(call, path) for path in trained[1])
    both = probabilities(call, *trained[1])
    assert np.allclose(both, (first + second) / 2, atol=1e-6) and not np.allclose(first, second, atol=1e-3)
    assert saved(call.command.output)["weight"] == 2
    assert call.command.submission().label.tolist() == [CLASSES[place] for place in both.argmax(axis=1)]


def test_a_file_that_is_named_twice_counts_twice(trained, call):
    first, second = (probabilities(call, path) for path in trained[1])
    assert np.allclose(probabilities(call, *trained[1], trained[1][0]), (2 * first + second) / 3, atol=1e-6)
    assert saved(call.command.output)["weight"] == 3


@pytest.mark.parametrize("name, content, message", [("none.pth", None, "no such checkpoint"),
                                                    ("bad.pth", b"PK", "not a complete checkpoint"),
                                                    ("bad.npz", b"PK", "not a complete file of saved test")])
def test_a_bad_last_file_is_reported_before_an_image_is_read(trained, call, tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    status, out, error = call("predict", *trained[1], tmp_path / name, "--cache-dir", tmp_path / "cache")
    assert status == 1 and f"{name}: {message}" in error and error.count("\n") == 1
    assert not (tmp_path / "cache").exists() and "decoded" not in out


def test_other_classes_are_reported_with_the_file(trained, call, tmp_path):
    other = change_checkpoint(trained[1][1], tmp_path / "other.pth", classes=["3", "17", "40", "101", "7"])
    status, _, error = call("predict", trained[1][0], other)
    assert status == 1 and "other.pth: knows other classes than " in error and "(1400, 7)" in error


def test_classes_are_matched_by_their_names(trained, call, tmp_path):
    """The same network with the names of its classes in another order predicts the other classes."""
    change_checkpoint(trained[1][1], tmp_path / "turned.pth", classes=CLASSES[::-1])
    alone = probabilities(call, trained[1][1])
    both = probabilities(call, trained[1][1], tmp_path / "turned.pth")
    assert np.allclose(both, (alone + alone[:, ::-1]) / 2, atol=1e-6) and not np.allclose(both, alone, atol=1e-3)


def test_saved_probabilities_replace_their_network(trained, call, tmp_path):
    """Rows and classes may be in any order; they are matched by id and by name."""
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


def test_saved_probabilities_alone_read_no_image(trained, call, tmp_path):
    first, second = (path.with_name("test_probabilities.npz") for path in trained[1])
    status, out, error = call("predict", first, second, "--root-dir", "none")
    assert status == 0 and "the mean of 2 networks" in out, error
    mean = sum(saved(path.parent)["probabilities"] for path in trained[1])
    assert call.command.submission().label.tolist() == [CLASSES[place] for place in mean.argmax(axis=1)]
    status, _, error = call("predict", first, second, "--tta", "3")
    assert status == 2 and "leave --tta out" in error and error.count("\n") == 1
    status, _, error = call("evaluate", first, "--test-csv", "train.csv")
    assert status == 2 and "only predict can average saved probabilities" in error and error.count("\n") == 1


def spoil(**changes):
    """Return a fault: functions change some arrays of the file."""
    def fault(path):
        with np.load(path) as file:
            arrays = dict(file)
        arrays.update({name: change(arrays[name]) for name, change in changes.items()})
        np.savez(path, **arrays)
    return fault


def flip_a_bit(path: Path) -> None:
    """Change the last bit of a probability, which stays one."""
    content, values = path.read_bytes(), ensemble.read_probabilities(path)["probabilities"].tobytes()
    damaged = bytearray(content)
    damaged[content.index(values) + 40] ^= 1
    path.write_bytes(damaged)


def single_array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.zeros(3))
    return content.getvalue()


FAULTS = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "not a complete file of saved test probabilities"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:700]), "not a complete file"),
    "a flipped bit": (lambda path: flip_a_bit(path), "not a complete file"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"ids": 1})), "not a complete file"),
    "pickles in it": (spoil(ids=lambda ids: ids.astype(object)), "not a complete file"),
    "a single array": (lambda path: path.write_bytes(single_array()), "not a complete file"),
    "other arrays": (lambda path: np.savez(path, rows=[1]), "not a complete file"),
    "no number": (spoil(probabilities=lambda values: values * np.nan), "its rows are not probabilities"),
    "logits": (spoil(probabilities=lambda values: values * 9), "its rows are not probabilities"),
    "a row less": (spoil(probabilities=lambda values: values[1:]), "its probabilities are float32 (29, 5)"),
    "no weight": (spoil(weight=lambda _: 0), "its weight is not a number of networks"),
    "half a network": (spoil(weight=lambda _: 0.5), "its weight is not a number of networks"),
    "numbers for ids": (spoil(ids=lambda ids: np.arange(30)), "its ids or classes are not unique text"),
    "a repeated id": (spoil(ids=lambda ids: ids[[0, *range(29)]]), "its ids or classes are not unique text"),
    "another id": (spoil(ids=lambda ids: np.where(ids == ids[3], "none", ids)), "has no row of the id '"),
    "a missing row": (spoil(ids=lambda ids: ids[1:], probabilities=lambda values: values[1:]), "test.csv, row 2; it m"),
    "a further row": (spoil(ids=lambda ids: np.append(ids, "more"), probabilities=lambda values: np.concatenate(
        [values, values[:1]])), "has a row of the id 'more', which "),
    "another class": (spoil(classes=lambda classes: np.where(classes == "17", "18", classes)),
                      "knows other classes than "),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FAULTS)
def test_saved_probabilities_that_cannot_be_used_are_named(trained, call, tmp_path, name):
    fault, message = FAULTS[name]
    shutil.copy(trained[1][1].with_name("test_probabilities.npz"), tmp_path / "saved.npz")
    fault(tmp_path / "saved.npz")
    status, _, error = call("predict", trained[1][0], tmp_path / "saved.npz", "--cache-dir", tmp_path / "cache")
    assert status == 1 and "saved.npz: " in error and message in error and error.count("\n") == 1, error
    assert not (call.command.output / "submission.csv").exists() and not (tmp_path / "cache").exists()


def test_a_run_without_the_flag_saves_no_probabilities(trained, call):
    assert call("predict", trained[1][0])[0] == 0
    assert not (call.command.output / "test_probabilities.npz").exists()


@pytest.mark.slow
def test_views_of_a_network_with_a_nearest_neighbour_vote(trained, call):
    first = trained[1][0]
    assert isinstance(script.load_checkpoint(first).model, KNNClassifier)
    lines = []
    for views in ("1", "1", "4", "4"):
        status, out, error = call("evaluate", first, "--test-csv", "train.csv", "--no-pictures", "--tta", views)
        assert status == 0, error
        lines.append(next(line for line in out.splitlines() if "loss" in line))
    assert lines[0] == lines[1] != lines[2] == lines[3]
    assert np.abs(probabilities(call, first, "--tta", "2") - probabilities(call, first)).max() > 1e-4


def test_a_network_without_augmentation_knows_one_view(trained, call, tmp_path):
    plain = change_checkpoint(trained[1][0], tmp_path / "plain.pth", config={"augment": False})
    status, _, error = call("predict", plain, "--tta", "2")
    assert status == 2 and "plain.pth has one view of an image only" in error and "leave --tta out" in error
    assert call("predict", plain)[0] == 0
