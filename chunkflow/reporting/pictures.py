"""Plans and measurements as pictures for TensorBoard, which shows them half a page wide or less: letters are
large. Needs matplotlib (extra "pictures")."""

import math
from collections.abc import Sequence

from chunkflow.planning.pipeline_schedule import Timed
from chunkflow.planning.planner import Plan
from chunkflow.planning.schedule import Kind
from chunkflow.planning.simulate import COLOURS, KINDS, new_figure

SHOWN_RANKS = 16
GREYS = "0.62", "0.8"  # of standalone sequences, in turn
COLOUR_COUNT = 10  # of matplotlib's cycle


def lengths_figure(lengths: Sequence[int], chunk_size: int, seq_len: int):
    """A matplotlib figure: how many sequences of the data have about so many tokens, and what share of all
    tokens is in them, against the chunk size. A bar is half a power of two wide."""
    steps = [round(2 * math.log2(length)) for length in lengths]
    least, count = min(steps), max(steps) - min(steps) + 1
    sequences, tokens = [0] * count, [0] * count
    for step, length in zip(steps, lengths):
        sequences[step - least] += 1
        tokens[step - least] += length
    total = sum(lengths)
    long = [length for length in lengths if length > chunk_size]
    figure = new_figure(7, 5.5)
    above, below = figure.subplots(2, sharex=True)
    edges = [2 ** ((least + number - 0.5) / 2) for number in range(count + 1)]
    for panel, values, name in (
        (above, [100 * n / len(lengths) for n in sequences], "% of sequences"),
        (below, [100 * n / total for n in tokens], "% of tokens"),
    ):
        panel.stairs(values, edges, fill=True, color="#5b8fd1")
        panel.axvline(chunk_size, color="black", linewidth=2)
        if seq_len <= max(lengths):
            panel.axvline(seq_len, color="firebrick", linewidth=2, linestyle="--")
        panel.set_ylabel(name)
    above.set_xscale("log", base=2)
    low, high = (math.floor(math.log2(edges[0])), math.ceil(math.log2(edges[-1])))
    ticks = [2**power for power in range(low, high + 1, 1 + (high - low) // 9)]
    above.set_xticks(ticks, [_short(tick) for tick in ticks])
    below.tick_params(axis="x", which="minor", bottom=False)
    below.set_xlabel("tokens of a sequence")
    limit = f"; red, dashed: seq_len, {seq_len:,}" if seq_len <= max(lengths) else ""
    shares = 100 * len(long) / len(lengths), 100 * sum(long) / total
    share = "{:.3g} % are longer than a chunk, with {:.3g} % of the tokens".format(*shares)
    what = f"{len(lengths):,} sequences, {total:,} tokens"
    figure.suptitle(f"{what}\nblack: chunk_size, {chunk_size:,}{limit}\n{share}")
    return figure


def _short(tokens: int) -> str:
    """512, 16K, 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit:
            return f"{tokens // unit}{name}"
    return str(tokens)


def plan_figure(plan: Plan, chunk_size: int, k: int):
    """A matplotlib figure: a panel for each rank, a bar for each chunk, in running order. Its height is
    tokens, the white above it padding. Standalone sequences are grey, each longer one has one colour, on all
    ranks that share it; chunks that are computed again, those before a sequence's last `k`, are hatched."""
    from matplotlib.patches import Patch

    ranks = plan.groups[:SHOWN_RANKS]
    most = max(sum(len(group.chunks) for group in groups) for groups in ranks)
    figure = new_figure(min(24, 7 + most / 20), 2.5 + 1.5 * len(ranks))
    panels = figure.subplots(len(ranks), sharex=True, sharey=True, squeeze=False)[:, 0]
    colours: dict[int, str] = {}  # sequence -> its colour
    for rank, (groups, panel) in enumerate(zip(ranks, panels)):
        bars, chunks = [], 0  # (number of the chunk, bottom, height, colour, hatch) of each segment
        for group in groups:
            for place, chunk in enumerate(group.chunks):
                bottom, again = 0, plan.recomputed_chunks and place < len(group.chunks) - k
                for index, segment in enumerate(chunk.segments):
                    colour = GREYS[index % 2]
                    if group.has_state and (group.spread or not index):
                        colour = f"C{len(colours) % COLOUR_COUNT}"
                        colour = colours.setdefault(segment.sequence, colour)
                    bars.append((chunks, bottom, segment.length, colour, "///" if again else ""))
                    bottom += segment.length
                chunks += 1
        if bars:
            numbers, bottoms, heights, of_bars, hatches = zip(*bars)
            style = {"color": of_bars, "hatch": hatches, "edgecolor": "white", "linewidth": 0}
            panel.bar(numbers, heights, bottom=bottoms, width=0.9, **style)
        panel.axhline(chunk_size, color="black", linewidth=1)
        panel.set_ylabel(f"rank {rank}")
    panels[-1].set_xlabel("chunk, in running order; its height is tokens, the line is chunk_size")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    if most < 2:
        panels[-1].set_xlim(-1, 2)
    legend = [Patch(color=GREYS[0], label="packed whole")]
    if colours:
        legend.append(Patch(color="C0", label=f"{len(colours)} cut or shared, a colour each"))
    if plan.recomputed_chunks:
        legend.append(Patch(facecolor="0.4", hatch="///", edgecolor="white", label="computed again"))
    shown = f" (the first {len(ranks)} of {len(plan.groups)} ranks)" if len(plan.groups) > len(ranks) else ""
    figure.suptitle(f"{plan.tokens:,} tokens in {plan.chunks:,} chunks{shown}")
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    return figure


def memory_figure(timeline: Sequence[Timed], held: Sequence[tuple[int, int]]):
    """A matplotlib figure of what a rank held over a step: in each action of its `timeline` (seconds) at most
    so many chunks with activations, and so many bytes of K/V and their gradients (`held`)."""
    from matplotlib.patches import Patch

    figure = new_figure(7, 6)
    actions, state, live = figure.subplots(3, sharex=True, height_ratios=[1, 4, 3])
    boxes = [(start, end - start) for _, start, end in timeline]
    actions.broken_barh(boxes, (0, 1), facecolors=[COLOURS[action.kind] for action, _, _ in timeline])
    actions.set(yticks=[], xlim=(0, timeline[-1].end), ylabel="runs")
    edges = [0.0, *(end for _, _, end in timeline)]
    chunks, state_bytes = zip(*held)
    unit, name = (2**30, "GiB") if max(state_bytes) >= 2**30 else (2**20, "MiB")
    for panel, values, label in (
        (state, [amount / unit for amount in state_bytes], f"K/V, {name}"),
        (live, chunks, "live chunks"),
    ):
        panel.stairs(values, edges, fill=True, color="#8a6bb8")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
    live.yaxis.get_major_locator().set_params(integer=True)
    live.set_xlabel("seconds since the step began")
    kinds = {action.kind for action, _, _ in timeline}
    patches = [Patch(color=COLOURS[kind], label=KINDS[kind]) for kind in Kind if kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
    title = f"at most {max(state_bytes) / unit:.3g} {name} of K/V and their gradients"
    figure.suptitle(f"{title},\n{max(chunks)} live chunk{'s' * (max(chunks) > 1)}")
    return figure


def plan_text(plan: Plan) -> str:
    """The plan of a step as Markdown: its figures, and a row for each rank."""
    figures = {
        "tokens": f"{plan.tokens:,}",
        "chunks": f"{plan.chunks:,}",
        "padding": f"{plan.padding_percent:.2f} %",
        "computed again": f"{plan.recomputed_chunks:,} chunks",
        "slowest rank over the mean": f"{plan.imbalance_percent:.2f} %",
        "sequences that ranks share": f"{plan.spread_sequences:,}",
        "most ranks of a sequence": f"{plan.most_ranks_of_a_sequence:,}",
    }
    for simulation in list(plan.simulations.values())[:1] if len(plan.programs) else ():
        if len(simulation.timeline) > 1:
            figures["simulated bubble"] = f"{100 * simulation.bubble:.2f} %"
    lines = ["| the step | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items())]
    lines += ["", "| replica | tokens | chunks | longest group, chunks |", "|---|---|---|---|"]
    for rank, groups in enumerate(plan.groups[:SHOWN_RANKS]):
        counts = [len(group.chunks) for group in groups]
        tokens = sum(group.tokens for group in groups)
        lines.append(f"| {rank} | {tokens:,} | {sum(counts):,} | {max(counts, default=0):,} |")
    return "\n".join(lines)


def heat_maps(
    maps: dict[str, Sequence[Sequence[float]]],
    ranges: dict[str, tuple[float | None, float | None]],
    x: str,
    columns: Sequence[str],
    y: str,
    rows: Sequence[str],
):
    """A matplotlib figure: a heat map for each title, its values in rows from top to bottom, each written in
    its cell. `ranges`: for each title the ends of its colours (None: of its values). `x` and `y` name the
    axes, `columns` and `rows` what stands at them."""
    size = 2 + 0.9 * len(columns), (1.6 + 0.5 * len(rows)) * len(maps)
    figure = new_figure(*size)
    for panel, (title, values) in zip(figure.subplots(len(maps), squeeze=False)[:, 0], maps.items()):
        low, high = ranges[title]
        image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
        middle = sum(image.get_clim()) / 2
        for row, of_row in enumerate(values):
            for column, value in enumerate(of_row):
                colour = "white" if value <= middle else "black"
                panel.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(rows)), rows)
        panel.set(title=title, xlabel=x, ylabel=y)
        figure.colorbar(image)
    return figure
