"""Configuration: YAML chooses, dataclasses and signatures check, before anything is trained.

The top level and the trainer are dataclasses, so Hydra itself refuses an unknown key or a wrong
type there. Tasks, models and estimators are open sets: each YAML file names a function or class in
``_target_``, and its other keys are checked against the annotations of that signature. Adding one
therefore needs one Python file and one YAML file, and nothing here.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pydantic
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fine_bench.errors import ConfigError
from fine_bench.leaderboard.option_grid import Point, points
from fine_bench.runner import addresses
from fine_bench.store.digest import digest
from fine_bench.types import TARGETS, VARIED, LRSchedule, QueryWeighting, UnsupportedProblemError

ALWAYS_ALLOWED = ("fine_bench", "baselines")

# what the runner passes to a target itself, by section: no configuration key
RUNNER_PASSES: Mapping[str, frozenset[str]] = {
    "task": frozenset(),
    "model": frozenset({"in_shape", "n_classes"}),
    "estimators": frozenset({"target", "queries"}),
}

OPTIMIZERS = ("sgd", "adamw")

# where files lie and whether they may be fetched: no part of what is computed
PLACES = frozenset({"data_dir", "download", "path", "queries_path", "test_path"})

TRAINING_VERSION = 1
"""Raised when the same configuration may train to other weights."""


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
    """W&B. ``offline`` (default) needs no account and asks nothing."""

    mode: str = "offline"
    project: str = "fine_bench"
    entity: str | None = None


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
            its numbers move (``fine_bench.sensitivity``); filled by the config group
            ``sensitivity``.
        query_weighting: weights of the queries in a mean, preset for every method alike.
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
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    results_dir: str = "results"
    force: bool = False
    allow_packages: list[str] = field(default_factory=list)


def register() -> None:
    """Make the schema known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="trainer", name="trainer_schema", node=TrainerConfig)
    store.store(group="logger", name="logger_schema", node=LoggerConfig)


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


def check(cfg: DictConfig) -> RunConfig:
    """The configuration as dataclasses, every value checked that needs no data.

    Raises:
        ConfigError: what was given, what was expected and what to type.
    """
    try:
        keys = [str(key) for key in cfg if key != "hydra"]
        plain = OmegaConf.to_container(OmegaConf.masked_copy(cfg, keys), resolve=True)
        typed = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
        config = OmegaConf.to_object(typed)
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, RunConfig)
    if config.seed < 0:
        raise ConfigError(f"seed={config.seed} is negative; type seed=0")
    _check_trainer(config.trainer)
    if config.logger.mode not in ("online", "offline", "disabled"):
        raise ConfigError(
            f"logger.mode={config.logger.mode} is unknown; type logger.mode=offline (or online, "
            "disabled)"
        )
    weightings = [w for option in get_args(QueryWeighting) for w in (get_args(option) or (None,))]
    if config.query_weighting not in weightings:
        raise ConfigError(
            f"query_weighting={config.query_weighting} is unknown; type query_weighting=noise, "
            "norm or null"
        )
    if not config.targets or set(config.targets) - set(TARGETS):
        raise ConfigError(
            f"targets={config.targets} must be some of {list(TARGETS)}; type "
            "'targets=[self,validation]'"
        )
    if len(set(config.targets)) < len(config.targets):
        raise ConfigError(f"targets={config.targets} repeats one; name each target once")
    if not config.estimators:
        raise ConfigError("no estimator is chosen; type 'estimator=[fine,tracin]'")
    packages = (*ALWAYS_ALLOWED, *config.allow_packages)
    check_call(config.task, "task", "task", packages)
    check_call(config.model, "model", "model", packages)
    for name, options in config.estimators.items():
        if VARIED in name:
            raise ConfigError(
                f"estimators.{name}: {VARIED} marks the configurations of a range (sensitivity); "
                "call the row otherwise"
            )
        check_call(options, f"estimators.{name}", "estimators", packages)
    for row in config.sensitivity:
        varied(config, row)
    return config


def varied(config: RunConfig, row: str) -> list[Point]:
    """The configurations that are run beside a row to show its sensitivity.

    Raises:
        ConfigError: a row that is not run, no grid, an unknown option or a value of a wrong type.
    """
    where = f"sensitivity.{row}"
    if row not in config.estimators:
        chosen = ",".join([*config.estimators, row])
        raise ConfigError(
            f"{where}: {row} is not among the estimators of this run; type 'estimator=[{chosen}]'"
        )
    packages = (*ALWAYS_ALLOWED, *config.allow_packages)
    options = config.estimators[row]
    signature = inspect.signature(target_of(options, f"estimators.{row}", packages))
    defaults = {
        p.name: p.default for p in signature.parameters.values() if p.default is not p.empty
    }
    found = points(config.sensitivity[row], {**defaults, **options}, where)
    for point in found:
        check_call({**options, **point.changes}, where, "estimators", packages)
    return found


def _check_trainer(trainer: TrainerConfig) -> None:
    for name, minimum in (("max_epochs", 1), ("batch_size", 1)):
        value = getattr(trainer, name)
        if value < minimum:
            raise ConfigError(
                f"trainer.{name}={value} must be at least {minimum}; type trainer.{name}="
                f"{getattr(TrainerConfig, name)}"
            )
    if not 0 < trainer.lr < float("inf"):
        raise ConfigError(
            f"trainer.lr={trainer.lr} must be a positive number; type trainer.lr={TrainerConfig.lr}"
        )
    for name in ("momentum", "weight_decay"):
        value = getattr(trainer, name)
        if not 0 <= value < float("inf"):
            raise ConfigError(f"trainer.{name}={value} must not be negative; type trainer.{name}=0")
    if trainer.checkpoint_every < 1:
        raise ConfigError(
            f"trainer.checkpoint_every={trainer.checkpoint_every} is in epochs, at least 1; type "
            "trainer.checkpoint_every=1"
        )
    if trainer.optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"trainer.optimizer={trainer.optimizer} is unknown; type trainer.optimizer=sgd or adamw"
        )
    if trainer.lr_schedule not in get_args(LRSchedule):
        raise ConfigError(
            f"trainer.lr_schedule={trainer.lr_schedule} is unknown; type "
            "trainer.lr_schedule=constant or cosine"
        )
    for name in ("init_seed", "order_seed"):
        value = getattr(trainer, name)
        if value is not None and value < 0:
            raise ConfigError(f"trainer.{name}={value} is negative; type trainer.{name}=0 or null")
    if trainer.num_threads is not None and trainer.num_threads < 1:
        raise ConfigError(
            f"trainer.num_threads={trainer.num_threads} must be at least 1; type "
            "trainer.num_threads=null to let PyTorch choose"
        )


def target_of(options: Mapping[str, Any], where: str, packages: tuple[str, ...]) -> Any:
    """The function or class that ``_target_`` names, if its package is allowed."""
    path = options.get("_target_")
    if not isinstance(path, str):
        raise ConfigError(f"{where}._target_ is missing; name a function or class there")
    if path.split(".")[0] not in packages:
        raise ConfigError(
            f"{where}._target_={path} lies outside of the packages {', '.join(packages)}; if you "
            f"trust it, type 'allow_packages=[{path.split('.')[0]}]'"
        )
    try:
        found = get_object(addresses.today(path))
    except Exception as error:
        raise ConfigError(f"{where}._target_={path} cannot be imported: {error}") from error
    # a module of ours imports others: fine_bench.store.files.os.system is not ours to call
    home = str(getattr(found, "__module__", "") or "").split(".")[0]
    if home not in packages or not callable(found):
        raise ConfigError(
            f"{where}._target_={path} is no function or class of the packages "
            f"{', '.join(packages)}"
            + (f"; it comes from {home}, so if you trust it, type 'allow_packages=[{home}]'"
               if home and home not in packages else "; name one")
        )  # fmt: skip
    return found


def check_call(
    options: Mapping[str, Any], where: str, section: str, packages: tuple[str, ...]
) -> None:
    """Check a section's keys and types against the signature of its ``_target_``.

    Raises:
        ConfigError: an unknown key, a missing one or a value of a wrong type.
    """
    target = target_of(options, where, packages)
    for key, value in options.items():
        _check_nested(value, f"{where}.{key}", packages)
    passed = RUNNER_PASSES[section]
    signature = inspect.signature(target)
    hints = _hints(target)
    names = [
        p.name
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in passed
    ]
    for key, value in options.items():
        if key in ("_target_", "name"):
            continue
        if key not in names:
            raise ConfigError(f"{where}.{key} is unknown{suggest(key, names, where)}")
        if key == "seed" and value is None and section == "estimators":
            continue  # follows the run seed
        if key in hints:
            _check_type(value, hints[key], f"{where}.{key}")
    for parameter in signature.parameters.values():
        if (
            parameter.name in names
            and parameter.default is parameter.empty
            and parameter.name not in options
        ):
            raise ConfigError(
                f"{where}.{parameter.name} is missing; type {where}.{parameter.name}=…"
            )


def _check_nested(value: Any, where: str, packages: tuple[str, ...]) -> None:
    """Targets inside of options are limited like those of the sections."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            target_of(value, where, packages)
        for key, inner in value.items():
            _check_nested(inner, f"{where}.{key}", packages)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_nested(inner, f"{where}[{number}]", packages)


def _hints(target: Callable[..., Any]) -> Mapping[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    return typing.get_type_hints(function)


def _check_type(value: Any, hint: Any, where: str) -> None:
    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(
            hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True)
        )
    except pydantic.errors.PydanticUserError:  # a hint that only means something in Python
        return
    try:
        adapter.validate_python(value)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ConfigError(f"{where}={value} has a wrong type: {problem}") from error


def suggest(key: str, names: list[str], where: str) -> str:
    """What to type instead of an unknown key."""
    prefix = f"{where}." if where else ""
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; {where or 'the configuration'} has: {', '.join(names)}"


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's complaints as one sentence with a way out."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, OmegaConfBaseException) and link.key is not None:
            full = link.full_key or str(link.key)
            where, _, key = full.rpartition(".")
            parent = link.parent_node
            if " not in '" in str(link) or "not in struct" in str(link):
                names = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
                return f"{full} is unknown{suggest(key, names, where)}"
            first = str(link).splitlines()[0]
            default = parent.get(key) if isinstance(parent, DictConfig) and key in parent else None
            return f"{full}: {first}" + (f"; type {full}={default}" if default is not None else "")
    # what Hydra adds about search paths and providers does not help
    return str(chain[0]).split("Config search path")[0].strip()


def setting_of(config: RunConfig) -> dict[str, Any]:
    """What all estimators of a run share and what could change their results, but for the seed."""
    trainer = {
        k: getattr(config.trainer, k)
        for k in TrainerConfig.__dataclass_fields__
        if k not in ("progress", "num_threads")
    }
    # settings that were named before these options existed keep their digest
    if config.trainer.lr_schedule == "constant":
        del trainer["lr_schedule"]
    if config.trainer.checkpoint_every == 1:
        del trainer["checkpoint_every"]
    if config.trainer.optimizer == "sgd":
        del trainer["optimizer"]
    # a language task is told its model, whose tokenizer it needs: one copy is enough
    twice = {"model"} if config.task.get("model") == config.model else set()
    return {
        "task": addresses.recorded(
            {k: v for k, v in config.task.items() if k not in PLACES | twice}
        ),
        "model": addresses.recorded(
            {k: v for k, v in config.model.items() if k not in ("download", "allow_cpu")}
        ),
        "trainer": trainer,
        "training_version": TRAINING_VERSION,
    }


def setting_digest(config: RunConfig) -> str:
    """Digest of ``setting_of``."""
    return digest(setting_of(config))


def estimator_digest(options: Mapping[str, Any]) -> str:
    """Digest of an estimator's own options. ``seed: null`` stands for the run seed in them."""
    return digest(addresses.recorded(options))


def build(
    options: Mapping[str, Any], where: str, packages: tuple[str, ...], /, *args: Any, **passed: Any
) -> Any:
    """Call the ``_target_`` with its options; a refusal names the section.

    Raises:
        ConfigError: the target refused an option.
        UnsupportedProblemError: it is a method that does not serve what is asked of it.
    """
    target = target_of(options, where, packages)
    own = {k: v for k, v in options.items() if k not in ("_target_", "name")}
    try:
        return target(*args, **own, **passed)
    except (ConfigError, UnsupportedProblemError):
        raise
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{where}: {error}") from error
