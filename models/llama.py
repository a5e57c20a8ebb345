"""Llama 3.1 and 3.2, the whole family in one file. Rotary pairs lie as Hugging Face has them, so weights load
unpermuted.

There is no batch dimension: the model gets one chunk. A pipeline stage is this model with layers and ends
deleted.

Shape suffixes: T tokens of the chunk, C model width, H query heads, G key/value heads, N either of these, D
head dimension, R = D / 2 rotated pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from chunkflow.execution.attention import chunk_attention, store_keys_values
from chunkflow.execution.state import ChunkTensors

# rope_type -> the keys of rope_scaling that have no default
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class ModelArgs:
    """Sizes of one model. `rope_scaling` has the keys of Hugging Face's config.json; `max_positions` is in
    tokens."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int = 128256
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None
    max_positions: int = 131072
    tied_embeddings: bool = False

    def __post_init__(self):
        if self.rope_type not in ROPE_KEYS:
            raise ValueError(
                f"rope_scaling has rope_type {self.rope_type!r}: use one of {', '.join(ROPE_KEYS)}"
            )
        for key in ROPE_KEYS[self.rope_type]:
            if not isinstance(self.rope_scaling.get(key), (int, float)) or self.rope_scaling[key] <= 0:
                raise ValueError(f"rope_scaling {self.rope_scaling} needs {key!r}, a number above 0: set it")

    @property
    def rope_type(self) -> str:
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type", "default"))  # "type" in older files


_scaling = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_llama3_1 = {"rope_scaling": _scaling | {"factor": 8.0}}
_llama3_2 = {"rope_scaling": _scaling | {"factor": 32.0}, "tied_embeddings": True}
flavors = {
    "debugmodel": ModelArgs(
        dim=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=688, vocab_size=2048
    ),
    "8B": ModelArgs(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, **_llama3_1
    ),
    "70B": ModelArgs(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128, hidden_dim=28672, **_llama3_1
    ),
    "1B": ModelArgs(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, hidden_dim=8192, **_llama3_2
    ),
    "3B": ModelArgs(
        dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, head_dim=128, hidden_dim=8192, **_llama3_2
    ),
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
        """One chunk through this stage. x: tokens (T,) where there are embeddings, else hidden states (T, C).

        Returns hidden states (T, C), or with an output head the sum of token losses (0-dim, at least fp32),
        or each of them (T,) for `chunk.each_loss`; for a chunk without labels, which is to be continued, the
        last token's logits (vocabulary, at least fp32). Where only the chunk's keys and values are wanted
        (`chunk.state_only`), nobody reads what follows those of the last layer: None.
        """
        x_TC = x if self.tok_embeddings is None else self.tok_embeddings(x)
        rotary = Rotary(self.args, chunk.positions, torch.promote_types(x_TC.dtype, torch.float32))
        keys_values_only = self.output is not None and chunk.end is None
        last = list(self.layers)[-1] if self.layers else None
        for name, layer in self.layers.items():
            x_TC = layer(x_TC, rotary, chunk, int(name), keys_values_only=keys_values_only and name == last)
        if self.output is None:
            return x_TC
        if chunk.end is None:
            return None
        return chunk.end(self.norm(x_TC), self.output.weight, chunk)

    def init_parameter(self, name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
        """Fills one unsharded parameter in place. The values depend on its name, its shape and the generator
        alone."""
        module = name.split(".")[-2]
        if name.endswith("bias"):
            nn.init.zeros_(whole)
        elif module.endswith("norm"):
            nn.init.ones_(whole)
        else:
            # Each layer adds to the residual stream twice; without the factor its variance would grow with
            # depth.
            std = 0.02 / math.sqrt(2 * self.args.n_layers) if module in ("wo", "w2") else 0.02
            nn.init.trunc_normal_(whole, std=std, a=-3 * std, b=3 * std, generator=generator)

    def tie_embeddings(self) -> None:
        """Makes the head's weight the embeddings' own parameter, where the model ties them and this stage has
        both."""
        if self.args.tied_embeddings and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    def to_empty(self, *, device: str | torch.device | int | None, recurse: bool = True) -> Transformer:
        super().to_empty(device=device, recurse=recurse)  # gives each module a parameter of its own
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
        self,
        x_TC: torch.Tensor,
        rotary: Rotary,
        chunk: ChunkTensors,
        layer: int,
        keys_values_only: bool = False,
    ) -> torch.Tensor | None:
        attention_TC = self.attention(self.attention_norm(x_TC), rotary, chunk, layer, keys_values_only)
        if keys_values_only:
            return None
        x_TC = x_TC + attention_TC
        return x_TC + self.feed_forward(self.ffn_norm(x_TC))


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads_shape = (-1, args.head_dim)
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(
        self, x_TC: torch.Tensor, rotary: Rotary, chunk: ChunkTensors, layer: int, keys_values_only: bool
    ) -> torch.Tensor | None:
        k_TGD = rotary(self.wk(x_TC).unflatten(-1, self.heads_shape))
        v_TGD = self.wv(x_TC).unflatten(-1, self.heads_shape)
        if keys_values_only:
            return store_keys_values(k_TGD, v_TGD, chunk, layer)
        q_THD = rotary(self.wq(x_TC).unflatten(-1, self.heads_shape))
        return self.wo(chunk_attention(q_THD, k_TGD, v_TGD, chunk, layer).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x_TC)) * self.w3(x_TC))


class Rotary:
    """Turns queries and keys by the angles of their positions, in at least fp32. Made once a forward, for all
    layers.

    Not a dataclass or a tuple of tensors: FSDP2 would cast them to the parameters' dtype on their way into a
    layer.
    """

    def __init__(self, args: ModelArgs, positions_T: torch.Tensor, dtype: torch.dtype):
        frequencies_R, factor = rotary_frequencies(args, positions_T.device)
        angles_T1R = positions_T.to(dtype)[:, None, None] * frequencies_R.to(dtype)
        self.cos_T1R, self.sin_T1R = factor * angles_T1R.cos(), factor * angles_T1R.sin()

    def __call__(self, x_TND: torch.Tensor) -> torch.Tensor:
        a_TNR, b_TNR = x_TND.to(self.cos_T1R.dtype).chunk(2, dim=-1)
        turned = a_TNR * self.cos_T1R - b_TNR * self.sin_T1R, b_TNR * self.cos_T1R + a_TNR * self.sin_T1R
        return torch.cat(turned, dim=-1).to(x_TND.dtype)


def rotary_frequencies(args: ModelArgs, device: torch.device) -> tuple[torch.Tensor, float]:
    """Radians per position of each rotated pair, (R,) in fp64, and a factor for cosine and sine:
    transformers' formulas."""
    pairs_R = torch.arange(args.head_dim // 2, dtype=torch.float64, device=device)
    plain_R = args.rope_theta ** (-2 * pairs_R / args.head_dim)
    if args.rope_type == "default":
        return plain_R, 1.0
    scaling = args.rope_scaling
    factor = scaling["factor"]
    if args.rope_type == "linear":
        return plain_R / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or args.max_positions
    if args.rope_type == "llama3":
        # Pairs that turn often within the original length stay, those that turn seldom are slowed, those
        # between are mixed.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept_R = ((original * plain_R / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return torch.lerp(plain_R / factor, plain_R, kept_R), 1.0

    # YaRN (arXiv 2309.00071): the same idea, mixed linearly in the pair's index, and attention made sharper
    # by a factor.
    def pair_with(turns: float) -> float:
        return args.head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(args.rope_theta))

    def sharpness(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    first, last = pair_with(scaling.get("beta_fast") or 32), pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, args.head_dim - 1)
    slowed_R = ((pairs_R - first) / (last - first or 0.001)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = (
            sharpness(mscale) / sharpness(mscale_all_dim) if mscale and mscale_all_dim else sharpness(1)
        )
    return torch.lerp(plain_R, plain_R / factor, slowed_R), attention_factor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """For devices where F.rms_norm is not one kernel: that keeps three tensors of x's size (six in bf16),
    this keeps x."""

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square().div(x.size(-1)).add(eps).rsqrt()
        )
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        wide, wide_weight, dy = (tensor.to(inverse.dtype) for tensor in (x, weight, dy))
        normed = wide * inverse
        products = dy * normed
        dweight = products.flatten(0, -2).sum(0)
        mean = (products @ wide_weight).unsqueeze(-1) / x.size(-1)
        dx = (dy * wide_weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype), dweight.to(weight.dtype), None
