"""Every benchmark runs, with tiny sizes: times are not judged here, but what must hold at any size is."""

import json
import re
import shlex
import subprocess
import sys
from datetime import date

import pytest

from benchmarks.gpu import trace_figures
from tests.helpers.processes import REPO, environment

SMALL = "--dim 128 --layers 1 --vocab 256 --sequences 3 --runs 1"
COMMANDS = {
    "attention": "attention.py --tokens 64 --chunk-sizes 16 --runs 1",
    "data_parallel": "data_parallel.py --steps 1",
    "data_parallel measured": "data_parallel.py --measure --runs 1 --sequences 4 --longest 200 --long 1100",
    "gpu": "gpu.py --cpu --only 1 3 4 7",
    "gpu's attention": "gpu_kernels.py attention --cpu --one",
    "kill_loop": "kill_loop.py --kills 1 --steps 4 --layouts 'one process'",
    "long_sequence": "long_sequence.py --lengths 48 --chunk-size 16 --k 2 --layers 1 --vocab 64 --kv-offload none --keep-attention none host",
    "paper's checks": "paper.py --checks --batches 1",
    "paper, other assumptions": "paper.py --sensitivity --batches 1 --launches --shares",
    "pipeline simulated": "pipeline.py --train-steps 0 --steps 1 --stages 4",
    "pipeline measured": "pipeline.py --steps 0 --train-steps 2 --seq-len 64 --sequences 2 --kinds 'whole sequences'",
    "planner": "planner.py --dim 128 --layers 2 --vocab 64 --chunk-sizes 64 --k 1 2 --sequences 3 --longest 200 --scale 512 --runs 1 --mixes 1 --layouts 3 4",
    "tokenising": "tokenising.py --rows 40 --workers 0",
    "tokenising of lines": "tokenising.py --rows 40 --workers 2 --kind jsonl",
    "step": f"step.py {SMALL} --longest 128 --chunk-size 64",
    "step in fp32": f"step.py {SMALL} --longest 64 --precision float32 --cpu-time",
    "step's memory": "step.py --memory --memory-lengths 64 --chunk-size 512",
}


def benchmark(
    tmp_path, script: str, *options: str, seconds: int = 120, **environ
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "benchmarks" / script), *options]
    return subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path, **environ),
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "pipeline simulated"])
def test_benchmark(name, tmp_path):
    done = benchmark(tmp_path, *shlex.split(COMMANDS[name]))
    assert done.returncode == 0 and done.stdout.strip(), done.stdout + done.stderr


def test_no_benchmark_is_left_out():
    scripts = {path.name for path in (REPO / "benchmarks").glob("*.py")}
    assert scripts == {command.split()[0] for command in COMMANDS.values()} | {
        "versus.py",
        "paper_model.py",
        "result_files.py",
    }
    for name in scripts - {"paper_model.py", "result_files.py"}:  # which are no commands
        text = (REPO / "benchmarks" / name).read_text()
        assert "parse_args(parser)" in text or '"--markdown"' in text, f"{name} has no --markdown"


def test_a_result_is_kept_with_its_machine_versions_and_command(tmp_path):
    command = COMMANDS["pipeline simulated"]  # one that needs no torch
    taken = tmp_path / "kept" / f"{date.today()}-pipeline.md"
    taken.parent.mkdir()
    taken.write_text("of an earlier run")
    done = benchmark(tmp_path, *shlex.split(command), "--markdown", "kept")
    assert done.returncode == 0 and taken.read_text() == "of an earlier run", done.stderr
    text = (tmp_path / "kept" / f"{date.today()}-pipeline-2.md").read_text()
    assert f"```text\n{done.stdout.strip()}\n```\n" in text and "ours takes" in done.stdout
    assert text.startswith(f"# pipeline.py, {date.today()}\n")
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \w", line))
    assert rows["command"].endswith(f"python benchmarks/{command}`")
    assert " cores, " in rows["machine"] and ("GPU" in rows["machine"] or "MiB" in rows["machine"])
    assert "AMX" in rows["machine"], "or that there is none"
    for word in ("commit ", f"Python {sys.version_info.major}.", "torch 2."):
        assert word in rows["versions"]
    again = benchmark(tmp_path, *shlex.split(command), "--markdown=./kept/here.md")
    assert again.returncode == 0 and (tmp_path / "kept" / "here.md").exists(), again.stderr
    failed = benchmark(tmp_path, "pipeline.py", "--stages=0", "--train-steps=0", "--markdown=failed.md")
    assert failed.returncode == 1 and not (tmp_path / "failed.md").exists()


def test_usual_loops_and_ours_have_the_same_losses(tmp_path):
    """Padded batches and FSDP2 of transformers against stages of ours: fp32, before and after an update."""
    rows = [f"transformers, {kind}" for kind in ("padded batches of 4", "FSDP2, 2 ranks")]
    rows.append("ChunkFlow, 2 stages")
    options = ["--quick", "--precision", "float32", "--threads", "1", "--rows", *rows]
    done = benchmark(tmp_path, "versus.py", *options, seconds=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    column = table[0].index("all steps") - len(table[0])  # from the end: the first column has no title
    assert [line[0] for line in table[2:]] == rows
    assert all(float(line[column]) <= 1e-5 for line in table[3:]), done.stdout


def test_the_parts_of_a_simulated_step_add_up_and_ours_is_not_slower_than_the_papers(tmp_path):
    options = shlex.split("--setups 1 --replicas 2 --batches 1 --json --picture paper.png")
    done = benchmark(tmp_path, "paper.py", *options, seconds=240)
    assert done.returncode == 0 and (tmp_path / "paper.png").stat().st_size > 10_000, done.stderr
    (rows,) = json.loads(done.stdout.splitlines()[-1]).values()
    assert list(rows) == ["whole", "paper", "ours", "shared"]
    parts = ("work", "small", "again", "pipeline", "replicas")
    for name, row in rows.items():
        assert row["seconds"] == pytest.approx(sum(row[part] for part in parts)), name
        assert row["speedup"] == pytest.approx(rows["whole"]["seconds"] / row["seconds"]), name
        assert min(row[part] for part in parts) >= 0 and row["gib"] < 80, name
        # Arithmetic is the same in all, but for the traffic of shared sequences.
        assert row["work"] == pytest.approx(rows["whole"]["work"], rel=0.02), name
    assert rows["shared"]["replicas"] < rows["ours"]["replicas"] <= rows["paper"]["replicas"]
    assert rows["shared"]["seconds"] < rows["ours"]["seconds"] < rows["paper"]["seconds"]


@pytest.mark.parametrize("k", [1, 3])
def test_flops_of_a_long_sequence_are_those_that_torch_counts(k, monkeypatch):
    """Its matrix products exactly, of chunks that are kept and of those that are not."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import long_sequence, step

    model = step.make_model("float32", **step.sizes(128, 3, 256))
    runner = long_sequence.Runner([long_sequence.WholeModel(model, lambda model: None)], step.CPU)
    with FlopCounterMode(display=False) as counter:
        long_sequence.sequence_step(runner, 100, 16, k, 256)
    counted = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    discarded = 16 * (7 - k)
    of_layer = 4.0 * 128 * discarded * (discarded + 1) / 2  # queries of 2 x 64, attention of one layer
    saved = long_sequence.flops(model.args, 100, 16, k, False) - (
        kept := long_sequence.flops(model.args, 100, 16, k, True)
    )
    assert saved == 2 * of_layer  # of the first two; the last layer's attention is run once in any case
    assert kept - 3.5 * 3 * 4.0 * 128 * 100 * 101 / 2 == counted


@pytest.mark.parametrize("precision", ["recipe", "float32"])
def test_shares_of_the_profile_add_up_to_the_step(precision, tmp_path):
    done = benchmark(
        tmp_path, "step.py", "--profile", *shlex.split(SMALL), "--longest=128", f"--precision={precision}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = {line[:44].strip(): float(line[44:53]) for line in done.stdout.splitlines() if "%" in line}
    (whole,) = (
        float(line.split("rank 0: ")[1].split(" s")[0])
        for line in done.stdout.splitlines()
        if "rank 0" in line
    )
    assert abs(sum(seconds.values()) - whole) < 0.005 + 0.0005 * len(seconds), done.stdout  # they are rounded
    for name in ("matrix products", "attention", "norms and rotary", "loss", "optimizer"):
        assert seconds[name] > 0, done.stdout
    assert all(amount >= 0 for amount in seconds.values()), done.stdout


def test_a_machine_without_a_gpu_fails_the_first_check_of_the_first_hour(tmp_path):
    done = benchmark(tmp_path, "gpu.py", CUDA_VISIBLE_DEVICES="")
    report = (tmp_path / "gpu_results.md").read_text()
    assert done.returncode == 1 and "check 1 failed" in done.stderr, done.stdout + done.stderr
    assert "| command | `" in report and "| machine | " in report and "| versions | commit " in report
    assert "1. versions | FAILED" in report and "torch sees no GPU" in report and "2. attention" not in report


def test_idle_time_and_waits_are_read_off_a_trace(tmp_path):
    kernels = [(0, 100), (50, 400), (700, 10), (715, 5)]  # a gap of 250 us, one of 5
    events = [{"cat": "kernel", "name": "gemm", "ts": ts, "dur": dur} for ts, dur in reversed(kernels)]
    events += [
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 1, "dur": 1},
        {"name": "thread"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert trace_figures(tmp_path / "trace.json") == (
        "profiled step: 4 kernels, 1 gaps above 0.2 ms, 0.2 ms in all, 1 waits of the host"
    )
