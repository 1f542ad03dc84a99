"""Would another run flag it too: against slow twins, by simulation, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import polygamma
from scipy.stats import norm

from fine_bench.theory import repeats
from fine_bench.theory.arrays import FloatArray
from fine_bench.theory.decision import decide, farther_end, nearer_end, told
from fine_bench.theory.false_discovery import benjamini_hochberg
from fine_bench.theory.repeats import (
    at_most,
    moderated,
    repeat_p_values,
    repeat_probability,
)

N, EPOCHS = 2000, 10


def runs(seed: int, n: int = N) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Scores of two runs and the first one's errors, estimated from few epochs; a fifth is high."""
    rng = np.random.default_rng(seed)
    mean = np.where(rng.uniform(size=n) < 0.2, rng.normal(0.6, 0.2, n), rng.normal(0.0, 0.2, n))
    error = 0.1 * np.exp(0.3 * rng.normal(size=n)) * (1.0 + np.abs(mean))
    seen = error * np.sqrt(rng.chisquare(EPOCHS - 1, n) / (EPOCHS - 1))
    return mean + error * rng.normal(size=n), mean + error * rng.normal(size=n), seen


def test_probability_is_bayes_with_a_known_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    """With N(0, 1) in place of the estimated prior, against quadrature."""
    rng = np.random.default_rng(0)
    mu, s = rng.normal(size=400) * 1.2, rng.uniform(0.2, 0.6, 400)

    def normal(values: FloatArray, errors: FloatArray, grid: FloatArray) -> FloatArray:
        return norm.pdf(grid) * np.gradient(grid)

    monkeypatch.setattr(repeats, "_prior", normal)
    monkeypatch.setattr(repeats, "_GRID", 3000)
    found = repeat_probability(mu, s, 0.5, "high")
    for i in np.argsort(np.abs(mu))[:5]:

        def joint(u: float, i: int = i) -> float:
            return float(norm.pdf(u) * norm.pdf(mu[i], u, s[i]))

        above = integrate.quad(lambda u: joint(u) * norm.sf(0.5, u, s[i]), -6, 6)[0]  # noqa: B023
        assert found[i] == pytest.approx(above / integrate.quad(joint, -6, 6)[0], abs=2e-3)


def test_the_estimated_prior_is_the_likeliest_mixture() -> None:
    """The directional derivative of the likelihood is at most 1 everywhere on the grid."""
    mu, _, s = runs(1, 300)
    grid = np.linspace(mu.min(), mu.max(), 30)
    weights = repeats._prior(mu, s[:, None], grid)
    assert weights.sum() == pytest.approx(1.0)
    density = norm.pdf(mu[:, None], grid, s[:, None])
    gradient = (density / (density @ weights)[:, None]).mean(0)
    assert gradient.max() < 1.02
    assert gradient[weights > 0.01] == pytest.approx(1.0, abs=0.02)


def test_moderation_finds_the_distribution_that_variances_come_from() -> None:
    """Variances from a scaled inverse χ² of 6 degrees of freedom: both its numbers come back."""
    rng = np.random.default_rng(11)
    n, d, d0, s02 = 20_000, 4, 6.0, 0.25
    variance = d0 * s02 / rng.chisquare(d0, n)
    seen = variance * rng.chisquare(d, n) / d
    found = moderated(rng.normal(size=n), np.sqrt(seen), d + 1)
    freedom = found.freedom - d
    assert freedom == pytest.approx(d0, rel=0.1)
    prior = (found.freedom * found.error**2 - d * seen) / freedom
    assert np.median(prior) == pytest.approx(s02, rel=0.03)


@pytest.mark.parametrize("observations", [None, 5])
def test_errors_far_smaller_than_the_gaps_of_the_prior(observations: int | None) -> None:
    """Scores that another run hardly moves repeat as Φ((μ̂ − τ)/(√2 s)) says, none is NaN."""
    rng = np.random.default_rng(3)
    n = 6000  # more than the prior is fitted to
    mu = rng.standard_t(2, n)
    s = np.where(np.arange(n) % 2 == 0, 1e-7, 0.3)
    s[::4] *= np.exp(rng.normal(size=len(s[::4])))
    tau = float(np.quantile(mu, 0.8))
    found = repeat_probability(mu, s, tau, "high", observations)
    assert np.isfinite(found).all()
    if observations is None:
        sure = (s < 1e-5) & (np.abs(mu - tau) > 1e-4)
        assert np.count_nonzero(sure) > 2900
        assert found[sure] == pytest.approx((mu[sure] >= tau).astype(float), abs=1e-9)
    one = int(np.argsort(np.abs(mu - 0.4) + (s > 1e-6))[0])
    at_edge = repeat_probability(mu, s, mu[one] + s[one], "high")[one]
    assert at_edge == pytest.approx(norm.cdf(-1 / 2**0.5), rel=1e-6)
    of_three = repeat_probability(mu, s, mu[one] + s[one], "high", averaged=3)[one]
    assert of_three == pytest.approx(norm.cdf(-1 / (1 + 1 / 3) ** 0.5), rel=1e-6)
    turned = repeat_probability(-mu, s, -mu[one] - s[one], "low")[one]
    assert turned == pytest.approx(at_edge, rel=1e-6)


SEEDS = 12


@pytest.fixture(scope="module")
def simulated() -> list[tuple[FloatArray, FloatArray, float, FloatArray]]:
    """Both runs, the threshold that flags 15 % of the first, and its chances to repeat."""
    found = []
    for seed in range(SEEDS):
        first, second, s = runs(seed)
        tau = float(np.quantile(first, 0.85))
        found.append((first, second, tau, repeat_probability(first, s, tau, "high", EPOCHS)))
    return found


Simulated = list[tuple[FloatArray, FloatArray, float, FloatArray]]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_of_the_flagged_at_most_alpha_do_not_repeat(simulated: Simulated, alpha: float) -> None:
    missed, count, plain = [], [], []
    for first, second, tau, chance in simulated:
        flagged = at_most(chance, first >= tau, alpha)
        assert (first[flagged] >= tau).all()
        missed.append((second[flagged] < tau).mean())
        plain.append((second[first >= tau] < tau).mean())
        count.append(flagged.sum())
    assert np.mean(plain) > 0.2  # without the rule
    assert np.mean(missed) <= alpha + 3 * np.std(missed) / SEEDS**0.5
    assert np.mean(missed) >= alpha / 4
    assert np.mean(count) > 20


def test_probabilities_are_calibrated(simulated: Simulated) -> None:
    chance = np.concatenate([c for *_, c in simulated])
    outcome = np.concatenate([second >= tau for _, second, tau, _ in simulated])
    for low, high in ((0.0, 0.05), (0.05, 0.3), (0.3, 0.7), (0.7, 0.95), (0.95, 1.01)):
        some = (chance >= low) & (chance < high)
        assert some.sum() > 50
        # errors of other spread than the model's: never too sure, at most a little unsure
        assert -0.03 <= outcome[some].mean() - chance[some].mean() <= 0.08


def test_the_low_end_is_the_high_end_of_what_is_turned() -> None:
    first, _, s = runs(9, 300)
    np.testing.assert_allclose(
        repeat_probability(-first, s, -0.5, "low", EPOCHS),
        repeat_probability(first, s, 0.5, "high", EPOCHS),
        atol=0.02,
    )


def test_p_values_hold_whatever_the_mean_is() -> None:
    """P(p ≤ t and it does not repeat) ≤ t, for the mean at which it is largest."""
    rng = np.random.default_rng(3)
    for mean in (-0.5, 0.0, 0.5):
        mu = mean + rng.normal(size=100_000)
        again = mean + rng.normal(size=100_000) >= 0.0
        p = repeat_p_values(mu, np.ones(100_000), 0.0, "high")
        for t in (0.02, 0.2):
            assert ((p <= t) & ~again).mean() <= t
    first, second, s = runs(5)
    tau = float(np.quantile(first, 0.85))
    p = repeat_p_values(first, s, tau, "high", EPOCHS)
    error, freedom = moderated(first, s, EPOCHS)
    assert p[7] == pytest.approx(stats.t.cdf((tau - first[7]) / 2**0.5 / error[7], freedom[7]))
    plain = repeat_p_values(first, s, tau, "high")
    assert plain[7] == pytest.approx(norm.cdf((tau - first[7]) / 2**0.5 / s[7]))
    assert not benjamini_hochberg(p, 0.1).rejected.any()  # the price of no prior
    mean = np.repeat([0.0, 1.0], [800, 200])
    first, second = (mean + 0.15 * rng.normal(size=1000) for _ in range(2))
    flagged = benjamini_hochberg(repeat_p_values(first, np.full(1000, 0.15), 0.5, "high"), 0.1)
    assert flagged.rejected.sum() > 100
    assert (second[flagged.rejected] < 0.5).mean() <= 0.1
    np.testing.assert_array_equal(
        repeat_p_values([1.0, -1.0, 1.0], [0.0, 0.0, np.inf], 0.0, "high"), [0.0, 1.0, 1.0]
    )


def test_moderated_errors_lie_nearer_the_truth() -> None:
    rng = np.random.default_rng(4)
    x = np.sort(rng.normal(size=4000))
    d, d0 = 9.0, 20.0
    trend = 0.1 * (1.0 + np.abs(x))
    true = trend * np.sqrt(d0 / rng.chisquare(d0, 4000))
    seen = true * np.sqrt(rng.chisquare(d, 4000) / d)
    found, freedom = moderated(x, seen, int(d) + 1)
    assert freedom == pytest.approx(d + d0, rel=0.25)
    # what Bayes would say if trend and d₀ were known
    ideal = np.sqrt((d0 * trend**2 + d * seen**2) / (d0 + d))
    assert np.abs(np.log(found / ideal)).mean() < 0.03
    assert np.abs(np.log(found / true)).mean() < 0.8 * np.abs(np.log(seen / true)).mean()
    # errors that differ by chance alone become the trend
    even = 0.1 * np.sqrt(rng.chisquare(d, 4000) / d)
    assert np.std(np.log(moderated(x, even, d + 1.0).error)) < 0.2 * np.std(np.log(even))
    assert float(polygamma(1, d / 2)) == pytest.approx(np.var(np.log(even**2)), rel=0.1)
    # unknown stays unknown, and few examples have no trend
    assert np.isinf(moderated(x, np.where(x > 2.0, np.inf, seen), 10).error[x > 2.0]).all()
    np.testing.assert_array_equal(moderated(x[:50], seen[:50], 10).error, seen[:50])


def test_unknown_and_exact_scores() -> None:
    mu = np.array([0.0, 0.2, 1.0, 1.0])
    s = np.array([0.1, np.inf, 0.0, 0.1])
    found = repeat_probability(mu, s, 0.5, "high")
    assert np.isnan(found[1])
    assert found[2] == 1.0
    assert at_most(found, mu >= 0.0, 0.3).tolist() == [False, False, True, True]
    assert np.isnan(repeat_probability(mu, np.full(4, np.inf), 0.5, "high")).all()
    assert not at_most(np.full(3, 0.5), np.ones(3, dtype=bool), 0.1).any()


def test_the_mean_of_runs_is_surer_than_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With N(0, 1) for the prior: conjugate, so P has a closed form; the errors are of one run."""
    rng = np.random.default_rng(12)
    mu, s = rng.normal(size=300) * 1.1, rng.uniform(0.2, 0.6, 300)
    averaged = rng.integers(1, 5, 300)

    def normal(values: FloatArray, errors: FloatArray, grid: FloatArray) -> FloatArray:
        return norm.pdf(grid) * np.gradient(grid)

    monkeypatch.setattr(repeats, "_prior", normal)
    monkeypatch.setattr(repeats, "_GRID", 3000)
    found = repeat_probability(mu, s, 0.5, "high", averaged=averaged)
    variance = s**2 / averaged
    posterior = mu / (1 + variance), variance / (1 + variance)
    known = norm.sf((0.5 - posterior[0]) / np.sqrt(posterior[1] + s**2))
    middle = np.abs(mu) < 1.5
    assert found[middle] == pytest.approx(known[middle], abs=3e-3)


def test_large_sets_take_the_prior_from_a_part() -> None:
    first, _, s = runs(6, 12_000)
    chance = repeat_probability(first, s, 0.5, "high")
    some = np.arange(0, 12_000, 3)
    part = repeat_probability(first[some], s[some], 0.5, "high")
    assert np.abs(chance[some] - part).mean() < 0.01


def test_decisions_follow_from_the_ends() -> None:
    found = decide(1.0, 0.5, 1.5, alpha=0.1, delta=1e-4)
    for part, mu in ((found.at_least, 0.5), (found.estimate, 1.0), (found.at_most, 1.5)):
        assert part is not None
        assert part.mu == mu
        assert part.type_2 == pytest.approx(norm.cdf(norm.ppf(0.9) - mu))
        assert part.equal_errors == pytest.approx(stats.norm.sf(mu / 2))
        e = part.epsilon
        delta = norm.cdf(-e / mu + mu / 2) - np.exp(e) * norm.cdf(-e / mu - mu / 2)
        assert delta == pytest.approx(1e-4, rel=1e-6)
    held = decide(0.1, -0.2, np.inf)
    assert held.at_least is None
    assert held.at_most is None
    harm = decide(-1.0, -1.5, -0.5)
    assert harm.at_least is not None
    assert harm.at_least.mu == 0.5
    assert (nearer_end(-2.0, -1.0), nearer_end(-1.0, 1.0), farther_end(-2.0, 1.0)) == (-1, None, 2)
    assert farther_end(-np.inf, 1.0) is None


ONE = np.ones(3)
REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("both be \\(n,\\)", lambda: repeat_probability(ONE, ONE[:2], 0.0, "high")),
    ("mu holds NaN", lambda: repeat_probability([np.nan], [1.0], 0.0, "high")),
    ("std_error must be >= 0", lambda: repeat_p_values(ONE, -ONE, 0.0, "high")),
    ("averaged must be", lambda: repeat_probability(ONE, ONE, 0.0, "high", averaged=0)),
    ("averaged must be", lambda: repeat_probability(ONE, ONE, 0.0, "high", averaged=[1, 2])),
    ("threshold must be finite", lambda: repeat_probability(ONE, ONE, np.inf, "high")),
    ("suspicious must be", lambda: repeat_probability(ONE, ONE, 0.0, "up")),  # type: ignore[arg-type]
    ("at least 2 observations, got 1", lambda: moderated(ONE, ONE, 1)),
    ("boolean mask", lambda: at_most(ONE, np.ones(3), 0.1)),  # type: ignore[arg-type]
    ("level must lie", lambda: at_most(ONE, ONE > 0, 1.0)),
    ("probability must lie", lambda: at_most(2 * ONE, ONE > 0, 0.1)),
    ("mu must be finite", lambda: told(np.inf)),
    ("alpha must lie", lambda: told(1.0, alpha=2.0)),
    ("lower <= upper", lambda: decide(0.0, 1.0, -1.0)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_refusals(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
