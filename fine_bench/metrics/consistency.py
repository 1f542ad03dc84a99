"""Consistency: would another run of the same task tell the same story?

Compared are the scores of runs on one task (same data, same corruption, same queries) that differ
in their run seed. A score that does not depend on the example agrees with itself perfectly and
says nothing, so wherever it appears the result is NaN: undefined, not perfect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fine_bench.metrics._arrays import ArrayLike, End, Vector, as_array, as_vector, oriented
from fine_bench.metrics.kendall import kendall_taus
from fine_bench.metrics.registry import BETWEEN_RUNS, Metric
from fine_bench.metrics.top import TOP

KEYS = ("spearman", "kendall", "jaccard", "jaccard_corrected")

METRICS = (
    Metric("spearman", "Spearman", "higher", source="consistency", table=BETWEEN_RUNS, rank=50,
           title="Spearman correlation between runs"),
    Metric("kendall", "Kendall", "higher", source="consistency", table=BETWEEN_RUNS, rank=51),
    Metric("jaccard", "Jaccard@k", "higher", source="consistency", table=BETWEEN_RUNS, rank=52),
    Metric("jaccard_corrected", "corrected", "higher", source="consistency", table=BETWEEN_RUNS,
           title="Jaccard@k between runs, corrected for chance", rank=53),
    # every row has it; it is shown where the top of the list is looked at
    Metric("cv_median", "variation", "lower", source="consistency", table=TOP,
           beside="recall_top_20", rank=34,
           note="Variation: median over the examples of the coefficient of variation of their "
           "scores over the seeds."),
)  # fmt: skip
"""Computed between the runs of a row, by the leaderboard."""


@lru_cache(maxsize=64)
def expected_jaccard(n: int, k: int) -> float:
    """Expected Jaccard index of two independent, uniformly random k-subsets of n examples.

    The overlap I is hypergeometric, and E J = Σ_i P(I = i) · i / (2k − i), exactly. It is not
    negligible: about p / (2 − p) at k = p·n, 0.11 at 20 %.

    Args:
        n: number of examples.
        k: size of the subsets, 1 ≤ k ≤ n.
    """
    _check_k(k, n)
    overlap = np.arange(max(0, 2 * k - n), k + 1)
    # P(I = i + 1) / P(I = i) in logarithms: normalising the products is as exact as calling the
    # density (scipy's takes a second at n = 60,000) and a thousand times faster
    i = overlap[:-1]
    log_ratio = 2 * np.log(k - i) - np.log(i + 1) - np.log(n - 2 * k + i + 1)
    log_mass = np.concatenate([[0.0], np.cumsum(log_ratio)])
    mass = np.exp(log_mass - log_mass.max())
    return float(mass @ (overlap / (2 * k - overlap)) / mass.sum())


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of examples, {n}; got {k}")


def inclusion(scores: Vector, k: int) -> Vector:
    """Probability of each example to be among the k highest when ties are broken at random.

    Args:
        scores: ``(n,)``, high for suspicious.
        k: from 1 to n.
    """
    _check_k(k, len(scores))
    cut = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, tied = scores > cut, scores == cut
    return np.asarray(above + tied * ((k - above.sum()) / tied.sum()), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Run:
    """One run's scores with what every comparison asks of them; see ``ranked``.

    Attributes:
        values: ``(n_train,)``, high for suspicious.
        ranks: their ranks, ties with the mean of theirs.
        inclusion: probability of each example to be among the k highest.
        k: size of the suspicious set.
    """

    values: Vector
    ranks: Vector
    inclusion: Vector
    k: int


def ranked(scores: ArrayLike, k: int, end: End) -> Run:
    """Scores made ready to be compared with those of other runs.

    Args:
        scores: ``(n_train,)``, finite; one row.
        k: size of the suspicious set, 1 … n_train; the true number of bad examples as a rule.
        end: the suspicious end of the scores.

    Raises:
        ValueError: k out of range, values that are not finite.
    """
    values = as_vector(scores, "scores")
    _check_k(k, len(values))
    values = oriented(values, end)
    return Run(values, stats.rankdata(values), inclusion(values, k), k)


def agreement_of_runs(a: Run, b: Run) -> dict[str, float]:
    """Agreement of two runs' scores of the same training examples.

    - ``spearman``, ``kendall`` (tau-b): rank correlation over all examples.
    - ``jaccard``: |A ∩ B| / |A ∪ B| for the k examples at the suspicious end of each.
    - ``jaccard_corrected``: (J − E J) / (1 − E J), E J that of two random k-subsets; 0 is chance,
      1 is perfect.

    Ties at the cut: the two runs are thought to break theirs at random and independently of each
    other, and J is taken at the expected overlap, Σ_i P(i ∈ A) P(i ∈ B) / (2k − the same). Any
    order that both runs share (the index, say) would turn every tie into agreement: scores that
    are zero nearly everywhere would look consistent. This rule depends neither on the storage
    order nor on a random draw. It lies slightly below the expected J, which is convex in the
    overlap, and is J itself when nothing is tied at the cut.

    Returns:
        One value for each of ``KEYS``: all NaN when ``a`` or ``b`` is constant; the corrected
        Jaccard is NaN at k = n_train too, where chance is perfect.

    Raises:
        ValueError: different lengths, or different k.
    """
    (found,) = agreements([a, b], [(0, 1)])
    return found


def agreements(runs: Sequence[Run], pairs: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """``agreement_of_runs`` of many pairs, which does not depend on what else is compared.

    Args:
        runs: of one task.
        pairs: which two are compared, by their positions in ``runs``.

    Raises:
        ValueError: different lengths, or different k.
    """
    if not pairs:
        return []
    n, k = len(runs[0].values), runs[0].k
    for run in runs:
        if len(run.values) != n or run.k != k:
            raise ValueError(
                f"a has {n} examples and k = {k}, b {len(run.values)} and {run.k}; consistency "
                "compares runs of one task"
            )
    constant = [bool(np.ptp(run.values) == 0) for run in runs]
    compared = [pair for pair in pairs if not (constant[pair[0]] or constant[pair[1]])]
    spearman = _rank_correlations([run.ranks for run in runs], compared)
    kendall = kendall_taus([run.values for run in runs], compared)
    chance = expected_jaccard(n, k)
    result = [dict.fromkeys(KEYS, float("nan")) for _ in pairs]
    at = (
        found
        for found, (a, b) in zip(result, pairs, strict=True)
        if not (constant[a] or constant[b])
    )
    for found, (a, b), rho, tau in zip(at, compared, spearman, kendall, strict=True):
        overlap = float(runs[a].inclusion @ runs[b].inclusion)
        jaccard = overlap / (2 * k - overlap)
        corrected = (jaccard - chance) / (1 - chance) if k < n else float("nan")
        found |= dict(zip(KEYS, (rho, tau, jaccard, corrected), strict=True))
    return result


_EXACT_RANKS = 200_000
"""So many ranks have products that are whole quarters below 2^53: their sums are exact."""


def _rank_correlations(ranks: Sequence[Vector], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """scipy's spearmanr to the last bit, without ranking each run anew for every other.

    One matrix product gives all sums of products. They are exact, so it does not matter which
    other ranks it holds.
    """
    if not pairs:
        return []
    if len(ranks[0]) > _EXACT_RANKS:
        return [
            float(np.asarray(np.corrcoef(np.stack([ranks[a], ranks[b]])))[1, 0]) for a, b in pairs
        ]
    places = {run: place for place, run in enumerate(sorted({i for pair in pairs for i in pair}))}
    matrix = np.asarray(np.corrcoef(np.stack([ranks[run] for run in places])))
    return [float(matrix[places[b], places[a]]) for a, b in pairs]


def pairwise_consistency(a: ArrayLike, b: ArrayLike, k: int, end: End) -> dict[str, float]:
    """Agreement of two score vectors; see ``ranked`` and ``agreement_of_runs``.

    Args:
        a, b: ``(n_train,)``, finite; one row of scores each.
        k: size of the suspicious sets.
        end: the suspicious end of the scores.

    Raises:
        ValueError: different lengths, k out of range, values that are not finite.
    """
    first, second = as_vector(a, "a"), as_vector(b, "b")
    if first.shape != second.shape:
        raise ValueError(
            f"a has {len(first)} examples, b {len(second)}; consistency compares runs of one task"
        )
    return agreement_of_runs(ranked(first, k, end), ranked(second, k, end))


def coefficient_of_variation(runs: ArrayLike) -> tuple[NDArray[Any], float]:
    """Spread of each example's score over runs, relative to its size: std / |mean|.

    Standard deviation with n_runs − 1. It does not change with the scale of the scores but with
    their origin, so it compares methods whose zero means "no influence".

    Args:
        runs: ``(n_runs, n_train)``, finite; at least two runs.

    Returns:
        ``(n_train,)`` values, infinite where the runs differ around a mean of zero, NaN where all
        of them are zero; and their median without the NaN. All NaN when one of the runs is
        constant over the examples.
    """
    scores = as_array(runs, "runs")
    if scores.ndim != 2 or len(scores) < 2 or scores.shape[1] == 0:
        raise ValueError(
            f"runs must have shape (n_runs, n_train) with at least two runs, got {scores.shape}"
        )
    if (np.ptp(scores, axis=1) == 0).any():
        return np.full(scores.shape[1], np.nan), float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = scores.std(axis=0, ddof=1) / np.abs(scores.mean(axis=0))
    defined = relative[~np.isnan(relative)]
    return relative, float(np.median(defined)) if len(defined) else float("nan")
