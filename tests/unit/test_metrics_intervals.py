"""Intervals over seeds against full enumeration, and what they honestly cover."""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fine_bench.metrics import intervals
from fine_bench.metrics.intervals import (
    Interval,
    mean_interval,
    pair_mean_interval,
    paired_difference,
    sign_flip_p_value,
)

# sixteenths: sums are exact in floating point, so that ties are ties in the twins too
sixteenths = st.integers(-48, 48).map(lambda i: i / 16)


def by_seed(values: Any) -> dict[int, float]:
    return dict(enumerate(float(value) for value in values))


# --- slow twins


def slow_percentiles(resampled: list[float], level: float) -> tuple[float, float]:
    """The smallest value with at least (1 − level)/2 at or below it; mirrored for the upper."""
    tail = (1 - level) / 2 * len(resampled)
    candidates = sorted(set(resampled))
    lower = next(v for v in candidates if sum(r <= v for r in resampled) >= tail - 1e-6)
    upper = next(v for v in reversed(candidates) if sum(r >= v for r in resampled) >= tail - 1e-6)
    return lower, upper


def slow_mean_interval(values: list[float], level: float) -> tuple[float, float]:
    n = len(values)
    resampled = [round(sum(draw) / n, 10) for draw in product(values, repeat=n)]
    return slow_percentiles(resampled, level)


def slow_pair_interval(pairs: dict[tuple[int, int], float], level: float) -> tuple[float, float]:
    seeds = sorted({seed for pair in pairs for seed in pair})
    symmetric = {**pairs, **{(b, a): value for (a, b), value in pairs.items()}}
    resampled = []
    for draw in product(seeds, repeat=len(seeds)):
        values = [symmetric[a, b] for a, b in combinations(draw, 2) if a != b]
        if values:
            resampled.append(round(sum(values) / len(values), 10))
    return slow_percentiles(resampled, level)


# --- the mean over seeds


@given(st.lists(sixteenths, min_size=2, max_size=5), st.sampled_from([0.5, 0.8, 0.95]))
def test_exact_bootstrap_equals_full_enumeration(values: list[float], level: float) -> None:
    mean, lower, upper = mean_interval(by_seed(values), level)
    assert mean == pytest.approx(np.mean(values))
    assert (lower, upper) == pytest.approx(slow_mean_interval(values, level), abs=1e-9)


def test_a_tail_that_is_met_exactly_is_inside() -> None:
    # 1 of 4 resamples is (0, 0): with level 0.5 the tail of 1/4 is met exactly, by 0
    assert mean_interval({0: 0.0, 1: 1.0}, level=0.5) == Interval(0.5, 0.0, 1.0)
    assert mean_interval({0: 0.0, 1: 1.0}, level=0.51) == Interval(0.5, 0.0, 1.0)
    assert mean_interval({0: 0.0, 1: 1.0}, level=0.49)[1:] == (0.5, 0.5)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8])
def test_resamples_are_all_multisets_with_multinomial_weights(n: int) -> None:
    counts, weights = intervals.resamples(n)
    assert len(counts) == math.comb(2 * n - 1, n)
    assert len({tuple(row) for row in counts.tolist()}) == len(counts)
    assert (counts.sum(axis=1) == n).all()
    assert counts.min() >= 0
    assert weights.sum() == pytest.approx(1)
    if n == 3:
        drawn = [tuple(draw.count(i) for i in range(3)) for draw in product(range(3), repeat=3)]
        for row, weight in zip(counts.tolist(), weights, strict=True):
            assert weight == pytest.approx(drawn.count(tuple(row)) / 27)


def test_three_seeds_reach_from_the_smallest_to_the_largest() -> None:
    assert mean_interval({0: 0.9, 1: 0.7, 2: 0.95})[1:] == pytest.approx((0.7, 0.95))


@given(st.lists(sixteenths, min_size=2, max_size=9))
def test_mirrored_values_mirror_the_interval_and_order_does_not_matter(
    values: list[float],
) -> None:
    mean, lower, upper = mean_interval(by_seed(values))
    assert lower <= mean + 1e-12
    assert mean <= upper + 1e-12
    mirrored = mean_interval(by_seed([-value for value in values]))
    assert mirrored == pytest.approx((-mean, -upper, -lower))
    backwards = dict(reversed(by_seed(values).items()))
    assert mean_interval(backwards) == (mean, lower, upper)


def test_monte_carlo_joins_the_exact_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    values = by_seed(rng.standard_normal(8))
    exact = mean_interval(values)
    intervals.resamples.cache_clear()
    monkeypatch.setattr(intervals, "MAX_EXACT_SEEDS", 7)
    sampled = mean_interval(values)
    intervals.resamples.cache_clear()
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=0.03)


def test_many_seeds_are_repeatable_and_close_to_normal_theory() -> None:
    rng = np.random.default_rng(4)
    values = by_seed(rng.standard_normal(60))
    first = mean_interval(values)
    intervals.resamples.cache_clear()
    assert mean_interval(values) == first
    spread = 1.96 * np.std(list(values.values())) / math.sqrt(60)
    assert first.upper - first.mean == pytest.approx(spread, rel=0.08)
    assert first.mean - first.lower == pytest.approx(spread, rel=0.08)


@pytest.mark.parametrize(("n", "coverage"), [(3, 0.75), (5, 0.84), (6, 0.86)])
def test_coverage_is_what_the_documentation_says(n: int, coverage: float) -> None:
    rng = np.random.default_rng(n)
    trials = 1500
    hits = 0
    for values in rng.standard_normal((trials, n)):
        _, lower, upper = mean_interval(by_seed(values))
        hits += lower <= 0 <= upper
    assert hits / trials == pytest.approx(coverage, abs=0.03)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    mean, lower, upper = mean_interval({7: 0.5})
    assert mean == 0.5
    assert math.isnan(lower)
    assert math.isnan(upper)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_undefined_seed_is_never_averaged_away(value: float) -> None:
    assert all(math.isnan(part) for part in mean_interval({0: 1.0, 1: value, 2: 2.0}))
    assert all(math.isnan(part) for part in mean_interval({0: value}))
    pairs = {(0, 1): 1.0, (0, 2): value, (1, 2): 0.0}
    assert all(math.isnan(part) for part in pair_mean_interval(pairs))


# --- the mean over pairs


@given(st.integers(3, 5), st.data(), st.sampled_from([0.8, 0.95]))
def test_pair_bootstrap_equals_full_enumeration(n: int, data: st.DataObject, level: float) -> None:
    # seeds are names, not positions
    seeds = [10 * i + 1 for i in range(n)]
    pairs = {pair: data.draw(sixteenths) for pair in combinations(seeds, 2)}
    mean, lower, upper = pair_mean_interval(pairs, level)
    assert mean == pytest.approx(np.mean(list(pairs.values())))
    assert (lower, upper) == pytest.approx(slow_pair_interval(pairs, level), abs=1e-9)
    turned = {(b, a): value for (a, b), value in reversed(pairs.items())}
    assert pair_mean_interval(turned, level) == (mean, lower, upper)


def test_pairs_are_not_resampled_as_if_they_were_independent() -> None:
    # one odd seed spoils 9 of 45 pairs, all at once
    pairs = {(a, b): 0.0 if a == 0 else 1.0 for a, b in combinations(range(10), 2)}
    interval = pair_mean_interval(pairs)
    over_pairs = mean_interval(by_seed(pairs.values()))
    assert interval.mean == pytest.approx(0.8)
    assert interval.upper - interval.lower > 1.5 * (over_pairs.upper - over_pairs.lower)
    # the odd seed is missing from 35 % of the resamples, and then all pairs agree
    assert interval.upper == 1.0


def test_two_seeds_have_a_mean_and_no_interval() -> None:
    mean, lower, upper = pair_mean_interval({(0, 1): 0.6})
    assert mean == 0.6
    assert math.isnan(lower)
    assert math.isnan(upper)


def test_many_seeds_of_pairs() -> None:
    pairs = {(a, b): math.sin(a) * math.sin(b) for a, b in combinations(range(12), 2)}
    mean, lower, upper = pair_mean_interval(pairs)
    assert lower < mean < upper
    assert pair_mean_interval(pairs) == (mean, lower, upper)


# --- paired differences


def slow_sign_flip(differences: list[float]) -> float:
    observed = abs(sum(differences))
    flips = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return sum(flip >= observed for flip in flips) / len(flips)


@given(st.lists(sixteenths, min_size=1, max_size=7))
def test_sign_flip_test_equals_full_enumeration(differences: list[float]) -> None:
    assert sign_flip_p_value(np.array(differences)) == pytest.approx(slow_sign_flip(differences))


def test_sampled_sign_flips_join_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(1).standard_normal(10) + 0.4
    exact = sign_flip_p_value(differences)
    monkeypatch.setattr(intervals, "MAX_EXACT_SIGNS", 9)
    sampled = sign_flip_p_value(differences)
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=0.02)
    assert sign_flip_p_value(np.full(40, 0.1)) == pytest.approx(1 / 20_001)


def test_paired_difference_removes_what_the_seed_does() -> None:
    seed_effect = {seed: 10.0 * seed for seed in range(6)}
    a = {seed: effect + 1 + 0.01 * seed for seed, effect in seed_effect.items()}
    result = paired_difference(a, seed_effect)
    assert (result.mean, result.n_seeds) == (pytest.approx(1.025), 6)
    assert 1.0 < result.lower < result.mean < result.upper < 1.05
    assert result.p_value == 2 / 64
    assert result.significant is True
    other_way = paired_difference(seed_effect, a)
    assert other_way.significant is True
    assert (other_way.lower, other_way.upper) == pytest.approx((-result.upper, -result.lower))


def test_no_significance_marks_below_six_seeds() -> None:
    for n, expected in ((1, None), (5, None), (6, True)):
        result = paired_difference(by_seed([1.0] * n), by_seed([0.0] * n))
        assert (result.n_seeds, result.significant) == (n, expected)


def test_no_difference_is_not_significant() -> None:
    same = by_seed(range(8))
    result = paired_difference(same, same)
    assert result.significant is False
    assert (result.mean, result.lower, result.upper, result.p_value) == (0, 0, 0, 1)
    stricter = paired_difference(by_seed([1.0] * 6), by_seed([0.0] * 6), level=0.99)
    assert stricter.significant is False


def test_false_positives_stay_at_the_level() -> None:
    rng = np.random.default_rng(0)
    trials, marks, excluded = 1500, 0, 0
    zero = by_seed(np.zeros(6))
    for values in rng.standard_normal((trials, 6)):
        result = paired_difference(by_seed(values), zero)
        marks += bool(result.significant)
        excluded += result.lower > 0 or result.upper < 0
    assert marks / trials <= 0.05
    # the interval alone would have marked three times as many as it should
    assert excluded / trials > 0.10


def test_common_seeds_only_and_the_others_are_named() -> None:
    result = paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.0, 1: 0.0, 7: 3.0})
    assert (result.mean, result.n_seeds, result.unmatched) == (1.5, 2, (5, 7))


def test_an_undefined_difference_is_not_marked() -> None:
    values = by_seed([1.0] * 6)
    result = paired_difference({**values, 3: math.nan}, by_seed([0.0] * 6))
    assert math.isnan(result.mean)
    assert math.isnan(result.p_value)
    assert result.significant is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="values_by_seed is empty"):
        mean_interval({})
    with pytest.raises(ValueError, match="pair_values is empty; consistency needs at least two"):
        pair_mean_interval({})
    with pytest.raises(ValueError, match=r"pair of seeds \(1, 1\) pairs a seed with itself"):
        pair_mean_interval({(1, 1): 1.0, (0, 1): 1.0})
    with pytest.raises(ValueError, match=r"pair of seeds \(1, 0\) is given twice"):
        pair_mean_interval({(0, 1): 1.0, (1, 0): 1.0})
    with pytest.raises(ValueError, match=r"pair of seeds \(0, 2\) is missing"):
        pair_mean_interval({(0, 1): 1.0, (1, 2): 1.0})
    with pytest.raises(ValueError, match=r"no common seed: a has \[0\], b has \[1\]"):
        paired_difference({0: 1.0}, {1: 1.0})
    for level in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match=f"level must lie between 0 and 1, got {level}"):
            mean_interval({0: 1.0}, level)
        with pytest.raises(ValueError, match="level must lie between 0 and 1"):
            pair_mean_interval({(0, 1): 1.0}, level)
        with pytest.raises(ValueError, match="level must lie between 0 and 1"):
            paired_difference({0: 1.0}, {0: 1.0}, level)
