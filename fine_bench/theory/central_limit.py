"""The Gaussian limit of many weak steps: moments of the privacy loss, and its Berry–Esseen error.

Sources: Dong, Roth and Su (2019), section 3.2; Bu, Dong, Long and Su (2020) for Poisson sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.special import ndtr

from fine_bench.theory.arrays import check_probability
from fine_bench.theory.families import GaussianTradeOff
from fine_bench.theory.piecewise_linear import PiecewiseLinear
from fine_bench.theory.tradeoff import MAX_LOSS, TradeOff


@dataclass(frozen=True)
class LossMoments:
    """Moments of λ = log |f'| = log dQ/dP under P, finite atoms only."""

    kl: float
    """KL(P ‖ Q) = −E[λ]; inf where P has events that Q lacks."""
    kappa2: float
    """E[λ²]."""
    kappa3: float
    """E|λ|³."""
    kappa3_centred: float
    """E|λ + kl|³."""
    variance: float
    """E[λ²] − E[λ]², over the finite atoms."""


def loss_moments(f: TradeOff) -> LossMoments:
    """The functionals kl, κ2, κ3, κ̄3 of a trade-off function (Dong, Roth and Su, section 3.2).

    Closed form for G_μ, sums for piecewise-linear functions, else Gauss–Legendre quadrature of
    E[g(λ)] = g(0) + ∫_0^∞ g'(ε) P(λ > ε) dε − ∫_{−∞}^0 g'(ε) P(λ ≤ ε) dε.
    """
    if isinstance(f, GaussianTradeOff):
        mu, kl = f.mu, 0.5 * f.mu**2
        # E|N(−kl, μ²)|³ by its closed form; kl/μ = μ/2.
        h = 0.5 * mu
        density = np.exp(-0.5 * h * h) / np.sqrt(2.0 * np.pi)
        third = mu**3 * (2.0 * (2.0 + h * h) * density + (h**3 + 3.0 * h) * (2.0 * ndtr(h) - 1.0))
        centred = mu**3 * 2.0 * np.sqrt(2.0 / np.pi)
        return LossMoments(kl, mu**2 + kl**2, float(third), float(centred), mu**2)
    if isinstance(f, PiecewiseLinear):
        loss, mass, _ = f.losses
        finite = np.isfinite(loss)
        lost = bool(mass[np.isneginf(loss)].sum() > 0.0)
        loss, mass = loss[finite], mass[finite]
        total = float(mass.sum()) or 1.0
        mean = float((mass * loss).sum())
        spread = float((mass * np.square(loss - mean / total)).sum())
        if lost:
            return LossMoments(*(float("inf"),) * 4, spread)
        return LossMoments(
            -mean,
            float((mass * loss**2).sum()),
            float((mass * np.abs(loss) ** 3).sum()),
            float((mass * np.abs(loss - mean) ** 3).sum()),
            spread,
        )
    low, high = f.loss_range(1e-18)
    nodes, weights = np.polynomial.legendre.leggauss(16)

    def integral(start: float, end: float, power: int, centre: float) -> float:
        """∫ d/dε |ε − centre|^power · (tail probability) between two losses of one sign."""
        if end <= start:
            return 0.0
        cuts = np.linspace(start, end, 257)
        half = 0.5 * np.diff(cuts)[:, None]
        eps = 0.5 * (cuts[:-1] + cuts[1:])[:, None] + half * nodes
        test = f.ratio_test(eps)
        away = eps - centre
        slope = power * np.abs(away) ** (power - 1) * (np.sign(away) if power > 1 else 1.0)
        tail = test.alpha if start >= 0.0 else -test.accept
        return float((slope * tail * half * weights).sum())

    def expectation(power: int, centre: float = 0.0) -> float:
        # g = |ε − centre|^power (or ε itself for power 1), split where g or the tail has a kink.
        base = 0.0 if power == 1 else abs(centre) ** power
        cuts = sorted({low, min(max(centre, low), 0.0), 0.0, max(min(centre, high), 0.0), high})
        return base + sum(integral(a, b, power, centre) for a, b in pairwise(cuts))

    mean = expectation(1)
    second = expectation(2)
    if float(f.ratio_test(-MAX_LOSS).accept) > 1e-12:
        return LossMoments(*(float("inf"),) * 4, max(second - mean * mean, 0.0))
    return LossMoments(
        -mean, second, expectation(3), expectation(3, mean), max(second - mean * mean, 0.0)
    )


@dataclass(frozen=True)
class CentralLimit:
    """Gaussian limit of a composition: G_μ(α + γ) − γ ≤ f(α) ≤ G_μ(α − γ) + γ on [γ, 1 − γ]."""

    mu: float
    gamma: float
    """Berry–Esseen error in α and β; 0.5 or more bounds nothing."""


def central_limit(
    functions: TradeOff | Sequence[TradeOff], counts: int | Sequence[int] = 1
) -> CentralLimit:
    """Parameters of the central limit theorem for composed *symmetric* trade-off functions.

        μ = 2‖kl‖₁ / sqrt(‖κ2‖₁ − ‖kl‖₂²),   γ = 0.56 ‖κ̄3‖₁ / (‖κ2‖₁ − ‖kl‖₂²)^{3/2}

    (Dong, Roth and Su 2019, theorem 3.4; norms run over the steps). Functions with infinite loss
    (f(0) < 1) never become Gaussian and are refused; asymmetric ones go through `symmetrize()`.
    """
    functions, counts = as_steps(functions, counts)
    probe = np.linspace(-20.0, 20.0, 401)
    kl = variance = third = 0.0
    for f, count in zip(functions, counts, strict=True):
        uneven = float(np.abs(f.delta(probe) - f.inverse().delta(probe)).max())
        if uneven > 1e-9:
            raise ValueError(
                f"the theorem needs f = f^-1, but the duals of both differ by {uneven:.3g}; "
                "pass f.symmetrize()"
            )
        moments = loss_moments(f)
        if not np.isfinite(moments.kl):
            raise ValueError(
                "a step has events that prove one hypothesis (f(0) < 1, infinite KL): its "
                "composition has no Gaussian limit; use compose()"
            )
        kl += count * moments.kl
        variance += count * moments.variance
        third += count * moments.kappa3_centred
    if variance <= 0.0:
        return CentralLimit(0.0, 0.0)
    return CentralLimit(2.0 * kl / float(np.sqrt(variance)), 0.56 * third / variance**1.5)


def poisson_clt_mu(mu: float, rate: float, steps: int) -> float:
    """Limit of `steps` Poisson-subsampled Gaussian steps: μ_run = p·sqrt(T·(e^{μ²} − 1)).

    `mu`: per-step parameter when the data take part (≥ 0); `rate`: probability p of taking part.
    Bu, Dong, Long and Su (2020), *Deep learning with Gaussian differential privacy*. It is the
    limit of mix(G_μ, p)^{⊗T}, in either order of the hypotheses, for T → ∞ with p·sqrt(T) fixed.
    (C_p(G_μ)^{⊗T}, which gives every step the worse order, lies lower and has a limit of its own:
    `central_limit`.) A limit, not a bound: it holds for weak steps and explodes for strong ones;
    at μ = 3 a single step already counts 90·p.
    """
    check_probability(rate, "rate")
    if not (np.isfinite(mu) and mu >= 0.0 and steps >= 0):
        raise ValueError(f"mu must be finite and >= 0 and steps >= 0, got mu={mu!r}, {steps!r}")
    if mu > 26.0:
        raise ValueError(
            f"e^(mu^2) overflows at mu = {mu:.3g}: the limit is about weak steps (mu << 1); "
            "use compose() for strong ones"
        )
    return float(rate * np.sqrt(steps * np.expm1(mu * mu)))


def as_steps(
    functions: TradeOff | Sequence[TradeOff], counts: int | Sequence[int]
) -> tuple[list[TradeOff], list[int]]:
    """Functions and how often each occurs, as two lists of one length."""
    many = [functions] if isinstance(functions, TradeOff) else list(functions)
    times = [counts] * len(many) if isinstance(counts, int) else [int(c) for c in counts]
    if not many or len(many) != len(times) or min(times) < 1:
        raise ValueError(
            f"need at least one function and a count >= 1 for each, got {len(many)} function(s) "
            f"and counts {times[:5]}"
        )
    return many, times
