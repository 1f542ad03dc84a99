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
composition.

Sources: Dong, Roth and Su (2019), *Gaussian differential privacy*; Panda et al.,
*f-INE*, arXiv 2510.10510 (the orientation and the equal-mean example).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression
from scipy.special import erfcx, ndtr, ndtri

FloatArray = npt.NDArray[np.float64]
ArrayLike = npt.ArrayLike

# e^±700 is about where float64 ends; a loss beyond it belongs to events of probability < 1e-300.
MAX_LOSS = 700.0
# Rounding that a vertex may carry before it counts as a broken curve.
_VERTEX_TOLERANCE = 1e-12


def check_probability(value: ArrayLike, name: str) -> FloatArray:
    """`value` as float64, refused with a ValueError unless every entry lies in [0, 1]."""
    array = np.asarray(value, dtype=np.float64)
    outside = ~((array >= 0.0) & (array <= 1.0))  # also true for NaN
    if outside.any():
        worst = array[outside].flat[0]
        raise ValueError(
            f"{name} must lie in [0, 1], got {worst:.6g} among {array.size} value(s); "
            "pass probabilities, not percentages or scores"
        )
    return array


def check_samples(samples: ArrayLike, name: str, least: int = 1) -> FloatArray:
    """`samples` of shape (..., n) as float64, refused unless finite and n ≥ `least`."""
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim == 0:
        raise ValueError(f"{name} must have shape (..., n), got a single number; pass a sequence")
    if array.shape[-1] < least:
        raise ValueError(
            f"{name} has {array.shape[-1]} sample(s) on its last axis, at least {least} needed; "
            "draw more samples (longer run, or more batches a step)"
        )
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(
            f"{name} holds {bad} NaN or infinite value(s) of {array.size}; find where the "
            "statistic diverged, or drop these steps from both samples before testing"
        )
    return array


def signed_mu(alpha: ArrayLike, beta: ArrayLike) -> FloatArray:
    """Signed parameter of one test: μ = Φ⁻¹(1 − α) − Φ⁻¹(β), dimensionless.

    `alpha`, `beta`: the two error rates in [0, 1], broadcast against each other. Rates of exactly
    0 or 1 give ±inf; (0, 1) and (1, 0), the tests that never and always reject, say nothing about
    μ and give NaN.
    """
    a, b = check_probability(alpha, "alpha"), check_probability(beta, "beta")
    with np.errstate(invalid="ignore"):
        # Φ⁻¹(1 − α) = −Φ⁻¹(α), which keeps full precision for small α.
        return np.asarray(-ndtri(a) - ndtri(b), dtype=np.float64)


def error_curve(p: ArrayLike, q: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Empirical errors of every test "reject H0 when x < τ": thresholds τ, α̂(τ), β̂(τ).

    α̂ = share of `p` below τ, β̂ = share of `q` at or above τ. `p` has shape (..., n_p), `q`
    (..., n_q) with the same leading axes; the results have shape (..., n_p + n_q + 1), thresholds
    rising through all pooled values to +inf. Tied values are passed together, as no threshold
    separates them: a tie repeats the point of its first value.
    """
    xp, xq = check_samples(p, "p"), check_samples(q, "q")
    if xp.shape[:-1] != xq.shape[:-1]:
        raise ValueError(
            f"p {xp.shape} and q {xq.shape} must agree in all axes but the last; "
            "stack the subsets of both in the same order"
        )
    n_p, n_q = xp.shape[-1], xq.shape[-1]
    pooled = np.concatenate([xp, xq], axis=-1)
    order = np.argsort(pooled, axis=-1, kind="stable")
    values = np.take_along_axis(pooled, order, axis=-1)
    from_p = order < n_p
    below_p = np.cumsum(from_p, axis=-1) - from_p
    below_q = np.cumsum(~from_p, axis=-1) - ~from_p
    first = np.ones(values.shape, dtype=bool)
    first[..., 1:] = values[..., 1:] != values[..., :-1]
    below_p = np.maximum.accumulate(np.where(first, below_p, 0), axis=-1)
    below_q = np.maximum.accumulate(np.where(first, below_q, 0), axis=-1)

    def closed(inner: npt.NDArray[np.generic], end: float) -> FloatArray:
        last = np.full((*inner.shape[:-1], 1), end, dtype=np.float64)
        return np.concatenate([inner.astype(np.float64), last], axis=-1)

    alpha = closed(below_p, n_p) / n_p
    beta = (n_q - closed(below_q, n_q)) / n_q
    return closed(values, np.inf), alpha, beta


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
        eps = _check_epsilon(epsilon)
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


def _check_epsilon(epsilon: ArrayLike) -> FloatArray:
    eps = np.asarray(epsilon, dtype=np.float64)
    if np.isnan(eps).any():
        raise ValueError("epsilon holds NaN; pass real numbers (log of a likelihood ratio)")
    return eps


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
        eps = _check_epsilon(epsilon)
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
        eps = _check_epsilon(epsilon)
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
        eps = _check_epsilon(epsilon)
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
        eps = _check_epsilon(epsilon)
        inner = -np.expm1(0.5 * (np.clip(eps, -self.mu, self.mu) - self.mu))
        return np.where(eps < -self.mu, -np.expm1(np.minimum(eps, 0.0)), inner)


@dataclass(frozen=True, eq=False)
class PiecewiseLinear(TradeOff):
    """A trade-off function given by its vertices; discrete, empirical and composed pairs are these.

    `alpha`: (k,), strictly increasing from 0 to 1; `beta`: (k,), convex, non-increasing, at most
    1 − alpha, ending at 0. f(0) < 1 says that some events prove H1 (infinite likelihood ratio).
    Points that are not yet such a curve go through `convexify`.
    """

    alpha: FloatArray
    beta: FloatArray

    def __post_init__(self) -> None:
        alpha = check_probability(self.alpha, "vertex alpha").copy()
        beta = check_probability(self.beta, "vertex beta").copy()
        if alpha.ndim != 1 or alpha.shape != beta.shape or alpha.size < 2:
            raise ValueError(
                f"vertices need two equal 1-d arrays of at least 2 points, got shapes "
                f"{alpha.shape} and {beta.shape}"
            )
        run, rise = np.diff(alpha), np.diff(beta)
        if alpha[0] != 0.0 or alpha[-1] != 1.0 or (run <= 0.0).any():
            raise ValueError(
                f"vertex alpha must increase strictly from 0 to 1, got {alpha[0]} … {alpha[-1]} "
                f"with smallest step {run.min()}; sort the points or use convexify(alpha, beta)"
            )
        if (rise > _VERTEX_TOLERANCE).any():
            at = int(np.argmax(rise))
            raise ValueError(
                f"vertex beta must not increase, but rises by {rise[at]:.3g} after alpha = "
                f"{alpha[at]:.6g}; use convexify(alpha, beta) for raw points"
            )
        bend = rise[1:] * run[:-1] - rise[:-1] * run[1:]
        if (bend < -_VERTEX_TOLERANCE).any():
            at = int(np.argmin(bend)) + 1
            raise ValueError(
                f"vertices are not convex at alpha = {alpha[at]:.6g} (beta = {beta[at]:.6g}); "
                "use convexify(alpha, beta) for raw points"
            )
        if (beta > 1.0 - alpha + _VERTEX_TOLERANCE).any():
            raise ValueError(
                "vertices lie above 1 - alpha, which blind guessing already attains; "
                "use convexify(alpha, beta), or exchange p and q if the sign is reversed"
            )
        alpha.flags.writeable = beta.flags.writeable = False
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "beta", beta)

    def __call__(self, alpha: ArrayLike) -> FloatArray:
        level = check_probability(alpha, "alpha")
        return np.asarray(np.interp(level, self.alpha, self.beta), dtype=np.float64)

    @cached_property
    def losses(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Atoms of the finite and infinite privacy loss: (log dQ/dP, P mass, Q mass), loss falling.

        One atom a linear piece (slope −e^loss); first an atom at +inf when f(0) < 1.
        """
        p_mass, q_mass = np.diff(self.alpha), -np.diff(self.beta)
        with np.errstate(divide="ignore"):
            loss = np.log(np.maximum(q_mass, 0.0)) - np.log(p_mass)
        # Equal slopes may differ by rounding; the order by loss is what the tests rely on.
        loss = np.minimum.accumulate(loss)
        if self.beta[0] < 1.0:
            loss = np.concatenate([[np.inf], loss])
            p_mass = np.concatenate([[0.0], p_mass])
            q_mass = np.concatenate([[1.0 - self.beta[0]], q_mass])
        return loss, p_mass, q_mass

    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        eps = _check_epsilon(epsilon)
        finite = self.losses[0]
        finite = finite[finite < np.inf]
        # Number of pieces whose loss exceeds ε; the pieces come in falling order.
        at = np.searchsorted(-finite, -eps, side="left")
        alpha, beta = self.alpha[at], self.beta[at]
        return RatioTest(alpha, 1.0 - alpha, beta, 1.0 - beta)

    def inverse(self) -> PiecewiseLinear:
        return convexify(self.beta, self.alpha)

    def symmetrize(self) -> PiecewiseLinear:
        mirrored = self.inverse()
        return convexify(
            np.concatenate([self.alpha, mirrored.alpha]), np.concatenate([self.beta, mirrored.beta])
        )


@dataclass(frozen=True)
class InverseTradeOff(TradeOff):
    """T(Q, P) of a base function T(P, Q); the base's tests with the hypotheses exchanged."""

    base: TradeOff

    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        test = self.base.ratio_test(-_check_epsilon(epsilon))
        return RatioTest(test.beta, test.power, test.alpha, test.accept)

    def inverse(self) -> TradeOff:
        return self.base


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
        eps = _check_epsilon(epsilon)
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


@dataclass(frozen=True)
class SymmetrizedTradeOff(TradeOff):
    """Convex hull of min(f, f⁻¹): its dual is max(δ_f, δ_f⁻¹), each ε served by the larger one."""

    base: TradeOff

    def ratio_test(self, epsilon: ArrayLike) -> RatioTest:
        eps = _check_epsilon(epsilon)
        flipped = self.base.inverse()
        use_base = self.base.delta(eps) >= flipped.delta(eps)
        pairs = zip(self.base.ratio_test(eps), flipped.ratio_test(eps), strict=True)
        return RatioTest(*(np.where(use_base, mine, other) for mine, other in pairs))

    def inverse(self) -> TradeOff:
        return self

    def symmetrize(self) -> TradeOff:
        return self


def convexify(alpha: ArrayLike, beta: ArrayLike) -> PiecewiseLinear:
    """Largest trade-off function below the points: their lower convex hull with (0, 1) and (1, 0).

    `alpha`, `beta`: (k,) error pairs of any tests, in any order. Randomising between two tests
    attains the chord between them, so the hull is attainable whenever the points are. The hull is
    the greatest convex minorant, found by pooling adjacent slopes that fall.
    """
    a = np.append(check_probability(alpha, "alpha"), [0.0, 1.0])
    b = np.append(check_probability(beta, "beta"), [1.0, 0.0])
    if a.shape != b.shape:
        raise ValueError(f"alpha and beta must have equal lengths, got {a.size - 2}, {b.size - 2}")
    order = np.lexsort((b, a))
    a, b = a[order], np.minimum.accumulate(b[order])
    # Of points with one level (or levels closer than a slope can resolve) the last is the lowest.
    keep = np.append(np.diff(a) > 1e-290, True)
    a, b = a[keep], b[keep]
    a[0] = 0.0
    if a.size > 2:
        run = np.diff(a)
        blocks = isotonic_regression(np.diff(b) / run, weights=run).blocks
        a, b = a[blocks], b[blocks]
    return PiecewiseLinear(a, np.clip(b, 0.0, np.maximum(1.0 - a, 0.0)))


def from_pmf(p: ArrayLike, q: ArrayLike) -> PiecewiseLinear:
    """T(P, Q) of two distributions on the same finite set: outcomes rejected by falling q/p.

    `p`, `q`: (k,) probabilities, each summing to 1. Exact; outcomes of equal ratio form one piece.
    """
    mass_p, mass_q = check_probability(p, "p"), check_probability(q, "q")
    if mass_p.ndim != 1 or mass_p.shape != mass_q.shape or mass_p.size == 0:
        raise ValueError(f"p and q must be equal 1-d arrays, got {mass_p.shape}, {mass_q.shape}")
    for name, mass in (("p", mass_p), ("q", mass_q)):
        if abs(mass.sum() - 1.0) > 1e-9:
            raise ValueError(f"{name} must sum to 1, got {mass.sum():.12g}; divide it by its sum")
    mass_p, mass_q = mass_p / mass_p.sum(), mass_q / mass_q.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.log(mass_q) - np.log(mass_p)
    possible = ~np.isnan(loss)  # neither distribution ever shows the others
    order = np.argsort(-loss[possible], kind="stable")
    mass_p, mass_q = mass_p[possible][order], mass_q[possible][order]
    alpha = np.cumsum(mass_p)
    beta = np.append(np.cumsum(mass_q[:0:-1])[::-1], 0.0)
    return convexify(np.minimum(alpha, 1.0), np.minimum(beta, 1.0))


def from_samples(
    p: ArrayLike,
    q: ArrayLike,
    ordering: Literal["low", "high", "either", "likelihood"] = "low",
) -> PiecewiseLinear:
    """T(P, Q) estimated from samples `p` (n_p,) and `q` (n_q,), ties handled.

    `ordering` says which tests compete:

    - "low": reject H0 when x < τ, the orientation of this package (S helps: P above Q);
    - "high": reject when x > τ; "either": both families;
    - "likelihood": outcomes by falling empirical ratio q/p, for statistics with few distinct
      values. With all values distinct every sample would be its own outcome and the curve 0, so
      samples without ties are refused.

    The hull of an empirical curve picks the best tests on the data it measures them with, so it
    lies below the truth on average: use `fine_bench.theory.estimation` for a number with an
    interval.
    """
    xp, xq = check_samples(p, "p"), check_samples(q, "q")
    if xp.ndim != 1 or xq.ndim != 1:
        raise ValueError(f"one pair at a time: p and q must be 1-d, got {xp.shape}, {xq.shape}")
    if ordering == "likelihood":
        values = np.unique(np.concatenate([xp, xq]))
        if values.size > 0.5 * (xp.size + xq.size):
            raise ValueError(
                f"ordering='likelihood' needs repeated values, got {values.size} distinct among "
                f"{xp.size + xq.size}; bin the statistic first or use ordering='low'"
            )
        pmf_p = np.bincount(np.searchsorted(values, xp), minlength=values.size) / xp.size
        pmf_q = np.bincount(np.searchsorted(values, xq), minlength=values.size) / xq.size
        return from_pmf(pmf_p, pmf_q)
    if ordering not in ("low", "high", "either"):
        raise ValueError(
            f"ordering must be 'low', 'high', 'either' or 'likelihood', got {ordering!r}"
        )
    points: list[tuple[FloatArray, FloatArray]] = []
    if ordering in ("low", "either"):
        points.append(error_curve(xp, xq)[1:])
    if ordering in ("high", "either"):
        points.append(error_curve(-xp, -xq)[1:])
    return convexify(
        np.concatenate([alpha for alpha, _ in points]), np.concatenate([beta for _, beta in points])
    )


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


@dataclass(frozen=True)
class Ordering:
    """How two trade-off functions f, g stand: lower means more influence."""

    relation: Literal["equal", "f_below", "g_below", "crossing"]
    crossings: tuple[float, ...]
    """Levels α at which f − g changes sign, rising."""
    max_above: float
    """Largest f − g, ≥ 0."""
    max_below: float
    """Largest g − f, ≥ 0."""


def compare(f: TradeOff, g: TradeOff, tolerance: float = 1e-9) -> Ordering:
    """Partial order of trade-off functions, with the levels at which they cross.

    Differences up to `tolerance` (in β) count as equal. The curves are compared at the vertices
    of piecewise-linear functions, at 2,001 even levels and at the ratio tests of both for losses
    from −40 to 40, which reach levels near 0 and 1 that an even grid would miss.
    """
    if not tolerance >= 0.0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance!r}")
    losses = np.linspace(-40.0, 40.0, 4001)
    levels = [np.linspace(0.0, 1.0, 2001)]
    for curve in (f, g):
        levels.append(curve.ratio_test(losses).alpha)
        if isinstance(curve, PiecewiseLinear):
            levels.append(curve.alpha)
    grid = np.unique(np.concatenate(levels))
    gap = f(grid) - g(grid)
    sign = np.where(gap > tolerance, 1, np.where(gap < -tolerance, -1, 0))
    decided = np.flatnonzero(sign)
    turns = np.flatnonzero(np.diff(sign[decided]))
    left, right = grid[decided[turns]], grid[decided[turns + 1]]
    start = sign[decided[turns]]
    for _ in range(60):
        middle = 0.5 * (left + right)
        same = (f(middle) - g(middle)) * start > 0.0
        left, right = np.where(same, middle, left), np.where(same, right, middle)
    relation: Literal["equal", "f_below", "g_below", "crossing"]
    if decided.size == 0:
        relation = "equal"
    elif turns.size:
        relation = "crossing"
    else:
        relation = "f_below" if sign[decided[0]] < 0 else "g_below"
    return Ordering(
        relation,
        tuple(float(x) for x in 0.5 * (left + right)),
        max(float(gap.max()), 0.0),
        max(float(-gap.min()), 0.0),
    )


@dataclass(frozen=True)
class EqualMeanExample:
    """Two examples of equal mean influence and different trade-off curves."""

    mean_change: float
    """Mean change of the accuracy by either example, in percentage points."""
    always: TradeOff
    """d1: changes the accuracy by 0.1 points in every run."""
    sometimes: TradeOff
    """d2: changes it by 1 point in one run out of ten, else not at all."""


def equal_mean_example(noise: float = 0.5) -> EqualMeanExample:
    """Averages mislead (Panda et al., figure 3): equal means, different influence.

    Without the example a run's accuracy is N(a, `noise`²), in percentage points; d1 adds 0.1
    always, d2 adds 1 with probability 0.1. Then T(P, Q) is G_{0.1/noise} for d1 and T of the
    mixture 0.9·N(0, 1) + 0.1·N(1/noise, 1) against N(0, 1) for d2. With `noise` = 0 d1 is told
    with certainty (f = 0) and d2 only when it acts (f = max(0, 1 − α/0.9)).
    The noise of the paper's figure is not known to us; 0.5 is our choice.
    """
    if not (np.isfinite(noise) and noise >= 0.0):
        raise ValueError(f"noise must be a standard deviation >= 0 in points, got {noise!r}")
    small, large, chance = 0.1, 1.0, 0.1
    if noise == 0.0:
        always: TradeOff = from_pmf([0.0, 1.0], [1.0, 0.0])
        sometimes: TradeOff = from_pmf([1.0 - chance, chance], [1.0, 0.0])
    else:
        always = GaussianTradeOff(small / noise)
        # H0 is the run with the example, hence the mixture stands first: the inverse of f_p.
        sometimes = MixedTradeOff(GaussianTradeOff(large / noise), chance).inverse()
    return EqualMeanExample(chance * large, always, sometimes)
