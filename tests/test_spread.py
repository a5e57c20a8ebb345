"""A sequence over several ranks: loss and every gradient equal whole sequences in one process."""

from __future__ import annotations

import random

import pytest
import torch.distributed as dist

from chunkflow.planning.pipeline_schedule import live_limit
from chunkflow.training import parallel
from models import families
from tests.helpers.layouts import Pipeline, join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import run_ranks
from tests.helpers.reference import assert_same_gradients, random_sequences, whole_sequence_gradients


def random_batch(rng: random.Random) -> list[int]:
    """A few sequences that are long for these models, and short ones."""
    long = [rng.randint(60, 300) for _ in range(rng.randint(1, 3))]
    return long + [rng.randint(1, 40) for _ in range(rng.randint(0, 6))]


def cases(replicas):
    config = layout_config(replicas=replicas)
    processes = join(config)
    ranks = processes.replicas
    blocks = parallel.init_blocks(processes, ranks)
    checked = 0
    for reshard in ("never", "always"):
        for mode in ("none", "full"):
            config = layout_config(replicas=replicas, reshard=reshard, mode=mode)
            reference, model = small_model("llama3"), small_model("llama3")
            parallel.apply_activation_checkpoint(model, config.activation_checkpoint)
            parallel.apply_fsdp(model, processes.data_mesh, config.training, reshard == "always")
            for seed in range(4 if mode == "none" else 1):
                rng = random.Random(f"{reshard}/{mode}/{seed}")
                lengths = random_batch(rng)
                sequences = random_sequences(lengths, 96, seed)
                loss, expected = whole_sequence_gradients(reference, sequences)
                more = {"spread_over": ranks, "kv_tokens": rng.choice([0, 60]), "blocks": blocks}
                got_loss, got = sharded_gradients(
                    model, lengths, sequences, config, rng.choice([1, 2, 9]), **more
                )
                assert abs(got_loss - loss) <= 1e-10 * loss
                assert_same_gradients(got, expected, 1e-10)
                checked += 1
    return checked


@pytest.mark.parametrize("world_size, replicas", [(2, 1), (3, 1), (4, 1), (4, 2), (6, 1)])
def test_shared_sequences_give_the_gradients_of_one_process(world_size, replicas):
    assert run_ranks(cases, world_size, replicas) == [10] * world_size


def on_stages(shape, virtual):
    join()
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp_shard"))
    checked, blocks = 0, None
    for family in families:
        whole = small_model(family, n_layers=5, tied_embeddings=family != "llama3")
        pipeline = Pipeline(family, mesh, virtual, whole, blocks=blocks)
        blocks = pipeline.blocks
        for seed in range(4):
            rng = random.Random(f"{family}/{seed}")
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


@pytest.mark.parametrize("shape, virtual", [((2, 2), 1), ((2, 2), 2), ((2, 3), 1)])
def test_stages_share_sequences_with_their_like(shape, virtual):
    assert run_ranks(on_stages, shape[0] * shape[1], shape, virtual) == [12] * (shape[0] * shape[1])
