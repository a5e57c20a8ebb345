"""The order in which a run passes the rows of its data: from the seed and the epoch alone."""

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate


class Order:
    """Epochs without end over the rows of sources, which lie one after the other in a dataset.

    Source i has `counts[i]` rows, and an epoch passes each `weights[i]` times. So the rows of a source come
    in passes, each of all its rows once, and epoch e takes rows floor(e w n) to floor((e + 1) w n) of that
    succession: with weight 0.5 one half of a pass, the next epoch the other. `shuffle`: an epoch is a random
    order of what it takes, and a pass that several epochs share is cut at random; else rows come as they lie,
    source after source. At most the rows of one epoch and of one pass are in memory, 8 bytes each.
    """

    def __init__(self, counts: list[int], weights: list[float], seed: int, shuffle: bool):
        self.seed, self.shuffle = seed, shuffle
        ends = list(accumulate(counts))
        self.rows = [range(end - count, end) for count, end in zip(counts, ends)]  # of each source
        # As they are written: 0.29 of 100 rows are 29. The float is a little less.
        self.rates = [Fraction(str(weight)) * count for weight, count in zip(weights, counts)]
        self.epoch_rows = sum(self.rates)  # of an epoch on average
        # The epoch of the last call: the cursor at its begin, its rows in parts, and where in it they end.
        self._start, self._parts, self._ends = 0, [], [0]

    def passed(self, epochs: int) -> int:
        """The rows of so many epochs, in all."""
        return sum(_floor(epochs * rate) for rate in self.rates)

    def epoch(self, cursor: int) -> int:
        """The epoch of the row that comes after `cursor` others."""
        # Rounding takes less than one row from each source, which bounds the epoch on both sides.
        low = _floor(cursor / self.epoch_rows)
        high = _floor((cursor + len(self.rates)) / self.epoch_rows) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.passed(middle) <= cursor else (low, middle)
        return low

    def row(self, cursor: int) -> int:
        """The row that comes after `cursor` others; quick for another one of the same epoch."""
        if not 0 <= cursor - self._start < self._ends[-1]:
            epoch = self.epoch(cursor)
            self._parts = []  # its memory, before more is taken
            self._start, self._parts = self.passed(epoch), self._rows_of(epoch)
            self._ends = list(accumulate(map(len, self._parts)))
        place = cursor - self._start
        number = bisect_right(self._ends, place)
        return self._parts[number][place - self._ends[number]]  # counted from the part's end

    def _rows_of(self, epoch: int) -> list[Sequence[int]]:
        """The rows of an epoch, in parts."""
        taken = list(self._taken(epoch))
        if not self.shuffle:
            return [rows for _, _, rows in taken]
        shuffled = array("q")
        for source, number, rows in taken:
            all_rows = self.rows[source]
            if len(rows) < len(all_rows):
                order = array("q", all_rows)
                random.Random(f"{self.seed}/{source}/{number}").shuffle(order)
                rows = order[rows.start - all_rows.start : rows.stop - all_rows.start]
            shuffled.extend(rows)
        random.Random(f"{self.seed}/{epoch}").shuffle(shuffled)
        return [shuffled]

    def _taken(self, epoch: int) -> Iterator[tuple[int, int, range]]:
        """What an epoch takes of each source's passes: source, number of the pass, rows as they lie."""
        for source, (all_rows, rate) in enumerate(zip(self.rows, self.rates)):
            at, end = _floor(epoch * rate), _floor((epoch + 1) * rate)
            while at < end:
                number, first = divmod(at, len(all_rows))
                rows = all_rows[first : first + end - at]
                yield source, number, rows
                at += len(rows)


def _floor(value: Fraction) -> int:
    return value.numerator // value.denominator
