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

from chunkflow.planning.chunks import build_groups, whole_sequences
from chunkflow.planning.schedule import DUMMY, Action, Kind, forward_only, linear_schedule
from models import families
from tests.helpers.cuda_kernels import cuda_attention_on_cpu
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
