"""Recall and precision at the top of a list, ties by their expectation."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from fine_bench.metrics.top import found_in_top, top_metrics


def test_by_counting() -> None:
    scores = np.array([0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.4, 0.0, 0.6, 0.5])
    bad = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 0], dtype=bool)
    found = top_metrics(scores, bad, shares=(0.2, 0.3), sizes=(1, 3, 10))
    assert found == {
        "recall_top_20": pytest.approx(1 / 3),
        "recall_top_30": pytest.approx(2 / 3),
        "precision_at_1": 1.0,
        "precision_at_3": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_ties_are_the_mean_over_all_orders(k: int) -> None:
    scores = np.array([2.0, 1.0, 1.0, 1.0, 0.0])
    bad = np.array([0, 1, 0, 1, 1], dtype=bool)
    counts = []
    for middle in permutations([1, 2, 3]):
        order = [0, *middle, 4]
        counts.append(bad[order[:k]].sum())
    assert found_in_top(scores, bad, k) == pytest.approx(float(np.mean(counts)))


def test_bad_arguments() -> None:
    scores, bad = np.arange(4.0), np.array([True, False, False, False])
    with pytest.raises(ValueError, match="k must be from 1 to the number of examples, 4; got 5"):
        found_in_top(scores, bad, 5)
    with pytest.raises(ValueError, match="must be boolean of shape"):
        found_in_top(scores, bad[:3], 2)
    with pytest.raises(ValueError, match="no example is bad"):
        top_metrics(scores, ~np.ones(4, dtype=bool))
