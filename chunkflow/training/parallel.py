"""Processes, device meshes, FSDP2: how one model becomes many ranks, with the same start and the same sums on
any layout."""

from __future__ import annotations

import functools
import hashlib
import logging
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

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Processes(NamedTuple):
    """This process among all. A pipeline rank's replicas are next to each other:
    rank = pipeline_rank * replicas + replica."""

    device: torch.device
    mesh: DeviceMesh
    rank: int
    count: int
    pipeline_rank: int
    pipeline_ranks: int
    replica: int
    replicas: int  # data-parallel ranks, each of them perhaps a pipeline

    @property
    def last_stage(self) -> bool:
        """Whether this rank has the last stage, which makes the loss."""
        return self.pipeline_rank == self.pipeline_ranks - 1

    @property
    def in_words(self) -> str:
        if self.pipeline_ranks == 1:
            return f"{self.count} ranks"
        return f"{self.replicas} pipelines of {self.pipeline_ranks} ranks"

    @property
    def data_mesh(self) -> DeviceMesh:
        """The ranks that share, or replicate, the parameters of this rank's stages."""
        return self.mesh[tuple(name for name in self.mesh.mesh_dim_names if name != "pp")]


def set_seed(settings: options.Debug) -> int:
    """The seed of weights and data order: debug.seed, or 0. With debug.deterministic, only kernels that
    repeat bit for bit."""
    seed = settings.seed or 0
    torch.manual_seed(seed)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return seed


def init_processes(comm: options.Comm, degrees: options.Parallelism) -> Processes:
    """Joins the process group that torchrun set up (alone: a group of one) and builds the device mesh.

    The mesh is (dp_shard,) or, with replicated shards (HSDP), (dp_replicate, dp_shard); a pipeline puts "pp"
    before them. With comm.mode = "fake_backend" this process stands for rank 0 of NGPU x NNODES, on the CPU,
    and nothing is sent.
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
            # torchrun's restarts share one store: without a prefix, ranks would look for those of the attempt
            # that crashed.
            store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
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
    return Processes(
        device=device,
        mesh=mesh,
        rank=rank,
        count=count,
        pipeline_rank=rank // replicas,
        pipeline_ranks=pipeline_ranks,
        replica=rank % replicas,
        replicas=replicas,
    )


def set_timeouts(mesh: DeviceMesh, seconds: int) -> None:
    """Gives every process group this timeout: a rank that stops answering then ends the job instead of
    hanging it.

    The groups of a mesh do not take init_process_group's timeout by themselves.
    """
    for group in [dist.group.WORLD, *mesh.get_all_groups()]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def apply_activation_checkpoint(model: nn.Module, settings: options.ActivationCheckpoint) -> None:
    """Recomputes whole layers in backward: all ("full") or every n-th ("selective"), as in torchtitan.

    Within the runner this comes on top of k, which recomputes whole chunks; a layer's forward may run again
    at any time, since writing a chunk's K/V twice changes nothing.
    """
    if settings.mode == "none":
        return
    every = 1 if settings.mode == "full" else int(settings.selective_ac_option)
    for index, layer in enumerate(model.layers.values()):
        if index % every == 0:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    logger.info(f"Applied {settings.mode} activation checkpointing to the model")


def apply_compile(model: nn.Module, settings: options.Compile) -> None:
    """Compiles each layer's forward; chunk-aware attention and its state stay outside, as a graph break."""
    if not settings.enable:
        return
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=settings.backend, dynamic=True)
    logger.info("Compiling each TransformerBlock with torch.compile")


def reshards(settings: options.Parallelism, replicas: int) -> bool:
    """Whether parameters are resharded after each forward (ZeRO-3): torchtitan's rule, except that one rank
    has no shards, and that pipelines keep them gathered, since their replicas need not agree on their
    chunks."""
    setting = settings.fsdp_reshard_after_forward
    if settings.pipeline_parallel_degree > 1:
        return False
    return setting == "always" or (setting == "default" and replicas > 1)


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, settings: options.Training, reshard: bool) -> None:
    """FSDP2 with one group a layer; embeddings, final norm and head belong to the root (tied ones must share
    a group).

    Gradients are summed over ranks, never averaged: each rank's loss is divided by the targets of all ranks
    already.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[settings.mixed_precision_param],
        reduce_dtype=DTYPES[settings.mixed_precision_reduce],
    )
    sharding = {"mesh": mesh, "mp_policy": policy}
    if settings.enable_cpu_offload:
        sharding["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for layer in model.layers.values():
        fully_shard(layer, reshard_after_forward=reshard, **sharding)
    fully_shard(model, reshard_after_forward=False, **sharding)
    for module in _fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    whole_gib = (
        sum(parameter.numel() for parameter in model.parameters()) * policy.param_dtype.itemsize / 2**30
    )
    layer_gib = whole_gib / (len(model.layers) + 1)
    cost = (
        f"ZeRO-3: about {layer_gib:.2f}GiB, a layer, is gathered at a time, for every chunk; ranks run one"
        " template of slots"
        if reshard
        else f"all {whole_gib:.2f}GiB are gathered once a step and stay; ranks need not agree on their chunks"
    )
    logger.info(f"Applied FSDP to the model, reshard_after_forward = {reshard} ({cost})")


def begin_step(model: nn.Module, reshard: bool) -> None:
    """Before the first chunk. Resharding ranks run in lockstep and reduce at every backward; the others keep
    parameters and gradients whole until `before_last_backward`, and so need not agree on how many chunks they
    have."""
    if not reshard:
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)


def before_last_backward(model: nn.Module) -> None:
    """From here on gradients are reduced, layer by layer, and parameters become shards again."""
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def default_dtype(name: str):
    """Parameters made inside are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[name])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def named_parameters(models: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a model, or of stages of one, by the whole model's names. A last stage's copy of tied
    embeddings is named as they are, tok_embeddings.weight."""
    named = {}
    for model in models:
        for name, parameter in model.named_parameters():
            tied = name == "output.weight" and model.args.tied_embeddings
            named["tok_embeddings.weight" if tied else name] = parameter
    return named


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: torch.Tensor) -> slice:
    """The rows of the whole parameter that are in this rank's shard: cut along the first dimension as
    torch.chunk cuts. All rows where the parameter is not sharded."""
    start, stop = 0, parameter.size(0)
    for dimension, placement in enumerate(parameter.placements if isinstance(parameter, DTensor) else ()):
        if placement.is_shard():
            each = -(-(stop - start) // parameter.device_mesh.size(dimension))
            start = min(start + each * parameter.device_mesh.get_local_rank(dimension), stop)
            stop = min(start + each, stop)
    return slice(start, stop)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fills all parameters. Each is drawn whole from a generator seeded by (seed, its name), then cut: the
    same start on any layout, whichever parameters this rank or stage has."""
    for name, parameter in named_parameters([model]).items():
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        model.init_parameter(name, whole, generator)
        to_local(parameter).copy_(whole[local_rows(parameter)])


def clip_grad_norm(models: Iterable[nn.Module], max_norm: float, mesh: DeviceMesh) -> torch.Tensor:
    """Scales gradients so that their global norm is at most `max_norm`; returns the norm before, the same on
    all ranks. `models`: this rank's stages.

    The second copy of tied embeddings, on a last stage, is scaled like the first, but counts once.
    """
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
    """Each flag, whether any rank has it: one small collective, by which ranks agree on what comes next."""
    if dist.get_world_size() == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
