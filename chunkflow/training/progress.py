"""How far a run has come, over all restarts; and steps with a loss or gradients that are not finite."""

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Saved with each checkpoint."""

    step: int = 0  # the last finished one
    tokens_seen: int = 0
    bad_steps: int = 0  # not finite, so not applied
    bad_steps_in_a_row: int = 0

    def count(
        self, step: int, tokens: int, not_finite: bool, limit: int, grad_norm: float, sources: list[str]
    ) -> None:
        """Counts a step. One that was not finite, so not applied, is reported with its sequences' FILE:LINE,
        `sources`; ValueError at `limit` (training.max_bad_steps) of them in a row."""
        self.step = step
        self.tokens_seen += tokens
        if not not_finite:
            self.bad_steps_in_a_row = 0
            return
        self.bad_steps += 1
        self.bad_steps_in_a_row += 1
        logger.warning(
            f"step {step}: its loss or its gradients (norm {grad_norm}) are not finite, so it was not applied"
            f" ({self.bad_steps_in_a_row} in a row); its sequences are {', '.join(sources)}"
        )
        if self.bad_steps_in_a_row >= limit:
            raise ValueError(
                f"{self.bad_steps_in_a_row} steps in a row, up to step {step}, had a loss or gradients that"
                f" are not finite (training.max_bad_steps = {limit}): look at their sequences, named above,"
                " or lower optimizer.lr; the last checkpoint is from before them"
            )
