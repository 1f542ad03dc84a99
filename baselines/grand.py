"""GraNd: the norm of an example's gradient early in training.

    GraNd(i) = mean_c ‖g_i(θ_c)‖               c: the first checkpoints of one run, or of many

Paul, Ganguli, Dziugaite: *Deep Learning on a Data Diet: Finding Important Examples Early in
Training* (NeurIPS 2021, arXiv:2107.07075), who average over ten initialisations at one early
epoch. HIGH is suspicious, as for every ``self`` score. An example is looked at alone, so there is
no query.

Where we deviate: on the leaderboard a method sees one run, so the mean is over its first
checkpoints. For the paper's own mean, over initialisations, give ``replay`` one early checkpoint of
each run and ``first=None``. (Kirsch, *Does "Deep Learning on a Data Diet" reproduce?*,
arXiv:2303.14753, finds that GraNd *at initialisation* does not find what it is said to find; an
epoch is always over when the first checkpoint is written.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.controls import _SelfControl
from fine_bench.gradients.engine import GradientEngine
from fine_bench.types import Checkpoint, InfluenceScores, Problem


class GraNd(_SelfControl):
    """Mean gradient norm over the first checkpoints.

    Args:
        first: how many checkpoints are averaged, ≥ 1; all of them where there are fewer; None for
            all there are.
        layers: names of modules whose parameters count; None for all.

    Values have the unit of the loss per unit of the parameters, ≥ 0.
    """

    name = "grand"
    version = 1

    def __init__(self, first: int | None = 5, layers: Sequence[str] | None = None) -> None:
        if first is not None and first < 1:
            raise ValueError(f"first must be at least 1, or None for all checkpoints, got {first}")
        self.first = first
        self.layers = layers

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self.engine = GradientEngine(self.model, problem.loss, self.layers)
        self._total = torch.zeros(problem.n_train, dtype=torch.float64)

    def update(self, checkpoint: Checkpoint) -> None:
        """Add one checkpoint's norms, if it is among the first."""
        if self.first is not None and self.n_updates >= self.first:
            return
        self.load(checkpoint)
        for rows, x, y in self.problem.batches("train"):
            self._total[rows] += self.engine(x, y).norm2().sqrt().double()
        self.gradient_evaluations += self.problem.n_train

    def compute(self) -> InfluenceScores:
        """The mean over the checkpoints that counted."""
        self.require_update()
        mean: Tensor = self._total / self.n_updates
        return self._scores(mean.to(next(self.model.parameters()).dtype)[None])
