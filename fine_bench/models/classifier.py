"""The LightningModule of the benchmark: softmax cross-entropy by SGD."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from fine_bench.models.lr_schedule import check_schedule, scheduled
from fine_bench.types import LRSchedule


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number."""


def refuse_divergence(outputs: Any, step: int, lr: float) -> None:
    """Look at what a training step gave to Lightning.

    Raises:
        DivergedError: its loss is no finite number.
    """
    loss = outputs["loss"] if isinstance(outputs, dict) else outputs
    if not bool(torch.isfinite(loss)):
        raise DivergedError(
            f"the training loss became {float(loss)} at step {step}; lower the step size, for "
            f"instance trainer.lr={lr / 10:g}"
        )


class Classifier(pl.LightningModule):
    """Trains a network on batches ``(x, y, index)``.

    Args:
        net: logits from ``x``.
        n_classes: number of classes.
        lr: step size, > 0.
        momentum, weight_decay: of SGD, ≥ 0; plain SGD by default.
        lr_schedule: ``"constant"`` or ``"cosine"``; see ``lr_schedule``.
    """

    def __init__(
        self,
        net: nn.Module,
        n_classes: int,
        *,
        lr: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_schedule: LRSchedule = "constant",
    ) -> None:
        super().__init__()
        self.net = net
        check_schedule(lr_schedule)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.lr_schedule = lr_schedule
        self.test_accuracy = MulticlassAccuracy(n_classes, average="micro")
        # summed here and reported once an epoch: a call of the logger at every step would cost
        # more than the step
        self._loss_sum = torch.zeros(())
        self._loss_count = 0
        self._last_lr = lr

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``(batch, classes)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch."""
        x, y, *_ = batch
        loss = F.cross_entropy(self(x), y)
        self._loss_sum += loss.detach()
        self._loss_count += 1
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop a run that has diverged instead of scoring noise."""
        refuse_divergence(outputs, self.global_step, self.lr)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the step size: once the step is done, a schedule has moved on to the next one."""
        self._last_lr = float(optimizer.param_groups[0]["lr"])

    def on_train_epoch_end(self) -> None:
        """Report the epoch's mean training loss."""
        self.log("train_loss", self._loss_sum / max(self._loss_count, 1))
        self._loss_sum = torch.zeros_like(self._loss_sum)
        self._loss_count = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy and loss on held-out examples."""
        x, y, *_ = batch
        logits = self(x)
        self.test_accuracy(logits, y)
        loss = F.cross_entropy(logits, y)
        self.log("test_loss", loss, on_step=False, on_epoch=True, batch_size=len(y))
        self.log("test_accuracy", self.test_accuracy, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """SGD, with the schedule's step size at every step."""
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        return scheduled(self, optimizer, self.lr_schedule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the step size of the last step beside the weights: TracIn needs it."""
        checkpoint["lr"] = self._last_lr
