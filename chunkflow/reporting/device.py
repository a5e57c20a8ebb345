"""Figures of the device that a run computes on: peak and total memory, peak FLOPS."""

import math
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from chunkflow.execution.linear import widen

GIB = 2**30


class Memory(NamedTuple):
    """Peaks since the last reset, in GiB: allocated tensors (active) and the memory that the allocator holds
    for them (reserved). On a CPU both are the resident memory of this process."""

    active_gib: float = 0.0
    reserved_gib: float = 0.0
    alloc_retries: int = 0  # this and the next: of CUDA's allocator, since the process began
    ooms: int = 0


def reset_peak_memory(device: torch.device) -> None:
    """Begins the interval that `peak_memory` measures."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole run
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> Memory:
    """The peaks of this process since `reset_peak_memory`."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return Memory(
            torch.cuda.max_memory_allocated(device) / GIB,
            torch.cuda.max_memory_reserved(device) / GIB,
            stats.get("num_alloc_retries", 0),
            stats.get("num_ooms", 0),
        )
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(peak / GIB, peak / GIB)


def memory_capacity_gib(device: torch.device) -> float:
    """All memory of the GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


# Dense bf16 FLOPs a second, from the data sheets; the first name that occurs in the device's name counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI355X": 2500e12,
    "MI325X": 1300e12,
    "MI300X": 1300e12,
    "MI250X": 191.5e12,  # one of its two dies, which is what PyTorch calls a device
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second that mfu is relative to: the data sheet's, else the best that a matrix product in
    `dtype` reaches in 0.1 s."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, flops in PEAK_FLOPS.items():
        if part in name:
            return flops
    size = 1024
    a, b = widen(torch.ones(2, size, size, dtype=dtype, device=device))
    fastest, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < 0.1 or fastest == math.inf:
        before = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - before)
    return 2 * size**3 / fastest
