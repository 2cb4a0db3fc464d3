"""Gather everything about a finished run on one page: report.html, with all pictures inside it.

    python -m tools.report out [--data-dir COMPETITION] [--cache-dir DIR]

Reads what the run left in its output folder (run.json, history.csv, class_accuracy.csv, val_probabilities.npz and its
pictures) and, from the training table, the images that were predicted wrongly. Adds to the folder

    mistakes.png     the mistakes with the highest probability, which is shown with the true class
    calibration.png  accuracy by confidence, and the expected calibration error (arXiv:1706.04599)

Nothing is computed again: the probabilities are those that the run saved.
"""

import argparse
import base64
import dataclasses
import html
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import script
from pipeline import files, plots, tables
from pipeline.cli import pick
from pipeline.errors import DataError, first_line
from pipeline.images import LoadSettings, estimate_image_statistics, load_images
from pipeline.metrics import HISTORY_COLUMNS, Predictions
from pipeline.signals import exit_status
from tools.common import OF_CHECKPOINT, as_png, make_parser, read_latex, train_source

BINS = 15
PICTURES = [
    ("curves.png", "Training"), ("confusions.png", "Confusions"),
    ("class_accuracy.png", "Accuracy by class"), ("mistakes.png", "The most confident mistakes"),
    ("calibration.png", "Calibration"), ("predictions.png", "Predictions"), ("samples.png", "Training images"),
    ("class_distribution.png", "Class sizes"),
]
OWN = ("mistakes.png", "calibration.png")
STYLE = ("body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
         "img{max-width:100%}table{border-collapse:collapse;font-size:14px}td,th{padding:2px 12px;text-align:right;"
         "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}h2{margin-top:2em}"
         ".figures{font-size:22px}.scroll{overflow-x:auto}.sortable th{cursor:pointer;position:sticky;top:0;"
         "background:#fff}.sortable th[data-order]::after{content:' \\25b2'}"
         ".sortable th[data-order='-1']::after{content:' \\25bc'}td img{width:32px;height:32px;margin:0 2px;"
         "border:2px solid #2e7d32;image-rendering:pixelated;vertical-align:middle}td img.wrong{border-color:#c62828}")
# A click on a column's head sorts by it, a second one the other way round; numbers by value, other cells as text.
SORT = """
for (const head of document.querySelectorAll(".sortable th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, order = head.dataset.order === "1" ? -1 : 1;
  for (const other of head.parentNode.cells) delete other.dataset.order;
  head.dataset.order = order;
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  body.append(...[...body.rows].sort((first, second) => {
    const [a, b] = [value(first), value(second)];
    return order * (a !== "" && b !== "" && !isNaN(a) && !isNaN(b) ? a - b : a.localeCompare(b));
  }));
};
"""
EXAMPLES = 4  # validation images of each class in the table, mistakes first


def read_predictions(folder: Path, config: script.Config,
                     source: tables.TableSource) -> tuple[Predictions, list[str]]:
    """Return the validation rows' predictions that the run saved, with their images, and the classes."""
    try:
        saved = np.load(folder / "val_probabilities.npz")
        arrays = {name: saved[name] for name in ("rows", "targets", "probabilities", "classes")}
    except Exception as error:  # zipfile and numpy each raise their own
        raise DataError(f"{folder / 'val_probabilities.npz'}: cannot be read ({first_line(error)}); name "
                               "the output folder of a finished run with validation rows") from None
    classes, table = arrays["classes"].tolist(), tables.read_train_table(source)
    rows, targets = arrays["rows"], arrays["targets"]
    if rows.max() >= len(table) or [classes[target] for target in targets] != table.rows.label.iloc[rows].tolist():
        raise DataError(f"{table.path}: not the table that the run was trained on; name its folder with "
                               "--data-dir")
    statistics = estimate_image_statistics(table, config.image_size)
    images, = load_images([table], statistics, pick(LoadSettings, config))
    return Predictions(rows, targets, arrays["probabilities"], lambda places: images[rows[places], 0]), classes


def calibration(predictions: Predictions) -> tuple[pd.DataFrame, float]:
    """Return confidence, accuracy and share of the rows by bin of confidence, and the expected calibration error."""
    confidence = predictions.probabilities.max(axis=1)
    table = pd.DataFrame({"confidence": confidence, "accuracy": predictions.predicted == predictions.targets,
                          "bin": np.minimum((confidence * BINS).astype(int), BINS - 1)})
    bins = table.groupby("bin").agg(confidence=("confidence", "mean"), accuracy=("accuracy", "mean"),
                                    share=("accuracy", "size"))
    bins["share"] /= len(table)
    return bins, float(((bins.accuracy - bins.confidence).abs() * bins.share).sum())


def plot_calibration(path: Path, predictions: Predictions) -> float:
    """Draw accuracy and number of rows by confidence. Return the expected calibration error."""
    bins, error = calibration(predictions)
    figure, (left, right) = plots.new_figure(11, 4.5, 2)
    left.plot([0, 1], [0, 1], color="#bbbbbb", linestyle=":")
    left.plot(bins.confidence, bins.accuracy, "o-", color=plots.BLUE)
    left.set(title=f"expected calibration error {error:.2%}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1),
             ylim=(0, 1))
    right.bar((bins.index + 0.5) / BINS, 100 * bins.share, width=0.9 / BINS, color=plots.BLUE)
    right.set(title=f"{len(predictions.targets):,} validation rows", xlabel="confidence", ylabel="rows in %",
              xlim=(0, 1))
    plots.save_figure(path, figure)
    return error


def plot_mistakes(path: Path, predictions: Predictions, names: list[str], count: int = 60) -> None:
    """Draw the most confident mistakes."""
    wrong = np.flatnonzero(predictions.predicted != predictions.targets)
    chosen = wrong[np.argsort(-predictions.probabilities[wrong].max(axis=1), kind="stable")][:count]
    texts = [f"{names[predictions.predicted[place]]} {predictions.probabilities[place].max():.0%}, not "
             f"{names[predictions.targets[place]]}" for place in chosen]
    title = f"{len(chosen)} of {len(wrong):,} mistakes, the most confident first" if len(wrong) else "No mistakes"
    plots.plot_images(path, title, predictions.ink(chosen), texts, [plots.WRONG] * len(chosen))


def embedded(path: Path) -> str:
    """Return a picture as a part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def read_figures(path: Path, columns: list[str]) -> pd.DataFrame:
    """Return a table that the run wrote; all cells but those of labels are numbers."""
    table = tables.read_csv(path, tuple(columns))
    try:
        numbers = [name for name in columns if name not in ("label", "taken_for")]
        table[numbers] = table[numbers].apply(pd.to_numeric)
        return table
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: not as a run writes it ({first_line(error)}); name the output folder "
                               "of a finished run") from None


def table_of_classes(folder: Path, predictions: Predictions, labels: list[str], latex: dict[str, str]) -> str:
    """Return the table of class_accuracy.csv, the worst first, with validation images of each class."""
    classes = read_figures(folder / "class_accuracy.csv", ["label", "images", "accuracy", "taken_for"])

    def cell(value: object, shown: str) -> str:
        return f'<td data-value="{html.escape(str(value))}">{shown}</td>'

    def name(label: str) -> str:
        return html.escape(f"{label} {latex.get(label, '')}".strip())

    rows = []
    for row in classes.sort_values("accuracy").fillna("").itertuples():
        places = np.flatnonzero(predictions.targets == labels.index(row.label)) if row.label in labels else []
        wrong = predictions.predicted[places] != predictions.targets[places]
        chosen = np.argsort(~wrong, kind="stable")[:EXAMPLES]
        inks = predictions.ink(places[chosen]) if len(chosen) else []
        images = "".join(f'<img alt="" class="{"wrong" * bool(wrong[place])}" src="{as_png(ink)}">'
                         for place, ink in zip(chosen, inks))
        cells = [cell(row.label, name(row.label)), cell(row.images, f"{row.images:.0f}"),
                 cell(row.accuracy, f"{row.accuracy:.1%}"), cell(row.taken_for, name(str(row.taken_for))),
                 cell(len(places), images)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("class", "images", "accuracy", "most common mistake", "examples"))
    return (f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def page(folder: Path, record: dict, error: float, classes_table: str) -> str:
    """Return the whole page."""
    metrics, config = record["metrics"], record["config"]
    percent = {"accuracy": "val_accuracy", "top 3": "val_top3_accuracy", "per class": "val_class_accuracy"}
    figures = ", ".join(f"{name} {metrics[key]:.2%}" for name, key in percent.items())
    history = read_figures(folder / "history.csv", HISTORY_COLUMNS)
    defaults = dataclasses.asdict(script.Config())
    settings = pd.DataFrame([(name, value) for name, value in config.items() if value != defaults.get(name)],
                            columns=["setting", "value"])
    facts = pd.DataFrame([*record["versions"].items(), ("device", record["device"]), ("seconds", record["seconds"]),
                          ("peak memory, GB", record["peak_memory_gb"])], columns=["", " "])
    parts = [f"<h1>{html.escape(config['model'])}, epoch {metrics['epoch']} of {len(history)}</h1>",
             f'<p class="figures">{figures}, loss {metrics["val_loss"]:.4f}, calibration error {error:.2%}</p>',
             "<p>Figures of the validation rows, which also chose the epoch.</p>"]
    for name, title in PICTURES:
        # A picture beside a run with --no-pictures is an earlier run's.
        if name in OWN or (config["pictures"] and (folder / name).exists()):
            parts += [f"<h2>{title}</h2>", embedded(folder / name)]
    parts += ["<h2>Classes</h2><p>A click on a column's head sorts by it. Mistakes are framed red.</p>", classes_table]
    for title, table in (("Epochs", history), ("Settings that are not the default", settings), ("The run", facts)):
        text = table.to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}")
        parts += [f'<h2>{title}</h2><div class="scroll">', text, "</div>"]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(config["model"])} '
            f'{metrics["val_accuracy"]:.2%}</title><style>{STYLE}</style></head><body>{"".join(parts)}'
            f"<script>{SORT}</script></body></html>\n")


def read_record(folder: Path) -> tuple[dict, script.Config]:
    """Return run.json and its config."""
    try:
        record = json.loads((folder / "run.json").read_text())
        known = {field.name for field in dataclasses.fields(script.Config)}
        config = script.Config(**{name: value for name, value in record["config"].items() if name in known})
        if missing := {"metrics", "versions", "device", "seconds", "peak_memory_gb"} - record.keys():
            raise ValueError(f"no {min(missing)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # some other JSON, or none
        raise DataError(f"{folder / 'run.json'}: no record of a run ({first_line(error)}); name the "
                               "output folder of a finished run") from None
    if config.folds and config.fold is None:
        raise DataError(f"{folder}: holds what {config.folds} folds gave together; name the folder of one, such as "
                               f"{folder / 'fold0'}")
    if "val_accuracy" not in record["metrics"]:
        raise DataError(f"{folder}: the run had no validation rows, so there is nothing to report; train with "
                        "--train-val-split below 1")
    return record, config


def report(given: argparse.Namespace) -> None:
    """Draw what the run did not draw, and write the page."""
    record, config = read_record(given.folder)
    config = dataclasses.replace(config, cache_dir=given.cache_dir)
    predictions, classes = read_predictions(given.folder, config, train_source(config, given))
    latex = read_latex(config, given)
    names = plots.class_names(classes, latex)
    table = table_of_classes(given.folder, predictions, classes, latex)
    plot_mistakes(given.folder / "mistakes.png", predictions, names)
    error = plot_calibration(given.folder / "calibration.png", predictions)
    with files.atomic_write(given.folder / "report.html") as temporary:
        temporary.write_text(page(given.folder, record, error, table), encoding="utf-8")
    print(f"wrote report.html, mistakes.png and calibration.png in {given.folder.resolve()}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = make_parser("tools.report", __doc__, "cache_dir", **OF_CHECKPOINT)
    parser.add_argument("folder", type=Path, help="the output folder of a run; report.html is written there")
    given = parser.parse_args(argv)
    return exit_status(lambda _: report(given), "report.html was not written")


if __name__ == "__main__":
    sys.exit(main())
