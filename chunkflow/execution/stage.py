"""A stage: the part of the model that a rank runs chunks through. Here it is the whole model.

Parts of a model are in pipeline_stage.py, as stages of torch.distributed.pipelining with the same methods.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from chunkflow.execution.state import ChunkTensors


class WholeModel:
    """The only stage there is: nothing is received or sent.

    `before_last_backward(model)` is called before the step's last backward: from there on gradients are
    reduced over ranks, layer by layer. `key` names a chunk from its first forward to its backward.
    """

    stage_index = 0
    is_first = is_last = True

    def __init__(self, model: nn.Module, before_last_backward: Callable[[nn.Module], None]):
        self.model, self.before_last_backward = model, before_last_backward
        self.losses: dict[tuple[int, int], torch.Tensor] = {}

    def begin_step(self) -> None:
        self.losses.clear()

    def forward(self, key: tuple[int, int], chunk: ChunkTensors) -> torch.Tensor | None:
        """What `chunk.end` makes of the chunk; with gradients enabled it is kept for the backward."""
        result = self.model(chunk.tokens, chunk)
        if torch.is_grad_enabled():
            self.losses[key] = result
        return result

    def backward(self, key: tuple[int, int], loss_gradient: float, last: bool) -> None:
        """Adds to the parameters' gradients; `loss_gradient` is what the chunk's loss gets."""
        if last:
            self.before_last_backward(self.model)
        loss = self.losses.pop(key)
        loss.backward(torch.full_like(loss, loss_gradient))

    def forget_output(self, key: tuple[int, int]) -> None:
        """Nothing was kept of a forward without gradients."""

    forget_input = forget_output
