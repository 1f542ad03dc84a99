"""Estimates from retrained models: against slow twins, and on simulated banks with a known μ."""

from __future__ import annotations

from math import gamma

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtri
from sklearn.metrics import roc_auc_score

from fine_bench.metrics.definition import definition_mu, mean_over_sets, relation
from fine_bench.metrics.gaussianity import curve_fit, normality
from fine_bench.metrics.reliability import (
    Reliability,
    blocks_of,
    random_halves,
    spearman,
    spearman_brown,
    spearman_rows,
    split_half,
)
from fine_bench.metrics.retraining import (
    effect,
    models_for_counts,
    moment_mu,
    out_of_sample,
    retraining_mu,
)
from fine_bench.theory.estimation import estimate_mu

Matrix = NDArray[np.float64]


def bank(
    mu: Matrix | float, k: int, n: int, seed: int = 0, keep: float = 0.5, noise: str = "normal"
) -> tuple[NDArray[np.bool_], Matrix]:
    """K models, n examples whose own statistic is shifted by μ standard deviations when seen.

    Every example has a mean and a scale of its own, which must not matter.
    """
    rng = np.random.default_rng(seed)
    members = rng.random((k, n)) < keep
    draw = rng.standard_normal if noise == "normal" else rng.standard_exponential
    scale, place = np.exp(rng.standard_normal(n)), 5 * rng.standard_normal(n)
    return members, place + scale * (mu * members + draw((k, n)))


def hedges(freedom: int) -> float:
    """E[mean difference / pooled deviation] = μ / J."""
    return gamma(freedom / 2) / (np.sqrt(freedom / 2) * gamma((freedom - 1) / 2))


# ------------------------------------------------------------------------------- slow twins


def test_moment_is_the_formula() -> None:
    members, x = bank(np.linspace(-2, 2, 30), k=40, n=30, keep=0.4)
    found = retraining_mu(members, x)
    fast = moment_mu(members, x, np.ones((1, 40)))[0]
    for i in range(30):
        p, q = x[members[:, i], i], x[~members[:, i], i]
        scatter = sum((v - p.mean()) ** 2 for v in p) + sum((v - q.mean()) ** 2 for v in q)
        mu = (p.mean() - q.mean()) / np.sqrt(scatter / (len(p) + len(q) - 2))
        assert found.mu[i] == pytest.approx(mu, rel=1e-10)
        assert fast[i] == pytest.approx(mu, rel=1e-10)
        assert (found.n_in[i], found.n_out[i]) == (len(p), len(q))


def test_rank_is_the_auroc() -> None:
    members, x = bank(np.linspace(-2, 2, 30), k=60, n=30)
    x = np.round(x, 1)  # ties
    found = retraining_mu(members, x, "rank")
    for i in range(30):
        auc = roc_auc_score(members[:, i], x[:, i])
        assert found.mu[i] == pytest.approx(np.sqrt(2) * ndtri(auc), rel=1e-9)


def test_rank_without_overlap_is_infinite_and_says_why() -> None:
    members, x = bank(0.0, k=40, n=3)
    x[:, 1] = np.where(members[:, 1], 10.0, -10.0) + 0.01 * x[:, 1]
    found = retraining_mu(members, x, "rank")
    assert found.mu[1] == np.inf
    assert 1.0 < found.lower[1] < np.inf
    assert "do not overlap" in found.reason[1]
    assert found.reason[0] == ""


def slow_two_stage(p: Matrix, q: Matrix) -> tuple[float, float, float]:
    """μ and its interval, in loops over thresholds."""

    def shrunk(hits: int, n: int) -> float:
        return (hits + 0.5) / (n + 1)

    def error(rate: float, n: int) -> float:
        return rate * (1 - rate) / (n * stats.norm.pdf(stats.norm.ppf(rate)) ** 2)

    choose_p, choose_q, measure_p, measure_q = p[0::2], q[0::2], p[1::2], q[1::2]
    best, threshold = -1.0, np.nan
    for tau in sorted([*choose_p, *choose_q]):
        rejected, kept = sum(choose_p < tau), sum(choose_q >= tau)
        if (rejected, kept) == (0, len(choose_q)) or (rejected, kept) == (len(choose_p), 0):
            continue
        a, b = shrunk(rejected, len(choose_p)), shrunk(kept, len(choose_q))
        mu = stats.norm.ppf(1 - a) - stats.norm.ppf(b)
        strength = abs(mu) / np.sqrt(error(a, len(choose_p)) + error(b, len(choose_q)))
        if strength > best:
            best, threshold = strength, tau
    hits = [
        (int(sum(measure_p < threshold)), len(measure_p)),
        (int(sum(measure_q >= threshold)), len(measure_q)),
    ]
    mu = -sum(stats.norm.ppf(shrunk(k, n)) for k, n in hits)
    ends = [
        stats.binomtest(k, n).proportion_ci(np.sqrt(0.95), method="exact")  # both arms hold
        for k, n in hits
    ]
    return (
        mu,
        -sum(stats.norm.ppf(end.high) for end in ends),
        -sum(stats.norm.ppf(end.low) for end in ends),
    )


def test_two_stage_is_its_loop_and_the_function_for_one_subset() -> None:
    members, x = bank(np.linspace(-2, 2, 20), k=90, n=20, keep=0.6, seed=3)
    found = retraining_mu(members, x, "two_stage")
    for i in range(20):
        p, q = x[members[:, i], i], x[~members[:, i], i]
        mu, lower, upper = slow_two_stage(p, q)
        assert found.mu[i] == pytest.approx(mu, rel=1e-9)
        if found.reason[i] == "":
            assert found.lower[i] == pytest.approx(lower, rel=1e-6)
            assert found.upper[i] == pytest.approx(upper, rel=1e-6)
        one = estimate_mu(p, q, "two_stage")
        assert (found.mu[i], found.lower[i], found.upper[i]) == (one.mu, one.lower, one.upper)


def test_moment_of_many_selections() -> None:
    members, x = bank(np.linspace(-2, 2, 12), k=80, n=12)
    x += 1e6  # digits must survive a large mean
    rng = np.random.default_rng(1)
    weights = rng.random((5, 80)) < 0.5
    fast = moment_mu(members, x, weights)
    for r in range(5):
        slow = retraining_mu(members[weights[r]], x[weights[r]]).mu
        np.testing.assert_allclose(fast[r], slow, rtol=1e-7)


def test_moment_is_undefined_where_nothing_varies_or_an_arm_is_empty() -> None:
    members, x = bank(1.0, k=40, n=3)
    x[:, 0] = 0.1 + 0.2
    members[:, 1] = True
    found = moment_mu(members, x, np.ones((1, 40)))[0]
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2])


def test_effect_and_out_of_sample_mean() -> None:
    members, x = bank(np.linspace(-2, 2, 8), k=50, n=8)
    difference, outside = effect(members, x), out_of_sample(members, x)
    for i in range(8):
        p, q = x[members[:, i], i], x[~members[:, i], i]
        assert difference[i] == pytest.approx(p.mean() - q.mean())
        assert outside[i] == pytest.approx(q.mean())


# ------------------------------------------------------------------------- simulated truth


@pytest.mark.parametrize("mu", [-1.5, 0.0, 0.7, 3.0])
def test_gaussian_shift_bias_and_coverage(mu: float) -> None:
    """Every one of 2,000 examples is one simulation of a bank with the same true μ."""
    members, x = bank(mu, k=100, n=2000, seed=int(10 * mu) + 20)
    for method in ("moment", "rank"):
        found = retraining_mu(members, x, method)
        covered = np.mean((found.lower <= mu) & (mu <= found.upper))
        # few ranks overlap at μ = 3 with 50 models an arm: 0.93 there
        lowest = 0.91 if (method, mu) == ("rank", 3.0) else 0.935
        assert lowest <= covered <= 0.965, method
        finite = np.isfinite(found.mu)
        error = found.mu[finite].std() / np.sqrt(2000)
        if method == "moment":
            assert abs(found.mu.mean() - mu / hedges(98)) < 3.5 * error
            assert found.std_error.mean() == pytest.approx(found.mu.std(), rel=0.05)
            counts = 1 / found.n_in + 1 / found.n_out
            assert np.sqrt(counts + mu**2 / (2 * 98)).mean() == pytest.approx(
                found.mu.std(), rel=0.05
            )
        else:  # Φ⁻¹ bends, so the rank estimate has a bias of second order in its error
            assert abs(found.mu[finite].mean() - mu) < 0.02 + 0.04 * abs(mu)


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_two_stage_covers_at_least_at_its_level(mu: float) -> None:
    members, x = bank(mu, k=200, n=1500, seed=7)
    found = retraining_mu(members, x, "two_stage")
    assert np.mean((found.lower <= mu) & (mu <= found.upper)) >= 0.95
    assert np.isnan(found.mu).mean() < 0.02  # a test that rejected nothing has told nothing
    assert abs(np.nanmean(found.mu) - mu) < 0.03


def test_skewed_noise_is_in_the_standard_error() -> None:
    mu = 3.0
    members, x = bank(mu, k=200, n=2000, seed=5, noise="exponential")
    found = retraining_mu(members, x)
    covered = np.mean((found.lower <= mu) & (mu <= found.upper))
    assert 0.89 <= covered <= 0.96
    naive = 1.96 * np.sqrt(1 / found.n_in + 1 / found.n_out + found.mu**2 / (2 * 198))
    assert np.mean(np.abs(found.mu - mu) <= naive) < 0.82  # the textbook formula


def known_reliability(k: int, spread: float, seed: int = 0) -> tuple[float, Reliability, float]:
    """Pearson reliability by theory, what was found, and Spearman with the true μ."""
    mu = spread * np.random.default_rng(seed).standard_normal(3000)
    members, x = bank(mu, k=k, n=3000, seed=seed + 1)
    estimate = moment_mu(members, x, np.ones((1, k)))[0]
    theory = spread**2 / (spread**2 + 4 / k)
    return theory, split_half(members, x, n_splits=20), spearman(mu, estimate)


@pytest.mark.parametrize(("k", "spread"), [(60, 0.4), (120, 0.15), (240, 0.4)])
def test_the_ceiling_is_the_correlation_with_the_truth(k: int, spread: float) -> None:
    theory, found, correlation = known_reliability(k, spread)
    # Spearman's of a Gaussian pair is 6/π asin(r/2), a little below Pearson's r
    exact = 6 / np.pi * np.arcsin(np.sqrt(theory) / 2)
    assert found.ceiling == pytest.approx(exact, abs=0.015)
    assert correlation == pytest.approx(exact, abs=0.02)
    assert found.full == pytest.approx(theory, abs=0.03)
    assert found.half == pytest.approx(6 / np.pi * np.arcsin(theory / (2 - theory) / 2), abs=0.02)


def test_models_needed_for_a_ceiling() -> None:
    _, found, _ = known_reliability(120, 0.3)
    needed = found.models_for(0.95)
    pearson = (2 * np.sin(np.pi * 0.95 / 6)) ** 2  # of the estimate with the true μ, squared
    assert needed == pytest.approx(4 * pearson / (0.3**2 * (1 - pearson)), rel=0.1)
    _, there, correlation = known_reliability(int(needed), 0.3)
    assert there.ceiling == pytest.approx(0.95, abs=0.01)
    assert correlation == pytest.approx(0.95, abs=0.01)
    assert Reliability(-0.1, -0.2, np.nan, 10, 1).models_for() == np.inf
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        found.models_for(1.0)


def test_no_influence_has_no_ceiling() -> None:
    members, x = bank(0.0, k=60, n=2000)
    found = split_half(members, x)
    assert abs(found.half) < 0.06


def test_ceiling_within_some_examples() -> None:
    rng = np.random.default_rng(0)
    bad = np.arange(2000) < 400
    mu = np.where(bad, 3.0, 0.2 * rng.standard_normal(2000))
    members, x = bank(mu, k=100, n=2000, seed=1)
    whole, clean = split_half(members, x), split_half(members, x, examples=~bad)
    estimate = moment_mu(members, x, np.ones((1, 100)))[0]
    assert whole.ceiling > clean.ceiling + 0.05
    assert clean.ceiling == pytest.approx(spearman(mu[~bad], estimate[~bad]), abs=0.02)


def test_spearman_brown() -> None:
    assert spearman_brown(0.6) == pytest.approx(1.2 / 1.6)
    assert spearman_brown(spearman_brown(0.3, 2.5), 1 / 2.5) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="factor must be > 0"):
        spearman_brown(0.5, 0.0)


def test_spearman_by_rows() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 9, (4, 50)).astype(float)
    b = a + rng.integers(0, 9, (4, 50))
    a[3] = 2.0
    found = spearman_rows(a, b)
    for r in range(3):
        assert found[r] == pytest.approx(stats.spearmanr(a[r], b[r]).statistic)
    assert np.isnan(found[3])


def test_complements_and_repeats_stay_in_one_half() -> None:
    rng = np.random.default_rng(0)
    some = rng.random((10, 30)) < 0.5
    members = np.concatenate([some, ~some, some[:3]])
    blocks = blocks_of(members)
    np.testing.assert_array_equal(blocks, [*range(10), *range(10), 0, 1, 2])
    halves = random_halves(blocks, 200, rng)
    for block in range(10):
        own = halves[:, blocks == block]
        assert (own == own[:, :1]).all()
    assert (halves[:, :10].sum(axis=1) == 5).all()
    assert 60 < halves[:, 0].sum() < 140


def test_models_for_counts_is_the_smallest() -> None:
    def short(k: int) -> float:
        return 500 * float(stats.binom.cdf(7, k, 0.3) + stats.binom.cdf(7, k, 0.7))

    found = models_for_counts(500, 0.3)
    assert short(found) <= 0.05 < short(found - 1)
    rng = np.random.default_rng(0)
    counts = (rng.random((300, found, 500)) < 0.3).sum(axis=1)
    assert np.mean(counts.min(axis=1) < 8) < 0.1


# ------------------------------------------------------------------------------- Gaussianity


def test_normality_twin_and_size() -> None:
    members, x = bank(1.0, k=120, n=1500)
    found = normality(members, x)
    for i in (0, 7):
        p, q = x[members[:, i], i], x[~members[:, i], i]
        assert found.p_in[i] == pytest.approx(stats.normaltest(p).pvalue)
        assert found.p_out[i] == pytest.approx(stats.normaltest(q).pvalue)
        assert found.skew_in[i] == pytest.approx(stats.skew(p, bias=False))
        assert found.kurtosis_out[i] == pytest.approx(stats.kurtosis(q, bias=False))
    summary = found.summary()
    assert 0.035 < summary["share_rejected"] < 0.075  # K² is a little liberal at 60 models
    assert summary["median_abs_skew"] < 0.3
    skewed = normality(*bank(1.0, k=120, n=300, noise="exponential")).summary()
    assert skewed["share_rejected"] > 0.95
    assert skewed["median_abs_skew"] > 1.0


def test_normality_of_what_never_varies_is_undefined() -> None:
    members, x = bank(0.0, k=60, n=2)
    x[:, 0] = 1.0
    found = normality(members, x)
    assert np.isnan(found.p_in[0])
    assert np.isfinite(found.summary()["share_rejected"])
    x[:, 1] = 2.0
    assert np.isnan(normality(members, x).summary()["share_rejected"])


def test_a_gaussian_shift_has_a_gaussian_curve() -> None:
    members, x = bank(-1.0, k=150, n=60)
    fits = [curve_fit(members, x, i, n_simulations=60) for i in range(60)]
    assert np.mean([fit.is_gaussian for fit in fits]) >= 0.85
    fit = fits[0]
    assert fit.mu < 0
    assert fit.gaussian[len(fit.alpha) // 2] == pytest.approx(
        stats.norm.cdf(stats.norm.ppf(1 - fit.alpha[len(fit.alpha) // 2]) - fit.mu)
    )
    # the curve of a test that errs more often than chance lies above 1 − α
    assert np.mean(fit.beta - (1 - fit.alpha)) > 0.1


def test_a_mixture_has_not() -> None:
    members, x = bank(0.0, k=400, n=1)
    rng = np.random.default_rng(0)
    x[:, 0] = rng.standard_normal(400) + 12.0 * members[:, 0] * (rng.random(400) < 0.3)
    fit = curve_fit(members, x, 0)
    assert fit.distance > 1.5 * fit.expected
    assert not fit.is_gaussian


# -------------------------------------------------------------------------------- definition


def test_definition_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    subset = np.repeat(np.arange(3), [12, 9, 8])
    margin = rng.standard_normal((29, 20))
    sets = [np.array([4]), np.array([1, 2, 19])]
    margin[subset == 2] -= 2.0
    found = definition_mu(margin, subset, sets)
    for s, positions in enumerate(sets):
        t = margin[:, positions].mean(axis=1)
        p, q = t[subset == 0], t[subset == s + 1]
        freedom = len(p) + len(q) - 2
        pooled = ((len(p) - 1) * p.var(ddof=1) + (len(q) - 1) * q.var(ddof=1)) / freedom
        assert found.mu[s] == pytest.approx((p.mean() - q.mean()) / np.sqrt(pooled))
    assert found.mu[1] > 1.5  # without the set its margin falls: it helps
    np.testing.assert_allclose(mean_over_sets(np.arange(20.0), sets), [4.0, 22 / 3])


def test_relation_finds_slope_and_intercept_and_its_intervals_cover() -> None:
    covered = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(60) + 1.0
        y = 0.5 + 2.0 * x + 0.7 * rng.standard_normal(60)
        found = relation(x, y, n_resamples=300, seed=seed)
        covered.append(
            [
                found[f"{name}/lower"] <= value <= found[f"{name}/upper"]
                for name, value in (("slope", 2.0), ("intercept", 0.5))
            ]
        )
        assert found["slope_through_origin"] == pytest.approx((x @ y) / (x @ x))
        assert found["slope"] == pytest.approx(np.polyfit(x, y, 1)[0])
        assert found["intercept"] == pytest.approx(np.polyfit(x, y, 1)[1])
        assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert (np.mean(covered, axis=0) > 0.87).all()


def test_relation_of_equal_truths_reaches_its_ceiling() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(3000)
    x, y = truth + 0.5 * rng.standard_normal(3000), truth + rng.standard_normal(3000)
    found = relation(
        x,
        y,
        bank_error=np.full(3000, 0.5),
        definition_error=np.ones(3000),
        n_resamples=100,
    )
    assert found["ceiling"] == pytest.approx(1 / np.sqrt(1.25 * 2), abs=0.02)
    assert found["spearman"] == pytest.approx(found["ceiling"], abs=0.04)


# ---------------------------------------------------------------------------------- refusals


def test_refusals() -> None:
    members, x = bank(0.0, k=40, n=20)
    with pytest.raises(ValueError, match=r"method must be one of .*'max'"):
        retraining_mu(members, x, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"members must be boolean .* got int64"):
        retraining_mu(members.astype(np.int64), x)
    with pytest.raises(ValueError, match=r"statistic must have the shape of members"):
        effect(members, x[:, :5])
    with pytest.raises(ValueError, match="not finite"):
        out_of_sample(members, np.where(members, np.nan, x))
    with pytest.raises(ValueError, match=r"weights must have shape \(R, 40\)"):
        moment_mu(members, x, np.ones(40))
    with pytest.raises(ValueError, match=r"too few models: of 12, .* about \d+ models"):
        retraining_mu(members[:12], x[:12])
    with pytest.raises(ValueError, match="too few models"):
        split_half(members[:12], x[:12])
    with pytest.raises(ValueError, match="n_splits must be at least 1"):
        split_half(members, x, n_splits=0)
    with pytest.raises(ValueError, match=r"examples must be boolean of shape \(20,\)"):
        split_half(members, x, examples=np.ones(20))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a ceiling over 3 examples says nothing"):
        split_half(members, x, examples=np.arange(20) < 3)
    with pytest.raises(ValueError, match="keep must lie strictly between"):
        models_for_counts(10, 1.0)
    with pytest.raises(ValueError, match="normality needs at least 20 models"):
        normality(members[:30], x[:30])
    with pytest.raises(ValueError, match="example must be from 0 to 19, got 20"):
        curve_fit(members, x, 20)
    with pytest.raises(ValueError, match="n_simulations must be at least 20"):
        curve_fit(members, x, 0, n_simulations=5)
    with pytest.raises(ValueError, match="does not vary"):
        curve_fit(members, np.zeros_like(x), 0)
    with pytest.raises(ValueError, match="is in 40 of 40 models"):
        curve_fit(np.ones_like(members), x, 0)


def test_refusals_of_the_definition() -> None:
    margin, subset = np.random.default_rng(0).random((20, 6)), np.repeat([0, 1], [16, 4])
    with pytest.raises(ValueError, match=r"there are 4 models without set 0; retrain 1 more"):
        definition_mu(margin, subset, [np.array([1])])
    with pytest.raises(ValueError, match=r"margin must have shape \(K, n\)"):
        definition_mu(margin, subset[:5], [np.array([1])])
    with pytest.raises(ValueError, match="sets is empty"):
        definition_mu(margin, subset, [])
    with pytest.raises(ValueError, match="set 0 is empty"):
        definition_mu(margin, np.repeat([0, 1], 10), [np.array([], dtype=np.int64)])
    with pytest.raises(ValueError, match="bank has 3 sets, definition 4"):
        relation(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="at least 5 sets, got 3"):
        relation(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="n_resamples must be at least 100"):
        relation(np.arange(6.0), np.arange(6.0), n_resamples=1)
