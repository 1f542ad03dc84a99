"""Groups of runs: the LDS of their mean, its interval over the runs, and paired differences.

Part of ``runs_at_equal_compute.py``, which says what is measured and how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student

from fine_bench.metrics.lds_interval import interval_over_queries
from fine_bench.metrics.reliability import spearman_rows
from fine_bench.seeds import derive

Array: TypeAlias = NDArray[np.float64]
Predict: TypeAlias = Callable[[Sequence[int]], Array]
"""Predicted outcomes ``(q, subsets)`` of a group of runs, by their positions among the seeds."""

RUNS = (1, 2, 3, 5, 10, 20)
BUDGETS = (2, 5, 10, 20)
MOST_GROUPS = 300


@dataclass(frozen=True, eq=False)
class Row:
    """A method on several runs.

    Attributes:
        name: of the row.
        seeds: of its runs.
        predict: what a group of them predicts.
        cost: of one run, in trainings.
    """

    name: str
    seeds: tuple[int, ...]
    predict: Predict
    cost: float


@dataclass(frozen=True, eq=False)
class Measured:
    """LDS of groups of R runs.

    Attributes:
        per_query: ``(q,)``, mean over the groups.
        without: ``(N,)``, the LDS over the groups without each seed; NaN where R > (N + 1)/2.
    """

    per_query: Array
    without: Array

    @property
    def lds(self) -> float:
        """Mean over the queries."""
        return float(self.per_query.mean())


def groups_of(n: int, size: int) -> list[tuple[int, ...]]:
    """All groups of ``size`` of ``n`` runs, or ``MOST_GROUPS`` random ones where there are more."""
    if math.comb(n, size) <= MOST_GROUPS:
        return list(combinations(range(n), size))
    rng = np.random.default_rng(derive(0, f"runs at equal compute/{n}/{size}"))
    drawn = {tuple(sorted(rng.permutation(n)[:size].tolist())) for _ in range(MOST_GROUPS)}
    return sorted(drawn)


def measured(predict: Predict, n: int, size: int, margin: Array) -> Measured:
    """LDS of the groups of ``size`` of ``n`` runs.

    Args:
        predict: what a group predicts.
        n: runs.
        size: of a group.
        margin: ``(subsets, q)``, what models trained on the subsets show.
    """
    groups = groups_of(n, size)
    found = np.nan_to_num([spearman_rows(predict(group), margin.T) for group in groups])
    without = np.full(n, np.nan)
    if 2 * size <= n + 1:
        for i in range(n):
            own = [k for k, group in enumerate(groups) if i not in group]
            without[i] = found[own].mean()
    return Measured(found.mean(axis=0), without)


def jackknife(value: float, without: Array) -> tuple[float, float]:
    """95 % interval of a number from its values without each seed; NaN where there are none."""
    n = len(without)
    if n < 3 or not np.isfinite(without).all():
        return math.nan, math.nan
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    half = float(student.ppf(0.975, n - 1)) * error
    return value - half, value + half


def runs_within(budget: float, cost: float, n: int) -> int:
    """Runs that fit into a budget of trainings' time: at least one, at most those there are."""
    return min(max(1, math.floor(budget / cost + 1e-9)), n)


def curves(rows: Sequence[Row], margin: Array) -> pd.DataFrame:
    """A line for every method and number of runs, each method on all of its own runs."""
    lines = []
    for row in rows:
        n = len(row.seeds)
        wanted = {r for r in RUNS if r <= n} | {runs_within(b, row.cost, n) for b in BUDGETS}
        for r in sorted(wanted):
            one = measured(row.predict, n, r, margin)
            low, high = jackknife(one.lds, one.without)
            over = interval_over_queries(one.per_query)
            lines.append(
                {
                    "method": row.name, "runs": r, "trainings": r * row.cost, "seeds": n,
                    "lds": one.lds, "lower": low, "upper": high, "queries_lower": over[0],
                    "queries_upper": over[1],
                }
            )  # fmt: skip
    return pd.DataFrame(lines)


def differences(rows: Sequence[Row], runs: Mapping[str, int], margin: Array) -> pd.DataFrame:
    """The best method less each other, on the same runs, at the given number of them of each."""
    at = {row.name: measured(row.predict, len(row.seeds), runs[row.name], margin) for row in rows}
    best = max(at, key=lambda name: at[name].lds)
    lines = []
    for name in sorted(at, key=lambda name: -at[name].lds):
        if name == best:
            continue
        value = at[best].lds - at[name].lds
        low, high = jackknife(value, at[best].without - at[name].without)
        over = interval_over_queries(at[best].per_query - at[name].per_query)
        lines.append(
            {
                "best": best, "best_runs": runs[best], "other": name, "other_runs": runs[name],
                "difference": value, "lower": low, "upper": high, "queries_lower": over[0],
                "queries_upper": over[1],
            }
        )  # fmt: skip
    return pd.DataFrame(lines)
