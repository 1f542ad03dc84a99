"""Parameters with step sizes of their own, against a twin in float64 straight from the formula.

x_t = Σ_p η_p,t ⟨mean gradient of the batch, ∇h⟩_p, so c_i,t = Σ_p η_p,t ⟨g_i, ∇h⟩_p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.geometry import Whitened
from fine_bench.fine.step_sizes import StepScaling, StepSizes
from fine_bench.fine.training_data import TrainingData
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import UnsupportedProblemError
from support.tensors import close, observable_gradients
from support.training import QUIET

N, V, BATCH, CLASSES = 18, 4, 6, 3

Groups = Callable[[nn.Module], list[dict[str, Any]]]


def network(kind: str = "mlp") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "mlp":
            layers: list[nn.Module] = [nn.Linear(16, 5), nn.Tanh(), nn.LayerNorm(5)]
            return nn.Sequential(*layers, nn.Linear(5, CLASSES)).double()
        if kind == "free":
            return Free().double()
        return nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)),
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(32, CLASSES),
        ).double()


class Free(nn.Module):
    """A parameter of no layer, two layers that share a weight, one whose weight is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.inward = weight_norm(nn.Linear(16, 6))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm, self.out = nn.GroupNorm(2, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inward(x)) * self.scale
        return self.out(self.norm(self.second(torch.tanh(self.first(h)))))


def each(net: nn.Module) -> list[dict[str, Any]]:
    """A step size for every parameter."""
    return [{"params": [p], "lr": 0.05 * (1 + k % 4)} for k, p in enumerate(net.parameters())]


def data(seed: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=g, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=g)


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module, groups: Groups, schedules: Any = None) -> None:
        super().__init__()
        self.net, self.groups, self.schedules = net, groups, schedules
        self.diary: list[tuple[dict[str, Tensor], Tensor, dict[str, float]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y, index = batch
        optimizer = self.trainer.optimizers[0]
        rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        named = dict(self.net.named_parameters())
        params = {k: v.detach().clone() for k, v in named.items()}
        self.diary.append((params, index, {k: rate.get(id(v), 0.0) for k, v in named.items()}))
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.groups(self.net))
        if self.schedules is None:
            return optimizer
        return [optimizer], [{"scheduler": LambdaLR(optimizer, self.schedules), "interval": "step"}]


def fit(module: Module, *callbacks: FINECallback, epochs: int = 2, **options: Any) -> None:
    loader = DataLoader(
        TensorDataset(*data(1, N), torch.arange(N)),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(11),
    )
    trainer = pl.Trainer(max_epochs=epochs, **QUIET, callbacks=list(callbacks), **options)
    trainer.fit(module, loader)


def by_rate(gradients: Tensor, params: dict[str, Tensor], rates: dict[str, float]) -> Tensor:
    """Gradients (n, P) with each parameter's part times its step size."""
    return gradients * torch.cat(
        [torch.full((v.numel(),), rates[k], dtype=torch.float64) for k, v in params.items()]
    )


def twin(module: Module, target: str, observable: str = "margin") -> Tensor:
    """Accumulated μ, step by step and example by example."""
    (x, y), (xq, yq) = data(1, N), data(2, V)
    rows = V if target == "queries" else 1
    shift, noise = torch.zeros(2, rows, N, dtype=torch.float64)
    for params, index, rates in module.diary:
        g = observable_gradients(module.net, params, x[index], y[index], "loss")
        own = observable_gradients(module.net, params, x[index], y[index], observable)
        moved = by_rate(g, params, rates)
        if target != "self":
            h = observable_gradients(module.net, params, xq, yq, observable)
            if target == "validation":
                h = (h / (moved @ h.T).std(0)[:, None]).mean(0, keepdim=True)
        for k, i in enumerate(index.tolist()):
            others = [j for j in range(len(index)) if j != k]
            for r in range(rows):
                c = moved @ (own[k] if target == "self" else h[r])
                shift[r, i] += c[k] - c[others].mean()
                noise[r, i] += c[others].var()
    return shift / (N * noise).sqrt()


def heads(net: nn.Module) -> list[dict[str, Any]]:
    parts = [child for child in net if list(child.parameters())]  # type: ignore[attr-defined]
    body = [p for part in parts[:-1] for p in part.parameters()]
    return [{"params": body, "lr": 0.05}, {"params": parts[-1].parameters(), "lr": 0.4}]


def biases(net: nn.Module) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [p for k, p in named if "bias" in k], "lr": 0.3, "weight_decay": 0.0},
        {"params": [p for k, p in named if "bias" not in k], "lr": 0.1, "weight_decay": 1e-3},
    ]


def still(net: nn.Module) -> list[dict[str, Any]]:
    """One bias with step size 0, one weight and one bias that nobody trains."""
    named = list(net.named_parameters())
    (_, first_bias), (last_weight, last_bias) = named[1], (named[-2], named[-1])
    left = {id(first_bias), id(last_bias[1]), id(last_weight[1])}
    return [
        {"params": [p for _, p in named if id(p) not in left], "lr": 0.2},
        {"params": [first_bias], "lr": 0.0},
    ]


@pytest.mark.any_trainer("parameter groups with different step sizes")
@pytest.mark.any_trainer("weights and biases with different step sizes")
@pytest.mark.any_trainer(
    "parameters that the optimiser does not hold, or moves by a step size of 0"
)
@pytest.mark.parametrize(
    ("groups", "kind"),
    [
        *((groups, kind) for groups in (heads, biases, still) for kind in ("mlp", "cnn")),
        (each, "cnn"),
        (each, "free"),
    ],
)
@pytest.mark.parametrize("target", ["self", "queries", "validation"])
def test_each_parameter_counts_with_its_own_step_size(
    groups: Groups, kind: str, target: str
) -> None:
    queries = None if target == "self" else TensorDataset(*data(2, V))
    callback = FINECallback(target, queries=queries, refresh_every=1)
    module = Module(network(kind), groups)
    fit(module, callback)
    close(callback.scores().values, twin(module, target), 1e-6)
    close(callback._schedule.accumulator.mu()[0], twin(module, target), 1e-9)


@pytest.mark.any_trainer("parameter groups with different step sizes")
def test_schedules_of_their_own() -> None:
    """A head that is warmed up while the body's step size falls."""
    callback = FINECallback("self")
    rules = [lambda t: 1 / (1 + t), lambda t: min(1.0, 0.2 * t)]
    module = Module(network(), heads, rules)
    fit(module, callback, epochs=3)
    close(callback._schedule.accumulator.mu()[0], twin(module, "self"), 1e-9)


@pytest.mark.any_trainer("parameter groups with different step sizes")
def test_groups_of_one_step_size_give_what_no_groups_give_bit_for_bit() -> None:
    def one(net: nn.Module) -> list[dict[str, Any]]:
        return [{"params": net.parameters(), "lr": 0.2}]

    def several(net: nn.Module) -> list[dict[str, Any]]:
        first, *rest = net.parameters()
        return [{"params": [first], "lr": 0.2}, {"params": rest, "lr": 0.2}]

    found = []
    for groups in (one, several):
        callback = FINECallback("self")
        fit(Module(network(), groups), callback)
        found.append(callback.scores())
    assert torch.equal(found[0].values, found[1].values)
    assert torch.equal(found[0].std_error, found[1].std_error)


@pytest.mark.any_trainer("parameter groups with different step sizes")
def test_small_steps_that_wait_and_large_ones_agree() -> None:
    """Ratios that change at every step, with steps that are held back and taken together."""
    found = []
    for options in ({}, {"preconditioner": "optimiser"}):
        callback = FINECallback("self", **options)
        module = Module(network(), biases, [lambda t: 1.0, lambda t: 1 / (1 + t)])
        fit(module, callback, epochs=3)
        close(callback._schedule.accumulator.mu()[0], twin(module, "self"), 1e-9)
        found.append(callback)


@pytest.mark.any_trainer("parameter groups with different step sizes")
@pytest.mark.parametrize("target", ["self", "queries"])
def test_a_snapshot_weighs_by_the_step_sizes_that_it_stands_for(target: str) -> None:
    queries = None if target == "self" else TensorDataset(*data(2, V))
    options: dict[str, Any] = {"schedule": "snapshot", "n_reference": N, "queries": queries}
    callback = FINECallback(target, every_n_steps=1, **options)
    module = Module(network(), biases)
    fit(module, callback, epochs=1)
    (x, y), (xq, yq) = data(1, N), data(2, V)
    # a snapshot is taken after its step: at the parameters of the next one
    after = [params for params, _, _ in module.diary[1:]]
    after.append({k: v.detach() for k, v in module.net.named_parameters()})
    rates = module.diary[0][2]
    rows = V if target == "queries" else 1
    shift, variance = torch.zeros(2, rows, N, dtype=torch.float64)
    for params in after:
        moved = by_rate(observable_gradients(module.net, params, x, y, "loss"), params, rates)
        if target == "self":
            h = observable_gradients(module.net, params, x, y, "margin")
        else:
            h = observable_gradients(module.net, params, xq, yq, "margin")
        for i in range(N):
            others = [j for j in range(N) if j != i]
            for r in range(rows):
                c = moved @ h[i if target == "self" else r]
                shift[r, i] += (c[i] - c[others].mean()) / N
                variance[r, i] += c[others].var() / BATCH
    close(callback._schedule.accumulator.mu()[0], shift / variance.sqrt(), 1e-9)


@pytest.mark.any_trainer("parameter groups with different step sizes")
def test_the_interval_of_a_snapshot_takes_in_steps_that_were_all_alike() -> None:
    from fine_bench.fine.snapshot_accumulator import SnapshotInterval

    interval = SnapshotInterval()
    interval.add(0.1, 4)
    assert interval.relative == {}
    interval.add(0.2, 4, relative={"a": 1.0, "b": 0.5})
    interval.add(0.1, 4)
    assert interval.relative == pytest.approx({"a": 1.0, "b": 0.3 / 0.4})


@pytest.mark.any_trainer("parameter groups with different step sizes")
def test_ekfac_weighs_whole_layers() -> None:
    net, (x, y) = network(), data(1, N)
    recorder = LayerRecorder(net)
    engine = GradientEngine(net, F.cross_entropy)
    metric = Whitened(F.cross_entropy)
    metric.fit(engine, TrainingData(TensorDataset(x, y), dtype=torch.float64), 0, 0)
    g = engine(x, y)
    named = {name: 0.25 if name.startswith("0") else 1.0 for name, _ in net.named_parameters()}
    scaling = StepScaling(recorder, whole_layers=True)
    scaling.take(named)

    def only(layer: str) -> Any:
        keep = [b.scaled(b.values.new_full((N,), float(b.name == layer))) for b in g.blocks]
        return type(g)(keep)

    grams = {b.name: metric.gram(only(b.name)) for b in g.blocks}
    expected = sum(gram * (0.25 if name == "0" else 1.0) for name, gram in grams.items())
    close(metric.gram(scaling(g, 0.5)), expected)
    # Σ_b r_b² K_b, the variance of the product where K is the gradients' own metric
    variance = sum(
        gram.diagonal() * (0.25**2 if name == "0" else 1.0) for name, gram in grams.items()
    )
    close(metric.norm2(scaling(scaling(g, 0.5), 0.5)), variance)
    close(metric.norm2(scaling(g)), variance)


@pytest.mark.any_trainer("parameter groups with different step sizes")
@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
def test_ekfac_with_its_own_noise_runs_with_a_body_and_a_head(schedule: Any) -> None:
    callback = FINECallback("self", geometry="ekfac", noise="model", schedule=schedule)
    plain = FINECallback("self", geometry="ekfac", noise="model", schedule=schedule)
    fit(Module(network(), heads), callback)
    assert bool(torch.isfinite(callback.scores().values).all())
    fit(Module(network(), lambda net: [{"params": net.parameters(), "lr": 0.4}]), plain)
    assert not torch.equal(callback.scores().values, plain.scores().values)


@pytest.mark.any_trainer("weights and biases with different step sizes")
@pytest.mark.parametrize("options", [{"geometry": "ekfac"}, {"sketch": 2}])
def test_what_takes_weight_and_bias_together_says_so(options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Linear(4, 6), nn.Flatten(), nn.Linear(24, 3))
    with pytest.raises(UnsupportedProblemError, match=r"layer 'net.1'.*one step size"):
        fit(Module(net.double(), biases), FINECallback("self", **options))


@pytest.mark.any_trainer("parameter groups with different step sizes")
def test_a_sketch_takes_a_body_and_a_head() -> None:
    """Sketches wide enough to be exact: the same scores as without."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Unflatten(1, (4, 4)), nn.Linear(4, 6), nn.Flatten(), nn.Linear(24, 3)]
        return nn.Sequential(*layers).double()

    exact, sketched = FINECallback("self"), FINECallback("self", sketch=4)
    for callback in (exact, sketched):
        fit(Module(net(), heads), callback)
    close(sketched.scores().values, exact.scores().values.double(), 1e-6)


def test_ratios_are_kept_to_ten_digits() -> None:
    p = nn.Parameter(torch.zeros(1))
    a = StepSizes((0.1, 0.3), [[p], [p]]).ratios
    b = StepSizes((0.1 * (1 - 1e-15), 0.3), [[p], [p]]).ratios
    assert a == b
    assert StepSizes((0.0, 0.0), [[p], []]).relative() == {id(p): 1.0}
