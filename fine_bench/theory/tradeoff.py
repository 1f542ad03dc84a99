"""Trade-off functions: how well any test can tell two distributions apart.

For two distributions P (hypothesis H0) and Q (H1) a rejection rule φ makes the errors
α_φ = E_P[φ] and β_φ = 1 − E_Q[φ], and the trade-off function is the best that can be had,

    T(P, Q)(α) = inf { β_φ : α_φ ≤ α },

convex, continuous, non-increasing and at most 1 − α. Here H0 is *the run saw the data S*
(statistic x ~ P), H1 *it did not* (x ~ Q); x is larger when S lowers the query's loss, the test
rejects H0 when x < τ, and the signed parameter is

    μ = Φ⁻¹(1 − α) − Φ⁻¹(β),

positive when S helps. |μ| is the Gaussian influence, the parameter of G_μ = T(N(0, 1), N(μ, 1)).

Every function here is known through its likelihood-ratio tests (Neyman–Pearson): the test that
rejects when log dQ/dP > ε is optimal at its own level and has slope −e^ε there. From them follow
evaluation, inverse, convex hull, the dual δ(ε) and, in `fine_bench.theory.composition`,
composition. The functions themselves: `families`, `piecewise_linear`, `subsampling`.

Sources: Dong, Roth and Su (2019), *Gaussian differential privacy*; Panda et al.,
*f-INE*, arXiv 2510.10510 (the orientation and the equal-mean example).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fine_bench.theory.arrays import ArrayLike, FloatArray, check_probability

# e^±700 is about where float64 ends; a loss beyond it belongs to events of probability < 1e-300.
MAX_LOSS = 700.0


class RatioTest(NamedTuple):
    """Errors of the tests "reject H0 when log dQ/dP > ε", and their complements.

    Complements are carried because 1 − α computed from α near 1 has lost its digits.
    """

    alpha: FloatArray
    """P(L > ε), the type-I error."""
    accept: FloatArray
    """P(L ≤ ε) = 1 − α."""
    beta: FloatArray
    """Q(L ≤ ε), the type-II error."""
    power: FloatArray
    """Q(L > ε) = 1 − β."""


class TradeOff(ABC):
    """A trade-off function f = T(P, Q), defined by its likelihood-ratio tests."""

    @abstractmethod
    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        """Errors of the test that rejects H0 when log dQ/dP > `epsilon` (any shape, ±inf allowed).

        At a loss that carries an atom either end of the linear piece may be returned.
        """

    def __call__(self, alpha: ArrayLike) -> FloatArray:
        """f(α): the smallest type-II error of a test of level α. Same shape as `alpha`.

        Bisection over ε, then the chord between the last two tests: on a linear piece both ends
        are found and the chord is exact; elsewhere they agree to rounding.
        """
        level = check_probability(alpha, "alpha")
        low, high = np.full(level.shape, -MAX_LOSS), np.full(level.shape, MAX_LOSS)
        for _ in range(64):
            middle = 0.5 * (low + high)
            rejects_more = self.ratio_test(middle).alpha > level
            low = np.where(rejects_more, middle, low)
            high = np.where(rejects_more, high, middle)
        left, right = self.ratio_test(high), self.ratio_test(low)
        width = right.alpha - left.alpha
        share = np.divide(level - left.alpha, width, out=np.zeros_like(width), where=width > 0)
        value = left.beta + np.clip(share, 0.0, 1.0) * (right.beta - left.beta)
        return np.asarray(np.minimum(value, 1.0 - level), dtype=np.float64)

    def inverse(self) -> TradeOff:
        """f⁻¹(α) = inf { t : f(t) ≤ α } = T(Q, P): the same pair with H0 and H1 exchanged."""
        return InverseTradeOff(self)

    def symmetrize(self) -> TradeOff:
        """Largest symmetric trade-off function below f and f⁻¹: the convex hull of min(f, f⁻¹).

        It is the answer to "how well can the two be told apart, whichever is called H0", and the
        last step of the sub-sampling operator (Dong, Roth and Su, section 4).
        """
        return SymmetrizedTradeOff(self)

    def delta(self, epsilon: ArrayLike) -> FloatArray:
        """Dual δ(ε) = sup_α 1 − f(α) − e^ε α = 1 + f*(−e^ε), any real ε; same shape as `epsilon`.

        The smallest δ with Q(A) ≤ e^ε P(A) + δ for all events A. The ratio test of ε attains it,
        so δ = power − e^ε α. Differential privacy asks for both orders: take the δ of
        `symmetrize()`.
        """
        eps = check_epsilon(epsilon)
        test = self.ratio_test(eps)
        # e^ε α in logarithms: at large ε the first factor overflows long before α is 0.
        positive = np.where(test.alpha > 0.0, test.alpha, 1.0)
        scaled = np.exp(np.minimum(eps + np.log(positive), 0.0)) * (test.alpha > 0.0)
        floor = np.maximum(0.0, -np.expm1(np.minimum(eps, 0.0)))
        return np.asarray(np.maximum(test.power - scaled, floor), dtype=np.float64)

    def epsilon(self, delta: float) -> float:
        """Smallest ε ≥ 0 with δ(ε) ≤ `delta`; inf where no finite ε reaches it."""
        check_probability(delta, "delta")
        if self.delta(0.0) <= delta:
            return 0.0
        if self.delta(MAX_LOSS) > delta:
            return float("inf")
        low, high = 0.0, MAX_LOSS
        for _ in range(80):
            middle = 0.5 * (low + high)
            if self.delta(middle) > delta:
                low = middle
            else:
                high = middle
        return high

    def loss_range(self, tail: float = 1e-15) -> tuple[float, float]:
        """Losses (low ≤ 0, high ≥ 0) between which all but `tail` of the finite losses lie.

        Above counted under Q, below under P, each the measure that favours that side; cut at
        ±700. Atoms at infinite loss (perfectly telling events) are left out.
        """

        def edge(sign: float) -> float:
            inner, outer = 0.0, MAX_LOSS
            end = self.ratio_test(sign * MAX_LOSS)
            infinite = float(end.power if sign > 0 else end.accept)
            for _ in range(60):
                middle = 0.5 * (inner + outer)
                test = self.ratio_test(sign * middle)
                mass = float(test.power if sign > 0 else test.accept)
                inner, outer = (middle, outer) if mass - infinite > tail else (inner, middle)
            return sign * outer

        return edge(-1.0), edge(1.0)


def check_epsilon(epsilon: ArrayLike) -> FloatArray:
    eps = np.asarray(epsilon, dtype=np.float64)
    if np.isnan(eps).any():
        raise ValueError("epsilon holds NaN; pass real numbers (log of a likelihood ratio)")
    return eps


@dataclass(frozen=True)
class InverseTradeOff(TradeOff):
    """T(Q, P) of a base function T(P, Q); the base's tests with the hypotheses exchanged."""

    base: TradeOff

    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        test = self.base.ratio_test(-check_epsilon(epsilon))
        return RatioTest(test.beta, test.power, test.alpha, test.accept)

    def inverse(self) -> TradeOff:
        return self.base


@dataclass(frozen=True)
class SymmetrizedTradeOff(TradeOff):
    """Convex hull of min(f, f⁻¹): its dual is max(δ_f, δ_f⁻¹), each ε served by the larger one."""

    base: TradeOff

    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        eps = check_epsilon(epsilon)
        flipped = self.base.inverse()
        use_base = self.base.delta(eps) >= flipped.delta(eps)
        pairs = zip(self.base.ratio_test(eps), flipped.ratio_test(eps), strict=True)
        return RatioTest(*(np.where(use_base, mine, other) for mine, other in pairs))

    def inverse(self) -> TradeOff:
        return self

    def symmetrize(self) -> TradeOff:
        return self
