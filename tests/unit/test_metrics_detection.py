"""Detection metrics against their definitions, ties enumerated order by order."""

from __future__ import annotations

import time
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fine_bench.metrics.detection import detection_curve, detection_metrics, suspicion


@st.composite
def ranked_examples(draw: st.DrawFn, max_size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Scores from few values, so that ties are common, and a truth with both kinds."""
    n = draw(st.integers(2, max_size))
    scores = draw(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 3.0]), min_size=n, max_size=n))
    bad = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda b: 0 < sum(b) < n))
    return np.array(scores), np.array(bad)


# --- slow twins


def mean_recall_curve(scores: np.ndarray, bad: np.ndarray) -> list[Fraction]:
    """Recall after 0 … n inspected, averaged over all orders that the scores allow."""
    n, n_bad = len(scores), int(bad.sum())
    orders = [
        order
        for order in permutations(range(n))
        if all(scores[order[i]] >= scores[order[i + 1]] for i in range(n - 1))
    ]
    total = [Fraction(0)] * (n + 1)
    for order in orders:
        found = 0
        for position, example in enumerate(order, start=1):
            found += int(bad[example])
            total[position] += Fraction(found, n_bad)
    return [recall / len(orders) for recall in total]


def slow_auroc(scores: np.ndarray, bad: np.ndarray) -> float:
    wins = [1.0 if b > g else 0.5 if b == g else 0.0 for b in scores[bad] for g in scores[~bad]]
    return sum(wins) / len(wins)


def slow_average_precision(scores: np.ndarray, bad: np.ndarray) -> float:
    result, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        recall = (chosen & bad).sum() / bad.sum()
        result += (recall - recall_before) * (chosen & bad).sum() / chosen.sum()
        recall_before = recall
    return result


@given(ranked_examples())
def test_metrics_match_their_definitions(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, bad = case
    n, n_bad = len(scores), int(bad.sum())
    metrics = detection_metrics(scores, bad)
    curve = mean_recall_curve(scores, bad)
    trapezoids = sum((curve[i] + curve[i + 1]) / 2 for i in range(n)) / n
    assert metrics["auroc"] == pytest.approx(slow_auroc(scores, bad), abs=1e-12)
    assert metrics["average_precision"] == pytest.approx(
        slow_average_precision(scores, bad), abs=1e-12
    )
    assert metrics["recall_at_rate"] == pytest.approx(float(curve[n_bad]), abs=1e-12)
    assert metrics["recall_curve_area"] == pytest.approx(float(trapezoids), abs=1e-12)


@given(ranked_examples())
def test_curve_is_the_mean_over_tied_orders(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, bad = case
    n = len(scores)
    share, recall = detection_curve(scores, bad, n_points=n + 1)
    np.testing.assert_allclose(share, np.arange(n + 1) / n)
    expected = [float(value) for value in mean_recall_curve(scores, bad)]
    np.testing.assert_allclose(recall, expected, atol=1e-12)


@given(ranked_examples(max_size=40), st.randoms())
def test_storage_order_and_monotone_maps_change_nothing(
    case: tuple[np.ndarray, np.ndarray], random: Any
) -> None:
    scores, bad = case
    order = list(range(len(scores)))
    random.shuffle(order)
    expected = detection_metrics(scores, bad)
    assert detection_metrics(scores[order], bad[order]) == pytest.approx(expected, abs=1e-12)
    assert detection_metrics(np.exp(scores), bad) == pytest.approx(expected, abs=1e-12)
    reverse = detection_metrics(-scores, bad)["auroc"]
    assert reverse == pytest.approx(1 - expected["auroc"], abs=1e-12)


@pytest.mark.parametrize(("n", "n_bad"), [(10, 2), (7, 3), (1347, 269), (60_000, 12_000)])
def test_constant_scores_are_exactly_chance(n: int, n_bad: int) -> None:
    bad = torch.arange(n) < n_bad
    metrics = detection_metrics(torch.full((n,), 0.1), bad)
    assert metrics["recall_at_rate"] == n_bad / n
    assert metrics["auroc"] == 0.5
    assert metrics["average_precision"] == pytest.approx(n_bad / n, abs=1e-15)
    assert metrics["recall_curve_area"] == pytest.approx(0.5, abs=1e-15)
    share, recall = detection_curve(torch.zeros(n), bad)
    np.testing.assert_allclose(recall, share, atol=1e-12)


def test_perfect_and_worst_scores() -> None:
    bad = np.arange(10) < 2
    assert detection_metrics(np.arange(10.0)[::-1], bad) == pytest.approx(
        {"auroc": 1, "average_precision": 1, "recall_at_rate": 1, "recall_curve_area": 0.9}
    )
    worst = detection_metrics(np.arange(10.0), bad)
    assert (worst["auroc"], worst["recall_at_rate"]) == (0, 0)
    assert worst["recall_curve_area"] == pytest.approx(0.1)
    share, recall = detection_curve(np.arange(10.0)[::-1], bad, n_points=11)
    np.testing.assert_allclose(recall, np.minimum(share / 0.2, 1))


def test_curve_is_interpolated_between_examples() -> None:
    share, recall = detection_curve(np.array([2.0, 1.0]), np.array([True, False]), n_points=5)
    np.testing.assert_allclose(share, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(recall, [0, 0.5, 1, 1, 1])


def test_suspicion_orients_and_averages_rows() -> None:
    row = torch.tensor([3.0, -1.0, 2.0])
    np.testing.assert_array_equal(suspicion(row, "high"), [3, -1, 2])
    np.testing.assert_array_equal(suspicion(row, "low"), [-3, 1, -2])
    matrix = torch.tensor([[1.0, 2.0], [3.0, -6.0]], requires_grad=True)
    result = suspicion(matrix, "low")
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, [-2, 2])
    np.testing.assert_array_equal(suspicion(matrix[:1], "high"), [1, 2])


@pytest.mark.parametrize("bad", [np.zeros(4, dtype=bool), np.ones(4, dtype=bool)])
@pytest.mark.parametrize("function", [detection_metrics, detection_curve])
def test_one_kind_only_is_undefined(function: Any, bad: np.ndarray) -> None:
    which = "all examples are bad" if bad.all() else "no example is bad"
    with pytest.raises(ValueError, match=rf"{which}.*task\.noise_rate=0\.2"):
        function(np.arange(4.0), bad)


def test_refusals() -> None:
    bad = np.array([True, False, False])
    with pytest.raises(ValueError, match=r"must be a vector \(n_train,\), got shape \(1, 3\)"):
        detection_metrics(np.ones((1, 3)), bad)
    with pytest.raises(ValueError, match="suspicion has 1 values that are not finite"):
        detection_metrics(np.array([1.0, np.nan, 2.0]), bad)
    with pytest.raises(ValueError, match=r"is_bad must be boolean of shape \(3,\), got int64"):
        detection_metrics(np.arange(3.0), bad.astype(np.int64))
    with pytest.raises(ValueError, match=r"is_bad must be boolean .* got bool of shape \(2,\)"):
        detection_metrics(np.arange(3.0), bad[:2])
    with pytest.raises(ValueError, match="n_points must be at least 2, got 1"):
        detection_curve(np.arange(3.0), bad, n_points=1)
    with pytest.raises(ValueError, match='end must be "high" or "low", got \'upper\''):
        suspicion(np.arange(3.0), "upper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(n_train,\) or \(n_query, n_train\), got \(\)"):
        suspicion(torch.tensor(1.0), "high")


def test_a_large_data_set_takes_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    scores, bad = rng.standard_normal(60_000), rng.random(60_000) < 0.2
    detection_metrics(scores[:100], bad[:100])
    start = time.process_time()
    detection_metrics(scores, bad)
    detection_curve(scores, bad)
    assert time.process_time() - start < 0.5
