"""What a finished record lacks that it was certainly written with: it was cut or edited.

Nothing says in a record what it should hold, and what runs write grows with the versions. So a
record is held against its neighbours. *Numbers that come together*, those of one metric function
or file (``metrics.registry.together``) and those of one group, are all in it or none: where another
seed of its row has more of them, it lacks these. *Fields that tables and report read* are in every
finished record: what more than half of a table's records hold, the others lack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fine_bench.leaderboard.captions import DESCRIBING, TRAINING_FACTS
from fine_bench.leaderboard.tables import RowKey, key_of
from fine_bench.types import RunRecord

FIELDS: tuple[tuple[str, ...], ...] = (
    ("metrics", "n_bad"),
    ("cost", "seconds"),
    ("environment", "commit"),
    ("environment", "dirty"),
    ("config", "estimator"),
    *(("config", *names) for names in DESCRIBING),
    *(("training", name) for name, _, _ in TRAINING_FACTS),
)


def incomplete(records: Iterable[RunRecord], blocks: Sequence[frozenset[str]]) -> list[str]:
    """A line for each record of one table that lacks something, with its row, seed and names.

    Args:
        records: of the table; only finished ones are looked at.
        blocks: names of metrics that come together.
    """
    finished = sorted((r for r in records if r.status == "finished"), key=_order)
    rows: dict[RowKey, list[RunRecord]] = {}
    for record in finished:
        rows.setdefault(key_of(record), []).append(record)
    usual = [path for path in FIELDS if 2 * sum(_holds(r, path) for r in finished) > len(finished)]
    lines = []
    for record in finished:
        lacks = {".".join(path) for path in usual if not _holds(record, path)}
        for name in _cut(record, rows[key_of(record)], blocks):
            lacks.add(f"metrics.{name}")
        if lacks:
            lines.append(
                f"{record.estimator} {record.target}: the record of seed {record.seed} lacks "
                f"{', '.join(sorted(lacks))}, which others of the table have: it was cut or "
                "edited; compute it again with force=true"
            )
    return lines


def _order(record: RunRecord) -> tuple[Any, ...]:
    return (*key_of(record), record.seed, record.version)


def _holds(record: RunRecord, path: Sequence[str]) -> bool:
    value: Any = getattr(record, path[0])
    for name in path[1:]:
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


def _cut(
    record: RunRecord, row: Sequence[RunRecord], blocks: Sequence[frozenset[str]]
) -> Iterator[str]:
    """Names of which the record has some of the block, and other seeds of its row have more."""
    alike = [other for other in row if other.version == record.version]
    held = set(record.metrics)
    everything = held.union(*(other.metrics for other in alike))
    for block in (*blocks, *_groups(everything)):
        if block & held:
            yield from (block & everything) - held


def _groups(names: Iterable[str]) -> list[frozenset[str]]:
    """``group/<name>/mu`` and its like, by the group."""
    found: dict[str, set[str]] = {}
    for name in names:
        head, _, _ = name.rpartition("/")
        if head.startswith("group/"):
            found.setdefault(head, set()).add(name)
    return [frozenset(block) for block in found.values()]
