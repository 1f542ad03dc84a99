"""The leaderboard: what the records say, seed by seed, and what is missing from them.

``python -m fine_bench.leaderboard`` rebuilds it from ``results/records/`` alone; nothing is trained
and nothing but the tables and the cached comparisons of seeds is written. One table a task and
setting; one row an estimator and target (and variant, where one estimator was run with several
configurations). A seed that failed, was skipped or is absent is listed by name and never averaged
away. The same records give the same bytes, in whatever order the files are found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fine_bench.leaderboard import render as view
from fine_bench.leaderboard.ties import PairValues, RowKey, with_ties
from fine_bench.metrics.consistency import coefficient_of_variation, pairwise_consistency
from fine_bench.metrics.detection import suspicion
from fine_bench.metrics.intervals import mean_interval, pair_mean_interval
from fine_bench.store.comparisons import Consistency, consistency_digest
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore, Scan, newest
from fine_bench.types import SUSPICIOUS_END, TARGETS, InfluenceScores, RunRecord

METRIC_VERSION = 1
"""Of the consistency metrics; raise it when their values may change, and caches are made anew."""

LEVEL = 0.95

Source: TypeAlias = Literal["metrics", "consistency", "cost"]
State: TypeAlias = Literal["finished", "failed", "skipped", "missing"]
OnRow: TypeAlias = Callable[[int, int, str], None]


class Column(NamedTuple):
    """A number that the printed tables show. Every other number goes to the csv by itself.

    Attributes:
        name: key in ``record.metrics`` or ``record.cost``, or a consistency metric.
        label: heading.
        higher: whether more is better.
        source: where it comes from, which also decides the table it stands in.
        block: heading of a table of its own, for what only some rows have. It shows those rows,
            and the columns that one of them has, and is left out without any.
        needs: key among a row's stats that makes it one of the block's rows.
    """

    name: str
    label: str
    higher: bool
    source: Source
    block: str = ""
    needs: str = ""

    @property
    def key(self) -> str:
        """Name among a row's ``stats`` and in the csv."""
        return stat_key(self.source, self.name)


FIDELITY = ("fidelity to retraining", view.TRUTH_VERSION)
TOP = ("top of the list, and spread over runs", "recall_top_20")
CURE = ("cure: tuned again without the top of the list", "cure/removed")

COLUMNS = (
    Column("auroc", "AUROC", True, "metrics"),
    Column("average_precision", "avg. precision", True, "metrics"),
    Column("recall_at_rate", "recall@rate", True, "metrics"),
    Column("recall_curve_area", "curve area", True, "metrics"),
    Column("fidelity", "fidelity", True, "metrics", *FIDELITY),
    Column("fidelity_of_ceiling", "fid. of ceiling", True, "metrics", *FIDELITY),
    Column("fidelity_clean", "fid. within clean", True, "metrics", *FIDELITY),
    Column("lds", "LDS", True, "metrics", *FIDELITY),
    Column("lds_of_ceiling", "LDS of ceiling", True, "metrics", *FIDELITY),
    Column("recall_top_20", "recall in top 20 %", True, "metrics", *TOP),
    Column("precision_at_10", "precision@10", True, "metrics", *TOP),
    Column("precision_at_20", "precision@20", True, "metrics", *TOP),
    Column("precision_at_50", "precision@50", True, "metrics", *TOP),
    Column("cv_median", "variation", False, "consistency", *TOP),
    Column("cure/steering_rate", "steering rate", False, "metrics", *CURE),
    Column("cure/oracle_steering_rate", "the oracle's", False, "metrics", *CURE),
    Column("cure/removed", "removed", False, "metrics", *CURE),
    Column("cure/bad_removed", "of them bad", True, "metrics", *CURE),
    Column("cure/test_loss", "clean test loss", False, "metrics", *CURE),
    Column("cure/oracle_test_loss", "the oracle's loss", False, "metrics", *CURE),
    Column("spearman", "Spearman", True, "consistency"),
    Column("kendall", "Kendall", True, "consistency"),
    Column("jaccard", "Jaccard@k", True, "consistency"),
    Column("jaccard_corrected", "corrected", True, "consistency"),
    Column("seconds", "extra s", False, "cost"),
)


def stat_key(source: Source, name: str) -> str:
    """``auroc``, ``consistency_spearman``, ``cost_seconds``."""
    return name if source == "metrics" else f"{source}_{name}"


@dataclass(frozen=True)
class Stat:
    """A mean over seeds (for consistency: over pairs of seeds) with its 95 % bootstrap interval.

    ``n`` is the number of seeds. A NaN mean means *undefined*: some seed has no value; a NaN
    interval means that there are too few seeds for one.
    """

    mean: float
    lower: float
    upper: float
    n: int


@dataclass(frozen=True)
class Cell:
    """One estimator, target and seed, and what became of it."""

    task: str
    setting: str
    estimator: str
    estimator_hash: str
    target: str
    seed: int
    state: State
    reason: str = ""
    variant: str = ""


@dataclass(frozen=True)
class Row:
    """One estimator on one target.

    Attributes:
        estimator, variant, estimator_hash, target, version: which; ``variant`` names the options
            that differ from other configurations of the same estimator, empty for an only one.
        seeds: the finished ones.
        stats: by key, see ``stat_key``. A key is absent when no seed has the number.
        dirty: whether a record was made by code with uncommitted changes.
        commits: of the code that made the records.
        ties: keys of the columns in which it is a tie with the target's best row: the 95 %
            interval of their difference, paired by seed, holds 0. From six seeds on a difference
            that the sign-flip test does not find significant is a tie too. The best itself has no
            mark, nor has a row without two common seeds. Rows of different ``watched`` are not
            compared.
        watched: number of examples that it scores; None for all of them.
        k: the k of its Jaccard@k, the number of bad ones among the examples that it scores; 0
            when it is not known.
    """

    estimator: str
    variant: str
    estimator_hash: str
    target: str
    version: int
    seeds: tuple[int, ...]
    stats: Mapping[str, Stat]
    dirty: bool = False
    commits: tuple[str, ...] = ()
    ties: frozenset[str] = frozenset()
    watched: int | None = None
    k: int = 0

    @property
    def label(self) -> str:
        """Estimator with its variant, and the number of examples when it scores a sample."""
        sample = "" if self.watched is None else f"{self.watched:,} examples"
        notes = ", ".join(note for note in (self.variant, sample) if note)
        return f"{self.estimator} ({notes})" if notes else self.estimator


@dataclass(frozen=True)
class Table:
    """All rows of one task and setting.

    Attributes:
        task, setting, data: which; ``data`` is the digest of the data.
        options: what describes the setting, by name, in order.
        training: facts about plain training, by name: test accuracy, seconds.
        k: the k of Jaccard@k, the number of bad examples; 0 when it is not known.
        seeds: all seeds that any row has.
        rows: sorted by target, then AUROC.
        cells: the failed, skipped and missing ones.
    """

    task: str
    setting: str
    data: str
    options: Mapping[str, Any]
    training: Mapping[str, Stat]
    k: int
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Leaderboard:
    """All tables, and the files and numbers that are not to be had, each named."""

    tables: tuple[Table, ...]
    problems: tuple[str, ...] = ()
    columns: tuple[Column, ...] = COLUMNS

    @property
    def complete(self) -> bool:
        """Nothing failed, nothing is missing, every file could be read (skipping is no fault)."""
        cells = (cell for table in self.tables for cell in table.cells)
        return not self.problems and all(cell.state == "skipped" for cell in cells)

    def of_task(self, task: str) -> Leaderboard:
        """The tables of one task, with all problems."""
        return replace(self, tables=tuple(t for t in self.tables if t.task == task))

    def frame(self) -> pd.DataFrame:
        """One line a row of the tables, with every number at full precision."""
        return view.frame(self)


class Planned(NamedTuple):
    """A cell that a sweep was asked for."""

    setting: str
    estimator: str
    estimator_hash: str
    target: str
    seed: int


def cells(
    records: Iterable[RunRecord], planned: Iterable[tuple[str, str, str, str, int]]
) -> list[Cell]:
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
            found.append(Cell("", *wanted, state="missing", reason="no record"))
        else:
            found.append(Cell(record.task, *wanted, state=record.status, reason=record.reason))
    return found


# ------------------------------------------------------------------------------------ building


def build(store: RecordStore, on_row: OnRow | None = None) -> Leaderboard:
    """The leaderboard of a store.

    Consistency is computed from the scores once and then kept beside the records, so that later
    rebuilds need no scores. What is compared between seeds is what detection ranks: one suspicion
    an example (``metrics.detection.suspicion``). Cells that show a row's sensitivity to its options
    are no rows (``fine_bench.sensitivity``).

    Args:
        store: where the records are.
        on_row: called as (rows done, rows in all, name of the row) before each row.
    """
    scan = store.scan()
    records = [record for record in newest(scan.records) if not record.varies]
    return build_from(store, records, scan, on_row)


def build_from(
    store: RecordStore, records: Sequence[RunRecord], scan: Scan, on_row: OnRow | None = None
) -> Leaderboard:
    """The leaderboard of some records; ``scan`` has the problems and the cached comparisons."""
    problems = list(scan.problems)
    groups = by_table(records)
    total = sum(len(_by_row(records)) for records in groups.values())
    done = 0
    tables = []
    for (task, setting, data), records in sorted(groups.items()):
        rows: list[Row] = []
        pairs: dict[RowKey, PairValues] = {}
        unfinished: list[Cell] = []
        seeds = sorted({record.seed for record in records})
        variants = _variants(records)
        problems += [f"{task}/{setting[:8]}: {line}" for line in _truths(records)]
        # rows that score a sample of the examples have a k of their own
        k, complaint = _k([r for r in records if "n_watched" not in r.metrics])
        if complaint:
            problems.append(f"{task}/{setting[:8]}: {complaint}")
        for (estimator, estimator_hash, target), members in sorted(_by_row(records).items()):
            if on_row is not None:
                on_row(done, total, f"{task} {estimator} {target}")
            done += 1
            version = max(record.version for record in members)
            current = {r.seed: r for r in members if r.version == version}
            finished = {seed: r for seed, r in current.items() if r.status == "finished"}
            variant = variants[estimator, estimator_hash]
            for seed in sorted(set(seeds) - set(finished)):
                record = current.get(seed)
                state: State = record.status if record else "missing"
                old = any(r.seed == seed for r in members)
                reason = record.reason if record else "other rows have it"
                if old and not record:
                    reason = f"recorded by an older method version only; this is version {version}"
                name = (task, setting, estimator, estimator_hash, target, seed)
                unfinished.append(Cell(*name, state=state, reason=reason, variant=variant))
            stats = _stats(finished)
            watched, own_k, complaint = _watched(finished.values(), k)
            if complaint:
                problems.append(f"{task}/{setting[:8]}: {estimator} {target}: {complaint}")
            compared, complaint = _consistency(store, finished, own_k, scan.consistency)
            stats |= _consistency_stats(compared)
            pairs[estimator, estimator_hash, target] = compared.pairs if compared else {}
            if complaint:
                complaint = complaint.replace(f"{store.root}{os.sep}", "")
                problems.append(f"{task}/{setting[:8]}: {estimator} {target}: {complaint}")
            git = [r.environment for r in finished.values()]
            rows.append(
                Row(
                    estimator,
                    variant,
                    estimator_hash,
                    target,
                    version,
                    tuple(sorted(finished)),
                    stats,
                    dirty=any(e.get("dirty") is True for e in git),
                    commits=tuple(sorted({str(e.get("commit", "unknown")) for e in git})),
                    watched=watched,
                    k=own_k,
                )
            )
        tables.append(
            Table(
                task,
                setting,
                data,
                _options(groups, (task, setting, data)),
                _training(records),
                k,
                tuple(seeds),
                tuple(sorted(with_ties(rows, records, pairs, COLUMNS, LEVEL), key=_rank)),
                tuple(sorted(unfinished, key=lambda c: (_rank_target(c.target), *_cell_key(c)))),
            )
        )
    return Leaderboard(tuple(tables), tuple(problems))


def _k(records: Iterable[RunRecord]) -> tuple[int, str]:
    """The number of bad examples, 0 if unknown, and a complaint where the records disagree."""
    ks = sorted({int(n) for n in _values(records, "n_bad") if n > 0})
    if len(ks) > 1:
        return 0, f"records disagree about n_bad: {ks}"
    return (ks[0] if ks else 0), ""


def _watched(finished: Iterable[RunRecord], k: int) -> tuple[int | None, int, str]:
    """How many examples a row scores (None for all), its k, and a complaint."""
    records = list(finished)
    sizes = sorted({int(n) for n in _values(records, "n_watched")})
    if not sizes:
        return None, k, ""
    if len(sizes) > 1 or any("n_watched" not in r.metrics for r in records):
        return sizes[0], 0, "its seeds score different numbers of examples"
    return sizes[0], *_k(records)


def _truths(records: Sequence[RunRecord]) -> list[str]:
    """Complaints about fidelities that cannot be averaged or compared.

    A record keeps the version of the ground truth that it was compared with, which its identity
    does not contain: records that were made before a truth existed stay without.
    """
    finished = [r for r in records if r.status == "finished"]
    lines = []
    versions = sorted({int(x) for x in _values(finished, view.TRUTH_VERSION)})
    if len(versions) > 1:
        lines.append(
            f"records compare with different versions of the ground truth: {versions}; compute the "
            "older ones again with force=true"
        )
    for (estimator, _, target), members in sorted(_by_row(finished).items()):
        without = sorted({r.seed for r in members if view.TRUTH_VERSION not in r.metrics})
        if len(without) < len({r.seed for r in members}) and without:
            lines.append(
                f"{estimator} {target}: seeds {', '.join(map(str, without))} have no fidelity and "
                "are not in its mean; compute them again with force=true"
            )
    return lines


TableKey: TypeAlias = tuple[str, str, str]


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


def _by_row(records: Sequence[RunRecord]) -> dict[tuple[str, str, str], list[RunRecord]]:
    rows: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in records:
        key = (record.estimator, record.estimator_hash, record.target)
        rows.setdefault(key, []).append(record)
    return rows


def _values(records: Iterable[RunRecord], metric: str) -> list[float]:
    return [r.metrics[metric] for r in records if math.isfinite(r.metrics.get(metric, math.nan))]


def _rank_target(target: str) -> tuple[int, str]:
    known: tuple[str, ...] = TARGETS
    return (known.index(target) if target in known else len(known), target)


def _cell_key(cell: Cell) -> tuple[str, str, str, int]:
    return (cell.estimator, cell.variant, cell.estimator_hash, cell.seed)


def _rank(row: Row) -> tuple[Any, ...]:
    auroc = row.stats["auroc"].mean if "auroc" in row.stats else math.nan
    best = -math.inf if math.isnan(auroc) else auroc
    return (*_rank_target(row.target), -best, row.estimator, row.variant, row.estimator_hash)


def _stats(finished: Mapping[int, RunRecord]) -> dict[str, Stat]:
    """Mean and interval of every metric and cost, each over the seeds that report it."""
    by_key: dict[str, dict[int, float]] = {}
    for seed, record in finished.items():
        numbers = {stat_key("metrics", name): x for name, x in record.metrics.items()}
        numbers |= {stat_key("cost", name): x for name, x in record.cost.items()}
        for key, value in numbers.items():
            by_key.setdefault(key, {})[seed] = value
    return {key: Stat(*mean_interval(v, LEVEL), n=len(v)) for key, v in by_key.items()}


# --------------------------------------------------------------------------------- consistency


def _consistency(
    store: RecordStore, finished: Mapping[int, RunRecord], k: int, cached: Sequence[Consistency]
) -> tuple[Consistency | None, str]:
    """Agreement between the seeds of a row: from the cache where possible, else from the scores.

    Returns:
        the comparison (``None`` below two seeds, or when it cannot be made) and what went wrong,
        empty when nothing did.
    """
    if len(finished) < 2:
        return None, ""
    first = next(iter(finished.values()))
    if first.metrics.get("n_watched") == 0:  # it scores groups, and no single example
        return None, ""
    row = (first.task, first.setting, first.estimator, first.target)
    if first.target not in SUSPICIOUS_END:
        return None, f"unknown target {first.target!r}, so no consistency"
    scores = {seed: record.scores_sha256 for seed, record in sorted(finished.items())}
    name = consistency_digest(scores, k, METRIC_VERSION)
    wanted = {(a, b): _pair(scores, a, b) for a, b in combinations(scores, 2)}
    pairs: dict[tuple[str, str], Mapping[str, float]] = {}
    for old in cached:
        if (old.task, old.setting, old.estimator, old.target) != row or old.k != k:
            continue
        if old.digest == name and old.pairs.keys() == wanted.keys():
            return old, ""
        if old.metric_version == METRIC_VERSION:  # seeds were added: their old pairs still hold
            pairs |= {_pair(old.scores, a, b): values for (a, b), values in old.pairs.items()}
    end = first.end
    try:
        loaded = {s: store.load_scores(finished[s]) for s in scores}
        if len({_watched_ones(found) for found in loaded.values()}) > 1:
            raise ValueError("its seeds score different examples; set sample_seed to one number")
        vectors = {s: suspicion(found.watched_values, end) for s, found in loaded.items()}
        for (a, b), pair in wanted.items():
            if pair not in pairs:
                pairs[pair] = _compare(vectors[a], vectors[b], k)
        _, median = coefficient_of_variation(np.stack(list(vectors.values())))
    except (StoreError, ValueError) as error:
        if any(pair not in pairs for pair in wanted.values()):
            return None, f"no consistency: {error}"
        known = {seeds: pairs[pair] for seeds, pair in wanted.items()}
        return Consistency(*row, k, METRIC_VERSION, scores, known), ""
    known = {seeds: pairs[pair] for seeds, pair in wanted.items()}
    result = Consistency(*row, k, METRIC_VERSION, scores, known, {"cv_median": median})
    try:
        store.save_consistency(result)
    except StoreError as error:
        return result, str(error)
    return result, ""


def _watched_ones(scores: InfluenceScores) -> tuple[int, ...] | None:
    return None if scores.watched is None else tuple(scores.watched.tolist())


def _pair(scores: Mapping[int, str], a: int, b: int) -> tuple[str, str]:
    """Digests of what was compared, in an order that does not depend on the seeds' numbers."""
    return min(scores[a], scores[b]), max(scores[a], scores[b])


def _compare(a: NDArray[np.float64], b: NDArray[np.float64], k: int) -> dict[str, float]:
    values = pairwise_consistency(a, b, max(k, 1), "high")
    if k == 0:  # nobody knows the bad examples, so there is no k
        return {name: x for name, x in values.items() if not name.startswith("jaccard")}
    return values


def _consistency_stats(consistency: Consistency | None) -> dict[str, Stat]:
    if consistency is None:
        return {}
    n = len(consistency.scores)
    stats = {}
    for name in sorted({name for values in consistency.pairs.values() for name in values}):
        values = {pair: found.get(name, math.nan) for pair, found in consistency.pairs.items()}
        stats[stat_key("consistency", name)] = Stat(*pair_mean_interval(values, LEVEL), n=n)
    for name, value in consistency.variation.items():
        stats[stat_key("consistency", name)] = Stat(value, math.nan, math.nan, n)
    return stats


# -------------------------------------------------------------------------- names and captions


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {k: v for key in config for k, v in _flat(config[key], f"{prefix}.{key}").items()}


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted names of the options in which the configurations differ."""
    keys = sorted({key for config in configs for key in config})
    absent = object()
    return [k for k in keys if any(c.get(k, absent) != configs[0].get(k, absent) for c in configs)]


def _variants(records: Sequence[RunRecord]) -> dict[tuple[str, str], str]:
    """For every (estimator, hash) the options that tell it from its namesakes, or nothing."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for r in records:
        own = _flat(r.config.get("estimator", {}))
        by_name.setdefault(r.estimator, {})[r.estimator_hash] = own
    labels = {}
    for name, configs in by_name.items():
        keys = _differences(list(configs.values()))
        for sha, config in configs.items():
            options = (f"{key.rpartition('.')[2]}={config.get(key, '-')}" for key in keys)
            labels[name, sha] = (", ".join(options) or sha[:8]) if len(configs) > 1 else ""
    # options may look alike while their hashes differ
    for (name, sha), text in list(labels.items()):
        if sum(other == text and n == name for (n, _), other in labels.items()) > 1:
            labels[name, sha] = f"{text}, {sha[:8]}".removeprefix(", ")
    return labels


DESCRIBING = (
    ("task", "n_train"),
    ("task", "noise_rate"),
    ("task", "n_query"),
    ("model", "name"),
    ("trainer", "max_epochs"),
    ("trainer", "batch_size"),
    ("trainer", "lr"),
)


def _options(groups: Mapping[TableKey, Sequence[RunRecord]], key: TableKey) -> dict[str, Any]:
    """What describes a setting: the usual options, and those that tell it from its siblings."""

    def setting_of(record: RunRecord) -> dict[str, Any]:
        return _flat({name: record.config.get(name, {}) for name in ("task", "model", "trainer")})

    # a record that failed early may have no configuration
    first = {k: next((r for r in group if r.config), group[0]) for k, group in groups.items()}
    config = setting_of(first[key])
    usual = [f".{section}.{name}" for section, name in DESCRIBING]
    others = _differences([setting_of(r) for other, r in first.items() if other[0] == key[0]])
    options = {
        ("model" if name == ".model.name" else name.rpartition(".")[2]): config[name]
        for name in usual
        if name in config
    }
    options |= {name[1:]: config.get(name) for name in others if name not in usual}
    if sum(other[:2] == key[:2] for other in groups) > 1:
        options["data"] = key[2][:8]
    return options


def _training(records: Sequence[RunRecord]) -> dict[str, Stat]:
    """Facts about plain training over the seeds; rows that share a training run count once."""
    facts = {}
    for name, _, _ in view.TRAINING_FACTS:
        by_seed: dict[int, set[float]] = {}
        for record in records:
            value = record.training.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                by_seed.setdefault(record.seed, set()).add(float(value))
        means = {seed: math.fsum(values) / len(values) for seed, values in by_seed.items()}
        if means:
            facts[name] = Stat(*mean_interval(means, LEVEL), n=len(means))
    return facts


# ----------------------------------------------------------------------------------------- CLI
