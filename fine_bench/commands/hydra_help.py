"""The help of a Hydra command within the width of a terminal."""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
from collections.abc import Iterator, Sequence

WIDTH = 100


def wrapped(text: str) -> str:
    """Long lines, such as the names of all estimators, broken at blanks and set in."""
    lines = []
    for line in text.splitlines():
        if len(line) <= WIDTH:
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(
            line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines).rstrip() + "\n"


@contextlib.contextmanager
def narrow(arguments: Sequence[str]) -> Iterator[None]:
    """Wrap what Hydra prints meanwhile, if ``arguments`` ask for help."""
    if not {"-h", "--help"} & set(arguments):
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        sys.stdout.write(wrapped(printed.getvalue()))
