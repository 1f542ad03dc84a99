"""The bridge between trade-off functions and (ε, δ) privacy, and what a μ says as privacy.

f is known by its dual δ(ε) = 1 + f*(−e^ε): the smallest δ with Q(A) ≤ e^ε P(A) + δ for all events A
(Dong, Roth and Su 2019, section 2.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom

from fine_bench.theory.arrays import ArrayLike, FloatArray, check_level, check_probability
from fine_bench.theory.families import GaussianTradeOff
from fine_bench.theory.piecewise_linear import PiecewiseLinear, convexify
from fine_bench.theory.tradeoff import MAX_LOSS


def mu_from_epsilon_delta(epsilon: float, delta: float) -> float:
    """The μ whose Gaussian dual passes through (ε, δ): δ_μ(ε) = `delta`, `epsilon` ≥ 0.

    G_μ is the Gaussian curve that is exactly (ε, δ)-indistinguishable at this one ε.
    """
    check_probability(delta, "delta")
    if not (np.isfinite(epsilon) and epsilon >= 0.0) or delta == 1.0:
        raise ValueError(
            f"need a finite epsilon >= 0 and delta < 1, got epsilon={epsilon!r}, delta={delta!r}; "
            "delta = 1 holds for every mu"
        )
    if delta == 0.0:
        return 0.0

    def excess(mu: float) -> float:
        return float(GaussianTradeOff(mu).delta(epsilon)) - delta

    high = 1.0
    while excess(high) < 0.0:
        high *= 2.0
    return float(brentq(excess, 0.0, high, xtol=1e-14, rtol=1e-15))


def epsilon_delta_trade_off(epsilon: float, delta: float) -> PiecewiseLinear:
    """f_{ε,δ}(α) = max(0, 1 − δ − e^ε α, e^−ε(1 − δ − α)), ε ≥ 0: what one (ε, δ) guarantees."""
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be >= 0 for a guarantee in both orders, got {epsilon!r}")
    return trade_off_from_delta([epsilon], [delta])


def trade_off_from_delta(
    epsilon: ArrayLike, delta: ArrayLike, both_orders: bool = True
) -> PiecewiseLinear:
    """Largest f that the points (ε_k, δ_k) of a dual curve guarantee: sup_k 1 − δ_k − e^{ε_k} α.

    `epsilon`, `delta`: (k,). With `both_orders` each point also holds with P and Q exchanged, as
    in differential privacy, which adds the lines e^−ε(1 − δ − α); without it the points should
    span negative ε too. Exact at every given point; between them it lies below the truth.
    """
    eps = np.asarray(epsilon, dtype=np.float64)
    dlt = check_probability(delta, "delta")
    if eps.ndim != 1 or eps.shape != dlt.shape or eps.size == 0:
        raise ValueError(
            f"epsilon and delta must be equal 1-d arrays, got {eps.shape}, {dlt.shape}"
        )
    if not (np.abs(eps) <= MAX_LOSS).all():
        raise ValueError(f"epsilon must be finite and within ±{MAX_LOSS:.0f}; drop other points")
    below = dlt < -np.expm1(np.minimum(eps, 0.0)) - 1e-12
    if below.any():
        at = int(np.argmax(below))
        raise ValueError(
            f"delta({eps[at]:.6g}) = {dlt[at]:.6g} is below 1 - e^epsilon, which even two equal "
            "distributions have; check the sign of epsilon"
        )
    if both_orders:
        eps, dlt = np.append(eps, -eps), np.append(dlt, 1.0 - np.exp(-eps) * (1.0 - dlt))
    # A line of slope −t and height 1 − δ: the useful lines are the lower hull of the points
    # (t, δ), which starts at (0, 1), and neighbours meet at α = −(slope of that hull).
    t = np.append(0.0, np.exp(eps))
    dlt = np.append(1.0, dlt)
    order = np.lexsort((dlt, t))
    t, dlt = t[order], np.minimum.accumulate(dlt[order])
    hull = [0]
    for i in range(1, t.size):
        if t[i] == t[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (dlt[b] - dlt[a]) * (t[i] - t[b]) < (dlt[i] - dlt[b]) * (t[b] - t[a]):
                break
            hull.pop()
        hull.append(i)
    t, dlt = t[hull], dlt[hull]
    alpha = np.clip(-np.diff(dlt) / np.diff(t), 0.0, 1.0)
    beta = np.clip(1.0 - dlt[1:] - t[1:] * alpha, 0.0, 1.0)
    return convexify(np.append(alpha, 0.0), np.append(beta, 1.0 - dlt[-1]))


def one_run_epsilon(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95
) -> float:
    """Lower bound on ε from one run with canaries; 0 where nothing is shown.

    Each of `canaries` examples is put into the run by a fair coin; `guesses` of the coins are
    guessed from the outcome, the others left out, and `correct` guesses are right. Under
    (ε, δ)-differential privacy, with q = e^ε/(1 + e^ε) and B ~ Binomial(guesses, q),

        P(correct ≥ v) ≤ P(B ≥ v) + 2 · canaries · δ · max_{1 ≤ i ≤ v} P(v − i ≤ B < v)/i

    (Steinke, Nasr and Jagielski 2023, *Privacy auditing with one (1) training run*). The largest ε
    at which that is below 1 − `confidence` is refuted, and so is every smaller one.
    """
    check_level(confidence)
    check_probability(delta, "delta")
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise ValueError(
            f"need 0 <= correct <= guesses <= canaries, got {correct!r}, {guesses!r}, {canaries!r}"
        )

    def excess(epsilon: float) -> float:
        q = 1.0 / (1.0 + np.exp(-epsilon))
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, q))
        worst = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
        bound = float(binom.sf(correct - 1, guesses, q)) + 2.0 * canaries * delta * worst
        return bound - (1.0 - confidence)

    high = 1.0
    if excess(0.0) >= 0.0:
        return 0.0
    while excess(high) < 0.0:
        high *= 2.0
    return float(brentq(excess, 0.0, high, xtol=1e-10))


@dataclass(frozen=True)
class PrivacyCurve:
    """The (ε, δ) curve of a μ, with the sentence that says which side it bounds. Prints as text."""

    mu: float
    """Gaussian influence |μ|."""
    source: Literal["statistic", "composition"]
    bound: Literal["lower", "upper"]
    epsilon: FloatArray
    """(k,), ≥ 0."""
    delta: FloatArray
    """(k,), δ(ε) of G_μ."""
    statement: str

    def __str__(self) -> str:
        rows = [
            f"{eps:>10.4g}  {dlt:>12.4e}" for eps, dlt in zip(self.epsilon, self.delta, strict=True)
        ]
        return "\n".join([self.statement, f"{'epsilon':>10}  {'delta':>12}", *rows])


def privacy_curve(
    mu: float,
    source: Literal["statistic", "composition"],
    epsilon: ArrayLike = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
) -> PrivacyCurve:
    """(ε, δ) table that `mu` implies: δ(ε) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2).

    `source`: "statistic" for the μ̂ of one statistic (signed values allowed; the sign says who is
    helped, the curve depends on |μ| alone): a lower bound on what can be told, and only as sure
    as μ̂ itself, so pass the end of its interval nearer 0 for a bound at the interval's level.
    "composition" for a μ composed over steps (≥ 0): an upper bound for a reader of the statistic at
    every step, if the per-step values are themselves upper bounds.
    """
    eps = _check_table_epsilon(epsilon)
    if not np.isfinite(mu):
        raise ValueError(
            f"mu must be finite, got {mu!r}; an estimate without a finite value implies no curve: "
            "draw more samples, or pass the finite end of its interval"
        )
    size = abs(float(mu))
    if source == "statistic":
        bound: Literal["lower", "upper"] = "lower"
        statement = (
            f"Lower bound: |mu| = {size:.4g} is what one statistic shows. Whoever reads this "
            "statistic can tell at least this much; a reader of more may tell more."
        )
    elif source == "composition":
        if mu < 0.0:
            raise ValueError(
                f"a composed mu bounds |mu| and has no sign, got {mu!r}; use compose_mu()"
            )
        bound = "upper"
        statement = (
            f"Upper bound: mu = {size:.4g} is composed over the steps. Whoever reads the statistic "
            "at every step can tell no more, if the per-step values hold."
        )
    else:
        raise ValueError(f"source must be 'statistic' or 'composition', got {source!r}")
    return PrivacyCurve(size, source, bound, eps, GaussianTradeOff(size).delta(eps), statement)


def _check_table_epsilon(epsilon: ArrayLike) -> FloatArray:
    eps = np.atleast_1d(np.asarray(epsilon, dtype=np.float64))
    if eps.ndim != 1 or not (eps >= 0.0).all() or not np.isfinite(eps).all():
        raise ValueError(f"epsilon must be finite numbers >= 0 in one dimension, got {epsilon!r}")
    return eps
