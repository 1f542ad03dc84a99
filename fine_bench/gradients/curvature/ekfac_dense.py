"""The curvature of a block without factors: its second moments in full, or their diagonal.

For normalisation layers, grouped convolutions, what ``torch.func`` has to take, and every kind of
block for which nothing else is registered: the exact second-moment matrix of its gradients up to
``DENSE_LIMIT`` parameters, its diagonal beyond.

Shapes: B examples, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.curvature.block import (
    BlockCurvature,
    CurvatureFit,
    added,
    register_curvature,
)

DENSE_LIMIT = 2048
"""Largest block without factors whose full second-moment matrix is kept."""


@dataclass(eq=False)
class DenseCurvature(BlockCurvature[Block]):
    """The curvature of a block without factors: a matrix, or its diagonal.

    Attributes:
        name: name of the block.
        basis: eigenvectors in columns, ``(P, P)``, or None for a diagonal.
        eigenvalues: ``(P,)``, float64, ≥ 0.
        inverse: 1/(eigenvalues + λ); set by ``EKFAC.damp``.
    """

    name: str
    basis: Tensor | None
    eigenvalues: Tensor
    inverse: Tensor

    def _solve(self, g: Tensor) -> Tensor:
        if self.basis is None:
            return g * self.inverse
        return ((g @ self.basis) * self.inverse) @ self.basis.T

    def quadratic(self, block: Block) -> Tensor:
        """vᵀ(C + λ)⁻¹v for every example's gradient v, ``(B,)``."""
        g = block.dense()
        return (self._solve(g) * g).sum(1)

    def own_and_total(self, block: Block) -> tuple[Tensor, Tensor]:
        """vᵢᵀ(C + λ)⁻¹vᵢ and Σ_j vᵢᵀ(C + λ)⁻¹v_j over the batch, each ``(B,)``."""
        g = block.dense()
        solved = self._solve(g)
        return (solved * g).sum(1), solved @ g.sum(0)

    def gram(self, block: Block, other: Block) -> Tensor:
        """vᵀ(C + λ)⁻¹w for every pair of gradients of two batches, ``(B, B')``."""
        return self._solve(block.dense()) @ other.dense().T

    def prepare(self, block: Block) -> BlockDirection:
        """(C + λ)⁻¹v."""
        return BlockDirection(self._solve(block.dense()), None)

    def solve(self, direction: BlockDirection) -> BlockDirection:
        """(C + λ)⁻¹ times directions."""
        assert direction.weight is not None
        return BlockDirection(self._solve(direction.weight), None)


class DenseFit(CurvatureFit[Block]):
    """Everything from the first pass."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._moments: Tensor | None = None

    def see(self, block: Block, root: int) -> None:
        """Add to the second moments."""
        g = block.dense()
        small = block.n_params <= DENSE_LIMIT
        self._moments = added(self._moments, g.T @ g if small else g.square().sum(0))

    def decompose(self, dtype: torch.dtype) -> None:
        """The eigenvectors of the matrix; a diagonal has none."""
        assert self._moments is not None
        self._unset = torch.zeros((), dtype=dtype)
        self._basis: Tensor | None = None
        if self._moments.ndim == 2:
            values, vectors = torch.linalg.eigh(self._moments)
            self._basis, self._moments = vectors.to(dtype), values.clamp_min(0)

    def curvature(self, n: int) -> DenseCurvature:
        """The eigenvalues as a mean over n examples."""
        assert self._moments is not None
        return DenseCurvature(self.name, self._basis, self._moments / n, self._unset)


register_curvature(DenseCurvature, Block, DenseFit)  # type: ignore[type-abstract]
