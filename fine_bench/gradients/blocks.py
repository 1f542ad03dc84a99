"""Per-example gradients as factors, and the contractions that the methods need.

A linear layer applied at T positions (T = 1 for a plain batch, pixels for a convolution) has the
per-example gradient

    ∂ℓ_i/∂W = Σ_t b_it a_itᵀ,    ∂ℓ_i/∂bias = Σ_t b_it,

with a_it (I,) the layer's input and b_it (O,) the gradient at its output. Keeping the factors
(Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015) turns dot products into
small matrix products: the (batch, parameters) matrix is formed only where that is cheaper, which
is decided by shape alone, so results do not depend on the data.

Shapes: B examples, T positions, I inputs, O outputs, R rows of a direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockDirection:
    """R directions in the parameters of one block.

    For a ``FactorBlock``: ``weight`` (R, O, I) and ``bias`` (R, O), None where the layer does not
    train it. For a ``DenseBlock``: ``weight`` (R, P).
    """

    weight: Tensor | None
    bias: Tensor | None


Direction = list[BlockDirection]
"""One ``BlockDirection`` for each block of a ``PerExampleGradients``, in the same order."""


@dataclass(frozen=True, eq=False)
class FactorBlock:
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

    def __len__(self) -> int:
        return self.a.shape[0]

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        n_in, n_out = self.a.shape[2], self.b.shape[2]
        return n_out * (n_in * self.weight + self.bias)

    def scaled(self, factor: Tensor) -> FactorBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return FactorBlock(
            self.name, self.a, self.b * factor[:, None, None], self.weight, self.bias
        )

    def rows(self, which: slice | Tensor) -> FactorBlock:
        """The gradients of some of the examples."""
        return FactorBlock(self.name, self.a[which], self.b[which], self.weight, self.bias)

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
        return torch.cat(parts, 1)

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        n, t, n_in = self.a.shape
        n_out = self.b.shape[2]
        if t == 1:
            a2 = self.a[:, 0].square().sum(1) if self.weight else self.a.new_zeros(n)
            return (a2 + float(self.bias)) * self.b[:, 0].square().sum(1)
        total = self.a.new_zeros(n)
        if self.bias:
            total = total + self.b.sum(1).square().sum(1)
        if self.weight:
            if t * t * (n_in + n_out) < t * n_in * n_out:
                aa = torch.bmm(self.a, self.a.transpose(1, 2))
                bb = torch.bmm(self.b, self.b.transpose(1, 2))
                total = total + (aa * bb).sum((1, 2))
            else:
                total = total + self.weight_gradients().square().sum((1, 2))
        return total

    def gram(self, other: FactorBlock) -> Tensor:
        """Dot products with another batch of the same layer, ``(B, B')``."""
        n, t, n_in = self.a.shape
        m, s, n_out = other.a.shape[0], other.a.shape[1], self.b.shape[2]
        if t == 1 and s == 1:
            bb = self.b[:, 0] @ other.b[:, 0].T
            if not self.weight:
                return bb
            aa = self.a[:, 0] @ other.a[:, 0].T
            return aa.add_(1.0).mul_(bb) if self.bias else aa.mul_(bb)
        total = self.a.new_zeros(n, m)
        if self.bias:
            total = total + self.b.sum(1) @ other.b.sum(1).T
        if self.weight:
            by_factors = n * m * t * s * (n_in + n_out)
            by_matrices = (n * t + m * s + n * m) * n_in * n_out
            if by_factors < by_matrices:
                aa = self.a.reshape(n * t, n_in) @ other.a.reshape(m * s, n_in).T
                bb = self.b.reshape(n * t, n_out) @ other.b.reshape(m * s, n_out).T
                total = total + (aa * bb).view(n, t, m, s).sum((1, 3))
            else:
                mine = self.weight_gradients().flatten(1)
                theirs = mine if other is self else other.weight_gradients().flatten(1)
                total = total + mine @ theirs.T
        return total

    def contract(self, direction: BlockDirection) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        n, t, n_in = self.a.shape
        n_out = self.b.shape[2]
        total: Tensor | None = None
        if self.weight:
            w = direction.weight
            assert w is not None
            n_rows = w.shape[0]
            if t > 1 and n_rows > 1:
                total = w.flatten(1) @ self.weight_gradients().flatten(1).T
            else:
                # Σ_t b_tᵀ W a_t, on the smaller side of the layer first
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

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``."""
        n, t, n_in = self.a.shape
        n_out, n_rows = self.b.shape[2], weights.shape[0]
        weight = bias = None
        if self.weight:
            if t > 1 and n_rows > 1:
                flat = self.weight_gradients().flatten(1)
                weight = (weights @ flat).view(n_rows, n_out, n_in)
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


@dataclass(frozen=True, eq=False)
class DenseBlock:
    """Gradients formed in full, ``(B, P)``: for parameters outside the layers with factors."""

    name: str
    g: Tensor

    def __len__(self) -> int:
        return self.g.shape[0]

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return self.g.shape[1]

    def scaled(self, factor: Tensor) -> DenseBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return DenseBlock(self.name, self.g * factor[:, None])

    def rows(self, which: slice | Tensor) -> DenseBlock:
        """The gradients of some of the examples."""
        return DenseBlock(self.name, self.g[which])

    def dense(self) -> Tensor:
        """``(B, P)``."""
        return self.g

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        return self.g.square().sum(1)

    def gram(self, other: DenseBlock) -> Tensor:
        """Dot products with another batch, ``(B, B')``."""
        return self.g @ other.g.T

    def contract(self, direction: BlockDirection) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        assert direction.weight is not None
        return direction.weight @ self.g.T

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``."""
        return BlockDirection(weights @ self.g, None)


Block = FactorBlock | DenseBlock


@dataclass(frozen=True, eq=False)
class PerExampleGradients:
    """The gradients of B examples, block by block.

    Attributes:
        blocks: in the order of the model's layers.
        loss: the value whose gradient this is, for each example, ``(B,)``, where it is known.
        one_minus_p: 1 − p of the given label, ``(B,)``, without cancellation; None where the
            model's output is not a batch of class logits.
    """

    blocks: Sequence[Block]
    loss: Tensor | None = None
    one_minus_p: Tensor | None = None

    def __len__(self) -> int:
        return len(self.blocks[0])

    @property
    def n_params(self) -> int:
        """Number of trained parameters that the blocks cover."""
        return sum(block.n_params for block in self.blocks)

    def scaled(self, factor: Tensor) -> PerExampleGradients:
        """Every example's gradient times its factor, ``(B,)``."""
        blocks = [block.scaled(factor) for block in self.blocks]
        return PerExampleGradients(blocks, self.loss, self.one_minus_p)

    def rows(self, which: slice | Tensor) -> PerExampleGradients:
        """The gradients of some of the examples."""
        return PerExampleGradients(
            [block.rows(which) for block in self.blocks],
            None if self.loss is None else self.loss[which],
            None if self.one_minus_p is None else self.one_minus_p[which],
        )

    def dense(self) -> Tensor:
        """``(B, P)``, blocks side by side. For small models and for tests."""
        return torch.cat([block.dense() for block in self.blocks], 1)

    def norm2(self) -> Tensor:
        """Squared norms, ``(B,)``."""
        return _total(block.norm2() for block in self.blocks)

    def gram(self, other: PerExampleGradients | None = None) -> Tensor:
        """Dot products ⟨g_i, g'_j⟩, ``(B, B')``; with itself by default."""
        pairs = zip(self.blocks, (other or self).blocks, strict=True)
        return _total(_block_gram(x, y) for x, y in pairs)

    def contract(self, direction: Direction) -> Tensor:
        """Dot products with R directions, ``(R, B)``."""
        return _total(x.contract(d) for x, d in zip(self.blocks, direction, strict=True))

    def weighted_sum(self, weights: Tensor) -> Direction:
        """The directions Σ_i w_ri g_i for weights ``(R, B)``."""
        return [block.weighted_sum(weights) for block in self.blocks]


def add_directions(x: Direction, y: Direction) -> Direction:
    """Sum of two directions of the same shape."""

    def add(p: Tensor | None, q: Tensor | None) -> Tensor | None:
        return None if p is None or q is None else p + q

    return [
        BlockDirection(add(p.weight, q.weight), add(p.bias, q.bias))
        for p, q in zip(x, y, strict=True)
    ]


def _block_gram(x: Block, y: Block) -> Tensor:
    if isinstance(x, FactorBlock) and isinstance(y, FactorBlock):
        return x.gram(y)
    if isinstance(x, DenseBlock) and isinstance(y, DenseBlock):
        return x.gram(y)
    raise TypeError(f"blocks {x.name!r} and {y.name!r} are of different kinds: different models?")


def _total(terms: Iterable[Tensor]) -> Tensor:
    # one at a time, so that only one term is held beside the running sum
    result: Tensor | None = None
    for term in terms:
        result = term if result is None else result + term
    assert result is not None
    return result
