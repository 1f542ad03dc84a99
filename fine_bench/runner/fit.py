"""Fitting a module under Lightning: one device, one seed, no notices; all trainings start here."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import PassThroughProfiler

from fine_bench import clock
from fine_bench.runner import interruption
from fine_bench.seeds import derive


class NoProfiler(PassThroughProfiler):
    """Lightning opens a profiler's context around every event of every callback.

    That is a hundred times a step with a few callbacks. The default one builds a generator each
    time to do nothing; for small networks that is a noticeable part of the step.
    """

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Nothing."""
        return self._nothing


@dataclass(frozen=True, eq=False)
class Fit:
    """A fit that has ended.

    Attributes:
        trainer: what it knows of the run: metrics, steps, device.
        seconds: of the fit, the callbacks' own among them.
    """

    trainer: pl.Trainer
    seconds: float


def fit(
    module: pl.LightningModule,
    batches: Any,
    *,
    epochs: int,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    test: Any = None,
    logger: Logger | None = None,
    progress: bool = False,
) -> Fit:
    """Train a module.

    Args:
        module: trained in place.
        batches: its training DataLoader, whose order is seeded by a generator of its own.
        epochs: passes over it, ≥ 1.
        seed: run seed: the global random state (dropout) follows it.
        callbacks: they watch the training; one of Lightning's ``Checkpoint`` kind may keep files.
        test: DataLoader measured after each epoch; None for none.
        logger: is told at every step; None for nobody.
        progress: whether to show a bar.
    """
    watching = [*callbacks, *([TQDMProgressBar(refresh_rate=25)] if progress else [])]
    with _quiet():
        pl.seed_everything(derive(seed, "global") % 2**32, verbose=False)
        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=epochs,
            logger=logger or False,
            log_every_n_steps=1,
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            deterministic="warn",
            profiler=NoProfiler(),
            callbacks=watching,
        )
        start = clock.now()
        ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, batches, test)
        except SystemExit as error:
            # Lightning ends the process on Ctrl-C and is deaf to another: that is the command's
            stop = interruption.of(error)
            if stop is None:
                raise
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, ctrl_c)
            raise stop from None
        return Fit(trainer, clock.now() - start)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notices about hardware and workers do not help a run's reader."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*exists and is not empty.*"):
            warnings.filterwarnings("ignore", message)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        try:
            yield
        finally:
            logger.setLevel(level)
