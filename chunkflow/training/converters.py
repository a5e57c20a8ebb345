"""Linear layers that cast inputs, weights and gradients to float8 or int8 for each product (torchao).

Parameters keep their names, dtype and bytes. The head is not converted: chunkflow.execution.loss computes its
product. torchao is imported only when a converter is set: that takes seconds, and it warns.
"""

import dataclasses
import logging
from types import ModuleType
from typing import Any

import torch
from torch import nn

from chunkflow.settings import options

logger = logging.getLogger(__name__)

# torchtitan's word in filter_fqns: also skip the layers that torchao's benchmarks found too small to gain.
SMALL_LAYERS = "auto_filter_small_kn"


def check_converters(
    settings: options.Model, float8: options.Float8, family: ModuleType, args: Any, dtype: str, fake: bool
) -> None:
    """ValueError, one sentence, where model.converters cannot run on this machine or find no layers.

    `dtype`: training.dtype; `fake`: on the fake backend.
    """
    converters = settings.converters
    if not converters:
        return
    if len(converters) > 1:
        raise ValueError(
            f'model.converters = "{",".join(converters)}" are two for the same layers: choose one'
        )
    if dtype == "float64":
        raise ValueError(
            f'model.converters = "{converters[0]}" contradicts training.dtype = "float64", which computes in'
            " float64: remove one"
        )
    if converters == ["float8"]:
        cuda = torch.cuda.is_available() and not fake
        if not float8.emulate and not (cuda and torch.cuda.get_device_capability() >= (8, 9)):
            device = f"{torch.cuda.get_device_name()} has none" if cuda else "this runs on the CPU"
            raise ValueError(
                'model.converters = "float8" needs a GPU with float8 products (compute capability 8.9), but'
                f' {device}: set quantize.linear.float8.emulate to try it without, or use "int8"'
            )
        if SMALL_LAYERS in float8.filter_fqns and float8.recipe_name == "rowwise_with_gw_hp":
            raise ValueError(
                f'quantize.linear.float8.filter_fqns = "{SMALL_LAYERS}" has no figures for recipe_name ='
                ' "rowwise_with_gw_hp": name the layers to leave out instead'
            )
    with torch.device("meta"):
        model = family.Transformer(args)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if converters == ["float8"]:
        for word in float8.filter_fqns:
            if word != SMALL_LAYERS and not any(word in name for name in names):
                raise ValueError(
                    f'quantize.linear.float8.filter_fqns = "{word}" is part of no linear layer\'s name: use'
                    f" parts of names such as {', '.join(n for n in names if n.startswith('layers.0.'))}"
                )
    if not layers_to_convert(model, converters, float8):
        raise ValueError(
            f'model.converters = "{converters[0]}" finds no layer in {settings.name} {settings.flavor}:'
            " remove it, or"
            " change quantize.linear.float8.filter_fqns (sizes have to be multiples of 16, too)"
        )


def layers_to_convert(model: nn.Module, converters: list[str], float8: options.Float8) -> set[str]:
    """Names of the linear layers with sizes that are multiples of 16, except the head and, with float8, those
    that filter_fqns excludes."""
    excluded = {"output", *(float8.filter_fqns if converters == ["float8"] else ())}
    large = None
    if SMALL_LAYERS in excluded:
        from torchao.float8 import _auto_filter_for_recipe

        large = _auto_filter_for_recipe(float8.recipe_name or "tensorwise", [])
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features % 16 == 0 == module.out_features % 16
        and not any(word in name for word in excluded)
        and (large is None or large(module, name))
    }


def convert_model(model: nn.Module, converters: list[str], float8: options.Float8) -> None:
    """Applies model.converters to a model or a stage of one, before it is compiled, sharded and filled."""
    if not converters:
        return
    (converter,) = converters
    names = layers_to_convert(model, converters, float8)
    linear_layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    how = ""

    def chosen(module: nn.Module, name: str) -> bool:
        return name in names

    if converter == "float8":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = Float8LinearConfig.from_recipe_name(float8.recipe_name or "tensorwise")
        # A weight's gradient is a product over a chunk's tokens; float8 kernels want a multiple of 16: pad.
        recipe = dataclasses.replace(recipe, emulate=float8.emulate, pad_inner_dim=True)
        convert_to_float8_training(model, config=recipe, module_filter_fn=chosen)
        how = f", {float8.recipe_name or 'tensorwise'}{', emulated' if float8.emulate else ''}"
    else:
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
        from torchao.quantization import quantize_

        # Modules are swapped, not weights' classes, so that FSDP2 and checkpoints see ordinary parameters.
        quantize_(model, Int8MixedPrecisionTrainingConfig(module_swap=True), filter_fn=chosen)
    logger.info(
        f"Converted {len(names)} of {linear_layers} linear layers to {converter} training{how}; weights stay"
    )
