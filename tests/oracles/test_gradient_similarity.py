"""GradDot and GradCos against autograd, one example at a time, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from baselines.gradient_similarity import GradCos, GradDot
from fine_bench import Checkpoint, Problem, replay
from fine_bench.types import UnsupportedProblemError
from support.networks import CLASSES, MODELS, models
from support.tensors import close

N, V = 21, 8


def make(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Problem, Any]:
    model, shape = models()[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N + V, *shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (N + V,), generator=generator)
    queries = options.pop("queries", TensorDataset(x[N:], y[N:]))
    problem = Problem(
        model.to(dtype), F.cross_entropy, TensorDataset(x[:N], y[:N]), queries, **options
    )
    state = problem.model.state_dict()
    # a first checkpoint that must not count
    first = Checkpoint(params={k: torch.zeros_like(v) for k, v in state.items()}, lr=3.0)
    return problem, [first, Checkpoint(params=state, lr=0.01)]


def gradients(problem: Problem, which: str, layers: Any = None) -> Tensor:
    model = copy.deepcopy(problem.model)
    chosen = [
        p
        for k, p in model.named_parameters()
        if layers is None or any(k.startswith(layer + ".") for layer in layers)
    ]
    data: Any = problem.train if which == "train" else problem.queries
    rows = []
    for x, y in data:
        loss = F.cross_entropy(model(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)]))
    return torch.stack(rows)


def twin(problem: Problem, cosine: bool, layers: Any = None, weighting: Any = None) -> Tensor:
    g, q = gradients(problem, "train", layers), gradients(problem, "queries", layers)
    if cosine:
        g, q = g / g.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True)
    rows = q @ g.T
    if problem.reduce is None:
        return rows
    if weighting == "norm":
        rows = rows / q.norm(dim=1, keepdim=True)
    if weighting == "noise":
        rows = rows / rows.std(1, keepdim=True)
    if problem.reduce == "mean":
        return rows.mean(0, keepdim=True)
    labels = problem.queries.tensors[1]  # type: ignore[union-attr]
    return torch.stack([rows[labels == k].mean(0) for k in labels.unique()])


METHODS = {"dot": (GradDot, False), "cos": (GradCos, True)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduce", [None, "mean", "class"])
def test_queries_follow_the_formula(method: str, name: str, reduce: Any) -> None:
    kind, cosine = METHODS[method]
    problem, checkpoints = make(name, reduce=reduce, batch_size=5)
    close(replay(kind(), problem, checkpoints).values, twin(problem, cosine))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighting", ["norm", "noise"])
def test_query_weightings_and_named_layers(method: str, weighting: Any) -> None:
    kind, cosine = METHODS[method]
    problem, checkpoints = make("cnn", reduce="mean")
    scores = replay(kind(layers=["3"], query_weighting=weighting), problem, checkpoints)
    close(scores.values, twin(problem, cosine, ["3"], weighting))


def test_self() -> None:
    problem, checkpoints = make("relu", queries="self")
    g = gradients(problem, "train")
    close(replay(GradDot(), problem, checkpoints).values, g.square().sum(1)[None])
    assert GradDot().unsupported(problem) is None
    with pytest.raises(UnsupportedProblemError, match="with itself is 1 for every example"):
        replay(GradCos(), problem, checkpoints)


def test_a_cosine_survives_gradients_whose_squares_underflow() -> None:
    problem, checkpoints = make("logistic", torch.float32)
    last = checkpoints[-1]

    def shrunk(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
        return 1e-25 * F.cross_entropy(logits, y, reduction=reduction)

    small = Problem(problem.model, shrunk, problem.train, problem.queries)
    expected = replay(GradCos(), problem, [last]).values
    assert float(replay(GradDot(), small, [last]).values.abs().max()) == 0.0
    close(replay(GradCos(), small, [last]).values, expected.double(), 1e-5)

    def none(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
        return 0.0 * F.cross_entropy(logits, y, reduction=reduction)

    nothing = Problem(problem.model, none, problem.train, problem.queries)
    assert float(replay(GradCos(), nothing, [last]).values.abs().max()) == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_single_precision_is_close_to_double(method: str, name: str) -> None:
    kind, _ = METHODS[method]
    expected = replay(kind(), *make(name)).values
    values = replay(kind(), *make(name, torch.float32)).values
    assert values.dtype == torch.float32
    close(values, expected, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_batch_size_changes_nothing_and_everything_is_left_as_found(method: str) -> None:
    kind, _ = METHODS[method]
    problem, checkpoints = make("cnn")
    problem.model.train()
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    state = torch.get_rng_state()
    expected = replay(kind(), problem, checkpoints).values
    assert problem.model.training
    assert all(p.grad is None for p in problem.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in problem.model.modules())
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"num_workers": 1}):
        close(replay(kind(), *make("cnn", **options)).values, expected)
