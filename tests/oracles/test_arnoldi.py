"""Arnoldi influence functions against explicit matrices, spaces and eigenvectors in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_influence_functions import (  # type: ignore[import-not-found]
    CURVATURES,
    N,
    Twin,
    V,
    close,
    problem,
    safe_damping,
    scores,
)
from torch import Tensor

import baselines.influence_functions as module
from baselines.arnoldi import RitzPairs, krylov_space
from baselines.influence_functions import InfluenceFunction
from fine_bench.seeds import stream
from fine_bench.types import UnsupportedProblemError


def spread(size: int, condition: float) -> Tensor:
    """A symmetric matrix whose eigenvalues fall from 1 to 1/condition in equal ratios."""
    g = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]
    return q @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10(), size).double()) @ q.T


def times(A: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: v @ A


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", ["logistic", "relu", "tanh no bias", "cnn", "norm"])
def test_a_full_space_is_the_exact_solver(name: str, kind: str) -> None:
    task = problem(name)
    twin = Twin(task)
    damping = safe_damping(twin, kind)
    found = scores(task, "arnoldi", curvature=kind, damping=damping, krylov=10_000)
    close(found.values, twin.values(kind, damping), 1e-9)


@pytest.mark.parametrize("dim", [1, 5, 12])
@pytest.mark.parametrize("queries", ["queries", "self"])
def test_a_small_space_is_the_formula(dim: int, queries: str) -> None:
    """The same space from plain powers of C, its compression inverted, λ in the rest."""
    task = problem("relu", queries)
    twin = Twin(task)
    C = twin.curvature("ggn")
    start = torch.randn(
        len(C), generator=stream(3, "influence-function/arnoldi"), dtype=torch.float64
    )
    powers = [start / start.norm()]
    for _ in range(dim - 1):
        powers.append(C @ powers[-1])
        powers[-1] = powers[-1] / powers[-1].norm()
    Q = torch.linalg.qr(torch.stack(powers, 1))[0]
    approximate = Q @ Q.T @ C @ Q @ Q.T + 0.05 * torch.eye(len(C)).double()
    expected = twin.gq @ torch.linalg.solve(approximate, twin.gi.T)
    found = scores(task, "arnoldi", damping=0.05, krylov=dim, seed=3)
    # plain powers lose digits as the space grows; that is what the orthogonalisation is for
    close(found.values, expected.diagonal()[None] if queries == "self" else expected, 1e-6)


def test_the_complement_of_the_space_has_the_eigenvalue_lambda() -> None:
    A = spread(30, 1e6)
    basis, compressed = krylov_space(times(A), 30, 6, stream(0, "test"))
    pairs = RitzPairs(basis, compressed, 0.01)
    v = torch.randn(3, 30, generator=stream(1, "test"), dtype=torch.float64)
    outside = v - (v @ basis.T) @ basis
    close(pairs.solve(outside), outside / 0.01, 1e-11)
    inside = v @ basis.T @ basis
    solved = pairs.solve(inside)
    close(
        solved @ basis.T,
        torch.linalg.solve(compressed + 0.01 * torch.eye(6).double(), (inside @ basis.T).T).T,
        1e-10,
    )


@pytest.mark.parametrize("power", [1, 2])
def test_quadratic_forms_from_projections(power: int) -> None:
    A = spread(20, 1e4)
    pairs = RitzPairs(*krylov_space(times(A), 20, 5, stream(0, "test")), 0.01)
    v = torch.randn(4, 20, generator=stream(1, "test"), dtype=torch.float64)
    solved = pairs.solve(v)
    expected = (solved * (v if power == 1 else solved)).sum(1)
    close(pairs.quadratic(pairs.vectors @ v.T, v.square().sum(1), power), expected, 1e-10)


def test_the_basis_stays_orthonormal_where_one_pass_would_lose_it() -> None:
    A = spread(120, 1e12)
    basis, compressed = krylov_space(times(A), 120, 100, stream(0, "test"))
    close(basis @ basis.T, torch.eye(100).double(), 1e-13)
    close(compressed, basis @ A @ basis.T, 1e-12)

    # the three-term recurrence, without it
    v, previous, rows = basis[0], torch.zeros(120).double(), []
    length = 0.0
    for _ in range(100):
        rows.append(v)
        w = A @ v - length * previous
        w = w - (w @ v) * v
        length = float(w.norm())
        previous, v = v, w / length
    lost = torch.stack(rows)
    assert float((lost @ lost.T - torch.eye(100).double()).abs().max()) > 0.1


def test_a_space_that_closes_early_is_continued() -> None:
    """Three different eigenvalues: the Krylov space of any vector has three dimensions."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.float64))[0]
    A = q @ torch.diag(torch.tensor([0.0, 0, 0, 2, 2, 2, 2, 5, 5]).double()) @ q.T
    basis, compressed = krylov_space(times(A), 9, 9, stream(0, "test"))
    close(basis @ basis.T, torch.eye(9).double(), 1e-12)
    close(torch.linalg.eigvalsh(compressed), torch.linalg.eigvalsh(A), 1e-12)
    rhs = torch.randn(2, 9, generator=g, dtype=torch.float64)
    expected = torch.linalg.solve(A + 0.1 * torch.eye(9).double(), rhs.T).T
    close(RitzPairs(basis, compressed, 0.1).solve(rhs), expected, 1e-11)


def test_more_dimensions_come_closer() -> None:
    task = problem("cnn")
    expected = scores(task, "exact").values
    errors = [
        float((scores(task, "arnoldi", krylov=k).values - expected).abs().max())
        for k in (2, 15, 40)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_batches_reductions_and_start() -> None:
    options: dict[str, Any] = {"krylov": 20}
    rows = scores(problem("relu"), "arnoldi", **options).values
    close(scores(problem("relu", batch_size=5), "arnoldi", **options).values, rows, 1e-9)
    mean = scores(problem("relu", reduce="mean"), "arnoldi", **options).values
    close(mean, rows.mean(0, keepdim=True), 1e-9)
    assert rows.shape == (V, N)
    own = scores(problem("relu", "self", batch_size=5), "arnoldi", **options).values
    close(own, scores(problem("relu", "self"), "arnoldi", **options).values, 1e-9)
    other = scores(problem("relu"), "arnoldi", seed=1, krylov=5).values
    assert float((other - scores(problem("relu"), "arnoldi", krylov=5).values).abs().max()) > 1e-6


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="krylov must be at least 1, got 0"):
        InfluenceFunction(solver="arnoldi", krylov=0)
    with pytest.raises(ValueError, match=r'"arnoldi" divides by λ .* got damping 0'):
        scores(problem("relu"), "arnoldi", damping=0.0)
    task = problem("tanh no bias")
    low = float(torch.linalg.eigvalsh(Twin(task).curvature("hessian"))[0])
    with pytest.raises(ValueError, match=r"the Krylov space holds an eigenvalue of -\d"):
        scores(task, "arnoldi", curvature="hessian", damping=-0.5 * low)
    monkeypatch.setattr(module, "KRYLOV_FLOATS", 640)
    with pytest.raises(UnsupportedProblemError, match=r"hold 200 vectors of 64 .* pass krylov=10"):
        scores(problem("relu"), "arnoldi")
