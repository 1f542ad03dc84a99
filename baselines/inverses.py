"""(C + λI)⁻¹ as influence functions use it: four solvers of one system behind one face.

``EKFAC`` of ``fine_bench.gradients.curvature.ekfac`` is the fifth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from baselines.arnoldi import RitzPairs
from baselines.conjugate_gradients import solve_cg
from baselines.lissa import Lissa
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.curvature.products import as_direction, as_rows
from fine_bench.gradients.per_example import PerExampleGradients

BLOCK_FLOATS = 2**24
"""Numbers in one block of right-hand sides of CG, which holds about six of them."""

SERIES_FLOATS = 2**23
"""The same of LiSSA, which holds three, and shares nothing among a block but the draws."""


class Inverse(Protocol):
    """(C + λI)⁻¹, as the estimator uses it."""

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """gᵀ(C + λI)⁻¹g, ``(B,)``."""
        ...

    def prepare(self, queries: PerExampleGradients) -> Direction:
        """(C + λI)⁻¹g for every query, to be contracted with ``view`` of the training gradients."""
        ...

    def view(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """Training gradients in the coordinates of ``prepare``."""
        ...

    def solve(self, direction: Direction) -> Direction:
        """(C + λI)⁻¹ times directions in the model's own coordinates."""
        ...

    def solved_norm2(self, gradients: PerExampleGradients) -> Tensor:
        """‖(C + λI)⁻¹g‖², ``(B,)``."""
        ...


class RowsInverse(ABC):
    """(C + λI)⁻¹ by a function that solves for flat gradients, ``(K, P)``."""

    @abstractmethod
    def _solve(self, rows: Tensor) -> Tensor:
        """(C + λI)⁻¹ times rows."""

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """gᵀ(C + λI)⁻¹g, ``(B,)``."""
        rows = gradients.dense()
        return (self._solve(rows) * rows).sum(1)

    def prepare(self, queries: PerExampleGradients) -> Direction:
        """(C + λI)⁻¹g for every query."""
        return as_direction(self._solve(queries.dense()), direction_like(queries))

    def view(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """The gradients themselves."""
        return gradients

    def solve(self, direction: Direction) -> Direction:
        """(C + λI)⁻¹ times directions."""
        return as_direction(self._solve(as_rows(direction)), direction)

    def solved_norm2(self, gradients: PerExampleGradients) -> Tensor:
        """‖(C + λI)⁻¹g‖², ``(B,)``."""
        return self._solve(gradients.dense()).square().sum(1)


class ExactInverse(RowsInverse):
    """A Cholesky factor of C + λI, ``(P, P)``."""

    def __init__(self, damped: Tensor, lam: float) -> None:
        self.factor = cholesky(damped, lam, "the curvature C")

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """‖L⁻¹g‖² with C + λI = LLᵀ, ``(B,)``."""
        rows = gradients.dense().T
        half: Tensor = torch.linalg.solve_triangular(self.factor, rows, upper=False)
        return half.square().sum(0)

    def _solve(self, rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.T, self.factor).T


class ArnoldiInverse(RowsInverse):
    """(C + λI)⁻¹ within a Krylov space, 1/λ outside of it."""

    def __init__(self, pairs: RitzPairs) -> None:
        self.pairs = pairs

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """From projections: no gradient is formed."""
        return self.pairs.quadratic(self._along(gradients), gradients.norm2())

    def solved_norm2(self, gradients: PerExampleGradients) -> Tensor:
        """From projections too."""
        return self.pairs.quadratic(self._along(gradients), gradients.norm2(), 2)

    def _along(self, gradients: PerExampleGradients) -> Tensor:
        return gradients.contract(as_direction(self.pairs.vectors, direction_like(gradients)))

    def _solve(self, rows: Tensor) -> Tensor:
        return self.pairs.solve(rows)


class LissaInverse(RowsInverse):
    """(C + λI)⁻¹ by LiSSA.

    Args:
        lissa: the series.
        report: told the relative residuals ``(K,)`` and the scales ``(K,)`` of each block.
    """

    def __init__(self, lissa: Lissa, report: Callable[[Tensor, Tensor], None]) -> None:
        self.lissa = lissa
        self.report = report

    def _solve(self, rows: Tensor) -> Tensor:
        parts = []
        for block in torch.split(rows, max(1, SERIES_FLOATS // rows.shape[1])):
            x, residual, scales = self.lissa.solve(block)
            self.report(residual, scales)
            parts.append(x)
        return torch.cat(parts)


class CGInverse(RowsInverse):
    """(C + λI)⁻¹ by block conjugate gradients.

    Args:
        products: v ↦ C v.
        lam: λ.
        tol, max_iter: see ``InfluenceFunction``.
        report: told the iterations and the relative residuals ``(K,)`` of each block.
    """

    def __init__(
        self,
        products: Callable[[Tensor], Tensor],
        lam: float,
        tol: float,
        max_iter: int,
        report: Callable[[int, Tensor], None],
    ) -> None:
        self.products = products
        self.lam = lam
        self.tol = tol
        self.max_iter = max_iter
        self.report = report

    def _solve(self, rows: Tensor) -> Tensor:
        def apply(v: Tensor) -> Tensor:
            return self.products(v) + self.lam * v

        # more right-hand sides than dimensions cannot be independent
        size = max(1, min(BLOCK_FLOATS // rows.shape[1], rows.shape[1]))
        parts = []
        for block in torch.split(rows, size):
            x, residual, iterations = solve_cg(apply, block, self.tol, self.max_iter)
            self.report(iterations, residual)
            parts.append(x)
        return torch.cat(parts)


def direction_like(gradients: PerExampleGradients) -> Direction:
    """One direction of the shape of these gradients, as a pattern."""
    one = gradients.rows(slice(0, 1))
    return one.weighted_sum(one.norm2()[None])


def cholesky(damped: Tensor, lam: float, what: str) -> Tensor:
    """The lower Cholesky factor of ``what`` + λI.

    Raises:
        ValueError: the matrix is not positive definite; says by how much.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal()
    slack = len(damped) * torch.finfo(damped.dtype).eps
    if int(info) == 0 and float(pivots.min()) ** 2 > slack * float(pivots.max()) ** 2:
        return factor
    low = float(torch.linalg.eigvalsh(damped)[0])
    raise ValueError(
        f"{what} + λI is not positive definite: its smallest eigenvalue is {low:.3g} with "
        f"λ = {lam:.3g} in it; give a damping above {lam - low:.3g}, or a curvature that is never "
        'negative, such as "ggn"'
    )
