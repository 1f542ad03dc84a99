"""Printed tables as HTML, and the leaderboard among them: one sortable table a target."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from fine_bench.leaderboard.captions import DIRTY, MADE_DIRTY, TIED, cell_lines, notes
from fine_bench.leaderboard.render import entry_of, seeds_of
from fine_bench.leaderboard.sheet import NONE, UNDEFINED, Entry, Head, Line, Sheet, head_of
from fine_bench.leaderboard.tables import Row, Table, shows
from fine_bench.metrics.registry import ARROWS, BETWEEN_RUNS, Metric
from fine_bench.report.figures.titles import caption_of
from fine_bench.report.html.markup import Safe, join, slug, tag
from fine_bench.types import End

BETWEEN = {"consistency": "consistency over seeds", "cost": "cost"}
"""Parts of the leaderboard's table ``BETWEEN_RUNS``, which are groups of columns here."""


# ---------------------------------------------------------------------------------- the writer


def written(
    sheet: Sheet, title: str, *, kind: str, name: str = "", order: tuple[int, str] | None = None
) -> Safe:
    """A table in a region of its own that scrolls.

    Args:
        sheet: the table; groups of heads stand above them.
        title: what its lines answer.
        kind: class of the table. A ``board`` has heads that sort.
        name: of its caption, for those who link to it; without one the region is named itself.
        order: number of the column by which the lines are sorted, and ``ascending`` or
            ``descending``.
    """
    sorted_by, direction = order or (-1, "")
    board = kind == "board"
    above = [tag("tr", *_groups(sheet.heads), class_="kinds")] if board else []
    heads = [
        _sorting(head, direction if i == sorted_by else "none")
        if board
        else tag("th", head.text, scope="col")
        for i, head in enumerate(sheet.heads)
    ]
    rows = [tag("tr", *map(_entry, line.entries, sheet.heads)) for line in sheet.lines]
    first: object = tag("strong", sheet.title) if board else sheet.title
    label = {"aria_label": f"{sheet.title.lower()}, {title}"}
    if name:
        label = {"aria_labelledby": f"caption-{name}"}
    return tag(
        "div",
        tag(
            "table",
            tag(
                "caption",
                tag("span", first, " · ", title),
                id=f"caption-{name}" if name else None,
            ),
            tag("thead", *above, tag("tr", *heads)),
            tag("tbody", *rows),
            class_=kind,
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        **label,
    )


def _groups(heads: Sequence[Head]) -> list[Safe]:
    """Headings above the heads of one group, and an empty place above those of none."""
    cells = []
    for group in dict.fromkeys(head.group for head in heads):
        span = sum(head.group == group for head in heads)
        cells.append(
            tag("th", group, scope="colgroup", colspan=span) if group else tag("td", colspan=span)
        )
    return cells


def _sorting(head: Head, now: str) -> Safe:
    """A heading whose button sorts; the best comes first, names from the first letter on.

    ``now`` is the order of the lines by this column: ascending, descending or none.
    """
    better = f"{head.better} is better" if head.better else ""
    arrow = tag("span", f" {ARROWS[head.better]}", class_="better", aria_hidden="true")
    button = tag(
        "button",
        tag("span", head.label),
        arrow if better else "",
        type="button",
        title=f"sort by {head.label}" + (f" ({better})" if better else ""),
    )
    first = "ascending" if head.left or head.better == "lower" else "descending"
    kind = "text" if head.left else "number"
    return tag("th", button, scope="col", aria_sort=now, data_kind=kind, data_first=first)


def breaking(name: str) -> Safe:
    """A name that may be broken after its underscores, equals signs and dots, and nowhere else."""
    parts = re.split(r"(?<=[_=.])(?=\w)", name)
    return join(parts, "<wbr>")


def _entry(entry: Entry, head: Head) -> Safe:
    below = [tag("div", line) for line in entry.below]
    if head.left and below:
        return tag("td", *below, class_="range")
    if head.left:
        signs = [tag("abbr", sign, title=means, class_="dirty") for sign, means in entry.marks]
        return tag(
            "th",
            tag("span", breaking(entry.text), class_="name"),
            *(join([" ", sign]) for sign in signs),
            tag("span", breaking(entry.note), class_="variant") if entry.note else "",
            scope="row",
            data_value=f"{entry.text} {entry.note}".strip(),
        )
    if head.count:
        return tag("td", entry.text, data_value=f"{entry.value:g}", class_="n")
    if entry.value is None or not math.isfinite(entry.value):
        word = entry.text if entry.value is None else UNDEFINED
        return tag("td", word, data_value="", class_="none")
    return tag(
        "td",
        tag("span", entry.text.replace("-", "−"), class_="mean best" if entry.best else "mean"),
        *(tag("abbr", sign, title=means) for sign, means in entry.marks),
        tag("span", f"{entry.short}{entry.few}".replace("-", "−"), class_="ci")
        if entry.short
        else "",
        data_value=repr(entry.value),
    )


# ----------------------------------------------------------------------------- the leaderboard


def target_tables(
    table: Table, columns: Sequence[Metric], ends: Mapping[str, End] = MappingProxyType({})
) -> Safe:
    """A table for each target of a setting, with its marks explained below.

    Args:
        table: of the leaderboard.
        columns: what is shown where a row has it.
        ends: by target, the suspicious end that the records declare.
    """
    rows = table.shown_rows
    parts: list[object] = []
    for target in dict.fromkeys(row.target for row in rows):
        sheet = _sheet(table, [row for row in rows if row.target == target], columns)
        name = slug(f"{table.task}-{table.setting[:8]}-{target}")
        title, order = caption_of(target, ends), _order(sheet)
        parts.append(written(sheet, title, kind="board", name=name, order=order))
        limits = [row for row in table.limits if row.target == target]
        if limits:
            own = _sheet(table, limits, columns, ranked=False)
            parts.append(written(replace(own, title="By retraining"), title, kind="limits"))
    parts.append(tag("ul", *(tag("li", line) for line in _notes(table, columns)), class_="notes"))
    cells = cell_lines(table)
    if cells:
        words = [tag("h4", "Not in the averages")]
        lines = [tag("li", line, class_=line.split(":", 1)[0]) for line in cells]
        parts.append(tag("div", *words, tag("ul", *lines), class_="missing"))
    return join(parts)


def _order(sheet: Sheet) -> tuple[int, str]:
    """The leaderboard's order: by AUROC, the best first, where there is one, else by name."""
    labels = [head.label for head in sheet.heads]
    return (labels.index("AUROC"), "descending") if "AUROC" in labels else (0, "ascending")


def _notes(table: Table, columns: Sequence[Metric]) -> list[str]:
    """The leaderboard's notes; ties are marked here in every column."""
    lines = [line for line in notes(table, columns) if not line.startswith(TIED)]
    if any(row.ties for row in table.rows):
        lines.insert(
            1,
            f"Bold: the best of a column. {TIED} tie with it: the 95 % interval of the "
            "difference, paired by seed, holds 0, or from six seeds on a sign-flip test does not "
            "find it significant.",
        )
    return lines


def _sheet(
    table: Table, rows: Sequence[Row], columns: Sequence[Metric], ranked: bool = True
) -> Sheet:
    """All columns that one of the rows shows, those of one kind side by side."""
    groups: dict[str, list[Metric]] = {}
    for column in columns:
        if any(shows(row, column) for row in rows):
            kind = BETWEEN[column.source] if column.table == BETWEEN_RUNS else column.table
            groups.setdefault(kind, []).append(column)
    shown = [(column, kind) for kind, own in groups.items() for column in own]
    best = {column.key: _best(rows, column) if ranked else math.nan for column, _ in shown}
    lines = [
        Line(
            row.target,
            (
                _name(row),
                Entry(seeds_of(row, table) if ranked else NONE, value=len(row.seeds)),
                *(_number(row, column, best[column.key]) for column, _ in shown),
            ),
        )
        for row in rows
    ]
    heads = [Head("estimator", left=True), Head("n", count=True)]
    heads += [head_of(column, kind) for column, kind in shown]
    return Sheet(table.task, tuple(heads), tuple(lines))


def _name(row: Row) -> Entry:
    note = row.label.removeprefix(row.estimator).strip()
    if row.watched == 0:
        note = "(groups alone, see below)"
    return Entry(row.estimator, note, ((DIRTY, MADE_DIRTY),) if row.dirty else ())


def _number(row: Row, column: Metric, best: float) -> Entry:
    entry = entry_of(row, column)
    first = entry.value == best and row.watched is None and column.source != "cost"
    tie = ((TIED, "tie with the best"),) if column.key in row.ties else ()
    return replace(entry, best=first, marks=tie)


def _best(rows: Sequence[Row], column: Metric) -> float:
    """The best mean of a column among rows that score all examples."""
    means = [
        row.stats[column.key].mean
        for row in rows
        if row.watched is None
        and column.key in row.stats
        and math.isfinite(row.stats[column.key].mean)
    ]
    if not means or not column.better:
        return math.nan
    return max(means) if column.better == "higher" else min(means)
