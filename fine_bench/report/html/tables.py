"""The leaderboard as sortable HTML tables: one a target, all columns, intervals below means."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fine_bench.leaderboard import render as view
from fine_bench.leaderboard.board import Column, Row, Stat, Table
from fine_bench.report.figures.benchmark import TARGET_TITLES
from fine_bench.report.html.markup import Safe, join, number, slug, tag, text

GROUPS = {"metrics": "detection", "consistency": "consistency over seeds", "cost": "cost"}


def boards(table: Table, columns: Sequence[Column]) -> Safe:
    """A table for each target of a setting, with its marks explained below."""
    rows = view.shown_rows(table)
    targets = list(dict.fromkeys(row.target for row in rows))
    parts: list[object] = [
        _board(table, target, [r for r in rows if r.target == target], columns)
        for target in targets
    ]
    parts.append(tag("ul", *(tag("li", line) for line in _notes(table)), class_="notes"))
    cells = view.cell_lines(table)
    if cells:
        words = [tag("h4", "Not in the averages")]
        lines = [tag("li", line, class_=line.split(":", 1)[0]) for line in cells]
        parts.append(tag("div", *words, tag("ul", *lines), class_="missing"))
    return join(parts)


def _notes(table: Table) -> list[str]:
    """The leaderboard's notes; ties are marked here in every column."""
    lines = [line for line in view.notes(table) if not line.startswith(view.TIED)]
    if any(row.ties for row in table.rows):
        lines.insert(
            1,
            f"Bold: the best of a column. {view.TIED} tie with it: the 95 % interval of the "
            "difference, paired by seed, holds 0, or from six seeds on a sign-flip test does not "
            "find it significant.",
        )
    return lines


def _board(table: Table, target: str, rows: Sequence[Row], columns: Sequence[Column]) -> Safe:
    # a block's columns belong to the rows that the block is about
    shown = [
        c
        for c in columns
        if any(c.key in row.stats and (not c.needs or c.needs in row.stats) for row in rows)
    ]
    # columns of one kind side by side: detection, fidelity, consistency, cost
    kinds = list(dict.fromkeys(c.block or GROUPS[c.source] for c in shown))
    shown = [c for kind in kinds for c in shown if (c.block or GROUPS[c.source]) == kind]
    best = {c.key: _best(rows, c) for c in shown}
    above = [tag("td", colspan=2)]
    for kind in kinds:
        span = sum((c.block or GROUPS[c.source]) == kind for c in shown)
        above.append(tag("th", kind, scope="colgroup", colspan=span))
    heads = [_head("estimator", "text", "ascending"), _head("n", "number", "descending")]
    heads += [
        _head(c.label, "number", "descending" if c.higher else "ascending", _arrow(c))
        for c in shown
    ]
    body = [
        tag(
            "tr",
            tag("th", _name(row), scope="row", data_value=row.label),
            tag("td", view.seeds_of(row, table), data_value=len(row.seeds), class_="n"),
            *(_cell(row, c, best[c.key]) for c in shown),
        )
        for row in rows
    ]
    title = TARGET_TITLES.get(target, f"target {target}")
    name = slug(f"{table.task}-{table.setting[:8]}-{target}")
    return tag(
        "div",
        tag(
            "table",
            tag("caption", tag("strong", table.task), " · ", title, id=f"caption-{name}"),
            tag("thead", tag("tr", *above, class_="kinds"), tag("tr", *heads)),
            tag("tbody", *body),
            class_="board",
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_labelledby=f"caption-{name}",
    )


def _arrow(column: Column) -> str:
    return "higher is better" if column.higher else "lower is better"


def _head(label: str, kind: str, first: str, better: str = "") -> Safe:
    """A heading whose button sorts; ``first`` is the direction of the first click."""
    arrow = {"higher is better": "↑", "lower is better": "↓"}.get(better, "")
    button = tag(
        "button",
        tag("span", label),
        tag("span", f" {arrow}", class_="better", aria_hidden="true") if arrow else "",
        type="button",
        title=f"sort by {label}" + (f" ({better})" if better else ""),
    )
    return tag("th", button, scope="col", aria_sort="none", data_kind=kind, data_first=first)


def _name(row: Row) -> Safe:
    dirty = tag("abbr", view.DIRTY, title="made by code with uncommitted changes", class_="dirty")
    notes = row.label.removeprefix(row.estimator)
    if row.watched == 0:
        notes = "(groups alone, see below)"
    return join(
        [
            tag("span", row.estimator, class_="name"),
            join([" ", dirty]) if row.dirty else "",
            tag("span", notes, class_="variant") if notes else "",
        ]
    )


def _best(rows: Sequence[Row], column: Column) -> float:
    """The best mean of a column among rows that score all examples."""
    means = [
        row.stats[column.key].mean
        for row in rows
        if row.watched is None
        and column.key in row.stats
        and math.isfinite(row.stats[column.key].mean)
    ]
    if not means:
        return math.nan
    return max(means) if column.higher else min(means)


def _cell(row: Row, column: Column, best: float) -> Safe:
    stat = row.stats.get(column.key)
    if stat is None:
        return tag("td", view.NONE, data_value="", class_="none")
    if not math.isfinite(stat.mean):
        return tag("td", "undefined", data_value="", class_="none")
    cost = column.source == "cost"
    write = view.amount_of if cost else number
    first = stat.mean == best and row.watched is None and not cost
    mean = tag("span", write(stat.mean), class_="mean best" if first else "mean")
    tie = tag("abbr", view.TIED, title="tie with the best") if column.key in row.ties else ""
    return tag("td", mean, tie, _interval(stat, cost), data_value=repr(float(stat.mean)))


def _interval(stat: Stat, cost: bool) -> Safe:
    if not math.isfinite(stat.lower):
        return text("")
    write = view.amount_of if cost else view.short
    return tag("span", f"{write(stat.lower)}–{write(stat.upper)}", class_="ci")
