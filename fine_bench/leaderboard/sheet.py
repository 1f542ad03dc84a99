"""A printed table between its numbers and its looks: heads, lines of entries, and two writers.

The leaderboard, the ranges of options and the table over tasks make ``Sheet``s; they are written
here for a terminal and as Markdown, and as HTML by ``report.html.tables``. No number is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from fine_bench.metrics.registry import ARROWS, Better, Metric
from fine_bench.terminal import Terminal, visible

WIDTH = 100
NAME_WIDTH = 18
INDENT = 1
NONE = "–"
UNDEFINED = "undefined"


@dataclass(frozen=True)
class Entry:
    """One place of a table.

    Attributes:
        text: a name, or a number as written.
        note: what follows a name, in smaller letters where there are some.
        marks: signs behind the name or number, each with its meaning.
        ends: of the interval or band of a number, with all digits; None without one.
        short: the same in few characters.
        few: what follows the interval, where it rests on less than others do.
        best: whether it is the best of its column.
        value: what a column is sorted by; None for the text.
        below: further lines in smaller letters.
    """

    text: str
    note: str = ""
    marks: tuple[tuple[str, str], ...] = ()
    ends: tuple[str, str] | None = None
    short: str = ""
    few: str = ""
    best: bool = False
    value: float | None = None
    below: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Text, note and marks in one line."""
        signs = "".join(sign for sign, _ in self.marks)
        return " ".join(part for part in (self.text, self.note, signs) if part)


@dataclass(frozen=True)
class Head:
    """A column.

    Attributes:
        label: its heading.
        better: the direction in which it is better.
        left: whether it holds words, which begin at the left.
        count: whether it holds a count, which is never broken into two lines.
        group: heading above it and its neighbours of the same group.
    """

    label: str
    better: Better = ""
    left: bool = False
    count: bool = False
    group: str = ""

    @property
    def text(self) -> str:
        """The label with an arrow."""
        return f"{self.label} {ARROWS[self.better]}".rstrip()


@dataclass(frozen=True)
class Line:
    """A row: what it answers (empty where all lines answer the same) and its entries."""

    target: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Sheet:
    """A table to be written; the first column names the rows."""

    title: str
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]


def head_of(metric: Metric, group: str = "") -> Head:
    """The head of a metric's column."""
    return Head(metric.label, metric.better, group=group)


# ------------------------------------------------------------------------------------- numbers


def digits_of(x: float, digits: int | None = 3) -> str:
    """Fixed decimals without a minus before a zero; three significant digits for ``None``."""
    if digits is None:
        if x == 0 or not math.isfinite(x):
            return f"{x:g}"
        return f"{x:,.{min(max(0, 2 - math.floor(math.log10(abs(x)))), 4)}f}"
    return f"{x if round(x, digits) else 0.0:.{digits}f}"


def short(text: str) -> str:
    """A number without the zero before its point, for the ends of an interval."""
    return text.replace("0.", ".", 1) if text.removeprefix("-").startswith("0.") else text


def number(mean: float, lower: float, upper: float, digits: int | None = 3) -> Entry:
    """A number with its interval or band; without one where ``lower`` is not finite."""
    ends = few = None
    if math.isfinite(lower) and math.isfinite(mean):
        ends = few = (digits_of(lower, digits), digits_of(upper, digits))
        if digits is not None:
            few = (short(ends[0]), short(ends[1]))
    return Entry(
        UNDEFINED if math.isnan(mean) else digits_of(mean, digits),
        ends=ends,
        short="–".join(few) if few else "",
        value=mean,
    )


# ------------------------------------------------------------------------------------ Markdown


def in_words(entry: Entry) -> str:
    """``0.951 [0.943, 0.958]``; bold where it is the best."""
    text = f"**{entry.text}**" if entry.best else entry.name
    return f"{text} [{entry.ends[0]}, {entry.ends[1]}]{entry.few}" if entry.ends else text


def markdown(sheet: Sheet) -> list[str]:
    """The lines of a Markdown table, without its title; targets are its first column."""
    several = any(line.target for line in sheet.lines)
    heads = [Head("target", left=True), *sheet.heads] if several else list(sheet.heads)
    body = [
        [*([line.target] if several else []), *map(in_words, line.entries)] for line in sheet.lines
    ]
    rule = ["---" if head.left else "---:" for head in heads]
    return [
        "| " + " | ".join(visible(part).replace("|", "\\|") for part in line) + " |"
        for line in ([head.text for head in heads], rule, *body)
    ]


# ------------------------------------------------------------------------------------ terminal


def rich_table(sheet: Sheet, title: str = "") -> RichTable:
    """The table for a Rich console, ``WIDTH`` columns wide; targets are lines of their own."""
    rich = RichTable(
        box=box.SIMPLE_HEAD,
        width=WIDTH,
        pad_edge=False,
        collapse_padding=True,
        title=Text(visible(title or sheet.title)),
        title_justify="left",
        title_style="bold",
    )
    first, *others = sheet.heads
    # where the intervals do not fit beside the means, they stand below them
    longest = max((len(line.entries[0].name) + INDENT for line in sheet.lines), default=0)
    for gap in (" ", "\n"):
        wide = min(longest, NAME_WIDTH) + 2 * len(others)
        headings = []
        for i, head in enumerate(others, 1):
            entries = [line.entries[i] for line in sheet.lines]
            cells = [f"{e.name}{gap}{e.short}{e.few}".strip() for e in entries]
            widest = _widest(cells)
            headings.append(_in_two_lines(visible(head.text), widest))
            wide += max(widest, _widest([headings[-1]]))
        if wide <= WIDTH:
            break
    rich.add_column(Text(visible(first.text)), overflow="fold", ratio=1)
    for head, heading in zip(others, headings, strict=True):
        side: Literal["right", "left"] = "right" if head.count else "left"
        rich.add_column(Text(heading), justify=side, overflow="fold", no_wrap=head.count)
    target = ""
    for line in sheet.lines:
        if line.target != target:
            target = line.target
            rich.add_row(Text(visible(target), style="bold"))
        name, *numbers = line.entries
        row: RenderableType = Text(visible(name.name))
        if name.below:
            row = Group(row, Text("\n".join(map(visible, name.below)), style="dim"))
        parts = [
            Text.assemble(visible(e.name), (f"{gap}{e.short}{e.few}" if e.short else "", "dim"))
            for e in numbers
        ]
        rich.add_row(Padding(row, (0, 0, 0, INDENT)), *parts)
    return rich


def _widest(cells: Iterable[str]) -> int:
    """Characters of the longest line."""
    return max((len(line) for cell in cells for line in cell.split("\n")), default=0)


def _in_two_lines(heading: str, width: int) -> str:
    """A heading that is wider than its column's numbers, broken at the space nearest its middle.

    Its column would else take the room from the names, which then break in mid-word.
    """
    spaces = [i for i, sign in enumerate(heading) if sign == " "]
    if len(heading) <= width or not spaces:
        return heading
    middle = min(spaces, key=lambda i: max(i, len(heading) - i - 1))
    return f"{heading[:middle]}\n{heading[middle + 1 :]}"


def show(pieces: Iterable[RenderableType], console: Console | None = None) -> None:
    """Print at most ``WIDTH`` columns wide, to the terminal or to ``console``."""
    if console is None:
        console = Terminal()
        wide = not console.is_terminal or console.width >= WIDTH
        console = Terminal(width=WIDTH if wide else console.width)
    for piece in pieces:
        console.print(piece)
