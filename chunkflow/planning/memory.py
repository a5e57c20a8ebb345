"""Peak memory of one rank, by part, calculated from the model's sizes, the layout and a plan. No torch.

Counted is what PyTorch allocates in a step on CUDA: FSDP2's shards, gathered parameters and gradients, what
autograd keeps, K/V state, and the largest temporaries of backward; and by itself, in `cuda_bytes`, what CUDA
adds to that. Not counted: fragmentation, and what torch.compile would save. Tests compare the parts with what
PyTorch holds on a CPU; no GPU has confirmed the whole.
"""

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from math import prod
from typing import NamedTuple

from chunkflow.planning.balance import block_sizes
from chunkflow.planning.chunks import Chunk, Group, Segment, Spread
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
    "kept_attention": "attention's results of discarded chunks",
    "logits": "logits, their and the head's gradient",
    "temporaries": "temporaries of a layer's backward",
}

HEAD_BLOCK_TOKENS = 8192  # whose gradients of logits the loss holds at once, in the compute dtype


class Layout(NamedTuple):
    """How a run stores its numbers, in bytes an element, and where."""

    stored: int = 4  # parameters, their gradients' shards, optimizer state
    compute: int = 2
    reduce: int = 4  # gradients while they are summed, over chunks and ranks
    shards: int = 1
    replicated: int = 1  # copies of the shards (HSDP)
    reshard: bool = False  # after each forward (ZeRO-3)
    eight_bit: bool = False  # AdamW8bit
    offload: bool = False  # shards and optimizer live in host memory
    checkpoint_every: int = 0  # every n-th layer keeps its input only; 0: none
    recompute_cheap: bool = False  # results of norms and of the gate are not kept
    slice_tokens: int = 512  # of the head's logits
    block_tokens: int = HEAD_BLOCK_TOKENS
    sends_in_flight: int = 0  # messages between pipeline ranks that may wait for the other end
    kv_offload: str = "none"  # "host": K/V of chunks not in use live in host memory
    keep_attention: str = "none"  # "device", "host": where discarded chunks keep attention's results


def _moment_8bit(elements: int) -> int:
    """Bytes of torchao's: one an element, a scale for each 256, a table of 256 values; fp32 if small or
    ragged."""
    if elements < 4096 or elements % 256:
        return 4 * elements
    return elements + 4 * (elements // 256) + 4 * 256


class StageSizes:
    """Bytes that one stage (or the whole model) holds. `args`: the model's ModelArgs; `shapes`: of the
    stage's parameters, by name; `frozen`: the names of those that are not trained, stored in the compute
    dtype, since only low-rank adapters are."""

    def __init__(
        self, args, shapes: dict[str, Sequence[int]], layout: Layout, frozen: Collection[str] = frozenset()
    ):
        self.layout = layout
        # FSDP2 has a group for each layer; all other parameters belong to the root.
        layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
        root_shapes = {name: shape for name, shape in shapes.items() if not name.startswith("layers.")}
        prefix = f"layers.{min(layers)}." if layers else None  # layers are all alike
        layer_shapes = {name: shape for name, shape in shapes.items() if prefix and name.startswith(prefix)}
        self.layers = len(layers)
        root, layer = (
            sum(prod(shape) for name, shape in group.items() if name not in frozen)
            for group in (root_shapes, layer_shapes)
        )

        # Parameters are sharded by rows, rounded up; what is gathered is all shards.
        def shard(shape: Sequence[int]) -> int:
            return -(-shape[0] // layout.shards) * prod(shape[1:])

        sizes = [shard(shape) for name, shape in shapes.items() if name not in frozen]
        self.gradients = sum(sizes) * layout.stored
        self.parameters = self.gradients + sum(shard(shapes[name]) for name in frozen) * layout.compute
        moments = sum(map(_moment_8bit, sizes)) if layout.eight_bit else self.gradients
        self.optimizer = 2 * moments + 4 * len(sizes)  # and a step count each

        alone = layout.shards == layout.replicated == 1 and not layout.offload
        # "never" keeps everything gathered, and sums the gradients of all chunks unsharded, until the step's
        # last backward. ZeRO-3 does that with the root's; it gathers the layer in use while the next one
        # arrives, and reduces a layer's gradients at once.
        # Frozen ones of one rank are used where they are.
        self.root_gathered, self.layer_gathered = (
            sum(shard(shape) for name, shape in group.items() if name not in (frozen if alone else ()))
            * layout.shards
            * layout.compute
            for group in (root_shapes, layer_shapes)
        )
        self.gathered = self.root_gathered + (2 if layout.reshard else self.layers) * self.layer_gathered
        self.accumulated = (root + (0 if layout.reshard else self.layers * layer)) * layout.reduce
        self.layer_gradient, self.layer_reduced = layer * layout.compute, layer * layout.reduce
        self.root_gradient, self.root_reduced = root * layout.compute, root * layout.reduce

        self.compute, self.wide = layout.compute, max(4, layout.compute)  # wide: in at least fp32
        self.dim, self.hidden, self.vocab = args.dim, args.hidden_dim, args.vocab_size
        self.heads, self.kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        self.queries, self.keys = self.heads * self.head_dim, self.kv_heads * self.head_dim  # of a token
        self.first = "tok_embeddings.weight" in shapes
        self.last = "norm.weight" in shapes
        self.head_norms = any(name.endswith("q_norm.weight") for name in shapes)
        self.head_gradient = 0 if "output.weight" in frozen or not self.last else self.vocab * self.dim
        if self.last and "tok_embeddings.weight" in frozen and args.tied_embeddings:
            self.head_gradient = 0
        # What the inputs of layers with weights are kept for: weights that are trained, or adapters.
        self.adapters = [name.split(".")[-3] for name in layer_shapes if name.endswith("lora_a.weight")]
        self.rank = sum(shape[0] for name, shape in layer_shapes.items() if name.endswith("lora_a.weight"))
        self.keeps = {
            group: not frozen or any(name in self.adapters for name in group.split())
            for group in ("wq wk wv", "w1 w3", "w2")
        }
        self.hidden_bytes = self.dim * self.compute  # of a token's hidden state
        self.kv_elements = 2 * self.keys  # of a token in a layer
        self.kv_of_layer, self.kv_gradient_of_layer = (
            self.kv_elements * size for size in (self.compute, self.wide)
        )

    def layer_activations(self, tokens: int, standalone: bool, checkpointed: bool = False) -> int:
        """Bytes that autograd keeps of one layer's forward, its input included."""
        if checkpointed:
            return tokens * self.hidden_bytes
        # Inputs of both norms; queries and attention's result; of the feed-forward the two products.
        elements = 2 * self.dim + 2 * self.queries + 2 * self.hidden + self.rank
        statistics = self.heads  # log-sum-exp of each head
        if not self.layout.recompute_cheap:  # results of norms, and their factors; silu, and its product
            elements += (self.keeps["wq wk wv"] + self.keeps["w1 w3"]) * self.dim
            elements += (1 + self.keeps["w2"]) * self.hidden
            statistics += 2
        if self.head_norms:  # their inputs
            elements += self.queries + self.keys
            statistics += self.heads + self.kv_heads
        if standalone:  # otherwise they are in the group's K/V state
            elements += 2 * self.keys
        return tokens * (elements * self.compute + statistics * self.wide)

    def activations(self, tokens: int, standalone: bool) -> int:
        """Bytes that autograd keeps of a chunk's forward, without the input from another stage."""
        checkpointed = self.checkpointed_layers
        kept = (self.layers - checkpointed) * self.layer_activations(tokens, standalone)
        kept += checkpointed * self.layer_activations(tokens, standalone, checkpointed=True)
        kept += tokens * self.head_dim * self.wide  # cosines and sines, for all layers
        if self.first:
            kept += tokens * 8  # token ids
        else:
            kept -= tokens * self.hidden_bytes
        if self.last:  # the last norm's input, result and factor; labels and log-sum-exp of the loss
            kept += tokens * (2 * self.hidden_bytes + 2 * self.wide + 8)
        return kept

    def kept_attention(self, tokens: int, layers: int | None = None) -> int:
        """Bytes that a chunk keeps with `keep_attention`: output and log-sum-exp of attention in so many
        layers; None: in those of FORWARD_STATE, all but the model's last."""
        layers = self.layers - self.last if layers is None else layers
        return layers * tokens * (self.queries * self.compute + self.heads * self.wide)

    @property
    def checkpointed_layers(self) -> int:
        """Layers that keep their input only."""
        return len(range(0, self.layers, self.layout.checkpoint_every)) if self.layout.checkpoint_every else 0

    def head_temporaries(self, tokens: int) -> int:
        """The most bytes in the loss's backward: a block's gradients of logits, with either a slice's logits
        and log-probabilities or the gradient of the head; the gradients of hidden states."""
        if not self.last:
            return 0
        block = min(tokens, self.layout.block_tokens)
        slices = 2 * min(block, self.layout.slice_tokens) * self.vocab * self.wide
        dlogits, gradient = block * self.vocab * self.compute, self.head_gradient * self.compute
        if tokens == block:
            most = dlogits + max(slices, gradient)
        else:  # several blocks add up in at least fp32; the sum is narrowed at last
            summed = self.head_gradient * self.wide
            most = summed + max(dlogits + slices, gradient if self.compute < self.wide else 0)
        return tokens * self.hidden_bytes + most

    def layer_temporaries(self, chunk: Chunk, standalone: bool, gathered: int = 0) -> int:
        """The most bytes that one layer's backward holds beyond what its forward kept.

        `gathered`: tokens up to the chunk's end if ranks share it. Their K/V are gathered, and gradients of
        them summed and sent on.

        Either in the feed-forward (two gradients of its width, two of the model's), or in attention, when
        half of what the forward kept is freed: flash attention sums the gradient of queries in fp32, and with
        grouped-query heads makes K/V gradients for every query head, of the prefix too.
        """
        cheap = self.layout.recompute_cheap
        tokens, compute, queries, keys = chunk.tokens, self.compute, self.queries, self.keys
        # What is not kept, silu of the first product, is made again, and there is no result to free.
        feed_forward = tokens * ((4 if cheap else 2) * self.hidden + 2 * self.dim) * compute
        attention = (tokens + 128 * len(chunk.segments)) * (queries + self.heads) * 4
        attention += tokens * 2 * queries * compute
        seen = gathered or chunk.prefix + tokens
        attention += seen * 2 * (keys + (queries if queries > keys else 0)) * compute
        attention += gathered * 2 * keys * (compute + self.wide)
        attention -= tokens * ((2 if cheap else 4) * self.hidden + self.dim) * compute
        recomputed = self.layer_activations(tokens, standalone) if self.layout.checkpoint_every else 0
        return recomputed + max(feed_forward, attention)


def communicators(pipeline_ranks: int, replicated: int, shards: int, spread_over: int) -> int:
    """The most NCCL communicators that one rank takes part in: of all ranks, of each dimension of the mesh
    that is neither 1 nor all ranks, of each pair with a neighbour in the pipeline, and of each block of
    replicas (at most `spread_over` of them) that may share a sequence."""
    sizes = (pipeline_ranks, replicated, shards)
    ranks = prod(sizes)
    groups = (ranks > 1) + sum(1 < size < ranks for size in sizes)
    return groups + min(pipeline_ranks - 1, 2) + len(block_sizes(replicated * shards, spread_over)) - 1


WINDOWS = 2  # layers whose K/V, and their gradients, are on the device, if all live in host memory
FRAGMENTATION = 0.08  # of what PyTorch counts: what its allocator holds and cannot use again
CUDA_CONTEXT = 600 << 20  # bytes of a process: context, cuBLAS's workspaces
COMMUNICATOR = 512 << 20  # bytes of NCCL's buffers


def cuda_bytes(stages: Iterable[StageSizes], communicators: int) -> int:
    """What CUDA adds to what PyTorch counts: the process's context, NCCL's communicators, and FSDP2's buffer
    of the largest group, which its own stream allocates and nothing else can use."""
    largest = max(
        max(s.root_gathered, s.gathered - s.root_gathered if s.layout.reshard else 0) for s in stages
    )
    return CUDA_CONTEXT + communicators * COMMUNICATOR + largest


def kv_tokens(
    stages: dict[int, StageSizes], count: int, k: int, chunk_size: int, longest: int, budget: int
) -> int:
    """Of a sequence, the most tokens whose K/V and gradients a rank can hold beside all else, if it shares a
    sequence of `longest` tokens with others. `stages`: this rank's of `count`. At least a chunk; `longest`
    if it has the head only, and no layers."""
    start = max(0, longest - chunk_size)
    live = {number: k + count - 1 - number for number in stages}
    chunks = [Chunk((Segment(0, start, chunk_size),))] * (1 + max(live.values()))
    group = Group(tuple(chunks), Spread(range(1), 0, (longest,) * len(chunks)))
    actions = []
    for stage, count in live.items():  # one more is recomputed, when gradients have begun to add up
        actions += [Action(Kind.FORWARD, 0, chunk, stage) for chunk in range(1, 1 + count)]
        actions += [Action(Kind.BACKWARD, 0, count, stage), Action(Kind.RECOMPUTE, 0, 0, stage)]
        actions += [Action(Kind.BACKWARD, 0, chunk, stage) for chunk in reversed(range(count))]
    parts = peak_parts(stages, [group], actions)
    beside = sum(amount for part, amount in parts.items() if part not in ("kv", "kv_gradients"))
    # Of what lives in host memory the device has two layers' at a time.
    layers = {
        n: min(s.layers, WINDOWS) if s.layout.kv_offload == "host" else s.layers for n, s in stages.items()
    }
    each = sum(layers[n] * (s.kv_of_layer + s.kv_gradient_of_layer) for n, s in stages.items())
    return max(chunk_size, (budget - beside) // each) if each else longest


class _KeptAttention(NamedTuple):
    """What the chunks of long sequences keep on the device, with `keep_attention` = `where`."""

    where: str

    def made(self, kind: Kind, stage: StageSizes, tokens: int) -> int:
        """Bytes that a forward of this kind adds."""
        if kind is Kind.FORWARD_STATE:
            return stage.kept_attention(tokens) if self.where == "device" else 0
        if kind is Kind.RECOMPUTE and self.where == "device":  # the last layer's, if it is to be kept
            return self.of_checkpointed(stage, tokens) - self._stays(stage, tokens)
        return self.of_checkpointed(stage, tokens)

    def taken(self, stage: StageSizes, tokens: int) -> int:
        """Bytes that RECOMPUTE takes: they are among its activations."""
        if self.where != "device":
            return 0
        return stage.kept_attention(tokens) - self._stays(stage, tokens)

    def of_checkpointed(self, stage: StageSizes, tokens: int) -> int:
        """Bytes until the backward, in which layers that keep their input only are run again."""
        return stage.kept_attention(tokens, stage.checkpointed_layers) if self.where == "device" else 0

    def _stays(self, stage: StageSizes, tokens: int) -> int:
        """Of what FORWARD_STATE kept, what stays until the backward."""
        both = min(stage.checkpointed_layers, stage.layers - stage.last)
        return stage.kept_attention(tokens, both)


def with_kv_offload(sizes: Sequence[dict[int, StageSizes]], where: str) -> list[dict[int, StageSizes]]:
    """The stages of each pipeline rank, with `Layout.kv_offload` = `where`."""

    def changed(stage: StageSizes) -> StageSizes:
        if stage.layout.kv_offload == where:
            return stage
        other = copy.copy(stage)
        other.layout = stage.layout._replace(kv_offload=where)
        return other

    return [{number: changed(stage) for number, stage in of_rank.items()} for of_rank in sizes]


def peak_parts(
    stages: dict[int, StageSizes], groups: Sequence[Group], entries: Sequence[Action | Transfer]
) -> dict[str, int]:
    """Bytes of each part of PARTS at the moment of the step when their sum is largest, on a rank that holds
    `stages` (by number) and runs `entries` (its actions or program) in order. Of dummies nothing counts but
    that under ZeRO-3 their backward reduces other ranks' gradients to shards."""
    now = dict.fromkeys(PARTS, 0)
    # Neighbours in a pipeline pass hidden states of up to a chunk; those on their way count all the time.
    longest = max((chunk.tokens for group in groups for chunk in group.chunks), default=0)
    for stage in stages.values():
        now["gathered_parameters"] += stage.gathered
        for part in () if stage.layout.offload else ("parameters", "optimizer"):
            now[part] += getattr(stage, part)
        now["stage_inputs"] += stage.layout.sends_in_flight * longest * stage.hidden_bytes
    peak, most = dict(now), sum(now.values())

    def moment(**more: int) -> None:
        nonlocal peak, most
        if (total := sum(now.values()) + sum(more.values())) > most:
            peak, most = {part: amount + more.get(part, 0) for part, amount in now.items()}, total

    actions = [entry for entry in entries if isinstance(entry, Action) and entry.group != DUMMY]
    backwards = Counter(action.stage for action in actions if action.kind is Kind.BACKWARD)
    remaining = Counter(backwards)
    gradient_tokens: dict[tuple[int, int], int] = {}  # (stage, group) -> tokens with K/V gradients
    some = next(iter(stages.values()))
    keeps = _KeptAttention(some.layout.keep_attention)
    if keeps.where == "host":  # two layers' on their way back, one's on its way out
        now["kept_attention"] += some.kept_attention(longest, 3)
    held: dict[str, dict[tuple[int, int], int]] = {"kv": {}, "kv_gradients": {}}  # of (stage, group): bytes

    def hold(part: str, key: tuple[int, int], amount: int) -> None:
        held[part][key] = held[part].get(key, 0) + amount
        # Of what lives in host memory the device has windows of the group at hand only.
        now[part] = (max if some.layout.kv_offload == "host" else sum)(held[part].values())

    sharded: set[int] = set()  # stages whose gradients are shards, too

    def reduced(number: int) -> None:
        if number not in sharded and not stages[number].layout.offload:
            now["gradients"] += stages[number].gradients
        sharded.add(number)

    for entry in entries:
        if entry.group == DUMMY:
            if isinstance(entry, Action) and entry.kind is Kind.BACKWARD and some.layout.reshard:
                reduced(entry.stage)
            continue
        group, chunk = groups[entry.group], groups[entry.group].chunks[entry.chunk]
        tokens, standalone = chunk.tokens, len(group.chunks) == 1 and group.spread is None
        if isinstance(entry, Transfer):
            if not entry.send:
                now["stage_inputs"] += tokens * next(iter(stages.values())).hidden_bytes
                moment()
            continue
        number = entry.stage
        stage = stages[number]
        kept = stage.activations(tokens, standalone)
        on_device = min(stage.layers, WINDOWS) if stage.layout.kv_offload == "host" else stage.layers
        kv, kv_gradient = on_device * stage.kv_of_layer, on_device * stage.kv_gradient_of_layer
        output = 0 if stage.last else tokens * stage.hidden_bytes  # kept until its gradient has come
        if entry.kind is not Kind.BACKWARD:
            if not standalone and (number, entry.group) not in gradient_tokens:
                hold("kv", (number, entry.group), kv * group.tokens)
                gradient_tokens[number, entry.group] = 0
            if entry.kind is not Kind.FORWARD_STATE:
                now["activations"] += kept
                now["stage_inputs"] += output
            if not standalone:
                now["kept_attention"] += keeps.made(entry.kind, stage, tokens)
            moment()
            if entry.kind is Kind.RECOMPUTE:
                now["kept_attention"] -= keeps.taken(stage, tokens)
            continue

        # Backward: first the head, then each layer, which frees activations and makes K/V gradients of the
        # prefix; at the end of the last one the root group's reduction.
        first = remaining[number] == backwards[number]
        remaining[number] -= 1
        reduces = stage.layout.reshard or not remaining[number]
        # K/V gradients of the last chunk's prefix, from the group's first backward to its last.
        before = gradient_tokens.get((number, entry.group), 0)
        if not before:
            new = sum(earlier.tokens for earlier in group.chunks[: entry.chunk])
        else:
            new = 0 if entry.chunk else -before
        layer = stage.layer_gradient + (stage.layer_reduced if reduces else 0)
        head = stage.head_gradient * stage.layout.compute
        gathered = group.spread.ends[entry.chunk] if group.spread else 0
        in_layer = {
            "temporaries": stage.layer_temporaries(chunk, standalone, gathered),
            "unsharded_gradients": layer + head,
        }
        moment(logits=stage.head_temporaries(tokens))
        sent_back = 0 if stage.first else tokens * stage.hidden_bytes  # the gradient, as large as the input
        now["stage_inputs"] += sent_back
        if stage.layers:
            moment(kv_gradients=max(0, new) * stage.kv_gradient_of_layer, **in_layer)
        if stage.layout.reshard:
            reduced(number)
        if first:  # it makes what the others add to
            now["unsharded_gradients"] += stage.accumulated
        now["activations"] -= kept
        hold("kv_gradients", (number, entry.group), new * kv_gradient)
        if not stage.layout.reshard and not remaining[number]:
            # All is reduced now: shards appear, and of the layers before this one the sums have been freed.
            reduced(number)
            in_layer["unsharded_gradients"] -= max(0, stage.layers - 1) * stage.layer_reduced
        if stage.layers:
            checkpointed = bool(stage.layout.checkpoint_every)
            moment(activations=stage.layer_activations(tokens, standalone, checkpointed), **in_layer)
        if remaining[number]:
            moment(unsharded_gradients=stage.root_gradient)
        else:  # it is reduced; the layers' sums and gathered parameters have been freed
            root = stage.root_gradient + stage.root_reduced - (stage.accumulated - stage.root_reduced)
            moment(unsharded_gradients=root, gathered_parameters=stage.root_gathered - stage.gathered)
        now["stage_inputs"] -= 2 * output + 2 * sent_back
        if standalone:
            continue
        now["kept_attention"] -= keeps.of_checkpointed(stage, tokens)
        gradient_tokens[number, entry.group] = before + new
        if entry.chunk == 0:
            hold("kv", (number, entry.group), -kv * group.tokens)
            for amounts in held.values():
                del amounts[number, entry.group]
            del gradient_tokens[number, entry.group]
    return peak
