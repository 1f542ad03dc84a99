"""Per-example gradients of a linear layer as factors.

A linear layer applied at T positions (T = 1 for a plain batch, tokens of a sequence, pixels for a
convolution) has the per-example gradient

    ∂ℓ_i/∂W = Σ_t b_it a_itᵀ,    ∂ℓ_i/∂bias = Σ_t b_it,

with a_it (I,) the layer's input and b_it (O,) the gradient at its output. Keeping the factors
(Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015) turns dot products into
small matrix products. What each costs, in multiplications:

                      from the factors             from the matrices Σ_t b_it a_itᵀ
    gram (B × B')     B B' T T' (I + O)            (B T + B' T' + B B') I O
    norm2             B T² (I + O)                 B T I O
    contract (R)      R B T I O                    (B T + B R) I O

The cheaper one is taken. Shape alone decides, so results do not depend on the data.

Shapes: B examples, T positions, I inputs, O outputs, R rows of a direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fine_bench.gradients.blocks.dense import DenseBlock, in_full
from fine_bench.gradients.blocks.direction import BlockDirection, matrix_weights
from fine_bench.gradients.blocks.protocol import (
    COLUMNS,
    HELD_FLOATS,
    Block,
    Columns,
    OuterProducts,
    combined,
    group_rows,
    multiplied_alike,
    positions_side_by_side,
)


@dataclass(frozen=True, eq=False)
class FactorBlock(Block):
    """Gradients of one layer's [W|b] for B examples, as factors.

    Attributes:
        name: name of the layer in its model.
        a: inputs, ``(B, T, I)``.
        b: gradients of each example's own loss at the output, ``(B, T, O)``.
        weight, bias: whether the layer's weight and bias are trained.
    """

    name: str
    a: Tensor
    b: Tensor
    weight: bool
    bias: bool

    kind: ClassVar[str] = "factors"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, I and O."""
        n, t, n_in = self.a.shape
        return n, t, n_in, self.b.shape[2]

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        _, _, n_in, n_out = self.sizes
        return n_out * (n_in * self.weight + self.bias)

    @property
    def values(self) -> Tensor:
        """The tensor that is linear in the gradient: its scale, precision and device."""
        return self.b

    @property
    def n_floats(self) -> int:
        """Numbers in ``tensors``."""
        n, t, n_in, n_out = self.sizes
        return n * t * (n_in + n_out)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the block is made of, ``(B, …)`` each."""
        return self.a, self.b

    @property
    def n_positions(self) -> int:
        """T."""
        return self.sizes[1]

    def with_tensors(self, *tensors: Tensor) -> FactorBlock:
        """Other gradients of the same layer, from their ``tensors``."""
        a, b = tensors
        return FactorBlock(self.name, a, b, self.weight, self.bias)

    def scaled(self, factor: Tensor) -> FactorBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return FactorBlock(
            self.name, self.a, self.b * factor[:, None, None], self.weight, self.bias
        )

    def by_parameter(self, factors: Sequence[float], sizes: Sequence[int]) -> FactorBlock:
        """The weight's gradients times one factor and the bias's times another.

        Σ_t (v b_t)(w/v a_t)ᵀ = w Σ_t b_t a_tᵀ, and Σ_t v b_t is v times the bias's.
        """
        if not (self.weight and self.bias):
            return self.scaled(self.b.new_full((len(self),), factors[0]))
        w, v = factors
        if v == 0.0:
            block = self.scaled(self.b.new_full((len(self),), w))
            return block.trained(weight=True, bias=False)
        return self._inputs_times(w / v, self.b * v)

    def _inputs_times(self, factor: float, b: Tensor) -> FactorBlock:
        return FactorBlock(self.name, self.a * factor, b, self.weight, self.bias)

    def trained(self, weight: bool, bias: bool) -> FactorBlock:
        """The gradients of the weight, the bias or both, whatever the layer trains."""
        return FactorBlock(self.name, self.a, self.b, weight, bias)

    def outputs_times(self, factor: Tensor) -> FactorBlock:
        """Row o of every gradient times its factor, ``(O,)``."""
        return self.with_tensors(self.a, self.b * factor)

    def row_products(self, matrix: Tensor) -> Tensor:
        """Dot products of the weight's gradient with a matrix ``(O, I)``, by row, ``(B, O)``."""
        return (combined(self.a, matrix) * self.b).sum(1)

    def rows(self, which: slice | Tensor) -> FactorBlock:
        """The gradients of some of the examples."""
        return FactorBlock(self.name, self.a[which], self.b[which], self.weight, self.bias)

    @staticmethod
    def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
        return positions_side_by_side(tensors)

    def stacked_for_gram(self, others: Sequence[Block]) -> Block:
        """Formed first where the Gram matrix takes them formed, the same bit for bit, and these
        are fewer numbers."""
        blocks: list[FactorBlock] = [self, *map(self.same, others)]
        n, (_, t, n_in, n_out) = sum(map(len, blocks)), self.sizes
        plain = type(self) is FactorBlock and self.weight and not self.bias
        alike = plain and all(block.sizes[1:] == self.sizes[1:] for block in blocks)
        alike = alike and multiplied_alike([x for g in blocks for x in g.tensors], n_in * n_out)
        cheaper = (n * t + n * n) * n_in * n_out <= n * n * t * t * (n_in + n_out)
        smaller = n_in * n_out <= t * (n_in + n_out)
        if not (alike and cheaper and smaller) or len(self.some_units(n)) > 1:
            return self.stacked(others)
        return DenseBlock(self.name, torch.cat([g.weight_gradients().flatten(1) for g in blocks]))

    def compact(self) -> Block:
        """The gradients in full where these are fewer numbers than the factors."""
        _, t, n_in, n_out = self.sizes
        return in_full(self) if t * (n_in + n_out) > self.n_params else self

    def positions_summed(self) -> Block:
        """In full where there are several positions."""
        return in_full(self) if self.n_positions > 1 else self

    def weight_gradients(self) -> Tensor:
        """``(B, O, I)``."""
        return torch.bmm(self.b.transpose(1, 2), self.a)

    def dense(self) -> Tensor:
        """``(B, P)``: the weight's gradient row by row, then the bias's."""
        parts = []
        if self.weight:
            parts.append(self.weight_gradients().flatten(1))
        if self.bias:
            parts.append(self.b.sum(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        n, t, n_in, n_out = self.sizes
        if t == 1:
            a2 = self.a[:, 0].square().sum(1) if self.weight else self.a.new_zeros(n)
            return (a2 + float(self.bias)) * self.b[:, 0].square().sum(1)
        total = self.b.new_zeros(n)
        if self.bias:
            total = total + self.b.sum(1).square().sum(1)
        if self.weight:
            if t * t * (n_in + n_out) < t * n_in * n_out:
                aa = torch.bmm(self.a, self.a.transpose(1, 2))
                bb = torch.bmm(self.b, self.b.transpose(1, 2))
                total = total + (aa * bb).sum((1, 2))
            else:
                for g in self.formed(self.some_units()):
                    total = total + torch.linalg.vecdot(g, g)
        return total

    def gram(self, other: Block) -> Tensor:
        """Dot products with another batch of the same layer, ``(B, B')``."""
        return self._gram(self.same(other))

    def _gram(self, other: FactorBlock) -> Tensor:
        n, t, n_in, n_out = self.sizes
        m, s, _, _ = other.sizes
        if t == 1 and s == 1:
            bb = self.b[:, 0] @ other.b[:, 0].T
            return self.input_gram(other).mul_(bb) if self.weight else bb
        total = self.b.new_zeros(n, m)
        if self.bias:
            total = total + self.b.sum(1) @ other.b.sum(1).T
        if self.weight:
            formed = n * t if other is self else n * t + m * s
            by_factors = n * m * t * s * (n_in + n_out)
            by_matrices = (formed + n * m) * n_in * n_out
            if by_factors < by_matrices:
                total = total + self._gram_from_factors(other)
            else:
                total = total + self._gram_from_matrices(other)
        return total

    def input_gram(self, other: FactorBlock) -> Tensor:
        """⟨a_i, a'_j⟩, and 1 more for a bias, ``(B, B')``, T = 1; times ⟨b_i, b'_j⟩ it is gram."""
        aa = self.a[:, 0] @ other.a[:, 0].T
        return aa.add_(1.0) if self.bias else aa

    def grams(self, n_groups: int, rows: Tensor | None = None) -> Tensor:
        """Gram matrices of consecutive groups; for T = 1 all groups in one product."""
        if self.n_positions != 1:
            return super().grams(n_groups, rows)
        b = self.b.reshape(n_groups, -1, self.b.shape[2])
        bb = group_rows(b, rows) @ b.mT
        if not self.weight:
            return bb
        a = self.a.reshape(n_groups, -1, self.a.shape[2])
        aa = group_rows(a, rows) @ a.mT
        return aa.add_(1.0).mul_(bb) if self.bias else aa.mul_(bb)

    def own_and_rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """‖g_i‖² ``(B,)`` and ⟨g_c, g_i⟩ for the chosen positions, ``(r, B)``.

        Where both take the gradients themselves, these are formed once.
        """
        (n, t, n_in, n_out), r = self.sizes, len(chosen)
        by_factors = min(n * r * t, n * t) * t * (n_in + n_out)
        if t == 1 or not self.weight or by_factors < n * t * n_in * n_out:
            return super().own_and_rows(chosen)
        own, rows = self.b.new_zeros(n), self.b.new_zeros(r, n)
        for g in self.formed(self.some_units()):
            own += torch.linalg.vecdot(g, g)
            rows.addmm_(g[chosen], g.T)
        if self.bias:
            b = self.b.sum(1)
            own += b.square().sum(1)
            rows.addmm_(b[chosen], b.T)
        return own, rows

    def _gram_from_factors(self, other: FactorBlock) -> Tensor:
        """Σ_st ⟨a_is, a'_jt⟩ ⟨b_is, b'_jt⟩, some examples at a time."""
        m, s, _ = other.a.shape
        t = self.a.shape[1]
        right_a, right_b = other.a.flatten(0, 1).T, other.b.flatten(0, 1).T
        step = max(1, HELD_FLOATS // (t * m * s))
        parts = []
        for a, b in zip(torch.split(self.a, step), torch.split(self.b, step), strict=True):
            products = (a.flatten(0, 1) @ right_a).mul_(b.flatten(0, 1) @ right_b)
            parts.append(products.view(len(a), t, m, s).sum((1, 3)))
        return torch.cat(parts)

    def _gram_from_matrices(self, other: FactorBlock) -> Tensor:
        """⟨Σ_s b_is a_isᵀ, Σ_t b'_jt a'_jtᵀ⟩, some output units at a time."""
        total = self.b.new_zeros(len(self), len(other))
        units = (self if len(self) > len(other) else other).some_units()
        if other is self:
            for g in self.formed(units):
                total.addmm_(g, g.T)
            return total
        if self.alike(other):
            pairs = zip(self.formed(units), other.formed(units), strict=True)
        else:
            pairs = zip(
                FactorBlock.formed(self, units), FactorBlock.formed(other, units), strict=True
            )
        for left, right in pairs:
            total.addmm_(left, right.T)
        return total

    def alike(self, other: FactorBlock) -> bool:
        """Whether ``formed`` gives both in one order."""
        return type(other) is FactorBlock

    def formed(self, units: list[slice]) -> Iterator[Tensor]:
        """The weight's gradients, some output units at a time, ``(B, …)``."""
        for some in units:
            yield self.unit_gradients(some).flatten(1)

    def unit_gradients(self, units: slice) -> Tensor:
        """The weight's gradients of some output units, ``(B, units, I)``."""
        return torch.bmm(self.b[:, :, units].transpose(1, 2), self.a)

    def some_units(self, n: int | None = None) -> list[slice]:
        """All output units, about ``HELD_FLOATS`` of n examples' gradients at a time."""
        own, _, n_in, size = self.sizes
        n = own if n is None else n
        step = max(64, HELD_FLOATS // (n * n_in))
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def contract(self, direction: BlockDirection) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        n, t, n_in, n_out = self.sizes
        total: Tensor | None = None
        if self.weight:
            w = direction.weight
            assert w is not None
            n_rows = w.shape[0]
            # for one row both cost the same: whichever intermediate result is smaller
            if t > 1 and (n_rows > 1 or n_in < t or type(self) is not FactorBlock):
                total = self._contract_weight(w)
            else:
                # Σ_t b_tᵀ W a_t, without the gradient
                flat_a = self.a.reshape(n * t, n_in)
                flat_b = self.b.reshape(n * t, n_out)
                rows = [((flat_a @ w[r].T) * flat_b).sum(1) for r in range(n_rows)]
                total = torch.stack(rows).view(n_rows, n, t).sum(2)
        if self.bias:
            d = direction.bias
            assert d is not None
            extra = d @ self.b.sum(1).T
            total = extra if total is None else total + extra
        assert total is not None
        return total

    def _contract_weight(self, w: Tensor) -> Tensor:
        """Products with the weight's part of R directions ``(R, O, I)``, ``(R, B)``."""
        total = self.b.new_zeros(len(w), len(self))
        units = self.some_units()
        for some, g in zip(units, self.formed(units), strict=True):
            total.addmm_(w[:, some].flatten(1), g.T)
        return total

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``."""
        n, t, n_in, n_out = self.sizes
        n_rows = weights.shape[0]
        weight = bias = None
        if self.weight:
            if t > 1 and n_rows > 1:
                parts = [
                    (weights @ self.unit_gradients(units).flatten(1)).view(n_rows, -1, n_in)
                    for units in self.some_units()
                ]
                weight = torch.cat(parts, 1)
            else:
                flat_a = self.a.reshape(n * t, n_in)
                rows = [
                    (self.b * weights[r][:, None, None]).reshape(n * t, n_out).T @ flat_a
                    for r in range(n_rows)
                ]
                weight = torch.stack(rows)
        if self.bias:
            bias = weights @ self.b.sum(1)
        return BlockDirection(weight, bias)

    # ------------------------------------------------------------------ products ⟨g, d ∘ g'⟩

    def diagonal_weights(self, parameters: Sequence[Tensor]) -> BlockDirection:
        """Weights d as a direction, ``(1, O, I)`` and ``(1, O)``."""
        return matrix_weights(parameters, self.weight, self.bias)

    def diagonal_gram(self, other: Block, d: BlockDirection) -> Tensor:
        """⟨g_i, d ∘ g'_j⟩, ``(B, B')``: the gradients are formed, some output units at a time."""
        y: FactorBlock = self.same(other)
        total = self.b.new_zeros(len(self), len(y))
        if self.bias:
            assert d.bias is not None
            total += (self.b.sum(1) * d.bias) @ y.b.sum(1).T
        if self.weight:
            assert d.weight is not None
            for units in (self if len(self) > len(y) else y).some_units():
                left = self.unit_gradients(units) * d.weight[:, units]
                total.addmm_(left.flatten(1), y.unit_gradients(units).flatten(1).T)
        return total

    def diagonal_norm2(self, d: BlockDirection) -> Tensor:
        """⟨g_i, d ∘ g_i⟩, ``(B,)``."""
        total = self.b.new_zeros(len(self))
        if self.bias:
            assert d.bias is not None
            total += self.b.sum(1).square() @ d.bias[0]
        if self.weight:
            assert d.weight is not None
            if self.n_positions == 1:
                total += ((self.b[:, 0].square() @ d.weight[0]) * self.a[:, 0].square()).sum(1)
            else:
                for units in self.some_units():
                    total += (self.unit_gradients(units).square() * d.weight[:, units]).sum((1, 2))
        return total

    # ------------------------------------------------------------------ for random projections

    def columns(self) -> Iterator[Columns]:
        """The weight's gradients, some output units at a time, then the bias's."""
        start = 0
        if self.weight:
            units = max(1, COLUMNS // self.a.shape[2])
            for b in torch.split(self.b, units, dim=2):
                values = torch.bmm(b.transpose(1, 2), self.a).flatten(1)
                yield Columns(start, None, values)
                start += values.shape[1]
        if self.bias:
            yield Columns(start, None, self.b.sum(1))

    def outer_products(self) -> OuterProducts | None:
        """The factors, for T = 1 and a trained weight."""
        if not self.weight or self.n_positions != 1:
            return None
        return OuterProducts(self.a[:, 0], self.b[:, 0], self.bias)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """O and I."""
        return self.sizes[3], self.sizes[2]

    def projected_factors(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """b times ``rows`` and [a, 1] times ``columns``."""
        b = self.b @ rows
        a = self.a @ columns[:-1] if self.weight else b.new_zeros(*b.shape[:2], columns.shape[1])
        return b, a + columns[-1] if self.bias else a

    def in_order(self, matrix: Tensor) -> Tensor:
        """What belongs to the weight, row by row, then what belongs to the bias."""
        parts = [matrix[:, :-1].flatten(0, 1)] if self.weight else []
        return torch.cat([*parts, matrix[:, -1]] if self.bias else parts)

    @property
    def sides(self) -> tuple[int, int]:
        """I and O."""
        return self.sizes[2], self.sizes[3]

    def sketched(self, p: Tensor | None, q: Tensor | None) -> Tensor:
        """Σ_t (Qᵀb_t)(Pᵀa_t)ᵀ and Qᵀ Σ_t b_t for a bias, ``(B, …)``."""
        b = self.b if q is None else combined(self.b, q)
        parts = self._sketched_weight(p, b) if self.weight else []
        return torch.cat([*parts, b.sum(1)] if self.bias else parts, 1)

    def _sketched_weight(self, p: Tensor | None, b: Tensor) -> list[Tensor]:
        """The weight's part from its sketched outputs ``(B, T, ·)``, ``(B, …)`` each."""
        a = self.a if p is None else combined(self.a, p)
        return [torch.bmm(b.mT, a).flatten(1)]
