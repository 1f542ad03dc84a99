"""Files that are whole or absent, and never overwritten unless they may be.

A file is written under a temporary name in its own folder, flushed to the disk and then *linked*
to its final name, which fails when that name is taken. Folders are locked between processes where
the system can; leftovers of killed writers are removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fine_bench.errors import UserError

# Windows has no fcntl; the exclusive link then protects alone
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

_STALE_SECONDS = 24 * 3600


class StoreError(UserError, RuntimeError):
    """A file of the store is missing or damaged, or could not be written. The message names it."""


class AbsentScoresError(StoreError):
    """The scores of a published record have not been unpacked here."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Hold ``folder`` against other writers; the system lets go when a process dies.

    Yields False where the system or the file system has no such locks. The exclusive link then
    still protects every record; only leftovers of killed writers are treated more carefully.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


def _flush_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power cut, where folders can be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_whole(path: Path, data: bytes) -> None:
    """Write and flush; a function of its own so that tests can let the disk be full."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, final: Path) -> None:
    """Give a whole file its final name; ``FileExistsError`` when the name is taken."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # No hard links here (FAT, some network disks): the lock keeps look-then-rename exclusive.
        if final.exists():
            raise FileExistsError(errno.EEXIST, "already there", str(final)) from None
        os.replace(temporary, final)


def _write_under(final: Path, data: bytes, finish: Callable[[Path, Path], object]) -> None:
    """Write ``data`` whole under ``final``: all of it or nothing. ``finish`` moves it there."""
    temporary = final.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        _write_whole(temporary, data)
        finish(temporary, final)
        _flush_folder(final.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise StoreError(
            f"could not write {final}: {error.strerror or error}. Nothing was left under that "
            "name; make room or check the permissions, and run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is never replaced; ``FileExistsError`` when the name is taken."""
    _write_under(path, data, _link)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that may be replaced (tables, caches): readers see the old or the new one."""
    make_folder(path.parent)
    _write_under(path, data, os.replace)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"could not make the folder {folder}: {error.strerror}") from error


def remove_leftovers(folder: Path, locked: bool) -> None:
    """Remove temporary files of writers that are gone.

    A file counts as left over when it is a day old, or when this process holds the folder's lock
    and no process with the writer's number runs here. Whoever still writes is never disturbed.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
            writer = re.match(r"\.(\d+)-", path.name)
            if old or (locked and writer is not None and not _runs(int(writer[1]))):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def slug(name: str) -> str:
    """``name`` as part of a file name. Names that differ may share one; the digest tells apart."""
    return re.sub(r"[^A-Za-z0-9_.+=,@-]", "_", name).lstrip(".")[:80] or "_"
