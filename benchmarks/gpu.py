"""The first hour on a GPU: what no CPU could test, one check after the other, the cheapest first.

    python benchmarks/gpu.py              # all, on one GPU; the results go to gpu_results.md
    python benchmarks/gpu.py --only 7     # one check, or some
    python benchmarks/gpu.py --cpu        # the script itself, on a CPU: tiny, without what needs a GPU

It stops at the first check that fails, and says what that means. The file of results, with the machine and
the versions, is Markdown to be kept. One GPU is enough and one is used: what needs two (NCCL) is not here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import gpu_kernels
from benchmarks.result_files import facts, file_of
from tests.helpers.processes import RECIPE, REPO, rows_of, untimed, write_rows

MINUTES = 60
BEGINNING = "Training starts at step"
# What a failure most probably means.
MEANINGS = {
    1: "torch cannot use this GPU: a driver older than its CUDA, or a build of torch without CUDA.",
    2: "The variable-length flash attention of this torch has another convention than"
    " chunkflow/execution/attention.py expects (alignment of the causal mask, layout of the log-sum-exp,"
    " order of arguments). Do not train.",
    3: "Attention alone is right; K/V state, loss or norms are not, on this device. Do not train.",
    4: "A kernel reads or writes outside its tensors: results may be right by chance.",
    5: "Equal runs differ, or the loss does not fall: a kernel has no deterministic form, or is wrong.",
    6: "A killed run does not go on as if nothing had happened, or saving opens a second GPU.",
    7: "A kernel of the step fails at the size of a real model.",
    8: "A model as wide as 7B does not run, or takes other memory than recipes/plan.py predicts: presets that"
    " just fit on paper may not fit.",
    9: "torch.compile or activation checkpointing changes the loss: they may only change time and memory.",
    10: "Reading a prompt in other chunks gives another text. Where the texts part late, two tokens may have"
    " been equally likely in bf16; where at once, the K/V state is wrong.",
}


class Run(NamedTuple):
    """A finished run of a recipe."""

    folder: Path
    rows: list[dict]  # of metrics.jsonl
    log: str


class Session:
    """The device, the sizes that go with it, and the runs so far: checks share those of the same name."""

    def __init__(self, cpu: bool, place: Path):
        self.cpu, self.place, self.runs = cpu, place, {}
        self.device = torch.device("cpu" if cpu else "cuda")
        self.steps, self.save, self.kill = (9, 3, 4) if cpu else (200, 50, 75)
        self.environ = os.environ | {
            "PYTHONPATH": str(REPO),
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
        if cpu:
            self.environ |= {"CUDA_VISIBLE_DEVICES": "", "CHUNKFLOW_CACHE": str(place / "cache")}

    def python(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
        """AssertionError with the end of the output where it fails."""
        done = subprocess.run(
            [sys.executable, *arguments], cwd=REPO, env=self.environ | environ,
            capture_output=True, text=True, timeout=20 * MINUTES,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(arguments)}: {(done.stdout + done.stderr)[-3000:]}"
        return done

    def train(self, name: str, *options: str, **environ: str) -> Run:
        if name not in self.runs:
            folder = self.place / name.replace(" ", "_")
            done = self.python(str(RECIPE), *options, f"--job.dump_folder={folder}", **environ)
            self.runs[name] = Run(folder, rows_of(folder), done.stdout + done.stderr)
        return self.runs[name]

    def debug_options(self) -> list[str]:
        options = [
            "--job.config_file",
            "train_configs/debug_model.toml",
            f"--training.steps={self.steps}",
            "--metrics.log_freq=1",
        ]
        tiny = ["--training.dataset=synthetic", "--training.dataset_path=lmsys", "--training.seq_len=128"]
        return [*options, *tiny, "--chunkflow.chunk_size=64"] if self.cpu else options

    def deterministic(self, name: str = "deterministic") -> Run:
        return self.train(name, *self.debug_options(), "--debug.deterministic")

    def large_options(self) -> list[str]:
        """Four layers of Qwen2.5-7B with its embeddings and head, 2 B parameters; a long sequence a step."""
        folder, rows = self.place / "large_model", self.place / "rows.jsonl"
        longest, chunk_size = (128, 32) if self.cpu else (65536, 4096)
        sizes = {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 4,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        }  # fmt: skip
        if self.cpu:
            sizes |= {
                "hidden_size": 128,
                "intermediate_size": 96,
                "num_attention_heads": 4,
                "vocab_size": 2048,
            }
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(sizes))
        write_rows(rows, [longest, longest // 20, longest // 100, 300 % longest] * 5)
        return [
            f"--model.hf_assets_path={folder}", "--training.dataset=jsonl", f"--training.dataset_path={rows}",
            "--training.no_shuffle", "--training.global_batch_size=4", f"--training.seq_len={longest}",
            f"--chunkflow.chunk_size={chunk_size}", "--training.steps=5", "--metrics.log_freq=1",
        ]  # fmt: skip

    def large(self, name: str, *options: str, **environ: str) -> Run:
        return self.train(name, *self.large_options(), *options, **environ)


# ---- The checks: each returns lines of what it found, and raises AssertionError where that is wrong.


def versions(session: Session) -> list[str]:
    lines = [f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"]
    if session.cpu:
        return [*lines, "needs a GPU: its name and driver"]
    assert torch.cuda.is_available(), f"torch sees no GPU; {lines[0]}"
    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    lines.append(f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, NCCL {nccl}")
    return [*lines, *subprocess.run(query, capture_output=True, text=True).stdout.splitlines()]


def sanitizer(session: Session) -> list[str]:
    tool = shutil.which("compute-sanitizer")
    if session.cpu or not tool:
        return [
            "needs a GPU" if session.cpu else "left out: compute-sanitizer is not installed (CUDA toolkit)"
        ]
    script = str(REPO / "benchmarks" / "gpu_kernels.py")
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        script,
        "attention",
        "--one",
    ]
    done = subprocess.run(command, env=session.environ, capture_output=True, text=True, timeout=20 * MINUTES)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]


def determinism(session: Session) -> list[str]:
    once, again = session.deterministic(), session.deterministic("deterministic again")
    for first, second in zip(untimed(once.rows), untimed(again.rows)):
        assert first == second, f"step {first['step']} differs: {first}, {second}"
    first, last = once.rows[0]["loss"], once.rows[-1]["loss"]
    assert last < first, f"the loss does not fall: {first:.4f} at step 1, {last:.4f} at step {session.steps}"
    free = session.train("free", *session.debug_options())
    speeds = [sorted(row["tps"] for row in run.rows)[session.steps // 2] for run in (once, free)]
    return [
        f"{session.steps} steps twice, bit for bit equal; loss {first:.4f} to {last:.4f}",
        f"tokens a second (median): {speeds[0]:,.0f} deterministic, {speeds[1]:,.0f} without",
    ]


def contexts() -> list[str]:
    """Processes on the GPUs, a line for each process and GPU."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[:-1]


def kill_and_resume(session: Session) -> list[str]:
    """A run on the last GPU: should one of its threads use the first one, nvidia-smi shows it there."""
    undisturbed, folder = session.deterministic(), session.place / "killed"
    options = [*session.debug_options(), "--debug.deterministic", f"--job.dump_folder={folder}"]
    options += [
        "--checkpoint.enable",
        f"--checkpoint.interval={session.save}",
        "--checkpoint.async_mode=async",
    ]
    place = {} if session.cpu else {"LOCAL_RANK": str(torch.cuda.device_count() - 1)}
    before = [] if session.cpu else contexts()
    rows, saved = folder / "metrics.jsonl", folder / "checkpoint" / f"step-{session.save}"
    with open(session.place / "killed.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(RECIPE), *options],
            cwd=REPO,
            env=session.environ | place,
            stdout=log,
            stderr=log,
        )
        try:
            while not saved.exists() or rows.read_text().count("\n") < session.kill:
                words = (session.place / "killed.log").read_text()[-3000:]
                assert process.poll() is None, f"the run ended before it could be killed: {words}"
                time.sleep(0.01)
            new = [] if session.cpu else [line for line in contexts() if line not in before]
        finally:
            process.kill()
            process.wait()
    assert len(new) <= 1, f"one process has contexts on several GPUs: {new}"
    resumed = session.python(str(RECIPE), *options, **place)
    output = resumed.stdout + resumed.stderr
    begins = [f"{BEGINNING} {step + 1}:" for step in range(session.save, session.steps, session.save)]
    assert any(begin in output for begin in begins), f"it did not go on from a checkpoint: {output[-3000:]}"
    assert untimed(rows_of(folder)) == untimed(undisturbed.rows), f"rows differ: see {rows}"
    found = "needs a GPU" if session.cpu else f"{len(new)} (0 where nvidia-smi hides processes)"
    return [
        f"killed after step {session.kill}, resumed: {session.steps} rows bit for bit equal",
        f"contexts on GPUs of the one process: {found}",
    ]


def scalar(run: Run, tag: str) -> float:
    """The largest value of a TensorBoard scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tb")).Reload()
    return max(event.value for event in events.Scalars(tag))


def trace_figures(path: Path) -> str:
    """Idle time between the kernels of a profiled step, and how often the host waited for the device."""
    events = json.loads(path.read_text())["traceEvents"]
    kernels = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel")
    waits = sum(e.get("cat") == "cuda_runtime" and "Synchronize" in e["name"] for e in events)
    gaps, end = [], kernels[0][1] if kernels else 0
    for start, stop in kernels:
        gaps.append(start - end)
        end = max(end, stop)
    long = [gap for gap in gaps if gap > 200]  # microseconds
    return (
        f"profiled step: {len(kernels):,} kernels, {len(long)} gaps above 0.2 ms, {sum(long) / 1000:.1f} ms"
        f" in all, {waits} waits of the host"
    )


def large_model(session: Session) -> list[str]:
    lines = []
    for k, profiling in ((1, []), (2, ["--profiling.enable_profiling", "--profiling.profile_freq=5"])):
        options = [f"--chunkflow.k={k}", *profiling]
        run = session.large(f"large, k = {k}", *options)
        planned = session.python("recipes/plan.py", "--json", "--steps=5", *session.large_options(), *options)
        predicted = json.loads(planned.stdout.splitlines()[-1])["memory"]["total_gib"]
        allocated, reserved = (scalar(run, f"memory/max_{name}(GiB)") for name in ("active", "reserved"))
        retries = scalar(run, "memory/num_alloc_retries")
        row = run.rows[-1]
        line = (
            f"k = {k}: {row['seconds']:.2f} s a step, {row['tps']:,.0f} tokens/s,"
            f" {row['mfu_percent']:.0f} % MFU; {allocated:.2f} GiB allocated, predicted {predicted:.2f};"
            f" {reserved - allocated:.2f} GiB reserved and unused; {retries:.0f} retries of the allocator"
        )
        if not session.cpu:
            assert abs(allocated / predicted - 1) <= 0.1 and not retries, line
        lines.append(line)
    lines.append(trace_figures(run.folder / "profile_traces" / "iteration_5" / "rank0_trace.json"))
    return [*lines, "needs a GPU: comparison of memory"] if session.cpu else lines


def same_loss(session: Session) -> list[str]:
    base = session.large("large, k = 1", "--chunkflow.k=1")
    backend = ["--compile.backend=eager"] if session.cpu else []
    lines = []
    for name, options, environ in (
        ("compile", ["--compile.enable", *backend], {"TORCH_LOGS": "recompiles"}),
        ("selective", ["--activation_checkpoint.mode=selective"], {}),
        ("full", ["--activation_checkpoint.mode=full"], {}),
    ):
        run = session.large(name, "--chunkflow.k=1", *options, **environ)
        difference = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(run.rows, base.rows))
        ratio, change = (run.rows[-1][key] / base.rows[-1][key] for key in ("seconds", "memory_gib"))
        line = f"{name}: loss differs by {difference:.1e}, {ratio:.2f} x the time, {change:.2f} x the memory"
        if name == "compile":
            line += f", {run.log.count('Recompiling function')} recompilations in {len(run.rows)} steps"
        assert difference <= 1e-3, line
        lines.append(line)
    return lines


def generation(session: Session) -> list[str]:
    run = session.train("saved", *session.debug_options(), "--checkpoint.enable")
    prompt, sizes = session.place / "prompt.txt", (16, 64) if session.cpu else (512, 4096)
    source = Path(argparse.__file__).read_text()  # Python, as the model was trained on
    prompt.write_text(source[: 300 if session.cpu else 60_000])
    answers, lines = [], []
    for size in sizes:
        options = ["--job.config_file", str(run.folder / "config.toml"), f"--chunkflow.chunk_size={size}"]
        options += ["--checkpoint", str(run.folder / "checkpoint" / f"step-{session.steps}")]
        options += [
            "--prompt-file",
            str(prompt),
            "--temperature=0",
            f"--max-new-tokens={8 if session.cpu else 64}",
        ]
        done = session.python("recipes/generate.py", *options)
        answers.append(done.stdout)
        lines.append(f"chunks of {size}: {done.stderr.splitlines()[-1]}")
    first, second = answers
    same = len(os.path.commonprefix(answers))
    assert first == second, f"texts part after {same} of {len(first)} characters: {first!r}, {second!r}"
    return [*lines, f"equal texts of {same} characters"]


CHECKS: dict[int, tuple[str, Callable[[Session], list[str]]]] = {
    1: ("versions", versions),
    2: ("attention in chunks against fp64", lambda s: gpu_kernels.attention(s.device, s.cpu)),
    3: ("a model in chunks against fp64", lambda s: gpu_kernels.model(s.device, s.cpu)),
    4: ("memory accesses", sanitizer),
    5: ("the debug recipe, deterministic", determinism),
    6: ("kill and resume", kill_and_resume),
    7: ("speed", lambda s: gpu_kernels.speed(s.device, s.cpu)),
    8: ("four layers of 7B: memory as predicted", large_model),
    9: ("compile and activation checkpointing", same_loss),
    10: ("generation", generation),
}


def report(results: list[tuple[int, str, list[str], float]], cpu: bool) -> str:
    """The results as Markdown."""
    name = platform.processor() or platform.machine()
    if not cpu and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    lines = [
        f"# First hour on {name}{' (smoke test, no GPU used)' if cpu else ''}, {date.today()}",
        "",
        *facts(sys.argv[1:]),
        "",
        "| check | result | seconds | found |",
        "|---|---|---|---|",
    ]
    for number, outcome, found, seconds in results:
        cell = "<br>".join(found).replace("|", "/").replace("\n", "<br>")
        lines.append(f"| {number}. {CHECKS[number][0]} | {outcome} | {seconds:.0f} | {cell} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="a smoke test of this script")
    parser.add_argument("--only", type=int, nargs="+", choices=CHECKS, default=list(CHECKS), metavar="N")
    keeps = "keep the results in this folder, or in this file (gpu_results.md)"
    default = Path("gpu_results.md")
    parser.add_argument("--markdown", type=Path, default=default, metavar="PATH", help=keeps)
    arguments = parser.parse_args()
    output = file_of(arguments.markdown, "gpu")
    output.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a run that is under way ends, too
    results = []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(arguments.cpu, Path(folder))
        for number in arguments.only:
            title, check = CHECKS[number]
            print(f"{number}. {title}", flush=True)
            start = time.perf_counter()
            try:
                outcome, found = "ok", check(session)
            except Exception as error:  # whatever it is, it is the result
                outcome, found = "FAILED", [f"{type(error).__name__}: {error}", MEANINGS[number]]
            results.append((number, outcome, found, time.perf_counter() - start))
            print("\n".join(f"   {line}" for line in found), flush=True)
            output.write_text(report(results, arguments.cpu))
            if outcome == "FAILED":
                raise SystemExit(f"check {number} failed; the results so far are in {output}")
    print(f"all passed; the results are in {output}")


if __name__ == "__main__":
    main()
