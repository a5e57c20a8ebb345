"""Checkpoints: saves a run's complete state, and loads it into any number of ranks and stages.

`{dump_folder}/{checkpoint.folder}/step-N/` has torch.distributed.checkpoint's files (each rank's shards,
`.metadata`) and `manifest.json`: what the run is, its progress, and the size and checksum of every other
file. A folder is written as `step-N.saving`, synced, and renamed when it is complete; older ones are removed
only then. The newest checkpoint is the one with the highest step, whatever the files' times.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from chunkflow.settings import options
from chunkflow.settings.faults import collected, refuse
from chunkflow.settings.options import Config
from chunkflow.storage import adapters, files, hf_weights, manifest, tensors
from chunkflow.training import lora, parallel
from chunkflow.training.optimizer import optimizer_tensors
from chunkflow.training.progress import Progress

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # saves that fail in a row before the run stops
SECONDS_BETWEEN_ATTEMPTS = 3  # when no step comes between them
GROUP_TIMEOUT = timedelta(hours=1)  # ranks wait for the slowest to write its files


def check(config: Config, spec) -> None:
    """What the folders that a run starts from and goes on in can tell before any process starts; `spec`: a
    build.ModelSpec. ValueError, one sentence a line."""
    settings, faults = config.checkpoint, {}
    with collected(faults):
        hf_weights.check(settings, config.model.hf_assets_path, spec.family, spec.args)
    with collected(faults):
        adapters.check(config, spec.family, spec.args)
    with collected(faults):
        manifest.check(config, spec.args)
    refuse(faults)


class SaveFailed(Exception):
    """A checkpoint could not be saved; its files are removed, and the run's state is unchanged."""


class Checkpoints:
    """The checkpoints of one run: every rank makes one object, and calls the same methods at the same steps.

    `steps` is training.steps; `config` has the value of every key, for the manifest; `models` are the model,
    or this rank's stages of it.
    """

    def __init__(
        self,
        settings: options.Checkpoint,
        dump_folder: str,
        steps: int,
        config: dict[str, Any],
        models: Iterable[nn.Module],
        optimizer: torch.optim.Optimizer,
        loader,
    ):
        self.settings, self.dump_folder, self.steps, self.config = settings, dump_folder, steps, config
        self.models, self.optimizer, self.loader = list(models), optimizer, loader
        self.folder = manifest.checkpoint_folder(settings, dump_folder)
        self.hf_folder = manifest.hf_folder(settings, dump_folder, steps)
        self.parameters = parallel.named_parameters(self.models)
        self.identity = manifest.model_identity(config, self.models[0].args)
        self.lora, self.base = manifest.lora_settings(config), None
        self.rank = dist.get_rank()
        # a group for checkpoints alone: saves go on beside the training's collectives
        self.group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        # A new thread's device is GPU 0, where the files' writer would make every rank a context of 0.5 GiB.
        device = {}
        if torch.cuda.is_available():
            device = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}
        self.background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", **device)
        self.at_origin = False  # whether the model has the weights that the run starts from at step 1
        self.saving: Future[None] | None = None  # the save in the background
        self.failures = 0  # saves that failed since the last good one

    def load(self, family: ModuleType, hf_assets_path: str, seed: int) -> Progress:
        """Fills the state that a run starts from; returns its progress.

        The state is the run's checkpoint (model, optimizer, loader, random generators); else the weights of
        another checkpoint or of a Hugging Face folder, or weights drawn from the seed. With lora.rank the
        model in it is the adapters alone, and the base comes from one of the other places. ValueError for a
        file that is damaged or does not fit.
        """
        kind, folder = self._on_rank_0(lambda: self._choose_start(hf_assets_path))
        if self.lora.rank:
            kind = self._choose_adapters(kind, folder, self._load_base(family, hf_assets_path, seed))
        if kind == "checkpoint":
            content = manifest.read_manifest(folder)
            excluded = manifest.excluded(self.settings, content)
            if "dataloader" not in excluded:
                manifest.check_data(content, self.loader.identity, folder)
                self.loader.restore(content)
            self._load_tensors(folder, weights_only=not content["complete"] or "optimizer" in excluded)
            return Progress(**content["progress"])
        if not self.at_origin:
            self._load_weights(kind, folder, family, seed)
        return Progress()

    def load_initial(self, family: ModuleType, hf_assets_path: str, seed: int) -> None:
        """Fills the model with the weights that the run started from, or starts from, at step 1; with
        lora.rank the base alone."""
        if self.lora.rank:
            self._load_base(family, hf_assets_path, seed)
            return
        start = self._on_rank_0(lambda: manifest.initial_start(self.settings, hf_assets_path))
        self._load_weights(*start, family, seed)
        self.at_origin = True

    def _load_weights(self, kind: str, folder: Path | None, family: ModuleType, seed: int) -> None:
        if kind == "checkpoint weights":
            self._load_tensors(folder, weights_only=True)
        for model in self.models:
            if kind == "hf":
                hf_weights.load_weights(model, family, folder)
            elif kind == "adapter":
                adapters.load_adapter(model, family, self.lora)
            elif kind == "random":
                parallel.init_weights(model, seed, lambda name: not self.lora.rank or lora.is_adapter(name))

    def _load_base(self, family: ModuleType, hf_assets_path: str, seed: int) -> manifest.Start:
        """Fills the frozen parameters, once, and returns where they come from."""
        start = self._on_rank_0(lambda: adapters.choose_base(self.settings, hf_assets_path))
        if self.base is None:
            if start.kind == "checkpoint weights":
                self._check_files(start.folder)
            self.base = adapters.load_base(self.models, family, start, seed, self.group)
        return start

    def _choose_adapters(self, kind: str, folder: Path | None, base: manifest.Start) -> str:
        """Where the adapters of a run come from that starts from `kind` and `folder`: "checkpoint",
        "checkpoint weights", "adapter" (lora.adapter_path) or "random"."""
        if kind == "checkpoint" or (kind == "checkpoint weights" and folder != base.folder):
            adapters.check_base(manifest.read_manifest(folder), self.base, folder)
            return kind
        return "adapter" if self.lora.adapter_path else "random"

    def _choose_start(self, hf_assets_path: str) -> manifest.Start:
        """Decides what the run starts from. Removes unfinished folders of killed runs, and renames
        checkpoints later than checkpoint.load_step's, which the next start would take for the newest."""
        start = manifest.choose_start(self.settings, self.dump_folder, hf_assets_path)
        if not self.settings.enable:
            return start
        for pattern in ("step-*.saving", "step-*.removing"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        found = manifest.complete_checkpoints(self.folder)
        for step in reversed(found):
            if found[step] == start.folder:
                break
            number = 1
            while (aside := self.folder / f"step-{step}.superseded-{number}").exists():
                number += 1
            found[step].rename(aside)
            logger.info(f"{found[step]} is later than the step to go on from: renamed it to {aside.name}")
        return start

    def _load_tensors(self, folder: Path, weights_only: bool) -> None:
        logger.info(f"Loading the checkpoint from {folder}.")
        begin = time.perf_counter()
        self._check_files(folder)
        saved, random = tensors.tensors_in(folder), {}
        wanted = tensors.trained_parameters(self.models)
        if not weights_only:
            wanted |= optimizer_tensors(self.optimizer, self.parameters)
            states = tensors.random_states(self.rank)  # more ranks than before: the new ones have none
            random = {name: states[name] for name in states if name in saved}
        tensors.read(folder, saved, wanted | random, self.group)
        for name, state in random.items():
            (torch.cuda if name.startswith("random.cuda") else torch).set_rng_state(state)
        logger.info(f"Finished loading the checkpoint in {time.perf_counter() - begin:.2f} seconds.")

    def _check_files(self, folder: Path) -> None:
        """ValueError for a damaged file of a checkpoint. Each rank reads its share."""
        recorded = list(manifest.read_manifest(folder)["files"].items())
        share = dict(recorded[self.rank :: dist.get_world_size()])
        self._gathered(lambda: files.check_files(folder, share))

    @property
    def failed_in_background(self) -> bool:
        """Whether the save in the background has failed on this rank."""
        return self.saving is not None and self.saving.done() and self.saving.exception() is not None

    def export(self, config: Config, spec, device: torch.device) -> None:
        """Writes `hf_folder`: the model for Hugging Face, or its adapters for PEFT. All ranks call; they wait
        while rank 0 writes. `spec`: a build.ModelSpec."""
        dtype = self.settings.export_dtype
        template = spec.tokenizer.chosen_template if spec.tokenizer else ""
        where = self.hf_folder, self.models, spec.family
        if self.lora.rank:
            assets = config.model.hf_assets_path
            adapters.save_adapter(*where, self.lora, assets, dtype, device, template)
        else:
            hf_weights.save_model(*where, config.model, dtype, device, template)

    def after_step(self, progress: Progress, stopping: bool, failed_in_background: bool) -> float:
        """Saves the run every checkpoint.interval steps, at the last step, and after a save that failed.

        Returns the seconds that training waited. A failed save is logged, and tried again after the next
        step, or at once after the last; ValueError after ATTEMPTS failures in a row. `stopping`: this step is
        the last. `failed_in_background`: on any rank.
        """
        if not self.settings.enable:
            return 0.0
        begin = time.perf_counter()
        last = stopping or progress.step == self.steps
        due = last or progress.step % self.settings.interval == 0 or self.failures > 0 or failed_in_background
        if due:
            self._went_well(self._finish_previous)
        while due:
            due = not self._went_well(lambda: self._save(progress, wait=last)) and last
            if due:
                time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        return time.perf_counter() - begin

    def _went_well(self, action: Callable[[], None]) -> bool:
        try:
            action()
            return True
        except SaveFailed as error:
            self.failures += 1
            if self.failures == ATTEMPTS:
                remedy = "make room or restore the folder, and start again"
                raise ValueError(f"{error}; {ATTEMPTS} attempts in a row failed: {remedy}") from None
            attempt = f"attempt {self.failures + 1} of {ATTEMPTS}"
            logger.warning(f"{error}; training goes on, and it is tried again ({attempt})")
            return False

    def _finish_previous(self) -> None:
        """Waits for the save in the background. SaveFailed, on all ranks, if it failed."""
        if self.saving is None:
            return
        error, self.saving = self.saving.exception(), None
        if error:
            known = isinstance(error, SaveFailed)
            raise error if known else SaveFailed(f"the checkpoint could not be saved ({error!r})")
        self.failures = 0

    def _save(self, progress: Progress, wait: bool) -> None:
        logger.info("Saving the checkpoint (or staging if async is enabled).")
        begin, step = time.perf_counter(), progress.step
        if changed := self.loader.dataset.changed_file():
            now = "it goes on with what it read, but cannot be continued with the new file"
            logger.warning(f"{changed} changed since this run read it: {now}")
        complete = not (self.settings.last_save_model_only and step == self.steps)
        state = tensors.trained_parameters(self.models)
        if complete:
            state |= optimizer_tensors(self.optimizer, self.parameters) | tensors.random_states(self.rank)
        content = {
            "format": manifest.FORMAT,
            "progress": vars(progress),
            "complete": complete,
            "torch": torch.__version__,
            "ranks": dist.get_world_size(),
            "config": self.config,
            "model": self.identity,
            "base": self.base,
            "data": self.loader.identity,
            "excluded": self.settings.exclude_from_loading,
            **self.loader.state,
        }
        content = json.loads(json.dumps(content))  # a copy: training goes on during a background save
        if self.settings.async_mode == "disabled":
            self._write(step, state, content)
            self.failures = 0
        else:
            copies = snapshot(state, pinned=self.settings.async_mode == "async_with_pinned_mem")
            self.saving = self.background.submit(self._write, step, copies, content)
            if wait:
                self._finish_previous()
        seconds = f"{time.perf_counter() - begin:.2f} seconds"
        logger.info(f"Finished saving the checkpoint (or staging if async is enabled) in {seconds}.")

    def _write(self, step: int, state: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
        """Writes and syncs the checkpoint of `step`; on failure removes it, SaveFailed on all ranks."""
        target, temporary = self.folder / f"step-{step}", self.folder / f"step-{step}.saving"
        try:
            self._on_rank_0(lambda: files.make_empty(temporary))
            dcp.save(state, storage_writer=tensors.Writer(temporary), process_group=self.group)
            written = list(temporary.glob(f"__{self.rank}_*"))
            if self.rank == 0:
                written.append(temporary / ".metadata")
            checksums = self._gathered(lambda: {path.name: files.checksum(path) for path in written})
            content["files"] = {name: values for rank in checksums for name, values in rank.items()}
            self._on_rank_0(lambda: self._complete(temporary, target, content))
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SaveFailed(f"{target} could not be saved ({tensors.first_failure(error)})") from None

    def _complete(self, temporary: Path, target: Path, content: dict[str, Any]) -> None:
        (temporary / "manifest.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        files.publish(temporary, target)
        if self.settings.keep_latest_k:
            complete = list(manifest.complete_checkpoints(self.folder).values())
            for old in complete[: -self.settings.keep_latest_k]:
                files.remove(old)

    def _gathered(self, function: Callable[[], Any], rank_0_only: bool = False) -> list[Any]:
        """What `function` returns on each rank; an OSError or ValueError of one rank is raised on all."""
        outcomes: list[Any] = [None] * dist.get_world_size()
        try:
            outcome = None if rank_0_only and self.rank else function()
        except (OSError, ValueError) as error:
            outcome = error
        dist.all_gather_object(outcomes, outcome, group=self.group)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def _on_rank_0(self, function: Callable[[], Any]) -> Any:
        return self._gathered(function, rank_0_only=True)[0]


@torch.no_grad()
def snapshot(state: dict[str, torch.Tensor], pinned: bool) -> dict[str, torch.Tensor]:
    """Copies of the tensors, or of this rank's shards, in host memory; each leaves the device once.

    `pinned`: into page-locked memory, at the full speed of the bus; torch keeps it for the next snapshot.
    """
    # A copy that need not block is made into page-locked memory: torch allocates it.
    copies = {name: tensor.to("cpu", non_blocking=pinned, copy=True) for name, tensor in state.items()}
    if pinned:
        torch.cuda.synchronize()
    return copies
