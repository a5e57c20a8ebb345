"""Processes, device meshes, FSDP2: how one model becomes many ranks, with the same start and the same sums on
any layout."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def set_seed(config) -> int:
    """The seed of weights and data order: debug.seed, or 0. With debug.deterministic, only kernels that
    repeat bit for bit."""
    seed = config.debug.seed or 0
    torch.manual_seed(seed)
    if config.debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return seed


def init_processes(config, pipeline_ranks: int = 1) -> tuple[torch.device, DeviceMesh]:
    """Joins the process group that torchrun set up (alone: a group of one) and builds the device mesh.

    The mesh is (dp_shard,) or, with replicas (HSDP), (dp_replicate, dp_shard); a pipeline puts "pp" before
    them. With comm.mode = "fake_backend" this process stands for rank 0 of NGPU x NNODES, on the CPU, and
    nothing is sent.
    """
    fake = config.comm.mode == "fake_backend"
    cuda = torch.cuda.is_available() and not fake
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        world_size = int(os.environ.get("NGPU", 1)) * int(os.environ.get("NNODES", 1))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    else:
        timeout = timedelta(seconds=config.comm.init_timeout_seconds)
        store, rank, world_size = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            # torchrun's restarts share one store: without a prefix, ranks would look for those of the attempt
            # that crashed.
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    replicas = config.parallelism.data_parallel_replicate_degree
    degrees = {"pp": pipeline_ranks, "dp_replicate": replicas}
    degrees = {name: degree for name, degree in degrees.items() if degree > 1}
    degrees["dp_shard"] = dist.get_world_size() // (pipeline_ranks * replicas)
    shape, names = tuple(degrees.values()), tuple(degrees)
    logger.info(f"Building {len(shape)}-D device mesh with {list(names)}, {list(shape)}")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    if not fake:
        set_timeouts(mesh, config.comm.init_timeout_seconds)
    return device, mesh


def set_timeouts(mesh: DeviceMesh, seconds: int) -> None:
    """Gives every process group this timeout: a rank that stops answering then ends the job instead of
    hanging it.

    The groups of a mesh do not take init_process_group's timeout by themselves.
    """
    for group in [dist.group.WORLD, *mesh.get_all_groups()]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def reshards(config, data_parallel_ranks: int) -> bool:
    """Whether parameters are resharded after each forward (ZeRO-3): torchtitan's rule, except that one rank
    has no shards."""
    setting = config.parallelism.fsdp_reshard_after_forward
    return setting == "always" or (setting == "default" and data_parallel_ranks > 1)


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, config, reshard: bool) -> None:
    """FSDP2 with one group a layer; embeddings, final norm and head belong to the root (tied ones must share
    a group).

    Gradients are summed over ranks, never averaged: each rank's loss is divided by the targets of all ranks
    already.
    """
    training = config.training
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[training.mixed_precision_param],
        reduce_dtype=DTYPES[training.mixed_precision_reduce],
    )
    options = {"mesh": mesh, "mp_policy": policy}
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for layer in model.layers.values():
        fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)
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


class BusyTimer:
    """How long this rank works on its own chunks before it meets the others, from creation to `stop`."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.begin = self.stop()
        self.end = self.begin

    def stop(self):
        """Marks the end, now: an event of the device; on the CPU this thread's time, which stands still in a
        collective."""
        if self.cuda:
            self.end = torch.cuda.Event(enable_timing=True)
            self.end.record()
        else:
            self.end = time.thread_time()
        return self.end

    def seconds(self) -> float:
        """From creation to the last `stop`. Waits for the device."""
        if self.cuda:
            self.end.synchronize()
            return self.begin.elapsed_time(self.end) / 1000
        return self.end - self.begin


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


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales gradients so that their global norm is at most `max_norm`; returns the norm before, the same on
    all ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag, whether any rank has it: one small collective, by which ranks agree on what comes next."""
    if dist.get_world_size() == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def gather_over_ranks(values: list[float], device: torch.device) -> list[list[float]]:
    """The same list of every rank: [rank][value]. A collective."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = own.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_single(everyone, own)
    return everyone.view(-1, len(values)).tolist()
