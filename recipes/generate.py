"""Continues a text, or answers a question, with the model of a Hugging Face folder or of a run's checkpoint.

    python recipes/generate.py --model.hf_assets_path=my_model --chat --prompt "What is a chunk?"
    python recipes/generate.py --job.config_file outputs/config.toml --checkpoint outputs/checkpoint/step-100
    --prompt-file a.txt

One process, on a GPU where there is one. The prompt goes through the model in chunks of chunkflow.chunk_size
that leave nothing but their keys and values, so a long one takes the memory of one chunk and of its K/V; then
one token at a time on the same K/V. What is generated goes to stdout as it comes, everything else to stderr.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torch.hub import tqdm  # the real one where it is installed, else torch's small stand-in

from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.loss import last_logits
from chunkflow.execution.state import ChunkTensors, KeyValueState
from chunkflow.planning.chunks import Chunk, Group, Segment
from chunkflow.storage import hf_weights as hf
from chunkflow.storage.tensors import load_model_weights
from chunkflow.training import parallel
from chunkflow.training.build import check_cuda_dtype, model_args, open_tokenizer, positions
from chunkflow.training.start import read_config
from models.hf_config import end_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="The run's keys, such as --model.hf_assets_path, count too: recipes/finetune.py --help lists"
        " them.",
        allow_abbrev=False,
    )
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument("--prompt-file", type=Path, help="a file with the text to continue")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message, put into the model's chat template",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="weights of a run; --job.config_file then names its config.toml"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="(%(default)s) 0: always the likeliest token"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="(%(default)s) only the likeliest tokens that have this share",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s) of the random choices")
    parser.error = fail
    own, keys = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = read_config(keys)
        check_numbers(own)
        tokenizer = open_tokenizer(config.model)
        if tokenizer is None:
            raise ValueError(
                f"{config.model.hf_assets_path} has no tokenizer: set model.tokenizer_path to the model's own"
            )
        prompt, stops = encode(own, config, tokenizer)
        model = load_model(own, config, tokenizer, len(prompt), device)
    except ValueError as error:
        fail(error)

    times = [time.perf_counter()]
    ids = generate(model, prompt, own, config.chunkflow.chunk_size, tokenizer.vocab_size)
    for text in tokenizer.stream(until_stop(clocked(ids, times), stops), prompt[-1:]):
        print(text, end="", flush=True)
    print()
    rate = f" ({(len(times) - 2) / (times[-1] - times[1]):.1f} a second)" if len(times) > 2 else ""
    said = f"{len(prompt):,} tokens read in {times[1] - times[0]:.1f} s, {len(times) - 1:,} written{rate}"
    print(said, file=sys.stderr)


# ------------------------------------------------------------------------------------------------ before work


def fail(reason: object) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def check_numbers(own: argparse.Namespace) -> None:
    for option, value, good, rule in (
        ("--max-new-tokens", own.max_new_tokens, own.max_new_tokens >= 1, "at least 1"),
        (
            "--temperature",
            own.temperature,
            0 <= own.temperature < math.inf,
            "0 (always the likeliest token) or more",
        ),
        ("--top-p", own.top_p, 0 < own.top_p <= 1, "above 0 and at most 1 (all tokens)"),
    ):
        if not good:
            raise ValueError(f"{option} = {value} is out of range: choose a value {rule}")


def encode(own: argparse.Namespace, config, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """The prompt's ids, and each sequence of ids that ends what is generated."""
    if (own.prompt is None) == (own.prompt_file is None):
        raise ValueError(
            f"{'no' if own.prompt is None else 'a second'} prompt: give one, by --prompt or by --prompt-file"
        )
    text = own.prompt
    if text is None:
        try:
            text = own.prompt_file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--prompt-file = {own.prompt_file} cannot be read ({error}): name a file of UTF-8 text"
            ) from None
    ends = end_tokens(config.model.hf_assets_path) if config.model.hf_assets_path else []
    stops = [[number] for number in {tokenizer.eos_id, *ends} if number is not None]
    if own.chat:
        prompt, end_of_turn = tokenizer.question(text)
        return prompt, [*stops, end_of_turn] if end_of_turn else stops
    prompt = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    if not prompt:
        raise ValueError(
            "the prompt has no tokens, and the model no token for the beginning of a text: write some text"
        )
    return prompt, stops


def load_model(
    own: argparse.Namespace, config, tokenizer: Tokenizer, prompt_tokens: int, device: torch.device
) -> nn.Module:
    """The whole model in training.mixed_precision_param, with the weights of --checkpoint, else of the
    config's folder."""
    dtype = config.training.mixed_precision_param
    check_cuda_dtype(config.training)
    family, args = model_args(config.model, 1, tokenizer.vocab_size)  # the prompt decides on the length, here
    total = prompt_tokens + own.max_new_tokens
    if total > positions(args) and config.model.rope_scaling is None:
        raise ValueError(
            f"{prompt_tokens:,} tokens of the prompt and --max-new-tokens = {own.max_new_tokens:,} are beyond"
            f" the {positions(args):,} positions of the model: shorten one of them, or extend the context"
            " with model.rope_scaling"
        )
    if own.checkpoint:
        if not own.checkpoint.is_dir():
            raise ValueError(
                f"--checkpoint = {own.checkpoint} is not a folder: name one such as"
                " outputs/checkpoint/step-100"
            )
    elif folder := hf.weights_folder(config.checkpoint, config.model.hf_assets_path):
        hf.check_weights(folder, family, args)
    else:
        raise ValueError(
            "there are no weights: set --model.hf_assets_path to a folder with safetensors, or --checkpoint"
        )
    # A checkpoint is read as it was written, in training.dtype; that may be more than the device holds.
    with torch.device("meta"), parallel.default_dtype(config.training.dtype if own.checkpoint else dtype):
        model = family.Transformer(args)
    model.to_empty(device="cpu" if own.checkpoint else device)
    if own.checkpoint:
        load_model_weights(model, own.checkpoint)
    else:
        hf.load_weights(model, family, folder)
    return model.to(device, parallel.DTYPES[dtype])


# --------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def generate(
    model: nn.Module, prompt: list[int], own: argparse.Namespace, chunk_size: int, vocab_size: int
) -> Iterator[int]:
    """--max-new-tokens ids, one by one, each from the model's logits behind all before it.

    Ids from `vocab_size` on, which pad the embeddings of some models and which no tokenizer can write, are
    never chosen.
    """
    # All chunks are known now: the prompt's, then one for each new token but the last. So the K/V state has
    # room for them.
    starts = [*range(0, len(prompt), chunk_size), *range(len(prompt), len(prompt) + own.max_new_tokens)]
    group = Group(tuple(Chunk((Segment(0, start, end - start),)) for start, end in zip(starts, starts[1:])))
    state, device = KeyValueState(group), model.tok_embeddings.weight.device
    generator = torch.Generator().manual_seed(own.seed)
    tokens = list(prompt)
    with tqdm(
        total=len(prompt),
        unit="token",
        desc="reading the prompt",
        mininterval=1,
        disable=len(prompt) <= chunk_size,
    ) as bar:
        for index, (start, end) in enumerate(zip(starts, starts[1:])):
            inputs = torch.tensor(tokens[start:end])
            chunk = ChunkTensors(group.chunks[index], index, inputs, None, torch.arange(start, end)).to(
                device
            )
            chunk.state = state
            chunk.end = last_logits if end >= len(prompt) else None
            logits_V = model(chunk.tokens, chunk)
            if end <= len(prompt):
                bar.update(end - start)
            if end == len(prompt):
                bar.close()
            if chunk.end:
                tokens.append(sample(logits_V[:vocab_size], own.temperature, own.top_p, generator))
                yield tokens[-1]


def sample(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """An id, drawn from softmax(logits / temperature) among the fewest likeliest ids whose shares reach top_p
    together."""
    if temperature == 0:
        return int(logits_V.argmax())
    shares_V = torch.softmax(
        (logits_V - logits_V.max()) / temperature, dim=-1
    ).cpu()  # the same draw on any device
    if top_p < 1:
        sorted_V, ids_V = shares_V.sort(descending=True)
        likelier_V = sorted_V.cumsum(0) - sorted_V
        shares_V[ids_V[likelier_V >= top_p]] = 0
    return int(torch.multinomial(shares_V, 1, generator=generator))


def until_stop(ids: Iterator[int], stops: list[list[int]]) -> Iterator[int]:
    """`ids` up to the first of `stops`, which is left out: what may be the beginning of one waits for what
    follows."""
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
