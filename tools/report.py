"""Everything about a finished run on one page: report.html, with all pictures inside it.

    python -m tools.report out [--data-dir COMPETITION] [--cache-dir DIR]

Reads what the run left in its output folder (run.json, history.csv, class_accuracy.csv, val_probabilities.npz and its
pictures) and, from the training table, the images that it got wrong. Draws besides

    mistakes.png     the mistakes that the network was surest of, with its confidence and the true class
    calibration.png  how often it is right when it is so sure, and the expected calibration error (arXiv:1706.04599)

into the same folder. Nothing is computed again: the probabilities are those that the run kept.
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

BINS = 15
PICTURES = [
    ("curves.png", "Training"), ("confusions.png", "What is taken for what"),
    ("class_accuracy.png", "Accuracy by class"), ("mistakes.png", "The surest mistakes"),
    ("calibration.png", "Calibration"), ("predictions.png", "Predictions"), ("samples.png", "Training images"),
    ("class_distribution.png", "Class sizes"),
]
OWN = ("mistakes.png", "calibration.png")
STYLE = ("body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
         "img{max-width:100%}table{border-collapse:collapse;font-size:14px}td,th{padding:2px 12px;text-align:right;"
         "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}h2{margin-top:2em}"
         ".figures{font-size:22px}")


def read_judgement(folder: Path, config: script.Config) -> tuple[script.Judged, list[str]]:
    """The validation rows as the run judged them, with their images, and the classes."""
    try:
        kept = np.load(folder / "val_probabilities.npz")
        arrays = {name: kept[name] for name in ("rows", "targets", "probabilities", "classes")}
    except Exception as error:  # zipfile and numpy each raise their own
        raise script.DataError(f"{folder / 'val_probabilities.npz'}: cannot be read ({script.first_line(error)}); name "
                               "the output folder of a finished run with validation rows") from None
    classes, table = arrays["classes"].tolist(), script.read_train_table(config)
    rows, targets = arrays["rows"], arrays["targets"]
    if rows.max() >= len(table) or [classes[target] for target in targets] != table.rows.label.iloc[rows].tolist():
        raise script.DataError(f"{table.path}: not the table that the run was trained on; name its folder with "
                               "--data-dir")
    statistics = script.look_at_images(table, config)
    images = script.load_all_images([table], config, statistics)[0]
    dataset = script.MathSymbolDataset(images, None, script.start_runtime(script.Config(device="cpu")))
    return script.Judged(dataset, rows, targets, arrays["probabilities"]), classes


def calibration(judged: script.Judged) -> tuple[pd.DataFrame, float]:
    """Confidence, accuracy and share of the rows by bin of confidence, and the expected calibration error."""
    confidence = judged.probabilities.max(axis=1)
    table = pd.DataFrame({"confidence": confidence, "accuracy": judged.predicted == judged.targets,
                          "bin": np.minimum((confidence * BINS).astype(int), BINS - 1)})
    bins = table.groupby("bin").agg(confidence=("confidence", "mean"), accuracy=("accuracy", "mean"),
                                    share=("accuracy", "size"))
    bins["share"] /= len(table)
    return bins, float(((bins.accuracy - bins.confidence).abs() * bins.share).sum())


def plot_calibration(path: Path, judged: script.Judged) -> float:
    """Draw accuracy against confidence, and how many rows are how sure; gives the expected calibration error."""
    bins, error = calibration(judged)
    figure, (left, right) = script.new_figure(11, 4.5, 2)
    left.plot([0, 1], [0, 1], color="#bbbbbb", linestyle=":")
    left.plot(bins.confidence, bins.accuracy, "o-", color="#4477aa")
    left.set(title=f"expected calibration error {error:.2%}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1),
             ylim=(0, 1))
    right.bar((bins.index + 0.5) / BINS, 100 * bins.share, width=0.9 / BINS, color="#4477aa")
    right.set(title=f"{len(judged.targets):,} validation rows", xlabel="confidence", ylabel="rows in %", xlim=(0, 1))
    script.save_figure(path, figure)
    return error


def plot_mistakes(path: Path, judged: script.Judged, names: list[str], count: int = 60) -> None:
    """Draw the mistakes that the network was surest of."""
    wrong = np.flatnonzero(judged.predicted != judged.targets)
    chosen = wrong[np.argsort(-judged.probabilities[wrong].max(axis=1), kind="stable")][:count]
    texts = [f"{names[judged.predicted[place]]} {judged.probabilities[place].max():.0%}, not "
             f"{names[judged.targets[place]]}" for place in chosen]
    title = f"{len(chosen)} of {len(wrong):,} mistakes, the surest first" if len(wrong) else "There are no mistakes"
    script.plot_images(path, title, judged.images(chosen), texts, ["#cc3311"] * len(chosen))


def embedded(path: Path) -> str:
    """A picture as part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def read_figures(path: Path, columns: list[str]) -> pd.DataFrame:
    """A table that the run wrote; the cells of all but the labels' columns are numbers."""
    table = script.read_csv(path, tuple(columns))
    try:
        numbers = [name for name in columns if name not in ("label", "taken_for")]
        table[numbers] = table[numbers].apply(pd.to_numeric)
        return table
    except (KeyError, ValueError) as error:
        raise script.DataError(f"{path}: not as a run writes it ({script.first_line(error)}); name the output folder "
                               "of a finished run") from None


def page(folder: Path, record: dict, error: float) -> str:
    """The whole report."""
    metrics, config = record["metrics"], record["config"]
    percent = {"accuracy": "val_accuracy", "top 3": "val_top3_accuracy", "per class": "val_class_accuracy"}
    figures = ", ".join(f"{name} {metrics[key]:.2%}" for name, key in percent.items())
    history = read_figures(folder / "history.csv", script.HISTORY_COLUMNS)
    classes = read_figures(folder / "class_accuracy.csv", ["label", "images", "accuracy", "taken_for"])
    defaults = dataclasses.asdict(script.Config())
    settings = pd.DataFrame([(name, value) for name, value in config.items() if value != defaults.get(name)],
                            columns=["setting", "value"])
    facts = pd.DataFrame([*record["versions"].items(), ("device", record["device"]), ("seconds", record["seconds"]),
                          ("peak memory, GB", record["peak_memory_gb"])], columns=["", " "])
    parts = [f"<h1>{html.escape(config['model'])}, epoch {metrics['epoch']} of {len(history)}</h1>",
             f'<p class="figures">{figures}, loss {metrics["val_loss"]:.4f}, calibration error {error:.2%}</p>',
             "<p>Figures of the validation rows, which also chose the epoch.</p>"]
    for name, title in PICTURES:
        if name in OWN or (config["pictures"] and (folder / name).exists()):  # else an earlier run's may lie there
            parts += [f"<h2>{title}</h2>", embedded(folder / name)]
    for title, table in (("Epochs", history), ("Settings that are not the default", settings), ("The run", facts),
                         ("Classes, the worst first", classes.sort_values("accuracy"))):
        parts += [f"<h2>{title}</h2>", table.to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}")]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(config["model"])} '
            f'{metrics["val_accuracy"]:.2%}</title><style>{STYLE}</style></head><body>{"".join(parts)}</body></html>\n')


def read_record(folder: Path) -> tuple[dict, script.Config]:
    """What the run was and gave, and its config."""
    try:
        record = json.loads((folder / "run.json").read_text())
        known = {field.name for field in dataclasses.fields(script.Config)}
        config = script.Config(**{name: value for name, value in record["config"].items() if name in known})
        if missing := {"metrics", "versions", "device", "seconds", "peak_memory_gb"} - record.keys():
            raise ValueError(f"no {min(missing)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # some other JSON, or none
        raise script.DataError(f"{folder / 'run.json'}: no record of a run ({script.first_line(error)}); name the "
                               "output folder of a finished run") from None
    if config.folds and config.fold is None:
        raise script.DataError(f"{folder}: what {config.folds} folds gave together; name the folder of one, such as "
                               f"{folder / 'fold0'}")
    if "val_accuracy" not in record["metrics"]:
        raise script.DataError(f"{folder}: the run had no validation rows: there is nothing to report")
    return record, config


def report(given: argparse.Namespace) -> None:
    """Draw what the run did not, and write the page."""
    record, config = read_record(given.folder)
    moved = {name: getattr(given, name) for name in ("data_dir", "cache_dir") if getattr(given, name)}
    config = dataclasses.replace(config, device="cpu", **moved)
    judged, classes = read_judgement(given.folder, config)
    plot_mistakes(given.folder / "mistakes.png", judged, script.symbol_texts(classes, script.read_symbols(config)))
    error = plot_calibration(given.folder / "calibration.png", judged)
    with script.whole_file(given.folder / "report.html") as temporary:
        temporary.write_text(page(given.folder, record, error), encoding="utf-8")
    print(f"wrote report.html, mistakes.png and calibration.png in {given.folder.resolve()}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output folder of a run")
    parser.add_argument("--data-dir", help="where the training table lies now, if it was moved")
    parser.add_argument("--cache-dir")
    given = parser.parse_args(argv)
    return script.exit_status(lambda _: report(given), "report.html was not written")


if __name__ == "__main__":
    sys.exit(main())
