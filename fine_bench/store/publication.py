"""Publishing: what the working store has, packed beside what is published already.

Append-only. A line that is published stays as it is, whatever the working store says; new records
and comparisons are put into their place in the order. Everything is checked before anything is
written, and each packed file is replaced as a whole, so that running it again after an interruption
completes it, and running it twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fine_bench.errors import DataError
from fine_bench.store.comparisons import Consistency
from fine_bench.store.files import StoreError, lock, make_folder, remove_leftovers, write_atomic
from fine_bench.store.published import Entry, comparison_key
from fine_bench.store.records import RecordStore
from fine_bench.types import RunRecord


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


def _new(published: Sequence[Entry], own: Sequence[Entry], tasks: Sequence[str]) -> list[Entry]:
    """Those to be added, or an error that names each that cannot be."""
    known = {entry.key: entry for entry in published}
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
        else:
            new.append(entry)
    if refused:
        raise StoreError("\n".join(refused))
    return new
