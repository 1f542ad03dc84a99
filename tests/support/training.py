"""Training under Lightning without a word."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a ``Trainer``: on the CPU, nothing is printed, nothing written."""


class Diary(pl.Callback):
    """The parameters before each step, in float64, and who is in the batch."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        params = {k: v.detach().clone().double() for k, v in pl_module.net.named_parameters()}
        self.steps.append((params, batch[2].clone()))
