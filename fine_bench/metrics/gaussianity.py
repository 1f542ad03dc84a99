"""Is the shift Gaussian? What one number μ leaves out of the test of *with* against *without*.

μ orders examples completely only if the trade-off function of the two groups of models is G_μ.
Two looks at it: a test of normality of each group's statistic, example by example, and the
empirical error curve of a few examples beside the Gaussian one of their μ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtr, ndtri

from fine_bench.metrics._arrays import Vector
from fine_bench.metrics.retraining import Matrix, arms, checked
from fine_bench.seeds import derive
from fine_bench.theory.error_rates import error_curve

LEAST_FOR_NORMALITY = 20
"""Fewest models of a group for which normality is tested (the kurtosis needs them)."""


@dataclass(frozen=True, eq=False)
class Normality:
    """Tests of normality of the statistic, for models with (in) and without (out) each example.

    Attributes:
        p_in, p_out: ``(n,)`` p-values of D'Agostino and Pearson's K² (1973), of skewness and
            kurtosis together; NaN where the statistic is constant.
        skew_in, skew_out: ``(n,)`` skewness (bias corrected), 0 for a Gaussian.
        kurtosis_in, kurtosis_out: ``(n,)`` excess kurtosis (bias corrected), 0 for a Gaussian.
    """

    p_in: Vector
    p_out: Vector
    skew_in: Vector
    skew_out: Vector
    kurtosis_in: Vector
    kurtosis_out: Vector

    def summary(self, level: float = 0.05) -> dict[str, float]:
        """``share_rejected``, ``median_abs_skew``, ``median_kurtosis`` over examples and groups.

        Of Gaussian statistics about a share of ``level`` is rejected.
        """
        p = np.concatenate([self.p_in, self.p_out])
        skew = np.abs(np.concatenate([self.skew_in, self.skew_out]))
        kurtosis = np.concatenate([self.kurtosis_in, self.kurtosis_out])
        known = np.isfinite(p)
        if not known.any():
            return dict.fromkeys(
                ("share_rejected", "median_abs_skew", "median_kurtosis"), float("nan")
            )
        return {
            "share_rejected": float((p[known] < level).mean()),
            "median_abs_skew": float(np.median(skew[known])),
            "median_kurtosis": float(np.median(kurtosis[known])),
        }


def normality(members: NDArray[Any], statistic: NDArray[Any]) -> Normality:
    """Test of normality of every example's statistic in both groups of models.

    Args:
        members, statistic: ``(K, n)``, as in ``retraining.retraining_mu``; the margin is nearly
            Gaussian, the loss is skewed.

    Raises:
        ValueError: wrong shapes, or a group of fewer than ``LEAST_FOR_NORMALITY`` models.
    """
    inside, x = checked(members, statistic)
    n_in = inside.sum(axis=0)
    fewest = int(min(n_in.min(), len(inside) - n_in.max()))
    if fewest < LEAST_FOR_NORMALITY:
        raise ValueError(
            f"normality needs at least {LEAST_FOR_NORMALITY} models with and without each example, "
            f"some example has {fewest}; retrain more models"
        )
    found = {name: np.full(inside.shape[1], np.nan) for name in Normality.__dataclass_fields__}
    for columns, p, q in arms(inside, x):
        for side, samples in (("in", p), ("out", q)):
            varied = np.ptp(samples, axis=1) > 0
            where, rows = columns[varied], samples[varied]
            if not len(where):
                continue
            found[f"p_{side}"][where] = stats.normaltest(rows, axis=1).pvalue
            found[f"skew_{side}"][where] = stats.skew(rows, axis=1, bias=False)
            found[f"kurtosis_{side}"][where] = stats.kurtosis(rows, axis=1, bias=False)
    return Normality(**found)


@dataclass(frozen=True, eq=False)
class CurveFit:
    """An example's empirical error curve and the Gaussian one of its μ.

    Attributes:
        alpha, beta: ``(K + 1,)`` errors of "reject when x < τ" at every τ; alpha rises.
        gaussian: ``(K + 1,)`` Φ(Φ⁻¹(1 − α) − μ), the curve of G_μ where μ ≥ 0 (for μ < 0 it is the
            error curve of this one-sided test, which is no trade-off function).
        mu: the "moment" estimate, signed.
        distance: largest |beta − gaussian|.
        expected: what ``distance`` stays below in 95 % of Gaussian samples of the same sizes and
            μ, each with its own μ̂, by simulation.
    """

    alpha: Vector
    beta: Vector
    gaussian: Vector
    mu: float
    distance: float
    expected: float

    @property
    def is_gaussian(self) -> bool:
        """Whether the distance is one that Gaussian samples would show."""
        return self.distance <= self.expected


def curve_fit(
    members: NDArray[Any],
    statistic: NDArray[Any],
    example: int,
    *,
    n_simulations: int = 400,
    seed: int = 0,
) -> CurveFit:
    """The empirical trade-off of one example beside its Gaussian fit.

    Args:
        members, statistic: ``(K, n)``, as in ``retraining.retraining_mu``.
        example: position of the example.
        n_simulations: Gaussian samples behind ``expected``, ≥ 20.
        seed: of the simulation.

    Raises:
        ValueError: wrong shapes, no such example, fewer than two models on a side, or a statistic
            that does not vary.
    """
    inside, x = checked(members, statistic)
    n = inside.shape[1]
    if not 0 <= example < n:
        raise ValueError(f"example must be from 0 to {n - 1}, got {example}")
    if n_simulations < 20:
        raise ValueError(f"n_simulations must be at least 20, got {n_simulations}; try 400")
    mask, values = inside[:, example], x[:, example]
    p, q = values[mask], values[~mask]
    if min(len(p), len(q)) < 2:
        raise ValueError(
            f"example {example} is in {len(p)} of {len(mask)} models; both groups need two or more"
        )
    if np.ptp(p) == 0 and np.ptp(q) == 0:
        raise ValueError(f"the statistic of example {example} does not vary: there is no curve")
    alpha, beta, gaussian, mu = _curves(p[None], q[None])
    rng = np.random.default_rng(derive(seed, "metrics/curve fit"))
    drawn_p = rng.standard_normal((n_simulations, len(p))) + mu[0]
    drawn_q = rng.standard_normal((n_simulations, len(q)))
    _, simulated, fitted, _ = _curves(drawn_p, drawn_q)
    return CurveFit(
        alpha=alpha[0],
        beta=beta[0],
        gaussian=gaussian[0],
        mu=float(mu[0]),
        distance=float(np.abs(beta - gaussian).max()),
        expected=float(np.quantile(np.abs(simulated - fitted).max(axis=1), 0.95)),
    )


def _curves(p: Matrix, q: Matrix) -> tuple[Matrix, Matrix, Matrix, Vector]:
    """Empirical and Gaussian error curves and μ̂ of each row of ``p (r, K₁)``, ``q (r, K₀)``."""
    scatter = p.var(axis=1) * p.shape[1] + q.var(axis=1) * q.shape[1]
    mu = (p.mean(axis=1) - q.mean(axis=1)) / np.sqrt(scatter / (p.shape[1] + q.shape[1] - 2))
    _, alpha, beta = error_curve(p, q)
    return alpha, beta, ndtr(-ndtri(alpha) - mu[:, None]), mu
