"""What retraining shows: the influence of every training example, from models with and without it.

A bank trains K models on random subsets of n examples. For example i, P are the models whose
subset holds it and Q those whose subset does not. The statistic x of example i is its own margin
(or minus its own loss), larger when the data lower its loss; the test rejects "saw i" when x < τ,

    μ_i = Φ⁻¹(1 − α) − Φ⁻¹(β),   α = P(x < τ),  β = Q(x ≥ τ),

so μ_i > 0 where seeing i raises its own margin. All other members of a subset are drawn anew with
every model: their effect is in the noise that μ_i is measured by.

The formulas are those of ``fine_bench.theory.estimation``. Examples that are in equally many models
are computed together, so all n examples cost a few passes over the array.

Every interval takes the models as independent: one model a subset, subsets drawn independently of
each other. Several seeds on one subset are no further models in this sense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fine_bench.metrics._arrays import Vector, as_array
from fine_bench.theory.estimation import InfluenceEstimate, estimate_mu

Method: TypeAlias = Literal["moment", "rank", "two_stage"]
Matrix: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

LEAST_PER_ARM = 8
"""Fewest models with and without an example for which anything is estimated."""


@dataclass(frozen=True, eq=False)
class RetrainingMu:
    """Signed μ of every example with its interval.

    Attributes:
        mu, std_error, lower, upper: ``(n,)`` float64. ``mu`` is ±inf where the two groups of models
            do not overlap ("rank") and NaN where the statistic does not vary, never a stand-in 0.
        n_in, n_out: ``(n,)`` int64, models with and without each example.
        reason: ``(n,)``, why an end of the interval is infinite; "" elsewhere.
        level: nominal coverage of each interval.
        method: how it was estimated.
    """

    mu: Vector
    std_error: Vector
    lower: Vector
    upper: Vector
    n_in: NDArray[np.int64]
    n_out: NDArray[np.int64]
    reason: NDArray[np.str_]
    level: float
    method: Method


def retraining_mu(
    members: NDArray[Any],
    statistic: NDArray[Any],
    method: Method = "moment",
    level: float = 0.95,
) -> RetrainingMu:
    """μ of every example.

    - "moment": (mean_in − mean_out) / pooled standard deviation (n − 1 in each arm). The standard
      error is that of its influence function, so it stays right for skewed statistics and unequal
      variances, where sqrt(1/K₁ + 1/K₀ + μ²/(2(K − 2))) does not; Student's interval with K − 2.
      With Gaussian noise its mean is μ/J(K − 2), J(m) ≈ 1 − 3/(4m − 1): 0.4 % above μ at 200
      models, the same factor for all examples of one count.
    - "rank": √2 Φ⁻¹(AUC), unchanged by monotone transforms; standard error of DeLong. Where the
      groups hardly overlap it is too high: by 3 to 4 % at μ = 3 with 100 models, simulated.
    - "two_stage": models alternate between two halves, in their order within each arm. The first
      half chooses the threshold, the second measures α and β on it with Clopper–Pearson intervals.

    Args:
        members: ``(K, n)`` boolean, which examples each model was trained on.
        statistic: ``(K, n)`` finite, each example's own statistic under each model.
        method: the estimate.
        level: of the intervals, in (0, 1).

    Raises:
        ValueError: an unknown method, wrong shapes, values that are not finite, or an example with
            fewer than ``LEAST_PER_ARM`` models on either side.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    inside, x = checked(members, statistic)
    require_models(inside)
    n = inside.shape[1]
    numbers = {name: np.empty(n) for name in ("mu", "std_error", "lower", "upper")}
    reason = np.empty(n, dtype=object)
    for columns, p, q in arms(inside, x):
        found: InfluenceEstimate = estimate_mu(p, q, method, level)
        for name, array in numbers.items():
            array[columns] = getattr(found, name)
        reason[columns] = found.reason
    n_in = inside.sum(axis=0, dtype=np.int64)
    return RetrainingMu(
        **numbers,
        n_in=n_in,
        n_out=len(inside) - n_in,
        reason=reason.astype(np.str_),
        level=level,
        method=method,
    )


def moment_mu(members: NDArray[Any], statistic: NDArray[Any], weights: NDArray[Any]) -> Matrix:
    """The "moment" estimate alone, for many selections of the models at once.

    The arms' sums of x and x² over all selections are matrix products.

    Args:
        members, statistic: ``(K, n)``, as in ``retraining_mu``.
        weights: ``(R, K)`` of 0 and 1, one row a selection of models.

    Returns:
        ``(R, n)`` float64; NaN where an arm of a selection has no model or the statistic does not
        vary in it.
    """
    inside, x = checked(members, statistic)
    chosen = np.asarray(weights, dtype=np.float64)
    if chosen.ndim != 2 or chosen.shape[1] != len(inside):
        raise ValueError(f"weights must have shape (R, {len(inside)}), got {chosen.shape}")
    # centred, so that the difference of squares below keeps its digits
    x = x - x.mean(axis=0)
    present = inside.astype(np.float64)
    held = present * x
    n_in, sum_in, square_in = chosen @ present, chosen @ held, chosen @ (held * x)
    n_out = chosen.sum(axis=1, keepdims=True) - n_in
    sum_out, square_out = chosen @ x - sum_in, chosen @ (x * x) - square_in
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_in, mean_out = sum_in / n_in, sum_out / n_out
        scatter = square_in - sum_in * mean_in + square_out - sum_out * mean_out
        # rounding leaves a constant statistic a scatter of its last digits
        noise = 1e-12 * (square_in + square_out)
        deviation = np.sqrt(np.where(scatter > noise, scatter, np.nan) / (n_in + n_out - 2))
        mu = (mean_in - mean_out) / deviation
    return np.asarray(np.where((n_in >= 1) & (n_out >= 1), mu, np.nan), dtype=np.float64)


def effect(members: NDArray[Any], values: NDArray[Any]) -> Vector:
    """Mean over the models with each example minus mean over those without, ``(n,)``.

    In the units of ``values (K, n)``: of the margin it is positive where seeing an example helps
    it, of the loss *negative*. NaN where every model, or none, has the example.

    It is also the value that data valuation calls *Data Banzhaf* (Wang, Jia: *Data Banzhaf: A
    Robust Data Valuation Framework for Machine Learning*, AISTATS 2023, arXiv:2205.15466), for
    the utility U_i(S) = the values that i has under a model trained on S: the margin of i itself,
    or, with one column for all examples, the mean margin of some queries. By definition

        φ_i = 2^{−(n−1)} Σ_{S ∌ i} [U_i(S ∪ {i}) − U_i(S)].

    Draw S with every example in it with probability 1/2, independently. S without i is then
    uniform over the 2^{n−1} subsets of the others, whether i is in S or not, so

        φ_i = E[U_i(S) | i ∈ S] − E[U_i(S) | i ∉ S],

    and the difference of the two means over all drawn S is its *maximum-sample-reuse* estimate:
    each model serves every example. A bank draws subsets of exactly n/2 instead, so that i enters
    beside n/2 − 1 others and is missing from n/2: the S ∋ i are one other example poorer.
    Averages over S concentrate at that size anyway (|S| = n/2 ± √n/2 in the definition), and the
    one example is a change of order 1/n in utility that is the same for all i.
    """
    inside, x = checked(members, values)
    n_in = inside.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            np.sum(x * inside, axis=0) / n_in - np.sum(x * ~inside, axis=0) / (len(x) - n_in)
        )


def out_of_sample(members: NDArray[Any], values: NDArray[Any]) -> Vector:
    """Mean of ``values (K, n)`` over the models that never saw the example, ``(n,)``.

    How well the rest of the data predicts it. NaN where every model has the example.
    """
    inside, x = checked(members, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sum(x * ~inside, axis=0) / np.sum(~inside, axis=0))


# Pieces shared by the other metrics of retraining ---------------------------------------------


def checked(members: NDArray[Any], statistic: NDArray[Any]) -> tuple[Mask, Matrix]:
    """Both arrays, refused unless ``(K, n)``, boolean and finite."""
    inside = np.asarray(members)
    if inside.dtype != np.bool_ or inside.ndim != 2 or inside.size == 0:
        raise ValueError(
            f"members must be boolean of shape (K, n), models by examples, got {inside.dtype} of "
            f"shape {inside.shape}"
        )
    x = as_array(statistic, "statistic")
    if x.shape != inside.shape:
        raise ValueError(
            f"statistic must have the shape of members, {inside.shape}, got {x.shape}; row k holds "
            "each example's own statistic under model k"
        )
    return inside, x


def models_for_counts(n: int, keep: float, least: int = LEAST_PER_ARM, miss: float = 0.05) -> int:
    """Models needed so that every example has enough of them on both sides.

    The smallest K with n·(P(B < least) + P(K − B < least)) ≤ miss, B ~ Binomial(K, keep): a union
    bound over the n examples of subsets that take each example independently.

    Args:
        n: number of examples.
        keep: share of the examples in a subset, in (0, 1).
        least: models wanted with and without each example, ≥ 1.
        miss: probability that some example falls short.
    """
    if not 0.0 < keep < 1.0:
        raise ValueError(f"keep must lie strictly between 0 and 1, got {keep!r}; try 0.5")

    def short(k: int) -> bool:
        both = stats.binom.cdf(least - 1, k, keep) + stats.binom.cdf(least - 1, k, 1.0 - keep)
        return bool(n * both > miss)

    high = 2 * least
    while short(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if short(middle) else (low, middle)
    return high


def require_models(members: Mask, least: int = LEAST_PER_ARM) -> None:
    """Refuse a bank in which some example has fewer than ``least`` models on either side."""
    n_in = members.sum(axis=0)
    fewest_in, fewest_out = int(n_in.min()), int(len(members) - n_in.max())
    if min(fewest_in, fewest_out) >= least:
        return
    keep = min(max(float(members.mean()), 0.05), 0.95)
    raise ValueError(
        f"too few models: of {len(members)}, some example is in only {fewest_in} and some example "
        f"is outside of only {fewest_out}, at least {least} of both are needed; about "
        f"{models_for_counts(members.shape[1], keep, least)} models on random subsets of "
        f"{keep:.0%} suffice for all {members.shape[1]:,} examples"
    )


def arms(members: Mask, values: Matrix) -> Iterator[tuple[NDArray[np.int64], Matrix, Matrix]]:
    """``(examples, P, Q)`` for every number K₁ of models that have an example.

    ``P (m, K₁)`` and ``Q (m, K − K₁)`` are the statistics of the ``m`` examples, in the models'
    order.
    """
    n_in = members.sum(axis=0)
    inside, x = members.T, values.T
    for count in np.unique(n_in):
        columns = np.flatnonzero(n_in == count)
        mask, rows = inside[columns], x[columns]
        yield columns, rows[mask].reshape(len(columns), -1), rows[~mask].reshape(len(columns), -1)
