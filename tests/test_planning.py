"""Plans are data: construction, balance, schedules and templates, without torch."""

import math
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.planning.balance import assign
from chunkflow.planning.chunks import build_groups, whole_sequences
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import DUMMY, Action, Kind, linear_schedule, lockstep
from tests.helpers.reference import live_chunks

pytestmark = pytest.mark.quick

QWEN_7B = SimpleNamespace(
    dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, hidden_dim=18944, vocab_size=152064
)
COST = Cost.of_model(QWEN_7B)


def test_planning_imports_no_torch():
    program = "import sys, chunkflow.planning.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@pytest.mark.parametrize("seed", range(200))
def test_every_token_once_and_in_order(seed):
    rng = random.Random(seed)
    chunk_size, fill_tails = rng.randint(1, 50), rng.random() < 0.5
    lengths = [rng.randint(1, rng.choice([chunk_size, 5 * chunk_size])) for _ in range(rng.randint(1, 60))]
    groups = build_groups(lengths, chunk_size, fill_tails)
    covered = [[] for _ in lengths]
    for group in groups:
        for index, chunk in enumerate(group.chunks):
            assert 0 < chunk.tokens <= chunk_size
            assert chunk.prefix == index * chunk_size, "chunks of a sequence in order, all but the last full"
            neighbours = chunk.segments[1:]
            assert all(s.start == 0 and s.length == lengths[s.sequence] for s in neighbours), (
                "neighbours are whole"
            )
            if len(group.chunks) > 1:
                assert not neighbours or (fill_tails and index == len(group.chunks) - 1), (
                    "only a tail has neighbours"
                )
            for s in chunk.segments:
                covered[s.sequence] += range(s.start, s.start + s.length)
    assert all(tokens == list(range(length)) for tokens, length in zip(covered, lengths))
    assert [g.tokens for g in groups] == sorted((g.tokens for g in groups), reverse=True), (
        "longest group first"
    )


def test_packing_beats_neither_heuristic_and_known_cases():
    def chunks(lengths, size, fill=True):
        return sum(len(g.chunks) for g in build_groups(lengths, size, fill))

    assert chunks([4, 4, 4, 3, 3, 3], 7) == 3
    assert chunks([5, 3, 2], 8) == 2
    assert chunks([9, 7], 8) == 2 and chunks([9, 7], 8, fill=False) == 3, "a tail of 1 takes the 7 in"
    assert chunks([1] * 16, 8) == 2
    for seed in range(300):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 12))]
        assert chunks(lengths, 30) <= math.ceil(11 / 9 * math.ceil(sum(lengths) / 30)) + sum(
            2 * x > 30 for x in lengths
        )


@pytest.mark.parametrize("mix", ["lmsys", "llama3_sft"])
def test_at_most_one_percent_more_chunks_than_tokens_need(mix):
    lengths = synthetic_lengths(mix, 256 * 40, 0)
    for start in range(0, len(lengths), 256):
        batch = lengths[start : start + 256]
        count = sum(len(g.chunks) for g in build_groups(batch, 2048))
        assert count <= 1.01 * math.ceil(sum(batch) / 2048) + 1


def test_the_schedule_of_a_group():
    kinds = "".join(f"{action.kind.value}{action.chunk}" for action in linear_schedule([4], 2))
    assert kinds == "S0S1F2F3B3B2R1B1R0B0"
    assert linear_schedule([1, 1], 1) == [Action(Kind(kind), group, 0) for group in (0, 1) for kind in "FB"]


def check_actions(actions, counts, k):
    """Each chunk: forward, forward again if it was discarded, backward; backwards descending; at most k
    alive."""
    assert live_chunks(actions) <= k
    for group, count in enumerate(counts):
        own = [action for action in actions if action.group == group]
        assert [a.chunk for a in own if a.kind is Kind.BACKWARD] == list(reversed(range(count)))
        first = [a for a in own if a.kind in (Kind.FORWARD, Kind.FORWARD_STATE)]
        assert [a.chunk for a in first] == list(range(count))
        for a in first:
            ready = own.index(a)
            if a.kind is Kind.FORWARD_STATE:
                ready = own.index(Action(Kind.RECOMPUTE, group, a.chunk), ready)
            assert own.index(Action(Kind.BACKWARD, group, a.chunk)) > ready
        assert (
            sum(a.kind is Kind.RECOMPUTE for a in own)
            == max(0, count - k)
            == sum(a.kind is Kind.FORWARD_STATE for a in own)
        )


@pytest.mark.parametrize("seed", range(150))
def test_lockstep_templates(seed):
    rng = random.Random(seed)
    ranks, k = rng.choice([1, 2, 3, 8]), rng.choice([1, 1, 2, 4, 100])
    counts = [[rng.choice([1, 1, 1, 1, 2, 5]) for _ in range(rng.randint(0, 7))] for _ in range(ranks)]
    actions = lockstep(counts, k)
    assert len({len(own) for own in actions}) == 1
    for slot in zip(*actions):
        assert len({action.kind is Kind.BACKWARD for action in slot}) == 1, "one kind of slot on all ranks"
    for own, chunks in zip(actions, counts):
        check_actions(own, chunks, k)
        pending = 0
        for action in own:
            if action.group == DUMMY:
                pending += 1 if action.kind is Kind.FORWARD else -1
                assert pending >= 0
    if k == 1:
        backwards = max(map(sum, counts))
        recomputed = max(sum(count - 1 for count in chunks) for chunks in counts)
        assert len(actions[0]) == 2 * backwards + recomputed, "the lower bound"
    else:
        assert (
            len(actions[0])
            <= 2 * max(map(sum, counts)) + sum(max(0, n - 1) for c in counts for n in c) + 2 * k * ranks
        )


@pytest.mark.parametrize("seed", range(150))
def test_lockstep_templates_hold_the_kv_of_so_many_tokens(seed):
    rng = random.Random(seed)
    ranks, k, limit = rng.choice([1, 2, 8]), rng.choice([1, 2, 4]), rng.choice([1, 30, 60, 10_000])
    tokens = [
        sorted((rng.choice([3, 9, 25, 50]) for _ in range(rng.randint(0, 9))), reverse=True)
        for _ in range(ranks)
    ]
    counts = [[-(-count // 10) for count in own] for own in tokens]
    for own, chunks, lengths in zip(lockstep(counts, k, None, tokens, limit), counts, tokens):
        check_actions(own, chunks, k)
        held = set()
        for action in own:
            if action.group != DUMMY and chunks[action.group] > 1:
                ended = action.kind is Kind.BACKWARD and action.chunk == 0
                (held.discard if ended else held.add)(action.group)
                assert sum(lengths[group] for group in held) <= max(limit, max(lengths))


@pytest.mark.parametrize("spread_over", [1, 8])
@pytest.mark.parametrize("limit", [40_000, 160_000])
def test_a_step_in_lockstep_holds_what_a_rank_can(limit, spread_over):
    """Of 512 agent trajectories eight ranks have 64 each: the K/V of all would be of 2.6 million tokens."""
    lengths = [min(length, 131072) for length in synthetic_lengths("agent", 512, 0)]
    settings = PlanSettings(COST, replicas=8, chunk_size=4096, lockstep=True, spread_over=spread_over)
    plan = plan_step(lengths, settings._replace(kv_tokens=limit))
    held = max(max(simulation.peak_kv_tokens) for simulation in plan.simulations.values())
    assert held <= (limit if spread_over > 1 else max(limit, max(lengths)))


@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_slowest_rank_is_within_2_percent_of_the_bound(ranks):
    for seed in range(20):
        lengths = synthetic_lengths("lmsys", 256, seed)
        costs = [COST.chunked_training(length, 2048, 1) for length in lengths]
        mean = sum(costs) / ranks
        slowest = mean * (1 + plan_step(lengths, PlanSettings(COST, replicas=ranks)).imbalance_percent / 100)
        assert slowest <= 1.02 * max(mean, max(costs))
        members = assign(lengths, lambda length, _: COST.chunked_training(length, 2048, 1), ranks).whole
        assert sorted(index for own in members for index in own) == list(range(256)), (
            "no sample is lost or moved"
        )


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("lock", [False, True])
def test_plans(seed, lock):
    rng = random.Random(seed)
    ranks, k = rng.randint(1, 9), rng.randint(1, 3)
    lengths = [rng.randint(1, 200) for _ in range(rng.randint(1, 40))]
    enable = rng.random() < 0.8
    balance = rng.choice(["cost", "tokens"])
    settings = PlanSettings(
        COST, replicas=ranks, enable=enable, chunk_size=50, k=k, balance=balance, lockstep=lock
    )
    plan = plan_step(lengths, settings)
    assert plan == plan_step(list(lengths), settings), "the same on every rank"
    sizes = Counter()
    everyone = [program for (program,) in plan.programs.values()]
    for groups, actions in zip(plan.groups, everyone):
        check_actions(actions, [len(group.chunks) for group in groups], k)
        assert any(action.kind is Kind.BACKWARD for action in actions), "every rank reduces gradients"
        for group in groups:
            for chunk in group.chunks:
                for s in chunk.segments:
                    sizes[s.sequence] += s.length
    assert [sizes[index] for index in range(len(lengths))] == lengths
    assert plan.chunks == sum(len(group.chunks) for groups in plan.groups for group in groups)
    assert plan.recomputed_chunks == sum(a.kind is Kind.RECOMPUTE for actions in everyone for a in actions)
    if enable:
        assert plan.padding_percent == pytest.approx(100 * (1 - sum(lengths) / (plan.chunks * 50)))


def test_cost_counts_each_sequence_s_own_attention():
    # a sequence in two parts costs what it costs whole
    assert COST.forward(700) + COST.forward(300, prefix=700) == pytest.approx(COST.forward(1000))
    assert COST.training(5000) == 3 * COST.forward(5000)
    assert COST.chunked_training(5000, 2048, 1) == COST.training(5000) + COST.forward(4096)
    assert COST.chunked_training(5000, 2048, 3) == COST.training(5000)
    # 2 FLOPs for each weight of a matrix: Qwen2.5-7B has 7.07e9 of them
    assert COST.per_token == pytest.approx(2 * 7.07e9, rel=0.001)
    assert len(whole_sequences([5, 7])) == 2
