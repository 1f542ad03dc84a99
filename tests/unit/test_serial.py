"""Intervals of samples that go together from step to step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq
from scipy.signal import lfilter

from fine_bench.theory.arrays import FloatArray
from fine_bench.theory.estimation import Method, estimate_mu
from fine_bench.theory.p_values import permutation_p_value
from fine_bench.theory.serial import (
    LEAST_EFFECTIVE,
    effective_samples,
    models,
    serial_difference,
    serial_error,
    spectra,
)
from support.benchmarks import BENCHMARKS, loaded

METHODS: tuple[Method, ...] = ("two_stage", "max", "moment", "rank")
N = 300


def series(rng: np.random.Generator, runs: int, n: int, r: float) -> FloatArray:
    """Stationary Gaussian series of variance 1 whose neighbours correlate by r."""
    noise = rng.normal(size=(runs, n + 200)) * np.sqrt(1.0 - r**2)
    return np.asarray(lfilter([1.0], [1.0, -r], noise, axis=-1)[:, 200:])


def arms(r: float, common: bool, mu: float, seed: int, n: int = N) -> tuple[FloatArray, FloatArray]:
    """Both arms of 400 runs; with a part in common, as of steps at the same parameters."""
    rng = np.random.default_rng(seed)
    p, q = (series(rng, 400, n, r) for _ in range(2))
    if common:
        both = series(rng, 400, n, r)
        p, q = (p + both) / 2**0.5, (q + both) / 2**0.5
    return p + mu, q


def slow_error(x: FloatArray, level: float) -> tuple[float, float, float]:
    """The docstring's formulas for one series: whole covariance matrices, a root of the mixture."""
    n = len(x)
    t = np.arange(n)
    cosine = np.cos(np.pi * np.outer(t, t + 0.5) / n) * np.sqrt(2.0 / n)
    cosine[0] /= np.sqrt(2.0)
    weights, scales, inflations = [], [], []
    for w, r, v, prior in models():
        lag = np.abs(t[:, None] - t[None, :])
        covariance = w * r**lag + (1.0 - w) * v**lag
        d = np.diag(cosine @ covariance @ cosine.T)
        square = float(((cosine[1:] @ x) ** 2 / d[1:]).sum())
        weights.append(prior * np.prod(d[1:] ** -0.5) * square ** (-0.5 * (n - 1)))
        scales.append(np.sqrt(square / (n - 1) * d[0] / n))
        inflations.append(d[0])
    weight = np.array(weights) / sum(weights)
    scale, d_0 = np.array(scales), np.array(inflations)

    def excess(reach: float) -> float:
        return float(weight @ (2.0 * stats.t.cdf(reach / scale, n - 1) - 1.0)) - level

    reach = brentq(excess, 1e-6 * scale.min(), 1e3 * scale.max(), xtol=1e-14)
    return float(np.sqrt(weight @ scale**2)), reach, n / float(weight @ d_0)


@pytest.mark.parametrize("n", [2, 7, 60])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_error_matches_its_slow_twin(n: int, r: float) -> None:
    x = series(np.random.default_rng(1), 3, n, r) + 5.0
    found = serial_error(x, 0.9)
    for row in range(3):
        error, reach, effective = slow_error(x[row], 0.9)
        assert found.error[row] == pytest.approx(error)
        assert found.reach[row] == pytest.approx(reach, rel=1e-6)
        assert found.effective[row] == pytest.approx(effective)
        assert effective_samples(x)[row] == pytest.approx(
            slow_error(stats.rankdata(x[row]), 0.9)[2]
        )
    tiny = serial_error(1e-200 * (x - 5.0), 0.9)
    np.testing.assert_allclose(tiny.error, 1e-200 * found.error, rtol=1e-6)


def test_prior_weights_add_up_and_no_model_is_shorter_than_independence() -> None:
    assert sum(weight for *_, weight in models()) == pytest.approx(1.0)
    for n in (2, 30, 301):
        d = spectra(n)
        assert (d > 0.0).all()
        assert (d[:, 0] >= 1.0).all()
        np.testing.assert_allclose(d.sum(-1), n)  # the transform keeps the variance


def test_equal_samples_have_no_error() -> None:
    found = serial_error(np.array([[3.0, 3.0, 3.0], [1.0, 2.0, 4.0]]), 0.95)
    assert (found.error[0], found.reach[0], found.effective[0]) == (0.0, 0.0, 3.0)
    assert found.reach[1] > 0.0


def test_effective_samples_are_those_of_the_series() -> None:
    rng = np.random.default_rng(2)
    for r, low, high in ((0.0, 0.9, 1.0), (0.5, 0.25, 0.4), (0.9, 0.04, 0.07)):
        found = effective_samples(series(rng, 200, 2000, r))
        assert low <= np.median(found) / 2000 <= high  # (1 − r)/(1 + r), ranks a little more
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


@pytest.mark.parametrize("n", [30, 60, 120, 300])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_given_intervals_of_a_mean_cover(n: int, r: float) -> None:
    x = series(np.random.default_rng(9), 1500, n, r)
    found = serial_error(x, 0.95)
    held = np.abs(x.mean(-1)) <= found.reach
    assert held.mean() >= 0.94
    assert held[found.effective >= LEAST_EFFECTIVE].mean() >= 0.93
    if r == 0.0:
        student = stats.t.ppf(0.975, n - 1) * x.std(-1, ddof=1) / n**0.5
        longer = {30: 1.45, 60: 1.25, 120: 1.12, 300: 1.05}[n]
        assert np.median(found.reach / student) < longer


def test_averaged_over_the_prior_the_level_holds_even_among_the_given() -> None:
    """Models drawn by their weights: exact but for the edges of the cosine transform."""
    rng = np.random.default_rng(12)
    n, held, given = 40, [], []
    for w, r, v, prior in models():
        runs = round(8000 * prior)
        x = np.sqrt(w) * series(rng, runs, n, r) + np.sqrt(1.0 - w) * series(rng, runs, n, v)
        found = serial_error(x, 0.9)
        held.append(np.abs(x.mean(-1)) <= found.reach)
        given.append(found.effective >= 4.0)
    inside, kept = np.concatenate(held), np.concatenate(given)
    assert inside.mean() == pytest.approx(0.9, abs=0.02)
    assert inside[kept].mean() == pytest.approx(0.9, abs=0.02)
    assert 0.5 < kept.mean() < 0.95


@pytest.mark.parametrize(
    "n", [30, 60, *(pytest.param(n, marks=pytest.mark.slow) for n in (120, 300))]
)
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_intervals_cover_under_correlation(r: float, common: bool, n: int) -> None:
    """Of all, and of those that are given; more cases are in `benchmarks/correlated_steps.py`."""
    for mu in (0.0, 1.0):
        p, q = arms(r, common, mu, seed=11, n=n)
        for method in METHODS:
            before, after = (estimate_mu(p, q, method, correlated=c) for c in (False, True))
            np.testing.assert_array_equal(before.mu, after.mu)  # bit for bit
            held = (after.lower <= mu) & (mu <= after.upper)
            # 0.93, less two errors of 400 runs where the level is kept exactly, at 0.95
            least = 0.93 if n < 120 else 0.93 - 0.02
            assert held.mean() >= least, method
            given = np.isfinite(after.lower) & np.isfinite(after.upper)
            if given.sum() >= 100:
                assert held[given].mean() >= least, method
            if method in ("moment", "rank"):
                assert given.mean() > (0.4 if n == 30 else 0.9)
                if r == 0.9 and not common and n == 300:
                    old = (before.lower <= mu) & (mu <= before.upper)
                    assert old.mean() < 0.45
                if r == 0.0 and n == 300:  # hardly longer than need be
                    length, short = (np.median(e.upper - e.lower) for e in (after, before))
                    assert length < 1.06 * short


@pytest.mark.parametrize("method", METHODS)
def test_too_few_effective_samples_have_no_interval(method: Method) -> None:
    rng = np.random.default_rng(4)
    drift = np.outer([1.0, 2.0], np.arange(40.0)) + rng.normal(size=(2, 40))
    found = estimate_mu(drift[0], drift[1], method, correlated=True)
    assert np.isinf(found.lower)
    assert np.isinf(found.upper)
    assert "worth fewer than 2 independent ones" in str(found.reason)
    assert "every_n_steps" in str(found.reason)
    assert found.mu == estimate_mu(drift[0], drift[1], method).mu or np.isnan(found.mu)


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


def test_table_of_coverage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = loaded("correlated_steps")
    monkeypatch.setattr(script, "SAMPLES", (30,))
    monkeypatch.setattr(script, "CASES", (("own", 0.9), ("hidden", 0.9), ("two", 0.95)))
    assert script.main(["--repetitions", "40", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "correlated_steps.md").read_text()
    assert "40 simulated runs a cell" in page
    assert page.count("| 30 | 0.9") == 3
    for kind in ("own", "common", "hidden", "two"):
        p, q = script.arms(np.random.default_rng(0), 400, 60, kind, 0.8)
        assert p.var() == pytest.approx(1.0, abs=0.05)
        assert np.corrcoef(p.ravel(), q.ravel())[0, 1] == pytest.approx(
            0.5 if kind == "common" else 0.0, abs=0.08
        )
