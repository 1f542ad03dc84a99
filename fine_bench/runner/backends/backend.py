"""What a way of training a task offers, and which of the two a job has.

The runner (plan, cells, records) does not know the difference; a module of each kind does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pytorch_lightning.loggers import Logger
from torch import nn

from fine_bench.callback.base import InRunMethod
from fine_bench.runner.backends import images, language
from fine_bench.runner.backends.trained import TrainedRun
from fine_bench.runner.monitor import Watcher
from fine_bench.runner.plan import Job
from fine_bench.types import InfluenceScores, Target


class Backend(Protocol):
    """What a module offers that trains and measures one kind of task."""

    def stored(self, job: Job, say: Callable[[str], None]) -> TrainedRun | None:
        """The finished run of an earlier call, or None; says where one cannot be used."""

    def train(self, job: Job, callbacks: Sequence[Watcher], logger: Logger | None) -> TrainedRun:
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


def ensemble(job: Job, run: TrainedRun, count: int, say: Callable[[str], None]) -> list[TrainedRun]:
    """The job's own run and ``count`` − 1 like it, but for initialisation and order.

    Their seeds derive from the run seed, so that two run seeds share no member. Members are kept
    beside the run, and trained once; ``say`` is told of stored ones that cannot be used.

    Raises:
        RuntimeError: a member could not be trained; says which.
    """
    backend = backend_of(job)
    members = [run]
    for number in range(1, count):
        member = job.with_randomness(f"ensemble member {number}")
        try:
            found = backend.stored(member, say)
            members.append(backend.train(member, [], None) if found is None else found)
        except Exception as error:
            raise RuntimeError(
                f"run {number + 1} of {count} of the ensemble (seed {member.config.seed}) failed: "
                f"{type(error).__name__}: {error}"
            ) from error
    return members
