"""Kinds of layers and how their per-example gradients follow from input and output gradient.

    Linear, Conv1d, Conv2d   Σ_t δ_t a_tᵀ, Σ_t δ_t    a_t an input vector, or a receptive field
    Embedding                Σ_t onehot(v_t) δ_tᵀ      nothing for the padding token
    LayerNorm, RMSNorm,      Σ_t δ_t ∘ x̂_t, Σ_t δ_t    x̂ the normalised input; what
    GroupNorm, BatchNorm                              ``register_norm`` adds is treated alike

δ_t is the gradient of the example's own loss at the output, t runs over the positions to which the
layer is applied (tokens, pixels, further calls of the same layer). Under batch normalisation in
training δ_t is that of the whole loss: see ``batch_norm.py``.

Shapes: B examples, T positions, I inputs, O outputs, C channels, V tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from math import prod
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.gradients.batch_norm import (
    by_batch_statistics,
    by_running_statistics,
    couples,
)
from fine_bench.gradients.blocks.convolution import FieldBlock, Fields
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.embedding import TokenBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.layout import FIRST
from fine_bench.types import UnsupportedProblemError

Normalise = Callable[[nn.Module, Tensor], Tensor]
"""``normalise(layer, x) -> x̂``, the layer's output before its weight and bias apply."""


Call: TypeAlias = tuple[Any, Tensor]
"""What one application of a layer leaves: its features and the gradient at its output."""


class CallFeatures:
    """The features of a call, with what else a kind has to know of it (a subclass says what)."""

    def __init__(self, features: Any) -> None:
        self.features = features

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the features."""
        found: torch.dtype = self.features.dtype
        return found

    def is_floating_point(self) -> bool:
        """Whether they have one."""
        return bool(self.features.is_floating_point())

    def to(self, dtype: torch.dtype) -> Self:
        """The same in another precision."""
        result = copy(self)
        result.features = self.features.to(dtype)
        return result


class LayerKind(ABC):
    """What is known of one kind of layer: how its blocks follow from what a pass holds.

    Attributes:
        advice: how its inputs get the examples as their first dimension, for an error message.
        layout: where its inputs have the examples as long as nobody has looked.
    """

    advice = ""
    layout = FIRST

    def of(self, layer: nn.Module) -> LayerKind:
        """The kind of this very layer, where its options matter."""
        return self

    def at(self, layer: nn.Module) -> LayerKind:
        """The kind of one call, where what the layer is may change from call to call."""
        return self

    def refusal(self, layer: nn.Module) -> str | None:
        """Why this layer cannot be trained in a per-example way at all, or None."""
        return None

    def counts_positions(self, x: Tensor) -> bool:
        """Whether the input of a training pass is positions that all examples share."""
        return False

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        """Dimensions of an input that could be the examples."""
        return range(1)

    @abstractmethod
    def features(self, layer: nn.Module, x: Tensor) -> Any:
        """What the gradient needs to know of an input, ``(B, T, ·)``, or ``(B, T)`` of tokens.

        A convolution may leave its receptive fields to be written when they are needed (``Fields``
        in the place of a tensor).

        Raises:
            UnsupportedProblemError: an input without a dimension for the examples.
        """

    @abstractmethod
    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        """The gradient at an output, ``(B, T, O)``."""

    def block(self, name: str, layer: nn.Module, calls: Sequence[Call]) -> Block:
        """Per-example gradients of the trained weight and bias.

        A layer used several times sums its gradients: its uses are further positions.

        Args:
            calls: at least one; features and output gradients of each use.
        """
        if len(calls) == 1:
            return self.block_of(name, layer, *calls[0])
        a, b = (torch.cat(parts, 1) for parts in zip(*calls, strict=True))
        return self.block_of(name, layer, a, b)

    @abstractmethod
    def block_of(self, name: str, layer: nn.Module, a: Tensor, b: Tensor) -> Block:
        """``block`` of all uses.

        Args:
            a: features of all calls, side by side along T.
            b: gradients at the outputs, alike.
        """


class _Linear(LayerKind):
    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        return range(x.ndim - 1)

    def features(self, layer: nn.Module, x: Tensor) -> Tensor:
        _require_dimensions(x, 2, "(batch, …, features)")
        return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        return grad.unsqueeze(1) if grad.ndim == 2 else grad.flatten(1, -2)

    def block_of(self, name: str, layer: nn.Module, a: Tensor, b: Tensor) -> Block:
        return FactorBlock(name, a, b, is_trained(layer, "weight"), is_trained(layer, "bias"))


class _Convolution(LayerKind):
    def of(self, layer: nn.Module) -> LayerKind:
        return _WINDOWS if Fields.serves(layer) else self

    def features(self, layer: nn.Module, x: Tensor) -> Any:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        n_dims = len(layer.kernel_size)
        _require_dimensions(x, n_dims + 2, "(batch, channels, …)", exactly=True)
        return self.fields(layer, x)

    def fields(self, layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Any:
        """The receptive fields of an input of the right dimensions."""
        return patches(layer, x).transpose(1, 2)

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        return grad.flatten(2).transpose(1, 2)

    def block_of(self, name: str, layer: nn.Module, a: Tensor, b: Tensor) -> Block:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        weight, bias = is_trained(layer, "weight"), is_trained(layer, "bias")
        if layer.groups == 1:
            return FactorBlock(name, a, b, weight, bias)
        # each group of outputs sees its own inputs: its weight gradient is small, so it is formed
        parts = []
        if weight:
            n, t, _ = a.shape
            inputs = a.reshape(n, t, layer.groups, -1)
            outputs = b.reshape(n, t, layer.groups, -1)
            parts.append(torch.einsum("ntgo,ntgi->ngoi", outputs, inputs).flatten(1))
        if bias:
            parts.append(b.sum(1))
        return DenseBlock(name, torch.cat(parts, 1))


class _Windows(_Convolution):
    """A convolution whose receptive fields are windows; see ``Fields.serves``."""

    def fields(self, layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Any:
        assert isinstance(layer, nn.Conv2d)
        return Fields(layer, x)

    def block(self, name: str, layer: nn.Module, calls: Sequence[Call]) -> Block:
        if len(calls) > 1 or isinstance(calls[0][0], Tensor):
            return super().block(name, layer, [(written(fields), b) for fields, b in calls])
        (fields, b), weight, bias = calls[0], is_trained(layer, "weight"), is_trained(layer, "bias")
        return FieldBlock(name, fields, b, weight, bias)


_WINDOWS = _Windows()


def written(fields: Any) -> Tensor:
    """Receptive fields, written if they are not."""
    return fields.full if isinstance(fields, Fields) else fields


class _Embedding(LayerKind):
    advice = (
        "; give positions that all examples share as (batch, positions), with "
        ".expand(batch, -1), and one token an example as (batch, 1)"
    )

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        return range(x.ndim)

    def counts_positions(self, x: Tensor) -> bool:
        # 0, 1, 2, … in a training pass are positions, not one token each
        if x.ndim != 1 or len(x) < 2:
            return False
        return torch.equal(x, torch.arange(len(x), device=x.device, dtype=x.dtype))

    def refusal(self, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.Embedding)
        if layer.max_norm is not None:
            return "max_norm changes its weights during the forward pass; use max_norm=None"
        if layer.scale_grad_by_freq:
            return (
                "scale_grad_by_freq divides gradients by how often a token occurs in the whole "
                "batch, so one example has none of its own; use scale_grad_by_freq=False"
            )
        if layer.sparse:
            return "sparse gradients are not supported; use sparse=False"
        return None

    def features(self, layer: nn.Module, x: Tensor) -> Tensor:
        _require_dimensions(x, 1, "(batch, …) of tokens")
        return x.flatten(1).long() if x.ndim > 1 else x[:, None].long()

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        return grad.unsqueeze(1) if grad.ndim == 2 else grad.flatten(1, -2)

    def block_of(self, name: str, layer: nn.Module, a: Tensor, b: Tensor) -> Block:
        assert isinstance(layer, nn.Embedding)
        if layer.padding_idx is not None:
            b = b.masked_fill((a == layer.padding_idx)[:, :, None], 0.0)
        return TokenBlock(name, a, b, layer.num_embeddings)


class _Norm(LayerKind):
    """An elementwise weight and bias behind something without parameters of its own.

    Args:
        normalise: x ↦ x̂.
        channels_first: the parameters belong to dimension 1 of the input; else to the last ones.
    """

    def __init__(self, normalise: Normalise, *, channels_first: bool = False) -> None:
        self.normalise = normalise
        self.channels_first = channels_first

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        return range(1 if self.channels_first else x.ndim - len(_affine_shape(layer)))

    def features(self, layer: nn.Module, x: Tensor) -> Tensor:
        shape = _affine_shape(layer)
        _require_dimensions(x, 1 + len(shape), "(batch, …)")
        normalised = self.normalise(layer, x)
        found = normalised.shape[1:2] if self.channels_first else normalised.shape[-len(shape) :]
        if found != shape or normalised.shape != x.shape:
            raise UnsupportedProblemError(
                f"{type(layer).__name__}: an input of shape {tuple(x.shape)} was normalised to "
                f"{tuple(normalised.shape)}, which does not end in the shape {tuple(shape)} of the "
                "layer's parameters; correct what was given to register_norm"
            )
        return self.positions(layer, normalised)

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        if self.channels_first:
            return grad.unsqueeze(1) if grad.ndim == 2 else grad.flatten(2).transpose(1, 2)
        return grad.reshape(len(grad), -1, prod(_affine_shape(layer)))

    def block_of(self, name: str, layer: nn.Module, a: Tensor, b: Tensor) -> Block:
        parts = []
        if is_trained(layer, "weight"):
            parts.append((a * b).sum(1))
        if is_trained(layer, "bias"):
            parts.append(b.sum(1))
        return DenseBlock(name, torch.cat(parts, 1))


def _layer_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)


def _rms_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.RMSNorm)
    return F.rms_norm(x, layer.normalized_shape, eps=layer.eps)


def _group_norm(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    return F.group_norm(x, layer.num_groups, eps=layer.eps)


class _BatchNorm(_Norm):
    """Normalises by what the pass normalised by, its batch or running statistics."""

    def at(self, layer: nn.Module) -> LayerKind:
        return _BY_BATCH if couples(layer) else self


_BATCH_NORM = _BatchNorm(by_running_statistics, channels_first=True)
_BY_BATCH = _Norm(by_batch_statistics, channels_first=True)

_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: _Linear(),
    nn.Conv1d: _Convolution(),
    nn.Conv2d: _Convolution(),
    nn.Embedding: _Embedding(),
    nn.LayerNorm: _Norm(_layer_norm),
    nn.RMSNorm: _Norm(_rms_norm),
    nn.GroupNorm: _Norm(_group_norm, channels_first=True),
    nn.modules.batchnorm._BatchNorm: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,  # has a forward of its own; see ``refuse_synchronised``
}


def register_norm(cls: type[nn.Module], normalise: Normalise) -> None:
    """Have gradients of a normalisation layer's weight and bias read off a pass.

    For layers of your own or of a library whose output is ``normalise(layer, x) * weight + bias``
    (or ``* (1 + weight)``), without a bias if there is none, such as the RMS norms of language
    models:

        def normalise(layer, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.variance_epsilon)

        register_norm(LlamaRMSNorm, normalise)

    Args:
        cls: the layer's class; subclasses with a ``forward`` of their own are not included.
        normalise: x ↦ x̂ of the same shape, ending in the shape of the parameters. It must not mix
            examples; x has no graph.

    Raises:
        TypeError: ``cls`` is not a class of modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(
            f"register_norm takes a class of modules, got {cls!r}; pass type(layer), not the layer"
        )
    register_layer(cls, _Norm(normalise))


def register_layer(cls: type[nn.Module], kind: LayerKind) -> None:
    """Have gradients of a class of layers read off a pass; see ``LayerKind``.

    Args:
        cls: the layer's class; subclasses with a ``forward`` of their own are not included.
        kind: how a block follows from input and output gradient.
    """
    _KINDS[cls] = kind


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind of a layer, or None where its gradients are left to ``torch.func``.

    A subclass that computes something else in ``forward`` is of no known kind.
    """
    for cls in type(layer).__mro__:
        if cls in _KINDS:
            return _KINDS[cls].of(layer) if type(layer).forward is cls.forward else None
    return None


def trained_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The layer's own trained weight and bias, in this order."""
    parts = {part: layer._parameters.get(part) for part in ("weight", "bias")}
    return {part: p for part, p in parts.items() if p is not None and p.requires_grad}


def is_trained(layer: nn.Module, part: str) -> bool:
    """Whether the layer's own weight or bias is trained."""
    p = layer._parameters.get(part)
    return p is not None and p.requires_grad


def patches(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Every receptive field of a convolution, ``(B, C · kernel, T)``.

    A strided view of the padded input, copied once, along rows of the image:
    ``torch.nn.functional.unfold`` and the order ``(B, T, C · kernel)`` cost several times as much
    on a CPU.
    """
    pad = conv._reversed_padding_repeated_twice
    if any(pad):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, pad, mode=mode)
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    s_n, s_c, *strides = x.stride()
    inside = [step * d for step, d in zip(strides, dilation, strict=True)]
    across = [step * s for step, s in zip(strides, stride, strict=True)]
    view = x.as_strided((*x.shape[:2], *kernel, *sizes), (s_n, s_c, *inside, *across))
    return view.reshape(len(x), x.shape[1] * prod(kernel), prod(sizes))


def _affine_shape(layer: nn.Module) -> torch.Size:
    for part in ("weight", "bias"):
        value = getattr(layer, part, None)
        if isinstance(value, Tensor):
            return value.shape
    raise AssertionError("a layer without parameters is not recorded")


def _require_dimensions(x: Tensor, count: int, what: str, *, exactly: bool = False) -> None:
    if x.ndim < count or (exactly and x.ndim != count):
        raise UnsupportedProblemError(
            f"it got one unbatched input of shape {tuple(x.shape)}; per-example gradients need "
            f"{what}"
        )
