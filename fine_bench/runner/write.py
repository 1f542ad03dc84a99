"""Records of what became of a job's cells, one file each, written as soon as a cell is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fine_bench import clock
from fine_bench.runner import addresses
from fine_bench.runner.cells import Outcome
from fine_bench.runner.config import PLACES
from fine_bench.runner.plan import Cell, Job
from fine_bench.store.environment import environment
from fine_bench.store.files import StoreError
from fine_bench.store.plausibility import CLOCK, FILES, N_TRAIN
from fine_bench.store.records import RecordStore
from fine_bench.store.scores import scores_digest
from fine_bench.types import InfluenceScores, RunRecord


@dataclass(frozen=True, eq=False)
class Written:
    """A cell with its record, and its scores where there are any."""

    cell: Cell
    record: RunRecord
    scores: InfluenceScores | None


class Writer:
    """Makes and saves the records of one job.

    Args:
        job: whose cells they are.
        sweep: the name that they carry.
    """

    def __init__(self, job: Job, sweep: str) -> None:
        self.job, self.sweep = job, sweep
        self.store = RecordStore(job.results)
        self.environment = environment()

    def write(self, outcome: Outcome) -> Written:
        """Save an outcome.

        Scores that cannot be saved make it a *failed* one. Where even that does not fit on the disk
        the cell stays missing, which the end of the sweep reports; the other cells go on.
        """
        if outcome.scores is not None:
            try:
                record = self.store.save(self._record(outcome), outcome.scores)
                return Written(outcome.cell, record, outcome.scores)
            except Exception as error:
                outcome = Outcome(
                    outcome.cell,
                    "failed",
                    f"{type(error).__name__}: {error}",
                    training=outcome.training,
                )
        record = self._record(outcome)
        try:
            record = self.store.save(record, None)
        except StoreError as error:
            record = replace(record, status="failed", reason=f"{record.reason} ({error})")
        return Written(outcome.cell, record, None)

    def _record(self, outcome: Outcome) -> RunRecord:
        cell = outcome.cell
        identity = self.job.identity(cell)
        if self.job.data.start_sha256 == "":  # it failed before it had anything to start from
            identity["data_sha256"] = ""
        return RunRecord(
            **identity,
            status=outcome.status,
            reason=outcome.reason,
            metrics=outcome.metrics,
            cost=outcome.cost,
            scores_sha256="" if outcome.scores is None else scores_digest(outcome.scores),
            config=self._config(cell),
            environment=self.environment,
            training=self._facts(outcome),
            sweep=self.sweep,
            suspicious=self.job.data.suspicious.get(cell.target, ""),
        )

    def _facts(self, outcome: Outcome) -> dict[str, Any]:
        """Facts about the training, with those of the data that a record must be told.

        The number of examples that its scores must have, and digests of the user's own files.
        """
        facts = dict(outcome.training)
        # checkpoints of an earlier call may have been measured by another clock than their methods,
        # and those of an ensemble by several
        clocks = {*str(facts.pop(CLOCK, clock.WALL)).split(), self.job.config.clock}
        if facts and clocks != {clock.WALL}:
            facts[CLOCK] = " ".join(sorted(clocks))
        if outcome.scores is not None:
            facts[N_TRAIN] = self.job.data.n_train
        if self.job.data.files:
            facts[FILES] = {name: dict(file) for name, file in self.job.data.files.items()}
        return facts

    def _config(self, cell: Cell) -> dict[str, Any]:
        """The full resolved configuration, this cell's estimator in place of all of them."""
        config = asdict(self.job.config)
        # where files lie on this machine is no part of what was computed
        for key in ("estimators", "sensitivity", "results_dir", "force", "clock"):
            del config[key]
        for key in PLACES:
            config["task"].pop(key, None)
        if cell.variation:
            config["sensitivity"] = dict(cell.variation)
        config = addresses.recorded(config)
        return {**config, "estimator": addresses.recorded(cell.options)}


def finished(written: Sequence[Written]) -> list[Written]:
    """Those that have scores."""
    return [one for one in written if one.scores is not None]
