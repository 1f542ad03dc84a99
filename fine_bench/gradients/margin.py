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


def negative_margin(logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """−log(p/(1−p)) an example, ``(batch,)``, shaped like a loss: lower is better for the label.

    Args:
        logits: ``(batch, classes)``, at least two classes.
        y: ``(batch,)`` integer labels.
        reduction: only ``"none"`` has a meaning here.
    """
    assert reduction == "none"
    at_label = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], float("-inf"))
    return torch.logsumexp(others, 1) - at_label


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
