"""Pipeline schedules: the paper's figures, every check on random plans, and that the checks catch what they
are for."""

import random
import time

import pytest

from chunkflow.planning.pipeline_schedule import (
    Costs,
    equal_stages,
    list_schedule,
    live_limit,
    lower_bound,
    paper_schedule,
    play,
    state_aware_schedule,
)
from chunkflow.planning.pipeline_transfers import Transfer, add_transfers, check_schedule
from chunkflow.planning.schedule import Action, Kind

pytestmark = pytest.mark.quick

EIGHT = [[1] * 8] * 8


def makespan(schedule, costs):
    return max(own[-1].end for own in play([[actions] for actions in schedule], costs))


def random_plan(generator):
    """(costs, k, ranks): up to 10 groups on up to 6 ranks of up to 3 stages, often fewer chunks than
    stages."""
    ranks, virtual, k = generator.randint(1, 6), generator.choice([1, 1, 1, 2, 3]), generator.randint(1, 4)
    counts = [generator.choice([1, 1, 1, 2, 3, 6]) for _ in range(generator.randint(1, 10))]
    costs = equal_stages(
        [[generator.choice([0.5, 1, 1.7, 2]) for _ in range(count)] for count in counts], ranks * virtual
    )
    if generator.random() < 0.3:  # stages that differ
        scales = [generator.uniform(0.5, 1.5) for _ in range(ranks * virtual)]
        forward = [[[scale * cost for cost in group] for group in costs.forward[0]] for scale in scales]
        costs = Costs(forward, costs.backward)
    return costs, k, ranks


def checked_program(schedule, costs, k):
    program = add_transfers(schedule, costs)
    check_schedule(program, [len(group) for group in costs.forward[0]], k, len(costs.forward))
    return program


@pytest.mark.parametrize(
    "forward, stages, k, paper, ours",
    [
        ([[2]] * 4, 4, 1, 42, 42),
        ([[4], [4]], 4, 1, 60, 60),
        ([[2], [2], [2, 2]], 4, 2, 46, 42),
        ([[2], [2], [2, 2]], 4, 1, 48, 44),
        ([[4], [2], [1], [1]], 4, 1, 56, None),
        ([[4], [1], [2], [1]], 4, 1, 56, None),
        (EIGHT, 8, 1, 367, 269),
        (EIGHT, 8, 2, None, 261),
        (EIGHT, 8, 4, 343, 245),
    ],
)
def test_golden_makespans(forward, stages, k, paper, ours):
    costs = equal_stages(forward, stages)
    if paper is not None:
        schedule = paper_schedule(costs, k, stages)
        checked_program(schedule, costs, k)
        assert makespan(schedule, costs) == paper
    if ours is not None:
        schedule = state_aware_schedule(costs, k, stages)
        checked_program(schedule, costs, k)
        assert makespan(schedule, costs) == ours == lower_bound(costs, k, stages)


def test_a_thousand_random_plans_pass_all_checks():
    generator = random.Random(0)
    for _ in range(1000):
        costs, k, ranks = random_plan(generator)
        schedule = state_aware_schedule(costs, k, ranks)
        checked_program(schedule, costs, k)
        assert makespan(schedule, costs) >= lower_bound(costs, k, ranks) * (1 - 1e-9)


def test_every_candidate_is_a_right_schedule_and_knows_its_makespan():
    generator = random.Random(1)
    for _ in range(100):
        costs, k, ranks = random_plan(generator)
        order = list(range(len(costs.forward[0])))
        generator.shuffle(order)
        for alternate in (True, False):
            expected, schedule = list_schedule(order, costs, k, ranks, alternate)
            checked_program(schedule, costs, k)
            assert makespan(schedule, costs) == expected
        checked_program(paper_schedule(costs, k, ranks), costs, k)


def test_interleaving_reaches_its_shorter_bound_on_equal_chunks():
    for virtual in (1, 2, 4):
        costs = equal_stages([[4 / virtual]] * 16, 4 * virtual)
        schedule = state_aware_schedule(costs, 1, 4)
        checked_program(schedule, costs, 1)
        # 16 chunks of 12, and on the way to the last rank and back three stages of 12 / virtual
        assert makespan(schedule, costs) == 16 * 12 + 3 * 12 / virtual
        for rank, actions in enumerate(schedule):
            assert {action.stage for action in actions} == set(range(rank, 4 * virtual, 4))


def test_several_stages_on_one_rank_need_no_transfer():
    costs = equal_stages([[1, 1, 1], [1]], 3)
    (entries,) = checked_program(state_aware_schedule(costs, 1, 1), costs, 1)
    assert all(isinstance(entry, Action) for entry in entries)
    assert len(entries) == 3 * (4 + 2 + 4)


def test_look_ahead_of_forward_state_is_not_bounded_by_live_chunks():
    costs = equal_stages([[1]] * 4 + [[1] * 8], 4)
    _, schedule = list_schedule(range(5), costs, 1, 4, alternate=True)
    kinds = "".join(action.kind.value for action in schedule[0])
    # Four live chunks are all that stage 0 may hold; the first gradient arrives at 10, until then it stores
    # K/V.
    assert kinds.startswith("FFFF" + "SSSSSS" + "B")


def test_recompute_starts_before_the_gradient_is_received():
    costs = equal_stages([[1, 1, 1]], 4)
    program = checked_program(state_aware_schedule(costs, 1, 4), costs, 1)
    for rank in range(3):
        recompute = program[rank].index(Action(Kind.RECOMPUTE, 0, 1, rank))
        gradient = program[rank].index(Transfer(False, Kind.BACKWARD, 0, 1, rank + 1, rank + 1))
        assert recompute < gradient


def test_no_plan_needs_a_larger_live_limit_and_long_groups_reach_it():
    costs = equal_stages([[1] * 4, [1] * 4, *[[1]] * 8], 4)
    program = add_transfers(state_aware_schedule(costs, 2, 4), costs)
    assert [live_limit(2, 4, stage) for stage in range(4)] == [5, 4, 3, 2]
    check_schedule(program, [4, 4] + [1] * 8, 2, 4)
    with pytest.raises(ValueError, match=r"of group .* makes \d chunks hold activations; at most \d may"):
        check_schedule(program, [4, 4] + [1] * 8, 1, 4)


# What the checks are for. One program, and one mutation each.


@pytest.fixture(params=[1, 2], ids=["1F1B", "interleaved"])
def plan(request):
    """(program, chunks per group, k, stages) of 3 ranks, right."""
    costs = equal_stages([[1, 1, 1], [1], [1, 1]], 3 * request.param)
    program = add_transfers(state_aware_schedule(costs, 1, 3), costs)
    return program, [3, 1, 2], 1, 3 * request.param


def entries_of(program, kind):
    """(rank, index) of every Transfer, or every Action."""
    return [(r, i) for r, own in enumerate(program) for i, entry in enumerate(own) if isinstance(entry, kind)]


def swap(entries, one, other):
    entries[one], entries[other] = entries[other], entries[one]


def test_a_dropped_entry_is_caught(plan):
    program, *rest = plan
    check_schedule(program, *rest)
    for rank, entries in enumerate(program):
        for index in range(len(entries)):
            mutated = [list(own) for own in program]
            del mutated[rank][index]
            with pytest.raises(ValueError, match="of group"):
                check_schedule(mutated, *rest)
    assert program[0][-1].kind is Kind.BACKWARD
    with pytest.raises(ValueError, match="BACKWARD of group .* is missing"):
        check_schedule([program[0][:-1], *program[1:]], *rest)


def test_a_doubled_entry_is_caught(plan):
    program, *rest = plan
    for rank, entries in enumerate(program):
        for index in range(len(entries)):
            mutated = [list(own) for own in program]
            mutated[rank].insert(index, entries[index])
            with pytest.raises(ValueError, match="of group"):
                check_schedule(mutated, *rest)


def test_swapped_actions_of_one_group_and_stage_are_caught(plan):
    program, *rest = plan
    places = entries_of(program, Action)
    swapped = 0
    for rank, one in places:
        for other in (i for r, i in places if r == rank and i > one):
            a, b = program[rank][one], program[rank][other]
            # a recompute may move, as long as its chunk's forward and backward stay around it
            if (a.group, a.stage) != (b.group, b.stage) or (
                Kind.RECOMPUTE in (a.kind, b.kind) and a.chunk != b.chunk
            ):
                continue
            mutated = [list(own) for own in program]
            swap(mutated[rank], one, other)
            with pytest.raises(ValueError, match="of group"):
                check_schedule(mutated, *rest)
            swapped += 1
    assert swapped > 50


def test_swapped_transfers_on_one_end_are_caught(plan):
    program, *rest = plan
    places = entries_of(program, Transfer)
    swapped = 0
    for rank, one in places:
        for other in (i for r, i in places if r == rank and i > one):
            if program[rank][one].peer == program[rank][other].peer:
                mutated = [list(own) for own in program]
                swap(mutated[rank], one, other)
                with pytest.raises(ValueError, match="of group"):
                    check_schedule(mutated, *rest)
                swapped += 1
    assert swapped > 50


def test_an_action_before_its_input_and_a_send_before_its_action_are_caught(plan):
    program, *rest = plan
    for rank, entries in enumerate(program):
        for index, entry in enumerate(entries):
            if isinstance(entry, Action):
                continue
            gradient = entry.made_by is Kind.BACKWARD
            stage = entry.stage if entry.send else entry.stage + (-1 if gradient else 1)
            (action,) = (
                place
                for place, other in enumerate(entries)
                if isinstance(other, Action)
                and (other.group, other.chunk, other.stage) == (entry.group, entry.chunk, stage)
                and other.kind in ((Kind.BACKWARD,) if gradient else (Kind.FORWARD, Kind.FORWARD_STATE))
            )
            mutated = [list(own) for own in program]
            mutated[rank].insert(
                action, mutated[rank].pop(index)
            )  # before the action if it was behind, and the reverse
            message = (
                "finds nothing to send"
                if entry.send
                else "finds no gradient"
                if gradient
                else "finds no input"
            )
            with pytest.raises(ValueError, match=message):
                check_schedule(mutated, *rest)


def test_receives_that_swap_data_silently_are_caught():
    costs = equal_stages([[1], [1], [1]], 2)
    program = add_transfers(state_aware_schedule(costs, 1, 2), costs)
    # both chunks arrive before either is needed, so that only the order on the two ends tells
    sends = [i for i, entry in enumerate(program[0]) if isinstance(entry, Transfer) and entry.send][:2]
    receives = [i for i, entry in enumerate(program[1]) if isinstance(entry, Transfer) and not entry.send][:2]
    program[1].insert(receives[0], program[1].pop(receives[1]))
    with pytest.raises(ValueError, match=r"receive of the FORWARD .* meets the send of the FORWARD"):
        check_schedule(program, [1, 1, 1], 1, 2)
    swap(program[0], *sends)
    with pytest.raises(ValueError, match="finds nothing to send"):
        check_schedule(program, [1, 1, 1], 1, 2)


def test_a_ring_of_waiting_ranks_is_caught_though_each_rank_and_each_pair_is_right():
    """Rank 0 receives the first chunk back from rank 2 before it has sent it to rank 1."""
    costs = equal_stages([[1], [1], [1]], 6)
    program = add_transfers(state_aware_schedule(costs, 1, 3), costs)
    check_schedule(program, [1, 1, 1], 1, 6)
    receive = Transfer(False, Kind.FORWARD, 0, 0, 2, 2)
    program[0].remove(receive)
    program[0].insert(0, receive)
    with pytest.raises(
        ValueError, match="deadlock: rank 0 .* the receive of the FORWARD of group 0, chunk 0, stage 2"
    ):
        check_schedule(program, [1, 1, 1], 1, 6)


def test_an_action_on_the_wrong_rank_or_of_no_chunk_is_caught(plan):
    program, *rest = plan
    for change, message in (
        ({"stage": 1}, "no stage of this rank"),
        ({"chunk": 7}, "no chunk"),
        ({"group": 3}, "no chunk"),
    ):
        mutated = [list(own) for own in program]
        mutated[0][0] = mutated[0][0]._replace(**change)
        with pytest.raises(ValueError, match=message):
            check_schedule(mutated, *rest)


def test_playing_a_schedule_that_cannot_go_on_names_the_action():
    costs = equal_stages([[1], [1]], 2)
    schedule = state_aware_schedule(costs, 1, 2)
    schedule[0].remove(Action(Kind.FORWARD, 1, 0, 0))
    with pytest.raises(
        ValueError, match="deadlock: rank 0 .* the input of BACKWARD of group 1, chunk 0, stage 0"
    ):
        play([[actions] for actions in schedule], costs)


def test_planning_a_large_step_takes_no_longer_than_it_grows():
    """1,024 chunks on 16 stages against 256: with the square of their number it would take 16 times as long."""

    def seconds(times):
        costs = equal_stages([[1.0] * 64] * times + [[1.0] * 8] * 4 * times + [[1.0]] * 32 * times, 16)
        assert sum(map(len, costs.forward[0])) == 128 * times
        took = []
        for _ in range(3):
            start = time.process_time()
            list_schedule(range(37 * times), costs, 1, 16, alternate=True)
            took.append(time.process_time() - start)
        return min(took)

    assert seconds(8) < 8 * seconds(2)
