"""One job: train once, ask every estimator for every target, write a record for each cell."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch.utils.data import TensorDataset

from fine_bench.callback.paper import PaperFINECallback
from fine_bench.estimator import Schedule, Shared, replay
from fine_bench.gradients.batch_size import suitable_batch_size
from fine_bench.metrics.agreement import agreement
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.runner import addresses
from fine_bench.runner.backends import images
from fine_bench.runner.backends.choice import backend_of
from fine_bench.runner.config import PLACES
from fine_bench.runner.plan import Cell, Job, Watcher
from fine_bench.store.environment import environment
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore
from fine_bench.store.scores import scores_digest
from fine_bench.types import (
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
    watchers: dict[Cell, Watcher] = {}
    backend = backend_of(job)
    outcomes: list[Outcome] = []
    try:
        run = None if in_run or job.config.force else backend.stored(job)
        if run is not None:
            say("checkpoints of an earlier run are complete: not trained again")
        else:
            for cell in in_run:
                try:
                    watchers[cell] = job.watcher(cell)
                except UnsupportedProblemError as error:
                    skipped[cell] = str(error)
            try:
                run = backend.train(job, list(watchers.values()), logger)
            except UnsupportedProblemError as error:
                # the watchers cannot serve this model; the methods that read checkpoints may
                skipped |= dict.fromkeys(watchers, str(error))
                watchers = {}
                run = backend.train(job, [], logger)
    except Exception as error:
        reason = f"training failed: {type(error).__name__}: {error}"
        return [writer.write(cell, "failed", reason) for cell in todo]
    writer.facts = run.facts
    say(backend.describe(run.facts))
    shared = Shared(problem_of(job, "self", run.model))
    with busy("auxiliary run"):
        auxiliary = _Auxiliary(job, watchers, say)
    for number, cell in enumerate(todo, 1):
        with busy(f"{number} of {len(todo)}: {cell.estimator} {cell.target}"):
            try:
                if cell in skipped:
                    outcome = writer.write(cell, "skipped", skipped[cell])
                elif cell in watchers:
                    auxiliary.require(cell)
                    start = time.perf_counter()
                    scores, watcher = watchers[cell].scores(), watchers[cell]
                    cost = {
                        "seconds": watcher.seconds + time.perf_counter() - start,
                        "gradient_evaluations": float(watcher.gradient_evaluations),
                    }
                    metrics = {}
                    if isinstance(watcher, PaperFINECallback):
                        metrics = _group_metrics(watcher)
                        metrics |= _agreements(job, store, watchers, cell, scores)
                    outcome = writer.finish(cell, scores, auxiliary.add_to(cost, cell), metrics)
                else:
                    outcome = writer.finish(cell, *_replayed(job, cell, run, shared))
            except UnsupportedProblemError as error:
                outcome = writer.write(cell, "skipped", _without_name(str(error)))
            except Exception as error:
                outcome = writer.write(cell, "failed", f"{type(error).__name__}: {error}")
        outcomes.append(outcome)
        say(describe(outcome.record))
        for line in describe_groups(outcome):
            say(line)
    return outcomes


def _without_name(reason: str) -> str:
    """A method's reason without the method's name, which stands beside it in every table."""
    return re.sub(r"^\w+: ", "", reason)


def describe(record: RunRecord) -> str:
    """One line for the terminal."""
    name = f"{record.estimator:<20} {record.target:<11}"
    if record.status != "finished":
        return f"{name} {record.status}: {record.reason}"
    found = f"AUROC {record.metrics['auroc']:.3f}" if "auroc" in record.metrics else " " * 11
    for metric, label in (("fidelity", "fidelity"), ("lds", "LDS")):
        if metric in record.metrics:
            found += f"  {label} {record.metrics[metric]:.3f}"
    return f"{name} {found}   {record.cost['seconds']:6.1f} s"


SHOWN_GROUPS = 10


def describe_groups(outcome: Outcome) -> list[str]:
    """A line for each group that was tested: its influence with the test's own interval."""
    metrics = outcome.record.metrics
    names = [k[len("group/") : -len("/mu")] for k in metrics if re.fullmatch(r"group/.*/mu", k)]
    lines = []
    for name in names[:SHOWN_GROUPS]:
        mu, low, high, p, size = (
            metrics[f"group/{name}/{part}"] for part in ("mu", "lower", "upper", "p_value", "size")
        )
        lines.append(f"  {name} ({size:g}): μ {mu:+.2f} [{low:+.2f}, {high:+.2f}], p = {p:.2g}")
    if len(names) > SHOWN_GROUPS:
        lines.append(f"  and {len(names) - SHOWN_GROUPS} more groups, in the record")
    return lines


class _Auxiliary:
    """The second run that the paper's estimator subtracts: one for all cells that ask for it.

    A failure concerns those cells alone; ``require`` raises it there.
    """

    def __init__(self, job: Job, watchers: Mapping[Cell, Watcher], say: Say) -> None:
        self.costs: dict[Cell, dict[str, float]] = {}
        self.error: Exception | None = None
        self.cells = {
            cell: watcher
            for cell, watcher in watchers.items()
            if isinstance(watcher, PaperFINECallback) and watcher.auxiliary()
        }
        if not self.cells:
            return
        backend = backend_of(job)
        seed = images.reseeded(job).config.seed
        try:
            helpers = {cell: job.watcher(cell, seed=seed) for cell in self.cells}
            plain = backend.train_auxiliary(job, list(helpers.values()))
        except Exception as error:
            self.error = error
            return
        for cell, helper in helpers.items():
            assert isinstance(helper, PaperFINECallback)
            self.cells[cell].auxiliary_signal = helper.signal()
            self.costs[cell] = {
                "auxiliary_seconds": plain + helper.seconds,
                "auxiliary_gradient_evaluations": float(helper.gradient_evaluations),
            }
        say(f"trained the auxiliary run: {plain:.1f} s")

    def require(self, cell: Cell) -> None:
        """Raise what went wrong, if this cell needs the auxiliary run."""
        if cell in self.cells and self.error is not None:
            raise RuntimeError(
                f"the auxiliary run failed: {type(self.error).__name__}: {self.error}"
            ) from self.error

    def add_to(self, cost: dict[str, float], cell: Cell) -> dict[str, float]:
        """The auxiliary training is part of the cost of each cell that needs it."""
        extra = self.costs.get(cell, {})
        cost = cost | extra
        cost["seconds"] += extra.get("auxiliary_seconds", 0.0)
        cost["gradient_evaluations"] += extra.get("auxiliary_gradient_evaluations", 0.0)
        return cost


_GROUP_METRICS = (
    "mu", "std_error", "lower", "upper", "p_value", "size", "mu_run", "moment", "rank", "maximum"
)  # fmt: skip


def _group_metrics(watcher: PaperFINECallback) -> dict[str, float]:
    """``group/<name>/<number>``; ``index`` is the group's number in the score file's traces."""
    return {
        f"group/{line.name}/{name}": float(value)
        for index, line in enumerate(watcher.group_results())
        for name, value in [("index", index), *((n, getattr(line, n)) for n in _GROUP_METRICS)]
    }


def _agreements(
    job: Job,
    store: RecordStore,
    watchers: Mapping[Cell, Watcher],
    cell: Cell,
    scores: InfluenceScores,
) -> dict[str, float]:
    """``agreement/<estimator>/…`` with the all-example f-INE cells of this target in the job.

    ``auroc`` among them is the all-example estimator's on the watched examples alone.
    """
    numbers: dict[str, float] = {}
    if scores.watched is None or not len(scores.watched):
        return numbers
    bad = job.data.truth.is_bad[scores.watched]
    for other in job.cells:
        if other.target != cell.target or not other.watches_all or other.variation:
            continue
        watcher, record = watchers.get(other), job.done(store, other)
        if watcher is not None:
            theirs = watcher.scores()
        elif record is not None and record.status == "finished":
            theirs = store.load_scores(record)
        else:
            continue
        found = agreement(scores, theirs)
        if bool(bad.any()) and not bool(bad.all()):
            row = suspicion(theirs.values[:, scores.watched], job.end(cell.target))
            found["auroc"] = detection_metrics(row, bad)["auroc"]
        numbers |= {f"agreement/{other.estimator}/{name}": x for name, x in found.items()}
    return numbers


def problem_of(job: Job, target: Target, model: torch.nn.Module) -> Problem:
    """The target as a question to post-hoc methods."""
    data = job.data
    return Problem(
        model=model,
        loss=data.loss,
        train=TensorDataset(data.x, data.y),
        queries="self" if target == "self" else TensorDataset(data.query_x, data.query_y),
        reduce=_REDUCE[target],
        batch_size=batch_size_of(job, model),
    )


def batch_size_of(job: Job, model: torch.nn.Module) -> int:
    """Examples that post-hoc methods take at a time: the task's, or fewer where layers are wide."""
    data = job.data
    if data.kind != "images":
        return data.batch_size
    return suitable_batch_size(model, data.loss, data.x, data.y, data.batch_size)


def _replayed(
    job: Job, cell: Cell, run: images.TrainedRun, shared: Shared
) -> tuple[InfluenceScores, dict[str, float]]:
    estimator = job.estimator(cell)
    problem = problem_of(job, cell.target, run.model)
    checkpoints, cost = run.checkpoints, dict[str, float]()
    if estimator.schedule is Schedule.RUNS and estimator.unsupported(problem) is None:
        members = images.ensemble(job, run, estimator.runs)
        checkpoints = [member.checkpoints[-1] for member in members]
        # in the cost of each cell that needs them, also where they were trained for another
        cost["ensemble_seconds"] = float(sum(member.facts["seconds"] for member in members[1:]))
    memory = getattr(run.model, "memory", None)
    before = 0.0 if memory is None else memory.saved
    start = time.perf_counter()
    scores = replay(estimator, problem, checkpoints, shared)
    cost["seconds"] = time.perf_counter() - start + cost.get("ensemble_seconds", 0.0)
    shared_seconds = estimator.saved_seconds + (0.0 if memory is None else memory.saved - before)
    if shared_seconds or memory is not None:
        # in the cost of each cell that needs it, also where another cell had done the work
        cost["shared_seconds"] = shared_seconds
        cost["seconds"] += shared_seconds
    cost["gradient_evaluations"] = float(estimator.gradient_evaluations)
    return scores, cost


class _Writer:
    """Turns results into records."""

    def __init__(self, job: Job, sweep: str, store: RecordStore) -> None:
        self.job, self.sweep, self.store = job, sweep, store
        self.facts: Mapping[str, Any] = {}
        self.environment = environment()

    def write(self, cell: Cell, status: Status, reason: str) -> Outcome:
        """A cell without scores.

        Where even this does not fit on the disk the cell stays missing, which the end of the sweep
        reports; the other cells go on.
        """
        record = RunRecord(
            **self.job.identity(cell),
            status=status,
            reason=reason,
            config=self._config(cell),
            environment=self.environment,
            training=self.facts,
            sweep=self.sweep,
            suspicious=self.job.data.suspicious.get(cell.target, ""),
        )
        try:
            record = self.store.save(record, None)
        except StoreError as error:
            record = replace(record, status="failed", reason=f"{reason} ({error})")
        return Outcome(cell, record, None)

    def finish(
        self,
        cell: Cell,
        scores: InfluenceScores,
        cost: Mapping[str, float],
        further: Mapping[str, float] | None = None,
    ) -> Outcome:
        """A cell with scores: measure (the examples that have one) and write."""
        # the row's name is the user's choice; the scores carry it too, and the truth beside them,
        # so that figures can be drawn from files alone
        bad = self.job.data.truth.is_bad
        extras = {**scores.extras, "truth/is_bad": bad}
        scores = replace(scores, method=cell.estimator, extras=extras)
        metrics = backend_of(self.job).measure(self.job, cell.target, scores, self.facts)
        if self.job.truth is not None:
            metrics |= self.job.truth.metrics(scores.values, cell.target, watched=scores.watched)
        metrics |= further or {}
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
            suspicious=self.job.data.suspicious.get(cell.target, ""),
        )
        return Outcome(cell, self.store.save(record, scores), scores)

    def _config(self, cell: Cell) -> dict[str, Any]:
        """The full resolved configuration, this cell's estimator in place of all of them."""
        config = asdict(self.job.config)
        # where files lie on this machine is no part of what was computed
        for key in ("estimators", "sensitivity", "results_dir", "force"):
            del config[key]
        for key in PLACES:
            config["task"].pop(key, None)
        if cell.variation:
            config["sensitivity"] = dict(cell.variation)
        config = addresses.recorded(config)
        return {**config, "estimator": addresses.recorded(cell.options)}


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
