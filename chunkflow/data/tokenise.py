"""Blocks of rows -> their sequences in tokens, by one function that every process can run: no torch here."""

from array import array
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from chunkflow.data.blocks import Block, Record, records
from chunkflow.data.chat import labels_of
from chunkflow.data.rows import Row, RowSettings, beyond_vocabulary, read_rows
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.planning.chunks import IGNORE

BATCH_CHARACTERS = 1 << 18  # tokenised at once; bounds the memory that tokenising takes


class Sequence(NamedTuple):
    """One sequence as the token cache has it. A token's label is the token itself, or -100: no loss."""

    tokens: list[int]
    labels: list[int]
    weights: list[float] | None  # of the loss on each token; None: 1 for all
    weight: float  # of the row: scales the loss on all of it


class TokenBlock:
    """The sequences of a block, one after the other, as the files of the token cache have them."""

    def __init__(self):
        self.rows = 0
        self.tokens = array("i")
        self.labels = array("i")  # the same object as `tokens` where they do not differ
        self.weights = array("d")  # of the loss on each token; empty: all 1
        self.ends = array("q")  # of the sequences, in tokens of the block
        self.sources = array("q")  # file and line of each
        self.row_weights = array("d")  # empty: all 1
        self.largest_id, self.largest_id_row = -1, 0  # of tokens and labels; the first sequence that has it
        self.notes: set[str] = set()


def tokenise_block(block: Block, settings: RowSettings) -> TokenBlock:
    """Reads the rows of a block and tokenises them. ValueError, one sentence with FILE:LINE, for the first
    faulty one."""
    done, labels_differ = TokenBlock(), False
    for batch in _batches(block, settings, done):
        sequences = tokenised([row for _, row in batch], settings.tokenizer)
        for (record, _), sequence in zip(batch, sequences):
            try:
                if isinstance(sequence, ValueError):
                    raise sequence
                largest = _largest_id(sequence, settings.vocab_size)
            except ValueError as error:
                raise ValueError(f"{record.source}: {error}") from None
            if largest > done.largest_id:
                done.largest_id, done.largest_id_row = largest, len(done.ends)
            tokens, labels, weights, weight = sequence
            if weights is not None or done.weights:
                _extend(done.weights, len(done.tokens), weights or [1.0] * len(tokens))
            if weight != 1 or done.row_weights:
                _extend(done.row_weights, len(done.ends), [weight])
            labels_differ = labels_differ or labels != tokens
            done.tokens.extend(array("i", tokens))
            done.labels.extend(array("i", labels))
            done.ends.append(len(done.tokens))
            done.sources.extend((block.file, record.line))
    if not labels_differ:
        done.labels = done.tokens
    return done


def _extend(weights: array, place: int, new: list[float]) -> None:
    """Adds weights from `place` on; before it come 1s where there are none yet."""
    weights.extend(array("d", [1.0]) * (place - len(weights)))
    weights.extend(array("d", new))


def _largest_id(sequence: Sequence, vocab_size: int) -> int:
    """Of tokens and labels. ValueError for a sequence without tokens, or beyond the vocabulary."""
    if not sequence.tokens:
        raise ValueError("the text is empty, and the tokenizer has no BOS or EOS to add: remove the row")
    largest = max(max(sequence.tokens), max(sequence.labels))
    if largest >= vocab_size:
        raise ValueError(beyond_vocabulary(largest, vocab_size))
    return largest


def _batches(block: Block, settings: RowSettings, done: TokenBlock) -> Iterator[list[tuple[Record, Row]]]:
    """Each record with each of its rows, about BATCH_CHARACTERS at a time. Before the ValueError for a faulty
    row come those before it, since one of them may turn out to be faulty, too."""
    batch, characters, fault = [], 0, None
    try:
        for record in records(block):
            try:
                rows = read_rows(record.content, settings, done.notes)
            except ValueError as error:
                raise ValueError(f"{record.source}: {error}") from None
            done.rows += 1
            for row in rows:
                batch.append((record, row))
                characters += sum(len(content) for content, _ in row.spans)
                characters += len(row.chat.text) if row.chat else 0
                if characters >= BATCH_CHARACTERS:
                    yield batch
                    batch, characters = [], 0
    except ValueError as error:
        fault = error
    yield batch
    if fault:
        raise fault


def tokenised(rows: list[Row], tokenizer: Tokenizer | None) -> Iterator[Sequence | ValueError]:
    """The sequence of each row; for a row whose turns and tokens have no common bounds a ValueError, to be
    raised with the row's place."""
    texts = [content for row in rows for content, _ in row.spans if isinstance(content, str)]
    encoded = iter(tokenizer.encode_batch(texts) if texts else [])
    chats = [row.chat for row in rows if row.chat]
    encoded_chats = iter(tokenizer.encode_chats(chats) if chats else [])
    for row in rows:
        if row.chat:
            tokens, offsets = next(encoded_chats)
            try:
                labels, weights = labels_of(row.chat, tokens, offsets)
            except ValueError as error:
                yield error
                continue
        else:
            tokens, labels, weights = _joined(row, encoded)
        yield Sequence(tokens, labels, weights, row.weight)


def _joined(row: Row, encoded: Iterator[list[int]]) -> tuple[list[int], list[int], list[float] | None]:
    """Tokens, labels and weights of a row of spans. `encoded`: the tokens of those that are text."""
    parts = [(next(encoded) if isinstance(part, str) else part, weight) for part, weight in row.spans]
    tokens = list(chain.from_iterable(ids for ids, _ in parts))
    labels, weights = row.labels, row.weights
    if labels is None:
        labels = list(chain.from_iterable(ids if weight else [IGNORE] * len(ids) for ids, weight in parts))
    if weights is None and any(weight not in (0, 1) for _, weight in parts):
        weights = list(chain.from_iterable([weight or 1.0] * len(ids) for ids, weight in parts))
    return tokens, labels, weights
