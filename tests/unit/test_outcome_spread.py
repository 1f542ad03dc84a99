"""How much a query's outcome varies from run to run, and whether scores foretell it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fine_bench.leaderboard.completeness import incomplete
from fine_bench.metrics import registry
from fine_bench.metrics.lds import lds
from fine_bench.metrics.lds_interval import interval_over_queries
from fine_bench.metrics.outcome_spread import (
    mean_share,
    measured_spread,
    outcome_spread,
    predicted_spread,
    spread_ceiling,
)
from fine_bench.retraining.truth_files import folders, named
from support.records import make_record

Matrix = NDArray[np.float64]


def outcomes(
    q: int, subsets: int, seeds: int, spread: Matrix, means: float = 1.0
) -> tuple[Matrix, Matrix]:
    """Means of every other seed of a Gaussian world, ``(subsets, q)`` each.

    ``spread``: ``(q,)``, or ``(subsets, 1, q)``.
    """
    rng = np.random.default_rng(3)
    margin = means * rng.standard_normal((subsets, 1, q))
    margin = margin + spread * rng.standard_normal((subsets, seeds, q))
    return margin[:, 0::2].mean(1), margin[:, 1::2].mean(1)


def test_the_prediction_is_its_loop() -> None:
    scores = np.random.default_rng(0).standard_normal((4, 9)) * [[1.0], [3.0], [0.2], [1.0]]
    scores[3] = 0.1
    found = predicted_spread(scores)
    for q in range(3):
        mean = sum(scores[q]) / 9
        assert found[q] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores[q])))
    assert found[3] == 0.0


@pytest.mark.parametrize("seeds", [2, 5, 6])
def test_the_spread_is_that_of_single_runs(seeds: int) -> None:
    true = np.array([0.3, 1.0, 4.0])
    found = measured_spread(*outcomes(3, 4000, seeds, true), seeds)
    np.testing.assert_allclose(found, true, rtol=0.04)


def test_what_foretells_the_spread_reaches_the_ceiling() -> None:
    rng = np.random.default_rng(1)
    q, seeds = 300, 6
    true = np.exp(0.3 * rng.standard_normal(q))
    first, second = outcomes(q, 100, seeds, true)
    one, other = (measured_spread(first[i::2], second[i::2], seeds) for i in (0, 1))
    ceiling = spread_ceiling(one, other)
    assert 0.9 < ceiling < 1.0
    assert ceiling == pytest.approx(math.sqrt(stats.spearmanr(one, other).statistic))
    shape = rng.standard_normal((q, 40))
    scores = true[:, None] * shape / predicted_spread(shape)[:, None]
    assert outcome_spread(scores, other) == pytest.approx(ceiling, abs=0.02)
    # neither unit, sign nor a constant of each query matters; the size of each does
    moved = -5 * scores + rng.standard_normal((q, 1))
    assert outcome_spread(moved, other) == pytest.approx(outcome_spread(scores, other))
    assert outcome_spread(scores / true[:, None] ** 2, other) < -0.8


def test_what_cannot_be_ordered_is_undefined() -> None:
    rng = np.random.default_rng(0)
    assert math.isnan(outcome_spread(np.full((12, 5), 0.1), rng.random(12)))
    assert math.isnan(outcome_spread(rng.random((9, 5)), rng.random(9)))
    assert math.isnan(spread_ceiling(rng.random(9), rng.random(9)))


def test_the_share_of_the_means() -> None:
    q, subsets, seeds = 400, 400, 6
    rng = np.random.default_rng(5)
    same = mean_share(*outcomes(q, subsets, seeds, np.ones(q), means=0.5), seeds)
    assert same.mean > 0.99
    assert same.variation < 0.08
    spread = 1 + 0.15 * rng.choice([-1.0, 1.0], size=(subsets, 1, q))
    found = mean_share(*outcomes(q, subsets, seeds, spread, means=0.5), seeds)
    # Wasserstein distance of two Gaussians: 2·0.5² from the means, 2·0.15² from the deviations
    assert found.mean == pytest.approx(0.25 / (0.25 + 0.15**2), abs=0.01)
    variance = np.array([0.85**2, 1.15**2])
    assert found.variation == pytest.approx(variance.std() / variance.mean(), abs=0.02)


def test_the_frozen_truths_hold_it() -> None:
    """Numbers that docs/methods.md states."""
    for name, ceiling, least in (
        ("mnist_mlp", 0.931, 0.96),
        ("mnist_mlp_interpolating", 0.9, 0.99),
    ):
        truth = named(name, folders(None))
        subsets = truth.subsets
        assert subsets is not None
        one, other = subsets.spread("development"), subsets.spread("published")
        assert spread_ceiling(one, other) == pytest.approx(ceiling, abs=1e-3)
        own = subsets.of("published")
        share = mean_share(subsets.margin_first[own], subsets.margin_second[own], subsets.n_seeds)
        assert least < share.mean < 1.0
        scores = np.random.default_rng(0).gamma(0.3, size=(200, 4000))
        found = truth.metrics(scores, "queries")
        expected = stats.spearmanr(scores.std(1), other).statistic
        assert found["outcome_spread"] == pytest.approx(expected)
        assert found["outcome_spread_of_ceiling"] == pytest.approx(expected / ceiling, rel=2e-3)
        low, high = interval_over_queries(
            lds(scores, subsets.members[own], subsets.margin[own]).per_query
        )
        assert found["lds_error"] == pytest.approx((high - low) / 2)


def test_the_interval_over_queries() -> None:
    rng = np.random.default_rng(0)
    found = interval_over_queries(rng.normal(0.3, 0.1, size=400))
    half = 1.96 * 0.1 / 20
    assert (found[1] - found[0]) / 2 == pytest.approx(half, rel=0.1)
    assert found[0] < 0.3 < found[1]
    narrow = interval_over_queries(rng.normal(0.3, 0.1, size=400), level=0.5)
    assert narrow[1] - narrow[0] < 0.5 * (found[1] - found[0])
    with pytest.raises(ValueError, match="at least two of them, got shape"):
        interval_over_queries(np.ones(1))


def test_seeds_may_be_added_to_records_of_before() -> None:
    """They hold neither number, and nobody cut them."""
    before = {"lds": 0.3, "lds_of_ceiling": 0.4, "n_bad": 2.0}
    now = {"lds_error": 0.02, "outcome_spread": 0.1, "outcome_spread_of_ceiling": 0.11}
    records = [
        make_record(seed=seed, target="queries", metrics=before | more)
        for seed, more in ((0, {}), (1, now))
    ]
    assert incomplete(records, registry.together()) == []
    cut = make_record(seed=2, target="queries", metrics=before | {"outcome_spread": 0.1})
    (line,) = incomplete([*records, cut], registry.together())
    assert "seed 2 lacks metrics.outcome_spread_of_ceiling" in line


def test_refusals() -> None:
    x = np.ones((12, 3))
    with pytest.raises(ValueError, match=r"one shape \(subsets, q\), got \(12, 3\) and \(11, 3\)"):
        measured_spread(x, x[:11], 6)
    with pytest.raises(ValueError, match=r"at least two seeds a subset, got n_seeds=1; train"):
        measured_spread(x, x, 1)
    with pytest.raises(ValueError, match=r"scores must have shape \(q, n\), got \(12,\)"):
        predicted_spread(x[:, 0])
    with pytest.raises(ValueError, match=r"one number a query, shape \(12,\), got \(3,\)"):
        outcome_spread(x, x[0])
    with pytest.raises(ValueError, match="at least 10 subsets, got 9; train on more"):
        mean_share(x[:9], x[:9], 6)
