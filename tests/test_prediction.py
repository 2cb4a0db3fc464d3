"""Probabilities of one network and of several: rows, views, ensembles, checkpoints."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import script
from pipeline import files, optim
from pipeline.device import start_runtime
from pipeline.errors import DataError
from pipeline.images import ImageStatistics
from pipeline.tables import Table
from script import Config, MathSymbolDataset, TrainedModel

CPU = start_runtime("cpu", "float32")
CONFIG = Config(model="cnn", image_size=8, dropout=0.2)
STATISTICS = ImageStatistics(255, 8)


def make_dataset(rows: int = 23, runtime=CPU, **settings) -> MathSymbolDataset:
    images = np.random.default_rng(0).integers(0, 256, (rows, 1, 8, 8), dtype=np.uint8)
    table = Table("test.csv", pd.DataFrame({"example_id": [str(row) for row in range(rows)]}), pixels=images[:, 0])
    return MathSymbolDataset(table, dataclasses.replace(CONFIG, **settings), None, STATISTICS, runtime, images)


def make_member(seed: int, classes: list[str], **settings) -> TrainedModel:
    config = dataclasses.replace(CONFIG, seed=seed, **settings)
    return TrainedModel(script.build_model(config, len(classes)), config, classes, STATISTICS, {}, "")


def test_probabilities_are_in_the_order_of_the_rows():
    model, data = script.build_model(CONFIG, 5), make_dataset()
    whole = script.predict(model, data)
    assert whole.shape == (23, 5) and whole.dtype == np.float32 and np.allclose(whole.sum(axis=1), 1, atol=1e-5)
    rows = np.random.default_rng(1).permutation(23)
    for eval_batch_size in (1, 4, 23):
        data.runtime = dataclasses.replace(CPU, eval_batch_size=eval_batch_size)
        assert np.allclose(script.predict(model, data, rows), whole[rows], atol=1e-6)
    assert script.predict(model, data, rows[:0]).shape[0] == 0


def test_infer_returns_the_outputs_of_a_model_in_evaluation_mode():
    model, data = script.build_model(CONFIG, 5).train(), make_dataset()
    outputs = script.infer(model, data, np.array([4, 0]))
    model.eval()
    with torch.inference_mode():
        expected = model(data.batch(np.array([4, 0]))[0])
    assert np.allclose(outputs, expected, atol=1e-5)


def test_a_network_whose_outputs_are_not_numbers_is_an_error():
    model = script.build_model(CONFIG, 5)
    torch.nn.init.constant_(model.head[1].weight, float("nan"))
    with pytest.raises(DataError, match="training diverged; lower --learning-rate"):
        script.predict(model, make_dataset())


def test_an_ensemble_is_the_mean_of_its_members_by_class_name():
    first, second = make_member(0, ["1", "2", "3"]), make_member(1, ["3", "1", "2"], image_size=12)
    data = make_dataset()
    alone = [script.ensemble_predict([member], data) for member in (first, second)]
    both = script.ensemble_predict([first, second], data)
    assert np.allclose(both, (alone[0] + alone[1][:, [1, 2, 0]]) / 2, atol=1e-6)
    assert np.allclose(alone[1], script.predict(second.model, data.for_network(second.config)), atol=1e-6)
    with pytest.raises(DataError, match=r"knows other classes than .* \(3, 4\)"):
        script.ensemble_predict([first, make_member(0, ["1", "2", "4"])], data)


def test_views_are_averaged_whatever_the_evaluation_batch():
    rows = np.arange(158)  # views are drawn in batches of 128
    model, data = script.build_model(dataclasses.replace(CONFIG, model="tiny", dropout=0.0), 5), make_dataset(len(rows))
    whole = script.predict(model, data, rows, tta=3)
    data.runtime = dataclasses.replace(CPU, eval_batch_size=4)
    assert np.allclose(whole, script.predict(model, data, rows, tta=3), atol=1e-6)
    parts = [torch.from_numpy(script.infer(model, data, rows, view)).softmax(dim=1) for view in range(3)]
    assert np.allclose(whole, sum(parts) / 3, atol=1e-6) and np.allclose(whole.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(parts[0], script.predict(model, data, rows), atol=1e-6)
    assert len({part.numpy().tobytes() for part in parts}) == 3


def test_a_view_is_augmented_as_in_training():
    model, data, rows = script.build_model(CONFIG, 5), make_dataset(6), np.array([4, 1, 3])
    inputs = data.batch(rows, optim.step_seed(CONFIG.seed, 2, 0))[0]
    assert not torch.equal(inputs, data.batch(rows)[0])
    with torch.inference_mode():
        expected = model.eval()(inputs)
    assert np.allclose(script.infer(model, data, rows, view=2), expected, atol=1e-5)


def test_a_checkpoint_gives_back_the_network_and_its_settings(tmp_path):
    member = dataclasses.replace(make_member(3, ["b", "a"]), metrics={"epoch": 2, "val_accuracy": 0.5},
                                 labels_sha256="abc")
    script.save_checkpoint(tmp_path / "a.pth", member)
    loaded = script.load_checkpoint(tmp_path / "a.pth")
    for name in ("config", "classes", "statistics", "metrics", "labels_sha256"):
        assert getattr(loaded, name) == getattr(member, name)
    data = make_dataset()
    assert np.array_equal(script.ensemble_predict([loaded], data), script.ensemble_predict([member], data))
    assert loaded.without_knn.model is loaded.model and files.load_verified(tmp_path / "a.pth")["knn"] == {}


def test_a_checkpoint_that_is_missing_or_damaged_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"a.pth: no such checkpoint; train one with `python script.py`$"):
        script.load_checkpoint(tmp_path / "a.pth")
    script.save_checkpoint(tmp_path / "a.pth", make_member(0, ["a", "b"]))
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(DataError, match=r"a.pth: not a complete checkpoint .* \(.*\); train again, or name") as error:
        script.load_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(error.value)
