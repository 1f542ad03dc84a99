"""Gradient flow for a training time: against the matrix exponential, gradient descent step by step,
runs that start at random, and the exact derivative of a logistic regression's training."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from baselines.fine_kernel import FINEKernel
from fine_bench import Checkpoint, Problem
from fine_bench.callback import FINECallback
from fine_bench.fine import accumulator, kernel_scores, kernel_states
from fine_bench.fine.kernel_scores import (
    KernelAccumulator,
    matched_ridge,
    regression,
    rows_of,
)
from fine_bench.fine.step_sizes import step_sizes
from fine_bench.fine.training_time import curvature, training_time
from fine_bench.gradients.tangent_kernel import FLOW_STEPS, KernelFlow, KernelRidge, Probe
from fine_bench.models.classifier import Classifier
from fine_bench.runner.plan import version_of
from fine_bench.types import TrainingSteps
from support.tensors import close
from support.training import QUIET

N, V, DIM, CLASSES = 30, 5, 12, 3


def inputs(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N + V, DIM, generator=g, dtype=torch.float64)
    return x / (x[:N] ** 2).sum(1).mean().sqrt()


def labels(n: int = N) -> Tensor:
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(7))


def targets() -> Tensor:
    return F.one_hot(labels(), CLASSES).double() - 1 / CLASSES


def slopes() -> Tensor:
    g = torch.Generator().manual_seed(8)
    slope = torch.randn(V, CLASSES, generator=g, dtype=torch.float64)
    return slope - slope.mean(1, keepdim=True)


def exact(kernel: Tensor, time: float) -> Tensor:
    """A = ∫₀^τ e^{−uK} du, which is (I − e^{−τK}) K⁻¹ where K has an inverse."""
    values, vectors = torch.linalg.eigh(kernel)
    filtered = torch.where(
        values > 1e-9, -torch.expm1(-time * values) / values.clamp_min(1e-9), time
    )
    return (vectors * filtered) @ vectors.T


@pytest.mark.parametrize("time", [0.05, 1.0, 30.0])
def test_many_steps_are_the_flow_and_the_error_halves_with_them(time: float) -> None:
    x, y = inputs(), targets()
    kernel = x @ x.T
    train, cross = kernel[:N, :N], kernel[N:, :N]
    alpha = exact(train, time) @ y

    def off(steps: int) -> float:
        flow = KernelFlow(train.clone(), time, steps)
        close(flow.smoother(cross) @ y, cross @ flow.solve(y), 1e-9)
        return float((train @ (flow.solve(y) - alpha)).norm() / (train @ alpha).norm())

    assert off(2000) < 1e-3
    assert off(400) < 0.52 * off(200)
    assert off(FLOW_STEPS) < 0.12


def test_one_step_is_ridge_regression() -> None:
    x, y = inputs(), targets()
    train = x[:N] @ x[:N].T
    ridge, flow = KernelRidge(train.clone(), 0.4), KernelFlow(train.clone(), 1 / 0.4, 1)
    close(flow.solve(y), ridge.solve(y), 1e-12)


def test_no_direction_is_learnt_more_than_wholly() -> None:
    x = inputs()
    train = x[:N] @ x[:N].T
    learnt = train @ KernelFlow(train.clone(), 50.0).solve(torch.eye(N).double())
    values = torch.linalg.eigvalsh((learnt + learnt.T) / 2)
    assert float(values.max()) < 1
    assert float(values.min()) > -1e-9


def test_a_push_on_an_example_moves_a_model_by_the_smoother() -> None:
    """A linear model by gradient descent in small steps, and once more with a constant push."""
    x, y, time, steps = inputs(), targets(), 3.0, 2000
    train, asked, push = x[:N], x[N:], torch.tensor([0.3, -0.1, -0.2]).double()

    def fitted(extra: Tensor) -> Tensor:
        w = torch.zeros(DIM, CLASSES).double()
        for _ in range(steps):
            w = w + time / steps * train.T @ (y - train @ w + extra)
        return asked @ w

    smoother = KernelFlow(train @ train.T, time, 1000).smoother(asked @ train.T)
    unpushed = fitted(torch.zeros(N, CLASSES))
    close(unpushed, smoother @ y, 5e-3)
    for i in (0, 17):
        extra = torch.zeros(N, CLASSES).double()
        extra[i] = push
        moved = fitted(extra) - unpushed
        close(moved, smoother[:, i, None] * push, 5e-3)


def test_the_spread_is_that_of_runs_that_start_at_random_and_stop() -> None:
    """Prior weights, labels with the noise of what the time leaves, the flow; many times."""
    x, y, slope, time, runs = inputs(1), targets(), slopes(), 4.0, 10_000
    phi, asked = x[:N], x[N:]
    kernel = phi @ phi.T + 0.05 * torch.eye(N).double()  # with an inverse
    whole = torch.zeros(N + V, N + V).double()
    whole[:N, :N], whole[N:, :N], whole[N:, N:] = kernel, asked @ phi.T, asked @ asked.T
    whole[:N, N:] = whole[N:, :N].T
    scale = float(kernel.diagonal().mean())
    groups = rows_of(torch.eye(V), None)
    found = regression(whole, y, slope, y, groups, time=time)
    assert found.ridge == 1 / time
    flow = KernelFlow(kernel / scale, time).solve(torch.eye(N).double())
    s2 = float((y * (flow @ y)).sum()) / (N * (CLASSES - 1))
    noise = torch.linalg.cholesky(s2 * (flow.inverse() - kernel / scale))
    prior = torch.linalg.cholesky(s2 * whole / scale)
    g = torch.Generator().manual_seed(0)
    start = prior @ torch.randn(runs, N + V, CLASSES, generator=g, dtype=torch.float64)
    wrong = noise @ torch.randn(runs, N, CLASSES, generator=g, dtype=torch.float64)
    end = start[:, N:] + whole[N:, :N] / scale @ flow @ (y + wrong - start[:, :N])
    spread = (end * slope).sum(2).std(0)
    torch.testing.assert_close(found.sigma, spread, rtol=0.03, atol=0)
    fitted = kernel / scale @ flow @ y
    close(found.fitted, fitted, 1e-9)


# ------------------------------------------------------------------------- a logistic regression


def train_by(rate: float, steps: int, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Full-batch gradient descent from zero on Σ_i w_i ℓ_i / n; differentiable in w."""
    w = torch.zeros(DIM + 1, CLASSES).double()
    one_hot = F.one_hot(y, CLASSES).double()
    for _ in range(steps):
        residual = one_hot - (x @ w).softmax(1)
        w = w + rate / len(y) * x.T @ (weights[:, None] * residual)
    return w


def test_a_logistic_regression_is_read_by_its_training_time() -> None:
    """Against the exact derivative of its training.

    Labels are a rule's: a softmax fits them better than any linear regression on them, so that the
    ridge that is matched to the fit is the least there is.
    """
    rate, steps = 0.2, 60
    x = inputs(3) * math.sqrt(DIM)
    rule = torch.randn(DIM, CLASSES, generator=torch.Generator().manual_seed(1)).double()
    y = (x @ rule).argmax(1)
    train, asked = (
        TensorDataset(x[part], y[part], torch.arange(len(y[part])))
        for part in (slice(0, N), slice(N, None))
    )
    padded = torch.cat([x, torch.ones(N + V, 1)], 1)

    def margins(weights: Tensor) -> Tensor:
        z = padded[N:] @ train_by(rate, steps, weights, padded[:N], y[:N])
        own = z.gather(1, y[N:, None])[:, 0]
        others = z.masked_fill(F.one_hot(y[N:], CLASSES).bool(), -math.inf).logsumexp(1)
        return own - others

    truth = torch.autograd.functional.jacobian(margins, torch.ones(N).double())
    assert isinstance(truth, Tensor)

    def told(**options: Any) -> tuple[Tensor, Any]:
        net = nn.Linear(DIM, CLASSES).double()
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        callback = FINECallback(
            "queries", queries=asked, schedule="snapshot", geometry="kernel", contrast="removal",
            n_snapshots=10, **options,
        )  # fmt: skip
        trainer = pl.Trainer(max_epochs=steps, callbacks=[callback], **QUIET)
        trainer.fit(Classifier(net, CLASSES, lr=rate).double(), DataLoader(train, N))
        values = callback.scores().values.double()
        return values, callback._schedule.accumulator

    def agreement(values: Tensor) -> float:
        both = torch.stack([values, truth])
        centred = both - both.mean(2, keepdim=True)
        a, b = centred / centred.norm(dim=2, keepdim=True)
        return float((a * b).sum(1).mean())

    values, sums = told()
    by_time = agreement(values)
    assert by_time > 0.95
    kernel = padded[:N] @ padded[:N].T
    kernel /= kernel.diagonal().mean()
    level = float((sums.residual.sum(0) / sum(sums.weight)).square().sum()) / N
    matched = matched_ridge(kernel, F.one_hot(y[:N], CLASSES).double() - 1 / CLASSES, level)
    assert matched == pytest.approx(kernel_scores.LEAST_RIDGE)
    for ridge in (matched, 100.0):
        assert agreement(told(ridge=ridge)[0]) < by_time - 0.04


# ------------------------------------------------------------------------------ how long it was


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.8}, {"momentum": 0.8, "dampening": 0.3},
     {"momentum": 0.8, "nesterov": True}],
)  # fmt: skip
def test_a_gradient_is_carried_as_far_as_it_moves_the_parameters(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.zeros(1).double())
    optimizer = torch.optim.SGD([p], lr=0.1, **options)
    for step in range(200):  # a single gradient, after a step without one
        p.grad = torch.full((1,), 2.0 if step == 1 else 0.0).double()
        optimizer.step()
    assert float(-p.detach() / 0.1 / 2.0) == pytest.approx(step_sizes(optimizer).carry)


def test_how_far_is_not_known() -> None:
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [p], "momentum": 0.9}, {"params": [q]}]
    for optimizer in (torch.optim.Adam([p]), torch.optim.SGD(groups, lr=0.1),
                      torch.optim.SGD([p], lr=0.1, momentum=1.0)):  # fmt: skip
        assert math.isnan(step_sizes(optimizer).carry)


def test_curvature_is_the_mean_eigenvalue_of_the_hessian() -> None:
    z = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(2)).double()
    y = labels(4)
    values = []
    for zi, yi in zip(z, y, strict=True):
        hessian: Any = torch.autograd.functional.hessian(
            lambda one, label=yi: F.cross_entropy(one[None], label[None]), zi
        )
        values.append(torch.linalg.eigvalsh(hessian)[1:].mean())  # the first is 0
    assert curvature(z) == pytest.approx(float(torch.stack(values).mean()), rel=1e-9)
    assert curvature(torch.zeros(2, CLASSES)) == pytest.approx(1 / CLASSES)


@pytest.mark.parametrize("step", [None, 3, 99])
def test_checkpoints_of_unknown_time_match_a_ridge(step: int | None) -> None:
    x, y = inputs(), labels(N + V)
    train, asked = TensorDataset(x[:N], y[:N]), TensorDataset(x[N:], y[N:])
    net = nn.Linear(DIM, CLASSES).double()
    steps = TrainingSteps(net.state_dict(), [torch.arange(3)] * 3, [0.1, 0.2, 0.3])
    estimator = FINEKernel(n_initialisations=0)
    problem = Problem(net, F.cross_entropy, train, asked, steps=steps)
    estimator.setup(problem)
    estimator.update(Checkpoint(net.state_dict(), 0.1, step))
    with torch.no_grad():
        expected = 0.6 * curvature(net(x[:N])) if step == 3 else math.nan
    assert estimator._sums.times == pytest.approx([expected], nan_ok=True)
    assert bool(torch.isfinite(estimator.compute().values).all())


def test_scales_are_linear_between_the_kernels() -> None:
    times = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    # κ after 0, 1, 2 and 4 snapshots; at the middles 1.5, 3, 4.5, 5.5, 6, 6
    assert training_time(times, [1.0, 2.0, 4.0, 6.0]) == pytest.approx(26.5)
    assert training_time(times, [3.0]) == pytest.approx(18.0)
    assert training_time(times, [math.nan, 3.0]) == pytest.approx(18.0)
    assert math.isnan(training_time(times, []))
    assert math.isnan(training_time([1.0, math.nan], [3.0]))


def test_times_beyond_all_bounds_are_bounded() -> None:
    x, y, slope = inputs(), targets(), slopes()
    kernel, rows = x @ x.T, rows_of(torch.eye(V), None)
    assert regression(kernel, y, slope, y, rows, time=1e9).ridge == kernel_scores.LEAST_RIDGE
    assert regression(kernel, y, slope, y, rows, time=1e-9).ridge == kernel_scores.MOST_RIDGE


def test_a_state_of_an_earlier_version_has_no_time() -> None:
    sums, other = KernelAccumulator(N, torch.eye(V)), KernelAccumulator(N, torch.eye(V))
    sums.observe(0.5, targets(), slopes(), targets(), labels(), 0.25)
    state = sums.state_dict()
    other.load_state_dict(state)
    assert other.times == [0.25]
    del state["times"]
    other.load_state_dict(state)
    assert math.isnan(other.times[0])


def test_the_kernel_geometry_has_a_version_of_its_own() -> None:
    assert version_of(FINECallback, {"geometry": "kernel"}) == kernel_scores.VERSION
    assert version_of(FINECallback, {"geometry": "ekfac"}) == accumulator.VERSION
    assert version_of(FINEKernel, {}) == kernel_scores.VERSION


def test_kernels_in_float64_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def gram(_: Any, n: int, *others: Any) -> Tensor:
        alive.append(sum(array() is not None for array in made))
        array = np.eye(n)
        made.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(kernel_states, "gram_matrix", gram)
    layer = nn.Linear(DIM, CLASSES).double()
    kept = [kernel_states.state_of(layer)] * 5
    sizes = {"n_train": N, "n_query": V, "n_classes": CLASSES}
    none = {"n_initialisations": 0, "seed": 0}
    kernel_states.take_kernels(
        layer, kept, ["weight", "bias"], Probe(), lambda start: iter(()), **sizes, **none
    )
    assert max(alive) == 1  # the one before, until it is exchanged
