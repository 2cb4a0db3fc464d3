"""One rank of several, as torchrun starts them: imported by test_distributed.py and run in forked processes."""

import os

import numpy as np
import victim  # which imports script and what is slow to import
from torch import Tensor, nn

import script
from script import Trainer


def freeze_batch_norm() -> None:
    """Let batch norm keep its initial statistics: those of a rank's part of a batch are not those of the batch."""
    start = script.start_model

    def start_model(*arguments, **options) -> nn.Module:
        model = start(*arguments, **options)
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
                layer.train = layer.requires_grad_  # train() leaves its mode as it is
        return model

    script.start_model = start_model


def record_steps(path: str, rank: int) -> None:
    """Save each step's loss, correct answers and images over all ranks, and this rank's first inputs."""
    training_step, sums, inputs = Trainer.training_step, [], []

    def recording(self, images: Tensor, *arguments, **options) -> Tensor:
        own = training_step(self, images, *arguments, **options)
        sums.append(self.runtime.ranks.all_reduce_sum(own.double()).tolist())
        if len(inputs) < 3:
            inputs.append(images.numpy())
        np.savez(f"{path}.{rank}.npz", sums=sums, **{f"inputs{step}": batch for step, batch in enumerate(inputs)})
        return own

    Trainer.training_step = recording


def signal_at(step: int, number: int) -> None:
    """Send this process a signal before a step, counted from 1."""
    training_step, done = Trainer.training_step, []

    def counting(self, *arguments, **options) -> Tensor:
        done.append(None)
        if len(done) == step:
            os.kill(os.getpid(), number)
        return training_step(self, *arguments, **options)

    Trainer.training_step = counting


def live(rank: int, count: int, port: int, arguments: list[str], log: str, frozen: bool = False, record: str = "",
         stop: tuple[int, int, int] | None = None, keep: bool = False) -> None:
    """Run the command line as a rank of `count` (0: without torchrun), with stdout and stderr in a file.

    `stop` is a rank, a step and the signal that it gets there; `keep` leaves last.pth in place at the end.
    """
    victim.write_to(log)
    if count:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    if frozen:
        freeze_batch_norm()
    if record:
        record_steps(record, rank)
    if stop and stop[0] == rank:
        signal_at(*stop[1:])
    victim.finish(arguments, keep)
