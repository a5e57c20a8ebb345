"""What a pipeline schedule will do: its timeline, bubble and memory as numbers, a trace, a picture. Pure
Python, no torch.

    python -m chunkflow.planning.simulate --stages 4 --lengths 1,1,2,4 --chunk-size 2 --k 2 --json

prints them for unit costs: on one rank, the forward of a chunk takes as long as it has tokens, a recompute
the same, a backward twice that; transfers are free. `--virtual V` cuts each rank's layers into V stages,
which take 1 / V of that each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
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
from chunkflow.planning.schedule import Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Simulation(NamedTuple):
    """One step of a schedule, times in the unit of the costs. A rank with several stages counts chunks and
    tokens on each."""

    timeline: list[list[Timed]]  # rank -> its actions in order
    makespan: float
    bubble: float  # 1 - useful work of a rank / makespan, the mean over ranks; a recompute is not useful work
    idle: float  # 1 - all work of a rank / makespan, the mean over ranks
    peak_kept_chunks: list[int]  # rank -> most chunks that hold activations at once
    peak_kv_tokens: list[int]  # rank -> most tokens of the groups whose K/V state is there at once


def simulate(schedule: Schedule, costs: Costs, group_tokens: Sequence[int]) -> Simulation:
    """Runs each rank's actions in order, each as soon as its input is there. Raises ValueError on a deadlock.

    A group of several chunks holds the K/V of all its `group_tokens` from its first forward to its last
    backward.
    """
    timeline = play([[actions] for actions in schedule], costs)
    makespan, bubbles, idle = shares(timeline)
    return Simulation(
        timeline=timeline,
        makespan=makespan,
        bubble=sum(bubbles) / len(bubbles),
        idle=sum(idle) / len(idle),
        peak_kept_chunks=[_peak_kept_chunks(own) for own in schedule],
        peak_kv_tokens=[_peak_kv_tokens(own, costs, group_tokens) for own in schedule],
    )


def shares(timeline: Sequence[Sequence[Timed]]) -> tuple[float, list[float], list[float]]:
    """Makespan, and each rank's bubble and idle share of it, of a timeline that was planned or measured."""
    makespan = max((own[-1].end for own in timeline if own), default=0.0) or 1.0  # of nothing: no bubble
    work = [sum(end - start for _, start, end in own) for own in timeline]
    again = [
        sum(end - start for action, start, end in own if action.kind is Kind.RECOMPUTE) for own in timeline
    ]
    return makespan, [1 - (w - r) / makespan for w, r in zip(work, again)], [1 - w / makespan for w in work]


def _peak_kept_chunks(actions: Sequence) -> int:
    kept = peak = 0
    for action in actions:
        if action.kind is Kind.BACKWARD:
            kept -= 1
        elif action.kind in (Kind.FORWARD, Kind.RECOMPUTE):
            kept += 1
        peak = max(peak, kept)
    return peak


def _peak_kv_tokens(actions: Sequence, costs: Costs, group_tokens: Sequence[int]) -> int:
    tokens = peak = 0
    for kind, group, chunk, stage in actions:
        if chunk > 0 or len(costs.forward[stage][group]) == 1 or kind is Kind.RECOMPUTE:
            continue
        tokens += group_tokens[group] if kind is not Kind.BACKWARD else -group_tokens[group]
        peak = max(peak, tokens)
    return peak


def chrome_trace(timelines: dict[str, Sequence[Sequence[Timed]]]) -> dict:
    """Timelines by name, as an object for `json.dump`: open it in ui.perfetto.dev or chrome://tracing. A unit
    of time is 1 us."""
    events: list[dict] = []
    for process, (name, timeline) in enumerate(timelines.items()):
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}})
        for rank, own in enumerate(timeline):
            place = {"pid": process, "tid": rank}
            events.append({"name": "thread_name", "ph": "M", **place, "args": {"name": f"rank {rank}"}})
            for (kind, group, chunk, stage), start, end in own:
                what = {"name": f"{kind.value} {group}.{chunk}", "cat": kind.name, "ph": "X", **place}
                events.append(
                    {
                        **what,
                        "ts": start,
                        "dur": end - start,
                        "args": {"group": group, "chunk": chunk, "stage": stage},
                    }
                )
    return {"traceEvents": events}


COLOURS = {
    Kind.FORWARD: "#5b8fd1",
    Kind.FORWARD_STATE: "#b9d3f0",
    Kind.RECOMPUTE: "#f0b357",
    Kind.BACKWARD: "#7dbb75",
}


def picture(timelines: dict[str, Sequence[Sequence[Timed]]]) -> Figure:
    """Timelines by name as a figure, one line a rank; while actions are few, each says `group.chunk`. Needs
    matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = max(map(len, timelines.values()))
    figure = Figure(figsize=(16, 0.5 + (1 + 0.5 * ranks) * len(timelines)), layout="constrained")
    for (name, timeline), axes in zip(
        timelines.items(), figure.subplots(len(timelines), squeeze=False)[:, 0]
    ):
        for rank, own in enumerate(timeline):
            boxes = [(start, end - start) for _, start, end in own]
            colours = [COLOURS[action.kind] for action, _, _ in own]
            axes.broken_barh(boxes, (rank - 0.45, 0.9), facecolors=colours, edgecolor="white", linewidth=0.3)
            if len(own) <= 60:
                for action, start, end in own:
                    axes.text(
                        (start + end) / 2,
                        rank,
                        f"{action.group}.{action.chunk}",
                        ha="center",
                        va="center",
                        fontsize=7,
                    )
        makespan, bubbles, idle = shares(timeline)
        axes.set(xlim=(0, makespan), yticks=range(ranks), ylabel="rank")
        axes.invert_yaxis()
        bubble, idle = sum(bubbles) / len(bubbles), sum(idle) / len(idle)
        axes.set_title(
            f"{name}: makespan {makespan:,.6g}, bubble {bubble:.1%}, idle {idle:.1%}", loc="left", fontsize=10
        )
    axes.set_xlabel("time")
    patches = [Patch(color=colour, label=kind.name) for kind, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(COLOURS))
    return figure


def in_given_order(groups: list[Group]) -> list[Group]:
    """Standalone chunks first, then the groups of several; each as their first sequences were given."""

    def place(group: Group) -> tuple[bool, int]:
        return len(group.chunks) > 1, min(segment.sequence for segment in group.chunks[0].segments)

    return sorted(groups, key=place)


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
    parser = _Parser(
        "python -m chunkflow.planning.simulate",
        description="Simulates a pipeline schedule.",
        allow_abbrev=False,
    )
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
    result = {
        "chunks": sum(map(len, forward)),
        "makespan": _plain(simulation.makespan),
        "bound": _plain(lower_bound(costs, k, options.stages)),
        "bubble": simulation.bubble,
        "idle": simulation.idle,
        "peak_kept_chunks": simulation.peak_kept_chunks,
        "peak_kv_tokens": simulation.peak_kv_tokens,
    }
    try:
        if options.trace:
            with open(options.trace, "w", encoding="utf-8") as file:
                json.dump(chrome_trace({options.schedule: simulation.timeline}), file)
        if options.picture:
            figure = picture({options.schedule: simulation.timeline})
            if options.picture.rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
                parser.error(
                    f"--picture {options.picture} does not end in a format of pictures: take .png, .svg or"
                    " .pdf"
                )
            figure.savefig(options.picture, dpi=150)
    except OSError as error:
        parser.error(
            f"{error.filename} cannot be written ({error.strerror}): name a file in a folder that you may"
            " write to"
        )
    except ImportError:
        parser.error("--picture needs matplotlib, which is not installed: pip install 'chunkflow[pictures]'")
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{result['chunks']} chunks on {options.stages} ranks, {options.virtual} stage(s) each,"
        f" {options.schedule}"
    )
    print(f"makespan {result['makespan']:g} (lower bound {result['bound']:g})")
    print(f"bubble {simulation.bubble:.2%}, idle {simulation.idle:.2%}")
    print(f"peak kept chunks per rank: {', '.join(map(str, simulation.peak_kept_chunks))}")
    print(f"peak K/V tokens per rank: {', '.join(map(str, simulation.peak_kv_tokens))}")


if __name__ == "__main__":
    main(sys.argv[1:])
