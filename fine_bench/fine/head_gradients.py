"""The gradient at the output that the loss is taken of: 1 − p, labels, and the observable.

A model may have several heads, and end in a layer that takes no part in the loss: the one that ran
last says nothing. The outputs that the loss is made of are those with a gradient that lead to no
other such output. If there is one, and the gradient there is p − onehot(y), then the loss is the
softmax cross-entropy of hard labels, and 1 − p can be read off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fine_bench.fine.example_labels import ExampleLabels
from fine_bench.fine.loss_size import cross_entropy_factor, is_sum
from fine_bench.fine.observable import chosen, refuse_several_ends
from fine_bench.fine.options import Options
from fine_bench.fine.training_data import implied_labels, refuse_other_losses
from fine_bench.gradients.recorded_call import Call
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import UnsupportedProblemError


class HeadGradients:
    """Reads the head's gradients in every pass, and looks at them in one pass an epoch.

    Args:
        options: what to measure.
        labels: of the examples, as far as they were seen.

    Attributes:
        options: the same with the observable, once the first look has chosen it.
        ends_of_loss: names of the layers of whose outputs the loss is made, as far as somebody has
            looked at its graph: it knows of terms that lead through layers further up.
    """

    def __init__(self, options: Options, labels: ExampleLabels) -> None:
        self.options = options
        self.labels = labels
        self.ends_of_loss: Sequence[str] = ()
        self._checked_epoch = -1
        self._name: str | None = None  # the head's

    def looks(self, epoch: int) -> bool:
        """Whether the epoch's pass is still to be looked at."""
        return epoch != self._checked_epoch

    def look(
        self, recorder: LayerRecorder, epoch: int, scale: float, labels: Tensor | None
    ) -> Tensor | None:
        """The head's gradient ``(m, classes)`` as the pass has it; None where nobody needs it.

        Args:
            recorder: of the pass, whose gradients are there.
            epoch: number of the epoch.
            scale: what makes the gradient that of each example's own loss.
            labels: of the batch, ``(m,)``, to be compared with those that the gradient tells.

        Raises:
            UnsupportedProblemError: 1 − p is asked for and cannot be read off.
            ValueError: the loss was taken of the labels in another order.
        """
        looks = self.looks(epoch)
        if not looks and not self.options.needs_complement:
            return None
        head, ends = recorder.last_call, []
        known = head is not None and head.name == self._name and not head.again
        if not looks and known and head is not None and head.grad is not None:
            return plain_gradient(head)  # nearly every step
        # of what a checkpoint runs again the graph tells nothing
        calls = [] if head is None or head.again else [c for c in recorder.calls if not c.again]
        if looks and recorder.keep_outputs:
            found = ends_of(calls)
            ends = [call.name for call in found]
            self._name = ends[-1] if ends else None
        named = [c for c in calls if c.name == self._name and c.grad is not None]
        head = named[-1] if named else head
        gradient = None
        if self.options.needs_complement:
            # what is not finite is no reason to refuse: such a step is left out and reported
            fits = is_cross_entropy(head, scale) if looks else None
            if fits is not None:
                self._decide(head, scale, fits, ends if len(ends) > 1 else self.ends_of_loss)
        if self.options.needs_complement:
            gradient = self._gradient_of(head)
        if head is not None and looks:
            self._compare_order(head, epoch, scale, labels)
        return gradient

    def _gradient_of(self, head: Call | None) -> Tensor:
        """The head's gradient where 1 − p is needed.

        Raises:
            UnsupportedProblemError: there is none.
        """
        gradient = plain_gradient(head)
        if gradient is None:
            self._refuse_without_gradient()
        return gradient

    def _decide(self, head: Call | None, scale: float, fits: bool, ends: Sequence[str]) -> None:
        """Choose the observable, or refuse the one that was asked for.

        Args:
            head: its call.
            scale: as above.
            fits: whether the loss is the cross-entropy of its output.
            ends: names of the layers of whose outputs the loss is made.
        """
        several = len(ends) > 1
        if self.options.divides:
            refuse_sum(head, scale)
        if self.options.divides and self.options.observable is None:
            self.options = chosen(self.options, "margin" if fits and not several else "loss")
        if self.options.divides and several:
            refuse_several_ends(ends)
        if fits or not self.options.needs_complement:
            return
        plain = plain_gradient(head)
        if plain is None or head is None or head.grad is None or head.output is None:
            self._refuse_without_gradient()
        what = ('observable="margin"', 'observable="loss"')
        if not self.options.divides:
            what = ('step_weight="uncertainty"', 'step_weight="lr"')
        refuse_other_losses(head.output, plain * scale, *what, torch.finfo(head.grad.dtype).eps)

    def _refuse_without_gradient(self) -> NoReturn:
        """Refuse 1 − p where no gradient tells it.

        Raises:
            UnsupportedProblemError: always.
        """
        raise UnsupportedProblemError(
            "1 − p is read off the gradient at the output of the last layer, and this pass has "
            "none there, or the model has no layer of a known kind; use "
            'observable="loss" and step_weight="lr"'
        )

    def _compare_order(self, head: Call, epoch: int, scale: float, labels: Tensor | None) -> None:
        """Compare, once an epoch, the labels of the loss with those of the batch."""
        grad = plain_gradient(head)
        if grad is None or head.output is None or head.grad is None:
            return
        if not bool(torch.isfinite(grad).all()):
            return  # look again at the next batch
        self._checked_epoch = epoch
        if labels is not None and len(grad) == len(labels):
            eps = torch.finfo(head.grad.dtype).eps
            told = implied_labels(head.output, grad * scale, eps)
            if told is not None:
                self.labels.compare(labels, told)


def ends_of(calls: Sequence[Call]) -> list[Call]:
    """Calls with a gradient whose outputs lead to no other one with a gradient."""
    # of calls with one output (a weight and its bias that are heard apart) the last one stands
    trained = {
        call.edge.node: call for call in calls if call.edge is not None and _has_gradient(call)
    }
    inner, seen = set(), set()
    for end in reversed(trained):
        if end in inner:
            continue  # what leads to it leads to the one that it leads to
        waiting = [node for node, _ in end.next_functions if node is not None]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in trained:
                inner.add(node)
            waiting += [before for before, _ in node.next_functions if before is not None]
    return [call for node, call in trained.items() if node not in inner]


def _has_gradient(call: Call) -> bool:
    return call.grad is not None or call.reduced is not None


def plain_gradient(call: Call | None) -> Tensor | None:
    """The gradient at a call's output as it came, in float32 at least; None if there is none."""
    grad = None if call is None else call.grad
    if grad is None:
        return None
    return grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad


def is_cross_entropy(call: Call | None, scale: float) -> bool | None:
    """Whether the gradient at a call's output is that of the cross-entropy of hard labels there.

    Args:
        call: with its output.
        scale: what makes the gradient that of each example's own loss.

    Returns:
        None where gradients are not finite, so that nothing can be said.
    """
    grad = plain_gradient(call)
    if call is None or grad is None or call.output is None or call.grad is None:
        return False
    if not bool(torch.isfinite(grad).all()):
        return None
    eps = torch.finfo(call.grad.dtype).eps
    return implied_labels(call.output, grad * scale, eps) is not None


def refuse_sum(call: Call | None, scale: float) -> None:
    """Refuse a loss that is the sum of a batch's cross-entropies.

    Args:
        call: with its output.
        scale: what makes the gradient of a mean that of each example's own loss.

    Raises:
        UnsupportedProblemError: it is.
    """
    grad = plain_gradient(call)
    if call is None or grad is None or call.output is None or call.grad is None:
        return
    # of fitted examples all gradients are nearly 0, and of any form within a fixed tolerance
    factor, m = cross_entropy_factor(call.output, call.grad), len(grad)
    if factor is not None and is_sum(factor * scale / m, m):
        raise UnsupportedProblemError(
            "the training loss is the sum of the cross-entropies of a batch's examples; f-INE "
            "needs the mean: return it from training_step and raise the step size in proportion"
        )


__all__ = ["HeadGradients", "ends_of", "is_cross_entropy", "plain_gradient"]
