"""Log-probabilities of preference answers by the model that training starts from, computed once and kept.

A file beside the token cache has one float64 for each sequence of a dataset, nan where none was asked for.
Its name is a digest of all that they depend on: the model and where its weights come from, the data, and the
arithmetic.
"""

import copy
import functools
import json
import logging
import time
from array import array
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.hub import tqdm  # the real one where it is installed, else torch's small stand-in

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import cache_folder
from chunkflow.data.digests import content_digest, text_digest
from chunkflow.data.files import write_whole
from chunkflow.execution.runner import Runner
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.settings.keys import flat
from chunkflow.settings.options import Config
from chunkflow.storage import adapters, manifest
from chunkflow.training.parallel import Processes
from chunkflow.training.preference import log_probabilities

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_WRITES = 60  # while they are computed, so that a killed run does not begin anew


class References:
    """Of the pairs that a loader passes in its first `steps` steps. Every rank has one; rank 0 reads and
    writes the file. `plan`: training's. ValueError where the file cannot be written."""

    def __init__(
        self,
        config: Config,
        args: Any,
        loader: ChunkDataLoader,
        plan: PlanSettings,
        steps: int,
        processes: Processes,
    ):
        self.loader, self.processes = copy.copy(loader), processes
        plan = plan._replace(forward_only=True)
        self.loader.make_plan = functools.partial(plan_step, settings=plan, replicas=[processes.replica])
        self.values = torch.full((len(loader.dataset),), torch.nan, dtype=torch.float64)
        if config.comm.mode == "fake_backend":
            self.values.zero_()
        elif processes.rank == 0:
            self.path = cache_folder() / f"references-{identity(config, args, loader)}.bin"
            with suppress(OSError):
                if len(content := self.path.read_bytes()) == self.values.nbytes:
                    self.values = torch.frombuffer(bytearray(content), dtype=torch.float64)
        if config.comm.mode != "fake_backend" and processes.count > 1:
            shared = self.values.to(processes.device)
            dist.broadcast(shared, src=0)
            self.values = shared.cpu()
        self.missing = self._missing(steps)  # cursors of batches

    def of(self, rows: list[int]) -> torch.Tensor:
        """(rows,) float64, on the device."""
        return self.values[rows].to(self.processes.device)

    def _missing(self, steps: int) -> list[int]:
        """Where batches begin that have pairs without a value, which none before has."""
        known, cursors, cursor = self.values.isfinite().tolist(), [], 0
        for _ in range(steps):
            rows, _, _, following = self.loader.batch_at(cursor)
            if not all(known[row] for row in rows):
                cursors.append(cursor)
                for row in rows:
                    known[row] = True
            cursor = following
            if cursor >= self.loader.end or all(known):
                break
        return cursors

    def compute(self, runner: Runner, models: list) -> None:
        """Computes what is missing with the models' present weights. A collective: all ranks call."""
        rank, replica = self.processes.rank, self.processes.replica
        begin = written = time.perf_counter()
        with tqdm(total=len(self.missing), unit="batch", desc="references", disable=rank != 0) as bar:
            for cursor in self.missing:
                data = self.loader.step_at(cursor)
                program = data.plan.programs[replica][self.processes.pipeline_rank]
                self.values[data.rows] = log_probabilities(runner, models, program, data, replica).cpu()
                bar.update(1)
                if rank == 0 and time.perf_counter() - written > SECONDS_BETWEEN_WRITES:
                    self._write()
                    written = time.perf_counter()
        if rank == 0:
            self._write()
            count, seconds = int(self.values.isfinite().sum()), time.perf_counter() - begin
            logger.info(f"Reference log-probabilities of {count // 2:,} pairs, {seconds:.1f} s: {self.path}")
        self.missing = []

    def _write(self) -> None:
        try:
            write_whole(self.path, array("d", self.values.tolist()).tobytes())
        except OSError as error:
            raise ValueError(
                f"{self.path}: reference log-probabilities cannot be written ({error.strerror}): set"
                " CHUNKFLOW_CACHE to a folder with room that this user may write to"
            ) from None


def identity(config: Config, args: Any, loader: ChunkDataLoader) -> str:
    """A digest of all that the log-probabilities depend on."""
    settings, keys = config.checkpoint, flat(config)
    choose = adapters.choose_base if config.lora.rank else manifest.initial_start
    kind, folder = choose(settings, config.model.hf_assets_path)
    weights: Any = loader.seed
    if kind == "checkpoint weights":
        weights = manifest.read_manifest(folder)["files"]
    elif kind == "hf":
        shards = sorted(str(path) for path in folder.glob("*.safetensors"))
        weights = content_digest(shards, cache_folder() / "digests")
    model = manifest.model_identity(keys | {"lora.rank": 0}, args) | {"optimizer.name": ""}
    names = ("training.mixed_precision_param", "training.seq_len", "training.overlong")
    arithmetic = {name: keys[name] for name in names}
    if config.lora.rank:
        arithmetic["lora.base"] = config.lora.base
    known = [1, kind, weights, model, loader.dataset.identity, arithmetic]
    return text_digest(json.dumps(known, sort_keys=True))
