"""What a run leaves: rows, events, the step line, across resumes and torn writes; and the device figures in
them."""

import gc
import json
import logging
import math
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import Action, Timed
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import Kind
from chunkflow.planning.simulate import picture
from chunkflow.reporting import device, metrics, rows
from chunkflow.reporting.device import peak_flops, peak_memory, reset_peak_memory
from chunkflow.reporting.metrics import MetricsLogger
from chunkflow.reporting.rows import keep_rows
from chunkflow.reporting.step_figures import RankFigures, gather_over_ranks, step_scalars
from chunkflow.reporting.timeline import gather_timeline, useful_time, write_timelines
from chunkflow.settings import options
from chunkflow.training.start import GarbageCollection, init_logger
from tests.helpers.clock import Clock

pytestmark = pytest.mark.quick


CPU = torch.device("cpu")
PLAN = plan_step(
    [5, 3, 9], PlanSettings(Cost(1.0, 0.0), chunk_size=4)
)  # 17 tokens in 5 chunks, 2 of 9's and 1 of 5's again


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: 1e9)


def build(folder, log_freq: int = 10, tensorboard: bool = True, **start) -> MetricsLogger:
    settings = options.Metrics(log_freq=log_freq, enable_tensorboard=tensorboard, disable_color_printing=True)
    return MetricsLogger(Path(folder), settings, CPU, torch.float32, **start)


def log(run: MetricsLogger, step: int, **more) -> float:
    figures = {"loss": 2.5, "max_loss": 3.0, "grad_norm": 0.5, "lr": 1e-3, "supervised_tokens": 14}
    return run.log(step, PLAN, **{**figures, **more})


def run_steps(folder, first: int, last: int, **more) -> MetricsLogger:
    run = build(folder, start_step=first - 1, **more)
    for step in range(first, last + 1):
        run.count(PLAN, 1e6, 0.0)
        if run.due(step):
            log(run, step)
    run.close()
    return run


def written(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_a_row_holds_the_contract(tmp_path):
    run_steps(tmp_path, 1, 2, log_freq=2)
    first, second = written(tmp_path)
    assert first.keys() >= {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "supervised_tokens",
        "seconds",
        "tps",
        "chunks",
        "padding_percent",
        "recomputed_chunks",
        "dp_imbalance_percent",
        "memory_gib",
    }
    assert (first["step"], second["step"]) == (1, 2)
    assert (first["tokens"], first["supervised_tokens"], first["chunks"], first["recomputed_chunks"]) == (
        17,
        14,
        5,
        3,
    )
    assert first["padding_percent"] == pytest.approx(100 * (1 - 17 / 20))
    assert second["n_tokens_seen"] == 34
    assert 0.01 < first["memory_gib"] < 100


def test_seconds_and_rates_are_of_the_interval(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    run = build(tmp_path, log_freq=3, start_step=1)
    for _step in (2, 3):  # a resumed run's first interval is shorter
        clock.now += 0.1
        run.count(PLAN._replace(tokens=100), 2e6, 0.05)
    log(run, 3)
    for _step in (4, 5, 6):
        clock.now += 0.1
        run.count(PLAN._replace(tokens=10), 1e6, 0.0)
    log(run, 6)
    run.close()
    third, sixth = written(tmp_path)
    assert third["seconds"] == pytest.approx(0.1, abs=0.01) == sixth["seconds"]
    assert third["tps"] == pytest.approx(100 / third["seconds"]) and sixth["tps"] == pytest.approx(
        10 / sixth["seconds"]
    )
    assert third["mfu_percent"] == pytest.approx(100 * 2e6 / third["seconds"] / 1e9)
    scalars = events(tmp_path / "tb")
    assert scalars.Scalars("time_metrics/data_loading(s)")[0].value == pytest.approx(0.05)
    assert scalars.Scalars("time_metrics/data_loading(%)")[0].value == pytest.approx(
        100 * 0.05 / third["seconds"], rel=1e-5
    )
    assert scalars.Scalars("time_metrics/end_to_end(s)")[1].value == pytest.approx(sixth["seconds"])


def test_step_one_and_every_log_freq_are_logged(tmp_path):
    run_steps(tmp_path, 1, 25, log_freq=10, tensorboard=False)
    assert [row["step"] for row in written(tmp_path)] == [1, 10, 20]
    assert not (tmp_path / "tb").exists()


def test_a_torn_last_line_is_cut_off(tmp_path):
    run_steps(tmp_path, 1, 3, log_freq=1, tensorboard=False)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"step": 4, "lo', b'{"step": 4}', b"\x00\x00", b'{"step": 4, "lo\n'):
        path.write_bytes(whole + torn)
        keep_rows(path, 9)
        assert path.read_bytes() == whole
    inode = path.stat().st_ino
    keep_rows(path, 9)
    assert path.stat().st_ino == inode, "a whole file is left alone"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_takes_back_rows_and_events_beyond_its_step(tmp_path):
    run_steps(tmp_path, 1, 6, log_freq=1)
    run = run_steps(tmp_path, 4, 5, log_freq=1, tokens_seen=51)
    assert [row["step"] for row in written(tmp_path)] == [1, 2, 3, 4, 5]
    assert [row["n_tokens_seen"] for row in written(tmp_path)] == [
        17,
        34,
        51,
        68,
        85,
    ] and run.tokens_seen == 85
    scalars = events(tmp_path / "tb").Scalars("loss_metrics/global_avg_loss")
    assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5]


def test_a_killed_rewrite_leaves_the_old_rows(tmp_path, monkeypatch):
    run_steps(tmp_path, 1, 3, log_freq=1, tensorboard=False)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        keep_rows(tmp_path / "metrics.jsonl", 1)
    assert len(written(tmp_path)) == 3


def test_tensorboard_has_torchtitans_tags_and_ours(tmp_path):
    run = build(tmp_path)
    run.count(PLAN, 1e6, 0.0)
    log(run, 1, scalars={"chunkflow/kv_state(GiB)": 0.25})
    run.add_figure("chunkflow/plan", Figure, 1)
    run.close()
    read = events(tmp_path / "tb")
    expected = """loss_metrics/global_avg_loss loss_metrics/global_max_loss grad_norm lr throughput(tps) tflops mfu(%) n_tokens_seen
    time_metrics/end_to_end(s) time_metrics/data_loading(s) time_metrics/data_loading(%) memory/max_active(GiB) memory/max_active(%)
    memory/max_reserved(GiB) memory/max_reserved(%) memory/num_alloc_retries memory/num_ooms chunkflow/chunks chunkflow/padding(%)
    chunkflow/dp_imbalance(%) chunkflow/kv_state(GiB)"""
    assert set(read.Tags()["scalars"]) >= set(expected.split())
    assert read.Tags()["images"] == ["chunkflow/plan"]
    assert read.Scalars("loss_metrics/global_max_loss")[0].value == 3.0
    assert read.Scalars("chunkflow/kv_state(GiB)")[0].value == 0.25


def test_values_that_json_does_not_have_are_null(tmp_path):
    run = build(tmp_path, tensorboard=False)
    run.count(PLAN, 1e6, 0.0)
    log(run, 1, loss=math.nan, grad_norm=math.inf, max_loss=-math.inf)
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["loss"] is None and row["grad_norm"] is None and row["global_max_loss"] is None


SCALARS = """chunkflow/recomputed(%) chunkflow/live_chunks_peak chunkflow/kv_state(GiB)
    chunkflow/kv_on_device(GiB) chunkflow/kept_attention(GiB) chunkflow/bad_steps
    data/longest_sequence data/epoch data/read_tokens data/dropped_tokens"""


def scalars_of(figures: list[RankFigures], replicas: int) -> dict[str, float]:
    plan = plan_step([5, 3, 9], PlanSettings(Cost(1.0, 0.0), replicas, chunk_size=4))._replace(
        template_overhead_percent=12.5
    )
    assert len(plan.groups) == replicas
    ledger = {"read": 17, "dropped": 3}
    return step_scalars(
        plan,
        figures,
        longest=9,
        epoch=1,
        ledger=ledger,
        bad_steps=2,
    )


def test_scalars_without_a_pipeline(tmp_path):
    figures = [
        RankFigures(4.0, 3.0, 5.0, 0.5, 2, 7, 0.25, 0.2, 0.125),
        RankFigures(3.0, 3.0, 5.0, 0.5, 1, 7, 0.5, 0.1, 0.75),
    ]
    scalars = scalars_of(figures, replicas=2)
    waiting = {f"chunkflow/waiting(%)/rank_{rank}": share for rank, share in enumerate((0.0, 25.0))}
    waiting["chunkflow/waiting(%)/mean"] = 12.5
    assert scalars.keys() == {*SCALARS.split(), *waiting, "chunkflow/template_overhead(%)"}
    assert scalars == scalars | waiting | {
        "chunkflow/recomputed(%)": 100 * PLAN.recomputed_chunks / PLAN.chunks,
        "chunkflow/live_chunks_peak": 2,
        "chunkflow/kv_state(GiB)": 0.5,
        "chunkflow/kept_attention(GiB)": 0.75,
        "chunkflow/kv_on_device(GiB)": 0.2,
        "chunkflow/template_overhead(%)": 12.5,
        "chunkflow/bad_steps": 2,
        "data/longest_sequence": 9,
        "data/epoch": 1,
        "data/read_tokens": 17,
        "data/dropped_tokens": 3,
    }

    run = build(tmp_path)
    run.count(PLAN, 1e6, 0.0)
    log(run, 1, scalars=scalars)
    run.close()
    read = events(tmp_path / "tb")
    assert {tag: read.Scalars(tag)[0].value for tag in scalars} == pytest.approx(scalars)


def test_scalars_of_pipeline_stages():
    """Two stages of two replicas: ranks 0 and 1 are the first stage's."""
    useful = (6.0, 8.0, 4.0, 4.0)
    figures = [
        RankFigures(1.0, seconds, 9.0, bubble, rank, 3 - rank, 0.1 * rank, 0.0)
        for rank, (seconds, bubble) in enumerate(zip(useful, (0.2, 0.4, 0.2, 0.4)))
    ]
    figures[3] = figures[3]._replace(end_seconds=10.0)
    scalars = scalars_of(figures, replicas=2)
    bubbles = [f"chunkflow/bubble(%)/{name}" for name in ("simulated", "stage_0", "stage_1")]
    assert scalars.keys() == {*SCALARS.split(), *bubbles, "chunkflow/stage_inputs_peak"}
    assert [scalars[tag] for tag in bubbles] == pytest.approx([30, 100 * (1 - 7 / 10), 100 * (1 - 4 / 10)])
    assert scalars["chunkflow/stage_inputs_peak"] == 3 and scalars["chunkflow/live_chunks_peak"] == 3


def test_timelines_next_to_each_other_do_the_same_useful_work(tmp_path):
    planned = [
        [
            Timed(Action(kind, 0, 0, 0), start, start + 1)
            for start, kind in enumerate((Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD))
        ]
    ]
    measured = [[Timed(Action(Kind.FORWARD, 0, 0, 0), 10, 16)]]
    timelines, unit = write_timelines(tmp_path / "trace.json", planned, None)
    assert timelines == {"planned": planned} and unit.startswith("forwards of a token")
    timelines, unit = write_timelines(tmp_path / "trace.json", planned, measured)
    assert unit == "ms" and timelines["measured"][0][0][1:] == (0.010, 0.016), "measured in microseconds"
    assert useful_time(timelines["planned"][0]) == pytest.approx(0.006)
    for panel in (figure := picture(timelines, unit)).axes:
        assert panel.get_xlim() == pytest.approx((0, 0.016)), "on one scale"
    assert figure.axes[-1].get_xlabel() == "time in ms"
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("process_name") == 2


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


STEP_LINE = re.compile(
    r"step: +(\d+)  loss: +([\d.]+)  grad_norm: +([\d.]+)  memory: +[\d.]+GiB\([\d.]+%\)  tps: [\d,]+ "
    r" tflops: [\d,.]+  mfu: [\d.]+%"
    r"  chunks: 5  padding: 15.00%  recomputed: 3  imbalance: 0.00%"
)


def test_the_step_line(tmp_path, messages):
    run = build(tmp_path, tensorboard=False)
    run.count(PLAN, 1e6, 0.0)
    log(run, 1)
    line = messages()[-1]
    assert line.startswith("step:  1  loss:  2.50000  grad_norm:  0.5000  memory: ")
    assert STEP_LINE.fullmatch(line)
    run.colours = metrics.COLOURS
    run.count(PLAN, 1e6, 0.0)
    log(run, 10)
    coloured = messages()[-1]
    assert coloured.count("\033[") == 8 and coloured != line
    assert STEP_LINE.fullmatch(re.sub(r"\033\[\d+m", "", coloured))
    assert "Peak FLOPS used for computing MFU: 1.000e+09" in messages()


def _rank(rank: int, folder: str) -> None:
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=limit
    )
    metrics.peak_flops = lambda device, dtype: 1e9
    run = build(folder, tensorboard=False)
    run.count(PLAN, 1e6, 0.0)
    loss = log(run, 1, loss=[1.0, 0.5][rank], max_loss=[-math.inf, 4.0][rank])
    assert loss == 1.5
    assert (run.rows is None) == (rank == 1)
    run.close()
    own = RankFigures(1.5 + rank, 0, 0, 0, 2, 0, 0.25, 0.25)
    assert gather_over_ranks(own, CPU) == [own._replace(busy_seconds=1.5 + other) for other in range(2)]
    assert gather_timeline([Timed(Action(Kind.FORWARD, rank, 0, 0), 1, 2)], dist.group.WORLD) == [
        [(Action(Kind.FORWARD, other, 0, 0), 1e6, 2e6)] for other in range(2)
    ]
    dist.destroy_process_group()


def test_figures_of_two_ranks(tmp_path):
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    (row,) = written(tmp_path)
    assert (row["loss"], row["global_max_loss"], row["tokens"]) == (1.5, 4.0, 17)
    assert row["tps"] == pytest.approx(17 / row["seconds"] / 2)


def test_the_log_has_torchtitans_shape(capsys):
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        init_logger()
        init_logger()
        logging.getLogger("chunkflow.somewhere").info("hello")
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    out = capsys.readouterr().out
    assert re.fullmatch(r"\[chunkflow\] \d{4}-\d\d-\d\d [\d:,]+ - chunkflow\.somewhere - INFO - hello\n", out)


def test_peak_memory_is_of_the_time_since_its_reset():
    reset_peak_memory(CPU)
    before = peak_memory(CPU).reserved_gib
    block = torch.ones(2**26)  # 256 MiB
    during = peak_memory(CPU).reserved_gib
    del block
    after = peak_memory(CPU).reserved_gib
    reset_peak_memory(CPU)
    assert during - before > 0.2 and after == pytest.approx(during, abs=0.02)
    assert during - peak_memory(CPU).reserved_gib > 0.2


def test_peak_memory_without_proc(monkeypatch):
    def missing(self, *_):
        raise FileNotFoundError

    monkeypatch.setattr(device.Path, "read_text", missing)
    monkeypatch.setattr(device.Path, "write_text", missing)
    reset_peak_memory(CPU)
    assert 0.01 < peak_memory(CPU).reserved_gib < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_peak_flops_of_an_unknown_device_are_measured(dtype):
    start = time.perf_counter()
    assert 1e8 < peak_flops(CPU, dtype) < 1e15
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1300e12),
    ],
)
def test_peak_flops_of_known_devices(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == flops


def test_garbage_is_collected_at_the_same_steps_everywhere(monkeypatch, messages):
    try:
        collection = GarbageCollection(2)
        assert not gc.isenabled()
        collected = []
        monkeypatch.setattr(gc, "collect", collected.append)
        for step in range(1, 6):
            collection.run(step)
        assert collected == [1, 1]
        assert messages()[0].startswith("[GC] Initial GC collection took ")
    finally:
        gc.enable()
