"""What a training batch tells, and the training data behind the batches, by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, default_collate

from fine_bench.data.positions import WithIndex, position_in
from fine_bench.fine.batch_adapter import BatchAdapter, to_model
from fine_bench.types import UnsupportedProblemError, dataset_size

LABELS_AT_ONCE = 4096


class TrainingData:
    """The training examples by their position in the set, apart from any DataLoader's order.

    Nothing of the loader but its dataset and its collate function is used, so reading leaves its
    order and its random state alone. The dataset must give the same example for the same position
    each time.

    Args:
        dataset: map-style; items ``(x, y, …)`` or mappings with ``"x"`` and ``"y"``, or whatever
            the adapter reads.
        collate: makes a batch of a list of items; the default one if None.
        device, dtype: where the model is, and the precision it takes inputs in; integer inputs
            stay as they are.
        adapter: reads batches.
        n: number of training examples, where the data set has no length or is numbered otherwise.

    Raises:
        TypeError: nobody says how many examples there are.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[Any], Any] | None = None,
        *,
        n: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        adapter: BatchAdapter | None = None,
    ) -> None:
        self.n = number_of_examples(dataset, n)
        self.dataset = dataset
        self.collate = collate or default_collate
        self.device = device
        self.dtype = dtype
        self.adapter = adapter or BatchAdapter()
        if isinstance(dataset, WithIndex) and self.adapter.index is None:
            self.adapter = replace(self.adapter, index=position_in)

    def refuse_parts_alike(self) -> None:
        """Refuse data sets side by side that each count from 0: an index then names several.

        Raises:
            ValueError: it does.
        """
        parts = self.dataset.datasets if isinstance(self.dataset, ConcatDataset) else []
        found = []
        for part in parts:
            try:
                index = self.adapter.example_index(self.collate([part[0]]))
                found += as_positions(index).tolist()
            except Exception:  # items of another make; the batches will show
                return
        if len(set(found)) < len(found):
            raise ValueError(
                f"the {len(found)} data sets of the training set begin with the indices {found}: "
                "each counts for itself, so one index names several examples. Number the whole: "
                "fine_bench.with_index(ConcatDataset([…])) around data sets without indices"
            )

    def require_positions(self) -> None:
        """Refuse a data set of which examples cannot be read by their positions.

        Raises:
            UnsupportedProblemError: it is one.
        """
        if hasattr(self.dataset, "__getitem__") and not isinstance(self.dataset, IterableDataset):
            return
        raise UnsupportedProblemError(
            "snapshots and the EK-FAC geometry read training examples by their positions, which "
            f"{type(self.dataset).__name__} does not allow: use a map-style dataset, or "
            'schedule="in_batch" with geometry="euclidean", which need the batches alone'
        )

    def read(self, positions: Tensor) -> tuple[Any, Tensor]:
        """``x, y`` of the examples at ``positions`` ``(m,)``; see ``BatchAdapter.inputs``.

        Raises:
            UnsupportedProblemError: a data set without positions.
            ValueError: items of another kind, or an index in them that is not the position.
        """
        where = positions.tolist()
        self.require_positions()
        dataset: Any = self.dataset
        whole = getattr(dataset, "__getitems__", None)
        batch = self.collate(whole(where) if whole else [dataset[i] for i in where])
        x, y = self.adapter.inputs(batch)
        index = self.adapter.example_index(batch)
        if index is not None and not torch.equal(torch.as_tensor(index).cpu(), positions):
            raise ValueError(
                "the index that the training set yields is not the position it was asked for; "
                "number the examples 0, 1, 2, … in the order of the set"
            )
        return to_model(x, self.device, self.dtype), y.to(self.device)

    def batches(self, positions: Tensor, size: int = 256) -> Iterator[tuple[slice, Any, Tensor]]:
        """``(rows of positions, x, y)``, at most ``size`` examples at a time."""
        for start in range(0, len(positions), size):
            rows = slice(start, min(start + size, len(positions)))
            yield rows, *self.read(positions[rows])

    def labels(self) -> Tensor:
        """The labels of all examples as training sees them, ``(n,)`` on the CPU."""
        parts = self.batches(torch.arange(self.n), LABELS_AT_ONCE)
        return torch.cat([y.cpu() for _, _, y in parts])


def number_of_examples(dataset: Dataset[Any], given: int | None = None) -> int:
    """How many training examples there are.

    Args:
        dataset: of the training.
        given: what the user says, ``train_size=…``; it goes before the data set's length.

    Raises:
        TypeError: neither says.
    """
    if given is not None:
        return given
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            "f-INE needs the number of training examples and the position of each one among them, "
            f"but {type(dataset).__name__} has no length: let it yield (x, y, index) with index "
            "from 0 to n - 1, the same for an example in every epoch, and give train_size=n to "
            "FINECallback or fine_bench.watch; or use a map-style dataset, to which "
            "fine_bench.with_index adds the index"
        )
    return dataset_size(dataset, "the training set")


def read_queries(queries: Dataset[Any], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """All queries of a dataset of ``(x, y)`` on the model's device, ``(V, …)`` each."""
    n_query = dataset_size(queries, "queries")
    x, y, *_ = default_collate([queries[i] for i in range(n_query)])
    return x.to(device), y.to(device)


def batch_index(
    batch: Any, n_train: int, adapter: BatchAdapter | None = None
) -> tuple[Tensor, bool]:
    """The positions of a batch's examples in the training set.

    Args:
        batch: of the training.
        n_train: number of training examples.
        adapter: reads batches.

    Returns:
        a copy of them, ``(m,)``, since a loop may write its next batch into the memory of this one
        while steps wait to be accounted for; whether an example stands in it twice.

    Raises:
        ValueError: no index in the batch, or out of range.
    """
    index = (adapter or BatchAdapter()).example_index(batch)
    if index is None:
        raise ValueError(
            'the batch carries no example indices: yield (x, y, index) or a mapping with "index", '
            "the position of each example in the training set (fine_bench.with_index(dataset) adds "
            "it); or tell by BatchAdapter(index=…) where they are"
        )
    found = as_positions(index)
    # plain integers: on a few dozen numbers faster than three tensor operations
    positions = found.tolist()
    low, high = min(positions), max(positions)
    if low < 0 or high >= n_train:
        raise ValueError(
            f"the batch's index runs from {low} to {high}, but the training set has {n_train} "
            "examples; index must be the position in that set (fine_bench.with_index adds it), or "
            "give train_size=…, the number of examples that are numbered"
        )
    return found.clone(), len(set(positions)) != len(positions)


def as_positions(index: Any) -> Tensor:
    """What a batch has for an index as whole numbers in int64, ``(m,)``, m ≥ 1.

    Raises:
        ValueError: it is something else, such as names of files.
    """
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1 and len(index):
        return index  # nearly always
    names = isinstance(index, str) or (
        isinstance(index, list | tuple) and any(isinstance(i, str | bytes) for i in index)
    )
    if names:
        first = index if isinstance(index, str) else next(i for i in index if not _whole(i))
        raise ValueError(
            f"the batch's index holds names ({first!r}), but f-INE needs positions: the whole "
            "number 0, 1, 2, … at which each example stands in the training set. "
            "fine_bench.with_index(dataset) adds them, and scores then come in the order of the set"
        )
    try:
        found = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the batch's index must be integers of shape (batch,), got {type(index).__name__} "
            f"({error}); fine_bench.with_index(dataset) adds them"
        ) from error
    kind = found.dtype
    if found.ndim != 1 or not len(found) or kind.is_floating_point or kind.is_complex:
        raise ValueError(
            f"the batch's index must be integers of shape (batch,), got {kind} of shape "
            f"{tuple(found.shape)}; fine_bench.with_index(dataset) adds them"
        )
    if kind == torch.bool:
        raise ValueError(
            "the batch's index must be integers of shape (batch,), got torch.bool of shape "
            f"{tuple(found.shape)}: a mask says nothing of positions"
        )
    return found.long()  # bytes would be read as a mask, and short integers not at all


def _whole(value: Any) -> bool:
    return isinstance(value, int)


def step_size(optimizer: Any) -> float:
    """The optimiser's present step size η_t.

    Raises:
        UnsupportedProblemError: parameter groups with different step sizes.
    """
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1:
        raise UnsupportedProblemError(
            f"the optimiser's parameter groups have different step sizes {sorted(rates)}, but the "
            "values of a step are one step size times products of gradients; give all groups one"
        )
    return rates.pop()


def complement_from_logit_gradients(grad: Tensor) -> Tensor:
    """1 − p_i from the cross-entropy's gradient at the logits ``(…, m, classes)``, ``(…, m)``.

    That gradient is p − onehot(y), so its positive entries sum to Σ_{k≠y} p_k = 1 − p_y: a sum of
    positive numbers, without cancellation.
    """
    return grad.clamp_min(0.0).sum(-1)


def implied_labels(logits: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor | None:
    """The labels y of which the gradient at the logits is p − onehot(y), ``(m,)``.

    Args:
        logits, grad, eps: as in ``refuse_other_losses``.

    Returns:
        None where the gradient is of another form.
    """
    if grad.ndim != 2 or logits.shape != grad.shape:
        return None
    p = torch.softmax(logits.to(grad.dtype), 1)
    label = (p - grad).argmax(1, keepdim=True)
    expected = p.scatter_add(1, label, torch.full_like(p[:, :1], -1.0))
    return label[:, 0] if bool(((grad - expected).abs() <= max(1e-3, eps)).all()) else None


def refuse_other_losses(
    logits: Tensor,
    grad: Tensor,
    option: str = 'observable="margin"',
    instead: str = 'observable="loss"',
    eps: float = 0.0,
) -> None:
    """Refuse a run whose loss is not the mean softmax cross-entropy of its last layer's output.

    Args:
        logits: output of the layer that ran last.
        grad: gradient of each example's own loss there; p − onehot(y) if all is as it should be.
        option, instead: what asks for 1 − p, and what does without.
        eps: rounding of a number of the pass.

    Raises:
        UnsupportedProblemError: it is not, so 1 − p cannot be read off.
    """
    if implied_labels(logits, grad, eps) is None:
        raise UnsupportedProblemError(
            f"{option} needs the mean softmax cross-entropy of hard labels on the output "
            f"of the last layer; the gradients at that output are not of this form. Use {instead}"
        )
