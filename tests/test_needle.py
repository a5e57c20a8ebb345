"""recipes/needle.py: prompts exactly as long and needles exactly as deep as asked for, scores that tell good from
bad, prefixes read once, and the whole recipe with its heat map."""

import argparse
import json
import math
import random
import runpy
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from chunkflow.data.tokenizer import SHIPPED_MODEL, Tokenizer
from chunkflow.execution.generation import Context, continuation
from chunkflow.execution.loss import last_logits
from tests.helpers.hugging_face import CHATML, logits_of, raw_tokenizer, theirs
from tests.helpers.layouts import small_model
from tests.helpers.processes import REPO, in_process, small_assets, train

RECIPE = REPO / "recipes" / "needle.py"
TAG = "needle/by length and depth"


@pytest.fixture(scope="module")
def recipe():
    return argparse.Namespace(**runpy.run_path(str(RECIPE)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of 512 positions, with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw_tokenizer("bytes", special, []).save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs("llama", vocab_size=Tokenizer(str(path)).vocab_size).save_pretrained(path)
    return path


def run(recipe, monkeypatch, capsys, tmp_path, *arguments):
    """Status, stdout and stderr of the recipe in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return in_process(recipe, monkeypatch, capsys, *arguments)


# ---------------------------------------------------------------------------------------------------- the context


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("chunk_size", [1, 7, 15, 45, 64])
def test_logits_after_reading_in_chunks_are_those_of_the_whole(name, chunk_size):
    """Also after what was read is forgotten in part, in the middle of a chunk, and read on otherwise."""
    model, read = small_model(name), []
    first, second, answer = (torch.randint(96, (length,)).tolist() for length in (45, 31, 5))
    context = Context(model, 60, chunk_size)
    for start, ids in ((0, first), (17, second)):
        context.forget(start)
        logits_V = context.read(ids, last_logits, read.append)
        expected = logits_of(model, torch.tensor(context.tokens))[-1]
        assert logits_V.dtype == torch.float64 and not logits_V.requires_grad
        assert (logits_V - expected).norm() <= 1e-10 * expected.norm()
    assert context.tokens == first[:17] + second
    assert read == [
        min(chunk_size, len(ids) - start)
        for ids in (first, second)
        for start in range(0, len(ids), chunk_size)
    ]

    # minus the log-probabilities of an answer, however it would have gone on by itself
    prompt = list(context.tokens)
    alone = list(continuation(context, logits_V, 5, lambda logits_V: int(logits_V.argmax())))
    assert context.tokens == prompt + alone[:-1]
    context.forget(len(prompt) - 1)
    losses_A = context.losses([prompt[-1], *answer[:-1]], answer)
    shares = torch.log_softmax(logits_of(model, torch.tensor(prompt + answer)), dim=-1)[len(prompt) - 1 : -1]
    expected = -shares.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (losses_A - expected).norm() <= 1e-10 * expected.norm()


# --------------------------------------------------------------------------------------------------- the prompts


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shipped", [False, True])
def test_a_prompt_has_its_length_and_its_needle_at_its_depth(recipe, folder, chat, shipped):
    tokenizer = Tokenizer("" if shipped else str(folder))
    hay = tokenizer.encode("def f(x):\n    return x\n" * 300)
    for length, depth in ((300, 0), (301, 33.3), (512, 50), (777, 100)):
        trial = recipe.make_trial(tokenizer, hay, length, depth, random.Random(length), chat)
        assert len(trial.prompt) + len(trial.answer) == length
        needle = tokenizer.encode(recipe.NEEDLE.format(city=trial.city, number=trial.number))
        task, size = tokenizer.encode(recipe.TASK), len(needle)
        places = [at for at in range(length) if trial.prompt[at : at + size] == needle]
        begin = next(at for at in range(length) if trial.prompt[at : at + len(task)] == task) + len(task)
        (place,) = places
        before, after = trial.prompt[begin:place], trial.prompt[place + size :]
        cut = len(before)
        rest = next(n for n in range(len(after)) if after[n] != hay[cut + n])  # haystack behind the needle
        assert before == hay[:cut] and abs(cut - (cut + rest) * depth / 100) <= 2, (length, depth, cut, rest)
        # What is asked, and what the right answer is.
        asked, answered = tokenizer.decode(after[rest:]), tokenizer.decode(trial.prompt + trial.answer)
        assert f"What is the special number of {trial.city} in the text above?" in asked
        assert answered.endswith(f"The special number of {trial.city} is {trial.number}")
        assert tokenizer.decode(trial.answer).strip() == trial.number and len(trial.number) == recipe.DIGITS
        assert asked.count(trial.number) == 0
        if chat:
            own = tokenizer.question("Apple")[0]
            shown, around = tokenizer.decode(trial.prompt), tokenizer.decode(own).split("Apple")
            assert shown.startswith(around[0] + recipe.TASK) and f"?{around[1]}The special" in shown
        else:
            assert (trial.prompt[0] == tokenizer.bos_id) == (tokenizer.bos_id is not None)
    with pytest.raises(
        ValueError, match="--lengths: 20 tokens are too few, since needle, question and answer"
    ):
        recipe.make_trial(tokenizer, hay, 20, 0, random.Random(0), chat)


def test_trials_depend_on_the_seed_and_share_their_beginnings(recipe, tmp_path):
    tokenizer = Tokenizer()
    (tmp_path / "hay.txt").write_text("one two three\n" * 5)  # to be repeated

    def made(seed, haystack=None, trials=2):
        cli = argparse.Namespace(seed=seed, haystack=haystack, trials=trials, chat=False)
        return recipe.make_trials(cli, tokenizer, [300, 600], [0, 50, 100])

    one, other = made(0), made(1)
    assert one == made(0) and [t.number for t in one] != [t.number for t in other]
    assert one[0].prompt[:200] != other[0].prompt[:200], "another haystack"
    assert [(trial.length, trial.depth) for trial in one[:6:2]] == [(300, 100), (300, 50), (300, 0)]
    text = tokenizer.decode(made(0, tmp_path / "hay.txt")[0].prompt)
    assert text.count("one two three") > 20
    # What is read twice is what stands behind the needle: 100 %, 50 % and 0 % deep, twice each.
    context, read = Context(Window(math.inf), 600, 32), []
    bar = argparse.Namespace(update=lambda tokens: None)
    for trial in one[6:]:
        run_on = context.read
        context.read = lambda ids, *more: (read.append(len(ids)), run_on(ids, *more))[1]
        recipe.ask(context, trial, tokenizer, bar)
        context.read = run_on
    hay = 600 - 100
    prompts = [count for count in read if count > 1]
    assert prompts[1] < 100 and hay / 2 < prompts[2] < hay / 2 + 120 and prompts[4] > hay - 50, prompts


# ------------------------------------------------------------------------------------------------ the measurement


class Window(torch.nn.Module):
    """Copies by induction, from the last `reach` tokens: what followed the longest earlier run of tokens that
    equals the last ones follows again. It is sure of that by `logit`."""

    def __init__(self, reach, logit=20.0):
        super().__init__()
        self.reach, self.logit = reach, logit
        self.tok_embeddings = torch.nn.Embedding(2048, 1)
        self.tokens = {}

    def forward(self, x, chunk):
        self.tokens |= dict(zip(chunk.positions.tolist(), x.tolist()))
        if chunk.end is None:
            return None
        logits = torch.stack([self.after(position) for position in chunk.positions.tolist()])
        return chunk.end(logits, torch.eye(2048), chunk)

    def after(self, position):
        ids = [self.tokens[at] for at in range(position + 1)]
        start = max(0, len(ids) - self.reach) if self.reach < math.inf else 0
        best, length = 0, 0
        for at in range(start, len(ids) - 1):
            run = 0
            while run <= at - start and ids[at - run] == ids[-1 - run]:
                run += 1
            if run >= length and run:
                best, length = ids[at + 1], run
        return self.logit * torch.nn.functional.one_hot(torch.tensor(best), 2048)


def measured(recipe, model, length, depths, trials=3):
    cli = argparse.Namespace(seed=0, haystack=None, trials=trials, chat=False)
    tokenizer, bar = Tokenizer(), argparse.Namespace(update=lambda tokens: None)
    context = Context(model, length, 50)
    rows = [
        recipe.ask(context, trial, tokenizer, bar)
        for trial in recipe.make_trials(cli, tokenizer, [length], depths)
    ]
    return {depth: [row for row in rows if row["depth"] == depth] for depth in depths}


def test_it_tells_how_far_back_a_model_looks(recipe):
    """One that sees everything finds the needle at any depth, one that sees the second half finds it there."""
    for reach, finds in ((math.inf, {0, 25, 75, 100}), (250, {75, 100})):
        answers = measured(recipe, Window(reach), 500, [0, 25, 75, 100])
        for depth, rows in answers.items():
            assert all(row["found"] == (depth in finds) for row in rows), (reach, depth, rows)
            assert all((row["said"] == row["number"]) == row["found"] for row in rows)
            # sure of the right token, or of a wrong one
            logp = [row["log_probability"] for row in rows]
            assert all(value > -1e-4 if depth in finds else value < -2 for value in logp), (
                reach,
                depth,
                logp,
            )


def test_the_log_probability_is_of_the_right_answer_not_of_the_one_said(recipe):
    """A model that is less sure says the same and has a lower one: log of e^l / (e^l + 2047)."""
    for logit in (20.0, 8.0):
        (rows,) = measured(recipe, Window(math.inf, logit), 300, [50]).values()
        expected = logit - math.log(math.exp(logit) + 2047)
        assert all(
            row["found"] and row["log_probability"] == pytest.approx(expected, abs=1e-5) for row in rows
        )


# ----------------------------------------------------------------------------------------------------- the recipe


def test_a_folder_as_its_users_run_it(recipe, folder, monkeypatch, capsys, tmp_path):
    options = [f"--model.hf_assets_path={folder}", "--training.mixed_precision_param=float32"]
    options += [
        "--chunkflow.chunk_size=100",
        "--lengths=400,250",
        "--depths=100,0,12.5",
        "--trials=2",
        "--chat",
    ]
    status, out, err = run(recipe, monkeypatch, capsys, tmp_path, *options)
    assert status == 0, err
    head, lengths, *lines, guess = out.splitlines()
    assert lengths.split() == ["depth", "250", "400"]
    assert [line.split("%")[0].strip() for line in lines] == ["0", "12.5", "100"]
    assert "-2.0" in guess, "7 digits of 10 in 8 tokens"
    status, out, err = run(recipe, monkeypatch, capsys, tmp_path, *options, "--json")
    report = json.loads(out)
    assert status == 0 and len(report["answers"]) == 12 and len(report["cells"]) == 6
    for cell in report["cells"]:
        here = [
            row
            for row in report["answers"]
            if (row["length"], row["depth"]) == (cell["length"], cell["depth"])
        ]
        assert len(here) == 2
        mean = sum(row["log_probability"] for row in here) / 2
        assert cell["log_probability"] == pytest.approx(mean) and mean < -4, "it has learnt nothing"
        assert cell["found"] == 0 and f"0 ({mean:.2f})" in "\n".join(lines)

    events = EventAccumulator(str(tmp_path / "outputs" / "tb" / "needle"))
    events.Reload()
    mean = sum(cell["log_probability"] for cell in report["cells"]) / 6
    (scalar,) = events.Scalars("needle/log_probability")  # of two runs: the second has replaced the first
    assert (scalar.step, scalar.value) == (0, pytest.approx(mean, rel=1e-5))
    of_400 = [cell["log_probability"] for cell in report["cells"] if cell["length"] == 400]
    (scalar,) = events.Scalars("needle_log_probability_by_length/400")
    assert scalar.value == pytest.approx(sum(of_400) / 3, rel=1e-5)
    (picture,) = events.Images(TAG)
    assert picture.encoded_image_string.startswith(b"\x89PNG") and picture.width > 200 < picture.height


def test_a_run_that_was_trained_on_the_task_is_better_than_before(recipe, monkeypatch, capsys, tmp_path):
    """Its checkpoint and its exported folder score alike, each step has its place in TensorBoard, and training
    shows: seconds are enough to find digits likelier than before."""
    tokenizer, cli = Tokenizer(), argparse.Namespace(seed=9, haystack=None, trials=20, chat=False)
    rows = [
        {"input_ids": ids, "labels": [-100] * len(trial.prompt) + trial.answer}
        for trial in recipe.make_trials(cli, tokenizer, [200], [0, 50, 100])
        for ids in [trial.prompt + trial.answer]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        small_assets(tmp_path / "model", max_position_embeddings=256), "--training.seq_len=300", "--model.max_positions=300",
        "--model.rope_theta=1e5", "--lr_scheduler.warmup_steps=1", "--optimizer.lr=1e-2", "--checkpoint.enable",
        "--checkpoint.interval=1", "--checkpoint.keep_latest_k=99", "--checkpoint.last_save_in_hf", "--training.steps=20",
        f"--model.tokenizer_path={SHIPPED_MODEL}", "--training.mixed_precision_param=float32",
    ]  # fmt: skip
    train(tmp_path, "run", tmp_path / "rows.jsonl", *options, "--metrics.enable_tensorboard")
    folder, scores = tmp_path / "run", {}
    saved = ["--job.config_file", folder / "config.toml"]
    asked = ["--depths=0,100", "--trials=3", "--json"]
    for step in (20, 1):
        where = ["--checkpoint", folder / "checkpoint" / f"step-{step}"]
        status, out, err = run(recipe, monkeypatch, capsys, tmp_path, *saved, *where, *asked)
        assert status == 0, err
        scores[step] = json.loads(out)
        assert {cell["length"] for cell in scores[step]["cells"]} == {300}, "training.seq_len"
    means = {step: [cell["log_probability"] for cell in scores[step]["cells"]] for step in scores}
    assert min(means[20]) > max(means[1]), means
    events = EventAccumulator(str(folder / "tb" / "needle"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("needle/found")] == [1, 20]
    exported = f"--model.hf_assets_path={folder / 'checkpoint' / 'step-20-hf'}"
    status, out, err = run(
        recipe, monkeypatch, capsys, tmp_path, exported, "--training.mixed_precision_param=float32",
        f"--model.tokenizer_path={SHIPPED_MODEL}", "--chunkflow.chunk_size=64", *asked,
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out) == scores[20], "the folder knows its 300 positions and its step"


def test_without_matplotlib_a_sentence(recipe, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = [f"--model.hf_assets_path={folder}", "--lengths=200", "--depths=0", "--trials=1"]
    status, _, err = run(recipe, monkeypatch, capsys, tmp_path, *options)
    assert status == 0 and "No heat map: matplotlib" in err, err
    status, _, err = run(
        recipe, monkeypatch, capsys, tmp_path / "..", *options, "--metrics.no_enable_tensorboard"
    )
    assert status == 0 and "TensorBoard" not in err and not (tmp_path / ".." / "outputs").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--lengths=513"], "513 is beyond the 512 positions of the model"),
        (["--lengths=99,"], "--lengths = 99,: nothing is not a whole number"),
        (["--lengths=1.5"], "1.5 is not a whole number of tokens"),
        (["--lengths=0"], "0 is not a whole number of tokens, at least 1"),
        (["--lengths=60"], "--lengths: 60 tokens are too few"),
        (["--depths=101"], "--depths = 101: 101 is not a percentage from 0 to 100"),
        (["--depths=-1"], "-1 is not a percentage"),
        (["--depths=nan"], "nan is not a percentage"),
        (["--trials=0"], "--trials = 0 is out of range: choose at least 1"),
        (["--haystack=/no/file"], "--haystack = /no/file cannot be read"),
        (["--model.hf_assets_path="], "there are no weights: set --model.hf_assets_path"),
        (["--checkpoint=/no/step-1"], "--checkpoint = /no/step-1 is not a folder"),
        (["--lora.rank=4"], "there are no adapters: set --checkpoint, or --lora.adapter_path"),
        (["--lora.adapter_path=/no/folder"], "/no/folder/adapter_config.json cannot be read"),
        (["--job.dump_folder=/proc/no"], "/proc/no/tb/needle cannot be made"),
        (["--model.max_positions=999"], "model.max_positions = 999 is beyond the 512 positions"),
        (["--model.flavour=x"], "did you mean --model.flavor?"),
    ],
)
def test_wrong_input_is_a_sentence_and_status_2(
    recipe, folder, monkeypatch, capsys, tmp_path, arguments, said
):
    options = [f"--model.hf_assets_path={folder}", "--lengths=200", *arguments]
    status, out, err = run(recipe, monkeypatch, capsys, tmp_path, *options)
    assert (status, out) == (2, ""), (out, err)
    sentence = err.splitlines()[-1]
    assert sentence.startswith("error: ") and said in sentence, err
    assert not list(tmp_path.iterdir())


def test_default_lengths(recipe, folder):
    config = argparse.Namespace(
        job=argparse.Namespace(config_file=""), training=argparse.Namespace(seq_len=2000)
    )
    assert recipe.read_lengths(None, config, 40960) == [1024, 2048, 4096, 8192, 16384, 32768, 40960]
    assert recipe.read_lengths(None, config, 4096) == [1024, 2048, 4096]
    assert recipe.read_lengths(None, config, 512) == [512]
    config.job.config_file = "run/config.toml"
    assert recipe.read_lengths(None, config, 40960) == [1024, 2000]
