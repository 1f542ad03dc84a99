"""DataInf on a classifier against the mean of explicit inverses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines.datainf import DataInf
from fine_bench import Checkpoint, Problem, replay
from support.tensors import close

N, V, CLASSES = 14, 4, 3


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def problem(queries: str = "queries", **options: Any) -> Problem:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N + V, 4, generator=g, dtype=torch.float64) + 0.4
    y = torch.randint(CLASSES, (N + V,), generator=g)
    wanted = "self" if queries == "self" else TensorDataset(x[N:], y[N:])
    return Problem(net(), F.cross_entropy, TensorDataset(x[:N], y[:N]), wanted, **options)  # type: ignore[arg-type]


def gradients(data: Any) -> list[Tensor]:
    """``(n, P_l)`` of both layers."""
    model, rows = net(), []
    for x, y in data:
        loss = F.cross_entropy(model(x[None]), y[None])
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append([torch.cat([g.flatten() for g in found[i : i + 2]]) for i in (0, 2)])
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


def directly(queries: list[Tensor], train: list[Tensor]) -> Tensor:
    total = torch.zeros(len(queries[0]), len(train[0]), dtype=torch.float64)
    for v, g in zip(queries, train, strict=True):
        lam = 0.1 * float(g.square().mean()) * torch.eye(g.shape[1], dtype=torch.float64)
        inverses = [torch.linalg.inv(torch.outer(gj, gj) + lam) for gj in g]
        total += v @ torch.stack(inverses).mean(0) @ g.T
    return total


@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("held", [True, False])
def test_by_pairs_and_by_sums(monkeypatch: pytest.MonkeyPatch, batch_size: int, held: bool) -> None:
    if not held:
        monkeypatch.setattr("baselines.datainf.HELD_FLOATS", 10)
    asked = problem(batch_size=batch_size)
    train = gradients(asked.train)
    expected = directly(gradients(asked.queries), train)
    method = DataInf()
    close(replay(method, asked, [Checkpoint(net().state_dict(), lr=0.1)]).values, expected)
    # both ways of summing stand beside each other, unless nothing may be held
    assert method._pairs == ([True, False] if held else [False, False])
    own = directly(train, train).diagonal()[None]
    asked = problem("self", batch_size=batch_size)
    close(replay(DataInf(), asked, [Checkpoint(net().state_dict(), lr=0.1)]).values, own)
