"""Checkpoints of a run under Adam: the parameters and what the optimiser remembers.

Adam (Kingma, Ba, arXiv:1412.6980) keeps running means m of the gradients and v of their squares.
What one more example with gradient g would do to the parameters of such a run is, with t steps
taken so far,

    Γ(g) = m̂ / (√v̂ + ε),   m̂ = (β₁ m + (1 − β₁) g) / (1 − β₁^(t+1)),
                            v̂ = (β₂ v + (1 − β₂) g²) / (1 − β₂^(t+1)),

element by element; the step is −lr · Γ(g). Weight decay is the same for every example and left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fine_bench.types import Checkpoint


@dataclass(frozen=True, eq=False)
class AdamCheckpoint(Checkpoint):
    """A checkpoint with Adam's state.

    Attributes:
        mean, square: m and v by name, for the trained parameters.
        betas: β₁, β₂, each in [0, 1).
        epsilon: ε, > 0.
        updates: t, steps that m and v have seen, ≥ 1.
    """

    mean: Mapping[str, Tensor] = field(default_factory=dict)
    square: Mapping[str, Tensor] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    updates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mean or self.mean.keys() != self.square.keys():
            raise ValueError(
                "mean and square must name the same parameters, at least one; take exp_avg and "
                "exp_avg_sq from the optimiser's state"
            )
        for name, value in self.mean.items():
            expected = self.params[name].shape if name in self.params else None
            if expected is None or value.shape != expected or self.square[name].shape != expected:
                raise ValueError(
                    f"mean and square of {name!r} do not have the shape of that parameter"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be > 0, got {self.epsilon}")
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")


def adam_direction(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    betas: tuple[float, float],
    epsilon: float,
    updates: int,
) -> Tensor:
    """Γ(g) of the module for a batch of gradients.

    Args:
        gradient: ``(B, P)``.
        mean, square: m and v, ``(P,)``.
        betas, epsilon, updates: see ``AdamCheckpoint``.

    Returns:
        ``(B, P)``.
    """
    first, second = betas
    m = (first * mean + (1 - first) * gradient) / (1 - first ** (updates + 1))
    v = (second * square + (1 - second) * gradient.square()) / (1 - second ** (updates + 1))
    return m / (torch.sqrt(v) + epsilon)
