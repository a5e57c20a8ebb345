"""What the lengths of a dataset's sequences say before anything is planned: how much of the data a limit
keeps, and how much of it is long."""

from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple


class Kept(NamedTuple):
    """What training with this seq_len keeps if longer sequences are dropped, and how many tokens if they are
    truncated."""

    seq_len: int
    rows: int
    tokens: int
    tokens_truncated: int


class Bin(NamedTuple):
    """The sequences of more than `above` and at most `end` tokens."""

    above: int
    end: int
    rows: int
    tokens: int


def retention(lengths: list[int], seq_len: int) -> list[Kept]:
    """What each power of two from 1,024 on would keep, up to the first that keeps all; and what `seq_len`
    does."""
    ordered = sorted(lengths)
    tokens = [0, *accumulate(ordered)]
    limits = _powers_of_two(1024, ordered[-1])
    kept = []
    for limit in sorted({*limits, seq_len}):
        rows = bisect_right(ordered, limit)
        kept.append(Kept(limit, rows, tokens[rows], tokens[rows] + (len(ordered) - rows) * limit))
    return kept


def histogram(lengths: list[int], chunk_size: int) -> list[Bin]:
    """The sequences by length: bins end at powers of two from 256 on, and at `chunk_size`. Empty bins at
    either end are left out."""
    ordered = sorted(lengths)
    tokens = [0, *accumulate(ordered)]
    ends = sorted({*_powers_of_two(256, ordered[-1]), chunk_size})
    bins, before = [], 0
    for above, end in zip([0, *ends], ends):
        rows = bisect_right(ordered, end)
        bins.append(Bin(above, end, rows - before, tokens[rows] - tokens[before]))
        before = rows
    full = [number for number, part in enumerate(bins) if part.rows]
    return bins[full[0] : full[-1] + 1]


def _powers_of_two(first: int, longest: int) -> list[int]:
    """From `first` to the first that is at least `longest`."""
    powers = [first]
    while powers[-1] < longest:
        powers.append(2 * powers[-1])
    return powers
