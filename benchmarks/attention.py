"""Chunk-aware attention against one flash call on the whole sequence: forward + backward, medians of
interleaved runs.

    python benchmarks/attention.py

The chunks carry K/V and their gradients, all chunks keep their graphs (k = N), so that both sides do the same
arithmetic. Prints chunked time / one-call time for each dtype, sequence length and chunk size.
"""

from __future__ import annotations

import statistics
import time

import torch
from result_files import new_parser, parse_args

from chunkflow.execution.attention import chunk_attention
from chunkflow.execution.state import ChunkTensors, KeyValueState
from chunkflow.planning.chunks import build_groups

HEADS, GROUPS, HEAD_DIM = 8, 4, 64


def one_call(q, k, v, dout):
    flash, backward = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    q, k, v, dout = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, dout))
    out, lse = flash(q, k, v, 0.0, True)
    return out, *backward(dout, q, k, v, out, lse, 0.0, True)


def in_chunks(q, k, v, dout, chunk_size):
    (group,) = build_groups([q.size(0)], chunk_size)
    state, empty = KeyValueState(group), torch.empty(0, dtype=torch.int64)
    live = []
    for index, chunk in enumerate(group.chunks):
        tensors = ChunkTensors(chunk, index, empty, empty, empty)
        tensors.state = state
        piece = slice(chunk.prefix, chunk.prefix + chunk.tokens)
        inputs = [x[piece].detach().requires_grad_() for x in (q, k, v)]
        live.append((inputs, piece, chunk_attention(*inputs, tensors, 0)))
    return [torch.autograd.grad(out, inputs, dout[piece]) for inputs, piece, out in reversed(live)]


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=7)
    arguments = parse_args(parser)
    print(f"{HEADS} heads, {GROUPS} K/V heads, head dim {HEAD_DIM}, {torch.get_num_threads()} threads")
    for dtype in arguments.dtypes:
        for tokens in arguments.tokens:
            shapes = [(tokens, HEADS, HEAD_DIM), *[(tokens, GROUPS, HEAD_DIM)] * 2, (tokens, HEADS, HEAD_DIM)]
            inputs = [torch.randn(shape, dtype=getattr(torch, dtype)) for shape in shapes]
            ways = {"one call": lambda: one_call(*inputs)}
            ways |= {size: lambda size=size: in_chunks(*inputs, size) for size in arguments.chunk_sizes}
            seconds = {way: [] for way in ways}
            for run in range((arguments.runs if tokens <= 8192 else max(3, arguments.runs // 2)) + 1):
                for way, function in ways.items():
                    start = time.perf_counter()
                    function()
                    if run:  # the first round warms up
                        seconds[way].append(time.perf_counter() - start)
            base = statistics.median(seconds["one call"])
            for size in arguments.chunk_sizes:
                ratio = statistics.median(seconds[size]) / base
                print(
                    f"{dtype:9} {tokens:6} tokens in chunks of {size}: {ratio:.3f} x one call ({base:.3f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
