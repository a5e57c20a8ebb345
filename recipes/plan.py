"""Says what a config will do before it runs: chunks, padding, balance, bubble, peak memory by part. Launches
nothing.

    NGPU=64 python recipes/plan.py --job.config_file my.toml

Builds the real plans of the first 20 steps (--steps=N; an epoch at most) for NGPU x NNODES ranks from the
lengths of the data, and one more with the longest sequence among the first step's. --json prints one JSON
object. Memory is arithmetic for CUDA, not measured.
"""

import argparse
import json
import sys
from itertools import groupby

import torch

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import open_dataset
from chunkflow.execution.loss import slice_tokens
from chunkflow.execution.pipeline import SENDS_IN_FLIGHT
from chunkflow.planning.chunks import Chunk, Group, Segment
from chunkflow.planning.cost import Cost
from chunkflow.planning.memory import PARTS, Layout, StageSizes, host_bytes, peak_parts
from chunkflow.planning.planner import PipelineSettings, PlanSettings, plan_step
from chunkflow.settings.config import ConfigError
from chunkflow.storage import hf_weights as hf
from chunkflow.training import parallel, stages
from chunkflow.training.model import model_args, open_tokenizer
from chunkflow.training.start import main_config, user_errors, world_size

# What each step is measured by: name in JSON, line in the table, format.
FIGURES = {
    "sequences": ("sequences", ",.0f"),
    "tokens": ("tokens", ",.0f"),
    "longest": ("longest sequence, tokens", ",.0f"),
    "chunks": ("chunks, all ranks", ",.0f"),
    "padding_percent": ("padding, %", ".2f"),
    "recomputed_percent": ("recomputed chunks, %", ".2f"),
    "imbalance_percent": ("slowest rank over the mean, %", ".2f"),
    "template_overhead_percent": ("slots added by ZeRO-3's common template, %", ".2f"),
    "bubble_percent": ("simulated bubble, %", ".2f"),
    "idle_percent": ("simulated idle time, %", ".2f"),
}


def check(config) -> None:
    """What the recipes refuse too, before any work."""
    tokenizer = open_tokenizer(config)
    family, args = model_args(config, tokenizer.vocab_size if tokenizer else 0)
    hf.check(config, family, args)
    if config.parallelism.pipeline_parallel_degree > 1:
        stages.layers_of_stages(config, args)
        if config.parallelism.fsdp_reshard_after_forward == "always":
            raise ConfigError(
                'parallelism.fsdp_reshard_after_forward = "always" would gather every layer for every chunk,'
                " and replicas have unequal"
                ' plans: with a pipeline set "default" or "never"'
            )


def main(argv: list[str] | None = None) -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--steps", nargs="?", default="20", const="")
    own.add_argument("--json", action="store_true")
    options, rest = own.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print("--steps N (20): steps to plan. --json: print one JSON object.\n")
    config = main_config(rest, check=check, planned=True)
    if not options.steps.isdecimal() or int(options.steps) < 1:
        print(
            f"error: --steps = {options.steps} is not a whole number of at least 1: give one such as 20",
            file=sys.stderr,
        )
        raise SystemExit(2)
    with user_errors():
        report = predict(config, int(options.steps))
    print(json.dumps(report) if options.json else table(report))


def predict(config, steps: int) -> dict:
    """Everything that is printed, as one JSON object. Bytes are GiB."""
    training, pipeline_ranks = config.training, config.parallelism.pipeline_parallel_degree
    ranks = world_size(planned=True)
    replicas = ranks // pipeline_ranks  # data-parallel ranks, each of them a pipeline
    tokenizer = open_tokenizer(config)
    family, args = model_args(config, tokenizer.vocab_size if tokenizer else 0)
    seed = parallel.set_seed(config)
    dataset = open_dataset(
        training.dataset, training.dataset_path, tokenizer, vocab_size=args.vocab_size, seed=seed
    )

    # The plan's settings are those of the recipes.
    layers = stages.layers_of_stages(config, args) if pipeline_ranks > 1 else [range(args.n_layers)]
    reshard = pipeline_ranks == 1 and parallel.reshards(config, ranks)
    settings = PlanSettings(
        Cost.of_model(args),
        ranks=replicas,
        enable=config.chunkflow.enable,
        chunk_size=config.chunkflow.chunk_size,
        k=config.chunkflow.k,
        fill_tails=config.chunkflow.fill_tails,
        balance=config.chunkflow.balance,
        lockstep=reshard,
    )
    loader = ChunkDataLoader(
        dataset,
        settings,
        rank=0,
        global_batch_size=training.global_batch_size,
        seq_len=training.seq_len,
        overlong=training.overlong,
        shuffle=training.shuffle,
        seed=seed,
    )

    # The model's parameters, stage by stage, without memory.
    activation_checkpoint = config.activation_checkpoint
    layout = Layout(
        stored=parallel.DTYPES[training.dtype].itemsize,
        compute=parallel.DTYPES[training.mixed_precision_param].itemsize,
        reduce=parallel.DTYPES[training.mixed_precision_reduce].itemsize,
        shards=replicas // config.parallelism.data_parallel_replicate_degree,
        reshard=reshard,
        eight_bit=config.optimizer.name == "AdamW8bit",
        offload=training.enable_cpu_offload,
        checkpoint_every={"none": 0, "full": 1, "selective": int(activation_checkpoint.selective_ac_option)}[
            activation_checkpoint.mode
        ],
        slice_tokens=slice_tokens("cuda", args.vocab_size),
        sends_in_flight=SENDS_IN_FLIGHT if pipeline_ranks > 1 else 0,
    )
    sizes = []  # pipeline rank -> its stages
    with torch.device("meta"):
        whole = sum(parameter.numel() for parameter in family.Transformer(args).parameters())
        for rank in range(pipeline_ranks):
            models = stages.build_stages(family, args, layers, rank, pipeline_ranks)
            shapes = {
                stage: {name: tuple(p.shape) for name, p in model.named_parameters()}
                for stage, model in models.items()
            }
            sizes.append({stage: StageSizes(args, own, layout) for stage, own in shapes.items()})

    # The first steps as they will be, then the first one again with the longest sequence of all in the place
    # of its longest.
    batches, cursor = [], 0
    while len(batches) < steps and cursor < len(dataset):
        step = loader.step_at(cursor)
        batches.append(step.lengths)
        cursor = step.cursor
    longest = min(max(dataset.lengths), training.seq_len)
    if training.overlong == "drop":
        longest = max(length for length in dataset.lengths if length <= training.seq_len)
    stress = list(batches[0])
    stress[stress.index(max(stress))] = longest

    def plan(lengths: list[int]) -> tuple[dict, list[dict[str, int]]]:
        """A step's figures, and the parts at the peak of each pipeline rank, on the replica where they are
        largest."""
        figures, peaks, bubbles, idle = {}, [{}] * pipeline_ranks, [], []
        for replica in range(replicas if pipeline_ranks > 1 else 1):
            pipeline = (
                PipelineSettings(stages.stage_costs(args, layers), pipeline_ranks, replica)
                if pipeline_ranks > 1
                else None
            )
            made = plan_step(lengths, settings._replace(pipeline=pipeline))
            if pipeline:
                bubbles.append(made.pipeline.simulation.bubble)
                idle.append(made.pipeline.simulation.idle)
                work = [
                    (made.groups[replica] or [ONE_TOKEN], rank, own)
                    for rank, own in enumerate(made.pipeline.program)
                ]
            else:
                work = [(made.groups[rank], 0, made.actions[rank]) for rank in range(replicas)]
            for groups, pipeline_rank, entries in work:
                parts = peak_parts(sizes[pipeline_rank], groups, entries)
                peaks[pipeline_rank] = max(peaks[pipeline_rank], parts, key=lambda parts: sum(parts.values()))
        figures = {
            "sequences": len(lengths),
            "tokens": made.tokens,
            "longest": max(lengths),
            "chunks": made.chunks,
            "padding_percent": made.padding_percent,
            "recomputed_percent": 100 * made.recomputed_chunks / made.chunks,
            "imbalance_percent": made.imbalance_percent,
        }
        if reshard:
            figures["template_overhead_percent"] = made.template_overhead_percent
        if bubbles:
            figures |= {
                "bubble_percent": 100 * sum(bubbles) / replicas,
                "idle_percent": 100 * sum(idle) / replicas,
            }
        return figures, peaks

    planned = []
    for number, lengths in enumerate([*batches, stress], start=1):
        planned.append(plan(lengths))
        if sys.stderr.isatty():
            print(
                f"\rplanned {number} of {len(batches) + 1} steps",
                end="\n" if number > len(batches) else "",
                file=sys.stderr,
            )
    figures = [own for own, _ in planned[:-1]]

    def memory(peaks: list[list[dict[str, int]]]) -> dict:
        """Of the fullest rank: its parts, and each pipeline rank's total."""
        fullest = [max(own, key=lambda parts: sum(parts.values())) for own in zip(*peaks)]
        parts = max(fullest, key=lambda parts: sum(parts.values()))
        return {
            "parts_gib": {part: amount / 2**30 for part, amount in parts.items()},
            "total_gib": sum(parts.values()) / 2**30,
            "pipeline_rank": fullest.index(parts),
            "pipeline_ranks_gib": [sum(own.values()) / 2**30 for own in fullest],
        }

    return {
        "model": f"{config.model.name} {config.model.flavor}",
        "parameters": whole,
        "ranks": ranks,
        "replicas": replicas,
        "stage_layers": [len(own) for own in layers],
        "shards": layout.shards,
        "reshard_after_forward": reshard,
        "chunk_size": config.chunkflow.chunk_size if config.chunkflow.enable else None,
        "k": config.chunkflow.k if config.chunkflow.enable else None,
        "notice": loader.notice,
        "steps": len(batches),
        "mean": {name: sum(own[name] for own in figures) / len(figures) for name in figures[0]},
        "worst": {name: max(own[name] for own in figures) for name in figures[0]},
        "longest_sequence": planned[-1][0],
        "memory": memory([peaks for _, peaks in planned[:-1]]),
        "memory_longest_sequence": memory([planned[-1][1]]),
        "host_gib_per_rank": max(host_bytes(own.values()) for own in sizes) / 2**30,
    }


ONE_TOKEN = Group((Chunk((Segment(0, 0, 1),)),))  # what a replica without sequences runs


def table(report: dict) -> str:
    """The report as text."""
    chunks = (
        f"chunks of {report['chunk_size']:,}, k = {report['k']}"
        if report["chunk_size"]
        else "whole sequences"
    )
    layers = report["stage_layers"]
    runs = [f"{len(list(own))} x {count}" for count, own in groupby(layers)]
    ranks = len(report["memory"]["pipeline_ranks_gib"])
    stage_text = (
        f"pipelines of {ranks} ranks, layers of stages {', '.join(runs)}; " if len(layers) > 1 else ""
    )
    gathered = (
        "gathered layer by layer (ZeRO-3)" if report["reshard_after_forward"] else "gathered once a step"
    )
    lines = [
        f"{report['model']}, {report['parameters']:,} parameters, {chunks}",
        f"{report['ranks']} ranks: {stage_text}{report['replicas']} data-parallel; {report['shards']} shards,"
        f" {gathered}",
    ]
    if report["notice"]:
        lines.append(report["notice"])
    last = f"with {report['longest_sequence']['longest']:,}"
    lines += ["", f"{'a step, of the first ' + str(report['steps']):<46}{'mean':>12}{'worst':>12}{last:>16}"]
    for name, (text, form) in FIGURES.items():
        if name in report["mean"]:
            mean, worst, stress = (
                format(report[column][name], form) for column in ("mean", "worst", "longest_sequence")
            )
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
        lines.append(
            "  total of each pipeline rank: "
            + ", ".join(format(gib, form) for gib in stress["pipeline_ranks_gib"])
        )
    if report["host_gib_per_rank"]:
        lines.append(f"  in host memory, a rank: {report['host_gib_per_rank']:.2f}")
    lines.append(
        "Arithmetic, measured on no GPU. Not in it: CUDA's context, NCCL's buffers, fragmentation; leave 8"
        " GiB for them."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
