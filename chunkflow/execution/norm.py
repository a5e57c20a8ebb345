"""RMSNorm, computed in at least fp32."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, of `size`; returns x's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _device_type(x) == "cuda":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """For the CPU, where F.rms_norm is several kernels: it saves three tensors of x's size (six in bf16) for
    backward, this saves x."""

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
        inverse = squares.div(x.size(-1)).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        wide, wide_weight, dy = (tensor.to(inverse.dtype) for tensor in (x, weight, dy))
        normed = wide * inverse
        products = dy * normed
        dweight = products.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = (products @ wide_weight).unsqueeze(-1) / x.size(-1)
        dx = (dy * wide_weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype), dweight, None


def _device_type(tensor: torch.Tensor) -> str:
    """Decides between the ways of the CPU and of CUDA. Tests take the other."""
    return tensor.device.type
