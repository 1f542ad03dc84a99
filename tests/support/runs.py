"""A training run under f-INE, and its scores example by example from the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.gradients import GradientEngine
from fine_bench.gradients.curvature.products import parameter_names
from support.gradients import same
from support.tensors import close
from support.training import QUIET, Diary

LR = 0.1

Built = tuple[nn.Module, Tensor, Tensor]
"""A classifier in float64, its examples, their labels."""


class Run(pl.LightningModule):
    """Any network under plain SGD, the mean of ``loss(logits, y, reduction="none")``."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1], reduction="none").mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR)


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[..., Tensor],
    callbacks: list[FINECallback],
    *,
    batch: int = 6,
    epochs: int = 2,
    **options: Any,
) -> Diary:
    """Train; the batches are drawn by a generator of their own."""
    diary = Diary()
    loader = DataLoader(
        TensorDataset(x, y, torch.arange(len(x))),
        batch_size=batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(11),
    )
    pl.Trainer(**QUIET, max_epochs=epochs, callbacks=[*callbacks, diary], **options).fit(
        Run(net, loss), loader
    )
    return diary


def one_at_a_time(
    net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, loss: Callable[..., Tensor]
) -> Tensor:
    """Gradients of each example's own loss by a pass with it alone, ``(n, P)``."""
    rows = []
    for xi, yi in zip(x, y, strict=True):
        values = {k: p.detach().requires_grad_() for k, p in params.items()}
        value = loss(functional_call(net, values, (xi[None],)), yi[None], reduction="none").sum()
        grads = torch.autograd.grad(value, list(values.values()), allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(grads, values.values(), strict=True)
        ]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def mu_of_self(
    net: nn.Module, diary: Diary, x: Tensor, y: Tensor, loss: Callable[..., Tensor]
) -> Tensor:
    """μ of the target self on the loss, substitution, accumulated, ``(n,)``; in float64."""
    numerator, denominator = torch.zeros(2, len(x), dtype=torch.float64)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    for params, index in diary.steps:
        if len(index) < 3:  # no standard deviation of two others
            continue
        values = {name: p for name, p in params.items() if name in trained}
        g = one_at_a_time(net, values, x[index], y[index], loss)
        gram = g @ g.T
        for position, i in enumerate(index.tolist()):
            others = torch.cat([gram[position, :position], gram[position, position + 1 :]])
            numerator[i] += LR * (gram[position, position] - others.mean())
            denominator[i] += (LR * others.std()).square()
    return numerator / (len(x) * denominator).sqrt()


def check_engine(built: Built) -> GradientEngine:
    """Gradients of all examples at once are those of one after the other, for every parameter."""
    net, x, y = built
    engine = GradientEngine(net, F.cross_entropy)
    params = dict(net.named_parameters())
    names = parameter_names(engine.recorder)
    assert sorted(names) == sorted(params)
    values = {name: params[name] for name in names}
    for _ in range(2):
        same(engine(x, y), one_at_a_time(net, values, x, y, F.cross_entropy))
        x, y = torch.cat([x, x.flip(0)]), torch.cat([y, y])  # more of them than before
    return engine


def check_run(build: Callable[[], Built], **options: Any) -> None:
    """f-INE on the loss as the definition has it, and a run whose weights it does not change.

    Args:
        build: gives the same weights and examples every time.
        options: of ``fit``.
    """
    (net, x, y), (again, _, _) = build(), build()
    watched = FINECallback(observable="loss")
    diary = fit(net, x, y, F.cross_entropy, [watched], **options)
    expected = mu_of_self(net, diary, x, y, F.cross_entropy)
    close(watched.scores().values[0].double(), expected, 1e-5)
    fit(again, x, y, F.cross_entropy, [], **options)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def scores_of(built: Built, epochs: int = 2, n_query: int = 4, **options: Any) -> Tensor:
    """Scores of a run under ``FINECallback(**options)``; its first examples are the queries."""
    net, x, y = built
    if "target" in options:
        options["queries"] = TensorDataset(x[:n_query], y[:n_query])
    watched = FINECallback(**options)
    fit(net, x, y, F.cross_entropy, [watched], epochs=epochs)
    return watched.scores().values
