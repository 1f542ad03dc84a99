"""EK-FAC against eigenbases built explicitly with ``torch.kron``, in float64.

The twin knows nothing of factors that are never formed: it loops over examples and classes, writes
each gradient as a matrix [W|b], and inverts the whole P × P curvature of a layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines.influence_functions import InfluenceFunction
from fine_bench import Checkpoint, InfluenceScores, Problem, replay
from fine_bench.gradients import GradientEngine
from fine_bench.gradients.curvature import ekfac_dense
from fine_bench.gradients.curvature.ekfac import EKFAC, fit_ekfac
from fine_bench.gradients.curvature.products import Roots
from support.tensors import close

N, V, CLASSES = 26, 5, 4


class WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x * self.scale))))


class Table(nn.Module):
    """An embedding table, norms of two kinds and a convolution over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.first, self.second = nn.RMSNorm(4), nn.GroupNorm(2, 4)
        self.conv = nn.Conv1d(4, 3, 2)
        self.last = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        # seven levels of the inputs as tokens; the last of them never occurs
        tokens = (x.abs() * 1.5).long().clamp_max(5)
        z = self.first(self.table(tokens)).transpose(1, 2)
        return self.last(torch.tanh(self.conv(self.second(z))).mean(2))


class Tokens(nn.Module):
    """Linear layers at several positions, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(6, 6)
        self.last = nn.Linear(6, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.token(torch.tanh(self.token(x)))).mean(1))


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        frozen = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))
        frozen[0].weight.requires_grad_(False)
        return {
            "logistic": (nn.Sequential(nn.Linear(6, CLASSES)), (6,)),
            "relu": (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, CLASSES)), (6,)),
            "tanh no bias": (
                nn.Sequential(
                    nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, CLASSES, bias=False)
                ),
                (6,),
            ),
            "cnn": (
                nn.Sequential(
                    nn.Conv2d(2, 3, 3, stride=2, padding=1),
                    nn.Tanh(),
                    nn.Conv2d(3, 5, 2, bias=False),
                    nn.ReLU(inplace=True),
                    nn.MaxPool2d(2, stride=1),
                    nn.Flatten(),
                    nn.Linear(5, CLASSES),
                ),
                (2, 6, 5),
            ),
            "tokens": (Tokens(), (3, 6)),
            "bias only": (frozen, (6,)),
            "norm": (WithNorm(), (6,)),
            "table": (Table(), (6,)),
        }


NAMES = list(models())


def data(shape: tuple[int, ...], n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Anisotropic inputs with a mean, so that weights and biases covary."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.4, 2.0, shape[-1], dtype=torch.float64) + 0.7
    return x, torch.randint(CLASSES, (n,), generator=generator)


def problem(name: str, queries: str = "queries", **options: Any) -> Problem:
    model, shape = models()[name]
    train = TensorDataset(*data(shape, N, 0))
    wanted = "self" if queries == "self" else TensorDataset(*data(shape, V, 1))
    return Problem(model.double(), F.cross_entropy, train, wanted, **options)  # type: ignore[arg-type]


def scores(task: Problem, **options: Any) -> InfluenceScores:
    checkpoint = Checkpoint(task.model.state_dict(), lr=0.1)
    return replay(InfluenceFunction(solver="ekfac", **options), task, [checkpoint])


# ---------------------------------------------------------------------------------------- the twin


FACTORED = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding
NORMS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm


def capture(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Logits of one example, and every factor layer's inputs and outputs, use by use."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = [
        layer.register_forward_hook(
            # a copy, which an in-place activation behind it cannot overwrite
            lambda _, i, o, name=name: seen.setdefault(name, []).append((i[0], o)) or o.clone()
        )
        for name, layer in model.named_modules()
        if isinstance(layer, FACTORED)
    ]
    logits = model(x[None])
    for handle in handles:
        handle.remove()
    return logits, seen


def matrix(layer: nn.Module, grads: dict[int, Tensor]) -> Tensor:
    """A layer's gradient as [W|b]."""
    parts = []
    if layer.weight.requires_grad:
        parts.append(grads[id(layer.weight)].flatten(1))
    if getattr(layer, "bias", None) is not None:
        parts.append(grads[id(layer.bias)][:, None])
    return torch.cat(parts, 1)


def loss_gradients(model: nn.Module, x: Tensor, label: int) -> dict[int, Tensor]:
    params = [p for p in model.parameters() if p.requires_grad]
    loss = F.cross_entropy(model(x[None]), torch.tensor([label]))
    return {id(p): g for p, g in zip(params, torch.autograd.grad(loss, params), strict=True)}


def layer_inputs(layer: nn.Module, a: Tensor) -> Tensor:
    """``(T, I)`` with the one of the bias; for a table the one-hot tokens."""
    if isinstance(layer, nn.Embedding):
        return F.one_hot(a[0], layer.num_embeddings).double()
    if isinstance(layer, nn.Conv1d):
        a = F.unfold(a[:, :, None], (1, *layer.kernel_size))[0].T
    elif isinstance(layer, nn.Conv2d):
        a = F.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride)[0].T
    else:
        a = a.reshape(-1, a.shape[-1])
    one = a.new_ones(len(a), 1)
    if not layer.weight.requires_grad:
        return one
    return a if layer.bias is None else torch.cat([a, one], 1)


def twin(
    task: Problem,
    kind: str,
    damping: float | None = None,
    relative: float = 0.1,
    diagonal: bool = False,
) -> Tensor:
    """g_qᵀ(C + λ)⁻¹g_i from explicit matrices, ``(V, N)``."""
    model = task.model.eval()
    xs, ys = task.train.tensors  # type: ignore[attr-defined]
    queries = task.train if isinstance(task.queries, str) else task.queries
    xq, yq = queries.tensors  # type: ignore[attr-defined]
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FACTORED)}
    norms = [list(m.parameters()) for m in model.modules() if isinstance(m, NORMS)]
    covered = {id(p) for layer in layers.values() for p in layer.parameters()}
    covered |= {id(p) for norm in norms for p in norm}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in covered]
    A: dict[str, Tensor] = {}
    G: dict[str, Tensor] = {}
    weighted: list[tuple[float, dict[int, Tensor]]] = []
    for x, y in zip(xs, ys, strict=True):
        logits, seen = capture(model, x)
        p = torch.softmax(logits[0], 0).detach()
        labels = range(CLASSES) if kind == "fisher" else [int(y)]
        for name, uses in seen.items():
            for a, _ in uses:
                rows = layer_inputs(layers[name], a.detach())
                A[name] = A.get(name, 0) + rows.T @ rows
        for label in labels:
            weight = float(p[label]) if kind == "fisher" else 1.0
            loss = F.cross_entropy(logits, torch.tensor([label]))
            for name, uses in seen.items():
                for a, out in uses:
                    (b,) = torch.autograd.grad(loss, out, retain_graph=True)
                    if isinstance(layers[name], nn.Conv1d | nn.Conv2d):
                        rows = b[0].flatten(1).T
                    else:
                        rows = b.reshape(-1, b.shape[-1])
                    if isinstance(layers[name], nn.Embedding):  # padding is not trained
                        rows = rows * (a[0] != layers[name].padding_idx)[:, None]
                    G[name] = G.get(name, 0) + weight * rows.T @ rows
            weighted.append((weight, loss_gradients(model, x, label)))
    train = [loss_gradients(model, x, int(y)) for x, y in zip(xs, ys, strict=True)]
    asked = [loss_gradients(model, x, int(y)) for x, y in zip(xq, yq, strict=True)]
    total = torch.zeros(len(xq), len(xs), dtype=torch.float64)

    def add(C: Tensor, gq: Tensor, gi: Tensor) -> None:
        lam = damping if damping is not None else relative * float(C.trace()) / len(C)
        total.add_(gq @ torch.linalg.solve(C + lam * torch.eye(len(C)).double(), gi.T))

    for name, layer in layers.items():
        left, right = (torch.linalg.eigh(M[name])[1] for M in (G, A))
        if isinstance(layer, nn.Embedding):  # its weight is (inputs, outputs)
            left, right = right, left
        U = torch.kron(left, right)
        s = sum(w * (U.T @ matrix(layer, g).flatten()).square() for w, g in weighted) / len(xs)
        gq, gi = (torch.stack([matrix(layer, g).flatten() for g in gs]) for gs in (asked, train))
        add(U @ torch.diag(s) @ U.T, gq, gi)
    for params in [*norms, others]:
        if not params:
            continue

        def flat(g: dict[int, Tensor], params: list[nn.Parameter] = params) -> Tensor:
            return torch.cat([g[id(p)].flatten() for p in params])

        C = sum(w * torch.outer(flat(g), flat(g)) for w, g in weighted) / len(xs)
        C = torch.diag(C.diagonal()) if diagonal else C
        add(C, torch.stack([flat(g) for g in asked]), torch.stack([flat(g) for g in train]))
    return total


# --------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("kind", ["fisher", "empirical_fisher"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_explicit_eigenbasis(name: str, kind: str) -> None:
    task = problem(name)
    close(scores(task, curvature=kind).values, twin(task, kind))
    close(scores(task, curvature=kind, damping=0.03).values, twin(task, kind, damping=0.03))
    itself = problem(name, "self")
    expected = twin(itself, kind, relative=0.2).diagonal()[None]
    close(scores(itself, curvature=kind, relative_damping=0.2).values, expected)


def test_the_default_curvature_is_the_fisher() -> None:
    task = problem("relu")
    close(scores(task).values, twin(task, "fisher"))


@pytest.mark.parametrize("name", ["relu", "cnn", "norm", "table"])
def test_ggn_is_the_fisher_for_cross_entropy(name: str) -> None:
    task = problem(name)
    close(scores(task, curvature="ggn").values, twin(task, "fisher"), 1e-8)


def test_ggn_of_a_squared_loss() -> None:
    # linear regression with one output layer: EK-FAC's block is then exact in A ⊗ I, and
    # C = 2 mean(a aᵀ) ⊗ I, as the Hessian of the squared error is 2I
    x, _ = data((6,), N, 0)
    xq, _ = data((6,), V, 1)
    target = torch.randn(N, 3, generator=torch.Generator().manual_seed(2)).double()
    model = nn.Sequential(nn.Linear(6, 3)).double()

    def loss(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        assert reduction == "none"
        return (z - y).square().sum(1)

    task = Problem(model, loss, TensorDataset(x, target), TensorDataset(xq, target[:V]))
    got = scores(task, curvature="ggn", damping=0.2).values

    def ones(v: Tensor) -> Tensor:
        return torch.cat([v, v.new_ones(len(v), 1)], 1)

    a, aq = ones(x), ones(xq)
    b, bq = (2 * (model(v) - t).detach() for v, t in ((x, target), (xq, target[:V])))
    A = 2 * a.T @ a / N + 0.2 * torch.eye(7).double()
    close(got, (aq @ torch.linalg.solve(A, a.T)) * (bq @ b.T))


def test_a_large_block_without_factors_is_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem("norm")
    dense = scores(task).values
    monkeypatch.setattr(ekfac_dense, "DENSE_LIMIT", 5)
    diagonal = scores(task).values
    close(diagonal, twin(task, "fisher", diagonal=True))
    assert float((diagonal - dense).abs().max()) > 1e-3 * float(dense.abs().max())


def test_grouped_convolutions_are_blocks_without_factors() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)
        ).double()
    x, y = data((2, 6, 5), N, 0)
    task = Problem(model, F.cross_entropy, TensorDataset(x, y), "self")
    got = scores(task, layers=["0"], damping=0.05).values[0]
    C = torch.zeros(40, 40, dtype=torch.float64)
    params = list(model[0].parameters())

    def gradient(xi: Tensor, label: int) -> Tensor:
        loss = F.cross_entropy(model(xi[None]), torch.tensor([label]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    for xi in x:
        p = torch.softmax(model(xi[None])[0], 0).detach()
        for k in range(CLASSES):
            g = gradient(xi, k)
            C += p[k] * torch.outer(g, g) / N
    gs = torch.stack([gradient(xi, int(yi)) for xi, yi in zip(x, y, strict=True)])
    inverse = torch.linalg.inv(C + 0.05 * torch.eye(40).double())
    close(got, ((gs @ inverse) * gs).sum(1))


def test_many_classes_are_sampled_and_converge() -> None:
    # 120 classes, more than the exact expectation takes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64) + 0.3
    y = torch.randint(120, (20,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 120)).double()
    task = Problem(model, F.cross_entropy, TensorDataset(x, y), "self")
    exact = InfluenceFunction(solver="exact", curvature="ggn", relative_damping=1.0)
    checkpoint = [Checkpoint(model.state_dict(), lr=0.1)]
    truth = replay(exact, task, checkpoint).values

    def error(n_samples: int) -> float:
        sampled = InfluenceFunction(
            solver="exact", curvature="fisher", relative_damping=1.0, n_samples=n_samples
        )
        return float((replay(sampled, task, checkpoint).values / truth - 1).abs().mean())

    few, many = error(4), error(400)
    # a mean of 100 times as many draws is 10 times closer
    assert many < few / 4
    one = scores(task, n_samples=2, seed=1).values
    assert torch.equal(one, scores(task, n_samples=2, seed=1).values)
    assert not torch.equal(one, scores(task, n_samples=2, seed=2).values)
    small = Problem(model, F.cross_entropy, TensorDataset(x, y), "self", batch_size=7)
    close(scores(small, n_samples=2, seed=1).values, one, 1e-12)


@pytest.mark.parametrize("queries", ["queries", "self"])
@pytest.mark.parametrize("name", ["relu", "cnn", "norm", "table"])
def test_neither_batch_size_nor_order_matters(name: str, queries: str) -> None:
    task = problem(name, queries)
    expected = scores(task).values
    close(scores(problem(name, queries, batch_size=3)).values, expected, 1e-12)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    x, y = task.train.tensors  # type: ignore[attr-defined]
    shuffled = Problem(
        task.model, task.loss, TensorDataset(x[order], y[order]), task.queries, batch_size=4
    )
    close(scores(shuffled).values, expected[:, order], 1e-12)


@pytest.mark.parametrize("name", ["relu", "cnn", "table"])
def test_queries_in_several_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem(name)
    expected = scores(task).values
    monkeypatch.setattr("baselines.influence_functions.QUERY_FLOATS", 300)
    close(scores(task).values, expected, 1e-12)


@pytest.mark.parametrize("name", ["cnn", "tokens"])
def test_squares_summed_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fine_bench.gradients.curvature.ekfac_linear.SQUARE_FLOATS", 40)
    close(scores(problem(name)).values, twin(problem(name), "fisher"))


@pytest.mark.parametrize("name", ["relu", "tanh no bias", "cnn", "table"])
def test_float32_agrees_with_float64(name: str) -> None:
    task = problem(name)
    expected = scores(task).values
    x, y = task.train.tensors  # type: ignore[attr-defined]
    xq, yq = task.queries.tensors  # type: ignore[union-attr]
    low = Problem(
        task.model.float(),
        task.loss,
        TensorDataset(x.float(), y),
        TensorDataset(xq.float(), yq),
    )
    got = scores(low).values
    assert got.dtype == torch.float32
    close(got.double(), expected, 1e-4)


@pytest.mark.parametrize("name", ["cnn", "norm", "table"])
def test_products_of_all_pairs_and_of_directions(name: str) -> None:
    task = problem(name)
    x, y = task.train.tensors  # type: ignore[attr-defined]
    engine = GradientEngine(task.model.eval(), task.loss)
    roots = Roots("fisher", task.loss, torch.zeros(N, 1))
    fitted = fit_ekfac(engine, lambda: task.batches("train"), roots, N)
    fitted.damp(None, 0.1)
    xq, yq = task.queries.tensors  # type: ignore[union-attr]
    train, queries = engine(x, y), engine(xq, yq)
    expected = twin(task, "fisher")
    close(fitted.gram(queries, train), expected)
    close(fitted.gram(train).diagonal(), fitted.quadratic(train))
    own, total = fitted.own_and_total(train)
    close(own, fitted.gram(train).diagonal())
    close(total, fitted.gram(train).sum(1))
    close(train.contract(fitted.solve(queries.weighted_sum(torch.eye(V).double()))), expected)
    again = EKFAC.from_state(fitted.state_dict())
    assert [type(b) for b in again.blocks] == [type(b) for b in fitted.blocks]
    close(again.gram(queries, train), expected)


def test_refuses_a_singular_block() -> None:
    # softmax does not change when all logits shift, so undamped the last layer has no inverse
    with pytest.raises(ValueError, match=r"curvature of '0' is singular: smallest eigenvalue"):
        scores(problem("logistic"), damping=0.0)


def test_refuses_a_fisher_without_classes() -> None:
    x, y = data((6,), N, 0)
    model = nn.Sequential(nn.Linear(6, 1)).double()

    def loss(z: Tensor, t: Tensor, reduction: str) -> Tensor:
        return (z[:, 0] - t).square()

    task = Problem(model, loss, TensorDataset(x, y.double()), "self")
    with pytest.raises(ValueError, match="needs class logits"):
        scores(task)


def test_refuses_roots_of_a_loss_that_is_not_convex() -> None:
    x, y = data((6,), N, 0)
    model = nn.Sequential(nn.Linear(6, 1)).double()

    def loss(z: Tensor, t: Tensor, reduction: str) -> Tensor:
        return torch.cos(z[:, 0]) + 0.0 * t

    task = Problem(model, loss, TensorDataset(x, y), "self")
    with pytest.raises(ValueError, match="not convex in the model's output"):
        scores(task, curvature="ggn")


def test_refuses_roots_of_a_large_output() -> None:
    x, _ = data((6,), N, 0)
    model = nn.Sequential(nn.Linear(6, 101)).double()
    task = Problem(model, F.cross_entropy, TensorDataset(x, torch.zeros(N).long()), "self")
    with pytest.raises(ValueError, match="roots of a 101 × 101 matrix"):
        scores(task, curvature="ggn")
