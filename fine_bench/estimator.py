"""What every post-hoc method looks like, and the loop that feeds it checkpoints."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import ClassVar, TypeVar

import torch
from torch import nn

from fine_bench.types import Checkpoint, InfluenceScores, Problem, UnsupportedProblemError

T = TypeVar("T")


class Schedule(Enum):
    """Which checkpoints a method reads: all of a run, its last, or the last of several runs."""

    ALL = "all"
    LAST = "last"
    RUNS = "runs"

    def select(self, checkpoints: Sequence[T]) -> Sequence[T]:
        """The checkpoints to replay, in order of training; for ``RUNS`` given one a run."""
        return checkpoints[-1:] if self is Schedule.LAST else checkpoints


class InfluenceEstimator(ABC):
    """A method that reads checkpoints after training: ``setup``, ``update`` …, ``compute``.

    A subclass sets ``name`` and ``version`` (raised when its results may change) and writes
    ``update`` and ``compute``. ``setup`` copies the model, so that the user's model, its mode, its
    gradients and its hooks are left as they were.

    Attributes:
        gradient_evaluations: per-example gradients taken so far; the method's own account of its
            cost, counted in examples.
        runs: with ``Schedule.RUNS``, models that the benchmark's runner trains for it.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    schedule: Schedule = Schedule.ALL

    problem: Problem
    model: nn.Module
    gradient_evaluations: int = 0
    n_updates: int = 0
    runs: int = 1

    def unsupported(self, problem: Problem) -> str | None:
        """Why this method cannot serve the problem, or None if it can."""
        del problem
        return None

    def select(self, checkpoints: Sequence[T]) -> Sequence[T]:
        """Those of a run's checkpoints that ``replay`` gives it, in order of training."""
        return self.schedule.select(checkpoints)

    def setup(self, problem: Problem) -> None:
        """Take the problem; called once before the first checkpoint."""
        reason = self.unsupported(problem)
        if reason is not None:
            raise UnsupportedProblemError(f"{self.name}: {reason}")
        self.problem = problem
        self.model = copy.deepcopy(problem.model).eval()
        self.gradient_evaluations = 0
        self.n_updates = 0

    def load(self, checkpoint: Checkpoint) -> None:
        """Put the checkpoint's parameters into the copy of the model.

        Raises:
            ValueError: names or shapes do not fit the model.
        """
        try:
            self.model.load_state_dict(dict(checkpoint.params))
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint does not fit the model of the problem: {error}"
            ) from error
        self.n_updates += 1

    @abstractmethod
    def update(self, checkpoint: Checkpoint) -> None:
        """Take in one checkpoint."""

    @abstractmethod
    def compute(self) -> InfluenceScores:
        """The scores over all checkpoints so far."""

    def require_update(self) -> None:
        """Refuse to compute scores before any checkpoint."""
        if self.n_updates == 0:
            raise RuntimeError(f"{self.name}: compute() before update(); pass a checkpoint first")


def replay(
    estimator: InfluenceEstimator, problem: Problem, checkpoints: Iterable[Checkpoint]
) -> InfluenceScores:
    """Run a post-hoc method over the checkpoints of a run.

    The global random state is left as it was found.

    Raises:
        UnsupportedProblemError: the method cannot serve the problem; the message says why.
        ValueError: no checkpoint, or one that does not fit the model.
    """
    chosen = estimator.select(list(checkpoints))
    if not chosen:
        raise ValueError("replay needs at least one checkpoint, got none")
    with torch.random.fork_rng():
        estimator.setup(problem)
        for checkpoint in chosen:
            estimator.update(checkpoint)
        return estimator.compute()
