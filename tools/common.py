"""What several tools and benchmarks need: a command line, single pictures, the validation rows of checkpoints."""

import argparse
import base64
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image

import script
from pipeline import ensemble, splits, tables
from pipeline.cli import describe_fields, flag_of
from pipeline.decoding import (
    background_of,
    depth_of,
    describe_fault,
    file_level,
    fit_to_square,
    read_grey,
    to_grey,
    to_ink,
    white_level,
)
from pipeline.ensemble import EnsembleMember
from pipeline.errors import DataError, UsageError
from pipeline.images import ImageStatistics, LoadSettings, load_images
from pipeline.sources import HOW_TO_READ

SCRIPT = Path(script.__file__).resolve()

# Flags that say where a competition's tables are and how they are read.
OF_TABLES = ("data_dir", "train_csv", "test_csv", "root_dir", "test_root", *HOW_TO_READ)

# Defaults of flags that say where the training table of a checkpoint is: None is what the checkpoint's settings say.
OF_CHECKPOINT = {"data_dir": None, "train_csv": None, "root_dir": None}
OF_NONE = {"output_dir": "a temporary folder"}  # what None stands for otherwise


def make_parser(module: str, documentation: str, *names: str, **defaults: object) -> argparse.ArgumentParser:
    """Return a parser with shared flags: those of Config's fields of these names, and --checkpoint.

    `defaults` names more flags, with a default that is not Config's.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=documentation, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    described = {**describe_fields(script.Config), "checkpoint": ("", "checkpoint of script.py")}
    for name in (*names, *defaults):
        default = defaults[name] if name in defaults else getattr(script.Config, name, script.Config.model_file)
        shown = OF_NONE.get(name, "that of the checkpoint") if default is None else repr(str(default))
        form = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {
            "type": Path if name in ("output_dir", "checkpoint") else str}
        parser.add_argument(flag_of(name), default=default, **form,
                            help=f"{described[name][1]} (default: {shown})".replace("%", "%%"))
    return parser


def table_config(given: argparse.Namespace, **more: object) -> script.Config:
    """Return the config of the tables that a command line with the flags `OF_TABLES` names, and of more settings.

    Raises UsageError for a value that no table can be read with.
    """
    try:
        return script.Config(**{name: getattr(given, name) for name in OF_TABLES}, **more)
    except ValueError as error:
        raise UsageError(str(error)) from None


def read_ink(source: Path | bytes, statistics: ImageStatistics, name: object) -> np.ndarray:
    """Return the ink [H, W], uint8, of one picture with any background: a path, or a file's content.

    Raises DataError, with the name, for what cannot be used.
    """
    try:
        raw, alpha = read_grey(source if isinstance(source, bytes) else str(source))
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        raise DataError(f"{name}: {describe_fault(error)}") from None
    highest = float(raw.max())
    level = file_level(depth_of(raw, alpha), highest, statistics.levels)
    grey = to_grey(raw, level if highest < 2 * level else white_level(highest, True))  # a scan for a network of masks
    return to_ink(grey, alpha, background_of(grey, alpha))


def cut_out(ink: np.ndarray) -> np.ndarray:
    """Return the part of an image [H, W], uint8, that holds ink; all of an image without."""
    rows, columns = (np.flatnonzero(ink.max(axis=axis) > 127) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else ink


def read_picture(path: Path, statistics: ImageStatistics, crop: bool) -> np.ndarray:
    """Return the ink [size, size], uint8, of one picture with any background; `crop` cuts out the drawing first.

    Raises DataError for a file that cannot be used.
    """
    ink = read_ink(path, statistics, path)
    return fit_to_square(cut_out(ink) if crop else ink, statistics.size)


def as_png(ink: np.ndarray) -> str:
    """Return ink [H, W], uint8, as black on white in a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(255 - ink).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def train_source(config: script.Config, given: argparse.Namespace) -> tables.TableSource:
    """Return the source of a network's training table: by its settings, except what the command line names."""
    flags = {"name": "train_csv", "folder": "data_dir", "image_folder": "root_dir", "cache_dir": "cache_dir"}
    named = {field: value for field, flag in flags.items() if (value := vars(given).get(flag)) is not None}
    return dataclasses.replace(config.train_source, **named)


def read_latex(config: script.Config, given: argparse.Namespace) -> dict[str, str]:
    """Return LaTeX by label from classes.csv beside a network's training table; empty if there is no such file."""
    return tables.read_latex(train_source(config, given).path.with_name("classes.csv"))


def open_validation(paths: list[Path], given: argparse.Namespace,
                    device: str = "auto") -> tuple[list[script.TrainedModel], list[script.MathSymbolDataset]]:
    """Load checkpoints and the rows that validated all of them: a dataset of these rows for each network.

    The command line names the folders of the training table if they are not those of the first checkpoint. Raises
    DataError if the networks know different classes, were split in different ways or were trained on another table.
    """
    networks = [script.load_checkpoint(path) for path in paths]
    members = [EnsembleMember(path, network.classes, 1, network.config, network.statistics)
               for path, network in zip(paths, networks)]
    ensemble.check_same_classes(members)
    ways = {network.config.split.describe() for network in networks}
    if len(ways) > 1:
        raise DataError(f"the checkpoints were split in different ways ({'; '.join(sorted(ways)[:3])}): one was "
                        "trained on rows that validate another; score them one by one")
    table = tables.read_train_table(train_source(networks[0].config, given))
    for path, network in zip(paths, networks):
        if network.labels_sha256 != table.labels_sha256:
            raise DataError(f"{table.path}: not the rows that {path} was trained on, or not in their order; name its "
                            "own table with --data-dir or --train-csv")
    runtime = ensemble.runtime_for(members, device)
    settings = LoadSettings(given.cache_dir, on_bad_image=networks[0].config.on_bad_image)
    images = {network.statistics: load_images([table], network.statistics, settings)[0] for network in networks}
    rows, *others = [find_split(network, table, images[network.statistics]).val_rows for network in
                     {network.statistics: network for network in networks}.values()]
    if not all(np.array_equal(rows, other) for other in others):
        raise DataError("the checkpoints were validated on different rows: they store images at different sizes, and "
                        "other images are copies of each other there; score them one by one")
    if not len(rows):
        raise DataError(f"{paths[0]}: was trained on every row, and none is left to validate on; train it with "
                        "--train-val-split below 1")
    part = select_rows(table, rows)
    loaded = {statistics: script.MathSymbolDataset(part, networks[0].config, networks[0].classes, statistics, runtime,
                                                   own[rows]) for statistics, own in images.items()}
    return networks, [loaded[network.statistics].for_network(network.config) for network in networks]


def find_split(network: script.TrainedModel, table: tables.Table, images: np.ndarray) -> splits.Split:
    """Return which rows of its training table a network was trained on, and which validated it."""
    config = network.config
    groups = table.rows[config.group_column].to_numpy() if config.group_column else None
    targets = tables.class_numbers(table.rows.label, network.classes)
    return splits.split_rows(config.split, targets, table.usable_rows, splits.image_digests(images), groups,
                             table.path)


def select_rows(table: tables.Table, rows: np.ndarray) -> tables.Table:
    """Return a table of some rows, all with usable images, of a table."""
    pixels = None if table.pixels is None else table.pixels[rows]
    encoded = None if table.encoded is None else [table.encoded[row] for row in rows]
    return dataclasses.replace(table, rows=table.rows.iloc[rows], pixels=pixels, encoded=encoded, faults={})


def train_step(trainer: script.Trainer, dataset: script.MathSymbolDataset, rows: np.ndarray, seed: int) -> None:
    """Take the training step of one batch of rows of weight 1, half-way through the schedule."""
    inputs, classes, _ = dataset.batch(rows, seed)
    targets = F.one_hot(classes, len(dataset.classes)).float()
    if trainer.config.mixup:
        inputs, targets = script.mixup_data(inputs, targets, trainer.config.mixup_alpha, seed)
    trainer.training_step(inputs, targets, 0.5)


def predict_each(networks: list[script.TrainedModel],
                 datasets: list[script.MathSymbolDataset]) -> Iterator[np.ndarray]:
    """Yield each network's probabilities [rows, classes] of its dataset, with the classes in the first one's order."""
    for network, dataset in zip(networks, datasets):
        probabilities = script.predict(dataset.runtime.to_device(network.model), dataset)
        yield probabilities[:, [network.classes.index(label) for label in networks[0].classes]]
