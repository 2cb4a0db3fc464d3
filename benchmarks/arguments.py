"""What the benchmarks of trained networks share: the command line, the rows, the line that they print."""

import argparse
from pathlib import Path

import numpy as np

import script


def of_checkpoints(documentation: str, several: bool = False) -> argparse.Namespace:
    """The checkpoint (or checkpoints), data_dir and cache_dir of the command line; its help is the documentation."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    if several:
        parser.add_argument("checkpoints", type=Path, nargs="+")
        parser.add_argument("--alone", action="store_true", help="leave the neighbours' vote out")
    else:
        parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--cache-dir", default="")
    return parser.parse_args()


def with_validation_rows(documentation: str) -> tuple[script.Trained, script.MathSymbolDataset, np.ndarray,
                                                      script.Runtime]:
    """The checkpoint of the command line, its validation rows and their class numbers, and the runtime."""
    given = of_checkpoints(documentation)
    trained = script.load_checkpoint(given.checkpoint)
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir)
    runtime = script.runtime_of([trained], config)
    question, targets = script.validation_question([trained], config, runtime)
    return trained, question.dataset(trained.statistics), targets, runtime


def show(what: str, figures: dict[str, float]) -> None:
    """Print loss and accuracies, as script.score gives them, at once."""
    print(f"{what}  loss {figures['val_loss']:.4f}  accuracy {figures['val_accuracy']:.2%}  "
          f"top 3 {figures['val_top3_accuracy']:.2%}  per class {figures['val_class_accuracy']:.2%}", flush=True)
