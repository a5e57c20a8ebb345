"""Continues a text, or answers a question, with the model of a Hugging Face folder or of a run's checkpoint.

    python recipes/generate.py --model.hf_assets_path=my_model --chat --prompt "What is a chunk?"
    python recipes/generate.py --job.config_file outputs/config.toml --checkpoint outputs/checkpoint/step-100
    --prompt-file a.txt

One process, on a GPU if the machine has one. The prompt runs through the model in chunks of
chunkflow.chunk_size, which keep only their keys and values: a long one takes the memory of one chunk and of
the K/V. Then one token at a time. The generated text goes to stdout as it comes, the rest to stderr.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.hub import tqdm  # the real one where it is installed, else torch's small stand-in

from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.generation import Context, continuation
from chunkflow.execution.loss import last_logits
from chunkflow.storage.trained import load_trained
from chunkflow.training.build import open_text_tokenizer
from chunkflow.training.model_sizes import model_args, positions
from chunkflow.training.start import fail, options_beside_config, read_config
from models.hf_config import end_tokens


def main() -> None:
    parser = options_beside_config(__doc__)
    add, default = parser.add_argument, "(%(default)s)"
    add("--prompt", help="the text to continue")
    add("--prompt-file", type=Path, help="a file with the text to continue")
    chat = "the prompt is a user's message, put into the model's chat template"
    add("--chat", action="store_true", help=chat)
    add("--checkpoint", type=Path, help="weights of a run; --job.config_file then names its config.toml")
    add("--max-new-tokens", type=int, default=256, help=default)
    add("--temperature", type=float, default=0.7, help=f"{default} 0: always the likeliest token")
    add("--top-p", type=float, default=0.95, help=f"{default} only the likeliest tokens that have this share")
    add("--seed", type=int, default=0, help=f"{default} of the random choices")
    cli, keys = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = read_config(keys)
        check_numbers(cli)
        tokenizer = open_text_tokenizer(config)
        prompt, stops = encode(cli, config, tokenizer)
        model = load_model(cli, config, tokenizer, len(prompt), device)
    except ValueError as error:
        fail(error)

    times = [time.perf_counter()]
    chunkflow, vocab_size = config.chunkflow, tokenizer.vocab_size
    offload = chunkflow.kv_offload == "host"
    ids = generate(model, prompt, cli, chunkflow.chunk_size, vocab_size, kv_offload=offload)
    for text in tokenizer.stream(until_stop(clocked(ids, times), stops), prompt[-1:]):
        print(text, end="", flush=True)
    print()
    rate = f" ({(len(times) - 2) / (times[-1] - times[1]):.1f} a second)" if len(times) > 2 else ""
    said = f"{len(prompt):,} tokens read in {times[1] - times[0]:.1f} s, {len(times) - 1:,} written{rate}"
    print(said, file=sys.stderr)


# ------------------------------------------------------------------------------------------------ before work


def check_numbers(cli: argparse.Namespace) -> None:
    count, temperature, top_p = cli.max_new_tokens, cli.temperature, cli.top_p
    for option, value, good, rule in (
        ("--max-new-tokens", count, count >= 1, "at least 1"),
        ("--temperature", temperature, 0 <= temperature < math.inf, "0 (always the likeliest token) or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (all tokens)"),
    ):
        if not good:
            raise ValueError(f"{option} = {value} is out of range: choose a value {rule}")


def encode(cli: argparse.Namespace, config, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """The prompt's ids, and the sequences of ids that end the generated text."""
    if (cli.prompt is None) == (cli.prompt_file is None):
        raise ValueError(
            f"{'no' if cli.prompt is None else 'a second'} prompt: give one, by --prompt or by --prompt-file"
        )
    text = cli.prompt
    if text is None:
        try:
            text = cli.prompt_file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--prompt-file = {cli.prompt_file} cannot be read ({error}): name a file of UTF-8 text"
            ) from None
    ends = end_tokens(config.model.hf_assets_path) if config.model.hf_assets_path else []
    stops = [[number] for number in {tokenizer.eos_id, *ends} if number is not None]
    if cli.chat:
        prompt, end_of_turn = tokenizer.question(text)
        return prompt, [*stops, end_of_turn] if end_of_turn else stops
    prompt = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    if not prompt:
        raise ValueError(
            "the prompt has no tokens, and the model no token for the beginning of a text: write some text"
        )
    return prompt, stops


def load_model(
    cli: argparse.Namespace, config, tokenizer: Tokenizer, prompt_tokens: int, device: torch.device
) -> nn.Module:
    """The model, which has room for the prompt and what is asked for."""
    family, args = model_args(config.model, 1, tokenizer.vocab_size)  # of any length: checked here
    total = prompt_tokens + cli.max_new_tokens
    if total > (most := positions(config.model, args)):
        raise ValueError(
            f"{prompt_tokens:,} tokens of the prompt and --max-new-tokens = {cli.max_new_tokens:,} are beyond"
            f" the {most:,} positions of the model: shorten one of them, or extend the context with"
            " model.rope_scaling (YaRN) or model.max_positions"
        )
    return load_trained(config, cli.checkpoint, family, args, device)


# --------------------------------------------------------------------------------------------------- sampling


def generate(
    model: nn.Module,
    prompt: list[int],
    cli: argparse.Namespace,
    chunk_size: int,
    vocab_size: int,
    kv_offload: bool = False,
) -> Iterator[int]:
    """Yields --max-new-tokens ids, each from the model's logits after all before it. Ids from `vocab_size`
    on, which pad the embeddings of some models, are never chosen."""
    context = Context(model, len(prompt) + cli.max_new_tokens - 1, chunk_size, kv_offload)
    generator, short = torch.Generator().manual_seed(cli.seed), len(prompt) <= chunk_size

    def choose(logits_V: torch.Tensor) -> int:
        return sample(logits_V[:vocab_size], cli.temperature, cli.top_p, generator)

    with tqdm(
        total=len(prompt), unit="token", desc="reading the prompt", mininterval=1, disable=short
    ) as bar:
        logits_V = context.read(prompt, last_logits, bar.update)
    yield from continuation(context, logits_V, cli.max_new_tokens, choose)


def sample(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """An id, drawn from softmax(logits / temperature) among the likeliest ids that together reach top_p."""
    if temperature == 0:
        return int(logits_V.argmax())
    shares_V = torch.softmax((logits_V - logits_V.max()) / temperature, dim=-1)
    shares_V = shares_V.cpu()  # the same draw on any device
    if top_p < 1:
        sorted_V, ids_V = shares_V.sort(descending=True)
        likelier_V = sorted_V.cumsum(0) - sorted_V
        shares_V[ids_V[likelier_V >= top_p]] = 0
    return int(torch.multinomial(shares_V, 1, generator=generator))


def until_stop(ids: Iterator[int], stops: list[list[int]]) -> Iterator[int]:
    """`ids` before the first of `stops`; an id that may begin one waits for the ids that follow."""
    held, longest = [], max(map(len, stops), default=1)
    for number in ids:
        held.append(number)
        for stop in stops:
            if held[-len(stop) :] == stop:
                yield from held[: -len(stop)]
                return
        if len(held) == longest:
            yield held.pop(0)
    yield from held


def clocked(ids: Iterator[int], times: list[float]) -> Iterator[int]:
    for number in ids:
        times.append(time.perf_counter())
        yield number


if __name__ == "__main__":
    main()
