"""The faster precision of a device: reported by GPUs, timed on CPUs."""

import functools
import time

import torch
from torch import nn

PROBE_SECONDS = 0.7  # after which the timing ends; it needs 0.3 s where nothing else runs
SMALLEST_GAIN = 1.05  # below it float32 is chosen, which is more exact


def works(device: torch.device, precision: str) -> bool:
    """Return whether a device has instructions for a precision."""
    if precision == "fp16":
        return device.type == "cuda"
    if precision == "bf16" and device.type == "cpu":
        return any(getattr(torch.cpu, report, bool)() for report in ("_is_avx512_bf16_supported",
                                                                     "_is_amx_tile_supported"))
    return precision == "float32" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


@functools.cache
def fastest_precision(device: torch.device) -> tuple[str, str]:
    """Return the precision in which a device trains fastest, and why.

    GPUs have matrix units for bf16 or, from compute capability 7.0 on, for fp16. On CPUs the flags do not tell: with
    AVX512-BF16 an AMD EPYC trains twice as fast in bf16, an Intel Xeon without AMX at three quarters of float32.
    """
    if device.type == "cuda":
        if works(device, "bf16"):
            return "bf16", "the GPU has matrix units for it"
        capable = torch.cuda.get_device_capability(device) >= (7, 0)
        return ("fp16", "the GPU has matrix units for it") if capable else ("float32", "the GPU has no matrix units")
    if not works(device, "bf16"):
        return "float32", f"no bf16 on this {device.type.upper()}"
    gain = bf16_gain()
    return "bf16" if gain >= SMALLEST_GAIN else "float32", f"bf16 is {gain:.2f} times as fast as float32 here"


def bf16_gain() -> float:
    """Return the time of a convolution and its gradients on the CPU in float32, divided by that in bf16.

    The two alternate, and the fastest of each counts, so that other programs change both or none.
    """
    layers = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                           nn.Conv2d(64, 64, 3, padding=1, bias=False)).to(memory_format=torch.channels_last)
    images = torch.ones(64, 64, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    started, seconds = time.perf_counter(), {True: [], False: []}
    while not seconds[False] or (len(seconds[False]) < 6 and time.perf_counter() - started < PROBE_SECONDS):
        for lower, timings in seconds.items():
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                answers = layers(images)
            answers.float().mean().backward()
            timings.append(time.perf_counter() - begun)
    return min(seconds[False]) / min(seconds[True])
