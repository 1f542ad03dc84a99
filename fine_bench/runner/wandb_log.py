"""W&B: for watching. Nothing is read back from it, and its failures never end a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import Logger, WandbLogger

from fine_bench.runner import wandb_tables
from fine_bench.runner.plan import Job
from fine_bench.runner.run_names import flat_config, group_name, model_of, run_name, tags
from fine_bench.runner.wandb_logger import OVER_EPOCHS, WatchingLogger, guarded
from fine_bench.runner.write import Written, finished

FINISH_SECONDS = 120
"""How long the end of a run waits for uploads; ``wandb sync`` can send the rest later."""


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


def start_run(job: Job, sweep: str, overrides: Sequence[str] = ()) -> Logger | None:
    """A W&B run for one (task, seed), in the group of its setting; None when switched off.

    Args:
        job: the run.
        sweep: its name: a tag, and part of the configuration.
        overrides: of the command: those about task, model and trainer are part of the run's name.
    """
    logger: Logger | None = None
    if job.config.logger.mode == "disabled":
        return None
    with guarded("start a run"):
        # the run is opened here and not by the logger, so that a failure shows here
        run = _init(
            job,
            name=run_name(job, overrides),
            group=group_name(job),
            job_type="train",
            tags=tags(job, sweep),
            config={**flat_config(job), "sweep": sweep},
        )
        run.define_metric("epoch", hidden=True)
        for names in OVER_EPOCHS:
            run.define_metric(names, step_metric="epoch")
        logger = WatchingLogger(experiment=run)
    return logger


def finish_run(logger: Logger | None, job: Job, written: Sequence[Written]) -> None:
    """Log metrics, detection curves, the most suspicious examples and scores; close the run."""
    if not isinstance(logger, WandbLogger):
        return
    with guarded("log the results"):
        run = logger.experiment
        done = finished(written)
        run.summary.update(wandb_tables.headlines(done))
        run.log(wandb_tables.of_run(job, done))
        if done:
            name = f"scores-{job.data.name}-{job.setting[:8]}-seed{job.config.seed}"
            artifact = wandb.Artifact(name, "scores")
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
    jobs: Sequence[Job],
    sweep: str,
    rows: Sequence[Mapping[str, Any]],
    csv: Path,
    figures: Callable[[], Iterable[tuple[str, Any]]] = tuple,
) -> None:
    """A run of its own for the sweep's leaderboard: tables, figures, and the sweep's configuration.

    Args:
        jobs: of the sweep.
        sweep: its name.
        rows: of the leaderboard's tidy table.
        csv: the whole of it.
        figures: makes the figures to show, with their names; called if W&B is on.
    """
    job = jobs[0]
    logger = job.config.logger
    if logger.kind != "wandb" or logger.mode == "disabled" or not rows:
        return
    with guarded("log the leaderboard"):
        shared = flat_config(job)
        shared["seeds"] = list(dict.fromkeys(one.config.seed for one in jobs))
        del shared["seed"]
        run = _init(
            job,
            name=f"leaderboard {job.data.name} {model_of(job)} {sweep}",
            group=group_name(job),
            job_type="leaderboard",
            tags=tags(job, sweep),
            config={**shared, "sweep": sweep},
        )
        run.log(wandb_tables.of_sweep(rows))
        drawn = {f"figures/{name}": wandb.Image(figure) for name, figure in figures()}
        if drawn:
            run.log(drawn)
        artifact = wandb.Artifact("leaderboard", "leaderboard")
        artifact.add_file(str(csv), skip_cache=True)
        run.log_artifact(artifact)
        wandb.finish()


def offline_runs(jobs: Sequence[Job]) -> str:
    """The command that uploads what was logged offline; empty where there is nothing."""
    logger = jobs[0].config.logger
    folder = jobs[0].results / "wandb"
    offline = logger.kind == "wandb" and logger.mode == "offline"
    return f"wandb sync {folder}/offline-run-*" if offline and any(folder.glob("offline-*")) else ""


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
