"""Shows the sequences of a config's first step as the model will get them: tokens, which of them have loss,
where chunks end.

    python recipes/preview.py --job.config_file train_configs/debug_model.toml

Trains nothing; --training.global_batch_size=2 shows two sequences. Piped, or with NO_COLOR set, marks replace
colours.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import open_dataset
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings
from chunkflow.settings.config import main_config, user_errors
from chunkflow.training import parallel
from chunkflow.training.model import model_args, open_tokenizer

EDGE = 300  # tokens shown at each end of a longer piece
# ANSI backgrounds, two of each kind in turn, so that one sees where a token ends: greens with loss, greys
# without.
WITH_LOSS, WITHOUT_LOSS = ("\33[48;5;22m", "\33[48;5;28m"), ("\33[48;5;236m", "\33[48;5;240m")
RULE, RESET = "\33[36m", "\33[0m"


def main() -> None:
    config = main_config(planned=True, check=lambda config: model_args(config, vocab_size=0))
    training = config.training
    colours = (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not config.metrics.disable_color_printing
    )
    ranks = int(os.environ.get("NGPU") or 1) * int(os.environ.get("NNODES") or 1)
    with user_errors():
        tokenizer = open_tokenizer(config)
        _, args = model_args(config, tokenizer.vocab_size if tokenizer else 0)
        seed = parallel.set_seed(config)
        dataset = open_dataset(
            training.dataset, training.dataset_path, tokenizer, vocab_size=args.vocab_size, seed=seed
        )
        settings = PlanSettings(
            Cost.of_model(args),
            ranks=ranks // config.parallelism.pipeline_parallel_degree,
            enable=config.chunkflow.enable,
            chunk_size=config.chunkflow.chunk_size,
            k=config.chunkflow.k,
            fill_tails=config.chunkflow.fill_tails,
            balance=config.chunkflow.balance,
        )
        loader = ChunkDataLoader(
            dataset,
            settings,
            rank=0,
            global_batch_size=training.global_batch_size,
            seq_len=training.seq_len,
            overlong=training.overlong,
            shuffle=training.shuffle,
            seed=seed,
        )
    step = loader.step_at(0)
    if training.dataset == "synthetic":
        tokenizer = None  # its ids are no text

    # Of each sequence, its pieces in order: where they start and end, and in which chunk they lie.
    pieces = defaultdict(list)
    for rank, groups in enumerate(step.plan.groups):
        for group_number, group in enumerate(groups):
            for place, chunk in enumerate(group.chunks, start=1):
                name = (
                    f"rank {rank}, group {group_number}, chunk {place} of {len(group.chunks)}"
                    f" ({chunk.tokens:,} tokens)"
                )
                for segment in chunk.segments:
                    pieces[segment.sequence].append((segment.start, segment.start + segment.length, name))

    legend = "".join(painted(["with loss", "without loss"], [True, False], colours))
    print(
        f"step 1: {len(step.rows)} sequences, {step.plan.tokens:,} tokens in {step.plan.chunks:,} chunks;"
        f" {legend}"
    )
    for sequence, (row, length) in enumerate(zip(step.rows, step.lengths)):
        tokens, labels = dataset.row(row, length)
        ids = tokens.tolist()
        has_loss = [
            False,
            *(label != -100 for label in labels.tolist()[1:]),
        ]  # nothing comes before the first token
        cut = f", cut from {dataset.lengths[row]:,}" if dataset.lengths[row] > length else ""
        print(f"\n{dataset.source(row)}: {length:,} tokens{cut}, {sum(has_loss):,} with loss")
        texts = list(tokenizer.pieces(ids)) if tokenizer else [f"{number} " for number in ids]
        for start, end, name in pieces[sequence]:
            line = f"---- tokens {start:,} to {end - 1:,}: {name} "
            print(f"{RULE}{line:-<100}{RESET}" if colours else f"{line:-<100}")
            parts = [(start, end)] if end - start <= 2 * EDGE else [(start, start + EDGE), (end - EDGE, end)]
            shown = ["".join(painted(texts[a:b], has_loss[a:b], colours)) for a, b in parts]
            print(f"\n... {end - start - 2 * EDGE:,} tokens ...\n".join(shown))


def painted(texts: list[str], has_loss: list[bool], colours: bool) -> Iterator[str]:
    """Each token's text on its colour; without colours tokens end in "|", and those with loss stand within «
    and »."""
    before = False
    for place, (text, loss) in enumerate(zip(texts, has_loss)):
        text = "".join(
            letter if letter.isprintable() else "⏎\n" if letter == "\n" else ascii(letter)[1:-1]
            for letter in text
        )
        if colours:
            paint = (WITH_LOSS if loss else WITHOUT_LOSS)[place % 2]
            yield paint + text.replace("\n", f"{RESET}\n{paint}") + RESET
        else:
            yield (
                ("«" if loss and not before else "»" if before and not loss else "")
                + text.removesuffix("\n")
                + "|"
                + ("\n" if text.endswith("\n") else "")
            )
        before = loss
    if before and not colours:
        yield "»"


if __name__ == "__main__":
    main()
