"""The figures of a step, of all ranks, as TensorBoard's `chunkflow/*` and `data/*` scalars."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from chunkflow.execution.runner import StepResult
from chunkflow.planning.planner import Plan
from chunkflow.planning.simulate import Simulation
from chunkflow.reporting.timeline import useful_time

SHOWN_RANKS = 16  # with a curve of their own: a page has room for so many


class RankFigures(NamedTuple):
    """One rank's figures of a step."""

    busy_seconds: float  # from the start of its step until it waits for the other replicas
    useful_seconds: float  # of its actions, recomputation aside
    end_seconds: float  # from the start of its step to the end of its last action
    simulated_bubble: float  # of its replica's plan: a share, 0 to 1
    live_chunks: float  # the most chunks of a stage that held activations at once
    stage_inputs: float  # the most inputs of a stage that were kept at once
    state_gib: float  # K/V and their gradients, on the device and in host memory, at their peak
    device_state_gib: float  # what the device holds of them, copies included, at its peak
    kept_attention_gib: float = 0.0  # results of attention kept for later forwards, likewise
    loss_of_sources: tuple[float, ...] = ()  # weighted sums of its token losses


def rank_figures(
    result: StepResult,
    simulation: Simulation,
    sequence_weights: torch.Tensor | None = None,
    source_of: Sequence[int] = (),
    sources: int = 0,
) -> RankFigures:
    """This rank's figures of a step and of its replica's plan. Waits for the device.

    `sequence_weights`: those of the step. `source_of`: for each of the plan's sequences the number of its
    source, of so many `sources`; none where the step was not asked for the loss of sequences.
    """
    timeline, loss_of_sources = result.clock.timeline(), [0.0] * sources
    if source_of:
        losses = result.loss_of_sequences.cpu()
        losses = losses if sequence_weights is None else losses * sequence_weights
        for source, loss in zip(source_of, losses.tolist(), strict=True):
            loss_of_sources[source] += loss
    return RankFigures(
        busy_seconds=result.clock.busy_seconds(),
        useful_seconds=useful_time(timeline),
        end_seconds=timeline[-1].end,
        simulated_bubble=simulation.bubble,
        live_chunks=max(result.live_chunks),
        stage_inputs=max(result.stage_inputs),
        state_gib=result.state_bytes / 2**30,
        device_state_gib=result.device_state_bytes / 2**30,
        kept_attention_gib=max(result.kept_attention_bytes) / 2**30,
        loss_of_sources=tuple(loss_of_sources),
    )


def gather_over_ranks(figures: RankFigures, device: torch.device) -> list[RankFigures]:
    """The figures of every rank, in the order of ranks. A collective: all ranks call."""
    *of_rank, loss_of_sources = figures
    values = torch.tensor([*of_rank, *loss_of_sources], dtype=torch.float64, device=device)
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    rows, count = [rank_values.tolist() for rank_values in gathered], len(of_rank)
    return [RankFigures(*row[:count], loss_of_sources=tuple(row[count:])) for row in rows]


def losses_by_source(
    figures: list[RankFigures], names: list[str], source_of: list[int], weight_sums: list[float]
) -> dict[str, float]:
    """The loss of each source, sum(weight x loss) / sum(weight), that has targets in the step. `weight_sums`:
    of the targets of each of the plan's sequences."""
    sums, weights = [math.fsum(of_ranks) for of_ranks in zip(*(rank.loss_of_sources for rank in figures))], {}
    for source, weight in zip(source_of, weight_sums):
        weights[source] = weights.get(source, 0.0) + weight
    return {name: sums[source] / weights[source] for source, name in enumerate(names) if weights.get(source)}


def step_scalars(
    plan: Plan,
    figures: list[RankFigures],
    *,
    longest: int,
    epoch: int,
    ledger: dict[str, int],
    bad_steps: int,
) -> dict[str, float]:
    """What TensorBoard shows of a step beyond torchtitan's tags: tag -> value.

    `figures`: of all ranks; rank = pipeline_rank * replicas + replica. `longest`: tokens of the
    global batch's longest sequence. `ledger`: the run's tokens so far, by what became of them.
    """
    scalars = {f"data/{name}_tokens": count for name, count in ledger.items()} | {
        "chunkflow/recomputed(%)": 100 * plan.recomputed_chunks / plan.chunks,
        "chunkflow/live_chunks_peak": max(rank.live_chunks for rank in figures),
        "chunkflow/kv_state(GiB)": max(rank.state_gib for rank in figures),
        "chunkflow/kept_attention(GiB)": max(rank.kept_attention_gib for rank in figures),
        "chunkflow/kv_on_device(GiB)": max(rank.device_state_gib for rank in figures),
        "chunkflow/bad_steps": bad_steps,
        "data/longest_sequence": longest,
        "data/epoch": epoch,
    }
    replicas = len(plan.groups)
    if len(figures) == replicas:  # no pipeline: ranks wait for each other once, at the end of the step
        scalars["chunkflow/template_overhead(%)"] = plan.template_overhead_percent
        busiest = max(rank.busy_seconds for rank in figures)
        waiting = [100 * (1 - rank.busy_seconds / busiest) for rank in figures]
        scalars["chunkflow/waiting(%)/mean"] = sum(waiting) / len(waiting)
        for number, percent in enumerate(waiting[:SHOWN_RANKS]):
            scalars[f"chunkflow/waiting(%)/rank_{number}"] = percent
        return scalars
    scalars["chunkflow/stage_inputs_peak"] = max(rank.stage_inputs for rank in figures)
    bubbles = [rank.simulated_bubble for rank in figures]
    scalars["chunkflow/bubble(%)/simulated"] = 100 * sum(bubbles) / len(bubbles)
    end = max(rank.end_seconds for rank in figures)
    for stage, first in enumerate(range(0, len(figures), replicas)):
        useful = sum(rank.useful_seconds for rank in figures[first : first + replicas]) / replicas
        scalars[f"chunkflow/bubble(%)/stage_{stage}"] = 100 * (1 - useful / end)
    return scalars
