"""How bands look: terminal, Markdown, csv, and their files. No number is computed here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd
from rich.console import Console
from rich.text import Text

from fine_bench.leaderboard import sheet as sheets
from fine_bench.leaderboard.captions import one_line
from fine_bench.leaderboard.sensitivity import Spread, columns_of
from fine_bench.leaderboard.sheet import NONE, Entry, Head, Line, Sheet, head_of, markdown, number
from fine_bench.metrics.registry import Metric
from fine_bench.store import spreadsheet
from fine_bench.store.files import write_atomic
from fine_bench.terminal import visible

NOTES = (
    "A number is the mean with the row's own options. Its band goes from the lowest to the highest "
    "mean over a preset range of options, the row's own among them; it is no confidence interval.",
    "Every mean is over the run seeds that are named. A configuration that lacks one of them is in "
    "no band, and its cells are named below.",
    "The ranges were declared before they were run. Nothing is chosen by the truth: the "
    "leaderboard shows each row with its own options only, and no table says which configuration "
    "stands at an end.",
)

SHOWN = ("auroc", "average_precision", "fidelity", "lds", "consistency_spearman")
"""What the terminal shows; the other columns are in the files."""

Form: TypeAlias = Literal["narrow", "wide", "page"]
"""How much a table says of a range: for a terminal, a file, a page."""


def sheet_of(found: Sequence[Spread], columns: Sequence[Metric], form: Form) -> Sheet:
    """The ranges of one table of the leaderboard, a line each."""
    first: dict[Form, list[Head]] = {
        "narrow": [Head("seeds", left=True), Head("cells", count=True)],
        "wide": [
            Head("options, its own value first", left=True),
            Head("seeds", left=True),
            Head("configurations"),
            Head("cells"),
        ],
        "page": [Head("range, its own value first", left=True)],
    }
    heads = [Head("estimator", left=True), *first[form], *map(head_of, columns)]
    lines = [Line(s.target, (*_about(s, form), *(_band(s, c) for c in columns))) for s in found]
    title = f"{found[0].task} · setting {found[0].setting[:8]}" if found else ""
    return Sheet(title, tuple(heads), tuple(lines))


def _about(spread: Spread, form: Form) -> list[Entry]:
    """The range's name, what it varies, over which seeds, and how much of it is there."""
    options = [
        f"{name} {' | '.join(map(_word, values))}" for name, values in spread.options.items()
    ]
    name, seeds = Entry(spread.estimator), ", ".join(map(str, spread.seeds))
    cells = f"{spread.finished}/{spread.expected}"
    if form == "narrow":
        return [replace(name, below=("; ".join(options),)), Entry(seeds), Entry(cells)]
    if form == "wide":
        numbers = [f"{len(spread.seeds)} ({seeds})", str(spread.configurations), cells]
        return [name, Entry("; ".join(options)), *map(Entry, numbers)]
    word = "seeds" if len(spread.seeds) > 1 else "seed"
    there = f"{word} {seeds}; {spread.finished} of {spread.expected} cells"
    return [name, Entry("", below=(*(f"{option};" for option in options), there))]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _band(spread: Spread, column: Metric) -> Entry:
    band = spread.bands.get(column.key)
    if band is None:
        return Entry(NONE)
    few = "" if band.n == spread.configurations else f" of {band.n}"
    return replace(number(band.own, band.lowest, band.highest), few=few)


def missing_of(found: Iterable[Spread]) -> list[str]:
    """What is not there, each line with the row's name."""
    return [f"{s.estimator} · {s.target} · {one_line(line)}" for s in found for line in s.missing]


def _tables(found: Sequence[Spread]) -> list[list[Spread]]:
    return [list(group) for _, group in groupby(found, lambda s: (s.task, s.setting, s.data))]


def show(found: Sequence[Spread], console: Console | None = None) -> None:
    """Print the tables, at most 100 columns wide."""
    for mine in _tables(found):
        columns = [c for c in columns_of(mine) if c.key in SHOWN]
        sheet = sheet_of(mine, columns, "narrow")
        table = sheets.rich_table(sheet, f"{sheet.title} · sensitivity to options")
        gaps = (Text(line, style="red") for line in missing_of(mine))
        sheets.show([table, *gaps], console)
    sheets.show((Text(line, style="dim") for line in NOTES if found), console)


def to_markdown(found: Sequence[Spread]) -> str:
    """All bands as Markdown."""
    lines = ["# Sensitivity to options", ""]
    lines += ["Rebuilt from the records by `fine-bench sensitivity`.", ""]
    for note in NOTES:
        lines += [note, ""]
    for mine in _tables(found):
        sheet = sheet_of(mine, columns_of(mine), "wide")
        lines += [f"## {sheet.title}", "", *markdown(sheet), ""]
        gaps = missing_of(mine)
        if gaps:
            lines += ["Not in the bands:", "", *(f"- {line}" for line in gaps), ""]
    return "\n".join(map(visible, lines)).rstrip("\n") + "\n"


def to_csv(found: Sequence[Spread]) -> str:
    """One line a row, target and number, at full precision."""
    lines = []
    for s in found:
        about = {
            "task": s.task,
            "setting": s.setting,
            "data_sha256": s.data,
            "target": s.target,
            "estimator": s.estimator,
            "estimator_hash": s.estimator_hash,
            "options": json.dumps(dict(s.options), sort_keys=True),
            "seeds": " ".join(map(str, s.seeds)),
            "n_seeds": len(s.seeds),
            "configurations": s.configurations,
            "cells_finished": s.finished,
            "cells_expected": s.expected,
        }
        for column in columns_of([s]):
            band = asdict(s.bands[column.key])
            few = {"configurations_in_band": band.pop("n"), "missing": "; ".join(s.missing)}
            lines.append({**about, "metric": column.key, **band, **few})
    return spreadsheet.to_csv(pd.DataFrame(lines))


def write(found: Sequence[Spread], root: Path) -> list[Path]:
    """Write ``sensitivity.md`` and ``sensitivity.csv`` below ``root``, each whole or not at all.

    Raises:
        StoreError: a file cannot be written; the message names it.
    """
    texts = {"sensitivity.md": to_markdown(found), "sensitivity.csv": to_csv(found)}
    for name, text in texts.items():
        write_atomic(root / name, text.encode())
    return [root / name for name in texts]
