"""A model's family and sizes from its name, flavor or folder, and how long its sequences may be."""

import dataclasses
import difflib
from types import ModuleType
from typing import Any

from chunkflow.execution.rotary import rope_type
from chunkflow.settings import options
from chunkflow.settings.values import suggest
from models import families
from models.hf_config import model_of

ORIGINAL = "original_max_position_embeddings"  # of rope_scaling: the positions before it


def model_args(settings: options.Model, seq_len: int, vocab_size: int):
    """The module of the model's family and its sizes, with the config's overrides.

    `vocab_size` is the tokenizer's: a debug model takes it over, any other must have at least as many.
    ValueError where name, flavor, positions (for sequences of `seq_len` tokens) or vocabulary don't fit.
    """
    if settings.name not in families:
        raise ValueError(
            f'model.name = "{settings.name}" is not admitted: {suggest(settings.name, families)}'
        )
    family: ModuleType = families[settings.name]
    if settings.hf_assets_path:
        _, args = model_of(settings.hf_assets_path)
    elif settings.flavor not in family.flavors:
        near = difflib.get_close_matches(settings.flavor, family.flavors, n=1, cutoff=0.3)
        raise ValueError(
            f'model.flavor = "{settings.flavor}" is not a {settings.name} model: use one of'
            f" {', '.join(family.flavors)}" + (f'; did you mean "{near[0]}"?' if near else "")
        )
    else:
        args = family.flavors[settings.flavor]
        if settings.flavor == "debugmodel":
            args = dataclasses.replace(args, vocab_size=vocab_size)
    if vocab_size > args.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size:,} tokens, but {settings.name} {settings.flavor} embeds"
            f" {args.vocab_size:,}: set model.tokenizer_path to the model's own tokenizer"
        )
    return family, _extended(settings, args, seq_len)


def _extended(settings: options.Model, own: Any, seq_len: int):
    """The model's `own` args with the config's rotary angles and positions. ValueError where sequences of
    `seq_len` tokens, or model.max_positions, are beyond what these angles are for."""
    model, most = f"{settings.name} {settings.flavor}", settings.max_positions
    theta = own.rope_theta if settings.rope_theta is None else settings.rope_theta
    scaling = own.rope_scaling if settings.rope_scaling is None else settings.rope_scaling
    kind = rope_type(scaling)
    scaling = None if kind == "default" else scaling
    args = dataclasses.replace(own, rope_theta=theta, rope_scaling=scaling)
    original = (scaling or {}).get(ORIGINAL) or own.max_positions
    if most is not None and seq_len > most:
        raise ValueError(
            f"training.seq_len = {seq_len:,} is beyond model.max_positions = {most:,}: lower the first, or"
            " raise the second"
        )
    key, wanted = ("training.seq_len", seq_len) if most is None else ("model.max_positions", most)
    if wanted > (reach := _reach(args)):
        beyond = f"{key} = {wanted:,} is beyond the {reach:,} positions of {model}"
        if kind == "yarn":
            raise ValueError(
                f"{beyond} with YaRN (factor {scaling['factor']:g} x {original:,}): lower it, or set the"
                f" factor of model.rope_scaling to {-(-wanted // original)}.0"
            )
        changed = theta > own.rope_theta or scaling not in (None, own.rope_scaling)
        if changed and most is None:
            raise ValueError(
                f"{beyond}, and of model.rope_theta and model.rope_scaling only YaRN says how many there are"
                f" now: set model.max_positions = {wanted}, too"
            )
        if not changed:
            scaled = f'{{ rope_type = "yarn", factor = {-(-wanted // own.max_positions)}.0, {ORIGINAL} ='
            yarn = f"model.rope_scaling, for example {scaled} {own.max_positions} }}"
            base = f"a larger model.rope_theta, for example {_larger_theta(own, wanted)}"
            if most is None:
                raise ValueError(
                    f"{beyond}: lower it, or extend the context, either with {yarn}, or with {base}, and"
                    f" model.max_positions = {wanted}"
                )
            raise ValueError(
                f"{beyond}, and its rotary angles there were never trained: lower it, or extend the context"
                f" too, either with {yarn}, or with {base}"
            )
    if most is None:
        return args
    if kind in ("yarn", "llama3"):  # a scaling without it means the model's own positions
        scaling = scaling | {ORIGINAL: original}
    return dataclasses.replace(args, rope_scaling=scaling, max_positions=most)


def _larger_theta(own: Any, positions: int) -> str:
    """A rope_theta with which the slowest pair turns as far in `positions` as it does now in the model's own.
    It is the least to take: ABF (arXiv 2309.16039) took six times as much, ProLong twice."""
    times = positions / own.max_positions
    theta = own.rope_theta * times ** (own.head_dim / max(own.head_dim - 2, 1))
    return f"{theta:.1e}".replace("e+0", "e").replace("e+", "e")


def _reach(args: Any) -> int:
    """The positions that a model's sizes and angles speak of. Qwen's folders keep max_position_embeddings
    with YaRN, whose factor says how many there are then."""
    scaling = args.rope_scaling or {}
    if rope_type(scaling) != "yarn":
        return args.max_positions
    original = scaling.get(ORIGINAL) or args.max_positions
    return max(args.max_positions, round(original * scaling["factor"]))


def positions(settings: options.Model, args: Any) -> int:
    """The longest sequence, in tokens, of a model whose `args` model_args made of these settings."""
    return settings.max_positions or _reach(args)
