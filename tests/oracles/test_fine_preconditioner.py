"""The optimiser's preconditioner in the statistic, against a twin in float64."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.geometry_optimiser import inverse_scale
from fine_bench.gradients import GradientEngine
from fine_bench.gradients.diagonal import (
    diagonal_gram,
    diagonal_norm2,
    scaled_direction,
    weights_for_direction,
)
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET, Diary

N, BATCH, CLASSES, EPS, BETAS = 20, 5, 3, 1e-3, (0.8, 0.9)


def rate(t: int) -> float:
    return 0.05 / (1 + 0.1 * t)


class Small(pl.LightningModule):
    def __init__(self, kind: str = "Adam", **options: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()
        self.kind, self.settings = kind, options

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), lr=1.0, **self.settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data(n: int = N, seed: int = 7) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (n,), generator=g), torch.arange(n))


def watch(target: Any = "self", **options: Any) -> FINECallback:
    queries = None if target == "self" else TensorDataset(*data(6, 8).tensors[:2])
    return FINECallback(target, queries=queries, **options)


def fit(callbacks: list[pl.Callback], module: Small, epochs: int = 3) -> None:
    trainer = pl.Trainer(max_epochs=epochs, **QUIET, callbacks=callbacks)
    trainer.fit(module, DataLoader(data(), batch_size=BATCH))


def mu(callback: FINECallback) -> Tensor:
    callback.scores()
    assert callback._schedule is not None
    return callback._schedule.accumulator.mu()[0]


def gradients(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    net = Small().net

    def loss(values: Any, xi: Tensor, yi: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, values, (xi[None],)), yi[None])

    parts = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in parts.values()], 1)


@pytest.mark.any_trainer("learning-rate schedules")
@pytest.mark.any_trainer("Adam, AdamW")
@pytest.mark.parametrize(("kind", "amsgrad"), [("Adam", False), ("AdamW", False), ("Adam", True)])
@pytest.mark.parametrize("target", ["self", "validation"])
def test_adam(kind: str, amsgrad: bool, target: Any) -> None:
    callback = watch(target, observable="loss", preconditioner="optimiser", refresh_every=1)
    plain = watch(target, observable="loss", refresh_every=1)
    diary = Diary()
    settings: dict[str, Any] = {"betas": BETAS, "eps": EPS, "amsgrad": amsgrad}
    if kind == "AdamW":
        settings["weight_decay"] = 0.1
    fit([callback, plain, diary], Small(kind, **settings))
    x, y, _ = data().tensors
    xq, yq, _ = data(6, 8).tensors
    v, largest, top, bottom = 0.0, torch.zeros(()), torch.zeros(N), torch.zeros(N)
    top, bottom = top.double(), bottom.double()
    for t, (params, index) in enumerate(diary.steps):
        g = gradients(params, x[index], y[index])
        if t:  # before its first step Adam remembers nothing
            now = (largest if amsgrad else v) / (1 - BETAS[1] ** t)
            inverse = 1.0 / (now.sqrt() + EPS)  # type: ignore[union-attr]
            products = g @ (g * inverse).T
            if target == "validation":
                h = gradients(params, xq, yq)
                h = h / (g @ (h * inverse).T).std(0)[:, None]
                products = ((h.mean(0) * inverse) @ g.T).expand(BATCH, BATCH)
            for k, i in enumerate(index.tolist()):
                others = torch.cat([products[k, :k], products[k, k + 1 :]])
                top[i] += rate(t) * (products[k, k] - others.mean())
                bottom[i] += rate(t) ** 2 * others.var()
        mean = g.mean(0)
        v = BETAS[1] * v + (1 - BETAS[1]) * mean.square()
        largest = torch.maximum(largest, v)
    expected = top / (N * bottom).sqrt()
    assert float((mu(callback)[0] - expected).abs().max()) < 1e-9
    assert float((mu(plain)[0] - expected).abs().max()) > 1e-2
    assert callback._schedule.n_without_memory == 1  # type: ignore[union-attr]


@pytest.mark.any_trainer("momentum")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_has_none(momentum: float) -> None:
    callback, plain = watch(preconditioner="optimiser"), watch()
    fit([callback, plain], Small("SGD", momentum=momentum))
    assert torch.equal(mu(callback), mu(plain))


def test_snapshots_read_it_too() -> None:
    options = {"schedule": "snapshot", "n_snapshots": 1, "n_reference": N, "observable": "loss"}
    callback, diary = watch(preconditioner="optimiser", **options), Diary()
    module = Small("Adam", betas=BETAS, eps=EPS)
    fit([callback, diary], module)
    x, y, _ = data().tensors
    v: Any = 0.0
    for params, index in diary.steps:
        mean = gradients(params, x[index], y[index]).mean(0)
        v = BETAS[1] * v + (1 - BETAS[1]) * mean.square()
    inverse = 1.0 / ((v / (1 - BETAS[1] ** len(diary.steps))).sqrt() + EPS)
    g = gradients(dict(module.net.named_parameters()), x, y).detach()
    gram = g @ (g * inverse).T
    rates = torch.tensor([rate(t) for t in range(len(diary.steps))], dtype=torch.float64)
    expected = []
    for i in range(N):
        others = torch.cat([gram[i, :i], gram[i, i + 1 :]])
        variance = float((rates.square() / BATCH).sum()) * others.var()
        shift = float(rates.sum()) * (gram[i, i] - others.mean()) / N
        expected.append(shift / variance.sqrt())
    assert float((mu(callback)[0] - torch.stack(expected)).abs().max()) < 1e-9


class Everything(nn.Module):
    """Every kind of block: table, convolution, groups, norm, a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.groups = nn.Conv1d(6, 6, 3, groups=2)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.last = nn.Linear(6, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.groups(torch.tanh(self.conv(self.table(x).mT))).mT
        return self.last((self.norm(torch.tanh(h)) * self.scale).mean(1))


def test_diagonal_products_of_every_kind_of_block() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Everything().double()
        x, y = torch.randint(7, (8, 9)), torch.randint(CLASSES, (8,))
        d = {id(p): torch.rand_like(p) + 0.1 for p in model.parameters()}
    recorder = LayerRecorder(model)
    engine = GradientEngine(model, F.cross_entropy)
    first, second = engine(x, y), engine(x[:5], y[:5])
    weights = [[d[id(p)] for p in part] for part in recorder.parameters().values()]
    assert [b.name for b in first.blocks] == list(recorder.parameters())
    direction = [b.diagonal_weights(w) for b, w in zip(first.blocks, weights, strict=True)]
    flat = torch.cat([w.flatten() for part in weights for w in part])
    a, b = first.dense(), second.dense()
    assert torch.allclose(diagonal_gram(first, second, direction), (a * flat) @ b.T)
    assert torch.allclose(diagonal_norm2(first, direction), (a.square() * flat).sum(1))
    rows = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums = second.weighted_sum(rows)
    again = [weights_for_direction(s, w) for s, w in zip(sums, weights, strict=True)]
    solved = first.contract(scaled_direction(sums, again))
    assert torch.allclose(solved, ((rows @ b) * flat) @ a.T)
    with pytest.raises(TypeError, match="different kinds"):
        diagonal_gram(first, type(first)(first.blocks[::-1]), direction)


def test_adams_scale() -> None:
    p = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.1, betas=(0.0, 0.9), eps=1e-3)
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.tensor([0.5, -3.0], dtype=torch.float64)
        optimizer.step()
        inverse = inverse_scale(optimizer.state[p], optimizer.param_groups[0])
        assert torch.allclose(before - p.detach(), 0.1 * p.grad * inverse)


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedProblemError, match="knows SGD, Adam and AdamW, not Adagrad"):
        fit([watch(preconditioner="optimiser")], Small("Adagrad"))
    with pytest.raises(ValueError, match='must be "optimiser" or None'):
        watch(preconditioner="adam")
    with pytest.raises(ValueError, match="is a geometry of its own"):
        watch(preconditioner="optimiser", geometry="ekfac")
