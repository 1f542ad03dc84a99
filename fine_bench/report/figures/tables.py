"""One table of the leaderboard with its records and scores, read when they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fine_bench.leaderboard.captions import cell_lines
from fine_bench.leaderboard.sensitivity import Spread, spreads
from fine_bench.leaderboard.tables import Leaderboard, Row, Table
from fine_bench.metrics.detection import suspicion
from fine_bench.report.figures.style import Kind, Look, looks
from fine_bench.report.figures.titles import titles_of
from fine_bench.store.files import AbsentScoresError, StoreError
from fine_bench.store.records import RecordStore, Scan, newest
from fine_bench.types import End, InfluenceScores, RunRecord

Array = NDArray[np.float64]

TRUTH = "truth/is_bad"


@dataclass
class TableResults:
    """One table of the leaderboard with its records; scores are read when they are needed."""

    store: RecordStore
    table: Table
    records: Mapping[tuple[str, str, str, int], RunRecord]
    looks: Mapping[str, Look]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spreads: Sequence[Spread] = ()
    _cache: dict[tuple[str, str, str, int], InfluenceScores | None] = field(default_factory=dict)

    def record(self, row: Row, seed: int) -> RunRecord:
        """The record behind a row's seed."""
        return self.records[row.estimator, row.estimator_hash, row.target, seed]

    def newest(self, row: Row) -> str:
        """Time stamp of a row's latest record."""
        return max((self.record(row, seed).created for seed in row.seeds), default="")

    def scores(self, row: Row, seed: int) -> InfluenceScores | None:
        """The scores of a row's seed; None when their file cannot be read, which is noted."""
        key = (row.estimator, row.estimator_hash, row.target, seed)
        if key not in self._cache:
            try:
                self._cache[key] = self.store.load_scores(self.record(row, seed))
            except AbsentScoresError:  # as in a fresh clone: one line for all of them
                self._cache[key] = None
                self.problems.append(
                    f"{self.table.task}: published scores are not here, so what needs them is left "
                    "out; unpack their archive with `fine-bench publish --unpack ARCHIVE`"
                )
            except StoreError as error:
                self._cache[key] = None
                self.problems.append(str(error))
        return self._cache[key]

    def vector(self, row: Row, seed: int) -> Array | None:
        """Suspicion of all examples ``(n_train,)``; None for a file that cannot be read.

        A method that scored some examples only ranks others than the rest do: None too, and noted.
        """
        scores = self.scores(row, seed)
        if scores is None:
            return None
        if scores.watched is not None:
            self.notes.append(
                f"{self.table.task}: {row.label}, target {row.target}, ranks a sample: not in "
                "recall_curves and figure1_losses_vary"
            )
            return None
        return suspicion(scores.values, self.record(row, seed).end)

    def truth(self, row: Row, seed: int) -> NDArray[np.bool_] | None:
        """Which training examples are bad, ``(n_train,)``, if the scores say."""
        scores = self.scores(row, seed)
        found = None if scores is None else scores.extras.get(TRUTH)
        return None if found is None else np.asarray(found, dtype=np.bool_)

    def rows(self, target: str | None = None) -> list[Row]:
        """Rows with at least one finished seed."""
        return [r for r in self.table.rows if r.seeds and target in (None, r.target)]

    @property
    def targets(self) -> list[str]:
        """Targets with a finished row, in the leaderboard's order."""
        return list(dict.fromkeys(row.target for row in self.rows()))

    @property
    def ends(self) -> dict[str, End]:
        """The suspicious end of each target's scores, as its records declare it."""
        return {
            target: self.record(row, row.seeds[0]).end
            for target in self.targets
            for row in self.rows(target)[:1]
        }

    @property
    def titles(self) -> dict[str, str]:
        """What each target asks in this table's task."""
        return titles_of(self.ends)

    @property
    def size(self) -> str:
        """Task, model, number of examples and of seeds, as the titles give them."""
        table = self.table
        parts = [str(table.options[name]) for name in ("model",) if table.options.get(name)]
        n_train = self.n_train
        if n_train:
            bad = f", {table.k:,} of them bad" if table.k else ""
            parts.append(f"{n_train:,} training examples{bad}")
        seeds = len({seed for row in self.rows() for seed in row.seeds})
        parts.append(f"n = {seeds} seed{'s' if seeds != 1 else ''}")
        return f"{table.task}: {', '.join(parts)}"

    @property
    def n_train(self) -> int:
        """Number of training examples, 0 when no scores can be read."""
        for row in self.rows():
            for seed in row.seeds:
                scores = self.scores(row, seed)
                if scores is not None:
                    return int(scores.values.shape[1])
        return 0


def table_results(store: RecordStore, board: Leaderboard, scan: Scan) -> list[TableResults]:
    """The results of each table; ``scan`` is what ``store.scan()`` found."""
    found = []
    kept = newest(scan.records)
    ranges = spreads(store, scan)
    for table in board.tables:
        where = (table.task, table.setting, table.data)
        versions = {(r.estimator, r.estimator_hash, r.target): r.version for r in table.rows}
        mine = {
            (r.estimator, r.estimator_hash, r.target, r.seed): r
            for r in kept
            if r.status == "finished"
            and (r.task, r.setting, r.data_sha256) == where
            and versions.get((r.estimator, r.estimator_hash, r.target)) == r.version
        }
        kinds = {}
        for row in table.rows:
            if row.seeds:
                record = mine[row.estimator, row.estimator_hash, row.target, row.seeds[0]]
                kinds[row.label] = kind_of(row.estimator, record.config)
        own = [s for s in ranges if (s.task, s.setting, s.data) == where]
        found.append(TableResults(store, table, mine, looks(kinds), spreads=own))
    return found


def kind_of(estimator: str, config: Mapping[str, Any]) -> Kind:
    """Family of a method and whether it is a control, from the class that its record names.

    ``fine_bench`` itself is f-INE, a module of controls holds controls, and any other module is a
    family of its own: ``baselines.trak`` is ``trak``.
    """
    options = config.get("estimator", {})
    path = str(options.get("_target_", "")) if isinstance(options, Mapping) else ""
    package, _, rest = path.partition(".")
    module = rest.rpartition(".")[0].rpartition(".")[2] or rest.rpartition(".")[0]
    if "control" in module:
        return Kind("control", True)
    if "paper" in estimator:
        return Kind("f-INE (paper)", False)
    if package == "fine_bench" or (not path and estimator.startswith("fine")):
        return Kind("f-INE", False)
    return Kind(module or estimator, False)


def suffixes(tables: Sequence[Table]) -> dict[tuple[str, str, str], str]:
    """By (task, setting, data), what tells a table's files apart: the task, and more if needed."""
    names = {}
    for t in tables:
        name = f"--{t.task}"
        if sum(o.task == t.task for o in tables) > 1:
            name += f"--{t.setting[:8]}"
        if sum((o.task, o.setting) == (t.task, t.setting) for o in tables) > 1:
            name += f"--{t.data[:8]}"
        safe = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in name)
        names[t.task, t.setting, t.data] = safe
    return names


def undrawn_cells(table: Table) -> list[str]:
    """The cells that are in no figure: which methods and seeds, and why."""
    return [f"{table.task}: not drawn, {line}" for line in cell_lines(table)]


def together(problems: Sequence[str]) -> list[str]:
    """Problems each once; what several tables lack in the same words in one line that names them.

    A line of a table begins with its task and a colon.
    """
    tasks: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        task, colon, rest = problem.partition(": ")
        tasks.setdefault(rest if colon else problem, []).append(task if colon else "")
    return [f"{', '.join(names)}: {text}" if any(names) else text for text, names in tasks.items()]
