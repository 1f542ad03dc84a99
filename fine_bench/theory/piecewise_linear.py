"""Trade-off functions with corners: of finite distributions, of samples, of any set of tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.optimize import isotonic_regression

from fine_bench.theory.arrays import ArrayLike, FloatArray, check_probability, check_samples
from fine_bench.theory.error_rates import error_curve
from fine_bench.theory.tradeoff import RatioTest, TradeOff, check_epsilon

# Rounding that a vertex may carry before it counts as a broken curve.
_VERTEX_TOLERANCE = 1e-12


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
        eps = check_epsilon(epsilon)
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
