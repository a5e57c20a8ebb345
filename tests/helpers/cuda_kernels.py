"""CUDA's attention branch on CPU tensors: naive kernels under torch's variable-length operators.

`torch.ops.torch_attn._varlen_attn` and its backward run as they are; below them
`aten::_flash_attention_forward` and `_backward`, which have no CPU kernel, get one that asserts what
FlashAttention-2 demands of its arguments (csrc/flash_attn/flash_api.cpp, mha_varlen_fwd and mha_varlen_bwd).
Or the same stand in for FlashAttention-3's, below what torch registers in their place.

Shape suffixes: T queries, P keys, S queries of a segment, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn.attention import _fa3, restore_flash_attention_impl

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

    with torch.library._scoped_library("aten", "IMPL") as library, _cuda_branch():
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls


def _cuda_branch():
    kernels = attention._forward_cuda, attention._backward_cuda
    return mock.patch.object(attention, "_kernels", lambda q_THD: kernels)


@contextmanager
def flash_attention_3_on_cpu() -> Iterator[list[Call]]:
    """The same on a machine that seems to have a Hopper GPU and FlashAttention-3, which a test has to
    activate: what torch then registers for CUDA is registered for the CPU."""
    calls: list[Call] = []

    def forward(*arguments):
        a = _by_name(torch.ops.flash_attn_3.fwd, arguments)
        limits = a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k, a.is_causal
        limits += a.window_size_left, a.window_size_right
        unused = a.k_new, a.v_new, a.q_v, a.out, a.cu_seqlens_k_new, a.seqused_q, a.seqused_k, a.page_table
        assert not any(tensor is not None for tensor in unused) and a.attention_chunk == a.softcap == 0
        calls.append(checked_call(False, a.q, a.k, a.v, *limits))
        inputs = a.q, a.k, a.v, a.cu_seqlens_q, a.cu_seqlens_k
        return *naive_forward(*inputs, a.is_causal, a.softmax_scale), torch.empty(0), torch.empty(0)

    def backward(*arguments):
        a = _by_name(torch.ops.flash_attn_3.bwd, arguments)
        limits = a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k, a.is_causal
        limits += a.window_size_left, a.window_size_right
        assert a.seqused_q is a.seqused_k is None and a.softcap == 0
        calls.append(checked_call(True, a.q, a.k, a.v, *limits))
        inputs = a.dout, a.q, a.k, a.v, a.out, a.softmax_lse, a.cu_seqlens_q, a.cu_seqlens_k
        for gradient, new in zip((a.dq, a.dk, a.dv), naive_backward(*inputs, a.is_causal, a.softmax_scale)):
            gradient.copy_(new)
        return tuple(torch.empty(0) for _ in range(5))

    with (
        torch.library._scoped_library("flash_attn_3", "DEF") as interface,
        torch.library._scoped_library("aten", "IMPL") as library,
        mock.patch.dict(sys.modules, {"flash_attn_interface": types.ModuleType("flash_attn_interface")}),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        mock.patch.object(_fa3, "_fa3_common_support_error", lambda *tensors: None),  # "must be CUDA tensors"
        mock.patch.object(_fa3, "Library", lambda *where: _OnCPU(library)),
        _cuda_branch(),
    ):
        for schema, function in ((FORWARD_OF_3, forward), (BACKWARD_OF_3, backward)):
            interface.impl(interface.define(schema), function, "CPU")
        try:
            yield calls
        finally:
            restore_flash_attention_impl(_raise_warn=False)


def _by_name(operator, arguments) -> types.SimpleNamespace:
    """An operator's arguments; the dispatcher omits the last ones where they are the defaults."""
    schema = operator.default._schema.arguments
    given = dict(zip((argument.name for argument in schema), arguments))
    return types.SimpleNamespace(**{argument.name: argument.default_value for argument in schema} | given)


class _OnCPU:
    """A torch.library.Library that registers for the CPU what is meant for CUDA."""

    def __init__(self, library):
        self.library = library

    def impl(self, name, function, dispatch_key):
        assert dispatch_key == "CUDA"
        if name in ("_flash_attention_forward", "_flash_attention_backward"):
            self.library.impl(name, function, "CPU")


# hopper/flash_api.cpp
FORWARD_OF_3 = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v"
    " = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor?"
    " cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,"
    " int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k ="
    " None, Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor?"
    " q_descale = None, Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool"
    " is_causal = False, int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float"
    " softcap = 0.0, bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits ="
    " 0, bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD_OF_3 = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None,"
    " Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k ="
    " None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k ="
    " None, float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int"
    " window_size_right = -1, float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> (Tensor,"
    " Tensor, Tensor, Tensor, Tensor)"
)


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
