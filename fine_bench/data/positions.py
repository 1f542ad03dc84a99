"""Data sets whose items tell their own position.

Methods that watch a training must know which examples are in a batch. ``with_index`` adds that to a
data set of anybody's making; samplers, ``Subset`` and ``ConcatDataset`` go around or below it:
``DataLoader(with_index(ConcatDataset([a, b])), sampler=…)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset

KEY = "index"
"""Under which a mapping tells its position."""


class WithIndex(Dataset[Any]):
    """See ``with_index``.

    Args:
        dataset: map-style, with a length.

    Raises:
        TypeError: it has no positions.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        whole = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not whole or isinstance(dataset, IterableDataset):
            raise TypeError(
                "with_index numbers the examples of a map-style dataset, one with a length and "
                f"dataset[i], got {type(dataset).__name__}; let an iterable dataset yield the "
                "index itself"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Any:
        return numbered(self.dataset[i], i + len(self) if i < 0 else int(i))

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """Several at once, where the data set has that."""
        whole = getattr(self.dataset, "__getitems__", None)
        if whole is None:
            return [self[i] for i in positions]
        return [numbered(item, int(i)) for item, i in zip(whole(positions), positions, strict=True)]

    def __getattr__(self, name: str) -> Any:
        # what else the data set has (classes, targets, …); not while it is unpickled in a worker
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def with_index(dataset: Dataset[Any]) -> WithIndex:
    """The same examples, each with its position 0, 1, 2, … in the data set.

    An item that is a tuple gets the position as its last part, ``(x, y)`` → ``(x, y, i)``; a
    mapping gets it under ``"index"``; anything else becomes ``(item, i)``. A callback finds it
    there by itself.

    Args:
        dataset: map-style, with a length.

    Raises:
        TypeError: it has no positions.
        ValueError: when an item is read that has another ``"index"`` already.
    """
    return WithIndex(dataset)


def numbered(item: Any, i: int) -> Any:
    """An item with its position.

    Raises:
        ValueError: a mapping that has another one.
    """
    if isinstance(item, Mapping):
        if item.get(KEY, i) != i:
            raise ValueError(
                f"item {i} has an {KEY!r} of its own, {item[KEY]!r}, which is not its position in "
                "the data set; rename or drop that field before with_index"
            )
        return {**item, KEY: i}
    if isinstance(item, tuple | list):
        return (*item, i)
    return item, i


def position_in(batch: Any) -> Any:
    """Where a batch of such items, put together by a plain collate function, has the positions."""
    return batch.get(KEY) if isinstance(batch, Mapping) else batch[-1]


__all__ = ["WithIndex", "position_in", "with_index"]
