"""FSDP2 ranks with unequal plans: loss and every gradient equal whole sequences in one process."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunkflow.training import parallel
from models import families
from tests.helpers.layouts import join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import run_ranks
from tests.helpers.reference import (
    assert_same_gradients,
    random_lengths,
    random_sequences,
    whole_sequence_gradients,
)


def cases(replicas):
    config = layout_config(replicas=replicas)
    mesh = join(config).mesh
    checked = 0
    for reshard in ("never", "always"):
        for mode in ("none", "full", "selective"):
            config = layout_config(replicas=replicas, reshard=reshard, mode=mode)
            reference = small_model("llama3")
            model = small_model("llama3")
            parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
            parallel.apply_fsdp(model, mesh, config.training, reshard == "always")
            for seed in range(3 if mode == "none" else 1):
                rng = random.Random(f"{dist.get_world_size()}/{replicas}/{reshard}/{mode}/{seed}")
                # one sequence: other ranks have no chunk
                lengths = random_lengths(rng, 90) if seed or mode != "none" else [70]
                sequences = random_sequences(lengths, 96, seed)
                loss, expected = whole_sequence_gradients(reference, sequences)
                balance = rng.choice(["cost", "tokens"])
                got_loss, got = sharded_gradients(
                    model, lengths, sequences, config, rng.choice([1, 2, 9]), balance
                )
                assert abs(got_loss - loss) <= 1e-10 * loss
                assert_same_gradients(got, expected, 1e-10)
                checked += 1
    return checked


@pytest.mark.proves("never/always + full/selective/k > 1", "HSDP + never/always + full/selective/k > 1")
@pytest.mark.parametrize("world_size, replicas", [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2)])
def test_ranks_give_the_gradients_of_one_process(world_size, replicas):
    assert run_ranks(cases, world_size, replicas) == [10] * world_size


def other_precisions():
    mesh = join().mesh
    lengths = [70, 20, 8, 30]
    sequences = random_sequences(lengths, 96, 0)
    _, expected = whole_sequence_gradients(small_model("llama3"), sequences)
    errors = {}
    for name, changes in {
        "float32": {"param": "float32"},
        "bfloat16": {"param": "bfloat16"},
        "offload": {"param": "float32", "offload": True},
    }.items():
        for reshard in ("never", "always"):
            config = layout_config(reshard=reshard, **changes)
            model = small_model("llama3", torch.float32)
            parallel.apply_fsdp(model, mesh, config.training, reshard == "always")
            _, got = sharded_gradients(model, lengths, sequences, config)
            assert all(gradient.dtype == torch.float32 for gradient in got.values())
            errors[name, reshard] = max(float((got[n] - g).norm() / g.norm()) for n, g in expected.items())
    return errors


@pytest.mark.proves("never/always + bf16/cpu_offload")
def test_precisions_and_offload():
    """fp32 to 1e-5; bf16 compute with fp32 reduction within what bf16 itself costs; CPU offload changes
    nothing."""
    errors = run_ranks(other_precisions, 2)[0]
    assert all(error < (1e-1 if name == "bfloat16" else 1e-5) for (name, _), error in errors.items()), errors


def clipped_norms():
    mesh = join().mesh
    model = small_model("llama3")
    parallel.apply_fsdp(model, mesh, layout_config().training, False)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    norm = parallel.clip_grad_norm([model], 1.5, mesh)
    after = torch.stack([parameter.grad.full_tensor().norm() for parameter in model.parameters()]).norm()
    return float(norm), float(after)


def test_gradient_clipping_is_global():
    norm = float(
        torch.stack([parameter.detach().norm() for parameter in small_model("llama3").parameters()]).norm()
    )
    for before, after in run_ranks(clipped_norms, 3):
        assert before == pytest.approx(norm) and after == pytest.approx(1.5)


def start_weights(replicas):
    mesh = join(layout_config(replicas=replicas)).mesh
    family = families["qwen3"]
    with torch.device("meta"):
        model = family.Transformer(family.flavors["debugmodel"])
    parallel.apply_fsdp(model, mesh, layout_config(replicas=replicas).training, True)
    model.to_empty(device="cpu")
    parallel.init_weights(model, seed=5)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {
        name: float(parameter.full_tensor().double().sum()) for name, parameter in model.named_parameters()
    }


def test_one_start_for_all_layouts():
    family = families["qwen3"]
    model = family.Transformer(family.flavors["debugmodel"])
    parallel.init_weights(model, seed=5)
    expected = {name: float(parameter.double().sum()) for name, parameter in model.named_parameters()}
    for world_size, replicas in ((3, 1), (4, 2)):
        assert run_ranks(start_weights, world_size, replicas) == [expected] * world_size


def drawn_and_kept():
    parallel.DRAWN_AT_ONCE = 2048  # small against a shard
    mesh, family = join(layout_config()).mesh, families["qwen3"]
    with torch.device("meta"):
        model = family.Transformer(family.flavors["debugmodel"])
    parallel.apply_fsdp(model, mesh, layout_config().training, True)
    model.to_empty(device="cpu")
    fill, drawn = model.init_parameter, []

    def counted(name, rows, generator):
        drawn.append(rows.numel())
        fill(name, rows, generator)

    model.init_parameter = counted
    parallel.init_weights(model, seed=5)
    kept = [parameter.to_local().numel() for parameter in model.parameters()]
    return sum(drawn), sum(kept), len(kept)


def test_a_rank_draws_the_initial_weights_that_it_keeps():
    """But for the other rows of the blocks at both ends of its shards."""
    for drawn, kept, parameters in run_ranks(drawn_and_kept, 4):
        assert 1_000_000 < kept <= drawn <= kept + 2 * 2048 * parameters


def recorded_collectives(reshard):
    """The name and size of every collective of this rank over a few random steps, in order."""

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            if function.namespace in ("c10d", "_c10d_functional"):
                self.calls.append(
                    (str(function), [tuple(a.shape) for a in arguments if isinstance(a, torch.Tensor)])
                )
            return function(*arguments, **(kwargs or {}))

    config = layout_config(reshard=reshard)
    mesh = join(config).mesh
    model = small_model("llama3")
    parallel.apply_fsdp(model, mesh, config.training, reshard == "always")
    recorder = Recorder()
    for seed in range(6):
        lengths = random_lengths(random.Random(seed), 90)
        sequences = random_sequences(lengths, 96, seed)
        with recorder:
            sharded_gradients(model, lengths, sequences, config, k=1 + seed % 3)
    return recorder.calls


@pytest.mark.parametrize("reshard", ["never", "always"])
def test_every_rank_runs_the_same_collectives(reshard):
    first, *others = run_ranks(recorded_collectives, 3, reshard)
    assert len(first) > 60 and all(calls == first for calls in others)
    gathers = sum("allgather" in name.replace("_", "") for name, _ in first)
    layers = 4  # three and the root
    if (
        reshard == "never"
    ):  # one gather and one reduction a layer and step, however many chunks (full_tensor's aside)
        assert gathers <= 6 * (layers + len(list(small_model("llama3").parameters())) + 1)


def division_of_gradients():
    """Numbers of elements that are divided in steps of one rank, and the size of its smallest group."""
    divided = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
                divided.append(arguments[0].numel())
            return function(*arguments, **(kwargs or {}))

    config = layout_config(param="bfloat16")
    mesh = join(config).mesh
    for reshard in (False, True):
        model = small_model("llama3", torch.float32)
        parallel.apply_fsdp(model, mesh, config.training, reshard)
        sequences = random_sequences([70, 20], 96, 0)
        with Recorder():
            sharded_gradients(model, [70, 20], sequences, config)
    return divided, sum(parameter.numel() for parameter in model.layers["0"].parameters())


def test_gradients_of_one_rank_are_not_copied_to_be_divided():
    ((divided, layer),) = run_ranks(division_of_gradients, 1)
    assert not [elements for elements in divided if elements >= layer]


def order_of_a_step(replicas, k, chunks):
    """What happens on this rank in steps under ZeRO-3, a letter each: g, r, a: a layer is gathered, reduced to
    shards, reduced over replicas; G, R, A: the root group; c: a layer computes its forward. A step ends with
    the sum of losses, a."""
    steps = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            name = function.name().replace("_", "")
            for what, letter in (("allgather", "g"), ("reducescatter", "r"), ("allreduce", "a")):
                if name.startswith(f"c10d::{what}"):
                    sizes = [
                        leaf.numel() for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)
                    ]
                    whole = max(sizes) * (2 if letter == "a" else 1)  # there are two shards
                    steps[-1] += letter.upper() if whole == root else letter
            return function(*arguments, **(kwargs or {}))

    def computes(*_):
        steps[-1] += "c"

    config = layout_config(replicas=replicas)
    mesh = join(config).mesh
    model = small_model("llama3")
    root = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("layers."))
    parallel.apply_fsdp(model, mesh, config.training, True)
    for layer in model.layers.values():
        layer.attention_norm.register_forward_pre_hook(computes)
    lengths = [16 * chunks] * dist.get_world_size()
    sequences = random_sequences(lengths, 96, 0)
    for _ in range(2):
        steps.append("")
        with Recorder():
            sharded_gradients(model, lengths, sequences, config, k)
    return steps


@pytest.mark.parametrize("replicas", [1, 2])
def test_zero_3_gathers_a_layer_ahead_and_reduces_the_root_once(replicas):
    forward, backward = "ggcgcc", "ggrgrr"  # of three layers: the next one's gather is begun first
    # Four chunks, k = 2: two forwards for K/V, two that stay, their backwards, and two recomputed chunks. The
    # root is gathered and reduced once; replicas sum shards once, in the last backward.
    step = "G" + 4 * forward + 2 * backward + forward + backward + forward
    step += ("ggrgrr" + "R" if replicas == 1 else "ggragraraRA") + "a"
    for steps in run_ranks(order_of_a_step, 2 * replicas, replicas, 2, 4):
        assert steps == [step, step]
