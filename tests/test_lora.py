"""Low-rank adapters: their gradients equal those of whole sequences, on every layout."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chunkflow.planning.chunks import build_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.settings import options
from chunkflow.training import build, parallel
from chunkflow.training.converters import convert_model
from chunkflow.training.lora import apply_lora, is_adapter, target_modules, without_adapters
from chunkflow.training.start import read_config
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


@pytest.mark.proves("one process + LoRA + k > 1", "one process + LoRA + keep_attention + kv_offload + tied")
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


@pytest.mark.proves(
    "never/always + LoRA + full/selective",
    "never/always + shared + LoRA + tied",
    "never/always + shared + LoRA + selective",
)
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


@pytest.mark.proves("stages + LoRA + tied", "virtual stages + LoRA")
def test_stages_give_the_adapters_gradients_of_whole_sequences():
    assert run_ranks(on_stages, 2) == [6, 4]


@pytest.mark.proves("one process + LoRA + compile + k > 1")
@pytest.mark.quick
def test_compiled_layers_and_the_base_without_adapters():
    """The base is the model as it was before it had adapters, compiled or not."""
    base = small_model("llama3", n_layers=2)
    reference, model = (with_adapters(small_model("llama3", n_layers=2), "llama3") for _ in range(2))
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


@pytest.mark.quick
@pytest.mark.parametrize("family", families)
def test_frozen_weights_get_no_products(family):
    """All matrix products of a step are those that the cost counts, but for the gradient of the first layer's
    input, which nobody needs."""
    model = with_adapters(small_model(family), family)
    tokens, labels = random_sequences([48], 96, 0)[0]
    groups = build_groups([48], 48)
    with FlopCounterMode(display=False) as counter:
        chunked_gradients(model, [(tokens, labels)], groups, 1)
    counted = sum(
        flops for function, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(function)
    )
    args, linears = model.args, [m for m in model.layers["0"].modules() if hasattr(m, "lora_a")]
    adapters = sum(m.lora_a.weight.numel() + m.lora_b.weight.numel() for m in linears)
    cost = Cost.of_model(args, adapters)._replace(per_pair=0.0)
    first = sum(
        m.weight.numel() + m.lora_a.weight.numel()
        for m in (getattr(model.layers["0"].attention, name) for name in ("wq", "wk", "wv"))
    )
    assert counted == cost.training(48) - 48 * 2 * first
    full = Cost.of_model(args)._replace(per_pair=0.0)
    assert cost.training(48) < 0.9 * full.training(48)


@pytest.mark.proves("one process + LoRA + float8/int8")
@pytest.mark.quick
@pytest.mark.parametrize("converter", ["int8", "float8"])
def test_the_base_may_be_multiplied_in_int8_or_float8(converter):
    """Adapters then get gradients close to those without, and nothing else any."""
    sequences, groups = random_sequences([60, 9], 96, 0), build_groups([60, 9], 16)
    got = {}
    for converters in ([], [converter]):
        model = small_model("llama3", torch.float32)
        convert_model(model, converters, options.Float8(emulate=True))
        apply_lora(
            model,
            options.Lora(rank=4),
            families["llama3"],
            options.Training(mixed_precision_param="float32"),
        )
        parallel.init_weights(model, seed=1, chosen=is_adapter)
        _, got[tuple(converters)], _ = chunked_gradients(model, sequences, groups, 1)
    plain, converted = got.values()
    assert plain.keys() == converted.keys() and all(is_adapter(name) for name in plain)
    for name, gradient in plain.items():
        difference = (converted[name] - gradient).norm()
        assert ("lora_b" not in name) or 0 < difference < 0.3 * gradient.norm(), name


def refusal(*overrides):
    with pytest.raises(ValueError) as refused:
        build.check(read_config([f"--lora.{each}" for each in overrides]))
    return str(refused.value)


@pytest.mark.quick
def test_wrong_settings_are_a_sentence(tmp_path):
    for overrides, sentence in (
        (["rank=-1"], "lora.rank = -1 is out of range: choose a value of at least 0"),
        (["alpha=8"], "lora.alpha = 8.0 is not read without adapters: set lora.rank"),
        (["target_modules=wq"], 'lora.target_modules = ["wq"] is not read without adapters'),
        (["base=nf4"], 'lora.base = "nf4" is not read without adapters'),
        (["rank=8", "base=nf4"], 'lora.base = "nf4" is not there: torchao 0.18'),
        (["rank=8", "alpha=0"], "lora.alpha = 0.0 is out of range"),
        (["rank=8", "target_modules=q_proj,lm_head"], '"lm_head", which is no linear layer of the blocks'),
        ([f"adapter_path={tmp_path}"], "adapter_config.json cannot be read"),
    ):
        assert sentence in refusal(*overrides)
    path, good = tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    good |= {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": True, "lora_dropout": 0.1}
    for change, sentence in (
        ({"use_dora": True}, "use_dora = True asks for DoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"rank_pattern": {"q_proj": 4}}, "ranks that differ between layers"),
        ({"alpha_pattern": {"q_proj": 4}}, "scales that differ between layers"),
        ({"modules_to_save": ["lm_head"]}, "modules that are trained whole"),
        ({"bias": "all"}, "biases that are trained"),
        ({"peft_type": "IA3"}, "another kind of adapter"),
        ({"init_lora_weights": "pissa"}, "an initialisation that changes the base"),
        ({"r": 0}, "r = 0 is not a whole number of at least 1"),
        ({"target_modules": ".*proj"}, "is no list of names"),
        ({"target_modules": ["c_attn"]}, '"c_attn", which is no linear layer'),
    ):
        path.write_text(json.dumps(good | change))
        assert sentence in refusal(f"adapter_path={tmp_path}"), change
    path.write_text(json.dumps(good))
    here = f"adapter_path={tmp_path}"
    assert "lora.rank = 4 is not that of the adapter in lora.adapter_path, 8" in refusal(here, "rank=4")
    assert "lora.alpha = 4 is not that of the adapter" in refusal(here, "alpha=4")
    assert "are not those of the adapter" in refusal(here, "target_modules=wq")
    config = read_config([f"--lora.{here}", "--lora.target_modules=wo,wq", "--lora.rank=8"])
    build.check(config)
    assert config.lora.alpha == 16
