"""Time that f-INE takes within somebody else's loop."""

from __future__ import annotations

from fine_bench import clock


class AtWork:
    """A context in which f-INE works: its time counts, and passes through the model are its own.

    It is entered several times a step, where a generator would cost more than what it times, and
    never twice at once.

    Attributes:
        on: whether one is open.
        seconds: spent so far.
    """

    __slots__ = ("_start", "on", "seconds")

    def __init__(self) -> None:
        self.on = False
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = clock.now()
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False
        self.seconds += clock.now() - self._start


__all__ = ["AtWork"]
