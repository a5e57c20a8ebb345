"""Which data-parallel rank trains which sequences, which stage has which layers. Pure Python; every rank
computes the same answer, so nothing is sent."""

from __future__ import annotations

from heapq import heapify, heapreplace


def assign(costs: list[float], ranks: int) -> list[list[int]]:
    """Indices of the sequences of each rank: longest processing time first, ties by index.

    A cost belongs to the sequence alone, whatever it is packed with later, so ranks are balanced sequence by
    sequence and each rank then packs its own. The slowest rank is at most 4/3 of the optimum (Graham 1969),
    and close to the larger of the mean and the costliest sequence where most sequences are short.
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


def split_layers(layers: int, head: float, stages: int) -> list[int]:
    """How many layers each pipeline stage gets, so that the costliest is as cheap as can be.

    `head` is what the last stage computes behind its layers, in units of a layer; embeddings cost nothing.
    Where the head outweighs a stage's share of layers, the last stage has none. Later stages get the odd
    layers: they hold fewer activations.
    """
    if stages == 1:
        return [layers]

    def split(last: int) -> list[int]:
        each, odd = divmod(layers - last, stages - 1)
        return [each + (stage >= stages - 1 - odd) for stage in range(stages - 1)] + [last]

    def costs(counts: list[int]) -> tuple[float, float]:
        own = [*counts[:-1], counts[-1] + head]
        return max(own), sum(cost * cost for cost in own)

    return min((split(last) for last in range(layers - stages + 2)), key=costs)
