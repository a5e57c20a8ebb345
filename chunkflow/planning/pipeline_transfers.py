"""Messages between pipeline ranks: a schedule -> each rank's program of actions, sends and receives; and its
checks. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from chunkflow.planning.pipeline_schedule import Costs, Schedule, live_limit, play
from chunkflow.planning.pipeline_schedule import describe as describe_action
from chunkflow.planning.schedule import DUMMY, Action, Kind


class Transfer(NamedTuple):
    """One end of a message between two ranks: what `stage` made of a chunk, for the next stage or the one
    before.

    `made_by` is FORWARD (the stage's output; of a FORWARD_STATE or EVALUATE too) or BACKWARD (the gradient of
    the stage's input).
    """

    send: bool  # or receive
    made_by: Kind
    group: int
    chunk: int
    stage: int
    peer: int  # the rank at the other end


Program = list[
    Action | Transfer
]  # of one rank: its actions in order and, where it has neighbours, its messages


def add_transfers(schedule: Schedule, costs: Costs) -> list[Program]:
    """Each rank's program: the schedule with every message between ranks. Receives are posted, an action
    waits for its own.

    Messages are matched by their order between two ranks. So a send, right behind its action, and the receive
    on the other rank are appended at the same moment, in the order in which actions end with these costs:
    both ranks see the same order, and since no entry needs a later one, nothing blocks for ever, even if
    every send waited for its receive.
    """
    stages, ranks = len(costs.forward), len(schedule)
    events: list[tuple[float, bool, int, Action]] = []  # (time, starts rather than ends, rank, action)
    for rank, own in enumerate(play([[actions] for actions in schedule], costs)):
        for action, start, end in own:
            events.append((start, True, rank, action))
            if _receiver(action, stages, ranks) is not None:
                events.append((end, False, rank, action))
    events.sort(key=lambda event: event[:3])  # what ends at a moment is sent before anything starts
    programs: list[Program] = [[] for _ in schedule]
    for _, starts, rank, action in events:
        if starts:
            programs[rank].append(action)
            continue
        peer = _receiver(action, stages, ranks)
        made_by = Kind.BACKWARD if action.kind is Kind.BACKWARD else Kind.FORWARD
        programs[rank].append(Transfer(True, made_by, action.group, action.chunk, action.stage, peer))
        programs[peer].append(Transfer(False, made_by, action.group, action.chunk, action.stage, rank))
    return programs


def _receiver(action: Action, stages: int, ranks: int) -> int | None:
    """The rank that needs what the action makes, if another one does."""
    if action.kind is Kind.RECOMPUTE:
        return None
    stage = action.stage - 1 if action.kind is Kind.BACKWARD else action.stage + 1
    if not 0 <= stage < stages or stage % ranks == action.stage % ranks:
        return None
    return stage % ranks


def describe(entry: Action | Transfer) -> str:
    if isinstance(entry, Action):
        return describe_action(entry)
    kind = f"{'send' if entry.send else 'receive'} of the {entry.made_by.name}"
    return f"{kind} of group {entry.group}, chunk {entry.chunk}, stage {entry.stage}"


def check_schedule(programs: Sequence[Program], chunks_per_group: Sequence[int], k: int, stages: int) -> None:
    """Raises ValueError, with the action named, unless the program is right and finishes.

    On every stage each chunk runs FORWARD, BACKWARD or FORWARD_STATE, RECOMPUTE, BACKWARD, once, or in
    validation EVALUATE alone; within a group forwards ascend and backwards descend; no more chunks are live
    than `live_limit`; each action has its input, and what it makes is sent once. Both ends of every pair of
    ranks see the same transfers in the same order, and the program finishes even where each send and receive
    blocks until the other end is there.
    """
    for rank, entries in enumerate(programs):
        _check_rank(rank, entries, chunks_per_group, k, stages, len(programs))
    for rank in range(len(programs)):
        for peer in range(rank):
            ours, theirs = _transfers(programs[rank], peer), _transfers(programs[peer], rank)
            for own, other in zip_longest(ours, theirs):
                if own is None or other is None:
                    lonely = own or other
                    raise ValueError(f"ranks {peer} and {rank}: the {describe(lonely)} has no other end")
                if own[1:5] != other[1:5] or own.send == other.send:
                    raise ValueError(
                        f"the {describe(own)} on rank {rank} meets the {describe(other)} on rank {peer}"
                    )
    position = [0] * len(programs)
    moving = list(range(len(programs)))
    while moving:
        rank = moving.pop()
        entries = programs[rank]
        while position[rank] < len(entries) and isinstance(entries[position[rank]], Action):
            position[rank] += 1
        if position[rank] == len(entries):
            continue
        peer = entries[position[rank]].peer
        facing = programs[peer][position[peer]] if position[peer] < len(programs[peer]) else None
        if (
            isinstance(facing, Transfer) and facing.peer == rank
        ):  # the same message, since the order of the pair is the same
            position[rank] += 1
            position[peer] += 1
            moving += (rank, peer)
    for rank, entries in enumerate(programs):
        if position[rank] < len(entries):
            raise ValueError(
                f"deadlock: rank {rank} waits for ever in the {describe(entries[position[rank]])}"
            )


def _transfers(entries: list[Action | Transfer], peer: int) -> list[Transfer]:
    return [entry for entry in entries if isinstance(entry, Transfer) and entry.peer == peer]


def _check_rank(
    rank: int,
    entries: list[Action | Transfer],
    chunks_per_group: Sequence[int],
    k: int,
    stages: int,
    ranks: int,
) -> None:
    """What can be told from one rank's entries alone."""
    here: set[tuple[bool, int, int, int]] = (
        set()
    )  # made or received: (gradient, group, chunk, the stage that made it)
    unsent: dict[tuple[bool, int, int, int], int] = {}  # made, and wanted by this other rank
    latest: dict[tuple[int, int, int], Kind] = {}  # (stage, group, chunk) -> its last action
    forwards: dict[tuple[int, int], int] = {}  # (stage, group) -> how many so far
    backwards: dict[tuple[int, int], int] = {}
    evaluated: dict[tuple[int, int], int] = {}
    live = [0] * stages

    def require(condition: bool, trouble: str) -> None:
        if not condition:
            raise ValueError(f"rank {rank}: {describe(entry)} {trouble}")

    for entry in entries:
        group, chunk, stage = entry.group, entry.chunk, entry.stage
        if group == DUMMY:
            continue
        if isinstance(entry, Transfer):
            message = (entry.made_by is Kind.BACKWARD, group, chunk, stage)
            if entry.send:
                require(
                    unsent.pop(message, None) == entry.peer, f"finds nothing to send to rank {entry.peer}"
                )
            else:
                here.add(message)
            continue
        require(stage % ranks == rank and 0 <= stage < stages, "is of no stage of this rank")
        require(
            0 <= group < len(chunks_per_group) and 0 <= chunk < chunks_per_group[group],
            "is of no chunk of this step",
        )
        before, place = latest.get((stage, group, chunk)), (stage, group)
        latest[stage, group, chunk] = entry.kind
        if entry.kind is Kind.RECOMPUTE:
            require(before is Kind.FORWARD_STATE, "does not follow a FORWARD_STATE")
            live[stage] += 1
        elif entry.kind is Kind.BACKWARD:
            require(before in (Kind.FORWARD, Kind.RECOMPUTE), "finds no activations")
            count = chunks_per_group[group]
            require(forwards[place] == count, "comes before all chunks of its group went forward")
            expected = count - 1 - backwards.get(place, 0)
            require(chunk == expected, f"comes before that of chunk {expected}")
            require(stage == stages - 1 or (True, group, chunk, stage + 1) in here, "finds no gradient")
            backwards[place] = count - chunk
            live[stage] -= 1
        else:
            require(before is None, "is its second forward")
            expected = forwards.get(place, 0)
            require(chunk == expected, f"comes before that of chunk {expected}")
            require(stage == 0 or (False, group, chunk, stage - 1) in here, "finds no input")
            forwards[place] = chunk + 1
            evaluated[place] = evaluated.get(place, 0) + (entry.kind is Kind.EVALUATE)
            live[stage] += entry.kind is Kind.FORWARD
        limit = live_limit(k, stages, stage)
        require(live[stage] <= limit, f"makes {live[stage]} chunks hold activations; at most {limit} may")
        if entry.kind is not Kind.RECOMPUTE:
            message = (entry.kind is Kind.BACKWARD, group, chunk, stage)
            here.add(message)
            receiver = _receiver(entry, stages, ranks)
            if receiver is not None:
                unsent[message] = receiver
    for stage in range(rank, stages, ranks):
        for group, count in enumerate(chunks_per_group):
            left = count - backwards.get((stage, group), 0) - evaluated.get((stage, group), 0)
            if left and evaluated:
                entry = Action(Kind.EVALUATE, group, count - left, stage)
            elif left:
                entry = Action(Kind.BACKWARD, group, left - 1, stage)
            require(not left, "is missing")
    for (gradient, group, chunk, stage), peer in unsent.items():
        entry = Transfer(True, Kind.BACKWARD if gradient else Kind.FORWARD, group, chunk, stage, peer)
        require(False, "is missing")
