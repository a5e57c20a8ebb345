"""Shows the sequences of a config's first step as the model gets them: tokens, their loss mask, chunks.

    python recipes/preview.py --job.config_file train_configs/debug_model.toml

Trains nothing; --training.global_batch_size=2 shows two sequences. Long pieces are cut in the middle; --html
FILE writes them whole, into a page for a browser. Piped, or with NO_COLOR set, marks replace colours.
"""

import argparse
import functools
import html
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from chunkflow.data.preference import ANSWERS
from chunkflow.training import build, parallel
from chunkflow.training.start import main_config, user_errors, world_size

EDGE = 300  # tokens shown at each end of a longer piece
# ANSI backgrounds, two in turn to show where a token ends: greens with loss, greys without.
WITH_LOSS, WITHOUT_LOSS = ("\33[48;5;22m", "\33[48;5;28m"), ("\33[48;5;236m", "\33[48;5;240m")
RULE, RESET = "\33[36m", "\33[0m"
STYLE = """\
body { font: 14px sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; margin: 0 }
h2 { font-size: 1em; margin: 2.5em 0 0.3em }
.chunk { color: #777; border-top: 1px solid #bbb; margin-top: 0.8em }
i { font-style: normal } i:nth-of-type(odd) { background: #eee } i:nth-of-type(even) { background: #e2e2e2 }
i.loss:nth-of-type(odd) { background: #a8e6a1 } i.loss:nth-of-type(even) { background: #8fd987 }"""


class Token(NamedTuple):
    text: str
    number: int  # its id
    weight: float  # of the loss on it; 0: none


class Page(NamedTuple):
    """One sequence."""

    title: str
    tokens: list[Token]
    pieces: list[tuple[int, int, str]]  # first token, end, and the chunk they are in


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--html", type=Path)
    options, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print("--html FILE: write the sequences into a page for a browser.\n")
    config = main_config(rest, planned=True, check=functools.partial(build.check, planned=True))
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    colours = colours and not config.metrics.disable_color_printing

    # What the log says of the data, such as keys that are not read.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    # ---- The first step, for as many replicas as there would be.
    with user_errors():
        spec, seed = build.model_spec(config), parallel.set_seed(config.debug)
        dataset = build.open_data(config, spec, seed, pairs=None)
        replicas = world_size(planned=True) // config.parallelism.pipeline_parallel_degree
        settings = build.plan_settings(config, spec, replicas)
        loader = build.open_loader(config.training, dataset, settings, 0, seed)
        step = loader.step_at(0)
    kinds = [source.dataset for source in config.training.sources] or [config.training.dataset]
    source_of = step.source_of or [0] * len(step.rows)

    # ---- The pieces of each sequence in order.
    pieces = defaultdict(list)
    for replica, groups in enumerate(step.plan.groups):
        for group_number, group in enumerate(groups):
            for number, chunk in enumerate(group.chunks, start=1):
                name = f"rank {replica}, group {group_number}, chunk {number} of {len(group.chunks)}"
                name += f" ({chunk.tokens:,} tokens)"
                for segment in chunk.segments:
                    end = segment.start + segment.length
                    pieces[segment.sequence].append((segment.start, end, name))

    # ---- The pages.
    pages, shown = [], set()
    for sequence, (row, length) in enumerate(zip(step.rows, step.lengths)):
        if row in shown:  # the data has fewer rows than the step
            continue
        shown.add(row)
        tokens, labels, weights = dataset.row(row, length)
        weights = [1.0] * length if weights is None else weights.tolist()
        weights = [w * dataset.weight(row) * (label != -100) for w, label in zip(weights, labels.tolist())]
        weights[0] = 0.0  # nothing predicts the first
        ids = tokens.tolist()
        # ids of synthetic data are no text
        tokenizer = None if kinds[source_of[sequence]] == "synthetic" else spec.tokenizer
        texts = tokenizer.pieces(ids) if tokenizer else [f"{number} " for number in ids]
        cut = f", cut from {dataset.lengths[row]:,}" if dataset.lengths[row] > length else ""
        source = f" ({loader.sources[source_of[sequence]]})" if loader.sources else ""
        source += f", {ANSWERS[row % 2]}" if loader.pairs else ""
        title = (
            f"{dataset.source(row)}{source}: {length:,} tokens{cut}, {sum(map(bool, weights)):,} with loss"
        )
        if others := sorted({weight for weight in weights if weight not in (0, 1)}):
            title += f", of weight {', '.join(f'{weight:g}' for weight in others[:5])}"
            title += ", ..." if len(others) > 5 else ""
        pages.append(Page(title, list(map(Token, texts, ids, weights)), sorted(pieces[sequence])))
    summary = (
        f"step 1: {len(step.rows)} sequences, {step.plan.tokens:,} tokens in {step.plan.chunks:,} chunks"
    )
    if options.html:
        with user_errors():
            options.html.write_text(in_html(summary, pages), encoding="utf-8")
        print(f"{options.html}: {len(pages)} sequences, open it in a browser")
    else:
        print_pages(summary, pages, colours)


def print_pages(summary: str, pages: list[Page], colours: bool) -> None:
    legend = "".join(painted([Token("with loss", 0, 1.0), Token("without loss", 0, 0.0)], colours))
    print(f"{summary}; {legend}")
    for page in pages:
        print(f"\n{page.title}")
        for start, end, name in page.pieces:
            line = f"---- tokens {start:,} to {end - 1:,}: {name} "
            print(f"{RULE}{line:-<100}{RESET}" if colours else f"{line:-<100}")
            parts = [(start, end)] if end - start <= 2 * EDGE else [(start, start + EDGE), (end - EDGE, end)]
            shown = ["".join(painted(page.tokens[a:b], colours)) for a, b in parts]
            print(f"\n... {end - start - 2 * EDGE:,} tokens ...\n".join(shown))


def painted(tokens: list[Token], colours: bool) -> Iterator[str]:
    """Each token's text on its colour; without colours tokens end in "|", and « » enclose those with loss."""
    before = False
    for index, token in enumerate(tokens):
        text, loss = visible(token.text), token.weight != 0
        if colours:
            paint = (WITH_LOSS if loss else WITHOUT_LOSS)[index % 2]
            yield paint + text.replace("\n", f"{RESET}\n{paint}") + RESET
        else:
            mark = "«" if loss and not before else "»" if before and not loss else ""
            yield mark + text.removesuffix("\n") + "|" + ("\n" if text.endswith("\n") else "")
        before = loss
    if before and not colours:
        yield "»"


def visible(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else "⏎\n" if letter == "\n" else ascii(letter)[1:-1]
        for letter in text
    )


def in_html(summary: str, pages: list[Page]) -> str:
    """A page of all sequences, whole: a token's colour says whether there is loss on it, its tooltip the id
    and the weight."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(summary)}</title><style>{STYLE}</style>",
        f"<p>{html.escape(summary)}; <i class=loss>with loss</i> <i>without loss</i></p>",
    ]
    for page in pages:
        parts.append(f"<h2>{html.escape(page.title)}</h2>")
        for start, end, name in page.pieces:
            parts.append(f"<div class=chunk>tokens {start:,} to {end - 1:,}: {html.escape(name)}</div><pre>")
            for token in page.tokens[start:end]:
                kind = " class=loss" if token.weight else ""
                weight = f", weight {token.weight:g}" if token.weight not in (0, 1) else ""
                text = html.escape(visible(token.text))
                parts.append(f'<i{kind} title="id {token.number}{weight}">{text}</i>')
            parts.append("</pre>")
    return "".join(parts)


if __name__ == "__main__":
    main()
