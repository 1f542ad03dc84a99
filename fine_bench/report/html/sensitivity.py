"""The ranges of options of a task as an HTML table: own value, and from lowest to highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from fine_bench.leaderboard.sensitivity import Spread, columns_of
from fine_bench.leaderboard.sensitivity_tables import NOTES, missing_of, sheet_of
from fine_bench.report.figures.titles import caption_of
from fine_bench.report.html.markup import Safe, join, tag
from fine_bench.report.html.tables import written
from fine_bench.types import End


def ranges(spreads: Sequence[Spread], ends: Mapping[str, End] = MappingProxyType({})) -> Safe:
    """All ranges of a table of the leaderboard, the reading rules above, what is missing below."""
    columns = columns_of(spreads)
    parts: list[object] = [tag("ul", *(tag("li", note) for note in NOTES), class_="notes")]
    for target in dict.fromkeys(spread.target for spread in spreads):
        mine = [spread for spread in spreads if spread.target == target]
        shown = [c for c in columns if any(c.key in spread.bands for spread in mine)]
        sheet = replace(sheet_of(mine, shown, "page"), title="Sensitivity to options")
        parts.append(written(sheet, caption_of(target, ends), kind="plain bands"))
    gaps = missing_of(spreads)
    if gaps:
        lines = tag("ul", *(tag("li", line) for line in gaps), class_="missing")
        parts += [tag("h4", "Not in the bands"), lines]
    return join(parts)
