"""Small models on ranks and stages, as the recipe lays them out."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from chunkflow.execution.runner import Runner
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.room import Room
from chunkflow.settings.options import Config, Lora, Training
from chunkflow.training import parallel, prediction, stages
from chunkflow.training.lora import apply_lora, is_adapter
from models import families
from tests.helpers.reference import chunk_tensors, runner_of

SMALL = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "hidden_dim": 48,
    "vocab_size": 96,
}


def small_model(family, dtype=torch.float64, **changes):
    module = families[family]
    model = module.Transformer(dataclasses.replace(module.flavors["debugmodel"], **{**SMALL, **changes}))
    parallel.init_weights(model, seed=1)
    with torch.no_grad():  # larger than a real start, so that attention is far from uniform
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
            else:  # norms and biases away from 1 and 0
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    return model.to(dtype)


def with_adapters(model, family, targets=(), rank=3):
    """The model, in fp64, with adapters of which no part is zero."""
    fp64 = Training(dtype="float64", mixed_precision_param="float64")
    apply_lora(model, Lora(rank=rank, target_modules=list(targets)), families[family], fp64)
    parallel.init_weights(model, seed=1, chosen=is_adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b.weight"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def layout_config(reshard="always", replicas=1, param="float64", mode="none", offload=False) -> Config:
    """Of a small run; `replicas` of the sharded model (HSDP)."""
    config = Config()
    config.comm.init_timeout_seconds = config.comm.train_timeout_seconds = 60
    config.training.mixed_precision_param = param
    config.training.mixed_precision_reduce = "float64" if param == "float64" else "float32"
    config.training.enable_cpu_offload = offload
    config.parallelism.data_parallel_replicate_degree = replicas
    config.parallelism.fsdp_reshard_after_forward = reshard
    config.activation_checkpoint.mode = mode
    config.activation_checkpoint.selective_ac_option = "2"
    return config


def room_of(args, config: Config, layers=None, replicas=1, adapts=("k", "kv_offload")) -> Room:
    """Of a model of llama3's, with a budget of 0 bytes. `layers`: of each stage, one a rank."""
    stages = layers or [range(args.n_layers)]
    config.parallelism.pipeline_parallel_degree = len(stages)
    sizes = prediction.stage_sizes(config, families["llama3"], args, stages, replicas)
    return Room(sizes, [0] * len(stages), config.chunkflow.chunk_size, frozenset(adapts))


def join(config: Config | None = None) -> parallel.Processes:
    config = config or layout_config()
    return parallel.init_processes(config.comm, config.parallelism)


class Weighed(NamedTuple):
    """How a step's losses count: `token_weights` of each sequence's targets, the weight of each sequence, the
    denominator. With them the loss of each sequence is asked for."""

    token_weights: list[torch.Tensor]
    sequence_weights: torch.Tensor
    denominator: float


def sharded_gradients(
    model,
    lengths,
    sequences,
    config,
    k=1,
    balance="cost",
    chunk_size=16,
    blocks=None,
    weighed=None,
    keep_attention="none",
    kv_offload=False,
    **more,
):
    """One step of this rank; returns the global loss and whole gradients, with `weighed` (a Weighed) also the
    loss of each sequence."""
    reshard = config.parallelism.fsdp_reshard_after_forward == "always"
    rank, ranks = dist.get_rank(), dist.get_world_size()
    options = {"chunk_size": chunk_size, "k": k, "balance": balance, "lockstep": reshard, **more}
    plan = plan_step(lengths, PlanSettings(Cost.of_model(model.args), ranks, **options), [rank])
    targets = max(1, sum(int((labels != -100).sum()) for _, labels in sequences))
    parallel.begin_step(model, reshard)
    ((program,),) = plan.programs.values()
    groups = plan.groups[rank]
    arguments = {"blocks": blocks, "keep_attention": keep_attention, "kv_offload": kv_offload}
    runner = runner_of(model, parallel.before_last_backward, **arguments)
    own = {"kv_offload": plan.kv_offload == "host"} if "room" in more else {}
    result, denominator = run_step(runner, program, groups, sequences, targets, weighed, **own)
    dist.all_reduce(result.loss_sum)
    whole = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    assert max(result.live_chunks) <= max((limit for own in plan.k for limit in own), default=k)
    assert "room" in more or all(limit == k for own in plan.k for limit in own)
    loss = result.loss_sum.item() / denominator
    return (loss, whole, result.loss_of_sequences) if weighed else (loss, whole)


def run_step(runner, program, groups, sequences, targets, weighed=None, **more):
    """The runner's result, and what sums of losses are to be divided by."""
    if not weighed:
        return runner.step(program, groups, chunk_tensors(groups, sequences), targets, **more), targets
    chunks = chunk_tensors(groups, sequences, weighed.token_weights)
    counts = weighed.denominator, weighed.sequence_weights
    result = runner.step(program, groups, chunks, *counts, sequences=len(sequences), **more)
    dist.all_reduce(result.loss_of_sequences)
    return result, weighed.denominator


class Pipeline:
    """This rank's stages of a small model, with the weights of `whole`, on a ("pp", "dp_shard") mesh."""

    def __init__(
        self,
        family,
        mesh,
        virtual,
        whole,
        dtype=torch.float64,
        blocks=None,
        bounds=None,
        targets=None,
        **more,
    ):
        """`bounds`: where stages begin and end, in layers, if not evenly; `targets`: `whole` has adapters on
        these layers; `more`: of the runner."""
        self.mesh, self.whole = mesh, whole
        self.rank, self.ranks = mesh.get_local_rank("pp"), mesh.size(0)
        self.replica, self.replicas = mesh.get_local_rank("dp_shard"), mesh.size(1)
        device, rank, count = torch.device("cpu"), dist.get_rank(), dist.get_world_size()
        own = self.rank, self.ranks, self.replica, self.replicas
        self.processes = parallel.Processes(device, mesh, rank, count, *own, blocks or {})
        args, count = whole.args, self.ranks * virtual
        bounds = bounds or [stage * args.n_layers // count for stage in range(count + 1)]
        self.layers = [range(*pair) for pair in zip(bounds, bounds[1:])]
        self.models = stages.build_stages(families[family], args, self.layers, self.rank, self.ranks)
        weights = whole.state_dict()
        for model in self.models.values():
            model.to(dtype)
            if targets is not None:
                with_adapters(model, family, targets)
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
            parallel.apply_fsdp(model, mesh["dp_shard"], layout_config().training, False)
        self.stages = stages.make_stages(self.models, count, self.processes, dtype)
        self.runner = Runner(self.stages, device, blocks=self.processes.blocks, **more)

    def plan(self, lengths, k, enable=True, balance="cost", chunk_size=16, forward_only=False, **more):
        last = len(self.layers) - 1
        costs = [Cost.of_layers(self.whole.args, len(own), s == last) for s, own in enumerate(self.layers)]
        options = {"balance": balance, "forward_only": forward_only, **more}
        options |= {"stages": tuple(costs), "pipeline_ranks": self.ranks}
        cost = Cost.of_model(self.whole.args)
        settings = PlanSettings(cost, self.replicas, enable, chunk_size, k, **options)
        return plan_step(lengths, settings, [self.replica])

    def program(self, plan):
        return plan.programs[self.replica][self.rank]

    def step(self, plan, sequences, weighed=None, **more):
        """Loss of all replicas, this rank's gradients by name, and the counters. `more`: of the runner's
        step."""
        targets = sum(int((labels != -100).sum()) for _, labels in sequences)
        for model in self.models.values():
            model.zero_grad()
            parallel.begin_step(model, False)
        groups, program = plan.groups[self.replica], self.program(plan)
        counts = max(targets, 1), weighed
        result, denominator = run_step(self.runner, program, groups, sequences, *counts, **more)
        stages.sum_tied_gradients(self.models, self.processes)
        dist.all_reduce(result.loss_sum)
        gradients = {}
        for model in self.models.values():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    assert parameter.grad is None
                    continue
                assert isinstance(parameter.grad, DTensor)
                tied = name == "output.weight" and model.args.tied_embeddings
                gradients["tok_embeddings.weight" if tied else name] = parameter.grad.full_tensor()
        return result.loss_sum.item() / denominator, gradients, result
