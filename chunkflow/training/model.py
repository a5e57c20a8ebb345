"""A model as the config describes it: sizes, activation checkpointing, compilation."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.rotary import rope_type
from models import families
from models.hf_config import model_of

logger = logging.getLogger(__name__)


def model_args(config, vocab_size: int):
    """The module of the model's family and its sizes, overrides applied.

    `vocab_size` is the tokenizer's. A debug model takes it over; for a real model it is only an upper bound.
    ValueError where name, flavor, positions or vocabulary don't fit.
    """
    settings = config.model
    if settings.name not in families:
        names = ", ".join(f'"{name}"' for name in families)
        near = difflib.get_close_matches(settings.name, families, n=1)
        raise ValueError(
            f'model.name = "{settings.name}" is not admitted: choose one of {names}'
            + (f' (did you mean "{near[0]}"?)' if near else "")
        )
    family: ModuleType = families[settings.name]
    if settings.hf_assets_path:
        _, args = model_of(settings.hf_assets_path)
    else:
        args = _flavor(settings, family, vocab_size)
    if vocab_size > args.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size:,} tokens, but {settings.name} {settings.flavor} embeds"
            f" {args.vocab_size:,}: set"
            " model.tokenizer_path to the model's own tokenizer"
        )
    if settings.rope_theta is not None:
        args = dataclasses.replace(args, rope_theta=settings.rope_theta)
    if settings.rope_scaling is not None:
        args = dataclasses.replace(args, rope_scaling=settings.rope_scaling)
    elif config.training.seq_len > positions(args):
        raise ValueError(
            f"training.seq_len = {config.training.seq_len:,} is beyond the {positions(args):,} positions of"
            f" {settings.name} {settings.flavor}: lower it, or extend the context with model.rope_scaling,"
            " for example"
            f' {{ rope_type = "yarn", factor = {-(-config.training.seq_len // args.max_positions)}.0,'
            f" original_max_position_embeddings = {args.max_positions} }}"
        )
    return family, args


def _flavor(settings, family: ModuleType, vocab_size: int):
    if settings.flavor not in family.flavors:
        near = difflib.get_close_matches(settings.flavor, family.flavors, n=1, cutoff=0.3)
        raise ValueError(
            f'model.flavor = "{settings.flavor}" is not a {settings.name} model: use one of'
            f" {', '.join(family.flavors)}" + (f'; did you mean "{near[0]}"?' if near else "")
        )
    args = family.flavors[settings.flavor]
    return dataclasses.replace(args, vocab_size=vocab_size) if settings.flavor == "debugmodel" else args


def positions(args) -> int:
    """How far a model reaches, in tokens. Qwen's folders keep max_position_embeddings when they turn on
    YaRN."""
    scaling = args.rope_scaling or {}
    extended = (
        scaling.get("original_max_position_embeddings", 0) * scaling["factor"]
        if rope_type(scaling) == "yarn"
        else 0
    )
    return max(args.max_positions, int(extended))


def open_tokenizer(config) -> Tokenizer | None:
    """That of model.tokenizer_path, else of model.hf_assets_path, else the shipped one. None: the folder has
    none, and ready token ids are all that can be read."""
    path, folder = config.model.tokenizer_path, config.model.hf_assets_path
    if folder and not path:
        files = [Path(folder).expanduser() / name for name in ("tokenizer.json", "tokenizer.model")]
        if not any(file.is_file() for file in files):
            return None
        path = folder
    return Tokenizer(path)


def apply_activation_checkpoint(model: nn.Module, config) -> None:
    """Recomputes whole layers in backward: all ("full") or every n-th ("selective"), as in torchtitan.

    Within the executor this comes on top of k, which recomputes whole chunks; a layer's forward may run again
    at any time, since writing a chunk's K/V twice changes nothing.
    """
    mode = config.activation_checkpoint.mode
    if mode == "none":
        return
    every = 1 if mode == "full" else int(config.activation_checkpoint.selective_ac_option)
    for index, layer in enumerate(model.layers.values()):
        if index % every == 0:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    logger.info(f"Applied {mode} activation checkpointing to the model")


def apply_compile(model: nn.Module, config) -> None:
    """Compiles each layer's forward; chunk-aware attention and its state stay outside, as a graph break."""
    if not config.compile.enable:
        return
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=config.compile.backend, dynamic=True)
    logger.info("Compiling each TransformerBlock with torch.compile")
