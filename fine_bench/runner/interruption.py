"""Ctrl-C and SIGTERM: both end the command the same way, and neither is taken for a failure."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as schedulers and ``timeout`` do."""


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status that shells give a command that a signal ended: 130 or 143."""
    ended_by = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    return 128 + int(ended_by)


def of(error: BaseException) -> KeyboardInterrupt | None:
    """The interruption that an error stands for; Lightning makes a ``SystemExit`` of one."""
    context = error if isinstance(error, KeyboardInterrupt) else error.__context__
    if isinstance(error, KeyboardInterrupt | SystemExit) and isinstance(context, KeyboardInterrupt):
        return context
    return None


@contextmanager
def caught() -> Iterator[None]:
    """Meanwhile SIGTERM raises ``Terminated``; nothing changes outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
