"""The schedule ``snapshot``, carried out: when to look, and what the model says then.

The formulas stand in ``fine_bench.fine.snapshot_accumulator``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fine_bench.fine.draws import Evenness
from fine_bench.fine.effects import (
    MIN_REFERENCE,
    margin_effects,
    reference_effects,
    whitened_effects,
)
from fine_bench.fine.example_labels import ExampleLabels, hard_labels
from fine_bench.fine.micro_batches import window_weights
from fine_bench.fine.observable import chosen, resumed
from fine_bench.fine.options import Options
from fine_bench.fine.passes import Passes, warn_of_gradients
from fine_bench.fine.snapshot_accumulator import SnapshotAccumulator, SnapshotInterval, SnapshotPlan
from fine_bench.fine.step_sizes import StepScaling, StepSizes
from fine_bench.fine.trained_parameters import NOTHING_TRAINS
from fine_bench.fine.window import Window
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.seeds import stream
from fine_bench.types import UnsupportedProblemError

READ_AT_ONCE = 256
"""Examples scored at a time. It changes memory, no score."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a snapshot found.

    Attributes:
        effect, sigma: ``(R, B)`` of the B watched examples.
        uncertainty: mean 1 − p of the reference examples; 1 where it is not asked for.
    """

    effect: Tensor
    sigma: Tensor
    uncertainty: float

    @property
    def finite(self) -> bool:
        """Whether it can be used."""
        numbers = torch.isfinite(self.effect).all() & torch.isfinite(self.sigma).all()
        return bool(numbers) and math.isfinite(self.uncertainty)


class SnapshotSchedule:
    """Scores the watched examples now and then, all at the same parameters.

    Args:
        options: what to measure, and when.
        passes: passes beside the training.
        total_steps: of the run; infinite if unknown.
        window: where micro-batches wait for their step: sizes, and parts of the step.
    """

    def __init__(
        self,
        options: Options,
        passes: Passes,
        total_steps: float,
        window: Window[tuple[int, float]] | None = None,
    ) -> None:
        n = passes.data.n
        if n < MIN_REFERENCE:
            raise ValueError(
                f"a snapshot needs at least {MIN_REFERENCE} training examples as its reference, "
                f"the training set has {n}"
            )
        self.options = options
        self.passes = passes
        self.plan = SnapshotPlan(options.every_n_steps, options.n_snapshots, total_steps)
        watched = options.positions(n)
        self.index = torch.arange(n) if watched is None else watched
        self.n_reference = min(options.n_reference, n)
        self.accumulator = self._new_accumulator(n, watched)
        self.n_not_finite = 0
        self._interval = SnapshotInterval()
        recorder, whole = passes.engine.recorder, options.geometry == "ekfac"
        self._scaling = StepScaling(recorder, whole_layers=whole)
        self._over_interval = StepScaling(recorder, whole_layers=whole)
        self._batch_size = 0
        self.window: Window[tuple[int, float]] = Window() if window is None else window
        self.labels = ExampleLabels(n)
        self._draws = Evenness(n)
        self.n_observed = 0
        self.n_without_backward = 0
        self._epoch = 0
        self._before_end: dict[str, Any] | None = None

    def _new_accumulator(self, n: int, watched: Tensor | None) -> SnapshotAccumulator:
        """The sums; those of another geometry are its own."""
        options = self.options
        return SnapshotAccumulator(
            n, self.passes.n_rows, options.composition, watched, options.group_errors
        )

    def batch_starts(self, batch: Any, step: int, epoch: int) -> None:
        """Note the size of the batch."""
        if self._batch_size:
            self.n_without_backward += 1
        adapter = self.passes.data.adapter
        self._batch_size = adapter.size(batch)
        self._draws.note(adapter.example_index(batch))

    def layers_change(self, *, in_pass: bool = False) -> None:
        """Other parameters are trained than before: those from now on, each for its own steps.

        Args:
            in_pass: whether a batch is on its way; here nothing depends on it.
        """
        recorder, interval = self.recorder, self._interval
        before = _parameter_names(recorder)
        self.passes.engine.watch()
        self.passes.watch(recorder)
        self._scaling.forget()
        if not interval.steps:
            return
        if not interval.by_parameter:
            interval.by_parameter = dict.fromkeys(before, interval.lr)
        for name in _parameter_names(recorder):
            interval.by_parameter.setdefault(name, 0.0)

    def backward_ends(self, epoch: int, *, accumulates: float = 1, loss_scale: float = 1.0) -> None:
        """The batch is part of the step."""
        if self._batch_size:
            size, parts = self._batch_size, accumulates * self.passes.processes.count
            self.window.add((size, parts), accumulates)
        self._batch_size = 0

    def before_step(self, sizes: StepSizes, step: int, epoch: int, *, taken: bool = True) -> None:
        """Note the step."""
        window = self.window.take()
        if window and taken and self._watches:
            self.n_observed += 1
            numbers = self.passes.processes.numbers
            sizes_of, parts = zip(*window, strict=True)
            weights = window_weights(numbers(sizes_of), numbers(parts))
            self._scaling.follow(sizes)
            relative = self._scaling.by_parameter or None
            self._interval.add(
                sizes.largest, weights.m, weights.mean, weights.rms, relative, sizes.carry
            )
            self._epoch = epoch

    def batch_ends(self, step: int, epoch: int, *, epoch_ends: bool) -> None:
        """Take a snapshot if it is time, after step number ``step``."""
        if self._interval.steps and self.plan.due(step, epoch_ends=epoch_ends):
            self._observe(step, epoch)

    def training_ends(self, step: int) -> None:
        """Steps after the last snapshot get one of their own."""
        if self._draws.uneven:
            warnings.warn(
                "some examples were drawn much more often than others, but a snapshot takes all as "
                'drawn equally often; schedule="in_batch" counts every draw',
                stacklevel=2,
            )
        if self._interval.steps:
            # a run that is prolonged from its last checkpoint goes on as if it had not ended
            self._before_end = self.state_dict()
            self._observe(step, self._epoch)

    def reason(self) -> str:
        """Why steps that were announced were not counted."""
        if not self._watches:
            return NOTHING_TRAINS
        if self.n_not_finite:
            return "gradients were NaN or infinite in every snapshot; lower the learning rate"
        return "no step was seen to be taken; 16-bit precision left all out, or they went around it"

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Remove every hook; the sums stay."""
        self.passes.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        if self._before_end is not None:
            return self._before_end
        state = {
            "accumulator": self.accumulator.state_dict(),
            "interval": asdict(self._interval),
            "labels": self.labels.known.clone(),
            "observable": self.observable,
        }
        if metric := self.passes.metric.state_dict():
            state["metric"] = metric
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        self.accumulator.load_state_dict(state["accumulator"])
        self._interval = SnapshotInterval(**state["interval"])
        self.options = resumed(self.options, state)
        if self.passes.queries is not None:
            self.passes.queries.resume(state)
        if "labels" in state:  # states of earlier versions have none
            self.labels.load(state["labels"])
        if "metric" in state:
            self.passes.metric.load_state_dict(state["metric"], self.passes.data.device)

    def draw_reference(self, step: int) -> Tensor:
        """Positions of the reference examples after a step, ascending, ``(r,)``."""
        generator = stream(self.options.seed, f"fine/reference/step {step}")
        order = torch.randperm(self.passes.data.n, generator=generator)
        return order[: self.n_reference].sort().values

    def _observe(self, step: int, epoch: int) -> None:
        self.passes.fit_if_due(step, epoch)
        self.passes.ready()
        with self.passes.aside():
            found = self.take(step)
        if found.finite:
            self.accumulator.observe_snapshot(
                self.index, found.effect, found.sigma, self._interval, found.uncertainty, epoch
            )
        else:
            if not self.n_not_finite:
                warn_of_gradients(f"in the snapshot after step {step}", "this snapshot")
            self.n_not_finite += 1
        self._interval = SnapshotInterval()

    def take(self, step: int) -> Snapshot:
        """Score at the present parameters, after ``step`` steps; to be called inside ``aside``.

        Raises:
            UnsupportedProblemError: 1 − p is needed and does not exist.
        """
        passes, options, scaled = self.passes, self.options, self._over_interval
        scaled.take(self._interval.relative)
        positions = self.draw_reference(step)
        reference = passes.gradients(*passes.data.read(positions))
        if options.needs_complement:
            self._require_complement(reference)
            options = self.options  # the observable may have been chosen now
        direction = at_reference = None
        if passes.queries is not None:
            direction = passes.directions(scaled(reference))
            at_reference = scaled(reference).contract(direction)
        reference_root = scaled(reference, 0.5)
        effects, sigmas = [], []
        for rows, x, y in passes.data.batches(self.index, READ_AT_ONCE):
            labels = hard_labels(y, len(self.index[rows]))
            if labels is not None and passes.data.adapter.losses is None:
                self.labels.note(self.index[rows], labels)
            gradients = passes.gradients(x, y)
            if direction is None or at_reference is None:
                root = scaled(gradients, 0.5)
                own = passes.metric.norm2(root)[None]
                others = passes.metric.gram(root, reference_root)[None]
            else:
                own, others = scaled(gradients).contract(direction), at_reference
            itself = torch.isin(self.index[rows], positions).to(y.device)
            effect, sigma = reference_effects(own, others, itself, options.contrast)
            if options.model_noise:
                variance = passes.metric.norm2(scaled(gradients))[None] if scaled else None
                _, sigma = whitened_effects(own, own, None, variance=variance)
            if options.divides:
                assert gradients.one_minus_p is not None
                effect, sigma = margin_effects(effect, sigma, gradients.one_minus_p)
            effects.append(effect.cpu())
            sigmas.append(sigma.cpu())
        uncertainty = 1.0
        if options.step_weight == "uncertainty":
            assert reference.one_minus_p is not None
            uncertainty = float(reference.one_minus_p.double().mean())
        return Snapshot(torch.cat(effects, 1), torch.cat(sigmas, 1), uncertainty)

    @property
    def observable(self) -> str:
        """What is measured, ``"margin"`` or ``"loss"``; empty as long as that is open."""
        queries = self.passes.queries
        return (self.options.observable if queries is None else queries.observable) or ""

    @property
    def recorder(self) -> LayerRecorder:
        """Of the layers that are scored."""
        return self.passes.engine.recorder

    @property
    def _watches(self) -> bool:
        """Whether any layer is trained of those that were asked for."""
        return bool(self.recorder.parameters())

    def _require_complement(self, gradients: PerExampleGradients) -> None:
        """Refuse a loss that is not −log p of a class label."""
        complement, loss = gradients.one_minus_p, gradients.loss
        if complement is not None and loss is not None:
            # what is not a number is no reason: such a snapshot is left out and counted
            wrong = (-torch.expm1(-loss) - complement).abs() > 1e-3
            if not bool(wrong.any()):
                if self.options.divides and self.options.observable is None:
                    self.options = chosen(self.options, "margin")
                return
        if self.options.divides and self.options.observable is None:
            self.options = chosen(self.options, "loss")
            if not self.options.needs_complement:
                return
        what = ("observable", "margin", "loss")
        if not self.options.divides:
            what = ("step_weight", "uncertainty", "lr")
        name, given, instead = what
        raise UnsupportedProblemError(
            f'{name}="{given}" needs the softmax cross-entropy, loss = −log p, of class logits '
            f"(batch, classes) and hard labels (batch,); the loss is another one. Use {name}="
            f'"{instead}"'
        )


def _parameter_names(recorder: LayerRecorder) -> list[str]:
    names = {id(p): name for name, p in recorder.model.named_parameters()}
    return [names[id(p)] for group in recorder.parameters().values() for p in group]
