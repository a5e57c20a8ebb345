"""A sequence over several ranks: loss and every gradient equal whole sequences in one process."""

from __future__ import annotations

import random

import pytest

from chunkflow.training import parallel
from tests.helpers.layouts import join, layout_config, sharded_gradients, small_model
from tests.helpers.processes import run_ranks
from tests.helpers.reference import assert_same_gradients, random_sequences, whole_sequence_gradients


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
                lengths = [rng.randint(60, 300) for _ in range(rng.randint(1, 3))]
                lengths += [rng.randint(1, 40) for _ in range(rng.randint(0, 6))]
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
