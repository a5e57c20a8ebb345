"""[validation]: the exact loss of other data while a model trains, in the same chunks, forward only.

Sequences longer than a chunk run chunk after chunk on the K/V of those before, so any length fits, and no
activations are kept. The loss by position shows whether a model makes use of far context.
"""

import functools
import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from chunkflow.data.dataloader import StepData
from chunkflow.data.dataset import TokenDataset
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.execution.runner import Runner
from chunkflow.execution.state import ChunkTensors
from chunkflow.planning.chunks import IGNORE
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.reporting.metrics import MetricsLogger
from chunkflow.settings import options
from chunkflow.training.build import open_loader
from chunkflow.training.parallel import Processes

logger = logging.getLogger(__name__)


class LossByPosition:
    """Weighted sums, weights and numbers of token losses, in fp64 on the device: a column for positions below
    1K, 4K, 16K, ... up to `longest`, the tokens of the longest sequence. Weights are training's.

    The position of a loss is that of the token that predicts: at position p, p + 1 tokens are known.
    """

    def __init__(self, longest: int, device: torch.device):
        ends = [1024]
        while ends[-1] < longest:
            ends.append(4 * ends[-1])
        self.names = [f"up_to_{end >> 10}K" if end < 1 << 20 else f"up_to_{end >> 20}M" for end in ends]
        self.ends = torch.tensor(ends, device=device)
        self.columns = torch.arange(len(ends), device=device).unsqueeze(1)
        self.figures = torch.zeros(3, len(ends), dtype=torch.float64, device=device)

    def take(self, chunk: ChunkTensors, losses_T: torch.Tensor) -> None:
        inside = torch.bucketize(chunk.positions, self.ends, right=True) == self.columns
        inside &= chunk.labels != IGNORE
        if chunk.loss_weights is None:
            self.figures[0] += torch.where(inside, losses_T, 0).sum(1, dtype=torch.float64)
            self.figures[1:] += inside.sum(1)
        else:
            weights_T = chunk.loss_weights
            self.figures[0] += torch.where(inside, losses_T * weights_T, 0).sum(1)
            self.figures[1] += torch.where(inside, weights_T, 0).sum(1)
            self.figures[2] += inside.sum(1)

    def result(self) -> tuple[float, int, dict[str, tuple[float, int]]]:
        """Mean loss, sum(weight x loss) / sum(weight) (0 without targets), and number of targets; both again
        for each column with targets."""
        sums, weights, counts = self.figures.tolist()
        ranges = zip(self.names, sums, weights, counts)
        by_position = {name: (total / weight, int(count)) for name, total, weight, count in ranges if count}
        return sum(sums) / (sum(weights) or 1), int(sum(counts)), by_position


class Validation:
    """Measures the loss of [validation]. Every rank has one, and calls `run` after each step where `due`.

    `dataset` has its sequences; `plan` is that of training's loader. Plans are made at the first validation
    and kept. Training's data, gradients and random generators are not touched. ValueError, one sentence, for
    data that cannot be used.
    """

    def __init__(
        self,
        settings: options.Validation,
        training: options.Training,
        dataset: TokenDataset | SyntheticDataset,
        plan: PlanSettings,
        processes: Processes,
        seed: int,
    ):
        self.settings, self.last_step, self.device = settings, training.steps, processes.device
        self.steps = settings.steps if settings.steps > 0 else len(dataset)  # batches, at most
        self.replica, self.pipeline_rank = processes.replica, processes.pipeline_rank
        plan = plan._replace(forward_only=True)
        make_plan = functools.cache(lambda *lengths: plan_step(list(lengths), plan, [self.replica]))
        arguments = {"shuffle": False, "once": True, "make_plan": lambda lengths: make_plan(*lengths)}
        arguments["pin_memory"] = self.device.type == "cuda"
        self.loader = open_loader(training, dataset, plan, self.replica, seed, **arguments)
        logger.info(
            f"Validation data: {len(dataset):,} sequences of {settings.dataset}, {sum(dataset.lengths):,}"
            f" tokens, the longest has {max(dataset.lengths):,}"
        )

    def due(self, step: int) -> bool:
        return step % self.settings.freq == 0 or step == self.last_step

    def batches(self) -> Iterator[StepData]:
        """The global batches of one validation."""
        self.loader.cursor = 0
        yield from islice(self.loader, self.steps)

    def run(self, step: int, metrics: MetricsLogger, models: Iterable[FSDPModule], runner: Runner) -> None:
        """Measures and logs. `models` and `runner` are this rank's; all ranks must call."""
        metrics.interrupt()
        total, tokens, targets = LossByPosition(self.loader.longest, self.device), 0, 0
        for data in self.batches():
            batch = LossByPosition(self.loader.longest, self.device)
            program = data.plan.programs[self.replica][self.pipeline_rank]
            groups = data.plan.groups[self.replica]
            runner.evaluate(program, groups, data.chunks, batch.take, data.sequence_weights)
            # After every batch, as in training: no rank runs so far ahead that a collective times out.
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
