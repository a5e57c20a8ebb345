"""How even data-parallel ranks are: balanced chunks against the usual "same number of sequences a rank", and
long sequences shared by several ranks (parallelism.context_parallel_degree) against whole ones.

    python benchmarks/data_parallel.py             # simulated: balance, padding, template overhead on 8 to
    512 ranks; and how long a plan takes
    python benchmarks/data_parallel.py --measure   # step time on 2 gloo processes; with a long sequence, and
    memory, on 4

Simulated with the costs of Qwen2.5-7B. Balance is slowest rank / mean: its mean, and the worst of all steps.
"Priced" counts the traffic of K and V that sharing adds, as the planner does; "work" does not; "against not
shared" is the slowest rank, priced, over the mean where no sequence is shared: it may be below 1, since a
shared sequence has fewer chunks, and fewer of them are recomputed. "Bound" is what the costliest sequence
alone forces where none is shared. "Always" is the overhead, in slots, of the one template that ZeRO-3 ranks
run in lockstep. Padding is room in chunks that no token takes; nothing is computed for it.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import socket
import statistics
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from result_files import new_parser, parse_args
from step import CPU, make_model, tensors

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.execution.runner import Runner, StepResult
from chunkflow.execution.stage import WholeModel
from chunkflow.planning.balance import Price, flops
from chunkflow.planning.chunks import build_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import Plan, PlanSettings, plan_step
from chunkflow.planning.schedule import DUMMY, Action, Kind, linear_schedule
from chunkflow.reporting.device import peak_memory, reset_peak_memory
from chunkflow.settings.options import Config
from chunkflow.training import parallel

QWEN_7B = SimpleNamespace(
    dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, hidden_dim=18944, vocab_size=152064
)
MIB = 2**20
# Narrow and deep, so that K/V are most of what a long sequence holds, as in large models.
DEEP = {"dim": 128, "n_layers": 8, "n_heads": 2, "n_kv_heads": 2, "hidden_dim": 344}


class Row(NamedTuple):
    mix: str
    batch: int  # sequences
    ranks: int
    chunk_size: int = 2048

    def __str__(self) -> str:
        return f"{self.mix:11} {self.batch:5} {self.ranks:6} {self.chunk_size:6} |"


SHORT = [(256, 8), (256, 16), (256, 64), (2048, 512), (512, 512, 1024)]  # at least 4 a rank, then one a rank
ROWS = [Row(mix, *sizes) for mix in ("lmsys", "llama3_sft") for sizes in SHORT]
ROWS += [Row("agent", 2 * ranks, ranks, 8192) for ranks in (8, 16, 64, 512)]
TITLES = "mix         batch  ranks  chunk |"


def same_count(lengths: list[int], ranks: int) -> list[list[int]]:
    """Sequences of each rank as a distributed sampler deals them out."""
    return [list(range(rank, len(lengths), ranks)) for rank in range(ranks)]


def slowest_over_mean(loads: list[float]) -> float:
    return max(loads) * len(loads) / sum(loads)


def loads_of_ranks(lengths: list[int], plan: Plan, price: Price) -> list[float]:
    loads = []
    for groups in plan.groups:
        sharing = {
            segment.sequence: group.replicas
            for group in groups
            for chunk in group.chunks
            for segment in chunk.segments
        }
        loads.append(sum(price(lengths[index], ranks) for index, ranks in sharing.items()))
    return loads


def figures_of_step(row: Row, lengths: list[int], cost: Cost) -> dict[str, float]:
    # Lockstep changes nothing but the order of actions.
    settings = PlanSettings(cost, replicas=row.ranks, chunk_size=row.chunk_size, lockstep=True)
    whole = plan_step(lengths, settings, [])
    shared = plan_step(lengths, settings._replace(spread_over=row.ranks), [])

    def work(length: int, ranks: int) -> float:  # an equal part, in chunks that many times as long
        return cost.chunked_training(length, row.chunk_size * ranks, 1) / ranks

    costs = [work(length, 1) for length in lengths]
    mean = sum(costs) / row.ranks
    usual = same_count(lengths, row.ranks)
    chunks = sum(len(g.chunks) for own in usual for g in build_groups(lengths, row.chunk_size, sequences=own))
    return {
        "whole": 1 + whole.imbalance_percent / 100,
        "priced": 1 + shared.imbalance_percent / 100,
        "work": slowest_over_mean(loads_of_ranks(lengths, shared, work)),
        "against whole": max(loads_of_ranks(lengths, shared, flops(cost, row.chunk_size, lambda *group: 1)))
        / mean,
        "padding": shared.padding_percent,
        "shared": shared.spread_sequences,
        "most ranks": shared.most_ranks_of_a_sequence,
        "usual": slowest_over_mean([sum(costs[index] for index in own) for own in usual]),
        "usual padding": 100 * (1 - sum(lengths) / (chunks * row.chunk_size)),
        "whole padding": whole.padding_percent,
        "bound": max(1, max(costs) / mean),
        "always": whole.template_overhead_percent,
        "always, shared": shared.template_overhead_percent,
    }


def simulate(steps: int) -> None:
    cost, second_table = Cost.of_model(QWEN_7B), []
    print(f"Slowest rank / mean (mean and worst of {steps} steps), k = 1")
    print(f"{'':33}|   not shared  |  shared: priced          work     against | padding  shared  most ranks")
    print(f"{TITLES}   mean  worst |   mean  worst    mean  worst   not shared |          a step  of one")
    for row in ROWS:
        everything, figures = synthetic_lengths(row.mix, row.batch * steps, 0), defaultdict(list)
        for start in range(0, len(everything), row.batch):
            step = figures_of_step(row, everything[start : start + row.batch], cost)
            for name, value in step.items():
                figures[name].append(value)
        mean = {name: statistics.mean(values) for name, values in figures.items()}
        worst = {name: max(values) for name, values in figures.items()}
        print(
            f"{row} {mean['whole']:6.3f} {worst['whole']:6.2f} | {mean['priced']:6.3f} {worst['priced']:6.3f}"
            f"  {mean['work']:6.3f} {worst['work']:6.3f} {mean['against whole']:12.3f} |"
            f" {mean['padding']:5.1f} % {mean['shared']:7.1f} {worst['most ranks']:7}",
            flush=True,
        )
        second_table.append(
            f"{row} {mean['usual']:6.3f} {worst['usual']:6.2f} {mean['usual padding']:6.1f} % |"
            f" {mean['whole']:6.3f} {worst['whole']:6.2f} ({mean['bound']:6.3f})"
            f" {mean['whole padding']:5.1f} % | {mean['always']:7.1f} % {mean['always, shared']:7.1f} %"
        )
    print("\nThe same number of sequences a rank, against balanced ones; the template of ZeRO-3")
    print(f"{'':33}|      same count        |       balanced, not shared      | always: not shared, shared")
    print(f"{TITLES}   mean  worst  padding |   mean  worst  (bound)  padding |")
    print("\n".join(second_table))
    lengths = synthetic_lengths("lmsys", 4096, 0)
    settings, seconds = PlanSettings(cost, replicas=64, spread_over=64), []
    for _ in range(5):
        start = time.perf_counter()
        plan = plan_step(lengths, settings, [0])
        seconds.append(time.perf_counter() - start)
    print(
        f"\nThe plan of {len(lengths)} sequences (lmsys) on 64 ranks, {plan.spread_sequences} of them shared:"
        f" {1000 * min(seconds):.1f} ms (best of 5)"
    )


class Figures(NamedTuple):
    """Of a step, on one rank."""

    seconds: float
    cpu_seconds: float
    peak_mib: float  # above what the process held before
    state_mib: float


class Ranks(NamedTuple):
    """What a measuring process has: its place, and a model and a runner for each reshard mode."""

    processes: parallel.Processes
    models: dict[bool, torch.nn.Module]
    runners: dict[bool, Runner]
    cost: Cost

    @classmethod
    def join(cls, rank: int, count: int, port: int, **sizes: int) -> Ranks:
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port)
        )
        config = Config()
        config.training.mixed_precision_param = "float32"
        processes = parallel.init_processes(config.comm, config.parallelism)
        models, runners = {}, {}
        for reshard in (False, True):
            models[reshard] = model = make_model("float32", **sizes)
            parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard)
            stages = [WholeModel(model, parallel.before_last_backward)]
            runners[reshard] = Runner(stages, processes.device, blocks=processes.blocks)
        return cls(processes, models, runners, Cost.of_model(models[False].args))

    def step(self, reshard: bool, groups, actions, targets: int) -> tuple[float, StepResult]:
        """Seconds that a step takes, from when all ranks begin to when all have ended; and its result."""
        model, data = self.models[reshard], tensors(groups, 2048)
        model.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        parallel.begin_step(model, reshard)
        result = self.runners[reshard].step(actions, groups, data, targets)
        dist.barrier()
        return time.perf_counter() - start, result


def measure_balance(rank: int, port: int, arguments: argparse.Namespace) -> None:
    """Steps of 2 processes with the same number of sequences each, and balanced."""
    ranks = Ranks.join(rank, 2, port)
    ways = ["same count", "balanced, never", "balanced, always"]
    seconds = {way: [] for way in ways}
    lengths_of_all = synthetic_lengths("lmsys", arguments.sequences * (arguments.runs + 1), 0)
    for run in range(arguments.runs + 1):
        lengths = [
            min(x, arguments.longest)
            for x in lengths_of_all[run * arguments.sequences : (run + 1) * arguments.sequences]
        ]
        for way in ways:
            reshard = way.endswith("always")
            if way == "same count":
                groups = build_groups(lengths, 1024, sequences=same_count(lengths, 2)[rank])
                actions = linear_schedule([len(g.chunks) for g in groups], 1)
                actions = actions or [Action(Kind.FORWARD, DUMMY, 0), Action(Kind.BACKWARD, DUMMY, 0)]
            else:
                settings = PlanSettings(ranks.cost, replicas=2, chunk_size=1024, lockstep=reshard)
                plan = plan_step(lengths, settings, [rank])
                groups, (actions,) = plan.groups[rank], plan.programs[rank]
            taken, _ = ranks.step(reshard, groups, actions, sum(lengths))
            if run:  # the first round warms up
                seconds[way].append(taken)
    if rank == 0:
        print(
            f"{arguments.runs} steps of {arguments.sequences} sequences (lmsys), chunks of 1024, 2 processes"
            " of one thread, no sequence shared:"
        )
        for way in ways:
            total = sum(seconds[way])
            print(
                f"{way:18}: {total:7.2f} s in all, {sum(seconds['same count']) / total:.2f} x as fast as the"
                " same count"
            )
    dist.destroy_process_group()


def measure_sharing(rank: int, port: int, arguments: argparse.Namespace) -> None:
    """Steps of 4 processes with one long sequence, trained by one of them and shared by all."""
    give_back()
    ranks = Ranks.join(rank, 4, port, **DEEP)
    short = [min(length, 1024) for length in synthetic_lengths("lmsys", arguments.sequences - 1, 0)]
    lengths = [arguments.long, *short]
    plans = {}
    for reshard in (False, True):
        for degree, most in ((1, 1), (-1, 4)):
            settings = PlanSettings(ranks.cost, 4, chunk_size=1024, lockstep=reshard, spread_over=most)
            plans[reshard, degree] = plan_step(lengths, settings, [rank])
    figures = defaultdict(list)  # way -> step -> rank -> its figures
    for run in range(arguments.runs + 1):
        for way, plan in plans.items():
            reset_peak_memory(CPU)
            before, cpu_before = peak_memory(CPU).active_gib, time.process_time()
            (actions,) = plan.programs[rank]
            seconds, result = ranks.step(way[0], plan.groups[rank], actions, sum(lengths))
            peak = 1024 * (peak_memory(CPU).active_gib - before)
            own = Figures(seconds, time.process_time() - cpu_before, peak, result.state_bytes / MIB)
            of_ranks = [None] * 4
            dist.all_gather_object(of_ranks, own)
            if run:  # the first round warms up
                figures[way].append(of_ranks)
    if rank == 0:
        print(
            f"\nSteps of a sequence of {arguments.long:,} tokens and {len(short)} of {sum(short):,} in all,"
            f" chunks of 1024, k = 1; medians of {arguments.runs}.\n4 processes of one thread share"
            f" {os.cpu_count()} cores; on more, a step takes at least the busiest rank's CPU seconds."
        )
        print(f"{'':41}seconds   CPU seconds of | MiB by rank: most in a step,")
        print(
            "reshard  context_parallel_degree  ranks |  a step the busiest rank | above what was held before "
            " | K/V and gradients"
        )
        for (reshard, degree), steps in figures.items():
            columns = [Figures(*zip(*of_ranks)) for of_ranks in steps]
            seconds = statistics.median(max(step.seconds) for step in columns)
            busiest = statistics.median(max(step.cpu_seconds) for step in columns)
            peaks = [statistics.median(values) for values in zip(*(step.peak_mib for step in columns))]
            states = [statistics.median(values) for values in zip(*(step.state_mib for step in columns))]
            print(
                f"{'always' if reshard else 'never':7} {degree:12}"
                f" {plans[reshard, degree].most_ranks_of_a_sequence:18} | {seconds:7.2f} {busiest:16.2f} |"
                f" {' '.join(f'{value:6.0f}' for value in peaks)} | "
                + " ".join(f"{value:5.0f}" for value in states)
            )
    dist.destroy_process_group()


def give_back() -> None:
    """From now on larger tensors go back to the system when they are freed: else glibc keeps most, and counts
    as peak."""
    ctypes.CDLL(None).mallopt(-3, 131072)  # M_MMAP_THRESHOLD


def start(measure, count: int, arguments: argparse.Namespace) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # Forks of a process that has imported torch and done nothing else: each would take seconds for it.
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.pipelining"])
    torch.multiprocessing.start_processes(
        measure, args=(port, arguments), nprocs=count, start_method="forkserver"
    )


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--longest", type=int, default=16384, help="2 processes: longer ones are cut to this")
    parser.add_argument("--long", type=int, default=8192, help="4 processes: tokens of the long sequence")
    parser.add_argument("--runs", type=int, default=8)
    arguments = parse_args(parser)
    if arguments.measure:
        start(measure_balance, 2, arguments)
        start(measure_sharing, 4, arguments)
    else:
        simulate(arguments.steps)


if __name__ == "__main__":
    main()
