"""The two error rates of a test from samples, their intervals, and the μ of one test.

The test rejects H0 when x < τ; α̂(τ) is the share of P samples below τ, β̂(τ) the share of Q samples
at or above it, and μ = Φ⁻¹(1 − α) − Φ⁻¹(β).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, ndtri

from fine_bench.theory.arrays import (
    ArrayLike,
    FloatArray,
    check_arms,
    check_level,
    check_probability,
)


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
    xp, xq = check_arms(p, q)
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


def clopper_pearson(
    hits: ArrayLike, trials: ArrayLike, level: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Exact two-sided interval of a probability after `hits` of `trials` (arrays, same shape).

    Clopper and Pearson (1934): quantiles of Beta(k, n − k + 1) and Beta(k + 1, n − k). Covers at
    least at `level` for every true probability.
    """
    check_level(level)
    k, n = np.broadcast_arrays(
        np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    )
    if not ((n >= 1) & (k >= 0) & (k <= n)).all():
        raise ValueError("clopper_pearson needs trials >= 1 and 0 <= hits <= trials")
    miss = 0.5 - 0.5 * level
    none, every = k == 0, k == n
    low = betaincinv(np.where(none, 1.0, k), n - k + 1.0, miss)
    high = betaincinv(k + 1.0, np.where(every, 1.0, n - k), 1.0 - miss)
    return np.where(none, 0.0, low), np.where(every, 1.0, high)


def shrunk(rate: FloatArray, n: int) -> FloatArray:
    """(k + ½)/(n + 1) for a rate k/n: inside (0, 1), so that Φ⁻¹ is finite."""
    return (rate * n + 0.5) / (n + 1.0)


def rate_error(
    alpha: FloatArray, beta: FloatArray, n_p: int | FloatArray, n_q: int | FloatArray
) -> FloatArray:
    """Standard error of Φ⁻¹(1 − α̂) − Φ⁻¹(β̂) at a fixed threshold: binomial, through Φ⁻¹."""

    def part(rate: FloatArray, n: int | FloatArray) -> FloatArray:
        density_squared = np.exp(-(ndtri(rate) ** 2)) / (2.0 * np.pi)
        return np.asarray(rate * (1.0 - rate) / (n * density_squared), dtype=np.float64)

    return np.asarray(np.sqrt(part(alpha, n_p) + part(beta, n_q)), dtype=np.float64)
