"""The model's results (`ChunkTensors.end`): functions of the last hidden states and the head's weight.

Head and cross-entropy run in slices of tokens: all logits are never held at once, nor anything weight-sized
while other chunks run. If a chunk's backward is the very next action, its forward computes the head's
gradients from the same logits; otherwise backward computes the logits again.

Shape suffixes: T tokens of the chunk, S tokens of a slice, C hidden size, V vocabulary.
"""

import torch

from chunkflow.execution.state import IGNORE, ChunkTensors

# Logits of one slice in fp32: on the CPU 4 MiB, which a cache holds; on CUDA 256 MiB, which keep it busy.
# At least _LEAST_TOKENS, whatever the vocabulary: each slice adds to a weight-sized gradient.
_SLICE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
_LEAST_TOKENS = 512


def loss_sum(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, chunk: ChunkTensors) -> torch.Tensor:
    """The SUM of the cross-entropies of all positions that have a target: 0-dim; logits and sum in at least
    fp32. Gradients are computed here if `chunk.loss_gradient` is set, else in backward."""
    return _SlicedCrossEntropy.apply(hidden_TC, weight_VC, chunk.labels, chunk.loss_gradient)


@torch.no_grad()
def token_losses(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, chunk: ChunkTensors) -> torch.Tensor:
    """The cross-entropy of each position, (T,), in at least fp32, 0 without a target. No autograd graph."""
    compute = torch.promote_types(hidden_TC.dtype, torch.float32)
    head = _Head(weight_VC, compute)
    losses_T = torch.empty(hidden_TC.size(0), dtype=compute, device=hidden_TC.device)
    for piece in _slices(hidden_TC.size(0), weight_VC):
        logits_SV = head.logits(hidden_TC[piece])
        labels_S = chunk.labels[piece]
        target_S = logits_SV.gather(1, labels_S.clamp(min=0).unsqueeze(1)).squeeze(1)
        losses_T[piece] = torch.where(labels_S == IGNORE, 0, logits_SV.logsumexp(-1) - target_S)
    return losses_T


def last_logits(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, chunk: ChunkTensors) -> torch.Tensor:
    """The last token's logits, (V,), in at least fp32. Weights are widened a slice of the vocabulary at a
    time."""
    compute = torch.promote_types(hidden_TC.dtype, torch.float32)
    rows = max(128, _SLICE_ELEMENTS[weight_VC.device.type] // weight_VC.size(1))
    return torch.cat([_Head(part_SC, compute).logits(hidden_TC[-1:])[0] for part_SC in weight_VC.split(rows)])


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TC, weight_VC, labels_T, loss_gradient):
        compute = torch.promote_types(hidden_TC.dtype, torch.float32)
        head = _Head(weight_VC, compute)
        loss = torch.zeros((), dtype=compute, device=hidden_TC.device)
        lse_T = torch.empty(hidden_TC.size(0), dtype=compute, device=hidden_TC.device)
        gradients = None
        if loss_gradient is not None:
            gradients = _Gradients(hidden_TC, weight_VC, labels_T, loss_gradient)
        for piece in _slices(hidden_TC.size(0), weight_VC):
            logits_SV, labels_S = head.logits(hidden_TC[piece]), labels_T[piece]
            target_S = logits_SV.gather(1, labels_S.clamp(min=0).unsqueeze(1)).squeeze(1)
            highest_S = logits_SV.amax(dim=1)
            exponentials_SV = logits_SV.sub_(highest_S.unsqueeze(1)).exp_()
            sum_S = exponentials_SV.sum(dim=1)
            torch.add(highest_S, sum_S.log(), out=lse_T[piece])
            loss += torch.where(labels_S == IGNORE, 0, lse_T[piece] - target_S).sum()
            if gradients:
                gradients.add(piece, exponentials_SV, sum_S)
        ctx.loss_gradient = loss_gradient
        if gradients:
            ctx.save_for_backward(*gradients.result())
        else:
            ctx.save_for_backward(hidden_TC, weight_VC, labels_T, lse_T)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if ctx.loss_gradient is not None:
            same = (dloss / ctx.loss_gradient - 1).abs() < 1e-6
            torch._assert_async(same, "backward sent the loss another gradient than its forward was told")
            return *ctx.saved_tensors, None, None
        hidden_TC, weight_VC, labels_T, lse_T = ctx.saved_tensors
        head = _Head(weight_VC, lse_T.dtype)
        gradients = _Gradients(hidden_TC, weight_VC, labels_T, dloss)
        for piece in _slices(hidden_TC.size(0), weight_VC):
            probabilities_SV = head.logits(hidden_TC[piece]).sub_(lse_T[piece].unsqueeze(1)).exp_()
            gradients.add(piece, probabilities_SV, torch.ones_like(lse_T[piece]))
        return *gradients.result(), None, None


class _Gradients:
    """Gradients of hidden states and weight, a slice at a time. `dloss`: the gradient of the loss."""

    def __init__(self, hidden_TC, weight_VC, labels_T, dloss: float | torch.Tensor):
        self.hidden_TC, self.weight_VC, self.labels_T, self.dloss = hidden_TC, weight_VC, labels_T, dloss
        self.dhidden_TC = torch.empty_like(hidden_TC)
        self.dweight_VC: torch.Tensor | None = None

    def add(self, piece: slice, exponentials_SV: torch.Tensor, sum_S: torch.Tensor) -> None:
        """Adds a slice with the probabilities `exponentials_SV / sum_S`. Overwrites `exponentials_SV`."""
        labels_S, hidden_SC = self.labels_T[piece], self.hidden_TC[piece]
        dloss_S = (labels_S != IGNORE).to(sum_S.dtype) * self.dloss
        dlogits_SV = exponentials_SV.mul_((dloss_S / sum_S).unsqueeze(1))
        dlogits_SV.scatter_add_(1, labels_S.clamp(min=0).unsqueeze(1), -dloss_S.unsqueeze(1))
        dlogits_SV = dlogits_SV.to(hidden_SC.dtype)
        torch.mm(dlogits_SV, self.weight_VC, out=self.dhidden_TC[piece])
        # Slices are summed in at least fp32, as one product over all tokens would; in-place, as it is large.
        if self.dweight_VC is None:
            self.dweight_VC = dlogits_SV.t() @ hidden_SC
        elif dlogits_SV.dtype == sum_S.dtype:
            self.dweight_VC.addmm_(dlogits_SV.t(), hidden_SC)
        else:
            self.dweight_VC = self.dweight_VC.to(sum_S.dtype).add_(dlogits_SV.t() @ hidden_SC)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dhidden_TC, self.dweight_VC.to(self.weight_VC.dtype)


class _Head:
    """Logits in the dtype `compute` from hidden states and weights that may be narrower."""

    def __init__(self, weight_VC: torch.Tensor, compute: torch.dtype):
        self.narrow_product = weight_VC.is_cuda and weight_VC.dtype != compute
        self.compute = compute
        self.weight_CV = weight_VC.t() if self.narrow_product else weight_VC.to(compute).t()

    def logits(self, hidden_SC: torch.Tensor) -> torch.Tensor:
        if self.narrow_product:  # tensor cores take narrow inputs and give fp32
            return torch.mm(hidden_SC, self.weight_CV, out_dtype=self.compute)
        return hidden_SC.to(self.compute) @ self.weight_CV


def slice_tokens(device_type: str, vocab_size: int) -> int:
    """Tokens of one slice of logits."""
    return max(_LEAST_TOKENS, _SLICE_ELEMENTS[device_type] // vocab_size)


def _slices(tokens: int, weight_VC: torch.Tensor) -> list[slice]:
    step = slice_tokens(weight_VC.device.type, weight_VC.size(0))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
