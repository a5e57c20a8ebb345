"""The figures of a step, of all ranks, as TensorBoard's `chunkflow/*` and `data/*` scalars."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from chunkflow.execution.runner import StepResult
from chunkflow.planning.planner import Plan
from chunkflow.planning.simulate import Simulation
from chunkflow.reporting.timeline import useful_time


class RankFigures(NamedTuple):
    """One rank's figures of a step."""

    busy_seconds: float  # from the start of its step until it waits for the other replicas
    useful_seconds: float  # of its actions, recomputation aside
    end_seconds: float  # from the start of its step to the end of its last action
    simulated_bubble: float  # of its replica's plan: a share, 0 to 1
    live_chunks: float  # the most chunks of a stage that held activations at once
    stage_inputs: float  # the most inputs of a stage that were kept at once
    state_gib: float  # K/V and their gradients, at their peak


def rank_figures(result: StepResult, simulation: Simulation) -> RankFigures:
    """This rank's figures of a step and of its replica's plan. Waits for the device."""
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


def gather_over_ranks(figures: RankFigures, device: torch.device) -> list[RankFigures]:
    """The figures of every rank, in the order of ranks. A collective: all ranks call."""
    values = torch.tensor(figures, dtype=torch.float64, device=device)
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return [RankFigures(*rank_values.tolist()) for rank_values in gathered]


def step_scalars(
    plan: Plan,
    figures: list[RankFigures],
    *,
    targets: int,
    longest: int,
    epoch: int,
    ledger: dict[str, int],
    bad_steps: int,
) -> dict[str, float]:
    """What TensorBoard shows of a step beyond torchtitan's tags: tag -> value.

    `figures`: of all ranks; rank = pipeline_rank * replicas + replica. `targets` and `longest` (tokens of a
    sequence) are of the global batch. `ledger`: the run's tokens so far, by what became of them.
    """
    scalars = {f"data/{name}_tokens": count for name, count in ledger.items()} | {
        "chunkflow/groups": sum(map(len, plan.groups)),
        "chunkflow/recomputed(%)": 100 * plan.recomputed_chunks / plan.chunks,
        "chunkflow/live_chunks_peak": max(rank.live_chunks for rank in figures),
        "chunkflow/kv_state(GiB)": max(rank.state_gib for rank in figures),
        "chunkflow/tokens_per_supervised_token": plan.tokens / max(targets, 1),
        "chunkflow/bad_steps": bad_steps,
        "data/longest_sequence": longest,
        "data/epoch": epoch,
    }
    replicas = len(plan.groups)
    if len(figures) == replicas:  # no pipeline: ranks wait for each other once, at the end of the step
        scalars["chunkflow/template_overhead(%)"] = plan.template_overhead_percent
        busiest = max(rank.busy_seconds for rank in figures)
        for number, rank in enumerate(figures):
            scalars[f"chunkflow/waiting(%)/rank_{number}"] = 100 * (1 - rank.busy_seconds / busiest)
        return scalars
    scalars["chunkflow/stage_inputs_peak"] = max(rank.stage_inputs for rank in figures)
    bubbles = [rank.simulated_bubble for rank in figures]
    scalars["chunkflow/bubble(%)/simulated"] = 100 * sum(bubbles) / len(bubbles)
    end = max(rank.end_seconds for rank in figures)
    for stage, first in enumerate(range(0, len(figures), replicas)):
        useful = sum(rank.useful_seconds for rank in figures[first : first + replicas]) / replicas
        scalars[f"chunkflow/bubble(%)/stage_{stage}"] = 100 * (1 - useful / end)
    return scalars
