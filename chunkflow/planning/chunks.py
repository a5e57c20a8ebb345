"""Chunk construction: sequence lengths -> groups of chunks (ChunkFlow, section 4.1). Pure Python, no torch.

Sequences longer than `chunk_size` are cut into dependent chunks; all others are packed whole. Nothing in a
group comes after the last chunk of a cut sequence, so short sequences may be packed behind it without adding
a dependency ("filled tails").
"""

from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple

IGNORE = -100  # the label of a position that has no target


class Segment(NamedTuple):
    """The tokens `start .. start + length - 1` of one sequence, inside a chunk."""

    sequence: int  # index into the batch's list of lengths
    start: int
    length: int


class Chunk(NamedTuple):
    """The micro-batch: segments one after the other. Only the first may be a part of a longer sequence (of a
    spread one, both)."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def prefix(self) -> int:
        """How many earlier tokens of the same sequence the first segment attends to."""
        return self.segments[0].start


ONE_TOKEN = Chunk((Segment(0, 0, 1),))  # a dummy, without targets, for ranks that only join collectives


class Spread(NamedTuple):
    """How a group's chunks are shared by several replicas.

    Each chunk is cut into twice as many parts as there are replicas; replica m of R has the parts m and
    2R - 1 - m, so that all attend to equally many tokens. The parts of every chunk but the last are equal.
    """

    replicas: range
    member: int  # which of them this one is
    ends: tuple[int, ...]  # where in the sequence each chunk ends

    def start(self, chunk: int) -> int:
        """Where in the sequence a chunk begins."""
        return self.ends[chunk - 1] if chunk else 0

    def part(self, chunk: int, number: int) -> range:
        """The positions of one part of a chunk."""
        start, count = self.start(chunk), 2 * len(self.replicas)
        tokens = self.ends[chunk] - start
        return range(start + tokens * number // count, start + tokens * (number + 1) // count)

    def parts(self, chunk: int) -> list[range]:
        """The positions of each part of a chunk."""
        return [self.part(chunk, number) for number in range(2 * len(self.replicas))]

    def of_member(self, chunk: int, member: int) -> tuple[range, range]:
        """The positions of a chunk's two parts that a replica has."""
        return self.part(chunk, member), self.part(chunk, 2 * len(self.replicas) - 1 - member)


class Group(NamedTuple):
    """The chunks that share K/V state: N dependent chunks in order, or one standalone chunk.

    With `spread` they are one replica's parts of a sequence's chunks, two of each, and the state is shared.
    """

    chunks: tuple[Chunk, ...]
    spread: Spread | None = None

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def replicas(self) -> int:
        """How many replicas share it."""
        return len(self.spread.replicas) if self.spread else 1

    @property
    def sequence(self) -> int:
        """Its first one; the only one, if replicas share it or it has several chunks but for the last."""
        return self.chunks[0].segments[0].sequence

    @property
    def has_state(self) -> bool:
        """Whether its K/V are kept from one chunk to the next, or shared."""
        return len(self.chunks) > 1 or self.spread is not None


def whole_sequences(lengths: list[int], sequences: list[int] | None = None) -> list[Group]:
    """One group of one chunk for each sequence, however long: the baseline without ChunkFlow.

    `sequences` are the indices of those wanted; None: all.
    """
    indices = range(len(lengths)) if sequences is None else sequences
    return [Group((Chunk((Segment(index, 0, lengths[index]),)),)) for index in indices]


def build_groups(
    lengths: list[int], chunk_size: int, fill_tails: bool = True, sequences: list[int] | None = None
) -> list[Group]:
    """Cuts and packs sequences of these lengths (tokens, each at least 1) into groups, the longest first.

    `sequences` are the indices of those wanted; None: all. Short ones are packed by best-fit-decreasing, ties
    broken by index, so that every rank builds the same groups.
    """
    indices = range(len(lengths)) if sequences is None else sequences
    long = [index for index in indices if lengths[index] > chunk_size]
    short = [Segment(index, 0, lengths[index]) for index in indices if lengths[index] <= chunk_size]
    short.sort(key=lambda segment: (-segment.length, segment.sequence))
    bins = _best_fit(short, chunk_size, [-lengths[index] % chunk_size if fill_tails else 0 for index in long])
    groups = []
    for index, neighbours in zip(long, bins):
        starts = range(0, lengths[index], chunk_size)
        *cut, tail = [Segment(index, start, min(chunk_size, lengths[index] - start)) for start in starts]
        groups.append(Group((*(Chunk((segment,)) for segment in cut), Chunk((tail, *neighbours)))))
    groups += [Group((Chunk(tuple(segments)),)) for segments in bins[len(long) :]]
    groups.sort(key=lambda group: (-group.tokens, group.sequence))
    return groups


def spread_ends(length: int, chunk_size: int, replicas: int) -> tuple[int, ...] | None:
    """Where each chunk ends when a sequence of `length` tokens is spread over so many replicas.

    Chunks are as few as can be, with at most `chunk_size` tokens a replica, and nearly equal; all but the
    last are a multiple of 2 x replicas. None if the sequence is too short for that.
    """
    columns, most = -(-length // (2 * replicas)), chunk_size // 2  # tokens of a part
    if not most:
        return None
    chunks = -(-columns // most)
    each, wider = divmod(columns, chunks)
    if length < 2 * replicas * (columns - each + 1):
        return None  # the last chunk has fewer tokens than parts
    ends = [2 * replicas * (each * chunk + min(chunk, wider)) for chunk in range(1, chunks)]
    return (*ends, length)


def spread_groups(sequence: int, length: int, chunk_size: int, replicas: range) -> list[Group]:
    """The groups of a sequence that is spread over these replicas, one for each of them."""
    ends = spread_ends(length, chunk_size, len(replicas))
    assert ends, f"{length} tokens cannot be spread over {len(replicas)} replicas"
    groups = []
    for member in range(len(replicas)):
        spread = Spread(replicas, member, ends)
        parts = [spread.of_member(chunk, member) for chunk in range(len(ends))]
        chunks = (Chunk(tuple(Segment(sequence, part.start, len(part)) for part in both)) for both in parts)
        groups.append(Group(tuple(chunks), spread))
    return groups


def _best_fit(short: list[Segment], chunk_size: int, tails: list[int]) -> list[list[Segment]]:
    """Puts each segment into the fullest bin that has room for it, or into a new one. `tails` are the free
    tokens of the first bins.

    Bins are kept by their free room: at most `chunk_size` different values, so a step costs one bisection.
    """
    bins: list[list[Segment]] = [[] for _ in tails]
    by_room: defaultdict[int, list[int]] = defaultdict(list)  # free tokens -> bins
    for position, room in enumerate(tails):
        by_room[room].append(position)
    rooms = sorted(by_room)
    for segment in short:
        fit = bisect_left(rooms, segment.length)
        if fit == len(rooms):
            position, room = len(bins), chunk_size
            bins.append([])
        else:
            room = rooms[fit]
            position = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[fit]
        bins[position].append(segment)
        room -= segment.length
        if room not in by_room:
            insort(rooms, room)
        by_room[room].append(position)
    return bins
