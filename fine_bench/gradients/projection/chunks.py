"""Gradient blocks as the random projections take them: beside their rows of P, batches joined.

Nothing here draws a random number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fine_bench.gradients.blocks.protocol import Block, Columns
from fine_bench.gradients.per_example import PerExampleGradients, stack_blocks


class Rows:
    """The rows of P in the order of the parameters, whatever number is asked for at a time.

    Args:
        portion: draws the next rows, a fixed number of them.
        generator: the stream they come from.
    """

    def __init__(
        self, portion: Callable[[torch.Generator], Tensor], generator: torch.Generator
    ) -> None:
        self._portion = portion
        self._generator = generator
        self._left: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """The next ``count`` rows."""
        parts = [] if self._left is None else [self._left]
        have = sum(len(part) for part in parts)
        while have < count:
            parts.append(self._portion(self._generator))
            have += len(parts[-1])
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._left = rows[count:]
        return rows[:count]

    def skip(self, count: int) -> None:
        """Leave out the next ``count`` rows: they are drawn, but not kept."""
        for start in range(0, count, 4096):
            self.take(min(4096, count - start))

    def beside(self, block: Block) -> Iterator[tuple[Columns, Tensor]]:
        """The block's gradients, some parameters at a time, with their rows of P."""
        reached = 0
        for columns in block.columns():
            self.skip(columns.start - reached)
            width = columns.values.shape[1]
            yield columns, self.take(width)
            reached = columns.start + width


def n_bytes(block: Block) -> int:
    """Memory of the block's tensors."""
    return sum(t.numel() * t.element_size() for t in block.tensors)


def shapes(gradients: PerExampleGradients) -> list[list[torch.Size]]:
    """What batches must have in common to be joined."""
    return [[part.shape[1:] for part in block.tensors] for block in gradients.blocks]


def joined(batches: Sequence[PerExampleGradients]) -> PerExampleGradients:
    """Batches of the same shapes as one."""
    return PerExampleGradients(stack_blocks(batches))
