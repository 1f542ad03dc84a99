"""Per-example gradients of a weight that is computed from other parameters.

Under weight normalisation (Salimans, Kingma 2016, arXiv:1602.07868) the rows of a layer's weight
are w_o = g_o v_o/‖v_o‖, under spectral normalisation (Miyato et al. 2018, arXiv:1802.05957)
W = V/σ with σ = uᵀVx, u and x held fixed. With G_i the gradient at the weight, v̂ = v/‖v‖ and
c = g/‖v‖ the chain rule gives

    weight     ∂ℓ_i/∂g_o = s_io = ⟨G_io, v̂_o⟩,       ∂ℓ_i/∂v_o = c_o (G_io − s_io v̂_o)
    spectral   ∂ℓ_i/∂V = (G_i − s_i uxᵀ)/σ,           s_i = ⟨G_i, W⟩

so products of gradients are those of a plain layer and a correction of rank one a row (one in all):

    weight     Σ_o c_o² ⟨G_io, G_jo⟩ + Σ_o (1 − c_o²) s_io s_jo
    spectral   (⟨G_i, G_j⟩ − s_i r_j − r_i s_j + s_i s_j ‖u‖²‖x‖²)/σ²,      r_i = ⟨G_i, uxᵀ⟩

and G_i is not formed for them.

Shapes: B examples, O outputs, I inputs, R rows of a direction, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.direction import BlockDirection
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block


class WeightMap(ABC):
    """How a weight (O, I) follows from the parameters behind it, to first order, where they are."""

    @property
    @abstractmethod
    def n_params(self) -> int:
        """Number of the parameters behind the weight."""

    @abstractmethod
    def pull(self, gradients: Tensor) -> Tensor:
        """Gradients at the weight ``(R, O, I)`` to those at the parameters, ``(R, P)``."""

    @abstractmethod
    def push(self, changes: Tensor) -> Tensor:
        """Changes of the parameters ``(R, P)`` to those of the weight, ``(R, O, I)``."""

    @abstractmethod
    def gram(self, x: FactorBlock, y: FactorBlock) -> Tensor:
        """Dot products at the parameters, ``(B, B')``, of gradients at the weight."""

    @abstractmethod
    def norm2(self, x: FactorBlock) -> Tensor:
        """Squared norms at the parameters, ``(B,)``."""

    @abstractmethod
    def same(self, other: WeightMap) -> bool:
        """Whether the other is the same map."""


class WeightNormalised(WeightMap):
    """w = g v/‖v‖, row by row or over the whole weight.

    Args:
        g: ``(O, 1)`` or, for the whole, ``(1, 1)``.
        v: ``(O, I)``.
    """

    def __init__(self, g: Tensor, v: Tensor) -> None:
        self.whole = g.numel() == 1 and len(v) != 1
        norm = v.norm().view(1, 1) if self.whole else v.norm(dim=1, keepdim=True)
        self.unit: Tensor = v / norm
        self.ratio: Tensor = g / norm

    @property
    def n_params(self) -> int:
        """Of g and v."""
        return self.ratio.numel() + self.unit.numel()

    def _along(self, x: Tensor) -> Tensor:
        """⟨·, v̂⟩ of ``(R, O, I)``, ``(R, O or 1, 1)``."""
        products = x * self.unit
        return products.sum((1, 2), keepdim=True) if self.whole else products.sum(2, keepdim=True)

    def pull(self, gradients: Tensor) -> Tensor:
        """(s, c (G − s v̂))."""
        s = self._along(gradients)
        across = self.ratio * (gradients - s * self.unit)
        return torch.cat([s.flatten(1), across.flatten(1)], 1)

    def push(self, changes: Tensor) -> Tensor:
        """dw = dg v̂ + c (dv − ⟨dv, v̂⟩ v̂)."""
        count = self.ratio.numel()
        dg = changes[:, :count].reshape(len(changes), *self.ratio.shape)
        dv = changes[:, count:].reshape(len(changes), *self.unit.shape)
        changed: Tensor = dg * self.unit + self.ratio * (dv - self._along(dv) * self.unit)
        return changed

    def _s(self, x: FactorBlock) -> Tensor:
        """s, ``(B, O or 1)``."""
        s = x.row_products(self.unit)
        return s.sum(1, keepdim=True) if self.whole else s

    def _scaled(self, x: FactorBlock) -> FactorBlock:
        return x.outputs_times(self.ratio.flatten())

    def gram(self, x: FactorBlock, y: FactorBlock) -> Tensor:
        """See the module."""
        left, s = self._scaled(x), self._s(x)
        right, r = (left, s) if x is y else (self._scaled(y), self._s(y))
        return left.gram(right) + (s * (1.0 - self.ratio.flatten().square())) @ r.T

    def norm2(self, x: FactorBlock) -> Tensor:
        """The diagonal of ``gram``."""
        rest = 1.0 - self.ratio.flatten().square()
        return self._scaled(x).norm2() + (self._s(x).square() * rest).sum(1)

    def same(self, other: WeightMap) -> bool:
        """Whether the other is the same map."""
        return (
            isinstance(other, WeightNormalised)
            and torch.equal(self.unit, other.unit)
            and torch.equal(self.ratio, other.ratio)
        )


class SpectrallyNormalised(WeightMap):
    """W = V/σ, σ = uᵀVx.

    Args:
        v: V ``(O, I)``.
        left: u ``(O,)``.
        right: x ``(I,)``.
    """

    def __init__(self, v: Tensor, left: Tensor, right: Tensor) -> None:
        self.sigma = torch.dot(left, v @ right)
        self.weight = v / self.sigma
        self.outer = torch.outer(left, right)

    @property
    def n_params(self) -> int:
        """Of V."""
        return self.weight.numel()

    def pull(self, gradients: Tensor) -> Tensor:
        """(G − ⟨G, W⟩ uxᵀ)/σ."""
        s = (gradients * self.weight).sum((1, 2), keepdim=True)
        return ((gradients - s * self.outer) / self.sigma).flatten(1)

    def push(self, changes: Tensor) -> Tensor:
        """(dV − ⟨uxᵀ, dV⟩ W)/σ."""
        dv = changes.reshape(len(changes), *self.weight.shape)
        r = (dv * self.outer).sum((1, 2), keepdim=True)
        return (dv - r * self.weight) / self.sigma

    def _along(self, x: FactorBlock) -> tuple[Tensor, Tensor]:
        """s and r, ``(B,)`` each."""
        s, r = x.contract(BlockDirection(torch.stack([self.weight, self.outer]), None))
        return s, r

    def gram(self, x: FactorBlock, y: FactorBlock) -> Tensor:
        """See the module."""
        s, r = self._along(x)
        s_y, r_y = (s, r) if x is y else self._along(y)
        size = self.outer.square().sum()
        rank_one = torch.outer(s, r_y) + torch.outer(r, s_y) - size * torch.outer(s, s_y)
        return (x.gram(y) - rank_one) / self.sigma.square()

    def norm2(self, x: FactorBlock) -> Tensor:
        """The diagonal of ``gram``."""
        s, r = self._along(x)
        rank_one = 2.0 * s * r - self.outer.square().sum() * s.square()
        return (x.norm2() - rank_one) / self.sigma.square()

    def same(self, other: WeightMap) -> bool:
        """Whether the other is the same map."""
        return (
            isinstance(other, SpectrallyNormalised)
            and torch.equal(self.weight, other.weight)
            and torch.equal(self.outer, other.outer)
            and torch.equal(self.sigma, other.sigma)
        )


@dataclass(frozen=True, eq=False)
class ReparametrisedBlock(Block):
    """Gradients of the parameters behind one layer's weight, and of its bias, for B examples.

    Attributes:
        name: name of the layer in its model.
        plain: gradients at the weight itself, and at a bias.
        map: how the weight follows from its parameters.
    """

    name: str
    plain: FactorBlock
    map: WeightMap

    kind: ClassVar[str] = "dense"
    of_its_step: ClassVar[bool] = True

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return self.map.n_params + self.plain.bias * self.plain.sizes[3]

    @property
    def values(self) -> Tensor:
        """The tensor that is linear in the gradient: its scale, precision and device."""
        return self.plain.values

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the plain gradients."""
        return self.plain.tensors

    @property
    def n_positions(self) -> int:
        """T."""
        return self.plain.n_positions

    @property
    def n_floats(self) -> int:
        """Numbers in ``tensors``."""
        return self.plain.n_floats

    def with_tensors(self, *tensors: Tensor) -> ReparametrisedBlock:
        """Other gradients of the same parameters at the same place, from their ``tensors``."""
        return self._of(self.plain.with_tensors(*tensors))

    def scaled(self, factor: Tensor) -> ReparametrisedBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return self._of(self.plain.scaled(factor))

    def rows(self, which: slice | Tensor) -> ReparametrisedBlock:
        """The gradients of some of the examples."""
        return self._of(self.plain.rows(which))

    def by_parameter(self, factors: Sequence[float], sizes: Sequence[int]) -> Block | None:
        """Each parameter's part times its factor, in full."""
        return DenseBlock(self.name, self.dense()).by_parameter(factors, sizes)

    def stacked(self, others: Sequence[Block]) -> Block:
        """These examples and then others; in full where the weights were not the same."""
        blocks = [self, *others]
        plain = [block.plain for block in others if self._alike(block)]
        if len(plain) == len(others):
            return self._of(self.plain.stacked(plain))
        return DenseBlock(self.name, torch.cat([block.dense() for block in blocks]))

    def dense(self) -> Tensor:
        """``(B, P)``: the parameters behind the weight, then the bias."""
        return self._pulled(self._weight.weight_gradients(), self._bias_gradients())

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        total = self.map.norm2(self._weight)
        return total + self.plain.b.sum(1).square().sum(1) if self.plain.bias else total

    def gram(self, other: Block) -> Tensor:
        """Dot products with another batch of the same layer, ``(B, B')``."""
        if not self._alike(other):
            return super().gram(other)
        mine = self._weight
        total = self.map.gram(mine, mine if other is self else other._weight)
        if self.plain.bias:
            total = total + self.plain.b.sum(1) @ other.plain.b.sum(1).T
        return total

    def contract(self, direction: BlockDirection) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        assert direction.weight is not None
        count = self.map.n_params
        weight = self.map.push(direction.weight[:, :count])
        bias = direction.weight[:, count:] if self.plain.bias else None
        return self.plain.contract(BlockDirection(weight, bias))

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``, as ``(R, P)``."""
        summed = self.plain.weighted_sum(weights)
        assert summed.weight is not None
        return BlockDirection(self._pulled(summed.weight, summed.bias), None)

    @property
    def _weight(self) -> FactorBlock:
        return self.plain.trained(True, False)

    def _bias_gradients(self) -> Tensor | None:
        return self.plain.b.sum(1) if self.plain.bias else None

    def _pulled(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        pulled = self.map.pull(weight)
        return pulled if bias is None else torch.cat([pulled, bias], 1)

    def _alike(self, other: Block) -> TypeGuard[ReparametrisedBlock]:
        return isinstance(other, ReparametrisedBlock) and self.map.same(other.map)

    def _of(self, plain: Block) -> ReparametrisedBlock:
        assert isinstance(plain, FactorBlock)
        return ReparametrisedBlock(self.name, plain, self.map)
