"""CUDA's attention branch on CPU tensors: naive kernels under torch's variable-length operators.

`torch.ops.torch_attn._varlen_attn` and its backward run as they are; below them
`aten::_flash_attention_forward` and `_backward`, which have no CPU kernel, get one that asserts what
FlashAttention-2 demands of its arguments (csrc/flash_attn/flash_api.cpp, mha_varlen_fwd and mha_varlen_bwd).

Shape suffixes: T queries, P keys, S queries of a segment, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from chunkflow.execution import attention


class Call(NamedTuple):
    """One call of a kernel, as FlashAttention sees it."""

    backward: bool
    queries: list[int]  # of each segment
    keys: list[int]
    causal: bool
    splits_keys: bool  # FlashAttention-2 may spread the keys of a query over the whole GPU


@contextmanager
def cuda_attention_on_cpu() -> Iterator[list[Call]]:
    """Inside, attention takes CUDA's branch. Yields the list of kernel calls, which grows."""
    calls: list[Call] = []

    def forward(
        q_THD,
        k_PGD,
        v_PGD,
        query_ends,
        key_ends,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        alibi_slopes=None,
        block_table=None,
        num_splits=None,
    ):
        assert dropout_p == 0 and not return_debug_mask
        assert seqused_k is None and alibi_slopes is None and block_table is None and num_splits is None
        limits = query_ends, key_ends, max_q, max_k, is_causal, window_size_left, window_size_right
        calls.append(checked_call(False, q_THD, k_PGD, v_PGD, *limits))
        out_THD, lse_HT = naive_forward(q_THD, k_PGD, v_PGD, query_ends, key_ends, is_causal, scale)
        return out_THD, lse_HT, *(torch.empty(0) for _ in range(3))

    def backward(
        dout_THD,
        q_THD,
        k_PGD,
        v_PGD,
        out_THD,
        lse_HT,
        query_ends,
        key_ends,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        random_state,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        assert dropout_p == 0 and random_state.dtype == torch.uint64 and random_state.shape == (2,)
        limits = query_ends, key_ends, max_q, max_k, is_causal, window_size_left, window_size_right
        calls.append(checked_call(True, q_THD, k_PGD, v_PGD, *limits))
        results = dout_THD, q_THD, k_PGD, v_PGD, out_THD, lse_HT
        return naive_backward(*results, query_ends, key_ends, is_causal, scale)

    def cuda_kernels(q_THD):
        return attention._forward_cuda, attention._backward_cuda

    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        mock.patch.object(attention, "_kernels", cuda_kernels),
    ):
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls


def checked_call(
    backward, q_THD, k_PGD, v_PGD, query_ends, key_ends, max_q, max_k, is_causal, left, right
) -> Call:
    """Asserts FlashAttention-2's contract for variable lengths; says whether it could split the keys."""
    heads, kv_heads = q_THD.size(1), k_PGD.size(1)
    for tensor in (q_THD, k_PGD, v_PGD):
        assert tensor.dim() == 3 and tensor.stride(-1) == 1 and tensor.dtype == q_THD.dtype
    assert k_PGD.shape == v_PGD.shape and k_PGD.size(2) == q_THD.size(2)
    assert heads % kv_heads == 0 and q_THD.size(2) % 8 == 0 and q_THD.size(2) <= 256
    for ends, tensor in ((query_ends, q_THD), (key_ends, k_PGD)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.device == tensor.device
        assert ends[0] == 0 and ends[-1] == tensor.size(0), (ends, tensor.shape)
    assert query_ends.shape == key_ends.shape
    queries, keys = query_ends.diff().tolist(), key_ends.diff().tolist()
    assert min(queries) > 0 and all(own <= seen for own, seen in zip(queries, keys))
    assert max_q >= max(queries) and max_k >= max(keys)
    # Attention of this project is causal, with all earlier keys in sight. A single query is the last position
    # of its segment: without a mask it sees the same keys.
    assert (is_causal, left, right) == (True, -1, 0) or (max_q == 1 and (left, right) == (-1, -1))
    # "seqlenq_ngroups_swapped" in FlashAttention-2, which it asks for before it sets its number of splits.
    splits_keys = not backward and max_q == 1 and heads > kv_heads and left < 0 and right < 0
    return Call(backward, queries, keys, is_causal, splits_keys)


def naive_forward(q_THD, k_PGD, v_PGD, query_ends, key_ends, is_causal, scale):
    """(T, H, D) and the log-sum-exp of the scores, (H, T), in at least fp32."""
    out_THD = torch.empty_like(q_THD)
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    lse_HT = torch.empty(q_THD.size(1), q_THD.size(0), dtype=wide)
    for queries, keys in _segments(query_ends, key_ends):
        q_SHD, k_PHD, v_PHD = _wide_heads(q_THD[queries], k_PGD[keys], v_PGD[keys])
        scores_HSP = _scores(q_SHD, k_PHD, is_causal, scale)
        lse_HT[:, queries] = scores_HSP.logsumexp(-1)
        out_THD[queries] = torch.einsum("hsp,phd->shd", scores_HSP.softmax(-1), v_PHD).to(out_THD.dtype)
    return out_THD, lse_HT


def naive_backward(dout_THD, q_THD, k_PGD, v_PGD, out_THD, lse_HT, query_ends, key_ends, is_causal, scale):
    """Gradients of queries, keys and values, from the forward's result and log-sum-exp."""
    assert dout_THD.shape == out_THD.shape == q_THD.shape
    assert lse_HT.shape == (q_THD.size(1), q_THD.size(0)) and lse_HT.is_contiguous()
    assert lse_HT.dtype == torch.promote_types(q_THD.dtype, torch.float32)
    factor = q_THD.size(-1) ** -0.5 if scale is None else scale
    dq_THD, dk_PGD, dv_PGD = torch.empty_like(q_THD), torch.empty_like(k_PGD), torch.empty_like(v_PGD)
    for queries, keys in _segments(query_ends, key_ends):
        q_SHD, k_PHD, v_PHD = _wide_heads(q_THD[queries], k_PGD[keys], v_PGD[keys])
        dout_SHD, out_SHD = dout_THD[queries].to(q_SHD.dtype), out_THD[queries].to(q_SHD.dtype)
        shares_HSP = (_scores(q_SHD, k_PHD, is_causal, scale) - lse_HT[:, queries].unsqueeze(-1)).exp()
        dshares_HSP = torch.einsum("shd,phd->hsp", dout_SHD, v_PHD)
        delta_HS1 = (dout_SHD * out_SHD).sum(-1).t().unsqueeze(-1)
        dscores_HSP = shares_HSP * (dshares_HSP - delta_HS1) * factor
        dq_THD[queries] = torch.einsum("hsp,phd->shd", dscores_HSP, k_PHD).to(dq_THD.dtype)
        for gradient_PGD, shares, of_SHD in ((dk_PGD, dscores_HSP, q_SHD), (dv_PGD, shares_HSP, dout_SHD)):
            every_head = torch.einsum("hsp,shd->phd", shares, of_SHD)
            summed = every_head.unflatten(1, (k_PGD.size(1), -1)).sum(2)
            gradient_PGD[keys] = summed.to(gradient_PGD.dtype)
    return dq_THD, dk_PGD, dv_PGD


def _segments(query_ends, key_ends) -> Iterator[tuple[slice, slice]]:
    """Each segment's queries and its keys."""
    queries, keys = query_ends.tolist(), key_ends.tolist()
    return zip(map(slice, queries, queries[1:]), map(slice, keys, keys[1:]))


def _wide_heads(q_SHD, k_PGD, v_PGD):
    """All in at least fp32, with a key/value head for each query head."""
    wide, repeats = torch.promote_types(q_SHD.dtype, torch.float32), q_SHD.size(1) // k_PGD.size(1)
    return q_SHD.to(wide), *(x.to(wide).repeat_interleave(repeats, 1) for x in (k_PGD, v_PGD))


def _scores(q_SHD, k_PHD, is_causal, scale):
    """Scaled products, -inf where a query does not see a key: causal is aligned to the bottom right, so that
    the last query sees all keys."""
    factor = q_SHD.size(-1) ** -0.5 if scale is None else scale
    scores_HSP = torch.einsum("shd,phd->hsp", q_SHD, k_PHD) * factor
    if not is_causal:
        return scores_HSP
    queries, keys = scores_HSP.shape[1:]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return scores_HSP.masked_fill(~seen, float("-inf"))
