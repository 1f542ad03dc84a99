"""The options of f-INE, declared once: names, types, defaults, meaning, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fine_bench.fine.batch_adapter import BatchAdapter
from fine_bench.fine.effects import (
    MIN_REFERENCE,
    Composition,
    Contrast,
    Noise,
    Observable,
    StepWeight,
    choose,
)
from fine_bench.fine.geometry import Geometry
from fine_bench.gradients.query_weighting import check_weighting
from fine_bench.types import (
    REDUCE,
    Loss,
    QueryWeighting,
    Reduce,
    Target,
    UnsupportedProblemError,
    dataset_size,
)

ScheduleName: TypeAlias = Literal["in_batch", "snapshot"]
Preconditioner: TypeAlias = Literal["optimiser"] | None
BatchNorm: TypeAlias = Literal["rows", "refuse"]


@dataclass(frozen=True, eq=False)
class Options:
    """What f-INE is to measure, when, and of which model.

    Args:
        target: ``"self"`` (how well the run memorised each example), ``"queries"`` (one row a
            query), ``"validation"`` (one row for the whole query set) or
            ``"validation_per_class"``.
        observable: ``"margin"``, h = −log(p/(1−p)), for softmax cross-entropy on the output of
            the last layer; or ``"loss"``. None: chosen by the loss of the first batch, the margin
            where it exists, and said in ``scores().observable`` (``fine_bench.fine.observable``).
        composition: ``"accumulated"``, ``"weighted"`` (each step in units of its own noise, times
            its weight) or ``"standardised"``; see ``fine_bench.fine.accumulator``.
        schedule: ``"in_batch"``: an example is observed when it is in the batch; ``"snapshot"``:
            all are scored at the same parameters, now and then
            (``fine_bench.fine.snapshot_accumulator``).
        geometry: ``"euclidean"`` or ``"ekfac"`` (``fine_bench.fine.geometry``); ``"kernel"``, the
            recommended one for queries, with ``schedule="snapshot"``: what a regression that
            stands for the average run says (``fine_bench.fine.kernel_scores``), for every target
            but ``self``. It weighs steps as ``step_weight="uncertainty"`` does, whatever that says.
        preconditioner: ``"optimiser"`` takes all products in the geometry in which the optimiser
            moves (``fine_bench.fine.geometry_optimiser``): Adam's and AdamW's second moments; none
            for SGD. None: the gradients as they are.
        contrast: ``"substitution"`` (against an average example) or ``"removal"``.
        step_weight: what a step counts in the accumulated or the weighted μ: ``"lr"``, η_t, or
            ``"uncertainty"``, η_t times the batch mean of 1 − p, for softmax cross-entropy.
        noise: where σ comes from: ``"sample"``, the reference examples; ``"model"``, for *self* in
            ``geometry="ekfac"``: the geometry states it, and estimating it from a few examples
            only adds noise. Other targets take the sample's.
        queries: dataset of ``(x, y)`` for every target but ``"self"``.
        query_weighting: how queries are weighted in a mean: ``"noise"`` (the spread of each
            query's statistic over the batch or the reference examples), ``"norm"`` or None.
        refresh_every: in-batch, observed steps between two computations of the queries' gradients,
            ≥ 1. A snapshot computes its own.
        every_n_steps: snapshots after every so many steps, ≥ 1.
        n_snapshots: so many snapshots, ≥ 1, equally spaced over the run. Without either of the
            two: one an epoch, at its end.
        n_reference: examples against which a snapshot compares, ≥ 3, drawn from the training set.
        reference_columns: for *self* in-batch: compare each example with so many examples of its
            batch, ≥ 3, drawn anew at every step, instead of with all the others. Cheaper, since
            the Gram matrix has so many columns only, and noisier.
        observe_every: in-batch: observe one step in so many, ≥ 1, a different one each epoch.
            Cheaper in that proportion, and noisier; the observed steps stand for the others, so
            that μ stays that of the whole run.
        sketch: for *self* in-batch: estimate products of gradients from so many random
            combinations of each layer's inputs and of its output gradients, ≥ 2, instead of taking
            them exactly (``fine_bench.gradients.projection.sketch``). Cheaper, and noisier, for
            layers that are applied at several positions of an example (tokens, pixels); others stay
            exact.
        watched: positions that snapshots score; None for all.
        refit_every: steps between two EK-FAC fits, ≥ 1, in snapshots rounded up to the next one;
            None for one an epoch (before its first step; in snapshots at the epoch's first).
        fit_examples: training examples in a fit, ≥ 2, drawn anew each time; all if there are fewer.
        relative_damping: λ of EK-FAC in units of each layer's mean eigenvalue, > 0.
        n_initialisations: fresh initialisations whose kernels stand for other runs', ≥ 0, in
            ``geometry="kernel"``; 0 for weights that were trained before.
        n_landmarks: training examples whose rows of the kernel are taken in
            ``geometry="kernel"``, ≥ 2: the regression follows from these and the queries' rows
            (``fine_bench.gradients.landmark_kernel``), at a cost that grows with n and not with n³;
            None for all.
        input_share: what a Gaussian kernel of the inputs, the same in every run, makes of the mean
            kernel of ``geometry="kernel"``, in [0, 1).
        errors: whether ``geometry="kernel"`` computes ``std_error``, by four more regressions.
        ridge: λ of ``geometry="kernel"`` in units of the kernel's mean diagonal, > 0; None takes
            gradient flow for as long as the run trained, or where SGD did not train it matches λ to
            how well the run fitted its labels.
        batch_norm: where layers normalise by their batch, ``"rows"`` takes in-batch for an
            example's gradient what its row contributes to the step
            (``fine_bench.gradients.batch_norm``), and says so when the run starts. Queries,
            curvature and snapshots use the running statistics. ``"refuse"`` refuses such a run.
        group_errors: keep each epoch's part in the error of every μ (16 bytes an epoch, row and
            example), from which the error of a group is measured (``fine_bench.metrics.groups``).
            For targets with queries and the accumulated μ of all steps.
        seed: of the draws of reference and fit examples; it touches no other random stream.
        layers: names of modules to watch; None for all.
        forward: ``forward(module, x) -> logits`` for passes of the callback's own; ``module(x)`` by
            default.
        loss: loss of these passes; must be the training loss, per example.
        train_size: number of training examples, where the training set cannot tell (an
            ``IterableDataset``) or the batches' index counts in a larger set; its length if None.
        adapter: where things are in batches of another make, and how to get per-example losses of
            modules of another make; see ``BatchAdapter``.

    Raises:
        UnsupportedProblemError: a sketch for another target than ``self``.
        ValueError: options that do not fit each other.
    """

    target: Target = "self"
    observable: Observable | None = None
    composition: Composition = "accumulated"
    schedule: ScheduleName = "in_batch"
    geometry: Geometry = "euclidean"
    _: KW_ONLY
    preconditioner: Preconditioner = None
    contrast: Contrast = "substitution"
    step_weight: StepWeight = "lr"
    noise: Noise = "sample"
    queries: Dataset[Any] | None = None
    query_weighting: QueryWeighting = "noise"
    refresh_every: int = 20
    every_n_steps: int | None = None
    n_snapshots: int | None = None
    n_reference: int = 64
    reference_columns: int | None = None
    observe_every: int = 1
    sketch: int | None = None
    watched: Sequence[int] | Tensor | None = None
    refit_every: int | None = None
    fit_examples: int = 2000
    relative_damping: float = 0.1
    n_initialisations: int = 16
    n_landmarks: int | None = None
    input_share: float = 0.0
    errors: bool = True
    ridge: float | None = None
    batch_norm: BatchNorm = "rows"
    group_errors: bool = False
    seed: int = 0
    layers: Sequence[str] | None = None
    forward: Callable[[Any, Tensor], Tensor] | None = None
    loss: Loss = F.cross_entropy
    adapter: BatchAdapter | None = None
    train_size: int | None = None

    def __post_init__(self) -> None:
        choose(self.target, Target, "target")
        if self.observable is not None:
            choose(self.observable, Observable, "observable")
        choose(self.composition, Composition, "composition")
        choose(self.schedule, ScheduleName, "schedule")
        choose(self.geometry, Geometry, "geometry")
        choose(self.contrast, Contrast, "contrast")
        choose(self.step_weight, StepWeight, "step_weight")
        choose(self.noise, Noise, "noise")
        choose(self.batch_norm, BatchNorm, "batch_norm")
        if self.preconditioner not in ("optimiser", None):
            raise ValueError(
                f'preconditioner must be "optimiser" or None, got {self.preconditioner!r}'
            )
        if self.preconditioner is not None and self.geometry != "euclidean":
            raise ValueError(
                f'preconditioner="optimiser" is a geometry of its own, but geometry='
                f'{self.geometry!r} is asked for too; use geometry="euclidean" or '
                "preconditioner=None"
            )
        if self.noise == "model" and self.geometry != "ekfac":
            raise ValueError(
                f'noise="model" is the noise that geometry="ekfac" states, but geometry='
                f'{self.geometry!r}; use noise="sample"'
            )
        check_weighting(self.query_weighting)
        if self.step_weight != "lr" and self.composition == "standardised":
            raise ValueError(
                f"step_weight={self.step_weight!r} weighs the steps of the accumulated or the "
                f"weighted μ, but composition={self.composition!r} gives every step the same "
                'weight; use composition="accumulated", composition="weighted" or step_weight="lr"'
            )
        check_queries(self.target, self.queries)
        self._check_group_errors()
        self._check_adapter()
        self._check_schedule()
        self._check_kernel()
        refuse_small(
            self,
            refresh_every=1,
            every_n_steps=1,
            n_snapshots=1,
            n_reference=MIN_REFERENCE,
            reference_columns=MIN_REFERENCE,
            observe_every=1,
            sketch=2,
            refit_every=1,
            fit_examples=2,
            train_size=1,
            n_initialisations=0,
            n_landmarks=2,
            seed=0,
        )
        if not 0 < self.relative_damping < float("inf"):
            raise ValueError(f"relative_damping must be a number > 0, got {self.relative_damping}")

    def _check_group_errors(self) -> None:
        wrong = None
        if self.target == "self":
            wrong = 'on target="self" members have observables of their own; use "validation"'
        elif self.composition != "accumulated":
            wrong = f"composition={self.composition!r} has no parts; use the accumulated one"
        elif self.geometry == "kernel":
            wrong = 'geometry="kernel" keeps no parts of epochs; leave it out there'
        elif self.observe_every != 1:
            wrong = (
                "observe_every > 1 sees the members of a group in different epochs; leave it at 1"
            )
        if self.group_errors and wrong is not None:
            raise ValueError(f"group_errors=True measures the error of a group's sum, but {wrong}")

    def _check_adapter(self) -> None:
        if self.adapter is None or self.adapter.losses is None:
            return
        if self.forward is not None or self.loss is not F.cross_entropy:
            raise ValueError(
                "the adapter's losses(module, batch) says how to get losses; leave out forward=… "
                "and loss=…"
            )
        if self.needs_engine and self.observable == "margin":
            raise ValueError(
                'observable="margin" needs class logits, but the adapter gives losses only; use '
                'observable="loss", or BatchAdapter(x=…, y=…) with forward=… and loss=…'
            )
        if self.geometry != "euclidean":
            raise ValueError(
                f'geometry="{self.geometry}" needs class logits, but the adapter gives losses '
                'only; use geometry="euclidean", or BatchAdapter(x=…, y=…) with forward=… and '
                "loss=…"
            )
        if self.target == "validation_per_class" and self.adapter.y is None:
            raise ValueError(
                'target="validation_per_class" needs the labels of the queries: BatchAdapter(y=…)'
            )

    def _check_schedule(self) -> None:
        names = ("every_n_steps", "n_snapshots", "watched")
        given = [name for name in names if getattr(self, name) is not None]
        if self.schedule != "snapshot" and given:
            raise ValueError(
                f'{" and ".join(given)}: for schedule="snapshot" only, but schedule='
                f"{self.schedule!r}, where every example is scored when it is in the batch; leave "
                "out or change the schedule"
            )
        if self.reference_columns is not None:
            self._check_columns()
        if self.sketch is not None:
            self._check_sketch()
        if self.observe_every != 1 and self.schedule != "in_batch":
            raise ValueError(
                f"observe_every={self.observe_every} thins out the steps that are observed "
                f"in-batch, but schedule={self.schedule!r}; use every_n_steps=… or n_snapshots=…"
            )
        if self.every_n_steps is not None and self.n_snapshots is not None:
            raise ValueError("every_n_steps and n_snapshots both say when: give one of them")
        if self.watched is not None:
            positions_of(self.watched)

    def _check_kernel(self) -> None:
        if self.ridge is not None and not 0 < self.ridge < float("inf"):
            raise ValueError(f"ridge must be a finite number > 0 or None, got {self.ridge}")
        if not 0 <= self.input_share < 1:
            raise ValueError(f"input_share must be in [0, 1), got {self.input_share}")
        if self.geometry != "kernel":
            usual = {"ridge": None, "n_landmarks": None, "input_share": 0.0, "errors": True}
            for name, value in usual.items():
                if (given := getattr(self, name)) != value:
                    raise ValueError(
                        f'{name}={given} is that of geometry="kernel", but geometry='
                        f"{self.geometry!r}; leave it out"
                    )
            return
        if self.target == "self":
            raise UnsupportedProblemError(
                'geometry="kernel" says what trained a prediction, and target="self" asks about no '
                'query; use geometry="euclidean" or "ekfac" for self'
            )
        wrong = None
        if self.schedule != "snapshot":
            wrong = f'schedule={self.schedule!r}; use schedule="snapshot"'
        elif self.composition != "accumulated":
            wrong = f'composition={self.composition!r}; use composition="accumulated"'
        elif self.watched is not None:
            wrong = "watched=…, and its regression is on all examples; leave that out"
        if wrong is not None:
            raise ValueError(f'geometry="kernel" reads the run at snapshots, but got {wrong}')

    def _check_columns(self) -> None:
        wrong = None
        if self.schedule != "in_batch":
            wrong = f"schedule={self.schedule!r} has n_reference=… for that"
        elif self.target != "self":
            wrong = f"target={self.target!r} has no Gram matrix"
        elif self.noise == "model":
            wrong = 'noise="model" takes no noise from them'
        if wrong is not None:
            raise ValueError(
                f"reference_columns={self.reference_columns} chooses columns of the Gram matrix "
                f"of a batch, for the target self; but {wrong}: leave it out"
            )

    def _check_sketch(self) -> None:
        if self.target != "self":
            raise UnsupportedProblemError(
                f"sketch={self.sketch} serves the target self only: for target={self.target!r} "
                "products of gradients are small beside the gradients, and a sketch's error is "
                "not; use refresh_every=… or observe_every=…"
            )
        wrong = None
        if self.schedule != "in_batch":
            wrong = f"schedule={self.schedule!r} takes few passes and exact products"
        elif self.geometry != "euclidean" or self.preconditioner is not None:
            wrong = "other geometries than the Euclidean one weigh the gradients' own coordinates"
        if wrong is not None:
            raise ValueError(
                f"sketch={self.sketch} estimates the Gram matrix of a batch, but {wrong}: leave "
                "it out"
            )

    @property
    def divides(self) -> bool:
        """Whether effects are divided by the example's own 1 − p, as far as is known."""
        return self.target == "self" and self.observable != "loss"

    @property
    def model_noise(self) -> bool:
        """Whether σ follows from the geometry: for other targets than self it states none."""
        return self.noise == "model" and self.target == "self"

    @property
    def needs_complement(self) -> bool:
        """Whether 1 − p is needed for anything."""
        return self.divides or self.step_weight == "uncertainty"

    @property
    def says_loss(self) -> bool:
        """Whether it is said how to get losses, instead of left at the default."""
        adapted = self.adapter is not None and self.adapter.losses is not None
        return adapted or self.forward is not None or self.loss is not F.cross_entropy

    @property
    def needs_engine(self) -> bool:
        """Whether there are gradients to take beside those of the training."""
        return not (
            self.target == "self" and self.schedule == "in_batch" and self.geometry == "euclidean"
        )

    @property
    def reduce(self) -> Reduce:
        """Rows of the scores, for targets with queries."""
        return REDUCE[self.target]

    def passes(self) -> tuple[Callable[[Any, Any], Tensor], Loss]:
        """``forward(module, x)`` and ``loss(output, y, reduction)`` of the callback's passes."""
        if self.adapter is not None and self.adapter.losses is not None:
            return self.adapter.losses, _as_they_are
        return self.forward or (lambda module, x: module(x)), self.loss

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


def check_queries(target: Target, queries: Dataset[Any] | None) -> None:
    """Refuse queries for the target ``self``, and other targets without any.

    Raises:
        ValueError: with what to do instead.
    """
    if (queries is None) != (target == "self"):
        no = target == "self"
        raise ValueError(
            f"target={target!r} "
            + ("takes no queries; leave them out" if no else "needs queries=…")
        )
    if queries is not None:
        dataset_size(queries, "queries")


def refuse_small(options: object, **least: int) -> None:
    """Refuse options below the least value that they may have; None passes.

    Raises:
        ValueError: with the first of them.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")


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


def _as_they_are(losses: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """The loss of passes that return losses themselves."""
    return losses
