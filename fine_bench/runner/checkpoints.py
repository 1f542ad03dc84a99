"""The folder of a run's checkpoints: whole or absent, whoever else trains the same run meanwhile.

A run is trained into a folder of its own beside the final one and moved there when it is complete.
Two processes may train one run at the same time: two jobs of a sweep over ``estimator`` with the
same seed, or two commands. Each reads its own checkpoints; the last to end leaves its folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

FACTS = "training.json"
_STALE_SECONDS = 7 * 24 * 3600

T = TypeVar("T")


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder to train into. It is removed on the way out, unless ``publish`` moved it.

    What killed processes left beside ``folder`` is removed first.
    """
    remove_leftovers(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{_host()}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Move a complete folder to its final name, in the place of what may be there.

    Raises:
        OSError: the disk refuses.
    """
    aside = folder.with_name(f"{folder.name}.tmp-{_host()}-old-{os.getpid()}")
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        with suppress(FileNotFoundError):  # another process was faster to take it away
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def read(folder: Path, whole: Callable[[], bool], load: Callable[[dict[str, Any]], T]) -> T | None:
    """What ``load`` makes of a complete folder; None where there is none, or it was replaced.

    Args:
        folder: where ``publish`` moved it.
        whole: whether all checkpoints are there.
        load: is given the facts of the training; reads the checkpoints.
    """
    text = _text(folder / FACTS)
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    try:
        if not whole():
            return None
        found = load(facts)
    except FileNotFoundError:
        return None
    return found if _text(folder / FACTS) == text else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left; a living process keeps its folder, here or on another machine.

    Which processes of another machine live cannot be seen from here: theirs go after a week.
    """
    for path in folder.parent.glob(f"{folder.name}.tmp-*"):
        host, _, owner = path.name[len(f"{folder.name}.tmp-") :].rpartition("-")
        with suppress(OSError):
            if not owner.isdigit() or (host and host.removesuffix("-old") != _host()):
                gone = time.time() - path.stat().st_mtime > _STALE_SECONDS
            else:
                gone = not _lives(int(owner))
            if gone:
                shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    """Whether another process of this number runs here."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _host() -> str:
    """Tells machines apart that share a disk, without naming them."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
