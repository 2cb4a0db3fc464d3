"""Several processes started by torchrun: joining them, sums and decisions over all ranks."""

import contextlib
import datetime
import inspect
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, one without torchrun. All must call collective methods in the same order."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0   # rank among the processes of this machine
    joined: bool = False  # started by torchrun, even if alone

    def shard(self, rows: np.ndarray) -> np.ndarray:
        """Return this rank's contiguous part of the rows. Parts differ in length by at most one."""
        return rows[len(rows) * self.rank // self.world_size : len(rows) * (self.rank + 1) // self.world_size]

    def all_reduce_max(self, *values: float) -> list[float]:
        """Return the largest of each value over all ranks. Uses the CPU, so that no GPU is waited for."""
        largest = torch.tensor(values, dtype=torch.float64)
        if self.joined:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over all ranks, and return it."""
        if self.joined:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_from_rank0(self, function: Callable):
        """Return what the function returns on rank 0, which alone calls it."""
        answer = [function() if self.rank == 0 else None]
        if self.joined:
            dist.broadcast_object_list(answer, device=torch.device("cpu"))
        return answer[0]

    @contextlib.contextmanager
    def rank0_first(self):
        """Let the first rank of each machine execute a with block before the others."""
        if self.joined and self.local_rank:
            dist.barrier()
        yield
        if self.joined and not self.local_rank:
            dist.barrier()


def is_launched() -> bool:
    """Return whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def join_ranks(device: torch.device) -> Ranks:
    """Join the process group if torchrun started this process, and return the ranks."""
    if not is_launched():
        return Ranks()
    if not dist.is_initialized():
        exit_with_parent()  # a killed torchrun leaves its ranks running
        # One rank may decode images for hours while the others wait. torchrun notices ranks that have died.
        backend, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", datetime.timedelta(hours=12)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a restart and still holds the addresses of dead ranks (seen with torch 2.15).
        # Several machines count their restarts differently; docs describe what they need.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), joined=True)


def distributed_data_parallel(network: nn.Module, find_unused: bool) -> nn.Module:
    """Wrap a network in DistributedDataParallel, without synchronising buffers before each forward pass."""
    wrapper = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # since torch 2.13
    return wrapper(network, gradient_as_bucket_view=True, find_unused_parameters=find_unused,
                   **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})


def leave_ranks() -> None:
    """Leave the process group, if this process joined one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether an error of gloo or NCCL says that another rank has ended."""
    return is_launched() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def exit_with_parent() -> None:
    """Start a thread that ends this process when its parent has been killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:  # an orphan has another parent
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
