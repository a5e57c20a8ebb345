"""Chunk-aware attention: causal within each sequence, across the chunks of that sequence, without a mask.

A dependent chunk attends to its prefix (not causal) and to itself (causal); the two results are merged by
their log-sum-exp. The flash backward of each part, given the merged output and log-sum-exp, returns exactly
that part's gradients, as in ring attention. On the CPU each part is one flash call on views of the group's
K/V buffer; on CUDA the chunk with all its segments is one variable-length call, as causal attention aligned
to the bottom right covers prefix and chunk at once.

Shape suffixes: T tokens, P prefix tokens, H query heads, G key/value heads, D head dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen  # noqa: F401  registers torch.ops.torch_attn

from chunkflow.execution.kept_attention import Results
from chunkflow.execution.linear import pad, padded_rows, whole_rows, widen
from chunkflow.execution.recompute import runs_again
from chunkflow.execution.state import ChunkTensors

_flash_forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def activate_flash_attention_3() -> None:
    """On CUDA, attention of this process uses the kernels of the module flash_attn_interface from now on."""
    torch.nn.attention.activate_flash_attention_impl("FA3")


@torch.compiler.disable
def begin_attention(chunk: ChunkTensors, layer: int) -> None:
    """Call before a layer makes a chunk's queries, keys and values: what other ranks have of its prefix, or
    the host of its results, comes meanwhile. `chunk_attention` follows."""
    kept = chunk.kept
    if kept is not None and torch.is_grad_enabled():
        kept.begin(layer)
    if chunk.parts and (kept is None or layer not in kept):
        chunk.state.begin(layer, chunk.index)


@torch.compiler.disable  # reads and writes the state, which a compiled graph must not
def chunk_attention(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, chunk: ChunkTensors, layer: int
) -> torch.Tensor:
    """Attention of one chunk in one layer, (T, H, D). H must be a multiple of G (grouped-query attention).

    Forward stores the chunk's keys and values in `chunk.state`. Backward adds gradients of the prefix's keys
    and values to the state, and the gradients that later chunks added there to the chunk's. Keys and values
    of the prefix are not autograd inputs. With `chunk.kept` a forward that will come again keeps its results,
    and the next one takes them: it computes and stores nothing.
    """
    function = _SharedAttention if chunk.parts else _ChunkAttention
    again = chunk.kept is not None and (not torch.is_grad_enabled() or runs_again())
    return function.apply(q_THD, k_TGD, v_TGD, chunk, layer, again)


@torch.compiler.disable
def store_keys_values(k_TGD: torch.Tensor, v_TGD: torch.Tensor, chunk: ChunkTensors, layer: int) -> None:
    """Stores a chunk's keys and values of one layer, without attention."""
    chunk.state.write(layer, chunk.index, k_TGD, v_TGD)


def _kernels(q_THD: torch.Tensor):
    """Forward and backward for the tensor's device. Tests replace this to run CUDA's on the CPU."""
    return (_forward_cuda, _backward_cuda) if q_THD.is_cuda else (_forward_cpu, _backward_cpu)


def _once(compute: Callable[..., Results], q_THD, k_TGD, v_TGD, chunk: ChunkTensors, layer: int, again: bool):
    """The output and what else backward needs: computed, or kept since an earlier forward."""
    kept = chunk.kept
    results = None if kept is None else kept.take(layer, again)
    if results is None:
        results = compute(q_THD, k_TGD, v_TGD, chunk, layer)
        if again:
            kept.put(layer, results)
    out_THD, *extras = results
    # What is kept must not get a graph; and to torch.compile a view and what is none are two kinds of inputs.
    return out_THD.detach(), extras


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THD, k_TGD, v_TGD, chunk: ChunkTensors, layer: int, again: bool):
        out_THD, extra = _once(_attend, q_THD, k_TGD, v_TGD, chunk, layer, again)
        ctx.chunk, ctx.layer = chunk, layer
        # With a state, keys and values are in its buffer already: saving them too would hold them twice.
        # Views of that buffer must not be saved, since later chunks write into it.
        keys_values = (k_TGD, v_TGD) if chunk.state is None else ()
        ctx.save_for_backward(q_THD, out_THD, *extra, *keys_values)
        ctx.extras = len(extra)
        return out_THD

    @staticmethod
    def backward(ctx, dout_THD):
        chunk, layer, state = ctx.chunk, ctx.layer, ctx.chunk.state
        q_THD, out_THD, *rest = ctx.saved_tensors
        if chunk.kept is not None:
            chunk.kept.drop(layer)
        extra, keys_values = rest[: ctx.extras], rest[ctx.extras :]
        if state is not None:
            keys_values = state.read(layer, chunk.prefix, chunk.prefix + q_THD.size(0))
        _, backward = _kernels(q_THD)
        dq, dk, dv, dk_prefix, dv_prefix = backward(
            dout_THD, q_THD, *keys_values, out_THD, extra, chunk, layer
        )
        if state is not None:
            later = state.exchange_gradients(layer, chunk.index, dk_prefix, dv_prefix)
            if later is not None:  # summed in the wider dtype, rounded once, in one kernel each
                dk.add_(later[0])
                dv.add_(later[1])
        return dq, dk, dv, None, None, None


def _attend(q_THD, k_TGD, v_TGD, chunk: ChunkTensors, layer: int) -> Results:
    if chunk.state is not None:
        chunk.state.write(layer, chunk.index, k_TGD, v_TGD)
    forward, _ = _kernels(q_THD)
    return forward(q_THD, k_TGD, v_TGD, chunk, layer)


class _SharedAttention(torch.autograd.Function):
    """Of a chunk that ranks share: this rank's two parts, each after all tokens before it in the sequence."""

    @staticmethod
    def forward(ctx, q_THD, k_TGD, v_TGD, chunk: ChunkTensors, layer: int, again: bool):
        out_THD, extras = _once(_attend_shared, q_THD, k_TGD, v_TGD, chunk, layer, again)
        ctx.chunk, ctx.layer = chunk, layer
        ctx.save_for_backward(q_THD, out_THD, *extras)
        return out_THD

    @staticmethod
    def backward(ctx, dout_THD):
        chunk, layer, state = ctx.chunk, ctx.layer, ctx.chunk.state
        q_THD, out_THD, *extras = ctx.saved_tensors
        if chunk.kept is not None:
            chunk.kept.drop(layer)
        gathered = state.gathered(layer, chunk.index)
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        sums = torch.zeros_like(gathered.rows, dtype=wide)  # gradients of all keys and values
        dqs, each = [], len(extras) // len(chunk.parts)
        for number, (part, piece) in enumerate(zip(chunk.parts, _pieces(chunk))):
            extra = extras[each * number : each * (number + 1)]
            tensors = dout_THD[piece], q_THD[piece], out_THD[piece], extra
            dqs.append(_backward_of_part(*tensors, part, layer, gathered, sums))
        del gathered  # what is sent on is as large again
        dk, dv = state.exchange_gradients(layer, chunk.index, sums)
        return torch.cat(dqs), dk.to(q_THD.dtype), dv.to(q_THD.dtype), None, None, None


def _attend_shared(q_THD, k_TGD, v_TGD, chunk: ChunkTensors, layer: int) -> Results:
    chunk.state.write(layer, chunk.index, k_TGD, v_TGD)
    gathered = chunk.state.gathered(layer, chunk.index)
    forward, _ = _kernels(q_THD)
    outs, extras = [], []
    for part, piece in zip(chunk.parts, _pieces(chunk)):
        part.state = gathered
        out_THD, *extra = forward(q_THD[piece], k_TGD[piece], v_TGD[piece], part, layer)
        part.state = None
        outs.append(out_THD)
        extras += extra
    return torch.cat(outs), *extras


def _backward_of_part(dout_THD, q_THD, out_THD, extra, part: ChunkTensors, layer: int, gathered, sums):
    """The gradient of a part's queries. Adds those of the keys and values that it sees to `sums`, and keeps
    none of them: each is as large as what is gathered."""
    _, backward = _kernels(q_THD)
    part.state, start = gathered, part.prefix
    end = start + part.lengths[0]
    keys_values = gathered.read(layer, start, end)
    dq, *own, dk_prefix, dv_prefix = backward(dout_THD, q_THD, *keys_values, out_THD, extra, part, layer)
    part.state = None
    for which, (dx, dx_prefix) in enumerate(zip(own, (dk_prefix, dv_prefix))):
        sums[start:end, which].add_(dx)
        if start:
            sums[:start, which].add_(dx_prefix)
    return dq


def _heads_first(x_THD: torch.Tensor) -> torch.Tensor:
    return x_THD.transpose(0, 1).unsqueeze(0)  # (1, H, T, D), a view


def _tokens_first(x_1HTD: torch.Tensor) -> torch.Tensor:
    return x_1HTD.squeeze(0).transpose(0, 1)


def _pieces(chunk: ChunkTensors) -> list[slice]:
    """Each segment's tokens inside the chunk."""
    return [slice(start, end) for start, end in zip(chunk.ends, chunk.ends[1:])]


def _flash(q_1HTD, k_1GPD, v_1GPD, causal: bool):
    """Output and log-sum-exp. Rows are padded where the CPU multiplies bf16: behind all others they are seen
    by none, and of a prefix whole rows come here. Where it does not, all is widened."""
    tokens, dtype = q_1HTD.size(2), q_1HTD.dtype
    if causal:
        k_1GPD, v_1GPD = pad(k_1GPD, 2), pad(v_1GPD, 2)
    q_1HTD, k_1GPD, v_1GPD = widen(pad(q_1HTD, 2)), widen(k_1GPD), widen(v_1GPD)
    out, lse = _flash_forward_op(q_1HTD, k_1GPD, v_1GPD, 0.0, causal)
    return out[:, :, :tokens].to(dtype), lse[:, :, :tokens]


def _flash_backward(dout_1HTD, q_1HTD, k_1GPD, v_1GPD, out_1HTD, lse_1HT, causal: bool):
    tokens, keys, dtype = q_1HTD.size(2), k_1GPD.size(2), q_1HTD.dtype
    if extra := padded_rows(tokens, q_1HTD) - tokens:
        dout_1HTD, q_1HTD, out_1HTD = pad(dout_1HTD, 2), pad(q_1HTD, 2), pad(out_1HTD, 2)
        lse_1HT = F.pad(lse_1HT, (0, extra))
        if causal:
            k_1GPD, v_1GPD = pad(k_1GPD, 2), pad(v_1GPD, 2)
    tensors = map(widen, (dout_1HTD, q_1HTD, k_1GPD, v_1GPD, out_1HTD))
    dq, dk, dv = _flash_backward_op(*tensors, lse_1HT, 0.0, causal)
    return dq[:, :, :tokens].to(dtype), dk[:, :, :keys].to(dtype), dv[:, :, :keys].to(dtype)


def _forward_cpu(q_THD, k_TGD, v_TGD, chunk: ChunkTensors, layer: int):
    q, k, v = _heads_first(q_THD), _heads_first(k_TGD), _heads_first(v_TGD)
    first, *others = _pieces(chunk)
    past, rest = _prefix(chunk, layer, q)
    tensors = _behind(rest, q[:, :, first], k[:, :, first], v[:, :, first])
    results = [tuple(x[:, :, rest[0].size(2) :] for x in _flash(*tensors, True))]
    results += [_flash(q[:, :, piece], k[:, :, piece], v[:, :, piece], True) for piece in others]
    if past[0].size(2):
        out, lse = results[0]
        past_out, past_lse = _flash(q[:, :, first], *past, False)
        share = torch.sigmoid(past_lse - lse).unsqueeze(-1)  # of the prefix, in the merged softmax
        merged = out.to(share.dtype).lerp_(past_out.to(share.dtype), share).to(out.dtype)
        results[0] = merged, torch.logaddexp(lse, past_lse)
    if len(results) == 1:
        out, lse = results[0]
    else:
        out = _heads_first(torch.cat([_tokens_first(out) for out, _ in results]))
        lse = torch.cat([lse for _, lse in results], dim=2)
    return _tokens_first(out).contiguous(), lse  # one layout: torch.compile makes graphs for each


def _prefix(chunk: ChunkTensors, layer: int, q_1HTD: torch.Tensor):
    """Keys and values of the chunk's prefix in whole rows, and those of the rest, fewer than these make.
    Kernels for ever new numbers of keys, as sequences that ranks share have, would fill memory."""
    if not chunk.prefix:
        none = q_1HTD[:, :0, :0]
        return (none, none), (none, none)
    k, v = map(_heads_first, chunk.state.read(layer, 0, chunk.prefix))
    whole = whole_rows(chunk.prefix, q_1HTD)
    return (k[:, :, :whole], v[:, :, :whole]), (k[:, :, whole:], v[:, :, whole:])


def _behind(rest, q, k, v):
    """The tensors of a segment behind the rest of its prefix, with queries that are zero there: to causal
    attention, prefix and segment are one sequence. Gradients of those queries' results are zero, too."""
    before = rest[0].size(2)
    if not before:
        return q, k, v
    return F.pad(q, (0, 0, before, 0)), torch.cat((rest[0], k), dim=2), torch.cat((rest[1], v), dim=2)


def _backward_cpu(dout_THD, q_THD, k_TGD, v_TGD, out_THD, extra, chunk: ChunkTensors, layer: int):
    dout, q, k, v, out = map(_heads_first, (dout_THD, q_THD, k_TGD, v_TGD, out_THD))
    (lse,) = extra
    first, *others = _pieces(chunk)
    past, rest = _prefix(chunk, layer, q)
    before = rest[0].size(2)
    dout0, q0, out0, lse0 = dout[:, :, first], q[:, :, first], out[:, :, first], lse[:, :, first]
    q_k_v = _behind(rest, q0, k[:, :, first], v[:, :, first])
    own = dout0, out0, lse0
    if before:
        own = F.pad(dout0, (0, 0, before, 0)), F.pad(out0, (0, 0, before, 0)), F.pad(lse0, (before, 0))
    gradients = _flash_backward(own[0], *q_k_v, *own[1:], True)
    results = [tuple(x[:, :, before:] for x in gradients)]
    results += [
        _flash_backward(*(x[:, :, piece] for x in (dout, q, k, v, out, lse)), True) for piece in others
    ]
    dk_prefix = dv_prefix = None
    if chunk.prefix:
        dpast = [x[:, :, :before] for x in gradients[1:]]
        if past[0].size(2):
            dq, dk, dv = _flash_backward(dout0, q0, *past, out0, lse0, False)
            results[0][0].add_(dq)
            dpast = [torch.cat(both, dim=2) for both in zip((dk, dv), dpast)] if before else [dk, dv]
        dk_prefix, dv_prefix = map(_tokens_first, dpast)
    if len(results) == 1:
        dq, dk, dv = map(_tokens_first, results[0])
    else:
        dq, dk, dv = (torch.cat([_tokens_first(part) for part in parts]) for parts in zip(*results))
    return dq, dk, dv, dk_prefix, dv_prefix


def _group_keys_values(k_TGD, v_TGD, chunk: ChunkTensors, layer: int):
    """Keys and values that the one call on CUDA reads: those of the prefix, then of the chunk."""
    if chunk.state is None:
        return k_TGD, v_TGD
    return chunk.state.read(layer, 0, chunk.prefix + k_TGD.size(0))


def _varlen_limits(chunk: ChunkTensors):
    """Ends of queries and of keys, the most of each in a segment, whether causal; and the window."""
    longest_key = max(chunk.prefix + chunk.lengths[0], *chunk.lengths)
    longest_query = max(chunk.lengths)
    # One query a segment, as in decoding, is its last token and sees all keys without a mask. FlashAttention
    # spreads the keys of such a query over the GPU (split-K), but only if it is given no window.
    causal = longest_query > 1
    limits = chunk.query_ends, chunk.key_ends, longest_query, longest_key, causal
    return limits, [-1, 0 if causal else -1]


def _forward_cuda(q_THD, k_TGD, v_TGD, chunk: ChunkTensors, layer: int):
    keys, values = _group_keys_values(k_TGD, v_TGD, chunk, layer)
    limits, window = _varlen_limits(chunk)
    out, lse, random_state = torch.ops.torch_attn._varlen_attn(
        q_THD, keys, values, *limits, window_size=window
    )
    return out, lse, random_state


def _backward_cuda(dout_THD, q_THD, k_TGD, v_TGD, out_THD, extra, chunk: ChunkTensors, layer: int):
    keys, values = _group_keys_values(k_TGD, v_TGD, chunk, layer)
    limits, window = _varlen_limits(chunk)
    lse, random_state = extra
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        dout_THD, q_THD, keys, values, out_THD, lse, *limits, random_state, window_size=window
    )
    prefix = chunk.prefix
    return dq, dk[prefix:], dv[prefix:], dk[:prefix], dv[:prefix]
