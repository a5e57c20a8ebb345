"""A model as pipeline stages: which layers are whose, and what stages must agree on once their backwards are
done."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from chunkflow.planning.balance import split_layers
from chunkflow.planning.cost import Cost
from chunkflow.training import parallel


def layers_of_stages(config, args) -> list[range]:
    """Each stage's layers. ValueError where layers, ranks and schedule do not go together."""
    settings = config.parallelism
    ranks, each = settings.pipeline_parallel_degree, settings.pipeline_parallel_layers_per_stage
    interleaved = settings.pipeline_parallel_schedule == "Interleaved1F1B"
    if each is None:
        stages = ranks * (2 if interleaved else 1)
        if stages > args.n_layers:
            raise ValueError(
                f"parallelism.pipeline_parallel_degree = {ranks} makes {stages} stages, but"
                f" {config.model.name} {config.model.flavor} has {args.n_layers} layers: lower it"
            )
        layer = Cost.of_layers(args, 1, head=False).per_token
        counts = split_layers(args.n_layers, Cost.of_layers(args, 0, head=True).per_token / layer, stages)
    else:
        stages = -(-args.n_layers // each)
        if stages % ranks or (stages > ranks) != interleaved:
            wanted = f"a multiple of {ranks}, at least {2 * ranks}" if interleaved else str(ranks)
            raise ValueError(
                f"parallelism.pipeline_parallel_layers_per_stage = {each} makes {stages} stages of"
                f" {args.n_layers} layers, but {settings.pipeline_parallel_schedule} on {ranks} ranks needs"
                f" {wanted}: change it, or leave it out"
            )
        counts = [each] * (stages - 1) + [args.n_layers - each * (stages - 1)]
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts)]


def stage_costs(args, layers: list[range]) -> list[Cost]:
    return [Cost.of_layers(args, len(own), head=stage == len(layers) - 1) for stage, own in enumerate(layers)]


def build_stages(
    family: ModuleType, args, layers: list[range], rank: int, ranks: int
) -> dict[int, nn.Module]:
    """The stages of one pipeline rank, by number: the whole model with the others' layers and ends deleted,
    names unchanged."""
    models = {}
    for stage in range(rank, len(layers), ranks):
        model = models[stage] = family.Transformer(args)
        for name in list(model.layers):
            if int(name) not in layers[stage]:
                del model.layers[name]
        if stage > 0:
            model.tok_embeddings = None
        if stage < len(layers) - 1:
            model.norm = model.output = None
    return models


def sum_tied_gradients(models: dict[int, nn.Module], mesh: DeviceMesh, device: torch.device) -> None:
    """Where the head is the embeddings' weight, the first and the last rank hold a copy each. They exchange
    its gradients and add them up, which gives both the same bits; equal optimizer steps then keep the copies
    equal."""
    for model in models.values():
        end = model.tok_embeddings or model.output
        if end is None or not model.args.tied_embeddings:
            continue
        gradient = end.weight.grad
        own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        sent, received = own.to(device), torch.empty_like(own, device=device)
        group, peer = mesh.get_group("pp"), 0 if model.tok_embeddings is None else mesh.size(0) - 1
        both = [(dist.isend, sent), (dist.irecv, received)]
        operations = [dist.P2POp(kind, tensor, group=group, group_peer=peer) for kind, tensor in both]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        own += received.to(own.device)


def clip_grad_norm(models: dict[int, nn.Module], max_norm: float, mesh: DeviceMesh) -> torch.Tensor:
    """Scales gradients so that their norm over all stages is at most `max_norm`; returns the norm before, the
    same on all ranks.

    The second copy of tied embeddings is scaled like the first, but counts once.
    """
    counted, parameters = [], []
    for model in models.values():
        parameters += model.parameters()
        named = parallel.named_parameters([model])
        if model.tok_embeddings is None:
            named.pop("tok_embeddings.weight", None)
        counted += [parameter.grad for parameter in named.values() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(counted)
    squared = (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
    dist.all_reduce(squared, group=mesh.get_group("pp"))
    norm = squared.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
