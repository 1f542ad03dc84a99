"""The folder of a run's checkpoints: whole or absent, whoever else trains the same run meanwhile.

A run is trained into a folder of its own beside the final one and moved there when it is complete.
Two processes may train one run at the same time: two jobs of a sweep over ``estimator`` with the
same seed, or two commands. Each reads its own checkpoints; the last to end leaves its folder.

A folder carries a seal: which run it is of, and the digest of each of its files. One that is
damaged, edited, of another run or without a seal is set aside under another name, said so, and the
run is trained again: the result is the same, and nothing is lost.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fine_bench.errors import UserError
from fine_bench.store.files import write_atomic

FACTS = "training.json"
SEAL = "seal.json"
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


def seal(temporary: Path, run: Mapping[str, Any]) -> None:
    """Write down which run a complete folder is of, and the digest of each of its files.

    Args:
        temporary: what ``scratch`` gave.
        run: what tells the run from every other.
    """
    files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
    content = {"format": 1, "run": dict(run), "files": files}
    write_atomic(temporary / SEAL, json.dumps(content, indent=1).encode())


def publish(temporary: Path, folder: Path) -> None:
    """Move a complete folder to its final name, in the place of what may be there.

    Its files are on the disk before the name is: a machine that stops leaves all of it or nothing.

    Raises:
        OSError: the disk refuses.
    """
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    aside = folder.with_name(f"{folder.name}.tmp-{_host()}-old-{os.getpid()}")
    while True:
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _flush(folder.parent)
            return
        with suppress(FileNotFoundError):  # another process was faster to take it away
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def keep(
    temporary: Path,
    folder: Path,
    run: Mapping[str, Any],
    facts: Mapping[str, Any],
    load: Callable[[], T],
) -> T:
    """Complete a folder of new checkpoints, read it, and move it to its final name.

    Args:
        temporary: what ``scratch`` gave, with the checkpoints.
        folder: its final name.
        run: what tells the run from every other.
        facts: about the training.
        load: reads the checkpoints: what cannot be read gets no final name.

    Returns:
        what ``load`` returned.
    """
    write_atomic(temporary / FACTS, json.dumps(facts, indent=1).encode())
    seal(temporary, run)
    found = load()
    publish(temporary, folder)
    return found


class DamageError(ValueError):
    """What is wrong with a folder of checkpoints."""


def read(
    folder: Path,
    run: Mapping[str, Any],
    count: Callable[[], tuple[int, int]],
    load: Callable[[dict[str, Any]], T],
    say: Callable[[str], None] = lambda line: None,
) -> T | None:
    """What ``load`` makes of a complete folder; None where there is none that can be used.

    Args:
        folder: where ``publish`` moved it.
        run: what tells the run from every other.
        count: how many checkpoints are there, and how many have to be.
        load: is given the facts of the training; reads the checkpoints.
        say: is told of a folder that is set aside.

    Raises:
        OSError: it has to be set aside, and the disk refuses.
    """
    if not folder.exists():
        return None
    before = _text(folder / SEAL)
    try:
        _check(folder, run, before)
        there, wanted = count()
        if there != wanted:
            raise DamageError(f"{there} of {wanted} checkpoints are there")
        found = load(json.loads(_text(folder / FACTS)))
    except (UserError, MemoryError):
        raise  # not the folder's fault
    except Exception as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error):
            raise
        if not folder.exists() or _text(folder / SEAL) != before:
            return None  # another process has just replaced it
        try:
            aside = _set_aside(folder)
        except FileNotFoundError:
            return None  # another process has just taken it away
        reason = str(error) if isinstance(error, DamageError) else _words(error)
        say(f"checkpoints in {folder} are not used: {reason}. Set aside as {aside.name}")
        return None
    return found if _text(folder / SEAL) == before else None


def _words(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"they cannot be read ({type(error).__name__}{': ' if first else ''}{first:.120})"


def _check(folder: Path, run: Mapping[str, Any], text: str) -> None:
    """Hold a folder against its seal.

    Raises:
        DamageError: the first thing that is not as it was sealed.
    """
    if not folder.is_dir():
        raise DamageError("there is no folder of that name but something else")
    if not text:
        raise DamageError(f"they carry no {SEAL} that says of which run they are")
    try:
        sealed = json.loads(text)
        files, theirs = dict(sealed["files"]), dict(sealed["run"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamageError(f"their {SEAL} is damaged") from error
    for name in (*run, *theirs):
        if theirs.get(name) != run.get(name):
            raise DamageError(
                f"they are of another run ({name} {theirs.get(name)!s:.40}, wanted "
                f"{run.get(name)!s:.40})"
            )
    names = {path.name for path in folder.iterdir()} - {SEAL}
    for name in sorted(set(files) | names | {FACTS}):
        if name not in names or name not in files:
            raise DamageError(f"{name:.80} is {'missing' if name in files else 'not theirs'}")
        path = folder / name
        if not path.is_file() or _digest(path) != files[name]:
            raise DamageError(f"{name:.80} is damaged or was edited")


def _set_aside(folder: Path) -> Path:
    """Give a folder a name under which nobody looks for it."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.unused-{number}")).exists():
        number += 1
    return folder.rename(aside)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # folders cannot be opened elsewhere
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _text(path: Path) -> str:
    try:
        return path.read_text() if path.is_file() else ""
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
