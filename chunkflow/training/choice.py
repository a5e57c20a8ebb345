"""chunk_size and k by prediction: the fastest that fit the budget; and the refusal of plans that do not."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.planning import forecast
from chunkflow.planning.forecast import Forecast, Row, candidates, powers, ranked
from chunkflow.planning.memory import PARTS
from chunkflow.planning.planner import PlanSettings
from chunkflow.planning.step_time import Rates
from chunkflow.settings.config import ConfigError
from chunkflow.settings.options import Config
from chunkflow.training import build, prediction
from chunkflow.training.parallel import Processes, reshards
from chunkflow.training.rates import device_of, rates_of
from chunkflow.training.stages import layers_of_stages

logger = logging.getLogger(__name__)

PIPELINE_RANKS = 8  # at most, of the layouts that are tried


class Forecaster:
    """Forecasts of one step under changed settings.

    `lengths`: of the step's sequences; `ranks`: how many there are; `device`: by its name; `measured`:
    whether the rates are calibrated; `pairs`: whether the step is one of preference training.
    """

    def __init__(
        self,
        config: Config,
        spec: build.ModelSpec,
        lengths: list[int],
        ranks: int,
        device: str,
        rates: Rates,
        measured: bool = False,
        pairs: bool = False,
    ):
        self.pairs = pairs
        self.config, self.spec, self.lengths, self.ranks = config, spec, lengths, ranks
        self.device, self.rates, self.measured = device, rates, measured
        self.budget = prediction.budget_gib(config, device)

    def changed(self, chunk_size: int, k: int, pipeline_ranks: int, reshard: str) -> Config:
        """The config with these settings."""
        config = copy.deepcopy(self.config)
        config.chunkflow.chunk_size, config.chunkflow.k = chunk_size, k
        config.parallelism.pipeline_parallel_degree = pipeline_ranks
        config.parallelism.fsdp_reshard_after_forward = reshard
        return config

    def of(self, config: Config, most: int = forecast.REPLICAS) -> tuple[PlanSettings, Forecast, int]:
        """Settings, forecast of the step, and bytes that CUDA adds on the fullest rank; `most` replicas are
        planned."""
        layers = layers_of_stages(config.parallelism, self.spec.args, self.spec.name)
        spec, replicas = (
            self.spec._replace(layers=layers),
            self.ranks // config.parallelism.pipeline_parallel_degree,
        )
        settings = build.plan_settings(config, spec, replicas, device=self.device, pairs=self.pairs)
        sizes = prediction.stage_sizes(config, spec.family, spec.args, layers, replicas)
        step = forecast.forecast(self.lengths, settings, sizes, self.rates, most)
        fullest = max(range(len(sizes)), key=lambda rank: sum(step.peaks[rank].values()))
        return settings, step, prediction.cuda_of_rank(config, sizes[fullest], replicas)

    def row(self, chunk_size: int, k: int, pipeline_ranks: int, reshard: str) -> Row:
        """What these settings would do."""
        # A pipeline's replicas do not wait for one another; those with the most work tell the time.
        most = 2 if pipeline_ranks > 1 else forecast.REPLICAS
        settings, step, cuda = self.of(self.changed(chunk_size, k, pipeline_ranks, reshard), most)
        gib = max(prediction.total_gib(parts, cuda, self.device) for parts in step.peaks)
        figures = step.figures
        return Row(
            chunk_size,
            k,
            pipeline_ranks,
            settings.lockstep,
            step_seconds=step.seconds,
            tps=figures["tokens"] / step.seconds / self.ranks,
            peak_gib=gib,
            bubble_percent=figures.get("bubble_percent", 0.0),
            imbalance_percent=figures["imbalance_percent"],
            padding_percent=figures["padding_percent"],
            recomputed_percent=figures["recomputed_percent"],
            fits=self.budget is None or gib <= self.budget,
        )

    def rows(self, chunk_size: int | str = "auto", k: int | str = "auto") -> Iterator[Row]:
        """Of all chunk sizes and k, in the config's layout; of those given, if they are numbers."""
        degrees, longest = self.config.parallelism, self.config.training.seq_len
        sizes = powers(forecast.LEAST_CHUNK, min(forecast.MOST_CHUNK, longest))
        layout = degrees.pipeline_parallel_degree, degrees.fsdp_reshard_after_forward
        yield from candidates(
            lambda chunk_size, k: self.row(chunk_size, k, *layout),
            max(self.lengths),
            sizes if chunk_size == "auto" else [chunk_size],
            () if k == "auto" else [k],
        )

    def other_layouts(self, chunk_size: int, k: int) -> Iterator[Row]:
        """Of other pipeline degrees and ways to reshard, with this chunk size or, where it does not fit, with
        half of it."""
        own = layout_of(self)
        for pipeline_ranks in powers(1, min(PIPELINE_RANKS, self.ranks)):
            for reshard in ("never", "always") if pipeline_ranks == 1 else ("never",):
                if (pipeline_ranks, reshard == "always") == own or not self._divides(pipeline_ranks):
                    continue
                for size in (chunk_size, max(1, chunk_size // 2)):
                    try:
                        row = self.row(size, k, pipeline_ranks, reshard)
                    except ValueError:  # the layers do not fit
                        break
                    yield row
                    if row.fits:
                        break

    def _divides(self, pipeline_ranks: int) -> bool:
        replicas = self.ranks // pipeline_ranks
        replicated = self.config.parallelism.data_parallel_replicate_degree
        return self.ranks % pipeline_ranks == 0 and replicas % replicated == 0


def forecaster(
    config: Config, spec: build.ModelSpec, dataset: Any, seed: int, ranks: int, device: str
) -> Forecaster:
    """For the first step of the data, with the longest sequence of all instead of its longest."""
    training = config.training
    names = ("global_batch_size", "seq_len", "overlong", "shuffle", "loss_weighting")
    arguments = {name: getattr(training, name) for name in names}
    loader = ChunkDataLoader(dataset, PlanSettings(None), replica=0, seed=seed, **arguments)
    _, lengths, _, _ = loader.batch_at(0)
    lengths = list(lengths)
    lengths[lengths.index(max(lengths))] = loader.longest
    rates = rates_of(spec.name, spec.args, training.mixed_precision_param, device)
    return Forecaster(config, spec, lengths, ranks, device, *rates, pairs=loader.pairs)


def layout_of(predicted: Forecaster) -> tuple[int, bool]:
    """The config's pipeline degree, and whether it reshards after each forward."""
    degrees = predicted.config.parallelism
    pipeline_ranks = degrees.pipeline_parallel_degree
    return pipeline_ranks, reshards(degrees, predicted.ranks // pipeline_ranks)


def compare(predicted: Forecaster) -> tuple[list[Row], str]:
    """What all settings that are tried would do: the best that fits first, then the others by time, with the
    config's own among them; and why the best is. Puts the best in the place of "auto" in the config. Of
    whole sequences there is no choice."""
    config = predicted.config
    chunkflow, degrees = config.chunkflow, config.parallelism
    if not chunkflow.enable:
        return [], ""
    rows = list(predicted.rows())
    settled = {name: getattr(chunkflow, name) for name in ("chunk_size", "k")}
    if "auto" in settled.values():
        given = [row for row in rows if settled["chunk_size"] in ("auto", row.chunk_size)]
        given = [row for row in given if settled["k"] in ("auto", row.k)] or list(predicted.rows(**settled))
        best = (ranked(given) or sorted(given, key=lambda row: row.peak_gib))[0]
        chunkflow.chunk_size, chunkflow.k = best[:2]
    layout = degrees.pipeline_parallel_degree, degrees.fsdp_reshard_after_forward
    if (chunkflow.chunk_size, chunkflow.k) not in [row[:2] for row in rows]:
        rows.append(predicted.row(chunkflow.chunk_size, chunkflow.k, *layout))
    own = ranked(rows)
    best = own[0] if own else min(rows, key=lambda row: row.peak_gib)
    rows += predicted.other_layouts(best.chunk_size, best.k)
    found = ranked(rows)
    others = sorted((row for row in rows if not row.fits), key=lambda row: row.peak_gib)
    if not found:
        return others, "nothing that was tried fits"
    return [found[0]._replace(best=True), *found[1:], *others], reason(
        found, predicted.budget, layout_of(predicted)
    )


def hint(config: Config, recomputed_percent: float) -> str:
    """What to know about the config's recomputation; "" if nothing."""
    full = config.activation_checkpoint.mode == "full"
    if not full or not config.chunkflow.enable or not recomputed_percent:
        return ""
    return (
        'activation_checkpoint.mode = "full" recomputes what k recomputes already: chunks beyond k take three'
        " forwards"
    )


def table_lines(report: dict, most: int = 6) -> list[str]:
    """The first rows of a report's table, the config's own among them, and why the best is, as text."""
    if not report["table"]:
        return []
    own = report["chunk_size"], report["k"], len(report["memory"]["pipeline_ranks_gib"])
    own = (*own, report["reshard_after_forward"])
    rows = [Row(**row) for row in report["table"]]
    shown = [row for number, row in enumerate(rows) if number < most or row[:4] == own]
    heads = "chunk_size", "k", "pipeline", "ZeRO-3", "s a step", "tokens/s", "GiB", "recomputed %", "bubble %"
    lines = ["", "other settings, with that sequence: the fastest that fit first"]
    lines.append("".join(f"{head:>{len(head) + 3}}" for head in heads))
    for row in shown:
        zero = "yes" if row.fsdp_reshard_after_forward else "no"
        texts = [f"{row.chunk_size:,}", f"{row.k}", f"{row.pipeline_parallel_degree}", zero]
        texts += [f"{row.step_seconds:,.3g}", f"{row.tps:,.0f}", f"{row.peak_gib:,.1f}"]
        texts += [f"{row.recomputed_percent:.1f}", f"{row.bubble_percent:.1f}"]
        line = "".join(f"{text:>{len(head) + 3}}" for text, head in zip(texts, heads))
        marks = ["best"] * row.best + ["this config"] * (row[:4] == own) + ["too large"] * (not row.fits)
        lines.append(line + (f"  <- {', '.join(marks)}" if marks else ""))
    lines += report["why"].split("; ")
    return lines + ([report["hint"]] if report["hint"] else [])


def settle(
    config: Config,
    spec: build.ModelSpec,
    dataset: Any,
    seed: int,
    processes: Processes,
    saved: dict[str, Any],
) -> None:
    """Puts numbers in the place of "auto", the same on all ranks: rank 0's choice, or what the checkpoint
    that is resumed has (`saved`: its value of every key; else empty). ValueError where a step would hold
    more than the budget."""
    answer: list[Any] = [None]
    if processes.rank == 0:
        try:
            answer = [_settled(config, spec, dataset, seed, processes.count, saved)]
        except (OSError, ValueError) as error:
            answer = [error]
    if processes.count > 1 and config.comm.mode != "fake_backend":
        dist.broadcast_object_list(answer, src=0, device=processes.device)
    if isinstance(answer[0], Exception):
        raise answer[0]
    config.chunkflow.chunk_size, config.chunkflow.k = answer[0]


def _settled(
    config: Config, spec: build.ModelSpec, dataset: Any, seed: int, ranks: int, saved: dict[str, Any]
) -> tuple[int, int]:
    chunkflow, device = config.chunkflow, device_of(config, planned=False)
    if not chunkflow.enable:  # whole sequences: neither is read
        chunk_size = 1 if chunkflow.chunk_size == "auto" else chunkflow.chunk_size
        return chunk_size, 1 if chunkflow.k == "auto" else chunkflow.k
    wanted = [name for name in ("chunk_size", "k") if getattr(chunkflow, name) == "auto"]
    if not wanted and prediction.budget_gib(config, device) is None:
        return chunkflow.chunk_size, chunkflow.k
    predicted = forecaster(config, spec, dataset, seed, ranks, device)
    settled = {name: getattr(chunkflow, name) for name in ("chunk_size", "k")}
    if wanted and saved:
        settled |= {name: saved[f"chunkflow.{name}"] for name in wanted}
        logger.info(f"{_shown(**settled)}: as the checkpoint has them")
    elif wanted:
        rows = list(predicted.rows(**settled))
        if found := ranked(rows):
            settled = {"chunk_size": found[0].chunk_size, "k": found[0].k}
            logger.info(reason(found, predicted.budget, layout_of(predicted)))
        else:
            least = min(rows, key=lambda row: row.peak_gib)
            settled = {"chunk_size": least.chunk_size, "k": least.k}
    if predicted.budget is not None:
        refuse(predicted, **settled)
    return settled["chunk_size"], settled["k"]


def _shown(chunk_size: int, k: int) -> str:
    return f"chunkflow.chunk_size = {chunk_size}, chunkflow.k = {k}"


def reason(found: list[Row], budget: float | None, layout: tuple[int, bool]) -> str:
    """Why the first of the `ranked` rows is the best, in words: against the next one. `layout`: the config's
    pipeline degree, and whether it reshards; where one has another, it is named, too."""

    def said(row: Row) -> str:
        of = f" of {budget:g}" if budget is not None else ""
        settings = _shown(row.chunk_size, row.k)
        if any(each[2:4] != layout for each in (best, row)):
            reshard = "always" if row.fsdp_reshard_after_forward else "never"
            settings += (
                f", parallelism.pipeline_parallel_degree = {row.pipeline_parallel_degree},"
                f' fsdp_reshard_after_forward = "{reshard}"'
            )
        return f"{settings} takes {row.step_seconds:.3g} s a step and {row.peak_gib:.3g} GiB{of}"

    best, others = found[0], found[1:]
    return f"fastest by prediction: {said(best)}" + (f"; the next one, {said(others[0])}" if others else "")


def refuse(predicted: Forecaster, chunk_size: int, k: int) -> None:
    """ValueError if the step would hold more than the budget: with its parts, and what would fit."""
    degrees = predicted.config.parallelism
    layout = degrees.pipeline_parallel_degree, degrees.fsdp_reshard_after_forward
    config = predicted.changed(chunk_size, k, *layout)
    _, step, cuda = predicted.of(config)
    parts = max(step.peaks, key=lambda parts: sum(parts.values()))
    gib, device = prediction.total_gib(parts, cuda, predicted.device), predicted.device
    if gib <= predicted.budget:
        return
    named = {PARTS[part]: amount for part, amount in parts.items() if amount}
    if device != "cpu":
        named["CUDA, NCCL, fragmentation"] = prediction.beside(sum(parts.values()), cuda)
    shown = "; ".join(f"{text} {amount / 2**30:.3g}" for text, amount in named.items())
    given = predicted.config.chunkflow.memory_budget_gib is not None
    whose = "chunkflow.memory_budget_gib" if given else "the GPU's memory"
    found = ranked(predicted.rows())
    remedy = (
        "no chunk_size and k would fit: take more ranks, recompute activations (activation_checkpoint.mode ="
        ' "full"), or lower training.seq_len'
    )
    if found:
        best = found[0]
        remedy = f"set {_shown(best.chunk_size, best.k)}, which would take {best.peak_gib:.3g}"
    raise ConfigError(
        f"{_shown(chunk_size, k)}: a step with a sequence of {max(predicted.lengths):,} tokens would take"
        f" {gib:.3g} GiB on the fullest rank ({shown}), more than the {predicted.budget:g} of {whose}:"
        f" {remedy}"
    )
