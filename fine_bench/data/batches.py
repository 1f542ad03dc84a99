"""A task's examples in batches ``(x, y, index)``, in an order that a generator draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

Example: TypeAlias = tuple[Tensor, Tensor, int]
Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]


class _Rows(Sequence[Example]):
    """The examples of one batch, not yet gathered.

    A list of examples to any collate function, the default one included; ``whole_batch`` takes
    the short way.
    """

    def __init__(self, dataset: IndexedDataset, indices: list[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: Any) -> Any:
        return self.dataset[self.indices[position]]

    def __iter__(self) -> Iterator[Example]:
        return (self.dataset[index] for index in self.indices)

    def gather(self) -> Batch:
        index = torch.tensor(self.indices, dtype=torch.int64)
        return self.dataset.x[index], self.dataset.y[index], index


class IndexedDataset(Dataset[Example]):
    """Examples ``(x, y, index)``: a callback can tell which examples a batch holds.

    Args:
        x: ``(n, ...)`` inputs.
        y: ``(n, ...)`` labels.

    Works with any DataLoader; with ``collate_fn=whole_batch`` a batch is gathered by one indexing
    operation instead of one for every example.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} examples, y {len(y)}; they must agree")
        self.x = x
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Example:
        return self.x[index], self.y[index], index

    def __getitems__(self, indices: list[int]) -> _Rows:
        """A whole batch at once: what DataLoader asks for when a data set offers it."""
        return _Rows(self, indices)


def whole_batch(examples: Sequence[Example]) -> Batch:
    """Collate function of ``IndexedDataset``: ``x (m, ...)``, ``y (m, ...)``, ``index (m,)``."""
    if isinstance(examples, _Rows):
        return examples.gather()
    # behind a wrapper without __getitems__ the loader fetches one example after the other
    x, y, index = default_collate(list(examples))
    return x, y, index


def loader(
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int,
    generator: torch.Generator | None = None,
    shuffle: bool = False,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """Batches ``(x, y, index)``; the last one may be shorter.

    The order depends on the state of ``generator`` and on nothing else: not on the number of
    workers nor on the global random state, which is left alone.

    Args:
        x, y: ``(n, ...)`` each.
        batch_size: at least 1.
        generator: draws the order, a new one each epoch; required with ``shuffle``.
        shuffle: whether to draw an order; otherwise index order.
        num_workers: processes that read ahead. For data in memory 0 is the fastest.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if shuffle and generator is None:
        raise ValueError(
            "shuffle=True needs a generator, so that the order can be repeated; pass for instance "
            'generator=fine_bench.seeds.stream(seed, "train/order")'
        )
    dataset = IndexedDataset(x, y)
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # the loader yields batches, the data set examples
        batch_size=batch_size,
        sampler=RandomSampler(dataset, generator=generator) if shuffle else None,
        collate_fn=whole_batch,
        num_workers=num_workers,
        # A loader draws a seed for its workers on every pass. From a generator of its own:
        # otherwise that draw would come out of the global state, or shift the order.
        generator=torch.Generator().manual_seed(0),
    )
