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

from fine_bench.gradients.blocks.direction import (
    BlockDirection,
    Direction,
    flat_weights,
    matrix_weights,
)
from fine_bench.gradients.per_example import PerExampleGradients


def weights_for_direction(part: BlockDirection, parameters: Sequence[Tensor]) -> BlockDirection:
    """Weights for directions in the parameters of a block, which have its shape.

    Args:
        part: the directions.
        parameters: one tensor for each of the block's parameters; see ``Block.diagonal_weights``.
    """
    if part.weight is not None and part.weight.ndim == 2:
        return flat_weights(parameters)
    return matrix_weights(parameters, part.weight is not None, part.bias is not None)


def diagonal_gram(x: PerExampleGradients, y: PerExampleGradients, d: Direction) -> Tensor:
    """⟨g_i, d ∘ g'_j⟩, ``(B, B')``."""
    blocks = zip(x.blocks, y.blocks, d, strict=True)
    return torch.stack(
        [mine.diagonal_gram(theirs, weights) for mine, theirs, weights in blocks]
    ).sum(0)


def diagonal_norm2(x: PerExampleGradients, d: Direction) -> Tensor:
    """⟨g_i, d ∘ g_i⟩, ``(B,)``."""
    return torch.stack([b.diagonal_norm2(w) for b, w in zip(x.blocks, d, strict=True)]).sum(0)


def scaled_direction(direction: Direction, d: Direction) -> Direction:
    """d ∘ each of the R rows of a direction."""

    def times(part: Tensor | None, weights: Tensor | None) -> Tensor | None:
        return None if part is None or weights is None else part * weights

    return [
        BlockDirection(times(v.weight, w.weight), times(v.bias, w.bias))
        for v, w in zip(direction, d, strict=True)
    ]
