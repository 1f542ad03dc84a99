"""Per-example gradients of several passes at the same parameters, side by side as one batch.

Passes may differ in the number of positions T (sentences padded to different lengths). Positions
that are filled up carry a zero gradient at the output, so they add nothing to any sum over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.per_example import Block, DenseBlock, PerExampleGradients


def stack_examples(parts: Sequence[PerExampleGradients]) -> PerExampleGradients:
    """The gradients of all parts as those of one batch, in the order of the parts.

    Args:
        parts: at least one, of the same model and layers; ``(B_k, …)`` each.

    Returns:
        ``(Σ B_k, …)``; the part itself if there is only one.

    Raises:
        TypeError: a layer's blocks are of different kinds: the parts are of different models.
    """
    if len(parts) == 1:
        return parts[0]
    blocks = [_stack_blocks(same) for same in zip(*(part.blocks for part in parts), strict=True)]
    return PerExampleGradients(
        blocks,
        _stack_known([part.loss for part in parts]),
        _stack_known([part.one_minus_p for part in parts]),
    )


def _stack_blocks(blocks: Sequence[Block]) -> Block:
    first = blocks[0]
    if isinstance(first, FactorBlock):
        factors = [b for b in blocks if isinstance(b, FactorBlock)]
        if len(factors) == len(blocks):
            a, b = (
                _stack_positions([f.a for f in factors]),
                _stack_positions([f.b for f in factors]),
            )
            return FactorBlock(first.name, a, b, first.weight, first.bias)
    elif isinstance(first, TokenBlock):
        tables = [b for b in blocks if isinstance(b, TokenBlock)]
        if len(tables) == len(blocks):
            tokens = _stack_positions([t.tokens for t in tables])
            b = _stack_positions([t.b for t in tables])
            return TokenBlock(first.name, tokens, b, first.n_tokens)
    else:
        dense = [b for b in blocks if isinstance(b, DenseBlock)]
        if len(dense) == len(blocks):
            return DenseBlock(first.name, torch.cat([d.g for d in dense]))
    kinds = sorted({type(b).__name__ for b in blocks})
    raise TypeError(f"blocks of layer {first.name!r} are of different kinds, {kinds}")


def _stack_positions(tensors: Sequence[Tensor]) -> Tensor:
    """``(B_k, T_k, …)`` → ``(Σ B_k, max T_k, …)``, filled up with zeros."""
    longest = max(t.shape[1] for t in tensors)
    return torch.cat([_filled(t, longest) for t in tensors])


def _filled(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x


def _stack_known(values: Sequence[Tensor | None]) -> Tensor | None:
    known = [v for v in values if v is not None]
    return torch.cat(known) if len(known) == len(values) else None
