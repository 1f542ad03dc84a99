"""Which of the two ways of training a task has: images by SGD, language models by AdamW on LoRA.

The runner (plan, cells, records) does not know the difference; a module of each kind does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pytorch_lightning.loggers import Logger
from torch import nn

from fine_bench.callback.base import InRunMethod
from fine_bench.runner.backends import images, language
from fine_bench.runner.backends.trained import TrainedRun
from fine_bench.runner.plan import Job
from fine_bench.types import InfluenceScores, Target


class Backend(Protocol):
    """What a module offers that trains and measures one kind of task."""

    def stored(self, job: Job) -> TrainedRun | None:
        """The finished run of an earlier call, or None."""

    def train(
        self, job: Job, callbacks: Sequence[InRunMethod], logger: Logger | None
    ) -> TrainedRun:
        """Train one model, watched by the callbacks, and keep its checkpoints."""

    def train_auxiliary(self, job: Job, callbacks: Sequence[InRunMethod]) -> float:
        """Train with other randomness to be watched only; seconds of plain training."""

    def batch_size(self, job: Job, model: nn.Module) -> int:
        """Examples that post-hoc methods take at a time."""

    def describe(self, facts: Mapping[str, Any]) -> str:
        """One line about a trained run."""

    def measure(
        self, job: Job, target: Target, scores: InfluenceScores, facts: Mapping[str, Any]
    ) -> dict[str, float]:
        """The metrics of a cell."""


_BACKENDS: Mapping[str, Backend] = {"images": images, "language": language}


def backend_of(job: Job) -> Backend:
    """The module for the kind of a job's task."""
    return _BACKENDS[job.data.kind]
