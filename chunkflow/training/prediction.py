"""What a config's ranks hold in memory, from the shapes of its model."""

from types import ModuleType
from typing import Any

import torch

from chunkflow.execution.loss import slice_tokens
from chunkflow.execution.runner import SENDS_IN_FLIGHT
from chunkflow.planning.memory import Layout, StageSizes, communicators, cuda_bytes, kv_tokens
from chunkflow.settings.options import Config
from chunkflow.training import stages
from chunkflow.training.parallel import DTYPES, reshards

ASSUMED_GIB = 79.2  # of a GPU of 80 GB, where there is none to ask


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
    sizes = []
    with torch.device("meta"):
        for rank in range(pipeline_ranks):
            models = stages.build_stages(family, args, layers, rank, pipeline_ranks)
            sizes.append({})
            for stage, model in models.items():
                shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
                sizes[rank][stage] = StageSizes(args, shapes, layout)
    return sizes


def cuda_of_rank(config: Config, sizes: dict[int, StageSizes], replicas: int) -> int:
    """Bytes that CUDA adds on a rank with these stages."""
    degrees = config.parallelism
    most = replicas if degrees.context_parallel_degree == -1 else degrees.context_parallel_degree
    replicated = degrees.data_parallel_replicate_degree
    layout = degrees.pipeline_parallel_degree, replicated, replicas // replicated
    return cuda_bytes(sizes.values(), communicators(*layout, most))


def budget_gib(config: Config, planned: bool) -> float | None:
    """What a rank may hold: chunkflow.memory_budget_gib, else this GPU's memory in whole GiB, else None; if
    `planned`, for a machine that need not be this one, that of a GPU of 80 GB."""
    if config.chunkflow.memory_budget_gib is not None:
        return config.chunkflow.memory_budget_gib
    if torch.cuda.is_available() and config.comm.mode != "fake_backend":
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory >> 30)
    return ASSUMED_GIB if planned or config.comm.mode == "fake_backend" else None


def most_kv_tokens(
    config: Config, family: ModuleType, args: Any, layers: list[range], replicas: int, planned: bool
) -> int:
    """The most tokens whose K/V and gradients each rank can hold at once; 0, no limit, without a budget, or
    where neither a sequence is shared nor groups' K/V wait for each other (ZeRO-3). `planned` as of
    `budget_gib`."""
    settings, gib = config.chunkflow, budget_gib(config, planned)
    shares = replicas > 1 and config.parallelism.context_parallel_degree != 1
    if gib is None or not settings.enable or not (shares or reshards(config.parallelism, replicas)):
        return 0
    plan = len(layers), settings.k, settings.chunk_size, config.training.seq_len
    on_cuda = planned or config.comm.mode == "fake_backend" or torch.cuda.is_available()
    return min(
        kv_tokens(sizes, *plan, int(gib * 2**30) - on_cuda * cuda_of_rank(config, sizes, replicas))
        for sizes in stage_sizes(config, family, args, layers, replicas)
    )
