"""tools/export.py: onnxruntime gives PyTorch's probabilities if its input is made as model.json says."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK, Command, make_competition
from PIL import Image

import script
from pipeline.device import start_runtime
from pipeline.errors import DataError
from pipeline.images import ImageStatistics, decode_images
from pipeline.knn import KNNClassifier
from pipeline.tables import Table
from tools import export


@pytest.mark.slow
@pytest.mark.parametrize("flags, vote", [(["--model", "cnn", "--num-epochs", "8"], True), (["--model", "cnn"], False),
                                         (["--model", "resnet", "--image-size", "24"], False),
                                         (["--model", "mlp", "--normalize", "standard"], False)])
def test_onnxruntime_gives_the_same_probabilities(tmp_path, capsys, flags, vote):
    import onnxruntime

    command = Command(make_competition(tmp_path / "competition", 200), tmp_path / "out", tmp_path / "cache")
    assert script.main(command.arguments(*QUICK, *flags)) == 0
    checkpoint = command.output / "best_model.pth"
    assert export.main([str(checkpoint), "--output-dir", str(tmp_path / "onnx"), *["--vote"][: vote]]) == 0
    assert "its probabilities differ from PyTorch's by at most " in capsys.readouterr().out
    about = json.loads((tmp_path / "onnx" / "model.json").read_text())
    paths = sorted((command.data / "Dataset_Image" / "data").iterdir())[:7]
    grey = np.stack([np.asarray(Image.open(path).convert("L").resize((about["size"],) * 2, Image.BILINEAR), dtype=float)
                     for path in paths])
    ink = (np.abs(grey - about["image_statistics"]["background"]) / 255).astype(np.float32)[:, None]
    session = onnxruntime.InferenceSession((tmp_path / "onnx" / "model.onnx").read_bytes())
    answers = session.run(None, {"ink": ink})[0]
    trained = script.load_checkpoint(checkpoint)
    images = decode_images(list(map(str, paths)), trained.statistics, 0)[0][:, None]
    dataset = script.MathSymbolDataset(Table("", pd.DataFrame(index=range(7))), trained.config, trained.classes,
                                       trained.statistics, start_runtime("cpu", "float32"), images)
    expected = script.predict((trained if vote else trained.without_knn).model, dataset)
    assert about["classes"] == trained.classes and answers.shape == expected.shape
    assert np.abs(answers - expected).max() < 2e-2  # images read in another way differ by a grey level
    same = session.run(None, {"ink": (images / 255).astype(np.float32)})[0]
    assert vote or np.abs(same - expected).max() < 1e-4
    assert len(session.run(None, {"ink": ink[:1]})[0]) == 1


@pytest.mark.slow
def test_8_bit_integers_are_nearly_as_accurate(tmp_path, capsys):
    command = Command(make_competition(tmp_path / "competition", 600), tmp_path / "out", tmp_path / "cache")
    flags = ["--model", "cnn", "--num-epochs", "6", "--image-size", "32", "--train-val-split", "0.5"]
    assert script.main(command.arguments(*QUICK, *flags)) == 0
    assert export.main([str(command.output / "best_model.pth"), "--output-dir", str(tmp_path / "onnx"), "--int8",
                        "--data-dir", str(command.data), "--cache-dir", str(command.cache)]) == 0
    _, exact, small = capsys.readouterr().out.strip().split("\n")[-3:]
    assert exact.startswith("model.onnx: 10.6 MB") and small.startswith("model.int8.onnx: 2.")
    accuracies = [float(line.split("accuracy ")[1].split("%")[0]) for line in (exact, small)]
    assert accuracies[0] > 90 and abs(accuracies[0] - accuracies[1]) < 5
    assert export.main([str(command.output / "best_model.pth"), "--int8", "--vote"]) == 2
    assert "--int8 is for the network alone" in capsys.readouterr().err


def untrained(**settings) -> script.TrainedModel:
    """A tiny network with initial weights."""
    config = script.Config(model="tiny", image_size=16, dropout=0.0, **settings)
    return script.TrainedModel(script.build_model(config, 3), config, list("abc"), ImageStatistics(255, 16),
                               {"epoch": 1}, "")


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    script.save_checkpoint(tmp_path / "model.pth", untrained())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert export.main([str(tmp_path / "model.pth"), "--output-dir", str(tmp_path / "onnx")]) == 2
    assert capsys.readouterr().err == ("error: exporting needs packages that are not installed: pip install onnx "
                                       "onnxscript\n")
    assert not list((tmp_path / "onnx").iterdir())


def test_vote_of_a_checkpoint_without_one_is_refused(tmp_path, capsys):
    script.save_checkpoint(tmp_path / "model.pth", untrained())
    assert export.main([str(tmp_path / "model.pth"), "--vote", "--output-dir", str(tmp_path / "onnx")]) == 2
    assert "model.pth has no nearest-neighbour vote; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_other_probabilities_of_the_exported_network_are_refused(monkeypatch):
    class Wrong:
        def __init__(self, *_, **__):
            pass

        def run(self, _, inputs):
            return [np.full((len(inputs["ink"]), 3), 0.5)]

    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    model = export.Exported(untrained(), vote=False).eval()
    with pytest.raises(DataError, match=r"exported network differ from PyTorch's by .*: nothing was written"):
        export.compare(model, b"", 16)


def test_metrics_of_the_vote_are_not_exported_with_the_network_alone():
    metrics = {"epoch": 3, "val_accuracy": 0.9, "val_loss": 0.1}
    alone = dataclasses.replace(untrained(), metrics=metrics)
    index = {"projection": torch.zeros(12, 64), "keys": torch.zeros(3, 64), "targets": torch.zeros(3).long()}
    voting = dataclasses.replace(alone, model=KNNClassifier(alone.model, 2, 0.2, index))
    assert export.own_metrics(voting, vote=False) == {"epoch": 3}
    assert export.own_metrics(voting, vote=True) == export.own_metrics(alone, vote=False) == metrics


@pytest.mark.slow
def test_a_network_with_edge_softening_is_exported_before_its_first_prediction():
    """Nothing that the export traces may be kept for later predictions."""
    model = export.Exported(untrained(edge_softening=0.0625), False).eval()
    content = export.to_onnx(model, 16)
    assert "differ from PyTorch's by" in export.compare(model, content, 16)
