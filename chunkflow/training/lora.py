"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of the blocks; all else is frozen.

y = W x + alpha / rank * B A x. A layer's adapter is two linear layers inside it, `lora_a` (rank, in) and
`lora_b` (out, rank), in training.dtype like any trained parameter; a forward hook adds what they give, so
that models know nothing of them, and what computes W x may be anything. Frozen parameters keep their names,
are stored in training.mixed_precision_param, and get neither gradients nor optimizer state.
"""

import dataclasses
import functools
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

ADAPTER_CONFIG = "adapter_config.json"
SUFFIXES = (".lora_a.weight", ".lora_b.weight")
# key of adapter_config.json -> the values that are admitted (None: missing, too), what another asks for
_FIXED = {
    "peft_type": (("LORA",), "another kind of adapter"),
    "use_dora": ((None, False), "DoRA"),
    "use_rslora": ((None, False), "rank-stabilised scaling (rsLoRA)"),
    "rank_pattern": ((None, {}), "ranks that differ between layers"),
    "alpha_pattern": ((None, {}), "scales that differ between layers"),
    "modules_to_save": ((None, []), "modules that are trained whole"),
    "bias": ((None, "none"), "biases that are trained"),
    "lora_bias": ((None, False), "adapters with biases"),
    "fan_in_fan_out": ((None, False), "transposed weights"),
    "layers_to_transform": ((None,), "adapters in some layers only"),
    "exclude_modules": ((None, []), "adapters in some layers only"),
    "layer_replication": ((None,), "layers that are used again"),
    "target_parameters": ((None, []), "adapters on parameters outside of linear layers"),
    "trainable_token_indices": ((None, [], {}), "token embeddings that are trained"),
    # the others change the base's weights, or came after what is known here
    "init_lora_weights": ((None, True, False, "gaussian"), "an initialisation that changes the base"),
}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith(SUFFIXES)


def linear_layers(family: ModuleType, args: Any) -> dict[str, list[str]]:
    """Name within a block of each of its linear layers -> every name that lora.target_modules may have for
    it: that, its last part, and Hugging Face's of the same two kinds."""
    names = {}
    for name, module in _block(family, args).named_modules():
        if isinstance(module, nn.Linear):
            names[name] = [name, name.rpartition(".")[2]]
            try:
                theirs = hf_name(f"layers.0.{name}.weight", family).split(".", 3)[3].removesuffix(".weight")
                names[name] += [theirs, theirs.rpartition(".")[2]]
            except KeyError:  # a family that Hugging Face does not have
                pass
    return names


def _block(family: ModuleType, args: Any) -> nn.Module:
    """One of the model's blocks, which are all alike, without memory."""
    with torch.device("meta"):
        return family.Transformer(dataclasses.replace(args, n_layers=1)).layers["0"]


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


def trained_parameters(settings: options.Lora, family: ModuleType, args: Any) -> int:
    """How many parameters the adapters of the whole model have; 0 without."""
    if not settings.rank:
        return 0
    linears = map(_block(family, args).get_submodule, target_modules(settings, family, args))
    return args.n_layers * settings.rank * sum(each.in_features + each.out_features for each in linears)


def alpha(settings: options.Lora) -> float:
    """lora.alpha, or its default."""
    return 2.0 * settings.rank if settings.alpha is None else settings.alpha


def read_adapter_config(folder: str | Path) -> options.Lora:
    """The rank, alpha and target modules of a PEFT adapter. ValueError where its adapter_config.json is
    wrong, or asks for what is not there."""
    path = Path(folder).expanduser() / ADAPTER_CONFIG
    config = read_json(path, "name the folder of a PEFT adapter")
    for key, (admitted, meaning) in _FIXED.items():
        if config.get(key) not in admitted:
            raise ValueError(
                f"{path}: {key} = {config[key]!r} asks for {meaning}, which adapters here don't have: use"
                " another adapter, or merge it into its base with PEFT"
            )
    rank, lora_alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r = {rank!r} is not a whole number of at least 1: correct it")
    if type(lora_alpha) not in (int, float) or not 0 < lora_alpha < math.inf:
        raise ValueError(f"{path}: lora_alpha = {lora_alpha!r} is not a number above 0: correct it")
    if targets == "all-linear":
        targets = []
    elif not (isinstance(targets, list) and targets and all(type(name) is str for name in targets)):
        raise ValueError(
            f"{path}: target_modules = {targets!r} is no list of names: write the names that it stands for"
        )
    return options.Lora(rank, float(lora_alpha), sorted(targets), str(folder))


def take_over(settings: options.Lora) -> None:
    """Sets rank, alpha and target_modules to those of the adapter in lora.adapter_path. ValueError where the
    config has others, or the adapter cannot be used."""
    adapter = read_adapter_config(settings.adapter_path)
    for key in ("rank", "alpha"):
        given, theirs = getattr(settings, key), getattr(adapter, key)
        if given not in (0, None, theirs):
            raise ValueError(
                f"lora.{key} = {given:g} is not that of the adapter in lora.adapter_path, {theirs:g}:"
                " leave it out"
            )
        setattr(settings, key, theirs)
    settings.target_modules = settings.target_modules or adapter.target_modules


def check_lora(settings: options.Lora, family: ModuleType, args: Any) -> None:
    """ValueError, one sentence, where [lora] does not fit the model."""
    if not settings.rank:
        return
    if settings.base == "nf4":
        raise ValueError(
            'lora.base = "nf4" is not there: torchao 0.18 scales a tensor as a whole, while each rank fills'
            ' the rows of its shard alone: set "compute"'
        )
    targets = target_modules(settings, family, args)
    if settings.adapter_path:
        adapter = read_adapter_config(settings.adapter_path)
        theirs = target_modules(adapter, family, args)
        if targets != theirs:
            raise ValueError(
                f"lora.target_modules = {', '.join(targets)} are not those of the adapter in"
                f" lora.adapter_path, {', '.join(theirs)}: leave it out"
            )


def apply_lora(
    model: nn.Module, settings: options.Lora, family: ModuleType, training: options.Training
) -> None:
    """Freezes a model or a stage of one, and adds adapters, before it is compiled, sharded and filled. With
    lora.rank = 0 does nothing."""
    if not settings.rank:
        return
    frozen: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in frozen:
                stored = parameter.detach().to(parallel.DTYPES[training.mixed_precision_param])
                frozen[parameter] = nn.Parameter(stored, requires_grad=False)
            setattr(module, name, frozen[parameter])
    for layer in model.layers.values():
        for name in target_modules(settings, family, model.args):
            linear = layer.get_submodule(name)
            like = {"bias": False, "device": linear.weight.device, "dtype": parallel.DTYPES[training.dtype]}
            linear.lora_a = nn.Linear(linear.in_features, settings.rank, **like)
            linear.lora_b = nn.Linear(settings.rank, linear.out_features, **like)
            linear.lora_scale, linear.lora_is_on = alpha(settings) / settings.rank, True
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


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Adds the adapters to the weights that they are for, on one process; they are off then."""
    for linear in model.modules():
        if hasattr(linear, "lora_is_on"):
            product = linear.lora_b.weight @ linear.lora_a.weight
            linear.weight += (linear.lora_scale * product).to(linear.weight.dtype)
            linear.lora_is_on = False


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
