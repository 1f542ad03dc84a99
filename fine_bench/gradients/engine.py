"""Per-example gradients of any model at its present parameters, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fine_bench.gradients.blocks import Block, DenseBlock, PerExampleGradients
from fine_bench.gradients.classification import negative_margin
from fine_bench.gradients.recorder import LayerRecorder, refuse_batch_coupling
from fine_bench.types import Loss, UnsupportedProblemError


class GradientEngine:
    """Gradients of each example's own loss: ``engine(x, y)``.

    Layers with factors (Linear, Conv2d) are read off one forward and one backward pass that stops
    at the layers' outputs, so no parameter gradient is formed and no ``.grad`` is touched. Other
    trained parameters go through ``torch.func`` (``vmap(grad)``), in full.

    Args:
        model: the network. Its mode is respected; put it in ``eval()`` to leave out dropout.
        loss: ``loss(logits, y, reduction="none") -> (batch,)``.
        layers: names of modules to differentiate; None for all trained parameters.
        forward: how to get logits from ``x``; calling the model by default.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        layers: Sequence[str] | None = None,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.forward: Callable[[Tensor], Tensor] = forward or model
        self.recorder = LayerRecorder(model, layers)

    def close(self) -> None:
        """Remove the hooks from the model."""
        self.recorder.close()

    def __call__(
        self, x: Tensor, y: Tensor, observable: Literal["loss", "margin"] = "loss"
    ) -> PerExampleGradients:
        """Gradients at the present parameters.

        Args:
            x, y: a batch, examples first.
            observable: ``"loss"`` gives g_i = ∇ℓ_i; ``"margin"`` gives ∇(−log(p/(1−p))), which is
                g_i/(1 − p_i) for softmax cross-entropy.
        """
        n = len(x)
        refuse_batch_coupling(self.model)
        recorder = self.recorder
        with torch.enable_grad():
            with recorder.exclusively():
                logits = self.forward(x)
            classes = logits.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
            if observable == "loss":
                losses = per_example_loss(self.loss, logits, y)
            elif classes:
                # differentiated itself: dividing the loss gradient by 1 − p would have lost the
                # digits that cancel in p − 1
                losses = negative_margin(logits, y)
            else:
                raise UnsupportedProblemError(
                    'observable="margin" needs class logits (batch, classes) and integer labels '
                    '(batch,); use observable="loss"'
                )
            calls = recorder.calls
            if calls:
                grads = torch.autograd.grad(losses.sum(), recorder.edges(), allow_unused=True)
                for call, value in zip(calls, grads, strict=True):
                    call.grad = value
        blocks: list[Block] = recorder.blocks(n) if recorder.layers else []
        recorder.clear()
        if recorder.leftover:
            loss = self.loss if observable == "loss" else negative_margin
            blocks.append(DenseBlock("other parameters", self._leftover(x, y, loss)))
        complement = one_minus_probability(logits.detach(), y) if classes else None
        return PerExampleGradients(blocks, losses.detach(), complement)

    def _leftover(self, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
        names = self.recorder.leftover
        params = dict(self.model.named_parameters())
        chosen = {name: params[name].detach() for name in names}

        def one(values: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
            logits = functional_call(self.model, values, (xi.unsqueeze(0),))
            value: Tensor = loss(logits, yi.unsqueeze(0), reduction="none")
            return value.sum()

        grads = vmap(grad(one), in_dims=(None, 0, 0))(chosen, x, y)
        return torch.cat([grads[name].flatten(1) for name in names], 1).detach()


def as_observable(
    gradients: PerExampleGradients, observable: Literal["loss", "margin"]
) -> PerExampleGradients:
    """Cross-entropy gradients that are at hand already, turned into those of the observable.

    Saves a second pass where both are needed. In float32 the quotient g/(1 − p) loses the digits
    that cancel in p − 1; where they matter, ask the engine for the margin itself.

    Raises:
        UnsupportedProblemError: ``"margin"`` where the model's output is not class logits.
    """
    if observable == "loss":
        return gradients
    if gradients.one_minus_p is None:
        raise UnsupportedProblemError(
            'observable="margin" needs class logits (batch, classes) and integer labels (batch,); '
            'use observable="loss"'
        )
    return gradients.scaled(inverse_or_zero(gradients.one_minus_p))


def inverse_or_zero(one_minus_p: Tensor) -> Tensor:
    """1/(1 − p), and 0 where 1 − p has underflowed.

    There the loss gradient has underflowed with it, and the observable's gradient is unknown in
    this precision: the example is left out instead of being given an infinite one.
    """
    tiny = torch.finfo(one_minus_p.dtype).tiny
    return torch.where(one_minus_p > tiny, 1.0 / one_minus_p.clamp_min(tiny), 0.0)


def one_minus_probability(logits: Tensor, y: Tensor) -> Tensor:
    """1 − p of the given label, ``(batch,)``, without cancellation.

    Computed as Σ_{k≠y} p_k in the log domain, so it keeps its relative precision where p rounds
    to one.
    """
    others = logits.scatter(1, y[:, None], float("-inf"))
    return torch.exp(torch.logsumexp(others, 1) - torch.logsumexp(logits, 1))


def per_example_loss(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """``loss(logits, y, reduction="none")``, checked to be one number an example."""
    try:
        losses: Tensor = loss(logits, y, reduction="none")
    except TypeError as error:
        raise TypeError(
            f'loss could not be called as loss(logits, y, reduction="none"): {error}; wrap it in a '
            "function of that signature"
        ) from error
    if losses.ndim != 1 or len(losses) != len(y):
        raise UnsupportedProblemError(
            f'loss(logits, y, reduction="none") must return one loss an example, ({len(y)},), got '
            f"shape {tuple(losses.shape)}"
        )
    return losses
