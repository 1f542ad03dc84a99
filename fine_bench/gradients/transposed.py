"""Linear maps whose weight is stored the other way round, y = x W + bias, as in GPT-2.

``transformers.pytorch_utils.Conv1D`` keeps W as (I, O). The gradient of one example is then

    ∂ℓ_i/∂W = Σ_t a_it b_itᵀ,    ∂ℓ_i/∂bias = Σ_t b_it:

factors in each other's place, and a bias that is a block of its own.

Shapes: B examples, T positions, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.layers import LayerKind


class TransposedBlock(FactorBlock):
    """Gradients of W (I, O): ``a`` are the gradients at the output, ``b`` the inputs."""

    @property
    def values(self) -> Tensor:
        """The gradients at the output."""
        return self.a

    def with_tensors(self, *tensors: Tensor) -> TransposedBlock:
        """Other gradients of the same weight, from their ``tensors``."""
        a, b = tensors
        return TransposedBlock(self.name, a, b, self.weight, self.bias)

    def scaled(self, factor: Tensor) -> TransposedBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return self.with_tensors(self.a * factor[:, None, None], self.b)

    def rows(self, which: slice | Tensor) -> TransposedBlock:
        """The gradients of some of the examples."""
        return self.with_tensors(self.a[which], self.b[which])


class TransposedKind(LayerKind):
    """Weight or bias of such a map.

    Args:
        part: ``"weight"`` or ``"bias"``.
    """

    def __init__(self, part: str) -> None:
        self.part = part

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        """As a linear layer's."""
        return range(x.ndim - 1)

    def features(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``(B, T, I)``; of one number where the bias does not need them."""
        x = self.positions(layer, x)
        return x if self.part == "weight" else x[:, :, :1]

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        """``(B, T, O)``."""
        return grad.unsqueeze(1) if grad.ndim == 2 else grad.flatten(1, -2)

    def block_of(self, name: str, layer: nn.Module, a: Tensor, b: Tensor) -> Block:
        """See ``LayerKind``."""
        if self.part == "weight":
            return TransposedBlock(name, b, a, True, False)
        return FactorBlock(name, a, b, False, True)


def transposed_parts(
    name: str, module: nn.Module
) -> Sequence[tuple[str, TransposedKind, dict[str, nn.Parameter]]]:
    """The blocks of such a map: name, kind and trained parameters; none for other modules.

    It is known by its class's name and its shapes, for nothing here needs Transformers.

    Args:
        name: of the module in its model.
        module: any.
    """
    weight, bias = (module._parameters.get(part) for part in ("weight", "bias"))
    if type(module).__name__ != "Conv1D" or weight is None or bias is None:
        return []
    if getattr(module, "nf", None) != len(bias) or tuple(weight.shape[1:]) != tuple(bias.shape):
        return []
    prefix = f"{name}." if name else ""
    parts = [(name, "weight", weight), (f"{prefix}bias", "bias", bias)]
    return [
        (block, TransposedKind(part), {f"{prefix}{part}": p})
        for block, part, p in parts
        if p.requires_grad
    ]
