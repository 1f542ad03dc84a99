"""The losses that Transformers' models return, one number an example, and what divides them.

Transformers' Trainer minimises a sum over labels, divided by a number that depends on the model,
on the window of accumulated batches and on the version: the labels of the whole window
(``num_items_in_batch``), those of the micro-batch, with or without the number of micro-batches. So
nothing is taken for granted: an example's own loss is the sum over its labels,

    ℓ_i = Σ_t −log p(y_it),

and the divisor D of a backward pass, in which the loss is Σ_i ℓ_i / D, is read off the gradient
G at the logits,

    1/D = ⟨G, E⟩ / ⟨E, E⟩,   E = ∂(Σ_i ℓ_i)/∂ logits,

at some of the labels; G = E/D there is what the loss must fulfil, and once an epoch at more of
them, and G = 0 where no label is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.gradients.token_losses import IGNORED
from fine_bench.types import UnsupportedProblemError

FEW, MANY = 16, 256
"""Labels at which the divisor is read, and labels at which the form is looked at."""

LOOSE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""By how much, relatively, a gradient may miss its form: rounding of the pass. In other precisions
1e-3; models take losses in float32, whatever they compute in."""


@dataclass(frozen=True)
class ModelLoss:
    """The loss of each example, ``loss(logits, y, reduction) -> (B,)``.

    Attributes:
        shifts: whether the logits at t predict the label at t + 1 (causal language models).
        smoothing: ``label_smoothing_factor`` of the Trainer.
    """

    shifts: bool = False
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
        """The sum over an example's labels; for numbers as labels, the mean over its outputs."""
        rows, labels = self.aligned(logits, y)
        if not y.is_floating_point():
            each = F.cross_entropy(
                rows.flatten(0, -2),
                labels.flatten(),
                reduction="none",
                ignore_index=IGNORED,
                label_smoothing=self.smoothing,
            )
            losses = each.view(len(y), -1).sum(1)
        elif logits.shape == y.shape and y.ndim > 1 and y.shape[1] > 1 and _binary(y):
            losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)
        else:
            outputs = logits.reshape(len(y), -1)
            losses = F.mse_loss(outputs, y.reshape(len(y), -1), reduction="none").mean(1)
        return losses if reduction == "none" else getattr(losses, reduction)()

    def gradient(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The gradient of −log p of class labels at their logits, ``(k, classes)`` in float64."""
        wanted = F.one_hot(labels, logits.shape[1]).to(logits.device, torch.float64)
        wanted = wanted * (1.0 - self.smoothing) + self.smoothing / logits.shape[1]
        return torch.softmax(logits.double(), 1) - wanted

    def aligned(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the labels that they predict.

        Raises:
            UnsupportedProblemError: shapes that do not fit each other.
        """
        if self.shifts and y.ndim == 2:
            logits, y = logits[:, :-1], y[:, 1:]
        numbers = y.is_floating_point()
        if not numbers and logits.shape[:-1] != y.shape:
            raise UnsupportedProblemError(
                f"the model's logits {tuple(logits.shape)} and labels {tuple(y.shape)} are not "
                "those of a classifier or of a language model; say by loss=…, a function "
                "loss(logits, labels, reduction) -> (batch,), what an example's loss is"
            )
        return logits, y


def _binary(y: Tensor) -> bool:
    return bool(((y == 0) | (y == 1)).all())


def divisor(
    loss: Callable[..., Tensor],
    logits: Tensor,
    grad: Tensor,
    y: Tensor,
    *,
    scale: float,
    thorough: bool,
) -> float | None:
    """D of the module's text; None where the batch has no labels, or no finite gradient.

    Args:
        loss: of each example.
        logits: of the pass, ``(B, …)``.
        grad: the gradient there.
        y: labels.
        scale: what a gradient scaler multiplied the loss by.
        thorough: look at more labels, and at the places without any.

    Raises:
        UnsupportedProblemError: the gradient is not of that form.
    """
    kind = grad.dtype
    if isinstance(loss, ModelLoss) and not y.is_floating_point():
        z, labels = loss.aligned(logits, y)
        g, _ = loss.aligned(grad, y)
        # logits are the largest tensors of a pass: no copy of all of them
        there = (labels != IGNORED).nonzero()
        if not len(there):
            return None
        if thorough:
            _refuse_elsewhere(grad, loss, y)
        # where the label is least known the gradient says most
        at = there.unbind(1)
        surprise = g[(*at, labels[at])].abs()
        some = there[surprise.topk(min(FEW, len(there))).indices]
        if thorough:
            some = torch.cat([some, there[:: max(1, len(there) // MANY)]])
        at = some.unbind(1)
        g, expected = g[at], loss.gradient(z[at], labels[at])
    else:
        g, expected = grad, _gradient(loss, logits, y)
    g, expected = g.double(), expected.double()
    # all that is needed of them in three numbers: g = E/D exactly if ⟨G, E⟩² = ⟨G, G⟩ ⟨E, E⟩
    both = torch.stack([g.flatten(), expected.flatten()])
    (own, product), (_, square) = (both @ both.T).tolist()
    if not math.isfinite(own):
        return None
    inverse = product / square if square > 0.0 else 0.0
    missing = max(0.0, own - product * inverse) ** 0.5
    # a probability near one is known to the rounding of float32 only
    rounding = 1e-6 * abs(inverse) * len(g) ** 0.5
    if inverse <= 0.0 or missing > LOOSE.get(kind, 1e-3) * own**0.5 + rounding:
        raise UnsupportedProblemError(
            "the loss that the Trainer minimises is not a sum of the examples' losses over some "
            "number: the gradient at the logits is of another form (a custom compute_loss or "
            "compute_loss_func, class weights, a penalty, a loss that mixes examples). Say by "
            "loss=…, a function loss(logits, labels, reduction) -> (batch,), what an example's "
            "loss is, if it has one"
        )
    return _whole(scale / inverse, kind)


def _gradient(loss: Callable[..., Tensor], logits: Tensor, y: Tensor) -> Tensor:
    """E of the module's text, for any loss."""
    wide = torch.float32 if logits.element_size() < 4 else logits.dtype
    with torch.enable_grad():
        z = logits.detach().to(wide).requires_grad_()
        (expected,) = torch.autograd.grad(loss(z, y, reduction="none").sum(), z)
    return expected


def _refuse_elsewhere(grad: Tensor, loss: ModelLoss, y: Tensor) -> None:
    """Refuse gradients at logits that predict no label."""
    z, labels = loss.aligned(grad, y)
    elsewhere = z[labels == IGNORED] if y.ndim == 2 else z[:0]
    if elsewhere.numel() and bool(elsewhere.any()):
        raise UnsupportedProblemError(
            "the loss that the Trainer minimises has gradients at logits that predict no label, "
            "so it is more than a sum over labels; say by loss=… what an example's loss is"
        )


def _whole(found: float, kind: torch.dtype) -> float:
    """Divisors are numbers of labels: rounding of the pass is taken away where it is plain."""
    nearest = round(found)
    return float(nearest) if abs(found - nearest) < min(0.1, 1e-4 * found) else found


__all__ = ["ModelLoss", "divisor"]
