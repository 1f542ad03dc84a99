"""How a leaderboard looks: terminal tables, Markdown, csv, JSON. No number is computed here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from fine_bench.metrics.intervals import MIN_SEEDS_FOR_SIGNIFICANCE
from fine_bench.store.files import write_atomic

if TYPE_CHECKING:  # the board builds on this module, which knows its types by name only
    from fine_bench.leaderboard.board import Column, Leaderboard, Row, Stat, Table

WIDTH = 100
NAME_WIDTH = 18
INDENT = 1
DIRTY = "†"
TIED = "="
NONE = "–"
TRUTH_VERSION = "truth_version"
STATS = ("mean", "lower", "upper", "n")

TOOK = "steering_took"
# name among the facts of training, label, unit
TRAINING_FACTS = (
    ("test_accuracy", "test accuracy", ""),
    ("seconds", "plain training", " s a seed"),
    ("steering_rate", "steering rate", ""),
    ("steering_rate_reference", "of the reference", ""),
    ("steering_rate_others", "on others", ""),
    (TOOK, "the poison took", " of the seeds"),
)


# -------------------------------------------------------------------------------------- pieces


def _three(x: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{x if round(x, 3) else 0.0:.3f}"


def short(x: float) -> str:
    """Three decimals without the zero before the point, for the ends of an interval."""
    return _three(x).replace("0.", ".", 1) if abs(x) < 0.9995 else _three(x)


def amount_of(x: float) -> str:
    """A cost with three significant digits."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    return f"{x:,.{min(digits, 4)}f}"


def _mean(stat: Stat | None, amount: bool) -> str:
    if stat is None:
        return NONE
    if math.isnan(stat.mean):
        return "undefined"
    return amount_of(stat.mean) if amount else _three(stat.mean)


def _has_interval(stat: Stat | None) -> bool:
    return stat is not None and math.isfinite(stat.lower) and math.isfinite(stat.mean)


def _number(stat: Stat | None, amount: bool) -> tuple[str, str]:
    """Mean and interval, ``("0.951", ".943–.958")``; the interval is empty where there is none."""
    if stat is None or not _has_interval(stat):
        return _mean(stat, amount), ""
    end = amount_of if amount else short
    return _mean(stat, amount), f"{end(stat.lower)}–{end(stat.upper)}"


def _markdown_number(stat: Stat | None, amount: bool) -> str:
    text = _mean(stat, amount)
    if stat is not None and _has_interval(stat):
        low, high = (amount_of(x) if amount else _three(x) for x in (stat.lower, stat.upper))
        text += f" [{low}, {high}]"
    return text


def _name(row: Row, columns: Iterable[Column] = ()) -> str:
    """The row's label with its marks; a tie is one in the first of the columns that has ties."""
    leading = next((c.key for c in columns if c.source != "cost" and c.key in row.stats), "")
    marks = (TIED if leading in row.ties else "") + (DIRTY if row.dirty else "")
    return f"{row.label} {marks}" if marks else row.label


def seeds_of(row: Row, table: Table) -> str:
    """Number of finished seeds, ``5/6`` where others have more."""
    n, all_seeds = len(row.seeds), len(table.seeds)
    return str(n) if n == all_seeds else f"{n}/{all_seeds}"


def _blocks(board: Leaderboard, table: Table) -> dict[str, tuple[list[Column], list[Row]]]:
    """The tables of a setting: their columns and rows. Some stand only where there are numbers."""
    rows = shown_rows(table)
    plain = [c for c in board.columns if not c.block]
    usual = {
        "detection": [c for c in plain if c.source == "metrics"],
        "consistency over seeds, and cost": [c for c in plain if c.source != "metrics"],
    }
    blocks = {name: (columns, rows) for name, columns in usual.items() if columns}
    for name, needs in dict.fromkeys((c.block, c.needs) for c in board.columns if c.block):
        some = [row for row in rows if needs in row.stats]
        columns = [c for c in board.columns if c.block == name and _anybody_has(c, some)]
        if columns:
            blocks[name] = (columns, some)
    return blocks


def _anybody_has(column: Column, rows: Iterable[Row]) -> bool:
    return any(column.key in row.stats for row in rows)


def _with_truth(rows: Iterable[Row]) -> list[Row]:
    """The rows that were compared with a ground truth, and say with which version."""
    return [row for row in rows if TRUTH_VERSION in row.stats]


def _heading(column: Column) -> str:
    return f"{column.label} {'↑' if column.higher else '↓'}"


def title(table: Table) -> str:
    """Task and digest of the setting."""
    return f"{table.task} · setting {table.setting[:8]}"


_WORDS = {
    "n_train": "{} training examples",
    "noise_rate": "noise rate {}",
    "n_query": "{} queries",
    "model": "{}",
    "max_epochs": "{} epochs",
    "batch_size": "batch {}",
}


def _value(name: str, value: Any) -> str:
    if value is None:
        value = "all" if name == "n_train" else "none"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return _WORDS.get(name, f"{name} {{}}").format(value)


def caption(table: Table) -> list[str]:
    """The setting in words, and what plain training gave."""
    lines = [" · ".join(_value(name, value) for name, value in table.options.items())]
    facts = []
    for name, label, unit in TRAINING_FACTS:
        stat = table.training.get(name)
        if stat is not None and name != TOOK:
            facts.append(f"{label} {_markdown_number(stat, bool(unit))}{unit} (n = {stat.n})")
    lines.append(" · ".join(facts))
    return [line for line in lines if line]


def notes(table: Table) -> list[str]:
    """What the reader must know to read the numbers and marks of a table."""
    lines = ["Mean over n run seeds with its 95 % interval (bootstrap over seeds)."]
    if any(row.ties for row in table.rows):
        lines.append(
            f"{TIED} tie in the table's first column with the best of its target: the 95 % "
            "interval of the difference, paired by seed, holds 0, or from six seeds on a sign-flip "
            "test does not find it significant."
        )
    if max((len(row.seeds) for row in table.rows), default=0) < MIN_SEEDS_FOR_SIGNIFICANCE:
        lines[0] += (
            f" Fewer than six seeds: a row without {TIED} is not thereby significantly worse."
        )
    if table.k:
        lines.append(
            f"Jaccard@k: k = {table.k:,}, the number of bad examples; corrected: for chance."
        )
    took = table.training.get(TOOK)
    if took is not None:
        many = round(took.mean * took.n)
        lines.append(
            f"Whether the poison took was measured on held-out prompts: it did in {many} of "
            f"{took.n} seeds."
            + (" No detection is reported for the others." if many < took.n else "")
        )
    if any("recall_top_20" in row.stats for row in table.rows):
        lines.append(
            "Variation: median over the examples of the coefficient of variation of their scores "
            "over the seeds."
        )
    if any(row.watched is not None for row in table.rows):
        lines.append(
            "(… examples): scores a sample of the training examples; all of its numbers, and its "
            "k, are of that sample."
        )
    versions = sorted({row.stats[TRUTH_VERSION].mean for row in _with_truth(table.rows)})
    if versions:
        lines.append(
            "Fidelity: Spearman with the influence that retraining shows (ground truth version "
            f"{', '.join(f'{x:g}' for x in versions)}); of ceiling: divided by the highest value "
            "that the noise of that truth allows; LDS: prediction of models trained on subsets."
        )
    if any(
        math.isnan(stat.mean)
        for row in table.rows
        for key, stat in row.stats.items()
        if key.startswith(("consistency_", "fidelity", "lds"))
    ):
        lines.append("undefined: a score that is constant over the examples ranks nothing.")
    if any(row.dirty for row in table.rows):
        lines.append(f"{DIRTY} made by code with uncommitted changes.")
    return lines


def one_line(text: str, limit: int = 300) -> str:
    """``text`` without line breaks, cut at ``limit`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def cell_lines(table: Table) -> list[str]:
    """``failed: fine · self · seeds 1, 2: why``, cells that share a reason together."""
    by_name: dict[tuple[str, ...], list[int]] = {}
    for cell in table.cells:
        name = f"{cell.estimator} ({cell.variant})" if cell.variant else cell.estimator
        key = (cell.state, cell.target, one_line(cell.reason), name)
        by_name.setdefault(key, []).append(cell.seed)
    together: dict[tuple[str, str, str, tuple[int, ...]], list[str]] = {}
    for (state, target, reason, name), seeds in by_name.items():
        together.setdefault((state, target, reason, tuple(seeds)), []).append(name)
    lines = []
    for (state, target, reason, runs), names in together.items():
        numbers = ", ".join(map(str, runs))
        word = "seed" if len(runs) == 1 else "seeds"
        lines.append(f"{state}: {', '.join(names)} · {target} · {word} {numbers}: {reason}")
    return lines


def shown_rows(table: Table) -> list[Row]:
    """The rows that have a number, or lack it by a fault; the others stand in ``cell_lines``."""
    faults = {
        (cell.estimator, cell.estimator_hash, cell.target)
        for cell in table.cells
        if cell.state != "skipped"
    }
    return [
        row
        for row in table.rows
        if row.seeds or (row.estimator, row.estimator_hash, row.target) in faults
    ]


# ------------------------------------------------------------------------------------ terminal


def _rich_table(table: Table, block: str, columns: list[Column], rows: list[Row]) -> RichTable:
    rich = RichTable(
        box=box.SIMPLE_HEAD,
        width=WIDTH,
        pad_edge=False,
        collapse_padding=True,
        title=f"{title(table)} · {block}",
        title_justify="left",
        title_style="bold",
    )
    numbers = [[_number(row.stats.get(c.key), c.source == "cost") for c in columns] for row in rows]
    # where the intervals do not fit beside the means, they stand below them
    longest = max((len(_name(row, columns)) + INDENT for row in rows), default=0)
    wide = min(longest, NAME_WIDTH) + len("10/10") + 2 * len(columns) + 2
    for i, column in enumerate(columns):
        cells = [f"{mean} {interval}".strip() for mean, interval in (line[i] for line in numbers)]
        wide += max(map(len, [_heading(column), *cells]))
    gap = " " if wide <= WIDTH else "\n"
    rich.add_column("estimator", overflow="fold", ratio=1)
    rich.add_column("n", justify="right", no_wrap=True)
    for column in columns:
        rich.add_column(_heading(column), overflow="fold")
    target = None
    for row, line in zip(rows, numbers, strict=True):
        if row.target != target:
            target = row.target
            rich.add_row(Text(target, style="bold"))
        parts = [
            Text.assemble(mean, (f"{gap}{interval}" if interval else "", "dim"))
            for mean, interval in line
        ]
        rich.add_row(
            Padding(Text(_name(row, columns)), (0, 0, 0, INDENT)), seeds_of(row, table), *parts
        )
    return rich


def renderables(board: Leaderboard) -> Iterator[RenderableType]:
    """What a Rich console prints; fits 100 columns."""
    for table in board.tables:
        for i, (block, (columns, rows)) in enumerate(_blocks(board, table).items()):
            yield _rich_table(table, block, columns, rows)
            if i == 0:
                yield Text("\n".join(caption(table)) + "\n")
        yield Text("\n".join(notes(table)), style="dim")
        for line in cell_lines(table):
            yield Text(line, style="yellow" if line.startswith("skipped") else "red")
        yield Text("")
    for problem in board.problems:
        yield Text(f"problem: {one_line(problem)}", style="red")


def show(board: Leaderboard, console: Console | None = None) -> None:
    """Print the tables, at most 100 columns wide, to the terminal or to ``console``."""
    if console is None:
        console = Console(highlight=False)
        wide = not console.is_terminal or console.width >= WIDTH
        console = Console(highlight=False, width=WIDTH if wide else console.width)
    for piece in renderables(board):
        console.print(piece)


# --------------------------------------------------------------------------------------- files


def markdown_table(header: list[str], body: list[list[str]], left: int) -> list[str]:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return [
        "| " + " | ".join(part.replace("|", "\\|") for part in line) + " |"
        for line in (header, rule, *body)
    ]


def to_markdown(board: Leaderboard) -> str:
    """The whole board as Markdown."""
    lines = ["# Leaderboard", ""]
    lines += ["Rebuilt from the records by `python -m fine_bench.leaderboard`.", ""]
    for table in board.tables:
        lines += [f"## {title(table)}", ""]
        for line in caption(table):
            lines += [line, ""]
        for block, (columns, rows) in _blocks(board, table).items():
            header = ["target", "estimator", "n", *map(_heading, columns)]
            body = [
                [row.target, _name(row, columns), seeds_of(row, table)]
                + [_markdown_number(row.stats.get(c.key), c.source == "cost") for c in columns]
                for row in rows
            ]
            lines += [f"### {block}", "", *markdown_table(header, body, left=2), ""]
        for line in notes(table):
            lines += [line, ""]
        unfinished = cell_lines(table)
        if unfinished:
            lines += ["Not in the averages:", "", *(f"- {line}" for line in unfinished), ""]
    if board.problems:
        lines += ["## Problems", "", *(f"- {one_line(line)}" for line in board.problems), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def frame(board: Leaderboard) -> pd.DataFrame:
    """One line a row: names, seeds, and mean, lower, upper, n of every number (full precision)."""
    rows = [(table, row) for table in board.tables for row in table.rows]
    some = {c.needs: [row for _, row in rows if c.needs in row.stats] for c in board.columns}
    first = [c.key for c in board.columns if not c.block or _anybody_has(c, some[c.needs])]
    keys = first + sorted({key for _, row in rows for key in row.stats} - set(first))
    options = list(dict.fromkeys(name for table in board.tables for name in table.options))
    lines = []
    for table, row in rows:
        line: dict[str, Any] = {
            "task": table.task,
            "setting": table.setting,
            "data_sha256": table.data,
            "target": row.target,
            "estimator": row.estimator,
            "variant": row.variant,
            "estimator_hash": row.estimator_hash,
            "version": row.version,
            "commits": " ".join(row.commits),
            "dirty": row.dirty,
            "seeds": " ".join(map(str, row.seeds)),
        }
        mine = (row.estimator, row.estimator_hash, row.target)
        for state in ("failed", "skipped", "missing"):
            line[state] = " ".join(
                str(cell.seed)
                for cell in table.cells
                if (cell.estimator, cell.estimator_hash, cell.target) == mine
                and cell.state == state
            )
        line["watched"] = "all" if row.watched is None else str(row.watched)
        line["k"] = row.k
        line["ties"] = " ".join(sorted(row.ties))
        line |= {f"option_{name}": _plain(table.options.get(name)) for name in options}
        for key in keys:
            stat = row.stats.get(key)
            for part in STATS:
                empty: float = 0 if part == "n" else math.nan
                line[f"{key}_{part}"] = getattr(stat, part) if stat is not None else empty
        lines.append(line)
    return pd.DataFrame(lines)


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def to_csv(board: Leaderboard) -> str:
    """``frame`` as csv; empty where a number is undefined or not there (its ``_n`` tells which)."""
    return str(frame(board).to_csv(index=False, lineterminator="\n"))


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
    return json.dumps(plain, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write(board: Leaderboard, root: Path | str) -> list[Path]:
    """Write ``leaderboard.md`` and ``leaderboard.csv`` below ``root``, each whole or not at all."""
    texts = {"leaderboard.md": to_markdown(board), "leaderboard.csv": to_csv(board)}
    for name, text in texts.items():
        write_atomic(Path(root) / name, text.encode())
    return [Path(root) / name for name in texts]
