"""Per-example gradients, written once for the callback and for every method."""

from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.layers import register_norm
from fine_bench.gradients.margin import one_minus_probability
from fine_bench.gradients.per_example import PerExampleGradients
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
