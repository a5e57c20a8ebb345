"""Which data-parallel rank trains which sequences. Pure Python; every rank computes the same answer, so nothing is sent."""

from __future__ import annotations

from heapq import heapify, heapreplace


def assign(costs: list[float], ranks: int) -> list[list[int]]:
    """Indices of the sequences of each rank: longest processing time first, ties by index.

    A cost belongs to the sequence alone, whatever it is packed with later, so ranks are balanced sequence by sequence and
    each rank then packs its own. The slowest rank is at most 4/3 of the optimum (Graham 1969), and close to the larger of the mean
    and the costliest sequence where most sequences are short.
    """
    if ranks == 1:
        return [list(range(len(costs)))]
    members: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    heapify(loads)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, rank = loads[0]
        members[rank].append(index)
        heapreplace(loads, (load + costs[index], rank))
    return members
