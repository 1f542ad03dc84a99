"""LESS: which training example's own Adam step points where a query wants to go?

    LESS(q, i) = Σ_c lr_c cos( Pᵀ g_q, Pᵀ Γ_c(g_i) )                       (θ at checkpoint c)

g the gradient of an example's own loss, Γ_c the step that Adam would make with it in the state of
checkpoint c (``fine_bench.gradients.adam``), lr_c the mean step size of the epoch that ended there,
P a random projection. Xia, Malladi, Gururangan, Arora, Chen: *LESS: Selecting Influential Data for
Targeted Instruction Tuning* (ICML 2024, arXiv:2402.04333), made for LoRA tuning. The cosine keeps
short sequences, whose gradients are large, from winning by their norm. Positive: i helps q.

- Γ contains Adam's running mean, the same for every example: at a checkpoint it shifts all cosines
  of a query by nearly the same amount.
- Weight decay is left out of Γ, as there.
- A mean over queries is the mean of the rows, as in the paper within a task; the paper's maximum
  over tasks has no counterpart here.
- ``self`` has no meaning: the method compares with examples from elsewhere.
- A checkpoint without Adam's state (a run under SGD) has Γ(g) = g, the paper's section 2.
- ``query_weighting`` is ours, as for every method; it refers to the cosines at a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal, TypeAlias

import torch

from fine_bench.estimator import InfluenceEstimator
from fine_bench.gradients.adam import AdamCheckpoint, adam_direction
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.cache import engine_of
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.projection.random import make_projection
from fine_bench.gradients.query_weighting import (
    check_weighting,
    noise_weights,
    query_groups,
    reference_rows,
)
from fine_bench.gradients.reciprocal import unit_rows
from fine_bench.types import (
    Checkpoint,
    InfluenceScores,
    Problem,
    QueryWeighting,
    UnsupportedProblemError,
)

LessProjection: TypeAlias = Literal["gaussian", "rademacher", "sjlt"] | None


class LESS(InfluenceEstimator):
    """LESS over all given checkpoints.

    Args:
        projection: ``"rademacher"`` (the paper's), ``"gaussian"``, ``"sjlt"``, or None for P = I.
        dim: projected dimension, ≥ 1; the paper's 8192 by default.
        seed: of the projection, ≥ 0.
        adam: insist on Adam's state in every checkpoint.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` (changes nothing here)
            or ``"noise"``.
        layers: names of modules whose parameters count; None for all.

    Values have the unit of the step size. ``extras``: ``preconditioned`` (checkpoints,), whether
    each of them had Adam's state.
    """

    name = "less"
    version = 1

    def __init__(
        self,
        projection: LessProjection = "rademacher",
        dim: int = 8192,
        seed: int = 0,
        *,
        adam: bool = False,
        query_weighting: QueryWeighting = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        check_weighting(query_weighting)
        if projection not in (None, "gaussian", "rademacher", "sjlt"):
            raise ValueError(
                f"projection must be None, 'gaussian', 'rademacher' or 'sjlt', got {projection!r}; "
                "Adam's step is no product of factors that others could use"
            )
        self.projection = make_projection(projection or "none", dim, seed)
        self.adam = adam
        self.query_weighting: QueryWeighting = query_weighting
        self.layers = layers

    def unsupported(self, problem: Problem) -> str | None:
        """Not ``self``."""
        if isinstance(problem.queries, str):
            return "compares training examples with queries from elsewhere"
        return None

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self.engine = engine_of(self.model, problem.loss, self.layers)
        self._groups = query_groups(problem.labels("queries"), problem.reduce)
        self._total = torch.zeros(len(self._groups), problem.n_train, dtype=torch.float64)
        self._preconditioned: list[bool] = []

    def update(self, checkpoint: Checkpoint) -> None:
        """Add one checkpoint's cosines."""
        has_state = isinstance(checkpoint, AdamCheckpoint)
        if self.adam and not has_state:
            raise UnsupportedProblemError(
                f"{self.name}: adam=True, but the checkpoint of step {checkpoint.step} has no "
                "state of Adam; pass fine_bench.gradients.adam.AdamCheckpoint, or adam=False for "
                "a run under SGD"
            )
        self.load(checkpoint)
        # P is drawn once for both
        directions = chain(self._directions("queries", None), self._directions("train", checkpoint))
        features = unit_rows(self.projection.project_all(directions))[0]
        queries, train = features[: self.problem.n_query], features[self.problem.n_query :]
        self.gradient_evaluations += self.problem.n_train + self.problem.n_query
        rows = (queries @ train.T).double().cpu()
        weights = self._groups
        if self.problem.reduce is not None and self.query_weighting == "noise":
            weights = weights * noise_weights(rows[:, reference_rows(self.problem.n_train)])
        self._total += checkpoint.lr * (weights @ rows)
        self._preconditioned.append(has_state)

    def compute(self) -> InfluenceScores:
        """The sum over the checkpoints so far."""
        self.require_update()
        dtype = next(self.model.parameters()).dtype
        return InfluenceScores(
            values=self._total.to(torch.float64 if dtype == torch.float64 else torch.float32),
            method=self.name,
            target=self.problem.target,
            version=self.version,
            extras={"preconditioned": torch.tensor(self._preconditioned)},
        )

    def _directions(
        self, which: Literal["train", "queries"], state: Checkpoint | None
    ) -> Iterator[PerExampleGradients]:
        """g of the queries or Γ(g) of the training examples."""
        for _, x, y in self.problem.batches(which):
            gradients = self.engine(x, y)
            if isinstance(state, AdamCheckpoint):
                gradients = PerExampleGradients(
                    [self._adam(block, state) for block in gradients.blocks]
                )
            yield gradients

    def _adam(self, block: Block, state: AdamCheckpoint) -> DenseBlock:
        """Γ of one block's gradients."""
        names = self._parameters(block.name)
        missing = [name for name in names if name not in state.mean]
        if missing:
            raise ValueError(
                f"the checkpoint has no Adam state of {missing[0]}; it has that of "
                f"{', '.join(sorted(state.mean)[:3])} …"
            )
        g = block.dense()
        mean, square = (
            torch.cat([part[name].flatten() for name in names]).to(g)
            for part in (state.mean, state.square)
        )
        return DenseBlock(
            block.name,
            adam_direction(
                g, mean, square, betas=state.betas, epsilon=state.epsilon, updates=state.updates
            ),
        )

    def _parameters(self, block: str) -> list[str]:
        """Names of a block's parameters, in the order of its columns."""
        recorder = self.engine.recorder
        return recorder.parameter_names(block) if block in recorder.layers else recorder.leftover
