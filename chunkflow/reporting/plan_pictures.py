"""What recipes/plan.py found, as pictures. Needs matplotlib (extra "pictures")."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chunkflow.planning.forecast import LEAST_CHUNK, Row
from chunkflow.planning.lengths import histogram
from chunkflow.planning.memory import PARTS
from chunkflow.planning.step_time import TIMES
from chunkflow.reporting.plan_text import BESIDE


def write_pictures(folder: Path, report: dict, lengths: list[int], config: Any) -> list[Path]:
    """Writes PNG files of the report and of the data's `lengths` into a folder, and the same as TensorBoard's
    events; returns the files. ValueError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("--pictures needs matplotlib: pip install matplotlib, or leave it out") from None
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with SummaryWriter(str(folder)) as writer:
        for name, draw in figures(report, lengths, config):
            figure, path = draw(), folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            writer.add_figure(f"plan/{name}", figure)
            written.append(path)
    return written


def figures(report: dict, lengths: list[int], config: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name for each picture, and what draws it."""
    longest = f"with a sequence of {report['longest_sequence']['longest']:,} tokens"
    yield (
        "seconds",
        lambda: _bars(
            {
                f"mean of {report['steps']} steps": report["seconds_by_part"],
                longest: report["seconds_by_part_longest_sequence"],
            },
            dict(zip(TIMES, TIMES)),
            f"Where a step's time goes, predicted for {report['device']}",
            "seconds",
        ),
    )
    memory = {
        f"fullest of {report['steps']} steps": report["memory"],
        longest: report["memory_longest_sequence"],
    }
    beside = {} if report["device"] == "cpu" else BESIDE
    yield (
        "memory",
        lambda: _bars(
            {
                name: of["parts_gib"] | {part: of[f"{part}_gib"] for part in beside}
                for name, of in memory.items()
            },
            PARTS | beside,
            "What the fullest rank holds at its peak, predicted",
            "GiB",
            limit=report["budget_gib"],
        ),
    )
    rows = [Row(**row) for row in report["table"]]
    own = len(report["stage_layers"]) > 1, report["reshard_after_forward"]
    rows = [row for row in rows if (row.pipeline_parallel_degree > 1, row.fsdp_reshard_after_forward) == own]
    if rows:
        yield "settings", lambda: _settings(rows, report)
    yield "lengths", lambda: _lengths(lengths, config)


def _bars(
    columns: dict[str, dict[str, float]],
    names: dict[str, str],
    title: str,
    unit: str,
    limit: float | None = None,
) -> Any:
    """A stacked bar for each column, on a scale of its own unless there is a limit; parts that are below
    0.3 % in all of them have no name."""
    from matplotlib.figure import Figure

    totals = {column: sum(parts[part] for part in names) for column, parts in columns.items()}
    shown = [part for part in names if any(of[part] > 0.003 * totals[name] for name, of in columns.items())]
    figure = Figure(figsize=(10, 3.2 + 0.22 * len(shown)), layout="constrained")
    panels = figure.subplots(len(columns), sharex=limit is not None)
    colours = [*(f"C{number}" for number in range(10)), "0.45", "0.25", "#a0c8f0", "#f0c8a0"]
    for panel, (column, parts) in zip(panels, columns.items()):
        total, left = totals[column], 0.0
        scale = 1.1 * (total if limit is None else max(*totals.values(), limit))
        for colour, part in zip(colours, shown):
            panel.barh(0, parts[part], left=left, color=colour, edgecolor="white", label=names[part])
            if parts[part] > 0.055 * scale:
                where = left + parts[part] / 2, 0
                panel.text(*where, f"{parts[part]:.3g}", ha="center", va="center", color="white")
            left += parts[part]
        panel.text(total + 0.01 * scale, 0, f"{total:.3g}", va="center")
        if limit is not None:
            panel.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"budget, {limit:.3g}")
        panel.set_xlim(0, scale)
        panel.set_yticks([])
        panel.set_title(column, loc="left", fontsize=10)
    panels[-1].set_xlabel(unit)
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _settings(rows: list[Row], report: dict) -> Any:
    """Seconds a step over chunk sizes and k, of rows with one layout; what does not fit is grey, the best
    framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    sizes, ks = sorted({row.chunk_size for row in rows}), sorted({row.k for row in rows})
    figure = Figure(figsize=(3 + 1.05 * len(sizes), 2 + 0.7 * len(ks)), layout="constrained")
    panel = figure.subplots()
    grid = [[float("nan")] * len(sizes) for _ in ks]
    for row in rows:
        if row.fits:
            grid[ks.index(row.k)][sizes.index(row.chunk_size)] = row.step_seconds
    panel.set_facecolor("0.9")
    image = panel.imshow(grid, aspect="auto", cmap="viridis_r")
    low, high = image.get_clim()
    for row in rows:
        place = sizes.index(row.chunk_size), ks.index(row.k)
        dark = row.fits and row.step_seconds > (low + high) / 2
        text = f"{row.step_seconds:.3g} s\n{row.peak_gib:.3g} GiB" + ("" if row.fits else "\ntoo large")
        panel.text(*place, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
        for wanted, colour, inset in ((row.best, "red", 0.47), (_is_own(row, report), "black", 0.42)):
            if wanted:
                corner = place[0] - inset, place[1] - inset
                frame = Rectangle(corner, 2 * inset, 2 * inset, fill=False, edgecolor=colour, linewidth=2)
                panel.add_patch(frame)
    panel.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    panel.set_yticks(range(len(ks)), ks)
    best = "red: the best; " if any(row.best for row in rows) else ""
    panel.set(title=f"Seconds a step ({best}black: this config)", xlabel="chunk_size, tokens", ylabel="k")
    if any(row.fits for row in rows):
        figure.colorbar(image, label="seconds a step")
    return figure


def _is_own(row: Row, report: dict) -> bool:
    return (row.chunk_size, row.k) == (report["chunk_size"], report["k"])


def _lengths(lengths: list[int], config: Any) -> Any:
    """How many sequences, and how much of all tokens, are of which length."""
    from matplotlib.figure import Figure

    chunk_size = config.chunkflow.chunk_size
    bins = histogram(lengths, LEAST_CHUNK if chunk_size == "auto" else chunk_size)
    names = [f"to {part.end:,}" for part in bins]
    figure = Figure(figsize=(4 + 0.55 * len(bins), 5), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    parts = ([part.rows for part in bins], len(lengths)), ([part.tokens for part in bins], sum(lengths))
    for panel, (counts, total), what in zip(panels, parts, ("sequences", "tokens")):
        shares = [100 * count / total for count in counts]
        inside = [part.end <= chunk_size for part in bins]
        panel.bar(range(len(bins)), shares, color=["0.65" if fits else "C0" for fits in inside])
        for place, share in enumerate(shares):
            if share:
                panel.text(place, share, f"{share:.2g}", ha="center", va="bottom", fontsize=9)
        panel.set_ylim(0, 1.15 * max(shares))
        panel.set_ylabel(f"% of all {what}")
    panels[-1].set_xticks(range(len(bins)), names, rotation=35, ha="right")
    panels[-1].set_xlabel("tokens of a sequence")
    panels[0].set_title(f"{len(lengths):,} sequences; blue ones are longer than a chunk of {chunk_size:,}")
    return figure
