"""Per-example gradients that are formed in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fine_bench.gradients.blocks.protocol import Block, group_rows


@dataclass(frozen=True, eq=False)
class DenseBlock(Block):
    """Gradients formed in full, ``(B, P)``.

    For layers with few parameters (normalisation, grouped convolutions), and for whatever
    ``torch.func`` has to take.
    """

    name: str
    g: Tensor

    kind: ClassVar[str] = "dense"
    in_full: ClassVar[bool] = True

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return self.g.shape[1]

    @property
    def values(self) -> Tensor:
        """The gradients."""
        return self.g

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The gradients alone."""
        return (self.g,)

    def with_tensors(self, *tensors: Tensor) -> DenseBlock:
        """Other gradients of the same parameters."""
        (g,) = tensors
        return DenseBlock(self.name, g)

    def scaled(self, factor: Tensor) -> DenseBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return DenseBlock(self.name, self.g * factor[:, None])

    def by_parameter(self, factors: Sequence[float], sizes: Sequence[int]) -> DenseBlock | None:
        """Each parameter's columns times its factor; a sketch has others."""
        if sum(sizes) != self.n_params:
            return None
        columns = [self.g.new_full((n,), value) for n, value in zip(sizes, factors, strict=True)]
        return DenseBlock(self.name, self.g * torch.cat(columns))

    def dense(self) -> Tensor:
        """``(B, P)``."""
        return self.g

    def grams(self, n_groups: int, rows: Tensor | None = None) -> Tensor:
        """Gram matrices of consecutive groups, all groups in one product."""
        g = self.g.reshape(n_groups, -1, self.g.shape[1])
        return group_rows(g, rows) @ g.mT


def in_full(block: Block) -> DenseBlock:
    """The same gradients formed in full, whatever their factors."""
    return DenseBlock(block.name, block.dense())
