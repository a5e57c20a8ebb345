"""A checkpoint's tensors, in and out through torch.distributed.checkpoint.

They are named by parameter, the same on every layout: `model.NAME`, `optimizer.NAME.KEY`, and
`random.DEVICE.RANK`, the state of each rank's random generator.
"""

from __future__ import annotations

import pickle
import warnings
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

# What torch pickles in a good `.metadata`: anything of these modules, and these names of the others.
_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.serialization",
)
_OTHER_MODULES = ("torch", "builtins", "collections", "pathlib", "pathlib._local")
_NAMES = (
    "Size device dtype layout _get_layout memory_format set OrderedDict PosixPath PurePosixPath bool uint8"
    " int8 int32 int64 float8_e4m3fn float16 bfloat16 float32 float64"
)


def random_states(rank: int) -> dict[str, torch.Tensor]:
    """The states of this rank's random generators."""
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
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
    """Name -> shape, type and shards of each tensor of a checkpoint."""
    try:
        return _Reader(folder).read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{folder / '.metadata'} cannot be read ({error}): remove {folder} to go on from an earlier one"
        ) from None


@torch.no_grad()
def read(
    folder: Path, saved: dict[str, Any], tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fills the tensors in place, with all ranks of the group (None: this process alone). ValueError with the
    name of one that is not among `saved`, the folder's, or has another shape or type."""
    for name, tensor in tensors.items():
        if name not in saved:
            raise ValueError(
                f"{folder} has no {name}: it is of another model or optimizer, or of another version"
            )
        size, dtype = saved[name].size, saved[name].properties.dtype
        if size != tensor.shape or dtype != tensor.dtype:
            raise ValueError(
                f"{folder}: {name} is {dtype} of shape {tuple(size)}, but the model has {tensor.dtype} of"
                f" {tuple(tensor.shape)}: it is of another model"
            )
    try:
        with warnings.catch_warnings():  # torch warns where there is no process group
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=_Reader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        if "block boundary" in str(error):
            raise ValueError(
                f"{folder}: this number of ranks would cut AdamW8bit's blocks of 256 elements: resume on as"
                " many ranks as before, or half or twice as many"
            ) from None
        raise ValueError(
            f"{folder} cannot be read ({first_failure(error)}): remove it to go on from an earlier one"
        ) from None


def load_model_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills one model, on one process, from a checkpoint folder. ValueError where that is damaged or of
    another model."""
    folder = Path(folder).expanduser()
    check_files(folder, read_manifest(folder)["files"])
    parameters = named_parameters([model])
    read(folder, tensors_in(folder), {f"model.{name}": parameters[name] for name in parameters}, None)


def first_failure(error: BaseException) -> str:
    """What an exception of torch.distributed.checkpoint is about, in words."""
    while isinstance(error, CheckpointException) or error.__cause__:
        failures = getattr(error, "failures", None)
        error = next(iter(failures.values()))[0] if failures else error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".split("\n")[0]
