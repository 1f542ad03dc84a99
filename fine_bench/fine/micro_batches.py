"""The examples behind one optimiser step, and how much each of them counts in it.

A step's gradient may be put together from several backward passes: A = ``accumulate_grad_batches``
micro-batches, on each of W processes. Their union, of m = Σ_k m_k examples, is the *global batch*.
Lightning divides every micro-batch's mean loss by A, and averages over processes, so the gradient
of the step is

    Σ_i w_i g_i,   w_i = 1/(A · W · m_k) for example i of micro-batch k.

With r_i = m · w_i, which is 1 for all if the micro-batches are equally long and the window is
full, and c̄, σ as in ``fine.effects``, the statistic x = Σ_i w_i c_i is shifted by (r_i/m) (c_i − c̄) if i
takes the place of an average example; its variance is ρ² σ²/m with ρ² = mean r². These are the
formulas of one batch of m examples with step size η ρ and effects (r_i/ρ) (c_i − c̄). For instance,
where an epoch ends after K < A micro-batches of one length, ρ = K/A and nothing else changes: the
step is that of the K · m_k examples with a step size of η K/A, which is what Lightning does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class WindowWeights:
    """How the examples of a window count.

    Attributes:
        m: number of examples.
        mean: mean of r_i.
        rms: ρ.
        relative: r_i/ρ, ``(m,)`` in float64; None where all are one.
    """

    m: int
    mean: float
    rms: float
    relative: Tensor | None


def window_weights(sizes: Sequence[int], parts: Sequence[int]) -> WindowWeights:
    """r_i of the module's text.

    Args:
        sizes: m_k, the number of examples of each micro-batch of each process, ≥ 1.
        parts: A · W for each of them: into how many equal parts the step's gradient is divided.
    """
    if len(sizes) == 1:  # nearly every step: plain numbers
        return WindowWeights(sizes[0], 1.0 / parts[0], 1.0 / parts[0], None)
    m = sum(sizes)
    r = [m / (size * part) for size, part in zip(sizes, parts, strict=True)]
    if all(value == r[0] for value in r):
        return WindowWeights(m, r[0], r[0], None)
    each = torch.tensor(r, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    rms = math.sqrt(float(each.square().mean()))
    return WindowWeights(m, float(each.mean()), rms, each / rms)
