"""The step sizes that a run takes."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from fine_bench.data.batches import loader
from fine_bench.models.classifier import Classifier
from support.training import QUIET


class Rates(pl.Callback):
    """Notes the step size of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.values.append(float(optimizer.param_groups[0]["lr"]))


def fit(schedule: str) -> tuple[list[float], dict[str, float]]:
    torch.manual_seed(0)
    module = Classifier(nn.Linear(3, 2), 2, lr=0.2, lr_schedule=schedule)  # type: ignore[arg-type]
    rates = Rates()
    x, y = torch.randn(10, 3), torch.randint(0, 2, (10,))
    trainer = pl.Trainer(
        max_epochs=2,
        **QUIET,
        callbacks=[rates],
    )
    trainer.fit(module, loader(x, y, batch_size=4))
    checkpoint: dict[str, float] = {}
    module.on_save_checkpoint(checkpoint)
    return rates.values, checkpoint


def test_cosine_goes_from_lr_towards_zero_over_all_steps() -> None:
    rates, checkpoint = fit("cosine")
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 6)) for t in range(6)])
    # of the last step that was taken, not of the next one
    assert checkpoint["lr"] == rates[-1] > 0


def test_constant_stays() -> None:
    rates, checkpoint = fit("constant")
    assert rates == [0.2] * 6
    assert checkpoint["lr"] == 0.2


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="lr_schedule must be one of"):
        Classifier(nn.Linear(3, 2), 2, lr_schedule="linear")  # type: ignore[arg-type]
