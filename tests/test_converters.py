"""float8 and int8 linear layers and AdamW8bit, through the recipe: they train as well as bfloat16 and
AdamW, to stated margins.

What they save: AdamW8bit's moments take 2.05 bytes a parameter instead of 8 on the debug model. float8 and
int8 save no bytes, since weights and saved activations stay as they are; what they are for is faster products
on GPUs.
"""

import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from chunkflow.execution.loss import loss_sum
from chunkflow.execution.state import dummy_chunk
from chunkflow.planning.memory import Layout, StageSizes
from chunkflow.settings.config import load_config
from chunkflow.storage.checkpoint import snapshot
from chunkflow.training.converters import check_converters, convert_model, layers_to_convert
from chunkflow.training.optimizer import build_optimizer, check_optimizer, optimizer_tensors
from chunkflow.training.parallel import init_weights
from models import llama, qwen2
from tests.helpers.processes import RECIPE, REPO, run, run_ranks, small_assets, train, write_rows

LENGTHS = [300, 20, 64, 5, 130, 31, 7, 90, 12, 1, 48, 200, 9, 77, 33]
STEPS = 4
# How far losses may be from those of bfloat16 and AdamW, as a share of how far runs of bfloat16 from other initial
# weights are from each other: rounding differs between CPUs and grows from step to step, and so do those.
# float8 rounds to 3 bits of mantissa, int8 to 7 bits of a row's or column's largest value.
MARGINS = {"float8": 1 / 2, "int8": 1 / 8, "AdamW8bit": 1 / 8}
FLOAT8 = ["--model.converters=float8", "--quantize.linear.float8.emulate"]
INT8 = ["--model.converters=int8"]
STAGES = ["--parallelism.pipeline_parallel_degree=2"]
NOTHING_COMPILES = {"TORCH_COMPILE_DISABLE": "1"}


def settings_of(argv: list[str]):
    config = load_config(argv)
    return config.model.converters, config.quantize.linear.float8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(folder):
    """For the sizes of the debug model's layers: where they are much smaller, seeds hardly differ."""
    write_rows(folder / "rows.jsonl", LENGTHS)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 2}
    return [
        small_assets(folder / "model", **sizes, head_dim=64),
        "--training.no_shuffle",
        f"--training.steps={STEPS}",
        "--lr_scheduler.warmup_steps=2",
        "--optimizer.lr=2e-3",
        "--chunkflow.chunk_size=128",
    ]


@pytest.fixture(scope="module")
def curves(folder, settings):
    """Losses of each run."""
    whole, seeds = ["--chunkflow.no_enable"], {f"seed {seed}": [f"--debug.seed={seed}"] for seed in (1, 2)}
    int8_on_ranks = ["--parallelism.fsdp_reshard_after_forward=never", "--activation_checkpoint.mode=full"]
    runs = {
        "bfloat16": [],
        **seeds,
        "float8 on ranks": FLOAT8,
        "float8 on whole sequences": [*FLOAT8, *whole],
        "float8 on stages": [*FLOAT8, *STAGES],
        "int8 on ranks": [*INT8, *int8_on_ranks],
        "int8 on whole sequences": [*INT8, *whole],
        "int8 on stages": [*INT8, *STAGES, "--checkpoint.last_save_in_hf"],
        "AdamW8bit on ranks": ["--optimizer.name=AdamW8bit"],
    }
    losses = {}
    for name, options in runs.items():
        processes = 2 if " on ranks" in name or "stages" in name else 1
        options = [folder / "rows.jsonl", *settings, *options]
        rows = train(folder, name.replace(" ", "_"), *options, processes=processes, **NOTHING_COMPILES)
        losses[name] = [row["loss"] for row in rows]
    return losses


def distance(curve: list[float], other: list[float]) -> float:
    return math.dist(curve, other) / math.sqrt(STEPS)


def margin(curves, name: str) -> float:
    pairs = itertools.combinations(("bfloat16", "seed 1", "seed 2"), 2)
    between_seeds = statistics.mean(distance(curves[one], curves[other]) for one, other in pairs)
    return MARGINS[name.split()[0]] * between_seeds


@pytest.mark.proves("always/stages + float8", "never + int8 + full", "stages + int8", "always + AdamW8bit")
@pytest.mark.parametrize(
    "name", ["float8 on ranks", "float8 on stages", "int8 on ranks", "int8 on stages", "AdamW8bit on ranks"]
)
def test_they_train_as_well_as_bfloat16_and_adamw(curves, name):
    reference = curves["bfloat16"]
    assert reference[-1] < 0.95 * reference[0]
    assert 0 < distance(curves[name], reference) < margin(curves, name)


@pytest.mark.parametrize("converter", ["float8", "int8"])
def test_chunks_train_as_well_as_whole_sequences(curves, converter):
    whole = curves[f"{converter} on whole sequences"]
    for layout in ("ranks", "stages"):
        assert distance(curves[f"{converter} on {layout}"], whole) < margin(curves, converter)


def test_weights_that_int8_trained_are_saved_and_loaded_by_name(curves, folder, settings):
    hf = next((folder / "int8_on_stages" / "checkpoint").iterdir())
    (hf / "tokenizer.json").unlink(missing_ok=True)
    argv = [*INT8, f"--model.hf_assets_path={hf}", "--checkpoint.initial_load_in_hf", "--training.steps=1"]
    rows = train(folder, "loaded", folder / "rows.jsonl", *settings, *argv)
    assert rows[0]["loss"] < 0.95 * curves["bfloat16"][0], "training goes on from where it was"


def test_adamw_8bit_compiled_is_adamw_8bit(monkeypatch):
    """By default its update is compiled, at the first step; elsewhere in these tests it is not. What inductor
    would make of the graph takes half a minute and is torch's. Rounding may send a value to the next of 256 codes,
    so what 8 bits cost at all is the judge."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    start, weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(9)) / 8, {}
    for name, stance in {"AdamW": "default", "compiled": "default", "eager": "force_eager"}.items():
        model = nn.Linear(128, 64, bias=False)
        model.load_state_dict({"weight": start})
        options = ["--optimizer.lr=1e-2", f"--optimizer.name={'AdamW' if name == 'AdamW' else 'AdamW8bit'}"]
        with torch.compiler.set_stance(stance):
            optimizer = build_optimizer(model, load_config(options).optimizer)
            for step in range(3):
                model.weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
                optimizer.step()
        weights[name] = model.weight.detach()
    cost = (weights["eager"] - weights["AdamW"]).norm()
    assert (weights["eager"] - start).norm() > 1 and cost > 0
    assert (weights["compiled"] - weights["eager"]).norm() < 0.05 * cost


def test_the_bytes_that_adamw_8bit_saves():
    model = llama.Transformer(llama.flavors["debugmodel"])
    parameters, sizes = dict(model.named_parameters()), {}
    for name in ("AdamW", "AdamW8bit"):
        tensors = optimizer_tensors(
            build_optimizer(model, load_config([f"--optimizer.name={name}"]).optimizer), parameters
        )
        assert set(tensors) == {
            f"optimizer.{name}.{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")
        }
        state_bytes = sum(part.nbytes for tensor in tensors.values() for part in inner(tensor))
        sizes[name] = state_bytes / sum(parameter.numel() for parameter in parameters.values())
        shapes = {parameter: tuple(tensor.shape) for parameter, tensor in parameters.items()}
        planned = StageSizes(model.args, shapes, Layout(eight_bit=name == "AdamW8bit"))
        assert state_bytes == planned.optimizer, "what plan.py predicts"
    assert 8 <= sizes["AdamW"] < 8.001 and 2 < sizes["AdamW8bit"] < 2.06, sizes


def inner(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.codes, tensor.scale, tensor.qmap] if hasattr(tensor, "codes") else [tensor]


# ------------------------------------------------------------------------------- layers, parameters, products


@pytest.mark.parametrize("argv", [FLOAT8, INT8])
@pytest.mark.parametrize("family", [llama, qwen2])
def test_parameters_keep_their_names_bytes_and_start(argv, family):
    plain, converted = (family.Transformer(family.flavors["debugmodel"]) for _ in range(2))
    convert_model(converted, *settings_of(argv))
    layers = [
        name
        for name, module in converted.named_modules()
        if type(module) is not nn.Linear and isinstance(module, nn.Linear)
    ]
    assert len(layers) == 4 * 7, "all but the head"
    for model in (plain, converted):
        init_weights(model, 0)
    pairs = list(zip(plain.named_parameters(), converted.named_parameters(), strict=True))
    for (name, parameter), (converted_name, other) in pairs:
        assert name == converted_name and type(other) is nn.Parameter and other.dtype == parameter.dtype
        assert torch.equal(parameter, other)


def test_which_layers():
    model = llama.Transformer(llama.flavors["debugmodel"])
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert layers_to_convert(model, *settings_of(FLOAT8)) == names - {"output"}
    few = layers_to_convert(
        model, *settings_of([*FLOAT8, "--quantize.linear.float8.filter_fqns=attention,layers.0"])
    )
    assert few == {f"layers.{layer}.feed_forward.w{number}" for layer in (1, 2, 3) for number in (1, 2, 3)}
    model.layers["0"].feed_forward.w1 = nn.Linear(256, 690, bias=False)
    assert "layers.0.feed_forward.w1" not in layers_to_convert(model, *settings_of(INT8)), (
        "not a multiple of 16"
    )
    with torch.device("meta"):
        model = llama.Transformer(llama.flavors["8B"])
    small = layers_to_convert(
        model, *settings_of([*FLOAT8, "--quantize.linear.float8.filter_fqns=auto_filter_small_kn"])
    )
    assert "layers.0.attention.wq" in small and "layers.0.attention.wk" not in small


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_products_take_chunks_of_any_length(monkeypatch, recipe):
    """GPU kernels want multiples of 16 to be summed over, which a CPU does not check."""
    real, products = torch._scaled_mm, []

    def checked(a, b, **options):
        assert a.size(1) % 16 == 0 and b.size(1) % 16 == 0, (a.shape, b.shape)
        products.append(a.shape)
        return real(a, b, **options)

    model = llama.Transformer(llama.flavors["debugmodel"]).bfloat16()
    init_weights(model, 0)
    convert_model(
        model, *settings_of(["--model.converters=float8", f"--quantize.linear.float8.recipe_name={recipe}"])
    )
    monkeypatch.setattr(torch, "_scaled_mm", checked)
    chunk = dummy_chunk()
    chunk.end = loss_sum
    model(chunk.tokens, chunk).backward()
    assert len(products) == 28 * (2 if recipe == "rowwise_with_gw_hp" else 3)


# ------------------------------------------------------------------------------------------------ checkpoints


def sharded(argv: list[str]):
    torch.manual_seed(0)
    model = fully_shard(
        nn.Sequential(nn.Linear(256, 688, bias=False), nn.Linear(688, 256, bias=False), nn.Linear(256, 5))
    )
    return model, build_optimizer(model, load_config(argv).optimizer)


def whole_state(model, optimizer) -> dict[str, torch.Tensor]:
    wholes = {}
    for name, tensor in optimizer_tensors(optimizer, dict(model.named_parameters())).items():
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            local = local.dequantize() if hasattr(local, "codes") else local
            tensor = DTensor.from_local(
                local,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            ).full_tensor()
        wholes[name] = tensor.clone().numpy()
    return wholes


def train_sharded(model, optimizer, steps: range) -> None:
    for step in steps:
        model(torch.randn(7, 256, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_and_load(path: str, argv: list[str]):
    """State when it was saved and two steps later, of the optimizer that saved it, then of one that loaded
    it."""
    os.environ |= NOTHING_COMPILES
    dist.init_process_group("gloo")
    model, optimizer = sharded(argv)
    train_sharded(model, optimizer, range(3))
    state = optimizer_tensors(optimizer, dict(model.named_parameters())) | model.state_dict()
    saved = whole_state(model, optimizer)
    copies, group = snapshot(state, pinned=False), dist.new_group(backend="gloo")
    with ThreadPoolExecutor() as background:
        pending = background.submit(dcp.save, copies, checkpoint_id=path, process_group=group)
        train_sharded(model, optimizer, range(3, 5))
        pending.result()
    return saved, whole_state(model, optimizer), *load_and_train(path, argv)


def load_alone(path: str, argv: list[str]):
    os.environ |= NOTHING_COMPILES
    dist.init_process_group("gloo")
    return load_and_train(path, argv)


def load_and_train(path: str, argv: list[str]):
    model, optimizer = sharded(argv)
    dcp.load(
        optimizer_tensors(optimizer, dict(model.named_parameters())) | model.state_dict(), checkpoint_id=path
    )
    loaded = whole_state(model, optimizer)
    train_sharded(model, optimizer, range(3, 5))
    return loaded, whole_state(model, optimizer)


def test_state_is_saved_while_training_goes_on_and_loaded_also_by_one_rank(tmp_path):
    argv = ["--optimizer.name=AdamW8bit"]
    saved, after, loaded, continued = run_ranks(save_and_load, 2, str(tmp_path / "state"), argv)[0]
    alone, _ = run_ranks(load_alone, 1, str(tmp_path / "state"), argv)[0]
    for key in saved:
        assert (
            (loaded[key] == saved[key]).all()
            and (continued[key] == after[key]).all()
            and (alone[key] == saved[key]).all()
        ), key
    assert saved["optimizer.0.weight.exp_avg"].any()


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model.converters=float8,int8"], "are two for the same layers"),
        (["--model.converters=int8", "--training.dtype=float64"], "contradicts"),
        ([*FLOAT8, "--quantize.linear.float8.filter_fqns=atention"], "is part of no linear layer's name"),
        ([*FLOAT8, "--quantize.linear.float8.filter_fqns=layers"], "finds no layer in llama3 debugmodel"),
        ([*FLOAT8, "--quantize.linear.float8.filter_fqns=auto_filter_small_kn"], "finds no layer in llama3"
        " debugmodel"),
        (
            [*FLOAT8, "--quantize.linear.float8.filter_fqns=auto_filter_small_kn",
             "--quantize.linear.float8.recipe_name=rowwise_with_gw_hp"],
            "has no figures",
        ),
        pytest.param(
            ["--model.converters=float8"],
            "quantize.linear.float8.emulate",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU may have float8"),
        ),
        (["--optimizer.name=AdamW8bit", "--training.dtype=float64"], "contradicts"),
        (["--optimizer.name=AdamW8bit", "--optimizer.implementation=foreach"], "remove one"),
        (["--optimizer.name=AdamW8bit", "--comm.mode=fake_backend"], "no content"),
    ],
)  # fmt: skip
def test_refusals(argv, words):
    config = load_config(argv)
    with pytest.raises(ValueError, match=words) as error:
        args, fake = llama.flavors["debugmodel"], config.comm.mode == "fake_backend"
        float8 = config.quantize.linear.float8
        check_converters(config.model, float8, llama, args, config.training.dtype, fake)
        check_optimizer(config.optimizer, config.compile, config.training, fake)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels need no C++ compiler")
def test_no_compiler_is_a_sentence_and_status_2(tmp_path):
    options = ["--check", f"--job.dump_folder={tmp_path}/x", "--optimizer.name=AdamW8bit", *STAGES]
    done = run(tmp_path, *options, processes=2, CXX="/no/compiler")
    assert done.returncode == 2 and done.stdout.count("\n") == 1, done.stdout
    assert done.stdout.startswith("error: optimizer.name") and "no C++ compiler" in done.stdout


def test_torchao_is_imported_only_where_it_is_asked_for():
    load = "import runpy, sys; runpy.run_path(sys.argv[1])"
    code = load + "; assert not any(name.startswith('torchao') for name in sys.modules)"
    command = [sys.executable, "-c", code, str(RECIPE)]
    subprocess.run(command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, check=True)
