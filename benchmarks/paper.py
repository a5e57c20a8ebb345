"""The paper's comparison by simulation: steps of whole sequences as Megatron-LM runs them, the paper's chunks
and schedule, and ours, on the paper's models, layouts and contexts. No GPU.

    python benchmarks/paper.py                       # the table, and what each part of a step costs
    python benchmarks/paper.py --replicas 8          # the same with data parallelism, and shared sequences
    python benchmarks/paper.py --sensitivity         # the speedup under other assumptions
    python benchmarks/paper.py --picture docs/pictures/paper.svg

docs/paper.md says what is assumed and why, and what follows. A group of tensor-parallel GPUs, which this
project does not have, counts as one device that computes that many times as fast, with so much more memory,
and pays for its collectives. Seconds are means over batches of 256 sequences of LMSys-Chat-1M's lengths, cut
to the context; each is a sum of parts: useful work; small micro-batches (weights read, and kernels launched,
for few tokens); forward run again; waiting in the pipeline; waiting for the slowest replica.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.planning.balance import split_layers
from chunkflow.planning.chunks import Group, build_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.memory import Layout, StageSizes, peak_parts
from chunkflow.planning.pipeline_schedule import Costs, Schedule, paper_schedule
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import Action, Kind
from chunkflow.planning.simulate import in_given_order, simulate
from models import qwen2

BATCH, K_TOKENS = 256, 32 * 1024  # sequences a step; chunk_size x k at most, as in the paper's table 6


class Device(NamedTuple):
    """What one GPU reaches, not its peak: FLOP/s of large matrix products, of attention forward and backward;
    bytes/s of memory, to the others of a tensor-parallel group, to another replica; seconds a kernel."""

    products: float
    attention: float
    attention_backward: float
    memory: float
    link: float
    network: float
    launch: float


DEVICES = {
    "A100": Device(220e12, 200e12, 180e12, 1.7e12, 230e9, 20e9, 10e-6),
    "H100": Device(620e12, 400e12, 350e12, 2.8e12, 350e9, 40e9, 10e-6),
}
KERNELS = 30  # of a layer's forward, collectives included; its backward has twice as many
GRID = [(size, k) for size in (2048, 4096, 8192, 16384, 32768) for k in (1, 2, 4, 8, 16)]


class Setup(NamedTuple):
    """A row of the paper's table: Qwen2.5 of this size, context (tokens), degrees, and whether whole
    sequences are recomputed layer by layer ("full") or in attention only ("selective")."""

    model: str
    context: int
    tensor: int
    stages: int
    full: bool

    def __str__(self) -> str:
        return f"{self.model:>3} {self.context // 1024:>4}K <{self.tensor},{self.tensor},{self.stages}>"


SETUPS = [
    *(Setup("7B", 32768, 4, 1, False), Setup("7B", 262_144, 4, 4, True)),
    *(Setup("14B", 32768, 4, 4, False), Setup("14B", 262_144, 4, 4, True)),
    *(Setup("32B", 32768, 4, 4, False), Setup("32B", 262_144, 4, 4, True)),
    *(Setup("72B", 32768, 8, 4, False), Setup("72B", 262_144, 8, 4, False)),
]


class Parts(NamedTuple):
    """Seconds of a step, the mean over its devices; they add up to the step."""

    work: float = 0.0
    small: float = 0.0
    again: float = 0.0
    pipeline: float = 0.0
    replicas: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self)


NAMES = ("useful work", "small micro-batches", "forward again", "pipeline", "other replicas")


def mean(rows: Sequence[Parts]) -> Parts:
    return Parts(*map(statistics.mean, zip(*rows)))


class System:
    """Whole sequences, the paper's chunks, or ours, in one setup on one kind of device."""

    def __init__(self, kind: str, setup: Setup, device: Device, chunk_size: int = 0, k: int = 1):
        self.kind, self.setup, self.device, self.chunk_size, self.k = kind, setup, device, chunk_size, k
        args = self.args = qwen2.flavors[setup.model]
        layers = [args.n_layers // setup.stages] * setup.stages
        if kind.startswith("ours"):  # the head counts: the last stage has fewer layers
            layer, head = Cost.of_layers(args, 1, head=False), Cost.of_layers(args, 0, head=True)
            layers = split_layers(args.n_layers, head.per_token / layer.per_token, setup.stages)
        self.layers = layers
        last = setup.stages - 1
        self.stages = [Cost.of_layers(args, count, stage == last) for stage, count in enumerate(layers)]

    # ---- time

    def action(self, stage: int, tokens: float, pairs: float, backward: bool, head: bool = True):
        """Seconds of a forward or backward, and how many of them are its arithmetic and collectives."""
        device, tensor, layers = self.device, self.setup.tensor, self.layers[stage]
        cost = self.stages[stage] if head else Cost.of_layers(self.args, layers, head=False)
        attention = 2.5 / device.attention_backward if backward else 1 / device.attention
        work = tokens * cost.per_token * (1 + backward) / device.products
        work = (work + pairs * cost.per_pair * attention) / tensor
        # Forward gathers and scatters hidden states twice a layer; backward gathers inputs once more.
        passed = (6 if backward else 4) * (tensor - 1) / tensor * tokens * self.args.dim * 2
        work += layers * passed / device.link
        # Weights are read, in backward also their fp32 gradients, which are written: 2 and 10 bytes each.
        weights = cost.per_token / 2 / tensor * (10 if backward else 2) / device.memory
        return max(work + weights, layers * KERNELS * (1 + backward) * device.launch), work

    def costs(self, groups: list[Group]) -> tuple[Costs, Costs, Costs]:
        """Of each stage, group and chunk: whole actions; their useful work; of backwards, what is forward
        again (in the third's `backward`)."""
        recompute = "" if self.kind.startswith("ours") else "attention"
        if self.kind == "whole" and self.setup.full:
            recompute = "layers"

        @cache
        def figures(stage: int, tokens: float, pairs: float) -> tuple[float, ...]:
            forward, work = self.action(stage, tokens, pairs, backward=False)
            backward, work_back = self.action(stage, tokens, pairs, backward=True)
            again = 0.0
            if recompute == "layers":
                again = self.action(stage, tokens, pairs, backward=False, head=False)[0]
            elif recompute == "attention":
                again = pairs * self.stages[stage].per_pair / self.device.attention / self.setup.tensor
            return forward, work, backward + again, work_back, again

        def shared(group: Group, chunk: int) -> float:  # K/V of other replicas: gathered, gradients returned
            if group.spread is None:
                return 0.0
            each = 4 * self.args.n_kv_heads * self.args.head_dim / self.setup.tensor
            return group.spread.ends[chunk] * each / self.device.network

        everything = [[], [], [], [], []]
        for stage, layers in enumerate(self.layers):
            rows = [
                [
                    (figures(stage, *tokens_and_pairs(group, chunk)), layers * shared(group, chunk))
                    for chunk in range(len(group.chunks))
                ]
                for group in groups
            ]
            for index, traffic in enumerate((1, 0, 4, 0, 0)):
                everything[index].append([[f[index] + traffic * s for f, s in row] for row in rows])
        forward, work, backward, work_back, again = everything
        return Costs(forward, backward), Costs(work, work_back), Costs(again, again)

    # ---- plan

    def plans(self, lengths: list[int], replicas: int) -> list[tuple[list[Group], Schedule]]:
        """Of each replica its groups, and what each of its pipeline ranks runs."""
        stages = self.setup.stages
        if self.kind.startswith("ours"):
            settings = PlanSettings(
                Cost.of_model(self.args), replicas=replicas, chunk_size=self.chunk_size, k=self.k,
                stages=tuple(self.stages), pipeline_ranks=stages,
                spread_over=replicas if self.kind == "ours, shared" else 1,
            )  # fmt: skip
            plan = plan_step(lengths, settings)
            actions = [
                [[entry for entry in program if isinstance(entry, Action)] for program in plan.programs[own]]
                for own in range(replicas)
            ]
            return [*zip(plan.groups, actions)]
        found = []
        for own in range(replicas):  # as a distributed sampler deals sequences out
            dealt = list(range(own, len(lengths), replicas))
            groups = whole_sequences(lengths, dealt)
            if self.kind == "paper":
                groups = in_given_order(build_groups(lengths, self.chunk_size, False, dealt))
            found.append((groups, paper_schedule(self.costs(groups)[0], self.k, stages)))
        return found

    def step(self, lengths: list[int], replicas: int = 1) -> Parts:
        rows = []
        for groups, schedule in self.plans(lengths, replicas):
            costs, work, again = self.costs(groups)
            real = [[action for action in actions if action.group >= 0] for actions in schedule]
            run = simulate(real, costs, [group.tokens for group in groups])
            sums = [0.0, 0.0, 0.0]
            for kind, group, chunk, stage in (timed.action for rank in run.timeline for timed in rank):
                time = (costs.backward if kind is Kind.BACKWARD else costs.forward)[stage][group][chunk]
                useful = (work.backward if kind is Kind.BACKWARD else work.forward)[stage][group][chunk]
                twice = again.backward[stage][group][chunk] if kind is Kind.BACKWARD else 0.0
                if kind is Kind.RECOMPUTE:
                    useful, twice = 0.0, time
                for index, amount in enumerate((useful, time - useful - twice, twice)):
                    sums[index] += amount / len(real)
            rows.append((run.makespan, Parts(*sums, run.makespan - sum(sums))))
        slowest = max(makespan for makespan, _ in rows)
        return mean([parts._replace(replicas=slowest - makespan) for makespan, parts in rows])

    # ---- memory

    def peak_gib(self, lengths: list[int]) -> float:
        """Of one GPU on the fullest stage, by this project's accounting, on one replica."""
        full = self.kind == "whole" and self.setup.full
        layout = Layout(checkpoint_every=int(full), sends_in_flight=4 if self.setup.stages > 1 else 0)
        shapes, first, peaks = shapes_of(self.setup.model), 0, []
        ((groups, schedule),) = self.plans(lengths, 1)
        for stage, count in enumerate(self.layers):
            own, ends = range(first, first + count), []
            first += count
            ends += ["tok_embeddings.weight"] if stage == 0 else []
            ends += ["norm.weight", "output.weight"] if stage == self.setup.stages - 1 else []
            mine = {name: shape for name, shape in shapes.items() if name in ends or layer_of(name) in own}
            sizes = {stage: StageSizes(self.args, mine, layout)}
            real = [action for action in schedule[stage] if action.group >= 0]
            peaks.append(sum(peak_parts(sizes, groups, real).values()))
        return max(peaks) / self.setup.tensor / 2**30


def layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else -1


@cache
def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        transformer = qwen2.Transformer(qwen2.flavors[model])
    return {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}


def tokens_and_pairs(group: Group, index: int) -> tuple[float, float]:
    """Tokens of a chunk, and pairs of a query and a key that attend; of a shared one, a replica's part."""
    if group.spread is None:
        chunk = group.chunks[index]
        return chunk.tokens, sum(s.length * (s.start + (s.length + 1) / 2) for s in chunk.segments)
    start, replicas = group.spread.start(index), len(group.spread.replicas)
    tokens = group.spread.ends[index] - start
    return tokens / replicas, tokens * (start + (tokens + 1) / 2) / replicas
