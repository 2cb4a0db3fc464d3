"""Small runs and draws whose results must not change unnoticed, within what the kernels of different machines allow.

A change on purpose changes its pin and says why in the commit. While code moved to pipeline/, an earlier form of this
test compared weights, submission and history of these runs with those of commit 0183c98, bit for bit.
"""

import hashlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_competition, make_pixel_competition

import script
from pipeline import files, optim
from pipeline.splits import assign_folds, holdout

SHORT = ["--num-epochs", "2", "--batch-size", "16", "--image-size", "16"]
RUNS = {  # flags; training loss of the first and of the last epoch, sum of the absolute weights
    "cnn": (["--model", "cnn", "--num-epochs", "3"], (1.574, 0.6636, 28158.7)),
    "resnet": (["--model", "resnet", "--learning-rate", "1e-5", "--plain-epochs", "0", *SHORT],
               (1.9654, 1.6666, 210916.0)),
    "classic with mixup": (["--preset", "classic", "--model", "cnn", *SHORT], (1.2202, 0.76273, 27578.6)),
    "pixel tables": (["--preset", "digits-tiny", "--num-epochs", "2"], (1.6221, 1.6198, 451.162)),
    "sgd with accumulation": (["--model", "cnn", "--optimizer", "sgd", "--accumulation-steps", "2",
                               "--learning-rate", "0.02", *SHORT], (1.4982, 0.83401, 27383.8)),
    "plateau": (["--schedule", "plateau", "--model", "tiny", *SHORT, "--num-epochs", "5"], (1.386, 0.50378, 712.516)),
    "every change of images": (["--crop", "0.5", "--perspective", "0.1", "--erasing", "0.5", "--brightness", "0.2",
                                "--contrast", "0.3", "--shift", "0.1", "--no-recenter-warp", "--model", "digit-cnn",
                                *SHORT], (1.2011, 0.63207, 9854.6)),
    "extra rows": (["--extra-csv", "extra.csv", "--extra-weight", "0.5", "--model", "digit-cnn", *SHORT],
                   (1.0705, 0.53544, 9911.15)),
    "torchvision": (["--model", "torchvision:resnet18", "--normalize", "standard", "--freeze-epochs", "1", *SHORT],
                    (1.5931, 1.1587, 229297.0)),
    "no average": (["--ema-decay", "0", "--optimizer", "adam", "--schedule", "cyclic", "--model", "mlp", *SHORT],
                   (1.6065, 1.5912, 2906.97)),
}
TARGETS = np.arange(1000) % 7


@pytest.fixture(scope="module")
def competitions(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("competitions")
    images = make_competition(folder / "images")
    pd.read_csv(images / "train.csv", dtype=str).head(20).to_csv(images / "extra.csv", index=False)
    return {"images": images, "pixels": make_pixel_competition(folder / "pixels", 100, 20, 28)}


def run(data, output, flags: list[str]) -> None:
    """Run a command line in float32 on one thread of the CPU."""
    arguments = ["--data-dir", str(data), "--output-dir", str(output), "--cache-dir", str(output.parent / "cache"),
                 "--device", "cpu"]
    if flags[0] != "predict":
        arguments += ["--precision", "float32", "--no-pictures"]
    assert script.main([*flags, *arguments]) == 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet")) for name in RUNS])
def test_a_run_is_what_it_was(competitions, tmp_path, name):
    flags, expected = RUNS[name]
    run(competitions["pixels" if "pixel" in name else "images"], tmp_path / "out", flags)
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    weights = files.load_verified(tmp_path / "out" / "best_model.pth")["model"].values()
    total = sum(float(value.double().abs().sum()) for value in weights)
    assert (history.train_loss.iloc[0], history.train_loss.iloc[-1], total) == pytest.approx(expected, rel=0.01)


def test_folds_and_an_ensemble_are_what_they_were(competitions, tmp_path):
    run(competitions["images"], tmp_path / "out", ["--folds", "3", "--model", "digit-cnn", *SHORT])
    figures = np.load(tmp_path / "out" / "oof_probabilities.npz")
    assert np.bincount(figures["folds"]).tolist() == [35, 33, 32]
    mean = pd.read_csv(tmp_path / "out" / "submission.csv")
    paths = [str(tmp_path / "out" / f"fold{fold}" / "best_model.pth") for fold in range(3)]
    run(competitions["images"], tmp_path / "again", ["predict", *paths])
    assert pd.read_csv(tmp_path / "again" / "submission.csv").equals(mean)


def test_a_run_stopped_and_resumed_is_the_run_that_was_never_stopped(competitions, tmp_path, monkeypatch):
    """With the same bits; `finish_epoch` raises the signal after the first epoch."""
    flags = ["--model", "digit-cnn", "--checkpoint-minutes", "0", *SHORT]
    run(competitions["images"], tmp_path / "whole", flags)
    finish = script.finish_epoch

    def stop_after_one(*arguments):
        finish(*arguments)
        raise script.Stopped(15)

    with monkeypatch.context() as patches:
        patches.setattr(script, "finish_epoch", stop_after_one)
        with pytest.raises(AssertionError):
            run(competitions["images"], tmp_path / "parts", flags)
    run(competitions["images"], tmp_path / "parts", flags)
    whole, parts = (files.load_verified(tmp_path / name / "best_model.pth") for name in ("whole", "parts"))
    assert files.sha256_of(whole["model"]) == files.sha256_of(parts["model"])
    texts = [(tmp_path / name / "submission.csv").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1]


def digest(array: np.ndarray) -> str:
    """Return the first characters of the SHA-256 of an array of whole numbers."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.int64).data).hexdigest()[:16]


def test_validation_rows_and_folds():
    assert digest(np.flatnonzero(holdout(TARGETS, 0.1, 42, np.arange(1000)))) == "e984574620195274"
    assert digest(assign_folds(TARGETS, 5, 42, np.arange(1000))) == "1d842b5fa19e1eca"


def test_order_and_seeds():
    assert digest(np.concatenate(optim.epoch_batches(np.arange(1000), TARGETS, 64, 0, 3))) == "9aa1378e62530edd"
    assert [optim.step_seed(1, 2, 3), optim.step_seed(1, 2, 3, 1)] == [6498626229777268288, 1929679308182158081]


@pytest.mark.parametrize(("model", "total"), [
    ("resnet", 207314.768), ("cnn", 27139.9503),
    ("digit-cnn", 9325.92051), ("mlp", 4677.67002), ("tiny", 432.999514)])
def test_initial_weights(model, total):
    config = script.resolve_config(script.Config(model=model), script.Runtime(), 1000)
    weights = script.build_model(config, 10).parameters()
    assert sum(float(value.detach().double().abs().sum()) for value in weights) == pytest.approx(total, rel=1e-6)


def test_augmented_images():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 1, 32, 32), dtype=np.uint8))
    config = script.Config(image_size=32, shift=0.1, crop=0.5, perspective=0.1, erasing=0.5, contrast=0.2,
                           brightness=0.2)
    ink = script.augment(images, config, 5).double()
    assert (float(ink.mean()), float(ink.std())) == pytest.approx((0.344736, 0.240091), rel=1e-4)
