"""From a config to what a run is made of: tokenizer, model sizes, plan settings, loader; and all checks of
them."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import TokenDataset, open_dataset
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.rotary import rope_type
from chunkflow.planning.background import PlanProcess
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings
from chunkflow.settings import options
from chunkflow.settings.config import ConfigError
from chunkflow.settings.options import Config
from chunkflow.training.converters import check_converters
from chunkflow.training.optimizer import check_optimizer
from chunkflow.training.parallel import reshards
from chunkflow.training.stages import layers_of_stages
from models import families
from models.hf_config import model_of

logger = logging.getLogger(__name__)


class ModelSpec(NamedTuple):
    """Which model a config describes."""

    name: str  # for people: family and flavor
    family: ModuleType  # of models/
    args: Any  # the family's ModelArgs
    tokenizer: Tokenizer | None  # None: only ready token ids can be read
    layers: list[range]  # of each pipeline stage; one range where there is no pipeline

    @property
    def stages_in_words(self) -> str:
        count = len(self.layers)
        return f", layers of its {count} stages: {list(map(len, self.layers))}" if count > 1 else ""

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.family.Transformer(self.args).parameters())


def model_spec(config: Config) -> ModelSpec:
    """The model, its tokenizer and its stages. ValueError where the settings do not go together."""
    tokenizer = open_tokenizer(config.model)
    family, args = model_args(config.model, config.training.seq_len, tokenizer.vocab_size if tokenizer else 0)
    name = f"{config.model.name} {config.model.flavor}"
    parallelism = config.parallelism
    if parallelism.pipeline_parallel_degree > 1 and parallelism.fsdp_reshard_after_forward == "always":
        raise ConfigError(
            'parallelism.fsdp_reshard_after_forward = "always" would gather every layer for every chunk, and'
            ' replicas have unequal plans: with a pipeline set "default" or "never"'
        )
    return ModelSpec(name, family, args, tokenizer, layers_of_stages(parallelism, args, name))


def check(config: Config) -> ModelSpec:
    """All that the config, this machine's devices and the named model can tell, save for what storage reads.

    Raises ValueError, one sentence.
    """
    spec, training, fake = model_spec(config), config.training, config.comm.mode == "fake_backend"
    float8 = config.quantize.linear.float8
    check_converters(config.model.converters, float8, spec.family, spec.args, training.dtype, fake)
    check_optimizer(config.optimizer, config.compile, training, fake)
    check_cuda_dtype(training)
    return spec


def check_cuda_dtype(settings: options.Training) -> None:
    if torch.cuda.is_available() and settings.mixed_precision_param != "bfloat16":
        raise ConfigError(
            f"training.mixed_precision_param = {settings.mixed_precision_param} cannot be used on CUDA, whose"
            ' variable-length attention computes in bfloat16: set "bfloat16"'
        )


def plan_settings(config: Config, spec: ModelSpec, replicas: int) -> PlanSettings:
    """What plans depend on, for so many data-parallel replicas."""
    chunkflow, ranks = config.chunkflow, config.parallelism.pipeline_parallel_degree
    last = len(spec.layers) - 1
    costs = [Cost.of_layers(spec.args, len(own), stage == last) for stage, own in enumerate(spec.layers)]
    return PlanSettings(
        Cost.of_model(spec.args),
        replicas=replicas,
        enable=chunkflow.enable,
        chunk_size=chunkflow.chunk_size,
        k=chunkflow.k,
        fill_tails=chunkflow.fill_tails,
        balance=chunkflow.balance,
        lockstep=reshards(config.parallelism, replicas),
        stages=tuple(costs),
        pipeline_ranks=ranks,
    )


def open_data(settings: options.Training, spec: ModelSpec, seed: int) -> TokenDataset | SyntheticDataset:
    """The sequences that the run trains on. ValueError for whatever is wrong with them."""
    logger.info(f"Preparing {settings.dataset} dataset from {settings.dataset_path or 'its default place'}")
    source, vocab_size = (settings.dataset, settings.dataset_path), spec.args.vocab_size
    dataset = open_dataset(*source, spec.tokenizer, vocab_size=vocab_size, seed=seed)
    total, longest = sum(dataset.lengths), max(dataset.lengths)
    logger.info(f"{len(dataset):,} sequences, {total:,} tokens, the longest has {longest:,}")
    return dataset


def open_loader(
    settings: options.Training, dataset, plan: PlanSettings, replica: int, seed: int, **changes: Any
) -> ChunkDataLoader:
    """The chunks of one replica. `changes`: other arguments of ChunkDataLoader than training's.

    Plans of pipelines take long enough to be made in a process of their own. ValueError for overlong
    sequences that the settings do not admit.
    """
    arguments = {
        "replica": replica,
        "global_batch_size": settings.global_batch_size,
        "seq_len": settings.seq_len,
        "overlong": settings.overlong,
        "shuffle": settings.shuffle,
        "seed": seed,
        "make_plan": PlanProcess(plan, replica)
        if plan.pipeline_ranks > 1 and "make_plan" not in changes
        else None,
    }
    loader = ChunkDataLoader(dataset, plan, **(arguments | changes))
    if loader.notice:
        logger.info(loader.notice)
    return loader


# -------------------------------------------------------------------------------------------------- the model


def open_tokenizer(settings: options.Model) -> Tokenizer | None:
    """That of model.tokenizer_path, else of model.hf_assets_path, else the shipped one. None: the folder has
    none, and ready token ids are all that can be read."""
    path, folder = settings.tokenizer_path, settings.hf_assets_path
    if folder and not path:
        files = [Path(folder).expanduser() / name for name in ("tokenizer.json", "tokenizer.model")]
        if not any(file.is_file() for file in files):
            return None
        path = folder
    return Tokenizer(path)


def model_args(settings: options.Model, seq_len: int, vocab_size: int):
    """The module of the model's family and its sizes, overrides applied.

    `vocab_size` is the tokenizer's. A debug model takes it over; for a real model it is only an upper bound.
    ValueError where name, flavor, positions (for sequences of `seq_len` tokens) or vocabulary don't fit.
    """
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
            f" {args.vocab_size:,}: set model.tokenizer_path to the model's own tokenizer"
        )
    if settings.rope_theta is not None:
        args = dataclasses.replace(args, rope_theta=settings.rope_theta)
    if settings.rope_scaling is not None:
        args = dataclasses.replace(args, rope_scaling=settings.rope_scaling)
    elif seq_len > positions(args):
        raise ValueError(
            f"training.seq_len = {seq_len:,} is beyond the {positions(args):,} positions of {settings.name}"
            f" {settings.flavor}: lower it, or extend the context with model.rope_scaling, for example"
            f' {{ rope_type = "yarn", factor = {-(-seq_len // args.max_positions)}.0,'
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
