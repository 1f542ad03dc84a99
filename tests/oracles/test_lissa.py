"""LiSSA against the series written out with explicit matrices, and against the exact solver."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_influence_functions import (  # type: ignore[import-not-found]
    CURVATURES,
    N,
    Twin,
    V,
    close,
    data,
    problem,
    safe_damping,
    scores,
)
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import baselines.influence_functions as module
from baselines.damped_system import examples
from baselines.influence_functions import InfluenceFunction
from baselines.lissa import MARGIN, TRIES, DivergedSeriesError, Lissa, power_iteration
from fine_bench import Problem
from fine_bench.gradients.curvature.products import CurvatureProducts
from fine_bench.gradients.held_products import HeldProducts
from fine_bench.seeds import stream
from fine_bench.types import UnsupportedProblemError


def definite(size: int, low: float, high: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues spread evenly from ``low`` to ``high``."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]
    return q @ torch.diag(torch.linspace(low, high, size, dtype=torch.float64)) @ q.T


def series_twin(twin: Twin, kind: str, lam: float, scale: float, depth: int) -> Tensor:
    """g_qᵀ [Σ_{j ≤ J} (I − A/s)^j / s] g_i, one power after the other."""
    A = twin.curvature(kind) + lam * torch.eye(len(twin.theta)).double()
    step = torch.eye(len(A)).double() - A / scale
    total, power = torch.zeros_like(A), torch.eye(len(A)).double()
    for _ in range(depth + 1):
        total, power = total + power / scale, power @ step
    return twin.gq @ total @ twin.gi.T


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", ["logistic", "relu", "cnn", "norm"])
def test_the_truncated_series_is_the_formula(name: str, kind: str) -> None:
    task = problem(name)
    twin = Twin(task)
    lam = safe_damping(twin, kind)
    top = float(torch.linalg.eigvalsh(twin.curvature(kind))[-1]) + lam
    options = {"curvature": kind, "damping": lam, "sample_size": None}
    # the power iteration of an indefinite matrix is slow to settle; the scale is given here
    found = scores(task, "lissa", scale=0.8 * top, depth=7, **options)
    close(found.values, series_twin(twin, kind, lam, 0.8 * top, 7), 1e-10)
    # seven terms are far from the inverse
    assert float((found.values - twin.values(kind, lam)).abs().max()) > 1e-3


@pytest.mark.parametrize("queries", ["queries", "self"])
@pytest.mark.parametrize("name", ["logistic", "relu"])
def test_it_converges_to_the_exact_solver(name: str, queries: str) -> None:
    task = problem(name, queries)
    expected = scores(task, "exact", damping=0.3).values
    errors = []
    for depth in (20, 80, 400):
        found = scores(task, "lissa", damping=0.3, depth=depth, sample_size=None)
        errors.append(float((found.values - expected).abs().max() / expected.abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10
    assert float(found.extras["residual"].max()) < 1e-9
    assert found.extras["residual"].shape == (N if queries == "self" else V,)


def test_sampled_series_are_right_on_average_and_less_noisy_by_repeats() -> None:
    """Draws are independent, so the mean over repeats is the series of all the data."""
    task = problem("logistic")
    options: dict[str, Any] = {"damping": 0.5, "scale": 4.0, "depth": 20}
    truth = series_twin(Twin(task), "ggn", 0.5, 4.0, 20)
    runs = torch.stack(
        [scores(task, "lissa", sample_size=6, seed=s, **options).values for s in range(30)]
    )
    z = (runs.mean(0) - truth) / (runs.std(0) / 30**0.5)
    assert float(z.square().mean()) < 2.0
    assert float(z.abs().max()) < 4.5
    averaged = torch.stack(
        [
            scores(task, "lissa", sample_size=6, seed=s, repeats=9, **options).values
            for s in range(100, 108)
        ]
    )
    ratio = (averaged - truth).square().mean() / (runs - truth).square().mean()
    assert 0.5 / 9 < float(ratio) < 2 / 9


def test_sampled_scores_do_not_depend_on_how_queries_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"damping": 0.3, "depth": 20, "sample_size": 7}
    whole = scores(problem("relu"), "lissa", **options).values
    close(scores(problem("relu", batch_size=5), "lissa", **options).values, whole, 1e-10)
    monkeypatch.setattr("baselines.inverses.SERIES_FLOATS", 1)  # one query after the other
    close(scores(problem("relu"), "lissa", **options).values, whole, 1e-10)
    other = scores(problem("relu"), "lissa", seed=1, **options).values
    assert float((other - whole).abs().max()) > 1e-6


def test_draws_are_read_from_any_data_set() -> None:
    task = problem("relu")

    class Items(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> Any:
            return task.train[i]

    options: dict[str, Any] = {"damping": 0.3, "depth": 20, "sample_size": 7}
    read = Problem(task.model, task.loss, Items(), task.queries)
    close(scores(read, "lissa", **options).values, scores(task, "lissa", **options).values, 1e-12)


def test_a_mean_over_queries_is_one_right_hand_side() -> None:
    options: dict[str, Any] = {"damping": 0.2, "depth": 40, "sample_size": None}
    rows = scores(problem("relu"), "lissa", **options)
    mean = scores(problem("relu", reduce="mean"), "lissa", **options)
    close(mean.values, rows.values.mean(0, keepdim=True), 1e-10)
    assert mean.extras["residual"].shape == (1,)
    assert rows.extras["residual"].shape == (V,)


def test_power_iteration() -> None:
    A = definite(20, -1.0, 6.0)
    assert power_iteration(lambda v: v @ A, 20, 1e-9, 2000) == pytest.approx(6.0, rel=1e-6)
    assert power_iteration(lambda v: -v @ A, 20, 1e-9, 2000) == pytest.approx(-6.0, rel=1e-6)


def test_a_scale_that_is_too_small_is_refused_with_one_that_would_do() -> None:
    task = problem("relu")
    top = float(torch.linalg.eigvalsh(Twin(task).curvature("ggn"))[-1]) + 0.3
    options: dict[str, Any] = {"damping": 0.3, "sample_size": None, "depth": 400}
    with pytest.raises(DivergedSeriesError, match=r"LiSSA diverges at scale=.*give scale=") as e:
        scores(task, "lissa", scale=0.49 * top, **options)
    advised = float(str(e.value).split("give scale=")[1].split(",")[0])
    found = scores(task, "lissa", scale=advised, **options).values
    close(found, scores(task, "exact", damping=0.3).values, 1e-8)
    # just above half of the largest eigenvalue it converges
    scores(task, "lissa", scale=0.51 * top, **options)


def test_a_series_that_diverges_by_its_draws_is_refused() -> None:
    """All the data together pass the check; single examples have eigenvalues far above it."""
    task = problem("relu")
    twin = Twin(task)
    top = float(torch.linalg.eigvalsh(twin.curvature("ggn"))[-1]) + 0.05
    options: dict[str, Any] = {"damping": 0.05, "sample_size": 1, "depth": 80}
    with pytest.raises(DivergedSeriesError, match=r"after 80 steps the relative residual") as e:
        scores(task, "lissa", scale=0.55 * top, **options)
    advised = float(str(e.value).split("give scale=")[1].split(",")[0])
    scores(task, "lissa", scale=advised, **options)
    # an open scale looks at draws, too
    found = scores(task, "lissa", **options | {"sample_size": 6})
    assert float(found.extras["scale"].min()) > top


def test_an_open_scale_is_doubled_for_the_rows_alone_that_it_does_not_answer() -> None:
    """The first draws see nothing of a direction in which the later ones are ten times as large."""
    A = definite(6, 1.0, 2.0)
    values, vectors = torch.linalg.eigh(A)
    loud, quiet = vectors[:, -1], vectors[:, 0]
    later = A + 30 * float(values[-1]) * torch.outer(loud, loud)

    def draws(repeat: int) -> Any:
        del repeat
        for step in itertools.count():
            chosen = A if step < TRIES else later
            yield lambda v, chosen=chosen: v @ chosen

    depth = 12
    lissa = Lissa(lambda v: v @ A, draws, 6, 1.0, None, depth, 1, True)
    rhs = torch.stack([quiet, loud])
    x, residual, scales = lissa.solve(rhs)
    first = MARGIN * float(values[-1])
    close(scales[:1], torch.tensor([first]).double(), 1e-3)
    ratio = float(scales[1]) / float(scales[0])
    assert ratio in (2, 4, 8, 16)
    assert float(residual.max()) <= 1
    for row, scale, found in zip(rhs, scales, x, strict=True):
        term, steps = row.clone(), draws(0)
        for _ in range(depth):
            term = row + term - (next(steps)(term[None])[0]) / scale
        close(found, term / scale, 1e-10)
    alone, _, of_one = lissa.solve(rhs[:1])  # what else is asked changes nothing
    close(alone[0], x[0], 1e-12)
    assert float(of_one) == float(scales[0])
    given = Lissa(lambda v: v @ A, draws, 6, 1.0, float(scales[0]), depth, 1, True)
    with pytest.raises(DivergedSeriesError, match="give scale="):
        given.solve(rhs)


def test_overflow_is_refused_and_not_returned() -> None:
    A = definite(6, 1.0, 2.0)

    def whole(v: Tensor) -> Tensor:
        return v @ A

    def draws(repeat: int) -> Any:
        del repeat
        while True:
            yield lambda v: 1e6 * (v @ A)

    lissa = Lissa(whole, draws, 6, 1.0, 1.5, 200, 1, True)
    with pytest.raises(DivergedSeriesError, match="relative residual is"):
        lissa.solve(torch.ones(1, 6, dtype=torch.float64))


def test_a_row_of_zeros_stays_one() -> None:
    A = definite(6, 1.0, 2.0)

    def draws(repeat: int) -> Any:
        del repeat
        while True:
            yield lambda v: v @ A

    lissa = Lissa(lambda v: v @ A, draws, 6, 1.0, None, 300, 1, False)
    rhs = torch.cat([torch.zeros(1, 6), torch.ones(1, 6)]).double()
    x, residual, _ = lissa.solve(rhs)
    close(x, torch.linalg.solve(A, rhs.T).T, 1e-10)
    assert float(x[0].abs().max()) == 0
    assert residual.shape == (2,)


def test_an_indefinite_hessian_is_refused_at_every_scale() -> None:
    task = problem("tanh no bias")
    values = torch.linalg.eigvalsh(Twin(task).curvature("hessian"))
    damping = -0.5 * float(values[0])
    with pytest.raises(DivergedSeriesError, match=r"diverges at every scale; give a damping") as e:
        scores(task, "lissa", curvature="hessian", damping=damping, scale=100.0, sample_size=None)
    met = float(str(e.value).split("eigenvalue of ")[1].split(" with")[0])
    assert met == pytest.approx(float(values[0]) + damping, rel=1e-2)


def test_settings_and_problems_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"scale": 0.0}, "scale must be a finite number > 0, or None"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"sample_size": 0}, "sample_size must be at least 1"),
        ({"sample_size": None, "repeats": 2}, "would compute the same series 2 times"),
    ):
        with pytest.raises(ValueError, match=message):
            InfluenceFunction(solver="lissa", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'"lissa" divides by λ .* got damping 0'):
        scores(problem("relu"), "lissa", damping=0.0)
    monkeypatch.setattr(module, "SELF_CG_LIMIT", 20)
    with pytest.raises(UnsupportedProblemError, match='solver="lissa" would solve 24 systems'):
        scores(problem("relu", "self"), "lissa")


def test_examples_come_in_the_order_of_their_positions() -> None:
    x, y = data((5,), N, 0)
    rows = torch.randperm(N, generator=stream(0, "test"))[:9]
    task = problem("relu")
    found = examples(Problem(task.model, task.loss, TensorDataset(x, y), "self"), rows)
    assert torch.equal(found[0], x[rows])
    assert torch.equal(found[1], y[rows])


@pytest.mark.parametrize("solver", ["cg", "lissa", "arnoldi"])
@pytest.mark.parametrize(("name", "kind"), [("relu", HeldProducts), ("cnn", CurvatureProducts)])
def test_solvers_use_the_fastest_products_that_serve_a_network(
    name: str, kind: type, solver: Any
) -> None:
    """Also beside the recorder, whose hooks are on the layers of the estimator's own copy."""
    estimator = InfluenceFunction(solver=solver)
    estimator.setup(problem(name))
    assert type(estimator._system()._products) is kind
