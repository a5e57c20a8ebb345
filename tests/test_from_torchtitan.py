"""torchtitan's configs of each time, translated: the settings, their reasons, and that they pass --check."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from chunkflow.settings import from_torchtitan, torchtitan
from chunkflow.settings.config import load_config
from chunkflow.settings.keys import KEYS, flat
from chunkflow.settings.values import answer
from chunkflow.training.start import main_config
from models import families

pytestmark = pytest.mark.quick

REPO = Path(__file__).parent.parent

# Small configs in the shape of each time: sections, spellings and kinds of values as torchtitan had them.
AUTUMN_2024 = """
[job]
dump_folder = "OUT"
use_for_integration_test = true
[profiling]
enable_profiling = true
save_traces_folder = "profile_trace"
[metrics]
enable_color_printing = true
rank_0_only = true
[model]
name = "llama3"
flavor = "8B"
norm_type = "rmsnorm"  # layernorm / np_layernorm / rmsnorm
tokenizer_path = "TOKENIZER"
[optimizer]
name = "AdamW"
lr = 3e-4
fused = true
[training]
seed = 2020
batch_size = 3
seq_len = 8192
warmup_steps = 20
steps = 1000
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 2
compile = true
dataset = "c4"
[experimental]
context_parallel_degree = 2
pipeline_parallel_degree = 2
pipeline_parallel_split_points = ["layers.16"]
pipeline_parallel_schedule = "interleaved_1f1b"
enable_async_tensor_parallel = false
[checkpoint]
enable_checkpoint = false
interval_type = "steps"
interval = 50
model_weights_only = true
[activation_checkpoint]
mode = 'selective'
selective_ac_option = 'op'
[float8]
enable_float8_linear = false
enable_fsdp_float8_all_gather = true
scaling_type_input = "dynamic"
[memory_estimation]
enabled = false
disable_fake_mode = true
"""
EARLY_2024 = """
[profiling]
run_profiler = true
profile_every_x_iter = 7
[model]
name = "llama3"
flavor = "debugmodel"
tokenizer_path = "TOKENIZER"
[training]
batch_size = 8
data_parallel_degree = 4
sequence_parallel_degree = 1
pipeline_parallel_degree = 1
dataset = "alpaca"
"""
SPRING_2025 = """
[job]
dump_folder = "OUT"
print_args = false
[metrics]
disable_color_printing = true
enable_wandb = false
[model]
name = "llama3"
flavor = "70B"
tokenizer_path = "TOKENIZER"
converters = "float8"
[lr_scheduler]
warmup_steps = 6
lr_min = 0.1
[training]
local_batch_size = 2
seq_len = 8192
steps = 3000
compile = true
dataset = "c4"
[parallelism]
data_parallel_shard_degree = 8
tensor_parallel_degree = 8
enable_async_tensor_parallel = true
pipeline_parallel_degree = 1
[checkpoint]
enable_checkpoint = true
[activation_checkpoint]
mode = 'full'
[float8]
enable_fsdp_float8_all_gather = true
filter_fqns = "output,layers.0"
"""
LAST = """
[job]
dump_folder = "OUT"
[metrics]
log_freq = 10
enable_tensorboard = false
[model]
name = "qwen3"
flavor = "1.7B"
hf_assets_path = "ASSETS"
converters = []
[optimizer]
lr = 8e-4
eps = 1e-8
[training]
local_batch_size = 4
seq_len = 4096
steps = 100
dataset = "c4"
[training.dataloader]
num_workers = 2
[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
fsdp_reshard_after_forward = "default"
tensor_parallel_degree = 1
context_parallel_degree = 1
pipeline_parallel_schedule = "Interleaved1F1B"
[checkpoint]
enable = false
interval = 50
last_save_model_only = false
export_dtype = "float16"
[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"
[compile]
enable = false
components = ["model", "loss"]
[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]
[validation]
enable = false
dataset = "c4_validation"
steps = 10
[fault_tolerance]
enable = false
group_size = 2
"""
SHAPES = {
    "early 2024": EARLY_2024,
    "autumn 2024": AUTUMN_2024,
    "spring 2025": SPRING_2025,
    "last": LAST,
}


@pytest.fixture
def translate(tmp_path, monkeypatch, capsys):
    """Text of theirs -> the config that ours is, and ours as text; for NGPU processes."""
    for name in ("RANK", "WORLD_SIZE", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "assets").mkdir()
    shutil.copy(REPO / "chunkflow/data/python_2048.model", tmp_path / "assets/tokenizer.model")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def call(text: str, ngpu: int = 8):
        monkeypatch.setenv("NGPU", str(ngpu))
        names = {"OUT": "out", "TOKENIZER": "assets/tokenizer.model", "ASSETS": "assets"}
        for name, path in names.items():
            text = text.replace(f'"{name}"', f'"{tmp_path / path}"')
        (tmp_path / "theirs.toml").write_text(text)
        from_torchtitan.main([str(tmp_path / "theirs.toml")])
        ours = capsys.readouterr().out
        (tmp_path / "ours.toml").write_text(ours)
        faults = {}
        config = load_config([f"--job.config_file={tmp_path / 'ours.toml'}"], faults)
        assert set(faults.values()) <= {"training.dataset_path", "validation.dataset_path"}, faults
        return config, ours

    call.ours, call.rows = tmp_path / "ours.toml", tmp_path / "rows.jsonl"
    return call


@pytest.mark.parametrize("shape", SHAPES)
def test_it_passes_the_check_once_the_data_is_named(translate, shape, monkeypatch):
    translate(SHAPES[shape])
    recipe = runpy.run_path(str(REPO / "recipes/finetune.py"), run_name="recipe")
    argv = [f"--job.config_file={translate.ours}", "--check", "--quantize.linear.float8.emulate"]
    monkeypatch.setattr(
        "chunkflow.training.optimizer._compiles_nothing", lambda: True
    )  # no C++ compiler asked
    if shape == "early 2024":
        monkeypatch.setenv("NGPU", "4")
    for named, status in (([], 2), ([f"--training.dataset_path={translate.rows}"], 0)):
        with pytest.raises(SystemExit) as end:
            main_config([*argv, *named], check=recipe["check"], chooses=True)
        assert end.value.code == status


def test_the_shape_of_autumn_2024(translate):
    config, text = translate(AUTUMN_2024, 16)
    training, parallel = config.training, config.parallelism
    # 16 processes are 2 data-parallel ranks for torchtitan, with 2 x 2 x 2 of the other kinds
    assert (training.global_batch_size, training.seq_len, training.steps) == (6, 8192, 1000)
    assert (parallel.pipeline_parallel_degree, parallel.pipeline_parallel_schedule) == (2, "Interleaved1F1B")
    assert (
        parallel.context_parallel_degree == -1 and "context_parallel_degree = 2 is left to the plan" in text
    )
    assert config.debug.seed == 2020 and config.lr_scheduler.warmup_steps == 20
    assert config.compile.enable and config.optimizer.implementation == "fused"
    assert not config.metrics.disable_color_printing and config.model.converters == []
    assert config.checkpoint.last_save_model_only and not config.checkpoint.enable
    for comment in (
        "warmup_steps = 20  # was training.warmup_steps",
        "# left out: parallelism.tensor_parallel_degree = 2 is not there yet",
        '# left out: experimental.pipeline_parallel_split_points = ["layers.16"] is not used',
        "# left out: quantize.linear.float8.enable_fsdp_float8_all_gather = true is not used",
        '# dataset = "c4" is not read by that name: save it as JSONL or parquet',
    ):
        assert comment in text
    for nothing in (
        "norm_type",
        "rank_0_only",
        "scaling_type",
        "memory_estimation",
        "async_tensor",
        "integr",
    ):
        assert nothing not in text


def test_the_shapes_of_early_2024_and_spring_2025(translate):
    config, text = translate(EARLY_2024)
    assert (config.profiling.enable_profiling, config.profiling.profile_freq) == (True, 7)
    assert config.parallelism.data_parallel_shard_degree == 4 and config.training.global_batch_size == 32
    config, text = translate(SPRING_2025, 64)
    assert config.training.global_batch_size == 16
    assert config.parallelism.data_parallel_shard_degree == -1, "64 ranks share data here, 8 did there"
    assert config.model.converters == ["float8"] and config.lr_scheduler.min_lr_factor == 0.1
    assert config.quantize.linear.float8.filter_fqns == ["output", "layers.0"]
    assert config.checkpoint.enable and config.activation_checkpoint.mode == "full"
    assert "enable_wandb = false" in text and "print_config = false" in text


def test_the_last_shape(translate):
    config, text = translate(LAST)
    assert config.training.global_batch_size == 32 and config.compile.components == ["model"]
    assert config.model.hf_assets_path == "" and config.model.tokenizer_path.endswith("assets")
    assert "pipeline_parallel_schedule" not in text and "c4_validation" not in text
    assert "# left out: training.dataloader.num_workers = 2 is not used" in text
    assert config.checkpoint.export_dtype == "float16" and not config.checkpoint.last_save_model_only
    assert "fault_tolerance" not in text


def test_torchtitans_defaults_are_written_where_ours_differ(translate):
    """Their defaults of the keys that both have, as their last TOML version has them."""
    theirs = {
        "job.dump_folder": "./outputs",
        "job.description": "default job",
        "job.print_config": False,
        "profiling.enable_profiling": False,
        "profiling.save_traces_folder": "profile_traces",
        "profiling.profile_freq": 10,
        "metrics.log_freq": 10,
        "metrics.enable_tensorboard": False,
        "metrics.disable_color_printing": False,
        "metrics.save_tb_folder": "tb",
        "model.name": "llama3",
        "model.flavor": "debugmodel",
        "model.converters": [],
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
        "training.seq_len": 2048,
        "training.max_norm": 1.0,
        "training.steps": 10000,
        "training.enable_cpu_offload": False,
        "training.dtype": "float32",
        "training.mixed_precision_param": "bfloat16",
        "training.mixed_precision_reduce": "float32",
        "training.gc_freq": 50,
        "parallelism.data_parallel_replicate_degree": 1,
        "parallelism.data_parallel_shard_degree": -1,
        "parallelism.fsdp_reshard_after_forward": "default",
        "parallelism.pipeline_parallel_degree": 1,
        "parallelism.pipeline_parallel_layers_per_stage": None,
        "parallelism.pipeline_parallel_schedule": "1F1B",
        "checkpoint.enable": False,
        "checkpoint.folder": "checkpoint",
        "checkpoint.interval": 500,
        "checkpoint.initial_load_path": None,
        "checkpoint.initial_load_in_hf": False,
        "checkpoint.last_save_model_only": True,
        "checkpoint.last_save_in_hf": False,
        "checkpoint.export_dtype": "float32",
        "checkpoint.async_mode": "disabled",
        "checkpoint.keep_latest_k": 10,
        "checkpoint.load_step": -1,
        "checkpoint.exclude_from_loading": [],
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "2",
        "compile.enable": False,
        "compile.backend": "inductor",
        "comm.init_timeout_seconds": 300,
        "comm.train_timeout_seconds": 100,
        "comm.mode": "default",
        "validation.enable": False,
        "validation.freq": 10,
        "validation.steps": -1,
        "debug.seed": None,
        "debug.deterministic": False,
    }
    config, text = translate("")
    values = flat(config)
    assert {key: values[key] for key in theirs} == theirs
    assert config.training.global_batch_size == 8 * 8 and "steps = 10000  # torchtitan's default" in text
    ours = flat(load_config([]))
    assert {key: value for key, value in theirs.items() if ours[key] != value} == torchtitan.DEFAULTS


def test_global_batch_size(translate):
    for degrees, ngpu, batch in (
        ("", 1, 8),
        ("local_batch_size = 3", 4, 12),
        ("global_batch_size = 7", 4, 7),
        ("[parallelism]\ndata_parallel_replicate_degree = 2", 8, 64),
        ("[parallelism]\ndata_parallel_replicate_degree = 2\ndata_parallel_shard_degree = 2", 4, 32),
        ("[parallelism]\ntensor_parallel_degree = 2\ncontext_parallel_degree = 2", 8, 16),
        ("[parallelism]\npipeline_parallel_degree = 4", 8, 16),
    ):
        config, _ = translate(f"[training]\n{degrees}", ngpu)
        assert config.training.global_batch_size == batch, degrees


def test_a_folder_with_a_config_json_stays_the_model(translate, tmp_path):
    (tmp_path / "assets/config.json").write_text(json.dumps({}))
    text = '[model]\nhf_assets_path = "ASSETS"\n'
    config, ours = translate(text)
    assert config.model.hf_assets_path.endswith("assets") and config.model.tokenizer_path == ""
    assert "its weights" not in ours
    (tmp_path / "assets/model.safetensors").touch()
    assert "its weights are where training begins" in translate(text)[1]
    assert "its weights" not in translate(text + "[checkpoint]\ninitial_load_in_hf = true\n")[1]


def test_data_on_this_machine_is_kept(translate, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.parquet").touch()
    validation = '[validation]\nenable = true\ndataset = "c4"\n'
    config, _ = translate(f'[training]\ndataset_path = "{tmp_path / "data"}"\n{validation}')
    assert config.training.dataset == "parquet" and config.training.dataset_path == str(tmp_path / "data")
    assert config.validation.enable and config.validation.dataset == "jsonl"


def test_what_a_value_becomes(translate):
    config, text = translate("""
        [model]
        flavor = "8B_flex"
        converters = ["quantize.linear.float8", "quantize.grouped_mm.mx"]
        [optimizer]
        name = "Adam"
        [training]
        max_norm = 1
        gc_freq = "often"
        foo = 3
        [parallelism]
        pipeline_parallel_degree = 2
        pipeline_parallel_schedule = "GPipe"
        fsdp_reshard_after_forward = "always"
        [checkpoint]
        load_step = 3
        interval_type = "seconds"
        interval = 3600
        exclude_from_loading = ["optimizer", "lr_scheduler"]
        [compile]
        enable = true
        components = ["loss"]
        [activation_checkpoint]
        mode = "memory_budget"
        memory_budget = 0.3
    """)
    assert config.model.flavor == "8B" and config.model.converters == ["float8"]
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("AdamW", 0.0)
    assert config.parallelism.pipeline_parallel_schedule == "1F1B" and 'was "GPipe"' in text
    assert config.parallelism.fsdp_reshard_after_forward == "default"
    assert config.checkpoint.load_step == -1 and config.checkpoint.interval == 500
    assert config.checkpoint.exclude_from_loading == ["optimizer"] and not config.compile.enable
    assert "# left out: training.foo = 3 is not known here" in text
    assert "# left out: training.gc_freq" in text and config.training.gc_freq == 50
    assert config.activation_checkpoint.mode == "none"


@pytest.mark.parametrize(
    "text, ngpu, sentence",
    [
        ('[model]\nname = "deepseek_v3"', 8, 'model.name = "deepseek_v3" is not one of the models here'),
        ('[model]\nflavor = "405B"', 8, 'model.flavor = "405B" is not one of the llama3 models here'),
        ("[model]\nname = 3", 8, "model.name = 3 is not a string"),
        ("[training]\nlocal_batch_size = true", 8, "training.local_batch_size = true is not a whole number"),
        (
            "[parallelism]\ntensor_parallel_degree = 3",
            8,
            "do not divide 8, the number of processes: set NGPU",
        ),
        ('[parallelism]\ntensor_parallel_degree = "2"', 8, "is not a whole number of at least 1"),
        ("", "two", "NGPU = two in the environment is not a whole number"),
        ("steps = ", 8, "not valid TOML"),
    ],
)
def test_what_cannot_be_translated_is_one_sentence_and_status_2(translate, capsys, text, ngpu, sentence):
    with pytest.raises(SystemExit) as end:
        translate(text, ngpu)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as end:
        from_torchtitan.main(["none.toml"])
    assert end.value.code == 2 and "none.toml cannot be read" in capsys.readouterr().err


def test_the_tables_for_those_who_come_from_elsewhere_name_keys_that_exist():
    text = (REPO / "docs/coming_from.md").read_text()
    rows = [line.strip("|").split(" | ") for line in text.split("\n") if line.startswith("| `")]
    assert len(rows) > 100 and {len(row) for row in rows} == {3}
    for theirs, ours, _ in rows:
        keys = re.findall(r"`([^`]+)`", ours)
        assert keys or ours == "none", theirs
        for key in keys:
            assert key in KEYS, (theirs, key)
    named = set(re.findall(r"`([a-z_]+\.[a-z_.0-9]+)`", text.replace("docs/", "")))
    for key in named - {"configuration.md"}:
        assert key in KEYS or answer(key), key


def test_its_models_are_the_models_here():
    assert {name: set(flavors) for name, flavors in torchtitan.FLAVORS.items()} == {
        name: set(family.flavors) for name, family in families.items()
    }


def test_older_spellings_lead_to_what_is_known():
    for old, (new, _) in torchtitan.OLDER.items():
        last = {"training.local_batch_size", "parallelism.tensor_parallel_degree"}
        assert old not in KEYS and (new in KEYS or new in last), old


def test_as_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.toml").write_text(EARLY_2024)
    monkeypatch.setattr(sys, "argv", ["from_torchtitan", str(tmp_path / "theirs.toml")])
    runpy.run_module("chunkflow.settings.from_torchtitan", run_name="__main__")
    assert capsys.readouterr().out.startswith(f"# From {tmp_path / 'theirs.toml'}, for ")
