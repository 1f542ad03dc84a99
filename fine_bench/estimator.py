"""What every post-hoc method looks like, and the loop that feeds it checkpoints."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fine_bench import clock
from fine_bench.types import Checkpoint, InfluenceScores, Problem, UnsupportedProblemError

T = TypeVar("T")


class Schedule(Enum):
    """Which checkpoints a method reads: all of a run, its last, or those of several runs."""

    ALL = "all"
    LAST = "last"
    RUNS = "runs"
    """The last of each of several runs."""
    ALL_RUNS = "all_runs"
    """All of each of several runs, one run after the other."""

    def select(self, checkpoints: Sequence[T]) -> Sequence[T]:
        """The checkpoints to replay, in order of training; ``RUNS`` is given one a run."""
        return checkpoints[-1:] if self is Schedule.LAST else checkpoints


class Shared:
    """What several estimators of one run would compute alike, kept while the run is studied.

    A curvature fitted for one target serves the next. Only problems about the same model, loss and
    training examples may share, whatever their queries. Everything is released with this object.

    Args:
        problem: any one of them.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._values: dict[Hashable, tuple[Any, float]] = {}

    def serves(self, problem: Problem) -> bool:
        """Whether a problem differs from the first one in its queries only."""
        mine = self._problem
        same = problem.train is mine.train
        if isinstance(problem.train, TensorDataset) and isinstance(mine.train, TensorDataset):
            pairs = zip(problem.train.tensors, mine.train.tensors, strict=False)
            same = len(problem.train.tensors) == len(mine.train.tensors) and all(
                x is y for x, y in pairs
            )
        return same and problem.model is mine.model and problem.loss is mine.loss

    def get(self, key: Hashable, make: Callable[[], T]) -> tuple[T, float]:
        """The value of a key, made at most once, and the seconds of work that this call saved."""
        if key in self._values:
            value, seconds = self._values[key]
            return value, seconds
        start = clock.now()
        value = make()
        self._values[key] = (value, clock.now() - start)
        return value, 0.0


def digest_of(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, to tell checkpoints apart by content."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        array = value.detach().cpu().contiguous()
        found.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        found.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class InfluenceEstimator(ABC):
    """A method that reads checkpoints after training: ``setup``, ``update`` …, ``compute``.

    A subclass sets ``name`` and ``version`` (raised when its results may change) and writes
    ``update`` and ``compute``. ``setup`` copies the model, so that the user's model, its mode, its
    gradients and its hooks are left as they were.

    Attributes:
        gradient_evaluations: per-example gradients taken so far; the method's own account of its
            cost, counted in examples.
        runs: with ``Schedule.RUNS`` and ``ALL_RUNS``, models that the benchmark's runner trains.
        saved_seconds: of its work that another estimator of the run had done already.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    schedule: Schedule = Schedule.ALL

    problem: Problem
    model: nn.Module
    gradient_evaluations: int = 0
    n_updates: int = 0
    runs: int = 1
    saved_seconds: float = 0.0
    _shared: Shared | None = None

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
        self.saved_seconds = 0.0

    def shared_value(self, what: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns at the loaded parameters, from another estimator that has it.

        Args:
            what: everything that the value depends on besides parameters, model class, loss and
                training data.
            make: computes it; the value must not be changed afterwards.
        """
        if self._shared is None or not self._shared.serves(self.problem):
            return make()
        value, saved = self._shared.get((what, digest_of(self.model)), make)
        self.saved_seconds += saved
        return value

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
    estimator: InfluenceEstimator,
    problem: Problem,
    checkpoints: Iterable[Checkpoint],
    shared: Shared | None = None,
) -> InfluenceScores:
    """Run a post-hoc method over the checkpoints of a run, or of several.

    The global random state is left as it was found.

    Args:
        estimator: the method.
        problem: model, loss, training examples and queries.
        checkpoints: in order of training; of several runs one run after the other.
        shared: what other estimators of the same run have left; scores do not depend on it.

    Raises:
        UnsupportedProblemError: the method cannot serve the problem; the message says why.
        ValueError: no checkpoint, or one that does not fit the model.
    """
    chosen = estimator.select(list(checkpoints))
    if not chosen:
        raise ValueError("replay needs at least one checkpoint, got none")
    estimator._shared = shared
    try:
        with torch.random.fork_rng():
            estimator.setup(problem)
            for checkpoint in chosen:
                estimator.update(checkpoint)
            return estimator.compute()
    finally:
        estimator._shared = None
