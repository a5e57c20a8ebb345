"""All settings: a dataclass for each section, a field for each key.
`config.training.steps` is `[training] steps` in TOML and `--training.steps` on the command line."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class Rule(NamedTuple):
    words: str  # completes "choose a value ..."
    holds: Callable[[float], bool]


POSITIVE = Rule("greater than 0", lambda value: value > 0)
NOT_NEGATIVE = Rule("of at least 0", lambda value: value >= 0)
AT_LEAST_1 = Rule("of at least 1", lambda value: value >= 1)
SHARE = Rule("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_HALF = Rule("of at least 0 and less than 0.5", lambda value: 0 <= value < 0.5)
BELOW_1 = Rule("of at least 0 and less than 1", lambda value: 0 <= value < 1)
DEGREE = Rule("of at least 1, or -1 for all remaining ranks", lambda value: value >= 1 or value == -1)
STEP = Rule("of at least 1, or -1 for the newest", lambda value: value >= 1 or value == -1)
BATCHES = Rule("of at least 1, or -1 for all of the data", lambda value: value >= 1 or value == -1)
SEED = Rule("from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)


def option(default: Any, doc: str, admits: Rule | tuple | dict | type | None = None, **more: Any) -> Any:
    """A key's field: its default, its line for --help, and what it admits of its type: a rule for numbers,
    strings to choose from (the items, if it is a list), the names in a table with their types, or the
    dataclass of each table in a list of them."""
    default = {"default_factory": default.copy} if isinstance(default, (list, dict)) else {"default": default}
    return field(**default, metadata={"doc": doc, "admits": admits}, **more)


DATASETS = ("python_stdlib", "jsonl", "parquet", "synthetic")
_FLOATS = "low_freq_factor high_freq_factor attention_factor beta_fast beta_slow mscale mscale_all_dim"
ROPE_SCALING = {"rope_type": str, "factor": float, "original_max_position_embeddings": int}
ROPE_SCALING |= dict.fromkeys(_FLOATS.split(), float) | {"truncate": bool}


_COLUMNS = """
    text messages conversations prompt completion instruction input output input_ids labels loss_mask system
    tools weight chosen rejected
"""
COLUMNS = dict.fromkeys(_COLUMNS.split(), str)


@dataclass
class Job:
    # compare=False, so that a saved config equals the same one loaded from its file
    config_file: str = option("", "TOML file with the settings below (command line only)", compare=False)
    dump_folder: str = option("./outputs", "folder for everything that the run leaves")
    description: str = option("default job", "one line for the log")
    print_config: bool = option(False, "print the resolved config at the start")


@dataclass
class Model:
    name: str = option("llama3", 'model family, a file of models/: "llama3", "qwen2", "qwen3", or your own')
    flavor: str = option("debugmodel", "size within the family, one of its `flavors`")
    hf_assets_path: str = option(
        "",
        "Hugging Face model folder: name, flavor and sizes are read from it, and its safetensors and"
        " tokenizer if it has them",
    )
    tokenizer_path: str = option(
        "", "tokenizer; empty: that of hf_assets_path, without it the one shipped for Python sources"
    )
    rope_theta: float | None = option(None, "base of the rotary angles; unset: the model's", POSITIVE)
    rope_scaling: dict | None = option(None, "Hugging Face's keys; unset: the model's", ROPE_SCALING)
    max_positions: int | None = option(
        None,
        "positions that the model is trained for, exported as max_position_embeddings; unset: the model's",
        AT_LEAST_1,
    )
    converters: list[str] = option(
        [], "what linear layers multiply in, the head excepted (torchao)", ("float8", "int8")
    )
    attention: str = option(
        "default",
        "kernels of attention on CUDA: PyTorch's own (FlashAttention-2), or FlashAttention-3, which Hopper"
        " GPUs run faster",
        ("default", "fa3"),
    )


@dataclass
class Source:
    """A table of [[training.sources]]."""

    dataset: str | None = option(None, "where its sequences come from; each table has one", DATASETS)
    dataset_path: str = option("", "as training.dataset_path")
    weight: float = option(1.0, "how often an epoch passes each of its rows, such as 2 or 0.5", POSITIVE)
    name: str = option("", "what the log and the curves call it; unset: the last part of its path")
    columns: dict | None = option(None, "as training.columns; unset: these", COLUMNS)


@dataclass
class Training:
    dataset: str = option("python_stdlib", "where sequences come from", DATASETS)
    dataset_path: str = option(
        "", 'file, folder or glob; with synthetic: "lmsys", "llama3_sft", "agent", "prolong", "preference"'
    )
    sources: list[Source] = option([], "several of these, mixed; only in a file", Source)
    columns: dict = option({}, 'their name for ours: { prompt = "question" }', COLUMNS)
    chat_template: str = option(
        "", "how chats become text: a file, or the name of one shipped; empty: the tokenizer's own"
    )
    multi_turn: str = option(
        "whole", "a chat is one sequence, or one for each turn with loss", ("whole", "expand")
    )
    loss_weighting: str = option(
        "token", "what counts the same in the loss: each token, or each sequence", ("token", "sequence")
    )
    global_batch_size: int = option(
        16, "sequences (recipes/dpo.py: pairs) per optimizer step over all ranks", AT_LEAST_1
    )
    seq_len: int = option(8192, "longest admissible sequence, tokens", AT_LEAST_1)
    overlong: str = option("error", "what becomes of longer sequences", ("error", "truncate", "drop"))
    shuffle: bool = option(True, "a new order of the sequences in each epoch")
    steps: int = option(100, "optimizer steps", AT_LEAST_1)
    max_norm: float = option(1.0, "gradients are scaled down to this global norm", POSITIVE)
    max_bad_steps: int = option(
        3,
        "steps in a row whose loss or gradients are not finite, and so are not applied, before the run stops",
        AT_LEAST_1,
    )
    dtype: str = option("float32", "parameters and optimizer state", ("float32", "float64"))
    mixed_precision_param: str = option(
        "bfloat16",
        'what the model computes in; with training.dtype = "float64" that',
        ("bfloat16", "float32", "float64"),
    )
    mixed_precision_reduce: str = option(
        "float32",
        'what gradients are summed in over ranks; with training.dtype = "float64" that',
        ("float32", "float64"),
    )
    gc_freq: int = option(50, "steps between Python's garbage collections", AT_LEAST_1)
    enable_cpu_offload: bool = option(False, "parameters, gradients and optimizer state live in host memory")


@dataclass
class ChunkFlow:
    enable: bool = option(True, "false: one whole sequence a micro-batch, the baseline to compare with")
    chunk_size: int | Literal["auto"] = option(
        2048, 'tokens in a chunk; "auto": the fastest that fits, by arithmetic', AT_LEAST_1
    )
    k: int | Literal["auto"] = option(
        1,
        'chunks of a group that keep their activations; "auto": as for chunk_size, and without a pipeline'
        " more of shorter sequences, where a memory budget is known",
        AT_LEAST_1,
    )
    fill_tails: bool = option(True, "top up the last chunk of a long sequence with short ones")
    balance: str = option("cost", "what is evened out over data-parallel ranks", ("cost", "tokens"))
    kv_offload: str = option(
        "none",
        "K/V of sequences longer than a chunk, and their gradients, live on the device, or in host memory;"
        ' "auto": there, in the steps that would not fit otherwise',
        ("none", "host", "auto"),
    )
    keep_attention: str = option(
        "none",
        "where chunks that are computed again keep what attention gave, so that it is computed once (with"
        " enable = false there are none)",
        ("none", "device", "host"),
    )
    memory_budget_gib: float | None = option(
        None,
        "what a rank may hold: a plan for more is refused, and sequences are shared before that; unset: its"
        " GPU's memory, on a CPU no limit",
        POSITIVE,
    )


@dataclass
class Lora:
    rank: int = option(0, "of the adapters, which alone are trained; 0: all parameters are", NOT_NEGATIVE)
    alpha: float | None = option(
        None, "adapters' outputs are scaled by alpha / rank; unset: 2 x rank", POSITIVE
    )
    target_modules: list[str] = option(
        [],
        "linear layers that get adapters, by their names in models/ or Hugging Face's, such as q_proj; empty:"
        " all in the blocks",
    )
    adapter_path: str = option(
        "", "folder of a PEFT adapter to start from, whose rank, alpha and target modules hold"
    )
    base: str = option("compute", "what the frozen weights are stored in", ("compute", "nf4"))


@dataclass
class Dpo:
    """Read by recipes/dpo.py."""

    beta: float = option(
        0.1, "what a log-probability above the reference's is worth: the smaller, the further", POSITIVE
    )
    label_smoothing: float = option(0.0, "share of the pairs that may be the wrong way round", BELOW_HALF)
    length_normalised: bool = option(
        False, "log-probabilities are divided by the targets of their answer; false: they are sums"
    )


@dataclass
class Optimizer:
    name: str = option(
        "AdamW", "AdamW8bit (torchao) keeps 2 bytes a parameter, not 8", ("AdamW", "AdamW8bit")
    )
    lr: float = option(8e-4, "learning rate after warm-up", NOT_NEGATIVE)
    beta1: float = option(0.9, "decay of the gradient's mean", BELOW_1)
    beta2: float = option(0.95, "decay of the gradient's mean square", BELOW_1)
    eps: float = option(1e-8, "added to the denominator", NOT_NEGATIVE)
    weight_decay: float = option(0.1, "of all parameters", NOT_NEGATIVE)
    implementation: str = option(
        "fused", "PyTorch's implementation of AdamW", ("fused", "foreach", "for-loop")
    )


@dataclass
class LrScheduler:
    warmup_steps: int = option(200, "steps of linear warm-up, at most training.steps", NOT_NEGATIVE)
    decay_ratio: float | None = option(None, "share of all steps that decay; unset: all after warm-up", SHARE)
    decay_type: str = option("linear", "shape of the decay", ("linear", "sqrt", "cosine"))
    min_lr_factor: float = option(0.0, "share of the learning rate that is left at the end", SHARE)


@dataclass
class Parallelism:
    data_parallel_replicate_degree: int = option(1, "replicas of the sharded model (HSDP)", AT_LEAST_1)
    data_parallel_shard_degree: int = option(-1, "ranks that share one replica's parameters (FSDP2)", DEGREE)
    fsdp_reshard_after_forward: str = option(
        "default",
        'free gathered parameters after each forward (ZeRO-3); "default": with more than one rank',
        ("default", "always", "never"),
    )
    context_parallel_degree: int = option(
        -1,
        "most data-parallel ranks that share a long sequence (a power of two, or all; else rounded down); -1:"
        " for each sequence as many as balance and memory ask for; 1: none share",
        DEGREE,
    )
    pipeline_parallel_degree: int = option(1, "ranks that share one replica's layers (pipeline)", AT_LEAST_1)
    pipeline_parallel_schedule: str = option(
        "1F1B", "one stage a rank, or several; the state-aware form of each", ("1F1B", "Interleaved1F1B")
    )
    pipeline_parallel_layers_per_stage: int | None = option(
        None, "layers of a stage; unset: spread evenly by cost, interleaved over 2 stages a rank", AT_LEAST_1
    )


@dataclass
class Checkpoint:
    enable: bool = option(
        False, "save all of the run's state, and go on from the newest checkpoint that is there"
    )
    folder: str = option("checkpoint", "their folder in job.dump_folder")
    interval: int = option(500, "steps between checkpoints; the last step is always saved", AT_LEAST_1)
    keep_latest_k: int = option(10, "how many are kept; 0: all", NOT_NEGATIVE)
    load_step: int = option(-1, "step to go on from; -1: the newest", STEP)
    async_mode: str = option(
        "disabled",
        "write in the background, from a copy in host memory; pinned: on CUDA a faster copy, whose memory"
        " stays",
        ("disabled", "async", "async_with_pinned_mem"),
    )
    exclude_from_loading: list[str] = option(
        [],
        "start anew what the checkpoint has of these, once: later checkpoints of the run are loaded whole",
        ("optimizer", "dataloader"),
    )
    initial_load_path: str | None = option(
        None, "checkpoint/step-N or Hugging Face folder that initial weights come from"
    )
    initial_load_in_hf: bool = option(
        False,
        "initial weights are a Hugging Face folder's: initial_load_path, else model.hf_assets_path, which"
        " then has to have some",
    )
    last_save_in_hf: bool = option(
        False, "after the last step, write a Hugging Face folder: checkpoint/step-N-hf in job.dump_folder"
    )
    last_save_model_only: bool = option(
        False, "the last checkpoint has the model only: smaller, but training cannot go on from it"
    )
    export_dtype: str = option(
        "float32", "what the Hugging Face folder is written in", ("float16", "bfloat16", "float32")
    )


@dataclass
class ActivationCheckpoint:
    mode: str = option("none", "recomputation inside a chunk, besides k", ("none", "selective", "full"))
    selective_ac_option: str = option(
        "op",
        'selective: "op" recomputes all but matrix products and attention; "2": every second layer, whole',
    )


@dataclass
class Compile:
    enable: bool = option(False, "torch.compile of each layer, but for attention and its K/V state")
    components: list[str] = option(["model"], "what is compiled", ("model",))
    backend: str = option("inductor", "torch.compile's backend")


@dataclass
class Float8:
    recipe_name: str | None = option(
        None, "how values are scaled; unset: tensorwise", ("tensorwise", "rowwise", "rowwise_with_gw_hp")
    )
    filter_fqns: list[str] = option(
        [],
        "parts of names of layers to leave out; auto_filter_small_kn: those too small to gain, by torchao's"
        " benchmarks",
    )
    emulate: bool = option(
        False, "float8 values, but products in float32: on a CPU or an older GPU, slower than without"
    )


@dataclass
class QuantizedLinear:
    float8: Float8 = field(default_factory=Float8)


@dataclass
class Quantize:
    linear: QuantizedLinear = field(default_factory=QuantizedLinear)


@dataclass
class Metrics:
    log_freq: int = option(10, "steps between logged steps; step 1 is always logged", AT_LEAST_1)
    enable_tensorboard: bool = option(True, "write TensorBoard events")
    enable_wandb: bool = option(False, "show them in Weights & Biases, too (extra wandb)")
    save_tb_folder: str = option("tb", "their folder in job.dump_folder")
    disable_color_printing: bool = option(False, "step lines without colours")


@dataclass
class Profiling:
    enable_profiling: bool = option(False, "write torch.profiler traces")
    save_traces_folder: str = option("profile_traces", "their folder in job.dump_folder")
    profile_freq: int = option(10, "steps between traced steps", AT_LEAST_1)


@dataclass
class Comm:
    init_timeout_seconds: int = option(300, "time limit of collectives up to the first step", AT_LEAST_1)
    train_timeout_seconds: int = option(1800, "time limit of collectives afterwards", AT_LEAST_1)
    mode: str = option(
        "default", "fake_backend: one process stands for rank 0 of NGPU", ("default", "fake_backend")
    )


@dataclass
class Validation:
    enable: bool = option(
        False, "measure the loss of other data while training, forward only, in the same chunks"
    )
    dataset: str | None = option(None, "where its sequences come from; unset: training.dataset", DATASETS)
    dataset_path: str = option("", "as training.dataset_path; synthetic: other sequences than training's")
    freq: int = option(10, "steps between validations; the last step is always followed by one", AT_LEAST_1)
    steps: int = option(
        -1, "global batches (training.global_batch_size), from the first row on; -1: all of the data", BATCHES
    )


@dataclass
class Debug:
    seed: int | None = option(None, "seed of initial weights and data order", SEED)
    deterministic: bool = option(False, "only deterministic kernels")


@dataclass
class Config:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    chunkflow: ChunkFlow = field(default_factory=ChunkFlow)
    lora: Lora = field(default_factory=Lora)
    dpo: Dpo = field(default_factory=Dpo)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LrScheduler = field(default_factory=LrScheduler)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    validation: Validation = field(default_factory=Validation)
    debug: Debug = field(default_factory=Debug)
