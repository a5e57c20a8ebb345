"""Checks that replicas which share sequences never wait for each other for ever. Pure Python.

A chunk of a shared sequence gathers keys and values in every layer, forward and backward: all replicas that
share it must run it at the same time, and what they do before it must not wait for another of them.
"""

from collections import defaultdict
from collections.abc import Sequence

from chunkflow.planning.chunks import Group
from chunkflow.planning.pipeline_transfers import Program, Transfer, describe
from chunkflow.planning.schedule import DUMMY, Action, Kind


def check_slots(templates: Sequence[Sequence[Action]], groups: Sequence[Sequence[Group]]) -> None:
    """Raises ValueError unless, in every slot of the common template (ZeRO-3), all replicas run a forward or
    all a backward, and those that share a chunk run it in the same slot."""
    for slot, actions in enumerate(zip(*templates, strict=True)):
        backwards = [action.kind is Kind.BACKWARD for action in actions]
        if any(backwards) != all(backwards):
            raise ValueError(f"slot {slot} is a forward on some replicas and a backward on others")
        for replica, action in enumerate(actions):
            group = None if action.group == DUMMY else groups[replica][action.group]
            if group is None or group.spread is None:
                continue
            for other in group.spread.replicas:
                if _meeting(actions[other], groups[other]) != _meeting(action, groups[replica]):
                    meets = (
                        f"{describe(action)} on replica {replica} meets {describe(actions[other])} on {other}"
                    )
                    raise ValueError(f"slot {slot}: {meets}")


def check_meetings(programs: Sequence[Program], groups: Sequence[Group], lockstep: bool) -> None:
    """Raises ValueError unless a replica's programs run what it shares in the order that all replicas agree
    on: sequences over most replicas first and, out of lockstep, before all that is its own.

    Out of lockstep it must not end with a chunk that it shares, in whose backward it would begin to reduce
    gradients, which waits for every replica, while others wait in that chunk for keys and values.
    """
    sizes = [len(group.spread.replicas) if group.spread else 1 for group in groups]
    if sizes != sorted(sizes, reverse=True):
        raise ValueError(f"sequences spread over {sizes} replicas: those over most must come first")
    for rank, entries in enumerate(programs):
        ending: dict[int, Action] = {}  # stage -> its last backward
        before = max(sizes, default=1)
        for entry in entries:
            size = sizes[entry.group] if entry.group != DUMMY else 1
            if isinstance(entry, Transfer) or (size == 1 and lockstep):
                continue
            if size > before:
                trouble = f"is over {size} replicas, but comes after one over {before}"
                raise ValueError(f"rank {rank}: {describe(entry)} {trouble}")
            before = size
            if entry.kind is Kind.BACKWARD:
                ending[entry.stage] = entry
        for entry in ending.values():
            if not lockstep and sizes[entry.group] > 1:
                raise ValueError(f"rank {rank}: the last backward of a stage is shared: {describe(entry)}")


def check_progress(programs: dict[int, Sequence[Program]], groups: Sequence[Sequence[Group]]) -> None:
    """Raises ValueError unless all replicas finish together, if every message waits until its other end is
    reached and every chunk that replicas share until all of them are at it. `programs`: of all replicas."""
    places = {(replica, rank): 0 for replica, ranks in programs.items() for rank in range(len(ranks))}
    waiting = defaultdict(set)  # what is met -> who is there
    moving = list(places)
    while moving:
        place = moving.pop()
        replica, rank = place
        program = programs[replica][rank]
        while places[place] < len(program):
            entry = program[places[place]]
            if isinstance(entry, Transfer):
                ends = sorted((rank, entry.peer))
                meeting = replica, *ends, entry.made_by is Kind.BACKWARD, *entry[2:5]
                members = {(replica, end) for end in ends}
            elif (meeting := _meeting(entry, groups[replica])) is not None:
                meeting = rank, *meeting
                members = {(other, rank) for other in groups[replica][entry.group].spread.replicas}
            else:
                places[place] += 1
                continue
            waiting[meeting].add(place)
            if waiting[meeting] == members:
                del waiting[meeting]
                for member in members:
                    places[member] += 1
                moving += members - {place}
                continue
            break
    for (replica, rank), position in places.items():
        if position < len(programs[replica][rank]):
            entry = programs[replica][rank][position]
            raise ValueError(f"deadlock: replica {replica}, rank {rank} waits for ever in {describe(entry)}")


def _meeting(action: Action, groups: Sequence[Group]) -> tuple | None:
    """What is met in a chunk that replicas share, by a name that they have in common."""
    group = None if action.group in (DUMMY, len(groups)) else groups[action.group]
    if group is None or group.spread is None:
        return None
    return action.kind, group.chunks[0].segments[0].sequence, action.chunk, action.stage
