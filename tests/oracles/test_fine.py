"""f-INE against a twin in float64, written straight from the formula and fed the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import direction_effects, self_effects
from fine_bench.models.classifier import Classifier
from support.tensors import close, observable_gradients
from support.training import QUIET, Diary

N, N_QUERY, CLASSES, LR, BATCH = 22, 7, 3, 0.3, 6  # 22 = 3 · 6 + 4: the last batch is shorter


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {
            "mlp": (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)), (5,)),
            "cnn": (
                nn.Sequential(
                    nn.Conv2d(1, 3, 3, padding=1, bias=False),
                    nn.Tanh(),
                    nn.Flatten(),
                    nn.Linear(3 * 16, CLASSES),
                ),
                (1, 4, 4),
            ),
        }


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x, xq = torch.randn(N, *shape, generator=g), torch.randn(N_QUERY, *shape, generator=g)
    y = torch.randint(CLASSES, (N,), generator=g)
    yq = torch.randint(CLASSES, (N_QUERY,), generator=g)
    return x, y, xq, yq


def fit(name: str, callbacks: list[pl.Callback], epochs: int = 3) -> tuple[Classifier, Diary]:
    net, shape = networks()[name]
    x, y, _, _ = data(shape)
    module, diary = Classifier(net, CLASSES, lr=LR), Diary()
    loader = DataLoader(
        TensorDataset(x, y, torch.arange(N)),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(11),
    )
    pl.Trainer(
        max_epochs=epochs,
        **QUIET,
        callbacks=[*callbacks, diary],
    ).fit(module, loader)
    return module, diary


def twin(
    name: str,
    diary: Diary,
    *,
    target: str,
    observable: str,
    composition: str,
    contrast: str,
    weighting: str | None = "noise",
    refresh: int = 1,
    step_weight: str = "lr",
) -> tuple[Tensor, Tensor, Tensor]:
    """μ, bound and number of observations, example by example and reference by reference."""
    net, shape = networks()[name]
    x, y, xq, yq = data(shape)
    rows = {"self": 1, "queries": N_QUERY, "validation": 1, "validation_per_class": CLASSES}[target]
    groups = {
        "queries": [[v] for v in range(N_QUERY)],
        "validation": [list(range(N_QUERY))],
        "validation_per_class": [
            [v for v in range(N_QUERY) if int(yq[v]) == c] for c in range(CLASSES)
        ],
        "self": [],
    }[target]
    numerator, denominator, total, squares = (torch.zeros(rows, N).double() for _ in range(4))
    weighted, weights = torch.zeros(rows, N).double(), torch.zeros(rows, N).double()
    seen = torch.zeros(N)
    directions: list[Tensor] = []
    for t, (params, index) in enumerate(diary.steps):
        m = len(index)
        weight = LR
        if step_weight == "uncertainty":
            logits = functional_call(net.double(), params, (x[index].double(),))
            p = torch.softmax(logits, 1)[range(m), y[index]]
            weight = LR * float((1 - p).mean())
        g = observable_gradients(net, params, x[index], y[index], "loss")
        own = observable_gradients(net, params, x[index], y[index], observable)
        if target != "self" and t % refresh == 0:
            h = observable_gradients(net, params, xq, yq, observable)
            directions = []
            for members in groups:
                parts = []
                for v in members:
                    if target == "queries" or weighting is None:
                        scale = 1.0
                    elif weighting == "norm":
                        scale = float(h[v].norm())
                    else:
                        scale = float((g @ h[v]).std())
                    parts.append(h[v] / scale)
                directions.append(torch.stack(parts).mean(0))
        for position, i in enumerate(index.tolist()):
            seen[i] += 1
            others = [j for j in range(m) if j != position]
            for r in range(rows):
                h_r = own[position] if target == "self" else directions[r]
                c_i = g[position] @ h_r
                c = torch.stack([g[j] @ h_r for j in others])
                effect = c_i - (c.mean() if contrast == "substitution" else 0.0)
                sigma = c.std()
                numerator[r, i] += weight * effect
                denominator[r, i] += (weight * sigma) ** 2
                weighted[r, i] += weight * effect / sigma
                weights[r, i] += weight**2
                mu_t = effect / (m**0.5 * sigma)
                total[r, i] += mu_t
                squares[r, i] += mu_t**2
    if composition == "accumulated":
        mu = numerator / (N * denominator).sqrt()
    elif composition == "weighted":
        mu = weighted / (N * weights).sqrt()
    else:
        mu = total / seen.sqrt()
    return mu, squares.sqrt(), seen


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("observable", ["margin", "loss"])
@pytest.mark.parametrize("composition", ["accumulated", "weighted", "standardised"])
@pytest.mark.parametrize("contrast", ["substitution", "removal"])
def test_self(name: str, observable: Any, composition: Any, contrast: Any) -> None:
    options = {"observable": observable, "composition": composition, "contrast": contrast}
    callback = FINECallback("self", **options)
    _, diary = fit(name, [callback])
    scores = callback.scores()
    mu, bound, seen = twin(name, diary, target="self", **options)
    assert scores.values.shape == (1, N)
    close(scores.values, mu, 1e-5)
    close(scores.extras["bound"], bound, 1e-5)
    assert scores.n_observations is not None
    assert torch.equal(scores.n_observations, seen.long())


@pytest.mark.parametrize("target", ["queries", "validation", "validation_per_class"])
@pytest.mark.parametrize(
    ("observable", "composition", "contrast", "weighting", "refresh"),
    [
        ("margin", "accumulated", "substitution", "noise", 1),
        ("margin", "accumulated", "substitution", "norm", 3),
        ("loss", "standardised", "substitution", None, 1),
        ("margin", "weighted", "substitution", "noise", 2),
        ("loss", "accumulated", "removal", "noise", 2),
        ("margin", "standardised", "removal", "noise", 5),
    ],
)
def test_queries(
    target: Any, observable: Any, composition: Any, contrast: Any, weighting: Any, refresh: int
) -> None:
    _, _, xq, yq = data((5,))
    callback = FINECallback(
        target,
        observable,
        composition,
        contrast=contrast,
        queries=TensorDataset(xq, yq),
        query_weighting=weighting,
        refresh_every=refresh,
    )
    _, diary = fit("mlp", [callback])
    mu, bound, _ = twin(
        "mlp",
        diary,
        target=target,
        observable=observable,
        composition=composition,
        contrast=contrast,
        weighting=weighting,
        refresh=refresh,
    )
    scores = callback.scores()
    close(scores.values, mu, 1e-5)
    close(scores.extras["bound"], bound, 1e-5)
    assert (scores.values.abs() <= scores.extras["bound"] + 1e-6).all() or (
        composition != "standardised"
    )


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("target", ["self", "queries", "validation", "validation_per_class"])
@pytest.mark.parametrize("observable", ["margin", "loss"])
@pytest.mark.parametrize("composition", ["accumulated", "weighted"])
def test_steps_weighted_by_uncertainty(
    name: str, target: Any, observable: Any, composition: Any
) -> None:
    _, _, xq, yq = data(networks()[name][1])
    queries = None if target == "self" else TensorDataset(xq, yq)
    options: dict[str, Any] = {"queries": queries, "refresh_every": 1}
    plain = FINECallback(target, observable, composition, **options)
    callback = FINECallback(target, observable, composition, step_weight="uncertainty", **options)
    _, diary = fit(name, [plain, callback])
    mu, bound, _ = twin(
        name,
        diary,
        target=target,
        observable=observable,
        composition=composition,
        contrast="substitution",
        step_weight="uncertainty",
    )
    close(callback.scores().values, mu, 1e-5)
    close(callback.scores().extras["bound"], bound, 1e-5)
    # the weights must matter, or the comparison says nothing
    difference = (callback.scores().values - plain.scores().values).abs().max()
    assert float(difference) > 1e-3 * float(mu.abs().max())


def test_leave_one_out_identities() -> None:
    g = torch.Generator().manual_seed(0)
    c = torch.randn(2, 9, generator=g, dtype=torch.float64) ** 3
    effect, sigma = direction_effects(c)
    for r in range(2):
        for i in range(9):
            others = torch.cat([c[r, :i], c[r, i + 1 :]])
            assert torch.isclose(effect[r, i], c[r, i] - others.mean(), rtol=1e-12)
            assert torch.isclose(sigma[r, i], others.std(), rtol=1e-10)


def test_self_is_the_directions_of_the_gram_matrix() -> None:
    """Row i of the Gram matrix is the statistic for the direction g_i."""
    a = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = a @ a.T
    effect, sigma = self_effects(gram, None)
    all_effects, all_sigmas = direction_effects(gram)
    close(effect, all_effects.diagonal(), 1e-12)
    close(sigma, all_sigmas.diagonal(), 1e-12)


def test_sign_a_helpful_example_has_positive_influence() -> None:
    """Copies of the queries help them; copies with a wrong label harm them."""
    g = torch.Generator().manual_seed(5)
    n = 120
    x = torch.randn(n, 5, generator=g)
    w = torch.randn(5, generator=g)
    y = (x @ w > 0).long()
    harmful = torch.arange(n) % 4 == 0
    given = torch.where(harmful, 1 - y, y)
    callback = FINECallback(
        "validation", contrast="removal", queries=TensorDataset(x, y), refresh_every=1
    )
    module = Classifier(nn.Linear(5, 2), 2, lr=0.2)
    pl.Trainer(
        max_epochs=5,
        **QUIET,
        callbacks=[callback],
    ).fit(module, DataLoader(TensorDataset(x, given, torch.arange(n)), batch_size=20))
    mu = callback.scores().values[0]
    assert float((mu[harmful] < 0).float().mean()) > 0.8
    assert float((mu[~harmful] > 0).float().mean()) > 0.8


def test_standard_error_of_independent_observations_is_right() -> None:
    """Where the observations are independent, the standard error is the spread over runs."""
    g = torch.Generator().manual_seed(2)
    runs, steps, n = 400, 12, 3
    values, errors = [], []
    for _ in range(runs):
        sums = FineAccumulator(n, 1, "standardised")
        for _ in range(steps):
            effect = 0.5 + torch.randn(n, generator=g)
            sums.observe(torch.arange(n), effect, torch.ones(n), lr=0.1)
        mu, error = sums.mu()
        values.append(mu[0])
        errors.append(error[0])
    spread = torch.stack(values).std()
    assert abs(float(torch.stack(errors).mean() / spread) - 1) < 0.08


def test_unobserved_and_noiseless_examples() -> None:
    sums = FineAccumulator(4, 1)
    sums.observe(
        torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0, 1]), 0.1
    )
    sums.observe(torch.tensor([0, 2]), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), 0.1)
    scores = sums.scores("fine", "self")
    assert sums.n_without_noise == 1
    assert scores.values[0].tolist()[1] == 0.0
    assert scores.values[0].tolist()[3] == 0.0
    assert scores.std_error is not None
    assert torch.isinf(scores.std_error[0, [1, 3]]).all()
    assert torch.isfinite(scores.std_error[0, [0, 2]]).all()


def test_state_goes_through_a_dictionary() -> None:
    def feed(sums: FineAccumulator, steps: range) -> None:
        for t in steps:
            g = torch.Generator().manual_seed(t)
            sums.observe(
                torch.randperm(9, generator=g)[:4], torch.randn(4, generator=g), torch.ones(4), 0.1
            )

    whole, first, second = (FineAccumulator(9, 1) for _ in range(3))
    feed(whole, range(10))
    feed(first, range(4))
    second.load_state_dict(first.state_dict())
    feed(second, range(4, 10))
    assert torch.equal(whole.scores("f", "self").values, second.scores("f", "self").values)
    assert second.n_steps == 10
    with pytest.raises(ValueError, match="resume with the same data and queries"):
        FineAccumulator(8, 1).load_state_dict(first.state_dict())
