"""One rank of several, as torchrun starts them: imported by test_ranks.py and run in forked processes."""

import os

import numpy as np
import victim  # which imports script and what is slow to import
from torch import nn

import script


def freeze_batch_norm() -> None:
    """Let batch norm keep its statistics: what it learns from a rank's part is not what it learns from all."""
    start = script.start_model

    def start_model(*arguments, **options) -> nn.Module:
        model = start(*arguments, **options)
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
                layer.train = layer.requires_grad_  # has no say over it
        return model

    script.start_model = start_model


def record_losses(path: str) -> None:
    """Write each step's loss, summed over all images of all ranks, to a file."""
    learn, losses = script.Learner.learn, []

    def recording(self, *arguments) -> script.Tensor:
        totals = learn(self, *arguments)
        losses.append(self.runtime.ranks.add(totals.double()).tolist())
        if self.runtime.ranks.rank == 0:
            np.save(path, losses)
        return totals

    script.Learner.learn = recording


def signal_at(step: int, number: int) -> None:
    """Send this process a signal after so many steps."""
    learn, done = script.Learner.learn, []

    def counting(self, *arguments) -> script.Tensor:
        done.append(None)
        if len(done) == step:
            os.kill(os.getpid(), number)
        return learn(self, *arguments)

    script.Learner.learn = counting


def live(rank: int, count: int, port: int, arguments: list[str], log: str, frozen: bool = False, losses: str = "",
         stop: tuple[int, int, int] | None = None, keep: bool = False) -> None:
    """What the process does: the command line as rank so-and-so, with stdout and stderr in a file; of 0 ranks: alone.

    `stop` is a rank, a step and a signal that it gets there.
    """
    victim.write_to(log)
    if count:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    if frozen:
        freeze_batch_norm()
    if losses:
        record_losses(losses)
    if stop and stop[0] == rank:
        signal_at(*stop[1:])
    victim.finish(arguments, keep)
