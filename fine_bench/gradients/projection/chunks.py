"""Gradient blocks as the random projections take them: in chunks, compacted, batches joined.

Nothing here draws a random number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fine_bench.gradients.per_example import (
    Block,
    DenseBlock,
    FactorBlock,
    PerExampleGradients,
    TokenBlock,
)


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


def dense_chunks(block: FactorBlock | DenseBlock) -> Iterable[Tensor]:
    """The columns of ``block.dense()``, about a thousand at a time, ``(B, columns)``."""
    if isinstance(block, DenseBlock):
        yield from torch.split(block.g, 1024, dim=1)
        return
    if block.weight:
        units = max(1, 1024 // block.a.shape[2])
        for b in torch.split(block.b, units, dim=2):
            yield torch.bmm(b.transpose(1, 2), block.a).flatten(1)
    if block.bias:
        yield block.b.sum(1)


def token_rows(block: TokenBlock, rows: Rows) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """For every token that occurs: examples ``(k,)``, gradients ``(k, D)``, D rows of P."""
    reached = 0
    for token, examples, gradients in block.by_token():
        rows.skip((token - reached) * block.width)
        yield examples, gradients, rows.take(block.width)
        reached = token + 1


def n_bytes(block: Block) -> int:
    """Memory of the block's tensors."""
    if isinstance(block, DenseBlock):
        held = [block.g]
    else:
        held = [block.a if isinstance(block, FactorBlock) else block.tokens, block.b]
    return sum(t.numel() * t.element_size() for t in held)


def compact(block: Block) -> Block:
    """A layer with many positions as its gradient, where that is smaller than its factors."""
    if isinstance(block, FactorBlock):
        _, t, n_in = block.a.shape
        if t * (n_in + block.b.shape[2]) > block.n_params:
            return DenseBlock(block.name, block.dense())
    return block


def shapes(gradients: PerExampleGradients) -> list[tuple[int, ...]]:
    """What batches must have in common to be joined."""
    return [
        (*block.a.shape[1:], block.b.shape[2])
        if isinstance(block, FactorBlock)
        else tuple(block.values.shape[1:])
        for block in gradients.blocks
    ]


def joined(batches: Sequence[PerExampleGradients]) -> PerExampleGradients:
    """Batches of the same shapes as one."""
    return PerExampleGradients(
        [_join(parts) for parts in zip(*(batch.blocks for batch in batches), strict=True)]
    )


def _join(parts: Sequence[Block]) -> Block:
    first = parts[0]
    values = torch.cat([part.values for part in parts])
    if isinstance(first, FactorBlock):
        a = torch.cat([part.a for part in parts if isinstance(part, FactorBlock)])
        return FactorBlock(first.name, a, values, first.weight, first.bias)
    if isinstance(first, TokenBlock):
        tokens = torch.cat([part.tokens for part in parts if isinstance(part, TokenBlock)])
        return TokenBlock(first.name, tokens, values, first.n_tokens)
    return DenseBlock(first.name, values)
