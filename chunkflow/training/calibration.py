"""The rates of this device with a config's model, measured: chunks of some lengths behind some prefixes."""

import dataclasses
import logging
import os
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from chunkflow.execution.linear import fit_linear_layers
from chunkflow.execution.loss import loss_sum
from chunkflow.execution.state import ChunkTensors, KeyValueState
from chunkflow.planning.chunks import Chunk, Group, Segment
from chunkflow.planning.cost import Cost
from chunkflow.planning.step_time import Head, Pass, Rates
from chunkflow.settings.config import Config
from chunkflow.training import build, parallel
from chunkflow.training.rates import analytic, device_of, save

logger = logging.getLogger(__name__)

LAYERS = 4  # at most, of the model that is run: its layers are all alike
CHUNKS = (16, 256, 1024, 4096)  # tokens
PREFIXES = (0, 4096, 16384)  # the last two: at most a quarter, and half, of training.seq_len
RUNS = 3  # of each chunk, whose median counts
SECONDS = 45  # after which no other chunk is begun
HEAD = 1024, 16384  # tokens and, at most, rows of the vocabulary: the whole one would take a CPU minutes
BYTES = 64 << 20  # that are moved to see how fast


class Point(NamedTuple):
    """A chunk that was run, and the seconds it took."""

    tokens: int
    prefix: int
    forward: float
    backward: float

    @property
    def pairs(self) -> float:
        """Of a query and a key."""
        return self.tokens * (self.prefix + (self.tokens + 1) / 2)


def calibrate(config: Config, spec: build.ModelSpec) -> str:
    """Measures and keeps the rates of this device; returns what it found, one line. Under torchrun all ranks
    measure what goes between them; all but rank 0 end here."""
    name = device_of(config, planned=False)
    device = torch.device("cpu")
    if name != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    rates, points = measured_rates(config, spec, device, name)
    if int(os.environ.get("RANK", 0)):
        raise SystemExit(0)
    path = save(rates, spec.name, spec.args, config.training.mixed_precision_param, name)
    products, attention = (f"{1e-12 / seconds:.3g}" if seconds else "any" for seconds in rates.forward[:2])
    between = ""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        where = "of a node" if _one_node() else "of several nodes"
        speed = rates.gather if _one_node() else rates.network
        between = f", {speed / 1e9:.3g} GB/s between ranks {where}"
    return (
        f"{name}: {products} TFLOP/s in products, {attention} in attention,"
        f" {1e6 * rates.forward.layer:.3g} us a layer{between}, from {points} chunks; kept in {path}"
    )


def measured_rates(
    config: Config, spec: build.ModelSpec, device: torch.device, name: str
) -> tuple[Rates, int]:
    """The rates of the device with this `name`, and from how many chunks. All ranks call."""
    points, layers = measure(config, spec, device)
    cost, keys = Cost.of_layers(spec.args, layers, head=False), spec.args.n_kv_heads * spec.args.head_dim
    rates = fitted(points, cost, layers, layers * 2 * keys, analytic(name))
    return rates._replace(head=_head(config, spec.args, device), **_bandwidths(config, device)), len(points)


def measure(config: Config, spec: build.ModelSpec, device: torch.device) -> tuple[list[Point], int]:
    """Points of CHUNKS behind PREFIXES, and how many layers the model had that was run. What is longer than
    training.seq_len, does not fit into memory or would begin after SECONDS is left out."""
    dtype, longest = parallel.DTYPES[config.training.mixed_precision_param], config.training.seq_len
    args = dataclasses.replace(spec.args, n_layers=min(LAYERS, spec.args.n_layers))
    build.activate_attention(config)
    with torch.device("meta"):
        model = spec.family.Transformer(args)
    model.output = None  # the head is a product like others
    model.to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    recomputing = config.activation_checkpoint
    if recomputing.mode == "selective" and recomputing.selective_ac_option == "op":
        parallel.apply_activation_checkpoint(model, recomputing)
    parallel.apply_compile(model, config.compile)
    if device.type == "cpu" and dtype == torch.bfloat16 and not config.compile.enable:
        fit_linear_layers(model)
    points, start = [], time.perf_counter()
    prefixes = [min(prefix, longest * quarters // 4) for quarters, prefix in enumerate(PREFIXES)]
    for prefix in sorted(set(prefixes)):
        for tokens in CHUNKS:
            late = time.perf_counter() - start > SECONDS and len(points) >= 3
            if late or prefix + tokens > longest:
                continue
            try:
                points.append(_point(model, tokens, prefix, device))
            except torch.OutOfMemoryError:
                logger.info(f"{tokens:,} tokens behind {prefix:,} do not fit into memory: left out")
            model.zero_grad()
    return points, args.n_layers


def _point(model: nn.Module, tokens: int, prefix: int, device: torch.device) -> Point:
    segments = [Segment(0, 0, prefix)] * bool(prefix) + [Segment(0, prefix, tokens)]
    group = Group(tuple(Chunk((segment,)) for segment in segments))
    state = KeyValueState(group)
    chunks = [_chunk(group, index, model.args.vocab_size, device) for index in range(len(segments))]
    for chunk in chunks:
        chunk.state = state if prefix else None
    if prefix:
        with torch.no_grad():
            model(chunks[0].tokens, chunks[0])
    chunk, times, others = chunks[-1], [], _others(device)
    for _ in range(RUNS + 1):
        if prefix:
            chunk.state = KeyValueState(group)  # whose backward has not run
            chunk.state.buffers = state.buffers
        others.add_(1)
        marks = [_busy(device)]
        hidden_TC = model(chunk.tokens, chunk)
        marks.append(_busy(device))
        hidden_TC.backward(torch.ones_like(hidden_TC))
        marks.append(_busy(device))
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return Point(tokens, prefix, *map(statistics.median, zip(*times[1:])))


def _head(config: Config, args: Any, device: torch.device) -> Head:
    """Of the model's head, the loss alone and with its gradients."""
    dtype = parallel.DTYPES[config.training.mixed_precision_param]
    tokens, rows = HEAD[0], min(HEAD[1], args.vocab_size)
    chunk = _chunk(Group((Chunk((Segment(0, 0, tokens),)),)), 0, rows, device)
    shapes = (tokens, args.dim), (rows, args.dim)
    hidden_TC, weight_VC = (torch.full(shape, 0.02, dtype=dtype, device=device) for shape in shapes)
    for tensor in (hidden_TC, weight_VC):
        tensor.requires_grad_()
    seconds, others = [], _others(device)
    for chunk.loss_gradient in (None, 1.0):
        times = []
        for _ in range(RUNS + 1):
            others.add_(1)
            start = _busy(device)
            loss_sum(hidden_TC, weight_VC, chunk)
            times.append(_busy(device) - start)
        seconds.append(statistics.median(times[1:]))
    return Head(*(each / (2 * tokens * rows * args.dim) for each in seconds))


def _others(device: torch.device) -> torch.Tensor:
    """To be written before what is timed: in a step the caches hold what other chunks left."""
    return torch.zeros(BYTES // 4, device=device)


def _chunk(group: Group, index: int, vocab_size: int, device: torch.device) -> ChunkTensors:
    """A chunk of a group, of any tokens."""
    (segment,) = group.chunks[index].segments
    positions = torch.arange(segment.start, segment.start + segment.length)
    ids = positions % vocab_size
    return ChunkTensors(group.chunks[index], index, ids, ids, positions).to(device)


def _one_node() -> bool:
    """Whether all ranks that torchrun has started are on this machine."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", ranks) == ranks


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _busy(device: torch.device) -> float:
    """On a CPU the time of this thread, which other processes do not prolong."""
    return time.thread_time() if device.type == "cpu" else _now(device)


def fitted(points: Sequence[Point], cost: Cost, layers: int, kv: int, rates: Rates) -> Rates:
    """`rates` with the passes that explain the points best, of a model with this cost, so many layers and
    elements of a token's K/V in all of them: least squares of relative errors, no term below 0."""
    terms = torch.tensor(
        [[cost.per_token * p.tokens, cost.per_pair * p.pairs, layers, kv * p.prefix] for p in points],
        dtype=torch.float64,
    )
    passes = {}
    for name in ("forward", "backward"):
        seconds = torch.tensor([getattr(point, name) for point in points], dtype=torch.float64)
        passes[name] = Pass(*_least_squares(terms / seconds[:, None]))
    return rates._replace(**passes)


def _least_squares(rows: torch.Tensor) -> list[float]:
    """The x of at least 0 for which rows @ x is nearest to 1, by trying which of its elements are 0."""
    best, least = [0.0] * rows.size(1), float("inf")
    scale = rows.norm(dim=0)
    for count in range(1, rows.size(1) + 1):
        for columns in combinations(range(rows.size(1)), count):
            chosen = rows[:, columns] / scale[list(columns)]
            solved = torch.linalg.lstsq(
                chosen, torch.ones(len(rows), 1, dtype=rows.dtype), driver="gelsd"
            ).solution
            error = (chosen @ solved - 1).norm().item()
            if (solved >= 0).all() and error < least:
                best, least = [0.0] * rows.size(1), error
                for column, value in zip(columns, solved[:, 0] / scale[list(columns)]):
                    best[column] = value.item()
    return best


def _bandwidths(config: Config, device: torch.device) -> dict[str, float]:
    """Bytes a second of memory; on a GPU to and from the host; under torchrun between ranks."""
    some, other = (torch.ones(BYTES // 4, device=device) for _ in range(2))

    def rate(nbytes: float, move) -> float:
        fastest = float("inf")
        for _ in range(RUNS + 1):
            start = _now(device)
            move()
            fastest = min(fastest, _now(device) - start)
        return nbytes / fastest

    rates = {"memory": rate(3 * BYTES, lambda: some.add_(other))}
    if device.type == "cuda":
        host = torch.ones(BYTES // 4, pin_memory=True)
        rates["host"] = rate(BYTES, lambda: some.copy_(host, non_blocking=True))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        joins = not dist.is_initialized()
        if joins:
            timeout = timedelta(seconds=config.comm.init_timeout_seconds)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        shard = some[: some.numel() // ranks]
        whole = other[: shard.numel() * ranks]

        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

        def meet() -> None:
            gather(whole, shard)
            scatter(shard, whole)

        between = rate(2 * 4 * shard.numel() * (ranks - 1), meet)  # what each rank sends, and receives
        rates["gather" if _one_node() else "network"] = between
        if joins:
            dist.destroy_process_group()
    return rates
