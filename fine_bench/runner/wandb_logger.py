"""W&B as Lightning's logger: names for panels, and failures that cost a warning and no run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.loggers import WandbLogger


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn a failure of W&B into a warning: records do not depend on it."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"W&B failed to {what} ({type(error).__name__}: {error}); the records are complete "
            "without it. Switch it off with logger.mode=disabled",
            stacklevel=3,
        )


SECTIONS = {
    "train_loss": "train/loss",
    "test_loss": "test/loss",
    "test_accuracy": "test/accuracy",
    "lr": "train/lr",
}
"""What the modules report, by the names under which W&B groups panels."""

OVER_EPOCHS = ("train/*", "test/*", "observed_steps/*", "mu/*")
"""Panels whose x axis is the epoch."""


class WatchingLogger(WandbLogger):
    """What W&B does wrong while a model trains is a warning; after it nothing more is sent."""

    gone = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """The numbers of an epoch, whose number is their x axis; until logging fails."""
        if self.gone:
            return
        self.gone = True
        with guarded("log while training"):
            self.experiment.log({SECTIONS.get(name, name): v for name, v in metrics.items()})
            self.gone = False

    def log_hyperparams(self, params: Any) -> None:
        """As the logger's own, until it fails."""
        if not self.gone:
            with guarded("log the options of the model"):
                super().log_hyperparams(params)

    def finalize(self, status: str) -> None:
        """As the logger's own, unless it failed before."""
        if not self.gone:
            with guarded("end the training's log"):
                super().finalize(status)
