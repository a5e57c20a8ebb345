"""What a piece of code would launch on CUDA, counted on a CPU without computing it: on fake tensors, by the
branches that CUDA takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunkflow.execution import linear, loss, norm

# No kernels: views that the schema does not mark, and memory without contents.
NOTHING = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "device", "promote_types"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
INDEXED = {"gather", "scatter_add", "scatter_add_", "embedding"}  # touch as many elements as their index has


class Launch(NamedTuple):
    name: str  # of the ATen operator
    bytes: int  # read and written, each element of each tensor once
    results: list[tuple[int, ...]]  # shapes


def touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes behind a tensor: what is expanded counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
    return prod(sizes) * tensor.element_size()


class Launches(TorchDispatchMode):
    """Operators that run a kernel while this is entered. One that runs several counts as one."""

    def __init__(self):
        super().__init__()
        self.all: list[Launch] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        schema = function._schema
        name = schema.name.split("::")[1]
        aliases = [item.alias_info for item in schema.returns if item.alias_info is not None]
        if name in NOTHING or any(not alias.is_write for alias in aliases):
            return result
        results = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        written = sum(map(touched_bytes, results))
        given = dict(zip((argument.name for argument in schema.arguments), args)) | kwargs
        outputs = {argument.name for argument in schema.arguments if argument.is_out}
        read = [tensor for key, value in given.items() if key not in outputs for tensor in tree_leaves(value)]
        read = sum(touched_bytes(tensor) for tensor in read if isinstance(tensor, torch.Tensor))
        if name in INDEXED:
            index = given["indices" if name == "embedding" else "index"]
            elements = results[0].numel() if name == "embedding" else index.numel()
            read = touched_bytes(index) + elements * results[0].element_size()
            written = elements * results[0].element_size()
        self.all.append(Launch(name, read + written, [tuple(tensor.shape) for tensor in results]))
        return result

    @property
    def names(self) -> list[str]:
        return [launch.name for launch in self.all]

    @property
    def products(self) -> list[Launch]:
        return [launch for launch in self.all if launch.name in PRODUCTS]

    @property
    def other_bytes(self) -> int:
        """Of all that is no matrix product."""
        return sum(launch.bytes for launch in self.all if launch.name not in PRODUCTS)


@contextmanager
def cuda_branches() -> Iterator[None]:
    """Inside, products, loss and norm take CUDA's branch on CPU tensors. Attention has tests of its own."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(linear, "_narrow", lambda tensor: False))
        for module in (loss, norm):
            stack.enter_context(mock.patch.object(module, "_device_type", lambda tensor: "cuda"))
        yield


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors have no contents, loss and norm take CUDA's branch, and F.rms_norm is one operator
    forward and one backward as on CUDA; on the CPU torch takes it apart."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(cuda_branches())
        stack.enter_context(mock.patch.object(F, "rms_norm", _RMSNorm.apply))
        yield


@torch.library.custom_op("chunkflow_tests::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError  # on fake tensors only the shapes below are asked for


@_rms_norm.register_fake
def _(x, weight):
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("chunkflow_tests::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError  # on fake tensors only the shapes below are asked for


@_rms_norm_backward.register_fake
def _(dy, x, rstd, weight):
    return torch.empty_like(x), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        y, rstd = _rms_norm(x, weight)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, dweight = _rms_norm_backward(dy, *ctx.saved_tensors)
        return dx, None, dweight, None
