"""What the planner predicts against what is measured: seconds and memory of a step over chunk sizes and k;
and its choice against the best of all that were measured. Prints two Markdown tables.

    python benchmarks/planner.py           # a model of 12 million parameters, on a quiet machine
    python benchmarks/planner.py --quick   # a small one: half an hour on 2 cores

Each mix measures its rates first, as recipes/plan.py --calibrate does. A step is plan, forward, backward,
sums over ranks and update; its seconds are the sum of its actions and of the rest of the step, each as fast
as in its fastest run, since other work of the machine only slows it; all settings run in turn. Memory is the
most that PyTorch allocates in a step on the fullest rank beyond what it holds between steps; the CPU's
kernels allocate less than those that the prediction is made for. The budget of a case is the median of the
predicted memories: what is predicted to need more does not take part in the choice. "Spread" is slowest over
fastest of whole steps with the best settings, less 1: a choice that is not slower than this is as good.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from data_parallel import start
from result_files import new_parser, parse_args
from step import CPU, sizes, tensors
from torch import nn
from torch.profiler import ProfilerActivity, profile

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.execution.loss import loss_sum
from chunkflow.execution.runner import Runner
from chunkflow.planning.balance import split_layers
from chunkflow.planning.forecast import forecast
from chunkflow.planning.pipeline_schedule import Timed
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.settings.options import Config
from chunkflow.training import build, calibration, parallel, prediction, stages
from chunkflow.training.optimizer import build_optimizer
from models import llama


class Layout(NamedTuple):
    name: str
    processes: int
    mixes: tuple[str, ...]
    dtype: str = "float32"
    reshard: str = "default"
    pipeline: int = 1


LAYOUTS = [
    Layout("1 process, fp32", 1, ("lmsys", "agent")),
    Layout("1 process, bf16", 1, ("llama3_sft", "agent"), "bfloat16"),
    Layout("2 ranks, never", 2, ("llama3_sft", "agent"), reshard="never"),
    Layout("2 ranks, always", 2, ("lmsys", "agent"), reshard="always"),
    Layout("2 stages", 2, ("lmsys", "agent"), pipeline=2),
]


def lengths_of(mix: str, arguments: argparse.Namespace) -> list[int]:
    """A step of the mix: short sequences, and where it has none of them one as long as allowed."""
    if mix == "agent":  # 38K tokens in the middle, scaled down
        lengths = [max(1, length // arguments.scale) for length in synthetic_lengths(mix, 4, 0)]
    else:
        lengths = [*synthetic_lengths(mix, arguments.sequences - 1, 0), arguments.longest]
    return [min(length, arguments.longest) for length in lengths]


class Rank:
    """This process of a layout: its model, and what it takes to run and to predict a step."""

    def __init__(self, rank: int, port: int, layout: Layout, arguments: argparse.Namespace):
        torch.set_num_threads(arguments.threads)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(layout.processes), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        self.config = config = Config()
        config.training.mixed_precision_param, config.training.seq_len = layout.dtype, arguments.longest
        config.parallelism.fsdp_reshard_after_forward = layout.reshard
        config.parallelism.pipeline_parallel_degree = layout.pipeline
        args = dataclasses.replace(
            llama.flavors["debugmodel"], **sizes(arguments.dim, arguments.layers, arguments.vocab)
        )
        bounds, layers = 0, []
        for count in split_layers(args.n_layers, 0.5, layout.pipeline):
            layers.append(range(bounds, bounds + count))
            bounds += count
        self.spec = build.ModelSpec("llama3 debugmodel", llama, args, None, layers)
        self.processes = processes = parallel.init_processes(config.comm, config.parallelism)
        # Calibration has no pipeline: all ranks may share a sequence.
        self.blocks = processes.blocks or parallel.make_blocks(0, rank, processes.count, processes.count)
        self.reshard = parallel.reshards(config.parallelism, processes.replicas)
        with parallel.default_dtype(config.training.dtype):
            models = stages.build_stages(llama, args, layers, processes.pipeline_rank, layout.pipeline)
        for model in models.values():
            parallel.apply_fsdp(model, processes.data_mesh, config.training, self.reshard)
            parallel.init_weights(model, 0)
        self.models, dtype = models, parallel.DTYPES[layout.dtype]
        own = stages.make_stages(models, len(layers), processes, dtype)
        self.runner = Runner(own, CPU, loss_sum, processes.blocks)
        self.optimizer = build_optimizer(nn.ModuleList(models.values()), config.optimizer)

    def calibrate(self) -> None:
        self.rates, _ = calibration.measured_rates(self.config, self.spec, "cpu", self.blocks)

    def settings(self, chunk_size: int, k: int) -> PlanSettings:
        self.config.chunkflow.chunk_size, self.config.chunkflow.k = chunk_size, k
        return build.plan_settings(self.config, self.spec, self.processes.replicas, "cpu")

    def predict(self, lengths: list[int], chunk_size: int, k: int) -> tuple[float, float]:
        """Seconds, and MiB that the step adds on the fullest rank."""
        settings, spec = self.settings(chunk_size, k), self.spec
        layout = spec.args, spec.layers, self.processes.replicas, "cpu"
        held = prediction.stage_sizes(self.config, llama, *layout)
        step = forecast(lengths, settings, held, self.rates, pinned=False)
        added = [
            sum(amount for part, amount in parts.items() if part not in ("parameters", "optimizer"))
            for parts in step.peaks
        ]
        return step.seconds, max(added) / 2**20

    def step(self, lengths: list[int], chunk_size: int, k: int) -> list[float]:
        """Seconds of this rank's actions in a step, and of the rest of the step."""
        dist.barrier()
        begin = time.perf_counter()
        timeline = self._run(lengths, chunk_size, k)
        dist.barrier()
        whole, actions = time.perf_counter() - begin, [end - start for _, start, end in timeline]
        return [*actions, whole - sum(actions)]

    def allocated(self, lengths: list[int], chunk_size: int, k: int) -> float:
        """MiB that PyTorch allocates in a step, at most, on the rank that allocates most: the median of three
        steps, in which FSDP2's buffers are freed a little sooner or later."""
        return statistics.median(self._allocated(lengths, chunk_size, k) for _ in range(3))

    def _allocated(self, lengths: list[int], chunk_size: int, k: int) -> float:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self._run(lengths, chunk_size, k)
        events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return self.most(max(accumulate(event.nbytes() for event in events)) / 2**20)

    def _run(self, lengths: list[int], chunk_size: int, k: int) -> list[Timed]:
        processes = self.processes
        plan = plan_step(lengths, self.settings(chunk_size, k), [processes.replica])
        groups = plan.groups[processes.replica]
        data = tensors(groups, self.spec.args.vocab_size)
        for model in self.models.values():
            parallel.begin_step(model, self.reshard)
        self.optimizer.zero_grad()
        program = plan.programs[processes.replica][processes.pipeline_rank]
        result = self.runner.step(program, groups, data, sum(lengths))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result.clock.timeline()

    def most(self, figure: float) -> float:
        of_ranks: list[Any] = [None] * self.processes.count
        dist.all_gather_object(of_ranks, figure)
        return max(of_ranks)


def measure_layout(rank: int, port: int, arguments: argparse.Namespace) -> None:
    """Both tables' rows of the layout `arguments.layout`, printed by rank 0."""
    layout = LAYOUTS[arguments.layout]
    here = Rank(rank, port, layout, arguments)
    for mix in layout.mixes[: arguments.mixes]:
        lengths, rows = lengths_of(mix, arguments), {}
        ways = [(size, k) for size in arguments.chunk_sizes for k in arguments.k]
        # More than all chunks of the longest cannot be kept.
        ways = [(size, k) for size, k in ways if k == 1 or (k // 2) * size < max(lengths)]
        here.calibrate()
        runs: dict[tuple[int, int], list[list[float]]] = {way: [] for way in ways}
        for _ in range(arguments.runs + 1):
            for way, parts in runs.items():
                parts.append(here.step(lengths, *way))
        for way, parts in runs.items():
            seconds = here.most(sum(map(min, zip(*parts))))
            rows[way] = (*here.predict(lengths, *way), seconds, here.allocated(lengths, *way))
        budget = statistics.median(row[1] for row in rows.values())
        fitting = {way: row for way, row in rows.items() if row[1] <= budget}
        auto = min(fitting, key=lambda way: fitting[way][0])
        best = min(fitting, key=lambda way: fitting[way][2])
        whole = [here.most(sum(parts)) for parts in runs[best][1:]]
        if rank == 0:
            for way, (guess, guess_mib, seconds, mib) in rows.items():
                print(
                    f"| {layout.name} | {mix} | {way[0]} | {way[1]} | {guess:.2f} | {seconds:.2f} |"
                    f" {guess / seconds:.2f} | {guess_mib:.0f} | {mib:.0f} | {guess_mib / mib:.2f} |"
                )
            times = {way: fitting[way][2] for way in (auto, best)}
            spread = max(whole) / min(whole) - 1
            with open(arguments.choices, "a") as choices:
                choices.write(
                    f"| {layout.name} | {mix} | {auto[0]}, {auto[1]} | {times[auto]:.2f} |"
                    f" {best[0]}, {best[1]} | {times[best]:.2f} | {times[auto] / times[best]:.2f} |"
                    f" {100 * spread:.0f} % |\n"
                )
    dist.destroy_process_group()


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, fewer settings and runs")
    parser.add_argument("--layouts", type=int, nargs="+", default=range(len(LAYOUTS)))
    parser.add_argument("--mixes", type=int, default=2, help="of each layout")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--chunk-sizes", type=int, nargs="+")
    parser.add_argument("--k", type=int, nargs="+")
    parser.add_argument("--sequences", type=int, help="of a step, but for the mix of agents")
    parser.add_argument("--longest", type=int, help="tokens: longer sequences are cut to this")
    parser.add_argument("--scale", type=int, help="sequences of agents are so many times shorter")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    quick = {"dim": 256, "layers": 4, "vocab": 2048, "chunk_sizes": [256, 512, 1024], "k": [1, 2]}
    quick |= {"sequences": 4, "longest": 2048, "scale": 32, "runs": 6}
    whole = {
        "dim": 512,
        "layers": 6,
        "vocab": 4096,
        "chunk_sizes": [512, 1024, 2048, 4096],
        "k": [1, 2, 4, 8],
    }
    whole |= {"sequences": 16, "longest": 8192, "scale": 16, "runs": 3}
    arguments = parse_args(parser)
    for name, value in (quick if arguments.quick else whole).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    heads = "layout", "mix", "chunk_size", "k", "s predicted", "s measured", "ratio", "MiB predicted"
    print(heading(*heads, "MiB measured", "ratio"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments.choices = Path(folder) / "choices"
        for number in arguments.layouts:
            arguments.layout = number
            start(measure_layout, LAYOUTS[number].processes, arguments)
        heads = "chosen: chunk_size, k", "its s", "measured best", "its s", "ratio", "spread of the best"
        print(f"\n{heading('layout', 'mix', *heads)}\n{arguments.choices.read_text()}", end="")


def heading(*names: str) -> str:
    return f"| {' | '.join(names)} |\n|{'---|' * 2}{'--:|' * (len(names) - 2)}"


if __name__ == "__main__":
    main()
