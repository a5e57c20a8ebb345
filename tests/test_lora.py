"""Low-rank adapters: their gradients equal those of whole sequences, on every layout."""

from __future__ import annotations

import random

import pytest
import torch

from chunkflow.planning.chunks import build_groups
from chunkflow.settings import options
from chunkflow.training import parallel
from chunkflow.training.lora import apply_lora, is_adapter, target_modules, without_adapters
from models import families
from tests.helpers.layouts import small_model
from tests.helpers.reference import (
    assert_same_gradients,
    chunked_gradients,
    random_lengths,
    random_sequences,
    whole_sequence_gradients,
)

FP64 = options.Training(dtype="float64", mixed_precision_param="float64")


def with_adapters(model, family, targets=(), rank=3):
    """The model, in fp64, with adapters of which no part is zero."""
    apply_lora(model, options.Lora(rank=rank, target_modules=list(targets)), families[family], FP64)
    parallel.init_weights(model, seed=1, chosen=is_adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b.weight"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


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
