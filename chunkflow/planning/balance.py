"""Divides sequences among data-parallel replicas, and layers among pipeline stages. Pure Python; every rank
computes the same answer, so nothing is sent.

A sequence that costs more than its share would keep one replica busy while the others wait, and that one
would hold all of its K/V. Spread over R replicas it costs each an R-th, and the traffic of K/V. R is a power
of two, or all replicas, on an aligned block of them: blocks nest or are disjoint, so two replicas that share
a sequence agree on the order of everything they share.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from heapq import heapify, heapreplace
from typing import NamedTuple

from chunkflow.planning.chunks import spread_ends
from chunkflow.planning.cost import Cost

LEAST_SHARE = 8  # of a chunk, no replica's is smaller than a chunk_size by more: small products are slow
EVEN = 1.01  # slowest replica over the mean, when no other rule is tried
NODE, SLOWER = 8, 6  # ranks that reach each other fast; how much slower others are


class Share(NamedTuple):
    """A sequence, by its number in the batch, and the replicas over which it is spread."""

    sequence: int
    replicas: range


class Assignment(NamedTuple):
    spread: list[Share]  # over most replicas first: every replica takes its own in this order
    whole: list[list[int]]  # replica -> the sequences that it trains alone
    loads: list[float]  # replica -> time


def block_sizes(replicas: int, most: int) -> list[int]:
    """Numbers of replicas that a sequence may be spread over, at most `most`: descending, 1 at the end."""
    sizes = {1} | ({replicas} if replicas <= most else set())
    size = 2
    while size <= min(replicas, most):
        sizes.add(size)
        size *= 2
    return sorted(sizes, reverse=True)


Price = Callable[[int, int], float]  # (tokens of a sequence, replicas) -> time it takes each of them


def flops(cost: Cost, chunk_size: int, k_of: Callable[[int, int], int]) -> Price:
    """Time in FLOPs: a sequence's work, recomputation included; when it is spread, an equal share of it and
    the traffic of K and V. `k_of`: chunks of a group, and over how many replicas it is -> its k."""

    @cache
    def price(length: int, replicas: int) -> float:
        if replicas == 1:
            return cost.chunked_training(length, chunk_size, k_of(-(-length // chunk_size), 1))
        ends = spread_ends(length, chunk_size, replicas)
        per_gathered = cost.per_gathered * (1 if replicas <= NODE else SLOWER)
        before, total, k = 0, 0.0, k_of(len(ends), replicas)
        for index, end in enumerate(ends):
            again = index < len(ends) - k
            forward, backward = cost.forward(end - before, before), cost.backward(end - before, before)
            before = end
            # Forward gathers K and V; backward does, and scatters their gradients, which are twice as wide.
            total += ((1 + again) * forward + backward) / replicas + (4 + again) * end * per_gathered
        return total

    return price


def assign(
    lengths: Sequence[int],
    price: Price,
    replicas: int,
    sizes: Sequence[int] = (1,),
    *,
    chunk_size: int = 0,
    kv_tokens: int = 0,
) -> Assignment:
    """Divides sequences of these lengths by longest processing time first, ties by index.

    `sizes`, as from `block_sizes`, are numbers of replicas that a sequence may be spread over, `kv_tokens`
    the most tokens whose K/V a replica can hold (0: no limit). Rules are tried in turn: nothing is spread
    but what no replica can hold; each sequence goes over so few replicas that it takes none of them longer
    than the mean, down to a quarter of it; those of several chunks go over at least 2, 4 or 8; the longest
    over all. The first plan that is even is taken, else the fastest. If nothing is spread, the slowest
    replica takes at most 4/3 of the optimum (Graham 1969).
    """
    times = [price(length, 1) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda index: (-times[index], index))
    mean = sum(times) / replicas

    @cache
    def sizes_of(length: int) -> list[int]:
        return [size for size in sizes if _fits(length, size, chunk_size)]

    best, least = None, float("inf")
    for longest, least_size, over_all in _rules(mean, sizes, len(lengths)):
        spread: list[tuple[int, int]] = []  # (sequence, over how many replicas)
        size = sizes[0]
        for number, index in enumerate(order):
            length = lengths[index]
            held = length / kv_tokens if kv_tokens else 0
            least_of_long = least_size if length > chunk_size else 1
            wanted = sizes[0] if number < over_all else max(least_of_long, times[index] / longest, held)
            fits = [fit for fit in sizes_of(length) if fit <= size]
            size = min((fit for fit in fits if fit >= wanted), default=fits[0])
            if size == 1:
                break  # the others are shorter
            spread.append((index, size))
        candidate = _place(order, lengths, times, price, replicas, spread)
        slowest = max(candidate.loads)
        if slowest < least:
            best, least = candidate, slowest
        if slowest * replicas <= EVEN * sum(candidate.loads):
            break
    return best


def _rules(mean: float, sizes: Sequence[int], sequences: int) -> Iterator[tuple[float, int, int]]:
    """(longest time that a sequence may take a replica, how many replicas one of several chunks goes over at
    least, how many of the longest go over all)."""
    yield float("inf"), 1, 0
    if len(sizes) > 1:
        yield from ((mean / part, 1, 0) for part in (1, 1.4, 2, 2.8, 4))
        yield from ((mean, size, 0) for size in reversed(sizes) if 1 < size <= NODE)
        yield from ((mean, 1, 2**power) for power in range(sequences.bit_length()))


def _fits(length: int, replicas: int, chunk_size: int) -> bool:
    if replicas == 1:
        return True
    long_enough = length * LEAST_SHARE >= chunk_size * replicas
    return long_enough and spread_ends(length, chunk_size, replicas) is not None


def _place(
    order: list[int],
    lengths: Sequence[int],
    times: list[float],
    price: Price,
    replicas: int,
    spread: list[tuple[int, int]],
) -> Assignment:
    """Puts each sequence, in this order, where the load is lowest."""
    loads, shares = [0.0] * replicas, []
    blocks: list[tuple[float, int]] = []  # (load, first replica)
    level = 0
    for index, size in spread:
        if size != level:
            level, starts = size, range(0, replicas - size + 1, size)
            blocks = [(max(loads[first : first + size]), first) for first in starts]
            heapify(blocks)
        load, first = blocks[0]
        load += price(lengths[index], size)
        heapreplace(blocks, (load, first))
        loads[first : first + size] = [load] * size
        shares.append(Share(index, range(first, first + size)))
    whole: list[list[int]] = [[] for _ in range(replicas)]
    heap = [(load, replica) for replica, load in enumerate(loads)]
    heapify(heap)
    for index in order[len(spread) :]:
        load, replica = heap[0]
        whole[replica].append(index)
        heapreplace(heap, (load + times[index], replica))
    return Assignment(shares, whole, [load for _, load in sorted((replica, load) for load, replica in heap)])


def split_layers(layers: int, head: float, stages: int) -> list[int]:
    """How many layers each pipeline stage gets, so that the costliest stage costs as little as possible.

    `head` is the cost of the output head on the last stage, in units of a layer; embeddings cost nothing.
    The last stage may get no layers. A remainder goes to later stages, since they hold fewer activations.
    """
    if stages == 1:
        return [layers]

    def split(last: int) -> list[int]:
        each, odd = divmod(layers - last, stages - 1)
        return [each + (stage >= stages - 1 - odd) for stage in range(stages - 1)] + [last]

    def costs(counts: list[int]) -> tuple[float, float]:
        stage_costs = [*counts[:-1], counts[-1] + head]
        return max(stage_costs), sum(cost * cost for cost in stage_costs)

    return min((split(last) for last in range(layers - stages + 2)), key=costs)
