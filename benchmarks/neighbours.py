"""What the vote of the nearest training images does to a trained network's validation figures.

    python -m benchmarks.neighbours CHECKPOINT --data-dir COMPETITION [--cache-dir DIR]

Prints loss and accuracies on the checkpoint's own validation rows for the network alone and for several numbers of
neighbours and shares of their vote, all in one process. None of the neighbours is a validation row.
"""

import contextlib
import dataclasses
import io
import itertools
import sys
import time

import script
from benchmarks import arguments

COUNTS, SHARES = (10, 30, 100), (0.1, 0.2, 0.35)


def main() -> None:
    given = arguments.of_checkpoints(__doc__)
    trained = script.load_checkpoint(given.checkpoint).alone
    config = dataclasses.replace(trained.config, data_dir=given.data_dir, cache_dir=given.cache_dir,
                                 neighbours=max(COUNTS))
    runtime = script.start_runtime(config)
    with contextlib.redirect_stdout(io.StringIO()):
        _, data, *_ = script.prepare_data(config, runtime)
    if not len(data.val_rows):
        raise script.DataError(f"{given.checkpoint}: was trained on every row: none is left to validate on")

    arguments.show(f"{'network alone':<31}", script.validate(runtime.place(trained.model), data, config, runtime))
    started = time.perf_counter()
    voting = script.remember(dataclasses.replace(trained, config=config), data, runtime)
    print(f"remembered {len(data.train_rows):,} training images in {time.perf_counter() - started:.0f} s")
    for count, share in itertools.product(COUNTS, SHARES):
        voting.count, voting.share = count, share
        arguments.show(f"{f'{count} neighbours, share {share}':<31}", script.validate(voting, data, config, runtime))
    print(f"peak memory {script.peak_memory_gb()} GB")


if __name__ == "__main__":
    sys.exit(script.exit_status(lambda _: main(), "the table is not whole"))
