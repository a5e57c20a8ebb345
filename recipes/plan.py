"""Prints what a config will do, without running it: chunks, padding, balance, bubble, seconds, peak memory by
part; and what other settings would.

    NGPU=64 python recipes/plan.py --job.config_file my.toml

Says first how much of the data training.seq_len admits, and how long its sequences are. Then builds the real
plans of the first 20 steps (--steps=N; an epoch at most) for NGPU x NNODES ranks from the
lengths of the data, and one more with the longest sequence among the first step's; of more than 8 replicas
the fullest 8. Seconds are those of --device (the GPU there is, else an H100; "cpu": this one), from its data
sheet or, after --calibrate, as measured on this one. --json prints one JSON object; --write puts the text
into the file's first comment, behind this command. Memory is arithmetic for CUDA, not measured.
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

from chunkflow.planning.forecast import LEAST_CHUNK, Parts, forecast
from chunkflow.planning.lengths import histogram, retention
from chunkflow.planning.memory import FRAGMENTATION, PARTS, host_bytes
from chunkflow.storage import hf_weights as hf
from chunkflow.training import build, calibration, choice, parallel, prediction
from chunkflow.training.lora import trained_parameters
from chunkflow.training.rates import device_of
from chunkflow.training.start import main_config, user_errors, world_size

# The figures of a step: name in JSON, text in the table, format.
FIGURES = {
    "sequences": ("sequences", ",.0f"),
    "tokens": ("tokens", ",.0f"),
    "longest": ("longest sequence, tokens", ",.0f"),
    "chunks": ("chunks, all ranks", ",.0f"),
    "padding_percent": ("padding, %", ".2f"),
    "recomputed_percent": ("recomputed chunks, %", ".2f"),
    "imbalance_percent": ("slowest rank over the mean, %", ".2f"),
    "spread_sequences": ("sequences that ranks share", ",.1f"),
    "most_ranks_of_a_sequence": ("most ranks that share one", ",.1f"),
    "template_overhead_percent": ("slots added by ZeRO-3's common template, %", ".2f"),
    "bubble_percent": ("simulated bubble, %", ".2f"),
    "idle_percent": ("simulated idle time, %", ".2f"),
    "step_seconds": ("seconds, predicted", ",.3g"),
    "tps": ("tokens a second and device, predicted", ",.0f"),
}


def check(config) -> None:
    """The training recipe's checks, except those of this machine's devices."""
    spec = build.model_spec(config)
    hf.check(config.checkpoint, config.model.hf_assets_path, spec.family, spec.args)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--steps", nargs="?", default="20", const="")
    parser.add_argument("--device", default="")
    for name in ("--json", "--write", "--calibrate"):
        parser.add_argument(name, action="store_true")
    options, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(
            "--steps N (20): steps to plan. --device NAME: whose rates count. --calibrate: measure this"
            " device's first. --json: print one JSON object. --write: refresh the file's comment.\n"
        )
    config = main_config(rest, check=check, planned=True, chooses=True)
    if not options.steps.isdecimal() or int(options.steps) < 1:
        print(
            f"error: --steps = {options.steps} is not a whole number of at least 1: give one such as 20",
            file=sys.stderr,
        )
        raise SystemExit(2)
    with user_errors():
        spec, seed = build.model_spec(config), parallel.set_seed(config.debug)
        if options.calibrate:
            print(calibration.calibrate(config, spec), file=sys.stderr)
        device = options.device or device_of(config, planned=not options.calibrate)
        dataset = build.open_data(config, spec, seed, pairs=None)
        if not options.json:  # at once: the plan may refuse a sequence for its length
            print(lengths_table(dataset.lengths, config), flush=True)
        report = predict(config, int(options.steps), spec, dataset, seed, device)
        if options.write:
            write_comment(config.job.config_file, table(report))
    print(json.dumps(report) if options.json else table(report))


def predict(config, count: int, spec: build.ModelSpec, dataset, seed: int, device: str = "H100") -> dict:
    """The whole report, as one JSON object. Memory is in GiB."""
    # ---- What other settings would do in the first step with the longest sequence of all instead of its
    # longest. "auto" becomes the fastest that fits.
    training, pipeline_ranks = config.training, config.parallelism.pipeline_parallel_degree
    ranks = world_size(planned=True)
    others = choice.forecaster(config, spec, dataset, seed, ranks, device)
    rows, why = choice.compare(others)

    # ---- Data and plan settings, as in the training recipe.
    replicas, pairs = ranks // pipeline_ranks, others.pairs
    settings = build.plan_settings(config, spec, replicas, device=device, pairs=pairs)
    loader = build.open_loader(training, dataset, settings, 0, seed)
    batches, cursor = [], 0
    while len(batches) < count and cursor < max(loader.order.epoch_rows, 1):
        _, lengths, _, cursor = loader.batch_at(cursor)
        batches.append(lengths)

    # ---- The first steps, then that one with the longest sequence.
    layout = spec.family, spec.args, spec.layers, settings.replicas
    sizes = prediction.stage_sizes(config, *layout)
    cuda = [prediction.cuda_of_rank(config, rank, settings.replicas) for rank in sizes]
    steps = []
    for number, lengths in enumerate([*batches, others.lengths], start=1):
        steps.append(forecast(lengths, settings, sizes, others.rates))
        seconds, tokens = steps[-1].seconds, steps[-1].figures["tokens"]
        steps[-1].figures.update(step_seconds=seconds, tps=tokens / seconds / ranks)
        if sys.stderr.isatty():
            end = "\n" if number > len(batches) else ""
            print(f"\rplanned {number} of {len(batches) + 1} steps", end=end, file=sys.stderr)

    figures = [step.figures for step in steps[:-1]]
    mean = {name: sum(step[name] for step in figures) / len(figures) for name in figures[0]}
    return {
        "model": spec.name,
        "parameters": spec.parameters,
        "trained_parameters": trained_parameters(config.lora, spec.family, spec.args) or spec.parameters,
        "ranks": ranks,
        "replicas": settings.replicas,
        "stage_layers": [len(layers) for layers in spec.layers],
        "shards": settings.replicas // config.parallelism.data_parallel_replicate_degree,
        "reshard_after_forward": settings.lockstep,
        "chunk_size": settings.chunk_size if settings.enable else None,
        "k": settings.k if settings.enable else None,
        "notice": loader.notice,
        "pairs": pairs,
        "retention": [kept._asdict() for kept in retention(dataset.lengths, training.seq_len)],
        "device": device,
        "calibrated": others.measured,
        "budget_gib": others.budget,
        "step_seconds": mean["step_seconds"],
        "tps": mean["tokens"] / mean["step_seconds"] / ranks,
        "table": [row._asdict() for row in rows],
        "why": why,
        "hint": choice.hint(config, mean["recomputed_percent"]),
        "steps": len(batches),
        "mean": mean,
        "worst": {name: (min if name == "tps" else max)(step[name] for step in figures) for name in mean},
        "longest_sequence": steps[-1].figures,
        "memory": memory([step.peaks for step in steps[:-1]], cuda),
        "memory_longest_sequence": memory([steps[-1].peaks], cuda),
        "kv_gib_of_replicas": [amount / 2**30 for amount in steps[-1].kv],
        "host_gib_per_rank": max(host_bytes(rank.values()) for rank in sizes) / 2**30,
    }


def memory(peaks_of_steps: list[list[Parts]], cuda: list[int]) -> dict:
    """The parts of the fullest rank, and each pipeline rank's total, over all steps. `cuda`: bytes that CUDA
    adds on each pipeline rank, beside the total."""
    fullest = [max(peaks, key=lambda parts: sum(parts.values())) for peaks in zip(*peaks_of_steps)]
    parts = max(fullest, key=lambda parts: sum(parts.values()))
    total = sum(parts.values())
    return {
        "parts_gib": {part: amount / 2**30 for part, amount in parts.items()},
        "total_gib": total / 2**30,
        "cuda_gib": cuda[fullest.index(parts)] / 2**30,
        "fragmentation_gib": FRAGMENTATION * total / 2**30,
        "pipeline_rank": fullest.index(parts),
        "pipeline_ranks_gib": [sum(parts.values()) / 2**30 for parts in fullest],
    }


def lengths_table(lengths: list[int], config) -> str:
    """What each training.seq_len would keep of the data, and its lengths against the chunk, as text."""
    rows, tokens, seq_len = len(lengths), sum(lengths), config.training.seq_len
    lines = [f"{'training.seq_len':>18}{'rows kept':>22}{'tokens, long ones dropped':>32}{'truncated':>26}"]
    for kept in retention(lengths, seq_len):
        columns = (kept.rows, rows, 13), (kept.tokens, tokens, 23), (kept.tokens_truncated, tokens, 17)
        shares = "".join(f"{part:>{width},} {100 * part / whole:6.1f} %" for part, whole, width in columns)
        mark = "  <- this config" if kept.seq_len == seq_len else ""
        lines.append(f"{kept.seq_len:>18,}{shares}{mark}")
    chunk_size = config.chunkflow.chunk_size
    lines += ["", f"{'tokens of a sequence':>22}{'sequences':>14}{'tokens':>18}  share of all tokens"]
    for part in histogram(lengths, LEAST_CHUNK if chunk_size == "auto" else chunk_size):
        share = 100 * part.tokens / tokens
        mark = " <- chunkflow.chunk_size" if part.end == chunk_size and config.chunkflow.enable else ""
        bar = "#" * round(share / 2)
        between = f"{part.above + 1:,} to {part.end:,}"
        lines.append(f"{between:>22}{part.rows:>14,}{part.tokens:>18,}  {share:4.1f} % {bar}{mark}".rstrip())
    return "\n".join([*lines, ""])


def table(report: dict) -> str:
    """The report as text."""
    chunks = "whole sequences"
    if report["chunk_size"]:
        chunks = f"chunks of {report['chunk_size']:,}, k = {report['k']}"
    layers, ranks = report["stage_layers"], len(report["memory"]["pipeline_ranks_gib"])
    runs = ", ".join(f"{len(list(equal))} x {count}" for count, equal in groupby(layers))
    stage_text = f"pipelines of {ranks} ranks, layers of stages {runs}; " if len(layers) > 1 else ""
    gathered = "layer by layer (ZeRO-3)" if report["reshard_after_forward"] else "once a step"
    trained = report["trained_parameters"]
    if trained != report["parameters"]:
        chunks = f"adapters of {trained:,}, {chunks}"
    lines = [
        f"{report['model']}, {report['parameters']:,} parameters, {chunks}",
        f"{report['ranks']} ranks: {stage_text}{report['replicas']} data-parallel; {report['shards']} shards,"
        f" gathered {gathered}",
    ]
    if report["pairs"]:
        lines.append("preference pairs: forwards of both answers come before each step, in its seconds")
    if report["notice"]:
        lines.append(report["notice"])
    last = f"with {report['longest_sequence']['longest']:,}"
    lines += ["", f"{'a step, of the first ' + str(report['steps']):<46}{'mean':>12}{'worst':>12}{last:>16}"]
    for name, (text, form) in FIGURES.items():
        if name in report["mean"]:
            columns = report["mean"], report["worst"], report["longest_sequence"]
            mean, worst, stress = (format(column[name], form) for column in columns)
            lines.append(f"  {text:<44}{mean:>12}{worst:>12}{stress:>16}")
    ours, stress = report["memory"], report["memory_longest_sequence"]
    lines += ["", f"{'GiB at the peak of the fullest rank, predicted':<58}{'worst':>12}{last:>16}"]
    for part, text in PARTS.items():
        pair = [memory["parts_gib"][part] for memory in (ours, stress)]
        if any(pair):
            lines.append(f"  {text:<56}{pair[0]:>12.2f}{pair[1]:>16.2f}")
    lines.append(f"  {'total':<56}{ours['total_gib']:>12.2f}{stress['total_gib']:>16.2f}")
    if len(layers) > 1:
        form = ".0f" if stress["total_gib"] >= 10 else ".2f"
        totals = ", ".join(format(gib, form) for gib in stress["pipeline_ranks_gib"])
        lines.append(f"  total of each pipeline rank: {totals}")
    for name, text in (("cuda", "CUDA, NCCL, buffers of FSDP2"), ("fragmentation", "fragmentation")):
        pair = [memory[f"{name}_gib"] for memory in (ours, stress)]
        lines.append(f"  {'beside it: ' + text:<56}{pair[0]:>12.2f}{pair[1]:>16.2f}")
    kv = sorted(report["kv_gib_of_replicas"])
    if kv[-1] and len(kv) > 1:
        lines.append(
            f"  K/V and their gradients {last}, over data-parallel ranks: {kv[0]:.2f} to {kv[-1]:.2f}"
        )
    if report["host_gib_per_rank"]:
        lines.append(f"  in host memory, a rank: {report['host_gib_per_rank']:.2f}")
    lines += choice.table_lines(report)
    rates = "measured rates" if report["calibrated"] else "rates of its data sheet"
    lines.append(f"Seconds by {rates} ({report['device']}), memory by arithmetic.")
    return "\n".join(lines)


def write_comment(path: str, text: str) -> None:
    """Puts the text into a TOML file's first comment, behind the command of this recipe in it. ValueError
    where there is none."""
    lines = Path(path).read_text(encoding="utf-8").split("\n") if path else []
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    command = next((number for number in range(end) if "recipes/plan.py" in lines[number]), None)
    if command is None:
        raise ValueError(
            f"--write: {path or 'no --job.config_file'} has no first comment with a command of"
            " recipes/plan.py: write one, and the text goes behind it"
        )
    while lines[command].endswith("\\"):
        command += 1
    comment = [f"# {line}".rstrip() for line in ["", *text.split("\n")]]
    Path(path).write_text("\n".join([*lines[: command + 1], *comment, *lines[end:]]), encoding="utf-8")


if __name__ == "__main__":
    main()
