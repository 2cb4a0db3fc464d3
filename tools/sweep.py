"""Train every combination of some settings, and rank them.

    python -m tools.sweep --data-dir DIGITS --preset digits-mlp
    python -m tools.sweep --data-dir COMPETITION --learning-rate 0.001,0.01 --batch-size 32,64 --output-dir sweep

Flags are those of script.py, except those that have no effect here. A flag with several values, separated by commas, is
swept over; the others hold for every combination. By default the learning rates 0.001, 0.01, 0.1, 0.5, 1.0 are combined
with batch sizes 32, 64, 128, 256, 512, unless one of both is given. The data is read once and stays in memory, at the
largest image size of any combination. Combinations in sweep.csv are not trained again, so that a stopped sweep can be
resumed; a sweep of other settings or data is refused. A training that diverges is a row too. Writes into --output-dir

    sweep.csv     a row per combination: its settings, the last epoch's metrics, its seconds and why it failed
    history.csv   a row per epoch of each combination
    curves.png    loss and accuracy, of training and validation, by epoch
    heat_map.png  the validation accuracy by the first two settings
    sweep.json    what all combinations share, by which a sweep is recognised

and prints the ranking. The validation rows rank the combinations, so the figures of the best one are slightly too good.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import script
from pipeline import files, models, plots
from pipeline.device import start_runtime
from pipeline.errors import DataError, UsageError, first_line
from pipeline.metrics import HISTORY_COLUMNS
from pipeline.signals import exit_status
from pipeline.splits import SMALLEST_CLASS_TO_SPLIT
from tools.common import OF_TABLES, make_parser

DEFAULT_GRID = {"learning_rate": [0.001, 0.01, 0.1, 0.5, 1.0], "batch_size": [32, 64, 128, 256, 512]}
# Settings that the data is read and split by, and those of the runtime: both are shared by all combinations.
SHARED = {*OF_TABLES, "train_val_split", "split_seed", "folds", "fold", "group_column", "on_bad_image", "device",
          "precision", "eval_batch_size", "num_workers", "extra_csv", "extra_root", "extra_weight"}
# Settings whose value may contain commas.
TEXTS = {*OF_TABLES, "milestones", "extra_csv", "extra_root", "group_column"}
# Settings of what `script.py run` does before and after the training.
UNUSED = {"output_dir", "model_file", "submission_file", "pictures", "max_minutes", "resume", "checkpoint_minutes",
          "knn_neighbors", "knn_weight", "save_probabilities", "tta"}
HISTORY = ["last_rate" if name == "learning_rate" else name for name in HISTORY_COLUMNS]
FIGURES = ["train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_top3_accuracy", "val_class_accuracy"]


def parse_grid(argv: list[str]) -> tuple[list[str], dict[str, list]]:
    """Return the flags that hold for every combination, and the values of each setting that is swept over."""
    fixed, grid, words = [], {}, list(argv)
    types = {field.name: field.type for field in dataclasses.fields(script.Config)}
    while words:
        flag, equals, text = words.pop(0).partition("=")
        if not equals and words and not words[0].startswith("--"):
            text = words.pop(0)
        name = flag.removeprefix("--").replace("-", "_")
        if name.removeprefix("no_") in UNUSED:
            raise UsageError(f"{flag} has no effect on a sweep: leave it out")
        if "," not in text or name in TEXTS:
            fixed += [flag, text] if text else [flag]
        elif name in SHARED or name not in types or types[name] is bool:
            raise UsageError(f"{flag} cannot be swept over: name one value, which holds for every combination")
        else:
            values = [script.parse_command_line([flag, value.strip()])[2] for value in text.split(",")]
            grid[name] = [getattr(config, name) for config in values]
            if None in grid[name]:
                raise UsageError(f"{flag}: auto cannot be swept over; name the value that it stands for")
    named = {flag.removeprefix("--").replace("-", "_") for flag in fixed}
    grid = grid or {name: values for name, values in DEFAULT_GRID.items() if name not in named}
    if not grid:
        raise UsageError("nothing is swept over: give a flag several values, separated by commas")
    return fixed, grid


def sweep_fingerprint(config: script.Config, grid: dict[str, list], data: script.CompetitionData) -> str:
    """Return what identifies a sweep: the grid, and the fingerprint of a run without the settings of the grid."""
    fingerprint = script.run_fingerprint(config, data)
    settings = {name: value for name, value in fingerprint["settings"].items() if name not in grid}
    return json.dumps([{**fingerprint, "settings": settings}, grid], sort_keys=True)


def train_quietly(config: script.Config, data: script.CompetitionData) -> pd.DataFrame:
    """Train one combination without output. Return its history."""
    data = dataclasses.replace(data, dataset=data.dataset.for_network(config))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return script.fit(dataclasses.replace(config, output_dir=folder), data)[0]


def read_finished(folder: Path, fingerprint: str, names: list[str]) -> tuple[list[dict], list[dict]]:
    """Return the rows and histories of an unfinished sweep with this fingerprint; empty if there is none.

    Raises UsageError if the folder holds another sweep or another program's files.
    """
    if not (folder / "sweep.csv").exists():
        other = [name for name in ("history.csv", "curves.png", "heat_map.png") if (folder / name).exists()]
        if other and not (folder / "sweep.json").exists():
            raise UsageError(f"{folder}: holds another {other[0]}; name another --output-dir")
        return [], []
    if not (folder / "sweep.json").exists() or (folder / "sweep.json").read_text() != fingerprint:
        raise UsageError(f"{folder}: holds a sweep of other settings or data; name another --output-dir, or "
                                "remove it")
    rows, histories = (pd.read_csv(folder / name) for name in ("sweep.csv", "history.csv"))
    for table in (rows, histories):
        table[names] = table[names].fillna("")  # an empty text is a value
    # Without the epochs of combinations that are not in sweep.csv.
    return rows.to_dict("records"), histories.merge(rows[names], on=names).to_dict("records")


def write_table(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Write rows as CSV, atomically."""
    with files.atomic_write(path) as temporary:
        pd.DataFrame(rows, columns=columns).to_csv(temporary, index=False)


def sweep(given: script.Config, grid: dict[str, list], folder: Path) -> pd.DataFrame:
    """Train the combinations that are not in sweep.csv yet. Return all its rows."""
    runtime = start_runtime(given.device, given.precision, given.eval_batch_size)
    files.make_output_folder(folder)
    cells = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    sizes = [script.resolve_config(dataclasses.replace(given, **cell), runtime, 1).image_size for cell in cells]
    config, data = script.prepare_data(dataclasses.replace(given, image_size=max(sizes)), runtime)
    if not len(data.split.val_rows):
        raise DataError(f"{config.train_source.path}: every class has fewer than {SMALLEST_CLASS_TO_SPLIT} rows, so "
                        "that none validates, and a sweep ranks by validation rows; add rows")
    fingerprint = sweep_fingerprint(config, grid, data)
    rows, histories = read_finished(folder, fingerprint, list(grid))
    with files.atomic_write(folder / "sweep.json") as temporary:
        temporary.write_text(fingerprint)
    for number, cell in enumerate(cells, start=1):
        if any(all(row[name] == value for name, value in cell.items()) for row in rows):
            continue
        started, fault, history = time.monotonic(), "", pd.DataFrame()
        try:
            full = script.resolve_config(dataclasses.replace(given, **cell), runtime, len(data.split.train_rows))
            # Refuses a size that the network cannot take.
            models.summarize(script.build_model(full, len(data.classes)), full.model, full.image_size)
            history = train_quietly(full, data)
        except (DataError, torch.OutOfMemoryError) as error:  # it diverges, or its settings contradict each other
            fault = first_line(error)
        last = history.iloc[-1] if len(history) else dict.fromkeys(FIGURES, np.nan)
        rows.append({**cell, **{name: last[name] for name in FIGURES}, "epochs": len(history),
                     "seconds": round(time.monotonic() - started, 2), "fault": fault})
        histories += history.rename(columns={"learning_rate": "last_rate"}).assign(**cell).to_dict("records")
        write_table(folder / "history.csv", histories, [*grid, *HISTORY])
        # Last, since it marks a finished combination.
        write_table(folder / "sweep.csv", rows, [*grid, *FIGURES, "epochs", "seconds", "fault"])
        print(f"{number:>3}/{len(cells)}  {describe(cell)}  " + (fault or f"validation accuracy "
              f"{last['val_accuracy']:.2%} loss {last['val_loss']:.4f}  {rows[-1]['seconds']:.1f} s"), flush=True)
    return pd.DataFrame(rows)


def describe(cell: dict) -> str:
    """Return a combination's settings in a few words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else
                     f"{name.replace('_', ' ')} {value}" for name, value in cell.items())


def plot_histories(path: Path, histories: pd.DataFrame, grid: dict[str, list]) -> None:
    """Draw loss and accuracy, of training and of validation, by epoch; a colour for each value of the first setting."""
    from matplotlib import colormaps

    figure, panels = plots.new_figure(15, 9, 2, 2)
    names, palette = list(grid), colormaps["viridis"]
    styles = ["-", "--", ":", "-.", (0, (1, 4)), (0, (6, 1, 1, 1))]
    for axes, column in zip(panels.flat, ("train_loss", "val_loss", "train_accuracy", "val_accuracy")):
        for values, history in histories.groupby(names, sort=False):
            place = grid[names[0]].index(values[0])
            style = styles[grid[names[1]].index(values[1]) % len(styles)] if len(names) > 1 else "-"
            axes.plot(history.epoch, history[column], linestyle=style, marker="o", markersize=3,
                      color=palette(place / max(len(grid[names[0]]) - 1, 1)), label=describe(dict(zip(names, values))))
        kind, what = column.split("_")
        axes.set(title=f"{'training' if kind == 'train' else 'validation'} {what}", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if what == "loss" and histories[column].max() > 10 * max(histories[column].min(), 1e-6):
            axes.set_yscale("log")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    plots.save_figure(path, figure)


def plot_heat_map(path: Path, rows: pd.DataFrame, grid: dict[str, list]) -> None:
    """Draw the best validation accuracy by the first two settings, in percent; failed combinations are grey."""
    names = list(grid)[:2]
    best = 100 * rows.groupby(names).val_accuracy.max()
    table = best.unstack() if len(names) == 2 else best.to_frame("")
    figure, axes = plots.new_figure(2.5 + 1.1 * table.shape[1], 1.8 + 0.7 * table.shape[0])
    axes.set_facecolor("#cccccc")
    axes.imshow(table, cmap="viridis", aspect="auto")
    middle = np.nanmean([np.nanmin(table), np.nanmax(table)]) if table.notna().any(axis=None) else 0
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        axes.text(column, row, "failed" if np.isnan(value) else f"{value:.2f}", ha="center", va="center",
                  color="black" if np.isnan(value) or value > middle else "white")
    axes.set_xticks(range(table.shape[1]), table.columns)
    axes.set_yticks(range(table.shape[0]), table.index)
    axes.set(title="validation accuracy in %", ylabel=names[0].replace("_", " "),
             xlabel=names[1].replace("_", " ") if len(names) == 2 else "")
    plots.save_figure(path, figure)


def ranking(rows: pd.DataFrame, grid: dict[str, list], shown: int = 10) -> str:
    """Return the best combinations as a Markdown table."""
    best = rows.sort_values(["val_accuracy", "val_loss"], ascending=[False, True], na_position="last").head(shown)
    names = " | ".join(name.replace("_", " ") for name in grid)
    lines = [f"| {names} | accuracy | loss | training accuracy | seconds |", "|" + "--:|" * (len(grid) + 4)]
    for _, row in best.iterrows():
        cells = [f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for name in grid]
        lines.append(f"| {' | '.join(cells)} | {row.val_accuracy:.2%} | {row.val_loss:.4f} | "
                     f"{row.train_accuracy:.2%} | {row.seconds:.1f} |")
    return "\n".join(lines)


def run(folder: Path, flags: list[str], started: float) -> None:
    """Train what is not finished, draw and rank."""
    fixed, grid = parse_grid(flags)
    config = script.parse_command_line(fixed)[2]
    if config.train_val_split == 1:
        raise UsageError("a sweep ranks by validation rows: set --train-val-split below 1")
    if config.folds and config.fold is None:
        raise UsageError("a sweep validates on the rows of one fold: name it with --fold")
    rows = sweep(config, grid, folder)
    plot_histories(folder / "curves.png", pd.read_csv(folder / "history.csv"), grid)
    plot_heat_map(folder / "heat_map.png", rows, grid)
    print(f"{ranking(rows, grid)}\nwrote sweep.csv, history.csv, curves.png and heat_map.png in "
          f"{folder.resolve()}; {time.monotonic() - started:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    started = time.monotonic()
    given, flags = make_parser("tools.sweep", __doc__, output_dir=Path("sweep")).parse_known_args(argv)
    return exit_status(lambda _: run(given.output_dir, flags, started),
                       "the same command continues with the next combination")


if __name__ == "__main__":
    sys.exit(main())
