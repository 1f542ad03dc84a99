"""Whether a batch's loss is the mean over its examples, or their sum.

A sum gives gradients that are m times too large. Under cross-entropy of hard labels the gradient
at the logits tells, whatever the loss comes to:

    G = c (p − onehot(y)),    c = ⟨G, E⟩ / ⟨E, E⟩,    E = p − onehot(y),

with c = 1/m of a mean and c = 1 of a sum. Otherwise the loss is compared with those of its
examples. Dropout is on there where the training has it on, since a fitted model's loss with
dropout may be many times that without; and where a loss weighs its examples, its own mean over
the batch is what a mean is: weights that add up to one over m classes make Σ w ℓ / Σ w as large as
Σ (w ℓ) is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fine_bench.gradients.engine import per_example_loss
from fine_bench.types import Loss, UnsupportedProblemError

LOOSE = 1e-2
"""By how much, relatively, c may miss 1 or 1/m, and G its form."""


def cross_entropy_factor(logits: Tensor, grad: Tensor) -> float | None:
    """c of the module's text, of the gradient at the logits; both ``(m, classes)``.

    Returns:
        None where the gradient is of another form, or too small for its form to be seen.
    """
    if grad.ndim != 2 or logits.shape != grad.shape or grad.shape[1] < 2:
        return None
    g = grad.double()
    # of p − onehot(y) only the label's entry is negative
    label = g.argmin(1, keepdim=True)
    e = torch.softmax(logits.double(), 1)
    e = e.scatter_add(1, label, torch.full_like(e[:, :1], -1.0))
    square, product = float(e.square().sum()), float((g * e).sum())
    if not 0.0 < product < float("inf") or not square > 0.0:
        return None
    c = product / square
    loose = max(LOOSE, 4 * torch.finfo(grad.dtype).eps)
    return c if float((g - c * e).norm()) <= loose * float(g.norm()) else None


def is_sum(factor: float | None, m: int) -> bool | None:
    """Whether a loss is the sum over m examples; None where its gradient does not tell.

    Args:
        factor: c.
        m: ≥ 1.
    """
    if factor is None or m < 2:
        return None
    if abs(factor * m - 1.0) < LOOSE:
        return False
    return True if abs(factor - 1.0) < LOOSE else None


@dataclass(frozen=True)
class ExpectedLoss:
    """What a batch's loss should come to.

    Attributes:
        m: number of examples.
        mean: of the examples' own losses.
        own: the loss's own mean over the batch; that of the examples where it has none.
        random: whether dropout takes part, so that the training's pass may come to something else.
    """

    m: int
    mean: float
    own: float
    random: bool

    @classmethod
    def of(cls, loss: Loss, outputs: Tensor, y: Tensor, *, random: bool) -> ExpectedLoss:
        """That of a batch's outputs.

        Raises:
            UnsupportedProblemError, TypeError: see ``per_example_loss``.
        """
        mean = float(per_example_loss(loss, outputs, y).double().mean())
        try:
            found = loss(outputs, y, reduction="mean")
            own = float(found) if isinstance(found, Tensor) and found.numel() == 1 else mean
        except Exception:  # the contract asks for reduction="none" alone
            own = mean
        return cls(len(y), mean, own, random)

    def compare(self, loss: float, *, stated: bool, told: bool | None) -> None:
        """Compare the training's loss with it.

        Args:
            loss: of the batch.
            stated: whether somebody says what the loss is; otherwise it may be another one.
            told: what the gradient says of it; see ``is_sum``.

        Raises:
            UnsupportedProblemError: a sum over examples.
        """
        if self.m < 3:
            return
        close = any(
            abs(loss - value) <= 1e-2 * (abs(value) + 1e-3) for value in (self.mean, self.own)
        )
        if told is None and not close and self._as_large_as_a_sum(loss, stated):
            refuse_sum(loss, self.m, self.mean)
        if stated and not self.random and not close:
            warnings.warn(
                f"the training loss of the first step is {loss:.6g}, but the mean of its examples' "
                f"losses is {self.mean:.6g}: the run minimises something else (a weighted mean, a "
                "penalty, another loss) than forward=…, loss=… or the adapter say. Scores are "
                "those of the gradients that the run has; weight decay belongs in the optimiser",
                stacklevel=4,
            )

    def _as_large_as_a_sum(self, loss: float, stated: bool) -> bool:
        if abs(self.mean) <= 1e-6:
            return False
        # where nobody says what the loss is, another one may be as large by chance
        low, high = (0.5, 2.0) if stated or self.random else (0.98, 1.02)
        # dropout may be drawn anew: nearer to the sum than to the mean
        root = self.m**0.5
        nearer = loss / self.mean > root and (self.own <= 0.0 or loss / self.own > root)
        return nearer and low < loss / (self.m * self.mean) < high


def refuse_sum(loss: float, m: int, mean: float) -> None:
    """Refuse a loss that is the sum of a batch's losses.

    Raises:
        UnsupportedProblemError: always.
    """
    raise UnsupportedProblemError(
        f"the training loss of the first step, {loss:.6g}, is the sum of the losses of the batch's "
        f"{m} examples, whose mean is {mean:.6g}; f-INE needs the mean: return it from "
        "training_step and raise the step size in proportion"
    )


def dropouts(module: nn.Module) -> list[nn.Module]:
    """The layers that draw random numbers in their present mode."""
    return [
        part
        for part in module.modules()
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 and part.training
    ]


__all__ = [
    "ExpectedLoss",
    "cross_entropy_factor",
    "dropouts",
    "is_sum",
    "refuse_sum",
]
