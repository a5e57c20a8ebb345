"""Pipelines, alone and times FSDP2: loss and every gradient equal whole sequences in one process, within the
memory bounds."""

from __future__ import annotations

import copy
import inspect
import math
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.distributed.pipelining.stage import _RecvInfo

from chunkflow.execution.loss import loss_sum
from chunkflow.execution.pipeline_stage import ChunkStage
from chunkflow.execution.state import KeyValueState
from chunkflow.planning.pipeline_schedule import live_limit
from chunkflow.planning.schedule import Action, Kind
from chunkflow.training import parallel, stages
from models import families
from tests.helpers.layouts import Pipeline, join, small_model
from tests.helpers.processes import run_ranks
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    random_lengths,
    random_sequences,
    whole_sequence_gradients,
)

LAYOUTS = [((2, 1), 1), ((2, 1), 2), ((4, 1), 1), ((2, 2), 1)]  # stages x replicas, stages of a rank


def cases(layout):
    """Each layout has each of the special steps, with another family than the layout before; and two random
    steps of each family."""
    join()
    shape, virtual = LAYOUTS[layout]
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp_shard"))
    checked = 0
    for place_of_family, family in enumerate(families):
        whole = small_model(family, n_layers=5, tied_embeddings=family != "llama3")
        pipeline = Pipeline(family, mesh, virtual, whole)
        count = len(pipeline.layers)
        for seed in ((place_of_family + layout) % 3, 3, 4):
            rng = random.Random(f"{family}/{seed}/{shape}/{virtual}")
            # one sequence leaves other replicas without work; many short ones are many chunks in flight
            lengths = [70] if seed == 0 else [15] * 20 if seed == 1 else random_lengths(rng, 130)
            k, enable = 1 if seed == 1 else rng.choice([1, 2, 99]), seed != 2
            sequences = random_sequences(lengths, 96, seed)
            loss, expected = whole_sequence_gradients(whole, sequences)
            plan = pipeline.plan(lengths, k, enable, rng.choice(["cost", "tokens"]))
            got_loss, got, result = pipeline.step(plan, sequences)
            assert abs(got_loss - loss) <= 1e-10 * max(loss, 1e-30)
            assert_same_gradients(got, {name: expected[name] for name in got}, 1e-10)
            longest = max((len(group.chunks) for group in plan.groups[pipeline.replica]), default=1)
            k = k if enable else 1

            def in_flight(stage):  # a standalone chunk is never discarded
                return live_limit(k, count, stage) + (2 * longest + count if longest > 1 else 0)

            for place, stage in enumerate(pipeline.models):
                assert (
                    bool(plan.groups[pipeline.replica])
                    <= result.live_chunks[place]
                    <= live_limit(k, count, stage)
                )
                assert result.stage_inputs[place] <= (in_flight(stage - 1) if stage else 0)
            arriving = [
                (in_flight(stage - 1) if stage else 0) + in_flight(stage) for stage in pipeline.models
            ]
            assert result.receive_buffers <= sum(arriving)
            checked += 1
    return checked


@pytest.mark.proves(
    "stages/virtual stages/stages x ranks + k > 1",
    "stages/virtual stages/stages x ranks + no_enable",
    "stages/virtual stages/stages x ranks + tied",
)
@pytest.mark.parametrize("layout", range(len(LAYOUTS)), ids=map(str, LAYOUTS))
def test_stages_give_the_gradients_of_whole_sequences(layout):
    ranks = math.prod(LAYOUTS[layout][0])
    assert run_ranks(cases, ranks, layout) == [9] * ranks


def tied_steps(shape):
    """Three clipped AdamW steps of a tied model; this rank's norms, and what it holds of the embeddings'
    weight and the others."""
    join()
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp_shard"))
    whole = small_model("qwen3", n_layers=4, tied_embeddings=True)
    pipeline = Pipeline("qwen3", mesh, 1, whole)
    optimizer = torch.optim.AdamW(
        [p for model in pipeline.models.values() for p in model.parameters()], lr=1e-2
    )
    norms = []
    for seed in range(3):
        lengths = random_lengths(random.Random(seed), 130)
        pipeline.step(pipeline.plan(lengths, 1), random_sequences(lengths, 96, seed))
        norms.append(parallel.clip_grad_norm(pipeline.models.values(), 0.5, mesh).item())
        optimizer.step()
    (model,) = pipeline.models.values()
    return norms, {
        name: parameter.full_tensor().detach().numpy() for name, parameter in model.named_parameters()
    }


@pytest.mark.proves("stages/stages x ranks + tied")
def test_tied_embeddings_and_the_gradient_norm_over_stages():
    whole = small_model("qwen3", n_layers=4, tied_embeddings=True)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    norms = []
    for seed in range(3):
        lengths = random_lengths(random.Random(seed), 130)
        whole_sequence_gradients(whole, random_sequences(lengths, 96, seed))
        norms.append(torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5).item())
        optimizer.step()
    for shape in ((3, 1), (2, 2)):
        answers = run_ranks(tied_steps, shape[0] * shape[1], shape)
        assert all(answer[0] == pytest.approx(norms, rel=1e-9) for answer in answers)
        first, last = answers[0][1], answers[-1][1]
        assert (first["tok_embeddings.weight"] == last["output.weight"]).all(), "both copies stay the same"
        for name, weight in whole.named_parameters():
            got = next(answer[1][name] for answer in answers if name in answer[1])
            torch.testing.assert_close(torch.from_numpy(got), weight.detach(), rtol=0, atol=1e-8)


def torch_csv(program) -> str:
    """The actions in the form that torch.distributed.pipelining reads ("compute_only"), a line a rank.

    Its micro-batches are numbered in the order of their forwards, which all stages share. Both kinds of
    forward are F, and a recompute is part of B, as torch has no words for them: run by torch, every chunk
    keeps its activations.
    """
    first = program[0][0].stage
    forwards = [entry for entry in program[0] if isinstance(entry, Action) and entry.stage == first]
    forwards = [entry[1:3] for entry in forwards if entry.kind in (Kind.FORWARD, Kind.FORWARD_STATE)]
    number = {chunk: place for place, chunk in enumerate(forwards)}
    lines = []
    for entries in program:
        actions = [
            entry for entry in entries if isinstance(entry, Action) and entry.kind is not Kind.RECOMPUTE
        ]
        cells = [
            f"{a.stage}{'B' if a.kind is Kind.BACKWARD else 'F'}{number[a.group, a.chunk]}" for a in actions
        ]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def by_torchs_own_runtime(virtual, folder):
    """The exported order under torch's runtime, which splits nothing here: chunks and metadata are given one
    by one."""
    join()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("pp", "dp_shard"))
    whole = small_model("llama3", n_layers=5)
    pipeline = Pipeline("llama3", mesh, virtual, whole)
    count, rank = len(pipeline.layers), pipeline.rank
    lengths = [64, 16, 32, 16, 48, 16, 16]  # all chunks are full: torch's buffers have one size
    for k in (99, 1):
        sequences = random_sequences(lengths, 96, k)
        targets = sum(int((labels != -100).sum()) for _, labels in sequences)
        plan = pipeline.plan(lengths, k)
        (groups,) = plan.groups
        path = folder / f"{k}_{rank}.csv"
        path.write_text(torch_csv(plan.programs[0]))
        hidden = torch.empty(16, whole.args.dim, dtype=torch.float64, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.float64, device="meta", requires_grad=True)
        models = stages.build_stages(families["llama3"], whole.args, pipeline.layers, rank, pipeline.ranks)
        torch_stages = []
        for stage, model in models.items():
            model.to(torch.float64).load_state_dict(
                {name: whole.state_dict()[name] for name in model.state_dict()}
            )
            ends = {
                "input_args": hidden if stage else torch.empty(16, dtype=torch.int64, device="meta"),
                "output_args": hidden if stage < count - 1 else loss,
            }
            stage_of_model = PipelineStage(
                Keywords(model), stage, count, torch.device("cpu"), group=mesh.get_group("pp"), **ends
            )
            torch_stages.append(stage_of_model)
        chunks = chunk_tensors(groups, sequences)
        first = plan.programs[0][0][0].stage
        order = [
            entry[1:3]
            for entry in plan.programs[0][0]
            if isinstance(entry, Action) and entry.stage == first and entry.kind.value in "FS"
        ]
        states = {
            group: KeyValueState(groups[group])
            for group in range(len(groups))
            if len(groups[group].chunks) > 1
        }
        ordered = []
        for group, number in order:
            chunks[group][number].end = loss_sum
            chunks[group][number].state = states.get(group)  # of all stages of this rank: layers differ
            ordered.append(chunks[group][number])
        runtime = _PipelineScheduleRuntime(
            torch_stages,
            n_microbatches=len(ordered),
            loss_fn=lambda output, target: output / targets,
            scale_grads=False,
        )
        runtime._load_csv(str(path))
        for stage_of_model in torch_stages:
            stage_of_model.has_backward = True
            stage_of_model.clear_runtime_states()
        losses = []
        runtime._step_microbatches(
            [(chunk.tokens,) for chunk in ordered],
            [{"chunk": chunk} for chunk in ordered],
            [None] * len(ordered),
            losses,
            return_outputs=False,
        )
        _, ours, _ = pipeline.step(plan, sequences)
        theirs = {name: p.grad for model in models.values() for name, p in model.named_parameters()}
        assert theirs.keys() == ours.keys()
        assert_same_gradients(theirs, ours, 1e-12)
        _, expected = whole_sequence_gradients(whole, sequences)
        assert_same_gradients(theirs, {name: expected[name] for name in theirs}, 1e-10)
    return True


class Keywords(torch.nn.Module):
    """A stage of a model, for torch's runtime."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, chunk):
        return self.model(x, copy.copy(chunk))


@pytest.mark.proves("stages/virtual stages + chunks")
@pytest.mark.parametrize("virtual", [1, 2])
def test_torchs_own_runtime_gives_the_same_gradients(virtual, tmp_path):
    assert run_ranks(by_torchs_own_runtime, 2, virtual, tmp_path) == [True] * 2


# What ChunkStage relies on, besides what torch documents.
PRIVATE_PARTS = {
    (PipelineStage, "forward_one_chunk"): "self, fwd_chunk_id, args, kwargs, save_forward_output",
    (PipelineStage, "backward_one_chunk"): "self, bwd_chunk_id, loss, full_backward, last_backward",
    (PipelineStage, "backward_maybe_with_nosync"): "self, backward_type, bwd_kwargs, last_backward",
    (PipelineStage, "get_fwd_recv_ops"): "self, fwd_chunk_id",
    (PipelineStage, "get_bwd_recv_ops"): "self, bwd_chunk_id",
    (PipelineStage, "get_fwd_send_ops"): "self, fwd_chunk_id",
    (PipelineStage, "get_bwd_send_ops"): "self, bwd_chunk_id",
    (PipelineStage, "clear_runtime_states"): "self",
    (PipelineStage, "_setup_forward_send_info"): "self",
    (_RecvInfo, "__init__"): "self, input_name, source, buffer, tensor_meta, is_root_arg",
}


def test_this_torch_has_the_private_parts_that_the_runtime_uses():
    assert torch.__version__.startswith("2.13."), (
        "another torch: read what changed in torch/distributed/pipelining/stage.py"
    )
    for (owner, name), expected in PRIVATE_PARTS.items():
        found = (
            ", ".join(inspect.signature(getattr(owner, name)).parameters) if hasattr(owner, name) else "gone"
        )
        assert found == expected, f"torch {torch.__version__}: {owner.__name__}.{name} has changed"
    join()
    try:
        model = small_model("llama3")
        stage = ChunkStage(
            model, 0, 2, torch.device("cpu"), dist.group.WORLD, torch.float64, parallel.before_last_backward
        )
        attributes = (
            "args_recv_info grad_recv_info fwd_cache bwd_cache act_send_info grad_send_info chunks"
            " has_backward"
        )
        for name in attributes.split() + ["_user_meta", "_stage_meta", "_runtime_validate"]:
            assert name in vars(PipelineStage(model, 0, 2, torch.device("cpu"))) or hasattr(
                PipelineStage, name
            ), name
        assert stage._stage_meta.outputs[0].requires_grad, "received activations would not get a gradient"
        assert stage.act_send_info == {0: [1]}
    finally:
        dist.destroy_process_group()
