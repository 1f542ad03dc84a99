"""Composition of influence over steps, its Gaussian limit, and the bridge to (ε, δ) privacy.

If step i of a run is f_i-influential, the whole run is at most f_1 ⊗ … ⊗ f_k-influential, where
T(P, Q) ⊗ T(P', Q') = T(P × P', Q × Q') (Panda et al., arXiv 2510.10510, theorem 2.6; Dong, Roth
and Su 2019, theorem 3.2). The privacy loss L = log dQ/dP of a product is the sum of the losses,
so any pair composes by convolving loss distributions. A composed figure bounds |μ| from above;
it has no sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import brentq
from scipy.special import ndtr

from fine_bench.theory.tradeoff import (
    MAX_LOSS,
    ArrayLike,
    FloatArray,
    GaussianTradeOff,
    PiecewiseLinear,
    TradeOff,
    check_probability,
    convexify,
)

# Mass that may be cut from either tail of a loss distribution; below it is rounding of the FFT.
_TAIL = 1e-15
_MAX_GRID = 2**22


# Gaussian closed forms ------------------------------------------------------------------------


def compose_mu(mu: ArrayLike) -> FloatArray:
    """Corollary 2.7: G_μ1 ⊗ … ⊗ G_μk = G_m with m = sqrt(Σ μ_i²). `mu`: (..., k) → (...).

    Signed values may be given; the result bounds |μ| and is never negative.
    """
    values = np.asarray(mu, dtype=np.float64)
    if values.ndim == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"mu must be finite with shape (..., steps), got shape {values.shape}; "
            "drop the steps at which nothing was measured"
        )
    return np.asarray(np.sqrt(np.square(values).sum(axis=-1)), dtype=np.float64)


def poisson_clt_mu(mu: float, rate: float, steps: int) -> float:
    """Limit of `steps` Poisson-subsampled Gaussian steps: μ_run = p·sqrt(T·(e^{μ²} − 1)).

    `mu`: per-step parameter when the data take part (≥ 0); `rate`: probability p of taking part.
    Bu, Dong, Long and Su (2020), *Deep learning with Gaussian differential privacy*. It is the
    limit of mix(G_μ, p)^{⊗T}, in either order of the hypotheses, for T → ∞ with p·sqrt(T) fixed.
    (C_p(G_μ)^{⊗T}, which gives every step the worse order, lies lower and has a limit of its own:
    `central_limit`.) A limit, not a bound: it holds for weak steps and explodes for strong ones;
    at μ = 3 a single step already counts 90·p.
    """
    check_probability(rate, "rate")
    if not (np.isfinite(mu) and mu >= 0.0 and steps >= 0):
        raise ValueError(f"mu must be finite and >= 0 and steps >= 0, got mu={mu!r}, {steps!r}")
    if mu > 26.0:
        raise ValueError(
            f"e^(mu^2) overflows at mu = {mu:.3g}: the limit is about weak steps (mu << 1); "
            "use compose() for strong ones"
        )
    return float(rate * np.sqrt(steps * np.expm1(mu * mu)))


def mu_from_epsilon_delta(epsilon: float, delta: float) -> float:
    """The μ whose Gaussian dual passes through (ε, δ): δ_μ(ε) = `delta`, `epsilon` ≥ 0.

    G_μ is the Gaussian curve that is exactly (ε, δ)-indistinguishable at this one ε.
    """
    check_probability(delta, "delta")
    if not (np.isfinite(epsilon) and epsilon >= 0.0) or delta == 1.0:
        raise ValueError(
            f"need a finite epsilon >= 0 and delta < 1, got epsilon={epsilon!r}, delta={delta!r}; "
            "delta = 1 holds for every mu"
        )
    if delta == 0.0:
        return 0.0

    def excess(mu: float) -> float:
        return float(GaussianTradeOff(mu).delta(epsilon)) - delta

    high = 1.0
    while excess(high) < 0.0:
        high *= 2.0
    return float(brentq(excess, 0.0, high, xtol=1e-14, rtol=1e-15))


# (ε, δ) to trade-off function -----------------------------------------------------------------


def epsilon_delta_trade_off(epsilon: float, delta: float) -> PiecewiseLinear:
    """f_{ε,δ}(α) = max(0, 1 − δ − e^ε α, e^−ε(1 − δ − α)), ε ≥ 0: what one (ε, δ) guarantees."""
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be >= 0 for a guarantee in both orders, got {epsilon!r}")
    return trade_off_from_delta([epsilon], [delta])


def trade_off_from_delta(
    epsilon: ArrayLike, delta: ArrayLike, both_orders: bool = True
) -> PiecewiseLinear:
    """Largest f that the points (ε_k, δ_k) of a dual curve guarantee: sup_k 1 − δ_k − e^{ε_k} α.

    `epsilon`, `delta`: (k,). With `both_orders` each point also holds with P and Q exchanged, as
    in differential privacy, which adds the lines e^−ε(1 − δ − α); without it the points should
    span negative ε too. Exact at every given point; between them it lies below the truth.
    """
    eps = np.asarray(epsilon, dtype=np.float64)
    dlt = check_probability(delta, "delta")
    if eps.ndim != 1 or eps.shape != dlt.shape or eps.size == 0:
        raise ValueError(
            f"epsilon and delta must be equal 1-d arrays, got {eps.shape}, {dlt.shape}"
        )
    if not (np.abs(eps) <= MAX_LOSS).all():
        raise ValueError(f"epsilon must be finite and within ±{MAX_LOSS:.0f}; drop other points")
    below = dlt < -np.expm1(np.minimum(eps, 0.0)) - 1e-12
    if below.any():
        at = int(np.argmax(below))
        raise ValueError(
            f"delta({eps[at]:.6g}) = {dlt[at]:.6g} is below 1 - e^epsilon, which even two equal "
            "distributions have; check the sign of epsilon"
        )
    if both_orders:
        eps, dlt = np.append(eps, -eps), np.append(dlt, 1.0 - np.exp(-eps) * (1.0 - dlt))
    # A line of slope −t and height 1 − δ: the useful lines are the lower hull of the points
    # (t, δ), which starts at (0, 1), and neighbours meet at α = −(slope of that hull).
    t = np.append(0.0, np.exp(eps))
    dlt = np.append(1.0, dlt)
    order = np.lexsort((dlt, t))
    t, dlt = t[order], np.minimum.accumulate(dlt[order])
    hull = [0]
    for i in range(1, t.size):
        if t[i] == t[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (dlt[b] - dlt[a]) * (t[i] - t[b]) < (dlt[i] - dlt[b]) * (t[b] - t[a]):
                break
            hull.pop()
        hull.append(i)
    t, dlt = t[hull], dlt[hull]
    alpha = np.clip(-np.diff(dlt) / np.diff(t), 0.0, 1.0)
    beta = np.clip(1.0 - dlt[1:] - t[1:] * alpha, 0.0, 1.0)
    return convexify(np.append(alpha, 0.0), np.append(beta, 1.0 - dlt[-1]))


# Composition by privacy-loss convolution ------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """A composed trade-off function and how far it may lie from the true one.

    The numerical curve is pessimistic (at or below the truth: more influence, never less), and

        δ_true(ε) − mass_error ≤ δ(ε) ≤ δ_true(ε − loss_error) + mass_error.

    `loss_error` is the worst case over all steps (steps × grid step). Each step is discretised
    without changing the mass or the mean likelihood ratio of a cell, so what usually counts is an
    added variance of the loss of about step²/6 a step.
    """

    trade_off: TradeOff
    loss_error: float
    mass_error: float

    @property
    def exact(self) -> bool:
        """Whether a closed form was used."""
        return self.loss_error == 0.0 and self.mass_error == 0.0


@dataclass(frozen=True)
class _LossGrid:
    """Loss distribution on the grid `first`, `first` + 1, … (times the step), under P and Q."""

    first: int
    p: FloatArray  # sums to 1 less the P mass at loss −inf
    q: FloatArray
    q_plus: float  # Q mass at loss +inf


def _discretise(f: TradeOff, step: float) -> _LossGrid:
    """Pessimistic loss distribution of `f` on multiples of `step`.

    The mass of a cell (e_k, e_{k+1}] goes to its two ends so that both its P mass and its Q mass
    are kept. Undoing the split is a randomised map, so the true pair is a processed version of the
    discrete one and no easier to tell apart. Its δ is exact on the grid and linear in e^ε between
    (the connect-the-dots construction of Doroshenko et al. 2022).
    """
    low, high = f.loss_range(_TAIL)
    first = int(np.floor(max(low, -MAX_LOSS) / step))
    last = max(int(np.ceil(min(high, MAX_LOSS) / step)), first + 1)
    if last - first > _MAX_GRID:
        raise ValueError(
            f"a grid step of {step:.3g} needs {last - first} cells for losses from {low:.3g} to "
            f"{high:.3g}; pass a step of at least {(high - low) / _MAX_GRID:.3g}"
        )
    edges = step * np.arange(first, last + 1)
    test = f.ratio_test(edges)
    # Differences are taken on the side on which the numbers are small.
    falling = np.where(test.alpha[:-1] < 0.5, -np.diff(test.alpha), np.diff(test.accept))
    rising = np.where(test.beta[1:] < 0.5, np.diff(test.beta), -np.diff(test.power))
    mass_p, mass_q = np.maximum(falling, 0.0), np.maximum(rising, 0.0)

    left, right = edges[:-1], edges[1:]
    up_q = np.clip((mass_q - np.exp(left) * mass_p) / -np.expm1(-step), 0.0, mass_q)
    up_p = np.clip((mass_q * np.exp(-left) - mass_p) / np.expm1(step), 0.0, mass_p)
    # Solved in the measure that is the larger one in the cell, carried over to the other.
    positive = left >= 0.0
    q_left = np.where(positive, mass_q - up_q, (mass_p - up_p) * np.exp(left))
    q_right = np.where(positive, up_q, up_p * np.exp(right))
    p_left = np.where(positive, (mass_q - up_q) * np.exp(-left), mass_p - up_p)
    p_right = np.where(positive, up_q * np.exp(-right), up_p)
    p, q = np.zeros(edges.size), np.zeros(edges.size)
    p[:-1] += p_left
    p[1:] += p_right
    q[:-1] += q_left
    q[1:] += q_right
    # Beyond the grid: above, the cell (e_last, inf) keeps P at its lower end and sends the rest
    # of Q to +inf; below likewise with the measures exchanged.
    top_p, top_q = float(test.alpha[-1]), float(test.power[-1])
    at_top = min(top_p * float(np.exp(edges[-1])), top_q)
    p[-1] += at_top * float(np.exp(-edges[-1]))
    q[-1] += at_top
    low_p, low_q = float(test.accept[0]), float(test.beta[0])
    at_low = min(low_q * float(np.exp(-edges[0])), low_p)
    p[0] += at_low
    q[0] += at_low * float(np.exp(edges[0]))
    return _LossGrid(first, p, q, max(top_q - at_top, 0.0))


def _tail_edge(
    grids: Sequence[_LossGrid], counts: Sequence[int], step: float, upper: bool
) -> float:
    """Chernoff bound: the loss that the sum passes with probability at most `_TAIL`.

    Upwards under Q, downwards under P, each the measure that favours that side.
    """
    sign = 1.0 if upper else -1.0
    tilts = np.logspace(-4, 4, 81)
    total = np.zeros(tilts.size)
    farthest = 0.0
    for grid, count in zip(grids, counts, strict=True):
        mass = grid.q if upper else grid.p
        seen = np.flatnonzero(mass > 0.0)
        if seen.size == 0:  # every loss is infinite: nothing for the window to hold
            continue
        loss = sign * step * (grid.first + seen)
        log_mass = np.log(mass[seen])
        for i, tilt in enumerate(tilts):
            exponent = log_mass + tilt * loss
            peak = exponent.max()
            total[i] += count * (peak + np.log(np.exp(exponent - peak).sum()))
        farthest += count * max(float(loss.max()), 0.0)
    edge = float(((total - np.log(_TAIL)) / tilts).min())
    return sign * min(max(edge, 0.0), farthest)


def _as_steps(
    functions: TradeOff | Sequence[TradeOff], counts: int | Sequence[int]
) -> tuple[list[TradeOff], list[int]]:
    """Functions and how often each occurs, as two lists of one length."""
    many = [functions] if isinstance(functions, TradeOff) else list(functions)
    times = [counts] * len(many) if isinstance(counts, int) else [int(c) for c in counts]
    if not many or len(many) != len(times) or min(times) < 1:
        raise ValueError(
            f"need at least one function and a count >= 1 for each, got {len(many)} function(s) "
            f"and counts {times[:5]}"
        )
    return many, times


def compose(
    functions: TradeOff | Sequence[TradeOff],
    counts: int | Sequence[int] = 1,
    step: float | None = None,
) -> Composition:
    """f_1^{⊗c_1} ⊗ f_2^{⊗c_2} ⊗ …: exact for Gaussians, by loss convolution for any other pair.

    `functions`: one trade-off function or several; `counts`: how often each occurs (≥ 1);
    `step`: grid step of the loss, by default 1/128 of the root mean square loss spread of a step,
    which inflates the variance of the composed loss by 1e-5. Losses are convolved by FFT twice,
    under P for negative and under Q for positive sums, so that neither half is a rounding error
    multiplied by e^|loss|. Returns the curve with its error bounds.
    """
    functions, counts = _as_steps(functions, counts)
    if step is not None and not (np.isfinite(step) and step > 0.0):
        raise ValueError(f"step must be > 0 (units of the log likelihood ratio), got {step!r}")
    # Gaussian steps are one Gaussian together, so only the others need the grid.
    mus: list[float] = []
    rest: list[tuple[TradeOff, int]] = []
    for f, count in zip(functions, counts, strict=True):
        if isinstance(f, GaussianTradeOff):
            mus.append(f.mu * float(np.sqrt(count)))
        else:
            rest.append((f, count))
    if mus:
        rest.append((GaussianTradeOff(float(compose_mu(mus))), 1))
    if len(mus) == len(functions):
        return Composition(rest[0][0], 0.0, 0.0)
    functions, counts = [f for f, _ in rest], [count for _, count in rest]

    if step is None:
        spread = sum(c * loss_moments(f).variance for f, c in zip(functions, counts, strict=True))
        step = float(np.sqrt(spread / sum(counts))) / 128.0
        widest = max(high - low for low, high in (f.loss_range(_TAIL) for f in functions))
        # Steps with one finite loss each (a pure δ) have no spread: go by the loss itself.
        step = (
            max(step, widest / 2**20) if step > 0.0 else 1e-3 * (widest if widest > 1e-9 else 1.0)
        )
    grids = [_discretise(f, step) for f in functions]
    low = int(np.floor(_tail_edge(grids, counts, step, upper=False) / step)) - 1
    high = int(np.ceil(_tail_edge(grids, counts, step, upper=True) / step)) + 1
    cells = high - low + 1
    if cells > _MAX_GRID:
        raise ValueError(
            f"the composed loss spans {cells * step:.3g}, {cells} cells of {step:.3g}; pass a step "
            f"of at least {cells * step / _MAX_GRID:.3g} (the stated error grows with it)"
        )
    size = int(next_fast_len(cells, real=True))
    spectra = [np.ones(size // 2 + 1, dtype=np.complex128) for _ in range(2)]
    log_q_finite = 0.0
    for grid, count in zip(grids, counts, strict=True):
        slots = (grid.first + np.arange(grid.p.size)) % size
        for spectrum, mass in zip(spectra, (grid.p, grid.q), strict=True):
            spectrum *= rfft(np.bincount(slots, weights=mass, minlength=size)) ** count
        with np.errstate(divide="ignore"):
            log_q_finite += count * float(np.log1p(-grid.q_plus))
    where = (low + np.arange(cells)) % size
    p_sum, q_sum = (np.maximum(irfft(s, n=size)[where], 0.0) for s in spectra)
    loss = step * (low + np.arange(cells))
    positive = loss >= 0.0
    with np.errstate(over="ignore", under="ignore"):
        p = np.where(positive, q_sum * np.exp(-np.maximum(loss, 0.0)), p_sum)
        q = np.where(positive, q_sum, p_sum * np.exp(np.minimum(loss, 0.0)))
    # Rejecting from the highest loss down: α sums P from the top, β sums Q from the bottom.
    alpha = np.cumsum(p[::-1])
    beta = np.append(np.cumsum(q)[:-1][::-1], 0.0)
    curve = convexify(
        np.append(np.minimum(alpha, 1.0), 0.0),
        np.append(np.minimum(beta, 1.0), np.exp(log_q_finite)),
    )
    # Both cut tails, and the rounding of a transform of this length raised to these powers.
    rounding = 4.0 * np.finfo(np.float64).eps * (sum(counts) + np.log2(size)) + cells * 1e-17
    return Composition(curve, step * sum(counts), 4.0 * _TAIL + float(rounding))


# Central limit --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossMoments:
    """Moments of λ = log |f'| = log dQ/dP under P, finite atoms only."""

    kl: float
    """KL(P ‖ Q) = −E[λ]; inf where P has events that Q lacks."""
    kappa2: float
    """E[λ²]."""
    kappa3: float
    """E|λ|³."""
    kappa3_centred: float
    """E|λ + kl|³."""
    variance: float
    """E[λ²] − E[λ]², over the finite atoms."""


def loss_moments(f: TradeOff) -> LossMoments:
    """The functionals kl, κ2, κ3, κ̄3 of a trade-off function (Dong, Roth and Su, section 3.2).

    Closed form for G_μ, sums for piecewise-linear functions, else Gauss–Legendre quadrature of
    E[g(λ)] = g(0) + ∫_0^∞ g'(ε) P(λ > ε) dε − ∫_{−∞}^0 g'(ε) P(λ ≤ ε) dε.
    """
    if isinstance(f, GaussianTradeOff):
        mu, kl = f.mu, 0.5 * f.mu**2
        # E|N(−kl, μ²)|³ by its closed form; kl/μ = μ/2.
        h = 0.5 * mu
        density = np.exp(-0.5 * h * h) / np.sqrt(2.0 * np.pi)
        third = mu**3 * (2.0 * (2.0 + h * h) * density + (h**3 + 3.0 * h) * (2.0 * ndtr(h) - 1.0))
        centred = mu**3 * 2.0 * np.sqrt(2.0 / np.pi)
        return LossMoments(kl, mu**2 + kl**2, float(third), float(centred), mu**2)
    if isinstance(f, PiecewiseLinear):
        loss, mass, _ = f.losses
        finite = np.isfinite(loss)
        lost = bool(mass[np.isneginf(loss)].sum() > 0.0)
        loss, mass = loss[finite], mass[finite]
        total = float(mass.sum()) or 1.0
        mean = float((mass * loss).sum())
        spread = float((mass * np.square(loss - mean / total)).sum())
        if lost:
            return LossMoments(*(float("inf"),) * 4, spread)
        return LossMoments(
            -mean,
            float((mass * loss**2).sum()),
            float((mass * np.abs(loss) ** 3).sum()),
            float((mass * np.abs(loss - mean) ** 3).sum()),
            spread,
        )
    low, high = f.loss_range(1e-18)
    nodes, weights = np.polynomial.legendre.leggauss(16)

    def integral(start: float, end: float, power: int, centre: float) -> float:
        """∫ d/dε |ε − centre|^power · (tail probability) between two losses of one sign."""
        if end <= start:
            return 0.0
        cuts = np.linspace(start, end, 257)
        half = 0.5 * np.diff(cuts)[:, None]
        eps = 0.5 * (cuts[:-1] + cuts[1:])[:, None] + half * nodes
        test = f.ratio_test(eps)
        away = eps - centre
        slope = power * np.abs(away) ** (power - 1) * (np.sign(away) if power > 1 else 1.0)
        tail = test.alpha if start >= 0.0 else -test.accept
        return float((slope * tail * half * weights).sum())

    def expectation(power: int, centre: float = 0.0) -> float:
        # g = |ε − centre|^power (or ε itself for power 1), split where g or the tail has a kink.
        base = 0.0 if power == 1 else abs(centre) ** power
        cuts = sorted({low, min(max(centre, low), 0.0), 0.0, max(min(centre, high), 0.0), high})
        return base + sum(integral(a, b, power, centre) for a, b in pairwise(cuts))

    mean = expectation(1)
    second = expectation(2)
    if float(f.ratio_test(-MAX_LOSS).accept) > 1e-12:
        return LossMoments(*(float("inf"),) * 4, max(second - mean * mean, 0.0))
    return LossMoments(
        -mean, second, expectation(3), expectation(3, mean), max(second - mean * mean, 0.0)
    )


@dataclass(frozen=True)
class CentralLimit:
    """Gaussian limit of a composition: G_μ(α + γ) − γ ≤ f(α) ≤ G_μ(α − γ) + γ on [γ, 1 − γ]."""

    mu: float
    gamma: float
    """Berry–Esseen error in α and β; 0.5 or more bounds nothing."""


def central_limit(
    functions: TradeOff | Sequence[TradeOff], counts: int | Sequence[int] = 1
) -> CentralLimit:
    """Parameters of the central limit theorem for composed *symmetric* trade-off functions.

        μ = 2‖kl‖₁ / sqrt(‖κ2‖₁ − ‖kl‖₂²),   γ = 0.56 ‖κ̄3‖₁ / (‖κ2‖₁ − ‖kl‖₂²)^{3/2}

    (Dong, Roth and Su 2019, theorem 3.4; norms run over the steps). Functions with infinite loss
    (f(0) < 1) never become Gaussian and are refused; asymmetric ones go through `symmetrize()`.
    """
    functions, counts = _as_steps(functions, counts)
    probe = np.linspace(-20.0, 20.0, 401)
    kl = variance = third = 0.0
    for f, count in zip(functions, counts, strict=True):
        uneven = float(np.abs(f.delta(probe) - f.inverse().delta(probe)).max())
        if uneven > 1e-9:
            raise ValueError(
                f"the theorem needs f = f^-1, but the duals of both differ by {uneven:.3g}; "
                "pass f.symmetrize()"
            )
        moments = loss_moments(f)
        if not np.isfinite(moments.kl):
            raise ValueError(
                "a step has events that prove one hypothesis (f(0) < 1, infinite KL): its "
                "composition has no Gaussian limit; use compose()"
            )
        kl += count * moments.kl
        variance += count * moments.variance
        third += count * moments.kappa3_centred
    if variance <= 0.0:
        return CentralLimit(0.0, 0.0)
    return CentralLimit(2.0 * kl / float(np.sqrt(variance)), 0.56 * third / variance**1.5)


# What a μ says as privacy ---------------------------------------------------------------------


@dataclass(frozen=True)
class PrivacyCurve:
    """The (ε, δ) curve of a μ, with the sentence that says which side it bounds. Prints as text."""

    mu: float
    """Gaussian influence |μ|."""
    source: Literal["statistic", "composition"]
    bound: Literal["lower", "upper"]
    epsilon: FloatArray
    """(k,), ≥ 0."""
    delta: FloatArray
    """(k,), δ(ε) of G_μ."""
    statement: str

    def __str__(self) -> str:
        rows = [
            f"{eps:>10.4g}  {dlt:>12.4e}" for eps, dlt in zip(self.epsilon, self.delta, strict=True)
        ]
        return "\n".join([self.statement, f"{'epsilon':>10}  {'delta':>12}", *rows])


def privacy_curve(
    mu: float,
    source: Literal["statistic", "composition"],
    epsilon: ArrayLike = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
) -> PrivacyCurve:
    """(ε, δ) table that `mu` implies: δ(ε) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2).

    `source`: "statistic" for the μ̂ of one statistic (signed values allowed; the sign says who is
    helped, the curve depends on |μ| alone): a lower bound on what can be told, and only as sure
    as μ̂ itself, so pass the end of its interval nearer 0 for a bound at the interval's level.
    "composition" for a μ composed over steps (≥ 0): an upper bound for a reader of everything.
    """
    eps = _check_table_epsilon(epsilon)
    if not np.isfinite(mu):
        raise ValueError(
            f"mu must be finite, got {mu!r}; an estimate without a finite value implies no curve: "
            "draw more samples, or pass the finite end of its interval"
        )
    size = abs(float(mu))
    if source == "statistic":
        bound: Literal["lower", "upper"] = "lower"
        statement = (
            f"Lower bound: |mu| = {size:.4g} is what one statistic shows. Whoever reads this "
            "statistic can tell at least this much; a reader of more may tell more."
        )
    elif source == "composition":
        if mu < 0.0:
            raise ValueError(
                f"a composed mu bounds |mu| and has no sign, got {mu!r}; use compose_mu()"
            )
        bound = "upper"
        statement = (
            f"Upper bound: mu = {size:.4g} is composed over the steps. Not even a reader of the "
            "whole trajectory can tell more, if the per-step values hold."
        )
    else:
        raise ValueError(f"source must be 'statistic' or 'composition', got {source!r}")
    return PrivacyCurve(size, source, bound, eps, GaussianTradeOff(size).delta(eps), statement)


def _check_table_epsilon(epsilon: ArrayLike) -> FloatArray:
    eps = np.atleast_1d(np.asarray(epsilon, dtype=np.float64))
    if eps.ndim != 1 or not (eps >= 0.0).all() or not np.isfinite(eps).all():
        raise ValueError(f"epsilon must be finite numbers >= 0 in one dimension, got {epsilon!r}")
    return eps
