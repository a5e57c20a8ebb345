"""Low-rank adapters through the recipe: against PEFT's own model, in checkpoints and folders, merged."""

from __future__ import annotations

import json
import random
import shutil
from math import prod
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from chunkflow.storage.manifest import read_manifest
from chunkflow.storage.tensors import tensors_in
from recipes import convert, generate, needle
from tests.helpers.hugging_face import logits_of, ours, theirs
from tests.helpers.processes import in_process, rows_of, run, train

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
FP32 = ["--training.mixed_precision_param=float32", "--debug.seed=3", "--training.seq_len=256"]
RATE = ["--optimizer.lr=1e-2", "--lr_scheduler.warmup_steps=0", "--lr_scheduler.min_lr_factor=1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model's folder, and in it `adapter`, a PEFT adapter whose B is not zero."""
    folder = tmp_path_factory.mktemp("base")
    model = theirs("qwen2")
    model.save_pretrained(folder)
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six sequences a step: some of several chunks."""
    path, rng = tmp_path_factory.mktemp("data") / "rows.jsonl", random.Random(0)
    lengths = [rng.choice([200, 90, 20, 7]) for _ in range(36)]
    rows = [{"input_ids": [rng.randrange(2048) for _ in range(length)]} for length in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_peft(base: Path, adapter: Path) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


def test_five_steps_are_those_of_peft(base, data, tmp_path):
    """From the same adapter: losses, and the adapter after them; and what PEFT makes of the folder."""
    rows = [torch.tensor(json.loads(line)["input_ids"]) for line in data.read_text().splitlines()]
    model, expected = of_peft(base, base / "adapter"), []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        batch = rows[6 * step : 6 * step + 6]
        optimizer.zero_grad()
        total = 0.0
        for tokens in batch:
            logits = model(tokens[None]).logits[0, :-1]
            loss = F.cross_entropy(logits, tokens[1:], reduction="sum") / sum(len(row) - 1 for row in batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        expected.append(total)

    got = train(
        tmp_path, "run", data, f"--model.hf_assets_path={base}", f"--lora.adapter_path={base / 'adapter'}",
        *FP32, *RATE, "--training.steps=5", "--training.no_shuffle", "--checkpoint.last_save_in_hf", processes=2,
    )  # fmt: skip
    assert [row["loss"] for row in got] == pytest.approx(expected, rel=1e-4)
    folder = tmp_path / "run" / "checkpoint" / "step-5-hf"
    loaded = of_peft(base, folder)
    assert loaded.peft_config["default"].r == 4 and loaded.peft_config["default"].lora_alpha == 12
    weights = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (weights[name] - parameter).norm() <= 1e-4 * parameter.norm(), name

    # Merged: base + adapter, to rounding.
    convert.convert(folder, tmp_path / "merged", "float32", merge=True)
    tokens = rows[0]
    with torch.no_grad():
        whole = logits_of(ours(tmp_path / "merged"), tokens)
        torch.testing.assert_close(whole, loaded(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(plain(tokens[None]).logits[0], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.proves("one process + LoRA + resume", "stages + LoRA + other layout")
def test_a_checkpoint_has_the_adapters_alone_and_resumes_bit_for_bit(
    base, data, tmp_path, monkeypatch, capsys
):
    """Also on two stages, to rounding, which have the base anew; another base is refused."""
    settings = [f"--model.hf_assets_path={base}", "--lora.rank=3", *FP32, *RATE, "--checkpoint.enable"]
    whole = train(tmp_path, "whole", data, *settings, "--training.steps=3", "--checkpoint.last_save_in_hf")
    train(tmp_path, "run", data, *settings, "--training.steps=2")
    shutil.copytree(tmp_path / "run", tmp_path / "stages")
    rows = train(tmp_path, "run", data, *settings, "--training.steps=3", "--checkpoint.last_save_in_hf")
    assert rows[-1]["loss"] == whole[-1]["loss"]
    exported = [
        load_file(tmp_path / name / "checkpoint/step-3-hf/adapter_model.safetensors")
        for name in ("whole", "run")
    ]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    stages = ["--parallelism.pipeline_parallel_degree=2", "--training.steps=3"]
    rows = train(tmp_path, "stages", data, *settings, *stages, processes=2)
    assert rows[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-5)

    # Of each adapter the weight, two moments and a step count, in fp32; nothing of the base.
    checkpoint = tmp_path / "whole" / "checkpoint" / "step-3"
    linears = [
        m for n, m in theirs("qwen2").named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    adapters = sum(3 * (linear.in_features + linear.out_features) for linear in linears)
    saved = {name: prod(entry.size) for name, entry in tensors_in(checkpoint).items() if "random" not in name}
    assert len(saved) == 4 * 2 * len(linears) and all(".lora_" in name for name in saved)
    assert sum(saved.values()) == 3 * adapters + 2 * len(linears)
    manifest = read_manifest(checkpoint)
    assert manifest["base"]["kind"] == "hf" and len(manifest["base"]["digest"]) == 16
    assert manifest["model"]["lora.rank"] == 3 and manifest["model"]["lora.alpha"] == 6

    # generate.py reads both folders, and answers alike.
    texts = []
    for name in ("step-3", "step-3-hf"):
        arguments = [
            f"--model.hf_assets_path={base}", "--model.tokenizer_path=chunkflow/data/python_2048.model", *FP32[:1],
            f"--checkpoint={checkpoint.with_name(name)}", "--prompt=def f(x):", "--max-new-tokens=6", "--temperature=0",
        ]  # fmt: skip
        status, text, _ = in_process(generate, monkeypatch, capsys, *arguments)
        assert status == 0
        texts.append(text)
    assert texts[0] == texts[1]

    # needle.py, too, which knows the step of each; the base alone scores otherwise.
    scores = {}
    for name, where in {
        "base": [],
        "checkpoint": [f"--checkpoint={checkpoint}"],
        "PEFT's": [f"--checkpoint={checkpoint.with_name('step-3-hf')}"],
        "adapter_path": [f"--lora.adapter_path={checkpoint.with_name('step-3-hf')}"],
    }.items():
        arguments = [
            f"--model.hf_assets_path={base}", "--model.tokenizer_path=chunkflow/data/python_2048.model", *FP32[:1], *where,
            "--lengths=200", "--depths=50", "--trials=2", "--json", "--metrics.no_enable_tensorboard",
        ]  # fmt: skip
        status, text, said = in_process(needle, monkeypatch, capsys, *arguments)
        assert status == 0, said
        scores[name] = json.loads(text)
    of_base = scores.pop("base")
    assert of_base["step"] == 0 and [score["step"] for score in scores.values()] == [3] * 3
    first, *others = (score["answers"] for score in scores.values())
    assert others == [first] * 2 and first != of_base["answers"]

    # A merged checkpoint is its merged export; of another base neither is made.
    for name in ("step-3", "step-3-hf"):
        convert.convert(checkpoint.with_name(name), tmp_path / f"merged {name}", "float32", merge=True)
    merged = [
        load_file(tmp_path / f"merged {name}" / "model.safetensors") for name in ("step-3", "step-3-hf")
    ]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    other = tmp_path / "other"
    theirs("qwen2", seed=1).save_pretrained(other)
    done = run(
        tmp_path, f"--job.dump_folder={tmp_path / 'run'}", "--training.dataset=jsonl", f"--training.dataset_path={data}",
        "--training.global_batch_size=6", "--chunkflow.chunk_size=64", *settings, f"--model.hf_assets_path={other}", "--training.steps=4",
    )  # fmt: skip
    assert done.returncode == 1 and "has adapters of another base (digest" in done.stdout
    with pytest.raises(ValueError, match="of another base"):
        convert.convert(checkpoint, tmp_path / "none", "float32", merge=True, base=other)
    assert len(rows_of(tmp_path / "run")) == 3
