"""The paper's comparison by simulation: steps of whole sequences as Megatron-LM runs them, the paper's chunks
and schedule, and ours, on the paper's models, layouts and contexts. No GPU.

    python benchmarks/paper.py                  # the table, and what each part of a step costs
    python benchmarks/paper.py --checks         # what the paper prints of itself against the simulation
    python benchmarks/paper.py --sensitivity    # the speedups of 7B at 256K under other assumptions
    python benchmarks/paper.py --replicas 8 --setups 1      # with data parallelism, and shared sequences
    python benchmarks/paper.py --picture docs/pictures/paper.png

docs/paper.md says what is assumed, why, and what follows; benchmarks/paper_model.py prices a step. Seconds
are of batches of 256 sequences with LMSys-Chat-1M's lengths, cut to the context. Batches with 0, 1, 2 ...
sequences above 32K are simulated apart and weighed by how often they occur. A step is a sum of parts, the
mean over devices: useful work; what small micro-batches add (weights are read, and kernels launched, for few
tokens); forward run again; waiting in the pipeline; waiting for other replicas.
"""

from __future__ import annotations

import argparse
import json
import random
from math import exp, log

from paper_model import DEVICES, NAMES, SETUPS, Device, Parts, Setup, System, weighed
from result_files import new_parser, parse_args

from chunkflow.data.synthetic import synthetic_lengths

BATCH = 256  # sequences of a step
LONG, LONGEST, LONG_SHARE = 32_768, 300_000, 0.00013  # tokens; share of LMSys-Chat-1M's above LONG
GPU_GIB = 79.2  # of 80 GB
# At most 32K tokens keep their activations, as in the paper's table 6.
GRID = [(size, k) for size in (2048, 4096, 8192, 16384, 32768) for k in (1, 2, 4, 8, 16) if size * k <= LONG]
TITLES = {"whole": "whole sequences", "paper": "the paper's", "ours": "ours", "shared": "ours, shared"}
PAPER = {  # what it prints of Qwen2.5-7B
    "short sequences' speed lost on 16 GPUs against 4": 0.65,
    "peak GiB, whole sequences, 32K": 75,
    "seconds, (2K, 16), 256K": 29.81, "seconds, (8K, 4), 256K": 23.77, "seconds, (32K, 1), 256K": 28.94,
    "peak GiB, chunks of 2K, 32K": 41.6, "peak GiB, chunks of 4K, 32K": 47.5,
    "peak GiB, chunks of 8K, 32K": 59.3, "peak GiB, chunks of 2K, 256K": 45.6,
    "peak GiB, chunks of 4K, 256K": 50.8, "peak GiB, chunks of 8K, 256K": 63.8,
}  # fmt: skip


class Data:
    """Batches by how many of their sequences are long, with the share of steps that have so many."""

    def __init__(self, share: float, batches: int):
        generator, expected = random.Random(0), BATCH * share
        self.batches, self.weights = [], []
        left, weight = 1.0, exp(-expected)
        for count in range(BATCH):  # Poisson's distribution; the last stratum has the rest
            rest = left - weight < 0.002
            short = [min(x, LONG) for x in synthetic_lengths("lmsys", BATCH * batches, count)]
            for batch in range(batches):
                lengths = short[batch * BATCH : (batch + 1) * BATCH]
                for index in range(count):  # between 32K and the longest their logarithms are even
                    part = (batch + index * batches + generator.random()) / (count * batches)
                    lengths[index] = round(exp(log(LONG) + part * log(LONGEST / LONG)))
                generator.shuffle(lengths)
                self.batches.append(lengths)
                self.weights.append((left if rest else weight) / batches)
            if rest:
                break
            left, weight = left - weight, weight * expected / (count + 1)

    def mean(self, system: System, replicas: int = 1) -> Parts:
        context = system.setup.context
        rows = [system.step([min(x, context) for x in batch], replicas) for batch in self.batches]
        return weighed(rows, self.weights)

    def peak_gib(self, system: System) -> float:
        """With a sequence as long as the context."""
        context = system.setup.context
        return system.peak_gib([context, *(min(x, LONG) for x in self.batches[0][1:])])


def best(kind: str, setup: Setup, device: Device, few: Data, data: Data, replicas: int) -> System:
    """The fastest of GRID, on a few batches, that fits into a GPU; whole sequences have nothing to choose."""
    if kind == "whole":
        return System(kind, setup, device)
    systems = [System(kind, setup, device, *choice) for choice in GRID]
    systems.sort(key=lambda system: sum(few.mean(system, replicas)))
    return next(system for system in systems if data.peak_gib(system) <= GPU_GIB)


def compare(setup: Setup, device: Device, share: float, batches: int, replicas: int = 1) -> dict:
    """Of each system: chunk size and k, seconds by part, speedup over whole sequences, peak memory."""
    few, data, rows = Data(share, 1), Data(share, batches), {}
    for kind in ("whole", "paper", "ours", "shared") if replicas > 1 else ("whole", "paper", "ours"):
        system = best(kind, setup, device, few, data, replicas)
        parts = data.mean(system, replicas)
        seconds = sum(parts)
        rows[kind] = {
            "chunk_size": system.chunk_size, "k": system.k, "seconds": seconds, **parts._asdict(),
            "speedup": rows["whole"]["seconds"] / seconds if rows else 1.0, "gib": data.peak_gib(system),
        }  # fmt: skip
    return rows


def table(options: argparse.Namespace) -> dict:
    device, found = DEVICES[options.device], {}
    names = "".join(f"{name.split()[0]:>10}" for name in NAMES)
    print(f"{options.device}, {options.replicas} replica(s), {options.share:.3%} of sequences above 32K;"
          f" seconds a step: {', '.join(NAMES)}")  # fmt: skip
    print(f"{'':28}{'':18}{'chunk, k':>10}{'seconds':>9}{names}{'speedup':>9}{'GiB':>7}")
    for setup in [SETUPS[index] for index in options.setups]:
        rows = found[str(setup)] = compare(setup, device, options.share, options.batches, options.replicas)
        for kind, row in rows.items():
            choice = f"{row['chunk_size'] // 1024}K, {row['k']}" if kind != "whole" else ""
            parts = "".join(f"{row[part]:10.2f}" for part in Parts._fields)
            start = f"{str(setup) if kind == 'whole' else '':28}{TITLES[kind]:18}{choice:>10}"
            print(f"{start}{row['seconds']:9.2f}{parts}{row['speedup']:9.2f}{row['gib']:7.1f}", flush=True)
    return found


def checks(options: argparse.Namespace) -> dict:
    """What the paper prints of its own measurements, and the same simulated."""
    device, (short_context, long_context) = DEVICES[options.device], SETUPS[:2]
    data, short = Data(options.share, options.batches), Data(0.0, options.batches)
    few_gpus = sum(short.mean(System("whole", short_context, device))) * 4
    many_gpus = sum(short.mean(System("whole", long_context, device))) * 16
    figures = [1 - few_gpus / many_gpus, data.peak_gib(System("whole", short_context, device))]
    for choice in ((2048, 16), (8192, 4), (32768, 1)):
        figures.append(sum(data.mean(System("paper", long_context, device, *choice))))
    for context in (LONG, 262_144):  # on four GPUs: only there are they the paper's at 32K
        for chunk_size in (2048, 4096, 8192):
            setup = short_context._replace(context=context)
            figures.append(data.peak_gib(System("paper", setup, device, chunk_size, 1)))
    print(f"{f'{options.device}, {options.share:.3%} above 32K':50}{'paper':>8}{'simulated':>11}")
    for (name, printed), figure in zip(PAPER.items(), figures):
        print(f"{name:50}{printed:8.4g}{figure:11.3g}")
    return dict(zip(PAPER, figures))


def sensitivity(options: argparse.Namespace) -> dict:
    """Speedups of 7B at 256K under other assumptions: kernels' launch on each device, the rest on one."""
    setup, base, found = SETUPS[1], DEVICES[options.device], {}
    cases = {
        f"{name}, {us} us a kernel": (setup, device._replace(launch=us * 1e-6), options.share)
        for name, device in DEVICES.items()
        for us in options.launches
    }
    cases |= {f"{share:.2%} above 32K": (setup, base, share) for share in options.shares}
    cases["whole sequences recompute attention alone"] = setup._replace(full=False), base, options.share
    print(f"{f'{setup}, {options.device}':44}{'whole':>9}{'paper':>9}{'ours':>9}  speedup: paper, ours")
    for name, case in cases.items():
        rows = found[name] = compare(*case, options.batches)
        seconds = "".join(f"{row['seconds']:9.2f}" for row in rows.values())
        print(f"{name:44}{seconds}{rows['paper']['speedup']:9.2f}{rows['ours']['speedup']:9.2f}", flush=True)
    return found


def picture(found: dict, path: str) -> None:
    """Each setup's systems as bars, whole sequences = 1, cut into the parts of a step."""
    from matplotlib.figure import Figure

    colours = ("#5b8fd1", "#c9c9c9", "#f0b357", "#d98880", "#b59bd0")
    count = sum(map(len, found.values()))
    figure = Figure(figsize=(11, 1 + 0.27 * count), layout="constrained")
    axes, place, ticks = figure.subplots(), 0.0, []
    for setup, rows in found.items():
        for kind, row in rows.items():
            left, whole = 0.0, rows["whole"]["seconds"]
            for part, name, colour in zip(Parts._fields, NAMES, colours):
                label = name if not ticks else None
                axes.barh(place, row[part] / whole, left=left, height=0.85, color=colour, label=label)
                left += row[part] / whole
            text = f"{row['seconds']:.3g} s" + ("" if kind == "whole" else f", {row['speedup']:.2f} x")
            axes.text(left + 0.005, place, text, va="center", fontsize=8)
            ticks.append((place, f"{setup}   {TITLES[kind]}" if kind == "whole" else TITLES[kind]))
            place += 1
        place += 0.6
    axes.set_yticks(*zip(*ticks), fontsize=8)
    axes.set(xlim=(0, 1.12), ylim=(place - 1, -0.8), xlabel="time of a step, whole sequences = 1 (simulated)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(NAMES), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--device", choices=DEVICES, default="A100")
    parser.add_argument(
        "--setups", type=int, nargs="+", choices=range(len(SETUPS)), default=range(len(SETUPS))
    )
    parser.add_argument("--replicas", type=int, default=1, help="that share the 256 sequences (1)")
    parser.add_argument("--share", type=float, default=LONG_SHARE, help="of sequences above 32K (0.00013)")
    parser.add_argument("--batches", type=int, default=6, help="of each number of long sequences (6)")
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--sensitivity", action="store_true")
    parser.add_argument(
        "--launches", type=int, nargs="*", default=[5, 10, 20, 30], help="us, of --sensitivity"
    )
    shares = [0.0, 0.0005, 0.001, 0.002, 0.008]
    parser.add_argument("--shares", type=float, nargs="*", default=shares, help="of --sensitivity")
    parser.add_argument("--picture", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parse_args(parser)
    task = checks if options.checks else sensitivity if options.sensitivity else table
    found = task(options)
    if options.picture and task is table:
        picture(found, options.picture)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
