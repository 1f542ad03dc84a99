"""Which models a bank consists of: the parts, the subsets and the seeds.

- ``single``: every model has a random subset of its own, exactly round(keep · n) examples. For the
  μ of every example at once.
- ``repeated``: several seeds on each of some such subsets. For the LDS.
- ``definition``: all data, and all data without S for given sets S; only seeds differ. The
  definition of influence itself, for the few sets that it can be afforded for.

All of a model follows from the bank's seed and the model's own place (part, subset, run) by named
streams. So a larger bank holds the smaller one: enlarging it only appends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.seeds import derive, stream

Part: TypeAlias = Literal["single", "repeated", "definition"]
PARTS: tuple[Part, ...] = get_args(Part)
Vary: TypeAlias = Literal["both", "initialisation", "order"]

EVERYTHING = 0
"""The number of the subset that is all data."""

LEAST_SEEDS = 5
"""Fewest seeds on each subset of the part "repeated"."""


@dataclass(frozen=True)
class Model:
    """One model of a bank.

    Attributes:
        part: to which it belongs.
        subset: number of its subset: in "definition" ``set_number`` of what is left out.
        run: number among the models on this subset.
        without: positions left out ("definition" only), ascending.
    """

    part: Part
    subset: int
    run: int
    without: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from the others of its part."""
        return self.subset, self.run

    @property
    def name(self) -> str:
        """For messages."""
        return f"model {self.part}/{self.subset}/{self.run}"


@dataclass(frozen=True)
class Design:
    """What all models of a bank share. Checked at birth.

    Attributes:
        seed: of the bank, ≥ 0.
        keep: share of the examples in a random subset, in (0, 1).
        vary: which randomness of training differs between the models; the other source is the
            same for all of them.
    """

    seed: int = 0
    keep: float = 0.5
    vary: Vary = "both"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative; take seed=0")
        if not 0.0 < self.keep < 1.0:
            raise ValueError(
                f"keep={self.keep} must lie strictly between 0 and 1: the share of the examples "
                "that a model is trained on; take keep=0.5"
            )
        if self.vary not in get_args(Vary):
            raise ValueError(
                f"vary={self.vary} is unknown; take vary=both, initialisation or order"
            )

    def size(self, n: int) -> int:
        """Examples in a random subset of ``n``: at least one, and not all of them."""
        return min(max(round(self.keep * n), 1), n - 1)

    def size_of(self, model: Model, n: int) -> int:
        """Examples that a model is trained on."""
        return n - len(model.without) if model.part == "definition" else self.size(n)

    def positions(self, model: Model, n: int) -> Tensor:
        """The examples that a model is trained on, ``(s,)`` int64, ascending."""
        if model.part == "definition":
            inside = torch.ones(n, dtype=torch.bool)
            inside[list(model.without)] = False
            return inside.nonzero()[:, 0]
        name = f"bank/{model.part}/subset/{model.subset}"
        order = torch.randperm(n, generator=stream(self.seed, name))
        return order[: self.size(n)].sort().values

    def run_seed(self, model: Model) -> int:
        """The run seed of a model, as the benchmark's own runs have one."""
        return derive(self.seed, f"bank/{model.part}/run/{model.subset}/{model.run}")

    def init_seed(self, model: Model) -> int:
        """The run seed that its initialisation follows."""
        return self._fixed if self.vary == "order" else self.run_seed(model)

    def order_seed(self, model: Model) -> int:
        """The run seed that its order follows."""
        return self._fixed if self.vary == "initialisation" else self.run_seed(model)

    @property
    def _fixed(self) -> int:
        return derive(self.seed, "bank/fixed")


def single_models(count: int) -> list[Model]:
    """The part "single"."""
    return [Model("single", k, 0) for k in range(count)]


def repeated_models(n_subsets: int, seeds_per_subset: int) -> list[Model]:
    """The part "repeated", subset by subset.

    Raises:
        ValueError: fewer than ``LEAST_SEEDS`` seeds a subset.
    """
    if n_subsets and seeds_per_subset < LEAST_SEEDS:
        raise ValueError(
            f"seeds_per_subset={seeds_per_subset}: one training says little about a subset; take "
            f"at least {LEAST_SEEDS}"
        )
    return [
        Model("repeated", subset, run)
        for subset in range(n_subsets)
        for run in range(seeds_per_subset)
    ]


def set_number(without: Sequence[int]) -> int:
    """The subset number of all data without these examples; 0 without none."""
    if not without:
        return EVERYTHING
    return derive(0, "bank/without/" + ",".join(map(str, sorted(without))))


def definition_models(
    sets: Mapping[str, Sequence[int]], with_runs: int, without_runs: int
) -> list[Model]:
    """The part "definition": on everything, then without each set, set by set.

    Args:
        sets: name → positions.
        with_runs: models on all data.
        without_runs: models without each set.
    """
    models = [Model("definition", EVERYTHING, run) for run in range(with_runs)]
    for positions in sets.values():
        without = tuple(sorted(int(i) for i in positions))
        number = set_number(without)
        models += [Model("definition", number, run, without) for run in range(without_runs)]
    return models


def choose_singles(
    score: NDArray[np.floating], count: int, seed: int, chosen: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Single examples spread evenly over the ranks of a score: one drawn from each stratum.

    The examples in order of their score are cut into ``count`` strata of nearly equal size.

    Args:
        score: ``(n,)`` finite, for instance the bank's own μ.
        count: how many examples in all, ≤ n.
        seed: of the draw.
        chosen: examples chosen earlier. They stay, and only strata without one of them get a new
            one, until there are ``count``.

    Returns:
        ascending positions; ``chosen`` if there are enough of them already.

    Raises:
        ValueError: a score that is not finite, or more examples wanted than there are.
    """
    values = np.asarray(score, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("the score must be a vector of finite numbers, one for each example")
    n = len(values)
    if not 0 <= count <= n:
        raise ValueError(f"{count} examples cannot be chosen from {n}")
    found = {int(i) for i in chosen}
    order = np.argsort(values, kind="stable")
    strata = [part for part in np.array_split(order, max(count, 1)) if not found & set(part)]
    generator = stream(seed, "bank/singles")
    for k in torch.randperm(len(strata), generator=generator).tolist():
        if len(found) >= count:
            break
        draw = int(torch.randint(len(strata[k]), (1,), generator=generator))
        found.add(int(strata[k][draw]))
    return np.array(sorted(found), dtype=np.int64)
