"""Peak memory of one rank, by part, from arithmetic: the model's sizes, the layout, the actions of a plan.
Pure Python, no torch.

Counted is what PyTorch allocates in a step on CUDA: FSDP2's shards, what it gathers and what it reduces, what
autograd keeps, K/V state, and the largest temporaries of backward. Not counted: the CUDA context, NCCL's
buffers, what the allocator cannot reuse, and what torch.compile would save. Tests compare the parts with what
PyTorch holds on a CPU; no GPU has confirmed the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from chunkflow.planning.chunks import Chunk, Group
from chunkflow.planning.pipeline_transfers import Transfer
from chunkflow.planning.schedule import DUMMY, Action, Kind

PARTS = {
    "parameters": "parameters, this rank's shard",
    "optimizer": "optimizer, its two moments",
    "gradients": "gradients, this rank's shard",
    "gathered_parameters": "parameters gathered by FSDP2",
    "unsharded_gradients": "gradients before they are reduced",
    "activations": "activations of live chunks",
    "stage_inputs": "stage inputs, outputs and messages",
    "kv": "K/V of groups under way",
    "kv_gradients": "their gradients, fp32",
    "logits": "logits of a slice, head's gradient",
    "temporaries": "temporaries of a layer's backward",
}


class Layout(NamedTuple):
    """How a run stores its numbers, in bytes an element, and where."""

    stored: int = 4  # parameters, their gradients' shards, optimizer state
    compute: int = 2
    reduce: int = 4  # gradients while they are summed, over chunks and ranks
    shards: int = 1
    reshard: bool = False  # after each forward (ZeRO-3)
    eight_bit: bool = False  # AdamW8bit
    offload: bool = False  # shards and optimizer live in host memory
    checkpoint_every: int = 0  # every n-th layer keeps its input only; 0: none
    slice_tokens: int = 512  # of the head's logits
    sends_in_flight: int = 0  # messages between pipeline ranks that may wait for the other end


def _moment_8bit(elements: int) -> int:
    """torchao's: a byte an element, a scale for each block of 256, a table of 256 values; small or ragged
    parts stay fp32."""
    return (
        elements + 4 * (elements // 256) + 4 * 256
        if elements >= 4096 and elements % 256 == 0
        else 4 * elements
    )


class StageSizes:
    """What one stage (or the whole model) holds, in bytes. `args` are a model's ModelArgs; `shapes` its
    parameters', by name."""

    def __init__(self, args, shapes: dict[str, Sequence[int]], layout: Layout):
        self.layout = layout
        groups: dict[
            str, list[Sequence[int]]
        ] = {}  # FSDP2's: one a layer; what else there is belongs to the root, ""
        for name, shape in shapes.items():
            groups.setdefault(name.split(".")[1] if name.startswith("layers.") else "", []).append(shape)
        root_shapes = groups.pop("", [])
        layer_shapes = next(iter(groups.values()), [])  # layers are all alike
        root, layer, self.layers = sum(map(prod, root_shapes)), sum(map(prod, layer_shapes)), len(groups)

        # A shard has every n-th part of a parameter's rows, rounded up; what is gathered is all shards.
        def shard(shape: Sequence[int]) -> int:
            return -(-shape[0] // layout.shards) * prod(shape[1:])

        def sharded(shapes: Iterable[Sequence[int]]) -> int:
            return sum(map(shard, shapes))

        self.parameters = self.gradients = sharded(shapes.values()) * layout.stored
        moments = sum(
            _moment_8bit(shard(shape)) if layout.eight_bit else shard(shape) * layout.stored
            for shape in shapes.values()
        )
        self.optimizer = 2 * moments + 4 * len(shapes)  # and a step count each

        # "never" keeps everything gathered, and sums the gradients of all chunks unsharded, until the step's
        # last backward. ZeRO-3 gathers the layer in use while the next one arrives, and reduces a layer's
        # gradients at once.
        self.root_gathered = sharded(root_shapes) * layout.shards * layout.compute
        layer_gathered = sharded(layer_shapes) * layout.shards * layout.compute
        self.gathered = self.root_gathered + (2 if layout.reshard else self.layers) * layer_gathered
        self.accumulated = 0 if layout.reshard else (root + self.layers * layer) * layout.reduce
        self.layer_gradient, self.layer_reduced = layer * layout.compute, layer * layout.reduce
        self.root_gradient, self.root_reduced = root * layout.compute, root * layout.reduce

        self.dim, self.hidden, self.vocab = args.dim, args.hidden_dim, args.vocab_size
        self.heads, self.kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        self.first = "tok_embeddings.weight" in shapes
        self.last = "norm.weight" in shapes
        self.head_norms = any(name.endswith("q_norm.weight") for name in shapes)
        self.hidden_bytes = args.dim * layout.compute  # of a token's hidden state
        self.kv_of_layer = 2 * args.n_kv_heads * args.head_dim * layout.compute  # of a token
        self.kv_gradient_of_layer = 2 * args.n_kv_heads * args.head_dim * max(4, layout.compute)

    def layer_activations(self, tokens: int, standalone: bool, checkpointed: bool = False) -> int:
        """What autograd keeps of one layer's forward, its input included."""
        compute, wide = self.layout.compute, max(4, self.layout.compute)
        if checkpointed:
            return tokens * self.hidden_bytes
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        # Inputs and results of both norms; queries and what attention returns; of the feed-forward the two
        # products, silu of the first, and their product.
        elements = 4 * self.dim + 2 * queries + 4 * self.hidden
        statistics = self.heads + 2  # log-sum-exp of each head; each norm's factor
        if self.head_norms:  # their inputs
            elements += queries + keys
            statistics += self.heads + self.kv_heads
        if standalone:  # otherwise they are in the group's K/V state
            elements += 2 * keys
        return tokens * (elements * compute + statistics * wide)

    def activations(self, tokens: int, standalone: bool) -> int:
        """What autograd keeps of one chunk's forward through this stage, besides its input from another
        stage."""
        every, wide = self.layout.checkpoint_every, max(4, self.layout.compute)
        checkpointed = len(range(0, self.layers, every)) if every else 0
        kept = (self.layers - checkpointed) * self.layer_activations(tokens, standalone)
        kept += checkpointed * self.layer_activations(tokens, standalone, checkpointed=True)
        kept += tokens * self.head_dim * wide  # cosines and sines, for all layers
        if self.first:
            kept += tokens * 8  # token ids
        else:
            kept -= tokens * self.hidden_bytes
        if self.last:  # the last norm's input, result and factor; labels and log-sum-exp of the loss
            kept += tokens * (2 * self.hidden_bytes + 2 * wide + 8)
        return kept

    def head_temporaries(self, tokens: int) -> int:
        """Of the loss's backward: a slice's logits and their narrow copy, the gradients of hidden states and
        of the head."""
        if not self.last:
            return 0
        compute, wide = self.layout.compute, max(4, self.layout.compute)
        rows = min(tokens, self.layout.slice_tokens)
        logits = rows * self.vocab * (wide + (compute if compute < wide else 0))
        sums = wide if tokens > rows else 0  # several slices add up in at least fp32
        return logits + tokens * self.hidden_bytes + self.vocab * self.dim * (compute + sums)

    def layer_temporaries(self, chunk: Chunk, standalone: bool) -> int:
        """The most that one layer's backward holds beyond what its forward kept.

        Either in the feed-forward (two gradients of its width, two of the model's), or in attention, where
        half of what the forward kept is gone: flash attention sums the gradient of queries in fp32, and with
        grouped-query heads makes K/V gradients for every query head, of the prefix too.
        """
        tokens, compute = chunk.tokens, self.layout.compute
        feed_forward = tokens * (2 * self.hidden + 2 * self.dim) * compute
        queries, keys, seen = self.heads * self.head_dim, self.kv_heads * self.head_dim, chunk.prefix + tokens
        attention = (tokens + 128 * len(chunk.segments)) * (
            queries + self.heads
        ) * 4 + tokens * 2 * queries * compute
        attention += seen * 2 * (keys + (queries if queries > keys else 0)) * compute
        attention -= tokens * (4 * self.hidden + self.dim) * compute
        recomputed = self.layer_activations(tokens, standalone) if self.layout.checkpoint_every else 0
        return recomputed + max(feed_forward, attention)


def fixed_parts(stages: Iterable[StageSizes]) -> dict[str, int]:
    """What is there from the first step's end on, whatever the plan; shards are in host memory with
    offloading."""
    parts = dict.fromkeys(PARTS, 0)
    for stage in stages:
        for part in ("parameters", "optimizer", "gradients"):
            parts[part] += 0 if stage.layout.offload else getattr(stage, part)
    return parts


def host_bytes(stages: Iterable[StageSizes]) -> int:
    """What offloading puts into host memory."""
    return sum(
        stage.parameters + stage.optimizer + stage.gradients for stage in stages if stage.layout.offload
    )


def peak_parts(
    stages: dict[int, StageSizes], groups: Sequence[Group], entries: Sequence[Action | Transfer]
) -> dict[str, int]:
    """Bytes of each part at the moment of the step when their sum is largest, on a rank that holds `stages`
    (by number) and runs `entries` in order: a rank's actions, or its program in a pipeline. Dummies count
    nothing."""
    now = fixed_parts(stages.values())
    for stage in stages.values():
        now["gathered_parameters"] += stage.gathered
    peak = dict(now)

    def moment(**more: int) -> None:
        nonlocal peak
        then = {part: amount + more.get(part, 0) for part, amount in now.items()}
        if sum(then.values()) > sum(peak.values()):
            peak = then

    # Neighbours in a pipeline pass hidden states of up to a chunk; those on their way count as if always
    # there.
    longest = max((chunk.tokens for group in groups for chunk in group.chunks), default=0)
    for stage in stages.values():
        now["stage_inputs"] += stage.layout.sends_in_flight * longest * stage.hidden_bytes
    backwards = {
        number: sum(entry.kind is Kind.BACKWARD for entry in actions_of(entries, number)) for number in stages
    }
    left = dict(backwards)
    gradient_tokens: dict[tuple[int, int], int] = {}  # (stage, group) -> tokens whose K/V gradients are there
    for entry in entries:
        if entry.group == DUMMY:
            continue
        group, own = groups[entry.group], groups[entry.group].chunks[entry.chunk]
        tokens, standalone = own.tokens, len(group.chunks) == 1
        if isinstance(entry, Transfer):
            if not entry.send:
                now["stage_inputs"] += tokens * next(iter(stages.values())).hidden_bytes
                moment()
            continue
        number = entry.stage
        stage = stages[number]
        kept, kv = stage.activations(tokens, standalone), stage.layers * stage.kv_of_layer
        kv_gradient = stage.layers * stage.kv_gradient_of_layer
        output = 0 if stage.last else tokens * stage.hidden_bytes  # kept until its gradient has come
        if entry.kind is not Kind.BACKWARD:
            if not standalone and (number, entry.group) not in gradient_tokens:
                now["kv"] += kv * group.tokens
                gradient_tokens[number, entry.group] = 0
            if entry.kind is not Kind.FORWARD_STATE:
                now["activations"] += kept
                now["stage_inputs"] += output
            moment()
            continue

        # Backward: first the head, then layer after layer, whose activations go while K/V gradients of the
        # prefix come; at the end what the root group reduces.
        left[number] -= 1
        reduces = stage.layout.reshard or not left[number]
        prefix, there = own.prefix, gradient_tokens.get((number, entry.group), 0)
        layer = stage.layer_gradient + (stage.layer_reduced if reduces else 0)
        head = stage.vocab * stage.dim * stage.layout.compute if stage.last else 0
        temporaries = stage.layer_temporaries(own, standalone)
        moment(logits=stage.head_temporaries(tokens))
        now["stage_inputs"] += (
            0 if stage.first else tokens * stage.hidden_bytes
        )  # the gradient that is sent back
        if stage.layers:
            one = max(0, prefix - there) * stage.kv_gradient_of_layer
            moment(temporaries=temporaries, unsharded_gradients=layer + head, kv_gradients=one)
        if left[number] + 1 == backwards[number]:  # the first one makes what the others add to
            now["unsharded_gradients"] += stage.accumulated
        now["activations"] -= kept
        now["kv_gradients"] += (prefix - there) * kv_gradient if not standalone else 0
        if stage.layers:
            own_layer = stage.layer_activations(
                tokens, standalone, checkpointed=bool(stage.layout.checkpoint_every)
            )
            moment(temporaries=temporaries, unsharded_gradients=layer + head, activations=own_layer)
        if left[number] or stage.layout.reshard:
            moment(unsharded_gradients=stage.root_gradient + (stage.root_reduced if reduces else 0))
        else:  # the layers' sums and parameters have gone
            gone = stage.accumulated - stage.root_reduced
            moment(
                unsharded_gradients=stage.root_gradient + stage.root_reduced - gone,
                gathered_parameters=stage.root_gathered - stage.gathered,
            )
        now["stage_inputs"] -= output + tokens * stage.hidden_bytes * (
            (not stage.first) + (not stage.first) + (not stage.last)
        )
        if standalone:
            continue
        gradient_tokens[number, entry.group] = prefix
        if entry.chunk == 0:
            now["kv"] -= kv * group.tokens
            del gradient_tokens[number, entry.group]
    return peak


def actions_of(entries: Iterable[Action | Transfer], stage: int) -> list[Action]:
    """The actions among `entries` on that stage, dummies aside."""
    return [e for e in entries if isinstance(e, Action) and e.group != DUMMY and e.stage == stage]
