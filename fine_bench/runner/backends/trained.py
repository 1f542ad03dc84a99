"""A trained run: where it is kept, what it leaves, and what its scores are measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fine_bench.metrics import registry
from fine_bench.metrics.registry import Given
from fine_bench.runner.plan import Job
from fine_bench.store.scores import asked_about
from fine_bench.types import Checkpoint, InfluenceScores, Target, TrainingSteps


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """What training leaves behind.

    Attributes:
        model: the network at its last parameters.
        checkpoints: one an epoch, in order.
        facts: test and training accuracy, losses, seconds of plain training, steps, and the
            curves over epochs.
        steps: what it did step by step, for methods that repeat it; None where that is not kept.
    """

    model: torch.nn.Module
    checkpoints: Sequence[Checkpoint]
    facts: Mapping[str, Any]
    steps: TrainingSteps | None = None


def folder_of(job: Job) -> Path:
    """Where the checkpoints of a job's run are kept."""
    name = f"seed{job.config.seed}-{job.data_sha256[:8]}"
    return job.results / "checkpoints" / job.data.name / job.setting[:12] / name


def run_of(job: Job) -> dict[str, Any]:
    """What tells a job's run from every other: the seal of its checkpoints holds it."""
    trainer = job.config.trainer
    seeds = {"init_seed": trainer.init_seed, "order_seed": trainer.order_seed}
    run = {"task": job.data.name, "data": job.data_sha256, "setting": job.setting}
    return {**run, "seed": job.config.seed, **seeds}


def detected(
    job: Job,
    target: Target,
    scores: InfluenceScores,
    facts: Mapping[str, Any],
    *,
    takes_effect: bool = True,
) -> dict[str, float]:
    """Metrics of the examples that have a score, and how many those are.

    Where the truth is known of some examples only, they are the examples that are measured.

    Args:
        job, target, scores: of the cell.
        facts: about the training run.
        takes_effect: whether the bad examples did anything; if not, nobody looks for them.
    """
    truth, asked = job.data.truth, asked_about(job.data.truth, scores.watched)
    found: dict[str, float] = {}
    if scores.watched is not None:
        found["n_watched"] = float(len(scores.watched))
    if truth.known is not None and asked is not None:
        found["n_known"] = float(len(asked))
    mu = None if job.truth is None else job.truth.published.mu_margin
    bad, reviewed, values = truth.is_bad, truth.reviewed, scores.values
    if asked is not None:
        bad, values = bad[asked], values[:, asked]
        mu = None if mu is None else mu[asked.numpy()]
        reviewed = None if reviewed is None else reviewed[asked]
    found["n_bad"] = float(bad.sum())
    if not len(bad):
        return found
    given = Given(
        values=values,
        target=target,
        end=job.end(target),
        is_bad=bad if takes_effect else None,
        kind=job.data.kind,
        mu=mu,
        facts=facts,
        reviewed=reviewed,
    )
    return found | registry.measure(given, job.packages)
