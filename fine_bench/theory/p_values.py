"""p-values of "this subset has no influence": by exchanging labels, and in closed form.

Samples of an arm are taken as independent and identically distributed, or, with ``paired=True``,
as exchangeable within a step only.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from scipy.special import ndtr, stdtr
from scipy.stats import rankdata

from fine_bench.theory.arrays import ArrayLike, FloatArray, check_arms

Alternative = Literal["two-sided", "greater", "less"]


def permutation_p_value(
    p: ArrayLike,
    q: ArrayLike,
    rng: np.random.Generator,
    *,
    statistic: Literal["mean", "rank"] = "mean",
    alternative: Alternative = "two-sided",
    paired: bool = False,
    n_permutations: int = 999,
) -> FloatArray:
    """p-value of "S has no influence" (P = Q) by exchanging labels; shapes as `estimate_mu`.

    p = (1 + #{permuted statistic at least as extreme}) / (1 + `n_permutations`): never 0, and
    valid in finite samples (Phipson and Smyth 2010). "greater" asks for P above Q (S helps).
    `paired`: labels are exchanged only within sample t of P and sample t of Q, which is valid
    when the signal drifts along the run but the two batches of one step are exchangeable.
    """
    xp, xq = check_arms(p, q, least=2)
    _check_alternative(alternative)
    n_p, n_q = xp.shape[-1], xq.shape[-1]
    if paired and n_p != n_q:
        raise ValueError(f"paired=True needs one P and one Q sample a step, got {n_p} and {n_q}")
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be >= 1, got {n_permutations!r}; try 999")
    if statistic not in ("mean", "rank"):
        raise ValueError(f"statistic must be 'mean' or 'rank', got {statistic!r}")
    pooled = np.concatenate([xp, xq], axis=-1)
    if statistic == "rank":
        pooled = rankdata(pooled, axis=-1)
    # Centred and scaled, so that "at least as extreme" can allow for rounding of equal sums.
    pooled = pooled - pooled.mean(-1, keepdims=True)
    scale = np.abs(pooled).max(-1, keepdims=True)
    pooled = pooled / np.where(scale > 0.0, scale, 1.0)
    sign = {"two-sided": 0.0, "greater": 1.0, "less": -1.0}[alternative]

    def extremity(total: FloatArray) -> FloatArray:
        return np.abs(total) if sign == 0.0 else sign * total

    # With the pooled sum fixed at 0 the P sum decides the difference of the means.
    observed = extremity(pooled[..., :n_p].sum(-1))
    tie = 1e-12 * (n_p + n_q)
    as_extreme = np.zeros(observed.shape)
    gaps = 0.5 * (pooled[..., :n_p] - pooled[..., n_p:]) if paired else None
    for _ in range(n_permutations):
        if gaps is not None:
            flips = 1.0 - 2.0 * rng.integers(0, 2, size=gaps.shape)
            total = (gaps * flips).sum(-1)
        else:
            total = rng.permuted(pooled, axis=-1)[..., :n_p].sum(-1)
        as_extreme += extremity(total) >= observed - tie
    return np.asarray((1.0 + as_extreme) / (1.0 + n_permutations), dtype=np.float64)


def analytic_p_value(
    p: ArrayLike,
    q: ArrayLike,
    *,
    statistic: Literal["mean", "rank"] = "mean",
    alternative: Alternative = "two-sided",
) -> FloatArray:
    """p-value of "S has no influence" in closed form; shapes as `estimate_mu`.

    "mean": Welch's t-test (unequal variances). "rank": Mann–Whitney with the normal limit,
    variance corrected for ties and ½ for continuity; from about 10 samples an arm. All samples
    equal gives 1: no evidence. Constant arms that differ have no Welch test and are refused.
    """
    xp, xq = check_arms(p, q, least=2)
    _check_alternative(alternative)
    n_p, n_q = xp.shape[-1], xq.shape[-1]
    if statistic == "mean":
        spread_p = np.where(np.ptp(xp, axis=-1) == 0.0, 0.0, xp.var(-1, ddof=1)) / n_p
        spread_q = np.where(np.ptp(xq, axis=-1) == 0.0, 0.0, xq.var(-1, ddof=1)) / n_q
        spread = spread_p + spread_q
        still = spread == 0.0
        if (still & (xp[..., 0] != xq[..., 0])).any():
            raise ValueError(
                "both samples are constant and differ: Welch's test has no noise to go by; "
                "use permutation_p_value or statistic='rank'"
            )
        shift = np.where(still, 0.0, xp.mean(-1) - xq.mean(-1))
        spread = np.where(still, 1.0, spread)
        freedom = spread**2 / (spread_p**2 / (n_p - 1) + spread_q**2 / (n_q - 1) + still)
        z = shift / np.sqrt(spread)
        tails = stdtr(freedom, z), stdtr(freedom, -z)
    elif statistic == "rank":
        pooled = np.concatenate([xp, xq], axis=-1)
        ranks = rankdata(pooled, axis=-1)
        n = n_p + n_q
        excess = ranks[..., :n_p].sum(-1) - 0.5 * n_p * (n + 1)
        # The variance of mid-ranks already contains the tie correction.
        variance = n_p * n_q / n * ranks.var(-1, ddof=1)
        still = variance == 0.0
        root = np.sqrt(np.where(still, 1.0, variance))
        tails = ndtr((excess + 0.5) / root), ndtr((0.5 - excess) / root)
    else:
        raise ValueError(f"statistic must be 'mean' or 'rank', got {statistic!r}")
    less, greater = tails
    if alternative == "two-sided":
        value = 2.0 * np.minimum(less, greater)
    else:
        value = greater if alternative == "greater" else less
    return np.asarray(np.where(still, 1.0, np.minimum(value, 1.0)), dtype=np.float64)


def _check_alternative(alternative: str) -> None:
    if alternative not in get_args(Alternative):
        raise ValueError(f"alternative must be one of {get_args(Alternative)}, got {alternative!r}")
