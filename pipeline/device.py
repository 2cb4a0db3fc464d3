"""Device, precision and memory; versions of what a result depends on."""

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import torch
from torch import Tensor, nn

from pipeline.distributed import Ranks, is_launched, join_ranks
from pipeline.errors import DataError, UsageError, first_line, warn
from pipeline.precision import fastest_precision, works


@dataclass(frozen=True)
class Runtime:
    """The device and precision of all arithmetic, and the ranks that share it."""

    device: torch.device = torch.device("cpu")
    precision: str = "float32"  # float32, bf16 or fp16
    gpus: int = 1               # GPUs that this process shares a batch between
    eval_batch_size: int = 128
    ranks: Ranks = Ranks()
    reason: str = ""            # why this precision was chosen

    def autocast(self) -> torch.autocast:
        """Return the context for the network's forward pass."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "float32")

    def to_device(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in channels-last format where that is fast and correct (not on MPS)."""
        channels_last = self.device.type == "cuda" or (self.device.type == "cpu" and not crashes_channels_last(model))
        return model.to(self.device, memory_format=torch.channels_last if channels_last else torch.preserve_format)

    def has_room_for(self, num_bytes: int) -> bool:
        """Return whether a resident array of this size leaves enough device memory for training."""
        return self.device.type != "cuda" or num_bytes * 4 < torch.cuda.mem_get_info(self.device)[0]

    def describe(self) -> str:
        """Return one line for the log and the run record."""
        name = platform.processor() or platform.machine()
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device) + (f" x {self.gpus}" if self.gpus > 1 else "")
        rank = f", rank {self.ranks.rank} of {self.ranks.world_size}" if self.ranks.joined else ""
        reason = f" (auto: {self.reason})" * bool(self.reason)
        return f"{self.device} ({name}), {self.precision}{reason}, {torch.get_num_threads()} CPU threads{rank}"


def crashes_channels_last(model: nn.Module) -> bool:
    """Return whether oneDNN may end the process in a layer's backward pass (its issue 6035).

    It writes behind its buffers for 1x1 convolutions with a stride and 2 to 15 input channels, in float32 on AVX-512.
    """
    return any(isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
               and layer.in_channels < 16 for layer in model.modules())


class AutocastModel(nn.Module):
    """A network that enters autocast itself: the threads of DataParallel do not inherit the caller's."""

    def __init__(self, model: nn.Module, runtime: Runtime):
        super().__init__()
        self.model, self.runtime = model, runtime

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's outputs in the runtime's precision."""
        with self.runtime.autocast():
            return self.model(inputs)


def start_runtime(device: str = "auto", precision: str = "auto", eval_batch_size: int | None = None,
                  stored: str = "") -> Runtime:
    """Test the device and join torchrun's ranks. Raises UsageError for a device or precision that does not work.

    Precision "auto" is the `stored` one of an earlier run where the device has it, else the fastest.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True  # all batches have one of two sizes
        if chosen.index is not None:
            torch.cuda.set_device(chosen)
    if chosen.type == "cpu":
        if precision == "fp16":
            raise UsageError("--precision fp16 needs a GPU; on a CPU use bf16 or float32")
        keep_freed_memory()
    # On a CPU, activations of larger batches exceed what keep_freed_memory can keep.
    eval_batch_size = eval_batch_size or (128 if chosen.type == "cpu" else 1024)
    gpus = torch.cuda.device_count() if chosen.type == "cuda" and chosen.index is None else 1
    ranks, reason = join_ranks(chosen), ""
    if precision == "auto":
        precision, reason = ranks.broadcast_from_rank0(
            lambda: (stored, "as stored") if stored and works(chosen, stored) else fastest_precision(chosen))
    return Runtime(chosen, precision, gpus, eval_batch_size, ranks, reason)


def choose_device(requested: str) -> torch.device:
    """Return the requested device; for "auto" the accelerator if there is one that works, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    name = requested if requested != "auto" else accelerator.type if accelerator else "cpu"
    if is_launched():
        name = _device_of_rank(name)
    try:
        ones = torch.ones(8, 8, device=torch.device(name))
        fault = "" if (ones @ ones).sum().item() == 512 else "a matrix product is wrong"
    except Exception as error:  # each backend raises its own types if a GPU is listed and yet lacks the kernels
        fault = first_line(error)
    if fault and requested != "auto":
        raise UsageError(f"--device {requested} does not work here: {fault}; try --device auto")
    if fault:
        warn(f"{name} is present but does not compute ({fault}); the CPU is used")
    return torch.device("cpu" if fault else name)


def _device_of_rank(name: str) -> str:
    """Return this rank's own device. Raises UsageError if there are fewer GPUs than ranks."""
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: torchrun's ranks use a GPU each, or all the CPU: --device cuda or cpu")
    ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if name == "cuda" and ranks > gpus:
        raise UsageError(f"torchrun started {ranks} ranks on a machine with {gpus} GPUs; use --nproc-per-node {gpus}")
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GB of freed memory (mallopt(3)), since every step allocates the same buffers again."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # raised where there is another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD of malloc.h; the largest value that glibc accepts
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device. A copy to a GPU goes through pinned memory and does not block."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine ran out of memory. MPS has no error type of its own for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error)


def check_several_gpus(runtime: Runtime, compiled: bool) -> None:
    """Say how several GPUs are better used than by one process. Raises UsageError for --compile, which cannot be."""
    command = f"torchrun --nproc-per-node={runtime.gpus} script.py"
    if runtime.gpus > 1 and compiled:
        raise UsageError(f"--compile does not work with {runtime.gpus} GPUs in one process; start one rank per GPU "
                         f"({command} ...), or use one with --device cuda:0")
    if runtime.gpus > 1:
        print(f"one process uses {runtime.gpus} GPUs; faster: {command}")


@contextlib.contextmanager
def memory_remedy(remedy: str):
    """Raise DataError with this remedy if the device runs out of memory inside a with block."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DataError(f"out of memory {remedy}") from None


def peak_memory_gb() -> float | None:
    """Return the largest resident memory of this process in GB; None on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, and the SHA-256 of script.py and pipeline/."""
    folder, total = Path(__file__).resolve().parent, hashlib.sha256()
    for path in [folder.parent / "script.py", *sorted(folder.glob("*.py"))]:
        total.update(path.read_bytes() if path.is_file() else b"")
    return {"python": platform.python_version(), "source_sha256": total.hexdigest()[:16],
            **{module.__name__: str(module.__version__) for module in (torch, np, pd, PIL)}}
