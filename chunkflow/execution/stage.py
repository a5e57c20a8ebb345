"""The whole model as the only stage; pipeline_stage.py has stages of several, with the same methods."""

from collections.abc import Callable

import torch
from torch import nn

from chunkflow.execution.state import ChunkTensors


class WholeModel:
    """A stage that receives and sends nothing.

    `before_last_backward(model)` is called before the step's last backward, in which gradients are reduced
    over ranks, layer by layer. `key` identifies a chunk: (group, index in it).
    """

    stage_index = 0
    is_first = is_last = True

    def __init__(self, model: nn.Module, before_last_backward: Callable[[nn.Module], None]):
        self.model, self.before_last_backward = model, before_last_backward
        self.losses: dict[tuple[int, int], torch.Tensor] = {}

    def begin_step(self) -> None:
        self.losses.clear()

    def forward(self, key: tuple[int, int], chunk: ChunkTensors) -> torch.Tensor | None:
        """The model's result for the chunk; with gradients enabled it is kept for the backward."""
        result = self.model(chunk.tokens, chunk)
        if torch.is_grad_enabled():
            self.losses[key] = result
        return result

    def backward(self, key: tuple[int, int], loss_gradient: float, last: bool) -> None:
        """Adds to the parameters' gradients; `loss_gradient` is the gradient of the chunk's loss."""
        if last:
            self.before_last_backward(self.model)
        loss = self.losses.pop(key)
        loss.backward(torch.full_like(loss, loss_gradient))

    def forget_output(self, key: tuple[int, int]) -> None:
        """Does nothing: a forward without gradients keeps nothing."""

    forget_input = forget_output
