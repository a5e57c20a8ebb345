"""Rotary position embeddings with plain, linear, Llama 3 or YaRN scaling, by the formulas of transformers.

Shape suffixes: T tokens of the chunk, N heads, D head dimension, R = D / 2 rotated pairs.
"""

import math

import torch

# rope_type -> the keys of rope_scaling that have no default
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor")
ROPE_KEYS = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS, "yarn": ("factor",)}


class Rotary:
    """Rotates queries or keys, (T, N, D), by the angles of their positions; the first half of D pairs with
    the second. Made from `rotary_frequencies` once a forward, for all layers. Computes in `dtype`, at least
    fp32."""

    # Not a dataclass or a tuple of tensors: FSDP2 would cast those to the parameters' dtype.

    def __init__(
        self, frequencies: tuple[torch.Tensor, float], positions_T: torch.Tensor, dtype: torch.dtype
    ):
        frequencies_R, factor = frequencies
        angles_T1R = positions_T.to(dtype)[:, None, None] * frequencies_R.to(dtype)
        self.cos_T1R, self.sin_T1R = factor * angles_T1R.cos(), factor * angles_T1R.sin()

    def __call__(self, x_TND: torch.Tensor) -> torch.Tensor:
        a_TNR, b_TNR = x_TND.to(self.cos_T1R.dtype).chunk(2, dim=-1)
        rotated = a_TNR * self.cos_T1R - b_TNR * self.sin_T1R, b_TNR * self.cos_T1R + a_TNR * self.sin_T1R
        return torch.cat(rotated, dim=-1).to(x_TND.dtype)


def rope_type(scaling: dict | None) -> str:
    """The rope_type of a Hugging Face rope_scaling; ValueError where it is unknown or lacks a key."""
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))  # "type" in older files
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope_scaling has rope_type {kind!r}: use one of {', '.join(ROPE_KEYS)}")
    for key in ROPE_KEYS[kind]:
        if not isinstance(scaling.get(key), (int, float)) or scaling[key] <= 0:
            raise ValueError(f"rope_scaling {scaling} needs {key!r}, a number above 0: set it")
    return kind


def rotary_frequencies(
    head_dim: int, theta: float, scaling: dict | None, max_positions: int, device: torch.device
) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair, (R,) in fp64, and a factor for cosine and sine."""
    pairs_R = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    plain_R = theta ** (-2 * pairs_R / head_dim)
    kind = rope_type(scaling)
    if kind == "default":
        return plain_R, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return plain_R / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or max_positions
    if kind == "llama3":  # pairs that turn often within the original length stay, those that turn seldom slow
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept_R = ((original * plain_R / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return torch.lerp(plain_R / factor, plain_R, kept_R), 1.0

    # YaRN (arXiv 2309.00071): the same, mixed linearly in the pair's index, and a factor sharpens attention.
    turns = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    first, last = (head_dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(theta)) for n in turns)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    slowed_R = ((pairs_R - first) / (last - first or 0.001)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        spread = math.log(max(factor, 1))  # DeepSeek's files scale it twice, others once
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        over, under = (mscale, all_dim) if mscale and all_dim else (1, 0)
        attention_factor = (0.1 * over * spread + 1.0) / (0.1 * under * spread + 1.0)
    return torch.lerp(plain_R, plain_R / factor, slowed_R), attention_factor
