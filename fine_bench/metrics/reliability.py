"""How far can a perfect method agree with a truth that is itself measured? The noise ceiling.

If the true μ were known, a method would be judged by its correlation with it. What is known is an
estimate from K models, true μ plus noise. Two halves of the models give two estimates with
independent noise; their correlation ρ_h is the *reliability* of an estimate from K/2 models, that
is the square of its correlation with the true μ. Spearman (1910) and Brown (1910): an estimate
from f times as many models has the reliability

    fρ / (1 + (f − 1)ρ),

which for f = 2 is 2ρ/(1 + ρ), and the ceiling is its square root. The formulas are exact for
Pearson's correlation; for Spearman's they are a close approximation (the tests allow 0.015).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from fine_bench.metrics._arrays import Vector
from fine_bench.metrics.retraining import Mask, checked, moment_mu, require_models
from fine_bench.seeds import derive

LEAST_FOR_CORRELATION = 10
"""Fewest examples for which a correlation with the truth is computed."""


@dataclass(frozen=True)
class Reliability:
    """Agreement of a truth with itself.

    Attributes:
        half: ρ_h, mean Spearman correlation of two halves' estimates.
        full: reliability of the estimate from all models.
        ceiling: sqrt(full), the highest Spearman correlation that a method can be expected to
            have with the estimate; NaN where the halves do not agree (ρ_h ≤ 0).
        n_models: number of models.
        n_splits: splits that ρ_h is the mean of.
    """

    half: float
    full: float
    ceiling: float
    n_models: int
    n_splits: int

    def models_for(self, ceiling: float = 0.95) -> float:
        """Models needed for a ceiling, by the same formula; infinite where ρ_h ≤ 0.

        With reliability r at K models and r* = ceiling² wanted: K r*(1 − r) / (r (1 − r*)).
        """
        if not 0.0 < ceiling < 1.0:
            raise ValueError(f"ceiling must lie strictly between 0 and 1, got {ceiling!r}")
        if not self.full > 0.0:
            return float("inf")
        wanted = ceiling**2
        share = wanted * (1.0 - self.full) / (self.full * (1.0 - wanted))
        return float(ceil(self.n_models * share))


def spearman_brown(correlation: float, factor: float = 2.0) -> float:
    """Reliability at ``factor`` times the measurements: fρ / (1 + (f − 1)ρ)."""
    if not factor > 0.0:
        raise ValueError(f"factor must be > 0, got {factor!r}")
    below = 1.0 + (factor - 1.0) * correlation
    return factor * correlation / below if below > 0.0 else nan


def ceiling_of(reliability: float) -> float:
    """sqrt(reliability); NaN where there is none (0 and below)."""
    return sqrt(min(reliability, 1.0)) if isfinite(reliability) and reliability > 0.0 else nan


def spearman_rows(a: NDArray[Any], b: NDArray[Any]) -> Vector:
    """Spearman's correlation of each row of ``a`` with that row of ``b``, both ``(r, m)``.

    Pearson's correlation of mid-ranks; NaN for a row in which one of the two is constant.
    """
    first, second = (rankdata(x, axis=1) for x in (a, b))
    # ranks have one mean; multiples of 1/2, so that a constant row has a deviation of exactly 0
    middle = 0.5 * (first.shape[1] + 1)
    first, second = first - middle, second - middle
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(scale > 0, (first * second).sum(axis=1) / scale, np.nan))


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's correlation of two vectors; NaN where one of them is constant."""
    return float(spearman_rows(np.asarray(a)[None], np.asarray(b)[None])[0])


def blocks_of(members: Mask) -> NDArray[np.int64]:
    """Models that must stay in one half, by a number each, ``(K,)``.

    A subset and its complement hold every example once between them: some designs draw such
    pairs. Their models stay together, as do models of one subset, so that the halves have
    independent noise.
    """
    numbers: dict[bytes, int] = {}
    packed, opposite = np.packbits(members, axis=1), np.packbits(~members, axis=1)
    blocks = np.empty(len(members), dtype=np.int64)
    for k in range(len(members)):
        own = packed[k].tobytes()
        number = numbers.get(own, len(numbers))
        numbers.setdefault(own, number)
        numbers.setdefault(opposite[k].tobytes(), number)
        blocks[k] = number
    return np.unique(blocks, return_inverse=True)[1].astype(np.int64)


def random_halves(
    blocks: NDArray[np.int64], n_splits: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """``(n_splits, K)``: True for the first half of each split; whole blocks, half of them each.

    Of an odd number of blocks the second half has one more.
    """
    n_blocks = int(blocks.max()) + 1
    first = np.zeros((n_splits, n_blocks), dtype=np.bool_)
    first[:, : n_blocks // 2] = True
    return np.asarray(rng.permuted(first, axis=1)[:, blocks])


def split_half(
    members: NDArray[Any],
    statistic: NDArray[Any],
    *,
    examples: NDArray[np.bool_] | None = None,
    n_splits: int = 50,
    seed: int = 0,
) -> Reliability:
    """Reliability and ceiling of the "moment" μ of all models.

    Random halves of the models, μ on each half, Spearman's correlation between them over the
    examples, averaged over the splits. An example with fewer than two models on a side of a half
    is left out of that split.

    Args:
        members, statistic: ``(K, n)``, as in ``retraining.retraining_mu``.
        examples: ``(n,)``, over which examples to correlate; all of them by default.
        n_splits: random splits, ≥ 1.
        seed: of the splits.

    Raises:
        ValueError: too few models (with the number needed) or examples, or wrong shapes.
    """
    inside, x = checked(members, statistic)
    require_models(inside)
    if n_splits < 1:
        raise ValueError(f"n_splits must be at least 1, got {n_splits}; try 50")
    if examples is not None:
        if examples.shape != inside.shape[1:] or examples.dtype != np.bool_:
            raise ValueError(
                f"examples must be boolean of shape {inside.shape[1:]}, got {examples.dtype} of "
                f"shape {examples.shape}"
            )
        inside, x = inside[:, examples], x[:, examples]
    if inside.shape[1] < LEAST_FOR_CORRELATION:
        raise ValueError(
            f"a ceiling over {inside.shape[1]} examples says nothing; at least "
            f"{LEAST_FOR_CORRELATION} are needed"
        )
    rng = np.random.default_rng(derive(seed, "metrics/split halves"))
    first = random_halves(blocks_of(np.asarray(members)), n_splits, rng)
    pair = (first, ~first)
    enough = np.ones((n_splits, inside.shape[1]), dtype=np.bool_)
    for half in pair:
        for side in (inside, ~inside):
            enough &= half.astype(np.float64) @ side >= 2
    a, b = (moment_mu(inside, x, half) for half in pair)
    enough &= np.isfinite(a) & np.isfinite(b)
    found = [spearman(a[r, enough[r]], b[r, enough[r]]) for r in range(n_splits)]
    half_rho = float(np.mean(found))
    full = spearman_brown(half_rho)
    return Reliability(half_rho, full, ceiling_of(full), len(inside), n_splits)
