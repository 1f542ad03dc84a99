"""Passes of f-INE's own beside the training: the queries' gradients, the curvature, the counts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fine_bench.fine.distributed import Processes
from fine_bench.fine.geometry import Metric
from fine_bench.fine.observable import say_loss
from fine_bench.fine.training_data import TrainingData
from fine_bench.gradients.blocks.direction import BlockDirection, Direction
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import query_groups
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import QueryWeighting, Reduce

Aside = Callable[[], AbstractContextManager[None]]
"""Opens a context with the model in evaluation mode, which puts every mode and random state back"""


class QueryDirections:
    """The queries' ∇h as directions, one for each row of the scores.

    Args:
        x, y: the queries, ``(V, …)`` and ``(V, …)``; see ``BatchAdapter.inputs``.
        reduce: rows of the scores; see ``fine_bench.gradients.query_weighting.query_groups``.
        weighting: how queries are weighted in a mean.
        observable: ``"margin"`` or ``"loss"``; None: the margin if the queries have one.
    """

    def __init__(
        self,
        x: Any,
        y: Tensor,
        reduce: Reduce,
        weighting: QueryWeighting,
        observable: Literal["margin", "loss"] | None,
    ) -> None:
        self.x, self.y = x, y
        self.groups = query_groups(y, reduce).to(y.device)
        self.single = reduce is None
        # a single query's row is a test of its own: weights belong to means over queries
        self.weighting: QueryWeighting = None if reduce is None else weighting
        self.observable: Literal["margin", "loss"] | None = observable

    def __len__(self) -> int:
        return len(self.y)

    @property
    def n_rows(self) -> int:
        """Rows R of the scores."""
        return len(self.groups)

    def part(self, rows: slice) -> tuple[Any, Tensor]:
        """Some of the queries, ``x, y``."""

        def some(leaf: Any) -> Any:
            return leaf[rows] if isinstance(leaf, Tensor) else leaf

        return tree_map(some, self.x), self.y[rows]

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with what the run's beginning has chosen; earlier versions took the margin."""
        if self.observable is None:
            self.observable = state.get("observable", "margin") or None

    def __call__(
        self, engine: GradientEngine, reference: PerExampleGradients, metric: Metric
    ) -> Direction:
        """R directions at the present parameters, to be contracted with plain gradients.

        Args:
            engine: of the model, in evaluation mode.
            reference: gradients of reference examples, for the queries' noise.
            metric: the geometry.
        """
        if self.observable is None:
            self.observable = "margin" if engine.has_margin(self.x, self.y) else "loss"
            if self.observable == "loss":
                say_loss()
        queries = engine(self.x, self.y, self.observable)
        weights = metric.query_weights(queries, reference, self.weighting)
        if self.single:
            return metric.solve(queries.each(weights))
        return metric.solve(queries.weighted_sum(self.groups.to(weights) * weights))


class Passes:
    """What both schedules share.

    Args:
        engine: gradients of the model in training.
        data: the training examples by position.
        metric: the geometry.
        queries: None for the target ``self``.
        aside: see ``Aside``.
        processes: of the run; one by default.

    Attributes:
        evaluations: per-example gradients taken so far.
    """

    def __init__(
        self,
        engine: GradientEngine | None,
        data: TrainingData,
        metric: Metric,
        queries: QueryDirections | None,
        aside: Aside,
        processes: Processes | None = None,
    ) -> None:
        self._engine = engine
        self.data = data
        self.metric = metric
        self.queries = queries
        self.aside = aside
        self.processes = processes or Processes()
        self.evaluations = 0

    @property
    def engine(self) -> GradientEngine:
        """The engine; nothing asks for one that was not made."""
        assert self._engine is not None
        return self._engine

    @property
    def n_rows(self) -> int:
        """Rows of the scores."""
        return 1 if self.queries is None else self.queries.n_rows

    def gradients(
        self, x: Any, y: Tensor, observable: Literal["margin", "loss"] = "loss"
    ) -> PerExampleGradients:
        """Gradients of the loss or the margin, counted; to be called inside ``aside``."""
        self.evaluations += len(y)
        return self.engine(x, y, observable)

    def directions(self, reference: PerExampleGradients) -> Direction:
        """The queries' directions at the present parameters; to be called inside ``aside``."""
        assert self.queries is not None
        self.evaluations += len(self.queries)
        return self.queries(self.engine, reference, self.metric)

    def fit_if_due(self, step: int, epoch: int) -> bool:
        """Fit the curvature at the present parameters, if it is time; whether it was."""
        if not self.metric.due(step, epoch):
            return False
        with self.aside():
            self.evaluations += self.metric.fit(self.engine, self.data, step, epoch)
        return True

    def ready(self) -> bool:
        """Whether there is a geometry to score in; a preconditioner is read anew."""
        return self.metric.refresh()

    def watch(self, recorder: LayerRecorder) -> None:
        """Other parameters are trained than before.

        Args:
            recorder: of the layers that are trained now.
        """
        if self._engine is not None and self._engine.recorder is not recorder:
            self._engine.watch()
        self.metric.watch(recorder.parameters())

    def close(self) -> None:
        """Remove the engine's hooks."""
        if self._engine is not None:
            self._engine.close()


def warn_of_gradients(where: str, what: str) -> None:
    """Say once that something is left out."""
    warnings.warn(
        f"NaN or infinite gradients {where}: {what} and later ones like it are left out of the "
        "f-INE scores; lower the learning rate or clip the gradients",
        stacklevel=2,
    )


def direction_state(direction: Direction) -> list[tuple[Tensor | None, Tensor | None]]:
    """Directions as plain tensors, for a checkpoint."""
    return [(part.weight, part.bias) for part in direction]


def direction_from_state(
    state: list[tuple[Tensor | None, Tensor | None]], device: torch.device | str
) -> Direction:
    """The inverse of ``direction_state``."""

    def to(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(device)

    return [BlockDirection(to(weight), to(bias)) for weight, bias in state]
