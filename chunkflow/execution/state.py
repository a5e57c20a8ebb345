"""What a model gets with a chunk, and the K/V state that the chunks of one group share.

Neither class is a dataclass: FSDP2 rebuilds dataclasses among a module's inputs when it casts them, and
writes to the copy would be lost.

Shape suffixes: T tokens of the chunk, P tokens before it in the same sequence, G key/value heads, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from chunkflow.planning.chunks import Chunk, Group


class ChunkTensors:
    """One chunk as the model sees it.

    tokens, labels, positions: (T,) int64. `labels[t]` is the target of position t (already shifted), -100
    where there is none. No labels at all (None) will do for an `end` that reads none. `lengths` are the
    tokens of each segment; the first one attends to `prefix` earlier tokens of its sequence. `index` counts
    the chunks of a group.

    Set before each forward: `state`, None for a standalone chunk; `end`, which turns the last hidden states
    (T, C), the head's weight (V, C) and this chunk into the model's output, such as loss_sum of
    chunkflow.execution.loss (None: only the chunk's keys and values are wanted, FORWARD_STATE);
    `loss_gradient`, what backward will send to the loss, where that backward is the very next action.
    """

    def __init__(
        self,
        chunk: Chunk,
        index: int,
        tokens: torch.Tensor,
        labels: torch.Tensor | None,
        positions: torch.Tensor,
    ):
        self.index = index
        self.prefix = chunk.prefix
        self.lengths = [segment.length for segment in chunk.segments]
        self.tokens, self.labels, self.positions = tokens, labels, positions
        self.state: KeyValueState | None = None
        self.end: Callable[[torch.Tensor, torch.Tensor, ChunkTensors], torch.Tensor] | None = None
        self.loss_gradient: float | None = None
        # Cumulative lengths of queries and of keys, for variable-length attention on CUDA.
        self.ends = list(accumulate(self.lengths, initial=0))
        self.query_ends = torch.tensor(self.ends, dtype=torch.int32)
        self.key_ends = torch.tensor([0] + [self.prefix + end for end in self.ends[1:]], dtype=torch.int32)

    def to(self, device: torch.device) -> ChunkTensors:
        """Moves the tensors, without waiting for the copy."""
        for name in ("tokens", "labels", "positions", "query_ends", "key_ends"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device, non_blocking=True))
        return self


class KeyValueState:
    """Keys and values of a group's tokens so far, and the gradients that later chunks sent back to them, for
    each layer.

    Keys and values of a layer lie in one buffer for the whole group, so that a chunk reads its prefix without
    copying it. Gradients are kept a chunk each, in at least fp32, and are gone as soon as that chunk's
    backward has taken them.
    """

    def __init__(self, group: Group):
        self.chunk_starts = [chunk.prefix for chunk in group.chunks]
        self.tokens = (
            group.tokens
        )  # a tail's packed neighbours included: behind the prefix, where one call on CUDA reads them
        self.buffers: dict[int, torch.Tensor] = {}  # layer -> (2, tokens, G, D): keys and values
        self.gradients: dict[
            int, dict[int, torch.Tensor]
        ] = {}  # layer -> chunk -> (2, tokens of the chunk, G, D)
        self.next_backward: dict[
            int, int
        ] = {}  # layer -> index of the only chunk whose backward may come now

    def write(self, layer: int, start: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> None:
        """Stores a chunk's keys and values. Writing them again (recompute, activation checkpointing) changes
        nothing."""
        buffer = self.buffers.get(layer)
        if buffer is None:
            buffer = self.buffers[layer] = k_TGD.new_empty(2, self.tokens, *k_TGD.shape[1:])
        buffer[0, start : start + k_TGD.size(0)].copy_(k_TGD)
        buffer[1, start : start + v_TGD.size(0)].copy_(v_TGD)

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens `start .. end - 1`: two views, each (end - start, G, D)."""
        buffer = self.buffers[layer]
        return buffer[0, start:end], buffer[1, start:end]

    def exchange_gradients(
        self, layer: int, index: int, dk_PGD: torch.Tensor | None, dv_PGD: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Adds chunk `index`'s gradients to those of the chunks before it; returns what later chunks had left
        for itself.

        Returns (2, T, G, D) or None. A chunk's gradient is complete only when every later chunk has sent its
        share.
        """
        expected = self.next_backward.get(layer, len(self.chunk_starts) - 1)
        assert index == expected, (
            f"layer {layer}: backward of chunk {index}, but chunk {expected} comes first"
        )
        self.next_backward[layer] = index - 1
        gradients = self.gradients.setdefault(layer, {})
        for earlier, (start, end) in enumerate(zip(self.chunk_starts[:index], self.chunk_starts[1:])):
            if earlier in gradients:
                gradients[earlier][0] += dk_PGD[start:end]
                gradients[earlier][1] += dv_PGD[start:end]
            else:
                both = torch.stack((dk_PGD[start:end], dv_PGD[start:end]))
                gradients[earlier] = both.to(torch.promote_types(both.dtype, torch.float32))
        return gradients.pop(index, None)

    def bytes(self) -> int:
        """What the state holds now, on this stage."""
        gradients = [gradient for layer in self.gradients.values() for gradient in layer.values()]
        return sum(tensor.nbytes for tensor in [*self.buffers.values(), *gradients])
