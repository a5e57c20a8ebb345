"""recipes/generate.py against transformers: the same tokens and logits from a prompt in chunks; draws, stops,
memory, sentences."""

import argparse
import json
import re
import runpy
import shutil
import subprocess
import sys
from itertools import accumulate

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers.generation.logits_process import TopPLogitsWarper

from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution import linear
from chunkflow.execution.loss import last_logits
from models.hf_config import end_tokens
from tests.helpers.hugging_face import CHATML, logits_of, ours, raw_tokenizer, theirs
from tests.helpers.layouts import small_model
from tests.helpers.processes import REPO, environment, in_process, train

RECIPE = REPO / "recipes" / "generate.py"
TEXT = "def naïve(größe):\n    return '漢字 😀', größe + 1\n"


@pytest.fixture(scope="module")
def recipe():
    return argparse.Namespace(**runpy.run_path(str(RECIPE)))


def options(**changes):
    return argparse.Namespace(**{"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "seed": 0} | changes)


def greedy(reference, prompt, count):
    reference.generation_config.eos_token_id = None
    (ids,) = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=count, pad_token_id=0
    ).tolist()
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind, rope", [("llama", "llama3"), ("qwen2", "default"), ("qwen3", "yarn")])
def test_greedy_tokens_are_those_of_transformers(tmp_path, recipe, kind, rope):
    reference = theirs(kind, rope)
    reference.save_pretrained(tmp_path)
    model = ours(tmp_path)
    for length in (1, 32, 150):
        prompt = torch.randint(2048, (length,)).tolist()
        expected = greedy(reference, prompt, 16)
        assert list(recipe.generate(model, prompt, options(), 32, 2048)) == expected, length
    assert len(set(expected)) > 4
    # Not a single id beyond the tokenizer's, however likely.
    assert max(recipe.generate(model, prompt, options(), 32, 100)) < 100


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_logits_in_chunks_are_those_of_the_whole(recipe, name):
    model = small_model(name)
    prompt, logits = torch.randint(96, (45,)).tolist(), []
    hook = model.register_forward_hook(
        lambda module, inputs, output: output is not None and logits.append(output)
    )
    ids = list(recipe.generate(model, prompt, options(temperature=1.0), 7, 96))
    hook.remove()
    assert len(logits) == len(ids) == 16 and logits[0].dtype == torch.float64
    expected = logits_of(model, torch.tensor(prompt + ids))[44:-1]
    assert (torch.stack(logits) - expected).norm() <= 1e-10 * expected.norm()


def test_logits_of_narrow_weights_are_computed_in_fp32():
    hidden_TC, weight_VC = torch.randn(3, 256).bfloat16(), torch.randn(9001, 256).bfloat16()
    logits_V = last_logits(hidden_TC, weight_VC, None)
    assert logits_V.dtype == torch.float32
    torch.testing.assert_close(logits_V, weight_VC.float() @ hidden_TC[-1].float())


def test_draws_follow_temperature_and_top_p(recipe):
    logits_V = torch.tensor([2.0, -1.0, 1.5, 0.0, 1.0, -40.0])
    draws = 2500
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.5), (1.0, 1e-6), (1e-30, 1.0)):
        generator = torch.Generator().manual_seed(1)
        drawn = [recipe.sample(logits_V, temperature, top_p, generator) for _ in range(draws)]
        warped = logits_V.double() / temperature
        kept = warped if top_p == 1 else TopPLogitsWarper(top_p)(None, warped[None])[0]
        expected = torch.softmax(kept - kept.max(), dim=-1)
        shares = torch.bincount(torch.tensor(drawn), minlength=6) / draws
        assert (shares - expected).abs().max() < 0.04, (temperature, top_p, shares, expected)
        assert not shares[expected == 0].any()


def test_stops_of_several_ids(recipe):
    def until(ids, *stops):
        return list(recipe.until_stop(iter(ids), list(stops)))

    assert until([1, 2, 3, 4], [3]) == [1, 2]
    assert until([1, 2, 3, 1, 2, 4, 9], [1, 2, 4], [8]) == [1, 2, 3]
    assert until([1, 2, 3, 8, 9], [1, 2, 4], [8]) == [1, 2, 3]
    assert until([1, 2, 1, 2], [1, 2, 4]) == [1, 2, 1, 2]
    assert until([1, 1, 2, 4, 4], [1, 2, 4]) == [1]
    assert until([1, 2]) == [1, 2]

    def endless():
        yield from [1, 2, 3]
        raise AssertionError("an id behind the stop was computed")

    assert until(endless(), [2, 3]) == [1]


# ----------------------------------------------------------------------------------------------------- memory


def allocated(work):
    """Bytes of each allocation (+) and release (-) on the CPU, in order, while `work` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def test_only_keys_and_values_grow_with_the_prompt(recipe):
    model = small_model("qwen3", n_layers=2)
    args, count = model.args, 3
    per_token = 2 * args.n_layers * args.n_kv_heads * args.head_dim * 8

    def peak_beyond_state(length, chunk_size):
        prompt = torch.randint(96, (length,)).tolist()
        sizes = allocated(
            lambda: list(recipe.generate(model, prompt, options(max_new_tokens=count), chunk_size, 96))
        )
        return max(accumulate(sizes)) - per_token * (length + count - 1)

    short, long, whole = (
        peak_beyond_state(*sizes) for sizes in ((640, 64), (1280, 64), (1280, 1280))
    )  # past a kernel's tile
    assert 0 < long < 1.05 * short < 0.2 * whole, (short, long, whole)


def test_a_new_token_allocates_the_same_behind_any_prompt(recipe, monkeypatch):
    def of_new_tokens(model, length):
        ids = recipe.generate(
            model, torch.randint(96, (length,)).tolist(), options(max_new_tokens=9), 256, 96
        )
        next(ids)
        return sum(size for size in allocated(lambda: list(ids)) if size > 0)

    # on a CPU without instructions for bf16 a prefix is widened
    monkeypatch.setattr(linear, "_narrow", lambda tensor: False)
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model("qwen3", dtype)
        assert 0 < of_new_tokens(model, 2048) < 1.05 * of_new_tokens(model, 640)


# ------------------------------------------------------------------------------------------ the recipe itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of bytes and ChatML, whose eos is not the end of a turn."""
    path = tmp_path_factory.mktemp("model")
    raw_tokenizer("bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []).save(
        str(path / "tokenizer.json")
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "chat_template": CHATML})
    )
    theirs("llama", vocab_size=Tokenizer(str(path)).vocab_size).save_pretrained(path)
    return path


def generate_text(tmp_path, *arguments):
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_text_of_a_folder(tmp_path, folder):
    """As its users run it: the text of transformers' tokens on stdout, progress and speed on stderr."""
    (tmp_path / "prompt.txt").write_text(TEXT * 4)
    reference, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), Tokenizer(str(folder))
    expected = greedy(reference, tokenizer.encode(TEXT * 4), 60)
    common = [
        f"--model.hf_assets_path={folder}",
        "--prompt-file",
        tmp_path / "prompt.txt",
        "--chunkflow.chunk_size",
        "16",
    ]
    text, said = generate_text(
        tmp_path,
        *common,
        "--max-new-tokens=60",
        "--temperature=0",
        "--training.mixed_precision_param=float32",
    )
    assert text == tokenizer.decode(expected) + "\n"
    assert (
        "reading the prompt" in said
        and f"{len(tokenizer.encode(TEXT * 4))} tokens read in" in said
        and "60 written (" in said
    )


def chat_ids(folder, count):
    rendered = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return greedy(reference, Tokenizer(str(folder)).encode(rendered), count)


def test_an_answer_ends_with_its_turn(tmp_path, folder, recipe, monkeypatch, capsys):
    """By the template's token, by generation_config.json's ids, by eos."""
    ids, tokenizer = chat_ids(folder, 12), Tokenizer(str(folder))
    place = next(place for place in range(4, 12) if ids[place] not in ids[:place])
    fp32 = [
        "--training.mixed_precision_param=float32",
        "--chunkflow.chunk_size=16",
        "--temperature=0",
        "--max-new-tokens=12",
    ]
    for case, stop in (("template", "<|im_end|>"), ("eos", "<|endoftext|>"), ("generation config", None)):
        copy = tmp_path / case
        shutil.copytree(folder, copy)
        if stop:  # where the model wrote ids[place], it now ends its turn
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                pair = [tokenizer.encode(stop)[0], ids[place]]
                model.lm_head.weight[pair] = model.lm_head.weight[pair[::-1]]
            model.save_pretrained(copy)
        else:
            (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ids[place]]}))
        arguments = [f"--model.hf_assets_path={copy}", "--chat", "--prompt", TEXT, *fp32]
        status, out, _ = in_process(recipe, monkeypatch, capsys, *arguments)
        assert (status, out) == (0, tokenizer.decode(ids[:place]) + "\n"), case


def test_seeds_in_bf16(folder, recipe, monkeypatch, capsys):
    def text(*arguments):
        status, out, err = in_process(
            recipe,
            monkeypatch,
            capsys,
            f"--model.hf_assets_path={folder}",
            "--prompt=a",
            "--max-new-tokens=9",
            *arguments,
        )
        assert status == 0, err
        return out

    assert text() == text("--seed=0") != text("--seed=1")


def test_a_checkpoint_writes_what_its_folder_writes(tmp_path, folder, recipe, monkeypatch, capsys):
    options = [
        f"--model.hf_assets_path={folder}",
        "--training.seq_len=400",
        "--training.steps=2",
        "--checkpoint.enable",
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": TEXT * times}) + "\n" for times in (3, 1, 1, 2, 1, 1))
    )
    train(
        tmp_path,
        "run",
        tmp_path / "rows.jsonl",
        *options,
        "--checkpoint.last_save_in_hf",
        "--optimizer.lr=1e-2",
    )
    run = tmp_path / "run"
    prompt = ["--prompt=def f(", "--temperature=0", "--max-new-tokens=20"]  # in bf16, from weights in fp32
    saved = ["--job.config_file", run / "config.toml", "--checkpoint", run / "checkpoint" / "step-2"]
    first = in_process(recipe, monkeypatch, capsys, *saved, *prompt)
    second = in_process(
        recipe, monkeypatch, capsys, f"--model.hf_assets_path={run / 'checkpoint' / 'step-2-hf'}", *prompt
    )
    before = in_process(recipe, monkeypatch, capsys, f"--model.hf_assets_path={folder}", *prompt)
    assert first[0] == second[0] == 0 and first[1] == second[1] != before[1]
    shutil.copytree(folder, tmp_path / "other")
    theirs("qwen2", vocab_size=Tokenizer(str(folder)).vocab_size).save_pretrained(tmp_path / "other")
    status, _, err = in_process(
        recipe, monkeypatch, capsys, *saved, *prompt, f"--model.hf_assets_path={tmp_path / 'other'}"
    )
    assert status == 2 and "step-2" in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: "), (
        err
    )


def test_beyond_the_folders_positions_by_either_way(folder, recipe, monkeypatch, capsys):
    """The folder has 512."""
    prompt = [f"--model.hf_assets_path={folder}", "--prompt", TEXT * 12, "--max-new-tokens=3"]
    for way in (
        ["--model.rope_theta=1e5", "--model.max_positions=1024"],
        ["--model.rope_scaling={rope_type='yarn', factor=2.0}"],
    ):
        status, _, err = in_process(recipe, monkeypatch, capsys, *prompt, *way)
        assert status == 0 and 512 < int(re.search(r"(\d+) tokens read", err)[1]) < 1024, err


def test_characters_of_several_tokens_come_whole(folder):
    """As they come: text is told as soon as it is known, and never half a character."""
    for tokenizer in (Tokenizer(str(folder)), Tokenizer()):
        ids = tokenizer.encode(TEXT)
        told = list(tokenizer.stream(iter(ids[3:]), ids[:3]))
        assert tokenizer.decode(ids[:3]) + "".join(told) == TEXT
        assert not any("\ufffd" in text for text in told) and len(told) > len(TEXT) / 4
        cut = next(place for place in range(4, len(ids)) if tokenizer.decode(ids[:place]).endswith("\ufffd"))
        unfinished = "".join(tokenizer.stream(iter(ids[3:cut]), ids[:3]))
        assert unfinished.endswith("\ufffd"), "it is shown at the end"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "no prompt: give one"),
        (["--prompt=a", "--prompt-file=x"], "a second prompt"),
        (["--prompt-file=/no/file"], "--prompt-file = /no/file cannot be read"),
        (["--prompt="], "the prompt has no tokens"),
        (["--prompt=a", "--top-p=0"], "--top-p = 0.0 is out of range: choose a value above 0"),
        (["--prompt=a", "--temperature=nan"], "--temperature = nan is out of range"),
        (
            ["--prompt=a", "--max-new-tokens=0"],
            "--max-new-tokens = 0 is out of range: choose a value at least 1",
        ),
        (["--prompt=a", "--max-new-tokens=512"], "beyond the 512 positions of the model"),
        (
            [
                "--prompt=a",
                "--max-new-tokens=600",
                "--model.max_positions=600",
                "--model.rope_theta=1e5",
            ],
            "beyond the 600 positions of the model",
        ),
        (["--prompt=a", "--model.max_positions=600"], "its rotary angles there were never trained"),
        (["--prompt=a", "--max-new-tokens=x"], "--max-new-tokens: invalid int value: 'x'"),
        (["--prompt=a", "--model.flavour=x"], "did you mean --model.flavor?"),
        (["--prompt=a", "--model.hf_assets_path="], "there are no weights: set --model.hf_assets_path"),
        (["--prompt=a", "--checkpoint=/no/step-1"], "/no/step-1"),
    ],
)
def test_wrong_input_is_a_sentence_and_status_2(folder, recipe, monkeypatch, capsys, arguments, said):
    status, out, err = in_process(recipe, monkeypatch, capsys, f"--model.hf_assets_path={folder}", *arguments)
    assert (status, out) == (2, "") and err.startswith("error: ") and said in err and err.count("\n") == 1, (
        err
    )


def test_a_folder_without_a_tokenizer_or_with_a_bad_end(tmp_path, folder, recipe, monkeypatch, capsys):
    theirs("qwen2").save_pretrained(tmp_path)
    answer = in_process(recipe, monkeypatch, capsys, f"--model.hf_assets_path={tmp_path}", "--prompt=a")
    assert answer[0] == 2 and f"{tmp_path} has no tokenizer: set model.tokenizer_path" in answer[2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match="eos_token_id = 'x' is neither a token id nor a list of them"):
        end_tokens(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert end_tokens(tmp_path) == []
