"""What averaging several views of each image does to a trained network's validation figures.

    python -m benchmarks.views CHECKPOINT --data-dir COMPETITION [--cache-dir DIR]

The first view is the image as it is; the others are warped as in training. Prints loss and accuracies on the
checkpoint's own validation rows after each view, as `predict --views N` and `evaluate --views N` would average them.
"""

import dataclasses

import numpy as np

import script
from benchmarks import arguments

MOST = 9


def main() -> None:
    given = arguments.of_checkpoints(__doc__)
    trained = script.load_checkpoint(given.checkpoint)
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir)
    runtime = script.start_runtime(config)
    question, targets = script.validation_question([trained], config, runtime)
    dataset = question.dataset(trained.statistics)
    views = script.ask_views(runtime.place(trained.model), dataset, np.arange(len(targets)),
                             dataclasses.replace(trained.config, views=MOST), runtime)
    total = 0
    for count, probabilities in enumerate(views, start=1):
        total = total + probabilities
        figures = script.score((total / count).numpy(), targets)
        print(f"views {count}  loss {figures['val_loss']:.4f}  accuracy {figures['val_accuracy']:.2%}  "
              f"top 3 {figures['val_top3_accuracy']:.2%}  per class {figures['val_class_accuracy']:.2%}", flush=True)


if __name__ == "__main__":
    main()
