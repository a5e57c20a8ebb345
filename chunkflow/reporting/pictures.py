"""Plans and measurements as pictures for TensorBoard. Needs matplotlib (extra "pictures")."""

from collections.abc import Sequence

from chunkflow.planning.planner import Plan

SHOWN_RANKS = 16


def plan_figure(plan: Plan, chunk_size: int):
    """A matplotlib figure: a panel for each rank, a bar for each chunk, in running order. Its height is
    tokens, the white above it padding. Standalone sequences are grey, each longer one has one colour, on all
    ranks that share it; their parts are hatched."""
    from matplotlib.figure import Figure

    ranks = plan.groups[:SHOWN_RANKS]
    figure = Figure(figsize=(10, 1.2 + 1.3 * len(ranks)), layout="constrained")
    panels = figure.subplots(len(ranks), sharex=True, squeeze=False)[:, 0]
    colours: dict[int, str] = {}  # sequence -> its colour
    for rank, (groups, panel) in enumerate(zip(ranks, panels)):
        bars, chunks = [], 0  # (number of the chunk, bottom, height, colour, hatch) of each segment
        for group in groups:
            coloured = len(group.chunks) > 1 or group.spread is not None
            for chunk in group.chunks:
                bottom = 0
                for index, segment in enumerate(chunk.segments):
                    colour, hatch = "0.75" if index % 2 else "0.6", ""
                    if coloured and (group.spread or not index):
                        colour = colours.setdefault(segment.sequence, f"C{len(colours) % 10}")
                        hatch = "//" if group.spread else ""
                    bars.append((chunks, bottom, segment.length, colour, hatch))
                    bottom += segment.length
                chunks += 1
        if bars:
            numbers, bottoms, heights, of_bars, hatches = zip(*bars)
            style = {"color": of_bars, "hatch": hatches, "edgecolor": "white", "linewidth": 0}
            panel.bar(numbers, heights, bottom=bottoms, width=0.9, **style)
        panel.axhline(chunk_size, color="black", linewidth=0.5)
        panel.set_ylabel(f"rank {rank}\ntokens")
    panels[-1].set_xlabel("chunk, in running order")
    shown = f" (the first {len(ranks)} of {len(plan.groups)} ranks)" if len(plan.groups) > len(ranks) else ""
    hatched = "; hatched ones are shared by ranks" if plan.spread_sequences else ""
    what = f"{plan.tokens:,} tokens in {plan.chunks:,} chunks{shown}"
    figure.suptitle(f"{what}; colours are sequences longer than a chunk{hatched}")
    return figure


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
    from matplotlib.figure import Figure

    size = 2 + 0.9 * len(columns), (1.6 + 0.5 * len(rows)) * len(maps)
    figure = Figure(figsize=size, layout="constrained")
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
