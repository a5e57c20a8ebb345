"""From a config to the parts of a run: tokenizer, model, plan settings, data loader; and their checks."""

import dataclasses
import difflib
import importlib
import logging
import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import TokenDataset, open_dataset
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.attention import activate_flash_attention_3
from chunkflow.execution.rotary import rope_type
from chunkflow.planning.background import PlanProcess
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.waits import PESSIMISTIC_FLOPS, longest_wait
from chunkflow.settings import options
from chunkflow.settings.config import ConfigError
from chunkflow.settings.options import Config
from chunkflow.training.converters import check_converters
from chunkflow.training.optimizer import check_optimizer
from chunkflow.training.parallel import reshards
from chunkflow.training.prediction import most_kv_tokens
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
    """The model, its tokenizer and its stages. ValueError where the settings contradict each other."""
    tokenizer = open_tokenizer(config)
    family, args = model_args(config.model, config.training.seq_len, tokenizer.vocab_size if tokenizer else 0)
    name, parallelism = f"{config.model.name} {config.model.flavor}", config.parallelism
    if parallelism.pipeline_parallel_degree > 1 and parallelism.fsdp_reshard_after_forward == "always":
        raise ConfigError(
            'parallelism.fsdp_reshard_after_forward = "always" would gather every layer for every chunk, and'
            ' replicas have unequal plans: with a pipeline set "default" or "never"'
        )
    return ModelSpec(name, family, args, tokenizer, layers_of_stages(parallelism, args, name))


def check(config: Config) -> ModelSpec:
    """Checks the config against the model and this machine's devices. ValueError, one sentence."""
    spec, training, fake = model_spec(config), config.training, config.comm.mode == "fake_backend"
    float8 = config.quantize.linear.float8
    check_converters(config.model, float8, spec.family, spec.args, training.dtype, fake)
    check_optimizer(config.optimizer, config.compile, training, fake)
    check_cuda_dtype(training)
    check_attention(config)
    check_torch(config)
    return spec


def check_torch(config: Config) -> None:
    """For machines that come with an older torch, and are told to use it (CHUNKFLOW_PYTHON)."""
    uses = {
        "validation.enable": config.validation.enable,
        "parallelism.pipeline_parallel_degree": config.parallelism.pipeline_parallel_degree > 1,
    }
    for name in uses:
        if uses[name] and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
            raise ConfigError(f"{name} needs torch 2.13, but this is {torch.__version__}: leave it out")


def check_cuda_dtype(settings: options.Training) -> None:
    if torch.cuda.is_available() and settings.mixed_precision_param != "bfloat16":
        raise ConfigError(
            f"training.mixed_precision_param = {settings.mixed_precision_param} cannot be used on CUDA, whose"
            ' variable-length attention computes in bfloat16: set "bfloat16"'
        )


def check_attention(config: Config) -> None:
    """ValueError, one sentence, where this machine cannot run model.attention. On the fake backend no kernel
    runs."""
    if config.model.attention == "default" or config.comm.mode == "fake_backend":
        return
    cuda, value = torch.cuda.is_available(), 'model.attention = "fa3"'
    major, minor = torch.cuda.get_device_capability() if cuda else (0, 0)
    if major != 9:
        device = f"{torch.cuda.get_device_name()} has {major}.{minor}" if cuda else "this runs on the CPU"
        needs = "needs a Hopper GPU (compute capability 9.0)"
        raise ConfigError(f'{value} {needs}, but {device}: set "default"')
    try:
        importlib.import_module("flash_attn_interface")
    except ImportError as error:
        raise ConfigError(
            f"{value} needs the module flash_attn_interface, which cannot be imported ({error}): build"
            " FlashAttention-3 for this PyTorch (folder hopper of github.com/Dao-AILab/flash-attention), or"
            ' set "default"'
        ) from None


def activate_attention(config: Config) -> None:
    """Lets attention of this process use model.attention. ValueError where it cannot."""
    check_attention(config)
    if config.model.attention == "fa3" and config.comm.mode != "fake_backend":
        activate_flash_attention_3()


def plan_settings(config: Config, spec: ModelSpec, replicas: int, planned: bool = False) -> PlanSettings:
    """What plans depend on, for this number of data-parallel replicas. `planned`: for GPUs that need not be
    this machine's."""
    chunkflow, last, most = config.chunkflow, spec.layers[-1], config.parallelism.context_parallel_degree
    costs = [Cost.of_layers(spec.args, len(layers), head=layers is last) for layers in spec.layers]
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
        pipeline_ranks=config.parallelism.pipeline_parallel_degree,
        spread_over=replicas if most == -1 else most,
        kv_tokens=most_kv_tokens(config, spec.family, spec.args, spec.layers, replicas, planned),
    )


def open_data(
    config: Config, spec: ModelSpec, seed: int, section: str = "training"
) -> TokenDataset | SyntheticDataset:
    """The sequences of the config's `section`, training or validation. ValueError for rows that cannot be
    used."""
    training, settings = config.training, getattr(config, section)
    name, path = settings.dataset, settings.dataset_path
    logger.info(f"Preparing {name} dataset from {path or 'its default place'} for {section}")
    arguments = {"vocab_size": spec.args.vocab_size, "seed": seed, "section": section}
    arguments |= {"columns": training.columns, "multi_turn": training.multi_turn}
    dataset = open_dataset(name, path, spec.tokenizer, **arguments)
    total, longest = sum(dataset.lengths), max(dataset.lengths)
    logger.info(f"{len(dataset):,} sequences, {total:,} tokens, the longest has {longest:,}")
    return dataset


def open_loader(
    settings: options.Training, dataset, plan: PlanSettings, replica: int, seed: int, **changes: Any
) -> ChunkDataLoader:
    """The chunks of one replica. `changes` replace arguments of ChunkDataLoader.

    ValueError for overlong sequences that the settings do not admit.
    """
    if plan.pipeline_ranks > 1 and "make_plan" not in changes:
        changes["make_plan"] = PlanProcess(plan, replica)  # plans of pipelines take long: not in this process
    names = ("global_batch_size", "seq_len", "overlong", "shuffle")
    arguments = {name: getattr(settings, name) for name in names} | changes
    loader = ChunkDataLoader(dataset, plan, replica=replica, seed=seed, **arguments)
    if loader.notice:
        logger.info(loader.notice)
    return loader


def check_waits(
    settings: options.Comm, loader: ChunkDataLoader, plan: PlanSettings, device: torch.device
) -> None:
    """ValueError if on GPUs a third of the time limit of collectives is less than the longest wait to expect:
    of a slow GPU, in a step with the longest sequence of all. NCCL would end such a run in that step."""
    if device.type != "cuda":
        return
    _, lengths, _, _ = loader.batch_at(0)
    lengths[lengths.index(max(lengths))] = loader.longest
    seconds = longest_wait(plan_step(lengths, plan), plan)
    if 3 * seconds > settings.train_timeout_seconds:
        raise ConfigError(
            f"comm.train_timeout_seconds = {settings.train_timeout_seconds} is less than three times the"
            f" {seconds:,.0f} s that a rank may wait for others in a step with a sequence of"
            f" {loader.longest:,} tokens (at {PESSIMISTIC_FLOPS / 1e12:.0f} TFLOP/s): set it to at least"
            f" {math.ceil(3 * seconds)}"
        )


# -------------------------------------------------------------------------------------------------- the model


def open_tokenizer(config: Config) -> Tokenizer | None:
    """From model.tokenizer_path, else model.hf_assets_path, else the shipped one; with
    training.chat_template. None where hf_assets_path is a folder without a tokenizer: then only ready token
    ids can be read. ValueError where either cannot be used."""
    settings, template = config.model, config.training.chat_template
    path = settings.tokenizer_path or settings.hf_assets_path
    if path and not settings.tokenizer_path:
        files = [Path(path).expanduser() / name for name in ("tokenizer.json", "tokenizer.model")]
        if not any(file.is_file() for file in files):
            if template:
                raise ConfigError(
                    f'training.chat_template = "{template}" is for text, and {path} has no tokenizer: set'
                    " model.tokenizer_path, or leave it out"
                )
            return None
    return Tokenizer(path, template)


def model_args(settings: options.Model, seq_len: int, vocab_size: int):
    """The module of the model's family and its sizes, with the config's overrides.

    `vocab_size` is the tokenizer's: a debug model takes it over, any other must have at least as many.
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


def positions(args) -> int:
    """The longest sequence of a model, in tokens. Qwen's folders keep max_position_embeddings with YaRN."""
    scaling = args.rope_scaling or {}
    if rope_type(scaling) != "yarn":
        return args.max_positions
    return max(
        args.max_positions, int(scaling.get("original_max_position_embeddings", 0) * scaling["factor"])
    )
