"""W&B: for watching. Nothing is read back from it, and its failures never end a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import Logger, WandbLogger

from fine_bench.metrics.detection import detection_curve, suspicion
from fine_bench.runner.plan import Job
from fine_bench.runner.write import Written, finished

FINISH_SECONDS = 120
"""How long the end of a run waits for uploads; ``wandb sync`` can send the rest later."""


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


class _Watching(WandbLogger):
    """What W&B does wrong while a model trains is a warning; after it nothing more is sent."""

    gone = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As the logger's own, until it fails."""
        if self.gone:
            return
        self.gone = True
        with guarded("log while training"):
            super().log_metrics(metrics, step)
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


def _settings(results: Path) -> wandb.Settings:
    # artifacts are staged below the results, not in the user's home
    folder = results / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve() / "data"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder.resolve() / "cache"))
    limits: dict[str, Any] = {"init_timeout": 30}
    if "finish_timeout" in wandb.Settings.model_fields:  # releases before it wait for ever
        limits |= {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
    return wandb.Settings(silent=True, console="off", x_disable_stats=True, **limits)


def start_run(job: Job, sweep: str) -> Logger | None:
    """A W&B run for one (task, seed), in the group of its sweep; None when switched off."""
    logger: Logger | None = None
    if job.config.logger.mode == "disabled":
        return None
    with guarded("start a run"):
        # the run is opened here and not by the logger, so that a failure shows here
        run = _init(
            job,
            name=f"{job.data.name}-seed{job.config.seed}",
            group=sweep,
            job_type="run",
            config=_flat_config(job),
        )
        logger = _Watching(experiment=run)
    return logger


def finish_run(logger: Logger | None, job: Job, written: Sequence[Written]) -> None:
    """Log metrics, detection curves and scores, and close the run."""
    if not isinstance(logger, WandbLogger):
        return
    with guarded("log the results"):
        run = logger.experiment
        done = finished(written)
        for outcome in done:
            prefix = f"{outcome.cell.estimator}/{outcome.cell.target}"
            run.summary.update(
                {
                    **{f"{prefix}/{k}": v for k, v in outcome.record.metrics.items()},
                    **{f"{prefix}/cost/{k}": v for k, v in outcome.record.cost.items()},
                }
            )
        curves = {
            f"detection_curve/{o.cell.estimator}/{o.cell.target}": _curve(job, o)
            for o in done
            if "auroc" in o.record.metrics
        }
        if curves:
            run.log(curves)
        if done:
            artifact = wandb.Artifact(f"scores-{job.data.name}-seed{job.config.seed}", "scores")
            for outcome in done:
                artifact.add_file(
                    str(job.results / "scores" / outcome.record.scores_file),
                    name=Path(outcome.record.scores_file).name,
                    skip_cache=True,
                )
            run.log_artifact(artifact)
    with guarded("close the run"):
        wandb.finish()


def log_summary(
    jobs: Sequence[Job], sweep: str, rows: Sequence[Mapping[str, Any]], csv: Path
) -> None:
    """A run of its own for the sweep's leaderboard, consistency included."""
    job = jobs[0]
    if job.config.logger.mode == "disabled" or not rows:
        return
    with guarded("log the leaderboard"):
        run = _init(
            job, name=f"leaderboard-{sweep}", group=sweep, job_type="leaderboard", config={}
        )
        columns: list[str | int] = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row[str(c)] for c in columns] for row in rows])
        run.log({"leaderboard": table})
        run.summary.update(
            {
                f"{row['task']}/{row['estimator']}/{row['target']}/{row['metric']}": row["mean"]
                for row in rows
                if row["mean"] == row["mean"]
            }
        )
        artifact = wandb.Artifact("leaderboard", "leaderboard")
        artifact.add_file(str(csv), skip_cache=True)
        run.log_artifact(artifact)
        wandb.finish()


def _init(job: Job, **options: Any) -> wandb.Run:
    logger = job.config.logger
    return wandb.init(
        dir=str(job.results),
        settings=_settings(job.results),
        reinit="finish_previous",
        mode="online" if logger.mode == "online" else "offline",
        project=logger.project,
        entity=logger.entity,
        **options,
    )


def _flat_config(job: Job) -> dict[str, Any]:
    config = job.config
    return {
        "seed": config.seed,
        "task": dict(config.task),
        "model": dict(config.model),
        "trainer": vars(config.trainer),
        "estimators": {name: dict(options) for name, options in config.estimators.items()},
        "targets": list(config.targets),
    }


def _curve(job: Job, one: Written) -> Any:
    assert one.scores is not None
    scores, bad = one.scores, job.data.truth.is_bad
    row = suspicion(scores.watched_values, job.end(one.cell.target))
    shares, recall = detection_curve(row, bad if scores.watched is None else bad[scores.watched])
    table = wandb.Table(
        columns=["inspected", "recall"], data=[list(p) for p in zip(shares, recall, strict=True)]
    )
    return wandb.plot.line(
        table, "inspected", "recall", title=f"{one.cell.estimator} {one.cell.target}"
    )
