"""The pipeline's part of a plan: stages of even cost, each replica's program, and the process that plans in
the background."""

import random
import subprocess
import sys
from itertools import product

import pytest

from chunkflow.planning.background import PlanProcess
from chunkflow.planning.balance import split_layers
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import DUMMY, Action, Kind
from models import families

pytestmark = pytest.mark.quick

STAGES = (Cost(2.0, 0.01), Cost(3.0, 0.02), Cost(2.0, 0.01), Cost(4.0, 0.01))


def settings(replicas=2, **changes):
    stages = {"stages": STAGES, "pipeline_ranks": 2}
    return PlanSettings(Cost(11.0, 0.05), replicas, chunk_size=50, **(stages | changes))


@pytest.mark.parametrize("head", [0.0, 0.7, 3.4, 9.0, 40.0])
def test_layers_are_split_so_that_the_costliest_stage_is_as_cheap_as_can_be(head):
    for layers, stages in ((4, 2), (7, 3), (8, 4), (9, 4), (5, 1)):
        counts = split_layers(layers, head, stages)
        assert sum(counts) == layers and len(counts) == stages and (stages == 1 or min(counts[:-1]) >= 1)
        splits = (
            c
            for c in product(range(layers + 1), repeat=stages)
            if sum(c) == layers and (stages == 1 or min(c[:-1]) >= 1)
        )
        assert max([*counts[:-1], counts[-1] + head]) == min(max([*c[:-1], c[-1] + head]) for c in splits)


def test_a_large_vocabulary_leaves_the_last_stage_fewer_layers():
    args = families["qwen2"].flavors["0.5B"]
    whole = Cost.of_model(args)
    head = Cost.of_layers(args, 0, head=True)
    assert head.per_pair == 0 and head.per_token == 2 * args.dim * args.vocab_size
    parts = [Cost.of_layers(args, 7, head=False), Cost.of_layers(args, 17, head=True)]
    assert [sum(column) for column in zip(*parts)] == pytest.approx(whole)


@pytest.mark.parametrize("enable", [True, False])
def test_each_replica_has_a_program_for_its_own_groups(enable):
    rng = random.Random(0)
    for replicas in (1, 2, 3):
        lengths = [rng.choice([20, 45, 130, 260]) for _ in range(rng.randint(1, 12))]
        everyone = plan_step(lengths, settings(replicas, enable=enable, k=2))
        assert list(everyone.programs) == list(everyone.simulations) == list(range(replicas))
        for replica in range(replicas):
            plan = plan_step(lengths, settings(replicas, enable=enable, k=2), [replica])
            assert plan.programs == {replica: everyone.programs[replica]}
            counts = [len(group.chunks) for group in plan.groups[replica]] or [1]  # without groups, a dummy
            chunks = sum(counts)
            for rank, program in enumerate(plan.programs[replica]):
                backwards = [e for e in program if isinstance(e, Action) and e.kind is Kind.BACKWARD]
                assert len(backwards) == 2 * chunks
                assert {action.stage for action in backwards} == {rank, rank + 2}
                assert plan.groups[replica] or {entry.group for entry in program} == {DUMMY}
            assert 0 < plan.simulations[replica].bubble < 1
            one_stage = plan_step(
                lengths, settings(replicas, enable=enable, k=2, stages=(), pipeline_ranks=1)
            )
            same = {"programs": {}, "simulations": {}}
            assert plan._replace(**same) == one_stage._replace(**same)


def test_the_plan_process_makes_the_same_plan_and_tells_what_went_wrong():
    lengths = [130, 260, 20, 45, 50, 50, 7]
    background = PlanProcess(settings(), replica=1)
    for _ in range(2):
        assert background(lengths) == plan_step(lengths, settings(), [1])
    with pytest.raises(ValueError):
        background([])
    assert background([5]).chunks == 1, "it goes on after an error"
    background.process.stdin.close()
    assert background.process.wait(10) == 0, "it ends with the process that asks"


def test_the_plan_process_imports_no_torch():
    code = "import sys, chunkflow.planning.background; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
