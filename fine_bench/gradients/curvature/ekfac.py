"""EK-FAC: a curvature that is diagonal, layer by layer, in a Kronecker-factored basis.

George, Laurent, Bouthillier, Ballas, Vincent: *Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis* (NeurIPS 2018, arXiv:1806.03884); for influence functions Grosse et
al., *Studying Large Language Model Generalization with Influence Functions* (arXiv:2308.03296).

A layer's weight and bias are one matrix [W|b] (O, I), its inputs extended by a one where it has a
bias. With a_it the inputs and b_ikt the gradients at the output of the k-th root (``curvature.py``)

    A = mean_i Σ_t a_it a_itᵀ = Q_A · Q_Aᵀ,     G = mean_i Σ_k Σ_t b_ikt b_iktᵀ = Q_G · Q_Gᵀ
    G_ik = Q_Gᵀ (Σ_t b_ikt a_itᵀ) Q_A,         s_oi = mean_i Σ_k (G_ik)²_oi
    (C + λ)⁻¹ V = Q_G [ (Q_Gᵀ V Q_A)_oi / (s_oi + λ) ] Q_Aᵀ

The scale of A and G does not matter: only their eigenvectors are used, the eigenvalues are the
second moments s of the *per-example* gradient, positions T (pixels, uses of a layer) summed first.
Layers are independent of each other. Linear and Conv1d/2d layers have both factors; an embedding
table has the output's, its inputs being one-hot (``ekfac_tokens.py``). A norm layer's weight and
bias are one block, as are a grouped convolution's, a layer's that ``torch.func`` has to take, and
all trained parameters of no layer together: their exact second-moment matrix up to ``DENSE_LIMIT``
parameters, its diagonal beyond.

With T = 1 the rotated gradient is an outer product, so vᵀ(C + λ)⁻¹v = Σ_oi b'²_o a'²_i/(s_oi + λ)
is two matrix products for a whole batch and no gradient is ever formed. Factors are accumulated
and decomposed in float64 whatever the model's precision; rotations run in the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fine_bench.gradients.curvature.ekfac_embedding import TokenCurvature
from fine_bench.gradients.curvature.products import Batches, Roots, root_gradients
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import (
    Block,
    BlockDirection,
    DenseBlock,
    Direction,
    FactorBlock,
    PerExampleGradients,
    TokenBlock,
)

DENSE_LIMIT = 2048
"""Largest block without factors whose full second-moment matrix is kept."""

GRAM_FLOATS = 2**18
"""Numbers that ``gram`` holds at a time for pairs of outer products: they stay in the cache."""

DENSE_FLOATS = 2**24
"""Numbers of the rotated gradients that ``gram`` forms at a time where T > 1."""

SQUARE_FLOATS = 2**19
"""Numbers of the rotated gradients whose squares are summed at a time: they stay in the cache."""


@dataclass(eq=False)
class LayerCurvature:
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
        return split(self.q_out @ matrix @ self.q_in.T, block)

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
        has_weight, has_bias = direction.weight is not None, direction.bias is not None
        return _split(matrix, has_weight, has_bias)


@dataclass(eq=False)
class DenseCurvature:
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

    def quadratic(self, block: DenseBlock) -> Tensor:
        """vᵀ(C + λ)⁻¹v for every example's gradient v, ``(B,)``."""
        return (self._solve(block.g) * block.g).sum(1)

    def own_and_total(self, block: DenseBlock) -> tuple[Tensor, Tensor]:
        """vᵢᵀ(C + λ)⁻¹vᵢ and Σ_j vᵢᵀ(C + λ)⁻¹v_j over the batch, each ``(B,)``."""
        solved = self._solve(block.g)
        return (solved * block.g).sum(1), solved @ block.g.sum(0)

    def gram(self, block: DenseBlock, other: DenseBlock) -> Tensor:
        """vᵀ(C + λ)⁻¹w for every pair of gradients of two batches, ``(B, B')``."""
        return self._solve(block.g) @ other.g.T

    def prepare(self, block: DenseBlock) -> BlockDirection:
        """(C + λ)⁻¹v."""
        return BlockDirection(self._solve(block.g), None)

    def solve(self, direction: BlockDirection) -> BlockDirection:
        """(C + λ)⁻¹ times directions."""
        assert direction.weight is not None
        return BlockDirection(self._solve(direction.weight), None)


BlockCurvature = LayerCurvature | TokenCurvature | DenseCurvature


@dataclass(eq=False)
class EKFAC:
    """A block-diagonal curvature and its damped inverse.

    Attributes:
        blocks: one for each block of a ``PerExampleGradients``, in the same order.
        damping: λ of each block, ``(blocks,)``; set by ``damp``.
    """

    blocks: list[BlockCurvature]
    damping: Tensor

    def damp(self, damping: float | None, relative: float) -> None:
        """Set λ: ``damping`` itself, or ``relative`` times each block's mean eigenvalue.

        Raises:
            ValueError: a block of C + λI is singular.
        """
        used = []
        for block in self.blocks:
            s = block.eigenvalues
            lam = damping if damping is not None else relative * float(s.mean())
            low, top = float(s.min()) + lam, float(s.max())
            # rounding leaves second moments of this size where the true one is zero
            eps = torch.finfo(block.inverse.dtype).eps
            if low <= max(s.shape) ** 2 * eps**2 * top:
                raise ValueError(
                    f"the EK-FAC curvature of {block.name!r} is singular: smallest eigenvalue "
                    f"{low - lam:.3g} plus damping {lam:.3g} (largest {top:.3g}); give a larger "
                    "damping, or leave the layer out with layers=[...]"
                )
            block.inverse = (s + lam).reciprocal().to(block.inverse.dtype)
            used.append(lam)
        self.damping = torch.tensor(used, dtype=torch.float64)

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """vᵀ(C + λ)⁻¹v for every example's gradient v, ``(B,)``."""
        terms = []
        for mine, block in zip(self.blocks, gradients.blocks, strict=True):
            if isinstance(mine, LayerCurvature):
                assert isinstance(block, FactorBlock)
                terms.append(mine.quadratic(block))
            elif isinstance(mine, TokenCurvature):
                assert isinstance(block, TokenBlock)
                terms.append(mine.quadratic(block))
            else:
                assert isinstance(block, DenseBlock)
                terms.append(mine.quadratic(block))
        return torch.stack(terms).sum(0)

    def gram(self, x: PerExampleGradients, y: PerExampleGradients | None = None) -> Tensor:
        """vᵀ(C + λ)⁻¹w for every pair of gradients, ``(B, B')``; with itself by default."""
        total: Tensor | None = None
        others = x.blocks if y is None else y.blocks
        for mine, block, other in zip(self.blocks, x.blocks, others, strict=True):
            if isinstance(mine, LayerCurvature):
                assert isinstance(block, FactorBlock)
                assert isinstance(other, FactorBlock)
                term = mine.gram(block, other)
            elif isinstance(mine, TokenCurvature):
                assert isinstance(block, TokenBlock)
                assert isinstance(other, TokenBlock)
                term = mine.gram(block, other)
            else:
                assert isinstance(block, DenseBlock)
                assert isinstance(other, DenseBlock)
                term = mine.gram(block, other)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total

    def own_and_total(self, gradients: PerExampleGradients) -> tuple[Tensor, Tensor]:
        """K_ii and Σ_j K_ij of K = vᵢᵀ(C + λ)⁻¹v_j, each ``(B,)``, without the pairs."""
        owns, totals = [], []
        for mine, block in zip(self.blocks, gradients.blocks, strict=True):
            if isinstance(mine, LayerCurvature):
                assert isinstance(block, FactorBlock)
                own, total = mine.own_and_total(block)
            elif isinstance(mine, TokenCurvature):
                assert isinstance(block, TokenBlock)
                own, total = mine.own_and_total(block)
            else:
                assert isinstance(block, DenseBlock)
                own, total = mine.own_and_total(block)
            owns.append(own)
            totals.append(total)
        return torch.stack(owns).sum(0), torch.stack(totals).sum(0)

    def prepare(self, queries: PerExampleGradients) -> Direction:
        """(C + λ)⁻¹g for every query, to be contracted with ``view`` of the training gradients."""
        result = []
        for mine, block in zip(self.blocks, queries.blocks, strict=True):
            if isinstance(mine, LayerCurvature):
                assert isinstance(block, FactorBlock)
                result.append(mine.prepare(block))
            elif isinstance(mine, TokenCurvature):
                assert isinstance(block, TokenBlock)
                result.append(mine.prepare(block))
            else:
                assert isinstance(block, DenseBlock)
                result.append(mine.prepare(block))
        return result

    def view(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """Training gradients in the coordinates of ``prepare``."""
        blocks: list[Block] = []
        for mine, block in zip(self.blocks, gradients.blocks, strict=True):
            if isinstance(mine, LayerCurvature):
                assert isinstance(block, FactorBlock)
                blocks.append(mine.view(block))
            else:
                blocks.append(block)
        return PerExampleGradients(blocks, gradients.loss, gradients.one_minus_p)

    def solve(self, direction: Direction) -> Direction:
        """(C + λ)⁻¹ times directions in the model's own coordinates."""
        return [mine.solve(d) for mine, d in zip(self.blocks, direction, strict=True)]

    def copy(self) -> EKFAC:
        """The same eigenvectors and eigenvalues, to be damped in its own way."""
        return EKFAC([replace(block) for block in self.blocks], self.damping)

    def mapped(self, function: Callable[[Tensor, float], Tensor]) -> EKFAC:
        """The same eigenvectors with function(s, λ) ≥ 0 in the place of 1/(s + λ).

        ``quadratic``, ``solve`` and the others then apply that function of the curvature.
        """
        pairs = zip(self.blocks, self.damping.tolist(), strict=True)
        blocks: list[BlockCurvature] = [
            replace(block, inverse=function(block.eigenvalues, lam).to(block.inverse.dtype))
            for block, lam in pairs
        ]
        return EKFAC(blocks, self.damping)

    def solved_norm2(self, gradients: PerExampleGradients) -> Tensor:
        """‖(C + λ)⁻¹v‖² for every example's gradient v, ``(B,)``."""
        return self.mapped(lambda s, lam: (s + lam).pow(-2)).quadratic(gradients)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain tensors and numbers: about (I² + O² + 2 OI) numbers a layer."""
        return {"blocks": [dict(vars(block)) for block in self.blocks], "damping": self.damping}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> EKFAC:
        """The inverse of ``state_dict``."""
        blocks: list[BlockCurvature] = []
        for saved in state["blocks"]:
            values: dict[str, Any] = {
                k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved.items()
            }
            if "q_in" in values:
                blocks.append(LayerCurvature(**values))
            elif "q_out" in values:
                blocks.append(TokenCurvature(**values))
            else:
                blocks.append(DenseCurvature(**values))
        return cls(blocks, state["damping"])


def fit_ekfac(engine: GradientEngine, batches: Batches, roots: Roots, n: int) -> EKFAC:
    """Estimate the curvature from all training examples, in two passes; λ is still unset.

    Args:
        engine: gradients of the model at its present parameters.
        batches: the n training examples.
        roots: which curvature (``"fisher"``, ``"ggn"`` or ``"empirical_fisher"``).
    """
    bases = _bases(engine, batches, roots)
    moments: dict[int, Tensor] = {}
    for rows, x, y in batches():
        rotated_inputs: dict[int, Tensor] = {}
        squares: dict[int, Tensor] = {}
        for _, n_roots, blocks in root_gradients(engine, x, y, roots, rows):
            for index, block in enumerate(blocks):
                basis = bases[index]
                if isinstance(basis, TokenCurvature):
                    assert isinstance(block, TokenBlock)
                    if index not in moments:
                        shape = (block.n_tokens, block.width)
                        moments[index] = block.b.new_zeros(shape, dtype=torch.float64)
                    basis.add_squares(moments[index], block)
                    continue
                if not isinstance(basis, LayerCurvature):
                    continue
                assert isinstance(block, FactorBlock)
                n_positions, n_out = block.a.shape[1], block.b.shape[2]
                # the inputs are the same for every root: turn them once, unless turning every
                # root's gradient is the smaller work
                if n_positions <= n_roots * n_out:
                    if index not in rotated_inputs:
                        rotated_inputs[index] = inputs(block) @ basis.q_in
                    a, b = rotated_inputs[index], block.b @ basis.q_out
                    if n_positions == 1:
                        b2 = b[:, 0].square_()
                        squares[index] = b2 if index not in squares else squares[index].add_(b2)
                        continue
                    _add(moments, index, _sum_of_squares(a, b))
                else:
                    g = rotated(block, basis.q_in, basis.q_out)
                    _add(moments, index, g.square_().sum(0))
        for index, b2 in squares.items():
            _add(moments, index, b2.T @ rotated_inputs[index][:, 0].square_())
    for index, total in moments.items():
        bases[index].eigenvalues = total / n
    for basis in bases:
        if isinstance(basis, DenseCurvature):
            basis.eigenvalues = basis.eigenvalues / n
    return EKFAC(bases, torch.zeros(len(bases), dtype=torch.float64))


def _bases(engine: GradientEngine, batches: Batches, roots: Roots) -> list[BlockCurvature]:
    """First pass: the eigenbases of the layers, and everything about blocks without factors."""
    inner: dict[int, Tensor] = {}
    outer: dict[int, Tensor] = {}
    names: list[str] = []
    tables: set[int] = set()
    single: dict[int, bool] = {}
    dtype = torch.float32
    for rows, x, y in batches():
        for k, _, blocks in root_gradients(engine, x, y, roots, rows):
            names = [block.name for block in blocks]
            for index, block in enumerate(blocks):
                if isinstance(block, DenseBlock):
                    dtype = block.g.dtype
                    if block.n_params <= DENSE_LIMIT:
                        _add(outer, index, block.g.T @ block.g)
                    else:
                        _add(outer, index, block.g.square().sum(0))
                    continue
                dtype = block.b.dtype
                if isinstance(block, TokenBlock):
                    tables.add(index)
                elif k == 0:
                    a = inputs(block).flatten(0, 1)
                    _add(inner, index, a.T @ a)
                    single[index] = single.get(index, True) and block.a.shape[1] == 1
                b = block.b.flatten(0, 1)
                _add(outer, index, b.T @ b)
    result: list[BlockCurvature] = []
    for index, name in enumerate(names):
        unset = torch.zeros((), dtype=dtype)
        if index in inner:
            q_in = torch.linalg.eigh(inner[index])[1].to(dtype)
            q_out = torch.linalg.eigh(outer[index])[1].to(dtype)
            result.append(LayerCurvature(name, q_in, q_out, unset, single[index], unset))
        elif index in tables:
            q_out = torch.linalg.eigh(outer[index])[1].to(dtype)
            result.append(TokenCurvature(name, q_out, unset, unset))
        elif outer[index].ndim == 2:
            values, vectors = torch.linalg.eigh(outer[index])
            result.append(DenseCurvature(name, vectors.to(dtype), values.clamp_min(0), unset))
        else:
            result.append(DenseCurvature(name, None, outer[index], unset))
    return result


def _add(totals: dict[int, Tensor], index: int, term: Tensor) -> None:
    """Accumulate in float64, so that the number of batches leaves no trace."""
    if index in totals:
        totals[index] += term
    else:
        totals[index] = term.double()


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


def split(matrix: Tensor, block: FactorBlock) -> BlockDirection:
    """The inverse of ``join`` for a layer of that kind."""
    return _split(matrix, block.weight, block.bias)


def _split(matrix: Tensor, has_weight: bool, has_bias: bool) -> BlockDirection:
    if not has_weight:
        return BlockDirection(None, matrix[:, :, 0])
    if not has_bias:
        return BlockDirection(matrix, None)
    return BlockDirection(matrix[:, :, :-1].contiguous(), matrix[:, :, -1])
