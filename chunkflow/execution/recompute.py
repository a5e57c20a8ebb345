"""Recomputation in backward: of whole layers, or of what is cheap to compute again.

A result is kept because those who use it save it for their backward. Of a whole layer nobody saves any; of
what is cheap they save how it was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

# While the forward of a layer runs that recomputes: True, and its cheap results by their storages, which are
# held so that no other tensor gets one of them.
_recomputing = False
_results: dict[int, tuple[torch.Tensor, _Recipe]] = {}
# While the forward of a layer runs, in a forward or a backward, of which backward keeps nothing: True.
_whole = False


def recompute_whole(forward: Callable, *args: Any) -> Any:
    """forward(*args), a layer's, of which only the inputs are kept: backward runs it again."""
    # Nothing in a layer is random.
    return checkpoint(_run_whole, forward, *args, use_reentrant=False, preserve_rng_state=False)


def _run_whole(forward: Callable, *args: Any) -> Any:
    global _whole
    _whole = True
    try:
        return forward(*args)
    finally:
        _whole = False


def runs_again() -> bool:
    """Whether the layer whose forward runs is one of `recompute_whole`."""
    return _whole


def cheap(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """function(*inputs). In a layer that recomputes, backward calls it again: only its inputs are kept.

    Neither `inputs` nor the result may be changed in-place.
    """
    if not _recomputing:
        return function(*inputs)
    result = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    if not torch.compiler.is_compiling():  # compiled, the partitioner also drops what was saved of the result
        _results[result.untyped_storage()._cdata] = result, _Recipe(function, inputs)
    return result


def recompute_cheap(forward: Callable, *args: Any) -> Any:
    """forward(*args), a layer's, whose backward computes again what is `cheap`."""
    global _recomputing
    if not torch.is_grad_enabled():
        return forward(*args)
    _recomputing = True
    try:
        with saved_tensors_hooks(_pack, _unpack):
            return forward(*args)
    finally:
        _recomputing = False
        _results.clear()


class _Recipe:
    """How a result is made; computed once for all who saved it."""

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]):
        self.function, self.inputs = function, [tensor.detach() for tensor in inputs]
        self.result: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        if self.result is None:
            self.result = self.function(*self.inputs)
        return self.result


def _pack(tensor: torch.Tensor) -> torch.Tensor | _Recipe:
    result, recipe = _results.get(tensor.untyped_storage()._cdata, (None, None))
    return recipe if result is not None and tensor.shape == result.shape else tensor


def _unpack(packed: torch.Tensor | _Recipe) -> torch.Tensor:
    return packed() if isinstance(packed, _Recipe) else packed
