"""Rows -> token sequences."""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from chunkflow.data.chat import labels_of
from chunkflow.data.rows import Row
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.planning.chunks import IGNORE


class Sequence(NamedTuple):
    """One sequence as the token cache has it. A token's label is the token itself, or -100: no loss."""

    tokens: list[int]
    labels: list[int]
    weights: list[float] | None  # of the loss on each token; None: 1 for all
    weight: float  # of the row: scales the loss on all of it


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
