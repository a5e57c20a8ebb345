"""Hugging Face folders in and out: weights from safetensors into shards and stages, and back.

Nothing in a folder is executed. The package safetensors (extra `hf`) is imported only when it is needed.
"""

import json
import logging
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

from chunkflow.settings import options
from chunkflow.storage import files
from chunkflow.training import parallel
from models.hf_config import config_json, hf_name, read_json

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_FILE_BYTES = 5 * 10**9
_COPY_AGAIN, _OTHER_MODEL = "copy the folder again", "its config.json is another model's"
ASSETS = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json"
    " vocab.json merges.txt chat_template.jinja chat_template.json generation_config.json"
)


class Source(NamedTuple):
    """File and name of the tensor that fills a parameter. `twin`: a second copy, equal to it, of tied
    embeddings."""

    file: Path
    tensor: str
    twin: tuple[Path, str] | None = None


def weights_folder(settings: options.Checkpoint, hf_assets_path: str) -> str:
    """The folder that initial weights are read from; "" where they start random.

    It is checkpoint.initial_load_path (with initial_load_in_hf), else model.hf_assets_path if that has
    safetensors, or with initial_load_in_hf in any case. ValueError where the folder has weights only in a
    format that can run code.
    """
    if settings.initial_load_path:
        return settings.initial_load_path if settings.initial_load_in_hf else ""
    folder = Path(hf_assets_path).expanduser()
    if not hf_assets_path or settings.initial_load_in_hf or any(folder.glob("*.safetensors*")):
        return hf_assets_path
    for file in folder.iterdir():
        if file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"):
            remedy = "save the model as safetensors, or remove the file"
            raise ValueError(f"{file}: weights are read from safetensors only: {remedy}")
    logger.info(f"There are no weights in {hf_assets_path}: parameters start random")
    return ""


def check(settings: options.Checkpoint, hf_assets_path: str, family: ModuleType, args: Any) -> None:
    """ValueError if file names and headers show that a run cannot read its weights, or write its export."""
    if folder := weights_folder(settings, hf_assets_path):
        check_weights(folder, family, args)
    if settings.last_save_in_hf:
        _safetensors()


def parameter_shapes(family: ModuleType, args: Any) -> dict[str, torch.Size]:
    """Name -> shape of each parameter of the whole model. Tied embeddings are listed once."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in family.Transformer(args).named_parameters()}


def check_weights(folder: str | Path, family: ModuleType, args: Any) -> dict[str, Source]:
    """The file and tensor of each parameter of the whole model. Reads headers only.

    ValueError names the tensor if one is missing, extra, misshapen or of a type that is not read, and the
    file if one is missing or truncated.
    """
    folder = Path(folder).expanduser()
    tensors = headers(folder)
    sources = {}
    for parameter, shape in parameter_shapes(family, args).items():
        tied = parameter == "tok_embeddings.weight" and args.tied_embeddings
        names = [hf_name(parameter, family), *(["lm_head.weight"] if tied else [])]
        copies = [(tensors[name][0], name) for name in names if name in tensors]
        for file, name in copies:
            _, size, dtype = tensors.pop(name)
            check_tensor(f"{file}: {name}", size, dtype, shape)
        if not copies:
            raise ValueError(f"{folder} has no tensor {names[0]}, which its model needs: {_COPY_AGAIN}")
        sources[parameter] = Source(*copies[0], *copies[1:])
    # Llama's first files carry each layer's rotary frequencies, which follow from config.json.
    extra = sorted(name for name in tensors if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        file = tensors[extra[0]][0]
        raise ValueError(f"{file}: {extra[0]}{more} is no tensor of the model: {_OTHER_MODEL}")
    return sources


def check_tensor(name: str, size: list[int], dtype: str, shape: torch.Size) -> None:
    """ValueError unless a tensor of a file has this shape, and a type that is read."""
    if size != list(shape):
        raise ValueError(f"{name} has shape {size}, but the model needs {list(shape)}: {_OTHER_MODEL}")
    if dtype not in ("F32", "BF16", "F16"):
        rule = "only bfloat16, float16 and float32 are read, convert it"
        raise ValueError(f"{name} is of type {dtype}: {rule}")


def headers(folder: Path, only: str = "model.safetensors") -> dict[str, tuple[Path, list[int], str]]:
    """File, shape and type of every tensor in a folder, from the headers of the file `only`, or of those in
    its index."""
    safetensors = _safetensors()
    index, listed = folder / f"{only}.index.json", {}
    if index.is_file():
        listed = read_json(index, _COPY_AGAIN).get("weight_map")
        names = listed.values() if isinstance(listed, dict) else [None]
        if not all(type(name) is str and Path(name).name == name for name in names):
            raise ValueError(f"{index} has no weight_map of file names: copy it again")
    missing = _COPY_AGAIN if listed else f"name a folder with {only} or {index.name}"
    found = {}
    for file in [folder / name for name in sorted(set(listed.values())) or [only]]:
        try:
            with safetensors.safe_open(file, "pt") as content:
                keys = content.keys()  # an open file is no mapping: it does not iterate
                for name in keys:
                    part = content.get_slice(name)
                    found[name] = file, part.get_shape(), part.get_dtype()
        except OSError:
            raise ValueError(f"{file} cannot be read: {missing}") from None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): copy it again") from None
    for name, file in listed.items():
        if name not in found or found[name][0].name != file:
            has_not = f"has no tensor {name}, though {index.name} says so"
            raise ValueError(f"{folder / file} {has_not}: {_COPY_AGAIN}")
    return found


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        remedy = "pip install safetensors, or chunkflow[hf]"
        raise ValueError(f"Hugging Face weights need the package safetensors: {remedy}") from None
    return safetensors


@torch.no_grad()
def load_weights(model: nn.Module, family: ModuleType, folder: str | Path) -> None:
    """Fills a model, or a stage of one, from a folder; adapters stay as they are. Each rank reads the rows of
    its shards, one parameter at a time.

    Raises what check_weights does, and ValueError with the name of a tensor that is not finite.
    """
    sources, parameters = check_weights(folder, family, model.args), parallel.named_parameters([model])
    local = {name: parallel.to_local(parameters[name]) for name in parameters if name in sources}
    elements = sum(part.numel() for part in local.values())
    logger.info(f"Reading weights from {folder}: {elements:,} parameters are this rank's")
    quiet = dist.is_initialized() and dist.get_rank() > 0
    with tqdm(total=len(local), unit="tensor", desc="reading weights", mininterval=1, disable=quiet) as bar:
        for name in sorted(local, key=lambda name: sources[name][:2]):  # file by file
            local[name].copy_(read(sources[name], parallel.local_rows(parameters[name])))
            bar.update(1)


def read(source: Source, rows: slice = slice(None)) -> torch.Tensor:
    """These rows of a tensor. ValueError where they are not finite, or the twin's rows differ."""
    safe_open = _safetensors().safe_open
    with safe_open(source.file, "pt") as tensors:
        part = tensors.get_slice(source.tensor)[rows]
    _check_finite(part, f"{source.file}: {source.tensor}")
    if source.twin:
        file, tensor = source.twin
        with safe_open(file, "pt") as tensors:
            equal = torch.equal(part, tensors.get_slice(tensor)[rows])
        if not equal:
            remedy = "set tie_word_embeddings to false, or remove the tensor"
            differs = f"{tensor} differs from {source.tensor}, but config.json ties them"
            raise ValueError(f"{file}: {differs}: {remedy}")
    return part


def _check_finite(tensor: torch.Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are not finite: use a folder without them")


def save_model(
    target: Path,
    models: Iterable[nn.Module],
    family: ModuleType,
    settings: options.Model,
    dtype: str,
    device: torch.device,
    chat_template: str = "",
) -> None:
    """Writes a folder that transformers loads; every rank calls it, with its model or its stages.

    Parameters come to rank 0 one at a time; it holds those of one file. Where model.hf_assets_path is set,
    its config.json and tokenizer are used, with the text `chat_template` as the tokenizer's template unless
    it is "".
    """
    models, assets = list(models), settings.hf_assets_path
    args = models[0].args
    shapes = parameter_shapes(family, args)
    wholes = gathered_parameters(models, shapes, DTYPES[dtype], device)
    if dist.get_rank() == 0:
        config = config_json(settings.name, args, dtype, assets)
        names = {hf_name(name, family): shape for name, shape in shapes.items()}
        write_folder(target, names, wholes, DTYPES[dtype], config, assets, chat_template)
        logger.info(f"Saved the model in {dtype} as a Hugging Face folder: {target}")
    for _ in wholes:  # on the other ranks: each parameter is a collective
        pass
    dist.barrier()


@torch.no_grad()
def gathered_parameters(
    models: Iterable[nn.Module], shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor | None]:
    """The whole parameters of `shapes`, in that order: on the CPU of rank 0, None on other ranks. Each is a
    collective."""
    parameters, rank = parallel.named_parameters(models), dist.get_rank()
    names_of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names_of_ranks, list(parameters))
    for name, shape in shapes.items():
        whole, sender = None, next(rank for rank, names in enumerate(names_of_ranks) if name in names)
        if name in parameters:
            whole = parameters[name].to(device, dtype)
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if rank == 0 != sender:
            whole = torch.empty(shape, dtype=dtype, device=device)
        if sender and rank in (0, sender):
            # A batch goes through the whole group's communicator; NCCL would make one more for a lone pair.
            kind, peer = (dist.irecv, sender) if rank == 0 else (dist.isend, 0)
            for work in dist.batch_isend_irecv([dist.P2POp(kind, whole, peer)]):
                work.wait()
        yield whole.cpu() if rank == 0 else None


def write_folder(
    target: Path,
    shapes: dict[str, torch.Size],
    tensors: Iterator[torch.Tensor],
    dtype: torch.dtype,
    config: dict[str, Any],
    assets: str | Path | None,
    chat_template: str = "",
    max_file_bytes: int = MAX_FILE_BYTES,
    config_file: str = "config.json",
    stem: str = "model",
) -> None:
    """Writes `tensors` (in the order of `shapes`, by Hugging Face's names) as `dtype`, `config`, and the
    tokenizer's files of the folder `assets`, with the text `chat_template` in place of its template unless it
    is "". Holds one file's tensors at a time.

    The folder appears whole or not at all: it is written under another name, synced and renamed. One that
    exists is replaced. ValueError names a tensor with values that are not finite, or not finite in `dtype`.
    """
    save_file = _safetensors().torch.save_file
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    groups, bytes_of_last, weight_map = [[]], 0, {}  # groups: the names of each file
    for name, size in sizes.items():
        if groups[-1] and bytes_of_last + size > max_file_bytes:
            groups.append([])
            bytes_of_last = 0
        groups[-1].append(name)
        bytes_of_last += size
    temporary = target.with_name(target.name + ".tmp")
    try:
        files.make_empty(temporary)
        with tqdm(total=len(shapes), unit="tensor", desc="writing weights", mininterval=1) as bar:
            for number, names in enumerate(groups, 1):
                part = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
                content = {}
                for name in names:
                    content[name] = next(tensors).to(dtype).contiguous()
                    _check_finite(content[name], f"{name}, written as {str(dtype)[6:]},")
                    bar.update(1)
                save_file(content, temporary / f"{stem}{part}.safetensors", metadata={"format": "pt"})
                weight_map |= dict.fromkeys(names, f"{stem}{part}.safetensors")
        if len(groups) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(temporary / f"{stem}.safetensors.index.json", index)
        _write_json(temporary / config_file, config)
        for file in [Path(assets).expanduser() / name for name in ASSETS.split()] if assets else []:
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
        if chat_template:  # which transformers, and servers such as vLLM, prefer to tokenizer_config.json's
            (temporary / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        files.publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
