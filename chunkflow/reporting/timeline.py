"""The timeline of a pipeline step, planned and measured: its useful share, and as a trace file."""

import json
from pathlib import Path

import torch.distributed as dist

from chunkflow.planning.pipeline_schedule import Timed
from chunkflow.planning.schedule import Kind
from chunkflow.planning.simulate import chrome_trace

Timeline = list[list[Timed]]  # rank of the pipeline -> its actions


def useful_time(actions: list[Timed]) -> float:
    """How long a rank's actions took together, recomputation aside."""
    return sum(end - start for action, start, end in actions if action.kind is not Kind.RECOMPUTE)


def gather_timeline(timeline: list[Timed], group: dist.ProcessGroup) -> Timeline:
    """The measured timelines of all ranks of a pipeline in microseconds, from this rank's in seconds. Each
    rank's clock starts with its step. A collective of `group`."""
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, _scaled(timeline, 1e6), group=group)
    return gathered


def write_timelines(
    path: Path, planned: Timeline, measured: Timeline | None
) -> tuple[dict[str, Timeline], str]:
    """Writes a trace for ui.perfetto.dev, and returns the timelines by name and the unit of their times. If
    one is measured, the planned one is scaled to the same useful time."""
    timelines = {"planned": planned}
    if measured:
        scale = sum(map(useful_time, measured)) / sum(map(useful_time, planned))
        timelines = {"planned": [_scaled(actions, scale) for actions in planned], "measured": measured}
    path.write_text(json.dumps(chrome_trace(timelines)))
    if not measured:
        return timelines, "forwards of a token on a stage, without attention"
    return {name: [_scaled(actions, 1e-3) for actions in made] for name, made in timelines.items()}, "ms"


def _scaled(actions: list[Timed], factor: float) -> list[Timed]:
    return [Timed(action, start * factor, end * factor) for action, start, end in actions]
