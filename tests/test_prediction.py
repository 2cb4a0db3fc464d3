"""Rooms 9 and 10: probabilities, ensembles, the submission, the pictures."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import script
from script import Config, DataError, ImageStatistics, MathSymbolDataset, Trained

CPU = script.start_runtime(Config(device="cpu", precision="float32"))
CONFIG = Config(model="cnn", image_size=8, dropout=0.2)


def dataset(rows: int = 23) -> MathSymbolDataset:
    return MathSymbolDataset(np.random.default_rng(0).integers(0, 256, (rows, 1, 8, 8), dtype=np.uint8), None, CPU)


def member(seed: int, classes: list[str], **settings) -> Trained:
    config = dataclasses.replace(CONFIG, seed=seed, **settings)
    return Trained(script.build_model(config, len(classes)), config, classes, ImageStatistics(255, 8), {})


def test_probabilities_stand_where_their_rows_do():
    model, data = script.build_model(CONFIG, 5), dataset()
    whole = script.predict(model, data, np.arange(23), CONFIG, CPU)
    assert whole.shape == (23, 5) and np.allclose(whole.sum(axis=1), 1, atol=1e-5)
    rows = np.random.default_rng(1).permutation(23)
    for eval_batch_size in (1, 4, 23):
        runtime = dataclasses.replace(CPU, eval_batch_size=eval_batch_size)
        assert np.allclose(script.predict(model, data, rows, CONFIG, runtime), whole[rows], atol=1e-6)


def test_a_network_without_numbers_is_an_error():
    model = script.build_model(CONFIG, 5)
    torch.nn.init.constant_(model.head[1].weight, float("nan"))
    with pytest.raises(DataError, match="training diverged"):
        script.predict(model, dataset(), np.arange(23), CONFIG, CPU)


def test_an_ensemble_is_the_mean_of_its_members_by_class_name():
    first, second = member(0, ["1", "2", "3"]), member(1, ["3", "1", "2"], image_size=12)
    data, alone = dataset(), {}
    for trained in (first, second):
        alone[trained.config.seed] = script.ensemble_predict([trained], [data], CPU)
    both = script.ensemble_predict([first, second], [data, data], CPU)
    assert np.allclose(both, (alone[0] + alone[1][:, [1, 2, 0]]) / 2, atol=1e-6)
    with pytest.raises(DataError, match=r"different classes \(3, 4\)"):
        script.ensemble_predict([first, member(0, ["1", "2", "4"])], [data, data], CPU)


class TwoFeatures(torch.nn.Sequential):
    """The sums of an image's left and right half, and as many logits."""

    def __init__(self):
        super().__init__()
        self.halves = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((1, 2)), torch.nn.Flatten())
        self.head = torch.nn.Linear(2, 3)


def test_neighbours_vote_by_their_nearness():
    network = TwoFeatures().eval()
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    model = script.NeighbourVote(network, Config(neighbours=2, neighbour_share=0.25), torch.eye(2), keys,
                                 torch.tensor([2, 0, 1, 2]))
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:] = 1  # features 0 and 1: nearest are the second key and, at cosine 0.8, the third
    with torch.inference_mode():
        weight = float(1 / (1 + np.exp(-0.2 / model.TEMPERATURE)))
        expected = 0.75 * network(image).softmax(dim=1) + 0.25 * torch.tensor([[weight, 1 - weight, 0.0]])
        assert torch.allclose(model(image).softmax(dim=1), expected, atol=1e-6)
        many = script.NeighbourVote(network, Config(neighbours=99), torch.eye(2), keys, torch.tensor([2, 0, 1, 2]))
        assert torch.allclose(many(image).exp().sum(), torch.tensor(1.0))


def test_neighbours_are_told_apart_in_bf16_too():
    """Keys whose cosines bf16 rounds to one number."""
    angles = torch.linspace(0, 0.5, 200)
    keys = torch.stack([angles.sin(), angles.cos()], dim=1)[torch.randperm(200, generator=torch.manual_seed(0))]
    nearest = keys[:, 1].argmax()
    model = script.NeighbourVote(TwoFeatures().eval(), Config(neighbours=1, neighbour_share=0.99), torch.eye(2), keys,
                                 (torch.arange(200) == nearest).long())
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4:] = 1
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(image).argmax() == 1


@pytest.mark.parametrize("model", ["resnet", "cnn", "digit-cnn", "mlp"])  # tiny has too few features
def test_a_network_remembers_its_training_images_and_so_does_its_checkpoint(tmp_path, model):
    """Weights at random, memory as taught: with nearly the whole vote the training images get their own labels."""
    config = Config(model=model, image_size=8, dropout=0.2, neighbours=1, neighbour_share=0.99)
    targets, rows = np.arange(23) % 5, np.arange(23)
    images = np.random.default_rng(0).integers(0, 256, (23, 1, 8, 8), dtype=np.uint8)
    data = script.TrainingData(MathSymbolDataset(images, targets, CPU), targets, list("abcde"), ImageStatistics(255, 8),
                               rows[:15], rows[15:])
    alone = Trained(script.build_model(config, 5), config, data.classes, data.statistics, {})
    taught = dataclasses.replace(alone, model=script.remember(alone, data, CPU))
    probabilities = script.ensemble_predict([taught], [data.dataset], CPU)
    assert (probabilities[:15].argmax(axis=1) == targets[:15]).all() and np.allclose(probabilities.sum(axis=1), 1)
    script.save_checkpoint(tmp_path / "a.pth", taught)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content["model"].keys() == alone.model.state_dict().keys()
    loaded = script.load_checkpoint(tmp_path / "a.pth")
    assert np.array_equal(script.ensemble_predict([loaded], [data.dataset], CPU), probabilities)


def test_a_few_images_can_be_remembered():
    """Their many features are of low rank, on which float32 eigenvectors do not always converge."""
    rng = np.random.default_rng(0)
    for seed in range(12):
        images, targets = rng.integers(0, 256, (90, 1, 8, 8), dtype=np.uint8), np.arange(90) % 5
        data = script.TrainingData(MathSymbolDataset(images, targets, CPU), targets, list("abcde"),
                                   ImageStatistics(255, 8), np.arange(90), np.arange(0))
        memory = script.remember(member(seed, list("abcde"), neighbours=30), data, CPU)
        assert memory.keys.shape == (90, 64) and torch.isfinite(memory.projection).all()


def ids_table(ids):
    return script.Table("test.csv", pd.DataFrame({"example_id": ids}))


def test_the_submission_keeps_ids_order_and_text(tmp_path):
    ids, labels = ["10", "a,b", "007", "NA", "ü"], ["\\frac{a}{b}", "007", "NA", 'quote"d', "x,y"]
    order = np.random.default_rng(0).permutation(5)
    classes = [labels[place] for place in order]
    script.write_submission(tmp_path / "submission.csv", ids_table(ids), np.eye(5)[np.argsort(order)], classes)
    written = pd.read_csv(tmp_path / "submission.csv", dtype=str, na_filter=False)
    assert written.columns.tolist() == ["example_id", "label"]
    assert written.example_id.tolist() == ids and written.label.tolist() == labels


def test_a_submission_that_does_not_read_back_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda self, name, **_: name.write_text("example_id,label\n1,2\n"))
    with pytest.raises(DataError, match="does not read back"):
        script.write_submission(path, ids_table(["1", "3"]), np.eye(2), ["2", "4"])
    assert path.read_text() == "old"
