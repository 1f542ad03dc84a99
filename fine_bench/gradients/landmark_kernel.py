"""A kernel from some of its rows, and what is solved with it: regressions whose cost is not cubic.

    K ≈ ΦᵀΦ,   Φ = (K_LL + εI)^(−1/2) K_L·                               (L, N)

with L rows, the landmarks. Outside the span of the landmarks' features nothing is left; rows of
landmarks themselves are exact up to ε, so queries that are landmarks keep their kernel with every
example. Nyström's method: Williams, Seeger 2001 (NIPS 13); how many rows a regression needs, Rudi,
Camoriano, Rosasco 2015 (arXiv:1507.04717): as many as it has directions above its ridge.

Shapes: L landmarks, n training examples, N columns, k classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fine_bench.gradients.tangent_kernel import FLOW_STEPS, KernelRidge
from fine_bench.types import UnsupportedProblemError

JITTER = 1e-4
"""ε, in units of the kernel's mean diagonal: what single precision can tell of K_LL."""


def landmark_features(rows: Tensor, landmarks: Tensor) -> Tensor:
    """Φ ``(L, N)``, up to a rotation of the features.

    Args:
        rows: K_L·, ``(L, N)``, of mean diagonal about 1.
        landmarks: which columns they are, ``(L,)``.

    Raises:
        UnsupportedProblemError: K_LL + εI has negative directions.
    """
    gram = rows[:, landmarks].double()
    gram.diagonal().add_(JITTER)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) > 0:
        raise UnsupportedProblemError(
            f"the kernel of {len(landmarks)} landmarks is numerically singular: are there examples "
            "twice? take fewer landmarks, or all examples (n_landmarks=None)"
        )
    found: Tensor = torch.linalg.solve_triangular(factor.to(rows), rows, upper=False)
    return found


class LandmarkFlow:
    """``tangent_kernel.KernelFlow`` for K = ΦᵀΦ, with matrices of the size of the features.

    (K + λI)⁻¹Φᵀ = Φᵀ(ΦΦᵀ + λI)⁻¹, so e^{−τK} and A are found from ΦΦᵀ ``(L, L)``. One step is ridge
    regression with λ = 1/τ.

    Args:
        features: Φ of the training examples, ``(L, n)``.
        time: τ, > 0.
        steps: m, ≥ 1.
    """

    def __init__(self, features: Tensor, time: float, steps: int = FLOW_STEPS) -> None:
        self.features, self.steps = features, steps
        self._ridge = KernelRidge(features @ features.T, steps / time)

    def smoother(self, features: Tensor) -> Tensor:
        """Z = K_q A, ``(V, n)``, of the queries' features ``(L, V)``."""
        return self._ridge.implicit_steps(features, self.steps).T @ self.features

    def solve(self, targets: Tensor) -> Tensor:
        """α = A y, ``(n, k)`` as ``targets``."""
        left, total = targets, torch.zeros_like(targets)
        for _ in range(self.steps):
            # B y = y less what a step learns of it
            left = left - self.features.T @ self._ridge.solve(self.features @ left)
            total = total + left / self._ridge.ridge
        return total
