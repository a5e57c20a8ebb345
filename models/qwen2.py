"""Qwen2.5, the whole family in one file.

Rotary pairs lie as in Hugging Face's files, so weights load unpermuted. No batch dimension: the input is one
chunk. A pipeline stage is this model with layers and ends deleted.

Shape suffixes: T tokens of the chunk, C model width, H query heads, G key/value heads, D head dimension,
F feed-forward width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from chunkflow.execution.attention import begin_attention, chunk_attention, store_keys_values
from chunkflow.execution.norm import RMSNorm
from chunkflow.execution.recompute import cheap
from chunkflow.execution.rotary import Rotary, rope_type, rotary_frequencies
from chunkflow.execution.state import ChunkTensors

# Names in Hugging Face's files; `defaults`: what transformers takes for keys that a config.json leaves out.
HUGGING_FACE = {
    "model_type": "qwen2",
    "architecture": "Qwen2ForCausalLM",
    "defaults": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "unread": ("attention_bias",),  # keys without a meaning: the biases are always the same three
}


@dataclass(frozen=True)
class ModelArgs:
    """Sizes of one model; `rope_scaling` as in Hugging Face's config.json, `max_positions` in tokens."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int = 151936
    norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    rope_scaling: dict | None = None
    max_positions: int = 131072
    tied_embeddings: bool = False

    def __post_init__(self):
        rope_type(self.rope_scaling)  # refuses what rotary positions cannot do


_tied = {"tied_embeddings": True}
_large = {"vocab_size": 152064, "norm_eps": 1e-5}
# dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim
flavors = {
    "debugmodel": ModelArgs(256, 4, 4, 2, 64, 688, vocab_size=2048, **_tied),
    "0.5B": ModelArgs(896, 24, 14, 2, 64, 4864, max_positions=32768, **_tied),
    "1.5B": ModelArgs(1536, 28, 12, 2, 128, 8960, **_tied),
    "3B": ModelArgs(2048, 36, 16, 2, 128, 11008, max_positions=32768, **_tied),
    "7B": ModelArgs(3584, 28, 28, 4, 128, 18944, vocab_size=152064),
    "14B": ModelArgs(5120, 48, 40, 8, 128, 13824, **_large),
    "32B": ModelArgs(5120, 64, 40, 8, 128, 27648, **_large),
    "72B": ModelArgs(8192, 80, 64, 8, 128, 29568, **_large),
}


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(layer): TransformerBlock(args) for layer in range(args.n_layers)})
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.tie_embeddings()

    def forward(self, x: torch.Tensor, chunk: ChunkTensors) -> torch.Tensor | None:
        """One chunk through this stage. x: tokens (T,) where the stage has the embeddings, else hidden states
        (T, C).

        Returns hidden states (T, C) or, on the stage with the output head, `chunk.end` of them and the head's
        weight; None where `chunk.end` is None, as then only the chunk's keys and values are stored.
        """
        x_TC = x if self.tok_embeddings is None else self.tok_embeddings(x)
        args, compute = self.args, torch.promote_types(x_TC.dtype, torch.float32)
        angles = args.head_dim, args.rope_theta, args.rope_scaling, args.max_positions
        rotary = Rotary(rotary_frequencies(*angles, x_TC.device), chunk.positions, compute)
        ends_early = self.output is not None and chunk.end is None
        for number, (name, layer) in enumerate(self.layers.items(), 1):
            keys_values_only = ends_early and number == len(self.layers)
            x_TC = layer(x_TC, rotary, chunk, int(name), keys_values_only)
        if self.output is None:
            return x_TC  # a stage before the last
        return None if ends_early else chunk.end(self.norm(x_TC), self.output.weight, chunk)

    def init_parameter(self, name: str, rows: torch.Tensor, generator: torch.Generator) -> None:
        """Fills rows of one unsharded parameter in-place, from its name and the generator alone."""
        module = name.split(".")[-2]
        if name.endswith("bias"):
            nn.init.zeros_(rows)
        elif module.endswith("norm"):
            nn.init.ones_(rows)
        else:
            std = 0.02
            if module in ("wo", "w2"):  # the residual stream's variance should not grow with depth
                std /= math.sqrt(2 * self.args.n_layers)
            elif module == "tok_embeddings" and not self.args.tied_embeddings:
                std = 1.0  # else the loss jumps once what all tokens have in common is larger
            nn.init.trunc_normal_(rows, std=std, a=-3 * std, b=3 * std, generator=generator)

    def tie_embeddings(self) -> None:
        """Shares the embeddings' weight with the head where the model ties them and this stage has both."""
        if self.args.tied_embeddings and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    def to_empty(self, *, device: str | torch.device | int | None, recurse: bool = True) -> nn.Module:
        super().to_empty(device=device, recurse=recurse)  # which gives head and embeddings separate weights
        self.tie_embeddings()
        return self


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x_TC: torch.Tensor, rotary: Rotary, chunk: ChunkTensors, layer: int, keys_values_only: bool
    ) -> torch.Tensor | None:
        """The layer's hidden states; None with `keys_values_only`. torch.compile makes one graph of each of
        the two parts below."""
        if not keys_values_only:
            begin_attention(chunk, layer)
        q_THD, k_TGD, v_TGD = self.before_attention(x_TC, rotary, keys_values_only)
        if keys_values_only:
            return store_keys_values(k_TGD, v_TGD, chunk, layer)
        return self.after_attention(x_TC, chunk_attention(q_THD, k_TGD, v_TGD, chunk, layer))

    def before_attention(
        self, x_TC: torch.Tensor, rotary: Rotary, keys_values_only: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        return self.attention(cheap(self.attention_norm, x_TC), rotary, keys_values_only)

    def after_attention(self, x_TC: torch.Tensor, attention_THD: torch.Tensor) -> torch.Tensor:
        x_TC = x_TC + self.attention.wo(attention_THD.flatten(1))
        return x_TC + self.feed_forward(cheap(self.ffn_norm, x_TC))


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads_shape = (-1, args.head_dim)
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=True)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=True)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=True)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(
        self, x_TC: torch.Tensor, rotary: Rotary, keys_values_only: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Queries (None with `keys_values_only`), keys and values; `wo` follows chunk_attention."""
        k_TGD = rotary(self.wk(x_TC).unflatten(-1, self.heads_shape))
        v_TGD = self.wv(x_TC).unflatten(-1, self.heads_shape)
        if keys_values_only:
            return None, k_TGD, v_TGD
        q_THD = rotary(self.wq(x_TC).unflatten(-1, self.heads_shape))
        return q_THD, k_TGD, v_TGD


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.w2(cheap(self.gate, self.w1(x_TC), self.w3(x_TC)))

    def gate(self, a_TF: torch.Tensor, b_TF: torch.Tensor) -> torch.Tensor:
        return F.silu(a_TF) * b_TF
