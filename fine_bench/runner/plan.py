"""What a run will compute: its data, its cells, and which of them are finished already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import TensorDataset

from baselines.in_run_shapley import InRunShapleyCallback
from baselines.shapley import refuse_other_updates
from fine_bench.callback import FINECallback
from fine_bench.callback.base import WatchedRun
from fine_bench.callback.paper import PaperFINECallback
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.leaderboard.option_grid import declared_for, name_of
from fine_bench.llm.models import LanguageModel
from fine_bench.llm.task import LanguageTask
from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import TruthError, find, folders
from fine_bench.runner.config import (
    ALWAYS_ALLOWED,
    RunConfig,
    build,
    estimator_digest,
    setting_digest,
    target_of,
    varied,
)
from fine_bench.store.digest import digest
from fine_bench.store.records import RecordStore
from fine_bench.types import SUSPICIOUS_END, End, RunRecord, Target, UnsupportedProblemError

AnyTask: TypeAlias = TaskData | LanguageTask
Watcher: TypeAlias = FINECallback | PaperFINECallback | InRunShapleyCallback


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
        return self._is(pl.Callback)

    @property
    def watches_all(self) -> bool:
        """Whether it is the all-example f-INE."""
        return self._is(FINECallback)

    def _is(self, kind: type) -> bool:
        return isinstance(self.kind, type) and issubclass(self.kind, kind)


@dataclass(frozen=True, eq=False)
class Job:
    """One run: a configuration with its data, and what retraining has shown about them."""

    config: RunConfig
    data: AnyTask
    setting: str
    cells: tuple[Cell, ...]
    truth: Truth | None = None

    @property
    def results(self) -> Path:
        """Where records, scores and tables go."""
        return Path(self.config.results_dir)

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that ``_target_`` may name."""
        return (*ALWAYS_ALLOWED, *self.config.allow_packages)

    @property
    def images(self) -> TaskData:
        """The data of a task with one label an example.

        Raises:
            ConfigError: the task is of another kind.
        """
        if not isinstance(self.data, TaskData):
            raise ConfigError(
                f"task {self.data.name} is one of token sequences; this command takes tasks with "
                "class labels, for instance task=digits_mislabel"
            )
        return self.data

    def end(self, target: Target) -> End:
        """The suspicious end of a target's scores: the task's own where it declares one."""
        return self.data.suspicious.get(target, SUSPICIOUS_END[target])

    def identity(self, cell: Cell) -> dict[str, Any]:
        """The fields by which a record of this cell is found."""
        return {
            "task": self.data.name,
            "setting": self.setting,
            "estimator": cell.estimator,
            "estimator_hash": cell.estimator_hash,
            "version": cell.version,
            "data_sha256": self.data.sha256,
            "target": cell.target,
            "seed": self.config.seed,
        }

    def done(self, store: RecordStore, cell: Cell) -> RunRecord | None:
        """The record that makes computing this cell again unnecessary."""
        record = store.find(**self.identity(cell))
        return record if record is not None and record.status != "failed" else None

    def estimator(self, cell: Cell, **passed: Any) -> Any:
        """The cell's estimator, its open random seed filled by the run's.

        What is ``passed`` replaces an option of that name.
        """
        options = {key: value for key, value in cell.options.items() if key not in passed}
        if "seed" in options and options["seed"] is None:
            options["seed"] = self.config.seed
        return build(options, f"estimators.{cell.estimator}", self.packages, **passed)

    def watcher(self, cell: Cell, **passed: Any) -> Watcher:
        """The callback of a cell that watches the training.

        The paper's estimator watches the task's groups besides the subsets of its options.

        Raises:
            ConfigError: an option or a subset that this job's data make impossible.
            UnsupportedProblemError: the method does not serve the target, or not this training.
        """
        if cell._is(InRunShapleyCallback):
            trainer = self.config.trainer
            # before any training: in the run itself, one refusal stops the other callbacks too
            refuse_other_updates("SGD", trainer.momentum, trainer.weight_decay)
        if cell.target != "self":
            passed["queries"] = TensorDataset(self.data.query_x, self.data.query_y)
        if not cell._is(PaperFINECallback):
            callback: FINECallback | InRunShapleyCallback = self.estimator(
                cell, target=cell.target, **passed
            )
            return callback
        passed["subsets"] = {**self.data.groups, **(cell.options.get("subsets") or {})}
        paper: PaperFINECallback = self.estimator(cell, target=cell.target, **passed)
        try:
            trainer = self.config.trainer
            paper.check(
                WatchedRun(
                    n_train=self.data.n_train,
                    batch_size=trainer.batch_size,
                    optimizer=trainer.optimizer,
                    momentum=trainer.momentum,
                    weight_decay=trainer.weight_decay,
                    queries=passed.get("queries"),
                    groups=self.data.groups,
                )
            )
        except ValueError as error:
            raise ConfigError(f"estimators.{cell.estimator}: {error}") from error
        return paper


def plan(config: RunConfig) -> Job:
    """Load the data of a checked configuration and lay out its cells.

    Raises:
        ConfigError: something that only the data can show to be impossible.
        DataError: missing or damaged data.
    """
    packages = (*ALWAYS_ALLOWED, *config.allow_packages)
    data = _data(digest(config.task), _Frozen(config.task, packages))
    _check_kind(config, data)
    if config.trainer.batch_size > data.n_train:
        raise ConfigError(
            f"trainer.batch_size={config.trainer.batch_size} is larger than the training set of "
            f"{data.n_train} examples; type trainer.batch_size={min(64, data.n_train)}"
        )
    cells = [
        cell
        for name, options in config.estimators.items()
        for cell in _cells(config, name, target_of(options, f"estimators.{name}", packages))
    ]
    setting = setting_digest(config)
    job = Job(config, data, setting, tuple(cells), _truth(config, data, setting))
    for cell in job.cells:
        if not cell.in_run:
            job.estimator(cell)  # a refused option stops the sweep before any training
        else:
            with suppress(UnsupportedProblemError):  # it will be skipped with its reason
                job.watcher(cell)
    model = build(config.model, "model", packages, tuple(data.x.shape[1:]), data.n_classes)
    if not isinstance(model, LanguageModel if data.kind == "language" else nn.Module):
        raise ConfigError(
            f"model={config.model.get('name', config.model['_target_'])} cannot be trained on task "
            f"{data.name}; type "
            + (
                "model=tiny_llama or model=llama31_8b"
                if data.kind == "language"
                else "model=mlp, or task=llm_poison trainer=adamw for a language model"
            )
        )
    return job


def _cells(config: RunConfig, row: str, kind: Any) -> list[Cell]:
    """A row's cells, and after them those of the range that was declared for it."""
    own = config.estimators[row]
    targets = [cast(Target, target) for target in config.targets]

    def cell(name: str, target: Target, options: Mapping[str, Any], **more: Any) -> Cell:
        sha = estimator_digest(options)
        return Cell(name, target, options, sha, int(kind.version), kind, **more)

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


def _check_kind(config: RunConfig, data: AnyTask) -> None:
    """Images are trained by SGD, language models by AdamW: other requests would be ignored."""
    wanted = "adamw" if data.kind == "language" else "sgd"
    trainer = config.trainer
    if trainer.optimizer != wanted:
        raise ConfigError(
            f"trainer.optimizer={trainer.optimizer} does not train task {data.name}; type "
            f"trainer={wanted}"
        )
    if wanted == "adamw" and trainer.momentum:
        raise ConfigError(
            f"trainer.momentum={trainer.momentum} is not used by AdamW; type trainer.momentum=0"
        )


def _truth(config: RunConfig, data: AnyTask, setting: str) -> Truth | None:
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


@dataclass(frozen=True, eq=False)
class _Frozen:
    """Options behind a digest: the cache compares the digest only."""

    options: Mapping[str, Any]
    packages: tuple[str, ...]

    def __eq__(self, other: object) -> Literal[True]:
        return True

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=4)
def _data(key: str, task: _Frozen) -> AnyTask:
    del key
    data = build(task.options, "task", task.packages)
    if not isinstance(data, AnyTask):
        raise ConfigError(
            f"task._target_={task.options['_target_']} returned {type(data).__name__}; a task "
            "returns fine_bench.data.TaskData (or fine_bench.llm.task.LanguageTask)"
        )
    # one function may serve several tasks: the configuration names them
    return replace(data, name=str(task.options.get("name", data.name)))
