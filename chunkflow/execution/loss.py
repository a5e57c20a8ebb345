"""Head and cross-entropy, in slices of tokens: neither all logits nor anything weight-sized is held between forward and backward.
And the head for a single token, in slices of the vocabulary.

Shape suffixes: T tokens of the chunk, S tokens of a slice, C hidden size, V vocabulary.
"""

from __future__ import annotations

import torch

IGNORE = -100  # the label of a position that has no target
# Logits of one slice: on a CPU 4 MiB in fp32, which a cache holds; on CUDA 256 MiB, which fill the device.
_SLICE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def sliced_cross_entropy(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """The SUM of the cross-entropies of all positions that have a target: 0-dim, in at least fp32.

    `labels_T` are targets, already shifted; -100 means none. Logits are computed in at least fp32, a slice at a time, and again
    in backward.
    """
    return _SlicedCrossEntropy.apply(hidden_TC, weight_VC, labels_T)


@torch.no_grad()
def token_losses(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each position, (T,), in at least fp32, 0 where there is no target; without a graph."""
    compute = torch.promote_types(hidden_TC.dtype, torch.float32)
    head = _Head(weight_VC, compute)
    losses_T = torch.empty(hidden_TC.size(0), dtype=compute, device=hidden_TC.device)
    for piece in _slices(hidden_TC.size(0), weight_VC):
        logits_SV = head.logits(hidden_TC[piece])
        labels_S = labels_T[piece]
        target_S = logits_SV.gather(1, labels_S.clamp(min=0).unsqueeze(1)).squeeze(1)
        losses_T[piece] = torch.where(labels_S == IGNORE, 0, logits_SV.logsumexp(-1) - target_S)
    return losses_T


def token_logits(hidden_C: torch.Tensor, weight_VC: torch.Tensor) -> torch.Tensor:
    """The logits of one token, (V,), in at least fp32: a slice of the vocabulary at a time, as narrow weights are widened."""
    compute = torch.promote_types(hidden_C.dtype, torch.float32)
    rows = max(128, _SLICE_ELEMENTS[weight_VC.device.type] // weight_VC.size(1))
    return torch.cat([_Head(part_SC, compute).logits(hidden_C.unsqueeze(0))[0] for part_SC in weight_VC.split(rows)])


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TC, weight_VC, labels_T):
        compute = torch.promote_types(hidden_TC.dtype, torch.float32)
        head = _Head(weight_VC, compute)
        loss = torch.zeros((), dtype=compute, device=hidden_TC.device)
        lse_T = torch.empty(hidden_TC.size(0), dtype=compute, device=hidden_TC.device)
        for piece in _slices(hidden_TC.size(0), weight_VC):
            logits_SV = head.logits(hidden_TC[piece])
            labels_S = labels_T[piece]
            torch.logsumexp(logits_SV, dim=-1, out=lse_T[piece])
            target_S = logits_SV.gather(1, labels_S.clamp(min=0).unsqueeze(1)).squeeze(1)
            loss += torch.where(labels_S == IGNORE, 0, lse_T[piece] - target_S).sum()
        ctx.save_for_backward(hidden_TC, weight_VC, labels_T, lse_T)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        hidden_TC, weight_VC, labels_T, lse_T = ctx.saved_tensors
        head = _Head(weight_VC, lse_T.dtype)
        dhidden_TC = torch.empty_like(hidden_TC)
        dweight_VC = None
        for piece in _slices(hidden_TC.size(0), weight_VC):
            labels_S = labels_T[piece]
            dlogits_SV = head.logits(hidden_TC[piece]).sub_(lse_T[piece].unsqueeze(1)).exp_()
            targets = labels_S.clamp(min=0).unsqueeze(1)
            dlogits_SV.scatter_add_(1, targets, dlogits_SV.new_full((1, 1), -1.0).expand_as(targets))
            dlogits_SV *= torch.where(labels_S == IGNORE, 0, dloss).unsqueeze(1)
            dlogits_SV = dlogits_SV.to(hidden_TC.dtype)
            torch.mm(dlogits_SV, weight_VC, out=dhidden_TC[piece])
            part_VC = dlogits_SV.t() @ hidden_TC[piece]
            # More than one slice adds up in at least fp32, as one product over all tokens would: one such sum is held, no second.
            dweight_VC = part_VC if dweight_VC is None else dweight_VC.to(lse_T.dtype).add_(part_VC)
        return dhidden_TC, dweight_VC.to(weight_VC.dtype), None


class _Head:
    """Logits in `compute` precision from activations and weights that may be narrower."""

    def __init__(self, weight_VC: torch.Tensor, compute: torch.dtype):
        self.narrow_product = weight_VC.is_cuda and weight_VC.dtype != compute
        self.compute = compute
        self.weight_CV = weight_VC.t() if self.narrow_product else weight_VC.to(compute).t()

    def logits(self, hidden_SC: torch.Tensor) -> torch.Tensor:
        if self.narrow_product:  # tensor cores take narrow inputs and give fp32
            return torch.mm(hidden_SC, self.weight_CV, out_dtype=self.compute)
        return hidden_SC.to(self.compute) @ self.weight_CV


def slice_tokens(device_type: str, vocab_size: int) -> int:
    """How many tokens a slice has."""
    return max(128, _SLICE_ELEMENTS[device_type] // vocab_size)


def _slices(tokens: int, weight_VC: torch.Tensor) -> list[slice]:
    step = slice_tokens(weight_VC.device.type, weight_VC.size(0))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
