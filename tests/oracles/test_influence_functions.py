"""Influence functions against explicit curvature matrices in float64, and against retraining."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian as autograd_hessian
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.utils.data import TensorDataset

import baselines.influence_functions as module
import baselines.inverses as inverses
from baselines.conjugate_gradients import block_cg, solve_cg
from baselines.influence_functions import InfluenceFunction
from fine_bench import Checkpoint, InfluenceScores, Problem, replay
from fine_bench.gradients.curvature.products import CurvatureProducts, Roots, hessian_roots
from fine_bench.gradients.query_weighting import reference_rows
from fine_bench.types import UnsupportedProblemError
from support.tensors import close

N, V, CLASSES = 24, 6, 4
CURVATURES = ["hessian", "ggn", "fisher", "empirical_fisher"]


class WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5) + 0.5)
        self.first = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x * self.scale))))


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return {
            "logistic": (nn.Linear(5, CLASSES), (5,)),
            "relu": (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, CLASSES)), (5,)),
            "tanh no bias": (
                nn.Sequential(
                    nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES, bias=False)
                ),
                (5,),
            ),
            "cnn": (
                nn.Sequential(
                    nn.Conv2d(1, 2, 3, padding=1),
                    nn.ReLU(inplace=True),
                    nn.MaxPool2d(2),
                    nn.Conv2d(2, 3, 2),
                    nn.Tanh(),
                    nn.Flatten(),
                    nn.Linear(6, CLASSES),
                ),
                (1, 4, 6),
            ),
            "norm": (WithNorm(), (5,)),
        }


NAMES = list(models())


def data(shape: tuple[int, ...], n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.4, 2.0, shape[-1], dtype=torch.float64) + 0.5
    return x, torch.randint(CLASSES, (n,), generator=generator)


def problem(name: str, queries: str = "queries", **options: Any) -> Problem:
    model, shape = models()[name]
    train = TensorDataset(*data(shape, N, 0))
    wanted = "self" if queries == "self" else TensorDataset(*data(shape, V, 1))
    return Problem(model.double(), F.cross_entropy, train, wanted, **options)  # type: ignore[arg-type]


def scores(task: Problem, solver: str, **options: Any) -> InfluenceScores:
    checkpoint = Checkpoint(task.model.state_dict(), lr=0.1)
    estimator = InfluenceFunction(solver=solver, **options)  # type: ignore[arg-type]
    return replay(estimator, task, [checkpoint])


# ---------------------------------------------------------------------------------------- the twin


class Twin:
    """Everything explicit: one flat vector of parameters, one matrix."""

    def __init__(self, task: Problem) -> None:
        self.task = task
        self.params = {k: p.detach() for k, p in task.model.named_parameters()}
        self.theta = torch.cat([p.flatten() for p in self.params.values()])
        self.x, self.y = task.train.tensors  # type: ignore[attr-defined]
        queries = task.train if isinstance(task.queries, str) else task.queries
        self.xq, self.yq = queries.tensors  # type: ignore[attr-defined]
        self.gq, self.gi = self.gradients(self.xq, self.yq), self.gradients(self.x, self.y)

    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in self.params.values()])
        values = {k: v.view_as(p) for (k, p), v in zip(self.params.items(), parts, strict=True)}
        return functional_call(self.task.model, values, (x[None],))[0]

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.task.loss(self.logits(theta, x)[None], y[None], reduction="none")[0]

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        return vmap(grad(self.loss), in_dims=(None, 0, 0))(self.theta, x, y)

    def curvature(self, kind: str) -> Tensor:
        total = torch.zeros(len(self.theta), len(self.theta), dtype=torch.float64)
        for x, y in zip(self.x, self.y, strict=True):
            if kind == "hessian":
                # double backward: torch.func.hessian is asymmetric through a LayerNorm (torch 2.13)
                total += autograd_hessian(lambda t, x=x, y=y: self.loss(t, x, y), self.theta)
            elif kind == "ggn":
                J = jacrev(self.logits)(self.theta, x)
                z = self.logits(self.theta, x)
                H = hessian(lambda v, y=y: self.task.loss(v[None], y[None], reduction="none")[0])(z)
                total += J.T @ H @ J
            elif kind == "fisher":
                p = torch.softmax(self.logits(self.theta, x), 0)
                for k in range(CLASSES):
                    g = grad(self.loss)(self.theta, x, torch.tensor(k))
                    total += p[k] * torch.outer(g, g)
            else:
                g = grad(self.loss)(self.theta, x, y)
                total += torch.outer(g, g)
        return total / len(self.x)

    def values(self, kind: str, damping: float | None = None, relative: float = 0.1) -> Tensor:
        C = self.curvature(kind)
        lam = damping if damping is not None else relative * float(C.trace()) / len(C)
        return self.gq @ torch.linalg.solve(C + lam * torch.eye(len(C)).double(), self.gi.T)


def safe_damping(twin: Twin, kind: str) -> float:
    """Twice what makes the matrix definite, and of the size of its middle eigenvalues."""
    values = torch.linalg.eigvalsh(twin.curvature(kind))
    return 2 * max(0.0, -float(values[0])) + 0.1 * float(values.clamp_min(0).mean())


# --------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", NAMES)
def test_exact_and_cg_equal_the_explicit_matrix(name: str, kind: str) -> None:
    task = problem(name)
    twin = Twin(task)
    damping = safe_damping(twin, kind)
    expected = twin.values(kind, damping)
    options = {"curvature": kind, "damping": damping}
    close(scores(task, "exact", **options).values, expected, 1e-10)
    found = scores(task, "cg", tol=1e-12, **options)
    close(found.values, expected, 1e-8)
    assert found.extras["residual"].shape == (V,)
    assert float(found.extras["residual"].max()) <= 1e-12


@pytest.mark.parametrize("solver", ["exact", "cg"])
@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", ["logistic", "relu"])
def test_self_influence_and_relative_damping(name: str, kind: str, solver: str) -> None:
    task = problem(name, "self")
    # the Hessian of the network is indefinite
    relative = 5.0 if kind == "hessian" and name == "relu" else 0.05
    expected = Twin(task).values(kind, relative=relative).diagonal()[None]
    found = scores(task, solver, curvature=kind, relative_damping=relative, tol=1e-12)
    close(found.values, expected, 1e-10 if solver == "exact" else 1e-8)
    C = Twin(task).curvature(kind)
    assert float(found.extras["damping"]) == pytest.approx(relative * float(C.trace()) / len(C))


def test_the_default_curvature_is_the_ggn() -> None:
    task = problem("tanh no bias")
    close(scores(task, "exact").values, Twin(task).values("ggn"), 1e-10)
    close(scores(task, "cg", tol=1e-12).values, Twin(task).values("ggn"), 1e-8)


def test_ggn_of_a_loss_that_is_not_cross_entropy() -> None:
    task = problem("relu")

    def loss(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        margin = z.gather(1, y[:, None]) - z
        return F.softplus(1.0 - 3.0 * margin).sum(1) + z.pow(4).sum(1)

    smooth = Problem(task.model, loss, task.train, task.queries)
    expected = Twin(smooth).values("ggn")
    close(scores(smooth, "exact", curvature="ggn").values, expected, 1e-10)
    close(scores(smooth, "cg", curvature="ggn", tol=1e-12).values, expected, 1e-8)


@pytest.mark.parametrize("queries", ["queries", "self"])
@pytest.mark.parametrize("name", ["relu", "cnn"])
def test_the_dual_equals_the_full_matrix(name: str, queries: str) -> None:
    task = problem(name, queries)
    twin = Twin(task)
    assert len(twin.theta) > N
    expected = twin.values("empirical_fisher", relative=0.01)
    found = scores(task, "exact", curvature="empirical_fisher", relative_damping=0.01)
    close(found.values, expected.diagonal()[None] if queries == "self" else expected, 1e-10)


def test_the_empirical_fisher_of_few_parameters_needs_no_dual() -> None:
    task = problem("relu")
    x, y = data((5,), 90, 0)
    tall = Problem(task.model, task.loss, TensorDataset(x, y), task.queries)
    twin = Twin(tall)
    assert len(twin.theta) < 90
    found = scores(tall, "exact", curvature="empirical_fisher")
    close(found.values, twin.values("empirical_fisher"), 1e-10)


@pytest.mark.parametrize("weighting", [None, "norm", "noise"])
@pytest.mark.parametrize(
    ("solver", "kind"),
    [("exact", "ggn"), ("exact", "empirical_fisher"), ("cg", "ggn"), ("ekfac", "fisher")],
)
def test_reductions_are_weighted_means_of_rows(
    solver: str, kind: str, weighting: str | None
) -> None:
    options = {"curvature": kind, "query_weighting": weighting, "tol": 1e-12}
    rows = scores(problem("relu"), solver, **options).values
    twin = Twin(problem("relu"))
    weights = {
        None: torch.ones(V, dtype=torch.float64),
        "norm": 1 / twin.gq.norm(dim=1),
        "noise": 1 / rows.std(1),
    }[weighting]
    weighted = weights[:, None] * rows
    mean = scores(problem("relu", reduce="mean", batch_size=4), solver, **options)
    close(mean.values, weighted.mean(0, keepdim=True), 1e-8)
    assert mean.target == "validation"
    labels = twin.yq
    expected = torch.stack([weighted[labels == k].mean(0) for k in labels.unique()])
    by_class = scores(problem("relu", reduce="class", batch_size=4), solver, **options)
    close(by_class.values, expected, 1e-8)


def test_noise_looks_at_reference_examples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fine_bench.gradients.query_weighting.N_REFERENCE", 9)
    chosen = reference_rows(N)
    assert len(chosen) == 9
    for solver, kind in (("exact", "empirical_fisher"), ("ekfac", "fisher")):
        rows = scores(problem("relu"), solver, curvature=kind).values
        expected = (rows / rows[:, chosen].std(1, keepdim=True)).mean(0, keepdim=True)
        task = problem("relu", reduce="mean", batch_size=5)
        found = scores(task, solver, curvature=kind, query_weighting="noise").values
        close(found, expected, 1e-10)


def test_named_layers_only() -> None:
    task = problem("relu")
    twin = Twin(task)
    keep = torch.cat([torch.full((p.numel(),), k.startswith("2.")) for k, p in twin.params.items()])
    C = twin.curvature("ggn")[keep][:, keep] + 0.05 * torch.eye(int(keep.sum())).double()
    expected = twin.gq[:, keep] @ torch.linalg.solve(C, twin.gi[:, keep].T)
    for solver, tol in (("exact", 1e-10), ("cg", 1e-8)):
        found = scores(task, solver, layers=["2"], damping=0.05, tol=1e-12).values
        close(found, expected, tol)


def fitted(weights: Tensor, x: Tensor, y: Tensor, ridge: float) -> nn.Linear:
    """argmin Σ_j w_j ℓ_j + (ridge/2)‖θ‖² of softmax regression, by Newton's method."""
    model = nn.Linear(x.shape[1], CLASSES).double()
    theta = torch.zeros(CLASSES * (x.shape[1] + 1), dtype=torch.float64)

    def objective(t: Tensor) -> Tensor:
        W, b = t[: x.shape[1] * CLASSES].view(CLASSES, -1), t[x.shape[1] * CLASSES :]
        losses = F.cross_entropy(x @ W.T + b, y, reduction="none")
        return weights @ losses + ridge / 2 * t.square().sum()

    for _ in range(30):
        theta = theta - torch.linalg.solve(hessian(objective)(theta), grad(objective)(theta))
    assert float(grad(objective)(theta).abs().max()) < 1e-12
    with torch.no_grad():
        model.weight.copy_(theta[: x.shape[1] * CLASSES].view(CLASSES, -1))
        model.bias.copy_(theta[x.shape[1] * CLASSES :])
    return model


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_sign_and_scale_by_retraining(solver: str) -> None:
    # value = −dℓ_q/dε, ε added to example i's weight 1/n in the mean loss
    ridge, step = 0.05, 1e-5
    x, y = data((5,), N, 0)
    xq, yq = data((5,), V, 1)
    weights = torch.full((N,), 1.0 / N, dtype=torch.float64)
    model = fitted(weights, x, y, ridge)
    task = Problem(model, F.cross_entropy, TensorDataset(x, y), TensorDataset(xq, yq))
    found = scores(task, solver, curvature="hessian", damping=ridge, tol=1e-12).values
    for i in (0, 7, 19):
        losses = []
        for sign in (1, -1):
            changed = weights.clone()
            changed[i] += sign * step
            again = fitted(changed, x, y, ridge)
            losses.append(F.cross_entropy(again(xq), yq, reduction="none").detach())
        slope = (losses[0] - losses[1]) / (2 * step)
        close(found[:, i], -slope, 1e-6)


def test_leaving_an_example_out_costs_about_value_over_n() -> None:
    n, ridge = 400, 0.05
    x, y = data((5,), n, 0)
    xq, yq = data((5,), V, 1)
    weights = torch.full((n,), 1.0 / n, dtype=torch.float64)
    model = fitted(weights, x, y, ridge)
    task = Problem(model, F.cross_entropy, TensorDataset(x, y), TensorDataset(xq, yq))
    found = scores(task, "exact", curvature="hessian", damping=ridge).values
    without = weights.clone()
    without[3] = 0
    again = fitted(without, x, y, ridge)
    before, after = (F.cross_entropy(m(xq), yq, reduction="none").detach() for m in (model, again))
    close((after - before), found[:, 3] / n, 0.05)


@pytest.mark.parametrize(("solver", "tol"), [("exact", 1e-12), ("dual", 1e-12), ("cg", 1e-9)])
@pytest.mark.parametrize("queries", ["queries", "self"])
def test_neither_batch_size_nor_order_matters(queries: str, solver: str, tol: float) -> None:
    options: dict[str, Any] = {"tol": 1e-13}
    if solver == "dual":
        solver, options = "exact", {"curvature": "empirical_fisher"}
    task = problem("cnn", queries)
    expected = scores(task, solver, **options).values
    close(scores(problem("cnn", queries, batch_size=5), solver, **options).values, expected, tol)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    x, y = task.train.tensors  # type: ignore[attr-defined]
    train = TensorDataset(x[order], y[order])
    shuffled = Problem(task.model, task.loss, train, task.queries, batch_size=7)
    close(scores(shuffled, solver, **options).values, expected[:, order], tol)


@pytest.mark.parametrize("solver", ["exact", "cg", "lissa"])
@pytest.mark.parametrize("name", ["logistic", "relu", "cnn"])
def test_float32_agrees_with_float64(name: str, solver: str) -> None:
    task = problem(name)
    # of a thousand terms, the default, where they take a few seconds
    short = solver == "lissa" and name != "logistic"
    options: dict[str, Any] = {"depth": 100} if short else {}
    expected = scores(task, solver, **options).values
    (x, y), (xq, yq) = task.train.tensors, task.queries.tensors  # type: ignore
    low = Problem(
        task.model.float(), task.loss, TensorDataset(x.float(), y), TensorDataset(xq.float(), yq)
    )
    found = scores(low, solver, **options).values
    assert found.dtype == torch.float32
    close(found.double(), expected, 1e-4)


@pytest.mark.parametrize("solver", ["exact", "cg", "ekfac"])
def test_the_model_is_left_as_found(solver: str) -> None:
    task = problem("cnn")
    task.model.train().float()
    task.model[0].weight.grad = torch.ones(2, 1, 3, 3)  # type: ignore[index]
    x, y = task.train.tensors  # type: ignore[attr-defined]
    train = TensorDataset(x.float(), y)
    task = Problem(task.model, task.loss, train, TensorDataset(x[:3].float(), y[:3]))
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    state = torch.get_rng_state()
    scores(task, solver)
    assert task.model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
    assert all(v.dtype == torch.float32 for v in task.model.state_dict().values())
    for name, p in task.model.named_parameters():
        assert (p.grad is not None) == (name == "0.weight")
    assert not any(m._forward_hooks for m in task.model.modules())


def test_only_the_last_checkpoint_counts() -> None:
    task = problem("relu")
    last = Checkpoint(task.model.state_dict(), lr=0.1)
    earlier = Checkpoint({k: v + 1 for k, v in task.model.state_dict().items()}, lr=0.1)
    both = replay(InfluenceFunction(), task, [earlier, last])
    assert torch.equal(both.values, scores(task, "ekfac").values)
    assert both.method == "influence_function"


def test_cg_blocks_share_their_krylov_space(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem("cnn")
    together = scores(task, "cg", tol=1e-10)
    monkeypatch.setattr(inverses, "BLOCK_FLOATS", 1)  # one query a block
    apart = scores(task, "cg", tol=1e-10)
    close(apart.values, together.values, 1e-8)
    # several times fewer passes over the data than one system after the other
    assert int(together.extras["iterations"]) < int(apart.extras["iterations"]) / 3


def test_block_cg_survives_dependent_and_empty_right_hand_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    A = root @ root.T + 0.5 * torch.eye(30).double()
    b = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    rhs = torch.stack([b[0], b[1], 2 * b[0] - b[1], torch.zeros(30).double(), 1e-9 * b[3]])
    x, residual, _ = solve_cg(lambda v: v @ A, rhs, 1e-11, 200)
    expected = torch.linalg.solve(A, rhs.T).T
    for found, truth in zip(x, expected, strict=True):
        assert float((found - truth).norm()) <= 1e-8 * float(truth.norm())
    assert float(residual.max()) <= 1e-11
    y, steps = block_cg(lambda v: v @ A, rhs[:1], 1e-6, 3)
    assert steps == 3
    assert y.shape == (1, 30)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="solver must be one of"):
        InfluenceFunction(solver="newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curvature must be one of"):
        InfluenceFunction(curvature="gauss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no Kronecker factors"):
        InfluenceFunction(solver="ekfac", curvature="hessian")
    with pytest.raises(ValueError, match="damping must be a finite number ≥ 0, got -1"):
        InfluenceFunction(damping=-1.0)
    with pytest.raises(ValueError, match="relative_damping must be a finite"):
        InfluenceFunction(relative_damping=float("nan"))
    with pytest.raises(ValueError, match="tol is a relative residual"):
        InfluenceFunction(tol=0.0)
    with pytest.raises(ValueError, match="max_iter and n_samples must be at least 1, got 1 and 0"):
        InfluenceFunction(max_iter=1, n_samples=0)
    with pytest.raises(ValueError, match="query_weighting must be"):
        InfluenceFunction(query_weighting="rank")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a sum of squares at the output"):
        Roots("hessian", F.cross_entropy, torch.zeros(1, 1))(
            torch.zeros(1, 2), torch.zeros(1).long(), slice(0, 1)
        )
    estimator = InfluenceFunction()
    estimator.setup(problem("relu"))
    with pytest.raises(RuntimeError, match="before update"):
        estimator.compute()


def test_an_indefinite_hessian_is_refused() -> None:
    task = problem("tanh no bias")
    twin = Twin(task)
    low = float(torch.linalg.eigvalsh(twin.curvature("hessian"))[0])
    assert low < -1e-3
    damping = -0.5 * low
    with pytest.raises(ValueError, match=rf"smallest eigenvalue is {low + damping:.3g} with"):
        scores(task, "exact", curvature="hessian", damping=damping)
    with pytest.raises(ValueError, match=r"CG met a direction of curvature -\d") as error:
        scores(task, "cg", curvature="hessian", damping=damping)
    met = float(str(error.value).split("curvature ")[1].split(";")[0])
    # no direction is worse than the smallest eigenvalue
    assert (low + damping) * 1.01 <= met < 0
    # above the advised damping it is served
    scores(task, "exact", curvature="hessian", damping=-1.01 * low)


def test_a_singular_matrix_is_refused() -> None:
    # softmax does not change when all logits shift
    with pytest.raises(ValueError, match=r"curvature C \+ λI is not positive definite"):
        scores(problem("logistic"), "exact", damping=0.0)
    x, y = data((5,), 4, 0)
    twice = TensorDataset(torch.cat([x, x]), torch.cat([y, y]))
    task = Problem(problem("logistic").model, F.cross_entropy, twice, "self")
    with pytest.raises(ValueError, match=r"dual K/n \+ λI is not positive definite"):
        scores(task, "exact", curvature="empirical_fisher", damping=0.0)


def test_a_negative_mean_eigenvalue_gives_no_damping() -> None:
    task = problem("logistic")

    def loss(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        return -F.cross_entropy(z, y, reduction=reduction)

    upside_down = Problem(task.model, loss, task.train, task.queries)
    for solver in ("exact", "cg"):
        with pytest.raises(ValueError, match="negative mean eigenvalue"):
            scores(upside_down, solver, curvature="hessian")


def test_cg_says_when_it_has_not_converged() -> None:
    with pytest.raises(RuntimeError, match=r"stopped after 1 iterations .* above tol = 1e-10"):
        scores(problem("cnn"), "cg", relative_damping=1e-4, tol=1e-10, max_iter=1)


def test_systems_too_large_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_LIMIT", 30)
    monkeypatch.setattr(module, "SELF_CG_LIMIT", 20)
    task, itself = problem("relu"), problem("relu", "self")
    with pytest.raises(UnsupportedProblemError, match=r"64 × 64 parameters, more than the limit"):
        scores(task, "exact")
    # the dual is smaller than the limit, however many parameters there are
    assert scores(task, "exact", curvature="empirical_fisher").values.shape == (V, N)
    with pytest.raises(UnsupportedProblemError, match="would solve 24 systems"):
        scores(itself, "cg")
    with pytest.raises(UnsupportedProblemError, match="needs the trace of the Hessian"):
        scores(task, "cg", curvature="hessian")
    assert InfluenceFunction(solver="ekfac").unsupported(itself) is None
    assert InfluenceFunction(solver="cg").unsupported(task) is None


def test_products_keep_no_graph() -> None:
    task = problem("cnn")
    twin = Twin(task)
    names = list(twin.params)
    products = CurvatureProducts(
        task.model,
        task.loss,
        names,
        "hessian",
        lambda: task.batches("train"),
        N,
        torch.zeros(N, 1),
    )
    v = torch.randn(3, len(twin.theta), generator=torch.Generator().manual_seed(0)).double()
    result = products(v)
    assert not result.requires_grad
    assert products.products == 3
    close(result, v @ twin.curvature("hessian"), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fitted_example_leaves_the_loss_convex(dtype: torch.dtype) -> None:
    """Rounding of a probability near one is no negative curvature."""
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.arange(200) % 10
    logits[torch.arange(200), y] += torch.linspace(5, 45, 200, dtype=dtype)
    roots = hessian_roots(F.cross_entropy, logits, y)
    p = torch.softmax(logits.double(), 1)
    wanted = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    found = torch.einsum("kbi,kbj->bij", roots.double(), roots.double())
    assert float((found - wanted).abs().max()) < 64 * torch.finfo(dtype).eps
