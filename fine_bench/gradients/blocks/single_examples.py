"""Directions that are single examples' gradients, one a row, without being formed.

A direction in a layer's parameters is as large as the layer, and R of them cost R · O · I
multiplications for every gradient that they are contracted with. Where each is one example's own
gradient w_r g_r of a linear layer that is applied once, g_r = b_r a_rᵀ, the product needs the
factors alone,

    ⟨w_r g_r, g_i⟩ = w_r ⟨b_r, b_i⟩ (⟨a_r, a_i⟩ + 1)            (+ 1 for a bias)

which is R (O + I). Whoever asks such a direction for its ``weight`` or its ``bias`` gets them,
formed at that moment.

Shapes: B examples, I inputs, O outputs, R rows of a direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block


class HeldDirection(BlockDirection, ABC):
    """R directions that know a cheaper product with gradients than through their matrices."""

    def __init__(self) -> None:
        """Nothing is formed yet."""

    @abstractmethod
    def products(self, block: Block) -> Tensor:
        """Dot products with the gradients of a block of the same layer, ``(R, B)``."""

    @abstractmethod
    def formed(self) -> BlockDirection:
        """The directions in full."""

    @cached_property
    def _formed(self) -> BlockDirection:
        return self.formed()

    @property
    def weight(self) -> Tensor | None:
        """The weight's part of ``formed``."""
        return self._formed.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias's part of ``formed``."""
        return self._formed.bias


class SingleExamples(HeldDirection):
    """One direction an example: its gradient.

    Args:
        block: the R gradients, scaled as the directions shall be.
    """

    def __init__(self, block: FactorBlock) -> None:
        self.block = block

    def products(self, block: Block) -> Tensor:
        """From the factors, ``(R, B)``.

        Of the weight and the bias those count that ``block`` has: what the optimiser does not move
        is left out of it (``FactorBlock.by_parameter``), and a product of factors would add it.
        """
        own = self.block
        if type(block) is FactorBlock and (block.weight, block.bias) != (own.weight, own.bias):
            own = own.trained(weight=block.weight, bias=block.bias)
        return own.gram(block)

    def formed(self) -> BlockDirection:
        """``(R, O, I)`` and ``(R, O)``."""
        ones = torch.eye(len(self.block)).to(self.block.values)
        return self.block.weighted_sum(ones)


def single_examples(block: Block, weights: Tensor) -> BlockDirection:
    """One direction an example, its gradient times its weight ``(B,)``; held where that is cheaper.

    It is for linear layers that were applied once. With T positions the factors of a product cost
    T² (O + I), and the matrices are formed instead.
    """
    # a subclass may keep its factors for another product
    if type(block) is FactorBlock and block.outer_products() is not None:
        return SingleExamples(block.scaled(weights.to(block.values)))
    return block.weighted_sum(torch.diag(weights).to(block.values))


def contracted(block: Block, direction: BlockDirection) -> Tensor:
    """Dot products of gradients with R directions of the same layer, ``(R, B)``."""
    if isinstance(direction, HeldDirection):
        return direction.products(block)
    return block.contract(direction)
