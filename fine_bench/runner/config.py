"""Configuration: YAML chooses, dataclasses and signatures check, before anything is trained.

The top level and the trainer are dataclasses (``schema``), so Hydra itself refuses an unknown key
or a wrong type there. Tasks, models and estimators are open sets: each YAML file names a function
or class in ``_target_``, and its other keys are checked against the annotations of that signature.
Adding one therefore needs one Python file and one YAML file, and nothing here.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any, get_args

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fine_bench.clock import CLOCKS
from fine_bench.errors import ConfigError
from fine_bench.leaderboard.option_grid import Point, points
from fine_bench.runner import addresses
from fine_bench.runner.calls import ALWAYS_ALLOWED, check_call, suggest, target_of
from fine_bench.runner.schema import LoggerConfig, RunConfig, TrainerConfig, config_folder
from fine_bench.store.digest import digest
from fine_bench.types import TARGETS, VARIED, LRSchedule, QueryWeighting

OPTIMIZERS = ("sgd", "adamw")

LOGGERS = ("wandb", "csv", "tensorboard", "none")

# where files lie and whether they may be fetched: no part of what is computed
PLACES = frozenset({"data_dir", "download", "path", "queries_path", "test_path"})

MAX_THREADS = 256
"""More than this are refused, but for a machine with more cores: PyTorch ends in a crash."""

TRAINING_VERSION = 1
"""Raised when the same configuration may train to other weights."""


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
    if config.results_dir.startswith("~") or not config.results_dir.strip():
        raise ConfigError(
            f"results_dir={config.results_dir!r} names no folder; write the path out, without ~"
        )
    _check_trainer(config.trainer)
    _check_logger(config.logger)
    weightings = [w for option in get_args(QueryWeighting) for w in (get_args(option) or (None,))]
    if config.query_weighting not in weightings:
        raise ConfigError(
            f"query_weighting={config.query_weighting} is unknown; type query_weighting=noise, "
            "norm or null"
        )
    if config.clock not in CLOCKS:
        raise ConfigError(
            f"clock={config.clock} is unknown; type clock=wall, or clock=cpu for costs in CPU "
            "seconds, where other programs share the machine"
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
    signature = inspect.signature(target_of(options, f"estimators.{row}", packages, "estimators"))
    defaults = {
        p.name: p.default for p in signature.parameters.values() if p.default is not p.empty
    }
    found = points(config.sensitivity[row], {**defaults, **options}, where)
    for point in found:
        check_call({**options, **point.changes}, where, "estimators", packages)
    return found


def _check_logger(logger: LoggerConfig) -> None:
    """Refuse, before anything is trained, a logger that cannot be had."""
    if logger.kind not in LOGGERS:
        raise ConfigError(
            f"logger.kind={logger.kind} is unknown; type logger=wandb (or logger=csv, "
            "logger=tensorboard, logger=none)"
        )
    if logger.mode not in ("online", "offline", "disabled"):
        raise ConfigError(
            f"logger.mode={logger.mode} is unknown; type logger.mode=offline (or online, disabled)"
        )
    packages = ("tensorboard", "tensorboardX")
    if logger.kind == "tensorboard" and not any(map(importlib.util.find_spec, packages)):
        raise ConfigError(
            "logger=tensorboard needs the package tensorboard, which is not installed; type "
            "`pip install tensorboard`, or logger=csv, which needs nothing"
        )


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
    most = max(MAX_THREADS, os.cpu_count() or 1)
    if trainer.num_threads is not None and trainer.num_threads > most:
        raise ConfigError(
            f"trainer.num_threads={trainer.num_threads} is more than {most}; type "
            "trainer.num_threads=null to let PyTorch choose"
        )


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
    for link in chain:
        missing = re.search(r"Could not (?:load|find) '([^'/]+)/([^']+)'", str(link))
        if missing:
            return _unknown_choice(*missing.groups())
    # what Hydra adds about search paths and providers does not help
    return str(chain[0]).split("Config search path")[0].strip()


def _unknown_choice(group: str, name: str) -> str:
    """What to type instead of an option that a group of the configuration lacks."""
    folder = config_folder() / group
    files = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    names = sorted(str(path.with_suffix("")) for path in files)
    plus = "+" if group == "experiment" else ""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    told = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names)}"
    return f"{plus}{group}={name} is unknown; {told}"


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
