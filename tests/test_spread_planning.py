"""Long sequences over several replicas: slices, who shares what, and that nobody waits for ever."""

import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest

from chunkflow.data.synthetic import synthetic_lengths
from chunkflow.planning.balance import block_sizes
from chunkflow.planning.chunks import Group, spread_ends, spread_groups
from chunkflow.planning.collectives import check_meetings, check_slots
from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_transfers import Program, Transfer, describe
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import DUMMY, Action, Kind
from tests.helpers.reference import live_chunks

pytestmark = pytest.mark.quick

QWEN_7B = SimpleNamespace(
    dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, hidden_dim=18944, vocab_size=152064
)
COST = Cost.of_model(QWEN_7B)


@pytest.mark.parametrize("seed", range(100))
def test_parts_cover_a_sequence(seed):
    rng = random.Random(seed)
    replicas, chunk_size = rng.choice([2, 3, 4, 6, 8]), rng.randint(2, 40)
    length = rng.randint(replicas, 500)
    ends = spread_ends(length, chunk_size, replicas)
    if ends is None:
        assert length <= 4 * replicas * replicas * len(range(0, length, replicas * chunk_size))
        return
    assert len(ends) == -(-length // (2 * replicas * (chunk_size // 2))), "as few chunks as can be"
    first = rng.randrange(3) * replicas
    groups = spread_groups(7, length, chunk_size, range(first, first + replicas))
    covered, start = [], 0
    for index, end in enumerate(ends):
        sizes, pairs = [], []
        for member, group in enumerate(groups):
            assert group.spread.member == member
            low, high = group.chunks[index].segments
            covered += [
                *range(low.start, low.start + low.length),
                *range(high.start, high.start + high.length),
            ]
            sizes.append(low.length + high.length)
            pairs.append(sum(range(low.start + 1, low.start + low.length + 1)))
            pairs[-1] += sum(range(high.start + 1, high.start + high.length + 1))
        assert len(covered) == end and 0 < min(sizes) <= max(sizes) <= chunk_size
        assert sum(sizes) == end - start
        if index < len(ends) - 1:
            assert len(set(sizes)) == len(set(pairs)) == 1, "all have the same work"
        start = end
    assert sorted(covered) == list(range(length))


def test_block_sizes():
    assert block_sizes(8, 8) == [8, 4, 2, 1]
    assert block_sizes(8, 7) == [4, 2, 1]
    assert block_sizes(6, 6) == [6, 4, 2, 1]
    assert block_sizes(6, 5) == [4, 2, 1]
    assert block_sizes(8, 1) == block_sizes(1, 1) == [1]


def random_plan(rng: random.Random):
    replicas, k, stages = rng.choice([1, 2, 3, 4, 6, 8]), rng.randint(1, 3), rng.choice([1, 1, 1, 2, 3])
    virtual = rng.choice([1, 1, 2]) if stages > 1 else 1
    lengths = [rng.randint(1, rng.choice([20, 60, 400])) for _ in range(rng.randint(1, 20))]
    settings = PlanSettings(
        Cost(1.0, 0.01, rng.choice([0.0, 0.1])),
        replicas=replicas,
        chunk_size=rng.choice([16, 30]),
        k=k,
        balance=rng.choice(["cost", "tokens"]),
        lockstep=stages == 1 and rng.random() < 0.5,
        forward_only=rng.random() < 0.2,
        stages=(Cost(1.0, 0.01),) * (stages * virtual) if stages > 1 else (),
        pipeline_ranks=stages,
        spread_over=rng.choice([replicas, replicas, 2]),
        kv_tokens=rng.choice([0, 0, 50]),
    )
    return lengths, settings


def check_progress(programs: dict[int, list[Program]], groups: list[list[Group]]) -> None:
    """Raises ValueError unless all replicas finish together, if every message waits until its other end is
    reached and every chunk that replicas share until all of them are at it. `programs`: of all replicas."""
    places = {(replica, rank): 0 for replica, ranks in programs.items() for rank in range(len(ranks))}
    waiting = defaultdict(set)  # what is met -> who is there
    moving = list(places)
    while moving:
        place = moving.pop()
        replica, rank = place
        program = programs[replica][rank]
        while places[place] < len(program):
            entry = program[places[place]]
            if isinstance(entry, Transfer):
                ends = sorted((rank, entry.peer))
                meeting = replica, *ends, entry.made_by is Kind.BACKWARD, *entry[2:5]
                members = {(replica, end) for end in ends}
            elif entry.group != DUMMY and (spread := groups[replica][entry.group].spread):
                sequence = groups[replica][entry.group].sequence
                meeting = rank, entry.kind, sequence, entry.chunk, entry.stage
                members = {(other, rank) for other in spread.replicas}
            else:
                places[place] += 1
                continue
            waiting[meeting].add(place)
            if waiting[meeting] == members:
                del waiting[meeting]
                for member in members:
                    places[member] += 1
                moving += members - {place}
                continue
            break
    for (replica, rank), position in places.items():
        if position < len(programs[replica][rank]):
            entry = programs[replica][rank][position]
            raise ValueError(f"deadlock: replica {replica}, rank {rank} waits for ever in {describe(entry)}")


@pytest.mark.parametrize("block", range(20))
def test_random_plans_finish_and_lose_nothing(block):
    shared = 0
    for seed in range(100 * block, 100 * block + 100):
        lengths, settings = random_plan(random.Random(seed))
        plan = plan_step(lengths, settings)
        check_progress(plan.programs, plan.groups)
        tokens = Counter()
        for replica, groups in enumerate(plan.groups):
            for group in groups:
                for chunk in group.chunks:
                    assert chunk.tokens <= settings.chunk_size
                    for segment in chunk.segments:
                        tokens[segment.sequence] += segment.length
                if group.spread:
                    assert replica == group.spread.replicas[group.spread.member]
            for rank, program in enumerate(plan.programs[replica]):
                actions = [entry for entry in program if isinstance(entry, Action)]
                for stage in range(rank, len(settings.stages) or 1, settings.pipeline_ranks):
                    own = [action for action in actions if action.stage == stage]
                    limit = settings.k + (len(settings.stages) or 1) - 1 - stage
                    assert settings.forward_only or live_chunks(own) <= limit
                    if not settings.forward_only and not settings.lockstep:
                        last = own[-1]
                        assert last.group == DUMMY or groups[last.group].spread is None
        assert [tokens[index] for index in range(len(lengths))] == lengths
        assert plan.chunks == sum(len(group.chunks) for groups in plan.groups for group in groups)
        only = plan_step(lengths, settings, [settings.replicas - 1])
        assert only.programs == {settings.replicas - 1: plan.programs[settings.replicas - 1]}
        shared += plan.spread_sequences
    assert shared > 50


def test_what_the_checks_refuse():
    settings = PlanSettings(Cost(1.0, 0.01), 2, chunk_size=16, spread_over=2, lockstep=True)
    plan = plan_step([300, 20, 9], settings)
    assert plan.spread_sequences >= 1
    templates = [programs[0] for programs in plan.programs.values()]
    check_slots(templates, plan.groups)
    for replica in range(2):  # one replica runs a shared chunk a slot later
        swapped = [list(template) for template in templates]
        place = next(
            slot
            for slot, action in enumerate(swapped[replica])
            if action.group != DUMMY and plan.groups[replica][action.group].spread
        )
        swapped[replica].insert(place, Action(Kind.FORWARD, DUMMY, 99))
        swapped[1 - replica].append(Action(Kind.FORWARD, DUMMY, 99))
        with pytest.raises(ValueError, match="meets"):
            check_slots(swapped, plan.groups)
    free = plan_step([300, 20, 9], settings._replace(lockstep=False))
    groups = free.groups[0]
    with pytest.raises(ValueError, match="last backward of a stage is shared"):
        check_meetings([[a for a in free.programs[0][0] if a.group == 0]], groups, lockstep=False)
    with pytest.raises(ValueError, match="comes after"):
        check_meetings([free.programs[0][0][::-1]], groups, lockstep=False)
    other = {0: free.programs[0], 1: [free.programs[1][0][1:]]}
    with pytest.raises(ValueError, match="waits for ever"):
        check_progress(other, free.groups)


@pytest.mark.parametrize(
    ("mix", "batch", "ranks", "chunk_size", "mean", "worst"),
    [
        ("lmsys", 256, 8, 2048, 1.02, 1.12),
        ("lmsys", 256, 64, 2048, 1.02, 1.12),
        ("lmsys", 512, 512, 1024, 1.2, 1.25),
        ("llama3_sft", 256, 64, 2048, 1.02, 1.12),
    ],
)
def test_slowest_over_mean(mix, batch, ranks, chunk_size, mean, worst):
    lengths = synthetic_lengths(mix, batch * 15, 0)
    batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    settings = PlanSettings(COST, ranks, chunk_size=chunk_size, spread_over=ranks)
    ratios = [1 + plan_step(batch, settings, []).imbalance_percent / 100 for batch in batches]
    assert sum(ratios) / len(ratios) <= mean and max(ratios) <= worst
    alone = plan_step(batches[0], settings._replace(spread_over=1), [])
    assert alone.spread_sequences == 0 and alone.most_ranks_of_a_sequence == 1


def test_what_a_replica_cannot_hold_is_spread():
    settings = PlanSettings(COST, 8, chunk_size=2048, spread_over=8)
    lengths = [30_000] * 8  # even without
    assert plan_step(lengths, settings, []).spread_sequences == 0
    plan = plan_step(lengths, settings._replace(kv_tokens=8000), [])
    assert plan.spread_sequences == 8 and plan.most_ranks_of_a_sequence == 4
    assert max(group.tokens for groups in plan.groups for group in groups) <= 8000
