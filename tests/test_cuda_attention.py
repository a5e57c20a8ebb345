"""Attention as it runs on CUDA, on the CPU: torch's variable-length operators over naive kernels that assert
FlashAttention-2's contract. Losses, gradients and logits equal those of whole sequences."""

import argparse
import random
import runpy
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import current_flash_attention_impl

from chunkflow.execution.attention import chunk_attention
from chunkflow.execution.state import KeyValueState
from chunkflow.planning.chunks import build_groups, whole_sequences
from chunkflow.planning.schedule import DUMMY, Action, Kind, forward_only, linear_schedule
from chunkflow.settings.config import load_config
from chunkflow.settings.keys import flat
from chunkflow.storage import manifest
from chunkflow.training import build
from models import families
from tests.helpers.counts import Launches
from tests.helpers.cuda_kernels import cuda_attention_on_cpu, flash_attention_3_on_cpu
from tests.helpers.layouts import SMALL, small_model
from tests.helpers.processes import REPO
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    chunked_gradients,
    naive_attention,
    random_lengths,
    random_sequences,
    runner_of,
    whole_sequence,
    whole_sequence_gradients,
)

pytestmark = pytest.mark.quick
# Two ways to add up the same fp64 numbers: a few hundred roundings of 1e-16, and products of weights that are
# eight times as large as a real start's. Measured: 4e-15 of a gradient's norm at most.
TOLERANCE = 1e-12


@pytest.fixture
def calls():
    with cuda_attention_on_cpu() as calls:
        yield calls


@pytest.mark.proves("one process + chunks/k > 1/no_enable")
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("seed", range(8))
def test_chunks_give_the_gradients_of_whole_sequences(calls, family, seed):
    rng = random.Random(f"cuda/{family}/{seed}")
    heads, groups = rng.choice([(4, 4), (4, 2), (4, 1), (6, 3)])
    model = small_model(family, n_heads=heads, n_kv_heads=groups, head_dim=rng.choice([8, 16]))
    lengths = [*random_lengths(rng, 60)[:5], rng.randint(40, 70)]
    sequences = random_sequences(lengths, 96, seed, masked=rng.choice([0.0, 0.3]))
    loss, expected = whole_sequence_gradients(model, sequences)
    assert not calls  # the reference has its own attention
    for k in (1, 2, 100):
        chunks = build_groups(lengths, rng.randint(3, 30), fill_tails=rng.random() < 0.7)
        rng.shuffle(chunks)
        ours, got, _ = chunked_gradients(model, sequences, chunks, k)
        assert abs(ours - loss) <= TOLERANCE * loss
        assert_same_gradients(got, expected, TOLERANCE)
    ours, got, _ = chunked_gradients(model, sequences, whole_sequences(lengths), 1)
    assert abs(ours - loss) <= TOLERANCE * loss
    assert_same_gradients(got, expected, TOLERANCE)
    assert any(call.backward and call.queries != call.keys for call in calls)


@pytest.mark.proves("one process + chunks")
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize(
    "lengths, chunk_size, call",  # queries and keys of a call that the case is about
    [
        ([45, 7, 1, 4], 16, ([13, 1], [45, 1])),  # a filled tail: its neighbours lie behind
        ([33, 6], 16, ([1, 6], [33, 6])),  # the tail is one token
        ([33], 16, ([1], [33])),
        ([5, 1], 1, ([1], [5])),  # every chunk is one token
        ([1, 1, 1, 1], 3, ([1, 1, 1], [1, 1, 1])),  # every segment is
    ],
)
def test_filled_tails_single_tokens_and_dummies(calls, family, lengths, chunk_size, call):
    model, groups = small_model(family), build_groups(lengths, chunk_size)
    sequences = random_sequences(lengths, 96, 3, masked=0.0)
    loss, expected = whole_sequence_gradients(model, sequences)
    dummy = [Action(Kind.FORWARD, DUMMY, 0), Action(Kind.BACKWARD, DUMMY, 0)]
    actions = []  # with a dummy before each
    for action in linear_schedule([len(group.chunks) for group in groups], 1):
        actions += [*dummy, action]
    ours, got, _ = chunked_gradients(model, sequences, groups, 1, actions)
    assert abs(ours - loss) <= TOLERANCE * loss
    assert_same_gradients(got, expected, TOLERANCE)
    assert call in [(call.queries, call.keys) for call in calls]
    assert all(call.causal == (max(call.queries) > 1) for call in calls)


@pytest.mark.parametrize("family", families)
def test_validation_gives_the_losses_of_whole_sequences(calls, family):
    model, lengths = small_model(family), [70, 9, 33, 1, 20]
    sequences = random_sequences(lengths, 96, 5)
    groups = build_groups(lengths, 16)
    ((*actions,),) = forward_only([[len(group.chunks) for group in groups]], lockstep=False)
    taken = []
    chunks = chunk_tensors(groups, sequences)
    runner_of(model).evaluate(actions, groups, chunks, lambda chunk, losses_T: taken.append(losses_T))
    losses = [torch.empty(length, dtype=torch.float64) for length in lengths]
    segments = [segment for group in groups for chunk in group.chunks for segment in chunk.segments]
    for (sequence, start, length), part in zip(segments, torch.cat(taken).split([s[2] for s in segments])):
        losses[sequence][start : start + length] = part
    for (tokens, labels), got in zip(sequences, losses):
        logits_TV = naive_logits(model, tokens)
        expected = F.cross_entropy(logits_TV, labels, reduction="none")
        assert (got - expected).norm() <= TOLERANCE * expected.norm()
    assert calls and not any(call.backward for call in calls)


def naive_logits(model, tokens):
    """Logits of all positions of a sequence, from the reference's attention."""
    module = sys.modules[type(model).__module__]

    def end(hidden_TC, weight_VC, chunk):
        return hidden_TC @ weight_VC.t()

    with mock.patch.object(module, "chunk_attention", naive_attention), torch.no_grad():
        return model(tokens, whole_sequence(tokens, None, end))


@pytest.mark.parametrize("family", families)
def test_generation_gives_the_logits_of_the_whole_sequence(calls, family):
    """The prompt in chunks, then a token at a time."""
    generate = runpy.run_path(str(REPO / "recipes" / "generate.py"))["generate"]
    model = small_model(family)
    prompt, logits = torch.randint(96, (45,)).tolist(), []
    cli = argparse.Namespace(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=0)
    hook = model.register_forward_hook(
        lambda module, inputs, output: output is not None and logits.append(output)
    )
    ids = list(generate(model, prompt, cli, 7, 96))
    hook.remove()
    expected = naive_logits(model, torch.tensor(prompt + ids))[44:-1]
    assert (torch.stack(logits) - expected).norm() <= TOLERANCE * expected.norm()
    layers = SMALL["n_layers"]
    decoding = [call for call in calls if call.queries == [1]]
    assert len(decoding) == 11 * layers and [call.keys for call in decoding[-layers:]] == [[56]] * layers
    assert all(call.splits_keys for call in decoding), "FlashAttention runs these on a few multiprocessors"
    assert all(call.causal and not call.splits_keys for call in calls if call not in decoding)
    # Of the prompt the last layer of a chunk that nobody reads from has no attention.
    assert len(calls) - len(decoding) == 6 * (layers - 1) + layers


# -------------------------------------------------------------------------------------------------- launches


class AttentionLaunches(Launches):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # torch 2.11 has none of the forward's arguments behind the window.
        assert function._schema.name != "torch_attn::_varlen_attn" or (len(args) == 10 and not kwargs)
        return super().__torch_dispatch__(function, types, args, kwargs)


def launches_and_bytes(group):
    """Of one layer's attention of each chunk: operators of the forward, of the backward, and bytes of the K/V
    state after the backward."""
    chunks = chunk_tensors([group], random_sequences([group.tokens], 96, 0))[0]
    state = KeyValueState(group) if len(chunks) > 1 else None
    forward, backward, held, graphs = [], [], [], []
    for chunk in chunks:
        chunk.state, tokens = state, len(chunk.tokens)
        inputs = [torch.randn(tokens, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
        with AttentionLaunches() as launches:
            graphs.append((chunk_attention(*inputs, chunk, 0), inputs))
        forward.append(launches.names)
    for output, inputs in reversed(graphs):
        gradient = torch.ones_like(output)
        with AttentionLaunches() as launches:
            torch.autograd.grad(output, inputs, gradient)
        backward.append(launches.names)
        held.append(state.bytes() if state else 0)
    return forward, backward[::-1], held[::-1]


def test_launches_do_not_depend_on_the_chunk(calls):
    """In the last chunk's backward two kernels begin the sums of K and V; in the others two add to them and
    two take what is there for the chunk itself. The first has no prefix."""
    for count in (2, 16):
        (group,) = build_groups([16 * count - 3], 16)
        forward, backward, held = launches_and_bytes(group)
        assert forward == [["copy_", "copy_", "_varlen_attn"]] * count
        first, *between, last = backward
        assert first == ["_varlen_attn_backward", "add_", "add_"]
        assert between == [["_varlen_attn_backward", "add_", "add_", "add_", "add_"]] * (count - 2)
        assert last == ["_varlen_attn_backward", "copy_", "copy_"]
        numbers = 2 * 2 * 16  # K and V of 2 heads of 16, of a token
        keys_values, gradients = 2 * numbers * group.tokens, 4 * numbers * 16 * (count - 1)
        assert held == [keys_values] + [keys_values + gradients] * (count - 1)
    (standalone,) = build_groups([16], 16)
    forward, backward, _ = launches_and_bytes(standalone)
    assert (forward, backward) == ([["_varlen_attn"]], [["_varlen_attn_backward"]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_later_chunks_are_summed_in_at_least_fp32(dtype):
    (group,) = build_groups([40], 8)
    state = KeyValueState(group)
    keys_TGD = torch.zeros(40, 2, 8, dtype=dtype)
    state.write(0, 0, keys_TGD, keys_TGD)
    large, small = 1.0, torch.finfo(dtype).eps / 4  # each alone is lost beside the first
    for index, value in ((4, large), (3, small), (2, small), (1, small)):
        prefix = torch.full((8 * index, 2, 8), value, dtype=dtype)
        later = state.exchange_gradients(0, index, prefix, 2 * prefix)
    wide = torch.promote_types(dtype, torch.float32)
    assert later.dtype == wide and later.shape == (2, 8, 2, 8)
    total = torch.tensor(large, dtype=wide) + (0 if wide == dtype else 2 * small)
    assert (later[0] == total).all() and (later[1] == 2 * total).all()
    assert state.exchange_gradients(0, 0, None, None).shape == (2, 8, 2, 8) and not state.gradients


# ----------------------------------------------------------------------------------------- FlashAttention-3


def config_of(*argv):
    return load_config(["--model.attention=fa3", *argv])


def test_flash_attention_3_gives_the_same_gradients():
    """In bf16, the only dtype of both that training uses; the kernels below are the same, so bit for bit."""
    lengths = [45, 7, 1, 20]
    sequences, groups = random_sequences(lengths, 96, 0), build_groups(lengths, 16)
    gradients, kernels = [], []
    for flash_attention in (cuda_attention_on_cpu, flash_attention_3_on_cpu):
        with flash_attention() as calls:
            if flash_attention is flash_attention_3_on_cpu:
                assert current_flash_attention_impl() is None
                build.activate_attention(config_of())
                assert current_flash_attention_impl() == "FA3"
            _, got, _ = chunked_gradients(small_model("qwen2", torch.bfloat16), sequences, groups, 1)
        gradients.append(got)
        kernels.append(calls)
    assert kernels[0] == kernels[1] and current_flash_attention_impl() is None
    assert all(torch.equal(*pair) for pair in zip(*(got.values() for got in gradients)))


def test_checkpoints_go_on_with_other_kernels():
    args = families["llama3"].flavors["debugmodel"]
    identities = [manifest.model_identity(flat(config), args) for config in (load_config([]), config_of())]
    assert identities[0] == identities[1]


@pytest.mark.parametrize(
    "capability, words",
    [
        (None, 'needs a Hopper GPU (compute capability 9.0), but this runs on the CPU: set "default"'),
        ((8, 0), 'needs a Hopper GPU (compute capability 9.0), but a GPU has 8.0: set "default"'),
        ((9, 0), "needs the module flash_attn_interface, which cannot be imported"),
    ],
)
def test_where_flash_attention_3_cannot_run(monkeypatch, capability, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # not importable
    for refuses in (build.check, build.activate_attention):
        with pytest.raises(ValueError) as error:
            refuses(config_of("--training.mixed_precision_param=bfloat16"))
        assert str(error.value).startswith(f'model.attention = "fa3" {words}')
        assert "\n" not in str(error.value) and 'set "default"' in str(error.value)
    fake = config_of("--comm.mode=fake_backend")
    build.check(fake)  # a layout for other machines
    build.activate_attention(fake)
    assert current_flash_attention_impl() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU may have it")
@pytest.mark.parametrize("recipe", ["finetune.py", "generate.py"])
def test_recipes_refuse_it_on_the_cpu(tmp_path, recipe, monkeypatch, capsys):
    options = ["--model.attention=fa3", f"--job.dump_folder={tmp_path / 'run'}"]
    options += ["--prompt=a"] if recipe == "generate.py" else []
    monkeypatch.setattr(sys, "argv", [recipe, *options])
    main = runpy.run_path(str(REPO / "recipes" / recipe))["main"]
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert said.startswith('error: model.attention = "fa3" needs') and said.count("\n") == 1
