"""From records to tables: which records count, what makes a row, and its numbers.

One table a task and setting; one row an estimator and target (and variant, where one estimator was
run with several configurations). A seed that failed, was skipped or is absent is listed by name and
never averaged away. Rows of which there is a higher method version leave the tables. The same
records give the same bytes, in whatever order the files are found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from fine_bench.clock import CPU, WALL
from fine_bench.leaderboard.captions import (
    CPU_SECONDS,
    TRAINING_FACTS,
    options_of,
    variants_of,
)
from fine_bench.leaderboard.completeness import incomplete
from fine_bench.leaderboard.consistency import LEVEL, Comparisons, consistency_stats
from fine_bench.leaderboard.tables import (
    CellState,
    Leaderboard,
    Planned,
    Row,
    RowKey,
    Stat,
    State,
    Table,
    TableKey,
    key_of,
)
from fine_bench.leaderboard.ties import PairValues, with_ties
from fine_bench.metrics.fidelity import VERSION
from fine_bench.metrics.limits import Limit
from fine_bench.metrics.many_intervals import mean_intervals
from fine_bench.metrics.registry import Metric, columns, stat_key, together
from fine_bench.store.comparisons import Consistency
from fine_bench.store.plausibility import CLOCK, N_TRAIN
from fine_bench.store.records import RecordStore, newest
from fine_bench.types import TARGETS, RunRecord

OnRow: TypeAlias = Callable[[int, int, str], None]
Limits: TypeAlias = Callable[[str, str], Sequence[Limit]]
"""From the digests of data and setting to what retraining says (``retraining.oracles``)."""


def no_limits(data_sha256: str, setting: str) -> Sequence[Limit]:
    """For tables of methods alone."""
    del data_sha256, setting
    return ()


def build(
    store: RecordStore,
    on_row: OnRow | None = None,
    packages: Sequence[str] = (),
    limits: Limits = no_limits,
) -> Leaderboard:
    """The leaderboard of a store.

    Consistency is computed from the scores once and then kept beside the records, so that later
    rebuilds need no scores. Cells that show a row's sensitivity to its options are no rows
    (``leaderboard.sensitivity``).

    Args:
        store: where the records are.
        on_row: called as (rows done, rows in all, name of the row) before each row.
        packages: whose metrics get columns besides those of ``fine_bench``.
        limits: what retraining says of a setting.
    """
    scan = store.scan()
    records = [record for record in newest(scan.records) if not record.varies]
    comparisons = Comparisons(store, scan.consistency)
    return build_from(records, comparisons, scan.problems, on_row, columns(packages), limits)


def build_from(
    records: Sequence[RunRecord],
    comparisons: Comparisons,
    problems: Iterable[str] = (),
    on_row: OnRow | None = None,
    shown: Sequence[Metric] | None = None,
    limits: Limits = no_limits,
) -> Leaderboard:
    """The leaderboard of some records.

    Args:
        records: the ones that count, see ``store.records.newest``.
        comparisons: of their seeds.
        problems: what could not be read.
        on_row: see ``build``.
        shown: the columns of the tables; those of ``fine_bench`` by default.
        limits: see ``build``.
    """
    shown = columns() if shown is None else tuple(shown)
    complaints = list(problems)
    groups = by_table(records)
    groups, old = superseded(groups)
    progress = _Progress(sum(len(_by_row(found)) for found in groups.values()), on_row)
    tables = []
    blocks, options = together(), options_of(groups)
    for key, found in sorted(groups.items()):
        table, more = _table(
            key, found, options[key], old[key], comparisons, progress, shown, blocks
        )
        table = replace(table, limits=_limits(limits(key[2], key[1]), table))
        tables.append(table)
        complaints += [f"{key[0]}/{key[1][:8]}: {line}" for line in more]
    return Leaderboard(tuple(tables), tuple(complaints), tuple(shown))


def _limits(found: Sequence[Limit], table: Table) -> tuple[Row, ...]:
    """The rows of limits on targets that the table has, their numbers without an interval."""
    targets = {row.target for row in table.rows}
    return tuple(
        Row(
            estimator=limit.name,
            variant=limit.made_of,
            estimator_hash="",
            target=limit.target,
            version=1,
            seeds=(),
            stats={
                stat_key("metrics", name): Stat(x, math.nan, math.nan, n=1)
                for name, x in limit.numbers.items()
            },
            k=table.k,
        )
        for limit in found
        if limit.target in targets
    )


class _Progress:
    def __init__(self, total: int, on_row: OnRow | None) -> None:
        self.total, self.on_row, self.done = total, on_row, 0

    def __call__(self, name: str) -> None:
        if self.on_row is not None:
            self.on_row(self.done, self.total, name)
        self.done += 1


def _table(
    key: TableKey,
    records: Sequence[RunRecord],
    options: Mapping[str, Any],
    old: Sequence[str],
    comparisons: Comparisons,
    progress: _Progress,
    shown: Sequence[Metric],
    blocks: Sequence[frozenset[str]],
) -> tuple[Table, list[str]]:
    """One table, and complaints about numbers that it lacks."""
    task, setting, _ = key
    rows: list[Row] = []
    finished_of: list[dict[int, RunRecord]] = []
    compared_of: list[Consistency | None] = []
    unfinished: list[CellState] = []
    seeds = sorted({record.seed for record in records})
    variants = variants_of(records)
    problems = _truths(records) + incomplete(records, blocks)
    # rows that score a sample of the examples have a k of their own
    k, complaint = _k([r for r in records if not _samples(r)])
    if complaint:
        problems.append(complaint)
    for (estimator, estimator_hash, target), members in sorted(_by_row(records).items()):
        progress(f"{task} {estimator} {target}")
        version = max(record.version for record in members)
        current = {r.seed: r for r in members if r.version == version}
        finished = {seed: r for seed, r in current.items() if r.status == "finished"}
        variant = variants[estimator, estimator_hash]
        for seed in sorted(set(seeds) - set(finished)):
            record = current.get(seed)
            state: State = record.status if record else "missing"
            reason = record.reason if record else "other rows have it"
            if record is None and any(r.seed == seed for r in members):
                reason = f"recorded by an older method version only; this is version {version}"
            name = (task, setting, estimator, estimator_hash, target, seed)
            unfinished.append(CellState(*name, state=state, reason=reason, variant=variant))
        watched, own_k, complaint = _watched(finished.values(), k)
        if complaint:
            problems.append(f"{estimator} {target}: {complaint}")
        compared, complaint = comparisons.of(finished, own_k)
        finished_of.append(finished)
        compared_of.append(compared)
        if complaint:
            complaint = complaint.replace(f"{comparisons.store.root}{os.sep}", "")
            problems.append(f"{estimator} {target}: {complaint}")
        git = [r.environment for r in finished.values()]
        said = (str(r.training.get(CLOCK, WALL)) for r in finished.values())
        clocks = {clock for words in said for clock in words.split()}
        rows.append(
            Row(
                estimator,
                variant,
                estimator_hash,
                target,
                version,
                tuple(sorted(finished)),
                {},
                dirty=any(e.get("dirty") is True for e in git),
                clock=" ".join(sorted(clocks)) if clocks - {WALL} else "",
                commits=tuple(sorted({str(e.get("commit", "unknown")) for e in git})),
                watched=watched,
                k=own_k,
            )
        )
    numbers = zip(rows, _stats(finished_of), consistency_stats(compared_of), strict=True)
    rows = [replace(row, stats=own | between) for row, own, between in numbers]
    pairs: dict[RowKey, PairValues] = {
        key_of(row): one.pairs if one else {} for row, one in zip(rows, compared_of, strict=True)
    }
    table = Table(
        *key,
        options,
        _training(records),
        k,
        tuple(seeds),
        tuple(sorted(with_ties(rows, records, pairs, shown, LEVEL), key=_rank)),
        tuple(sorted(unfinished, key=lambda c: (_rank_target(c.target), *_cell_key(c)))),
        tuple(old),
        made_by=_made_by(records),
    )
    return table, problems


def cells(
    records: Iterable[RunRecord], planned: Iterable[tuple[str, str, str, str, int]]
) -> list[CellState]:
    """What became of the planned cells, in their order.

    Args:
        records: all records, as ``RecordStore.scan().records`` gives them.
        planned: (setting, estimator, estimator_hash, target, seed) of each; see ``Planned``.

    Returns:
        One cell each: finished, failed or skipped as its newest record says, missing without one.
    """
    known: dict[tuple[str, str, str, str, int], RunRecord] = {}
    for r in sorted(newest(records), key=lambda r: r.created):
        known[r.setting, r.estimator, r.estimator_hash, r.target, r.seed] = r
    found = []
    for wanted in map(Planned._make, planned):
        record = known.get(wanted)
        if record is None:
            found.append(CellState("", *wanted, state="missing", reason="no record"))
        else:
            found.append(CellState(record.task, *wanted, state=record.status, reason=record.reason))
    return found


# -------------------------------------------------------------------------------------- groups


def by_table(records: Sequence[RunRecord]) -> dict[TableKey, list[RunRecord]]:
    """Records by (task, setting, data): numbers of different data never share an average.

    Records that failed before their data were known stand with the latest data of their setting.
    """
    latest: dict[tuple[str, str], str] = {}
    for record in sorted(records, key=lambda r: (r.created, r.data_sha256)):
        if record.data_sha256:
            latest[record.task, record.setting] = record.data_sha256
    groups: dict[TableKey, list[RunRecord]] = {}
    for record in records:
        where = (record.task, record.setting)
        data = record.data_sha256 or latest.get(where, "")
        groups.setdefault((*where, data), []).append(record)
    return groups


def superseded(
    groups: Mapping[TableKey, Sequence[RunRecord]],
) -> tuple[dict[TableKey, list[RunRecord]], dict[TableKey, list[str]]]:
    """Tables without the rows of which there is a higher method version, and those rows' names.

    Results are only ever added, so a row whose options were changed together with its method stays
    in the records beside the new one: another configuration of the same estimator, all of whose
    records have a lower version. It would be told from the new row by an option's value alone.
    """
    kept: dict[TableKey, list[RunRecord]] = {}
    left: dict[TableKey, list[str]] = {}
    for key, records in groups.items():
        newest_of: dict[tuple[str, str], int] = {}
        rows = _by_row(records)
        versions = {row: max(r.version for r in members) for row, members in rows.items()}
        for (estimator, _, target), version in versions.items():
            where = (estimator, target)
            newest_of[where] = max(version, newest_of.get(where, 0))
        old = {row for row, v in versions.items() if v < newest_of[row[0], row[2]]}
        kept[key] = [record for record in records if key_of(record) not in old]
        left[key] = [
            f"{estimator} · {target} (method version {versions[estimator, sha, target]}, now "
            f"{newest_of[estimator, target]})"
            for estimator, sha, target in sorted(old, key=lambda r: (_rank_target(r[2]), r))
        ]
    return kept, left


def _by_row(records: Sequence[RunRecord]) -> dict[RowKey, list[RunRecord]]:
    rows: dict[RowKey, list[RunRecord]] = {}
    for record in records:
        rows.setdefault(key_of(record), []).append(record)
    return rows


def _rank_target(target: str) -> tuple[int, str]:
    known: tuple[str, ...] = TARGETS
    return (known.index(target) if target in known else len(known), target)


def _cell_key(cell: CellState) -> tuple[str, str, str, int]:
    return (cell.estimator, cell.variant, cell.estimator_hash, cell.seed)


def _rank(row: Row) -> tuple[Any, ...]:
    auroc = row.stats["auroc"].mean if "auroc" in row.stats else math.nan
    best = -math.inf if math.isnan(auroc) else auroc
    return (*_rank_target(row.target), -best, row.estimator, row.variant, row.estimator_hash)


# ------------------------------------------------------------------------------------- numbers


def _values(records: Iterable[RunRecord], metric: str) -> list[float]:
    return [r.metrics[metric] for r in records if math.isfinite(r.metrics.get(metric, math.nan))]


def _k(records: Iterable[RunRecord]) -> tuple[int, str]:
    """The number of bad examples, 0 if unknown, and a complaint where the records disagree."""
    ks = sorted({int(n) for n in _values(records, "n_bad") if n > 0})
    if len(ks) > 1:
        return 0, f"records disagree about n_bad: {ks}"
    return (ks[0] if ks else 0), ""


def _made_by(records: Iterable[RunRecord]) -> str:
    """The function that made the data: a name from a file, which is read and never called."""
    tasks = (record.config.get("task", {}) for record in records)
    return next((str(t["_target_"]) for t in tasks if isinstance(t, dict) and "_target_" in t), "")


def _samples(record: RunRecord) -> bool:
    """Whether it scores some of the examples only."""
    task = record.config.get("task", {})
    n_train = record.training.get(N_TRAIN, task.get(N_TRAIN) if isinstance(task, dict) else None)
    return bool(record.metrics.get("n_watched", n_train) != n_train)


def _watched(finished: Iterable[RunRecord], k: int) -> tuple[int | None, int, str]:
    """How many examples a row scores (None for all), its k, and a complaint."""
    records = list(finished)
    sampling = [_samples(r) for r in records]
    if not any(sampling):
        return None, k, ""
    sizes = sorted({int(n) for n in _values(records, "n_watched")})
    if not all(sampling) or len(sizes) > 1:
        return sizes[0], 0, "its seeds score different numbers of examples"
    return sizes[0], *_k(records)


def _truths(records: Sequence[RunRecord]) -> list[str]:
    """Complaints about fidelities that cannot be averaged or compared.

    A record keeps the version of the ground truth that it was compared with, which its identity
    does not contain: records that were made before a truth existed stay without.
    """
    finished = [r for r in records if r.status == "finished"]
    lines = []
    for target in sorted({r.target for r in finished}):
        own = [r for r in finished if r.target == target]
        versions = sorted({int(x) for x in _values(own, VERSION)})
        if len(versions) > 1:
            lines.append(
                f"{target}: records compare with different versions of the ground truth: "
                f"{versions}; compute the older ones again with force=true"
            )
    for (estimator, _, target), members in sorted(_by_row(finished).items()):
        without = sorted({r.seed for r in members if VERSION not in r.metrics})
        if len(without) < len({r.seed for r in members}) and without:
            lines.append(
                f"{estimator} {target}: seeds {', '.join(map(str, without))} have no fidelity and "
                "are not in its mean; compute them again with force=true"
            )
    return lines


def _stats(rows: Sequence[Mapping[int, RunRecord]]) -> list[dict[str, Stat]]:
    """Mean and interval of every metric and cost of each row, over the seeds that report it."""
    asked: list[tuple[int, str, dict[int, float]]] = []
    for row, finished in enumerate(rows):
        by_key: dict[str, dict[int, float]] = {}
        for seed, record in finished.items():
            numbers = {stat_key("metrics", name): x for name, x in record.metrics.items()}
            numbers |= {stat_key("cost", name): x for name, x in record.cost.items()}
            for key, value in numbers.items():
                by_key.setdefault(key, {})[seed] = value
        asked += [(row, key, values) for key, values in by_key.items()]
    stats: list[dict[str, Stat]] = [{} for _ in rows]
    intervals = mean_intervals([values for *_, values in asked], LEVEL)
    for (row, key, values), interval in zip(asked, intervals, strict=True):
        stats[row][key] = Stat(*interval, n=len(values))
    return stats


def _training(records: Sequence[RunRecord]) -> dict[str, Stat]:
    """Facts about plain training over the seeds; rows that share a training run count once.

    Seconds are kept apart by their clock, and those of two clocks at once are left out.
    """
    by_name: dict[str, dict[int, set[float]]] = {}
    for record in records:
        clock = str(record.training.get(CLOCK, WALL))
        names = {name: name for name, _, _ in TRAINING_FACTS}
        names["seconds"] = {WALL: "seconds", CPU: CPU_SECONDS}.get(clock, "")
        for name, fact in names.items():
            value = record.training.get(name)
            if fact and isinstance(value, int | float) and math.isfinite(value):
                by_seed = by_name.setdefault(fact, {}).setdefault(record.seed, set())
                by_seed.add(float(value))
    found = {
        name: {seed: math.fsum(values) / len(values) for seed, values in by_seed.items()}
        for name, by_seed in by_name.items()
    }
    intervals = mean_intervals(list(found.values()), LEVEL)
    return {
        name: Stat(*interval, n=len(found[name]))
        for name, interval in zip(found, intervals, strict=True)
    }
