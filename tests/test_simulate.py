"""The simulator: the paper's figures through the command, what it writes, and how near random steps come to
the bound."""

import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from chunkflow.planning.chunks import build_groups
from chunkflow.planning.pipeline_schedule import (
    Costs,
    equal_stages,
    lower_bound,
    paper_schedule,
    state_aware_schedule,
)
from chunkflow.planning.schedule import Action, Kind
from chunkflow.planning.simulate import chrome_trace, in_given_order, main, picture, simulate

pytestmark = pytest.mark.quick

EXAMPLE = "--stages 4 --lengths 1,1,2,4 --chunk-size 2"
EIGHT = "--stages 8 --lengths 8,8,8,8,8,8,8,8 --chunk-size 1"
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "pipeline.py"


def command(line, capsys):
    main([*line.split(), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "line, makespan, bubble",
    [
        ("--stages 4 --lengths 2,2,2,2 --schedule 1f1b", 42, 42.86),
        ("--stages 4 --lengths 2,2,2,2 --chunk-size 2", 42, 42.86),
        ("--stages 4 --lengths 4,2,1,1 --schedule 1f1b", 56, 57.14),
        ("--stages 4 --lengths 4,1,2,1 --schedule 1f1b --k 3 --chunk-size 2", 56, 57.14),
        ("--stages 4 --lengths 1,1,2,4 --chunk-size 4", 60, 60.0),
        (f"{EXAMPLE} --schedule paper --k 2", 46, 47.83),
        (f"{EXAMPLE} --schedule paper --k 1", 48, 50.0),
        (f"{EXAMPLE} --k 2", 42, 42.86),
        (f"{EXAMPLE} --k 1", 44, 45.45),
        (f"{EIGHT} --schedule paper --k 1", 367, None),
        (f"{EIGHT} --schedule paper --k 4", 343, None),
        (f"{EIGHT} --k 1", 269, None),
        (f"{EIGHT} --k 2", 261, None),
        (f"{EIGHT} --k 4", 245, None),
    ],
)
def test_golden_figures(line, makespan, bubble, capsys):
    result = command(line, capsys)
    assert result["makespan"] == makespan
    if bubble is not None:
        assert round(100 * result["bubble"], 2) == bubble
    if "--schedule" not in line:
        assert result["bound"] == makespan


def test_the_command_as_documented():
    line = [sys.executable, "-m", "chunkflow.planning.simulate", *f"{EXAMPLE} --k 2 --json".split()]
    done = subprocess.run(line, capture_output=True, text=True, cwd=BENCHMARK.parents[1], check=True)
    assert json.loads(done.stdout) == {
        "chunks": 4,
        "makespan": 42,
        "bound": 42,
        "bubble": pytest.approx(3 / 7),
        "idle": pytest.approx(3 / 7),
        "peak_kept_chunks": [4, 4, 3, 2],
        "peak_kv_tokens": [4, 4, 4, 4],
    }


def test_recomputation_is_work_but_not_useful_work(capsys):
    result = command(f"{EXAMPLE} --k 1", capsys)
    assert result["bubble"] == pytest.approx(1 - 24 / 44)
    assert result["idle"] == pytest.approx(1 - 26 / 44)


def test_tails_are_filled_unless_told_otherwise(capsys):
    line = "--stages 2 --lengths 3,1 --chunk-size 2"
    assert command(line, capsys)["chunks"] == 2
    assert command(f"{line} --no-fill-tails", capsys)["chunks"] == 3


def test_virtual_stages_share_a_rank_and_its_work(capsys):
    line = "--stages 4 --lengths 4,4,4,4,4,4,4,4 --chunk-size 4"
    plain, interleaved = command(line, capsys), command(f"{line} --virtual 2", capsys)
    assert plain["makespan"] == 8 * 12 + 3 * 12
    assert interleaved["makespan"] == interleaved["bound"] == 8 * 12 + 3 * 6
    assert interleaved["bubble"] == pytest.approx(1 - 96 / 114)
    assert len(interleaved["peak_kept_chunks"]) == 4
    for schedule in ("1f1b", "paper"):
        other = command(f"{line} --virtual 2 --schedule {schedule}", capsys)
        assert interleaved["makespan"] <= other["makespan"] < plain["makespan"]
    thirds = command("--stages 2 --lengths 1,1 --chunk-size 1 --virtual 3", capsys)
    assert thirds["makespan"] == 7  # not 7.000000000000001


def test_human_readable_output(capsys):
    main(f"{EXAMPLE} --k 1".split())
    out = capsys.readouterr().out
    assert "makespan 44 (lower bound 44)" in out and "bubble 45.45%" in out


@pytest.mark.parametrize(
    "line, words",
    [
        ("--stages 0 --lengths 1", "--stages: '0' is not a whole number of at least 1"),
        ("--stages 4 --lengths 1,,2", "--lengths: '1,,2' is not a list"),
        ("--stages 4 --lengths 1,-2", "--lengths: '1,-2' is not a list"),
        ("--stages 4 --lengths 0", "--lengths: '0' is not a list"),
        ("--stages 4", "required: --lengths"),
        ("--stages 4 --lengths 1 --k 1.5", "--k: '1.5' is not a whole number"),
        ("--stages 4 --lengths 1 --chunk-size x", "--chunk-size: 'x' is not a whole number"),
        ("--stages 4 --lengths 1 --schedule gpipe", "'gpipe' (choose from"),
        ("--stages 4 --lengths 1 --seed 3", "--seed"),
        ("--stages 4 --lengths 1 --trace no/such/folder/x.json", "no/such/folder/x.json cannot be written"),
        ("--stages 4 --lengths 1 --picture x.nothing", "x.nothing does not end in a format"),
    ],
)
def test_wrong_input_is_one_sentence(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_trace_and_picture_files(tmp_path, capsys):
    main(f"{EXAMPLE} --k 1 --trace {tmp_path}/t.json --picture {tmp_path}/t.png".split())
    events = [
        event for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if event["ph"] == "X"
    ]
    assert len(events) == 4 * (4 + 4 + 1)
    assert max(event["ts"] + event["dur"] for event in events) == 44
    for rank in range(4):
        own = sorted((event["ts"], event["dur"]) for event in events if event["tid"] == rank)
        assert all(start + long <= following for (start, long), (following, _) in zip(own, own[1:]))
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_picture_shows_every_action():
    costs = equal_stages([[2, 2], [2]], 2)
    figure = picture({"paper": simulate(paper_schedule(costs, 1, 2), costs, [4, 2]).timeline})
    (axes,) = figure.axes
    assert sum(len(bars.get_paths()) for bars in axes.collections) == 2 * (3 + 3 + 1)


def test_one_stage_worked_by_hand():
    """A group of two chunks, of which one is recomputed, then a standalone chunk; backward costs given."""
    costs = Costs([[[3, 2], [1]]], [[[7, 5], [2]]])
    schedule = paper_schedule(costs, 1, 1)
    result = simulate(schedule, costs, [5, 1])
    kinds = "".join(action.kind.value for action in schedule[0])
    assert kinds == "SFBRBFB"
    assert [timed.end for timed in result.timeline[0]] == [3, 5, 10, 13, 20, 21, 23]
    assert result.makespan == 23 == lower_bound(costs, 1, 1)
    assert result.bubble == pytest.approx(3 / 23) and result.idle == 0
    assert result.peak_kept_chunks == [1] and result.peak_kv_tokens == [5]
    assert [event["name"] for event in chrome_trace({"paper": result.timeline})["traceEvents"]][1:3] == [
        "thread_name",
        "S 0.0",
    ]


def test_a_schedule_that_cannot_go_on_is_an_error():
    costs = equal_stages([[1]], 2)
    with pytest.raises(
        ValueError, match="rank 1 waits for ever for the input of FORWARD of group 0, chunk 0, stage 1"
    ):
        simulate([[], [Action(Kind.FORWARD, 0, 0, 1)]], costs, [1])


def test_random_mixes_are_within_five_percent_of_the_bound_on_average(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    benchmark = runpy.run_path(str(BENCHMARK))
    ratios, savings = [], []
    for stages in (2, 4, 8, 16):
        for mix in ("lmsys", "long_heavy"):
            for k, cost in ((1, "LINEAR"), (2, "ATTENTION"), (4, "LINEAR")):
                generator = random.Random(f"{stages} {mix} {k}")
                groups = in_given_order(build_groups(*benchmark["random_batch"](generator, benchmark[mix])))
                costs = benchmark["stage_costs"](groups, benchmark[cost], stages)
                tokens = [group.tokens for group in groups]
                ours, paper = (
                    simulate(schedule(costs, k, stages), costs, tokens).makespan
                    for schedule in (state_aware_schedule, paper_schedule)
                )
                ratios.append(ours / lower_bound(costs, k, stages))
                savings.append(1 - ours / paper)
    assert min(ratios) >= 1 - 1e-9 and sum(ratios) / len(ratios) <= 1.05
    assert sum(savings) / len(savings) > 0.05
