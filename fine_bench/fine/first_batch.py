"""What f-INE takes for granted of a run, checked on its first batch.

*An example's output is its own.* Half a batch must give the outputs that its examples have in the
whole batch. Passes of a ``GradientEngine`` check that by themselves; where the training's own pass
is all there is, nobody else looks.

*The loss is a mean over examples.* A sum gives gradients that are m times too large.

Both look through a pass beside the training, in evaluation mode and without gradients, so they
cost a few forward passes a run and see what the model's ``forward`` shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fine_bench.fine.batch_adapter import to_model
from fine_bench.fine.passes import Aside
from fine_bench.fine.training_data import TrainingData
from fine_bench.gradients.engine import per_example_loss
from fine_bench.types import Loss, UnsupportedProblemError


class FirstBatch:
    """Looks at the first batch of a run.

    Args:
        module: the model.
        data: the training data; reads batches.
        forward: ``forward(x)`` of the callback's passes.
        loss: of these passes.
        aside: see ``passes.Aside``.
        stated: whether the user says what the loss is, or passes depend on it; otherwise it may be
            another one than the passes' own.
    """

    def __init__(
        self,
        module: nn.Module,
        data: TrainingData,
        forward: Callable[[Any], Any],
        loss: Loss,
        aside: Aside,
        *,
        stated: bool,
    ) -> None:
        self.module = module
        self.data = data
        self.forward = forward
        self.loss = loss
        self.aside = aside
        self.stated = stated
        self.expected: float | None = None
        self.size = 0

    def starts(self, batch: Any) -> None:
        """Before the training's pass.

        Raises:
            UnsupportedProblemError: outputs depend on who else is in the batch.
        """
        buffers = {name: value.clone() for name, value in self.module.named_buffers()}
        try:
            with self.aside(), torch.no_grad():
                x, y = self.data.adapter.inputs(batch)
                x, y = to_model(x, self.data.device, self.data.dtype), y.to(self.data.device)
                whole = self.forward(x)
                half = len(y) // 2
                part = self.forward(tree_map(lambda t: _first(t, half), x)) if half else None
        except Exception as error:
            warnings.warn(
                "f-INE could not look whether the examples of a batch mix, or whether the loss is "
                f"a mean over them, since the model cannot be asked by itself ({error}); tell "
                "how by forward=…, loss=… or adapter=BatchAdapter(…)",
                stacklevel=2,
            )
            return
        finally:
            for name, value in self.module.named_buffers():
                value.copy_(buffers[name])
        if half:
            self._compare(whole, part, len(y), half)
        self.size = len(y)
        try:
            self.expected = float(per_example_loss(self.loss, whole, y).double().mean())
        except Exception:
            if self.stated:
                raise

    @staticmethod
    def _compare(whole: Any, part: Any, m: int, half: int) -> None:
        for a, b in zip(tree_leaves(whole), tree_leaves(part), strict=True):
            if not isinstance(a, Tensor) or a.ndim == 0 or len(a) != m or len(b) != half:
                continue
            if not a.is_floating_point():
                continue
            if a.shape[1:] != b.shape[1:]:  # sequences cut to the longest of their batch
                continue
            a, b = a[:half].double(), b.double()
            eps = torch.finfo(whole.dtype if isinstance(whole, Tensor) else torch.float32).eps
            wrong = (a - b).abs() > eps**0.5 * (1.0 + a.abs())
            if bool(wrong.any()):
                raise UnsupportedProblemError(
                    "the model's output for an example depends on who else is in its batch (before "
                    "the first step, half of the first batch alone gives other outputs: they "
                    f"differ by up to {float((a - b).abs().max()):.3g}), so one example has no "
                    "gradient of its own; replace what mixes examples (statistics or attention "
                    "over the batch), for instance by torch.nn.LayerNorm or torch.nn.GroupNorm"
                )

    def ends(self, loss: float) -> None:
        """After the training's pass.

        Args:
            loss: what ``training_step`` returned.

        Raises:
            UnsupportedProblemError: a sum over examples.
        """
        expected, m = self.expected, self.size
        if expected is None or m < 3:
            return
        if abs(expected) > 1e-6 and 0.5 < loss / (m * expected) < 2.0:
            raise UnsupportedProblemError(
                f"the training loss of the first step, {loss:.6g}, is the sum of the losses of the "
                f"batch's {m} examples, whose mean is {expected:.6g}; f-INE needs the mean: return "
                "it from training_step and raise the step size in proportion"
            )
        random = any(
            isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
            for part in self.module.modules()
        )
        close = abs(loss - expected) <= 1e-2 * (abs(expected) + 1e-3)
        if self.stated and not random and not close:
            warnings.warn(
                f"the training loss of the first step is {loss:.6g}, but the mean of its examples' "
                f"losses is {expected:.6g}: the run minimises something else (a weighted mean, a "
                "penalty, another loss) than forward=…, loss=… or the adapter say. Scores are "
                "those of the gradients that the run has; weight decay belongs in the optimiser",
                stacklevel=2,
            )


def _first(x: Any, count: int) -> Any:
    return x[:count] if isinstance(x, Tensor) else x
