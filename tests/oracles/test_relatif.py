"""RelatIF against its two divisors from explicit matrices in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_influence_functions import (  # type: ignore[import-not-found]
    N,
    Twin,
    V,
    close,
    data,
    problem,
)
from torch import Tensor
from torch.utils.data import TensorDataset

from baselines.influence_functions import InfluenceFunction
from baselines.relatif import RelatIF
from fine_bench import Checkpoint, InfluenceScores, Problem, replay
from fine_bench.gradients import GradientEngine
from fine_bench.gradients.curvature.ekfac import fit_ekfac
from fine_bench.gradients.curvature.products import Roots
from fine_bench.types import UnsupportedProblemError


def scores(task: Problem, **options: Any) -> InfluenceScores:
    return replay(RelatIF(**options), task, [Checkpoint(task.model.state_dict(), lr=0.1)])


def inverse_twin(task: Problem, solver: str, kind: str, damping: float) -> tuple[Tensor, Twin]:
    """(C + λI)⁻¹ as a matrix. For EK-FAC one column after the other, which other tests check."""
    twin = Twin(task)
    size = len(twin.theta)
    if solver != "ekfac":
        C = twin.curvature(kind)
        return torch.linalg.inv(C + damping * torch.eye(size).double()), twin
    engine = GradientEngine(task.model, task.loss)
    roots = Roots(kind, task.loss, torch.zeros(N, 1))  # type: ignore[arg-type]
    fitted = fit_ekfac(engine, lambda: task.batches("train"), roots, N)
    fitted.damp(damping, 0.0)
    (x, y), wanted = task.train.tensors, torch.eye(size).double()  # type: ignore[attr-defined]
    from fine_bench.gradients.curvature.products import as_direction, as_rows

    one = engine(x[:1], y[:1])
    pattern = one.weighted_sum(one.norm2()[None])
    inverse = as_rows(fitted.solve(as_direction(wanted, pattern)))
    engine.close()
    return inverse, twin


@pytest.mark.parametrize("queries", ["queries", "self"])
@pytest.mark.parametrize("relative", ["theta", "loss"])
@pytest.mark.parametrize(
    ("solver", "kind"),
    [
        ("exact", "ggn"),
        ("exact", "empirical_fisher"),
        ("cg", "ggn"),
        ("arnoldi", "ggn"),
        ("ekfac", "fisher"),
        ("ekfac", "empirical_fisher"),
    ],
)
@pytest.mark.parametrize("name", ["relu", "cnn"])
def test_the_divisors(name: str, solver: str, kind: str, relative: str, queries: str) -> None:
    task = problem(name, queries, batch_size=9)
    inverse, twin = inverse_twin(task, solver, kind, 0.04)
    moves = twin.gi @ inverse
    sizes = moves.norm(dim=1) if relative == "theta" else (moves * twin.gi).sum(1).sqrt()
    expected = twin.gq @ moves.T / sizes
    options: dict[str, Any] = {"tol": 1e-12} if solver == "cg" else {}
    found = scores(
        task, relative=relative, solver=solver, curvature=kind, damping=0.04, **options
    ).values
    tol = 1e-8 if solver == "cg" else 1e-10
    close(found, expected.diagonal()[None] if queries == "self" else expected, tol)


def test_the_loss_relative_score_is_a_cosine() -> None:
    """Bounded by Cauchy and Schwarz, and met by an example that is the query."""
    x, y = data((5,), N, 0)
    task = problem("relu")
    itself = Problem(task.model, F.cross_entropy, TensorDataset(x, y), TensorDataset(x, y))
    found = scores(itself, relative="loss").values
    own = scores(Problem(task.model, F.cross_entropy, TensorDataset(x, y), "self")).values
    close(found.diagonal()[None], own, 1e-10)
    assert bool((found.abs() <= own.T * (1 + 1e-9)).all())


def test_it_forgets_how_large_an_example_is() -> None:
    """A loss that counts tenfold has ten times the influence, and the same relative one."""
    task = problem("logistic")
    weight = torch.ones(N, dtype=torch.float64)
    weight[3] = 10.0
    x, y = task.train.tensors  # type: ignore[attr-defined]

    def loss(z: Tensor, target: Tensor, reduction: str) -> Tensor:
        value = F.cross_entropy(z, target[:, 0].long(), reduction=reduction)
        return value * target[:, 1]

    xq, yq = task.queries.tensors  # type: ignore[attr-defined,union-attr]
    ask = TensorDataset(xq, torch.stack([yq.double(), torch.ones(V).double()], 1))

    def relative(w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        train = TensorDataset(x, torch.stack([y.double(), w], 1))
        weighted = Problem(task.model, loss, train, ask)
        # so much damping that the curvature does not feel the weight
        options: dict[str, Any] = {"solver": "exact", "damping": 1e9}
        plain = replay(
            InfluenceFunction(**options), weighted, [Checkpoint(task.model.state_dict(), 0.1)]
        ).values
        return plain, scores(weighted, relative=kind, **options).values

    for kind in ("theta", "loss"):
        before, divided_before = relative(torch.ones(N).double(), kind)
        after, divided_after = relative(weight, kind)
        close(after[:, 3], 10 * before[:, 3], 1e-6)
        close(divided_after[:, 3], divided_before[:, 3], 1e-6)


@pytest.mark.parametrize("weighting", [None, "norm", "noise"])
@pytest.mark.parametrize("relative", ["theta", "loss"])
def test_reductions_are_weighted_means_of_rows(relative: str, weighting: str | None) -> None:
    options = {"relative": relative, "query_weighting": weighting}
    rows = scores(problem("relu"), **options).values
    twin = Twin(problem("relu"))
    weights = {
        None: torch.ones(V, dtype=torch.float64),
        "norm": 1 / twin.gq.norm(dim=1),
        "noise": 1 / rows.std(1),
    }[weighting]
    mean = scores(problem("relu", reduce="mean", batch_size=4), **options)
    close(mean.values, (weights[:, None] * rows).mean(0, keepdim=True), 1e-9)
    assert mean.method == "relatif"


def test_an_example_without_gradient_scores_zero() -> None:
    task = problem("tanh no bias")
    x, y = task.train.tensors  # type: ignore[attr-defined]
    x = x.clone()
    x[4] = 0  # without a bias, no weight is used
    again = Problem(task.model, task.loss, TensorDataset(x, y), task.queries)
    for relative in ("theta", "loss"):
        for solver in ("ekfac", "exact"):
            found = scores(again, relative=relative, solver=solver).values
            assert float(found[:, 4].abs().max()) == 0
            assert float(found[:, 3].abs().max()) > 0


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"relative must be one of \('theta', 'loss'\), got 'x'"):
        RelatIF(relative="x")  # type: ignore[arg-type]
    monkeypatch.setattr("baselines.influence_functions.SELF_CG_LIMIT", 20)
    for queries in ("self", "queries"):
        with pytest.raises(UnsupportedProblemError, match="would solve 24 systems"):
            scores(problem("relu", queries), solver="cg")
    # the plain influence function solves for queries only
    assert InfluenceFunction(solver="cg").unsupported(problem("relu")) is None
