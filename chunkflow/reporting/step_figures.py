"""What a step amounted to on every rank, as TensorBoard's `chunkflow/*` and `data/*` scalars."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from chunkflow.execution.runner import StepResult
from chunkflow.planning.simulate import Simulation
from chunkflow.reporting.timeline import useful_time


class RankFigures(NamedTuple):
    busy_seconds: float  # until this rank meets the other replicas
    useful_seconds: float  # of its actions, recomputation aside
    end_seconds: float  # of its last action, since its step began
    simulated_bubble: float  # of its replica's plan
    live_chunks: float  # most chunks of a stage that held activations at once
    stage_inputs: float
    state_gib: float  # K/V and their gradients, at their peak


def rank_figures(result: StepResult, simulation: Simulation) -> RankFigures:
    """This rank's. Waits for the device."""
    timeline = result.clock.timeline()
    return RankFigures(
        busy_seconds=result.clock.busy_seconds(),
        useful_seconds=useful_time(timeline),
        end_seconds=timeline[-1].end,
        simulated_bubble=simulation.bubble,
        live_chunks=max(result.live_chunks),
        stage_inputs=max(result.stage_inputs),
        state_gib=result.state_bytes / 2**30,
    )


def gather_over_ranks(own: RankFigures, device: torch.device) -> list[RankFigures]:
    """Those of every rank. A collective."""
    values = torch.tensor(own, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return [RankFigures(*figures.tolist()) for figures in everyone]


def step_scalars(plan, data, figures: list[RankFigures], ledger, bad_steps: int) -> dict[str, float]:
    """What TensorBoard shows beyond torchtitan's tags.

    `plan` and `data` are the step's (chunkflow.planning.planner.Plan, chunkflow.data.dataloader.StepData).
    `figures`: of each rank; a pipeline rank's replicas are next to each other. `ledger`: tokens so far.
    """
    replicas = len(plan.groups)
    scalars = {f"data/{name}_tokens": count for name, count in vars(ledger).items()} | {
        "chunkflow/groups": sum(map(len, plan.groups)),
        "chunkflow/recomputed(%)": 100 * plan.recomputed_chunks / plan.chunks,
        "chunkflow/live_chunks_peak": max(own.live_chunks for own in figures),
        "chunkflow/kv_state(GiB)": max(own.state_gib for own in figures),
        "chunkflow/tokens_per_supervised_token": plan.tokens / max(data.targets, 1),
        "chunkflow/bad_steps": bad_steps,
        "data/longest_sequence": max(data.lengths),
        "data/epoch": data.epoch,
    }
    if len(figures) == replicas:  # one stage a replica
        busiest = max(own.busy_seconds for own in figures)
        for rank, own in enumerate(figures):
            scalars[f"chunkflow/waiting(%)/rank_{rank}"] = 100 * (1 - own.busy_seconds / busiest)
        return scalars | {"chunkflow/template_overhead(%)": plan.template_overhead_percent}
    end = max(own.end_seconds for own in figures)
    for stage, first in enumerate(range(0, len(figures), replicas)):
        useful = sum(own.useful_seconds for own in figures[first : first + replicas]) / replicas
        scalars[f"chunkflow/bubble(%)/stage_{stage}"] = 100 * (1 - useful / end)
    simulated = sum(own.simulated_bubble for own in figures) / len(figures)
    return scalars | {
        "chunkflow/bubble(%)/simulated": 100 * simulated,
        "chunkflow/stage_inputs_peak": max(own.stage_inputs for own in figures),
    }
