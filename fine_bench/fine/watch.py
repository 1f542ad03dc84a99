"""f-INE in a training loop of your own, in plain PyTorch.

    with fine_bench.watch(model, optimizer=optimizer, train_size=len(train)) as fine:
        for x, y, index in loader:
            fine.batch(index)                  # before the forward pass: who is in it
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    fine.scores().values                       # (1, n_train)

Where another question is asked than ``self`` with margins, ``fine.loss(loss).backward()`` hands the
loss on, so that it can be looked at.

What a Trainer announces is seen here by itself: the backward pass by the gradients that arrive at
the parameters, the step by the optimiser's own hooks. Engine and scores are those of
``FINECallback``; Lightning is not needed. A loop that tells too little, or something else than it
does, is refused with what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from fine_bench.fine.criterion import per_example
from fine_bench.fine.loop import WatchedLoop
from fine_bench.fine.loop_batch import UnreadExamples
from fine_bench.fine.options import Options
from fine_bench.types import Loss


def watch(
    model: nn.Module,
    loss: Loss | nn.Module = F.cross_entropy,
    *,
    optimizer: Optimizer,
    train_size: int | None = None,
    train_set: Dataset[Any] | None = None,
    collate: Callable[[Any], Any] | None = None,
    accumulate: int = 1,
    scaler: Any = None,
    total_steps: int | None = None,
    **options: Any,
) -> WatchedLoop:
    """Watch a training loop in plain PyTorch; see the module's text for how it looks.

    Args:
        model: the network in training, on its device.
        loss: the training loss: ``loss(output, y, reduction=…)``, or a module such as
            ``torch.nn.CrossEntropyLoss()``. It is asked where passes beside the training need it
            (queries, snapshots, EK-FAC); its mean over the batch is what the loop calls backward
            on.
        optimizer: steps the loop; its step is where a batch is observed.
        train_size: number of training examples; ``index`` counts from 0 to train_size − 1.
        train_set: the training examples by position, ``(x, y, …)``, instead of or beside
            train_size; snapshots and EK-FAC read them.
        collate: makes a batch of items of train_set; the default one if None.
        accumulate: batches whose gradients make up a step, ≥ 1, each with its loss divided by this
            number. An epoch's last step may have fewer.
        scaler: the ``torch.amp.GradScaler`` of a loop in 16-bit precision.
        total_steps: of the run, for ``n_snapshots``.
        options: further fields of ``fine_bench.fine.options.Options``: ``target``, ``observable``,
            ``queries``, …, as for ``FINECallback``.

    Raises:
        UnsupportedProblemError: as ``FINECallback``; a model that is spread over devices.
        TypeError, ValueError: bad arguments.
    """
    if isinstance(loss, nn.Module):
        loss = per_example(loss)
    if loss is not F.cross_entropy:
        options["loss"] = loss
    asked = Options(train_size=train_size, **options)
    if train_set is None:
        if train_size is None:
            raise ValueError(
                "f-INE needs the number of training examples: pass train_size=len(dataset), or "
                "train_set=dataset"
            )
        if asked.schedule == "snapshot" or asked.geometry == "ekfac":
            raise ValueError(
                "snapshots and the EK-FAC geometry read training examples by their positions: pass "
                "train_set=dataset, whose items are (x, y, …)"
            )
        train_set = UnreadExamples()
    return WatchedLoop(
        model,
        asked,
        optimizer=optimizer,
        train=train_set,
        collate=collate,
        accumulate=accumulate,
        scaler=scaler,
        total_steps=total_steps,
    )


__all__ = ["watch"]
