"""The ranges of options of a task as an HTML table: own value, and from lowest to highest."""

from __future__ import annotations

from collections.abc import Sequence

from fine_bench.leaderboard import sensitivity_tables
from fine_bench.leaderboard.board import Column
from fine_bench.leaderboard.render import NONE
from fine_bench.leaderboard.sensitivity import Spread, columns_of
from fine_bench.report.figures.benchmark import TARGET_TITLES
from fine_bench.report.html.markup import Safe, join, tag


def ranges(spreads: Sequence[Spread]) -> Safe:
    """All ranges of a table of the leaderboard, the reading rules above, what is missing below."""
    columns = columns_of(spreads)
    targets = list(dict.fromkeys(spread.target for spread in spreads))
    gaps = [line for spread in spreads for line in sensitivity_tables.missing_of(spread)]
    missing = (
        [
            tag("h4", "Not in the bands"),
            tag("ul", *(tag("li", line) for line in gaps), class_="missing"),
        ]
        if gaps
        else []
    )
    return join(
        [
            tag("ul", *(tag("li", note) for note in sensitivity_tables.NOTES), class_="notes"),
            *(_table([s for s in spreads if s.target == t], t, columns) for t in targets),
            *missing,
        ]
    )


def _table(spreads: Sequence[Spread], target: str, columns: Sequence[Column]) -> Safe:
    title = TARGET_TITLES.get(target, f"target {target}")
    shown = [c for c in columns if any(c.key in spread.bands for spread in spreads)]
    heads = ["estimator", "range, its own value first"]
    heads += [f"{c.label} {'↑' if c.higher else '↓'}" for c in shown]
    body = [
        tag(
            "tr",
            tag("th", spread.estimator, scope="row"),
            tag("td", *(tag("div", line) for line in _about(spread)), class_="range"),
            *(_cell(spread, column) for column in shown),
        )
        for spread in spreads
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", "Sensitivity to options · ", title),
            tag("thead", tag("tr", *(tag("th", name, scope="col") for name in heads))),
            tag("tbody", *body),
            class_="plain bands",
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=f"sensitivity, {title}",
    )


def _about(spread: Spread) -> list[str]:
    """The range, over which seeds, and how much of it is there."""
    seeds = f"{'seeds' if len(spread.seeds) > 1 else 'seed'} {', '.join(map(str, spread.seeds))}"
    lines = [f"{line};" for line in sensitivity_tables.option_lines(spread)]
    return [*lines, f"{seeds}; {spread.finished} of {spread.expected} cells"]


def _cell(spread: Spread, column: Column) -> Safe:
    band = spread.bands.get(column.key)
    if band is None:
        return tag("td", NONE, class_="none")
    few = "" if band.n == spread.configurations else f" of {band.n}"
    return tag(
        "td",
        tag("span", sensitivity_tables.own_of(band), class_="mean"),
        tag("span", sensitivity_tables.range_of(band), few, class_="ci"),
    )
