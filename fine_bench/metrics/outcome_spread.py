"""How much does a query's outcome differ from run to run, and do its scores foretell it?

The LDS asks for the *mean* outcome of many runs. Two runs on the same examples still differ, and
for some queries far more than for others. To first order the scores of one query say by how much:
a run that draws example i with weight 1 + ε_i, its ε independent with variance v, moves the query's
margin by Σ_i ε_i (s_i − s̄), so that over runs

    spread_q ∝ sqrt( Σ_i (score[q, i] − s̄_q)² ),     s̄_q the mean over the examples.

That is the noise of f-INE's accumulated statistic, of any scores. Only the order of the queries is
used, so neither v nor the scores' unit matters; but scores whose unit changes from query to query
(cosines, or μ, which is divided by this very noise) have given it away.

What a truth holds for it: margins of each query after training on each of many subsets, averaged
over two disjoint groups of a and b seeds, A and B. Their difference has the variance σ²(1/a + 1/b),
so

    σ_q² = mean over subsets of (A − B)² / (1/a + 1/b),

and the measure is Spearman's correlation of predicted and measured spread over the queries.

What of the *whole* distribution, subset by subset? The squared 2-Wasserstein distance of the
outcomes after two subsets S, S' is, for Gaussians, (m − m')² + (σ − σ')². ``mean_share`` says how
much of it is the first term. Where nearly all is, the order of the subsets by distance is that by
mean, which the LDS measures. A rank correlation with the spread after *each subset* would need the
single margins of at least four seeds a subset, two groups for the spread and two for its ceiling;
the frozen truths hold two means.
"""

from __future__ import annotations

from math import nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fine_bench.metrics._arrays import ArrayLike, Vector, as_array
from fine_bench.metrics.fidelity import FIDELITY, VERSION
from fine_bench.metrics.registry import Metric
from fine_bench.metrics.reliability import LEAST_FOR_CORRELATION, ceiling_of, spearman

METRICS = (
    Metric("outcome_spread", "spread over runs", "higher", table=FIDELITY, beside=VERSION, rank=28,
           title="rank correlation with each query's spread over runs",
           note="Spread over runs: rank correlation, over the queries, of the root of the summed "
                "squares of a query's centred scores with how much its margin differs between runs "
                "on the same examples."),
    Metric("outcome_spread_of_ceiling", "spread over runs, of ceiling", "higher", table=""),
)  # fmt: skip
"""Computed by the ground truth (``retraining.truth``)."""


class Share(NamedTuple):
    """What the squared Wasserstein distance between two subsets' outcomes is made of.

    Attributes:
        mean: share of the difference of the means, in [0, 1].
        variation: coefficient of variation of σ² over the subsets, within a query. An upper
            bound: tails of single outcomes heavier than a Gaussian's count as variation.
    """

    mean: float
    variation: float


def predicted_spread(scores: ArrayLike) -> Vector:
    """sqrt(Σ_i (s_qi − s̄_q)²), ``(q,)``, from scores ``(q, n)``; 0 for constant ones."""
    values = as_array(scores, "scores")
    if values.ndim != 2:
        raise ValueError(f"scores must have shape (q, n), got {values.shape}")
    found = np.sqrt(((values - values.mean(axis=1, keepdims=True)) ** 2).sum(axis=1))
    # a constant's mean is rounded, and its deviations with it
    return np.asarray(np.where(np.ptp(values, axis=1) == 0, 0.0, found))


def measured_spread(first: NDArray[Any], second: NDArray[Any], n_seeds: int) -> Vector:
    """Deviation σ_q of a query's margin between single runs, ``(q,)``, in logits.

    Args:
        first, second: ``(subsets, q)``, means over two disjoint groups of half of the seeds each.
        n_seeds: seeds a subset of both groups together, ≥ 2; of an odd number the first group has
            one more.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or fewer than two seeds.
    """
    a, b = as_array(first, "first"), as_array(second, "second")
    if a.ndim != 2 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"first and second must have one shape (subsets, q), got {a.shape} and {b.shape}"
        )
    if n_seeds < 2:
        raise ValueError(
            f"a spread over runs needs at least two seeds a subset, got n_seeds={n_seeds}; train "
            "on each subset again"
        )
    small = n_seeds // 2
    inverse = 1 / (n_seeds - small) + 1 / small
    return np.asarray(np.sqrt(((a - b) ** 2).mean(axis=0) / inverse))


def outcome_spread(scores: ArrayLike, measured: NDArray[Any]) -> float:
    """Spearman's correlation of the scores' and the measured spread over the queries.

    Args:
        scores: ``(q, n)``.
        measured: ``(q,)``, from ``measured_spread``.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    predicted, truth = predicted_spread(scores), as_array(measured, "measured")
    if predicted.shape != truth.shape:
        raise ValueError(
            f"measured must have one number a query, shape {predicted.shape}, got {truth.shape}"
        )
    if len(truth) < LEAST_FOR_CORRELATION or np.ptp(predicted) == 0:
        return nan
    return spearman(predicted, truth)


def spread_ceiling(one: NDArray[Any], other: NDArray[Any]) -> float:
    """sqrt(ρ) of the spreads that two equally large halves of the subsets show, ``(q,)`` each."""
    if len(one) < LEAST_FOR_CORRELATION:
        return nan
    return ceiling_of(spearman(np.asarray(one), np.asarray(other)))


def mean_share(first: NDArray[Any], second: NDArray[Any], n_seeds: int) -> Share:
    """How much of the squared Wasserstein distance between subsets is that of the means.

    With d = A − B of a query and its mean square over the subsets as the unit, a σ² that is the
    same after every subset gives a Gaussian d: its fourth moment is 3m/(m + 2) over m subsets. What
    is beyond, 3·c² with c the coefficient of variation of σ², is the variation between subsets;
    of σ itself it is c/2 to first order. The variance of the means is that of (A + B)/2 less the
    seeds' part of it, a quarter of the variance of d.

    Args:
        first, second, n_seeds: as in ``measured_spread``; at least 10 subsets.
    """
    sigma2 = measured_spread(first, second, n_seeds) ** 2
    a, b = as_array(first, "first"), as_array(second, "second")
    m = len(a)
    if m < LEAST_FOR_CORRELATION:
        raise ValueError(
            f"a share needs at least {LEAST_FOR_CORRELATION} subsets, got {m}; train on more"
        )
    unit = (a - b) ** 2
    unit = unit / unit.mean(axis=0)
    c2 = max(float((unit**2).mean()) - 3 * m / (m + 2), 0.0) / 3
    noise = ((a - b) ** 2).mean(axis=0) / 4
    between = np.maximum(((a + b) / 2).var(axis=0, ddof=1) - noise, 0.0).mean()
    within = float(sigma2.mean()) * c2 / 4
    return Share(float(between / (between + within)), c2**0.5)
