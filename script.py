#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=1.26", "pandas>=2.2", "scikit-learn>=1.4", "scipy>=1.11",
#                 "pillow>=10.3", "matplotlib>=3.8", "tqdm>=4.66"]
# ///
"""Train a classifier of small grey images from a competition folder and write its submission.

    python script.py                                         train, validate, predict, write the submission
    python script.py --data-dir competition --output-dir out --max-minutes 20
    python script.py --folds 5                               cross-validation; the submission of the five networks' mean
    torchrun --nproc-per-node=4 script.py                    the same commands on several GPUs or machines
    python script.py predict out/best_model.pth              the submission of a checkpoint, or of the mean of several
    python script.py evaluate out/best_model.pth --test-csv labelled.csv

Reads   train.csv (image_path, label), test.csv (example_id, image_path) and the images below Dataset_Image/;
        or other columns, tables of pixels, folders of images, .npz, IDX and .parquet files, torchvision:MNIST.
Writes  best_model.pth, submission.csv, history.csv, class_accuracy.csv, val_probabilities.npz, run.json and pictures;
        with --folds all of it for each fold, in fold0, fold1, ..., and oof_probabilities.npz of all rows.
`python script.py --help` lists every setting.

This file reads from top to bottom; nothing is used before it is defined. To change
    a setting, its default or its flag       Config, below
    what the network sees                    MathSymbolDataset, augment; pipeline/transforms.py
    a network                                ResNetMathSymbol, MathSymbolCNN; pipeline/models.py
    a training step, an epoch, a training    Trainer, train, fit; pipeline/optim.py
    which rows validate                      pipeline/splits.py
    what a table may be                      pipeline/tables.py, pipeline/images.py
    what is drawn                            pipeline/plots.py
    a command                                run, predict_command, evaluate_command
"""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import re
import sys
import time
import timeit
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import device, ensemble, files, folds, metrics, models, optim, outputs, plots, sources, splits, tables
from pipeline.cli import check_fields, parse, pick
from pipeline.clock import VOTE_SHARE, TimeLimit, TrainingClock, time_limit
from pipeline.device import Runtime, memory_remedy, start_runtime
from pipeline.distributed import distributed_data_parallel
from pipeline.ensemble import EnsembleMember
from pipeline.errors import DataError, UsageError, first_line, launch_rank, warn
from pipeline.images import ImageStatistics, LoadSettings, estimate_image_statistics, load_images
from pipeline.knn import KNNClassifier, build_knn_index, empty_knn_index, split_head
from pipeline.metrics import MetricAccumulator, Predictions, score
from pipeline.models import AveragePool, DigitCNN, DigitMLP, ResidualBlock, SqueezeExcitation, TinyCNN, conv_bn
from pipeline.optim import BatchNormStatistics, Schedule, SkippedSteps, WeightAverage
from pipeline.outputs import EVALUATION_FILES, RESERVED_FILES, TEST_PROBABILITIES, TRAINING_FILES, VALIDATION_FILES
from pipeline.pixel_tables import PIXEL
from pipeline.presets import LIMITS, MOST_USED, PRESETS, RECIPES
from pipeline.resume import CheckpointManager, TrainingState, compare_fingerprints, stored_precision
from pipeline.shift import expected_accuracy, mean_over_folds, report_expected
from pipeline.signals import Stopped, StopSignals, end_process, exit_status
from pipeline.sources import Table, TableSource
from pipeline.splits import Split, SplitSettings
from pipeline.submission import submission_form
from pipeline.transforms import BatchRandom, WarpRanges, change_ink, erase, resize, soften_edges, warp

# ---- Config: every number that a user tunes -------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """All settings of a run. None ("auto") is the value of the model's recipe. Raises ValueError for a wrong value."""

    # Files
    data_dir: str = "."                 # folder of the tables and of root_dir
    train_csv: str = "train.csv"        # training table: .csv, .npz, IDX or .parquet, folder, or torchvision:MNIST
    test_csv: str = "test.csv"          # test table (evaluate: with labels), or none: then no submission is written
    root_dir: str = "Dataset_Image"     # folder that the tables' image paths start from
    test_root: str = ""                 # folder that the test table's image paths start from (empty: root_dir)
    image_column: str = ""              # column of the image paths (empty: image_path, or another usual name)
    label_column: str = ""              # column of the labels (empty: label, or another usual name)
    id_column: str = ""                 # column of the test table's ids (empty: as in the sample submission, or id)
    label_pattern: str = ""             # of folders: regular expression; its group is the label in an image's path
    pixel_shape: str = ""               # of tables of pixels: HEIGHTxWIDTH (empty: square)
    transpose: bool = False             # of tables of pixels: the images lie on their side, as those of EMNIST
    extra_csv: str = ""                 # another labelled table, which is trained on too and never validates
    extra_root: str = ""                # folder that its image paths start from (empty: root_dir)
    extra_weight: float = 1.0           # weight of its rows in the loss, where a row of train_csv has 1
    extra_classes: bool = False         # allow labels in it that train_csv does not have
    output_dir: str = "."               # folder for everything that is written
    on_bad_image: Literal["error", "skip"] = "error"  # skip: train without it, predict the most frequent class for it
    cache_dir: str = ""                 # folder of decoded and downloaded images (empty: in the user's cache folder)
    model_file: str = "best_model.pth"  # checkpoint of the best epoch, in output_dir
    submission_file: str = "submission.csv"  # the submission, in output_dir
    save_probabilities: bool = False    # run, predict: also write test_probabilities.npz, which predict can average
    pictures: bool = True               # draw samples, curves, confusions, accuracy by class and predictions
    resume: bool = True                 # resume the unfinished run that last.pth in output_dir holds
    checkpoint_minutes: float = 10.0    # minutes between two saves of last.pth (and at the end of longer epochs)

    # Model
    model: str = "auto"                 # resnet, cnn, digit-cnn, mlp, tiny, torchvision:NAME, or auto: resnet or cnn
    weights: str = ""                   # initial weights: a checkpoint, torchvision (pretrained), or a file of weights
    freeze_epochs: int = 0              # epochs in which only the last layer is trained
    normalize: Literal["none", "standard", "min-max"] = "none"  # by all pixels' mean and deviation, or each's range
    image_size: int | None = None       # side of the network's input in pixels
    dropout: float | None = None        # dropout before the last layer (less in the stages of cnn)
    knn_neighbors: int = 30             # images in the nearest-neighbour vote (0: none; left out where time is short)
    knn_weight: float = 0.2             # weight of that vote; the network has the rest

    # Training
    batch_size: int | None = None       # images per step
    learning_rate: float | None = None  # peak of the schedule
    num_epochs: int | None = None       # passes over the training rows (auto with max_minutes: up to four times more)
    min_steps: int = 600                # least steps if num_epochs is auto; fewer once training accuracy stops rising
    max_minutes: float = 0.0            # time limit of the whole run, if num_epochs does not end it first (0: none)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"  # optimizer of torch
    momentum: float = 0.9               # Nesterov momentum of sgd
    weight_decay: float = 0.01          # decay of weight matrices and kernels (not of biases and batch norm)
    accumulation_steps: int = 1         # batches whose gradients are averaged for one optimizer step
    schedule: Literal["cosine", "cyclic", "step", "multistep", "plateau", "constant"] = "cosine"  # learning rate
    warmup: float = 0.2                 # share of training with a rising rate (not for cyclic and plateau)
    step_epochs: int = 5                # step: epochs between drops; cyclic: epochs from the lowest to the highest rate
    milestones: str = "10,15"           # multistep: epochs after which the rate drops
    gamma: float = 0.1                  # step, multistep: factor of each drop; cyclic: lowest share of the rate
    label_smoothing: float = 0.1        # share of the target that is spread over all classes
    mixup: bool = False                 # blend pairs of images and their labels (arXiv:1710.09412)
    mixup_alpha: float = 0.4            # both parameters of mixup's Beta distribution
    max_grad_norm: float = 1.0          # gradients are clipped to this norm (0: no clipping)
    ema_decay: float = 0.999            # decay of the exponential moving average of the weights (0: no average)
    train_val_split: float = 0.9        # share of the labelled rows to train on (1: all, and keep the last epoch)
    folds: int = 0                      # networks of a cross-validation, each with other validation rows (0: none)
    fold: int | None = None             # train only this fold, counted from 0 (auto: all)
    group_column: str = ""              # column of train_csv: rows of equal value stay on one side of the split
    select_by: Literal["accuracy", "loss"] = "accuracy"  # validation metric that chooses the epoch to keep
    early_stopping: int = 0             # epochs without improvement after which training ends (0: never)
    seed: int = 0                       # of initial weights and every random draw of training
    split_seed: int = 42                # of the validation rows, and of nothing else

    # Augmentation: each image draws uniformly from its own range
    augment: bool = True                # augment the training images
    plain_epochs: float | None = None   # epochs at the end of training whose images are not augmented
    rotation: float = 10.0              # degrees to either side
    scale: float = 0.03                 # share by which an image grows or shrinks
    shear: float = 0.2                  # horizontal shear, before the stretch
    stretch: float = 0.15               # width against height: from e^-0.15 to e^0.15 times
    shift: float = 0.0                  # share of the side
    crop: float = 0.0                   # probability that a part of the image is cut out and scaled up
    crop_size: float = 0.8              # smallest side of that part, as a share of the image's
    perspective: float = 0.0            # strength of the perspective
    elastic: float = 0.05               # deviation of a 5x5 grid of displacements, as a share of half the side
    recenter_warp: bool = True          # warps keep the centre and longer side of the ink's bounding box
    brightness: float = 0.0             # largest share by which ink is made fainter
    contrast: float = 0.0               # bend of the grey levels between background and full ink
    erasing: float = 0.0                # probability that a rectangle is erased (arXiv:1708.04896)
    edge_softening: float = 0.1         # of images that are not warped: share of ink that each neighbour gets

    # Prediction
    tta: int = 1                        # predict, evaluate: views of an image that are averaged, the first unchanged

    # Machine
    eval_batch_size: int | None = None  # images per step of validation and prediction (auto: 128, on a GPU 1024)
    device: str = "auto"                # cpu, cuda, cuda:1, mps, or auto: the fastest that works
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"  # of the network's arithmetic (AMP)
    compile: bool = False               # torch.compile the network: takes a minute, pays in long runs on a GPU
    num_workers: int = -1               # processes that decode images (-1: one per core, 0: this process)
    pin_memory: bool = True             # pin batches of images that do not fit in the GPU's memory

    def __post_init__(self) -> None:
        check_fields(self, LIMITS)
        models.check_model_name(self.model, ["auto", *(name for name in RECIPES if name != "torchvision")])
        self.split.check()
        outputs.check_file_names(model_file=self.model_file, submission_file=self.submission_file)
        for wrong, message in (
            (not re.fullmatch(r"[0-9]+(, *[0-9]+)*", self.milestones),
             f"milestones must be epochs with commas between them, not {self.milestones!r}"),
            (self.train_val_split == 1 and (self.schedule == "plateau" or self.early_stopping),
             "schedule plateau and early_stopping need validation rows: set train_val_split below 1 or leave them out"),
            (self.group_column and re.fullmatch(rf"label|{PIXEL}|{re.escape(self.label_column)}", self.group_column),
             f"group_column must be a column of its own, not {self.group_column!r}"),
            (self.pixel_shape and not sources.parse_shape(self.pixel_shape),
             f"pixel_shape must be HEIGHTxWIDTH, such as 16x64, not {self.pixel_shape!r}"),
            (not sources.is_label_pattern(self.label_pattern),
             f"label_pattern must be a regular expression with a group in (), not {self.label_pattern!r}"),
        ):
            if wrong:
                raise ValueError(message)

    @property
    def split(self) -> SplitSettings:
        """The settings that decide which rows validate."""
        return pick(SplitSettings, self)

    @property
    def train_source(self) -> TableSource:
        """The name and folders of the training table."""
        return self._source(self.train_csv, self.root_dir, "train", group_column=self.group_column)

    @property
    def extra_source(self) -> TableSource:
        """The name and folders of the extra table."""
        return self._source(self.extra_csv, self.extra_root or self.root_dir, "extra")

    @property
    def test_source(self) -> TableSource | None:
        """The name and folders of the test table: test_csv, or the test part of torchvision's data; None of none."""
        torchvision = self.train_csv.startswith("torchvision:") and self.test_csv == Config.test_csv
        name = self.train_csv if torchvision else self.test_csv
        return None if name == "none" else self._source(name, self.test_root or self.root_dir, "test")

    def _source(self, name: str, root: str, part: str, **more: str) -> TableSource:
        how = {field: getattr(self, field) for field in sources.HOW_TO_READ}
        return TableSource(name, self.data_dir, root, part, **how, **more)

    @property
    def inputs(self) -> list[Path]:
        """The files that a run reads and must not overwrite."""
        read = [source for source in (self.train_source, self.test_source, self.extra_source) if source and source.name]
        return [*(path for source in read for path in source.files), *[Path(self.weights)] * bool(self.weights)]

    @property
    def written_files(self) -> set[str]:
        """The names of all files that a run may write or remove in output_dir."""
        return {self.model_file, self.submission_file, *RESERVED_FILES}


# Settings that predict and evaluate take from the command line; all others are those of the checkpoint.
PREDICT_SETTINGS = {"data_dir", "train_csv", "test_csv", "root_dir", "test_root", "image_column", "label_column",
                    "id_column", "label_pattern", "on_bad_image", "output_dir", "cache_dir", "model_file",
                    "submission_file", "pictures", "eval_batch_size", "device", "precision", "num_workers",
                    "pin_memory", "save_probabilities", "tta"}

# Settings that may change when a run is resumed: they say where and how, not what.
RESUME_SETTINGS = PREDICT_SETTINGS - {"model_file", "eval_batch_size", "precision"} | {
    "resume", "checkpoint_minutes", "max_minutes", "extra_csv", "extra_root"}


def why_unused(command: str, name: str) -> str:
    """Return why a setting has no effect on a command; "" if it has one."""
    if command == "run":
        return "it is for predict and evaluate" if name == "tta" else ""
    if name not in PREDICT_SETTINGS:
        return "the checkpoint holds it"
    submits = command == "predict" or name not in ("submission_file", "save_probabilities")
    return "" if submits else "it writes no submission"


def resolve_config(config: Config, runtime: Runtime, training_rows: int) -> Config:
    """Return the config with model and precision named, and None replaced by the values of the model's recipe."""
    model = config.model
    if model == "auto":
        model = "cnn" if runtime.device.type == "cpu" else "resnet"
    recipe = {"plain_epochs": 0.0} | RECIPES[model.split(":")[0]]
    chosen = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    steps = math.ceil(training_rows / (config.batch_size or recipe["batch_size"]) / config.accumulation_steps)
    small = "num_epochs" in chosen and recipe["num_epochs"] * steps < config.min_steps
    if "num_epochs" in chosen:
        least = recipe["num_epochs"] * (4 if config.max_minutes else 1)  # the time ends it
        chosen["num_epochs"] = max(least, math.ceil(config.min_steps / steps))
    return dataclasses.replace(config, model=model, precision=runtime.precision,
                               eval_batch_size=runtime.eval_batch_size, min_steps=config.min_steps * small, **chosen)


# ---- The dataset and its augmentation -------------------------------------------------------------------------------

def augment(images: Tensor, config: Config, seed: int) -> Tensor:
    """Return augmented ink 0..1 [B, 1, image_size, image_size] of uint8 images [B, 1, S, S].

    Every image has its own draw. All geometry is one bilinear resampling.
    """
    random = BatchRandom(seed, images.device)
    ink = warp(images, pick(WarpRanges, config), config.image_size, random)
    ink = change_ink(ink, config.contrast, config.brightness, random)
    return erase(ink, config.erasing, random)


def to_input(images: Tensor, config: Config) -> Tensor:
    """Return ink 0..1 [B, 1, image_size, image_size] of uint8 images [B, 1, S, S] without augmentation.

    Resampling softens edges; a network trained on resampled images is shown soft edges here too.
    """
    ink = images.float().div_(255)
    if ink.shape[-1] != config.image_size:
        return resize(ink, config.image_size)
    resampled = config.augment and pick(WarpRanges, config).active
    return soften_edges(ink, config.edge_softening) if resampled and config.edge_softening else ink


class MathSymbolDataset(torch.utils.data.Dataset):
    """The images and labels of a table, with augmentation.

        table = read_train_table(TableSource("train.csv", "competition"))
        loader = DataLoader(MathSymbolDataset(table, Config(), augmented=True), batch_size=64, shuffle=True)

    An item is (ink [1, image_size, image_size] in 0..1, class number), for any DataLoader. The training loop takes
    whole batches by `batch`, which gathers and augments them on the device, where the images stay if they fit.
    Without classes they are the table's own; without statistics they are measured. Raises DataError for bad images.
    """

    def __init__(self, table: tables.Table, config: Config, classes: list[str] | None = None,
                 statistics: ImageStatistics | None = None, runtime: Runtime = Runtime(),
                 images: np.ndarray | None = None, augmented: bool = False):
        self.table, self.runtime, self.augmented = table, runtime, augmented
        self.statistics = statistics or estimate_image_statistics(table, config.image_size)
        self.config = dataclasses.replace(config, image_size=config.image_size or self.statistics.size)
        if images is None:
            images, = load_images([table], self.statistics, pick(LoadSettings, config))
        labelled = "label" in table.rows
        self.classes = classes or (tables.sort_classes(table.rows.label) if labelled else [])
        labels = table.rows.label if labelled else pd.Series(0, table.rows.index)
        self.targets = tables.class_numbers(labels, self.classes if labelled else [0])
        self.weights = None
        with warnings.catch_warnings(action="ignore"):  # about the cache's read-only memory map, never written to
            self.images, self.class_tensor = torch.from_numpy(images), torch.from_numpy(self.targets)
        self._keep_on_device()

    def _keep_on_device(self) -> None:
        place, resident = self.runtime.device, self.runtime.has_room_for(self.images.nbytes)
        self.pinned = self.config.pin_memory and place.type == "cuda" and not (resident or self.images.is_cuda)
        if resident:
            for name in ("images", "class_tensor", *["weights"] * (self.weights is not None)):
                setattr(self, name, getattr(self, name).to(place))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        seed = int(torch.randint(2**62, ())) if self.augmented else None  # a DataLoader seeds torch in each worker
        return self._to_network(self.images[row][None], seed)[0], int(self.targets[row])

    def _to_network(self, images: Tensor, seed: int | None) -> Tensor:
        augmented = seed is not None and self.config.augment
        return augment(images, self.config, seed) if augmented else to_input(images, self.config)

    def batch(self, rows: np.ndarray, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return network inputs [B, 1, image_size, image_size], class numbers [B] and loss weights [B] (None: all 1).

        They are on the device; the inputs are augmented if there is a seed.
        """
        images, classes = self._gather(self.images, rows), self._gather(self.class_tensor, rows)
        weights = None if self.weights is None else self._gather(self.weights, rows)
        return self._to_network(images, seed), classes, weights

    def _gather(self, tensor: Tensor, rows: np.ndarray) -> Tensor:
        picked = tensor.index_select(0, device.to_device(rows, tensor.device))
        picked = picked.pin_memory() if self.pinned else picked
        return picked.to(self.runtime.device, non_blocking=self.pinned)

    def ink(self, rows: np.ndarray) -> np.ndarray:
        """Return the stored images [n, S, S], uint8, of some rows."""
        return self._gather(self.images, rows)[:, 0].cpu().numpy()

    def for_network(self, config: Config) -> "MathSymbolDataset":
        """Return the same rows as a network with these settings wants its input."""
        dataset = copy.copy(self)
        dataset.config = config
        return dataset

    def append(self, other: "MathSymbolDataset", weight: float) -> None:
        """Add the rows of a dataset of the same classes, each with this weight in the loss."""
        if weight != 1 or self.weights is not None:
            own = torch.ones(len(self)) if self.weights is None else self.weights.cpu()
            self.weights = torch.cat([own, torch.full((len(other),), weight)])
        self.images = torch.cat([self.images, other.images.to(self.images.device)])
        self.class_tensor = torch.cat([self.class_tensor, other.class_tensor.to(self.class_tensor.device)])
        self.targets = np.concatenate([self.targets, other.targets])
        self._keep_on_device()


# ---- Networks: [B, 1, any size, any size] to logits [B, classes] -----------------------------------------------------

class ResNetMathSymbol(nn.Sequential):
    """Residual network of 34 layers for small images: a 5x5 stem, then 3, 4, 6 and 3 blocks of 64 to 512 filters."""

    def __init__(self, num_classes: int, dropout: float = 0.5):
        super().__init__()
        self.stem = nn.Sequential(conv_bn(1, 64, kernel=5), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(inplace=True))
        inputs = 64
        for number, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
            first = ResidualBlock(inputs, width, stride=1 if number == 1 else 2)
            rest = [ResidualBlock(width, width, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            inputs = width
        self.pool = models.global_pool()
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))


class MathSymbolCNN(nn.Sequential):
    """Light network: five 3x3 convolutions in three stages, pooled to 4x4, and a hidden layer of 512.

    Early stages are narrow, since a channel costs most there. Channels are gated after the third and fifth convolution.
    Pooling comes before the ReLU, which gives the same values at a quarter of the work. Dropout in the stages drops
    whole channels, since neighbouring pixels are alike.
    """

    def __init__(self, num_classes: int, dropout: float = 0.5):
        super().__init__()

        def pooled(share: float) -> list[nn.Module]:
            return [nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(inplace=True), nn.Dropout2d(dropout * share)]

        self.conv1 = nn.Sequential(conv_bn(1, 16), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(conv_bn(16, 48), *pooled(1 / 6))
        self.conv3 = nn.Sequential(conv_bn(48, 128), nn.ReLU(inplace=True), SqueezeExcitation(128, 16))
        self.conv4 = nn.Sequential(conv_bn(128, 128), *pooled(1 / 3))
        self.conv5 = nn.Sequential(conv_bn(128, 256), *pooled(1 / 3), SqueezeExcitation(256, 32))
        self.pool = nn.Sequential(AveragePool(4), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(256 * 16, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))


MODELS = {"resnet": ResNetMathSymbol, "cnn": MathSymbolCNN, "digit-cnn": DigitCNN, "mlp": DigitMLP, "tiny": TinyCNN}


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Return the config's network with initial weights drawn from its seed. Its last child is `head`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(optim.step_seed(config.seed, 0, 0))
        if config.model in MODELS:
            inputs = {"inputs": config.image_size**2} if config.model == "mlp" else {}
            model = MODELS[config.model](num_classes, config.dropout, **inputs)
        else:
            name = config.model.removeprefix("torchvision:")
            model = models.torchvision_network(name, num_classes, config.image_size, config.dropout)
    return models.with_normalization(model, config.normalize, config.image_size)


# ---- Mixup and the loss ---------------------------------------------------------------------------------------------

def mixup_data(images: Tensor, targets: Tensor, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """Blend each image [B, 1, H, W] with its neighbour in the batch, and their targets [B, K] alike (arXiv:1710.09412).

    Batches are shuffled, so a neighbour is a random image. The batch shares one draw of Beta(alpha, alpha).
    """
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    return torch.lerp(images.roll(1, 0), images, share), torch.lerp(targets.roll(1, 0), targets, share)


def soft_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy of soft targets [B, K]. The sum of a row is its weight."""
    weights, classes = targets.sum(dim=1, keepdim=True), targets.shape[1]
    return F.cross_entropy(logits, targets * (1 - label_smoothing) + weights * (label_smoothing / classes))


# ---- Prediction -----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def infer(model: nn.Module, dataset: MathSymbolDataset, rows: np.ndarray, view: int = 0) -> np.ndarray:
    """Return the model's outputs, float32 [rows, outputs], in the order of `rows`; each rank computes its part.

    View 0 shows the images unchanged, another one augmented. Raises DataError if an output is not a number.
    """
    model.eval()
    runtime, ranks, config = dataset.runtime, dataset.runtime.ranks, dataset.config
    size = 128 if view else runtime.eval_batch_size  # the draws of a view do not depend on the batch size
    own, outputs = ranks.shard(np.arange(len(rows))), torch.zeros(len(rows), 0)
    remedy = f"while predicting {size} images at a time; try --eval-batch-size {max(size // 2, 1)}"
    for first in tqdm(range(0, len(own), size), "predicting", leave=False, delay=3, disable=ranks.rank > 0 or None):
        places = own[first : first + size]
        seed = optim.step_seed(config.seed, view, int(places[0])) if view else None
        with runtime.autocast(), memory_remedy(remedy):
            found = model(dataset.batch(rows[places], seed)[0]).float().cpu()
        outputs = outputs if outputs.shape[1] else torch.zeros(len(rows), found.shape[1])
        outputs[places] = found  # kept in a list, small parts would break up the memory between two batches
    width, = ranks.all_reduce_max(outputs.shape[1])
    outputs = outputs if len(own) else torch.zeros(len(rows), int(width))
    # The vote may give probability 0, whose logarithm is minus infinity.
    if not (ranks.all_reduce_sum(outputs) < math.inf).all():
        raise DataError("the network gives no numbers for some images: its training diverged; lower --learning-rate")
    return outputs.numpy()


def predict(model: nn.Module, dataset: MathSymbolDataset, rows: np.ndarray | None = None, tta: int = 1) -> np.ndarray:
    """Return probabilities, float32 [rows, classes], of some or all rows: the mean over `tta` views of each image."""
    rows = np.arange(len(dataset)) if rows is None else rows
    views = (torch.from_numpy(infer(model, dataset, rows, view)).softmax(dim=1) for view in range(tta))
    return (sum(views) / tta).numpy()


@dataclass(frozen=True)
class TrainedModel:
    """A network with everything that prediction needs."""

    model: nn.Module
    config: Config
    classes: list[str]
    statistics: ImageStatistics
    metrics: dict
    labels_sha256: str  # of the labels of its training table, which identify the rows that validated

    @property
    def without_knn(self) -> "TrainedModel":
        """The network alone, without the nearest-neighbour vote."""
        model = self.model.network if isinstance(self.model, KNNClassifier) else self.model
        return dataclasses.replace(self, model=model)


def ensemble_predict(members: list[TrainedModel], dataset: MathSymbolDataset, tta: int = 1) -> np.ndarray:
    """Return the mean probabilities, float32 [rows, classes], of networks of the same classes and image statistics."""
    ensemble.check_same_classes([EnsembleMember("a network", member.classes) for member in members])
    each = (predict(dataset.runtime.to_device(member.model), dataset.for_network(member.config), tta=tta)
            [:, [member.classes.index(label) for label in members[0].classes]] for member in members)
    return sum(each) / len(members)


def save_checkpoint(path: Path, trained: TrainedModel) -> None:
    """Write a checkpoint: weights, settings, classes, image statistics and the index of the nearest-neighbour vote."""
    files.save_verified(path, {
        "model": {name: value.detach().cpu() for name, value in trained.without_knn.model.state_dict().items()},
        "knn": trained.model.index if isinstance(trained.model, KNNClassifier) else {},
        "config": dataclasses.asdict(trained.config), "classes": trained.classes,
        "image_statistics": dataclasses.asdict(trained.statistics), "metrics": trained.metrics,
        "labels_sha256": trained.labels_sha256, "versions": device.versions()})


def load_checkpoint(path: Path) -> TrainedModel:
    """Read a checkpoint, as data and never as code. Raises DataError for a file that is not a complete checkpoint."""
    try:
        content = files.load_verified(path)
        content["config"].pop("initial_size", None)  # a setting of training alone, until it left
        config = Config(**content["config"])
        model = build_model(config, len(content["classes"]))
        model.load_state_dict(content["model"])
        if content["knn"]:
            model = KNNClassifier(model, config.knn_neighbors, config.knn_weight, content["knn"])
        return TrainedModel(model, config, content["classes"], ImageStatistics(**content["image_statistics"]),
                            content["metrics"], content["labels_sha256"])
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint; train one with `python script.py`") from None
    except Exception as error:  # zipfile, pickle and torch each raise their own types
        raise DataError(f"{path}: not a complete checkpoint of script.py ({type(error).__name__}: "
                        f"{first_line(error)}); train again, or name another") from None


# ---- Training -------------------------------------------------------------------------------------------------------

SMALLEST_SHARD = 64      # images per GPU or rank from which batch norm may use each part's own mean and deviation
STEPS_PER_CHECK = 50     # steps between two checks for skipped steps, each of which waits for the device
SHORTEST_INTERVAL = 10   # seconds between two saves at the ends of epochs: on a GPU one may take a second


@dataclass(frozen=True, eq=False)
class CompetitionData:
    """The labelled rows of a run, their split, and the rows to predict."""

    dataset: MathSymbolDataset  # the rows of train_csv, then those of extra_csv
    test: MathSymbolDataset | None  # None without a test table
    split: Split
    latex: dict[str, str]       # by label
    extra_rows: np.ndarray      # positions of the usable rows of extra_csv

    @property
    def classes(self) -> list[str]:
        """The labels by class number."""
        return self.dataset.classes

    def with_rows(self, train_rows: np.ndarray, val_rows: np.ndarray) -> "CompetitionData":
        """Return the data with these rows. Extra rows are trained on too, but for copies of validation images."""
        if len(self.extra_rows):
            copies = splits.are_copies(self.dataset.ink(self.extra_rows), self.dataset.ink(val_rows))
            train_rows = np.concatenate([train_rows, self.extra_rows[~copies]])
        return dataclasses.replace(self, split=Split(train_rows, val_rows, self.split.parts))


def start_model(config: Config, data: CompetitionData, fresh: bool = True) -> nn.Module:
    """Return the network to train, on the device, with `--weights` if it is fresh and with measured normalisation."""
    model = build_model(config, len(data.classes))
    if config.weights and fresh:
        models.load_initial_weights(model, config.weights, config.model, data.classes, config.image_size, config.split)
    model = data.dataset.runtime.to_device(model)
    if config.normalize != "none":
        parts = np.array_split(data.split.train_rows, math.ceil(len(data.split.train_rows) / 1024))
        model.normalize.measure((data.dataset.batch(rows)[0] for rows in parts), config.normalize)
    return model


class Trainer:
    """A network in training, with its optimizer and averaged weights. `smallest_batch` is that of an epoch's steps."""

    def __init__(self, config: Config, model: nn.Module, runtime: Runtime, smallest_batch: int):
        self.config, self.runtime, self.model, self.smallest_batch = config, runtime, model, smallest_batch
        self.step, self.updates, self.batches = 0, 0, 0  # batches: since the last optimizer step
        self.learning_rate = config.learning_rate  # of the last step
        ranks = runtime.ranks
        if ranks.joined and runtime.device.type == "cuda" and smallest_batch < SMALLEST_SHARD * ranks.world_size:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            warn(f"the ranks synchronise every batch norm, since a step has fewer than {SMALLEST_SHARD} images for "
                 f"each; with --batch-size {SMALLEST_SHARD * ranks.world_size} or more they need not")
        self.statistics = BatchNormStatistics(self.model, debias=not config.weights)
        self.network = self._parallel(device.AutocastModel(self.model, runtime))
        self.optimizer = optim.make_optimizer(
            config.optimizer, self.model, config.learning_rate, config.weight_decay, config.momentum)
        self.schedule = pick(Schedule, config)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "max", optim.PLATEAU_FACTOR, optim.PLATEAU_PATIENCE, threshold=0)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay else None
        self.finite = torch.ones((), device=runtime.device)  # 0 after a loss that is not finite; stays on the device
        self.skipped = SkippedSteps(runtime.device)

    def _parallel(self, network: nn.Module) -> nn.Module:
        """Return the network on all ranks, or on this process's GPUs; compiled if requested."""
        gpus = self.runtime.gpus
        if self.runtime.ranks.joined:
            network = distributed_data_parallel(network, find_unused=self.config.freeze_epochs > 0)
        elif gpus > 1 and self.smallest_batch < SMALLEST_SHARD * gpus:
            warn(f"only one of {gpus} GPUs is used: a step has too few images for more; set --batch-size "
                 f"{SMALLEST_SHARD * gpus} or more, or start one rank per GPU with torchrun")
        elif gpus > 1:
            network = nn.DataParallel(network)
        # An epoch's batches have two sizes; with dynamic shapes the compiler would optimise neither.
        return torch.compile(network, dynamic=False) if self.config.compile else network

    @property
    def result(self) -> nn.Module:
        """The network to validate, keep and predict with: the averaged one if there is one."""
        return self.average.model if self.average else self.model

    def training_step(self, inputs: Tensor, targets: Tensor, progress: float, share: float = 1.0,
                      update: bool = True) -> Tensor:
        """Forward, backward and loss of one batch. Return [loss sum, correct, count], left on the device.

        Mixed targets [B, K] count fractionally towards accuracy. All sums are 0 if the loss is not finite. The
        gradient's `share` is added to those of earlier batches; `update` takes the optimizer step.
        """
        accumulating = self.runtime.ranks.joined and not update  # gradients are reduced with the last batch's
        with self.network.no_sync() if accumulating else contextlib.nullcontext():
            logits = self.network(inputs).float()  # AMP: AutocastModel runs the forward pass in the lower precision
            loss = soft_cross_entropy(logits, targets, self.config.label_smoothing)
            finite = loss.detach().isfinite()
            self.finite = self.finite * finite
            self.scaler.scale(loss * share).backward()
        self.step, self.batches = self.step + 1, self.batches + 1
        if update:
            self.optimizer_step(progress)
        correct = targets.gather(1, logits.detach().argmax(dim=1, keepdim=True)).sum()
        return torch.stack([loss.detach().nan_to_num(0, 0, 0) * len(inputs), correct * finite, targets.sum() * finite])

    def optimizer_step(self, progress: float) -> None:
        """Clip the gradients, then update weights and averages. A step without finite numbers keeps the weights."""
        if self.config.schedule != "plateau":  # which changes the rate between epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * self.schedule.factor(progress)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        finite = self.statistics.average_over_ranks(self.runtime.ranks, self.finite)
        self.statistics.debias_batch_norm(self.batches, self.updates, self.skipped.counts[0])
        finite = finite * norm.isfinite() * self.statistics.vector.isfinite().all()
        if self.scaler.is_enabled():  # fp16: the scaler skips steps itself, while it looks for the largest scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            optim.step_if_finite(self.optimizer, finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.keep_if(finite)
        if self.average:
            self.average.update(self.updates)
        self.skipped.update(finite)
        self.updates, self.batches, self.finite = self.updates + 1, 0, torch.ones_like(self.finite)
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])

    @property
    def _parts(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "plateau": self.plateau}
        return {**parts, "average": self.average.model} if self.average else parts

    def state_dict(self) -> dict:
        """Return a copy of everything that the next step depends on."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return copy.deepcopy({**parts, "skipped": self.skipped.counts, "counts": (self.step, self.updates)})

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`."""
        state = copy.deepcopy(state)  # optimizers keep the tensors that they are given
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.skipped.counts.copy_(state["skipped"])
        self.step, self.updates = state["counts"]
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.statistics.keep_if(torch.ones_like(self.finite))  # what was restored


def snapshot(trainer: Trainer, state: TrainingState, clock: TrainingClock) -> dict:
    """Return what last.pth needs to resume a training."""
    state.trained_seconds = clock.elapsed
    return {"trainer": trainer.state_dict(), "state": dataclasses.asdict(state)}


def train(trainer: Trainer, data: CompetitionData, state: TrainingState, clock: TrainingClock,
          manager: CheckpointManager, stops: StopSignals) -> dict[str, float]:
    """Train one epoch, or its rest, or as much as there is time for. Return its metrics.

    Raises DataError if training has diverged, and Stopped after the step in which a signal came.
    """
    config, ranks, begun = trainer.config, trainer.runtime.ranks, time.monotonic() - state.seconds
    batches = optim.epoch_batches(data.split.train_rows, data.dataset.targets, config.batch_size, config.seed,
                                  state.epoch)
    shares = optim.accumulation_shares([len(rows) for rows in batches], config.accumulation_steps)
    totals, update = MetricAccumulator(state.sums, ranks, trainer.runtime.device), True
    trainer.model.train()
    if not config.compile:  # it would compile for each rate
        models.set_dropout(trainer.model, state.epoch)
    if config.freeze_epochs:
        models.freeze_body(trainer.model, state.epoch <= config.freeze_epochs)

    def synchronize() -> None:
        trainer.skipped.check(state.best)
        state.sums, state.seconds = totals.sums(), time.monotonic() - begun

    with tqdm(total=len(data.split.train_rows), initial=state.images, unit="img", unit_scale=True, leave=False,
              desc=f"epoch {state.epoch}/{clock.expected_epochs(trainer.step, state.epoch)}",
              disable=ranks.rank > 0 or None, bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_fmt}{postfix}") as bar:
        for number in range(state.step, len(batches)):
            progress, due, signal_number = ranks.all_reduce_max(
                clock.progress(trainer.step), manager.is_due(), stops.pending or 0)
            if update and (due or signal_number):
                synchronize()
                if signal_number:
                    raise Stopped(int(signal_number))
                manager.save(snapshot(trainer, state, clock))
            if update and progress >= 1:  # between optimizer steps only
                break
            (share, update), rows = shares[number], ranks.shard(batches[number])
            seed = optim.step_seed(config.seed, state.epoch, trainer.step, ranks.rank)
            torch.manual_seed(seed ^ 1)  # for dropout, which uses the global generator
            plain = clock.epochs_left(progress, trainer.step) < config.plain_epochs
            inputs, classes, weights = data.dataset.batch(rows, None if plain else seed)
            targets = F.one_hot(classes, len(data.classes)).float()
            if weights is not None:
                targets = targets * weights[:, None]
            if config.mixup:
                inputs, targets = mixup_data(inputs, targets, config.mixup_alpha, seed)
            share *= len(rows) * ranks.world_size / len(batches[number])  # DDP averages over ranks, not images
            totals.add(trainer.training_step(inputs, targets, progress, share, update))
            state.step, state.images = number + 1, state.images + len(batches[number])
            if bar.update(len(batches[number])):  # true if the bar was redrawn, at most ten times a second
                loss, accuracy = metrics.means(totals.own.tolist())
                left = tqdm.format_interval(clock.seconds_left(progress))
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}, {left} to the end", False)
            if update and trainer.updates % STEPS_PER_CHECK == 0:
                trainer.skipped.check(state.best)
    synchronize()
    return dict(zip(("train_loss", "train_accuracy"), metrics.means(state.sums)), learning_rate=trainer.learning_rate)


def validate(trainer: Trainer, data: CompetitionData, clock: TrainingClock) -> tuple[dict, np.ndarray | None]:
    """Return the validation rows' metrics and probabilities, if there are any. The clock learns an answer's time."""
    rows, begun = data.split.val_rows, time.monotonic()
    if not len(rows):
        return {}, None
    probabilities = predict(trainer.result, data.dataset, rows)
    clock.answer_seconds.append((time.monotonic() - begun) / len(rows))
    return score(probabilities, data.dataset.targets[rows]), probabilities


def finish_epoch(trainer: Trainer, data: CompetitionData, state: TrainingState, row: dict, epochs: int) -> bool:
    """Print an epoch's metrics, save the network if it is the best, and write history.csv. Return whether it is."""
    config, folder, writes = trainer.config, Path(trainer.config.output_dir), trainer.runtime.ranks.rank == 0
    skipped = float(trainer.skipped.counts[0])
    print(metrics.describe_epoch(row, epochs, state.images / state.seconds, skipped - state.skipped), flush=True)
    if config.schedule == "plateau":
        trainer.plateau.step(row["val_accuracy"])
    better = metrics.is_better(row, state.best, config.select_by)
    if better and writes:
        save_checkpoint(folder / config.model_file, TrainedModel(trainer.result, config, data.classes,
                        data.dataset.statistics, row, data.dataset.table.labels_sha256))
    state.finish_epoch(row, better, skipped)
    if writes:
        with files.atomic_write(folder / "history.csv") as temporary:
            pd.DataFrame(state.history, columns=metrics.HISTORY_COLUMNS).to_csv(temporary, index=False)
    return better


def fit(config: Config, data: CompetitionData, limit: TimeLimit | None = None, manager: CheckpointManager | None = None,
        stops: StopSignals | None = None) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Train a network by a resolved config. Return its history, one row per epoch, as in history.csv, and the best
    epoch's validation probabilities: None without validation rows, or if an earlier process trained that epoch.

    model_file in output_dir is the best epoch by `select_by`, or the last one without validation rows. The schedule is
    laid over the time that the limit leaves for training. A manager with a folder lets it be resumed.
    """
    runtime, rows = data.dataset.runtime, len(data.split.train_rows)
    manager, stops, ranks = manager or CheckpointManager(), stops or StopSignals(), runtime.ranks
    steps = optim.steps_per_epoch(rows, config.batch_size)
    clock = TrainingClock(config.num_epochs, steps, limit)
    if rows // steps < 2 * ranks.world_size > 2:
        raise UsageError(f"steps of {rows // steps} images are less than two for each of {ranks.world_size} ranks; "
                         "raise --batch-size, or start fewer ranks")
    model = start_model(config, data, fresh=not manager.found)
    trainer = Trainer(config, model, runtime, smallest_batch=min(config.batch_size, rows // steps))
    remedy = (f"with batches of {config.batch_size} images; try --batch-size {max(config.batch_size // 2, 2)}, with "
              f"--accumulation-steps {2 * config.accumulation_steps} for the same optimizer steps")
    with stops.hold():
        state, best = manager.begin(trainer.load_state_dict), None
        clock.earlier, clock.settled = state.trained_seconds, state.settled
        try:
            while not state.training_finished(clock.last_epoch, config.early_stopping,
                                              *ranks.all_reduce_max(clock.progress(trainer.step))):
                with memory_remedy(remedy):
                    row = {"epoch": state.epoch, **train(trainer, data, state, clock, manager, stops)}
                if not state.images and state.history:  # the time ended with the epoch before
                    break
                begun = time.monotonic()
                with stops.hold(ranks.world_size > 1):  # the other ranks would wait for one that leaves
                    figures, probabilities = validate(trainer, data, clock)
                row |= {**figures, "seconds": state.seconds + time.monotonic() - begun}
                if finish_epoch(trainer, data, state, row, clock.expected_epochs(trainer.step, state.epoch)):
                    best = probabilities
                if config.min_steps and clock.settle([earlier["train_accuracy"] for earlier in state.history]):
                    print(f"the training accuracy has stopped rising: {clock.last_epoch - clock.settled} more epochs")
                    state.settled = clock.settled
                manager.save(snapshot(trainer, state, clock), min(SHORTEST_INTERVAL, 60 * config.checkpoint_minutes))
            signal_number, = ranks.all_reduce_max(stops.pending or 0)  # one that came while the last epoch was saved
            if signal_number:
                raise Stopped(int(signal_number))
        except Stopped as stop:
            manager.save(snapshot(trainer, state, clock))
            raise Stopped(stop.number, manager.describe_saved(config.fold)) from None
    if state.early_stopping_triggered(config.early_stopping) and state.epoch <= clock.last_epoch:
        print(f"stopped early: {config.early_stopping} epochs without a better validation {config.select_by}")
    return pd.DataFrame(state.history, columns=metrics.HISTORY_COLUMNS), best


# ---- Reading a competition ------------------------------------------------------------------------------------------

def load_data(config: Config, runtime: Runtime, train_table: Table, test_table: Table | None,
              extra_table: Table | None, classes: list[str]) -> CompetitionData:
    """Decode the images of all tables and split the training rows."""
    statistics = estimate_image_statistics(train_table, config.image_size, config.num_workers)
    read = [table for table in (train_table, test_table) if table]
    images, *test_images = load_images(read, statistics, pick(LoadSettings, config))
    dataset = MathSymbolDataset(train_table, config, classes, statistics, runtime, images)
    test = MathSymbolDataset(test_table, config, classes, statistics, runtime, test_images[0]) if test_table else None
    groups = train_table.rows[config.group_column].to_numpy() if config.group_column else None
    usable, digests = train_table.usable_rows, splits.image_digests(images)
    split = splits.split_rows(config.split, dataset.targets, usable, digests, groups, train_table.path)
    test_digests = splits.image_digests(test_images[0][test_table.usable_rows]) if test_table else []
    splits.report_copies([digests[row] for row in usable], test_digests)
    if config.schedule == "plateau" or config.early_stopping:
        split.check_validates()
    extra_rows = np.zeros(0, dtype=np.int64)
    if extra_table:
        dataset.append(MathSymbolDataset(extra_table, config, classes, statistics, runtime), config.extra_weight)
        extra_rows = len(train_table) + extra_table.usable_rows
    latex = tables.read_latex(config.train_source.path.with_name("classes.csv"))
    return CompetitionData(dataset, test, split, latex, extra_rows).with_rows(split.train_rows, split.val_rows)


def prepare_data(config: Config, runtime: Runtime) -> tuple[Config, CompetitionData]:
    """Read and check everything before any training. Return the resolved config and the data.

    Each machine's first rank decodes the images, and reports what is wrong.
    """
    with runtime.ranks.rank0_first():
        train_table, extra_table = tables.read_train_table(config.train_source), None
        if config.extra_csv:
            extra_table = tables.read_extra_table(config.extra_source, train_table.rows.label, config.extra_classes)
        labelled = [table for table in (train_table, extra_table) if table]
        classes = tables.sort_classes(pd.concat([table.rows.label for table in labelled]))
        config = dataclasses.replace(config, label_column=config.label_column or train_table.own_label_column)
        test_table = tables.read_test_table(config.test_source) if config.test_source else None
        if test_table:
            submission_form(test_table, classes)
            tables.warn_of_shared_files(train_table, test_table)
        written = config.written_files
        for table in filter(None, (*labelled, test_table)):
            files.check_not_overwritten(Path(config.output_dir), written, table.images_named(written))
        print(tables.describe_classes(train_table, classes, *config.split.fewest()))
        training_rows = config.split.count_training_rows(len(train_table)) + len(extra_table or ())
        resolved = resolve_config(config, runtime, training_rows)
        # Before decoding, which takes longer: it refuses a size that the network cannot take.
        summary = models.summarize(build_model(resolved, len(classes)), resolved.model, resolved.image_size)
        data = load_data(resolved, runtime, train_table, test_table, extra_table, classes)
    chosen = f" (auto: the choice for {runtime.device.type})" if config.model == "auto" else ""
    rows = len(train_table), len(test_table or ())
    print(outputs.describe_rows(data.split, *rows, data.extra_rows, data.dataset.statistics),
          f"model {resolved.model}{chosen}", summary, sep="\n")
    return resolved, data


# ---- One network ----------------------------------------------------------------------------------------------------

def run_fingerprint(config: Config, data: CompetitionData) -> dict:
    """Return what identifies a run: its settings, classes, training data and device."""
    dataset, settings = data.dataset, dataclasses.asdict(config)
    rows = [torch.from_numpy(rows) for rows in (data.split.train_rows, data.split.val_rows)]
    return {"settings": {name: value for name, value in settings.items() if name not in RESUME_SETTINGS},
            "classes": data.classes, "data": files.sha256_of([dataset.images, dataset.class_tensor, dataset.weights,
                                                              *rows]), "device": dataset.runtime.device.type}


def measure_limit(config: Config, data: CompetitionData, started: float, manager: CheckpointManager) -> TimeLimit:
    """Return the time that max_minutes leaves, measuring the pace of answers; without it only how many they are."""
    runtime, rows, val_rows = data.dataset.runtime, data.split.train_rows, len(data.split.val_rows)
    test_rows = len(data.test or ()) * (2 if config.folds else 1)  # of folds alone, and averaged
    votes, vote_cost, used, alone = config.knn_neighbors > 0, len(rows), 0.0, 0.0  # the cost in answers: features

    def seconds_per_image(model: nn.Module) -> float:
        model, sample = runtime.to_device(model), rows[: 4 * runtime.eval_batch_size]
        seconds = timeit.repeat(lambda: predict(model, data.dataset, sample), number=1, repeat=5)
        return runtime.ranks.all_reduce_max(np.median(seconds) / len(sample))[0]  # the fastest is rarer than the rest

    if config.max_minutes:
        model = build_model(config, len(data.classes))
        alone = seconds_per_image(model)
        used, = runtime.ranks.all_reduce_max(time.monotonic() - started)
        most = VOTE_SHARE * (60 * config.max_minutes - used + manager.elapsed) / alone
        if votes and vote_cost <= most:  # the answers take longer, too
            voting = KNNClassifier(model, config.knn_neighbors, 0.0, empty_knn_index(model, len(rows)))
            vote_cost += (val_rows + test_rows) * (seconds_per_image(voting) / alone - 1)
        if votes and vote_cost > most:
            print(f"no nearest-neighbour vote, which takes at least {vote_cost * alone:.0f} s: training gains more")
            votes = False
    answers = val_rows + test_rows + (val_rows + vote_cost if votes else val_rows * bool(manager.found))
    fixed = 8 + 6 * config.pictures  # seconds to import, write, exit and draw
    return time_limit(config.max_minutes or math.inf, used, fixed, answers, alone, votes, bool(config.folds),
                      not manager.found)


def finish_network(config: Config, data: CompetitionData, votes: bool,
                   probabilities: np.ndarray | None = None) -> tuple[TrainedModel, Predictions | None]:
    """Return the best epoch's network, with the nearest-neighbour vote if `votes`, and its validation predictions.

    The vote's index, and the metrics with it, are added to the checkpoint. Without the vote `probabilities` are kept.
    """
    path, ranks = Path(config.output_dir, config.model_file), data.dataset.runtime.ranks
    best = ranks.broadcast_from_rank0(lambda: load_checkpoint(path)).without_knn
    dataset, rows = data.dataset, data.split.val_rows
    if votes:
        body, _ = split_head(dataset.runtime.to_device(best.model))
        features = torch.from_numpy(infer(body, dataset, data.split.train_rows))
        index = build_knn_index(features, torch.from_numpy(dataset.targets[data.split.train_rows]))
        voting = KNNClassifier(best.model, config.knn_neighbors, config.knn_weight, index)
        best = dataclasses.replace(best, model=dataset.runtime.to_device(voting))
    predictions = None
    if len(rows):
        if votes or probabilities is None:
            probabilities = predict(dataset.runtime.to_device(best.model), dataset, rows)
        predictions = Predictions(rows, dataset.targets[rows], probabilities, lambda places: dataset.ink(rows[places]))
    if votes:
        figures = score(predictions.probabilities, predictions.targets) if predictions else {}
        best = dataclasses.replace(best, config=config, metrics={**best.metrics, **figures})
        if ranks.rank == 0:
            save_checkpoint(path, best)
    return best, predictions


def write_results(config: Config, data: CompetitionData, best: TrainedModel, history: pd.DataFrame,
                  predictions: Predictions | None, probabilities: np.ndarray | None) -> None:
    """Write the submission, the validation predictions and the pictures; remove those of an earlier run."""
    folder = Path(config.output_dir)
    if data.test:
        outputs.write_answers(folder / config.submission_file, data.test.table, probabilities, data.classes,
                              1 if config.save_probabilities else None)
    if predictions:
        folds.save_validation(folder / "val_probabilities.npz", predictions, data.classes)
        plots.write_class_accuracy(folder, "", predictions, data.classes, data.latex, config.pictures)
    if config.pictures:
        names, targets = plots.class_names(data.classes, data.latex), data.dataset.targets
        plots.plot_class_distribution(folder / "class_distribution.png", targets[: len(data.dataset.table)], names)
        plots.plot_samples(folder / "samples.png", data.split.train_rows, targets, names, data.dataset.ink)
        plots.plot_curves(folder / "curves.png", history, best.metrics["epoch"])
    written = TRAINING_FILES | {TEST_PROBABILITIES if config.save_probabilities and data.test else ""}
    outputs.remove_leftovers(folder, written | VALIDATION_FILES if predictions else written, config.pictures)


def run_one(config: Config, data: CompetitionData, stops: StopSignals, started: float, reserved: float = 0.0) -> float:
    """Train one network, for which `reserved` seconds of max_minutes are not; return the seconds since `started`."""
    ranks, folder = data.dataset.runtime.ranks, Path(config.output_dir)
    files.make_output_folder(folder, [config.model_file, config.submission_file])
    with contextlib.nullcontext() if ranks.rank else files.lock_folder(folder):
        own = run_fingerprint(config, data)
        if difference := compare_fingerprints(ranks.broadcast_from_rank0(lambda: own), own):
            raise DataError(f"rank 0 has a run with {difference}: all ranks must read the same files")
        manager = CheckpointManager(folder, own, ranks, config.checkpoint_minutes, config.resume, config.model_file,
                                    started)
        started -= manager.elapsed
        limit = measure_limit(config, data, started - reserved, manager)
        history, probabilities = fit(config, data, limit, manager, stops)
        best, predictions = finish_network(config, data, limit.votes, probabilities)
        probabilities, figures = ensemble_predict([best], data.test) if data.test else None, best.metrics
        if predictions and data.test:
            figures = figures | expected_accuracy(predictions, probabilities[data.test.table.usable_rows])
        if ranks.rank == 0:
            write_results(config, data, best, history, predictions, probabilities)
            outputs.write_run_record(folder, dataclasses.asdict(config), data.dataset.runtime, figures, started,
                                     own["data"])  # last, since it marks a finished fold
            manager.discard()
            written = [config.model_file, *[config.submission_file] * bool(data.test), "history.csv", "run.json"]
            report_expected(figures)
            print(outputs.describe_result(best.metrics, history, limit.votes),
                  outputs.describe_end(written, config.pictures, folder, started), sep="\n")
    return time.monotonic() - started


# ---- Cross-validation -----------------------------------------------------------------------------------------------

def write_folds(config: Config, every: list[Config], records: list[dict], data: CompetitionData) -> None:
    """Write the out-of-fold predictions with their metrics, and the submission of the networks' mean."""
    ranks, dataset, folder = data.dataset.runtime.ranks, data.dataset, Path(config.output_dir)
    paths = [Path(own.output_dir, own.model_file) for own in every]
    members = ranks.broadcast_from_rank0(lambda: [load_checkpoint(path) for path in paths])
    folds.check_order(paths, [member.config.fold for member in members])
    probabilities = ensemble_predict(members, data.test) if data.test else None
    if ranks.rank:
        return
    if data.test:
        outputs.write_answers(folder / config.submission_file, data.test.table, probabilities, data.classes,
                              len(members) if config.save_probabilities else None)
    predictions = folds.out_of_fold(records, dataset.targets, dataset.ink)
    fold_of_row = data.split.parts[predictions.rows]
    figures = folds.score_folds(predictions, fold_of_row) | mean_over_folds(records)
    folds.save_validation(folder / "oof_probabilities.npz", predictions, data.classes, folds=fold_of_row)
    whole = dataclasses.replace(data, split=splits.Split(predictions.rows, predictions.rows))
    started = time.monotonic() - sum(record["seconds"] for record in records)
    outputs.write_run_record(folder, dataclasses.asdict(config), dataset.runtime, figures, started,
                             run_fingerprint(config, whole)["data"])
    plots.write_class_accuracy(folder, "", predictions, data.classes, data.latex, config.pictures)
    written = {"oof_probabilities.npz", TEST_PROBABILITIES if config.save_probabilities and data.test else ""}
    outputs.remove_leftovers(folder, written | VALIDATION_FILES - {"val_probabilities.npz"}, config.pictures)
    written = [*[f"{config.submission_file} of the {config.folds} networks' mean"] * bool(data.test),
               "oof_probabilities.npz", "class_accuracy.csv", "run.json"]
    report_expected(figures)
    print(folds.describe_folds(figures), outputs.describe_end(written, config.pictures, folder, started), sep="\n")


def fold_config(config: Config, fold: int) -> Config:
    """Return the config of one fold's run, in a folder of its own."""
    return dataclasses.replace(config, fold=fold, output_dir=str(Path(config.output_dir, f"fold{fold}")))


def run_folds(config: Config, data: CompetitionData, stops: StopSignals, started: float) -> None:
    """Train the folds that are not finished, or the requested one; write what all give when none is missing."""
    ranks, every = data.dataset.runtime.ranks, {fold: fold_config(config, fold) for fold in range(config.folds)}
    wanted = list(every) if config.fold is None else [config.fold]
    own_data = {fold: data.with_rows(*splits.rows_of_part(data.split.parts, fold)) for fold in every}

    def find(fold: int) -> dict | None:
        return folds.find_finished(Path(every[fold].output_dir), config.model_file,
                                   run_fingerprint(every[fold], own_data[fold]), own_data[fold].split.val_rows)

    def train_one(fold: int, begun: float, reserved: float) -> float:
        print(f"fold {fold} of 0 to {config.folds - 1}, in {every[fold].output_dir}", flush=True)
        return run_one(every[fold], own_data[fold], stops, begun, reserved)

    finished = ranks.broadcast_from_rank0(lambda: folds.find_all(wanted, find) if config.resume else {})
    folds.run(wanted, finished, train_one, started, 60 * config.max_minutes)
    found = ranks.broadcast_from_rank0(lambda: folds.find_all(list(every), find, tolerant=True))
    if len(found) < config.folds:
        print(folds.describe_missing([fold for fold in every if fold not in found], config.folds))
    else:
        write_folds(dataclasses.replace(config, fold=None), list(every.values()), list(found.values()), data)


# ---- The command `run` ----------------------------------------------------------------------------------------------

def run(config: Config, started: float, stops: StopSignals) -> None:
    """Train, predict and write the submission, or resume where an earlier process was stopped."""
    every = [fold_config(config, fold) for fold in range(config.folds)]
    for own in (config, *every):
        files.check_not_overwritten(Path(own.output_dir), own.written_files, own.inputs)
    files.make_output_folder(Path(config.output_dir), [config.model_file, config.submission_file])
    stored = stored_precision(Path(config.output_dir), [Path(own.output_dir) for own in every]) if config.resume else ""
    runtime = start_runtime(config.device, config.precision, config.eval_batch_size, stored)
    print(f"device {runtime.describe()}")
    device.check_several_gpus(runtime, config.compile)
    config, data = prepare_data(config, runtime)
    (run_folds if config.folds else run_one)(config, data, stops, started)


# ---- The commands `predict` and `evaluate` --------------------------------------------------------------------------

def open_members(config: Config, names: list[str], saved: bool = True) -> list[EnsembleMember]:
    """Check the named files, or the checkpoint in the output folder; `saved` allows saved probabilities."""
    members = []
    for path in map(Path, names or [Path(config.output_dir, config.model_file)]):
        if path.suffix != ".npz":
            trained = load_checkpoint(path)
            members.append(EnsembleMember(path, trained.classes, 1, trained.config, trained.statistics))
            del trained  # one network is in memory at a time
        elif saved:
            members.append(ensemble.open_saved(path))
        else:
            raise UsageError(f"{path}: only predict can average saved probabilities of a test table; name a checkpoint")
        if config.tta > 1 and not (members[-1].config and members[-1].config.augment):
            raise UsageError(f"--tta {config.tta}: {path} has one view of an image only, as saved probabilities and "
                             "networks trained with --no-augment do; leave --tta out")
    ensemble.check_same_classes(members)
    return members


def average_members(members: list[EnsembleMember], table: Table, config: Config,
                    runtime: Runtime) -> tuple[np.ndarray, Callable[[ImageStatistics], np.ndarray]]:
    """Return the members' mean probabilities [rows, classes], one in memory at a time, and the loader of images."""
    @functools.cache
    def images_for(statistics: ImageStatistics) -> np.ndarray:
        with runtime.ranks.rank0_first():
            return load_images([table], statistics, pick(LoadSettings, config))[0]

    def predict_member(member: EnsembleMember) -> np.ndarray:
        if not member.config:
            return ensemble.saved_for(member, table)
        trained, images = load_checkpoint(member.path), images_for(member.statistics)
        dataset = MathSymbolDataset(table, trained.config, None, member.statistics, runtime, images)
        return predict(runtime.to_device(trained.model), dataset, tta=config.tta)

    return ensemble.average(members, predict_member), images_for


def predict_command(config: Config, names: list[str], started: float) -> None:
    """Write the submission of one or more files, checkpoints or saved probabilities, averaged."""
    written = {config.submission_file, *[TEST_PROBABILITIES] * config.save_probabilities}
    folder = Path(config.output_dir)
    files.check_not_overwritten(folder, written, [*config.inputs, *map(Path, names)])
    files.make_output_folder(folder, [config.submission_file])
    members = open_members(config, names)
    table = tables.read_test_table(ensemble.source_for(members, config.test_source))
    files.check_not_overwritten(folder, written, table.images_named(written))
    ensemble.check_saved(members, table)
    submission_form(table, members[0].classes)
    if not any(member.config for member in members):
        table.faults.clear()  # saved probabilities need no images
    runtime = ensemble.runtime_for(members, config.device, config.precision, config.eval_batch_size)
    probabilities, _ = average_members(members, table, config, runtime)
    if runtime.ranks.rank:
        return
    networks = sum(member.networks for member in members)
    outputs.write_answers(folder / config.submission_file, table, probabilities, members[0].classes,
                          networks if config.save_probabilities else None)
    what = "one network" if networks == 1 else f"the mean of {networks} networks"
    print(f"wrote {' and '.join(sorted(written))} in {folder}: {len(table):,} rows of {table.path}, {what}, on "
          f"{runtime.describe()}; {time.monotonic() - started:.1f} s")


def evaluate_command(config: Config, names: list[str], started: float) -> None:
    """Print and draw the metrics of one or more checkpoints, averaged, on the labelled rows of test_csv."""
    folder = Path(config.output_dir)
    files.check_not_overwritten(folder, EVALUATION_FILES, [*config.inputs, *map(Path, names)])
    files.make_output_folder(folder)
    members = open_members(config, names, saved=False)
    table = tables.open_table(ensemble.source_for(members, config.test_source), "label")
    classes = members[0].classes
    files.check_not_overwritten(folder, EVALUATION_FILES, table.images_named(EVALUATION_FILES))
    targets = tables.known_class_numbers(table, classes)
    runtime = ensemble.runtime_for(members, config.device, config.precision, config.eval_batch_size)
    probabilities, images_for = average_members(members, table, config, runtime)
    if runtime.ranks.rank:
        return
    rows, images = table.usable_rows, images_for(members[0].statistics)
    predictions = Predictions(rows, targets[rows], probabilities[rows], lambda places: images[rows[places], 0])
    latex = tables.read_latex(config.train_source.path.with_name("classes.csv"))
    plots.write_class_accuracy(folder, "evaluation_", predictions, classes, latex, config.pictures)
    print(f"{len(rows):,} rows of {table.path}: {metrics.describe_score(score(probabilities[rows], targets[rows]))}")
    if len(classes) <= plots.LARGEST_MATRIX:
        print(metrics.describe_class_accuracy(predictions, classes))
    print(outputs.describe_end(["evaluation_class_accuracy.csv"], config.pictures, folder, started))


# ---- The command line -----------------------------------------------------------------------------------------------

COMMANDS = {
    "run": "train, predict and write the submission (the default)",
    "predict": "write the submission of checkpoints and test_probabilities.npz files, averaged",
    "evaluate": "print the metrics of checkpoints on the labelled rows of test_csv",
}


def parse_command_line(argv: list[str] | None) -> tuple[str, list[str], Config]:
    """Return command, files and Config of a command line. Exits with status 2 and one line if it is wrong."""
    command, names, settings = parse(argv, Config, PRESETS, COMMANDS, why_unused, MOST_USED)
    if settings.get("test_csv") == Config.test_csv:  # it was named, so torchvision's test part is not meant
        settings["test_csv"] = os.path.join(".", Config.test_csv)
    return command, names, Config(**settings)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit status."""
    started = time.monotonic()
    command, names, config = parse_command_line(argv)
    if launch_rank():  # rank 0 speaks for all
        sys.stdout = None  # print does nothing then
    if command == "run":
        return exit_status(lambda stops: run(config, started, stops), "the same command resumes what last.pth in "
                           f"{config.output_dir} holds, or starts over if there is none")
    work = {"predict": predict_command, "evaluate": evaluate_command}[command]
    return exit_status(lambda _: work(config, names, started), "what was not written yet is unchanged")


if __name__ == "__main__":
    end_process(main(None if "__file__" in globals() else []))  # in a notebook cell, sys.argv is the kernel's
