"""Which revisions of a record a folder holds, without listing it for every record.

A sweep's plan looks for each of its cells. The names in a folder are read once and sorted by what
stands before their revision; they are read again when the folder has changed. A file that came in
the same tick of the clock as the reading would not show in the folder's time, so a reading counts
only when the folder had then been left alone for a while.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_QUIET_SECONDS = 5.0
"""Clocks of file systems tick at least this often, and differ from ours by less."""
_FOLDERS = 256


@dataclass(frozen=True)
class _Listing:
    changed_ns: int
    read_at: float
    by_stem: dict[str, list[str]]


_READ: dict[str, _Listing] = {}


def files_of(folder: Path, stem: str) -> list[Path]:
    """The files ``STEM--r…`` of a folder, in no order; none where there is no such folder."""
    try:
        changed = os.stat(folder).st_mtime_ns
        key = os.path.abspath(folder)
        found = _READ.get(key)
        if (
            found is None
            or found.changed_ns != changed
            or found.read_at - changed / 1e9 < _QUIET_SECONDS
        ):
            found = _read(folder, changed)
            if len(_READ) >= _FOLDERS:
                _READ.clear()
            _READ[key] = found
    except (OSError, ValueError):  # no such folder, or a name that none can have
        return []
    return [folder / name for name in found.by_stem.get(stem, ())]


def _read(folder: Path, changed_ns: int) -> _Listing:
    now = time.time()
    by_stem: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        stem, mark, _ = name.rpartition("--r")
        if mark:
            by_stem.setdefault(stem, []).append(name)
    return _Listing(changed_ns, now, by_stem)
