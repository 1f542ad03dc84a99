"""TracIn: influence as the sum over checkpoints of step size times gradient dot product.

    TracIn(q, i) = Σ_c lr_c ⟨g_q, g_i⟩                        (θ at checkpoint c)

Pruthi, Liu, Kale, Sundararajan: *Estimating Training Data Influence by Tracing Gradient Descent*
(NeurIPS 2020, arXiv:2002.08484), the checkpoint version. A step of SGD on example i lowers the
loss of q by lr ⟨g_q, g_i⟩ to first order, so a positive value means that i helps q.

We differ in nothing by default: all parameters, no projection, no normalisation. ``self`` needs no
n × n matrix (⟨g_i, g_i⟩ from factors), a mean over queries is one direction in parameter space.
``query_weighting`` is ours, the same option for every method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator, T
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.cache import engine_of
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.projection.chunks import joined
from fine_bench.gradients.query_weighting import (
    check_weighting,
    noise_weights,
    query_direction,
    query_groups,
    query_weights,
    reference_rows,
)
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting

FORMED_FLOATS = 2**27
"""Numbers that the gradients of all queries may take where they are formed in full: 0.5 GiB."""


class TracIn(InfluenceEstimator):
    """Σ_c lr_c ⟨g_q, g_i⟩ over all, or the named modules', parameters.

    Args:
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        every: ``replay`` sums every so many of the run's checkpoints only, counted back from the
            last, which is always among them; ≥ 1.

    Values have the unit of the loss: the summed first-order drop of q's loss from steps on i.
    """

    name = "tracin"
    version = 1

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        query_weighting: QueryWeighting = None,
        every: int = 1,
    ) -> None:
        check_weighting(query_weighting)
        if every < 1:
            raise ValueError(f"every counts checkpoints, at least 1, got {every}; pass every=1")
        self.layers = layers
        self.query_weighting: QueryWeighting = query_weighting
        self.every = every

    def select(self, checkpoints: Sequence[T]) -> Sequence[T]:
        """Every so many, the last one among them."""
        return super().select(checkpoints)[:: -self.every][::-1]

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self.engine = engine_of(self.model, problem.loss, self.layers)
        self._total: Tensor | None = None

    def update(self, checkpoint: Checkpoint) -> None:
        """Add one checkpoint's term."""
        self.load(checkpoint)
        values = self.values_now()
        term = checkpoint.lr * values.double()
        self._total = term if self._total is None else self._total + term

    def gradients(self, x: Tensor, y: Tensor) -> PerExampleGradients:
        """What dot products are taken of."""
        return self.engine(x, y)

    def values_now(self) -> Tensor:
        """⟨g_q, g_i⟩ at the loaded checkpoint, rows reduced as the problem asks."""
        if isinstance(self.problem.queries, str):
            parts = [self.gradients(x, y).norm2() for _, x, y in self.problem.batches("train")]
            self.gradient_evaluations += self.problem.n_train
            return torch.cat(parts)[None]
        if self.problem.reduce is None:
            return self._pairwise()
        direction = self._query_direction()
        parts = [
            self.gradients(x, y).contract(direction) for _, x, y in self.problem.batches("train")
        ]
        self.gradient_evaluations += self.problem.n_train + self.problem.n_query
        return torch.cat(parts, 1)

    def _pairwise(self) -> Tensor:
        queries = self._queries()
        parts = []
        for _, x, y in self.problem.batches("train"):
            gradients = self._comparable(self.gradients(x, y))
            parts.append(torch.cat([q.gram(gradients) for q in queries]))
        self.gradient_evaluations += self.problem.n_train + self.problem.n_query
        return torch.cat(parts, 1)

    def _queries(self) -> list[PerExampleGradients]:
        """The gradients of all queries, as they are compared with others.

        A layer with many positions forms a query's gradient for every batch that it meets, unless
        it is formed here once and for all, which needs memory: small models only.
        """
        self._form = False
        found: list[PerExampleGradients] = []
        for _, x, y in self.problem.batches("queries"):
            gradients = self.gradients(x, y)
            self._form = gradients.n_params * self.problem.n_query <= FORMED_FLOATS
            found.append(self._comparable(gradients))
        return [joined(found)] if self._form else found

    def _comparable(self, gradients: PerExampleGradients) -> PerExampleGradients:
        return formed(gradients) if self._form else gradients

    def _query_direction(self) -> Direction:
        """Σ_v w_v g_v for each row of the reduction."""
        problem = self.problem
        noise = self._noise() if self.query_weighting == "noise" else None

        def weigh(which: slice, queries: PerExampleGradients) -> Tensor:
            if noise is not None:
                return noise[which]
            return query_weights(queries, None, self.query_weighting)

        batches = ((which, self.gradients(x, y)) for which, x, y in problem.batches("queries"))
        return query_direction(
            batches, query_groups(problem.labels("queries"), problem.reduce), weigh
        )

    def _noise(self) -> Tensor:
        """1/σ_v of each query's dot products with the reference examples, ``(V,)``."""
        queries = self._queries()
        parts = []
        for _, x, y in reference_batches(self.problem):
            reference = self._comparable(self.gradients(x, y))
            parts.append(torch.cat([q.gram(reference) for q in queries]))
            self.gradient_evaluations += len(y)
        self.gradient_evaluations += self.problem.n_query
        return noise_weights(torch.cat(parts, 1))

    def compute(self) -> InfluenceScores:
        """The sum over the checkpoints so far."""
        self.require_update()
        assert self._total is not None
        dtype = next(self.model.parameters()).dtype
        return InfluenceScores(
            values=self._total.to(dtype),
            method=self.name,
            target=self.problem.target,
            version=self.version,
        )


def formed(gradients: PerExampleGradients) -> PerExampleGradients:
    """The same with the gradients of layers with several positions in full, ``(B, P)``."""
    blocks = [block.positions_summed() for block in gradients.blocks]
    return PerExampleGradients(blocks, gradients.loss, gradients.one_minus_p)


def reference_batches(problem: Problem) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """``(positions among them, x, y)`` of the reference examples, batch by batch."""
    x, y = gather(problem, reference_rows(problem.n_train))
    for start in range(0, len(y), problem.batch_size):
        rows = slice(start, min(start + problem.batch_size, len(y)))
        yield rows, x[rows], y[rows]


def gather(problem: Problem, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen training examples as one batch."""
    xs, ys = [], []
    for which, x, y in problem.batches("train"):
        here = rows[(rows >= which.start) & (rows < which.stop)] - which.start
        if len(here):
            xs.append(x[here])
            ys.append(y[here])
    return torch.cat(xs), torch.cat(ys)
