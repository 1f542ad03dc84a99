"""Composition, its Gaussian limit and the (ε, δ) bridge, against closed forms and an accountant."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as accountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from fine_bench.theory.arrays import FloatArray
from fine_bench.theory.central_limit import central_limit, loss_moments, poisson_clt_mu
from fine_bench.theory.composition import compose, compose_mu
from fine_bench.theory.families import GaussianTradeOff, LaplaceTradeOff
from fine_bench.theory.ordering import compare
from fine_bench.theory.piecewise_linear import from_pmf
from fine_bench.theory.privacy import (
    epsilon_delta_trade_off,
    mu_from_epsilon_delta,
    one_run_epsilon,
    privacy_curve,
    trade_off_from_delta,
)
from fine_bench.theory.subsampling import MixedTradeOff, mix, subsample
from fine_bench.theory.tradeoff import TradeOff

ALPHA = np.linspace(0.0, 1.0, 401)
EPSILON = np.array([0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])


class OnGrid(MixedTradeOff):
    """G_μ behind a wrapper, so that the numerical route is taken and not the closed form."""

    def __init__(self, mu: float) -> None:
        super().__init__(GaussianTradeOff(mu), 1.0)


# Composition ----------------------------------------------------------------------------------


def test_gaussians_compose_exactly() -> None:
    mus = [0.1, -0.4, 2.0]
    result = compose([GaussianTradeOff(abs(mu)) for mu in mus], [1, 2, 3])
    assert result.exact
    expected = GaussianTradeOff(np.sqrt(0.01 + 2 * 0.16 + 3 * 4.0))
    np.testing.assert_allclose(result.trade_off(ALPHA), expected(ALPHA), atol=1e-12)
    assert compose_mu(mus) == pytest.approx(np.sqrt(0.01 + 0.16 + 4.0))
    np.testing.assert_allclose(compose_mu(np.full((3, 100), 0.1)), np.ones(3))


@pytest.mark.parametrize("steps", [1, 7, 100, 2500])
def test_convolution_reproduces_the_gaussian_from_below(steps: int) -> None:
    result = compose(OnGrid(1.7 / np.sqrt(steps)), steps)
    gap = GaussianTradeOff(1.7)(ALPHA) - result.trade_off(ALPHA)
    assert not result.exact
    assert gap.max() < 1e-5
    assert gap.min() > -result.mass_error - 1e-12  # pessimistic: never above the truth


@pytest.mark.parametrize("step", [0.05, 0.2, 0.5])
def test_the_stated_error_brackets_the_truth_on_a_coarse_grid(step: float) -> None:
    result = compose(OnGrid(0.5), 12, step=step)
    truth = GaussianTradeOff(0.5 * np.sqrt(12))
    assert result.loss_error == pytest.approx(12 * step)
    epsilon = np.linspace(-4.0, 8.0, 25)
    got = result.trade_off.delta(epsilon)
    assert (got >= truth.delta(epsilon) - result.mass_error).all()
    assert (got <= truth.delta(epsilon - result.loss_error) + result.mass_error).all()
    # What is stated in the docstring as usual: variance grown by about step²/6 a step.
    wider = np.sqrt(12 * (0.25 + step**2 / 6))
    assert got[8] == pytest.approx(GaussianTradeOff(wider).delta(epsilon[8]), abs=0.02 * step)


def test_discrete_pairs_compose_to_their_product() -> None:
    first = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.15, 0.25, 0.5, 0.1])
    second = np.array([0.6, 0.1, 0.3]), np.array([0.5, 0.5, 0.0])
    product = from_pmf(
        np.kron(np.kron(first[0], first[0]), second[0]),
        np.kron(np.kron(first[1], first[1]), second[1]),
    )
    result = compose([from_pmf(*first), from_pmf(*second)], [2, 1])
    gap = product(ALPHA) - result.trade_off(ALPHA)
    assert gap.min() > -1e-12
    assert gap.max() < 2e-3
    fine = compose([from_pmf(*first), from_pmf(*second)], [2, 1], step=1e-4)
    np.testing.assert_allclose(fine.trade_off(ALPHA), product(ALPHA), atol=2e-5)
    # Events that prove H1, or H0, survive exactly.
    assert fine.trade_off(0.0) == pytest.approx(0.9**2, abs=1e-9)
    assert fine.trade_off.inverse()(0.0) == pytest.approx(0.7, abs=1e-9)


def test_gaussians_join_other_steps_as_one() -> None:
    mixed = compose([GaussianTradeOff(0.3), LaplaceTradeOff(0.5), GaussianTradeOff(0.4)])
    paired = compose([GaussianTradeOff(0.5), LaplaceTradeOff(0.5)])
    np.testing.assert_allclose(mixed.trade_off(ALPHA), paired.trade_off(ALPHA), atol=1e-12)

    # By the definition, conditional on the Gaussian step's loss ℓ, which is N(±μ²/2, μ²):
    # δ(ε) = E_Q[δ_Laplace(ε − ℓ)] as Q(L > ε) − e^ε P(L > ε) is summed over ℓ under Q.
    def integrand(z: float, epsilon: float) -> float:
        return float(norm.pdf(z) * LaplaceTradeOff(0.5).delta(epsilon - 0.5 * z - 0.125))

    for epsilon in EPSILON[:6]:
        kinks = [(epsilon - 0.125 - side) / 0.5 for side in (-0.5, 0.5)]
        delta = quad(integrand, -12, 12, args=(epsilon,), points=kinks, limit=200)[0]
        assert paired.trade_off.delta(epsilon) == pytest.approx(delta, abs=1e-5)


def test_no_influence_stays_none() -> None:
    nothing = from_pmf([0.5, 0.5], [0.5, 0.5])
    result = compose(nothing, 1000)
    np.testing.assert_allclose(result.trade_off(ALPHA), 1.0 - ALPHA, atol=1e-12)
    with_laplace = compose([nothing, LaplaceTradeOff(1.0)], [50, 1], step=1e-3)
    np.testing.assert_allclose(
        with_laplace.trade_off(ALPHA), LaplaceTradeOff(1.0)(ALPHA), atol=1e-5
    )


def test_pure_delta_steps_compose_by_their_complements() -> None:
    result = compose(from_pmf([1.0, 0.0], [0.99, 0.01]), 100)
    expected = 0.99**100 * (1.0 - ALPHA)
    np.testing.assert_allclose(result.trade_off(ALPHA), expected, atol=1e-9)


def test_one_telling_step_tells_all() -> None:
    certain = from_pmf([0.0, 1.0], [1.0, 0.0])
    result = compose([certain, LaplaceTradeOff(0.5)], [1, 3])
    np.testing.assert_array_equal(result.trade_off(ALPHA), 0.0)


@pytest.mark.parametrize(
    ("mu", "rate", "steps"), [(1.0, 0.01, 1000), (0.5, 0.05, 400), (3.0, 0.002, 200), (1.0, 0.5, 3)]
)
def test_subsampled_composition_agrees_with_the_accountant(
    mu: float, rate: float, steps: int
) -> None:
    theirs = accountant.from_gaussian_mechanism(
        1.0 / mu, sampling_prob=rate, value_discretization_interval=1e-3
    ).self_compose(steps)
    one_way = mix(GaussianTradeOff(mu), rate)
    both = [compose(f, steps).trade_off for f in (one_way, one_way.inverse())]
    ours = np.maximum(both[0].delta(EPSILON), both[1].delta(EPSILON))
    expected = [theirs.get_delta_for_epsilon(float(e)) for e in EPSILON]
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    for delta in (1e-2, 1e-5):
        epsilon = max(f.epsilon(delta) for f in both)
        assert epsilon == pytest.approx(theirs.get_epsilon_for_delta(delta), abs=2e-3)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_laplace_composition_agrees_with_the_accountant(steps: int) -> None:
    theirs = accountant.from_laplace_mechanism(
        1.0 / 0.6, value_discretization_interval=1e-3
    ).self_compose(steps)
    ours = compose(LaplaceTradeOff(0.6), steps).trade_off.delta(EPSILON)
    expected = [theirs.get_delta_for_epsilon(float(e)) for e in EPSILON]
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_randomised_response_agrees_with_the_accountant() -> None:
    theirs = accountant.from_randomized_response(
        0.4, 2, value_discretization_interval=1e-3
    ).self_compose(10)
    ours = compose(from_pmf([0.8, 0.2], [0.2, 0.8]), 10, step=1e-3)
    expected = [theirs.get_delta_for_epsilon(float(e)) for e in EPSILON]
    np.testing.assert_allclose(ours.trade_off.delta(EPSILON), expected, atol=1e-3)


# Central limit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f",
    [
        OnGrid(0.7),
        LaplaceTradeOff(0.8),
        subsample(GaussianTradeOff(1.0), 0.2),
        mix(GaussianTradeOff(1.0), 0.2).inverse(),
    ],
    ids=repr,
)
def test_loss_moments_are_integrals_of_the_log_slope(f: TradeOff) -> None:
    # kl = −∫ log|f'|, κ2 = ∫ log²|f'|, … with f' by differences in the logit of α.
    logit = np.linspace(-32.0, 32.0, 40_001)
    alpha = 1.0 / (1.0 + np.exp(-logit))
    weight = np.gradient(alpha)
    test = f.ratio_test(np.linspace(-25, 25, 2001))
    assert np.isfinite(test.alpha).all()
    slope = _log_slope(f, alpha)
    moments = loss_moments(f)
    mean = float((weight * slope).sum())
    assert moments.kl == pytest.approx(-mean, rel=2e-3)
    assert moments.kappa2 == pytest.approx(float((weight * slope**2).sum()), rel=2e-3)
    assert moments.kappa3 == pytest.approx(float((weight * np.abs(slope) ** 3).sum()), rel=2e-3)
    centred = float((weight * np.abs(slope - mean) ** 3).sum())
    assert moments.kappa3_centred == pytest.approx(centred, rel=2e-3)
    assert moments.variance == pytest.approx(moments.kappa2 - moments.kl**2, rel=1e-9)


def _log_slope(f: TradeOff, alpha: FloatArray) -> FloatArray:
    """log |f'(α)|: the loss at which the ratio test has level α, by bisection."""
    low, high = np.full_like(alpha, -60.0), np.full_like(alpha, 60.0)
    for _ in range(45):
        middle = 0.5 * (low + high)
        rejects_more = f.ratio_test(middle).alpha > alpha
        low, high = np.where(rejects_more, middle, low), np.where(rejects_more, high, middle)
    return high


def test_gaussian_moments_match_their_quadrature_and_discrete_ones_their_sum() -> None:
    closed, numeric = loss_moments(GaussianTradeOff(0.7)), loss_moments(OnGrid(0.7))
    for name in ("kl", "kappa2", "kappa3", "kappa3_centred", "variance"):
        assert getattr(closed, name) == pytest.approx(getattr(numeric, name), rel=1e-10)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    loss = np.log(q / p)
    discrete = loss_moments(from_pmf(p, q))
    assert discrete.kl == pytest.approx(-(p * loss).sum())
    assert discrete.kappa2 == pytest.approx((p * loss**2).sum())
    assert discrete.kappa3 == pytest.approx((p * np.abs(loss) ** 3).sum())
    assert discrete.kappa3_centred == pytest.approx(
        (p * np.abs(loss - (p * loss).sum()) ** 3).sum()
    )
    assert loss_moments(from_pmf([0.5, 0.5], [1.0, 0.0])).kl == np.inf


def test_central_limit_is_exact_for_gaussians_and_bounds_laplace() -> None:
    limit = central_limit(GaussianTradeOff(0.02), 2500)
    assert limit.mu == pytest.approx(1.0)
    assert limit.gamma == pytest.approx(0.56 * 2 * np.sqrt(2 / np.pi) / np.sqrt(2500))
    f, steps = LaplaceTradeOff(0.1), 400
    limit = central_limit(f, steps)
    composed = compose(f, steps).trade_off
    inside = ALPHA[(limit.gamma + 1e-3 < ALPHA) & (1 - limit.gamma - 1e-3 > ALPHA)]
    gaussian = GaussianTradeOff(limit.mu)
    assert (composed(inside) >= gaussian(inside + limit.gamma) - limit.gamma).all()
    assert (composed(inside) <= gaussian(inside - limit.gamma) + limit.gamma).all()
    np.testing.assert_allclose(composed(ALPHA), gaussian(ALPHA), atol=3e-3)
    assert central_limit(GaussianTradeOff(0.0), 5).mu == 0.0


def test_poisson_limit_is_approached_by_weak_steps_and_explodes_for_strong_ones() -> None:
    assert poisson_clt_mu(0.5, 0.1, 100) == pytest.approx(np.sqrt(np.exp(0.25) - 1.0))
    gaps = []
    for steps in (100, 1600, 25_600):
        rate = 1.0 / np.sqrt(steps)
        f = mix(GaussianTradeOff(0.8), rate)
        limit = GaussianTradeOff(poisson_clt_mu(0.8, rate, steps))
        both = [compose(g, steps).trade_off(ALPHA) for g in (f, f.inverse())]
        gaps.append(max(float(np.abs(values - limit(ALPHA)).max()) for values in both))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 4e-3
    strong = compose(mix(GaussianTradeOff(3.0), 0.01), 100).trade_off
    assert compare(GaussianTradeOff(poisson_clt_mu(3.0, 0.01, 100)), strong).max_below > 0.4


def test_symmetric_subsampling_has_the_limit_of_dong_roth_and_su() -> None:
    # √2·c·sqrt(e^{μ²}Φ(1.5μ) + 3Φ(−0.5μ) − 2), c = p·sqrt(T): their corollary for C_p(G_μ).
    mu, steps = 0.8, 10**8
    limit = central_limit(subsample(GaussianTradeOff(mu), 1.0 / np.sqrt(steps)), steps)
    inner = np.exp(mu**2) * norm.cdf(1.5 * mu) + 3.0 * norm.cdf(-0.5 * mu) - 2.0
    assert limit.mu == pytest.approx(np.sqrt(2.0 * inner), rel=1e-3)
    assert limit.mu > poisson_clt_mu(mu, 1.0 / np.sqrt(steps), steps)


# (ε, δ) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.1), (1.0, 0.05), (3.0, 1e-9), (2.0, 0.0)])
def test_epsilon_delta_function_is_the_maximum_of_its_lines(epsilon: float, delta: float) -> None:
    f = epsilon_delta_trade_off(epsilon, delta)
    lines = np.maximum(
        1.0 - delta - np.exp(epsilon) * ALPHA, np.exp(-epsilon) * (1.0 - delta - ALPHA)
    )
    np.testing.assert_allclose(f(ALPHA), np.maximum(lines, 0.0), atol=1e-10)
    assert f.delta(epsilon) == pytest.approx(delta, abs=1e-12)
    np.testing.assert_allclose(f.inverse()(ALPHA), f(ALPHA), atol=1e-12)


def test_delta_curve_and_trade_off_function_are_dual() -> None:
    epsilon = np.linspace(0.0, 12.0, 2401)  # has the atom of the Laplace loss, 1
    for f in (GaussianTradeOff(1.3), LaplaceTradeOff(1.0), subsample(GaussianTradeOff(2.0), 0.3)):
        back = trade_off_from_delta(epsilon, f.delta(epsilon))
        gap = f(ALPHA) - back(ALPHA)
        assert gap.min() > -1e-10  # only what the points guarantee
        assert gap.max() < 1e-4
        np.testing.assert_allclose(back.delta(epsilon), f.delta(epsilon), atol=1e-12)
    one_way = mix(GaussianTradeOff(2.0), 0.3)
    both_signs = np.linspace(-12.0, 12.0, 4001)
    back = trade_off_from_delta(both_signs, one_way.delta(both_signs), both_orders=False)
    np.testing.assert_allclose(back(ALPHA), one_way(ALPHA), atol=1e-4)


@given(
    st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 1.0)), min_size=1, max_size=8),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_points_give_the_maximum_of_their_lines(
    points: list[tuple[float, float]], both_orders: bool
) -> None:
    epsilon, delta = np.array(points).T
    expected = np.zeros_like(ALPHA)
    for e, d in points:
        expected = np.maximum(expected, 1.0 - d - np.exp(e) * ALPHA)
        if both_orders:
            expected = np.maximum(expected, np.exp(-e) * (1.0 - d - ALPHA))
    f = trade_off_from_delta(epsilon, delta, both_orders)
    np.testing.assert_allclose(f(ALPHA), expected, atol=1e-9)


def test_discrete_function_returns_exactly_from_its_dual_at_its_losses() -> None:
    f = from_pmf([0.5, 0.3, 0.2], [0.1, 0.3, 0.6])
    losses = np.log([0.2, 1.0, 3.0])
    back = trade_off_from_delta(losses, f.delta(losses), both_orders=False)
    np.testing.assert_allclose(back(ALPHA), f(ALPHA), atol=1e-12)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 6.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 4.0])
def test_mu_from_epsilon_delta_inverts_the_dual(mu: float, epsilon: float) -> None:
    delta = float(GaussianTradeOff(mu).delta(epsilon))
    if delta > 1e-300:
        assert mu_from_epsilon_delta(epsilon, delta) == pytest.approx(mu, rel=1e-7)
    assert mu_from_epsilon_delta(epsilon, 0.0) == 0.0


def test_privacy_curve_says_which_bound_it_is() -> None:
    epsilon = [0.0, 1.0, 2.0]
    lower = privacy_curve(-0.7, "statistic", epsilon)
    upper = privacy_curve(0.7, "composition", epsilon)
    expected = [norm.cdf(-e / 0.7 + 0.35) - np.exp(e) * norm.cdf(-e / 0.7 - 0.35) for e in epsilon]
    for curve in (lower, upper):
        np.testing.assert_allclose(curve.delta, expected, atol=1e-14)
        assert curve.mu == 0.7
    assert (lower.bound, upper.bound) == ("lower", "upper")
    assert "Lower bound" in str(lower)
    assert "at least" in lower.statement
    assert "Upper bound" in str(upper)
    assert len(str(upper).splitlines()) == 5
    assert f"{expected[1]:.4e}" in str(upper)


def test_one_run_epsilon_is_the_binomial_bound_without_delta() -> None:
    for correct, guesses in ((18, 20), (60, 100), (10, 20)):
        found = one_run_epsilon(correct, guesses, 200, 0.0, 0.95)
        # the largest q of which so many right guesses are still refuted at 5 %
        low = binom_quantile(correct, guesses)
        expected = max(np.log(low / (1 - low)), 0.0)
        assert found == pytest.approx(expected, abs=1e-6)
    sure = one_run_epsilon(100, 100, 200, 1e-5)
    assert 0.0 < one_run_epsilon(100, 100, 200, 1e-4) < sure < one_run_epsilon(100, 100, 200, 0.0)


def binom_quantile(correct: int, guesses: int) -> float:
    """The q at which P(Binomial(guesses, q) ≥ correct) is 0.05, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(80):
        q = (low + high) / 2
        tail = sum(
            math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k)
            for k in range(correct, guesses + 1)
        )
        low, high = (q, high) if tail < 0.05 else (low, q)
    return low


def test_one_run_epsilon_holds_for_randomised_response() -> None:
    """Each guess right with probability e^ε/(1 + e^ε), or known for sure with probability δ."""
    rng = np.random.default_rng(0)
    epsilon, delta, canaries = 1.0, 0.002, 120
    right = np.where(
        rng.uniform(size=(400, canaries)) < delta,
        True,
        rng.uniform(size=(400, canaries)) < 1.0 / (1.0 + np.exp(-epsilon)),
    ).sum(1)
    bounds = [one_run_epsilon(int(r), canaries, canaries, delta) for r in right]
    assert np.mean(np.array(bounds) > epsilon) <= 0.05
    assert np.mean(bounds) > 0.4


# Refusals -------------------------------------------------------------------------------------

G = GaussianTradeOff(1.0)
REFUSALS: list[tuple[str, Callable[[], object]]] = [
    ("0 <= correct <= guesses <= canaries", lambda: one_run_epsilon(5, 4, 10, 1e-5)),
    ("delta must lie in", lambda: one_run_epsilon(4, 4, 10, 2.0)),
    ("level must lie", lambda: one_run_epsilon(4, 4, 10, 0.0, confidence=1.0)),
    ("mu must be finite with shape", lambda: compose_mu([0.1, np.nan])),
    ("at least one function and a count", lambda: compose([])),
    ("at least one function and a count", lambda: compose([G], [1, 2])),
    ("at least one function and a count", lambda: central_limit(G, 0)),
    ("step must be > 0", lambda: compose(LaplaceTradeOff(1.0), step=0.0)),
    ("pass a step of at least", lambda: compose(OnGrid(1.0), 2, step=1e-7)),
    ("the composed loss spans", lambda: compose(LaplaceTradeOff(1.0), 10**6, step=1e-4)),
    ("needs f = f\\^-1", lambda: central_limit(mix(G, 0.3))),
    ("has no Gaussian limit", lambda: central_limit(epsilon_delta_trade_off(1.0, 0.1), 9)),
    ("rate must lie in", lambda: poisson_clt_mu(1.0, 1.5, 3)),
    ("mu must be finite and >= 0", lambda: poisson_clt_mu(-1.0, 0.5, 3)),
    ("the limit is about weak steps", lambda: poisson_clt_mu(30.0, 0.5, 3)),
    ("need a finite epsilon >= 0", lambda: mu_from_epsilon_delta(-1.0, 0.1)),
    ("delta = 1 holds for every mu", lambda: mu_from_epsilon_delta(1.0, 1.0)),
    ("delta must lie in", lambda: mu_from_epsilon_delta(1.0, 1.1)),
    ("epsilon must be >= 0 for a guarantee", lambda: epsilon_delta_trade_off(-1.0, 0.9)),
    ("must be equal 1-d arrays", lambda: trade_off_from_delta([1.0, 2.0], [0.1])),
    ("finite and within", lambda: trade_off_from_delta([np.inf], [0.1])),
    ("below 1 - e\\^epsilon", lambda: trade_off_from_delta([-2.0], [0.1])),
    ("an estimate without a finite value", lambda: privacy_curve(np.inf, "statistic")),
    ("has no sign", lambda: privacy_curve(-1.0, "composition")),
    ("source must be", lambda: privacy_curve(1.0, "guess")),  # type: ignore[arg-type]
    ("epsilon must be finite numbers >= 0", lambda: privacy_curve(1.0, "statistic", [-1.0])),
]


@pytest.mark.parametrize(("message", "call"), REFUSALS, ids=[m for m, _ in REFUSALS])
def test_refusals_say_what_was_wrong(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
