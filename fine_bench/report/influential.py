"""The page of the samples that drive the given completions: one file, without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fine_bench.report.html.markup import Safe, document, join, number, tag

STYLE = Path(__file__).parent / "html" / "report.css"
SHOWN = 500
"""Samples on the page; the csv has all."""
LONGEST = 2_000
"""Characters of a prompt or a completion."""


def influential_page(table: pd.DataFrame, *, title: str, about: str) -> bytes:
    """The first ``SHOWN`` samples of a list, as cards.

    Args:
        table: as ``fine_bench.runner.influential`` makes it, the largest μ first.
        title: of the page.
        about: a sentence on what the list is of.
    """
    n = min(SHOWN, len(table))
    first = f"The first {n:,} of {len(table):,} samples; the csv beside this page has all."
    body = join(
        [
            tag("header", tag("h1", title)),
            tag(
                "main",
                tag("p", about),
                tag("p", "All samples." if n == len(table) else first, class_="hint"),
                tag("ol", *map(_card, table.head(n).to_dict("records")), class_="gallery texts"),
            ),
        ]
    )
    return document(title=title, style=STYLE.read_text(encoding="utf-8"), script="", body=body)


def _card(row: Mapping[Any, Any]) -> Safe:
    facts = [("μ", interval(row)), ("source", row["source"] or "unknown")]
    facts += [("line", row["line"]), ("runs", row["runs"])]
    if row.get("poison") is not None:
        facts.append(("known as poison", "yes" if row["poison"] else "no"))
    return tag(
        "li",
        tag("p", f"#{row['rank']}"),
        *(
            tag("p", tag("span", who, class_="who"), _short(str(row[who])), class_="said")
            for who in ("prompt", "completion")
        ),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts)),
        class_="card",
    )


def interval(row: Mapping[Any, Any]) -> str:
    """μ with its interval, which is left out where there is none."""
    mu, low, high = (float(row[name]) for name in ("mu", "mu_low", "mu_high"))
    if math.isnan(low):
        return f"{number(mu)} (no interval)"
    return f"{number(mu)} [{number(low)}, {number(high)}]"


def _short(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}…"
