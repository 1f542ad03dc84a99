"""The paper's estimator at one step: batches are drawn, passes are made, samples taken."""

from __future__ import annotations

import torch
from torch import Tensor

from fine_bench.fine.effects import Observable
from fine_bench.fine.passes import Passes
from fine_bench.fine.subset_options import SubsetOptions
from fine_bench.fine.subset_samples import direction_products, samples, self_products
from fine_bench.fine.subsets import Draw, Subsets, draw_batches
from fine_bench.fine.trained_parameters import TrainedParameters
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.seeds import stream


class SubsetSampler:
    """Measures batches with and without each subset, at the present parameters.

    Args:
        passes: passes beside the training; with queries for the target ``validation``, without for
            ``self``.
        subsets: what is watched.
        members: k of each subset, from ``members_per_batch``.
        batch_size: m.
        options: what is measured.
    """

    def __init__(
        self,
        passes: Passes,
        subsets: Subsets,
        members: Tensor,
        batch_size: int,
        options: SubsetOptions,
    ) -> None:
        self.passes = passes
        self.subsets, self.members, self.batch_size = subsets, members, batch_size
        self.options = options
        self._direction: Direction | None = None
        self._refreshed = 0
        self._trained = TrainedParameters(passes.engine.model)

    def draw(self, step: int) -> Draw:
        """The measurement batches of a step."""
        return draw_batches(
            self.subsets,
            self.members,
            self.batch_size,
            stream(self.options.seed, f"fine_paper/step {step}"),
            pool_size=self.options.pool or 4 * self.batch_size,
            target_members=self.options.target_members if self.passes.queries is None else 0,
        )

    def measure(self, step: int) -> Tensor:
        """The samples after a step, ``(3, S)``; see ``samples``."""
        draw = self.draw(step)
        if self._trained.change(step):  # layers were frozen, let go of, or replaced
            self.passes.engine.watch()
            self._direction = None
        with self.passes.aside():
            if self.passes.queries is None:
                batch = self._gradients(draw.batch_ids)
                h = self._gradients(draw.target_ids, self.options.observable)
                products = self_products(batch, h, draw, self.options.observable)
            else:
                gradients = self._gradients(torch.cat([draw.batch_ids, draw.singles]))
                if self._direction is None or step - self._refreshed >= self.options.refresh_every:
                    pool = gradients.rows(slice(0, len(draw.pool)))
                    self._direction, self._refreshed = self.passes.directions(pool), step
                products = direction_products(gradients, self._direction, draw)
        return samples(*products, draw)

    def _gradients(self, positions: Tensor, observable: Observable = "loss") -> PerExampleGradients:
        return self.passes.gradients(*self.passes.data.read(positions), observable)
