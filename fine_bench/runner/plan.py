"""What a run will compute: its data, its cells, and which of them are open.

A sweep is planned once, before anything is trained. Whoever works on a job takes it from the plan;
a job in a process of its own, which shares nothing but the results folder, plans itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch.utils.data import TensorDataset

from fine_bench.callback.base import InRunMethod, WatchedRun
from fine_bench.data.task import Task
from fine_bench.errors import ConfigError
from fine_bench.leaderboard.option_grid import declared_for, name_of
from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import TruthError, find, folders
from fine_bench.runner.calls import ALWAYS_ALLOWED, build, target_of
from fine_bench.runner.config import estimator_digest, setting_digest, varied
from fine_bench.runner.schema import RunConfig
from fine_bench.seeds import derive
from fine_bench.store.digest import digest
from fine_bench.store.files import slug
from fine_bench.store.records import RecordStore
from fine_bench.types import SUSPICIOUS_END, End, RunRecord, Target, UnsupportedProblemError


@dataclass(frozen=True, eq=False)
class Cell:
    """One estimator asked for one target in one run: a future record.

    ``variation`` is empty for a row of the leaderboard. A cell that is run to show a row's
    sensitivity holds there what its record keeps: ``of`` which row, with which ``base`` digest,
    its ``changes``, and the whole ``grid`` that was declared for its target.
    """

    estimator: str
    target: Target
    options: Mapping[str, Any]
    estimator_hash: str
    version: int
    kind: Any
    variation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_run(self) -> bool:
        """Whether it watches the training instead of reading checkpoints."""
        return isinstance(self.kind, type) and issubclass(self.kind, InRunMethod)

    @property
    def watches_all(self) -> bool:
        """Whether it estimates, for every example, what the paper's estimator tests."""
        return self.in_run and bool(self.kind.all_examples)


@dataclass(frozen=True, eq=False)
class Job:
    """One run: a configuration with its data, and what retraining has shown about them.

    Attributes:
        config: checked.
        data: of the task.
        setting: digest of task, model and recipe.
        cells: all that were asked for.
        todo: those of them that have no record yet, or all by ``force``.
        truth: the ground truth of these data and this setting, if there is one.
    """

    config: RunConfig
    data: Task
    setting: str
    cells: tuple[Cell, ...]
    todo: tuple[Cell, ...] = ()
    truth: Truth | None = None

    @property
    def results(self) -> Path:
        """Where records, scores and tables go."""
        return Path(self.config.results_dir)

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that ``_target_`` may name."""
        return (*ALWAYS_ALLOWED, *self.config.allow_packages)

    def end(self, target: Target) -> End:
        """The suspicious end of a target's scores: the task's own where it declares one."""
        return self.data.suspicious.get(target, SUSPICIOUS_END[target])

    @property
    def data_sha256(self) -> str:
        """Digest of the data, and of the weights from which the run starts where it makes them."""
        return self.data.record_sha256

    def made(self, data_sha256: str) -> bool:
        """Whether a record of these data is of this job.

        Records of before the weights were part of the identity do not say from which they started:
        theirs is the digest of the data alone. Otherwise the weights are pretrained now if they
        are not here.
        """
        if data_sha256 == self.data.sha256:
            return True
        self.data.prepare()
        return data_sha256 == self.data_sha256

    def identity(self, cell: Cell) -> dict[str, Any]:
        """The fields by which a record of this cell is found."""
        return {
            "task": self.data.name,
            "setting": self.setting,
            "estimator": cell.estimator,
            "estimator_hash": cell.estimator_hash,
            "version": cell.version,
            "data_sha256": self.data_sha256,
            "target": cell.target,
            "seed": self.config.seed,
        }

    def done(self, store: RecordStore, cell: Cell) -> RunRecord | None:
        """The record that makes computing this cell again unnecessary."""
        identity = self.identity(cell)
        # a record of before the weights were part of the identity keeps its own
        for sha in dict.fromkeys((identity["data_sha256"], self.data.sha256)):
            record = store.find(**{**identity, "data_sha256": sha})
            if record is not None and record.status != "failed":
                return record
        return None

    def of_sweep(
        self, store: RecordStore, cell: Cell, sweep: str, since: str = ""
    ) -> RunRecord | None:
        """The record of a cell that was written during a sweep, whatever its status.

        Args:
            store: where it would be.
            cell: of this job.
            sweep: its name.
            since: when it began, as in ``RunRecord.created``: an earlier one that had its log in
                the same folder, by ``hydra.sweep.dir=…``, has the same name.
        """
        record = store.find(**self.identity(cell))
        ours = record is not None and record.sweep == sweep and record.created >= since
        return record if ours else None

    def opened(self) -> Job:
        """The job with the cells that are open now."""
        store, force = RecordStore(self.results), self.config.force
        return self.only(c for c in self.cells if force or self.done(store, c) is None)

    def only(self, todo: Iterable[Cell]) -> Job:
        """The job with other open cells."""
        return replace(self, todo=tuple(todo))

    def with_randomness(self, name: str) -> Job:
        """The same job with another run seed, derived from its own by a name.

        All sources of randomness follow it, those fixed by ``trainer.init_seed`` and
        ``trainer.order_seed`` too.
        """
        trainer = replace(self.config.trainer, init_seed=None, order_seed=None)
        seed = derive(self.config.seed, name) % 2**32
        return replace(self, config=replace(self.config, seed=seed, trainer=trainer))

    def reseeded(self) -> Job:
        """The same job with other randomness: what an auxiliary run trains."""
        return self.with_randomness("auxiliary run")

    def estimator(self, cell: Cell, **passed: Any) -> Any:
        """The cell's estimator, its open random seed filled by the run's.

        What is ``passed`` replaces an option of that name.
        """
        options = {key: value for key, value in cell.options.items() if key not in passed}
        if "seed" in options and options["seed"] is None:
            options["seed"] = self.config.seed
        return build(options, f"estimators.{cell.estimator}", self.packages, **passed)

    def in_run_method(self, cell: Cell, **passed: Any) -> InRunMethod:
        """The callback of a cell that watches the training.

        Raises:
            ConfigError: an option or a subset that this job's data make impossible.
            UnsupportedProblemError: the method does not serve the target, or not this training.
        """
        data, trainer = self.data, self.config.trainer
        run = WatchedRun(
            n_train=data.n_train,
            batch_size=trainer.batch_size,
            optimizer=trainer.optimizer,
            momentum=trainer.momentum,
            weight_decay=trainer.weight_decay,
            queries=None if cell.target == "self" else TensorDataset(data.query_x, data.query_y),
            groups=data.groups,
        )
        needed = cell.kind.needs(cell.target, cell.options, run)
        method: InRunMethod = self.estimator(cell, target=cell.target, **{**needed, **passed})
        try:
            method.check(run)
        except UnsupportedProblemError:
            raise
        except ValueError as error:
            raise ConfigError(f"estimators.{cell.estimator}: {error}") from error
        return method


class TaskCache:
    """The data of tasks, each made once for all the jobs that ask for the same."""

    def __init__(self) -> None:
        self._made: dict[str, Task] = {}

    def get(self, options: Mapping[str, Any], packages: tuple[str, ...]) -> Task:
        """The data of the section ``task`` of a configuration.

        Raises:
            ConfigError: the section makes no task.
            DataError: missing or damaged data.
        """
        key = digest([options, list(packages)])
        if key not in self._made:
            self._made[key] = _data(options, packages)
        return self._made[key]


def _data(options: Mapping[str, Any], packages: tuple[str, ...]) -> Task:
    data = build(options, "task", packages)
    if not isinstance(data, Task):
        raise ConfigError(
            f"task._target_={options['_target_']} returned {type(data).__name__}; a task "
            "returns fine_bench.data.task.TaskData (or fine_bench.llm.task.LanguageTask)"
        )
    # one function may serve several tasks: the configuration names them
    name = str(options.get("name", data.name))
    if name != slug(name):
        raise ConfigError(
            f"task.name={name!r:.100} must consist of at most 80 letters, digits and _-.+=,@; it "
            "names folders. Type for instance task.name=mine"
        )
    return replace(data, name=name)


def plan_sweep(configs: Sequence[RunConfig]) -> list[Job]:
    """The jobs of a sweep, whose tasks are made once for all of them.

    Raises:
        ConfigError, DataError: the first thing that cannot work; nothing has been trained.
    """
    tasks = TaskCache()
    jobs = [plan(config, tasks) for config in configs]
    refuse_duplicates(jobs)
    return jobs


def plan(config: RunConfig, tasks: TaskCache | None = None) -> Job:
    """Load the data of a checked configuration and lay out its cells.

    Args:
        config: what ``config.check`` returned.
        tasks: data that other jobs have made, and may take from this one.

    Raises:
        ConfigError: something that only the data can show to be impossible.
        DataError: missing or damaged data.
    """
    packages = (*ALWAYS_ALLOWED, *config.allow_packages)
    data = (tasks or TaskCache()).get(config.task, packages)
    _check_trainer(config, data)
    cells = [
        cell
        for name, options in config.estimators.items()
        for cell in _cells(
            config, name, target_of(options, f"estimators.{name}", packages, "estimators")
        )
    ]
    setting = setting_digest(config)
    job = Job(config, data, setting, tuple(cells), truth=_truth(config, data, setting))
    for cell in job.cells:
        if not cell.in_run:
            job.estimator(cell)  # a refused option stops the sweep before any training
        else:
            with suppress(UnsupportedProblemError):  # it will be skipped with its reason
                job.in_run_method(cell)
    model = build(config.model, "model", packages, tuple(data.x.shape[1:]), data.n_classes)
    if not isinstance(model, data.model_kind):
        raise ConfigError(
            f"model={config.model.get('name', config.model['_target_'])} cannot be trained on task "
            f"{data.name}; type {data.models_to_type}"
        )
    return job.opened()


def _cells(config: RunConfig, row: str, kind: Any) -> list[Cell]:
    """A row's cells, and after them those of the range that was declared for it."""
    own = config.estimators[row]
    targets = [cast(Target, target) for target in config.targets]

    def cell(name: str, target: Target, options: Mapping[str, Any], **more: Any) -> Cell:
        sha = estimator_digest(options)
        return Cell(name, target, options, sha, version_of(kind, options), kind, **more)

    cells = [cell(row, target, own) for target in targets]
    if row not in config.sensitivity:
        return cells
    range_ = varied(config, row)
    for point in range_:
        for target in filter(point.serves, targets):
            told = {
                "of": row,
                "base": estimator_digest(own),
                "changes": dict(point.changes),
                "grid": declared_for(range_, target),
            }
            options = {**own, **point.changes}
            name = name_of(row, point.changes)
            cells.append(cell(name, target, options, variation=told))
    return cells


def version_of(kind: Any, options: Mapping[str, Any]) -> int:
    """A method's version; a class of which options choose the formula may have one for each.

    Args:
        kind: the class; ``version``, or ``version_of(options)`` where it has that.
        options: of the row.
    """
    own = getattr(kind, "version_of", None)
    return int(kind.version if own is None else own(options))


def _check_trainer(config: RunConfig, data: Task) -> None:
    """Refuse an optimiser or a batch that this kind of task is not trained by."""
    trainer, wanted = config.trainer, data.optimizer
    if trainer.optimizer != wanted:
        raise ConfigError(
            f"trainer.optimizer={trainer.optimizer} does not train task {data.name}; type "
            f"trainer={wanted}"
        )
    if wanted == "adamw" and trainer.momentum:
        raise ConfigError(
            f"trainer.momentum={trainer.momentum} is not used by AdamW; type trainer.momentum=0"
        )
    if trainer.batch_size > data.n_train:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} is larger than the training set of "
            f"{data.n_train} examples; type trainer.batch_size={min(64, data.n_train)}"
        )


def _truth(config: RunConfig, data: Task, setting: str) -> Truth | None:
    """The ground truth of exactly these data and this setting, if one was frozen."""
    try:
        return find(folders(config.results_dir), data.sha256, setting)
    except TruthError as error:
        raise ConfigError(str(error)) from error


def refuse_duplicates(jobs: Iterable[Job]) -> None:
    """Two jobs of one sweep must not be the same run: it would look like two seeds.

    Raises:
        ConfigError: with the seed that occurs twice.
    """
    seen: dict[tuple[Any, ...], Job] = {}
    for job in jobs:
        cells = tuple(sorted((c.estimator, c.estimator_hash) for c in job.cells))
        key = (job.data.sha256, job.setting, job.config.seed, job.config.results_dir, cells)
        if key in seen:
            seeds = sorted({j.config.seed for j in seen.values()} | {job.config.seed})
            raise ConfigError(
                f"seed={job.config.seed} occurs twice in this sweep, with the same configuration; "
                f"type seed={','.join(map(str, seeds))}"
            )
        seen[key] = job
