"""Checks that replicas which share sequences never wait for each other for ever. Pure Python.

A chunk of a shared sequence gathers keys and values in every layer, forward and backward: all replicas that
share it must run it at the same time, and what they do before it must not wait for another of them.
"""

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
            meeting = _meeting(action, groups[replica])
            for other in groups[replica][action.group].spread.replicas if meeting else ():
                if _meeting(actions[other], groups[other]) != meeting:
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
    sizes = [group.replicas for group in groups]
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


def _meeting(action: Action, groups: Sequence[Group]) -> tuple | None:
    """What is met in a chunk that replicas share, by a name that they have in common."""
    if action.group == DUMMY or groups[action.group].spread is None:
        return None
    return action.kind, groups[action.group].sequence, action.chunk, action.stage
