"""The configuration of a bank: its checks, and the identity that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.retraining.design import LEAST_SEEDS, Design
from fine_bench.retraining.train import Recipe
from fine_bench.runner import calls
from fine_bench.runner import config as configuration
from fine_bench.runner.schema import BankConfig, RunConfig, TrainerConfig
from fine_bench.seeds import derive
from fine_bench.types import LRSchedule


def check(cfg: DictConfig) -> tuple[RunConfig, BankConfig]:
    """Both halves of the configuration, every value checked that needs no data.

    Raises:
        ConfigError: what was given, what was expected and what to type.
    """
    keys = [str(key) for key in cfg if key not in ("hydra", "estimators", "targets")]
    try:
        run = OmegaConf.to_container(OmegaConf.masked_copy(cfg, keys), resolve=True)
        assert isinstance(run, dict)
        typed = OmegaConf.merge(OmegaConf.structured(BankConfig), run.pop("bank"))
        bank = OmegaConf.to_object(typed)
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(configuration.explain(error)) from error
    assert isinstance(bank, BankConfig)
    # no estimator takes part, so that an experiment may name one that is not installed
    none = {"constant": {"_target_": "baselines.controls.ConstantScores"}}
    config = configuration.check(OmegaConf.create({**run, "estimators": none, "targets": ["self"]}))
    if config.seed != 0:
        raise ConfigError(
            f"seed={config.seed} is the seed of one benchmark run; the models of a bank have seeds "
            f"of their own. Type bank.seed={config.seed} for another bank"
        )
    for name, vary in (("init_seed", "order"), ("order_seed", "initialisation")):
        value = getattr(config.trainer, name)
        if value is not None:
            raise ConfigError(
                f"trainer.{name}={value} fixes a source of randomness for a benchmark run; for a "
                f"bank type bank.vary={vary} instead"
            )
    _check_bank(bank)
    return config, bank


def _check_bank(bank: BankConfig) -> None:
    definition = bank.definition
    for name, value in (
        ("models", bank.models),
        ("subsets", bank.subsets),
        ("definition.singles", definition.singles),
        ("definition.with_runs", definition.with_runs),
        ("definition.without_runs", definition.without_runs),
    ):
        if value < 0:
            raise ConfigError(f"bank.{name}={value} is negative; type bank.{name}=0 for none")
    for name, count in (("processes", bank.processes), ("at_once", bank.at_once)):
        if count is not None and count < 1:
            raise ConfigError(
                f"bank.{name}={count} must be at least 1; type bank.{name}=null to leave the "
                "choice to the command"
            )
    try:
        _ = bank.design
    except ValueError as error:
        raise ConfigError(f"bank.{error}".replace("; take ", "; type bank.")) from error
    if bank.subsets and bank.seeds_per_subset < LEAST_SEEDS:
        raise ConfigError(
            f"bank.seeds_per_subset={bank.seeds_per_subset}: one training says little about a "
            f"subset; type bank.seeds_per_subset={LEAST_SEEDS} or more"
        )
    if (definition.with_runs > 0) != (definition.without_runs > 0):
        raise ConfigError(
            f"bank.definition.with_runs={definition.with_runs} and bank.definition.without_runs="
            f"{definition.without_runs}: the one is compared with the other; type both, for "
            "instance bank.definition.with_runs=100 bank.definition.without_runs=20"
        )
    if definition.singles and not definition.with_runs:
        raise ConfigError(
            f"bank.definition.singles={definition.singles} needs models with and without them; "
            "type bank.definition.with_runs=100 bank.definition.without_runs=20"
        )
    if definition.with_runs and not (definition.singles or definition.groups):
        raise ConfigError(
            "bank.definition leaves nothing out; type bank.definition.singles=100, or "
            "bank.definition.groups=true"
        )
    if not (bank.models or bank.subsets or bank.has_definition):
        raise ConfigError("the bank would be empty; type for instance bank.models=256")
    try:
        available = torch.device(bank.device).type == "cpu" or torch.cuda.is_available()
    except RuntimeError:
        available = False
    if not available:
        raise ConfigError(
            f"bank.device={bank.device} is unknown or not there; type bank.device=cpu"
        )


def check_size(smallest: int, trainer: TrainerConfig) -> None:
    """Refuse a batch that is larger than the smallest training set of the bank."""
    if trainer.batch_size > smallest:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} is larger than the smallest subset of the "
            f"bank, {smallest} examples; type trainer.batch_size={smallest} or less, or a larger "
            "bank.keep"
        )


def recipe_of(trainer: TrainerConfig) -> Recipe:
    """How every model is trained."""
    return Recipe(
        max_epochs=trainer.max_epochs,
        batch_size=trainer.batch_size,
        lr=trainer.lr,
        momentum=trainer.momentum,
        weight_decay=trainer.weight_decay,
        lr_schedule=cast(LRSchedule, trainer.lr_schedule),
    )


def identity_of(config: RunConfig, data: TaskData, design: Design) -> dict[str, Any]:
    """What the models of a bank belong to: task, data, model, recipe and design.

    How many models there are is no part of it.
    """
    details = configuration.setting_of(config)
    trainer = {k: v for k, v in details["trainer"].items() if k not in ("init_seed", "order_seed")}
    return {
        "task": data.name,
        "data_sha256": data.sha256,
        "n_train": data.n_train,
        "n_query": data.n_query,
        "n_classes": data.n_classes,
        "setting": configuration.setting_digest(config),  # that of the records
        "details": {**details, "trainer": trainer},
        "design": asdict(design),
    }


@dataclass(frozen=True)
class MakeNetwork:
    """Builds a network as a benchmark run with the given seed does.

    Attributes:
        model: the section ``model`` of the configuration.
        packages: that it may name.
        in_shape, n_classes: of the data.
    """

    model: Mapping[str, Any]
    packages: tuple[str, ...]
    in_shape: tuple[int, ...]
    n_classes: int

    def __call__(self, seed: int) -> nn.Module:
        """The network initialised by this run seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "initialisation"))
            net: nn.Module = calls.build(
                self.model, "model", self.packages, self.in_shape, self.n_classes
            )
        return net
