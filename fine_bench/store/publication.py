"""Publishing: what the working store has, packed beside what is published already.

Append-only. A line that is published stays as it is, whatever the working store says; new records
and comparisons are put into their place in the order. Only ``set_aside``, asked for by name, takes
lines out: those that no table reads any more, because the cell was computed again. Everything is
checked before anything is written, and each packed file is replaced as a whole, so that running it
again after an interruption completes it, and running it twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fine_bench.errors import DataError
from fine_bench.store.comparisons import Consistency
from fine_bench.store.files import StoreError, lock, make_folder, remove_leftovers, write_atomic
from fine_bench.store.published import Entry, comparison_key
from fine_bench.store.record_json import key_of
from fine_bench.store.records import RecordStore
from fine_bench.types import RunRecord

SUPERSEDED = "superseded"
"""The folder beside ``published`` for lines that were set aside."""


@dataclass(frozen=True)
class Publication:
    """What is published now, and what of it is new.

    Attributes:
        records, comparisons: all that are published.
        new_records, new_comparisons: of them, those added now.
        files: the packed files.
        size: their bytes.
        written: the files that changed.
        problems: files of the working store that could not be read, one line each.
    """

    records: int
    comparisons: int
    new_records: int
    new_comparisons: int
    files: tuple[Path, ...]
    size: int
    written: tuple[Path, ...]
    problems: tuple[str, ...]


def publish(
    store: RecordStore, tasks: Sequence[str] = (), comparisons: Sequence[Consistency] | None = None
) -> Publication:
    """Add the working store's records and comparisons to the packed tables.

    Args:
        store: a results folder.
        tasks: whose; all when empty.
        comparisons: publish these of the working store's alone, and no record.

    Raises:
        DataError: an unknown task.
        StoreError: something stands against it, each reason named on a line of its own: a damaged
            packed line, a record that contradicts a published one of the same
            identity and revision, or one made by code with uncommitted changes. Nothing was
            written then.
    """
    folder = store.published.folder
    make_folder(folder)
    with lock(folder) as locked:
        remove_leftovers(folder, locked)
        published, own, problems = store.entries()
        if comparisons is not None:
            wanted = {comparison_key(one) for one in comparisons}
            own = [entry for entry in own if entry.key in wanted]
        new = _new(published, own, tasks)
        damaged = [line for line in problems if line.startswith("published/")]
        if damaged:
            raise StoreError(
                "\n".join(damaged) + "\nnothing is published beside a damaged line, which would be "
                "lost; restore the file, for instance with git checkout"
            )
        tables: dict[str, list[Entry]] = {}
        for entry in new:
            tables.setdefault(entry.table, []).append(entry)
        written = []
        for name, added in sorted(tables.items()):
            entries = [e for e in published if e.table == name] + added
            entries.sort(key=lambda entry: entry.order)
            write_atomic(folder / name, "".join(f"{e.line}\n" for e in entries).encode())
            written.append(folder / name)
    files = tuple(sorted(folder.glob("*.jsonl")))
    everything = [entry.found for entry in (*published, *new)]
    return Publication(
        records=sum(isinstance(found, RunRecord) for found in everything),
        comparisons=sum(isinstance(found, Consistency) for found in everything),
        new_records=sum(isinstance(entry.found, RunRecord) for entry in new),
        new_comparisons=sum(isinstance(entry.found, Consistency) for entry in new),
        files=files,
        size=sum(path.stat().st_size for path in files),
        written=tuple(written),
        problems=tuple(problems),
    )


@dataclass(frozen=True)
class SetAside:
    """What ``set_aside`` took out.

    Attributes:
        records, comparisons: how many lines.
        size: their bytes.
        written: the files that they are in now.
    """

    records: int
    comparisons: int
    size: int
    written: tuple[Path, ...]


def set_aside(store: RecordStore) -> SetAside:
    """Move lines that a later revision replaces from the packed tables to ``superseded``.

    A record goes if there is a later revision of the same identity; a comparison of seeds goes if
    one of the scores that it compares is that of a record that goes. Tables read neither, and
    they would grow the packed files with each time a cell is computed again. The lines are appended
    to ``superseded/TASK--SETTING.jsonl`` first, each once, and only then leave the packed file, so
    that an interruption loses nothing.

    Raises:
        StoreError: a damaged packed line, or a file that cannot be written.
    """
    folder, aside = store.published.folder, store.root / SUPERSEDED
    make_folder(folder)
    records = comparisons = size = 0
    written = []
    with lock(folder) as locked:
        remove_leftovers(folder, locked)
        published, _, problems = store.entries()
        damaged = [line for line in problems if line.startswith("published/")]
        if damaged:
            raise StoreError("\n".join(damaged) + "\nnothing is set aside beside a damaged line")
        for name in sorted({entry.table for entry in published}):
            entries = [entry for entry in published if entry.table == name]
            counts = _Current(entry.found for entry in entries)
            gone = {id(e) for e in entries if not counts.holds(e.found)}
            if not gone:
                continue
            make_folder(aside)
            lines = (aside / name).read_bytes().split(b"\n")[:-1] if (aside / name).exists() else []
            leaving = [e.line for e in entries if id(e) in gone]
            there = set(lines)
            lines += [line.encode() for line in leaving if line.encode() not in there]
            write_atomic(aside / name, b"".join(line + b"\n" for line in lines))
            left = [e for e in entries if id(e) not in gone]
            write_atomic(folder / name, "".join(f"{e.line}\n" for e in left).encode())
            written.append(aside / name)
            kinds = [isinstance(e.found, RunRecord) for e in entries if id(e) in gone]
            records, comparisons = records + sum(kinds), comparisons + len(kinds) - sum(kinds)
            size += sum(len(line.encode()) + 1 for line in leaving)
    return SetAside(records, comparisons, size, tuple(written))


class _Current:
    """What later revisions do not replace.

    Args:
        found: records and comparisons.
    """

    def __init__(self, found: Iterable[RunRecord | Consistency]) -> None:
        records = [one for one in found if isinstance(one, RunRecord)]
        self._latest: dict[tuple[object, ...], int] = {}
        for record in records:
            key = key_of(record)
            self._latest[key] = max(self._latest.get(key, 0), record.revision)
        alive = {record.scores_sha256 for record in records if self.holds(record)}
        self._replaced = {record.scores_sha256 for record in records} - alive

    def holds(self, found: RunRecord | Consistency) -> bool:
        """Whether it is of the latest revision, or compares no scores that were replaced."""
        if isinstance(found, RunRecord):
            return found.revision >= self._latest.get(key_of(found), 0)
        return self._replaced.isdisjoint(found.scores.values())


def _new(published: Sequence[Entry], own: Sequence[Entry], tasks: Sequence[str]) -> list[Entry]:
    """Those to be added, or an error that names each that cannot be."""
    known = {entry.key: entry for entry in published}
    # records stay out beside later ones that are published, comparisons beside any later record
    counts = {
        True: _Current(entry.found for entry in published),
        False: _Current(entry.found for entry in (*published, *own)),
    }
    have = sorted({entry.found.task for entry in (*published, *own)})
    missing = [task for task in tasks if task not in have]
    if missing:
        raise DataError(f"no records of {', '.join(missing)}; there are: {', '.join(have)}")
    new, refused = [], []
    for entry in own:
        if tasks and entry.found.task not in tasks:
            continue
        if entry.key in known:
            refused.append(
                f"{entry.where} says something else than {known[entry.key].where}, which is "
                "published and stays; move the file away, and if its cell is to be published, "
                "compute it again with force=true, which makes a further revision"
            )
        elif isinstance(entry.found, RunRecord) and entry.found.environment.get("dirty") is True:
            refused.append(
                f"{entry.where} was made by code with uncommitted changes, which nobody can check "
                "out; commit, compute it again with force=true and move this file away"
            )
        elif counts[isinstance(entry.found, RunRecord)].holds(entry.found):
            new.append(entry)  # else it was set aside, or comes when a later one is published
    if refused:
        raise StoreError("\n".join(refused))
    return new
