"""A model as pipeline stages: each stage's layers, and the exchange of tied embeddings' gradients."""

from types import ModuleType

import torch
import torch.distributed as dist
from torch import nn

from chunkflow.execution.stage import WholeModel
from chunkflow.planning.balance import split_layers
from chunkflow.planning.cost import Cost
from chunkflow.settings import options
from chunkflow.training.parallel import Processes, before_last_backward, to_local


def layers_of_stages(settings: options.Parallelism, args, model: str) -> list[range]:
    """Each stage's layers; one range without a pipeline. `model` is its name in errors.

    ValueError where the numbers of layers and ranks do not fit the schedule.
    """
    ranks, each = settings.pipeline_parallel_degree, settings.pipeline_parallel_layers_per_stage
    if ranks == 1:
        return [range(args.n_layers)]
    interleaved = settings.pipeline_parallel_schedule == "Interleaved1F1B"
    if each is None:
        stages = ranks * (2 if interleaved else 1)
        if stages > args.n_layers:
            raise ValueError(
                f"parallelism.pipeline_parallel_degree = {ranks} makes {stages} stages, but"
                f" {model} has {args.n_layers} layers: lower it"
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


def build_stages(
    family: ModuleType, args, layers: list[range], rank: int, ranks: int
) -> dict[int, nn.Module]:
    """The stages of one pipeline rank, by number: each the whole model without other stages' modules, names
    unchanged."""
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


def sum_tied_gradients(models: dict[int, nn.Module], processes: Processes) -> None:
    """Adds up the gradients of tied embeddings, of the first and of the last pipeline rank.
    Both get the same bits, so that equal optimizer steps keep the copies equal."""
    if processes.pipeline_ranks == 1:
        return
    mesh, device = processes.mesh, processes.device
    for model in models.values():
        end = model.tok_embeddings or model.output
        if end is None or not model.args.tied_embeddings or not end.weight.requires_grad:
            continue
        gradient = to_local(end.weight.grad)
        sent, received = gradient.to(device), torch.empty_like(gradient, device=device)
        group, peer = mesh.get_group("pp"), 0 if model.tok_embeddings is None else mesh.size(0) - 1
        both = [(dist.isend, sent), (dist.irecv, received)]
        operations = [dist.P2POp(kind, tensor, group=group, group_peer=peer) for kind, tensor in both]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        gradient += received.to(gradient.device)


def make_stages(
    models: dict[int, nn.Module], count: int, processes: Processes, hidden_dtype: torch.dtype
) -> list:
    """The runner's stages: one WholeModel, or this rank's ChunkStages of `count` in the pipeline; these pass
    hidden states in `hidden_dtype`."""
    if count == 1:
        return [WholeModel(model, before_last_backward) for model in models.values()]
    from chunkflow.execution.pipeline_stage import ChunkStage  # here: one process needs no pipelining

    device, group = processes.device, processes.mesh.get_group("pp")
    return [
        ChunkStage(model, stage, count, device, group, hidden_dtype, before_last_backward)
        for stage, model in models.items()
    ]
