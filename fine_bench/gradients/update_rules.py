"""Steps of SGD and Adam, and the same steps backwards.

A step t takes parameters θ and what the optimiser remembers, and the mean gradient g = ∇L_t(θ) of
its batch, to θ' . ``step`` does it as ``torch.optim`` does. ``reverse`` carries the derivatives of
any function of what comes after the step (its *adjoint*) to derivatives with respect to what was
before it. On the way it meets c = ∂f/∂g, and asks ``apply`` for H c, H = ∇²L_t(θ), which is also
where the derivative with respect to an example's weight is read off: ⟨c, ∇ℓ_i(θ)⟩/m.

SGD, momentum β, weight decay λ (a, b the adjoints of θ and of the velocity v):

    v' = β v + g + λ θ,   θ' = θ − η v'
    c = b' − η a',        a = a' + (H + λ) c,   b = β c

Adam (Kingma, Ba, arXiv:1412.6980) with m, v the running means of g and g² (n, s their adjoints),
m̂ = m'/(1 − β₁^t), v̂ = v'/(1 − β₂^t), D = √v̂ + ε:

    θ' = θ − η m̂ / D
    n ← n' − η a' / (D (1 − β₁^t)),   s ← s' + η a' m̂ / (2 D² √v̂ (1 − β₂^t))
    c = (1 − β₁) n + 2 (1 − β₂) s g,  a = a' + H c,   n = β₁ n,   s = β₂ s

Its weight decay adds λθ to g, so λ c to a; AdamW's (Loshchilov, Hutter, arXiv:1711.05101) shrinks θ
by 1 − ηλ, and a with it. Where v̂ = 0 no gradient has come yet, and the part by v̂ is 0.

Shapes: a parameter is ``(*shape,)``, an adjoint ``(K, *shape)``, K functions carried together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor]
Apply: TypeAlias = Callable[[Tensors, Tensors, float], None]
"""``apply(c, into, scale)``: ``into += scale · H c``; ``c`` and ``into`` may be the same."""

IGNORED = {
    "lr", "foreach", "fused", "capturable", "differentiable", "maximize", "nesterov", "dampening",
    "amsgrad", "decoupled_weight_decay",
}  # fmt: skip
"""Options that change no number, are given a step at a time, or are looked at one by one."""


@dataclass(frozen=True, eq=False)
class Moment:
    """A run just before a step, and what the step made of it.

    Attributes:
        params: θ.
        gradient: g with what weight decay adds to it.
        slots: what the optimiser remembers after the step, ``slots`` lists.
    """

    params: Tensors
    gradient: Tensors
    slots: list[Tensors]


class UpdateRule(ABC):
    """How an optimiser steps.

    Attributes:
        slots: lists of tensors that it remembers beside the parameters.
        reads_moments: whether ``reverse`` reads the gradient and what was remembered.
    """

    slots: int
    reads_moments: bool = False

    @abstractmethod
    def step(
        self, params: Tensors, slots: list[Tensors], gradient: Tensors, lr: float, t: int
    ) -> Tensors:
        """One step in place; t counts from 1. Returns the gradient with its weight decay."""

    @abstractmethod
    def reverse(
        self, adjoint: list[Tensors], moment: Moment, lr: float, t: int, apply: Apply
    ) -> None:
        """``adjoint``, of parameters and slots after the step, becomes that before it, in place."""


class SGD(UpdateRule):
    """``torch.optim.SGD``.

    Args:
        momentum: β, in [0, 1).
        weight_decay: λ, ≥ 0.
    """

    def __init__(self, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.slots = 1 if momentum else 0

    def step(
        self, params: Tensors, slots: list[Tensors], gradient: Tensors, lr: float, t: int
    ) -> Tensors:
        """v' = β v + g + λ θ, θ' = θ − η v'; v starts at 0."""
        del t
        gradient = _decayed(gradient, params, self.weight_decay)
        velocity = gradient
        if slots:
            velocity = slots[0]
            for v, g in zip(velocity, gradient, strict=True):
                v.mul_(self.momentum).add_(g)
        for p, v in zip(params, velocity, strict=True):
            p.add_(v, alpha=-lr)
        return gradient

    def reverse(
        self, adjoint: list[Tensors], moment: Moment, lr: float, t: int, apply: Apply
    ) -> None:
        """See the module's text."""
        del moment, t
        if not self.slots:
            # c = −η a: the product is added to a where it stands
            (a,) = adjoint
            keep = 1.0 - lr * self.weight_decay
            if keep > 0.0:
                _scale(a, keep)
                apply(a, a, -lr / keep)
                return
            c = [part * -lr for part in a]
            _scale(a, keep)
            apply(c, a, 1.0)
            return
        a, c = adjoint
        for into, part in zip(c, a, strict=True):
            into.add_(part, alpha=-lr)
        apply(c, a, 1.0)
        if self.weight_decay:
            for into, part in zip(a, c, strict=True):
                into.add_(part, alpha=self.weight_decay)
        _scale(c, self.momentum)


class Adam(UpdateRule):
    """``torch.optim.Adam`` and ``AdamW``.

    Args:
        betas: β₁, β₂, in [0, 1) each.
        eps: ε, > 0.
        weight_decay: λ, ≥ 0.
        decoupled: whether weight decay shrinks the parameters (AdamW) or joins the gradient.
    """

    slots = 2
    reads_moments = True

    def __init__(
        self,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        self.beta1, self.beta2 = betas
        self.eps, self.weight_decay, self.decoupled = eps, weight_decay, decoupled

    def step(
        self, params: Tensors, slots: list[Tensors], gradient: Tensors, lr: float, t: int
    ) -> Tensors:
        """m' = β₁m + (1 − β₁)g, v' = β₂v + (1 − β₂)g², θ' = θ − η m̂/(√v̂ + ε)."""
        if self.decoupled:
            _scale(params, 1.0 - lr * self.weight_decay)
        else:
            gradient = _decayed(gradient, params, self.weight_decay)
        for p, m, v, g in zip(params, *slots, gradient, strict=True):
            m.lerp_(g, 1.0 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1.0 - self.beta2)
            p.addcdiv_(m, self._root(v, t) + self.eps, value=-lr / (1.0 - self.beta1**t))
        return gradient

    def _root(self, square: Tensor, t: int) -> Tensor:
        return (square / (1.0 - self.beta2**t)).sqrt()

    def reverse(
        self, adjoint: list[Tensors], moment: Moment, lr: float, t: int, apply: Apply
    ) -> None:
        """See the module's text."""
        first, second = 1.0 - self.beta1**t, 1.0 - self.beta2**t
        after, of_mean, of_square = adjoint
        c = []
        for a, n, s, mean, square, g in zip(
            after, of_mean, of_square, *moment.slots, moment.gradient, strict=True
        ):
            root = self._root(square, t)
            scale = root + self.eps
            slope = mean / (2.0 * first * second * scale**2 * root)
            slope = torch.where(root > 0, slope, 0.0)
            n.sub_(a / scale, alpha=lr / first)
            s.addcmul_(a, slope, value=lr)
            c.append((1.0 - self.beta1) * n + 2.0 * (1.0 - self.beta2) * s * g)
            n.mul_(self.beta1)
            s.mul_(self.beta2)
        if self.decoupled:
            _scale(after, 1.0 - lr * self.weight_decay)
        elif self.weight_decay:
            for a, part in zip(after, c, strict=True):
                a.add_(part, alpha=self.weight_decay)
        apply(c, after, 1.0)


def rule_of(optimizer: str, options: Mapping[str, Any]) -> UpdateRule:
    """The update rule of a ``torch.optim`` class with these options.

    Args:
        optimizer: its name, ``"SGD"``, ``"Adam"`` or ``"AdamW"``; case does not matter.
        options: by their names there; what is absent has torch's default.

    Raises:
        ValueError: another optimiser, or an option whose update is not known here; says which.
    """
    kind = optimizer.lower()
    adams = {"betas", "eps", "weight_decay"}
    own = {"sgd": {"momentum", "weight_decay"}, "adam": adams, "adamw": adams}
    if kind not in own:
        raise ValueError(
            f"the update of optimizer={optimizer!r} is not known; those of SGD, Adam and AdamW are"
        )
    for name in ("maximize", "nesterov", "dampening", "amsgrad"):
        if options.get(name):
            raise ValueError(
                f"the update of {optimizer} with {name}={options[name]} is not known; train "
                f"without {name}"
            )
    unknown = sorted(set(options) - own[kind] - IGNORED)
    if unknown:
        raise ValueError(f"options {unknown} of {optimizer} are not known; leave them out")
    chosen = {name: options[name] for name in own[kind] if name in options}
    if kind == "sgd":
        return SGD(**chosen)
    if kind == "adamw":
        return Adam(**{"weight_decay": 0.01, **chosen}, decoupled=True)
    return Adam(**chosen, decoupled=bool(options.get("decoupled_weight_decay")))


def _scale(tensors: Tensors, factor: float) -> None:
    if factor != 1.0:
        for tensor in tensors:
            tensor.mul_(factor)


def _decayed(gradient: Tensors, params: Tensors, weight_decay: float) -> Tensors:
    if not weight_decay:
        return gradient
    return [g + weight_decay * p for g, p in zip(gradient, params, strict=True)]
