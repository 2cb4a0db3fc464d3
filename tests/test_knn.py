"""The nearest-neighbour vote beside a network: its weights, its index, and the checkpoint that holds it."""


import numpy as np
import pandas as pd
import pytest
import torch

import script
from pipeline import knn, splits
from pipeline.device import start_runtime
from pipeline.errors import DataError
from pipeline.images import ImageStatistics
from pipeline.knn import KNNClassifier
from pipeline.tables import Table
from script import CompetitionData, Config, MathSymbolDataset, TrainedModel

CPU = start_runtime("cpu", "float32")


class TwoFeatures(torch.nn.Sequential):
    """The means of an image's left and right half, and three logits."""

    def __init__(self):
        super().__init__()
        self.halves = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((1, 2)), torch.nn.Flatten())
        self.head = torch.nn.Linear(2, 3)


def make_index(keys: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"projection": torch.eye(2), "keys": keys, "targets": targets}


def right_half() -> torch.Tensor:
    """An image with the features 0 and 1."""
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:] = 1
    return image


def test_neighbors_vote_by_their_similarity():
    network, image = TwoFeatures().eval(), right_half()
    index = make_index(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]), torch.tensor([2, 0, 1, 2]))
    model = KNNClassifier(network, neighbors=2, weight=0.25, index=index)
    with torch.inference_mode():  # nearest are the second key and, at cosine 0.8, the third
        weight = float(1 / (1 + np.exp(-0.2 / knn.TEMPERATURE)))
        expected = 0.75 * network(image).softmax(dim=1) + 0.25 * torch.tensor([[weight, 1 - weight, 0.0]])
        assert torch.allclose(model(image).softmax(dim=1), expected, atol=1e-6)
        assert torch.allclose(KNNClassifier(network, 2, 0.0, index)(image).exp(), network(image).softmax(dim=1))
        many = KNNClassifier(network, 99, 0.2, index)
        assert many.neighbors == 4 and torch.allclose(many(image).exp().sum(), torch.tensor(1.0))


def test_neighbors_are_told_apart_in_bf16_too():
    """Keys whose cosines bf16 rounds to one number."""
    angles = torch.linspace(0, 0.5, 200)
    keys = torch.stack([angles.sin(), angles.cos()], dim=1)[torch.randperm(200, generator=torch.manual_seed(0))]
    nearest = keys[:, 1].argmax()
    model = KNNClassifier(TwoFeatures().eval(), 1, 0.99, make_index(keys, (torch.arange(200) == nearest).long()))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(right_half()).argmax() == 1


def make_data(config: Config, rows: int, train_rows: np.ndarray, val_rows: np.ndarray) -> CompetitionData:
    images = np.random.default_rng(0).integers(0, 256, (rows, 1, 8, 8), dtype=np.uint8)
    table = Table("train.csv", pd.DataFrame({"label": np.array(list("abcde"))[np.arange(rows) % 5]}))
    dataset = MathSymbolDataset(table, config, list("abcde"), ImageStatistics(255, 8), CPU, images)
    return CompetitionData(dataset, dataset, splits.Split(train_rows, val_rows), {}, np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize("model", ["resnet", "cnn", "digit-cnn", "mlp"])  # tiny has too few features
def test_the_index_knows_the_training_images_and_is_saved_with_the_checkpoint(tmp_path, model):
    """Of a network with random weights, nearly the whole vote gives each training image its own label."""
    config = Config(model=model, image_size=8, dropout=0.2, knn_neighbors=1, knn_weight=0.99, output_dir=str(tmp_path))
    data = make_data(config, 23, np.arange(15), np.arange(15, 23))
    alone = TrainedModel(script.build_model(config, 5), config, data.classes, data.dataset.statistics, {"epoch": 1}, "")
    script.save_checkpoint(tmp_path / "best_model.pth", alone)
    best, predictions = script.finish_network(config, data, votes=True)
    probabilities = script.ensemble_predict([best], data.dataset)
    assert (probabilities[:15].argmax(axis=1) == data.dataset.targets[:15]).all()
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(predictions.probabilities, probabilities[15:], atol=1e-6)
    assert predictions.rows.tolist() == list(range(15, 23))
    assert best.metrics["val_accuracy"] == (probabilities[15:].argmax(axis=1) == data.dataset.targets[15:]).mean()
    content = torch.load(tmp_path / "best_model.pth", weights_only=True)
    assert content["model"].keys() == alone.model.state_dict().keys() and len(content["knn"]["keys"]) == 15
    loaded = script.load_checkpoint(tmp_path / "best_model.pth")
    assert np.array_equal(script.ensemble_predict([loaded], data.dataset), probabilities)
    network = script.predict(loaded.without_knn.model, data.dataset)
    assert np.allclose(network, script.predict(alone.model, data.dataset), atol=1e-6)


def test_without_the_vote_there_is_no_index(tmp_path):
    config = Config(model="tiny", image_size=8, dropout=0.0, knn_neighbors=0, output_dir=str(tmp_path))
    data = make_data(config, 23, np.arange(15), np.arange(15, 23))
    alone = TrainedModel(script.build_model(config, 5), config, data.classes, data.dataset.statistics, {"epoch": 1}, "")
    script.save_checkpoint(tmp_path / "best_model.pth", alone)
    best, predictions = script.finish_network(config, data, votes=False)
    assert not isinstance(best.model, KNNClassifier) and len(predictions.rows) == 8
    assert torch.load(tmp_path / "best_model.pth", weights_only=True)["knn"] == {}


def test_an_index_is_built_of_few_images():
    """Their many features are of low rank, on which float32 eigenvectors do not always converge."""
    images = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for seed in range(12):
        config = Config(model="cnn", image_size=8, dropout=0.2, seed=seed)
        body, _ = knn.split_head(script.build_model(config, 5).eval())
        with torch.inference_mode():
            index = knn.build_knn_index(body(images), torch.arange(90) % 5)
        assert index["keys"].shape == (90, knn.COMPONENTS) and index["projection"].isfinite().all()
        assert torch.allclose(index["keys"].float().norm(dim=1), torch.ones(90), atol=0.02)


def test_features_that_are_too_large_are_an_error_with_a_remedy():
    with pytest.raises(DataError, match=r"training diverged; lower --learning-rate, or .* --knn-neighbors 0$"):
        knn.build_knn_index(torch.full((4, 3), 1e30), torch.arange(4))


def test_an_empty_index_has_the_shape_of_a_real_one():
    model = script.build_model(Config(model="cnn", image_size=8, dropout=0.2), 5).eval()
    body, head = knn.split_head(model)
    assert head is model.head
    with torch.inference_mode():
        features = body(torch.rand(9, 1, 8, 8))
        real, empty = knn.build_knn_index(features, torch.arange(9) % 5), knn.empty_knn_index(model, 9)
        assert {name: (value.shape, value.dtype) for name, value in real.items()} == {
            name: (value.shape, value.dtype) for name, value in empty.items()}
        assert KNNClassifier(model, 5, 0.2, empty)(torch.rand(2, 1, 8, 8)).shape == (2, 5)
