"""Runs a plan's actions, and where the model is cut into stages its transfers, in the program's order."""

from __future__ import annotations

import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from chunkflow.execution.host_state import HostMemory, Use
from chunkflow.execution.kept_attention import AttentionStore, KeptAttention
from chunkflow.execution.loss import loss_sum, token_losses
from chunkflow.execution.shared_state import SharedKeyValueState
from chunkflow.execution.stage import WholeModel
from chunkflow.execution.state import ChunkTensors, End, KeyValueState, dummy_chunk
from chunkflow.planning.chunks import Group
from chunkflow.planning.pipeline_schedule import Timed
from chunkflow.planning.pipeline_transfers import Program, Transfer
from chunkflow.planning.schedule import DUMMY, Action, Kind

if TYPE_CHECKING:
    from chunkflow.execution.pipeline_stage import ChunkStage

# A send holds its tensor until it is received, which gloo tells only to a wait: the oldest is waited for when
# more are in flight. Plans keep neighbours in step, so the wait is seldom long.
SENDS_IN_FLIGHT = 4

Take = Callable[[ChunkTensors, torch.Tensor], None]


class StepResult:
    """Loss, counters and clock of one step on this rank. Counters are peaks, without dummies; lists have one
    entry for each stage of the rank."""

    def __init__(self, device: torch.device, stages: int, sequences: int | None = None):
        # The weighted sum of this replica's token losses, on the rank that has the last stage; elsewhere 0.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        # The same of each sequence, (sequences,) float64, without the sequence's own weight: this rank's
        # part, 0 for sequences that it has nothing of. None if `step` was not asked for it.
        self.loss_of_sequences: torch.Tensor | None = None
        if sequences is not None:
            self.loss_of_sequences = self.loss_sum.new_zeros(sequences)
        self.live_chunks = [0] * stages  # chunks that held activations
        self.stage_inputs = [0] * stages  # inputs received, or to be received, before their chunk's backward
        self.receive_buffers = 0  # posted receives that no action had taken
        self.state_bytes = 0  # K/V and their gradients, on the device or in host memory
        self.device_state_bytes = 0  # those on the device; of what is in host memory, the copies there
        # During each action of the clock, at most: chunks with activations, bytes of K/V and gradients.
        self.held: list[tuple[int, int]] = []
        self.kept_attention_bytes = (0, 0)  # results of attention kept on the device, in host memory
        self.clock = Clock(device)


class Clock:
    """When a rank's actions ran, and how long it was busy before replicas reduce their gradients."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Action, Any, Any]] = []
        self.begin = self.now()
        self.busy_begin = self.busy_end = self._busy_now()

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _busy_now(self) -> Any:
        # On the CPU the time of this thread, which does not count waiting in a collective.
        return self.now() if self.cuda else time.thread_time()

    def gradients_complete(self) -> None:
        """The last backward begins, in which replicas reduce their gradients."""
        self.busy_end = self._busy_now()

    def busy_seconds(self) -> float:
        """From the step's begin to its last backward. Synchronises with the device."""
        return self._seconds(self.busy_begin, self.busy_end)

    def timeline(self) -> list[Timed]:
        """The actions in their order, in seconds since the step began on this rank, with collectives but
        without the wait for messages. Synchronises with the device."""
        return [
            Timed(action, self._seconds(self.begin, start), self._seconds(self.begin, end))
            for action, start, end in self.marks
        ]

    def _seconds(self, begin: Any, end: Any) -> float:
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


class Runner:
    """Runs each step's program on the stages of this rank: one, or several virtual ones.

    `loss(hidden_TC, weight_VC, chunk)` is the sum of a chunk's token losses, each times its
    `chunk.loss_weights`, 0-dim, as `loss.loss_sum`.
    `blocks`: the ranks of this stage in each block of replicas that may share a sequence.
    `keep_attention`: "device" or "host" is where chunks that are computed again keep results of attention;
    with "none" they compute attention again, too.
    `kv_offload`: K/V of groups of several chunks, and their gradients, live in host memory.
    """

    def __init__(
        self,
        stages: Sequence[WholeModel | ChunkStage],
        device: torch.device,
        loss: End = loss_sum,
        blocks: Mapping[range, dist.ProcessGroup] | None = None,
        keep_attention: str = "none",
        kv_offload: bool = False,
    ):
        self.stages, self.device, self.loss, self.blocks = stages, device, loss, blocks or {}
        self.keep_attention = keep_attention
        self.host = self._host_memory if kv_offload else None

    def step(
        self,
        program: Program,
        groups: Sequence[Group],
        chunks: list[list[ChunkTensors]],
        denominator: float,
        sequence_weights: torch.Tensor | None = None,
        *,
        sequences: int | None = None,
        kv_offload: bool | None = None,
    ) -> StepResult:
        """Runs this rank's part of a plan: adds gradients of sum(weight x loss) / denominator to the
        parameters' `.grad`, summed over the tokens of the chunks.

        `chunks[g][c]` are the tensors of chunk c of the replica's group g, the same on all its ranks.
        `denominator`: as a rule the sum of weights over the global batch, of all replicas; not 0. A weight is
        the token's (`chunk.weights`) times its sequence's: `sequence_weights[s]`, any real number, of the
        plan's sequence s, (sequences,) float64, copied to the device where it is not there yet; None: all 1.
        It is read when the loss of a chunk is computed.
        `sequences`: how many the plan has, if `StepResult.loss_of_sequences` is wanted. `kv_offload`: of this
        step; None: as of the runner.
        """
        weights = self._on_device(sequence_weights)
        host = self.host if kv_offload is None else self._host_memory if kv_offload else None
        return _Run(self, groups, chunks, 1 / denominator, None, weights, sequences, host=host).run(program)

    @torch.no_grad()
    def evaluate(
        self,
        program: Program,
        groups: Sequence[Group],
        chunks: list[list[ChunkTensors]],
        take: Take,
        sequence_weights: torch.Tensor | None = None,
    ) -> StepResult:
        """Runs this rank's part of a forward-only plan; the last stage calls `take(chunk, losses_T)`, with
        the loss of each token; `chunk.loss_weights` are their weights, as in `step`. Only the K/V of the
        current group are kept; `StepResult.loss_sum` stays 0."""
        weights = self._on_device(sequence_weights)
        return _Run(self, groups, chunks, take=take, sequence_weights=weights, host=self.host).run(program)

    @functools.cached_property
    def _host_memory(self) -> HostMemory:
        return HostMemory(self.device)

    def _on_device(self, sequence_weights: torch.Tensor | None) -> torch.Tensor | None:
        return None if sequence_weights is None else sequence_weights.to(self.device, non_blocking=True)


class _Run:
    """One program while it runs."""

    def __init__(
        self,
        runner: Runner,
        groups: Sequence[Group],
        chunks: list[list[ChunkTensors]],
        loss_gradient: float = 0.0,
        take: Take | None = None,
        sequence_weights: torch.Tensor | None = None,
        sequences: int | None = None,
        host: HostMemory | None = None,
    ):
        self.groups, self.chunks, self.device = groups, chunks, runner.device
        self.loss, self.loss_gradient, self.take = runner.loss, loss_gradient, take
        self.sequence_weights, self.blocks, self.host = sequence_weights, runner.blocks, host
        self.stages = {stage.stage_index: stage for stage in runner.stages}
        self.places = {index: place for place, index in enumerate(self.stages)}
        self.states: dict[tuple[int, int], KeyValueState | SharedKeyValueState] = {}  # (stage, group)
        # (stage, key) -> the chunk as that stage sees it, from its first forward to its backward
        self.in_flight: dict[tuple[int, tuple[int, int]], ChunkTensors] = {}
        self.discarded: set[tuple[int, tuple[int, int]]] = set()  # those without activations
        self.live: Counter[int] = Counter()  # stage -> chunks that hold activations
        self.arriving: dict[tuple[bool, int, tuple[int, int]], dist.Work] = {}  # (gradient, stage, key)
        self.leaving: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self.result = StepResult(runner.device, len(runner.stages), sequences)
        self.kept: AttentionStore | None = None
        if runner.keep_attention != "none" and take is None:
            self.kept = AttentionStore(runner.device, host=runner.keep_attention == "host")

    def run(self, program: Program) -> StepResult:
        for stage in self.stages.values():
            stage.begin_step()
        actions = [entry for entry in program if isinstance(entry, Action)]
        self.backwards_left = Counter(action.stage for action in actions if action.kind is Kind.BACKWARD)
        following = iter([*actions[1:], None])
        for entry in program:
            while self.leaving and (len(self.leaving) > SENDS_IN_FLIGHT or self.leaving[0][0].is_completed()):
                self.leaving.popleft()[0].wait()
            if isinstance(entry, Action):
                self._act(entry, next(following))
            else:
                self._transfer(entry)
        for work, _ in self.leaving:
            work.wait()
        if self.kept:
            self.result.kept_attention_bytes = self.kept.peaks
        self.result.device_state_bytes = self.host.end() if self.host else self.result.state_bytes
        return self.result

    def _transfer(self, transfer: Transfer) -> None:
        key, gradient = (transfer.group, transfer.chunk), transfer.made_by is Kind.BACKWARD
        if transfer.send:
            stage = self.stages[transfer.stage]
            self.leaving.append(stage.send(gradient, key))
            if not gradient and (transfer.stage, key) in self.discarded:
                stage.forget_output(key)
                if self.take:
                    self._forget(transfer.stage, key)
            return
        index = transfer.stage + (-1 if gradient else 1)
        tokens = 1 if transfer.group == DUMMY else self.chunks[transfer.group][transfer.chunk].tokens.size(0)
        self.arriving[gradient, index, key] = self.stages[index].receive(gradient, key, tokens)
        result, place = self.result, self.places[index]
        result.receive_buffers = max(result.receive_buffers, len(self.arriving))
        result.stage_inputs[place] = max(result.stage_inputs[place], self.stages[index].stage_inputs())

    def _act(self, action: Action, following: Action | None) -> None:
        kind, key, index = action.kind, action[1:3], action.stage
        if kind is not Kind.RECOMPUTE:  # its input is here already, and its gradient may be on the way
            work = self.arriving.pop((kind is Kind.BACKWARD, index, key), None)
            if work:
                work.wait()
        if self.host:
            self._chunk(index, key)  # the first one of a group makes the state
            self.host.begin(self._use(action), self._use(following))
        start, live = self.result.clock.now(), sum(self.live.values())
        if kind is Kind.BACKWARD:
            self._backward(index, key)
        else:
            backward_follows = following == action._replace(kind=Kind.BACKWARD)
            self._forward(kind, index, key, self.loss_gradient if backward_follows else None)
        self.result.clock.marks.append((action, start, self.result.clock.now()))
        self.result.held.append((max(live, sum(self.live.values())), self.held_bytes))

    def _use(self, action: Action | None) -> Use | None:
        """What an action does with a K/V state that there is already."""
        if action is None or (action.stage, action.group) not in self.states:
            return None
        # Of layers whose attention was kept nothing is read; only a last stage's last one keeps none.
        from_kept = self.kept is not None and action.kind is Kind.RECOMPUTE
        if from_kept and not self.stages[action.stage].is_last:
            return None
        state = self.states[action.stage, action.group]
        return Use(state, action.chunk, action.kind is Kind.BACKWARD, last_only=from_kept)

    def _forward(self, kind: Kind, index: int, key: tuple[int, int], loss_gradient: float | None) -> None:
        stage, chunk, result = self.stages[index], self._chunk(index, key), self.result
        chunk.end = {Kind.FORWARD_STATE: None, Kind.EVALUATE: token_losses}.get(kind, self.loss)
        chunk.loss_gradient = loss_gradient
        if stage.is_last and chunk.end and key[0] != DUMMY:
            chunk.loss_weights = chunk.weighed(self.sequence_weights)
            chunk.wants_losses = result.loss_of_sequences is not None
        keeps_activations = kind in (Kind.FORWARD, Kind.RECOMPUTE)
        with torch.set_grad_enabled(keeps_activations):
            output = stage.forward(key, chunk)
        self._count_state_bytes()
        if not keeps_activations:
            self.discarded.add((index, key))
            if stage.is_last:
                stage.forget_output(key)
                if kind is Kind.EVALUATE:
                    if key[0] != DUMMY:
                        self.take(chunk, output)
                    self._forget(index, key)
            return
        self.discarded.discard((index, key))
        if key[0] != DUMMY:
            self.live[index] += 1
            place = self.places[index]
            result.live_chunks[place] = max(result.live_chunks[place], self.live[index])
        if stage.is_last:
            result.loss_sum += output.detach()
            if chunk.wants_losses:
                assert chunk.losses is not None, "loss_of_sequences needs a loss that leaves chunk.losses"
                losses_T = chunk.losses if chunk.weights is None else chunk.losses * chunk.weights
                chunk.add_to_sequences(result.loss_of_sequences, losses_T)
                chunk.losses = None

    def _backward(self, index: int, key: tuple[int, int]) -> None:
        if self.backwards_left.total() == 1:
            self.result.clock.gradients_complete()
        self.backwards_left[index] -= 1
        last = not self.backwards_left[index]
        self.stages[index].backward(key, self.loss_gradient, last)
        self.live[index] -= key[0] != DUMMY
        self._count_state_bytes()
        self.in_flight.pop((index, key)).state = None
        if key[1] == 0:
            self.states.pop((index, key[0]), None)

    def _forget(self, index: int, key: tuple[int, int]) -> None:
        """After an EVALUATE with its output taken or sent. K/V stay until the group's last chunk."""
        self.stages[index].forget_input(key)
        self.in_flight.pop((index, key)).state = None
        group, chunk = key
        if group != DUMMY and chunk == len(self.chunks[group]) - 1:
            self.states.pop((index, group), None)

    def _chunk(self, index: int, key: tuple[int, int]) -> ChunkTensors:
        """The chunk for one stage: each stage has a separate K/V state."""
        if (index, key) not in self.in_flight:
            group, number = key
            chunk = dummy_chunk() if group == DUMMY else self.chunks[group][number]
            self.in_flight[index, key] = chunk = chunk.to(self.device)
            if group != DUMMY and self.groups[group].has_state:
                if (index, group) not in self.states:
                    self.states[index, group] = self._state(self.groups[group])
                chunk.state = self.states[index, group]
                chunk.kept = KeptAttention(self.kept) if self.kept else None
        return self.in_flight[index, key]

    def _state(self, group: Group) -> KeyValueState | SharedKeyValueState:
        if group.spread is None:
            return KeyValueState(group, self.host)
        return SharedKeyValueState(group, self.blocks[group.spread.replicas], self.host)

    def _count_state_bytes(self) -> None:
        self.held_bytes = sum(state.bytes() for state in self.states.values())
        self.result.state_bytes = max(self.result.state_bytes, self.held_bytes)
