"""What recipes/plan.py prints, as text."""

from itertools import groupby
from pathlib import Path

from chunkflow.planning.forecast import LEAST_CHUNK, Row
from chunkflow.planning.host_memory import HOST_PARTS
from chunkflow.planning.lengths import histogram, retention
from chunkflow.planning.memory import PARTS

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
BESIDE = {"cuda": "CUDA, NCCL, buffers of FSDP2", "fragmentation": "fragmentation"}  # memory's other parts
SHOWN_ROWS = 6  # of a report's table


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
        if "k" in report["adapts"] and len(report["stage_layers"]) == 1 and report["budget_gib"]:
            chunks += " or more, as each sequence leaves room"
    trained = report["trained_parameters"]
    if trained != report["parameters"]:
        chunks = f"adapters of {trained:,}, {chunks}"
    layers, ranks = report["stage_layers"], len(report["memory"]["pipeline_ranks_gib"])
    runs = ", ".join(f"{len(list(equal))} x {count}" for count, equal in groupby(layers))
    stage_text = f"pipelines of {ranks} ranks, layers of stages {runs}; " if len(layers) > 1 else ""
    gathered = "layer by layer (ZeRO-3)" if report["reshard_after_forward"] else "once a step"
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
    for name, text in BESIDE.items():
        pair = [memory[f"{name}_gib"] for memory in (ours, stress)]
        lines.append(f"  {'beside it: ' + text:<56}{pair[0]:>12.2f}{pair[1]:>16.2f}")
    kv = sorted(report["kv_gib_of_replicas"])
    if kv[-1] and len(kv) > 1:
        lines.append(
            f"  K/V and their gradients {last}, over data-parallel ranks: {kv[0]:.2f} to {kv[-1]:.2f}"
        )
    if report["host_gib_per_rank"]:
        parts = [f"{HOST_PARTS[part]} {gib:.2f}" for part, gib in report["host_parts_gib"].items() if gib]
        lines.append(f"  in host memory, a rank: {report['host_gib_per_rank']:.2f} ({'; '.join(parts)})")
    if report["notices"]:
        lines += [f"In {len(report['notices'])} of these steps the memory is not enough. The first one:"]
        lines += [f"  {report['notices'][0]}"]
    lines += settings_lines(report)
    rates = "measured rates" if report["calibrated"] else "rates of its data sheet"
    lines.append(f"Seconds by {rates} ({report['device']}), memory by arithmetic.")
    return "\n".join(lines)


def settings_lines(report: dict) -> list[str]:
    """The first rows of a report's table, the config's own among them, and why the best is, as text."""
    if not report["table"]:
        return []
    own = report["chunk_size"], report["k"], len(report["memory"]["pipeline_ranks_gib"])
    own = (*own, report["reshard_after_forward"])
    rows = [Row(**row) for row in report["table"]]
    mixed = len({row.kv_offload for row in rows}) > 1
    shown = [row for number, row in enumerate(rows) if number < SHOWN_ROWS or row[:4] == own]
    heads = "chunk_size", "k", "pipeline", "ZeRO-3", "s a step", "tokens/s", "GiB", "recomputed %", "bubble %"
    lines = ["", "other settings, with that sequence: the fastest that fit first"]
    lines.append("".join(f"{head:>{len(head) + 3}}" for head in heads))
    for row in shown:
        zero = "yes" if row.fsdp_reshard_after_forward else "no"
        texts = [f"{row.chunk_size:,}", f"{row.k}", f"{row.pipeline_parallel_degree}", zero]
        texts += [f"{row.step_seconds:,.3g}", f"{row.tps:,.0f}", f"{row.peak_gib:,.1f}"]
        texts += [f"{row.recomputed_percent:.1f}", f"{row.bubble_percent:.1f}"]
        line = "".join(f"{text:>{len(head) + 3}}" for text, head in zip(texts, heads))
        marks = ["best"] * row.best + ["this config"] * (row[:4] == own) + ["too large"] * (not row.fits)
        marks += ["K/V in host memory"] * (mixed and row.kv_offload == "host")
        lines.append(line + (f"  <- {', '.join(marks)}" if marks else ""))
    lines += report["why"].split("; ")
    return lines + ([report["hint"]] if report["hint"] else [])


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
