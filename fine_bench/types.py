"""What the parts of fine_bench hand to each other: frozen, and checked once, at birth.

Orientation, everywhere: score matrices are ``(n_query, n_train)`` and a positive entry means
*training on this example lowers this query's loss*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

Loss: TypeAlias = Callable[..., Tensor]
"""``loss(logits, y, reduction="none") -> (batch,)``"""

Reduce: TypeAlias = Literal["mean", "class"] | None
QueryWeighting: TypeAlias = Literal["norm", "noise"] | None
End: TypeAlias = Literal["high", "low"]
LRSchedule: TypeAlias = Literal["constant", "cosine"]
Target: TypeAlias = Literal["self", "queries", "validation", "validation_per_class"]

TARGETS: tuple[Target, ...] = ("self", "queries", "validation", "validation_per_class")

# Which end of a score is suspicious follows from what the target asks, never from the truth:
# a memorised example influences itself strongly, a harmful one raises the validation loss.
SUSPICIOUS_END: Mapping[str, End] = {
    "self": "high",
    "queries": "low",
    "validation": "low",
    "validation_per_class": "low",
}

REDUCE: Mapping[Target, Reduce] = {
    "self": None,
    "queries": None,
    "validation": "mean",
    "validation_per_class": "class",
}
"""How a target's queries make rows of the scores; ``self`` has none."""


class UnsupportedProblemError(ValueError):
    """A method cannot serve a problem. The message is the reason that the leaderboard shows."""


def dataset_size(dataset: Dataset[Any], name: str) -> int:
    """Number of examples of a map-style dataset; refused when it has none or no length."""
    try:
        n = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be a map-style dataset with a length, got {type(dataset).__name__}; "
            f"wrap the data in torch.utils.data.TensorDataset(x, y)"
        ) from None
    if n == 0:
        raise ValueError(f"{name} is empty; pass at least one example")
    return n


@dataclass(frozen=True, eq=False)
class TrainingSteps:
    """What a run did step by step, so that it can be done again; see ``baselines.unrolled``.

    Args:
        initial: parameters (and buffers) by name before the first step.
        batches: of every step, the positions ``(m,)`` int64 of its examples among ``train``; the
            step went down the mean of their losses.
        lr: of every step, ≥ 0.
        optimizer: name of the ``torch.optim`` class, for instance ``"SGD"``.
        options: its options by their names there (``optimizer.defaults`` has them all), the same
            for every parameter.
    """

    initial: Mapping[str, Tensor]
    batches: Sequence[Tensor]
    lr: Sequence[float]
    optimizer: str = "SGD"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.initial:
            raise ValueError("initial is empty; pass model.state_dict() as before the first step")
        if not len(self.batches) == len(self.lr) >= 1:
            raise ValueError(
                f"got {len(self.batches)} batches and {len(self.lr)} step sizes; pass one of each "
                "for every step, and at least one step"
            )
        if not all(0.0 <= lr < float("inf") for lr in self.lr):
            raise ValueError("lr must be finite numbers ≥ 0, one for every step")
        for step, batch in enumerate(self.batches):
            if batch.dtype != torch.int64 or batch.ndim != 1 or not len(batch):
                raise ValueError(
                    f"batches[{step}] must be positions (m,) of type int64, m ≥ 1, got "
                    f"{batch.dtype} of shape {tuple(batch.shape)}"
                )


@dataclass(frozen=True, eq=False)
class Problem:
    """A question about training data: a model, its loss, its training examples, and queries.

    Args:
        model: the network; methods work on a copy, so it is left as it was.
        loss: ``loss(logits, y, reduction="none")`` returning one loss an example, ``(batch,)``.
        train: map-style dataset whose items begin with ``(x, y)``, in index order.
        queries: dataset of the same kind, or ``"self"``: each training example is its own query.
        reduce: ``None`` gives one row a query; ``"mean"`` the mean of the rows (the validation
            target); ``"class"`` one row for every class that occurs among the query labels, each
            the mean of its queries' rows.
        batch_size, num_workers: how the data are read. They change speed and memory, no score.
        steps: what the run that left the checkpoints did step by step, for the methods that
            repeat it; None where that was not kept.
    """

    model: nn.Module
    loss: Loss
    train: Dataset[Any]
    queries: Dataset[Any] | Literal["self"]
    reduce: Reduce = None
    batch_size: int = 512
    num_workers: int = 0
    steps: TrainingSteps | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if not callable(self.loss):
            raise TypeError(
                "loss must be callable as loss(logits, y, reduction='none'), "
                f"got {type(self.loss).__name__}; torch.nn.functional.cross_entropy is one"
            )
        dataset_size(self.train, "train")
        if isinstance(self.queries, str):
            if self.queries != "self":
                raise ValueError(f'queries must be a dataset or "self", got {self.queries!r}')
            if self.reduce is not None:
                raise ValueError(
                    f'reduce={self.reduce!r} has no meaning with queries="self", whose result is '
                    "already one row; pass reduce=None"
                )
        else:
            dataset_size(self.queries, "queries")
        if self.reduce not in (None, "mean", "class"):
            raise ValueError(f'reduce must be None, "mean" or "class", got {self.reduce!r}')
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return dataset_size(self.train, "train")

    @property
    def n_query(self) -> int:
        """Number of query examples before any reduction (``n_train`` for ``"self"``)."""
        return self.n_train if isinstance(self.queries, str) else dataset_size(self.queries, "q")

    @property
    def target(self) -> Target:
        """The target that this problem asks about."""
        if isinstance(self.queries, str):
            return "self"
        by_reduce: dict[Reduce, Target] = {
            None: "queries",
            "mean": "validation",
            "class": "validation_per_class",
        }
        return by_reduce[self.reduce]

    def batches(
        self, which: Literal["train", "queries"], batch_size: int | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """``(positions, x, y)`` batch by batch, in index order."""
        dataset = self.train if which == "train" or isinstance(self.queries, str) else self.queries
        size = batch_size or self.batch_size
        n = dataset_size(dataset, which)
        if isinstance(dataset, TensorDataset) and self.num_workers == 0:
            x, y = dataset.tensors[:2]
            for start in range(0, n, size):
                rows = slice(start, min(start + size, n))
                yield rows, x[rows], y[rows]
            return
        start = 0
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=size,
            num_workers=self.num_workers,
            # a loader draws a seed for its workers: from a generator of its own, so that reading
            # data leaves the global random state alone
            generator=torch.Generator().manual_seed(0),
        )
        for x, y, *_ in loader:
            yield slice(start, start + len(x)), x, y
            start += len(x)

    def labels(self, which: Literal["train", "queries"]) -> Tensor:
        """All labels, ``(n, ...)``."""
        return torch.cat([y for _, _, y in self.batches(which)])


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a model at one moment of training.

    Args:
        params: parameters (and buffers) by name, as ``model.state_dict()`` gives them.
        lr: step size in force, > 0. TracIn weights the checkpoint by it.
        step: optimiser steps taken so far, if known.
    """

    params: Mapping[str, Tensor]
    lr: float
    step: int | None = None

    def __post_init__(self) -> None:
        if not self.params:
            raise ValueError("params is empty; pass model.state_dict()")
        if not (self.lr > 0 and self.lr < float("inf")):
            raise ValueError(f"lr must be a finite number > 0, got {self.lr}")


@dataclass(frozen=True, eq=False)
class InfluenceScores:
    """What a method says: ``values[q, i]`` > 0 means training on i lowers the loss of q.

    Attributes:
        values: ``(n_query, n_train)``, finite.
        std_error: same shape, or None where the method has no notion of its own error; an
            infinite entry says that the value rests on too few observations.
        n_observations: ``(n_train,)``, how often each example was seen, or None.
        method: name of the method.
        target: what was asked; one of ``TARGETS``.
        version: the method's version, raised when its results may change.
        extras: further arrays of the method by name, each with its shape in the docstring of
            the method (f-INE: ``bound``).
        watched: ascending positions ``(n_watched,)`` of the training examples that have a score;
            None for all of them. An unwatched value is 0 with an infinite ``std_error`` and no
            observation: it is not a score.
        observable: what was measured, where a method has a choice (f-INE: ``"margin"`` or
            ``"loss"``) and scores come from its run; files of scores do not keep it, the record's
            configuration does.
    """

    values: Tensor
    method: str
    target: Target
    std_error: Tensor | None = None
    n_observations: Tensor | None = None
    version: int = 1
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    watched: Tensor | None = None
    observable: str = ""

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise ValueError(
                f"values must have shape (n_query, n_train), got {tuple(self.values.shape)}"
            )
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}, got {self.target!r}")
        bad = ~torch.isfinite(self.values)
        if bool(bad.any()):
            first = torch.nonzero(bad)[0].tolist()
            raise ValueError(
                f"{self.method} produced {int(bad.sum())} values that are not finite, the first "
                f"at (query, train) = {tuple(first)}; look for a diverged checkpoint or a damping "
                "that is too small"
            )
        if self.std_error is not None and self.std_error.shape != self.values.shape:
            raise ValueError(
                f"std_error has shape {tuple(self.std_error.shape)}, "
                f"values {tuple(self.values.shape)}; they must agree"
            )
        n_train = self.values.shape[1]
        if self.n_observations is not None and self.n_observations.shape != (n_train,):
            raise ValueError(
                f"n_observations must have shape ({n_train},), "
                f"got {tuple(self.n_observations.shape)}"
            )
        if self.watched is not None:
            self._check_watched(self.watched, n_train)

    @staticmethod
    def _check_watched(watched: Tensor, n_train: int) -> None:
        if watched.dtype != torch.int64 or watched.ndim != 1:
            raise ValueError(
                f"watched must be positions (n_watched,) of type int64, got {watched.dtype} of "
                f"shape {tuple(watched.shape)}"
            )
        if len(watched) and (int(watched.min()) < 0 or int(watched.max()) >= n_train):
            raise ValueError(
                f"watched names positions from {int(watched.min())} to {int(watched.max())}, but "
                f"there are {n_train} training examples"
            )
        if bool((watched.diff() <= 0).any()):
            raise ValueError("watched must ascend and name each example once; sort it")

    @property
    def watched_values(self) -> Tensor:
        """``values`` of the examples that have a score, ``(n_query, n_watched)``."""
        return self.values if self.watched is None else self.values[:, self.watched]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What is known about the training examples: which ones are bad.

    Attributes:
        is_bad: ``(n_train,)`` boolean.
        kind: what "bad" means here, for instance ``"flipped label"``.
        known: ``(n_train,)`` boolean, the examples of which it is known whether they are bad: only
            among these are bad ones looked for. None for all of them.
        reviewed: ``(n_train,)`` boolean, those of the known that people looked at one by one; the
            others nobody suspected. None where there is no such difference.
    """

    is_bad: Tensor
    kind: str
    known: Tensor | None = None
    reviewed: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("is_bad", "known", "reviewed"):
            mask = getattr(self, name)
            if mask is not None and (mask.dtype != torch.bool or mask.ndim != 1):
                raise ValueError(
                    f"{name} must be a boolean vector (n_train,), got {mask.dtype} of shape "
                    f"{tuple(mask.shape)}"
                )
        inner, of = self.is_bad, "bad"
        for name, mask in (("reviewed", self.reviewed), ("known", self.known)):
            if mask is None:
                continue
            if mask.shape != inner.shape or bool((inner & ~mask).any()):
                raise ValueError(
                    f"not all {of} examples are {name} ({int(inner.sum())} among {len(inner)}, "
                    f"{int(mask.sum())} among {len(mask)}); mark the bad as reviewed and known too"
                )
            inner, of = mask, name

    @property
    def n_bad(self) -> int:
        """Number of bad examples."""
        return int(self.is_bad.sum())

    @property
    def rate(self) -> float:
        """Share of bad examples."""
        return self.n_bad / len(self.is_bad)


Status: TypeAlias = Literal["finished", "failed", "skipped"]

VARIED = "@"
"""In an estimator's name: ``row@option=value`` is the row with other options, run to see how far
its numbers move (``leaderboard.sensitivity``). It is no row of the leaderboard."""


@dataclass(frozen=True)
class RunRecord:
    """One cell of the benchmark: one estimator, one target, one task, one seed.

    A record is identified by what could change its result: task, method, method version, full
    configuration and data hash (``setting`` and ``estimator_hash`` digest the configuration).

    Attributes:
        task: name of the task.
        setting: digest of everything but the estimator and the seed: task, model, trainer, data.
        estimator: name of the leaderboard row.
        estimator_hash: digest of the estimator's own configuration.
        version: the method's version.
        target: one of ``TARGETS``.
        seed: run seed.
        status: ``"finished"``, ``"failed"`` or ``"skipped"``.
        reason: why it failed or was skipped; empty when finished.
        revision: 1 for the first, one more for every recomputation.
        metrics: metric values by name.
        cost: seconds and gradient evaluations by name.
        scores_file: name of the score file below ``scores/``, empty when there is none.
        scores_sha256: digest of the score values.
        data_sha256: digest of training data, labels and queries.
        config: the full resolved configuration.
        environment: commit, versions and hardware.
        training: facts about the training run (test accuracy, losses, seconds).
        created: ISO time stamp, UTC.
        sweep: name of the sweep that made it.
        suspicious: which end of the scores is suspicious where the task declares its own, empty
            where the target's holds; see ``end``.
        format: version of this format.
    """

    task: str
    setting: str
    estimator: str
    estimator_hash: str
    version: int
    target: str
    seed: int
    status: Status
    reason: str = ""
    revision: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    scores_file: str = ""
    scores_sha256: str = ""
    data_sha256: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    sweep: str = ""
    suspicious: str = ""
    format: int = 1

    def __post_init__(self) -> None:
        if self.status not in ("finished", "failed", "skipped"):
            raise ValueError(f"status must be finished, failed or skipped, got {self.status!r}")
        if self.status == "finished" and not self.scores_sha256:
            raise ValueError("a finished record needs the digest of its scores")
        if self.status != "finished" and not self.reason:
            raise ValueError(f"a {self.status} record must say why; pass reason=...")
        if self.revision < 1:
            raise ValueError(f"revision counts from 1, got {self.revision}")
        if self.suspicious not in ("", *get_args(End)):
            raise ValueError(
                f"suspicious must be one of {get_args(End)} or empty, got {self.suspicious!r}"
            )

    @property
    def varies(self) -> str:
        """The row whose sensitivity it measures; empty for a row of the leaderboard."""
        row, mark, _ = self.estimator.partition(VARIED)
        return row if mark else ""

    @property
    def end(self) -> End:
        """The suspicious end of its scores: the task's own, else the target's.

        Raises:
            KeyError: a target that this version does not know.
        """
        own: Mapping[str, End] = {"high": "high", "low": "low"}
        return own[self.suspicious] if self.suspicious else SUSPICIOUS_END[self.target]
