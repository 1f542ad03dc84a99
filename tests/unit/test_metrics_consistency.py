"""Consistency against its definitions; ties must never be counted as agreement."""

from __future__ import annotations

import math
import time
from itertools import combinations
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fine_bench.metrics.consistency import (
    KEYS,
    coefficient_of_variation,
    expected_jaccard,
    pairwise_consistency,
)

# --- slow twins


def slow_ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks: one more than those below, ties sharing theirs."""
    return np.array(
        [(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values], dtype=float
    )


def slow_spearman(a: np.ndarray, b: np.ndarray) -> float:
    ra, rb = slow_ranks(a), slow_ranks(b)
    ra, rb = ra - ra.mean(), rb - rb.mean()
    return float((ra * rb).sum() / math.sqrt((ra**2).sum() * (rb**2).sum()))


def slow_kendall(a: np.ndarray, b: np.ndarray) -> float:
    """tau-b: (concordant − discordant) / sqrt(pairs untied in a · pairs untied in b)."""
    signs = [
        (np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)
    ]
    numerator = sum(s * t for s, t in signs)
    return float(
        numerator / math.sqrt(sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs))
    )


def possible_top_sets(values: np.ndarray, k: int) -> list[set[int]]:
    """Every k-subset that breaking ties in some order could return."""
    return [
        set(chosen)
        for chosen in combinations(range(len(values)), k)
        if min(values[list(chosen)])
        >= max([values[i] for i in range(len(values)) if i not in chosen], default=-np.inf)
    ]


def slow_jaccard(a: np.ndarray, b: np.ndarray, k: int) -> tuple[float, float]:
    """J at the mean overlap, and the mean J, over all independent tie-breaks."""
    overlaps = [
        len(left & right) for left in possible_top_sets(a, k) for right in possible_top_sets(b, k)
    ]
    mean = sum(overlaps) / len(overlaps)
    return mean / (2 * k - mean), sum(o / (2 * k - o) for o in overlaps) / len(overlaps)


@st.composite
def score_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    n = draw(st.integers(2, 7))
    value = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0])
    a = np.array(draw(st.lists(value, min_size=n, max_size=n)))
    b = np.array(draw(st.lists(value, min_size=n, max_size=n)))
    assume(np.ptp(a) > 0)
    assume(np.ptp(b) > 0)
    return a, b, draw(st.integers(1, n))


@given(score_pairs(), st.sampled_from(["high", "low"]))
def test_matches_the_definitions(
    case: tuple[np.ndarray, np.ndarray, int], end: Literal["high", "low"]
) -> None:
    a, b, k = case
    n = len(a)
    result = pairwise_consistency(a, torch.from_numpy(b), k, end)
    assert tuple(result) == KEYS
    assert result["spearman"] == pytest.approx(slow_spearman(a, b), abs=1e-12)
    assert result["kendall"] == pytest.approx(slow_kendall(a, b), abs=1e-12)
    sign = 1 if end == "high" else -1
    at_mean_overlap, mean_jaccard = slow_jaccard(sign * a, sign * b, k)
    assert result["jaccard"] == pytest.approx(at_mean_overlap, abs=1e-12)
    assert result["jaccard"] <= mean_jaccard + 1e-12
    chance = expected_jaccard(n, k)
    if k == n:
        assert math.isnan(result["jaccard_corrected"])
    else:
        corrected = (at_mean_overlap - chance) / (1 - chance)
        assert result["jaccard_corrected"] == pytest.approx(corrected, abs=1e-12)


@given(score_pairs(), st.randoms())
def test_symmetric_and_independent_of_storage_order(
    case: tuple[np.ndarray, np.ndarray, int], random: object
) -> None:
    a, b, k = case
    expected = pairwise_consistency(a, b, k, "high")
    order = list(range(len(a)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for other in (
        pairwise_consistency(b, a, k, "high"),
        pairwise_consistency(a[order], b[order], k, "high"),
        pairwise_consistency(-a, -b, k, "low"),
    ):
        assert other == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_expected_jaccard_by_enumerating_all_pairs_of_subsets(n: int) -> None:
    for k in range(1, n + 1):
        subsets = [set(chosen) for chosen in combinations(range(n), k)]
        values = [len(a & b) / len(a | b) for a in subsets for b in subsets]
        assert expected_jaccard(n, k) == pytest.approx(sum(values) / len(values), abs=1e-14)


def test_expected_jaccard_by_simulation() -> None:
    rng = np.random.default_rng(0)
    overlap = rng.hypergeometric(300, 700, 300, size=200_000)
    values = overlap / (600 - overlap)
    error = values.std() / math.sqrt(len(values))
    assert abs(expected_jaccard(1000, 300) - values.mean()) < 4 * error


def test_identical_independent_and_opposite_runs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2000))
    assert pairwise_consistency(a, a, 400, "low") == pytest.approx(dict.fromkeys(KEYS, 1.0))
    chance = pairwise_consistency(a, b, 400, "high")
    assert all(abs(chance[key]) < 0.07 for key in ("spearman", "kendall", "jaccard_corrected"))
    opposite = pairwise_consistency(a, -a, 400, "high")
    assert opposite["spearman"] == pytest.approx(-1)
    assert opposite["jaccard"] == 0
    assert opposite["jaccard_corrected"] < 0


def test_only_the_suspicious_end_counts_for_jaccard() -> None:
    a = np.array([0.0, 1, 2, 3, 4, 5])
    b = np.array([0.0, 1, 3, 2, 5, 4])
    assert pairwise_consistency(a, b, 1, "low")["jaccard"] == 1
    assert pairwise_consistency(a, b, 1, "high")["jaccard"] == 0


def test_constant_scores_are_undefined_not_perfect() -> None:
    constant, varying = np.full(50, 0.1), np.arange(50.0)
    for a, b in ((constant, constant), (constant, varying), (varying, constant)):
        result = pairwise_consistency(a, b, 10, "high")
        assert tuple(result) == KEYS
        assert all(math.isnan(value) for value in result.values())


def test_nearly_constant_scores_do_not_look_consistent() -> None:
    # one example stands out in both runs, all others tie: the top 20 say nothing about 19 places
    a = np.zeros(100)
    a[3] = 1.0
    corrected = pairwise_consistency(a, a, 20, "high")["jaccard_corrected"]
    assert 0 < corrected < 0.06
    # any tie-break by a shared order would have called this perfect
    top = np.argsort(-a, kind="stable")[:20]
    assert len(set(top) & set(top)) == 20


def test_refusals() -> None:
    a = np.arange(5.0)
    with pytest.raises(ValueError, match="a has 5 examples, b 4; consistency compares runs"):
        pairwise_consistency(a, a[:4], 2, "high")
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k must be from 1 to .* 5; got {k}"):
            pairwise_consistency(a, a, k, "high")
        with pytest.raises(ValueError, match=f"k must be from 1 to .* 5; got {k}"):
            expected_jaccard(5, k)
    with pytest.raises(ValueError, match="b has 1 values that are not finite"):
        pairwise_consistency(a, np.where(a == 2, np.inf, a), 2, "high")
    with pytest.raises(ValueError, match=r"a must be a vector \(n_train,\), got shape \(1, 5\)"):
        pairwise_consistency(a[None], a, 2, "high")
    with pytest.raises(ValueError, match="end must be"):
        pairwise_consistency(a, a, 2, "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least two runs, got \(1, 5\)"):
        coefficient_of_variation(a[None])


def test_a_large_data_set_takes_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(60_000)
    b = a + rng.standard_normal(60_000)
    pairwise_consistency(a[:100], b[:100], 20, "high")
    expected_jaccard.cache_clear()
    start = time.process_time()
    pairwise_consistency(a, b, 12_000, "high")
    assert time.process_time() - start < 0.5


# --- coefficient of variation


def test_coefficient_of_variation_by_hand() -> None:
    runs = torch.tensor([[1.0, -2.0, 3.0, 0.0, 1.0], [3.0, -2.0, -3.0, 0.0, 2.0]])
    each, median = coefficient_of_variation(runs)
    expected = [math.sqrt(2) / 2, 0.0, math.inf, math.nan, math.sqrt(0.5) / 1.5]
    np.testing.assert_allclose(each, expected)
    assert median == pytest.approx((math.sqrt(2) / 2 + math.sqrt(0.5) / 1.5) / 2)
    scaled, _ = coefficient_of_variation(-7 * runs)
    np.testing.assert_allclose(scaled, each)


def test_a_constant_run_has_no_coefficient_of_variation() -> None:
    each, median = coefficient_of_variation(np.full((3, 4), 2.0))
    assert np.isnan(each).all()
    assert math.isnan(median)
    each, median = coefficient_of_variation(np.array([[1.0, 2.0], [3.0, 3.0]]))
    assert np.isnan(each).all()
    assert math.isnan(median)
