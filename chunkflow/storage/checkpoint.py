"""Checkpoints: all of a run's state on the disk, whole or not at all, and back into any number of ranks and
stages.

`{dump_folder}/{checkpoint.folder}/step-N/` has torch.distributed.checkpoint's files (each rank's shards,
`.metadata`) and `manifest.json`: what the run is, where it stands, and the size and checksum of every other
file. A folder is written as `step-N.saving`, synced, and renamed when it is complete; older ones go only
then. `step-N` is found by its number: clocks play no part.

Tensors are named by parameter, the same on every layout: `model.NAME`, `optimizer.NAME.KEY`, and
`random.DEVICE.RANK`, the state of each rank's random generator.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import pickle
import re
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from chunkflow.settings.config import Config, ConfigError, flat
from chunkflow.storage import hf_weights as hf
from chunkflow.training import parallel
from chunkflow.training.optimizer import optimizer_tensors
from chunkflow.training.progress import Progress
from models import families

logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised whenever an older manifest or its tensors would be misread
ATTEMPTS = 3  # saves that fail in a row before the run stops
SECONDS_BETWEEN_ATTEMPTS = 3  # where no step lies between them
GROUP_TIMEOUT = timedelta(hours=1)  # ranks wait for the slowest to write its files
_COMPLETE = re.compile(r"step-(\d+)")


# ---------------------------------------------------------------------------------------------------- folders


def checkpoint_folder(config: Config) -> Path:
    return Path(config.job.dump_folder) / config.checkpoint.folder


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint, oldest first."""
    found = {}
    for path in folder.glob("step-*"):
        match = _COMPLETE.fullmatch(path.name)
        if match and (path / "manifest.json").is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def resume_folder(config: Config) -> Path | None:
    """The checkpoint that a run goes on from; None: it starts at step 1. ValueError where
    checkpoint.load_step is not there."""
    if not config.checkpoint.enable:
        return None
    found, wanted = complete_checkpoints(checkpoint_folder(config)), config.checkpoint.load_step
    if wanted == -1:
        return found[max(found)] if found else None
    if wanted not in found:
        there = f"there are steps {', '.join(map(str, found))}" if found else "there is none"
        raise ValueError(
            f"checkpoint.load_step = {wanted}: {checkpoint_folder(config)} has no complete checkpoint of that"
            f" step ({there}): choose another, or -1 for the newest"
        )
    return found[wanted]


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        format = manifest["format"]
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): name a checkpoint folder, such as checkpoint/step-100"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: remove {folder} to go on from an earlier checkpoint") from None
    if format != FORMAT:
        raise ValueError(
            f"{path} has format {format}, but this version reads {FORMAT}: use the version that wrote it"
        )
    return manifest


def finished(config: Config) -> bool:
    """Whether nothing is left to do: the last step is saved, and with checkpoint.last_save_in_hf its Hugging
    Face folder too."""
    folder = resume_folder(config)
    if folder is None or read_manifest(folder)["progress"]["step"] < config.training.steps:
        return False
    return not config.checkpoint.last_save_in_hf or hf_folder(config).exists()


def hf_folder(config: Config) -> Path:
    """Where checkpoint.last_save_in_hf writes the last step."""
    return checkpoint_folder(config) / f"step-{config.training.steps}-hf"


def claim_folder(config: Config, settings: str) -> Any:
    """Makes job.dump_folder and writes the run's `settings` into it, as config.toml; keeps other runs out for
    as long as the returned object lives. ValueError if one is in it."""
    folder = Path(config.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = None if config.comm.mode == "fake_backend" else _lock(folder)
    (folder / "config.toml").write_text(settings)
    return lock


def _lock(folder: Path) -> Any:
    lock = open(folder / ".lock", "w")
    for _attempt in range(20):  # a run that was killed may need a moment to be gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(0.5)
        except OSError as error:
            logger.warning(
                f"{lock.name} cannot be locked ({error.strerror}): take care that only one run writes to this"
                " folder"
            )
            return lock
    raise ValueError(
        f"another run is writing to job.dump_folder = {str(folder)!r}: end it, or name another folder"
    )


# ------------------------------------------------------------------------------------ what a checkpoint is of


def model_identity(config: Config, args: Any) -> dict[str, Any]:
    """What must be the same for tensors to fit and to mean the same, by the key or size that says it."""
    sizes = {f"model {name}": value for name, value in dataclasses.asdict(args).items()}
    named = ("model.name", "model.converters", "training.dtype", "optimizer.name")
    return {name: _setting(config, name) for name in named} | sizes


def model_of(manifest: dict[str, Any]) -> tuple[str, Any]:
    """The family's name and the sizes of the model that a checkpoint is of."""
    sizes = {
        name.removeprefix("model "): value
        for name, value in manifest["model"].items()
        if name.startswith("model ")
    }
    name = manifest["model"]["model.name"]
    return name, families[name].ModelArgs(**sizes)


def _setting(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _excluded(config: Config, manifest: dict[str, Any]) -> set[str]:
    """An exclusion counts once: a checkpoint written under it has been through it, and is loaded whole."""
    return set(config.checkpoint.exclude_from_loading) - set(manifest["excluded"])


def check(config: Config, args: Any) -> None:
    """What the config and the manifests can tell about checkpoints that a run will read. Raises
    ValueError."""
    if config.checkpoint.async_mode == "async_with_pinned_mem" and not torch.cuda.is_available():
        raise ConfigError(
            'checkpoint.async_mode = "async_with_pinned_mem" needs a GPU, whose memory it copies faster: set'
            ' "async"'
        )
    place = checkpoint_folder(config)
    if config.checkpoint.enable and place.exists() and not place.is_dir():
        raise ConfigError(f"checkpoint.folder: {place} is not a folder: remove it, or name another")
    folder, initial = resume_folder(config), None
    if folder is None and config.checkpoint.initial_load_path and not config.checkpoint.initial_load_in_hf:
        initial = folder = Path(config.checkpoint.initial_load_path).expanduser()
        if (folder / "config.json").exists() and not (folder / "manifest.json").exists():
            raise ConfigError(
                f"checkpoint.initial_load_path = {str(folder)!r} is a Hugging Face folder: set"
                " checkpoint.initial_load_in_hf, too"
            )
    if folder is None:
        return
    manifest = read_manifest(folder)
    ours = json.loads(json.dumps(model_identity(config, args)))
    free = {"optimizer.name"} if "optimizer" in _excluded(config, manifest) else set()
    remedy = "set it back, or choose another job.dump_folder to start anew"
    if initial:  # weights alone, whose context may be extended
        free = {
            "optimizer.name",
            "model.converters",
            "model rope_theta",
            "model rope_scaling",
            "model max_positions",
        }
        remedy = "name a checkpoint of this model"
    for name, value in manifest["model"].items():
        if name not in free and ours.get(name) != value:
            raise ValueError(
                f"{folder} is of another model: {name} was {value!r} there and is {ours.get(name)!r} here:"
                f" {remedy}"
            )
    if not initial and not manifest["complete"] and manifest["progress"]["step"] < config.training.steps:
        raise ValueError(
            f"{folder} has the model only (checkpoint.last_save_model_only), so training cannot go on to"
            f" training.steps = {config.training.steps}: start in another job.dump_folder with"
            f" checkpoint.initial_load_path = {str(folder)!r}"
        )


def initial_weights(model: nn.Module, family: ModuleType, config: Config, seed: int) -> None:
    """Fills a model, or a stage of it, unless a checkpoint is about to: from a Hugging Face folder, or at
    random."""
    if resume_folder(config) or (
        config.checkpoint.initial_load_path and not config.checkpoint.initial_load_in_hf
    ):
        return
    if folder := hf.weights_folder(config):
        hf.load_weights(model, family, folder)
    else:
        parallel.init_weights(model, seed)


def _check_data(manifest: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    for name, value in manifest["data"].items():
        if identity.get(name) != value:
            raise ValueError(
                f"{folder} was trained on other data: {name} was {value!r} there and is"
                f" {identity.get(name)!r} here: restore it, or"
                ' set checkpoint.exclude_from_loading = ["dataloader"] to begin this data from its start'
            )


# ---------------------------------------------------------------------------------------------------- tensors


def named_parameters(models: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters of a model or of stages, by the whole model's names. A last stage's copy of tied embeddings
    goes by theirs."""
    named = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if name == "output.weight" and model.args.tied_embeddings:
                name = "tok_embeddings.weight"
            named[name] = parameter
    return named


def _random_states(rank: int) -> dict[str, torch.Tensor]:
    states = {f"random.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


class _Writer(dcp.FileSystemWriter):
    """Says what the disk said: torch's zip writer, closing a file that a write has failed for, raises
    something of its own."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata` without admitting what could run code: torch pickles it, and only these names are in
    a good one."""

    class _Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            modules = (
                "torch.distributed.checkpoint.metadata",
                "torch.distributed.checkpoint.filesystem",
                "torch.serialization",
            )
            plain = ("torch", "builtins", "collections", "pathlib", "pathlib._local")
            names = (
                "Size",
                "device",
                "dtype",
                "float32",
                "float64",
                "bfloat16",
                "float16",
                "uint8",
                "int8",
                "int32",
                "int64",
                "bool",
            )
            names += (
                "float8_e4m3fn",
                "set",
                "OrderedDict",
                "PosixPath",
                "PurePosixPath",
                "_get_layout",
                "layout",
                "memory_format",
            )
            if module in modules or (module in plain and name in names):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = self._Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _tensors_in(folder: Path) -> dict[str, Any]:
    """Name -> what torch.distributed.checkpoint knows about each tensor of a checkpoint."""
    try:
        return _Reader(folder).read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{folder / '.metadata'} cannot be read ({error}): remove {folder} to go on from an earlier one"
        ) from None


def _read(
    folder: Path, there: dict[str, Any], tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fills the tensors in place. ValueError with the name of one that is not `there`, or in another shape or
    type."""
    for name, tensor in tensors.items():
        if name not in there:
            raise ValueError(
                f"{folder} has no {name}: it is of another model or optimizer, or of another version"
            )
        has = there[name]
        if has.size != tensor.shape or has.properties.dtype != tensor.dtype:
            raise ValueError(
                f"{folder}: {name} is {has.properties.dtype} of shape {tuple(has.size)}, but the model has"
                f" {tensor.dtype} of {tuple(tensor.shape)}: it is of another model"
            )
    try:
        with warnings.catch_warnings():  # that there is no process group is meant
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=_Reader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        if "block boundary" in str(error):
            raise ValueError(
                f"{folder}: this number of ranks would cut AdamW8bit's blocks of 256 elements: resume on as"
                " many ranks as before, or half or twice as many"
            ) from None
        raise ValueError(
            f"{folder} cannot be read ({_first_failure(error)}): remove it to go on from an earlier one"
        ) from None


def load_model_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills one model, on one process, from a checkpoint folder. ValueError where that is damaged or of
    another model."""
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    _raise_first(_damaged(folder, name, figures) for name, figures in manifest["files"].items())
    with torch.no_grad():
        tensors = {f"model.{name}": parameter for name, parameter in named_parameters([model]).items()}
        _read(folder, _tensors_in(folder), tensors, None)


# ------------------------------------------------------------------------------------------------------ files


def _checksum(path: Path) -> dict[str, int]:
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}


def _damaged(folder: Path, name: str, figures: dict[str, int]) -> str:
    """What is wrong with a checkpoint's file, as a sentence; "" if nothing."""
    remedy = f"copy it again, or remove {folder} to go on from an earlier checkpoint"
    try:
        now = _checksum(folder / name)
    except OSError as error:
        return f"{folder / name} cannot be read ({error.strerror}): {remedy}"
    if now["bytes"] != figures["bytes"]:
        return (
            f"{folder / name} has {now['bytes']:,} bytes, but was written with {figures['bytes']:,}: {remedy}"
        )
    return (
        ""
        if now == figures
        else f"{folder / name} is damaged, its checksum is another than when it was written: {remedy}"
    )


def _raise_first(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        if sentence:
            raise ValueError(sentence)


def _first_failure(error: BaseException) -> str:
    """What an exception of torch.distributed.checkpoint is about, in words."""
    while isinstance(error, CheckpointException) or error.__cause__:
        error = (
            next(iter(error.failures.values()))[0]
            if isinstance(error, CheckpointException)
            else error.__cause__
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".split("\n")[0]


class SaveFailed(Exception):
    """A save that left nothing behind. What is in memory is as it was."""


# -------------------------------------------------------------------------------------------------- the run's


class Checkpoints:
    """Those of one run: every rank makes one, and calls the same methods at the same steps."""

    def __init__(self, config: Config, models: Iterable[nn.Module], optimizer: torch.optim.Optimizer, loader):
        self.settings, self.excluded = config.checkpoint, config.checkpoint.exclude_from_loading
        self.config, self.optimizer, self.loader = config, optimizer, loader
        self.folder = checkpoint_folder(config)
        self.models = list(models)
        self.parameters = named_parameters(self.models)
        self.identity = model_identity(config, self.models[0].args)
        self.rank = dist.get_rank()
        self.group = dist.new_group(
            backend="gloo", timeout=GROUP_TIMEOUT
        )  # saves go on beside the training's collectives
        self.stager = BlockingAsyncStager(
            cache_staged_state_dict=self.settings.async_mode == "async_with_pinned_mem"
        )
        self.failures = 0  # saves that failed since the last good one
        self._thread: threading.Thread | None = None
        self._thread_error: Exception | None = None

    def load(self) -> Progress:
        """Fills model, optimizer, loader and random generators from the newest checkpoint, or that of
        checkpoint.load_step.

        Returns how far it had come. Where there is none, a run begins, with the weights of
        checkpoint.initial_load_path if it has one. Raises ValueError for what is damaged or does not fit.
        """
        folder = self._on_rank_0(lambda: self._clean(resume_folder(self.config)))
        if folder is None:
            initial = self.settings.initial_load_path
            if initial and not self.settings.initial_load_in_hf:
                self._load_tensors(Path(initial).expanduser(), weights_only=True)
            return Progress()
        manifest = read_manifest(folder)
        excluded = _excluded(self.config, manifest)
        if "dataloader" not in excluded:
            _check_data(manifest, self.loader.identity, folder)
            self.loader.restore(manifest["cursor"], manifest["ledger"])
        self._load_tensors(folder, weights_only=not manifest["complete"] or "optimizer" in excluded)
        return Progress(**manifest["progress"])

    def _load_tensors(self, folder: Path, weights_only: bool) -> None:
        logger.info(f"Loading the checkpoint from {folder}.")
        begin = time.perf_counter()
        files = list(read_manifest(folder)["files"].items())
        own = [_damaged(folder, *file) for file in files[self.rank :: dist.get_world_size()]]
        _raise_first(self._gathered(next(filter(None, own), "")))
        tensors = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        there, random = _tensors_in(folder), {}
        if not weights_only:
            tensors |= optimizer_tensors(self.optimizer, self.parameters)
            random = {name: state for name, state in _random_states(self.rank).items() if name in there}
        with torch.no_grad():
            _read(folder, there, tensors | random, self.group)
        for name, state in random.items():
            (torch.cuda if name.startswith("random.cuda") else torch).set_rng_state(state)
        logger.info(f"Finished loading the checkpoint in {time.perf_counter() - begin:.2f} seconds.")

    # ---- saving

    @property
    def failed_in_background(self) -> bool:
        return self._thread is not None and self._thread_error is not None

    def after_step(self, progress: Progress, stopping: bool, failed_in_background: bool) -> float:
        """Saves the run if its step is due: by checkpoint.interval, as the last one before it ends or stops,
        or since a save failed.

        Returns the seconds that training waited. A save that fails is reported, and tried again after the
        next step, or at once where none comes. After ATTEMPTS in a row ValueError says that the run stops.
        `failed_in_background`: on any rank.
        """
        if not self.settings.enable:
            return 0.0
        begin = time.perf_counter()
        last = stopping or progress.step == self.config.training.steps
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
                raise ValueError(
                    f"{error}; {ATTEMPTS} attempts in a row failed: make room or restore the folder, and"
                    " start again"
                ) from None
            logger.warning(
                f"{error}; training goes on, and it is tried again (attempt {self.failures + 1} of"
                f" {ATTEMPTS})"
            )
            return False

    def _finish_previous(self) -> None:
        """Waits for the save in the background. SaveFailed if it did, which it does on all ranks."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._thread_error = None, self._thread_error, None
        if error:
            raise error
        self.failures = 0

    def _save(self, progress: Progress, wait: bool) -> None:
        logger.info("Saving the checkpoint (or staging if async is enabled).")
        begin, step = time.perf_counter(), progress.step
        if changed := self.loader.dataset.changed_file():
            logger.warning(
                f"{changed} changed since this run read it: it goes on with what it read, but cannot be"
                " continued with the new file"
            )
        complete = not (self.settings.last_save_model_only and step == self.config.training.steps)
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        if complete:
            tensors |= optimizer_tensors(self.optimizer, self.parameters) | _random_states(self.rank)
        manifest = {
            "format": FORMAT,
            "progress": vars(progress),
            "complete": complete,
            "torch": torch.__version__,
            "ranks": dist.get_world_size(),
            "config": flat(self.config),
            "model": self.identity,
            "data": self.loader.identity,
            "excluded": self.excluded,
            "cursor": self.loader.cursor,
            "ledger": vars(self.loader.ledger),
        }
        manifest = json.loads(json.dumps(manifest))  # as it is now: a save in the background is later
        if self.settings.async_mode == "disabled":
            self._write(step, tensors, manifest)
            self.failures = 0
        else:
            staged = self.stager.stage(tensors)
            self._thread = threading.Thread(
                target=self._write_beside, args=(step, staged, manifest), name="checkpoint"
            )
            self._thread.start()
            if wait:
                self._finish_previous()
        seconds = time.perf_counter() - begin
        logger.info(
            f"Finished saving the checkpoint (or staging if async is enabled) in {seconds:.2f} seconds."
        )

    def _write_beside(self, step: int, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        try:
            self._write(step, tensors, manifest)
        except BaseException as error:
            self._thread_error = (
                error
                if isinstance(error, SaveFailed)
                else SaveFailed(f"step {step} could not be saved ({error!r})")
            )

    def _write(self, step: int, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> None:
        """The checkpoint of `step`, whole and on the disk; else SaveFailed, on every rank, and nothing of it
        is left."""
        target = self.folder / f"step-{step}"
        temporary = self.folder / f"step-{step}.saving"
        try:
            self._on_rank_0(lambda: self._make_empty(temporary))
            dcp.save(tensors, storage_writer=_Writer(temporary), process_group=self.group)
            own = sorted(temporary.glob(f"__{self.rank}_*")) + (
                [temporary / ".metadata"] if self.rank == 0 else []
            )
            files = self._gathered(_outcome(lambda: {path.name: _checksum(path) for path in own}))
            self._on_rank_0(lambda: self._complete(temporary, target, manifest, files))
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SaveFailed(f"{target} could not be saved ({_first_failure(error)})") from None

    def _make_empty(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _complete(self, temporary: Path, target: Path, manifest: dict[str, Any], files: list[Any]) -> None:
        for outcome in files:
            if isinstance(outcome, OSError):
                raise outcome
        manifest["files"] = {name: figures for outcome in files for name, figures in outcome.items()}
        path = temporary / "manifest.json"
        path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for written in (path, temporary):
            hf.sync(written)
        if target.exists():  # without a manifest, or this step would not come again: no checkpoint
            _remove(target)
        temporary.rename(target)
        hf.sync(self.folder)
        if self.settings.keep_latest_k:
            for old in list(complete_checkpoints(self.folder).values())[: -self.settings.keep_latest_k]:
                _remove(old)

    def _clean(self, resumed: Path | None) -> Path | None:
        """Before training goes on from `resumed`: what kills left half done goes; later steps (where
        checkpoint.load_step named an earlier one) would else be taken for the newest, and get another
        name."""
        if not self.settings.enable:
            return resumed
        for pattern in ("step-*.saving", "step-*.removing"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        found = complete_checkpoints(self.folder)
        for step in reversed(found):
            if found[step] == resumed:
                break
            number = 1
            while (aside := self.folder / f"step-{step}.superseded-{number}").exists():
                number += 1
            found[step].rename(aside)
            logger.info(f"{found[step]} is later than the step to go on from: renamed it to {aside.name}")
        return resumed

    # ---- agreement of ranks

    def _gathered(self, value: Any) -> list[Any]:
        """Every rank's value."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _on_rank_0(self, function) -> Any:
        """What `function` returns on rank 0, on all ranks; what it raises there, everywhere."""
        outcome = [_outcome(function) if self.rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


def _outcome(function) -> Any:
    """What the function returns, or the OSError or ValueError that it raises, as a value."""
    try:
        return function()
    except (OSError, ValueError) as error:
        return error


def _remove(path: Path) -> None:
    """Removes a folder so that a kill in the middle leaves nothing that looks complete. One that cannot be
    removed stays."""
    gone = path.with_name(path.name + ".removing")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    except OSError as error:
        logger.warning(f"{path} could not be removed ({error.strerror}): remove it by hand")
