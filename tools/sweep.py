"""Train every combination of some settings, and say which is best.

    python -m tools.sweep --data-dir DIGITS --preset digits-mlp
    python -m tools.sweep --data-dir COMPETITION --learning-rate 0.001,0.01 --batch-size 32,64 --sweep-dir sweep

Flags are script.py's, but for those that mean nothing here; one with commas in it is swept over, all others hold for
every cell. Without any, the rates 0.001, 0.01, 0.1, 0.5, 1.0 are crossed with batches of 32, 64, 128, 256, 512, but for
what a flag says. The data is read once and stays in memory, at the largest size that a cell sees. A cell that is in
sweep.csv is not trained again, so a sweep that was stopped goes on where it was; one whose settings or training table
changed is refused. A cell that diverges is a row too. Writes into --sweep-dir

    sweep.csv     a row a cell: its settings, the last epoch's figures, its seconds, and what went wrong
    history.csv   a row an epoch of each cell
    curves.png    loss and accuracy, of training and of validation, by epoch
    heat_map.png  the validation accuracy over the first two settings
    sweep.json    what the cells share, by which a sweep that goes on is known

and prints the ranking. The validation rows rank the cells, so the best cell's own figure flatters it a little.
"""

import argparse
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

DEFAULT_GRID = {"learning_rate": [0.001, 0.01, 0.1, 0.5, 1.0], "batch_size": [32, 64, 128, 256, 512]}
# What the data was read or split by holds for all cells, since it is read once.
FIXED = {"data_dir", "train_csv", "test_csv", "root_dir", "cache_dir", "train_val_split", "split_seed", "folds",
         "fold", "group_column", "on_bad_image", "device", "precision", "extra_csv", "extra_root", "extra_weight"}
# Values that commas may be a part of.
TEXTS = {"milestones", "teachers", "data_dir", "train_csv", "test_csv", "root_dir", "cache_dir", "extra_csv",
         "extra_root", "group_column"}
# What `run` does around the training has no part in a sweep.
IDLE = {"output_dir", "model_file", "submission_file", "pictures", "tensorboard", "max_minutes", "neighbours",
        "neighbour_share", "save_probabilities", *script.PREDICT_ONLY}
HISTORY = ["last_rate" if name == "learning_rate" else name for name in script.HISTORY_COLUMNS]
FIGURES = ["train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_top3_accuracy", "val_class_accuracy"]


def parse_grid(argv: list[str]) -> tuple[list[str], dict[str, list]]:
    """The flags that hold for every cell, and the values of each that is swept over, as Config has them."""
    fixed, grid, words = [], {}, list(argv)
    kinds = {field.name: field.type for field in dataclasses.fields(script.Config)}
    while words:
        flag, equals, text = words.pop(0).partition("=")
        if not equals and words and not words[0].startswith("--"):
            text = words.pop(0)
        name = flag.removeprefix("--").replace("-", "_")
        if name in IDLE or (name.startswith("no_") and name[3:] in IDLE):
            raise script.UsageError(f"{flag} has no part in a sweep: leave it out")
        if "," not in text or name in TEXTS:
            fixed += [flag, text] if text else [flag]
        elif name in FIXED or name not in kinds or kinds[name] is bool:
            raise script.UsageError(f"{flag} cannot be swept over: name one value, which holds for every cell")
        else:
            values = [script.parse_command_line([flag, value.strip()])[2] for value in text.split(",")]
            grid[name] = [getattr(config, name) for config in values]
            if None in grid[name]:
                raise script.UsageError(f"{flag}: auto is no value to compare; name what it stands for")
    named = {flag.removeprefix("--").replace("-", "_") for flag in fixed}
    grid = grid or {name: values for name, values in DEFAULT_GRID.items() if name not in named}
    if not grid:
        raise script.UsageError("nothing is swept over: give a flag several values with commas between them")
    return fixed, grid


def identity(config: script.Config, grid: dict[str, list], data: script.TrainingData, runtime: script.Runtime) -> str:
    """What a sweep's rows have in common: the grid, and what makes a run the run that it is, but for what is swept."""
    about = script.identify_run(config, data, runtime)
    about["settings"] = {name: value for name, value in about["settings"].items() if name not in grid}
    return json.dumps([about, grid], sort_keys=True)


def train_cell(config: script.Config, data: script.TrainingData, runtime: script.Runtime) -> pd.DataFrame:
    """The history of one cell; quietly, and keeping nothing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return script.fit(dataclasses.replace(config, output_dir=folder), data, runtime)


def finished_cells(folder: Path, same: str, names: list[str]) -> tuple[list[dict], list[dict]]:
    """The rows and histories of an earlier, interrupted sweep over these settings; empty where there is none.

    Refuses another sweep's.
    """
    if not (folder / "sweep.csv").exists():
        other = [name for name in ("history.csv", "curves.png", "heat_map.png") if (folder / name).exists()]
        if other and not (folder / "sweep.json").exists():
            raise script.UsageError(f"{folder}: holds a {other[0]} of something else; name another --sweep-dir")
        return [], []
    if not (folder / "sweep.json").exists() or (folder / "sweep.json").read_text() != same:
        raise script.UsageError(f"{folder}: holds a sweep of other settings or data; name another --sweep-dir, or "
                                "remove it")
    rows, histories = (pd.read_csv(folder / name) for name in ("sweep.csv", "history.csv"))
    for table in (rows, histories):
        table[names] = table[names].fillna("")  # an empty text is a value
    return rows.to_dict("records"), histories.merge(rows[names], on=names).to_dict("records")  # of a cell cut off: none


def write_table(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Write the rows as CSV, whole or not at all."""
    with script.whole_file(path) as temporary:
        pd.DataFrame(rows, columns=columns).to_csv(temporary, index=False)


def sweep(given: script.Config, grid: dict[str, list], folder: Path) -> pd.DataFrame:
    """Train the cells that are not there yet; gives all rows of sweep.csv."""
    runtime = script.start_runtime(given)
    folder.mkdir(parents=True, exist_ok=True)
    cells = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    sizes = [script.complete_config(dataclasses.replace(given, **cell), runtime, 1).image_size for cell in cells]
    config, data, *_ = script.prepare_data(dataclasses.replace(given, image_size=max(sizes)), runtime)
    if not len(data.val_rows):
        raise script.DataError(f"{given.train_csv}: no class has rows enough to be validated on, and a sweep ranks by "
                               "these")
    same = identity(config, grid, data, runtime)
    rows, histories = finished_cells(folder, same, list(grid))
    with script.whole_file(folder / "sweep.json") as temporary:
        temporary.write_text(same)
    for number, cell in enumerate(cells, start=1):
        if any(all(row[name] == value for name, value in cell.items()) for row in rows):
            continue
        started, fault, history = time.monotonic(), "", pd.DataFrame()
        try:
            full = script.complete_config(dataclasses.replace(given, **cell), runtime, len(data.train_rows))
            script.summarize_model(script.build_model(full, len(data.classes)), full)  # it refuses an unfit size
            history = train_cell(full, data, runtime)
        except (script.DataError, torch.OutOfMemoryError) as error:  # it diverges, or its settings do not go together
            fault = script.first_line(error)
        last = history.iloc[-1] if len(history) else dict.fromkeys(FIGURES, np.nan)
        rows.append({**cell, **{name: last[name] for name in FIGURES}, "epochs": len(history),
                     "seconds": round(time.monotonic() - started, 2), "fault": fault})
        histories += history.rename(columns={"learning_rate": "last_rate"}).assign(**cell).to_dict("records")
        write_table(folder / "history.csv", histories, [*grid, *HISTORY])
        write_table(folder / "sweep.csv", rows, [*grid, *FIGURES, "epochs", "seconds", "fault"])  # now the cell counts
        print(f"{number:>3}/{len(cells)}  {describe(cell)}  " + (fault or f"validation accuracy "
              f"{last['val_accuracy']:.2%} loss {last['val_loss']:.4f}  {rows[-1]['seconds']:.1f} s"), flush=True)
    return pd.DataFrame(rows)


def describe(cell: dict) -> str:
    """A cell's settings in a few words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else
                     f"{name.replace('_', ' ')} {value}" for name, value in cell.items())


def plot_histories(path: Path, histories: pd.DataFrame, grid: dict[str, list]) -> None:
    """Four panels: loss and accuracy, of training and of validation; a colour for the first setting's values."""
    from matplotlib import colormaps

    figure, panels = script.new_figure(15, 9, 2, 2)
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
    script.save_figure(path, figure)


def plot_heat_map(path: Path, rows: pd.DataFrame, grid: dict[str, list]) -> None:
    """The best validation accuracy over the first two settings, in percent; cells that diverged are grey."""
    names = list(grid)[:2]
    best = 100 * rows.groupby(names).val_accuracy.max()
    table = best.unstack() if len(names) == 2 else best.to_frame("")
    figure, axes = script.new_figure(2.5 + 1.1 * table.shape[1], 1.8 + 0.7 * table.shape[0])
    axes.set_facecolor("#cccccc")
    axes.imshow(table, cmap="viridis", aspect="auto")
    middle = np.nanmean([np.nanmin(table), np.nanmax(table)]) if table.notna().any(axis=None) else 0
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        axes.text(column, row, "diverged" if np.isnan(value) else f"{value:.2f}", ha="center", va="center",
                  color="black" if np.isnan(value) or value > middle else "white")
    axes.set_xticks(range(table.shape[1]), table.columns)
    axes.set_yticks(range(table.shape[0]), table.index)
    axes.set(title="validation accuracy in %", ylabel=names[0].replace("_", " "),
             xlabel=names[1].replace("_", " ") if len(names) == 2 else "")
    script.save_figure(path, figure)


def ranking(rows: pd.DataFrame, grid: dict[str, list], shown: int = 10) -> str:
    """The best cells, as a Markdown table."""
    best = rows.sort_values(["val_accuracy", "val_loss"], ascending=[False, True], na_position="last").head(shown)
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in grid)} | accuracy | loss | training rows | seconds |",
             "|" + "--:|" * (len(grid) + 4)]
    for _, row in best.iterrows():
        cells = [f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for name in grid]
        lines.append(f"| {' | '.join(cells)} | {row.val_accuracy:.2%} | {row.val_loss:.4f} | "
                     f"{row.train_accuracy:.2%} | {row.seconds:.1f} |")
    return "\n".join(lines)


def run(folder: Path, flags: list[str], started: float) -> None:
    """Train what is left, draw and rank."""
    fixed, grid = parse_grid(flags)
    config = script.parse_command_line(fixed)[2]
    if config.train_val_split == 1:
        raise script.UsageError("a sweep ranks by validation rows: set --train-val-split below 1")
    if config.folds and config.fold is None:
        raise script.UsageError("a sweep validates on the rows of one fold: name it with --fold")
    rows = sweep(config, grid, folder)
    plot_histories(folder / "curves.png", pd.read_csv(folder / "history.csv"), grid)
    plot_heat_map(folder / "heat_map.png", rows, grid)
    print(f"{ranking(rows, grid)}\nwrote sweep.csv, history.csv, curves.png and heat_map.png in "
          f"{folder.resolve()}; {time.monotonic() - started:.0f} s")


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep-dir", type=Path, default=Path("sweep"), help="folder of what is written")
    given, flags = parser.parse_known_args(argv)
    return script.exit_status(lambda _: run(given.sweep_dir, flags, started),
                              "the same command goes on with the next cell")


if __name__ == "__main__":
    sys.exit(main())
