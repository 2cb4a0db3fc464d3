"""A second labelled table to train on: its labels, its images, its weight, and that no row of it validates."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, QUICK, draw_shape, make_competition, make_pixel_competition
from PIL import Image, ImageOps

import script
from pipeline import files, splits, tables
from pipeline.device import start_runtime
from pipeline.errors import DataError
from pipeline.images import fit_to_square, to_ink
from pipeline.resume import compare_fingerprints
from script import Config, Trainer

CPU = start_runtime("cpu", "float32")
EXTRA = {"extra_csv": "extra.csv", "extra_root": "More"}
FLAGS = ["--extra-csv", "extra.csv", "--extra-root", "More"]


def write_extra(data, labels, name="extra.csv", folder="More"):
    """Write a table of new drawings, of a kind for each label, in a folder of their own."""
    rng = np.random.default_rng(9)
    (data / folder).mkdir(exist_ok=True)
    for place, label in enumerate(labels):
        kind = CLASSES.index(label) if label in CLASSES else 4
        image = draw_shape(kind, rng)
        image.putpixel((0, 0), 254 - place)  # which no image of train.csv has
        image.save(data / folder / f"{place}.png")
    names = [f"{place}.png" for place in range(len(labels))]
    pd.DataFrame({"image_path": names, "label": labels}).to_csv(data / name, index=False)


@pytest.fixture
def prepared(competition, tmp_path):
    """Give the resolved config and the data that prepare_data makes of the competition with some settings."""
    def prepare(**settings) -> tuple[Config, script.CompetitionData]:
        config = Config(**{"data_dir": str(competition), "cache_dir": str(tmp_path / "cache"), "model": "tiny",
                           "image_size": 16, "num_epochs": 1, "precision": "float32", **settings})
        return script.prepare_data(config, CPU)
    return prepare


def extra_trained_on(data: script.CompetitionData, own: int = 100) -> list[int]:
    """The rows of extra.csv that are trained on, counted from 0."""
    rows = data.split.train_rows
    return (rows[rows >= own] - own).tolist()


def copy_image(competition, row: int, place: int) -> None:
    """Let an extra image be a copy of a row of train.csv."""
    name = pd.read_csv(competition / "train.csv", dtype=str).image_path[row]
    with Image.open(competition / "Dataset_Image" / name) as image:
        image.save(competition / "More" / f"{place}.png")


def test_extra_rows_are_trained_on_and_never_validate(prepared, competition, capsys):
    plain = prepared()[1]
    assert plain.dataset.weights is None and not len(plain.extra_rows) and len(plain.dataset.targets) == 100
    write_extra(competition, CLASSES * 3)
    capsys.readouterr()
    config, data = prepared(**EXTRA)
    assert np.array_equal(data.split.val_rows, plain.split.val_rows) and len(data.dataset) == 115
    assert np.array_equal(data.split.train_rows, [*plain.split.train_rows, *range(100, 115)])
    assert np.array_equal(data.dataset.targets[:100], plain.dataset.targets)
    assert data.dataset.targets[100:].tolist() == [0, 1, 2, 3, 4] * 3 and data.classes == CLASSES
    assert torch.equal(data.dataset.images[:100], plain.dataset.images) and len(data.test) == 30
    grey = np.asarray(Image.open(competition / "More" / "7.png"))
    shown = fit_to_square(to_ink(grey, None, 255), data.dataset.statistics.size)
    assert np.array_equal(data.dataset.images[107, 0], shown)
    assert "15 extra rows" in capsys.readouterr().out
    assert data.dataset.weights is None and config.extra_csv == "extra.csv"


def test_the_extra_table_may_be_elsewhere_and_starts_from_root_dir(prepared, competition, tmp_path):
    write_extra(competition, CLASSES, folder="Dataset_Image")
    (competition / "extra.csv").rename(tmp_path / "moved.csv")
    data = prepared(extra_csv=str(tmp_path / "moved.csv"))[1]
    assert len(data.extra_rows) == 5 and data.dataset.images[100:].amax() > 127
    for number in range(5):
        (competition / "Dataset_Image" / f"{number}.png").rename(tmp_path / f"{number}.png")
    assert len(prepared(extra_csv=str(tmp_path / "moved.csv"), extra_root=str(tmp_path))[1].extra_rows) == 5


def test_images_of_validation_rows_do_not_leak(prepared, competition, capsys):
    val_rows = prepared()[1].split.val_rows
    write_extra(competition, CLASSES)
    trained_on = next(row for row in range(100) if row not in val_rows)
    for place, row in ((1, val_rows[0]), (3, val_rows[4]), (4, trained_on)):
        copy_image(competition, row, place)
    capsys.readouterr()
    data = prepared(**EXTRA)[1]
    assert extra_trained_on(data) == [0, 2, 4] and len(data.extra_rows) == 5
    out = capsys.readouterr().out
    assert "3 extra rows" in out and "2 left out: copies of validation images" in out


def test_extra_rows_are_trained_on_in_every_fold(prepared, competition):
    """But for a copy of a row that validates in that fold."""
    write_extra(competition, CLASSES)
    copy_image(competition, 8, 3)
    data, with_copy = prepared(**EXTRA, folds=4)[1], 0
    for fold in range(4):
        own = data.with_rows(*splits.rows_of_part(data.split.parts, fold))
        assert extra_trained_on(own) == ([0, 1, 2, 4] if 8 in own.split.val_rows else [0, 1, 2, 3, 4])
        assert sorted([*own.split.train_rows[own.split.train_rows < 100], *own.split.val_rows]) == list(range(100))
        with_copy += 8 in own.split.val_rows
    assert with_copy == 1


def test_an_extra_table_needs_no_group_column(prepared, competition):
    table = pd.read_csv(competition / "train.csv", dtype=str)
    table.assign(writer=[f"w{row // 4}" for row in range(len(table))]).to_csv(competition / "train.csv", index=False)
    write_extra(competition, CLASSES)
    data = prepared(group_column="writer", train_val_split=0.5, **EXTRA)[1]
    assert extra_trained_on(data) == [0, 1, 2, 3, 4]


def test_extra_rows_have_the_extra_weight(prepared, competition):
    write_extra(competition, CLASSES)
    dataset = prepared(**EXTRA, extra_weight=0.25)[1].dataset
    assert dataset.weights.dtype == torch.float32 and dataset.weights.tolist() == [1.0] * 100 + [0.25] * 5
    assert dataset.batch(np.array([104, 3, 100]))[2].tolist() == [0.25, 1, 0.25]


def test_the_loss_is_the_mean_of_weight_times_cross_entropy():
    logits, targets = torch.randn(6, 4), torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    weights = torch.tensor([1, 0.5, 0, 2, 1, 1])
    each = torch.stack([F.cross_entropy(row[None], target[None], label_smoothing=0.1)
                        for row, target in zip(logits, targets)])
    weighted = script.soft_cross_entropy(logits, targets * weights[:, None], 0.1)
    assert weighted.item() == pytest.approx((weights * each).mean().item())
    plain = script.soft_cross_entropy(logits, targets, 0.1)
    assert torch.allclose(plain, F.cross_entropy(logits, targets, label_smoothing=0.1))


def make_trainer(**settings) -> Trainer:
    config = Config(**{"model": "mlp", "image_size": 8, "batch_size": 8, "num_epochs": 3, "dropout": 0.0,
                       "learning_rate": 3e-3, "augment": False, "warmup": 0.0, "precision": "float32",
                       "label_smoothing": 0.0, **settings})
    return Trainer(config, script.build_model(config, 4), CPU, smallest_batch=8)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.eye(4)[torch.arange(8) % 4]


def test_rows_of_no_weight_teach_nothing():
    images, targets = make_batch()
    weights = (torch.arange(8) < 4).float()
    one, other = make_trainer(), make_trainer()
    for trainer, rest in ((one, 0), (other, 0.4)):
        changed = images.clone()
        changed[4:] += rest  # they may be anything
        sums = trainer.training_step(changed, targets * weights[:, None], progress=0.5)
        assert sums[2] == 4
    for weight, same in zip(one.model.parameters(), other.model.parameters()):
        assert torch.equal(weight, same)


def test_half_the_weight_is_half_the_loss_and_its_gradient():
    images, targets = make_batch()
    plain, half = make_trainer(max_grad_norm=0, optimizer="sgd", momentum=0), make_trainer(
        max_grad_norm=0, optimizer="sgd", momentum=0)
    before = [weight.detach().clone() for weight in plain.model.parameters()]
    sums = plain.training_step(images, targets, 0.5), half.training_step(images, targets / 2, 0.5)
    assert sums[1].tolist() == pytest.approx((sums[0] / 2).tolist())
    moved = [[weight - start for weight, start in zip(trainer.model.parameters(), before) if weight.ndim == 1]
             for trainer in (plain, half)]  # weight decay moves the others too
    assert all(torch.allclose(one / 2, other, atol=1e-7) for one, other in zip(*moved))
    assert any(one.abs().max() > 1e-5 for one in moved[0])


def test_weights_are_mixed_with_the_rows():
    """The loss is linear in the targets: mixup blends a row's weight as it blends its label."""
    images, targets = make_batch()
    weighted = targets * torch.arange(8.0)[:, None]
    mixed, blended = script.mixup_data(images, weighted, 0.4, 11)
    share = ((mixed[0] - images[7]).sum() / (images[0] - images[7]).sum()).item()
    assert 0 < share < 1 and torch.allclose(mixed, torch.lerp(images.roll(1, 0), images, share), atol=1e-5)
    assert torch.allclose(blended, torch.lerp(weighted.roll(1, 0), weighted, share), atol=1e-5)
    sums = torch.lerp(torch.arange(8.0).roll(1), torch.arange(8.0), share)
    assert torch.allclose(blended.sum(dim=1), sums, atol=1e-4)


def test_a_label_that_the_training_table_lacks_is_refused_or_allowed(prepared, competition, capsys):
    write_extra(competition, [*CLASSES, "88", "88"])
    with pytest.raises(DataError, match=r"extra.csv, row 7 \(and 1 more rows\): the training table has no label '88'; "
                                        r"remove the row, or allow new classes with --extra-classes"):
        prepared(**EXTRA)
    plain = prepared()[1]
    data = prepared(**EXTRA, extra_classes=True)[1]
    assert data.classes == ["3", "17", "40", "88", "101", "1400"]
    assert np.array_equal(data.split.val_rows, plain.split.val_rows)
    assert [data.classes[target] for target in data.dataset.targets[100:]] == [*CLASSES, "88", "88"]
    assert "100 labelled images of 5 classes, 20 to 20 per class (imbalance 1.0 to 1)" in capsys.readouterr().out


@pytest.mark.slow
def test_networks_of_extra_classes_are_evaluated(command, main_in_process):
    write_extra(command.data, [*CLASSES, "88", "88"])
    status, _, error = main_in_process(*QUICK, *FLAGS, "--extra-classes")
    assert status == 0, error
    trained = script.load_checkpoint(command.output / "best_model.pth")
    assert trained.classes == ["3", "17", "40", "88", "101", "1400"]
    status, out, error = main_in_process("evaluate", "--test-csv", "train.csv")
    assert status == 0 and "100 rows of " in out, error
    status, _, error = main_in_process("predict")
    assert status == 0 and set(command.submission().label) <= set(trained.classes), error


def empty(path):
    path.write_bytes(b"")


FAULTS = {
    "no table": (lambda data: (data / "extra.csv").unlink(), "extra.csv: no such file"),
    "no label": (lambda data: (data / "extra.csv").write_text("image_path\n0.png\n"), "extra.csv: no column 'label'"),
    "no folder": (lambda data: (data / "More").rename(data / "Moved"), "More: no such folder; name that of the images"),
    "a missing image": (lambda data: (data / "More" / "3.png").unlink(), "extra.csv, row 5: '3.png': no such file"),
    "a bad image": (lambda data: empty(data / "More" / "0.png"), "extra.csv, row 2: '0.png': the file is empty"),
    "a path that climbs": (lambda data: (data / "extra.csv").write_text("image_path,label\n../../a.png,3\n"),
                           "extra.csv, row 2: '../../a.png': its path leaves "),
    "an empty label": (lambda data: (data / "extra.csv").write_text("image_path,label\n0.png,\n1.png,3\n"),
                       "extra.csv, row 2: label is empty"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_extra_data_is_named_before_training(main_in_process, command, name):
    write_extra(command.data, CLASSES)
    fault, message = FAULTS[name]
    fault(command.data)
    status, out, error = main_in_process(*QUICK, *FLAGS)
    assert status == 1 and error.startswith("error: ") and message in error and "epoch" not in out, error
    assert not (command.output / "best_model.pth").exists()


def test_bad_extra_images_are_skipped_on_request(prepared, competition, capsys):
    write_extra(competition, CLASSES)
    empty(competition / "More" / "2.png")
    data = prepared(**EXTRA, on_bad_image="skip")[1]
    assert extra_trained_on(data) == [0, 1, 3, 4] and data.extra_rows.tolist() == [100, 101, 103, 104]
    assert "extra.csv, row 4" in capsys.readouterr().err


def test_images_on_another_background_are_warned_of(prepared, competition, capsys):
    write_extra(competition, CLASSES)
    prepared(**EXTRA)
    assert capsys.readouterr().err == ""
    for place in range(5):
        with Image.open(competition / "More" / f"{place}.png") as image:
            inverted = ImageOps.invert(image)
        inverted.save(competition / "More" / f"{place}.png")
    prepared(**EXTRA)
    error = capsys.readouterr().err
    assert "extra.csv: the training images are black on white and these are the opposite" in error
    assert "invert them" in error


def test_a_pixel_table_may_be_extra_to_images_and_to_pixels(prepared, competition, tmp_path):
    pixels = make_pixel_competition(tmp_path / "digits", train_rows=10)
    table = pd.read_csv(pixels / "train.csv", dtype=str)
    table["label"] = [CLASSES[place % 5] for place in range(10)]
    table.to_csv(tmp_path / "extra.csv", index=False)
    data = prepared(extra_csv=str(tmp_path / "extra.csv"))[1]
    assert len(data.extra_rows) == 10 and data.dataset.images.shape == (110, 1, 16, 16)
    pd.read_csv(pixels / "train.csv", dtype=str).head(4).to_csv(pixels / "extra.csv", index=False)
    config, data = prepared(data_dir=str(pixels), extra_csv="extra.csv")
    own = tables.open_table(config.extra_source, "label").pixels
    assert len(data.dataset.targets) == 14 and np.array_equal(data.dataset.images[10:, 0], own)


def test_another_extra_table_is_another_run(prepared, competition):
    write_extra(competition, CLASSES)
    runs = [prepared(), prepared(**EXTRA), prepared(**EXTRA), prepared(**EXTRA, extra_weight=0.5)]
    write_extra(competition, [*CLASSES[:4], "3"])
    runs.append(prepared(**EXTRA))
    found = [script.run_fingerprint(config, data) for config, data in runs]
    assert found[1] == found[2] and len({fingerprint["data"] for fingerprint in found}) == 4
    assert compare_fingerprints(found[0], found[1]) == "other training rows or images"
    assert compare_fingerprints(found[1], found[3]).startswith("--extra-weight 1.0 (not 0.5)")


@pytest.mark.slow
def test_an_unfinished_run_resumes_only_with_its_own_extra_rows(command, main_in_process, monkeypatch):
    write_extra(command.data, CLASSES * 4)
    extra = [*FLAGS, "--extra-weight", "0.5", "--mixup", "--checkpoint-minutes", "0"]
    finish = script.finish_epoch

    def stop(*arguments):
        finish(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(script, "finish_epoch", stop)
        assert main_in_process(*QUICK, *extra)[0] == 130
    status, _, error = main_in_process(*QUICK)
    assert status == 1 and "holds an unfinished run with " in error
    table = pd.read_csv(command.data / "extra.csv", dtype=str)
    table.assign(label=table.label[::-1].to_numpy()).to_csv(command.data / "extra.csv", index=False)
    status, _, error = main_in_process(*QUICK, *extra)
    assert status == 1 and "holds an unfinished run with other training rows or images" in error
    table.to_csv(command.data / "extra.csv", index=False)
    status, out, error = main_in_process(*QUICK, *extra)
    assert status == 0 and "resumes from last.pth: epoch " in out, error


def test_extra_rows_are_neighbors_too(command, main_in_process):
    write_extra(command.data, ["3"] * 7)
    status, out, error = main_in_process(*QUICK, *FLAGS)
    assert status == 0 and "7 extra rows" in out, error
    index = files.load_verified(command.output / "best_model.pth")["knn"]
    held = np.load(command.output / "val_probabilities.npz")["targets"]
    assert len(index["targets"]) == len(index["keys"]) == 107 - len(held)
    assert (index["targets"] == 0).sum() == 20 - (held == 0).sum() + 7 and index["targets"][-7:].tolist() == [0] * 7


@pytest.mark.slow
def test_extra_rows_have_an_effect_on_a_run(tmp_path, main_in_process, command):
    """The extra table of the true labels of shapes that train.csv labels at random raises the accuracy."""
    rng, table = np.random.default_rng(0), pd.read_csv(command.data / "train.csv", dtype=str)
    table.assign(label=rng.permutation(table.label)).to_csv(command.data / "train.csv", index=False)
    true = make_competition(tmp_path / "true", 200, 5)
    pd.read_csv(true / "train.csv", dtype=str).to_csv(command.data / "extra.csv", index=False)
    accuracies = []
    for flags in ([], ["--extra-csv", "extra.csv", "--extra-root", str(true / "Dataset_Image"), "--extra-weight", "5"]):
        status, _, error = main_in_process(*QUICK, "--num-epochs", "15", "--knn-neighbors", "0", *flags)
        assert status == 0, error
        kinds = np.array(CLASSES)[pd.read_csv(command.data / "test.csv").index % 5]
        accuracies.append((command.submission().label == kinds).mean())
    assert accuracies[1] > accuracies[0] + 0.2
