"""Fidelity, calibration and the linear datamodeling score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from fine_bench.metrics.fidelity import calibration, fidelity
from fine_bench.metrics.lds import SubsetMargins, by_subset, lds, lds_ceiling

Matrix = NDArray[np.float64]


def test_fidelity_is_spearman_beside_the_ceiling() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(200)
    scores = truth + rng.standard_normal(200)
    clean = rng.random(200) < 0.7
    found = fidelity(torch.from_numpy(scores), truth, 0.9, torch.from_numpy(clean), 0.8)
    whole = stats.spearmanr(scores, truth).statistic
    within = stats.spearmanr(scores[clean], truth[clean]).statistic
    assert found["fidelity"] == pytest.approx(whole)
    assert found["fidelity_of_ceiling"] == pytest.approx(whole / 0.9)
    assert found["fidelity_clean"] == pytest.approx(within)
    assert found["fidelity_clean_of_ceiling"] == pytest.approx(within / 0.8)
    assert found["fidelity_slope"] == pytest.approx((scores @ truth) / (scores @ scores))
    assert "fidelity_clean" not in fidelity(scores, truth, 0.9)


def test_a_perfect_method_reaches_the_ceiling() -> None:
    rng = np.random.default_rng(0)
    true = rng.standard_normal(5000)
    measured = true + 0.5 * rng.standard_normal(5000)  # reliability 0.8
    found = fidelity(true, measured, float(np.sqrt(0.8)))
    assert found["fidelity_of_ceiling"] == pytest.approx(1.0, abs=0.02)
    assert found["fidelity_slope"] == pytest.approx(1.0, abs=0.02)
    assert found["fidelity_log_linearity_error"] < 0.04


def test_constant_scores_are_undefined() -> None:
    truth = np.random.default_rng(0).standard_normal(50)
    found = fidelity(np.full(50, 0.3), truth, 0.9, np.ones(50, dtype=bool), 0.9)
    assert np.isnan(list(found.values())).all()


def test_few_clean_examples_are_undefined() -> None:
    truth = np.random.default_rng(0).standard_normal(50)
    found = fidelity(truth, truth, 1.0, np.arange(50) < 9, 1.0)
    assert found["fidelity"] == pytest.approx(1.0)
    assert np.isnan(found["fidelity_clean"])


def test_calibration_is_the_formula() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(103)
    y = 2.5 * x + 0.3 * x**3 + rng.standard_normal(103)
    found = calibration(x, y)
    order = np.argsort(x)
    edges = [len(part) for part in np.array_split(order, 10)]
    assert set(edges) == {10, 11}
    start = 0
    for j, size in enumerate(edges):
        rows = order[start : start + size]
        assert found.predicted[j] == pytest.approx(np.mean(x[rows]))
        assert found.true[j] == pytest.approx(np.mean(y[rows]))
        start += size
    p, t = found.predicted, found.true
    c = sum(p * t) / sum(p * p)
    rms = np.sqrt(sum((t - c * p) ** 2) / 10) / np.sqrt(sum(t * t) / 10)
    assert found.log_linearity_error == pytest.approx(rms)
    assert found.slope == pytest.approx(np.sum(x * y) / np.sum(x**2))


def test_proportional_scores_have_no_error_whatever_the_factor() -> None:
    truth = np.random.default_rng(0).standard_normal(100)
    for factor in (0.01, 1.0, 300.0):
        found = calibration(factor * truth, truth)
        assert found.slope == pytest.approx(1 / factor)
        assert found.log_linearity_error == pytest.approx(0.0, abs=1e-12)
    # the right order in the wrong shape: that is no number
    assert calibration(np.exp(2 * truth), truth).log_linearity_error > 0.5


def test_refusals() -> None:
    x = np.arange(20.0)
    with pytest.raises(ValueError, match="scores has 20 examples, truth 19"):
        fidelity(x, x[1:], 0.9)
    with pytest.raises(ValueError, match="at least 10 examples, got 4"):
        fidelity(x[:4], x[:4], 0.9)
    with pytest.raises(ValueError, match=r"ceiling must lie in \(0, 1\]"):
        fidelity(x, x, 1.2)
    with pytest.raises(ValueError, match=r"ceiling_clean must lie in \(0, 1\]"):
        fidelity(x, x, 0.9, x > 3, 0.0)
    with pytest.raises(ValueError, match="clean must be boolean"):
        fidelity(x, x, 0.9, x)
    with pytest.raises(ValueError, match="not finite"):
        fidelity(np.where(x > 3, np.nan, x), x, 0.9)
    with pytest.raises(ValueError, match="n_bins must be from 2"):
        calibration(x, x, 21)


# ----------------------------------------------------------------------------------------- LDS


def repeated(
    n_subsets: int = 60, n: int = 50, q: int = 30, seeds: int = 5, noise: float = 3.0
) -> tuple[Matrix, NDArray[np.bool_], NDArray[np.int64], Matrix]:
    """A linear world: margin = Σ effect over the members + noise of the seed; models shuffled."""
    rng = np.random.default_rng(4)
    effects = rng.standard_normal((q, n))
    members = rng.random((n_subsets, n)) < 0.5
    subset = rng.permutation(np.repeat(np.arange(n_subsets), seeds)).astype(np.int64)
    clean = members.astype(float) @ effects.T
    margin = clean[subset] + noise * rng.standard_normal((len(subset), q))
    return effects, members, subset, margin


def test_lds_is_its_loop() -> None:
    effects, members, subset, margin = repeated(n_subsets=14, n=20, q=4)
    rng = np.random.default_rng(0)
    scores = effects + rng.standard_normal(effects.shape)
    subsets = by_subset(members[subset], subset, margin)
    found = lds(torch.from_numpy(scores), subsets.members, subsets.mean)
    for query in range(4):
        predicted = [sum(scores[query, i] for i in range(20) if s[i]) for s in members]
        shown = [np.mean(margin[subset == s, query]) for s in range(14)]
        assert found.per_query[query] == pytest.approx(stats.spearmanr(predicted, shown).statistic)
    assert found.mean == pytest.approx(np.mean(found.per_query))
    assert found.n_constant == 0


def test_the_ceiling_is_what_the_true_effects_reach() -> None:
    for seeds, noise in ((5, 3.0), (6, 6.0), (7, 10.0)):
        effects, members, subset, margin = repeated(200, seeds=seeds, noise=noise)
        subsets = by_subset(members[subset], subset, margin)
        ceiling = lds_ceiling(subsets)
        reached = lds(effects, subsets.members, subsets.mean).mean
        assert (ceiling.n_seeds, ceiling.seeds_per_half) == (seeds, seeds // 2)
        assert ceiling.ceiling == pytest.approx(reached, abs=0.015)
        # variance of the effects' sum is about n/4
        assert ceiling.full == pytest.approx(12.5 / (12.5 + noise**2 / seeds), abs=0.04)


def test_scores_that_predict_the_loss_are_negative() -> None:
    effects, members, subset, margin = repeated(100)
    subsets = by_subset(members[subset], subset, margin)
    assert lds(-effects, subsets.members, subsets.mean).mean < -0.5


def test_constant_scores() -> None:
    effects, members, subset, margin = repeated(20, q=3)
    subsets = by_subset(members[subset], subset, margin)
    constant = lds(np.full_like(effects, 0.1), subsets.members, subsets.mean)
    assert np.isnan(constant.mean)
    assert constant.n_constant == 3
    effects[1] = 0.1  # its sums over subsets differ by rounding, or by the subsets' sizes
    partly = lds(effects, subsets.members, subsets.mean)
    assert partly.per_query[1] == 0.0
    assert partly.n_constant == 1
    assert partly.mean == pytest.approx(partly.per_query.sum() / 3)


def test_more_seeds_of_some_subsets_are_left_out() -> None:
    _, members, subset, margin = repeated(12)
    extra = np.append(subset, 3)
    subsets = by_subset(members[extra], extra, np.vstack([margin, margin[:1] + 100]))
    assert subsets.margin.shape == (12, 5, 30)
    np.testing.assert_allclose(subsets.mean[3], margin[subset == 3].mean(axis=0))


def test_lds_refusals() -> None:
    effects, members, subset, margin = repeated(20)
    inside = members[subset]
    keep = np.arange(len(subset)) != np.flatnonzero(subset == 7)[0]
    with pytest.raises(ValueError, match=r"subset 7 has 4; train 1 more on it"):
        by_subset(inside[keep], subset[keep], margin[keep])
    wrong = inside ^ ~keep[:, None]
    with pytest.raises(ValueError, match="subset 7 names models with different members"):
        by_subset(wrong, subset, margin)
    with pytest.raises(ValueError, match="must have one K"):
        by_subset(inside, subset[:4], margin)
    few = subset < 9
    with pytest.raises(ValueError, match="at least 10 subsets, got 9"):
        by_subset(inside[few], subset[few], margin[few])
    with pytest.raises(ValueError, match=r"at least 5 seeds a subset, got 2; train 3 more"):
        SubsetMargins(members, np.zeros((20, 2, 3)))
    with pytest.raises(ValueError, match=r"margin must have shape \(20, seeds, q\)"):
        SubsetMargins(members, np.zeros((19, 5, 3)))
    with pytest.raises(ValueError, match="members must be boolean"):
        SubsetMargins(members.astype(float), np.zeros((20, 5, 3)))  # type: ignore[arg-type]
    subsets = by_subset(inside, subset, margin)
    with pytest.raises(ValueError, match="must have one n"):
        lds(effects[:, 1:], members, subsets.mean)
    with pytest.raises(ValueError, match=r"margin must have shape \(subsets, q\)"):
        lds(effects, members, subsets.mean.T)
    with pytest.raises(ValueError, match="n_splits must be at least 1"):
        lds_ceiling(subsets, n_splits=0)
