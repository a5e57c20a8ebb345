"""Low-rank adapters: their gradients equal those of whole sequences, on every layout."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from chunkflow.planning.chunks import build_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.settings import options
from chunkflow.training import parallel
from chunkflow.training.lora import target_modules, without_adapters
from models import families
from tests.helpers.layouts import (
    Pipeline,
    join,
    layout_config,
    sharded_gradients,
    small_model,
    with_adapters,
)
from tests.helpers.processes import run_ranks
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    chunked_gradients,
    random_lengths,
    random_sequences,
    runner_of,
    whole_sequence_gradients,
)


@pytest.mark.quick
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("targets", [(), ("q_proj",), ("wk", "w2"), ("mlp.up_proj",)])
def test_chunks_give_the_adapters_gradients_of_whole_sequences(family, targets):
    for seed in range(3):
        rng = random.Random(f"{family}/{targets}/{seed}")
        model = with_adapters(small_model(family, tied_embeddings=bool(seed % 2)), family, targets)
        lengths = random_lengths(rng, 90)
        sequences = random_sequences(lengths, 96, seed)
        loss, expected = whole_sequence_gradients(model, sequences)
        k, groups = rng.choice([1, 2, 100]), build_groups(lengths, rng.randint(1, 40))
        keep = rng.choice(["none", "device", "host"])
        ours, got, result = chunked_gradients(
            model, sequences, groups, k, keep_attention=keep, kv_offload=bool(seed % 2)
        )
        assert abs(ours - loss) <= 1e-10 * loss
        assert_same_gradients(got, expected, 1e-10)
        assert (
            len(expected)
            == 2 * len(targets or target_modules(options.Lora(), families[family], model.args)) * 3
        )


def on_ranks():
    """Two ranks: both ways to gather, recomputed layers, sequences that ranks share."""
    config = layout_config()
    processes = join(config)
    checked = 0
    for reshard in ("never", "always"):
        for mode, targets in (("none", ()), ("full", ("wq", "w2")), ("selective", ("w1",)), ("op", ())):
            config = layout_config(reshard=reshard, mode="selective" if mode == "op" else mode)
            config.activation_checkpoint.selective_ac_option = "op" if mode == "op" else "2"
            family = "qwen3" if mode == "none" else "llama3"
            tied = {"tied_embeddings": mode == "none"}
            reference, model = (with_adapters(small_model(family, **tied), family, targets) for _ in range(2))
            parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
            parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard == "always")
            for seed in range(2 if mode == "none" else 1):
                rng = random.Random(f"{reshard}/{mode}/{seed}")
                lengths = [rng.randint(60, 200), *random_lengths(rng, 60)] if seed else [70]
                sequences = random_sequences(lengths, 96, seed)
                loss, expected = whole_sequence_gradients(reference, sequences)
                shared = {"spread_over": 2, "kv_tokens": 60} if mode in ("none", "op") else {}
                more = shared | {"blocks": processes.blocks}
                got_loss, got = sharded_gradients(
                    model, lengths, sequences, config, rng.choice([1, 2, 9]), **more
                )
                assert abs(got_loss - loss) <= 1e-10 * loss
                assert_same_gradients(got, expected, 1e-10)
                assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
                checked += 1
    return checked


def test_ranks_give_the_adapters_gradients_of_one_process():
    assert run_ranks(on_ranks, 2) == [10] * 2


def on_stages():
    """Two stages: evenly cut; the last with the head alone, which has nothing to train; two stages a rank."""
    config = layout_config()
    config.parallelism.pipeline_parallel_degree = 2
    mesh, checked = join(config).mesh, 0
    for bounds, virtual, targets in (
        (None, 1, ()),
        ([0, 4, 4], 1, ("wk",)),
        (None, 2, ("q_proj", "down_proj")),
    ):
        family = "qwen3" if virtual == 1 else "llama3"
        whole = with_adapters(
            small_model(family, n_layers=4, tied_embeddings=family == "qwen3"), family, targets
        )
        pipeline = Pipeline(family, mesh, virtual, whole, bounds=bounds, targets=targets)
        for seed in range(2):
            rng = random.Random(f"{bounds}/{virtual}/{seed}")
            lengths = random_lengths(rng, 130) if seed else [90]
            sequences = random_sequences(lengths, 96, seed)
            loss, expected = whole_sequence_gradients(whole, sequences)
            got_loss, got, _ = pipeline.step(pipeline.plan(lengths, rng.choice([1, 2])), sequences)
            assert abs(got_loss - loss) <= 1e-10 * loss
            if got:
                assert_same_gradients(got, {name: expected[name] for name in got}, 1e-10)
            norm = parallel.clip_grad_norm(pipeline.models.values(), 1e9, mesh)
            whole_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            torch.testing.assert_close(norm.double(), whole_norm, rtol=1e-6, atol=0)
            checked += len(got) > 0
    return checked


def test_stages_give_the_adapters_gradients_of_whole_sequences():
    assert run_ranks(on_stages, 2) == [6, 4]


@pytest.mark.quick
def test_compiled_layers_and_the_base_without_adapters():
    """The base is the model as it was before it had adapters, compiled or not."""
    base = small_model("llama3")
    reference, model = (with_adapters(small_model("llama3"), "llama3") for _ in range(2))
    parallel.apply_compile(model, options.Compile(enable=True, backend="aot_eager"))
    lengths = [60, 9, 12]
    sequences, groups = random_sequences(lengths, 96, 0), build_groups(lengths, 16)
    for k in (1, 9):
        loss, expected = whole_sequence_gradients(reference, sequences)
        ours, got, _ = chunked_gradients(model, sequences, groups, k)
        assert abs(ours - loss) <= 1e-10 * loss
        assert_same_gradients(got, expected, 1e-10)
    loss, _ = whole_sequence_gradients(base, sequences)
    plan = plan_step(lengths, PlanSettings(Cost.of_model(model.args), chunk_size=16, forward_only=True))
    ((program,),), groups = plan.programs.values(), plan.groups[0]
    for adapted in (reference, model):
        losses = []
        for context in (without_adapters([adapted]), nullcontext()):
            with context:
                found = []
                runner_of(adapted).evaluate(
                    program,
                    groups,
                    chunk_tensors(groups, sequences),
                    lambda _, losses_T: found.append(losses_T.sum()),
                )
                losses.append(sum(found) / sum(int((labels != -100).sum()) for _, labels in sequences))
        assert abs(losses[0] - loss) <= 1e-10 * loss < abs(losses[1] - loss)
