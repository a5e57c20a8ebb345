"""Processes, device meshes, FSDP2: the same initial weights and the same sums on any number of ranks."""

import functools
import hashlib
import logging
import math
import os
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from chunkflow.settings import options
from chunkflow.training.start import world_size

logger = logging.getLogger(__name__)

MEETING_TIMEOUT = timedelta(hours=2)  # in which every machine has tokenised the data, or the start has failed
DRAWN_AT_ONCE = 1 << 16  # elements of initial weights: 256 KiB, which a core's cache holds
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Processes(NamedTuple):
    """This process among all: rank = pipeline_rank * replicas + replica."""

    device: torch.device
    mesh: DeviceMesh
    rank: int
    count: int
    pipeline_rank: int
    pipeline_ranks: int
    replica: int
    replicas: int  # data-parallel, each one rank or one pipeline

    @property
    def last_stage(self) -> bool:
        """Whether this rank has the last stage, which computes the loss."""
        return self.pipeline_rank == self.pipeline_ranks - 1

    @property
    def in_words(self) -> str:
        if self.pipeline_ranks == 1:
            return f"{self.count} ranks"
        return f"{self.replicas} pipelines of {self.pipeline_ranks} ranks"

    @property
    def data_mesh(self) -> DeviceMesh:
        """The ranks that shard or replicate the parameters of this rank's stages."""
        return self.mesh[tuple(name for name in self.mesh.mesh_dim_names if name != "pp")]


def set_seed(settings: options.Debug) -> int:
    """Sets and returns the seed of weights and data order: debug.seed, or 0. debug.deterministic allows only
    kernels that repeat bit for bit."""
    seed = settings.seed or 0
    torch.manual_seed(seed)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return seed


def init_processes(comm: options.Comm, degrees: options.Parallelism) -> Processes:
    """Joins torchrun's process group (without torchrun: a group of one) and builds the device mesh.

    Its dimensions are ("pp", "dp_replicate", "dp_shard"); the first two only where their size is above 1.
    With comm.mode = "fake_backend" this process stands for rank 0 of NGPU x NNODES, on the CPU, and nothing
    is sent.
    """
    fake = comm.mode == "fake_backend"
    cuda = torch.cuda.is_available() and not fake
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size(planned=True))
    else:
        timeout = timedelta(seconds=comm.init_timeout_seconds)
        store, rank, count = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, count = meet()
            store.set_timeout(timeout)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=count)
    rank, count = dist.get_rank(), dist.get_world_size()
    pipeline_ranks, replicated = degrees.pipeline_parallel_degree, degrees.data_parallel_replicate_degree
    replicas = count // pipeline_ranks
    sizes = {"pp": pipeline_ranks, "dp_replicate": replicated}
    sizes = {name: size for name, size in sizes.items() if size > 1} | {"dp_shard": replicas // replicated}
    logger.info(f"Building {len(sizes)}-D device mesh with {list(sizes)}, {list(sizes.values())}")
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if not fake:
        set_timeouts(mesh, comm.init_timeout_seconds)
    pipeline_rank, replica = divmod(rank, replicas)
    return Processes(device, mesh, rank, count, pipeline_rank, pipeline_ranks, replica, replicas)


def meet() -> tuple[dist.Store, int, int]:
    """torchrun's store, this rank and how many there are, when all have come. comm.init_timeout_seconds
    counts from here: before, a machine may tokenise for much longer than others, which find it done."""
    logger.info(f"Waiting for all processes, at most {MEETING_TIMEOUT}: some may still prepare their data")
    store, rank, count = next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))
    store.set(f"has come/{rank}", "")
    store.wait([f"has come/{other}" for other in range(count)], MEETING_TIMEOUT)
    return store, rank, count


def set_timeouts(mesh: DeviceMesh, seconds: int) -> None:
    """Gives every process group this timeout, so that a rank that stops answering ends the job. A mesh's
    groups do not take over init_process_group's timeout."""
    for group in [dist.group.WORLD, *mesh.get_all_groups()]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def apply_activation_checkpoint(model: nn.Module, settings: options.ActivationCheckpoint) -> None:
    """Recomputes whole layers in backward: all ("full") or every n-th ("selective"), as in torchtitan.

    This adds to k, which recomputes whole chunks. Writing a chunk's K/V twice changes nothing.
    """
    if settings.mode == "none":
        return
    every = 1 if settings.mode == "full" else int(settings.selective_ac_option)
    for index, layer in enumerate(model.layers.values()):
        if index % every == 0:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    logger.info(f"Applied {settings.mode} activation checkpointing to the model")


def apply_compile(model: nn.Module, settings: options.Compile) -> None:
    """Compiles each layer's forward, with a graph break at chunk-aware attention and its K/V state."""
    if not settings.enable:
        return
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=settings.backend, dynamic=True)
    logger.info("Compiling each TransformerBlock with torch.compile")


def reshards(settings: options.Parallelism, replicas: int) -> bool:
    """Whether parameters are resharded after each forward (ZeRO-3): torchtitan's rule, but never with a
    pipeline, since replicas have unequal numbers of chunks, and by default not on one rank."""
    if settings.pipeline_parallel_degree > 1:
        return False
    setting = settings.fsdp_reshard_after_forward
    return setting == "always" or (setting == "default" and replicas > 1)


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, settings: options.Training, reshard: bool) -> None:
    """FSDP2 with one group a layer; embeddings, final norm and head are in the root's (tied ones must share
    it). Gradients are summed, not averaged: each rank's loss is divided by the targets of all ranks."""
    dtype, reduce_dtype = DTYPES[settings.mixed_precision_param], DTYPES[settings.mixed_precision_reduce]
    sharding = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype)}
    if settings.enable_cpu_offload:
        sharding["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for layer in model.layers.values():
        fully_shard(layer, reshard_after_forward=reshard, **sharding)
    fully_shard(model, reshard_after_forward=False, **sharding)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    gib = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize / 2**30
    cost = f"all {gib:.2f}GiB are gathered once a step and stay; ranks need not agree on their chunks"
    if reshard:
        cost = (
            f"ZeRO-3: about {gib / (len(model.layers) + 1):.2f}GiB, a layer, is gathered at a time, for every"
            " chunk; ranks run one template of slots"
        )
    logger.info(f"Applied FSDP to the model, reshard_after_forward = {reshard} ({cost})")


def begin_step(model: nn.Module, reshard: bool) -> None:
    """Call before the first chunk. Resharding ranks run in lockstep and reduce at every backward; others keep
    parameters and gradients whole until `before_last_backward`: their numbers of chunks may differ."""
    if not reshard:
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)


def before_last_backward(model: nn.Module) -> None:
    """Makes the next backward reduce gradients and reshard parameters, layer by layer."""
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)


@contextmanager
def default_dtype(name: str):
    """Context in which new parameters are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[name])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def named_parameters(models: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters of a model, or of stages of one, by the whole model's names. A last stage's copy of tied
    embeddings is tok_embeddings.weight, too."""
    named = {}
    for model in models:
        for name, parameter in model.named_parameters():
            tied = name == "output.weight" and model.args.tied_embeddings
            named["tok_embeddings.weight" if tied else name] = parameter
    return named


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: torch.Tensor) -> slice:
    """The rows of the whole parameter in this rank's shard, cut as torch.chunk cuts; all if not sharded."""
    start, stop = 0, parameter.size(0)
    for dimension, placement in enumerate(parameter.placements if isinstance(parameter, DTensor) else ()):
        if placement.is_shard():
            each = -(-(stop - start) // parameter.device_mesh.size(dimension))
            start = min(start + each * parameter.device_mesh.get_local_rank(dimension), stop)
            stop = min(start + each, stop)
    return slice(start, stop)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fills all parameters. Rows are drawn in blocks, each from a generator seeded by (seed, the parameter's
    name, the block's number): all layouts start with the same weights, and a rank draws only what it keeps.

    Drawn whole, a model of 7 billion parameters takes each rank minutes, since the product of ranks and
    parameters is drawn, by one thread each, through memory instead of a cache.
    """
    for name, parameter in named_parameters([model]).items():
        local, kept = to_local(parameter), local_rows(parameter)
        rows = max(1, DRAWN_AT_ONCE // math.prod(parameter.shape[1:]))
        for number in range(kept.start // rows, -(-kept.stop // rows)):
            begin, end = number * rows, min((number + 1) * rows, parameter.size(0))
            digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            block = torch.empty(end - begin, *parameter.shape[1:], dtype=torch.float32, device="cpu")
            model.init_parameter(name, block, generator)
            first, last = max(begin, kept.start), min(end, kept.stop)
            local[first - kept.start : last - kept.start].copy_(block[first - begin : last - begin])


def clip_grad_norm(models: Iterable[nn.Module], max_norm: float, mesh: DeviceMesh) -> torch.Tensor:
    """Scales gradients of this rank's stages so that the global norm is at most `max_norm`; returns the norm
    before, the same on all ranks. Tied embeddings count once, a last stage's copy is scaled, too."""
    parameters, counted = [], []
    for model in models:
        parameters += model.parameters()
        named = named_parameters([model])
        if model.tok_embeddings is None:
            named.pop("tok_embeddings.weight", None)
        counted += [parameter.grad for parameter in named.values() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(counted)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if "pp" in mesh.mesh_dim_names:
        squared = norm.square()
        dist.all_reduce(squared, group=mesh.get_group("pp"))
        norm = squared.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is set on any rank. One small collective."""
    if dist.get_world_size() == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
