"""A stage of torch.distributed.pipelining with the plan's chunks as micro-batches: any number, any length.

torch's runtime splits a batch evenly, keeps a receive buffer for every micro-batch, and knows neither
FORWARD_STATE nor RECOMPUTE. Here a receive buffer lives from its receive to the chunk's backward, and a chunk
without activations keeps its stage input, from which it is recomputed without a message. Only this file uses
private parts of torch's stages.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.stage import _RecvInfo

from chunkflow.execution.state import ChunkTensors


class ChunkStage(PipelineStage):
    """One stage of several; its methods are those of `chunkflow.execution.stage.WholeModel`, plus messages.

    `before_last_backward(model)` is called before this stage's last backward of the step, in which gradients
    are reduced over replicas, layer by layer; torch's stages reduce them after it.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: int,
        stages: int,
        device: torch.device,
        group: dist.ProcessGroup,
        hidden_dtype: torch.dtype,
        before_last_backward: Callable[[nn.Module], None],
    ):
        # The shapes only tell torch that tensors go in and come out: each chunk has its own.
        tokens = torch.empty(1, dtype=torch.int64, device="meta")
        hidden = torch.empty(1, model.args.dim, dtype=hidden_dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        ends = {
            "input_args": hidden if stage else tokens,
            "output_args": hidden if stage < stages - 1 else loss,
        }
        super().__init__(model, stage, stages, device, group=group, **ends)
        self.before_last_backward = before_last_backward
        self.hidden_size, self.hidden_dtype = model.args.dim, hidden_dtype
        self.has_backward, self._runtime_validate = True, False
        self._stage_meta = self._user_meta
        self._setup_forward_send_info()
        self.grad_send_info = [None if self.is_first else stage - 1]
        self.chunks = sys.maxsize  # torch checks its numbers of micro-batches against it

    def begin_step(self) -> None:
        self.numbers: dict[tuple[int, int], int] = {}  # a chunk's key -> what torch calls that micro-batch
        self.clear_runtime_states()

    def _number(self, key: tuple[int, int]) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def receive(self, gradient: bool, key: tuple[int, int], tokens: int) -> dist.Work:
        """Posts the receive of a chunk's input, or of the gradient of its output."""
        number = self._number(key)
        buffer = torch.empty(tokens, self.hidden_size, dtype=self.hidden_dtype, device=self.device)
        if gradient:
            infos, meta, sender = self.grad_recv_info, self._stage_meta.outputs[0], self.stage_index + 1
        else:
            infos, meta, sender = self.args_recv_info, self._stage_meta.inputs[0], self.stage_index - 1
        infos[number] = (_RecvInfo("hidden states", sender, buffer, meta),)
        (operation,) = self.get_bwd_recv_ops(number) if gradient else self.get_fwd_recv_ops(number)
        return dist.irecv(operation.tensor, operation.peer, group=operation.group)

    def send(self, gradient: bool, key: tuple[int, int]) -> tuple[dist.Work, torch.Tensor]:
        """Sends a chunk's output on, or its input's gradient back. Keep the tensor until the work is done."""
        number = self._number(key)
        (operation,) = self.get_bwd_send_ops(number) if gradient else self.get_fwd_send_ops(number)
        return dist.isend(operation.tensor, operation.peer, group=operation.group), operation.tensor

    def forward(self, key: tuple[int, int], chunk: ChunkTensors) -> torch.Tensor | None:
        arguments = (chunk.tokens,), {"chunk": chunk}
        return self.forward_one_chunk(self._number(key), *arguments, save_forward_output=False)

    def backward(self, key: tuple[int, int], loss_gradient: float, last: bool) -> None:
        number, self.loss_gradient = self._number(key), loss_gradient
        loss = self.fwd_cache[number][0][0] if self.is_last else None
        self.backward_one_chunk(number, loss=loss, last_backward=last)
        self.args_recv_info.pop(number, None)
        self.grad_recv_info.pop(number, None)
        if self.is_first:
            self.bwd_cache.pop(number)  # no gradient of tokens

    def forget_output(self, key: tuple[int, int]) -> None:
        """Drops the output of a forward without gradients; `forget_input` drops its input."""
        self.fwd_cache.pop(self._number(key))

    def forget_input(self, key: tuple[int, int]) -> None:
        self.args_recv_info.pop(self._number(key), None)

    def stage_inputs(self) -> int:
        """How many chunks have an input received, or to be received, and no backward yet."""
        return len(self.args_recv_info)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ):
        assert backward_type == "full"
        if last_backward:
            self.before_last_backward(self.submod)
        output, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        if self.is_last:
            gradients = torch.full_like(output, self.loss_gradient)
        return stage_backward(output, gradients, bwd_kwargs["input_values"]), None
