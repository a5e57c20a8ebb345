"""Hugging Face folders in and out: weights from safetensors into shards and stages, and back.

Nothing in a folder is executed. The package safetensors (extra `hf`) is imported only where weights are read
or written.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.hub import tqdm  # the real one where it is installed, else torch's small stand-in

from models.hf_config import config_json, hf_name, read_json

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_FILE_BYTES = 5 * 10**9
ASSETS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


# ------------------------------------------------------------------------------------------------ weights, in


class Source(NamedTuple):
    file: Path
    tensor: str
    twin: tuple[Path, str] | None = None  # a second copy of tied embeddings, which has to be equal


def weights_folder(config) -> str:
    """The folder that initial weights are read from; "" where they start random.

    checkpoint.initial_load_path (with initial_load_in_hf), else model.hf_assets_path if it has any
    safetensors: who names a model wants it. initial_load_in_hf insists on them. ValueError where the folder
    has weights only in a format that can run code.
    """
    if config.checkpoint.initial_load_path:
        return config.checkpoint.initial_load_path if config.checkpoint.initial_load_in_hf else ""
    folder = config.model.hf_assets_path
    if (
        not folder
        or config.checkpoint.initial_load_in_hf
        or any(Path(folder).expanduser().glob("*.safetensors*"))
    ):
        return folder
    for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5"):
        for file in Path(folder).expanduser().glob(pattern):
            raise ValueError(
                f"{file}: weights are read from safetensors only: save the model as safetensors, or remove"
                " the file"
            )
    logger.info(f"There are no weights in {folder}: parameters start random")
    return ""


def check(config, family: ModuleType, args: Any) -> None:
    """What file names and headers alone can tell about the weights that a run will read and write. Raises
    ValueError."""
    folder = weights_folder(config)
    if folder:
        check_weights(folder, family, args)
    if config.checkpoint.last_save_in_hf:
        _safetensors()


def parameter_shapes(family: ModuleType, args: Any) -> dict[str, torch.Size]:
    """Of the whole model; the head that is the embeddings' weight is not listed again."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in family.Transformer(args).named_parameters()}


def check_weights(folder: str | Path, family: ModuleType, args: Any) -> dict[str, Source]:
    """Where each parameter of the whole model lies. Reads headers only.

    Raises ValueError that names the tensor where one is missing, extra, misshapen, or of a type that is not
    read, and the file where one is missing or truncated.
    """
    folder = Path(folder).expanduser()
    tensors = _tensors(folder)
    sources = {}
    for parameter, shape in parameter_shapes(family, args).items():
        name = hf_name(parameter, family)
        copies = (
            [name, "lm_head.weight"]
            if parameter == "tok_embeddings.weight" and args.tied_embeddings
            else [name]
        )
        copies = [(copy, *tensors.pop(copy)) for copy in copies if copy in tensors]
        if not copies:
            raise ValueError(f"{folder} has no tensor {name}, which its model needs: copy the folder again")
        for copy, file, has, dtype in copies:
            if has != list(shape):
                raise ValueError(
                    f"{file}: {copy} has shape {has}, but the model needs {list(shape)}: its config.json is"
                    " another model's"
                )
            if dtype not in ("F32", "BF16", "F16"):
                raise ValueError(
                    f"{file}: {copy} is of type {dtype}: only bfloat16, float16 and float32 are read, convert"
                    " it"
                )
        places = [(file, copy) for copy, file, _, _ in copies]
        sources[parameter] = Source(*places[0], twin=places[1] if len(places) > 1 else None)
    # Llama's first files carry each layer's rotary frequencies, which follow from config.json.
    extra = sorted(name for name in tensors if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(
            f"{tensors[extra[0]][0]}: {extra[0]}{more} is no tensor of the model: its config.json is another"
            " model's"
        )
    return sources


def _tensors(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """File, shape and type of every tensor in a folder, from the files' headers."""
    safetensors = _safetensors()
    index, listed = folder / "model.safetensors.index.json", {}
    if index.is_file():
        listed = read_json(index, "copy the folder again").get("weight_map")
        plain = isinstance(listed, dict) and all(
            type(name) is str and Path(name).name == name for name in listed.values()
        )
        if not plain:
            raise ValueError(f"{index} has no weight_map of file names: copy it again")
    found = {}
    for file in [folder / name for name in sorted(set(listed.values())) or ["model.safetensors"]]:
        try:
            with safetensors.safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  it is no mapping
                    part = content.get_slice(name)
                    found[name] = file, part.get_shape(), part.get_dtype()
        except OSError:
            remedy = (
                "copy the folder again"
                if listed
                else "name a folder with model.safetensors or model.safetensors.index.json"
            )
            raise ValueError(f"{file} cannot be read: {remedy}") from None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): copy it again") from None
    for name, file in listed.items():
        if name not in found or found[name][0].name != file:
            raise ValueError(
                f"{folder / file} has no tensor {name}, though {index.name} says so: copy the folder again"
            )
    return found


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(
            "Hugging Face weights need the package safetensors: pip install safetensors, or chunkflow[hf]"
        ) from None
    return safetensors


def _rows(parameter: torch.Tensor) -> slice:
    """The rows of a whole parameter that this rank holds: sharded along its first dimension, as torch.chunk
    cuts, or whole."""
    start, stop = 0, parameter.size(0)
    for dimension, placement in enumerate(parameter.placements if isinstance(parameter, DTensor) else ()):
        if placement.is_shard():
            each = -(-(stop - start) // parameter.device_mesh.size(dimension))
            start = min(start + each * parameter.device_mesh.get_local_rank(dimension), stop)
            stop = min(start + each, stop)
    return slice(start, stop)


@torch.no_grad()
def load_weights(model: nn.Module, family: ModuleType, folder: str | Path) -> None:
    """Fills a model, or the stage of one, from a folder. Each rank reads the rows of its own shards, one
    parameter at a time.

    Raises what check_weights does, and ValueError with the name of a tensor that is not finite.
    """
    sources, own = check_weights(folder, family, model.args), []
    for name, parameter in model.named_parameters():
        if name == "output.weight" and model.args.tied_embeddings:  # a last stage's copy
            name = "tok_embeddings.weight"
        own.append((sources[name], parameter))
    own.sort(key=lambda pair: (pair[0].file, pair[0].tensor))
    locals_ = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for _, parameter in own]
    first = not dist.is_initialized() or dist.get_rank() == 0
    logger.info(
        f"Reading weights from {folder}: {sum(local.numel() for local in locals_):,} parameters are this"
        " rank's"
    )
    bar = tqdm(total=len(own), unit="tensor", desc="reading weights", mininterval=1, disable=not first)
    with bar:
        for file, pairs in itertools.groupby(zip(own, locals_), key=lambda pair: pair[0][0].file):
            with _safetensors().safe_open(file, "pt") as tensors:
                for (source, parameter), local in pairs:
                    part = tensors.get_slice(source.tensor)[_rows(parameter)]
                    _check_finite(part, f"{file}: {source.tensor}")
                    if source.twin:
                        _check_equal(part, source, _rows(parameter))
                    local.copy_(part)
                    bar.update(1)


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are not finite: use a folder without them")


def _check_equal(part: torch.Tensor, source: Source, rows: slice) -> None:
    file, tensor = source.twin
    with _safetensors().safe_open(file, "pt") as tensors:
        if not torch.equal(part, tensors.get_slice(tensor)[rows]):
            raise ValueError(
                f"{file}: {tensor} differs from {source.tensor}, but config.json ties them: set"
                " tie_word_embeddings to false, or remove the tensor"
            )


# ----------------------------------------------------------------------------------------------- weights, out


def save_model(
    target: Path, models: Iterable[nn.Module], family: ModuleType, config, device: torch.device
) -> None:
    """Writes a folder that transformers loads, in checkpoint.export_dtype; every rank calls it, with its
    model or its stages.

    Parameters come to rank 0 one at a time, which holds those of one file. config.json and tokenizer are
    model.hf_assets_path's.
    """
    models = list(models)
    args, dtype, source = models[0].args, config.checkpoint.export_dtype, config.model.hf_assets_path
    shapes = parameter_shapes(family, args)
    wholes = gathered_parameters(models, shapes, DTYPES[dtype], device)
    if dist.get_rank() == 0:
        content = config_json(config.model.name, args, dtype, source)
        write_folder(
            target,
            {hf_name(name, family): shape for name, shape in shapes.items()},
            wholes,
            DTYPES[dtype],
            content,
            source,
        )
        logger.info(f"Saved the model in {dtype} as a Hugging Face folder: {target}")
    else:
        for _ in wholes:
            pass
    dist.barrier()


@torch.no_grad()
def gathered_parameters(
    models: Iterable[nn.Module], shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor | None]:
    """The whole parameters of `shapes`, in that order: on the CPU of rank 0, None elsewhere. A collective at
    each step."""
    own = {name: parameter for model in models for name, parameter in model.named_parameters()}
    names_of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(names_of_ranks, list(own))
    first_with = {
        name: rank for rank in reversed(range(len(names_of_ranks))) for name in names_of_ranks[rank]
    }
    rank = dist.get_rank()
    for name, shape in shapes.items():
        whole, owner = None, first_with[name]
        if name in own:
            whole = own[name].to(device, dtype)
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if owner != 0 and rank == owner:
            dist.send(whole, dst=0)
        if owner != 0 and rank == 0:
            whole = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(whole, src=owner)
        yield whole.cpu() if rank == 0 else None


def read_parameters(sources: Iterable[Source]) -> Iterator[torch.Tensor]:
    """The whole tensors of `sources`, one after the other."""
    for source in sources:
        with _safetensors().safe_open(source.file, "pt") as tensors:
            whole = tensors.get_tensor(source.tensor)
        _check_finite(whole, f"{source.file}: {source.tensor}")
        if source.twin:
            _check_equal(whole, source, slice(None))
        yield whole


def write_folder(
    target: Path,
    shapes: dict[str, torch.Size],
    tensors: Iterator[torch.Tensor],
    dtype: torch.dtype,
    config: dict[str, Any],
    assets: str | Path | None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes `tensors` (those of `shapes`, by Hugging Face's names, in that order) as `dtype`, and
    config.json; the tokenizer's files are copied from the folder `assets`. Holds one file's tensors at a
    time.

    The folder appears whole or not at all: it is written under another name, synced and renamed. One that is
    there is replaced. Raises ValueError with the name of a tensor that is not finite, or not so in `dtype`.
    """
    save_file = _safetensors().torch.save_file
    files: list[list[str]] = [[]]
    size, total = 0, 0
    for name, shape in shapes.items():
        size_of_tensor = shape.numel() * dtype.itemsize
        if files[-1] and size + size_of_tensor > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size, total = size + size_of_tensor, total + size_of_tensor

    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weight_map = {}
        with tqdm(total=len(shapes), unit="tensor", desc="writing weights", mininterval=1) as bar:
            for number, names in enumerate(files, 1):
                file = (
                    "model.safetensors"
                    if len(files) == 1
                    else f"model-{number:05}-of-{len(files):05}.safetensors"
                )
                content = {}
                for name in names:
                    content[name] = next(tensors).to(dtype).contiguous()
                    _check_finite(content[name], f"{name}, written as {str(dtype)[6:]},")
                    bar.update(1)
                save_file(content, temporary / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(names, file)
        if len(files) > 1:
            _write_json(
                temporary / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        _write_json(temporary / "config.json", config)
        for name in ASSETS if assets else ():
            if (Path(assets).expanduser() / name).is_file():
                shutil.copyfile(Path(assets).expanduser() / name, temporary / name)
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        before = target.with_name(target.name + ".old")
        if target.exists():
            target.rename(before)
        temporary.rename(target)
        shutil.rmtree(before, ignore_errors=True)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Returns when the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
