"""Label corruption: what is done to the training labels, and to which of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fine_bench.errors import ConfigError


def check_rate(rate: float) -> None:
    """Refuse a noise rate outside [0, 1)."""
    # written as "not inside", so that NaN is refused too
    if not 0.0 <= rate < 1.0:
        raise ConfigError(
            f"task.noise_rate is the share of flipped labels, at least 0 and below 1; got {rate}. "
            "Type for instance task.noise_rate=0.2"
        )


def flip_uniform(
    labels: Tensor, rate: float, n_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Uniform label noise: ``round(rate * n)`` labels, each moved to a uniformly drawn other class.

    The number is exact and not binomial, so the noise rate is known to the metrics; no flip
    lands on its own class, so every flip is an error. (``round`` takes halves to the even.)

    Args:
        labels: ``(n,)`` int64 in 0 … n_classes - 1; left as it is.
        rate: share of labels to flip, 0 ≤ rate < 1.
        n_classes: at least 2.
        generator: the random stream of the flips.

    Returns:
        The new labels ``(n,)`` and ``is_flipped`` ``(n,)`` boolean.

    Raises:
        ConfigError: a rate outside [0, 1).
        ValueError: labels outside the classes, or fewer than two classes.
    """
    check_rate(rate)
    if n_classes < 2:
        raise ValueError(f"flipping needs at least two classes, got n_classes={n_classes}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        raise ValueError(
            f"labels must lie in 0 … {n_classes - 1}, got {int(labels.min())} … {int(labels.max())}"
        )
    n = len(labels)
    flipped = torch.randperm(n, generator=generator)[: round(rate * n)]
    # a shift by 1 … n_classes - 1 reaches every other class with the same probability
    shift = torch.randint(1, n_classes, (len(flipped),), generator=generator)
    new_labels = labels.clone()
    new_labels[flipped] = (labels[flipped] + shift) % n_classes
    is_flipped = torch.zeros(n, dtype=torch.bool)
    is_flipped[flipped] = True
    return new_labels, is_flipped
