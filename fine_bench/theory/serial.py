"""The error of a mean whose samples are correlated from step to step.

Samples of one run are no independent draws: neighbouring steps share their parameters. The mean of
n of them then varies by

    Var(x̄) = σ²/n · d_0,   d_0 = 1 + 2 Σ_k (1 − k/n) ρ_k,   ρ_k the correlation at lag k,

d_0 being the *inflation*, and n over it the effective sample size. From few samples no estimate of
ρ is sure, and the shortest intervals come from the runs that look least correlated by chance: an
estimate that is put in for the truth makes intervals too short, and refusing those that look
correlated leaves the wrong ones. So the correlation is not put in but averaged over.

*Models.* ρ_k = w r^k + (1 − w) v^k: memory r, with the share w of the variance, behind noise
(v = 0) or behind short memory (v = 0.5); and no memory at all. `MEMORIES` and `SHAPES` list them
with their prior weights: half for no memory, and twice as much for each r from 0.9 on as below.

*Likelihood.* The cosine transform y_j = √(2/n) Σ_t x_t cos(πj(t + ½)/n), j = 1 … n − 1, does not
know of the mean, and is all but uncorrelated, with Var(y_j) = σ² d_j computed exactly. With the
prior 1/σ a model m has the weight π_m ∝ prior_m Π d_j^(−1/2) (Σ_j y_j²/d_j)^(−(n−1)/2), and given
m the mean is off by Student's t with n − 1 degrees of freedom and the scale
s_m² = Σ_j (y_j²/d_j)/(n − 1) · d_0/n.

*Interval.* The level's quantile of the mixture Σ_m π_m t(s_m). The error is √Σ π_m s_m², the
effective size n over Σ π_m d_0. Cosine transforms for the mean of a correlated series are those of
Müller (2014, HAC corrections for strongly autocorrelated time series), who uses the lowest
frequencies alone; runs are too short for that.

Averaged over the prior the intervals hold exactly, whatever rule refuses some of them; for one r
that is measured: `python benchmarks/correlated_steps.py`, ``results/correlated_steps.md``. Memory
of another kind than these models (a drift, r above 0.97) is covered less. Fewer than two effective
samples have no interval: one has no spread.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.fft import dct
from scipy.special import gammaln, ndtri, stdtr, stdtrit
from scipy.stats import rankdata

from fine_bench.theory.arrays import FloatArray

LEAST_EFFECTIVE = 2.0
"""Effective samples below which no interval is given."""

MEMORIES = ((0.2, 1), (0.4, 1), (0.6, 1), (0.75, 1), (0.85, 1), (0.9, 2), (0.94, 2), (0.97, 2))
"""Correlations r of the long part with their relative prior weights."""

SHAPES = ((1.0, 0.0, 0.6), (0.5, 0.0, 0.15), (0.25, 0.0, 0.15), (0.5, 0.5, 0.1))
"""Share w of the long part, correlation v of the rest, prior weight."""

INDEPENDENT = 0.5
"""Prior weight of no memory."""

_STEPS = 8


class SerialError(NamedTuple):
    """What correlated samples say of the error of their mean; arrays without the last axis."""

    error: FloatArray
    """Standard error of the mean."""
    reach: FloatArray
    """Half the interval's length at the asked level."""
    effective: FloatArray
    """Number of independent samples whose mean has that error, from 1 to n."""


def models() -> list[tuple[float, float, float, float]]:
    """Every (w, r, v, prior weight); the weights add up to 1."""
    total = sum(weight for _, weight in MEMORIES) * sum(weight for *_, weight in SHAPES)
    found = [(0.0, 0.0, 0.0, INDEPENDENT)]
    for r, of_memory in MEMORIES:
        for w, v, of_shape in SHAPES:
            found.append((w, r, v, (1.0 - INDEPENDENT) * of_memory * of_shape / total))
    return found


@lru_cache(maxsize=16)
def spectra(n: int) -> FloatArray:
    """d_j of every model, (models, n).

    With θ = πj/n the sums over pairs of samples collapse to
    d_j = 1 + (2/n) Σ_k ρ_k ((n − k) cos kθ − sin kθ/sin θ), without the last term for j = 0.
    """
    lag, frequency = np.arange(n), np.arange(n)
    sine = np.sin(np.pi * frequency / n)
    sine[0] = np.inf
    rows = []
    for w, r, v, _ in models():
        rho = w * r**lag + (1.0 - w) * v**lag
        rho[0] = 0.0  # lag 0 is the 1
        even = np.fft.rfft(rho * (n - lag), 2 * n).real[:n]
        odd = -np.fft.rfft(rho, 2 * n).imag[:n]
        rows.append(1.0 + 2.0 / n * (even - odd / sine))
    return np.asarray(rows, dtype=np.float64)


def _posterior(samples: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Unit of measurement (...), weights and scales (..., models) in that unit, effective (...)."""
    n = samples.shape[-1]
    deviation = samples - samples.mean(-1, keepdims=True)
    # in units of the largest deviation, as squares of vanishing gradients underflow
    unit = np.abs(deviation).max(-1)
    varies = unit > 0.0
    deviation = deviation / np.where(varies, unit, 1.0)[..., None]
    power = np.asarray(dct(deviation, norm="ortho", axis=-1))[..., 1:] ** 2
    d = spectra(n)
    square = np.where(varies[..., None], power @ (1.0 / d[:, 1:]).T, 1.0)
    prior = np.array([weight for *_, weight in models()])
    log = np.log(prior) - 0.5 * np.log(d[:, 1:]).sum(-1) - 0.5 * (n - 1) * np.log(square)
    weight = np.exp(log - log.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    scale = np.sqrt(square / (n - 1) * d[:, 0] / n)
    effective = np.where(varies, n / (weight @ d[:, 0]), n)
    return unit, weight, scale, np.clip(effective, 1.0, n)


def serial_error(samples: FloatArray, level: float) -> SerialError:
    """Standard error and interval of the mean of `samples` (..., n), in the order of the run.

    n is at least 2. All equal samples have the error 0, and count as n.
    """
    freedom = samples.shape[-1] - 1
    unit, weight, scale, effective = _posterior(samples)
    # the quantile of a mixture lies between those of its parts: Newton's steps on its logarithm,
    # and halves of the bracket where they would leave it
    of_parts = np.log(scale * stdtrit(freedom, 0.5 + 0.5 * level))
    low, high = of_parts.min(-1), of_parts.max(-1)
    reach = (weight * of_parts).sum(-1)
    constant = 2.0 * np.exp(gammaln(0.5 * freedom + 0.5) - gammaln(0.5 * freedom))
    constant = constant / np.sqrt(np.pi * freedom)
    for _ in range(_STEPS):
        z = np.exp(reach)[..., None] / scale
        excess = (weight * (2.0 * stdtr(freedom, z) - 1.0)).sum(-1) - level
        density = z * np.exp(-0.5 * (freedom + 1) * np.log1p(z * z / freedom))
        low, high = np.where(excess < 0.0, reach, low), np.where(excess < 0.0, high, reach)
        step = reach - excess / (constant * (weight * density).sum(-1))
        reach = np.where((step > low) & (step < high), step, 0.5 * (low + high))
    error = np.sqrt((weight * scale**2).sum(-1))
    return SerialError(unit * error, unit * np.exp(reach), effective)


def serial_difference(p: FloatArray, q: FloatArray, level: float) -> SerialError:
    """The same of mean P − mean Q.

    Arms of one length come from the same steps: what both share at a step cancels, so the error is
    that of the differences. Arms of different lengths are taken as independent of each other.
    """
    if p.shape[-1] == q.shape[-1]:
        return serial_error(p - q, level)
    one, other = serial_error(p, level), serial_error(q, level)
    return SerialError(
        np.hypot(one.error, other.error),
        np.hypot(one.reach, other.reach),
        np.minimum(one.effective, other.effective),
    )


def effective_samples(samples: FloatArray) -> FloatArray:
    """Effective number of `samples` (..., n) for any share of them below a threshold.

    It is that of the ranks, whose memory is at least as long as that of a comparison with one
    threshold: of a Gaussian series with correlation r the signs have (2/π) arcsin r.
    """
    ranks = np.asarray(rankdata(samples, axis=-1), dtype=np.float64)
    return _posterior(ranks)[3]


def normal_scores(samples: FloatArray) -> FloatArray:
    """Φ⁻¹ of each sample's rank in its own arm over n + 1, scaled to the variance 1."""
    n = samples.shape[-1]
    scores = ndtri(np.asarray(rankdata(samples, axis=-1), dtype=np.float64) / (n + 1.0))
    whole = ndtri(np.arange(1, n + 1) / (n + 1.0)).std(ddof=1)
    return np.asarray(scores / whole, dtype=np.float64)


def too_few(n_p: int, n_q: int) -> str:
    """Why there is no interval of so many P and Q samples."""
    return (
        f"the {n_p} P and {n_q} Q samples go together from step to step: they are worth fewer than "
        f"{LEAST_EFFECTIVE:.0f} independent ones. Train longer, or measure steps that lie further "
        "apart (every_n_steps)"
    )
