"""Layers whose weight is computed from other parameters: weight and spectral normalisation.

Both of PyTorch's forms are known, ``torch.nn.utils.parametrizations`` and the older
``torch.nn.utils.weight_norm`` and ``spectral_norm``. ``blocks/reparametrised.py`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.blocks.reparametrised import (
    ReparametrisedBlock,
    SpectrallyNormalised,
    WeightMap,
    WeightNormalised,
)
from fine_bench.gradients.layers import Call, CallFeatures, LayerKind, is_trained


class _Seen(CallFeatures):
    """The features of a call, and what the weight was then."""

    def __init__(self, features: Any, made: WeightMap) -> None:
        super().__init__(features)
        self.map = made


class ReparametrisedKind(LayerKind):
    """A linear or convolution layer with such a weight.

    Args:
        kind: of the layer, were its weight a parameter.
        names: of the parameters behind the weight, below the layer's name.
        make: how the weight follows from them now.
        made: the same at the time of a call; None for a kind that has not been called.
    """

    def __init__(
        self,
        kind: LayerKind,
        names: Sequence[str],
        make: Callable[[], WeightMap],
        made: WeightMap | None = None,
    ) -> None:
        self.kind = kind
        self.names = names
        self.make = make
        self.made = made
        self.advice = kind.advice

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        """As the layer's kind says."""
        return self.kind.dimensions(layer, x)

    def parameters(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """Those behind the weight, by their name below the layer's."""
        named = dict(layer.named_parameters())
        return {name: named[name] for name in self.names}

    def at(self, layer: nn.Module) -> LayerKind:
        """The kind of a call: spectral normalisation moves its vectors from call to call."""
        with torch.no_grad():
            return ReparametrisedKind(self.kind, self.names, self.make, self.make())

    def features(self, layer: nn.Module, x: Tensor) -> _Seen:
        """As the layer's kind has them."""
        return _Seen(self.kind.features(layer, x), self.made or self.make())

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        """As the layer's kind has them."""
        return self.kind.positions(layer, grad)

    def block(self, name: str, layer: nn.Module, calls: Sequence[Call]) -> Block:
        """Several uses add up; in full where the weight changed between them."""
        first: WeightMap = calls[0][0].map
        if all(first.same(seen.map) for seen, _ in calls[1:]):
            plain = self.kind.block(name, layer, [(seen.features, b) for seen, b in calls])
            assert isinstance(plain, FactorBlock)
            return ReparametrisedBlock(name, plain.trained(True, is_trained(layer, "bias")), first)
        parts = [self.block(name, layer, [call]).dense() for call in calls]
        return DenseBlock(name, torch.stack(parts).sum(0))

    def block_of(self, name: str, layer: nn.Module, a: Any, b: Tensor) -> Block:
        """See ``block``."""
        return self.block(name, layer, [(a, b)])


def reparametrised(layer: nn.Module, kind: LayerKind) -> ReparametrisedKind | None:
    """What is known of a layer whose weight is computed, or None where that is nothing.

    None too where some of the parameters behind the weight are frozen, where the norm is taken
    along another dimension than the first, and for other computations.

    Args:
        layer: any.
        kind: of the layer, were its weight a parameter.
    """
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return None
    if getattr(layer, "groups", 1) != 1 or "weight" in layer._parameters:
        return None
    found = _parametrised(layer) or _hooked(layer)
    if found is None:
        return None
    names, make = found
    named: Mapping[str, nn.Parameter] = dict(layer.named_parameters())
    if not all(name in named and named[name].requires_grad for name in names):
        return None
    return ReparametrisedKind(kind, names, make)


_Found = tuple[list[str], Callable[[], WeightMap]]


def _parametrised(layer: nn.Module) -> _Found | None:
    """By ``torch.nn.utils.parametrizations``."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    made = getattr(layer.parametrizations, "weight")  # noqa: B009  (a module by that name)
    if len(made) != 1:
        return None
    how, prefix = made[0], "parametrizations.weight"
    if isinstance(how, parametrizations._WeightNorm) and how.dim in (0, -1):
        names = [f"{prefix}.original0", f"{prefix}.original1"]
        return names, lambda: _weight_normalised(made.original0, made.original1)
    if isinstance(how, parametrizations._SpectralNorm) and how.dim == 0:
        return [f"{prefix}.original"], lambda: _spectral(made.original, how._u, how._v)
    return None


def _hooked(layer: nn.Module) -> _Found | None:
    """By ``torch.nn.utils.weight_norm`` and ``spectral_norm``."""
    hooks = [h for h in layer._forward_pre_hooks.values() if getattr(h, "name", "") == "weight"]
    if len(hooks) != 1:
        return None
    (how,) = hooks
    if isinstance(how, WeightNorm) and how.dim in (0, -1):
        return ["weight_g", "weight_v"], lambda: _weight_normalised(layer.weight_g, layer.weight_v)
    if isinstance(how, SpectralNorm) and how.dim == 0:
        return ["weight_orig"], lambda: _spectral(layer.weight_orig, layer.weight_u, layer.weight_v)
    return None


def _weight_normalised(g: Any, v: Any) -> WeightMap:
    with torch.no_grad():
        return WeightNormalised(g.detach().reshape(-1, 1), v.detach().flatten(1))


def _spectral(v: Any, left: Any, right: Any) -> WeightMap:
    with torch.no_grad():
        return SpectrallyNormalised(v.detach().flatten(1), left.clone(), right.clone())
