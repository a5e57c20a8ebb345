"""Lengths of a global batch -> everything that one optimizer step does, on every rank. Pure Python, no
torch."""

from __future__ import annotations

from typing import NamedTuple

from chunkflow.planning.balance import assign
from chunkflow.planning.chunks import Chunk, Group, build_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import Costs, forward_schedule, paper_schedule, state_aware_schedule
from chunkflow.planning.pipeline_transfers import Program, add_transfers, check_schedule
from chunkflow.planning.schedule import DUMMY, Action, Kind, forward_only, linear_schedule, lockstep
from chunkflow.planning.simulate import Simulation, simulate


class PipelineSettings(NamedTuple):
    """The pipeline that one data-parallel replica is: stage s lives on its rank s % ranks."""

    stages: list[Cost]  # of each stage's layers
    ranks: int
    replica: int  # the one to plan for, among PlanSettings.ranks


class PlanSettings(NamedTuple):
    """What the plan of a step depends on, besides the lengths.

    `lockstep`: all ranks run one common template of forward and backward slots (ZeRO-3, whose collectives
    must agree). `forward_only`: validation, where nothing is recomputed and `k` means nothing.
    """

    cost: Cost
    ranks: int = 1  # data-parallel ranks; with a pipeline, its replicas
    enable: bool = True  # False: one whole sequence a micro-batch
    chunk_size: int = 2048
    k: int = 1
    fill_tails: bool = True
    balance: str = "cost"  # or "tokens"
    lockstep: bool = False
    pipeline: PipelineSettings | None = None
    forward_only: bool = False


class PipelinePlan(NamedTuple):
    """What the ranks of one replica's pipeline do in a step. A unit of cost is a token on a mean stage,
    attention aside."""

    program: Program  # pipeline rank -> its actions, sends and receives
    simulation: Simulation | None  # None: forward only


class Plan(NamedTuple):
    """One optimizer step: each rank's groups and actions, and what they amount to. With a pipeline, ranks are
    its replicas, and `pipeline` has the actions."""

    groups: list[
        list[Group]
    ]  # rank -> its groups, in the order they run; segments name sequences of the whole batch
    actions: list[
        list[Action]
    ]  # rank -> its actions; `Action.group` counts that rank's groups, DUMMY is none of them
    tokens: int
    chunks: int
    recomputed_chunks: int
    padding_percent: float
    imbalance_percent: float  # slowest rank / mean - 1, in the planner's cost
    template_overhead_percent: float  # slots of the common template / slots of the rank with the most - 1
    pipeline: PipelinePlan | None = None


def plan_step(lengths: list[int], settings: PlanSettings) -> Plan:
    """The plan of a global batch of sequences with these lengths (tokens, each at least 1)."""
    cost = settings.cost
    chunk_size = settings.chunk_size if settings.enable else max(lengths)
    k = max(lengths) if settings.forward_only else settings.k  # as many chunks as that: none is recomputed
    if settings.balance == "tokens":
        costs = [float(length) for length in lengths]
    else:
        costs = [cost.chunked_training(length, chunk_size, k) for length in lengths]
    members = assign(costs, settings.ranks)

    if settings.enable:
        groups = [build_groups(lengths, chunk_size, settings.fill_tails, own) for own in members]
    else:
        groups = [whole_sequences(lengths, own) for own in members]
    counts = [[len(group.chunks) for group in own] for own in groups]
    actions = (
        forward_only(counts, lockstep=False)
        if settings.forward_only
        else [linear_schedule(own, k) for own in counts]
    )
    busiest, pipeline = max(map(len, actions)), None
    if settings.pipeline:
        actions, pipeline = [], _plan_pipeline(groups[settings.pipeline.replica], settings)
    elif settings.lockstep:
        actions = forward_only(counts, lockstep=True) if settings.forward_only else lockstep(counts, k)
    else:  # a rank without work still takes part in the reduction of gradients
        actions = [
            own or [Action(Kind.FORWARD, DUMMY, 0), Action(Kind.BACKWARD, DUMMY, 0)] for own in actions
        ]
    chunks = sum(len(group.chunks) for own in groups for group in own)
    tokens = sum(lengths)
    loads = [sum(costs[index] for index in sequences) for sequences in members]
    return Plan(
        groups=groups,
        actions=actions,
        tokens=tokens,
        chunks=chunks,
        recomputed_chunks=sum(max(0, len(group.chunks) - k) for own in groups for group in own),
        padding_percent=100 * (1 - tokens / (chunks * chunk_size)) if settings.enable else 0.0,
        imbalance_percent=100 * (max(loads) * len(loads) / sum(loads) - 1),
        template_overhead_percent=100 * (len(actions[0]) / busiest - 1) if settings.lockstep else 0.0,
        pipeline=pipeline,
    )


def _plan_pipeline(groups: list[Group], settings: PlanSettings) -> PipelinePlan:
    """Schedules a replica's groups, and checks the result; without any, the one token that keeps its
    collectives in step."""
    stages, ranks, _ = settings.pipeline
    k = settings.k if settings.enable else 1
    amounts = [[_tokens_and_pairs(chunk) for chunk in group.chunks] for group in groups] or [[(1, 1)]]
    unit = sum(cost.per_token for cost in stages) / len(stages)
    forward = [
        [
            [(tokens * cost.per_token + pairs * cost.per_pair) / unit for tokens, pairs in group]
            for group in amounts
        ]
        for cost in stages
    ]
    if settings.forward_only:
        program = add_transfers(*forward_schedule([len(group) for group in amounts], len(stages), ranks))
        check_schedule(program, [len(group) for group in amounts], k, len(stages))
        return PipelinePlan(program, None)
    costs = Costs(forward, [[[2 * cost for cost in group] for group in stage] for stage in forward])
    make = state_aware_schedule if settings.enable else paper_schedule  # ordinary 1F1B is the baseline's
    schedule = make(costs, k, ranks)
    program = add_transfers(schedule, costs)
    check_schedule(program, [len(group) for group in amounts], k, len(stages))
    return PipelinePlan(program, simulate(schedule, costs, [group.tokens for group in groups] or [1]))


def _tokens_and_pairs(chunk: Chunk) -> tuple[int, float]:
    """A chunk's tokens, and its pairs of a query and a key that attend."""
    return chunk.tokens, sum(s.length * (s.start + (s.length + 1) / 2) for s in chunk.segments)


def live_chunks(actions: list[Action]) -> int:
    """The most chunks that hold activations at once while these actions run on one stage (dummies aside)."""
    live = peak = 0
    for action in actions:
        if action.group < 0:
            continue
        live += {
            Kind.FORWARD: 1,
            Kind.RECOMPUTE: 1,
            Kind.BACKWARD: -1,
            Kind.FORWARD_STATE: 0,
            Kind.EVALUATE: 0,
        }[action.kind]
        peak = max(peak, live)
    return peak
