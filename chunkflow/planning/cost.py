"""FLOPs of a sequence, from the model's dimensions and the sequence's length."""

from __future__ import annotations

from typing import NamedTuple

# What a rank could compute while it waits for a byte from another. A GPU computes about 1,000 FLOPs in the
# time that NVLink takes, but most of it while it waits; two processes on one CPU about 100.
FLOPS_PER_BYTE = 300


class Cost(NamedTuple):
    """Forward FLOPs: `per_token` in products with weights, `per_pair` of a query and a key (all layers);
    `per_gathered`: what could be computed while K and V of a token come from another rank, in bfloat16;
    `frozen_per_token`: those of `per_token` whose weights are frozen. Their backward has one product, which
    gives the inputs' gradient, others have two."""

    per_token: float
    per_pair: float
    per_gathered: float = 0.0
    frozen_per_token: float = 0.0

    @classmethod
    def of_model(cls, args, adapters: int = 0) -> Cost:
        """From a model's sizes (`models.*.ModelArgs`): 2 FLOPs for each element of a weight matrix.
        `adapters`: elements of those of each layer, beside which all is frozen; 0: all is trained."""
        return cls.of_layers(args, args.n_layers, head=True, adapters=adapters)

    @classmethod
    def of_layers(cls, args, layers: int, head: bool, adapters: int = 0) -> Cost:
        """Of a pipeline stage: so many of the model's layers, with or without the head."""
        attention = args.n_heads * args.head_dim
        keys_values = 2 * args.n_kv_heads * args.head_dim
        layer = args.dim * (2 * attention + keys_values + 3 * args.hidden_dim)
        products = 2.0 * (layers * layer + head * args.dim * args.vocab_size)
        per_pair, per_gathered = 4.0 * layers * attention, 2.0 * layers * keys_values * FLOPS_PER_BYTE
        frozen = products if adapters else 0.0
        return cls(products + 2.0 * layers * adapters, per_pair, per_gathered, frozen)

    def forward(self, tokens: int, prefix: int = 0) -> float:
        """Forward FLOPs of `tokens` tokens that follow `prefix` others of their sequence."""
        return tokens * (self.per_token + self.per_pair * (prefix + (tokens + 1) / 2))

    def backward(self, tokens: int, prefix: int = 0) -> float:
        """Backward FLOPs of the same: two products for each of the forward, or one."""
        return 2 * self.forward(tokens, prefix) - tokens * self.frozen_per_token

    def training(self, length: int) -> float:
        """FLOPs of forward and backward of a whole sequence, the useful work that mfu counts."""
        return self.forward(length) + self.backward(length)

    def chunked_training(self, length: int, chunk_size: int, k: int) -> float:
        """FLOPs of `training`, and of the second forward of chunks that kept no activations."""
        discarded = max(0, -(-length // chunk_size) - k)
        return self.training(length) + self.forward(discarded * chunk_size)
