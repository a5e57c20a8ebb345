"""torch.profiler as torchtitan's users know it: one traced step in every `profile_freq`."""

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from chunkflow.settings import options

logger = logging.getLogger(__name__)

WARMUP_STEPS = 3  # traced and thrown away, if profile_freq is large enough


def profiler(settings: options.Profiling, dump_folder: Path):
    """A context, with a value to call `step()` of after each step; the value is None without profiling.
    Traces (chrome://tracing, Perfetto) go to {dump_folder}/{save_traces_folder}/iteration_N/rankR_trace.json.
    """
    if not settings.enable_profiling:
        return nullcontext()
    folder = dump_folder / settings.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)

    def save(trace) -> None:
        iteration = folder / f"iteration_{trace.step_num}"
        iteration.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(iteration / f"rank{dist.get_rank()}_trace.json"))
        logger.info(f"Dumped the profile of step {trace.step_num} to {iteration}")

    warmup = min(WARMUP_STEPS, settings.profile_freq - 1)
    logger.info(f"Profiling active. Traces will be saved at {folder}")
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=settings.profile_freq - warmup - 1, warmup=warmup, active=1),
        on_trace_ready=save,
    )
