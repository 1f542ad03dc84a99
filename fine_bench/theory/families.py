"""Families of trade-off functions in closed form: shifts of a normal and of a Laplace variable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import erfcx, ndtr, ndtri

from fine_bench.theory.arrays import ArrayLike, FloatArray, check_probability
from fine_bench.theory.tradeoff import RatioTest, TradeOff, check_epsilon


def _mills(x: FloatArray) -> FloatArray:
    """Mills ratio (1 − Φ(x))/φ(x) for x ≥ 0, without underflow."""
    return np.asarray(np.sqrt(np.pi / 2.0) * erfcx(x / np.sqrt(2.0)), dtype=np.float64)


@dataclass(frozen=True)
class GaussianTradeOff(TradeOff):
    """G_μ(α) = Φ(Φ⁻¹(1 − α) − μ) = T(N(0, 1), N(μ, 1)), μ ≥ 0; G_0 = 1 − α is "no influence".

    Symmetric in P and Q. The sign of an influence is not part of it: carry it beside |μ|.
    """

    mu: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mu) and self.mu >= 0.0):
            raise ValueError(
                f"G_mu needs a finite mu >= 0, got {self.mu!r}; a negative influence has no "
                "trade-off function of its own: use GaussianTradeOff(abs(mu)), keep the sign beside"
            )

    def __call__(self, alpha: ArrayLike) -> FloatArray:
        level = check_probability(alpha, "alpha")
        return np.asarray(ndtr(-ndtri(level) - self.mu), dtype=np.float64)

    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        eps = check_epsilon(epsilon)
        if self.mu == 0.0:
            rejects = (eps < 0.0).astype(np.float64)
            return RatioTest(rejects, 1.0 - rejects, 1.0 - rejects, rejects)
        with np.errstate(over="ignore"):
            z = eps / self.mu
        half = 0.5 * self.mu
        return RatioTest(ndtr(-z - half), ndtr(z + half), ndtr(z - half), ndtr(half - z))

    def inverse(self) -> GaussianTradeOff:
        return self

    def symmetrize(self) -> GaussianTradeOff:
        return self

    def delta(self, epsilon: ArrayLike) -> FloatArray:
        """δ(ε) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2), kept to relative precision in the tail.

        With a = −ε/μ + μ/2 and Mills' ratio R, e^ε φ(a − μ) = φ(a) turns the difference into
        φ(a)(R(−a) − R(μ − a)): nothing overflows and no tiny number is a difference of large ones.
        Negative ε follow from δ(−ε) = 1 − e^−ε + e^−ε δ(ε), true of a symmetric function.
        """
        eps = check_epsilon(epsilon)
        size = np.abs(eps)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            a = 0.5 * self.mu - size / self.mu
            density = np.exp(-0.5 * a * a) / np.sqrt(2.0 * np.pi)
            first = np.where(a < 0.0, density * _mills(np.maximum(-a, 0.0)), ndtr(a))
            positive = np.maximum(first - density * _mills(self.mu - a), 0.0)
        positive = np.where(np.isfinite(a), positive, 0.0)  # μ or 1/ε too small to matter
        negative = -np.expm1(-size) + np.exp(-size) * positive
        return np.asarray(np.where(eps < 0.0, negative, positive), dtype=np.float64)


@dataclass(frozen=True)
class LaplaceTradeOff(TradeOff):
    """T(Lap(0, 1), Lap(μ, 1)), μ ≥ 0 in units of the scale: 1 − e^μ α, e^−μ/(4α), e^−μ(1 − α).

    The three pieces meet at α = e^−μ/2 and α = 1/2 (Dong, Roth and Su, appendix A). Symmetric.
    """

    mu: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mu) and self.mu >= 0.0):
            raise ValueError(
                f"the Laplace shift must be finite and >= 0, got {self.mu!r}; pass |shift| / scale"
            )

    def __call__(self, alpha: ArrayLike) -> FloatArray:
        level = check_probability(alpha, "alpha")
        small = 0.5 * np.exp(-self.mu)
        # e^μ α is formed as α / e^−μ only where α < e^−μ/2, so it never overflows.
        head = 1.0 - np.minimum(level, small) / (2.0 * max(small, np.finfo(np.float64).tiny))
        middle = 0.5 * small / np.maximum(level, max(small, np.finfo(np.float64).tiny))
        tail = 2.0 * small * (1.0 - level)
        value = np.where(level <= small, head, np.where(level <= 0.5, middle, tail))
        return np.asarray(value, dtype=np.float64)

    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        eps = check_epsilon(epsilon)
        inside = np.clip(eps, -self.mu, self.mu)
        alpha = 0.5 * np.exp(-0.5 * (inside + self.mu))
        beta = 0.5 * np.exp(-0.5 * (self.mu - inside))
        never, always = eps >= self.mu, eps < -self.mu
        alpha = np.where(never, 0.0, np.where(always, 1.0, alpha))
        beta = np.where(never, 1.0, np.where(always, 0.0, beta))
        return RatioTest(alpha, 1.0 - alpha, beta, 1.0 - beta)

    def inverse(self) -> LaplaceTradeOff:
        return self

    def symmetrize(self) -> LaplaceTradeOff:
        return self

    def delta(self, epsilon: ArrayLike) -> FloatArray:
        """δ(ε) = 1 − e^((ε − μ)/2) for |ε| ≤ μ, 0 above and 1 − e^ε below."""
        eps = check_epsilon(epsilon)
        inner = -np.expm1(0.5 * (np.clip(eps, -self.mu, self.mu) - self.mu))
        return np.where(eps < -self.mu, -np.expm1(np.minimum(eps, 0.0)), inner)
