"""Global batches -> plans -> chunk tensors of this rank, made while the step before is still running.

Every rank walks the same order of sequences and builds the same plan from their lengths; it then reads only
the tokens of its own sequences. The data state is therefore one number, the same on all ranks: the sequences
passed so far.
"""

from __future__ import annotations

import functools
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields

import torch

from chunkflow.execution.loss import IGNORE
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.planner import Plan, PlanSettings, plan_step


@dataclass
class Ledger:
    """Tokens of all ranks since the start of the run: read = trained + masked + truncated + dropped.

    `masked` tokens are inputs without a target of their own: masked by a label, or the first of a sequence.
    """

    read: int = 0
    trained: int = 0
    masked: int = 0
    truncated: int = 0
    dropped: int = 0

    def add(self, other: Ledger) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name):,}" for field in fields(self))


@dataclass
class StepData:
    """One optimizer step, as the ranks of one replica see it."""

    plan: Plan
    rows: list[int]  # of the dataset: which sequences these are, in the order that the plan's segments count
    lengths: list[int]  # their tokens
    chunks: list[list[ChunkTensors]]  # of this replica: [group][chunk]
    targets: int  # supervised tokens of the global batch
    own_targets: int  # of this replica's share of it
    ledger: Ledger  # of this step alone
    cursor: int  # sequences passed when this step is done
    epoch: int


class ChunkDataLoader:
    """Iterates over steps, without end: past the end of the data a new epoch begins, shuffled anew. With
    `once` (validation) it ends there: every sequence comes once, and the last step may have fewer.

    `overlong` says what becomes of sequences longer than `seq_len` tokens: "error" (ValueError here),
    "truncate" or "drop". `replica`: which data-parallel replica to read for; the ranks of its pipeline read
    the same chunks. `make_plan` is `plan_step` with the settings, in the loader's thread, unless given.
    """

    def __init__(
        self,
        dataset,
        settings: PlanSettings,
        *,
        replica: int,
        global_batch_size: int,
        seq_len: int,
        overlong: str,
        shuffle: bool,
        seed: int,
        make_plan: Callable[[list[int]], Plan] | None = None,
        once: bool = False,
    ):
        self.dataset, self.replica = dataset, replica
        self.make_plan = make_plan or functools.partial(plan_step, settings=settings, replicas=[replica])
        self.global_batch_size, self.seq_len, self.overlong = global_batch_size, seq_len, overlong
        self.shuffle, self.seed = shuffle, seed
        self.ledger = Ledger()
        self.cursor = 0  # sequences passed by the steps that were handed out
        self._waited = 0.0
        self.notice = self._check_lengths()  # what the overlong policy did, as a sentence; "" if nothing
        self._order: tuple[int, list[int]] = (-1, [])
        self.end = math.inf  # of the cursor
        if once:  # a step with nothing but dropped sequences does not come
            self.end = next(
                end for end in range(len(dataset), 0, -1) if not self._dropped(self._row(end - 1))
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is trained, ever."""
        if self.overlong == "drop":
            return max(length for length in self.dataset.lengths if length <= self.seq_len)
        return min(max(self.dataset.lengths), self.seq_len)

    def _check_lengths(self) -> str:
        lengths = self.dataset.lengths
        overlong = [index for index, length in enumerate(lengths) if length > self.seq_len]
        if not overlong:
            return ""
        first, excess = overlong[0], sum(lengths[index] for index in overlong)
        if self.overlong == "error":
            raise ValueError(
                f"{self.dataset.source(first)}: {lengths[first]:,} tokens, but training.seq_len admits"
                f" {self.seq_len:,} ({len(overlong):,} sequences of {len(lengths):,} are longer, the longest"
                f" has {max(lengths):,} tokens): raise"
                ' training.seq_len, or set training.overlong to "truncate" or "drop"'
            )
        if self.overlong == "drop":
            if len(overlong) == len(lengths):
                raise ValueError(
                    f"all {len(lengths):,} sequences are longer than training.seq_len = {self.seq_len:,} and"
                    " training.overlong ="
                    f' "drop" leaves none: raise training.seq_len to at least {min(lengths):,}'
                )
            return f"dropped {len(overlong):,} sequences ({excess:,} tokens)"
        return f"truncated {len(overlong):,} sequences ({excess - len(overlong) * self.seq_len:,} tokens)"

    def __iter__(self) -> Iterator[StepData]:
        """Steps from the cursor on. One worker thread stays one step ahead; what it raises is raised here."""
        ready: queue.Queue = queue.Queue(maxsize=1)
        stopped = threading.Event()

        def work():
            cursor = self.cursor
            try:
                while not stopped.is_set() and cursor < self.end:
                    step = self.step_at(cursor)
                    cursor = step.cursor
                    ready.put(step)
                ready.put(None)
            except BaseException as error:  # handed to the step loop, which stops the run
                ready.put(error)

        worker = threading.Thread(target=work, name="chunk-dataloader", daemon=True)
        worker.start()
        try:
            while True:
                start = time.perf_counter()
                step = ready.get()
                self._waited += time.perf_counter() - start
                if isinstance(step, BaseException):
                    raise step
                if step is None:
                    return
                self.cursor = step.cursor
                self.ledger.add(step.ledger)
                yield step
        finally:
            stopped.set()
            while worker.is_alive():  # it must not be inside torch when the interpreter ends
                with suppress(queue.Empty):
                    ready.get_nowait()  # a worker that waits for room sees the event then
                worker.join(0.01)

    @property
    def identity(self) -> dict[str, object]:
        """What the cursor's meaning depends on: the data, and its order."""
        return self.dataset.identity | {"training.shuffle": self.shuffle, "debug.seed": self.seed}

    def restore(self, cursor: int, ledger: dict[str, int]) -> None:
        """Goes on after `cursor` sequences, with the ledger of those: before iteration."""
        self.cursor, self.ledger = cursor, Ledger(**ledger)

    def take_wait(self) -> float:
        """Seconds that the step loop has waited for data since it last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def batch_at(self, cursor: int) -> tuple[list[int], list[int], Ledger, int]:
        """The global batch that begins after `cursor` sequences: rows of the dataset, their tokens, what was
        read for it (without what is trained and masked of it), and the cursor behind it."""
        dataset, ledger = self.dataset, Ledger()
        rows, lengths = [], []
        while len(rows) < self.global_batch_size and cursor < self.end:
            row = self._row(cursor)
            cursor += 1
            length = dataset.lengths[row]
            ledger.read += length
            if self._dropped(row):
                ledger.dropped += length
                continue
            rows.append(row)
            lengths.append(min(length, self.seq_len))
            ledger.truncated += length - lengths[-1]
        return rows, lengths, ledger, cursor

    def step_at(self, cursor: int) -> StepData:
        """The step that begins after `cursor` sequences: depends on nothing else."""
        rows, lengths, ledger, cursor = self.batch_at(cursor)
        supervised = [self.dataset.supervised(row, length) for row, length in zip(rows, lengths)]
        ledger.trained = sum(supervised)
        ledger.masked = sum(lengths) - ledger.trained
        plan = self.make_plan(lengths)
        segments = (
            s for group in plan.groups[self.replica] for chunk in group.chunks for s in chunk.segments
        )
        own = sorted({segment.sequence for segment in segments})
        return StepData(
            plan=plan,
            rows=rows,
            lengths=lengths,
            chunks=self._tensors(plan, rows, lengths, own),
            targets=ledger.trained,
            own_targets=sum(supervised[sequence] for sequence in own),
            ledger=ledger,
            cursor=cursor,
            epoch=(cursor - 1) // len(self.dataset),
        )

    def _dropped(self, row: int) -> bool:
        return self.overlong == "drop" and self.dataset.lengths[row] > self.seq_len

    def _row(self, cursor: int) -> int:
        """Which row of the dataset is the cursor-th sequence of the run."""
        epoch, place = divmod(cursor, len(self.dataset))
        if not self.shuffle:
            return place
        if self._order[0] != epoch:
            order = list(range(len(self.dataset)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = epoch, order
        return self._order[1][place]

    def _tensors(
        self, plan: Plan, rows: list[int], lengths: list[int], own: list[int]
    ) -> list[list[ChunkTensors]]:
        tokens, targets = {}, {}
        for sequence in own:
            ids, labels = self.dataset.row(rows[sequence], lengths[sequence])
            # The one shift: position t is to predict token t + 1. It happens on the whole sequence, before
            # any cut.
            tokens[sequence], targets[sequence] = ids, torch.cat([labels[1:], labels.new_tensor([IGNORE])])
        groups = []
        for group in plan.groups[self.replica]:
            chunks = []
            for index, chunk in enumerate(group.chunks):
                spans = [(s.sequence, slice(s.start, s.start + s.length)) for s in chunk.segments]
                chunks.append(
                    ChunkTensors(
                        chunk,
                        index,
                        tokens=torch.cat([tokens[sequence][span] for sequence, span in spans]),
                        labels=torch.cat([targets[sequence][span] for sequence, span in spans]),
                        positions=torch.cat([torch.arange(span.start, span.stop) for _, span in spans]),
                    )
                )
            groups.append(chunks)
        return groups
