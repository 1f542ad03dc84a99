"""Files that are whole or absent, and never overwritten unless they may be.

A file is written under a temporary name in its own folder, flushed to the disk and then *linked*
to its final name, which fails when that name is taken. Folders are locked between processes where
the system can; leftovers of killed writers are removed by the next one. A file that the user names
with ``--out`` is written by ``write_output``.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from fine_bench.errors import UserError
from fine_bench.store.guarded import kind_of, reason_of

# Windows has no fcntl; the exclusive link then protects alone
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

CAN_LOCK = fcntl is not None
"""Whether this system locks files between processes."""

_STALE_SECONDS = 24 * 3600
_YOUNG_SECONDS = 60


class StoreError(UserError, RuntimeError):
    """A file of the store is missing or damaged, or could not be written. The message names it."""


class OutputError(StoreError):
    """A file that the user named for the output cannot be that; nothing has been done yet."""


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


@contextlib.contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a file, which is made where there is none, against other processes.

    The system lets go when a process dies. Yields False, at once, where another process holds it
    and where there are no such locks.

    Args:
        path: in a folder that exists.
        wait: whether to wait until no other process holds it.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except OSError:
            mine = False
        yield mine
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
            f"could not write {final}: {reason_of(error)}. Nothing was left under that "
            "name; make room or check the permissions, and run again"
        ) from error
    finally:
        # a read-only file system refuses to remove even what is not there; the first reason counts
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is never replaced; ``FileExistsError`` when the name is taken."""
    _write_under(path, data, _link)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that may be replaced (tables, caches): readers see the old or the new one.

    A file that is there hands on its mode. A link is replaced and not followed: whoever packs a
    results folder cannot lead this write elsewhere. A folder, a pipe or a device stays.
    """
    make_folder(path.parent)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = 0
    except (OSError, ValueError) as error:
        raise StoreError(f"could not write {path}: {reason_of(error)}") from error
    if kind := kind_of(mode):
        raise StoreError(f"could not write {path}: it is {kind}; move it away, and run again")

    def replace(temporary: Path, final: Path) -> None:
        if stat.S_ISREG(mode):
            with contextlib.suppress(OSError):  # file systems without modes
                temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, final)

    _write_under(path, data, replace)


def check_output(path: Path, force: bool = False) -> Path:
    """Where a file that the user names will be written: refused before any work is done.

    Args:
        path: as given with ``--out``. Links are followed; ``~`` is the home folder.
        force: whether a file that is there may be replaced.

    Returns:
        the path behind all links.

    Raises:
        OutputError: a folder, a socket or a disk, a file without ``force``, or a place where
            nothing can be written.
    """
    try:
        final = path.expanduser().resolve()
        if final.is_symlink():  # resolve() leaves a loop as it is
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        mode = final.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no home, a null byte
        raise OutputError(f"{path} names no file ({reason_of(error)}); name another one") from error
    if stat.S_ISDIR(mode) or (not mode and str(path).endswith(os.sep)):
        raise OutputError(f"{path} is a folder; name a file in it")
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        raise OutputError(f"{path} is {kind_of(mode)}, which no table is written into; name a file")
    if stat.S_ISREG(mode) and not force:
        raise OutputError(
            f"{path} is already there and would be replaced; name another file, or add --force"
        )
    if not mode or stat.S_ISREG(mode):
        place = final.parent
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"{path} cannot be written: no file can be made in {place}")
    return final


def write_output(path: Path, data: bytes, force: bool = False) -> None:
    """Write a file that the user names, as ``check_output`` says; the one function for all of them.

    A regular file is replaced whole and keeps its mode; behind a link it is the link's target that
    changes. Into a terminal, ``/dev/null`` or a pipe that somebody reads, the bytes are written.

    Raises:
        OutputError: see ``check_output``.
        StoreError: the disk or the pipe refused.
    """
    final = check_output(path, force)
    if not final.exists() or final.is_file():
        write_atomic(final, data)
        return
    try:
        # without waiting for somebody to read a pipe; once it is open, writing may wait
        handle = os.open(final, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        os.set_blocking(handle, True)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError as error:
        raise StoreError(f"could not write into {path}: {reason_of(error)}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless it is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise StoreError(f"could not make the folder {folder}: {reason_of(error)}") from error


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A folder in the system's temporary folder, removed on the way out.

    A process that is killed cannot remove its own: the next one with the same purpose does. Each
    holds its folder locked while it lives, whatever machine or container it lives in, so that none
    in use is taken.
    """
    prefix = f"fine_bench-{purpose}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        _remove_abandoned(folder)
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        handle = None if fcntl is None else os.open(name, os.O_RDONLY)
        try:
            if handle is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(name)
        finally:
            if handle is not None:
                os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove a temporary folder of ours that no process holds."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        about = folder.lstat()
        # between being made and being locked a folder is young
        if about.st_uid != os.getuid() or time.time() - about.st_mtime < _YOUNG_SECONDS:
            return
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


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


@lru_cache(maxsize=1024)
def slug(name: str) -> str:
    """``name`` as part of a file name. Names that differ may share one; the digest tells apart."""
    return re.sub(r"[^A-Za-z0-9_.+=,@-]", "_", name).lstrip(".")[:80] or "_"
