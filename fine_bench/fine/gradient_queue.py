"""Per-example gradients of several small steps, kept until their products are taken together.

The products of a small step are a few million multiplications, for which the fixed cost of the
tensor operations around them is several times that of the arithmetic. A product over many steps
costs as many operations as one over a single step.

The gradients are copied: a training loop may write its next batch into the memory of this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fine_bench.gradients.per_example import PerExampleGradients

CAPACITY = 32
"""Steps held at most."""

FLOATS = 2**21
"""Numbers held at most: about what stays in a CPU's last cache."""

WORTHWHILE = 3
"""Steps below which holding them back saves nothing."""


class GradientQueue:
    """Room for the gradients of a few steps with equal shapes."""

    def __init__(self) -> None:
        self._like: PerExampleGradients | None = None
        self._shapes: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._room: list[Tensor] = []
        self._places: list[tuple[Tensor, ...]] = []  # of each step in the room
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether there is no room for a further step."""
        return self._count > 0 and self._count >= len(self._places)

    def serves(self, gradients: PerExampleGradients) -> bool:
        """Whether these are small enough for several steps to be held."""
        if self._count:
            return True  # what is held is of the same layers; see ``add``
        if any(block.of_its_step for block in gradients.blocks):
            return False
        return WORTHWHILE * sum(block.n_floats for block in gradients.blocks) <= FLOATS

    def add(self, gradients: PerExampleGradients) -> bool:
        """Copy one step's gradients; see ``full``.

        Returns:
            whether they are held: they are not where what is held has other shapes.
        """
        parts = [part for block in gradients.blocks for part in block.tensors]
        shapes = [(part.shape, part.dtype, part.device) for part in parts]
        if self._shapes != shapes:
            if self._count:
                return False
            floats = sum(block.n_floats for block in gradients.blocks)
            capacity = max(1, min(CAPACITY, FLOATS // floats))
            self._room = [part.new_empty(capacity, *part.shape) for part in parts]
            # views of all places are made once: indexing costs more than copying a small step
            self._places = list(zip(*(room.unbind() for room in self._room), strict=True))
            self._shapes = shapes
        if not self._count:
            self._like = gradients  # equal shapes may be of other parameters than before
        for place, part in zip(self._places[self._count], parts, strict=True):
            place.copy_(part)
        self._count += 1
        return True

    def take(self) -> PerExampleGradients:
        """The S steps' gradients, one step after the other, ``(S · m, …)``; nothing stays held.

        They are valid until the next ``add``.
        """
        assert self._like is not None
        count, self._count = self._count, 0
        rooms = iter(self._room)
        blocks = []
        for block in self._like.blocks:
            parts = [next(rooms)[:count].flatten(0, 1) for _ in block.tensors]
            blocks.append(block.with_tensors(*parts))
        return PerExampleGradients(blocks)
