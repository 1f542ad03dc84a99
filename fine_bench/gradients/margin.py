"""What methods that read class probabilities ask of a problem, and the margin they read.

The margin log(p/(1−p)) of the label's probability p is, in logits z,

    m = z_y − log Σ_{k≠y} exp z_k,

which neither rounds to a constant nor loses digits where p approaches one. Its gradient with
respect to the logits is 1 at the label and −p_k/(1−p) elsewhere, so taking it directly keeps full
relative precision where dividing a loss gradient by 1 − p has none left.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fine_bench.types import Problem


def label_and_others(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """z_y and log Σ_{k≠y} exp z_k, ``(...)`` each.

    Args:
        logits: ``(..., classes)``, at least two classes.
        y: ``(...)`` integer labels.
    """
    label = y.unsqueeze(-1)
    others = torch.logsumexp(logits.scatter(-1, label, float("-inf")), -1)
    return logits.gather(-1, label).squeeze(-1), others


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """log(p/(1 − p)) of the label, ``(...)``, without cancellation; see ``label_and_others``."""
    at_label, others = label_and_others(logits, y)
    return at_label - others


def negative_margin(logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """−log(p/(1−p)) an example, ``(batch,)``, shaped like a loss: lower is better for the label.

    Args:
        logits, y: see ``label_and_others``.
        reduction: only ``"none"`` has a meaning here.
    """
    assert reduction == "none"
    at_label, others = label_and_others(logits, y)
    return others - at_label


def one_minus_probability(logits: Tensor, y: Tensor) -> Tensor:
    """1 − p of the given label, ``(...)``, without cancellation.

    Computed as Σ_{k≠y} p_k in the log domain, so it keeps its relative precision where p rounds
    to one.
    """
    _, others = label_and_others(logits, y)
    return torch.exp(others - torch.logsumexp(logits, -1))


def classification_reason(problem: Problem) -> str | None:
    """Why class probabilities do not exist for the problem, or None if they do.

    Looks at the first training example through a copy of the model.
    """
    _, x, y = next(iter(problem.batches("train", batch_size=1)))
    if y.ndim != 1 or y.is_floating_point():
        return (
            "needs integer class labels, one an example, got labels of "
            f"{y.dtype} and shape {tuple(y.shape[1:])} each"
        )
    with torch.no_grad():
        logits = copy.deepcopy(problem.model).eval()(x)
    if logits.ndim != 2 or logits.shape[1] < 2:
        return (
            "needs class logits (batch, classes) with at least two classes, got model outputs of "
            f"shape {tuple(logits.shape[1:])} each; for one logit z use the two logits (0, z)"
        )
    return None
