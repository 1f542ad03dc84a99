"""Whatever ``conf/estimator`` offers has been run, and its numbers are published.

A method without a number in a published table is untested where it matters, and a reader cannot
choose it. Exceptions are named with what stands against them; the list may only shrink.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEADERBOARD = ROOT / "results" / "published" / "leaderboard.md"

MOST = 0
"""Length of the list below: lower it with the list, never raise it."""

WITHOUT_RESULTS: dict[str, str] = {}


def names() -> set[str]:
    return {path.stem for path in (ROOT / "conf" / "estimator").glob("*.yaml")}


def published() -> set[str]:
    """Rows of the leaderboard with a number, and of the tables that scripts have made."""
    rows = [x.strip("| ").split("|") for x in LEADERBOARD.read_text().splitlines() if x[:1] == "|"]
    measured = {
        re.sub(r" \(.*| [=†]+$", "", cells[1].strip())
        for cells in rows
        if any(re.match(r" *-?\d+\.\d", cell) for cell in cells[2:])
    }
    tables = [*(ROOT / "results").glob("*.md"), *(ROOT / "results" / "gain").glob("*.md")]
    lines = [x for path in tables for x in path.read_text().splitlines() if x.startswith("|")]
    cells = {re.sub(r" \(.*|[`*]", "", cell).strip() for x in lines for cell in x.split("|")}
    return measured | cells


def test_every_method_has_a_row_in_a_published_table() -> None:
    missing = names() - published()
    assert sorted(missing - set(WITHOUT_RESULTS)) == [], "run it and publish, or say why not"


def test_the_list_of_exceptions_only_shrinks() -> None:
    assert sorted(set(WITHOUT_RESULTS) - names()) == []
    assert len(WITHOUT_RESULTS) <= MOST
    assert all(len(reason) >= 20 for reason in WITHOUT_RESULTS.values())
