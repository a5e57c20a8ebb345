"""The README's way from a folder and a JSONL to a folder: its commands, as they stand there, in a checkout
with a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from chunkflow.data.tokenizer import Tokenizer
from tests.helpers.processes import REPO, end_processes, environment
from tests.test_chat import CHATML, raw_tokenizer
from tests.test_hf import theirs


def test_your_own_model(tmp_path):
    section = re.search(
        r"^## Your own model\n(.*?)^## ", (REPO / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )[1]
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    for name in subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(REPO / name)
    model = tmp_path / "my_model"
    model.mkdir()
    raw_tokenizer("bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []).save(
        str(model / "tokenizer.json")
    )
    (model / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "chat_template": CHATML})
    )
    before = theirs("qwen2", vocab_size=Tokenizer(str(model)).vocab_size, max_position_embeddings=4096)
    before.save_pretrained(model)
    with open(tmp_path / "my_rows.jsonl", "w") as rows:
        for length in (1, 2, 3, 1, 40, 2, 1, 200):
            messages = [
                {"role": "user", "content": "What is a chunk?"},
                {"role": "assistant", "content": "A part. " * length},
            ]
            rows.write(json.dumps({"messages": messages}) + "\n")

    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    try:
        done = subprocess.run(
            ["bash", "-e", "-c", commands],
            cwd=tmp_path, env=environment(tmp_path, PATH=path), capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    finally:
        end_processes(str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answer = done.stdout.partition("Training completed\n")[2]
    assert len(answer.strip()) > 10, done.stdout
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "outputs" / "metrics.jsonl").read_text().splitlines()
    ]
    assert f"--training.steps={len(losses)}" in commands and sum(losses[-4:]) < sum(losses[:4])
    (saved,) = (tmp_path / "outputs" / "checkpoint").glob("step-*-hf")
    after = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    assert after.dtype == torch.bfloat16 and saved.name in commands
    moved = (after.lm_head.weight.float() - before.lm_head.weight.bfloat16().float()).abs().max()
    assert 0 < moved < 0.1
    assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == CHATML
