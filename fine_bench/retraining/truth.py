"""The ground truth as an object, and what it says of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.metrics._arrays import as_array
from fine_bench.metrics.fidelity import fidelity
from fine_bench.metrics.lds import lds
from fine_bench.metrics.lds_interval import interval_over_queries
from fine_bench.metrics.out_of_sample import out_of_sample_fidelity
from fine_bench.metrics.outcome_spread import measured_spread, outcome_spread, spread_ceiling
from fine_bench.metrics.reliability import LEAST_FOR_CORRELATION, ceiling_of, spearman

Half: TypeAlias = Literal["development", "published"]
HALVES: tuple[Half, ...] = ("development", "published")
UNKNOWN = float("nan")

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class HalfTruth:
    """What one half of the models says of every training example; all arrays ``(n,)`` float32.

    Attributes:
        mu_margin: μ of the example's own margin ("moment"), positive where seeing it raises it.
        mu_margin_se: its standard error.
        mu_loss: the same of minus its own loss, so positive where seeing it lowers the loss.
        effect_margin: mean margin with the example minus without, in logits.
        effect_loss: mean *loss* with the example minus without: negative where it helps.
        out_of_sample_margin: mean margin of the models that never saw it.
        n_models: number of models.
        ceiling, ceiling_clean: noise ceiling of ``mu_margin`` over all and over the clean
            examples; NaN where unknown.
        lds_ceiling: of this half's subsets; NaN without them.
    """

    mu_margin: Floats
    mu_margin_se: Floats
    mu_loss: Floats
    effect_margin: Floats
    effect_loss: Floats
    out_of_sample_margin: Floats
    n_models: int
    ceiling: float
    ceiling_clean: float
    lds_ceiling: float = UNKNOWN


ARRAYS = (
    "mu_margin", "mu_margin_se", "mu_loss", "effect_margin", "effect_loss", "out_of_sample_margin"
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class SubsetTruth:
    """Margins of the queries after training on each of several subsets, averaged over seeds.

    Attributes:
        members: ``(subsets, n)`` boolean; even positions are the development half.
        margin: ``(subsets, q)`` float32, mean over all seeds.
        margin_first, margin_second: the same over every other seed.
        n_seeds: seeds a subset.
    """

    members: NDArray[np.bool_]
    margin: Floats
    margin_first: Floats
    margin_second: Floats
    n_seeds: int

    def of(self, half: Half) -> slice:
        """Positions of the subsets of a half."""
        return slice(HALVES.index(half), None, 2)

    def spread(self, half: Half) -> NDArray[np.float64]:
        """Deviation of each query's margin between single runs, ``(q,)``, in logits."""
        own = self.of(half)
        return measured_spread(self.margin_first[own], self.margin_second[own], self.n_seeds)


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth of one task and recipe. Checked at birth.

    Attributes:
        name: of the file and of ``--task``: letters, digits, ``_`` and ``-``.
        task: name of the task in the records.
        version: 1 for the first; raised with every change.
        data_sha256: digest of the data, as in the records.
        setting: digest of task, model and trainer, as in the records.
        keep: mean share of the examples in a subset.
        is_bad: ``(n,)`` boolean, the planted bad examples.
        development, published: the two halves.
        subsets: for the linear datamodeling score, or None.
        facts: further numbers about the bank, by name.
        singles: the version since which all that is said of single examples is the same, bit for
            bit; None for ``version`` itself. Below it where subsets were added later.
    """

    name: str
    task: str
    version: int
    data_sha256: str
    setting: str
    keep: float
    is_bad: NDArray[np.bool_]
    development: HalfTruth
    published: HalfTruth
    subsets: SubsetTruth | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    singles: int | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(
                f"name must consist of letters, digits, _ and -, got {self.name!r}; it names a file"
            )
        if self.version < 1:
            raise ValueError(f"version counts from 1, got {self.version}")
        if self.singles is not None and not 1 <= self.singles < self.version:
            raise ValueError(
                f"singles is an earlier version than {self.version}, or None, got {self.singles}"
            )
        if self.is_bad.dtype != np.bool_ or self.is_bad.ndim != 1:
            raise ValueError(
                f"is_bad must be boolean of shape (n,), got {self.is_bad.dtype} of shape "
                f"{self.is_bad.shape}"
            )
        for half in HALVES:
            for name in ARRAYS:
                array = getattr(self.half(half), name)
                if array.shape != self.is_bad.shape:
                    raise ValueError(
                        f"{half}.{name} must have shape {self.is_bad.shape}, got {array.shape}"
                    )
                broken = np.count_nonzero(~np.isfinite(array))
                if broken:
                    raise ValueError(
                        f"{half}.{name} is not finite for {broken} examples: their statistic does "
                        "not vary between models"
                    )
        if self.subsets is not None:
            shape = (len(self.subsets.members), self.n_query)
            if self.subsets.members.shape[1] != self.n_train:
                raise ValueError(
                    f"subsets.members must have {self.n_train} columns, got "
                    f"{self.subsets.members.shape[1]}"
                )
            for name in ("margin", "margin_first", "margin_second"):
                array = getattr(self.subsets, name)
                if array.shape != shape or not np.isfinite(array).all():
                    raise ValueError(f"subsets.{name} must be finite and have shape {shape}")

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return len(self.is_bad)

    @property
    def n_query(self) -> int:
        """Number of queries of the linear datamodeling score, 0 without it."""
        return 0 if self.subsets is None else self.subsets.margin.shape[1]

    def half(self, half: Half) -> HalfTruth:
        """One of the two halves."""
        if half not in HALVES:
            raise ValueError(f"half must be one of {HALVES}, got {half!r}")
        return self.development if half == "development" else self.published

    def summary(self) -> str:
        """What it is made of, for the terminal."""
        lines = [
            f"{self.name} version {self.version}: task {self.task}, {self.n_train:,} examples, "
            f"{int(self.is_bad.sum()):,} bad, subsets of {self.keep:.0%}"
        ]
        for half in HALVES:
            part = self.half(half)
            line = (
                f"  {half:<12} {part.n_models} models, ceiling {part.ceiling:.3f}, within clean "
                f"{part.ceiling_clean:.3f}"
            )
            if self.subsets is not None:
                n = len(self.subsets.members[self.subsets.of(half)])
                line += (
                    f"; LDS: {n} subsets, {self.subsets.n_seeds} seeds, {self.n_query} queries, "
                    f"ceiling {part.lds_ceiling:.3f}"
                )
            lines.append(line)
        lines += [
            f"  {name:<44} {value:.4g}"
            for name, value in sorted(self.facts.items())
            if not math.isnan(value)
        ]
        return "\n".join(lines)

    def metrics(
        self,
        values: NDArray[Any] | Tensor,
        target: str,
        half: Half = "published",
        watched: NDArray[np.int64] | Tensor | None = None,
    ) -> dict[str, float]:
        """How faithful scores are to this truth, by name; empty for targets it knows nothing of.

        ``self``: see ``metrics.fidelity.fidelity``, and ``metrics.out_of_sample`` for the truth of
        loss-like scores. ``queries``: the numbers of ``metrics.lds`` and
        ``metrics.outcome_spread``.
        ``truth_version`` says which version was asked: for ``self`` the one since which single
        examples have the truth that they have.

        Args:
            values: ``(rows, n)`` scores, positive where training on an example lowers the loss.
            target: one of ``types.TARGETS``.
            half: which half to compare with.
            watched: positions of the examples that have a score, of which alone the fidelity is
                then computed, with the ceiling of those: sqrt of the two halves' correlation.

        Raises:
            ValueError: a wrong number of examples or queries.
        """
        scores = as_array(values, "scores")
        if scores.ndim != 2 or scores.shape[1] != self.n_train:
            raise ValueError(
                f"scores have shape {scores.shape}; the truth {self.name} has {self.n_train:,} "
                "training examples, one column each"
            )
        truth = self.half(half)
        version = self.version
        if target == "self":
            found = self._fidelity(scores, truth, watched)
            version = self.singles or version
        elif target == "queries" and self.subsets is not None and watched is None:
            found = self._lds(scores, self.subsets, half)
        else:
            found = {}
        return {**found, "truth_version": float(version)} if found else {}

    def _fidelity(
        self,
        scores: NDArray[np.float64],
        truth: HalfTruth,
        watched: NDArray[np.int64] | Tensor | None,
    ) -> dict[str, float]:
        if len(scores) != 1:
            raise ValueError(f"scores of the target self have one row, got {len(scores)}")
        if watched is None:
            everything = np.arange(self.n_train)
            return fidelity(
                scores[0], truth.mu_margin, truth.ceiling, ~self.is_bad, truth.ceiling_clean
            ) | self._out_of_sample(scores[0], truth, everything)
        rows = np.asarray(watched)
        if len(rows) < LEAST_FOR_CORRELATION:
            return {}
        clean = ~self.is_bad[rows]
        return fidelity(
            scores[0, rows],
            truth.mu_margin[rows],
            self._ceiling(rows),
            clean,
            self._ceiling(rows[clean]),
        ) | self._out_of_sample(scores[0], truth, rows)

    def _out_of_sample(
        self, scores: NDArray[np.float64], truth: HalfTruth, rows: NDArray[np.int64]
    ) -> dict[str, float]:
        ceiling = self._ceiling(rows, "out_of_sample_margin")
        return out_of_sample_fidelity(scores[rows], truth.out_of_sample_margin[rows], ceiling)

    def _ceiling(self, rows: NDArray[np.int64], name: str = "mu_margin") -> float:
        """Ceiling of either half's array over some examples; the halves are equally long."""
        if len(rows) < LEAST_FOR_CORRELATION:
            return UNKNOWN
        one, other = (getattr(half, name)[rows] for half in (self.development, self.published))
        return ceiling_of(spearman(one, other))

    def _lds(
        self, scores: NDArray[np.float64], subsets: SubsetTruth, half: Half
    ) -> dict[str, float]:
        if len(scores) != self.n_query:
            raise ValueError(
                f"scores of the target queries have {len(scores)} rows; the truth {self.name} has "
                f"{self.n_query} queries, in the task's order"
            )
        own = subsets.of(half)
        found = lds(scores, subsets.members[own], subsets.margin[own])
        metrics = {
            "lds": found.mean,
            "lds_of_ceiling": found.mean / self.half(half).lds_ceiling,
        }
        if self.n_query > 1:
            low, high = interval_over_queries(found.per_query)
            metrics["lds_error"] = (high - low) / 2 if math.isfinite(found.mean) else UNKNOWN
        spread = outcome_spread(scores, subsets.spread(half))
        ceiling = spread_ceiling(*map(subsets.spread, HALVES))
        return metrics | {
            "outcome_spread": spread,
            "outcome_spread_of_ceiling": spread / ceiling,
        }
