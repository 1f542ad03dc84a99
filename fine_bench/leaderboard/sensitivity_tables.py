"""How bands look: terminal, Markdown, csv. No number is computed here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fine_bench.leaderboard.board import Column
from fine_bench.leaderboard.render import NONE, WIDTH, markdown_table, one_line, short
from fine_bench.leaderboard.sensitivity import Band, Spread, columns_of

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


def own_of(band: Band) -> str:
    """The row's own mean."""
    return f"{band.own:.3f}" if math.isfinite(band.own) else "undefined"


def range_of(band: Band) -> str:
    """``.930–.962``."""
    return f"{short(band.lowest)}–{short(band.highest)}"


def option_lines(spread: Spread) -> list[str]:
    """``refresh_every 20 | 5 | 100`` for each option, the row's own value first."""
    return [f"{name} {' | '.join(map(_word, values))}" for name, values in spread.options.items()]


def options_of(spread: Spread) -> str:
    """``option_lines`` in one line."""
    return "; ".join(option_lines(spread))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def seeds_of(spread: Spread) -> str:
    """``3 (0, 1, 2)``."""
    return f"{len(spread.seeds)} ({', '.join(map(str, spread.seeds))})"


def missing_of(spread: Spread) -> list[str]:
    """What is not there, each line with the row's name."""
    return [f"{spread.estimator} · {spread.target} · {one_line(m)}" for m in spread.missing]


def _tables(found: Sequence[Spread]) -> list[tuple[tuple[str, str, str], list[Spread]]]:
    def where(s: Spread) -> tuple[str, str, str]:
        return s.task, s.setting, s.data

    return [(key, list(group)) for key, group in groupby(found, key=where)]


def show(found: Sequence[Spread], console: Console | None = None) -> None:
    """Print the tables, at most 100 columns wide."""
    if console is None:
        console = Console(highlight=False)
        wide = not console.is_terminal or console.width >= WIDTH
        console = Console(highlight=False, width=WIDTH if wide else console.width)
    for (task, setting, _), mine in _tables(found):
        columns = [c for c in columns_of(mine) if c.key in SHOWN]
        table = RichTable(
            box=box.SIMPLE_HEAD,
            width=WIDTH,
            pad_edge=False,
            collapse_padding=True,
            title=f"{task} · setting {setting[:8]} · sensitivity to options",
            title_justify="left",
            title_style="bold",
        )
        table.add_column("estimator", overflow="fold", ratio=1)
        table.add_column("target", overflow="fold")
        table.add_column("seeds", overflow="fold")
        table.add_column("cells", justify="right", no_wrap=True)
        for column in columns:
            table.add_column(column.label, no_wrap=True)
        for s in mine:
            numbers = [_piece(s.bands.get(c.key)) for c in columns]
            name = Text.assemble(s.estimator, (f"\n{options_of(s)}", "dim"))
            seeds = ", ".join(map(str, s.seeds))
            table.add_row(name, s.target, seeds, f"{s.finished}/{s.expected}", *numbers)
        console.print(table)
        for line in (line for s in mine for line in missing_of(s)):
            console.print(Text(line, style="red"))
    for line in NOTES if found else ():
        console.print(Text(line, style="dim"))


def _piece(band: Band | None) -> Text:
    if band is None:
        return Text(NONE)
    return Text.assemble(own_of(band), (f"\n{range_of(band)}", "dim"))


def to_markdown(found: Sequence[Spread]) -> str:
    """All bands as Markdown."""
    lines = ["# Sensitivity to options", ""]
    lines += ["Rebuilt from the records by `python -m fine_bench.sensitivity`.", ""]
    for note in NOTES:
        lines += [note, ""]
    for (task, setting, _), mine in _tables(found):
        columns = columns_of(mine)
        head = ["target", "estimator", "options, its own value first", "seeds", "configurations",
                "cells", *(_heading(c) for c in columns)]  # fmt: skip
        body = [
            [s.target, s.estimator, options_of(s), seeds_of(s), str(s.configurations),
             f"{s.finished}/{s.expected}", *(_markdown(s, c) for c in columns)]
            for s in mine
        ]  # fmt: skip
        lines += [f"## {task} · setting {setting[:8]}", ""]
        lines += [*markdown_table(head, body, left=4), ""]
        gaps = [line for s in mine for line in missing_of(s)]
        if gaps:
            lines += ["Not in the bands:", "", *(f"- {line}" for line in gaps), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _heading(column: Column) -> str:
    return f"{column.label} {'↑' if column.higher else '↓'}"


def _markdown(spread: Spread, column: Column) -> str:
    band = spread.bands.get(column.key)
    if band is None:
        return NONE
    ends = f"{band.lowest:.3f}, {band.highest:.3f}"
    few = "" if band.n == spread.configurations else f" of {band.n}"
    return f"{own_of(band)} [{ends}]{few}"


def to_csv(found: Sequence[Spread]) -> str:
    """One line a row, target and number, at full precision."""
    lines = [
        {
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
            "metric": column.key,
            "own": s.bands[column.key].own,
            "lowest": s.bands[column.key].lowest,
            "highest": s.bands[column.key].highest,
            "configurations_in_band": s.bands[column.key].n,
            "missing": "; ".join(s.missing),
        }
        for s in found
        for column in columns_of([s])
    ]
    return str(pd.DataFrame(lines).to_csv(index=False, lineterminator="\n"))
