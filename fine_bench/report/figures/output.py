"""Figures into files: what both the figures' and the report's command write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fine_bench.report.figures.collection import Drawn
from fine_bench.report.figures.style import to_bytes
from fine_bench.store.files import write_atomic


def write(drawn: Drawn, folder: Path, formats: Sequence[str]) -> dict[Path, bytes]:
    """Write a figure once a format; the bytes by path, none for a figure that was left out.

    Raises:
        StoreError: a file cannot be written; the message names it.
    """
    if drawn.figure is None:
        return {}
    files = {folder / f"{drawn.name}.{kind}": to_bytes(drawn.figure, kind) for kind in formats}
    for path, content in files.items():
        write_atomic(path, content)
    return files
