"""Each method by one measure: over all tasks, in one table a kind of task.

Made of the leaderboard, and rebuilt byte by byte. A method that has no row on a task has an empty
cell; there is no mean over tasks, which would hide where a method fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fine_bench.errors import DataError
from fine_bench.leaderboard.captions import KINDS, kind_of
from fine_bench.leaderboard.sheet import NONE, Entry, Head, Line, Sheet, markdown, number
from fine_bench.leaderboard.tables import Leaderboard, Row, Table
from fine_bench.metrics.registry import DETECTION, Metric
from fine_bench.terminal import visible
from fine_bench.types import TARGETS

COLUMNS = 4
"""A page holds as many with their intervals; a task with more settings than that stays together."""


@dataclass(frozen=True)
class Summary:
    """Methods by tasks.

    Attributes:
        measure, target: what is shown.
        tables: the columns.
        labels: of the methods, in order.
        cells: by label and column, the row behind it, or None.
    """

    measure: Metric
    target: str
    tables: tuple[Table, ...]
    labels: tuple[str, ...]
    cells: tuple[tuple[Row | None, ...], ...]


def summarise(board: Leaderboard, measure: str, target: str, tasks: Sequence[str] = ()) -> Summary:
    """The summary of a leaderboard.

    Methods are ordered by their mean rank over the tasks that they have a number on. A sample of
    examples (``watched``) is compared with nothing, so its rows are left out.

    Args:
        measure: key of a column of the leaderboard, for instance ``average_precision``.
        target: one of ``TARGETS``.
        tasks: which, in this order; all when empty.

    Raises:
        DataError: an unknown measure, target or task, or no number at all.
    """
    ranked = {column.key: column for column in board.columns if column.better}
    if measure not in ranked:
        raise DataError(f"no measure {measure!r}; there are: {', '.join(ranked)}")
    if target not in TARGETS:
        raise DataError(f"no target {target!r}; there are: {', '.join(TARGETS)}")
    known = list(dict.fromkeys(table.task for table in board.tables))
    missing = [task for task in tasks if task not in known]
    if missing:
        raise DataError(f"no records of {', '.join(missing)}; there are: {', '.join(known)}")
    wanted = tuple(tasks) or tuple(known)
    tables: list[Table] = []
    found: list[dict[str, Row]] = []
    for table in sorted(
        board.tables, key=lambda t: wanted.index(t.task) if t.task in wanted else 0
    ):
        if table.task not in wanted:
            continue
        rows = {
            row.label: row
            for row in table.rows
            if row.target == target and row.watched is None and measure in row.stats
        }
        if rows:
            tables.append(table)
            found.append(rows)
    if not tables:
        raise DataError(
            f"no record of {', '.join(wanted)} has {measure} on target {target}; run the "
            "experiments first"
        )
    metric = ranked[measure]
    labels = sorted(
        {label for rows in found for label in rows},
        key=lambda label: (_mean_rank(label, found, metric), label),
    )
    cells = tuple(tuple(rows.get(label) for rows in found) for label in labels)
    return Summary(metric, target, tuple(tables), tuple(labels), cells)


def _mean_rank(label: str, found: Sequence[dict[str, Row]], metric: Metric) -> tuple[bool, float]:
    ranks = []
    for rows in found:
        if label in rows:
            own = rows[label].stats[metric.key].mean
            if math.isnan(own):
                continue
            others = [row.stats[metric.key].mean for row in rows.values()]
            better = sum((x > own) if metric.better == "higher" else (x < own) for x in others)
            ranks.append(better / len(rows))
    return not ranks, sum(ranks) / len(ranks) if ranks else 0.0


def headings(tables: Sequence[Table]) -> list[str]:
    """The tasks of tables; where one has several, with as much of their settings as tells apart."""
    found = []
    for table in tables:
        of_task = [other for other in tables if other.task == table.task]
        told: list[str] = []
        alike = [other for other in of_task if other is not table]
        for name, value in table.options.items():
            # what differs somewhere is said of all, so that they can be compared
            if alike and any(other.options.get(name) != value for other in of_task):
                told.append(f"{name.rpartition('.')[2]}={value}")
                alike = [other for other in alike if other.options.get(name) == value]
        told += [table.setting[:8]] if alike else []
        found.append(f"{table.task} ({', '.join(told)})" if told else table.task)
    return found


def sheet_of(summary: Summary) -> Sheet:
    """A line a method, a column a task; the best of each column is marked."""
    metric = summary.measure
    columns = []
    for cells in zip(*summary.cells, strict=True):
        stats = [None if row is None else row.stats[metric.key] for row in cells]
        entries = [Entry(NONE) if s is None else number(s.mean, s.lower, s.upper) for s in stats]
        # what looks equal is equally good
        means = [round(s.mean, 3) for s in stats if s is not None and not math.isnan(s.mean)]
        best = (max if metric.better == "higher" else min)(means, default=math.nan)
        columns.append(
            [replace(e, best=e.value is not None and round(e.value, 3) == best) for e in entries]
        )
    rows = zip(*columns, strict=True)
    return Sheet(
        f"{metric.label} {metric.arrow}, target *{summary.target}*",
        (Head("method", left=True), *map(Head, headings(summary.tables))),
        tuple(
            Line("", (Entry(label), *entries))
            for label, entries in zip(summary.labels, rows, strict=True)
        ),
    )


def by_kind(board: Leaderboard, measure: str, target: str) -> list[tuple[str, Summary]]:
    """Every task with the others of its kind: headings, and tables of few columns and full rows.

    A table has the methods that have a number in it, ordered by their mean rank there.

    Raises:
        DataError: see ``summarise``.
    """
    kinds = [*dict.fromkeys(KINDS.values())]
    columns: dict[str, dict[str, int]] = {}
    for table in summarise(board, measure, target).tables:
        of_kind = columns.setdefault(kind_of(table), {})
        of_kind[table.task] = of_kind.get(table.task, 0) + 1
    found = []
    for kind in sorted(columns, key=lambda k: kinds.index(k) if k in kinds else len(kinds)):
        groups: list[list[str]] = [[]]
        for task, count in columns[kind].items():
            if groups[-1] and sum(columns[kind][t] for t in groups[-1]) + count > COLUMNS:
                groups.append([])
            groups[-1].append(task)
        found += [(kind, summarise(board, measure, target, tasks)) for tasks in groups]
    return found


def text_of(board: Leaderboard, measure: str, target: str, tasks: Sequence[str] = ()) -> str:
    """All of a target as Markdown: a table a kind of task, or one of the tasks that are named.

    Raises:
        DataError: see ``summarise``.
    """
    if tasks:
        return to_markdown(summarise(board, measure, target, tasks))
    found = by_kind(board, measure, target)
    parts = [f"#### {sheet_of(found[0][1]).title}\n"]
    above = ""
    for kind, summary in found:
        parts.append(to_markdown(summary, "" if kind == above else f"**{kind}**"))
        above = kind
    return "\n".join(parts)


def to_markdown(summary: Summary, heading: str | None = None) -> str:
    """Mean over seeds with its interval; the best of each column is bold.

    Args:
        summary: the table.
        heading: the line above it; the measure and the target by default.
    """
    sheet = sheet_of(summary)
    heading = f"#### {sheet.title}" if heading is None else heading
    lines = [*([heading, ""] if heading else []), *markdown(sheet)]
    if summary.measure.table == DETECTION:
        named = zip(summary.tables, headings(summary.tables), strict=True)
        bad = (f"{table.k:,} of the examples of {heading}" for table, heading in named)
        lines += ["", f"Known bad: {', '.join(bad)}."]
    return "\n".join(map(visible, lines)) + "\n"
