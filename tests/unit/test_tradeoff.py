"""Trade-off functions against closed forms, brute force and the inequalities that define them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.optimize import linprog
from scipy.stats import norm

from fine_bench.theory.arrays import FloatArray
from fine_bench.theory.error_rates import error_curve, signed_mu
from fine_bench.theory.families import GaussianTradeOff, LaplaceTradeOff
from fine_bench.theory.ordering import compare, equal_mean_example
from fine_bench.theory.piecewise_linear import PiecewiseLinear, convexify, from_pmf, from_samples
from fine_bench.theory.subsampling import MixedTradeOff, mix, subsample
from fine_bench.theory.tradeoff import InverseTradeOff, SymmetrizedTradeOff, TradeOff

ALPHA = np.linspace(0.0, 1.0, 201)
EPSILON = np.linspace(-6.0, 6.0, 49)


def pmf_pairs() -> st.SearchStrategy[tuple[FloatArray, FloatArray]]:
    """Pairs of distributions on up to 6 outcomes, zeros and equal ratios included."""

    def normalise(weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        weights = weights.astype(float)
        weights[:, 0] += weights.sum(axis=1) == 0
        p, q = weights / weights.sum(axis=1, keepdims=True)
        return p, q

    shapes = st.integers(1, 6).map(lambda k: (2, k))
    return shapes.flatmap(lambda s: arrays(np.int64, s, elements=st.integers(0, 5))).map(normalise)


def tied_samples() -> st.SearchStrategy[FloatArray]:
    return st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(lambda x: np.array(x, float))


def curves() -> list[TradeOff]:
    gaussian = GaussianTradeOff(1.2)
    return [
        GaussianTradeOff(0.0),
        GaussianTradeOff(0.4),
        GaussianTradeOff(5.0),
        LaplaceTradeOff(0.0),
        LaplaceTradeOff(0.7),
        LaplaceTradeOff(4.0),
        MixedTradeOff(gaussian, 0.3),
        MixedTradeOff(gaussian, 0.3).inverse(),
        MixedTradeOff(LaplaceTradeOff(2.0), 0.05),
        subsample(gaussian, 0.3),
        subsample(LaplaceTradeOff(2.0), 0.6),
        MixedTradeOff(from_pmf([0.3, 0.2, 0.5], [0.6, 0.4, 0.0]), 0.4),
        from_pmf([0.5, 0.3, 0.2, 0.0], [0.1, 0.3, 0.3, 0.3]),
        from_pmf([0.5, 0.3, 0.2, 0.0], [0.1, 0.3, 0.3, 0.3]).inverse(),
    ]


# Definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("f", curves(), ids=repr)
def test_a_trade_off_function_is_convex_falling_and_below_guessing(f: TradeOff) -> None:
    value = f(ALPHA)
    assert (np.diff(value) <= 1e-12).all()
    assert (np.diff(value, 2) >= -1e-12).all()
    assert (value <= 1.0 - ALPHA + 1e-15).all()
    assert (value >= 0.0).all()
    assert f(1.0) == 0.0


@pytest.mark.parametrize("f", curves(), ids=repr)
def test_ratio_tests_lie_on_the_curve_and_carry_their_complements(f: TradeOff) -> None:
    test = f.ratio_test(EPSILON)
    np.testing.assert_allclose(f(test.alpha), test.beta, atol=1e-12)
    np.testing.assert_allclose(test.alpha + test.accept, 1.0, atol=1e-14)
    np.testing.assert_allclose(test.beta + test.power, 1.0, atol=1e-14)
    assert (np.diff(test.alpha) <= 1e-15).all()
    for edge, reject in ((np.inf, 0.0), (-np.inf, 1.0)):
        at_edge = f.ratio_test(edge)
        assert f(at_edge.alpha) == pytest.approx(at_edge.beta, abs=1e-15)
        assert (at_edge.alpha if reject == 0.0 else at_edge.power) == pytest.approx(reject)


@pytest.mark.parametrize("f", curves(), ids=repr)
def test_inverse_is_the_generalised_inverse(f: TradeOff) -> None:
    inverse = f.inverse()
    # inf{t : f(t) <= a} by a scan over a fine grid, good to its spacing.
    grid = np.concatenate([[0.0], np.logspace(-12, -2, 4001), np.linspace(0.01, 1.0, 20001)])
    value = f(grid)
    scan = np.array([grid[np.argmax(value <= a * (1.0 + 1e-12))] for a in ALPHA])
    np.testing.assert_allclose(inverse(ALPHA), scan, atol=6e-5)
    np.testing.assert_allclose(inverse.inverse()(ALPHA), f(ALPHA), atol=1e-12)


@pytest.mark.parametrize("f", curves(), ids=repr)
def test_delta_is_the_conjugate(f: TradeOff) -> None:
    # sup over a fine grid with the ratio tests added, from the definition.
    grid = np.union1d(np.linspace(0.0, 1.0, 4001), f.ratio_test(np.linspace(-7, 7, 2001)).alpha)
    lines = 1.0 - f(grid)[None, :] - np.exp(EPSILON)[:, None] * grid[None, :]
    np.testing.assert_allclose(f.delta(EPSILON), lines.max(axis=1), atol=2e-6)
    assert (f.delta(EPSILON) >= lines.max(axis=1) - 1e-12).all()
    # The ratio test itself attains it, without the floor that every δ has.
    test = f.ratio_test(EPSILON)
    np.testing.assert_allclose(
        test.power - np.exp(EPSILON) * test.alpha, lines.max(axis=1), atol=2e-6
    )
    # e^eps P(A) + delta >= Q(A), with the hypotheses exchanged as the inverse has it.
    swapped = -np.expm1(-EPSILON) + np.exp(-EPSILON) * f.delta(EPSILON)
    np.testing.assert_allclose(f.inverse().delta(-EPSILON), swapped, atol=1e-12)


@pytest.mark.parametrize("f", curves(), ids=repr)
def test_epsilon_is_the_inverse_of_delta(f: TradeOff) -> None:
    for epsilon in (0.1, 0.6, 1.5):
        delta = float(f.delta(epsilon))
        if delta > 1e-12:
            assert f.delta(f.epsilon(delta)) <= delta + 1e-15
            assert f.epsilon(delta) <= epsilon + 1e-9
    assert f.epsilon(1.0) == 0.0


def test_epsilon_is_infinite_when_an_event_proves_h1() -> None:
    f = from_pmf([1.0, 0.0], [0.9, 0.1])
    assert f.epsilon(0.05) == np.inf
    assert f.epsilon(0.1 + 1e-12) == 0.0


@given(pmf_pairs(), st.integers(0, 1000).map(lambda n: n / 1000))
@settings(max_examples=100, deadline=None)
def test_discrete_pairs_solve_the_neyman_pearson_linear_program(
    pair: tuple[FloatArray, FloatArray], alpha: float
) -> None:
    p, q = pair
    best = linprog(-q, A_ub=[p], b_ub=[alpha], bounds=(0.0, 1.0))
    assert from_pmf(p, q)(alpha) == pytest.approx(1.0 + best.fun, abs=1e-8)


@given(pmf_pairs())
@settings(max_examples=50, deadline=None)
def test_discrete_inverse_exchanges_the_hypotheses(pair: tuple[FloatArray, FloatArray]) -> None:
    p, q = pair
    f = from_pmf(p, q)
    np.testing.assert_allclose(f.inverse()(ALPHA), from_pmf(q, p)(ALPHA), atol=1e-12)
    np.testing.assert_allclose(f.inverse().inverse()(ALPHA), f(ALPHA), atol=1e-12)
    symmetric = f.symmetrize()
    lower = np.minimum(f(ALPHA), f.inverse()(ALPHA))
    assert (symmetric(ALPHA) <= lower + 1e-12).all()
    np.testing.assert_allclose(symmetric.inverse()(ALPHA), symmetric(ALPHA), atol=1e-12)
    # Exact discrete rules and the generic bisection are two routes to one function.
    np.testing.assert_allclose(TradeOff.__call__(f, ALPHA), f(ALPHA), atol=1e-12)
    np.testing.assert_allclose(InverseTradeOff(f)(ALPHA), f.inverse()(ALPHA), atol=1e-12)
    np.testing.assert_allclose(SymmetrizedTradeOff(f)(ALPHA), symmetric(ALPHA), atol=1e-12)


# Closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 1e-3, 0.5, 3.0, 12.0])
def test_gaussian_matches_its_definition_by_threshold(mu: float) -> None:
    # Reject N(0,1) for N(mu,1) above a cut c: alpha = P(z > c), beta = P(z + mu <= c).
    cut = np.linspace(-6.0, 6.0, 61) + 0.5 * mu
    f = GaussianTradeOff(mu)
    np.testing.assert_allclose(f(norm.sf(cut)), norm.cdf(cut - mu), atol=1e-10)
    np.testing.assert_allclose(f(ALPHA), TradeOff.__call__(f, ALPHA), atol=1e-12)
    inverse = InverseTradeOff(f)
    np.testing.assert_allclose(f(ALPHA), inverse(ALPHA), atol=1e-12)
    np.testing.assert_allclose(f(f(ALPHA)), ALPHA, atol=1e-6 if mu > 5 else 1e-10)


def test_gaussian_keeps_relative_precision_in_the_tail() -> None:
    alpha = norm.sf(30.0)  # 5e-198
    assert GaussianTradeOff(29.0)(alpha) == pytest.approx(norm.cdf(1.0), rel=1e-12)
    assert GaussianTradeOff(30.0)(0.5) == pytest.approx(norm.sf(30.0), rel=1e-10)


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 4.0, 20.0])
def test_gaussian_delta_is_the_integral_of_the_excess_density(mu: float) -> None:
    for epsilon in (-5.0, -0.3, 0.0, 0.2, 1.0, 3.0):
        cut = epsilon / mu + 0.5 * mu  # likelihood ratio of N(mu,1) to N(0,1) is e^eps there
        excess = quad(
            lambda x, e=epsilon: norm.pdf(x, mu) - np.exp(e) * norm.pdf(x),
            cut,
            max(cut, mu) + 12.0,
            epsabs=1e-14,
            epsrel=1e-12,
            limit=400,
        )[0]
        direct = norm.sf(cut - mu) - np.exp(epsilon) * norm.sf(cut)
        assert GaussianTradeOff(mu).delta(epsilon) == pytest.approx(direct, abs=1e-13)
        assert GaussianTradeOff(mu).delta(epsilon) == pytest.approx(excess, abs=1e-11, rel=1e-8)


def test_gaussian_delta_does_not_cancel_or_overflow() -> None:
    # δ = E_Q[(1 − e^(ε − L))_+] as an integral of positive numbers, at about 1e-192.
    epsilon, mu = 30.0, 1.0
    a = -epsilon / mu + mu / 2
    integral = quad(lambda x: norm.pdf(x) * -np.expm1(-(x + a) * mu), -a, -a + 3, epsabs=0)[0]
    assert GaussianTradeOff(mu).delta(epsilon) == pytest.approx(integral, rel=1e-9, abs=0.0)
    assert 0.0 < integral < 1e-190
    assert GaussianTradeOff(60.0).delta(1500.0) == pytest.approx(norm.cdf(5.0), abs=1e-6)
    assert GaussianTradeOff(1e-300).delta(0.5) == 0.0
    assert GaussianTradeOff(1.0).delta(np.inf) == 0.0
    assert GaussianTradeOff(1.0).delta(-np.inf) == 1.0
    np.testing.assert_allclose(
        GaussianTradeOff(0.0).delta(EPSILON), np.maximum(0.0, 1.0 - np.exp(EPSILON)), atol=1e-15
    )


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 5.0])
def test_laplace_matches_its_definition_by_threshold(mu: float) -> None:
    def upper(x: FloatArray) -> FloatArray:
        return np.where(x > 0, 0.5 * np.exp(-np.abs(x)), 1.0 - 0.5 * np.exp(-np.abs(x)))

    cut = np.linspace(0.0, mu, 41)  # outside [0, mu] the ratio is constant: straight pieces
    f = LaplaceTradeOff(mu)
    np.testing.assert_allclose(f(upper(cut)), 1.0 - upper(cut - mu), atol=1e-10)
    np.testing.assert_allclose(f(ALPHA), TradeOff.__call__(f, ALPHA), atol=1e-12)
    np.testing.assert_allclose(f.delta(EPSILON), TradeOff.delta(f, EPSILON), atol=1e-14)
    np.testing.assert_allclose(f(f(ALPHA)), ALPHA, atol=1e-10)


def test_laplace_of_an_enormous_shift_is_zero_not_nan() -> None:
    np.testing.assert_array_equal(LaplaceTradeOff(2000.0)(ALPHA), np.append(1.0, np.zeros(200)))


@given(st.floats(1e-6, 1 - 1e-6), st.floats(-4.0, 4.0))
def test_signed_mu_inverts_the_gaussian_curve(alpha: float, mu: float) -> None:
    # A shifted test: P above Q gives mu > 0, from the orientation "reject when x < tau".
    tau = norm.ppf(alpha, loc=mu)
    beta = norm.sf(tau)
    if 1e-12 < beta < 1.0 - 1e-12:
        assert signed_mu(alpha, beta) == pytest.approx(mu, abs=1e-4)
    if mu >= 0.0:
        assert GaussianTradeOff(mu)(alpha) == pytest.approx(beta, abs=1e-10)


def test_signed_mu_at_the_ends() -> None:
    assert signed_mu(0.0, 0.2) == np.inf
    assert signed_mu(1.0, 0.2) == -np.inf
    assert np.isnan(signed_mu([0.0, 1.0], [1.0, 0.0])).all()
    assert signed_mu(1e-300, 0.5) == pytest.approx(-norm.ppf(1e-300))


# Sub-sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("base", [GaussianTradeOff(1.5), LaplaceTradeOff(2.0)], ids=repr)
def test_subsampling_has_the_three_pieces_of_the_theorem(base: TradeOff, rate: float) -> None:
    # Symmetric f with fixed point x*: f_p up to x*, a line of slope -1 to f_p(x*), then f_p^-1.
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if base(middle) > middle else (low, middle)

    def f_p(x: FloatArray) -> FloatArray:
        return rate * base(x) + (1.0 - rate) * (1.0 - x)

    start, stop = low, float(f_p(np.array(low)))
    left, right = np.zeros_like(ALPHA), np.ones_like(ALPHA)
    for _ in range(80):
        middle = 0.5 * (left + right)
        above = f_p(middle) > ALPHA
        left, right = np.where(above, middle, left), np.where(above, right, middle)
    expected = np.where(
        start >= ALPHA, f_p(ALPHA), np.where(stop >= ALPHA, start + stop - ALPHA, right)
    )
    np.testing.assert_allclose(subsample(base, rate)(ALPHA), expected, atol=1e-10)
    np.testing.assert_allclose(mix(base, rate)(ALPHA), f_p(ALPHA), atol=1e-14)
    np.testing.assert_allclose(TradeOff.__call__(mix(base, rate), ALPHA), f_p(ALPHA), atol=1e-12)


def test_subsampling_of_a_discrete_pair_is_the_mixture() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    f = from_pmf(p, q)
    mixture = from_pmf(p, 0.8 * p + 0.2 * q)
    np.testing.assert_allclose(mix(f, 0.2)(ALPHA), mixture(ALPHA), atol=1e-12)
    generic = MixedTradeOff(f, 0.2).symmetrize()
    np.testing.assert_allclose(subsample(f, 0.2)(ALPHA), generic(ALPHA), atol=1e-12)
    np.testing.assert_allclose(mix(f, 0.0)(ALPHA), 1.0 - ALPHA)
    assert mix(f, 1.0) is f


# Samples, hulls -------------------------------------------------------------------------------


@given(tied_samples(), tied_samples())
@settings(max_examples=150, deadline=None)
def test_error_curve_counts_as_the_definition_says(p: FloatArray, q: FloatArray) -> None:
    thresholds, alpha, beta = error_curve(p, q)
    assert thresholds[-1] == np.inf
    assert (alpha[0], beta[0], alpha[-1], beta[-1]) == (0.0, 1.0, 1.0, 0.0)
    for tau, a, b in zip(thresholds, alpha, beta, strict=True):
        assert a == pytest.approx(sum(x < tau for x in p) / p.size)
        assert b == pytest.approx(sum(x >= tau for x in q) / q.size)


def test_error_curve_of_many_subsets_is_the_curves_of_each() -> None:
    rng = np.random.default_rng(3)
    p, q = rng.integers(0, 5, (2, 3, 7)), rng.integers(0, 5, (2, 3, 9))
    together = error_curve(p, q)
    for i in range(2):
        for j in range(3):
            for whole, single in zip(together, error_curve(p[i, j], q[i, j]), strict=True):
                np.testing.assert_array_equal(whole[i, j], single)


@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=8),
    st.floats(0.0, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_convexify_is_the_lowest_chord(points: list[tuple[int, int]], level: float) -> None:
    alpha, beta = np.array(points).T / 10.0
    hull = convexify(alpha, beta)
    everything = [*zip(alpha, beta, strict=True), (0.0, 1.0), (1.0, 0.0)]
    lowest = min(b for a, b in everything if a <= level)
    for (a0, b0), (a1, b1) in combinations(sorted(everything), 2):
        if a0 < a1 and a0 <= level <= a1:
            lowest = min(lowest, b0 + (level - a0) / (a1 - a0) * (b1 - b0))
    assert hull(level) == pytest.approx(lowest, abs=1e-12)
    again = convexify(hull.alpha, hull.beta)
    np.testing.assert_allclose(again(ALPHA), hull(ALPHA), atol=1e-15)


def test_samples_recover_the_curve_they_come_from() -> None:
    rng = np.random.default_rng(0)
    q, p = rng.normal(size=40_000), rng.normal(1.0, size=40_000)
    truth = GaussianTradeOff(1.0)(ALPHA)
    estimate = from_samples(p, q)(ALPHA)
    assert np.abs(estimate - truth).max() < 0.015
    # P above Q is told by rejecting low x; rejecting high x is then no better than guessing.
    wrong = from_samples(p, q, "high")(ALPHA)
    np.testing.assert_allclose(wrong, 1.0 - ALPHA, atol=0.01)
    np.testing.assert_allclose(from_samples(q, p, "high")(ALPHA), truth, atol=0.015)
    either = from_samples(p, q, "either")(ALPHA)
    assert (either <= estimate + 1e-12).all()


def test_likelihood_ordering_finds_what_no_threshold_can() -> None:
    # Q has more mass at both ends than P, so no single threshold separates them well.
    p, q = np.repeat([0, 1, 2], [10, 80, 10]), np.repeat([0, 1, 2], [40, 20, 40])
    exact = from_pmf([0.1, 0.8, 0.1], [0.4, 0.2, 0.4])
    np.testing.assert_allclose(from_samples(p, q, "likelihood")(ALPHA), exact(ALPHA), atol=1e-12)
    assert from_samples(p, q)(0.2) > exact(0.2) + 0.1


def test_tied_samples_are_passed_together() -> None:
    # One tie holds half of both samples: only randomising can split it, so the chord is used.
    f = from_samples([1.0, 1.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(f([0.0, 0.25, 0.5]), [0.5, 0.25, 0.0])


# Order and the worked example -----------------------------------------------------------------


def test_gaussians_are_ordered_and_equals_are_equal() -> None:
    weak, strong = GaussianTradeOff(0.5), GaussianTradeOff(1.0)
    assert compare(strong, weak).relation == "f_below"
    assert compare(weak, strong).relation == "g_below"
    assert compare(weak, GaussianTradeOff(0.5)).relation == "equal"
    gap = compare(weak, strong)
    # The gap of two Gaussians is widest where both have the same slope.
    exact = max(norm.cdf(-norm.ppf(a) - 0.5) - norm.cdf(-norm.ppf(a) - 1) for a in ALPHA[1:-1])
    assert gap.max_above == pytest.approx(exact, abs=1e-4)
    assert gap.max_below == 0.0
    assert compare(weak, GaussianTradeOff(0.5001), tolerance=1e-3).relation == "equal"


def test_gaussian_and_laplace_cross_twice_where_their_values_agree() -> None:
    f, g = GaussianTradeOff(1.0), LaplaceTradeOff(1.0)
    order = compare(f, g)
    assert order.relation == "crossing"
    assert len(order.crossings) == 2
    for level in order.crossings:
        assert f(level) == pytest.approx(g(level), abs=1e-12)
        below, above = f(level - 1e-3) - g(level - 1e-3), f(level + 1e-3) - g(level + 1e-3)
        assert below * above < 0.0
    # Both are symmetric, so the second crossing mirrors the first.
    assert f(order.crossings[0]) == pytest.approx(order.crossings[1], abs=1e-9)
    assert compare(g, f).crossings == pytest.approx(order.crossings)


def test_crossing_near_level_zero_is_seen() -> None:
    # f catches a rare event with certainty at once; g is better everywhere else.
    f, g = from_pmf([1.0, 0.0], [1 - 1e-6, 1e-6]), GaussianTradeOff(0.1)
    order = compare(f, g)
    assert order.relation == "crossing"
    assert order.crossings[0] < 1e-4
    # The same between smooth curves, below the first of the even levels and above the last.
    rare, weak = MixedTradeOff(GaussianTradeOff(8.0), 1e-4), GaussianTradeOff(0.5)
    order = compare(rare, weak)
    assert order.relation == "crossing"
    assert 1e-6 < order.crossings[0] < 4e-4
    assert rare(order.crossings[0]) == pytest.approx(weak(order.crossings[0]), abs=1e-14)
    mirrored = compare(rare.inverse(), weak)
    assert mirrored.crossings[-1] == pytest.approx(float(weak(order.crossings[0])), abs=1e-9)


def test_equal_means_hide_different_influence() -> None:
    example = equal_mean_example(noise=0.5)
    assert example.mean_change == pytest.approx(0.1)
    np.testing.assert_allclose(example.always(ALPHA), norm.cdf(-norm.ppf(ALPHA) - 0.2), atol=1e-12)
    # d2 from its definition: reject "saw it" when the accuracy falls below tau.
    tau = np.linspace(-6.0, 8.0, 57)
    alpha = 0.9 * norm.cdf(tau) + 0.1 * norm.cdf(tau - 2.0)
    np.testing.assert_allclose(example.sometimes(alpha), norm.sf(tau), atol=1e-10)
    order = compare(example.always, example.sometimes)
    assert order.relation == "crossing"
    assert len(order.crossings) == 1
    assert order.max_above > 0.02
    assert order.max_below > 0.02


def test_equal_means_simulated() -> None:
    rng = np.random.default_rng(11)
    n = 60_000
    without = rng.normal(0.0, 0.5, n)
    always = rng.normal(0.1, 0.5, n)
    sometimes = rng.normal(0.0, 0.5, n) + (rng.uniform(size=n) < 0.1)
    assert always.mean() - without.mean() == pytest.approx(0.1, abs=0.01)
    assert sometimes.mean() - without.mean() == pytest.approx(0.1, abs=0.01)
    example = equal_mean_example(noise=0.5)
    for seen, curve in ((always, example.always), (sometimes, example.sometimes)):
        np.testing.assert_allclose(from_samples(seen, without)(ALPHA), curve(ALPHA), atol=0.012)


def test_equal_means_without_noise() -> None:
    example = equal_mean_example(noise=0.0)
    np.testing.assert_allclose(example.always(ALPHA), 0.0)
    np.testing.assert_allclose(example.sometimes(ALPHA), np.maximum(0.0, 1.0 - ALPHA / 0.9))


# Refusals -------------------------------------------------------------------------------------

REFUSALS: list[tuple[str, Callable[[], object]]] = [
    ("alpha must lie in \\[0, 1\\], got 1.5", lambda: GaussianTradeOff(1.0)([0.2, 1.5])),
    ("alpha must lie in \\[0, 1\\], got nan", lambda: LaplaceTradeOff(1.0)(np.nan)),
    ("beta must lie in \\[0, 1\\]", lambda: signed_mu(0.5, -0.1)),
    ("delta must lie in \\[0, 1\\]", lambda: GaussianTradeOff(1.0).epsilon(2.0)),
    ("use GaussianTradeOff\\(abs\\(mu\\)\\)", lambda: GaussianTradeOff(-0.5)),
    ("G_mu needs a finite mu", lambda: GaussianTradeOff(float("nan"))),
    ("Laplace shift must be finite and >= 0", lambda: LaplaceTradeOff(-1.0)),
    ("epsilon holds NaN", lambda: GaussianTradeOff(1.0).delta(np.nan)),
    ("two equal 1-d arrays", lambda: PiecewiseLinear(np.zeros(1), np.ones(1))),
    (
        "increase strictly from 0 to 1",
        lambda: PiecewiseLinear(np.array([0.0, 0.5, 0.5, 1.0]), np.array([1.0, 0.4, 0.3, 0.0])),
    ),
    (
        "must not increase, but rises by 0.2",
        lambda: PiecewiseLinear(np.array([0.0, 0.5, 1.0]), np.array([0.2, 0.4, 0.0])),
    ),
    (
        "not convex at alpha = 0.4",
        lambda: PiecewiseLinear(np.array([0.0, 0.4, 1.0]), np.array([0.5, 0.45, 0.0])),
    ),
    (
        "lie above 1 - alpha",
        lambda: PiecewiseLinear(np.array([0.0, 1.0]), np.array([1.0, 0.5])),
    ),
    ("rate must lie in \\(0, 1\\]", lambda: mix(GaussianTradeOff(1.0), 1.5)),
    ("must have equal lengths, got 1, 2", lambda: convexify([0.5], [0.5, 0.2])),
    ("must be equal 1-d arrays", lambda: from_pmf([0.5, 0.5], [1.0])),
    ("p must sum to 1, got 0.9", lambda: from_pmf([0.5, 0.4], [0.5, 0.5])),
    ("p has 0 sample\\(s\\)", lambda: from_samples([], [1.0])),
    ("q holds 1 NaN or infinite value", lambda: from_samples([1.0], [np.nan, 2.0])),
    ("got a single number", lambda: error_curve(1.0, [1.0])),
    ("agree in all axes but the last", lambda: error_curve(np.ones((2, 3)), np.ones((3, 3)))),
    ("one pair at a time", lambda: from_samples(np.ones((2, 3)), np.ones((2, 3)))),
    ("needs repeated values", lambda: from_samples([1, 2, 3], [4, 5, 6], "likelihood")),
    ("ordering must be", lambda: from_samples([1.0], [2.0], "up")),  # type: ignore[arg-type]
    ("tolerance must be >= 0", lambda: compare(GaussianTradeOff(1), GaussianTradeOff(1), -1.0)),
    ("noise must be a standard deviation", lambda: equal_mean_example(-0.1)),
]


@pytest.mark.parametrize(("message", "call"), REFUSALS, ids=[m for m, _ in REFUSALS])
def test_refusals_say_what_was_wrong(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_vertices_are_copied_and_cannot_be_changed() -> None:
    alpha = np.array([0.0, 1.0])
    f = PiecewiseLinear(alpha, np.array([0.5, 0.0]))
    alpha[0] = 0.3
    assert f.alpha[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        f.beta[0] = 0.9
