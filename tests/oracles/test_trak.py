"""TRAK against the formula in float64, with autograd's gradients and the explicit P."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines import trak
from baselines.trak import TRAK
from fine_bench import Checkpoint, Problem, replay
from fine_bench.gradients import GradientEngine
from fine_bench.gradients.margin import negative_margin
from fine_bench.gradients.projection.random import make_projection, projection_matrix
from fine_bench.types import UnsupportedProblemError
from support.networks import CLASSES, MODELS, models
from support.tensors import close

N, V = 60, 9
KINDS = ("gaussian", "rademacher", "sjlt", "factorized")


def make(
    name: str, dtype: torch.dtype = torch.float64, n: int = N, **options: Any
) -> tuple[Problem, list[Checkpoint]]:
    """Random data and two unrelated checkpoints, as of two models."""
    model, shape = models()[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n + V, *shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (n + V,), generator=generator)
    states = [
        {
            k: (v.double() + 0.2 * torch.randn(v.shape, generator=generator).double()).to(dtype)
            for k, v in model.state_dict().items()
        }
        for _ in range(2)
    ]
    queries = options.pop("queries", TensorDataset(x[n:], y[n:]))
    problem = Problem(
        model.to(dtype), F.cross_entropy, TensorDataset(x[:n], y[:n]), queries, **options
    )
    return problem, [Checkpoint(params=state, lr=0.1) for state in states]


def margin_gradients(
    problem: Problem, checkpoint: Checkpoint, which: str, layers: Any = None
) -> tuple[Tensor, Tensor]:
    """∇ log(p/(1−p)) one example a row, and p, straight from the definition."""
    model = copy.deepcopy(problem.model)
    model.load_state_dict(dict(checkpoint.params))
    chosen = [
        p
        for k, p in model.named_parameters()
        if layers is None or any(k.startswith(layer + ".") for layer in layers)
    ]
    data: Any = problem.train if which == "train" else problem.queries
    rows, probabilities = [], []
    for x, y in data:
        p = F.softmax(model(x[None]), 1)[0, y]
        margin = torch.log(p / (1 - p))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(margin, chosen)]))
        probabilities.append(p.detach())
    return torch.stack(rows), torch.stack(probabilities)


def explicit(problem: Problem, kind: str | None, dim: int, seed: int, layers: Any) -> Tensor | None:
    if kind is None:
        return None
    _, x, y = next(iter(problem.batches("train", 2)))
    g = GradientEngine(copy.deepcopy(problem.model), F.cross_entropy, layers)(x, y)
    return projection_matrix(make_projection(kind, dim, seed), g)  # type: ignore[arg-type]


def twin(
    problem: Problem,
    checkpoints: list[Checkpoint],
    kind: str | None,
    dim: int = 0,
    ridge: float = 0.0,
    seed: int = 0,
    layers: Any = None,
    weighting: Any = None,
) -> Tensor:
    p_matrix = explicit(problem, kind, dim, seed, layers)
    kernels, residuals = [], []
    for checkpoint in checkpoints:
        phi, p = margin_gradients(problem, checkpoint, "train", layers)
        phi = phi if p_matrix is None else phi @ p_matrix
        inverse = torch.linalg.inv(phi.T @ phi + ridge * torch.eye(phi.shape[1]).double())
        residuals.append(1 - p)
        if isinstance(problem.queries, str):
            kernels.append((phi @ inverse @ phi.T).diagonal()[None])
            continue
        queries, _ = margin_gradients(problem, checkpoint, "queries", layers)
        queries = queries if p_matrix is None else queries @ p_matrix
        rows = queries @ inverse @ phi.T
        if weighting == "norm":
            weights = 1 / queries.norm(dim=1)
        elif weighting == "noise":
            weights = 1 / (rows * (1 - p)).std(1)
        else:
            weights = torch.ones(V).double()
        labels = problem.queries.tensors[1]  # type: ignore[attr-defined]
        if problem.reduce == "mean":
            rows = (weights[:, None] * rows).mean(0, keepdim=True)
        if problem.reduce == "class":
            weighted = weights[:, None] * rows
            rows = torch.stack([weighted[labels == k].mean(0) for k in labels.unique()])
        kernels.append(rows)
    return torch.stack(kernels).mean(0) * torch.stack(residuals).mean(0)


TARGETS: list[dict[str, Any]] = [
    {},
    {"reduce": "mean"},
    {"reduce": "class"},
    {"queries": "self"},
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", TARGETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_projected(name: str, options: dict[str, Any], kind: Any) -> None:
    problem, checkpoints = make(name, **options)
    scores = replay(TRAK(kind, dim=8, seed=5), problem, checkpoints)
    close(scores.values, twin(problem, checkpoints, kind, 8, seed=5))
    assert (scores.method, scores.target) == ("trak", problem.target)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", TARGETS, ids=str)
@pytest.mark.parametrize("n", [30, 300], ids=["dual", "primal"])
def test_without_a_projection(name: str, options: dict[str, Any], n: int) -> None:
    if name == "logistic" and n == 30:
        n = 20  # 28 parameters
    problem, checkpoints = make(name, n=n, batch_size=16, **options)
    method = TRAK(ridge=0.3)
    values = replay(method, problem, checkpoints).values
    assert method.dual == (n <= 30)
    close(values, twin(problem, checkpoints, None, ridge=0.3))


def test_the_ridge_with_more_dimensions_than_examples() -> None:
    problem, checkpoints = make("relu")
    values = replay(TRAK("gaussian", dim=80, ridge=2.0), problem, checkpoints).values
    close(values, twin(problem, checkpoints, "gaussian", 80, ridge=2.0))


def test_without_ridge_or_projection_where_the_matrix_allows_it() -> None:
    # the last layer alone makes P = I singular; the first does not
    problem, checkpoints = make("tanh, no bias", n=200)
    values = replay(TRAK(layers=["0"]), problem, checkpoints).values
    close(values, twin(problem, checkpoints, None, layers=["0"]))


@pytest.mark.parametrize("weighting", ["norm", "noise"])
@pytest.mark.parametrize("reduce", ["mean", "class"])
@pytest.mark.parametrize("case", ["projected", "primal", "dual"])
def test_query_weightings(case: str, reduce: str, weighting: Any) -> None:
    problem, checkpoints = make("relu", n=150 if case == "primal" else N, reduce=reduce)
    if case == "projected":
        method = TRAK("sjlt", dim=8, query_weighting=weighting)
        expected = twin(problem, checkpoints, "sjlt", 8, weighting=weighting)
    else:
        method = TRAK(ridge=0.5, query_weighting=weighting)
        expected = twin(problem, checkpoints, None, ridge=0.5, weighting=weighting)
    close(replay(method, problem, checkpoints).values, expected)


def test_named_layers() -> None:
    problem, checkpoints = make("cnn")
    values = replay(TRAK("gaussian", dim=8, layers=["0"]), problem, checkpoints).values
    close(values, twin(problem, checkpoints, "gaussian", 8, layers=["0"]))


def test_leverages_sum_to_the_dimension() -> None:
    problem, checkpoints = make("relu", queries="self")
    _, p = margin_gradients(problem, checkpoints[0], "train")
    values = replay(TRAK("rademacher", dim=8), problem, checkpoints[:1]).values
    assert float((values[0] / (1 - p)).sum()) == pytest.approx(8.0, rel=1e-10)


def test_sign_and_scale_by_leaving_an_example_out() -> None:
    """Logistic regression near p = 1/2: one Newton step is the answer, with curvature 1/4.

    Leaving i out changes the margin of q by −(1 − p_i) x_qᵀ (Σ p(1−p) x xᵀ)⁻¹ x_i up to labels'
    signs, four times TRAK's −(1 − p_i) x_qᵀ (Σ x xᵀ)⁻¹ x_i.
    """
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (400,), generator=generator)
    xq, yq = x[380:], y[380:]
    x, y = x[:380], y[:380]
    signs = 2.0 * yq - 1

    def fit(keep: Tensor) -> Tensor:
        theta = torch.zeros(3, dtype=torch.float64)
        for _ in range(15):
            p = torch.sigmoid(x[keep] @ theta)
            gradient = x[keep].T @ (p - y[keep])
            hessian = (x[keep].T * (p * (1 - p))) @ x[keep]
            theta = theta - torch.linalg.solve(hessian, gradient)
        return theta

    everything = fit(torch.ones(380, dtype=torch.bool))
    model = nn.Linear(3, 2, bias=False).double()
    state = {"weight": torch.stack([torch.zeros(3).double(), everything])}
    problem = Problem(model, F.cross_entropy, TensorDataset(x, y), TensorDataset(xq, yq))
    # the two classes' weights move together for free: a ridge for that direction alone
    values = replay(TRAK(ridge=1e-6), problem, [Checkpoint(params=state, lr=1.0)]).values
    dropped = []
    for i in range(0, 380, 20):
        keep = torch.ones(380, dtype=torch.bool)
        keep[i] = False
        dropped.append(signs * (xq @ (everything - fit(keep))))
    truth = torch.stack(dropped, 1)
    close(4 * values[:, ::20], truth, 0.1)


@pytest.mark.parametrize("options", TARGETS, ids=str)
@pytest.mark.parametrize("name", ["relu", "cnn"])
def test_single_precision_is_close_to_double(name: str, options: dict[str, Any]) -> None:
    for method in (TRAK("gaussian", dim=8), TRAK("sjlt", dim=8), TRAK(ridge=1.0)):
        expected = replay(method, *make(name, **options)).values
        values = replay(method, *make(name, torch.float32, **options)).values
        assert values.dtype == torch.float32
        close(values, expected, 1e-4)


def test_confident_examples_keep_their_precision() -> None:
    """Where p rounds to one, a loss gradient over 1 − p is noise; the margin's is exact."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    weight = 12 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    y = (x @ weight.T).argmax(1)
    model = nn.Linear(5, 3, bias=False)
    state = {"weight": weight}
    values = []
    for dtype in (torch.float64, torch.float32):
        problem = Problem(
            copy.deepcopy(model).to(dtype), F.cross_entropy, TensorDataset(x.to(dtype), y), "self"
        )
        checkpoint = Checkpoint(params={k: v.to(dtype) for k, v in state.items()}, lr=1.0)
        values.append(replay(TRAK(ridge=0.1), problem, [checkpoint]).values[0])
    assert float(values[0].min()) < 1e-12
    assert torch.allclose(values[1].double(), values[0], rtol=1e-3, atol=1e-37)


@pytest.mark.parametrize("options", TARGETS, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_batch_size_order_and_workers_change_nothing(kind: Any, options: dict[str, Any]) -> None:
    def scores(problem: Problem) -> Tensor:
        method = TRAK(kind, dim=8, ridge=0.01, query_weighting="noise")
        return replay(method, problem, checkpoints).values

    problem, checkpoints = make("relu", **options)
    expected = scores(problem)
    for size in (7, N):
        close(scores(make("relu", batch_size=size, **options)[0]), expected)
    if kind == "gaussian":
        close(scores(make("relu", num_workers=1, **options)[0]), expected)
    x, y = problem.train.tensors  # type: ignore[attr-defined]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    shuffled = Problem(
        problem.model,
        problem.loss,
        TensorDataset(x[order], y[order]),
        problem.queries,
        reduce=problem.reduce,
    )
    close(scores(shuffled), expected[:, order])


@pytest.mark.parametrize("kind", ["gaussian", None])
def test_everything_is_left_as_found(kind: Any) -> None:
    problem, checkpoints = make("cnn")
    problem.model.train()
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    state = torch.get_rng_state()
    replay(TRAK(kind, dim=8, ridge=1.0), problem, checkpoints)
    assert problem.model.training
    assert all(p.grad is None for p in problem.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in problem.model.modules())


def test_what_is_refused_at_birth() -> None:
    with pytest.raises(ValueError, match="ridge must be a finite number ≥ 0, got -1"):
        TRAK(ridge=-1.0)
    with pytest.raises(ValueError, match="dim must be at most 8192, got 9000"):
        TRAK("gaussian", dim=9000)
    with pytest.raises(ValueError, match="projection must be one of"):
        TRAK("normal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='must be None, "norm" or "noise"'):
        TRAK(query_weighting="size")  # type: ignore[arg-type]


def test_singular_matrices_are_refused_with_what_to_do() -> None:
    problem, checkpoints = make("relu")
    with pytest.raises(UnsupportedProblemError, match=r"dim=64 is more than the 60 .* dim=30 or"):
        replay(TRAK("gaussian", dim=64), problem, checkpoints)
    with pytest.raises(UnsupportedProblemError, match=r"92 parameters for 60 .* pass ridge > 0"):
        replay(TRAK(), problem, checkpoints)
    # 28 parameters, of which adding a constant to all logits uses up 7
    for dtype in (torch.float64, torch.float32):
        problem, checkpoints = make("logistic", dtype)
        with pytest.raises(UnsupportedProblemError, match=r"P = I needs one for softmax outputs"):
            replay(TRAK(), problem, checkpoints)
        with pytest.raises(UnsupportedProblemError, match=r"ΦᵀΦ .* of 24 rows .* a smaller dim"):
            replay(TRAK("gaussian", dim=24), problem, checkpoints)
        replay(TRAK("gaussian", dim=16), problem, checkpoints)
    x, y = torch.ones(20, 6), torch.zeros(20, dtype=torch.int64)
    same = Problem(models()["relu"][0], F.cross_entropy, TensorDataset(x, y), "self")
    checkpoint = Checkpoint(params=same.model.state_dict(), lr=1.0)
    with pytest.raises(UnsupportedProblemError, match=r"ΦΦᵀ .*=1e-20; pass a larger ridge"):
        replay(TRAK(ridge=1e-20), same, [checkpoint])


def test_what_cannot_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = make("relu")
    monkeypatch.setattr(trak, "MAX_SIDE", 50)
    reason = TRAK(ridge=1.0).unsupported(problem)
    assert reason is not None
    assert "of 60 rows for 92 parameters and 60 examples, and the limit is 50; pass proj" in reason
    x = torch.randn(5, 6)
    regression = Problem(nn.Linear(6, 1), F.mse_loss, TensorDataset(x, torch.randn(5, 1)), "self")
    assert "needs integer class labels" in str(TRAK().unsupported(regression))
    one_logit = Problem(
        nn.Linear(6, 1),
        F.cross_entropy,
        TensorDataset(x, torch.zeros(5, dtype=torch.int64)),
        "self",
    )
    assert "at least two classes, got model outputs of shape (1,)" in str(
        TRAK().unsupported(one_logit)
    )
    frozen = nn.Sequential(nn.Linear(6, 3)).requires_grad_(False)
    idle = Problem(frozen, F.cross_entropy, one_logit.train, "self")
    assert "no trained parameters" in str(TRAK().unsupported(idle))
    single = Problem(
        nn.Linear(6, 3),
        F.cross_entropy,
        TensorDataset(x[:1], torch.tensor([1])),
        idle.train,
        "mean",
    )
    with pytest.raises(ValueError, match="at least two training examples"):
        replay(
            TRAK(ridge=1.0, query_weighting="noise"),
            single,
            [Checkpoint(params=single.model.state_dict(), lr=1.0)],
        )


def test_the_margin_is_that_of_the_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (6,), generator=generator)
    p = F.softmax(logits, 1).gather(1, y[:, None])[:, 0]
    close(negative_margin(logits, y), -torch.log(p / (1 - p)))


def test_every_so_many_checkpoints_of_a_run_the_last_among_them() -> None:
    problem, (first, last) = make(MODELS[0], queries="self")
    three = [first, first, last]
    alone = replay(TRAK(projection="gaussian", dim=20, seed=3), problem, [last]).values
    found = replay(TRAK(projection="gaussian", dim=20, seed=3, every=1000), problem, three).values
    assert torch.equal(found, alone)
    both = replay(TRAK(projection="gaussian", dim=20, seed=3), problem, [first, last]).values
    found = replay(TRAK(projection="gaussian", dim=20, seed=3, every=2), problem, three).values
    assert torch.equal(found, both)
    assert not torch.equal(both, alone)
    with pytest.raises(ValueError, match=r"every counts checkpoints, at least 1, got 0; pass eve"):
        TRAK(every=0)
    with pytest.raises(ValueError, match=r"runs=3 reads the last of each .* pass every=1, or run"):
        TRAK(every=2, runs=3)
