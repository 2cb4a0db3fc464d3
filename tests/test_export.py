"""ONNX: another runtime gives the answers that PyTorch gives, from what model.json says."""

import json

import numpy as np
import pytest
import torch
from conftest import QUICK, Command, make_competition
from PIL import Image

import script
from tools import export


@pytest.mark.slow
@pytest.mark.parametrize("flags, vote", [(["--model", "cnn", "--num-epochs", "8"], True), (["--model", "cnn"], False),
                                         (["--model", "resnet", "--image-size", "24"], False),
                                         (["--model", "mlp", "--normalize", "standard"], False)])
def test_another_runtime_answers_alike(tmp_path, capsys, flags, vote):
    import onnxruntime

    command = Command(make_competition(tmp_path / "competition", 200), tmp_path / "out", tmp_path / "cache")
    assert script.main(command.arguments(*QUICK, *flags)) == 0
    checkpoint = command.output / "best_model.pth"
    assert export.main([str(checkpoint), "--output-dir", str(tmp_path / "onnx"), *["--vote"][: vote]]) == 0
    assert "its answers differ from PyTorch's by " in capsys.readouterr().out
    about = json.loads((tmp_path / "onnx" / "model.json").read_text())
    paths = sorted((command.data / "Dataset_Image" / "data").iterdir())[:7]
    grey = np.stack([np.asarray(Image.open(path).convert("L").resize((about["size"],) * 2, Image.BILINEAR), dtype=float)
                     for path in paths])
    ink = (np.abs(grey - about["image_statistics"]["paper"]) / 255).astype(np.float32)[:, None]
    session = onnxruntime.InferenceSession((tmp_path / "onnx" / "model.onnx").read_bytes())
    answers = session.run(None, {"ink": ink})[0]
    trained = script.load_checkpoint(checkpoint)
    runtime = script.start_runtime(script.Config(device="cpu", precision="float32"))
    images = script.decode_images(list(map(str, paths)), trained.statistics, 0)[0][:, None]
    network = (trained if vote else trained.alone).model
    expected = script.predict(network, script.MathSymbolDataset(images, None, runtime), np.arange(7), trained.config,
                              runtime)
    assert about["classes"] == trained.classes and answers.shape == expected.shape
    assert np.abs(answers - expected).max() < 2e-2  # the images, read by other hands, differ by a grey level
    same = session.run(None, {"ink": (images / 255).astype(np.float32)})[0]
    assert vote or np.abs(same - expected).max() < 1e-4
    assert len(session.run(None, {"ink": ink[:1]})[0]) == 1


@pytest.mark.slow
def test_integers_answer_nearly_alike(tmp_path, capsys):
    command = Command(make_competition(tmp_path / "competition", 600), tmp_path / "out", tmp_path / "cache")
    flags = ["--model", "cnn", "--num-epochs", "6", "--image-size", "32", "--train-val-split", "0.5"]
    assert script.main(command.arguments(*QUICK, *flags)) == 0
    assert export.main([str(command.output / "best_model.pth"), "--output-dir", str(tmp_path / "onnx"), "--int8",
                        "--data-dir", str(command.data), "--cache-dir", str(command.cache)]) == 0
    _, exact, small = capsys.readouterr().out.strip().split("\n")[-3:]
    assert exact.startswith("model.onnx: 10.7 MB") and small.startswith("model.int8.onnx: 2.")
    accuracies = [float(line.split("accuracy ")[1].split("%")[0]) for line in (exact, small)]
    assert accuracies[0] > 90 and abs(accuracies[0] - accuracies[1]) < 5
    assert export.main([str(command.output / "best_model.pth"), "--int8", "--vote"]) == 2
    assert "--int8 is for the network alone" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    config = script.Config(model="tiny", image_size=16, dropout=0.0)
    script.save_checkpoint(tmp_path / "model.pth", script.Trained(
        script.build_model(config, 3), config, list("abc"), script.ImageStatistics(255, 16), {"epoch": 1}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert export.main([str(tmp_path / "model.pth"), "--output-dir", str(tmp_path / "onnx")]) == 2
    assert capsys.readouterr().err == ("error: exporting needs packages that are not installed: pip install onnx "
                                       "onnxscript\n")
    assert not list((tmp_path / "onnx").iterdir())


def test_a_vote_that_is_not_in_the_checkpoint_is_refused(tmp_path, capsys):
    config = script.Config(model="tiny", image_size=16, dropout=0.0)
    script.save_checkpoint(tmp_path / "model.pth", script.Trained(
        script.build_model(config, 3), config, list("abc"), script.ImageStatistics(255, 16), {"epoch": 1}))
    assert export.main([str(tmp_path / "model.pth"), "--vote", "--output-dir", str(tmp_path / "onnx")]) == 2
    assert "model.pth remembers no training images; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_a_network_that_answers_otherwise_is_refused(monkeypatch):
    class Liar:
        def __init__(self, *_, **__):
            pass

        def run(self, _, inputs):
            return [np.full((len(inputs["ink"]), 3), 0.5)]

    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", Liar)
    config = script.Config(model="tiny", image_size=16, dropout=0.0)
    model = export.Exported(script.Trained(script.build_model(config, 3), config, list("abc"),
                                           script.ImageStatistics(255, 16), {}), vote=False).eval()
    with pytest.raises(script.DataError, match=r"exported network differ from PyTorch's by .*: nothing was written"):
        export.compare(model, b"", 16)


def test_figures_of_the_vote_are_not_the_networks():
    config = script.Config(model="tiny", image_size=16, dropout=0.0, neighbours=2)
    network = script.build_model(config, 2)
    vote = script.NeighbourVote(network, config, torch.zeros(12, 64), torch.zeros(3, 64), torch.zeros(3).long())
    metrics = {"epoch": 3, "val_accuracy": 0.9, "val_loss": 0.1}
    voting, alone = (script.Trained(model, config, ["a", "b"], script.ImageStatistics(255, 16), metrics)
                     for model in (vote, network))
    assert export.own_metrics(voting, vote=False) == {"epoch": 3}
    assert export.own_metrics(voting, vote=True) == export.own_metrics(alone, vote=False) == metrics


def test_a_network_that_sees_softened_images_is_exported_before_it_answers_anything():
    """What the first use of it keeps for later must not be the tracer's."""
    config = script.Config(model="tiny", image_size=16, dropout=0.0, soften=0.0625)
    trained = script.Trained(script.build_model(config, 3), config, list("abc"), script.ImageStatistics(255, 16), {})
    model = export.Exported(trained, False).eval()
    content = export.to_onnx(model, 16)
    assert "differ from PyTorch's by" in export.compare(model, content, 16)
