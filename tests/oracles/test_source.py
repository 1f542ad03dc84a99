"""SOURCE against matrix exponentials of explicit curvatures, and against unrolled training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import baselines.source as module
from baselines.influence_functions import InfluenceFunction
from baselines.source import SOURCE, accumulated
from fine_bench import Checkpoint, Problem, replay
from fine_bench.types import UnsupportedProblemError
from support.tensors import close

N, V, CLASSES = 14, 4, 3
LR = [0.4, 0.3, 0.2, 0.2, 0.1]
STEPS = [3, 7, 9, 15, 20]


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)).double()


def checkpoints() -> list[Checkpoint]:
    return [
        Checkpoint(net(seed).state_dict(), lr=lr, step=step)
        for seed, (lr, step) in enumerate(zip(LR, STEPS, strict=True))
    ]


def problem(queries: str = "queries", **options: Any) -> Problem:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N + V, 4, generator=g, dtype=torch.float64) + 0.4
    y = torch.randint(CLASSES, (N + V,), generator=g)
    wanted = "self" if queries == "self" else TensorDataset(x[N:], y[N:])
    return Problem(net(0), F.cross_entropy, TensorDataset(x[:N], y[:N]), wanted, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- the twin


def layer_gradients(model: nn.Module, x: Tensor, label: int) -> list[Tensor]:
    """[W|b] of each layer, one example."""
    loss = F.cross_entropy(model(x[None]), torch.tensor([label]))
    w1, b1, w2 = torch.autograd.grad(loss, list(model.parameters()))
    return [torch.cat([w1, b1[:, None]], 1), w2]


def flat(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.cat([g.flatten() for g in layer_gradients(model, xi, int(yi))])
            for xi, yi in zip(x, y, strict=True)
        ]
    )


def curvature(points: list[Checkpoint], x: Tensor) -> Tensor:
    """The EK-FAC matrix of several checkpoints together, block by block with ``torch.kron``."""
    blocks = []
    for layer in range(2):
        A: Any = 0
        G: Any = 0
        terms = []
        for point in points:
            model = net(0)
            model.load_state_dict(dict(point.params))
            for xi in x:
                a = torch.cat([xi, xi.new_ones(1)]) if layer == 0 else model[:2](xi[None])[0]
                a = a.detach()
                A = A + torch.outer(a, a)
                p = torch.softmax(model(xi[None])[0].detach(), 0)
                for k in range(CLASSES):
                    g = layer_gradients(model, xi, k)[layer]
                    delta = g @ a / (a @ a)
                    G = G + p[k] * torch.outer(delta, delta)
                    terms.append((p[k], g))
        qa, qg = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
        s = sum(p * (qg.T @ g @ qa).square() for p, g in terms) / (len(points) * len(x))
        basis = torch.kron(qg, qa)
        blocks.append(basis @ torch.diag(s.flatten()) @ basis.T)  # type: ignore[union-attr]
    return torch.block_diag(*blocks)


def twin(
    task: Problem, parts: list[list[int]], momentum: float = 0.0, decay: float = 0.0
) -> Tensor:
    """g_qᵀ Σ_l (S_L ⋯ S_{l+1}) R_l ḡ_l from matrix exponentials, ``(V, N)``."""
    points = checkpoints()
    x, y = task.train.tensors  # type: ignore[attr-defined]
    queries = task.train if isinstance(task.queries, str) else task.queries
    last = net(0)
    last.load_state_dict(dict(points[-1].params))
    left = flat(last, *queries.tensors)  # type: ignore[attr-defined]
    counts = [b - a for a, b in zip([0, *STEPS], STEPS, strict=False)]
    total: Any = 0
    for part in reversed(parts):
        time = sum(LR[c] * counts[c] for c in part) / (1 - momentum)
        H = curvature([points[c] for c in part], x)
        size = len(H)
        H = H + decay * torch.eye(size).double()
        # exp of [[−H, I], [0, 0]] τ has ∫_0^τ exp(−H s) ds = (I − exp(−τH)) H⁻¹ in its corner
        big = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
        big[:size, :size], big[:size, size:] = -H, torch.eye(size).double()
        whole = torch.linalg.matrix_exp(big * time)
        mean: Any = 0
        for c in part:
            model = net(0)
            model.load_state_dict(dict(points[c].params))
            mean = mean + flat(model, x, y) / len(part)
        total = total + left @ whole[:size, size:] @ mean.T
        left = left @ whole[:size, :size]
    result: Tensor = total
    return result


# --------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("queries", ["queries", "self"])
@pytest.mark.parametrize(
    ("segments", "parts"),
    [(1, [[0, 1, 2, 3, 4]]), (2, [[0, 1, 2], [3, 4]]), (9, [[0], [1], [2], [3], [4]])],
)
def test_the_formula(segments: int, parts: list[list[int]], queries: str) -> None:
    task = problem(queries, batch_size=5)
    expected = twin(task, parts, momentum=0.5, decay=0.02)
    found = replay(SOURCE(segments=segments, momentum=0.5, weight_decay=0.02), task, checkpoints())
    close(found.values, expected.diagonal()[None] if queries == "self" else expected, 1e-9)
    assert len(found.extras["time"]) == len(parts)
    assert found.method == "source"


def test_early_segments_are_forgotten() -> None:
    """The order of the segments matters: turned around, the scores are others."""
    task = problem()
    found = replay(SOURCE(segments=2), task, checkpoints()).values
    wrong = twin(task, [[3, 4], [0, 1, 2]])
    assert float((found - wrong).abs().max()) > 0.01 * float(found.abs().max())


def test_one_endless_segment_is_the_influence_function() -> None:
    task = problem()
    decay = 0.05  # or the directions without curvature would grow for ever
    found = replay(
        SOURCE(segments=1, weight_decay=decay, steps_per_checkpoint=10**6), task, checkpoints()[-1:]
    )
    plain = replay(InfluenceFunction(damping=decay), task, checkpoints())
    close(found.values, plain.values, 1e-9)


def test_a_segment_a_step_is_the_unrolled_derivative() -> None:
    """Linear regression: constant curvature and exact EK-FAC, so only the time step errs."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, generator=g, dtype=torch.float64)
    y = torch.randn(8, 1, generator=g, dtype=torch.float64)

    def loss(z: Tensor, target: Tensor, reduction: str) -> Tensor:
        return (z - target).square().sum(1) / 2

    def run(lr: float, steps: int) -> tuple[Tensor, list[Checkpoint]]:
        """−dℓ_q/dε after gradient descent by automatic differentiation, and its checkpoints."""
        weights = torch.full((8,), 1 / 8, dtype=torch.float64, requires_grad=True)
        theta = torch.zeros(1, 3, dtype=torch.float64)
        states = []
        for step in range(steps):
            states.append(Checkpoint({"weight": theta.detach().clone()}, lr=lr, step=step + 1))
            theta = theta - lr * (weights * (x @ theta.T - y)[:, 0]) @ x
        states.append(Checkpoint({"weight": theta.detach().clone()}, lr=lr, step=steps + 1))
        losses = loss(x[:3] @ theta.T, y[:3], "none")
        rows = [torch.autograd.grad(value, weights, retain_graph=True)[0] for value in losses]
        return -torch.stack(rows), states

    task = Problem(
        nn.Linear(3, 1, bias=False).double(),
        loss,
        TensorDataset(x, y),
        TensorDataset(x[:3], y[:3]),
    )
    errors = []
    for lr, steps in ((0.1, 10), (0.025, 40)):
        truth, states = run(lr, steps)
        estimator = SOURCE(segments=steps + 1, curvature="ggn", steps_per_checkpoint=1)
        found = replay(estimator, task, states).values
        errors.append(float((found - truth).abs().max() / truth.abs().max()))
    assert errors[1] < 0.06
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("weighting", [None, "norm", "noise"])
def test_reductions_are_weighted_means_of_rows(weighting: str | None) -> None:
    rows = replay(SOURCE(), problem(), checkpoints()).values
    last = net(0)
    last.load_state_dict(dict(checkpoints()[-1].params))
    task = problem()
    xq, yq = task.queries.tensors  # type: ignore[union-attr]
    weights = {
        None: torch.ones(V, dtype=torch.float64),
        "norm": 1 / flat(last, xq, yq).norm(dim=1),
        "noise": 1 / rows.std(1),
    }[weighting]
    estimator = SOURCE(query_weighting=weighting)  # type: ignore[arg-type]
    mean = replay(estimator, problem(reduce="mean", batch_size=3), checkpoints())
    close(mean.values, (weights[:, None] * rows).mean(0, keepdim=True), 1e-9)


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [replay(SOURCE(), problem(q), checkpoints()).values for q in ("queries", "self")]
    monkeypatch.setattr(module, "QUERY_FLOATS", 1)
    for queries, expected in zip(("queries", "self"), both, strict=True):
        close(replay(SOURCE(), problem(queries), checkpoints()).values, expected, 1e-12)


@pytest.mark.parametrize("reduce", [None, "mean"])
def test_fewer_gradients_held_at_once_give_the_same(
    reduce: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = replay(SOURCE(segments=2), problem(reduce=reduce), checkpoints()).values
    sizes: list[int] = []
    whole = module.contract_sum

    def counted(parts: Any, direction: Any) -> Tensor:
        sizes.append(len(parts))
        return whole(parts, direction)

    monkeypatch.setattr(module, "contract_sum", counted)
    monkeypatch.setattr(module, "HELD_FLOATS", 1)
    found = replay(SOURCE(segments=2), problem(reduce=reduce), checkpoints()).values
    assert set(sizes) == {1}
    close(found, expected, 1e-12)


def test_accumulated_keeps_its_digits() -> None:
    s = torch.tensor([0.0, 1e-300, 1e-12, 1e3], dtype=torch.float64)
    expected = torch.tensor([5.0, 5.0, 5.0 - 12.5e-12, 1e-3], dtype=torch.float64)
    assert torch.allclose(accumulated(s, 5.0), expected, rtol=1e-15)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"segments": 0}, "segments and n_samples must be at least 1, got 0 and 1"),
        ({"curvature": "hessian"}, "curvature must be one of .* got 'hessian'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number"),
        ({"steps_per_checkpoint": 0}, "steps_per_checkpoint must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SOURCE(**options)  # type: ignore[arg-type]
    unknown = [Checkpoint(c.params, lr=c.lr) for c in checkpoints()]
    for points in (unknown, checkpoints()[::-1], [unknown[0], *checkpoints()[1:]]):
        with pytest.raises(ValueError, match=r"needs the optimiser steps .* got step=\["):
            replay(SOURCE(), problem(), points)
    monkeypatch.setattr(module, "SELF_FLOATS", 500)
    with pytest.raises(UnsupportedProblemError, match=r"each of 14 gradients of 40 parameters"):
        replay(SOURCE(), problem("self"), checkpoints())
    replay(SOURCE(), problem(), checkpoints())
