"""Whole-sequence training written a second time, naively: what every chunked path is compared with.

Attention is a full masked softmax and the loss a plain cross-entropy of all logits, so nothing of
chunkflow.execution is trusted.
"""

from __future__ import annotations

import random
import sys
from itertools import accumulate
from unittest import mock

import torch
import torch.nn.functional as F

from chunkflow.execution.loss import loss_sum
from chunkflow.execution.runner import Runner
from chunkflow.execution.stage import WholeModel
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.chunks import Chunk, Group, Segment
from chunkflow.planning.schedule import DUMMY, Kind, linear_schedule


def naive_attention(q_THD, k_TGD, v_TGD, chunk, layer):
    heads = q_THD.size(1) // k_TGD.size(1)
    k_THD, v_THD = k_TGD.repeat_interleave(heads, 1), v_TGD.repeat_interleave(heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * q_THD.size(-1) ** -0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), v_THD)


def naive_cross_entropy(hidden_TC, weight_VC, chunk):
    logits_TV, ignored = hidden_TC @ weight_VC.t(), {"ignore_index": -100}
    if chunk.loss_weights is None:
        return F.cross_entropy(logits_TV, chunk.labels, reduction="sum", **ignored)
    losses_T = F.cross_entropy(logits_TV, chunk.labels, reduction="none", **ignored)
    return (losses_T * chunk.loss_weights.to(losses_T.dtype)).sum()


def random_sequences(lengths, vocabulary, seed, masked=0.3):
    """(tokens, targets) of each length; targets are shifted already, some masked."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        tokens = torch.randint(vocabulary, (length,), generator=generator)
        targets = torch.cat([tokens[1:], torch.tensor([-100])])
        targets[torch.rand(length, generator=generator) < masked] = -100
        sequences.append((tokens, targets))
    return sequences


def random_weights(sequences, seed):
    """Of each sequence's targets, (tokens,) fp64: 0, below 1, 1 and above 1. All 1 in some sequences."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        4 * torch.rand(len(tokens), generator=generator, dtype=torch.float64) for tokens, _ in sequences
    ]
    for number, values in enumerate(weights):
        values[values < 1] = 0
        values[values > 3] = 1
        if number % 3 == 2:
            values.fill_(1)
    return weights


def chunk_tensors(groups: list[Group], sequences, weights=None) -> list[list[ChunkTensors]]:
    """`weights`: of each sequence's targets; None: all 1."""

    def cat(chunk, pick):
        return torch.cat([pick(s)[s.start : s.start + s.length] for s in chunk.segments])

    return [
        [
            ChunkTensors(
                chunk,
                index,
                cat(chunk, lambda s: sequences[s.sequence][0]),
                cat(chunk, lambda s: sequences[s.sequence][1]),
                cat(chunk, lambda s: torch.arange(s.start + s.length)),
                shared=group.spread is not None,
                weights=cat(chunk, lambda s: weights[s.sequence]) if weights else None,
            )
            for index, chunk in enumerate(group.chunks)
        ]
        for group in groups
    ]


def whole_sequence(tokens, labels, end):
    """A sequence as one standalone chunk, which ends in `end`."""
    chunk = ChunkTensors(Chunk((Segment(0, 0, len(tokens)),)), 0, tokens, labels, torch.arange(len(tokens)))
    chunk.end = end
    return chunk


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole_sequence_gradients(model, sequences, weights=None, denominator=None):
    """Loss and gradients of whole sequences, one by one, by the naive functions: the sum of weight x token
    loss / denominator. `weights`: of each sequence's targets, None: all 1; `denominator`: None: how many
    targets there are."""
    module = sys.modules[type(model).__module__]
    targets = sum(int((labels != -100).sum()) for _, labels in sequences)
    model.zero_grad()
    total = 0.0
    with mock.patch.object(module, "chunk_attention", naive_attention):
        for number, (tokens, labels) in enumerate(sequences):
            chunk = whole_sequence(tokens, labels, naive_cross_entropy)
            chunk.loss_weights = weights[number] if weights else None
            loss = model(tokens, chunk) / (denominator or max(targets, 1))
            loss.backward()
            total += loss.item()
    return total, gradients(model)


def runner_of(model, before_last_backward=lambda model: None, loss=loss_sum, blocks=None, **more) -> Runner:
    """Runs the whole model on this process."""
    return Runner([WholeModel(model, before_last_backward)], torch.device("cpu"), loss, blocks, **more)


def chunked_gradients(
    model,
    sequences,
    groups,
    k,
    actions=None,
    weights=None,
    sequence_weights=None,
    denominator=None,
    by_sequence=False,
    **more,
):
    """The same by the plan's groups and schedule; returns loss, gradients and the runner's counters. `weights`
    are without the sequences' own. `by_sequence`: asks for the loss of each. `more`: of the runner."""
    targets = sum(int((labels != -100).sum()) for _, labels in sequences)
    denominator = denominator or max(targets, 1)
    model.zero_grad()
    actions = actions or linear_schedule([len(group.chunks) for group in groups], k)
    chunks, count = chunk_tensors(groups, sequences, weights), len(sequences) if by_sequence else None
    runner = runner_of(model, **more)
    result = runner.step(actions, groups, chunks, denominator, sequence_weights, sequences=count)
    return result.loss_sum.item() / denominator, gradients(model), result


def live_chunks(actions) -> int:
    """The most chunks that hold activations at once while these actions run on one stage (dummies aside)."""
    change = {Kind.FORWARD: 1, Kind.RECOMPUTE: 1, Kind.BACKWARD: -1}
    real = [change.get(action.kind, 0) for action in actions if action.group != DUMMY]
    return max(accumulate(real), default=0)


def assert_same_gradients(ours, theirs, tolerance):
    overall = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, expected in theirs.items():
        scale = expected.norm() if expected.norm() > 0 else overall
        error = (ours[name] - expected).norm()
        assert error <= tolerance * scale, f"{name}: {error / scale:.1e}"


def random_lengths(rng: random.Random, longest: int) -> list[int]:
    count = rng.randint(1, 8)
    return [
        rng.randint(1, longest) if rng.random() < 0.4 else rng.randint(1, max(1, longest // 5))
        for _ in range(count)
    ]
