"""The schedule ``in_batch``: an example is observed when it is in the batch.

The training's own forward and backward pass hold each layer's input and output gradient; effects
and noise follow from them by the formulas of ``fine_bench.fine.accumulator``. Where a step is put
together from several micro-batches (``fine_bench.fine.micro_batches``), their gradients are held
until the step, and the batch of the formulas is their union: the scores are those of one large
batch.

The pass holds gradients of the batch's mean loss, ∇ℓ_i/m. The factor m that makes them those of
each example's own loss is left to the products: it is one number a product instead of one for each
number of a gradient. Small steps wait for each other (``fine_bench.fine.gradient_queue``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.draws import Draws, observe_rows, repeats
from fine_bench.fine.effects import MIN_BATCH, uncertainty_weight
from fine_bench.fine.example_labels import ExampleLabels, hard_labels
from fine_bench.fine.gradient_queue import GradientQueue
from fine_bench.fine.head_gradients import HeadGradients
from fine_bench.fine.micro_batches import GlobalBatch, MicroBatch, window_weights
from fine_bench.fine.observable import resumed
from fine_bench.fine.options import Options
from fine_bench.fine.passes import Passes, direction_from_state, direction_state, warn_of_gradients
from fine_bench.fine.short_steps import ShortSteps
from fine_bench.fine.statistic import Statistic
from fine_bench.fine.step_queue import StackedSteps, Step, StepQueue
from fine_bench.fine.step_sizes import StepScaling, StepSizes
from fine_bench.fine.trained_parameters import NOTHING_TRAINS
from fine_bench.fine.training_data import (
    batch_index,
    complement_from_logit_gradients,
)
from fine_bench.fine.window import Window
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.projection.sketch import Sketch
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import UnsupportedProblemError


class InBatchSchedule:
    """Observes the examples of every training step.

    Args:
        options: what to measure.
        passes: passes beside the training, for queries and curvature.
        recorder: taps the training pass.
        window: where micro-batches wait for their step.

    Attributes:
        draws: notices examples that are drawn with replacement.
        n_observed: steps observed in this process.
        n_without_backward: batches on which no backward pass ran (``training_step`` returned
            None); they train nothing and are not observed.
        n_without_memory: steps before which the optimiser remembered nothing, under
            ``preconditioner="optimiser"``.
    """

    def __init__(
        self,
        options: Options,
        passes: Passes,
        recorder: LayerRecorder,
        window: Window[MicroBatch] | None = None,
    ) -> None:
        self.passes = passes
        self.recorder = recorder
        self.accumulator = FineAccumulator(
            passes.data.n, passes.n_rows, options.composition, options.group_errors
        )
        self._scaling = StepScaling(recorder, whole_layers=options.geometry == "ekfac")
        self._statistic = Statistic(options, passes, self._scaling)
        self._steps = StepQueue(self.accumulator, options.contrast, kind=self._statistic.kind)
        self._sketch = None if options.sketch is None else Sketch(options.sketch, options.seed)
        recorder.reduce = self._sketch
        self._gradients = GradientQueue()
        self._waiting: list[GlobalBatch] = []  # whose gradients are in that queue
        # other geometries differ from step to step
        self._may_queue = passes.metric.plain and passes.processes.count == 1
        self._index: Tensor | None = None
        self._repeats = False  # whether an example stands in that batch twice
        self.window: Window[MicroBatch] = Window() if window is None else window
        self.labels = ExampleLabels(passes.data.n)
        self.draws, self._short = Draws(self.accumulator), ShortSteps(self.accumulator)
        self._batch_labels: Tensor | None = None
        self._first_epoch: int | None = None
        self._labelled_epoch = -1
        self._head = HeadGradients(options, self.labels)
        self.n_observed = 0
        self._passes_over = False
        self._left_out = False
        self._warned = False
        self.n_without_backward = 0
        self.n_without_memory = 0

    @property
    def options(self) -> Options:
        """What is measured; the first batch may choose the observable."""
        return self._head.options

    def ends_are(self, names: Sequence[str]) -> None:
        """Hear of which layers' outputs the loss is made, from somebody who has seen its graph."""
        self._head.ends_of_loss = names

    @property
    def observable(self) -> str:
        """What is measured, ``"margin"`` or ``"loss"``; empty as long as that is open."""
        queries = self.passes.queries
        return (self.options.observable if queries is None else queries.observable) or ""

    @property
    def n_not_finite(self) -> int:
        """Steps left out because of NaN or infinite gradients."""
        self._settle()
        return self._steps.n_not_finite

    def batch_starts(self, batch: Any, step: int, epoch: int) -> None:
        """Note who is in the batch and record its pass."""
        if self._index is not None:
            self.n_without_backward += 1
        index, self._repeats = batch_index(
            batch, self.accumulator.n_train, self.passes.data.adapter
        )
        if self.passes.processes.count == 1:
            self.draws.later(index, epoch)
        self._note_labels(batch, index, epoch)
        # the epoch moves the pattern on, for loaders that do not shuffle
        if not self.recorder.trains:  # none is trained any more
            self._passes_over, self._index = True, None
            return
        self._passes_over = (step + epoch) % self.options.observe_every != 0
        if self._passes_over:
            self._index = None
            self.accumulator.pass_over(self.passes.processes.join(index))
            return
        self._index = index
        if self._sketch is not None:
            self._sketch.at_step(step)
        if self.passes.fit_if_due(step, epoch):
            self._statistic.direction = None  # it was a direction of the old geometry
        # 1 − p is read off the last layer's gradient, which is checked once an epoch
        self.recorder.keep_outputs = self._head.looks(epoch) and (
            self.options.needs_complement or self._batch_labels is not None
        )
        self.recorder.start(len(index))

    def layers_change(self, *, in_pass: bool = False) -> None:
        """Other parameters are trained than before: watch them from now on.

        Args:
            in_pass: whether a batch is on its way; its step is left out, since nobody knows which
                layers the pass went through. So is one that has micro-batches of before.
        """
        self._settle()
        if in_pass or self.window.waits:
            self._left_out = True
        self.recorder.watch(required=False)
        self.passes.watch(self.recorder)
        self._statistic.direction = None
        self._scaling.forget()

    def backward_ends(self, epoch: int, *, accumulates: float = 1, loss_scale: float = 1.0) -> None:
        """The gradients of a micro-batch are there.

        Args:
            epoch: number of the epoch.
            accumulates: A of ``fine.micro_batches``; the loss was divided by it (a whole number,
                unless the division is by something else than examples, such as tokens).
            loss_scale: further factor on the loss, of 16-bit precision.

        Raises:
            UnsupportedProblemError: it was the second backward pass of a batch.
        """
        index, recorder = self._index, self.recorder
        if self._passes_over:
            return
        if index is None:
            raise UnsupportedProblemError(
                "there was more than one backward pass on one batch (an optimiser that evaluates "
                "the loss several times a step, such as LBFGS, or manual optimisation with "
                "several losses), so the gradient of one example's loss is not in any of them; "
                "use an optimiser that takes one gradient a step, and add losses up before one "
                "backward pass"
            )
        recorder.stop()
        self._index = None
        if self._left_out:
            recorder.clear()
            self.window.add(MicroBatch(index, None, 1.0, None, 1), accumulates)
            return
        m, gradients, logit_gradients = len(index), None, None
        n_processes = self.passes.processes.count
        scale = float(m * accumulates) / loss_scale
        if m >= MIN_BATCH or accumulates * n_processes > 1:
            gradients = PerExampleGradients(recorder.blocks(m))
            if self.options.divides and self.options.observable is None:
                self._settle()  # the observable may be chosen now
            logit_gradients = self._head.look(recorder, epoch, scale, self._batch_labels)
        recorder.clear()
        parts = accumulates * n_processes
        part = MicroBatch(index, gradients, scale, logit_gradients, parts, self._repeats)
        self.window.add(part, accumulates)

    def before_step(self, sizes: StepSizes, step: int, epoch: int, *, taken: bool = True) -> None:
        """The step's gradient is complete and the parameters are still θ_t: observe.

        Args:
            sizes: step sizes η_t of the optimiser's parameter groups.
            step: number of the step.
            epoch: number of the epoch.
            taken: whether the optimiser will take the step; 16-bit precision leaves steps out
                whose gradients are not finite.
        """
        window = self.window.take()
        if not window:
            return  # nothing was trained on
        if self._left_out:
            self._left_out = False
            warnings.warn(
                f"layers were frozen or let go of while step {step} was on its way; it is left out "
                "of the f-INE scores. Do so between two steps, for instance when an epoch starts",
                stacklevel=2,
            )
            return
        if not taken:
            self._steps.leave_out(step)
            return
        numbers = self.passes.processes.numbers
        weights = window_weights(
            numbers([len(b.index) for b in window]), numbers([b.parts for b in window])
        )
        held = [b for b in window if b.gradients is not None]
        if weights.m < MIN_BATCH or len(held) < len(window):
            self._short.leave_out(torch.cat([b.index for b in window]), step)
            return
        if not self.passes.ready():
            self.n_without_memory += 1
            return
        self.n_observed += 1
        if self._scaling.changes(sizes):
            self._settle()  # what waits has the old ones
            self._scaling.follow(sizes)
        batch = GlobalBatch(window, sizes.largest * weights.rms, step, weights.relative)
        self._observe(batch, epoch)

    def reason(self) -> str:
        """Why steps that were announced were not observed; empty where they were passed over."""
        if not self.recorder.trains:
            return NOTHING_TRAINS
        if self._steps.n_not_finite:
            return "gradients were NaN or infinite at every step; lower the learning rate"
        if self.accumulator.n_short_batches:
            return f"every step had fewer than {MIN_BATCH} examples; use larger batches"
        if self.n_without_memory:
            return (
                'the optimiser remembered nothing before any step, so preconditioner="optimiser" '
                "has nothing to read; leave it out, or use an optimiser that keeps second moments"
            )
        return ""

    def batch_ends(self, step: int, epoch: int, *, epoch_ends: bool) -> None:
        """Nothing: the step was observed before it was taken."""

    def training_ends(self, step: int) -> None:
        """Say what was never observed."""
        self._settle()
        self._steps.flush()
        self._short.training_ends()

    def flush(self) -> None:
        """Bring the sums up to date."""
        self._settle()
        self._steps.flush()
        first = self._steps.first_not_finite
        if first is not None and not self._warned:
            self._warned = True
            warn_of_gradients(f"at step {first}", "this step")

    def close(self) -> None:
        """Remove every hook; the sums stay."""
        self.recorder.close()
        self.passes.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, but for the directions of single queries: too large."""
        self.flush()
        state: dict[str, Any] = {
            "accumulator": self.accumulator.state_dict(),
            "labels": self.labels.known.clone(),
        }
        statistic = self._statistic
        if statistic.direction is not None and self.options.target != "queries":
            state["direction"] = direction_state(statistic.direction)
            state["steps_seen"] = statistic.steps_seen
        state["layers"] = list(self.recorder.parameters())
        state["observable"] = self.observable
        if metric := self.passes.metric.state_dict():
            state["metric"] = metric
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        device = self.passes.data.device
        self.accumulator.load_state_dict(state["accumulator"])
        if "labels" in state:  # states of earlier versions have none
            self.labels.load(state["labels"])
        now = list(self.recorder.parameters())
        self._head.options = resumed(self.options, state)
        if self.passes.queries is not None:
            self.passes.queries.resume(state)
        if state.get("layers", now) != now:
            return  # what was computed for other layers is computed anew
        if "direction" in state:
            self._statistic.direction = direction_from_state(state["direction"], device)
            self._statistic.steps_seen = int(state["steps_seen"])
        if "metric" in state:
            self.passes.metric.load_state_dict(state["metric"], device)

    def _observe(self, batch: GlobalBatch, epoch: int) -> None:
        """Take the statistic of a step, now or with those of the next ones."""
        processes, statistic, queue = self.passes.processes, self._statistic, self._gradients
        gradients, scale = batch.gradients(processes, for_gram=statistic.only_gram)
        gradients = statistic.scaled(gradients)
        if self.passes.queries is not None:
            if statistic.needs_directions:
                self._settle()  # what waits saw the old ones
                statistic.renew_directions(gradients, scale)
            statistic.steps_seen += 1
        alone = len(batch.parts) == 1 and not batch.parts[0].repeats
        if self._may_queue and alone and queue.serves(gradients):
            if not queue.add(gradients):
                self._settle()
                queue.add(gradients)
            self._waiting.append(batch)
            if queue.full:
                self._settle()
            return
        self._settle()
        index, complement = batch.index_and_complement(processes)
        weight = batch.lr
        if self.options.step_weight == "uncertainty":
            assert complement is not None
            weight = uncertainty_weight(weight, complement)
        if processes.count > 1:
            self.draws.note(index, epoch)
        divisor = complement if self.options.divides else None
        if repeats(index):
            if len(set(index.tolist())) < MIN_BATCH:
                self._short.leave_out(index, batch.number)
                return
            rows, contrast = statistic.of_rows(gradients, scale), self.options.contrast
            alone = self.passes.queries is None
            if not observe_rows(
                self.accumulator, batch, index, rows, divisor, weight, contrast, gram=alone
            ):
                self._steps.leave_out(batch.number)
            return
        self._steps.add(
            Step(
                index,
                statistic.of_step(gradients, scale, index, batch.number),
                divisor,
                weight,
                batch.number,
                batch.relative,
                statistic.factor(scale),
            )
        )

    def _settle(self) -> None:
        """Take the statistics of the steps that wait, and what was noted of their batches."""
        self.draws.settle()
        self.labels.settle()
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        self._steps.flush()
        batches = [b.parts[0] for b in waiting]
        index = torch.stack([b.index for b in batches])
        numbers = [b.number for b in waiting]
        statistics = self._statistic.of_steps(self._gradients.take(), index, numbers)
        scales = torch.tensor([b.scale for b in batches], dtype=torch.float64)
        weight = torch.tensor([b.lr for b in waiting], dtype=torch.float64)
        grads = [b.logit_gradients for b in batches if b.logit_gradients is not None]
        complement = None
        if grads:
            complement = complement_from_logit_gradients(torch.stack(grads))
            complement = complement * scales.to(complement)[:, None]
            if self.options.step_weight == "uncertainty":
                weight = weight * complement.double().mean(1).cpu()
        factors = [self._statistic.factor(b.scale) for b in batches]
        self._steps.take(
            StackedSteps(
                index,
                statistics,
                complement if self.options.divides else None,
                weight,
                torch.tensor(factors, dtype=torch.float64),
                numbers,
            )
        )

    def _note_labels(self, batch: Any, index: Tensor, epoch: int) -> None:
        """Compare labels: of every batch in the first epoch, then of one batch an epoch."""
        self._batch_labels = None
        adapter = self.passes.data.adapter
        if self._first_epoch is None:
            self._first_epoch = epoch
        if self._labelled_epoch == epoch != self._first_epoch:
            return
        self._labelled_epoch = epoch
        labels = hard_labels(adapter.label(batch), len(index))
        if labels is not None:
            self.labels.later(index, labels)
            self._batch_labels = labels
