"""Messages between pipeline ranks: a schedule -> checked programs of actions, sends and receives."""

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from chunkflow.planning.pipeline_schedule import Costs, Schedule, live_limit, play
from chunkflow.planning.pipeline_schedule import describe as describe_action
from chunkflow.planning.schedule import DUMMY, Action, Kind


class Transfer(NamedTuple):
    """One end of a message between ranks: the output of `stage` for a chunk (`made_by` FORWARD, whichever
    forward it was) to the next stage, or the gradient of its input (BACKWARD) to the one before."""

    send: bool  # or receive
    made_by: Kind
    group: int
    chunk: int
    stage: int
    peer: int  # the rank at the other end


# Of one rank: its actions in order and, in a pipeline, its messages.
Program = list[Action | Transfer]


def add_transfers(schedule: Schedule, costs: Costs) -> list[Program]:
    """Each rank's program: the schedule with every message between ranks.

    Messages are matched by their order between two ranks. So a send and its receive are appended at the same
    moment, in the order in which actions end with these costs: both ranks see the same order, and since no
    entry needs a later one, nothing blocks for ever, even if every send waited for its receive.
    """
    stages, ranks = len(costs.forward), len(schedule)
    events: list[tuple[float, bool, int, Action | Transfer]] = []  # (time, is an action, rank, entry)
    for rank, timeline in enumerate(play([[actions] for actions in schedule], costs)):
        for action, start, end in timeline:
            events.append((start, True, rank, action))
            peer = _receiver(action, stages, ranks)
            if peer is not None:
                made_by = Kind.BACKWARD if action.kind is Kind.BACKWARD else Kind.FORWARD
                events.append((end, False, rank, Transfer(True, made_by, *action[1:], peer)))
    events.sort(key=lambda event: event[:3])  # what ends at a moment is sent before anything starts
    programs: list[Program] = [[] for _ in schedule]
    for _, is_action, rank, entry in events:
        programs[rank].append(entry)
        if not is_action:
            programs[entry.peer].append(entry._replace(send=False, peer=rank))
    return programs


def _receiver(action: Action, stages: int, ranks: int) -> int | None:
    """The other rank that needs the action's result, if one does."""
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


def check_schedule(
    programs: Sequence[Program], chunks_per_group: Sequence[int], k: int | Sequence[int], stages: int
) -> None:
    """Raises ValueError, with the action named, unless the program is right and finishes.

    On every stage each chunk runs FORWARD, BACKWARD or FORWARD_STATE, RECOMPUTE, BACKWARD, once, or in
    validation EVALUATE alone; within a group forwards ascend and backwards descend; at most `live_limit`
    chunks hold activations (`k`: of all groups, or of each); each action has its input, and its result is
    sent once. Both ends of every pair of ranks see the same transfers in the same order, and the program
    finishes even if each send and receive blocks until the other end has reached it.
    """
    ks = [k] * len(chunks_per_group) if isinstance(k, int) else k
    for rank, entries in enumerate(programs):
        _check_rank(rank, entries, chunks_per_group, ks, stages, len(programs))
    for rank in range(len(programs)):
        for peer in range(rank):
            ours, theirs = _transfers(programs[rank], peer), _transfers(programs[peer], rank)
            for one, other in zip_longest(ours, theirs):
                if one is None or other is None:
                    raise ValueError(
                        f"ranks {peer} and {rank}: the {describe(one or other)} has no other end"
                    )
                if one[1:5] != other[1:5] or one.send == other.send:
                    meeting = f"the {describe(one)} on rank {rank} meets the {describe(other)} on rank {peer}"
                    raise ValueError(meeting)
    # The order of messages is the same on both ranks, so two that wait for each other have the same message.
    waiting = [[entry for entry in entries if isinstance(entry, Transfer)][::-1] for entries in programs]
    moving = list(range(len(programs)))
    while moving:
        rank = moving.pop()
        peer = waiting[rank][-1].peer if waiting[rank] else rank
        if peer != rank and waiting[peer] and waiting[peer][-1].peer == rank:
            waiting[rank].pop()
            waiting[peer].pop()
            moving += (rank, peer)
    for rank, transfers in enumerate(waiting):
        if transfers:
            raise ValueError(f"deadlock: rank {rank} waits for ever in the {describe(transfers[-1])}")


def _transfers(entries: Program, peer: int) -> list[Transfer]:
    return [entry for entry in entries if isinstance(entry, Transfer) and entry.peer == peer]


def _check_rank(
    rank: int, entries: Program, chunks_per_group: Sequence[int], ks: Sequence[int], stages: int, ranks: int
) -> None:
    """Checks what one rank's entries alone can show."""
    results: set[tuple[bool, int, int, int]] = set()  # made or received: (gradient, group, chunk, its stage)
    unsent: dict[tuple[bool, int, int, int], int] = {}  # result -> the other rank that needs it
    latest: dict[tuple[int, int, int], Kind] = {}  # (stage, group, chunk) -> its last action
    forwards: Counter[tuple[int, int]] = Counter()  # (stage, group) -> how many so far
    backwards: Counter[tuple[int, int]] = Counter()
    evaluated: Counter[tuple[int, int]] = Counter()
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
                peer = entry.peer
                require(unsent.pop(message, None) == peer, f"finds nothing to send to rank {peer}")
            else:
                results.add(message)
            continue
        require(stage % ranks == rank and 0 <= stage < stages, "is of no stage of this rank")
        count = chunks_per_group[group] if 0 <= group < len(chunks_per_group) else 0
        require(0 <= chunk < count, "is of no chunk of this step")
        before, on_stage = latest.get((stage, group, chunk)), (stage, group)
        latest[stage, group, chunk] = entry.kind
        if entry.kind is Kind.RECOMPUTE:
            require(before is Kind.FORWARD_STATE, "does not follow a FORWARD_STATE")
            live[stage] += 1
        elif entry.kind is Kind.BACKWARD:
            require(before in (Kind.FORWARD, Kind.RECOMPUTE), "finds no activations")
            require(forwards[on_stage] == count, "comes before all chunks of its group went forward")
            expected = count - 1 - backwards[on_stage]
            require(chunk == expected, f"comes before that of chunk {expected}")
            require(stage == stages - 1 or (True, group, chunk, stage + 1) in results, "finds no gradient")
            backwards[on_stage] += 1
            live[stage] -= 1
        else:
            require(before is None, "is its second forward")
            expected = forwards[on_stage]
            require(chunk == expected, f"comes before that of chunk {expected}")
            require(stage == 0 or (False, group, chunk, stage - 1) in results, "finds no input")
            forwards[on_stage] += 1
            if entry.kind is Kind.EVALUATE:
                evaluated[on_stage] += 1
            live[stage] += entry.kind is Kind.FORWARD
        limit = live_limit(ks[group], stages, stage)
        require(live[stage] <= limit, f"makes {live[stage]} chunks hold activations; at most {limit} may")
        if entry.kind is not Kind.RECOMPUTE:
            message = (entry.kind is Kind.BACKWARD, group, chunk, stage)
            results.add(message)
            receiver = _receiver(entry, stages, ranks)
            if receiver is not None:
                unsent[message] = receiver
    for stage in range(rank, stages, ranks):
        for group, count in enumerate(chunks_per_group):
            done = backwards[stage, group] + evaluated[stage, group]
            if evaluated:
                entry = Action(Kind.EVALUATE, group, done, stage)
            else:
                entry = Action(Kind.BACKWARD, group, count - done - 1, stage)
            require(done == count, "is missing")
    for (gradient, group, chunk, stage), peer in unsent.items():
        entry = Transfer(True, Kind.BACKWARD if gradient else Kind.FORWARD, group, chunk, stage, peer)
        require(False, "is missing")
