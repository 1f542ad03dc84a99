"""Would another run flag it too? From one run's μ and errors to a rule about the next run.

An example is *flagged* where its score lies at or beyond a threshold τ on the suspicious side, and
it *repeats* where a further run of the same training, on the same data, flags it as well. With μ_i
the mean over runs and s_i the error of one run's score (f-INE's ``std_error``),

    μ̂_i = μ_i + s_i e_i,     a further run: μ'_i = μ_i + s_i e'_i,     e, e' independent N(0, 1).

Where μ̂_i is the mean over R_i runs (``averaged``) its own error is s_i/√R_i, the further run's s_i.

*With a prior* (``repeat_probability``). The μ_i of all examples are draws from one distribution g,
which is estimated from the same scores by maximum likelihood, without a form (Kiefer and Wolfowitz
1956; here on a grid by EM). Then

    P(μ'_i ≥ τ | run) = Σ_k w_ik Φ((u_k − τ)/s_i),    w_ik ∝ g_k φ((μ̂_i − u_k) √R_i/s_i)/s_i

so that what was lifted over τ by its error is expected to fall back. An error far smaller than the
gaps of the grid finds no u_k near its score; there the prior is taken as flat, P = Φ((μ̂_i −
τ)/(√(1 + 1/R_i) s_i)). The average of 1 − P over a
set that the run chooses is, given the run, its expected share that does not repeat: flagging by
falling P as long as that average is at most α (``at_most``) gives the rule

    of the flagged, at most a share α would not repeat in another run, in expectation.

*Without a prior* (``repeat_p_values``). μ̂_i − μ'_i is N(0, 2s_i²) whatever μ_i is, so p_i =
Φ((τ − μ̂_i)/(√2 s_i)) obeys P(p_i ≤ t and i does not repeat) ≤ t, and Benjamini–Hochberg on all p_i
holds the same rate where examples are independent (Jin and Candès 2023, for predictions in place of
hypotheses). It needs no g and pays with power: it counts every example as one that may not repeat.

*Errors.* s_i is itself estimated, from few epochs; among many examples those with too small an s_i
look surest. ``moderated`` draws s_i² towards the trend of its neighbours in μ and says of how many
degrees of freedom it then is (Smyth 2004); what is left of its uncertainty is integrated over in P,
and makes the p-values Student's. ``results/decisions.md`` has what the rule holds on ten seeds.

This is another question than whether an example is *wrong* (``false_discovery``): a wrong label may
be flagged by chance, and a hard but right one in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import chdtri, digamma, ndtr, polygamma, stdtr

from fine_bench.theory.arrays import ArrayLike, FloatArray, check_level, check_probability

_STRATUM = 50
"""Examples whose errors make one point of the trend, at least."""
_STRATA = 20
_GRID = 180
_FIT = 5000
"""Examples from which the prior is estimated, at most; evenly spaced in the order of the score."""
_ROUNDS = 300
_APART = 5.0
"""Errors between a score and the nearest point of the prior beyond which the score stands alone."""
_NODES = 9
"""Equally likely values of s² that stand for its distribution."""


class Moderated(NamedTuple):
    """Errors with what is known of themselves."""

    error: FloatArray
    """s̃, (n,)."""
    freedom: FloatArray
    """Degrees of freedom of s̃², (n,); infinite where it is exact."""


def moderated(mu: ArrayLike, std_error: ArrayLike, observations: ArrayLike) -> Moderated:
    """Standard errors drawn towards those of examples with similar scores.

        s̃² = (d₀ s₀² + d s²)/(d₀ + d),    d = observations − 1

    of d₀ + d degrees of freedom. s₀² is the trend of s² along the order of `mu`, and d₀ what the
    spread of log s² around it leaves: Var(log s²) = ψ'(d/2) + ψ'(d₀/2). Where that spread is no
    larger than chance, s̃ = s₀, exactly. Fewer than 100 examples have no trend: s̃ = s.

    Args:
        mu: scores of one run, (n,).
        std_error: their errors, (n,), ≥ 0; infinite where unknown, and then it stays so.
        observations: epochs or snapshots behind each error, (n,) or one number, at least 2 where
            the error is finite.
    """
    x, s = _scores(mu, std_error)
    d = np.broadcast_to(np.asarray(observations, dtype=np.float64) - 1.0, x.shape)
    known = np.isfinite(s)
    few = known & ~(d >= 1.0)
    if few.any():
        raise ValueError(
            f"a finite error needs at least 2 observations, got {float(d[few][0]) + 1.0:g}; pass "
            "scores.n_observations"
        )
    used = known & (s > 0.0)
    if np.count_nonzero(used) < 2 * _STRATUM:
        return Moderated(s.copy(), d.copy())
    order = np.flatnonzero(used)[np.argsort(x[used], kind="stable")]
    half = 0.5 * d[order]
    # the mean of log(chi²_d / d) is ψ(d/2) − log(d/2)
    level = 2.0 * np.log(s[order]) - digamma(half) + np.log(half)
    strata = np.array_split(np.arange(len(order)), min(_STRATA, len(order) // _STRATUM))
    places = np.array([part.mean() for part in strata])
    trend = np.interp(np.arange(len(order)), places, [level[part].mean() for part in strata])
    excess = float(np.var(level - trend, ddof=len(strata)) - polygamma(1, half).mean())
    prior = np.interp(x, x[order], np.exp(trend))
    if excess <= 0.0:
        return Moderated(np.where(known, np.sqrt(prior), s), np.full(x.shape, np.inf))
    d0 = 2.0 * float(brentq(lambda t: float(polygamma(1, t)) - excess, 1e-6, 1e9))
    # log of the scaled inverse χ² that s₀² stands for
    prior = prior * np.exp(digamma(0.5 * d0) - np.log(0.5 * d0))
    drawn = np.sqrt((d0 * prior + d * s**2) / (d0 + d))
    return Moderated(np.where(known, drawn, s), d0 + d)


def repeat_probability(
    mu: ArrayLike,
    std_error: ArrayLike,
    threshold: float,
    suspicious: Literal["high", "low"],
    observations: ArrayLike | None = None,
    averaged: ArrayLike = 1.0,
) -> FloatArray:
    """P(a further run flags the example | this run, or these runs), (n,) in [0, 1].

    Args:
        mu: scores of one run, (n,), finite.
        std_error: their errors, (n,), ≥ 0. Where infinite the run says nothing of the example
            itself, and the result is NaN.
        threshold: τ: flagged are scores ≥ τ ("high") or ≤ τ ("low").
        suspicious: the suspicious end of the scores.
        observations: epochs or snapshots behind each error; with them errors are moderated and
            their own uncertainty counts. Without, they are taken as exact.
        averaged: R: runs whose mean `mu` is, (n,) or one number, ≥ 1. `std_error` stays that of one
            run, as the spread between the runs gives it, for instance; then `observations` is R.
    """
    x, s = _scores(mu, std_error)
    freedom = np.full(x.shape, np.inf)
    if observations is not None:
        s, freedom = moderated(x, s, observations)
    root = np.sqrt(_averaged(averaged, x))
    sign = _sign(suspicious)
    x, tau = sign * x, sign * _threshold(threshold)
    found = np.full(x.shape, np.nan)
    exact = s == 0.0
    found[exact] = x[exact] >= tau
    used = np.isfinite(s) & ~exact
    if not used.any():
        return found
    root = root[used]
    values, errors = x[used], _spread(s[used] / root, freedom[used])
    grid = np.unique(
        np.concatenate(
            [
                np.quantile(values, np.linspace(0.0, 1.0, 2 * _GRID // 3)),
                np.linspace(values.min(), values.max(), _GRID // 3),
            ]
        )
    )
    order = np.argsort(values, kind="stable")
    fit = order[np.linspace(0, len(order) - 1, min(len(order), _FIT)).astype(int)]
    prior = _prior(values[fit], errors[fit], grid)
    result = np.empty(len(values))
    for part in np.array_split(np.arange(len(values)), len(values) // _FIT + 1):
        flags, weighs = np.zeros(len(part)), np.zeros(len(part))
        for s_node, weight in _by_node(values[part], errors[part], grid):
            flags += (weight * ndtr((grid - tau) / (root[part] * s_node)[:, None])) @ prior
            weighs += weight @ prior
        result[part] = np.divide(flags, weighs, out=np.full(len(part), np.nan), where=weighs > 0.0)
    # where no point of the prior lies within a few errors of a score, it says nothing there
    place = np.searchsorted(grid, values).clip(1, max(len(grid) - 1, 1)) - 1
    gap = np.minimum(np.abs(values - grid[place]), np.abs(values - grid[(place + 1) % len(grid)]))
    alone = (gap > _APART * errors.max(1)) | np.isnan(result)
    spread = np.sqrt(1.0 + root**-2) * s[used]
    result[alone] = stdtr(freedom[used], (values - tau) / spread)[alone]
    found[used] = np.clip(result, 0.0, 1.0)
    return found


def repeat_p_values(
    mu: ArrayLike,
    std_error: ArrayLike,
    threshold: float,
    suspicious: Literal["high", "low"],
    observations: ArrayLike | None = None,
) -> FloatArray:
    """p-values of "a further run does not flag the example", (n,), for ``benjamini_hochberg``.

    p = F((τ − μ̂)/(√2 s)), with the signs turned for "low" and F normal, or Student's with the
    moderated errors' degrees of freedom; 1 where the error is unknown. Arguments as in
    ``repeat_probability``.
    """
    x, s = _scores(mu, std_error)
    freedom = np.full(x.shape, np.inf)
    if observations is not None:
        s, freedom = moderated(x, s, observations)
    gap = _sign(suspicious) * (_threshold(threshold) - x)
    unit = np.where((s > 0.0) & np.isfinite(s), s, 1.0)
    p = np.where(s > 0.0, stdtr(freedom, gap / (np.sqrt(2.0) * unit)), gap > 0.0)
    return np.where(np.isfinite(s), p, 1.0)


def at_most(
    probability: ArrayLike, candidates: npt.NDArray[np.bool_], level: float
) -> npt.NDArray[np.bool_]:
    """The largest set of candidates of which at most `level` would not repeat, in expectation.

    Args:
        probability: of ``repeat_probability``, (n,); NaN is never flagged.
        candidates: which examples this run flags, (n,).
        level: α, in (0, 1).
    """
    check_level(level)
    values = np.asarray(probability, dtype=np.float64)
    chosen = np.asarray(candidates)
    if values.ndim != 1 or chosen.dtype != np.bool_ or chosen.shape != values.shape:
        raise ValueError(
            f"probability must be (n,) and candidates a boolean mask of the same shape, got "
            f"{values.shape} and {chosen.dtype} {chosen.shape}; pass scores >= threshold"
        )
    check_probability(values[~np.isnan(values)], "probability")
    rows = np.flatnonzero(chosen & ~np.isnan(values))
    rows = rows[np.argsort(-values[rows], kind="stable")]
    share = np.cumsum(1.0 - values[rows]) / np.arange(1, len(rows) + 1)
    flagged = np.zeros(values.shape, dtype=np.bool_)
    # the average rises along the order, so those that obey are the first ones
    flagged[rows[share <= level]] = True
    return flagged


def _prior(values: FloatArray, errors: FloatArray, grid: FloatArray) -> FloatArray:
    """Weights of `grid` that make the scores likeliest, by EM from equal ones.

    `errors`: (n, M), M equally likely ones of each score.
    """
    likelihood = np.zeros((len(values), len(grid)))
    for _, weight in _by_node(values, errors, grid):
        likelihood += weight
    weights = np.full(len(grid), 1.0 / len(grid))
    before = -np.inf
    for _ in range(_ROUNDS):
        mixed = likelihood @ weights
        now = float(np.log(mixed).mean())
        if now - before < 1e-7:
            break
        before = now
        weights = weights * ((1.0 / mixed) @ likelihood) / len(values)
    return weights


def _spread(error: FloatArray, freedom: FloatArray) -> FloatArray:
    """Values of s that stand for what is known of it, (n, M): s̃ sqrt(d/χ²_d) at M quantiles."""
    if np.isinf(freedom).all():
        return error[:, None]
    tails = (np.arange(_NODES) + 0.5) / _NODES
    d = np.minimum(freedom, 1e6)[:, None]
    return np.asarray(error[:, None] * np.sqrt(d / chdtri(d, tails)), dtype=np.float64)


def _by_node(
    values: FloatArray, errors: FloatArray, grid: FloatArray
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Each node's s, (n,), and φ((x − u)/s)/s, (n, K), up to one factor of each score."""
    distance = (values[:, None] - grid) ** 2
    nearest = distance.min(1, keepdims=True) / (2.0 * errors.max(1, keepdims=True) ** 2)
    for s in errors.T:
        density = np.exp(nearest - 0.5 * distance / s[:, None] ** 2)
        yield s, density * (errors[:, 0] / s)[:, None]


def _scores(mu: ArrayLike, std_error: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, s = np.asarray(mu, dtype=np.float64), np.asarray(std_error, dtype=np.float64)
    if x.ndim != 1 or x.shape != s.shape or not x.size:
        raise ValueError(
            f"mu and std_error must both be (n,), got {x.shape} and {s.shape}; pass one row of "
            "scores.values and of scores.std_error"
        )
    if not np.isfinite(x).all():
        raise ValueError("mu holds NaN or infinite values; leave out what has no score")
    if not (s >= 0.0).all():
        raise ValueError("std_error must be >= 0, infinite where unknown; got a negative or NaN")
    return x, s


def _averaged(averaged: ArrayLike, x: FloatArray) -> FloatArray:
    runs = np.asarray(averaged, dtype=np.float64)
    if runs.shape not in ((), x.shape) or not (np.isfinite(runs) & (runs >= 1.0)).all():
        raise ValueError(
            f"averaged must be (n,) or one number, all >= 1, got {runs.ravel()[:5].tolist()} of "
            f"shape {runs.shape}; pass how many runs each score is the mean of"
        )
    return np.broadcast_to(runs, x.shape)


def _threshold(threshold: float) -> float:
    if not np.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold!r}; pass a score")
    return float(threshold)


def _sign(suspicious: str) -> float:
    if suspicious not in ("high", "low"):
        raise ValueError(f"suspicious must be 'high' or 'low', got {suspicious!r}")
    return 1.0 if suspicious == "high" else -1.0
