"""Per-example gradients of one weight behind several layers, whose uses add up.

A table W (V, D) that embeds tokens and serves as the weight of the output layer has the gradient

    ∂ℓ_i/∂W = Σ_s b_is a_isᵀ + Σ_t onehot(v_it) δ_itᵀ,

a FactorBlock's and a TokenBlock's. Products of sums are sums over pairs of uses; the mixed ones are

    ⟨Σ_s b_is a_isᵀ, Σ_t onehot(v_jt) δ_jtᵀ⟩ = Σ_st b_is[v_jt] ⟨a_is, δ_jt⟩,

B B' S T (D + 1) multiplications, and the weight's gradient is never formed for it. Press and Wolf
2017 (arXiv:1608.05859) tie these two weights.

Shapes: B examples, S and T positions, V rows and D columns of the weight, R rows of a direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection
from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import (
    COLUMNS,
    HELD_FLOATS,
    Block,
    Columns,
    combined,
)

Use: TypeAlias = FactorBlock | TokenBlock


@dataclass(frozen=True, eq=False)
class TiedBlock(Block):
    """Gradients of one weight ``(V, D)`` for B examples, as a sum over its uses.

    Attributes:
        name: name of the weight in its model.
        uses: at least one; factors without a bias, or tokens.
    """

    name: str
    uses: tuple[Use, ...]

    kind: ClassVar[str] = "dense"

    def __len__(self) -> int:
        return len(self.uses[0])

    @property
    def shape(self) -> tuple[int, int]:
        """V and D."""
        return self.uses[0].matrix_shape

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return self.shape[0] * self.shape[1]

    @property
    def values(self) -> Tensor:
        """The output gradients of all uses, ``(B, …)``."""
        return torch.cat([use.values.flatten(1) for use in self.uses], 1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all uses."""
        return tuple(part for use in self.uses for part in use.tensors)

    @property
    def n_positions(self) -> int:
        """Positions of all uses."""
        return sum(use.n_positions for use in self.uses)

    def with_tensors(self, *tensors: Tensor) -> TiedBlock:
        """Other gradients of the same weight, from their ``tensors``."""
        # two for each use, whatever its kind
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return self._of(
            [use.with_tensors(*pair) for use, pair in zip(self.uses, pairs, strict=True)]
        )

    def scaled(self, factor: Tensor) -> TiedBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return self._of([use.scaled(factor) for use in self.uses])

    def stacked(self, others: Sequence[Block]) -> Block:
        """These examples and then those of other blocks of the same weight."""
        blocks = [self, *others]
        if not all(isinstance(block, TiedBlock) for block in blocks):
            return super().stacked(others)
        uses = zip(*(block.uses for block in blocks if isinstance(block, TiedBlock)), strict=True)
        return self._of([first.stacked(rest) for first, *rest in uses])

    def dense(self) -> Tensor:
        """``(B, P)``: the weight row by row."""
        total = self.uses[0].dense()
        for use in self.uses[1:]:
            total = total + use.dense()
        return total

    # ------------------------------------------------------------------ products

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        total = torch.stack([use.norm2() for use in self.uses]).sum(0)
        for k, use in enumerate(self.uses):
            for other in self.uses[k + 1 :]:
                total = total + 2.0 * _own_products(use, other)
        return total

    def gram(self, other: Block) -> Tensor:
        """Dot products with another batch of the same weight, ``(B, B')``."""
        if not isinstance(other, TiedBlock):
            return super().gram(other)
        total = self._zeros(len(self), len(other))
        for k, use in enumerate(self.uses):
            for j, theirs in enumerate(other.uses):
                if other is not self:
                    total = total + _products(use, theirs)
                elif k == j:
                    total = total + use.gram(use)
                elif k < j:
                    mixed = _products(use, theirs)
                    total = total + mixed + mixed.T
        return total

    def contract(self, direction: BlockDirection) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        assert direction.weight is not None
        d = BlockDirection(direction.weight.reshape(-1, *self.shape), None)
        return torch.stack([use.contract(d) for use in self.uses]).sum(0)

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``, as ``(R, P)``."""
        parts = [use.weighted_sum(weights).weight for use in self.uses]
        total = torch.stack([part.flatten(1) for part in parts if part is not None]).sum(0)
        return BlockDirection(total, None)

    # ------------------------------------------------------------------ products ⟨g, d ∘ g'⟩

    def diagonal_gram(self, other: Block, d: BlockDirection) -> Tensor:
        """⟨g_i, d ∘ g'_j⟩, ``(B, B')``: the gradients are formed, some rows at a time."""
        if not isinstance(other, TiedBlock):
            return super().diagonal_gram(other, d)
        assert d.weight is not None
        by_row = d.weight.reshape(self.shape)
        total = self._zeros(len(self), len(other))
        for rows in self._some_rows(max(len(self), len(other)), HELD_FLOATS):
            left = self.row_gradients(rows) * by_row[rows]
            total.addmm_(left.flatten(1), other.row_gradients(rows).flatten(1).T)
        return total

    def diagonal_norm2(self, d: BlockDirection) -> Tensor:
        """⟨g_i, d ∘ g_i⟩, ``(B,)``."""
        assert d.weight is not None
        by_row = d.weight.reshape(self.shape)
        total = self._zeros(len(self))
        for rows in self._some_rows(len(self), HELD_FLOATS):
            total += (self.row_gradients(rows).square() * by_row[rows]).sum((1, 2))
        return total

    # ------------------------------------------------------------------ for random projections

    def columns(self) -> Iterator[Columns]:
        """Some rows of the weight at a time."""
        for rows in self._some_rows(1, COLUMNS):
            yield Columns(rows.start * self.shape[1], None, self.row_gradients(rows).flatten(1))

    @property
    def sides(self) -> tuple[int, int]:
        """D and V, as the output layer has them."""
        return self.shape[1], self.shape[0]

    def sketched(self, p: Tensor | None, q: Tensor | None) -> Tensor:
        """Qᵀ Σ_t b_t a_tᵀ P summed over the uses, ``(B, …)``; a token's b is one-hot."""
        total: Tensor | None = None
        for use in self.uses:
            if isinstance(use, FactorBlock):
                term = use.sketched(p, q)
            else:
                a = use.b if p is None else combined(use.b, p)
                unit = torch.eye(use.n_tokens, dtype=a.dtype, device=a.device)
                b = (unit if q is None else q.T.to(a))[use.tokens]
                term = torch.bmm(b.mT, a).flatten(1)
            total = term if total is None else total + term
        assert total is not None
        return total

    # ------------------------------------------------------------------ some rows of the weight

    def row_gradients(self, rows: slice) -> Tensor:
        """The gradients of some rows of the weight, ``(B, rows, D)``."""
        n, count = len(self), rows.stop - rows.start
        total: Tensor | None = None
        for use in self.uses:
            if isinstance(use, FactorBlock):
                part = use.unit_gradients(rows)
            else:
                # tokens of other rows go to a row that is dropped
                inside = (use.tokens >= rows.start) & (use.tokens < rows.stop)
                place = torch.where(inside, use.tokens - rows.start, count)
                first = (count + 1) * torch.arange(n, device=place.device)[:, None]
                part = use.b.new_zeros(n * (count + 1), self.shape[1])
                part.index_add_(0, (first + place).flatten(), use.b.flatten(0, 1))
                part = part.view(n, count + 1, -1)[:, :count]
            total = part if total is None else total + part
        assert total is not None
        return total

    def _zeros(self, *shape: int) -> Tensor:
        return self.uses[0].values.new_zeros(shape)

    def _some_rows(self, n: int, floats: int) -> Iterator[slice]:
        height, width = self.shape
        step = max(1, floats // (n * width))
        for start in range(0, height, step):
            yield slice(start, min(start + step, height))

    def _of(self, uses: Sequence[Block]) -> TiedBlock:
        found = tuple(use for use in uses if isinstance(use, FactorBlock | TokenBlock))
        return TiedBlock(self.name, found)


def _products(x: Use, y: Use) -> Tensor:
    """Dot products of the gradients of two uses, ``(B, B')``."""
    if isinstance(x, FactorBlock) and isinstance(y, TokenBlock):
        return _mixed(x, y)
    if isinstance(x, TokenBlock) and isinstance(y, FactorBlock):
        return _mixed(y, x).T
    return x.gram(y)


def _mixed(x: FactorBlock, y: TokenBlock) -> Tensor:
    """Σ_st b_is[v_jt] ⟨a_is, δ_jt⟩, ``(B, B')``, some examples i at a time."""
    s, (m, t, _) = x.n_positions, y.b.shape
    delta, tokens = y.b.flatten(0, 1).T, y.tokens.flatten()
    parts = []
    step = max(1, HELD_FLOATS // (s * m * t))
    for a, b in zip(torch.split(x.a, step), torch.split(x.b, step), strict=True):
        products = (a.flatten(0, 1) @ delta).mul_(b.flatten(0, 1)[:, tokens])
        parts.append(products.view(len(a), s, m, t).sum((1, 3)))
    return torch.cat(parts)


def _own_products(x: Use, y: Use) -> Tensor:
    """Dot products of each example's two gradients, ``(B,)``."""
    if isinstance(x, TokenBlock) and isinstance(y, FactorBlock):
        return _own_products(y, x)
    if isinstance(x, FactorBlock) and isinstance(y, TokenBlock):
        inputs = torch.bmm(x.a, y.b.mT)  # (B, S, T)
        at_token = x.b.gather(2, y.tokens[:, None].expand(-1, x.b.shape[1], -1))
        return (inputs * at_token).sum((1, 2))
    n = len(x)
    step = max(1, int((HELD_FLOATS / max(1, x.n_positions * y.n_positions)) ** 0.5))
    parts = [slice(k, k + step) for k in range(0, n, step)]
    return torch.cat([x.rows(some).gram(y.rows(some)).diagonal() for some in parts])
