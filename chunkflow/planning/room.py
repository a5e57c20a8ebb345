"""How many chunks of a group may keep activations within a budget of memory, by prediction. No torch.

A group is taken by itself, with all its chunks full and gradients of others summed already: the longest of a
replica decides, since without stages one runs after the other.
"""

from collections.abc import Sequence

from chunkflow.planning.chunks import ONE_TOKEN, Chunk, Group, Segment, Spread
from chunkflow.planning.memory import StageSizes, peak_parts, with_kv_offload
from chunkflow.planning.pipeline_schedule import live_limit
from chunkflow.planning.pipeline_transfers import Program, Transfer
from chunkflow.planning.schedule import Kind, linear_schedule

MARGIN = 0.03  # of the budget: by so much an estimate of a pipeline may be wrong


class Room:
    """What the ranks of a replica may hold, in chunks of `chunk_size` tokens.

    `sizes`: each pipeline rank's stages, by number; `budgets`: bytes of each, as `peak_parts` counts them.
    `adapts`: the keys, "k" and "kv_offload", that a step may have its own value of. `kv_tokens`: as
    `PlanSettings.kv_tokens`, of a step whose K/V are in host memory.
    """

    def __init__(
        self,
        sizes: Sequence[dict[int, StageSizes]],
        budgets: Sequence[int],
        chunk_size: int,
        adapts: frozenset[str] = frozenset(),
        kv_tokens: int = 0,
    ):
        self.sizes = {where: with_kv_offload(sizes, where) for where in ("none", "host")}
        self.budgets, self.chunk_size, self.adapts, self.kv_tokens = budgets, chunk_size, adapts, kv_tokens
        self.stages = sum(map(len, sizes))
        of_chunk = [sum(stage.activations(chunk_size, False) for stage in rank.values()) for rank in sizes]
        self.of_chunk = max(1, *of_chunk)  # bytes of activations
        self._known: dict[tuple, int] = {}

    def excess(
        self, k: int, chunks: int, replicas: int, kv_offload: str, segments: int = 1, beside: int = 0
    ) -> int:
        """Bytes above the budget (below: negative) at the peak of a group of so many chunks, of which k keep
        activations, shared by so many replicas. `segments`: of its last chunk. `beside`: chunks of other
        groups whose K/V are held."""
        segments = 1 << (segments - 1).bit_length()  # few different ones
        key = k, chunks, replicas, kv_offload, segments, beside
        if key not in self._known:
            group = self._group(chunks, replicas, segments)
            self._known[key] = max(
                self._peak(rank, group, k, kv_offload, beside) - budget
                for rank, budget in enumerate(self.budgets)
            )
        return self._known[key]

    def kept(self, chunks: int, replicas: int, kv_offload: str, segments: int = 1, beside: int = 0) -> int:
        """The largest k of such a group; more than its chunks where there is room for more; 0 if there is
        room for none."""
        arguments = chunks, replicas, kv_offload, segments, beside
        if (least := self.excess(1, *arguments)) > 0:
            return 0
        k = min(chunks, 1 - least // self.of_chunk)
        while k > 1 and self.excess(k, *arguments) > 0:
            k -= 1
        while k < chunks and self.excess(k + 1, *arguments) <= 0:
            k += 1
        return k if k < chunks else chunks - self.excess(chunks, *arguments) // self.of_chunk

    def ks(
        self, groups: Sequence[Sequence[Group]], k: int, kv_offload: str, lockstep: bool, kv_tokens: int
    ) -> list[list[int]]:
        """How many chunks of each replica's groups keep activations: as many as fit, at least 1; `k` where
        that does not matter.

        In lockstep the K/V of all long groups of a replica are there together (at most `kv_tokens`, if not
        0, or those of one), so that its own groups have the same k. Replicas agree on what they share.
        """
        found, agreed = [], {}
        for own in groups:
            counts = [len(group.chunks) if group.has_state else 0 for group in own]
            held = self._held(sum(counts), kv_tokens) if lockstep else 0
            of_own = []
            for group, chunks in zip(own, counts):
                segments, beside = len(group.chunks[-1].segments), max(0, held - chunks)
                fits = self.kept(chunks, group.replicas, kv_offload, segments, beside) if chunks else k
                of_own.append(max(1, fits))
            if lockstep:
                alone = [fits for group, fits in zip(own, of_own) if group.spread is None and group.has_state]
                of_own = [fits if group.spread else min(alone, default=k) for group, fits in zip(own, of_own)]
            found.append(of_own)
            for group, fits in zip(own, of_own):
                if group.spread:
                    agreed[group.sequence] = min(fits, agreed.get(group.sequence, fits))
        return [
            [agreed[group.sequence] if group.spread else fits for group, fits in zip(own, of_own)]
            for own, of_own in zip(groups, found)
        ]

    def suspects(
        self,
        groups: Sequence[Sequence[Group]],
        ks: Sequence[Sequence[int]],
        kv_offload: str,
        lockstep: bool,
        kv_tokens: int,
    ) -> list[int]:
        """Replicas that may hold more than there is room for, those with most chunks of long groups first;
        estimated from these alone. `ks`: of each replica's groups."""
        sums = [sum(len(group.chunks) for group in own if group.has_state) for own in groups]

        def exceeds(replica: int) -> bool:
            longest: dict[tuple[int, int], tuple[int, int]] = {}  # (k, replicas) -> chunks, segments
            for group, k in zip(groups[replica], ks[replica]):
                if group.has_state:
                    key, segments = (k, group.replicas), len(group.chunks[-1].segments)
                    chunks, most = longest.get(key, (0, 1))
                    longest[key] = max(chunks, len(group.chunks)), max(most, segments)
            for (k, replicas), (chunks, segments) in longest.items():
                margin = 0
                if self.stages > 1:  # groups are under way together, in an order that a program would tell
                    chunks, margin = sums[replica], MARGIN * min(self.budgets)
                beside = max(0, self._held(sums[replica], kv_tokens) - chunks) if lockstep else 0
                if self.excess(k, chunks, replicas, kv_offload, segments, beside) > -margin:
                    return True
            return False

        return sorted(filter(exceeds, range(len(sums))), key=lambda replica: (-sums[replica], replica))

    def _held(self, chunks: int, kv_tokens: int) -> int:
        """Of so many chunks of a replica's long groups, those whose K/V are there at the same time."""
        return min(chunks, -(-kv_tokens // self.chunk_size)) if kv_tokens else chunks

    def over(self, rank: int, groups: Sequence[Group], program: Program, kv_offload: str) -> int:
        """Bytes above the budget, as in `excess`, of a pipeline rank's whole program."""
        return sum(peak_parts(self.sizes[kv_offload][rank], groups, program).values()) - self.budgets[rank]

    def _group(self, chunks: int, replicas: int, segments: int) -> Group:
        size = self.chunk_size
        spans = [Segment(0, size * number, size) for number in range(chunks)]
        others = min(segments, size) - 1
        tail = (spans[-1]._replace(length=size - others), *[Segment(1, 0, 1)] * others)
        ends = tuple(size * replicas * (number + 1) for number in range(chunks))
        spread = Spread(range(replicas), 0, ends) if replicas > 1 else None
        return Group((*(Chunk((span,)) for span in spans[:-1]), Chunk(tail)), spread)

    def _peak(self, rank: int, group: Group, k: int, kv_offload: str, beside: int) -> int:
        stages, last = self.sizes[kv_offload][rank], self.stages - 1
        entries: Program = []
        for number in stages:  # a first group leaves gradients
            entries += [action._replace(stage=number) for action in linear_schedule([1], 1)]
        backwards: Program = []
        total = 0
        for number, stage in stages.items():
            live = live_limit(k, self.stages, number)
            for action in linear_schedule([1, len(group.chunks)], live)[2:]:
                action = action._replace(stage=number)
                if action.kind in (Kind.FORWARD, Kind.FORWARD_STATE):
                    if number:
                        entries.append(Transfer(False, Kind.FORWARD, 1, action.chunk, number - 1, 0))
                    entries.append(action)
                    continue
                if number < last and action.kind is Kind.BACKWARD:
                    backwards.append(Transfer(False, Kind.BACKWARD, 1, action.chunk, number + 1, 0))
                backwards.append(action)
            if beside or last:  # while these K/V are there, short sequences may run, which keep their own
                more = stage.activations(self.chunk_size, True) - stage.activations(self.chunk_size, False)
                total += live * more
            if kv_offload == "none":
                total += beside * self.chunk_size * stage.layers * stage.kv_of_layer
        return total + sum(peak_parts(stages, [Group((ONE_TOKEN,)), group], entries + backwards).values())
