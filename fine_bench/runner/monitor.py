"""What in-run methods have found so far, told to the logger at the end of every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import pytorch_lightning as pl
import wandb
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor

from fine_bench import clock
from fine_bench.callback.base import InRunMethod
from fine_bench.runner.wandb_logger import WatchingLogger


class ProgressMonitor(pl.Callback):
    """Looks at in-run methods while the model trains; it changes neither scores nor weights.

    For each of them by its row's name: ``observed_steps/<row>/<target>``, how many steps have been
    accounted for, and the histogram ``mu/<row>/<target>`` of μ over all examples (and queries).

    Args:
        methods: by ``<row>/<target>``.
        logger: told.

    Attributes:
        seconds: spent here; they are part of no method's cost, nor of the training's.
    """

    def __init__(self, methods: Mapping[str, InRunMethod], logger: Logger) -> None:
        self.methods, self.logger = dict(methods), logger
        self.seconds = 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell how far each method is."""
        start = clock.now()
        numbers: dict[str, float] = {"epoch": float(trainer.current_epoch)}
        values: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            seen: Any = method.so_far()
            if seen is not None:
                numbers[f"observed_steps/{name}"] = float(seen.n_steps)
                values[f"mu/{name}"] = seen.values
        if values:
            _tell(self.logger, numbers, values, trainer.global_step)
        self.seconds += clock.now() - start


def _tell(
    logger: Logger, numbers: Mapping[str, float], values: Mapping[str, Tensor], step: int
) -> None:
    """Numbers for every logger; histograms for those that draw them."""
    if isinstance(logger, WatchingLogger):
        drawn = {name: wandb.Histogram(found.flatten().tolist()) for name, found in values.items()}
        logger.log_metrics({**numbers, **drawn}, step)
        return
    logger.log_metrics(dict(numbers), step)
    if isinstance(logger, TensorBoardLogger):
        for name, found in values.items():
            logger.experiment.add_histogram(name, found.flatten(), step)


Watcher: TypeAlias = InRunMethod | ProgressMonitor
"""A callback beside the training that knows the time it took."""


__all__ = ["ProgressMonitor", "Watcher"]
