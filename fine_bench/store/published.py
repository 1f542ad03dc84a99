"""Published records: packed, one JSON-lines file a table.

Layout below the results folder (``setting8``: the first eight hex digits of the setting)::

    published/<task>--<setting8>.jsonl

Each line is one record or one comparison of seeds: the JSON of its file below ``records/`` without
the white space between its parts. So a line says what the file says, to the last digit, and the
file can be made from it again. Lines are ordered by row, seed and revision, and a line that is
there is never altered: see ``publication``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from fine_bench.store.comparisons import Consistency
from fine_bench.store.files import slug
from fine_bench.store.guarded import files_below, read_bytes, reason_of
from fine_bench.store.record_json import address_of, key_of, parse
from fine_bench.types import RunRecord

Key: TypeAlias = tuple[Any, ...]


def comparison_key(c: Consistency) -> Key:
    """What was compared."""
    return ("comparison", c.task, c.setting, c.estimator, c.target, c.digest)


@dataclass(frozen=True)
class Entry:
    """A record or a comparison, with its text.

    Attributes:
        found: what it says.
        text: its JSON as it was read.
        where: the file below the results folder; for a packed one with the number of the line.
        packed: whether its text is the packed line.
    """

    found: RunRecord | Consistency
    text: bytes
    where: str
    packed: bool = True

    @property
    def line(self) -> str:
        """Its JSON on one line."""
        return self.text.decode() if self.packed else one_line(self.text)

    @property
    def key(self) -> Key:
        """Identity and revision of a record; what was compared, of a comparison."""
        if isinstance(self.found, RunRecord):
            return (*key_of(self.found), self.found.revision)
        return comparison_key(self.found)

    @property
    def order(self) -> Key:
        """Place in its file: by row, records before comparisons, then seed and revision."""
        f = self.found
        row = (f.task, f.setting, f.estimator, f.target)
        if isinstance(f, RunRecord):
            return (*row, 0, f.seed, f.estimator_hash, f.version, f.data_sha256, f.revision)
        return (*row, 1, f.k, f.metric_version, f.digest)

    @property
    def name(self) -> str:
        """The file below ``records/`` that says the same."""
        return address_of(self.found)

    @property
    def table(self) -> str:
        """The packed file that it belongs to."""
        return table_name(self.found.task, self.found.setting)


@dataclass(frozen=True)
class PackedTable:
    """One packed file: what could be read, and a line of text for each line that could not."""

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]

    @cached_property
    def by_identity(self) -> dict[Key, list[RunRecord]]:
        """All revisions of each record."""
        found: dict[Key, list[RunRecord]] = {}
        for entry in self.entries:
            if isinstance(entry.found, RunRecord):
                found.setdefault(key_of(entry.found), []).append(entry.found)
        return found


def table_name(task: str, setting: str) -> str:
    """``mnist_mlp--462e64e6.jsonl``."""
    return f"{slug(task)}--{slug(setting[:8])}.jsonl"


def one_line(text: bytes) -> str:
    """The JSON of a record's file without the white space between its parts."""
    return json.dumps(
        json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def file_text(line: str) -> bytes:
    """Inverse of ``one_line`` for the files that ``RecordStore`` writes."""
    text = json.dumps(json.loads(line), sort_keys=True, indent=1, ensure_ascii=False)
    return (text + "\n").encode()


def read_table(path: Path) -> PackedTable:
    """One packed file. A damaged line is named as ``published/FILE:LINE``; the rest goes on."""
    entries: list[Entry] = []
    problems: list[str] = []
    seen: dict[Key, Entry] = {}
    try:
        lines = read_bytes(path).split(b"\n")
    except (OSError, ValueError) as error:
        return PackedTable((), (f"published/{path.name}: cannot be read ({reason_of(error)})",))
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where = f"published/{path.name}:{number}"
        try:
            entry = Entry(parse(line), line, where)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        first = seen.setdefault(entry.key, entry)
        if first is entry:
            entries.append(entry)
        elif first.line != entry.line:
            problems.append(f"{where}: says something else of the same revision than {first.where}")
    if not entries and not problems:  # nothing writes such a file
        problems.append(f"published/{path.name}: holds no line; restore it from where it came from")
    return PackedTable(tuple(entries), tuple(problems))


_TABLES = 64
_READ: dict[Path, tuple[tuple[int, int, int], PackedTable]] = {}
"""What this process has read, so that each job of a sweep need not read it again."""


class Published:
    """The packed tables of one results folder, each read again only when its file has changed.

    Args:
        root: the results folder.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "published"

    def table(self, name: str) -> PackedTable:
        """The table of this file name; an empty one when there is no such file."""
        path = self.folder / name
        try:
            stat = path.stat()
        except FileNotFoundError:
            return PackedTable((), ())
        except (OSError, ValueError) as error:
            return PackedTable((), (f"published/{name}: cannot be read ({reason_of(error)})",))
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        key = path.absolute()
        found = _READ.get(key)
        if found is None or found[0] != stamp:
            if len(_READ) >= _TABLES:
                _READ.clear()
            _READ[key] = found = (stamp, read_table(path))
        return found[1]

    def tables(self) -> Iterator[PackedTable]:
        """All of them, by name."""
        files, hidden = files_below(self.folder, ".jsonl")
        for folder, reason in hidden:
            where = folder.relative_to(self.folder.parent).as_posix()
            yield PackedTable((), (f"{where}: its files cannot be listed ({reason})",))
        for path in files:
            if path.parent == self.folder:
                yield self.table(path.name)


def published_entry(folder: Path, name: str) -> Entry | None:
    """The packed record or comparison whose file would be ``records/<name>``."""
    parts = Path(name).parts
    if len(parts) != 3:
        return None
    table = read_table(folder / f"{parts[0]}--{parts[1]}.jsonl")
    return next((entry for entry in table.entries if entry.name == Path(name).as_posix()), None)
