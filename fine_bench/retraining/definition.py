"""Influence by its definition beside the bank's μ, set by set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fine_bench.metrics.definition import (
    LEAST_SETS,
    DefinitionMu,
    definition_mu,
    mean_over_sets,
    relation,
)
from fine_bench.metrics.retraining import retraining_mu
from fine_bench.retraining.outputs import BankModels

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Compared:
    """μ of each set S two ways.

    Attributes:
        sets: ascending positions of each set's members.
        bank, bank_error: ``(n_sets,)`` mean of the members' own μ from random subsets, and its
            standard error; NaN for sets of several, whose members' errors are correlated.
        exact: μ by the definition: all data against all data without S, seeds only.
        runs_with: models on all data; runs_without: ``(n_sets,)``, models without each set.
    """

    sets: Sequence[NDArray[np.int64]]
    bank: Floats
    bank_error: Floats
    exact: DefinitionMu
    runs_with: int
    runs_without: NDArray[np.int64]

    @property
    def single(self) -> NDArray[np.bool_]:
        """Which sets are one example."""
        return np.array([len(one) == 1 for one in self.sets], dtype=np.bool_)

    def facts(self) -> dict[str, float]:
        """``<examples|groups>/<number of metrics.definition.relation>``.

        A kind with fewer than ``LEAST_SETS`` sets is left out.
        """
        found: dict[str, float] = {}
        for kind, chosen in (("examples", self.single), ("groups", ~self.single)):
            if np.count_nonzero(chosen) < LEAST_SETS:
                continue
            alone = kind == "examples"  # of a mean over members the error is not known
            numbers = relation(
                self.bank[chosen],
                self.exact.mu[chosen],
                bank_error=self.bank_error[chosen] if alone else None,
                definition_error=self.exact.std_error[chosen] if alone else None,
            )
            found |= {f"{kind}/{key}": value for key, value in numbers.items()}
        return found

    def table(
        self, names: Mapping[tuple[int, ...], str], is_bad: NDArray[np.bool_]
    ) -> pd.DataFrame:
        """One row a set, by falling ``bank_mu``.

        Args:
            names: of the sets, by their ascending positions; others get the first position.
            is_bad: ``(n,)``, for the column ``n_bad``.
        """
        rows = [
            {
                "set": names.get(tuple(one.tolist()), f"set_of_{one[0]}"),
                "size": len(one),
                "n_bad": int(is_bad[one].sum()),
                "bank_mu": self.bank[s],
                "bank_std_error": self.bank_error[s],
                "definition_mu": self.exact.mu[s],
                "definition_std_error": self.exact.std_error[s],
                "definition_lower": self.exact.lower[s],
                "definition_upper": self.exact.upper[s],
                "runs_with": self.runs_with,
                "runs_without": int(self.runs_without[s]),
            }
            for s, one in enumerate(self.sets)
        ]
        return pd.DataFrame(rows).sort_values("bank_mu", ascending=False, ignore_index=True)


def compare(single: BankModels, definition: BankModels) -> Compared | None:
    """μ by the definition and by the bank for every set that models were trained without.

    The sets are read off the models: what those of a subset were not trained on. None where no set
    was left out.

    Raises:
        ValueError: the models of subset 0 were not trained on all data, or too few models.
    """
    if not (definition.subset == 0).any() or not definition.members[definition.subset == 0].all():
        raise ValueError("the definition part's models of subset 0 must be trained on all data")
    # the numbers of the subsets are names; here 0 stays 0 and the others count from 1
    _, first, which = np.unique(definition.subset, return_index=True, return_inverse=True)
    sets = [np.flatnonzero(~definition.members[row]) for row in first[1:]]
    if not sets:
        return None
    bank = retraining_mu(single.members, single.margin)
    runs = np.bincount(which)
    alone = np.array([len(one) == 1 for one in sets])
    return Compared(
        sets=sets,
        bank=mean_over_sets(bank.mu, sets),
        bank_error=np.where(alone, mean_over_sets(bank.std_error, sets), np.nan),
        exact=definition_mu(definition.margin, which, sets),
        runs_with=int(runs[0]),
        runs_without=runs[1:].astype(np.int64),
    )
