#!/usr/bin/env python3
"""Train a classifier of small grey images from a competition folder and write its submission.

    python script.py                                         train, validate, predict, write the submission
    python script.py --data-dir competition --output-dir out --max-minutes 20
    python script.py --folds 5                               cross-validation; one submission of the five networks' mean
    torchrun --nproc-per-node=4 script.py                    the same commands on several GPUs, or machines
    python script.py predict out/best_model.pth              a submission from a trained model, or the mean of several
    python script.py evaluate out/best_model.pth --test-csv labelled.csv

Reads   train.csv (image_path, label), test.csv (example_id, image_path) and the images below Dataset_Image/;
        or tables of pixels (label, pixel0, pixel1, ...); or torchvision:MNIST and its like.
Writes  best_model.pth, submission.csv, history.csv, class_accuracy.csv, val_probabilities.npz, run.json and pictures;
        with --folds all of it for each fold, in fold0, fold1, ..., and oof_probabilities.npz of their validation rows.
`python script.py --help` lists every setting.

The rooms, in the order of an image's way from a CSV row to a submission row. To change
     1  Config       a setting, its default, its flag; a preset
     2  Runtime      device and precision; how files are written
     3  Tables       what a CSV may hold; labels; the validation split, folds
     4  Images       decoding, the image cache, resident data, augmentation
     5  Models       a network
     6  Loss         loss, mixup, metrics
     7  Checkpoints  what best_model.pth and last.pth hold; how a run goes on
     8  Training     optimizer, schedule, averaged weights, the loop
     9  Prediction   probabilities, the neighbours' memory, ensembles, the submission
    10  Pictures     what is drawn
    11  Commands     what `run`, `predict` and `evaluate` do, in order
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import glob
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import types
import typing
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

# ==== 1. Config: every number that a user tunes; a field is also a flag (`--num-epochs 5`), its comment the help ======

Schedule = Literal["cosine", "onecycle", "cyclic", "step", "multistep", "plateau", "constant"]


@dataclass(frozen=True)
class Config:
    """All settings of a run. None ("auto" on the command line) takes the value of the model's recipe in RECIPES.

    Raises ValueError, naming the field, for a value outside its type or its limits.
    """

    # Files
    data_dir: str = "."                 # folder where relative tables and image folders are looked for
    train_csv: str = "train.csv"        # training table: image_path,label or label,pixel0,...; or torchvision:MNIST
    test_csv: str = "test.csv"          # test table: example_id,image_path or pixel0,...; evaluate: one with labels
    root_dir: str = "Dataset_Image"     # folder that the tables' image paths start from
    extra_csv: str = ""                 # another labelled table, whose rows are trained on too and never validated on
    extra_root: str = ""                # folder that its image paths start from (empty: root_dir)
    extra_weight: float = 1.0           # what each of its rows counts in the loss, where a row of train_csv counts 1
    extra_classes: bool = False         # it may hold labels that train_csv does not have
    output_dir: str = "."               # folder where everything is written
    on_bad_image: Literal["error", "skip"] = "error"  # skip: train without, and predict the commonest answer for it
    cache_dir: str = ""                 # folder of decoded and downloaded images (empty: in the user's cache folder)
    model_file: str = "best_model.pth"  # checkpoint of the best epoch, in output_dir
    submission_file: str = "submission.csv"  # what is uploaded, in output_dir
    save_probabilities: bool = False    # run, predict: write test_probabilities.npz too, which predict can average
    pictures: bool = True               # draw samples, curves, confusions, accuracy by class and predictions
    tensorboard: bool = False           # write each epoch's figures for TensorBoard too, where it is installed
    resume: bool = True                 # go on with the unfinished run that last.pth in output_dir holds
    checkpoint_minutes: float = 10.0    # minutes between two writings of last.pth (and at the ends of longer epochs)

    # Model
    model: str = "auto"                 # resnet, cnn, digit-cnn, mlp, tiny, torchvision:NAME, or auto: resnet or cnn
    weights: str = ""                   # start from: a checkpoint, torchvision (its pretrained ones) or a file of them
    freeze_epochs: int = 0              # epochs in which only the last layer learns
    normalize: Literal["none", "standard", "min-max"] = "none"  # mean and deviation of all pixels, or each one's range
    image_size: int | None = None       # side in pixels of what the network sees
    dropout: float | None = None        # dropout before the last layer (a smaller share of it in the cnn's stages)
    neighbours: int = 30                # training images nearest to an image that vote on its class (0: none do)
    neighbour_share: float = 0.2        # share of that vote in the answer; the network has the rest

    # Training
    batch_size: int | None = None       # images in a step
    learning_rate: float | None = None  # peak of the schedule
    num_epochs: int | None = None       # passes over the training rows
    min_steps: int = 600                # where num_epochs is auto, small tables get epochs enough for so many steps
    max_minutes: float = 0.0            # end the whole run within this time, if num_epochs do not before (0: no limit)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"  # how gradients become steps
    momentum: float = 0.9               # sgd: of its velocity
    weight_decay: float = 0.01          # decay of matrices and kernels (biases and batch norm have none)
    accumulate: int = 1                 # batches whose gradients are averaged for one step of the optimizer
    schedule: Schedule = "cosine"       # of the learning rate
    warmup: float = 0.2                 # share of training in which the rate rises to its peak (not cyclic, plateau)
    step_epochs: int = 5                # step: epochs between drops; cyclic: epochs from the lowest rate to the highest
    milestones: str = "10,15"           # multistep: epochs after which the rate drops
    gamma: float = 0.1                  # step, multistep: what the rate is multiplied by; cyclic: lowest share of it
    plateau_factor: float = 0.5         # plateau: what the rate is multiplied by
    plateau_patience: int = 2           # plateau: epochs without a better validation accuracy that are let pass first
    label_smoothing: float = 0.1        # share of the target that is spread over all classes
    mixup: bool = False                 # blend pairs of images and their labels (arXiv:1710.09412)
    cutmix: bool = False                # paste a part of one image into another (arXiv:1905.04899); with mixup: either
    mixup_alpha: float = 0.4            # mixup, cutmix: both parameters of the Beta distribution of the shares
    teachers: str = ""                  # checkpoints, with commas between, whose probabilities are learnt too
    teacher_share: float = 0.7          # teachers: their share of the target; the label has the rest
    max_grad_norm: float = 1.0          # gradients are clipped to this norm (0: never)
    average_decay: float = 0.999        # exponential moving average of weights and batch statistics (0: none)
    train_val_split: float = 0.9        # share of the labelled rows to train on (1: all, and keep the last epoch)
    folds: int = 0                      # train so many networks, each validated on another part of the rows (0: one)
    fold: int | None = None             # folds: train this one only, counted from 0 (auto: all, one after another)
    group_column: str = ""              # column of train_csv: rows of equal value are never split from each other
    select_by: Literal["accuracy", "loss"] = "accuracy"  # validation figure that chooses the epoch to keep
    early_stopping: int = 0             # epochs without a better one after which training ends (0: never)
    seed: int = 0                       # of the first weights and of every random draw
    split_seed: int = 42                # of the validation rows, and of nothing else

    # Augmentation: each image draws uniformly from its own range
    augment: bool = True                # warp and change the training images
    rotation: float = 10.0              # degrees to either side
    scale: float = 0.03                 # share by which an image grows or shrinks
    shear: float = 0.2                  # slant: sideways share of the height, before the stretch
    stretch: float = 0.15               # how much the width changes against the height: from e^-0.15 to e^0.15 times
    shift: float = 0.0                  # share of the side
    crop: float = 0.0                   # probability that a part of the image is cut out and scaled up
    crop_size: float = 0.8              # smallest side of that part, as a share of the image's
    perspective: float = 0.0            # how much nearer one edge is than the middle
    elastic: float = 0.05               # deviation of a 5x5 grid's smooth displacements, as a share of half the side
    thickness: float = 0.0              # share of the way to strokes that are a pixel thicker or thinner on each side
    refit: bool = True                  # rotation, shear, stretch, elastic leave ink its middle and its longer side
    brightness: float = 0.0             # share by which ink is made fainter
    contrast: float = 0.0               # bend of the grey levels between paper and full ink
    erasing: float = 0.0                # probability that a rectangle is erased
    erasing_size: float = 0.33          # longest side of that rectangle, as a share of the image's
    soften: float = 0.1                 # unwarped images of their own size: ink that each neighbour gets, as by a warp

    # Prediction
    member_weights: str = ""            # predict, evaluate: each file's share, with commas between; validation: found
    views: int = 1                      # predict, evaluate: looks at an image that are averaged, the first unchanged

    # Machine
    eval_batch_size: int | None = None  # images in a step of validation and prediction (auto: what suits the device)
    device: str = "auto"                # cpu, cuda, cuda:1, mps, or auto: the fastest that works
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"  # of the network's arithmetic
    deterministic: bool = False         # cuda: only algorithms that give the same bits every time, where there are any
    compile: bool = False               # torch.compile the network to train it: takes a minute, pays in long GPU runs
    num_workers: int = -1               # processes that decode images (-1: one a core, 0: this process)
    pin_memory: bool = True             # page-lock the batches of images too large to be kept on the GPU

    def __post_init__(self) -> None:
        for name, annotation in typing.get_type_hints(Config).items():
            check_setting(name, annotation, getattr(self, name))
        check_model(self.model)
        check_member_weights(self.member_weights)
        if not re.fullmatch(r"[0-9]+(, *[0-9]+)*", self.milestones):
            raise ValueError(f"milestones must be epochs with commas between them, not {self.milestones!r}")
        needy = "schedule plateau" if self.schedule == "plateau" else "early_stopping" if self.early_stopping else ""
        if needy and self.train_val_split == 1:
            remedy = "take another schedule" if self.schedule == "plateau" else "set early_stopping to 0"
            raise ValueError(f"{needy} needs validation rows: set train_val_split below 1, or {remedy}")
        check_folds(self)
        for name in ("model_file", "submission_file"):
            if not getattr(self, name) or Path(getattr(self, name)).name != getattr(self, name):
                raise ValueError(f"{name} must be a file's name without a folder, not {getattr(self, name)!r}; the "
                                 "folder is output_dir")
            if getattr(self, name).lower() in OWN_FILES or self.model_file.lower() == self.submission_file.lower():
                raise ValueError(f"{name} must be a name of its own, not {getattr(self, name)!r}: another file that a "
                                 "run writes is called that")


# What a run writes beside model_file and submission_file.
LAST_FILES = ("last.pth", "last.before.pth", "last.next.pth")
TEST_PROBABILITIES = "test_probabilities.npz"
JUDGEMENT_FILES = {"val_probabilities.npz", "class_accuracy.csv", "class_accuracy.png", "confusions.png",
                   "predictions.png"}
EVALUATION_FILES = {f"evaluation_{name}" for name in JUDGEMENT_FILES if not name.endswith(".npz")}
OWN_FILES = {*LAST_FILES, TEST_PROBABILITIES, *JUDGEMENT_FILES, "oof_probabilities.npz", "history.csv", "run.json",
             "class_distribution.png", "samples.png", "curves.png"}

# What a field's number may be: smallest and largest. A field that is not listed may be any number from 0 up.
LIMITS = {
    "image_size": (8, 1024), "batch_size": (2, math.inf), "eval_batch_size": (1, math.inf), "num_epochs": (1, math.inf),
    "learning_rate": (1e-9, 100), "dropout": (0, 0.95), "momentum": (0, 0.9999), "accumulate": (1, math.inf),
    "warmup": (0, 1), "step_epochs": (1, math.inf), "gamma": (1e-6, 1), "plateau_factor": (1e-6, 0.999),
    "label_smoothing": (0, 0.99), "mixup_alpha": (1e-3, math.inf), "average_decay": (0, 0.999999),
    "train_val_split": (0.01, 1), "rotation": (0, 180), "scale": (0, 0.9), "shear": (0, 2), "stretch": (0, 1),
    "shift": (0, 1), "crop": (0, 1), "crop_size": (0.1, 1), "perspective": (0, 0.45), "elastic": (0, 1),
    "brightness": (0, 1), "contrast": (0, 1), "erasing": (0, 1), "erasing_size": (0.01, 1), "soften": (0, 0.25),
    "neighbour_share": (0, 0.99), "teacher_share": (0, 1), "thickness": (0, 1), "num_workers": (-1, 1024),
    "extra_weight": (1e-6, 100), "views": (1, 1000),
}

# What "auto" stands for, by model: the best seen on validation rows for the cnn, and on a part of the data for the
# resnet's batches and epochs (benchmarks/RESULTS.md), else untuned.
RECIPES = {
    "resnet": {"image_size": 48, "batch_size": 512, "learning_rate": 4e-3, "num_epochs": 20, "dropout": 0.2},
    "cnn": {"image_size": 32, "batch_size": 128, "learning_rate": 3e-3, "num_epochs": 10, "dropout": 0.3},
    "digit-cnn": {"image_size": 28, "batch_size": 128, "learning_rate": 2e-3, "num_epochs": 20, "dropout": 0.25},
    "mlp": {"image_size": 28, "batch_size": 128, "learning_rate": 1e-3, "num_epochs": 10, "dropout": 0.0},
    "tiny": {"image_size": 28, "batch_size": 128, "learning_rate": 1e-2, "num_epochs": 20, "dropout": 0.0},
    "torchvision": {"image_size": 64, "batch_size": 128, "learning_rate": 1e-3, "num_epochs": 10, "dropout": 0.2},
}

# Nothing of our own recipe: what a preset adds to this is its own.
PLAIN = {
    "weight_decay": 0.0, "warmup": 0.0, "label_smoothing": 0.0, "average_decay": 0.0, "max_grad_norm": 0.0,
    "neighbours": 0, "dropout": 0.0, "rotation": 0.0, "scale": 0.0, "shear": 0.0, "stretch": 0.0, "elastic": 0.0,
    "refit": False, "soften": 0.0, "image_size": 28, "schedule": "constant",
}

# The recipes of the projects that this one grew out of, and for digits our own: `--preset NAME`, or
# Config(**PRESETS[NAME]). docs/origins.md says what is whose.
PRESETS = {
    "classic": PLAIN | {
        "batch_size": 32, "learning_rate": 3e-4, "weight_decay": 2e-5, "num_epochs": 20, "image_size": 48,
        "dropout": 0.5, "mixup": True, "schedule": "plateau", "max_grad_norm": 1.0, "soften": 0.1, "rotation": 15.0,
        "scale": 0.1, "shear": 0.1, "shift": 0.1, "perspective": 0.1, "brightness": 0.2, "contrast": 0.2,
        "erasing": 0.2,
    },
    "digits-resnet18": PLAIN | {
        "model": "torchvision:resnet18", "optimizer": "adam", "learning_rate": 1e-2, "schedule": "step",
        "step_epochs": 5, "gamma": 0.05, "batch_size": 32, "num_epochs": 15, "early_stopping": 10, "rotation": 10.0,
        "normalize": "standard",
    },
    "digits-cnn": PLAIN | {
        "model": "digit-cnn", "optimizer": "adam", "learning_rate": 1e-3, "schedule": "multistep",
        "milestones": "8,12", "batch_size": 64, "num_epochs": 15, "early_stopping": 8, "select_by": "loss",
        "label_smoothing": 0.1, "dropout": 0.25, "rotation": 10.0, "shift": 0.05, "normalize": "standard",
        "train_val_split": 0.8,
    },
    "digits-transfer": PLAIN | {
        "model": "torchvision:resnet50", "weights": "torchvision", "freeze_epochs": 1, "learning_rate": 3e-4,
        "schedule": "cosine", "warmup": 0.1, "batch_size": 64, "num_epochs": 6, "image_size": 64, "dropout": 0.2,
        "weight_decay": 0.01, "rotation": 10.0, "normalize": "standard", "train_val_split": 0.8,
    },
    "digits-mlp": PLAIN | {
        "model": "mlp", "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.01, "batch_size": 64, "num_epochs": 3,
        "augment": False, "normalize": "min-max", "train_val_split": 0.8, "split_seed": 42, "precision": "float32",
    },
    "digits-tiny": {
        "model": "tiny", "label_smoothing": 0.0, "neighbours": 0, "weight_decay": 1e-4, "elastic": 0.03,
        "num_epochs": 40,
    },
    "digits-fast": {
        "model": "digit-cnn", "num_epochs": 1, "learning_rate": 5e-3, "dropout": 0.0, "label_smoothing": 0.0,
        "average_decay": 0.99, "augment": False, "neighbours": 0, "pictures": False,
    },
    "digits-best": {"model": "cnn", "image_size": 28, "num_epochs": 20},
}

# The settings that `predict` takes from the command line; all others are the checkpoint's.
PREDICT_SETTINGS = {"data_dir", "train_csv", "test_csv", "root_dir", "on_bad_image", "output_dir", "cache_dir",
                    "model_file", "submission_file", "pictures", "eval_batch_size", "device", "precision",
                    "num_workers", "pin_memory", "save_probabilities", "member_weights", "views"}

# Those of them that say nothing to `run`.
PREDICT_ONLY = {"member_weights", "views"}

# Those of the arithmetic, which may be others from fold to fold: folds may be trained on several machines.
ON_MACHINE = {"precision", "eval_batch_size", "compile", "deterministic"}

# The settings that may be others when a run goes on: they change where and how, not what.
RESUME_SETTINGS = {"data_dir", "train_csv", "test_csv", "root_dir", "on_bad_image", "output_dir", "cache_dir",
                   "submission_file", "pictures", "tensorboard", "resume", "checkpoint_minutes", "max_minutes",
                   "device", "num_workers", "pin_memory", "save_probabilities", "extra_csv", "extra_root",
                   *PREDICT_ONLY}


def check_model(name: str) -> None:
    """Raise ValueError for a model's name that is none, and name the nearest."""
    if name == "auto" or name in MODELS:
        return
    known = [*MODELS, *(f"torchvision:{name}" for name in torchvision_models())]
    if name not in known:
        near = difflib.get_close_matches(name if ":" in name else f"torchvision:{name}", known, 5)
        raise ValueError(f"model must be one of auto, {', '.join(MODELS)} or torchvision's, not {name!r}"
                         + (f"; near it are {', '.join(near)}" if near else ""))


def check_member_weights(text: str) -> None:
    """Raise ValueError if member_weights is neither empty, nor `validation`, nor shares that can be used."""
    shares = [from_text(float, part) for part in text.split(",")]
    if text not in ("", "validation") and not (
            all(isinstance(share, float) and 0 <= share < math.inf for share in shares) and any(shares)):
        raise ValueError("member_weights must be validation, or numbers from 0 up with commas between them and not "
                         f"all 0, not {text!r}")


def check_folds(config: Config) -> None:
    """Raise ValueError where folds, fold, group_column and train_val_split do not go together."""
    if config.folds == 1:
        raise ValueError("folds must be 0 (one network) or at least 2, not 1")
    if config.fold is not None and config.fold >= config.folds:
        raise ValueError(f"fold must be below folds, which is {config.folds}, not {config.fold}; it counts from 0")
    if config.folds and config.train_val_split == 1:
        raise ValueError("with folds every row is validated on once: train_val_split must not be 1")
    if config.group_column == "label" or re.fullmatch(PIXEL, config.group_column):
        raise ValueError(f"group_column must be a column of its own, not {config.group_column!r}")
    if config.group_column and parts_of(config) == 1:
        raise ValueError("group_column needs train_val_split above 1/3, or folds")


def check_setting(name: str, annotation, value) -> None:
    """Raise ValueError if a field's value is not of its type, not one of its choices or outside its limits."""
    choices = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        return
    kind = choices[0] if choices else annotation  # of `int | None` the int
    if (choices and value is None) or (kind in (bool, str) and isinstance(value, kind)):
        return
    if kind in (bool, str) or isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}")
    low, high = LIMITS.get(name, (0, math.inf))
    if not low <= value <= high or value == math.inf:
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, not {value}")


def from_text(annotation, text: str):
    """A flag's text as a value of a field's type; as it is where it is none, for Config to say what is wrong."""
    kinds = typing.get_args(annotation) or (annotation,)
    if text == "auto" and types.NoneType in kinds:
        return None
    try:
        return kinds[0](text) if kinds[0] in (int, float) else text
    except ValueError:
        return text


def field_comments() -> dict[str, str]:
    """The comment behind each of Config's fields; none in a notebook's cell, whose text Python does not find."""
    with contextlib.suppress(OSError, TypeError):
        return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    return {}


def make_parser() -> argparse.ArgumentParser:
    """The command line: the commands, --preset, and a flag for every Config field with its comment as help."""
    parser = argparse.ArgumentParser(prog="script.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     usage="script.py [run | predict | evaluate] [CHECKPOINT ...] [--FIELD VALUE ...]",
                                     description="Train a classifier of small grey images and write a submission.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("words", nargs="*", metavar="COMMAND", default=[],
                        help="run (the default): train, predict and write the submission; predict: the submission of "
                             "existing checkpoints and test_probabilities.npz, averaged (default: model_file in the "
                             "output folder); evaluate: their accuracy on the labelled rows of test_csv")
    parser.add_argument("--preset", choices=PRESETS, help="start from this recipe; other flags override it")
    helps = field_comments()
    for name, annotation in typing.get_type_hints(Config).items():
        default = getattr(Config, name)
        text = f"{helps.get(name, '')} (default: {'auto' if default is None else default!r})".replace("%", "%%")
        kinds = [getattr(kind, "__name__", kind) for kind in typing.get_args(annotation) or [annotation]]
        form = {"action": argparse.BooleanOptionalAction} if annotation is bool else {
            "type": functools.partial(from_text, annotation), "metavar": "|".join(kinds).replace("NoneType", "auto")}
        parser.add_argument("--" + name.replace("_", "-"), help=text, **form)
    return parser


def parse_command_line(argv: list[str] | None) -> tuple[str, list[str], Config]:
    """Command, checkpoints and Config of a command line; exits with status 2 and one line where it is wrong."""
    parser = make_parser()
    given, unknown = parser.parse_known_intermixed_args(argv)
    settings = vars(given)
    command, *checkpoints = settings.pop("words") or ["run"]
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    if command not in ("run", "predict", "evaluate"):
        parser.error(f"unknown command {command}; the commands are run, predict and evaluate")
    if command == "run" and checkpoints:
        parser.error(f"run takes no checkpoint ({checkpoints[0]}); to use one: script.py predict {checkpoints[0]}")
    for name in sorted(settings):
        if why := why_idle(command, name):
            parser.error(f"--{name.replace('_', '-')} has no effect on {command}: {why}")
    if settings.get("test_csv") == Config.test_csv:  # it was named: torchvision's other part is not meant
        settings["test_csv"] = os.path.join(".", Config.test_csv)
    try:
        return command, checkpoints, Config(**{**PRESETS.get(settings.pop("preset", ""), {}), **settings})
    except ValueError as error:
        parser.error(str(error))


def why_idle(command: str, name: str) -> str:
    """Why a setting says nothing to a command; empty if it does say something."""
    if command == "run":
        return "it is for predict and evaluate" if name in PREDICT_ONLY else ""
    if name not in PREDICT_SETTINGS:
        return "the checkpoint holds it"
    submits = command == "predict" or name not in ("submission_file", "save_probabilities")
    return "" if submits else "it writes no submission"


def complete_config(config: Config, runtime: "Runtime", training_rows: int) -> Config:
    """The config with model and precision named and every None replaced by the recipe's value."""
    model = config.model
    if model == "auto":
        model = "cnn" if runtime.device.type == "cpu" else "resnet"
    recipe = RECIPES[model.split(":")[0]]
    config = dataclasses.replace(config, model=model, precision=runtime.precision,
                                 eval_batch_size=runtime.eval_batch_size)
    chosen = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    if "num_epochs" in chosen:
        steps = math.ceil(training_rows / (config.batch_size or recipe["batch_size"]) / config.accumulate)
        chosen["num_epochs"] = max(recipe["num_epochs"], math.ceil(config.min_steps / steps))
    return dataclasses.replace(config, **chosen)


# ==== 2. Runtime: device, precision and seeds, and how a file gets its name ===========================================

class DataError(Exception):
    """Something that the user gave is wrong: a message that names the file, the row and the remedy."""

    exit_status = 1


class UsageError(DataError):
    """A setting that cannot be used here."""

    exit_status = 2


class Stopped(KeyboardInterrupt):
    """The user or the system asks the program to end, by a signal of this number."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number


class StopSignals:
    """Makes SIGINT, SIGTERM and SIGUSR1 raise Stopped: at once, or, while they are held, when `check` is called.

    A second SIGINT is not held: it ends the process. To be entered in the main thread; in others signals stay as they
    are.
    """

    def __init__(self):
        self.held, self.waiting, self.before = False, None, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGUSR1")]  # Windows has two
            self.before = {number: signal.signal(number, self.catch) for number in numbers if number}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number: int, _frame) -> None:
        if self.waiting is not None and number == signal.SIGINT:
            os.write(2, b"stopped at once, without saving\n")  # print may be what was interrupted
            os._exit(128 + number)
        self.waiting = self.waiting or number
        if not self.held:
            raise Stopped(self.waiting)

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.waiting is not None:
            raise Stopped(self.waiting)

    @contextlib.contextmanager
    def hold(self, held: bool = True):
        """Hold signals, or let them through, inside a with statement."""
        before, self.held = self.held, held
        try:
            if not held:
                self.check()
            yield
        finally:
            self.held = before


@contextlib.contextmanager
def no_signals():
    """Let the signals that ask a program to end wait inside a with statement: what they raise while it forks is lost.

    For Python drops what is raised in its libraries' hooks for forks. What is forked inside is born without them too.
    """
    numbers = {getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGUSR1")} - {None}
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which does not fork
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def first_line(error: Exception) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


@dataclass(frozen=True)
class Part:
    """Which images of a step are a rank's own: those from `first` to before `last` of `total`.

    A rank that blends them with their neighbours has `lead` images more, which come before its own.
    """

    total: int
    first: int
    last: int
    lead: int = 0

    @property
    def places(self) -> np.ndarray:
        """Positions in the step of all images that the rank needs [lead + last - first]."""
        return np.arange(self.first - self.lead, self.last) % self.total


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started, of which this is one; each has all images, and its part of every step.

    What they do together, all must do, in the same order. One process alone does it by itself.
    """

    rank: int = 0
    count: int = 1
    local: int = 0  # rank among those of this machine
    joined: bool = False  # by torchrun, if only to one

    def part(self, total: int, lead: int = 0) -> Part:
        """This rank's part of a step of so many images; the ranks' parts differ by one at the most."""
        if not self.joined:
            return Part(total, 0, total)
        return Part(total, total * self.rank // self.count, total * (self.rank + 1) // self.count, lead)

    def agree(self, *values: float) -> list[float]:
        """The greatest of each value over the ranks, so that all decide alike; no rank waits for its GPU."""
        if not self.joined:
            return list(values)
        greatest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        return greatest.tolist()

    def add(self, values: Tensor) -> Tensor:
        """The sum of the ranks' tensors, which takes the place of each."""
        if self.joined:
            dist.all_reduce(values)
        return values

    def ask_first(self, question: Callable):
        """What rank 0 answers, for all: files that are read or written need not be everywhere."""
        answer = [question() if self.rank == 0 else None]
        if self.joined:
            dist.broadcast_object_list(answer, device=torch.device("cpu"))
        return answer[0]

    @contextlib.contextmanager
    def in_turn(self):
        """The first rank of each machine does what is inside before the others, which find what it left."""
        if self.joined and self.local:
            dist.barrier()
        yield
        if self.joined and not self.local:
            dist.barrier()


def end_with_parent() -> None:
    """Watch this process's parent from now on, and end when it was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:  # an orphan has another
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def own_rank() -> int:
    """This process's number among those that torchrun started; 0 where it did not."""
    return int(os.environ["RANK"]) if is_launched() else 0


def join_ranks(device: torch.device) -> Ranks:
    """Meet the other processes that torchrun started, if it did; leave them at the program's end."""
    if not is_launched():
        return Ranks()
    if not dist.is_initialized():
        end_with_parent()  # which a torchrun that is killed leaves alone
        # One machine may decode for hours while the others wait; that a rank has died is noticed by torchrun.
        backend, patience = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", datetime.timedelta(hours=12)
        store, rank, count = next(dist.rendezvous("env://", timeout=patience))
        # torchrun's store outlives a restart: the addresses of dead ranks are still in it (seen with torch 2.15).
        # Machines count their restarts differently: README has what several of them need.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), joined=True)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error says that another rank has gone, as gloo and NCCL say it."""
    return is_launched() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had too little memory; Apple's GPU has no error of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@contextlib.contextmanager
def memory_remedy(remedy: str):
    """Make a DataError with this remedy of a device's running out of memory inside a with statement."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DataError(f"out of memory {remedy}") from None


def warn(message: str) -> None:
    """A warning on stderr; of many ranks one gives it."""
    if own_rank() == 0:
        print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Runtime:
    """Where and how the arithmetic is done; no other room asks for the device."""

    device: torch.device
    precision: str  # float32, bf16 or fp16
    gpus: int       # how many GPUs share a batch
    eval_batch_size: int = 128
    ranks: Ranks = Ranks()

    def autocast(self) -> torch.autocast:
        """The context in which the network's forward pass runs."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "float32")

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device; channels last where that is fast and its gradients are right (not on MPS)."""
        last = self.device.type in ("cpu", "cuda")
        return model.to(self.device, memory_format=torch.channels_last if last else torch.preserve_format)

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether so many bytes may stay on the device beside the training."""
        return self.device.type != "cuda" or num_bytes * 4 < torch.cuda.mem_get_info(self.device)[0]

    def describe(self) -> str:
        """One line for the log and the run record."""
        name = platform.processor() or platform.machine()
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device) + (f" x {self.gpus}" if self.gpus > 1 else "")
        many = f", rank {self.ranks.rank} of {self.ranks.count}" if self.ranks.joined else ""
        return f"{self.device} ({name}), {self.precision}, {torch.get_num_threads()} CPU threads{many}"


def send(numbers: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device; to a GPU from page-locked memory, so that nobody waits for it."""
    values = torch.from_numpy(numbers)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def start_runtime(config: Config) -> Runtime:
    """Choose device and precision, and prove the device with a real operation.

    Raises DataError for a device that was asked for and does not work.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS first multiplies
    device = choose_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # of which all that is asked without naming one is asked
    precision = config.precision if config.precision != "auto" else best_precision(device)
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 trains on a GPU only; on a CPU take bf16 or float32")
    gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    if config.compile and gpus > 1:
        raise UsageError(f"--compile does not reach the threads in which one process uses {gpus} GPUs; start a rank on "
                         f"each (torchrun --nproc-per-node={gpus} script.py ...), or take one with --device cuda:0")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not config.deterministic  # which takes the algorithm that is fastest today
        if config.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # of what is read nothing is uninitialised
    if device.type == "cpu":
        keep_freed_memory()
    # On a CPU, the layers of more images at a time outgrow what keep_freed_memory can keep.
    eval_batch_size = config.eval_batch_size or (128 if device.type == "cpu" else 1024)
    return Runtime(device, precision, gpus, eval_batch_size, join_ranks(device))


def keep_freed_memory() -> None:
    """Let glibc keep up to a gigabyte of what is freed (mallopt(3)); nothing where there is another C library.

    Every step asks for the same megabytes again, and the faults of fresh pages take a part of its time.
    """
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, 32 << 20)  # the most that it takes
    mallopt(trim_threshold, 1 << 30)


def choose_device(wanted: str) -> torch.device:
    """The device asked for, or the first of cuda, mps and cpu that computes."""
    found = torch.accelerator.current_accelerator(check_available=True)
    name = wanted if wanted != "auto" else found.type if found else "cpu"
    if is_launched():
        name = own_device(name)
    fault = device_fault(name)
    if fault and wanted != "auto":
        raise UsageError(f"--device {wanted} does not work here: {fault}; try --device auto")
    if fault:
        warn(f"{name} is there but does not compute ({fault}); the CPU is used")
    return torch.device("cpu" if fault else name)


def own_device(name: str) -> str:
    """A rank's own device of this kind; UsageError where there is none for each."""
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: under torchrun each rank takes its own GPU, or all the CPU: --device cuda "
                         "or cpu")
    if name == "cuda" and here > torch.cuda.device_count():
        raise UsageError(f"torchrun started {here} ranks on a machine of {torch.cuda.device_count()} GPUs; give it "
                         f"--nproc-per-node {torch.cuda.device_count()}")
    return f"cuda:{local}" if name == "cuda" else name


def device_fault(name: str) -> str:
    """What goes wrong when the device computes; empty if nothing. A GPU can be listed and yet lack the kernels."""
    try:
        ones = torch.ones(8, 8, device=torch.device(name))
        return "" if (ones @ ones).sum().item() == 512 else "a matrix product came out wrong"
    except Exception as error:  # each backend raises its own kinds
        return first_line(error)


def best_precision(device: torch.device) -> str:
    """The precision that the device reports to compute in: never a timing, so that a run can be repeated."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        reports = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return "bf16" if any(getattr(torch.cpu, report, bool)() for report in reports) else "float32"
    return "float32"


def versions() -> dict[str, str]:
    """Versions of what a run's result depends on."""
    source = Path(globals().get("__file__", ""))  # a notebook's cell has no file
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source.is_file() else ""
    return {"python": platform.python_version(), "script_sha256": digest,
            **{module.__name__: str(module.__version__) for module in (torch, np, pd, PIL)}}


def seed_of(config: Config, epoch: int, step: int) -> int:
    """The seed of one step's draws: all randomness of training comes from (seed, epoch, step)."""
    return int(np.random.SeedSequence([config.seed, epoch, step]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def whole_file(path: Path):
    """Yield a name to write to; the file gets its own name only when it is whole and on the disk.

    What processes of this machine that were killed left behind of it is removed.
    """
    mark = f".{re.sub('[^A-Za-z0-9]', '', platform.node())}-"
    for left in path.parent.glob(f"{mark}*.{glob.escape(path.name)}"):
        process = left.name[len(mark):].split(".")[0]
        if process.isdigit() and not is_alive(int(process)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{mark}{os.getpid()}.{path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # the name is in the folder, which is flushed by itself
            flush(path.parent)
    except OSError as error:
        if error.errno is None:  # pandas tells of a folder that is not there in words alone
            raise OSError(errno.EIO, str(error), str(path)) from None
        if error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return when a file, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives cannot flush a folder
            raise
    finally:
        os.close(number)


def is_alive(process: int) -> bool:
    """Whether a process of this number runs on this machine; true where that cannot be known."""
    try:
        os.kill(process, 0) if os.name == "posix" else None
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def check_not_read(folder: Path, written: Iterable[str], read: Iterable[Path]) -> None:
    """Raise UsageError where one of the files to be written into a folder is one of those that are read."""
    read = list(read)
    for path in filter(Path.exists, (folder / name for name in written)):
        for other in read:
            if other.exists() and path.samefile(other):
                raise UsageError(f"{other}: is read, and would be overwritten; name another --output-dir, or keep it "
                                 "under another name")


def run_files(config: Config) -> set[str]:
    """The names of all that a run may write into its output folder, or remove there."""
    return {config.model_file, config.submission_file, *OWN_FILES}


def output_folder(config: Config) -> Path:
    """The output folder, made if need be; raises DataError before any work if it cannot be written to."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if (folder / config.model_file).is_dir() or (folder / config.submission_file).is_dir():
            raise DataError(f"{folder}: a folder stands where {config.model_file} or {config.submission_file} is to be "
                            "written")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}); name another --output-dir") from None
    return folder


@contextlib.contextmanager
def folder_to_itself(folder: Path):
    """Keep other runs of this machine out of an output folder inside a with statement; nothing on Windows.

    Raises DataError where one is in it. The system lets go of the folder when the process ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another run is writing there; wait for it, or name another --output-dir"
                            ) from None
        except OSError:  # some network drives know no locks
            pass
        yield
    finally:
        os.close(number)


# ==== 3. Tables and labels ============================================================================================

@dataclass(frozen=True, eq=False)
class Table:
    """A table's rows, and its images where they are no files of their own."""

    path: str           # what messages call it
    rows: pd.DataFrame  # label or example_id, and image_path where there is one, as text; index: the spreadsheet's row
    pixels: np.ndarray | None = None  # grey levels [N, side, side], uint8, where they stand in the table
    submission_columns: tuple[str, str] = ("example_id", "label")
    faults: dict[int, str] = field(default_factory=dict)  # why an image cannot be used, by its row's position

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad(self) -> np.ndarray:
        """Positions of the rows whose image cannot be used."""
        return np.array(sorted(self.faults), dtype=np.int64)


def open_table(config: Config, name: str, column: str, part: Literal["train", "test"]) -> Table:
    """A table by its name, with `column` (label or example_id) and its images: files, pixels or torchvision's.

    Which kind it is, is found from the file itself. The part to train on has its group_column too. Raises DataError
    naming the file, the row and the remedy.
    """
    group = config.group_column if part == "train" else ""
    if name.startswith("torchvision:") and group:
        raise UsageError(f"{name} has no column {group!r}: --group-column is for tables of your own")
    if name.startswith("torchvision:"):
        return torchvision_table(config, name, column, part)
    path = Path(config.data_dir, name)
    header = read_csv(path, ("image_path", column), nrows=0).columns.str.strip()
    if "image_path" not in header and header.str.fullmatch(PIXEL).any():
        return pixel_table(path, header, column, group)
    columns = ("image_path", "label") if column == "label" else (column, "image_path")
    rows = read_table(path, columns + (group,) * (group not in (*columns, "")))
    return Table(str(path), rows, faults=path_faults(rows.image_path, Path(config.data_dir, config.root_dir)))


def input_files(config: Config) -> list[Path]:
    """The files that a run reads and must leave as they are: its tables, what lies beside them, weights, teachers."""
    tables = [Path(name) for name in (config.train_csv, config.test_csv, config.extra_csv) if name]
    beside = [table.with_name(name) for table in tables for name in ("classes.csv", "sample_submission.csv")]
    networks = [*[Path(config.weights)] * bool(config.weights), *teacher_files(config)]
    return [*(Path(config.data_dir, name) for name in (*tables, *beside)), *networks]


def check_images_stay(config: Config, table: Table, written: set[str]) -> None:
    """Raise UsageError where an image of a table is one of the files to be written into the output folder."""
    if table.pixels is None:
        names, root = table.rows.image_path, Path(config.data_dir, config.root_dir)
        check_not_read(Path(config.output_dir), written, map(root.joinpath, names[names.str.endswith(tuple(written))]))


def path_faults(names: pd.Series, root: Path) -> dict[int, str]:
    """Why a path is not opened, by its position: an image lies below the root folder, and no link leads out of it."""
    faults = {}
    for pattern, fault in (("\0", "its path holds a NUL"), (r"^(?:[/\\]|[A-Za-z]:)", "its path is absolute"),
                           (r"(?:^|[/\\])\.\.(?:[/\\]|$)", "its path climbs out by .."),
                           (r"\\" if os.sep == "/" else "\0", "its path holds a backslash; write /")):
        for place in np.flatnonzero(names.str.contains(pattern)):
            faults.setdefault(int(place), fault)
    parts = names.str.rpartition("/")
    for folder in parts[0].drop(parts.index[list(faults)]).unique():
        outside = names_outside(os.path.join(root, folder), os.path.realpath(root))
        if outside != set():
            links = (parts[0] == folder) & (outside is None or parts[2].isin(outside))
            for place in np.flatnonzero(links):
                faults.setdefault(int(place), f"a symbolic link leads out of {root}")
    return faults


def names_outside(folder: str, root: str) -> set[str] | None:
    """The names in a folder that are links to outside of a root; None where the folder itself lies outside."""
    if not Path(os.path.realpath(folder)).is_relative_to(root):
        return None
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries
                    if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root)}
    except OSError:  # no such folder: said of each image when it is decoded
        return set()


def read_csv(path: Path, columns: tuple[str, ...], **options) -> pd.DataFrame:
    """pandas.read_csv, every cell as the text it is; its errors become a DataError with the remedy."""
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            return pd.read_csv(path, **{"dtype": str, "na_filter": False, "index_col": False, "encoding": "utf-8-sig",
                                        "skip_blank_lines": False, **options})
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; put it there, or name its folder with --data-dir") from None
    except pd.errors.ParserWarning:  # that cells beyond the header's would be lost
        raise DataError(f"{path}, row 2: more cells than the header has columns; put quotes around a cell that holds a "
                        "comma, remove commas at the rows' ends, or name the column") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path}: the file is empty; it needs the columns {', '.join(columns)}") from None
    except Exception as error:  # pandas, codecs and decompressors each raise their own
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: cannot be read ({error.strerror.lower()})") from None
        from_zero = r"(?<=EOF inside string starting at row )\d+"  # other errors of pandas count rows from 1
        what = re.sub(from_zero, lambda row: str(int(row[0]) + 1), first_line(error))
        raise DataError(f"{path}: not a readable CSV table ({what}); save it as UTF-8, "
                        "with commas between cells and quotes around a cell that holds one") from None


def without_blank_end(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the blank lines that may end its file."""
    filled = (table.fillna("") != "").any(axis=1).to_numpy().nonzero()[0]
    return table.iloc[: filled[-1] + 1 if len(filled) else 0]


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read a CSV's named columns, every cell as the text it is, and refuse cells that are empty.

    The index is the row's number in a spreadsheet (the header is row 1). Other columns are ignored. Raises DataError
    naming the file, the row and the remedy.
    """
    table = read_csv(path, columns)
    table.columns = table.columns.str.strip()
    check_columns(path, table.columns, columns)
    table = table[list(columns)].fillna("")  # a row that is too short gets NaN even so
    table = without_blank_end(table)
    table.index = pd.RangeIndex(2, len(table) + 2)
    check_cells(path, table)
    return table


PIXEL = r"pixel[0-9]+"


def pixel_table(path: Path, header: pd.Index, column: str, group: str = "") -> Table:
    """A table whose columns pixel0 (or pixel1), ... hold a square image, row by row, in grey levels of 0 to 255.

    `group` is a column to keep beside the label. Rows to predict count from 1 where they have no ids. Raises DataError
    naming the file, the row and the remedy.
    """
    names = pixel_names(path, header)
    side = math.isqrt(len(names))
    ids = id_column(path, header) if column == "example_id" else ""
    texts = ["label", *[group] * bool(group)] if column == "label" else [ids] if ids else []
    check_columns(path, header, tuple(texts))
    header = header.where(~header.duplicated(), [f"{name}, column {place}" for place, name in enumerate(header, 1)])
    kinds = {**dict.fromkeys(header, str), **dict.fromkeys(names, np.int32)}
    try:
        table = read_csv(path, tuple(texts), dtype=kinds, header=0, names=header, na_filter=True,
                         keep_default_na=False, skip_blank_lines=True)
    except DataError:
        raise DataError(pixel_fault(path, header)) from None
    pixels = table[names].to_numpy()
    rows = table[texts] if texts else pd.DataFrame({column: [str(number) for number in range(1, len(table) + 1)]})
    rows.index = pd.RangeIndex(2, len(rows) + 2)
    check_cells(path, rows)
    if pixels.min() < 0 or pixels.max() > 255:
        raise DataError(pixel_fault(path, header))
    return Table(str(path), rows.rename(columns={ids: column}), pixels.astype(np.uint8).reshape(-1, side, side),
                 (ids, "label") if ids not in ("", "ImageId") else ("ImageId", "Label"))


def id_column(path: Path, header: pd.Index) -> str:
    """The column of a pixel table that holds the rows' ids, empty where there is none; others are warned of.

    Raises DataError where it may be one or another.
    """
    others = [name for name in header if not re.fullmatch(PIXEL + r"|Unnamed: \d+|(?i:label)", name)]
    ids = [name for name in ("example_id", "ImageId") if name in others][:1]
    ids = ids or [name for name in others if re.fullmatch(r"(?i)(.*[ _])?id", name)]
    if len(ids) > 1:
        raise DataError(f"{path}: the rows' ids may stand in {' or in '.join(ids)}; rename the right one to example_id")
    if others and not ids:
        warn(f"{path}: the rows are numbered from 1 in the submission; if one of its other columns holds their ids "
             f"({', '.join(others[:5])}), rename it to id")
    return ids[0] if ids else ""


def pixel_names(path: Path, header: pd.Index) -> list[str]:
    """The pixel columns in the image's order. Raises DataError where they are not those of a square image."""
    names = sorted(header[header.str.fullmatch(PIXEL)], key=lambda name: int(name[5:]))
    side, first = math.isqrt(len(names)), int(names[0] == "pixel1")  # some count from 1
    if names != [f"pixel{number}" for number in range(first, first + side * side)]:
        raise DataError(f"{path}: {len(names)} pixel columns, {names[0]} to {names[-1]}, are no square image; one of "
                        f"{side} x {side} has pixel0 to pixel{side * side - 1}, each once")
    return names


def pixel_fault(path: Path, header: pd.Index) -> str:
    """What is wrong with the first row of a pixel table that cannot be used; without the row if it is compressed."""
    if path.suffix in (".gz", ".bz2", ".zip", ".xz", ".zst"):
        return f"{path}: not every pixel is a whole number from 0 to 255; unpack it to be told which row"
    row = 0
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            for row, cells in enumerate(csv.reader(file), start=1):
                if cells and len(cells) != len(header):
                    return f"{path}, row {row}: {len(cells)} cells under a header of {len(header)}; write the row again"
                for name, cell in zip(header, cells) if row > 1 else ():
                    if re.fullmatch(PIXEL, name) and not is_grey_level(cell):
                        return f"{path}, row {row}: {name} is {cell!r}; a pixel is a whole number from 0 to 255"
        except csv.Error as error:  # a cell longer than any table's
            return f"{path}, row {row + 1}: {first_line(error)}; is a quote not closed there?"
    return f"{path}: not every pixel is a whole number from 0 to 255"


def is_grey_level(cell: str) -> bool:
    """Whether a cell holds a whole number from 0 to 255, if with zeros behind a point."""
    return bool(re.fullmatch(r"\d+(\.0*)?", cell.strip())) and float(cell) < 256


def torchvision_table(config: Config, name: str, column: str, part: str) -> Table:
    """A part of torchvision:NAME, or torchvision:EMNIST:SPLIT, downloaded into the cache folder if it is not there.

    Classes are called as torchvision calls them; rows to predict count from 1.
    """
    from torchvision import datasets

    kind, split = (name.removeprefix("torchvision:") + ":").split(":")[:2]
    splits = datasets.EMNIST.splits if kind == "EMNIST" else ("",)
    if kind not in ("MNIST", "FashionMNIST", "KMNIST", "EMNIST") or split not in splits:
        raise UsageError(f"{name} is not known; there are torchvision:MNIST, FashionMNIST, KMNIST, and EMNIST with "
                         f"its split: torchvision:EMNIST:{', '.join(datasets.EMNIST.splits)}")
    folder = cache_folder(config)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = getattr(datasets, kind)(folder, train=part == "train", download=True,
                                           **({"split": split} if split else {}))
    except Exception as error:  # urllib, ssl, zipfile and torchvision each raise their own
        raise DataError(f"{name}: neither in {folder / kind} nor to be downloaded ({first_line(error)}); put its files "
                        f"into {folder / kind / 'raw'}, or name their folder's folder with --cache-dir") from None
    pixels = data.data.numpy().swapaxes(1, 2) if kind == "EMNIST" else data.data.numpy()  # EMNIST's lie on their side
    labels = [data.classes[number].split(" - ")[0] for number in data.targets.tolist()]  # "7 - seven" in MNIST
    cells = labels if column == "label" else [str(number) for number in range(1, len(labels) + 1)]
    return Table(name, pd.DataFrame({column: cells}, index=pd.RangeIndex(1, len(cells) + 1)),
                 np.ascontiguousarray(pixels), ("ImageId", "Label"))


def check_columns(path: Path, found: pd.Index, wanted: tuple[str, ...]) -> None:
    """Raise DataError if a column is missing or stands there twice."""
    for name in wanted:
        if name not in found:
            near = difflib.get_close_matches(name, found, 1, 0.7)
            hint = f"rename {near[0]!r}" if near else "rename the column that holds it, or name another table"
            hint = hint if len(found) > 1 else "is it separated by commas?"
            names = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
            raise DataError(f"{path}: no column {name!r} in its header ({names}); {hint}")
        if list(found).count(name) > 1 or f"{name}.1" in found:
            raise DataError(f"{path}: the column {name!r} stands there twice; remove one")


def check_cells(path: Path, table: pd.DataFrame) -> None:
    """Raise DataError for a table without rows or with an empty cell."""
    if table.empty:
        raise DataError(f"{path}: the table has a header and no rows; is it the right file?")
    for name in table.columns:
        empty = table.index[table[name].str.strip() == ""]
        if len(empty):
            more = f" (and {len(empty) - 1} more rows)" if len(empty) > 1 else ""
            raise DataError(f"{path}, row {empty[0]}{more}: {name} is empty; fill it in or remove the row")
        broken = table.index[table[name].str.contains("\r", regex=False)]
        if len(broken):
            raise DataError(f"{path}, row {broken[0]}: {name} holds a carriage return, which a submission would not "
                            "keep; remove it")


def read_train_table(config: Config) -> Table:
    """The training table, with labels of at least two classes."""
    table = open_table(config, config.train_csv, "label", "train")
    if table.rows.label.nunique() < 2:
        raise DataError(f"{table.path}: every row has the label {table.rows.label.iloc[0]!r}; "
                        "a classifier needs at least two classes")
    return table


def extra_settings(config: Config) -> Config:
    """The config with the extra table in the place of the training table; it is never split, so it needs no groups."""
    return dataclasses.replace(config, train_csv=config.extra_csv, root_dir=config.extra_root or config.root_dir,
                               group_column="")


def read_extra_table(config: Config, labels: pd.Series) -> Table:
    """extra_csv's rows, which are trained on beside those of the training table.

    Raises DataError for a label that is not among the training table's `labels`, unless extra_classes allows it.
    """
    own = extra_settings(config)
    table = open_table(own, own.train_csv, "label", "train")
    strange = table.rows.index[~table.rows.label.isin(labels)]
    if len(strange) and not config.extra_classes:
        more = f" (and {len(strange) - 1} more rows)" if len(strange) > 1 else ""
        raise DataError(f"{table.path}, row {strange[0]}{more}: the training table has no label "
                        f"{table.rows.label[strange[0]]!r}; remove the row, or allow new classes with --extra-classes")
    if table.pixels is None and not Path(own.data_dir, own.root_dir).is_dir():
        raise DataError(f"{Path(own.data_dir, own.root_dir)}: no such folder; name that of the images of {table.path} "
                        "with --extra-root")
    return table


def read_test_table(config: Config) -> Table:
    """The table to predict, with example ids. Raises DataError for an id that stands there twice."""
    table = open_table(config, test_table_name(config), "example_id", "test")
    ids = table.rows.example_id
    repeated = ids.index[ids.duplicated()]
    if len(repeated):
        example, name = ids[repeated[0]], table.submission_columns[0]
        raise DataError(f"{table.path}, row {repeated[0]}: {name} {example!r} stands already in row "
                        f"{ids.index[ids == example][0]}; each id may stand once")
    return table


def check_sample_submission(config: Config, table: Table, classes: list[str]) -> None:
    """Compare what will be handed in with sample_submission.csv beside the test table, where there is one.

    Raises DataError naming the first difference: in the columns, the ids, their order or their number, or in the kind
    of the labels.
    """
    path = Path(config.data_dir, config.test_csv).with_name("sample_submission.csv")
    if table.path.startswith("torchvision:") or not path.exists():
        return
    sample, columns = without_blank_end(read_csv(path, table.submission_columns)), list(table.submission_columns)
    if list(sample.columns) != columns:
        raise DataError(f"{path}: its columns are {', '.join(sample.columns)}; the submission's would be "
                        f"{', '.join(columns)}: is {table.path} of the same competition?")
    ids, wanted = table.rows.example_id.to_numpy(), sample[columns[0]].to_numpy()
    for place in np.flatnonzero(ids[: len(wanted)] != wanted[: len(ids)])[:1]:
        raise DataError(f"{path}, row {place + 2}: {columns[0]} is {wanted[place]!r}, in {table.path} it is "
                        f"{ids[place]!r}; the submission must have the sample's ids in its order")
    if len(ids) != len(wanted):
        raise DataError(f"{path}: has {len(wanted):,} rows, {table.path} has {len(ids):,}; the submission must have "
                        "the sample's")
    number = re.compile(r"-?[0-9]+")
    odd = [label for label in classes if not number.fullmatch(label)]
    if odd and sample[columns[1]].str.fullmatch(number).all():
        raise DataError(f"{path}: its labels are whole numbers, and {odd[0]!r} is a label of the training table")


def test_table_name(config: Config) -> str:
    """The table to predict: test_csv, or the other part of torchvision's data where none was named."""
    own = config.train_csv.startswith("torchvision:") and config.test_csv == Config.test_csv
    return config.train_csv if own else config.test_csv


def sort_classes(labels: pd.Series) -> list[str]:
    """The distinct labels: whole numbers first and by size, then the others by their characters."""
    def order(label: str):
        return (0, int(label), label) if re.fullmatch(r"-?[0-9]{1,18}", label) else (1, 0, label)

    return sorted(labels.unique(), key=order)


def class_numbers(labels: pd.Series, classes: list[str]) -> np.ndarray:
    """Each label's position among the classes, int64 [N]; -1 where it is none of them."""
    return pd.Index(classes).get_indexer(labels).astype(np.int64)


SMALLEST_CLASS_TO_SPLIT = 4


def split_rows(targets: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation rows, stratified and decided by split_seed alone.

    A class of fewer than SMALLEST_CLASS_TO_SPLIT rows stays in training; any other gives at least one row.
    """
    order = np.random.default_rng(config.split_seed).permutation(len(targets))
    shuffled = pd.Series(targets[order], index=order)
    place, size = shuffled.groupby(shuffled).cumcount(), shuffled.groupby(shuffled).transform("size")
    quota = (size * (1 - config.train_val_split)).round().clip(lower=1).clip(upper=size - 1)
    held = (place < quota) & (size >= SMALLEST_CLASS_TO_SPLIT) & (config.train_val_split < 1)
    held_out = held.sort_index().to_numpy()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def parts_of(config: Config) -> int:
    """Into how many parts whole groups of rows are dealt; 0 where rows are split one by one, by split_rows."""
    by_share = not config.folds and config.group_column and config.train_val_split < 1
    return round(1 / (1 - config.train_val_split)) if by_share else config.folds


def divide_rows(config: Config, table: Table, targets: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The part that each row is validated in [N], decided by split_seed, groups and pixels alone; -1: no usable image.

    Raises DataError where the rows are too few for their parts.
    """
    usable, parts = np.setdiff1d(np.arange(len(table)), table.bad), np.full(len(table), -1)
    pixels = pd.factorize(pd.Series(fingerprints(images))[usable])[0]
    values = table.rows[config.group_column].to_numpy()[usable] if config.group_column else pixels
    groups = join_groups(values, pixels)
    parts[usable] = deal_parts(targets[usable], groups, parts_of(config), config.split_seed)
    sizes = np.bincount(parts[usable], minlength=parts_of(config))
    if not sizes.min() or sizes.sum() - sizes.max() < 2:
        raise DataError(f"{table.path}: {len(np.unique(groups))} groups of rows that must stay together are too few "
                        f"for {parts_of(config)} parts; lower {'--folds' if config.folds else '--train-val-split'}")
    return parts


def split_table(config: Config, table: Table, targets: np.ndarray,
                images: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Positions of the usable rows to train and to validate on; and each row's part, for which images are needed."""
    parts = divide_rows(config, table, targets, images) if parts_of(config) else None
    if parts is not None:
        return *part_rows(parts, (config.fold or 0) if config.folds else nearest_part(parts, config)), parts
    train_rows, val_rows = (np.setdiff1d(rows, table.bad) for rows in split_rows(targets, config))
    lonely = val_rows[~np.isin(targets[val_rows], targets[train_rows])]  # all others of their class cannot be used
    return np.union1d(train_rows, lonely), np.setdiff1d(val_rows, lonely), None


def nearest_part(parts: np.ndarray, config: Config) -> int:
    """The part whose size is nearest to what train_val_split leaves to validation; a large group makes one larger."""
    sizes = np.bincount(parts[parts >= 0])
    return int(np.abs(sizes - (1 - config.train_val_split) * sizes.sum()).argmin())


def part_rows(parts: np.ndarray, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation rows where this part is the one to validate on."""
    return np.flatnonzero((parts != part) & (parts >= 0)), np.flatnonzero(parts == part)


def join_groups(values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Numbers of the groups that rows belong to [N]: those of an equal value, or of equal pixels, share one.

    So do two rows that others connect: images in common to two writers make one group of both.
    """
    groups, joined = None, pixels
    while not np.array_equal(groups, joined):  # the smallest number goes on to all rows of the same value or pixels
        groups = joined
        joined = pd.Series(groups).groupby(values).transform("min").groupby(pixels).transform("min").to_numpy()
    return groups


def deal_parts(targets: np.ndarray, groups: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """The part of each row [N], from 0: a group's rows in one, each class spread as evenly as the groups allow.

    The largest groups first, more or less, in an order drawn from the seed, each to the part where its classes are
    rarest. So does scikit-learn's StratifiedGroupKFold, one group after another; here single rows, nearly all of them,
    go by class.
    """
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    ranks = sizes * np.random.default_rng(seed).uniform(0.8, 1.2, len(sizes))  # single rows still come last
    order = np.lexsort((groups, -ranks[groups]))  # a group's rows stand together
    dealt, totals = np.zeros(len(targets), dtype=np.int64), np.bincount(targets)
    held = np.zeros((parts, len(totals)), dtype=np.int64)
    together, alone = np.split(order, [sizes[sizes > 1].sum()])
    for rows in np.split(together, np.flatnonzero(np.diff(groups[together])) + 1) if len(together) else ():
        own = np.bincount(targets[rows], minlength=len(totals))
        dealt[rows] = part = np.lexsort((held.sum(axis=1), held @ (own / totals.clip(min=1))))[0]
        held[part] += own
    for number in np.unique(targets[alone]):
        rows = alone[targets[alone] == number]
        dealt[rows] = fill_up(held[:, number], held.sum(axis=1), len(rows))
        held[:, number] += np.bincount(dealt[rows], minlength=parts)
    return dealt


def fill_up(held: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Parts [count] for so many single rows of a class: one at a time to the part that holds least of it.

    Among equals it goes to the smallest. `held` and `sizes` [parts] are the class's rows and all rows dealt before.
    """
    levels = np.add.outer(held, np.arange(count)).ravel()  # part by part, what it holds before each row it could get
    return np.lexsort((np.repeat(sizes, count), levels))[:count] // count


def describe_classes(classes: list[str], targets: np.ndarray, parts: int = 0) -> str:
    """One line: how many classes, how unevenly filled, and which are too small to be validated, or in every part."""
    counts = np.bincount(targets, minlength=len(classes))
    small = [label for label, count in zip(classes, counts) if 0 < count < (parts or SMALLEST_CLASS_TO_SPLIT)]
    counts = counts[counts > 0]  # others are only in the extra table
    text = (f"{len(targets):,} labelled images of {len(counts)} classes, {counts.min():,} to {counts.max():,} a class "
            f"(imbalance {counts.max() / counts.min():.1f} to 1)")
    if small:
        what = (f"{len(small)} classes have fewer rows than the {parts} parts of the split, so some parts lack them"
                if parts else "too small to be split, so trained on but not validated")
        text += (f"; {what}: {', '.join(small[:10])}"
                 + (f" and {len(small) - 10} more" if len(small) > 10 else ""))
    return text


def describe_repeats(table: Table) -> str:
    """How many rows name an image that an earlier row names, and how many of those disagree with it; empty if none."""
    if "image_path" not in table.rows:
        return ""
    paths = table.rows.image_path
    repeated = paths.duplicated()
    if not repeated.any():
        return ""
    torn = paths[table.rows.groupby("image_path").label.transform("nunique") > 1]
    text = f"; {repeated.sum():,} rows name an image that stands in the table already"
    if len(torn):
        text += (f", {torn.nunique():,} images have several labels (the first: rows "
                 f"{', '.join(map(str, paths.index[paths == torn.iloc[0]][:3]))})")
    return text


def read_symbols(config: Config) -> dict[str, str]:
    """LaTeX by label, from classes.csv beside train.csv; empty where there is none."""
    path = Path(config.data_dir, config.train_csv).with_name("classes.csv")
    try:
        table = read_table(path, ("label", "latex")) if path.exists() else pd.DataFrame({"label": [], "latex": []})
    except DataError as error:
        warn(f"{error}; pictures show labels")
        return {}
    return dict(zip(table.label, table.latex))


# ==== 4. Images: decoded once into one uint8 array, ink high and paper zero; augmented by batch on the device =========

LARGEST_IMAGE = 50_000_000  # pixels: what is larger is no drawing of a symbol, and may be made to fill the memory
CACHE_FORMAT = 2  # to be raised when decoding changes, so that older caches are not used
DECODE_CHUNK = 1000


@dataclass(frozen=True)
class ImageStatistics:
    """What is found from the training images and must be the same for every image that the model sees."""

    paper: int  # grey level of the paper: 255 for black on white, 0 for white on black
    size: int   # side in pixels of the stored images


def read_grey(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey levels [H, W], uint8, of an image's first frame, upright; and its opacity [H, W] if it has one.

    Raises what Pillow raises for a file that is not a whole image.
    """
    with open(path, "rb") as file:  # from memory, since Pillow reads a file in many small pieces
        data = file.read()
    if not data:
        raise ValueError("the file is empty")
    with warnings.catch_warnings(action="ignore"):  # of what it will refuse, or can do without
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(f"{image.width} x {image.height} pixels are too many; scale it down")
        image.load()
        if "exif" in image.info:
            with contextlib.suppress(Exception):  # what is no EXIF turns nothing
                image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits a pixel or more, which convert("L") would clip
        deep = np.nan_to_num(np.asarray(image, dtype=np.float32))
        highest = max(float(deep.max()), 65535.0)
        if deep.max() < 512:  # resampling may overshoot 1 or 255
            highest = 1.0 if image.mode == "F" and deep.max() < 2 else 255.0
        return (deep / (highest / 255)).clip(0, 255).astype(np.uint8), None
    if "A" in image.getbands() or "transparency" in image.info:
        grey, alpha = image.convert("RGBA").convert("LA").split()
        return np.asarray(grey), np.asarray(alpha)
    return np.asarray(image.convert("L")), None


def paper_of(grey: np.ndarray, alpha: np.ndarray | None) -> int:
    """The paper's grey level, 0 or 255: the border's where most of it is opaque, else the opposite of what is drawn."""
    def border(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])

    opaque = np.full(grey.shape, True) if alpha is None or not alpha.any() else alpha >= min(128, alpha.max())
    if border(opaque).mean() <= 0.5:
        return 0 if grey[opaque].mean() > 127 else 255
    return 255 if np.median(border(grey)[border(opaque)]) > 127 else 0


def bare_ink(grey: np.ndarray, alpha: np.ndarray | None, paper: int) -> np.ndarray:
    """Ink [H, W], uint8, paper 0, of an image of any shape."""
    ink = grey if paper == 0 else 255 - grey
    return ink if alpha is None else (ink.astype(np.uint16) * alpha // 255).astype(np.uint8)


def to_ink(grey: np.ndarray, alpha: np.ndarray | None, statistics: ImageStatistics) -> np.ndarray:
    """Ink [size, size], uint8, paper 0: fitted without distortion, centred on paper."""
    ink = bare_ink(grey, alpha, statistics.paper)
    size, (height, width) = statistics.size, ink.shape
    if height == width == size:
        return ink
    fitted = [max(1, round(side * size / max(height, width))) for side in (width, height)]
    page = Image.new("L", (size, size), 0)
    page.paste(Image.fromarray(ink).resize(fitted, Image.Resampling.BILINEAR),
               ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return np.asarray(page)


def read_picture(path: Path, size: int, crop: bool) -> np.ndarray:
    """A single picture's ink [size, size], uint8; paper is what its border shows; `crop` cuts the drawing out first.

    Raises DataError naming a file that cannot be used.
    """
    try:
        grey, alpha = read_grey(str(path))
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        raise DataError(f"{path}: {describe_image_fault(error)}") from None
    paper = paper_of(grey, alpha)
    if crop:
        ink = bare_ink(grey, alpha, paper)
        rows, columns = (np.flatnonzero(ink.max(axis=axis) > 127) for axis in (1, 0))
        if len(rows):
            return to_ink(ink[rows[0]: rows[-1] + 1, columns[0]: columns[-1] + 1], None, ImageStatistics(0, size))
    return to_ink(grey, alpha, ImageStatistics(paper, size))


def look_at_images(table: Table, config: Config) -> ImageStatistics:
    """Polarity and stored size, as `glance_at_images` finds them.

    Stored are the images' own pixels, or image_size where they have more than the network will see.
    """
    papers, sides = glance_at_images(table, config)
    if not papers:
        return ImageStatistics(255, config.image_size)
    return ImageStatistics(usual_paper(papers), min(max(sides), config.image_size))


def usual_paper(papers: list[int]) -> int:
    """The paper of most images."""
    return 255 if np.mean(papers) > 127 else 0


def glance_at_images(table: Table, config: Config) -> tuple[list[int], list[int]]:
    """Paper and longer side of up to 256 images of the table; unreadable ones are left for later."""
    papers, sides = [], []
    # Drawn, since every so-manyth row may be of another kind than the others.
    for place in np.random.default_rng(0).permutation(len(table))[:256].tolist():
        if place in table.faults:
            continue
        try:
            grey, alpha = (table.pixels[place], None) if table.pixels is not None else read_grey(
                os.path.join(config.data_dir, config.root_dir, table.rows.image_path.iloc[place]))
            papers.append(paper_of(grey, alpha))
            sides.append(max(grey.shape))
        except Exception:  # named with its row when all images are decoded
            continue
    return papers, sides


def warn_of_other_paper(table: Table, config: Config, statistics: ImageStatistics) -> None:
    """Say so where a table's images are white on black and those of the statistics black on white, or the reverse."""
    papers, _ = glance_at_images(table, config)
    if papers and usual_paper(papers) != statistics.paper:
        warn(f"{table.path}: its images have another paper than the training table's "
             f"({'black on white' if statistics.paper else 'white on black'}), and are read as if they had the same; "
             "invert them")


def decode_image(statistics: ImageStatistics, path: str) -> bytes | str:
    """Ink [size, size] of an image as bytes, or in a few words why it cannot be used."""
    try:
        return to_ink(*read_grey(path), statistics).tobytes()
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        return describe_image_fault(error)


def describe_image_fault(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return (getattr(error, "strerror", None) or first_line(error)).lower()


def decode_images(paths: list[str], statistics: ImageStatistics, workers: int) -> tuple[np.ndarray, dict[int, str]]:
    """Decode all paths, on so many processes (-1: one a core): ink [N, size, size] and faults by position.

    Forked where it can be: a fresh process would import torch first, which takes longer than most decoding. Raises
    DataError if one is killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(paths) // DECODE_CHUNK, cores if workers < 0 else workers, 61)  # 61: the most on Windows
    images, faults = np.zeros((len(paths), statistics.size, statistics.size), dtype=np.uint8), {}
    decode = functools.partial(decode_image, statistics)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(max(workers, 1), mp_context=context, initializer=follow_parent)
    try:
        with no_signals():  # a pool starts processes when it is given work
            results = pool.map(decode, paths, chunksize=DECODE_CHUNK) if workers else map(decode, paths)
        for position, result in enumerate(tqdm(results, "decoding", len(paths), unit="img", disable=None)):
            if isinstance(result, str):
                faults[position] = result
            else:
                images[position] = np.frombuffer(result, np.uint8).reshape(images.shape[1:])
    except BrokenProcessPool:
        raise DataError("a process that decodes images was killed, maybe since memory was short; try --num-workers 0"
                        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # if it was interrupted, nobody waits for the rest
    return images, faults


def follow_parent() -> None:
    """Leave the signals that a terminal sends to all to the parent of this decoding process, and end with it."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for name, handler in (("SIGINT", signal.SIG_IGN), ("SIGTERM", signal.SIG_DFL), ("SIGUSR1", signal.SIG_IGN)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)
    end_with_parent()


def file_identities(paths: list[str]) -> np.ndarray:
    """Size and times of change of each file, int64 [N, 3]; -1 where there is none."""
    identities = np.full((len(paths), 3), -1, dtype=np.int64)
    for position, path in enumerate(paths):
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        identities[position] = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return identities


def cache_folder(config: Config) -> Path:
    """Where decoded images and torchvision's data are kept."""
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(config.cache_dir or os.path.join(shared, "symbol-classifier"))


def cache_file(config: Config, root: Path, names: list[str], statistics: ImageStatistics) -> Path:
    """Where a table's decoded images are kept, followed by the identities of the files that they came from."""
    key = json.dumps([CACHE_FORMAT, str(root.resolve()), dataclasses.astuple(statistics), names])
    return cache_folder(config) / f"images-{hashlib.sha256(key.encode()).hexdigest()[:24]}.bin"


def read_cache(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The images as a read-only memory map, and the identities; None if there is no whole file."""
    try:
        if path.stat().st_size == math.prod(shape) + shape[0] * 24:
            identities = np.fromfile(path, np.int64, offset=math.prod(shape)).reshape(-1, 3)
            return np.memmap(path, np.uint8, "r", shape=shape), identities
    except OSError:
        pass
    return None


def write_cache(path: Path, images: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """Store the images and give them back as a memory map, or as they are if the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            file.write(images.data)
            file.write(identities.data)
        return np.memmap(path, np.uint8, "r", shape=images.shape)
    except OSError as error:
        warn(f"{path.parent}: the decoded images cannot be kept ({first_line(error)}); the next run decodes again")
        return images


def load_images(table: Table, config: Config, statistics: ImageStatistics) -> np.ndarray:
    """A table's images as ink, uint8 [N, 1, size, size]; blank where they cannot be used, which its faults then tell.

    Decodes what the cache does not hold: all, or the files that changed since.
    """
    if table.pixels is not None:
        return np.stack([to_ink(grey, None, statistics) for grey in table.pixels])[:, None]
    root, names = Path(config.data_dir, config.root_dir), table.rows.image_path.tolist()
    paths = [os.path.join(root, name) for name in names]
    cache = cache_file(config, root, names, statistics)
    identities, held = file_identities(paths), read_cache(cache, (len(names), statistics.size, statistics.size))
    changed = (held[1] != identities) | (held[1] == -1) if held else np.ones_like(identities, dtype=bool)
    changed[table.bad] = False
    stale = np.flatnonzero(changed.any(axis=1))
    if held and not len(stale):
        return held[0][:, None]
    started = time.perf_counter()
    fresh, faults = decode_images([paths[position] for position in stale], statistics, config.num_workers)
    seconds = time.perf_counter() - started
    print(f"decoded {len(stale):,} images of {table.path} in {seconds:.1f} s ({len(stale) / seconds:,.0f}/s)")
    images = np.array(held[0]) if held else np.zeros((len(paths), *fresh.shape[1:]), dtype=np.uint8)
    images[stale], held = fresh, None  # Windows replaces no file that is still mapped
    table.faults.update({int(stale[position]): fault for position, fault in faults.items()})
    identities[table.bad] = -1  # to be tried again, without the others
    return write_cache(cache, images, identities)[:, None]


def load_all_images(tables: list[Table], config: Config, statistics: ImageStatistics) -> list[np.ndarray]:
    """The images of every table, uint8 [N, 1, size, size] each.

    Raises DataError listing the first ten bad ones; if they are to be skipped, they are listed and stay blank.
    """
    root = Path(config.data_dir, config.root_dir)
    if not root.is_dir() and any(table.pixels is None for table in tables):
        raise DataError(f"{root}: no such folder; name the images' folder with --root-dir")
    loaded = [load_images(table, config, statistics) for table in tables]
    faults = [f"{table.path}, row {table.rows.index[place]}: {table.rows.image_path.iloc[place]!r}: "
              f"{table.faults[place]}" for table in tables for place in table.bad]
    if faults:
        count = f"{len(faults)} images cannot be used" if len(faults) > 1 else "1 image cannot be used"
        listed = "\n  ".join(faults[:10]) + (f"\n  and {len(faults) - 10} more" if len(faults) > 10 else "")
        for table in tables:
            if len(table.bad) == len(table):
                raise DataError(f"{table.path}: not one of its images can be used; {path_remedy(table, config)}:\n  "
                                f"{listed}")
        if config.on_bad_image == "error":
            raise DataError(f"{count}; replace each file or remove its row, or leave them out with --on-bad-image "
                            f"skip:\n  {listed}")
        warn(f"{count} and left out:\n  {listed}")
    return loaded


def path_remedy(table: Table, config: Config) -> str:
    """What may help where none of a table's images can be used."""
    name, root = table.rows.image_path.iloc[0], Path(config.data_dir, config.root_dir)
    if Path(config.data_dir, name).is_file():
        return "its paths start from --data-dir: give --root-dir . (--extra-root . for extra rows)"
    found = [path.name for path in (root / name).parent.glob(glob.escape(Path(name).name) + ".*")]
    if len(found) == 1:
        return f"write their extensions into its paths, as in {found[0]}"
    return f"if its paths do not start from {root}, name their folder with --root-dir (--extra-root for extra rows)"


def fingerprints(images: np.ndarray) -> list[bytes]:
    """A digest of each image's pixels: equal for equal images of one shape."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


class MathSymbolDataset(torch.utils.data.Dataset):
    """A table's images [N, 1, size, size] (uint8, ink high) and class numbers [N], by row; labels may be None.

    `batch` gathers rows on the device where the images fit there, else on the host. An item is (image, label) with the
    image as float ink 0..1, for use with any DataLoader.
    """

    def __init__(self, images: np.ndarray, targets: np.ndarray | None, runtime: Runtime, pin_memory: bool = True):
        with warnings.catch_warnings(action="ignore"):  # a read-only map could be written to: nobody does
            self.images = torch.from_numpy(images)
        self.targets = torch.zeros(len(images), dtype=torch.int64) if targets is None else torch.from_numpy(targets)
        self.device, resident = runtime.device, runtime.has_room_for(self.images.nbytes)
        self.pin_memory = pin_memory and runtime.device.type == "cuda" and not resident
        if resident:
            self.images, self.targets = self.images.to(self.device), self.targets.to(self.device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.images[row].float() / 255, int(self.targets[row])

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images [B, 1, size, size], uint8, and class numbers [B] of these rows, on the device.

        From the host they are gathered while the device still computes: nothing in a step waits for it.
        """
        index = send(rows, self.images.device)
        picked = self.images.index_select(0, index), self.targets.index_select(0, index)
        if self.pin_memory:
            picked = tuple(part.pin_memory() for part in picked)
        return tuple(part.to(self.device, non_blocking=self.pin_memory) for part in picked)


WARPS = ("rotation", "scale", "shear", "stretch", "shift", "crop", "perspective", "elastic")  # settings that resample


def to_input(images: Tensor, config: Config) -> Tensor:
    """What the network sees of unchanged images: uint8 [B, 1, S, S] to ink 0..1 [B, 1, image_size, image_size].

    Augmentation resamples, which softens edges; a network that was trained on soft edges is shown soft edges.
    """
    ink = images.float().div_(255)
    if ink.shape[-1] != config.image_size:
        return F.interpolate(ink, size=(config.image_size, config.image_size), mode="bilinear", align_corners=False)
    if config.augment and config.soften and any(getattr(config, name) for name in WARPS):
        ink = F.conv2d(ink, soft_kernel(config.soften, ink.device), padding=1)
    return ink


def soft_kernel(share: float, device: torch.device) -> Tensor:
    """The kernel [1, 1, 3, 3] by which each neighbour in a row or a column gets this share of a pixel's ink.

    Made on the device: a copy would be waited for.
    """
    line = F.pad(torch.full((1,), 1 - 2 * share, device=device), (1, 1), value=share)
    return torch.outer(line, line)[None, None]


ELASTIC_GRID = 5  # control points along a side of the elastic warp


@functools.lru_cache(maxsize=4)
def warp_basis(size: int, device: torch.device) -> Tensor:
    """Functions of the output pixel that a warp is a sum of: x, y, 1 and the elastic grid's bumps [28, size * size]."""
    line = (torch.arange(size, device=device) * 2 + 1) / size - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = ELASTIC_GRID**2
    bumps = F.interpolate(torch.eye(points, device=device).view(points, 1, ELASTIC_GRID, ELASTIC_GRID),
                          size=(size, size), mode="bicubic", align_corners=True)
    return torch.cat([torch.stack([x, y, torch.ones_like(x)]).flatten(1), bumps.flatten(1)])


class Draws:
    """Random numbers for each image of a step: drawn for all of it, so that a rank has those that one alone had."""

    def __init__(self, seed: int, device: torch.device, part: Part | None = None):
        self.generator, self.total, self.places = torch.Generator(device).manual_seed(seed), None, None
        if part and len(part.places) != part.total:
            self.total, self.places = part.total, send(part.places, device)

    def uniform(self, count: int, low: float, high: float, *shape: int) -> Tensor:
        """Numbers from low to high [count, ...]."""
        return self.pick(self.empty(count, shape).uniform_(low, high, generator=self.generator))

    def normal(self, count: int, deviation: float, *shape: int) -> Tensor:
        """Normal deviates [count, ...]."""
        return self.pick(self.empty(count, shape).normal_(0, 1, generator=self.generator) * deviation)

    def empty(self, count: int, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(self.total or count, *shape, device=self.generator.device)

    def pick(self, numbers: Tensor) -> Tensor:
        return numbers if self.places is None else numbers[self.places]


def draw_warps(images: Tensor, config: Config, draws: Draws) -> tuple[Tensor, Tensor]:
    """Each image's own warp: weights of warp_basis for the source's x and y [B, 2, 28], and of the horizon [B, 2]."""
    count = len(images)

    def uniform(reach: float, *shape: int) -> Tensor:
        return draws.uniform(count, -reach, reach, *shape)

    angle, slant, wide = uniform(math.radians(config.rotation)), uniform(config.shear), uniform(config.stretch).exp()
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([cos * wide, slant * cos - sin, sin * wide, slant * sin + cos], dim=1).view(count, 2, 2)
    bumps = draws.normal(count, config.elastic, 2, ELASTIC_GRID**2)
    shift = uniform(2 * config.shift, 2, 1)  # the image spans -1..1
    if config.refit:
        affine, centre = refit(images, affine, bumps)
        shift = shift + centre
    size = 1 + uniform(config.scale, 1, 1)  # the warp looks up sources, so it divides by the size
    if config.crop:
        chosen, side = draws.uniform(count, 0, 1, 2, 1, 1).unbind(1)
        side = (1 - (1 - config.crop_size) * side).where(chosen < config.crop, 1.0)
        size, shift = size / side, shift + uniform(1, 2, 1) * (1 - side)
    return torch.cat([affine / size, shift, bumps], dim=2), uniform(config.perspective, 2)


def refit(images: Tensor, affine: Tensor, bumps: Tensor) -> tuple[Tensor, Tensor]:
    """The affine parts [B, 2, 2] and shifts [B, 2, 1] with which a warp leaves each image's ink in its own place.

    Drawn symbols come cut out and scaled to fill their image: where a symbol is turned, so is what it is cut out by.
    The ink's longer side and its middle stay what they were.
    """
    basis = warp_basis(images.shape[-1], images.device)
    ink = (images > 127).flatten(2)
    unwarped = basis[:2] - bumps @ basis[3:]  # where a source goes, but for the affine part: bumps are small and smooth

    def box(points: Tensor) -> tuple[Tensor, Tensor]:
        low, high = points.where(ink, 9.0).amin(dim=2), points.where(ink, -9.0).amax(dim=2)
        return (low + high) / 2, ((high - low) / 2).amax(dim=1).clamp(min=0.1)

    middle, reach = box(basis[:2].expand_as(unwarped))
    new_middle, new_reach = box(torch.linalg.inv_ex(affine).inverse @ unwarped)
    ratio = (new_reach / reach).where(ink.any(dim=2).squeeze(1), 1.0)[:, None, None]
    return affine * ratio, affine @ (new_middle[:, :, None] - ratio * middle[:, :, None])


def augment(images: Tensor, config: Config, draws: Draws) -> Tensor:
    """Randomly warped and changed copies: uint8 [B, 1, S, S] to ink 0..1 [B, 1, image_size, image_size].

    Each image has its own draw. All geometry is one bilinear resampling, and pixels from outside are paper.
    """
    count, size = len(images), config.image_size
    weights, horizon = draw_warps(images, config, draws)
    basis = warp_basis(size, images.device)
    grid = weights.view(count * 2, -1).mm(basis).view(count, 2, -1)
    if config.perspective:
        grid = grid / (1 + horizon.mm(basis[:2])).unsqueeze(1)
    grid = grid.view(count, 2, size, size).permute(0, 2, 3, 1)
    ink = F.grid_sample(images.float().div_(255), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return erase(change_ink(change_strokes(ink, config, draws), config, draws), config, draws)


def change_strokes(ink: Tensor, config: Config, draws: Draws) -> Tensor:
    """Make each image's strokes thicker or thinner: a blend with its dilation or its erosion by 3x3 pixels."""
    if not config.thickness:
        return ink
    shares = draws.uniform(len(ink), -config.thickness, config.thickness, 1, 1, 1)
    return torch.lerp(ink, thicker(ink).where(shares > 0, thinner(ink)), shares.abs())


def thicker(ink: Tensor) -> Tensor:
    """Strokes a pixel wider at each side: ink's dilation by 3x3 pixels."""
    return F.max_pool2d(ink, 3, 1, 1)


def thinner(ink: Tensor) -> Tensor:
    """Strokes a pixel narrower at each side, the image's edge too: ink's erosion by 3x3 pixels, all paper outside."""
    return -F.max_pool2d(-F.pad(ink, (1, 1, 1, 1)), 3, 1)


def change_ink(ink: Tensor, config: Config, draws: Draws) -> Tensor:
    """Make each image's ink fainter and bend its grey levels; paper stays paper."""
    bend, fainter = draws.uniform(len(ink), 0, 1, 2, 1, 1, 1).unbind(1)
    if config.contrast:  # ink + bend * ink * (1 - ink) keeps 0, 1 and the order of greys for |bend| <= 1
        ink = ink * (1 + config.contrast * (2 * bend - 1) * (1 - ink))
    if config.brightness:
        ink = ink * (1 - config.brightness * fainter)
    return ink


def erase(ink: Tensor, config: Config, draws: Draws) -> Tensor:
    """Turn one rectangle to paper in a share of the images (arXiv:1708.04896)."""
    if not config.erasing:
        return ink
    chosen, *numbers = draws.uniform(len(ink), 0, 1, 5, 1).unbind(1)
    side = ink.shape[-1]
    line = (torch.arange(side, device=ink.device) + 0.5) / side
    inside = [(line - middle).abs() <= (extent * config.erasing_size).clamp(min=1 / side) / 2  # a pixel at the least
              for middle, extent in (numbers[:2], numbers[2:])]
    hole = inside[0][:, :, None] & inside[1][:, None, :] & (chosen < config.erasing)[:, :, None]
    return ink.masked_fill(hole[:, None], 0)


# ==== 5. Models: [B, 1, any size, any size] to logits [B, classes] ====================================================

def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm, which makes a bias superfluous."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.second = convolution(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x), inplace=True)) + self.shortcut(x), inplace=True)


class ResNetMathSymbol(nn.Sequential):
    """Residual network of 34 layers for small images: a 5x5 stem, then 3, 4, 6 and 3 blocks of 64 to 512 filters."""

    def __init__(self, num_classes: int, dropout: float = 0.5):
        super().__init__()
        self.stem = nn.Sequential(convolution(1, 64, kernel=5), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(inplace=True))
        inputs = 64
        for number, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
            first = ResidualBlock(inputs, width, stride=1 if number == 1 else 2)
            rest = [ResidualBlock(width, width, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            inputs = width
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))


class SqueezeExcitation(nn.Module):
    """Each channel times a share of 0..1 that follows from the means of all channels (arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(inplace=True),
                                  nn.Linear(squeezed, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean(dim=(2, 3)))[:, :, None, None]


class AveragePool(nn.AdaptiveAvgPool2d):
    """Means over a grid of so many cells a side; what has that many pixels a side passes as it is, at no price."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-2:] == (self.output_size, self.output_size) else super().forward(x)


class MathSymbolCNN(nn.Sequential):
    """Five 3x3 convolutions in three stages, pooled to 4x4, and a hidden layer of 512: the light network.

    Channels are weighed after the third and the fifth, where there are many.
    Pooling comes before the ReLU, which gives the same values at a quarter of the work; dropout in the stages takes
    whole channels, since neighbouring pixels tell the same.
    """

    def __init__(self, num_classes: int, dropout: float = 0.5):
        super().__init__()

        def pooled(share: float) -> list[nn.Module]:
            return [nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(inplace=True), nn.Dropout2d(dropout * share)]

        self.conv1 = nn.Sequential(convolution(1, 32), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(convolution(32, 64), *pooled(1 / 6))
        self.conv3 = nn.Sequential(convolution(64, 128), nn.ReLU(inplace=True), SqueezeExcitation(128, 16))
        self.conv4 = nn.Sequential(convolution(128, 128), *pooled(1 / 3))
        self.conv5 = nn.Sequential(convolution(128, 256), *pooled(1 / 3), SqueezeExcitation(256, 32))
        self.pool = nn.Sequential(AveragePool(4), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(256 * 16, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))


class NeighbourVote(nn.Module):
    """A trained network and the training images that it sees as an image's nearest, which vote on its class.

    Seen are the features before the last layer, in their first principal components; nearness is their cosine. Rare
    ways to draw a symbol are remembered so, which weights do not hold (the idea is that of arXiv:1911.00172, for
    language). Maps [B, 1, H, W] to logarithms of probabilities [B, classes].
    """

    COMPONENTS = 64
    TEMPERATURE = 0.03  # by which a neighbour's weight falls with its cosine

    def __init__(self, network: nn.Module, config: Config, projection: Tensor, keys: Tensor, targets: Tensor):
        super().__init__()
        self.network, self.count, self.share = network, min(config.neighbours, len(keys)), config.neighbour_share
        for name, tensor in (("projection", projection), ("keys", keys), ("targets", targets)):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        *body, head = self.network.children()
        features = nn.Sequential(*body)(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 makes the cosines of many images one
            query = F.normalize(features.float() @ self.projection, dim=1)
            cosines, places = (query @ self.keys.float().T).topk(self.count)
        probabilities = head(features).float().softmax(dim=1)
        weights = (cosines / self.TEMPERATURE).softmax(dim=1)
        vote = torch.zeros_like(probabilities).scatter_add_(1, self.targets[places], weights)
        return torch.lerp(probabilities, vote, self.share).log()


class DigitCNN(nn.Sequential):
    """Three convolution blocks with pooling and dropout, global average pooling and a hidden layer of 512."""

    def __init__(self, num_classes: int, dropout: float = 0.25):
        super().__init__()
        inputs = 1
        for number, width in enumerate((32, 64, 128), start=1):
            self.add_module(f"block{number}", nn.Sequential(
                convolution(inputs, width), nn.ReLU(inplace=True), convolution(width, width),
                nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(inplace=True), nn.Dropout2d(dropout)))
            inputs = width
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(128, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, num_classes))


class DigitMLP(nn.Sequential):
    """Two hidden layers, of 256 and 128, on the bare pixels."""

    def __init__(self, num_classes: int, dropout: float = 0.0, inputs: int = 784):
        super().__init__()
        self.flatten = nn.Flatten()
        self.hidden1 = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(inplace=True))
        self.hidden2 = nn.Sequential(nn.Linear(256, 128), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(128, num_classes))


class TinyCNN(nn.Sequential):
    """A network for digits of fewer than 8,000 parameters: narrow 3x3 convolutions and global average pooling."""

    def __init__(self, num_classes: int, dropout: float = 0.0):
        super().__init__()

        def layer(inputs: int, outputs: int, *others: nn.Module) -> nn.Sequential:
            return nn.Sequential(convolution(inputs, outputs), *others, nn.ReLU(inplace=True))

        def pool() -> nn.Module:
            return nn.MaxPool2d(2, ceil_mode=True)

        self.conv1, self.conv2 = layer(1, 8), layer(8, 16, pool())
        self.conv3, self.conv4 = layer(16, 16), layer(16, 16, pool())
        self.conv5 = layer(16, 12)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(12, num_classes))


class Normalize(nn.Module):
    """Ink less an offset, over a scale: of all pixels together, or of each; measured before training."""

    def __init__(self, *size: int):
        super().__init__()
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self.scale


MODELS = {"resnet": ResNetMathSymbol, "cnn": MathSymbolCNN, "digit-cnn": DigitCNN, "mlp": DigitMLP, "tiny": TinyCNN}


def torchvision_models() -> list[str]:
    """The names of torchvision's classifiers."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def torchvision_network(name: str, image_size: int, weights: dict | None) -> nn.Module:
    """torchvision's own network, of three colours and 1,000 classes; with a state dict's weights if there is one."""
    import torchvision

    options = {"image_size": image_size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": weights is not None, "init_weights": weights is None}
    try:
        network = torchvision.models.get_model(name, **options)
    except (AssertionError, ValueError) as error:  # a size that is no multiple of a transformer's patch
        raise UsageError(f"--model torchvision:{name} cannot take images of {image_size} pixels ({first_line(error)}); "
                         "name another --image-size, such as 224") from None
    if weights is not None:
        network.load_state_dict(weights)
        network.aux_logits = False
        for branch in {"aux1", "aux2", "AuxLogits"} & dict(network.named_children()).keys():
            setattr(network, branch, None)
    return network


def torchvision_model(config: Config, num_classes: int, weights: dict | None = None) -> nn.Module:
    """torchvision's network for images of one channel: all but its last layer, then a new last layer.

    `weights` are a state dict of the network as torchvision has it; those of the three colours are added up.
    """
    network = torchvision_network(config.model.removeprefix("torchvision:"), config.image_size, weights)
    layers = list(network.named_modules())
    colours = next((layer for _, layer in layers if isinstance(layer, nn.Conv2d)), None)
    last = next((place for place, layer in reversed(layers)
                 if isinstance(layer, nn.Linear) and layer.out_features == 1000), None)
    if colours is None or last is None:
        raise UsageError(f"--model {config.model} has no last linear layer to be replaced; take another")
    colours.in_channels, colours.weight = 1, nn.Parameter(colours.weight.detach().sum(dim=1, keepdim=True))
    head = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(network.get_submodule(last).in_features, num_classes))
    network.set_submodule(last, nn.Identity())
    return nn.Sequential(OrderedDict(body=network, head=head))


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The config's network with weights drawn from the config's seed; its last layer is its last child, `head`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config, 0, 0))
        if config.model in MODELS:
            inputs = {"inputs": config.image_size**2} if config.model == "mlp" else {}
            model = MODELS[config.model](num_classes, config.dropout, **inputs)
        else:
            model = torchvision_model(config, num_classes)
    if config.normalize == "none":
        return model
    side = config.image_size if config.normalize == "min-max" else 1
    return nn.Sequential(OrderedDict([("normalize", Normalize(1, 1, side, side)), *model.named_children()]))


def summarize_model(model: nn.Module, config: Config) -> str:
    """A table of a network's layers: name, shape of what comes out, parameters; UsageError for too small an image."""
    size = config.image_size
    lines, x = [f"  {'layer':<10}{'output':>16}{'parameters':>14}"], torch.zeros(1, 1, size, size)
    try:
        with torch.inference_mode():
            for name, layer in copy.deepcopy(model).cpu().eval().named_children():
                x, count = layer(x), sum(weight.numel() for weight in layer.parameters())
                lines.append(f"  {name:<10}{' x '.join(map(str, x.shape[1:])):>16}{count:>14,}")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--model {config.model} cannot take images of {size} pixels ({first_line(error)}); name "
                         "another --image-size, such as 224") from None
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    name = MODELS[config.model].__name__ if config.model in MODELS else config.model
    return "\n".join([f"{name}, {millions:.2f} million parameters, {size} x {size} input", *lines])


# ==== 6. Loss, mixup, metrics =========================================================================================

def mixup_data(images: Tensor, targets: Tensor, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """Blend each image [B, 1, H, W] with its neighbour in the batch, and their targets [B, K] alike (arXiv:1710.09412).

    Batches are shuffled, so a neighbour is anyone. The batch shares one draw of Beta(alpha, alpha).
    """
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    return torch.lerp(images.roll(1, 0), images, share), torch.lerp(targets.roll(1, 0), targets, share)


def cutmix_data(images: Tensor, targets: Tensor, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of its neighbour in the batch into each image, and blend their targets by area.

    The batch shares the rectangle, whose area is 1 less a draw of Beta(alpha, alpha) (arXiv:1905.04899).
    """
    draws, side = np.random.default_rng(seed), images.shape[-1]
    extent = side * math.sqrt(1 - draws.beta(alpha, alpha))
    centre, inside = draws.uniform(0, side, 2), torch.zeros_like(images[:1], dtype=torch.bool)
    low, high = (np.clip(np.round(centre + sign * extent / 2), 0, side).astype(int) for sign in (-1, 1))
    inside[..., low[0]:high[0], low[1]:high[1]] = True
    share = 1 - float(np.prod(high - low)) / side**2
    return images.roll(1, 0).where(inside, images), torch.lerp(targets.roll(1, 0), targets, share)


def mix(images: Tensor, targets: Tensor, config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """The batch as mixup or cutmix leave it; with both, the seed chooses one of them."""
    if config.cutmix and (seed % 2 or not config.mixup):
        return cutmix_data(images, targets, config.mixup_alpha, seed)
    return mixup_data(images, targets, config.mixup_alpha, seed) if config.mixup else (images, targets)


def weighted_loss(logits: Tensor, targets: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    """The mean over the batch of each row's weight [B] (None: 1) times its cross-entropy with its targets [B, K]."""
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    return (weights * F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")).mean()


def score(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Cross-entropy, accuracy, top-3 and mean per-class accuracy of probabilities [N, K]; accuracies as fractions.

    A class without a row among the targets does not count in the per-class mean.
    """
    true = probabilities[np.arange(len(targets)), targets]
    before = np.arange(probabilities.shape[1]) < targets[:, None]  # of equals the first comes first, as in argmax
    ahead = (probabilities > true[:, None]) | (before & (probabilities == true[:, None]))
    among_three = ahead.sum(axis=1) < 3
    hits = probabilities.argmax(axis=1) == targets
    counts = np.bincount(targets)
    per_class = np.bincount(targets, weights=hits)[counts > 0] / counts[counts > 0]
    return {"val_loss": float(-np.log(np.maximum(true, 1e-12)).mean()), "val_accuracy": float(hits.mean()),
            "val_top3_accuracy": float(among_three.mean()), "val_class_accuracy": float(per_class.mean())}


# ==== 7. Checkpoints ==================================================================================================

def digest(content) -> str:
    """SHA-256 of tensors and plain values in dictionaries, lists and tuples."""
    total = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, (dict, list, tuple)):
            total.update(f"{'dict' if isinstance(value, dict) else 'list'} {len(value)}".encode())
            for part in value.items() if isinstance(value, dict) else value:
                add(part)
        else:
            total.update(repr(value).encode())

    add(content)
    return total.hexdigest()


def write_content(path: Path, content: dict) -> None:
    """Write a dictionary with its digest, as torch.save does; it gets its name when it has been read back unchanged."""
    buffer = io.BytesIO()  # torch reports a full disk as an error of its own
    torch.save({**content, "sha256": digest(content)}, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        flush(temporary)
        read_content(temporary)


def read_data(path: str | Path) -> dict:
    """A dictionary of tensors and plain values that torch saved: data, never code."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that it will refuse
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose own text tells to load it as code
        raise ValueError("it is no file of tensors and plain values that torch wrote") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary")
    return content


def read_content(path: str | Path) -> dict:
    """What write_content wrote. Raises ValueError where a bit of it has changed since."""
    content = read_data(path)
    if content.pop("sha256", None) != digest(content):
        raise ValueError("its content is not what was written: the SHA-256 differs, or is missing")
    return content


@dataclass(frozen=True)
class Trained:
    """A network with what it needs to be used."""

    model: nn.Module
    config: Config
    classes: list[str]
    statistics: ImageStatistics
    metrics: dict
    labels: str = ""  # the digest of its training table's labels; of earlier versions' checkpoints none

    @property
    def alone(self) -> "Trained":
        """The same without the training images that vote beside the network."""
        model = self.model.network if isinstance(self.model, NeighbourVote) else self.model
        return dataclasses.replace(self, model=model)


def save_checkpoint(path: Path, trained: Trained) -> None:
    """Write all that prediction needs: plain weights, settings, classes, how images are prepared, and the memory."""
    memory = trained.model.named_buffers(recurse=False) if isinstance(trained.model, NeighbourVote) else ()
    write_content(path, {
        "model": {name: value.detach().cpu() for name, value in trained.alone.model.state_dict().items()},
        "memory": {name: value.cpu() for name, value in memory},
        "config": dataclasses.asdict(trained.config), "classes": trained.classes,
        "image_statistics": dataclasses.asdict(trained.statistics), "metrics": trained.metrics,
        "labels": trained.labels, "versions": versions()})


def digest_of_labels(labels: Iterable[str]) -> str:
    """SHA-256 of a table's labels in their order, by which rows that were held out are found again."""
    return hashlib.sha256("\n".join(labels).encode()).hexdigest()


def saved_config(content: dict) -> Config:
    """The config that a checkpoint holds, without what earlier versions of it had."""
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in content["config"].items() if name in known})


def load_checkpoint(path: Path) -> Trained:
    """Read a checkpoint as data, never as code. Raises DataError for a file that is not a whole checkpoint of ours."""
    try:
        content = read_content(path)
        config = saved_config(content)
        model = build_model(config, len(content["classes"]))
        model.load_state_dict(content["model"])
        if content.get("memory"):
            model = NeighbourVote(model, config, **content["memory"])
        return Trained(model, config, content["classes"], ImageStatistics(**content["image_statistics"]),
                       content["metrics"], content.get("labels", ""))
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint; train one with `python script.py`") from None
    except Exception as error:  # zipfile, pickle and torch each raise their own
        raise DataError(f"{path}: not a whole checkpoint of script.py ({type(error).__name__}: {first_line(error)}); "
                        "train again, or name another") from None


def read_weights(config: Config, classes: list[str]) -> dict[str, Tensor]:
    """What `weights` names: of a checkpoint of ours, of torchvision's download, or of a file of torchvision's.

    Without the last layer where the classes are others, and without normalisation, which is measured.
    """
    if config.weights == "torchvision":
        import torchvision

        weights = torchvision.models.get_model_weights(config.model.removeprefix("torchvision:")).DEFAULT
        state = weights.get_state_dict(progress=False, check_hash=True)
    else:
        state = read_data(config.weights)
    if "classes" in state:  # a checkpoint of ours
        state = read_content(config.weights)
        left_out = ("normalize.",) if state["classes"] == classes else ("normalize.", "head.")
        if state["classes"] == classes:
            warn_of_seen_rows(saved_config(state), config)
        return {key: value for key, value in state["model"].items() if not key.startswith(left_out)}
    if config.model in MODELS:
        raise ValueError("it is no checkpoint of script.py")
    state = torchvision_model(config, len(classes), state).state_dict()
    return {key: value for key, value in state.items() if key.startswith("body.")}


def warn_of_seen_rows(other: Config, config: Config) -> None:
    """Say so where the checkpoint to start from, of this other config, left other rows to validation."""
    if split_settings(other) != split_settings(config) and config.train_val_split < 1:
        warn(f"--weights {config.weights}: was trained with {describe_split(other)}; if on these images, it has seen "
             "rows that validate now, and their accuracy comes out too high")


def load_weights(model: nn.Module, config: Config, classes: list[str]) -> None:
    """Start a network from `weights`. Raises DataError, with every remedy, where they cannot be used."""
    remedy = "name a checkpoint of this model with --weights FILE"
    if config.model not in MODELS:
        name = config.model.removeprefix("torchvision:")
        remedy = (f"name a file with torchvision's weights of {name} with --weights FILE (as they are at "
                  "download.pytorch.org/models), or let --weights torchvision download them where there is a network")
    elif config.weights == "torchvision":
        raise UsageError(f"--weights torchvision: torchvision has none for --model {config.model}; {remedy}")
    try:
        state, own = read_weights(config, classes), model.state_dict()
        others = [key for key, value in state.items() if key not in own or own[key].shape != value.shape]
        others += [key for key in own if key not in state and not key.startswith(("head.", "normalize."))]
        if others:
            raise ValueError(f"it is of another network, with another {others[0]}")
        model.load_state_dict(state, strict=False)
    except Exception as error:  # urllib, pickle and torch each raise their own
        fault = " ".join(str(error).split()[:40])  # torch names the layer that does not fit in a second line
        raise DataError(f"--weights {config.weights}: cannot be used ({type(error).__name__}: {fault}); "
                        f"{remedy}") from None


@dataclass
class Progress:
    """Where a training stands between two steps: what `fit` needs to go on, beside the learner's state."""

    epoch: int = 1
    steps: int = 0                          # of this epoch that lie behind
    images: int = 0                         # in them
    sums: list[float] = field(default_factory=lambda: [0.0] * 3)  # loss, hits and images of those with a finite loss
    seconds: float = 0.0                    # of this epoch
    trained: float = 0.0                    # seconds of the training so far
    faults: float = 0.0                     # steps that had been left out before this epoch
    history: list[dict] = field(default_factory=list)  # the rows of the epochs before
    best: dict | None = None                # the best of them
    setbacks: int = 0                       # how often training went back to a sound state

    def turn_over(self, row: dict, better: bool, faults: float) -> None:
        """Enter an epoch's row, and turn to the next epoch."""
        self.history.append(row)
        self.best = row if better else self.best
        self.epoch, self.steps, self.images, self.sums, self.seconds = self.epoch + 1, 0, 0, [0.0] * 3, 0.0
        self.faults = faults


MOST_SETBACKS = 3   # returns of a training to a sound state
LEAST_SECONDS = 10  # between two writings at the ends of epochs: on a GPU one may take a second, and writing as long


class RunKeeper:
    """Keeps a training's state: in memory, to go back to, and in last.pth, from which another process can go on.

    Without a path it keeps it in memory alone. `about` tells one run from another: settings, data, classes, device.
    Of many ranks the first one reads and writes.
    """

    def __init__(self, config: Config, path: Path | None = None, about: dict | None = None,
                 stops: StopSignals | None = None, ranks: Ranks = Ranks(), started: float | None = None):
        self.config, self.path, self.about, self.stops = config, path, about or {}, stops or StopSignals()
        self.found, self.saved, self.ranks = None, time.monotonic(), ranks
        self.started = self.saved if started is None else started  # when this process began with the run
        self.took = 0.0  # seconds of the last writing
        if path and config.resume:
            self.found = ranks.ask_first(self.find)

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """last.pth, the one before it, and the next one, which is whole before it takes its name."""
        return tuple(self.path.with_name(name) for name in LAST_FILES)

    @property
    def elapsed(self) -> float:
        """Seconds that the run took in the processes before this one."""
        return self.found["elapsed"] if self.found else 0.0

    def find(self) -> dict | None:
        """The state that an unfinished run left behind. Raises DataError if it is another run's, or spoilt."""
        faults = []
        for path in self.files[:2]:
            try:
                found = read_content(path)
                difference = describe_difference(found["about"], self.about)
            except FileNotFoundError:
                continue
            except Exception as error:  # zipfile, pickle and torch each raise their own
                faults.append(f"{path}: cannot be used ({type(error).__name__}: {first_line(error)})")
                continue
            if difference:
                raise DataError(f"{path}: holds an unfinished run with {difference}; give its settings to go on with "
                                "it, or --no-resume to start over")
            for fault in faults:
                warn(f"{fault}; the one before it is taken")
            if best := found["progress"]["best"]:
                self.check_best(path, best["epoch"])
            return found
        if faults:
            raise DataError(f"{faults[0]}; remove it, or start over with --no-resume")
        return None

    def check_best(self, path: Path, epoch: int) -> None:
        """Raise DataError where the network that an unfinished run has kept is gone, or spoilt."""
        try:
            read_content(self.path.with_name(self.config.model_file))
        except Exception as error:  # zipfile, pickle and torch each raise their own
            what = "gone" if isinstance(error, FileNotFoundError) else f"spoilt ({first_line(error)})"
            raise DataError(f"{path}: holds an unfinished run whose {self.config.model_file}, of epoch {epoch}, is "
                            f"{what}; put it back, or start over with --no-resume") from None

    def begin(self, learner: "Learner", data: "TrainingData", pace: "Pace") -> Progress:
        """Where training starts or goes on. What an earlier run left is let go of here, when nothing can be wrong."""
        if not self.found:
            if self.path and self.config.folds and self.ranks.rank == 0:
                self.path.with_name("run.json").unlink(missing_ok=True)  # by which a fold counts as finished
            self.discard()
            progress = Progress()
            self.remember(learner, progress)
            return progress
        try:
            progress = self.recall(self.found, learner)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.files[0]}: does not fit the network or the optimizer that script.py has now "
                            f"({first_line(error)}); give it back those of the unfinished run, or start over with "
                            "--no-resume") from None
        self.state = self.found.get("epoch_start") or self.found
        print(f"goes on from {self.files[0].name}: epoch {progress.epoch} of {self.config.num_epochs}, "
              f"step {progress.steps} of {steps_in_epoch(data.train_rows, self.config)}, after "
              f"{progress.trained / 60:.1f} minutes of training")
        other = [name for name, version in self.versions().items() if self.found["versions"].get(name) != version]
        if other:
            warn(f"the run began with another {', '.join(other)}: it may not end with the same bits as if it had never "
                 "been stopped")
        pace.go_on(progress.trained)
        return progress

    def recall(self, state: dict, learner: "Learner") -> Progress:
        """Put the learner into a state; gives the progress that belongs to it."""
        learner.restore(state["learner"])
        return Progress(**copy.deepcopy(state["progress"]))

    def picture(self, learner: "Learner", progress: Progress) -> dict:
        """A state, copied."""
        return {"learner": learner.state(), "progress": dataclasses.asdict(progress)}

    def remember(self, learner: "Learner", progress: Progress) -> dict:
        """Keep a state in memory, to go back to; gives it."""
        self.state = self.picture(learner, progress)
        return self.state

    def is_due(self) -> bool:
        """Whether it is time to save."""
        return bool(self.path) and time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes

    def save(self, learner: "Learner", progress: Progress, pace: "Pace", least: float = 0.0) -> None:
        """Write a state to the disk, where the one before it stays, if that is `least` seconds ago.

        Or more, so that writing takes no more than a twentieth of the time; 0 is at once. An epoch's beginning is kept
        in memory too. It alone is gone back to, so that it makes no difference when a state was saved.
        """
        progress.trained, begun = pace.spent, time.monotonic()
        now = self.remember(learner, progress) if not progress.steps else self.picture(learner, progress)
        if self.path and begun - self.saved >= (least and max(least, 20 * self.took)):
            if self.ranks.rank == 0:
                self.write(now)
            self.saved = time.monotonic()
            self.took = self.saved - begun

    def stop(self, learner: "Learner", progress: Progress, pace: "Pace", number: int) -> Stopped:
        """Save, for a signal of this number; gives what is to be raised."""
        self.save(learner, progress, pace)
        command = "the same command"
        if not self.config.resume:
            alone = f" with --fold {self.config.fold}," if self.config.folds else ""
            command = f"the same command{alone} without --no-resume"
        return Stopped(number, f"saved in {self.files[0]}; {command} goes on from there" if self.path else "")

    def write(self, now: dict) -> None:
        """Write a state to last.pth, with that of its epoch's beginning; the one before it stays beside it."""
        last, before, following = self.files
        start = {} if now is self.state else {"epoch_start": {name: self.state[name] for name in now}}
        elapsed = self.elapsed + time.monotonic() - self.started
        write_content(following, {**now, **start, "about": self.about, "elapsed": elapsed,
                                  "versions": self.versions()})
        if last.exists():
            os.replace(last, before)
        os.replace(following, last)

    def versions(self) -> dict:
        """What the bits of a training depend on beside the run's own."""
        return {**versions(), "number of ranks": self.ranks.count}

    def go_back(self, learner: "Learner", progress: Progress, pace: "Pace") -> Progress:
        """Return to the last sound state, to learn at half the rate; DataError after too many such returns."""
        count = progress.setbacks + 1
        if count > MOST_SETBACKS:
            raise DataError(f"training diverges: no finite numbers in epoch {progress.epoch}, even at "
                            f"{learner.rate:g} of the rate; start over with --no-resume and a --learning-rate below "
                            f"{self.config.learning_rate:g}"
                            + (f"; {self.config.model_file} holds epoch {progress.best['epoch']}" if progress.best else
                               ""))
        wrong, progress = progress.epoch, self.recall(self.state, learner)
        progress.setbacks = count
        learner.slow_down()
        self.remember(learner, progress)  # with its rate and its count
        print(f"no finite numbers in epoch {wrong}: back to epoch {progress.epoch}, step "
              f"{progress.steps}, with {learner.rate:g} of the rate", flush=True)
        self.save(learner, progress, pace)
        return progress

    def discard(self) -> None:
        """Remove what was saved: the run is over, or starts over."""
        for path in self.files if self.path and self.ranks.rank == 0 else ():
            path.unlink(missing_ok=True)


def identify_run(config: Config, data: "TrainingData", runtime: Runtime) -> dict:
    """What makes a run the run that it is: its settings, its training data, its device."""
    total = hashlib.sha256()
    for values in (data.targets, data.train_rows, data.val_rows, data.dataset.images.cpu().numpy(),
                   *([] if data.weights is None else [data.weights.cpu().numpy()])):
        total.update(np.ascontiguousarray(values).data)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in RESUME_SETTINGS}
    teachers = [] if data.taught is None else teacher_digests(config)
    return {"settings": settings, "classes": data.classes, "data": total.hexdigest(),
            "device": runtime.device.type, "taught": teachers}


def describe_difference(found: dict, own: dict) -> str:
    """What distinguishes two runs, in a few words; empty if nothing does."""
    settings = [f"--{name.replace('_', '-')} {value} (not {own['settings'].get(name)})"
                for name, value in found["settings"].items() if own["settings"].get(name) != value]
    if settings:
        return ", ".join(settings[:5])
    if found["classes"] != own["classes"]:
        return f"{len(found['classes'])} other classes"
    if found["data"] != own["data"]:
        return "other training rows or images"
    if (found.get("taught") or []) != own["taught"]:
        return "other teachers"
    return f"device {found['device']} (not {own['device']})" if found["device"] != own["device"] else ""


# ==== 8. Training =====================================================================================================

@dataclass(frozen=True, eq=False)
class Batch:
    """The images of a step, or a rank's part of them, and what is to be learnt of them."""

    images: Tensor                 # uint8 [B, 1, S, S]
    classes: Tensor                # class numbers [B]
    taught: Tensor | None = None   # what the teachers say: probabilities [B, classes]
    weights: Tensor | None = None  # what each image counts in the loss [B]; None: 1
    part: Part | None = None       # which images of the step these are; None: all


@dataclass(frozen=True)
class TrainingData:
    """What `fit` learns from: a dataset with its labels and the positions of its training and validation rows."""

    dataset: MathSymbolDataset
    targets: np.ndarray
    classes: list[str]
    statistics: ImageStatistics
    train_rows: np.ndarray
    val_rows: np.ndarray
    parts: np.ndarray | None = None  # which part, or fold, validates each row; None where rows are split one by one
    taught: Tensor | None = None  # what the teachers say of every row: probabilities [rows, classes], float16
    weights: Tensor | None = None  # what every row counts in the loss [rows], float32; None: 1
    extra: int = 0  # how many rows, the last ones, are not of the training table
    extra_rows: np.ndarray | None = None  # which of these have a usable image

    @property
    def own_targets(self) -> np.ndarray:
        """The class numbers of the training table's rows."""
        return self.targets[: len(self.targets) - self.extra]

    def batch(self, rows: np.ndarray, part: Part | None = None) -> Batch:
        """The step on these rows, or a rank's part of it."""
        own = rows[part.places] if part else rows
        taught, weights = (None if known is None else known[send(own, known.device)]
                           for known in (self.taught, self.weights))
        return Batch(*self.dataset.batch(own), taught, weights, part)


def start_model(config: Config, data: TrainingData, runtime: Runtime, fresh: bool = True) -> nn.Module:
    """The network to train, on the device: with the weights to start from, if `fresh`, and normalisation measured."""
    model = build_model(config, len(data.classes))
    if config.weights and fresh:  # a run that goes on has its own
        load_weights(model, config, data.classes)
    model = runtime.place(model)
    if config.normalize != "none":
        measure_normalization(model.normalize, data, config)
    return model


def measure_normalization(layer: Normalize, data: TrainingData, config: Config) -> None:
    """Set offset and scale from the training images: mean and deviation, or each pixel's least value and range."""
    count, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    for rows in np.array_split(data.train_rows, math.ceil(len(data.train_rows) / 1024)):
        ink = to_input(data.dataset.batch(rows)[0], config).cpu()  # Apple's GPU has no float64
        count, total = count + ink.numel(), total + ink.double().sum()
        squares = squares + ink.double().square().sum()
        low = ink.amin(dim=0, keepdim=True).clamp(max=low)
        high = ink.amax(dim=0, keepdim=True).clamp(min=high)
    if config.normalize == "standard":
        low = total / count
        high = low + (squares / count - low**2).clamp(min=0).sqrt()
    layer.offset.copy_(low)
    layer.scale.copy_((high - low).where(high > low, 1.0))  # a pixel that never changes tells nothing


class Pace:
    """How far training is, from 0 to 1: by its steps, or by the clock where the time ends first."""

    def __init__(self, steps: int, seconds: float = math.inf):
        self.steps, self.seconds, self.started = steps, max(seconds, 1e-9), time.monotonic()

    def go_on(self, spent: float) -> None:
        """Count so many seconds that were trained before, and are no part of the time there is."""
        self.started, self.seconds = self.started - spent, self.seconds + spent

    @property
    def spent(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self.started

    def progress(self, step: int) -> float:
        """Share of the training that lies behind before this step."""
        return min(1.0, max(step / self.steps, self.spent / self.seconds))


def schedule_factor(config: Config, progress: float) -> float:
    """What the peak learning rate is multiplied by, of the progress 0..1: a warm-up, then what the schedule says.

    cosine: half a cosine to zero; onecycle: a warm-up by half a cosine too (arXiv:1708.07120); cyclic: up and down in
    straight lines (arXiv:1506.01186); step, multistep: times gamma at each drop.
    """
    epochs = progress * config.num_epochs + 1e-9
    if config.schedule == "cyclic":
        return config.gamma + (1 - config.gamma) * (1 - abs(epochs / config.step_epochs % 2 - 1))
    if progress < config.warmup:
        share = progress / config.warmup
        return max(0.5 - 0.5 * math.cos(math.pi * share) if config.schedule == "onecycle" else share, 1e-3)
    if config.schedule in ("cosine", "onecycle"):
        return max(0.5 + 0.5 * math.cos(math.pi * (progress - config.warmup) / max(1 - config.warmup, 1e-9)), 1e-4)
    if config.schedule == "step":
        return config.gamma ** (epochs // config.step_epochs)
    if config.schedule == "multistep":
        return config.gamma ** sum(epochs >= int(drop) for drop in config.milestones.split(","))
    return 1.0


FAULT_LIMIT = 10   # steps in a row without finite numbers, after which training goes back
LEAST_SCALE = 1e-4  # of fp16's losses: halved so often, gradients are not too large for it but no numbers
FAULT_STEPS = 50   # steps between two looks at them, for which the device is waited for


class AveragedWeights:
    """Exponential moving average of weights and batch-norm statistics, with a decay that warms up.

    torch's AveragedModel counts its updates on the device: a decay that depends on the count would wait for it. And it
    would keep a value that is not finite for ever.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False).eval(), decay
        pairs = zip(self.model.state_dict().values(), model.state_dict().values())
        self.averages, self.sources = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        # One step downhill on half the squared distance is that of a moving average, and can be left out on the device
        self.optimizer = torch.optim.SGD(self.averages, lr=1.0, fused=can_fuse(self.averages[0].device))

    def update(self, step: int, sound: Tensor) -> None:
        """Move the averages towards the weights after this step (counted from 0), if these are sound: 1, and not 0."""
        self.optimizer.param_groups[0]["lr"] = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, distance in zip(self.averages, torch._foreach_sub(self.averages, self.sources)):
            average.grad = distance
        step_if_sound(self.optimizer, sound)
        self.optimizer.zero_grad(set_to_none=True)


def can_fuse(device: torch.device) -> bool:
    """Whether optimizers have fused kernels there, which read on the device whether to leave a step out."""
    return device.type in ("cuda", "cpu")


def step_if_sound(optimizer: torch.optim.Optimizer, sound: Tensor) -> None:
    """An optimizer's step, or none if `sound` is 0; fused kernels look for themselves, and nobody waits for them."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = 1 - sound
        optimizer.step()
    elif sound:
        optimizer.step()


def gather_statistics(model: nn.Module) -> Tensor:
    """Make batch norm's float buffers parts of one vector, which can be looked after in one go."""
    places = [(layer, name, buffer) for layer in model.modules() for name, buffer in layer.named_buffers(recurse=False)
              if buffer.is_floating_point() and not isinstance(layer, Normalize)]  # whose values stay what they are
    if not places:
        return torch.zeros(0, device=next(model.parameters()).device)
    together = torch.cat([buffer.flatten() for *_, buffer in places])
    for (layer, name, buffer), part in zip(places, together.split([buffer.numel() for *_, buffer in places])):
        setattr(layer, name, part.view_as(buffer))
    return together


class SharedDropout(nn.Module):
    """A dropout that draws for a whole step, so that a rank's own images lose what one rank alone would take."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.part = layer, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        channels = isinstance(self.layer, nn.Dropout2d)  # which it draws for
        whole = x.new_ones(self.part.total, *((x.shape[1], 1, 1) if channels else x.shape[1:]))
        if not channels and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            # Numbers are drawn in this order.
            whole = whole.contiguous(memory_format=torch.channels_last)
        return x * self.layer(whole)[self.part.first:self.part.last]


def share_dropout(model: nn.Module) -> list[SharedDropout]:
    """Put every dropout of a network that ranks train together into a SharedDropout; the weights keep their names."""
    layers = [(place, layer) for place, layer in model.named_modules()
              if isinstance(layer, (nn.Dropout, nn.Dropout2d)) and layer.p]
    shared = [SharedDropout(layer) for _, layer in layers]
    for (place, _), layer in zip(layers, shared):
        model.set_submodule(place, layer)
    return shared


class InPrecision(nn.Module):
    """A network that enters the precision itself: the threads of DataParallel do not know the caller's."""

    def __init__(self, model: nn.Module, runtime: Runtime):
        super().__init__()
        self.model, self.runtime = model, runtime

    def forward(self, inputs: Tensor) -> Tensor:
        with self.runtime.autocast():
            return self.model(inputs)


def make_optimizer(config: Config, groups: list[dict], fused: bool) -> torch.optim.Optimizer:
    """The config's optimizer of these parameter groups."""
    options = {"lr": config.learning_rate, "fused": fused}
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **options)
        if config.momentum:  # the fused kernel makes none where its first step is left out
            for weight in (weight for group in groups for weight in group["params"]):
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return optimizer
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](groups, **options)


SMALLEST_PART = 64  # images of a rank or GPU, from which on their own mean and deviation are good for batch norm


class Learner:
    """The network in training, with its optimizer and its averaged weights.

    `least` images are in the smallest step: batch_size, where a table has so many.
    """

    def __init__(self, config: Config, model: nn.Module, num_classes: int, runtime: Runtime, least: int | None = None):
        self.config, self.num_classes, self.runtime, self.step = config, num_classes, runtime, 0
        self.model, self.updates, self.dropouts, self.least = model, 0, [], least or config.batch_size
        if runtime.ranks.joined:
            self.dropouts = share_dropout(self.model)
            # It trains on GPUs alone, and waits for them three times a layer: for parts that are too small without.
            if runtime.device.type == "cuda" and self.is_too_small(runtime.ranks.count):
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
                warn(f"the ranks wait for each other in every batch norm, since a step has fewer than {SMALLEST_PART} "
                     f"images for each; with --batch-size {SMALLEST_PART * runtime.ranks.count} or more they need not")
        self.statistics = gather_statistics(self.model)
        self.last_statistics = self.statistics.clone()
        self.momentum = max((layer.momentum for layer in self.model.modules() if getattr(layer, "momentum", None)),
                            default=0.1)
        self.batches = 0  # whose gradients have been added up for the next step of the optimizer
        self.network = self.spread(InPrecision(self.model, runtime))
        self.weights = list(self.model.parameters())
        groups = [{"params": [weight for weight in self.weights if (weight.ndim > 1) == decayed],
                   "weight_decay": config.weight_decay * decayed} for decayed in (True, False)]
        self.optimizer = make_optimizer(config, groups, fused=can_fuse(runtime.device))
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.average = AveragedWeights(self.model, config.average_decay) if config.average_decay else None
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "max", config.plateau_factor, config.plateau_patience, threshold=0)
        self.rate = 1.0  # what the schedule is multiplied by: less after a setback
        self.sound = torch.ones((), device=runtime.device)  # 1 while all is finite, else 0: left on the device
        # Steps left out: in all, one after another till now, and the most one after another since the last look.
        self.faults = torch.zeros(3, device=runtime.device)

    def is_too_small(self, parts: int) -> bool:
        """Whether the smallest step is too small for batch norm to be left to so many parts of it."""
        return self.least < SMALLEST_PART * parts

    def spread(self, network: nn.Module) -> nn.Module:
        """The network over all ranks, or over this process's GPUs; compiled where that is asked for."""
        if self.runtime.ranks.joined:
            options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            own_statistics = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
            network = nn.parallel.DistributedDataParallel(
                network, gradient_as_bucket_view=True, find_unused_parameters=self.config.freeze_epochs > 0,
                **{own_statistics: False})  # the name changed with torch 2.13; average_ranks sees to them
        elif self.runtime.gpus > 1 and self.is_too_small(self.runtime.gpus):
            warn(f"one of {self.runtime.gpus} GPUs trains: a step has too few images for more; give "
                 f"--batch-size {SMALLEST_PART * self.runtime.gpus} or more, or start a rank on each with torchrun")
        elif self.runtime.gpus > 1:
            network = nn.DataParallel(network)
        # An epoch's steps have two sizes; told that they may be any, the compiler gives up what it knows of each.
        return torch.compile(network, dynamic=False) if self.config.compile else network

    @property
    def result(self) -> nn.Module:
        """The network to validate, keep and predict with: the averaged one where there is one."""
        return self.average.model if self.average else self.model

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def state(self) -> dict:
        """All that the next step depends on, copied."""
        return copy.deepcopy({
            "model": self.model.state_dict(), "average": self.average.model.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "plateau": self.plateau.state_dict(), "faults": self.faults,
            "counts": (self.step, self.updates), "rate": self.rate})

    def restore(self, state: dict) -> None:
        """Go on from a `state`."""
        state = copy.deepcopy(state)  # optimizers take tensors over as they are
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        for name in ("optimizer", "scaler", "plateau"):
            getattr(self, name).load_state_dict(state[name])
        self.faults.copy_(state["faults"])
        (self.step, self.updates), self.batches, self.rate = state["counts"], 0, state["rate"]
        self.last_statistics.copy_(self.statistics)
        self.sound.fill_(1)

    def check_faults(self) -> None:
        """Raise Setback if the numbers have gone wrong for good. Waits for the device."""
        lost = self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE
        if self.faults[2] >= FAULT_LIMIT or lost or not self.sound:
            raise Setback
        self.faults[2] = self.faults[1]

    def slow_down(self) -> None:
        """Learn at half the rate from now on, and count anew the steps that are left out."""
        self.rate /= 2
        for group in self.optimizer.param_groups:
            group["lr"] /= 2
        self.faults[1:] = 0

    def freeze(self, frozen: bool) -> None:
        """Let only the last layer learn, or all; what is frozen keeps its batch statistics too."""
        for layer in list(self.model.children())[:-1]:
            layer.requires_grad_(not frozen)
            layer.train(not frozen)

    def learn(self, batch: Batch, epoch: int, progress: float, share: float = 1.0, update: bool = True) -> Tensor:
        """One step on a batch; gives its summed loss, its hits and its images [3], left on the device.

        They are 0 where the loss is not finite. A guess at a blend counts as much as the blend holds of the class that
        was guessed, and where teachers say what to learn, as much as they hold of it. The gradient's `share` is added
        to those of the batches before it, and an `update` uses them up.
        """
        part, together = batch.part or Part(len(batch.images), 0, len(batch.images)), contextlib.nullcontext()
        if not update and self.runtime.ranks.joined:
            together = self.network.no_sync()  # the ranks' gradients are averaged with the last batch's
        inputs, targets, weights = self.prepare(batch, epoch, part)
        for layer in self.dropouts:
            layer.part = part
        with together:
            logits = self.network(inputs).float()
            loss = weighted_loss(logits, targets, self.config.label_smoothing, weights)
            finite = loss.detach().isfinite()
            self.sound = self.sound * finite
            share = share * len(inputs) * self.runtime.ranks.count / part.total  # of this part in the ranks' mean
            self.scaler.scale(loss * share).backward()
        self.step, self.batches = self.step + 1, self.batches + 1
        if update:
            self.descend(progress)
            self.batches = 0
        hits = targets.gather(1, logits.detach().argmax(dim=1, keepdim=True)).sum()
        return torch.stack([loss.detach().nan_to_num(0, 0, 0) * len(inputs), hits * finite, len(inputs) * finite])

    def prepare(self, batch: Batch, epoch: int, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        """This step's inputs [B, 1, S, S], targets [B, classes] and weights [B], augmented and blended alike."""
        config, seed = self.config, seed_of(self.config, epoch, self.step)
        torch.manual_seed(seed ^ 1)  # dropout draws from the global generator
        draws = Draws(seed, self.runtime.device, part)
        inputs = augment(batch.images, config, draws) if config.augment else to_input(batch.images, config)
        targets = F.one_hot(batch.classes, self.num_classes).float()
        if batch.taught is not None:
            targets = torch.lerp(targets, batch.taught.to(targets), config.teacher_share)
        if batch.weights is not None:  # so that each label of a blend counts what its own row does
            targets = targets * batch.weights[:, None]
        inputs, targets = (values[part.lead:] for values in mix(inputs, targets, config, seed))
        if batch.weights is None:
            return inputs, targets, None
        weights = targets.sum(dim=1)
        return inputs, targets / weights.clamp(min=1e-12)[:, None], weights

    def descend(self, progress: float) -> None:
        """Clipping, the optimizer's step at the schedule's rate, the averages; nothing where numbers are not finite."""
        if self.config.schedule != "plateau":  # which sets the rate itself, between epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * self.config.learning_rate * schedule_factor(self.config, progress)
        if self.config.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm or math.inf)
        self.average_ranks()
        self.hasten_statistics()
        sound = self.sound * self.statistics.isfinite().all()
        if self.scaler.is_enabled():  # which leaves steps out by itself, while it looks for the largest scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            sound = sound * norm.isfinite()
            step_if_sound(self.optimizer, sound)
        self.optimizer.zero_grad(set_to_none=True)
        self.last_statistics.copy_(self.statistics.where(sound > 0, self.last_statistics))
        self.statistics.copy_(self.last_statistics)
        norms = torch._foreach_norm([weight.detach() for weight in self.weights])
        self.sound = torch.stack(norms).sum().isfinite().float()
        if self.average:
            self.average.update(self.updates, sound * self.sound)
        self.updates += 1
        (total, streak, longest), left_out = self.faults, 1 - sound
        streak = (streak + left_out) * left_out
        self.faults = torch.stack([total + left_out, streak, torch.maximum(longest, streak)])

    def hasten_statistics(self) -> None:
        """Make the first steps' batch statistics the mean of all till now: what they start from is of no image.

        Small tables have few steps, after which batch norm's own momentum would still hold much of it.
        """
        weight = 1 - (1 - self.momentum) ** self.batches  # of this step's
        if weight * (self.updates + 1 - FAULT_LIMIT) < 1 and not self.config.weights:
            factor = (1 / (weight * (self.updates + 1 - self.faults[0]))).clamp(min=1)  # steps left out are none of it
            self.statistics.copy_(torch.lerp(self.last_statistics, self.statistics, factor))

    def average_ranks(self) -> None:
        """Give all ranks the same batch statistics, the mean of theirs, and the same opinion of the numbers."""
        ranks = self.runtime.ranks
        if ranks.joined:
            change = ranks.add(torch.cat([self.statistics - self.last_statistics, self.sound[None]])) / ranks.count
            self.statistics.copy_(self.last_statistics + change[:-1])
            self.sound = (change[-1] == 1).float()


def epoch_steps(rows: np.ndarray, config: Config, epoch: int) -> list[np.ndarray]:
    """The rows of each step of an epoch: every row once, in steps that differ by one row at the most.

    Even steps, since batch norm cannot train on a last step of a single image.
    """
    order = np.random.default_rng([config.seed, epoch]).permutation(rows)
    return np.array_split(order, steps_in_epoch(rows, config))


def steps_in_epoch(rows: np.ndarray, config: Config) -> int:
    """How many steps an epoch has."""
    return max(1, min(math.ceil(len(rows) / config.batch_size), len(rows) // 2))


def accumulation_shares(sizes: list[int], accumulate: int) -> list[tuple[float, bool]]:
    """The part of its group's images that each step of so many holds, and whether it ends the group.

    Groups differ by one step at the most.
    """
    groups = np.array_split(sizes, math.ceil(len(sizes) / accumulate))
    return [(float(share), place == len(group) - 1)
            for group in groups for place, share in enumerate(group / group.sum())]


class Setback(Exception):
    """Many steps one after another had no finite numbers, or the weights have none."""


class Tally:
    """Summed loss, hits and images [3] of an epoch till now; those of this rank are left on the device."""

    def __init__(self, progress: Progress, runtime: Runtime):
        self.ranks = runtime.ranks
        self.before = torch.tensor(progress.sums if self.ranks.rank == 0 else [0.0] * 3)
        self.own = self.before.to(runtime.device, copy=True)

    def sums(self) -> list[float]:
        """What all ranks have together; all must ask."""
        return self.ranks.add(self.own.clone()).tolist()

    def guess(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch's images, if the other ranks' were like this one's."""
        return mean_of(torch.lerp(self.before, self.own.cpu(), self.ranks.count).tolist())


def mean_of(sums: list[float]) -> tuple[float, float]:
    """Mean loss and accuracy of so much loss, so many hits and so many images."""
    loss, hits, images = sums
    return loss / max(images, 1), hits / max(images, 1)


def train(learner: Learner, data: TrainingData, progress: Progress, pace: Pace,
          keeper: RunKeeper) -> dict[str, float]:
    """The rest of an epoch, or what of it there is time for; gives train_loss, train_accuracy and learning_rate.

    Raises Setback where the numbers have gone wrong, and Stopped after the step in which a signal came.
    """
    config, ranks, begun = learner.config, learner.runtime.ranks, time.monotonic() - progress.seconds
    steps, tally, update = epoch_steps(data.train_rows, config, progress.epoch), Tally(progress, learner.runtime), True
    shares = accumulation_shares([len(rows) for rows in steps], config.accumulate)
    learner.model.train()
    if config.freeze_epochs:
        learner.freeze(progress.epoch <= config.freeze_epochs)

    def pause() -> None:
        """Bring the progress up to date, if the numbers are sound. Waits for the device."""
        learner.check_faults()
        progress.sums, progress.seconds = tally.sums(), time.monotonic() - begun

    with tqdm(total=len(data.train_rows), initial=progress.images, unit="img", unit_scale=True, leave=False,
              disable=ranks.rank > 0 or None, desc=f"epoch {progress.epoch}/{config.num_epochs}") as bar:
        for number in range(progress.steps, len(steps)):
            done, due, stop = ranks.agree(pace.progress(learner.step), keeper.is_due(), keeper.stops.waiting or 0)
            if update and (due or stop):
                pause()
                if stop:
                    raise Stopped(int(stop))
                keeper.save(learner, progress, pace)
            if update and done >= 1:  # all batches of a step of the optimizer, or none
                break
            (share, update), part = shares[number], ranks.part(len(steps[number]), int(config.mixup or config.cutmix))
            tally.own += learner.learn(data.batch(steps[number], part), progress.epoch, done, share, update)
            progress.steps, progress.images = number + 1, progress.images + part.total
            if bar.update(part.total):  # true when the bar was redrawn, ten times a second at the most
                loss, accuracy = tally.guess()
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", lr=f"{learner.learning_rate:.1e}",
                                refresh=False)
            if update and learner.updates % FAULT_STEPS == 0:
                learner.check_faults()
    pause()
    mean_loss, accuracy = mean_of(progress.sums)
    return {"train_loss": mean_loss, "train_accuracy": accuracy, "learning_rate": learner.learning_rate}


def validate(model: nn.Module, data: TrainingData, config: Config, runtime: Runtime) -> dict[str, float]:
    """The figures of `score` on the validation rows; empty if there are none."""
    if not len(data.val_rows):
        return {}
    probabilities = predict(model, data.dataset, data.val_rows, config, runtime)
    return score(probabilities, data.targets[data.val_rows])


HISTORY_COLUMNS = ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_top3_accuracy",
                   "val_class_accuracy", "learning_rate", "seconds"]


def fit(config: Config, data: TrainingData, runtime: Runtime, seconds: float = math.inf,
        keeper: RunKeeper | None = None) -> pd.DataFrame:
    """Train a complete config; gives the history, one row an epoch, also written to history.csv.

    model_file in the output folder is the best epoch by select_by, or the last without validation rows. After
    `seconds` training ends; the schedule is laid over the time there is. A `keeper` with a path makes it a training
    that can be stopped and goes on.
    """
    entered, keeper, ranks = time.monotonic(), keeper or RunKeeper(config), runtime.ranks
    steps = steps_in_epoch(data.train_rows, config)
    if len(data.train_rows) // steps < 2 * ranks.count > 2:
        raise UsageError(f"--batch-size {config.batch_size} is less than two images for each of {ranks.count} ranks; "
                         "make it larger, or start fewer ranks")
    board = scalar_board(config) if ranks.rank == 0 else None
    model = start_model(config, data, runtime, fresh=not keeper.found)
    learner = Learner(config, model, len(data.classes), runtime,
                      min(config.batch_size, len(data.train_rows) // steps))
    pace = Pace(config.num_epochs * steps, seconds - (time.monotonic() - entered))  # weights may have been downloaded
    with keeper.stops.hold():
        progress = keeper.begin(learner, data, pace)
        while not is_over(config, progress, *ranks.agree(pace.progress(learner.step))):
            try:
                with memory_remedy(smaller_batches(config)):
                    row = {"epoch": progress.epoch, **train(learner, data, progress, pace, keeper)}
                if not progress.images and progress.history:  # the time ended with the epoch before
                    break
                begun = time.monotonic()
                with keeper.stops.hold(ranks.count > 1):  # one rank that left would let the others wait
                    row |= validate(learner.result, data, config, runtime)
            except Setback:
                progress = keeper.go_back(learner, progress, pace)
                continue
            except Stopped as stop:
                raise keeper.stop(learner, progress, pace, stop.number) from None
            row["seconds"] = progress.seconds + time.monotonic() - begun
            close_epoch(learner, data, progress, pace, keeper, row, board)
            if waits_in_vain(config, progress) and progress.epoch <= config.num_epochs:
                print(f"stopped early: {config.early_stopping} epochs without a better validation {config.select_by}")
        stop, = ranks.agree(keeper.stops.waiting or 0)  # a signal that came while the last epoch was written
        if stop:
            raise keeper.stop(learner, progress, pace, int(stop))
    return pd.DataFrame(progress.history, columns=HISTORY_COLUMNS)


def smaller_batches(config: Config) -> str:
    """The remedy where a step needs more memory than there is."""
    return (f"with batches of {config.batch_size} images; try --batch-size {max(config.batch_size // 2, 2)}, with "
            f"--accumulate {2 * config.accumulate} for the same steps")


def is_over(config: Config, progress: Progress, done: float) -> bool:
    """Whether no epoch is to follow: all are done, the time is over, or epochs enough were no better."""
    over = progress.epoch > config.num_epochs or (done >= 1 and not progress.steps) or waits_in_vain(config, progress)
    return bool(progress.history) and over


def waits_in_vain(config: Config, progress: Progress) -> bool:
    """Whether the last epochs, as many as early_stopping says, were no better than the best."""
    return bool(config.early_stopping and progress.history
                and progress.history[-1]["epoch"] - progress.best["epoch"] >= config.early_stopping)


def close_epoch(learner: Learner, data: TrainingData, progress: Progress, pace: Pace, keeper: RunKeeper, row: dict,
                board) -> None:
    """Print an epoch's row, keep the network if it is the best, and save the state, in this order."""
    config, folder = learner.config, Path(learner.config.output_dir)
    faults = learner.faults[0].item()
    print(describe_epoch(row, config.num_epochs, progress.images / progress.seconds)
          + (f"  {faults - progress.faults:.0f} steps left out: no finite numbers" if faults > progress.faults else ""),
          flush=True)
    if board:
        for name, value in row.items():
            board.add_scalar(name, value, row["epoch"])
        board.flush()
    if config.schedule == "plateau":
        learner.plateau.step(row["val_accuracy"])
    better, writes = progress.best is None or is_better(row, progress.best, config), learner.runtime.ranks.rank == 0
    if better and writes:
        labels = digest_of_labels(data.classes[number] for number in data.own_targets)
        save_checkpoint(folder / config.model_file,
                        Trained(learner.result, config, data.classes, data.statistics, row, labels))
    progress.turn_over(row, better, faults)
    if writes:
        with whole_file(folder / "history.csv") as temporary:
            pd.DataFrame(progress.history, columns=HISTORY_COLUMNS).to_csv(temporary, index=False)
    keeper.save(learner, progress, pace, min(LEAST_SECONDS, 60 * config.checkpoint_minutes))


def scalar_board(config: Config):
    """TensorBoard's writer below the output folder; None where it was not asked for."""
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter(Path(config.output_dir, "tensorboard"))


def is_better(row: dict, best: dict, config: Config) -> bool:
    """Whether an epoch beats the best so far, equal accuracies by their loss; without validation the last one does."""
    if "val_loss" not in row or config.select_by == "loss":
        return "val_loss" not in row or row["val_loss"] < best["val_loss"]
    return (row["val_accuracy"], -row["val_loss"]) > (best["val_accuracy"], -best["val_loss"])


def describe_epoch(row: dict, epochs: int, images_per_second: float) -> str:
    """One line of an epoch's figures."""
    text = (f"epoch {row['epoch']:>3}/{epochs}  train loss {row['train_loss']:.4f} "
            f"accuracy {row['train_accuracy']:6.2%}")
    if "val_loss" in row:
        text += (f"  val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:6.2%} "
                 f"top 3 {row['val_top3_accuracy']:6.2%} per class {row['val_class_accuracy']:6.2%}")
    return text + f"  lr {row['learning_rate']:.1e}  {row['seconds']:.1f} s  {images_per_second:,.0f} images/s"


def seconds_per_image(model: nn.Module, data: TrainingData, config: Config, runtime: Runtime) -> float:
    """How long a network takes for an image, on the first training rows."""
    rows, seconds = data.train_rows[: 4 * runtime.eval_batch_size], []
    for _ in range(3):  # the first is slowed by set-up
        begun = time.monotonic()
        predict(model, data.dataset, rows, config, runtime)
        seconds.append(time.monotonic() - begun)
    return min(seconds) / len(rows)


def blank_memory(model: nn.Module, data: TrainingData, config: Config, runtime: Runtime) -> NeighbourVote:
    """The network with a memory of as many training images as it will have, and nothing of them in it."""
    width = next(layer for layer in list(model.children())[-1].modules() if isinstance(layer, nn.Linear)).in_features
    keys = torch.zeros(len(data.train_rows), NeighbourVote.COMPONENTS, dtype=torch.bfloat16)
    projection, targets = torch.zeros(width, NeighbourVote.COMPONENTS), torch.zeros(len(keys), dtype=torch.int64)
    return runtime.place(NeighbourVote(model, config, projection, keys, targets))


def seconds_to_train(config: Config, data: TrainingData, test_rows: int, runtime: Runtime, started: float,
                     goes_on: bool = False) -> float:
    """What max_minutes leaves for training beside the last validation, prediction and writing, as measured here.

    Raises DataError if nothing is left, unless it is a training that goes on.
    """
    if not config.max_minutes:
        return math.inf
    model = runtime.place(build_model(config, len(data.classes)))
    alone = answer = seconds_per_image(model, data, config, runtime)
    if config.neighbours:
        answer = seconds_per_image(blank_memory(model, data, config, runtime), data, config, runtime)
    passes = (alone * (len(data.val_rows) + len(data.train_rows) * (config.neighbours > 0))
              + answer * (len(data.val_rows) + test_rows))
    reserve = 10 + 10 * config.pictures + 1.5 * passes  # seconds to import, to write, to exit and to draw
    left = -runtime.ranks.agree(reserve + time.monotonic() - started - 60 * config.max_minutes)[0]
    if left <= 0 and not goes_on:
        raise UsageError(f"--max-minutes {config.max_minutes:g} leaves no time to train: "
                         f"{time.monotonic() - started:.0f} s of it are over"
                         f"{' or for other folds' if config.folds else ''}, validation and prediction will take "
                         f"{reserve:.0f} s")
    return max(left, 0.0)


# ==== 9. Prediction ===================================================================================================

@torch.inference_mode()
def infer(model: nn.Module, dataset: MathSymbolDataset, rows: np.ndarray, config: Config,
          runtime: Runtime) -> np.ndarray:
    """What the model gives, float32 [rows, outputs], in the order of `rows`, each scattered to its own place.

    The config is the network's own, for its input. Raises DataError where the model gives no numbers.
    """
    model.eval()
    own, parts, size = runtime.ranks.part(len(rows)).places, [], runtime.eval_batch_size
    remedy = f"while predicting {size} images at a time; try --eval-batch-size {max(size // 2, 1)}"
    for places in (own[first : first + size] for first in range(0, len(own), size)):
        with runtime.autocast(), memory_remedy(remedy):
            parts.append(model(to_input(dataset.batch(rows[places])[0], config)).float().cpu())
    width, = runtime.ranks.agree(parts[0].shape[1] if parts else 0)  # a rank may have no row
    outputs = torch.zeros(len(rows), int(width))
    outputs[own] = torch.cat([outputs[:0], *parts])
    # Of a vote a probability may be 0, and its logarithm without a limit below.
    if not (runtime.ranks.add(outputs) < math.inf).all():
        raise DataError("the network gives no numbers for some images: its training diverged; lower --learning-rate")
    return outputs.numpy()


def predict(model: nn.Module, dataset: MathSymbolDataset, rows: np.ndarray, config: Config,
            runtime: Runtime) -> np.ndarray:
    """Probabilities, float32 [rows, classes], in the order of `rows`: the mean of the config's views.

    Arguments and errors as in `infer`.
    """
    return (sum(ask_views(model, dataset, rows, config, runtime)) / config.views).numpy()


def ask_views(model: nn.Module, dataset: MathSymbolDataset, rows: np.ndarray, config: Config,
              runtime: Runtime) -> Iterator[Tensor]:
    """The probabilities of each view: of the images as they are, and then as `draw_view` draws them."""
    yield torch.from_numpy(infer(model, dataset, rows, config, runtime)).softmax(dim=1)
    drawn = dataclasses.replace(config, augment=False)  # for to_input: warped images need no softening
    for view in range(1, config.views):
        images = draw_view(dataset, rows, config, view, runtime)
        yield torch.from_numpy(infer(model, images, np.arange(len(rows)), drawn, runtime)).softmax(dim=1)


VIEW_ROWS = 128  # whose augmentation is drawn at a time, whatever the batches are


def draw_view(dataset: MathSymbolDataset, rows: np.ndarray, config: Config, view: int,
              runtime: Runtime) -> MathSymbolDataset:
    """These rows as `augment` draws them, from seed, view and a row's place alone, at the network's size."""
    images = np.empty((len(rows), 1, config.image_size, config.image_size), dtype=np.uint8)
    for start in range(0, len(rows), VIEW_ROWS):
        place = slice(start, start + VIEW_ROWS)
        draws = Draws(seed_of(config, view, start), runtime.device)
        ink = augment(dataset.batch(rows[place])[0], config, draws)
        images[place] = (255 * ink).round().byte().cpu().numpy()
    return MathSymbolDataset(images, None, runtime, config.pin_memory)


def remember(trained: Trained, data: TrainingData, runtime: Runtime) -> NeighbourVote:
    """A trained network with its training images in memory, which vote from now on."""
    config = trained.config
    body = runtime.place(nn.Sequential(*list(trained.model.children())[:-1]))
    seen = torch.from_numpy(infer(body, data.dataset, data.train_rows, config, runtime))
    spread = seen.T @ seen
    if not spread.isfinite().all():
        raise DataError("what the network sees in images is too large to be remembered: its training diverged; lower "
                        "--learning-rate, or leave out the vote with --neighbours 0")
    # In float32, eigh does not always converge on the features of few images.
    projection = torch.linalg.eigh(spread.double()).eigenvectors[:, -NeighbourVote.COMPONENTS:].float().contiguous()
    keys = F.normalize(seen @ projection, dim=1).to(torch.bfloat16)  # fine enough, at half the size
    targets = torch.from_numpy(data.targets[data.train_rows])
    return runtime.place(NeighbourVote(trained.model, config, projection, keys, targets))


def ensemble_predict(members: list[Trained], datasets: list[MathSymbolDataset], runtime: Runtime) -> np.ndarray:
    """The members' mean probabilities, float32 [rows, classes], classes in the first member's order.

    Each member has its own dataset of the same table. Raises DataError where their classes differ. `ensemble_of_files`
    never has more than one network in memory, and may weigh them.
    """
    classes, total = members[0].classes, 0
    for member, dataset in zip(members, datasets):
        differing = set(classes) ^ set(member.classes)
        if differing:
            raise DataError(f"the checkpoints know different classes ({', '.join(sorted(differing)[:5])}); "
                            "average networks that were trained on the same ones")
        rows = np.arange(len(dataset))
        probabilities = predict(runtime.place(member.model), dataset, rows, member.config, runtime)
        total = total + probabilities[:, [member.classes.index(label) for label in classes]]
    return total / len(members)


@dataclass(frozen=True)
class Member:
    """One file of an ensemble, a checkpoint or saved probabilities: what must be known of it before it is asked."""

    path: Path
    classes: list[str]
    networks: int = 1                          # how many its probabilities are the mean of
    config: Config | None = None               # the network's; None for saved probabilities, which need no images
    statistics: ImageStatistics | None = None  # how it wants its images
    labels: str = ""                           # the digest of its training table's


def look_at_member(path: Path, table: Table | None = None) -> Member:
    """Read a file of an ensemble to its end, and keep what is small of it.

    Raises DataError where it cannot be used; saved probabilities must be of the rows of `table`.
    """
    if path.suffix != ".npz":
        trained = load_checkpoint(path)
        return Member(path, trained.classes, 1, trained.config, trained.statistics, trained.labels)
    if table is None:
        raise UsageError(f"{path}: saved probabilities of a test table can be averaged by predict alone; name a "
                         "checkpoint")
    saved = read_probabilities(path)
    match_ids(path, saved["ids"], table)
    return Member(path, saved["classes"].tolist(), int(saved["weight"]))


def look_at_members(paths: list[Path], table: Table | None = None) -> list[Member]:
    """All files of an ensemble, checked before the first is asked. Raises DataError, for other classes too."""
    members = [look_at_member(path, table) for path in paths]
    for member in members:
        differing = set(members[0].classes) ^ set(member.classes)
        if differing:
            raise DataError(f"{member.path}: knows other classes than {members[0].path} "
                            f"({', '.join(sorted(differing)[:5])}); average networks that were trained on the same "
                            "ones")
    return members


@dataclass(eq=False)
class Question:
    """Rows of a table that are to be predicted, with their images as the network that is asked wants them."""

    table: Table
    rows: np.ndarray  # positions in the table
    config: Config    # where the images lie, and how many views are taken
    runtime: Runtime
    prepared: tuple[ImageStatistics, MathSymbolDataset] | None = None

    def dataset(self, statistics: ImageStatistics) -> MathSymbolDataset:
        """The rows, prepared in this way; those that were prepared in another way are let go first."""
        if not self.prepared or self.prepared[0] != statistics:
            self.prepared = None
            with self.runtime.ranks.in_turn():
                self.prepared = statistics, prepare_rows(self.table, self.rows, self.config, statistics, self.runtime)
        return self.prepared[1]


def ask_member(member: Member, question: Question, alone: bool) -> np.ndarray:
    """One member's probabilities, float32 [rows, its classes]; its network is loaded for it and let go."""
    if member.config is None:
        saved = read_probabilities(member.path)
        return saved["probabilities"][match_ids(member.path, saved["ids"], question.table)[question.rows]]
    trained, dataset = load_checkpoint(member.path), question.dataset(member.statistics)
    model = question.runtime.place((trained.alone if alone else trained).model)
    config = dataclasses.replace(trained.config, views=question.config.views)
    return predict(model, dataset, np.arange(len(dataset)), config, question.runtime)


def ask_members(members: list[Member], question: Question, alone: bool = False) -> Iterator[np.ndarray]:
    """Each member's probabilities in turn, float32 [rows, classes], classes in the first one's order.

    There is never more than one network in memory. `alone`: without the training images that vote beside them.
    """
    for member in members:
        yield ask_member(member, question, alone)[:, [member.classes.index(label) for label in members[0].classes]]


def ensemble_of_files(members: list[Member], question: Question, weights: np.ndarray | None = None,
                      alone: bool = False) -> np.ndarray:
    """The members' mean probabilities, float32 [rows, classes], classes in the first one's order.

    Without `weights` [members] a file counts as many times as networks are in it. One is in memory at a time.
    """
    weights = np.array([member.networks for member in members]) if weights is None else weights
    shares, total = (weights / weights.sum()).tolist(), 0
    for share, probabilities in zip(shares, ask_members(members, question, alone)):
        total = total + share * probabilities
    return total


def fit_weights(likelihoods: np.ndarray, rounds: int = 100_000) -> np.ndarray:
    """The shares [members], none negative and 1 in all, at which a mean of probabilities has the least cross-entropy.

    `likelihoods` [rows, members] are what each member says of each row's true class; minimised is the convex
    -mean(log(likelihoods @ shares)), by expectation maximisation, no round of which raises it, until it is within 1e-6
    of the least. The shares fit these rows: on others their mean is a little worse.
    """
    likelihoods = np.maximum(likelihoods.astype(np.float64), 1e-12)
    shares = np.full(likelihoods.shape[1], 1 / likelihoods.shape[1])
    for _ in range(rounds):
        gains = (1 / (likelihoods @ shares)) @ likelihoods / len(likelihoods)
        if gains.max() < 1 + 1e-6:  # no shares are better by more, as the loss is convex
            break
        shares = shares * gains
    shares[shares < 1e-4] = 0  # as good as none, and not to be asked at all
    return shares / shares.sum()


def find_weights(members: list[Member], config: Config, runtime: Runtime) -> np.ndarray:
    """The members' shares [members] that fit the validation rows which they share best; says what they are worth."""
    for member in members:
        if member.config is None:
            raise UsageError(f"{member.path}: --member-weights validation asks networks, and these are saved "
                             "probabilities; name the shares as numbers")
    question, targets = validation_question(members, config, runtime)
    with tempfile.TemporaryFile() as file:  # on the disk, so that memory does not grow with the members
        kept = np.memmap(file, np.float32, "w+", shape=(len(members), len(targets), len(members[0].classes)))
        for place, probabilities in enumerate(ask_members(members, question)):
            kept[place] = probabilities
        shares = fit_weights(kept[:, np.arange(len(targets)), targets].T)
        equal, fitted = (score(sum(share * own for share, own in zip(each, kept)), targets)
                         for each in (np.full(len(members), 1 / len(members)), shares))
    print("weights: " + ", ".join(f"{member.path} {share:.3f}" for member, share in zip(members, shares)))
    for name, figures in (("with equal weights", equal), ("with these weights", fitted)):
        print(f"{len(targets):,} validation rows {name}: loss {figures['val_loss']:.4f}, accuracy "
              f"{figures['val_accuracy']:.2%}")
    print("these rows chose the weights: on others the gain is smaller, and may be none")
    return shares


def choose_weights(members: list[Member], config: Config, runtime: Runtime) -> np.ndarray:
    """What each member counts [members]: its number of networks, or what member_weights says or asks for."""
    if config.member_weights == "validation":
        return find_weights(members, config, runtime)
    if not config.member_weights:
        return np.array([member.networks for member in members], dtype=float)
    shares = [float(share) for share in config.member_weights.split(",")]
    if len(shares) != len(members):
        raise UsageError(f"--member-weights {config.member_weights}: {len(shares)} numbers for {len(members)} files; "
                         "name one for each")
    return np.array(shares)


def teacher_files(config: Config) -> list[Path]:
    """The checkpoints that `teachers` names, those of this fold where it is trained in folds."""
    names = config.teachers.replace("{fold}", str(config.fold)) if config.folds else config.teachers
    return [Path(path.strip()) for path in names.split(",") if path.strip()]


def teacher_digests(config: Config) -> list[str]:
    """What tells the config's teachers from others. Raises DataError for a file that is not a whole checkpoint."""
    for path in teacher_files(config):
        load_checkpoint(path)
    return [read_data(path)["sha256"] for path in teacher_files(config)]


def ask_teachers(config: Config, data: TrainingData, runtime: Runtime) -> Tensor | None:
    """What the config's teachers say, on average, of every row of the training table, then of the extra one if any.

    None without teachers. The networks alone: their memories would give each row its own label back (distillation,
    arXiv:1503.02531).
    """
    members = [look_at_member(path) for path in teacher_files(config)]
    if not members:
        return None
    tables = labelled_tables(config)
    for member in members:
        check_teacher(member, config, data, tables)
    order, parts = [members[0].classes.index(label) for label in data.classes], []
    for table, own in zip(tables, (config, extra_settings(config))):
        question = Question(table, np.arange(len(table)), own, runtime)
        parts.append(torch.from_numpy(ensemble_of_files(members, question, alone=True)[:, order]).half())
    taught = torch.cat(parts)
    return taught.to(runtime.device) if runtime.has_room_for(taught.nbytes) else taught


def check_teacher(teacher: Member, config: Config, data: TrainingData, tables: list[Table]) -> None:
    """Raise DataError for a teacher of other classes, or one that was trained on rows that are to validate."""
    if set(teacher.classes) != set(data.classes):
        raise DataError(f"{teacher.path}: a teacher must know the classes of "
                        f"{' and '.join(table.path for table in tables)}, each one and no other")
    if split_settings(teacher.config) != split_settings(config):
        raise DataError(f"{teacher.path}: a teacher must have left the same rows to validation; take its "
                        f"{describe_split(teacher.config)}")
    if len(data.val_rows):
        check_same_table(teacher, tables[0])
    by_pixels = parts_of(config) and teacher.statistics != data.statistics
    if by_pixels and not np.array_equal(held_out(teacher, config, tables[0]), data.val_rows):
        raise DataError(f"{teacher.path}: a teacher must have left the same rows to validation; stored at "
                        f"{teacher.statistics.size} pixels, other images equal each other than at "
                        f"{data.statistics.size}")


def check_same_table(trained: Trained | Member, table: Table) -> None:
    """Raise DataError for a table that a network was not trained on, since others of its rows were held out."""
    name = getattr(trained, "path", "the checkpoint")
    if not trained.labels:
        warn(f"{name}: an earlier version's, which does not tell whether it was trained on {table.path} as that is now")
    elif trained.labels != digest_of_labels(table.rows.label):
        raise DataError(f"{table.path}: not the rows that {name} was trained on, or not in their order, so that it may "
                        "have learnt those held out now; name its own table with --data-dir or --train-csv")


def split_settings(config: Config) -> dict[str, object]:
    """The settings that decide which rows validate, without those that have no effect."""
    names = ("split_seed", *(("folds", "fold") if config.folds else ("train_val_split",)),
             *(("group_column",) if config.group_column else ()))
    return {name: getattr(config, name) for name in names}


def describe_split(config: Config) -> str:
    """The flags that decide which rows validate."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in split_settings(config).items())


def held_out(trained: Trained | Member, config: Config, table: Table) -> np.ndarray:
    """Positions of the rows of its training table that a network was validated on, without those of no usable image.

    The config says where the images lie.
    """
    targets = class_numbers(table.rows.label, trained.classes)
    images = load_all_images([table], config, trained.statistics)[0] if parts_of(trained.config) else None
    return split_table(trained.config, table, targets, images)[1]


def prepare_rows(table: Table, rows: np.ndarray, config: Config, statistics: ImageStatistics,
                 runtime: Runtime) -> MathSymbolDataset:
    """These rows of a table as a dataset, its images prepared by the statistics."""
    images = load_all_images([table], config, statistics)[0]
    warn_of_other_paper(table, config, statistics)
    return MathSymbolDataset(images if len(rows) == len(images) else images[rows], None, runtime, config.pin_memory)


def settings_of_labelled_table(own: Config, config: Config) -> Config:
    """The config that reads the table which a network was trained on by its `own`, where none other is named."""
    named = config.train_csv != Config.train_csv
    # Which rows are in which part depends on those that could be used; single rows may go bad since.
    fixed = parts_of(own) or own.on_bad_image == "skip"
    return dataclasses.replace(
        config, group_column=own.group_column, train_csv=config.train_csv if named else own.train_csv,
        root_dir=config.root_dir if named else own.root_dir,
        on_bad_image=own.on_bad_image if fixed else config.on_bad_image)


def validation_question(members: list[Trained] | list[Member], config: Config,
                        runtime: Runtime) -> tuple[Question, np.ndarray]:
    """The validation rows that the members share, and their class numbers [rows].

    The config says in which folder their labelled table lies. Raises DataError where the members were split in
    different ways, since some would be scored on rows that they were trained on, or where the table is not the one
    they were trained on.
    """
    ways = {describe_split(member.config) for member in members}
    if len(ways) > 1:
        raise DataError(f"the checkpoints were split in different ways ({'; '.join(sorted(ways)[:3])}): what one was "
                        "trained on, another would be validated on; score them one by one")
    own, classes = members[0].config, members[0].classes
    config = settings_of_labelled_table(own, config)
    table = read_train_table(config)
    labels = set(table.rows.label)
    if labels != set(classes) and not (own.extra_classes and labels < set(classes)):
        raise DataError(f"{table.path}: not the classes that the checkpoint was trained on; name its own "
                        "table with --data-dir")
    for member in members:
        check_same_table(member, table)
    if config.on_bad_image == "skip":
        load_all_images([table], config, members[0].statistics)  # tells which of them cannot be used
    one_of_each = {member.statistics: member for member in members}.values()
    rows, *others = [held_out(member, config, table) for member in one_of_each]
    if not all(np.array_equal(rows, other) for other in others):
        raise DataError("the checkpoints were validated on different rows: at the sides in pixels that they store, "
                        "different images equal each other; score them one by one")
    if not len(rows):
        raise DataError("the checkpoint was trained on every row (--train-val-split 1): none is left to validate on")
    targets = class_numbers(table.rows.label, classes)
    return Question(table, rows, config, runtime), targets[rows]


def answer_for_bad_images(table: Table, probabilities: np.ndarray, classes: list[str]) -> None:
    """Give the rows without a usable image the shares of the others' answers, so the commonest, and say so."""
    if not len(table.bad):
        return
    others = np.setdiff1d(np.arange(len(table)), table.bad)
    counts = np.bincount(probabilities[others].argmax(axis=1), minlength=len(classes))
    probabilities[table.bad] = counts / counts.sum()  # saved, they are not taken for a sure answer
    warn(f"{len(table.bad)} of {len(table):,} rows of {table.path} have no usable image: they are given the label "
         f"{classes[counts.argmax()]!r}, the most frequent answer")


def write_submission(path: Path, table: Table, probabilities: np.ndarray, classes: list[str]) -> None:
    """Write the table's ids in its order, each with its label, and read it back before it gets its name.

    Raises DataError where there is not one row of probabilities to each row of the table, or not every one is a number.
    """
    if probabilities.shape != (len(table), len(classes)) or not np.isfinite(probabilities).all():
        raise DataError(f"{path}: not written: {probabilities.shape} probabilities, or some that are no numbers, for "
                        f"{len(table)} rows and {len(classes)} classes")
    predicted = np.array(classes, dtype=object)[probabilities.argmax(axis=1)]
    cells = zip(table.submission_columns, (table.rows.example_id.to_numpy(), predicted))
    submission = pd.DataFrame(dict(cells)).astype("str")
    with whole_file(path) as temporary:
        submission.to_csv(temporary, index=False)
        if not pd.read_csv(temporary, dtype=str, na_filter=False).equals(submission):
            raise DataError(f"{path}: what was written does not read back as it was; an id or a label cannot be kept "
                            "in a CSV")


@dataclass(frozen=True, eq=False)
class Judged:
    """Labelled rows with what a network says of them."""

    dataset: MathSymbolDataset
    rows: np.ndarray           # [N], positions in the dataset
    targets: np.ndarray        # [N], class numbers
    probabilities: np.ndarray  # [N, classes]

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest class of each row [N]."""
        return self.probabilities.argmax(axis=1)

    def images(self, places: np.ndarray) -> np.ndarray:
        """The images [n, S, S], uint8 ink, of some of the rows."""
        return self.dataset.batch(self.rows[places])[0][:, 0].cpu().numpy()


def judge(trained: Trained, data: TrainingData, runtime: Runtime) -> Judged:
    """What a network says of the validation rows."""
    probabilities = predict(runtime.place(trained.model), data.dataset, data.val_rows, trained.config, runtime)
    return Judged(data.dataset, data.val_rows, data.targets[data.val_rows], probabilities)


def write_probabilities(path: Path, judged: Judged, classes: list[str], **more: np.ndarray) -> None:
    """Keep labelled rows' probabilities: the arrays rows, targets, probabilities, classes and more of an .npz file."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, rows=judged.rows, targets=judged.targets, probabilities=judged.probabilities, classes=classes,
                 **more)


def write_answers(config: Config, table: Table, probabilities: np.ndarray, classes: list[str], networks: int) -> None:
    """Write the submission of a test table, and its probabilities where they are asked for: the mean of `networks`."""
    folder = Path(config.output_dir)
    write_submission(folder / config.submission_file, table, probabilities, classes)
    if config.save_probabilities:
        write_test_probabilities(folder / TEST_PROBABILITIES, table, probabilities, classes, networks)


def write_test_probabilities(path: Path, table: Table, probabilities: np.ndarray, classes: list[str],
                             networks: int) -> None:
    """Keep a test table's probabilities, the mean of so many networks, for `predict` to average with others.

    The arrays ids, classes, probabilities (float32) and weight (the number of networks) of an .npz file.
    """
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, ids=table.rows.example_id.to_numpy(dtype=str), classes=np.array(classes),
                 probabilities=probabilities.astype(np.float32, order="C"), weight=networks)


def read_probabilities(path: Path) -> dict[str, np.ndarray]:
    """What write_test_probabilities wrote, read as data. Raises DataError for a file that is not whole or another."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:  # np.load may leave it open
            saved = {name: file[name] for name in ("ids", "classes", "probabilities", "weight")}
        values, weight = saved["probabilities"], saved["weight"]
        if values.shape != (len(saved["ids"]), len(saved["classes"])) or values.dtype != np.float32:
            raise ValueError(f"its probabilities are {values.dtype} {values.shape}")
        if not (np.isfinite(values).all() and (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-2)):
            raise ValueError("its rows are no probabilities")
        if weight.shape or weight.dtype.kind not in "iu" or weight < 1:
            raise ValueError("its weight is no number of networks")
        if any(saved[name].dtype.kind != "U" or len(set(saved[name].tolist())) < len(saved[name])
               for name in ("ids", "classes")):
            raise ValueError("its ids or classes are no texts, or stand there twice")
        return saved
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; write one with --save-probabilities") from None
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise DataError(f"{path}: no whole file of saved test probabilities ({type(error).__name__}: "
                        f"{first_line(error)}); write it again with --save-probabilities") from None


def match_ids(path: Path, ids: np.ndarray, table: Table) -> np.ndarray:
    """Where each row of a test table stands among a file's ids [rows]. Raises DataError unless both have the same."""
    wanted = table.rows.example_id
    places = pd.Index(ids).get_indexer(wanted)
    if (places < 0).any():
        missing = wanted.index[places < 0][0]
        raise DataError(f"{path}: has no row of the id {wanted[missing]!r}, {table.path}, row {missing}; it must be of "
                        "the same test table")
    if len(ids) > len(wanted):
        other = np.setdiff1d(ids, wanted.to_numpy(dtype=str))[0]
        raise DataError(f"{path}: has a row of the id {str(other)!r}, which {table.path} does not have; it must be of "
                        "the same test table")
    return places


def class_table(judged: Judged, classes: list[str]) -> pd.DataFrame:
    """Each class with its number of images, its accuracy (NaN without images) and what it is most often taken for."""
    counts = np.bincount(judged.targets, minlength=len(classes))
    hits = np.bincount(judged.targets, weights=judged.targets == judged.predicted, minlength=len(classes))
    wrong = judged.targets != judged.predicted
    taken = pd.Series(judged.predicted[wrong]).groupby(judged.targets[wrong]).agg(lambda guesses: guesses.mode()[0])
    with np.errstate(invalid="ignore"):
        return pd.DataFrame({"label": classes, "images": counts, "accuracy": hits / counts,
                             "taken_for": [classes[taken[place]] if place in taken else "" for place in
                                           range(len(classes))]})


# ==== 10. Pictures ====================================================================================================

def new_figure(width: float, height: float, panels: int = 1, rows: int = 1):
    """A figure of this size in inches with its axes; no window and no state of matplotlib's is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, panels)


def save_figure(path: Path, figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def symbol_texts(classes: list[str], symbols: dict[str, str]) -> list[str]:
    """What to call each class in a picture: its symbol where matplotlib can draw it, else its label."""
    from matplotlib.mathtext import MathTextParser

    parser, texts = MathTextParser("path"), []
    for label in classes:
        try:
            parser.parse(f"${symbols[label]}$")
            texts.append(f"${symbols[label]}$")
        except (KeyError, ValueError):  # a label without LaTeX; LaTeX that mathtext does not know
            texts.append(label.replace("$", r"\$"))
    return texts


def label_bars(axes, names: list[str], places: np.ndarray | None = None) -> None:
    """Names below the bars, long ones upright."""
    axes.set_xticks(range(len(names)) if places is None else places, names, fontsize=9)
    for tick, name in zip(axes.get_xticklabels(), names):
        tick.set_rotation(90 if len(name) > 2 and not name.startswith("$") else 0)


def plot_class_distribution(path: Path, classes: list[str], targets: np.ndarray, symbols: dict[str, str]) -> None:
    """Bars of the number of labelled images of each class, sorted; of many classes, sixty are named."""
    counts = np.bincount(targets, minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    shown = np.unique(np.linspace(0, len(order) - 1, min(len(order), 60)).round().astype(int))
    names = symbol_texts([classes[number] for number in order[shown]], symbols)
    figure, axes = new_figure(14, 5)
    axes.bar(range(len(order)), counts[order], width=0.8 if len(order) <= 60 else 1, color="#4477aa")
    axes.set(ylabel="labelled images", xlim=(-0.7, len(order) - 0.3),
             xlabel="" if len(order) <= 60 else f"{len(order)} classes by size, {len(shown)} of them named",
             title=f"{counts.sum():,} labelled images of {len(counts)} classes: {counts.min():,} to {counts.max():,} a "
                   f"class, median {np.median(counts):,.0f}")
    label_bars(axes, names, shown)
    if counts.max() > 20 * counts.min():
        axes.set_yscale("log")
        axes.set_ylim(bottom=1)
    save_figure(path, figure)


def plot_images(path: Path, title: str, images: np.ndarray, texts: list[str], colours: list[str] | None = None,
                columns: int = 10) -> None:
    """A grid of images [N, S, S], ink on white, each with a text below it and a frame of its colour."""
    rows = math.ceil(len(images) / columns)
    figure, axes = new_figure(1.2 * columns, 1.5 * rows + 0.5)
    for number, (image, text) in enumerate(zip(images, texts)):
        draw_tile(axes, image, number % columns, number // columns, text, colours[number] if colours else "#cccccc")
    finish_tiles(axes, columns, rows, title)
    save_figure(path, figure)


def draw_tile(axes, image: np.ndarray, column: int, row: int, text: str, colour: str) -> None:
    """One image of a grid, in the cell of this column and row."""
    left, top = 1.2 * column, 1.5 * row
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, extent=(left, left + 1, top + 1, top))
    axes.plot([left, left + 1, left + 1, left, left], [top, top, top + 1, top + 1, top], color=colour, linewidth=2)
    axes.text(left + 0.5, top + 1.07, text, ha="center", va="top", fontsize=9)


def finish_tiles(axes, columns: int, rows: int, title: str) -> None:
    """The limits and the title of a grid."""
    axes.set(xlim=(-0.1, 1.2 * columns - 0.1), ylim=(1.5 * rows, -0.1), title=title, aspect="equal")
    axes.axis("off")


def plot_samples(path: Path, data: TrainingData, symbols: dict[str, str], count: int = 60) -> None:
    """About sixty training images: equally many of each class, of many classes one each of sixty."""
    order = data.train_rows[np.argsort(data.targets[data.train_rows], kind="stable")]
    present, firsts = np.unique(data.targets[order], return_index=True)
    shown = np.unique(np.linspace(0, len(present) - 1, min(len(present), count)).round().astype(int))
    bounds = np.append(firsts, len(order))
    rows = np.concatenate([order[bounds[place]:bounds[place + 1]][:count // len(shown)] for place in shown])
    texts = symbol_texts([data.classes[number] for number in data.targets[rows]], symbols)
    plot_images(path, f"Training images of {len(shown)} of {len(data.classes)} classes",
                data.dataset.batch(rows)[0][:, 0].cpu().numpy(), texts)


def plot_curves(path: Path, history: pd.DataFrame, kept: int) -> None:
    """Loss, accuracy and learning rate by epoch, of training and of validation, with the kept epoch marked."""
    figure, panels = new_figure(15, 4.5, 3)
    for axes, kind in zip(panels, ("loss", "accuracy")):
        factor = 100 if kind == "accuracy" else 1
        axes.plot(history.epoch, factor * history[f"train_{kind}"], "o-", color="#4477aa", label="training, augmented")
        if f"val_{kind}" in history and history[f"val_{kind}"].notna().any():
            axes.plot(history.epoch, factor * history[f"val_{kind}"], "o-", color="#ee6677", label="validation")
        axes.axvline(kept, color="#bbbbbb", linestyle=":", label=f"kept: epoch {kept}")
        axes.set(title=kind, xlabel="epoch", ylabel="%" if kind == "accuracy" else "")
        axes.legend()
    panels[2].plot(history.epoch, history.learning_rate, "o-", color="#228833")
    panels[2].set(title="learning rate at the epoch's end", xlabel="epoch", yscale="log")
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # one epoch has one
    save_figure(path, figure)


LARGEST_MATRIX = 30


def plot_confusions(path: Path, judged: Judged, names: list[str]) -> None:
    """What is taken for what: the whole matrix of a few classes, the most confused pairs of many, drawn."""
    if len(names) > LARGEST_MATRIX:
        plot_confused_pairs(path, judged, names)
        return
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (judged.targets, judged.predicted), 1)
    figure, axes = new_figure(3 + 0.4 * len(names), 2.4 + 0.4 * len(names))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7,
                      color="white" if shares[row, column] > 0.5 else "black")
    axes.set(title=f"{(judged.targets == judged.predicted).mean():.2%} of {len(judged.targets):,} images are right",
             xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    save_figure(path, figure)


def plot_confused_pairs(path: Path, judged: Judged, names: list[str], pairs: int = 24) -> None:
    """The pairs of classes most often confused: an image that was, and one of the class that it was taken for."""
    wrong = pd.DataFrame({"true": judged.targets, "predicted": judged.predicted})[judged.targets != judged.predicted]
    common = wrong.value_counts().head(pairs)
    totals, rows = np.bincount(judged.targets, minlength=len(names)), math.ceil(max(len(common), 1) / 4)
    figure, axes = new_figure(14.4, 1.5 * rows + 0.5)
    for number, ((true, predicted), count) in enumerate(common.items()):
        column, row = 3 * (number % 4), number // 4
        mistaken = np.flatnonzero((judged.targets == true) & (judged.predicted == predicted))[0]
        like = np.flatnonzero(judged.targets == predicted)
        draw_tile(axes, judged.images(np.array([mistaken]))[0], column, row, names[true], "#cc3311")
        if len(like):
            draw_tile(axes, judged.images(like[:1])[0], column + 1, row, names[predicted], "#4477aa")
        axes.text(1.2 * column + 2.3, 1.5 * row + 0.5, f"{count} of\n{totals[true]}", va="center", fontsize=9)
    among = f"among {len(judged.targets):,} images"
    finish_tiles(axes, 12, rows, f"The commonest confusions {among}: one that was mistaken (red), and one of the class "
                                 "that it was taken for (blue)" if len(common) else f"No confusion {among}")
    save_figure(path, figure)


def plot_class_accuracy(path: Path, table: pd.DataFrame, names: list[str]) -> None:
    """The classes' accuracies: of a few each one, of many how they are spread and the forty with most mistakes."""
    table = table.assign(name=names, mistakes=table.images * (1 - table.accuracy))[table.images > 0]
    mistaken = table[table.mistakes > 0]
    worst = (table if len(table) <= 40 or mistaken.empty else mistaken).nlargest(40, "mistakes").sort_values("accuracy")
    figure, (left, right) = new_figure(15, 5, 2)
    left.hist(100 * table.accuracy, bins=np.linspace(0, 100, 41), color="#4477aa")
    left.set(title=f"{len(table)} classes, mean {table.accuracy.mean():.2%}", xlabel="accuracy of a class in %",
             ylabel="classes")
    right.bar(range(len(worst)), 100 * worst.accuracy, color="#ee6677")
    label_bars(right, worst.name.tolist())
    right.set(title="each class" if len(worst) == len(table) else
              f"classes with {worst.mistakes.sum() / max(table.mistakes.sum(), 1):.0%} of the mistakes: {len(worst)}",
              xlim=(-0.6, max(len(worst), 8) - 0.4), ylabel="accuracy in %",
              ylim=(100 * worst.accuracy.min() - 1 if worst.accuracy.min() > 0.9 else 0, 100))
    save_figure(path, figure)


def plot_predictions(path: Path, judged: Judged, names: list[str], count: int = 60) -> None:
    """Some images with what they were taken for and how surely: green frames are right, red ones wrong."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(judged.targets))[:count])
    right = judged.targets[chosen] == judged.predicted[chosen]
    texts = [f"{names[judged.predicted[row]]} {judged.probabilities[row].max():.0%}"
             + ("" if hit else f", not {names[judged.targets[row]]}") for row, hit in zip(chosen, right)]
    plot_images(path, f"Predictions of {len(chosen)} images chosen at random: {right.sum()} are right",
                judged.images(chosen), texts, ["#228833" if hit else "#cc3311" for hit in right])


def draw_training(folder: Path, data: TrainingData, history: pd.DataFrame, kept: int, symbols: dict[str, str]) -> None:
    """The pictures of what was learnt from and of how it went: class_distribution, samples and curves."""
    plot_class_distribution(folder / "class_distribution.png", data.classes, data.own_targets, symbols)
    plot_samples(folder / "samples.png", data, symbols)
    plot_curves(folder / "curves.png", history, kept)


def write_judgement(folder: Path, prefix: str, judged: Judged, classes: list[str], symbols: dict[str, str],
                    pictures: bool) -> None:
    """Write the accuracy by class and draw it, the confusions and some predictions."""
    table = class_table(judged, classes)
    with whole_file(folder / f"{prefix}class_accuracy.csv") as temporary:
        table.to_csv(temporary, index=False)
    if pictures:
        names = symbol_texts(classes, symbols)
        plot_class_accuracy(folder / f"{prefix}class_accuracy.png", table, names)
        plot_confusions(folder / f"{prefix}confusions.png", judged, names)
        plot_predictions(folder / f"{prefix}predictions.png", judged, names)


# ==== 11. Commands ====================================================================================================

def add_extra_rows(data: TrainingData, table: Table, config: Config, runtime: Runtime) -> TrainingData:
    """The training data with the extra table's rows after its own, their images prepared in the same way."""
    own, before = extra_settings(config), data.dataset.images.cpu().numpy()
    images = load_all_images([table], own, data.statistics)[0]
    warn_of_other_paper(table, own, data.statistics)
    targets = class_numbers(table.rows.label, data.classes)
    count, targets = len(data.targets), np.concatenate([data.targets, targets])
    weights = torch.ones(len(targets), device=runtime.device)
    weights[count:] = config.extra_weight
    dataset = MathSymbolDataset(np.concatenate([before, images]), targets, runtime, config.pin_memory)
    return dataclasses.replace(data, dataset=dataset, targets=targets, extra=len(table),
                               extra_rows=count + np.setdiff1d(np.arange(len(table)), table.bad),
                               weights=None if config.extra_weight == 1 else weights)


def split_data(data: TrainingData, train_rows: np.ndarray, val_rows: np.ndarray) -> TrainingData:
    """The data with these of its own rows to train and to validate on; to train on, the extra rows too.

    But for those that show the very pixels of a validation row: these would be known by heart.
    """
    if data.extra:
        images = data.dataset.images
        known = set(fingerprints(images[val_rows].cpu().numpy()))
        new = [digest not in known for digest in fingerprints(images[data.extra_rows].cpu().numpy())]
        train_rows = np.concatenate([train_rows, data.extra_rows[new]])
    return dataclasses.replace(data, train_rows=train_rows, val_rows=val_rows)


def describe_extra(config: Config, data: TrainingData) -> str:
    """One line: how many extra rows are trained on, and how many are not."""
    used = int((data.train_rows >= len(data.own_targets)).sum())
    left_out = f"; {len(data.extra_rows) - used:,} left out: images of validation rows"
    return (f"{used:,} extra rows of {config.extra_csv} to train on, each counts {config.extra_weight:g}"
            + left_out * (used < len(data.extra_rows)))


def prepare_data(config: Config, runtime: Runtime) -> tuple[Config, TrainingData, Table, MathSymbolDataset]:
    """Read and check everything before any training: the complete config, training data, test table and images."""
    with runtime.ranks.in_turn():  # of each machine's ranks the first decodes, and what is wrong is said once
        config, data, test_table, test_dataset = read_everything(config, runtime)
    if not config.folds or config.fold is not None:  # all of them have each its own teachers
        data = dataclasses.replace(data, taught=ask_teachers(config, data, runtime))
    return config, data, test_table, test_dataset


def labelled_tables(config: Config) -> list[Table]:
    """The training table, and the extra one where there is one."""
    table = read_train_table(config)
    return [table, read_extra_table(config, table.rows.label)] if config.extra_csv else [table]


def check_validation(config: Config, val_rows: np.ndarray) -> None:
    """Raise UsageError where settings need validation rows and there are none."""
    if (config.schedule == "plateau" or config.early_stopping) and not len(val_rows):
        raise UsageError("--schedule plateau and --early-stopping need validation rows, and no class has "
                         f"{SMALLEST_CLASS_TO_SPLIT} rows with usable images; leave them out")


def read_everything(config: Config, runtime: Runtime) -> tuple[Config, TrainingData, Table, MathSymbolDataset]:
    """The complete config, the training data, the test table and its images."""
    (train_table, *extra_tables), test_table = labelled_tables(config), read_test_table(config)
    extra = [(table, extra_settings(config)) for table in extra_tables]
    for table, own in [(train_table, config), (test_table, config), *extra]:
        check_images_stay(own, table, run_files(config))
    classes = sort_classes(pd.concat([table.rows.label for table in (train_table, *extra_tables)]))
    targets = class_numbers(train_table.rows.label, classes)
    check_sample_submission(config, test_table, classes)
    print(describe_classes(classes, targets, parts_of(config)) + describe_repeats(train_table))
    train_rows, val_rows = split_rows(targets, config)
    if not parts_of(config):
        check_validation(config, val_rows)
    # All folds get as many epochs, though their rows, which the images decide, may be one more or less.
    count = len(targets) - len(targets) // parts_of(config) if parts_of(config) else len(train_rows)
    asked, config = config.model, complete_config(config, runtime, count + sum(map(len, extra_tables)))
    summary = summarize_model(build_model(config, len(classes)), config)  # before decoding: it refuses an unfit size
    statistics = look_at_images(train_table, config)
    train_images, test_images = load_all_images([train_table, test_table], config, statistics)
    warn_of_other_paper(test_table, config, statistics)
    train_rows, val_rows, parts = split_table(config, train_table, targets, train_images)
    check_validation(config, val_rows)  # once more, without those of no usable image
    if len(train_rows) < 2:
        raise DataError(f"{train_table.path}: fewer than two rows have an image that can be used")
    dataset = MathSymbolDataset(train_images, targets, runtime, config.pin_memory)
    print(f"{len(train_rows):,} rows to train on, {len(val_rows):,} to validate on"
          f"{f' in fold {config.fold or 0}' if config.folds else ''}, {len(test_table):,} to predict; "
          f"{'black on white' if statistics.paper else 'white on black'}, stored at {statistics.size} pixels\n"
          f"model {config.model}{f' (auto: the choice for {runtime.device.type})' if asked == 'auto' else ''}\n"
          f"{summary}")
    data = TrainingData(dataset, targets, classes, statistics, train_rows, val_rows, parts)
    for table in extra_tables:
        data = add_extra_rows(data, table, config, runtime)
    test_dataset = MathSymbolDataset(test_images, None, runtime, config.pin_memory)
    return config, split_data(data, train_rows, val_rows), test_table, test_dataset


@dataclass(frozen=True, eq=False)
class Task:
    """What the networks of a run share: where they are trained, what they predict, what stops them."""

    runtime: Runtime
    test_table: Table
    test_dataset: MathSymbolDataset
    symbols: dict[str, str]  # LaTeX by label
    stops: StopSignals


def run(config: Config, started: float, stops: StopSignals) -> None:
    """Train, predict, write the submission; or go on with it where an earlier process was stopped."""
    for own in (config, *(fold_config(config, fold) for fold in range(config.folds))):
        check_not_read(Path(own.output_dir), run_files(own), input_files(own))
    _, runtime = output_folder(config), start_runtime(config)
    symbols = read_symbols(config)
    print(f"device {runtime.describe()}")
    if runtime.gpus > 1:
        print(f"one process drives {runtime.gpus} GPUs; faster: torchrun --nproc-per-node={runtime.gpus} script.py")
    config, data, test_table, test_dataset = prepare_data(config, runtime)
    task = Task(runtime, test_table, test_dataset, symbols, stops)
    if config.folds:
        run_folds(config, data, task, started)
    else:
        run_one(config, data, task, started)


def run_one(config: Config, data: TrainingData, task: Task, started: float, taken: float = 0.0) -> float:
    """Train a network and write all that belongs to it into the output folder; gives the seconds since its start.

    `taken` are seconds of max_minutes that are not for this network.
    """
    folder = output_folder(config)
    with contextlib.nullcontext() if task.runtime.ranks.rank else folder_to_itself(folder):
        return train_and_write(config, data, task, started, taken)


def train_and_write(config: Config, data: TrainingData, task: Task, started: float, taken: float) -> float:
    """What run_one does in its folder."""
    folder, runtime = Path(config.output_dir), task.runtime
    about = agreed_run(config, data, runtime)
    if data.extra:
        print(describe_extra(config, data))
    keeper = RunKeeper(config, folder / "last.pth", about, task.stops, runtime.ranks, started)
    started -= keeper.elapsed
    to_predict = len(task.test_table) * (2 if config.folds else 1)  # once more with the other folds' networks
    seconds = seconds_to_train(config, data, to_predict, runtime, started - taken, goes_on=keeper.found is not None)
    history = fit(config, data, runtime, seconds, keeper)
    best, judged = finish_network(config, data, runtime)
    probabilities = ensemble_predict([best], [task.test_dataset], runtime)
    if runtime.ranks.rank == 0:
        answer_for_bad_images(task.test_table, probabilities, data.classes)
        write_answers(config, task.test_table, probabilities, data.classes, 1)
        if judged:
            write_probabilities(folder / "val_probabilities.npz", judged, data.classes)
        if config.pictures:
            draw_training(folder, data, history, best.metrics["epoch"], task.symbols)
        if judged:
            write_judgement(folder, "", judged, data.classes, task.symbols, config.pictures)
        remove_leftovers(config, {"history.csv", "class_distribution.png", "samples.png", "curves.png",
                                  *(JUDGEMENT_FILES if judged else ())})
        # By which a fold counts as finished, so the last of all.
        write_run_record(folder / "run.json", config, runtime, best.metrics, started, about)
        keeper.discard()
        print(describe_result(config, best.metrics, history, started))
    return time.monotonic() - started


def remove_leftovers(config: Config, used: set[str]) -> None:
    """Remove an earlier run's files whose names this one did not use: they are of another network. A network stays."""
    used = {"run.json", *used, *[TEST_PROBABILITIES] * config.save_probabilities}
    for name in OWN_FILES.difference(LAST_FILES):
        if name not in used or (name.endswith(".png") and not config.pictures):
            Path(config.output_dir, name).unlink(missing_ok=True)


def agreed_run(config: Config, data: TrainingData, runtime: Runtime) -> dict:
    """What `identify_run` says of this run. Raises DataError on a rank that read anything else than rank 0."""
    about = identify_run(config, data, runtime)
    if difference := describe_difference(runtime.ranks.ask_first(lambda: about), about):
        raise DataError(f"rank 0 has a run with {difference}: all ranks must read the same files")
    return about


def finish_network(config: Config, data: TrainingData, runtime: Runtime) -> tuple[Trained, Judged | None]:
    """The best epoch's network, as it will answer, and what it says of the validation rows, if there are any.

    Training images that vote come to its file, with the figures that they lead to.
    """
    path = Path(config.output_dir, config.model_file)
    best = runtime.ranks.ask_first(lambda: load_checkpoint(path)).alone  # a process before this one may have come here
    if config.neighbours:
        best = dataclasses.replace(best, model=remember(best, data, runtime))
    judged = judge(best, data, runtime) if len(data.val_rows) else None
    if config.neighbours:
        figures = score(judged.probabilities, judged.targets) if judged else {}
        best = dataclasses.replace(best, config=config, metrics={**best.metrics, **figures})
        if runtime.ranks.rank == 0:
            save_checkpoint(path, best)
    return best, judged


def run_folds(config: Config, data: TrainingData, task: Task, started: float) -> None:
    """Train the folds that are not finished, or the one asked for, and write what they all give when none is missing.

    max_minutes is shared: each fold that is left gets an equal part of what the finished ones have not used.
    """
    every = {fold: fold_config(config, fold) for fold in range(config.folds)}
    wanted = every if config.fold is None else {config.fold: every[config.fold]}
    found = task.runtime.ranks.ask_first(lambda: {
        fold: find_finished(own, fold_data(data, fold), task.runtime) if config.resume else None
        for fold, own in wanted.items()})
    finished = {fold: record for fold, record in found.items() if record}
    for fold, record in finished.items():
        print(f"fold {fold} is finished: validation accuracy {record['metrics']['val_accuracy']:.2%}")
    limit = 60 * config.max_minutes
    used = sum(record["seconds"] for record in finished.values())
    for place, fold in enumerate(left := [fold for fold in wanted if fold not in finished]):
        print(f"fold {fold} of 0 to {config.folds - 1}, in {every[fold].output_dir}", flush=True)
        own = fold_data(data, fold)
        if config.teachers:
            taught = data.taught if config.fold is not None else ask_teachers(every[fold], own, task.runtime)
            own = dataclasses.replace(own, taught=taught)
        begun = time.monotonic() if place else started  # the first one pays for what was prepared for all
        used += run_one(every[fold], own, task, begun, limit - (limit - used) / (len(left) - place))
    join_folds(config, every, data, task)


def fold_config(config: Config, fold: int) -> Config:
    """The config of one fold's run, in a folder of its own."""
    return dataclasses.replace(config, fold=fold, output_dir=str(Path(config.output_dir, f"fold{fold}")))


def fold_data(data: TrainingData, fold: int) -> TrainingData:
    """The data split for one fold, without teachers."""
    return dataclasses.replace(split_data(data, *part_rows(data.parts, fold)), taught=None)


def find_finished(config: Config, data: TrainingData, runtime: Runtime) -> dict | None:
    """What run.json and val_probabilities.npz hold of a fold that is finished; None where it is not.

    Finished is what has its files and no state to go on from. Raises DataError for one of other settings or data, but
    for those of the machine: folds may be trained on several.
    """
    folder = Path(config.output_dir)
    files = [folder / name for name in ("run.json", "val_probabilities.npz", config.model_file)]
    if any((folder / name).exists() for name in LAST_FILES[:2]) or not all(path.exists() for path in files):
        return None
    own, remedy = identify_run(config, data, runtime), "train it anew with --no-resume, or name another --output-dir"
    if all(path.exists() for path in teacher_files(config)):  # they may be gone when nobody is taught any more
        own["taught"] = teacher_digests(config)
    try:
        record, arrays = json.loads(files[0].read_text()), dict(np.load(files[1]))
        found = {**own, "settings": {name: record["config"].get(name) for name in own["settings"].keys() - ON_MACHINE},
                 "classes": arrays["classes"].tolist(), "data": record["data_sha256"],
                 "taught": record.get("taught", own["taught"]) if own["taught"] else []}
        same_rows = np.array_equal(arrays["rows"], data.val_rows)
    except Exception as error:  # json, zipfile and numpy each raise their own
        raise DataError(f"{folder}: what a finished fold left there cannot be read ({type(error).__name__}: "
                        f"{first_line(error)}); {remedy}") from None
    difference = describe_difference(found, own) or ("" if same_rows else "probabilities of other rows")
    if difference:
        raise DataError(f"{folder}: holds a finished fold with {difference}; give its settings to keep it, {remedy}")
    return record | arrays


def join_folds(config: Config, every: dict[int, Config], data: TrainingData, task: Task) -> None:
    """Write what all folds give together; where some are missing, say which, and how they are made."""
    found = task.runtime.ranks.ask_first(lambda: find_all(every, data, task.runtime))
    missing = [fold for fold in every if not found[fold]]
    if missing:
        print(f"not finished yet: fold {', '.join(map(str, missing))} of {config.folds}; the same command with "
              f"{', '.join(f'--fold {fold}' for fold in missing)} trains {'each' if len(missing) > 1 else 'it'}, and "
              "the last to finish writes the submission of the mean")
    else:
        write_folds(dataclasses.replace(config, fold=None), every, found, data, task)


def find_all(every: dict[int, Config], data: TrainingData, runtime: Runtime) -> dict[int, dict | None]:
    """What the finished folds left, each one's or None; what is wrong with one is warned of."""
    found = dict.fromkeys(every)
    for fold, own in every.items():
        try:
            found[fold] = find_finished(own, fold_data(data, fold), runtime)
        except DataError as error:  # of another job, which may be about to train it anew
            warn(str(error))
    return found


def write_folds(config: Config, every: dict[int, Config], found: dict[int, dict], data: TrainingData,
                task: Task) -> None:
    """Write the out-of-fold probabilities with their figures, and the submission of the networks' mean."""
    folder, runtime = output_folder(config), task.runtime
    members = runtime.ranks.ask_first(lambda: fold_members(every))
    probabilities = ensemble_predict(members, [task.test_dataset] * len(members), runtime)
    if runtime.ranks.rank:
        return
    answer_for_bad_images(task.test_table, probabilities, data.classes)
    write_answers(config, task.test_table, probabilities, data.classes, len(members))
    judged = judge_folds(found, data)
    folds, seconds = data.parts[judged.rows], sum(record["seconds"] for record in found.values())
    metrics = score_folds(judged, folds)
    whole = dataclasses.replace(data, train_rows=judged.rows, val_rows=judged.rows, taught=None)
    write_probabilities(folder / "oof_probabilities.npz", judged, data.classes, folds=folds)
    write_run_record(folder / "run.json", config, runtime, metrics, time.monotonic() - seconds,
                     identify_run(config, whole, runtime))
    write_judgement(folder, "", judged, data.classes, task.symbols, config.pictures)
    remove_leftovers(config, {"oof_probabilities.npz", *JUDGEMENT_FILES.difference({"val_probabilities.npz"})})
    print(describe_folds(config, metrics, folder))


def fold_members(every: dict[int, Config]) -> list[Trained]:
    """The networks of all folds. Raises DataError where a folder holds another fold's."""
    members = []
    for fold, own in every.items():
        path = Path(own.output_dir, own.model_file)
        members.append(load_checkpoint(path))
        if members[-1].config.fold != fold:
            raise DataError(f"{path}: is the network of fold {members[-1].config.fold}, not of fold {fold}; put its "
                            f"own there, or train it anew with --fold {fold} --no-resume")
    return members


def judge_folds(found: dict[int, dict], data: TrainingData) -> Judged:
    """Every usable row with what the network says of it that was not trained on it, in the table's order."""
    rows = np.concatenate([record["rows"] for record in found.values()])
    order = np.argsort(rows)
    probabilities = np.concatenate([record["probabilities"] for record in found.values()])[order]
    return Judged(data.dataset, rows[order], data.targets[rows[order]], probabilities)


def score_folds(judged: Judged, folds: np.ndarray) -> dict:
    """The figures of `score` over all rows, each fold's accuracy, and their standard deviation (n - 1)."""
    hits = judged.predicted == judged.targets
    accuracies = [float(hits[folds == fold].mean()) for fold in range(folds.max() + 1)]
    return {**score(judged.probabilities, judged.targets), "val_accuracy_deviation": float(np.std(accuracies, ddof=1)),
            "fold_accuracies": accuracies}


def describe_folds(config: Config, metrics: dict, folder: Path) -> str:
    """The last lines of a cross-validation: its figures, and what was written."""
    each = " ".join(f"{100 * accuracy:.2f}" for accuracy in metrics["fold_accuracies"])
    return (f"cross-validated accuracy {metrics['val_accuracy']:.2%} +- {100 * metrics['val_accuracy_deviation']:.2f} "
            f"({config.folds} folds: {each}), top 3 {metrics['val_top3_accuracy']:.2%}, per class "
            f"{metrics['val_class_accuracy']:.2%}, loss {metrics['val_loss']:.4f} (of the rows that chose each fold's "
            f"epoch)\nwrote {config.submission_file} of the {config.folds} networks' mean, oof_probabilities.npz, "
            f"class_accuracy.csv, run.json{' and pictures' if config.pictures else ''} in {folder.resolve()}")


def predict_command(config: Config, checkpoints: list[str], started: float) -> None:
    """Write the submission of one or more files, checkpoints or saved probabilities, averaged."""
    written = [config.submission_file, *[TEST_PROBABILITIES] * config.save_probabilities]
    check_not_read(Path(config.output_dir), written, [*input_files(config), *map(Path, checkpoints)])
    folder, table = output_folder(config), read_test_table(config)
    check_images_stay(config, table, set(written))
    members, runtime = choose_members(config, checkpoints, table)
    classes = members[0].classes
    check_sample_submission(config, table, classes)
    weights = choose_weights(members, config, runtime)
    probabilities = ensemble_of_files(members, Question(table, np.arange(len(table)), config, runtime), weights)
    if runtime.ranks.rank:
        return
    if any(member.config for member in members):  # saved answers need no image
        answer_for_bad_images(table, probabilities, classes)
    networks = sum(member.networks for member, weight in zip(members, weights) if weight)
    write_answers(config, table, probabilities, classes, networks)
    what = "one network" if networks == 1 else f"the mean of {networks} networks"
    print(f"wrote {folder / config.submission_file}"
          f"{f' and {TEST_PROBABILITIES}' if config.save_probabilities else ''}: {len(table):,} rows of {table.path}, "
          f"{what}, on {runtime.describe()}; {time.monotonic() - started:.1f} s")


def evaluate_command(config: Config, checkpoints: list[str], started: float) -> None:
    """Loss and accuracy of one or more checkpoints, averaged, on the labelled rows of test_csv; with pictures."""
    check_not_read(Path(config.output_dir), EVALUATION_FILES, [*input_files(config), *map(Path, checkpoints)])
    folder, (members, runtime) = output_folder(config), choose_members(config, checkpoints)
    table, classes = open_table(config, test_table_name(config), "label", "test"), members[0].classes
    check_images_stay(config, table, EVALUATION_FILES)
    unknown = table.rows.index[~table.rows.label.isin(classes)]
    if len(unknown):
        raise DataError(f"{table.path}, row {unknown[0]}: label {table.rows.label[unknown[0]]!r} is none of the "
                        f"{len(classes)} classes that the checkpoint knows; remove the row or name another table")
    targets = class_numbers(table.rows.label, classes)
    question = Question(table, np.arange(len(table)), config, runtime)
    dataset = question.dataset(members[0].statistics)  # which tells what cannot be used, and is drawn
    rows = np.setdiff1d(np.arange(len(table)), table.bad)
    probabilities = ensemble_of_files(members, question, choose_weights(members, config, runtime))
    if runtime.ranks.rank:
        return
    judged = Judged(dataset, rows, targets[rows], probabilities[rows])
    figures = score(judged.probabilities, judged.targets)
    write_judgement(folder, "evaluation_", judged, classes, read_symbols(config), config.pictures)
    print(f"{len(rows):,} rows of {table.path}: loss {figures['val_loss']:.4f}, "
          f"accuracy {figures['val_accuracy']:.2%}, top 3 {figures['val_top3_accuracy']:.2%}, "
          f"per class {figures['val_class_accuracy']:.2%}")
    if len(classes) <= LARGEST_MATRIX:
        for row in class_table(judged, classes).query("images > 0").itertuples():
            print(f"  {row.label:>6} {row.accuracy:8.2%} of {row.images:,}")
    print(f"wrote evaluation_class_accuracy.csv{' and its pictures' if config.pictures else ''} in {folder.resolve()}; "
          f"{time.monotonic() - started:.1f} s")


def choose_members(config: Config, checkpoints: list[str], table: Table | None = None) -> tuple[list[Member], Runtime]:
    """The named files, or the checkpoint in the output folder, and a runtime of the precision that they were made in.

    Saved probabilities, which must be of the rows of `table`, may be among them where there is one.
    """
    names = checkpoints or [Path(config.output_dir, config.model_file)]
    members = look_at_members([Path(name) for name in names], table)
    if config.views > 1 and not any(member.config for member in members):
        raise UsageError(f"--views {config.views}: saved probabilities are of the views that they were made with; "
                         "leave it out, or name checkpoints")
    for member in members:
        if config.views > 1 and member.config and not member.config.augment:
            raise UsageError(f"--views {config.views}: {member.path} was trained with --no-augment, and knows one view "
                             "of an image; leave it out")
    return members, runtime_of(members, config)


def runtime_of(members: list[Member] | list[Trained], config: Config) -> Runtime:
    """A runtime of the precision that the first of these networks was made in: float32, or what the device has."""
    made_in = next((member.config.precision for member in members if member.config), "")
    return start_runtime(dataclasses.replace(config, precision="float32") if config.precision == "auto"
                         and made_in == "float32" else config)


def write_run_record(path: Path, config: Config, runtime: Runtime, metrics: dict, started: float,
                     about: dict) -> None:
    """Write what a run was and gave: settings, versions, device, figures, time, memory, digests of what it read."""
    record = {"config": dataclasses.asdict(config), "versions": versions(),
              "device": runtime.describe(), "metrics": metrics, "seconds": round(time.monotonic() - started, 1),
              "peak_memory_gb": peak_memory_gb(), "data_sha256": about["data"], "taught": about["taught"]}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def peak_memory_gb() -> float | None:
    """The most memory that this process held, in GB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def describe_result(config: Config, metrics: dict, history: pd.DataFrame, started: float) -> str:
    """The last lines of a run: which epoch was kept, what was written, how long it took."""
    seconds = time.monotonic() - started
    text = f"kept epoch {metrics['epoch']} of {len(history)}"
    if "val_accuracy" in metrics:
        kept = history.val_accuracy[history.epoch == metrics["epoch"]]  # none if a kill came between it and last.pth
        alone = f"network alone {kept.iloc[0]:.2%}, " if config.neighbours and len(kept) else ""
        text += (f": validation accuracy {metrics['val_accuracy']:.2%}, top 3 {metrics['val_top3_accuracy']:.2%}, "
                 f"per class {metrics['val_class_accuracy']:.2%} (of the rows that chose the epoch); "
                 f"{alone}last epoch {history.val_accuracy.iloc[-1]:.2%}")
    return (f"{text}\nwrote {config.model_file}, {config.submission_file}, history.csv, run.json"
            f"{' and pictures' if config.pictures else ''} in {Path(config.output_dir).resolve()}\n"
            f"total time {int(seconds) // 60} min {seconds % 60:.0f} s, peak memory {peak_memory_gb()} GB")


def exit_status(action: Callable[[StopSignals], None], stopped: str) -> int:
    """Do a program's work; gives 0, or after one line on stderr 1 for bad data, 2 for bad usage, 128 and a signal."""
    name = f"rank {own_rank()}: error" if own_rank() else "error"
    with contextlib.suppress(AttributeError):  # a notebook's output is no terminal
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold what the terminal's encoding does not
    try:
        with StopSignals() as stops:
            action(stops)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except DataError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:  # a full disk, a folder that vanished
        print(f"{name}: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            print(f"{name}: out of memory ({first_line(error)}); try half the --batch-size, or for prediction a "
                  "smaller --eval-batch-size", file=sys.stderr)
            return 1
        if not is_lost_rank(error):
            raise
        print(f"{name}: another rank has gone ({first_line(error)}); the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if not own_rank():
            print(f"stopped by {signal.Signals(number).name}: {str(stop) or stopped}", file=sys.stderr)
        return 128 + number
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command line; gives the exit status."""
    started = time.monotonic()
    command, checkpoints, config = parse_command_line(argv)
    if own_rank():  # rank 0 speaks for all
        sys.stdout = None  # print does nothing then
    if command == "run":
        return exit_status(lambda stops: run(config, started, stops), "the same command goes on with what is saved in "
                           f"last.pth in {config.output_dir}, or starts over where there is none")
    work = {"predict": predict_command, "evaluate": evaluate_command}[command]
    return exit_status(lambda _: work(config, checkpoints, started), "what was not written yet stays as it was")


if __name__ == "__main__":
    if status := main(None if "__file__" in globals() else []):  # the arguments of a notebook's cell are its kernel's
        sys.exit(status)
