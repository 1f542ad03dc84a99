"""Divisions by a size that may be zero: what has no size says nothing and gets the value zero."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_or_zero(scale: Tensor) -> Tensor:
    """1/scale, and 0 where the scale is zero or has underflowed.

    For a spread σ or a norm: a query without one says nothing. For 1 − p: the loss gradient has
    underflowed with it, and the margin's gradient is unknown in this precision, so that the example
    is left out instead of being given an infinite one.

    Args:
        scale: ≥ 0, of any shape.
    """
    tiny = torch.finfo(scale.dtype).tiny
    return torch.where(scale > tiny, 1.0 / scale.clamp_min(tiny), 0.0)


def ratio_or_zero(values: Tensor, scale: Tensor) -> Tensor:
    """values/scale, and 0 where the scale is zero.

    Args:
        values: any shape that ``scale`` can be broadcast to.
        scale: ≥ 0.
    """
    return torch.where(scale > 0, values / torch.where(scale > 0, scale, 1.0), 0.0)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(K, P)`` divided by their norms, and the norms ``(K, 1)``; a zero row stays zero."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0), norms
