"""Training a task's model again on treated data: another label, another weight, or left out.

``cure`` asks for nothing but the two functions ``Retrain`` and ``MeanProbabilities``; those here
train one model after the other. With given labels and weights of one, training is that of the
benchmark, step for step and bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.data.batches import loader
from fine_bench.errors import ConfigError
from fine_bench.models.classifier import DivergedError
from fine_bench.models.lr_schedule import lr_at
from fine_bench.runner.backends.images import build_model, images_of
from fine_bench.runner.plan import Job
from fine_bench.seeds import stream
from fine_bench.types import LRSchedule

Retrain: TypeAlias = Callable[[Job, Tensor, Tensor, Sequence[int]], list[float]]
"""``retrain(job, labels (K, n), weights (K, n), seeds (K)) -> K test accuracies``"""

MeanProbabilities: TypeAlias = Callable[[Job, int], Tensor]
"""``mean_probabilities(job, seed) -> (n, n_classes)``"""

_EVALUATION_BATCH = 1024


def retrain(job: Job, labels: Tensor, weights: Tensor, seeds: Sequence[int]) -> list[float]:
    """Train K models of the job's recipe and measure each on the clean test part.

    Example i has the loss w_i · cross-entropy(label_i), and a step minimises its sum over the
    batch divided by the batch's size. Weight 0 leaves the example out: it is in no batch. The
    number of epochs stays, so fewer examples make fewer steps.

    Args:
        job: task, model and recipe.
        labels: ``(K, n)`` int64.
        weights: ``(K, n)``, ≥ 0, finite.
        seeds: run seeds ``(K)``: initialisation and order.

    Returns:
        K accuracies in [0, 1].

    Raises:
        ValueError: shapes that do not fit, bad weights, or no example left.
        DivergedError: a loss that is no longer finite.
    """
    data = images_of(job)
    shape = (len(seeds), data.n_train)
    if labels.shape != shape or weights.shape != shape:
        raise ValueError(
            f"labels and weights must have shape {shape}, got {tuple(labels.shape)} and "
            f"{tuple(weights.shape)}"
        )
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("weights must be finite and not negative")
    found = []
    for y, w, seed in zip(labels, weights, seeds, strict=True):
        *_, net = epochs(job, y, w, seed)
        right = _logits(net, data.test_x).argmax(1) == data.test_y
        found.append(float(right.double().mean()))
    return found


def mean_probabilities(job: Job, seed: int) -> Tensor:
    """Probabilities of the classes for every training example, ``(n, n_classes)`` float64.

    From one run on the data as given, averaged over the ends of its epochs: early epochs, at
    which wrong labels are not memorised yet, count as much as the last.
    """
    total = torch.zeros(job.data.n_train, job.data.n_classes, dtype=torch.float64)
    for net in epochs(job, images_of(job).y, torch.ones(job.data.n_train), seed):
        total += torch.softmax(_logits(net, job.data.x).double(), 1)
    return total / job.config.trainer.max_epochs


def epochs(job: Job, y: Tensor, weights: Tensor, seed: int) -> Iterator[nn.Module]:
    """Train one model as ``retrain`` does; the network at the end of each epoch.

    It is one network, which goes on training when the next is asked for.
    """
    trainer = job.config.trainer
    if trainer.lr_schedule not in get_args(LRSchedule):
        raise ConfigError(
            f"lr_schedule={trainer.lr_schedule} cannot be trained again here; use a task trained "
            f"with one of {', '.join(get_args(LRSchedule))}"
        )
    schedule = cast(LRSchedule, trainer.lr_schedule)
    kept = weights.nonzero()[:, 0]
    if len(kept) == 0:
        raise ValueError("no example is left to train on; touch fewer")
    x, y, weights = job.data.x[kept], y[kept], weights[kept].to(job.data.x.dtype)
    uniform = bool((weights == 1).all())
    net = build_model(replace(job, config=replace(job.config, seed=seed))).net.train()
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=trainer.lr,
        momentum=trainer.momentum,
        weight_decay=trainer.weight_decay,
        foreach=False,  # the same numbers; faster for a few small parameters
    )
    order = stream(seed if trainer.order_seed is None else trainer.order_seed, "order")
    batches = loader(x, y, batch_size=trainer.batch_size, generator=order, shuffle=True)
    total = trainer.max_epochs * len(batches)
    step = 0
    for _ in range(trainer.max_epochs):
        # not read beyond the last batch, as Lightning does not: the sampler's end draws too
        for batch_x, batch_y, rows in islice(batches, len(batches)):
            optimizer.param_groups[0]["lr"] = lr_at(schedule, trainer.lr, step, total)
            optimizer.zero_grad()
            logits = net(batch_x)
            if uniform:
                loss = F.cross_entropy(logits, batch_y)
            else:
                loss = (weights[rows] * F.cross_entropy(logits, batch_y, reduction="none")).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        if not bool(torch.isfinite(loss)):
            raise DivergedError(f"retraining with seed {seed} diverged; lower the step size")
        yield net
        net.train()


@torch.no_grad()
def _logits(net: nn.Module, x: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(part) for part in torch.split(x, _EVALUATION_BATCH)])
