"""In-run data Shapley against twins in float64, the exact game, and the measured drop."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from baselines.in_run_shapley import InRunShapleyCallback
from support.training import QUIET, Diary

N, N_QUERY, CLASSES, BATCH = 17, 7, 3, 5  # 17 = 3 · 5 + 2: the last batch is shorter
ROWS = {
    "validation": [list(range(N_QUERY))],
    "validation_per_class": [[0, 3, 6], [1, 4], [2, 5]],
    "queries": [[v] for v in range(N_QUERY)],
}


class Module(pl.LightningModule):
    """Plain SGD on a small smooth network, in float64."""

    def __init__(self, net: nn.Module, lr: float, reduction: str = "mean") -> None:
        super().__init__()
        self.net, self.lr, self.reduction = net.double(), lr, reduction

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction=self.reduction)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def network(kind: str = "mlp") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "mlp":
            return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        if kind == "slopes":  # a layer without factors
            return nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, CLASSES))
        return nn.Sequential(
            nn.Unflatten(1, (1, 5)),
            nn.Conv1d(1, 3, 2),
            nn.Softplus(),
            nn.Flatten(),
            nn.LayerNorm(12),
            nn.Linear(12, CLASSES, bias=False),
        )


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x, xq = (torch.randn(k, 5, generator=g, dtype=torch.float64) for k in (N, N_QUERY))
    return x, torch.randint(CLASSES, (N,), generator=g), xq, torch.arange(N_QUERY) % CLASSES


def queries() -> TensorDataset:
    _, _, xq, yq = data()
    return TensorDataset(xq, yq)


def fit(
    callbacks: list[pl.Callback],
    lr: float = 0.3,
    kind: str = "mlp",
    reduction: str = "mean",
    **options: Any,
) -> Module:
    x, y, _, _ = data()
    module = Module(network(kind), lr, reduction)
    loader = DataLoader(
        TensorDataset(x, y, torch.arange(N)),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(11),
    )
    trainer = pl.Trainer(
        **{"max_epochs": 2, **options},
        **QUIET,
        callbacks=callbacks,
    )
    trainer.fit(module, loader)
    return module


def flat_loss(
    net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[Any, Tensor, Any]:
    """The mean loss as a function of one vector θ, θ itself, and per-example losses."""
    shapes = {k: v.shape for k, v in params.items()}
    theta = torch.cat([v.reshape(-1) for v in params.values()])

    def each(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [s.numel() for s in shapes.values()])
        named = {k: p.reshape(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(net, named, (x,)), y, reduction="none")

    return (lambda vector: each(vector).mean()), theta, each


def twin(kind: str, diary: Diary, target: str, order: int, lr: float) -> Tensor:
    """Σ_t η ⟨g_i/m, g − ½ η H ḡ⟩, with the Hessian itself, matrix by matrix."""
    net = network(kind).double()
    x, y, xq, yq = data()
    found = torch.zeros(len(ROWS[target]), N, dtype=torch.float64)
    for params, index in diary.steps:
        _, theta, each = flat_loss(net, params, x[index], y[index])
        g = torch.autograd.functional.jacobian(each, theta)
        mean = g.mean(0)
        for r, members in enumerate(ROWS[target]):
            value, _, _ = flat_loss(net, params, xq[members], yq[members])
            direction = torch.autograd.functional.jacobian(value, theta)
            if order == 2:
                hessian = torch.autograd.functional.hessian(value, theta)
                direction = direction - 0.5 * lr * hessian @ mean
            found[r, index] += lr * (g @ direction) / len(index)
    return found


CASES = [
    ("mlp", "validation", 1),
    ("mlp", "validation", 2),
    ("mlp", "validation_per_class", 1),
    ("mlp", "validation_per_class", 2),
    ("mlp", "queries", 1),
    ("cnn", "validation", 1),
    ("cnn", "validation", 2),
    ("cnn", "queries", 1),
    ("slopes", "validation", 1),
    ("slopes", "queries", 1),
]


@pytest.mark.parametrize(("kind", "target", "order"), CASES)
def test_against_the_formula(kind: str, target: Any, order: Any) -> None:
    callback, diary = InRunShapleyCallback(target, queries=queries(), order=order), Diary()
    fit([callback, diary], kind=kind)
    expected = twin(kind, diary, target, order, 0.3)
    found = callback._accumulator._values
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(callback.scores().values, found.float())
    counts = callback.scores().n_observations
    assert counts is not None
    assert torch.equal(counts, torch.full((N,), 2))
    torch.testing.assert_close(callback.drop(), expected.sum(1))
    # the curvature term must matter, or the comparison says nothing
    if order == 2:
        first = twin(kind, diary, target, 1, 0.3)
        assert float((first - expected).abs().max()) > 0.01 * float(expected.abs().max())


def test_a_summed_loss_is_shared_as_it_is() -> None:
    """What is shared is the step: a sum of losses with η/m is the mean with η."""
    x, y, _, _ = data()
    mean, total = (InRunShapleyCallback(queries=queries(), order=2) for _ in range(2))

    def run(callback: pl.Callback, lr: float, reduction: str) -> None:
        pl.Trainer(
            **QUIET, max_epochs=2, callbacks=[callback],
        ).fit(
            Module(network(), lr, reduction),
            DataLoader(TensorDataset(x, y, torch.arange(N)), batch_size=N),
        )  # fmt: skip

    run(mean, 0.3, "mean")
    run(total, 0.3 / N, "sum")
    torch.testing.assert_close(mean._accumulator._values, total._accumulator._values)


def shapley_values(m: int, worth: Any) -> Tensor:
    """Shapley values from their definition, over all coalitions of m players."""
    found = torch.zeros(m, dtype=torch.float64)
    for i in range(m):
        others = [j for j in range(m) if j != i]
        for size in range(m):
            share = math.factorial(size) * math.factorial(m - 1 - size) / math.factorial(m)
            for chosen in itertools.combinations(others, size):
                found[i] += share * (worth([*chosen, i]) - worth(list(chosen)))
    return found


def test_values_are_the_shapley_values_of_the_game() -> None:
    """Of its quadratic expansion exactly; of the game itself up to the third order of η."""
    net = network().double()
    x, y, xq, yq = data()
    gaps: dict[tuple[int, float], float] = {}
    for lr in (0.2, 0.1):
        for order in (1, 2):
            callback = InRunShapleyCallback(queries=queries(), order=order)  # type: ignore[arg-type]
            diary = Diary()
            fit([callback, diary], lr=lr, max_steps=1, max_epochs=1)
            params, index = diary.steps[0]
            value, theta, _ = flat_loss(net, params, xq, yq)
            _, _, each = flat_loss(net, params, x[index], y[index])
            shares = torch.autograd.functional.jacobian(each, theta) / len(index)
            found = callback._accumulator._values[0, index]
            if order == 2:
                slope = torch.autograd.functional.jacobian(value, theta)
                hessian = torch.autograd.functional.hessian(value, theta)

                def quadratic(
                    s: list[int], a: Tensor = shares, g: Tensor = slope, h: Tensor = hessian
                ) -> Tensor:
                    u = lr * a[s].sum(0)  # noqa: B023
                    return u @ g - 0.5 * u @ h @ u

                expected = shapley_values(len(index), quadratic)
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)

            def game(s: list[int], a: Tensor = shares, f: Any = value, at: Tensor = theta) -> Any:
                return f(at) - f(at - lr * a[s].sum(0))  # noqa: B023

            gaps[order, lr] = float((found - shapley_values(len(index), game)).abs().max())
    assert 3.0 < gaps[1, 0.2] / gaps[1, 0.1] < 5.5
    assert 6.5 < gaps[2, 0.2] / gaps[2, 0.1] < 10.0


@pytest.mark.parametrize("target", ["validation", "validation_per_class"])
def test_values_add_up_to_the_drop_at_the_expected_order(target: Any) -> None:
    """After a fixed number of steps the gap shrinks as η² in first order, as η³ in second."""
    net = network().double()
    _, _, xq, yq = data()
    gaps: dict[int, list[Tensor]] = {1: [], 2: []}
    for lr in (0.004, 0.002, 0.001):
        for order in (1, 2):
            callback = InRunShapleyCallback(target, queries=queries(), order=order)  # type: ignore[arg-type]
            diary = Diary()
            module = fit([callback, diary], lr=lr)
            end = {k: v.detach() for k, v in module.net.named_parameters()}
            drops = []
            for members in ROWS[target]:
                before, start, _ = flat_loss(net, diary.steps[0][0], xq[members], yq[members])
                after, last, _ = flat_loss(net, end, xq[members], yq[members])
                drops.append(before(start) - after(last))
            gaps[order].append((callback.drop() - torch.stack(drops)).abs())
    for order, expected in ((1, 4.0), (2, 8.0)):
        for wide, narrow in itertools.pairwise(gaps[order]):
            ratio = wide / narrow
            assert bool((ratio > 0.9 * expected).all()), (order, ratio)
            assert bool((ratio < 1.1 * expected).all()), (order, ratio)
    assert bool((gaps[2][-1] < 0.1 * gaps[1][-1]).all())
