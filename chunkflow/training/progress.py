"""How far a run has come, over all its starts; and steps whose loss or gradients are not finite."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Saved with each checkpoint."""

    step: int = 0  # the last one done
    tokens_seen: int = 0
    bad_steps: int = 0  # that were not applied
    bad_steps_in_a_row: int = 0

    def count(
        self, step: int, tokens: int, not_finite: bool, limit: int, grad_norm: float, sources: list[str]
    ) -> None:
        """A step is done; one whose loss or gradients are not finite was not applied, and is reported with
        its sequences' FILE:LINE, `sources`.

        ValueError where that makes `limit` (training.max_bad_steps) in a row.
        """
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
