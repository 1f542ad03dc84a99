"""What a leaderboard consists of: plain data, without reading, arithmetic or looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from fine_bench.metrics.registry import Metric, columns
from fine_bench.types import RunRecord

State: TypeAlias = Literal["finished", "failed", "skipped", "missing"]
RowKey: TypeAlias = tuple[str, str, str]
"""estimator, digest of its options, target"""
TableKey: TypeAlias = tuple[str, str, str]
"""task, setting, digest of the data"""


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
class CellState:
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


class Planned(NamedTuple):
    """A cell that a sweep was asked for."""

    setting: str
    estimator: str
    estimator_hash: str
    target: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One estimator on one target.

    Attributes:
        estimator, variant, estimator_hash, target, version: which; ``variant`` names the options
            that differ from other configurations of the same estimator, empty for an only one.
        seeds: the finished ones.
        stats: by key of a ``Metric``. A key is absent when no seed has the number.
        dirty: whether a record was made by code with uncommitted changes.
        clock: that measured its costs: empty for wall time, ``cpu``, or both where records differ.
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
    clock: str = ""
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


def shows(row: Row, metric: Metric) -> bool:
    """Whether a row has a number, and the one beside which it is shown."""
    return metric.key in row.stats and (not metric.beside or metric.beside in row.stats)


def key_of(row: Row | CellState | RunRecord) -> RowKey:
    """Estimator, its configuration and target: what makes a row."""
    return (row.estimator, row.estimator_hash, row.target)


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
        superseded: names of rows that stand in no table, since a higher version of the method has
            rows of the same estimator and target.
        limits: what retraining itself says, apart from the rows and never ranked with them: rows
            without seeds and intervals, whose ``variant`` says what they are made of. Empty
            without a ground truth.
        made_by: the function that made the data, as the records name it; empty where they do not.
    """

    task: str
    setting: str
    data: str
    options: Mapping[str, Any]
    training: Mapping[str, Stat]
    k: int
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    cells: tuple[CellState, ...]
    superseded: tuple[str, ...] = ()
    limits: tuple[Row, ...] = ()
    made_by: str = ""

    @property
    def shown_rows(self) -> list[Row]:
        """The rows that have a number, or lack it by a fault; the others are named as cells."""
        faults = {key_of(cell) for cell in self.cells if cell.state != "skipped"}
        return [row for row in self.rows if row.seeds or key_of(row) in faults]


@dataclass(frozen=True)
class Leaderboard:
    """All tables, and the files and numbers that are not to be had, each named.

    ``columns`` are the metrics that the printed tables show, in order.
    """

    tables: tuple[Table, ...]
    problems: tuple[str, ...] = ()
    columns: tuple[Metric, ...] = field(default_factory=columns)

    @property
    def complete(self) -> bool:
        """Nothing failed, nothing is missing, every file could be read (skipping is no fault)."""
        cells = (cell for table in self.tables for cell in table.cells)
        return not self.problems and all(cell.state == "skipped" for cell in cells)

    def of_task(self, task: str) -> Leaderboard:
        """The tables of one task, with all problems."""
        return replace(self, tables=tuple(t for t in self.tables if t.task == task))
