"""What several processes of one training run tell each other (distributed data parallel).

Each process holds its share of every global batch. The statistic of an example needs the others of
its global batch, wherever they are: their indices, and the inputs and output gradients of their
layers. Every process gathers all of them, in the order of the processes, and comes to the same
scores; so a checkpoint that one process writes holds everything.

Cost: the layers' inputs and output gradients of the whole batch travel to every process at every
step (for targets with queries only when the directions are computed anew), and every process does
the work of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.per_example import PerExampleGradients, stack_examples

Number = TypeVar("Number", int, float)


class Processes:
    """The processes of a run.

    Args:
        count: how many, W.
        device: on which tensors travel.
    """

    def __init__(self, count: int = 1, device: torch.device | str = "cpu") -> None:
        self.count = count
        self.device = device

    def each(self, x: Tensor) -> list[Tensor]:
        """``x`` of every process. Dimensions may differ in length, not in number."""
        if self.count == 1:
            return [x]
        home, x = x.device, x.to(self.device)
        shape = torch.tensor(x.shape, device=x.device)
        shapes = [torch.empty_like(shape) for _ in range(self.count)]
        dist.all_gather(shapes, shape)
        lengths: list[list[int]] = [s.tolist() for s in shapes]
        padded = x.new_zeros([max(sizes) for sizes in zip(*lengths, strict=True)])
        padded[tuple(slice(size) for size in x.shape)] = x
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded)
        return [
            part[tuple(slice(size) for size in sizes)].to(home)
            for part, sizes in zip(found, lengths, strict=True)
        ]

    def join(self, x: Tensor) -> Tensor:
        """``x`` of all processes, side by side along the first dimension."""
        return x if self.count == 1 else torch.cat(self.each(x))

    def numbers(self, values: Sequence[Number]) -> list[Number]:
        """Numbers of all processes, one process after the other."""
        if self.count == 1:
            return list(values)
        whole = all(isinstance(value, int) for value in values)
        kind = torch.int64 if whole else torch.float64
        together: list[Number] = self.join(torch.tensor(values, dtype=kind)).tolist()
        return together

    def gradients(self, mine: PerExampleGradients) -> PerExampleGradients:
        """The gradients of the examples of all processes as those of one batch."""
        if self.count == 1:
            return mine
        by_block = [self._block(block) for block in mine.blocks]
        return stack_examples(
            [PerExampleGradients(blocks) for blocks in zip(*by_block, strict=True)]
        )

    def _block(self, block: Block) -> list[Block]:
        parts = zip(*(self.each(part) for part in block.tensors), strict=True)
        return [block.with_tensors(*tensors) for tensors in parts]
