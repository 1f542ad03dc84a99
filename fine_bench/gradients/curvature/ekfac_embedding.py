"""EK-FAC for an embedding table.

The inputs of a table W (V, D) are one-hot, so A = mean_i Σ_t onehot onehotᵀ is diagonal, the
frequencies of the tokens, and Q_A = I. Only the output side is turned: with
r_ikv = Σ_t [v_it = v] δ_ikt the gradient's row of token v,

    G = mean_i Σ_k Σ_t δ_ikt δ_iktᵀ = Q_G · Q_Gᵀ,      s_vd = mean_i Σ_k (r_ikv Q_G)²_d
    (C + λ)⁻¹ V = [ (V Q_G)_vd / (s_vd + λ) ] Q_Gᵀ.

A token that no training example contains has s_v = 0: its row of C + λ is λ alone.

Shapes: B examples, T positions, V tokens, D width, R rows of a direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection
from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.curvature.block import (
    BlockCurvature,
    CurvatureFit,
    added,
    register_curvature,
)


@dataclass(eq=False)
class TokenCurvature(BlockCurvature[TokenBlock]):
    """The curvature of one embedding table.

    Attributes:
        name: name of the layer.
        q_out: Q_G ``(D, D)``, eigenvectors in columns.
        eigenvalues: s, ``(V, D)``, float64, ≥ 0.
        inverse: 1/(s + λ), ``(V, D)``; set by ``EKFAC.damp``.
    """

    name: str
    q_out: Tensor
    eigenvalues: Tensor
    inverse: Tensor

    def rotated(self, block: TokenBlock, scale: Tensor | None = None) -> TokenBlock:
        """The gradients times Q_G, and times ``scale`` ``(V, D)``."""
        b = block.b @ self.q_out
        if scale is not None:
            b = b * scale[block.tokens]
        return block.with_tensors(block.tokens, b)

    def quadratic(self, block: TokenBlock) -> Tensor:
        """vᵀ(C + λ)⁻¹v for every example's gradient v, ``(B,)``."""
        return self.rotated(block, self.inverse.sqrt()).norm2()

    def gram(self, block: TokenBlock, other: TokenBlock) -> Tensor:
        """vᵀ(C + λ)⁻¹w for every pair of gradients of two batches, ``(B, B')``."""
        root = self.inverse.sqrt()
        left = self.rotated(block, root)
        return left.gram(left if other is block else self.rotated(other, root))

    def own_and_total(self, block: TokenBlock) -> tuple[Tensor, Tensor]:
        """vᵢᵀ(C + λ)⁻¹vᵢ and Σ_j vᵢᵀ(C + λ)⁻¹v_j over the batch, each ``(B,)``."""
        half = self.rotated(block, self.inverse.sqrt())
        summed = half.weighted_sum(half.b.new_ones(1, len(block)))
        return half.norm2(), half.contract(summed)[0]

    def prepare(self, block: TokenBlock) -> BlockDirection:
        """(C + λ)⁻¹v, in the layer's own coordinates: ``(B, V, D)``, one table a query."""
        b = self.rotated(block, self.inverse).b @ self.q_out.T
        solved = block.with_tensors(block.tokens, b)
        return BlockDirection(solved.dense().view(len(block), *self.inverse.shape), None)

    def solve(self, direction: BlockDirection) -> BlockDirection:
        """(C + λ)⁻¹ times directions."""
        assert direction.weight is not None
        turned = (direction.weight @ self.q_out) * self.inverse
        return BlockDirection(turned @ self.q_out.T, None)


class TokenFit(CurvatureFit[TokenBlock]):
    """Q_G from the first pass, s from the second."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._outer: Tensor | None = None
        self._moments: Tensor | None = None

    def see(self, block: TokenBlock, root: int) -> None:
        """Add to G."""
        b = block.b.flatten(0, 1)
        self._outer = added(self._outer, b.T @ b)

    def decompose(self, dtype: torch.dtype) -> None:
        """The eigenvectors of G."""
        assert self._outer is not None
        unset = torch.zeros((), dtype=dtype)
        q_out = torch.linalg.eigh(self._outer)[1].to(dtype)
        self._fitted = TokenCurvature(self.name, q_out, unset, unset)

    def add(self, block: TokenBlock, n_roots: int) -> None:
        """Add the squares (r Q_G)² of all examples."""
        if self._moments is None:
            shape = (block.n_tokens, block.width)
            self._moments = block.b.new_zeros(shape, dtype=torch.float64)
        _, tokens, rows = self._fitted.rotated(block).summed()
        self._moments.index_add_(0, tokens, rows.square_().to(self._moments))

    def curvature(self, n: int) -> TokenCurvature:
        """s as a mean over n examples."""
        assert self._moments is not None
        self._fitted.eigenvalues = self._moments / n
        return self._fitted


register_curvature(TokenCurvature, TokenBlock, TokenFit)
