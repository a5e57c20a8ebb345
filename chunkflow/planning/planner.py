"""Lengths of a global batch -> everything that one optimizer step does, on every rank. Pure Python, no torch."""

from __future__ import annotations

from typing import NamedTuple

from chunkflow.planning.balance import assign
from chunkflow.planning.chunks import Group, build_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.schedule import DUMMY, Action, Kind, linear_schedule, lockstep


class PlanSettings(NamedTuple):
    """What the plan of a step depends on, besides the lengths.

    `lockstep`: all ranks run one common template of forward and backward slots (ZeRO-3, whose collectives must agree).
    """

    cost: Cost
    ranks: int = 1  # data-parallel ranks
    enable: bool = True  # False: one whole sequence a micro-batch
    chunk_size: int = 2048
    k: int = 1
    fill_tails: bool = True
    balance: str = "cost"  # or "tokens"
    lockstep: bool = False


class Plan(NamedTuple):
    """One optimizer step: each rank's groups and actions, and what they amount to."""

    groups: list[list[Group]]  # rank -> its groups, in the order they run; segments name sequences of the whole batch
    actions: list[list[Action]]  # rank -> its actions; `Action.group` counts that rank's groups, DUMMY is none of them
    tokens: int
    chunks: int
    recomputed_chunks: int
    padding_percent: float
    imbalance_percent: float  # slowest rank / mean - 1, in the planner's cost
    template_overhead_percent: float  # slots of the common template / slots of the rank with the most - 1


def plan_step(lengths: list[int], settings: PlanSettings) -> Plan:
    """The plan of a global batch of sequences with these lengths (tokens, each at least 1)."""
    cost, k = settings.cost, settings.k
    chunk_size = settings.chunk_size if settings.enable else max(lengths)
    if settings.balance == "tokens":
        costs = [float(length) for length in lengths]
    else:
        costs = [cost.chunked_training(length, chunk_size, k) for length in lengths]
    members = assign(costs, settings.ranks)

    groups = []
    for sequences in members:
        own = [lengths[index] for index in sequences]
        built = build_groups(own, chunk_size, settings.fill_tails) if settings.enable else whole_sequences(own)
        groups.append([_renumber(group, sequences) for group in built] if settings.ranks > 1 else built)
    counts = [[len(group.chunks) for group in own] for own in groups]
    actions = [linear_schedule(own, k) for own in counts]
    busiest = max(map(len, actions))
    if settings.lockstep:
        actions = lockstep(counts, k)
    else:  # a rank without work still takes part in the reduction of gradients
        actions = [own or [Action(Kind.FORWARD, DUMMY, 0), Action(Kind.BACKWARD, DUMMY, 0)] for own in actions]
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
    )


def _renumber(group: Group, sequences: list[int]) -> Group:
    """The same group, its segments naming sequences of the whole batch instead of the rank's share of it."""
    return Group(
        tuple(
            chunk._replace(segments=tuple(s._replace(sequence=sequences[s.sequence]) for s in chunk.segments))
            for chunk in group.chunks
        )
    )


def live_chunks(actions: list[Action]) -> int:
    """The most chunks that hold activations at once while these actions run on one stage (dummies aside)."""
    live = peak = 0
    for action in actions:
        if action.group < 0:
            continue
        live += {Kind.FORWARD: 1, Kind.RECOMPUTE: 1, Kind.BACKWARD: -1, Kind.FORWARD_STATE: 0}[action.kind]
        peak = max(peak, live)
    return peak
