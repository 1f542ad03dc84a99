"""One weight behind several layers: an embedding and the head of a language model, two embeddings.

The weight has one gradient, the sum over all its uses; ``blocks/tied.py`` has the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.blocks.tied import TiedBlock
from fine_bench.gradients.layers import Call, CallFeatures, LayerKind, kind_of
from fine_bench.gradients.reparametrised import reparametrised


class _Use(CallFeatures):
    """The features of a call, and of which layer it was."""

    def __init__(self, layer: nn.Module, kind: LayerKind, features: Any) -> None:
        super().__init__(features)
        self.layer = layer
        self.kind = kind


class _OneOf(LayerKind):
    """One of the layers that share a weight, as its own kind has it."""

    def __init__(self, kind: LayerKind) -> None:
        self.kind = kind
        self.advice = kind.advice

    def counts_positions(self, x: Tensor) -> bool:
        return self.kind.counts_positions(x)

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        return self.kind.dimensions(layer, x)

    def features(self, layer: nn.Module, x: Tensor) -> _Use:
        return _Use(layer, self.kind, self.kind.features(layer, x))

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        return self.kind.positions(layer, grad)

    def block_of(self, name: str, layer: nn.Module, a: Any, b: Tensor) -> Block:
        raise NotImplementedError("the block is that of all layers together")


class TiedKind(LayerKind):
    """Linear layers and embeddings that share their weight.

    Args:
        kinds: of the layers, by ``id``.
    """

    def __init__(self, kinds: dict[int, LayerKind]) -> None:
        self._kinds = kinds

    @classmethod
    def of_layers(cls, layers: Sequence[nn.Module], weight: nn.Parameter) -> TiedKind | None:
        """The kind of these layers together, or None where one of them has other gradients."""
        kinds = {}
        for layer in layers:
            kind = kind_of(layer)
            plain = (
                isinstance(layer, nn.Linear | nn.Embedding)
                and layer._parameters.get("weight") is weight
            )
            if kind is None or not plain or reparametrised(layer, kind) is not None:
                return None
            if kind.refusal(layer) is not None:
                return None
            kinds[id(layer)] = kind
        return cls(kinds)

    def at(self, layer: nn.Module) -> LayerKind:
        """The kind of one of the layers."""
        return _OneOf(self._kinds[id(layer)])

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        """See ``at``."""
        return self.at(layer).dimensions(layer, x)

    def features(self, layer: nn.Module, x: Tensor) -> Any:
        """See ``at``."""
        return self.at(layer).features(layer, x)

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        """See ``at``."""
        return self.at(layer).positions(layer, grad)

    def block(self, name: str, layer: nn.Module, calls: Sequence[Call]) -> Block:
        """The gradient of all uses."""
        by_layer: dict[int, list[Call]] = {}
        uses: dict[int, _Use] = {}
        for use, b in calls:
            uses[id(use.layer)] = use
            by_layer.setdefault(id(use.layer), []).append((use.features, b))
        parts: list[FactorBlock | TokenBlock] = []
        for key, found in by_layer.items():
            part = uses[key].kind.block(name, uses[key].layer, found)
            assert isinstance(part, FactorBlock | TokenBlock)
            parts.append(part.trained(True, False) if isinstance(part, FactorBlock) else part)
        return TiedBlock(name, tuple(parts))

    def block_of(self, name: str, layer: nn.Module, a: Any, b: Tensor) -> Block:
        """See ``block``."""
        return self.block(name, layer, [(a, b)])


class WithoutWeight(LayerKind):
    """What a linear layer trains beside its weight, which belongs to another block.

    Args:
        kind: of the layer.
    """

    def __init__(self, kind: LayerKind) -> None:
        self.kind = kind
        self.advice = kind.advice

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        """As the layer's kind says."""
        return self.kind.dimensions(layer, x)

    def features(self, layer: nn.Module, x: Tensor) -> Any:
        """As the layer's kind has them."""
        return self.kind.features(layer, x)

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        """As the layer's kind has them."""
        return self.kind.positions(layer, grad)

    def block_of(self, name: str, layer: nn.Module, a: Any, b: Tensor) -> Block:
        """The bias's gradient."""
        block = self.kind.block_of(name, layer, a, b)
        assert isinstance(block, FactorBlock)
        return block.trained(False, True)
