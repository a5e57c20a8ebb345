"""How even data-parallel ranks are: balanced chunks against the usual "same number of sequences a rank".

    python benchmarks/data_parallel.py             # simulated: imbalance, padding, template overhead on 8 to
    512 ranks python benchmarks/data_parallel.py --measure   # step time on 2 gloo processes

Simulated with the costs of Qwen2.5-7B, means over steps. Imbalance is slowest rank / mean - 1; "bound" is
what the costliest sequence alone forces. "Always" is the overhead, in slots, of the one template that ZeRO-3
ranks run in lockstep.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing
from step import make_model, tensors

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.execution.runner import Runner
from chunkflow.execution.stage import WholeModel
from chunkflow.planning.chunks import build_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import DUMMY, Action, Kind, linear_schedule
from chunkflow.settings.options import Config
from chunkflow.training import parallel

QWEN_7B = SimpleNamespace(
    dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, hidden_dim=18944, vocab_size=152064
)
CHUNK_SIZE = 2048


def same_count(lengths: list[int], ranks: int) -> list[list[int]]:
    """Sequences of each rank as a distributed sampler deals them out."""
    return [list(range(rank, len(lengths), ranks)) for rank in range(ranks)]


def simulate(steps: int) -> None:
    cost = Cost.of_model(QWEN_7B)
    print(
        "mix         batch  ranks | same count: imbalance  padding | balanced: imbalance  padding  (bound) "
        " always | planned in"
    )
    for mix in ("lmsys", "llama3_sft"):
        for batch, ranks in ((256, 8), (256, 64), (256, 512), (4096, 64), (4096, 512)):
            columns = [[] for _ in range(7)]
            everything = synthetic_lengths(mix, batch * steps, 0)
            for start in range(0, len(everything), batch):
                lengths = everything[start : start + batch]
                costs = [cost.chunked_training(length, CHUNK_SIZE, 1) for length in lengths]
                mean = sum(costs) / ranks
                usual = same_count(lengths, ranks)
                chunks = sum(
                    len(g.chunks) for own in usual for g in build_groups(lengths, CHUNK_SIZE, sequences=own)
                )
                begin = time.perf_counter()
                settings = PlanSettings(cost, replicas=ranks, chunk_size=CHUNK_SIZE)
                plan = plan_step(lengths, settings, [0])
                seconds = time.perf_counter() - begin
                lock = plan_step(lengths, settings._replace(lockstep=True), [0])
                row = (
                    100 * (max(sum(costs[i] for i in own) for own in usual) / mean - 1),
                    100 * (1 - sum(lengths) / (chunks * CHUNK_SIZE)),
                    plan.imbalance_percent,
                    plan.padding_percent,
                    100 * (max(1, max(costs) / mean) - 1),
                    lock.template_overhead_percent,
                    1000 * seconds,
                )
                for column, value in zip(columns, row):
                    column.append(value)
            a, b, c, d, e, f, g = map(statistics.mean, columns)
            print(
                f"{mix:11} {batch:5} {ranks:6} | {a:20.1f} % {b:7.1f} % | {c:17.1f} % {d:7.1f} % ({e:6.1f} %)"
                f" {f:5.1f} % | {g:6.1f} ms"
            )


def measure(rank: int, port: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    config = Config()
    config.training.mixed_precision_param = "float32"
    processes = parallel.init_processes(config.comm, config.parallelism)
    ways = ["same count", "balanced, never", "balanced, always"]
    models, runners = {}, {}
    for reshard in (False, True):
        models[reshard] = model = make_model("float32")
        parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard)
        runners[reshard] = Runner([WholeModel(model, parallel.before_last_backward)], processes.device)
    cost = Cost.of_model(models[False].args)
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
                settings = PlanSettings(cost, replicas=2, chunk_size=1024, lockstep=reshard)
                plan = plan_step(lengths, settings, [rank])
                groups, (actions,) = plan.groups[rank], plan.programs[rank]
            model, data = models[reshard], tensors(groups, 2048)
            dist.barrier()
            start = time.perf_counter()
            parallel.begin_step(model, reshard)
            model.zero_grad()
            runners[reshard].step(actions, groups, data, sum(lengths))
            dist.barrier()
            if run:
                seconds[way].append(time.perf_counter() - start)
    if rank == 0:
        print(
            f"{arguments.runs} steps of {arguments.sequences} sequences (lmsys), chunks of 1024, 2 processes"
            " of one thread:"
        )
        for way in ways:
            total = sum(seconds[way])
            print(
                f"{way:18}: {total:7.2f} s in all, {sum(seconds['same count']) / total:.2f} x as fast as the"
                " same count"
            )
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--longest", type=int, default=16384, help="measured: longer ones are cut to this")
    parser.add_argument("--runs", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.measure:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(measure, args=(port, arguments), nprocs=2)
    else:
        simulate(arguments.steps)


if __name__ == "__main__":
    main()
