"""Runs recipes and functions in other processes, each with a time limit, and reads the files of a run.

Processes are forked from a server that has imported what recipes import, which saves seconds each time. As a
program this file is that server; `start` talks to it. What run_train.sh adds to a recipe is tested with
run_train.sh.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).parent.parent.parent
RECIPE = REPO / "recipes" / "finetune.py"
PRELOADED = [
    "torch.distributed.checkpoint", "torch.distributed.pipelining", "torch.utils.tensorboard",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "recipes.finetune", "recipes.dpo",
]  # fmt: skip
MODEL = "--model.name", "--model.flavor", "--model.hf_assets_path"
TIMING = {"seconds", "tps", "tflops", "mfu_percent", "memory_gib"}  # what two equal runs may differ in


def in_process(recipe, monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Status, stdout and stderr of a recipe's `main` in this process."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    try:
        recipe.main()
        status = 0
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


# ---- this side: asks the server

_server: subprocess.Popen | None = None


def _ask(**question):
    """One server for all tests of this process. It ends, and its forks with it, when this process does."""
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.processes"],
            cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(lambda: (_server.stdin.close(), _server.wait(10)))
    print(json.dumps(question), file=_server.stdin, flush=True)
    return json.loads(_server.stdout.readline())


class Job:
    """Processes that `start` has started."""

    def __init__(self, pids: list[int]):
        self.pids = pids

    def statuses(self) -> list[int | None]:
        """Exit statuses (negative: of signals), None for a process that still runs."""
        return _ask(pids=self.pids)

    def poll(self) -> list[int] | None:
        """Exit statuses of all, or None while one runs."""
        statuses = self.statuses()
        return None if None in statuses else statuses

    def wait(self, seconds: float, until_failure: bool = False) -> list[int | None]:
        """Exit statuses when all have ended, or with `until_failure` when one has failed. AssertionError after
        `seconds`. Processes that still run then are killed."""
        deadline = time.monotonic() + seconds
        try:
            while None in (statuses := self.statuses()):
                if until_failure and any(statuses):
                    break
                assert time.monotonic() < deadline, f"processes {self.pids} did not end in {seconds} s"
                time.sleep(0.02)
            return statuses
        finally:
            self.kill()

    def signal(self, number: int) -> None:
        for pid, status in zip(self.pids, self.statuses()):
            if status is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL for all, and waits until they are gone."""
        self.signal(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)


def start(
    program: str | Path,
    arguments: list[str],
    environ: dict[str, str],
    log: Path,
    processes: int = 1,
    folder: Path = REPO,
) -> Job:
    """Like subprocess.Popen, of one or several ranks of a recipe or of a function "module:name", whose arguments
    are then the names of pickle files: of what it is called with, and for each rank of what it returns.

    `environ` is all of the environment; several processes get torchrun's variables, as functions always do.
    They run in `folder`, and both output streams of all go to `log`.
    """
    environs = [environ]
    if processes > 1 or ":" in str(program):
        with socket.create_server(("localhost", 0)) as probe:
            port = probe.getsockname()[1]
        environs = [
            environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            for rank in range(processes)
        ]
    return Job(_ask(argv=[str(program), *arguments], environs=environs, log=str(log), folder=str(folder)))


def run_ranks(function: Callable, world_size: int, *arguments, seconds: float = 180) -> list:
    """What `function(*arguments)`, a function of a module, returned on each rank. RuntimeError with the output of
    all ranks if one raised, AssertionError if time ran out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments").write_bytes(pickle.dumps(arguments))
        answers, log = [folder / f"answer_{rank}" for rank in range(world_size)], folder / "log"
        files = [str(folder / "arguments"), *map(str, answers)]
        job = start(f"{function.__module__}:{function.__name__}", files, dict(os.environ), log, world_size)
        try:
            statuses = job.wait(seconds, until_failure=True)
        except AssertionError as late:
            raise AssertionError(f"{late}\n{log.read_text()}") from None
        if any(statuses):
            raise RuntimeError(f"exit statuses of the ranks: {statuses}\n{log.read_text()}")
        return [pickle.loads(answer.read_bytes()) for answer in answers]


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    """One thread a process, a token cache of its own, nothing of an outer run."""
    outer = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NGPU")
    }
    settings = {"OMP_NUM_THREADS": "1", "CHUNKFLOW_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPO)}
    return outer | settings | changes


def run(
    tmp_path: Path,
    *overrides: str,
    processes: int = 1,
    seconds: int = 240,
    forked: bool = False,
    **environ: str,
) -> subprocess.CompletedProcess:
    """A recipe (TRAIN_FILE, recipes/finetune.py) in a fork, or run_train.sh for several processes; `forked`:
    these, too, in forks. Output as text, both streams in one."""
    if forked or processes == 1:
        recipe, log = environ.pop("TRAIN_FILE", str(RECIPE)), tmp_path / "forked.log"
        log.unlink(missing_ok=True)
        job = start(recipe, list(overrides), environment(tmp_path, **environ), log, processes)
        status = max(job.wait(seconds), key=abs)
        return subprocess.CompletedProcess([recipe, *overrides], status, log.read_text())
    # No --job.config_file: the empty file sets nothing.
    (tmp_path / "empty.toml").touch()
    environ = {"NGPU": str(processes), "CONFIG_FILE": str(tmp_path / "empty.toml")} | environ
    try:
        return subprocess.run(
            [str(REPO / "run_train.sh"), *overrides],
            env=environment(tmp_path, **environ), timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    finally:
        end_processes(str(tmp_path))  # torchrun's, should it have run out of time


def train(
    tmp_path: Path, name: str, data: Path, *overrides: str, processes: int = 1, **environ: str
) -> list[dict]:
    """Rows of metrics.jsonl of a short run on `data`, every step logged, of a small model and without
    TensorBoard's files where `overrides` do not say otherwise: most of the time would be theirs. AssertionError
    with the output where it fails."""
    folder = tmp_path / name
    if not any(str(option).startswith(MODEL) for option in overrides):
        overrides = small_assets(tmp_path / "small_model", num_hidden_layers=4), *overrides
    settings = [
        f"--job.dump_folder={folder}", "--training.dataset=jsonl", f"--training.dataset_path={data}",
        "--training.global_batch_size=6", "--training.steps=4", "--lr_scheduler.warmup_steps=2",
        "--chunkflow.chunk_size=64", "--metrics.log_freq=1", "--metrics.no_enable_tensorboard", *overrides,
    ]  # fmt: skip
    done = run(tmp_path, *settings, processes=processes, forked=True, **environ)
    assert done.returncode == 0, done.stdout[-3000:]
    return rows_of(folder)


def patched_recipe(tmp_path: Path, before_step: str = "", before_clipping: str = "") -> Path:
    """A script that runs recipes/finetune.py with statements put in its way: `before_step` is executed when a step
    begins, `before_clipping` when its `gradients` on this rank (a list of tensors) are complete. They can use
    `step`, `rank`, `ranks`, `checkpoints` and `folder`, the run's job.dump_folder."""
    path = tmp_path / f"recipe_{len(list(tmp_path.glob('recipe_*')))}.py"
    statements = (textwrap.indent(code or "pass", "    ") for code in (before_step, before_clipping))
    path.write_text(PATCHED_RECIPE.format(str(RECIPE), *statements))
    return path


PATCHED_RECIPE = """
import math, os, resource, runpy, shutil, signal, sys, threading, time
from pathlib import Path

import torch
import torch.distributed as dist

recipe = runpy.run_path({0!r}, run_name="recipe")
folder = Path(next(word.partition("=")[2] for word in sys.argv if word.startswith("--job.dump_folder=")))
make_checkpoints = recipe["Checkpoints"].__init__
collect, total_norm = recipe["GarbageCollection"].run, torch.nn.utils.get_total_norm
step = None


def remember(self, *arguments):
    global checkpoints
    checkpoints = self
    make_checkpoints(self, *arguments)


def begin_step(self, number):
    global step
    step, rank, ranks = number, dist.get_rank(), dist.get_world_size()
{1}
    collect(self, step)


def clip(tensors, *more, **options):
    gradients, rank, ranks = list(tensors), dist.get_rank(), dist.get_world_size()
{2}
    return total_norm(gradients, *more, **options)


recipe["Checkpoints"].__init__ = remember
recipe["GarbageCollection"].run, torch.nn.utils.get_total_norm = begin_step, clip
recipe["record"](recipe["main"])()
"""


# ---- data, and the files of a run


def write_rows(path: Path, lengths: list[int], seed: int = 0, masked: float = 0.2) -> Path:
    """A JSONL of ready tokens: predictable enough to learn from, some labels masked."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for length in lengths:
            start, step = rng.randrange(2048), rng.randrange(1, 4)
            ids = [(start + step * place) % 2048 for place in range(length)]
            labels = [-100 if rng.random() < masked else token for token in ids]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    return path


def small_assets(folder: Path, **changes) -> str:
    """The option for a model of some thousand parameters: for runs of many steps, saves or starts. `changes`: of
    its config.json."""
    sizes = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 2048, "max_position_embeddings": 8192, **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    return f"--model.hf_assets_path={folder}"


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def wait_for_rows(folder: Path, count: int, running: Callable[[], bool], seconds: float = 120) -> None:
    """Returns when metrics.jsonl has so many rows; AssertionError after `seconds`, or when the run has ended."""
    rows, deadline = folder / "metrics.jsonl", time.monotonic() + seconds
    while (rows.read_text().count("\n") if rows.exists() else 0) < count:
        assert time.monotonic() < deadline and running(), "the run does not get on"
        time.sleep(0.02)


def assert_same_curves(first: list[dict], second: list[dict], loss: float, grad_norm: float) -> None:
    """Losses and gradient norms of each step are equal to these relative tolerances."""
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for a, b in zip(first, second):
        for key, tolerance in (("loss", loss), ("grad_norm", grad_norm)):
            assert abs(a[key] - b[key]) <= tolerance * abs(b[key]), (a["step"], key, a[key], b[key])


# ---- processes that others started


def processes_of(argument_part: str) -> dict[int, list[str]]:
    """Environments of the processes with that text in their arguments. torchrun's workers are sessions of
    their own."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if argument_part in (folder / "cmdline").read_text():
                found[int(folder.name)] = (folder / "environ").read_text().split("\0")
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found


def end_processes(argument_part: str) -> None:
    for pid in processes_of(argument_part):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- the server


def serve() -> None:
    """Answers questions, a line of JSON each, until its input ends; then it kills what still runs."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # forks need not look at what they inherit
    ended: dict[int, int] = {}
    running: set[int] = set()
    answers = os.fdopen(os.dup(1), "w")
    try:
        for line in sys.stdin:
            question = json.loads(line)
            if "argv" in question:
                answer = []
                for environ in question["environs"]:
                    pid = os.fork()
                    if pid == 0:
                        become(question["argv"], environ, question["log"], question["folder"])
                    answer.append(pid)
                    running.add(pid)
            else:
                for pid in running & set(question["pids"]):
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        running.discard(pid)
                        ended[pid] = os.waitstatus_to_exitcode(status)
                answer = [ended.get(pid) for pid in question["pids"]]
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def become(argv: list[str], environ: dict[str, str], log: str, folder: str) -> None:
    """Turns this fork into `python argv...`, or into a rank that calls a function. It ends as that does, but
    does not tidy up modules, which would take a second."""
    status = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.stdin = open(0, closefd=False)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        if environ.get("TORCH_COMPILE_DISABLE") == "1":  # is read when torch._dynamo is imported
            sys.modules["torch._dynamo.config"].disable = True
        if ":" in argv[0]:
            call(*argv)
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()  # waits for threads, as the interpreter does
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def call(function: str, arguments: str, *answers: str) -> None:
    import torch.distributed as dist

    module, _, name = function.partition(":")
    rank = int(os.environ["RANK"])
    try:
        answer = getattr(importlib.import_module(module), name)(*pickle.loads(Path(arguments).read_bytes()))
        Path(answers[rank]).write_bytes(pickle.dumps(answer))
    except BaseException:
        print(f"rank {rank}:", file=sys.stderr)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    serve()
