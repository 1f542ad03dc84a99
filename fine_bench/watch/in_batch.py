"""The schedule ``in_batch``: an example is observed when it is in the batch.

The training's own forward and backward pass hold each layer's input and output gradient; effects
and noise follow from them by the formulas of ``fine_bench.fine``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fine_bench.fine import (
    MIN_BATCH,
    Contrast,
    FineAccumulator,
    direction_effects,
    self_effects,
    uncertainty_weight,
    whitened_effects,
)
from fine_bench.gradients.blocks import Direction, PerExampleGradients
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.watch.batches import (
    batch_index,
    complement_from_logit_gradients,
    refuse_other_losses,
)
from fine_bench.watch.geometry import Whitened
from fine_bench.watch.options import Options
from fine_bench.watch.passes import (
    Passes,
    direction_from_state,
    direction_state,
    warn_of_gradients,
)

Kind: TypeAlias = Literal["gram", "diagonal", "directions"]


class StepBuffer:
    """Collects the statistics of a few steps and turns them into effects together.

    A step's statistics are a few thousand numbers, for which the fixed cost of a dozen tensor
    operations is several times that of the arithmetic. Handling ``capacity`` steps in one go makes
    watching cheap; what is accumulated is the same, to the last rounding of float64.

    Args:
        accumulator: where the effects go.
        contrast: see ``self_effects``.
        kind: what a step's statistic is: a Gram matrix (target ``self``, one row), its diagonal
            and row sums (the same, where the geometry states the noise), or the products with R
            directions.
        capacity: steps held back at most.

    Attributes:
        n_not_finite, first_not_finite: steps left out because of NaN or infinite gradients, and
            the first of them.
    """

    def __init__(
        self,
        accumulator: FineAccumulator,
        contrast: Contrast,
        *,
        kind: Kind,
        capacity: int = 32,
    ) -> None:
        self.accumulator = accumulator
        self.contrast: Contrast = contrast
        self.kind: Kind = kind
        self.capacity = capacity
        self.n_not_finite = 0
        self.first_not_finite: int | None = None
        self._steps: list[tuple[Tensor, Tensor, Tensor | None, float, int]] = []

    def add(
        self, index: Tensor, statistic: Tensor, one_minus_p: Tensor | None, lr: float, step: int
    ) -> None:
        """Take in one step.

        Args:
            index: which training examples, ``(m,)``.
            statistic: the Gram matrix ``(m, m)``, its diagonal and row sums ``(2, m)``, or the
                products with R directions ``(R, m)``.
            one_minus_p: as in ``self_effects``; None for directions.
            lr: step size η_t, or the step's weight w_t.
            step: number of the step, for reports.
        """
        if self._steps and self._steps[-1][1].shape != statistic.shape:
            self.flush()
        self._steps.append((index, statistic, one_minus_p, lr, step))
        # many rows are large enough to pay for themselves
        if len(self._steps) >= self.capacity or statistic.numel() * len(self._steps) > 2**20:
            self.flush()

    def flush(self) -> None:
        """Hand everything collected to the accumulator."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        index = torch.stack([s[0].cpu() for s in steps])
        statistic = torch.stack([s[1] for s in steps])
        lr = torch.tensor([s[3] for s in steps], dtype=torch.float64)
        if self.kind == "directions":
            effect, sigma = direction_effects(statistic, self.contrast)
        else:
            complements = [s[2] for s in steps if s[2] is not None]
            complement = torch.stack(complements) if complements else None
            if self.kind == "gram":
                effect, sigma = self_effects(statistic, complement, self.contrast)
            else:
                own, total = statistic.unbind(1)
                effect, sigma = whitened_effects(own, total, complement, self.contrast)
            effect, sigma = effect[:, None], sigma[:, None]
        finite = (torch.isfinite(effect) & torch.isfinite(sigma)).flatten(1).all(1).cpu()
        if not bool(finite.all()):
            if self.first_not_finite is None:
                self.first_not_finite = steps[int((~finite).nonzero()[0])][4]
            self.n_not_finite += int((~finite).sum())
            index, effect, sigma, lr = index[finite], effect[finite], sigma[finite], lr[finite]
            if not len(index):
                return
        self.accumulator.observe_steps(index, effect, sigma, lr)


class InBatch:
    """Observes the examples of every training step.

    Args:
        options: what to measure.
        passes: passes beside the training, for queries and curvature.
        recorder: taps the training pass.
    """

    def __init__(self, options: Options, passes: Passes, recorder: LayerRecorder) -> None:
        self.options = options
        self.passes = passes
        self.recorder = recorder
        self.accumulator = FineAccumulator(passes.data.n, passes.n_rows, options.composition)
        kind: Kind = "directions"
        if passes.queries is None:
            kind = "diagonal" if options.model_noise else "gram"
        self._buffer = StepBuffer(self.accumulator, options.contrast, kind=kind)
        self._index: Tensor | None = None
        self._direction: Direction | None = None
        self._steps_seen = 0
        self._checked_epoch = -1

    @property
    def n_not_finite(self) -> int:
        """Steps left out because of NaN or infinite gradients."""
        return self._buffer.n_not_finite

    def batch_starts(self, batch: Any, step: int, epoch: int) -> None:
        """Note who is in the batch and record its pass."""
        self._index = batch_index(batch, self.accumulator.n_train)
        if self.passes.fit_if_due(step, epoch):
            self._direction = None  # it was a direction of the old geometry
        # 1 − p is read off the last layer's gradient, which is checked once an epoch
        self.recorder.keep_outputs = self.options.needs_complement and epoch != self._checked_epoch
        self.recorder.start()

    def before_step(self, lr: float, step: int, epoch: int) -> None:
        """The backward pass is done and the parameters are still θ_t: observe."""
        index, recorder = self._index, self.recorder
        if index is None:
            return
        recorder.stop()
        m = len(index)
        if m < MIN_BATCH:
            self.accumulator.skip_short_batch()
        else:
            gradients = PerExampleGradients(recorder.blocks(m, scale=float(m)))
            complement = self._complement(epoch) if self.options.needs_complement else None
            statistic = self._statistic(gradients)
            if self.options.step_weight == "uncertainty":
                assert complement is not None
                lr = uncertainty_weight(lr, complement)
            divisor = complement if self.options.divides else None
            self._buffer.add(index, statistic, divisor, lr, step)
        recorder.clear()
        self._index = None

    def batch_ends(self, step: int, epoch: int, *, epoch_ends: bool) -> None:
        """Nothing: the step was observed before it was taken."""

    def training_ends(self, step: int) -> None:
        """Nothing is left to do."""

    def flush(self) -> None:
        """Bring the sums up to date."""
        buffer = self._buffer
        known = buffer.first_not_finite is not None
        buffer.flush()
        if buffer.first_not_finite is not None and not known:
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

    def _statistic(self, gradients: PerExampleGradients) -> Tensor:
        """What the buffer takes."""
        passes = self.passes
        if passes.queries is None:
            if self.options.model_noise:
                assert isinstance(passes.metric, Whitened)
                return torch.stack(passes.metric.own_and_total(gradients))
            return passes.metric.gram(gradients)
        if self._direction is None or self._steps_seen % self.options.refresh_every == 0:
            with passes.aside():
                self._direction = passes.directions(gradients)
        self._steps_seen += 1
        return gradients.contract(self._direction)

    def _complement(self, epoch: int) -> Tensor:
        """1 − p of the batch, from the layer that ran last."""
        call = self.recorder.calls[-1]
        assert call.grad is not None
        grad = call.grad * len(call.grad)
        if epoch != self._checked_epoch:
            self._checked_epoch = epoch
            assert call.output is not None
            if self.options.divides:
                refuse_other_losses(call.output, grad)
            else:
                option, instead = 'step_weight="uncertainty"', 'step_weight="lr"'
                refuse_other_losses(call.output, grad, option, instead)
        return complement_from_logit_gradients(grad)
