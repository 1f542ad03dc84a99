"""RelatIF: influence per unit of what the training example does to the model as a whole.

    θ-relative:  g_qᵀ (C + λI)⁻¹ g_i / ‖(C + λI)⁻¹ g_i‖
    ℓ-relative:  g_qᵀ (C + λI)⁻¹ g_i / sqrt( g_iᵀ (C + λI)⁻¹ g_i )

Barshan, Brunet, Dziugaite: *RelatIF: Identifying Explanatory Training Examples via Relative
Influence* (AISTATS 2020, arXiv:2003.11630). An outlier has a large gradient and so a large
influence on every query; dividing by the length of the parameters' move (θ), or by the square root
of the example's influence on itself, the move as the losses see it (ℓ), leaves how much of the
example's effect is aimed at this query. The ℓ-relative score is √(g_qᵀ(C+λI)⁻¹g_q) times a cosine
in the metric (C + λI)⁻¹.

Everything else, solvers and options, is ``InfluenceFunction``; the divisors are on the training
side, so a mean over queries is divided after it is taken. The noise of a query is that of the
divided scores. For ``self`` the values are the same formulas with q = i; the ℓ-relative one is the
square root of the self-influence, so its ranking is that of ``InfluenceFunction``.

Where we deviate: C is any of ``InfluenceFunction``'s curvatures (EK-FAC by default) where the
paper has the Hessian by LiSSA; the sign is ours, positive helps; an example without gradient gets
0; ``solver="exact"`` with the empirical Fisher always builds the full matrix, never the dual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from baselines.damped_system import Solver
from baselines.influence_functions import InfluenceFunction
from baselines.inverses import Inverse
from fine_bench.gradients.curvature.products import Curvature
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.reciprocal import ratio_or_zero
from fine_bench.types import Problem, QueryWeighting

Relative: TypeAlias = Literal["theta", "loss"]


class RelatIF(InfluenceFunction):
    """g_qᵀ (C + λI)⁻¹ g_i at the last checkpoint, over the size of example i's own effect.

    Args:
        relative: ``"theta"`` (θ-relative) or ``"loss"`` (ℓ-relative).
        solver: as for ``InfluenceFunction``, as all that follow; ``"cg"`` and ``"lissa"`` solve
            one system a training example.
        curvature, damping, relative_damping, layers, query_weighting, tol, max_iter: as there.
        n_samples, seed, scale, depth, repeats, sample_size, krylov: as there.

    Values: θ-relative, loss per unit length of the parameters' move; ℓ-relative, the square root of
    a loss. ``extras`` are those of ``InfluenceFunction``.
    """

    name = "relatif"
    version = 1

    def __init__(
        self,
        relative: Relative = "loss",
        solver: Solver = "ekfac",
        curvature: Curvature | None = None,
        damping: float | None = None,
        relative_damping: float = 0.1,
        layers: Sequence[str] | None = None,
        query_weighting: QueryWeighting = None,
        tol: float = 1e-8,
        max_iter: int = 5000,
        n_samples: int = 1,
        seed: int = 0,
        scale: float | None = None,
        depth: int = 1000,
        repeats: int = 1,
        sample_size: int | None = 64,
        krylov: int = 200,
    ) -> None:
        if relative not in get_args(Relative):
            raise ValueError(f"relative must be one of {get_args(Relative)}, got {relative!r}")
        super().__init__(
            solver=solver,
            curvature=curvature,
            damping=damping,
            relative_damping=relative_damping,
            layers=layers,
            query_weighting=query_weighting,
            tol=tol,
            max_iter=max_iter,
            n_samples=n_samples,
            seed=seed,
            scale=scale,
            depth=depth,
            repeats=repeats,
            sample_size=sample_size,
            krylov=krylov,
        )
        self.relative: Relative = relative

    def _per_example(self, problem: Problem) -> bool:
        """Every training example is a right-hand side, whatever the queries."""
        del problem
        return True

    def _dual(self, problem: Problem, n_params: int) -> bool:
        """Never: the dual has no (C + λI)⁻¹g_i."""
        del problem, n_params
        return False

    def _values_from(self, inverse: Inverse) -> Tensor:
        values = super()._values_from(inverse)
        parts = [self._sizes(inverse, self._gradients(x, y)) for _, x, y in self._batches()]
        return ratio_or_zero(values, torch.cat(parts))

    def _statistic(self, inverse: Inverse) -> Tensor:
        values = super()._statistic(inverse)
        parts = [self._sizes(inverse, self._gradients(x, y)) for _, x, y in self._reference()]
        return ratio_or_zero(values, torch.cat(parts))

    def _sizes(self, inverse: Inverse, gradients: PerExampleGradients) -> Tensor:
        """How much each example moves the parameters, or the losses, ``(B,)``."""
        if self.relative == "theta":
            return inverse.solved_norm2(gradients).sqrt()
        return inverse.quadratic(gradients).sqrt()
