"""Does a trained model find a sentence (the needle) in a long text (the haystack), wherever it stands?

    python recipes/needle.py --model.hf_assets_path=my_model --chat --lengths 4096,16384,65536
    python recipes/needle.py --job.config_file outputs/config.toml --checkpoint outputs/checkpoint/step-100

Adapters are read over their base: a checkpoint or PEFT's folder by --checkpoint, or --lora.adapter_path. The
needle gives the number of a city, and the question at the end asks for it. Length counts all tokens:
haystack, needle, question and answer. Depth is the share of the haystack before the needle, in percent.
Scored are the greedy answer and the log-probability of the right one. The haystack is source code of
Python's standard library, or --haystack. It is read in chunks of chunkflow.chunk_size, on a GPU if there is
one.

Prints a table (--json: one JSON object); the same and a heat map go into TensorBoard, in the folder `needle`
of the run's.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from itertools import cycle
from os.path import commonprefix  # of lists too
from pathlib import Path
from typing import NamedTuple

import torch
from torch.hub import tqdm  # the real one where it is installed, else torch's small stand-in

from chunkflow.data.files import python_files
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.generation import Context, continuation
from chunkflow.execution.loss import last_logits
from chunkflow.reporting.pictures import heat_maps
from chunkflow.storage.trained import load_trained
from chunkflow.training.build import open_text_tokenizer
from chunkflow.training.model_sizes import model_args, positions
from chunkflow.training.start import fail, options_beside_config, read_config

TASK = (
    "A special number is hidden in the following text. Remember it: you will be asked for it afterwards.\n\n"
)
NEEDLE = "\nThe special number of {city} is {number}.\n"
QUESTION = "\n\nWhat is the special number of {city} in the text above?"
CUE = "The special number of {city} is"  # the beginning of the answer; the number follows
DIGITS = 7
CITIES = ["Athens", "Cairo", "Dublin", "Hanoi", "Lima", "Lisbon", "London", "Madrid", "Nairobi", "Oslo"]
CITIES += ["Ottawa", "Paris", "Rome", "Seoul", "Tokyo", "Vienna"]


class Trial(NamedTuple):
    """One question. `prompt` and `answer` are token ids, `length` of them together."""

    length: int
    depth: float  # percent
    city: str
    number: str
    prompt: list[int]
    answer: list[int]


def main() -> None:
    parser = options_beside_config(__doc__)
    add, default = parser.add_argument, "(%(default)s)"
    add("--lengths", help="tokens, comma separated; unset: 1024, 2048, ... up to training.seq_len of"
        " --job.config_file or, without it, to the model's positions")  # fmt: skip
    add("--depths", default="0,25,50,75,100", help=f"{default} percent, comma separated")
    add("--trials", type=int, default=5, help=f"{default} questions at each length and depth")
    add("--seed", type=int, default=0, help=f"{default} of cities, numbers, and the order of the haystack")
    add("--haystack", type=Path, help="a file of UTF-8 text, repeated where it is too short")
    add("--chat", action="store_true", help="a user asks, in the model's chat template")
    add("--checkpoint", type=Path, help="weights of a run; --job.config_file then names its config.toml")
    add("--json", action="store_true", help="print one JSON object, with each answer")
    cli, keys = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # ---- What is asked for, and whether the model has positions for it.
        config = read_config(keys)
        tokenizer = open_text_tokenizer(config)
        family, args = model_args(config.model, 1, tokenizer.vocab_size)
        most = positions(config.model, args)
        lengths = read_lengths(cli.lengths, config, most)
        depths = numbers(cli.depths, "--depths", float, 0, 100, "a percentage from 0 to 100")
        if cli.trials < 1:
            raise ValueError(f"--trials = {cli.trials} is out of range: choose at least 1")
        trials = make_trials(cli, tokenizer, lengths, depths)
        model = load_trained(config, cli.checkpoint, family, args, device)
        # Not the run's own folder: while its file grows, TensorBoard must not see a newer one there.
        folder = Path(config.job.dump_folder) / config.metrics.save_tb_folder / "needle"
        if config.metrics.enable_tensorboard:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = f"{folder} cannot be made ({error.strerror})"
                raise ValueError(f"{reason}: set another --job.dump_folder") from None
    except ValueError as error:
        fail(error)

    # ---- The answers. Trials of one length begin alike, up to the needle that stands first: those tokens are
    # read once. So the deepest needles come first, and each trial reads what differs from the one before.
    context = Context(model, lengths[-1], config.chunkflow.chunk_size, config.chunkflow.kv_offload == "host")
    total = sum(len(trial.prompt) for trial in trials)
    with tqdm(total=total, unit="token", desc="reading", mininterval=1) as bar:
        rows = [ask(context, trial, tokenizer, bar) for trial in trials]

    # ---- The table, and TensorBoard.
    cells = {}  # (length, depth) -> the means over its trials
    for start in range(0, len(rows), cli.trials):
        here, where = rows[start : start + cli.trials], {key: rows[start][key] for key in ("length", "depth")}
        means = {key: sum(row[key] for row in here) / cli.trials for key in ("found", "log_probability")}
        cells[tuple(where.values())] = where | means
    read = cli.checkpoint or Path(config.lora.adapter_path or config.model.hf_assets_path)
    named = re.match(r"step-(\d+)", read.name)
    step = int(named[1]) if named else 0
    guess = -math.log(9 * 10 ** (DIGITS - 1)) * len(trials) / sum(len(trial.answer) for trial in trials)
    if cli.json:
        report = {"step": step, "random_digits": guess, "cells": list(cells.values()), "answers": rows}
        print(json.dumps(report))
    else:
        print(table(cells, lengths, depths))
        print(f"A model that knows only that a number follows would have {guess:.2f}.")
    if config.metrics.enable_tensorboard:
        write_events(folder, step, cells, lengths, depths)
        print(f"TensorBoard: {folder}, step {step}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ before work


def numbers(text: str, option: str, kind: type, low: float, high: float, rule: str) -> list:
    """The sorted numbers of a comma-separated list."""
    found = set()
    for word in text.split(","):
        try:
            number = kind(word)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise ValueError(f"{option} = {text}: {word.strip() or 'nothing'} is not {rule}: correct it")
        found.add(number)
    return sorted(found)


def read_lengths(text: str | None, config, most: int) -> list[int]:
    if text is None:
        most = min(most, config.training.seq_len) if config.job.config_file else most
        return [*(2**n for n in range(10, most.bit_length()) if 2**n < most), most]
    lengths = numbers(text, "--lengths", int, 1, math.inf, "a whole number of tokens, at least 1")
    if lengths[-1] > most:
        raise ValueError(
            f"--lengths = {text}: {lengths[-1]:,} is beyond the {most:,} positions of the model: shorten it,"
            " or extend the context with model.rope_scaling (YaRN) or model.max_positions"
        )
    return lengths


# ------------------------------------------------------------------------------------------------ the prompts


def texts(path: Path | None, seed: int) -> Iterator[str]:
    """The haystack, without end: files, or the blocks of one file."""
    if path is None:
        files = python_files()
        random.Random(seed).shuffle(files)
        for file in cycle(files):
            with tokenize.open(file) as source:
                yield source.read()
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--haystack = {path} cannot be read ({error}): name a file of UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"--haystack = {path} is empty: name a file with text")
    lines = text.splitlines(keepends=True)
    yield from cycle("".join(lines[start : start + 1000]) for start in range(0, len(lines), 1000))


def make_trials(cli: argparse.Namespace, tokenizer: Tokenizer, lengths: list, depths: list) -> list[Trial]:
    """All trials, in the order in which they share most. ValueError where a length has no room for one."""
    hay: list[int] = []
    for text in texts(cli.haystack, cli.seed):
        hay += tokenizer.encode(text)
        if len(hay) >= lengths[-1]:
            break
    trials = []
    for length in lengths:
        for depth in reversed(depths):
            for number in range(cli.trials):
                draw = random.Random(f"{cli.seed}/{length}/{depth}/{number}")
                trials.append(make_trial(tokenizer, hay, length, depth, draw, cli.chat))
    return trials


def make_trial(
    tokenizer: Tokenizer, hay: list[int], length: int, depth: float, draw: random.Random, chat: bool
) -> Trial:
    """A trial of exactly `length` tokens, with the needle behind `depth` percent of its part of `hay`."""
    city, number = draw.choice(CITIES), str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    needle, question, cue = (part.format(city=city, number=number) for part in (NEEDLE, QUESTION, CUE))
    if chat:  # what the template puts around any question
        asked = [tokenizer.question(content)[0] for content in ("Apple", "zebr")]
        head, tail = commonprefix(asked), commonprefix([ids[::-1] for ids in asked])[::-1]
        question_ids = tokenizer.encode(question) + tail
    else:
        head, question_ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id], []
        cue = f"{question} {cue}"
    answered = tokenizer.encode(f"{cue} {number}")
    cue_ids = commonprefix([answered, tokenizer.encode(cue)])
    before, inside = head + tokenizer.encode(TASK), tokenizer.encode(needle)
    room = length - sum(map(len, (before, inside, question_ids, answered)))
    if room < 0:
        raise ValueError(
            f"--lengths: {length} tokens are too few, since needle, question and answer have {length - room}:"
            " choose greater lengths"
        )
    cut = round(room * depth / 100)
    prompt = before + hay[:cut] + inside + hay[cut:room] + question_ids + cue_ids
    return Trial(length, depth, city, number, prompt, answered[len(cue_ids) :])


# ------------------------------------------------------------------------------------------------ the answers


def ask(context: Context, trial: Trial, tokenizer: Tokenizer, bar) -> dict:
    """Reads a trial's prompt behind what the context shares with it, and scores its answer."""
    prompt, answer = trial.prompt, trial.answer
    shared = min(len(commonprefix([context.tokens, prompt])), len(prompt) - 1)
    context.forget(shared)
    bar.update(shared)
    logits_V = context.read(prompt[shared:], last_logits, bar.update)
    known = tokenizer.vocab_size  # ids behind it only pad the embeddings
    said = list(continuation(context, logits_V, len(answer), lambda logits_V: int(logits_V[:known].argmax())))
    context.forget(len(prompt) - 1)
    losses_A = context.losses([prompt[-1], *answer[:-1]], answer)
    text = tokenizer.decode(said).strip()
    return {
        "length": trial.length,
        "depth": trial.depth,
        "city": trial.city,
        "number": trial.number,
        "said": text,
        "found": text == trial.number,
        "log_probability": -float(losses_A.mean()),
    }


def table(cells: dict, lengths: list[int], depths: list) -> str:
    lines = ["found, % (mean log-probability of a token of the right answer)"]
    lines.append("depth  " + "".join(f"{length:>16,}" for length in lengths))
    for depth in depths:
        here = (cells[length, depth] for length in lengths)
        shown = (f"{100 * cell['found']:.0f} ({cell['log_probability']:.2f})" for cell in here)
        lines.append(f"{depth:>5g} %" + "".join(f"{value:>16}" for value in shown))
    return "\n".join(lines)


def write_events(folder: Path, step: int, cells: dict, lengths: list[int], depths: list) -> None:
    """Scalars and the heat map of one step, in a file of its own, which replaces an earlier one of this step
    and sorts, as TensorBoard wants it, before those of later steps."""
    from torch.utils.tensorboard import SummaryWriter  # here, since it takes seconds to import

    keys = ("found", "log_probability")
    maps = {key: [[cells[length, depth][key] for length in lengths] for depth in depths] for key in keys}
    with tempfile.TemporaryDirectory() as temporary:
        writer = SummaryWriter(temporary)
        for key, rows in maps.items():
            by_length = [sum(column) / len(depths) for column in zip(*rows)]
            writer.add_scalar(f"needle/{key}", sum(by_length) / len(lengths), step)
            for length, mean in zip(lengths, by_length):
                writer.add_scalar(f"needle_{key}_by_length/{length}", mean, step)
        try:
            columns, marks = [f"{length:,}" for length in lengths], [f"{depth:g}" for depth in depths]
            ranges = {"found": (0, 1), "log_probability": (None, 0)}
            figure = heat_maps(maps, ranges, "length, tokens", columns, "depth, %", marks)
            writer.add_figure("needle/by length and depth", figure, step)
        except ModuleNotFoundError as error:
            print(f"No heat map: {error.name} is not installed (pip install matplotlib)", file=sys.stderr)
        writer.close()
        (file,) = Path(temporary).iterdir()
        shutil.move(file, folder / f"events.out.tfevents.{step:010}.needle")


if __name__ == "__main__":
    main()
