"""What people see of a run: TensorBoard's dashboard, pictures, texts and table of runs, in a browser too; the
console; Weights & Biases; and that docs/metrics.md lists every figure."""

import importlib.util
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata

from chunkflow.planning.cost import Cost
from chunkflow.planning.pipeline_schedule import Action, Timed
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.schedule import Kind
from chunkflow.reporting import console, dashboard, pictures
from chunkflow.reporting.console import Progress, Totals, duration
from chunkflow.reporting.metrics import MetricsLogger
from chunkflow.settings.config import ConfigError, load_config
from chunkflow.settings.keys import flat, to_toml
from chunkflow.training import build, prediction
from tests.helpers.clock import Clock
from tests.helpers.processes import REPO, end_processes, environment, rows_of, run, small_assets, write_rows

CPU = torch.device("cpu")
PAGE = (REPO / "docs" / "metrics.md").read_text()
PLAN = plan_step([5, 3, 9], PlanSettings(Cost(1.0, 0.0), chunk_size=4))


def screenshots() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("screenshots", REPO / "docs" / "screenshots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two short runs: on one rank, with sources and validation; on two pipeline stages."""
    folder = tmp_path_factory.mktemp("runs")
    assets = small_assets(folder / "assets")
    files = [
        write_rows(folder / f"{name}.jsonl", [20, 30, 150, 40, 90, 10], seed)
        for seed, name in enumerate("ab")
    ]
    tables = "".join(f'[[training.sources]]\ndataset = "jsonl"\ndataset_path = "{file}"\n' for file in files)
    (folder / "rank.toml").write_text(tables)
    (folder / "stages.toml").write_text(f'[training]\ndataset = "jsonl"\ndataset_path = "{files[0]}"\n')
    shared = [
        assets, "--training.global_batch_size=6", "--training.steps=6", "--lr_scheduler.warmup_steps=1",
        "--chunkflow.chunk_size=64", "--metrics.log_freq=1", "--metrics.disable_color_printing",
    ]  # fmt: skip
    more = {
        "rank": ["--validation.enable", "--validation.freq=1", "--validation.dataset=jsonl",
                  f"--validation.dataset_path={files[0]}"],
        "stages": ["--parallelism.pipeline_parallel_degree=2"],
    }  # fmt: skip
    for processes, (name, options) in enumerate(more.items(), 1):
        where = f"--job.config_file={folder / name}.toml", f"--job.dump_folder={folder / 'out' / name}"
        done = run(folder, *where, *shared, *options, processes=processes, forked=True)
        assert done.returncode == 0, done.stdout[-3000:]
        (folder / "out" / name / "log").write_text(done.stdout)
    return folder / "out"


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def listed(heading: str) -> list[str]:
    """First cells of the tables under a heading of the page."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)


def pattern_of(name: str) -> re.Pattern:
    pattern = re.escape(name).replace("NAME", ".+").replace("RANGE", r"up_to_\d+[KM]")
    return re.compile(re.sub(r"\bN$|(?<=_)N$", r"\\d+", pattern))


@pytest.mark.parametrize(
    "heading, kind", [("Curves in TensorBoard", "scalars"), ("Pictures", "images"), ("Texts", "tensors")]
)
def test_the_page_lists_every_tag_and_no_other(runs, heading, kind):
    written = {tag for name in ("rank", "stages") for tag in events(runs / name / "tb").Tags()[kind]}
    written = {tag.removesuffix("/text_summary") for tag in written} - {"custom_scalars__config__"}
    agree(listed(heading), written)


@pytest.mark.parametrize("file", ["metrics.jsonl", "validation.jsonl"])
def test_the_page_lists_every_column_and_no_other(runs, file):
    written = {key for line in (runs / "rank" / file).read_text().splitlines() for key in json.loads(line)}
    agree(listed(f"`{file}`"), written)


def agree(names: list[str], written: set[str]) -> None:
    assert names and len(names) == len(set(names))
    patterns = {name: pattern_of(name) for name in names if not name.startswith("dpo/")}
    for tag in written:
        assert any(pattern.fullmatch(tag) for pattern in patterns.values()), f"docs/metrics.md lacks {tag}"
    for name, pattern in patterns.items():
        assert any(map(pattern.fullmatch, written)), f"no run writes {name}, which docs/metrics.md has"


def layout_of(read: EventAccumulator) -> dict[str, dict[str, list[str]]]:
    layout = Layout.FromString(read.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def test_the_dashboard_has_a_chart_for_what_there_is_and_no_other(runs):
    shown = {}
    for name in ("rank", "stages"):
        read = events(runs / name / "tb")
        tags, shown[name] = read.Tags()["scalars"], layout_of(read)
        assert next(iter(shown[name])) == "Loss" and next(iter(shown[name]["Loss"])).startswith("loss")
        assert not any(
            "(" in tag
            for patterns in all_of(shown[name])
            for p in patterns
            for tag in tags
            if re.match(p, tag)
        )
        for chart, patterns in (pair for charts in shown[name].values() for pair in charts.items()):
            assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), chart
    ranks, stages = ({chart for charts in each.values() for chart in charts} for each in shown.values())
    assert ranks - stages == {
        "loss by source",
        "validation loss by position",
        "waiting for the busiest rank (%)",
    }
    assert stages - ranks == {"bubble (%): simulated, and measured by stage"}
    assert dashboard.layout({"dpo/reward_margin", "dpo/chosen_logp"}).keys() == {"Preferences"}
    # every pattern means a figure that exists
    names = listed("Curves in TensorBoard")
    names += [dashboard.plain(name) for name in names]
    for pattern in (p for charts in dashboard.DASHBOARD.values() for ps in charts.values() for p in ps):
        assert any(re.match(pattern, name) for name in names), pattern


def all_of(charts: dict[str, dict[str, list[str]]]) -> list[list[str]]:
    return [patterns for category in charts.values() for patterns in category.values()]


def hparams_of(folder) -> dict:
    content = events(folder).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    return dict(metadata.parse_session_start_info_plugin_data(content).hparams)


def test_texts_and_hyper_parameters_of_a_run(runs):
    folder = runs / "rank"
    assert [path.name.split(".")[0] for path in (folder / "tb").iterdir()] == ["events"], (
        "one run, no subfolder"
    )
    read = events(folder / "tb")

    def text(tag: str) -> str:
        return read.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()

    code = text("config").splitlines()
    assert (
        "\n".join(line.removeprefix("    ") for line in code) == (folder / "config.toml").read_text().rstrip()
    )
    assert all(line.startswith("    ") for line in code if line), "a code block"
    tokens = [row["tokens"] for row in rows_of(folder)]
    assert f"| tokens | {tokens[0]:,} |" in text("plan of step 1") and "| 0 |" in text("plan of step 1")
    summary = text("summary")
    assert f"| tokens | {sum(tokens):,}, " in summary and "| tokens of a.jsonl | read " in summary
    hparams = hparams_of(folder / "tb")
    assert hparams["chunkflow.chunk_size"].number_value == 64 and hparams["processes"].number_value == 1
    assert hparams["chunkflow.enable"].string_value == "true"
    end = read.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(end).status == 1, "complete"


def test_the_console_is_quiet_and_ends_with_a_table(runs):
    said = (runs / "rank" / "log").read_text()
    assert not re.search("matplotlib|font|PIL", said)
    assert re.search(r"step:  1  loss: .* 1/6, \d:\d\d left", said)
    rows = rows_of(runs / "rank")
    table = said.partition("Trained up to step 6:\n")[2].partition("[chunkflow]")[0]
    assert f"loss                          {rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}\n" in table
    for part in (
        "tokens of the data",
        "tokens of b.jsonl",
        "validation loss",
        "longest sequence",
        "GiB whole",
    ):
        assert part in table
    assert f"chunks                        {sum(row['chunks'] for row in rows)}, " in table


def test_pages_in_a_browser(runs, tmp_path):
    """TensorBoard's pages, drawn by Chromium: lines in the charts, pictures, texts, a row in the table."""
    shots = screenshots()
    if not shots.chromium():
        pytest.skip("there is no Chromium to look at TensorBoard with: apt-get install chromium")
    with shots.tensorboard(runs) as address:
        browser = shots.Browser(shots.chromium(), tmp_path / "browser")
        try:
            for page in shots.READY:
                shots.photograph(address, browser, page, tmp_path / f"{page}.png")
                assert (tmp_path / f"{page}.png").stat().st_size > 10_000
        finally:
            browser.close()


# ---- without processes


def logger(folder, start_step=0, *options) -> MetricsLogger:
    config = load_config(
        [f"--job.dump_folder={folder}", "--training.steps=4", "--metrics.log_freq=1", *options]
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    return MetricsLogger(
        folder, config.metrics, CPU, torch.float32, start_step=start_step, config=flat(config)
    )


def steps(logger: MetricsLogger, first: int, last: int, loss: float = 2.0) -> None:
    for step in range(first, last + 1):
        logger.count(PLAN, 1e6, 0.0)
        logger.log(step, PLAN, loss=loss, max_loss=2.0, grad_norm=1.0, lr=0.1, supervised_tokens=4)


@pytest.fixture
def known_peak(monkeypatch):
    monkeypatch.setattr("chunkflow.reporting.metrics.peak_flops", lambda device, dtype: 1e9)


@pytest.mark.quick
def test_a_run_that_was_killed_and_resumed_is_one_run(tmp_path, known_peak):
    killed = logger(tmp_path / "run", 0)
    steps(killed, 1, 3, loss=3.0)
    assert hparams_of(tmp_path / "run" / "tb")["training.steps"].number_value == 4, "while it runs"
    killed.board.writer.close()  # nothing else: it is killed
    resumed = logger(tmp_path / "run", 2)
    steps(resumed, 3, 4)
    resumed.close({"": "read 5"})
    read = events(tmp_path / "run" / "tb")
    curve = [(event.step, event.value) for event in read.Scalars("loss_metrics/global_avg_loss")]
    assert curve == [(1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0)]
    assert [event.step for event in read.Tensors("config/text_summary")] == [0, 2]
    assert [event.step for event in read.Tensors("summary/text_summary")] == [4]
    assert metadata.SESSION_END_INFO_TAG in read.summary_metadata
    assert {path.is_file() for path in (tmp_path / "run" / "tb").iterdir()} == {True}


@pytest.mark.quick
def test_a_stopped_run_is_not_complete(tmp_path, known_peak, caplog):
    caplog.set_level(logging.INFO)
    run = logger(tmp_path / "run", 0)
    steps(run, 1, 2)
    run.close()
    assert "Stopped after step 2" in caplog.text
    assert metadata.SESSION_END_INFO_TAG not in events(tmp_path / "run" / "tb").summary_metadata


@pytest.mark.quick
def test_a_picture_that_cannot_be_drawn_costs_nothing_but_itself(tmp_path, known_peak, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    run = logger(tmp_path / "run", 0)
    main = time.monotonic()
    run.add_figure("slow", lambda: time.sleep(0.5), 1)
    run.add_figure("broken", lambda: 1 / 0, 1)
    assert time.monotonic() - main < 0.4, "pictures are drawn beside training"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run.add_figure("data/lengths", lambda: pictures.lengths_figure([1, 2], 2, 4), 1)
    steps(run, 1, 1)
    run.close()
    assert "No picture of broken: it could not be drawn" in caplog.text and "ZeroDivisionError" in caplog.text
    assert "No picture of data/lengths: matplotlib is not installed" in caplog.text
    assert events(tmp_path / "run" / "tb").Tags()["images"] == []


@pytest.mark.quick
def test_pictures_of_every_shape():
    for lengths in ([1], [7] * 3, [1, 2, 3, 1 << 20]):
        above, below = pictures.lengths_figure(lengths, 4, 8).axes
        for panel in (above, below):
            assert sum(panel.patches[0].get_data().values) == pytest.approx(100)
    assert "33.3 % are longer" in pictures.lengths_figure([3, 4, 5], 4, 8).get_suptitle()

    plan = plan_step([9, 3, 2, 5, 1], PlanSettings(Cost(1.0, 0.0), replicas=2, chunk_size=4, k=1))
    figure = pictures.plan_figure(plan, 4, 1)
    bars = [bar for panel in figure.axes for bar in panel.patches]
    assert sum(bar.get_height() for bar in bars) == 20
    assert sum(bool(bar.get_hatch()) for bar in bars) == plan.recomputed_chunks == 3
    colours = {bar.get_facecolor()[:3] for bar in bars}
    assert sum(len(set(colour)) > 1 for colour in colours) == 2, "one for each that is longer than a chunk"
    many = plan_step([9, 3] * 40, PlanSettings(Cost(1.0, 0.0), replicas=40, chunk_size=4))
    assert len(pictures.plan_figure(many, 4, 1).axes) == 16
    assert pictures.plan_text(many).count("\n| ") == 8 + 16

    timeline = [
        Timed(Action(kind, 0, 0), start, start + 1.0)
        for start, kind in enumerate((Kind.FORWARD, Kind.BACKWARD))
    ]
    figure = pictures.memory_figure(timeline, [(1, 1 << 20), (1, 3 << 20)])
    assert list(figure.axes[1].patches[0].get_data().values) == [1, 3]
    assert "at most 3 MiB" in figure.get_suptitle()


@pytest.mark.quick
def test_time_left_and_the_bar(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    screen = io.StringIO()
    progress = Progress(2, 12, screen)  # resumed
    clock.now += 60  # the first step sets much up
    progress.step()
    assert str(progress) == "3/12, 9:00 left"
    for _ in range(2):
        clock.now += 10
        progress.step()
    assert str(progress) == "5/12, 1:10 left" and not progress.complete
    last = screen.getvalue().split("\r")[-2]
    assert last.startswith("█" * 12 + "░" * 18 + " 5/12, 1:10 left") and screen.getvalue().endswith("\r")
    assert [duration(seconds) for seconds in (0.4, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]


DRAWS = """
import sys
from chunkflow.reporting.console import Progress, open_terminal

if "--check" not in sys.argv:
    assert not sys.stdout.isatty()
    Progress(0, 2, open_terminal()).step()
"""


def test_the_bar_goes_to_the_terminal_that_run_train_names(tmp_path):
    """torchrun's processes write into a pipe, while a person looks at a terminal."""
    assert console.open_terminal() is None
    (tmp_path / "draws.py").write_text(DRAWS)
    environ = environment(tmp_path, TRAIN_FILE=str(tmp_path / "draws.py"), CONFIG_FILE="/dev/null", NGPU="1")
    ours, terminal = pty.openpty()
    os.set_blocking(ours, False)
    try:
        command = [REPO / "run_train.sh"]
        done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, stdout=terminal, timeout=120)
        assert done.returncode == 0 and f"\r{'█' * 15}{'░' * 15} 1/2, ".encode() in os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(terminal)
        end_processes(str(tmp_path))


@pytest.mark.quick
def test_totals_are_of_all_steps(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    totals = Totals(lambda tokens: (tokens / 8, tokens / 4))
    other = plan_step([16, 4], PlanSettings(Cost(1.0, 0.0), chunk_size=4))
    for plan in (PLAN, other):
        totals.count(plan)
    clock.now += 10
    for name, loss in (("loss", 3.0), ("validation loss", 2.5), ("loss", 2.0)):
        totals.loss(name, loss, loss / 2)
    rows = dict(totals.rows())
    chunks, again = PLAN.chunks + other.chunks, PLAN.recomputed_chunks + other.recomputed_chunks
    assert rows["tokens"] == "37, 4 a second" and rows["steps"] == "2 in 0:10"
    assert (rows["loss"], rows["validation loss"]) == ("3.0000 -> 2.0000", "2.5000 -> 2.5000")
    padding = 100 * (1 - 37 / (4 * chunks))
    assert rows["chunks"] == f"{chunks}, {padding:.1f} % padding, {100 * again / chunks:.1f} % computed twice"
    assert rows["peak memory"] == "1.50 GiB" and rows["longest sequence"] == "16 tokens"
    assert rows["what it takes, by arithmetic"] == "2.00 GiB in chunks, 4.00 GiB whole"


@pytest.mark.quick
def test_memory_of_a_sequence_in_chunks_and_whole():
    config = load_config(["--chunkflow.chunk_size=512", "--training.seq_len=16384"])
    spec = build.model_spec(config)
    settings = build.plan_settings(config, spec, 2)
    long = prediction.memory_of_sequence(config, spec, settings, 16384)
    alone = prediction.memory_of_sequence(config, spec, settings._replace(spread_over=1), 16384)
    short = prediction.memory_of_sequence(config, spec, settings._replace(spread_over=1), 300)
    assert short[0] == short[1] < long[0] < alone[0] < 0.4 * alone[1] and long[1] == alone[1]
    whole = settings._replace(enable=False)
    assert prediction.memory_of_sequence(config, spec, whole, 16384) == (long[1], long[1])


FAKE_WANDB = types.SimpleNamespace(calls=[], finished=0)


def _init(**options):
    FAKE_WANDB.calls.append(options)

    def finish():
        FAKE_WANDB.finished += 1

    return types.SimpleNamespace(id=options["id"] or f"made{len(FAKE_WANDB.calls)}", finish=finish)


@pytest.mark.quick
def test_weights_and_biases_follow_the_events(tmp_path, monkeypatch, known_peak):
    FAKE_WANDB.calls.clear()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=_init))
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_TEAM", "us")
    made = logger(tmp_path / "run", 0, "--metrics.enable_wandb")
    steps(made, 1, 2)
    made.close()
    logger(tmp_path / "run", 2, "--metrics.enable_wandb").close()  # resumed
    logger(tmp_path / "run", 0, "--metrics.enable_wandb").close()  # anew
    first, resumed, anew = FAKE_WANDB.calls
    assert first["sync_tensorboard"] and first["config"]["training.steps"] == 4
    assert (first["project"], first["entity"], first["dir"]) == ("chunkflow", "us", str(tmp_path / "run"))
    assert (first["id"], resumed["id"], anew["id"]) == (None, "made1", None) and FAKE_WANDB.finished == 3


@pytest.mark.quick
def test_weights_and_biases_that_cannot_be(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(ConfigError, match=r"needs the package wandb, .*pip install 'chunkflow\[wandb\]'"):
        build.check(load_config(["--metrics.enable_wandb"]))
    with pytest.raises(ConfigError, match="metrics.enable_tensorboard = false writes none: set it to true"):
        build.check(load_config(["--metrics.enable_wandb", "--metrics.no_enable_tensorboard"]))
