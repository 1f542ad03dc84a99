"""Intervals of samples that go together from step to step."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from fine_bench.theory.arrays import FloatArray
from fine_bench.theory.estimation import Method, estimate_mu
from fine_bench.theory.p_values import permutation_p_value
from fine_bench.theory.serial import effective_samples, serial_difference, serial_error

METHODS: tuple[Method, ...] = ("two_stage", "max", "moment", "rank")
N = 300


def series(rng: np.random.Generator, runs: int, n: int, r: float) -> FloatArray:
    """Stationary Gaussian series of variance 1 whose neighbours correlate by r."""
    noise = rng.normal(size=(runs, n + 200)) * np.sqrt(1.0 - r**2)
    return np.asarray(lfilter([1.0], [1.0, -r], noise, axis=-1)[:, 200:])


def arms(r: float, common: bool, mu: float, seed: int) -> tuple[FloatArray, FloatArray]:
    """Both arms of 400 runs; with a part in common, as of steps at the same parameters."""
    rng = np.random.default_rng(seed)
    p, q = (series(rng, 400, N, r) for _ in range(2))
    if common:
        both = series(rng, 400, N, r)
        p, q = (p + both) / 2**0.5, (q + both) / 2**0.5
    return p + mu, q


def slow_error(x: FloatArray, level: float) -> tuple[float, float]:
    """The formulas of the docstring, one series, in plain Python."""
    n = len(x)
    mean = sum(x) / n
    square = sum((v - mean) ** 2 for v in x)
    r = sum((x[t] - mean) * (x[t - 1] - mean) for t in range(1, n)) / square
    r = min(max(r + (1 + 4 * r) / n, 0.0), 0.97)
    inflation = (1 + r) / (1 - r)
    inflation /= max(1 - inflation / n, 0.1)
    model = (square / (n - 1) * inflation / n) ** 0.5
    freedom = 2 / (4 / (n * (1 - r * r)) + 2 / n)
    length = n // 6
    means = [sum(x[b * length : (b + 1) * length]) / length for b in range(6)]
    middle = sum(means) / 6
    batches = (sum((m - middle) ** 2 for m in means) / 5 / 6) ** 0.5
    quantile = 0.5 + level / 2
    reach = stats.t.ppf(quantile, max(freedom, 2)) * model
    return max(model, batches), max(reach, stats.t.ppf(quantile, 5) * batches)


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_error_matches_its_slow_twin(r: float) -> None:
    x = 1e-3 * series(np.random.default_rng(1), 3, 100, r) + 5.0
    found = serial_error(x, 0.9)
    for row in range(3):
        expected = slow_error(x[row], 0.9)
        assert [found.error[row], found.reach[row]] == pytest.approx(list(expected))
        worth = x[row].var(ddof=1) / found.error[row] ** 2
        assert found.effective[row] == pytest.approx(min(max(worth, 1.0), 100.0))
    tiny = serial_error(1e-200 * (x - 5.0), 0.9)
    np.testing.assert_allclose(tiny.error, 1e-200 * found.error, rtol=1e-6)


def test_effective_samples_are_those_of_the_series() -> None:
    rng = np.random.default_rng(2)
    for r, low, high in ((0.0, 0.55, 1.0), (0.5, 0.22, 0.36), (0.9, 0.03, 0.07)):
        found = effective_samples(series(rng, 200, 2000, r))
        assert low <= np.median(found) / 2000 <= high  # (1 − r)/(1 + r), less the larger estimate
    assert effective_samples(np.ones(20)) == 20


def test_a_common_part_cancels_and_unequal_arms_add() -> None:
    rng = np.random.default_rng(3)
    both = 10.0 * series(rng, 1, N, 0.9)[0]
    p, q = rng.normal(size=N) + both, rng.normal(size=N) + both
    assert serial_difference(p, q, 0.95).error < 0.12
    assert serial_difference(p, q[:-1], 0.95).error > 1.0
    one, other = serial_error(p, 0.95), serial_error(q[:-1], 0.95)
    assert serial_difference(p, q[:-1], 0.95).reach == pytest.approx(
        np.hypot(one.reach, other.reach)
    )


@pytest.mark.parametrize(
    ("n", "hidden", "expected"),
    [
        (60, 0.0, 0.91),
        (150, 0.0, 0.95),
        (300, 0.0, 0.96),
        (60, 1.0, 0.82),
        (150, 1.0, 0.91),
        (300, 1.0, 0.93),
    ],
)
def test_coverage_of_the_mean_is_what_is_said(n: int, hidden: float, expected: float) -> None:
    rng = np.random.default_rng(9)
    x = series(rng, 1500, n, 0.9) + hidden * rng.normal(size=(1500, n))
    held = np.abs(x.mean(-1)) <= serial_error(x, 0.95).reach
    assert held.mean() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("mu", [0.0, 1.0])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_intervals_cover_under_correlation(r: float, common: bool, mu: float) -> None:
    p, q = arms(r, common, mu, seed=11)
    for method in METHODS:
        before, after = (estimate_mu(p, q, method, correlated=c) for c in (False, True))
        np.testing.assert_array_equal(before.mu, after.mu)  # bit for bit
        held = (after.lower <= mu) & (mu <= after.upper)
        assert held.mean() >= 0.93, method
        given = np.isfinite(after.lower) & np.isfinite(after.upper)
        if method != "max":
            assert given.mean() > 0.9
            assert held[given].mean() >= 0.93
        if r == 0.9 and not common and method in ("moment", "rank"):
            old = (before.lower <= mu) & (mu <= before.upper)
            assert old.mean() < 0.45
        if r == 0.0 and method in ("moment", "rank"):  # little longer than need be
            width = np.median(after.upper - after.lower) / np.median(before.upper - before.lower)
            assert width < 1.3


@pytest.mark.parametrize("method", METHODS)
def test_too_few_effective_samples_have_no_interval(method: Method) -> None:
    rng = np.random.default_rng(4)
    walk = np.cumsum(rng.normal(size=(2, 40)), axis=-1)
    found = estimate_mu(walk[0], walk[1], method, correlated=True)
    assert np.isinf(found.lower)
    assert np.isinf(found.upper)
    assert "worth fewer than 4 independent ones" in str(found.reason)
    assert "every_n_steps" in str(found.reason)
    assert found.mu == estimate_mu(walk[0], walk[1], method).mu or np.isnan(found.mu)


def test_samples_without_overlap_keep_their_finite_end() -> None:
    rng = np.random.default_rng(5)
    p, q = rng.normal(size=60) + 30.0, rng.normal(size=60)
    rank = estimate_mu(p, q, "rank", correlated=True)
    independent = estimate_mu(p, q, "rank")
    assert (rank.mu, rank.upper) == (np.inf, np.inf)
    assert 0.0 < rank.lower <= independent.lower
    # a fraction of a hit may open an end that a whole one would not: it has a reason, too
    for method in METHODS:
        found = estimate_mu(p, q, method, correlated=True)
        assert (found.reason != "") == bool(np.isinf(found.upper) or np.isinf(found.lower))
        assert found.lower > 0.0


def test_p_values_of_pairs_stay_uniform_under_correlation() -> None:
    p, q = arms(0.9, True, 0.0, seed=6)
    # pairs of a step are exchangeable, however the steps go together, if their difference is not
    rng = np.random.default_rng(7)
    noise = rng.normal(size=(2, *p.shape))
    value = permutation_p_value(q + noise[0], q + noise[1], rng, paired=True, n_permutations=199)
    assert stats.kstest(value, "uniform").pvalue > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_arms_of_any_leading_shape(method: Method) -> None:
    rng = np.random.default_rng(8)
    p, q = rng.normal(0.5, 1.0, (2, 3, 40)), rng.normal(size=(2, 3, 36))
    together = estimate_mu(p, q, method, correlated=True)
    alone = estimate_mu(p[1, 2], q[1, 2], method, correlated=True)
    for name in ("mu", "std_error", "lower", "upper"):
        np.testing.assert_allclose(getattr(together, name)[1, 2], getattr(alone, name))
