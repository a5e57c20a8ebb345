"""Host memory of one rank at its peak, by part, calculated from a plan. No torch."""

from collections.abc import Sequence

from chunkflow.planning.chunks import Group
from chunkflow.planning.memory import StageSizes
from chunkflow.planning.pipeline_transfers import Transfer
from chunkflow.planning.schedule import DUMMY, Action, Kind

HOST_PARTS = {  # in host memory
    "shards": "parameters, gradients and optimizer",
    "kv": "K/V of groups under way",
    "kv_gradients": "their gradients, fp32",
    "kept_attention": "attention's results of discarded chunks",
}


def host_parts(
    stages: dict[int, StageSizes], groups: Sequence[Group], entries: Sequence[Action | Transfer], pinned: bool
) -> dict[str, int]:
    """Bytes of each part of HOST_PARTS at the moment of the step when their sum is largest, arguments as of
    `peak_parts`. `pinned`: each tensor is rounded up to a power of two, as PyTorch pins memory."""
    now = dict.fromkeys(HOST_PARTS, 0)
    for stage in stages.values():
        if stage.layout.offload:
            now["shards"] += stage.parameters + stage.optimizer + stage.gradients
    layout = next(iter(stages.values())).layout
    keeps, kv = layout.keep_attention == "host", layout.kv_offload == "host"
    peak, most = dict(now), sum(now.values())
    if not keeps and not kv:
        return peak

    def rounded(amount: int) -> int:
        return 1 << (amount - 1).bit_length() if pinned and amount else amount

    seen: set[tuple[int, int]] = set()  # (stage, group) that have K/V, or had
    for entry in entries:
        group = None if entry.group == DUMMY else groups[entry.group]
        if group is None or isinstance(entry, Transfer) or not group.has_state:
            continue
        stage, key, chunk = stages[entry.stage], (entry.stage, entry.group), group.chunks[entry.chunk]
        prefix = group.tokens - group.chunks[-1].tokens
        of_kv = stage.layers * rounded(group.tokens * stage.kv_of_layer) if kv else 0
        of_gradients = stage.layers * rounded(prefix * stage.kv_gradient_of_layer) if kv else 0
        stays = stage.kept_attention(chunk.tokens, stage.checkpointed_layers) if keeps else 0
        if key not in seen:
            seen.add(key)
            now["kv"] += of_kv
        if entry.kind is Kind.BACKWARD:
            if entry.chunk == len(group.chunks) - 1:
                now["kv_gradients"] += of_gradients
        elif entry.kind is Kind.FORWARD_STATE:
            now["kept_attention"] += stage.kept_attention(chunk.tokens) if keeps else 0
        elif entry.kind is Kind.RECOMPUTE:
            now["kept_attention"] += stays - (stage.kept_attention(chunk.tokens) if keeps else 0)
        else:
            now["kept_attention"] += stays
        if sum(now.values()) > most:
            peak, most = dict(now), sum(now.values())
        if entry.kind is Kind.BACKWARD:
            now["kept_attention"] -= stays
            if entry.chunk == 0:
                now["kv"] -= of_kv
                now["kv_gradients"] -= of_gradients
    return peak
