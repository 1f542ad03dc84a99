"""Products of gradients in a diagonal geometry, ⟨g, d ∘ g'⟩ with one weight d for each parameter.

The weight of an entry of a linear layer's matrix depends on its row and its column, so the product
no longer splits into one of the inputs and one of the output gradients: the matrices Σ_t b_t a_tᵀ
are formed, some output units at a time (``FactorBlock``), except for the norm of a single outer
product, Σ_oi d_oi b_o² a_i². For an embedding table the weights of a token's row go with its
gradient.

Shapes: B examples, R rows of a direction; weights d have the shape of a direction with R = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection, Direction
from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.per_example import Block, DenseBlock, PerExampleGradients


def weights_for_block(block: Block, parameters: Sequence[Tensor]) -> BlockDirection:
    """Weights for a block, from one tensor for each of its parameters.

    Args:
        block: whose gradients they are for.
        parameters: in the shapes and the order of the layer's trained parameters.
    """
    if isinstance(block, FactorBlock):
        return _as_matrices(parameters, block.weight, block.bias)
    return (
        _as_matrices(parameters, True, False)
        if isinstance(block, TokenBlock)
        else _flat(parameters)
    )


def weights_for_direction(part: BlockDirection, parameters: Sequence[Tensor]) -> BlockDirection:
    """The same for directions in the parameters of a block, which have its shape."""
    if part.weight is not None and part.weight.ndim == 2:
        return _flat(parameters)
    return _as_matrices(parameters, part.weight is not None, part.bias is not None)


def _flat(parameters: Sequence[Tensor]) -> BlockDirection:
    return BlockDirection(torch.cat([p.flatten() for p in parameters])[None], None)


def _as_matrices(parameters: Sequence[Tensor], weight: bool, bias: bool) -> BlockDirection:
    rest = list(parameters)
    matrix = rest.pop(0).flatten(1)[None] if weight else None
    return BlockDirection(matrix, rest.pop(0)[None] if bias else None)


def diagonal_gram(x: PerExampleGradients, y: PerExampleGradients, d: Direction) -> Tensor:
    """⟨g_i, d ∘ g'_j⟩, ``(B, B')``."""
    blocks = zip(x.blocks, y.blocks, d, strict=True)
    return torch.stack([_gram(mine, theirs, weights) for mine, theirs, weights in blocks]).sum(0)


def diagonal_norm2(x: PerExampleGradients, d: Direction) -> Tensor:
    """⟨g_i, d ∘ g_i⟩, ``(B,)``."""
    return torch.stack([_norm2(b, w) for b, w in zip(x.blocks, d, strict=True)]).sum(0)


def scaled_direction(direction: Direction, d: Direction) -> Direction:
    """d ∘ each of the R rows of a direction."""

    def times(part: Tensor | None, weights: Tensor | None) -> Tensor | None:
        return None if part is None or weights is None else part * weights

    return [
        BlockDirection(times(v.weight, w.weight), times(v.bias, w.bias))
        for v, w in zip(direction, d, strict=True)
    ]


def _gram(x: Block, y: Block, d: BlockDirection) -> Tensor:
    if isinstance(x, DenseBlock) and isinstance(y, DenseBlock):
        assert d.weight is not None
        return (x.g * d.weight) @ y.g.T
    if isinstance(x, TokenBlock) and isinstance(y, TokenBlock):
        assert d.weight is not None
        weighted = TokenBlock(x.name, x.tokens, x.b * d.weight[0][x.tokens], x.n_tokens)
        return weighted.gram(y)
    if isinstance(x, FactorBlock) and isinstance(y, FactorBlock):
        total = x.b.new_zeros(len(x), len(y))
        if x.bias:
            assert d.bias is not None
            total += (x.b.sum(1) * d.bias) @ y.b.sum(1).T
        if x.weight:
            assert d.weight is not None
            for units in (x if len(x) > len(y) else y).some_units():
                left = x.unit_gradients(units) * d.weight[:, units]
                total.addmm_(left.flatten(1), y.unit_gradients(units).flatten(1).T)
        return total
    raise TypeError(f"blocks {x.name!r} and {y.name!r} are of different kinds: different models?")


def _norm2(x: Block, d: BlockDirection) -> Tensor:
    if isinstance(x, DenseBlock):
        assert d.weight is not None
        return x.g.square() @ d.weight[0]
    if isinstance(x, TokenBlock):
        assert d.weight is not None
        examples, tokens, rows = x.summed()
        squares = (rows.square() * d.weight[0][tokens]).sum(1)
        return squares.new_zeros(len(x)).index_add_(0, examples, squares)
    total = x.b.new_zeros(len(x))
    if x.bias:
        assert d.bias is not None
        total += x.b.sum(1).square() @ d.bias[0]
    if x.weight:
        assert d.weight is not None
        if x.a.shape[1] == 1:
            total += ((x.b[:, 0].square() @ d.weight[0]) * x.a[:, 0].square()).sum(1)
        else:
            for units in x.some_units():
                total += (x.unit_gradients(units).square() * d.weight[:, units]).sum((1, 2))
    return total
