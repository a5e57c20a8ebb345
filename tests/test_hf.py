"""Hugging Face folders in and out, against transformers: same logits, gradients and training; bad weights are
a sentence each."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from chunkflow.settings.config import ConfigError, load_config
from chunkflow.storage import hf_weights as hf
from chunkflow.training import stages
from chunkflow.training.model_sizes import model_args
from chunkflow.training.start import read_config
from models import families
from models.hf_config import hf_name, model_of
from tests.helpers.hugging_face import ROPES, chunk_of, logits_of, ours, rewrite, theirs
from tests.helpers.processes import REPO, environment, run, run_ranks, train, write_rows

CONVERT = REPO / "recipes" / "convert.py"


def as_transformers_4(folder):
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    if rope.get("rope_type") == "linear":
        rope["type"] = rope.pop("rope_type")
    scaling = rope if len(rope) > 1 else None
    rewrite(
        folder,
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling=scaling,
        torch_dtype="float32",
        dtype=None,
    )


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    "kind, tied", [("llama", False), ("llama", True), ("qwen2", False), ("qwen2", True), ("qwen3", True)]
)
def test_logits_and_gradients_are_those_of_transformers(tmp_path, kind, tied, rope):
    reference = theirs(kind, rope, tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    if rope != "yarn":
        as_transformers_4(tmp_path)
    model = ours(tmp_path)
    tokens = torch.randint(2048, (200,))
    expected = reference(tokens[None]).logits[0]
    assert (logits_of(model, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()

    targets = torch.cat([tokens[1:], torch.tensor([-100])])
    F.cross_entropy(expected, targets, reduction="sum").backward()
    model(tokens, chunk_of(tokens, targets)).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = gradients.pop(hf_name(name, sys.modules[type(model).__module__]))
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert not gradients


# ------------------------------------------------------------------------------------------------- the recipe

LENGTHS = [300, 20, 64, 5, 130, 31, 7, 90, 12, 2, 48, 200, 9, 77, 33, 15, 6, 260, 41, 8]


LAYOUTS_OF_RUNS = {
    "1 process": {"processes": 1},
    "2 ranks": {"processes": 2},
    "2 stages": {"processes": 2},
}


def train_folder(tmp_path, layout, *overrides):
    """metrics.jsonl of a run in fp32 on rows.jsonl, in the order of the file, from the folder `model`; it
    leaves a folder again."""
    stages = ["--parallelism.pipeline_parallel_degree=2"] if layout == "2 stages" else []
    return train(
        tmp_path, "run", tmp_path / "rows.jsonl", f"--model.hf_assets_path={tmp_path / 'model'}", "--training.no_shuffle",
        "--training.seq_len=400", "--training.global_batch_size=4", "--training.mixed_precision_param=float32", "--chunkflow.k=2",
        "--checkpoint.last_save_in_hf", "--metrics.no_enable_tensorboard", *stages, *overrides, **LAYOUTS_OF_RUNS[layout],
    )  # fmt: skip


def transformers_run(model, rows, rates, batch):
    """Losses and gradient norms of plain training by whole sequences: AdamW at these rates, gradients
    clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for step, rate in enumerate(rates):
        of_step = [
            torch.tensor([row["input_ids"], row["labels"]]) for row in rows[step * batch : (step + 1) * batch]
        ]
        targets = sum(int((labels[1:] != -100).sum()) for _, labels in of_step)
        optimizer.zero_grad()
        total = 0.0
        for tokens, labels in of_step:
            logits = model(tokens[None]).logits[0, :-1]
            loss = F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100) / targets
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(total)
    return losses, norms


@pytest.mark.parametrize(
    "kind, tied, layout",
    [
        ("llama", False, "1 process"),
        ("qwen2", True, "1 process"),
        ("qwen3", True, "2 ranks"),
        ("qwen2", False, "2 ranks"),
        ("llama", True, "2 stages"),
        ("qwen3", False, "2 stages"),
    ],
)
def test_a_training_run_is_that_of_transformers(tmp_path, kind, tied, layout):
    reference = theirs(kind, "yarn", tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).write_text("{}")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    data = write_rows(tmp_path / "rows.jsonl", LENGTHS)
    rows = train_folder(
        tmp_path, layout, "--training.steps=5", "--optimizer.lr=2e-3", "--lr_scheduler.warmup_steps=2"
    )
    rates = [1e-3, 2e-3, 2e-3, 2e-3 * 2 / 3, 2e-3 / 3]  # up in two steps, down over the other three
    losses, norms = transformers_run(
        reference, [json.loads(line) for line in data.read_text().splitlines()], rates, 4
    )
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3) and min(norms) > 1, (
        "clipped at each step"
    )
    assert [row["lr"] for row in rows] == pytest.approx(rates)

    # What the run leaves is a folder that transformers loads: the model it has trained itself, to rounding
    # that AdamW amplifies.
    saved = tmp_path / "run" / "checkpoint" / "step-5-hf"
    assert {path.name for path in saved.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    again = transformers.AutoModelForCausalLM.from_pretrained(saved)
    tokens = torch.randint(2048, (1, 200))
    logits = reference(tokens).logits
    assert (again(tokens).logits - logits).abs().max() <= 1e-2 * logits.abs().max()
    assert (
        logits_of(ours(saved), tokens[0]) - again(tokens).logits[0]
    ).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("kind, tied, layout", [("qwen3", True, "2 stages"), ("llama", False, "2 ranks")])
def test_training_at_rate_0_is_bitwise(tmp_path, kind, tied, layout):
    """Forward, backward and update with a rate of 0, in fp32: the folder that comes out is the one that went
    in."""
    before = theirs(kind, "llama3", tie_word_embeddings=tied)
    before.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    write_rows(tmp_path / "rows.jsonl", LENGTHS)
    (row, _) = train_folder(tmp_path, layout, "--training.steps=2", "--optimizer.lr=0")
    assert row["grad_norm"] > 0
    saved, copy = tmp_path / "run" / "checkpoint" / "step-2-hf", tmp_path / "converted"
    runpy.run_path(str(CONVERT))["convert"](tmp_path / "model", copy, "float32")
    given = {
        name: tensor
        for file in (tmp_path / "model").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for folder in (saved, copy):
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == given.keys() and ("lm_head.weight" in weights) == (not tied)
        assert all(
            torch.equal(weights[name], given[name]) and weights[name].dtype == torch.float32 for name in given
        )
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert again.config.to_diff_dict() == before.config.to_diff_dict()
        assert all(
            torch.equal(one, other)
            for one, other in zip(again.parameters(), before.parameters(), strict=True)
        )


def test_in_and_out_is_bitwise(tmp_path):
    """A step without targets changes nothing. Weights come from another folder than the sizes, in
    bfloat16."""
    theirs("qwen2", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(
        tmp_path / "weights", max_shard_size="100KB"
    )
    theirs("qwen2", tie_word_embeddings=True, seed=1).save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", [30, 40, 20], masked=1.1)
    options = [
        f"--model.hf_assets_path={tmp_path / 'model'}", f"--checkpoint.initial_load_path={tmp_path / 'weights'}",
        "--checkpoint.initial_load_in_hf", "--training.steps=1", "--checkpoint.last_save_in_hf", "--checkpoint.export_dtype=bfloat16",
        "--training.mixed_precision_param=float32", "--training.seq_len=4096",
        "--model.rope_theta=5e5", "--model.rope_scaling={rope_type='yarn', factor=8.0}",
    ]  # fmt: skip
    train(tmp_path, "run", data, *options)
    saved = tmp_path / "run" / "checkpoint" / "step-1-hf"
    before = {
        name: tensor
        for file in (tmp_path / "weights").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    after = load_file(saved / "model.safetensors")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert all(
        torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before
    )
    config = transformers.AutoConfig.from_pretrained(saved)
    assert config.rope_parameters == {
        "rope_type": "yarn", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 512
    }  # fmt: skip
    assert config.dtype == torch.bfloat16
    config_toml = (tmp_path / "run" / "config.toml").read_text()
    assert 'name = "qwen2"' in config_toml and 'flavor = "model"' in config_toml


def test_bad_weights_end_a_run_with_a_sentence(tmp_path):
    model = theirs()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", [30, 40, 20])
    options = [f"--training.dataset_path={data}", "--training.dataset=jsonl", "--training.seq_len=400"]
    refused = run(
        tmp_path,
        *options,
        f"--job.dump_folder={tmp_path / 'run'}",
        f"--model.hf_assets_path={tmp_path / 'model'}",
    )
    assert refused.returncode == 1 and "Traceback" not in refused.stdout
    assert (
        "error: " in refused.stdout and "model.norm.weight has values that are not finite" in refused.stdout
    ), refused.stdout


# ------------------------------------------------------------------------------------------ shards and stages


class Watched:
    """A safetensors file that counts the elements read, of each tensor."""

    opened, read = staticmethod(safetensors.safe_open), {}

    def __init__(self, file, framework):
        self.file = self.opened(file, framework)

    def __enter__(self):
        self.tensors = self.file.__enter__()
        self.keys = self.tensors.keys
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def get_slice(self, name):
        return WatchedSlice(name, self.tensors.get_slice(name))


class WatchedSlice:
    def __init__(self, name, part):
        self.name, self.part, self.get_shape, self.get_dtype = name, part, part.get_shape, part.get_dtype

    def __getitem__(self, rows):
        Watched.read[self.name] = Watched.read.get(self.name, 0) + self.part[rows].numel()
        return self.part[rows]


LAYOUTS = {"dp_shard": (4,), "dp_replicate dp_shard": (2, 2), "pp dp_shard": (2, 2)}


def load_on_this_rank(folder):
    """For each layout: elements read, elements this rank has, and whether all values are right, here and
    gathered on rank 0."""
    dist.init_process_group("gloo")
    safetensors.safe_open = Watched
    name, args = model_of(folder)
    family, answers = families[name], []
    written = {
        key: value.float()
        for file in Path(folder).glob("*.safetensors")
        for key, value in load_file(file).items()
    }
    for names, shape in LAYOUTS.items():
        names = names.split()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        with torch.device("meta"):
            if names[0] == "pp":
                (model,) = stages.build_stages(
                    family, args, [range(1), range(1, 3)], mesh.get_local_rank("pp"), 2
                ).values()
                mesh = mesh["dp_shard"]
            else:
                model = family.Transformer(args)
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        Watched.read.clear()
        hf.load_weights(model, family, folder)
        right = True
        for name, parameter in model.named_parameters():
            name = "tok_embeddings.weight" if name == "output.weight" else name
            right &= torch.equal(parameter.full_tensor(), written[hf_name(name, family)])
        shapes = hf.parameter_shapes(family, args)
        wholes = hf.gathered_parameters([model], shapes, torch.float32, torch.device("cpu"))
        for name, whole in zip(shapes, wholes, strict=True):
            right &= (
                torch.equal(whole, written[hf_name(name, family)]) if dist.get_rank() == 0 else whole is None
            )
        own = sum(parameter.to_local().numel() for parameter in model.parameters())
        answers.append((sum(Watched.read.values()), own, right))
    return answers


def test_each_rank_reads_its_own_rows_only(tmp_path):
    """Shards (uneven ones), replicas of shards, and stages of shards, with tied embeddings, from files of
    float16."""
    model = theirs("qwen3", vocab_size=301).to(torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    once, embeddings = sum(parameter.numel() for parameter in model.parameters()), 301 * 64
    for layout, expected in zip(
        zip(*run_ranks(load_on_this_rank, 4, str(tmp_path))), (once, 2 * once, once + embeddings)
    ):
        assert all(right and read == own for read, own, right in layout)
        assert sum(own for _, own, _ in layout) == expected


def test_memory_stays_that_of_one_tensor(tmp_path):
    """A model of 150 MB, read into meta-sized shards and written again: peaks far below it."""
    script = f"""
import sys, torch
from pathlib import Path
from chunkflow.storage import hf_weights as hf
from models import families
from models.hf_config import hf_name, model_of
def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) / 1024
folder = {str(tmp_path)!r}
name, args = model_of(folder)
sources = hf.check_weights(folder, families[name], args)
shapes = hf.parameter_shapes(families[name], args)
hf.read(next(iter(sources.values())))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
named = {{hf_name(parameter, families[name]): shape for parameter, shape in shapes.items()}}
hf.write_folder(Path(folder) / "out", named, map(hf.read, sources.values()), torch.float32, {{}}, None, max_file_bytes=20_000_000)
print("rose by", peak() - before)
"""
    args = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 512}
    model = theirs(**args)
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), capture_output=True, text=True
    )
    rose = (
        float(re.search(r"rose by ([\d.]+)", done.stdout)[1])
        if done.returncode == 0
        else pytest.fail(done.stderr)
    )
    assert size > 130 and rose < 60, (size, rose)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert (
        set(index["weight_map"].values()) == set(files)
        and max(files.values()) < 20_100_000
        and len(files) > 6
    )
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------- writing


def test_convert(tmp_path):
    model = theirs("llama", "llama3")
    model.save_pretrained(tmp_path / "in", max_shard_size="200KB")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "generation_config.json").unlink()
    (tmp_path / "in" / "modeling_llama.py").write_text("raise SystemExit('executed')")
    command = [sys.executable, str(CONVERT), str(tmp_path / "in"), str(tmp_path / "out"), "--dtype=bfloat16"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0 and "Wrote llama3 with" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16 and again.config.rope_parameters == model.config.rope_parameters
    for before, after in zip(model.parameters(), again.parameters()):
        assert torch.equal(before.to(torch.bfloat16), after)
    with pytest.raises(ValueError, match="out exists: name another folder, or remove it"):
        runpy.run_path(str(CONVERT))["convert"](tmp_path / "in", tmp_path / "out", "float32")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target, shapes = (
        tmp_path / "step-3-hf",
        {"model.norm.weight": torch.Size([2]), "lm_head.weight": torch.Size([2])},
    )
    good = [torch.ones(2), torch.ones(2)]
    hf.write_folder(target, shapes, iter(good), torch.float16, {}, None)
    with pytest.raises(
        ValueError, match="lm_head.weight, written as float16, has values that are not finite"
    ):
        hf.write_folder(
            target, shapes, iter([torch.zeros(2), torch.full((2,), 1e5)]), torch.float16, {}, None
        )
    assert [path.name for path in tmp_path.iterdir()] == ["step-3-hf"]
    assert torch.equal(load_file(target / "model.safetensors")["model.norm.weight"], torch.ones(2).half())
    hf.write_folder(target, shapes, iter([torch.zeros(2), torch.zeros(2)]), torch.float16, {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3-hf"]
    assert torch.equal(load_file(target / "model.safetensors")["model.norm.weight"], torch.zeros(2).half())


# ------------------------------------------------------------------------------------------------ bad folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    theirs("qwen2").save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def broken(folder, **tensors):
    """The folder's weights with some replaced (None: removed), in a single file."""
    weights = load_file(folder / "model.safetensors") | {
        name.replace("/", "."): value for name, value in tensors.items()
    }
    save_file(
        {name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors"
    )


@pytest.mark.parametrize(
    "tensors, said",
    [
        (
            {"model/layers/1/mlp/up_proj/weight": None},
            "has no tensor model.layers.1.mlp.up_proj.weight, which its model needs",
        ),
        (
            {"model/layers/0/self_attn/q_proj/bias": None},
            "has no tensor model.layers.0.self_attn.q_proj.bias",
        ),
        ({"lm_head/weight": None}, "has no tensor lm_head.weight"),
        (
            {"model/layers/3/mlp/up_proj/weight": torch.ones(2)},
            "model.layers.3.mlp.up_proj.weight is no tensor of the model",
        ),
        ({"x": torch.ones(2), "y": torch.ones(2)}, "x and 1 more is no tensor of the model"),
        ({"model/norm/weight": torch.ones(65)}, "model.norm.weight has shape [65], but the model needs [64]"),
        ({"model/norm/weight": torch.ones(64, dtype=torch.float64)}, "model.norm.weight is of type F64"),
        (
            {"model/norm/weight": torch.ones(64).to(torch.float8_e4m3fn)},
            "model.norm.weight is of type F8_E4M3",
        ),
    ],
)
def test_bad_tensors_are_named(copy, tensors, said):
    broken(copy, **tensors)
    with pytest.raises(ValueError) as refused:
        ours(copy)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_bad_files_are_named(copy):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    for bad in (content[:-7], content[:20], b"", b"\xff" * 100):
        file.write_bytes(bad)
        with pytest.raises(
            ValueError, match=r"model.safetensors is truncated or damaged \(.*\): copy it again"
        ):
            ours(copy)
    file.unlink()
    with pytest.raises(ValueError, match="name a folder with model.safetensors"):
        ours(copy)
    index = copy / "model.safetensors.index.json"
    for weight_map, said in (
        ({"a": "../model.safetensors"}, "no weight_map of file names"),
        (None, "no weight_map of file names"),
        ({"a": "part.safetensors"}, "part.safetensors cannot be read: copy the folder again"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=said):
            ours(copy)
    (copy / "part.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError, match="part.safetensors has no tensor a, though model.safetensors.index.json says so"
    ):
        ours(copy)


def test_old_rotary_buffers_and_copies_of_tied_embeddings(copy):
    rewrite(copy, tie_word_embeddings=True)
    weights = load_file(copy / "model.safetensors")
    with pytest.raises(
        ValueError, match="lm_head.weight differs from model.embed_tokens.weight, but config.json ties them"
    ):
        ours(copy)
    embeddings = weights["model.embed_tokens.weight"]
    broken(
        copy,
        **{
            "lm_head/weight": embeddings.clone(),
            "model/layers/0/self_attn/rotary_emb/inv_freq": torch.ones(8),
        },
    )
    assert torch.equal(ours(copy).output.weight, embeddings)
    broken(copy, **{"model/embed_tokens/weight": None})
    assert torch.equal(ours(copy).output.weight, embeddings)


def test_a_folder_without_weights_starts_random_unless_they_are_asked_for(copy, caplog):
    caplog.set_level("INFO")
    (copy / "model.safetensors").unlink()
    config = read_config([f"--model.hf_assets_path={copy}", "--training.seq_len=100"])
    folder = hf.weights_folder(config.checkpoint, config.model.hf_assets_path)
    assert folder == "" and "parameters start random" in caplog.text
    hf.check(
        config.checkpoint, config.model.hf_assets_path, *model_args(config.model, config.training.seq_len, 0)
    )
    config.checkpoint.initial_load_in_hf = True
    with pytest.raises(ValueError, match="model.safetensors cannot be read: name a folder with"):
        hf.check(
            config.checkpoint,
            config.model.hf_assets_path,
            *model_args(config.model, config.training.seq_len, 0),
        )


def test_weights_that_could_run_code_are_not_passed_over(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").touch()
    config = read_config([f"--model.hf_assets_path={copy}"])
    with pytest.raises(ValueError, match="pytorch_model.bin: weights are read from safetensors only"):
        hf.weights_folder(config.checkpoint, config.model.hf_assets_path)


def test_initial_weights_need_a_folder():
    with pytest.raises(ConfigError, match="set checkpoint.initial_load_path or model.hf_assets_path"):
        load_config(["--checkpoint.initial_load_in_hf"])


def test_without_the_package_a_sentence(monkeypatch, copy):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        ours(copy)
