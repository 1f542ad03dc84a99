"""The headline numbers of the overview: a line a task and target, the best method beside f-INE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fine_bench.leaderboard.tables import Row, Table
from fine_bench.report.html.markup import Safe, number, tag
from fine_bench.report.html.tables import breaking

F_INE = ("fine", "fine_llm", "fine_queries")
"""The row that the overview sets beside the best one: the first of these that a target has."""


class Question(NamedTuple):
    """What a pair of columns answers, and by which numbers: the first that a target has."""

    words: str
    measures: tuple[str, ...]


QUESTIONS = (
    Question("finds bad examples: AUROC", ("auroc",)),
    Question("finds the same ones again: Jaccard@k, corrected", ("consistency_jaccard_corrected",)),
    Question("says what retraining shows: fidelity, or LDS of queries", ("fidelity", "lds")),
)


class Headline(NamedTuple):
    """A table of the leaderboard and where the page has it."""

    title: str
    anchor: str
    table: Table


def headlines(tables: Sequence[Headline]) -> list[Safe]:
    """The table, with its heading; nothing where no row has one of the numbers.

    Best is the highest mean over seeds among rows that score all examples, controls among them.
    """
    lines = [
        (headline, target, cells)
        for headline in tables
        for target in dict.fromkeys(row.target for row in headline.table.rows)
        if any(cells := _cells(headline.table, target))
    ]
    asked = [i for i in range(len(QUESTIONS)) if any(cells[i] for _, _, cells in lines)]
    if not lines:
        return []
    above = [tag("th", QUESTIONS[i].words, scope="colgroup", colspan=2) for i in asked]
    below = [tag("th", name, scope="col") for _ in asked for name in ("best", "f-INE")]
    body = []
    for headline, target, cells in lines:
        link = tag("a", breaking(headline.title), href=f"#{headline.anchor}")
        values = [cell for i in asked for cell in (cells[i] or (_nothing(), _nothing()))]
        body.append(tag("tr", tag("th", link, scope="row"), tag("td", target), *values))
    table = tag(
        "table",
        tag(
            "thead",
            tag("tr", tag("td", colspan=2), *above),
            tag("tr", tag("th", "task", scope="col"), tag("th", "target", scope="col"), *below),
        ),
        tag("tbody", *body),
        class_="plain headlines",
    )
    return [
        tag("h3", "Headline numbers"),
        tag("div", table, class_="scroll", role="region", tabindex="0",
            aria_label="headline numbers"),
    ]  # fmt: skip


def _cells(table: Table, target: str) -> list[tuple[Safe, Safe] | None]:
    """For each question the best row and f-INE's; None where no row has the number."""
    rows = [row for row in table.rows if row.target == target and row.watched is None]
    found: list[tuple[Safe, Safe] | None] = []
    for question in QUESTIONS:
        measure = next((m for m in question.measures if any(_has(row, m) for row in rows)), None)
        if measure is None:
            found.append(None)
            continue
        having = [row for row in rows if _has(row, measure)]
        best = max(having, key=lambda row: row.stats[measure].mean)
        ours = [row for name in F_INE for row in having if row.estimator == name]
        found.append((_cell(best, measure), _cell(ours[0], measure) if ours else _nothing()))
    return found


def _has(row: Row, measure: str) -> bool:
    return measure in row.stats and math.isfinite(row.stats[measure].mean)


def _cell(row: Row, measure: str) -> Safe:
    stat = row.stats[measure]
    ends = f"{number(stat.lower, 2)}–{number(stat.upper, 2)}" if math.isfinite(stat.lower) else ""
    who = "" if row.estimator == F_INE[0] else tag("span", breaking(row.label), class_="who")
    return tag(
        "td",
        tag("span", number(stat.mean, 3), class_="mean"),
        tag("span", ends, class_="ci") if ends else "",
        who,
    )


def _nothing() -> Safe:
    return tag("td", "–", class_="none")
