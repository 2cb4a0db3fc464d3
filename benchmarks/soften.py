"""What softening the unchanged images does to a trained network's validation figures.

    python -m benchmarks.soften CHECKPOINT --data-dir COMPETITION [--cache-dir DIR]

A warp resamples and so softens edges; images that are not warped keep them hard, and the network has hardly seen such.
Prints loss and accuracies on the checkpoint's own validation rows for several shares of `soften`, all in one process.
"""

import dataclasses

import script
from benchmarks import arguments

SHARES = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)


def main() -> None:
    given = arguments.of_checkpoints(__doc__)
    trained = script.load_checkpoint(given.checkpoint)
    config = script.Config(data_dir=given.data_dir, cache_dir=given.cache_dir)
    runtime = script.start_runtime(config)
    question, targets = script.validation_question([trained], config, runtime)
    dataset = question.dataset(trained.statistics)
    for share in SHARES:
        softer = dataclasses.replace(trained, config=dataclasses.replace(trained.config, soften=share))
        figures = script.score(script.ensemble_predict([softer], [dataset], runtime), targets)
        print(f"soften {share:<6} loss {figures['val_loss']:.4f}  accuracy {figures['val_accuracy']:.2%}  "
              f"top 3 {figures['val_top3_accuracy']:.2%}  per class {figures['val_class_accuracy']:.2%}", flush=True)


if __name__ == "__main__":
    main()
