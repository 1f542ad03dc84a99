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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import MIN_BATCH, uncertainty_weight
from fine_bench.fine.geometry import Euclidean, Whitened
from fine_bench.fine.geometry_optimiser import Preconditioned
from fine_bench.fine.gradient_queue import HeldSteps
from fine_bench.fine.micro_batches import window_weights
from fine_bench.fine.options import Options
from fine_bench.fine.passes import Passes, direction_from_state, direction_state, warn_of_gradients
from fine_bench.fine.step_queue import Kind, Step, StepBuffer, Steps
from fine_bench.fine.training_data import (
    batch_index,
    complement_from_logit_gradients,
    refuse_other_losses,
    refuse_repeats,
)
from fine_bench.gradients.blocks.stacking import stack_examples
from fine_bench.gradients.per_example import Direction, PerExampleGradients
from fine_bench.gradients.projection.sketch import Sketch
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.seeds import stream
from fine_bench.types import UnsupportedProblemError


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one backward pass told.

    Attributes:
        index: which training examples, ``(m_k,)``.
        gradients: as the pass has them; None in a step too short for a standard deviation.
        scale: what makes them those of each example's own loss.
        logit_gradients: of the loss at the logits, ``(m_k, classes)``, as the pass has them, where
            1 − p is needed.
        parts: into how many parts the step's gradient is divided, A · W.
    """

    index: Tensor
    gradients: PerExampleGradients | None
    scale: float
    logit_gradients: Tensor | None
    parts: int

    @property
    def complement(self) -> Tensor | None:
        """1 − p, ``(m_k,)``."""
        grad = self.logit_gradients
        return None if grad is None else complement_from_logit_gradients(grad) * self.scale


@dataclass(frozen=True, eq=False)
class Observation:
    """A step whose statistic is still to come.

    Attributes:
        window: what it is put together from.
        lr: η_t ρ of ``fine.micro_batches``.
        number: of the step, for reports.
        relative: see ``Step``.
    """

    window: list[MicroBatch]
    lr: float
    number: int
    relative: Tensor | None


class InBatch:
    """Observes the examples of every training step.

    Args:
        options: what to measure.
        passes: passes beside the training, for queries and curvature.
        recorder: taps the training pass.

    Attributes:
        n_without_backward: batches on which no backward pass ran (``training_step`` returned
            None); they train nothing and are not observed.
        n_without_memory: steps before which the optimiser remembered nothing, under
            ``preconditioner="optimiser"``.
    """

    def __init__(self, options: Options, passes: Passes, recorder: LayerRecorder) -> None:
        self.options = options
        self.passes = passes
        self.recorder = recorder
        self.accumulator = FineAccumulator(passes.data.n, passes.n_rows, options.composition)
        kind: Kind = "directions"
        if passes.queries is None:
            kind = "diagonal" if options.model_noise else "gram"
        if options.reference_columns is not None:
            kind = "columns"
        self._buffer = StepBuffer(self.accumulator, options.contrast, kind=kind)
        self._sketch = None if options.sketch is None else Sketch(options.sketch, options.seed)
        recorder.reduce = self._sketch
        self._held = HeldSteps()
        self._waiting: list[Observation] = []
        metric = passes.metric
        plain = isinstance(metric, Euclidean)
        plain = plain or (isinstance(metric, Preconditioned) and metric.plain)
        self._holds = plain and passes.processes.count == 1  # others differ from step to step
        self._index: Tensor | None = None
        self._window: list[MicroBatch] = []
        self._direction: Direction | None = None
        self._steps_seen = 0
        self._checked_epoch = -1
        self._passes_over = False
        self._warned = False
        self.n_without_backward = 0
        self.n_without_memory = 0

    @property
    def n_not_finite(self) -> int:
        """Steps left out because of NaN or infinite gradients."""
        self._settle()
        return self._buffer.n_not_finite

    def batch_starts(self, batch: Any, step: int, epoch: int) -> None:
        """Note who is in the batch and record its pass."""
        if self._index is not None:
            self.n_without_backward += 1
        index = batch_index(batch, self.accumulator.n_train, self.passes.data.adapter)
        # the epoch moves the pattern on, for loaders that do not shuffle
        self._passes_over = (step + epoch) % self.options.observe_every != 0
        if self._passes_over:
            self._index = None
            self.accumulator.pass_over(self.passes.processes.join(index))
            return
        self._index = index
        if self._sketch is not None:
            self._sketch.at_step(step)
        if self.passes.fit_if_due(step, epoch):
            self._direction = None  # it was a direction of the old geometry
        # 1 − p is read off the last layer's gradient, which is checked once an epoch
        self.recorder.keep_outputs = self.options.needs_complement and epoch != self._checked_epoch
        self.recorder.start(len(index))

    def backward_ends(self, epoch: int, *, accumulates: int = 1, loss_scale: float = 1.0) -> None:
        """The gradients of a micro-batch are there.

        Args:
            epoch: number of the epoch.
            accumulates: A of ``fine.micro_batches``; the loss was divided by it.
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
        m, gradients, logit_gradients = len(index), None, None
        n_processes = self.passes.processes.count
        scale = float(m * accumulates) / loss_scale
        if m >= MIN_BATCH or accumulates * n_processes > 1:
            gradients = PerExampleGradients(recorder.blocks(m))
            if self.options.needs_complement:
                logit_gradients = self._logit_gradients(epoch, scale)
        recorder.clear()
        self._window.append(
            MicroBatch(index, gradients, scale, logit_gradients, accumulates * n_processes)
        )

    def before_step(self, lr: float, step: int, epoch: int, *, taken: bool = True) -> None:
        """The step's gradient is complete and the parameters are still θ_t: observe.

        Args:
            lr: step size η_t.
            step: number of the step.
            epoch: number of the epoch.
            taken: whether the optimiser will take the step; 16-bit precision leaves steps out
                whose gradients are not finite.
        """
        window, self._window = self._window, []
        if not window:
            return  # nothing was trained on
        if not taken:
            self._buffer.leave_out(step)
            return
        numbers = self.passes.processes.numbers
        weights = window_weights(
            numbers([len(b.index) for b in window]), numbers([b.parts for b in window])
        )
        held = [b for b in window if b.gradients is not None]
        if weights.m < MIN_BATCH or len(held) < len(window):
            self.accumulator.skip_short_batch()
            return
        if not self.passes.ready():
            self.n_without_memory += 1
            return
        self._observe(Observation(window, lr * weights.rms, step, weights.relative))

    def batch_ends(self, step: int, epoch: int, *, epoch_ends: bool) -> None:
        """Nothing: the step was observed before it was taken."""

    def training_ends(self, step: int) -> None:
        """Nothing is left to do."""

    def flush(self) -> None:
        """Bring the sums up to date."""
        self._settle()
        buffer = self._buffer
        buffer.flush()
        if buffer.first_not_finite is not None and not self._warned:
            self._warned = True
            warn_of_gradients(f"at step {buffer.first_not_finite}", "this step")

    def close(self) -> None:
        """Remove every hook; the sums stay."""
        self.recorder.close()
        self.passes.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, but for the directions of single queries: too large."""
        self.flush()
        state: dict[str, Any] = {"accumulator": self.accumulator.state_dict()}
        if self._direction is not None and self.options.target != "queries":
            state["direction"] = direction_state(self._direction)
            state["steps_seen"] = self._steps_seen
        if isinstance(self.passes.metric, Whitened):
            state["metric"] = self.passes.metric.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        device = self.passes.data.device
        self.accumulator.load_state_dict(state["accumulator"])
        if "direction" in state:
            self._direction = direction_from_state(state["direction"], device)
            self._steps_seen = int(state["steps_seen"])
        if isinstance(self.passes.metric, Whitened):
            self.passes.metric.load_state_dict(state["metric"], device)

    def _union(self, window: list[MicroBatch]) -> tuple[Tensor, Tensor | None]:
        """Indices and 1 − p of the global batch, ``(m,)`` each.

        Raises:
            ValueError: an example stands in it twice.
        """
        processes = self.passes.processes
        index, complement = window[0].index, window[0].complement
        if len(window) > 1:
            index = torch.cat([b.index for b in window])
            if complement is not None:
                complement = torch.cat([b.complement for b in window if b.complement is not None])
        if processes.count > 1:
            index = processes.join(index)
            complement = None if complement is None else processes.join(complement)
        if processes.count > 1 or len(window) > 1:
            refuse_repeats(
                index,
                "the micro-batches of one optimiser step, of all processes together, repeat an "
                "example (a distributed sampler repeats some where examples do not divide evenly "
                "among processes; drop_last=True leaves them out)",
            )
        return index, complement

    def _together(self, window: list[MicroBatch]) -> tuple[PerExampleGradients, float]:
        """The gradients of this process's examples, and their scale."""
        parts = [(b.gradients, b.scale) for b in window if b.gradients is not None]
        if len(parts) == 1 and self.passes.processes.count == 1:
            return parts[0]
        return stack_examples([_scaled(gradients, scale) for gradients, scale in parts]), 1.0

    def _observe(self, observation: Observation) -> None:
        """Take the statistic of a step, now or with those of the next ones."""
        gradients, scale = self._together(observation.window)
        self._look_at_queries(gradients, scale)
        if self._holds and len(observation.window) == 1 and self._held.serves(gradients):
            if not self._held.add(gradients):
                self._settle()
                self._held.add(gradients)
            self._waiting.append(observation)
            if self._held.full:
                self._settle()
            return
        self._settle()
        index, complement = self._union(observation.window)
        weight = observation.lr
        if self.options.step_weight == "uncertainty":
            assert complement is not None
            weight = uncertainty_weight(weight, complement)
        self._buffer.add(
            Step(
                index,
                self._statistic(gradients, scale, index, observation.number),
                complement if self.options.divides else None,
                weight,
                observation.number,
                observation.relative,
                self._factor(scale),
            )
        )

    def _settle(self) -> None:
        """Take the statistics of the steps that wait."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        self._buffer.flush()
        batches = [o.window[0] for o in waiting]
        index = torch.stack([b.index for b in batches])
        statistics = self._statistics(self._held.take(), index, [o.number for o in waiting])
        scales = torch.tensor([b.scale for b in batches], dtype=torch.float64)
        weight = torch.tensor([o.lr for o in waiting], dtype=torch.float64)
        grads = [b.logit_gradients for b in batches if b.logit_gradients is not None]
        complement = None
        if grads:
            complement = complement_from_logit_gradients(torch.stack(grads))
            complement = complement * scales.to(complement)[:, None]
            if self.options.step_weight == "uncertainty":
                weight = weight * complement.double().mean(1).cpu()
        factor = torch.tensor([self._factor(b.scale) for b in batches], dtype=torch.float64)
        self._buffer.take(
            Steps(
                index,
                statistics,
                complement if self.options.divides else None,
                weight,
                factor,
                [o.number for o in waiting],
            )
        )

    def _statistics(
        self, gradients: PerExampleGradients, index: Tensor, numbers: list[int]
    ) -> Tensor:
        """What the buffer takes of S steps, but for its scale, ``(S, …)``.

        Args:
            gradients: of one step after the other, ``(S · m, …)``.
            index: ``(S, m)``.
            numbers: of the steps.
        """
        count = len(index)
        if self._direction is not None:
            rows = gradients.contract(self._direction)
            return rows.reshape(len(rows), count, -1).transpose(0, 1)
        if self.options.reference_columns is None:
            return gradients.grams(count)
        chosen = self._chosen(index, numbers)
        own = gradients.norm2().reshape(count, -1)
        columns = gradients.grams(count, chosen)
        return torch.cat([own[:, None], _mark(own, chosen), columns], 1)

    def _look_at_queries(self, gradients: PerExampleGradients, scale: float) -> None:
        """Compute the queries' directions, if it is time."""
        passes = self.passes
        if passes.queries is None:
            return
        if self._direction is None or self._steps_seen % self.options.refresh_every == 0:
            self._settle()  # what waits saw the old ones
            reference = passes.processes.gradients(_scaled(gradients, scale))
            with passes.aside():
                self._direction = passes.directions(reference)
        self._steps_seen += 1

    def _statistic(
        self, gradients: PerExampleGradients, scale: float, index: Tensor, number: int
    ) -> Tensor:
        """What the buffer takes of one step, but for its scale.

        Args:
            gradients: of the examples of this process, which lack the factor ``scale``.
            index: of the examples of all processes, ``(m,)``.
            number: of the step.
        """
        passes = self.passes
        if self._direction is not None:
            return passes.processes.join(gradients.contract(self._direction).T).T
        gradients = passes.processes.gradients(gradients)
        if self.options.model_noise:
            assert isinstance(passes.metric, Whitened)
            # its noise is a root of its statistic, so the scale cannot wait
            return torch.stack(passes.metric.own_and_total(gradients)) * scale**2
        if self.options.reference_columns is not None:
            chosen = self._chosen(index[None], [number])[0]
            own, columns = passes.metric.own_and_rows(gradients, chosen)
            return torch.cat([own[None], _mark(own, chosen), columns])
        return passes.metric.gram(gradients)

    def _factor(self, scale: float) -> float:
        """The scale of effects: of products of two gradients that lack it, or of one."""
        if self._direction is not None:
            return scale
        return 1.0 if self.options.model_noise else scale**2

    def _chosen(self, index: Tensor, numbers: list[int]) -> Tensor:
        """Which examples of each batch the others are compared with, ``(S, r)``.

        Args:
            index: ``(S, m)``.
            numbers: of the steps.
        """
        m, seed = index.shape[1], self.options.seed
        drawn = torch.stack(
            [
                torch.randperm(m, generator=stream(seed, f"fine/columns/step {number}"))
                for number in numbers
            ]
        )[:, : self.options.reference_columns]
        # among the examples by position: the draw does not depend on the order in the batch
        chosen = index.cpu().argsort(1).gather(1, drawn)
        return chosen.sort(1).values.to(index.device)

    def _logit_gradients(self, epoch: int, scale: float) -> Tensor:
        """The gradient at the output of the layer that ran last, looked at once an epoch."""
        call = self.recorder.calls[-1]
        assert call.grad is not None
        precise = call.grad.dtype not in (torch.bfloat16, torch.float16)
        plain = call.grad if precise else call.grad.float()
        # what is not finite is no reason to refuse: such a step is left out and reported
        if epoch != self._checked_epoch and bool(torch.isfinite(plain).all()):
            grad = plain * scale
            self._checked_epoch = epoch
            assert call.output is not None
            eps = torch.finfo(call.grad.dtype).eps
            if self.options.divides:
                refuse_other_losses(call.output, grad, eps=eps)
            else:
                option, instead = 'step_weight="uncertainty"', 'step_weight="lr"'
                refuse_other_losses(call.output, grad, option, instead, eps=eps)
        return plain


def _scaled(gradients: PerExampleGradients, scale: float) -> PerExampleGradients:
    values = gradients.blocks[0].values
    return gradients.scaled(values.new_full((len(gradients),), scale))


def _mark(own: Tensor, chosen: Tensor) -> Tensor:
    """One where an example is chosen ``(…, r)``, zero elsewhere, ``(…, 1, m)`` like ``own``."""
    return torch.zeros_like(own).scatter_(-1, chosen, 1.0).unsqueeze(-2)
