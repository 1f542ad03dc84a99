"""Estimates of μ, p-values and discoveries: against slow twins, and by simulation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import norm

from fine_bench.theory.arrays import FloatArray
from fine_bench.theory.error_rates import clopper_pearson
from fine_bench.theory.estimation import (
    InfluenceEstimate,
    Method,
    estimate_mu,
    max_mu,
    moment_mu,
    rank_mu,
    two_stage_mu,
)
from fine_bench.theory.false_discovery import (
    benjamini_hochberg,
    conformal_p_values,
    trusted_size_needed,
)
from fine_bench.theory.p_values import analytic_p_value, permutation_p_value

METHODS: tuple[Method, ...] = ("two_stage", "max", "moment", "rank")


def gaussian_arms(
    mu: float, runs: int, n_p: int, n_q: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """P = N(mu, 1) above Q = N(0, 1), up to a common shift and scale that must not matter."""
    rng = np.random.default_rng(seed)
    return 2.5 * rng.normal(mu, 1.0, (runs, n_p)) - 7.0, 2.5 * rng.normal(size=(runs, n_q)) - 7.0


def covered(estimate: InfluenceEstimate, mu: float) -> float:
    return float(((estimate.lower <= mu) & (mu <= estimate.upper)).mean())


# Slow twins: the rules in plain Python --------------------------------------------------------


def slow_rates(p: FloatArray, q: FloatArray, tau: float) -> tuple[float, float]:
    return sum(x < tau for x in p) / len(p), sum(x >= tau for x in q) / len(q)


def slow_max(p: FloatArray, q: FloatArray, clip: float) -> float:
    best = 0.0
    for tau in sorted({*p.tolist(), *q.tolist()}):
        alpha, beta = slow_rates(p, q, tau)
        if (alpha, beta) in ((0.0, 1.0), (1.0, 0.0)):
            continue
        alpha = min(max(alpha, clip, 0.5 / len(p)), 1 - max(clip, 0.5 / len(p)))
        beta = min(max(beta, clip, 0.5 / len(q)), 1 - max(clip, 0.5 / len(q)))
        mu = norm.ppf(1 - alpha) - norm.ppf(beta)
        if abs(mu) > abs(best) + 1e-12:
            best = mu
    return best


def slow_band(p: FloatArray, q: FloatArray, level: float) -> tuple[float, float]:
    """Intersection over thresholds of what P(sup|F̂ − F| > e) ≤ 2 exp(−2ne²) leaves of μ."""
    band_p, band_q = (
        np.sqrt(np.log(2 / (1 - np.sqrt(level))) / (2 * len(sample))) for sample in (p, q)
    )
    low, high = -np.inf, np.inf
    for tau in [*p.tolist(), *q.tolist(), np.inf]:
        alpha, beta = slow_rates(p, q, tau)
        low = max(low, norm.ppf(1 - min(alpha + band_p, 1)) - norm.ppf(min(beta + band_q, 1)))
        high = min(high, norm.ppf(1 - max(alpha - band_p, 0)) - norm.ppf(max(beta - band_q, 0)))
    return (low, high) if low <= high else (-np.inf, np.inf)


def slow_two_stage(p: FloatArray, q: FloatArray, level: float) -> tuple[float, float, float]:
    def smooth(rate: float, n: int) -> float:
        return (rate * n + 0.5) / (n + 1)

    choose_p, measure_p, choose_q, measure_q = p[::2], p[1::2], q[::2], q[1::2]
    best, chosen = -1.0, np.nan
    for tau in sorted({*choose_p.tolist(), *choose_q.tolist()}):
        alpha, beta = slow_rates(choose_p, choose_q, tau)
        if (alpha, beta) in ((0.0, 1.0), (1.0, 0.0)):
            continue
        alpha, beta = smooth(alpha, len(choose_p)), smooth(beta, len(choose_q))
        variance = alpha * (1 - alpha) / len(choose_p) / norm.pdf(norm.ppf(alpha)) ** 2
        variance += beta * (1 - beta) / len(choose_q) / norm.pdf(norm.ppf(beta)) ** 2
        strength = abs(norm.ppf(1 - alpha) - norm.ppf(beta)) / np.sqrt(variance)
        if strength > best + 1e-12:
            best, chosen = strength, tau
    alpha, beta = slow_rates(measure_p, measure_q, chosen)
    each = np.sqrt(level)
    interval_a = stats.binomtest(round(alpha * len(measure_p)), len(measure_p)).proportion_ci(
        each, method="exact"
    )
    interval_b = stats.binomtest(round(beta * len(measure_q)), len(measure_q)).proportion_ci(
        each, method="exact"
    )
    mu = norm.ppf(1 - smooth(alpha, len(measure_p))) - norm.ppf(smooth(beta, len(measure_q)))
    return (
        np.nan if (alpha, beta) in ((0.0, 1.0), (1.0, 0.0)) else mu,
        norm.ppf(1 - interval_a.high) - norm.ppf(interval_b.high),
        norm.ppf(1 - interval_a.low) - norm.ppf(interval_b.low),
    )


def slow_rank(p: FloatArray, q: FloatArray) -> tuple[float, float]:
    wins = np.array([[1.0 if x > y else 0.5 if x == y else 0.0 for y in q] for x in p])
    auc = wins.mean()
    variance = np.var(wins.mean(1), ddof=1) / len(p) + np.var(wins.mean(0), ddof=1) / len(q)
    return np.sqrt(2) * norm.ppf(auc), np.sqrt(2 * variance) / norm.pdf(norm.ppf(auc))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_estimates_match_their_slow_twins(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.normal(rng.normal(), 1.0, 41), rng.normal(0.0, 1.3, 36)
    if ties:
        p, q = np.round(p, 0), np.round(q, 0)
    assert max_mu(p, q).mu == pytest.approx(slow_max(p, q, 0.01))
    assert max_mu(p, q, clip=0.1).mu == pytest.approx(slow_max(p, q, 0.1))
    rule = max_mu(p, q, 0.9)
    assert [rule.lower, rule.upper] == pytest.approx(slow_band(p, q, 0.9))
    split = two_stage_mu(p, q, 0.9)
    twin = slow_two_stage(p, q, 0.9)
    assert [split.mu, split.lower, split.upper] == pytest.approx(list(twin), nan_ok=True)
    rank = rank_mu(p, q)
    assert [rank.mu, rank.std_error] == pytest.approx(slow_rank(p, q))
    moment = moment_mu(p, q)
    pooled = np.sqrt((40 * np.var(p, ddof=1) + 35 * np.var(q, ddof=1)) / 75)
    assert moment.mu == pytest.approx((p.mean() - q.mean()) / pooled)
    assert moment.upper - moment.mu == pytest.approx(stats.t.ppf(0.975, 75) * moment.std_error)


def test_moment_error_is_the_delta_method_and_the_jackknife() -> None:
    rng = np.random.default_rng(1)
    p, q = rng.exponential(1.0, 400) + 0.8, rng.normal(0.0, 2.0, 300)

    def d(a: FloatArray, b: FloatArray) -> float:
        return float(moment_mu(a, b).mu)

    leave_p = np.array([d(np.delete(p, i), q) for i in range(p.size)])
    leave_q = np.array([d(p, np.delete(q, i)) for i in range(q.size)])
    jackknife = (p.size - 1) * np.var(leave_p) + (q.size - 1) * np.var(leave_q)
    assert moment_mu(p, q).std_error == pytest.approx(np.sqrt(jackknife), rel=0.01)


def test_moment_error_of_gaussians_has_its_textbook_value() -> None:
    p, q = gaussian_arms(2.0, 300, 4000, 2000, seed=5)
    textbook = np.sqrt(1 / 4000 + 1 / 2000 + 4.0 / (2 * 5998))
    assert moment_mu(p, q).std_error.mean() == pytest.approx(textbook, rel=0.005)


@pytest.mark.parametrize("method", METHODS)
def test_many_subsets_at_once_are_each_by_itself(method: Method) -> None:
    rng = np.random.default_rng(2)
    p, q = rng.normal(0.5, 1.0, (2, 3, 30)), rng.normal(size=(2, 3, 24))
    p[0, 1] = 1.0
    q[0, 1] = 1.0
    together = estimate_mu(p, q, method)
    assert together.mu.shape == together.reason.shape == (2, 3)
    for index in product(range(2), range(3)):
        alone = estimate_mu(p[index], q[index], method)
        for name in ("mu", "std_error", "lower", "upper"):
            np.testing.assert_allclose(getattr(together, name)[index], getattr(alone, name))
        assert together.reason[index] == alone.reason
        assert alone.reason != "" if index == (0, 1) else np.isfinite(alone.mu)


@pytest.mark.parametrize("method", METHODS)
def test_sign_scale_and_direction(method: Method) -> None:
    p, q = gaussian_arms(1.0, 1, 400, 300, seed=9)
    up = estimate_mu(p[0], q[0], method)
    assert up.mu > 0.5  # P above Q: the data help
    assert (up.method, up.n_p, up.n_q, up.level) == (method, 400, 300, 0.95)
    scaled = estimate_mu(1e-9 * p[0] + 2.0, 1e-9 * q[0] + 2.0, method)
    assert scaled.mu == pytest.approx(up.mu, rel=1e-5)
    tiny = estimate_mu(1e-190 * p[0], 1e-190 * q[0], method)
    assert tiny.mu == pytest.approx(up.mu, rel=1e-9)
    # Exchanged arms: T(Q, P), with the sign turned.
    down = estimate_mu(q[0], p[0], method)
    assert down.mu == pytest.approx(-up.mu, abs=0.35 if method == "two_stage" else 0.02)
    assert estimate_mu(p[0], q[0], method, 0.5).lower >= up.lower


def test_rank_is_unchanged_by_monotone_transforms() -> None:
    p, q = gaussian_arms(1.0, 1, 50, 60, seed=10)
    for name in ("mu", "std_error", "lower"):
        assert getattr(rank_mu(np.exp(p[0]), np.exp(q[0])), name) == pytest.approx(
            getattr(rank_mu(p[0], q[0]), name)
        )


def test_stages_alternate_over_the_run() -> None:
    # The signal turns round within each pair of stages; only the second stages are measured.
    choose, measure = np.tile([1.0, 2.0, 3.0, 4.0], 10), np.tile([1.0, 2.0, 3.0, 4.0], 10)
    p = np.empty(80)
    q = np.empty(80)
    second = np.arange(80) // 4 % 2 == 1
    p[~second], q[~second] = choose + 2.0, choose
    p[second], q[second] = measure, measure + 2.0
    assert two_stage_mu(p, q, block=4).mu < -0.5
    assert two_stage_mu(p[::-1], q[::-1], block=4).mu > 0.5
    assert two_stage_mu(p, q, block=1).mu == pytest.approx(0.0, abs=0.2)


# Simulation: planted μ ------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0])
def test_planted_mu_is_recovered(mu: float) -> None:
    runs, n = 400, 1000
    p, q = gaussian_arms(mu, runs, n, n, seed=int(100 + 10 * mu))
    for method in METHODS:
        estimate = estimate_mu(p, q, method)
        error = estimate.mu.std() / np.sqrt(runs)
        bias = estimate.mu.mean() - mu
        if method == "max":
            # Away from 0 by the search, and the less so the more samples.
            assert abs(bias) < 0.25
            assert mu == 0.0 or bias * np.sign(mu) > 0.1
        else:
            assert abs(bias) < 4.0 * error + 0.006
            assert estimate.mu.std() < {"two_stage": 0.17, "moment": 0.07, "rank": 0.085}[method]


def test_the_published_rule_is_biased_at_zero() -> None:
    # 300 samples an arm and 5 % clipping give the 0.26 that the design speaks of; a smaller clip
    # more. The two-stage rule has noise there, but no bias.
    p, q = gaussian_arms(0.0, 1500, 300, 300, seed=42)
    assert np.abs(max_mu(p, q, clip=0.05).mu).mean() == pytest.approx(0.26, abs=0.015)
    assert np.abs(max_mu(p, q).mu).mean() == pytest.approx(0.39, abs=0.02)
    assert np.abs(max_mu(p, q, clip=0.0).mu).mean() == pytest.approx(0.60, abs=0.03)
    split = two_stage_mu(p, q)
    known = split.mu[np.isfinite(split.mu)]
    assert abs(known.mean()) < 3.5 * known.std() / np.sqrt(known.size)
    # Away from 0 the bias has a direction, which signs cannot average out.
    p, q = gaussian_arms(0.5, 500, 300, 300, seed=43)
    assert max_mu(p, q).mu.mean() - 0.5 > 0.2
    assert abs(np.nanmean(two_stage_mu(p, q).mu) - 0.5) < 0.03


@pytest.mark.parametrize("mu", [-3.0, 0.0, 0.5, 3.0])
def test_moment_and_rank_intervals_cover(mu: float) -> None:
    p, q = gaussian_arms(mu, 3000, 150, 100, seed=int(50 + mu))
    assert 0.93 <= covered(moment_mu(p, q), mu) <= 0.97
    assert 0.92 <= covered(rank_mu(p, q), mu) <= 0.97
    assert 0.87 <= covered(moment_mu(p, q, 0.9), mu) <= 0.93


def test_moment_intervals_cover_for_unequal_and_skewed_arms() -> None:
    rng = np.random.default_rng(17)
    p, q = rng.gamma(4.0, 0.5, (3000, 300)), rng.normal(0.5, 2.0, (3000, 200))
    pooled = np.sqrt((299 * 1.0 + 199 * 4.0) / 498)
    assert 0.93 <= covered(moment_mu(p, q), 1.5 / pooled) <= 0.97


@pytest.mark.parametrize("mu", [-3.0, -0.5, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("n", [40, 400])
def test_clopper_pearson_and_band_intervals_cover_at_least(mu: float, n: int) -> None:
    p, q = gaussian_arms(mu, 1500, n, n, seed=int(n + mu))
    for method in ("two_stage", "max"):
        estimate = estimate_mu(p, q, method)  # type: ignore[arg-type]
        assert covered(estimate, mu) >= 0.95
        infinite = np.isinf(estimate.upper - estimate.lower)
        assert ((estimate.reason != "") == infinite).all()
        if n == 400 and (method == "two_stage" or abs(mu) < 2):
            assert infinite.mean() < 0.05


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_clopper_pearson_is_exact_and_conservative(level: float) -> None:
    n = 17
    low, high = clopper_pearson(np.arange(n + 1), n, level)
    for k in range(n + 1):
        theirs = stats.binomtest(k, n).proportion_ci(level, method="exact")
        assert (low[k], high[k]) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    for truth in (0.01, 0.2, 0.5, 0.97):
        hit = (low <= truth) & (truth <= high)
        assert stats.binom.pmf(np.arange(n + 1), n, truth)[hit].sum() >= level


@pytest.mark.parametrize("method", METHODS)
def test_permuted_labels_give_nothing(method: Method) -> None:
    p, q = gaussian_arms(2.0, 1, 400, 400, seed=77)
    rng = np.random.default_rng(78)
    pooled = rng.permuted(np.tile(np.concatenate([p[0], q[0]]), (500, 1)), axis=-1)
    estimate = estimate_mu(pooled[:, :400], pooled[:, 400:], method)
    known = estimate.mu[np.isfinite(estimate.mu)]
    assert abs(known.mean()) < 4.0 * known.std() / np.sqrt(known.size)
    assert covered(estimate, 0.0) > 0.92
    p_values = analytic_p_value(pooled[:, :400], pooled[:, 400:])
    assert benjamini_hochberg(p_values, 0.05).rejected.sum() <= 2


# Degenerate samples ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_constant_samples_are_unknown_never_zero(method: Method) -> None:
    estimate = estimate_mu(np.full(10, 0.1), np.full(10, 0.1), method)
    assert np.isnan(estimate.mu)
    assert (estimate.lower, estimate.upper, estimate.std_error) == (-np.inf, np.inf, np.inf)
    assert "equal" in str(estimate.reason) or "constant" in str(estimate.reason)


def test_one_constant_sample_has_no_noise_for_the_moment_rule() -> None:
    noisy = np.arange(10.0)
    for p, q, who in ((np.full(10, 0.1), noisy, "P"), (noisy, np.full(10, 0.1), "Q")):
        estimate = moment_mu(p, q)
        assert np.isfinite(estimate.mu)
        assert (estimate.lower, estimate.upper) == (-np.inf, np.inf)
        assert f"the {who} samples are constant" in str(estimate.reason)
    apart = moment_mu(np.full(5, 2.0), np.full(5, 1.0))
    assert apart.mu == np.inf
    assert "both samples are constant" in str(apart.reason)


def test_samples_without_overlap_keep_their_finite_end() -> None:
    above, below = np.arange(30.0) + 100.0, np.arange(30.0)
    help_, harm = rank_mu(above, below), rank_mu(below, above)
    assert (help_.mu, help_.upper) == (np.inf, np.inf)
    assert help_.lower == pytest.approx(np.sqrt(2) * norm.ppf(0.025 ** (1 / 30)))
    assert (harm.mu, harm.lower, harm.upper) == (-np.inf, -np.inf, -help_.lower)
    assert "do not overlap" in str(help_.reason)
    split = two_stage_mu(above, below)
    assert 0.0 < split.lower < split.mu < split.upper == np.inf
    assert "15 P, 15 Q" in str(split.reason)
    rule = max_mu(above, below)
    assert rule.mu == pytest.approx(2 * norm.ppf(1 - 0.5 / 30))
    assert rule.lower > 0.0
    assert rule.upper == np.inf
    assert "too few samples" in str(rule.reason)


def test_lower_end_without_overlap_covers() -> None:
    p, q = gaussian_arms(3.0, 20_000, 6, 6, seed=8)
    estimate = rank_mu(p, q)
    apart = np.isinf(estimate.mu)
    assert apart.mean() > 0.2
    assert (estimate.lower[apart] > 3.0).mean() < 0.025


def test_two_stages_that_never_reject_know_nothing() -> None:
    # The chosen threshold separates the first stage, and lies below everything in the second.
    p, q = np.array([1.0, 9.0, 2.0, 9.5]), np.array([0.0, 8.0, 0.5, 8.5])
    estimate = two_stage_mu(p, q)
    assert np.isnan(estimate.mu)
    assert (estimate.lower, estimate.upper) == (-np.inf, np.inf)
    assert "more samples are needed" in str(estimate.reason)


def test_a_shift_that_no_gaussian_describes_is_said() -> None:
    # Equal centres and very different spreads: mu has opposite signs at the two ends.
    rng = np.random.default_rng(4)
    estimate = max_mu(rng.normal(0.0, 1.0, 3000), rng.normal(0.0, 5.0, 3000))
    assert (estimate.lower, estimate.upper) == (-np.inf, np.inf)
    assert "no single mu fits" in str(estimate.reason)


# p-values -------------------------------------------------------------------------------------


def test_null_p_values_are_uniform() -> None:
    rng = np.random.default_rng(23)
    p, q = rng.normal(size=(1500, 25)), rng.normal(size=(1500, 20))
    for alternative in ("two-sided", "greater", "less"):
        for statistic in ("mean", "rank"):
            values = analytic_p_value(p, q, statistic=statistic, alternative=alternative)  # type: ignore[arg-type]
            assert stats.kstest(values, "uniform").pvalue > 0.005
            permuted = permutation_p_value(
                p,
                q,
                rng,
                statistic=statistic,  # type: ignore[arg-type]
                alternative=alternative,  # type: ignore[arg-type]
                n_permutations=199,
            )
            assert stats.kstest(permuted, "uniform").pvalue > 0.005
            assert (permuted <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)


def test_analytic_p_values_match_scipy() -> None:
    rng = np.random.default_rng(24)
    p, q = np.round(rng.normal(0.3, 1, (40, 15)), 1), np.round(rng.normal(0, 2, (40, 22)), 1)
    for alternative in ("two-sided", "greater", "less"):
        welch = stats.ttest_ind(p, q, axis=-1, equal_var=False, alternative=alternative).pvalue
        mann = stats.mannwhitneyu(p, q, axis=-1, method="asymptotic", alternative=alternative)
        np.testing.assert_allclose(analytic_p_value(p, q, alternative=alternative), welch)  # type: ignore[arg-type]
        np.testing.assert_allclose(
            analytic_p_value(p, q, statistic="rank", alternative=alternative),  # type: ignore[arg-type]
            mann.pvalue,
        )


def test_permutation_p_value_converges_to_the_enumeration() -> None:
    p, q = np.array([2.0, 3.1, 0.4, 5.0]), np.array([1.0, 0.2, 3.1, -1.0, 0.3])
    pooled = np.concatenate([p, q])
    observed = p.mean() - q.mean()
    shifts = []
    for chosen in combinations(range(9), 4):
        inside = np.isin(np.arange(9), chosen)
        shifts.append(pooled[inside].mean() - pooled[~inside].mean())
    rng = np.random.default_rng(0)
    for alternative, extreme in (
        ("greater", np.array(shifts) >= observed - 1e-12),
        ("less", np.array(shifts) <= observed + 1e-12),
    ):
        value = permutation_p_value(p, q, rng, alternative=alternative, n_permutations=20_000)  # type: ignore[arg-type]
        assert value == pytest.approx(extreme.mean(), abs=0.012)
    # Equal sizes, two-sided and paired: all 2^4 exchanges within pairs.
    signs = np.array(list(product([-1.0, 1.0], repeat=4)))
    gaps = p - q[:4]
    exact = (np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-12).mean()
    value = permutation_p_value(p, q[:4], rng, paired=True, n_permutations=20_000)
    assert value == pytest.approx(exact, abs=0.012)


def test_pairs_withstand_a_drift_that_swallows_the_free_test() -> None:
    rng = np.random.default_rng(31)
    drift = np.linspace(0.0, 50.0, 60)
    p = drift + 0.8 + rng.normal(size=(40, 60))
    q = drift + rng.normal(size=(40, 60))
    paired = permutation_p_value(p, q, rng, paired=True, n_permutations=199)
    free = permutation_p_value(p, q, rng, n_permutations=199)
    assert np.median(paired) <= 0.01
    assert np.median(free) > 0.5


def test_p_values_have_power_and_direction() -> None:
    p, q = gaussian_arms(1.0, 20, 60, 60, seed=3)
    rng = np.random.default_rng(0)
    for value in (
        permutation_p_value(p, q, rng, alternative="greater"),
        analytic_p_value(p, q, alternative="greater"),
        analytic_p_value(p, q, statistic="rank", alternative="greater"),
    ):
        assert np.median(value) <= 0.001
        assert (value > 0.0).all()
    assert (analytic_p_value(p, q, alternative="less") > 0.99).mean() > 0.8


def test_equal_samples_have_p_value_one() -> None:
    same = np.full((3, 6), 0.1)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(permutation_p_value(same, same, rng, n_permutations=19), 1.0)
    np.testing.assert_array_equal(analytic_p_value(same, same), 1.0)
    np.testing.assert_array_equal(analytic_p_value(same, same, statistic="rank"), 1.0)


# Conformal p-values and discoveries -----------------------------------------------------------


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.sampled_from(["high", "low"]),
)
@settings(max_examples=150, deadline=None)
def test_conformal_p_values_count_as_defined(
    trusted: list[int], scores: list[int], suspicious: Any
) -> None:
    sign = 1 if suspicious == "high" else -1
    values = conformal_p_values(scores, trusted, suspicious)
    random = conformal_p_values(
        scores, trusted, suspicious, ties="random", rng=np.random.default_rng(0)
    )
    for score, value, mixed in zip(scores, values, random, strict=True):
        worse = sum(sign * t > sign * score for t in trusted)
        level = sum(t == score for t in trusted)
        assert value == pytest.approx((1 + worse + level) / (len(trusted) + 1))
        low, high = worse / (len(trusted) + 1), (1 + worse + level) / (len(trusted) + 1)
        assert low <= mixed <= high


def test_conformal_p_values_are_valid_and_randomised_ones_uniform() -> None:
    rng = np.random.default_rng(60)
    conservative, random = [], []
    for _ in range(6000):
        draw = rng.poisson(2.0, 31)  # many ties
        conservative.append(conformal_p_values(draw[30], draw[:30], "high"))
        random.append(conformal_p_values(draw[30], draw[:30], "high", ties="random", rng=rng))
    for t in (0.05, 0.1, 0.3):
        assert (np.array(conservative) <= t).mean() <= t + 3 * np.sqrt(t * (1 - t) / 6000)
    assert stats.kstest(np.array(random), "uniform").pvalue > 0.01
    assert np.mean(conservative) > 0.55  # the price of counting ties in full


@pytest.mark.parametrize("suspicious", ["high", "low"])
def test_false_discovery_rate_is_held_at_its_level(suspicious: Any) -> None:
    rng = np.random.default_rng(61)
    sign = 1.0 if suspicious == "high" else -1.0
    level, clean, bad = 0.1, 300, 60
    shares, found = [], []
    for _ in range(400):
        trusted = sign * rng.standard_t(4, 3599)
        scores = sign * np.concatenate([rng.standard_t(4, clean), 4.0 + rng.normal(size=bad)])
        result = benjamini_hochberg(conformal_p_values(scores, trusted, suspicious), level)
        false = result.rejected[:clean].sum()
        shares.append(false / max(result.rejected.sum(), 1))
        found.append(result.rejected[clean:].mean())
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= level + 3 * error
    # Where level·(n + 1)/m is an integer, here 1, the rate is exactly level × share of clean ones.
    assert np.mean(shares) >= level * clean / (clean + bad) - 3.5 * error
    assert np.mean(found) > 0.5
    # The wrong direction, and no planted difference, find nothing beyond the level.
    wrong: Any = "low" if suspicious == "high" else "high"
    wrong_found = benjamini_hochberg(conformal_p_values(scores, trusted, wrong), level)
    assert wrong_found.rejected[clean:].sum() == 0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), st.floats(0.01, 0.5))
@settings(max_examples=200, deadline=None)
def test_benjamini_hochberg_is_the_step_up_rule(p_values: list[float], level: float) -> None:
    m = len(p_values)
    passed = [k for k in range(1, m + 1) if sorted(p_values)[k - 1] * (m / k) <= level]
    cut = sorted(p_values)[max(passed) - 1] if passed else -1.0
    result = benjamini_hochberg(p_values, level)
    np.testing.assert_array_equal(result.rejected, np.array(p_values) <= cut)
    np.testing.assert_allclose(result.adjusted, stats.false_discovery_control(p_values))
    np.testing.assert_array_equal(result.rejected, result.adjusted <= level)


def test_benjamini_hochberg_of_nothing_finds_nothing() -> None:
    assert benjamini_hochberg([], 0.1).rejected.size == 0


def test_trusted_size_is_the_smallest_that_allows_a_discovery() -> None:
    assert trusted_size_needed(0.05) == 19
    assert trusted_size_needed(0.1, n_tests=1000, n_expected=100) == 99
    for level, m, k in ((0.05, 1, 1), (0.1, 20, 1), (0.1, 50, 5), (0.3, 7, 2)):
        enough = trusted_size_needed(level, m, k)
        for n, possible in ((enough, True), (enough - 1, False)):
            scores = np.concatenate([np.full(k, 10.0), np.full(m - k, -10.0)])
            p_values = conformal_p_values(scores, np.zeros(n), "high")
            rejected = benjamini_hochberg(p_values, level).rejected[:k]
            assert rejected.all() if possible else not rejected.any()


# Refusals -------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
TEN = np.arange(10.0)
REFUSALS: list[tuple[str, Callable[[], object]]] = [
    ("method must be one of", lambda: estimate_mu(TEN, TEN, "mean")),  # type: ignore[arg-type]
    ("p has 0 sample\\(s\\)", lambda: estimate_mu([], TEN)),
    ("q has 3 sample\\(s\\) on its last axis, at least 4", lambda: estimate_mu(TEN, [1, 2, 3])),
    ("p has 1 sample\\(s\\)", lambda: moment_mu([1.0], TEN)),
    ("p holds 1 NaN", lambda: rank_mu([1.0, np.nan, 2.0], TEN)),
    ("q holds 2 NaN or infinite", lambda: max_mu(TEN, [np.inf, -np.inf, 2.0])),
    ("agree in all axes", lambda: moment_mu(np.ones((2, 5)), np.ones((3, 5)))),
    ("level must lie strictly", lambda: moment_mu(TEN, TEN, 1.0)),
    ("level must lie strictly", lambda: clopper_pearson(1, 2, 95)),
    ("block must lie between 1 and half", lambda: two_stage_mu(TEN, TEN, block=6)),
    ("clip must lie in", lambda: max_mu(TEN, TEN, clip=0.5)),
    ("0 <= hits <= trials", lambda: clopper_pearson(3, 2)),
    ("one P and one Q sample a step", lambda: permutation_p_value(TEN, [1, 2], RNG, paired=True)),
    ("n_permutations must be >= 1", lambda: permutation_p_value(TEN, TEN, RNG, n_permutations=0)),
    ("statistic must be", lambda: permutation_p_value(TEN, TEN, RNG, statistic="x")),  # type: ignore[arg-type]
    ("statistic must be", lambda: analytic_p_value(TEN, TEN, statistic="x")),  # type: ignore[arg-type]
    ("alternative must be", lambda: analytic_p_value(TEN, TEN, alternative="up")),  # type: ignore[arg-type]
    ("Welch's test has no noise", lambda: analytic_p_value([1.0, 1.0], [2.0, 2.0])),
    ("trusted has 0 sample", lambda: conformal_p_values(TEN, [], "high")),
    ("trusted must be 1-d", lambda: conformal_p_values(TEN, np.ones((2, 2)), "high")),
    ("scores hold NaN", lambda: conformal_p_values([np.nan], TEN, "high")),
    ("suspicious must be", lambda: conformal_p_values(TEN, TEN, "up")),  # type: ignore[arg-type]
    (
        "at least 1/11.*At least 19 are needed, and 199 to find a single",
        lambda: conformal_p_values(TEN, TEN, "high", level=0.05),
    ),
    ("ties must be", lambda: conformal_p_values(TEN, TEN, "low", ties="half")),  # type: ignore[arg-type]
    ("needs rng=", lambda: conformal_p_values(TEN, TEN, "low", ties="random")),
    ("p_values must lie in \\[0, 1\\]", lambda: benjamini_hochberg([0.5, 1.5])),
    ("p_values must be 1-d", lambda: benjamini_hochberg([[0.5]])),
    ("level must lie strictly", lambda: benjamini_hochberg([0.5], 0.0)),
    ("1 <= n_expected <= n_tests", lambda: trusted_size_needed(0.1, 3, 4)),
]


@pytest.mark.parametrize(("message", "call"), REFUSALS, ids=[m for m, _ in REFUSALS])
def test_refusals_say_what_was_wrong(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_estimates_check_themselves_at_birth() -> None:
    def born(**changes: Any) -> InfluenceEstimate:
        one = np.array(1.0)
        good = {
            "mu": one,
            "std_error": one,
            "lower": 0 * one,
            "upper": 2 * one,
            "level": 0.95,
            "n_p": 2,
            "n_q": 2,
            "method": "moment",
            "reason": np.array(""),
        }
        return InfluenceEstimate(**{**good, **changes})

    assert born().mu == 1.0
    with pytest.raises(ValueError, match="fields of one shape"):
        born(mu=np.ones(2))
    with pytest.raises(ValueError, match="lower <= upper"):
        born(lower=np.array(3.0))
    with pytest.raises(ValueError, match="needs a reason"):
        born(upper=np.array(np.inf))
