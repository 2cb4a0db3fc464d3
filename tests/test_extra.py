"""A further labelled table to train on: its labels, its images, what it weighs, and that nothing of it validates."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, QUICK, Command, draw_shape, make_competition, make_pixel_competition
from PIL import Image, ImageOps

import script
from script import Config, DataError, Learner

CPU = script.start_runtime(Config(device="cpu", precision="float32"))
TINY = [*QUICK, "--model", "tiny"]


def write_extra(data, labels, name="extra.csv", folder="More"):
    """A table of new drawings, of a kind for each label, in a folder of their own."""
    rng = np.random.default_rng(9)
    (data / folder).mkdir(exist_ok=True)
    for place, label in enumerate(labels):
        kind = CLASSES.index(label) if label in CLASSES else 4
        draw_shape(kind, rng).save(data / folder / f"{place}.png")
    names = [f"{place}.png" for place in range(len(labels))]
    pd.DataFrame({"image_path": names, "label": labels}).to_csv(data / name, index=False)


@pytest.fixture
def prepared(competition, tmp_path):
    """What prepare_data makes of the competition, with settings."""
    def prepare(**settings):
        config = Config(**{"data_dir": str(competition), "cache_dir": str(tmp_path / "cache"), "model": "tiny",
                           "image_size": 16, "num_epochs": 1, "precision": "float32", **settings})
        return script.prepare_data(config, CPU)
    return prepare


EXTRA = {"extra_csv": "extra.csv", "extra_root": "More"}


def test_extra_rows_are_trained_on_and_never_validate(prepared, competition):
    plain = prepared()[1]
    assert plain.weights is None and plain.extra == 0 and plain.own_targets is not plain.dataset
    write_extra(competition, CLASSES * 3)
    config, data, table, _ = prepared(**EXTRA)
    assert np.array_equal(data.val_rows, plain.val_rows) and len(data.targets) == 115 and data.extra == 15
    assert np.array_equal(data.train_rows, [*plain.train_rows, *range(100, 115)])
    assert np.array_equal(data.own_targets, plain.targets) and data.targets[100:].tolist() == [0, 1, 2, 3, 4] * 3
    assert torch.equal(data.dataset.images[:100], plain.dataset.images) and len(data.dataset) == 115
    shown = script.to_ink(np.asarray(Image.open(competition / "More" / "7.png")), None, data.statistics)
    assert np.array_equal(data.dataset.images[107, 0], shown) and data.classes == CLASSES
    assert script.describe_extra(config, data) == "15 extra rows of extra.csv to train on, each counts 1"
    assert len(table) == 30
    assert data.weights is None and config.extra_csv == "extra.csv"


def test_the_extra_tables_paths_may_be_absolute_and_start_from_root_dir(prepared, competition, tmp_path):
    write_extra(competition, CLASSES, folder="Dataset_Image")
    (competition / "extra.csv").rename(tmp_path / "moved.csv")
    data = prepared(extra_csv=str(tmp_path / "moved.csv"))[1]
    assert data.extra == 5 and data.dataset.images[100:].amax() > 127
    (competition / "Dataset_Image" / "0.png").rename(tmp_path / "0.png")
    for number in range(1, 5):
        (competition / "Dataset_Image" / f"{number}.png").rename(tmp_path / f"{number}.png")
    assert prepared(extra_csv=str(tmp_path / "moved.csv"), extra_root=str(tmp_path))[1].extra == 5


def test_images_of_validation_rows_do_not_leak(prepared, competition):
    val_rows = prepared()[1].val_rows
    table = pd.read_csv(competition / "train.csv", dtype=str)
    write_extra(competition, CLASSES)
    extra = pd.read_csv(competition / "extra.csv", dtype=str)
    for place, row in ((1, val_rows[0]), (3, val_rows[4]), (4, 0 if 0 not in val_rows else 1)):
        with Image.open(competition / "Dataset_Image" / table.image_path[row]) as image:
            image.save(competition / "More" / f"{place}.png")
    config, data, *_ = prepared(**EXTRA)
    assert len(extra) == 5 and data.train_rows[-3:].tolist() == [100, 102, 104] and data.extra == 5
    assert "; 2 left out: images of validation rows" in script.describe_extra(config, data)


def test_extra_rows_are_trained_on_in_every_fold(prepared, competition):
    """But for an image of a row that validates in that fold."""
    table = pd.read_csv(competition / "train.csv", dtype=str)
    write_extra(competition, CLASSES)
    with Image.open(competition / "Dataset_Image" / table.image_path[8]) as image:
        image.save(competition / "More" / "3.png")
    data = prepared(**EXTRA, folds=4)[1]
    for fold in range(4):
        own = script.fold_data(data, fold)
        expected = [100, 101, 102, 104] if 8 in own.val_rows else [100, 101, 102, 103, 104]
        assert own.train_rows[own.train_rows >= 100].tolist() == expected
        assert sorted([*own.train_rows[own.train_rows < 100], *own.val_rows]) == list(range(100))
    assert sum(8 in script.fold_data(data, fold).val_rows for fold in range(4)) == 1


def test_an_extra_table_needs_no_group_column(prepared, competition):
    table = pd.read_csv(competition / "train.csv", dtype=str)
    table.assign(writer=[f"w{row // 4}" for row in range(len(table))]).to_csv(competition / "train.csv", index=False)
    write_extra(competition, CLASSES)
    assert prepared(group_column="writer", **EXTRA)[1].extra == len(CLASSES)


def test_weights_stand_by_the_rows(prepared, competition):
    write_extra(competition, CLASSES)
    data = prepared(**EXTRA, extra_weight=0.25)[1]
    assert data.weights.dtype == torch.float32 and data.weights.tolist() == [1.0] * 100 + [0.25] * 5


def test_the_loss_is_the_mean_of_weight_times_cross_entropy():
    logits, targets = torch.randn(6, 4), torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    weights = torch.tensor([1, 0.5, 0, 2, 1, 1])
    each = torch.stack([F.cross_entropy(row[None], target[None], label_smoothing=0.1)
                        for row, target in zip(logits, targets)])
    assert script.weighted_loss(logits, targets, 0.1, weights).item() == pytest.approx((weights * each).mean().item())
    assert torch.equal(script.weighted_loss(logits, targets, 0.1, None),
                       F.cross_entropy(logits, targets, label_smoothing=0.1))


def learner_of(**settings) -> Learner:
    config = Config(**{"model": "mlp", "image_size": 8, "batch_size": 8, "num_epochs": 3, "dropout": 0.0,
                       "learning_rate": 3e-3, "augment": False, "warmup": 0.0, "precision": "float32",
                       "label_smoothing": 0.0, **settings})
    return Learner(config, script.build_model(config, 4), 4, CPU)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), dtype=np.uint8)
    return torch.from_numpy(images), torch.arange(8) % 4


def test_rows_of_no_weight_are_not_learnt():
    images, classes = batch()
    weights = (torch.arange(8) < 4).float()
    one, other = learner_of(), learner_of()
    for learner, rest in ((one, 0), (other, 90)):
        changed = images.clone()
        changed[4:] += rest  # which may then be anything
        learner.learn(script.Batch(changed, classes, weights=weights), epoch=1, progress=0.5)
    for weight, same in zip(one.model.parameters(), other.model.parameters()):
        assert torch.equal(weight, same)


def test_equal_weights_are_none():
    images, classes = batch()
    plain, weighted = learner_of(mixup=True), learner_of(mixup=True)
    totals = [plain.learn(script.Batch(images, classes), 1, 0.5),
              weighted.learn(script.Batch(images, classes, weights=torch.ones(8)), 1, 0.5)]
    assert torch.allclose(*totals) and totals[0][1] == totals[1][1]
    for weight, same in zip(plain.model.parameters(), weighted.model.parameters()):
        assert torch.allclose(weight, same, atol=1e-6)


@pytest.mark.parametrize("settings", [{"mixup": True}, {"cutmix": True}])
def test_a_blends_labels_count_what_their_own_rows_do(monkeypatch, settings):
    """The loss is linear in targets and weights together: of a blend it is the blend of the two rows' losses."""
    images, classes = batch()
    learner, weights, seen = learner_of(**settings), torch.arange(8.0), []
    monkeypatch.setattr(script, "weighted_loss", lambda logits, targets, smoothing, weights: seen.append(
        (targets, weights)) or logits.sum())
    learner.learn(script.Batch(images, classes, weights=weights), 1, 0.5)
    (targets, blended), numbers = seen[0], torch.eye(8)
    expected = script.mix(images.float(), numbers, learner.config, script.seed_of(learner.config, 1, 0))[1]
    wanted = expected @ (weights[:, None] * torch.eye(4)[classes])
    assert torch.allclose(blended[:, None] * targets, wanted) and torch.allclose(blended, wanted.sum(dim=1))
    assert not torch.equal(blended, weights)


def test_a_label_that_the_training_table_lacks_is_refused_or_allowed(prepared, competition, main_in_process, capsys):
    write_extra(competition, [*CLASSES, "88", "88"])
    with pytest.raises(DataError, match=r"extra.csv, row 7 \(and 1 more rows\): the training table has no label '88'; "
                                        r"remove the row, or allow new classes with --extra-classes"):
        prepared(**EXTRA)
    plain = prepared()[1]
    data = prepared(**EXTRA, extra_classes=True)[1]
    assert data.classes == ["3", "17", "40", "88", "101", "1400"] and np.array_equal(data.val_rows, plain.val_rows)
    assert [data.classes[target] for target in data.targets[100:]] == [*CLASSES, "88", "88"]
    assert "100 labelled images of 5 classes, 20 to 20 a class (imbalance 1.0 to 1)\n" in capsys.readouterr().out


@pytest.mark.slow
def test_networks_of_extra_classes_are_judged_on_their_own_split(command, main_in_process):
    write_extra(command.data, [*CLASSES, "88", "88"])
    status, _, error = main_in_process(*TINY, "--extra-csv", "extra.csv", "--extra-root", "More",
                                       "--extra-classes")
    assert status == 0, error
    status, out, error = main_in_process("evaluate", "--test-csv", "train.csv", "--member-weights", "validation")
    assert status == 0 and "10 validation rows with equal weights" in out, error
    members = script.look_at_members([command.output / "best_model.pth"])
    members[0].config.__dict__["extra_classes"] = False
    config = Config(data_dir=str(command.data), cache_dir=str(command.cache))
    with pytest.raises(DataError, match="not the classes that the checkpoint was trained on"):
        script.validation_question(members, config, CPU)


def spoil(data, name):
    (data / name).write_bytes(b"")


FAULTS = {
    "no table": (lambda data: (data / "extra.csv").unlink(), "extra.csv: no such file"),
    "no label": (lambda data: (data / "extra.csv").write_text("image_path\n0.png\n"), "extra.csv: no column 'label'"),
    "no folder": (lambda data: (data / "More").rename(data / "Moved"), "More: no such folder; name that of the images"),
    "a missing image": (lambda data: (data / "More" / "3.png").unlink(), "extra.csv, row 5: '3.png': no such file"),
    "a bad image": (lambda data: spoil(data / "More", "0.png"), "extra.csv, row 2: '0.png': the file is empty"),
    "a path that climbs": (lambda data: (data / "extra.csv").write_text("image_path,label\n../a.png,3\n"),
                           "extra.csv, row 2: '../a.png': its path climbs out by .."),
    "an empty label": (lambda data: (data / "extra.csv").write_text("image_path,label\n0.png,\n1.png,3\n"),
                       "extra.csv, row 2: label is empty"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_extra_data_is_named_before_training(main_in_process, command, name):
    write_extra(command.data, CLASSES)
    fault, message = FAULTS[name]
    fault(command.data)
    status, out, error = main_in_process(*TINY, "--extra-csv", "extra.csv", "--extra-root", "More")
    assert status == 1 and error.startswith("error: ") and message in error and "epoch" not in out, error
    assert not (command.output / "best_model.pth").exists()


def test_bad_extra_images_are_skipped_where_that_is_asked_for(prepared, competition, capsys):
    write_extra(competition, CLASSES)
    spoil(competition / "More", "2.png")
    data = prepared(**EXTRA, on_bad_image="skip")[1]
    assert data.train_rows[-4:].tolist() == [100, 101, 103, 104] and data.extra == 5
    assert "extra.csv, row 4" in capsys.readouterr().err


def test_images_on_another_paper_are_warned_of(prepared, competition, capsys):
    write_extra(competition, CLASSES)
    prepared(**EXTRA)
    assert capsys.readouterr().err == ""
    for place in range(5):
        with Image.open(competition / "More" / f"{place}.png") as image:
            inverted = ImageOps.invert(image)
        inverted.save(competition / "More" / f"{place}.png")
    prepared(**EXTRA)
    assert "its images have another paper than the training table's (black on white)" in capsys.readouterr().err


def test_a_pixel_table_may_be_extra_to_images_and_to_pixels(prepared, competition, tmp_path):
    pixels = make_pixel_competition(tmp_path / "digits", train_rows=10)
    table = pd.read_csv(pixels / "train.csv", dtype=str)
    table["label"] = [CLASSES[place % 5] for place in range(10)]
    table.to_csv(tmp_path / "extra.csv", index=False)
    data = prepared(extra_csv=str(tmp_path / "extra.csv"))[1]
    assert data.extra == 10 and data.dataset.images.shape == (110, 1, 16, 16)
    pd.read_csv(pixels / "train.csv", dtype=str).head(4).to_csv(pixels / "extra.csv", index=False)
    config, data, *_ = prepared(data_dir=str(pixels), extra_csv="extra.csv")
    own = script.open_table(config, "extra.csv", "label", "train").pixels
    assert len(data.targets) == 14 and np.array_equal(data.dataset.images[10:, 0], own)


def test_another_extra_table_is_another_run(prepared, competition):
    write_extra(competition, CLASSES)
    abouts = [prepared()]
    abouts += [prepared(**EXTRA), prepared(**EXTRA), prepared(**EXTRA, extra_weight=0.5)]
    write_extra(competition, [*CLASSES[:4], "3"])
    abouts.append(prepared(**EXTRA))
    abouts = [script.identify_run(config, data, CPU) for config, data, *_ in abouts]
    assert abouts[1] == abouts[2]
    assert len({about["data"] for about in abouts}) == 4
    assert script.describe_difference(abouts[0], abouts[1]) == "other training rows or images"
    assert script.describe_difference(abouts[1], abouts[3]).startswith("--extra-weight 1.0 (not 0.5)")


@pytest.mark.slow
def test_an_unfinished_run_goes_on_only_with_its_own_extra_rows(command, main_in_process, monkeypatch):
    write_extra(command.data, CLASSES * 4)
    extra = ["--extra-csv", "extra.csv", "--extra-root", "More", "--extra-weight", "0.5", "--mixup"]
    close = script.close_epoch

    def stop(*arguments):
        close(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "LEAST_SECONDS", 0)
    with monkeypatch.context() as patches:
        patches.setattr(script, "close_epoch", stop)
        assert main_in_process(*TINY, *extra)[0] == 130
    status, _, error = main_in_process(*TINY)
    assert status == 1 and "holds an unfinished run with " in error
    table = pd.read_csv(command.data / "extra.csv", dtype=str)
    table.assign(label=table.label[::-1].to_numpy()).to_csv(command.data / "extra.csv", index=False)
    status, _, error = main_in_process(*TINY, *extra)
    assert status == 1 and "holds an unfinished run with other training rows or images" in error
    table.to_csv(command.data / "extra.csv", index=False)
    status, out, error = main_in_process(*TINY, *extra)
    assert status == 0 and "goes on from last.pth: epoch 2 of 2" in out, error


def test_neighbours_remember_extra_rows(command, main_in_process):
    write_extra(command.data, ["3"] * 7)
    status, out, error = main_in_process(*TINY, "--extra-csv", "extra.csv", "--extra-root", "More")
    assert status == 0 and "7 extra rows of " in out, error
    memory = script.read_content(command.output / "best_model.pth")["memory"]
    assert len(memory["targets"]) == len(memory["keys"]) == 97
    assert (memory["targets"] == 0).sum() == 18 + 7 and memory["targets"][-7:].tolist() == [0] * 7


@pytest.mark.slow
def test_teachers_teach_extra_rows_too(tmp_path, capsys):
    data = make_competition(tmp_path / "competition")
    write_extra(data, CLASSES * 2)
    teacher = Command(data, tmp_path / "teacher", tmp_path / "cache")
    assert script.main(teacher.arguments(*TINY, "--image-size", "12", "--precision", "float32")) == 0
    path = tmp_path / "teacher" / "best_model.pth"
    config = Config(data_dir=str(data), cache_dir=str(tmp_path / "cache"), model="tiny", image_size=16,
                    num_epochs=1, precision="float32", teachers=str(path), **EXTRA)
    taught = script.prepare_data(config, CPU)[1].taught
    said = script.load_checkpoint(path).alone
    own = script.extra_settings(config)
    extra = script.prepare_rows(script.read_extra_table(config, pd.Series(CLASSES)), np.arange(10), own,
                                said.statistics, CPU)
    assert taught.shape == (110, 5)
    assert np.allclose(taught[100:], script.predict(said.model, extra, np.arange(10), said.config, CPU), atol=1e-3)
    write_extra(data, [*CLASSES, "88"])
    with pytest.raises(DataError, match=r"must know the classes of .*train.csv and .*extra.csv, each one"):
        script.prepare_data(dataclasses.replace(config, extra_classes=True), CPU)
    pupil = Command(data, tmp_path / "pupil", tmp_path / "cache")
    write_extra(data, CLASSES * 2)
    assert script.main(pupil.arguments(*TINY, "--teachers", str(path), "--extra-csv", "extra.csv", "--extra-root",
                                       "More", "--extra-weight", "0.3")) == 0, capsys.readouterr().err
