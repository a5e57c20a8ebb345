"""Products in bf16 on the CPU, where each new number of rows costs memory.

oneDNN compiles a kernel for every shape of a bf16 product and keeps it: chunks of ever new lengths fill its
cache.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

ROWS = 64  # multiples of 32 and of 128 take as long; the former keep twice the memory, the latter pad more


def padded_rows(rows: int, tensor: torch.Tensor) -> int:
    """How many rows to multiply, for so many of a tensor of this kind: on the CPU in bf16 a multiple of ROWS,
    the last of them zeros."""
    return rows + (-rows % ROWS if _pads(tensor) else 0)


def _pads(tensor: torch.Tensor) -> bool:
    """Whether products with the tensor are padded. Tests choose."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def pad(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The tensor with `padded_rows` in this dimension."""
    extra = padded_rows(x.size(dim), x) - x.size(dim)
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, extra)) if extra else x


def pad_rows(model: nn.Module) -> None:
    """Makes the model's linear layers multiply a multiple of ROWS rows, the last of them zeros. Results and
    gradients stay. Not for layers that torch.compile has: it would make a graph for each."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(_forward, module)


def _forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _PaddedLinear.apply(x, linear.weight, linear.bias)


class _PaddedLinear(torch.autograd.Function):
    """Saves its input as it came: padded it would be kept for each layer that uses it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(pad(x), weight, bias)[: x.size(0)]

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        padded = pad(dy)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (padded @ weight)[: x.size(0)]
        if ctx.needs_input_grad[1]:
            dweight = padded.t() @ pad(x)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias
