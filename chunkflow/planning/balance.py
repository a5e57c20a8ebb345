"""Divides sequences among data-parallel ranks, and layers among pipeline stages. Every rank computes the same
answer, so nothing is sent."""

from heapq import heapify, heapreplace


def assign(costs: list[float], ranks: int) -> list[list[int]]:
    """Indices of the sequences of each rank, by longest processing time first, ties by index.

    The slowest rank takes at most 4/3 of the optimum (Graham 1969).
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
