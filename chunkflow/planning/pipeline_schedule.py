"""State-aware 1F1B and interleaved 1F1B: groups -> a list of actions for every pipeline rank. Pure Python.

Stage s runs on rank s % ranks: each rank has one stage for 1F1B, several (virtual stages) for interleaved
1F1B. All stages run the groups in one order, forward ascending within a group and backward descending, and
recompute from the stage input they saved, so that neighbours exchange each chunk's output and its gradient
once. Stage s holds the activations of at most `live_limit` chunks; for k = 1, a rank with several stages
holds about what it does in Megatron's interleaved schedule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import chain
from operator import add
from typing import NamedTuple

from chunkflow.planning.schedule import Action, Kind, linear_schedule


class Timed(NamedTuple):
    action: Action
    start: float
    end: float


class Costs(NamedTuple):
    """Time of a forward (or recompute) and a backward, `[stage][group][chunk]`, above 0, in any unit."""

    forward: Sequence[Sequence[Sequence[float]]]
    backward: Sequence[Sequence[Sequence[float]]]

    def of_groups(self, groups: range) -> Costs:
        """Those of some groups, which follow each other."""
        return Costs(*([stage[groups.start : groups.stop] for stage in part] for part in self))


Schedule = list[list[Action]]  # rank -> its actions


def equal_stages(forward: Sequence[Sequence[float]], stages: int) -> Costs:
    """Costs of stages that are all alike, from `forward[group][chunk]`; a backward is two forwards."""
    backward = [[2 * cost for cost in group] for group in forward]
    return Costs([forward] * stages, [backward] * stages)


def live_limit(k: int, stages: int, stage: int) -> int:
    """How many chunks may hold activations on a stage: k, and one more for each later stage."""
    return k + stages - 1 - stage


def paper_schedule(costs: Costs, k: int, ranks: int) -> Schedule:
    """The paper's rule (ChunkFlow, section 4.3): groups in this order, stage s stages - 1 - s forwards ahead.

    If every group is one chunk, this is ordinary 1F1B.
    """
    stages = len(costs.forward)
    linear = linear_schedule([len(group) for group in costs.forward[0]], k)
    forwards = [action for action in linear if action.kind in (Kind.FORWARD, Kind.FORWARD_STATE)]
    lists: Schedule = []
    for stage in range(stages):
        actions: list[Action] = []
        done, due = 0, stages - 1 - stage
        for action in linear:
            if action.kind in (Kind.FORWARD, Kind.FORWARD_STATE):
                due += 1
                continue
            actions += [*forwards[done:due], action]
            done = due
        lists.append([action._replace(stage=stage) for action in actions])
    return _merge(lists, costs, ranks)


def _merge(lists: Schedule, costs: Costs, ranks: int) -> Schedule:
    """Each rank's actions, from those of each stage."""
    timeline = play([lists[rank::ranks] for rank in range(ranks)], costs)
    return [[timed.action for timed in actions] for actions in timeline]


def forward_schedule(costs: Costs, ranks: int) -> Schedule:
    """Validation: each chunk forward once, group after group."""
    chunks = [(group, chunk) for group, row in enumerate(costs.forward[0]) for chunk in range(len(row))]
    stages = range(len(costs.forward))
    return _merge(
        [[Action(Kind.EVALUATE, *chunk, stage) for chunk in chunks] for stage in stages], costs, ranks
    )


def state_aware_schedule(costs: Costs, k: int, ranks: int) -> Schedule:
    """The best plan of `list_schedule` for four orders of the groups, with two ways to break ties.

    Longest first is the best single order; each of the others wins in some cases where it fails.
    """
    sizes = [sum(map(sum, group)) for group in zip(*costs.forward)]
    longest = sorted(range(len(sizes)), key=lambda group: (-sizes[group], group))
    second = longest[1:2] + longest[:1] + longest[2:]
    standalone = [group for group in longest if len(costs.forward[0][group]) == 1]
    dependent = [group for group in longest if len(costs.forward[0][group]) > 1]
    orders = dict.fromkeys(map(tuple, (longest, second, longest[::-1], dependent[::-1] + standalone)))
    good_enough = lower_bound(costs, k, ranks) * (1 + 1e-9)  # costs may be fractions
    best, schedule = float("inf"), None
    for order in orders:
        for alternate in (True, False):
            makespan, candidate = list_schedule(order, costs, k, ranks, alternate)
            if makespan < best:
                best, schedule = makespan, candidate
            if best <= good_enough:
                return schedule
    return schedule


def list_schedule(
    order: Sequence[int], costs: Costs, k: int, ranks: int, alternate: bool
) -> tuple[float, Schedule]:
    """Event-driven list scheduling of the groups in this order: (makespan, schedule).

    An idle rank takes what is ready on its deepest stage; of a forward and a backward, the other kind than
    last time (`alternate`) or the forward. A forward runs ahead of the next backward's group only within the
    live limit, less a slot for that backward's recompute, which excludes deadlock. FORWARD_STATE keeps no
    activations, so only the number of stage inputs it saves is bounded. A rank that would wait recomputes for
    later backwards, within the live limit.
    """
    stages = len(costs.forward)
    counts = [len(group) for group in costs.forward[0]]
    # Forwards and backwards are numbered in the order that all stages run them in.
    chunks = [(group, chunk) for group in order for chunk in range(counts[group])]
    kept = [chunk >= counts[group] - k for group, chunk in chunks]
    forward_of: list[int] = []  # backward -> the same chunk's forward
    needed: list[int] = []  # backward -> forwards up to the end of its group
    for group in order:
        end = len(needed) + counts[group]
        forward_of += range(end - 1, len(needed) - 1, -1)
        needed += [end] * counts[group]
    total, last_stage = len(chunks), stages - 1
    # Backwards that need a recompute, and an end mark.
    discarded = [*(index for index, forward in enumerate(forward_of) if not kept[forward]), total]
    forward_cost = [[cost[group][chunk] for group, chunk in chunks] for cost in costs.forward]
    backward_cost = [[cost[group][chunk] for group, chunk in chunks] for cost in costs.backward]
    limits = [live_limit(k, stages, stage) for stage in range(stages)]
    most_saved = 2 * max(counts) + stages  # of one group alone is too few; more gains nothing

    forwarded: list[list[float]] = [[] for _ in range(stages)]  # when each forward of the stage ends
    backwarded: list[list[float]] = [[] for _ in range(stages)]
    live, saved = [0] * stages, [0] * stages
    recomputed = [0] * stages  # how many of the discarded
    was_backward, free = [True] * ranks, [0.0] * ranks
    schedule: Schedule = [[] for _ in range(ranks)]
    wakes = [(0.0, 0)]
    while wakes:
        now, rank = heappop(wakes)
        if free[rank] > now:
            continue  # it looks again when its action ends
        forward = backward = early = -1  # the deepest stage that each is ready on
        for stage in range(rank, stages, ranks):
            done = len(backwarded[stage])
            if done == total:
                continue
            ahead = len(forwarded[stage])
            to_recompute = discarded[recomputed[stage]]
            missing = to_recompute == done  # the next backward's activations
            room = live[stage] < limits[stage]
            if ahead < total and (stage == 0 or _ended(forwarded[stage - 1], ahead, now)):
                fits = live[stage] + missing < limits[stage] if kept[ahead] else saved[stage] < most_saved
                if ahead < needed[done] or fits:
                    forward = stage
            gradient = stage == last_stage or _ended(backwarded[stage + 1], done, now)
            if gradient and ahead >= needed[done] and (room or not missing):
                backward = stage
            elif room and to_recompute < total and ahead >= needed[to_recompute]:
                early = stage
        if forward < 0 and backward < 0:
            backward = early
        if forward >= 0 and (backward < 0 or not alternate or was_backward[rank]):
            stage, was_backward[rank] = forward, False
            index, peer = len(forwarded[stage]), stage + 1
            end = now + forward_cost[stage][index]
            forwarded[stage].append(end)
            if kept[index]:
                kind = Kind.FORWARD
                live[stage] += 1
            else:
                kind = Kind.FORWARD_STATE
                saved[stage] += 1
        elif backward >= 0:
            stage, was_backward[rank] = backward, True
            done, to_recompute = len(backwarded[stage]), discarded[recomputed[stage]]
            if backward == early or to_recompute == done:
                kind, index, peer = Kind.RECOMPUTE, forward_of[to_recompute], -1
                end = now + forward_cost[stage][index]
                recomputed[stage] += 1
                live[stage] += 1
                saved[stage] -= 1
            else:
                kind, index, peer = Kind.BACKWARD, forward_of[done], stage - 1
                end = now + backward_cost[stage][index]
                backwarded[stage].append(end)
                live[stage] -= 1
        else:
            continue
        schedule[rank].append(Action(kind, *chunks[index], stage))
        free[rank] = end
        heappush(wakes, (end, rank))
        if 0 <= peer < stages and free[peer % ranks] < end:
            heappush(wakes, (end, peer % ranks))
    assert all(len(ends) == total for ends in backwarded), "the list scheduler came to a halt"
    return max(free), schedule


def _ended(ends: list[float], index: int, now: float) -> bool:
    return index < len(ends) and ends[index] <= now


def play(lists: Sequence[Sequence[Sequence[Action]]], costs: Costs) -> list[list[Timed]]:
    """When each action runs, if every rank runs its lists in their order and each action waits for its input.

    `lists[rank]` holds one list, or one for each stage of the rank, which are merged: of the actions that are
    ready the rank prefers a forward after a backward and the reverse, then the deepest stage. Raises
    ValueError on a deadlock.
    """
    stages, ranks = len(costs.forward), len(lists)
    ended: dict[tuple[bool, int, int, int], float] = {}  # (backward, stage, group, chunk) -> time
    pending = [[deque(actions) for actions in of_rank] for of_rank in lists]
    was_backward, free = [True] * ranks, [0.0] * ranks
    timeline: list[list[Timed]] = [[] for _ in lists]
    wakes = [(0.0, rank) for rank in range(ranks)]
    while wakes:
        now, rank = heappop(wakes)
        if free[rank] > now:
            continue
        ready = []
        for actions in filter(None, pending[rank]):
            kind, group, chunk, stage = actions[0]
            backward = kind is Kind.BACKWARD
            has_input = kind is Kind.RECOMPUTE or stage == (stages - 1 if backward else 0)
            source = (backward, stage + 1 if backward else stage - 1, group, chunk)
            if has_input or ended.get(source, now + 1) <= now:
                changes = (backward or kind is Kind.RECOMPUTE) != was_backward[rank]
                ready.append((changes, stage, actions))
        if not ready:
            continue
        actions = max(ready, key=lambda entry: entry[:2])[2]
        kind, group, chunk, stage = action = actions.popleft()
        was_backward[rank] = kind in (Kind.RECOMPUTE, Kind.BACKWARD)
        cost = costs.backward if kind is Kind.BACKWARD else costs.forward
        end = now + cost[stage][group][chunk]
        timeline[rank].append(Timed(action, now, end))
        free[rank] = end
        heappush(wakes, (end, rank))
        if kind is not Kind.RECOMPUTE:
            ended[kind is Kind.BACKWARD, stage, group, chunk] = end
            peer = stage - 1 if kind is Kind.BACKWARD else stage + 1
            if 0 <= peer < stages and free[peer % ranks] < end:
                heappush(wakes, (end, peer % ranks))
    for rank, of_rank in enumerate(pending):
        for actions in filter(None, of_rank):
            raise ValueError(f"deadlock: rank {rank} waits for ever for the input of {describe(actions[0])}")
    return timeline


def describe(action: Action) -> str:
    return f"{action.kind.name} of group {action.group}, chunk {action.chunk}, stage {action.stage}"


def lower_bound(costs: Costs, k: int, ranks: int) -> float:
    """A makespan that no schedule that recomputes all but the last k chunks of a group can beat.

    The largest of: the work of a rank, plus the time of a smallest chunk to reach it and to return; the time
    of each group through all stages and back; and, on the last stage, the preemptive one-machine bound
    (Jackson 1955), in which a chunk is released when its group's forwards have reached it, and is followed by
    its group's earlier backwards.
    """
    stages = len(costs.forward)
    bound, jobs = 0.0, []
    work = [0.0] * ranks
    for group in range(len(costs.forward[0])):
        forward = [costs.forward[stage][group] for stage in range(stages)]
        backward = [costs.backward[stage][group] for stage in range(stages)]
        discarded = max(0, len(forward[0]) - k)
        for stage in range(stages):
            twice = sum(forward[stage][:discarded])
            work[stage % ranks] += sum(forward[stage]) + twice + sum(backward[stage])
        forward_ends, backward_ends = _ends(forward), _ends(backward)
        bound = max(bound, forward_ends[-1] + backward_ends[-1])
        for chunk, (once, back) in enumerate(zip(forward[-1], backward[-1])):
            time = once + back + (once if chunk < discarded else 0)
            jobs.append((forward_ends[chunk] - once, time, backward_ends[chunk] - back))
    to_rank = back_from_rank = [0.0] * len(jobs)  # time of each chunk through the ranks before
    for rank in range(ranks):
        bound = max(bound, min(to_rank) + work[rank] + min(back_from_rank))
        to_rank = [*map(add, to_rank, chain.from_iterable(costs.forward[rank]))]
        back_from_rank = [*map(add, back_from_rank, chain.from_iterable(costs.backward[rank]))]
    return max(bound, _one_machine(jobs))


def _ends(cost: Sequence[Sequence[float]]) -> list[float]:
    """When each chunk ends on the last stage if its group runs alone; `cost[stage][chunk]`."""
    ends = [0.0] * len(cost[0])
    for stage_cost in cost:
        before = 0.0
        for chunk, time in enumerate(stage_cost):
            ends[chunk] = before = max(before, ends[chunk]) + time
    return ends


def _one_machine(jobs: list[tuple[float, float, float]]) -> float:
    """The least time to finish all jobs (release, work, time needed afterwards) on one machine that may
    interrupt them: it always works on the released job that needs most time afterwards."""
    jobs = sorted(jobs)
    waiting: list[list[float]] = []  # [-time needed afterwards, remaining work]
    now = latest = 0.0
    index = 0
    while index < len(jobs) or waiting:
        if not waiting:
            now = max(now, jobs[index][0])
        while index < len(jobs) and jobs[index][0] <= now:
            heappush(waiting, [-jobs[index][2], jobs[index][1]])
            index += 1
        following = jobs[index][0] if index < len(jobs) else float("inf")
        job = waiting[0]
        if now + job[1] <= following:
            heappop(waiting)
            now += job[1]
            latest = max(latest, now - job[0])
        else:
            job[1] -= following - now
            now = following
    return latest
