"""EK-FAC for layers whose gradients are factors: a Kronecker-factored eigenbasis.

The formulas are those of ``ekfac.py``. With T = 1 the rotated gradient is an outer product, so
vᵀ(C + λ)⁻¹v = Σ_oi b'²_o a'²_i/(s_oi + λ) is two matrix products for a whole batch and no gradient
is ever formed. Factors are accumulated and decomposed in float64 whatever the model's precision;
rotations run in the model's.

Shapes: B examples, T positions, I inputs (with a one for a bias), O outputs, R rows of a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.curvature.block import (
    FITS,
    BlockCurvature,
    CurvatureFit,
    added,
    register_curvature,
)
from fine_bench.gradients.transposed import TransposedBlock

GRAM_FLOATS = 2**18
"""Numbers that ``gram`` holds at a time for pairs of outer products: they stay in the cache."""

DENSE_FLOATS = 2**24
"""Numbers of the rotated gradients that ``gram`` forms at a time where T > 1."""

SQUARE_FLOATS = 2**19
"""Numbers of the rotated gradients whose squares are summed at a time: they stay in the cache."""


@dataclass(eq=False)
class LayerCurvature(BlockCurvature[FactorBlock]):
    """The curvature of one layer's [W|b].

    Attributes:
        name: name of the layer.
        q_in, q_out: Q_A ``(I, I)`` and Q_G ``(O, O)``, eigenvectors in columns.
        eigenvalues: s, ``(O, I)``, float64, ≥ 0.
        single: every training example has T = 1, so its gradient is an outer product.
        inverse: 1/(s + λ), ``(O, I)``; set by ``EKFAC.damp``.
    """

    name: str
    q_in: Tensor
    q_out: Tensor
    eigenvalues: Tensor
    single: bool
    inverse: Tensor

    def quadratic(self, block: FactorBlock) -> Tensor:
        """vᵀ(C + λ)⁻¹v for every example's gradient v, ``(B,)``."""
        if block.a.shape[1] == 1:
            a2 = (inputs(block)[:, 0] @ self.q_in).square_()
            b2 = (block.b[:, 0] @ self.q_out).square_()
            return ((b2 @ self.inverse) * a2).sum(1)
        return (rotated(block, self.q_in, self.q_out).square() * self.inverse).sum((1, 2))

    def gram(self, block: FactorBlock, other: FactorBlock) -> Tensor:
        """vᵀ(C + λ)⁻¹w for every pair of gradients of two batches, ``(B, B')``.

        1/(s + λ) does not split into a factor for each side, so one side's factors are not enough.
        For T = 1 the products of a pair's factors are, O + I numbers a pair,

            K_ij = Σ_c [ Σ_o b'_io b'_jo / (s_oc + λ) ] a'_ic a'_jc

        and a batch with itself needs each pair once.
        """
        n, m = len(block), len(other)
        if block.a.shape[1] == 1 and other.a.shape[1] == 1:
            a, b = inputs(block)[:, 0] @ self.q_in, block.b[:, 0] @ self.q_out
            size = max(1, GRAM_FLOATS // (a.shape[1] + b.shape[1]))
            if other is block:
                first, second = torch.triu_indices(n, n, device=a.device)
                values = [
                    torch.linalg.vecdot((b[i] * b[j]) @ self.inverse, a[i] * a[j])
                    for i, j in zip(
                        torch.split(first, size), torch.split(second, size), strict=True
                    )
                ]
                total = b.new_empty(n, n)
                total[first, second] = torch.cat(values)
                total[second, first] = total[first, second]
                return total
            a2, b2 = inputs(other)[:, 0] @ self.q_in, other.b[:, 0] @ self.q_out
            rows = []
            for i in torch.split(torch.arange(n, device=a.device), max(1, size // m)):
                left = (b[i, None] * b2).flatten(0, 1) @ self.inverse
                rows.append(torch.linalg.vecdot(left.view(len(i), m, -1), a[i, None] * a2))
            return torch.cat(rows)
        right = rotated(other, self.q_in, self.q_out).flatten(1).T
        size = max(1, DENSE_FLOATS // len(right))
        parts = []
        for start in range(0, n, size):
            part = block.rows(slice(start, start + size))
            left = rotated(part, self.q_in, self.q_out) * self.inverse
            parts.append(left.flatten(1) @ right)
        return torch.cat(parts)

    def own_and_total(self, block: FactorBlock) -> tuple[Tensor, Tensor]:
        """vᵢᵀ(C + λ)⁻¹vᵢ and Σ_j vᵢᵀ(C + λ)⁻¹v_j over the batch, each ``(B,)``.

        In the eigenbasis the sum of the gradients is one matrix, so no pair is ever formed.
        """
        if block.a.shape[1] == 1:
            a, b = inputs(block)[:, 0] @ self.q_in, block.b[:, 0] @ self.q_out
            own = ((b.square() @ self.inverse) * a.square()).sum(1)
            return own, ((b @ ((b.T @ a) * self.inverse)) * a).sum(1)
        size = max(1, DENSE_FLOATS // self.inverse.numel())
        parts = [block.rows(slice(i, i + size)) for i in range(0, len(block), size)]
        summed = sum(rotated(p, self.q_in, self.q_out).sum(0) for p in parts) * self.inverse
        owns, totals = [], []
        for part in parts:
            g = rotated(part, self.q_in, self.q_out)
            owns.append((g.square() * self.inverse).sum((1, 2)))
            totals.append((g * summed).sum((1, 2)))
        return torch.cat(owns), torch.cat(totals)

    def prepare(self, block: FactorBlock) -> BlockDirection:
        """(C + λ)⁻¹v, in the coordinates of ``view``."""
        matrix = rotated(block, self.q_in, self.q_out) * self.inverse
        if self.single:
            return BlockDirection(matrix, None)
        return split(self.q_out @ matrix @ self.q_in.T, block.weight, block.bias)

    def view(self, block: FactorBlock) -> FactorBlock:
        """Training gradients as ``prepare`` wants them.

        For T = 1 the factors are rotated: n (I² + O²) operations, where turning every prepared
        query back would take OI (I + O) each. Positions multiply the first cost and not the
        second, so with T > 1 the queries are turned back instead.
        """
        if not self.single:
            return block
        a, b = inputs(block) @ self.q_in, block.b @ self.q_out
        return FactorBlock(block.name, a, b, weight=True, bias=False)

    def solve(self, direction: BlockDirection) -> BlockDirection:
        """(C + λ)⁻¹ times directions in the layer's own coordinates."""
        matrix = self.q_out.T @ join(direction) @ self.q_in
        matrix = self.q_out @ (matrix * self.inverse) @ self.q_in.T
        return split(matrix, direction.weight is not None, direction.bias is not None)


class FactorFit(CurvatureFit[FactorBlock]):
    """Q_A and Q_G from the first pass, s from the second."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._inner: Tensor | None = None
        self._outer: Tensor | None = None
        self._single = True
        self._moments: Tensor | None = None
        # of the batch that is being added: its rotated inputs, and Σ_k of its squared outputs
        self._turned: Tensor | None = None
        self._squares: Tensor | None = None

    def see(self, block: FactorBlock, root: int) -> None:
        """Add to A, once a batch, and to G."""
        if root == 0:
            a = inputs(block).flatten(0, 1)
            self._inner = added(self._inner, a.T @ a)
            self._single = self._single and block.n_positions == 1
        b = block.b.flatten(0, 1)
        self._outer = added(self._outer, b.T @ b)

    def decompose(self, dtype: torch.dtype) -> None:
        """The eigenvectors of A and G."""
        assert self._inner is not None
        assert self._outer is not None
        self._unset = torch.zeros((), dtype=dtype)
        self._q_in = torch.linalg.eigh(self._inner)[1].to(dtype)
        self._q_out = torch.linalg.eigh(self._outer)[1].to(dtype)

    def add(self, block: FactorBlock, n_roots: int) -> None:
        """Add the squares of the rotated gradients."""
        n_positions, n_out = block.n_positions, block.b.shape[2]
        # the inputs are the same for every root: turn them once, unless turning every root's
        # gradient is the smaller work
        if n_positions > n_roots * n_out:
            g = rotated(block, self._q_in, self._q_out)
            self._moments = added(self._moments, g.square_().sum(0))
            return
        if self._turned is None:
            self._turned = inputs(block) @ self._q_in
        b = block.b @ self._q_out
        if n_positions == 1:
            b2 = b[:, 0].square_()
            self._squares = b2 if self._squares is None else self._squares.add_(b2)
        else:
            self._moments = added(self._moments, _sum_of_squares(self._turned, b))

    def end_batch(self) -> None:
        """For T = 1 the squares of all roots' outputs meet those of the inputs at once."""
        if self._squares is not None:
            assert self._turned is not None
            term = self._squares.T @ self._turned[:, 0].square_()
            self._moments = added(self._moments, term)
        self._turned = self._squares = None

    def curvature(self, n: int) -> LayerCurvature:
        """s as a mean over n examples."""
        assert self._moments is not None
        s, unset = self._moments / n, self._unset
        return LayerCurvature(self.name, self._q_in, self._q_out, s, self._single, unset)


class TransposedFit(FactorFit):
    """The same where the factors stand in each other's place: the inner ones are the gradients."""

    def see(self, block: FactorBlock, root: int) -> None:
        """Add to A, which differs from root to root, and once a batch to G."""
        a = inputs(block).flatten(0, 1)
        self._inner = added(self._inner, a.T @ a)
        if root == 0:
            b = block.b.flatten(0, 1)
            self._outer = added(self._outer, b.T @ b)
            self._single = self._single and block.n_positions == 1

    def add(self, block: FactorBlock, n_roots: int) -> None:
        """Add the squares of the rotated gradients."""
        g = rotated(block, self._q_in, self._q_out)
        self._moments = added(self._moments, g.square_().sum(0))


register_curvature(LayerCurvature, FactorBlock, FactorFit)
FITS[TransposedBlock] = TransposedFit


def _sum_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """Σ_i (Σ_t b_it a_itᵀ)², entry by entry: ``(B, T, I)``, ``(B, T, O)`` → ``(O, I)``."""
    size = max(1, SQUARE_FLOATS // (a.shape[2] * b.shape[2]))
    total = b.new_zeros(b.shape[2], a.shape[2])
    for left, right in zip(torch.split(b, size), torch.split(a, size), strict=True):
        total += torch.bmm(left.transpose(1, 2), right).square_().sum(0)
    return total


def inputs(block: FactorBlock) -> Tensor:
    """The inputs of [W|b]: a, extended by a one for the bias, ``(B, T, I)``."""
    one = block.a.new_ones(*block.a.shape[:2], 1)
    if not block.weight:
        return one
    return torch.cat([block.a, one], 2) if block.bias else block.a


def rotated(block: FactorBlock, q_in: Tensor, q_out: Tensor) -> Tensor:
    """Q_Gᵀ (Σ_t b_t a_tᵀ) Q_A for every example, ``(B, O, I)``."""
    a, b = inputs(block), block.b @ q_out
    # turn T inputs or O rows of the gradient, whichever are fewer
    if block.a.shape[1] <= block.b.shape[2]:
        return torch.bmm(b.transpose(1, 2), a @ q_in)
    return torch.bmm(b.transpose(1, 2), a) @ q_in


def join(direction: BlockDirection) -> Tensor:
    """[W|b] of a direction, ``(R, O, I)``."""
    parts: Sequence[Tensor | None] = (
        direction.weight,
        None if direction.bias is None else direction.bias[:, :, None],
    )
    return torch.cat([part for part in parts if part is not None], 2)


def split(matrix: Tensor, has_weight: bool, has_bias: bool) -> BlockDirection:
    """The inverse of ``join``, for a layer that trains its weight, its bias or both."""
    if not has_weight:
        return BlockDirection(None, matrix[:, :, 0])
    if not has_bias:
        return BlockDirection(matrix, None)
    return BlockDirection(matrix[:, :, :-1].contiguous(), matrix[:, :, -1])
