"""Results of attention that chunks keep from one forward to the next, so that none is computed twice.

A chunk that FORWARD_STATE discards keeps, for each layer, the output and the log-sum-exps; RECOMPUTE takes
them. Of a layer that backward runs again (activation checkpointing) they are kept until its backward, also
those that RECOMPUTE, or the FORWARD of a chunk with a K/V state, made. The same kernel's backward gets the
same values: gradients are equal bit for bit.

Bytes of a chunk of T tokens and a layer with H heads of D elements, in the compute dtype:
T x H x D x itemsize + T x H x 4 (8 in fp64); on CUDA also 16 of the kernel's random state (of each part where
ranks share the chunk). A last stage's last layer has no attention in FORWARD_STATE.
"""

from __future__ import annotations

import functools

import torch

Results = tuple[torch.Tensor, ...]  # output (T, H, D), log-sum-exps, and on CUDA the random state


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class AttentionStore:
    """Where the chunks of a step keep results: on the device or, with `host`, in host memory, which on CUDA
    is pinned and copied to and from on a stream of its own.

    `device_bytes`, `host_bytes`: what is kept now; `peaks`: the most so far, of each. With `host` the device
    has copies on their way back, of at most two layers of a chunk, and results of one layer on their way out,
    which are not counted.
    """

    def __init__(self, device: torch.device, host: bool):
        self.device, self.host = device, host
        self.stream = _copy_stream(device) if host else None
        self.device_bytes = self.host_bytes = 0
        self.peaks = (0, 0)
        self.leaving: tuple[Results, torch.cuda.Event] | None = None

    def put(self, results: Results) -> Results:
        """What is kept of them."""
        if not self.host:
            self._count(device=_bytes(results))
            return results
        pinned = self.stream is not None
        kept = tuple(torch.empty_like(tensor, device="cpu", pin_memory=pinned) for tensor in results)
        self._count(host=_bytes(kept))
        if self.leaving is not None:  # done long ago, unless the bus is slower than a layer
            torch.cuda.current_stream(self.device).wait_event(self.leaving[1])
        event = self._copy(results, kept)
        # Until the copy is done the memory of `results` must not be given to others.
        self.leaving = None if event is None else (results, event)
        return kept

    def fetch(self, kept: Results) -> tuple[Results, torch.cuda.Event | None]:
        """Begins to copy to the device; the copies may be read after `wait`."""
        copies = tuple(torch.empty_like(tensor, device=self.device) for tensor in kept)
        self._count(device=_bytes(copies))
        return copies, self._copy(kept, copies)

    def wait(self, copies: Results, event: torch.cuda.Event | None) -> Results:
        """The copies, which are the caller's from now on."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        self._count(device=-_bytes(copies))
        return copies

    def free(self, kept: Results) -> None:
        self._count(**{"host" if self.host else "device": -_bytes(kept)})

    def _copy(self, sources: Results, targets: Results) -> torch.cuda.Event | None:
        if self.stream is None:
            for source, target in zip(sources, targets):
                target.copy_(source)
            return None
        # Behind all that is queued by now: it makes the sources, or is the last to use the targets' memory.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for source, target in zip(sources, targets):
                target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def _count(self, device: int = 0, host: int = 0) -> None:
        self.device_bytes, self.host_bytes = self.device_bytes + device, self.host_bytes + host
        self.peaks = max(self.peaks[0], self.device_bytes), max(self.peaks[1], self.host_bytes)


class KeptAttention:
    """What one chunk keeps on one stage. Layers are the model's numbers, in ascending order in forwards."""

    def __init__(self, store: AttentionStore):
        self.store = store
        self.results: dict[int, Results] = {}
        self.arriving: dict[int, tuple[Results, torch.cuda.Event | None]] = {}
        self.current = -1

    def __contains__(self, layer: int) -> bool:
        return layer in self.results

    def begin(self, layer: int) -> None:
        """Before a layer's forward with gradients: begins to fetch its results from the host, and those of
        the layer that comes next: the one above in a forward, the one below where backward runs layers
        again."""
        down, self.current = layer <= self.current, layer
        others = [other for other in self.results if (other < layer if down else other > layer)]
        for number in (layer, *([max(others) if down else min(others)] if others else [])):
            if self.store.host and number in self.results and number not in self.arriving:
                self.arriving[number] = self.store.fetch(self.results[number])

    def put(self, layer: int, results: Results) -> None:
        """Keeps results of the layer's first forward."""
        self.results[layer] = self.store.put(results)

    def take(self, layer: int, again: bool) -> Results | None:
        """Results of an earlier forward, if there are any; `again`: they stay for one more."""
        if layer not in self.results:
            return None
        results = self.results[layer]
        if self.store.host:
            results = self.store.wait(*(self.arriving.pop(layer, None) or self.store.fetch(results)))
        if not again:
            self.drop(layer)
        return results

    def drop(self, layer: int) -> None:
        """Frees what the layer keeps, if anything."""
        if layer in self.results:
            self.store.free(self.results.pop(layer))


def _bytes(results: Results) -> int:
    return sum(tensor.nbytes for tensor in results)
