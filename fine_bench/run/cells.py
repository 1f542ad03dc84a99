"""One job: train once, ask every estimator for every target, write a record for each cell."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import Logger
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.estimator import replay
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.records import RecordStore, environment, scores_digest
from fine_bench.run import training
from fine_bench.run.plan import Cell, Job
from fine_bench.types import (
    SUSPICIOUS_END,
    InfluenceScores,
    Problem,
    Reduce,
    RunRecord,
    Status,
    Target,
    UnsupportedProblemError,
)

_REDUCE: Mapping[Target, Reduce] = {
    "self": None,
    "queries": None,
    "validation": "mean",
    "validation_per_class": "class",
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a cell."""

    cell: Cell
    record: RunRecord
    scores: InfluenceScores | None


Say = Callable[[str], None]
Busy = Callable[[str], AbstractContextManager[object]]


def execute(
    job: Job,
    sweep: str,
    logger: Logger | None = None,
    say: Say = print,
    busy: Busy = lambda _: nullcontext(),
) -> list[Outcome]:
    """Compute every cell of a job that is not finished yet.

    A failure is caught here: the cells concerned get a *failed* record with its reason, the others
    go on. Nothing is trained when nothing is to do. ``say`` prints a line, ``busy`` shows what is
    being worked on while it lasts.
    """
    store = RecordStore(job.results)
    todo = [c for c in job.cells if job.config.force or job.done(store, c) is None]
    if not todo:
        return []
    with _threads(job.config.trainer.num_threads):
        return _execute(job, sweep, store, todo, logger, say, busy)


def _execute(
    job: Job,
    sweep: str,
    store: RecordStore,
    todo: Sequence[Cell],
    logger: Logger | None,
    say: Say,
    busy: Busy,
) -> list[Outcome]:
    writer = _Writer(job, sweep, store)
    in_run = [cell for cell in todo if cell.in_run]
    skipped: dict[Cell, str] = {}
    watchers: dict[Cell, FINECallback] = {}
    outcomes: list[Outcome] = []
    try:
        run = None if in_run or job.config.force else training.stored(job)
        if run is not None:
            say("checkpoints of an earlier run are complete: not trained again")
        else:
            watchers = {cell: _watcher(job, cell) for cell in in_run}
            try:
                run = training.train(job, list(watchers.values()), logger)
            except UnsupportedProblemError as error:
                # the watchers cannot serve this model; the methods that read checkpoints may
                skipped = dict.fromkeys(in_run, str(error))
                watchers = {}
                run = training.train(job, [], logger)
    except Exception as error:
        reason = f"training failed: {type(error).__name__}: {error}"
        return [writer.write(cell, "failed", reason) for cell in todo]
    writer.facts = run.facts
    facts = run.facts
    say(
        f"trained: test accuracy {facts['test_accuracy']:.3f}, given labels "
        f"{facts['train_accuracy']:.3f}, {facts['seconds']:.1f} s"
    )
    for number, cell in enumerate(todo, 1):
        with busy(f"{number} of {len(todo)}: {cell.estimator} {cell.target}"):
            try:
                if cell in skipped:
                    outcome = writer.write(cell, "skipped", skipped[cell])
                elif cell in watchers:
                    outcome = writer.finish(
                        cell, watchers[cell].scores(), _watching_cost(watchers[cell])
                    )
                else:
                    outcome = writer.finish(cell, *_replayed(job, cell, run))
            except UnsupportedProblemError as error:
                outcome = writer.write(cell, "skipped", _without_name(str(error)))
            except Exception as error:
                outcome = writer.write(cell, "failed", f"{type(error).__name__}: {error}")
        outcomes.append(outcome)
        say(describe(outcome))
    return outcomes


def _without_name(reason: str) -> str:
    """A method's reason without the method's name, which stands beside it in every table."""
    return re.sub(r"^\w+: ", "", reason)


def describe(outcome: Outcome) -> str:
    """One line for the terminal."""
    record = outcome.record
    name = f"{record.estimator:<20} {record.target:<11}"
    if record.status != "finished":
        return f"{name} {record.status}: {record.reason}"
    found = f"AUROC {record.metrics['auroc']:.3f}" if "auroc" in record.metrics else " " * 11
    return f"{name} {found}   {record.cost['seconds']:6.1f} s"


def _watcher(job: Job, cell: Cell) -> FINECallback:
    queries = None
    if cell.target != "self":
        queries = TensorDataset(job.data.query_x, job.data.query_y)
    callback: FINECallback = job.estimator(cell, target=cell.target, queries=queries)
    return callback


def _watching_cost(callback: FINECallback) -> dict[str, float]:
    return {
        "seconds": callback.seconds,
        "gradient_evaluations": float(callback.gradient_evaluations),
    }


def problem_of(job: Job, target: Target, model: torch.nn.Module) -> Problem:
    """The target as a question to post-hoc methods."""
    data = job.data
    return Problem(
        model=model,
        loss=F.cross_entropy,
        train=TensorDataset(data.x, data.y),
        queries="self" if target == "self" else TensorDataset(data.query_x, data.query_y),
        reduce=_REDUCE[target],
    )


def _replayed(
    job: Job, cell: Cell, run: training.TrainedRun
) -> tuple[InfluenceScores, dict[str, float]]:
    estimator = job.estimator(cell)
    start = time.perf_counter()
    scores = replay(estimator, problem_of(job, cell.target, run.model), run.checkpoints)
    return scores, {
        "seconds": time.perf_counter() - start,
        "gradient_evaluations": float(estimator.gradient_evaluations),
    }


class _Writer:
    """Turns results into records."""

    def __init__(self, job: Job, sweep: str, store: RecordStore) -> None:
        self.job, self.sweep, self.store = job, sweep, store
        self.facts: Mapping[str, Any] = {}
        self.environment = environment()

    def write(self, cell: Cell, status: Status, reason: str) -> Outcome:
        """A cell without scores."""
        record = RunRecord(
            **self.job.identity(cell),
            status=status,
            reason=reason,
            config=self._config(cell),
            environment=self.environment,
            training=self.facts,
            sweep=self.sweep,
        )
        return Outcome(cell, self.store.save(record, None), None)

    def finish(self, cell: Cell, scores: InfluenceScores, cost: Mapping[str, float]) -> Outcome:
        """A cell with scores: measure and write."""
        # the row's name is the user's choice; the scores carry it too
        scores = replace(scores, method=cell.estimator)
        truth = self.job.data.truth
        row = suspicion(scores.values, SUSPICIOUS_END[cell.target])
        metrics = {"n_bad": float(truth.n_bad)}
        # without bad examples, or with nothing else, there is nothing to detect
        if 0 < truth.n_bad < len(truth.is_bad):
            metrics |= detection_metrics(row, truth.is_bad)
        record = RunRecord(
            **self.job.identity(cell),
            status="finished",
            metrics=metrics,
            cost=cost,
            scores_sha256=scores_digest(scores),
            config=self._config(cell),
            environment=self.environment,
            training=self.facts,
            sweep=self.sweep,
        )
        return Outcome(cell, self.store.save(record, scores), scores)

    def _config(self, cell: Cell) -> dict[str, Any]:
        """The full resolved configuration, this cell's estimator in place of all of them."""
        config = asdict(self.job.config)
        # where files lie on this machine is no part of what was computed
        for key in ("estimators", "results_dir", "force"):
            del config[key]
        config["task"].pop("data_dir", None)
        return {**config, "estimator": dict(cell.options)}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finished(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes that have scores."""
    return [outcome for outcome in outcomes if outcome.scores is not None]
