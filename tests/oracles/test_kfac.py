"""K-FAC influence against its formula in float64, with Kronecker products in full."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines.kfac import KFAC
from fine_bench import Checkpoint, Problem, replay
from fine_bench.gradients import tangent_kernel
from fine_bench.types import UnsupportedProblemError
from support.networks import CLASSES, models
from support.tensors import close

N, V = 25, 6


def make(name: str, target: str = "queries", **options: Any) -> tuple[Problem, list[Checkpoint]]:
    model, shape = models()[name]
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N + V, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (N + V,), generator=generator)
    states = [
        {
            k: v + 0.2 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
            for k, v in model.state_dict().items()
        }
        for _ in range(2)
    ]
    reduce: Any = {"validation": "mean"}.get(target)
    queries: Any = "self" if target == "self" else TensorDataset(x[N:], y[N:])
    train = TensorDataset(x[:N], y[:N])
    problem = Problem(model, F.cross_entropy, train, queries, reduce, **options)
    return problem, [Checkpoint(state, lr=0.1) for state in states]


def layer_gradient(model: nn.Module, layer: nn.Module, value: Tensor) -> Tensor:
    """[W|b] of one layer, its weight's inputs side by side, flattened."""
    parts = torch.autograd.grad(value, list(layer.parameters()), retain_graph=True)
    return torch.cat([part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts], 1)


def twin(problem: Problem, states: list[Checkpoint], damping: float, observable: str) -> Tensor:
    """(mean_i a aᵀ + γ_A)⁻¹ ⊗ (mean_i E_y Σ_t b bᵀ/T + γ_G)⁻¹, layer by layer."""
    train: Any = problem.train
    asked: Any = train if problem.queries == "self" else problem.queries
    total = torch.zeros(len(asked), len(train), dtype=torch.float64)
    for state in states:
        model = copy.deepcopy(problem.model)
        model.load_state_dict(dict(state.params))
        for layer in model:  # type: ignore[union-attr]
            if isinstance(layer, nn.Linear | nn.Conv2d):
                total += of_layer(model, layer, train, asked, damping, observable)
    return total / len(states)


def of_layer(
    model: Any, layer: Any, train: Any, asked: Any, damping: float, observable: str
) -> Tensor:
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["a"], seen["b"] = inputs[0], output

    handle = layer.register_forward_hook(keep)
    inner, outer = torch.zeros(()).double(), torch.zeros(()).double()
    for x, _ in train:
        logits = model(x[None])[0]
        p = F.softmax(logits, 0).detach()
        a = seen["a"]
        if isinstance(layer, nn.Conv2d):
            a = F.unfold(a, layer.kernel_size)[0].T
        if layer.bias is not None:
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        inner = inner + a.T @ a / len(train)
        for k in range(CLASSES):
            loss = F.cross_entropy(logits[None], torch.tensor([k]))
            b = torch.autograd.grad(loss, seen["b"], retain_graph=True)[0]
            b = b[0].flatten(1).T if isinstance(layer, nn.Conv2d) else b
            outer = outer + p[k] * b.T @ b / (len(b) * len(train))
    handle.remove()
    for part in (inner, outer):
        part += damping**0.5 * part.trace() / len(part) * torch.eye(len(part)).double()
    matrix = torch.kron(torch.linalg.inv(outer), torch.linalg.inv(inner))

    def gradients(data: Any, kind: str) -> Tensor:
        rows = []
        for x, y in data:
            log_p = F.log_softmax(model(x[None]), 1)[0, y]
            value = -log_p if kind == "loss" else -(log_p - torch.log1p(-log_p.exp()))
            rows.append(layer_gradient(model, layer, value).flatten())
        return torch.stack(rows)

    return (gradients(asked, observable) @ matrix @ gradients(train, "loss").T).detach()


@pytest.mark.parametrize("name", ["relu", "tanh, no bias", "cnn"])
@pytest.mark.parametrize(("damping", "observable"), [(0.05, "margin"), (1.0, "loss")])
def test_it_is_the_formula(name: str, damping: float, observable: Any) -> None:
    problem, states = make(name)
    wanted = twin(problem, states, damping, observable)
    close(replay(KFAC(damping, observable), problem, states).values, wanted, 1e-9)
    pieces, _ = make(name, batch_size=7)
    close(replay(KFAC(damping, observable), pieces, states).values, wanted, 1e-9)
    mean, _ = make(name, "validation")
    close(replay(KFAC(damping, observable), mean, states).values, wanted.mean(0)[None], 1e-9)


def test_queries_taken_in_shares_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, states = make("cnn", batch_size=4)
    whole = KFAC()
    wanted = replay(whole, problem, states).values
    monkeypatch.setattr(tangent_kernel, "HELD_FLOATS", 1)
    shares = KFAC()
    assert torch.equal(replay(shares, problem, states).values, wanted)
    # the second batch of queries asks for one more pass over the training examples
    assert shares.gradient_evaluations == whole.gradient_evaluations + N * len(states)


@pytest.mark.parametrize("observable", ["margin", "loss"])
def test_an_example_and_itself(observable: Any) -> None:
    problem, states = make("relu", "self")
    wanted = twin(problem, states, 0.3, observable).diagonal()
    close(replay(KFAC(0.3, observable), problem, states).values[0], wanted, 1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative_damping": 0.0}, "relative_damping must be a finite number > 0"),
        ({"observable": "mine"}, "observable must be"),
        ({"curvature": "hessian"}, "K-FAC needs a sum of squares"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(**options)


def test_layers_without_factors_are_refused_and_can_be_left_out() -> None:
    problem, _ = make("relu")
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)).double()
    state = [Checkpoint(model.state_dict(), 0.1)]
    changed = Problem(model, F.cross_entropy, problem.train, problem.queries)
    with pytest.raises(UnsupportedProblemError, match="'1' has no Kronecker factors; name the"):
        replay(KFAC(), changed, state)
    assert replay(KFAC(layers=["0", "2"]), changed, state).values.shape == (V, N)
    train: Any = problem.train
    numbers = TensorDataset(train.tensors[0], train.tensors[0][:, :1])
    regression = Problem(nn.Linear(6, 1).double(), F.mse_loss, numbers, "self")
    with pytest.raises(UnsupportedProblemError, match='or pass observable="loss"'):
        replay(KFAC(), regression, state)


def test_a_layer_that_no_gradient_reaches_says_nothing() -> None:
    problem, _ = make("relu")
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    state = [Checkpoint(model.state_dict(), 0.1)]
    changed = Problem(model, F.cross_entropy, problem.train, problem.queries)
    all_layers = replay(KFAC(), changed, state).values
    assert torch.equal(all_layers, replay(KFAC(layers=["2"]), changed, state).values)
