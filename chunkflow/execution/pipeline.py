"""Runs a pipeline plan on torch.distributed.pipelining: one rank's program of actions, sends and receives,
exactly.

torch's own runtime splits a batch evenly, keeps a receive buffer for every micro-batch, knows neither
FORWARD_STATE nor RECOMPUTE, and waits for its sends at the end of the step. Here the micro-batches are the
plan's chunks, as many and as long as each step has them; a receive buffer is made when its receive is posted
and is gone after the chunk's backward; a chunk that keeps no activations keeps its stage input, from which it
is recomputed without a message.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.distributed.pipelining.stage import _RecvInfo

from chunkflow.execution.executor import dummy_chunk
from chunkflow.execution.loss import loss_sum, token_losses
from chunkflow.execution.state import ChunkTensors, KeyValueState
from chunkflow.planning.chunks import Chunk, Group, Segment
from chunkflow.planning.pipeline_schedule import StageAction, Timed
from chunkflow.planning.pipeline_transfers import Transfer
from chunkflow.planning.schedule import Kind

# A send that the other end has not taken holds its tensor. gloo does not tell before one waits, so the oldest
# is waited for when there are more; plans keep neighbours in step, so that this seldom takes time.
SENDS_IN_FLIGHT = 4


class ChunkStage(PipelineStage):
    """A PipelineStage whose micro-batches are chunks of any length. All that is private to torch's stages is
    touched here.

    `before_last_backward` is called before the step's last backward of this stage: gradients are then reduced
    over data-parallel ranks within that backward, layer by layer, while torch's stages reduce them after it.
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

    def begin_step(self, chunks: int) -> None:
        self.chunks = chunks
        self.clear_runtime_states()

    def receive(self, gradient: bool, index: int, tokens: int) -> dist.Work:
        """Posts the receive of chunk `index`'s input, or of the gradient of its output."""
        buffer = torch.empty(tokens, self.hidden_size, dtype=self.hidden_dtype, device=self.device)
        infos, metas, step = (
            (self.grad_recv_info, self._stage_meta.outputs, 1)
            if gradient
            else (self.args_recv_info, self._stage_meta.inputs, -1)
        )
        infos[index] = (_RecvInfo("hidden states", self.stage_index + step, buffer, metas[0]),)
        (operation,) = self.get_bwd_recv_ops(index) if gradient else self.get_fwd_recv_ops(index)
        return dist.irecv(operation.tensor, operation.peer, group=operation.group)

    def send(self, gradient: bool, index: int) -> tuple[dist.Work, torch.Tensor]:
        """Sends chunk `index`'s output on, or the gradient of its input back. The tensor must live until the
        work is done."""
        (operation,) = self.get_bwd_send_ops(index) if gradient else self.get_fwd_send_ops(index)
        return dist.isend(operation.tensor, operation.peer, group=operation.group), operation.tensor

    def forward(self, index: int, chunk: ChunkTensors, kind: Kind) -> torch.Tensor | None:
        with torch.set_grad_enabled(kind not in (Kind.FORWARD_STATE, Kind.EVALUATE)):
            return self.forward_one_chunk(index, (chunk.tokens,), {"chunk": chunk}, save_forward_output=False)

    def backward(self, index: int, loss: torch.Tensor | None, last: bool) -> None:
        self.backward_one_chunk(index, loss=loss, last_backward=last)
        self.args_recv_info.pop(index, None)
        self.grad_recv_info.pop(index, None)
        if self.is_first:
            self.bwd_cache.pop(index)  # no gradient of tokens

    def forget_output(self, index: int) -> None:
        """After a FORWARD_STATE nothing but its input stays; after an EVALUATE not even that."""
        self.fwd_cache.pop(index)

    def forget_input(self, index: int) -> None:
        self.args_recv_info.pop(index, None)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ):
        assert backward_type == "full"
        if last_backward:
            self.before_last_backward(self.submod)
        return stage_backward(
            bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]
        ), None


class PipelineResult:
    """What one step amounted to on this rank. Counters are peaks; lists have one entry for each stage of the
    rank."""

    def __init__(self, device: torch.device, stages: int):
        self.loss_sum = torch.zeros(
            (), dtype=torch.float64, device=device
        )  # of the replica's token losses; on its last stage
        self.live_chunks = [0] * stages  # chunks that held activations
        self.stage_inputs = [
            0
        ] * stages  # inputs received, or to be received, of chunks whose backward had not run
        self.receive_buffers = 0  # posted receives that no action had taken
        self.state_bytes = 0  # K/V and their gradients
        self.clock = ActionClock(device)


class ActionClock:
    """When the rank's actions computed. Waiting for a message belongs to none; meeting other replicas in a
    collective does."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.begin = self.now()
        self.marks: list[tuple[StageAction, Any, Any]] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timeline(self) -> list[Timed]:
        """The actions in their order, in seconds since the step began on this rank. Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        return [Timed(action, self._seconds(start), self._seconds(end)) for action, start, end in self.marks]

    def _seconds(self, mark: Any) -> float:
        return self.begin.elapsed_time(mark) / 1000 if self.cuda else mark - self.begin


class StateAwareSchedule(PipelineScheduleMulti):
    """Runs each step's own program on the stages of this rank, one or several; the pipeline has at least two
    ranks."""

    def __init__(self, stages: Sequence[ChunkStage]):
        # torch asks for a number of micro-batches, which here changes every step, and knows by the loss that
        # there is a backward.
        super().__init__(
            list(stages), n_microbatches=1, loss_fn=lambda output, target: output, scale_grads=False
        )
        self.device = stages[0].device

    def step(
        self,
        program: Sequence[StageAction | Transfer],
        groups: Sequence[Group],
        chunks: list[list[ChunkTensors]],
        targets: int,
    ) -> PipelineResult:
        """Runs this rank's part of a plan; gradients of sum(loss) / targets are added to the parameters'
        `.grad`.

        `chunks[g][c]` are the tensors of chunk c of the replica's group g, the same on all its ranks; without
        any, a dummy keeps the replica's collectives in step. `targets` counts the supervised tokens of the
        global batch, over all replicas.
        """
        return self._run(program, groups, chunks, targets)

    def evaluate(
        self,
        program: Sequence[StageAction | Transfer],
        groups: Sequence[Group],
        chunks: list[list[ChunkTensors]],
        take: Callable[[ChunkTensors, torch.Tensor], None],
    ) -> PipelineResult:
        """Runs this rank's part of a forward-only plan: on the last stage `take(chunk, losses_T)` gets each
        chunk with the loss of each of its tokens. Nothing is kept but the K/V of the group that a stage is
        in; gradients and parameters stay as they are.
        """
        return self._run(program, groups, chunks, 1, take)

    def _run(
        self,
        program: Sequence[StageAction | Transfer],
        groups: Sequence[Group],
        chunks: list[list[ChunkTensors]],
        targets: int,
        take: Callable[[ChunkTensors, torch.Tensor], None] | None = None,
    ) -> PipelineResult:
        if not groups:
            groups, chunks = [Group((Chunk((Segment(0, 0, 1),)),))], [[dummy_chunk()]]
        self.groups, self.chunks, self.targets, self.take = groups, chunks, targets, take
        self.offsets = list(accumulate((len(own) for own in chunks), initial=0))
        self._n_microbatches = self.offsets[-1]
        for stage in self._stages:
            stage.begin_step(self._n_microbatches)
        self.places = {stage.stage_index: place for place, stage in enumerate(self._stages)}
        self.states: dict[tuple[int, int], KeyValueState] = {}  # (stage, group)
        self.in_flight: dict[
            tuple[int, int], ChunkTensors
        ] = {}  # (stage, index) -> from the first forward to the backward
        self.losses: dict[
            int, torch.Tensor
        ] = {}  # index -> of the chunks that hold activations on the last stage
        self.arriving: dict[tuple[bool, int, int], dist.Work] = {}  # (gradient, stage, index)
        self.leaving: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self.live, self.left = [0] * len(self._stages), [self._n_microbatches] * len(self._stages)
        self.result = PipelineResult(self.device, len(self._stages))
        actions = [entry for entry in program if not isinstance(entry, Transfer)]
        following = iter([*actions[1:], None])
        for entry in program:
            while self.leaving and (len(self.leaving) > SENDS_IN_FLIGHT or self.leaving[0][0].is_completed()):
                self.leaving.popleft()[0].wait()
            if isinstance(entry, Transfer):
                self._transfer(entry)
            else:
                self._act(entry, next(following))
        for work, _ in self.leaving:
            work.wait()
        self.leaving.clear()
        return self.result

    def _transfer(self, transfer: Transfer) -> None:
        index, gradient = self.offsets[transfer.group] + transfer.chunk, transfer.made_by is Kind.BACKWARD
        if transfer.send:
            stage = self._stages[self.places[transfer.stage]]
            self.leaving.append(stage.send(gradient, index))
            if self.take:
                self._forget(stage, transfer.group, transfer.chunk, index)
            elif not gradient and self.in_flight[transfer.stage, index].end is None:
                stage.forget_output(index)
            return
        place = self.places[transfer.stage + (-1 if gradient else 1)]
        stage, tokens = self._stages[place], self.chunks[transfer.group][transfer.chunk].tokens.size(0)
        self.arriving[gradient, stage.stage_index, index] = stage.receive(gradient, index, tokens)
        result = self.result
        result.receive_buffers = max(result.receive_buffers, len(self.arriving))
        result.stage_inputs[place] = max(result.stage_inputs[place], len(stage.args_recv_info))

    def _act(self, action: StageAction, following: StageAction | None) -> None:
        kind, group, number, stage = action
        index, place = self.offsets[group] + number, self.places[stage]
        if kind is not Kind.RECOMPUTE:  # its input is still here, and its gradient may be on the way
            work = self.arriving.pop((kind is Kind.BACKWARD, stage, index), None)
            if work:
                work.wait()
        start = self.result.clock.now()
        if kind is Kind.BACKWARD:
            self._backward(place, stage, group, number, index)
        elif kind is Kind.EVALUATE:
            self._evaluate(place, stage, group, number, index)
        else:
            chunk = self._chunk(stage, group, number)
            chunk.end = None if kind is Kind.FORWARD_STATE else loss_sum
            chunk.loss_gradient = (
                1 / self.targets if following == action._replace(kind=Kind.BACKWARD) else None
            )
            self._forward(place, index, chunk, kind)
        self.result.clock.marks.append((action, start, self.result.clock.now()))

    def _forward(self, place: int, index: int, chunk: ChunkTensors, kind: Kind) -> None:
        stage, result = self._stages[place], self.result
        output = stage.forward(index, chunk, kind)
        if kind is Kind.FORWARD_STATE:
            if stage.is_last:
                stage.forget_output(index)
            return
        self.live[place] += 1
        result.live_chunks[place] = max(result.live_chunks[place], self.live[place])
        if stage.is_last:
            self.losses[index] = output / self.targets
            result.loss_sum += output.detach()

    def _evaluate(self, place: int, stage_index: int, group: int, number: int, index: int) -> None:
        stage, result = self._stages[place], self.result
        chunk = self._chunk(stage_index, group, number)
        chunk.end = token_losses
        output = stage.forward(index, chunk, Kind.EVALUATE)
        if self.states:
            result.state_bytes = max(result.state_bytes, sum(state.bytes() for state in self.states.values()))
        if stage.is_last:
            self.take(chunk, output)
            self._forget(stage, group, number, index)

    def _forget(self, stage: ChunkStage, group: int, number: int, index: int) -> None:
        """After an EVALUATE, once its output has been taken or sent: only the K/V stay, until the group's
        last chunk."""
        stage.forget_output(index)
        stage.forget_input(index)
        self.in_flight.pop((stage.stage_index, index)).state = None
        if number == len(self.chunks[group]) - 1:
            self.states.pop((stage.stage_index, group), None)

    def _backward(self, place: int, stage_index: int, group: int, number: int, index: int) -> None:
        stage, result = self._stages[place], self.result
        self.left[place] -= 1
        stage.backward(index, self.losses.pop(index) if stage.is_last else None, last=not self.left[place])
        self.live[place] -= 1
        if self.states:
            result.state_bytes = max(result.state_bytes, sum(state.bytes() for state in self.states.values()))
        self.in_flight.pop((stage_index, index)).state = None
        if number == 0:
            self.states.pop((stage_index, group), None)

    def _chunk(self, stage: int, group: int, number: int) -> ChunkTensors:
        """The chunk as this stage sees it: each stage has a K/V state of its own."""
        key = stage, self.offsets[group] + number
        if key not in self.in_flight:
            chunk = self.in_flight[key] = copy.copy(self.chunks[group][number]).to(self.device)
            if len(self.chunks[group]) > 1:
                if (stage, group) not in self.states:
                    self.states[stage, group] = KeyValueState(self.groups[group])
                chunk.state = self.states[stage, group]
        return self.in_flight[key]

    def _step_microbatches(self, *args, **kwargs):  # abstract in torch's base class, and never right here
        raise NotImplementedError("torch's way, for a batch that it splits: call step")
