"""The error of a mean whose samples are correlated from step to step.

Samples of one run are no independent draws: neighbouring steps share their parameters. The mean of
n of them then varies by

    Var(x̄) = s²/n · (1 + 2 Σ_k ρ_k),   ρ_k the correlation at lag k,

the bracket being the *inflation*, n over it the effective sample size. It is estimated twice, and
the longer interval is taken, since each estimate is blind to something:

- *Autoregression.* ρ_k = r^k, with r from lag one, corrected for its bias, r + (1 + 4r)/n (Marriott
  and Pope 1954; Kendall 1954, for an estimated mean), cut to [0, 0.97]; the inflation is
  (1 + r)/(1 − r), and s², which the correlation makes too small, is divided by 1 − inflation/n.
  The variance of r is (1 − r²)/n, the slope of the inflation's logarithm in it 2/(1 − r²), so that
  the error has 2/(4/(n(1 − r²)) + 2/n) degrees of freedom (Satterthwaite).
- *Batch means* (Conway 1963; Schmeiser 1982). The spread of the means of six consecutive batches,
  with five degrees of freedom: it knows no model and sees memory that fades slowly behind noise.

Of an autoregressive series with r = 0.9 intervals of 95 % covered 91 % with 60 samples, 95 % with
150, 96 % with 300; where independent noise hides a part of it (lag one says 0.45), 82 %, 91 % and
93 %. At r = 0 they are 1.2 times as long as Student's. Below four effective samples nothing is
said.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit
from scipy.stats import rankdata

from fine_bench.theory.arrays import FloatArray

N_BATCHES = 6
"""Batches whose means are compared: few, so that they are long against the memory."""

LEAST_EFFECTIVE = 4.0
"""Effective samples below which no interval is given."""

_LARGEST = 0.97


class SerialError(NamedTuple):
    """What correlated samples say of the error of their mean; arrays without the last axis."""

    error: FloatArray
    """Standard error of the mean, the larger of the two estimates."""
    reach: FloatArray
    """Half the interval's length at the asked level."""
    effective: FloatArray
    """Number of independent samples whose mean has that error, from 1 to n."""


def serial_error(samples: FloatArray, level: float) -> SerialError:
    """Standard error and interval of the mean of `samples` (..., n), in the order of the run.

    With fewer than 12 samples batches have no second member: the autoregression alone counts. All
    equal samples have the error 0, and count as n.
    """
    n = samples.shape[-1]
    deviation = samples - samples.mean(-1, keepdims=True)
    # in units of the largest deviation, as squares of vanishing gradients underflow
    unit = np.abs(deviation).max(-1)
    varies = unit > 0.0
    deviation = deviation / np.where(varies, unit, 1.0)[..., None]
    square = (deviation**2).sum(-1)
    spread = square / (n - 1)
    r = (deviation[..., 1:] * deviation[..., :-1]).sum(-1) / np.where(varies, square, 1.0)
    r = np.clip(r + (1.0 + 4.0 * r) / n, 0.0, _LARGEST)
    inflation = (1.0 + r) / (1.0 - r)
    inflation = inflation / np.maximum(1.0 - inflation / n, 0.1)
    freedom = 2.0 / (4.0 / (n * (1.0 - r**2)) + 2.0 / n)
    quantile = 0.5 + 0.5 * level
    error = np.sqrt(spread * inflation / n)
    reach = stdtrit(np.maximum(freedom, 2.0), quantile) * error
    length = n // N_BATCHES
    if length > 1:
        batches = deviation[..., : length * N_BATCHES].reshape(*r.shape, N_BATCHES, length)
        of_means = batches.mean(-1).std(-1, ddof=1) / np.sqrt(N_BATCHES)
        error = np.maximum(error, of_means)
        reach = np.maximum(reach, stdtrit(N_BATCHES - 1, quantile) * of_means)
    effective = np.where(varies, spread / np.where(varies, error, 1.0) ** 2, n)
    return SerialError(unit * error, unit * reach, np.clip(effective, 1.0, n))


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
    return serial_error(ranks, 0.95).effective
