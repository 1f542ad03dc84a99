"""The loop of Transformers' Trainer, watched: what a batch's loss was divided by is read off it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fine_bench.fine.first_batch import FirstBatch
from fine_bench.fine.loop import WatchedLoop
from fine_bench.fine.loop_batch import AnnouncedBatch
from fine_bench.fine.options import Options
from fine_bench.llm.trainer_losses import divisor
from fine_bench.types import UnsupportedProblemError

PLACES = 8
"""Tokens of a sequence whose logits are compared when a batch is asked in halves."""


class TrainerLoop(WatchedLoop):
    """See ``WatchedLoop``; a batch is announced with the labels that its loss is of.

    Args:
        model, options: as there; the options' loss is that of the training, summed over an
            example's labels.
        low_precision: whether the model's pass is in 16 bit.
        named: the further arguments of ``WatchedLoop``.
    """

    def __init__(
        self, model: nn.Module, options: Options, *, low_precision: bool, **named: Any
    ) -> None:
        super().__init__(model, options, **named)
        self._low_precision = low_precision
        self._labels: Tensor | None = None
        self._logits: Tensor | None = None
        self._grad: Tensor | None = None
        self._thorough = -1  # the epoch in which the form of the gradient was looked at
        self._handles.append(model.register_forward_hook(self._forward_ends))

    def labelled_batch(self, index: Tensor, labels: Tensor) -> None:
        """Say who is in the next batch; see ``batch``.

        Args:
            index: positions ``(batch,)``.
            labels: ``(batch, …)``.
        """
        self.batch(index, labels)  # takes in the one before
        self._labels, self._logits, self._grad = labels, None, None

    def _forward(self, inputs: tuple[Any, Any]) -> Tensor:
        logits = logits_of(super()._forward(inputs))
        if logits.ndim == 3:  # of a few tokens: logits are the largest tensors of a pass
            logits = logits[:, :: max(1, logits.shape[1] // PLACES)]
        return logits.bfloat16() if self._low_precision else logits

    def _forward_ends(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._work.on or self._announced is None or not torch.is_grad_enabled():
            return
        logits = logits_of(output)
        self._logits = logits.detach()
        if not logits.requires_grad:
            return
        node, place = logits.grad_fn, logits.output_nr
        if node is not None and type(node).__name__.startswith("ToCopyBackward"):
            # accelerate hands out a copy in float32, and the loss is taken of what it is a copy of
            node, place = node.next_functions[0]
        if node is None:
            return

        def keep(grads: Any) -> None:
            self._grad = None if grads[place] is None else grads[place].detach()

        node.register_prehook(keep)

    def _first_batch(self, *, known: bool) -> FirstBatch:
        return super()._first_batch(known=False)  # the loss is looked at by its gradient

    def _refuse_unknown_loss(self) -> None:
        """The gradient at the logits shows what the loss is."""

    def _divided_by(self, announced: AnnouncedBatch, scale: float) -> float:
        """D/m: the mean of the m examples' losses, over which number."""
        logits, grad, labels = self._logits, self._grad, self._labels
        self._logits = self._grad = None
        if logits is None or grad is None or labels is None:
            raise UnsupportedProblemError(
                "f-INE reads off the gradient at the model's logits by what the Trainer divides "
                "its loss, and no gradient came there: the model must return logits that the loss "
                "is taken of (use_liger_kernel=True takes it of something else), and batches need "
                "labels"
            )
        thorough = self._thorough != self.epoch
        loss: Callable[..., Tensor] = self.options.loss
        found = divisor(loss, logits, grad, labels, scale=scale, thorough=thorough)
        if found is None:  # nothing is labelled, or the step is left out anyway
            return float(self.accumulate)
        self._thorough = self.epoch
        return found / len(announced.index)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output.

    Raises:
        UnsupportedProblemError: it has none.
    """
    logits = output.get("logits") if hasattr(output, "get") else None
    if logits is None:
        logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        found = [part for part in tree_leaves(output) if isinstance(part, Tensor) and part.ndim > 1]
        logits = found[0] if found else None
    if not isinstance(logits, Tensor):
        raise UnsupportedProblemError(
            f"the model returns a {type(output).__name__} without logits, which f-INE needs; use a "
            "model that returns them (not use_liger_kernel=True)"
        )
    return logits


__all__ = ["TrainerLoop", "logits_of"]
