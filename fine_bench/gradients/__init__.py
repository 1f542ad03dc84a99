"""Per-example gradients, written once for the callback and for every method."""

from fine_bench.gradients.engine import GradientEngine, one_minus_probability
from fine_bench.gradients.layers import register_norm
from fine_bench.gradients.per_example import (
    DenseBlock,
    Direction,
    FactorBlock,
    PerExampleGradients,
    TokenBlock,
)
from fine_bench.gradients.recorder import LayerRecorder

__all__ = [
    "DenseBlock",
    "Direction",
    "FactorBlock",
    "GradientEngine",
    "LayerRecorder",
    "PerExampleGradients",
    "TokenBlock",
    "one_minus_probability",
    "register_norm",
]
