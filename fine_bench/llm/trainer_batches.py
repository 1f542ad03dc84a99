"""Positions that travel with the batches of a Transformers Trainer.

The Trainer drops columns that its model does not know, and its collators make tensors of the rest.
So an example's position goes around both: beside the item to the collate function, and from there
in a field of the batch that is taken out again before the model sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fine_bench.fine.batch_adapter import BatchAdapter
from fine_bench.types import UnsupportedProblemError

FIELD, LABELS_FIELD = "fine_index", "fine_labels"
"""Of a batch: the positions of its examples, and their labels, which a Trainer may take out."""

LABELS = ("labels", "label")


class NumberedItems(Dataset[tuple[Any, int]]):
    """The items of a data set, each beside its position."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.dataset[i], i

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[Any, int]]:
        """Several at once, where the data set has that."""
        whole = getattr(self.dataset, "__getitems__", None)
        items = whole(positions) if whole else [self.dataset[i] for i in positions]
        return list(zip(items, positions, strict=True))


class NumberedCollate:
    """Makes a batch as the Trainer's collator does, with the positions in ``FIELD``."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, int]]) -> Any:
        batch = self.collate([item for item, _ in items])
        if not isinstance(batch, Mapping):
            raise UnsupportedProblemError(
                "the Trainer's data_collator must make a mapping of named tensors, got "
                f"{type(batch).__name__}"
            )
        return {
            **batch,
            FIELD: torch.tensor([i for _, i in items]),
            LABELS_FIELD: labels_of(batch),
        }


def number(loader: Any) -> tuple[Any, Callable[[list[Any]], Any]]:
    """Let a Trainer's loader tell positions; its data set and its collate function, as they were.

    Args:
        loader: of the training, as ``on_train_begin`` gets it.

    Raises:
        UnsupportedProblemError: a data set without positions.
    """
    loader = getattr(loader, "base_dataloader", loader)
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, NumberedItems):  # another callback was here before
        return dataset.dataset, collate.collate
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UnsupportedProblemError(
            "f-INE needs the position of each training example, which the Trainer's "
            f"{type(dataset).__name__} does not have: use a map-style train_dataset, one with a "
            "length and dataset[i]"
        )
    # a DataLoader refuses another data set once it is made: its length, its items and its order
    # stay what they were
    object.__setattr__(loader, "dataset", NumberedItems(dataset))
    loader.collate_fn = NumberedCollate(collate)
    return dataset, collate


class TrainerAdapter(BatchAdapter):
    """Reads the batches that a Trainer's collator makes: x is what the model gets but labels."""

    def example_index(self, batch: Any) -> Any:
        return None  # it goes around the collator

    def label(self, batch: Any) -> Any:
        return labels_of(batch)

    def inputs(self, batch: Any) -> tuple[Any, Tensor]:
        y = labels_of(batch)
        if not isinstance(y, Tensor):
            raise ValueError(
                f"the batch has no labels, only {', '.join(map(repr, batch))}: passes of f-INE's "
                "own need them under the name 'labels'"
            )
        return {k: v for k, v in batch.items() if k not in LABELS}, y

    def size(self, batch: Any) -> int:
        return len(next(v for v in batch.values() if isinstance(v, Tensor)))


def labels_of(batch: Mapping[str, Any]) -> Any:
    """The labels of a batch, None where it has none."""
    return next((batch[name] for name in LABELS if name in batch), None)


__all__ = ["FIELD", "LABELS_FIELD", "TrainerAdapter", "labels_of", "number"]
