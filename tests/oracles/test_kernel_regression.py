"""The kernel regressions against their formulas in float64, and against refitted regressions."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines import kernel_regression
from baselines.kernel_controls import GaussianKernel
from baselines.kernel_regression import TangentKernel
from fine_bench import Checkpoint, Problem, replay
from fine_bench.gradients import PerExampleGradients, tangent_kernel
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.tangent_kernel import Probe, cross_gram
from fine_bench.seeds import stream
from fine_bench.types import UnsupportedProblemError
from support.networks import CLASSES, models
from support.tensors import close

N, V = 30, 7


def make(
    name: str = "relu", target: str = "queries", n: int = N, **options: Any
) -> tuple[Problem, list[Checkpoint]]:
    model, shape = models()[name]
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n + V, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (n + V,), generator=generator)
    states = [
        {
            k: v + 0.2 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
            for k, v in model.state_dict().items()
        }
        for _ in range(3)
    ]
    reduce: Any = {"validation": "mean", "validation_per_class": "class"}.get(target)
    queries: Any = "self" if target == "self" else TensorDataset(x[n:], y[n:])
    train = TensorDataset(x[:n], y[:n])
    problem = Problem(model, F.cross_entropy, train, queries, reduce, **options)
    return problem, [Checkpoint(state, lr=0.1) for state in states]


def data(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train: Any = problem.train
    asked: Any = train if problem.queries == "self" else problem.queries
    return *train.tensors, *asked.tensors


def probe_gradients(model: nn.Module, probe: Tensor, x: Tensor) -> Tensor:
    rows = []
    for xi in x:
        grads = torch.autograd.grad((model(xi[None])[0] * probe).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def run_quantities(problem: Problem, states: list[Checkpoint]) -> tuple[Tensor, Tensor]:
    """Means over the checkpoints of onehot − p ``(n, k)`` and of ∂ margin/∂ logits ``(V, k)``."""
    x, y, xq, yq = data(problem)
    model = copy.deepcopy(problem.model)
    residual, slope = torch.zeros(len(x), CLASSES), torch.zeros(len(xq), CLASSES)
    residual, slope = residual.double(), slope.double()
    for state in states:
        model.load_state_dict(dict(state.params))
        residual += (F.one_hot(y, CLASSES) - F.softmax(model(x), 1)).detach() / len(states)
        logits = model(xq).detach().requires_grad_()
        p = F.softmax(logits, 1).gather(1, yq[:, None])
        slope += torch.autograd.grad(torch.log(p / (1 - p)).sum(), logits)[0] / len(states)
    return residual, slope


def twin_of_tangent(
    problem: Problem, states: list[Checkpoint], ridge: float, every: int, probes: int
) -> Tensor:
    x, _, xq, _ = data(problem)
    model, probe = copy.deepcopy(problem.model), Probe()
    generator = stream(4, "tangent-kernel/probes")
    kernel, cross = torch.zeros(len(x), len(x)).double(), torch.zeros(len(xq), len(x)).double()
    for state in states[::every]:
        model.load_state_dict(dict(state.params))
        for _ in range(probes):
            probe.draw(CLASSES, generator)
            g, gq = (probe_gradients(model, probe.weights, part) for part in (x, xq))
            scale = (g @ g.T).diagonal().mean()
            kernel += g @ g.T / scale
            cross += gq @ g.T / scale
    kernel, cross = kernel / kernel.diagonal().mean(), cross / kernel.diagonal().mean()
    z = cross @ torch.linalg.inv(kernel + ridge * torch.eye(len(x)).double())
    residual, slope = run_quantities(problem, states)
    return z * (slope @ residual.T)


@pytest.mark.parametrize("name", ["relu", "cnn"])
@pytest.mark.parametrize(("ridge", "every", "probes"), [(0.3, 1, 1), (2.0, 2, 2)])
def test_the_tangent_kernel_is_its_formula(
    name: str, ridge: float, every: int, probes: int
) -> None:
    problem, states = make(name)
    wanted = twin_of_tangent(problem, states, ridge, every, probes)
    estimator = TangentKernel(ridge, every, probes, seed=4)
    close(replay(estimator, problem, states).values, wanted)
    _, _, _, yq = data(problem)
    mean, _ = make(name, "validation")
    close(replay(estimator, mean, states).values, wanted.mean(0, keepdim=True))
    by_class, _ = make(name, "validation_per_class")
    rows = torch.stack([wanted[yq == c].mean(0) for c in yq.unique()])
    close(replay(estimator, by_class, states).values, rows)


def test_the_tangent_kernel_of_an_example_and_itself() -> None:
    problem, states = make(target="self")
    wanted = twin_of_tangent(problem, states, 0.5, 1, 1).diagonal()
    close(replay(TangentKernel(0.5, 1, seed=4), problem, states).values[0], wanted)


@pytest.mark.parametrize("held", [1, 400, 10**9])
def test_a_kernel_taken_in_shares_is_the_same(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    problem, states = make(batch_size=7)
    wanted = twin_of_tangent(problem, states, 1.0, 3, 1)
    monkeypatch.setattr(tangent_kernel, "HELD_FLOATS", held)
    estimator = TangentKernel(1.0, 3, seed=4)
    close(replay(estimator, problem, states).values, wanted)
    n_taken = estimator.gradient_evaluations
    assert (n_taken == 2 * N + V) == (held == 10**9)


@pytest.mark.parametrize(("held", "shares"), [(1, 4), (120, 2), (10**9, 1)])
def test_queries_are_held_in_shares(
    monkeypatch: pytest.MonkeyPatch, held: int, shares: int
) -> None:
    """Batches of two queries with 20 numbers each, against the products in full."""
    draw = torch.Generator().manual_seed(0)
    x, q = (torch.randn(n, 20, generator=draw, dtype=torch.float64) for n in (N, V))
    alive: list[Any] = []
    most, passes = 0, 0

    def batches(rows: Tensor, size: int, keep: bool) -> Any:
        for start in range(0, len(rows), size):
            part = slice(start, min(start + size, len(rows)))
            found = PerExampleGradients([DenseBlock("w", rows[part].clone())])
            if keep:
                alive.append(weakref.ref(found.blocks[0]))
            yield part, found

    def train() -> Any:
        nonlocal most, passes
        passes += 1
        most = max(most, sum(len(block.g) for ref in alive if (block := ref()) is not None))
        return batches(x, 7, keep=False)

    monkeypatch.setattr(tangent_kernel, "HELD_FLOATS", held)
    given = {"prepare": lambda gradients: gradients} if held == 120 else {}
    cross, norms = cross_gram(batches(q, 2, keep=True), train, N, **given)
    close(cross, q @ x.T)
    close(norms, q.square().sum(1))
    assert passes == shares
    if held == 120:
        assert most <= 8  # three batches, and the one that did not fit any more


def test_probes_are_signs_about_their_mean() -> None:
    probe, generator = Probe(), torch.Generator().manual_seed(0)
    for k in (2, 3, 10):
        for _ in range(20):
            probe.draw(k, generator)
            assert abs(float(probe.weights.sum())) < 1e-12
            assert len(probe.weights.unique()) == 2


def gaussian(a: Tensor, b: Tensor, width: float) -> Tensor:
    return torch.stack([torch.exp(-(row - b).square().sum(1) / (2 * width)) for row in a])


def test_the_control_is_the_effect_of_leaving_an_example_out() -> None:
    """Fitted again without each example, in float64."""
    problem, states = make()
    x, y, xq, yq = data(problem)
    x, xq = x.flatten(1), xq.flatten(1)
    width = float(torch.pdist(x).square().mean()) * (N - 1) / N / 2
    targets = F.one_hot(y, CLASSES).double() - 1 / CLASSES

    def fitted(rows: Tensor) -> Tensor:
        kernel = gaussian(x[rows], x[rows], width) + 0.7 * torch.eye(len(rows)).double()
        return gaussian(xq, x[rows], width) @ torch.linalg.solve(kernel, targets[rows])

    everyone = torch.arange(N)
    asked = F.one_hot(yq, CLASSES).double() - 1 / CLASSES
    effects = [
        ((fitted(everyone) - fitted(everyone[everyone != i])) * asked).sum(1) for i in range(N)
    ]
    found = replay(GaussianKernel(0.7), problem, states)
    close(found.values, torch.stack(effects, 1))


@pytest.mark.parametrize("target", ["queries", "self"])
def test_the_control_with_the_residuals_of_the_run(target: str) -> None:
    problem, states = make(target=target)
    x, _, xq, _ = data(problem)
    x, xq = x.flatten(1), xq.flatten(1)
    z = gaussian(xq, x, 3.0) @ torch.linalg.inv(gaussian(x, x, 3.0) + torch.eye(N).double())
    residual, slope = run_quantities(problem, states)
    wanted = z * (slope @ residual.T)
    estimator = GaussianKernel(1.0, bandwidth=3.0, residual="run")
    wanted = wanted.diagonal()[None] if target == "self" else wanted
    close(replay(estimator, problem, states).values, wanted)


def test_the_control_does_not_look_at_the_network() -> None:
    problem, states = make()
    values = [replay(GaussianKernel(), problem, [state]).values for state in states]
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize("weighting", ["norm", "noise"])
def test_queries_are_weighted_by_the_common_rule(weighting: Literal["norm", "noise"]) -> None:
    problem, states = make()
    mean, _ = make(target="validation")
    rows = replay(TangentKernel(every=1), problem, states).values
    found = replay(TangentKernel(every=1, query_weighting=weighting), mean, states).values
    if weighting == "noise":
        close(found, (rows / rows.std(1, keepdim=True)).mean(0, keepdim=True))
    else:
        weights = torch.linalg.lstsq(rows.T, found.T).solution
        assert bool((weights > 0).all())
        assert float(weights.std()) > 1e-3


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: TangentKernel(ridge=0.0), "ridge must be a finite number > 0"),
        (lambda: TangentKernel(every=0), "every must be at least 1"),
        (lambda: TangentKernel(probes=0), "probes must be at least 1"),
        (lambda: GaussianKernel(bandwidth=0.0), "bandwidth is σ² > 0"),
        (lambda: GaussianKernel(residual="mine"), "residual must be"),  # type: ignore[arg-type]
    ],
)
def test_wrong_options_are_refused(make_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


def test_what_cannot_be_served_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, states = make()
    x, y, _, _ = data(problem)
    tokens = TensorDataset(torch.randint(5, (N, 4)), y)
    with pytest.raises(UnsupportedProblemError, match="real-valued inputs"):
        replay(GaussianKernel(), Problem(problem.model, F.cross_entropy, tokens, "self"), states)
    numbers = Problem(problem.model, F.mse_loss, TensorDataset(x, x.flatten(1)[:, :1]), "self")
    with pytest.raises(UnsupportedProblemError, match="integer class labels"):
        replay(TangentKernel(), numbers, states)
    twice = TensorDataset(x[:1].repeat(N, *[1] * (x.ndim - 1)), y)
    alike = Problem(problem.model, F.cross_entropy, twice, "self")
    with pytest.raises(UnsupportedProblemError, match="numerically singular"):
        replay(GaussianKernel(1e-20), alike, states)
    monkeypatch.setattr(kernel_regression, "MAX_EXAMPLES", N - 1)
    with pytest.raises(UnsupportedProblemError, match="more than the limit of 29"):
        replay(TangentKernel(), problem, states)
