"""The step size over a run: constant, or falling along half a cosine from lr to 0.

    constant   η_t = lr
    cosine     η_t = lr · (1 + cos(π t / T)) / 2,   t = 0 … T − 1

One function for all trainings: those under Lightning, the plain loops and the bank's stacks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import torch

from fine_bench.types import LRSchedule

if TYPE_CHECKING:
    import pytorch_lightning as pl


def check_schedule(schedule: str) -> None:
    """Refuse the name of a schedule that does not exist.

    Raises:
        ValueError: it names those that do.
    """
    if schedule not in get_args(LRSchedule):
        raise ValueError(f"lr_schedule must be one of {get_args(LRSchedule)}, got {schedule!r}")


def cosine(step: int, n_steps: int) -> float:
    """(1 + cos(π t / T)) / 2 at step t, counted from 0, of T."""
    return 0.5 * (1.0 + math.cos(math.pi * step / n_steps))


def lr_at(schedule: LRSchedule, lr: float, step: int, n_steps: int) -> float:
    """Step size of step ``step``, counted from 0, of ``n_steps``."""
    return lr if schedule == "constant" else lr * cosine(step, n_steps)


def scheduled(
    module: pl.LightningModule, optimizer: torch.optim.Optimizer, schedule: LRSchedule
) -> Any:
    """What ``configure_optimizers`` returns for an optimiser whose step size follows a schedule."""
    if schedule == "constant":
        return optimizer
    steps = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: cosine(t, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
