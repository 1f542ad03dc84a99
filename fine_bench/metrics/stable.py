"""Found in every run: are the examples that all runs agree on the right ones?

Consistency alone rewards whoever makes the same mistakes again; detection alone says nothing of
the next run. Here one number holds both. R runs of one task each flag their k most suspicious
examples. With N_i the number of runs that flag example i and b_i = 1 for the bad ones,

    stable recall       Σ_i b_i [N_i = R] / Σ_i b_i       of the bad, flagged by all runs
    stable precision    Σ_i b_i [N_i = R] / Σ_i [N_i = R] of what all runs flag, bad
    majority            the same with N_i ≥ R/2
    agreeing precision  mean over pairs of runs of Σ b_i [both flag i] / Σ [both flag i]

Stable recall is at most the recall of the worst run, and at most what the overlap of the runs
allows. It falls with R, so compare rows of equally many runs.

Where a tie crosses the cut at k, each run is thought to break it at random and independently of
the others, as in ``metrics.consistency``: run r flags example i with probability p_ri. [N_i = R]
becomes its probability Π_r p_ri, and [N_i ≥ R/2] that of the Poisson-binomial count. A ratio is
then one of expectations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fine_bench.metrics._arrays import ArrayLike, Vector, as_array
from fine_bench.metrics.consistency import inclusion
from fine_bench.metrics.registry import BETWEEN_RUNS, Metric

SHARES = (0.05, 0.1, 0.2)
"""Sizes of the suspicious set besides the number of bad examples, as shares of all examples."""

_AT_K = ("stable_recall", "stable_precision", "majority_recall", "majority_precision",
         "agreeing_precision")  # fmt: skip
_AT_SHARES = ("stable_recall", "stable_precision", "jaccard")


def _top(name: str, share: float) -> str:
    return f"{name}_top_{100 * share:g}"


def _words(name: str) -> str:
    return name.replace("_", " ")


METRICS = (
    Metric("stable_recall", "found in all runs", "higher", source="consistency",
           table=BETWEEN_RUNS, rank=54, title="share of the bad examples flagged in every run",
           note="Found in all runs (stable recall): share of the bad examples that are among the "
           "k most suspicious of every run; it falls with the number n of runs. –: its runs' "
           "scores were not at hand when the tables were made."),
    Metric("stable_precision", "right of what all runs flag", "higher", source="consistency",
           table=""),
    Metric("majority_recall", "found in half of the runs", "higher", source="consistency",
           table=""),
    Metric("majority_precision", "right of what half of the runs flag", "higher",
           source="consistency", table=""),
    Metric("agreeing_precision", "right of what two runs flag", "higher", source="consistency",
           table=""),
    *(
        Metric(_top(name, share), f"{_words(name)}, top {share:.0%}", "higher",
               source="consistency", table="")
        for share in SHARES
        for name in _AT_SHARES
    ),
)  # fmt: skip
"""Computed over all runs of a row, by the leaderboard; without an interval, since runs drawn again
with replacement repeat, and a repeated run agrees with itself."""


def flagged_by(chances: NDArray[np.float64], least: int) -> Vector:
    """Probability that at least ``least`` of R independent runs flag each example, ``(n,)``.

    Args:
        chances: ``(R, n)``, the probability that each run flags each example.
        least: from 0 to R.
    """
    n_runs, n = chances.shape
    # counts[c] is the probability of exactly c flags so far; runs are taken in one by one
    counts = np.zeros((n_runs + 1, n))
    counts[0] = 1.0
    for done, chance in enumerate(chances, 1):
        counts[1 : done + 1] = counts[1 : done + 1] * (1 - chance) + counts[:done] * chance
        counts[0] *= 1 - chance
    return np.asarray(counts[least:].sum(axis=0))


def stable_metrics(
    runs: Sequence[ArrayLike] | NDArray[Any], is_bad: NDArray[np.bool_], k: int
) -> dict[str, float]:
    """The numbers above, by name; for shares of the examples with ``_top_5`` and so on.

    Args:
        runs: ``(R, n)`` suspicions, high for suspicious, finite; R ≥ 2.
        is_bad: ``(n,)`` boolean, at least one True.
        k: size of each run's suspicious set, 1 … n; the number of bad examples as a rule.

    Returns:
        All NaN where a run is constant over the examples. A precision is NaN where nothing is
        flagged often enough.

    Raises:
        ValueError: fewer than two runs, other shapes, k out of range, no bad example.
    """
    rows = as_array(np.stack([as_array(run, "runs") for run in runs]), "runs")
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"runs must have shape (R, n) with R of at least 2, got {rows.shape}")
    bad = np.asarray(is_bad)
    if bad.dtype != np.bool_ or bad.shape != rows.shape[1:]:
        raise ValueError(
            f"is_bad must be boolean of shape {rows.shape[1:]}, got {bad.dtype} of shape "
            f"{bad.shape}; give the truth of the task that was scored"
        )
    if not bad.any():
        raise ValueError("no example is bad, so none can be found; leave these metrics out")
    names = [*_AT_K, *(_top(name, share) for share in SHARES for name in _AT_SHARES)]
    if (np.ptp(rows, axis=1) == 0).any():
        return dict.fromkeys(names, float("nan"))
    found = {name: value for name, value in _at(rows, bad, k).items() if name in _AT_K}
    for share in SHARES:
        there = _at(rows, bad, max(1, round(share * rows.shape[1])))
        found |= {_top(name, share): there[name] for name in _AT_SHARES}
    return found


def _at(rows: NDArray[np.float64], bad: NDArray[np.bool_], k: int) -> Mapping[str, float]:
    chances = np.stack([inclusion(row, k) for row in rows])
    n_runs = len(rows)
    found: dict[str, float] = {}
    for name, least in (("stable", n_runs), ("majority", -(-n_runs // 2))):
        often = flagged_by(chances, least)
        found[f"{name}_recall"] = float(often[bad].sum() / bad.sum())
        found[f"{name}_precision"] = _ratio(often[bad].sum(), often.sum())
    shared = [a * b for a, b in combinations(chances, 2)]
    found["agreeing_precision"] = float(np.mean([_ratio(s[bad].sum(), s.sum()) for s in shared]))
    found["jaccard"] = float(np.mean([s.sum() / (2 * k - s.sum()) for s in shared]))
    return found


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
