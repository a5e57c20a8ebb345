"""Reads and writes a checkpoint's tensors with torch.distributed.checkpoint.

Names are the same on every layout: `model.PARAMETER`, `optimizer.PARAMETER.KEY`, and `random.DEVICE.RANK`,
the state of a rank's random generator.
"""

import pickle
import warnings
from collections.abc import Iterable
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from chunkflow.storage.files import check_files
from chunkflow.storage.manifest import read_manifest
from chunkflow.training.parallel import named_parameters

# What torch pickles in a `.metadata`: anything of these modules, and these names of the others.
_DCP = "torch.distributed.checkpoint"
_MODULES = (f"{_DCP}.metadata", f"{_DCP}.filesystem", "torch.serialization")
_OTHER_MODULES = ("torch", "builtins", "collections", "pathlib", "pathlib._local")
_NAMES = (
    "Size device dtype layout _get_layout memory_format set OrderedDict PosixPath PurePosixPath bool uint8"
    " int8 int32 int64 float8_e4m3fn float16 bfloat16 float32 float64"
)


def random_states(rank: int) -> dict[str, torch.Tensor]:
    """The states of this rank's random generators, by name."""
    states = {f"random.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


class Writer(dcp.FileSystemWriter):
    """Raises the disk's error: torch's zip writer, closing a file after a failed write, raises another."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _member(kind: type, name: str) -> Enum:
    """How Python 3.11.0 to 3.11.3 pickle a member of an enumeration: as getattr(kind, name)."""
    if isinstance(kind, EnumMeta):
        return kind[name]
    raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) has no place in it")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module in _MODULES or (module in _OTHER_MODULES and name in _NAMES.split()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata`, which torch pickles, without admitting what could run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def tensors_in(folder: Path) -> dict[str, Any]:
    """Name -> shape, dtype and shards of each tensor of a checkpoint. ValueError if that is damaged."""
    try:
        return _Reader(folder).read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        remedy = f"remove {folder} to go on from an earlier one"
        raise ValueError(f"{folder / '.metadata'} cannot be read ({error}): {remedy}") from None


@torch.no_grad()
def read(
    folder: Path,
    saved: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    converts: bool = False,
) -> None:
    """Fills the tensors in-place, with all ranks of the group (None: this process alone). `saved`: what
    tensors_in returns for the folder. ValueError names a tensor that it lacks or has in another shape or,
    unless `converts`, another dtype."""
    for name, tensor in tensors.items():
        if name not in saved:
            reason = "it is of another model or optimizer, or of another version"
            raise ValueError(f"{folder} has no {name}: {reason}")
        size, dtype = saved[name].size, saved[name].properties.dtype
        if size != tensor.shape or (dtype != tensor.dtype and not converts):
            here = f"but the model has {tensor.dtype} of {tuple(tensor.shape)}: it is of another model"
            raise ValueError(f"{folder}: {name} is {dtype} of shape {tuple(size)}, {here}")
    try:
        with warnings.catch_warnings():  # torch warns where there is no process group
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=_Reader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        if "block boundary" in str(error):
            remedy = "resume on as many ranks as before, or half or twice as many"
            problem = f": this number of ranks would cut AdamW8bit's blocks of 256 elements: {remedy}"
        else:
            problem = f" cannot be read ({first_failure(error)}): remove it to go on from an earlier one"
        raise ValueError(f"{folder}{problem}") from None


def load_model_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills all that is trained of a whole model, in one process, from a checkpoint folder. ValueError if
    that does not fit."""
    folder = Path(folder).expanduser()
    check_files(folder, read_manifest(folder)["files"])
    read(folder, tensors_in(folder), trained_parameters([model]), None)


def trained_parameters(models: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
    """What checkpoints have of a model, or of stages of one, by its name in them."""
    parameters = named_parameters(models).items()
    return {f"model.{name}": parameter.detach() for name, parameter in parameters if parameter.requires_grad}


def first_failure(error: BaseException) -> str:
    """The first cause of an exception of torch.distributed.checkpoint, in words."""
    while isinstance(error, CheckpointException) or error.__cause__:
        failures = getattr(error, "failures", None)
        error = next(iter(failures.values()))[0] if failures else error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".split("\n")[0]
