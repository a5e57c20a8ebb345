"""chunk_size, k and kv_offload by prediction: the fastest that fit the budget; and the refusal of what does
not."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.planning import forecast
from chunkflow.planning.forecast import Forecast, Row, candidates, powers, ranked
from chunkflow.planning.host_memory import HOST_PARTS
from chunkflow.planning.memory import PARTS
from chunkflow.planning.planner import PlanSettings
from chunkflow.planning.step_time import Rates
from chunkflow.settings.config import ConfigError
from chunkflow.settings.options import Config
from chunkflow.training import build, prediction
from chunkflow.training.parallel import Processes, reshards
from chunkflow.training.rates import device_of, host_gib, rates_of
from chunkflow.training.stages import layers_of_stages

logger = logging.getLogger(__name__)

PIPELINE_RANKS = 8  # at most, of the layouts that are tried
KEYS = ("chunk_size", "k", "kv_offload")  # that may be "auto"
OF_WHOLE = (1, 1, "none")  # their values where sequences are whole, and none is read


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
        self.budget, self.host_budget = prediction.budget_gib(config, device), host_gib(device)
        self.adapts = adapts(config)

    def changed(
        self, chunk_size: int, k: int, pipeline_ranks: int, reshard: str, kv_offload: str = "none"
    ) -> Config:
        """The config with these settings."""
        config = copy.deepcopy(self.config)
        config.chunkflow.chunk_size, config.chunkflow.k = chunk_size, k
        config.chunkflow.kv_offload = kv_offload
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
        settings = settings._replace(room=None)  # what it takes, not what would be done about it
        sizes = prediction.stage_sizes(config, spec.family, spec.args, layers, replicas, self.device)
        pinned = self.device != "cpu"
        step = forecast.forecast(self.lengths, settings, sizes, self.rates, most, pinned)
        fullest = max(range(len(sizes)), key=lambda rank: sum(step.peaks[rank].values()))
        return settings, step, prediction.cuda_of_rank(config, sizes[fullest], replicas)

    def row(self, chunk_size: int, k: int, pipeline_ranks: int, reshard: str) -> Row:
        """What these settings would do; where kv_offload is "auto", with K/V in host memory if they would not
        fit otherwise."""
        if "kv_offload" not in self.adapts:
            return self._row(chunk_size, k, pipeline_ranks, reshard, self.config.chunkflow.kv_offload)
        row = self._row(chunk_size, k, pipeline_ranks, reshard, "none")
        return row if row.fits else self._row(chunk_size, k, pipeline_ranks, reshard, "host")

    def _row(self, chunk_size: int, k: int, pipeline_ranks: int, reshard: str, kv_offload: str) -> Row:
        # A pipeline's replicas do not wait for one another; those with the most work tell the time.
        most = 2 if pipeline_ranks > 1 else forecast.REPLICAS
        config = self.changed(chunk_size, k, pipeline_ranks, reshard, kv_offload)
        settings, step, cuda = self.of(config, most)
        host = max(sum(parts.values()) for parts in step.hosts) / 2**30
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
            fits=(self.budget is None or gib <= self.budget)
            and (self.host_budget is None or host <= self.host_budget),
            kv_offload=kv_offload,
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
        for name, value in zip(KEYS, OF_WHOLE):
            if getattr(chunkflow, name) == "auto":
                setattr(chunkflow, name, value)
        return [], ""
    rows = list(predicted.rows())
    settled = {name: getattr(chunkflow, name) for name in ("chunk_size", "k")}
    if "auto" in (*settled.values(), chunkflow.kv_offload):
        given = [row for row in rows if settled["chunk_size"] in ("auto", row.chunk_size)]
        given = [row for row in given if settled["k"] in ("auto", row.k)] or list(predicted.rows(**settled))
        best = (ranked(given) or sorted(given, key=lambda row: row.peak_gib))[0]
        chunkflow.chunk_size, chunkflow.k, chunkflow.kv_offload = *best[:2], best.kv_offload
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


def adapts(config: Config) -> frozenset[str]:
    """The keys that a single step may have its own value of, while they are "auto"."""
    return frozenset(name for name in ("k", "kv_offload") if getattr(config.chunkflow, name) == "auto")


def settle(
    config: Config,
    spec: build.ModelSpec,
    dataset: Any,
    seed: int,
    processes: Processes,
    saved: dict[str, Any],
) -> frozenset[str]:
    """Puts values in the place of "auto", the same on all ranks: rank 0's choice, or what the checkpoint that
    is resumed has (`saved`: its value of every key; else empty). Returns the keys that a single step may have
    its own value of. ValueError where a step would hold more than the budget."""
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
    adapted = adapts(config)
    for name in KEYS:
        setattr(config.chunkflow, name, answer[0][name])
    return adapted


def _settled(
    config: Config, spec: build.ModelSpec, dataset: Any, seed: int, ranks: int, saved: dict[str, Any]
) -> dict[str, Any]:
    """The value of each of KEYS."""
    chunkflow, device = config.chunkflow, device_of(config, planned=False)
    settled = {name: getattr(chunkflow, name) for name in KEYS}
    wanted = [name for name in KEYS if settled[name] == "auto"]
    if not chunkflow.enable:  # whole sequences: none is read
        return settled | {name: value for name, value in zip(KEYS, OF_WHOLE) if name in wanted}
    if not wanted and prediction.budget_gib(config, device) is None and not _uses_host(config):
        return settled
    predicted = forecaster(config, spec, dataset, seed, ranks, device)
    if wanted and saved:
        settled |= {name: saved[f"chunkflow.{name}"] for name in wanted}
        logger.info(f"{_shown(**settled)}: as the checkpoint has them")
    elif wanted:
        rows = list(predicted.rows(settled["chunk_size"], settled["k"]))
        found = ranked(rows)
        best = found[0] if found else min(rows, key=lambda row: row.peak_gib)
        settled = {name: getattr(best, name) for name in KEYS}
        if found:
            logger.info(reason(found, predicted.budget, layout_of(predicted)))
    refuse(predicted, **settled)
    return settled


def _uses_host(config: Config) -> bool:
    """Whether something that training makes lives in host memory."""
    return config.training.enable_cpu_offload or "host" in (
        config.chunkflow.kv_offload,
        config.chunkflow.keep_attention,
    )


def _shown(chunk_size: int, k: int, kv_offload: str = "none") -> str:
    shown = f"chunkflow.chunk_size = {chunk_size}, chunkflow.k = {k}"
    return shown if kv_offload == "none" else f'{shown}, chunkflow.kv_offload = "{kv_offload}"'


def reason(found: list[Row], budget: float | None, layout: tuple[int, bool]) -> str:
    """Why the first of the `ranked` rows is the best, in words: against the next one. `layout`: the config's
    pipeline degree, and whether it reshards; where one has another, it is named, too."""

    def said(row: Row) -> str:
        of = f" of {budget:g}" if budget is not None else ""
        settings = _shown(row.chunk_size, row.k, row.kv_offload)
        if any(each[2:4] != layout for each in (best, row)):
            reshard = "always" if row.fsdp_reshard_after_forward else "never"
            settings += (
                f", parallelism.pipeline_parallel_degree = {row.pipeline_parallel_degree},"
                f' fsdp_reshard_after_forward = "{reshard}"'
            )
        return f"{settings} takes {row.step_seconds:.3g} s a step and {row.peak_gib:.3g} GiB{of}"

    best, others = found[0], found[1:]
    return f"fastest by prediction: {said(best)}" + (f"; the next one, {said(others[0])}" if others else "")


def refuse(predicted: Forecaster, chunk_size: int, k: int, kv_offload: str = "none") -> None:
    """ValueError if the step would hold more than the budget, or than there is host memory: with its parts,
    and what would fit."""
    degrees = predicted.config.parallelism
    layout = degrees.pipeline_parallel_degree, degrees.fsdp_reshard_after_forward
    config = predicted.changed(chunk_size, k, *layout, kv_offload)
    _, step, cuda = predicted.of(config)
    parts = forecast.fullest(step.peaks)
    gib, device = prediction.total_gib(parts, cuda, predicted.device), predicted.device
    host = forecast.fullest(step.hosts)
    host_total = sum(host.values()) / 2**30
    if predicted.budget is not None and gib > predicted.budget:
        named = {PARTS[part]: amount for part, amount in parts.items() if amount}
        if device != "cpu":
            named["CUDA, NCCL, fragmentation"] = prediction.beside(sum(parts.values()), cuda)
        given = predicted.config.chunkflow.memory_budget_gib is not None
        whose = "chunkflow.memory_budget_gib" if given else "the GPU's memory"
        taken, limit = f"{gib:.3g} GiB on the fullest rank", f"{predicted.budget:g} of {whose}"
        last = (
            'recompute activations (activation_checkpoint.mode = "full"), or lower training.seq_len'
            if kv_offload == "host" or predicted.adapts
            else 'recompute activations (activation_checkpoint.mode = "full"), keep K/V in host memory'
            ' (chunkflow.kv_offload = "host"), or lower training.seq_len'
        )
    elif predicted.host_budget is not None and host_total > predicted.host_budget:
        named = {HOST_PARTS[part]: amount for part, amount in host.items() if amount}
        taken = f"{host_total:.3g} GiB of host memory on the fullest rank"
        limit = f"{predicted.host_budget:.3g} that each of this machine's processes has"
        last = "keep less there (chunkflow.kv_offload, keep_attention), or lower training.seq_len"
    else:
        return
    shown = "; ".join(f"{text} {amount / 2**30:.3g}" for text, amount in named.items())
    remedy = f"no chunk_size and k would fit: take more ranks, {last}"
    if found := ranked(predicted.rows()):
        best = found[0]
        settings = _shown(best.chunk_size, best.k, best.kv_offload)
        remedy = f"set {settings}, which would take {best.peak_gib:.3g}"
    raise ConfigError(
        f"{_shown(chunk_size, k, kv_offload)}: a step with a sequence of {max(predicted.lengths):,} tokens"
        f" would take {taken} ({shown}), more than the {limit}: {remedy}"
    )
