"""Lengths of a global batch -> everything that one optimizer step does. Pure Python, no torch."""

from collections.abc import Sequence
from typing import NamedTuple

from chunkflow.planning.balance import assign
from chunkflow.planning.chunks import ONE_TOKEN, Chunk, Group, build_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import Costs, forward_schedule, paper_schedule, state_aware_schedule
from chunkflow.planning.pipeline_transfers import Program, add_transfers, check_schedule
from chunkflow.planning.schedule import DUMMY, Action, forward_only, linear_schedule, lockstep
from chunkflow.planning.simulate import Simulation, simulate


class PlanSettings(NamedTuple):
    """What the plan of a step depends on, besides the lengths.

    A replica trains its part of the batch by itself: a data-parallel rank, or a pipeline of several ranks
    (stage s on pipeline rank s % pipeline_ranks).
    """

    cost: Cost
    replicas: int = 1
    enable: bool = True  # False: one whole sequence a micro-batch
    chunk_size: int = 2048
    k: int = 1
    fill_tails: bool = True
    balance: str = "cost"  # or "tokens"
    lockstep: bool = False  # all replicas run one template of slots (ZeRO-3)
    forward_only: bool = False  # validation, where nothing is recomputed and `k` has no effect
    stages: tuple[Cost, ...] = ()  # of each pipeline stage; none: one stage, the whole model
    pipeline_ranks: int = 1


class Plan(NamedTuple):
    """One optimizer step: groups and figures of all replicas, programs and simulations of those wanted."""

    groups: list[list[Group]]  # replica -> its groups; segments name sequences of the whole batch
    programs: dict[int, list[Program]]  # replica -> pipeline rank -> what it runs
    simulations: dict[int, Simulation]  # unit of time: a token on a mean stage, without attention
    tokens: int
    chunks: int
    recomputed_chunks: int
    padding_percent: float
    imbalance_percent: float  # slowest replica / mean - 1, in the planner's cost
    template_overhead_percent: float  # slots of the common template / slots of the busiest replica - 1


def plan_step(lengths: list[int], settings: PlanSettings, replicas: Sequence[int] | None = None) -> Plan:
    """The plan of a global batch of sequences with these lengths (tokens, each at least 1).

    `replicas`: those whose programs are wanted; None: all.
    """
    chunk_size = settings.chunk_size if settings.enable else max(lengths)
    k = max(lengths) if settings.forward_only else settings.k  # as many chunks as that: none is recomputed
    if settings.balance == "tokens":
        costs = [float(length) for length in lengths]
    else:
        costs = [settings.cost.chunked_training(length, chunk_size, k) for length in lengths]
    members = assign(costs, settings.replicas)
    if settings.enable:
        groups = [build_groups(lengths, chunk_size, settings.fill_tails, indices) for indices in members]
    else:
        groups = [whole_sequences(lengths, indices) for indices in members]

    counts = [[len(group.chunks) for group in of_replica] for of_replica in groups]
    recomputed = [sum(max(0, count - k) for count in of_replica) for of_replica in counts]
    passes = 1 if settings.forward_only else 2
    slots = [passes * sum(of_replica) + again for of_replica, again in zip(counts, recomputed)]
    templates: Sequence[list[Action] | None] = [None] * settings.replicas
    if settings.lockstep:
        templates = forward_only(counts, lockstep=True) if settings.forward_only else lockstep(counts, k)
    wanted = range(settings.replicas) if replicas is None else replicas
    planned = {replica: _run(groups[replica], settings, k, templates[replica]) for replica in wanted}

    chunks, tokens = sum(map(sum, counts)), sum(lengths)
    loads = [sum(costs[index] for index in sequences) for sequences in members]
    return Plan(
        groups=groups,
        programs={replica: programs for replica, (programs, _) in planned.items()},
        simulations={replica: simulation for replica, (_, simulation) in planned.items()},
        tokens=tokens,
        chunks=chunks,
        recomputed_chunks=sum(recomputed),
        padding_percent=100 * (1 - tokens / (chunks * chunk_size)) if settings.enable else 0.0,
        imbalance_percent=100 * (max(loads) * len(loads) / sum(loads) - 1),
        template_overhead_percent=100 * (len(templates[0]) / max(slots) - 1) if settings.lockstep else 0.0,
    )


def _run(
    groups: list[Group], settings: PlanSettings, k: int, template: list[Action] | None
) -> tuple[list[Program], Simulation]:
    """Checked programs of one replica's ranks; `template`: its actions, if all replicas run in lockstep."""
    idle = template is None and not groups
    if idle:  # it still takes part in collectives
        groups = [Group((ONE_TOKEN,))]
    counts, ranks = [len(group.chunks) for group in groups], settings.pipeline_ranks
    costs = _costs(groups, settings.stages or (settings.cost,))
    stages = len(costs.forward)
    if template is not None:
        schedule = [template]
    elif settings.forward_only:
        schedule, costs = forward_schedule(counts, stages, ranks)
    elif stages == 1:
        schedule = [linear_schedule(counts, k)]
    else:  # whole sequences are the baseline, with ordinary 1F1B
        schedule = (state_aware_schedule if settings.enable else paper_schedule)(costs, k, ranks)
    programs = add_transfers(schedule, costs) if stages > 1 else schedule
    check_schedule(programs, counts, k, stages)
    real = [[action for action in actions if action.group != DUMMY] for actions in schedule]
    simulation = simulate(real, costs, [group.tokens for group in groups])
    if idle:
        programs = [[entry._replace(group=DUMMY) for entry in program] for program in programs]
    return programs, simulation


def _costs(groups: list[Group], stages: Sequence[Cost]) -> Costs:
    """Time of each chunk on each stage; a backward takes as long as two forwards."""
    unit = sum(cost.per_token for cost in stages) / len(stages)
    amounts = [[(chunk.tokens, _pairs(chunk)) for chunk in group.chunks] for group in groups]

    def times(cost: Cost, factor: float) -> list[list[float]]:
        per_token, per_pair = cost
        return [[factor * ((n * per_token + pairs * per_pair) / unit) for n, pairs in row] for row in amounts]

    return Costs([times(cost, 1) for cost in stages], [times(cost, 2) for cost in stages])


def _pairs(chunk: Chunk) -> float:
    """How many pairs of a query and a key attend."""
    return sum(s.length * (s.start + (s.length + 1) / 2) for s in chunk.segments)
