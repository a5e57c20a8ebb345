"""The model's results (`ChunkTensors.end`): functions of the last hidden states and the head's weight.

Logits in at least fp32 exist for a slice of tokens only. Their gradient, in the dtype of the hidden states,
is kept for a block of slices, as a rule the whole chunk, so that the gradients of weight and hidden states
are one matrix product each. Nothing weight-sized lives while other chunks run. If a chunk's backward is the
very next action, its forward computes the head's gradients from the same logits; otherwise backward computes
the logits again.

Shape suffixes: T tokens of the chunk, B tokens of a block, S tokens of a slice, C hidden size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch

from chunkflow.execution.linear import pad, padded_rows, widen, widens
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.chunks import IGNORE
from chunkflow.planning.memory import HEAD_BLOCK_TOKENS

# Logits of one slice in fp32: on the CPU 4 MiB, which a cache holds; on CUDA 256 MiB, which keep it busy.
# At least _LEAST_TOKENS, whatever the vocabulary: each slice's product reads the whole weight.
_SLICE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
_LEAST_TOKENS = 512


def loss_sum(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, chunk: ChunkTensors) -> torch.Tensor:
    """The SUM of the cross-entropies of all positions that have a target, each times its weight: 0-dim;
    logits and sum in at least fp32. Gradients are computed here if `chunk.loss_gradient` is set, else in
    backward; of the weight only if it is trained. Leaves the cross-entropies themselves in `chunk.losses` if
    `chunk.wants_losses`."""
    return _SlicedCrossEntropy.apply(hidden_TC, weight_VC, chunk)


@torch.no_grad()
def token_losses(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, chunk: ChunkTensors) -> torch.Tensor:
    """The cross-entropy of each position, (T,), in at least fp32, not weighted, 0 without a target. No
    autograd graph."""
    return _cross_entropy(hidden_TC, weight_VC, chunk.labels)[0]


@torch.no_grad()
def last_logits(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, chunk: ChunkTensors) -> torch.Tensor:
    """The last token's logits, (V,), in at least fp32. Weights are widened a slice of the vocabulary at a
    time."""
    rows = max(128, _SLICE_ELEMENTS[_device_type(weight_VC)] // weight_VC.size(1))
    return torch.cat([_Head(hidden_TC[-1:], part_SC).logits()[0] for part_SC in weight_VC.split(rows)])


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TC, weight_VC, chunk):
        labels_T, weights_T, gradients = chunk.labels, chunk.loss_weights, None
        if chunk.loss_gradient is not None:
            arguments = hidden_TC, weight_VC, labels_T, weights_T, chunk.loss_gradient
            gradients = _Gradients(*arguments, ctx.needs_input_grad[1])
        losses_T, lse_T1 = _cross_entropy(hidden_TC, weight_VC, labels_T, gradients)
        ctx.loss_gradient = chunk.loss_gradient
        if gradients:
            ctx.save_for_backward(*gradients.result())
        else:
            ctx.save_for_backward(hidden_TC, weight_VC, labels_T, weights_T, lse_T1)
        if chunk.wants_losses:
            chunk.losses = losses_T
        return losses_T.sum() if weights_T is None else (losses_T * weights_T.to(losses_T.dtype)).sum()

    @staticmethod
    def backward(ctx, dloss):
        if ctx.loss_gradient is not None:
            same = (dloss / ctx.loss_gradient - 1).abs() < 1e-6
            torch._assert_async(same, "backward sent the loss another gradient than its forward was told")
            return *ctx.saved_tensors, None
        hidden_TC, weight_VC, labels_T, weights_T, lse_T1 = ctx.saved_tensors
        head = _Head(hidden_TC, weight_VC)
        arguments = hidden_TC, weight_VC, labels_T, weights_T, dloss
        gradients = _Gradients(*arguments, ctx.needs_input_grad[1])

        def one_slice(piece: slice) -> None:
            gradients.add(piece, head.logits(piece).sub_(lse_T1[piece]).exp_())

        _in_slices(one_slice, head, gradients)
        return *gradients.result(), None


def _cross_entropy(hidden_TC, weight_VC, labels_T, gradients: "_Gradients | None" = None):
    """The loss of each token, (T,), 0 without a target, and the log-sum-exp of its logits, (T, 1). Adds to
    `gradients` where they are given."""
    head = _Head(hidden_TC, weight_VC)
    targets_T1 = labels_T.clamp(min=0).unsqueeze(1)
    target_logits_T1 = torch.empty(targets_T1.shape, dtype=head.compute, device=hidden_TC.device)
    log_likelihoods_T1 = torch.empty_like(target_logits_T1)

    def one_slice(piece: slice) -> None:
        logits_SV = head.logits(piece)
        torch.gather(logits_SV, 1, targets_T1[piece], out=target_logits_T1[piece])
        log_probabilities_SV = head.log_softmax(logits_SV)
        torch.gather(log_probabilities_SV, 1, targets_T1[piece], out=log_likelihoods_T1[piece])
        if gradients:
            gradients.add(piece, log_probabilities_SV.exp_())

    _in_slices(one_slice, head, gradients)
    losses_T = torch.where(labels_T == IGNORE, 0, -log_likelihoods_T1.squeeze(1))
    return losses_T, target_logits_T1.sub_(log_likelihoods_T1)


def _in_slices(one_slice: Callable[[slice], None], head: "_Head", gradients: "_Gradients | None") -> None:
    """Calls `one_slice` with each slice of tokens; the gradients' products follow each block of slices."""
    tokens = head.hidden_TC.size(0)
    longest = block_tokens(_device_type(head.hidden_TC), head.weight_VC.size(0), head.hidden_TC)
    for block in _pieces(slice(0, tokens), longest):
        if gradients:
            gradients.begin(block)
        for piece in _pieces(block, head.slice_tokens):
            one_slice(piece)
        if block.stop == tokens:
            head.free()
        if gradients:
            gradients.finish()


class _Gradients:
    """Gradients of hidden states and weight, a block at a time. `weights_T`: of the loss on each token, None:
    all 1; `dloss`: the gradient of the loss; `trained`: whether the weight has a gradient."""

    def __init__(self, hidden_TC, weight_VC, labels_T, weights_T, dloss: float | torch.Tensor, trained: bool):
        self.hidden_TC, self.weight_VC = hidden_TC, weight_VC
        self.compute = torch.promote_types(hidden_TC.dtype, torch.float32)
        self.targets_T1 = labels_T.clamp(min=0).unsqueeze(1)
        self.dloss_T1 = ((labels_T != IGNORE).to(self.compute) * dloss).unsqueeze(1)
        if weights_T is not None:
            self.dloss_T1 *= weights_T.to(self.compute).unsqueeze(1)
        self.minus_one_T1 = torch.full_like(self.dloss_T1, -1)
        self.dhidden_TC = torch.empty_like(hidden_TC)
        self.trained, self.dweight_VC = trained, None
        self.factor = self.compute if widens(hidden_TC) else hidden_TC.dtype  # of the products
        self.block, self.dlogits_BV = slice(0, 0), None  # the block under way

    def begin(self, block: slice) -> None:
        if self.dlogits_BV is None:  # no block is longer than the first
            rows = padded_rows(block.stop, self.hidden_TC)
            self.dlogits_BV = self.hidden_TC.new_empty(rows, self.weight_VC.size(0), dtype=self.factor)
        self.block = block

    def add(self, piece: slice, probabilities_SV: torch.Tensor) -> None:
        """Adds a slice of the block. Overwrites `probabilities_SV`."""
        dlogits_SV = self.dlogits_BV[piece.start - self.block.start : piece.stop - self.block.start]
        probabilities_SV.scatter_add_(1, self.targets_T1[piece], self.minus_one_T1[piece])
        if dlogits_SV.dtype == self.compute or _device_type(dlogits_SV) == "cuda":
            torch.mul(probabilities_SV, self.dloss_T1[piece], out=dlogits_SV)
        else:  # for a narrower `out` the CPU would make a wide one first
            dlogits_SV.copy_(probabilities_SV.mul_(self.dloss_T1[piece]))

    def finish(self) -> None:
        """One product for each gradient. Several blocks are summed in at least fp32, as one product would."""
        tokens, hidden_BC = self.block.stop - self.block.start, widen(pad(self.hidden_TC[self.block]))
        dlogits_BV, weight_VC = self.dlogits_BV[: hidden_BC.size(0)], widen(self.weight_VC)
        if hidden_BC.size(0) == tokens and self.factor == self.dhidden_TC.dtype:
            torch.mm(dlogits_BV, weight_VC, out=self.dhidden_TC[self.block])
        else:
            dlogits_BV[tokens:].zero_()
            self.dhidden_TC[self.block] = torch.mm(dlogits_BV, weight_VC)[:tokens]
        if not self.trained:
            return
        first, wide = self.dweight_VC is None, hidden_BC.dtype == self.compute
        if first and (wide or tokens == self.hidden_TC.size(0)):
            self.dweight_VC = dlogits_BV.t() @ hidden_BC
            return
        if first:
            self.dweight_VC = torch.zeros_like(self.weight_VC, dtype=self.compute)
        if wide:
            self.dweight_VC.addmm_(dlogits_BV.t(), hidden_BC)
        elif _device_type(hidden_BC) == "cuda":
            out = {"out_dtype": self.compute, "out": self.dweight_VC}
            torch.addmm(self.dweight_VC, dlogits_BV.t(), hidden_BC, **out)
        else:
            self.dweight_VC += dlogits_BV.t() @ hidden_BC

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of hidden states and weight. Frees the block, which may be larger than the weight, first."""
        self.dlogits_BV = None
        return self.dhidden_TC, self.dweight_VC.to(self.weight_VC.dtype) if self.trained else None


class _Head:
    """Logits of hidden states in at least fp32, slice by slice: each overwrites the one before it."""

    def __init__(self, hidden_TC: torch.Tensor, weight_VC: torch.Tensor):
        self.compute = torch.promote_types(hidden_TC.dtype, torch.float32)
        self.hidden_TC, self.weight_VC = hidden_TC, weight_VC
        self.slice_tokens = slice_tokens(_device_type(weight_VC), weight_VC.size(0))
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        narrow = weight_VC.dtype != self.compute
        self.narrow_product = narrow and _device_type(weight_VC) == "cuda"
        self.bf16_values = hidden_TC.dtype == weight_VC.dtype == torch.bfloat16
        self.weight_CV = weight_VC.t() if self.narrow_product else weight_VC.to(self.compute).t()

    def logits(self, piece: slice = slice(None)) -> torch.Tensor:
        tokens, hidden_SC = self.hidden_TC[piece].size(0), pad(self.hidden_TC[piece])
        if self.buffers is None:
            shape = hidden_SC.size(0), self.weight_VC.size(0)  # no slice is longer than the first
            self.buffers = tuple(hidden_SC.new_empty(shape, dtype=self.compute) for _ in range(2))
        out_SV = self.buffers[0][: hidden_SC.size(0)]
        if self.narrow_product:  # tensor cores take narrow inputs and give fp32
            return torch.mm(hidden_SC, self.weight_CV, out_dtype=self.compute, out=out_SV)
        if self.bf16_values:
            with _bf16_products():
                return torch.mm(hidden_SC.to(self.compute), self.weight_CV, out=out_SV)[:tokens]
        return torch.mm(hidden_SC.to(self.compute), self.weight_CV, out=out_SV)[:tokens]

    def log_softmax(self, logits_SV: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits_SV, 1, out=self.buffers[1][: logits_SV.size(0)])

    def free(self) -> None:
        """Makes room for what is as large as the weight."""
        self.buffers = None


@contextmanager
def _bf16_products():
    """oneDNN multiplies fp32 matrices as bf16 ones, with sums and result in fp32: exact where the values are
    bf16 ones, and faster on CPUs that multiply bf16. Others go on as before.

    The setting holds for the whole process: no other thread may multiply fp32 matrices meanwhile. None does:
    data loading, planning and saving multiply nothing.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def slice_tokens(device_type: str, vocab_size: int) -> int:
    """Tokens of one slice of logits."""
    return max(_LEAST_TOKENS, _SLICE_ELEMENTS[device_type] // vocab_size)


def block_tokens(device_type: str, vocab_size: int, hidden: torch.Tensor) -> int:
    """Tokens of one block, with hidden states like this tensor. On the CPU a slice, where products are in
    fp32 or fp64: the product itself adds to the sum, as fast, and reads the slice from a cache."""
    wide = hidden.dtype == torch.promote_types(hidden.dtype, torch.float32) or widens(hidden)
    return slice_tokens(device_type, vocab_size) if wide and device_type == "cpu" else HEAD_BLOCK_TOKENS


def _pieces(whole: slice, step: int) -> list[slice]:
    starts = range(whole.start, whole.stop, step)
    return [slice(start, min(start + step, whole.stop)) for start in starts]


def _device_type(tensor: torch.Tensor) -> str:
    """Decides between the ways of the CPU and of CUDA. Tests take the other."""
    return tensor.device.type
