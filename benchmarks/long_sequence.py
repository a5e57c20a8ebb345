"""One long sequence at a fixed chunk_size and k: seconds of a step, peak memory and resident K/V as it grows,
with K/V on the device or in host memory, and with what attention gave kept or not. On this machine's CPU.

    python benchmarks/long_sequence.py
    python benchmarks/long_sequence.py --lengths 32768 --keep-attention none device host

Each row is a process of its own, in which the step runs after a warm-up, through the recipe's runner. FLOPs
are what arithmetic predicts: forward, backward (twice the products of forward, 2.5 times its attention), and
for all but the last k chunks what is done again; kept attention does not count there, except the last
layer's, which the first forward leaves out. "x" columns are relative to the length's first row: FLOPs, and
what was measured. Peak memory is what the step adds to the process; on a CPU host memory counts in it, too.
Values of a key that this version does not know are left out. On a machine that others use at the same time:
OMP_NUM_THREADS=1 and --cpu-time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from dataclasses import fields
from itertools import product

import torch
from result_files import new_parser, parse_args
from step import CPU, make_model, sizes, tensors

from chunkflow.execution.runner import Runner
from chunkflow.execution.stage import WholeModel
from chunkflow.planning.chunks import build_groups
from chunkflow.planning.cost import Cost
from chunkflow.planning.schedule import linear_schedule
from chunkflow.reporting.device import peak_memory, reset_peak_memory
from chunkflow.settings.options import ChunkFlow
from models.llama import ModelArgs

CLOCKS = time.perf_counter, time.process_time


def admitted(key: str, value: str) -> bool:
    """Whether chunkflow.KEY may have this value; what stays as it was is "none", with or without the key."""
    return value == "none" or any(
        field.name == key and value in field.metadata["admits"] for field in fields(ChunkFlow)
    )


def flops(args: ModelArgs, length: int, chunk_size: int, k: int, keeps_attention: bool) -> float:
    """Of a step with one sequence, cut into chunks."""
    whole, but_one = Cost.of_model(args), Cost.of_layers(args, args.n_layers - 1, head=False)
    chunks = -(-length // chunk_size)
    discarded = chunk_size * max(0, chunks - k)
    pairs, again = length * (length + 1) / 2, discarded * (discarded + 1) / 2
    total = 3 * length * whole.per_token + 3.5 * pairs * whole.per_pair
    # A chunk whose backward does not follow its forward at once makes its logits twice.
    total += 2.0 * args.dim * args.vocab_size * chunk_size * (min(k, chunks) - 1)
    # The forward that keeps K/V only goes up to the last layer's K and V.
    last_layer = 2.0 * args.dim * 2 * args.n_kv_heads * args.head_dim
    total += discarded * (but_one.per_token + last_layer)
    return total + (0 if keeps_attention else again * but_one.per_pair)


def sequence_step(runner: Runner, length: int, chunk_size: int, k: int, vocabulary: int):
    """(result, wall and CPU seconds, the peak of memory above what there was before in MiB)."""
    groups = build_groups([length], chunk_size)
    actions = linear_schedule([len(group.chunks) for group in groups], k)
    data = tensors(groups, vocabulary)
    reset_peak_memory(CPU)
    before, starts = peak_memory(CPU).active_gib, [clock() for clock in CLOCKS]
    result = runner.step(actions, groups, data, length)
    seconds = [clock() - start for clock, start in zip(CLOCKS, starts)]
    return result, seconds, 1024 * (peak_memory(CPU).active_gib - before)


def measure(arguments: argparse.Namespace, length: int, offload: str, keep: str, results) -> None:
    settings = {}
    if offload != "none":
        settings["kv_offload"] = True
    if keep != "none":
        settings["keep_attention"] = keep
    torch.set_num_threads(arguments.threads)
    model = make_model(arguments.precision, **sizes(arguments.dim, arguments.layers, arguments.vocab))
    runner = Runner([WholeModel(model, lambda model: None)], CPU, **settings)
    chunks = arguments.chunk_size, arguments.k, arguments.vocab
    warm_up = min(length, (arguments.k + 1) * arguments.chunk_size)
    sequence_step(runner, warm_up, *chunks)  # gradients exist, kernels are chosen
    runs = [sequence_step(runner, length, *chunks) for _ in range(arguments.runs)]
    result = runs[0][0]
    on_device = getattr(result, "device_state_bytes", result.state_bytes)
    kept = getattr(result, "kept_attention_bytes", (0, 0))
    results.put({
        "length": length, "kv_offload": offload, "keep_attention": keep,
        "seconds": statistics.median(seconds[arguments.cpu_time] for _, seconds, _ in runs),
        "peak_mib": max(peak for *_, peak in runs),
        "kv_mib": result.state_bytes / 2**20, "kv_on_device_mib": on_device / 2**20,
        "kept_on_device_mib": kept[0] / 2**20, "kept_in_host_mib": kept[1] / 2**20,
        "tflops": flops(model.args, length, arguments.chunk_size, arguments.k, keep != "none") / 1e12,
    })  # fmt: skip


def main() -> None:
    parser = new_parser(__doc__)
    lengths = [4096, 8192, 16384, 32768, 65536, 131_072]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens (4K to 128K)")
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--kv-offload", nargs="+", choices=("none", "host"), default=["none", "host"])
    keep = ("none", "device", "host")
    parser.add_argument("--keep-attention", nargs="+", choices=keep, default=list(keep))
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=1, help="of each row; seconds are their median (1)")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds instead of wall time")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead")
    arguments = parse_args(parser)
    ways = [
        (offload, keep)
        for offload, keep in product(arguments.kv_offload, arguments.keep_attention)
        if admitted("kv_offload", offload) and admitted("keep_attention", keep)
    ]
    if not arguments.json:
        print(
            f"chunks of {arguments.chunk_size}, k = {arguments.k}; width {arguments.dim}, {arguments.layers}"
            f" layers, {arguments.precision}, {arguments.threads} thread(s); memory in MiB\n"
            f"{'tokens':>8}  {'kv_offload':12}{'keep_attention':16}{'TFLOPs':>8}{'x':>7}{'seconds':>9}"
            f"{'x':>7}{'peak':>7}{'K/V':>7}{'on device':>11}{'kept there':>12}{'kept in host':>14}",
            flush=True,
        )
    context = multiprocessing.get_context("spawn")
    for length in arguments.lengths:
        first: dict[str, float] = {}
        for offload, keep in ways:
            results = context.Queue()
            process = context.Process(target=measure, args=(arguments, length, offload, keep, results))
            process.start()
            while results.empty() and process.is_alive():
                process.join(0.1)
            if process.exitcode:
                raise SystemExit(
                    f"the process of {length} tokens, {offload}, {keep} ended with {process.exitcode}"
                )
            row = results.get()
            process.join()
            first = first or row
            row["flops_ratio"] = row["tflops"] / first["tflops"]
            row["seconds_ratio"] = row["seconds"] / first["seconds"]
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"{length:8}  {offload:12}{keep:16}{row['tflops']:8.3f}{row['flops_ratio']:7.2f}"
                f"{row['seconds']:9.2f}{row['seconds_ratio']:7.2f}{row['peak_mib']:7.0f}{row['kv_mib']:7.1f}"
                f"{row['kv_on_device_mib']:11.1f}{row['kept_on_device_mib']:12.1f}{row['kept_in_host_mib']:14.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
