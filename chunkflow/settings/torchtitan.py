"""What from_torchtitan.py has to know of torchtitan: models, defaults, and how keys were spelt before."""

from collections.abc import Callable
from typing import Any

# Both projects' models, and the flavors that both have or that a fork of torchtitan could have.
FLAVORS = {
    "llama3": ("debugmodel", "8B", "70B", "1B", "3B"),
    "qwen2": ("debugmodel", "0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"),
    "qwen3": ("debugmodel", "0.6B", "1.7B", "4B", "8B", "14B", "32B"),
}

# torchtitan's defaults where ours differ.
DEFAULTS = {
    "training.seq_len": 2048,
    "training.steps": 10000,
    "checkpoint.last_save_model_only": True,
    "activation_checkpoint.mode": "selective",
    "activation_checkpoint.selective_ac_option": "2",
    "metrics.enable_tensorboard": False,
    "comm.train_timeout_seconds": 100,
}
LOCAL_BATCH_SIZE, NGPU, HF_ASSETS_PATH = 8, "8", "./tests/assets/tokenizer"  # torchtitan's, too

# Older spellings -> the last one, as it is or through a function.
_SAME: dict[str, str] = {
    "job.print_args": "job.print_config",
    "profiling.run_profiler": "profiling.enable_profiling",
    "profiling.profile_every_x_iter": "profiling.profile_freq",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.batch_size": "training.local_batch_size",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.compile": "compile.enable",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.sequence_parallel_degree": "parallelism.tensor_parallel_degree",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "validation.enabled": "validation.enable",
}
DEGREES = ("data_parallel_replicate", "tensor_parallel", "pipeline_parallel", "context_parallel")
_PARALLEL = [f"{kind}_degree" for kind in (*DEGREES, "data_parallel_shard")]
for _name in (*_PARALLEL, "pipeline_parallel_schedule", "fsdp_reshard_after_forward"):
    _SAME |= {f"{section}.{_name}": f"parallelism.{_name}" for section in ("training", "experimental")}
_CHANGED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "optimizer.fused": ("optimizer.implementation", lambda fused: "fused" if fused else "foreach"),
    "metrics.enable_color_printing": ("metrics.disable_color_printing", lambda enable: not enable),
    "float8.enable_float8_linear": ("model.converters", lambda enable: ["float8"] if enable else []),
    "training.enable_fp8_linear": ("model.converters", lambda enable: ["float8"] if enable else []),
}
OLDER = {old: (new, lambda value: value) for old, new in _SAME.items()} | _CHANGED

SCHEDULES = {"1f1b": "1F1B", "gpipe": "1F1B"}  # any other has several stages a rank
