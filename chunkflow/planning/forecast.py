"""What a step will do: figures, seconds and memory of its plan. No torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from chunkflow.planning.host_memory import host_parts
from chunkflow.planning.memory import StageSizes, peak_parts, with_kv_offload
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.step_time import Rates, StepTime

REPLICAS = 8  # that are planned of a step, at most: those with the most work and the longest sequences
LEAST_CHUNK, MOST_CHUNK = 256, 32768  # tokens, of those that are tried
Parts = dict[str, int]  # name of a part of memory -> bytes


def fullest(of_ranks: Iterable[Parts]) -> Parts:
    """Those that are most together."""
    return max(of_ranks, key=lambda parts: sum(parts.values()))


class Forecast(NamedTuple):
    """Of one step."""

    figures: dict[str, float]
    seconds: float
    peaks: list[Parts]  # pipeline rank -> the parts at its peak, on the replica where they are largest
    kv: list[int]  # replica -> bytes of K/V and their gradients at the peak of the rank that has most of them
    hosts: list[Parts]  # pipeline rank -> the parts in host memory at their peak, likewise
    times: dict[str, float]  # part of TIMES -> seconds
    notice: str  # the plan's


def forecast(
    lengths: list[int],
    settings: PlanSettings,
    sizes: Sequence[dict[int, StageSizes]],
    rates: Rates,
    most: int = REPLICAS,
    pinned: bool = True,
) -> Forecast:
    """Of a global batch of sequences with these lengths. `sizes`: each pipeline rank's stages, by number;
    `most`: replicas that are planned, as by `plan_step`; `pinned`: see `host_parts`."""
    made = plan_step(lengths, settings, most=most)
    sizes = with_kv_offload(sizes, made.kv_offload)
    peaks: list[Parts] = [{}] * settings.pipeline_ranks
    hosts: list[Parts] = [{}] * settings.pipeline_ranks
    kv = []
    for replica, programs in made.programs.items():
        of_ranks = []
        for rank, program in enumerate(programs):
            parts = peak_parts(sizes[rank], made.groups[replica], program)
            peaks[rank] = fullest((peaks[rank], parts))
            of_ranks.append(parts["kv"] + parts["kv_gradients"])
            parts = host_parts(sizes[rank], made.groups[replica], program, pinned)
            hosts[rank] = fullest((hosts[rank], parts))
        kv.append(max(of_ranks))
    figures = {
        "sequences": len(lengths),
        "tokens": made.tokens,
        "longest": max(lengths),
        "chunks": made.chunks,
        "padding_percent": made.padding_percent,
        "recomputed_percent": 100 * made.recomputed_chunks / made.chunks,
        "imbalance_percent": made.imbalance_percent,
        "spread_sequences": made.spread_sequences,
        "most_ranks_of_a_sequence": made.most_ranks_of_a_sequence,
    }
    if settings.lockstep:
        figures["template_overhead_percent"] = made.template_overhead_percent
    if settings.pipeline_ranks > 1:
        simulations, planned = made.simulations.values(), len(made.simulations)
        figures["bubble_percent"] = 100 * sum(pipeline.bubble for pipeline in simulations) / planned
        figures["idle_percent"] = 100 * sum(pipeline.idle for pipeline in simulations) / planned
    times = StepTime(settings, sizes, rates).parts(made)
    return Forecast(figures, sum(times.values()), peaks, kv, hosts, times, made.notice)


class Row(NamedTuple):
    """One choice of settings, and what it would do in a step with the longest sequence."""

    chunk_size: int
    k: int
    pipeline_parallel_degree: int
    fsdp_reshard_after_forward: bool
    step_seconds: float
    tps: float  # tokens a second and device
    peak_gib: float  # of the fullest rank, with what CUDA adds
    bubble_percent: float
    imbalance_percent: float
    padding_percent: float
    recomputed_percent: float
    fits: bool
    best: bool = False
    kv_offload: str = "none"


Evaluate = Callable[[int, int], Row]  # of a chunk size and a k


def powers(least: int, most: int) -> list[int]:
    """Powers of two from `least` to `most`; `most` itself if there is none."""
    return [1 << n for n in range(most.bit_length()) if least <= 1 << n <= most] or [most]


def candidates(
    evaluate: Evaluate, longest: int, chunk_sizes: Iterable[int], ks: Sequence[int] = ()
) -> Iterator[Row]:
    """Rows of these chunk sizes, from the largest down, each with the values of `ks` from the least up; those
    that cannot be better are left out. `ks`: none: powers of two.

    More than all chunks of the `longest` sequence are never kept; a larger k only takes more memory than one
    that does not fit, and is not faster than one that was not; and where two sizes in a row are slower than
    the best, smaller ones are, too: they have more chunks, and more of them are computed again.
    """
    best, slower = float("inf"), 0
    for chunk_size in sorted(set(chunk_sizes), reverse=True):
        chunks, fastest = -(-longest // chunk_size), float("inf")
        for k in ks or powers(1, 2 * chunks - 1):
            row = evaluate(chunk_size, k)
            yield row
            if not row.fits:
                break
            if not row.recomputed_percent or row.step_seconds > fastest:
                fastest = min(fastest, row.step_seconds)
                break
            fastest = row.step_seconds
        slower = slower + 1 if best < fastest < float("inf") else 0
        best = min(best, fastest)
        if slower == 2:
            return


def ranked(rows: Iterable[Row]) -> list[Row]:
    """The rows that fit, the fastest first; of equally fast ones that which takes less memory."""
    fitting = [row for row in rows if row.fits]
    return sorted(fitting, key=lambda row: (row.step_seconds, row.peak_gib, row.chunk_size, row.k))
