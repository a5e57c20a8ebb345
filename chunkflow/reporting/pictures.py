"""Plans as pictures for TensorBoard. Needs matplotlib (extra "pictures")."""

from chunkflow.planning.planner import Plan

SHOWN_RANKS = 16


def plan_figure(plan: Plan, chunk_size: int):
    """A matplotlib figure: a panel for each rank, a bar for each chunk, in running order. Its height is
    tokens, the white above it padding. Standalone sequences are grey, each longer one has one colour."""
    from matplotlib.figure import Figure

    ranks = plan.groups[:SHOWN_RANKS]
    figure = Figure(figsize=(10, 1.2 + 1.3 * len(ranks)), layout="constrained")
    panels = figure.subplots(len(ranks), sharex=True, squeeze=False)[:, 0]
    long_sequences = 0
    for rank, (groups, panel) in enumerate(zip(ranks, panels)):
        bars, chunks = [], 0  # (number of the chunk, bottom, height, colour) of each segment
        for group in groups:
            dependent = len(group.chunks) > 1
            for chunk in group.chunks:
                bottom = 0
                for index, segment in enumerate(chunk.segments):
                    grey = "0.75" if index % 2 else "0.6"
                    colour = f"C{long_sequences % 10}" if dependent and not index else grey
                    bars.append((chunks, bottom, segment.length, colour))
                    bottom += segment.length
                chunks += 1
            long_sequences += dependent
        if bars:
            numbers, bottoms, heights, colours = zip(*bars)
            panel.bar(numbers, heights, bottom=bottoms, color=colours, width=0.9)
        panel.axhline(chunk_size, color="black", linewidth=0.5)
        panel.set_ylabel(f"rank {rank}\ntokens")
    panels[-1].set_xlabel("chunk, in running order")
    shown = f" (the first {len(ranks)} of {len(plan.groups)} ranks)" if len(plan.groups) > len(ranks) else ""
    figure.suptitle(
        f"{plan.tokens:,} tokens in {plan.chunks:,} chunks{shown}; colours are sequences longer than a chunk"
    )
    return figure
