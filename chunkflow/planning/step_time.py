"""Seconds of a step, calculated from its plan and from what a device does in a second. No torch.

An action takes the time of its products, of its attention, and something for each layer however short the
chunk is. Under ZeRO-3 each slot of the common template takes as long as on the rank where it is longest, and
at least as long as its gathers; on a CPU, which gathers by computing, as long as both. Copies to host memory
overlap with computing.
"""

from collections.abc import Sequence
from typing import NamedTuple

from chunkflow.planning.balance import NODE
from chunkflow.planning.chunks import Group
from chunkflow.planning.cost import Cost
from chunkflow.planning.memory import StageSizes
from chunkflow.planning.pipeline_transfers import Program
from chunkflow.planning.planner import Plan, PlanSettings, tokens_and_pairs
from chunkflow.planning.schedule import DUMMY, Action, Kind

# The parts of a step's time, for people.
TIMES = (
    "forward",
    "forward once more",
    "backward",
    "K/V of shared sequences",
    "waiting for other ranks, messages and parameters",
    "parameters gathered and gradients reduced once a step",
    "optimizer",
)


LOSS_ALONE = 0.4  # of the head's time with gradients: one of three products, and the softmax


class Pass(NamedTuple):
    """Seconds that a forward or a backward takes; a backward's FLOPs are counted as its forward's."""

    linear: float  # of a FLOP in products with weights
    attention: float  # of a FLOP in attention
    layer: float  # of each layer, however short the chunk
    prefix: float = 0.0  # of an element of the prefix's K/V, which are read, or whose gradients are added to

    def seconds(self, linear: float, attention: float, layers: float, prefix: float = 0.0) -> float:
        """Of so many FLOPs of each kind, so many layers, and elements of the prefix's K/V in all of them."""
        return self.linear * linear + self.attention * attention + self.layer * layers + self.prefix * prefix


class Rates(NamedTuple):
    """What a device does in a second."""

    forward: Pass
    backward: Pass
    head: float  # seconds of a FLOP of the head's forward, with the loss and its gradients
    gather: float  # bytes from ranks of its own node, while parameters or K/V are gathered
    network: float  # the same from other nodes
    host: float  # bytes between device and host memory
    memory: float  # bytes that the optimizer reads and writes
    latency: float = 0.0  # seconds of a collective, or of a message, however short
    overlaps: bool = True  # whether ranks compute while parameters move

    def moving(self, nbytes: float, ranks: int, collectives: float) -> float:
        """Seconds in which so many ranks gather `nbytes`, or reduce them, in so many collectives."""
        if ranks == 1:
            return 0.0
        speed = self.gather if ranks <= NODE else self.network
        return nbytes * (ranks - 1) / ranks / speed + collectives * self.latency


class StepTime:
    """The time of plans made with `settings`. `sizes`: each pipeline rank's stages, by number."""

    def __init__(self, settings: PlanSettings, sizes: Sequence[dict[int, StageSizes]], rates: Rates):
        self.settings, self.rates = settings, rates
        self.sizes = sizes
        self.stages = {number: stage for of_rank in sizes for number, stage in of_rank.items()}
        self.costs: Sequence[Cost] = settings.stages or (settings.cost,)

    def action(self, action: Action, groups: Sequence[Group]) -> float:
        """Seconds of an action of a replica with these groups, without waits."""
        return self._computing(action, groups) + self._sharing(action, groups)

    def _computing(self, action: Action, groups: Sequence[Group]) -> float:
        kind, rates, stage = action.kind, self.rates, self.stages[action.stage]
        cost, layout, layers = self.costs[action.stage], stage.layout, stage.layers
        dependent, chunk_tokens, pairs, before = False, 1.0, 1.0, 0
        group = None if action.group == DUMMY else groups[action.group]
        if group is not None:
            chunk_tokens, pairs = tokens_and_pairs(group, action.chunk)
            dependent, before = group.has_state, _before(group, action.chunk)
        attention, prefix = pairs * cost.per_pair, before * layers * stage.kv_elements
        head = 2.0 * stage.dim * stage.vocab * chunk_tokens if stage.last else 0.0
        body = chunk_tokens * cost.per_token - head
        kept = layout.keep_attention != "none" and dependent  # attention is computed once
        # The last layer's is made when the chunk is computed again; before, only its K/V.
        again = attention / layers if kept and stage.last and layers else 0.0 if kept else attention
        if kind is Kind.FORWARD_STATE:
            share = (layers - 1) / layers if stage.last and layers else 1.0
            seconds = rates.forward.seconds(*(share * work for work in (body, attention, layers, prefix)))
        elif kind is Kind.RECOMPUTE:
            seconds = rates.forward.seconds(body, again, layers, 0.0 if kept else prefix)
        elif kind is Kind.BACKWARD:
            # One product of two is half of a backward, whose FLOPs are counted as its forward's.
            frozen = max(0.0, cost.frozen_per_token * chunk_tokens - head)
            seconds = rates.backward.seconds(body - frozen / 2, attention, layers, prefix)
            if layout.checkpoint_every:
                share = stage.checkpointed_layers / layers if layers else 0.0
                seen = (0.0, layers, 0.0) if kept else (attention, layers, prefix)
                seconds += share * rates.forward.seconds(body, *seen)
        else:
            seconds = rates.forward.seconds(body, attention, layers, prefix)
        if head and kind not in (Kind.FORWARD_STATE, Kind.BACKWARD):
            seconds += self._loss(action, group, stage) * head
        return max(seconds, self._copied(action, group, stage) / rates.host if dependent else 0.0)

    def _loss(self, action: Action, group: Group | None, stage: StageSizes) -> float:
        """Seconds of a FLOP of the head. Gradients of the loss come from the logits of its forward if the
        backward is the next action; else backward computes them again, which is counted here as well."""
        loss, gradients = LOSS_ALONE * self.rates.head, self.rates.head
        if not stage.head_gradient:  # two of its three products
            gradients *= 2 / 3
        if action.kind is Kind.EVALUATE:
            return loss
        next_one = action.kind is Kind.RECOMPUTE or group is None or action.chunk == len(group.chunks) - 1
        return gradients if next_one else loss + gradients

    def _copied(self, action: Action, group: Group, stage: StageSizes) -> float:
        """Bytes between device and host memory while a chunk of a long sequence is computed."""
        layout, moved = stage.layout, 0.0
        chunk, before = group.chunks[action.chunk], _before(group, action.chunk)
        if layout.kv_offload != "none":
            moved += (before + chunk.tokens) * stage.layers * stage.kv_of_layer
            if action.kind is Kind.BACKWARD:  # gradients of the prefix come and go
                moved += 2 * before * stage.layers * stage.kv_gradient_of_layer
        discarded = action.kind in (Kind.FORWARD_STATE, Kind.RECOMPUTE)
        if layout.keep_attention == "host" and (discarded or layout.checkpoint_every):
            again = action.kind is Kind.BACKWARD and not layout.checkpoint_every
            moved += 0 if again else stage.kept_attention(chunk.tokens)
        return moved

    def _sharing(self, action: Action, groups: Sequence[Group]) -> float:
        """Seconds in which K/V of a chunk that ranks share are gathered, or their gradients sent back."""
        spread = None if action.group == DUMMY else groups[action.group].spread
        if spread is None:
            return 0.0
        stage = self.stages[action.stage]
        tokens, collectives = spread.ends[action.chunk] * stage.layers, stage.layers  # the chunk's own
        if spread.start(action.chunk):
            collectives *= 2
        moved = tokens * stage.kv_of_layer
        if action.kind is Kind.BACKWARD:
            moved, collectives = moved + tokens * stage.kv_gradient_of_layer, 2 * collectives
        return self.rates.moving(moved, len(spread.replicas), collectives)

    def step(self, plan: Plan) -> float:
        """Seconds of the whole step, of the replicas whose programs the plan has."""
        return sum(self.parts(plan).values())

    def parts(self, plan: Plan) -> dict[str, float]:
        """Seconds of the step by TIMES: of the replica whose ranks compute most, their mean."""
        once = max((self._once(stages) for stages in self.sizes), key=sum)
        passes = [plan.forward_programs, plan.programs] if plan.forward_programs else [plan.programs]
        actions = sum(self._pass(programs, plan.groups) for programs in passes)
        of_replicas = [
            self._by_kind(
                plan.groups[number], [entries for programs in passes for entries in programs[number]]
            )
            for number in plan.programs
        ]
        parts = max(of_replicas, key=lambda parts: sum(parts.values()))
        waiting = max(0.0, actions - sum(parts.values()))  # sums may be rounded otherwise
        return parts | dict(zip(TIMES[4:], (waiting, *once)))

    def _pass(self, programs: dict[int, list[Program]], groups: Sequence[Sequence[Group]]) -> float:
        """Seconds of the programs of these replicas; `groups`: of all."""
        if self.settings.lockstep:
            return self._lockstep([(own[0], groups[number]) for number, own in programs.items()])
        return max(self.replica(own, groups[number]) for number, own in programs.items())

    def _by_kind(self, groups: Sequence[Group], programs: Sequence[Program]) -> dict[str, float]:
        """Of the first four of TIMES, the mean of a replica's ranks. `programs`: all that they run."""
        parts, ranks = dict.fromkeys(TIMES[:4], 0.0), len(self.sizes)
        names = {Kind.RECOMPUTE: TIMES[1], Kind.BACKWARD: TIMES[2]}
        for entry in (entry for program in programs for entry in program if isinstance(entry, Action)):
            parts[names.get(entry.kind, TIMES[0])] += self._computing(entry, groups) / ranks
            parts[TIMES[3]] += self._sharing(entry, groups) / ranks
        return parts

    def replica(self, programs: Sequence[Program], groups: Sequence[Group]) -> float:
        """Seconds in which the ranks of a replica run their programs, each action when its input is there."""
        actions = [[entry for entry in entries if isinstance(entry, Action)] for entries in programs]
        if len(actions) == 1:
            return sum(self.action(action, groups) for action in actions[0])
        ended: dict[tuple[bool, int, int, int], float] = {}  # (backward, stage, group, chunk) -> arrival
        free, done, last = [0.0] * len(actions), [0] * len(actions), len(self.stages) - 1
        moved = True
        while moved:
            moved = False
            for rank, of_rank in enumerate(actions):
                while done[rank] < len(of_rank):
                    action = of_rank[done[rank]]
                    kind, group, chunk, stage = action
                    backward = kind is Kind.BACKWARD
                    first = kind is Kind.RECOMPUTE or stage == (last if backward else 0)
                    source = (backward, stage + 1 if backward else stage - 1, group, chunk)
                    if not first and source not in ended:
                        break
                    start = max(free[rank], 0.0 if first else ended[source])
                    free[rank] = start + self.action(action, groups)
                    if kind is not Kind.RECOMPUTE:
                        tokens = 1 if group == DUMMY else groups[group].chunks[chunk].tokens
                        message = tokens * self.stages[stage].hidden_bytes / self.rates.gather
                        ended[backward, stage, group, chunk] = free[rank] + message + self.rates.latency
                    done[rank] += 1
                    moved = True
        return max(free)

    def _lockstep(self, programs: list[tuple[Program, Sequence[Group]]]) -> float:
        """All slots of the common template: in each, layers are gathered while the one before computes, and a
        backward's gradients are reduced."""
        (stage,), rates = self.stages.values(), self.rates
        moved = stage.layers * stage.layer_gathered, stage.layers * stage.layer_reduced
        gathers, reduces = (rates.moving(each, stage.layout.shards, stage.layers) for each in moved)
        seconds = 0.0
        for slot in zip(*(program for program, _ in programs)):
            longest = max(self.action(action, groups) for action, (_, groups) in zip(slot, programs))
            moving = gathers + (reduces if slot[0].kind is Kind.BACKWARD else 0.0)
            if rates.overlaps:  # but for the first layer's
                seconds += max(longest, moving) + moving / max(stage.layers, 1)
            else:
                seconds += longest + moving
        return seconds

    def _once(self, stages: dict[int, StageSizes]) -> tuple[float, float]:
        """Seconds of a rank once a step: of what is gathered and reduced once, not overlapped, and of the
        optimizer, which reads and writes its state, parameters and gradients."""
        gathering = updating = 0.0
        gathers = 2 if self.settings.forward_first else 1  # for forwards alone once more
        for stage in stages.values():
            layout, layers = stage.layout, 0 if stage.layout.reshard else stage.layers
            moved = gathers * stage.root_gathered + stage.root_reduced
            moved += layers * (gathers * stage.layer_gathered + stage.layer_reduced)
            gathering += self.rates.moving(moved, layout.shards, (gathers + 1) * (layers + 1))
            updated = 2 * (stage.parameters + stage.optimizer) + stage.gradients
            updating += updated / (self.rates.host if layout.offload else self.rates.memory)
        return gathering, updating


def _before(group: Group, chunk: int) -> int:
    """Tokens of the sequence before a chunk of the group."""
    if group.spread is not None:
        return group.spread.start(chunk)
    return chunk * group.chunks[0].tokens  # all but the last are equally long
