"""The K/V state of a sequence that several ranks share, each holding what belongs to its own parts of chunks.

Everything but attention is local to a rank. Attention gathers a layer's keys and values of all earlier
chunks and of the chunk at hand; its backward sends their gradients to the ranks that hold them. Of the
gathered tensors one layer's are held at a time. Parts of every chunk but the last are equal, so what is
gathered of the prefix has no gaps and is read as it arrives; only the chunk at hand is put in order.

Shape suffixes: P tokens before the chunk, G key/value heads, D head dimension.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from chunkflow.execution.state import DeviceMemory, expect_descending
from chunkflow.planning.chunks import Group

if TYPE_CHECKING:
    from chunkflow.execution.host_state import HostMemory

# Their names since torch 2.13, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SharedKeyValueState:
    """For each layer, keys and values of this rank's tokens of a group, and gradients of them.

    `ranks`: the process group of those that share the sequence, in the order of `group.spread.replicas`.
    `memory`: where the tensors live; what is gathered is on the device.
    """

    def __init__(
        self, group: Group, ranks: dist.ProcessGroup, memory: DeviceMemory | HostMemory | None = None
    ):
        self.memory = memory or DeviceMemory()
        self.spread, self.ranks, self.count = group.spread, ranks, len(group.spread.replicas)
        sizes = [chunk.tokens for chunk in group.chunks]
        self.starts = list(accumulate(sizes, initial=0))  # of each chunk, among this rank's tokens
        # The most tokens of the last chunk that a rank has: collectives need the same number of all.
        members = [self.spread.of_member(len(sizes) - 1, member) for member in range(self.count)]
        self.widths = [*sizes[:-1], max(len(low) + len(high) for low, high in members)]
        self.buffers: dict[int, torch.Tensor] = {}  # layer -> (tokens, 2, G, D): keys and values
        self.gradients: dict[int, torch.Tensor] = {}  # layer -> (tokens before the last chunk, 2, G, D)
        self.next_backward: dict[int, int] = {}  # layer -> index of the chunk whose backward comes next
        # layer -> rows up to the chunk's end, of which the prefix is on its way
        self.arriving: dict[int, tuple[torch.Tensor, dist.Work | None]] = {}
        self.orders: dict[int, torch.Tensor] = {}  # chunk -> rows of what is gathered, by position

    def write(self, layer: int, index: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> None:
        """Stores this rank's keys and values of a chunk. Recomputation writes the same values again."""
        start = self.starts[index]
        if layer not in self.buffers:
            tokens = self.starts[-2] + self.widths[-1]
            self.buffers[layer] = self.memory.empty(k_TGD, (tokens, 2, *k_TGD.shape[1:]), k_TGD.dtype)
        end = start + k_TGD.size(0)
        buffer = self.memory.keys_values(self, layer)[start:end]
        buffer[:, 0].copy_(k_TGD)
        buffer[:, 1].copy_(v_TGD)
        self.memory.written(self, layer, start, end)

    def begin(self, layer: int, index: int) -> None:
        """Begins to gather the keys and values of a chunk's prefix, if that was not done. All ranks that
        share the sequence call this and `gathered` in the same order."""
        if layer in self.arriving:
            return
        before, end = self.spread.start(index), self.spread.ends[index]
        if layer in self.buffers:
            buffer = self.memory.keys_values(self, layer)
            rows = buffer.new_empty(end, *buffer.shape[1:])
            prefix = buffer[: self.starts[index]]
            self.arriving[layer] = rows, self._gather(rows[:before], prefix) if before else None

    def gathered(self, layer: int, index: int) -> Gathered:
        """Keys and values of all tokens up to the chunk's end, when its own are written."""
        self.begin(layer, index)
        rows, prefix = self.arriving.pop(layer)
        start, width, buffer = self.starts[index], self.widths[index], self.memory.keys_values(self, layer)
        current = buffer.new_empty(self.count * width, *buffer.shape[1:])
        self._gather(current, buffer[start : start + width]).wait()
        tokens = rows[self.spread.start(index) :]
        torch.index_select(current, 0, self._order(index, tokens.device), out=tokens)
        if prefix:
            prefix.wait()
        return Gathered(rows)

    def _gather(self, whole: torch.Tensor, part: torch.Tensor) -> dist.Work:
        return all_gather(whole, part, group=self.ranks, async_op=True)

    def exchange_gradients(
        self, layer: int, index: int, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends gradients of keys and values, (tokens up to the chunk's end, 2, G, D), to their ranks.

        Returns the gradients of this rank's own keys and values of the chunk, which are complete then: two
        tensors (T, G, D). Backwards must come in reverse order of chunks.
        """
        last = len(self.widths) - 1
        expect_descending(self.next_backward, layer, index, last)
        before, start, width = self.spread.start(index), self.starts[index], self.widths[index]
        by_rank = sums.new_zeros(self.count * width, *sums.shape[1:])
        by_rank.index_copy_(0, self._order(index, sums.device), sums[before:])
        own = sums.new_empty(width, *sums.shape[1:])
        reduce_scatter(own, by_rank, group=self.ranks)
        own = own[: self.starts[index + 1] - start]
        shape = start, *sums.shape[1:]
        if index < last:
            gradient = self.memory.gradients(self, layer)
            own.add_(gradient[start : start + width])
            prefix = sums.new_empty(shape)
        elif before:
            self.gradients[layer] = self.memory.empty(sums, shape, sums.dtype)
            gradient = prefix = self.memory.gradients(self, layer)
        if before:
            reduce_scatter(prefix, sums[:before], group=self.ranks)
            if index < last:
                gradient[:start].add_(prefix)
            self.memory.added(self, layer, start)
        else:
            self.gradients.pop(layer, None)  # of a group of one chunk there are none
        return own[:, 0], own[:, 1]

    def span(self, index: int) -> tuple[int, int]:
        """A chunk's tokens begin and end there, among this rank's."""
        return self.starts[index], self.starts[index + 1]

    def by_token(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of one of the tensors that live in the memory, each contiguous, with a row for each token."""
        return (tensor,)

    def _order(self, index: int, device: torch.device) -> torch.Tensor:
        """For each position of a chunk, its row in what is gathered of it, rank after rank."""
        if index not in self.orders:
            parts, width = self.spread.parts(index), self.widths[index]
            rows = []
            for number, part in enumerate(parts):
                second = number >= self.count
                member = 2 * self.count - 1 - number if second else number
                first = member * width + (len(parts[member]) if second else 0)
                rows.append(torch.arange(first, first + len(part)))
            self.orders[index] = torch.cat(rows).to(device, non_blocking=True)
        return self.orders[index]

    def bytes(self) -> int:
        """Bytes of the tensors held now."""
        return sum(tensor.nbytes for tensor in [*self.buffers.values(), *self.gradients.values()])


class Gathered:
    """A layer's keys and values up to a chunk's end, in rows: earlier chunks in some order, then the chunk's
    own tokens by position."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of rows `start .. end - 1`: two views, each (end - start, G, D)."""
        return self.rows[start:end, 0], self.rows[start:end, 1]
