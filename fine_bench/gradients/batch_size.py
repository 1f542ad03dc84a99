"""How many examples to take at a time: as many as the cache can serve.

A layer with many positions (a convolution) has far larger factors than its input, so a batch that
suits a multilayer perceptron makes a convolutional network wait for memory. Scores do not depend
on the batch size beyond rounding; their cost does.

Shapes: x holds examples first, y their labels.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fine_bench.gradients.engine import GradientEngine
from fine_bench.types import Loss, UnsupportedProblemError

BATCH_FLOATS = 2**22
"""Numbers that the gradient factors of one batch may take: 16 MiB in float32."""

SMALLEST = 16
"""A batch is not cut below this: each pass has a cost of its own."""


def suitable_batch_size(model: nn.Module, loss: Loss, x: Any, y: Tensor, most: int) -> int:
    """Examples whose gradient factors take about ``BATCH_FLOATS`` numbers, at most ``most``.

    Measured on the first two examples. On an accelerator, and for models without per-example
    gradients, the answer is ``most``: the rule is about a processor's cache.

    Args:
        model: the network; it is copied, nothing in it is touched.
        loss: ``loss(logits, y, reduction="none") -> (batch,)``.
        x, y: training examples, at least one.
        most: upper limit, ≥ 1.
    """
    if y.device.type != "cpu" or any(p.device.type != "cpu" for p in model.parameters()):
        return most
    engine = None
    try:
        engine = GradientEngine(copy.deepcopy(model).eval(), loss)
        gradients = engine(x[:2], y[:2])
    except UnsupportedProblemError:
        return most
    finally:
        if engine is not None:
            engine.close()
    parts = [part for block in gradients.blocks for part in block.tensors]
    floats = sum(part.numel() for part in parts if part.is_floating_point())
    return min(most, max(SMALLEST, BATCH_FLOATS * len(gradients) // max(floats, 1)))
