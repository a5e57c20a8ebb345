"""Attention, a model in chunks, and their speed on this device, in this process: parts of gpu.py.

    python benchmarks/gpu_kernels.py attention     # or model, or speed; --cpu: tiny, on the CPU

Each part is a function that returns lines of figures, and raises AssertionError where one is out of bounds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.result_files import parse_args
from chunkflow.execution.attention import chunk_attention, store_keys_values
from chunkflow.execution.loss import loss_sum
from chunkflow.execution.runner import Runner
from chunkflow.execution.stage import WholeModel
from chunkflow.execution.state import ChunkTensors, KeyValueState
from chunkflow.planning.chunks import build_groups, whole_sequences
from chunkflow.planning.schedule import linear_schedule
from models import qwen2
from tests.helpers.reference import chunk_tensors, random_sequences

# Query heads, K/V heads, head dim: Qwen2.5-7B, Llama-3.1-8B, Qwen2.5-72B, Llama-3.2-1B, and without groups.
HEADS = [(28, 4, 128), (32, 8, 128), (64, 8, 128), (32, 8, 64), (16, 16, 128)]
BF16 = 2e-2  # relative error that roundings of bf16 inputs and outputs (2^-8 each) explain
LOSS = 1e-3  # of the mean over a thousand tokens and more
MORE = 3  # chunks may be so much further from fp64 than whole sequences are: they sum more rounded gradients
WIDE = {"dim": 512, "n_layers": 4, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "hidden_dim": 1408}
NARROW = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "hidden_dim": 352}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


# ---- attention


def naive_attention(q_THD, k_TGD, v_TGD, lengths: list[int], dout_THD) -> list[torch.Tensor]:
    """Output and gradients in fp64 by a full masked softmax for each of the packed sequences."""
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in (q_THD, k_TGD, v_TGD)]
    outs, heads = [], q.size(1) // k.size(1)
    for q_, k_, v_ in zip(*(x.split(lengths) for x in (q, k, v))):
        scores = torch.einsum("qhd,khd->hqk", q_, k_.repeat_interleave(heads, 1)) * q.size(-1) ** -0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        shares = scores.masked_fill(future, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", shares, v_.repeat_interleave(heads, 1)))
    out = torch.cat(outs)
    return [out, *torch.autograd.grad(out, leaves, dout_THD.double())]


def attention(device: torch.device, small: bool, layouts: list[tuple[int, int, int]] = HEADS) -> list[str]:
    """Chunks of one group, the last with three sequences packed behind it, against fp64."""
    size, lines = 64 if small else 512, []
    for heads in layouts:
        torch.manual_seed(0)
        (query_heads, kv_heads, width), lengths = heads, [2 * size + size // 2, 7, 1, size // 3]
        (group,) = build_groups(lengths, size)
        q, k, v, dout = (
            torch.randn(group.tokens, count, width, device=device, dtype=torch.bfloat16)
            for count in (query_heads, kv_heads, kv_heads, query_heads)
        )
        empty, state, outs = torch.empty(0, dtype=torch.int64), KeyValueState(group), []
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        for index, piece in enumerate(group.chunks):
            chunk = ChunkTensors(piece, index, empty, empty, empty).to(device)
            chunk.state = state
            own = slice(piece.prefix, piece.prefix + piece.tokens)
            outs.append((chunk_attention(*(x[own] for x in leaves), chunk, 0), dout[own]))
        for out, gradient in reversed(outs):
            out.backward(gradient)
        segments = [lengths[segment.sequence] for segment in group.chunks[-1].segments]
        expected = naive_attention(q, k, v, segments, dout)
        got = [torch.cat([out for out, _ in outs]), *(x.grad for x in leaves)]
        errors = [relative_error(a, b) for a, b in zip(got, expected)]
        words = ", ".join(f"{name} {error:.1e}" for name, error in zip(("out", "dq", "dk", "dv"), errors))
        lines.append(f"heads {query_heads}, {kv_heads} of K/V, width {width}: {words}")
        assert all(bool(x.isfinite().all()) for x in got), f"not finite; {lines[-1]}"
        assert max(errors) <= BF16, f"an error is above {BF16}; {lines[-1]}"
    return lines


# ---- model


def model(device: torch.device, small: bool) -> list[str]:
    """Gradients in bf16 on this device, of whole sequences and of chunks, against fp64 on the CPU."""
    args = dataclasses.replace(qwen2.flavors["debugmodel"], **(NARROW if small else WIDE))
    lengths = [300, 77, 5, 1, 190] if small else [4500, 700, 300, 5, 1, 2100]
    torch.manual_seed(0)
    network = qwen2.Transformer(args)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.02)
    network = network.to(torch.bfloat16)
    sequences = random_sequences(lengths, args.vocab_size, seed=0)
    targets = sum(int((labels >= 0).sum()) for _, labels in sequences)

    def run(network, groups, k: int) -> tuple[float, list[torch.Tensor]]:
        runner = Runner([WholeModel(network, lambda network: None)], network.output.weight.device)
        network.zero_grad()
        actions = linear_schedule([len(group.chunks) for group in groups], k)
        result = runner.step(actions, groups, chunk_tensors(groups, sequences), targets)
        return result.loss_sum.item() / targets, [p.grad.cpu() for p in network.parameters()]

    whole, lines = whole_sequences(lengths), []
    exact_loss, exact = run(copy.deepcopy(network).double(), whole, 1)
    network = network.to(device)

    def compare(name: str, groups, k: int, bounds: list[float]) -> list[float]:
        loss, gradients = run(network, groups, k)
        errors, difference = list(map(relative_error, gradients, exact)), abs(loss / exact_loss - 1)
        lines.append(
            f"{name}: loss differs from fp64 by {difference:.1e}, worst gradient by {max(errors):.1e}"
        )
        within = all(error <= bound for error, bound in zip(errors, bounds))
        assert difference <= LOSS and within, f"{lines[-1]}; whole sequences: {max(bounds) / MORE:.1e}"
        return errors

    errors = compare("whole sequences", whole, 1, [math.inf] * len(exact))
    bounds = [max(BF16, MORE * error) for error in errors]
    for size, k in ((64, 1), (64, 3)) if small else ((2048, 1), (2048, 3), (512, 2)):
        compare(f"chunks of {size}, k = {k}", build_groups(lengths, size), k, bounds)
    return lines


# ---- speed


def milliseconds(function: Callable[[], Callable | None], device: torch.device, runs: int) -> float:
    """Mean time of what `function()` returns, which it prepares; where it returns nothing, its own time."""
    total = 0.0
    for run in range(runs + 2):  # two to warm up
        start = time.perf_counter()
        prepared = function()
        if prepared is not None:
            synchronize(device)
            start = time.perf_counter()
            prepared()
        synchronize(device)
        total += (time.perf_counter() - start) if run >= 2 else 0.0
    return 1000 * total / runs


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed(device: torch.device, small: bool) -> list[str]:
    """Times and TFLOP/s. What an H100 should reach stands beside them; nothing is judged here."""
    runs = 1 if small else 10
    return [
        *attention_speed(
            device, ((64, 128),) if small else ((2048, 0), (8192, 0), (2048, 30720), (8192, 57344)), runs
        ),
        *loss_speed(device, (64,) if small else (2048, 8192), 512 if small else 152064, runs),
        *layers_speed(device, (64,) if small else (2048, 8192), small, runs),
    ]


def attention_speed(device, cases, runs: int) -> list[str]:
    """The last chunk of a group, behind a prefix. Its backward also adds up the prefix's gradients."""
    lines, (heads, kv_heads, width) = [], HEADS[0]
    for size, prefix in cases:
        (group,) = build_groups([prefix + size], size)
        k, v = (
            torch.randn(prefix + size, kv_heads, width, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        q = torch.randn(size, heads, width, device=device, dtype=torch.bfloat16)
        empty = torch.empty(0, dtype=torch.int64)

        def prepare():
            state = KeyValueState(group)
            for index, piece in enumerate(group.chunks):
                chunk = ChunkTensors(piece, index, empty, empty, empty).to(device)
                chunk.state, own = state, slice(piece.prefix, piece.prefix + piece.tokens)
                if index < len(group.chunks) - 1:
                    store_keys_values(k[own], v[own], chunk, 0)
            inputs = [x.detach().requires_grad_() for x in (q, k[prefix:], v[prefix:])]
            return lambda: chunk_attention(*inputs, chunk, 0)

        def prepare_backward():
            out = prepare()()
            gradient = torch.randn_like(out)
            return lambda: out.backward(gradient)

        forward, backward = (milliseconds(f, device, runs) for f in (prepare, prepare_backward))
        flops = 4 * heads * width * size * (prefix + size / 2)
        lines.append(
            f"attention of {size:,} behind {prefix:,}: forward {forward:.2f} ms, {flops / forward / 1e9:.0f}"
            f" TFLOP/s (300-400); backward {backward:.2f} ms, {2.5 * flops / backward / 1e9:.0f} (250-330)"
        )
    return lines


def loss_speed(device, sizes, vocabulary: int, runs: int) -> list[str]:
    lines, width = [], 64 if vocabulary < 1024 else 3584
    for size in sizes:
        hidden = torch.randn(size, width, device=device, dtype=torch.bfloat16).requires_grad_()
        weight = (0.02 * torch.randn(vocabulary, width, device=device)).to(torch.bfloat16).requires_grad_()
        (group,) = build_groups([size], size)
        chunk = ChunkTensors(
            group.chunks[0], 0, *[torch.randint(vocabulary, (size,))] * 2, torch.arange(size)
        ).to(device)
        chunk.loss_gradient = 1.0

        def run():
            hidden.grad = weight.grad = None
            loss_sum(hidden, weight, chunk).backward(torch.ones((), device=device))

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        time_ms = milliseconds(run, device, runs)
        peak = ""
        if device.type == "cuda":
            peak = f", peak {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB above its inputs"
        flops = 6 * vocabulary * width * size
        lines.append(
            f"loss of {size:,} tokens, vocabulary {vocabulary:,}: {time_ms:.1f} ms,"
            f" {flops / time_ms / 1e9:.0f} TFLOP/s{peak}"
        )
    return lines


def layers_speed(device, sizes, small: bool, runs: int) -> list[str]:
    """Forward and backward of four layers as large as Qwen2.5-7B's. Host: until all kernels are launched."""
    changes = NARROW if small else {"n_layers": 4}
    args = dataclasses.replace(qwen2.flavors["7B"], vocab_size=1024, **changes)
    with torch.device(device):
        network = qwen2.Transformer(args).to(torch.bfloat16)
    weights = sum(p.numel() for name, p in network.named_parameters() if name.startswith("layers."))
    lines = []
    for size in sizes:
        (group,) = build_groups([size], size)
        chunk = ChunkTensors(group.chunks[0], 0, *[torch.randint(1024, (size,))] * 2, torch.arange(size)).to(
            device
        )
        chunk.end, chunk.loss_gradient = loss_sum, 1.0

        def run():
            network.zero_grad()
            loss = network(chunk.tokens, chunk)
            loss.backward(torch.ones_like(loss))

        time_ms = milliseconds(run, device, runs)
        start = time.perf_counter()
        run()
        host_ms = 1000 * (time.perf_counter() - start)
        synchronize(device)
        attention_flops = 3.5 * 4 * args.n_layers * args.n_heads * args.head_dim * size * size / 2
        flops = 6 * weights * size + attention_flops
        lines.append(
            f"{args.n_layers} layers of width {args.dim}, {size:,} tokens: {time_ms:.1f} ms,"
            f" {flops / time_ms / 1e9:.0f} TFLOP/s (380 and more); host {host_ms:.1f} ms"
        )
    return lines


PARTS = {"attention": attention, "model": model, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--cpu", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--one", action="store_true", help="of attention's head layouts, the first")
    arguments = parse_args(parser)
    options = {"layouts": HEADS[:1]} if arguments.one else {}
    device = torch.device("cpu" if arguments.cpu else "cuda")
    print("\n".join(PARTS[arguments.part](device, arguments.cpu, **options)))


if __name__ == "__main__":
    main()
