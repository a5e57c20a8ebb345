"""Runs recipes as users do, in processes of their own, and reads what they leave."""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.helpers.forks import Forks

REPO = Path(__file__).parent.parent.parent
RECIPE = REPO / "recipes" / "finetune.py"


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    """One thread a process, a cache of its own, nothing of an outer run."""
    outer = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NGPU")
    }
    return (
        outer
        | {"OMP_NUM_THREADS": "1", "CHUNKFLOW_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPO)}
        | changes
    )


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


_forks: Forks | None = None


def forks() -> Forks:
    """One server of forks for all tests of this process; it ends with it."""
    global _forks
    if _forks is None:
        _forks = Forks()
        atexit.register(_forks.close)
    return _forks


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
        statuses = (
            forks()
            .start(recipe, list(overrides), environment(tmp_path, **environ), log, processes)
            .wait(seconds)
        )
        return subprocess.CompletedProcess([recipe, *overrides], max(statuses, key=abs), log.read_text())
    # No --job.config_file: the empty file sets nothing.
    (tmp_path / "empty.toml").touch()
    environ = {"NGPU": str(processes), "CONFIG_FILE": str(tmp_path / "empty.toml")} | environ
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        return subprocess.run(
            [str(REPO / "run_train.sh"), *overrides],
            env=environment(tmp_path, **environ),
            timeout=seconds,
            **pipes,
        )
    finally:
        end_processes(str(tmp_path))  # torchrun's, should it have run out of time


def train(
    tmp_path: Path, name: str, data: Path, *overrides: str, processes: int = 1, **environ: str
) -> list[dict]:
    """Rows of metrics.jsonl of a short run on `data`, every step logged. AssertionError with the output where
    it fails."""
    folder = tmp_path / name
    settings = [
        f"--job.dump_folder={folder}",
        "--training.dataset=jsonl",
        f"--training.dataset_path={data}",
        "--training.global_batch_size=6",
        "--training.steps=4",
        "--lr_scheduler.warmup_steps=2",
        "--chunkflow.chunk_size=64",
        "--metrics.log_freq=1",
        *overrides,
    ]
    done = run(tmp_path, *settings, processes=processes, forked=True, **environ)
    assert done.returncode == 0, done.stdout[-3000:]
    return rows_of(folder)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_curves(first: list[dict], second: list[dict], loss: float, grad_norm: float) -> None:
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for a, b in zip(first, second):
        assert abs(a["loss"] - b["loss"]) <= loss * abs(b["loss"]), (a["step"], a["loss"], b["loss"])
        assert abs(a["grad_norm"] - b["grad_norm"]) <= grad_norm * b["grad_norm"], (
            a["step"],
            a["grad_norm"],
            b["grad_norm"],
        )
