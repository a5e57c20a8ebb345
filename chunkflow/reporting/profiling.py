"""torch.profiler as torchtitan's users know it: one traced step in every `profile_freq`."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

WARMUP_STEPS = 3  # traced and thrown away, as far as profile_freq leaves room


def profiler(config):
    """A context whose `step()` is to be called after each step; None as its value where profiling is off.

    Traces (chrome://tracing, Perfetto) go to {dump_folder}/{save_traces_folder}/iteration_N/rankR_trace.json.
    """
    settings = config.profiling
    if not settings.enable_profiling:
        return nullcontext()
    folder = Path(config.job.dump_folder) / settings.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)

    def save(trace) -> None:
        place = folder / f"iteration_{trace.step_num}"
        place.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(place / f"rank{dist.get_rank()}_trace.json"))
        logger.info(f"Dumped the profile of step {trace.step_num} to {place}")

    warmup = min(WARMUP_STEPS, settings.profile_freq - 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    logger.info(f"Profiling active. Traces will be saved at {folder}")
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=settings.profile_freq - warmup - 1, warmup=warmup, active=1),
        on_trace_ready=save,
    )
