"""Ctrl-C and SIGTERM: both end the command the same way, and neither is taken for a failure.

What a signal's handler raises is lost where Python ignores exceptions: in a finaliser, or in a
callback of the garbage collector. So it is remembered that SIGTERM came, and ``raise_lost`` raises
it again at the next cell, or the command at its end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pytorch_lightning.utilities.exceptions import SIGTERMException


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as schedulers and ``timeout`` do."""


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status that shells give a command that a signal ended: 130 or 143."""
    ended_by = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    return 128 + int(ended_by)


def of(error: BaseException) -> KeyboardInterrupt | None:
    """The interruption that an error stands for; Lightning makes a ``SystemExit`` of one.

    Of SIGTERM too, in the process of a launcher's job, where nobody else listens to it.
    """
    if isinstance(error, SIGTERMException):
        return Terminated()
    context = error if isinstance(error, KeyboardInterrupt) else error.__context__
    if isinstance(error, KeyboardInterrupt | SystemExit) and isinstance(context, KeyboardInterrupt):
        return context
    return None


_came = False


def raise_lost() -> None:
    """Raise the ``Terminated`` that was raised before, and lost on its way.

    Raises:
        Terminated: SIGTERM came since ``caught`` was entered.
    """
    if _came:
        raise Terminated


@contextmanager
def caught() -> Iterator[None]:
    """Meanwhile SIGTERM raises ``Terminated``; nothing changes outside of the main thread."""
    global _came
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        global _came
        _came = True
        raise Terminated

    _came = False
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _came = False
