"""From records to bands: a row's own number between the lowest and the highest of its range.

Every number is a mean over the same run seeds, those of the range's cells: the row itself is
averaged over them alone, so that a band compares configurations and not seeds. A configuration
without a finished record of each of these seeds is in no band, and its cells are named. What
counts as declared is everything that any record of the range was told, so a range that is made
shorter later does not make its band narrower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fine_bench.leaderboard.build import OnRow, build_from, by_table
from fine_bench.leaderboard.consistency import Comparisons
from fine_bench.leaderboard.option_grid import label_of
from fine_bench.leaderboard.tables import Row, TableKey
from fine_bench.metrics.cure import CURE
from fine_bench.metrics.registry import Metric, columns
from fine_bench.store.records import RecordStore, Scan, newest
from fine_bench.types import TARGETS, RunRecord, Status

UNNAMED = "default"
"""Stands for the own value of an option that the row's configuration leaves to the method."""

QUALITY = tuple(c for c in columns() if c.source != "cost" and c.table != CURE)
"""Columns that get a band; what a configuration costs is no question of quality."""


_KEYS = frozenset(column.key for column in QUALITY)


@dataclass(frozen=True)
class Band:
    """One number over a range.

    Attributes:
        own: mean over the seeds with the row's own options; NaN where it is undefined.
        lowest, highest: of the means over the seeds of all configurations, the row's own among
            them.
        n: number of configurations that have the number.
    """

    own: float
    lowest: float
    highest: float
    n: int


@dataclass(frozen=True)
class Spread:
    """A row of the leaderboard on one target, over its declared range.

    Attributes:
        task, setting, data: which table.
        estimator, estimator_hash, target: which row of it.
        options: option → the row's own value (``UNNAMED`` where the method's default holds), then
            the others that were declared.
        configurations: how many there are, the row's own among them.
        seeds: over which every mean is taken.
        finished, skipped, expected: number of cells with a number, of those that the method says
            it cannot serve, and of all that were declared.
        missing: all but the finished, each by its configuration and seeds, with the reason.
        bands: by key of a column.
    """

    task: str
    setting: str
    data: str
    estimator: str
    estimator_hash: str
    target: str
    options: Mapping[str, Sequence[Any]]
    configurations: int
    seeds: tuple[int, ...]
    finished: int
    skipped: int
    expected: int
    missing: tuple[str, ...]
    bands: Mapping[str, Band]

    @property
    def complete(self) -> bool:
        """Whether every cell of the range has a record and none failed; skipping is no fault."""
        return self.finished + self.skipped == self.expected


@dataclass(frozen=True)
class _Range:
    """The records of one range: by configuration (its label, empty for the row's own) and seed."""

    key: TableKey
    row: str
    base: str
    target: str
    changes: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    records: Mapping[tuple[str, int], RunRecord]
    version: int

    def current(self, label: str, seed: int, status: Status = "finished") -> RunRecord | None:
        """The record of the range's method version, if it has this status."""
        record = self.records.get((label, seed))
        if record is None or record.version != self.version or record.status != status:
            return None
        return record

    def count(self, status: Status) -> int:
        """Number of its cells that have this status."""
        cells = [(label, seed) for label in self.changes for seed in self.seeds]
        return sum(self.current(*cell, status) is not None for cell in cells)

    @property
    def whole(self) -> list[str]:
        """Configurations that have finished all seeds."""
        return [x for x in self.changes if all(self.current(x, s) for s in self.seeds)]


def spreads(store: RecordStore, scan: Scan, on_row: OnRow | None = None) -> list[Spread]:
    """All ranges that have a record, by task, setting, estimator and target.

    A target that the method does not serve at all is left out: the leaderboard says why.

    Args:
        store: where scores and cached comparisons are.
        scan: what ``store.scan()`` found.
        on_row: called as (configurations done, in all, name) before each configuration.
    """
    records = newest(scan.records)
    if not any(record.varies for record in records):
        return []
    ranges = [found for key, table in by_table(records).items() for found in _ranges(key, table)]
    ranges = [r for r in ranges if any(x.status != "skipped" for x in r.records.values())]
    comparisons = Comparisons(store, scan.consistency)
    # one range at a time: two of them may ask for the row's own numbers over different seeds
    found = []
    for number, one in enumerate(ranges):
        mine = [
            record
            for label in one.whole
            for seed in one.seeds
            if (record := one.current(label, seed)) is not None
        ]
        if on_row is not None:
            on_row(number, len(ranges), f"{one.key[0]} {one.row} {one.target}")
        board = build_from(mine, comparisons)
        rows = {(r.estimator, r.estimator_hash): r for t in board.tables for r in t.rows}
        found.append(_spread(one, rows, board.problems))
    return sorted(found, key=_order)


def _order(spread: Spread) -> tuple[Any, ...]:
    known: tuple[str, ...] = TARGETS
    rank = known.index(spread.target) if spread.target in known else len(known)
    return (spread.task, spread.setting, spread.data, rank, spread.target, spread.estimator,
            spread.estimator_hash)  # fmt: skip


def _told(record: RunRecord) -> Mapping[str, Any]:
    told = record.config.get("sensitivity")
    return told if isinstance(told, Mapping) else {}


def _ranges(key: TableKey, table: Sequence[RunRecord]) -> Iterable[_Range]:
    """The ranges of one table of the leaderboard."""
    groups: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in table:
        if record.varies:
            base = str(_told(record).get("base", ""))
            groups.setdefault((record.varies, base, record.target), []).append(record)
    for (row, base, target), members in sorted(groups.items()):
        changes: dict[str, Mapping[str, Any]] = {"": {}}
        for record in members:
            for declared in (*_told(record).get("grid", ()), _told(record).get("changes", {})):
                changes.setdefault(label_of(declared), declared)
        seeds = tuple(sorted({record.seed for record in members}))
        by_cell = {
            (label_of(_told(record).get("changes", {})), record.seed): record for record in members
        }
        for record in table:
            mine = (record.estimator, record.estimator_hash, record.target) == (row, base, target)
            if mine and record.seed in seeds:
                by_cell["", record.seed] = record
        version = max(record.version for record in by_cell.values())
        ordered = {label: changes[label] for label in sorted(changes)}
        yield _Range(key, row, base, target, ordered, seeds, by_cell, version)


def _spread(one: _Range, rows: Mapping[tuple[str, str], Row], problems: Sequence[str]) -> Spread:
    stats = []
    for label in one.whole:
        record = one.current(label, one.seeds[0])
        assert record is not None
        stats.append((label, rows[record.estimator, record.estimator_hash].stats))
    bands = {}
    for column in QUALITY:
        means = {
            label: found[column.key].mean
            for label, found in stats
            if column.key in found and math.isfinite(found[column.key].mean)
        }
        if means:
            low, high = min(means.values()), max(means.values())
            bands[column.key] = Band(means.get("", math.nan), low, high, len(means))
    return Spread(
        *one.key,
        one.row,
        one.base,
        one.target,
        _options(one),
        len(one.changes),
        one.seeds,
        one.count("finished"),
        one.count("skipped"),
        len(one.changes) * len(one.seeds),
        (*_missing(one), *problems),
        bands,
    )


def _missing(one: _Range) -> list[str]:
    """``observable=loss, seeds 1, 2: failed: why``, one line a configuration and reason."""
    lines: dict[tuple[str, str], list[int]] = {}
    for label in one.changes:
        for seed in one.seeds:
            if one.current(label, seed) is not None:
                continue
            record = one.records.get((label, seed))
            if record is None:
                why = "missing: no record"
            elif record.version != one.version:
                why = (
                    f"missing: recorded by method version {record.version} only; this is version "
                    f"{one.version}"
                )
            else:
                why = f"{record.status}: {record.reason}"
            lines.setdefault((label or "its own options", why), []).append(seed)
    return [
        f"{label}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}: {why}"
        for (label, why), seeds in lines.items()
    ]


def _options(one: _Range) -> dict[str, list[Any]]:
    """The values of each option: the row's own, then the others that were declared."""
    others: dict[str, list[Any]] = {}
    for changes in one.changes.values():
        for name, value in changes.items():
            found = others.setdefault(name, [])
            if value not in found:
                found.append(value)
    return {name: [_own(one, name), *sorted(v, key=_size)] for name, v in sorted(others.items())}


def _own(one: _Range, name: str) -> Any:
    """The row's own value of an option, from a record that does not change it."""
    for (label, _), record in sorted(one.records.items()):
        options = record.config.get("estimator", {})
        if name not in one.changes[label] and isinstance(options, Mapping):
            return options.get(name, UNNAMED)
    return UNNAMED


def _size(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number, float(value) if number else 0.0, json.dumps(value, default=str)


def columns_of(found: Iterable[Spread]) -> list[Metric]:
    """The columns for which one of the spreads has a band, in the leaderboard's order.

    What is shown beside another number only is there where that one is.
    """
    known = list(found)

    def there(key: str) -> bool:
        return any(key in spread.bands for spread in known)

    return [c for c in QUALITY if there(c.key) and (c.beside not in _KEYS or there(c.beside))]
