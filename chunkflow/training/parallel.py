"""Processes, device meshes, FSDP2: the same initial weights and the same sums on any number of ranks."""

import functools
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from chunkflow.execution.recompute import recompute_cheap, recompute_whole
from chunkflow.execution.rotary import Rotary
from chunkflow.planning.balance import block_sizes
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
    # Of replicas that may share a sequence, in which this one is: the ranks that have this rank's stages.
    blocks: dict[range, dist.ProcessGroup]

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
    def groups(self) -> list[dist.ProcessGroup]:
        """All that this process is in."""
        return [dist.group.WORLD, *self.mesh.get_all_groups(), *self.blocks.values()]

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


def init_processes(comm: options.Comm, degrees: options.Parallelism, offload: bool = False) -> Processes:
    """Joins torchrun's process group (without torchrun: a group of one), builds the device mesh and connects
    its ranks.

    Its dimensions are ("pp", "dp_replicate", "dp_shard"); the first two only where their size is above 1.
    With `offload` gradients are in host memory, and on CUDA sums over ranks go there too, through gloo.
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
        backend = ("cpu:gloo,cuda:nccl" if offload else "nccl") if cuda else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=count)
    rank, count = dist.get_rank(), dist.get_world_size()
    pipeline_ranks, replicated = degrees.pipeline_parallel_degree, degrees.data_parallel_replicate_degree
    replicas = count // pipeline_ranks
    sizes = {"pp": pipeline_ranks, "dp_replicate": replicated}
    sizes = {name: size for name, size in sizes.items() if size > 1} | {"dp_shard": replicas // replicated}
    logger.info(f"Building {len(sizes)}-D device mesh with {list(sizes)}, {list(sizes.values())}")
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    pipeline_rank, replica = divmod(rank, replicas)
    blocks = make_blocks(pipeline_rank, replica, replicas, degrees.context_parallel_degree)
    place = pipeline_rank, pipeline_ranks, replica, replicas
    processes = Processes(device, mesh, rank, count, *place, blocks)
    if not fake:
        set_timeouts(processes, comm.init_timeout_seconds)
        connect(processes, ring=degrees.pipeline_parallel_schedule == "Interleaved1F1B")
    return processes


def make_blocks(pipeline_rank: int, replica: int, replicas: int, most: int) -> dict[range, dist.ProcessGroup]:
    """`Processes.blocks`, of at most `most` replicas (-1: all). Call it once: only a group's ranks take part
    in making it, and torch wants them to have made equally many before."""
    blocks = {}
    for size in block_sizes(replicas, replicas if most == -1 else most)[:-1]:
        first = replica // size * size
        if first + size <= replicas:
            block = range(first, first + size)
            ranks = [pipeline_rank * replicas + member for member in block]
            blocks[block] = dist.new_group(ranks, use_local_synchronization=True)
    return blocks


def meet() -> tuple[dist.Store, int, int]:
    """torchrun's store, this rank and how many there are, when all have come. comm.init_timeout_seconds
    counts from here: before, a machine may tokenise for much longer than others, which find it done."""
    logger.info(f"Waiting for all processes, at most {MEETING_TIMEOUT}: some may still prepare their data")
    store, rank, count = next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))
    store.set(f"has come/{rank}", "")
    store.wait([f"has come/{other}" for other in range(count)], MEETING_TIMEOUT)
    return store, rank, count


def set_timeouts(processes: Processes, seconds: int) -> None:
    """Gives every process group this timeout, so that a rank that stops answering ends the job. A mesh's
    groups do not take over init_process_group's timeout."""
    for group in processes.groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def connect(processes: Processes, ring: bool) -> None:
    """Uses each process group, and each pair of neighbours in the pipeline, once. In a `ring` (several stages
    a rank) the last and the first rank are neighbours, too.

    NCCL makes a communicator at its first use, outside PyTorch's allocator: in mid-step that may hold all
    memory. Pairs come in the same order on all ranks, and of a pair the first sends first, so none waits in
    a circle, even if every send waits for its receive.
    """
    mesh, one = processes.mesh, torch.ones(1, device=processes.device)
    for group in {group.group_name: group for group in processes.groups}.values():
        if group.size() > 1:
            dist.all_reduce(one, group=group)
    if "pp" not in mesh.mesh_dim_names:
        return
    group, rank, ranks = mesh.get_group("pp"), mesh.get_local_rank("pp"), mesh["pp"].size()
    pairs = [(first, first + 1) for first in range(ranks - 1)]
    for pair in pairs + ([(ranks - 1, 0)] if ring and ranks > 2 else []):
        for sender, receiver in (pair, pair[::-1]):
            if rank == sender:
                dist.send(one, group=group, group_dst=receiver)
            elif rank == receiver:
                dist.recv(one, group=group, group_src=sender)


def apply_activation_checkpoint(model: nn.Module, settings: options.ActivationCheckpoint) -> None:
    """Recomputes in backward, as in torchtitan: whole layers, all ("full") or every n-th ("selective" with a
    number), or in each layer ("selective" with "op") what is cheap: all but matrix products and attention.

    This adds to k, which recomputes whole chunks. Writing a chunk's K/V twice changes nothing.
    """
    if settings.mode == "none":
        return
    how, every = "full", 1
    if settings.mode == "selective":
        how = settings.selective_ac_option
        every = 1 if how == "op" else int(how)
    for index, layer in enumerate(model.layers.values()):
        if index % every == 0:
            layer.forward = functools.partial(
                recompute_cheap if how == "op" else recompute_whole, layer.forward
            )
    logger.info(f"Applied {settings.mode} activation checkpointing ({how}) to the model")


def apply_compile(model: nn.Module, settings: options.Compile) -> None:
    """Compiles each layer's parts before and after attention, whose K/V state a graph must not touch. Each is
    one graph, or an error; all layers and all lengths of chunks share it."""
    if not settings.enable:
        return
    for layer in model.layers.values():
        for name in ("before_attention", "after_attention"):
            setattr(layer, name, _compiled(getattr(layer, name), settings.backend))
    logger.info("Compiling each TransformerBlock with torch.compile")


def _compiled(part: Callable, backend: str) -> Callable:
    compiled = torch.compile(part, backend=backend, fullgraph=True)

    def run(x_TC: torch.Tensor, *inputs: Any) -> Any:
        if x_TC.size(0) == 1:  # a dummy, mostly: torch.compile would make graphs for this length alone
            return part(x_TC, *inputs)
        for value in (x_TC, *inputs):
            for tensor in (value.cos_T1R, value.sin_T1R) if isinstance(value, Rotary) else (value,):
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(x_TC, *inputs)

    return run


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
    elif mesh.size() == 1:  # frozen parameters are in the compute dtype: FSDP2 would hold a second copy
        sharding["ignored_params"] = {each for each in model.parameters() if not each.requires_grad}
    for layer in model.layers.values():
        fully_shard(layer, reshard_after_forward=reshard, **sharding)
    fully_shard(model, reshard_after_forward=False, **sharding)
    layers = list(model.layers.values())
    if mesh.size() > 1:  # over one rank FSDP2 copies, and with a factor it divides into one more copy
        for module in (model, *layers):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if reshard:
        # While a layer computes, the next is gathered. By itself FSDP2 goes back in the order of forwards,
        # but forgets it with every backward, though those of other chunks are still to come.
        for module, following in zip((model, *layers), layers):
            module.set_modules_to_forward_prefetch([following])
        for module, preceding in zip((model, *layers[::-1]), layers[::-1]):
            module.set_modules_to_backward_prefetch([preceding])
    gathered = [p for p in model.parameters() if p not in sharding.get("ignored_params", ())]
    gib = sum(parameter.numel() for parameter in gathered) * dtype.itemsize / 2**30
    cost = f"all {gib:.2f}GiB are gathered once a step and stay; ranks need not agree on their chunks"
    if reshard:
        cost = (
            f"ZeRO-3: about {gib / (len(model.layers) + 1):.2f}GiB, a layer, is gathered at a time, for every"
            " chunk; ranks run one template of slots"
        )
    logger.info(f"Applied FSDP to the model, reshard_after_forward = {reshard} ({cost})")


def begin_step(model: nn.Module, reshard: bool) -> None:
    """Call before the first chunk. Parameters and gradients stay whole until `before_last_backward`, so ranks
    may differ in their numbers of chunks. With `reshard` (lockstep) only those of the root group do: each
    backward reduces the layers' gradients to shards, and the last one the shards over their replicas."""
    model.set_requires_gradient_sync(False, recurse=not reshard)
    model.set_reshard_after_backward(False, recurse=not reshard)
    model.set_requires_all_reduce(False)


def before_last_backward(model: nn.Module) -> None:
    """Makes the next backward reduce gradients and reshard parameters, layer by layer."""
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)
    model.set_requires_all_reduce(True)


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
def init_weights(model: nn.Module, seed: int, chosen: Callable[[str], bool] = lambda name: True) -> None:
    """Fills all parameters, or those whose names are `chosen`. Rows are drawn in blocks, each from a
    generator seeded by (seed, the parameter's name, the block's number): all layouts start with the same
    weights, and a rank draws only what it keeps.

    Drawn whole, a model of 7 billion parameters takes each rank minutes, since the product of ranks and
    parameters is drawn, by one thread each, through memory instead of a cache.
    """
    for name, parameter in named_parameters([model]).items():
        if not chosen(name):
            continue
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
    # A stage whose parameters are all frozen has none.
    norm = nn.utils.get_total_norm(counted or [torch.zeros((), device=parameters[0].device)])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if "pp" in mesh.mesh_dim_names:
        squared = norm.double().square()
        dist.all_reduce(squared, group=mesh.get_group("pp"))
        norm = squared.sqrt().to(norm.dtype)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def agree(
    figures: list[torch.Tensor], flags: list[bool], device: torch.device
) -> tuple[list[float], list[bool]]:
    """This rank's figures (0-dim) as numbers. And, the same on all ranks: whether a figure is not finite on
    any rank, then for each flag whether it is set on any.

    One small collective, and one wait for the device: until then the host only queues work.
    """
    own = torch.stack([figure.to(device, torch.float64) for figure in figures])
    shared = torch.tensor([False, *flags], dtype=torch.float64).to(device, non_blocking=True)
    shared[0] = own.isfinite().all().logical_not()
    if dist.get_world_size() > 1:
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    numbers = torch.cat([own, shared]).tolist()
    return numbers[: len(figures)], [bool(number) for number in numbers[len(figures) :]]
