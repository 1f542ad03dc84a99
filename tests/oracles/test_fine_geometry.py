"""f-INE in the EK-FAC geometry and in snapshots, against a twin in float64.

The twin knows the parameters before every step, who was in the batch, and which reference and fit
examples were drawn; it builds each layer's curvature with ``torch.kron`` and loops over everything.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.geometry import Euclidean, Whitened
from fine_bench.fine.snapshot import SnapshotSchedule
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.curvature import ekfac_linear
from fine_bench.gradients.curvature.ekfac import EKFAC
from fine_bench.gradients.curvature.ekfac_dense import DenseCurvature
from fine_bench.gradients.curvature.ekfac_linear import LayerCurvature, rotated
from support.tensors import close
from support.training import QUIET

N, N_QUERY, CLASSES, BATCH, EPOCHS = 22, 6, 3, 6, 3  # 22 = 3 · 6 + 4: the last batch is shorter
STEPS = 4 * EPOCHS


def rate(t: int) -> float:
    """Step size of step t = 0, 1, …: no two are equal."""
    return 0.3 / (1 + 0.2 * t)


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    stretch = torch.linspace(0.4, 2.0, 5, dtype=torch.float64)
    x = torch.randn(N, 5, generator=g, dtype=torch.float64) * stretch + 0.5
    xq = torch.randn(N_QUERY, 5, generator=g, dtype=torch.float64) * stretch + 0.5
    y = torch.randint(CLASSES, (N,), generator=g)
    return x, y, xq, torch.arange(N_QUERY) % CLASSES


class Diary(pl.Callback):
    """The parameters before each step, and at the end; who was in the batch."""

    def __init__(self) -> None:
        self.params: list[dict[str, Tensor]] = []
        self.index: list[Tensor] = []

    def _note(self, module: Any) -> None:
        named = module.net.named_parameters()
        self.params.append({k: v.detach().clone().double() for k, v in named})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self._note(pl_module)
        self.index.append(batch[2].clone())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._note(pl_module)


def fit(callback: FINECallback, dtype: torch.dtype = torch.float64) -> Diary:
    x, y, _, _ = data()
    diary = Diary()
    loader = DataLoader(
        TensorDataset(x.to(dtype), y, torch.arange(N)),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(11),
    )
    pl.Trainer(
        max_epochs=EPOCHS,
        **QUIET,
        callbacks=[callback, diary],
    ).fit(Small().to(dtype), loader)
    return diary


def watch(target: Any, dtype: torch.dtype = torch.float64, **options: Any) -> FINECallback:
    _, _, xq, yq = data()
    queries = None if target == "self" else TensorDataset(xq.to(dtype), yq)
    return FINECallback(target, queries=queries, **options)


# ---------------------------------------------------------------------------------------- the twin


def gradients(params: dict[str, Tensor], x: Tensor, y: Tensor, observable: str) -> Tensor:
    """∇ of each example's observable, each layer as vec [W|b], (n, P)."""
    net = Small().net.double()

    def one(values: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        log_p = F.log_softmax(functional_call(net, values, (xi[None],)), 1)[0]
        if observable == "loss":
            return -log_p.gather(0, yi[None])[0]
        p = log_p.exp().gather(0, yi[None])[0]
        return -(p / (1 - p)).log()

    g = vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([torch.cat([g[f"{k}.weight"], g[f"{k}.bias"][:, :, None]], 2).flatten(1)
                      for k in (0, 2)], 1)  # fmt: skip


def inverse_curvature(params: dict[str, Tensor], x: Tensor, relative: float) -> Tensor:
    """(F + λ)⁻¹ in full, (P, P), from explicit eigenbases."""
    n = len(x)
    hidden = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
    p = torch.softmax(hidden @ params["2.weight"].T + params["2.bias"], 1)
    labels = [gradients(params, x, torch.full((n,), k), "loss") for k in range(CLASSES)]
    blocks, start = [], 0
    for a in (x, hidden):
        a = torch.cat([a, torch.ones(n, 1).double()], 1)
        n_in, n_out = a.shape[1], 7 if start == 0 else CLASSES
        stop = start + n_in * n_out
        A = torch.zeros(n_in, n_in).double()
        G = torch.zeros(n_out, n_out).double()
        for i in range(n):
            A += torch.outer(a[i], a[i])
            for k in range(CLASSES):
                b = labels[k][i, start:stop].view(n_out, n_in)[:, -1]  # the bias's gradient
                G += p[i, k] * torch.outer(b, b)
        U = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
        s = torch.zeros(stop - start).double()
        for i in range(n):
            for k in range(CLASSES):
                s += p[i, k] * (U.T @ labels[k][i, start:stop]).square() / n
        blocks.append(U @ torch.diag(1 / (s + relative * s.mean())) @ U.T)
        start = stop
    return torch.block_diag(*blocks)


def complements(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    p = torch.softmax(functional_call(Small().net.double(), params, (x,)), 1)
    return 1 - p.gather(1, y[:, None])[:, 0]


def directions(h: Tensor, g: Tensor, metric: Tensor, target: str, weighting: Any) -> list[Tensor]:
    """One a row: the queries' preconditioned, weighted mean."""
    yq = data()[3]
    groups = {
        "queries": [[v] for v in range(N_QUERY)],
        "validation": [list(range(N_QUERY))],
        "validation_per_class": [
            [v for v in range(N_QUERY) if int(yq[v]) == c] for c in range(CLASSES)
        ],
    }[target]
    result = []
    for members in groups:
        parts = []
        for v in members:
            scale = 1.0
            if target != "queries" and weighting == "norm":
                scale = float(h[v].norm())
            elif target != "queries" and weighting == "noise":
                scale = float((g @ metric @ h[v]).std())
            parts.append(metric @ h[v] / scale)
        result.append(torch.stack(parts).mean(0))
    return result


def twin(
    callback: FINECallback,
    diary: Diary,
    *,
    fits: set[int] | None,
    snapshots: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """μ and bound; the curvature is fitted after ``fits`` steps, snapshots after ``snapshots``."""
    x, y, xq, yq = data()
    o = callback.options
    rows = {"self": 1, "queries": N_QUERY, "validation": 1, "validation_per_class": CLASSES}[
        o.target
    ]
    schedule = callback._schedule
    assert schedule is not None
    metric = torch.eye(6 * 7 + 8 * CLASSES).double()
    shift, variance, total, times, squares = (torch.zeros(rows, N).double() for _ in range(5))
    counted, weights = torch.zeros(rows, N).double(), torch.zeros(rows, N).double()
    kept: list[Tensor] = []
    moments = range(STEPS) if snapshots is None else snapshots
    last = 0
    for seen_steps, t in enumerate(moments):
        params = diary.params[t]
        if fits is not None and t in fits:
            assert isinstance(schedule.passes.metric, Whitened)
            drawn = schedule.passes.metric.draw(t, N)[0]
            assert len(drawn) == o.fit_examples
            metric = inverse_curvature(params, x[drawn], o.relative_damping)
            kept = []
        if snapshots is None:
            examples = reference = diary.index[t]
            m = len(examples)
            H, V, k, r, T = rate(t), rate(t) ** 2 / N, 1.0, m**-0.5, 1.0 / m
        else:
            assert isinstance(schedule, SnapshotSchedule)
            examples, reference = torch.arange(N), schedule.draw_reference(t)
            assert len(reference) == o.n_reference
            steps = range(last, t)
            sizes = [len(diary.index[u]) for u in steps]
            H = sum(rate(u) for u in steps) / N
            V = sum(rate(u) ** 2 / m for u, m in zip(steps, sizes, strict=True))
            k, r = sum(sizes) / N, sum(m**0.5 for m in sizes) / N
            T = len(sizes) / N
            last = t
        u = 1.0
        if o.step_weight == "uncertainty":
            u = float(complements(params, x[reference], y[reference]).mean())
        g = gradients(params, x[examples], y[examples], "loss")
        own = gradients(params, x[examples], y[examples], o.observable)
        g_ref = gradients(params, x[reference], y[reference], "loss")
        if o.target != "self" and (
            snapshots is not None or not kept or seen_steps % o.refresh_every == 0
        ):
            h = gradients(params, xq, yq, o.observable)
            kept = directions(h, g_ref, metric, o.target, o.query_weighting)
        for position, i in enumerate(examples.tolist()):
            others = [j for j, e in enumerate(reference.tolist()) if e != i]
            for row in range(rows):
                d = metric @ own[position] if o.target == "self" else kept[row]
                c = torch.stack([g_ref[j] @ d for j in others])
                sigma = c.std()
                if o.noise == "model" and o.target == "self":
                    # K_ii is the variance of K_ij; d has the 1/(1 − p) of the margin in it
                    sigma = (g[position] @ d) / (g[position] @ metric @ g[position]).sqrt()
                effect = g[position] @ d - (c.mean() if o.contrast == "substitution" else 0.0)
                shift[row, i] += u * H * effect
                variance[row, i] += (u * sigma) ** 2 * V
                counted[row, i] += u * H * effect / sigma
                weights[row, i] += u**2 * V
                total[row, i] += r * effect / sigma
                squares[row, i] += T * (effect / sigma) ** 2
                times[row, i] += k
    # in-batch, H is a step size and n·V its square: shift / sqrt(n · Σ η²σ²)
    if snapshots is None:
        variance, weights = variance * N * N, weights * N * N
    mu = {
        "accumulated": shift / variance.sqrt(),
        "weighted": counted / weights.sqrt(),
        "standardised": total / times.sqrt(),
    }[o.composition]
    return mu, squares.sqrt()


def check(callback: FINECallback, expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    assert callback._schedule is not None
    sums = callback._schedule.accumulator
    close(sums.mu()[0], expected[0], tolerance)
    close(sums.sums["mu2"].sqrt(), expected[1], tolerance)
    close(callback.scores().values, expected[0], max(tolerance, 1e-6))


# --------------------------------------------------------------------------------------- the tests

CASES: list[tuple[str, dict[str, Any]]] = [
    ("self", {"contrast": "removal"}),
    ("self", {"observable": "loss", "composition": "standardised"}),
    ("self", {"step_weight": "uncertainty"}),
    ("self", {"composition": "weighted", "step_weight": "uncertainty"}),
    ("queries", {"composition": "standardised"}),
    ("validation", {"composition": "weighted"}),
    ("validation", {"step_weight": "uncertainty"}),
    ("validation", {"query_weighting": "norm", "contrast": "removal"}),
    ("validation_per_class", {"observable": "loss"}),
]


EKFAC_CASES: list[tuple[str, dict[str, Any]]] = [
    *CASES,
    ("self", {"noise": "model", "step_weight": "uncertainty"}),
    ("self", {"noise": "model", "observable": "loss", "contrast": "removal"}),
    ("validation", {"noise": "model"}),
]


@pytest.mark.parametrize(("target", "options"), EKFAC_CASES)
def test_ekfac_in_batch(target: str, options: dict[str, Any]) -> None:
    callback = watch(target, geometry="ekfac", fit_examples=15, refresh_every=3, **options)
    diary = fit(callback)
    check(callback, twin(callback, diary, fits={0, 4, 8}), 1e-8)


def test_ekfac_snapshots_with_the_noise_of_the_geometry() -> None:
    options: dict[str, Any] = {"geometry": "ekfac", "fit_examples": 15, "n_reference": 9}
    callback = watch("self", schedule="snapshot", noise="model", **options)
    diary = fit(callback)
    check(callback, twin(callback, diary, fits={4, 8, 12}, snapshots=[4, 8, 12]), 1e-8)


def test_the_noise_of_the_geometry_needs_that_geometry() -> None:
    with pytest.raises(ValueError, match='use noise="sample"'):
        FINECallback(noise="model")


def test_a_fitted_geometry_is_not_resumed_by_one_that_is_never_fitted() -> None:
    assert Euclidean().state_dict() == {}
    Euclidean().load_state_dict({})
    with pytest.raises(ValueError, match="resume with the geometry=… that it was saved with"):
        Euclidean().load_state_dict(Whitened(torch.nn.functional.cross_entropy).state_dict())


def test_ekfac_in_batch_refitted_at_other_steps() -> None:
    options: dict[str, Any] = {"geometry": "ekfac", "fit_examples": 15, "relative_damping": 0.3}
    callback = watch("validation", refit_every=5, refresh_every=100, **options)
    diary = fit(callback)
    expected = twin(callback, diary, fits={0, 5, 10})
    check(callback, expected, 1e-8)
    once = twin(callback, diary, fits={0})
    assert float((once[0] - expected[0]).abs().max()) > 1e-3


@pytest.mark.parametrize(("target", "options"), CASES)
@pytest.mark.parametrize("geometry", ["euclidean", "ekfac"])
def test_snapshots(target: str, options: dict[str, Any], geometry: Any) -> None:
    callback = watch(
        target, schedule="snapshot", geometry=geometry, n_reference=9, fit_examples=15, **options
    )
    diary = fit(callback)
    fits = {4, 8, 12} if geometry == "ekfac" else None
    check(callback, twin(callback, diary, fits=fits, snapshots=[4, 8, 12]), 1e-8)


@pytest.mark.parametrize(
    ("timing", "snapshots", "fits"),
    [
        # after step 12 the third epoch has had its fit
        ({"every_n_steps": 3}, [3, 6, 9, 12], {3, 6, 9}),
        ({"every_n_steps": 3, "refit_every": 5}, [3, 6, 9, 12], {3, 9}),
        ({"every_n_steps": 3, "composition": "standardised"}, [3, 6, 9, 12], {3, 6, 9}),
        ({"n_snapshots": 4}, [3, 6, 9, 12], {3, 6, 9}),
        ({"n_snapshots": 1}, [12], {12}),
        ({"every_n_steps": 12, "refit_every": 1}, [12], {12}),
    ],
)
def test_when_there_are_snapshots(timing: Any, snapshots: list[int], fits: set[int]) -> None:
    options: dict[str, Any] = {"n_reference": 9, "fit_examples": 15, "geometry": "ekfac"}
    callback = watch("validation", schedule="snapshot", **options, **timing)
    diary = fit(callback)
    check(callback, twin(callback, diary, fits=fits, snapshots=snapshots), 1e-8)


def test_steps_after_the_last_snapshot_get_one_of_their_own() -> None:
    callback = watch("self", schedule="snapshot", every_n_steps=5, n_reference=9)
    diary = fit(callback)
    check(callback, twin(callback, diary, fits=None, snapshots=[5, 10, 12]), 1e-8)


@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
@pytest.mark.parametrize("target", ["self", "validation"])
def test_float32_agrees_with_the_twin(target: str, schedule: Any) -> None:
    options: dict[str, Any] = {"geometry": "ekfac", "fit_examples": 15, "refresh_every": 3}
    callback = watch(target, torch.float32, schedule=schedule, n_reference=9, **options)
    diary = fit(callback, torch.float32)
    snapshot = schedule == "snapshot"
    fits = {4, 8, 12} if snapshot else {0, 4, 8}
    check(
        callback, twin(callback, diary, fits=fits, snapshots=[4, 8, 12] if snapshot else None), 1e-3
    )


def test_the_geometry_matters() -> None:
    """Otherwise the tests above could pass without it."""
    plain, whitened = watch("self"), watch("self", geometry="ekfac")
    fit(plain)
    fit(whitened)
    difference = (plain.scores().values - whitened.scores().values).abs().max()
    assert float(difference) > 0.1 * float(plain.scores().values.abs().max())


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize(("n_in", "n_out"), [(7, 5), (3, 8)])
def test_gram_of_the_rotated_gradients(
    positions: int, n_in: int, n_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs at once and in pieces, with itself and with another batch."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def block(n: int) -> FactorBlock:
        a, b = random(n, positions, n_in), random(n, positions, n_out)
        return FactorBlock("layer", a, b, weight=True, bias=True)

    q_in, q_out = (torch.linalg.qr(random(k, k))[0] for k in (n_in + 1, n_out))
    inverse = random(n_out, n_in + 1).exp()
    layer = LayerCurvature("layer", q_in, q_out, inverse, positions == 1, inverse)
    x, y = block(9), block(4)
    for size in (2**18, 50):
        monkeypatch.setattr(ekfac_linear, "GRAM_FLOATS", size)
        monkeypatch.setattr(ekfac_linear, "DENSE_FLOATS", size)
        for one, other in ((x, x), (x, y)):
            left, right = (rotated(v, q_in, q_out).flatten(1) for v in (one, other))
            close(layer.gram(one, other), (left * inverse.flatten()) @ right.T, 1e-12)
        close(layer.gram(x, x).diagonal(), layer.quadratic(x), 1e-12)
        own, total = layer.own_and_total(x)
        close(own, layer.gram(x, x).diagonal(), 1e-12)
        close(total, layer.gram(x, x).sum(1), 1e-12)
    matrix = random(6, 6)
    basis = torch.linalg.qr(matrix)[0]
    values = matrix[0].exp()
    dense = DenseCurvature("rest", basis, values, values)
    v, w = DenseBlock("rest", random(3, 6)), DenseBlock("rest", random(2, 6))
    close(dense.gram(v, w), v.g @ basis @ torch.diag(values) @ basis.T @ w.g.T, 1e-12)
    close(dense.own_and_total(v)[0], dense.gram(v, v).diagonal(), 1e-12)
    close(dense.own_and_total(v)[1], dense.gram(v, v).sum(1), 1e-12)
    whole = EKFAC([layer, dense], torch.zeros(2))
    again = EKFAC.from_state(whole.state_dict())
    assert [type(b) for b in again.blocks] == [LayerCurvature, DenseCurvature]
    assert torch.equal(again.blocks[0].gram(x, y), layer.gram(x, y))  # type: ignore[arg-type]
