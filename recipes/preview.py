"""Shows the sequences of a config's first step as the model gets them: tokens, their loss mask, chunks.

    python recipes/preview.py --job.config_file train_configs/debug_model.toml

Trains nothing; --training.global_batch_size=2 shows two sequences. Piped, or with NO_COLOR set, marks replace
colours.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator

from chunkflow.training import build, parallel
from chunkflow.training.start import main_config, user_errors, world_size

EDGE = 300  # tokens shown at each end of a longer piece
# ANSI backgrounds, two in turn to show where a token ends: greens with loss, greys without.
WITH_LOSS, WITHOUT_LOSS = ("\33[48;5;22m", "\33[48;5;28m"), ("\33[48;5;236m", "\33[48;5;240m")
RULE, RESET = "\33[36m", "\33[0m"


def main() -> None:
    # ---- The first step, for as many replicas as there would be.
    config = main_config(planned=True, check=build.model_spec)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    colours = colours and not config.metrics.disable_color_printing
    with user_errors():
        spec, seed = build.model_spec(config), parallel.set_seed(config.debug)
        dataset = build.open_data(config, spec, seed)
        replicas = world_size(planned=True) // config.parallelism.pipeline_parallel_degree
        settings = build.plan_settings(config, spec, replicas)
        loader = build.open_loader(config.training, dataset, settings, 0, seed)
        step = loader.step_at(0)
    kinds = [source.dataset for source in config.training.sources] or [config.training.dataset]
    source_of = step.source_of or [0] * len(step.rows)

    # ---- The pieces of each sequence in order: start, end, and chunk.
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
    legend = "".join(painted(["with loss", "without loss"], [True, False], colours))
    tokens = f"{step.plan.tokens:,} tokens in {step.plan.chunks:,} chunks"
    print(f"step 1: {len(step.rows)} sequences, {tokens}; {legend}")
    for sequence, (row, length) in enumerate(zip(step.rows, step.lengths)):
        tokens, labels, _ = dataset.row(row, length)
        ids = tokens.tolist()
        has_loss = [False, *(label != -100 for label in labels.tolist()[1:])]  # nothing predicts the first
        cut = f", cut from {dataset.lengths[row]:,}" if dataset.lengths[row] > length else ""
        source = f" ({loader.sources[source_of[sequence]]})" if loader.sources else ""
        print(f"\n{dataset.source(row)}{source}: {length:,} tokens{cut}, {sum(has_loss):,} with loss")
        tokenizer = (
            None if kinds[source_of[sequence]] == "synthetic" else spec.tokenizer
        )  # its ids are no text
        texts = list(tokenizer.pieces(ids)) if tokenizer else [f"{number} " for number in ids]
        for start, end, name in pieces[sequence]:
            line = f"---- tokens {start:,} to {end - 1:,}: {name} "
            print(f"{RULE}{line:-<100}{RESET}" if colours else f"{line:-<100}")
            parts = [(start, end)] if end - start <= 2 * EDGE else [(start, start + EDGE), (end - EDGE, end)]
            shown = ["".join(painted(texts[a:b], has_loss[a:b], colours)) for a, b in parts]
            print(f"\n... {end - start - 2 * EDGE:,} tokens ...\n".join(shown))


def painted(texts: list[str], has_loss: list[bool], colours: bool) -> Iterator[str]:
    """Each token's text on its colour; without colours tokens end in "|", and « » enclose those with loss."""
    before = False
    for index, (text, loss) in enumerate(zip(texts, has_loss)):
        text = "".join(
            letter if letter.isprintable() else "⏎\n" if letter == "\n" else ascii(letter)[1:-1]
            for letter in text
        )
        if colours:
            paint = (WITH_LOSS if loss else WITHOUT_LOSS)[index % 2]
            yield paint + text.replace("\n", f"{RESET}\n{paint}") + RESET
        else:
            mark = "«" if loss and not before else "»" if before and not loss else ""
            yield mark + text.removesuffix("\n") + "|" + ("\n" if text.endswith("\n") else "")
        before = loss
    if before and not colours:
        yield "»"


if __name__ == "__main__":
    main()
