"""Which of several backward passes through a batch is the training's own.

A loop may take other gradients through the same forward pass, or through a further one, with
``torch.autograd.grad``: for an adversarial example, a saliency map, the norm of a gradient. The
layers' hooks hear those too. The training's own pass is the one whose gradients arrive at the
parameters (``arrives``), or that begins when a Trainer says so (``begins``). Passes are told apart
by the number that PyTorch gives each of them; numbers rise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fine_bench.gradients.recorded_call import Call
from fine_bench.types import UnsupportedProblemError

Totals = dict[int, Tensor]
"""What came at a parameter, by the pass it came in."""


class TrainingPass:
    """Hears of the backward passes between two batches."""

    def __init__(self) -> None:
        self._own: set[int] = set()  # with checkpoints, a pass has further ones within it
        self._after = -1

    def starts(self) -> None:
        """A batch begins."""
        self._own, self._after = set(), -1

    def arrives(self) -> None:
        """A gradient arrives at a parameter."""
        self._own.add(torch._C._current_graph_task_id())

    def begins(self, calls: Sequence[Call]) -> None:
        """The training's own pass is the next one.

        Args:
            calls: so far.
        """
        self._after = max((call.task for call in calls), default=-1)

    def heard_before(self, call: Call) -> bool:
        """Whether a call has the training's gradient already; notes the pass if it has not.

        Raises:
            UnsupportedProblemError: nothing is left of the call but what another pass made of it.
        """
        now = torch._C._current_graph_task_id()
        if call.task in self._own or (call.reduced is not None and call.task == now):
            return True
        if call.reduced is not None:
            raise UnsupportedProblemError(
                f"gradients were taken through layer {call.name!r} before the backward pass of the "
                "batch (torch.autograd.grad), and with sketch=… a layer's input is let go of with "
                "the first of them; leave sketch out, or take them through a forward pass of "
                "their own"
            )
        call.task = now
        return False

    def of(self, calls: Sequence[Call]) -> Sequence[Call]:
        """The calls through which the training's own pass went.

        Calls that a checkpoint repeats come in passes within it, and stay.
        """
        found = [call for call in calls if call.again or self._is_own(call.task)]
        # none: all that is trained lies within checkpoints
        return found if any(not call.again for call in found) else calls

    def add(self, totals: dict[int, Totals], key: int, grad: Tensor) -> None:
        """Note a gradient that comes at a parameter.

        Args:
            totals: of all parameters.
            key: of this one.
            grad: is copied: until it is looked at, the user may clip or unscale it in place.
        """
        now, own = torch._C._current_graph_task_id(), totals.setdefault(key, {})
        # a checkpoint has a backward pass of its own, which brings its part by itself
        own[now] = own[now] + grad if now in own else grad.detach().clone()

    def total(self, totals: Totals | None, parameter: Tensor) -> Tensor:
        """The training's gradient of a parameter."""
        parts = [grad for task, grad in (totals or {}).items() if self._is_own(task)]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(parameter)

    def _is_own(self, task: int) -> bool:
        return task in self._own if self._own else task > self._after


__all__ = ["Totals", "TrainingPass"]
