"""A batch as a training loop tells of it: who is in it, and what the model is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from fine_bench.fine.batch_adapter import BatchAdapter


@dataclass(frozen=True, eq=False)
class AnnouncedBatch:
    """A batch as a loop tells of it.

    Attributes:
        index: ``(m,)``.
        y: labels, where they were given.
        inputs: what the model was called with.
    """

    index: Tensor
    y: Tensor | None = None
    inputs: Any = None

    def with_inputs(self, args: Any, kwargs: Any) -> AnnouncedBatch:
        """What the model is called with; what has no examples in it is held apart."""
        m = len(self.index)

        def held(part: Any) -> Any:
            of_batch = isinstance(part, Tensor) and part.ndim > 0 and len(part) == m
            return part if of_batch else Held(part)

        return AnnouncedBatch(self.index, self.y, tree_map(held, (args, kwargs)))


@dataclass(frozen=True, eq=False)
class Held:
    """An argument that is the same for every part of a batch."""

    value: Any


class LoopAdapter(BatchAdapter):
    """Reads a loop's batches, and otherwise those that the class after it reads."""

    def example_index(self, batch: Any) -> Any:
        return batch.index if isinstance(batch, AnnouncedBatch) else super().example_index(batch)

    def label(self, batch: Any) -> Any:
        return batch.y if isinstance(batch, AnnouncedBatch) else super().label(batch)

    def inputs(self, batch: Any) -> tuple[Any, Tensor]:
        if not isinstance(batch, AnnouncedBatch):
            return super().inputs(batch)
        y = batch.y if isinstance(batch.y, Tensor) else torch.zeros(len(batch.index))
        return batch.inputs, y

    def size(self, batch: Any) -> int:
        return len(batch.index) if isinstance(batch, AnnouncedBatch) else super().size(batch)


def loop_adapter(adapter: BatchAdapter) -> BatchAdapter:
    """An adapter that reads a loop's batches besides those that ``adapter`` reads."""
    both = type("LoopAdapter", (LoopAdapter, type(adapter)), {})
    found: BatchAdapter = both(**vars(adapter))
    return found


class UnreadExamples(Dataset[Any]):
    """Training examples of which only the number is known; ``watch`` refuses what would read it."""

    def __getitem__(self, i: int) -> Any:
        raise ValueError(f"example {i} is asked for, but only train_size was given: pass train_set")


def unknown_loss(output: Any, y: Any, reduction: str = "none") -> Tensor:
    """The loss of a batch whose labels were not given."""
    raise ValueError("labels were not given")


__all__ = ["AnnouncedBatch", "Held", "UnreadExamples", "loop_adapter", "unknown_loss"]
