"""A sequence over several ranks: loss and every gradient equal whole sequences in one process."""

from __future__ import annotations

import random
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from chunkflow.execution import linear, shared_state
from chunkflow.execution.attention import chunk_attention
from chunkflow.execution.shared_state import SharedKeyValueState
from chunkflow.planning.chunks import spread_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import live_limit
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.training import parallel
from chunkflow.training.validation import LossByPosition
from models import families
from tests.helpers.counts import Launches
from tests.helpers.cuda_kernels import cuda_attention_on_cpu
from tests.helpers.layouts import SMALL, Pipeline, join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import run_ranks
from tests.helpers.reference import (
    assert_same_gradients,
    chunk_tensors,
    naive_attention,
    naive_cross_entropy,
    random_sequences,
    runner_of,
    whole_sequence,
    whole_sequence_gradients,
)


def random_batch(rng: random.Random) -> list[int]:
    """A few sequences that are long for these models, and short ones."""
    long = [rng.randint(60, 300) for _ in range(rng.randint(1, 3))]
    return long + [rng.randint(1, 40) for _ in range(rng.randint(0, 6))]


def cases(replicas):
    config = layout_config(replicas=replicas)
    processes = join(config)
    ranks = processes.replicas
    blocks = processes.blocks
    checked = 0
    for reshard in ("never", "always"):
        for mode in ("none", "full"):
            config = layout_config(replicas=replicas, reshard=reshard, mode=mode)
            family = "qwen3" if mode == "full" else "llama3"
            tied = {"tied_embeddings": mode == "full"}
            reference, model = small_model(family, **tied), small_model(family, **tied)
            parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
            parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard == "always")
            for seed in range(2 if mode == "none" else 1):
                rng = random.Random(f"{ranks}/{replicas}/{reshard}/{mode}/{seed}")  # others for each layout
                lengths = random_batch(rng)
                sequences = random_sequences(lengths, 96, seed)
                loss, expected = whole_sequence_gradients(reference, sequences)
                more = {"spread_over": ranks, "kv_tokens": rng.choice([0, 60]), "blocks": blocks}
                # In one case rows are padded, as they are for bf16.
                padded = mock.patch.multiple(linear, pads=lambda tensor, pads=seed == 1: pads, ROWS=8)
                with padded:
                    got_loss, got = sharded_gradients(
                        model, lengths, sequences, config, rng.choice([1, 2, 9]), **more
                    )
                assert abs(got_loss - loss) <= 1e-10 * loss
                assert_same_gradients(got, expected, 1e-10)
                checked += 1
    return checked


@pytest.mark.proves(
    "never/always + shared + k > 1",
    "HSDP + never/always + shared + k > 1",
    "never/always + shared + full + tied",
    "HSDP + never/always + shared + full + tied",
)
@pytest.mark.parametrize("world_size, replicas", [(2, 1), (3, 1), (4, 1), (4, 2), (6, 1)])
def test_shared_sequences_give_the_gradients_of_one_process(world_size, replicas):
    assert run_ranks(cases, world_size, replicas) == [6] * world_size


def stages_config(shape):
    config = layout_config()
    config.parallelism.pipeline_parallel_degree = shape[0]
    return config


def on_stages(shape, virtual):
    processes = join(stages_config(shape))
    mesh, checked = processes.mesh, 0
    for family in families:
        whole = small_model(family, n_layers=5, tied_embeddings=family != "llama3")
        pipeline = Pipeline(family, mesh, virtual, whole, blocks=processes.blocks)
        for seed in range(2):
            rng = random.Random(f"{family}/{seed}/{shape}/{virtual}")
            lengths = random_batch(rng) if seed else [150]
            k, sequences = rng.choice([1, 2, 99]), random_sequences(lengths, 96, seed)
            loss, expected = whole_sequence_gradients(whole, sequences)
            more = {"spread_over": shape[1], "kv_tokens": rng.choice([40, 60])}
            plan = pipeline.plan(lengths, k, **more)
            assert plan.spread_sequences
            got_loss, got, result = pipeline.step(plan, sequences)
            assert abs(got_loss - loss) <= 1e-10 * loss
            assert_same_gradients(got, {name: expected[name] for name in got}, 1e-10)
            for place, stage in enumerate(pipeline.models):
                assert result.live_chunks[place] <= live_limit(k, len(pipeline.layers), stage)
            checked += 1
    return checked


@pytest.mark.proves(
    "stages x ranks + shared + k > 1",
    "stages x ranks + virtual stages + shared + k > 1",
    "stages x ranks + shared + tied",
)
@pytest.mark.parametrize("shape, virtual", [((2, 2), 1), ((2, 2), 2), ((2, 3), 1)])
def test_stages_share_sequences_with_their_like(shape, virtual):
    assert run_ranks(on_stages, shape[0] * shape[1], shape, virtual) == [6] * (shape[0] * shape[1])


def held(lengths, k):
    """For 1, 2 and 4 replicas that share a sequence: bytes of K/V and gradients at their peak, and live chunks."""
    processes = join()
    blocks = processes.blocks
    model = small_model("qwen2")
    parallel.apply_fsdp(model, processes.data_mesh, layout_config().training, False)
    sequences, peaks = random_sequences(lengths, 96, 0), []
    for most in (1, 2, 4):
        settings = PlanSettings(
            Cost.of_model(model.args), 4, chunk_size=16, k=k, spread_over=most, kv_tokens=1 if most > 1 else 0
        )
        plan = plan_step(lengths, settings, [processes.replica])
        parallel.begin_step(model, False)
        groups, ((program,),) = plan.groups[processes.replica], plan.programs.values()
        runner = runner_of(model, parallel.before_last_backward, blocks=blocks)
        result = runner.step(program, groups, chunk_tensors(groups, sequences), 100)
        model.zero_grad()
        peaks.append((result.state_bytes, result.live_chunks[0], plan.most_ranks_of_a_sequence))
    return peaks


@pytest.mark.parametrize("k", [1, 2])
def test_what_a_rank_holds_of_keys_and_values_falls_with_the_ranks_that_share_them(k):
    length = 512
    answers = run_ranks(held, 4, [length], k)
    alone = max(rank[0][0] for rank in answers)
    token = 2 * SMALL["n_layers"] * SMALL["n_kv_heads"] * SMALL["head_dim"] * 8  # fp64, keys and values
    assert length * token < alone <= 2 * length * token
    for rank, peaks in enumerate(answers):
        for state_bytes, live, ranks in peaks[1:]:
            shares = rank < ranks
            assert shares <= live <= k
            assert state_bytes <= shares * 2 * length * token / ranks
    assert [peak[2] for peak in answers[0]] == [1, 2, 4]


def validation_losses(shape):
    """Losses by position of whole sequences, on ranks ("never", "always") or stages."""
    processes = join(stages_config(shape) if shape else None)
    checked = 0
    if shape is None:
        blocks = processes.blocks
        for reshard in ("never", "always"):
            reference, model = small_model("llama3"), small_model("llama3")
            config = layout_config(reshard=reshard)
            parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard == "always")
            runner, models = runner_of(model, blocks=blocks), [model]
            for seed in range(3):
                options = {"lockstep": reshard == "always", "forward_only": True, "chunk_size": 16}
                options |= {"spread_over": processes.replicas, "kv_tokens": 60}
                settings = PlanSettings(Cost.of_model(model.args), processes.replicas, **options)
                lengths = random_batch(random.Random(seed))
                plan = plan_step(lengths, settings, [processes.replica])
                checked += compare_losses(
                    plan,
                    lengths,
                    runner,
                    models,
                    reference,
                    processes.replica,
                    plan.programs[processes.replica][0],
                )
        return checked
    whole = small_model("qwen3", n_layers=5, tied_embeddings=True)
    pipeline = Pipeline("qwen3", processes.mesh, 1, whole, blocks=processes.blocks)
    for seed in range(3):
        lengths = random_batch(random.Random(seed))
        plan = pipeline.plan(lengths, 1, forward_only=True, spread_over=shape[1], kv_tokens=60)
        models = pipeline.models.values()
        checked += compare_losses(
            plan, lengths, pipeline.runner, models, whole, pipeline.replica, pipeline.program(plan)
        )
    return checked


def compare_losses(plan, lengths, runner, models, reference, replica, program):
    assert plan.spread_sequences
    sequences = random_sequences(lengths, 96, 3)
    losses = LossByPosition(max(lengths), torch.device("cpu"))
    groups = plan.groups[replica]
    runner.evaluate(program, groups, chunk_tensors(groups, sequences), losses.take)
    for model in models:
        model.reset_iter_state()
    dist.all_reduce(losses.figures)
    with (
        torch.no_grad(),
        mock.patch.object(sys.modules[type(reference).__module__], "chunk_attention", naive_attention),
    ):
        expected = sum(
            reference(tokens, whole_sequence(tokens, labels, naive_cross_entropy))
            for tokens, labels in sequences
        )
    total = losses.figures[0].sum()
    assert abs(total - expected) <= 1e-10 * expected
    return 1


@pytest.mark.proves("always + shared + validation", "stages x ranks + shared + validation")
@pytest.mark.parametrize("world_size, shape", [(2, None), (4, None), (4, (2, 2))])
def test_validation_of_shared_sequences(world_size, shape):
    assert run_ranks(validation_losses, world_size, shape) == [3 if shape else 6] * world_size


def on_cuda_kernels(seeds):
    """The same on naive kernels below torch's variable-length operators; and of one layer of a shared chunk, what
    is launched forward and backward, and the bytes that collectives carry."""
    processes = join()
    ranks = processes.replicas
    blocks = processes.blocks
    for seed in range(seeds):
        rng = random.Random(seed)
        family = rng.choice(list(families))
        reference, model = small_model(family), small_model(family)
        config = layout_config(reshard="never")
        parallel.apply_fsdp(model, processes.data_mesh, config.training, False)
        lengths = random_batch(rng)
        sequences = random_sequences(lengths, 96, seed)
        loss, expected = whole_sequence_gradients(reference, sequences)
        more = {"spread_over": ranks, "kv_tokens": 40, "blocks": blocks}
        with cuda_attention_on_cpu() as calls:
            got_loss, got = sharded_gradients(model, lengths, sequences, config, rng.choice([1, 2]), **more)
        assert calls
        assert abs(got_loss - loss) <= 1e-10 * loss
        assert_same_gradients(got, expected, 1e-10)
    block = range(ranks)
    group = spread_groups(0, 32 * ranks * 3, 32, block)[processes.replica]
    chunks = chunk_tensors([group], random_sequences([32 * ranks * 3], 96, 0))[0]
    state, counts = SharedKeyValueState(group, blocks[block]), []
    graphs, carried = [], []

    def carrying(collective):
        def call(output, source, **more):
            carried.append(max(output.nbytes, source.nbytes))
            return collective(output, source, **more)

        return call

    with cuda_attention_on_cpu(), pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "reduce_scatter"):
            patch.setattr(shared_state, name, carrying(getattr(shared_state, name)))
        for chunk in chunks:
            chunk.state = state
            inputs = [torch.randn(32, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
            with Launches() as launches:
                graphs.append((chunk_attention(*inputs, chunk, 0), inputs))
            counts.append(launches.names)
        for output, inputs in reversed(graphs):
            with Launches() as launches:
                torch.autograd.grad(output, inputs, torch.ones_like(output))
            counts.append(launches.names)
    # K and V of 2 heads of 16 in bf16, of the chunk and of the chunks before it: gathered forward, and again
    # backward, which sends gradients of as many on, in fp32.
    each = 32 * ranks * 2 * 2 * 16 * 2
    assert sum(carried) == each * (1 + 2 + 3) * (1 + 1 + 2)
    return counts


@pytest.mark.proves("never + shared + chunks")
@pytest.mark.parametrize("world_size", [2, 3])
def test_shared_sequences_on_the_kernels_of_cuda(world_size):
    for counts in run_ranks(on_cuda_kernels, world_size, 3):
        forward, backward = [[name for name in names if name != "arange"] for names in counts], counts[3:]
        write, read = ["copy_", "copy_"], ["index_select", "_varlen_attn", "_varlen_attn", "cat"]
        gathers = ["_allgather_base_"]
        # for a chunk's first layer "cat" makes the order of its tokens, too
        assert forward[0] == [*write, *gathers, "cat", *read]
        assert forward[1] == forward[2] == [*write, *gathers * 2, "cat", *read]
        for chunk, names in zip((2, 1, 0), backward):
            assert (
                names.count("_allgather_base_") == names.count("_reduce_scatter_base_") == (2 if chunk else 1)
            )
            assert names.count("_varlen_attn_backward") == 2
            assert len(names) <= 26  # whatever the chunk; each of two parts adds to four sums
