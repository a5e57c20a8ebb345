"""How close pipeline schedules come to the lower bound, over random steps: ours against the paper's rule. Pure Python.

    python benchmarks/pipeline_simulation.py

Each step is a batch of 64, 128 or 256 sequences in chunks of 2K, 4K or 8K tokens, k = 1, 2 or 4. `lmsys` lengths follow
LMSys-Chat-1M's figures (over 99 % below 4K tokens, 0.013 % above 32K, the longest about 300K); in `long_heavy`, one sequence in
20 has 8K to 256K tokens. Chunks cost their tokens, or also their attention to the tokens before them, as in a model of 7B.
"""

from __future__ import annotations

import argparse
import random
import time
from math import exp, log

from chunkflow.planning.chunks import build_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import equal_stages, lower_bound, paper_schedule, state_aware_schedule
from chunkflow.planning.simulate import in_given_order, simulate

LINEAR = Cost(per_token=1.0, per_pair=0.0)
# Qwen2.5-7B: 7.1e9 weights in matrix products, 28 layers of 28 heads of 128. In units of a token's matrix products.
ATTENTION = Cost(per_token=1.0, per_pair=4 * 28 * 28 * 128 / (2 * 7.1e9))


def lmsys(generator: random.Random) -> int:
    if generator.random() < 0.00013:
        return round(exp(generator.uniform(log(32_768), log(300_000))))
    return min(32_768, max(1, round(generator.lognormvariate(6.0, 0.95))))


def long_heavy(generator: random.Random) -> int:
    if generator.random() < 0.05:
        return round(exp(generator.uniform(log(8_192), log(262_144))))
    return min(8_192, max(1, round(generator.lognormvariate(6.5, 1.0))))


def random_groups(generator: random.Random, length) -> list:
    batch, chunk_size = generator.choice([64, 128, 256]), generator.choice([2048, 4096, 8192])
    return build_groups([length(generator) for _ in range(batch)], chunk_size)


def chunk_costs(groups, cost: Cost) -> list[list[float]]:
    return [
        [sum(cost.forward(segment.length, segment.start) for segment in chunk.segments) for chunk in group.chunks]
        for group in groups
    ]


def summary(ratios: list[float]) -> str:
    ordered = sorted(ratios)
    mean = sum(ordered) / len(ordered)
    quantiles = [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 1.0)]
    return "".join(f"{value:8.3f}" for value in (mean, *quantiles))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=12, help="random steps for each k and kind of cost (12)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    everything: list[tuple[float, float]] = []
    columns = "    mean  median     p95     max"
    print(f"{'':24}{'ours / bound':^32}   {'paper / bound':^32}   ours    slowest")
    print(f"{'stages  mix':24}{columns}   {columns}   saves   plan, ms")
    for stages in options.stages:
        for mix in (lmsys, long_heavy):
            rows, slowest = [], 0.0
            for k in (1, 2, 4):
                for cost in (LINEAR, ATTENTION):
                    for step in range(options.steps):
                        generator = random.Random(f"{options.seed} {stages} {mix.__name__} {k} {cost} {step}")
                        groups = in_given_order(random_groups(generator, mix))
                        costs = equal_stages(chunk_costs(groups, cost), stages)
                        tokens = [group.tokens for group in groups]
                        start = time.perf_counter()
                        ours = state_aware_schedule(costs, k, stages)
                        slowest = max(slowest, time.perf_counter() - start)
                        bound = lower_bound(costs, k, stages)
                        paper = paper_schedule(costs, k, stages)
                        rows.append([simulate(schedule, costs, tokens).makespan / bound for schedule in (ours, paper)])
            report(f"{stages:6}  {mix.__name__}", rows, f"{1000 * slowest:11.0f}")
            everything += rows
    report(f"all {len(everything)} steps", everything)


def report(name: str, rows: list, end: str = "") -> None:
    ours, paper = zip(*rows)
    saved = 1 - sum(our / other for our, other in rows) / len(rows)
    print(f"{name:24}{summary(ours)}   {summary(paper)}   {saved:5.1%}{end}")


if __name__ == "__main__":
    main()
