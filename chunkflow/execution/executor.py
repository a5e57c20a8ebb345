"""Runs a plan's actions on one stage that holds the whole model: exactly the gradients of whole sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from chunkflow.execution.loss import IGNORE, loss_sum, token_losses
from chunkflow.execution.state import ChunkTensors, KeyValueState
from chunkflow.planning.chunks import Chunk, Group, Segment
from chunkflow.planning.schedule import DUMMY, Action, Kind


class StepResult:
    """What the actions of one step amounted to on this rank."""

    def __init__(self, device: torch.device):
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # of this rank's token losses
        self.peak_live_chunks = 0  # chunks that held activations at once
        self.peak_state_bytes = 0  # K/V and their gradients


def run_actions(
    model: nn.Module,
    groups: list[Group],
    actions: list[Action],
    chunks: list[list[ChunkTensors]],
    targets: int,
    device: torch.device,
    before_last_backward: Callable[[], None],
) -> StepResult:
    """Runs forward and backward of `actions`; gradients of sum(loss) / targets are added to the parameters'
    `.grad`.

    `chunks[g][c]` are the tensors of chunk c of group g; `targets` the supervised tokens of the whole global
    batch, over all ranks. `before_last_backward` is where gradients begin to be reduced over ranks.
    """
    result = StepResult(device)
    states: dict[int, KeyValueState] = {}
    losses: dict[tuple[int, int], torch.Tensor] = {}  # of the chunks that hold activations
    dummies: list[torch.Tensor] = []
    last_backward = max(index for index, action in enumerate(actions) if action.kind is Kind.BACKWARD)
    following = [*actions[1:], None]
    for index, (kind, group, number) in enumerate(actions):
        if index == last_backward:
            before_last_backward()
        if group == DUMMY:
            if kind is Kind.FORWARD:
                dummy = dummy_chunk().to(device)
                dummy.end = loss_sum
                dummies.append(model(dummy.tokens, dummy))
            else:
                dummies.pop().backward()
            continue
        if kind is Kind.BACKWARD:
            loss = losses.pop((group, number))
            loss.backward(torch.full_like(loss, 1 / targets))
            if group in states:
                result.peak_state_bytes = max(
                    result.peak_state_bytes, sum(state.bytes() for state in states.values())
                )
            chunks[group][number].state = None
            if number == 0:
                states.pop(group, None)
            continue
        chunk = chunks[group][number].to(device)
        if len(groups[group].chunks) > 1:
            if group not in states:
                states[group] = KeyValueState(groups[group])
            chunk.state = states[group]
        state_only = kind is Kind.FORWARD_STATE
        chunk.end = None if state_only else loss_sum
        chunk.loss_gradient = (
            1 / targets if following[index] == Action(Kind.BACKWARD, group, number) else None
        )
        with torch.set_grad_enabled(not state_only):
            loss = model(chunk.tokens, chunk)
        if not state_only:
            losses[group, number] = loss
            result.loss_sum += loss.detach()
            result.peak_live_chunks = max(result.peak_live_chunks, len(losses))
    return result


@torch.no_grad()
def run_evaluation(
    model: nn.Module,
    groups: list[Group],
    actions: list[Action],
    chunks: list[list[ChunkTensors]],
    device: torch.device,
    take: Callable[[ChunkTensors, torch.Tensor], None],
) -> StepResult:
    """Runs the actions of a forward-only plan: `take(chunk, losses_T)` gets each chunk with the loss of each
    of its tokens.

    Nothing is kept but the K/V of one group; gradients and parameters stay as they are. `StepResult.loss_sum`
    stays 0.
    """
    result = StepResult(device)
    state = None
    for _, group, number in actions:
        chunk = (dummy_chunk() if group == DUMMY else chunks[group][number]).to(device)
        chunk.end = token_losses
        if group != DUMMY and len(chunks[group]) > 1:
            state = KeyValueState(groups[group]) if number == 0 else state
            chunk.state = state
        losses_T = model(chunk.tokens, chunk)
        if chunk.state:
            result.peak_state_bytes = max(result.peak_state_bytes, state.bytes())
            chunk.state = None
            state = None if number == len(chunks[group]) - 1 else state
        if group != DUMMY:
            take(chunk, losses_T)
    return result


def dummy_chunk() -> ChunkTensors:
    """One token without a target: it costs next to nothing, and its gradients are exactly zero."""
    zero = torch.zeros(1, dtype=torch.int64)
    return ChunkTensors(Chunk((Segment(0, 0, 1),)), 0, zero, torch.full_like(zero, IGNORE), zero)
