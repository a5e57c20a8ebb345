"""chunk_size and k = "auto", and plans that do not fit, through the recipes."""

import json
import re
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from chunkflow.settings.config import load_config
from chunkflow.storage.manifest import read_manifest
from chunkflow.training import build, choice, rates
from recipes import plan
from tests.helpers.processes import REPO, rows_of, run, small_assets, write_rows

AUTO = ["--chunkflow.chunk_size=auto", "--chunkflow.k=auto"]
MODEL = "--model.flavor=debugmodel"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run on ready tokens, the longest sequence of which has 900."""
    data = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [900, 500, 300] + [100] * 9)
    return [
        MODEL,
        "--training.dataset=jsonl",
        f"--training.dataset_path={data}",
        "--training.seq_len=1000",
        "--training.global_batch_size=6",
        "--lr_scheduler.warmup_steps=1",
        "--metrics.log_freq=1",
        "--metrics.no_enable_tensorboard",
    ]


def predicted(options, *more, ranks=1):
    """What the recipe predicts on the CPU."""
    config = load_config([*options, *more])
    spec = build.model_spec(config)
    return choice.forecaster(config, spec, build.open_data(config, spec, 0), 0, ranks, "cpu")


def chosen(folder):
    config = load_config(["--job.config_file", str(folder / "config.toml")])
    return config.chunkflow.chunk_size, config.chunkflow.k


def test_auto_is_the_fastest_that_fits_and_a_resume_keeps_it(tmp_path, options, monkeypatch):
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    rows = list(predicted(options, *AUTO).rows())
    peaks = sorted(row.peak_gib for row in rows)
    budget = (peaks[0] + peaks[-1]) / 2  # some fit, some do not
    rows = list(predicted(options, *AUTO, f"--chunkflow.memory_budget_gib={budget}").rows())
    assert {row.fits for row in rows} == {True, False}
    best, second = choice.ranked(rows)[:2]

    folder = tmp_path / "run"
    more = [f"--job.dump_folder={folder}", "--checkpoint.enable", "--checkpoint.interval=1", *AUTO]
    done = run(tmp_path, *options, *more, "--training.steps=1", f"--chunkflow.memory_budget_gib={budget}")
    assert done.returncode == 0, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if "fastest by prediction" in line]
    for row in (best, second):
        assert f"chunkflow.chunk_size = {row.chunk_size}, chunkflow.k = {row.k} takes" in line
    assert chosen(folder) == best[:2]
    saved = read_manifest(folder / "checkpoint" / "step-1")["config"]
    assert (saved["chunkflow.chunk_size"], saved["chunkflow.k"]) == best[:2]

    # Without a budget another would be chosen; the checkpoint's is kept.
    assert choice.ranked(predicted(options, *AUTO).rows())[0][:2] != best[:2]
    done = run(tmp_path, *options, *more, "--training.steps=2")
    assert done.returncode == 0 and "as the checkpoint has them" in done.stdout, done.stdout[-3000:]
    assert chosen(folder) == best[:2]
    assert [row["step"] for row in rows_of(folder)] == [1, 2]


def test_rank_0_chooses_for_all(tmp_path, options, monkeypatch):
    """The ranks could not train together with different plans. What is a number is not changed."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    more = ["--chunkflow.chunk_size=auto", "--chunkflow.k=2"]
    done = run(
        tmp_path, *options, *more, f"--job.dump_folder={tmp_path / 'run'}", "--training.steps=2",
        processes=2, forked=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    best = choice.ranked(predicted(options, *more, ranks=2).rows("auto", 2))[0]
    assert chosen(tmp_path / "run") == best[:2] and best.k == 2
    assert done.stdout.count("fastest by prediction") == 1
    assert len(rows_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_plan_that_does_not_fit_is_refused(tmp_path, options, monkeypatch, processes):
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    rows = list(predicted(options, ranks=processes).rows())
    least, most = (pick(rows, key=lambda row: row.peak_gib) for pick in (min, max))
    budget = (least.peak_gib + most.peak_gib) / 2
    large = [f"--chunkflow.chunk_size={most.chunk_size}", f"--chunkflow.k={most.k}"]
    folder = tmp_path / "run"
    done = run(
        tmp_path, *options, *large, f"--chunkflow.memory_budget_gib={budget}",
        f"--job.dump_folder={folder}", "--training.steps=1", processes=processes, forked=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    for part in (
        f"chunkflow.chunk_size = {most.chunk_size}, chunkflow.k = {most.k}: a step with a sequence of 900",
        f"{most.peak_gib:.3g} GiB on the fullest rank (parameters",
        "activations of live chunks",
        "of chunkflow.memory_budget_gib: set chunkflow.chunk_size =",
    ):
        assert part in line
    assert "CUDA" not in line, "what CUDA adds counts on CUDA only"
    assert not (folder / "metrics.jsonl").exists(), "before the first step"
    # what it says would fit is admitted
    size, k = re.search(r"set chunkflow.chunk_size = (\d+), chunkflow.k = (\d+)", line).groups()
    fits = predicted(options, f"--chunkflow.memory_budget_gib={budget}", ranks=processes)
    choice.refuse(fits, int(size), int(k))
    with pytest.raises(ValueError, match="no chunk_size and k would fit"):
        nothing = predicted(options, "--chunkflow.memory_budget_gib=0.001", ranks=processes)
        choice.refuse(nothing, most.chunk_size, most.k)


def test_plan_compares_settings(tmp_path, options, monkeypatch, capsys):
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NGPU", "2")
    common = [*options, "--steps=2", "--json"]

    def report(*more):
        plan.main([*common, *more])
        return json.loads(capsys.readouterr().out)

    whole = report("--chunkflow.no_enable", *AUTO)
    assert (whole["chunk_size"], whole["k"], whole["table"]) == (None, None, [])
    fixed = report("--chunkflow.chunk_size=300", "--device=A100")
    table = fixed["table"]
    fitting = [row for row in table if row["fits"]]
    assert [row["best"] for row in table] == [True] + [False] * (len(table) - 1)
    assert table[0]["step_seconds"] == min(row["step_seconds"] for row in fitting)
    assert (300, 1) in [(row["chunk_size"], row["k"]) for row in table], "the config's own is among them"
    layouts = {(row["pipeline_parallel_degree"], row["fsdp_reshard_after_forward"]) for row in table}
    assert layouts == {(1, True), (1, False), (2, False)}
    assert fixed["step_seconds"] == pytest.approx(fixed["mean"]["step_seconds"])
    tokens = fixed["mean"]["tokens"]
    assert fixed["tps"] == pytest.approx(tokens / fixed["step_seconds"] / 2)
    assert (fixed["device"], fixed["calibrated"], fixed["budget_gib"]) == ("A100", False, 79.2)
    assert "this config" in plan.table(fixed) and fixed["why"].split("; ")[0] in plan.table(fixed)

    automatic = report(*AUTO, "--device=cpu", "--chunkflow.memory_budget_gib=0.12")
    own = [row for row in automatic["table"] if row["pipeline_parallel_degree"] == 1]
    own = [row for row in own if row["fsdp_reshard_after_forward"] and row["fits"]]
    assert (automatic["chunk_size"], automatic["k"]) == (own[0]["chunk_size"], own[0]["k"])
    assert automatic["memory_longest_sequence"]["total_gib"] <= 0.12

    full = report("--chunkflow.chunk_size=256", "--activation_checkpoint.mode=full")
    assert "three forwards" in full["hint"] and full["hint"] in plan.table(full)
    assert fixed["hint"] == ""
    with pytest.raises(SystemExit) as stopped:
        plan.main([*options, "--device=TPU"])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "--device = TPU is not known" in said.err
    assert not said.out, "nothing is read for a device that is not known"


def test_the_comment_of_a_file_is_refreshed(tmp_path, options, monkeypatch, capsys):
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "my.toml"
    rest = '\n\n[job]\ndescription = "mine"  # python recipes/plan.py\n'
    command = "# What it is.\n# python recipes/plan.py --job.config_file my.toml \\\n#     --steps=1"
    file.write_text(f"{command}\n#\n# old\n# text{rest}")
    for _ in range(2):  # the second time over what the first has written
        plan.main(["--job.config_file", str(file), *options, "--steps=1", "--write"])
        text = plan_text(capsys.readouterr().out)
        written = "\n".join(f"# {line}".rstrip() for line in text.split("\n"))
        assert file.read_text() == f"{command}\n#\n{written}{rest}"
    file.write_text("[job]\n")
    with pytest.raises(SystemExit):
        plan.main(["--job.config_file", str(file), *options, "--steps=1", "--write"])
    assert "has no first comment with a command of recipes/plan.py" in capsys.readouterr().err


def test_pictures(tmp_path, options, monkeypatch, capsys):
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    more = [*options, "--chunkflow.chunk_size=256", "--steps=1", f"--pictures={tmp_path / 'pictures'}"]
    plan.main(more)
    names = {"seconds", "memory", "settings", "lengths"}
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == names
    assert all(path.read_bytes()[1:4] == b"PNG" for path in (tmp_path / "pictures").glob("*.png"))
    events = EventAccumulator(str(tmp_path / "pictures"), {"images": 0})
    assert set(events.Reload().Tags()["images"]) == {f"plan/{name}" for name in names}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        plan.main(more)
    assert stopped.value.code == 1 and "--pictures needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("degrees", [[], ["--parallelism.pipeline_parallel_degree=4"]])
def test_a_plan_for_1024_ranks_takes_seconds(tmp_path, options, monkeypatch, capsys, degrees):
    """At most 8 replicas are planned, whatever their number."""
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NGPU", "1024")
    start = time.process_time()
    plan.main(
        [
            "--model.name=qwen2", "--model.flavor=7B", "--training.dataset=synthetic",
            "--training.dataset_path=lmsys", "--training.seq_len=32768", "--training.overlong=truncate",
            "--training.global_batch_size=2048", "--chunkflow.chunk_size=8192", "--steps=1", "--json", *degrees,
        ]
    )  # fmt: skip
    seconds = time.process_time() - start
    report = json.loads(capsys.readouterr().out)
    assert report["ranks"] == 1024 and len(report["kv_gib_of_replicas"]) <= 8
    assert report["table"] and sum(report["seconds_by_part"].values()) == pytest.approx(
        report["step_seconds"]
    )
    assert seconds < 60, "of a machine that others use, too"


def test_calibration_of_two_ranks(tmp_path, options, monkeypatch):
    """What goes between them is measured, too; one of them keeps it and plans."""
    cache = tmp_path / "cache"
    size = small_assets(tmp_path / "model")
    more = [*options, size, "--calibrate", "--steps=1", "--training.mixed_precision_param=float32"]
    done = run(
        tmp_path, *more, processes=2, forked=True,
        TRAIN_FILE=str(REPO / "recipes" / "plan.py"), CHUNKFLOW_CACHE=str(cache),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count(" us between ranks, ") == 1 == done.stdout.count("measured rates (cpu)")
    (kept,) = (cache / "calibration").glob("*.json")
    measured, assumed = json.loads(kept.read_text()), rates.analytic("cpu")
    assert measured["gather"] != assumed.gather and measured["gather"] > 0
    assert measured["network"] == assumed.network, "of which two ranks know nothing"
    assert 0 <= measured["latency"] != assumed.latency


def plan_text(printed):
    """What follows the table of lengths."""
    return printed[printed.index("llama3 debugmodel,") :].rstrip("\n")


def test_other_recipes_ask_for_a_number(tmp_path, options):
    done = run(tmp_path, *options, "--chunkflow.k=auto", TRAIN_FILE=str(REPO / "recipes" / "preview.py"))
    assert done.returncode == 2 and 'chunkflow.k = "auto" is chosen by recipes/finetune.py' in done.stdout


def test_rates_are_those_of_the_device(options, tmp_path, monkeypatch):
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    own = predicted(options)
    measured = own.rates._replace(forward=own.rates.forward._replace(layer=1.0))
    rates.save(measured, own.spec.name, own.spec.args, "bfloat16", "cpu")
    again = predicted(options)
    assert (again.rates, again.measured, own.measured) == (measured, True, False)
    assert again.row(256, 1, 1, "default").step_seconds > own.row(256, 1, 1, "default").step_seconds
