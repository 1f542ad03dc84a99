"""Which rows of a table cannot be told from the best of their target, column by column.

Two methods run on the same seeds are compared seed by seed, which removes what a seed does to
both. Their difference d has the mean d̄ over seeds and a percentile bootstrap interval [a, b] over
seeds (``metrics.intervals``); they tie when a ≤ 0 ≤ b. Such an interval is too short for few
seeds, so a missing mark proves nothing below six; from six on, an exact sign-flip test must agree
before a row counts as worse. Consistency belongs to pairs of seeds: there the difference is taken
pair by pair, and the bootstrap again resamples seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from fine_bench.leaderboard.tables import Row, RowKey, key_of
from fine_bench.metrics.many_intervals import pair_mean_intervals
from fine_bench.metrics.many_intervals import ties as seeds_tie
from fine_bench.metrics.registry import Metric
from fine_bench.types import RunRecord

PairValues: TypeAlias = Mapping[tuple[int, int], Mapping[str, float]]


def with_ties(
    rows: Sequence[Row],
    records: Iterable[RunRecord],
    pairs: Mapping[RowKey, PairValues],
    columns: Sequence[Metric],
    level: float,
) -> list[Row]:
    """The rows with their ``ties`` filled.

    Args:
        rows: of one table.
        records: what the rows were made of.
        pairs: consistency of each row by pair of seeds.
        columns: what is compared; costs are not, nor what is neither better high nor low.
        level: of the intervals.
    """
    by_row: dict[RowKey, dict[int, RunRecord]] = {}
    for record in records:
        by_row.setdefault(key_of(record), {})[record.seed] = record

    def metric(row: Row, name: str) -> dict[int, float]:
        found = by_row.get(key_of(row), {})
        return {
            seed: found[seed].metrics[name]
            for seed in row.seeds
            if seed in found and found[seed].version == row.version and name in found[seed].metrics
        }

    of_seeds: dict[tuple[int, str], tuple[dict[int, float], dict[int, float]]] = {}
    of_pairs: dict[tuple[int, str], dict[tuple[int, int], float]] = {}
    for column in columns:
        if column.source == "cost" or not column.better:
            continue
        for group in _groups(rows, column):
            best = _best(rows, group, column)
            first = metric(rows[best], column.name)
            for i in group:
                if i == best:
                    continue
                if column.source == "metrics":
                    of_seeds[i, column.key] = first, metric(rows[i], column.name)
                else:
                    a, b = (pairs.get(key_of(rows[x]), {}) for x in (best, i))
                    of_pairs[i, column.key] = _pair_differences(a, b, column.name)
    of_pairs = {where: found for where, found in of_pairs.items() if found}
    intervals = pair_mean_intervals(list(of_pairs.values()), level)
    tied = dict(zip(of_seeds, seeds_tie(list(of_seeds.values()), level), strict=True))
    for where, (_, lower, upper) in zip(of_pairs, intervals, strict=True):
        tied[where] = lower <= 0.0 <= upper
    ties: dict[int, set[str]] = {i: set() for i in range(len(rows))}
    for (i, key), same in tied.items():
        if same:
            ties[i].add(key)
    return [replace(row, ties=frozenset(ties[i])) for i, row in enumerate(rows)]


def _groups(rows: Sequence[Row], column: Metric) -> list[list[int]]:
    """Rows that may be compared: one target, the same examples, a defined value."""
    groups: dict[tuple[str, int | None], list[int]] = {}
    for i, row in enumerate(rows):
        stat = row.stats.get(column.key)
        if stat is not None and math.isfinite(stat.mean):
            groups.setdefault((row.target, row.watched), []).append(i)
    return list(groups.values())


def _best(rows: Sequence[Row], group: Sequence[int], column: Metric) -> int:
    sign = -1.0 if column.better == "higher" else 1.0
    return min(group, key=lambda i: (sign * rows[i].stats[column.key].mean, *key_of(rows[i])))


def _pair_differences(a: PairValues, b: PairValues, name: str) -> dict[tuple[int, int], float]:
    """Differences pair by pair; none where they would show no spread, or pairs are missing."""
    seeds = _seeds(a, name) & _seeds(b, name)
    differences = {
        pair: a[pair][name] - b[pair][name]
        for pair in a.keys() & b.keys()
        if set(pair) <= seeds and name in a[pair] and name in b[pair]
    }
    if len(seeds) < 3 or len(differences) != len(seeds) * (len(seeds) - 1) // 2:
        return {}  # two seeds are one pair, which shows no spread
    return differences


def _seeds(values: PairValues, name: str) -> set[int]:
    return {seed for pair, found in values.items() if name in found for seed in pair}
