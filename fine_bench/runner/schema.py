"""The schema of Hydra's configurations: dataclasses, where the YAML files are, and no more.

It imports nothing that takes long, so that ``--help``, which prints a configuration, is quick; what
needs more is checked in ``config`` and ``bank_config``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from fine_bench.clock import WALL
from fine_bench.errors import ConfigError
from fine_bench.store.files import slug

if TYPE_CHECKING:
    from fine_bench.retraining.design import Design, Vary


@dataclass
class TrainerConfig:
    """How a model is trained.

    Attributes:
        optimizer: ``"sgd"`` for images, ``"adamw"`` for language models.
        max_epochs: passes over the training data, ≥ 1.
        batch_size: examples a step, ≥ 1.
        lr: step size, > 0.
        momentum: of SGD, ≥ 0.
        weight_decay: ≥ 0.
        lr_schedule: ``"constant"``, or ``"cosine"``: from lr to 0 over all steps.
        checkpoint_every: epochs between the checkpoints that methods read, counted back from the
            last epoch, which is always kept; ≥ 1.
        init_seed, order_seed: fix one source of randomness for all run seeds; null follows
            ``seed``.
        num_threads: CPU threads of PyTorch; null leaves PyTorch's choice.
        progress: show a progress bar.
    """

    max_epochs: int = 10
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    checkpoint_every: int = 1
    init_seed: int | None = None
    order_seed: int | None = None
    num_threads: int | None = None
    progress: bool = True
    optimizer: str = "sgd"


@dataclass
class LoggerConfig:
    """Who is told of the training; records and tables are written whatever it is.

    Attributes:
        kind: ``"wandb"``, ``"csv"``, ``"tensorboard"`` or ``"none"``.
        mode: of W&B: ``"online"``, ``"offline"`` (needs no account, asks nothing) or
            ``"disabled"``.
        project, entity: of W&B.
        group: of W&B runs; null for task, model and setting.
        tags: of W&B runs, beside task, model and sweep.
    """

    kind: str = "wandb"
    mode: str = "offline"
    project: str = "fine_bench"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """Everything that a run is told.

    Attributes:
        seed: run seed (initialisation, order), ≥ 0. Data and corruption follow ``task.seed``.
        task, model: a ``_target_`` and its keyword arguments.
        estimators: by row name, a ``_target_`` and its keyword arguments; filled by the config
            group ``estimator``.
        targets: what is asked of each estimator.
        sensitivity: by row name, values of its options that are run beside the row, to show how far
            its numbers move (``fine_bench.leaderboard.sensitivity``); filled by the config group
            ``sensitivity``.
        query_weighting: weights of the queries in a mean, preset for every method alike.
        clock: ``wall``, or ``cpu`` for costs in CPU seconds on a machine that is shared.
        results_dir: where records, scores and tables go.
        force: compute finished cells again, as a new revision.
        allow_packages: packages besides ``fine_bench`` and ``baselines`` that ``_target_`` may
            name.
    """

    seed: int = 0
    task: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    estimators: dict[str, Any] = field(default_factory=dict)
    sensitivity: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = MISSING
    query_weighting: str | None = None
    clock: str = WALL
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    results_dir: str = "results"
    force: bool = False
    allow_packages: list[str] = field(default_factory=list)


@dataclass
class DefinitionConfig:
    """The part "definition": all data, and all data without a set; only seeds differ.

    Attributes:
        singles: examples left out one at a time, spread over the ranks of the bank's own μ.
        groups: whether the task's groups are left out, too.
        with_runs: models on all data.
        without_runs: models without each set.
    """

    singles: int = 0
    groups: bool = True
    with_runs: int = 0
    without_runs: int = 0


@dataclass
class BankConfig:
    """Which models a bank shall hold, and who trains them.

    Attributes:
        models: models with a random subset of their own, ≥ 0.
        keep: share of the examples in a random subset, in (0, 1).
        subsets: subsets that are trained on with several seeds, ≥ 0.
        seeds_per_subset: how many, ≥ 5.
        vary: ``both``, ``initialisation`` or ``order``: what differs between the models.
        seed: of the bank, ≥ 0.
        definition: the third part.
        processes: how many work at once; null: all cores, and one process on a GPU.
        at_once: models in a stack; null chooses by the network and the device.
        device: ``cpu`` or ``cuda``.
        folder: banks lie below it, each in a folder of its own.
    """

    models: int = 256
    keep: float = 0.5
    subsets: int = 0
    seeds_per_subset: int = 5
    vary: str = "both"
    seed: int = 0
    definition: DefinitionConfig = field(default_factory=DefinitionConfig)
    processes: int | None = None
    at_once: int | None = None
    device: str = "cpu"
    folder: str = "${results_dir}/banks"

    @property
    def has_definition(self) -> bool:
        """Whether the part "definition" is asked for."""
        return self.definition.with_runs > 0

    @property
    def design(self) -> Design:
        """What all its models share."""
        from fine_bench.retraining.design import Design

        return Design(self.seed, self.keep, cast("Vary", self.vary))


@dataclass
class BankRunConfig(RunConfig):
    """The configuration of a run, with a bank."""

    bank: BankConfig = field(default_factory=BankConfig)


def register() -> None:
    """Make the schema known to Hydra, and what YAML files may call."""
    OmegaConf.register_new_resolver("name_of_file", name_of_file, replace=True)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="trainer", name="trainer_schema", node=TrainerConfig)
    store.store(group="logger", name="logger_schema", node=LoggerConfig)
    store.store(name="bank_schema", node=BankRunConfig)


def name_of_file(path: str | None, otherwise: str) -> str:
    """What a task is called by default: as the file of the user's own, or ``otherwise``.

    Args:
        path: of the file; None where the data are generated.
        otherwise: the name without a file.
    """
    return otherwise if path is None else slug(Path(str(path)).stem)


def config_folder() -> Path:
    """Where the YAML files are: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"config.yaml was found neither in {package / 'conf'} nor in {package.parent / 'conf'}; "
        "install the package again"
    )


def refuse_empty_groups(arguments: Sequence[str]) -> None:
    """Refuse ``task=null``: a group of the configuration chooses a file, and nothing is none.

    Raises:
        ConfigError: with the choices.
    """
    for argument in arguments:
        match = re.fullmatch(r"\+*([\w/]+)(@[\w.]+)?=(.*)", argument)
        if match is None:
            continue
        folder, given = config_folder() / match[1], [v.strip() for v in match[3].split(",")]
        if folder.is_dir() and {"null", "~", ""} & set(given):
            choices = sorted(path.stem for path in folder.glob("*.yaml"))
            raise ConfigError(
                f"{argument} chooses nothing; type {match[1]}={choices[0]}, or another of: "
                f"{', '.join(choices)}"
            )
