"""Prints what a config will do, without running it: chunks, padding, balance, bubble, seconds, peak memory by
part; and what other settings would.

    NGPU=64 python recipes/plan.py --job.config_file my.toml

Says first how much of the data training.seq_len admits, and how long its sequences are. Then builds the real
plans of the first 20 steps (--steps=N; an epoch at most) for NGPU x NNODES ranks from the
lengths of the data, and one more with the longest sequence among the first step's; of more than 8 replicas
the fullest 8. Seconds are those of --device (the GPU there is, else an H100; "cpu": this one), from its data
sheet or, after --calibrate, as measured on this one. --json prints one JSON object; --write puts the text
into the file's first comment, behind this command; --pictures FOLDER draws it, as PNG files and for
TensorBoard. Memory is arithmetic for CUDA, not measured.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

from chunkflow.planning.forecast import Parts, forecast, fullest
from chunkflow.planning.lengths import retention
from chunkflow.planning.memory import FRAGMENTATION
from chunkflow.reporting.plan_pictures import write_pictures
from chunkflow.reporting.plan_text import lengths_table, table, write_comment
from chunkflow.settings.faults import add, collected, refuse
from chunkflow.storage import hf_weights as hf
from chunkflow.training import build, calibration, choice, parallel, prediction
from chunkflow.training.lora import trained_parameters
from chunkflow.training.rates import ASSUMED, analytic, device_of
from chunkflow.training.start import main_config, user_errors, world_size


def check(config, steps: str, device: str) -> None:
    """The training recipe's checks, except those of this machine's devices; and of --steps and --device."""
    faults = {}
    if not steps.isdecimal() or int(steps) < 1:
        add(faults, f"--steps = {steps} is not a whole number of at least 1: give one such as 20")

    def weights(spec) -> None:
        hf.check(config.checkpoint, config.model.hf_assets_path, spec.family, spec.args)

    with collected(faults):
        analytic(device or ASSUMED)
    with collected(faults):
        build.check(config, weights, planned=True)
    refuse(faults)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--steps", nargs="?", default="20", const="")
    parser.add_argument("--device", default="")
    parser.add_argument("--pictures", default="")
    for name in ("--json", "--write", "--calibrate"):
        parser.add_argument(name, action="store_true")
    options, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(
            "--steps N (20): steps to plan. --device NAME: whose rates count. --calibrate: measure this"
            " device's first. --json: print one JSON object. --write: refresh the file's comment."
            " --pictures FOLDER: write PNG files and TensorBoard's events there.\n"
        )
    checks = functools.partial(check, steps=options.steps, device=options.device)
    config = main_config(rest, check=checks, planned=True, chooses=True)
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
        if options.pictures:
            for path in write_pictures(Path(options.pictures), report, dataset.lengths, config):
                print(f"wrote {path}", file=sys.stderr)
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
    settings = build.plan_settings(config, spec, replicas, device, others.adapts, pairs)
    loader = build.open_loader(training, dataset, settings, 0, seed)
    batches, cursor = [], 0
    while len(batches) < count and cursor < max(loader.order.epoch_rows, 1):
        _, lengths, _, cursor = loader.batch_at(cursor)
        batches.append(lengths)

    # ---- The first steps, then that one with the longest sequence.
    layout = spec.family, spec.args, spec.layers, settings.replicas, device
    sizes = prediction.stage_sizes(config, *layout)
    cuda = [prediction.cuda_of_rank(config, rank, settings.replicas) for rank in sizes]
    steps = []
    for number, lengths in enumerate([*batches, others.lengths], start=1):
        steps.append(forecast(lengths, settings, sizes, others.rates, pinned=device != "cpu"))
        seconds, tokens = steps[-1].seconds, steps[-1].figures["tokens"]
        steps[-1].figures.update(step_seconds=seconds, tps=tokens / seconds / ranks)
        if sys.stderr.isatty():
            end = "\n" if number > len(batches) else ""
            print(f"\rplanned {number} of {len(batches) + 1} steps", end=end, file=sys.stderr)

    host = fullest(parts for step in steps for parts in step.hosts)
    host = {part: amount / 2**30 for part, amount in host.items()}
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
        "kv_offload": settings.kv_offload,
        "adapts": sorted(others.adapts),
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
        "host_gib_per_rank": sum(host.values()),
        "host_parts_gib": host,
        "seconds_by_part": {
            part: sum(step.times[part] for step in steps[:-1]) / len(steps[:-1]) for part in steps[0].times
        },
        "seconds_by_part_longest_sequence": steps[-1].times,
        "notices": [step.notice for step in steps if step.notice],
    }


def memory(peaks_of_steps: list[list[Parts]], cuda: list[int]) -> dict:
    """The parts of the fullest rank, and each pipeline rank's total, over all steps. `cuda`: bytes that CUDA
    adds on each pipeline rank, beside the total."""
    of_ranks = [fullest(peaks) for peaks in zip(*peaks_of_steps)]
    parts = fullest(of_ranks)
    total = sum(parts.values())
    return {
        "parts_gib": {part: amount / 2**30 for part, amount in parts.items()},
        "total_gib": total / 2**30,
        "cuda_gib": cuda[of_ranks.index(parts)] / 2**30,
        "fragmentation_gib": FRAGMENTATION * total / 2**30,
        "pipeline_rank": of_ranks.index(parts),
        "pipeline_ranks_gib": [sum(parts.values()) / 2**30 for parts in of_ranks],
    }


if __name__ == "__main__":
    main()
