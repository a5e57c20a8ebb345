"""The product: loss and every gradient of chunked training equal those of whole sequences."""

import random

import pytest
import torch

from chunkflow.execution import attention, linear, loss, runner
from chunkflow.execution.state import KeyValueState
from chunkflow.planning.chunks import build_groups, whole_sequences
from chunkflow.planning.schedule import Action, Kind, linear_schedule
from models import families
from tests.helpers.layouts import SMALL, small_model
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    chunked_gradients,
    live_chunks,
    naive_cross_entropy,
    random_lengths,
    random_sequences,
    runner_of,
    whole_sequence,
    whole_sequence_gradients,
)

pytestmark = pytest.mark.quick


@pytest.mark.proves("one process + tied + chunks/k > 1/no_enable")
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("seed", range(12))
def test_chunks_give_the_gradients_of_whole_sequences(family, seed):
    rng = random.Random(f"{family}/{seed}")
    heads, groups = rng.choice([(4, 4), (4, 2), (4, 1), (6, 3), (2, 1)])
    model = small_model(
        family,
        n_heads=heads,
        n_kv_heads=groups,
        head_dim=rng.choice([4, 8, 16]),
        tied_embeddings=bool(seed % 2),
    )
    lengths = random_lengths(rng, 90)
    chunk_size = rng.randint(1, 40)
    k = rng.choice([1, 2, 3, 100])
    sequences = random_sequences(lengths, 96, seed, masked=rng.choice([0.0, 0.3, 0.9]))
    loss, expected = whole_sequence_gradients(model, sequences)
    chunks = build_groups(lengths, chunk_size, fill_tails=rng.random() < 0.7)
    rng.shuffle(chunks)
    ours, got, result = chunked_gradients(model, sequences, chunks, k)
    assert abs(ours - loss) <= 1e-10 * max(loss, 1e-30)
    assert_same_gradients(got, expected, 1e-10)
    assert max(result.live_chunks) <= k
    ours, got, _ = chunked_gradients(
        model, sequences, whole_sequences(lengths), 1
    )  # chunkflow.enable = false
    assert abs(ours - loss) <= 1e-10 * max(loss, 1e-30)
    assert_same_gradients(got, expected, 1e-10)


@pytest.mark.proves("one process + chunks")
@pytest.mark.parametrize("seed", range(6))
def test_rows_that_are_padded_for_bf16_change_nothing(seed, monkeypatch):
    """Prefixes of any length: whole rows of them are attended to, the rest together with the chunk."""
    rng, flash, keys = random.Random(seed), attention._flash_forward_op, set()

    def watched(q, k, v, dropout, causal):
        keys.add(k.size(2))
        return flash(q, k, v, dropout, causal)

    model, lengths = small_model("llama3"), random_lengths(rng, 90)
    sequences = random_sequences(lengths, 96, seed)
    loss, expected = whole_sequence_gradients(model, sequences)
    monkeypatch.setattr(linear, "ROWS", rows := rng.choice([8, 16]))
    monkeypatch.setattr(linear, "pads", lambda tensor: True)
    monkeypatch.setattr(attention, "_flash_forward_op", watched)
    chunks = build_groups(lengths, rng.randint(3, 40))
    ours, got, _ = chunked_gradients(model, sequences, chunks, rng.choice([1, 2]))
    assert abs(ours - loss) <= 1e-10 * loss
    assert_same_gradients(got, expected, 1e-10)
    assert not any(count % rows for count in keys)


@pytest.mark.proves("one process + chunks")
@pytest.mark.parametrize("family", families)
def test_fp32(family):
    model = small_model(family, torch.float32)
    lengths = [75, 3, 40, 12]
    sequences = random_sequences(lengths, 96, 0)
    loss, expected = whole_sequence_gradients(model, sequences)
    ours, got, _ = chunked_gradients(model, sequences, build_groups(lengths, 16), 2)
    assert abs(ours - loss) <= 1e-5 * loss
    assert_same_gradients(got, expected, 1e-5)


@pytest.mark.proves("one process + bf16 + k > 1")
@pytest.mark.parametrize("k", [1, 2, 5])
def test_bf16_is_as_close_to_fp64_in_chunks_as_whole(k):
    lengths = [75, 3, 40, 12]
    sequences = random_sequences(lengths, 96, 0)
    _, expected = whole_sequence_gradients(small_model("llama3"), sequences)

    def error(groups):
        _, got, _ = chunked_gradients(small_model("llama3", torch.bfloat16), sequences, groups, k)
        return {name: ((got[name].double() - g).norm() / g.norm()).item() for name, g in expected.items()}

    chunked, whole = error(build_groups(lengths, 16)), error(whole_sequences(lengths))
    for name in expected:
        assert chunked[name] < max(2.0 * whole[name], 0.01), name


def test_a_packed_neighbour_does_not_leak():
    """Other tokens in a neighbour change nothing else: not the loss of a sequence, not the gradients it
    sends."""
    model = small_model("llama3")
    groups = build_groups([30, 9, 7, 16], 20)
    assert any(len(chunk.segments) > 1 and chunk.prefix for group in groups for chunk in group.chunks), (
        "wants a filled tail"
    )

    def run(seed):
        sequences = random_sequences([30, 9, 7, 16], 96, 0)
        for index in (1, 2):  # other tokens, no targets
            tokens, labels = random_sequences([9, 7], 96, seed)[index - 1]
            sequences[index] = tokens, torch.full_like(labels, -100)
        return chunked_gradients(model, sequences, groups, 1)

    (loss, first, _), (other_loss, second, _) = run(1), run(2)
    assert loss == other_loss
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_target_is_lost_at_a_boundary():
    """The last token of a chunk predicts the first of the next: with every length and chunk size, L - 1
    targets stay L - 1."""
    for length in range(1, 24):
        for chunk_size in range(1, 26):
            sequences = random_sequences([length], 96, 0, masked=0.0)
            groups = build_groups([length], chunk_size)
            tensors = [chunk for group in chunk_tensors(groups, sequences) for chunk in group]
            assert torch.equal(torch.cat([chunk.labels for chunk in tensors]), sequences[0][1])
            assert torch.equal(torch.cat([chunk.positions for chunk in tensors]), torch.arange(length))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_memory_follows_k(k, monkeypatch):
    """Counted from outside: graphs that are alive, and K/V states after the step."""
    states = []
    monkeypatch.setattr(
        runner, "KeyValueState", lambda *given: states.append(KeyValueState(*given)) or states[-1]
    )
    model = small_model("qwen3")
    sequences = random_sequences([95, 50, 10], 96, 0)
    groups = build_groups([95, 50, 10], 10)
    _, _, result = chunked_gradients(model, sequences, groups, k)
    assert max(result.live_chunks) == k == live_chunks(linear_schedule([len(g.chunks) for g in groups], k))
    tokens, layers, per_token = 95 + 50, SMALL["n_layers"], 2 * SMALL["n_kv_heads"] * SMALL["head_dim"] * 8
    assert (
        len(states) == 2
        and result.state_bytes < 2 * 105 * layers * per_token < 2 * tokens * layers * per_token
    )
    live, held = zip(*result.held)  # during each action
    assert len(held) == len(result.clock.timeline())
    assert max(live) == k and max(held) == result.state_bytes
    # keys and values, then their gradients too, until the last backward takes them; a group after the other
    first, both, last, second, both_2, last_2, none = (
        now for now, before in zip(held, (0, *held)) if now != before
    )
    assert first == last < both and second == last_2 < both_2 < both and none == 0
    assert not any(state.gradients for state in states), "gradients that nobody took"


def test_wrong_orders_are_caught():
    """Recomputing ascending, as the paper prints it, is not exact: the state refuses it."""
    model = small_model("llama3")
    sequences = random_sequences([40], 96, 0)
    ascending = [Action(Kind.FORWARD, 0, chunk) for chunk in range(4)] + [
        Action(Kind.BACKWARD, 0, chunk) for chunk in range(4)
    ]
    with pytest.raises(AssertionError, match="backward of chunk 0, but chunk 3 comes first"):
        chunked_gradients(model, sequences, build_groups([40], 10), 4, ascending)


def test_forward_state_skips_what_nobody_reads():
    model = small_model("qwen2")
    calls = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    groups = build_groups([20], 10)
    tensors = chunk_tensors(groups, random_sequences([20], 96, 0))[0]
    chunk = tensors[0]
    chunk.state, chunk.end = KeyValueState(groups[0]), None
    with torch.no_grad():
        assert model(chunk.tokens, chunk) is None
    assert (
        "layers.1.feed_forward" in calls
        and "layers.2.attention.wk" in calls
        and sorted(chunk.state.buffers) == [0, 1, 2]
    )
    assert not {
        "norm",
        "output",
        "layers.2.feed_forward",
        "layers.2.attention.wq",
        "layers.2.attention.wo",
    } & set(calls)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_loss_in_slices_is_that_of_all_logits(at_once, monkeypatch):
    monkeypatch.setattr(loss, "_LEAST_TOKENS", 128)
    monkeypatch.setitem(loss._SLICE_ELEMENTS, "cpu", 1000)  # slices of 128 tokens
    hidden = torch.randn(300, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(96, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(96, (300,))
    labels[::3] = -100
    chunk = whole_sequence(labels, labels, loss.loss_sum)
    chunk.loss_gradient = 0.3 if at_once else None
    ours = loss.loss_sum(hidden, weight, chunk)
    theirs = naive_cross_entropy(hidden, weight, chunk)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, b in zip(
        torch.autograd.grad(0.3 * ours, (hidden, weight)), torch.autograd.grad(0.3 * theirs, (hidden, weight))
    ):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_gradients_made_at_once_are_refused_to_another_backward():
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(96, 16, requires_grad=True)
    chunk = whole_sequence(torch.arange(5), torch.arange(5), loss.loss_sum)
    chunk.loss_gradient = 1 / 3
    made_for_a_third = loss.loss_sum(hidden, weight, chunk)
    with pytest.raises(RuntimeError, match="another gradient than its forward was told"):
        made_for_a_third.backward()


@pytest.mark.parametrize("k, expected", [(1, 6), (3, 4)])
def test_the_head_runs_once_where_backward_comes_next(k, expected):
    """Of 4 dependent and 2 standalone chunks all but the k - 1 that wait; those compute their logits
    twice."""
    told = []

    def loss_sum(hidden, weight, chunk):
        told.append(chunk.loss_gradient)
        return loss.loss_sum(hidden, weight, chunk)

    sequences, groups = random_sequences([40, 10, 10], 96, 0, masked=0.0), build_groups([40, 10, 10], 10)
    actions = linear_schedule([len(group.chunks) for group in groups], k)
    runner = runner_of(small_model("llama3"), loss=loss_sum)
    runner.step(actions, groups, chunk_tensors(groups, sequences), 57)
    assert len(told) == 6 and sum(gradient == 1 / 57 for gradient in told) == expected
