"""Statistics of several steps, turned into effects together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import (
    Contrast,
    direction_effects,
    margin_effects,
    reference_effects,
    self_effects,
    whitened_effects,
)
from fine_bench.fine.statistic import Kind


@dataclass(frozen=True, eq=False)
class Step:
    """One optimiser step.

    Attributes:
        index: which training examples, ``(m,)``.
        statistic: see ``Kind``.
        one_minus_p: as in ``self_effects``; None for directions and for the loss.
        weight: step size η_t, or the step's weight w_t.
        number: of the step, for reports.
        relative: r_i/ρ of ``fine.micro_batches``, ``(m,)``; None for ones.
        factor: what makes effect and noise from this statistic those of each example's own loss.
    """

    index: Tensor
    statistic: Tensor
    one_minus_p: Tensor | None
    weight: float
    number: int
    relative: Tensor | None = None
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class StackedSteps:
    """Several steps with batches of one size, side by side; see ``Step``.

    Attributes:
        index: ``(S, m)``.
        statistic: ``(S, …)``.
        one_minus_p: ``(S, m)`` or None.
        weight, factor: ``(S,)`` in float64.
        numbers: of the steps.
        relative: ``(S, m)`` or None.
    """

    index: Tensor
    statistic: Tensor
    one_minus_p: Tensor | None
    weight: Tensor
    factor: Tensor
    numbers: list[int]
    relative: Tensor | None = None


class StepQueue:
    """Collects the statistics of a few steps and turns them into effects together.

    A step's statistics are a few thousand numbers, for which the fixed cost of a dozen tensor
    operations is several times that of the arithmetic. Handling ``capacity`` steps in one go makes
    watching cheap; what is accumulated is the same, to the last rounding of float64.

    Args:
        accumulator: where the effects go.
        contrast: see ``self_effects``.
        kind: what a step's statistic is.
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
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Take in one step."""
        if self._steps and self._steps[-1].statistic.shape != step.statistic.shape:
            self.flush()
        self._steps.append(step)
        # many rows are large enough to pay for themselves
        if len(self._steps) >= self.capacity or step.statistic.numel() * len(self._steps) > 2**20:
            self.flush()

    def leave_out(self, number: int) -> None:
        """Count a step that is known not to be finite, or was not taken for that reason."""
        if self.first_not_finite is None:
            self.first_not_finite = number
        self.n_not_finite += 1

    def flush(self) -> None:
        """Hand everything collected to the accumulator."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        index = torch.stack([s.index.cpu() for s in steps])
        complements = [s.one_minus_p for s in steps if s.one_minus_p is not None]
        relative = None
        if any(s.relative is not None for s in steps):
            ones = torch.ones(index.shape[1], dtype=torch.float64)
            relative = torch.stack([ones if s.relative is None else s.relative for s in steps])
        self.take(
            StackedSteps(
                index,
                torch.stack([s.statistic for s in steps]),
                torch.stack(complements) if complements else None,
                torch.tensor([s.weight for s in steps], dtype=torch.float64),
                torch.tensor([s.factor for s in steps], dtype=torch.float64),
                [s.number for s in steps],
                relative,
            )
        )

    def take(self, steps: StackedSteps) -> None:
        """Hand steps to the accumulator that are side by side already."""
        index, weight = steps.index.cpu(), steps.weight
        effect, sigma = self._effects(steps)
        factor = steps.factor.to(effect)[:, None, None]
        effect, sigma = effect * factor, sigma * factor
        if steps.relative is not None:
            effect = effect * steps.relative[:, None].to(effect.device)
        finite = (torch.isfinite(effect) & torch.isfinite(sigma)).flatten(1).all(1).cpu()
        if not bool(finite.all()):
            if self.first_not_finite is None:
                self.first_not_finite = steps.numbers[int((~finite).nonzero()[0])]
            self.n_not_finite += int((~finite).sum())
            index, effect, sigma = index[finite], effect[finite], sigma[finite]
            weight = weight[finite]
            if not len(index):
                return
        self.accumulator.observe_steps(index, effect, sigma, weight)

    def _effects(self, steps: StackedSteps) -> tuple[Tensor, Tensor]:
        """Effect and σ, each ``(S, R, m)``."""
        statistic, complement = steps.statistic, steps.one_minus_p
        if self.kind == "directions":
            return direction_effects(statistic, self.contrast)
        if self.kind == "gram":
            effect, sigma = self_effects(statistic, complement, self.contrast)
        elif self.kind == "diagonal":
            own, total, *variance = statistic.unbind(1)
            effect, sigma = whitened_effects(own, total, complement, self.contrast, *variance)
        else:
            own, itself, columns = statistic[:, 0], statistic[:, 1], statistic[:, 2:]
            effect, sigma = reference_effects(own, columns.mT, itself, self.contrast)
            effect, sigma = margin_effects(effect, sigma, complement)
        return effect[:, None], sigma[:, None]
