"""Reads tokens in chunks without training, and goes on from them: for generation and evaluation.

Shape suffixes: V vocabulary, A tokens of an answer.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from chunkflow.execution.host_state import HostMemory, Use
from chunkflow.execution.loss import last_logits, token_losses
from chunkflow.execution.state import ChunkTensors, End, KeyValueState
from chunkflow.planning.chunks import Chunk, Group, Segment


class Context:
    """The tokens that a model has read, with their keys and values: at most `capacity` of them.

    They run through the model in chunks of at most `chunk_size`, which keep nothing else: a long text takes
    the memory of one chunk, and of keys and values, which are allocated for `capacity` tokens. With
    `kv_offload` those are in host memory, on the device two layers' only: each chunk copies all that were
    read before it, also one of a single token.
    """

    def __init__(self, model: nn.Module, capacity: int, chunk_size: int, kv_offload: bool = False):
        self.tokens: list[int] = []
        self._model, self._chunk_size = model, chunk_size
        self._device = model.tok_embeddings.weight.device
        self._host = HostMemory(self._device) if kv_offload else None
        self._state = KeyValueState(Group((Chunk((Segment(0, 0, capacity),)),)), self._host)
        self._state.chunk_starts = range(capacity)  # here a chunk's index is where it starts

    def forget(self, start: int) -> None:
        """Forgets the tokens from position `start` on; what follows is read in their place."""
        del self.tokens[start:]

    def read(
        self, ids: list[int], end: End | None = None, told: Callable[[int], object] = lambda tokens: None
    ) -> torch.Tensor | None:
        """Reads `ids` behind the tokens read before; returns the model's result by `end` in the last chunk
        (None: there is none). `told` is called with the number of tokens of each chunk."""
        result = None
        for first in range(0, len(ids), self._chunk_size):
            part = ids[first : first + self._chunk_size]
            result = self._run(part, end if first + len(part) == len(ids) else None)
            told(len(part))
        return result

    def losses(self, ids: list[int], targets: list[int]) -> torch.Tensor:
        """Reads `ids`, a few, as one chunk; minus the log-probability of each target after the id at its
        place: (A,), in at least fp32."""
        return self._run(ids, token_losses, targets)

    @torch.no_grad()
    def _run(self, ids: list[int], end: End | None, labels: list[int] | None = None) -> torch.Tensor | None:
        start = len(self.tokens)
        positions_T = torch.arange(start, start + len(ids))
        labels_T = None if labels is None else torch.tensor(labels)
        segment = Segment(0, start, len(ids))
        chunk = ChunkTensors(Chunk((segment,)), start, torch.tensor(ids), labels_T, positions_T)
        chunk = chunk.to(self._device)
        chunk.state, chunk.end = self._state, end
        self.tokens += ids
        if self._host:
            self._host.begin(*(Use(self._state, index, False) for index in (start, len(self.tokens))))
        return self._model(chunk.tokens, chunk)


def continuation(
    context: Context, logits_V: torch.Tensor, count: int, choose: Callable[[torch.Tensor], int]
) -> Iterator[int]:
    """Yields `count` ids that follow the context: `choose` makes each from the logits after all before it,
    the first from `logits_V`. The last one is not read."""
    for left in reversed(range(count)):
        number = choose(logits_V)
        yield number
        if left:
            logits_V = context.read([number], last_logits)
