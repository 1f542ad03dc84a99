"""One progress bar for every command: what is being done, how far, and the time that remains.

It is written to a terminal only, on the error stream, and is gone when the work is done: output
that is piped or kept in a file never holds any of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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
    console = Console(stderr=True, highlight=False) if console is None else console
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
