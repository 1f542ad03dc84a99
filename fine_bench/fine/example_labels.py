"""Whether an index means the same example throughout: compared by labels.

A batch's index must be the position of each example in the training set. One that is a position in
something else (the batch, a shard, an order before shuffling) names other examples from batch to
batch, and so, sooner or later, other labels. Likewise where the order of the examples is changed
within ``training_step``: then the gradient at the logits, p − onehot(y), tells labels in another
order than the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOGETHER = 64
"""Batches that wait to be taken in, at most."""

UNKNOWN = torch.iinfo(torch.int64).min
"""Stands for the label of an example that was not seen yet."""


def hard_labels(y: object, m: int) -> Tensor | None:
    """``y`` as class labels ``(m,)`` on the CPU; None if it is anything else."""
    if not isinstance(y, Tensor) or y.shape != (m,) or y.is_floating_point() or y.is_complex():
        return None
    return y.detach().cpu().long()


class ExampleLabels:
    """The label of each training example as far as it was seen.

    Args:
        n_train: number of training examples.
    """

    def __init__(self, n_train: int) -> None:
        self.known = torch.full((n_train,), UNKNOWN, dtype=torch.int64)
        self._told_as: dict[int, int] = {}
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def later(self, index: Tensor, labels: Tensor) -> None:
        """Take in a batch with the next ones; see ``note``, and ``settle`` before asking.

        Args:
            index: positions ``(m,)``, the caller's own.
            labels: ``(m,)``; a copy is held.
        """
        self._waiting.append((index, labels.clone()))
        if len(self._waiting) >= TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Take in the batches that wait.

        Raises:
            ValueError: see ``note``.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        where = torch.cat([index for index, _ in waiting]).cpu().numpy()
        new, known = torch.cat([labels for _, labels in waiting]).numpy(), self.known.numpy()
        before = known[where]
        if ((before == UNKNOWN) | (before == new)).all():
            known[where] = new
            if (known[where] == new).all():  # nearly always
                return
            known[where] = before
        for index, labels in waiting:  # to say what is wrong
            self.note(index, labels)

    def note(self, index: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            index: positions ``(m,)``.
            labels: ``(m,)``.

        Raises:
            ValueError: a position had another label before, or has two in this batch.
        """
        # by NumPy: on a few dozen numbers faster than tensors
        known, where, new = self.known.numpy(), index.cpu().numpy(), labels.numpy()
        before = known[where]
        other = (before != UNKNOWN) & (before != new)
        if other.any():
            i = int(other.argmax())
            raise ValueError(
                f"example {where[i]} had the label {before[i]} before and has "
                f"{new[i]} now ({int(other.sum())} of {len(where)} examples of this batch "
                "have changed): the batch's index must be the position of each example in the "
                "training set, the same in every batch and epoch, and a run that is resumed needs "
                "the data of its checkpoint"
            )
        known[where] = new  # writes into the tensor
        if (known[where] != new).any():
            raise ValueError(
                "an example stands in a batch twice with different labels: the batch's index must "
                "be the position of each example in the training set "
                "(fine_bench.with_index adds it)"
            )

    def compare(self, labels: Tensor, told: Tensor) -> None:
        """Compare a batch's labels with those that the loss was taken of.

        A module may make labels of its own (coarser ones, rotations); what it may not do is change
        the order. Classes that are only renamed are no change of order.

        Args:
            labels: of the batch, ``(m,)``.
            told: what the gradient at the logits implies, ``(m,)``.

        Raises:
            ValueError: the same labels in another order.
        """
        told = told.detach().cpu()
        pairs = list(zip(labels.tolist(), told.tolist(), strict=True))
        if all(a == b for a, b in pairs) or sorted(a for a, _ in pairs) != sorted(
            b for _, b in pairs
        ):
            return
        renamed = all(self._told_as.setdefault(a, b) == b for a, b in pairs)
        if not renamed:
            wrong = sum(a != b for a, b in pairs)
            raise ValueError(
                f"the loss was taken of the batch's labels in another order ({wrong} of "
                f"{len(pairs)} examples have another label in the gradient at the logits than in "
                "the batch): training_step changes the order of the examples, so the batch's "
                "index names other ones; shuffle in the DataLoader, or permute the index as well "
                "and hand it on with the batch"
            )

    def load(self, known: Tensor) -> None:
        """Go on from ``known`` of an earlier run."""
        self.known = known.clone()


__all__ = ["ExampleLabels", "hard_labels"]
