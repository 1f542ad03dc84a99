"""Where things are in batches of anybody's own making.

Without an adapter batches are ``(x, y, index)`` or mappings with ``"x"``, ``"y"`` and ``"index"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Place: TypeAlias = str | int | Callable[[Any], Any]
"""A key of a mapping, a place in a tuple, or a function of the batch."""


@dataclass(frozen=True)
class BatchAdapter:
    """Tells f-INE how to read a batch.

    Attributes:
        index: where the positions of the batch's examples in the training set are, ``(batch,)``
            integers. The in-batch schedule cannot do without.
        x, y: where inputs and labels are, for passes of the callback's own: one tensor each,
            examples first.
        losses: ``losses(module, batch) -> (batch,)``, the loss of each example by itself, for
            modules whose input is not one tensor, or whose loss is not ``loss(forward(x), y)``.
            Given it, x is not asked for, and y only by ``target="validation_per_class"``. The mean
            over the batch must be the loss that ``training_step`` returns.

    Every tensor of a batch has the examples in its first dimension. A place that is left out is
    where it is without an adapter.

        BatchAdapter(index="id", x="pixels", y="label")
        BatchAdapter(index=lambda batch: batch["meta"][0], losses=token_losses)
    """

    index: Place | None = None
    x: Place | None = None
    y: Place | None = None
    losses: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("index", "x", "y"):
            place = getattr(self, name)
            known = place is None or isinstance(place, str | int) or callable(place)
            if not known or isinstance(place, bool):
                raise TypeError(
                    f"BatchAdapter({name}=…) must be a key, a place in a tuple, or a function of "
                    f"the batch, got {place!r}"
                )
        if self.losses is not None and not callable(self.losses):
            raise TypeError(
                "BatchAdapter(losses=…) must be a function losses(module, batch) -> (batch,), got "
                f"{self.losses!r}"
            )

    def example_index(self, batch: Any) -> Any:
        """The index that a batch carries, unchecked; None where there is none."""
        return _found(batch, self.index, "index", 2)

    def label(self, batch: Any) -> Any:
        """What a batch has in the place of its labels, unchecked; None where nobody says.

        With ``losses`` that is where ``y`` says, and nowhere else.
        """
        if self.losses is not None and self.y is None:
            return None
        return _found(batch, self.y, "y", 1)

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        """``x`` and ``y`` of a batch.

        Raises:
            ValueError: they are not where they should be.
        """
        x, y = _found(batch, self.x, "x", 0), _found(batch, self.y, "y", 1)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            has = f" with {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
            raise ValueError(
                'the training data must yield (x, y, …) or a mapping with "x" and "y", got '
                f"{type(batch).__name__}{has}; or tell by BatchAdapter(x=…, y=…, losses=…) what "
                "is where"
            )
        return x, y

    def inputs(self, batch: Any) -> tuple[Any, Tensor]:
        """What the callback's passes take: ``x`` and ``y``, or the batch with ``losses``.

        With ``losses``, y is only counted (and, if it is an integer tensor ``(batch,)``, read as
        the labels of ``validation_per_class``).
        """
        if self.losses is None:
            return self.parts(batch)
        whole = dict(batch) if isinstance(batch, Mapping) else batch
        y = _found(batch, self.y, "y", 1)
        if not isinstance(y, Tensor) or y.ndim != 1:
            y = torch.zeros(self.size(batch), dtype=torch.int64)
        return whole, y

    def size(self, batch: Any) -> int:
        """Number of examples in a batch."""
        if self.losses is None:
            return len(self.parts(batch)[1])
        tensors = [part for part in tree_leaves(_plain(batch)) if isinstance(part, Tensor)]
        if not tensors:
            raise ValueError(
                f"the batch, a {type(batch).__name__}, holds no tensor whose first dimension are "
                "the examples; let the DataLoader's collate_fn make tensors"
            )
        return len(tensors[0])


def to_model(inputs: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Tensors on the model's device, floating ones in its precision."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.to(device)
        return x.to(dtype) if x.is_floating_point() else x

    return tree_map(move, inputs)


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def _found(batch: Any, place: Place | None, key: str, position: int) -> Any:
    """What is at a place, None if nothing is."""
    if callable(place):
        return place(batch)
    if isinstance(batch, Mapping):
        return batch.get(key if place is None else place)
    if not isinstance(batch, Sequence):
        return None
    at = position if place is None else place
    if isinstance(at, int):
        return batch[at] if -len(batch) <= at < len(batch) else None
    return getattr(batch, at, None)  # a named tuple


__all__ = ["BatchAdapter", "to_model"]
