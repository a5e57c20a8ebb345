"""What a config's ranks hold in memory, from the shapes of its model."""

from types import ModuleType
from typing import Any

import torch

from chunkflow.execution.loss import slice_tokens
from chunkflow.execution.runner import SENDS_IN_FLIGHT
from chunkflow.planning.memory import (
    FRAGMENTATION,
    Layout,
    StageSizes,
    communicators,
    cuda_bytes,
    kv_tokens,
    peak_parts,
)
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.settings.options import Config
from chunkflow.training import stages
from chunkflow.training.parallel import DTYPES, reshards
from chunkflow.training.rates import device_of, memory_gib

_shapes: dict[tuple, list[dict[int, dict[str, tuple[int, ...]]]]] = {}  # of models asked for before


def stage_sizes(
    config: Config, family: ModuleType, args: Any, layers: list[range], replicas: int
) -> list[dict[int, StageSizes]]:
    """Memory of each pipeline rank's stages, by number. `layers`: of each stage."""
    training, recomputing = config.training, config.activation_checkpoint
    how = {"none": "0", "full": "1", "selective": recomputing.selective_ac_option}[recomputing.mode]
    pipeline_ranks = config.parallelism.pipeline_parallel_degree
    layout = Layout(
        stored=DTYPES[training.dtype].itemsize,
        compute=DTYPES[training.mixed_precision_param].itemsize,
        reduce=DTYPES[training.mixed_precision_reduce].itemsize,
        shards=replicas // config.parallelism.data_parallel_replicate_degree,
        reshard=reshards(config.parallelism, replicas),
        eight_bit=config.optimizer.name == "AdamW8bit",
        offload=training.enable_cpu_offload,
        checkpoint_every=0 if how == "op" else int(how),
        recompute_cheap=how == "op",
        slice_tokens=slice_tokens("cuda", args.vocab_size),
        sends_in_flight=SENDS_IN_FLIGHT if pipeline_ranks > 1 else 0,
        kv_offload=getattr(config.chunkflow, "kv_offload", "none"),
        keep_attention=getattr(config.chunkflow, "keep_attention", "none"),
    )
    return [
        {stage: StageSizes(args, shapes, layout) for stage, shapes in of_rank.items()}
        for of_rank in _shapes_of_stages(family, args, layers, pipeline_ranks)
    ]


def _shapes_of_stages(
    family: ModuleType, args: Any, layers: list[range], pipeline_ranks: int
) -> list[dict[int, dict[str, tuple[int, ...]]]]:
    """Pipeline rank -> stage -> parameter -> its shape."""
    key = family.__name__, repr(args), tuple(layers), pipeline_ranks
    if key not in _shapes:
        with torch.device("meta"):
            _shapes[key] = [
                {
                    stage: {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
                    for stage, model in stages.build_stages(
                        family, args, layers, rank, pipeline_ranks
                    ).items()
                }
                for rank in range(pipeline_ranks)
            ]
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


def most_kv_tokens(
    config: Config,
    family: ModuleType,
    args: Any,
    layers: list[range],
    replicas: int,
    planned: bool,
    device: str = "",
) -> int:
    """The most tokens whose K/V and gradients each rank can hold at once; 0, no limit, without a budget, or
    where neither a sequence is shared nor groups' K/V wait for each other (ZeRO-3). `device`: by its name;
    "": see `device_of`, for which `planned` is."""
    settings, device = config.chunkflow, device or device_of(config, planned)
    gib = budget_gib(config, device)
    shares = replicas > 1 and config.parallelism.context_parallel_degree != 1
    if gib is None or not settings.enable or not (shares or reshards(config.parallelism, replicas)):
        return 0
    plan, usable = (len(layers), settings.k, settings.chunk_size, config.training.seq_len), []
    for sizes in stage_sizes(config, family, args, layers, replicas):
        budget = gib * 2**30
        if device != "cpu":
            budget = (budget - cuda_of_rank(config, sizes, replicas)) / (1 + FRAGMENTATION)
        usable.append(kv_tokens(sizes, *plan, int(budget)))
    return min(usable)


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
