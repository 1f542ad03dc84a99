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

from collections.abc import Sequence

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator
from fine_bench.gradients.blocks import Direction, PerExampleGradients, add_directions
from fine_bench.gradients.memory import engine_of
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting
from fine_bench.weighting import check_weighting, query_groups, query_weights, reference_rows


class TracIn(InfluenceEstimator):
    """Σ_c lr_c ⟨g_q, g_i⟩ over all, or the named modules', parameters.

    Args:
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.

    Values have the unit of the loss: the summed first-order drop of q's loss from steps on i.
    """

    name = "tracin"
    version = 1

    def __init__(
        self, layers: Sequence[str] | None = None, query_weighting: QueryWeighting = None
    ) -> None:
        check_weighting(query_weighting)
        self.layers = layers
        self.query_weighting: QueryWeighting = query_weighting

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
        queries = [self.gradients(x, y) for _, x, y in self.problem.batches("queries")]
        parts = []
        for _, x, y in self.problem.batches("train"):
            gradients = self.gradients(x, y)
            parts.append(torch.cat([q.gram(gradients) for q in queries]))
        self.gradient_evaluations += self.problem.n_train + self.problem.n_query
        return torch.cat(parts, 1)

    def _query_direction(self) -> Direction:
        """Σ_v w_v g_v for each row of the reduction."""
        problem = self.problem
        reference = None
        if self.query_weighting == "noise":
            rows = reference_rows(problem.n_train)
            x, y = gather(problem, rows)
            reference = self.gradients(x, y)
            self.gradient_evaluations += len(rows)
        groups = query_groups(problem.labels("queries"), problem.reduce)
        direction: Direction | None = None
        for which, x, y in problem.batches("queries"):
            queries = self.gradients(x, y)
            weights = query_weights(queries, reference, self.query_weighting)
            part = queries.weighted_sum(groups[:, which].to(weights) * weights)
            direction = part if direction is None else add_directions(direction, part)
        assert direction is not None
        return direction

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


def gather(problem: Problem, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen training examples as one batch."""
    xs, ys = [], []
    for which, x, y in problem.batches("train"):
        here = rows[(rows >= which.start) & (rows < which.stop)] - which.start
        if len(here):
            xs.append(x[here])
            ys.append(y[here])
    return torch.cat(xs), torch.cat(ys)
