"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of the blocks; all else is frozen.

y = W x + alpha / rank * B A x. A layer's adapter is two linear layers inside it, `lora_a` (rank, in) and
`lora_b` (out, rank), in training.dtype like any trained parameter; a forward hook adds what they give, so that
models know nothing of them, and what computes W x may be anything. Frozen parameters keep their names, are
stored in training.mixed_precision_param, and get neither gradients nor optimizer state.
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from chunkflow.settings import options
from chunkflow.training import parallel
from models.hf_config import hf_name, read_json

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
SUFFIXES = (".lora_a.weight", ".lora_b.weight")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith(SUFFIXES)


def linear_layers(family: ModuleType, args: Any) -> dict[str, list[str]]:
    """Name within a block of each of its linear layers -> every name that lora.target_modules may have for
    it: that, its last part, and Hugging Face's of the same two kinds."""
    with torch.device("meta"):
        block = family.Transformer(dataclasses.replace(args, n_layers=1)).layers["0"]
    names = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            names[name] = [name, name.rpartition(".")[2]]
            try:
                theirs = hf_name(f"layers.0.{name}.weight", family).split(".", 3)[3].removesuffix(".weight")
                names[name] += [theirs, theirs.rpartition(".")[2]]
            except KeyError:  # a family that Hugging Face does not have
                pass
    return names


def target_modules(settings: options.Lora, family: ModuleType, args: Any) -> list[str]:
    """The linear layers of a block that get adapters, by their names within it. ValueError for a name that
    none has."""
    known = linear_layers(family, args)
    chosen = set()
    for wanted in settings.target_modules:
        matching = {name for name, names in known.items() if wanted in names}
        if not matching:
            there = ", ".join(f"{names[1]} ({names[-1]})" for names in known.values())
            raise ValueError(
                f'lora.target_modules has "{wanted}", which is no linear layer of the blocks: choose among'
                f" {there}, or leave it empty for all of them"
            )
        chosen |= matching
    return [name for name in known if name in chosen or not settings.target_modules]


def scale(settings: options.Lora) -> float:
    """What adapters' outputs are multiplied by."""
    return alpha(settings) / settings.rank


def alpha(settings: options.Lora) -> float:
    return 2.0 * settings.rank if settings.alpha is None else settings.alpha


def apply_lora(
    model: nn.Module, settings: options.Lora, family: ModuleType, training: options.Training
) -> None:
    """Freezes a model or a stage of one, and adds adapters, before it is compiled, sharded and filled. With
    lora.rank = 0 does nothing."""
    if not settings.rank:
        return
    model.requires_grad_(False).to(parallel.DTYPES[training.mixed_precision_param])
    for layer in model.layers.values():
        for name in target_modules(settings, family, model.args):
            linear = layer.get_submodule(name)
            like = {"bias": False, "device": linear.weight.device, "dtype": parallel.DTYPES[training.dtype]}
            linear.lora_a = nn.Linear(linear.in_features, settings.rank, **like)
            linear.lora_b = nn.Linear(settings.rank, linear.out_features, **like)
            linear.lora_scale, linear.lora_is_on = scale(settings), True
            linear.register_forward_hook(_add_adapter)
    model.init_parameter = functools.partial(_init_parameter, model.init_parameter)


def _add_adapter(linear: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    if not linear.lora_is_on:
        return y
    return torch.add(y, linear.lora_b(linear.lora_a(*inputs)), alpha=linear.lora_scale)


def _init_parameter(base: Callable, name: str, rows: torch.Tensor, generator: torch.Generator) -> None:
    """As PEFT does: A uniform within 1 / sqrt(in) (Kaiming with a = sqrt(5)), B zero, so that training starts
    from the base model."""
    if name.endswith(SUFFIXES[0]):
        bound = 1 / math.sqrt(rows.size(1))
        rows.uniform_(-bound, bound, generator=generator)
    elif name.endswith(SUFFIXES[1]):
        rows.zero_()
    else:
        base(name, rows, generator)


@contextmanager
def without_adapters(models: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which forwards are the base model's. Without adapters in the models it changes nothing."""
    linears = [module for model in models for module in model.modules() if hasattr(module, "lora_is_on")]
    for linear in linears:
        linear.lora_is_on = False
    try:
        yield
    finally:
        for linear in linears:
            linear.lora_is_on = True
