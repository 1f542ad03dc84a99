"""The effect of an example on one step's statistic, and the noise that it stands out from.

For a target h, c_i = ⟨g_i, ∇h⟩ says how much a step along example i's gradient lowers h. The effect
of i is c_i − c̄, its noise σ, with c̄ and σ taken over *other* examples j ≠ i: those of the batch, or
reference examples. ``fine_bench.fine.accumulator`` sums both over a run; this file has one step.

``contrast="substitution"`` compares i with an average example, as above; ``"removal"`` leaves c_i
uncentred.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fine_bench.gradients.reciprocal import inverse_or_zero

Observable: TypeAlias = Literal["margin", "loss"]
Composition: TypeAlias = Literal["accumulated", "weighted", "standardised"]
Contrast: TypeAlias = Literal["substitution", "removal"]
StepWeight: TypeAlias = Literal["lr", "uncertainty"]
Noise: TypeAlias = Literal["sample", "model"]

MIN_BATCH = 3
"""Two reference examples j ≠ i are the fewest that have a standard deviation."""

MIN_REFERENCE = 3
"""An example in its own reference leaves two others, the fewest that have a standard deviation."""


def choose(value: str, allowed: Any, name: str) -> None:
    """Refuse a value outside of a ``Literal``."""
    options = get_args(allowed)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def margin_effects(
    effect: Tensor, sigma: Tensor, one_minus_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Effect and noise on an example's own loss, made those on its margin by 1/(1 − p).

    The loss gradient is (1 − p) times the margin's, so ⟨g_j, ∇h_i⟩ = ⟨g_j, g_i⟩/(1 − p_i).

    Args:
        effect, sigma: ``(..., m)`` in float64.
        one_minus_p: 1 − p_i, ``(..., m)``; None leaves them those of the loss.
    """
    if one_minus_p is None:
        return effect, sigma
    inverse = inverse_or_zero(one_minus_p).double()
    return effect * inverse, sigma * inverse


def self_effects(
    gram: Tensor, one_minus_p: Tensor | None, contrast: Contrast = "substitution"
) -> tuple[Tensor, Tensor]:
    """Effect and noise of each example on its own observable, from the batch's Gram matrix.

    effect_i = (K_ii − mean_{j≠i} K_ij)/(1 − p_i) and σ_i = std_{j≠i} K_ij/(1 − p_i) for the margin;
    without the divisors for the loss; without the mean for ``contrast="removal"``.

    Args:
        gram: K_ij = ⟨g_i, g_j⟩ of the loss gradients, ``(..., m, m)``, m ≥ 3.
        one_minus_p: 1 − p_i for the margin, ``(..., m)``; None for the loss.

    Returns:
        effect and σ, each ``(..., m)`` in float64.
    """
    k = gram.double()
    m = k.shape[-1]
    own = k.diagonal(dim1=-2, dim2=-1)
    # The row's sums without its diagonal. Squares of float32 numbers are exact in float64, so the
    # one-pass variance loses nothing that matters there.
    mean = (k.sum(-1) - own) / (m - 1)
    squares = torch.linalg.vecdot(k, k) - own.square()
    variance = (squares - (m - 1) * mean.square()).clamp_min_(0.0) / (m - 2)
    effect = own - mean if contrast == "substitution" else own.clone()
    sigma = variance.sqrt_()
    return margin_effects(effect, sigma, one_minus_p)


def whitened_effects(
    own: Tensor,
    total: Tensor,
    one_minus_p: Tensor | None,
    contrast: Contrast = "substitution",
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Effect and noise on the example's own observable where the geometry states the noise.

    With C the second moment of the gradients and K_ij = g_iᵀC⁻¹g_j, the variance of K_ij over j is
    g_iᵀC⁻¹CC⁻¹g_i = K_ii. So σ_i = sqrt(K_ii), and nothing has to be estimated from a few batch
    mates: effect_i = K_ii − mean_{j≠i} K_ij (``"removal"``: K_ii), both over 1 − p_i for the
    margin. (The damping and C being the model's own Fisher, not the gradients' second moment, make
    it an approximation.)

    Args:
        own: K_ii, ``(..., m)``, ≥ 0.
        total: Σ_j K_ij over the batch, i included, ``(..., m)``.
        one_minus_p, contrast: see ``self_effects``.
        variance: of K_ij over j, ``(..., m)``, where it is another (``fine.step_sizes``).

    Returns:
        effect and σ, each ``(..., m)`` in float64.
    """
    k, m = own.double(), own.shape[-1]
    effect = k - (total.double() - k) / (m - 1) if contrast == "substitution" else k.clone()
    sigma = (k if variance is None else variance.double()).clamp_min(0.0).sqrt()
    return margin_effects(effect, sigma, one_minus_p)


def direction_effects(c: Tensor, contrast: Contrast = "substitution") -> tuple[Tensor, Tensor]:
    """Effect and noise of each example on R given directions.

    effect_i = c_i − mean_{j≠i} c_j and σ_i = std_{j≠i} c_j, by the leave-one-out identities
    mean_{j≠i} = c̄ − (c_i − c̄)/(m − 1) and
    Σ_{j≠i} (c_j − mean_{j≠i})² = Σ_j (c_j − c̄)² − m/(m − 1) · (c_i − c̄)².

    Args:
        c: ⟨g_i, ∇h_r⟩, ``(..., R, m)``, m ≥ 3.

    Returns:
        effect and σ, each ``(..., R, m)`` in float64.
    """
    c = c.double()
    m = c.shape[-1]
    d = c - c.mean(-1, keepdim=True)
    ratio = m / (m - 1)
    squares = d.square()
    variance = (squares.sum(-1, keepdim=True) - ratio * squares).clamp_min_(0.0) / (m - 2)
    effect = ratio * d if contrast == "substitution" else c
    return effect, variance.sqrt_()


def uncertainty_weight(lr: float, one_minus_p: Tensor) -> float:
    """w = η · mean(1 − p), the weight of a step under ``step_weight="uncertainty"``.

    Args:
        lr: step size η.
        one_minus_p: 1 − p of each example's label, ``(m,)``.
    """
    return lr * float(one_minus_p.double().mean())


def reference_effects(
    own: Tensor, reference: Tensor, itself: Tensor, contrast: Contrast = "substitution"
) -> tuple[Tensor, Tensor]:
    """Effect and noise of examples against reference examples.

    effect_i = c_i − mean_{j≠i} c_j and σ_i = std_{j≠i} c_j over the reference examples j. Where i
    is one of the r itself, it is left out by mean_{j≠i} = c̄ − (c_i − c̄)/(r − 1) and
    Σ_{j≠i} (c_j − mean_{j≠i})² = Σ_j (c_j − c̄)² − r/(r − 1) · (c_i − c̄)².

    Args:
        own: c_i, ``(R, B)``.
        reference: c_j, ``(R, r)`` where all examples share the direction; ``(R, B, r)`` where each
            has its own (target ``self``).
        itself: which of the B examples are reference examples, ``(B,)`` boolean.
        contrast: ``"removal"`` leaves c_i uncentred.

    Returns:
        effect and σ, each ``(R, B)`` in float64.
    """
    own, c = own.double(), reference.double()
    r = c.shape[-1]
    mean = c.mean(-1, keepdim=True)
    squares = (c - mean).square().sum(-1)
    mean = mean[..., 0]
    if reference.ndim == 2:
        mean, squares = mean[:, None], squares[:, None]
    inside = itself.double()
    d = own - mean
    squares = (squares - inside * (r / (r - 1)) * d.square()).clamp_min(0.0)
    sigma = (squares / (r - 1 - inside)).sqrt()
    effect = d * (1.0 + inside / (r - 1)) if contrast == "substitution" else own
    return effect, sigma
