"""The files of the bands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fine_bench.leaderboard.sensitivity import Spread
from fine_bench.leaderboard.sensitivity_tables import to_csv, to_markdown
from fine_bench.store.files import write_atomic


def write(found: Sequence[Spread], root: Path) -> list[Path]:
    """Write ``sensitivity.md`` and ``sensitivity.csv`` below ``root``, each whole or not at all.

    Raises:
        StoreError: a file cannot be written; the message names it.
    """
    texts = {"sensitivity.md": to_markdown(found), "sensitivity.csv": to_csv(found)}
    for name, text in texts.items():
        write_atomic(root / name, text.encode())
    return [root / name for name in texts]
