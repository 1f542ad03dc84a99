"""One table over all tasks: each method by one measure. ``python -m fine_bench.summary``.

Read from the records as the leaderboard is, and rebuilt byte by byte. A method that has no row on
a task has an empty cell; there is no mean over tasks, which would hide where a method fails.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fine_bench.errors import DataError
from fine_bench.leaderboard.board import COLUMNS, Leaderboard, Row, Table, build
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on
from fine_bench.types import TARGETS

DETECTION = ("auroc", "average_precision", "recall_at_rate", "recall_curve_area")


@dataclass(frozen=True)
class Summary:
    """Methods by tasks.

    Attributes:
        measure, target: what is shown.
        tables: the columns.
        labels: of the methods, in order.
        cells: by label and column, the row behind it, or None.
    """

    measure: str
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
    keys = [column.key for column in COLUMNS]
    if measure not in keys:
        raise DataError(f"no measure {measure!r}; there are: {', '.join(keys)}")
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
    higher = next(column.higher for column in COLUMNS if column.key == measure)
    labels = sorted(
        {label for rows in found for label in rows},
        key=lambda label: (_mean_rank(label, found, measure, higher), label),
    )
    cells = tuple(tuple(rows.get(label) for rows in found) for label in labels)
    return Summary(measure, target, tuple(tables), tuple(labels), cells)


def _mean_rank(
    label: str, found: Sequence[dict[str, Row]], measure: str, higher: bool
) -> tuple[bool, float]:
    ranks = []
    for rows in found:
        if label in rows:
            own = rows[label].stats[measure].mean
            if math.isnan(own):
                continue
            others = [row.stats[measure].mean for row in rows.values()]
            better = sum((x > own) if higher else (x < own) for x in others)
            ranks.append(better / len(rows))
    return not ranks, sum(ranks) / len(ranks) if ranks else 0.0


def to_markdown(summary: Summary) -> str:
    """Mean over seeds with its interval; the best of each column is bold."""
    column = next(c for c in COLUMNS if c.key == summary.measure)
    arrow = "↑" if column.higher else "↓"
    lines = [
        f"#### {column.label} {arrow}, target *{summary.target}*",
        "",
        "| method | " + " | ".join(table.task for table in summary.tables) + " |",
        "| --- |" + " ---: |" * len(summary.tables),
    ]
    best = []
    for i in range(len(summary.tables)):
        means = [
            round(row.stats[summary.measure].mean, 3)
            for cells in summary.cells
            if (row := cells[i]) is not None and not math.isnan(row.stats[summary.measure].mean)
        ]
        best.append((max(means) if column.higher else min(means)) if means else math.nan)
    for label, cells in zip(summary.labels, summary.cells, strict=True):
        texts = []
        for top, row in zip(best, cells, strict=True):
            stat = None if row is None else row.stats[summary.measure]
            if stat is None or math.isnan(stat.mean):
                texts.append("–" if stat is None else "undefined")
                continue
            mean = f"{stat.mean:.3f}"
            mean = f"**{mean}**" if round(stat.mean, 3) == top else mean
            known = not math.isnan(stat.lower)
            texts.append(f"{mean} [{stat.lower:.3f}, {stat.upper:.3f}]" if known else mean)
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    if summary.measure in DETECTION:
        lines += ["", "Known bad: " + ", ".join(_bad(table) for table in summary.tables) + "."]
    return "\n".join(lines) + "\n"


def _bad(table: Table) -> str:
    return f"{table.k:,} of the examples of {table.task}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``DIR/summary.md``; 0 done, 1 a file cannot be read, 2 nothing to summarise."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.summary",
        description="One table over all tasks, rebuilt from DIR/records: methods by one measure.\n"
        "Written to DIR/summary.md and printed.",
        epilog="Exit status: 0 done; 1 a file cannot be read (each is named);\n2 nothing to "
        "summarise, or a wrong argument.\nExample:\n  python -m fine_bench.summary --measure "
        "average_precision --tasks mnist_mislabel cifar10n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", metavar="DIR", type=Path, default=Path("results"), help="default: results"
    )
    parser.add_argument(
        "--measure",
        default="average_precision",
        help="a column of the leaderboard (default: average_precision)",
    )
    parser.add_argument(
        "--target", nargs="+", default=["self", "validation"], help="default: self validation"
    )
    parser.add_argument("--tasks", nargs="*", default=[], help="default: all, by name")
    arguments = parser.parse_args(argv)
    with bar_on() as progress:
        bar = progress.add_task("reading records", total=None)

        def reading(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"comparing {name}")

        board = build(RecordStore(arguments.results), reading)
    parts = []
    try:
        for target in arguments.target:
            parts.append(to_markdown(summarise(board, arguments.measure, target, arguments.tasks)))
        text = "\n".join(parts)
        write_atomic(arguments.results / "summary.md", text.encode())
    except (DataError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    for problem in board.problems:
        print(problem, file=sys.stderr)
    return 0 if not board.problems else 1


if __name__ == "__main__":
    raise SystemExit(main())
