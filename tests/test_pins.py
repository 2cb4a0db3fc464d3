"""Small runs whose weights, submission and history must not change while code moves.

The reference is the program at commit 0183c98, taken from the repository's history and run beside the present one:
both on the CPU in float32 on one thread, so that what is compared are bits.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, make_competition, make_pixel_competition

REFERENCE = "0183c98"
OLD_FLAGS = {"--accumulation-steps": "--accumulate", "--no-recenter-warp": "--no-refit",
             "--ema-decay": "--average-decay"}  # what the reference calls a flag that has another name today
SHORT = ["--num-epochs", "2", "--batch-size", "16", "--image-size", "16", "--no-pictures"]
RUNS = {
    "cnn": ["--model", "cnn", "--num-epochs", "3", "--no-pictures"],
    "resnet": ["--model", "resnet", *SHORT],
    "classic with mixup": ["--preset", "classic", "--model", "cnn", *SHORT],
    "pixel tables": ["--preset", "digits-tiny", "--num-epochs", "2", "--no-pictures"],
    "sgd with accumulation": ["--optimizer", "sgd", "--accumulation-steps", "2", "--learning-rate", "0.02", *SHORT],
    "plateau": ["--schedule", "plateau", "--model", "tiny", *SHORT, "--num-epochs", "5"],
    "every change of images": ["--crop", "0.5", "--perspective", "0.1", "--erasing", "0.5", "--brightness", "0.2",
                               "--contrast", "0.3", "--shift", "0.1", "--no-recenter-warp", "--model", "digit-cnn",
                               *SHORT],
    "folds": ["--folds", "3", "--model", "digit-cnn", *SHORT],
    "extra rows": ["--extra-csv", "extra.csv", "--extra-weight", "0.5", "--model", "digit-cnn", *SHORT],
    "torchvision": ["--model", "torchvision:resnet18", "--normalize", "standard", "--freeze-epochs", "1", *SHORT],
    "no average": ["--ema-decay", "0", "--optimizer", "adam", "--schedule", "cyclic", "--model", "mlp", *SHORT],
}


# What changed on purpose, for the reference too: split and figures are those of scikit-learn, and averaged weights are
# interpolated by torch._foreach_lerp_, whose last bits differ from those of a step of gradient descent.
ON_PURPOSE = '''
from pipeline import metrics, splits

score = metrics.score


def split_table(config, table, targets, images):
    settings = splits.SplitSettings(config.train_val_split, config.split_seed, config.folds, config.fold,
                                    config.group_column)
    usable = np.setdiff1d(np.arange(len(table)), table.bad)
    found = splits.split_rows(settings, targets, usable, images, None, table.path)
    return found.train_rows, found.val_rows, found.parts


def update(self, step, sound):
    torch._foreach_lerp_(self.averages, self.sources, 1 - min(self.decay, (1 + step) / (10 + step)))


AveragedWeights.update = update


'''


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The folder of the reference's script.py."""
    folder = tmp_path_factory.mktemp("reference")
    text = subprocess.run(["git", "show", f"{REFERENCE}:script.py"], cwd=REPOSITORY, capture_output=True, check=True)
    main = b'if __name__ == "__main__":'
    (folder / "script.py").write_bytes(text.stdout.replace(main, ON_PURPOSE.encode() + main))
    return folder


@pytest.fixture(scope="module")
def competitions(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("competitions")
    images = make_competition(folder / "images")
    pd.read_csv(images / "train.csv", dtype=str).head(20).to_csv(images / "extra.csv", index=False)
    return {"images": images, "pixels": make_pixel_competition(folder / "pixels", 100, 20, 28)}


def call(script: Path, arguments: list[str], data: Path, output: Path) -> None:
    """Run a command line to its end."""
    if script != REPOSITORY:
        arguments = [OLD_FLAGS.get(word, word) for word in arguments]
    command = [sys.executable, str(script / "script.py"), *arguments, "--data-dir", str(data), "--output-dir",
               str(output), "--cache-dir", str(output / "cache"), "--device", "cpu"]
    if arguments[0] != "predict":
        command += ["--precision", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stderr


def weights_digest(path: Path) -> str:
    """SHA-256 of a checkpoint's weights and buffers, whatever they are called."""
    total = hashlib.sha256()
    for value in torch.load(path, weights_only=True)["model"].values():
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def results(output: Path) -> dict[str, object]:
    """Return what a run is pinned by: weights, submission and history, each by its file."""
    extra_weight = torch.load(next(output.rglob("*.pth")), weights_only=True)["config"]["extra_weight"]
    found = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.name == "best_model.pth":
            found[name] = weights_digest(path)
        elif path.name == "submission.csv":
            found[name] = path.read_text()
        elif path.name == "history.csv":  # training figures of weighted rows are weighted means now
            weighted = ["train_loss", "train_accuracy"] * (extra_weight != 1)
            found[name] = pd.read_csv(path).drop(columns=["seconds", *weighted]).to_csv(index=False)
    return found


def both(reference: Path, data: Path, folder: Path, *commands: list[str]) -> tuple[dict, dict]:
    """The results of some commands, one after another, by the reference and by the present program."""
    found = []
    for name, script in (("old", reference), ("new", REPOSITORY)):
        output = folder / name
        for arguments in commands:
            call(script, [word.replace("OUT", str(output)) for word in arguments], data, output)
        found.append(results(output))
    return tuple(found)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_it_was(reference, competitions, tmp_path, name):
    old, new = both(reference, competitions["pixels" if "pixel" in name else "images"], tmp_path, RUNS[name])
    assert len(new) >= 3 and new == old


def test_an_ensemble_is_what_it_was(reference, competitions, tmp_path):
    runs = [["--model", "digit-cnn", *SHORT, "--seed", seed, "--model-file", f"{seed}.pth"] for seed in "01"]
    old, new = both(reference, competitions["images"], tmp_path, *runs, ["predict", "OUT/0.pth", "OUT/1.pth"])
    assert new["submission.csv"] == old["submission.csv"]
