"""Direct preference optimization (Rafailov et al., 2023) in chunks.

A step has two phases on the chunks of one plan: forwards alone give the log-probability of each answer; then
what the loss of each of its tokens counts in the gradient is known, and one chunked backward with these
weights is the exact gradient, since dL/dtheta = sum over answers of (dL/dlogp) x (dlogp/dtheta). Answers of a
pair may lie on different ranks, and an answer on several: two numbers travel, no tensors.

Shape suffixes: S sequences of the plan, of which 2p and 2p + 1 are the answers of pair P.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from chunkflow.data.dataloader import StepData
from chunkflow.execution.runner import Runner
from chunkflow.planning.pipeline_transfers import Program
from chunkflow.reporting.metrics import MetricsLogger
from chunkflow.settings import options
from chunkflow.training.parallel import Processes
from chunkflow.training.validation import Validation


class Pairs(NamedTuple):
    """Loss and figures of a step's preference pairs."""

    counted_P: torch.Tensor  # bool: both answers have a target; other pairs count nowhere
    losses_P: torch.Tensor  # this and the others float64
    chosen_logps_P: torch.Tensor  # sums over the answer's tokens
    rejected_logps_P: torch.Tensor
    chosen_rewards_P: torch.Tensor  # beta (log pi - log pi_ref)
    rejected_rewards_P: torch.Tensor
    # What the loss of each token of a sequence counts, for `Runner.step`, with the counted pairs as the
    # denominator: (S,) float64.
    sequence_weights: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """The mean over the counted pairs, 0-dim; 0 without one."""
        return torch.where(self.counted_P, self.losses_P, 0).sum() / self.counted_P.sum().clamp(min=1)

    def sums(self) -> dict[str, float]:
        """Figures summed over the counted pairs."""
        margins_P = self.chosen_rewards_P - self.rejected_rewards_P
        of_pairs = {
            "reward_margin": margins_P,
            "reward_accuracy": (margins_P > 0).to(margins_P.dtype),
            "chosen_logp": self.chosen_logps_P,
            "rejected_logp": self.rejected_logps_P,
            "chosen_reward": self.chosen_rewards_P,
            "rejected_reward": self.rejected_rewards_P,
        }
        stacked = torch.stack([torch.where(self.counted_P, values, 0).sum() for values in of_pairs.values()])
        return dict(zip(of_pairs, stacked.tolist()))


def counted(weight_sums: Sequence[float]) -> list[bool]:
    """Of each pair, whether both answers have a target. `weight_sums`: the targets of each sequence."""
    return [min(pair) > 0 for pair in zip(weight_sums[::2], weight_sums[1::2])]


def log_probabilities(
    runner: Runner,
    models: Iterable[FSDPModule],
    program: Program,
    data: StepData,
    replica: int,
) -> torch.Tensor:
    """The log-probability of each answer, the sum over its targets: (S,) float64 on the device, the same on
    all ranks. A collective: all ranks call, each with its forward-only `program` of the step's plan."""
    losses_S = torch.zeros(len(data.rows), dtype=torch.float64, device=runner.device)

    def take(chunk, losses_T):
        chunk.add_to_sequences(losses_S, losses_T)

    runner.evaluate(program, data.plan.groups[replica], data.chunks, take)
    for model in models:
        model.reset_iter_state()  # parameters are shards again, as after a step
    dist.all_reduce(losses_S)
    return -losses_S


def dpo(
    settings: options.Dpo, logps_S: torch.Tensor, references_S: torch.Tensor, weight_sums: Sequence[float]
) -> Pairs:
    """Loss of each pair, as the log-probabilities of the policy and of the reference say: with the margin m =
    beta (chosen's log ratio - rejected's), -(1 - e) log sigmoid(m) - e log sigmoid(-m), where e is
    label_smoothing (Rafailov et al., 2023, equation 7; smoothing: Mitchell, 2023). `weight_sums`: how many
    targets each sequence has."""
    beta, smoothing = settings.beta, settings.label_smoothing
    targets_S = torch.tensor(weight_sums, dtype=torch.float64).clamp(min=1).to(logps_S.device)
    shares_S = 1 / targets_S if settings.length_normalised else torch.ones_like(targets_S)
    rewards_S = beta * shares_S * (logps_S - references_S)
    margins_P = rewards_S[::2] - rewards_S[1::2]
    losses_P = -(1 - smoothing) * F.logsigmoid(margins_P) - smoothing * F.logsigmoid(-margins_P)
    counted_P = torch.tensor(counted(weight_sums), dtype=torch.bool).to(logps_S.device)
    # -dloss/dmargin; a token's loss is minus its part of the log-probability.
    push_P = (1 - smoothing) * torch.sigmoid(-margins_P) - smoothing * torch.sigmoid(margins_P)
    push_P = torch.where(counted_P, push_P, 0)
    return Pairs(
        counted_P,
        losses_P,
        chosen_logps_P=logps_S[::2],
        rejected_logps_P=logps_S[1::2],
        chosen_rewards_P=rewards_S[::2],
        rejected_rewards_P=rewards_S[1::2],
        sequence_weights=beta * shares_S * torch.stack([push_P, -push_P], dim=1).flatten(),
    )


def means(sums: dict[str, float], pairs: int) -> dict[str, float]:
    """Figures over so many pairs."""
    return {name: value / max(pairs, 1) for name, value in sums.items()}


def losses_by_source(pairs: Pairs, names: list[str], source_of: list[int]) -> dict[str, float]:
    """The mean loss of each source that has counted pairs in the step. `source_of`: of each sequence."""
    of_source: dict[int, list[float]] = {}
    for source, loss, counts in zip(source_of[::2], pairs.losses_P.tolist(), pairs.counted_P.tolist()):
        if counts:
            of_source.setdefault(source, []).append(loss)
    return {names[source]: sum(losses) / len(losses) for source, losses in sorted(of_source.items())}


def validate(
    validation: Validation,
    settings: options.Dpo,
    references: Callable[[list[int]], torch.Tensor],
    step: int,
    metrics: MetricsLogger,
    models: Iterable[FSDPModule],
    runner: Runner,
    processes: Processes,
) -> None:
    """Measures and logs loss, margin and accuracy of the pairs of [validation]; all ranks must call.
    `references`: rows -> the reference's log-probabilities."""
    metrics.interrupt()
    total: dict[str, float] = {}
    loss_sum, pairs, tokens, targets = 0.0, 0, 0, 0
    for data in validation.batches():
        program = data.plan.programs[processes.replica][processes.pipeline_rank]
        logps_S = log_probabilities(runner, models, program, data, processes.replica)
        made = dpo(settings, logps_S, references(data.rows), data.weight_sums)
        total = {name: total.get(name, 0.0) + value for name, value in made.sums().items()}
        of_batch = sum(counted(data.weight_sums))
        loss_sum += made.loss.item() * of_batch
        pairs += of_batch
        tokens += data.plan.tokens
        targets += data.targets
    figures, loss = means(total, pairs), loss_sum / max(pairs, 1)
    metrics.log_validation(step, loss=loss, tokens=tokens, supervised_tokens=targets, pairs=figures)
