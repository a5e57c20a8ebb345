"""The optimizer and torchtitan's learning-rate schedule: warm-up, stable, decay."""

from __future__ import annotations

import math

import torch
from torch import nn


def build_optimizer(model: nn.Module, config) -> torch.optim.AdamW:
    """AdamW; weight decay applies to all parameters, as in torchtitan."""
    settings = config.optimizer
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=settings.implementation == "fused",
        foreach=settings.implementation == "foreach",
    )


def learning_rate_factor(step: int, steps: int, warmup: int, decay_ratio: float | None, decay_type: str, minimum: float) -> float:
    """The share of the full rate that the update of `step` (from 1) uses.

    Linear warm-up over `warmup` steps, then the full rate, then decay over the last `decay_ratio` of all steps (unset: over all
    that is left after warm-up) towards `minimum`.
    """
    warmup = min(warmup, steps)
    decay = steps - warmup if decay_ratio is None else min(round(steps * decay_ratio), steps - warmup)
    if step <= warmup:
        return step / warmup
    done = step - 1 - (steps - decay)
    if done < 0:
        return 1.0
    progress = done / decay
    left = {"linear": 1 - progress, "sqrt": 1 - math.sqrt(progress), "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[decay_type]
    return minimum + (1 - minimum) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config) -> float:
    """Sets and returns the rate that the update of `step` uses."""
    schedule = config.lr_scheduler
    factor = learning_rate_factor(
        step, config.training.steps, schedule.warmup_steps, schedule.decay_ratio, schedule.decay_type, schedule.min_lr_factor
    )
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr * factor
    return config.optimizer.lr * factor
