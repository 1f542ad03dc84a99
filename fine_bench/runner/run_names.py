"""What a run is called where people watch it: names, groups and tags that they would choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fine_bench.runner.plan import Job

NAMED = ("task.", "model.", "trainer.")
"""Overrides that make another run of the same experiment; other ones do not change its training."""

SILENT = ("trainer.num_threads=", "trainer.progress=")

MAX_LENGTH = 120
"""Characters of a name; W&B takes 128."""


def model_of(job: Job) -> str:
    """The model's short name."""
    model = job.config.model
    return str(model.get("name") or str(model["_target_"]).rpartition(".")[2])


def run_name(job: Job, overrides: Sequence[str] = ()) -> str:
    """``digits_mislabel mlp lr=0.1 seed 2``: task, model, what was changed, seed."""
    changed = [
        text.partition(".")[2]
        for text in overrides
        if text.startswith(NAMED) and not text.startswith(SILENT)
    ]
    seed = f"seed {job.config.seed}"
    room = MAX_LENGTH - len(seed) - 1
    return f"{' '.join([job.data.name, model_of(job), *changed])[:room]} {seed}"


def group_name(job: Job) -> str:
    """What all seeds of a setting share: task, model, and eight digits of the setting's digest.

    Two sweeps over the same setting fall into one group; ``logger.group`` names another.
    """
    own = job.config.logger.group
    return own or f"{job.data.name} {model_of(job)} {job.setting[:8]}"


def tags(job: Job, sweep: str) -> list[str]:
    """Task, kind of task, model, sweep, and the user's own; each at most 64 characters."""
    found = [job.data.name, job.data.kind, model_of(job), f"sweep {sweep}"]
    return list(dict.fromkeys(tag[:64] for tag in [*found, *job.config.logger.tags] if tag))


def flat_config(job: Job) -> dict[str, Any]:
    """The configuration as plain values."""
    config = job.config
    return {
        "seed": config.seed,
        "setting": job.setting,
        "task": dict(config.task),
        "model": dict(config.model),
        "trainer": vars(config.trainer),
        "estimators": {name: dict(options) for name, options in config.estimators.items()},
        "targets": list(config.targets),
    }
