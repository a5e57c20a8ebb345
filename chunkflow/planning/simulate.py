"""What a pipeline schedule will do: its timeline, bubble and memory as numbers, a trace, a picture. No torch.

    python -m chunkflow.planning.simulate --stages 4 --lengths 1,1,2,4 --chunk-size 2 --k 2 --json

prints them for unit costs: a token's forward or recompute takes a rank 1, its backward 2, transfers nothing.
`--virtual V` cuts each rank's layers into V stages, which take 1 / V of that each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from chunkflow.planning.chunks import Group, build_groups, whole_sequences
from chunkflow.planning.pipeline_schedule import (
    Costs,
    Schedule,
    Timed,
    equal_stages,
    lower_bound,
    paper_schedule,
    play,
    state_aware_schedule,
)
from chunkflow.planning.schedule import Action, Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Simulation(NamedTuple):
    """One step of a schedule, times in the unit of the costs; chunks and tokens count on each of a rank's
    stages."""

    timeline: list[list[Timed]]  # rank -> its actions in order
    makespan: float
    bubble: float  # 1 - useful work of a rank / makespan, the mean over ranks; a recompute is not useful work
    idle: float  # 1 - all work of a rank / makespan, the mean over ranks
    peak_kept_chunks: list[int]  # rank -> most chunks that hold activations at once
    peak_kv_tokens: list[int]  # rank -> most tokens of the groups that hold K/V state at once


def simulate(schedule: Schedule, costs: Costs, group_tokens: Sequence[int]) -> Simulation:
    """Runs each rank's actions in order, each as soon as it has its input. Raises ValueError on a deadlock.

    A group of several chunks holds the K/V of all its `group_tokens` from first forward to last backward.
    """
    timeline = play([[actions] for actions in schedule], costs)
    makespan, bubbles, idle = shares(timeline)
    return Simulation(
        timeline=timeline,
        makespan=makespan,
        bubble=sum(bubbles) / len(bubbles),
        idle=sum(idle) / len(idle),
        peak_kept_chunks=[_peak_kept_chunks(actions) for actions in schedule],
        peak_kv_tokens=[_peak_kv_tokens(actions, costs, group_tokens) for actions in schedule],
    )


def shares(timeline: Sequence[Sequence[Timed]]) -> tuple[float, list[float], list[float]]:
    """Makespan, and each rank's bubble and idle share of it, of a timeline that was planned or measured."""
    makespan = max((actions[-1].end for actions in timeline if actions), default=0.0) or 1.0  # if empty
    bubbles, idle = [], []
    for actions in timeline:
        work = sum(end - start for _, start, end in actions)
        again = sum(end - start for action, start, end in actions if action.kind is Kind.RECOMPUTE)
        bubbles.append(1 - (work - again) / makespan)
        idle.append(1 - work / makespan)
    return makespan, bubbles, idle


def _peak_kept_chunks(actions: Sequence[Action]) -> int:
    change = {Kind.FORWARD: 1, Kind.RECOMPUTE: 1, Kind.BACKWARD: -1}
    return max(accumulate((change.get(action.kind, 0) for action in actions), initial=0))


def _peak_kv_tokens(actions: Sequence[Action], costs: Costs, group_tokens: Sequence[int]) -> int:
    tokens = peak = 0
    for kind, group, chunk, stage in actions:
        if chunk > 0 or len(costs.forward[stage][group]) == 1 or kind is Kind.RECOMPUTE:
            continue
        tokens += group_tokens[group] if kind is not Kind.BACKWARD else -group_tokens[group]
        peak = max(peak, tokens)
    return peak


def chrome_trace(timelines: dict[str, Sequence[Sequence[Timed]]]) -> dict:
    """Timelines by name as JSON for ui.perfetto.dev or chrome://tracing; a unit of time is shown as 1 us."""
    events: list[dict] = []
    for process, (name, timeline) in enumerate(timelines.items()):
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}})
        for rank, actions in enumerate(timeline):
            row = {"pid": process, "tid": rank}
            events.append({"name": "thread_name", "ph": "M", **row, "args": {"name": f"rank {rank}"}})
            for (kind, group, chunk, stage), start, end in actions:
                event = {"name": f"{kind.value} {group}.{chunk}", "cat": kind.name, "ph": "X", **row}
                details = {"group": group, "chunk": chunk, "stage": stage}
                events.append({**event, "ts": start, "dur": end - start, "args": details})
    return {"traceEvents": events}


KINDS = {
    Kind.FORWARD: "forward",
    Kind.FORWARD_STATE: "forward for K/V only",
    Kind.RECOMPUTE: "forward again",
    Kind.BACKWARD: "backward",
}
COLOURS = {
    Kind.FORWARD: "#5b8fd1",
    Kind.FORWARD_STATE: "#b9d3f0",
    Kind.RECOMPUTE: "#f0b357",
    Kind.BACKWARD: "#7dbb75",
}


def new_figure(width: float, height: float) -> Figure:
    """A matplotlib figure in inches, with letters that can be read where it is shown at half its size.

    Raises ImportError without matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 15, "axes.titlesize": 15, "figure.titlesize": 15})
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def picture(
    timelines: dict[str, Sequence[Sequence[Timed]]], unit: str = "forwards of a token on one rank"
) -> Figure:
    """Timelines by name as a figure, a line for each rank, all on one scale; actions are labelled
    `group.chunk` where there is room. `unit`: of their times.

    Raises ImportError without matplotlib.
    """
    ranks = max(map(len, timelines.values()))
    figure = new_figure(16, 1.5 + (1.2 + 0.6 * ranks) * len(timelines))
    from matplotlib.patches import Patch

    rows = figure.subplots(len(timelines), squeeze=False)[:, 0]
    longest = max(shares(timeline)[0] for timeline in timelines.values())
    for (name, timeline), axes in zip(timelines.items(), rows):
        for rank, actions in enumerate(timeline):
            boxes = [(start, end - start) for _, start, end in actions]
            colours = [COLOURS[action.kind] for action, _, _ in actions]
            axes.broken_barh(boxes, (rank - 0.45, 0.9), facecolors=colours, edgecolor="white", linewidth=0.5)
            for action, start, end in actions:
                if end - start > 0.015 * longest:
                    label = f"{action.group}.{action.chunk}"
                    axes.text((start + end) / 2, rank, label, ha="center", va="center", fontsize=11)
        makespan, bubbles, idle = shares(timeline)
        axes.set(xlim=(0, longest), yticks=range(ranks), ylabel="rank")
        axes.invert_yaxis()
        bubble, idle = sum(bubbles) / len(bubbles), sum(idle) / len(idle)
        title = f"{name}: makespan {round(makespan, 1):,.6g}, bubble {bubble:.1%}, idle {idle:.1%}"
        axes.set_title(title, loc="left")
    axes.set_xlabel(f"time in {unit}")
    patches = [Patch(color=colour, label=KINDS[kind]) for kind, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(COLOURS), frameon=False)
    return figure


def in_given_order(groups: list[Group]) -> list[Group]:
    """Standalone chunks first, then the groups of several; each in the order of their first sequences."""

    def key_of(group: Group) -> tuple[bool, int]:
        return len(group.chunks) > 1, min(segment.sequence for segment in group.chunks[0].segments)

    return sorted(groups, key=key_of)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"simulate: {message}; --help lists the options\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1: give one such as 4")
    return int(text)


def _lengths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers of at least 1: give tokens per sequence such as 1,1,2,4"
        )
    return [int(part) for part in parts]


def _plain(number: float) -> float:
    """3 for 3.0, and for the 3.0000000000000004 that thirds add up to."""
    number = round(number, 9)
    return int(number) if number == int(number) else number


def main(arguments: Sequence[str] | None = None) -> None:
    program = "python -m chunkflow.planning.simulate"
    parser = _Parser(program, description="Simulates a pipeline schedule.", allow_abbrev=False)
    parser.add_argument("--stages", type=_count, required=True, help="pipeline ranks")
    parser.add_argument("--virtual", type=_count, default=1, help="stages a rank (1); more: interleaved")
    parser.add_argument(
        "--lengths", type=_lengths, required=True, help="tokens of each sequence, comma separated"
    )
    parser.add_argument("--chunk-size", type=_count, default=2048, help="tokens (2048)")
    parser.add_argument(
        "--k", type=_count, default=1, help="chunks of a group that keep their activations (1)"
    )
    parser.add_argument("--schedule", choices=["1f1b", "paper", "state-aware"], default="state-aware")
    parser.add_argument(
        "--no-fill-tails", action="store_true", help="pack nothing behind a long sequence's tail"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome / Perfetto trace (JSON)")
    parser.add_argument(
        "--picture", metavar="FILE", help="write a picture, in the format that its name ends in"
    )
    options = parser.parse_args(arguments)

    if options.schedule == "1f1b":
        groups, k = whole_sequences(options.lengths), 1
    else:
        groups, k = build_groups(options.lengths, options.chunk_size, not options.no_fill_tails), options.k
    if options.schedule == "paper":
        groups = in_given_order(groups)
    forward = [[chunk.tokens / options.virtual for chunk in group.chunks] for group in groups]
    costs = equal_stages(forward, options.stages * options.virtual)
    make = state_aware_schedule if options.schedule == "state-aware" else paper_schedule
    simulation = simulate(make(costs, k, options.stages), costs, [group.tokens for group in groups])
    names = ("bubble", "idle", "peak_kept_chunks", "peak_kv_tokens")
    result = {
        "chunks": sum(map(len, forward)),
        "makespan": _plain(simulation.makespan),
        "bound": _plain(lower_bound(costs, k, options.stages)),
        **{name: getattr(simulation, name) for name in names},
    }
    try:
        if options.trace:
            with open(options.trace, "w", encoding="utf-8") as file:
                json.dump(chrome_trace({options.schedule: simulation.timeline}), file)
        if options.picture:
            figure = picture({options.schedule: simulation.timeline})
            if options.picture.rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
                trouble = f"--picture {options.picture} does not end in a format of pictures"
                parser.error(f"{trouble}: take .png, .svg or .pdf")
            figure.savefig(options.picture, dpi=150)
    except OSError as error:
        trouble = f"{error.filename} cannot be written ({error.strerror})"
        parser.error(f"{trouble}: name a file in a folder that you may write to")
    except ImportError:
        parser.error("--picture needs matplotlib, which is not installed: pip install 'chunkflow[pictures]'")
    if options.json:
        print(json.dumps(result))
        return
    layout = f"{options.stages} ranks, {options.virtual} stage(s) each"
    print(f"{result['chunks']} chunks on {layout}, {options.schedule}")
    print(f"makespan {result['makespan']:g} (lower bound {result['bound']:g})")
    print(f"bubble {simulation.bubble:.2%}, idle {simulation.idle:.2%}")
    print(f"peak kept chunks per rank: {', '.join(map(str, simulation.peak_kept_chunks))}")
    print(f"peak K/V tokens per rank: {', '.join(map(str, simulation.peak_kv_tokens))}")


if __name__ == "__main__":
    main(sys.argv[1:])
