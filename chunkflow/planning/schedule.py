"""The state-aware schedule (ChunkFlow, section 4.2, corrected): groups -> a list of actions. No torch.

Of a group of N chunks, the first N - k run forward for their K/V only; the last k keep their activations.
Backward goes from the last chunk to the first, since a chunk's K/V gradient is complete only when every later
chunk has added to it; a chunk without activations is recomputed just before its backward.
"""

import math
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple


class Kind(str, Enum):
    FORWARD = "F"  # keeps the chunk's activations
    FORWARD_STATE = "S"  # keeps the chunk's K/V only
    RECOMPUTE = "R"  # a second forward, with activations
    BACKWARD = "B"
    EVALUATE = "E"  # validation: a forward for the loss; keeps K/V until the group's last chunk


class Action(NamedTuple):
    kind: Kind
    group: int  # of the replica's groups, or DUMMY
    chunk: int  # its index in the group; dummies are counted separately
    stage: int = 0  # of the pipeline


DUMMY = -1  # `Action.group` of a 1-token chunk without loss, which keeps a rank's collectives in step


def linear_schedule(chunks_per_group: Iterable[int], k: int | Sequence[int]) -> list[Action]:
    """One stage's actions, group after group; at most k chunks of a group, the same for all or one for each,
    hold activations."""
    actions = []
    for group, count in enumerate(chunks_per_group):
        discarded = max(0, count - (k if isinstance(k, int) else k[group]))
        actions += [Action(Kind.FORWARD_STATE, group, chunk) for chunk in range(discarded)]
        actions += [Action(Kind.FORWARD, group, chunk) for chunk in range(discarded, count)]
        for chunk in reversed(range(count)):
            if chunk < discarded:
                actions.append(Action(Kind.RECOMPUTE, group, chunk))
            actions.append(Action(Kind.BACKWARD, group, chunk))
    return actions


def lockstep(
    chunks_per_group: Sequence[Sequence[int]],
    k: int | Sequence[Sequence[int]],
    spread: Sequence[int] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
    kv_tokens: int = 0,
) -> list[list[Action]]:
    """Every rank's actions (from the chunk counts of its groups) in one template of forward and backward
    slots. `k`: how many chunks of a group keep activations, the same for all, or of each group of each rank;
    ranks that share one agree on it. `spread`: how many of each rank's groups, the first ones, are shared
    with other ranks. `tokens`: of each group on this rank; `kv_tokens`: of how many a rank can hold the K/V
    at once; 0: no limit.

    With parameters resharded between chunks (ZeRO-3), the n-th slot of each rank must be of the same kind, or
    gathers of different layers meet. A slot is a backward if every rank has one to run, else a forward; a
    rank that has nothing to run in it runs a dummy. All K/V-only forwards come first, which makes the
    template as short as possible for k = 1: 2 x (most backwards of a rank) + (most recomputed chunks of a
    rank). In return, the K/V of all of a rank's long groups are held from the start; where that is more than
    `kv_tokens`, a group begins only when those before it have left room, or its backward is due. At most k
    chunks of a rank hold activations, dummies aside: the least k of its own groups, whose K/V are there at
    the same time, or the k of the shared group at hand.

    Ranks that share a group must run each of its chunks in the same slot, since keys and values are gathered
    inside. So shared groups come first, one after the other, each action in the first slot of its kind: that
    depends on the shared groups before it alone, on which these ranks agree. A rank whose next shared action
    does not fit the slot runs a K/V-only forward of its own groups, or a dummy.
    """
    spread = spread or [0] * len(chunks_per_group)
    tokens = tokens or chunks_per_group
    ks = [[k] * len(counts) for counts in chunks_per_group] if isinstance(k, int) else k
    ranks = [
        _LockstepRank(*of_rank, kv_tokens or math.inf)
        for of_rank in zip(chunks_per_group, spread, tokens, ks)
    ]
    while any(rank.shared or rank.backwards for rank in ranks):
        backward = all(rank.can_backward() for rank in ranks)
        for rank in ranks:
            rank.backward() if backward else rank.forward()
    return [rank.actions for rank in ranks]


class _LockstepRank:
    """How far one rank has come, while the common template is built."""

    def __init__(
        self, counts: Sequence[int], shared: int, tokens: Sequence[int], ks: Sequence[int], kv_tokens: float
    ):
        k = min(ks[shared:], default=1)  # of its own groups
        self.k, self.counts, self.kv_tokens = k, counts, kv_tokens
        self.actions: list[Action] = []
        # The next one is popped from the end of each list.
        self.shared = linear_schedule(counts[:shared], ks[:shared])[::-1]
        groups = list(enumerate(counts))[shared:]
        self.states = [Action(Kind.FORWARD_STATE, g, c) for g, n in groups for c in range(n - k)][::-1]
        self.kept = [Action(Kind.FORWARD, g, c) for g, n in groups for c in range(max(0, n - k), n)][::-1]
        self.backwards = [Action(Kind.BACKWARD, g, c) for g, n in reversed(groups) for c in range(n)]
        self.live: set[tuple[int, int]] = set()  # (group, chunk) with activations, of its own groups
        self.dummies: list[int] = []  # those whose backward has not run
        self.dummies_made = 0
        # Tokens of groups with K/V state, the shared ones apart: these come one after the other, and begin
        # whatever its own groups hold.
        self.tokens = [count if n > 1 else 0 for n, count in zip(counts, tokens)]
        self.held: set[int] = set()
        self.of_shared = max(tokens[:shared], default=0)

    def _due(self) -> tuple[int, int] | None:
        """Group and chunk of its own backward that comes next."""
        return self.backwards[-1][1:3] if self.backwards and not self.shared else None

    def _shares(self, backward: bool) -> bool:
        """Whether the next shared action fits a slot of this kind."""
        return bool(self.shared) and (self.shared[-1].kind is Kind.BACKWARD) == backward

    def can_backward(self) -> bool:
        return bool(self.dummies) or self._shares(backward=True) or self._due() in self.live

    def backward(self) -> None:
        if self._shares(backward=True):
            self.actions.append(self.shared.pop())
        elif self._due() in self.live:
            action = self.backwards.pop()
            self.live.discard(action[1:3])
            if action.chunk == 0:
                self.held.discard(action.group)
            self.actions.append(action)
        else:
            self.actions.append(Action(Kind.BACKWARD, DUMMY, self.dummies.pop()))

    def _may_begin(self, action: Action) -> bool:
        """Whether there is room for the K/V of an own forward's group, or they are there."""
        group = action.group
        if group in self.held or not self.tokens[group] or (self._due() or (None,))[0] == group:
            return True
        taken = sum(self.tokens[other] for other in self.held) + (self.of_shared if self.shared else 0)
        return taken + self.tokens[group] <= self.kv_tokens

    def _next_forward(self) -> Action | None:
        """The own forward to run now, if there is one that may be run."""
        state, kept = (actions[-1] if actions else None for actions in (self.states, self.kept))
        if state and self._may_begin(state):
            return self.states.pop()
        room = not self.shared and len(self.live) < self.k
        if kept and room and (not state or state.group > kept.group) and self._may_begin(kept):
            self.live.add(kept[1:3])
            return self.kept.pop()
        return None

    def forward(self) -> None:
        due = self._due()
        if self._shares(backward=False):
            self.actions.append(self.shared.pop())
        elif due and due not in self.live and due[1] < self.counts[due[0]] - self.k:
            self.live.add(due)
            self.actions.append(Action(Kind.RECOMPUTE, *due))
        elif action := self._next_forward():
            if self.tokens[action.group]:
                self.held.add(action.group)
            self.actions.append(action)
        else:
            self.actions.append(Action(Kind.FORWARD, DUMMY, self.dummies_made))
            self.dummies.append(self.dummies_made)
            self.dummies_made += 1


def forward_only(chunks_per_group: Sequence[Sequence[int]], lockstep: bool) -> list[list[Action]]:
    """Every rank's actions for validation (from the chunk counts of its groups): each chunk once, in order.

    With `lockstep` (ZeRO-3: every forward gathers parameters), dummies make all ranks run equally many
    actions; otherwise a rank without chunks runs one, to take part in the one gathering.
    """
    actions = [
        [Action(Kind.EVALUATE, group, chunk) for group, count in enumerate(counts) for chunk in range(count)]
        for counts in chunks_per_group
    ]
    slots = max(map(len, actions)) if lockstep else 1
    return [
        of_rank + [Action(Kind.EVALUATE, DUMMY, n) for n in range(slots - len(of_rank))]
        for of_rank in actions
    ]
