"""K/V states in host memory: the device holds copies of what two layers need, and of nothing else.

The copy of a layer, its window, has keys and values of all tokens up to the chunk at hand, and in a backward
the gradients that were added so far. Which layer comes next is known: its window is filled while this one
computes. What a chunk writes, and sums that it adds to, are copied back. The host only stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from chunkflow.execution.shared_state import SharedKeyValueState
    from chunkflow.execution.state import KeyValueState

    State = KeyValueState | SharedKeyValueState
    Layer = tuple[State, int]


class Use(NamedTuple):
    """What an action does with a state: forward it reads the prefix of chunk `index`, layer after layer;
    backward the chunk's own keys and values too, and gradients, from the last layer to the first. With
    `last_only` it does nothing in other layers than the last."""

    state: State
    index: int
    backward: bool
    last_only: bool = False

    def first(self) -> Layer | None:
        """The layer that the action begins with; None if no chunk has written yet."""
        layers = list(self.state.buffers)  # in the order of the first chunk's forward
        return (self.state, layers[-1 if self.backward or self.last_only else 0]) if layers else None

    def after(self, layer: int) -> Layer | None:
        """The layer that follows; None after the last one."""
        layers = list(self.state.buffers)
        place = layers.index(layer) + (-1 if self.backward else 1)
        return (self.state, layers[place]) if 0 <= place < len(layers) else None

    def tokens(self) -> int:
        """How many of the state's tokens have to be in a window."""
        return self.state.span(self.index)[self.backward]


class HostMemory:
    """The memory of states whose tensors live on the host, pinned for a GPU: one for all states of a rank.

    `begin` is to be called before each action. The device then holds at most two windows: of the layer at
    hand, and of the next one, or at the end of an action of the layer with which the next action begins. One
    has, for a group of `tokens` tokens (with the short sequences in its last chunk), `prefix` of them before
    the last chunk (if ranks share the group: of those that are this rank's),

        2 x tokens x n_kv_heads x head_dim x bytes of the compute dtype               keys and values
        2 x prefix x n_kv_heads x head_dim x bytes of at least fp32, in a backward    gradients

    bytes, whatever the number of layers and of chunks; `end` tells the most of all windows. Those of a group
    are equally large, so that the allocator gives the memory of one to the next but one.

    On the host PyTorch rounds each pinned tensor, of which a layer has two, up to a power of two of bytes,
    and keeps what was freed for the next steps.

    On CUDA a stream of its own allocates windows, fills them, and copies back what was written, all in order.
    Before each of these it waits for what was computed so far, and the computation waits for a window before
    it touches it: memory that changes hands is never in use.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = _copy_stream(device)
        self.windows: dict[Layer, _Window] = {}
        self.at: Layer | None = None  # the layer at hand
        self.use: Use | None = None  # of the action at hand
        self.next_use: Use | None = None
        self.peak_bytes = 0
        self.late = 0  # windows that nobody had begun to fill when they were needed

    def begin(self, use: Use | None, next_use: Use | None) -> None:
        """An action begins; `next_use` is of the action after it. None: it uses no state."""
        self.at, self.use, self.next_use = None, use, next_use
        self._keep(use.first() if use else None)
        if use is None and next_use:
            self._prepare(next_use.first(), next_use)

    def end(self) -> int:
        """No action follows: returns the most bytes that windows had since the last call."""
        self.begin(None, None)
        peak, self.peak_bytes = self.peak_bytes, 0
        return peak

    def empty(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of a state: on the host, whatever `like` is on."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.stream is not None)

    def keys_values(self, state: State, layer: int) -> torch.Tensor:
        """The window of `state.buffers[layer]`, on the device, with as many tokens as the action needs."""
        if self.at != (state, layer):
            self._move((state, layer))
        return self.windows[self.at].keys_values.arrived()

    def gradients(self, state: State, layer: int) -> torch.Tensor:
        """The window of `state.gradients[layer]`. In the last chunk's backward, the first of all, it has no
        contents."""
        window = self.windows[state, layer]
        if window.gradients is None:
            window.gradients = self._copy(state, state.gradients[layer], 0)
            self._count()
        return window.gradients.arrived()

    def written(self, state: State, layer: int, start: int, end: int) -> None:
        """To be called when keys and values of tokens `start .. end - 1` were written into the window."""
        window = self.windows[state, layer]
        window.tokens = end
        self._copy_back(state, state.buffers[layer], window.keys_values, start, end)

    def added(self, state: State, layer: int, end: int) -> None:
        """To be called when gradients of tokens `0 .. end - 1` in the window were changed."""
        self._copy_back(state, state.gradients[layer], self.windows[state, layer].gradients, 0, end)

    def _move(self, here: Layer) -> None:
        """The computation comes to a layer, whose window is full or being filled; the next one's is next."""
        self.at, use, next_use = here, self.use, self.use
        assert use is not None and use.state is here[0], "a state is used by an action that did not begin"
        following = use.after(here[1])
        if following is None and self.next_use:
            next_use, following = self.next_use, self.next_use.first()
        self._keep(here, following)
        self._prepare(here, use)
        self._prepare(following, next_use)

    def _keep(self, *layers: Layer | None) -> None:
        self.windows = {layer: window for layer, window in self.windows.items() if layer in layers}

    def _prepare(self, key: Layer | None, use: Use) -> None:
        """Begins to fill the window of a layer with what the use of it needs and it does not have."""
        if key is None:
            return
        (state, layer), tokens, window = key, use.tokens(), self.windows.get(key)
        host, here = state.buffers[layer], key == self.at
        if window is None and (tokens or here):
            self.windows[key] = window = _Window(self._copy(state, host, tokens), tokens)
            self.late += bool(tokens and here)
        elif window and window.tokens < tokens and (use is self.use or not here):
            # It is from an earlier chunk's recomputation. (The window at hand is left alone for a later use:
            # what this action is about to write is not on the host yet.)
            window.keys_values = self._copy(state, host, tokens, window.tokens, window.keys_values.tensor)
            window.tokens = tokens
        if window and use.backward and window.gradients is None and layer in state.gradients:
            window.gradients = self._copy(state, state.gradients[layer], tokens)
        self._count()

    def _count(self) -> None:
        self.peak_bytes = max(self.peak_bytes, sum(window.bytes() for window in self.windows.values()))

    def _copy(
        self, state: State, host: torch.Tensor, end: int, start: int = 0, tensor: torch.Tensor | None = None
    ) -> _Copy:
        """Tokens `start .. end - 1` of `host`, in a tensor like it on the device: a new one unless given."""
        with self._in_order():
            if tensor is None:
                tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
            for to, source in zip(state.by_token(tensor), state.by_token(host)):
                to[start:end].copy_(source[start:end], non_blocking=True)
        return _Copy(tensor, self.stream.record_event() if self.stream else None)

    def _copy_back(self, state: State, host: torch.Tensor, copy: _Copy, start: int, end: int) -> None:
        with self._in_order():
            for to, source in zip(state.by_token(host), state.by_token(copy.tensor)):
                to[start:end].copy_(source[start:end], non_blocking=True)

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """What is inside runs on the stream of copies, after what was computed so far; on the CPU at once."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class _Window:
    """What the device holds of a layer of a state."""

    def __init__(self, keys_values: _Copy, tokens: int):
        self.keys_values, self.tokens = keys_values, tokens  # whose keys and values it has
        self.gradients: _Copy | None = None

    def bytes(self) -> int:
        return self.keys_values.tensor.nbytes + (self.gradients.tensor.nbytes if self.gradients else 0)


class _Copy:
    """A tensor on the device that is being filled."""

    def __init__(self, tensor: torch.Tensor, event: torch.cuda.Event | None):
        self.tensor, self.event = tensor, event

    def arrived(self) -> torch.Tensor:
        """The tensor; what is computed from now on waits until it is full."""
        if self.event:
            torch.cuda.current_stream().wait_event(self.event)
            self.event = None
        return self.tensor
