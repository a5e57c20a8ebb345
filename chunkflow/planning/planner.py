"""Lengths of a global batch -> everything that one optimizer step does. Pure Python, no torch."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from chunkflow.planning.balance import Assignment, assign, block_sizes, flops
from chunkflow.planning.chunks import ONE_TOKEN, Group, build_groups, spread_groups, whole_sequences
from chunkflow.planning.collectives import check_meetings, check_slots
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import (
    Costs,
    Schedule,
    equal_stages,
    forward_schedule,
    paper_schedule,
    state_aware_schedule,
)
from chunkflow.planning.pipeline_transfers import Program, add_transfers, check_schedule
from chunkflow.planning.room import Room
from chunkflow.planning.schedule import DUMMY, Action, forward_only, linear_schedule, lockstep
from chunkflow.planning.simulate import Simulation, simulate

SUSPECTS = 4  # replicas whose memory is calculated exactly, at most, where an estimate says too much


class PlanSettings(NamedTuple):
    """What the plan of a step depends on, besides the lengths.

    A replica trains its part of the batch by itself: a data-parallel rank, or a pipeline of several ranks
    (stage s on pipeline rank s % pipeline_ranks). Only a long sequence may be spread over several.
    """

    cost: Cost
    replicas: int = 1
    enable: bool = True  # False: one whole sequence a micro-batch
    chunk_size: int = 2048
    k: int = 1  # of all groups, unless `room` adapts it
    fill_tails: bool = True
    balance: str = "cost"  # or "tokens"
    lockstep: bool = False  # all replicas run one template of slots (ZeRO-3)
    forward_only: bool = False  # validation, where nothing is recomputed and `k` has no effect
    # Preference training: before a step comes a pass of forwards over its groups. Forward-only plans then
    # have the same groups, so that their losses are the same to the last bit.
    forward_first: bool = False
    stages: tuple[Cost, ...] = ()  # of each pipeline stage; none: one stage, the whole model
    pipeline_ranks: int = 1
    spread_over: int = 1  # most replicas that may share a sequence
    kv_tokens: int = 0  # the most whose K/V and gradients a replica can hold at once; 0: no limit
    kv_offload: str = "none"  # where K/V of groups of several chunks live: on the device, or "host"
    room: Room | None = None  # what a replica may hold; None: no limit is known


class Plan(NamedTuple):
    """One optimizer step: groups and figures of all replicas, programs and simulations of those wanted."""

    groups: list[list[Group]]  # replica -> its groups; segments name sequences of the whole batch
    programs: dict[int, list[Program]]  # replica -> pipeline rank -> what it runs
    simulations: dict[int, Simulation]  # unit of time: a token on a mean stage, without attention
    tokens: int
    chunks: int  # of all replicas: a chunk that is spread over R counts R
    recomputed_chunks: int
    padding_percent: float
    imbalance_percent: float  # slowest replica / mean - 1, in the planner's cost
    template_overhead_percent: float  # slots of the common template / slots of the busiest replica - 1
    spread_sequences: int
    most_ranks_of_a_sequence: int
    k: list[list[int]]  # replica -> of each of its groups
    kv_offload: str
    notice: str = ""  # what is unusual about its memory
    # With forward_first: what the ranks of those wanted run before `programs`, as `programs` has them.
    forward_programs: dict[int, list[Program]] = {}


def plan_step(
    lengths: list[int],
    settings: PlanSettings,
    replicas: Sequence[int] | None = None,
    most: int | None = None,
) -> Plan:
    """The plan of a global batch of sequences with these lengths (tokens, each at least 1).

    `replicas`: those whose programs are wanted; None: all, or if they are more than `most`, so many of them,
    half with the most work, half with the most tokens of long sequences.

    Where the settings have `room`, and a replica would hold more than there is, K/V go to host memory, or
    fewer chunks keep activations, if `room` may adapt that; `Plan.notice` says what was done. Every rank
    decides the same, from the lengths alone.
    """
    plan, room = _plan(lengths, settings, replicas, most), settings.room
    if room is None or settings.forward_only or not settings.enable:
        return plan
    over = _over(lengths, plan, settings)
    if over <= 0:
        return plan
    best, least = plan, over
    for other in _adapted(settings):
        candidate = _plan(lengths, other, replicas, most)
        now = _over(lengths, candidate, other)
        if now < least:
            best, least = candidate, now
        if now <= 0:
            break
    return best._replace(notice=_notice(max(lengths), over, least, best, plan, settings))


def _adapted(settings: PlanSettings) -> Iterator[PlanSettings]:
    """What else may be tried, the fastest first."""
    room, k = settings.room, settings.k
    offloads = "kv_offload" in room.adapts and settings.kv_offload == "none"
    while True:
        if offloads:
            yield settings._replace(k=k, kv_offload="host", kv_tokens=room.kv_tokens)
        if "k" not in room.adapts or _adapts_k(settings) or k == 1:
            return
        k //= 2
        yield settings._replace(k=k)


def _notice(longest: int, over: int, left: int, plan: Plan, first: Plan, settings: PlanSettings) -> str:
    what = f"with a sequence of {longest:,} tokens it would take {over / 2**30:.3g} GiB too much"
    changes = []
    if plan.kv_offload != first.kv_offload:
        changes.append("K/V in host memory")
    if not _adapts_k(settings) and plan.k != first.k:
        changes.append(f"k = {min(map(min, filter(None, plan.k)))}")
    if changes:
        what += f", so it is run with {' and '.join(changes)}"
    return what if left <= 0 else f"{what}; {left / 2**30:.3g} GiB are still too much, by prediction"


def _over(lengths: list[int], plan: Plan, settings: PlanSettings) -> int:
    """Bytes by which the plan exceeds its room, on the replica where they are most; 0 if it does not."""
    how = plan.kv_offload, settings.lockstep, settings.kv_tokens
    suspects = settings.room.suspects(plan.groups, plan.k, *how)[:SUSPECTS]
    if not suspects:
        return 0
    made = _plan(lengths, settings, suspects) if set(suspects) - set(plan.programs) else plan
    return max(
        settings.room.over(rank, plan.groups[replica], program, plan.kv_offload)
        for replica in suspects
        for rank, program in enumerate(made.programs[replica])
    )


def _kept(groups: list[list[Group]], settings: PlanSettings, k: int) -> list[list[int]]:
    """The k of each replica's groups."""
    if not _adapts_k(settings):
        return [[k] * len(own) for own in groups]
    return settings.room.ks(groups, k, settings.kv_offload, settings.lockstep, settings.kv_tokens)


def _adapts_k(settings: PlanSettings) -> bool:
    """Whether each group has its own k. Those of a pipeline are under way together: they have the same."""
    room = settings.room
    adapts = room is not None and "k" in room.adapts and settings.enable and not settings.forward_only
    return adapts and len(settings.stages) <= 1


def _plan(
    lengths: list[int],
    settings: PlanSettings,
    replicas: Sequence[int] | None = None,
    most: int | None = None,
) -> Plan:
    chunk_size = settings.chunk_size if settings.enable else max(lengths)
    all_chunks = max(lengths)  # at least: as k, none is recomputed
    k = all_chunks if settings.forward_only else settings.k
    spread, whole, loads = _assign(lengths, settings, chunk_size, settings.k if settings.forward_first else k)
    groups: list[list[Group]] = [[] for _ in range(settings.replicas)]
    for sequence, members in spread:
        for replica, group in zip(members, spread_groups(sequence, lengths[sequence], chunk_size, members)):
            groups[replica].append(group)
    for own, indices in zip(groups, whole):
        if settings.enable:
            own += build_groups(lengths, chunk_size, settings.fill_tails, indices)
        else:
            own += whole_sequences(lengths, indices)

    counts = [[len(group.chunks) for group in of_replica] for of_replica in groups]
    ks = _kept(groups, settings, k)
    recomputed = [
        sum(max(0, count - kept) for count, kept in zip(of_replica, kept_of_replica))
        for of_replica, kept_of_replica in zip(counts, ks)
    ]
    passes = 1 if settings.forward_only else 2
    slots = [passes * sum(of_replica) + again for of_replica, again in zip(counts, recomputed)]
    templates = _templates(groups, counts, settings, ks)
    wanted = range(settings.replicas) if replicas is None else replicas
    if most is not None and len(wanted) > most:
        wanted = _fullest(groups, loads, most)
    planned = {
        replica: _run(groups[replica], settings, ks[replica], templates[replica]) for replica in wanted
    }
    forward_programs = {}
    if settings.forward_first and not settings.forward_only:
        forwards = settings._replace(forward_only=True)
        slots_of = _templates(groups, counts, forwards, ks)
        for replica in wanted:
            all_kept = [all_chunks] * len(groups[replica])
            forward_programs[replica] = _run(groups[replica], forwards, all_kept, slots_of[replica])[0]

    chunks, tokens = sum(map(sum, counts)), sum(lengths)
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
        spread_sequences=len(spread),
        most_ranks_of_a_sequence=max((len(share.replicas) for share in spread), default=1),
        k=ks,
        kv_offload=settings.kv_offload,
        forward_programs=forward_programs,
    )


def _templates(
    groups: list[list[Group]], counts: list[list[int]], settings: PlanSettings, ks: list[list[int]]
) -> Sequence[list[Action] | None]:
    """Each replica's actions if all run in lockstep, else None for each. `counts`: chunks, `ks`: the k of
    each group."""
    if not settings.lockstep:
        return [None] * settings.replicas
    if settings.forward_only:
        templates = forward_only(counts, lockstep=True)
    else:
        shared = [sum(group.spread is not None for group in of_replica) for of_replica in groups]
        tokens = [[group.tokens for group in of_replica] for of_replica in groups]
        templates = lockstep(counts, ks, shared, tokens, settings.kv_tokens)
    check_slots(templates, groups)
    return templates


def _fullest(groups: list[list[Group]], loads: list[float], most: int) -> list[int]:
    replicas = range(len(groups))
    long = [sum(g.tokens for g in own if g.has_state) for own in groups]
    chosen = sorted(replicas, key=lambda replica: (-loads[replica], replica))[: most - most // 2]
    others = [replica for replica in replicas if replica not in chosen]
    return sorted(chosen + sorted(others, key=lambda replica: (-long[replica], replica))[: most // 2])


def _assign(lengths: list[int], settings: PlanSettings, chunk_size: int, k: int) -> Assignment:
    sizes = block_sizes(settings.replicas, settings.spread_over if settings.enable else 1)

    def k_of(chunks: int, replicas: int) -> int:
        if not _adapts_k(settings):
            return k
        return max(1, settings.room.kept(chunks, replicas, settings.kv_offload))

    price = flops(settings.cost, chunk_size, k_of)
    if settings.balance == "tokens":

        def price(length: int, replicas: int) -> float:
            return length / replicas

    return assign(
        lengths, price, settings.replicas, sizes, chunk_size=chunk_size, kv_tokens=settings.kv_tokens
    )


def _run(
    groups: list[Group], settings: PlanSettings, ks: list[int], template: list[Action] | None
) -> tuple[list[Program], Simulation]:
    """Checked programs of one replica's ranks; `template`: its actions, if all replicas run in lockstep."""
    # Every replica takes part in collectives, and none starts to reduce its gradients in a chunk that it
    # shares: others would wait in that chunk for keys and values.
    idle = template is None and all(group.spread for group in groups)
    if idle:
        groups, ks = [*groups, Group((ONE_TOKEN,))], [*ks, 1]
    counts, ranks = [len(group.chunks) for group in groups], settings.pipeline_ranks
    stages = len(settings.stages) or 1
    if settings.forward_only:
        # Each chunk costs the same, so that all ranks move in step: with the true costs, cheap stages would
        # run ahead and fill the next rank's memory with hidden states.
        costs = equal_stages([[1.0] * count for count in counts], stages)
    else:
        costs = _costs(groups, settings.stages or (settings.cost,))
    if template is not None:
        schedule = [template]
    else:
        schedule = [[] for _ in range(ranks)]
        for part in _parts(groups):
            for actions, more in zip(
                schedule, _schedule(costs.of_groups(part), settings, ks[part.start : part.stop])
            ):
                actions += [action._replace(group=part[action.group]) for action in more]
    programs = add_transfers(schedule, costs) if stages > 1 else schedule
    check_schedule(programs, counts, ks, stages)
    check_meetings(programs, groups, lockstep=template is not None)
    real = [[action for action in actions if action.group != DUMMY] for actions in schedule]
    simulation = simulate(real, costs, [group.tokens for group in groups])
    if idle:
        last = len(groups) - 1
        programs = [
            [entry._replace(group=DUMMY) if entry.group == last else entry for entry in program]
            for program in programs
        ]
    return programs, simulation


def _parts(groups: list[Group]) -> list[range]:
    """The groups, cut where fewer replicas share them than before: whoever shares some of a part's groups
    shares all that came before, so that all of them make the same program of it."""
    keys = [group.spread.replicas if group.spread else None for group in groups]
    starts = [index for index, key in enumerate(keys) if index == 0 or key != keys[index - 1]]
    return [range(*pair) for pair in zip(starts, [*starts[1:], len(groups)])]


def _schedule(costs: Costs, settings: PlanSettings, ks: list[int]) -> Schedule:
    if settings.forward_only:
        return forward_schedule(costs, settings.pipeline_ranks)
    if len(costs.forward) == 1:
        return [linear_schedule(map(len, costs.forward[0]), ks)]
    # whole sequences are the baseline, with ordinary 1F1B
    make = state_aware_schedule if settings.enable else paper_schedule
    return make(costs, ks[0], settings.pipeline_ranks)


def _costs(groups: list[Group], stages: Sequence[Cost]) -> Costs:
    """Time of each chunk on each stage; a backward takes as long as two forwards, but in frozen products."""
    unit = sum(cost.per_token for cost in stages) / len(stages)
    amounts = [[tokens_and_pairs(group, chunk) for chunk in range(len(group.chunks))] for group in groups]

    def times(per_token: float, per_pair: float) -> list[list[float]]:
        return [[(n * per_token + pairs * per_pair) / unit for n, pairs in row] for row in amounts]

    return Costs(
        [times(cost.per_token, cost.per_pair) for cost in stages],
        [times(2 * cost.per_token - cost.frozen_per_token, 2 * cost.per_pair) for cost in stages],
    )


def tokens_and_pairs(group: Group, index: int) -> tuple[float, float]:
    """Tokens of a chunk, and how many pairs of a query and a key attend; of a spread one the mean share, the
    same for all replicas."""
    if group.spread is None:
        chunk = group.chunks[index]
        return chunk.tokens, sum(s.length * (s.start + (s.length + 1) / 2) for s in chunk.segments)
    start, replicas = group.spread.start(index), len(group.spread.replicas)
    tokens = group.spread.ends[index] - start
    return tokens / replicas, tokens * (start + (tokens + 1) / 2) / replicas
