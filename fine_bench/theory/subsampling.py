"""Trade-off functions of data that take part in a step with a probability only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fine_bench.theory.arrays import ArrayLike, FloatArray, check_probability
from fine_bench.theory.families import GaussianTradeOff
from fine_bench.theory.piecewise_linear import PiecewiseLinear, convexify
from fine_bench.theory.tradeoff import RatioTest, TradeOff, check_epsilon


@dataclass(frozen=True)
class MixedTradeOff(TradeOff):
    """f_p = p·f + (1 − p)·Id = T(P, (1 − p)P + pQ): S takes part with probability `rate` in (0, 1].

    The likelihood ratio r becomes 1 − p + p·r, so the test at loss ε is the base's test at
    log(1 + (e^ε − 1)/p). One direction only; `subsample` gives the symmetric operator C_p.
    """

    base: TradeOff
    rate: float

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise ValueError(f"rate must lie in (0, 1], got {self.rate!r}; it is batch size / n")

    def __call__(self, alpha: ArrayLike) -> FloatArray:
        level = check_probability(alpha, "alpha")
        return self.rate * self.base(level) + (1.0 - self.rate) * (1.0 - level)

    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        eps = check_epsilon(epsilon)
        with np.errstate(over="ignore", divide="ignore"):
            inner = np.expm1(eps) / self.rate
            shifted = np.log1p(np.maximum(inner, -1.0))
        test, p = self.base.ratio_test(shifted), self.rate
        # A mixture's ratio is never below 1 − p: there the test rejects even what proves H0.
        always = inner < -1.0
        alpha = np.where(always, 1.0, test.alpha)
        accept = np.where(always, 0.0, test.accept)
        beta = np.where(always, 0.0, p * test.beta + (1.0 - p) * test.accept)
        power = np.where(always, 1.0, p * test.power + (1.0 - p) * test.alpha)
        return RatioTest(alpha, accept, beta, power)


def mix(f: TradeOff, rate: float) -> TradeOff:
    """f_p = p·f + (1 − p)·Id for a sampling `rate` p in [0, 1]; p = 0 is no influence at all."""
    if rate == 0.0:
        return GaussianTradeOff(0.0)
    mixed = MixedTradeOff(f, rate)
    if rate == 1.0:
        return f
    if isinstance(f, PiecewiseLinear):
        return convexify(f.alpha, mixed(f.alpha))
    return mixed


def subsample(f: TradeOff, rate: float) -> TradeOff:
    """Sub-sampling operator C_p(f) = min(f_p, f_p⁻¹)**, f_p = p·f + (1 − p)·Id.

    The influence of data that enter each step only with probability `rate` (Dong, Roth and Su,
    theorem 4.2), whichever hypothesis is called H0.
    """
    return mix(f, rate).symmetrize()
