"""Linear datamodeling score: do the scores predict what models trained on subsets do?

Park, Georgiev, Ilyas, Leclerc and Madry (2023), *TRAK* (arXiv 2303.14186), after Ilyas et al.
(2022), *Datamodels* (arXiv 2202.00622). For query q and training subset S the scores predict

    f(S) = Σ_{i ∈ S} score[q, i],

which is compared by Spearman's correlation over the subsets with what models trained on S show;
the LDS is its mean over the queries. Scores are positive where an example lowers the query's loss,
so they are compared with the query's *margin*, averaged over several seeds a subset.

The average of k seeds is still noisy. Two disjoint halves of the seeds give its reliability and
the ceiling of the LDS (``metrics.reliability``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fine_bench.metrics._arrays import ArrayLike, Vector, as_array
from fine_bench.metrics.fidelity import FIDELITY, VERSION
from fine_bench.metrics.registry import Metric
from fine_bench.metrics.reliability import ceiling_of, spearman_brown, spearman_rows
from fine_bench.seeds import derive

METRICS = (
    Metric("lds", "LDS", "higher", table=FIDELITY, beside=VERSION, rank=25,
           title="LDS: rank correlation with models trained on subsets"),
    Metric("lds_of_ceiling", "LDS of ceiling", "higher", table=FIDELITY, beside=VERSION, rank=26),
)  # fmt: skip
"""Computed by the ground truth (``retraining.truth``)."""

LEAST_SEEDS = 5
LEAST_SUBSETS = 10


class LDS(NamedTuple):
    """The score, and how it came about.

    Attributes:
        mean: over the queries; NaN when the scores of every query are constant.
        per_query: ``(q,)``; 0 for a query whose scores are constant beside others that are not:
            it predicts nothing.
        n_constant: number of such queries.
    """

    mean: float
    per_query: Vector
    n_constant: int


class Ceiling(NamedTuple):
    """Agreement of the seed means with themselves.

    Attributes:
        half: correlation of two disjoint groups of ``seeds_per_half`` seeds, mean over queries
            and splits.
        full: reliability of the mean over all ``n_seeds`` seeds, by Spearman and Brown.
        ceiling: sqrt(full); NaN where the halves do not agree.
    """

    half: float
    full: float
    ceiling: float
    n_seeds: int
    seeds_per_half: int


@dataclass(frozen=True, eq=False)
class SubsetMargins:
    """Margins of the queries after training on each of several subsets with several seeds.

    Attributes:
        members: ``(subsets, n)`` boolean.
        margin: ``(subsets, seeds, q)``, as many seeds for every subset.
    """

    members: NDArray[np.bool_]
    margin: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.members.ndim != 2 or self.members.dtype != np.bool_:
            raise ValueError(
                f"members must be boolean of shape (subsets, n), got {self.members.dtype} of "
                f"shape {self.members.shape}"
            )
        if self.margin.ndim != 3 or len(self.margin) != len(self.members):
            raise ValueError(
                f"margin must have shape ({len(self.members)}, seeds, q), got {self.margin.shape}"
            )
        if len(self.members) < LEAST_SUBSETS:
            raise ValueError(
                f"the LDS needs at least {LEAST_SUBSETS} subsets, got {len(self.members)}"
            )
        if self.margin.shape[1] < LEAST_SEEDS:
            raise ValueError(
                f"the LDS needs at least {LEAST_SEEDS} seeds a subset, got {self.margin.shape[1]}; "
                f"train {LEAST_SEEDS - self.margin.shape[1]} more on each subset"
            )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean over the seeds, ``(subsets, q)``."""
        return np.asarray(self.margin.mean(axis=1), dtype=np.float64)


def by_subset(
    members: NDArray[Any], subset: NDArray[np.int64], margin: NDArray[Any]
) -> SubsetMargins:
    """A bank's models grouped by their subset, in rising order of its number.

    Where subsets have different numbers of seeds, the first of each are taken.

    Args:
        members: ``(K, n)`` boolean.
        subset: ``(K,)``, models with the same number were trained on the same subset.
        margin: ``(K, q)``, margins of the queries.

    Raises:
        ValueError: wrong shapes, a number that stands for two different subsets, fewer than
            ``LEAST_SEEDS`` seeds of a subset, or fewer than ``LEAST_SUBSETS`` subsets.
    """
    inside, which, x = np.asarray(members), np.asarray(subset), as_array(margin, "margin")
    if inside.ndim != 2 or which.shape != inside.shape[:1] or x.shape[:1] != which.shape:
        raise ValueError(
            f"members (K, n), subset (K,) and margin (K, q) must have one K, got {inside.shape}, "
            f"{which.shape} and {x.shape}"
        )
    numbers, counts = np.unique(which, return_counts=True)
    seeds = int(counts.min())
    if seeds < LEAST_SEEDS:
        raise ValueError(
            f"the LDS needs at least {LEAST_SEEDS} seeds a subset, subset "
            f"{numbers[counts.argmin()]} has {seeds}; train {LEAST_SEEDS - seeds} more on it"
        )
    rows = [np.flatnonzero(which == number) for number in numbers]
    for number, own in zip(numbers, rows, strict=True):
        if (inside[own] != inside[own[0]]).any():
            raise ValueError(f"subset {number} names models with different members")
    return SubsetMargins(
        inside[[own[0] for own in rows]], np.stack([x[own[:seeds]] for own in rows])
    )


def lds(scores: ArrayLike, members: NDArray[Any], margin: NDArray[Any]) -> LDS:
    """Linear datamodeling score.

    Args:
        scores: ``(q, n)``, finite, positive where an example lowers the query's loss.
        members: ``(subsets, n)`` boolean.
        margin: ``(subsets, q)``, seed means of the queries' margins.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    values, truth = as_array(scores, "scores"), as_array(margin, "margin")
    inside = np.asarray(members)
    if values.ndim != 2 or inside.ndim != 2 or values.shape[1] != inside.shape[1]:
        raise ValueError(
            f"scores (q, n) and members (subsets, n) must have one n, got {values.shape} and "
            f"{inside.shape}"
        )
    if truth.shape != (len(inside), len(values)):
        raise ValueError(
            f"margin must have shape (subsets, q) = {(len(inside), len(values))}, got {truth.shape}"
        )
    # tested on the scores: their sums over subsets differ by rounding even where they are constant
    constant = np.ptp(values, axis=1) == 0
    found = spearman_rows(values @ inside.T.astype(np.float64), truth.T)
    found = np.where(constant | ~np.isfinite(found), 0.0, found)
    n_constant = int(constant.sum())
    mean = nan if n_constant == len(values) else float(found.mean())
    return LDS(mean, found, n_constant)


def lds_ceiling(subsets: SubsetMargins, *, n_splits: int = 20, seed: int = 0) -> Ceiling:
    """Ceiling of the LDS, from random splits of each subset's seeds into two halves.

    Of an odd number of seeds one sits out each split, so that both halves have m seeds; the mean
    of all k has the reliability fρ/(1 + (f − 1)ρ) with f = k/m. Every subset draws its own split.

    Args:
        subsets: margins by subset and seed.
        n_splits: random splits, ≥ 1.
        seed: of the splits.
    """
    if n_splits < 1:
        raise ValueError(f"n_splits must be at least 1, got {n_splits}; try 20")
    n_subsets, k, _ = subsets.margin.shape
    m = k // 2
    rng = np.random.default_rng(derive(seed, "metrics/lds splits"))
    rows = np.arange(n_subsets)[:, None]
    found = []
    for _ in range(n_splits):
        order = rng.permuted(np.tile(np.arange(k), (n_subsets, 1)), axis=1)
        a, b = (
            subsets.margin[rows, order[:, part]].mean(axis=1)
            for part in (slice(0, m), slice(m, 2 * m))
        )
        found.append(spearman_rows(a.T, b.T))
    half = float(np.mean(found))
    full = spearman_brown(half, k / m)
    return Ceiling(half, full, ceiling_of(full), k, m)
