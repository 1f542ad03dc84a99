"""The optimiser's own preconditioner as a geometry: ⟨g, D⁻¹ g'⟩.

SGD steps along the mean gradient of the batch, Adam (Kingma, Ba, arXiv:1412.6980) and AdamW along
m̂ / (√v̂ + ε), element by element, with running means m of the gradients and v of their squares.
What a gradient does to the parameters is scaled by

    D = √v̂ + ε,   v̂ = v / (1 − β₂^t),

so ⟨D⁻¹ g_i, ∇h⟩ is, to first order and up to the step size, what example i's gradient does to h.
v is what the optimiser remembers *before* the step: then D does not depend on the batch that is
tested. (The step itself also takes in the batch's own squares, a share 1 − β₂ of v.) Before its
first step Adam remembers nothing: that step is left out and counted. With ``amsgrad`` the largest v
so far stands for v. For SGD, with momentum or without, D is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fine_bench.fine.geometry import Metric
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.diagonal import (
    diagonal_gram,
    diagonal_norm2,
    scaled_direction,
    weights_for_direction,
)
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.types import UnsupportedProblemError


class Preconditioned(Metric):
    """The metric that follows the optimiser.

    Args:
        optimizer: of the run.
        parameters: the trained parameters behind each block, by the block's name.

    Raises:
        UnsupportedProblemError: an optimiser whose preconditioner is not known.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Mapping[str, Sequence[torch.nn.Parameter]]
    ) -> None:
        if not isinstance(optimizer, SGD | Adam | AdamW):
            raise UnsupportedProblemError(
                f'preconditioner="optimiser" knows SGD, Adam and AdamW, not '
                f"{type(optimizer).__name__}; use one of these or preconditioner=None"
            )
        self.optimizer = optimizer
        self.plain = isinstance(optimizer, SGD)
        self.parameters = parameters
        self._inverse: dict[str, list[Tensor]] = {}

    def watch(self, parameters: Mapping[str, Sequence[torch.nn.Parameter]]) -> None:
        """Other parameters are trained than before."""
        self.parameters = parameters

    def refresh(self) -> bool:
        """Read what the optimiser remembers now; whether there is something for all parameters."""
        if self.plain:
            return True
        settings = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self._inverse = {}
        for name, parameters in self.parameters.items():
            found = []
            for p in parameters:
                if id(p) not in settings:  # it does not move at all
                    found.append(torch.zeros_like(p))
                    continue
                state = self.optimizer.state.get(p, {})
                if "exp_avg_sq" not in state:
                    return False
                found.append(inverse_scale(state, settings[id(p)]))
            self._inverse[name] = found
        return True

    def _weights(self, x: PerExampleGradients) -> Direction:
        return [block.diagonal_weights(self._inverse[block.name]) for block in x.blocks]

    def gram(self, x: PerExampleGradients, y: PerExampleGradients | None = None) -> Tensor:
        """⟨g_i, D⁻¹ g'_j⟩, ``(B, B')``."""
        return x.gram(y) if self.plain else diagonal_gram(x, y or x, self._weights(x))

    def norm2(self, x: PerExampleGradients) -> Tensor:
        """⟨g_i, D⁻¹ g_i⟩, ``(B,)``."""
        return x.norm2() if self.plain else diagonal_norm2(x, self._weights(x))

    def solve(self, direction: Direction) -> Direction:
        """D⁻¹ times directions."""
        if self.plain:
            return direction
        # a model's blocks and its parameters stand in the same order
        pairs = zip(direction, self._inverse.values(), strict=True)
        weights = [weights_for_direction(part, inverse) for part, inverse in pairs]
        return scaled_direction(direction, weights)


def inverse_scale(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """1/(√v̂ + ε) of one parameter, from Adam's state of it.

    Args:
        state: ``exp_avg_sq`` (or ``max_exp_avg_sq``) and ``step``.
        group: the parameter group's ``betas``, ``eps`` and ``amsgrad``.
    """
    v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1.0 - group["betas"][1] ** float(state["step"])
    inverse: Tensor = 1.0 / ((v / correction).sqrt() + group["eps"])
    return inverse
