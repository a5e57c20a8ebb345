"""Answers to keys and values, of torchtitan and of this project's documentation, that are not admitted here.

An answer completes a sentence that begins with the key, or with `key = value`. A section's answer is for all
of its keys that have none. Keys with the same answer are in one string, with spaces between.
"""

from typing import Any

_ANSWERS = {
    "peft": "was renamed: use lora, with rank, alpha and target_modules",
    # Keys and sections of torchtitan that are not used here.
    "job.use_for_integration_test model.print_after_conversion training.gc_debug training.enable_fp8_linear"
    " parallelism.enable_compiled_autograd activation_checkpoint.early_stop activation_checkpoint.debug"
    " quantize.linear.float8.force_recompute_fp8_weight_in_bwd": "is not used: remove the key",
    "training.tensor_parallel_degree training.enable_loss_parallel parallelism.tensor_parallel_degree"
    " parallelism.disable_loss_parallel parallelism.enable_async_tensor_parallel"
    " experimental.enable_async_tensor_parallel": "is not there yet: long sequences are split into chunks"
    " instead; use data_parallel_shard_degree for large models",
    "training.context_parallel_degree experimental.context_parallel_degree": "was renamed: set"
    " parallelism.context_parallel_degree, the most ranks that share a long sequence",
    "parallelism.context_parallel_load_balancer parallelism.context_parallel_rotate_method": "is not used: of"
    " each chunk a rank has one part from the front and one from the back, and gathers keys and values;"
    " remove the key",
    "parallelism.pipeline_parallel_expert_parallel_overlap parallelism.expert_parallel_degree"
    " parallelism.expert_tensor_parallel_degree parallelism.expert_parallel_comm_backend"
    " activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns quantize.grouped_mm"
    " debug.moe_force_load_balance": "is not used: there are no mixture-of-experts models here, remove the"
    " key",
    "parallelism.pipeline_parallel_microbatch_size parallelism.pipeline_parallel_microbatches"
    " experimental.pipeline_parallel_microbatches": "is not used: chunks are the micro-batches, set"
    " training.global_batch_size and chunkflow.chunk_size",
    "parallelism.module_fqns_per_model_part parallelism.pipeline_parallel_split_points"
    " parallelism.pipeline_parallel_first_stage_less_layers"
    " parallelism.pipeline_parallel_last_stage_less_layers experimental.pipeline_parallel_split_points": "is"
    " not used: remove it, layers are spread evenly over the stages",
    "training.dataloader validation.dataloader": "is not used: one thread prepares the next step while this"
    " one runs, remove the section",
    "job.save_config_file": "is not used: the resolved config is always saved as config.toml in"
    " job.dump_folder",
    "job.custom_config_module experimental": "is not used: copy a recipe, edit it, and start it with"
    " TRAIN_FILE=my_recipe.py ./run_train.sh",
    "job.print_args": "was renamed: set job.print_config",
    "profiling.profiler_active profiling.profiler_warmup": "is not used: one step is traced every"
    " profiling.profile_freq steps",
    "profiling.enable_memory_snapshot profiling.save_memory_snapshot_folder": "is not used: peak memory of"
    " every logged step is in metrics.jsonl, remove the key",
    "metrics.save_for_all_ranks metrics.rank_0_only": "is not used: rank 0 writes figures that are reduced"
    " over all ranks already",
    "metrics.enable_color_printing": "was turned round: set metrics.disable_color_printing",
    "model.norm_type": "is not used: each model has its own normalisation, remove the key",
    "model.use_flex_attn": "is not used: attention is exact within each sequence on every device, remove the"
    " key",
    "model.attn_mask_type": "is not used: a packed sequence never attends to its neighbours, remove the key",
    "model.tokenizer_type": "is not used: model.tokenizer_path says enough",
    "optimizer.early_step_in_backward": "is not used: gradients of all chunks are summed before the one"
    " optimizer step",
    "optimizer.fused": 'was replaced: set optimizer.implementation = "fused"',
    "lr_scheduler.total_steps": "is not used: the schedule ends at training.steps, set that",
    "lr_scheduler.lr_min": "was replaced: set lr_scheduler.min_lr_factor, a share of optimizer.lr",
    "training.local_batch_size training.batch_size": "is not used: set training.global_batch_size and"
    " chunkflow.chunk_size",
    "training.gradient_accumulation_steps": "is not used: set training.global_batch_size, chunks accumulate"
    " by themselves",
    "training.warmup_steps": "has moved: set lr_scheduler.warmup_steps",
    "training.seed": "has moved: set debug.seed",
    "training.deterministic": "has moved: set debug.deterministic",
    "training.compile": "has moved: set compile.enable",
    "training.data_parallel_type": "is not used: set parallelism.data_parallel_shard_degree and"
    " data_parallel_replicate_degree",
    "training.data_parallel_degree training.data_parallel_shard_degree": "has moved: set"
    " parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "has moved: set parallelism.data_parallel_replicate_degree",
    "training.fsdp_reshard_after_forward": "has moved: set parallelism.fsdp_reshard_after_forward",
    "parallelism.pipeline_parallel_schedule_csv": "is not used: stages run the state-aware schedule, made"
    " anew for every step, remove the key",
    "checkpoint.enable_checkpoint": "was renamed: set checkpoint.enable",
    "checkpoint.interval_type": "is not used: checkpoint.interval counts steps",
    "checkpoint.model_weights_only": "was renamed: set checkpoint.last_save_model_only",
    "checkpoint.enable_ft_dataloader_checkpoints": "is not used: the data's place is one number in every"
    " checkpoint",
    "checkpoint.initial_load_model_only": "is not used: checkpoint.initial_load_path always loads the model's"
    " weights only",
    "checkpoint.initial_load_in_hf_quantized": "is not used: quantised weights are not read, convert them"
    " first",
    "checkpoint.enable_first_step_checkpoint": "is not used: set checkpoint.interval = 1 for a short trial",
    "checkpoint.create_seed_checkpoint": "is not used: initial weights depend on debug.seed alone, whatever"
    " the layout",
    "checkpoint.load_only": "is not used: set checkpoint.interval to more than training.steps",
    "activation_checkpoint.memory_budget activation_checkpoint.visualize_memory_budget_pareto": "is not used:"
    " chunkflow.chunk_size and chunkflow.k bound the activations",
    "activation_checkpoint.preserve_rng_state activation_checkpoint.determinism_check": "is not used: nothing"
    " in the models is random, remove the key",
    "quantize.linear.float8.enable_fsdp_float8_all_gather": "is not used: layers are gathered in"
    " training.mixed_precision_param and cast for each product, remove the key",
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": "is not used: it belongs to float8"
    " all-gathers, which are not there, remove the key",
    "quantize.linear.mx": "is not used: MX formats are not supported, remove the section",
    "float8": 'has moved: add "float8" to model.converters and use quantize.linear.float8',
    "comm.trace_buf_size": "is not used: set TORCH_FR_BUFFER_SIZE in the environment for PyTorch's flight"
    " recorder",
    "comm.save_traces_folder comm.save_traces_file_prefix": "is not used: set TORCH_FR_DUMP_TEMP_FILE in the"
    " environment for PyTorch's flight recorder",
    "memory_estimation": "is not used: NGPU=8 python recipes/plan.py --job.config_file X.toml predicts a"
    " rank's memory, by part",
    "fault_tolerance": "is not used: replicas that come and go are not supported, remove the section",
    "experimental.pipeline_parallel_degree": "has moved: set parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_schedule": "has moved: set parallelism.pipeline_parallel_schedule",
    "validation.local_batch_size": "is not used: validation packs sequences into chunks of"
    " chunkflow.chunk_size",
    "validation.seq_len": "is not used: training.seq_len counts for validation too",
    "debug.deterministic_warn_only": "is not used: set debug.deterministic",
}

# Values, as `key=value`, or `key=*` for any value that is not admitted.
_VALUE_ANSWERS = {
    "optimizer.name=AdamW4bit optimizer.name=AdamWFp8": "is not there, since torchao 0.18 cannot shard its"
    ' state: set optimizer.name = "AdamW8bit"',
    "optimizer.name=Adam": 'is not there: set optimizer.name = "AdamW" and optimizer.weight_decay = 0',
    "model.converters=quantize.linear.float8": 'was renamed: set model.converters = ["float8"]',
    "model.converters=mx model.converters=quantize.linear.mx": "is not there, MX formats are not supported:"
    ' choose "float8" or "int8"',
    "activation_checkpoint.mode=memory_budget": "is not there: chunkflow.chunk_size and chunkflow.k bound the"
    ' activations, set "none", "selective" or "full"',
    "compile.components=loss": "is not compiled, head and loss run in slices of tokens: set"
    ' compile.components = ["model"]',
    "checkpoint.exclude_from_loading=lr_scheduler": "is not saved: the rate follows the step, remove the"
    " entry",
    "checkpoint.exclude_from_loading=train_state": "is always loaded: choose another job.dump_folder and"
    " checkpoint.initial_load_path to start at step 1",
    "comm.mode=local_tensor": 'is not there: set "fake_backend" to check a large layout in one process',
    "training.dtype=bfloat16": 'is not admitted, since small updates would be lost: keep "float32" and'
    " compute in bfloat16 with training.mixed_precision_param",
    "validation.dataset=*": 'is not one of "python_stdlib", "jsonl", "parquet", "synthetic" (hub names are'
    " not read): download the files, set validation.dataset to their kind and validation.dataset_path",
    "training.dataset=*": 'is not one of "python_stdlib", "jsonl", "parquet", "synthetic" (hub names are'
    " not read): download the files, set training.dataset to their kind and training.dataset_path",
}

# Keys that are not there -> values with which they ask for nothing, or for what is so anyway: these pass.
_NOTHING_ASKED = {
    "profiling.enable_memory_snapshot metrics.save_for_all_ranks"
    " model.print_after_conversion model.use_flex_attn optimizer.early_step_in_backward"
    " training.gc_debug training.enable_fp8_linear"
    " parallelism.enable_compiled_autograd experimental.enable_compiled_autograd"
    " parallelism.enable_async_tensor_parallel experimental.enable_async_tensor_parallel"
    " checkpoint.enable_first_step_checkpoint checkpoint.create_seed_checkpoint checkpoint.load_only"
    " checkpoint.initial_load_in_hf_quantized activation_checkpoint.debug"
    " activation_checkpoint.visualize_memory_budget_pareto"
    " quantize.linear.float8.enable_fsdp_float8_all_gather"
    " quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    " quantize.linear.float8.force_recompute_fp8_weight_in_bwd float8.enable_float8_linear"
    " float8.enable_fsdp_float8_all_gather float8.precompute_float8_dynamic_scale_for_fsdp"
    " float8.force_recompute_fp8_weight_in_bwd fault_tolerance.enable memory_estimation.enable"
    " memory_estimation.enabled debug.deterministic_warn_only debug.moe_force_load_balance": (False,),
    "job.use_for_integration_test training.enable_loss_parallel parallelism.disable_loss_parallel"
    " activation_checkpoint.early_stop activation_checkpoint.preserve_rng_state"
    " parallelism.pipeline_parallel_expert_parallel_overlap"
    " checkpoint.enable_ft_dataloader_checkpoints": (
        False,
        True,
    ),
    "checkpoint.initial_load_model_only metrics.rank_0_only": (True,),
    "training.tensor_parallel_degree training.sequence_parallel_degree training.gradient_accumulation_steps"
    " parallelism.tensor_parallel_degree parallelism.expert_parallel_degree"
    " parallelism.expert_tensor_parallel_degree": (1,),
    "parallelism.pipeline_parallel_first_stage_less_layers"
    " parallelism.pipeline_parallel_last_stage_less_layers": (0,),
    "job.custom_config_module experimental.custom_import experimental.custom_args_module"
    " parallelism.pipeline_parallel_schedule_csv": ("",),
    "parallelism.pipeline_parallel_split_points experimental.pipeline_parallel_split_points"
    " parallelism.module_fqns_per_model_part": ([],),
    "parallelism.expert_parallel_comm_backend": ("standard",),
    "float8.scaling_type_input float8.scaling_type_weight float8.scaling_type_grad_output"
    " quantize.linear.float8.scaling_type_input quantize.linear.float8.scaling_type_weight"
    " quantize.linear.float8.scaling_type_grad_output": ("dynamic",),
    "checkpoint.interval_type": ("steps",),
    "activation_checkpoint.determinism_check": ("default",),
    "model.attn_mask_type": ("block_causal",),
    "model.norm_type": ("rmsnorm", "fused_rmsnorm"),
    "comm.trace_buf_size": (0, 20000),
}


def _each(answers: dict[str, Any]) -> dict[str, Any]:
    return {key: answer for keys, answer in answers.items() for key in keys.split()}


ANSWERS: dict[str, str] = _each(_ANSWERS)
VALUE_ANSWERS: dict[str, str] = _each(_VALUE_ANSWERS)
NOTHING_ASKED: dict[str, tuple] = _each(_NOTHING_ASKED)
