"""From samples to influence: estimates of μ with their intervals.

P samples are statistics of batches that include the data S, Q samples of batches that exclude it;
x is larger when S lowers the query's loss. The test rejects "saw S" when x < τ, and

    μ = Φ⁻¹(1 − α) − Φ⁻¹(β),   α = P(x < τ),  β = Q(x ≥ τ),

is positive when P lies above Q. Under a Gaussian shift every τ has the same μ.

Two questions are kept apart. *Is this effect larger than the run's noise?* is answered here and in
`fine_bench.theory.p_values`, subset by subset; *is this example unlike trusted data?* by
`fine_bench.theory.false_discovery`. An interval takes the samples of an arm as independent and
identically distributed, unless `correlated=True`: then they are those of one run, in its order, and
the correlation from step to step is measured and makes the interval longer
(`fine_bench.theory.serial`), or there is none. μ̂ itself is the same. Subtract an auxiliary run, or
test pairs (`permutation_p_value` with `paired=True`), when the signal drifts along the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit
from scipy.stats import rankdata

from fine_bench.theory.arrays import ArrayLike, FloatArray, check_arms, check_level
from fine_bench.theory.error_rates import (
    clopper_pearson,
    error_curve,
    rate_error,
    shrunk,
    signed_mu,
)
from fine_bench.theory.serial import (
    LEAST_EFFECTIVE,
    effective_samples,
    normal_scores,
    serial_difference,
    too_few,
)

Method = Literal["two_stage", "max", "moment", "rank"]

_LEAST_SAMPLES: dict[str, int] = {"two_stage": 4, "max": 2, "moment": 2, "rank": 2}


@dataclass(frozen=True, eq=False)
class InfluenceEstimate:
    """Signed μ of one subset (arrays of shape ()) or of many (leading axes of the samples).

    `mu` is ±inf when the samples do not overlap and NaN when they cannot tell, never a stand-in 0.
    Where an end of the interval is infinite, `reason` says why; elsewhere it is "".
    """

    mu: FloatArray
    std_error: FloatArray
    lower: FloatArray
    upper: FloatArray
    level: float
    n_p: int
    n_q: int
    method: Method
    reason: npt.NDArray[np.str_]

    def __post_init__(self) -> None:
        shapes = {
            f.name: np.shape(getattr(self, f.name))
            for f in fields(self)
            if f.name in ("mu", "std_error", "lower", "upper", "reason")
        }
        if len(set(shapes.values())) != 1:
            raise ValueError(f"an estimate needs fields of one shape, got {shapes}")
        if np.isnan(self.lower).any() or (self.lower > self.upper).any():
            raise ValueError("an interval needs lower <= upper; say 'unknown' with infinite ends")
        unexplained = (np.isinf(self.lower) | np.isinf(self.upper)) & (self.reason == "")
        if unexplained.any():
            raise ValueError("an infinite interval needs a reason")


def estimate_mu(
    p: ArrayLike,
    q: ArrayLike,
    method: Method = "two_stage",
    level: float = 0.95,
    *,
    block: int = 1,
    clip: float = 0.01,
    correlated: bool = False,
) -> InfluenceEstimate:
    """Signed μ from `p` (..., n_p) and `q` (..., n_q), samples in the order of the run.

    `method`: "two_stage" (default), "max" (the published rule), "moment" or "rank": see
    the functions of these names. `level`: nominal coverage of the interval, in (0, 1).
    `block`: length of the alternating stages of "two_stage" (≥ 1). `clip`: where "max" cuts error
    rates, in [0, 0.5). `correlated`: whether samples of neighbouring steps go together, as those of
    one run do; arms of one length are then of the same steps.
    """
    estimators: dict[str, Callable[[], InfluenceEstimate]] = {
        "two_stage": lambda: two_stage_mu(p, q, level, block, correlated=correlated),
        "max": lambda: max_mu(p, q, level, clip, correlated=correlated),
        "moment": lambda: moment_mu(p, q, level, correlated=correlated),
        "rank": lambda: rank_mu(p, q, level, correlated=correlated),
    }
    if method not in estimators:
        raise ValueError(f"method must be one of {sorted(estimators)}, got {method!r}")
    return estimators[method]()


def two_stage_mu(
    p: ArrayLike,
    q: ArrayLike,
    level: float = 0.95,
    block: int = 1,
    *,
    correlated: bool = False,
) -> InfluenceEstimate:
    """One half of the samples chooses the rejection threshold, the other measures its errors.

    Stages of `block` consecutive samples alternate between the halves over the whole run, so both
    see every phase of training; a longer block separates the halves of an autocorrelated signal.
    The first half takes the τ with the largest |μ̂|/SE (not the largest |μ̂|, which sits in the
    tails, where nothing can be measured). The second half counts α̂ and β̂ at that τ, which owe
    nothing to the choice: Clopper–Pearson intervals of both, each at level^(1/2) as the arms are
    independent, give the interval, which holds at least at `level` for μ at that τ. The estimate
    itself uses (k + ½)/(n + 1), finite for every count. `correlated`: counts and trials are cut to
    the effective number of samples; as neighbours sit in different halves, the halves then owe
    something to each other, for which the box of both errors, longer than it need be, makes up.
    """
    xp, xq = _arms(p, q, level, "two_stage")
    if block < 1 or 2 * block > min(xp.shape[-1], xq.shape[-1]):
        raise ValueError(
            f"block must lie between 1 and half of the smaller sample "
            f"({min(xp.shape[-1], xq.shape[-1]) // 2}), got {block!r}; both halves need samples"
        )
    choose_p, measure_p = _halves(xp, block)
    choose_q, measure_q = _halves(xq, block)
    thresholds, alpha, beta = error_curve(choose_p, choose_q)
    informative = _informative(alpha, beta)
    silent = np.asarray(~informative.any(axis=-1), dtype=np.bool_)
    alpha = shrunk(alpha, choose_p.shape[-1])
    beta = shrunk(beta, choose_q.shape[-1])
    strength = np.abs(signed_mu(alpha, beta)) / rate_error(
        alpha, beta, choose_p.shape[-1], choose_q.shape[-1]
    )
    best = np.argmax(np.where(informative, strength, -1.0), axis=-1)[..., None]
    threshold = np.take_along_axis(thresholds, best, axis=-1)

    n_p, n_q = measure_p.shape[-1], measure_q.shape[-1]
    hits_p = np.count_nonzero(measure_p < threshold, axis=-1).astype(np.float64)
    hits_q = np.count_nonzero(measure_q >= threshold, axis=-1).astype(np.float64)
    # A test that rejected none, or all, of both halves has said nothing about μ: NaN, not 0.
    told = np.where(np.isnan(signed_mu(hits_p / n_p, hits_q / n_q)), np.nan, 1.0)
    alpha, beta = shrunk(hits_p / n_p, n_p), shrunk(hits_q / n_q, n_q)
    one_sided = (hits_p % n_p == 0) | (hits_q % n_q == 0)
    each = float(np.sqrt(level))
    worth_p, worth_q = _worth(measure_p, correlated), _worth(measure_q, correlated)
    alpha_low, alpha_high = clopper_pearson(_cut(hits_p, n_p, worth_p), worth_p, each)
    beta_low, beta_high = clopper_pearson(_cut(hits_q, n_q, worth_q), worth_q, each)
    few = _few(np.minimum(worth_p, worth_q), correlated)
    # The ends are one-sided, so (0, 1) and (1, 0) cannot meet here: k = 0 and k = n give one each.
    lower = np.where(few, -np.inf, -ndtri(alpha_high) - ndtri(beta_high))
    upper = np.where(few, np.inf, -ndtri(alpha_low) - ndtri(beta_low))
    # a fraction of a hit may leave an end open where no whole one does
    few |= (np.isinf(lower) | np.isinf(upper)) & ~one_sided
    return _estimate(
        xp,
        xq,
        "two_stage",
        level,
        told * signed_mu(alpha, beta),
        np.where(one_sided, np.inf, rate_error(alpha, beta, worth_p, worth_q)),
        lower,
        upper,
        [
            (silent, "all choosing samples are equal: no threshold separates"),
            (few, too_few(n_p, n_q)),
            (
                one_sided,
                f"no error, or only errors, among the measuring samples ({n_p} P, {n_q} Q): "
                "more samples are needed",
            ),
        ],
    )


def max_mu(
    p: ArrayLike,
    q: ArrayLike,
    level: float = 0.95,
    clip: float = 0.01,
    *,
    correlated: bool = False,
) -> InfluenceEstimate:
    """The published rule: sweep all thresholds and keep the signed μ of largest |μ|.

    Panda et al., arXiv 2510.10510. The paper's grid is not known to us; we sweep every sample,
    leave out thresholds that reject nothing or everything, and clip α̂ and β̂ to
    [c, 1 − c], c = max(`clip`, ½/n). So |μ̂| ≤ 2Φ⁻¹(1 − c), 4.65 by default; clipping at ½/n alone
    lets the noise of the farthest tail decide, and the bias then hardly falls with n.

    The maximum over thresholds is biased away from 0, at a true 0 most of all, and `std_error` is
    that of a threshold fixed in advance: neither knows of the search. The interval does: bands of
    Dvoretzky, Kiefer and Wolfowitz (constant of Massart) hold at all thresholds at once, and their
    values of μ are intersected, which is right if one μ describes all thresholds, as G_μ supposes.
    It need not contain the biased estimate. An empty intersection means that no G_μ fits.
    `correlated`: the bands are those of the effective number of samples.
    """
    xp, xq = _arms(p, q, level, "max")
    if not 0.0 <= clip < 0.5:
        raise ValueError(f"clip must lie in [0, 0.5), got {clip!r}; it is an error rate, try 0.01")
    n_p, n_q = xp.shape[-1], xq.shape[-1]
    _, alpha, beta = error_curve(xp, xq)
    informative = _informative(alpha, beta)
    silent = np.asarray(~informative.any(axis=-1), dtype=np.bool_)
    cut_p, cut_q = max(clip, 0.5 / n_p), max(clip, 0.5 / n_q)
    clipped_alpha = np.clip(alpha, cut_p, 1.0 - cut_p)
    clipped_beta = np.clip(beta, cut_q, 1.0 - cut_q)
    mu = signed_mu(clipped_alpha, clipped_beta)
    best = np.argmax(np.where(informative, np.abs(mu), -1.0), axis=-1)[..., None]

    miss = 0.5 * (1.0 - np.sqrt(level))  # two independent bands, hence the root
    worth_p, worth_q = _worth(xp, correlated), _worth(xq, correlated)
    few = _few(np.minimum(worth_p, worth_q), correlated)
    band_p, band_q = (np.sqrt(-np.log(miss) / (2.0 * w))[..., None] for w in (worth_p, worth_q))
    low = -ndtri(np.minimum(alpha + band_p, 1.0)) - ndtri(np.minimum(beta + band_q, 1.0))
    high = -ndtri(np.maximum(alpha - band_p, 0.0)) - ndtri(np.maximum(beta - band_q, 0.0))
    lower, upper = low.max(axis=-1), high.min(axis=-1)
    lower, upper = np.where(few, -np.inf, lower), np.where(few, np.inf, upper)
    error = rate_error(clipped_alpha, clipped_beta, worth_p[..., None], worth_q[..., None])
    return _estimate(
        xp,
        xq,
        "max",
        level,
        np.take_along_axis(mu, best, axis=-1)[..., 0],
        np.take_along_axis(error, best, axis=-1)[..., 0],
        lower,
        upper,
        [
            (silent, "all samples are equal: no threshold separates"),
            (few, too_few(n_p, n_q)),
            (lower > upper, "no single mu fits all thresholds: the shift is not Gaussian"),
            (
                np.isinf(lower) | np.isinf(upper),
                f"too few samples ({n_p} P, {n_q} Q) to bound the errors at any threshold",
            ),
        ],
    )


def moment_mu(
    p: ArrayLike, q: ArrayLike, level: float = 0.95, *, correlated: bool = False
) -> InfluenceEstimate:
    """μ̂ = (mean P − mean Q)/s, s² the pooled variance (n − 1 in each arm).

    Efficient when P and Q are Gaussian of equal spread, and the standardised mean difference
    whatever they are. The standard error is that of its influence function, so that skewness,
    heavy tails and unequal variances are in it; the interval is Student's with n_p + n_q − 2.
    `correlated`: error and interval are those of the mean of the influence function along the run.
    """
    xp, xq = _arms(p, q, level, "moment")
    n_p, n_q = xp.shape[-1], xq.shape[-1]
    freedom = n_p + n_q - 2
    share_p, share_q = (n_p - 1) / freedom, (n_q - 1) / freedom
    dev_p, dev_q = xp - xp.mean(-1, keepdims=True), xq - xq.mean(-1, keepdims=True)
    # Rounding leaves a constant sample a spread of its last digit, so compare the values instead.
    constant_p, constant_q = np.ptp(xp, axis=-1) == 0.0, np.ptp(xq, axis=-1) == 0.0
    known = ~(constant_p & constant_q)
    # In units of the largest deviation, as squares of vanishing gradients underflow.
    unit = np.maximum(np.abs(dev_p).max(-1), np.abs(dev_q).max(-1))
    unit = np.where(known, unit, 1.0)
    dev_p, dev_q = dev_p / unit[..., None], dev_q / unit[..., None]
    variance = share_p * dev_p.var(-1, ddof=1) + share_q * dev_q.var(-1, ddof=1)
    sigma = np.sqrt(np.where(known, variance, 1.0))
    shift = np.where(known, (xp.mean(-1) - xq.mean(-1)) / unit, xp[..., 0] - xq[..., 0])
    with np.errstate(invalid="ignore"):
        mu = np.where(known, shift / sigma, shift * np.inf)  # 0·inf: nothing is known at all
    z_p, z_q = dev_p / sigma[..., None], dev_q / sigma[..., None]
    pull = np.where(known, 0.5 * mu, 0.0)[..., None]
    pull_p, pull_q = z_p - share_p * pull * z_p**2, z_q + share_q * pull * z_q**2
    few = np.zeros(mu.shape, dtype=np.bool_)
    if correlated:
        error, reach, worth = serial_difference(pull_p, pull_q, level)
        few = _few(worth, correlated)
        reach = np.where(few, np.inf, reach)
    else:
        error = np.sqrt(pull_p.var(-1, ddof=1) / n_p + pull_q.var(-1, ddof=1) / n_q)
        reach = stdtrit(freedom, 0.5 + 0.5 * level) * error
    error = np.where(constant_p | constant_q, np.inf, error)
    return _estimate(
        xp,
        xq,
        "moment",
        level,
        mu,
        error,
        mu - reach,
        mu + reach,
        [
            (~known, "both samples are constant: there is no noise to measure the shift by"),
            (few, too_few(n_p, n_q)),
            (constant_p, "the P samples are constant: their noise cannot be measured"),
            (constant_q, "the Q samples are constant: their noise cannot be measured"),
        ],
    )


def rank_mu(
    p: ArrayLike, q: ArrayLike, level: float = 0.95, *, correlated: bool = False
) -> InfluenceEstimate:
    """μ̂ = √2 Φ⁻¹(AUC), AUC = P(x_P > x_Q) + ½ P(tie): unchanged by any monotone transform.

    Standard error of DeLong, DeLong and Clarke-Pearson (1988) carried through Φ⁻¹; the interval
    is normal on the scale of μ. Without any overlap (AUC 0 or 1) μ̂ is ±inf and the finite end
    comes from min(n_p, n_q) disjoint, hence independent, pairs that all agree. `correlated`: the
    places among the other arm are the influence function whose mean along the run is taken, and of
    the pairs only as many as effective samples count. Where few effective samples hardly overlap by
    chance, their places are squeezed against an end and look surer than they are: error and reach
    are at least those of the difference of means of Gaussian arms, from each arm's normal scores.
    """
    xp, xq = _arms(p, q, level, "rank")
    n_p, n_q = xp.shape[-1], xq.shape[-1]
    pooled = rankdata(np.concatenate([xp, xq], axis=-1), axis=-1)
    # A sample's place among the other arm: the share below it, ties counting one half.
    place_p = (pooled[..., :n_p] - rankdata(xp, axis=-1)) / n_q
    place_q = (pooled[..., n_p:] - rankdata(xq, axis=-1)) / n_p
    auc = place_p.mean(-1)
    pairs: FloatArray = np.full(auc.shape, min(n_p, n_q), dtype=np.float64)
    few = np.zeros(auc.shape, dtype=np.bool_)
    if correlated:
        error, reach, worth = serial_difference(place_p, place_q, level)
        scores = serial_difference(normal_scores(xp), normal_scores(xq), level)
        pairs = np.minimum(_worth(xp, correlated), _worth(xq, correlated))
        few = _few(np.where(auc * (1.0 - auc) > 0.0, worth, pairs), correlated)
    else:
        error = np.sqrt(place_p.var(-1, ddof=1) / n_p + place_q.var(-1, ddof=1) / n_q)
        reach = ndtri(0.5 + 0.5 * level) * error
    quantile = ndtri(auc)
    mu = np.sqrt(2.0) * quantile
    apart = np.isinf(mu)
    constant = (np.ptp(xp, axis=-1) == 0.0) & (np.ptp(xq, axis=-1) == 0.0) & ~apart
    mu = np.where(constant, np.nan, mu)
    density = np.exp(-0.5 * np.where(apart, 0.0, quantile) ** 2) / np.sqrt(2.0 * np.pi)
    error, reach = np.sqrt(2.0) * error / density, np.sqrt(2.0) * reach / density
    if correlated:
        error, reach = np.maximum(error, scores.error), np.maximum(reach, scores.reach)
    error = np.where(apart, np.inf, error)
    reach = np.where(few, np.inf, np.where(apart, 0.0, reach))
    agree = np.sqrt(2.0) * ndtri((0.5 - 0.5 * level) ** (1.0 / pairs))
    near = np.where(apart, 0.0, mu)
    lower = np.where(apart, np.where(mu > 0.0, agree, -np.inf), near - reach)
    upper = np.where(apart, np.where(mu < 0.0, -agree, np.inf), near + reach)
    return _estimate(
        xp,
        xq,
        "rank",
        level,
        mu,
        error,
        np.where(few, -np.inf, lower),
        np.where(few, np.inf, upper),
        [
            (constant, "all samples are equal: their order says nothing"),
            (few, too_few(n_p, n_q)),
            (apart, f"P and Q do not overlap in {n_p} and {n_q} samples: |mu| has no upper end"),
        ],
    )


def _arms(p: ArrayLike, q: ArrayLike, level: float, method: str) -> tuple[FloatArray, FloatArray]:
    """Both samples, checked: finite, long enough for the method, same leading axes."""
    check_level(level)
    return check_arms(p, q, _LEAST_SAMPLES[method])


def _worth(samples: FloatArray, correlated: bool) -> FloatArray:
    """How many independent samples an arm is worth, without the last axis."""
    if correlated:
        return effective_samples(samples)
    return np.full(samples.shape[:-1], samples.shape[-1], dtype=np.float64)


def _few(worth: FloatArray, correlated: bool) -> npt.NDArray[np.bool_]:
    """Where correlation leaves too little for an interval."""
    return np.asarray((worth < LEAST_EFFECTIVE) & correlated, dtype=np.bool_)


def _cut(hits: FloatArray, trials: int, worth: FloatArray) -> FloatArray:
    """Hits among `worth` of the trials, exactly none or all of them where that was so."""
    return np.where(hits == trials, worth, hits * (worth / trials))


def _halves(samples: FloatArray, block: int) -> tuple[FloatArray, FloatArray]:
    """Alternating stages of `block` consecutive samples."""
    second = np.arange(samples.shape[-1]) // block % 2 == 1
    return samples[..., ~second], samples[..., second]


def _informative(alpha: FloatArray, beta: FloatArray) -> npt.NDArray[np.bool_]:
    """Thresholds that reject something, but not everything."""
    trivial = ((alpha == 0.0) & (beta == 1.0)) | ((alpha == 1.0) & (beta == 0.0))
    return np.asarray(~trivial, dtype=np.bool_)


def _estimate(
    xp: FloatArray,
    xq: FloatArray,
    method: Method,
    level: float,
    mu: ArrayLike,
    std_error: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    failures: list[tuple[npt.NDArray[np.bool_], str]],
) -> InfluenceEstimate:
    """Put the result together; where a failure applies, open the interval and give the reason.

    Of several failures the first is named, and the first of the list means that nothing is known:
    μ is then NaN, unless infinite. A failure that leaves one finite end (no overlap, no error
    counted) keeps that end.
    """
    shape = xp.shape[:-1]
    mu, std_error, lower, upper = (
        np.array(np.broadcast_to(np.asarray(v, dtype=np.float64), shape))
        for v in (mu, std_error, lower, upper)
    )
    texts = np.array(["", *(text for _, text in failures)])
    which = np.zeros(shape, dtype=np.intp)
    for number, (mask, _) in reversed(list(enumerate(failures, start=1))):
        which = np.where(mask, number, which)
    unknown = which == 1
    open_ends = (which > 0) & ~(np.isinf(lower) ^ np.isinf(upper)) | np.isnan(lower)
    mu = np.where(unknown & np.isfinite(mu), np.nan, mu)
    std_error = np.where(unknown, np.inf, std_error)
    return InfluenceEstimate(
        mu=mu,
        std_error=std_error,
        lower=np.where(open_ends, -np.inf, lower),
        upper=np.where(open_ends, np.inf, upper),
        level=level,
        n_p=xp.shape[-1],
        n_q=xq.shape[-1],
        method=method,
        reason=texts[which],
    )
