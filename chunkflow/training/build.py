"""From a config to the parts of a run: tokenizer, model, plan settings, data loader; and their checks."""

import importlib.util
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import TokenDataset, open_dataset
from chunkflow.data.mixture import MixedDataset
from chunkflow.data.shipped_templates import template_text
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.attention import activate_flash_attention_3
from chunkflow.planning.background import PlanProcess
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.waits import PESSIMISTIC_FLOPS, longest_wait
from chunkflow.settings import options
from chunkflow.settings.config import ConfigError, data_sections
from chunkflow.settings.faults import collected, refuse
from chunkflow.settings.options import Config
from chunkflow.training.converters import check_converters
from chunkflow.training.lora import check_lora, trained_parameters
from chunkflow.training.model_sizes import model_args
from chunkflow.training.optimizer import check_optimizer
from chunkflow.training.parallel import reshards
from chunkflow.training.prediction import most_kv_tokens, room, stage_sizes
from chunkflow.training.rates import device_of
from chunkflow.training.stages import layers_of_stages

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


def model_spec(config: Config, faults: dict[str, str] | None = None) -> ModelSpec | None:
    """The model, its tokenizer and its stages. ValueError, one sentence a line, where the settings contradict
    each other; with `faults`, that goes there, and the model is None if its sizes cannot be known."""
    found, tokenizer, spec = {} if faults is None else faults, None, None
    name, readable = f"{config.model.name} {config.model.flavor}", False
    with collected(found):
        check_reshard(config.parallelism)
    with collected(found):
        template_text(config.training.chat_template)
    with collected(found):
        tokenizer = open_tokenizer(config)
        readable = True
    with collected(found):
        vocab_size = tokenizer.vocab_size if tokenizer else 0
        family, args = model_args(config.model, config.training.seq_len, vocab_size)
        if readable or config.model.hf_assets_path or config.model.flavor != "debugmodel":
            spec = ModelSpec(name, family, args, tokenizer, [range(args.n_layers)])
        layers = layers_of_stages(config.parallelism, args, name)
        spec = spec and spec._replace(layers=layers)
    if faults is None:
        refuse(found)
    return spec


def check(
    config: Config,
    *more: Callable[[ModelSpec], object],
    pairs: bool = False,
    planned: bool = False,
) -> ModelSpec:
    """Checks the config against the model and this machine's devices; `more`: checks of other rooms, which
    need the model; `pairs`: whether the data are to be preference pairs; `planned`: nothing is to run here,
    so neither devices nor kinds of data count. ValueError, one sentence a line for all that is wrong."""
    training, fake, faults = config.training, config.comm.mode == "fake_backend", {}

    def converters(spec: ModelSpec) -> None:
        float8 = config.quantize.linear.float8
        check_converters(config.model, float8, spec.family, spec.args, training.dtype, fake)

    def lora(spec: ModelSpec) -> None:
        check_lora(config.lora, spec.family, spec.args)

    checks = [
        lambda: check_pairs(config, pairs),
        lambda: check_optimizer(config.optimizer, config.compile, training, fake),
        lambda: check_cuda_dtype(training),
        lambda: check_attention(config),
        lambda: check_torch(config, pairs),
        lambda: check_wandb(config.metrics),
    ]
    of_model = [lora, *more] if planned else [converters, lora, *more]
    spec = model_spec(config, faults)
    for each in [] if planned else checks:
        with collected(faults):
            each()
    for each in of_model if spec else ():
        with collected(faults):
            each(spec)
    refuse(faults)
    return spec


def check_reshard(settings: options.Parallelism) -> None:
    if settings.pipeline_parallel_degree > 1 and settings.fsdp_reshard_after_forward == "always":
        raise ConfigError(
            'parallelism.fsdp_reshard_after_forward = "always" would gather every layer for every chunk, and'
            ' replicas have unequal plans: with a pipeline set "default" or "never"'
        )


def check_pairs(config: Config, pairs: bool) -> None:
    """ValueError where the config's data cannot be preference pairs, or with `pairs` false can be nothing
    else; or where it asks for what a loss of pairs does not have."""
    sections = data_sections(config)
    if config.validation.enable:
        sections |= data_sections(config, "validation")
    for name, section in sections.items():
        shown, path = f'{name}.dataset = "{section.dataset}"', section.dataset_path
        made_up = section.dataset == "synthetic" and path == "preference"
        if made_up and not pairs:
            raise ConfigError(
                f'{shown} with dataset_path = "preference" has preference pairs: train on them with'
                " recipes/dpo.py, or choose another"
            )
        if pairs and not made_up and section.dataset in ("python_stdlib", "synthetic"):
            raise ConfigError(
                f'{shown} has no preference pairs: set "jsonl" or "parquet" and {name}.dataset_path to rows'
                ' of {"prompt", "chosen", "rejected"}, or "synthetic" and "preference"'
            )
    if pairs and config.training.loss_weighting != "token":
        raise ConfigError(
            f'training.loss_weighting = "{config.training.loss_weighting}" is not read by recipes/dpo.py:'
            " leave it out, and set dpo.length_normalised for log-probabilities by the token"
        )


def check_torch(config: Config, pairs: bool = False) -> None:
    """For machines that come with an older torch, and are told to use it (CHUNKFLOW_PYTHON)."""
    uses = {
        "recipes/dpo.py": pairs,
        "validation.enable": config.validation.enable,
        "parallelism.pipeline_parallel_degree": config.parallelism.pipeline_parallel_degree > 1,
    }
    for name in uses:
        if uses[name] and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
            raise ConfigError(f"{name} needs torch 2.13, but this is {torch.__version__}: leave it out")


def check_wandb(settings: options.Metrics) -> None:
    if not settings.enable_wandb:
        return
    if not settings.enable_tensorboard:
        raise ConfigError(
            "metrics.enable_wandb shows what TensorBoard's events have, and metrics.enable_tensorboard ="
            " false writes none: set it to true"
        )
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "metrics.enable_wandb = true needs the package wandb, which is not installed: pip install"
            " 'chunkflow[wandb]', or leave it out"
        )


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


def plan_settings(
    config: Config,
    spec: ModelSpec,
    replicas: int,
    device: str = "",
    adapts: frozenset[str] = frozenset(),
    pairs: bool = False,
) -> PlanSettings:
    """What plans depend on, for this number of data-parallel replicas. `device`: by its name; "": this
    machine's. `adapts`: which of "k" and "kv_offload" a step may have its own value of; `pairs`: of
    preference training."""
    device = device or device_of(config, planned=False)
    sizes = stage_sizes(config, spec.family, spec.args, spec.layers, replicas, device)
    memory = sizes, replicas, device
    chunkflow, last, most = config.chunkflow, spec.layers[-1], config.parallelism.context_parallel_degree
    adapters = trained_parameters(config.lora, spec.family, spec.args) // spec.args.n_layers
    costs = [Cost.of_layers(spec.args, len(own), head=own is last, adapters=adapters) for own in spec.layers]
    return PlanSettings(
        Cost.of_model(spec.args, adapters),
        replicas=replicas,
        enable=chunkflow.enable,
        chunk_size=chunkflow.chunk_size,
        k=chunkflow.k,
        fill_tails=chunkflow.fill_tails,
        balance=chunkflow.balance,
        lockstep=reshards(config.parallelism, replicas),
        forward_first=pairs,
        stages=tuple(costs),
        pipeline_ranks=config.parallelism.pipeline_parallel_degree,
        spread_over=replicas if most == -1 else most,
        kv_tokens=most_kv_tokens(config, *memory),
        kv_offload=chunkflow.kv_offload,
        room=room(config, *memory, adapts),
    )


def open_data(
    config: Config, spec: ModelSpec, seed: int, section: str = "training", pairs: bool | None = False
) -> TokenDataset | SyntheticDataset | MixedDataset:
    """The sequences of the config's `section`, training or validation: of its dataset, or of all its sources
    if it has some. `pairs`: whether these are preference pairs; None: if the first row is one. ValueError for
    rows that cannot be used."""
    training, opened = config.training, []
    for where, settings in data_sections(config, section).items():
        name, path = settings.dataset, settings.dataset_path
        logger.info(f"Preparing {name} dataset from {path or 'its default place'} for {where}")
        arguments = {"vocab_size": spec.args.vocab_size, "seed": seed, "section": where}
        columns = getattr(settings, "columns", None)  # a source's own
        arguments |= {"columns": training.columns if columns is None else columns}
        arguments |= {"multi_turn": training.multi_turn, "pairs": pairs}
        dataset = open_dataset(name, path, spec.tokenizer, **arguments)
        total, longest = sum(dataset.lengths), max(dataset.lengths)
        of_pairs = f" of {len(dataset) // 2:,} pairs" if dataset.pairs else ""
        logger.info(f"{len(dataset):,} sequences{of_pairs}, {total:,} tokens, the longest has {longest:,}")
        opened.append(dataset)
    if section != "training" or not training.sources:
        return opened[0]
    if len({data.pairs for data in opened}) > 1:
        with_pairs = ", ".join(source.name for source, data in zip(training.sources, opened) if data.pairs)
        raise ValueError(f"of training.sources only {with_pairs} has preference pairs: leave out one kind")
    weights = [source.weight for source in training.sources]
    mixed = MixedDataset({source.name: data for source, data in zip(training.sources, opened)}, weights)
    rows = [weight * len(data) for weight, data in zip(weights, opened)]
    tokens = [weight * sum(data.lengths) for weight, data in zip(weights, opened)]
    for source, own_rows, own_tokens in zip(training.sources, rows, tokens):
        logger.info(
            f"Source {source.name}: weight {source.weight:g}, {100 * own_rows / sum(rows):.1f} % of an"
            f" epoch's sequences, {100 * own_tokens / sum(tokens):.1f} % of its tokens"
        )
    return mixed


def open_loader(
    settings: options.Training, dataset, plan: PlanSettings, replica: int, seed: int, **changes: Any
) -> ChunkDataLoader:
    """The chunks of one replica. `changes` replace arguments of ChunkDataLoader.

    ValueError for overlong sequences that the settings do not admit.
    """
    if plan.pipeline_ranks > 1 and "make_plan" not in changes:
        changes["make_plan"] = PlanProcess(plan, replica)  # plans of pipelines take long: not in this process
    names = ("global_batch_size", "seq_len", "overlong", "shuffle", "loss_weighting")
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
                    f'training.chat_template = "{template}" is for text, and model.hf_assets_path ='
                    f' "{path}" has no tokenizer: set model.tokenizer_path, or leave it out'
                )
            return None
    return Tokenizer(path, template)


def open_text_tokenizer(config: Config) -> Tokenizer:
    """As `open_tokenizer`, for what cannot do without one. ValueError if there is none."""
    tokenizer = open_tokenizer(config)
    if tokenizer is None:
        raise ConfigError(
            f"{config.model.hf_assets_path} has no tokenizer: set model.tokenizer_path to the model's own"
        )
    return tokenizer
