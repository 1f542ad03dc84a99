"""One progress bar for every command: what is being done, how far, and the time that remains.

It is written to a terminal only, on the error stream, and is gone when the work is done: output
that is piped or kept in a file never holds any of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_hidden = False


@contextmanager
def hidden(hide: bool = True) -> Iterator[None]:
    """No bars of this process meanwhile, where other processes write to the same terminal."""
    global _hidden
    before = _hidden
    _hidden = before or hide
    try:
        yield
    finally:
        _hidden = before


def shown() -> bool:
    """Whether bars belong on the error stream: it is a terminal, and this process's alone."""
    return sys.stderr.isatty() and not _hidden


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
        disable=_hidden or not console.is_terminal,
        # a step may take minutes: the speed of the last half hour counts
        speed_estimate_period=1800,
    )
