"""What the terminal is told: lines, tables, and one progress bar for every command.

Names, reasons and paths come from records, data and folders of anybody. Here, where they leave for
the terminal, they are text and nothing else: no markup, no escape sequences, no lines of their own.

The bar is written to a terminal only, on the error stream, and is gone when the work is done:
output that is piped or kept in a file never holds any of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

# what moves the cursor, colours, ends a line, turns its direction, or is no character at all
UNSEEN = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_IN_LINES = re.compile(UNSEEN)
_IN_A_LINE = re.compile(f"{UNSEEN}|[\t\n]")


def visible(text: object) -> str:
    """``text`` in one line, with control characters written as ``\x1b``, ``\\n``, …"""
    return _IN_A_LINE.sub(_written_out, str(text))


def visible_lines(text: object) -> str:
    """As ``visible``, but line breaks and tabs stay."""
    return _IN_LINES.sub(_written_out, str(text))


def _written_out(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


def say(text: object, *, error: bool = False) -> None:
    """Print to the terminal; ``error`` takes the error stream."""
    print(visible_lines(text), file=sys.stderr if error else sys.stdout)


def marked(mark: str, rest: object, style: str = "bold red") -> Text:
    """A line for a console: ``mark`` in ``style``, and the rest as it is."""
    return Text.assemble((mark, style), str(rest))


class Terminal(Console):
    """A Rich console for text of anybody: a ``str`` is no markup, control characters are seen."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As Rich does, without what a terminal would take for more than text."""
        for segment in super().render(renderable, options):
            if segment.control is None and _IN_LINES.search(segment.text):
                yield Segment(visible_lines(segment.text), segment.style)
            else:
                yield segment


_HIDDEN: ContextVar[bool] = ContextVar("whether bars are hidden", default=False)


@contextmanager
def hidden(hide: bool = True) -> Iterator[None]:
    """No bars of this process meanwhile, where other processes write to the same terminal."""
    token = _HIDDEN.set(_HIDDEN.get() or hide)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def shown() -> bool:
    """Whether bars belong on the error stream: it is a terminal, and this process's alone."""
    return sys.stderr.isatty() and not _HIDDEN.get()


def bar_on(console: Console | None = None) -> Progress:
    """A Rich progress display; silent where ``console`` is no terminal.

    Args:
        console: where to show it; the error stream without one.
    """
    console = Terminal(stderr=True) if console is None else console
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=_HIDDEN.get() or not console.is_terminal,
        # a step may take minutes: the speed of the last half hour counts
        speed_estimate_period=1800,
    )


class RecordBar:
    """A bar over the tables of a results folder, and then over what is made of them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("reading records", total=None)

    def comparing(self, done: int, total: int, name: str) -> None:
        """``done`` of ``total`` comparisons are done; ``name`` is the table of the next one."""
        self._progress.update(
            self._task, completed=done, total=total, description=f"comparing {name}"
        )

    def restart(self, total: int) -> None:
        """Count to ``total`` from here on."""
        self._progress.reset(self._task, total=total)

    def step(self, name: str) -> None:
        """One more is done; ``name`` says what."""
        self._progress.update(self._task, advance=1, description=name)


@contextmanager
def record_bar(console: Console | None = None) -> Iterator[RecordBar]:
    """A bar that begins with the reading of records. Arguments as ``bar_on``."""
    with bar_on(console) as progress:
        yield RecordBar(progress)
