"""Global batches -> plans -> chunk tensors of this rank, made while the step before is still running.

Every rank follows the same order of sequences and builds the same plan from their lengths, then reads only
the tokens that its replica needs. The data state is one number, equal on all ranks: the sequences passed. Of
preference data it is pairs that are shuffled, counted, and too long: both answers are in the same step.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from chunkflow.data.mixture import MixedDataset
from chunkflow.data.order import Order
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.chunks import IGNORE, Chunk, Group
from chunkflow.planning.planner import Plan, PlanSettings, plan_step


@dataclass
class Ledger:
    """Tokens of all ranks since the start of the run: read = trained + masked + truncated + dropped.

    `masked` tokens are inputs only, not targets: the label is -100 or has the weight 0, or they are the first
    of a sequence.
    """

    read: int = 0
    trained: int = 0
    masked: int = 0
    truncated: int = 0
    dropped: int = 0

    def add(self, other: Ledger) -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def __str__(self) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in vars(self).items())

    @classmethod
    def total(cls, ledgers: list[Ledger]) -> Ledger:
        """Of all sources together."""
        total = cls()
        for ledger in ledgers:
            total.add(ledger)
        return total


@dataclass
class StepData:
    """One optimizer step, as the ranks of one replica see it."""

    plan: Plan
    rows: list[int]  # of the dataset: the sequences of the global batch, by the plan's sequence numbers
    lengths: list[int]  # their tokens
    chunks: list[list[ChunkTensors]]  # of this replica: [group][chunk]
    targets: int  # supervised tokens of the global batch: those of a weight above 0
    # What the loss of each token of a sequence counts, besides the token's own weight: (sequences,) float64.
    # None: all 1.
    sequence_weights: torch.Tensor | None
    weight_sums: list[float]  # of each sequence: what its targets count all together
    denominator: float  # of the loss: what all targets of the global batch count
    own_denominator: float  # the same of this replica's chunks
    ledgers: list[Ledger]  # of this step alone, by source
    cursor: int  # sequences passed when this step is done
    epoch: int
    source_of: list[int]  # a sequence's number in the plan -> that of its source; [] without sources

    @property
    def ledger(self) -> Ledger:
        """Of all sources."""
        return Ledger.total(self.ledgers)


class ChunkDataLoader:
    """Iterates over steps, without end: after the last sequence a new epoch begins, shuffled anew. With
    `once` (validation) it ends after one epoch, and the last step may have fewer sequences. Of a dataset in
    pairs the two sequences of a pair count once.

    `overlong`: what becomes of sequences longer than `seq_len` tokens, "error" (ValueError here), "truncate"
    or "drop". `loss_weighting`: what counts the same in the loss, "token" or "sequence", besides the weights
    that the rows have. `replica`: the data-parallel replica to read for; all ranks of its pipeline read the
    same chunks. `make_plan`: lengths -> plan, in the loader's thread; None: `plan_step` with the settings.
    `pin_memory`: chunks lie in pinned memory, for copies to a GPU.
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
        loss_weighting: str = "token",
        make_plan: Callable[[list[int]], Plan] | None = None,
        once: bool = False,
        pin_memory: bool = False,
    ):
        self.dataset, self.replica = dataset, replica
        self.make_plan = make_plan or functools.partial(plan_step, settings=settings, replicas=[replica])
        self.global_batch_size, self.seq_len, self.overlong = global_batch_size, seq_len, overlong
        self.shuffle, self.seed, self.pin_memory = shuffle, seed, pin_memory
        self.loss_weighting = loss_weighting
        self.pairs = getattr(dataset, "pairs", False)
        self._each = 2 if self.pairs else 1  # sequences that count once
        self.sources = dataset.names if isinstance(dataset, MixedDataset) else []
        counts, weights = [len(dataset)], [1.0]
        if self.sources:
            counts, weights = dataset.counts, dataset.source_weights
        self.order = Order([count // self._each for count in counts], weights, seed, shuffle)
        self.ledgers = [Ledger() for _ in counts]  # by source
        self.cursor = 0  # sequences passed by the steps that were handed out
        self._waited = 0.0
        self.notice = self._check_lengths()  # what `overlong` did, as a sentence; "" if nothing
        self.end = math.inf  # of the cursor
        if once:  # a step with nothing but dropped sequences does not come
            self.end = next(
                end
                for end in range(len(dataset) // self._each, 0, -1)
                if not self._dropped(self.order.row(end - 1))
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is trained."""
        longest = self._longest_each()
        if self.overlong == "drop":
            return max(length for length in longest if length <= self.seq_len)
        return min(max(longest), self.seq_len)

    def _longest_each(self) -> list[int]:
        """Tokens of each sequence, or of the longer one of each pair."""
        lengths = self.dataset.lengths
        return list(map(max, lengths[::2], lengths[1::2])) if self.pairs else lengths

    def _check_lengths(self) -> str:
        lengths, longest = self.dataset.lengths, self._longest_each()
        overlong = [index for index, length in enumerate(longest) if length > self.seq_len]
        if not overlong:
            return ""
        ofwhat = "pairs" if self.pairs else "sequences"
        members = [row for index in overlong for row in self._rows_of(index)]
        tokens = sum(lengths[row] for row in members)
        cut = sum(max(0, lengths[row] - self.seq_len) for row in members)
        if self.overlong == "error":
            first, share = next(row for row in members if lengths[row] > self.seq_len), 100 / sum(lengths)
            raise ValueError(
                f"{self.dataset.source(first)}: {lengths[first]:,} tokens, but training.seq_len admits"
                f" {self.seq_len:,} (longer: {len(overlong):,} of {len(longest):,} {ofwhat}; the longest has"
                f" {max(lengths):,} tokens): raise training.seq_len, or set training.overlong to"
                f' "truncate", which cuts off {cut:,} tokens ({cut * share:.1f} % of all), or to "drop",'
                f" which leaves out {tokens:,} ({tokens * share:.1f} %)"
            )
        counts = Counter(self._source_of(index * self._each) for index in overlong)
        if self.overlong == "drop":
            for source, rows in enumerate(self.order.rows):
                if counts[source] == len(rows):
                    whose = f' of "{self.sources[source]}"' if self.sources else ""
                    raise ValueError(
                        f"all {len(rows):,} {ofwhat}{whose} are longer than training.seq_len ="
                        f' {self.seq_len:,} and training.overlong = "drop" leaves none: raise'
                        f" training.seq_len to at least {min(longest[rows.start : rows.stop]):,}"
                    )
        done, cut = ("dropped", tokens) if self.overlong == "drop" else ("truncated", cut)
        named = [
            f'{counts[source]:,} of "{name}"' for source, name in enumerate(self.sources) if counts[source]
        ]
        by_source = f": {', '.join(named)}" if named else ""
        return f"{done} {len(overlong):,} {ofwhat} ({cut:,} tokens){by_source}"

    def __iter__(self) -> Iterator[StepData]:
        """Steps from the cursor on. A thread prepares the next one meanwhile; its errors are raised here."""
        begin = {}
        if self.pin_memory:  # a new thread's device is the machine's first GPU, and pinning would use it
            begin = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}
        with ThreadPoolExecutor(1, "chunk-dataloader", **begin) as worker:
            upcoming = worker.submit(self.step_at, self.cursor) if self.cursor < self.end else None
            while upcoming:
                start = time.perf_counter()
                step = upcoming.result()
                self._waited += time.perf_counter() - start
                upcoming = worker.submit(self.step_at, step.cursor) if step.cursor < self.end else None
                self.cursor = step.cursor
                for ledger, of_step in zip(self.ledgers, step.ledgers):
                    ledger.add(of_step)
                yield step

    @property
    def identity(self) -> dict[str, object]:
        """All that the sequences, and their order, depend on."""
        return self.dataset.identity | {"training.shuffle": self.shuffle, "debug.seed": self.seed}

    @property
    def ledger(self) -> Ledger:
        """Of all sources."""
        return Ledger.total(self.ledgers)

    @property
    def ledger_by_source(self) -> dict[str, Ledger]:
        """Empty without sources."""
        return dict(zip(self.sources, self.ledgers))

    @property
    def state(self) -> dict[str, object]:
        """What a checkpoint keeps, for `restore`."""
        by_source = {name: dict(vars(ledger)) for name, ledger in self.ledger_by_source.items()}
        return {"cursor": self.cursor, "ledger": vars(self.ledger), "ledger_by_source": by_source}

    def restore(self, state: dict) -> None:
        """Makes the next iteration begin where `state` was taken, from a loader of equal identity."""
        self.cursor, ledgers = state["cursor"], [state["ledger"]]
        if self.sources:
            ledgers = [state["ledger_by_source"][name] for name in self.sources]
        self.ledgers = [Ledger(**ledger) for ledger in ledgers]

    def take_wait(self) -> float:
        """Seconds that the iteration has waited for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def batch_at(self, cursor: int) -> tuple[list[int], list[int], list[Ledger], int]:
        """The global batch that begins after `cursor` sequences: its rows of the dataset, their tokens, its
        ledger by source without trained and masked, and the cursor after it."""
        dataset, ledgers = self.dataset, [Ledger() for _ in self.ledgers]
        rows, lengths = [], []
        while len(rows) < self.global_batch_size * self._each and cursor < self.end:
            index = self.order.row(cursor)
            cursor += 1
            dropped = self._dropped(index)
            for row in self._rows_of(index):
                length, ledger = dataset.lengths[row], ledgers[self._source_of(row)]
                ledger.read += length
                if dropped:
                    ledger.dropped += length
                    continue
                rows.append(row)
                lengths.append(min(length, self.seq_len))
                ledger.truncated += length - lengths[-1]
        return rows, lengths, ledgers, cursor

    def step_at(self, cursor: int) -> StepData:
        """The step that begins after `cursor` sequences; depends on no earlier call."""
        rows, lengths, ledgers, cursor = self.batch_at(cursor)
        counted = [self.dataset.supervised(row, length) for row, length in zip(rows, lengths)]
        for row, length, (trained, _) in zip(rows, lengths, counted):
            ledger = ledgers[self._source_of(row)]
            ledger.trained += trained
            ledger.masked += length - trained
        plan = self.make_plan(lengths)
        groups = plan.groups[self.replica]
        sequences = sorted({s.sequence for group in groups for chunk in group.chunks for s in chunk.segments})
        chunks = self._tensors(groups, {index: (rows[index], lengths[index]) for index in sequences})
        weights, sums = self._weights(rows, [token_weights for _, token_weights in counted])
        return StepData(
            plan,
            rows,
            lengths,
            chunks,
            targets=sum(targets for targets, _ in counted),
            sequence_weights=weights.pin_memory() if weights is not None and self.pin_memory else weights,
            weight_sums=sums,
            denominator=math.fsum(sums),
            own_denominator=math.fsum(_counts(chunk, weights) for group in chunks for chunk in group),
            ledgers=ledgers,
            cursor=cursor,
            epoch=self.order.epoch(cursor - 1),
            source_of=[self._source_of(row) for row in rows] if self.sources else [],
        )

    def _weights(
        self, rows: list[int], token_weights: list[float]
    ) -> tuple[torch.Tensor | None, list[float]]:
        """What each sequence's tokens count, besides their own weights (None: all 1), and all its targets
        together. `token_weights`: the sum over each sequence's targets."""
        weights = [self.dataset.weight(row) if total else 1.0 for row, total in zip(rows, token_weights)]
        if self.loss_weighting == "sequence":  # the mean of its tokens counts what the row does
            weights = [weight / total if total else 1.0 for weight, total in zip(weights, token_weights)]
        sums = [weight * total for weight, total in zip(weights, token_weights)]
        if all(weight == 1 for weight in weights):
            return None, sums
        return torch.tensor(weights, dtype=torch.float64), sums

    def _rows_of(self, index: int) -> range:
        """The dataset's rows of what the order counts as one."""
        return range(index * self._each, (index + 1) * self._each)

    def _dropped(self, index: int) -> bool:
        lengths = (self.dataset.lengths[row] for row in self._rows_of(index))
        return self.overlong == "drop" and max(lengths) > self.seq_len

    def _source_of(self, row: int) -> int:
        """The number of a row's source, 0 without sources."""
        return self.dataset.source_of(row) if self.sources else 0

    def _tensors(self, groups: list[Group], rows: dict[int, tuple[int, int]]) -> list[list[ChunkTensors]]:
        """The tensors of each group's chunks. `rows`: row and tokens of each sequence in them."""
        tokens, labels, weights = {}, {}, {}
        for sequence, (row, length) in rows.items():
            tokens[sequence], aligned, aligned_weights = self.dataset.row(row, length)
            # The one shift: position t is to predict token t + 1. On the whole sequence, before any cut.
            labels[sequence] = torch.cat([aligned[1:], aligned.new_tensor([IGNORE])])
            if self.dataset.weight(row) == 0:
                labels[sequence].fill_(IGNORE)
            if aligned_weights is not None:
                shifted = torch.cat([aligned_weights[1:], aligned_weights.new_zeros(1)])
                labels[sequence][shifted <= 0] = IGNORE
                shifted[labels[sequence] == IGNORE] = 1  # so that weights of 0 and 1 need no products
                if (shifted != 1).any():
                    weights[sequence] = shifted

        def tensors(chunk: Chunk, index: int, shared: bool) -> ChunkTensors:
            spans = [(s.sequence, slice(s.start, s.start + s.length)) for s in chunk.segments]
            weights_T = None
            if any(sequence in weights for sequence, _ in spans):
                ones = torch.ones(max(span.stop for _, span in spans), dtype=torch.float64)
                weights_T = torch.cat([weights.get(sequence, ones)[span] for sequence, span in spans])
            made = ChunkTensors(
                chunk,
                index,
                tokens=torch.cat([tokens[sequence][span] for sequence, span in spans]),
                labels=torch.cat([labels[sequence][span] for sequence, span in spans]),
                positions=torch.cat([torch.arange(span.start, span.stop) for _, span in spans]),
                shared=shared,
                weights=weights_T,
            )
            return made.pin_memory() if self.pin_memory else made

        return [
            [tensors(chunk, index, group.spread is not None) for index, chunk in enumerate(group.chunks)]
            for group in groups
        ]


def _counts(chunk: ChunkTensors, sequence_weights: torch.Tensor | None) -> float:
    """What the chunk's targets count all together."""
    targets, weights = chunk.labels != IGNORE, chunk.weighed(sequence_weights)
    return float(targets.sum() if weights is None else weights[targets].sum())
