"""What docs/extending.md says: a new family, another loss, another dataset; chunks stay exact."""

import ast
import dataclasses
import importlib.util
import json
import sys

import pytest
import torch

from chunkflow.planning.chunks import build_groups
from chunkflow.settings.config import load_config
from chunkflow.training.model_sizes import model_args
from chunkflow.training.parallel import init_weights
from models import families, hf_config
from tests.helpers.processes import RECIPE, REPO, assert_same_curves, train, write_rows
from tests.helpers.reference import (
    assert_same_gradients,
    chunked_gradients,
    random_sequences,
    whole_sequence_gradients,
)

# Another block: attention and feed-forward side by side, with a gate on what attention adds.
CHANGES = {
    "        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)\n": "        self.gate = nn.Linear(args.dim, args.dim)\n",
    "        x_TC = x_TC + self.attention.wo(attention_THD.flatten(1))\n"
    "        return x_TC + self.feed_forward(cheap(self.ffn_norm, x_TC))\n": (
        "        attention_TC = self.attention.wo(attention_THD.flatten(1))\n"
        "        normed_TC = cheap(self.attention_norm, x_TC)\n"
        "        return x_TC + self.gate(normed_TC).sigmoid() * attention_TC + self.feed_forward(normed_TC)\n"
    ),
    '    "model_type": "llama",\n': '    "model_type": "toy",\n    "modules": {"gate": "gate_proj"},\n',
    '"LlamaForCausalLM"': '"ToyForCausalLM"',
    "F.silu(": "F.gelu(",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The file of a family, as a user writes it: copied, changed, and given a name."""
    text = (REPO / "models" / "llama.py").read_text()
    for before, after in CHANGES.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (tmp_path / "toy.py").write_text(text)
    spec = importlib.util.spec_from_file_location("toy", tmp_path / "toy.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(families, "toy", module)
    return module


@pytest.mark.proves("one process + chunks/k > 1")
@pytest.mark.parametrize("k", [1, 3])
def test_a_new_family_trains_in_chunks_as_in_whole_sequences(toy, k):
    sizes = {"dim": 32, "n_layers": 3, "head_dim": 8, "hidden_dim": 48, "vocab_size": 96}
    whole, chunked = (
        toy.Transformer(dataclasses.replace(toy.flavors["debugmodel"], **sizes)).double() for _ in range(2)
    )
    for model in (whole, chunked):
        init_weights(model, seed=1)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (whole, chunked)]
    lengths = [75, 3, 40, 12]
    for step in range(3):
        sequences = random_sequences(lengths, 96, step)
        expected_loss, expected = whole_sequence_gradients(whole, sequences)
        loss, gradients, result = chunked_gradients(chunked, sequences, build_groups(lengths, 16), k)
        assert abs(loss - expected_loss) <= 1e-10 * expected_loss and max(result.live_chunks) <= k
        assert_same_gradients(gradients, expected, 1e-8 if step else 1e-10)
        for optimizer in optimizers:
            optimizer.step()


def edited_recipe(folder, name, lines, changes=None) -> dict[str, str]:
    """The environment of a copy of finetune.py, as a user edits it: `lines` stand before its functions, and each
    name or attribute in `changes` is another name."""
    changes, changed = changes or {}, set()

    class Edit(ast.NodeTransformer):
        def generic_visit(self, node):
            text = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
            if text not in changes:
                return super().generic_visit(node)
            changed.add(text)
            return ast.Name(changes[text], ast.Load())

    tree = Edit().visit(ast.parse(RECIPE.read_text()))
    assert changed == set(changes)
    first = next(index for index, node in enumerate(tree.body) if isinstance(node, ast.FunctionDef))
    tree.body[first:first] = ast.parse(lines).body
    recipe = folder / f"{name}.py"
    recipe.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    return {"TRAIN_FILE": str(recipe), "PYTHONPATH": f"{REPO}:{folder}"}


@pytest.mark.proves("one process + k > 1")
def test_a_recipe_trains_a_new_family(tmp_path, toy):
    """One line in the user's recipe stands for the one in models/__init__.py."""
    environ = edited_recipe(
        tmp_path, "toy_recipe", 'import toy\nfrom models import families\n\nfamilies["toy"] = toy'
    )
    data = write_rows(tmp_path / "rows.jsonl", [300, 20, 64, 5, 130, 31, 7, 90, 12])
    options = ["--model.name=toy", "--training.dtype=float64", "--training.steps=2"]
    whole, chunked = (
        train(tmp_path, name, data, *options, more, **environ)
        for name, more in (("whole", "--chunkflow.enable=false"), ("chunked", "--chunkflow.k=2"))
    )
    assert_same_curves(chunked, whole, 1e-8, 1e-8)


LOSS = """
import torch.nn.functional as F


def z_loss_sum(hidden_TC, weight_VC, chunk):
    logits_TV = hidden_TC @ weight_VC.t()
    losses_T = F.cross_entropy(logits_TV, chunk.labels, reduction="none", ignore_index=-100)
    losses_T = losses_T + 1e-2 * torch.where(chunk.labels == -100, 0, logits_TV.logsumexp(-1).square())
    return losses_T.sum() if chunk.loss_weights is None else (losses_T * chunk.loss_weights).sum()
"""


@pytest.mark.proves("one process + weights + k > 1", "stages + weights")
def test_a_recipe_with_another_loss_is_exact_in_chunks(tmp_path):
    environ = edited_recipe(tmp_path, "z_loss_recipe", LOSS, {"loss_sum": "z_loss_sum"})
    data = write_rows(tmp_path / "rows.jsonl", [300, 20, 64, 5, 130, 31, 7, 90, 12])
    rows = [json.loads(line) | {"weight": 0.5 + n} for n, line in enumerate(data.read_text().splitlines())]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ["--training.dtype=float64", "--training.steps=2"]
    plain = train(tmp_path, "plain", data, *options)
    whole = train(tmp_path, "whole", data, *options, "--chunkflow.enable=false", **environ)
    for name, more, processes in (
        ("k", "--chunkflow.k=2", 1),
        ("stages", "--parallelism.pipeline_parallel_degree=2", 2),
    ):
        chunked = train(tmp_path, name, data, *options, more, processes=processes, **environ)
        assert_same_curves(chunked, whole, 1e-8, 1e-8)
    assert whole[0]["loss"] > plain[0]["loss"] + 0.1, "the edited loss counts"


DATASET = """
class Counting:
    identity = {"training.dataset": "counting"}

    def __init__(self, *_):
        self.lengths = [300, 20, 64, 5, 130, 31, 7, 90, 12]

    def __len__(self):
        return len(self.lengths)

    def row(self, index, length):
        tokens = (index + 3 * torch.arange(length)) % 2048
        return tokens, tokens.clone(), None

    def weight(self, index):
        return 1.0

    def supervised(self, index, length):
        return length - 1, length - 1.0

    def source(self, index):
        return f"counting:{index + 1}"

    def changed_file(self):
        return ""
"""


def test_a_recipe_with_another_dataset_trains_and_resumes(tmp_path):
    environ = edited_recipe(tmp_path, "counting_recipe", DATASET, {"build.open_data": "Counting"})
    unread = write_rows(tmp_path / "rows.jsonl", [3])
    save = ["--checkpoint.enable", "--checkpoint.interval=2"]
    undisturbed = train(tmp_path, "undisturbed", unread, "--training.steps=4", *save, **environ)
    train(
        tmp_path, "resumed", unread, "--training.steps=2", "--lr_scheduler.decay_ratio=0.0", *save, **environ
    )
    rows = train(
        tmp_path, "resumed", unread, "--training.steps=4", "--lr_scheduler.decay_ratio=0.0", *save, **environ
    )
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in undisturbed]
    assert sum(row["tokens"] for row in rows[:1]) <= sum([300, 20, 64, 5, 130, 31, 7, 90, 12])


def test_names_and_sizes_of_a_new_family(tmp_path, toy):
    family, args = model_args(load_config(["--model.name=toy"]).model, 512, 2048)
    assert family is toy and isinstance(args, toy.ModelArgs)
    assert hf_config.hf_name("layers.2.gate.weight", toy) == "model.layers.2.gate_proj.weight"
    config = hf_config.config_json("toy", args, "bfloat16")
    assert (config["model_type"], config["architectures"]) == ("toy", ["ToyForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hf_config.model_of(tmp_path) == ("toy", args)


def test_a_family_that_is_not_registered_is_named_with_those_that_are():
    with pytest.raises(ValueError) as refused:
        model_args(load_config(["--model.name=qwen4"]).model, 512, 2048)
    assert str(refused.value) == (
        'model.name = "qwen4" is not admitted: choose one of "llama3", "qwen2", "qwen3" (did you mean "qwen3"?)'
    )
