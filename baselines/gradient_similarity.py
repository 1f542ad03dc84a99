"""GradDot and GradCos: similarity of gradients at the last checkpoint.

    GradDot(q, i) = ⟨g_q, g_i⟩
    GradCos(q, i) = ⟨g_q, g_i⟩ / (‖g_q‖ ‖g_i‖)

g the gradient of an example's own loss. Charpiat, Girard, Felardos, Tarabalka: *Input Similarity
from the Neural Network Perspective* (NeurIPS 2019, arXiv:2102.05262); Hanawa, Yokoi, Hara, Inui:
*Evaluation of Similarity-based Explanations* (ICLR 2021, arXiv:2006.04528), who find the cosine
the more useful. GradDot is TracIn at one checkpoint without the step size. Positive: a step on i
lowers the loss of q.

A mean over queries is a mean of the rows: of dot products, and of *cosines* (not the cosine of
the mean gradient). ``query_weighting`` is that of every method, applied to the vectors that are
averaged: for GradCos these have norm one, so ``"norm"`` changes nothing there. The cosine with a
zero gradient is zero: it points nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.tracin import TracIn
from fine_bench.estimator import Schedule
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.reciprocal import inverse_or_zero
from fine_bench.types import Checkpoint, Problem


class GradDot(TracIn):
    """⟨g_q, g_i⟩ at the last checkpoint.

    Args:
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.

    For ``self`` the values are ‖g_i‖².
    """

    name = "grad_dot"
    version = 1
    schedule = Schedule.LAST

    def update(self, checkpoint: Checkpoint) -> None:
        """Dot products at this checkpoint; the last one counts."""
        self.load(checkpoint)
        self._total = self.values_now().double()


class GradCos(GradDot):
    """Cosine of the angle between g_q and g_i at the last checkpoint, in [−1, 1].

    Args:
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
    """

    name = "grad_cos"
    version = 1

    def unsupported(self, problem: Problem) -> str | None:
        """Not ``self``: every example has cosine one with itself."""
        if isinstance(problem.queries, str):
            return "the cosine of an example's gradient with itself is 1 for every example"
        return None

    def gradients(self, x: Tensor, y: Tensor) -> PerExampleGradients:
        """Divided by their norm over all blocks; a zero gradient stays zero."""
        gradients = super().gradients(x, y)
        # two steps: the square of a confident example's small gradient would underflow
        gradients = gradients.scaled(inverse_or_zero(_largest(gradients)))
        return gradients.scaled(inverse_or_zero(gradients.norm2().sqrt()))


def _largest(gradients: PerExampleGradients) -> Tensor:
    """Largest absolute entry among the output gradients (or full gradients) of each example."""
    parts = [block.values.flatten(1).abs().amax(1) for block in gradients.blocks]
    return torch.stack(parts).amax(0)
