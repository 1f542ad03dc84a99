"""Loss modules of PyTorch as functions that also give each example's own loss."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.types import Loss


def per_example(criterion: nn.Module) -> Loss:
    """A loss module as a function that also gives each example's own loss.

    Raises:
        ValueError: it adds examples up, or has no ``reduction``.
    """
    reduction = getattr(criterion, "reduction", None)
    if reduction != "mean":
        raise ValueError(
            f"loss={type(criterion).__name__}(…) has reduction={reduction!r}, but f-INE needs a "
            'mean over the batch: use reduction="mean", or pass a function '
            "loss(output, y, reduction=…)"
        )
    if type(criterion) is nn.CrossEntropyLoss and _plain(criterion):
        return F.cross_entropy

    def loss(output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        each: Any = copy.copy(criterion)
        each.reduction = reduction
        # its own hooks are the loop's
        found: Tensor = each.forward(output, y)
        # the mean over a batch is that over all numbers of its examples
        return found.flatten(1).mean(1) if reduction == "none" and found.ndim > 1 else found

    return loss


def _plain(criterion: nn.CrossEntropyLoss) -> bool:
    """Whether it is cross-entropy without weights, smoothing or labels that are left out."""
    usual = nn.CrossEntropyLoss()
    same = criterion.label_smoothing == usual.label_smoothing
    return criterion.weight is None and same and criterion.ignore_index == usual.ignore_index


__all__ = ["per_example"]
