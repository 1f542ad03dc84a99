"""The options of the paper's estimator: names, types, defaults, meaning, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fine_bench.fine.effects import Observable, choose
from fine_bench.fine.options import check_queries, refuse_small
from fine_bench.fine.subset_samples import Signal
from fine_bench.fine.subsets import Column, Members, Subsets, watch
from fine_bench.gradients.query_weighting import check_weighting
from fine_bench.types import Loss, QueryWeighting, UnsupportedProblemError

Selection: TypeAlias = Literal["split", "max"]
Auxiliary: TypeAlias = Literal["reseed", "without_subset"] | None
PaperTarget: TypeAlias = Literal["self", "validation"]


@dataclass(frozen=True, eq=False)
class SubsetOptions:
    """What the paper's estimator is to test, how often, and of which model.

    Args:
        target: ``"self"``: the mean observable of the subset's own members; ``"validation"``: that
            of the queries.
        observable: ``"margin"``, h = −log(p/(1−p)), or ``"loss"``.
        queries: dataset of ``(x, y)`` for ``"validation"``.
        subsets: name → positions or boolean mask ``(n_train,)``.
        groups: one label a training example, ``(n_train,)``; each value is a subset.
        sample: number of single examples to watch, drawn by given label; None for none.
        sample_seed: of that draw, the same for all runs that are to be compared.
        every_n_steps: update steps between two measured ones, ≥ 1. The paper measures every step
            (1); the cost is one pass over pool and watched examples each time.
        members: k, the members of a group in a P batch; None for max(1, round(m·|S|/n)).
        selection: ``"split"`` or ``"max"`` (the published rule); see ``fine.subset_test``.
        auxiliary: ``"reseed"``: subtract the signal of a second run on the same data with other
            randomness, given as ``auxiliary_signal``; None: test the signals as they are.
        auxiliary_signal: ``signal()`` of the other run; may also be set after the run, as an
            attribute.
        query_weighting: weights of the queries, ``"noise"``, ``"norm"`` or None.
        refresh_every: update steps between two computations of the queries' gradients, ≥ 1.
        seed: of the measurement batches, ≥ 0.
        batch_size: m of the measured batches, ≥ 2; None for that of the training batches.
        pool: examples drawn a step, shared by all subsets; None for 4·m.
        target_members: members over which a group's own observable is averaged at one step, drawn
            anew each time and independently of those in the P batch.
        level: coverage of the intervals.
        layers: names of modules to differentiate; None for all.
        forward: ``forward(module, x) -> logits``; ``module(x)`` by default.
        loss: the training loss, per example.

    Raises:
        UnsupportedProblemError: a target that the estimator does not serve.
        NotImplementedError: an auxiliary run for every subset.
        ValueError: options that do not fit each other.
    """

    target: PaperTarget = "self"
    observable: Observable = "margin"
    _: KW_ONLY
    queries: Dataset[Any] | None = None
    subsets: Mapping[str, Members] | None = None
    groups: Column | None = None
    sample: int | None = None
    sample_seed: int = 0
    every_n_steps: int = 10
    members: int | None = None
    selection: Selection = "split"
    auxiliary: Auxiliary = "reseed"
    auxiliary_signal: Signal | None = None
    query_weighting: QueryWeighting = "noise"
    refresh_every: int = 20
    seed: int = 0
    batch_size: int | None = None
    pool: int | None = None
    target_members: int = 32
    level: float = 0.95
    layers: Sequence[str] | None = None
    forward: Callable[[Any, Tensor], Tensor] | None = None
    loss: Loss = F.cross_entropy

    def __post_init__(self) -> None:
        if self.target in ("queries", "validation_per_class"):
            raise UnsupportedProblemError(
                f"target={self.target!r} would need P and Q batches for every pair of subset and "
                'row; the paper\'s estimator serves "self" and "validation"'
            )
        choose(self.target, PaperTarget, "target")
        choose(self.observable, Observable, "observable")
        choose(self.selection, Selection, "selection")
        if self.auxiliary == "without_subset":
            raise NotImplementedError(
                'auxiliary="without_subset" needs one more training for every subset, on data '
                'without it, which no callback of this run can do; use auxiliary="reseed" (one '
                "more training for all subsets) or None"
            )
        if self.auxiliary not in ("reseed", None):
            raise ValueError(f'auxiliary must be "reseed" or None, got {self.auxiliary!r}')
        if self.auxiliary is None and self.auxiliary_signal is not None:
            raise ValueError('auxiliary_signal is given, but auxiliary=None; use "reseed"')
        check_weighting(self.query_weighting)
        check_queries(self.target, self.queries)
        if self.subsets is None and self.groups is None and self.sample is None:
            raise ValueError(
                "nothing to watch: pass sample=300 for single examples, subsets={name: "
                "positions}, or groups=(one label a training example)"
            )
        named = self.subsets is None or isinstance(self.subsets, Mapping)
        if not named or not all(isinstance(name, str) for name in self.subsets or {}):
            raise ValueError(
                f"subsets must be a mapping of names to positions, got {self.subsets!r:.80}; pass "
                "subsets={'name': [3, 14, 15]}"
            )
        refuse_small(
            self,
            every_n_steps=1,
            refresh_every=1,
            target_members=1,
            sample=1,
            members=1,
            batch_size=2,
            pool=1,
            seed=0,
            sample_seed=0,
        )
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level must lie strictly between 0 and 1, got {self.level}; try 0.95")

    def watch(self, n_train: int, labels: Callable[[], Tensor]) -> Subsets:
        """What is watched of a training set; see ``fine_bench.fine.subsets.watch``."""
        return watch(
            n_train,
            labels,
            subsets=self.subsets,
            groups=self.groups,
            sample=self.sample,
            sample_seed=self.sample_seed,
        )
