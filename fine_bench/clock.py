"""The clock by which costs are measured: wall time, or CPU time on a machine that is shared.

A method's cost is published as seconds beyond a plain training. Wall time says what a user waits
for; beside other programs on the same machine it says how busy these were. The CPU time of the
process, over all its threads, does not depend on them. What is compared must come from one clock,
so records say which it was (``training["clock"]``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

WALL, CPU = "wall", "cpu"
CLOCKS: Final[dict[str, Callable[[], float]]] = {WALL: time.perf_counter, CPU: time.process_time}

_read = CLOCKS[WALL]


def now() -> float:
    """Seconds by the clock in use; only differences mean anything."""
    return _read()


def in_use() -> str:
    """Its name."""
    return next(name for name, read in CLOCKS.items() if read is _read)


@contextmanager
def measured_by(name: str) -> Iterator[None]:
    """Costs are measured by this clock inside the block, in the whole process.

    Args:
        name: ``wall`` or ``cpu`` (time of this process on all cores, without its children).
    """
    global _read
    before, _read = _read, CLOCKS[name]
    try:
        yield
    finally:
        _read = before
