"""Draws the pictures of concepts.md, schedule.md and spreading.md from plans as they are made for a run.

python docs/draw_concepts.py [FOLDER]
"""

import sys
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.planning.chunks import Group, build_groups, spread_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import Timed, equal_stages, paper_schedule, state_aware_schedule
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import Kind
from chunkflow.planning.simulate import COLOURS, in_given_order, picture, simulate

TOKENS_ONLY = Cost(per_token=1.0, per_pair=0.0)
SEVEN_BILLION = Cost(per_token=1.4e10, per_pair=4.0e5)  # like Qwen2.5-7B
BATCH = synthetic_lengths("lmsys", 32, 4)  # one of 5,331 tokens, half of them below 330
GREYS = ("0.62", "0.8")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pictures")
    pictures = {
        "chunks": partial(draw_chunks, BATCH, 1024),
        "order": partial(draw_order, [4096, 800], 1024, (1, 2)),
        "attention": partial(draw_attention, [19, 3, 1], 8),
        "spreading": partial(draw_spreading, [32768, *synthetic_lengths("lmsys", 63, 0)], 2048, 4),
        # the last, since it sets the size of all letters
        "pipeline": partial(draw_pipeline, [1, 1, 2, 4], 2, 1, 4),
    }
    for name, draw in pictures.items():
        canvas = FigureCanvasAgg(draw())
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(64).save(folder / f"{name}.png", optimize=True)


def figure_of(width: float, height: float, **layout) -> tuple[Figure, list]:
    """A figure of so many inches, and its panels from top to bottom."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    panels = figure.subplots(squeeze=False, **layout).flatten()
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def colour_of(group: Group, number: int, coloured: dict[int, str]) -> str:
    """Of a chunk's segment: greys for sequences that fit into a chunk, a colour for each longer one."""
    segment = group.chunks[0].segments[0].sequence
    if number == 0 and len(group.chunks) > 1:
        return coloured.setdefault(segment, f"C{len(coloured)}")
    return GREYS[number % 2]


def draw_chunks(lengths: list[int], chunk_size: int) -> Figure:
    """Sequences as they come, and the same tokens in chunks."""
    groups = build_groups(lengths, chunk_size)
    figure, (above, below) = figure_of(9, 5.4, nrows=2)
    coloured: dict[int, str] = {}
    place = 0
    for group in groups:
        for chunk in group.chunks:
            bottom = 0
            for number, segment in enumerate(chunk.segments):
                colour = colour_of(group, number, coloured)
                below.bar(place, segment.length, 0.86, bottom, color=colour, edgecolor="white", linewidth=0.6)
                bottom += segment.length
            place += 1
    colours = [coloured.get(index, GREYS[0]) for index in range(len(lengths))]
    above.bar(range(len(lengths)), lengths, 0.86, color=colours)
    above.set(ylabel="tokens", xticks=[], xlabel="a global batch: one bar is one sequence")
    padding = 100 * (1 - sum(lengths) / (place * chunk_size))
    above.set_title(
        f"{len(lengths)} sequences, {sum(lengths):,} tokens, the longest {max(lengths):,}", loc="left"
    )
    below.set_title(f"{place} chunks of {chunk_size:,}: {padding:.1f} % padding", loc="left")
    below.set(
        ylabel="tokens",
        xlabel='one bar is one chunk; "2 of 6": dependent chunks, "alone": a standalone chunk',
    )
    names = []
    for group, places in zip(groups, cut(range(place), [len(group.chunks) for group in groups])):
        many = len(group.chunks) > 1
        names += [f"{n + 1} of {len(places)}" if many else "alone" for n, _ in enumerate(places)]
    below.set_xticks(range(place), names, fontsize=8)
    for panel in (above, below):
        panel.axhline(chunk_size, color="black", linewidth=0.8, linestyle="--")
        panel.text(panel.get_xlim()[1], chunk_size, " chunk_size", va="center", fontsize=8)
    return figure


def cut(places: range, counts: list[int]) -> list[range]:
    ends = list(accumulate(counts))
    return [places[end - count : end] for end, count in zip(ends, counts)]


def draw_order(lengths: list[int], chunk_size: int, values_of_k: tuple[int, ...]) -> Figure:
    """What one process runs in a step, and what it holds meanwhile, for each k."""
    rows = 3 * len(values_of_k)
    figure, panels = figure_of(
        10, 2.5 * len(values_of_k), nrows=rows, sharex=True, height_ratios=[1, 1.5, 1.5] * len(values_of_k)
    )
    for place, k in enumerate(values_of_k):
        settings = PlanSettings(TOKENS_ONLY, chunk_size=chunk_size, k=k)
        plan = plan_step(lengths, settings)
        actions, (lane, live, state) = plan.simulations[0].timeline[0], panels[3 * place : 3 * place + 3]
        draw_lane(lane, actions)
        lane.set_title(
            f"k = {k}: {plan.recomputed_chunks} of {plan.chunks} chunks run forward twice", loc="left"
        )
        times, chunks, keys_values, gradients = zip(*memory_of(actions, plan.groups[0]))
        live.fill_between(times, chunks, step="post", color=COLOURS[Kind.FORWARD], alpha=0.5)
        live.set(ylim=(0, max(values_of_k) + 0.4), yticks=range(max(values_of_k) + 1))
        both = [sum(pair) for pair in zip(keys_values, gradients)]
        state.fill_between(times, both, step="post", color="#d7bde2", label="their gradients")
        state.fill_between(times, keys_values, step="post", color="#a05cb0", label="K/V")
        state.set(ylim=(0, 1.1 * max(both)))
        if k == values_of_k[-1]:  # which has room, since it ends first
            state.legend(loc="upper right", fontsize=8, frameon=False)
        for panel, text in ((live, "chunks with\nactivations"), (state, "K/V state,\ntokens")):
            panel.set_ylabel(text, rotation=0, ha="right", va="center")
        lane.set_xlim(0, max(lane.get_xlim()[1], actions[-1].end) if place else actions[-1].end)
    panels[-1].set_xlabel("time, in forwards of one token")
    legend = [Patch(color=colour, label=kind.name) for kind, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_lane(lane, actions: list[Timed]) -> None:
    for (kind, group, chunk, _), start, end in actions:
        lane.add_patch(Rectangle((start, 0), end - start, 1, facecolor=COLOURS[kind], edgecolor="white"))
        lane.text((start + end) / 2, 0.5, f"{group}.{chunk}", ha="center", va="center", fontsize=8)
    lane.set(ylim=(0, 1), yticks=[])
    lane.spines["left"].set_visible(False)


def memory_of(actions: list[Timed], groups: list[Group]) -> list[tuple[float, int, int, int]]:
    """From each time on: chunks that hold activations, and tokens of long sequences whose K/V, and whose K/V
    gradients, there is room for. A group has one buffer of each: from its first forward, or its first
    backward, to its last backward."""
    held, steps = [0, 0, 0], [(0.0, 0, 0, 0)]

    def change(time: float, what: int, amount: int) -> None:
        held[what] += amount
        steps.append((time, *held))

    for (kind, index, chunk, _), start, end in actions:
        chunks = groups[index].chunks
        long, last = len(chunks) > 1, len(chunks) - 1
        if kind in (Kind.FORWARD, Kind.RECOMPUTE):
            change(start, 0, 1)
        if long and chunk == 0 and kind in (Kind.FORWARD, Kind.FORWARD_STATE):
            change(start, 1, groups[index].tokens)
        if long and chunk == last and kind is Kind.BACKWARD:
            change(start, 2, chunks[last].prefix)
        if kind is Kind.BACKWARD:
            change(end, 0, -1)
            if long and chunk == 0:
                change(end, 1, -groups[index].tokens)
                change(end, 2, -chunks[last].prefix)
    return steps


def draw_attention(lengths: list[int], chunk_size: int) -> Figure:
    """What each token of a group's chunks attends to: a row is a query, a column a key."""
    (group,) = build_groups(lengths, chunk_size)
    figure, (panel,) = figure_of(6.4, 5.4)
    colours = {"prefix": "#f0b357", "itself": "#5b8fd1", "neighbour": "0.7"}
    columns, row = {}, 0  # token of a sequence -> its column
    for index, chunk in enumerate(group.chunks):
        top, name = row, f"chunk {index + 1} of {len(group.chunks)}"
        for number, segment in enumerate(chunk.segments):
            for token in range(segment.start, segment.start + segment.length):
                columns[segment.sequence, token] = row
                for key in range(token + 1):
                    where = "prefix" if key < segment.start else "neighbour" if number else "itself"
                    corner = columns[segment.sequence, key], row
                    panel.add_patch(
                        Rectangle(corner, 1, 1, facecolor=colours[where], edgecolor="white", linewidth=0.4)
                    )
                row += 1
        panel.axhline(row, color="black", linewidth=0.8)
        panel.axvline(row, color="black", linewidth=0.8)
        panel.text(-0.4, (top + row) / 2, name, rotation=90, ha="right", va="center")
    panel.set(xlim=(0, row), ylim=(row, 0), xticks=[], yticks=[], xlabel="keys")
    panel.set_aspect("equal")
    panel.set_title(
        f"a sequence of {lengths[0]} tokens in chunks of {chunk_size},\nand {len(lengths) - 1} short ones"
        " behind its tail",
        loc="left",
        fontsize=10,
    )
    names = {
        "prefix": "the prefix: earlier chunks' K/V",
        "itself": "the chunk itself, causal",
        "neighbour": "a packed neighbour: itself only",
    }
    legend = [Patch(color=colours[key], label=name) for key, name in names.items()]
    panel.legend(handles=legend, loc="upper right", fontsize=9)
    return figure


def draw_pipeline(lengths: list[int], chunk_size: int, k: int, stages: int) -> Figure:
    """The same step on pipeline ranks: whole sequences by 1F1B, chunks by the paper's rule, and by ours."""
    groups = build_groups(lengths, chunk_size)
    systems = {
        "whole sequences, 1F1B": (whole_sequences(lengths), paper_schedule, 1),
        f"chunks of {chunk_size}, the paper's rule, k = {k}": (in_given_order(groups), paper_schedule, k),
        f"chunks of {chunk_size}, ours, k = {k}": (groups, state_aware_schedule, k),
    }
    timelines = {}
    for name, (made, schedule, kept) in systems.items():
        costs = equal_stages([[chunk.tokens for chunk in group.chunks] for group in made], stages)
        tokens = [group.tokens for group in made]
        timelines[name] = simulate(schedule(costs, kept, stages), costs, tokens).timeline
    figure = picture(timelines)
    figure.set_size_inches(16, 10)
    return figure


def draw_spreading(lengths: list[int], chunk_size: int, replicas: int) -> Figure:
    """Each rank's work in a step without and with a shared sequence, and which positions of it a rank has."""
    figure, (alone, shared, parts) = figure_of(10, 5.6, nrows=3, height_ratios=[1, 1, 1.1])
    plans = {}
    for panel, degree, title in (
        (alone, 1, "each sequence on one rank"),
        (shared, replicas, "ranks share the longest"),
    ):
        settings = PlanSettings(SEVEN_BILLION, replicas, chunk_size=chunk_size, spread_over=degree)
        plan = plans[degree] = plan_step(lengths, settings)
        for rank, of_rank in plan.simulations.items():
            for (_, group, *_), start, end in of_rank.timeline[0]:
                made = plan.groups[rank][group]
                long = made.chunks[0].segments[0].sequence == 0
                panel.barh(
                    rank,
                    end - start,
                    0.8,
                    start,
                    color="C0" if long else GREYS[0],
                    edgecolor="white",
                    linewidth=0.3,
                )
        busiest = f"the slowest has {plan.imbalance_percent:.0f} % more than the mean"
        panel.set_title(f"{title}: {busiest}", loc="left", fontsize=10)
        panel.set(ylabel="rank", yticks=range(replicas))
        panel.invert_yaxis()
    end = alone.get_xlim()[1]
    alone.set(xlim=(0, end), xticklabels=[])
    shared.set(xlim=(0, end), xlabel="time; blue: the longest sequence")
    groups = spread_groups(0, lengths[0], chunk_size, range(replicas))
    for rank, group in enumerate(groups):
        for number, chunk in enumerate(group.chunks):
            for segment in chunk.segments:
                parts.barh(
                    rank, segment.length, 0.8, segment.start, color=f"C{number % 10}", edgecolor="white"
                )
    count = len(groups[0].chunks)
    parts.set_title(
        f"its {lengths[0]:,} tokens in {count} chunks (colours), each rank with two parts of each",
        loc="left",
        fontsize=10,
    )
    parts.set(ylabel="rank", yticks=range(replicas), xlim=(0, lengths[0]), xlabel="position in the sequence")
    parts.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
