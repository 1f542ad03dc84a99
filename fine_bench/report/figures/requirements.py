"""What a figure needs of a table, and how it says that something is missing."""

from __future__ import annotations

from fine_bench.leaderboard.tables import Row
from fine_bench.metrics.intervals import Interval
from fine_bench.metrics.registry import Source, named, stat_key
from fine_bench.report.figures.tables import TableResults


class LeftOutError(Exception):
    """A figure cannot be drawn from these records. The message is the reason that is printed."""


def interval_of(row: Row, source: Source, name: str) -> Interval | None:
    """A number of a row with its interval; None when no seed has it."""
    stat = row.stats.get(stat_key(source, name))
    return None if stat is None else Interval(stat.mean, stat.lower, stat.upper)


def in_full(source: Source, name: str) -> str:
    """What a number is called on an axis; its metric declares it."""
    return named(stat_key(source, name)).in_full


def require_rows(results: TableResults) -> None:
    """Refuse a table without a finished record."""
    if not results.rows():
        raise LeftOutError("no estimator has a finished record")


def require_two_seeds(results: TableResults) -> None:
    """Refuse a table in which no method has two seeds."""
    require_rows(results)
    rows = results.rows()
    if max(len(row.seeds) for row in rows) < 2:
        seeds = sorted({seed for row in rows for seed in row.seeds})
        raise LeftOutError(
            f"needs at least two seeds of one method, there is only seed "
            f"{', '.join(map(str, seeds))}; run with more, for instance seed=0,1,2"
        )
