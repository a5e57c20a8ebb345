"""Weights of tokens, rows and sequences: loss and every gradient equal their definition on whole sequences, from
the files of a dataset to the gradients."""

from __future__ import annotations

import random
import sys
from array import array
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import TokenDataset
from chunkflow.execution import loss
from chunkflow.planning.chunks import build_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings
from chunkflow.planning.schedule import linear_schedule
from chunkflow.training import parallel
from chunkflow.training.validation import LossByPosition
from models import families
from tests.helpers.counts import Launches, cuda_branches
from tests.helpers.layouts import Pipeline, Weighed, join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import run_ranks
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    chunked_gradients,
    naive_attention,
    naive_cross_entropy,
    random_lengths,
    random_sequences,
    random_weights,
    runner_of,
    whole_sequence,
    whole_sequence_gradients,
)

CPU = torch.device("cpu")


def naive_losses(model, sequences) -> list[torch.Tensor]:
    """The loss of each token of each sequence, by the naive functions."""

    def losses(hidden_TC, weight_VC, chunk):
        return F.cross_entropy(hidden_TC @ weight_VC.t(), chunk.labels, reduction="none", ignore_index=-100)

    module = sys.modules[type(model).__module__]
    with mock.patch.object(module, "chunk_attention", naive_attention), torch.no_grad():
        return [model(tokens, whole_sequence(tokens, labels, losses)) for tokens, labels in sequences]


def some_weights(sequences, seed) -> Weighed:
    """Of tokens (see random_weights) and of sequences: any real numbers, among them 0 and negative ones."""
    rng = random.Random(seed)
    of_sequences = [rng.choice([0.0, 1.0, rng.uniform(-2, 3)]) for _ in sequences]
    of_sequences[0] = -1.5
    return Weighed(random_weights(sequences, seed), torch.tensor(of_sequences, dtype=torch.float64), 7.5)


def products(weighed: Weighed) -> list[torch.Tensor]:
    """What each token counts."""
    return [
        values * weight for values, weight in zip(weighed.token_weights, weighed.sequence_weights.tolist())
    ]


def assert_near(got: float, expected: float) -> None:
    """Terms may cancel each other."""
    assert abs(got - expected) <= 1e-10 * (1 + abs(expected))


# ------------------------------------------------------------------------------------------- in the loss itself


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("branches", [nullcontext, cuda_branches])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_each_token_counts_its_weight(branches, at_once, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(loss, "HEAD_BLOCK_TOKENS", 128)
    monkeypatch.setattr(loss, "_LEAST_TOKENS", 48)
    monkeypatch.setattr(loss, "_SLICE_ELEMENTS", {"cpu": 1, "cuda": 1})
    hidden = torch.randn(300, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(96, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(96, (300,))
    labels[::3] = -100
    chunk = whole_sequence(labels, labels, loss.loss_sum)
    chunk.loss_weights = torch.randn(300, dtype=torch.float64).clamp(min=-1)
    chunk.loss_gradient, chunk.wants_losses = 0.3 if at_once else None, True
    with branches():
        ours = loss.loss_sum(hidden, weight, chunk)
        gradients = torch.autograd.grad(0.3 * ours, (hidden, weight))
        losses = loss.token_losses(hidden, weight, chunk)
    theirs = naive_cross_entropy(*(tensor.double() for tensor in (hidden, weight)), chunk)
    assert ours.dtype == dtype and torch.equal(losses, chunk.losses), "token losses are not weighted"
    torch.testing.assert_close(ours.double(), theirs, rtol=10 * tolerance, atol=0)
    for a, b in zip(gradients, torch.autograd.grad(0.3 * theirs, (hidden, weight))):
        assert (a - b).norm() <= tolerance * b.norm()


# ------------------------------------------------------------------------------------------ chunks, one process


@pytest.mark.proves("one process + weights + k > 1", "one process + weights + tied")
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("seed", range(6))
def test_chunks_have_the_weighted_gradients_of_whole_sequences(family, seed):
    rng = random.Random(f"{family}/{seed}")
    model = small_model(family, tied_embeddings=family == "qwen3")
    lengths = random_lengths(rng, 120)
    sequences = random_sequences(lengths, 96, seed)
    weighed = some_weights(sequences, seed)
    expected_loss, expected = whole_sequence_gradients(model, sequences, products(weighed), 7.5)
    of_sequences = [
        float(losses @ weights)
        for losses, weights in zip(naive_losses(model, sequences), weighed.token_weights)
    ]
    chunk_size, k = rng.choice([7, 16, 50, 200]), rng.choice([1, 2, 99])
    groups = build_groups(lengths, chunk_size, fill_tails=rng.random() < 0.7)
    got_loss, got, result = chunked_gradients(model, sequences, groups, k, None, *weighed, by_sequence=True)
    assert_near(got_loss, expected_loss)
    assert_same_gradients(got, expected, 1e-10)
    assert result.loss_of_sequences.tolist() == pytest.approx(of_sequences, rel=1e-10, abs=1e-10)


@pytest.mark.proves("one process + weights")
def test_weights_of_tokens_alone_and_of_sequences_alone():
    model, sequences = small_model("llama3"), random_sequences([50, 9, 30], 96, 0)
    weighed, groups = some_weights(sequences, 3), build_groups([50, 9, 30], 16)
    alone = {
        "tokens": (weighed.token_weights, None),
        "sequences": (None, weighed.sequence_weights),
    }
    for tokens, of_sequences in alone.values():
        both = Weighed(
            tokens or [torch.ones(len(ids), dtype=torch.float64) for ids, _ in sequences],
            torch.ones(3, dtype=torch.float64) if of_sequences is None else of_sequences,
            7.5,
        )
        expected_loss, expected = whole_sequence_gradients(model, sequences, products(both), 7.5)
        got_loss, got, result = chunked_gradients(
            model, sequences, groups, 2, None, tokens, of_sequences, 7.5
        )
        assert_near(got_loss, expected_loss)
        assert_same_gradients(got, expected, 1e-10)
        assert result.loss_of_sequences is None, "nobody asked"


def test_without_weights_nothing_is_computed_for_them():
    """And weights of 1 change no bit."""
    model, sequences = small_model("llama3", torch.float32), random_sequences([50, 9, 30], 96, 0)
    groups, ones = build_groups([50, 9, 30], 16), torch.ones(3, dtype=torch.float64)
    of_tokens = [torch.ones(len(tokens), dtype=torch.float64) for tokens, _ in sequences]
    with Launches() as plain:
        loss_sum, expected, _ = chunked_gradients(model, sequences, groups, 1)
    with Launches() as weighted:
        got_sum, got, _ = chunked_gradients(
            model, sequences, groups, 1, None, of_tokens, ones, by_sequence=True
        )
    assert got_sum == loss_sum and all(torch.equal(got[name], expected[name]) for name in expected)
    of_plain, of_weighted = Counter(plain.names), Counter(weighted.names)
    added = {"index", "segment_reduce", "index_add_"}
    assert not of_plain - of_weighted and added <= set(of_weighted - of_plain) and not added & set(of_plain)


def test_the_loss_of_sequences_is_bitwise_the_same_again():
    model, sequences = small_model("llama3", torch.float32), random_sequences([90, 40, 5, 5, 7], 96, 0)
    groups = build_groups([90, 40, 5, 5, 7], 16)
    runs = [
        chunked_gradients(model, sequences, groups, 2, by_sequence=True)[2].loss_of_sequences
        for _ in range(2)
    ]
    assert torch.equal(*runs) and runs[0].dtype == torch.float64
    loss_sum = chunked_gradients(model, sequences, groups, 2)[2].loss_sum
    torch.testing.assert_close(runs[0].sum(), loss_sum, rtol=1e-6, atol=0)


def test_a_loss_without_token_losses_cannot_tell_those_of_sequences():
    model, sequences, groups = small_model("llama3"), random_sequences([9], 96, 0), build_groups([9], 16)
    runner = runner_of(model, loss=naive_cross_entropy)
    tensors, actions = chunk_tensors(groups, sequences), linear_schedule([1], 1)
    with pytest.raises(AssertionError, match="leaves chunk.losses"):
        runner.step(actions, groups, tensors, 1, sequences=1)


# --------------------------------------------------------------------------------------------- ranks and stages


def check_step(model, sequences, weighed, got_loss, got, of_sequences):
    expected_loss, expected = whole_sequence_gradients(
        model, sequences, products(weighed), weighed.denominator
    )
    assert_near(got_loss, expected_loss)
    assert_same_gradients(got, {name: expected[name] for name in got}, 1e-10)
    losses = naive_losses(model, sequences)
    for ours, losses_T, weights_T in zip(of_sequences.tolist(), losses, weighed.token_weights):
        assert_near(ours, float(losses_T @ weights_T))


def on_ranks(replicas, spread):
    config = layout_config(replicas=replicas)
    processes, most = join(config), 0
    for reshard in ("never", "always"):
        config = layout_config(replicas=replicas, reshard=reshard)
        reference, model = small_model("qwen3"), small_model("qwen3")
        parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard == "always")
        for seed in range(3):
            rng = random.Random(f"{reshard}/{seed}")
            lengths = [rng.randint(60, 200), *random_lengths(rng, 60)] if seed else [90]
            sequences = random_sequences(lengths, 96, seed)
            weighed = some_weights(sequences, seed)
            more = {"enable": seed < 2 or spread}
            if spread:
                more |= {"spread_over": processes.replicas, "kv_tokens": 40, "blocks": processes.blocks}
            step = sharded_gradients(
                model, lengths, sequences, config, rng.choice([1, 2]), weighed=weighed, **more
            )
            check_step(reference, sequences, weighed, *step)
            most += 1
    return most


@pytest.mark.proves(
    "never/always + weights + no_enable",
    "never/always + shared + weights",
    "HSDP + never/always + shared + weights",
)
@pytest.mark.parametrize("world_size, replicas, spread", [(2, 1, False), (3, 1, True), (4, 2, True)])
def test_ranks_have_the_weighted_gradients_of_one_process(world_size, replicas, spread):
    assert run_ranks(on_ranks, world_size, replicas, spread) == [6] * world_size


def on_stages(shape, virtual):
    config = layout_config()
    config.parallelism.pipeline_parallel_degree = shape[0]
    processes, checked = join(config), 0
    whole = small_model("llama3", n_layers=5)
    pipeline = Pipeline("llama3", processes.mesh, virtual, whole, blocks=processes.blocks)
    for seed in range(4):
        rng = random.Random(seed)
        lengths = random_lengths(rng, 130) if seed else [70]
        sequences = random_sequences(lengths, 96, seed)
        weighed = some_weights(sequences, seed)
        more = {"spread_over": shape[1], "kv_tokens": 40} if shape[1] > 1 else {}
        plan = pipeline.plan(lengths, rng.choice([1, 2, 99]), seed != 2, **more)
        got_loss, got, result = pipeline.step(plan, sequences, weighed)
        check_step(whole, sequences, weighed, got_loss, got, result.loss_of_sequences)
        checked += 1
    return checked


@pytest.mark.proves(
    "stages/virtual stages + weights + k > 1",
    "stages/virtual stages + weights + no_enable",
    "stages x ranks + shared + weights",
)
@pytest.mark.parametrize("shape, virtual", [((2, 1), 1), ((2, 1), 2), ((2, 2), 1)])
def test_stages_have_the_weighted_gradients_of_whole_sequences(shape, virtual):
    assert run_ranks(on_stages, shape[0] * shape[1], shape, virtual) == [4] * (shape[0] * shape[1])


# ------------------------------------------------------------------------------------- from the files of a dataset


def token_dataset(folder, rows) -> TokenDataset:
    """Of rows (tokens, labels, weights, weight of the row), as the token cache has them."""
    folder.mkdir(exist_ok=True)
    columns = {"tokens": "i", "labels": "i", "weights": "d"}
    for place, (name, kind) in enumerate(columns.items()):
        (folder / f"{name}.bin").write_bytes(
            array(kind, [value for row in rows for value in row[place].tolist()])
        )
    offsets = [sum(len(row[0]) for row in rows[:count]) for count in range(len(rows) + 1)]
    (folder / "offsets.bin").write_bytes(array("q", offsets))
    (folder / "sources.bin").write_bytes(array("q", [0, 1] * len(rows)))
    (folder / "row_weights.bin").write_bytes(array("d", [row[3] for row in rows]))
    return TokenDataset(folder, ["rows.jsonl"], {}, {})


def random_rows(seed, lengths):
    """Labels are aligned with tokens, as on disk."""
    rng, rows = random.Random(seed), []
    for number, (tokens, shifted) in enumerate(random_sequences(lengths, 96, seed)):
        labels = torch.cat([tokens[:1], shifted[:-1]])
        weights = torch.tensor([rng.choice([0.0, 1.0, 1.0, rng.uniform(0, 4)]) for _ in tokens]).double()
        rows.append((tokens, labels, weights, [0.0, 1.0, 2.5, 0.3, 1.0][number % 5]))
    return rows


def by_definition(rows, loss_weighting):
    """Sequences, the weight of each of their targets, the denominator, and how many targets count."""
    sequences, products, denominator, targets = [], [], 0.0, 0
    for tokens, labels, weights, weight in rows:
        counts = torch.where(labels == -100, 0.0, weights)[1:]  # the first token is nobody's target
        sequences.append((tokens, torch.cat([labels[1:], torch.tensor([-100])])))
        total = float(counts.sum())
        scale = weight / total if loss_weighting == "sequence" and total else weight
        products.append(torch.cat([counts * scale, torch.zeros(1, dtype=torch.float64)]))
        denominator += (weight if total else 0.0) if loss_weighting == "sequence" else weight * total
        targets += int((counts * weight > 0).sum())
    return sequences, products, denominator, targets


def loaders(dataset, loss_weighting, replicas=1, **settings):
    plan = PlanSettings(Cost(1.0, 0.0), replicas, **settings)
    limits = {"global_batch_size": len(dataset), "seq_len": 10**6, "overlong": "error", "shuffle": False}
    for replica in range(replicas):
        yield ChunkDataLoader(dataset, plan, replica=replica, seed=0, loss_weighting=loss_weighting, **limits)


@pytest.mark.proves("one process + weights + k > 1", "one process + weights + no_enable")
@pytest.mark.parametrize("loss_weighting", ["token", "sequence"])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_the_definition(tmp_path, loss_weighting, seed):
    rng = random.Random(seed)
    lengths = [rng.randint(50, 150), *random_lengths(rng, 60), 1, 2, 30]
    rows = random_rows(seed, lengths)
    dataset, model = token_dataset(tmp_path / "cache", rows), small_model("qwen2")
    sequences, weights, denominator, targets = by_definition(rows, loss_weighting)
    expected_loss, expected = whole_sequence_gradients(model, sequences, weights, denominator)
    for enable in (True, False):
        (loader,) = loaders(dataset, loss_weighting, chunk_size=16, k=2, enable=enable)
        data = loader.step_at(0)
        assert data.targets == targets == data.ledger.trained
        assert data.ledger.masked == sum(lengths) - targets
        assert data.denominator == pytest.approx(denominator, rel=1e-12)
        model.zero_grad()
        (groups,), ((program,),) = data.plan.groups, data.plan.programs.values()
        runner = runner_of(model)
        result = runner.step(program, groups, data.chunks, data.denominator, data.sequence_weights)
        assert_near(result.loss_sum.item() / data.denominator, expected_loss)
        got = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert_same_gradients(got, expected, 1e-10)


@pytest.mark.parametrize("loss_weighting", ["token", "sequence"])
@pytest.mark.parametrize("spread_over", [1, 2])
def test_what_replicas_have_adds_up_to_the_denominator(tmp_path, loss_weighting, spread_over):
    rows = random_rows(0, [200, 30, 7, 90, 1, 40])
    dataset = token_dataset(tmp_path, rows)
    steps = [
        loader.step_at(0)
        for loader in loaders(
            dataset, loss_weighting, 2, chunk_size=16, spread_over=spread_over, kv_tokens=40
        )
    ]
    denominator = by_definition(rows, loss_weighting)[2]
    assert steps[0].plan.most_ranks_of_a_sequence == spread_over
    for data in steps:
        assert data.denominator == pytest.approx(denominator, rel=1e-12) == sum(data.weight_sums)
    assert sum(data.own_denominator for data in steps) == pytest.approx(denominator, rel=1e-12)


def test_weights_of_0_and_1_are_masks_and_need_no_products(tmp_path):
    """Bitwise the step of the same labels, masked."""
    rows = [
        (tokens, labels, (weights > 1).double(), 1.0)
        for tokens, labels, weights, _ in random_rows(1, [40, 9, 20])
    ]
    masked = [
        (tokens, torch.where(weights > 0, labels, -100), torch.ones(len(tokens)).double(), 1.0)
        for tokens, labels, weights, _ in rows
    ]
    (ours,) = loaders(token_dataset(tmp_path / "ours", rows), "token", chunk_size=16)
    (theirs,) = loaders(token_dataset(tmp_path / "theirs", masked), "token", chunk_size=16)
    got, expected = ours.step_at(0), theirs.step_at(0)
    assert got.sequence_weights is None and got.ledger == expected.ledger
    assert got.denominator == expected.denominator == got.targets
    for ours, theirs in zip(sum(got.chunks, []), sum(expected.chunks, []), strict=True):
        assert ours.weights is None and torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("loss_weighting", ["token", "sequence"])
def test_rows_of_weight_0_alone_are_a_step_without_targets(tmp_path, loss_weighting):
    rows = [(tokens, labels, weights, 0.0) for tokens, labels, weights, _ in random_rows(0, [30, 5])]
    (loader,) = loaders(token_dataset(tmp_path, rows), loss_weighting, chunk_size=16)
    data = loader.step_at(0)
    assert data.targets == data.denominator == data.own_denominator == data.ledger.trained == 0
    assert all((chunk.labels == -100).all() for group in data.chunks for chunk in group)


@pytest.mark.parametrize("loss_weighting", ["token", "sequence"])
def test_validation_has_the_formula_of_training(tmp_path, loss_weighting):
    rows = random_rows(2, [30, 7, 1100, 90, 40])
    dataset, model = token_dataset(tmp_path, rows), small_model("llama3")
    sequences, weights, denominator, targets = by_definition(rows, loss_weighting)
    losses = naive_losses(model, sequences)
    (loader,) = loaders(dataset, loss_weighting, chunk_size=16, forward_only=True)
    data, got = loader.step_at(0), LossByPosition(1100, CPU)
    (groups,), ((program,),) = data.plan.groups, data.plan.programs.values()
    runner_of(model).evaluate(program, groups, data.chunks, got.take, data.sequence_weights)
    mean, count, by_position = got.result()
    assert count == targets
    assert mean == pytest.approx(float(torch.cat(losses) @ torch.cat(weights)) / denominator, rel=1e-10)
    far_losses, far_weights = losses[2][1024:], weights[2][1024:]
    expected = float(far_losses @ far_weights / far_weights.sum())
    assert by_position["up_to_4K"] == (pytest.approx(expected, rel=1e-10), int((far_weights > 0).sum()))
