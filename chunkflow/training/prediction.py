"""What a config's ranks hold in memory, from the shapes of its model."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from chunkflow.execution.loss import block_tokens, slice_tokens
from chunkflow.execution.runner import SENDS_IN_FLIGHT
from chunkflow.planning.memory import (
    FRAGMENTATION,
    Layout,
    StageSizes,
    communicators,
    cuda_bytes,
    kv_tokens,
    peak_parts,
    with_kv_offload,
)
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.room import Room
from chunkflow.settings import options
from chunkflow.settings.options import Config
from chunkflow.training import stages
from chunkflow.training.lora import apply_lora
from chunkflow.training.parallel import DTYPES, reshards
from chunkflow.training.rates import device_of, memory_gib

Shapes = tuple[dict[str, tuple[int, ...]], set[str]]
_shapes: dict[tuple, list[dict[int, Shapes]]] = {}  # of models asked for before


def stage_sizes(
    config: Config, family: ModuleType, args: Any, layers: list[range], replicas: int, device: str = ""
) -> list[dict[int, StageSizes]]:
    """Memory of each pipeline rank's stages, by number. `layers`: of each stage; `device`: by its name; "":
    this machine's."""
    training, recomputing = config.training, config.activation_checkpoint
    how = {"none": "0", "full": "1", "selective": recomputing.selective_ac_option}[recomputing.mode]
    pipeline_ranks = config.parallelism.pipeline_parallel_degree
    kind = "cpu" if (device or device_of(config, planned=False)) == "cpu" else "cuda"
    compute = DTYPES[training.mixed_precision_param]
    layout = Layout(
        stored=DTYPES[training.dtype].itemsize,
        compute=compute.itemsize,
        reduce=DTYPES[training.mixed_precision_reduce].itemsize,
        shards=replicas // config.parallelism.data_parallel_replicate_degree,
        replicated=config.parallelism.data_parallel_replicate_degree,
        reshard=reshards(config.parallelism, replicas),
        eight_bit=config.optimizer.name == "AdamW8bit",
        offload=training.enable_cpu_offload,
        checkpoint_every=0 if how == "op" else int(how),
        recompute_cheap=how == "op",
        slice_tokens=slice_tokens(kind, args.vocab_size),
        block_tokens=block_tokens(kind, args.vocab_size, torch.empty(0, dtype=compute)),
        sends_in_flight=SENDS_IN_FLIGHT if pipeline_ranks > 1 else 0,
        kv_offload=config.chunkflow.kv_offload,
        keep_attention=config.chunkflow.keep_attention,
    )
    return [
        {stage: StageSizes(args, shapes, layout, frozen) for stage, (shapes, frozen) in of_rank.items()}
        for of_rank in _shapes_of_stages(config.lora, family, args, layers, pipeline_ranks)
    ]


def _shapes_of_stages(
    adapters: options.Lora, family: ModuleType, args: Any, layers: list[range], pipeline_ranks: int
) -> list[dict[int, Shapes]]:
    """Pipeline rank -> stage -> shape of each parameter, and the names of those that are frozen."""
    key = family.__name__, repr(args), tuple(layers), pipeline_ranks, repr(adapters)
    if key not in _shapes:
        _shapes[key] = [{} for _ in range(pipeline_ranks)]
        for rank, of_rank in enumerate(_shapes[key]):
            with torch.device("meta"):
                models = stages.build_stages(family, args, layers, rank, pipeline_ranks)
            for stage, model in models.items():
                apply_lora(model, adapters, family, options.Training())
                parameters = dict(model.named_parameters())
                frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
                of_rank[stage] = {name: tuple(p.shape) for name, p in parameters.items()}, frozen
    return _shapes[key]


def cuda_of_rank(config: Config, sizes: dict[int, StageSizes], replicas: int) -> int:
    """Bytes that CUDA adds on a rank with these stages."""
    degrees = config.parallelism
    most = replicas if degrees.context_parallel_degree == -1 else degrees.context_parallel_degree
    replicated = degrees.data_parallel_replicate_degree
    layout = degrees.pipeline_parallel_degree, replicated, replicas // replicated
    return cuda_bytes(sizes.values(), communicators(*layout, most))


def budget_gib(config: Config, device: str) -> float | None:
    """What a rank may hold: chunkflow.memory_budget_gib, else the memory of the `device` (by its name), None
    of a CPU."""
    given = config.chunkflow.memory_budget_gib
    return memory_gib(device) if given is None else given


def total_gib(parts: dict[str, int], cuda: int, device: str) -> float:
    """Of a rank at its peak; on CUDA with what that adds, fragmentation included."""
    total = sum(parts.values())
    return (total if device == "cpu" else total + beside(total, cuda)) / 2**30


def beside(total: float, cuda: int) -> float:
    """Bytes that CUDA adds to a `total` of PyTorch's: `cuda`, and fragmentation."""
    return cuda + FRAGMENTATION * total


def budgets(
    config: Config, sizes: Sequence[dict[int, StageSizes]], replicas: int, device: str
) -> list[int] | None:
    """Bytes of each pipeline rank, of what PyTorch counts; None without a budget. `device`: by its name."""
    gib = budget_gib(config, device)
    if gib is None:
        return None
    whole = [gib * 2**30] * len(sizes)
    if device != "cpu":
        whole = [
            (budget - cuda_of_rank(config, of_rank, replicas)) / (1 + FRAGMENTATION)
            for budget, of_rank in zip(whole, sizes)
        ]
    return [int(budget) for budget in whole]


def most_kv_tokens(config: Config, sizes: Sequence[dict[int, StageSizes]], replicas: int, device: str) -> int:
    """The most tokens whose K/V and gradients each rank can hold at once; 0, no limit, without a budget, or
    where neither a sequence is shared nor groups' K/V wait for each other (ZeRO-3). `device`: by its name."""
    settings, usable = config.chunkflow, budgets(config, sizes, replicas, device)
    shares = replicas > 1 and config.parallelism.context_parallel_degree != 1
    if usable is None or not settings.enable or not (shares or reshards(config.parallelism, replicas)):
        return 0
    plan = sum(map(len, sizes)), settings.k, settings.chunk_size, config.training.seq_len
    return min(kv_tokens(of_rank, *plan, budget) for of_rank, budget in zip(sizes, usable))


def room(
    config: Config, sizes: Sequence[dict[int, StageSizes]], replicas: int, device: str, adapts: frozenset[str]
) -> Room | None:
    """What a replica may hold; None without a budget, and for whole sequences. `device`: by its name;
    `adapts`: as of `Room`."""
    usable = budgets(config, sizes, replicas, device)
    if usable is None or not config.chunkflow.enable:
        return None
    offloaded = most_kv_tokens(config, with_kv_offload(sizes, "host"), replicas, device)
    return Room(sizes, usable, config.chunkflow.chunk_size, adapts, offloaded)


def memory_of_sequence(config: Config, spec: Any, settings: PlanSettings, tokens: int) -> tuple[float, float]:
    """GiB that a rank, the fullest, holds in a step with one sequence of so many tokens: planned as the
    `settings` say, and whole in one micro-batch. `spec`: the model, see build.ModelSpec."""
    sizes = stage_sizes(config, spec.family, spec.args, spec.layers, settings.replicas)
    peaks = []
    for enable in (settings.enable, False):
        plan = plan_step([tokens], settings._replace(enable=enable), most=1)
        ((replica, programs),) = plan.programs.items()
        of_ranks = [
            peak_parts(sizes[rank], plan.groups[replica], programs[rank]) for rank in range(len(sizes))
        ]
        peaks.append(max(sum(parts.values()) for parts in of_ranks) / 2**30)
    return tuple(peaks)
