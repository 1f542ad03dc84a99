"""The models of a bank, or those that it lacks: what ``fine-bench bank`` runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.metrics.retraining import models_for_counts, retraining_mu
from fine_bench.retraining.bank import Bank
from fine_bench.retraining.build import (
    Examples,
    OnStored,
    Retraining,
    build,
    default_processes,
    missing,
)
from fine_bench.retraining.design import (
    Model,
    Part,
    choose_singles,
    definition_models,
    repeated_models,
    single_models,
)
from fine_bench.retraining.identity import bank_folder
from fine_bench.runner import bank_config
from fine_bench.runner.backends.images import images_of
from fine_bench.runner.bank_config import MakeNetwork
from fine_bench.runner.calls import ALWAYS_ALLOWED
from fine_bench.runner.plan import plan
from fine_bench.runner.schema import BankConfig, RunConfig
from fine_bench.store.files import StoreError
from fine_bench.terminal import Terminal, bar_on, marked

_SINGLE = "example_"
_SECONDS_BETWEEN_LINES = 30.0

out = Terminal(stderr=True, soft_wrap=True)


@dataclass(frozen=True, eq=False)
class BankJob:
    """A bank to be filled.

    Attributes:
        config, wanted: the two halves of the configuration.
        data: of the task.
        bank: where the models go.
        retraining, examples: what it takes to train them.
    """

    config: RunConfig
    wanted: BankConfig
    data: TaskData
    bank: Bank
    retraining: Retraining
    examples: Examples

    @classmethod
    def prepare(cls, config: RunConfig, wanted: BankConfig) -> BankJob:
        """Load the data, check what only they can show, and open or begin the bank.

        Raises:
            ConfigError, DataError: nothing has been trained or written.
            StoreError: a bank that cannot be read.
        """
        data = images_of(plan(config))
        n, design = data.n_train, wanted.design
        parts = [*single_models(wanted.models), *repeated_models(wanted.subsets, 5)]
        if wanted.has_definition:
            sets = data.groups if wanted.definition.groups else {}
            parts += definition_models({k: v.tolist() for k, v in sets.items()}, 1, 1)
        bank_config.check_size(min(design.size_of(model, n) for model in parts), config.trainer)
        if wanted.definition.singles > n:
            raise ConfigError(
                f"bank.definition.singles={wanted.definition.singles}, but there are {n} training "
                f"examples; type bank.definition.singles={min(100, n)}"
            )
        make = MakeNetwork(
            config.model,
            (*ALWAYS_ALLOWED, *config.allow_packages),
            tuple(data.x.shape[1:]),
            data.n_classes,
        )
        identity = bank_config.identity_of(config, data, design)
        bad = data.truth.is_bad.nonzero()[:, 0].tolist()
        return cls(
            config,
            wanted,
            data,
            Bank.create(bank_folder(wanted.folder, identity), identity, bad),
            Retraining(bank_config.recipe_of(config.trainer), design, make, wanted.device),
            Examples(data.x, data.y, data.query_x, data.query_y),
        )

    def run(self) -> None:
        """Train what is missing, part by part, and say what was done."""
        self._announce()
        wanted = self.wanted
        subsets = repeated_models(wanted.subsets, wanted.seeds_per_subset)
        self._fill({"single": single_models(wanted.models), "repeated": subsets})
        if wanted.has_definition:
            self._choose_sets()
            runs = (wanted.definition.with_runs, wanted.definition.without_runs)
            self._fill({"definition": definition_models(self.bank.sets(), *runs)})
        out.print(f"the bank is complete: {self.bank.folder}")

    def _announce(self) -> None:
        config, data, wanted, trainer = self.config, self.data, self.wanted, self.config.trainer
        about = f"  {data.name}, seed {wanted.seed}, vary {wanted.vary}"
        out.print(marked("fine-bench bank", about, "bold"))
        out.print(
            f"  data        {data.n_train:,} training examples, {data.truth.n_bad:,} bad, "
            f"{data.n_query:,} queries"
        )
        out.print(
            f"  model       {config.model.get('name', config.model['_target_'])}, "
            f"{trainer.max_epochs} epochs, batch {trainer.batch_size}, lr {trainer.lr:g} "
            f"({trainer.lr_schedule}), momentum {trainer.momentum:g}, weight decay "
            f"{trainer.weight_decay:g}"
        )
        size = wanted.design.size(data.n_train)
        if wanted.models:
            subset = f"a random {wanted.keep:.0%} ({size:,} examples)"
            out.print(f"  single      {wanted.models:,} models, each on {subset} of its own")
            enough = models_for_counts(data.n_train, wanted.keep)
            if wanted.models < enough:
                out.print(
                    f"              for the μ of every example about {enough} are needed: "
                    f"bank.models={enough}"
                )
        if wanted.subsets:
            out.print(
                f"  repeated    {wanted.subsets:,} subsets of {size:,} examples, "
                f"{wanted.seeds_per_subset} seeds each"
            )
        if wanted.has_definition:
            definition = wanted.definition
            groups = len(data.groups) if definition.groups else 0
            out.print(
                f"  definition  {definition.with_runs} models on everything, "
                f"{definition.without_runs} without each of {definition.singles} single examples "
                f"and {groups} groups"
            )
        processes = wanted.processes or default_processes(wanted.device)
        out.print(f"  processes   up to {processes}, on {wanted.device}")
        out.print(f"  bank        {self.bank.folder}")
        out.print()

    def _fill(self, parts: Mapping[Part, list[Model]]) -> None:
        todo = 0
        for part, models in parts.items():
            if models:
                lacking = len(missing(self.bank, models))
                out.print(
                    marked(
                        part,
                        f": {len(models) - lacking:,} of {len(models):,} models are there, "
                        f"{lacking:,} to train",
                        "bold",
                    )
                )
                todo += lacking
        if not todo:
            return
        with _progress(todo) as report:
            built = build(
                self.bank,
                [model for models in parts.values() for model in models],
                self.retraining,
                self.examples,
                processes=self.wanted.processes,
                at_once=self.wanted.at_once,
                report=report,
            )
        out.print(
            f"  trained {built.trained:,} models in {_duration(built.seconds)} with "
            f"{built.processes} at work: {built.seconds / built.trained:.2f} s a model"
        )

    def _choose_sets(self) -> None:
        """Add the sets that are wanted and not there. Those chosen earlier stay."""
        definition, bank = self.wanted.definition, self.bank
        if definition.groups:
            bank.add_sets({name: group.tolist() for name, group in self.data.groups.items()})
        chosen = [s[0] for name, s in bank.sets().items() if name.startswith(_SINGLE)]
        if definition.singles <= len(chosen):
            return
        try:
            models = bank.load("single")
            mu = retraining_mu(models.members, models.margin).mu
            singles = choose_singles(mu, definition.singles, self.wanted.seed, chosen)
        except (StoreError, ValueError) as error:
            raise ConfigError(
                f"bank.definition.singles={definition.singles} are chosen by the bank's own μ, "
                f"which its part single does not give yet: {error}"
            ) from error
        bank.add_sets({f"{_SINGLE}{i}": (i,) for i in singles.tolist()})


@contextmanager
def _progress(total: int) -> Iterator[OnStored]:
    """A bar with the remaining time; in a file, a line now and then."""
    if out.is_terminal:
        with bar_on(out) as progress:
            task = progress.add_task("  models", total=total)
            yield lambda count: progress.update(task, advance=count)
        return
    start = last = time.perf_counter()
    done = 0

    def report(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.perf_counter()
        if now - last >= _SECONDS_BETWEEN_LINES and done < total:
            last = now
            left = (now - start) / done * (total - done)
            out.print(f"  {done:,} of {total:,} models, {_duration(left)} remaining")

    yield report


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
