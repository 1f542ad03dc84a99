"""A sum over the batch is told from a mean that is as large, and the look waits for its batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fine_bench
from fine_bench.callback import FINECallback
from fine_bench.fine.loss_size import ExpectedLoss, cross_entropy_factor, is_sum
from fine_bench.types import UnsupportedProblemError
from support.tensors import close
from support.trainer_setting import sums
from support.training import QUIET

N, M, D, K = 16, 8, 6, 8  # as many classes as examples in a batch
LR = 0.1
WEIGHT = torch.arange(1.0, K + 1, dtype=torch.float64)
WEIGHT /= WEIGHT.sum()
Mean = Callable[[Tensor, Tensor], Tensor]


def data(n: int = N, seed: int = 1) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=draw, dtype=torch.float64)
    return TensorDataset(x, torch.arange(n) % K, torch.arange(n))


class Net(pl.LightningModule):
    """One linear layer behind dropout, fitted where it is scaled up."""

    def __init__(self, mean: Mean, p: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Dropout(p), nn.Linear(D, K)).double()
        self.mean = mean
        if scale != 1.0:  # least squares on the labels: every example is fitted
            x, y = data().tensors[:2]
            with torch.no_grad():
                targets = scale * F.one_hot(y, K).double()
                self.net[1].weight.copy_(torch.linalg.lstsq(x[:M], targets[:M]).solution.T)
                self.net[1].bias.zero_()
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []  # inputs of the layer, outputs, labels

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, _: int) -> Tensor | None:
        torch.manual_seed(self.global_step)  # the training's own dropout, drawn after the look
        a = self.net[0](batch[0])
        z = self.net[1](a)
        self.steps.append((a.detach(), z.detach(), batch[1]))
        return self.mean(z, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def fit(callback: FINECallback, net: Net, sizes: list[int] | None = None) -> None:
    batches: Any = DataLoader(data(), batch_size=M)
    if sizes is not None:
        rows = torch.arange(sum(sizes)).split(sizes)
        batches = DataLoader(data(), batch_sampler=[r.tolist() for r in rows])
    pl.Trainer(**QUIET, max_epochs=1, callbacks=[callback]).fit(net, batches)


def right(net: Net, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """μ of self with the loss from its formula: gradients of one example at a time.

    Args:
        net: that has been trained.
        factor: of labels, how much each example's cross-entropy counts in the batch's mean, times
            the number of examples.
    """
    up, down = torch.zeros(2, N, dtype=torch.float64)
    for step, (a, z, y) in enumerate(net.steps):
        rows = []
        for x, logits, label, w in zip(a, z, y, factor(y), strict=True):
            out = logits.clone().requires_grad_()
            (g,) = torch.autograd.grad(w * F.cross_entropy(out[None], label[None]), out)
            rows.append(torch.cat([torch.outer(g, x).flatten(), g]))
        gram = torch.stack(rows) @ torch.stack(rows).T
        for i in range(len(y)):
            others = torch.cat([gram[i, :i], gram[i, i + 1 :]])
            up[step * M + i] = LR * (gram[i, i] - others.mean())
            down[step * M + i] = (LR * others.std()).square()
    return up / (N * down).sqrt()


weighted: Mean = partial(F.cross_entropy, weight=WEIGHT)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_weights_that_add_up_to_one_over_as_many_classes_as_examples(p: float) -> None:
    """Σ w ℓ / Σ w is as large as the sum of the w ℓ, and is the stated loss's own mean."""
    queries = TensorDataset(*data(5, 2).tensors[:2])
    asked = FINECallback("validation", observable="loss", loss=weighted, queries=queries)
    own = FINECallback(observable="loss", loss=weighted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(asked, Net(weighted, p))
        net = Net(weighted, p)
        fit(own, net)
    assert asked.scores().values.abs().min() > 0
    each = lambda y: WEIGHT[y] / WEIGHT[y].sum() * len(y)  # noqa: E731
    close(sums(own)[0], right(net, each))


@pytest.mark.parametrize("stated", [False, True])
def test_a_fitted_model_whose_loss_with_dropout_is_many_times_that_without(stated: bool) -> None:
    net = Net(F.cross_entropy, p=0.5, scale=6.0)
    x, y = data()[:M][:2]
    with torch.no_grad():
        net.eval()
        without = float(F.cross_entropy(net(x), y))
        net.train()
        torch.manual_seed(0)
        times = float(F.cross_entropy(net(x), y)) / without / M
    assert 0.5 < times < 2.0  # it looks like a sum
    named = {"loss": partial(F.cross_entropy)} if stated else {}
    callback = FINECallback(observable="loss", **named)
    fit(callback, net)
    close(sums(callback)[0], right(net, lambda y: torch.ones(len(y))))


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("options", [{}, {"observable": "loss"}, {"observable": "margin"}], ids=str)
def test_a_sum_is_told_by_its_gradient(scale: float, options: Any) -> None:
    """Of fitted examples all gradients are small, so that their form says little by itself."""
    for p in (0.0, 0.5):
        net = Net(partial(F.cross_entropy, reduction="sum"), p, scale)
        with pytest.raises(UnsupportedProblemError, match="is the sum of the losses of the batch"):
            fit(FINECallback(**options), net)


def test_a_loop_without_the_loss_refuses_a_sum_of_fitted_examples() -> None:
    net = Net(F.cross_entropy, scale=12.0).net
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    x, y, index = data()[:M]
    fine = fine_bench.watch(net, optimizer=optimizer, train_size=N)
    fine.batch(index)
    F.cross_entropy(net(x), y, reduction="sum").backward()
    with pytest.raises(UnsupportedProblemError, match="is the sum of the cross-entropies"):
        optimizer.step()


def test_the_factor_is_read_off_the_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    for dtype, scale in ((torch.float64, 30.0), (torch.float32, 3.0), (torch.bfloat16, 1.0)):
        z = (scale * torch.randn(M, K, generator=draw)).to(dtype).requires_grad_()
        y = torch.randint(K, (M,), generator=draw)
        for loss, expected in (
            (F.cross_entropy(z, y), False),
            (F.cross_entropy(z, y, reduction="sum"), True),
            (F.cross_entropy(z, y) * 3, None),
            (F.cross_entropy(z, y, label_smoothing=0.3), None),
            (F.cross_entropy(z, y, weight=WEIGHT.to(dtype)), None),
        ):
            (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
            assert is_sum(cross_entropy_factor(z.detach(), grad), M) is expected
    z = z.detach()
    assert cross_entropy_factor(z, torch.zeros_like(z)) is None
    assert cross_entropy_factor(z[:, :1], z[:, :1]) is None
    assert is_sum(1.0, 1) is None


def test_dropout_drawn_anew_is_no_sum() -> None:
    expected = ExpectedLoss(3, 1.0, 1.0, random=True)
    expected.compare(1.7, stated=True, told=None)  # half as much again by chance
    with pytest.raises(UnsupportedProblemError, match="is the sum of the losses of the batch's 3"):
        expected.compare(3.1, stated=True, told=None)
    with pytest.raises(UnsupportedProblemError, match="is the sum"):
        ExpectedLoss(3, 1.0, 1.0, random=False).compare(3.0, stated=False, told=None)
    ExpectedLoss(3, 1.0, 1.0, random=False).compare(3.1, stated=False, told=None)
    ExpectedLoss(3, 1.0, 3.0, random=False).compare(3.0, stated=True, told=None)  # weighs them


# ------------------------------------------------------------------ the look waits


def variance(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 0.01 * z.var(0, correction=0).sum()


def summed(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, F.one_hot(y, K).double(), reduction="none").mean(1).sum()


def squares(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    each = F.mse_loss(z, F.one_hot(y, K).double(), reduction="none").mean(1)
    return each if reduction == "none" else each.mean()


class Skips(Net):
    """Trains nothing on its first two batches."""

    def training_step(self, batch: Any, i: int) -> Tensor | None:
        return None if i < 2 else super().training_step(batch, i)


WAITS = [("mixes its examples", variance, {}), ("is the sum of", summed, {"loss": squares})]


@pytest.mark.parametrize(("words", "mean", "named"), WAITS, ids=["mixes", "sums"])
@pytest.mark.parametrize("kind", [Net, Skips])
def test_the_look_waits_for_a_batch_that_shows_the_loss(
    kind: Any, words: str, mean: Mean, named: Any
) -> None:
    sizes = [1, 1, 8] if kind is Net else [4, 4, 4, 4]
    with pytest.raises(UnsupportedProblemError, match=words):
        fit(FINECallback(observable="loss", **named), kind(mean), sizes)


def test_a_loop_waits_as_well() -> None:
    for begin in ("one example", "no backward pass"):
        net = Net(variance).net
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        fine = fine_bench.watch(net, optimizer=optimizer, train_size=N, observable="loss")
        x, y, _ = data().tensors
        rows = slice(0, 1) if begin == "one example" else slice(0, M)
        fine.batch(torch.arange(N)[rows], y[rows])
        loss = variance(net(x[rows]), y[rows])
        if begin == "one example":
            fine.loss(loss).backward()
            optimizer.step()
        else:
            fine.skip()
        fine.batch(torch.arange(M), y[:M])
        loss = variance(net(x[:M]), y[:M])
        with pytest.raises(UnsupportedProblemError, match="mixes its examples"):
            fine.loss(loss)
        fine.close()


def test_a_look_that_waits_costs_nothing() -> None:
    """Passes beside the training: for the first batch, and for the first of several examples."""
    net, counts = Net(F.cross_entropy), list[int]()
    net.net[1].register_forward_hook(lambda *_: counts.append(len(net.steps)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(FINECallback(observable="loss"), net, [1, 1, 1, 4, 1, 4, 4])
    beside = [counts.count(step) - 1 for step in range(7)]
    assert beside[0] > 0
    assert beside[3] > 0
    assert [beside[i] for i in (1, 2, 4, 5, 6)] == [0] * 5
