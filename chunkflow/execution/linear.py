"""Products in bf16 on the CPU: each as this CPU does it well.

With instructions for bf16, oneDNN compiles a kernel for every shape and keeps it: chunks of ever new lengths
would fill its cache, so rows are padded to a multiple. Without them PyTorch multiplies bf16 a hundred times
slower than fp32: factors are widened and the result is rounded, which is what a product in bf16 with fp32
sums is.
"""

import functools
import platform

import torch
import torch.nn.functional as F
from torch import nn

# Multiples of 32 and of 128 take as long; the former keep twice the memory, the latter pad more. Each number
# of rows has a dozen kernels of half a MiB, so long chunks have coarser multiples.
ROWS = 64


@functools.cache
def _has_bf16_products() -> bool:
    """Whether this CPU has instructions for them."""
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN emulates them with AVX-512 alone
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def pads(tensor: torch.Tensor) -> bool:
    """Whether products with the tensor have their rows padded. Tests choose."""
    return _narrow(tensor) and _has_bf16_products()


def widens(tensor: torch.Tensor) -> bool:
    """Whether factors like the tensor are widened to fp32. Tests choose."""
    return _narrow(tensor) and not _has_bf16_products()


def padded_rows(rows: int, tensor: torch.Tensor) -> int:
    """How many rows to multiply, for so many of a tensor of this kind. Where rows are padded, with zeros, it
    is a multiple of ROWS, and of an eighth of the next power of two: four numbers between it and its half."""
    if not pads(tensor):
        return rows
    return rows + -rows % max(ROWS, 1 << max(0, (rows - 1).bit_length() - 3))


def whole_rows(rows: int, tensor: torch.Tensor) -> int:
    """How many of so many rows of a tensor of this kind may be multiplied as they are: where rows are padded
    a multiple of ROWS."""
    return rows - rows % ROWS if pads(tensor) else rows


def pad(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The tensor with `padded_rows` in this dimension."""
    extra = padded_rows(x.size(dim), x) - x.size(dim)
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, extra)) if extra else x


def widen(x: torch.Tensor) -> torch.Tensor:
    """The tensor as a factor of a product: in fp32 where this CPU has no instructions for its own dtype."""
    return x.float() if widens(x) else x


def fit_linear_layers(model: nn.Module) -> None:
    """Makes the model's linear layers, in bf16 on the CPU, multiply as this CPU does it well. Results and
    gradients stay. Not for layers that torch.compile has: it would make a graph for each."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(_forward, module)


def _forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _Linear.apply(x, linear.weight, linear.bias)


class _Linear(torch.autograd.Function):
    """Saves its input as it came: padded or widened it would be kept for each layer that uses it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        # A frozen weight has no gradient, which alone needs the input.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        bias = None if bias is None else widen(bias)
        return F.linear(widen(pad(x)), widen(weight), bias)[: x.size(0)].to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        factor = widen(pad(dy))
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (factor @ widen(weight))[: dy.size(0)].to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (factor.t() @ widen(pad(x))).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias
