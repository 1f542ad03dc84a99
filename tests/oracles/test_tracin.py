"""TracIn against the formula, in float64, with gradients taken one example at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from baselines.tracin import TracIn
from fine_bench import Checkpoint, Problem, replay
from fine_bench.gradients.query_weighting import reference_rows
from support.networks import CLASSES, MODELS, models
from support.tensors import close

N, V = 23, 9


def make(
    name: str, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Problem, list[Checkpoint]]:
    """A problem with random data, and three checkpoints of a short training run."""
    model, shape = models()[name]
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N + V, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (N + V,), generator=generator)
    trained = copy.deepcopy(model)
    checkpoints = []
    for lr in (0.5, 0.2, 0.1):
        for _ in range(4):
            loss = F.cross_entropy(trained(x[:N]), y[:N])
            for p, g in zip(
                trained.parameters(),
                torch.autograd.grad(loss, list(trained.parameters())),
                strict=True,
            ):
                p.data -= lr * g
        state = {k: v.detach().clone().to(dtype) for k, v in trained.state_dict().items()}
        checkpoints.append(Checkpoint(params=state, lr=lr))
    queries = options.pop("queries", TensorDataset(x[N:].to(dtype), y[N:]))
    problem = Problem(
        model.to(dtype), F.cross_entropy, TensorDataset(x[:N].to(dtype), y[:N]), queries, **options
    )
    return problem, checkpoints


def gradients(problem: Problem, checkpoint: Checkpoint, which: str, layers: Any = None) -> Tensor:
    """One gradient a row, by autograd, one example at a time."""
    model = copy.deepcopy(problem.model)
    model.load_state_dict(dict(checkpoint.params))
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


def twin(
    problem: Problem,
    checkpoints: list[Checkpoint],
    layers: Any = None,
    weighting: str | None = None,
) -> Tensor:
    total: Any = 0
    for checkpoint in checkpoints:
        g = gradients(problem, checkpoint, "train", layers)
        if isinstance(problem.queries, str):
            total = total + checkpoint.lr * (g * g).sum(1)[None]
            continue
        q = gradients(problem, checkpoint, "queries", layers)
        rows = q @ g.T
        if problem.reduce is not None:
            if weighting == "norm":
                rows = rows / q.norm(dim=1, keepdim=True)
            if weighting == "noise":
                rows = rows / rows.std(1, keepdim=True)
            labels = problem.queries.tensors[1]  # type: ignore[attr-defined]
            groups = (
                [torch.ones(V, dtype=torch.bool)]
                if problem.reduce == "mean"
                else [labels == k for k in labels.unique()]
            )
            rows = torch.stack([rows[group].mean(0) for group in groups])
        total = total + checkpoint.lr * rows
    return total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"reduce": "mean"}, {"reduce": "class"}], ids=str)
def test_queries_follow_the_formula(name: str, options: dict[str, Any]) -> None:
    problem, checkpoints = make(name, **options)
    scores = replay(TracIn(), problem, checkpoints)
    close(scores.values, twin(problem, checkpoints))
    assert scores.values.dtype == torch.float64
    assert (scores.method, scores.target) == ("tracin", problem.target)


@pytest.mark.parametrize("name", MODELS)
def test_self_follows_the_formula(name: str) -> None:
    problem, checkpoints = make(name, queries="self")
    close(replay(TracIn(), problem, checkpoints).values, twin(problem, checkpoints))


@pytest.mark.parametrize("weighting", ["norm", "noise"])
@pytest.mark.parametrize("reduce", ["mean", "class"])
@pytest.mark.parametrize("name", ["relu", "cnn"])
def test_query_weightings(name: str, reduce: str, weighting: Any) -> None:
    problem, checkpoints = make(name, reduce=reduce)
    values = replay(TracIn(query_weighting=weighting), problem, checkpoints).values
    close(values, twin(problem, checkpoints, weighting=weighting))
    plain = replay(TracIn(), problem, checkpoints).values
    assert float((values / values.norm() - plain / plain.norm()).abs().max()) > 1e-3


@pytest.mark.parametrize("limit", [0, 2**27], ids=["factors", "formed"])
@pytest.mark.parametrize("weighting", [None, "noise"])
def test_formed_and_factored_queries_agree_with_the_formula(
    limit: int, weighting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baselines.tracin.FORMED_FLOATS", limit)
    monkeypatch.setattr("fine_bench.gradients.query_weighting.N_REFERENCE", 11)
    rows = reference_rows(N)
    assert len(rows) == 11
    problem, checkpoints = make("cnn", batch_size=4)
    every = [twin(problem, [Checkpoint(params=c.params, lr=1.0)]) for c in checkpoints]
    close(replay(TracIn(), problem, checkpoints).values, twin(problem, checkpoints))
    mean, _ = make("cnn", reduce="mean", batch_size=4)
    values = replay(TracIn(query_weighting=weighting), mean, checkpoints).values
    expected = sum(
        c.lr * (k / (k[:, rows].std(1, keepdim=True) if weighting else 1.0)).mean(0, keepdim=True)
        for c, k in zip(checkpoints, every, strict=True)
    )
    assert isinstance(expected, Tensor)
    close(values, expected)


@pytest.mark.parametrize("layers", [["0"], ["3"], ["0", "3"]], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduce": "mean"}, {"queries": "self"}], ids=str)
def test_named_layers(layers: list[str], options: dict[str, Any]) -> None:
    problem, checkpoints = make("cnn", **options)
    values = replay(TracIn(layers=layers), problem, checkpoints).values
    close(values, twin(problem, checkpoints, layers))


def test_the_sign_and_size_of_an_sgd_step() -> None:
    problem, checkpoints = make("tanh, no bias")
    last = checkpoints[-1]
    lr = 1e-5
    values = replay(TracIn(), problem, [Checkpoint(params=last.params, lr=lr)]).values
    x, y = problem.train.tensors  # type: ignore[attr-defined]
    xq, yq = problem.queries.tensors  # type: ignore[union-attr]
    for i in (0, 5, 11):
        model = copy.deepcopy(problem.model)
        model.load_state_dict(dict(last.params))
        with torch.no_grad():
            before = F.cross_entropy(model(xq), yq, reduction="none")
        optimiser = torch.optim.SGD(model.parameters(), lr=lr)
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        optimiser.step()
        with torch.no_grad():
            drop = before - F.cross_entropy(model(xq), yq, reduction="none")
        # positive where the step lowered the query's loss
        close(values[:, i], drop, 1e-3)


class Indexed(Dataset[Any]):
    """The same data, one item at a time, with the index the callback's loaders add."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return (*self.data[i], i)


@pytest.mark.parametrize("options", [{}, {"reduce": "mean"}, {"queries": "self"}], ids=str)
def test_batch_size_order_and_workers_change_nothing(options: dict[str, Any]) -> None:
    problem, checkpoints = make("relu", **options)
    method = TracIn(query_weighting="noise")
    expected = replay(method, problem, checkpoints).values
    for size in (1, 4, N):
        small, _ = make("relu", batch_size=size, **options)
        close(replay(TracIn(query_weighting="noise"), small, checkpoints).values, expected)
    loaded = Problem(
        problem.model,
        problem.loss,
        Indexed(problem.train),  # type: ignore[arg-type]
        problem.queries,
        reduce=problem.reduce,
        batch_size=8,
        num_workers=1,
    )
    close(replay(method, loaded, checkpoints).values, expected)
    if problem.queries != "self":
        x, y = problem.queries.tensors  # type: ignore[union-attr]
        turned = Problem(
            problem.model,
            problem.loss,
            problem.train,
            TensorDataset(x.flip(0), y.flip(0)),
            reduce=problem.reduce,
        )
        again = replay(method, turned, checkpoints).values
        close(again, expected.flip(0) if problem.reduce is None else expected)
    x, y = problem.train.tensors  # type: ignore[attr-defined]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    shuffled = Problem(
        problem.model,
        problem.loss,
        TensorDataset(x[order], y[order]),
        problem.queries,
        reduce=problem.reduce,
    )
    close(replay(method, shuffled, checkpoints).values, expected[:, order])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"reduce": "mean"}, {"queries": "self"}], ids=str)
def test_single_precision_is_close_to_double(name: str, options: dict[str, Any]) -> None:
    problem, checkpoints = make(name, **options)
    single, single_checkpoints = make(name, torch.float32, **options)
    values = replay(TracIn(), single, single_checkpoints).values
    assert values.dtype == torch.float32
    close(values, replay(TracIn(), problem, checkpoints).values, 1e-4)


def test_everything_is_left_as_found() -> None:
    problem, checkpoints = make("cnn")
    problem.model.train()
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    state = torch.get_rng_state()
    replay(TracIn(), problem, checkpoints)
    assert problem.model.training
    assert all(p.grad is None for p in problem.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in problem.model.modules())


def test_refusals() -> None:
    problem, checkpoints = make("relu")
    with pytest.raises(ValueError, match='must be None, "norm" or "noise"'):
        TracIn(query_weighting="size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers \['7'\] are not in the model"):
        replay(TracIn(layers=["7"]), problem, checkpoints)
    method = TracIn()
    method.setup(problem)
    with pytest.raises(RuntimeError, match="compute\\(\\) before update\\(\\)"):
        method.compute()
    other, _ = make("logistic")
    with pytest.raises(ValueError, match="does not fit the model"):
        replay(TracIn(), other, checkpoints)
