"""Reading what somebody else may have written: bytes of regular files, and bounded JSON.

A file of results may be cut, edited or made to harm. Whoever reads JSON or a folder of files does
it here: a pipe is never waited for, a nesting or a number that no file of ours has is refused, and
a folder that cannot be listed is named. Everything that is wrong is an ``OSError`` or a
``ValueError`` whose text completes the sentence "FILE …".
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 64
"""Levels of lists and mappings in a JSON text; a record's configuration has about six."""
MAX_INTEGER = 2**64
"""Whole numbers are at most this large (seeds are); larger ones overflow when used as floats."""

# What only a walk through the value can judge: numbers of twenty digits, or with an exponent of
# three, that may be too large. Digests hold few such runs of digits, and nothing ends after them.
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * 20
_LARGE = re.compile(r"[eE]\+?\d{3,}(?:[\s,\]}]|$)")

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NoJSONError(ValueError):
    """A text is no JSON. ``msg`` says what is wrong, ``colno`` in which column of its line."""

    def __init__(self, error: json.JSONDecodeError) -> None:
        super().__init__(f"is not whole JSON ({error})")
        self.msg, self.colno = error.msg, error.colno


def kind_of(mode: int) -> str:
    """What ``st_mode`` says a path is, in words; empty for a regular file."""
    return next((words for test, words in _KINDS if test(mode)), "")


def is_file(path: Path) -> bool:
    """Whether ``path`` names a regular file; a name that no file can have names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for the file system, without permission, a null byte
        return False


def read_bytes(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: no such file, no permission, a name that no file can have.
        ValueError: a pipe, a device, a folder or a socket, which is not waited for.
    """
    # without O_NONBLOCK opening a pipe waits for its writer, perhaps for ever
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        kind = kind_of(os.fstat(handle).st_mode)
        if kind:
            raise ValueError(f"is {kind} and no regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def parse_json(text: bytes | str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: no JSON in UTF-8, ``NaN`` or an infinity (the store writes them as strings),
            more than ``MAX_DEPTH`` levels, a whole number beyond ``MAX_INTEGER``, a number that no
            float can hold, or half a character.
    """
    try:
        words = text.decode() if isinstance(text, bytes) else text
        value = json.loads(words, parse_constant=_constant)
    except RecursionError:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep") from None
    except json.JSONDecodeError as error:
        raise NoJSONError(error) from None
    except ValueError as error:  # no UTF-8, or a number of more digits than Python converts
        raise ValueError(f"is not whole JSON ({error})") from None
    if isinstance(text, str) or _is_doubtful(text, words):
        _check(value)
    elif words.count("[") + words.count("{") >= MAX_DEPTH:
        _check_depth(value)
    return value


def _is_doubtful(text: bytes, words: str) -> bool:
    return "\\u" in words or _LONG in text.translate(_ZEROS) or _LARGE.search(words) is not None


def _check_depth(value: Any) -> None:
    """The depth alone: only lists and mappings are entered."""
    level = [value]
    for depth in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            inside = item.values() if type(item) is dict else item
            below += [one for one in inside if type(one) is dict or type(one) is list]
        if not below and (depth < MAX_DEPTH - 1 or not any(level)):
            return
        level = below
    raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} stands where JSON has numbers")


def _check(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                if not item.isascii():
                    _check_text(item)
            elif isinstance(item, float):
                if not math.isfinite(item):
                    raise ValueError("holds a number too large for a float")
            elif isinstance(item, int) and not -MAX_INTEGER <= item <= MAX_INTEGER:
                raise ValueError("holds a whole number of more than 64 bits")
        if not below:
            return
        level = below
    raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None


def read_json(path: Path) -> Any:
    """``parse_json`` of a file; raises as ``read_bytes`` and ``parse_json`` do."""
    return parse_json(read_bytes(path))


def files_below(folder: Path, ending: str) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Everything below ``folder`` whose name ends so, sorted, and the folders that hide theirs.

    Temporary files (a leading dot) are passed over, links to folders not followed. A folder that
    does not exist has no files; one that cannot be listed comes back with the reason.
    """
    found: list[Path] = []
    hidden: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        if error.errno != errno.ENOENT:
            hidden.append((Path(error.filename or folder), reason_of(error)))

    for place, folders, names in os.walk(folder, onerror=unreadable):
        # a folder of such a name stands where a file should: reading it says so
        for name in (*names, *(f for f in folders if f.endswith(ending))):
            if name.endswith(ending) and not name.startswith("."):
                found.append(Path(place, name))
    return sorted(found), sorted(hidden)


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read, in brackets' words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) or type(error).__name__
