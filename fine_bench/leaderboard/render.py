"""How a leaderboard looks: terminal tables, Markdown, csv, JSON. No number is computed here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, RenderableType
from rich.text import Text

from fine_bench.clock import WALL
from fine_bench.leaderboard import sheet as sheets
from fine_bench.leaderboard.captions import (
    BY_RETRAINING,
    DIRTY,
    MADE_DIRTY,
    TIED,
    caption,
    cell_lines,
    notes,
    one_line,
    title,
)
from fine_bench.leaderboard.sheet import NONE, Entry, Head, Line, Sheet, head_of, markdown, number
from fine_bench.leaderboard.tables import Leaderboard, Row, Table, key_of, shows
from fine_bench.metrics.registry import STANDARD, Metric, known
from fine_bench.store import spreadsheet
from fine_bench.store.files import write_atomic
from fine_bench.terminal import UNSEEN, visible


def seeds_of(row: Row, table: Table) -> str:
    """Number of finished seeds, ``5/6`` where others have more."""
    n, all_seeds = len(row.seeds), len(table.seeds)
    return str(n) if n == all_seeds else f"{n}/{all_seeds}"


def entry_of(row: Row, metric: Metric) -> Entry:
    """A row's number."""
    stat = row.stats.get(metric.key)
    return Entry(NONE) if stat is None else number(stat.mean, stat.lower, stat.upper, metric.digits)


def _name(row: Row, columns: Sequence[Metric]) -> Entry:
    """The row's label with its marks; a tie is one in the first of the columns that has ties."""
    leading = next((c.key for c in columns if c.source != "cost" and c.key in row.stats), "")
    marks = [(TIED, "tie with the best")] if leading in row.ties else []
    marks += [(DIRTY, MADE_DIRTY)] if row.dirty else []
    return Entry(row.label, marks=tuple(marks))


def sheets_of(board: Leaderboard, table: Table) -> list[Sheet]:
    """The printed tables of a setting. Those beyond ``STANDARD`` stand where there are numbers."""
    by_heading: dict[str, list[Metric]] = {name: [] for name in STANDARD}
    for column in board.columns:
        by_heading.setdefault(column.table, []).append(column)
    found = []
    for heading, columns in by_heading.items():
        rows = table.shown_rows
        if heading not in STANDARD:
            rows = [r for r in rows if any(shows(r, c) for c in columns)]
            columns = [c for c in columns if any(shows(r, c) for r in rows)]
        if columns:
            found.append(_sheet(heading, table, columns, rows))
    return found


def _sheet(heading: str, table: Table, columns: Sequence[Metric], rows: Sequence[Row]) -> Sheet:
    heads = [Head("estimator", left=True), Head("n", count=True), *map(head_of, columns)]
    lines = [
        Line(
            row.target,
            (
                _name(row, columns),
                Entry(seeds_of(row, table)),
                *(entry_of(row, column) for column in columns),
            ),
        )
        for row in rows
    ]
    lines += [
        Line(
            f"{row.target}{BY_RETRAINING}",
            (Entry(row.label), Entry(NONE), *(entry_of(row, column) for column in columns)),
        )
        for row in table.limits
        if any(shows(row, column) for column in columns)
    ]
    return Sheet(heading, tuple(heads), tuple(lines))


# ------------------------------------------------------------------------------------ terminal


def renderables(board: Leaderboard) -> Iterator[RenderableType]:
    """What a Rich console prints; fits 100 columns."""
    for table in board.tables:
        for i, sheet in enumerate(sheets_of(board, table)):
            yield sheets.rich_table(sheet, f"{title(table)} · {sheet.title}")
            if i == 0:
                yield Text("\n".join(caption(table)) + "\n")
        yield Text("\n".join(notes(table, board.columns)), style="dim")
        for line in cell_lines(table):
            yield Text(line, style="yellow" if line.startswith("skipped") else "red")
        yield Text("")
    for problem in board.problems:
        yield Text(f"problem: {one_line(problem)}", style="red")


def show(board: Leaderboard, console: Console | None = None) -> None:
    """Print the tables, at most 100 columns wide, to the terminal or to ``console``."""
    sheets.show(renderables(board), console)


# --------------------------------------------------------------------------------------- files


def to_markdown(board: Leaderboard) -> str:
    """The whole board as Markdown."""
    lines = ["# Leaderboard", ""]
    lines += ["Rebuilt from the records by `fine-bench leaderboard`.", ""]
    for table in board.tables:
        lines += [f"## {title(table)}", ""]
        for line in caption(table):
            lines += [line, ""]
        for sheet in sheets_of(board, table):
            lines += [f"### {sheet.title}", "", *markdown(sheet), ""]
        for line in notes(table, board.columns):
            lines += [line, ""]
        unfinished = cell_lines(table)
        if unfinished:
            lines += ["Not in the averages:", "", *(f"- {line}" for line in unfinished), ""]
    if board.problems:
        lines += ["## Problems", "", *(f"- {one_line(line)}" for line in board.problems), ""]
    return "\n".join(map(visible, lines)).rstrip("\n") + "\n"


COLUMNS = (
    "task", "setting", "data", "estimator", "options", "estimator_hash", "version", "target",
    "seeds", "failed", "skipped", "missing", "dirty", "clock", "watched", "k", "limit", "metric",
    "label", "unit", "direction", "mean", "lower", "upper", "n", "tie",
)  # fmt: skip
"""Of ``frame`` and ``leaderboard.csv``."""


def frame(board: Leaderboard) -> pd.DataFrame:
    """Tidy: one line for each table, estimator, target and metric, at full precision.

    Numbers are those of ``Stat``: ``mean``, ``lower``, ``upper`` and the number ``n`` of seeds. A
    row without any number has one line without a metric. Digests are given by their first digits.
    """
    declared = {metric.key: metric for metric in known()} | {m.key: m for m in board.columns}
    order = {key: place for place, key in enumerate(declared)}
    lines = []
    for table in board.tables:
        states: dict[tuple[Any, ...], list[int]] = {}
        for cell in table.cells:
            states.setdefault((key_of(cell), cell.state), []).append(cell.seed)
        limits = set(map(key_of, table.limits))
        for row in (*table.rows, *table.limits):
            line: dict[str, Any] = {
                "task": table.task,
                "setting": table.setting[:8],
                "data": table.data[:8],
                "estimator": row.estimator,
                "options": row.variant,
                "estimator_hash": row.estimator_hash[:8],
                "version": row.version,
                "target": row.target,
                "seeds": _numbers(row.seeds),
            }
            for state in ("failed", "skipped", "missing"):
                line[state] = _numbers(states.get((key_of(row), state), ()))
            line |= {
                "dirty": row.dirty,
                "clock": row.clock or WALL,
                "watched": "all" if row.watched is None else str(row.watched),
                "k": row.k,
                "limit": key_of(row) in limits,
            }
            keys = sorted(row.stats, key=lambda key: (order.get(key, len(order)), key))
            for key in keys or [""]:
                metric = declared.get(key, Metric(key or NONE, key or NONE, table=""))
                number_of = {"mean": math.nan, "lower": math.nan, "upper": math.nan, "n": 0}
                if key:
                    number_of = vars(row.stats[key])
                lines.append(
                    line
                    | {
                        "metric": key,
                        "label": metric.label if key else "",
                        "unit": metric.unit,
                        "direction": metric.better,
                        **number_of,
                        "tie": key in row.ties,
                    }
                )
    return pd.DataFrame(lines, columns=list(COLUMNS))  # named also where nothing is finished yet


def _numbers(seeds: Sequence[int]) -> str:
    return " ".join(map(str, seeds))


def to_csv(board: Leaderboard) -> str:
    """``frame`` as csv; an undefined number is empty, with the number of its seeds as ``n``.

    Thirteen significant digits: what two orders of the same sum agree on, in fewer bytes.
    """
    table = frame(board)
    for column in ("mean", "lower", "upper"):
        table[column] = [float(f"{value:.13g}") for value in table[column]]
    return spreadsheet.to_csv(table)


def to_json(board: Leaderboard) -> str:
    """Everything in the board as strict JSON; NaN and infinities are null."""

    def strict(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, frozenset):
            return sorted(value)
        return [strict(item) for item in value] if isinstance(value, list | tuple) else value

    plain = strict(asdict(board))
    text = json.dumps(plain, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    # what JSON lets stand and a terminal would obey
    return re.sub(UNSEEN, lambda found: f"\\u{ord(found.group()):04x}", text) + "\n"


def write(board: Leaderboard, root: Path | str) -> list[Path]:
    """Write ``leaderboard.md`` and ``leaderboard.csv`` below ``root``, each whole or not at all."""
    texts = {"leaderboard.md": to_markdown(board), "leaderboard.csv": to_csv(board)}
    for name, text in texts.items():
        write_atomic(Path(root) / name, text.encode())
    return [Path(root) / name for name in texts]
