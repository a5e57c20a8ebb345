"""What a device does in a second: as calibration measured it, else from its data sheet."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from chunkflow.data.dataset import cache_folder
from chunkflow.data.files import write_whole
from chunkflow.planning.step_time import Pass, Rates
from chunkflow.reporting.device import PEAK_FLOPS, peak_flops
from chunkflow.settings.options import Config

# Shares of the peak that products, and attention, reach in bf16; the backward of attention has 5 products
# for the forward's 2.
LINEAR, ATTENTION, ATTENTION_BACKWARD = 0.6, 0.45, 2.9
LAYER_SECONDS = 60e-6  # of a layer's kernels on one token
LATENCY = 20e-6  # seconds of a collective
ADDED = 8  # bytes read and written where something is added to a gradient of K/V, in fp32
# Bytes a second, in the order of Rates: from GPUs of the node, of other nodes, from the host, of the memory.
BANDWIDTHS = {
    "A100": (200e9, 20e9, 22e9, 1.5e12),
    "H100 PCIe": (50e9, 40e9, 45e9, 1.6e12),
    "H100": (300e9, 40e9, 45e9, 2.6e12),
    "H200": (300e9, 40e9, 45e9, 3.8e12),
    "B200": (600e9, 80e9, 50e9, 6.5e12),
}
OTHER_BANDWIDTHS = (50e9, 20e9, 22e9, 1e12)
# GiB that CUDA can use of each; of others that of 80 GB.
MEMORY_GIB = {"L40S": 44.4, "H100 NVL": 93.0, "H200": 139.8, "B200": 178.3, "MI300X": 191.7, "MI325X": 255.7}
OTHER_MEMORY_GIB = 79.2
# Of one thread of a CPU, and of processes that talk through gloo.
CPU_FLOPS, CPU_ATTENTION_FLOPS, CPU_LAYER_SECONDS, CPU_LATENCY = 60e9, 25e9, 500e-6, 300e-6
CPU_BANDWIDTHS = (1e9, 0.5e9, 5e9, 8e9)
ASSUMED = "H100"  # where there is no GPU
PASSES = ("forward", "backward")  # of Rates, those that are no single number


def device_of(config: Config, planned: bool) -> str:
    """The GPU there is, by its name; else "cpu" or, if plans are for a machine that need not be this one
    (`planned`, the fake backend), the GPU that is assumed."""
    if torch.cuda.is_available() and config.comm.mode != "fake_backend":
        return torch.cuda.get_device_name()
    return ASSUMED if planned or config.comm.mode == "fake_backend" else "cpu"


def _is_here(device: str) -> bool:
    """Whether it is this machine's GPU."""
    return torch.cuda.is_available() and device == torch.cuda.get_device_name()


def memory_gib(device: str) -> float | None:
    """The memory of a device, whole GiB of this machine's own GPU; None of a CPU."""
    if device == "cpu":
        return None
    if _is_here(device):
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory >> 30)
    return next((gib for name, gib in MEMORY_GIB.items() if name in device), OTHER_MEMORY_GIB)


def host_gib(device: str) -> float | None:
    """Host memory of each process of this machine; None where the device is another machine's."""
    if device != "cpu" and not _is_here(device):
        return None
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max": no limit
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return limit / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 2**30


def analytic(device: str) -> Rates:
    """From data sheets. `device`: a GPU's name, with more around it; or "cpu", this one. This machine's own
    GPU is tried where its data sheet is not known; ValueError for others."""
    if device == "cpu":
        threads = torch.get_num_threads()
        linear, attention = 1 / (CPU_FLOPS * threads), 1 / (CPU_ATTENTION_FLOPS * threads)
        forward = Pass(linear, attention, CPU_LAYER_SECONDS)
        backward = Pass(2 * linear, 2.5 * attention, 2 * CPU_LAYER_SECONDS, ADDED / CPU_BANDWIDTHS[-1])
        return Rates(forward, backward, 3 * linear, *CPU_BANDWIDTHS, CPU_LATENCY, overlaps=False)
    names = [name for name in PEAK_FLOPS if name.lower() in device.lower()]
    if names:
        peak = PEAK_FLOPS[names[0]]
    elif _is_here(device):
        peak = peak_flops(torch.device("cuda"), torch.bfloat16)
    else:
        known = ", ".join(PEAK_FLOPS)
        raise ValueError(f"--device = {device} is not known: name one of {known}, or cpu for this machine's")
    linear, attention = 1 / (LINEAR * peak), 1 / (ATTENTION * peak)
    bandwidths = BANDWIDTHS.get(names[0] if names else "", OTHER_BANDWIDTHS)
    forward = Pass(linear, attention, LAYER_SECONDS)
    added = ADDED / bandwidths[-1]
    backward = Pass(2 * linear, ATTENTION_BACKWARD * attention, 2 * LAYER_SECONDS, added)
    return Rates(forward, backward, 3 * linear, *bandwidths, LATENCY)


def calibration_file(model: str, args: Any, device: str, dtype: str) -> Path:
    """Where the measured rates of a model and a device are kept. Those with other fields, as earlier versions
    kept, have other names."""
    identity = json.dumps([model, repr(args), device.lower(), dtype, Rates._fields])
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    return cache_folder() / "calibration" / f"{digest}.json"


def rates_of(model: str, args: Any, dtype: str, device: str) -> tuple[Rates, bool]:
    """The rates of a device, and whether they were measured with this model."""
    try:
        measured = json.loads(calibration_file(model, args, device, dtype).read_text())
        return Rates(**measured | {name: Pass(**measured[name]) for name in PASSES}), True
    except (OSError, ValueError, KeyError, TypeError):
        return analytic(device), False


def save(rates: Rates, model: str, args: Any, dtype: str, device: str) -> Path:
    """Keeps measured rates for `rates_of`; returns the file."""
    path = calibration_file(model, args, device, dtype)
    content = rates._asdict() | {name: getattr(rates, name)._asdict() for name in PASSES}
    write_whole(path, json.dumps(content, indent=1).encode())
    return path
