"""The statistic of a step: what its batch's gradients tell, before effects are made of it.

For the target ``self`` it is the batch's Gram matrix, or as much of it as is asked for; for other
targets the products with the queries' directions, which are computed anew now and then. It is taken
of one step, or of several small ones together, whose tensor operations then cost as much as one's.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fine_bench.fine.geometry import Whitened
from fine_bench.fine.micro_batches import scaled_gradients
from fine_bench.fine.options import Options
from fine_bench.fine.passes import Passes
from fine_bench.fine.step_sizes import StepScaling
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.seeds import stream

Kind: TypeAlias = Literal["gram", "columns", "diagonal", "directions"]
"""What a step's statistic is.

``gram``: K, ``(m, m)``, for the target ``self``, which has one row. ``columns``: the diagonal of K,
a mark on r reference examples, and their rows of K, ``(2 + r, m)``. ``diagonal``: the diagonal and
the row sums, ``(2, m)``, where the geometry states the noise, and the variance, ``(3, m)``, where
that is not the diagonal (``fine.step_sizes``). ``directions``: the products with R directions,
``(R, m)``.
"""


class Statistic:
    """Takes the statistic of in-batch steps, but for the scale of their gradients.

    Args:
        options: what to measure.
        passes: passes beside the training, for the queries' directions.
        scaling: what the step sizes make of the gradients.

    Attributes:
        kind: see ``Kind``.
        direction: the queries' present directions; None before the first step, and for ``self``.
        steps_seen: steps since the beginning, of which every ``refresh_every``-th renews them.
    """

    def __init__(self, options: Options, passes: Passes, scaling: StepScaling) -> None:
        self.options = options
        self.passes = passes
        self.scaling = scaling
        self.kind: Kind = "directions"
        if passes.queries is None:
            self.kind = "diagonal" if options.model_noise else "gram"
        if options.reference_columns is not None:
            self.kind = "columns"
        self.direction: Direction | None = None
        self.steps_seen = 0

    def scaled(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """r ∘ g for directions and √r ∘ g for products of two gradients (``fine.step_sizes``)."""
        return self.scaling(gradients, 0.5 if self.passes.queries is None else 1.0)

    @property
    def only_gram(self) -> bool:
        """Whether nothing but the Gram matrix is taken of gradients, as they are."""
        return self.kind == "gram" and self.passes.metric.plain and not self.scaling

    @property
    def needs_directions(self) -> bool:
        """Whether the queries' directions are to be computed anew before the next step."""
        if self.passes.queries is None:
            return False
        return self.direction is None or self.steps_seen % self.options.refresh_every == 0

    def renew_directions(self, gradients: PerExampleGradients, scale: float) -> None:
        """The queries' directions at the present parameters.

        Args:
            gradients: of the step's examples of this process, ``scaled``, for the queries' noise.
            scale: the factor that they lack.
        """
        reference = self.passes.processes.gradients(scaled_gradients(gradients, scale))
        with self.passes.aside():
            self.direction = self.passes.directions(reference)

    def of_step(
        self, gradients: PerExampleGradients, scale: float, index: Tensor, number: int
    ) -> Tensor:
        """Of one step; shapes as in ``Kind``.

        Args:
            gradients: of the examples of this process, ``scaled``; they lack the factor ``scale``.
            index: of the examples of all processes, ``(m,)``.
            number: of the step.
        """
        passes = self.passes
        if self.direction is not None:
            return passes.processes.join(gradients.contract(self.direction).T).T
        gradients = passes.processes.gradients(gradients)
        if self.options.model_noise:
            assert isinstance(passes.metric, Whitened)
            # its noise is a root of its statistic, so the scale cannot wait
            rows = list(passes.metric.own_and_total(gradients))
            if self.scaling:
                rows.append(passes.metric.norm2(self.scaling(gradients, 0.5)))
            return torch.stack(rows) * scale**2
        if self.options.reference_columns is not None:
            chosen = self._columns(index[None], [number])[0]
            own, columns = passes.metric.own_and_rows(gradients, chosen)
            return torch.cat([own[None], _mark(own, chosen), columns])
        return passes.metric.gram(gradients)

    def of_steps(self, gradients: PerExampleGradients, index: Tensor, numbers: list[int]) -> Tensor:
        """Of S steps, ``(S, …)``; shapes as in ``Kind``.

        Args:
            gradients: of one step after the other, ``scaled``, ``(S · m, …)``.
            index: ``(S, m)``.
            numbers: of the steps.
        """
        count = len(index)
        if self.direction is not None:
            rows = gradients.contract(self.direction)
            return rows.reshape(len(rows), count, -1).transpose(0, 1)
        if self.options.reference_columns is None:
            return gradients.grams(count)
        chosen = self._columns(index, numbers)
        own = gradients.norm2().reshape(count, -1)
        columns = gradients.grams(count, chosen)
        return torch.cat([own[:, None], _mark(own, chosen), columns], 1)

    def of_rows(self, gradients: PerExampleGradients, scale: float) -> tuple[Tensor, Tensor | None]:
        """Products of all rows of a step in which examples stand twice; see ``fine.draws``.

        Args:
            gradients: of the examples of this process, ``scaled``; they lack the factor ``scale``.

        Returns:
            the products with R directions, ``(R, m)``, or K, ``(m, m)``; and the matrix that σ² is
            made of, where the geometry states it.
        """
        passes = self.passes
        if self.direction is not None:
            return passes.processes.join(gradients.contract(self.direction).T).T * scale, None
        gradients = passes.processes.gradients(gradients)
        gram = passes.metric.gram(gradients) * scale**2
        if not self.options.model_noise:
            return gram, None
        if not self.scaling:
            return gram, gram
        return gram, passes.metric.gram(self.scaling(gradients, 0.5)) * scale**2

    def factor(self, scale: float) -> float:
        """The scale of effects: of products of two gradients that lack it, or of one."""
        if self.direction is not None:
            return scale
        return 1.0 if self.options.model_noise else scale**2

    def _columns(self, index: Tensor, numbers: list[int]) -> Tensor:
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


def _mark(own: Tensor, chosen: Tensor) -> Tensor:
    """One where an example is chosen ``(…, r)``, zero elsewhere, ``(…, 1, m)`` like ``own``."""
    return torch.zeros_like(own).scatter_(-1, chosen, 1.0).unsqueeze(-2)
