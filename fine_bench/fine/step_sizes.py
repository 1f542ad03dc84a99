"""Each parameter counts with the step size that it has.

A step of SGD moves parameter p by −η_p times its gradient, where η_p is the step size of its
parameter group, and 0 for a parameter that the optimiser does not hold. To first order the step
lowers a target h by

    Σ_p η_p ⟨mean gradient, ∇h⟩_p = η · Σ_p r_p ⟨mean gradient, ∇h⟩_p,   r_p = η_p/η,

with η the largest of the step sizes. So f-INE's statistic is the one of its formulas with products
⟨g, g'⟩_r = Σ_p r_p ⟨g, g'⟩_p, in whatever geometry they are taken. Products of two gradients of
the run are plain products of √r ∘ g and √r ∘ g', those of a gradient with a direction are plain
products of r ∘ g and the direction. Where all step sizes are one, r is one and nothing is
multiplied.

Where the geometry states the noise (``noise="model"``), with F the second moment of the gradients
in each block b, ⟨g_i, F⁻¹ g⟩_r has the variance Σ_b r_b² g_iᵀ F_b⁻¹ g_i: once more √r.

A geometry that sees a layer's weight and bias together (EK-FAC, a sketch) needs one step size a
layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

from torch import nn
from torch.optim import SGD

from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import UnsupportedProblemError


@dataclass(frozen=True, eq=False)
class StepSizes:
    """The step sizes of one step.

    Attributes:
        rates: of the parameter groups.
        groups: the parameters of each.
        carry: how far a gradient moves the parameters in this step and by its momentum in later
            ones, in units of η times the gradient; NaN where the step is not along gradients
            (Adam), or where groups differ.
    """

    rates: tuple[float, ...]
    groups: Sequence[Sequence[nn.Parameter]]
    carry: float = nan

    @property
    def largest(self) -> float:
        """η."""
        return max(self.rates)

    @property
    def ratios(self) -> tuple[float, ...]:
        """r of the groups, to ten digits: schedules that keep them do so up to rounding."""
        if len(self.rates) == 1:
            return (1.0,)
        eta = self.largest
        return tuple(float(format(rate / eta, ".10g")) if eta else 1.0 for rate in self.rates)

    def key(self) -> tuple[Any, ...]:
        """Equal where nothing has changed; groups only ever grow."""
        return self.ratios, tuple(map(len, self.groups))

    def relative(self) -> dict[int, float]:
        """r_p by the parameter's ``id``; those of other parameters are 0."""
        pairs = zip(self.ratios, self.groups, strict=True)
        return {id(p): ratio for ratio, group in pairs for p in group}


def step_sizes(optimizer: Any) -> StepSizes:
    """The optimiser's present step sizes."""
    groups = optimizer.param_groups
    carries = {carry(group) for group in groups} if isinstance(optimizer, SGD) else set()
    return StepSizes(
        tuple(float(group["lr"]) for group in groups),
        [group["params"] for group in groups],
        carries.pop() if len(carries) == 1 else nan,
    )


def carry(options: Mapping[str, Any]) -> float:
    """Of SGD with these options: (1 − dampening)/(1 − μ), 1 without momentum μ; NaN if unbounded.

    Args:
        options: by their names in ``torch.optim.SGD``; what is absent has torch's default.
    """
    momentum = float(options.get("momentum") or 0.0)
    if not momentum:
        return 1.0
    if not (isfinite(momentum) and momentum < 1):
        return nan
    return (1 - float(options.get("dampening") or 0.0)) / (1 - momentum)


class StepScaling:
    """Makes gradients those whose plain products are the step's.

    Args:
        recorder: knows the parameters of each block.
        whole_layers: whether the geometry needs one step size a layer.

    Attributes:
        by_parameter: r_p of the watched parameters, by their names in the model; empty where all
            are one.
    """

    def __init__(self, recorder: LayerRecorder, *, whole_layers: bool = False) -> None:
        self.recorder = recorder
        self.whole_layers = whole_layers
        self.by_parameter: dict[str, float] = {}
        self._blocks: dict[str, list[tuple[int, float]]] = {}  # sizes and r of the parameters
        self._key: tuple[Any, ...] | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to multiply."""
        return bool(self._blocks)

    def changes(self, steps: StepSizes) -> bool:
        """Whether ``follow`` would look at anything anew."""
        return steps.key() != self._key

    def forget(self) -> None:
        """The watched parameters are others than before."""
        self._key = None

    def follow(self, steps: StepSizes) -> None:
        """Take over the step sizes of the step that comes.

        Raises:
            UnsupportedProblemError: a layer has two, where it needs one.
        """
        key = steps.key()
        if key == self._key:
            return
        relative, names = steps.relative(), self._names()
        watched = [id(p) for group in self.recorder.parameters().values() for p in group]
        self.take({names[which]: relative.get(which, 0.0) for which in watched})
        self._key = key

    def take(self, by_parameter: Mapping[str, float]) -> None:
        """Use r_p by name; 0 for a parameter without.

        Raises:
            UnsupportedProblemError: a layer has two, where it needs one.
        """
        self._blocks, self.by_parameter = {}, {}
        if all(value == 1.0 for value in by_parameter.values()):
            return
        self.by_parameter, names = dict(by_parameter), self._names()
        for block, parameters in self.recorder.parameters().items():
            parts = [(p.numel(), by_parameter.get(names[id(p)], 0.0)) for p in parameters]
            if self.whole_layers and len({factor for _, factor in parts}) > 1:
                raise _two_in(block, parts)
            self._blocks[block] = parts

    def __call__(self, gradients: PerExampleGradients, power: float = 1.0) -> PerExampleGradients:
        """r^power ∘ g.

        Raises:
            UnsupportedProblemError: a layer has two step sizes, and its gradients are kept in a
                form that does not tell its parameters apart.
        """
        if not self._blocks:
            return gradients
        blocks = [self._scaled(block, power) for block in gradients.blocks]
        return PerExampleGradients(blocks, gradients.loss, gradients.one_minus_p)

    def _scaled(self, block: Block, power: float) -> Block:
        parts = self._blocks[block.name]
        factors = [factor**power for _, factor in parts]
        if len(set(factors)) == 1:
            if factors[0] == 1.0:
                return block
            return block.scaled(block.values.new_full((len(block),), factors[0]))
        scaled = block.by_parameter(factors, [size for size, _ in parts])
        if scaled is None:
            raise _two_in(block.name, parts)
        return scaled

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.recorder.model.named_parameters()}


def _two_in(block: str, parts: Sequence[tuple[int, float]]) -> UnsupportedProblemError:
    rates = sorted({factor for _, factor in parts})
    return UnsupportedProblemError(
        f"the parameters of layer {block!r} have different step sizes ({rates} times the largest; "
        "0 is one that the optimiser does not hold), and what is kept of its gradients does not "
        'tell them apart: geometry="ekfac" and sketch=… take the weight and the bias of a layer '
        'together. Give them one step size, or use geometry="euclidean" without a sketch'
    )


__all__ = ["StepScaling", "StepSizes", "step_sizes"]
