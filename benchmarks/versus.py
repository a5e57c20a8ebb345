"""The usual ways to fine-tune with transformers against this project: the same weights, batches and machine.

    python benchmarks/versus.py               # bf16 products, fp32 weights: autocast there, FSDP2 here
    python benchmarks/versus.py --precision float32 --markdown benchmarks/results

A random Qwen2.5-shaped model is saved as a Hugging Face folder; lengths follow LMSys-Chat-1M's, and the
longest of each step becomes one of --seq-len tokens. Every row trains --steps steps in processes of its own,
on the CPU, with as many threads in all as the others; rows take turns, --runs times. Weights are fp32
everywhere; the optimizer is AdamW at a constant rate, gradients are clipped, the loss is the mean over all
tokens with a target in the global batch. The recipe is started as users start it and read by its
metrics.jsonl.

Seconds: median over the steps after the first, of all runs. Memory: the peak resident memory (VmHWM, Linux)
of the largest process and of all; libraries count, and in bf16 the kernels that oneDNN keeps. Loss: the
largest relative difference from the first row at step 1, before any update, and over all steps. A row whose
first loss is another ends the benchmark: it would not have done the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from result_files import REPO, new_parser, parse_args

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import plan_step
from chunkflow.training import build
from chunkflow.training.start import read_config
from models.hf_config import model_of

RECIPE = REPO / "recipes" / "finetune.py"
PADDED = 4  # sequences of a padded batch
MAX_NORM, LEARNING_RATE, BETAS, WEIGHT_DECAY = 1.0, 1e-4, (0.9, 0.95), 0.1
FIRST_LOSS = {"float32": 1e-5, "bfloat16": 2**-8}  # how far from the first row's, relative


class Row(NamedTuple):
    processes: int
    recipe: list[str] | None = None  # options of recipes/finetune.py; None: a loop with transformers


ROWS = {
    "transformers": Row(1),
    "transformers, gradient checkpointing": Row(1),
    f"transformers, padded batches of {PADDED}": Row(1),
    "transformers, FSDP2, 2 ranks": Row(2),
    "1F1B of whole sequences, 2 stages": Row(
        2, ["--chunkflow.no_enable", "--parallelism.pipeline_parallel_degree=2"]
    ),
    "ChunkFlow": Row(1, []),
    "ChunkFlow, 2 ranks": Row(2, []),
    "ChunkFlow, 2 stages": Row(2, ["--parallelism.pipeline_parallel_degree=2"]),
}
QUICK = {
    "hidden": 64,
    "layers": 2,
    "vocab": 512,
    "seq_len": 256,
    "sequences": 8,
    "chunk_size": 64,
    "steps": 2,
}


class Figures(NamedTuple):
    """What one run of a row came to."""

    losses: list[float]  # of each step
    seconds: list[float]
    peaks_gib: list[float]  # of each process


# ---- model and batches


def write_model(folder: Path, options: argparse.Namespace) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64 or 1,
        num_key_value_heads=max(1, options.hidden // 256),
        intermediate_size=options.hidden * 11 // 4 // 16 * 16,
        vocab_size=options.vocab,
        max_position_embeddings=options.seq_len,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, options: argparse.Namespace) -> None:
    """Tokens that count up from anywhere: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    lengths = synthetic_lengths("lmsys", options.steps * options.sequences, 0)
    with open(path, "w") as file:
        for start in range(0, len(lengths), options.sequences):
            batch = [min(length, options.seq_len) for length in lengths[start : start + options.sequences]]
            batch[batch.index(max(batch))] = options.seq_len
            for length in batch:
                first = int(torch.randint(options.vocab, (1,), generator=generator))
                ids = [(first + place) % options.vocab for place in range(length)]
                file.write(json.dumps({"input_ids": ids}) + "\n")


def read_batches(path: Path, sequences: int) -> list[list[list[int]]]:
    rows = [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]
    return [rows[start : start + sequences] for start in range(0, len(rows), sequences)]


# ---- the loops with transformers


def train_with_transformers(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Trains one row's steps in this process, and writes each step's loss and seconds as the recipe does."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    batches = read_batches(folder / "rows.jsonl", options.sequences)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    model.train()
    if "checkpointing" in name:
        model.gradient_checkpointing_enable()
    rank, ranks, dtype = int(os.environ["RANK"]), ROWS[name].processes, getattr(torch, options.precision)
    if ranks > 1:
        dist.init_process_group("gloo")
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in (*model.model.layers, model):
            fully_shard(module, mp_policy=policy)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=ranks == 1 and dtype == torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    size = PADDED if "padded" in name else 1
    for number, batch in enumerate(batches, start=1):
        start = time.perf_counter()
        targets = sum(len(ids) - 1 for ids in batch)
        own = batch[rank::ranks]
        total = torch.zeros(())
        for first in range(0, len(own), size):
            micro = [torch.tensor(ids) for ids in own[first : first + size]]
            ids_BT, labels_BT, mask_BT = (
                torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)
                for tensors, padding in ((micro, 0), (micro, -100), ([torch.ones_like(x) for x in micro], 0))
            )
            if ranks > 1:
                model.set_requires_gradient_sync(first + size >= len(own))
            with autocast:
                mask = mask_BT if len(micro) > 1 else None
                loss = model(ids_BT, attention_mask=mask, labels=labels_BT, num_items_in_batch=targets).loss
            (loss * ranks).backward()  # FSDP2 takes the mean over ranks
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if ranks > 1:
            dist.all_reduce(total)
        row = {"step": number, "loss": total.item(), "seconds": time.perf_counter() - start}
        if rank == 0:
            with open(folder / "run" / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
    if ranks > 1:
        dist.destroy_process_group()


# ---- running rows


def recipe_options(folder: Path, options: argparse.Namespace) -> list[str]:
    return [
        f"--job.dump_folder={folder / 'run'}", f"--model.hf_assets_path={folder / 'model'}",
        "--training.dataset=jsonl", f"--training.dataset_path={folder / 'rows.jsonl'}",
        "--training.no_shuffle", f"--training.global_batch_size={options.sequences}",
        f"--training.seq_len={options.seq_len}",
        f"--training.steps={options.steps}", f"--training.mixed_precision_param={options.precision}",
        f"--training.max_norm={MAX_NORM}", f"--chunkflow.chunk_size={options.chunk_size}",
        f"--chunkflow.k={options.k}", f"--optimizer.lr={LEARNING_RATE}", f"--optimizer.beta1={BETAS[0]}",
        f"--optimizer.beta2={BETAS[1]}", f"--optimizer.weight_decay={WEIGHT_DECAY}",
        "--lr_scheduler.warmup_steps=0", "--lr_scheduler.min_lr_factor=1.0",
        "--metrics.log_freq=1", "--metrics.no_enable_tensorboard",
    ]  # fmt: skip


def run_row(name: str, folder: Path, options: argparse.Namespace) -> Figures:
    """Runs a row in processes of its own, with torchrun's variables, and watches their memory."""
    row, run = ROWS[name], folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    if row.recipe is None:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name, "--folder", str(folder)]
    else:
        command = [sys.executable, str(RECIPE), *recipe_options(folder, options), *row.recipe]
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(max(1, options.threads // row.processes)),
        "CHUNKFLOW_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": str(row.processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    log = folder / "log"
    with open(log, "w") as output:
        processes = [
            subprocess.Popen(
                command, env=environ | {"RANK": r, "LOCAL_RANK": r}, stdout=output, stderr=output
            )
            for r in map(str, range(row.processes))
        ]
        try:
            peaks = watch_memory(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if any(process.returncode for process in processes):
        raise SystemExit(f"{name} failed:\n{log.read_text()[-3000:]}")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [step["seconds"] for step in steps]
    return Figures([step["loss"] for step in steps], seconds, peaks)


def watch_memory(processes: list[subprocess.Popen]) -> list[float]:
    """Waits for the processes, until one fails; their peaks in GiB. The recipe resets VmHWM at each step."""
    peaks = [0.0] * len(processes)
    while None in (statuses := [process.poll() for process in processes]) and not any(statuses):
        for rank, process in enumerate(processes):
            if statuses[rank] is not None:
                continue
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), 0)
            peaks[rank] = max(peaks[rank], peak / 2**20)
        time.sleep(0.02)
    return peaks


def note_of(name: str, folder: Path, options: argparse.Namespace) -> str:
    """What costs this row time, calculated from the lengths."""
    lengths = [
        [len(ids) for ids in batch] for batch in read_batches(folder / "rows.jsonl", options.sequences)
    ]
    if "padded" in name:
        batches = [batch[i : i + PADDED] for batch in lengths for i in range(0, len(batch), PADDED)]
        slots = sum(max(batch) * len(batch) for batch in batches)
        return f"{1 - sum(map(sum, lengths)) / slots:.0%} of the slots are padding"
    if "checkpointing" in name:
        return "every layer's forward runs twice"
    if "FSDP2" in name:
        cost = Cost.of_model(model_of(folder / "model")[1])
        ranks = [[sum(map(cost.training, batch[rank::2])) for rank in range(2)] for batch in lengths]
        slower = statistics.mean(max(batch) / statistics.mean(batch) - 1 for batch in ranks)
        return f"the same number of sequences a rank: the slower has {slower:.0%} above the mean"
    row = ROWS[name]
    if row.recipe is None:
        return "each sequence is a micro-batch"
    config = read_config([*recipe_options(folder, options), *row.recipe])
    stages = config.parallelism.pipeline_parallel_degree
    settings = build.plan_settings(config, build.model_spec(config), row.processes // stages)
    plans = [plan_step(batch, settings) for batch in lengths]
    parts = []
    if settings.enable:
        recomputed = sum(plan.recomputed_chunks for plan in plans) / sum(plan.chunks for plan in plans)
        padding = statistics.mean(plan.padding_percent for plan in plans)
        parts = [f"{padding:.0f} % padding", f"{recomputed:.0%} of the chunks recomputed"]
    if stages > 1:
        bubble = statistics.mean(
            simulation.bubble for plan in plans for simulation in plan.simulations.values()
        )
        parts.append(f"bubble of {bubble:.0%} (simulated)")
    elif row.processes > 1:
        slower = statistics.mean(plan.imbalance_percent for plan in plans)
        parts.append(f"the slower rank has {slower:.0f} % above the mean")
    return ", ".join(parts)


# ---- the table


def table(results: dict[str, list[Figures]], options: argparse.Namespace) -> list[list[str]]:
    """The header and a line for each row."""
    header = (
        "| seconds a step | as fast | tokens/s | peak GiB: largest | all | loss: step 1 | all steps | note"
    )
    lines = [[name.strip() for name in header.split("|")]]
    batches = read_batches(options.folder / "rows.jsonl", options.sequences)
    tokens = statistics.median(sum(map(len, batch)) for batch in batches[1:])
    base_losses, base_seconds = None, None
    for name, runs in results.items():
        seconds = statistics.median(second for run in runs for second in run.seconds[1:])
        losses = runs[0].losses
        if base_losses is None:
            base_losses, base_seconds = losses, seconds
        differences = [abs(a / b - 1) for a, b in zip(losses, base_losses)]
        if differences[0] > FIRST_LOSS[options.precision]:
            raise SystemExit(f"{name}: the first loss is {losses[0]}, of the first row {base_losses[0]}")
        largest, everything = (statistics.median(f(run.peaks_gib) for run in runs) for f in (max, sum))
        lines.append(
            [
                name,
                f"{seconds:.2f}",
                f"{base_seconds / seconds:.2f} x",
                f"{tokens / seconds:,.0f}",
                f"{largest:.2f}",
                f"{everything:.2f}",
                f"{losses[0]:.5f}" if losses is base_losses else f"{differences[0]:.0e}",
                f"{losses[-1]:.5f} at the last" if losses is base_losses else f"{max(differences):.0e}",
                note_of(name, options.folder, options),
            ]
        )
    return lines


def show(lines: list[list[str]]) -> None:
    """In Markdown, and in columns."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:])]
        print(f"| {' | '.join([line[0].ljust(widths[0]), *cells, line[-1]])} |")


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--hidden", type=int, default=384, help="width of the model; heads are 64 wide")
    add("--layers", type=int, default=4)
    add("--vocab", type=int, default=8192)
    add("--precision", default="bfloat16", choices=FIRST_LOSS, help="of products; weights are fp32")
    add("--seq-len", type=int, default=8192, help="the longest sequence of each step, tokens")
    add("--sequences", type=int, default=12, help="in a step")
    add("--chunk-size", type=int, default=2048)
    add("--k", type=int, default=1)
    add("--steps", type=int, default=3, help="of a run; the first one warms up")
    add("--runs", type=int, default=1)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a row, over its processes")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="all, or some of them")
    add("--quick", action="store_true", help="a smoke test: tiny sizes")
    add("--row", choices=ROWS, help=argparse.SUPPRESS)  # in this process
    add("--folder", type=Path, help=argparse.SUPPRESS)
    options = parse_args(parser)
    if options.quick:
        vars(options).update(QUICK)
    if options.row:
        train_with_transformers(options.row, options.folder, options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a run that is under way ends, too
    with tempfile.TemporaryDirectory() as name:
        options.folder = Path(name)
        write_model(options.folder / "model", options)
        write_rows(options.folder / "rows.jsonl", options)
        load = os.getloadavg()[0]  # what others left of the cores: times mean little where this is not near 0
        results: dict[str, list[Figures]] = {row: [] for row in options.rows}
        for run in range(options.runs):
            for row in results:
                print(f"run {run + 1} of {options.runs}: {row}", file=sys.stderr, flush=True)
                results[row].append(run_row(row, options.folder, options))
        args = model_of(options.folder / "model")[1]
        print(
            f"width {args.dim}, {args.n_layers} layers, vocabulary {args.vocab_size}, {options.precision};"
            f" {options.sequences} sequences a step, the longest {options.seq_len:,} tokens; chunks of"
            f" {options.chunk_size:,}, k = {options.k}; {options.threads} threads in all for every row,"
            f" so two processes have no more than one; load average before: {load:.1f}\n"
        )
        show(table(results, options))


if __name__ == "__main__":
    main()
