"""Kills a run again and again, and compares what it comes to with a run that nobody touched: bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

from tests.helpers.processes import RECIPE, environment, rows_of, small_assets, start, untimed, write_rows

LAYOUTS = {
    "one process": (1, []),
    "two ranks": (2, []),
    "two stages": (2, ["--parallelism.pipeline_parallel_degree=2"]),
    "two stages x two ranks": (4, ["--parallelism.pipeline_parallel_degree=2"]),
}


def outcome(folder: Path, steps: int) -> tuple[list, list, dict]:
    """What must be equal: rows but for timing, ledgers, and the last checkpoint's tensors by checksum."""
    manifest = json.loads((folder / "checkpoint" / f"step-{steps}" / "manifest.json").read_text())
    return (
        untimed(rows_of(folder)),
        [manifest["ledger"], manifest["ledger_by_source"]],
        {name: file for name, file in manifest["files"].items() if name != ".metadata"},
    )


class KillLoop:
    """`data`: options that name the data, in place of a small file."""

    def __init__(self, place: Path, steps: int, seed: int = 0, data: list[str] | None = None):
        self.place, self.steps, self.random = place, steps, random.Random(seed)
        self.environ = environment(place)
        rows = [100, 20, 64, 5, 70, 31, 7, 12, 1, 48]
        path = "" if data else write_rows(place / "rows.jsonl", rows)
        self.data = data or ["--training.dataset=jsonl", f"--training.dataset_path={path}"]
        self.model = small_assets(place / "model")
        self.kills = self.in_saves = 0

    def start(self, name: str, folder: Path, mode: str):
        processes, options = LAYOUTS[name]
        settings = [
            f"--job.dump_folder={folder}",
            self.model,
            *self.data,
            "--training.global_batch_size=3",
            f"--training.steps={self.steps}",
            "--lr_scheduler.warmup_steps=2",
            "--chunkflow.chunk_size=32",
            "--metrics.log_freq=1",
            "--metrics.no_enable_tensorboard",
            "--checkpoint.enable",
            "--checkpoint.interval=1",
            "--checkpoint.keep_latest_k=2",
            f"--checkpoint.async_mode={mode}",
            *options,
        ]
        return start(RECIPE, settings, self.environ, folder.with_suffix(".log"), processes)

    def finish(self, name: str, folder: Path) -> tuple:
        job = self.start(name, folder, "disabled")
        statuses = job.wait(240)
        if any(statuses):
            raise AssertionError(
                f"{name}: statuses {statuses}\n{folder.with_suffix('.log').read_text()[-3000:]}"
            )
        return outcome(folder, self.steps)

    def disturbed(self, name: str, folder: Path, kills: int) -> tuple:
        """The outcome of a run that got so many kills, each at a random moment within a few steps of its
        start or of the last one."""
        for kill in range(kills):
            rows = folder / "metrics.jsonl"
            begun = rows.read_text().count("\n") if rows.exists() else 0
            if begun >= self.steps - 3:  # it has come too far to be killed on its way
                shutil.rmtree(folder)
                begun = 0
            job = self.start(name, folder, ("disabled", "async")[kill % 2])
            target, deadline = begun + self.random.choice([0, 1, 1, 2]), time.monotonic() + 120
            while (rows.read_text().count("\n") if rows.exists() else 0) < target and job.poll() is None:
                if time.monotonic() > deadline:
                    raise AssertionError(
                        f"{name} does not get on\n{folder.with_suffix('.log').read_text()[-3000:]}"
                    )
                time.sleep(0.01)
            time.sleep(self.random.uniform(0, 0.5))
            job.kill()
            self.kills += 1
            self.in_saves += any(folder.glob("checkpoint/step-*.saving"))
        return self.finish(name, folder)

    def run(self, name: str, kills: int) -> None:
        slug = name.replace(" ", "_")
        expected = self.finish(name, self.place / f"{slug}_undisturbed")
        got = self.disturbed(name, self.place / slug, kills)
        for what, ours, theirs in zip(
            ("rows of metrics.jsonl", "ledgers", "tensors of the last checkpoint"), got, expected
        ):
            if ours != theirs:
                raise AssertionError(f"{name}: other {what} after {kills} kills:\n{ours}\n{theirs}")
