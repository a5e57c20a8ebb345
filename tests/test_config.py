"""Settings: where they come from, what is refused and with which words."""

import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from chunkflow.settings import answers as answers_module
from chunkflow.settings.config import ConfigError, answer, check_processes, load_config
from chunkflow.settings.keys import KEYS, TABLES, flat, help_text, reference, show, to_toml
from chunkflow.training import build
from chunkflow.training.start import check_paths, main_config, user_errors, world_size
from recipes import finetune
from tests.helpers.processes import REPO, small_assets

pytestmark = pytest.mark.quick

# DESIGN section 5: every section and key with its default (None: unset), and whether this version has it.
CONTRACT = {
    "job.config_file": "",
    "job.dump_folder": "./outputs",
    "job.description": "default job",
    "job.print_config": False,
    "model.name": "llama3",
    "model.flavor": "debugmodel",
    "model.hf_assets_path": "",
    "model.tokenizer_path": "",
    "model.rope_theta": None,
    "model.rope_scaling": None,
    "model.max_positions": None,
    "model.converters": [],
    "model.attention": "default",
    "training.dataset": "python_stdlib",
    "training.columns": {},
    "training.chat_template": "",
    "training.multi_turn": "whole",
    "training.loss_weighting": "token",
    "training.dataset_path": "",
    "training.sources": [],
    "training.global_batch_size": 16,
    "training.seq_len": 8192,
    "training.overlong": "error",
    "training.shuffle": True,
    "training.steps": 100,
    "training.max_norm": 1.0,
    "training.max_bad_steps": 3,
    "training.dtype": "float32",
    "training.mixed_precision_param": "bfloat16",
    "training.mixed_precision_reduce": "float32",
    "training.gc_freq": 50,
    "training.enable_cpu_offload": False,
    "chunkflow.enable": True,
    "chunkflow.chunk_size": 2048,
    "chunkflow.k": 1,
    "chunkflow.fill_tails": True,
    "chunkflow.balance": "cost",
    "chunkflow.keep_attention": "none",
    "chunkflow.kv_offload": "none",
    "chunkflow.memory_budget_gib": None,
    "lora.rank": 0,
    "lora.alpha": None,
    "lora.target_modules": [],
    "lora.adapter_path": "",
    "lora.base": "compute",
    "dpo.beta": 0.1,
    "dpo.label_smoothing": 0.0,
    "dpo.length_normalised": False,
    "optimizer.name": "AdamW",
    "optimizer.lr": 8e-4,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1,
    "optimizer.implementation": "fused",
    "lr_scheduler.warmup_steps": 200,
    "lr_scheduler.decay_ratio": None,
    "lr_scheduler.decay_type": "linear",
    "lr_scheduler.min_lr_factor": 0.0,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": -1,
    "parallelism.fsdp_reshard_after_forward": "default",
    "parallelism.context_parallel_degree": -1,
    "parallelism.pipeline_parallel_degree": 1,
    "parallelism.pipeline_parallel_schedule": "1F1B",
    "parallelism.pipeline_parallel_layers_per_stage": None,
    "checkpoint.enable": False,
    "checkpoint.folder": "checkpoint",
    "checkpoint.interval": 500,
    "checkpoint.keep_latest_k": 10,
    "checkpoint.load_step": -1,
    "checkpoint.async_mode": "disabled",
    "checkpoint.exclude_from_loading": [],
    "checkpoint.last_save_model_only": False,
    "checkpoint.initial_load_path": None,
    "checkpoint.initial_load_in_hf": False,
    "checkpoint.last_save_in_hf": False,
    "checkpoint.export_dtype": "float32",
    "activation_checkpoint.mode": "none",
    "activation_checkpoint.selective_ac_option": "op",
    "compile.enable": False,
    "compile.components": ["model"],
    "compile.backend": "inductor",
    "metrics.log_freq": 10,
    "metrics.enable_tensorboard": True,
    "metrics.enable_wandb": False,
    "metrics.save_tb_folder": "tb",
    "metrics.disable_color_printing": False,
    "quantize.linear.float8.recipe_name": None,
    "quantize.linear.float8.filter_fqns": [],
    "quantize.linear.float8.emulate": False,
    "profiling.enable_profiling": False,
    "profiling.save_traces_folder": "profile_traces",
    "profiling.profile_freq": 10,
    "comm.init_timeout_seconds": 300,
    "comm.train_timeout_seconds": 1800,
    "comm.mode": "default",
    "validation.enable": False,
    "validation.dataset": None,
    "validation.dataset_path": "",
    "validation.freq": 10,
    "validation.steps": -1,
    "debug.seed": None,
    "debug.deterministic": False,
}
CONTRACT_LATER = ["chunkflow.kv_offload"]
CONTRACT_LATER = ["chunkflow.keep_attention"]

# torchtitan's keys, section by section, and older spellings of them.
TORCHTITAN = {
    "job": "config_file dump_folder description print_config save_config_file custom_config_module"
    " print_args",
    "profiling": "enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup"
    " enable_memory_snapshot save_memory_snapshot_folder",
    "metrics": "log_freq enable_tensorboard disable_color_printing save_tb_folder save_for_all_ranks"
    " enable_wandb",
    "model": "name flavor hf_assets_path tokenizer_path converters print_after_conversion",
    "optimizer": "name lr beta1 beta2 eps weight_decay implementation early_step_in_backward",
    "lr_scheduler": "warmup_steps total_steps decay_ratio decay_type min_lr_factor",
    "training": "dataset dataset_path local_batch_size global_batch_size seq_len max_norm steps"
    " enable_cpu_offload dtype mixed_precision_param mixed_precision_reduce gc_freq gc_debug dataloader"
    " batch_size warmup_steps seed deterministic compile data_parallel_degree data_parallel_shard_degree"
    " data_parallel_replicate_degree data_parallel_type tensor_parallel_degree",
    "training.dataloader": "num_workers persistent_workers pin_memory prefetch_factor",
    "parallelism": "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward"
    " tensor_parallel_degree disable_loss_parallel enable_async_tensor_parallel pipeline_parallel_degree"
    " module_fqns_per_model_part pipeline_parallel_first_stage_less_layers"
    " pipeline_parallel_last_stage_less_layers pipeline_parallel_layers_per_stage pipeline_parallel_schedule"
    " pipeline_parallel_schedule_csv pipeline_parallel_microbatch_size"
    " pipeline_parallel_expert_parallel_overlap context_parallel_degree context_parallel_load_balancer"
    " context_parallel_rotate_method expert_parallel_degree expert_tensor_parallel_degree"
    " expert_parallel_comm_backend",
    "checkpoint": "enable enable_ft_dataloader_checkpoints folder interval initial_load_path"
    " initial_load_model_only initial_load_in_hf initial_load_in_hf_quantized last_save_model_only"
    " last_save_in_hf export_dtype async_mode keep_latest_k load_step exclude_from_loading"
    " enable_first_step_checkpoint create_seed_checkpoint load_only enable_checkpoint interval_type"
    " model_weights_only",
    "activation_checkpoint": "mode selective_ac_option per_op_sac_force_recompute_mm_shapes_by_fqns"
    " early_stop memory_budget visualize_memory_budget_pareto preserve_rng_state determinism_check debug",
    "compile": "enable components backend",
    "quantize.linear.float8": "enable_fsdp_float8_all_gather precompute_float8_dynamic_scale_for_fsdp"
    " recipe_name filter_fqns emulate",
    "quantize.linear.mx": "recipe_name mxfp8_dim1_cast_kernel_choice filter_fqns",
    "quantize.grouped_mm": "mx",
    "float8": "enable_float8_linear enable_fsdp_float8_all_gather",
    "comm": "init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder"
    " save_traces_file_prefix mode",
    "memory_estimation": "enable disable_fake_mode",
    "fault_tolerance": "enable process_group process_group_timeout_ms replica_id group_size min_replica_size"
    " semi_sync_method",
    "experimental": "custom_import custom_args_module pipeline_parallel_degree pipeline_parallel_split_points"
    " pipeline_parallel_microbatches context_parallel_degree",
    "validation": "enable dataset dataset_path local_batch_size seq_len freq steps dataloader",
    "debug": "seed deterministic deterministic_warn_only moe_force_load_balance",
}


def get(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(list(argv))
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def toml(folder: Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return f"--job.config_file={path}"


def test_defaults_are_the_contract():
    assert flat(load_config([])) == CONTRACT


def test_precedence_command_line_over_file_over_default(tmp_path):
    file = toml(tmp_path, "[training]\nsteps = 7\nseq_len = 64\n[optimizer]\nlr = 1\n")
    config = load_config(["--training.steps", "9", file])
    assert (config.training.steps, config.training.seq_len, config.training.gc_freq) == (9, 64, 50)
    assert config.optimizer.lr == 1.0 and type(config.optimizer.lr) is float
    assert load_config([file, "--training.steps=3", "--training.steps=4"]).training.steps == 4


@pytest.mark.parametrize(
    "argv, key, value",
    [
        ("--training.steps 3", "training.steps", 3),
        ("--training.steps=3", "training.steps", 3),
        ("--parallelism.data_parallel_shard_degree -1", "parallelism.data_parallel_shard_degree", -1),
        ("--optimizer.lr 1e-3", "optimizer.lr", 1e-3),
        ("--optimizer.lr=0", "optimizer.lr", 0.0),
        ("--compile.enable", "compile.enable", True),
        ("--compile.enable --training.steps=3", "compile.enable", True),
        ("--compile.enable=true", "compile.enable", True),
        ("--compile.enable False", "compile.enable", False),
        ("--training.no_shuffle", "training.shuffle", False),
        ("--training.no_shuffle --training.shuffle", "training.shuffle", True),
        ("--compile.components model,model", "compile.components", ["model", "model"]),
        ("--compile.components=", "compile.components", []),
        ("--job.description=a=b", "job.description", "a=b"),
        ("--lr_scheduler.decay_ratio 0.5 --lr_scheduler.decay_ratio none", "lr_scheduler.decay_ratio", None),
        ("--debug.seed 5", "debug.seed", 5),
    ],
)
def test_forms_of_the_command_line(argv, key, value):
    assert get(load_config(argv.split(" ")), key) == value


def test_tables():
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "truncate": False,
    }
    text = '{ rope_type = "yarn", factor = 4, original_max_position_embeddings = 32768, truncate = false }'
    assert load_config(["--model.rope_scaling", text]).model.rope_scaling == scaling
    assert "model.rope_scaling.factr" in refusal("--model.rope_scaling", "{ factr = 4 }")
    assert 'did you mean "factor"?' in refusal("--model.rope_scaling={ factr = 4 }")
    assert "model.rope_scaling.factor = true is not a finite number" in refusal(
        "--model.rope_scaling={ factor = true }"
    )
    assert "is not a table" in refusal("--model.rope_scaling=yarn")
    assert "has no rope_type" in refusal("--model.rope_scaling={ factor = 4 }")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--trainng.steps=3"], "unknown key --trainng.steps: did you mean --training.steps?"),
        (["--training.stepz", "3"], "did you mean --training.steps?"),
        (["--training.lr=3"], "did you mean --optimizer.lr?"),
        (["--steps=3"], "did you mean --training.steps?"),
        (["--training.global-batch-size=3"], "did you mean --training.global_batch_size?"),
        (["--zzz"], "--help"),
        (["--training.shufle"], "did you mean --training.shuffle?"),
        (["--training", "3"], "--training is a section: set one of its keys"),
        (["steps"], "'steps' is not an option"),
        (["--training.steps"], "--training.steps has no value"),
        (["--training.steps", "--compile.enable"], "--training.steps has no value"),
        (["--training.no_shuffle=true"], "write --training.no_shuffle or --training.shuffle=true"),
        (["--training.no_steps=1"], "unknown key --training.no_steps"),
        (
            ["--training.steps=1.5"],
            "training.steps = 1.5 is not a whole number: write it like training.steps = 10",
        ),
        (["--training.steps=1e3"], "is not a whole number"),
        (
            ["--chunkflow.k=autto"],
            'chunkflow.k = autto is neither a whole number nor "auto": write it like chunkflow.k = 10',
        ),
        (["--chunkflow.chunk_size=0"], "chunkflow.chunk_size = 0 is out of range"),
        (["--training.steps=0"], "training.steps = 0 is out of range: choose a value of at least 1"),
        (["--training.global_batch_size", "-1"], "of at least 1"),
        (["--chunkflow.chunk_size=0"], "of at least 1"),
        (["--chunkflow.k=0"], "of at least 1"),
        (["--training.seq_len=0"], "of at least 1"),
        (["--metrics.log_freq=0"], "of at least 1"),
        (["--optimizer.lr=-1e-3"], "of at least 0"),
        (["--optimizer.lr=nan"], "optimizer.lr = nan is not a finite number"),
        (["--optimizer.lr=inf"], "optimizer.lr = inf is not a finite number"),
        (["--optimizer.lr=fast"], "optimizer.lr = fast is not a finite number"),
        (["--optimizer.beta1=1"], "less than 1"),
        (["--training.max_norm=0"], "greater than 0"),
        (["--lr_scheduler.decay_ratio=1.5"], "between 0 and 1"),
        (["--lr_scheduler.min_lr_factor=2"], "between 0 and 1"),
        (["--lr_scheduler.warmup_steps=-1"], "of at least 0"),
        (["--parallelism.data_parallel_shard_degree=0"], "or -1"),
        (["--debug.seed=-1"], "from 0"),
        (["--compile.enable=maybe"], "is not true or false"),
        (
            ["--compile.components=model,loss"],
            'compile.components = "loss" is not compiled, head and loss run in slices',
        ),
        (
            ["--training.overlong=trunc"],
            'choose one of "error", "truncate", "drop" (did you mean "truncate"?)',
        ),
        (["--optimizer.name=adamw"], 'choose one of "AdamW"'),
        (["--optimizer.name=AdamW4bit"], 'cannot shard its state: set optimizer.name = "AdamW8bit"'),
        (["--optimizer.name=AdamWFp8"], 'cannot shard its state: set optimizer.name = "AdamW8bit"'),
        (["--model.converters=quantize.linear.float8"], 'was renamed: set model.converters = ["float8"]'),
        (["--model.converters=mx"], "MX formats are not supported"),
        (["--quantize.linear.float8.recipe_name=row"], '(did you mean "rowwise"?)'),
        (["--training.dataset=allenai/c4"], "hub names are not read"),
        (["--training.dataset=jsonl"], "set training.dataset_path"),
        (
            ["--training.dataset=synthetic", "--training.dataset_path=short"],
            '"lmsys", "llama3_sft", "agent", "prolong" or "preference"',
        ),
        (["--training.dataset_path=data.jsonl"], "is not read by"),
        (["--training.dtype=bfloat16"], "training.mixed_precision_param"),
        (["--training.dtype=float64", "--training.mixed_precision_param=bfloat16"], "contradicts"),
        (["--training.mixed_precision_param=float64"], 'training.dtype = "float64"'),
        (["--training.mixed_precision_reduce=float64"], 'training.dtype = "float64"'),
        (["--activation_checkpoint.selective_ac_option=ops"], "every second layer"),
        (["--activation_checkpoint.mode=memory_budget"], "chunkflow.k"),
        (["--comm.mode=local_tensor"], "fake_backend"),
        (["--job.config_file=nowhere.toml"], 'job.config_file = "nowhere.toml" cannot be read'),
    ],
)
def test_refusals_on_the_command_line(argv, words):
    assert words in refusal(*argv)


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("[chunkflow]\nk = 'many'\n", 2, 'chunkflow.k = "many" is neither a whole number nor "auto"'),
        ("[training]\nsteps = 'many'\n", 2, 'training.steps = "many" is not a whole number'),
        ("[training]\nsteps = true\n", 2, "training.steps = true is not a whole number"),
        ("[training]\nsteps = 1.0\n", 2, "training.steps = 1.0 is not a whole number"),
        ("[training]\n\nsteps = [1]\n", 3, "training.steps = [1] is not a whole number"),
        ("[training]\nshuffle = 1\n", 2, "training.shuffle = 1 is not true or false"),
        ("[optimizer]\nlr = '1e-3'\n", 2, "is not a finite number"),
        ("[optimizer]\nlr = true\n", 2, "is not a finite number"),
        ("[optimizer]\nlr = inf\n", 2, "is not a finite number"),
        ("[compile]\ncomponents = 'model'\n", 2, "is not a list of strings"),
        ("[compile]\ncomponents = [1]\n", 2, "is not a list of strings"),
        (
            "[activation_checkpoint]\nselective_ac_option = 2\n",
            2,
            "is not a string: write it like activation_checkpoint.",
        ),
        ("[job]\n[trainng]\nsteps = 1\n", 2, "unknown section trainng: did you mean training?"),
        ("[training]\nsteps = 1\nstep = 2\n", 3, "unknown key training.step: did you mean training.steps?"),
        ("steps = 1\n", None, "unknown key steps: did you mean training.steps?"),
        ("training = 1\n", None, "training is a section"),
        ("[[training]]\nsteps = 1\n", 1, "training is a section"),
        ("[training.steps]\nmany = 1\n", 1, "is not a whole number"),
        (
            "[training]\nlocal_batch_size = 8\n",
            2,
            "training.local_batch_size is not used: set training.global_batch_size",
        ),
        ("[training]\nno_shuffle = true\n", 2, "did you mean training.shuffle?"),
        ("[fault_tolerance]\nenable = true\n", 2, "fault_tolerance.enable is not used"),
        ("[experimental]\npipeline_parallel_degree = 2\n", 2, "parallelism.pipeline_parallel_degree"),
        (
            "[checkpoint]\nenable_checkpoint = false\n",
            2,
            "checkpoint.enable_checkpoint was renamed: set checkpoint.enable",
        ),
        (
            "[quantize.linear.float8]\nemulate = 1\n",
            2,
            "quantize.linear.float8.emulate = 1 is not true or false",
        ),
        ("[quantize.linear.float8]\nenable_fsdp_float8_all_gather = true\n", 2, "is not used"),
        (
            "[quantize.linear.mx]\nfilter_fqns = []\n",
            None,
            "quantize.linear.mx.filter_fqns is not used: MX formats",
        ),
        ("[quantize.linear]\nfloat8 = true\n", None, "is a section"),
        ("[job]\nconfig_file = 'x.toml'\n", 2, "belongs on the command line"),
        ("[training]\nsteps = \n", 2, "not valid TOML"),
        ("[training]\nsteps = 1\nsteps = 2\n", 3, "not valid TOML"),
        ("[training\n", 1, "not valid TOML"),
    ],
)
def test_refusals_in_a_file_name_file_and_line(tmp_path, text, line, words):
    sentence = refusal(toml(tmp_path, text))
    assert words in sentence
    place = f"{tmp_path / 'run.toml'}:" + (f"{line}: " if line else "")
    assert sentence.startswith(place), sentence


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"[job]\ndescription = '\xff'\n")
    assert "not UTF-8" in refusal(f"--job.config_file={tmp_path / 'run.toml'}")


@pytest.mark.parametrize("key", CONTRACT_LATER)
def test_keys_of_the_contract_that_come_later_say_so(key):
    if key in KEYS:
        return  # it came
    assert f"{key} is not available in this version" in refusal(f"--{key}=x")


@pytest.mark.parametrize("section", TORCHTITAN)
def test_every_torchtitan_key_exists_or_is_answered(section, tmp_path):
    for name in TORCHTITAN[section].split():
        key = f"{section}.{name}"
        if key not in KEYS:
            assert answer(key), key
            assert f"--{key} {answer(key)}" in refusal(f"--{key}=2")
            assert answer(key) in refusal(toml(tmp_path, f"[{section}]\n{name} = 2\n"))


def test_answers_are_for_keys_that_do_not_exist_and_name_keys_that_do():
    answers = answers_module.ANSWERS
    assert not set(answers) & set(KEYS)
    known = {*KEYS, *CONTRACT_LATER}
    sections = {key.partition(".")[0] for key in known}
    for key, sentence in answers.items():
        for word in sentence.replace(",", " ").replace(":", " ").split():
            if word.partition(".")[0] in sections and "." in word and not word.endswith((".jsonl", ".toml")):
                assert any(name == word or name.startswith(word + ".") for name in known), (key, word)
    for key in answers_module.VALUE_ANSWERS:
        assert key.partition("=")[0] in KEYS


def test_values_that_ask_for_nothing_pass(tmp_path):
    for key, values in answers_module.NOTHING_ASKED.items():
        assert key not in KEYS
        section, _, name = key.rpartition(".")
        for value in values:
            assert load_config([toml(tmp_path, f"[{section}]\n{name} = {show(value)}\n")]) == load_config([])
            text = value if isinstance(value, str) else show(value)
            assert load_config([f"--{key}={text}"]) == load_config([f"--{key}", text]) == load_config([])
    assert load_config(["--parallelism.no_enable_async_tensor_parallel"]) == load_config([])
    assert "is not there yet" in refusal("--parallelism.tensor_parallel_degree=true"), "true is not 1"
    assert "is not there yet" in refusal("--parallelism.enable_async_tensor_parallel")
    off = toml(tmp_path, '[fault_tolerance]\nenable = false\nprocess_group = "nccl"\n[experimental]\n')
    assert load_config([off]) == load_config([])


def test_all_that_is_wrong_is_said_at_once(no_torchrun, monkeypatch, capsys, tmp_path):
    """Once for each fault, and nothing that only follows from another."""
    (tmp_path / "run.toml").write_text(
        """
        [model]
        name = "lama3"
        tokenizer_path = "none"
        [training]
        steps = "many"
        seq_len = 0
        local_batch_size = 4
        dataset = "c4"
        dataset_path = "none.jsonl"
        dtype = "float64"
        mixed_precision_param = "bfloat16"
        [validation]
        enable = true
        dataset = "jsonl"
        [parallelism]
        tensor_parallel_degree = 1
        data_parallel_replicate_degree = 3
        pipeline_parallel_degree = 2
        fsdp_reshard_after_forward = "always"
        [optimizer]
        name = "AdamW8bit"
        """
    )
    monkeypatch.setenv("NGPU", "4")
    argv = [f"--job.config_file={tmp_path / 'run.toml'}", f"--job.dump_folder={tmp_path / 'run.toml'}"]
    argv += ["--training.stepz", "3", "--optimizer.lr=fast", "more", "--check"]
    assert ends(argv, check=build.check) == 2
    said = capsys.readouterr().err.splitlines()
    expected = [
        "unknown key --training.stepz",
        "optimizer.lr = fast is not",
        "'more' is not an option",
        "6: training.steps",
        "7: training.seq_len = 0",
        "8: training.local_batch_size",
        '9: training.dataset = "c4"',
        'training.mixed_precision_param = "bfloat16" contradicts',
        'validation.dataset = "jsonl" has no data',
        'model.tokenizer_path = "none" does not exist',
        "job.dump_folder",
        'parallelism.fsdp_reshard_after_forward = "always"',
        'model.name = "lama3" is not admitted',
        'optimizer.name = "AdamW8bit" computes in float32',
        "parallelism.data_parallel_replicate_degree = 3 x pipeline_parallel_degree = 2 does not divide 4",
    ]
    assert len(said) == len(expected), said
    for sentence, start in zip(said, expected):
        assert sentence.startswith("error: ") and start in sentence, (sentence, start)


@pytest.mark.parametrize("recipe", ["finetune", "plan", "preview"])
def test_recipes_say_at_once_what_is_wrong_with_keys_folders_and_data(
    recipe, no_torchrun, monkeypatch, capsys, tmp_path
):
    """Of a folder whose sizes are known, also what its tokenizer, stages and weights lack."""
    monkeypatch.setenv("NGPU", "4")
    assets = small_assets(tmp_path / "model")
    missing = tmp_path / "missing"
    argv = [
        f"--job.dump_folder={tmp_path / 'run'}", "--training.colour=3", "--chunkflow.chunk_size=-4",
        "--training.dataset=jsonl", f"--training.dataset_path={missing}.jsonl",
        f"--training.chat_template={missing}.jinja", "--parallelism.pipeline_parallel_degree=4", "--lora.rank=2",
        "--lora.target_modules=wq,wz",
    ]  # fmt: skip
    keys, data = (
        ["unknown key --training.colour", "chunkflow.chunk_size = -4"],
        f"{missing}.jsonl: no such file",
    )
    template = f'training.chat_template = "{missing}.jinja" is no shipped template'
    without = ["model.safetensors cannot be read"] if recipe != "preview" else []
    for model, expected in (
        (
            [f"--model.hf_assets_path={missing}"],
            [*keys, "missing/config.json cannot be read", data, template],
        ),
        (
            [assets, f"--model.tokenizer_path={tmp_path}", "--checkpoint.initial_load_in_hf"],
            [*keys, data, template, "tokenizer", "4 stages, but", 'lora.target_modules has "wz"', *without],
        ),
    ):
        if recipe == "finetune":
            assert ends([*argv, *model, "--check"], check=finetune.check) == 2
        else:
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(REPO / "recipes" / f"{recipe}.py"))["main"]([*argv, *model])
            assert end.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(expected), said
        for sentence, part in zip(said, expected):
            assert sentence.startswith("error: ") and part in sentence, (sentence, part)


def test_a_torchtitan_config_is_told_what_translates_it(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config([toml(tmp_path, "[training]\nbatch_size = 1\nwarmup_steps = 2\n")])
    *answered, hint = str(error.value).split("\n")
    assert len(answered) == 2
    assert f"python -m chunkflow.settings.from_torchtitan {tmp_path / 'run.toml'} translates it" in hint


def test_a_file_that_cannot_be_read_is_said_with_the_command_lines_faults_alone(no_torchrun, capsys):
    assert ends(["--job.config_file=none.toml", "--training.stepz=3", "--model.flavor=9B"]) == 2
    assert [line.split(":")[1][:14] for line in capsys.readouterr().err.splitlines()] == [
        " unknown key -",
        " job.config_fi",
    ]


def test_fp64_computes_in_fp64():
    training = load_config(["--training.dtype=float64"]).training
    assert (training.mixed_precision_param, training.mixed_precision_reduce) == ("float64", "float64")
    training = load_config(["--training.dtype=float64", "--training.mixed_precision_param=float32"]).training
    assert training.mixed_precision_param == "float64"


def test_saved_config_loads_as_an_equal_one(tmp_path):
    config = load_config(
        [
            '--job.description=tab\t "quotes" \\ \x7f \x01 é 🙂',
            "--training.dtype=float64",
            "--optimizer.lr=1e-7",
            "--optimizer.eps=1e-22",
            "--lr_scheduler.decay_ratio=0.1",
            "--debug.seed=3",
            "--compile.components=model,model",
            "--training.no_shuffle",
            "--model.rope_scaling={ rope_type = 'linear', factor = 2 }",
        ]
    )
    again = load_config([toml(tmp_path, to_toml(config))])
    assert again == config
    assert to_toml(again) == to_toml(config)
    assert load_config([toml(tmp_path, to_toml(load_config([])))]) == load_config([])
    assert dataclasses.replace(config, debug=load_config([]).debug) != config


def test_flat_has_the_value_of_every_key():
    values = flat(load_config(["--training.steps=3", "--quantize.linear.float8.emulate"]))
    assert values == CONTRACT | {"training.steps": 3, "quantize.linear.float8.emulate": True}


def test_help_begins_with_examples_and_has_every_key_default_and_document_line(capsys):
    with pytest.raises(SystemExit) as end:
        load_config(["--training.steps=3", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text() and max(map(len, text.split("\n"))) <= 110
    assert text.startswith("usage: ") and text.index("./run_train.sh --training.steps=20") < text.index(
        "[job]"
    )
    words = " ".join(text.split())
    for name, key in KEYS.items():
        shown = f"[[{name}]]" if name in TABLES else f"--{name} ("
        assert shown in text and key.field.metadata["doc"] in words
    assert (
        "--training.seq_len (8192)" in text
        and '--training.overlong ("error")' in text
        and "--debug.seed (unset)" in text
    )


def test_the_examples_of_help_are_good(no_torchrun, tmp_path, monkeypatch):
    (tmp_path / "my_rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    examples = [
        line.split("./run_train.sh ")[1] for line in help_text().split("\n") if line.startswith("  ./")
    ]
    examples += [
        line.split("./run_train.sh ")[1] for line in help_text().split("\n") if line.startswith("  N")
    ]
    assert len(examples) == 4
    for example in examples:
        assert ends([*example.split(), "--check"]) == 0, example


def test_the_reference_is_current():
    """Else: python -m chunkflow.settings.keys > docs/configuration.md"""
    assert (Path(__file__).parent.parent / "docs/configuration.md").read_text() == reference()


@pytest.mark.parametrize(
    "replicas, shards, stages, processes, good",
    [
        (1, -1, 1, 1, True),
        (1, -1, 1, 5, True),
        (2, -1, 1, 4, True),
        (2, -1, 1, 5, False),
        (1, 4, 1, 4, True),
        (1, 4, 1, 8, False),
        (2, 2, 1, 4, True),
        (1, -1, 3, 4, False),
        (1, 2, 2, 4, True),
        (8, 1, 1, 4, False),
    ],
)
def test_degrees_and_processes(replicas, shards, stages, processes, good):
    config = load_config([])
    config.parallelism.data_parallel_replicate_degree = replicas
    config.parallelism.data_parallel_shard_degree = shards
    config.parallelism.pipeline_parallel_degree = stages
    if good:
        check_processes(config, processes)
    else:
        with pytest.raises(ConfigError, match=f"{processes}, the number of processes: set .*NGPU"):
            check_processes(config, processes)


def paths_refusal(*argv: str) -> str:
    with pytest.raises(ValueError) as error:
        check_paths(load_config(list(argv)))
    return str(error.value)


def test_paths(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "file").write_text("")
    folder = f"--job.dump_folder={tmp_path / 'new' / 'run'}"
    check_paths(load_config([folder]))
    for data in ("data.jsonl", "*.jsonl", ""):
        check_paths(
            load_config([folder, "--training.dataset=jsonl", f"--training.dataset_path={tmp_path / data}"])
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "file"], (
        "a check leaves nothing"
    )
    for data in ("none.jsonl", "*.json", "none/"):
        assert str(tmp_path) in paths_refusal(
            folder, "--training.dataset=jsonl", f"--training.dataset_path={tmp_path / data}"
        )
    assert "model.tokenizer_path" in paths_refusal(
        folder, f"--model.tokenizer_path={tmp_path / 'none.model'}"
    )
    assert "job.dump_folder" in paths_refusal(f"--job.dump_folder={tmp_path / 'file'}")
    assert "job.dump_folder" in paths_refusal(f"--job.dump_folder={tmp_path / 'file' / 'below'}")


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)


def ends(argv, **more) -> int:
    with pytest.raises(SystemExit) as end:
        main_config(argv, **more)
    return end.value.code


def test_main_config(no_torchrun, monkeypatch, capsys, tmp_path):
    good = [f"--job.dump_folder={tmp_path / 'run'}"]
    assert main_config([*good, "--training.steps=3"]).training.steps == 3
    assert capsys.readouterr().out == ""
    assert main_config([*good, "--job.print_config"]).job.print_config
    assert "[training]\n" in capsys.readouterr().out
    assert ends([*good, "--check"]) == 0
    assert ends([*good, "--check", "--training.stepz=3"]) == 2
    assert capsys.readouterr().err == "error: unknown key --training.stepz: did you mean --training.steps?\n"

    def refuse(config):
        raise ValueError(f"{config.training.steps} steps are too many: take 1")

    assert ends(good, check=refuse) == 2
    assert capsys.readouterr().err == "error: 100 steps are too many: take 1\n"

    two = [*good, "--parallelism.data_parallel_shard_degree=2"]
    assert ends(two) == 2
    monkeypatch.setenv("NGPU", "2")
    assert ends(two) == 2, "without torchrun there is one process, whatever NGPU says"
    assert ends([*two, "--check"]) == 0
    assert main_config(two, planned=True) == main_config([*two, "--comm.mode=default"], planned=True)
    assert main_config([*two, "--comm.mode=fake_backend"]).comm.mode == "fake_backend"
    monkeypatch.setenv("NNODES", "2")
    assert ends([*two, "--check"]) == 2
    monkeypatch.setenv("NNODES", "zwei")
    assert ends([*two, "--check"]) == 2
    assert "NNODES = zwei" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main_config(two) == main_config(two)

    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    assert ends([*two, "--training.stepz=3"]) == 2
    assert capsys.readouterr().err == "", "one rank speaks"


def test_world_size(no_torchrun, monkeypatch):
    assert (world_size(), world_size(planned=True)) == (1, 1)
    monkeypatch.setenv("NGPU", "4")
    monkeypatch.setenv("NNODES", "2")
    assert (world_size(), world_size(planned=True)) == (1, 8)
    monkeypatch.setenv("NGPU", "")
    assert world_size(planned=True) == 2
    monkeypatch.setenv("NGPU", "0")
    with pytest.raises(ConfigError, match="NGPU = 0 in the environment is not a whole number of at least 1"):
        world_size(planned=True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (world_size(), world_size(planned=True)) == (3, 3)


def test_wrong_data_ends_rank_0_with_its_sentence(no_torchrun, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as end, user_errors():
        raise ValueError("data.jsonl:3: wrong")
    assert end.value.code == 1 and capsys.readouterr().err == "error: data.jsonl:3: wrong\n"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="data.jsonl:3"), user_errors():
        raise ValueError("data.jsonl:3: wrong")
    monkeypatch.setenv("CHUNKFLOW_CONTROL", str(tmp_path))
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("data.jsonl:3: wrong")
    assert (tmp_path / "error_of_rank_1").read_text() == "data.jsonl:3: wrong"


def test_settings_are_read_without_torch():
    root = Path(__file__).parent.parent
    code = (
        "import sys; from chunkflow.training.start import read_config; read_config([]); assert 'torch'"
        " not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(root)}
    )


def test_shipped_configs_load():
    files = sorted((Path(__file__).parent.parent / "train_configs").glob("*.toml"))
    assert files
    for file in files:
        assert load_config([f"--job.config_file={file}"]).job.config_file == str(file)


@pytest.mark.parametrize("key", ["chunk_size", "k"])
def test_auto_or_a_number(key, tmp_path):
    for text, value in (("auto", "auto"), ("3", 3)):
        assert getattr(load_config([f"--chunkflow.{key}={text}"]).chunkflow, key) == value
    file = tmp_path / "my.toml"
    file.write_text(f'[chunkflow]\n{key} = "auto"\n')
    config = load_config(["--job.config_file", str(file)])
    assert getattr(config.chunkflow, key) == "auto"
    file.write_text(to_toml(config))
    assert load_config(["--job.config_file", str(file)]) == config
    assert f"--chunkflow.{key}" in help_text() and 'of at least 1 or "auto"]' in help_text()
