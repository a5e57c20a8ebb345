"""Low-rank adapters on disk: PEFT's folders in and out, and the base that a checkpoint's adapters belong to.

A checkpoint of a run with lora.rank > 0 has its adapters and their optimizer state; the base is read again
from where it came from, and compared by a digest, of which the checkpoint has a copy.
"""

import dataclasses
import hashlib
import logging
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from chunkflow.settings import options
from chunkflow.settings.options import Config
from chunkflow.storage import hf_weights as hf
from chunkflow.storage import manifest, tensors
from chunkflow.training import lora, parallel
from models import families
from models.hf_config import hf_name, model_of, read_json

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # Fibonacci hashing's multiplier, as a signed number
AT_ONCE = 1 << 22  # elements of a digest: temporaries of 8 bytes for each


def check(config: Config, family: ModuleType, args: Any) -> None:
    """ValueError if headers show that a run cannot start from its lora.adapter_path."""
    if config.lora.adapter_path:
        check_adapter(family, args, config.lora)


# -------------------------------------------------------------------------------------------- PEFT's folders


def peft_name(parameter: str, family: ModuleType) -> str:
    """PEFT's name of an adapter's parameter in its file."""
    layer, _, part = parameter.removesuffix(".weight").rpartition(".")
    theirs = hf_name(f"{layer}.weight", family).removesuffix(".weight")
    return f"base_model.model.{theirs}.lora_{part[-1].upper()}.weight"


def adapter_shapes(family: ModuleType, args: Any, settings: options.Lora) -> dict[str, torch.Size]:
    """Name -> shape of each adapter's parameter of the whole model."""
    with torch.device("meta"):
        model = family.Transformer(args)
        lora.apply_lora(model, settings, family, options.Training())
    return {name: parameter.shape for name, parameter in model.named_parameters() if lora.is_adapter(name)}


def check_adapter(family: ModuleType, args: Any, settings: options.Lora) -> dict[str, hf.Source]:
    """Where the parameters of the adapter in lora.adapter_path are. Reads headers only. ValueError names a
    tensor that is missing, extra, misshapen or of a type that is not read."""
    folder = Path(settings.adapter_path).expanduser()
    names = {
        peft_name(name, family): (name, shape)
        for name, shape in adapter_shapes(family, args, settings).items()
    }
    found, sources = hf.headers(folder, WEIGHTS), {}
    for theirs, (name, shape) in names.items():
        if theirs not in found:
            raise ValueError(f"{folder / WEIGHTS} has no tensor {theirs}, which adapter_config.json asks for")
        file, size, dtype = found.pop(theirs)
        hf.check_tensor(f"{file}: {theirs}", size, dtype, shape)
        sources[name] = hf.Source(file, theirs)
    if found:
        extra = next(iter(found))
        raise ValueError(f"{folder / WEIGHTS}: {extra} is no adapter of this model: it is another model's")
    return sources


@torch.no_grad()
def load_adapter(model: nn.Module, family: ModuleType, settings: options.Lora) -> None:
    """Fills the adapters of a model, or of a stage of one, from lora.adapter_path."""
    sources, folder = check_adapter(family, model.args, settings), Path(settings.adapter_path).expanduser()
    logger.info(f"Reading adapters of rank {settings.rank} from {folder}")
    if dropout := read_json(folder / lora.ADAPTER_CONFIG, "copy it again").get("lora_dropout"):
        logger.info(f"Their lora_dropout = {dropout} is not used: nothing is dropped here")
    for name, parameter in parallel.named_parameters([model]).items():
        if lora.is_adapter(name):
            rows = parallel.local_rows(parameter)
            parallel.to_local(parameter).copy_(hf.read(sources[name], rows))


def save_adapter(
    target: Path,
    models: Iterable[nn.Module],
    family: ModuleType,
    settings: options.Lora,
    assets: str,
    dtype: str,
    device: torch.device,
    chat_template: str = "",
) -> None:
    """Writes a folder that PEFT loads, with the tokenizer of the folder `assets` if there is one; every rank
    calls it, with its model or its stages."""
    models = list(models)
    args = models[0].args
    shapes = adapter_shapes(family, args, settings)
    wholes = hf.gathered_parameters(models, shapes, hf.DTYPES[dtype], device)
    if dist.get_rank() == 0:
        names = {peft_name(name, family): shape for name, shape in shapes.items()}
        config = adapter_config(family, args, settings, assets)
        one_file = {"config_file": lora.ADAPTER_CONFIG, "stem": WEIGHTS.split(".")[0]}
        one_file["max_file_bytes"] = sys.maxsize  # PEFT reads no index
        hf.write_folder(target, names, wholes, hf.DTYPES[dtype], config, assets, chat_template, **one_file)
        logger.info(f"Saved the adapters in {dtype} as a PEFT folder: {target}")
    for _ in wholes:  # on the other ranks: each parameter is a collective
        pass
    dist.barrier()


def adapter_config(family: ModuleType, args: Any, settings: options.Lora, assets: str) -> dict[str, Any]:
    """PEFT's adapter_config.json. `assets`: the base's folder, or ""."""
    alpha = lora.alpha(settings)
    targets = lora.target_modules(settings, family, args)
    known = lora.linear_layers(family, args)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(assets).expanduser().resolve()) if assets else None,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": [known[name][-1] for name in targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


class Merged(NamedTuple):
    """A model whose adapters were added to its weights. `assets`: the folder that its base came from."""

    name: str
    args: Any
    parameters: dict[str, torch.Tensor]
    assets: str | None


@torch.no_grad()
def merge(source: Path, base: Path | None) -> Merged:
    """The whole model of a checkpoint's adapters, or of a PEFT folder's, in this process: W + alpha / rank *
    B A, in training.dtype. `base`: a Hugging Face folder; None: where the base was, as `source` says.

    ValueError where there is no base, or another one, or `source` has no adapters.
    """
    saved = not (source / lora.ADAPTER_CONFIG).is_file()
    content = manifest.read_manifest(source) if saved else {}
    settings = manifest.adapters_of(content) if saved else lora.read_adapter_config(source)
    if not settings.rank:
        raise ValueError(f"{source} has all parameters, and no adapters to merge: leave out --merge")
    if saved and base is None:
        folder = content["base"]["folder"]
        start = manifest.Start(content["base"]["kind"], Path(folder) if folder else None)
    else:
        known = None if saved else read_json(source / lora.ADAPTER_CONFIG, "")["base_model_name_or_path"]
        if base is None and not known:
            raise ValueError(f"{source} does not say which base it has: name its folder by --base")
        start = manifest.Start("hf", Path(base or known).expanduser())
    if start.folder and not start.folder.is_dir():
        raise ValueError(f"the base {start.folder} of {source} is not a folder: name it by --base")
    name, args = manifest.model_of(content) if saved else model_of(start.folder)
    dtype = content["config"]["training.dtype"] if saved else "float32"
    with torch.device("meta"), parallel.default_dtype(dtype):
        model = families[name].Transformer(args)
        training = options.Training(dtype=dtype, mixed_precision_param=dtype)
        lora.apply_lora(model, settings, families[name], training)
    model.to_empty(device="cpu")
    found = load_base([model], families[name], start, content["base"]["seed"] if saved else 0)
    if saved:
        check_base(content, found, source)
        tensors.load_model_weights(model, source)
    else:
        load_adapter(model, families[name], settings)
    lora.merge_adapters(model)
    parameters = parallel.named_parameters([model]).items()
    whole = {key: parameter.detach() for key, parameter in parameters if not lora.is_adapter(key)}
    return Merged(name, args, whole, str(start.folder) if start.kind == "hf" else None)


# -------------------------------------------------------------------------------------------------- the base


@torch.no_grad()
def base_digest(models: Iterable[nn.Module], group: dist.ProcessGroup | None = None) -> str:
    """Of all frozen parameters, rounded to bfloat16: the same on every layout and for every
    training.mixed_precision_param. With all ranks of the group (None: this process alone).

    It is the sum, modulo 2^64, of each value's bits times a number that follows from the parameter's name and
    the value's place in it.
    """
    total = torch.zeros((), dtype=torch.int64)
    for model in models:
        for name, parameter in parallel.named_parameters([model]).items():
            copy = model.tok_embeddings is None and name == "tok_embeddings.weight"
            if not parameter.requires_grad and not copy and _is_first_replica(parameter):
                total += _digest(name, parallel.to_local(parameter), parallel.local_rows(parameter).start)
    if group is not None:
        dist.all_reduce(total, group=group)
    return f"{total.item() % (1 << 64):016x}"


def _digest(name: str, local: torch.Tensor, first_row: int) -> torch.Tensor:
    seed = hashlib.blake2b(name.encode(), digest_size=7).digest()
    place = first_row * math.prod(local.shape[1:])
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    for values in local.flatten().split(AT_ONCE):
        bits = values.to(torch.bfloat16).view(torch.int16).to(torch.int64)
        places = torch.arange(place, place + len(values), device=local.device)
        total += (bits * (places * ODD + int.from_bytes(seed, "little"))).sum()
        place += len(values)
    return total.cpu()


def _is_first_replica(parameter: torch.Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return True
    mesh = parameter.device_mesh
    ranks = [mesh.get_local_rank(d) for d, kind in enumerate(parameter.placements) if kind.is_replicate()]
    return not any(ranks)


def choose_base(settings: options.Checkpoint, hf_assets_path: str) -> manifest.Start:
    """Where the frozen weights come from: what the run starts from, or if that is a checkpoint that has
    adapters only, the one that they say, or what the run would start from without it."""
    start = manifest.initial_start(settings, hf_assets_path)
    if start.kind != "checkpoint weights":
        return start
    content = manifest.read_manifest(start.folder)
    if not manifest.adapters_of(content).rank:
        return start
    if content["base"]["kind"] == "checkpoint weights":
        return manifest.Start("checkpoint weights", Path(content["base"]["folder"]))
    without = dataclasses.replace(settings, initial_load_path=None)
    return manifest.initial_start(without, hf_assets_path)


def load_base(
    models: Iterable[nn.Module],
    family: ModuleType,
    start: manifest.Start,
    seed: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fills all frozen parameters, with all ranks of the group (None: this process alone). What a manifest
    says of them: where they came from, their digest."""
    models = list(models)
    if start.kind == "checkpoint weights":
        named = parallel.named_parameters(models).items()
        wanted = {f"model.{name}": frozen.detach() for name, frozen in named if not frozen.requires_grad}
        tensors.read(start.folder, tensors.tensors_in(start.folder), wanted, group, converts=True)
    for model in models:
        if start.kind == "hf":
            hf.load_weights(model, family, start.folder)
        elif start.kind == "random":
            parallel.init_weights(model, seed, lambda name: not lora.is_adapter(name))
    folder = str(start.folder.absolute()) if start.folder else None
    return {"kind": start.kind, "folder": folder, "seed": seed, "digest": base_digest(models, group)}


def check_base(content: dict[str, Any], base: dict[str, Any], folder: Path) -> None:
    """ValueError unless the adapters of a checkpoint, whose manifest is `content`, were trained on this
    base."""
    recorded = content["base"]
    if recorded["digest"] != base["digest"]:
        there, here = (each["folder"] or f"debug.seed = {each['seed']}" for each in (recorded, base))
        raise ValueError(
            f"{folder} has adapters of another base (digest {recorded['digest']}, from {there}) than this one"
            f" ({base['digest']}, from {here}): set model.hf_assets_path, or debug.seed, to that base"
        )
