"""Directions in the space of a model's parameters, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockDirection:
    """R directions in the parameters of one block.

    For a ``FactorBlock``: ``weight`` (R, O, I) and ``bias`` (R, O), None where the layer does not
    train it. For a ``TokenBlock``: ``weight`` (R, V, D). For a ``DenseBlock``: ``weight`` (R, P).
    """

    weight: Tensor | None
    bias: Tensor | None


Direction = list[BlockDirection]
"""One ``BlockDirection`` for each block of a ``PerExampleGradients``, in the same order."""


def add_directions(x: Direction, y: Direction) -> Direction:
    """Sum of two directions of the same shape."""

    def add(p: Tensor | None, q: Tensor | None) -> Tensor | None:
        return None if p is None or q is None else p + q

    return [
        BlockDirection(add(p.weight, q.weight), add(p.bias, q.bias))
        for p, q in zip(x, y, strict=True)
    ]


def concatenated(parts: Sequence[Direction]) -> Direction:
    """The rows of several directions, one after the other."""

    def join(values: Sequence[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.cat(known) if len(known) == len(values) else None

    return [
        BlockDirection(join([d.weight for d in blocks]), join([d.bias for d in blocks]))
        for blocks in zip(*parts, strict=True)
    ]


def flat_weights(parameters: Sequence[Tensor]) -> BlockDirection:
    """One number for each parameter as a direction of a ``DenseBlock``, ``(1, P)``."""
    return BlockDirection(torch.cat([p.flatten() for p in parameters])[None], None)


def matrix_weights(parameters: Sequence[Tensor], weight: bool, bias: bool) -> BlockDirection:
    """One number for each parameter of a matrix and a bias, ``(1, O, I)`` and ``(1, O)``.

    Args:
        parameters: those that are trained, in this order.
        weight, bias: which of the two they are.
    """
    rest = list(parameters)
    matrix = rest.pop(0).flatten(1)[None] if weight else None
    return BlockDirection(matrix, rest.pop(0)[None] if bias else None)
