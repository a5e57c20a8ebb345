"""A chunk's tensors, and the K/V state that the chunks of one group share.

Neither class is a dataclass: FSDP2 copies dataclasses among a module's inputs, and writes to a copy are lost.

Shape suffixes: T tokens of the chunk, P tokens of its prefix, G key/value heads, D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from chunkflow.planning.chunks import IGNORE, ONE_TOKEN, Chunk, Group

if TYPE_CHECKING:
    from chunkflow.execution.host_state import HostMemory
    from chunkflow.execution.kept_attention import KeptAttention
    from chunkflow.execution.shared_state import SharedKeyValueState


DEVICE_TENSORS = ("tokens", "labels", "weights", "positions", "query_ends", "key_ends")


class ChunkTensors:
    """One chunk: the model's input.

    tokens, labels, positions: (T,) int64. `labels[t]` is the target of position t (already shifted), -100
    for no target; `labels` is None in generation. `weights[t]` scales the loss on that target: (T,) float64,
    None where all are 1. `lengths` are the tokens of each segment; the first segment attends to `prefix`
    earlier tokens of its sequence. `sequences`: (2, S) int64, on the host: the plan's number of each sequence
    in the chunk, and its tokens here. `index`: of the chunk in its group. `parts`: this rank's two of a chunk
    that ranks share, as chunks without tensors; of other chunks none.

    The runner sets, before each forward: `state` (None for a standalone chunk); `kept`, where results of
    attention are kept for later forwards (None: nowhere); `end`, the function of the
    last hidden states, the head's weight and this chunk that returns the model's result (None: only keys and
    values are stored); `loss_gradient`, the gradient of the chunk's loss if its backward is the very next
    action, else None; `loss_weights`, `weights` times the weight of each token's sequence, None where all are
    1; `wants_losses`: whether the loss is to leave that of each token, (T,), not weighted, in `losses`.
    """

    def __init__(
        self,
        chunk: Chunk,
        index: int,
        tokens: torch.Tensor,
        labels: torch.Tensor | None,
        positions: torch.Tensor,
        shared: bool = False,
        weights: torch.Tensor | None = None,
    ):
        self.index = index
        self.prefix = chunk.prefix
        self.lengths = [segment.length for segment in chunk.segments]
        self.tokens, self.labels, self.positions, self.weights = tokens, labels, positions, weights
        numbers = [segment.sequence for segment in chunk.segments]
        # Both parts of a shared chunk are of one sequence: each number is there once.
        self.sequences = torch.tensor(
            [numbers[:1], [chunk.tokens]] if shared else [numbers, self.lengths], dtype=torch.int64
        )
        self.parts = []
        if shared:
            none = None, None, None
            self.parts = [ChunkTensors(Chunk((segment,)), index, *none) for segment in chunk.segments]
        self.state: KeyValueState | SharedKeyValueState | None = None
        self.kept: KeptAttention | None = None
        self.end: End | None = None
        self.loss_gradient: float | None = None
        self.loss_weights: torch.Tensor | None = None
        self.wants_losses, self.losses = False, None
        # Cumulative lengths of queries and of keys, for variable-length attention on CUDA.
        self.ends = list(accumulate(self.lengths, initial=0))
        self.query_ends = torch.tensor(self.ends, dtype=torch.int32)
        self.key_ends = torch.tensor([0] + [self.prefix + end for end in self.ends[1:]], dtype=torch.int32)

    def to(self, device: torch.device) -> ChunkTensors:
        """A copy on the device, made asynchronously. On the same device the tensors are shared. `sequences`
        stay on the host: few steps need them."""
        return self._with_each(DEVICE_TENSORS, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> ChunkTensors:
        """A copy in pinned memory: from other memory a GPU copies large tensors while the host waits."""
        return self._with_each((*DEVICE_TENSORS, "sequences"), torch.Tensor.pin_memory)

    def _with_each(
        self, names: tuple[str, ...], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> ChunkTensors:
        changed = copy.copy(self)
        for name in names:
            if (tensor := getattr(self, name)) is not None:
                setattr(changed, name, function(tensor))
        changed.parts = [part._with_each(names, function) for part in self.parts]
        return changed

    def weighed(self, sequence_weights: torch.Tensor | None) -> torch.Tensor | None:
        """`weights` times the weight of each token's sequence, (T,) float64; None where all are 1.

        `sequence_weights`: (the plan's sequences,) float64 on the chunk's device; None: all 1.
        """
        if sequence_weights is None:
            return self.weights
        numbers, tokens = self.sequences.to(sequence_weights.device, non_blocking=True)
        of_tokens = sequence_weights[numbers].repeat_interleave(tokens, output_size=self.tokens.size(0))
        return of_tokens if self.weights is None else of_tokens * self.weights

    def add_to_sequences(self, sums: torch.Tensor, values_T: torch.Tensor) -> None:
        """Adds to `sums`, (the plan's sequences,) float64, the values of each sequence's tokens here."""
        # Always in the same order: a segment's sum is one reduction, and no number comes twice, so that
        # index_add_ adds to each place once.
        numbers, tokens = self.sequences.to(sums.device, non_blocking=True)
        # unsafe: does not look at the numbers of tokens, for which the host would wait.
        own = torch.segment_reduce(values_T.to(sums.dtype), "sum", lengths=tokens, unsafe=True)
        sums.index_add_(0, numbers, own)


# (hidden_TC, weight_VC of the head, chunk) -> the model's result
End = Callable[[torch.Tensor, torch.Tensor, ChunkTensors], torch.Tensor]


def dummy_chunk() -> ChunkTensors:
    """One token without a target: it costs almost nothing, and its gradients are exactly zero."""
    zero = torch.zeros(1, dtype=torch.int64)
    return ChunkTensors(ONE_TOKEN, 0, zero, torch.full_like(zero, IGNORE), zero)


def expect_descending(following: dict[int, int], layer: int, index: int, last: int) -> None:
    """Asserts that in each layer backwards of a group's chunks come from the last to the first: only then is
    a chunk's K/V gradient complete. `following`: layer -> the chunk whose backward comes next."""
    expected = following.get(layer, last)
    assert index == expected, f"layer {layer}: backward of chunk {index}, but chunk {expected} comes first"
    following[layer] = index - 1


class DeviceMemory:
    """The memory of states whose tensors live on the device. `HostMemory` has the same methods."""

    def empty(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of a state, for what is computed on the device of `like`."""
        return like.new_empty(shape, dtype=dtype)

    def keys_values(self, state: KeyValueState | SharedKeyValueState, layer: int) -> torch.Tensor:
        """`state.buffers[layer]`, on the device."""
        return state.buffers[layer]

    def gradients(self, state: KeyValueState | SharedKeyValueState, layer: int) -> torch.Tensor:
        """`state.gradients[layer]`, on the device."""
        return state.gradients[layer]

    def written(self, state: KeyValueState | SharedKeyValueState, layer: int, start: int, end: int) -> None:
        """Call when keys and values of tokens `start .. end - 1` were written into `keys_values`."""

    def added(self, state: KeyValueState | SharedKeyValueState, layer: int, end: int) -> None:
        """Call when gradients of tokens `0 .. end - 1` in `gradients` were changed."""


class KeyValueState:
    """For each layer, keys and values of a group's tokens so far, and gradients that later chunks added.

    A layer has one buffer for the whole group: a chunk reads its prefix without a copy. Gradients are in
    another, in at least fp32, which is there from the last chunk's backward to the first chunk's. `memory`:
    where both live.
    """

    def __init__(self, group: Group, memory: DeviceMemory | HostMemory | None = None):
        self.chunk_starts = [chunk.prefix for chunk in group.chunks]
        # With the segments packed behind the sequence's end: on CUDA one call reads the prefix and them.
        self.tokens = group.tokens
        self.memory = memory or DeviceMemory()
        self.buffers: dict[int, torch.Tensor] = {}  # layer -> (2, tokens, G, D): keys and values
        self.gradients: dict[int, torch.Tensor] = {}  # layer -> (2, prefix of the last chunk, G, D)
        self.next_backward: dict[int, int] = {}  # layer -> index of the chunk whose backward comes next

    def write(self, layer: int, index: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> None:
        """Stores a chunk's keys and values. Recomputation writes the same values again."""
        start = self.chunk_starts[index]
        end = start + k_TGD.size(0)
        if layer not in self.buffers:
            shape = 2, self.tokens, *k_TGD.shape[1:]
            self.buffers[layer] = self.memory.empty(k_TGD, shape, k_TGD.dtype)
        keys, values = self.read(layer, start, end)
        keys.copy_(k_TGD)
        values.copy_(v_TGD)
        self.memory.written(self, layer, start, end)

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens `start .. end - 1`: two views, each (end - start, G, D)."""
        buffer = self.memory.keys_values(self, layer)
        return buffer[0, start:end], buffer[1, start:end]

    def exchange_gradients(
        self, layer: int, index: int, dk_PGD: torch.Tensor | None, dv_PGD: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Adds chunk `index`'s gradients of its prefix to those of the chunks before it.

        Returns the sum of the gradients that later chunks added for chunk `index`: (2, T, G, D), or None for
        the group's last chunk. Backwards must come in reverse order of chunks.
        """
        expect_descending(self.next_backward, layer, index, len(self.chunk_starts) - 1)
        prefix, last = self.chunk_starts[index], index == len(self.chunk_starts) - 1
        if last:  # the first backward: nobody adds to the last chunk's own keys and values
            buffer = self.buffers[layer]
            shape, wide = (2, prefix, *buffer.shape[2:]), torch.promote_types(buffer.dtype, torch.float32)
            self.gradients[layer] = self.memory.empty(buffer, shape, wide)
        gradient = self.memory.gradients(self, layer)
        if prefix:  # two kernels, however many chunks it has
            for sum_PGD, part_PGD in zip(gradient[:, :prefix], (dk_PGD, dv_PGD)):
                if last:
                    sum_PGD.copy_(part_PGD)
                else:
                    sum_PGD.add_(part_PGD)
            self.memory.added(self, layer, prefix)
        else:
            del self.gradients[layer]
        return None if last else gradient[:, prefix : self.chunk_starts[index + 1]]

    def span(self, index: int) -> tuple[int, int]:
        """A chunk's tokens begin and end there, among the state's."""
        return [*self.chunk_starts[index : index + 2], self.tokens][:2]

    def by_token(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of one of the tensors that live in the memory, each contiguous, with a row for each token."""
        return tensor.unbind()

    def bytes(self) -> int:
        """Bytes of the tensors held now."""
        return sum(tensor.nbytes for tensor in [*self.buffers.values(), *self.gradients.values()])
