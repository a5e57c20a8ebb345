"""The loss of other data while a model trains: [validation], by the same chunks, forward only, exact, and by
position.

Sequences longer than a chunk run chunk after chunk on the K/V of those before, so any length fits, and no
activations are kept. The loss at far positions beside that at near ones shows whether a model makes use of
far context.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from chunkflow.data.dataloader import ChunkDataLoader, StepData
from chunkflow.data.dataset import open_dataset
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.loss import IGNORE
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.reporting.metrics import MetricsLogger

logger = logging.getLogger(__name__)


class LossByPosition:
    """Sums of token losses, and how many there are, in fp64 on the device: a column for positions below 1K,
    4K, 16K, 64K, ...

    A loss belongs to the position of the token that predicts: at position p, p + 1 tokens of its sequence are
    known.
    """

    def __init__(self, longest: int, device: torch.device):
        """`longest`: tokens of the longest sequence there may be."""
        ends = [1024]
        while ends[-1] < longest:
            ends.append(4 * ends[-1])
        self.names = [f"up_to_{end >> 10}K" if end < 1 << 20 else f"up_to_{end >> 20}M" for end in ends]
        self.ends = torch.tensor(ends, device=device)
        self.columns = torch.arange(len(ends), device=device).unsqueeze(1)
        self.figures = torch.zeros(2, len(ends), dtype=torch.float64, device=device)

    def take(self, chunk: ChunkTensors, losses_T: torch.Tensor) -> None:
        inside = torch.bucketize(chunk.positions, self.ends, right=True) == self.columns
        inside &= chunk.labels != IGNORE
        self.figures[0] += torch.where(inside, losses_T, 0).sum(1, dtype=torch.float64)
        self.figures[1] += inside.sum(1)

    def result(self) -> tuple[float, int, dict[str, tuple[float, int]]]:
        """Mean loss (0 without targets) and targets of everything; the same of each range of positions that
        has a target."""
        sums, counts = self.figures.tolist()
        by_position = {
            name: (total / count, int(count)) for name, total, count in zip(self.names, sums, counts) if count
        }
        return sum(sums) / max(sum(counts), 1), int(sum(counts)), by_position


class Validation:
    """What [validation] asks for. Every rank has one, and calls `run` after each step where `due`.

    `settings` and `rank` are those of training's loader; plans are made at the first validation and kept.
    Nothing of training is touched: not its data, nor gradients, nor a random generator. ValueError, a
    sentence, for whatever is wrong with the data.
    """

    def __init__(
        self,
        config,
        settings: PlanSettings,
        rank: int,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        seed: int,
        device: torch.device,
    ):
        training, validation = config.training, config.validation
        self.freq, self.steps, self.last_step, self.device = (
            validation.freq,
            validation.steps,
            training.steps,
            device,
        )
        # Another seed than training's: synthetic sequences are then others, drawn from the same mixture.
        dataset = open_dataset(
            validation.dataset,
            validation.dataset_path,
            tokenizer,
            vocab_size=vocab_size,
            seed=seed + 1,
            section="validation",
        )
        settings = settings._replace(forward_only=True)
        plan = functools.cache(lambda *lengths: plan_step(list(lengths), settings))
        self.loader = ChunkDataLoader(
            dataset,
            settings,
            rank=rank,
            global_batch_size=training.global_batch_size,
            seq_len=training.seq_len,
            overlong=training.overlong,
            shuffle=False,
            seed=seed,
            make_plan=lambda lengths: plan(*lengths),
            once=True,
        )
        logger.info(
            f"Validation data: {len(dataset):,} sequences of {validation.dataset}, {sum(dataset.lengths):,}"
            " tokens, the longest has"
            f" {max(dataset.lengths):,}" + (f"; {self.loader.notice}" if self.loader.notice else "")
        )
        self.longest = min(max(dataset.lengths), training.seq_len)

    def due(self, step: int) -> bool:
        return step % self.freq == 0 or step == self.last_step

    def run(
        self,
        step: int,
        metrics: MetricsLogger,
        models: Iterable[FSDPModule],
        evaluate: Callable[[StepData, Callable[[ChunkTensors, torch.Tensor], None]], object],
    ) -> None:
        """Measures and logs. `evaluate(data, take)` runs this rank's part of a batch and gives `take` every
        chunk of it with the losses of its tokens. `models` are this rank's. A collective: all ranks call."""
        metrics.interrupt()
        total, tokens, targets = LossByPosition(self.longest, self.device), 0, 0
        self.loader.cursor = 0
        for data in islice(self.loader, self.steps if self.steps > 0 else None):
            batch = LossByPosition(self.longest, self.device)
            evaluate(data, batch.take)
            # Over ranks after every batch, as in training: none runs so far ahead that another's collectives
            # time out.
            dist.all_reduce(batch.figures)
            total.figures += batch.figures
            tokens += data.plan.tokens
            targets += data.targets
        for model in models:
            model.reset_iter_state()  # parameters are shards again, as after a step
        loss, supervised_tokens, by_position = total.result()
        assert supervised_tokens == targets, f"{supervised_tokens} losses of {targets} supervised tokens"
        metrics.log_validation(
            step, loss=loss, tokens=tokens, supervised_tokens=supervised_tokens, by_position=by_position
        )
