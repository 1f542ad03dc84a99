"""The options of f-INE's callback, checked at birth. Their meaning stands in ``FINECallback``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fine_bench.fine import Composition, Contrast, Noise, Observable, StepWeight, choose
from fine_bench.types import Loss, QueryWeighting, Reduce, Target, dataset_size
from fine_bench.watch.geometry import Euclidean, Geometry, Metric, Whitened
from fine_bench.watch.snapshot import MIN_REFERENCE
from fine_bench.weighting import check_weighting

ScheduleName: TypeAlias = Literal["in_batch", "snapshot"]

_REDUCE: dict[Target, Reduce] = {
    "queries": None,
    "validation": "mean",
    "validation_per_class": "class",
}


@dataclass(frozen=True, eq=False)
class Options:
    """One field for each argument of ``FINECallback``."""

    target: Target
    observable: Observable
    composition: Composition
    schedule: ScheduleName
    geometry: Geometry
    contrast: Contrast
    step_weight: StepWeight
    noise: Noise
    queries: Dataset[Any] | None
    query_weighting: QueryWeighting
    refresh_every: int
    every_n_steps: int | None
    n_snapshots: int | None
    n_reference: int
    watched: Sequence[int] | Tensor | None
    refit_every: int | None
    fit_examples: int
    relative_damping: float
    seed: int
    layers: Sequence[str] | None
    forward: Callable[[Any, Tensor], Tensor] | None
    loss: Loss

    def __post_init__(self) -> None:
        choose(self.target, Target, "target")
        choose(self.observable, Observable, "observable")
        choose(self.composition, Composition, "composition")
        choose(self.schedule, ScheduleName, "schedule")
        choose(self.geometry, Geometry, "geometry")
        choose(self.contrast, Contrast, "contrast")
        choose(self.step_weight, StepWeight, "step_weight")
        choose(self.noise, Noise, "noise")
        if self.noise == "model" and self.geometry != "ekfac":
            raise ValueError(
                f'noise="model" is the noise that geometry="ekfac" states, but geometry='
                f'{self.geometry!r}; use noise="sample"'
            )
        check_weighting(self.query_weighting)
        if self.step_weight != "lr" and self.composition != "accumulated":
            raise ValueError(
                f"step_weight={self.step_weight!r} weighs the steps of the accumulated μ, but "
                f"composition={self.composition!r} gives every step the same weight; use "
                'composition="accumulated" or step_weight="lr"'
            )
        if (self.queries is None) != (self.target == "self"):
            no = self.target == "self"
            raise ValueError(
                f"target={self.target!r} "
                + ("takes no queries; leave them out" if no else "needs queries=…")
            )
        if self.queries is not None:
            dataset_size(self.queries, "queries")
        self._check_schedule()
        for name, least in (
            ("refresh_every", 1),
            ("every_n_steps", 1),
            ("n_snapshots", 1),
            ("n_reference", MIN_REFERENCE),
            ("refit_every", 1),
            ("fit_examples", 2),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.relative_damping < float("inf"):
            raise ValueError(f"relative_damping must be a number > 0, got {self.relative_damping}")

    def _check_schedule(self) -> None:
        names = ("every_n_steps", "n_snapshots", "watched")
        given = [name for name in names if getattr(self, name) is not None]
        if self.schedule != "snapshot" and given:
            raise ValueError(
                f'{" and ".join(given)}: for schedule="snapshot" only, but schedule='
                f"{self.schedule!r}, where every example is scored when it is in the batch; leave "
                "out or change the schedule"
            )
        if self.every_n_steps is not None and self.n_snapshots is not None:
            raise ValueError("every_n_steps and n_snapshots both say when: give one of them")
        if self.watched is not None:
            positions_of(self.watched)

    @property
    def divides(self) -> bool:
        """Whether effects are divided by the example's own 1 − p."""
        return self.target == "self" and self.observable == "margin"

    @property
    def model_noise(self) -> bool:
        """Whether σ follows from the geometry: for other targets than self it states none."""
        return self.noise == "model" and self.target == "self"

    @property
    def needs_complement(self) -> bool:
        """Whether 1 − p is needed for anything."""
        return self.divides or self.step_weight == "uncertainty"

    @property
    def needs_engine(self) -> bool:
        """Whether there are gradients to take beside those of the training."""
        return not (
            self.target == "self" and self.schedule == "in_batch" and self.geometry == "euclidean"
        )

    @property
    def reduce(self) -> Reduce:
        """Rows of the scores, for targets with queries."""
        return _REDUCE[self.target]

    def metric(self) -> Metric:
        """The geometry."""
        if self.geometry == "euclidean":
            return Euclidean()
        return Whitened(
            self.loss,
            relative_damping=self.relative_damping,
            refit_every=self.refit_every,
            fit_examples=self.fit_examples,
            seed=self.seed,
        )

    def positions(self, n_train: int) -> Tensor | None:
        """The watched positions, ascending; None for all.

        Raises:
            ValueError: one lies outside of the training set.
        """
        if self.watched is None:
            return None
        positions = positions_of(self.watched)
        if int(positions[-1]) >= n_train:
            raise ValueError(
                f"watched names position {int(positions[-1])}, but there are {n_train} training "
                "examples, counted from 0"
            )
        return positions


def positions_of(watched: Sequence[int] | Tensor) -> Tensor:
    """Positions in the training set in ascending order, ``(k,)``.

    Raises:
        ValueError: no positions, or positions that repeat or are negative.
    """
    given = torch.as_tensor(watched)
    if given.ndim != 1 or not len(given) or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            "watched must be positions in the training set, integers (k,) with k ≥ 1, got "
            f"{given.dtype} of shape {tuple(given.shape)}"
        )
    positions = given.cpu().long().sort().values
    if int(positions[0]) < 0 or bool((positions.diff() == 0).any()):
        raise ValueError("watched must name each position once, counted from 0")
    return positions
