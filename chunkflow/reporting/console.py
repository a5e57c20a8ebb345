"""What a run says beside its step lines: how far it is, and a table at its end."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from chunkflow.planning.planner import Plan

BAR = 30  # characters


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def open_terminal() -> TextIO | None:
    """The terminal that a person looks at, None if there is none. Under torchrun standard output is a pipe;
    run_train.sh names the terminal at its end."""
    if sys.stdout.isatty():
        return sys.stdout
    with suppress(OSError):
        return open(os.environ.get("CHUNKFLOW_TERMINAL", ""), "w", encoding="utf-8")
    return None


class Progress:
    """How far a run is, and how long it will still take: from the mean of this process's steps, the first
    one, in which much is set up, aside."""

    def __init__(self, done: int, steps: int, terminal: TextIO | None):
        """`done`: the last step done before, of so many `steps`. On a terminal there is a bar."""
        self.done, self.steps, self.terminal, self.first = done, steps, terminal, done + 1
        self.begin, self.seconds = time.monotonic(), 0.0  # of a step

    def step(self) -> None:
        """A step is done."""
        self.done, now = self.done + 1, time.monotonic()
        self.seconds = (now - self.begin) / max(1, self.done - self.first)
        if self.done == self.first:
            self.begin = now
        if self.terminal:
            filled = BAR * self.done // self.steps
            bar = "█" * filled + "░" * (BAR - filled)
            # The cursor goes back to the start, where the next line of the log, which is longer, begins.
            with suppress(OSError):
                print(f"\r{bar} {self}\033[K\r", end="", file=self.terminal, flush=True)

    @property
    def complete(self) -> bool:
        return self.done == self.steps

    def clear(self) -> None:
        """Takes the bar away."""
        if self.terminal:
            with suppress(OSError):
                print("\r\033[K", end="", file=self.terminal, flush=True)

    def __str__(self) -> str:
        return f"{self.done}/{self.steps}, {duration(self.seconds * (self.steps - self.done))} left"


class Totals:
    """What a run's steps come to, since this process began."""

    def __init__(self, memory_of: Callable[[int], tuple[float, float]] | None = None):
        """`memory_of`: tokens of a sequence -> the GiB that training it takes, in chunks and whole, by
        arithmetic."""
        self.memory_of, self.begin = memory_of, time.monotonic()
        self.steps = self.tokens = self.chunks = self.recomputed = self.longest = 0
        self.slots = self.peak_gib = 0.0
        self.losses: dict[str, tuple[float, float]] = {}  # by name: the first and the last one

    def count(self, plan: Plan) -> None:
        """Adds a step."""
        self.steps += 1
        self.tokens += plan.tokens
        self.chunks += plan.chunks
        self.recomputed += plan.recomputed_chunks
        self.slots += plan.tokens / (1 - plan.padding_percent / 100)
        lengths: dict[int, int] = {}
        for group in (group for groups in plan.groups for group in groups):
            for segment in (segment for chunk in group.chunks for segment in chunk.segments):
                lengths[segment.sequence] = lengths.get(segment.sequence, 0) + segment.length
        self.longest = max(self.longest, *lengths.values())

    def loss(self, name: str, value: float, peak_gib: float) -> None:
        """Adds a logged loss, and the peak memory at that time."""
        self.losses[name] = self.losses.get(name, (value,))[0], value
        self.peak_gib = max(self.peak_gib, peak_gib)

    def rows(self) -> list[tuple[str, str]]:
        """The table: what, and how much."""
        seconds = time.monotonic() - self.begin
        rows = [
            ("steps", f"{self.steps:,} in {duration(seconds)}"),
            ("tokens", f"{self.tokens:,}, {self.tokens / seconds:,.0f} a second"),
        ]
        rows += [(name, f"{first:.4f} -> {last:.4f}") for name, (first, last) in self.losses.items()]
        padding, again = 100 * (1 - self.tokens / self.slots), 100 * self.recomputed / self.chunks
        shares = f"{padding:.1f} % padding, {again:.1f} % computed twice"
        rows += [("chunks", f"{self.chunks:,}, {shares}"), ("peak memory", f"{self.peak_gib:.2f} GiB")]
        rows.append(("longest sequence", f"{self.longest:,} tokens"))
        if self.memory_of:
            chunks, whole = self.memory_of(self.longest)
            rows.append(
                ("what it takes, by arithmetic", f"{chunks:.2f} GiB in chunks, {whole:.2f} GiB whole")
            )
        return rows


def table(rows: list[tuple[str, str]]) -> str:
    """Lines for the console."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"    {name:{width}}  {value}" for name, value in rows)


def markdown(rows: list[tuple[str, str]]) -> str:
    """The same for TensorBoard."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
