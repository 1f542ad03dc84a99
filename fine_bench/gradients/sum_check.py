"""Whether per-example gradients add up to the gradient that the batch really has.

Factors are right only if a parameter acts through its layer alone and row i of the layer's output
reaches the loss of example i alone. Both are visible from outside: for any weights w

    Σ_i w_i g_i = ∂/∂θ Σ_i w_i ℓ_i.

With unequal w a layer whose rows reach other examples' losses fails too: batch statistics,
attention across the batch, positions that all examples share.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from fine_bench.gradients.blocks.protocol import Block


def unequal_weights(n: int, like: Tensor) -> Tensor:
    """n different weights around one, ``(n,)``, in no particular order."""
    golden = torch.arange(1, n + 1, dtype=torch.float64) * 0.6180339887498949
    return (0.5 + golden % 1.0).to(like)


def disagreeing(
    blocks: Sequence[Block],
    weights: Tensor | None,
    totals: Sequence[Sequence[Tensor]],
    eps: float,
) -> list[str] | None:
    """Names of the blocks whose Σ_i w_i g_i is not the given gradient.

    Gradients cancel in the sum and rounding errors do not, so the difference is compared with the
    block's Σ_i w_i ‖g_i‖, to √ε of it; and with 1000 ε of the same sum over all blocks, since some
    gradients are nothing but rounding (that of a bias which softmax does not see).

    Args:
        blocks: the per-example gradients.
        weights: w ``(B,)``; None for ones.
        totals: the gradient of each parameter of each block, in order.
        eps: ε, the rounding of one number in the pass.

    Returns:
        None where gradients are not finite, so that nothing can be said.
    """
    differences, sizes = [], []
    for block, total in zip(blocks, totals, strict=True):
        values = block.values
        w = values.new_ones(len(block)) if weights is None else weights.to(values)
        direction = block.weighted_sum(w[None])
        mine = [part.flatten() for part in (direction.weight, direction.bias) if part is not None]
        difference = torch.cat(mine) - torch.cat([g.flatten() for g in total])
        differences.append(float(difference.norm()))
        sizes.append(float((block.norm2().sqrt() * w).sum()))
    whole = sum(sizes)
    if not isfinite(whole + sum(differences)):
        return None
    # some layers compute in float32 whatever the model's precision
    eps = max(eps, torch.finfo(torch.float32).eps)
    slack = min(1000 * eps, eps**0.5) * whole
    return [
        block.name
        for block, difference, size in zip(blocks, differences, sizes, strict=True)
        if difference > eps**0.5 * size + slack
    ]
