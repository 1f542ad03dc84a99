"""Who is told of a run: W&B, a CSV file, TensorBoard, or nobody. Records never depend on it.

``logger=wandb|csv|tensorboard|none`` chooses. W&B has a file of its own (``wandb_log``); the others
are Lightning's classes and write below ``results_dir/logs/<task>/<run>``: what each epoch reported,
what f-INE has seen so far, and at the end the numbers of every cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from fine_bench.runner import wandb_log
from fine_bench.runner.plan import Job
from fine_bench.runner.run_names import flat_config, run_name
from fine_bench.runner.write import Written, finished
from fine_bench.store.files import slug

FOLDER = "logs"


def start_run(job: Job, sweep: str, overrides: Sequence[str] = ()) -> Logger | None:
    """The logger of one (task, seed); None where nobody is told.

    Args:
        job: the run.
        sweep: its name.
        overrides: of the command: those about task, model and trainer become part of its name.
    """
    kind = job.config.logger.kind
    if kind == "wandb":
        return wandb_log.start_run(job, sweep, overrides)
    if kind == "none":
        return None
    folder = _fresh(
        job.results / FOLDER / job.data.name, slug(f"{run_name(job, overrides)} {sweep}")
    )
    make: type[CSVLogger | TensorBoardLogger] = CSVLogger if kind == "csv" else TensorBoardLogger
    logger = make(str(job.results / FOLDER), name=job.data.name, version=folder.name)
    logger.log_hyperparams(flat_config(job))
    return logger


def _fresh(folder: Path, name: str) -> Path:
    """A new folder of this name, or of one with a number behind it.

    Jobs of a sweep that differ in their estimators alone have one name, and a logger deletes what
    lies in its folder.
    """
    for number in itertools.count(1):
        found = folder / (name if number == 1 else f"{name}-{number}")
        try:
            found.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    return found


def finish_run(logger: Logger | None, job: Job, written: Sequence[Written]) -> None:
    """Tell the numbers of every finished cell, and close the log."""
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        numbers: dict[str, Any] = {
            f"{one.cell.target}/{one.cell.estimator}/{name}": float(value)
            for one in finished(written)
            for name, value in one.record.metrics.items()
        }
        if numbers:
            logger.log_metrics(numbers, step=_steps(written))
        logger.finalize("success")
    else:
        wandb_log.finish_run(logger, job, written)


def _steps(written: Sequence[Written]) -> int:
    return max((int(one.record.training.get("n_steps", 0)) for one in written), default=0)
