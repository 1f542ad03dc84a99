"""The intervals of ``metrics.intervals`` for many values at once, bit for bit the same.

A leaderboard asks for an interval of every number of every row. Asked one by one, three seeds cost
a hundred times more in calls than in arithmetic; here all values over the same number of seeds go
through one call. Every row is multiplied by the same BLAS routine and summed in the same order as
a single one is, so that no digit of a table depends on what else stands in it.

Where resamples are drawn at random, all have one weight: the percentiles then are always the same
two places of the sorted sample, and nothing needs to be sorted to find them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import isfinite, isqrt

import numpy as np
from numpy.typing import NDArray

from fine_bench.metrics import intervals
from fine_bench.metrics._arrays import Vector
from fine_bench.metrics.intervals import MIN_SEEDS_FOR_SIGNIFICANCE, UNDEFINED, Interval

_NUMBERS = 2_000_000
"""Of one temporary array at most: 16 MB."""


def mean_intervals(values: Sequence[Mapping[int, float]], level: float = 0.95) -> list[Interval]:
    """``intervals.mean_interval`` of each; see there.

    Args:
        values: one mapping from seed to value for each interval.
        level: of the intervals, in (0, 1).
    """
    intervals.check_level(level)
    ordered = [[found[seed] for seed in sorted(found)] for found in values]
    if not all(ordered):
        raise ValueError("values_by_seed is empty; pass the value of at least one seed")
    result = [UNDEFINED] * len(ordered)
    for n, places in _by_length(ordered).items():
        for chunk, matrix in _chunks(ordered, places, len(intervals.resamples(n)[0])):
            means = matrix.mean(axis=1)
            lower = upper = np.full(len(chunk), np.nan)
            if n > 1:
                counts, weights = intervals.resamples(n)
                drawn = np.matmul(counts, matrix[:, :, None])[:, :, 0] / n
                equal = n > intervals.MAX_EXACT_SEEDS
                lower, upper = _percentiles(drawn, weights, level, equal)
            _fill(result, chunk, means, lower, upper)
    return result


def pair_mean_intervals(
    values: Sequence[Mapping[tuple[int, int], float]], level: float = 0.95
) -> list[Interval]:
    """``intervals.pair_mean_interval`` of each; see there for what is refused."""
    intervals.check_level(level)
    flat = [intervals.pair_matrix(found).ravel().tolist() for found in values]
    result = [UNDEFINED] * len(flat)
    for n_squared, places in _by_length(flat).items():
        n = isqrt(n_squared)
        for chunk, rows in _chunks(flat, places, n * len(intervals.resamples(n)[0])):
            means = rows.sum(axis=1) / (n * (n - 1))
            lower = upper = np.full(len(chunk), np.nan)
            if n > 2:
                counts, weights, n_pairs = intervals.pair_resamples(n)
                products = np.matmul(counts, rows.reshape(-1, n, n))
                products *= counts
                drawn = products.sum(axis=2) / n_pairs
                # the weights of those that hold no pair are missing: equal ones stay equal
                equal = n > intervals.MAX_EXACT_SEEDS
                lower, upper = _percentiles(drawn, weights, level, equal)
            _fill(result, chunk, means, lower, upper)
    return result


def ties(
    pairs: Sequence[tuple[Mapping[int, float], Mapping[int, float]]], level: float = 0.95
) -> list[bool]:
    """Whether each two methods cannot be told apart, by ``intervals.paired_difference``.

    From six common seeds on, a tie is a difference that is not significant; below, one whose
    interval holds zero. Less than two common seeds, or an undefined value, are no tie.
    """
    differences = [
        {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())} for a, b in pairs
    ]
    asked = [i for i, found in enumerate(differences) if len(found) >= 2]
    found = mean_intervals([differences[i] for i in asked], level)
    result = [False] * len(pairs)
    many = [
        (i, interval)
        for i, interval in zip(asked, found, strict=True)
        if len(differences[i]) >= MIN_SEEDS_FOR_SIGNIFICANCE and isfinite(interval.mean)
    ]
    p_values = _sign_flips([list(differences[i].values()) for i, _ in many])
    for i, interval in zip(asked, found, strict=True):
        result[i] = interval.lower <= 0.0 <= interval.upper
    for (i, interval), p_value in zip(many, p_values, strict=True):
        outside = interval.lower > 0 or interval.upper < 0
        result[i] = not (outside and p_value <= 1 - level + 1e-12)
    return result


def _sign_flips(differences: Sequence[Sequence[float]]) -> list[float]:
    """``intervals.sign_flip_p_value`` of each."""
    result = [float("nan")] * len(differences)
    for n, places in _by_length(differences).items():
        signs = intervals.sign_patterns(n, n <= intervals.MAX_EXACT_SIGNS)
        for chunk, rows in _chunks(differences, places, len(signs)):
            slack = 1e-12 * np.abs(rows).sum(axis=1)
            sums = np.abs(np.matmul(signs, rows[:, :, None])[:, :, 0])
            extreme = sums >= (np.abs(rows.sum(axis=1)) - slack)[:, None]
            for place, share in zip(chunk, extreme.mean(axis=1).tolist(), strict=True):
                result[place] = share
    return result


def _by_length(rows: Sequence[Sequence[float]]) -> dict[int, list[int]]:
    """The places of those rows whose values are all finite, by the number of values."""
    found: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        if all(map(isfinite, row)):
            found.setdefault(len(row), []).append(place)
    return found


def _chunks(
    rows: Sequence[Sequence[float]], places: Sequence[int], size: int
) -> list[tuple[Sequence[int], Vector]]:
    """The rows of these places as matrices, so few that ``size`` numbers for each fit."""
    step = max(1, _NUMBERS // max(size, 1))
    parts = [places[start : start + step] for start in range(0, len(places), step)]
    return [(part, np.array([rows[i] for i in part], dtype=np.float64)) for part in parts]


def _fill(
    result: list[Interval], places: Sequence[int], means: Vector, lower: Vector, upper: Vector
) -> None:
    found = zip(places, means.tolist(), lower.tolist(), upper.tolist(), strict=True)
    for place, *three in found:
        result[place] = Interval(*three)


def _percentiles(
    drawn: Vector, weights: Vector, level: float, equal: bool
) -> tuple[Vector, Vector]:
    """``intervals.percentiles`` of each row of ``drawn (rows, resamples)``."""
    if equal:
        low, high = _places(len(weights), float(weights[0]), level)
        drawn.partition((low, high), axis=1)
        return drawn[:, low], drawn[:, high]
    order = np.argsort(drawn, axis=1, kind="stable")
    sorted_weights = weights[order]
    tail = ((1 - level) / 2 * sorted_weights.sum(axis=1) * (1 - 1e-9))[:, None]
    low_at = (np.cumsum(sorted_weights, axis=1) < tail).sum(axis=1)
    reverse = np.ascontiguousarray(sorted_weights[:, ::-1])
    high_at = drawn.shape[1] - 1 - (np.cumsum(reverse, axis=1) < tail).sum(axis=1)

    def at(places: NDArray[np.intp]) -> Vector:
        return np.take_along_axis(drawn, np.take_along_axis(order, places[:, None], 1), 1)[:, 0]

    return at(low_at), at(high_at)


@lru_cache(maxsize=64)
def _places(n: int, weight: float, level: float) -> tuple[int, int]:
    """Where the percentiles lie among n sorted values of one weight."""
    places = np.arange(n, dtype=np.float64)
    low, high = intervals.percentiles(places, np.full(n, weight), level)
    return int(low), int(high)
