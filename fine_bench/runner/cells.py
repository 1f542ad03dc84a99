"""What the cells of a job come to: a model is trained, every estimator asked, its scores measured.

``outcomes`` gives one ``Outcome`` after the other. It neither prints nor writes: records are made
in ``write``, lines are said in ``progress``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from traceback import walk_tb
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch.utils.data import TensorDataset

from fine_bench import clock
from fine_bench.callback.base import InRunMethod
from fine_bench.estimator import Schedule, Shared, replay
from fine_bench.metrics.agreement import agreement
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.runner import interruption
from fine_bench.runner.backends.backend import backend_of, ensemble
from fine_bench.runner.backends.trained import TrainedRun
from fine_bench.runner.monitor import ProgressMonitor
from fine_bench.runner.plan import Cell, Job
from fine_bench.runner.progress import Announcer
from fine_bench.runner.sharing import Claims
from fine_bench.store.plausibility import CLOCK
from fine_bench.store.records import RecordStore
from fine_bench.store.scores import truth_extras
from fine_bench.types import (
    REDUCE,
    InfluenceScores,
    Problem,
    Status,
    Target,
    TrainingSteps,
    UnsupportedProblemError,
)

log = logging.getLogger(__name__)

_FAILURES = (Exception, SystemExit)
"""What fails a cell; an interruption is none of these, and ends the run."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: which.
        status: ``"finished"``, ``"skipped"`` or ``"failed"``.
        reason: why there are no scores; empty where there are.
        scores: None unless finished.
        cost, metrics: numbers by name.
        training: facts about the run; empty where training failed.
    """

    cell: Cell
    status: Status
    reason: str = ""
    scores: InfluenceScores | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def outcomes(
    job: Job,
    logger: Logger | None = None,
    announcer: Announcer | None = None,
    claims: Claims | None = None,
) -> Iterator[Outcome]:
    """Compute the open cells of a job, in order.

    A failure is caught here: the cells concerned *fail* with its reason, the others go on. Nothing
    is trained when nothing is open.

    Args:
        job: what is to be done.
        logger: is told of the training.
        announcer: is told what is being worked on.
        claims: where other processes may compute some of the cells: which ones are left.
    """
    announcer = announcer or Announcer(lambda line: None)
    if not job.todo:
        return
    with clock.measured_by(job.config.clock), _threads(job.config.trainer.num_threads):
        try:
            run, watch = _train(job, logger, announcer)
        except _FAILURES as error:
            if claims is not None and claims.helps:
                log.debug("left a training to its own process", exc_info=True)
                return  # the job itself says so
            reason = f"training failed: {type(error).__name__}: {error}"
            yield from (Outcome(cell, "failed", reason) for cell in job.todo)
            return
        announcer.trained(backend_of(job).describe(run.facts))
        shared = Shared(problem_of(job, "self", run.model))
        with announcer.busy("auxiliary run"):
            auxiliary = _Auxiliary(job, watch.methods, announcer)
        for number, cell in enumerate(job.todo if claims is None else claims.cells(job), 1):
            interruption.raise_lost()
            name = f"{number} of {len(job.todo)}: {cell.estimator} {cell.target}"
            with announcer.busy(name):
                outcome = _outcome(job, cell, run, watch, auxiliary, shared, announcer.say)
            if claims is not None and claims.helps and outcome.status == "failed":
                # two processes at work need more memory than one: the job itself computes the
                # cell again, and says what fails there
                log.debug("left %s to its own process: %s", name, outcome.reason)
                continue
            yield replace(outcome, training={**run.facts, **outcome.training})


@dataclass(frozen=True, eq=False)
class _Watch:
    """The in-run methods that watched a training, and why others did not."""

    methods: Mapping[Cell, InRunMethod] = field(default_factory=dict)
    refused: Mapping[Cell, str] = field(default_factory=dict)
    failed: Mapping[Cell, str] = field(default_factory=dict)


def _train(job: Job, logger: Logger | None, announcer: Announcer) -> tuple[TrainedRun, _Watch]:
    """One run, read from an earlier one's checkpoints where nothing has to watch it."""
    job.data.prepare()  # what it starts from is part of what tells it from other runs
    backend = backend_of(job)
    in_run = [cell for cell in job.todo if cell.in_run]
    run = None if in_run or job.config.force else backend.stored(job, announcer.say)
    if run is not None:
        announcer.reused()
        return run, _Watch()
    refused: dict[Cell, str] = {}
    failed: dict[Cell, str] = {}
    while True:
        methods: dict[Cell, InRunMethod] = {}
        for cell in in_run:
            if cell in refused or cell in failed:
                continue
            try:
                method = job.in_run_method(cell)
                _refuse_twins(method, methods)
                methods[cell] = method
            except UnsupportedProblemError as error:
                refused[cell] = str(error)
            except _FAILURES as error:
                failed[cell] = f"{type(error).__name__}: {error}"
        try:
            run = backend.train(job, [*methods.values(), *_monitors(methods, logger)], logger)
        except _FAILURES as error:
            # what a method raises concerns its own cells: the others get a training without it
            culprits = _raised_in(error, methods)
            if isinstance(error, UnsupportedProblemError):
                if not methods:
                    raise
                # it cannot serve this model; the methods that read checkpoints may
                refused |= dict.fromkeys(culprits or methods, str(error))
            elif culprits:
                failed |= dict.fromkeys(culprits, f"{type(error).__name__}: {error}")
            else:
                raise
        else:
            return run, _Watch(methods, refused, failed)


def _monitors(
    methods: Mapping[Cell, InRunMethod], logger: Logger | None
) -> Iterator[ProgressMonitor]:
    """Whoever tells the logger how far the methods are; after them in the list of callbacks."""
    if logger is not None and methods:
        names = {f"{cell.estimator}/{cell.target}": one for cell, one in methods.items()}
        yield ProgressMonitor(names, logger)


def _refuse_twins(method: InRunMethod, others: Mapping[Cell, InRunMethod]) -> None:
    """Two callbacks of one key end Lightning's training: the later one waits for another run."""
    for cell, other in others.items():
        if other.state_key == method.state_key:
            raise ValueError(
                f"it would keep its state under the same name as {cell.estimator}, which watches "
                "this training; type the same command again to train once more for it"
            )


def _raised_in(error: BaseException, methods: Mapping[Cell, InRunMethod]) -> list[Cell]:
    """The cells whose method was at work when an error was raised."""
    at_work = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    return [cell for cell, method in methods.items() if any(one is method for one in at_work)]


def _outcome(
    job: Job,
    cell: Cell,
    run: TrainedRun,
    watch: _Watch,
    auxiliary: _Auxiliary,
    shared: Shared,
    say: Callable[[str], None],
) -> Outcome:
    """Ask for a cell's scores and measure them."""
    try:
        if cell in watch.refused:
            return Outcome(cell, "skipped", watch.refused[cell])
        if cell in watch.failed:
            return Outcome(cell, "failed", watch.failed[cell])
        if cell in watch.methods:
            scores, cost, further = _watched(job, cell, watch.methods, auxiliary)
            facts = {}
        else:
            scores, cost, clocks = _replayed(job, cell, run, shared, say)
            further, facts = {}, {CLOCK: " ".join(sorted(clocks))}
        # the row's name is the user's choice; the scores carry it too, and the truth beside them,
        # so that figures can be drawn from files alone
        extras = {**scores.extras, **truth_extras(job.data.truth)}
        scores = replace(scores, method=cell.estimator, extras=extras)
        metrics = backend_of(job).measure(job, cell.target, scores, run.facts)
        if job.truth is not None:
            metrics |= job.truth.metrics(scores.values, cell.target, watched=scores.watched)
        return Outcome(cell, "finished", "", scores, cost, metrics | further, facts)
    except UnsupportedProblemError as error:
        # without the method's name, which stands beside it in every table
        return Outcome(cell, "skipped", re.sub(r"^\w+: ", "", str(error)))
    except _FAILURES as error:
        return Outcome(cell, "failed", f"{type(error).__name__}: {error}")


# -------------------------------------------------------------------------------- in-run methods


def _watched(
    job: Job, cell: Cell, methods: Mapping[Cell, InRunMethod], auxiliary: _Auxiliary
) -> tuple[InfluenceScores, dict[str, float], dict[str, float]]:
    """Scores, cost and further metrics of a method that watched the training."""
    auxiliary.require(cell)
    method = methods[cell]
    start = clock.now()
    scores = method.scores()
    cost = {
        "seconds": method.seconds + clock.now() - start,
        "gradient_evaluations": float(method.gradient_evaluations),
    }
    further = method.metrics() | _agreements(job, methods, cell, scores)
    return scores, auxiliary.add_to(cost, cell), further


class _Auxiliary:
    """The second run that some methods subtract: one for all cells that ask for it.

    A failure concerns these cells alone, and where one method is at work when it happens, its cells
    alone: the others get a second run without it. ``require`` raises it there.
    """

    def __init__(self, job: Job, methods: Mapping[Cell, InRunMethod], announcer: Announcer) -> None:
        self.costs: dict[Cell, dict[str, float]] = {}
        self.errors: dict[Cell, BaseException] = {}
        asking: list[Cell] = []
        for cell, method in methods.items():
            with self._concerns(cell):
                if method.auxiliary():
                    asking.append(cell)
        while helpers := self._helpers(job, [cell for cell in asking if cell not in self.errors]):
            try:
                plain = backend_of(job).train_auxiliary(job, list(helpers.values()))
            except _FAILURES as error:
                self.errors |= dict.fromkeys(_raised_in(error, helpers) or helpers, error)
                continue
            for cell, helper in helpers.items():
                with self._concerns(cell):
                    methods[cell].subtract(helper)
                    self.costs[cell] = {
                        "auxiliary_seconds": plain + helper.seconds,
                        "auxiliary_gradient_evaluations": float(helper.gradient_evaluations),
                    }
            announcer.trained_auxiliary(plain)
            return

    def _helpers(self, job: Job, cells: Sequence[Cell]) -> dict[Cell, InRunMethod]:
        """A method for each cell, to watch the second run; that of ``seed`` is another there."""
        seed = job.reseeded().config.seed
        found = {}
        for cell in cells:
            with self._concerns(cell):
                own = {"seed": seed} if "seed" in signature(cell.kind).parameters else {}
                found[cell] = job.in_run_method(cell, **own)
        return found

    @contextmanager
    def _concerns(self, cell: Cell) -> Iterator[None]:
        """What is raised here fails this cell."""
        try:
            yield
        except _FAILURES as error:
            self.errors[cell] = error

    def require(self, cell: Cell) -> None:
        """Raise what went wrong, if it concerns this cell."""
        error = self.errors.get(cell)
        if error is not None:
            raise RuntimeError(
                f"the auxiliary run failed: {type(error).__name__}: {error}"
            ) from error

    def add_to(self, cost: dict[str, float], cell: Cell) -> dict[str, float]:
        """The auxiliary training is part of the cost of each cell that needs it."""
        extra = self.costs.get(cell, {})
        cost = cost | extra
        cost["seconds"] += extra.get("auxiliary_seconds", 0.0)
        cost["gradient_evaluations"] += extra.get("auxiliary_gradient_evaluations", 0.0)
        return cost


def _agreements(
    job: Job, methods: Mapping[Cell, InRunMethod], cell: Cell, scores: InfluenceScores
) -> dict[str, float]:
    """``agreement/<estimator>/…`` of scores of some examples with those that have all.

    They are the job's cells of the same target whose method declares ``all_examples``. ``auroc``
    among the numbers is the other's on the watched examples alone.
    """
    numbers: dict[str, float] = {}
    if scores.watched is None or not len(scores.watched):
        return numbers
    store = RecordStore(job.results)
    bad = job.data.truth.is_bad[scores.watched]
    for other in job.cells:
        if other.target != cell.target or not other.watches_all or other.variation:
            continue
        method, record = methods.get(other), job.done(store, other)
        try:
            if method is not None:
                theirs = method.scores()
            elif record is not None and record.status == "finished":
                theirs = store.load_scores(record)
            else:
                continue
        except _FAILURES:  # what is wrong with the other one is said in its own cell
            continue
        found = agreement(scores, theirs)
        if bool(bad.any()) and not bool(bad.all()):
            row = suspicion(theirs.values[:, scores.watched], job.end(cell.target))
            found["auroc"] = detection_metrics(row, bad)["auroc"]
        numbers |= {f"agreement/{other.estimator}/{name}": x for name, x in found.items()}
    return numbers


# ------------------------------------------------------------------------------ post-hoc methods


def problem_of(
    job: Job, target: Target, model: torch.nn.Module, steps: TrainingSteps | None = None
) -> Problem:
    """The target as a question to post-hoc methods, some of which repeat the run's steps."""
    data = job.data
    return Problem(
        model=model,
        loss=data.loss,
        train=TensorDataset(data.x, data.y),
        queries="self" if target == "self" else TensorDataset(data.query_x, data.query_y),
        reduce=REDUCE[target],
        batch_size=backend_of(job).batch_size(job, model),
        steps=steps,
    )


def _replayed(
    job: Job, cell: Cell, run: TrainedRun, shared: Shared, say: Callable[[str], None]
) -> tuple[InfluenceScores, dict[str, float], set[str]]:
    """Scores and cost of a method that reads checkpoints, and by which clocks those were timed."""
    estimator = job.estimator(cell)
    problem = problem_of(job, cell.target, run.model, run.steps)
    checkpoints, cost = run.checkpoints, dict[str, float]()
    clocks = {str(run.facts.get(CLOCK, clock.WALL))}
    several = estimator.schedule in (Schedule.RUNS, Schedule.ALL_RUNS)
    if several and estimator.unsupported(problem) is None:
        members = ensemble(job, run, estimator.runs, say)
        last = estimator.schedule is Schedule.RUNS
        checkpoints = [
            point
            for member in members
            for point in (member.checkpoints[-1:] if last else member.checkpoints)
        ]
        # in the cost of each cell that needs them, also where they were trained for another
        cost["ensemble_seconds"] = float(sum(member.facts["seconds"] for member in members[1:]))
        clocks |= {str(member.facts.get(CLOCK, clock.WALL)) for member in members}
    memory = getattr(run.model, "memory", None)
    before = 0.0 if memory is None else memory.saved
    start = clock.now()
    scores = replay(estimator, problem, checkpoints, shared)
    cost["seconds"] = clock.now() - start + cost.get("ensemble_seconds", 0.0)
    shared_seconds = estimator.saved_seconds + (0.0 if memory is None else memory.saved - before)
    if shared_seconds or memory is not None:
        # in the cost of each cell that needs it, also where another cell had done the work
        cost["shared_seconds"] = shared_seconds
        cost["seconds"] += shared_seconds
    cost["gradient_evaluations"] = float(estimator.gradient_evaluations)
    return scores, cost, clocks


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
