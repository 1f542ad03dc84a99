"""Training many models at once: the same recipe, each its own subset, initialisation and order.

``train_stack`` takes M networks, M subsets and M random streams and trains all M in one loop.
Fully connected networks go the fast way (``fine_bench.retraining.train_dense``), all others through
``torch.func`` (``fine_bench.retraining.train_mapped``). ``train_one`` is the same training of one
model with nothing but autograd and ``torch.optim.SGD``.

A model that is given all examples is, to floating-point accuracy, the benchmark's own run: the
order of the examples repeats the draws of ``RandomSampler`` under Lightning. With dropout it is
another run of the same recipe: Lightning's drops by the global random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_bench.gradients.batch_products import is_dense
from fine_bench.gradients.margin import margins
from fine_bench.models.lr_schedule import check_schedule, lr_at
from fine_bench.retraining.train_dense import DenseStack
from fine_bench.retraining.train_mapped import ModuleStack
from fine_bench.types import LRSchedule

CPU_STACK = 8
GPU_STACK = 128
"""Models trained at once. On a CPU a few are enough to hide what is not a matrix product, and more
only leave the cache (measured by benchmarks/bank_throughput.py); a GPU needs many to be busy."""

_EVALUATED_NUMBERS = {"cpu": 2**21, "cuda": 2**24}


class DivergedModelError(RuntimeError):
    """Training gave parameters or outputs that are no finite numbers."""


@dataclass(frozen=True)
class Recipe:
    """How every model is trained: softmax cross-entropy by SGD. Checked at birth.

    Attributes:
        max_epochs: passes over a model's own examples, ≥ 1.
        batch_size: examples a step, ≥ 1; the last batch of an epoch may be shorter.
        lr: step size, > 0.
        momentum, weight_decay: of ``torch.optim.SGD``, ≥ 0.
        lr_schedule: ``"constant"`` or ``"cosine"``; see ``fine_bench.models.lr_schedule``.
    """

    max_epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_schedule: LRSchedule = "constant"

    def __post_init__(self) -> None:
        for name in ("max_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, got {self.lr}")
        for name in ("momentum", "weight_decay"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        check_schedule(self.lr_schedule)

    def lr_at(self, step: int, n_steps: int) -> float:
        """Step size of step ``step`` of ``n_steps``, counted from 0."""
        return lr_at(self.lr_schedule, self.lr, step, n_steps)

    def steps_per_epoch(self, n: int) -> int:
        """Batches in a pass over ``n`` examples."""
        return math.ceil(n / self.batch_size)


class Stack(Protocol):
    """M models in training."""

    def __len__(self) -> int: ...

    def step(self, x: Tensor, y: Tensor, lr: float, weights: Tensor | None = None) -> None:
        """One step of SGD on ``x (M, m, ...)``, ``y (M, m)``, whose losses have ``weights``."""

    def logits(self, x: Tensor) -> Tensor:
        """``(M, c, classes)`` of the same ``x (c, ...)`` under every model."""

    def finite(self) -> Tensor:
        """``(M,)`` boolean."""

    def parameters(self, k: int) -> dict[str, Tensor]:
        """Model ``k`` as its network names and shapes them."""


def default_stack(net: nn.Module, device: torch.device | str = "cpu") -> int:
    """How many models like ``net`` to train at once there."""
    # convolutions of several models at once are slower on a CPU than one after the other, and
    # what they keep for the backward pass fills a GPU
    convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in net.modules())
    if torch.device(device).type == "cpu":
        return 1 if convolves else CPU_STACK
    return GPU_STACK // 8 if convolves else GPU_STACK


def epoch_order(n: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """The order of one epoch, ``(n,)`` positions, by the draws of ``RandomSampler``.

    A sampler that is read to its end draws an order for nothing. Lightning knows the number of
    batches and reads no further: the end is only met when the last batch is a short one.
    """
    order = torch.randperm(n, generator=generator)
    if n % batch_size:
        torch.randperm(n, generator=generator)
    return order


def train_stack(
    nets: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    subsets: Tensor,
    orders: Sequence[torch.Generator],
    recipe: Recipe,
    names: Sequence[str] | None = None,
    draws: Sequence[torch.Generator] | None = None,
) -> Stack:
    """Train M models at once.

    Args:
        nets: M initialised networks of one architecture; they are left as they are.
        x: ``(n, ...)`` inputs, on the device to train on.
        y: ``(n,)`` labels beside them.
        subsets: ``(M, s)`` int64, the positions of each model's own examples, ascending.
        orders: M CPU generators that draw each model's orders.
        recipe: how to train.
        names: what to call each model in an error.
        draws: M CPU generators for the networks' dropout; None refuses those that have it.

    Raises:
        DivergedModelError: with the model's name.
        UnsupportedProblemError: a network that cannot be trained in a stack.
    """
    n_models, size = subsets.shape
    if not len(nets) == len(orders) == n_models:
        raise ValueError(
            f"{len(nets)} networks, {n_models} subsets and {len(orders)} orders do not match; "
            "every model needs one of each"
        )
    if size < recipe.batch_size:
        raise ValueError(
            f"batch_size={recipe.batch_size} is larger than a subset of {size} examples"
        )
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    stack: Stack
    if is_dense(nets[0], x):
        stack = DenseStack(nets, x.device, **options)
    else:
        stack = ModuleStack(nets, x.device, **options, draws=draws)
    buffer = x.new_empty((n_models * recipe.batch_size, *x.shape[1:]))
    n_steps, t = recipe.max_epochs * recipe.steps_per_epoch(size), 0
    for _ in range(recipe.max_epochs):
        drawn = torch.stack([epoch_order(size, recipe.batch_size, order) for order in orders])
        epoch = subsets.gather(1, drawn).to(x.device)
        for rows in torch.split(epoch, recipe.batch_size, dim=1):
            batch = buffer[: rows.numel()]
            torch.index_select(x, 0, rows.reshape(-1), out=batch)
            batch = batch.view(*rows.shape, *x.shape[1:])
            stack.step(batch, y[rows], recipe.lr_at(t, n_steps))
            t += 1
        _require_finite(stack.finite(), names, recipe)
    return stack


def train_one(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    subset: Tensor,
    order: torch.Generator,
    recipe: Recipe,
) -> nn.Module:
    """Train one model in place, the plain way: the reference of ``train_stack``.

    Args:
        net: initialised, on the device of ``x``.
        subset: ``(s,)`` int64, the positions of its examples, ascending.
        order: draws its orders.
    """
    optimizer = torch.optim.SGD(
        net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    n_steps, t = recipe.max_epochs * recipe.steps_per_epoch(len(subset)), 0
    net.train()
    for _ in range(recipe.max_epochs):
        epoch = subset[epoch_order(len(subset), recipe.batch_size, order)].to(x.device)
        for rows in torch.split(epoch, recipe.batch_size):
            optimizer.param_groups[0]["lr"] = recipe.lr_at(t, n_steps)
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            t += 1
    return net


@torch.no_grad()
def evaluate(
    stack: Stack,
    x: Tensor,
    y: Tensor,
    names: Sequence[str] | None = None,
    recipe: Recipe | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and margin of every example under every model, each ``(M, n)`` on the CPU.

    The loss is log(1 + exp(−margin)), exact where the probability of the label is nearly one.

    Args:
        stack: the models.
        x, y: ``(n, ...)`` and ``(n,)``, on the models' device.
        names, recipe: for the error.

    Raises:
        DivergedModelError: an output is no finite number.
    """
    at_once = _EVALUATED_NUMBERS.get(x.device.type, _EVALUATED_NUMBERS["cuda"])
    rows = max(16, at_once // (len(stack) * x[0].numel()))
    found = []
    for part, labels in zip(torch.split(x, rows), torch.split(y, rows), strict=True):
        found.append(margins(stack.logits(part), labels.expand(len(stack), -1)).cpu())
    margin = torch.cat(found, dim=1)
    _require_finite(margin.isfinite().all(1), names, recipe)
    return -F.logsigmoid(margin), margin


def _require_finite(finite: Tensor, names: Sequence[str] | None, recipe: Recipe | None) -> None:
    if bool(finite.all()):
        return
    k = int((~finite).nonzero()[0])
    name = names[k] if names is not None else f"model {k}"
    advice = "" if recipe is None else f", for instance trainer.lr={recipe.lr / 10:g}"
    raise DivergedModelError(
        f"{name} diverged: its weights or outputs are no finite numbers; lower the step size"
        f"{advice}"
    )
