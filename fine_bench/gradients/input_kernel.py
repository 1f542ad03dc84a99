"""A kernel of the inputs alone: exp(−‖x − x'‖²/2σ²)."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variance(x: Tensor) -> float:
    """σ² of centred inputs ``(n, d)``: half the mean squared distance of two of them; 1 for 0."""
    return float(x.square().sum(1).mean()) or 1.0


def gaussian(a: Tensor, b: Tensor, variance: float) -> Tensor:
    """exp(−‖a_i − b_j‖²/2σ²), ``(len(a), len(b))``."""
    found = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
    return found.square_().div_(-2 * variance).exp_()


def input_kernel(x: Tensor, n_train: int, rows: Tensor | None = None) -> Tensor:
    """The Gaussian kernel of all inputs, σ² the total variance of the training inputs.

    Args:
        x: inputs ``(N, …)``, of training examples before all others.
        n_train: n.
        rows: which rows to take, ``(L,)``; None for all.

    Returns:
        ``(N, N)`` or ``(L, N)``, of diagonal 1.
    """
    x = x.flatten(1)
    x = x - x[:n_train].mean(0)
    return gaussian(x if rows is None else x[rows], x, total_variance(x[:n_train]))
