"""Pipelines of whole sequences against the paper's rule and ours: simulated on 4, 8 and 16 stages, measured
on 2 processes.

    python benchmarks/pipeline.py

Simulated: the bubble (1 - useful work / time; recomputation is not useful) of random steps, and makespans
relative to the lower bound of any chunked schedule. Each step is a batch of 64, 128 or 256 sequences in
chunks of 2K, 4K or 8K tokens, k = 1, 2 or 4. `lmsys` lengths follow LMSys-Chat-1M's figures (over 99 % below
4K tokens, 0.013 % above 32K, the longest about 300K); in `long_heavy`, one sequence in 20 has 8K to 256K
tokens. Chunks cost their tokens, or also their attention, as in a model of 7B.

Measured: recipes/finetune.py on train_configs/debug_pipeline.toml with longer sequences; seconds of
a step (the median after the first) and the peak memory of the larger process. Whole sequences keep the
activations of their longest one on every stage, or recompute them layer by layer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from math import exp, log
from pathlib import Path

from result_files import REPO, new_parser, parse_args

from chunkflow.planning.chunks import Group, build_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import (
    Costs,
    equal_stages,
    lower_bound,
    paper_schedule,
    state_aware_schedule,
)
from chunkflow.planning.simulate import in_given_order, simulate

KINDS = {  # of measured runs
    "whole sequences": ["--chunkflow.no_enable"],
    "whole sequences, layers recomputed": ["--chunkflow.no_enable", "--activation_checkpoint.mode=full"],
    "chunks of 2048, k = 1": ["--chunkflow.chunk_size=2048"],
    "chunks of 2048, k = 2": ["--chunkflow.chunk_size=2048", "--chunkflow.k=2"],
}
LINEAR = Cost(per_token=1.0, per_pair=0.0)
# Qwen2.5-7B: 7.1e9 weights in matrix products, 28 layers of 28 heads of 128. In units of a token's matrix
# products.
ATTENTION = Cost(per_token=1.0, per_pair=4 * 28 * 28 * 128 / (2 * 7.1e9))


def lmsys(generator: random.Random) -> int:
    if generator.random() < 0.00013:
        return round(exp(generator.uniform(log(32_768), log(300_000))))
    return min(32_768, max(1, round(generator.lognormvariate(6.0, 0.95))))


def long_heavy(generator: random.Random) -> int:
    if generator.random() < 0.05:
        return round(exp(generator.uniform(log(8_192), log(262_144))))
    return min(8_192, max(1, round(generator.lognormvariate(6.5, 1.0))))


def random_batch(generator: random.Random, mix) -> tuple[list[int], int]:
    """Lengths, and a chunk size."""
    batch, chunk_size = generator.choice([64, 128, 256]), generator.choice([2048, 4096, 8192])
    return [mix(generator) for _ in range(batch)], chunk_size


def stage_costs(groups: list[Group], cost: Cost, stages: int) -> Costs:
    def forward(chunk) -> float:
        return sum(cost.forward(segment.length, segment.start) for segment in chunk.segments)

    return equal_stages([[forward(chunk) for chunk in group.chunks] for group in groups], stages)


def simulated(options: argparse.Namespace) -> None:
    print(f"{'':20}{'bubble':^30}  {'makespan / bound: mean, p95, max':^48}  slowest")
    print(f"{'stages  mix':20}{'whole':>10}{'paper':>10}{'ours':>10}  {'paper':^24}{'ours':^24}  plan, ms")
    everything = []
    for stages in options.stages:
        for mix in (lmsys, long_heavy):
            rows, slowest = [], 0.0
            for k in (1, 2, 4):
                for cost in (LINEAR, ATTENTION):
                    for step in range(options.steps):
                        generator = random.Random(f"{options.seed} {stages} {mix.__name__} {k} {cost} {step}")
                        lengths, chunk_size = random_batch(generator, mix)
                        groups = in_given_order(build_groups(lengths, chunk_size))
                        costs = stage_costs(groups, cost, stages)
                        start = time.perf_counter()
                        ours = state_aware_schedule(costs, k, stages)
                        slowest = max(slowest, time.perf_counter() - start)
                        whole = stage_costs(whole_sequences(lengths), cost, stages)
                        runs = [
                            simulate(paper_schedule(whole, 1, stages), whole, lengths),
                            simulate(
                                paper_schedule(costs, k, stages), costs, [group.tokens for group in groups]
                            ),
                            simulate(ours, costs, [group.tokens for group in groups]),
                        ]
                        bound = lower_bound(costs, k, stages)
                        rows.append([run.bubble for run in runs] + [run.makespan / bound for run in runs[1:]])
            report(f"{stages:6}  {mix.__name__}", rows, f"{1000 * slowest:10.0f}")
            everything += rows
    report(f"all {len(everything)} steps", everything)
    saved = statistics.mean(1 - ours / paper for *_, paper, ours in everything)
    print(f"ours takes {saved:.1%} less time than the paper's rule, on average")


def report(name: str, rows: list, end: str = "") -> None:
    *bubbles, paper, ours = zip(*rows)
    means = "".join(f"{statistics.mean(bubble):10.1%}" for bubble in bubbles)

    def spread(ratios) -> str:
        ordered = sorted(ratios)
        return "".join(
            f"{x:8.3f}"
            for x in (statistics.mean(ordered), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1])
        )

    print(f"{name:20}{means}  {spread(paper)}{spread(ours)}{end}", flush=True)


def measured(options: argparse.Namespace) -> None:
    common = [
        f"--training.steps={options.train_steps}",
        f"--training.seq_len={options.seq_len}",
        f"--training.global_batch_size={options.sequences}",
        "--training.mixed_precision_param=float32",
        "--metrics.no_enable_tensorboard",
    ]
    environment = {
        "NGPU": "2",
        "CONFIG_FILE": "train_configs/debug_pipeline.toml",
    }
    print(
        f"\n{f'2 processes, sequences of up to {options.seq_len:,}':38}{'seconds a step':>16}{'peak GiB':>10}"
    )
    for name in options.kinds:
        settings = KINDS[name]
        with tempfile.TemporaryDirectory() as folder:
            command = [str(REPO / "run_train.sh"), *common, *settings, f"--job.dump_folder={folder}"]
            done = subprocess.run(
                command, env=os.environ | environment, cwd=REPO, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
            rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        seconds = statistics.median(row["seconds"] for row in rows[1:])
        print(f"{name:38}{seconds:16.2f}{max(row['memory_gib'] for row in rows):10.2f}", flush=True)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument(
        "--steps", type=int, default=12, help="random steps for each k and kind of cost (12); 0: none"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-steps", type=int, default=6, help="measured steps (6); 0: none")
    parser.add_argument("--sequences", type=int, default=4, help="measured, in a step (4)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="measured ones (all)")
    parser.add_argument(
        "--seq-len", type=int, default=16384, help="longest measured sequence, tokens (16384)"
    )
    options = parse_args(parser)
    if options.steps:
        simulated(options)
    if options.train_steps:
        measured(options)


if __name__ == "__main__":
    main()
