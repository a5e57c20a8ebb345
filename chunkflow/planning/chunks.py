"""Chunk construction: sequence lengths -> groups of chunks (ChunkFlow, section 4.1). Pure Python, no torch.

Sequences longer than `chunk_size` are cut, in order, into dependent chunks; all others are packed whole. The
last chunk of a cut sequence is usually not full, and nothing in its group comes after it, so short sequences
may be packed behind it without adding a dependency ("filled tails").
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple


class Segment(NamedTuple):
    """A contiguous run of one sequence's tokens inside a chunk: tokens `start .. start + length - 1` of
    `sequence`."""

    sequence: int  # index into the batch's list of lengths
    start: int
    length: int


class Chunk(NamedTuple):
    """The micro-batch: segments laid one behind the other. Only the first may be a part of a longer
    sequence."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def prefix(self) -> int:
        """How many earlier tokens of the same sequence the first segment attends to."""
        return self.segments[0].start


ONE_TOKEN = Chunk((Segment(0, 0, 1),))  # a dummy: it keeps collectives in step, and has no target


class Group(NamedTuple):
    """The chunks that share K/V state: N dependent chunks in order, or one standalone chunk."""

    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)


def whole_sequences(lengths: list[int], sequences: list[int] | None = None) -> list[Group]:
    """One group of one chunk for each sequence, however long: the baseline that chunks are compared with.

    `sequences` are the indices of those wanted; None: all.
    """
    indices = range(len(lengths)) if sequences is None else sequences
    return [Group((Chunk((Segment(index, 0, lengths[index]),)),)) for index in indices]


def build_groups(
    lengths: list[int], chunk_size: int, fill_tails: bool = True, sequences: list[int] | None = None
) -> list[Group]:
    """Cuts and packs sequences of the given lengths (tokens, each at least 1) into groups, the longest group
    first.

    `sequences` are the indices of those wanted; None: all. The short ones are packed by best-fit-decreasing,
    ties broken by index, so that every rank builds the same groups.
    """
    tails: list[int] = []  # free tokens behind each long sequence
    cut: list[list[Chunk]] = []
    short: list[tuple[int, int]] = []  # (-length, index): sorts longest first, then by index
    for index in range(len(lengths)) if sequences is None else sequences:
        length = lengths[index]
        if length <= chunk_size:
            short.append((-length, index))
            continue
        starts = range(0, length, chunk_size)
        cut.append([Chunk((Segment(index, start, min(chunk_size, length - start)),)) for start in starts])
        tails.append(-length % chunk_size if fill_tails else 0)
    short.sort()
    bins = _best_fit(short, chunk_size, tails)
    groups = []
    for chunks, neighbours in zip(cut, bins):
        last = Chunk(chunks[-1].segments + tuple(Segment(index, 0, lengths[index]) for index in neighbours))
        groups.append(Group((*chunks[:-1], last)))
    for members in bins[len(cut) :]:
        groups.append(Group((Chunk(tuple(Segment(index, 0, lengths[index]) for index in members)),)))
    groups.sort(key=lambda group: (-group.tokens, group.chunks[0].segments[0].sequence))
    return groups


def _best_fit(short: list[tuple[int, int]], chunk_size: int, tails: list[int]) -> list[list[int]]:
    """Puts each sequence into the bin that it leaves least room in; opens a bin when none has room.

    Bins are kept by their free room: at most `chunk_size` different values, so a step costs one bisection.
    """
    bins: list[list[int]] = [[] for _ in tails]
    by_room: dict[int, list[int]] = {}
    for position, room in enumerate(tails):
        by_room.setdefault(room, []).append(position)
    rooms = sorted(by_room)
    for negative, index in short:
        place = bisect_left(rooms, -negative)
        if place == len(rooms):
            position, room = len(bins), chunk_size
            bins.append([])
        else:
            room = rooms[place]
            position = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        bins[position].append(index)
        room += negative
        if room in by_room:
            by_room[room].append(position)
        else:
            by_room[room] = [position]
            insort(rooms, room)
    return bins
