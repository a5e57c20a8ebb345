"""What a step costs in the setups of the paper, from rates of a device: whole sequences as Megatron-LM runs
them, the paper's chunks and schedule, and ours. benchmarks/paper.py prints it; docs/paper.md has the reasons.

A group of tensor-parallel GPUs counts as one device that computes that many times as fast, with so much more
memory, and pays for its collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from chunkflow.planning.balance import split_layers
from chunkflow.planning.chunks import Group, build_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.memory import Layout, StageSizes, peak_parts
from chunkflow.planning.pipeline_schedule import Costs, Schedule, paper_schedule
from chunkflow.planning.planner import PlanSettings, plan_step, tokens_and_pairs
from chunkflow.planning.schedule import DUMMY, Action, Kind
from chunkflow.planning.simulate import in_given_order, simulate
from models import qwen2


class Device(NamedTuple):
    """What one GPU reaches, not its peak: FLOP/s of large matrix products, of attention forward and backward;
    bytes/s of memory, to the others of a tensor-parallel group, to another replica; seconds a kernel."""

    products: float
    attention: float
    attention_backward: float
    memory: float
    link: float
    network: float
    launch: float = 10e-6


DEVICES = {
    "A100": Device(220e12, 200e12, 180e12, 1.7e12, 230e9, 20e9),
    "H100": Device(620e12, 400e12, 350e12, 2.8e12, 350e9, 40e9),
}
KERNELS = 30  # of a layer's forward, collectives included; its backward has twice as many


class Setup(NamedTuple):
    """Qwen2.5 of a size, the context (tokens), degrees, and whether whole sequences are recomputed layer by
    layer ("full") or in attention alone ("selective")."""

    model: str
    context: int
    tensor: int
    stages: int
    full: bool

    def __str__(self) -> str:
        how = "full" if self.full else "selective"
        return f"{self.model} {self.context // 1024}K <{self.tensor},{self.tensor},{self.stages},{how}>"


SETUPS = [
    *(Setup("7B", 32_768, 4, 1, False), Setup("7B", 262_144, 4, 4, True)),
    *(Setup("14B", 32_768, 4, 4, False), Setup("14B", 262_144, 4, 4, True)),
    *(Setup("32B", 32_768, 4, 4, False), Setup("32B", 262_144, 4, 4, True)),
    *(Setup("72B", 32_768, 8, 4, False), Setup("72B", 262_144, 8, 4, True)),
]


class Parts(NamedTuple):
    """Seconds of a step, the mean over its devices; they add up to the step."""

    work: float
    small: float
    again: float
    pipeline: float
    replicas: float


NAMES = Parts("useful work", "small micro-batches", "forward again", "pipeline waits", "other replicas")


def weighed(rows: Sequence[Parts], weights: Sequence[float]) -> Parts:
    return Parts(*(sum(w * x for w, x in zip(weights, column)) / sum(weights) for column in zip(*rows)))


class System:
    """One way to train, in one setup on one kind of device: "whole" sequences, the "paper"'s chunks, or
    "ours" ("shared": long sequences over several replicas)."""

    def __init__(self, kind: str, setup: Setup, device: Device, chunk_size: int = 0, k: int = 1):
        self.kind, self.setup, self.device, self.chunk_size, self.k = kind, setup, device, chunk_size, k
        self.ours = kind in ("ours", "shared")
        args = self.args = qwen2.flavors[setup.model]
        self.layers = [args.n_layers // setup.stages] * setup.stages
        if self.ours:  # the head counts: the last stage has fewer layers
            layer, head = Cost.of_layers(args, 1, head=False), Cost.of_layers(args, 0, head=True)
            self.layers = split_layers(args.n_layers, head.per_token / layer.per_token, setup.stages)
        ends = [False] * (setup.stages - 1) + [True]
        self.stages = [Cost.of_layers(args, layers, head) for layers, head in zip(self.layers, ends)]
        self.no_head = [Cost.of_layers(args, layers, head=False) for layers in self.layers]
        self.figures = cache(self._figures)

    # ---- time

    def _action(self, stage: int, tokens: float, pairs: float, backward: bool, cost: Cost):
        """Seconds of a forward or backward, and how many of them are its arithmetic and collectives."""
        device, tensor, layers = self.device, self.setup.tensor, self.layers[stage]
        attention = 2.5 / device.attention_backward if backward else 1 / device.attention
        work = tokens * cost.per_token * (1 + backward) / device.products
        work = (work + pairs * cost.per_pair * attention) / tensor
        # Forward gathers and scatters hidden states twice a layer; backward gathers two inputs once more.
        passed = (6 if backward else 4) * (tensor - 1) / tensor * tokens * self.args.dim * 2
        work += layers * passed / device.link
        # Weights are read; in backward their fp32 gradients are read and written too: 2 and 10 bytes each.
        weights = cost.per_token / 2 / tensor * (10 if backward else 2) / device.memory
        return max(work + weights, layers * KERNELS * (1 + backward) * device.launch), work

    def _figures(self, stage: int, tokens: float, pairs: float) -> tuple[float, ...]:
        """Seconds of: forward, its useful work, backward, its useful work, what of it is forward again."""
        cost, again = self.stages[stage], 0.0
        forward, work = self._action(stage, tokens, pairs, False, cost)
        backward, work_back = self._action(stage, tokens, pairs, True, cost)
        if self.kind == "whole" and self.setup.full:
            again = self._action(stage, tokens, pairs, False, self.no_head[stage])[0]
        elif not self.ours:  # Megatron-LM's selective recomputation runs attention again
            again = pairs * cost.per_pair / self.device.attention / self.setup.tensor
        return forward, work, backward + again, work_back, again

    def _traffic(self, stage: int, group: Group, chunk: int) -> float:
        """Seconds in which K and V of a shared sequence come from other replicas."""
        if group.spread is None:
            return 0.0
        each = self.layers[stage] * 4 * self.args.n_kv_heads * self.args.head_dim / self.setup.tensor
        return group.spread.ends[chunk] * each / self.device.network

    def costs(self, groups: list[Group]) -> list:
        """`_figures` of each stage, group and chunk: [figure][stage][group][chunk]. Traffic is in forward;
        backward gathers again, and returns gradients twice as wide."""
        amounts = [[tokens_and_pairs(group, index) for index in range(len(group.chunks))] for group in groups]
        found = [[], [], [], [], []]
        for stage in range(self.setup.stages):
            rows = [[self.figures(stage, *amount) for amount in row] for row in amounts]
            for index, times in enumerate((1, 0, 4, 0, 0)):
                found[index].append([
                    [
                        figures[index] + (times and times * self._traffic(stage, group, chunk))
                        for chunk, figures in enumerate(row)
                    ]
                    for group, row in zip(groups, rows)
                ])  # fmt: skip
        return found

    # ---- plan

    def plans(self, lengths: list[int], replicas: int) -> list[tuple[list[Group], list, Schedule]]:
        """Of each replica: its groups, their `costs`, and what each of its pipeline ranks runs."""
        stages, found = self.setup.stages, []
        if self.ours:
            settings = PlanSettings(
                Cost.of_model(self.args), replicas=replicas, chunk_size=self.chunk_size, k=self.k,
                stages=tuple(self.stages), pipeline_ranks=stages,
                spread_over=replicas if self.kind == "shared" else 1,
            )  # fmt: skip
            plan = plan_step(lengths, settings)
            for groups, programs in zip(plan.groups, plan.programs.values()):
                real = [
                    [entry for entry in program if isinstance(entry, Action) and entry.group != DUMMY]
                    for program in programs
                ]
                found.append((groups, self.costs(groups), real))
            return found
        for own in range(replicas):  # as a distributed sampler deals sequences out
            dealt = list(range(own, len(lengths), replicas))
            groups = whole_sequences(lengths, dealt)
            if self.kind == "paper":
                groups = in_given_order(build_groups(lengths, self.chunk_size, False, dealt))
            costs = self.costs(groups)
            found.append((groups, costs, paper_schedule(Costs(costs[0], costs[2]), self.k, stages)))
        return found

    def step(self, lengths: list[int], replicas: int = 1) -> Parts:
        rows = []
        for groups, (forward, work, backward, work_back, again), schedule in self.plans(lengths, replicas):
            run = simulate(schedule, Costs(forward, backward), [group.tokens for group in groups])
            useful = twice = busy = 0.0
            for (kind, group, chunk, stage), start, end in (timed for rank in run.timeline for timed in rank):
                busy += end - start
                if kind is Kind.RECOMPUTE:
                    twice += end - start
                elif kind is Kind.BACKWARD:
                    useful += work_back[stage][group][chunk]
                    twice += again[stage][group][chunk]
                else:
                    useful += work[stage][group][chunk]
            each = [amount / len(schedule) for amount in (useful, busy - useful - twice, twice)]
            rows.append((run.makespan, Parts(*each, max(0.0, run.makespan - sum(each)), 0.0)))
        slowest = max(makespan for makespan, _ in rows)
        waits = [parts._replace(replicas=slowest - makespan) for makespan, parts in rows]
        return weighed(waits, [1] * replicas)

    # ---- memory

    def peak_gib(self, lengths: list[int]) -> float:
        """Of a GPU of the fullest stage, by this project's accounting, with one replica."""
        full, last = self.kind == "whole" and self.setup.full, self.setup.stages - 1
        layout = Layout(checkpoint_every=int(full), sends_in_flight=4 if last else 0)
        ((groups, _, schedule),) = self.plans(lengths, 1)
        first, peaks = 0, []
        for stage, count in enumerate(self.layers):
            names = {f"layers.{layer}." for layer in range(first, first + count)}
            names |= {"tok_"} if stage == 0 else set()
            names |= {"norm.", "output."} if stage == last else set()
            own = {k: v for k, v in shapes_of(self.setup.model).items() if k.startswith(tuple(names))}
            first += count
            sizes = {stage: StageSizes(self.args, own, layout)}
            peaks.append(sum(peak_parts(sizes, groups, schedule[stage]).values()))
        return max(peaks) / self.setup.tensor / 2**30


@cache
def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        transformer = qwen2.Transformer(qwen2.flavors[model])
    return {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
