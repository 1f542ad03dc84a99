"""Products of one batch's curvature with many vectors, and each example's slope along them.

Of the mean loss L = (1/m) Σ_i ℓ_i of a batch, for K vectors c at once,

    into ← into + scale · H c,     H = ∇²L, or the Gauss–Newton matrix (1/m) Σ_i J_iᵀ (∇²_z ℓ_i) J_i
    slope_ki = ⟨c_k, ∇ℓ_i⟩

by differentiating the gradient along c (Pearlmutter, *Fast exact multiplication by the Hessian*,
Neural Computation 6(1), 1994). The forward half of that differentiates the examples' losses along
c, so the slopes come with the product. What does not depend on c is done once for the K vectors.

``DenseProducts`` is written out for fully connected networks: with weights W_l, inputs a_l,
pre-activations s_l, errors δ_l = ∂L/∂s_l and c = (V_l, u_l), all of them along c,

    forward     ṡ_l = V_l a_l + u_l + W_l ȧ_l,   ȧ_{l+1} = φ'(s_l) ṡ_l
    backward    δ̇_{l−1} = φ'(s) (W_lᵀ δ̇_l + V_lᵀ δ_l) + φ''(s) ṡ (W_lᵀ δ_l)
    product     of the weight δ̇_l a_lᵀ + δ_l ȧ_lᵀ,  of the bias δ̇_l

(Gauss–Newton: without the terms that hold δ itself.) In the first layer, where nearly all the
weights are, a product is two matrix products of all K vectors together, the second of which adds to
``into`` in place: no other array of K vectors is ever written. Everything else goes through
``torch.func`` in ``MappedProducts``.

Shapes: m examples, K vectors, parameters ``(*shape,)``, vectors ``(K, *shape)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from fine_bench.gradients.curvature.products import CHUNK, output_gradient
from fine_bench.types import Loss

Matrix: TypeAlias = Literal["hessian", "gauss_newton"]
MATRICES: tuple[Matrix, ...] = get_args(Matrix)

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU)


def is_dense(net: nn.Module, x: Tensor) -> bool:
    """Whether a network is one of fully connected layers on inputs like ``x (n, ...)``.

    That is ``Sequential(Flatten?, Linear, activation, …, Linear)`` with one activation throughout
    (ReLU, tanh or GELU); flat inputs need no Flatten.
    """
    # a subclass may compute something else
    if type(net) is not nn.Sequential:
        return False
    parts = list(net)
    if parts and type(parts[0]) is nn.Flatten:
        if repr(parts.pop(0)) != repr(nn.Flatten()):  # other dimensions than the usual ones
            return False
    elif x.ndim != 2:
        return False
    linear, between = parts[::2], parts[1::2]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        len(parts) % 2 == 1
        and all(type(part) is nn.Linear for part in linear)
        and all(type(part) in ACTIVATIONS for part in between)
        and len({repr(part).replace("inplace=True", "") for part in between}) <= 1
        and not any(getattr(part, hook) for part in net.modules() for hook in hooks)
        and all(parameter.requires_grad for parameter in net.parameters())
        and len({id(part.weight) for part in linear}) == len(linear)  # none is used twice
    )


def batch_products(model: nn.Module, loss: Loss, matrix: Matrix, x: Tensor) -> BatchProducts:
    """The fastest way for a model on inputs like ``x``."""
    kind = DenseProducts if is_dense(model, x) else MappedProducts
    return kind(model, loss, matrix)


class BatchProducts(ABC):
    """Products at parameters that are given by batch; see the module's text.

    Args:
        model: the network; its parameters' values are not read.
        loss: ``loss(logits, y, reduction="none") -> (batch,)``.
        matrix: which curvature.
    """

    def __init__(self, model: nn.Module, loss: Loss, matrix: Matrix) -> None:
        self.model, self.loss, self.matrix = model, loss, matrix
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]

    @abstractmethod
    def at(self, params: Sequence[Tensor], x: Tensor, y: Tensor) -> BatchProduct:
        """Prepare a batch at parameters in the order of ``names``."""

    def _bends(self, logits: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """u ↦ ∇²_z ℓ_i u_i for one vector u of the logits' shape."""

        def slope(z: Tensor) -> Tensor:
            return output_gradient(self.loss, z, y)

        def second_derivative(u: Tensor) -> Tensor:
            result: Tensor = jvp(slope, (logits,), (u,))[1]
            return result

        return second_derivative


class BatchProduct(ABC):
    """The products of one batch at one moment."""

    @abstractmethod
    def __call__(self, vectors: Sequence[Tensor], into: Sequence[Tensor], scale: float) -> Tensor:
        """Add ``scale · H c`` to ``into``, which may be ``vectors`` itself; slopes ``(K, m)``."""


class MappedProducts(BatchProducts):
    """Any network whose examples do not mix."""

    def at(self, params: Sequence[Tensor], x: Tensor, y: Tensor) -> BatchProduct:
        """See ``BatchProducts``."""
        return _Mapped(self, params, x, y)


class _Mapped(BatchProduct):
    def __init__(self, of: MappedProducts, params: Sequence[Tensor], x: Tensor, y: Tensor) -> None:
        fixed = {name: p.detach() for name, p in of.model.named_parameters()}
        names = of.names
        point = dict(zip(names, params, strict=True))

        def output(values: dict[str, Tensor]) -> Tensor:
            z: Tensor = functional_call(of.model, fixed | values, (x,))
            return z

        if of.matrix == "hessian":

            def mean(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                losses: Tensor = of.loss(output(values), y, reduction="none")
                return losses.mean(), losses

            def product(tangent: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
                result: tuple[dict[str, Tensor], Tensor]
                result = jvp(grad(mean, has_aux=True), (point,), (tangent,))[1]
                return result

        else:
            logits = output(point).detach()
            bends, slope = of._bends(logits, y), output_gradient(of.loss, logits, y)

            def product(tangent: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
                dz = jvp(output, (point,), (tangent,))[1]
                pulled: dict[str, Tensor] = vjp(output, point)[1](bends(dz) / len(y))[0]
                return pulled, (dz * slope).flatten(1).sum(1)

        self._names = names
        self._product = vmap(product, chunk_size=CHUNK)

    def __call__(self, vectors: Sequence[Tensor], into: Sequence[Tensor], scale: float) -> Tensor:
        """See ``BatchProduct``."""
        found, slopes = self._product(dict(zip(self._names, vectors, strict=True)))
        for name, target in zip(self._names, into, strict=True):
            target.add_(found[name].detach(), alpha=scale)
        result: Tensor = slopes.detach()
        return result


class DenseProducts(BatchProducts):
    """Fully connected networks (``is_dense``), written out."""

    def at(self, params: Sequence[Tensor], x: Tensor, y: Tensor) -> BatchProduct:
        """See ``BatchProducts``."""
        with torch.no_grad():
            return _Dense(self, params, x, y)


class _Dense(BatchProduct):
    def __init__(self, of: DenseProducts, params: Sequence[Tensor], x: Tensor, y: Tensor) -> None:
        parts = [part for part in of.model.modules() if isinstance(part, nn.Linear)]
        activation = next((p for p in of.model.modules() if isinstance(p, ACTIVATIONS)), None)
        self._places: list[tuple[int, int | None]] = []
        place = 0
        for part in parts:
            self._places.append((place, None if part.bias is None else place + 1))
            place += 1 if part.bias is None else 2
        self._m, self._full = len(x), of.matrix == "hessian"
        self._weights = [params[w] for w, _ in self._places]
        a, self._inputs = x.flatten(1), list[Tensor]()
        self._first, self._second = list[Tensor](), list[Tensor]()  # φ', φ'' of every activation
        for layer, (w, b) in enumerate(self._places):
            self._inputs.append(a)
            s = a @ params[w].T
            if b is not None:
                s = s + params[b]
            if layer + 1 < len(parts):
                assert activation is not None
                out, first, second = _derivatives(activation, s)
                self._first.append(first)
                self._second.append(second)
                a = out
        self._slope = output_gradient(of.loss, s, y)
        self._bends = of._bends(s, y)
        self._errors = [self._slope / self._m]  # δ_l
        self._carried = list[Tensor]()  # W_lᵀ δ_l
        for layer in range(len(parts) - 1, 0, -1):
            self._carried.insert(0, self._errors[0] @ self._weights[layer])
            self._errors.insert(0, self._carried[0] * self._first[layer - 1])

    @torch.no_grad()
    def __call__(self, vectors: Sequence[Tensor], into: Sequence[Tensor], scale: float) -> Tensor:
        """See ``BatchProduct``; intermediate arrays are ``(m, K, width)``."""
        m, k, last = self._m, len(vectors[0]), len(self._places) - 1
        along, bent = (
            list[Tensor](),
            list[Tensor](),
        )  # ȧ_l and ṡ_{l−1} of the layers above the first
        for layer, (w, b) in enumerate(self._places):
            v = vectors[w]
            s = (self._inputs[layer] @ v.reshape(-1, v.shape[2]).T).view(m, k, v.shape[1])
            if b is not None:
                s += vectors[b]
            if layer:
                s += along[-1] @ self._weights[layer].T
            if layer < last:
                bent.append(s)
                along.append(s * self._first[layer][:, None])
        slopes = (s * self._slope[:, None]).sum(2).T
        error = vmap(self._bends, in_dims=1, out_dims=1)(s) / m  # δ̇
        for layer in range(last, -1, -1):
            w, b = self._places[layer]
            below = None
            if layer:
                below = error @ self._weights[layer]
                if self._full:  # before the vectors of this layer may be overwritten
                    below += (self._errors[layer] @ vectors[w]).transpose(0, 1)
                below *= self._first[layer - 1][:, None]
                if self._full:
                    bend = self._second[layer - 1] * self._carried[layer - 1]
                    below += bent[layer - 1] * bend[:, None]
                if self._full:
                    width = along[layer - 1].shape[2]
                    more = self._errors[layer].T @ along[layer - 1].view(m, -1)
                    into[w].add_(more.view(-1, k, width).transpose(0, 1), alpha=scale)
            flat = into[w].view(-1, into[w].shape[2])
            flat.addmm_(error.reshape(m, -1).T, self._inputs[layer], alpha=scale)
            if b is not None:
                into[b].add_(error.sum(0), alpha=scale)
            if below is not None:
                error = below
        return slopes


def _derivatives(activation: nn.Module, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ(s), φ'(s) and φ''(s), element by element."""
    one = torch.ones_like(s)
    # inplace=True would overwrite what is differentiated
    function = nn.ReLU() if isinstance(activation, nn.ReLU) else activation

    def first(value: Tensor) -> Tensor:
        slope: Tensor = jvp(function, (value,), (one,))[1]
        return slope

    found = jvp(first, (s,), (one,))
    return function(s), found[0], found[1]
