"""Intervals over seeds: how far would the mean move with other run seeds?

The bootstrap resamples *seeds*, never pairs: the pairs of R runs share their runs, and treating
R(R − 1)/2 of them as independent would make every interval too short.

What such an interval can promise is limited by R, and no resampling mends that: with three seeds
the 95 % percentile interval reaches from the smallest to the largest value, which for symmetric
noise covers the true mean 1 − 2/2³ = 75 % of the time; simulated with normal noise it is 0.84 for
five seeds, 0.86 for six, 0.90 for ten. So an interval that excludes zero is not yet significant.
Marks of significance need an exact sign-flip test besides, and six seeds, the smallest number at
which that test can reach 5 % (2/2⁶ = 3.1 %).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import factorial, isfinite, prod
from typing import NamedTuple

import numpy as np

from fine_bench.metrics._arrays import Vector
from fine_bench.seeds import derive

MIN_SEEDS_FOR_SIGNIFICANCE = 6

# 8 seeds have 6,435 distinct resamples, 10 have 92,378
MAX_EXACT_SEEDS = 8
MONTE_CARLO_RESAMPLES = 20_000
# up to 4,096 sign patterns in the sign-flip test
MAX_EXACT_SIGNS = 12


class Interval(NamedTuple):
    """A mean and its interval; NaN where undefined."""

    mean: float
    lower: float
    upper: float


UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


@lru_cache(maxsize=32)
def resamples(n: int) -> tuple[Vector, Vector]:
    """All resamples of n seeds with their probabilities, or a Monte-Carlo sample of them.

    Returns ``counts (n_resamples, n)``, how often each seed was drawn, and ``weights`` summing
    to 1. The n^n ordered resamples collapse to C(2n − 1, n) multisets with multinomial weights.
    """
    if n > MAX_EXACT_SEEDS:
        generator = np.random.default_rng(derive(n, "metrics/bootstrap"))
        counts = generator.multinomial(n, np.full(n, 1 / n), size=MONTE_CARLO_RESAMPLES)
        return counts.astype(np.float64), np.full(len(counts), 1 / len(counts))
    # n draws as n "stars" separated by n − 1 "bars" in 2n − 1 places
    bars = np.array(list(combinations(range(2 * n - 1), n - 1)), dtype=np.int64)
    ends = np.full((len(bars), 1), 2 * n - 1)
    counts = np.diff(np.hstack([np.full_like(ends, -1), bars, ends]), axis=1) - 1
    orders = np.array([factorial(n) // prod(map(factorial, row)) for row in counts.tolist()])
    return counts.astype(np.float64), orders / float(n) ** n


@lru_cache(maxsize=32)
def pair_resamples(n: int) -> tuple[Vector, Vector, Vector]:
    """The resamples of n seeds that hold a pair, their weights, and their numbers of pairs.

    Ordered pairs of draws that hit distinct seeds; the factor of two cancels.
    """
    counts, weights = resamples(n)
    n_pairs = n**2 - (counts**2).sum(axis=1)
    kept = n_pairs > 0
    return counts[kept], weights[kept], n_pairs[kept]


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}; 0.95 is usual")


def percentiles(values: Vector, weights: Vector, level: float) -> tuple[float, float]:
    """Central interval of a weighted sample: at most (1 − level)/2 lies strictly outside each end.

    The same rule from both sides, so that the interval of −x mirrors that of x.
    """
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    # weights are sums of rounded fractions; the margin keeps an exact tail of (1 − level)/2 inside
    tail = (1 - level) / 2 * weights.sum() * (1 - 1e-9)
    low = int(np.searchsorted(np.cumsum(weights), tail))
    high = len(values) - 1 - int(np.searchsorted(np.cumsum(weights[::-1]), tail))
    return float(values[low]), float(values[high])


def mean_interval(values_by_seed: Mapping[int, float], level: float = 0.95) -> Interval:
    """Mean over seeds with its percentile bootstrap interval.

    Every resample of R seeds is enumerated for R ≤ 8 (exact, nothing random); above that 20,000
    are drawn from a fixed stream.

    Args:
        values_by_seed: one value for each run seed.
        level: of the interval, in (0, 1).

    Returns:
        The mean, with a NaN interval for a single seed, which shows no spread. All NaN when a
        value is not finite: an undefined seed is never averaged away.

    Raises:
        ValueError: no seeds, or a level outside (0, 1).
    """
    check_level(level)
    if not values_by_seed:
        raise ValueError("values_by_seed is empty; pass the value of at least one seed")
    # by seed, so that the result does not depend on the order in which runs finished
    values = np.array([values_by_seed[seed] for seed in sorted(values_by_seed)], dtype=np.float64)
    if not np.isfinite(values).all():
        return UNDEFINED
    n = len(values)
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, float("nan"), float("nan"))
    counts, weights = resamples(n)
    return Interval(mean, *percentiles(counts @ values / n, weights, level))


def pair_matrix(pair_values: Mapping[tuple[int, int], float]) -> Vector:
    """The symmetric matrix ``(n, n)`` of values of pairs, zero on its diagonal.

    Raises:
        ValueError: see ``pair_mean_interval``.
    """
    if not pair_values:
        raise ValueError("pair_values is empty; consistency needs at least two seeds")
    seeds = sorted({seed for pair in pair_values for seed in pair})
    n = len(seeds)
    position = {seed: i for i, seed in enumerate(seeds)}
    matrix = np.zeros((n, n))
    seen = np.eye(n, dtype=bool)
    for (a, b), value in pair_values.items():
        i, j = position[a], position[b]
        if seen[i, j]:
            raise ValueError(
                f"the pair of seeds ({a}, {b}) "
                + ("pairs a seed with itself" if a == b else "is given twice")
                + "; give each pair of distinct seeds once"
            )
        seen[i, j] = seen[j, i] = True
        matrix[i, j] = matrix[j, i] = value
    if not seen.all():
        i, j = np.argwhere(~seen)[0]
        raise ValueError(
            f"the pair of seeds ({seeds[i]}, {seeds[j]}) is missing; every two seeds need a value"
        )
    return matrix


def pair_mean_interval(
    pair_values: Mapping[tuple[int, int], float], level: float = 0.95
) -> Interval:
    """Mean over pairs of seeds with a bootstrap interval over *seeds*.

    A resample draws R seeds with replacement; its value is the mean over the pairs of distinct
    seeds in it, each weighted by the product of their multiplicities c:

        Σ_{a<b} c_a c_b v_ab / Σ_{a<b} c_a c_b

    A seed paired with its own copy would agree perfectly, so such pairs do not count, and
    resamples with a single distinct seed have no value and are dropped.

    Args:
        pair_values: a symmetric value for each pair of distinct seeds, given once, in either
            order.
        level: of the interval, in (0, 1).

    Returns:
        The mean over pairs; with two seeds a NaN interval, because their only pair shows no
        spread. All NaN when a value is not finite.

    Raises:
        ValueError: no pairs, a seed paired with itself, a pair given twice or missing, or a
            level outside (0, 1).
    """
    check_level(level)
    matrix = pair_matrix(pair_values)
    n = len(matrix)
    if not np.isfinite(matrix).all():
        return UNDEFINED
    mean = float(matrix.sum() / (n * (n - 1)))
    if n == 2:
        return Interval(mean, float("nan"), float("nan"))
    counts, weights, n_pairs = pair_resamples(n)
    values = ((counts @ matrix) * counts).sum(axis=1) / n_pairs
    return Interval(mean, *percentiles(values, weights, level))


@dataclass(frozen=True)
class PairedDifference:
    """A difference between two methods over the seeds that both have.

    Attributes:
        mean: of a − b over the common seeds.
        lower, upper: its bootstrap interval over seeds.
        n_seeds: number of common seeds.
        p_value: two-sided sign-flip test of "a − b is symmetric around zero".
        significant: whether the interval excludes zero *and* the p-value is at most 1 − level;
            None below six seeds, or where the difference is undefined.
        unmatched: seeds that only one of the two has, left out.
    """

    mean: float
    lower: float
    upper: float
    n_seeds: int
    p_value: float
    significant: bool | None
    unmatched: tuple[int, ...]


@lru_cache(maxsize=32)
def sign_patterns(n: int, exact: bool) -> Vector:
    """All patterns of n signs, or the observed one and a Monte-Carlo sample, one a row."""
    if exact:
        return np.array(list(product((-1.0, 1.0), repeat=n)))
    generator = np.random.default_rng(derive(n, "metrics/sign flips"))
    drawn = generator.choice([-1.0, 1.0], size=(MONTE_CARLO_RESAMPLES, n))
    return np.vstack([np.ones((1, n)), drawn])


def sign_flip_p_value(differences: Vector) -> float:
    """Two-sided randomisation test: P(|Σ s_i d_i| ≥ |Σ d_i|) over random signs s_i = ±1.

    Valid for any symmetric noise at any number of seeds, which the percentile bootstrap is not.
    All 2^R sign patterns are enumerated for R ≤ 12; above that 20,000 are drawn from a fixed
    stream, the observed pattern counted among them. (Fisher, 1935, The Design of Experiments.)

    Args:
        differences: ``(n_seeds,)``, finite.
    """
    signs = sign_patterns(len(differences), len(differences) <= MAX_EXACT_SIGNS)
    # sums that are equal on paper must not differ by rounding
    slack = 1e-12 * float(np.abs(differences).sum())
    extreme = np.abs(signs @ differences) >= abs(float(differences.sum())) - slack
    return float(extreme.mean())


def paired_difference(
    a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float], level: float = 0.95
) -> PairedDifference:
    """Difference a − b of two methods run on the same seeds, paired by seed.

    Pairing removes what a seed does to both. Seeds that only one method has are left out and
    named.

    Args:
        a_by_seed, b_by_seed: one value for each run seed.
        level: of the interval and of the test, in (0, 1).

    Raises:
        ValueError: no common seed, or a level outside (0, 1).
    """
    check_level(level)
    common = sorted(a_by_seed.keys() & b_by_seed.keys())
    if not common:
        raise ValueError(
            f"no common seed: a has {sorted(a_by_seed)}, b has {sorted(b_by_seed)}; run both "
            "methods on the same seeds"
        )
    differences = {seed: a_by_seed[seed] - b_by_seed[seed] for seed in common}
    mean, lower, upper = mean_interval(differences, level)
    significant: bool | None = None
    p_value = float("nan")
    if isfinite(mean):
        p_value = sign_flip_p_value(np.array(list(differences.values())))
        if len(common) >= MIN_SEEDS_FOR_SIGNIFICANCE:
            significant = (lower > 0 or upper < 0) and p_value <= 1 - level + 1e-12
    return PairedDifference(
        mean=mean,
        lower=lower,
        upper=upper,
        n_seeds=len(common),
        p_value=p_value,
        significant=significant,
        unmatched=tuple(sorted(a_by_seed.keys() ^ b_by_seed.keys())),
    )
